// Products of packed_linear where weights have 1 bit and inputs 1 or 2, with AVX-512 VPOPCNTDQ: x is cut into bit planes, and an
// AND and a population count take 32 products of a row of x with each of 16 packed rows, which are read as they lie. As in
// avx2.cpp, standard headers come before the pragma.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed_linear.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512vnni,avx512vpopcntdq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512vnni,avx512vpopcntdq")
#endif
#include <immintrin.h>

#include "wide_quantizer.h"

namespace dsq {
namespace {

constexpr int kWords = 256;     // of a row that are multiplied at a time: those of 16 rows stay in L1
constexpr int kTileRows = 12;
using Word = int32_t __attribute__((may_alias, aligned(1)));

template <int ROWS, int PLANES>
inline void tile(const uint8_t* x, int64_t x_stride, int64_t plane, const __m512i* panel, int64_t words, int32_t* sums) {
  __m512i total[PLANES][ROWS];
  for (int m = 0; m < ROWS; ++m) {
    total[0][m] = _mm512_loadu_si512(sums + m * kPanelRows);
    if (PLANES == 2) total[PLANES - 1][m] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < words; ++k) {
    const __m512i u = panel[k];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
      for (int p = 0; p < PLANES; ++p) {
        const __m512i bits = _mm512_set1_epi32(*reinterpret_cast<const Word*>(x + m * x_stride + p * plane + 4 * k));
        total[p][m] = _mm512_add_epi32(total[p][m], _mm512_popcnt_epi32(_mm512_and_si512(u, bits)));
      }
  }
  for (int m = 0; m < ROWS; ++m) {
    if (PLANES == 2) total[0][m] = _mm512_add_epi32(total[0][m], _mm512_slli_epi32(total[PLANES - 1][m], 1));
    _mm512_storeu_si512(sums + m * kPanelRows, total[0][m]);
  }
}

// Rows in tiles of ROWS, and what these leave in one of fewer.
template <int ROWS, int PLANES>
inline void tiles(int64_t rows, const uint8_t* x, int64_t x_stride, int64_t plane, const __m512i* panel, int64_t words,
                  int32_t* sums) {
  if constexpr (ROWS > 0) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * x_stride, sums += ROWS * kPanelRows)
      tile<ROWS, PLANES>(x, x_stride, plane, panel, words, sums);
    tiles<ROWS - 1, PLANES>(rows, x, x_stride, plane, panel, words, sums);
  }
}

}  // namespace

void quantize_bits(const float* x, int64_t cols, const InputGrid& grid, const IntLayout& layout, void* out, RowStats* stats) {
  WideQuantizer quantizer{grid};
  const int64_t plane = layout.padded / 8;
  for (int64_t k = 0; k < layout.padded; k += 16) {
    const auto inside = static_cast<__mmask16>((1u << std::clamp<int64_t>(cols - k, 0, 16)) - 1);
    const __m512i code = quantizer(x + k, inside);
    for (int p = 0; p < layout.planes; ++p) {
      const uint16_t bits = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << p));
      std::memcpy(static_cast<uint8_t*>(out) + p * plane + k / 8, &bits, sizeof(bits));
    }
  }
  *stats = quantizer.stats();
}

void multiply_bits(const void* x, int64_t x_stride, int64_t rows, const uint8_t* const* packed, const IntLayout& layout,
                   int32_t* sums) {
  alignas(64) __m512i panel[kWords];
  alignas(64) int64_t from[kPanelRows];
  for (int n = 0; n < kPanelRows; ++n) from[n] = packed[n] - packed[0];
  const __m512i low = _mm512_load_si512(from), high = _mm512_load_si512(from + 8);
  const int64_t words = layout.padded / 32, plane = layout.padded / 8;
  for (int64_t begin = 0; begin < words; begin += kWords) {
    const int64_t count = std::min<int64_t>(kWords, words - begin);
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t* at = packed[0] + 4 * (begin + k);
      const __m256i first = _mm512_i64gather_epi32(low, at, 1), second = _mm512_i64gather_epi32(high, at, 1);
      panel[k] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
    const uint8_t* bits = static_cast<const uint8_t*>(x) + 4 * begin;
    if (layout.planes == 1)
      tiles<kTileRows, 1>(rows, bits, x_stride, plane, panel, count, sums);
    else
      tiles<kTileRows, 2>(rows, bits, x_stride, plane, panel, count, sums);
  }
}

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
