// packed_linear with AVX2, FMA and BMI2. No other file may use these instructions: which kernels run is chosen at run
// time. Standard headers come before the pragma, so that none of their inline functions is compiled for AVX2 here and
// then taken by the linker for everyone.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed_linear.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif
#include <immintrin.h>

#include "avx2_codes.h"

namespace dsq {
namespace {

// ---- products ----------------------------------------------------------------------------------------------------

// Additions in place. Written as instructions because the compiler, left to itself, forms all products of a step first and
// then has no registers left for the sums.
inline void add16(__m256i& sum, __m256i v) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v)); }
inline void add32(__m256i& sum, __m256i v) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v)); }
inline void add_product(__m256& sum, __m256 a, __m256 b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }

// Add the eight lanes of each of four vectors: four sums.
inline __m128i sum_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// ROWS rows of x against four of the panel, 8 bits an element. One maddubs adds two products u * a, u <= 2^b - 1 unsigned
// and |a| <= A: at most 2 (2^b - 1) A in magnitude. `flush` is the number of these that a 16-bit sum takes,
// floor(32767 / (2 (2^b - 1) A)), at least 1: neither maddubs nor the additions can saturate or wrap, so sums are exact.
template <int ROWS>
inline void tile_narrow(const int8_t* x, int64_t x_stride, const uint8_t* panel, int64_t panel_stride, int64_t depth,
                        int flush, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[ROWS][4];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) total[m][n] = _mm256_setzero_si256();
  for (int64_t k = 0; k < depth;) {
    const int64_t end = depth - k > 32ll * flush ? k + 32ll * flush : depth;
    __m256i part[ROWS][4];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) part[m][n] = _mm256_setzero_si256();
    for (; k < end; k += 32) {
      __m256i a[ROWS];
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) a[m] = load(x + m * x_stride + k);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const __m256i u = load(panel + n * panel_stride + k);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) add16(part[m][n], _mm256_maddubs_epi16(u, a[m]));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) total[m][n] = _mm256_add_epi32(total[m][n], _mm256_madd_epi16(part[m][n], ones));
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    auto* out = reinterpret_cast<__m128i*>(sums + m * kPanelRows);
    const __m128i added = sum_lanes(total[m][0], total[m][1], total[m][2], total[m][3]);
    _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), added));
  }
}

// The same with 16 bits an element: u <= 255 and |a| <= 255, so a pair of products fits 32 bits many times over.
template <int ROWS>
inline void tile_wide(const int16_t* x, int64_t x_stride, const int16_t* panel, int64_t panel_stride, int64_t depth,
                      int32_t* sums) {
  __m256i total[ROWS][4];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) total[m][n] = _mm256_setzero_si256();
  for (int64_t k = 0; k < depth; k += 16) {
    __m256i a[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) a[m] = load(x + m * x_stride + k);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m256i u = load(panel + n * panel_stride + k);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) add32(total[m][n], _mm256_madd_epi16(u, a[m]));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    auto* out = reinterpret_cast<__m128i*>(sums + m * kPanelRows);
    const __m128i added = sum_lanes(total[m][0], total[m][1], total[m][2], total[m][3]);
    _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), added));
  }
}

template <int ROWS>
inline void multiply_rows(const void* x, int64_t x_stride, const void* panel, int64_t panel_stride, int64_t depth,
                          const IntLayout& layout, int32_t* sums) {
  for (int n = 0; n < kPanelRows; n += 4) {
    if (layout.wide)
      tile_wide<ROWS>(static_cast<const int16_t*>(x), x_stride, static_cast<const int16_t*>(panel) + n * panel_stride,
                      panel_stride, depth, sums + n);
    else
      tile_narrow<ROWS>(static_cast<const int8_t*>(x), x_stride, static_cast<const uint8_t*>(panel) + n * panel_stride,
                        panel_stride, depth, layout.flush, sums + n);
  }
}

void multiply(const void* x, int64_t x_stride, int64_t rows, const void* panel, int64_t panel_stride, int64_t depth,
              const IntLayout& layout, int32_t* sums) {
  const int64_t row_bytes = x_stride * (layout.wide ? 2 : 1);
  const auto* bytes = static_cast<const uint8_t*>(x);
  int64_t m = 0;
  for (; m + 3 <= rows; m += 3)
    multiply_rows<3>(bytes + m * row_bytes, x_stride, panel, panel_stride, depth, layout, sums + m * kPanelRows);
  if (rows - m == 2)
    multiply_rows<2>(bytes + m * row_bytes, x_stride, panel, panel_stride, depth, layout, sums + m * kPanelRows);
  else if (rows - m == 1)
    multiply_rows<1>(bytes + m * row_bytes, x_stride, panel, panel_stride, depth, layout, sums + m * kPanelRows);
}

// One chunk of each of four packed rows against one of x.
template <int n_bits>
inline void stream_chunk(const __m256i packed[4], const int8_t* x, __m256i part[4]) {
  const __m256i mask = _mm256_set1_epi8((1 << n_bits) - 1);
#pragma GCC unroll 8
  for (int j = 0; j < 8 / n_bits; ++j) {
    const __m256i a = load(x + 32 * j);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m256i u = _mm256_and_si256(j ? _mm256_srli_epi16(packed[n], j * n_bits) : packed[n], mask);
      add16(part[n], _mm256_maddubs_epi16(u, a));
    }
  }
}

template <int n_bits>
void stream_rows(const int8_t* x, const uint8_t* const* rows, int64_t row_bytes, const IntLayout& layout,
                 int32_t* sums) {
  constexpr int per = 8 / n_bits;  // steps of a chunk; never more than `flush` takes: 8 <= 127, 4 <= 42, 2 <= 8
  const int64_t chunks = layout.padded / (32 * per), whole = std::min(chunks, row_bytes / 32);
  const int64_t at_once = std::max(1, layout.flush / per);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[4] = {}, packed[4];
  const uint8_t* ahead = rows[0] + 4 * 4 * row_bytes;  // see packed_linear_vnni.cpp
  for (int64_t c = 0; c < chunks;) {
    __m256i part[4] = {};
    const int64_t end = std::min(c + at_once, chunks);
    for (; c < std::min(end, whole); ++c, ahead += 4 * 32) {
      for (int line = 0; line < 4 * 32; line += 64) __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) packed[n] = load(rows[n] + 32 * c);
      stream_chunk<n_bits>(packed, x + 32 * per * c, part);
    }
    for (; c < end; ++c) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        alignas(32) uint8_t bytes[32];
        load_padded<32>(rows[n], row_bytes, 32 * c, bytes);
        packed[n] = load(bytes);
      }
      stream_chunk<n_bits>(packed, x + 32 * per * c, part);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) total[n] = _mm256_add_epi32(total[n], _mm256_madd_epi16(part[n], ones));
  }
  auto* out = reinterpret_cast<__m128i*>(sums);
  _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), sum_lanes(total[0], total[1], total[2], total[3])));
}

bool stream(const void* x, const uint8_t* const* rows, int64_t row_bytes, const IntLayout& layout, int32_t* sums) {
  const auto* codes = static_cast<const int8_t*>(x);
  if (layout.wide) return false;
  for (int n = 0; n < kPanelRows; n += 4) {
    if (layout.n_bits == 1) stream_rows<1>(codes, rows + n, row_bytes, layout, sums + n);
    else if (layout.n_bits == 2) stream_rows<2>(codes, rows + n, row_bytes, layout, sums + n);
    else if (layout.n_bits == 4) stream_rows<4>(codes, rows + n, row_bytes, layout, sums + n);
    else return false;
  }
  return true;
}

template <int ROWS>
inline void tile_float(const float* x, int64_t x_stride, const float* panel, int64_t panel_stride, int64_t depth,
                       float* sums) {
  __m256 part[ROWS][4];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) part[m][n] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    __m256 a[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) a[m] = _mm256_loadu_ps(x + m * x_stride + k);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m256 w = _mm256_loadu_ps(panel + n * panel_stride + k);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) add_product(part[m][n], a[m], w);
    }
  }
  if (k < depth) {  // x ends here, and what lies behind it may not be read; the panel goes on
    const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(depth - k)),
                                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const __m256 a = _mm256_maskload_ps(x + m * x_stride + k, inside);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) add_product(part[m][n], a, _mm256_loadu_ps(panel + n * panel_stride + k));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    float* out = sums + m * kFloatRows;
    const __m128 added = sum_lanes(part[m][0], part[m][1], part[m][2], part[m][3]);
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), added));
  }
}

template <int ROWS>
inline void multiply_float_rows(const float* x, int64_t x_stride, const float* panel, int64_t panel_stride,
                                int64_t depth, float* sums) {
  for (int n = 0; n < kFloatRows; n += 4)
    tile_float<ROWS>(x, x_stride, panel + n * panel_stride, panel_stride, depth, sums + n);
}

void multiply_float(const float* x, int64_t x_stride, int64_t rows, const float* panel, int64_t panel_stride,
                    int64_t depth, float* sums) {
  int64_t m = 0;
  for (; m + 3 <= rows; m += 3)
    multiply_float_rows<3>(x + m * x_stride, x_stride, panel, panel_stride, depth, sums + m * kFloatRows);
  if (rows - m == 2)
    multiply_float_rows<2>(x + m * x_stride, x_stride, panel, panel_stride, depth, sums + m * kFloatRows);
  else if (rows - m == 1)
    multiply_float_rows<1>(x + m * x_stride, x_stride, panel, panel_stride, depth, sums + m * kFloatRows);
}

}  // namespace

const Kernels kAvx2 = {step, true, true, quantize, decode, multiply, stream, decode_float, multiply_float};

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
