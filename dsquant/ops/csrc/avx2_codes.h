// How avx2.cpp makes codes of x and reads packed rows. Included by it alone, behind the pragma that allows AVX2.
#pragma once

namespace dsq {
namespace {

// Codes whose bits do not straddle bytes are decoded a vector at a time: byte i of a chunk of 32 holds elements
// P * i + j, j < P, at bits j * n_bits, and one shift and mask yields the j-th of every byte. So within a chunk of
// 32 * P elements, element P * i + j goes to place 32 * j + i, in panels and in x alike: a sum does not mind the order.
inline int per_byte(int n_bits, bool wide) {
  return !wide && (n_bits == 1 || n_bits == 2 || n_bits == 4) ? 8 / n_bits : 1;
}

int step(int n_bits, bool wide) { return 32 * per_byte(n_bits, wide); }

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// ---- quantization of x -------------------------------------------------------------------------------------------

struct Quantizer {
  __m256 offset, scale, shift, low, high, nan;
  __m256i zero, sum;
  explicit Quantizer(const InputGrid& g)
      : offset(_mm256_set1_ps(g.offset)), scale(_mm256_set1_ps(g.scale)), shift(_mm256_set1_ps(g.shift)),
        low(_mm256_set1_ps(g.qmin)), high(_mm256_set1_ps(g.qmax)), nan(_mm256_setzero_ps()),
        zero(_mm256_set1_epi32(g.zero)), sum(_mm256_setzero_si256()) {}
  inline __m256i operator()(__m256 x) {
    const __m256 v = _mm256_sub_ps(_mm256_div_ps(_mm256_sub_ps(x, offset), scale), shift);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256 clipped = _mm256_min_ps(_mm256_max_ps(v, low), high);  // NaN becomes qmin
    return _mm256_sub_epi32(_mm256_cvtps_epi32(clipped), zero);         // half to even, the default mode
  }
};

// Move the codes of one chunk, in natural order, to their places: bytes are told apart by the lowest bit of j, then by the next.
template <int per>
inline void place(const int8_t* codes, int8_t* out) {
  const __m256i low = _mm256_set1_epi16(0xff);
  __m256i v[per], apart[per];
  for (int j = 0; j < per; ++j) v[j] = load(codes + 32 * j);
  for (int found = 1; found < per; found *= 2) {  // v holds so many runs of vectors, by what is known of j
    const int half = per / (2 * found);
    for (int of = 0; of < found; ++of)
      for (int i = 0; i < half; ++i) {
        const __m256i a = v[2 * (of * half + i)], b = v[2 * (of * half + i) + 1];
        const __m256i even = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
        const __m256i odd = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        apart[of * half + i] = _mm256_permute4x64_epi64(even, 0b11011000);
        apart[(of + found) * half + i] = _mm256_permute4x64_epi64(odd, 0b11011000);
      }
    for (int j = 0; j < per; ++j) v[j] = apart[j];
  }
  for (int j = 0; j < per; ++j) store(out + 32 * j, v[j]);
}

inline void place(const int8_t* codes, int8_t* out, int per) {
  if (per == 8) place<8>(codes, out);
  else if (per == 4) place<4>(codes, out);
  else if (per == 2) place<2>(codes, out);
  else place<1>(codes, out);
}

void quantize(const float* x, int64_t cols, const InputGrid& grid, const IntLayout& layout, void* out, RowStats* stats) {
  Quantizer quantizer(grid);
  const int per = per_byte(layout.n_bits, layout.wide), chunk = 32 * per;
  __m256i sum = _mm256_setzero_si256();
  alignas(32) int8_t codes[kChunk];
  for (int64_t begin = 0; begin < layout.padded; begin += chunk) {
    for (int k = 0; k < chunk; k += 8) {
      __m256i c = _mm256_setzero_si256();
      const int64_t left = cols - begin - k;
      if (left >= 8) {
        c = quantizer(_mm256_loadu_ps(x + begin + k));
      } else if (left > 0) {  // the last elements; behind them codes are 0, whatever x = 0 would give
        const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)),
                                                  _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        c = _mm256_and_si256(quantizer(_mm256_maskload_ps(x + begin + k, inside)), inside);
        // Lanes behind the end saw x = 0, which is no NaN as long as scale and offset are none.
      }
      sum = _mm256_add_epi32(sum, c);
      const __m128i c16 = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
      if (layout.wide)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<int16_t*>(out) + begin + k), c16);
      else
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), _mm_packs_epi16(c16, c16));
    }
    if (!layout.wide) place(codes, static_cast<int8_t*>(out) + begin, per);
  }
  alignas(32) int32_t lanes[8];
  store(lanes, sum);
  int64_t total = 0;
  for (int32_t lane : lanes) total += lane;
  *stats = {total, _mm256_movemask_ps(quantizer.nan)};
}

// ---- decoding of packed rows -------------------------------------------------------------------------------------

// Read up to `size` bytes that may reach over the end of the row; what lies behind it is 0.
template <int size>
inline void load_padded(const uint8_t* row, int64_t row_bytes, int64_t begin, void* out) {
  if (begin + size <= row_bytes) {
    std::memcpy(out, row + begin, size);
    return;
  }
  std::memset(out, 0, size);
  if (begin < row_bytes) std::memcpy(out, row + begin, row_bytes - begin);
}

template <int n_bits>
inline void decode_chunks(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, uint8_t* out) {
  constexpr int per = 8 / n_bits;
  const __m256i mask = _mm256_set1_epi8((1 << n_bits) - 1);
  for (int64_t k = 0; k < count; k += 32 * per) {
    alignas(32) uint8_t bytes[32];
    const int64_t begin = (first + k) / per;
    __m256i v;
    if (begin + 32 <= row_bytes) {
      v = load(row + begin);
    } else {
      load_padded<32>(row, row_bytes, begin, bytes);
      v = load(bytes);
    }
#pragma GCC unroll 8
    for (int j = 0; j < per; ++j) store(out + k + 32 * j, _mm256_and_si256(_mm256_srli_epi16(v, j * n_bits), mask));
  }
}

// Deposit eight elements, n_bits whole bytes, into eight bytes: natural order, any n_bits. Reads eight bytes.
inline uint64_t deposit(const uint8_t* group, uint64_t mask) {
  uint64_t bits;
  std::memcpy(&bits, group, 8);
  return _pdep_u64(bits, mask);
}

inline uint64_t deposit_mask(int n_bits) { return 0x0101010101010101ull * ((1u << n_bits) - 1); }

// Call f(k, the eight elements from first + k on) for k = 0, 8, ..., count - 8. Only groups near the end of the row, whose
// eight bytes reach over it, are read with care.
template <class F>
inline void for_groups(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, int n_bits, const F& f) {
  const uint64_t mask = deposit_mask(n_bits);
  const int64_t begin = first / 8 * n_bits, inside = (row_bytes - begin - 8) / n_bits + 1;
  const int64_t safe = row_bytes - begin < 8 ? 0 : std::min(count, 8 * inside);
  const uint8_t* group = row + begin;
  int64_t k = 0;
  for (; k < safe; k += 8, group += n_bits) f(k, deposit(group, mask));
  for (; k < count; k += 8) {
    uint8_t bytes[8];
    load_padded<8>(row, row_bytes, begin + k / 8 * n_bits, bytes);
    f(k, deposit(bytes, mask));
  }
}

inline void widen(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, int16_t* out) {
  for (int64_t k = 0; k < count; k += 16) {
    uint8_t bytes[16];
    load_padded<16>(row, row_bytes, first + k, bytes);
    store(out + k, _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
  }
}

void decode(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, const IntLayout& layout, void* out) {
  auto* bytes = static_cast<uint8_t*>(out);
  if (!layout.wide && layout.n_bits == 1) return decode_chunks<1>(row, row_bytes, first, count, bytes);
  if (!layout.wide && layout.n_bits == 2) return decode_chunks<2>(row, row_bytes, first, count, bytes);
  if (!layout.wide && layout.n_bits == 4) return decode_chunks<4>(row, row_bytes, first, count, bytes);
  if (layout.wide && layout.n_bits == 8) return widen(row, row_bytes, first, count, static_cast<int16_t*>(out));
  if (layout.wide)
    return for_groups(row, row_bytes, first, count, layout.n_bits, [bytes](int64_t k, uint64_t u) {
      const __m128i wide = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(u)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * k), wide);
    });
  for_groups(row, row_bytes, first, count, layout.n_bits,
             [bytes](int64_t k, uint64_t u) { std::memcpy(bytes + k, &u, 8); });
}

// Natural order: eight neighbours lie in n_bits <= 4 bytes of one 32-bit word, which every lane shifts by its own part.
// Up to 3 bits a table of eight levels does the rest, the bits above an element being cut off by the look-up itself.
template <int n_bits>
inline void decode_levels(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, float zero, float* out) {
  const __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(n_bits));
  const __m256i mask = _mm256_set1_epi32((1 << n_bits) - 1);
  float levels[8];
  for (int i = 0; i < 8; ++i) levels[i] = static_cast<float>(i & ((1 << n_bits) - 1)) - zero;
  const __m256 table = _mm256_loadu_ps(levels);
  const auto levels_of = [&](int32_t word) {
    const __m256i v = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
    if (n_bits <= 3) return _mm256_permutevar8x32_ps(table, v);
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(v, mask)), _mm256_set1_ps(zero));
  };
  const int64_t begin = first / 8 * n_bits;
  const int64_t safe = row_bytes - begin < 4 ? 0 : std::min(count, 8 * ((row_bytes - begin - 4) / n_bits + 1));
  int64_t k = 0;
  int32_t word;
  for (const uint8_t* group = row + begin; k < safe; k += 8, group += n_bits) {
    std::memcpy(&word, group, 4);
    _mm256_storeu_ps(out + k, levels_of(word));
  }
  for (; k < count; k += 8) {
    load_padded<4>(row, row_bytes, begin + k / 8 * n_bits, &word);
    _mm256_storeu_ps(out + k, levels_of(word));
  }
}

void decode_float(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, int n_bits, float zero,
                  float* out) {
  switch (n_bits) {
    case 1: return decode_levels<1>(row, row_bytes, first, count, zero, out);
    case 2: return decode_levels<2>(row, row_bytes, first, count, zero, out);
    case 3: return decode_levels<3>(row, row_bytes, first, count, zero, out);
    case 4: return decode_levels<4>(row, row_bytes, first, count, zero, out);
  }
  for_groups(row, row_bytes, first, count, n_bits, [zero, out](int64_t k, uint64_t u) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(u)));
    _mm256_storeu_ps(out + k, _mm256_sub_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(zero)));
  });
}

}  // namespace
}  // namespace dsq
