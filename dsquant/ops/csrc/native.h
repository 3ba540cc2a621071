// What every operator in this folder needs: the instruction set that a call asks for, and checked pointers to its tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace dsq {

int cpu_level();  // 0 plain C++ alone, 1 AVX2 too, 2 AVX-512 VNNI too, 3 VPOPCNTDQ too

// Return the kernels of an instruction set, which this processor must have; `avx2` is null where the build has none.
template <class Kernels>
const Kernels& kernels_of(int64_t isa, const Kernels& portable, const Kernels* avx2) {
  STD_TORCH_CHECK(isa >= 0 && isa <= cpu_level(), "isa ", isa, " is not one of this processor");
  return isa >= 1 && avx2 ? *avx2 : portable;
}

// Return where the values of a tensor lie, T their type: float for ScalarType::Float, and so on.
template <class T>
T* values_of(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == numel, name, " must be of ",
                  numel, " values in a row, and of the dtype that the op takes");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* values_of(const std::optional<torch::stable::Tensor>& tensor, torch::headeronly::ScalarType dtype, int64_t numel,
             const char* name) {
  return tensor ? values_of<T>(*tensor, dtype, numel, name) : nullptr;
}

}  // namespace dsq
