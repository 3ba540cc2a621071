// The operators dsquant::fake_quantize and dsquant::fake_quantize_backward on CPU. A scale serves every run of `inner` values
// in a row, element i having scale (i / inner) % n_groups; sums are added up in one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "fake_quantize.h"
#include "native.h"

namespace dsq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTask = 16 * 1024;  // elements that a thread takes at a time

struct Groups {
  int64_t n_groups, inner;
  const float *scale, *offset;

  Groups(const Tensor& scales, const std::optional<Tensor>& offsets, int64_t length)
      : n_groups(scales.numel()), inner(length) {
    STD_TORCH_CHECK(n_groups > 0 && inner > 0, "there is no scale");
    scale = values_of<const float>(scales, ScalarType::Float, n_groups, "scale");
    offset = values_of<const float>(offsets, ScalarType::Float, n_groups, "offset");
  }

  bool each() const { return inner == 1 && n_groups > 1; }
  float zero(int64_t group) const { return offset ? offset[group] : 0.0f; }
};

// Tasks of runs: f(run, first element, elements, group), of which a task takes several in turn.
template <class F>
void for_runs(int64_t numel, const Groups& g, const F& f) {
  const int64_t pieces = (g.inner + kTask - 1) / kTask, runs = numel / g.inner * pieces;
  torch::stable::parallel_for(0, runs, std::max<int64_t>(1, kTask / g.inner), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t whole = run / pieces, first = run % pieces * kTask;
      f(run, whole * g.inner + first, std::min(kTask, g.inner - first), whole % g.n_groups);
    }
  });
}

int64_t runs_of(int64_t numel, const Groups& g) { return numel / g.inner * ((g.inner + kTask - 1) / kTask); }

// Tasks of rows of n_groups values, some rows each, for scales of single elements.
int64_t rows_of_task(const Groups& g) { return std::max<int64_t>(1, kTask / g.n_groups); }

InputLevels levels_of(int64_t qmin, int64_t qmax, double shift, double low, double high, bool elastic) {
  return {static_cast<float>(qmin), static_cast<float>(qmax), static_cast<float>(shift),
          static_cast<float>(low),  static_cast<float>(high), elastic};
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, std::optional<Tensor> offset, int64_t inner, int64_t qmin,
                     int64_t qmax, double shift, int64_t isa) {
  const QuantizeKernels& kernels = kernels_of(isa, kQuantizePortable, kQuantizeAvx2OrNone);
  const Groups groups(scale, offset, inner);
  const int64_t n = x.numel();
  const InputLevels levels = levels_of(qmin, qmax, shift, 0.0, 0.0, false);
  const auto* source = values_of<const float>(x, ScalarType::Float, n, "x");
  STD_TORCH_CHECK(n % (groups.n_groups * inner) == 0, n, " values are no whole number of ", groups.n_groups, " x ", inner);
  Tensor y = torch::stable::empty_like(x);
  auto* target = static_cast<float*>(y.mutable_data_ptr());
  if (groups.each()) {
    const int64_t width = groups.n_groups;
    torch::stable::parallel_for(0, n / width, rows_of_task(groups), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        kernels.forward_each(width, source + row * width, groups.scale, groups.offset, levels, target + row * width);
    });
    return y;
  }
  for_runs(n, groups, [&](int64_t, int64_t first, int64_t count, int64_t group) {
    kernels.forward(count, source + first, groups.scale[group], groups.zero(group), levels, target + first);
  });
  return y;
}

void fake_quantize_backward(const Tensor& x, const Tensor& grad, const Tensor& scale, std::optional<Tensor> offset,
                            int64_t inner, int64_t qmin, int64_t qmax, double shift, double low, double high, bool elastic,
                            const Tensor& d_x, std::optional<Tensor> x_hat, const Tensor& sums, int64_t isa) {
  const QuantizeKernels& kernels = kernels_of(isa, kQuantizePortable, kQuantizeAvx2OrNone);
  const Groups groups(scale, offset, inner);
  const int64_t n = x.numel(), width = groups.n_groups;
  const InputLevels levels = levels_of(qmin, qmax, shift, low, high, elastic);
  STD_TORCH_CHECK(n % (width * inner) == 0, n, " values are no whole number of ", width, " x ", inner);
  const auto* source = values_of<const float>(x, ScalarType::Float, n, "x");
  const auto* from = values_of<const float>(grad, ScalarType::Float, n, "grad");
  auto* to = values_of<float>(d_x, ScalarType::Float, n, "d_x");
  auto* image = values_of<float>(x_hat, ScalarType::Float, n, "x_hat");
  auto* totals = values_of<double>(sums, ScalarType::Double, 2 * width, "sums");
  if (groups.each()) {
    const int64_t rows = n / width, task = rows_of_task(groups), tasks = (rows + task - 1) / task;
    std::vector<double> found(2 * width * tasks);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t row = k * task; row < std::min(rows, (k + 1) * task); ++row) {
          const int64_t first = row * width;
          kernels.backward_each(width, source + first, from + first, groups.scale, groups.offset, levels, to + first,
                                image ? image + first : nullptr, &found[2 * width * k]);
        }
    });
    for (int64_t k = 0; k < tasks; ++k)
      for (int64_t i = 0; i < 2 * width; ++i) totals[i] += found[2 * width * k + i];
    return;
  }
  std::vector<double> found(2 * runs_of(n, groups));
  for_runs(n, groups, [&](int64_t run, int64_t first, int64_t count, int64_t group) {
    kernels.backward(count, source + first, from + first, groups.scale[group], groups.zero(group), levels, to + first,
                     image ? image + first : nullptr, &found[2 * run]);
  });
  const int64_t pieces = runs_of(n, groups) / (n / inner);
  for (int64_t run = 0; run < runs_of(n, groups); ++run)
    for (int64_t k = 0; k < 2; ++k) totals[k * width + run / pieces % width] += found[2 * run + k];
}

}  // namespace
}  // namespace dsq

// The schemas are in dsquant/ops/fake_quantize.py.
STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&dsq::fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&dsq::fake_quantize_backward));
}
