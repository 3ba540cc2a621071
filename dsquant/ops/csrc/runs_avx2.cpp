// The passes of the shard step and of fake_quantize, their loops compiled for AVX2 and FMA. As in avx2.cpp, standard headers
// come before the pragma.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fake_quantize.h"
#include "shard_step.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif

#include "shard_step_runs.h"
#include "fake_quantize_runs.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace dsq {
const StepKernels kStepAvx2{gather, update, adamw, moments, image, scales};
const QuantizeKernels kQuantizeAvx2{quantize_run, backward_run, quantize_each, backward_each};
}  // namespace dsq
#endif
