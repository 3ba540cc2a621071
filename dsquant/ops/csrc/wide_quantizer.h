// The quantizer of x with AVX-512: avx2_codes.h's, 16 values at a time, with its bits. Included behind the pragma of a file that
// has chosen the instructions.

namespace dsq {
namespace {

struct WideQuantizer {
  const InputGrid& g;
  __m512i sum = _mm512_setzero_si512();
  __mmask16 nan = 0;

  // code - zero of the values that `inside` names, 0 elsewhere.
  inline __m512i operator()(const float* x, __mmask16 inside) {
    const __m512 moved = _mm512_sub_ps(_mm512_maskz_loadu_ps(inside, x), _mm512_set1_ps(g.offset));
    const __m512 v = _mm512_sub_ps(_mm512_div_ps(moved, _mm512_set1_ps(g.scale)), _mm512_set1_ps(g.shift));
    nan |= _mm512_mask_cmp_ps_mask(inside, v, v, _CMP_UNORD_Q);
    const __m512 clipped = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(g.qmin)), _mm512_set1_ps(g.qmax));
    const __m512i code = _mm512_maskz_sub_epi32(inside, _mm512_cvtps_epi32(clipped), _mm512_set1_epi32(g.zero));
    sum = _mm512_add_epi32(sum, code);
    return code;
  }

  RowStats stats() const { return {_mm512_reduce_add_epi32(sum), nan}; }
};

}  // namespace
}  // namespace dsq
