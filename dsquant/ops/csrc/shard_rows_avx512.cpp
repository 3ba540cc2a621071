// Rows that are each all of a group, stepped with AVX-512 some at a time: sums of each, then the steps of all their scales at once,
// then the step of each, while weights and gradients of all of them stay in L2. What comes next is fetched meanwhile: a
// processor does not foresee it, since rows are read twice.
#if defined(__x86_64__)
#include "shard_avx512.h"

namespace dsq {
namespace {

constexpr int kRows = 16;        // at a time, at most
constexpr int64_t kHeld = 4096;  // elements of them, but for longer rows

// What some rows have and come to; those that are not there have a scale of 1.
struct Batch {
  alignas(64) float scale[kRows], m[kRows], v[kRows], lr[kRows], next[kRows];
  alignas(64) float inside[2][kRows], code[kCodes][kRows];
  alignas(64) double sums[kRows], bins[kRows][2 * kTable];

  Batch(const WholeRows& r, int64_t first, int count) {
    const __mmask16 live = lanes(count);
    _mm512_store_ps(scale, _mm512_mask_loadu_ps(of(1.0f), live, r.scale + first));
    _mm512_store_ps(m, _mm512_maskz_loadu_ps(live, r.scale_m + first));
    _mm512_store_ps(v, _mm512_maskz_loadu_ps(live, r.scale_v + first));
    _mm512_store_ps(lr, _mm512_maskz_loadu_ps(live, r.scale_lr + first));
    _mm512_store_pd(sums, _mm512_setzero_pd());
    _mm512_store_pd(sums + 8, _mm512_setzero_pd());
  }
};

template <bool plain, int n_bins, bool edges>
void sum_rows(const WholeRows& r, int64_t first, int count, Batch& b) {
  RunGrid grid = r.grid;
  for (int k = 0; k < count; ++k) {
    const int64_t at = (first + k) * r.cols;
    const float inside[2] = {b.inside[0][k], b.inside[1][k]};
    grid.scale = b.scale[k];
    for (int i = 0; i < 2 * n_bins; ++i) b.bins[k][i] = 0.0;
    sum_run<plain, false, n_bins, edges, true>(r.cols, r.w + at, r.grad + at, r.tracker.codes + at, grid, inside, r.m + at,
                                               r.v + at, &b.sums[k], b.bins[k]);
  }
}

template <bool pulled, int n_bins, bool edges>
void step_rows(const WholeRows& r, int64_t first, int count, const Batch& b) {
  int8_t fresh[kLongest];
  const int64_t ahead = count * r.cols;
  for (int k = 0; k < count; ++k) {
    const int64_t at = (first + k) * r.cols;
    const Edges known{{b.inside[0][k], b.inside[1][k]}, {b.code[0][k], b.code[1][k], b.code[2][k]}};
    const ObrTables<n_bins> tables(n_bins, r.grid, b.scale[k], b.bins[k], b.bins[k] + n_bins, r.twice_pull, r.twice_spread);
    RunStep s{r.w + at, r.grad + at, r.m + at, r.v + at, r.image + at, r.grid, r.grid,
              {static_cast<float>(r.twice_pull), tables.strength, tables.goal, n_bins, pulled}, r.adam, r.tracker};
    s.before.scale = b.scale[k], s.after.scale = b.next[k];
    s.tracker.codes += at, s.tracker.direction += at, s.tracker.frequency += at;
    step_run<pulled, n_bins != 0, edges, true>(r.cols, s, known, ahead, fresh);
  }
}

template <int n_bins, bool edges>
void sum_rows(const WholeRows& r, int64_t first, int count, Batch& b) {
  (r.grid.plain ? sum_rows<true, n_bins, false> : sum_rows<false, n_bins, edges>)(r, first, count, b);
}

template <int n_bins, bool edges>
void step_rows(const WholeRows& r, int64_t first, int count, const Batch& b) {
  (r.twice_pull == 0 && n_bins == 0 ? step_rows<false, n_bins, edges> : step_rows<true, n_bins, edges>)(r, first, count, b);
}

template <int n_bins>
void step_all(const WholeRows& r) {
  constexpr bool few = n_bins <= kCodes + 1;  // others have no edges
  const int64_t each = std::max<int64_t>(1, std::min<int64_t>(kRows, kHeld / r.cols));
  for (int64_t first = 0; first < r.rows; first += each) {
    const int count = static_cast<int>(std::min(each, r.rows - first));
    Batch b(r, first, count);
    bool known = few && r.grid.bounds;
    for (int k = 0; known && k < 2; ++k)
      _mm512_store_ps(b.inside[k], edges_of(r.grid.bounds->inside[k], _mm512_load_ps(b.scale), known));
    (known ? sum_rows<n_bins, few> : sum_rows<n_bins, false>)(r, first, count, b);
    for (int k = 0; k < kRows; ++k)
      b.next[k] = next_scale(r.scale_adam, b.scale[k], static_cast<float>(b.sums[k] * r.factor), b.lr[k], b.m[k], b.v[k]);
    for (int k = 0; k < count; ++k) {
      r.next[first + k] = b.next[k], r.next[r.groups + first + k] = b.m[k], r.next[2 * r.groups + first + k] = b.v[k];
    }
    for (int k = 0; known && k < kCodes; ++k)
      _mm512_store_ps(b.code[k], edges_of(r.grid.bounds->code[k], _mm512_load_ps(b.next), known));
    (known ? step_rows<n_bins, few> : step_rows<n_bins, false>)(r, first, count, b);
  }
}

}  // namespace

bool rows_avx512(const WholeRows& r) {
  if (r.cols > kLongest || !has_sums(r.grid, r.n_bins)) return false;
  if (!has_step(r.grid, r.tracker, {0, nullptr, nullptr, r.n_bins, r.twice_pull != 0 || r.n_bins != 0})) return false;
  const auto all = r.n_bins == 0   ? step_all<0>
                   : r.n_bins == 2 ? step_all<2>
                   : r.n_bins == 4 ? step_all<4>
                   : r.n_bins == 8 ? step_all<8>
                                   : step_all<16>;
  all(r);
  return true;
}

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
