// Products of packed_linear with AVX-512 VNNI: vpdpbusd adds four products of 8 bits, u unsigned and a signed, to a 32-bit
// sum, where AVX2 takes three instructions and 16-bit sums that must be widened in time. Everything else is AVX2's. As in
// avx2.cpp, standard headers come before the pragma.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed_linear.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512vnni")
#endif
#include <immintrin.h>

#include "avx2_codes.h"
#include "wide_quantizer.h"

namespace dsq {
namespace {

// In place, as an instruction: see add16 in avx2.cpp.
inline void add_products(__m256i& sum, __m256i u, __m256i a) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(a)); }

constexpr int kTileRows = 12;

using Four = int32_t __attribute__((may_alias, aligned(1)));  // levels of x, taken as one

inline void store_lanes(int32_t* sums, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  const __m128i added = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  auto* out = reinterpret_cast<__m128i*>(sums);
  _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), added));
}

// Lay a panel out as vpdpbusd takes it: four levels of row 0, four of row 1, ... of row 15, then the next four of each.
inline void interleave(const uint8_t* panel, int64_t panel_stride, int64_t depth, uint8_t* out) {
  for (int64_t k = 0; k < depth; k += 64) {
    const __mmask64 there = depth - k < 64 ? ~0ull >> (64 - (depth - k)) : ~0ull;
    for (int n = 0; n < kPanelRows; n += 4) {
      __m512i row[4], q[4];
      for (int i = 0; i < 4; ++i) row[i] = _mm512_maskz_loadu_epi8(there, panel + (n + i) * panel_stride + k);
      const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
      const __m512i c = _mm512_unpacklo_epi32(row[2], row[3]), d = _mm512_unpackhi_epi32(row[2], row[3]);
      q[0] = _mm512_unpacklo_epi64(a, c), q[1] = _mm512_unpackhi_epi64(a, c);
      q[2] = _mm512_unpacklo_epi64(b, d), q[3] = _mm512_unpackhi_epi64(b, d);
      for (int j = 0; j < 4; ++j) {
        auto* to = reinterpret_cast<__m128i*>(out + (k + 4 * j) * kPanelRows + 4 * n);
        _mm_store_si128(to, _mm512_castsi512_si128(q[j]));
        _mm_store_si128(to + kPanelRows, _mm512_extracti32x4_epi32(q[j], 1));
        _mm_store_si128(to + 2 * kPanelRows, _mm512_extracti32x4_epi32(q[j], 2));
        _mm_store_si128(to + 3 * kPanelRows, _mm512_extracti32x4_epi32(q[j], 3));
      }
    }
  }
}

// Four levels of a row of x meet those of all 16 rows of the panel at once: no sum across lanes is left to do.
template <int ROWS>
inline void tile(const int8_t* x, int64_t x_stride, const uint8_t* panel, int64_t depth, int32_t* sums) {
  __m512i total[ROWS];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; ++m) total[m] = _mm512_loadu_si512(sums + m * kPanelRows);
  for (int64_t k = 0; k < depth; k += 4) {
    const __m512i u = _mm512_load_si512(panel + k * kPanelRows);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m)
      asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total[m]) : "v"(u), "m"(*reinterpret_cast<const Four*>(x + m * x_stride + k)));
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; ++m) _mm512_storeu_si512(sums + m * kPanelRows, total[m]);
}

// The rows that whole tiles leave, at once: one by one each would wait for its own sums.
template <int ROWS>
inline void rest(int64_t rows, const int8_t* x, int64_t x_stride, const uint8_t* panel, int64_t depth, int32_t* sums) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return tile<ROWS>(x, x_stride, panel, depth, sums);
    rest<ROWS - 1>(rows, x, x_stride, panel, depth, sums);
  }
}

// One chunk of each of eight packed rows. Of every two codes of a byte the upper stays where it is, 2^n_bits times its value:
// `upper` sums these. They fit: a lane takes a 16th of the row, and the caller has bounded 128 * 2^n_bits * cols by 2^31.
template <int n_bits>
inline void stream_chunk(const __m256i packed[8], const int8_t* x, __m256i lower[8], __m256i upper[8]) {
  const __m256i low = _mm256_set1_epi8((1 << n_bits) - 1);
  const __m256i high = _mm256_set1_epi8(static_cast<char>(((1 << n_bits) - 1) << n_bits));
#pragma GCC unroll 4
  for (int j = 0; j < 8 / n_bits; j += 2) {
    const __m256i a = load(x + 32 * j), b = load(x + 32 * j + 32);
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
      const __m256i u = j ? _mm256_srli_epi16(packed[n], j * n_bits) : packed[n];
      add_products(lower[n], _mm256_and_si256(u, low), a);
      add_products(upper[n], _mm256_and_si256(u, high), b);
    }
  }
}

template <int n_bits>
void stream_rows(const int8_t* x, const uint8_t* const* rows, int64_t row_bytes, const IntLayout& layout, int32_t* sums) {
  constexpr int chunk = 32 * 8 / n_bits;
  const int64_t chunks = layout.padded / chunk, whole = std::min(chunks, row_bytes / 32);
  __m256i lower[8], upper[8], packed[8];
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) lower[n] = upper[n] = _mm256_setzero_si256();
  // Rows lie one after another: what is read two calls from now comes into the cache while this one computes, a few lines a
  // step, as asking for all of it at once would wait for the first of it.
  const uint8_t* ahead = rows[0] + 2 * 8 * row_bytes;
  for (int64_t c = 0; c < whole; ++c, ahead += 8 * 32) {
    for (int line = 0; line < 8 * 32; line += 64) __builtin_prefetch(ahead + line);
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) packed[n] = load(rows[n] + 32 * c);
    stream_chunk<n_bits>(packed, x + chunk * c, lower, upper);
  }
  for (int64_t c = whole; c < chunks; ++c) {
    for (int n = 0; n < 8; ++n) {
      alignas(32) uint8_t bytes[32];
      load_padded<32>(rows[n], row_bytes, 32 * c, bytes);
      packed[n] = load(bytes);
    }
    stream_chunk<n_bits>(packed, x + chunk * c, lower, upper);
  }
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) lower[n] = _mm256_add_epi32(lower[n], _mm256_srai_epi32(upper[n], n_bits));
  store_lanes(sums, lower[0], lower[1], lower[2], lower[3]);
  store_lanes(sums + 4, lower[4], lower[5], lower[6], lower[7]);
}

}  // namespace

void quantize_vnni(const float* x, int64_t cols, const InputGrid& grid, const IntLayout& layout, void* out, RowStats* stats) {
  WideQuantizer quantizer{grid};
  const int per = per_byte(layout.n_bits, layout.wide), chunk = 32 * per;
  alignas(32) int8_t codes[kChunk];
  for (int64_t begin = 0; begin < layout.padded; begin += chunk) {
    for (int k = 0; k < chunk; k += 16) {
      const int64_t left = std::clamp<int64_t>(cols - begin - k, 0, 16);
      const auto inside = static_cast<__mmask16>((1u << left) - 1);
      const __m512i code = quantizer(x + begin + k, inside);  // 8 bits: with VNNI no layout is wide
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtsepi32_epi8(code));
    }
    place(codes, static_cast<int8_t*>(out) + begin, per);
  }
  *stats = quantizer.stats();
}

void multiply_vnni(const void* x, int64_t x_stride, int64_t rows, const void* panel, int64_t panel_stride, int64_t depth,
                   const IntLayout&, int32_t* sums) {
  alignas(64) uint8_t interleaved[kPanelRows * kIntDepth];
  const auto* codes = static_cast<const int8_t*>(x);
  interleave(static_cast<const uint8_t*>(panel), panel_stride, depth, interleaved);
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    tile<kTileRows>(codes + m * x_stride, x_stride, interleaved, depth, sums + m * kPanelRows);
  rest<kTileRows - 1>(rows - m, codes + m * x_stride, x_stride, interleaved, depth, sums + m * kPanelRows);
}

bool stream_vnni(const void* x, const uint8_t* const* rows, int64_t row_bytes, const IntLayout& layout, int32_t* sums) {
  const auto* codes = static_cast<const int8_t*>(x);
  for (int n = 0; n < kPanelRows; n += 8) {
    if (layout.n_bits == 1) stream_rows<1>(codes, rows + n, row_bytes, layout, sums + n);
    else if (layout.n_bits == 2) stream_rows<2>(codes, rows + n, row_bytes, layout, sums + n);
    else if (layout.n_bits == 4) stream_rows<4>(codes, rows + n, row_bytes, layout, sums + n);
    else return false;
  }
  return true;
}

}  // namespace dsq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
