// Passes over runs of a flat shard with AVX-512: 16 weights at a time. Everything rounds as in shard_step_runs.h, and partial sums
// are of the same lanes, so that bits are the same. Chooses the instruction set of the file that includes it, as its first; that
// file ends clang's attribute. As in avx2.cpp, standard headers come before the pragma.
#pragma once
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
constexpr int kCodes = 3;     // edges between codes of a grid with bounds
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

// Where codes and the straight-through rule change, as w itself: then w is compared and not divided (see `edges_of`).
struct Edges {
  float inside[2], code[kCodes];
};

// Floats as integers in the same order, and back.
inline __m512i ordered(__m512i bits) {
  return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff)));
}

// For each of 16 scales the least w for which w / scale, as it rounds, is not below a bound (NaN: none, and no w is as large): next
// to their product, one of four neighbours. `found` becomes false where the first is not below the bound, or the last is.
inline __m512 edges_of(float bound, __m512 scale, bool& found) {
  const __m512 edge = of(bound);
  if (std::isnan(bound)) return edge;
  const __m512i near = ordered(_mm512_castps_si512(_mm512_mul_ps(edge, scale)));
  __m512 least = edge;
  for (int by = 1; by >= -2; --by) {
    const __m512 w = _mm512_castsi512_ps(ordered(_mm512_add_epi32(near, _mm512_set1_epi32(by))));
    const __mmask16 reached = _mm512_cmp_ps_mask(_mm512_div_ps(w, scale), edge, _CMP_GE_OQ);
    least = _mm512_mask_mov_ps(least, reached, w);
    if (by == 1) found &= reached == 0xffff;
    if (by == -2) found &= reached == 0;
  }
  return least;
}

// Which weights the gradient passes.
template <bool edges>
inline __mmask16 within(__m512 x, __m512 scale, __m512 low, __m512 high) {
  if (edges) return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LT_OQ);
  const __m512 v = _mm512_div_ps(x, scale);
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
}

inline void fetch(const void* soon) { _mm_prefetch(static_cast<const char*>(soon), _MM_HINT_T1); }

// The sums of `StepKernels::gather`. `inside` are the edges of the grid, where they are known. `soon`: of a row that has no centre, m
// and v of which are read next. A vector's products are summed when the next one's have begun.
template <bool plain, bool sizes, int n_bins, bool edges, bool soon>
void sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, const float* inside,
             const float* m, const float* v, double* out, double* bins) {
  const __m512 scale = of(g.scale), centre = of(g.centre), shift = of(g.shift), parts = of(kParts / g.scale);
  const __m512 low = of(edges ? inside[0] : g.low), high = of(edges ? inside[1] : g.high);
  const __m512 images = _mm512_mul_ps(level_of_entry(g.shift), scale);
  const __m512 nearest = of(std::max(g.low, -kNear) * kParts), farthest = of(std::min(g.high, kNear) * kParts);
  struct Begun {
    __m512 found, x;
    __m128i code;
  };
  const auto begin = [&](int64_t i, __mmask16 live, auto all) {
    constexpr bool whole = all.value;
    if (soon) fetch(m + i), fetch(v + i);
    const __m512 kept = load<whole>(live, w + i), d = load<whole>(live, grad + i), x = soon ? kept : _mm512_sub_ps(kept, centre);
    const __m128i code = load<whole>(live, codes + i);
    const __m512i wide = _mm512_cvtepi8_epi32(code);
    __m512 away = n_bins ? _mm512_permutexvar_ps(wide, images)
                         : _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(wide), shift), scale);
    if (!plain) away = _mm512_mask_sub_ps(away, within<edges>(x, scale, low, high), away, x);
    return Begun{_mm512_mul_ps(away, d), x, code};
  };
  Lanes d_scale, norm;
  __m512d total[n_bins + 1];
  for (__m512d& of_bin : total) of_bin = _mm512_setzero_pd();
  for (int64_t from = 0; from < n; from += kChunk) {
    __m512i held[n_bins + 1];
    for (__m512i& of_bin : held) of_bin = _mm512_setzero_si512();
    const auto end = [&](const Begun& b, __mmask16 live, auto all) {
      d_scale.add(lower(b.found), upper(b.found));
      if (sizes) {
        const __m512 size = _mm512_maskz_mov_ps(live, _mm512_abs_ps(b.x));
        norm.add(lower(size), upper(size));
      }
      if (n_bins) {
        const __m512i part = _mm512_cvtps_epi32(clip(_mm512_mul_ps(b.x, parts), nearest, farthest));
#pragma GCC unroll 16
        for (int bin = 0; bin < n_bins; ++bin) {
          const __m128i of_bin = _mm_set1_epi8(static_cast<char>(g.qmin + bin));
          const __mmask16 here =
              all.value ? _mm_cmpeq_epi8_mask(b.code, of_bin) : _mm_mask_cmpeq_epi8_mask(live, b.code, of_bin);
          held[bin] = _mm512_mask_add_epi32(held[bin], here, held[bin], part);
        }
      }
    };
    const int64_t stop = std::min(n, from + kChunk), last = from + (stop - from) / kWide * kWide;
    if (from < last) {
      Begun begun = begin(from, 0xffff, std::true_type());
      for (int64_t i = from + kWide; i < last; i += kWide) {
        const Begun next = begin(i, 0xffff, std::true_type());
        end(begun, 0xffff, std::true_type());
        begun = next;
      }
      end(begun, 0xffff, std::true_type());
    }
    if (last < stop) {
      const __mmask16 live = lanes(stop - last);
      end(begin(last, live, std::false_type()), live, std::false_type());
    }
    for (int bin = 0; bin < n_bins; ++bin)
      total[bin] = _mm512_add_pd(total[bin], _mm512_add_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(held[bin])),
                                                           _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(held[bin], 1))));
  }
  out[0] += d_scale.total() / g.scale;
  if (sizes) out[1] += norm.total();
  for (int bin = 0; bin < n_bins; ++bin) bins[n_bins + bin] += _mm512_reduce_add_pd(total[bin]);
  if (n_bins) count_codes<n_bins>(n, codes, g.qmin, bins);
}

// Say whether the sums of a run with n_bins bins have code here: 32 bits of a lane must hold a chunk's.
inline bool has_sums(const RunGrid& g, int64_t n_bins) {
  if (n_bins == 0) return true;
  const bool near = (g.low >= -kNear || std::isinf(g.low)) && (g.high <= kNear || std::isinf(g.high)) && g.qmin >= -8 &&
                    g.qmin + n_bins <= 8;
  return near && (n_bins == 2 || n_bins == 4 || n_bins == 8 || n_bins == 16);
}

// The numbers of AdamW in registers.
struct Adam {
  __m512 decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step;
  explicit Adam(const AdamW& a)
      : decay(of(a.decay)), one_minus_beta1(of(a.one_minus_beta1)), beta2(of(a.beta2)),
        one_minus_beta2(of(a.one_minus_beta2)), correction(of(a.correction)), eps(of(a.eps)), step(of(-a.step)) {}
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

// What is left of a vector's step once its moments are stepped: the latents decayed, by what they move, and the square root.
struct Begun {
  __m512 decayed, moves, root;

  __m512 moved(const Adam& a) const {
    return _mm512_add_ps(decayed, _mm512_div_ps(moves, _mm512_add_ps(_mm512_div_ps(root, a.correction), a.eps)));
  }
};

// Steps a run up to the square root of its moments, a vector at a time. `soon`: `ahead` elements on lies what is read later.
template <bool pulled, bool spread, bool edges, bool soon>
struct Start {
  const float *w, *grad;
  float *m, *v;
  const int8_t* codes;
  int64_t ahead;
  __m512 scale, low, high, twice, images, strength, goal;

  Start(const RunStep& s, const Edges& known, int64_t ahead)
      : w(s.w), grad(s.grad), m(s.m), v(s.v), codes(s.tracker.codes), ahead(ahead), scale(of(s.before.scale)),
        low(of(edges ? known.inside[0] : s.before.low)), high(of(edges ? known.inside[1] : s.before.high)),
        twice(of(s.pull.twice)), images(_mm512_mul_ps(level_of_entry(s.before.shift), scale)),
        strength(spread ? table(s.pull.strength, s.pull.n_bins, s.before.qmin) : images),
        goal(spread ? table(s.pull.goal, s.pull.n_bins, s.before.qmin) : images) {}

  template <class All>
  Begun operator()(int64_t i, __mmask16 live, All, const Adam& a) const {
    constexpr bool whole = All::value;
    if (soon) {
      fetch(w + i + ahead), fetch(grad + i + ahead);
      if (i % 64 == 0) fetch(codes + i + ahead);
    }
    const __m512 x = load<whole>(live, w + i), d = load<whole>(live, grad + i);
    const __mmask16 inside = within<edges>(x, scale, low, high);
    __m512 gradient;
    if (pulled) {
      const __m512i entry = _mm512_cvtepi8_epi32(load<whole>(live, codes + i));
      const __m512 found = spread ? _mm512_fmsub_ps(x, _mm512_permutexvar_ps(entry, strength), _mm512_permutexvar_ps(entry, goal))
                                  : _mm512_mul_ps(_mm512_sub_ps(x, _mm512_permutexvar_ps(entry, images)), twice);
      gradient = _mm512_maskz_add_ps(inside, d, found);
    } else {
      gradient = _mm512_maskz_mov_ps(inside, d);
    }
    __m512 mean = load<whole>(live, m + i), square = load<whole>(live, v + i);
    mean = _mm512_fmadd_ps(a.one_minus_beta1, _mm512_sub_ps(gradient, mean), mean);
    square = _mm512_fmadd_ps(_mm512_mul_ps(a.one_minus_beta2, gradient), gradient, _mm512_mul_ps(square, a.beta2));
    store<whole>(live, m + i, mean);
    store<whole>(live, v + i, square);
    return {_mm512_mul_ps(x, a.decay), _mm512_mul_ps(a.step, mean), _mm512_sqrt_ps(square)};
  }
};

// Decides a run's codes from its latents, which it puts in place with their images.
template <bool edges>
struct Finish {
  float *w, *image;
  int8_t* fresh;
  __m512 new_scale, shift, least, most, images[4], from[kCodes];
  __m128i first;

  Finish(const RunStep& s, const Edges& known, int8_t* fresh)
      : w(s.w), image(s.image), fresh(fresh), new_scale(of(s.after.scale)), shift(of(s.after.shift)),
        least(of(static_cast<float>(s.after.qmin))), most(of(static_cast<float>(s.after.qmax))),
        first(_mm_set1_epi8(static_cast<char>(s.after.qmin))) {
    for (int k = 0; k < 4; ++k) images[k] = of((static_cast<float>(s.after.qmin + k) + s.after.shift) * s.after.scale);
    for (int k = 0; k < kCodes; ++k) from[k] = of(known.code[k]);
  }

  template <class All>
  void operator()(int64_t i, __mmask16 live, All, __m512 x) const {
    constexpr bool whole = All::value;
    store<whole>(live, w + i, x);
    __m128i now = first;
    if (edges) {
      const __m128i one = _mm_set1_epi8(1);
      __m512 shown = images[0];
#pragma GCC unroll 3
      for (int k = 0; k < kCodes; ++k) {
        const __mmask16 reached = _mm512_cmp_ps_mask(x, from[k], _CMP_GE_OQ);
        now = _mm_mask_add_epi8(now, reached, now, one);
        shown = _mm512_mask_mov_ps(shown, reached, images[k + 1]);
      }
      store<whole>(live, image + i, _mm512_mask_mov_ps(shown, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x));
    } else {
      const __m512 inner = clip(_mm512_sub_ps(_mm512_div_ps(x, new_scale), shift), least, most);
      const __m512 rounded = _mm512_roundscale_ps(inner, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      store<whole>(live, image + i, _mm512_mul_ps(_mm512_add_ps(rounded, shift), new_scale));
      now = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(rounded));
    }
    store<whole>(live, fresh + i, now);
  }
};

// Step a run whose codes have room in `fresh`. Square roots and divisions take long, and what waits for them would keep the
// processor from what comes next: a vector's step begins two turns before its codes are decided.
template <bool pulled, bool spread, bool edges, bool soon>
void step_run(int64_t n, const RunStep& s, const Edges& known, int64_t ahead, int8_t* fresh) {
  const Adam a(s.adam);
  const Start<pulled, spread, edges, soon> start(s, known, ahead);
  const Finish<edges> finish(s, known, fresh);
  constexpr __mmask16 every = 0xffff;
  const std::true_type whole;
  int64_t i = 0;
  if (n >= 2 * kWide) {
    __m512 ready = start(0, every, whole, a).moved(a);
    Begun begun = start(kWide, every, whole, a);
    for (i = 2 * kWide; i + kWide <= n; i += kWide) {
      const Begun next = start(i, every, whole, a);
      finish(i - 2 * kWide, every, whole, ready);
      ready = begun.moved(a);
      begun = next;
    }
    finish(i - 2 * kWide, every, whole, ready);
    finish(i - kWide, every, whole, begun.moved(a));
  }
  for_vectors(n - i, [&](int64_t at, __mmask16 live, auto all) {
    finish(i + at, live, all, start(i + at, live, all, a).moved(a));
  });
  record(n, fresh, s.tracker);
}

// Say whether the step of a run has code here.
inline bool has_step(const RunGrid& g, const Tracker& t, const Pull& p) {
  return !t.frozen && g.centre == 0 && (!p.any || (g.qmin >= -8 && g.qmax <= 7 && p.n_bins <= kTable));
}

}  // namespace
}  // namespace dsq
