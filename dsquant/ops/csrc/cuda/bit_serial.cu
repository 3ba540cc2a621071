// The kernels of bit_serial.h on a GPU. No header of torch's is here, so that nvcc alone compiles it, in seconds.
#include <cuda_runtime.h>

#include "bit_serial.h"

namespace dsq {
namespace {

// Has every thread of a block do a phase, then wait for the others.
template <class Kernel>
struct Together {
  typename Kernel::Own own;

  template <class Phase>
  __device__ __forceinline__ void operator()(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), own);
    __syncthreads();
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run(const Problem p) {
  __shared__ typename Kernel::Shared shared;
  Together<Kernel> phase;
  Kernel::run(p, blockIdx.x, shared, phase);
}

}  // namespace

cudaError_t launch(const Problem& p, int64_t a_bits, int64_t w_bits, cudaStream_t stream) {
  each_kernel(p, a_bits, w_bits, [&](auto kernel) {
    using Kernel = decltype(kernel);
    run<Kernel><<<static_cast<unsigned>(Kernel::blocks(p)), Kernel::kThreads, 0, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace dsq
