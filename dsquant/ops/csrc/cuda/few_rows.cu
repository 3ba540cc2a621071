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
#if __CUDA_ARCH__ >= 900
  // Blocks may be here before the kernels that came earlier are done, and those of the next before this one is. Until they are
  // no block reads or writes anything: it has words brought into the L2 cache, which is right whatever they still become.
  asm volatile("griddepcontrol.launch_dependents;");
  Kernel::each_load(p, blockIdx.x, 0, threadIdx.x, [](bool there, const uint32_t* words, int, int) {
    if (there) asm volatile("prefetch.global.L2 [%0];" ::"l"(words));
  });
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  Kernel::run(p, blockIdx.x, shared, phase);
}

}  // namespace

cudaError_t launch(const FewRows& p, int64_t n_bits, bool halves, bool brain, cudaStream_t stream) {
  int device = 0, capability = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  with_kernel(p, n_bits, halves, brain, [&](auto kernel) {
    using Kernel = decltype(kernel);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(Kernel::blocks(p)));
    config.blockDim = dim3(Kernel::kThreads);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = capability >= 9;
    error = cudaLaunchKernelEx(&config, run<Kernel>, p);
  });
  return error;
}

}  // namespace dsq
