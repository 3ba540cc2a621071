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
constexpr int kTable = 16;    // bins of a table that one register holds
constexpr int kLongest = 16 * 1024;  // elements of a run
constexpr int kChunk = 512;   // elements whose parts of a scale 32 bits of a lane can sum, each of kNear scales at most

inline __m512 of(float x) { return _mm512_set1_ps(x); }
inline __m512 clip(__m512 x, __m512 low, __m512 high) { return _mm512_min_ps(high, _mm512_max_ps(low, x)); }
inline __mmask16 lanes(int64_t left) { return left >= kWide ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

inline __mmask64 first_of(int64_t left) { return left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1; }

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
  double total() const { return _mm512_reduce_add_pd(sum); }
};

inline __m512d lower(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline __m512d upper(__m512 x) {
  return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}

// Tables of what belongs to a code, in one register: entry k is that of the code whose last four bits are k.
inline __m512i code_of_entry() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }
inline __m512 table(const float* values, int64_t n_bins, int qmin) {
  return _mm512_permutexvar_ps(_mm512_sub_epi32(code_of_entry(), _mm512_set1_epi32(qmin)),
                               _mm512_maskz_loadu_ps(lanes(n_bins), values));
}
inline __m512 level_of_entry(float shift) { return _mm512_add_ps(_mm512_cvtepi32_ps(code_of_entry()), of(shift)); }

// How many of some codes each bin holds.
template <int n_bins>
void count_codes(int64_t n, const int8_t* codes, int qmin, double* counts) {
  int64_t found[n_bins + 1] = {};
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 live = first_of(n - i);
    const __m512i code = _mm512_maskz_loadu_epi8(live, codes + i);
    for (int bin = 0; bin < n_bins; ++bin)
      found[bin] += _mm_popcnt_u64(_mm512_mask_cmpeq_epi8_mask(live, code, _mm512_set1_epi8(static_cast<char>(qmin + bin))));
  }
  for (int bin = 0; bin < n_bins; ++bin) counts[bin] += static_cast<double>(found[bin]);
}

template <bool plain, bool sizes, int n_bins>
void sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, double* out,
             double* bins) {
  const __m512 scale = of(g.scale), centre = of(g.centre), shift = of(g.shift), low = of(g.low), high = of(g.high);
  const __m512 levels = level_of_entry(g.shift), parts = of(kParts);
  const __m512 nearest = of(std::max(g.low, -kNear)), farthest = of(std::min(g.high, kNear));
  const bool ends_together = g.shift == 0.0f && g.low == static_cast<float>(g.qmin);  // no shift and no reach
  const __mmask16 from_level = ends_together ? 0xffff : 0;
  Lanes d_scale, norm;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    __m512i held[n_bins + 1];
    for (__m512i& of_bin : held) of_bin = _mm512_setzero_si512();
    for_vectors(std::min<int64_t>(kChunk, n - begin), [&](int64_t at, __mmask16 live, auto all) {
      constexpr bool whole = all.value;
      const int64_t i = begin + at;
      const __m512 x = _mm512_sub_ps(load<whole>(live, w + i), centre), d = load<whole>(live, grad + i);
      const __m128i code = load<whole>(live, codes + i);
      const __m512i wide = _mm512_cvtepi8_epi32(code);
      const __m512 level = n_bins ? _mm512_permutexvar_ps(wide, levels) : _mm512_add_ps(_mm512_cvtepi32_ps(wide), shift);
      __m512 found = _mm512_mul_ps(level, d), clipped = x;
      if (!plain || n_bins) {
        const __m512 v = _mm512_div_ps(x, scale);
        clipped = plain ? clip(v, nearest, farthest) : clip(v, low, high);
        if (!plain) {
          const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
          const __m512 outside = _mm512_mask_mov_ps(clipped, from_level, level);
          found = _mm512_mul_ps(_mm512_sub_ps(level, clipped), d);
          found = _mm512_mask3_fmadd_ps(d, outside, found, static_cast<__mmask16>(~inside));
        }
      }
      d_scale.add(lower(found), upper(found));
      if (sizes) {
        const __m512 size = _mm512_maskz_mov_ps(live, _mm512_abs_ps(x));
        norm.add(lower(size), upper(size));
      }
      if (n_bins) {
        const __m512i part = _mm512_cvtps_epi32(_mm512_mul_ps(clipped, parts));
#pragma GCC unroll 16
        for (int bin = 0; bin < n_bins; ++bin) {
          const __m128i of_bin = _mm_set1_epi8(static_cast<char>(g.qmin + bin));
          const __mmask16 here = whole ? _mm_cmpeq_epi8_mask(code, of_bin) : _mm_mask_cmpeq_epi8_mask(live, code, of_bin);
          held[bin] = _mm512_mask_add_epi32(held[bin], here, held[bin], part);
        }
      }
    });
    for (int bin = 0; bin < n_bins; ++bin) {
      const __m512d both = _mm512_add_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(held[bin])),
                                         _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(held[bin], 1)));
      bins[n_bins + bin] += _mm512_reduce_add_pd(both);
    }
  }
  out[0] += d_scale.total();
  out[1] += norm.total();
  if (n_bins) count_codes<n_bins>(n, codes, g.qmin, bins);
}

template <bool plain, bool sizes>
bool sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, int64_t n_bins,
             double* out, double* bins) {
  const bool near = (g.low >= -kNear || std::isinf(g.low)) && (g.high <= kNear || std::isinf(g.high)) && g.qmin >= -8 &&
                    g.qmin + n_bins <= 8;
  if (n_bins == 0)
    sum_run<plain, sizes, 0>(n, w, grad, codes, g, out, bins);
  else if (n_bins == 2 && near)
    sum_run<plain, sizes, 2>(n, w, grad, codes, g, out, bins);
  else if (n_bins == 4 && near)
    sum_run<plain, sizes, 4>(n, w, grad, codes, g, out, bins);
  else if (n_bins == 8 && near)
    sum_run<plain, sizes, 8>(n, w, grad, codes, g, out, bins);
  else if (n_bins == 16 && near)
    sum_run<plain, sizes, 16>(n, w, grad, codes, g, out, bins);
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

// Floats as integers in the same order, and back.
inline __m512i ordered(__m512i bits) {
  return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff)));
}

// The least w for which w / scale, as it rounds, is not below a bound, for four of them (NaN: none, and no w is as large): then w
// is compared and not divided.
struct Edges {
  float of_bound[4];
  bool found;

  Edges(__m128 bounds, float scale) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512 bound = _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(bounds));
    // Next to their product, one of four neighbours: the first is below it and the last is not.
    const __m512i near = _mm512_add_epi32(ordered(_mm512_castps_si512(_mm512_mul_ps(bound, of(scale)))),
                                          _mm512_setr_epi32(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1));
    const __m512 w = _mm512_castsi512_ps(ordered(near));
    const unsigned none = _mm512_cmp_ps_mask(bound, bound, _CMP_UNORD_Q);
    const unsigned reached = _mm512_cmp_ps_mask(_mm512_div_ps(w, of(scale)), bound, _CMP_GE_OQ);
    alignas(64) float candidates[kWide];
    _mm512_store_ps(candidates, w);
    found = ((reached | none) & 0x8888) == 0x8888 && (reached & 0x1111) == 0;
    for (int k = 0; k < 4; ++k) of_bound[k] = candidates[4 * k + __builtin_ctz(reached >> (4 * k) | 8)];
  }
};

// Record new codes in a tracker without freezing. Few change in a step: what is not written, or not even read, need not come from
// memory and go there; and a branch among the arithmetic of a step would hold up what comes after it.
inline void record(int64_t n, const int8_t* now, const Tracker& t) {
  const __m128i up = _mm_set1_epi8(1), down = _mm_set1_epi8(-1);
  for_vectors(n, [&](int64_t i, __mmask16 live, auto all) {
    constexpr bool whole = all.value;
    const __m128i code = load<whole>(live, now + i), before = load<whole>(live, t.codes + i);
    const __mmask16 changed = _mm_cmpneq_epi8_mask(code, before);
    if (!changed) return;
    const __mmask16 rose = _mm_mask_cmpgt_epi8_mask(changed, code, before), fell = changed & ~rose;
    const __m128i last = load<whole>(live, t.direction + i);
    store<whole>(live, t.codes + i, code);
    store<whole>(live, t.direction + i, _mm_mask_mov_epi8(_mm_mask_mov_epi8(last, fell, down), rose, up));
    unsigned turned = _mm_mask_cmpeq_epi8_mask(rose, last, down) | _mm_mask_cmpeq_epi8_mask(fell, last, up);
    for (; turned; turned &= turned - 1) t.frequency[i + __builtin_ctz(turned)] += t.gain;
  });
}

// `edges`: of a run with bounds, whose edges are known.
template <bool pulled, bool spread, bool edges>
void step_run(int64_t n, const RunStep& s, const Edges& pass, const Edges& steps) {
  const Adam a(s.adam);
  const RunGrid &g = s.before, &next = s.after;
  const Tracker& t = s.tracker;
  const __m512 scale = of(g.scale), new_scale = of(next.scale), shift = of(g.shift), twice = of(s.pull.twice);
  const __m512 low = of(edges ? pass.of_bound[0] : g.low), high = of(edges ? pass.of_bound[1] : g.high);
  const __m512 least = of(static_cast<float>(g.qmin)), most = of(static_cast<float>(g.qmax));
  const __m512 second = of(steps.of_bound[0]), third = of(steps.of_bound[1]), fourth = of(steps.of_bound[2]);
  const __m512 levels = level_of_entry(g.shift), old_image = _mm512_mul_ps(levels, scale);
  const __m512 new_image = _mm512_mul_ps(levels, new_scale);
  const __m512 mean = spread ? table(s.pull.mean, s.pull.n_bins, g.qmin) : old_image;
  const __m512 factor = spread ? table(s.pull.factor, s.pull.n_bins, g.qmin) : old_image;
  const __m128i one = _mm_set1_epi8(1), first = _mm_set1_epi8(static_cast<char>(g.qmin));
  int8_t fresh[kLongest];
  for_vectors(n, [&](int64_t i, __mmask16 live, auto all) {
    constexpr bool whole = all.value;
    const __m512 x = load<whole>(live, s.w + i), d = load<whole>(live, s.grad + i);
    const __m128i code = load<whole>(live, t.codes + i);
    __mmask16 inside;
    if (edges) {
      inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LT_OQ);
    } else {
      const __m512 v = _mm512_div_ps(x, scale);
      inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
    }
    __m512 gradient = _mm512_maskz_mov_ps(inside, d);
    if (pulled) {
      const __m512i entry = _mm512_cvtepi8_epi32(code);
      __m512 found = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_permutexvar_ps(entry, old_image)), twice);
      if (spread) {
        const __m512 away = _mm512_sub_ps(x, _mm512_permutexvar_ps(entry, mean));
        found = _mm512_fmadd_ps(away, _mm512_permutexvar_ps(entry, factor), found);
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

    __m128i now = first;
    if (edges) {
      now = _mm_mask_add_epi8(now, _mm512_cmp_ps_mask(moved, second, _CMP_GE_OQ), now, one);
      now = _mm_mask_add_epi8(now, _mm512_cmp_ps_mask(moved, third, _CMP_GE_OQ), now, one);
      now = _mm_mask_add_epi8(now, _mm512_cmp_ps_mask(moved, fourth, _CMP_GE_OQ), now, one);
      const __m512 image = _mm512_permutexvar_ps(_mm512_cvtepi8_epi32(now), new_image);
      store<whole>(live, s.image + i, _mm512_mask_mov_ps(image, _mm512_cmp_ps_mask(moved, moved, _CMP_UNORD_Q), moved));
    } else {
      const __m512 inner = clip(_mm512_sub_ps(_mm512_div_ps(moved, new_scale), shift), least, most);
      const __m512 rounded = _mm512_roundscale_ps(inner, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      store<whole>(live, s.image + i, _mm512_mul_ps(_mm512_add_ps(rounded, shift), new_scale));
      now = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(rounded));
    }
    store<whole>(live, fresh + i, now);
  });
  record(n, fresh, t);
}

template <bool pulled, bool spread>
void step_run(int64_t n, const RunStep& s) {
  constexpr Bounds none{};
  const Bounds& b = s.before.bounds ? *s.before.bounds : none;
  const Edges pass(_mm_setr_ps(b.inside[0], b.inside[1], NAN, NAN), s.before.scale);
  const Edges steps(_mm_setr_ps(b.code[0], b.code[1], b.code[2], NAN), s.after.scale);
  if (s.before.bounds && pass.found && steps.found)
    step_run<pulled, spread, true>(n, s, pass, steps);
  else
    step_run<pulled, spread, false>(n, s, pass, steps);
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
  if (n > kLongest || s.tracker.frozen || s.before.centre != 0 || s.after.centre != 0) return false;
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
