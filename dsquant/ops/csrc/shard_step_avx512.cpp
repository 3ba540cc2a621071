// The passes over one run of a flat shard with AVX-512 (shard_avx512.h).
#if defined(__x86_64__)
#include "shard_avx512.h"

namespace dsq {
namespace {

// The edges of a run whose grid has bounds, of its scales before and after a step; false where they are not found.
bool edges_of_run(const RunGrid& g, float after, Edges& found) {
  if (!g.bounds) return false;
  bool all = true;
  const auto one = [&](float bound, float scale) { return _mm512_cvtss_f32(edges_of(bound, of(scale), all)); };
  for (int k = 0; k < 2; ++k) found.inside[k] = one(g.bounds->inside[k], g.scale);
  for (int k = 0; k < kCodes; ++k) found.code[k] = one(g.bounds->code[k], after);
  return all;
}

template <bool plain, bool sizes, int n_bins>
void sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, double* out, double* bins) {
  sum_run<plain, sizes, n_bins, false, false>(n, w, grad, codes, g, nullptr, nullptr, nullptr, out, bins);
}

template <bool plain, bool sizes>
void sum_run(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, int64_t n_bins,
             double* out, double* bins) {
  const auto run = n_bins == 0   ? sum_run<plain, sizes, 0>
                   : n_bins == 2 ? sum_run<plain, sizes, 2>
                   : n_bins == 4 ? sum_run<plain, sizes, 4>
                   : n_bins == 8 ? sum_run<plain, sizes, 8>
                                 : sum_run<plain, sizes, 16>;
  run(n, w, grad, codes, g, out, bins);
}

template <bool pulled, bool spread>
void step_run(int64_t n, const RunStep& s) {
  int8_t fresh[kLongest];
  Edges known{};
  if (edges_of_run(s.before, s.after.scale, known))
    step_run<pulled, spread, true, false>(n, s, known, 0, fresh);
  else
    step_run<pulled, spread, false, false>(n, s, known, 0, fresh);
}

}  // namespace

bool sums_avx512(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, int64_t n_bins,
                 bool sizes, double* out, double* bins) {
  if (!has_sums(g, n_bins)) return false;
  const auto run = g.plain ? (sizes ? sum_run<true, true> : sum_run<true, false>)
                           : (sizes ? sum_run<false, true> : sum_run<false, false>);
  run(n, w, grad, codes, g, n_bins, out, bins);
  return true;
}

bool step_avx512(int64_t n, const RunStep& s) {
  if (n > kLongest || !has_step(s.before, s.tracker, s.pull)) return false;
  const auto run = !s.pull.any ? step_run<false, false> : !s.pull.strength ? step_run<true, false> : step_run<true, true>;
  run(n, s);
  return true;
}

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
