// The operators dsquant::quant_attention_cpu and its backward: the heads of all images, which threads take. Sums over images are
// taken in one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention.h"
#include "native.h"

namespace dsq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrid = 7;    // of a site: is it quantized, qmin, qmax, shift, low, high, is it elastic
constexpr int64_t kTasks = 64;  // at least, where gradients of a bias are added up over images

const AttentionKernels& attention_of(int64_t isa) {
#if defined(__x86_64__)
  if (isa >= 2 && isa <= cpu_level()) return kAttentionAvx512;
#endif
  return kernels_of(isa, kAttentionPortable, kAttentionAvx2OrNone);
}

// A tensor of (images, heads, rows, columns), any strides. `images` and `heads` may be 1 for all.
struct Batch {
  const float* at = nullptr;
  int64_t images = 1, image = 0, head = 0, row = 0, column = 1;

  Batch() = default;
  Batch(const Tensor& t, int64_t heads, int64_t rows, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4 && t.size(1) == heads && t.size(2) == rows &&
                        t.size(3) == columns,
                    name, " must be float32 (images, ", heads, ", ", rows, ", ", columns, ")");
    at = static_cast<const float*>(t.data_ptr());
    images = t.size(0), image = t.stride(0), head = t.stride(1), row = t.stride(2);
    column = columns == 1 ? 1 : t.stride(3);
  }
  Batch(const std::optional<Tensor>& t, int64_t heads, int64_t rows, int64_t columns, const char* name)
      : Batch(t ? Batch(*t, heads, rows, columns, name) : Batch()) {}

  Strided of(int64_t i, int64_t h) const { return {at ? at + i % images * image + h * head : nullptr, row, column}; }
};

// Room that a thread keeps: to ask for it anew would cost page faults at every call.
float* scratch_of(int64_t size) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
  return kept.data();
}

struct Grids {
  const double* row;
  explicit Grids(const Tensor& grids) : row(values_of<const double>(grids, ScalarType::Double, 4 * kGrid, "grids")) {}
  bool quantized(int site) const { return row[site * kGrid] != 0; }
  InputLevels levels(int site) const {
    const double* of = row + site * kGrid;
    return {static_cast<float>(of[1]), static_cast<float>(of[2]), static_cast<float>(of[3]),
            static_cast<float>(of[4]), static_cast<float>(of[5]), of[6] != 0};
  }
};

// What all heads are: heads[site][0 or 1][head] are scale and offset of q, k, v; queries[0..2][head][query] the softmax scale,
// and scale and offset of the probabilities.
struct Attention {
  int64_t images, n_heads, queries, keys, d, d_v;
  Batch q, k, v, bias, mask;
  const float *heads, *of_queries;
  Grids grids;

  Attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& bias_,
            const std::optional<Tensor>& mask_, const Tensor& heads_, const Tensor& queries_, const Tensor& grids_)
      : images(q_.size(0)), n_heads(q_.size(1)), queries(q_.size(2)), keys(k_.size(2)), d(q_.size(3)), d_v(v_.size(3)),
        q(q_, n_heads, queries, d, "q"), k(k_, n_heads, keys, d, "k"), v(v_, n_heads, keys, d_v, "v"),
        bias(bias_, n_heads, queries, keys, "bias"), mask(mask_, n_heads, queries, keys, "mask"), grids(grids_) {
    STD_TORCH_CHECK(k.images == images && v.images == images && bias.images == 1 && images % mask.images == 0,
                    "q, k, v, bias and mask are not of the same images");
    heads = values_of<const float>(heads_, ScalarType::Float, 6 * n_heads, "scales of q, k and v");
    of_queries = values_of<const float>(queries_, ScalarType::Float, 3 * n_heads * queries, "values of queries");
  }

  Head head(int64_t image, int64_t h) const {
    const auto of_query = [&](int what) { return of_queries + (what * n_heads + h) * queries; };
    Head head{queries, keys, d, d_v, q.of(image, h), k.of(image, h), v.of(image, h), bias.of(0, h), mask.of(image, h), {},
              grids.quantized(2), grids.levels(2), of_query(0), of_query(1), of_query(2)};
    for (int site = 0; site < 3; ++site) {
      const int grid = site < 2 ? site : 3;  // q, k, probabilities, v
      head.sites[site] = {grids.quantized(grid), heads[2 * site * n_heads + h], heads[(2 * site + 1) * n_heads + h],
                          grids.levels(grid)};
    }
    return head;
  }

  HeadScratch scratch() const { return {queries, keys, d, d_v}; }
};

void quant_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> bias, std::optional<Tensor> mask,
                     const Tensor& heads, const Tensor& queries, const Tensor& grids, const Tensor& out, int64_t isa) {
  const AttentionKernels& kernels = attention_of(isa);
  const QuantizeKernels& quantize = kernels_of(isa, kQuantizePortable, kQuantizeAvx2OrNone);
  const Attention all(q, k, v, bias, mask, heads, queries, grids);
  const int64_t row = all.n_heads * all.d_v;  // out is (images, queries, heads, features)
  auto* to = values_of<float>(out, ScalarType::Float, all.images * all.queries * row, "out");
  const HeadScratch size = all.scratch();
  torch::stable::parallel_for(0, all.images * all.n_heads, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = scratch_of(size.size(all.keys));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / all.n_heads, h = i % all.n_heads;
      kernels.forward(all.head(image, h), quantize, size, scratch, to + image * all.queries * row + h * all.d_v, row);
    }
  });
}

void quant_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> bias,
                              std::optional<Tensor> mask, const Tensor& heads, const Tensor& queries, const Tensor& grids,
                              const Tensor& grad, bool with_softmax_scale, const Tensor& d_q, const Tensor& d_k,
                              const Tensor& d_v, const Tensor& d_heads, const Tensor& d_queries, std::optional<Tensor> d_bias,
                              int64_t isa) {
  const AttentionKernels& kernels = attention_of(isa);
  const QuantizeKernels& quantize = kernels_of(isa, kQuantizePortable, kQuantizeAvx2OrNone);
  const Attention all(q, k, v, bias, mask, heads, queries, grids);
  const int64_t n = all.images * all.n_heads, of_bias = all.queries * all.keys;
  const Batch g(grad, all.n_heads, all.queries, all.d_v, "grad");
  STD_TORCH_CHECK(g.images == all.images, "grad is of other images than q");
  auto* to_q = values_of<float>(d_q, ScalarType::Float, n * all.queries * all.d, "d_q");
  auto* to_k = values_of<float>(d_k, ScalarType::Float, n * all.keys * all.d, "d_k");
  auto* to_v = values_of<float>(d_v, ScalarType::Float, n * all.keys * all.d_v, "d_v");
  auto* to_heads = values_of<double>(d_heads, ScalarType::Double, 6 * n, "d_heads");
  auto* to_queries = values_of<double>(d_queries, ScalarType::Double, 3 * n * all.queries, "d_queries");
  auto* to_bias = values_of<double>(d_bias, ScalarType::Double, all.n_heads * of_bias, "d_bias");
  const HeadScratch size = all.scratch();
  const auto run = [&](int64_t image, int64_t h, float* scratch, double* bias_sum) {
    const int64_t i = image * all.n_heads + h;
    const auto of_query = [&](int what) { return to_queries + (what * n + i) * all.queries; };
    std::fill_n(to_heads + 6 * i, 6, 0.0);
    kernels.backward(all.head(image, h), quantize, size, scratch,
                     {g.of(image, h), to_q + i * all.queries * all.d, to_k + i * all.keys * all.d,
                      to_v + i * all.keys * all.d_v, with_softmax_scale ? of_query(0) : nullptr, of_query(1), of_query(2),
                      bias_sum, to_heads + 6 * i});
  };
  if (!to_bias) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      float* const scratch = scratch_of(size.size(all.keys));
      for (int64_t i = begin; i < end; ++i) run(i / all.n_heads, i % all.n_heads, scratch, nullptr);
    });
    return;
  }
  // A task is a head in some of the images, and has a sum of its own.
  const int64_t wanted = std::min(all.images, (kTasks + all.n_heads - 1) / all.n_heads);
  const int64_t each = (all.images + wanted - 1) / wanted, parts = (all.images + each - 1) / each;
  std::vector<double> found(parts * all.n_heads * of_bias);
  torch::stable::parallel_for(0, parts * all.n_heads, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = scratch_of(size.size(all.keys));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / all.n_heads * each;
      for (int64_t image = first; image < std::min(all.images, first + each); ++image)
        run(image, task % all.n_heads, scratch, &found[task * of_bias]);
    }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t j = 0; j < all.n_heads * of_bias; ++j) to_bias[j] += found[part * all.n_heads * of_bias + j];
}

}  // namespace
}  // namespace dsq

// The schemas are in dsquant/ops/quant_attention.py.
STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) {
  m.impl("quant_attention_cpu", TORCH_BOX(&dsq::quant_attention));
  m.impl("quant_attention_cpu_backward", TORCH_BOX(&dsq::quant_attention_backward));
}
