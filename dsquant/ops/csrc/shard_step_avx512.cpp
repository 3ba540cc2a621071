// The passes over a flat shard with AVX-512: 16 weights at a time, each byte read and written once. Everything rounds as in
// shard_step_runs.h, and partial sums are of the same lanes, so that bits are the same. As in avx2.cpp, standard headers come
// before the pragma.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "shard_step.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512vnni,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512vnni,popcnt")
#endif
#include <immintrin.h>

namespace dsq {
namespace {

constexpr int kWide = 16;
constexpr int kFew = 4;       // bins that are compared for
constexpr int kTable = 16;    // bins of a table that one register holds

inline __m512 of(float x) { return _mm512_set1_ps(x); }
inline __m512 clip(__m512 x, __m512 low, __m512 high) { return _mm512_min_ps(high, _mm512_max_ps(low, x)); }
inline __mmask16 lanes(int64_t left) { return left >= kWide ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

// Whole vectors are read and written without masks, which cost time.
template <bool whole>
inline __m512 load(__mmask16 live, const float* x) {
  return whole ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(live, x);
}
template <bool whole>
inline __m128i load(__mmask16 live, const int8_t* x) {
  return whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)) : _mm_maskz_loadu_epi8(live, x);
}
template <bool whole>
inline void store(__mmask16 live, float* x, __m512 values) {
  if (whole)
    _mm512_storeu_ps(x, values);
  else
    _mm512_mask_storeu_ps(x, live, values);
}
template <bool whole>
inline void store(__mmask16 live, int8_t* x, __m128i values) {
  if (whole)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), values);
  else
    _mm_mask_storeu_epi8(x, live, values);
}
// Call f(first of 16 elements, which of them there are, whether that is all of them).
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) f(i, lanes(kWide), std::true_type());
  if (i < n) f(i, lanes(n - i), std::false_type());
}

// float64 sums in eight lanes, the lower eight of 16 values first.
struct Lanes {
  __m512d sum;
  Lanes() : sum(_mm512_setzero_pd()) {}  // written out: what the compiler adds by itself is not of this instruction set
  void add(__m512d low, __m512d high) { sum = _mm512_add_pd(_mm512_add_pd(sum, low), high); }
  void add(__mmask16 which, __m512d low, __m512d high) {
    sum = _mm512_mask_add_pd(sum, static_cast<__mmask8>(which), sum, low);
    sum = _mm512_mask_add_pd(sum, static_cast<__mmask8>(which >> 8), sum, high);
  }
  double total() const {
    alignas(64) double lane[8];
    _mm512_store_pd(lane, sum);
    double found = 0;
    for (double x : lane) found += x;
    return found;
  }
};

inline __m512d lower(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline __m512d upper(__m512 x) {
  return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}

template <bool plain, bool sizes, int n_bins>
void sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, double* out,
             double* bins) {
  const __m512 scale = of(g.scale), centre = of(g.centre), shift = of(g.shift), low = of(g.low), high = of(g.high);
  const __m512 least = of(g.low * g.scale), most = of(g.high * g.scale);
  const bool ends_together = g.shift == 0.0f && g.low == static_cast<float>(g.qmin);  // no shift and no reach
  const __mmask16 from_level = ends_together ? 0xffff : 0;
  Lanes d_scale, norm, held[n_bins + 1];
  int64_t counts[n_bins + 1] = {};
  for_vectors(n, [&](int64_t i, __mmask16 live, auto all) {
    constexpr bool whole = all.value;
    const __m512 x = _mm512_sub_ps(load<whole>(live, w + i), centre), d = load<whole>(live, grad + i);
    const __m512i code = _mm512_cvtepi8_epi32(load<whole>(live, codes + i));
    const __m512 level = _mm512_add_ps(_mm512_cvtepi32_ps(code), shift);
    __m512 found = _mm512_mul_ps(level, d);
    if (!plain) {
      const __m512 v = _mm512_div_ps(x, scale), clipped = clip(v, low, high);
      const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
      const __m512 outside = _mm512_mask_mov_ps(clipped, from_level, level);
      found = _mm512_mul_ps(_mm512_sub_ps(level, clipped), d);
      found = _mm512_mask3_fmadd_ps(d, outside, found, static_cast<__mmask16>(~inside));
    }
    d_scale.add(lower(found), upper(found));
    if (sizes) {
      const __m512 size = _mm512_maskz_mov_ps(live, _mm512_abs_ps(x));
      norm.add(lower(size), upper(size));
    }
    if (n_bins) {
      const __m512 inner = clip(x, least, most);
      const __m512d first = lower(inner), second = upper(inner);
      for (int bin = 0; bin < n_bins; ++bin) {
        const __mmask16 here = _mm512_mask_cmpeq_epi32_mask(live, code, _mm512_set1_epi32(g.qmin + bin));
        held[bin].add(here, first, second);
        counts[bin] += _mm_popcnt_u32(here);
      }
    }
  });
  out[0] += d_scale.total();
  out[1] += norm.total();
  for (int bin = 0; bin < n_bins; ++bin) {
    bins[bin] += static_cast<double>(counts[bin]);
    bins[n_bins + bin] += held[bin].total();
  }
}

template <bool plain, bool sizes>
bool sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, int64_t n_bins,
             double* out, double* bins) {
  if (n_bins == 0)
    sum_run<plain, sizes, 0>(n, w, grad, codes, g, out, bins);
  else if (n_bins == 2)
    sum_run<plain, sizes, 2>(n, w, grad, codes, g, out, bins);
  else if (n_bins == kFew)
    sum_run<plain, sizes, kFew>(n, w, grad, codes, g, out, bins);
  else
    return false;
  return true;
}

// The numbers of AdamW in registers.
struct Adam {
  __m512 decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step;
  explicit Adam(const AdamW& a)
      : decay(of(a.decay)), one_minus_beta1(of(a.one_minus_beta1)), beta2(of(a.beta2)),
        one_minus_beta2(of(a.one_minus_beta2)), correction(of(a.correction)), eps(of(a.eps)), step(of(-a.step)) {}
};

// Tables of what belongs to a code, in one register: entry k is that of the code whose last four bits are k.
inline __m512i code_of_entry() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }
inline __m512 table(const float* values, int64_t n_bins, int qmin) {
  return _mm512_permutexvar_ps(_mm512_sub_epi32(code_of_entry(), _mm512_set1_epi32(qmin)),
                               _mm512_maskz_loadu_ps(lanes(n_bins), values));
}

template <bool pulled, bool spread>
void step_run(int64_t n, const RunStep& s) {
  const Adam a(s.adam);
  const RunGrid &g = s.before, &next = s.after;
  const Tracker& t = s.tracker;
  const __m512 scale = of(g.scale), low = of(g.low), high = of(g.high), shift = of(g.shift), twice = of(s.pull.twice);
  const __m512 new_scale = of(next.scale), least = of(static_cast<float>(g.qmin)), most = of(static_cast<float>(g.qmax));
  const __m512 keep = of(t.keep), momentum = of(t.momentum);
  const __m512 level = _mm512_add_ps(_mm512_cvtepi32_ps(code_of_entry()), shift), old_image = _mm512_mul_ps(level, scale);
  const __m512 mean = spread ? table(s.pull.mean, s.pull.n_bins, g.qmin) : old_image;
  const __m512 factor = spread ? table(s.pull.factor, s.pull.n_bins, g.qmin) : old_image;
  const __m128i up = _mm_set1_epi8(1), down = _mm_set1_epi8(-1);
  for_vectors(n, [&](int64_t i, __mmask16 live, auto all) {
    constexpr bool whole = all.value;
    const __m512 x = load<whole>(live, s.w + i), d = load<whole>(live, s.grad + i);
    const __m512i code = _mm512_cvtepi8_epi32(load<whole>(live, t.codes + i));
    const __m512 v = _mm512_div_ps(x, scale);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
    __m512 gradient = _mm512_maskz_mov_ps(inside, d);
    if (pulled) {
      __m512 found = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_permutexvar_ps(code, old_image)), twice);
      if (spread) {
        const __m512 away = _mm512_sub_ps(x, _mm512_permutexvar_ps(code, mean));
        found = _mm512_fmadd_ps(away, _mm512_permutexvar_ps(code, factor), found);
      }
      gradient = _mm512_maskz_add_ps(inside, gradient, found);
    }
    __m512 m = load<whole>(live, s.m + i), square = load<whole>(live, s.v + i);
    m = _mm512_fmadd_ps(a.one_minus_beta1, _mm512_sub_ps(gradient, m), m);
    square = _mm512_fmadd_ps(_mm512_mul_ps(a.one_minus_beta2, gradient), gradient, _mm512_mul_ps(square, a.beta2));
    const __m512 size = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(square), a.correction), a.eps);
    const __m512 moved = _mm512_add_ps(_mm512_mul_ps(x, a.decay), _mm512_div_ps(_mm512_mul_ps(a.step, m), size));
    store<whole>(live, s.m + i, m);
    store<whole>(live, s.v + i, square);
    store<whole>(live, s.w + i, moved);

    const __m512 inner = clip(_mm512_sub_ps(_mm512_div_ps(moved, new_scale), shift), least, most);
    const __m512 fresh = _mm512_roundscale_ps(inner, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 image = _mm512_mul_ps(_mm512_add_ps(fresh, shift), new_scale);
    store<whole>(live, s.image + i, image);
    const __m512i now = _mm512_cvttps_epi32(fresh);
    const __m512 often = load<whole>(live, t.frequency + i);
    __m512 later = _mm512_mul_ps(often, keep);
    if (const __mmask16 moved_code = _mm512_mask_cmpneq_epi32_mask(live, now, code)) {
      // Few codes change in a step, and what is not written need not go to memory.
      const __mmask16 rose = _mm512_mask_cmpgt_epi32_mask(moved_code, now, code), fell = moved_code & ~rose;
      const __m128i last = load<whole>(live, t.direction + i);
      const __mmask16 turned = _mm_mask_cmpeq_epi8_mask(rose, last, down) | _mm_mask_cmpeq_epi8_mask(fell, last, up);
      later = _mm512_mask_add_ps(later, turned, later, momentum);
      store<whole>(live, t.direction + i, _mm_mask_mov_epi8(_mm_mask_mov_epi8(last, fell, down), rose, up));
      store<whole>(live, t.codes + i, _mm512_cvtepi32_epi8(now));
    }
    if (_mm512_cmpneq_epi32_mask(_mm512_castps_si512(later), _mm512_castps_si512(often)))
      store<whole>(live, t.frequency + i, later);
  });
}

}  // namespace

bool sums_avx512(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, int64_t n_bins,
                 bool sizes, double* out, double* bins) {
  if (g.plain)
    return sizes ? sum_run<true, true>(n, w, grad, codes, g, n_bins, out, bins)
                 : sum_run<true, false>(n, w, grad, codes, g, n_bins, out, bins);
  return sizes ? sum_run<false, true>(n, w, grad, codes, g, n_bins, out, bins)
               : sum_run<false, false>(n, w, grad, codes, g, n_bins, out, bins);
}

bool step_avx512(int64_t n, const RunStep& s) {
  if (s.tracker.frozen || s.before.centre != 0 || s.after.centre != 0) return false;
  if (s.pull.any && (s.before.qmin < -8 || s.before.qmax > 7 || s.pull.n_bins > kTable)) return false;
  if (!s.pull.any)
    step_run<false, false>(n, s);
  else if (!s.pull.mean)
    step_run<true, false>(n, s);
  else
    step_run<true, true>(n, s);
  return true;
}

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
