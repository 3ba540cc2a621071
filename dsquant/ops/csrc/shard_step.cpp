// The operators dsquant::shard_* on CPU: a weight's tile is cut into runs that share a scale, runs are shared out over threads,
// and sums are added up in one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "native.h"
#include "shard_step.h"

namespace dsq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRun = 16 * 1024;  // elements at most: what a thread takes at a time, and what stays in L2

// A tile (rows, cols) of a weight, row r of scale group groups[r], and the grid of its levels.
struct TileRuns {
  int64_t numel, rows, cols, n_groups, pieces;
  const int64_t* groups;
  const float *scale, *centre;
  RunGrid grid;

  TileRuns(const Tensor& w, const Tensor& group_of, const Tensor& scales, const std::optional<Tensor>& centres,
           int64_t qmin, int64_t qmax, double shift)
      : numel(w.numel()), rows(group_of.numel()), n_groups(scales.numel()) {
    STD_TORCH_CHECK(rows > 0 && numel % rows == 0, "a tile of ", numel, " weights has no ", rows, " rows");
    STD_TORCH_CHECK(-128 <= qmin && qmin <= qmax && qmax <= 127, "codes of weights are int8");
    cols = numel / rows;
    pieces = (cols + kRun - 1) / kRun;
    groups = values_of<const int64_t>(group_of, ScalarType::Long, rows, "groups");
    scale = values_of<const float>(scales, ScalarType::Float, n_groups, "scale");
    centre = values_of<const float>(centres, ScalarType::Float, n_groups, "centre");
    for (int64_t r = 0; r < rows; ++r)
      STD_TORCH_CHECK(groups[r] >= 0 && groups[r] < n_groups, "row ", r, " is of group ", groups[r]);
    grid = {1.0f, 0.0f, static_cast<float>(shift), 0.0f, 0.0f, static_cast<int32_t>(qmin), static_cast<int32_t>(qmax), false};
  }

  int64_t count() const { return rows * pieces; }
  int64_t group(int64_t run) const { return groups[run / pieces]; }

  // Call f(run, first element, elements, grid of the run) for every run.
  template <class F>
  void each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kRun / std::min(cols, kRun));
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      RunGrid own = grid;
      for (int64_t run = begin; run < end; ++run) {
        const int64_t first = run % pieces * kRun;
        own.scale = scale[group(run)];
        own.centre = centre ? centre[group(run)] : 0.0f;
        f(run, run / pieces * cols + first, std::min(kRun, cols - first), own);
      }
    });
  }
};

void shard_adamw(const Tensor& w, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, double decay,
                 double beta1, double beta2, double correction, double eps, double step, int64_t isa) {
  const StepKernels& kernels = kernels_of(isa, kStepPortable, kStepAvx2OrNone);
  const int64_t n = w.numel();
  auto* x = values_of<float>(w, ScalarType::Float, n, "w");
  const auto* g = values_of<const float>(grad, ScalarType::Float, n, "grad");
  auto* m = values_of<float>(exp_avg, ScalarType::Float, n, "exp_avg");
  auto* v = values_of<float>(exp_avg_sq, ScalarType::Float, n, "exp_avg_sq");
  const AdamW adam{static_cast<float>(decay),      static_cast<float>(1 - beta1),  static_cast<float>(beta2),
                   static_cast<float>(1 - beta2),  static_cast<float>(correction), static_cast<float>(eps),
                   static_cast<float>(step)};
  torch::stable::parallel_for(0, n, kRun, [&](int64_t begin, int64_t end) {
    kernels.adamw(end - begin, x + begin, g + begin, m + begin, v + begin, adam);
  });
}

void shard_image(const Tensor& w, const Tensor& latent, const Tensor& codes, const Tensor& direction,
                 const Tensor& frequency, std::optional<Tensor> code_mean, std::optional<Tensor> frozen,
                 std::optional<Tensor> centre, const Tensor& scale, const Tensor& groups, int64_t qmin, int64_t qmax,
                 double shift, double momentum, double threshold, int64_t isa) {
  const StepKernels& kernels = kernels_of(isa, kStepPortable, kStepAvx2OrNone);
  const TileRuns tile(w, groups, scale, centre, qmin, qmax, shift);
  const int64_t n = tile.numel;
  auto* x = values_of<float>(w, ScalarType::Float, n, "w");
  auto* kept = values_of<float>(latent, ScalarType::Float, n, "latent");
  Tracker all{values_of<int8_t>(codes, ScalarType::Char, n, "codes"),
              values_of<int8_t>(direction, ScalarType::Char, n, "direction"),
              values_of<float>(frequency, ScalarType::Float, n, "frequency"),
              values_of<float>(code_mean, ScalarType::Float, n, "code_mean"),
              values_of<bool>(frozen, ScalarType::Bool, n, "frozen"),
              static_cast<float>(momentum),
              static_cast<float>(1 - momentum),
              static_cast<float>(threshold)};
  STD_TORCH_CHECK(!all.code_mean == !all.frozen, "code_mean and frozen come together");
  tile.each([&](int64_t, int64_t first, int64_t count, const RunGrid& grid) {
    Tracker own = all;
    own.codes += first, own.direction += first, own.frequency += first;
    if (own.frozen) own.frozen += first, own.code_mean += first;
    kernels.image(count, x + first, kept + first, grid, own);
  });
}

}  // namespace
}  // namespace dsq

// The schemas are in dsquant/ops/shard_step.py.
STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) {
  m.impl("shard_adamw", TORCH_BOX(&dsq::shard_adamw));
  m.impl("shard_image", TORCH_BOX(&dsq::shard_image));
}
