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

constexpr int kTileRows = 6;

using Four = int32_t __attribute__((may_alias, aligned(1)));  // levels of x, taken as one

inline void store_lanes(int32_t* sums, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  const __m128i added = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  auto* out = reinterpret_cast<__m128i*>(sums);
  _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), added));
}

// Turn 16 rows of 16 words into the 16 columns: col[4 l + i] holds word 4 l + i of each row.
inline void transpose(const __m512i row[16], __m512i col[16]) {
  __m512i q[16];
#pragma GCC unroll 4
  for (int n = 0; n < 16; n += 4) {  // q[n + i]: words i, 4 + i, 8 + i, 12 + i of rows n to n + 3
    const __m512i a = _mm512_unpacklo_epi32(row[n], row[n + 1]), b = _mm512_unpackhi_epi32(row[n], row[n + 1]);
    const __m512i c = _mm512_unpacklo_epi32(row[n + 2], row[n + 3]), d = _mm512_unpackhi_epi32(row[n + 2], row[n + 3]);
    q[n] = _mm512_unpacklo_epi64(a, c), q[n + 1] = _mm512_unpackhi_epi64(a, c);
    q[n + 2] = _mm512_unpacklo_epi64(b, d), q[n + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(q[i], q[4 + i], 0x88), b = _mm512_shuffle_i32x4(q[8 + i], q[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(q[i], q[4 + i], 0xdd), d = _mm512_shuffle_i32x4(q[8 + i], q[12 + i], 0xdd);
    col[i] = _mm512_shuffle_i32x4(a, b, 0x88), col[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    col[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88), col[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// Decode PANELS times 16 rows of codes that do not straddle bytes: words are transposed while packed, then shifted and masked.
template <int n_bits, int PANELS>
void decode_words(const uint8_t* const* rows, int64_t row_bytes, int64_t first, int64_t count, uint8_t* out) {
  constexpr int per = 8 / n_bits, chunk = 32 * per;  // elements of 32 bytes; see avx2_codes.h for their order
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << n_bits) - 1));
  for (int64_t k = 0; k < count; k += 2 * chunk) {
    const int64_t begin = (first + k) / per, left = std::clamp<int64_t>(row_bytes - begin, 0, 64);
    const __mmask64 there = left == 64 ? ~0ull : (1ull << left) - 1;
    for (int p = 0; p < PANELS; ++p) {
      __m512i row[kPanelRows], word[kPanelRows];
      for (int n = 0; n < kPanelRows; ++n) row[n] = _mm512_maskz_loadu_epi8(there, rows[kPanelRows * p + n] + begin);
      transpose(row, word);
      for (int half = 0; half < 2 && k + half * chunk < count; ++half)
#pragma GCC unroll 8
        for (int j = 0; j < per; ++j)
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) {
            const __m512i u = j ? _mm512_srli_epi16(word[8 * half + i], j * n_bits) : word[8 * half + i];
            uint8_t* to = out + (k + half * chunk + 32 * j + 4 * i) * kPanelRows * PANELS;
            _mm512_store_si512(to + 64 * p, _mm512_and_si512(u, mask));
          }
    }
  }
}

// The same for codes of other bits, which are first decoded row by row.
template <int PANELS>
void decode_rows(const uint8_t* const* rows, int64_t row_bytes, int64_t first, int64_t count, const IntLayout& layout, uint8_t* out) {
  constexpr int64_t held = kPanelRows * PANELS, stride = kPanelBytes / held;
  alignas(64) uint8_t levels[kPanelBytes];
  const uint8_t* decoded[held];
  for (int64_t n = 0; n < held; ++n) {
    decode(rows[n], row_bytes, first, count, layout, levels + n * stride);
    decoded[n] = levels + n * stride;
  }
  decode_words<8, PANELS>(decoded, count, 0, count, out);
}

template <int PANELS>
void decode_panels(const uint8_t* const* rows, int64_t row_bytes, int64_t first, int64_t count, const IntLayout& layout,
                   uint8_t* out) {
  if (layout.n_bits == 1) decode_words<1, PANELS>(rows, row_bytes, first, count, out);
  else if (layout.n_bits == 2) decode_words<2, PANELS>(rows, row_bytes, first, count, out);
  else if (layout.n_bits == 4) decode_words<4, PANELS>(rows, row_bytes, first, count, out);
  else if (layout.n_bits == 8) decode_words<8, PANELS>(rows, row_bytes, first, count, out);
  else decode_rows<PANELS>(rows, row_bytes, first, count, layout, out);
}

// Four levels of a row of x meet those of all rows of a panel at once: no sum across lanes is left to do. In it four levels of
// row 0 are followed by four of row 1, ... of the last row, then the next four of each. Two panels share what is read of x.
template <int ROWS, int PANELS>
inline void tile(const int8_t* x, int64_t x_stride, const uint8_t* panel, int64_t depth, int32_t* sums) {
  constexpr int held = kPanelRows * PANELS;
  __m512i total[ROWS][PANELS], u[PANELS];
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) total[m][p] = _mm512_loadu_si512(sums + m * held + kPanelRows * p);
  for (int64_t k = 0; k < depth; k += 4) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) u[p] = _mm512_load_si512(panel + k * held + 64 * p);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const __m512i a = _mm512_set1_epi32(*reinterpret_cast<const Four*>(x + m * x_stride + k));
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) asm("vpdpbusd %2, %1, %0" : "+v"(total[m][p]) : "v"(u[p]), "v"(a));
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) _mm512_storeu_si512(sums + m * held + kPanelRows * p, total[m][p]);
}

// Rows in tiles of ROWS, and what these leave at once in one of fewer: one by one each would wait for its own sums.
template <int ROWS, int PANELS>
inline void tiles(int64_t rows, const int8_t* x, int64_t x_stride, const uint8_t* panel, int64_t depth, int32_t* sums) {
  if constexpr (ROWS > 0) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * x_stride, sums += ROWS * kPanelRows * PANELS)
      tile<ROWS, PANELS>(x, x_stride, panel, depth, sums);
    tiles<ROWS - 1, PANELS>(rows, x, x_stride, panel, depth, sums);
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

void decode_vnni(const uint8_t* const* rows, int64_t row_bytes, int64_t first, int64_t count, const IntLayout& layout, void* panel) {
  auto* out = static_cast<uint8_t*>(panel);
  if (layout.panel_rows == kPanelRows) decode_panels<1>(rows, row_bytes, first, count, layout, out);
  else decode_panels<2>(rows, row_bytes, first, count, layout, out);
}

void multiply_vnni(const void* x, int64_t x_stride, int64_t rows, const void* panel, int64_t, int64_t depth,
                   const IntLayout& layout, int32_t* sums) {
  const auto* codes = static_cast<const int8_t*>(x);
  const auto* levels = static_cast<const uint8_t*>(panel);
  if (layout.panel_rows == kPanelRows) tiles<kFewRows, 1>(rows, codes, x_stride, levels, depth, sums);  // what cannot stream
  else tiles<kTileRows, 2>(rows, codes, x_stride, levels, depth, sums);
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
