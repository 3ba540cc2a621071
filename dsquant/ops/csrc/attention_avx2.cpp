// Attention with AVX2 and FMA. As in avx2.cpp, standard headers come before the pragma.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif
#include <immintrin.h>

namespace dsq {
namespace {
using Vec = __m256;
constexpr int kWidth = 8, kRows = 6, kVecs = 2;
inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, Vec v) { _mm256_storeu_ps(x, v); }
inline Vec spread(float x) { return _mm256_set1_ps(x); }
inline Vec madd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec plus(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float madd(float a, float b, float c) { return std::fma(a, b, c); }
}  // namespace
}  // namespace dsq

#include "attention_runs.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace dsq {
const AttentionKernels kAttentionAvx2{attend, attend_backward};
}  // namespace dsq
#endif
