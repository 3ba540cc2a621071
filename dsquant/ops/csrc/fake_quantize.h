// What the drivers of fake_quantize (fake_quantize.cpp) ask of each instruction set.
#pragma once
#include <cstdint>

namespace dsq {

// An activation's levels: v = (x - offset) / scale, x_hat = scale (round(clip(v - shift, qmin, qmax)) + shift) + offset.
struct InputLevels {
  float qmin, qmax, shift, low, high;  // the gradient passes where low <= v <= high
  bool elastic;                        // d scale = sum G * level
};

struct QuantizeKernels {
  // Of n values that share one scale.
  void (*forward)(int64_t n, const float* x, float scale, float offset, const InputLevels&, float* x_hat);
  // sums[0] += d scale, sums[1] += d offset. d_x may be grad itself; x_hat may be null.
  void (*backward)(int64_t n, const float* x, const float* grad, float scale, float offset, const InputLevels&,
                   float* d_x, float* x_hat, double* sums);
  // Of n values with a scale each; offset may be null. sums: n of d scale, then n of d offset, added to.
  void (*forward_each)(int64_t n, const float* x, const float* scale, const float* offset, const InputLevels&,
                       float* x_hat);
  void (*backward_each)(int64_t n, const float* x, const float* grad, const float* scale, const float* offset,
                        const InputLevels&, float* d_x, float* x_hat, double* sums);
};

extern const QuantizeKernels kQuantizePortable;
#if defined(__x86_64__)
extern const QuantizeKernels kQuantizeAvx2;
constexpr const QuantizeKernels* kQuantizeAvx2OrNone = &kQuantizeAvx2;
#else
constexpr const QuantizeKernels* kQuantizeAvx2OrNone = nullptr;
#endif

}  // namespace dsq
