// The kernels of few_rows.h on a GPU. As in bit_serial.cu, no header of torch's is here.
#include <cuda_runtime.h>

#include "few_rows.h"

namespace dsq {
namespace {

template <class Format>
__device__ __forceinline__ void multiply(const Fragments& now, float (&sums)[4]) {
  if (Format::kMantissa == 7)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(now.a[0]), "r"(now.a[1]), "r"(now.a[2]), "r"(now.a[3]), "r"(now.b[0]), "r"(now.b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(now.a[0]), "r"(now.a[1]), "r"(now.a[2]), "r"(now.a[3]), "r"(now.b[0]), "r"(now.b[1]));
}

// Has every thread of a block do a phase: then wait for the others, or for none, or multiply with its warp.
template <class Kernel>
struct Together {
  typename Kernel::Own own;

  template <class Phase>
  __device__ __forceinline__ void operator()(const Phase& phase) {
    alone(phase);
    __syncthreads();
  }

  template <class Phase>
  __device__ __forceinline__ void alone(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), own);
  }

  template <class Phase>
  __device__ __forceinline__ void products(const Phase& phase) {
    alone(phase);
#pragma unroll
    for (int group = 0; group < Kernel::kRows / 8; ++group)
      multiply<typename Kernel::Numbers>(own.now[group], own.sums[group]);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks) run(const FewRows p) {
  __shared__ typename Kernel::Shared shared;
  Together<Kernel> phase;
  Kernel::run(p, blockIdx.x, shared, phase);
}

}  // namespace

cudaError_t launch(const FewRows& p, int64_t n_bits, bool halves, bool brain, cudaStream_t stream) {
  with_kernel(p, n_bits, halves, brain, [&](auto kernel) {
    using Kernel = decltype(kernel);
    run<Kernel><<<static_cast<unsigned>(Kernel::blocks(p)), Kernel::kThreads, 0, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace dsq
