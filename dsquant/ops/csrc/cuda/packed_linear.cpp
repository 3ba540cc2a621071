// The operators of packed_linear.h on GPUs.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "packed_linear.h"

namespace dsq {

cudaError_t launch(const Problem& p, int64_t a_bits, int64_t w_bits, cudaStream_t stream);             // bit_serial.cu
cudaError_t launch(const FewRows& p, int64_t n_bits, bool halves, bool brain, cudaStream_t stream);  // few_rows.cu

template <class Launch>
void on_device(int32_t device, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "packed_linear cannot be launched: ", cudaGetErrorString(error));
}

void on_gpu(const Problem& p, int64_t a_bits, int64_t w_bits, int32_t device) {
  on_device(device, [&](cudaStream_t stream) { return launch(p, a_bits, w_bits, stream); });
}

void few_rows_on_gpu(const FewRows& p, int64_t n_bits, bool halves, bool brain, int32_t device) {
  on_device(device, [&](cudaStream_t stream) { return launch(p, n_bits, halves, brain, stream); });
}

}  // namespace dsq

// The schemas are in dsquant/ops/packed_linear.py.
STABLE_TORCH_LIBRARY_IMPL(dsquant, CUDA, m) {
  m.impl("packed_linear_cuda", TORCH_BOX(&dsq::packed_linear<dsq::few_rows_on_gpu>));
  m.impl("packed_linear_int_cuda", TORCH_BOX(&dsq::packed_linear_int<dsq::on_gpu>));
}
