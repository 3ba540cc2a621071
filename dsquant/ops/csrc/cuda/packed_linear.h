// packed_linear as operators of torch, whatever device their kernels run on: of weights and inputs of 1 and 2 bits, and of few
// rows in 16 bits.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../native.h"
#include "bit_serial.h"
#include "few_rows.h"

namespace dsq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_on(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, x.device());
}

// The operator; launch(problem, a_bits, w_bits, device) runs the kernels. `isa` is none of theirs.
template <auto launch>
Tensor packed_linear_int(const Tensor& input, const Tensor& words, const Tensor& scale, const Tensor& code_sums,
                         std::optional<Tensor> bias, const Tensor& in_scale, std::optional<Tensor> in_offset,
                         int64_t n_bits, double shift, int64_t qmin, int64_t qmax, double in_shift, int64_t /* isa */) {
  STD_TORCH_CHECK((n_bits == 1 || n_bits == 2) && qmin <= qmax && qmax - qmin <= 3, "codes must have 1 or 2 bits");
  const Tensor x = torch::stable::contiguous(input);
  const int64_t outs = words.size(0), cols = x.size(-1), row_words = (cols * n_bits + 31) / 32;
  STD_TORCH_CHECK(words.size(1) == row_words, "words do not hold rows of ", cols, " codes");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outs;
  Tensor y = empty_on(x, shape, ScalarType::Float);
  if (y.numel() == 0) return y;
  const int64_t rows = y.numel() / outs, chunks = (cols + kChunk - 1) / kChunk, a_bits = qmax - qmin <= 1 ? 1 : 2;
  const Tensor planes = empty_on(x, {rows, a_bits, chunks}, ScalarType::Int), totals = empty_on(x, {2, rows}, ScalarType::Int);
  auto* x_sums = values_of<int32_t>(totals, ScalarType::Int, 2 * rows, "totals");
  const Problem p{
      values_of<float>(x, ScalarType::Float, rows * cols, "x"),
      values_of<float>(in_scale, ScalarType::Float, 1, "in_scale"),
      values_of<float>(in_offset, ScalarType::Float, 1, "in_offset"),
      values_of<float>(scale, ScalarType::Float, outs, "scale"),
      values_of<float>(bias, ScalarType::Float, outs, "bias"),
      values_of<uint32_t>(words, ScalarType::Int, outs * row_words, "words"),
      values_of<int32_t>(code_sums, ScalarType::Int, outs, "code_sums"),
      values_of<uint32_t>(planes, ScalarType::Int, rows * a_bits * chunks, "planes"),
      x_sums, x_sums + rows, values_of<float>(y, ScalarType::Float, rows * outs, "y"),
      rows, outs, cols, chunks, row_words,
      static_cast<float>(qmin), static_cast<float>(qmax), static_cast<float>(in_shift), static_cast<float>(shift)};
  launch(p, a_bits, n_bits, x.get_device_index());
  return y;
}

// Returns a contiguous tensor that begins at a multiple of 16 bytes.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor found = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(found.mutable_data_ptr()) % 16 ? torch::stable::clone(found) : found;
}

// The operator of a float input; launch(problem, n_bits, halves, brain, device) runs the kernel. `isa` is none of its.
template <auto launch>
Tensor packed_linear(const Tensor& input, const Tensor& packed, const Tensor& scale, std::optional<Tensor> bias, int64_t n_bits,
                     double shift, int64_t /* isa */) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x must be bfloat16 or float16");
  STD_TORCH_CHECK(n_bits == 1 || n_bits == 2 || n_bits == 4, "codes must have 1, 2 or 4 bits");
  const Tensor x = aligned(input), words = aligned(packed);
  const int64_t outs = words.size(0), cols = x.size(-1), row_words = cols * n_bits / 32;
  STD_TORCH_CHECK(cols * n_bits % 128 == 0, "rows of ", cols, " codes do not fill 16 bytes");
  STD_TORCH_CHECK(words.size(1) == row_words, "words do not hold rows of ", cols, " codes");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outs;
  Tensor y = empty_on(x, shape, dtype);
  if (y.numel() == 0) return y;
  const int64_t rows = y.numel() / outs;
  STD_TORCH_CHECK(rows <= kFewRows, "x must have at most ", kFewRows, " rows");
  const FewRows p{values_of<uint16_t>(x, dtype, rows * cols, "x"),
                  values_of<uint32_t>(words, ScalarType::Int, outs * row_words, "words"),
                  values_of<float>(scale, ScalarType::Float, outs, "scale"),
                  values_of<float>(bias, ScalarType::Float, outs, "bias"),
                  values_of<uint16_t>(y, dtype, rows * outs, "y"),
                  static_cast<int32_t>(rows), static_cast<int32_t>(outs), static_cast<int32_t>(cols),
                  static_cast<int32_t>(row_words)};
  launch(p, n_bits, shift != 0, dtype == ScalarType::BFloat16, x.get_device_index());
  return y;
}

}  // namespace dsq
