// What the drivers of the shard step (shard_step.cpp) ask of each instruction set: passes over a run of weights that share one
// scale. Each gives the bits of its definition in PyTorch (dsquant/shard/), sums over elements apart, which are float64.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace dsq {

// Of a grid of four levels at most, the least v that is not below its range, the least that is above it, and the least of each
// code but the first (NaN for those there are not).
struct Bounds {
  float inside[2], code[3];
};

// The grid of a weight's levels and a run's scale: v = (w - centre) / scale, code = round(clip(v - shift, qmin, qmax)).
struct RunGrid {
  float scale, centre;
  float shift, low, high;  // the gradient passes where low <= v <= high
  int32_t qmin, qmax;
  bool plain;  // d scale = sum G * level, for an elastic grid and where the scale is a statistic
  const Bounds* bounds;  // null for more levels
};

// Sums over bins are of clip(v, low, high) in whole parts of a scale, so that they are exact in any order.
constexpr float kParts = 1 << 22;
constexpr float kNear = 15;  // v that is summed at most, where nothing clips it

// OBR and dampening: gradient 2 pull (w - w_hat) + factor[bin] (w - mean[bin]) where it passes, as w strength[bin] - goal[bin].
// Null: no second term.
struct Pull {
  float twice;
  const float *strength, *goal;
  int64_t n_bins;
  bool any;
};

// AdamW as torch.optim.AdamW computes it: w decays, then moves by step * m / (sqrt(v) / correction + eps).
struct AdamW {
  float decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step;
};

struct Tracker {
  int8_t *codes, *direction;
  float *frequency, *code_mean;  // code_mean and frozen are null where freezing is off
  bool* frozen;
  float momentum, keep;  // of code_mean
  float gain;            // what an oscillation adds to frequency
  float threshold;       // < 0: nothing freezes at this step
};

// One step of a run of quantized weights: AdamW on the latents w, then the codes under `after` and their image.
struct RunStep {
  float* w;
  const float* grad;
  float *m, *v, *image;
  RunGrid before, after;  // with the scales of the image that the forward pass used, and with those of the next
  Pull pull;
  AdamW adam;
  Tracker tracker;
};

// One step of the Adam of scales; `rate` is the schedule's factor on their rates.
struct ScaleAdam {
  double rate, beta1, beta2, correction1, correction2, eps;
  float floor;
};

// Rows of a tile that are each all of a group: what lies where for the first of them. Of each row `sums` has one value, d scale, and
// `held` and `bins` 2 n_bins: what bins hold before and after the step (as in `StepKernels::gather`).
struct WholeRows {
  int64_t rows, cols;
  float* w;
  const float* grad;
  float *m, *v, *image;
  Tracker tracker;
  RunGrid grid;  // but for the scale
  const float *before, *after;
  const double* held;
  double *sums, *bins;
  double factor, twice_pull, twice_spread;  // factor: of d scale
  Pull pull;  // its tables are of each row; null where there are none
  AdamW adam;
};

struct StepKernels {
  // out[0] += sum of d scale, out[1] += sum |w| ; bins[k] += count, bins[n_bins + k] += sum of the clipped values in parts of
  // the scale. bins may be null.
  void (*gather)(int64_t n, const float* w, const float* grad, const int8_t* codes, const bool* frozen, const RunGrid&,
                 int64_t n_bins, double* out, double* bins);
  // norms[0] += sum of the masked gradient's squares, norms[1] += of the regularizer's; may be null.
  void (*update)(int64_t n, float* w, const float* grad, float* m, float* v, const int8_t* codes, const bool* frozen,
                 const RunGrid&, const Pull&, const AdamW&, double* norms);
  void (*adamw)(int64_t n, float* w, const float* grad, float* m, float* v, const AdamW&);
  // out += sums of |w|, w and w^2
  void (*moments)(int64_t n, const float* w, double* out);
  // latent = w, w = image of the new codes; the tracker records them.
  void (*image)(int64_t n, float* w, float* latent, const RunGrid&, const Tracker&);
  void (*scales)(int64_t n, float* scale, float* m, float* v, const float* grad, const float* lr, const ScaleAdam&);
  // The sums that `gather` finds (of |w| only where asked). Null, or false for what it has no code for: then `gather` does it.
  bool (*sums)(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid&, int64_t n_bins,
               bool sizes, double* out, double* bins);
  // A whole step: out[0] += d scale, as `gather` finds it before the step; where there are tables, `bins` as it finds them after.
  // Null, or false for what it has no code for: then the passes above do it. The same of whole rows, whose sums it puts.
  bool (*step)(int64_t n, const RunStep&, double* out, double* bins);
  bool (*rows)(const WholeRows&);
};

// As `gather`, by the fastest code that there is.
inline void sums_of(const StepKernels& kernels, int64_t n, const float* w, const float* grad, const int8_t* codes,
                    const bool* frozen, const RunGrid& grid, int64_t n_bins, bool sizes, double* out, double* bins) {
  if (!frozen && kernels.sums && kernels.sums(n, w, grad, codes, grid, n_bins, sizes, out, bins)) return;
  kernels.gather(n, w, grad, codes, frozen, grid, n_bins, out, bins);
}

// Internal to each file, which may choose its instruction set: the linker must not take one file's for another's.
namespace {

// Tables of OBR for one group, as `regularizers.regularizer_gradient` forms them, from what its bins hold over all shards. `known`:
// their number, or 0.
template <int known>
struct ObrTables {
  float strength[known ? known : 256], goal[known ? known : 256];

  ObrTables(int64_t n_bins, const RunGrid& g, float scale, const double* bins, double twice_pull, double twice_spread) {
    const double part = scale / static_cast<double>(kParts);
    const int size = known ? known : static_cast<int>(n_bins);
    const double *counts = bins, *sums = bins + size;
    for (int b = 0; b < size; ++b) {
      const double image = (static_cast<double>(g.qmin + b) + g.shift) * scale;
      const double mean = sums[b] / std::max(counts[b], 1.0) * part;
      const double factor = (counts[b] > 1 ? twice_spread : 0.0) / std::max(counts[b] - 1, 1.0);
      strength[b] = static_cast<float>(factor + twice_pull);
      goal[b] = static_cast<float>(image * twice_pull + mean * factor);
    }
  }
};

}  // namespace

extern const StepKernels kStepPortable;
#if defined(__x86_64__)
extern const StepKernels kStepAvx2;
bool sums_avx512(int64_t n, const float* w, const float* grad, const int8_t* codes, const RunGrid&, int64_t n_bins,
                 bool sizes, double* out, double* bins);
bool step_avx512(int64_t n, const RunStep&, double* out, double* bins);
bool rows_avx512(const WholeRows&);
constexpr const StepKernels* kStepAvx2OrNone = &kStepAvx2;
#else
constexpr const StepKernels* kStepAvx2OrNone = nullptr;
#endif

}  // namespace dsq
