// Passes over runs of a flat shard with AVX-512: 16 weights at a time. Everything rounds as in shard_step_runs.h, and partial sums
// are of the same lanes, so that bits are the same. As in avx2.cpp, standard headers come before the pragma.
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
constexpr int kRows = 16;     // of a batch
constexpr int kTable = 16;    // bins of a table that one register holds
constexpr int kCodes = 3;     // edges between codes of a grid with bounds
constexpr int kLongest = 16 * 1024;  // elements of a run
constexpr int64_t kSoon = 512;  // elements ahead of which memory is fetched
constexpr int kChunk = 448;   // elements whose parts of a scale, and those of three vectors more, 32 bits of a lane can sum

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
template <int n_bins>
inline __m512 table(const float* values, int qmin) {
  const __m512 held = n_bins == 4 ? _mm512_broadcast_f32x4(_mm_loadu_ps(values))  // as wide as what was just written there
                                  : _mm512_maskz_loadu_ps(lanes(n_bins), values);
  return _mm512_permutexvar_ps(_mm512_sub_epi32(code_of_entry(), _mm512_set1_epi32(qmin)), held);
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

// The totals of four registers, whose values are whole numbers: in any order.
inline __m256d totals(__m512d a, __m512d b, __m512d c, __m512d d) {
  const __m512d low = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
  const __m512d high = _mm512_add_pd(_mm512_unpacklo_pd(c, d), _mm512_unpackhi_pd(c, d));
  const __m256d first = _mm256_add_pd(_mm512_castpd512_pd256(low), _mm512_extractf64x4_pd(low, 1));
  const __m256d last = _mm256_add_pd(_mm512_castpd512_pd256(high), _mm512_extractf64x4_pd(high, 1));
  return _mm256_add_pd(_mm256_permute2f128_pd(first, last, 0x20), _mm256_permute2f128_pd(first, last, 0x31));
}

// Sums over bins of parts of a scale, for each code: 32 bits a lane, which hold those of a chunk, and float64.
template <int n_bins>
struct Bins {
  __m512i held[n_bins + 1];
  __m512d total[n_bins + 1];

  Bins() {
    for (int bin = 0; bin < n_bins; ++bin) held[bin] = _mm512_setzero_si512(), total[bin] = _mm512_setzero_pd();
  }
  void add(int bin, __mmask16 here, __m512i part) { held[bin] = _mm512_mask_add_epi32(held[bin], here, held[bin], part); }
  void end_chunk() {
    for (int bin = 0; bin < n_bins; ++bin) {
      const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(held[bin]));
      total[bin] = _mm512_add_pd(total[bin], _mm512_add_pd(low, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(held[bin], 1))));
      held[bin] = _mm512_setzero_si512();
    }
  }
};

// Values in parts of a scale (`regularizers.in_parts`).
struct Parts {
  __m512 inverse, nearest, farthest;
  explicit Parts(const RunGrid& g)
      : inverse(of(kParts / g.scale)), nearest(of(std::max(g.low, -kNear) * kParts)),
        farthest(of(std::min(g.high, kNear) * kParts)) {}
  __m512i operator()(__m512 x) const { return _mm512_cvtps_epi32(clip(_mm512_mul_ps(x, inverse), nearest, farthest)); }
};

// G w_hat, less G w where `moves`: of a scale's gradient, times the scale.
inline __m512 of_scale(__m512 image, __m512 x, __m512 d, __mmask16 moves) {
  return _mm512_mul_ps(_mm512_mask_sub_ps(image, moves, image, x), d);
}

// The sums of `StepKernels::gather`.
template <bool sizes, int n_bins>
void sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, double* out, double* bins) {
  const __m512 scale = of(g.scale), centre = of(g.centre), shift = of(g.shift), low = of(g.low), high = of(g.high);
  const Parts parts(g);
  Lanes d_scale, norm;
  Bins<n_bins> held;
  for (int64_t from = 0; from < n; from += kChunk) {
    for_vectors(std::min<int64_t>(kChunk, n - from), [&](int64_t at, __mmask16 live, auto all) {
      constexpr bool whole = all.value;
      const int64_t i = from + at;
      const __m512 x = _mm512_maskz_sub_ps(live, load<whole>(live, w + i), centre), d = load<whole>(live, grad + i);
      const __m128i code = load<whole>(live, codes + i);
      const __m512 image = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code)), shift), scale);
      const __m512 found = of_scale(image, x, d, g.plain ? 0 : within<false>(x, scale, low, high));
      d_scale.add(lower(found), upper(found));
      if (sizes) {
        const __m512 size = _mm512_abs_ps(x);
        norm.add(lower(size), upper(size));
      }
      if (n_bins == 0) return;
      const __m512i part = parts(x);
      for (int bin = 0; bin < n_bins; ++bin)
        held.add(bin, _mm_mask_cmpeq_epi8_mask(live, code, _mm_set1_epi8(static_cast<char>(g.qmin + bin))), part);
    });
    held.end_chunk();
  }
  out[0] += d_scale.total() / g.scale;
  if (sizes) out[1] += norm.total();
  for (int bin = 0; bin < n_bins; ++bin) bins[n_bins + bin] += _mm512_reduce_add_pd(held.total[bin]);
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

inline void fetch(const void* soon) { _mm_prefetch(static_cast<const char*>(soon), _MM_HINT_T0); }

// Records new codes in a tracker without freezing. Few change in a step: directions and frequencies of the others are neither
// read nor written, and those that are, in memory until then, are fetched while more is stepped.
class Record {
 public:
  explicit Record(const Tracker& t) : tracker_(t) {}
  ~Record() { write(); }

  // Note what has changed in n codes from `at` on, and count those of each bin.
  template <int n_bins>
  void operator()(int64_t at, int64_t n, const int8_t* now, int qmin, double* counts) {
    int64_t found[n_bins + 1] = {};
    for (int64_t i = 0; i < n; i += 64) {
      const __mmask64 live = first_of(n - i);
      int8_t* codes = tracker_.codes + at + i;
      const __m512i code = _mm512_maskz_loadu_epi8(live, now + i), before = _mm512_maskz_loadu_epi8(live, codes);
      for (int bin = 0; bin < n_bins; ++bin)
        found[bin] +=
            _mm_popcnt_u64(_mm512_mask_cmpeq_epi8_mask(live, code, _mm512_set1_epi8(static_cast<char>(qmin + bin))));
      const __mmask64 changed = _mm512_cmpneq_epi8_mask(code, before);
      if (!changed) continue;
      _mm512_mask_storeu_epi8(codes, changed, code);
      if (size_ == kMost) write();
      fetch(tracker_.direction + at + i);
      noted_[size_++] = {at + i, changed, _mm512_mask_cmpgt_epi8_mask(changed, code, before)};
    }
    for (int bin = 0; bin < n_bins; ++bin) counts[bin] += static_cast<double>(found[bin]);
  }

 private:
  static constexpr int kMost = 128;
  struct Change {
    int64_t at;
    uint64_t changed, rose;
  };

  void write() {
    const __m512i up = _mm512_set1_epi8(1), down = _mm512_set1_epi8(-1);
    for (int k = 0; k < size_; ++k) {
      const Change& c = noted_[k];
      int8_t* direction = tracker_.direction + c.at;
      const __m512i last = _mm512_maskz_loadu_epi8(c.changed, direction);
      _mm512_mask_storeu_epi8(direction, c.changed, _mm512_mask_mov_epi8(down, c.rose, up));
      noted_[k].changed = _mm512_mask_cmpeq_epi8_mask(c.rose, last, down) |
                          _mm512_mask_cmpeq_epi8_mask(c.changed & ~c.rose, last, up);
      for (uint64_t turned = noted_[k].changed; turned; turned &= turned - 1)
        fetch(tracker_.frequency + c.at + __builtin_ctzll(turned));
    }
    for (int k = 0; k < size_; ++k)
      for (uint64_t turned = noted_[k].changed; turned; turned &= turned - 1)
        tracker_.frequency[noted_[k].at + __builtin_ctzll(turned)] += tracker_.gain;
    size_ = 0;
  }

  const Tracker& tracker_;
  int size_ = 0;
  Change noted_[kMost];
};

// What is left of a vector's step once its moments are stepped: the latents decayed, by what they move, and the square root.
struct Begun {
  __m512 decayed, moves, root;

  __m512 moved(const Adam& a) const {
    return _mm512_add_ps(decayed, _mm512_div_ps(moves, _mm512_add_ps(_mm512_div_ps(root, a.correction), a.eps)));
  }
};

// Steps a run up to the square root of its moments, a vector at a time, and sums the gradient of its scale.
template <int n_bins, bool pulled, bool edges>
struct Start {
  static constexpr bool spread = n_bins != 0;
  const float *w, *grad;
  float *m, *v;
  const int8_t* codes;
  __mmask16 moves;
  __m512 scale, low, high, twice, images, strength, goal;
  Lanes d_scale;

  Start(const RunStep& s, int64_t at, const Edges& known)
      : w(s.w), grad(s.grad), m(s.m), v(s.v), codes(s.tracker.codes + at), moves(s.before.plain ? 0 : 0xffff),
        scale(of(s.before.scale)), low(of(edges ? known.inside[0] : s.before.low)),
        high(of(edges ? known.inside[1] : s.before.high)), twice(of(s.pull.twice)),
        images(_mm512_mul_ps(level_of_entry(s.before.shift), scale)),
        strength(spread ? table<n_bins>(s.pull.strength, s.before.qmin) : images),
        goal(spread ? table<n_bins>(s.pull.goal, s.before.qmin) : images) {}

  template <class All>
  Begun operator()(int64_t i, __mmask16 live, All, const Adam& a) {
    constexpr bool whole = All::value;
    fetch(w + i + kSoon), fetch(grad + i + kSoon), fetch(m + i + kSoon), fetch(v + i + kSoon);
    if (i % 64 == 0) fetch(codes + i + kSoon);
    const __m512 x = load<whole>(live, w + i), d = load<whole>(live, grad + i);
    const __mmask16 inside = within<edges>(x, scale, low, high);
    const __m512i entry = _mm512_cvtepi8_epi32(load<whole>(live, codes + i));
    const __m512 image = _mm512_permutexvar_ps(entry, images), found = of_scale(image, x, d, inside & moves);
    d_scale.add(lower(found), upper(found));
    __m512 gradient;
    if (pulled) {
      const __m512 pull = spread ? _mm512_fmsub_ps(x, _mm512_permutexvar_ps(entry, strength), _mm512_permutexvar_ps(entry, goal))
                                 : _mm512_mul_ps(_mm512_sub_ps(x, image), twice);
      gradient = _mm512_maskz_add_ps(inside, d, pull);
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

// Decides a run's codes from its latents, which it puts in place with their images, and sums what bins hold of them.
template <int n_bins, bool edges>
struct Finish {
  float *w, *image;
  int8_t* fresh;
  int qmin;
  __m512 new_scale, shift, least, most, images[4], from[kCodes];
  __m128i first;
  Parts parts;
  Bins<n_bins> held;  // with edges: of each bin and all above it

  Finish(const RunStep& s, const Edges& known, int8_t* fresh)
      : w(s.w), image(s.image), fresh(fresh), qmin(s.after.qmin), new_scale(of(s.after.scale)), shift(of(s.after.shift)),
        least(of(static_cast<float>(s.after.qmin))), most(of(static_cast<float>(s.after.qmax))),
        first(_mm_set1_epi8(static_cast<char>(s.after.qmin))), parts(s.after) {
    for (int k = 0; k < 4; ++k) images[k] = of((static_cast<float>(s.after.qmin + k) + s.after.shift) * s.after.scale);
    for (int k = 0; k < kCodes; ++k) from[k] = of(known.code[k]);
  }

  template <class All>
  void operator()(int64_t i, __mmask16 live, All, __m512 x) {
    constexpr bool whole = All::value;
    store<whole>(live, w + i, x);
    const __m512i part = n_bins ? parts(x) : _mm512_setzero_si512();
    __m128i now = first;
    if (edges) {
      const __m128i one = _mm_set1_epi8(1);
      __m512 shown = images[0];
      if (n_bins) held.add(0, live, part);
#pragma GCC unroll 3
      for (int k = 0; k < kCodes; ++k) {
        const __mmask16 reached = _mm512_mask_cmp_ps_mask(live, x, from[k], _CMP_GE_OQ);
        now = _mm_mask_add_epi8(now, reached, now, one);
        shown = _mm512_mask_mov_ps(shown, reached, images[k + 1]);
        if (k + 1 < n_bins) held.add(k + 1, reached, part);
      }
      store<whole>(live, image + i, _mm512_mask_mov_ps(shown, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x));
    } else {
      const __m512 inner = clip(_mm512_sub_ps(_mm512_div_ps(x, new_scale), shift), least, most);
      const __m512 rounded = _mm512_roundscale_ps(inner, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      store<whole>(live, image + i, _mm512_mul_ps(_mm512_add_ps(rounded, shift), new_scale));
      now = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(rounded));
#pragma GCC unroll 16
      for (int bin = 0; bin < n_bins; ++bin)
        held.add(bin, _mm_mask_cmpeq_epi8_mask(live, now, _mm_set1_epi8(static_cast<char>(qmin + bin))), part);
    }
    store<whole>(live, fresh + i, now);
  }

  // Add the sums of bins to `sums`.
  void put(double* sums) {
    held.end_chunk();
    if (edges && n_bins == 4) {
      const __m256d all = totals(held.total[0], held.total[1], held.total[2 % (n_bins + 1)], held.total[3 % (n_bins + 1)]);
      const __m256d above = _mm256_maskz_permutex_pd(0b0111, all, 0b11111001);
      _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_sub_pd(all, above)));
      return;
    }
    double above = 0.0;
    for (int bin = n_bins - 1; bin >= 0; --bin) {
      const double total = _mm512_reduce_add_pd(held.total[bin]);
      sums[bin] += edges ? total - above : total;
      above = total;
    }
  }
};

// Step a run whose tracker begins at `at`, and add to `out` and `bins` as `StepKernels::step` says. Square roots and divisions take
// long, and what waits for them would keep the processor from what comes next: a vector's step begins two turns before its codes
// are decided.
template <int n_bins, bool pulled, bool edges>
void step_run(int64_t n, int64_t at, const RunStep& s, const Edges& known, Record& record, double* out, double* bins) {
  int8_t fresh[kLongest];
  const Adam a(s.adam);
  Start<n_bins, pulled, edges> start(s, at, known);
  Finish<n_bins, edges> finish(s, known, fresh);
  constexpr __mmask16 every = 0xffff;
  const std::true_type whole;
  int64_t i = 0;
  if (n >= 2 * kWide) {
    __m512 ready = start(0, every, whole, a).moved(a);
    Begun begun = start(kWide, every, whole, a);
    for (i = 2 * kWide; i + kWide <= n; finish.held.end_chunk()) {
      const int64_t stop = std::min(n, i + kChunk);
      for (; i + kWide <= stop; i += kWide) {
        const Begun next = start(i, every, whole, a);
        finish(i - 2 * kWide, every, whole, ready);
        ready = begun.moved(a);
        begun = next;
      }
    }
    finish(i - 2 * kWide, every, whole, ready);
    finish(i - kWide, every, whole, begun.moved(a));
  }
  for_vectors(n - i, [&](int64_t last, __mmask16 live, auto all) {
    finish(i + last, live, all, start(i + last, live, all, a).moved(a));
  });
  out[0] += start.d_scale.total() / s.before.scale;
  if (n_bins) finish.put(bins + n_bins);
  record.template operator()<n_bins>(at, n, fresh, s.after.qmin, bins);
}

using Run = void (*)(int64_t, int64_t, const RunStep&, const Edges&, Record&, double*, double*);

// The code for a run's step; null where there is none. `edges` says whether its edges are known.
inline Run run_of(const RunGrid& g, const Tracker& t, const Pull& p, bool edges) {
  if (t.frozen || g.centre != 0 || g.qmin < -8 || g.qmax > 7 || !has_sums(g, p.strength ? p.n_bins : 0)) return nullptr;
  if (!p.strength) {
    if (!p.any) return edges ? step_run<0, false, true> : step_run<0, false, false>;
    return edges ? step_run<0, true, true> : step_run<0, true, false>;
  }
  switch (p.n_bins) {
    case 2: return edges ? step_run<2, true, true> : step_run<2, true, false>;
    case 4: return edges ? step_run<4, true, true> : step_run<4, true, false>;
    case 8: return step_run<8, true, false>;
    default: return step_run<16, true, false>;
  }
}

// The edges of up to 16 runs whose grid has bounds, of their scales before and after a step; `found` becomes false where one run's
// are not found.
struct EdgesOfRuns {
  alignas(64) float inside[2][kRows], code[kCodes][kRows];
  bool found;

  EdgesOfRuns(const RunGrid& g, __m512 before, __m512 after) : found(g.bounds) {
    for (int k = 0; found && k < 2; ++k) _mm512_store_ps(inside[k], edges_of(g.bounds->inside[k], before, found));
    for (int k = 0; found && k < kCodes; ++k) _mm512_store_ps(code[k], edges_of(g.bounds->code[k], after, found));
  }
  Edges operator[](int run) const { return {{inside[0][run], inside[1][run]}, {code[0][run], code[1][run], code[2][run]}}; }
};

// ObrTables of four bins, with the same bits.
struct FourTables {
  alignas(16) float strength[4], goal[4];

  FourTables(const RunGrid& g, float scale, const double* bins, double twice_pull, double twice_spread) {
    const __m256d one = _mm256_set1_pd(1.0), counts = _mm256_loadu_pd(bins), pull = _mm256_set1_pd(twice_pull);
    const __m256d code = _mm256_cvtepi32_pd(_mm_add_epi32(_mm_set1_epi32(g.qmin), _mm_setr_epi32(0, 1, 2, 3)));
    const __m256d image = _mm256_mul_pd(_mm256_add_pd(code, _mm256_set1_pd(g.shift)), _mm256_set1_pd(scale));
    const __m256d part = _mm256_set1_pd(scale / static_cast<double>(kParts));
    const __m256d mean = _mm256_mul_pd(_mm256_div_pd(_mm256_loadu_pd(bins + 4), _mm256_max_pd(counts, one)), part);
    const __m256d spread = _mm256_maskz_mov_pd(_mm256_cmp_pd_mask(counts, one, _CMP_GT_OQ), _mm256_set1_pd(twice_spread));
    const __m256d factor = _mm256_div_pd(spread, _mm256_max_pd(_mm256_sub_pd(counts, one), one));
    _mm_store_ps(strength, _mm256_cvtpd_ps(_mm256_add_pd(factor, pull)));
    _mm_store_ps(goal, _mm256_cvtpd_ps(_mm256_add_pd(_mm256_mul_pd(image, pull), _mm256_mul_pd(mean, factor))));
  }
};

template <int n_bins>
struct Tables : ObrTables<n_bins> {
  Tables(const RunGrid& g, float scale, const double* bins, double twice_pull, double twice_spread)
      : ObrTables<n_bins>(n_bins, g, scale, bins, twice_pull, twice_spread) {}
};
template <>
struct Tables<4> : FourTables {
  using FourTables::FourTables;
};

// Step some rows, each of which is all of a group: the edges of 16 at once.
template <int n_bins>
void step_rows(const WholeRows& r) {
  Record record(r.tracker);
  RunStep s{r.w, r.grad, r.m, r.v, r.image, r.grid, r.grid, r.pull, r.adam, r.tracker};
  const Run with = run_of(r.grid, r.tracker, r.pull, true), without = run_of(r.grid, r.tracker, r.pull, false);
  for (int64_t first = 0; first < r.rows; first += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, r.rows - first));
    const EdgesOfRuns edges(r.grid, _mm512_mask_loadu_ps(of(1.0f), lanes(count), r.before + first),
                            _mm512_mask_loadu_ps(of(1.0f), lanes(count), r.after + first));
    const Run run = edges.found ? with : without;
    for (int k = 0; k < count; ++k) {
      const int64_t row = first + k, at = row * r.cols;
      s.before.scale = r.before[row], s.after.scale = r.after[row];
      const Tables<n_bins> tables(r.grid, s.before.scale, r.held + 2 * n_bins * row, r.twice_pull, r.twice_spread);
      if (n_bins) s.pull.strength = tables.strength, s.pull.goal = tables.goal;
      s.w = r.w + at, s.grad = r.grad + at, s.m = r.m + at, s.v = r.v + at, s.image = r.image + at;
      double* bins = r.bins + 2 * n_bins * row;
      double d_scale = 0.0;
      std::fill_n(bins, 2 * n_bins, 0.0);
      run(r.cols, at, s, edges[k], record, &d_scale, bins);
      r.sums[row] = d_scale * r.factor;
    }
  }
}

}  // namespace

bool sums_avx512(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, int64_t n_bins,
                 bool sizes, double* out, double* bins) {
  if (!has_sums(g, n_bins)) return false;
  const auto all = [&](auto with) {
    constexpr bool sized = with.value;
    return n_bins == 0   ? sum_run<sized, 0>
           : n_bins == 2 ? sum_run<sized, 2>
           : n_bins == 4 ? sum_run<sized, 4>
           : n_bins == 8 ? sum_run<sized, 8>
                         : sum_run<sized, 16>;
  };
  (sizes ? all(std::true_type()) : all(std::false_type()))(n, w, grad, codes, g, out, bins);
  return true;
}

bool step_avx512(int64_t n, const RunStep& s, double* out, double* bins) {
  if (n > kLongest) return false;
  const EdgesOfRuns edges(s.before, of(s.before.scale), of(s.after.scale));
  const Run run = run_of(s.before, s.tracker, s.pull, edges.found);
  if (!run) return false;
  Record record(s.tracker);
  run(n, 0, s, edges[0], record, out, bins);
  return true;
}

bool rows_avx512(const WholeRows& r) {
  if (r.cols > kLongest || !run_of(r.grid, r.tracker, r.pull, false)) return false;
  const auto all = !r.pull.strength ? step_rows<0>
                   : r.pull.n_bins == 2 ? step_rows<2>
                   : r.pull.n_bins == 4 ? step_rows<4>
                   : r.pull.n_bins == 8 ? step_rows<8>
                                        : step_rows<16>;
  all(r);
  return true;
}

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
