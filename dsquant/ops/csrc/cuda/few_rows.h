// Products of up to 16 rows of x, bfloat16 or float16, with packed codes of 1, 2 and 4 bits, on tensor cores.
//
// A block forms y of 16 rows of the weight: they are the tall operand of m16n8k16, and 8 rows of x its narrow one. Warps
// share out the words of these rows, and add up their sums at the end. The order of k is free where both operands keep it:
// codes stay in pairs that lie 16 bits apart in their word, and x is paired likewise. An exponent above a pair of codes makes
// it two numbers 2^kMantissa + code 2^at, and one fused multiply-add makes these levels, exactly. As in bit_serial.h a block
// is a list of phases; after some no thread waits, and after some its warp multiplies.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bit_serial.h"

namespace dsq {

// y = x w_hat^T + bias; x (rows, cols) and y (rows, outs) in 16 bits, w (outs, cols), all rows contiguous. Rows of words are
// whole, of 16 bytes or a multiple, and lie at multiples of 16, as x does.
struct FewRows {
  const uint16_t* x;
  const uint32_t* words;      // packed codes of w (outs, row_words)
  const float *scale, *bias;  // (outs,); bias may be null
  uint16_t* y;
  int32_t rows, outs, cols, row_words;
};

DSQ_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

DSQ_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DSQ_INLINE uint32_t twice(uint32_t bits) { return bits << 16 | bits; }

struct Brain {
  static constexpr int kMantissa = 7, kBias = 127;
  static DSQ_INLINE float value(uint32_t bits) { return float_of(bits << 16); }
  static DSQ_INLINE uint16_t rounded(float value) {
    const uint32_t bits = bits_of(value);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

struct Half {
  static constexpr int kMantissa = 10, kBias = 15;
  static DSQ_INLINE float value(uint32_t bits) {
    const float size = (bits & 0x7c00) == 0x7c00 ? float_of(0x7f800000 | (bits & 0x3ff) << 13)
                                                 : float_of((bits & 0x7fff) << 13) * 0x1p112f;
    return bits & 0x8000 ? -size : size;
  }
  static DSQ_INLINE uint16_t rounded(float value) {
    const float size = fabsf(value);
    const uint32_t bits = bits_of(size), sign = bits_of(value) >> 16 & 0x8000;
    if (size != size) return 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<uint32_t>(rintf(size * 0x1p24f));
    return sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
};

// What a warp multiplies: a thread's part of two operands, pairs of 16 bits, and of the float32 sums of their products.
struct Fragments {
  uint32_t a[4], b[2];
};

// The parts of thread `lane` of a (16, 16), b (16, 8) and sums (16, 8), as PTX lays out mma.m16n8k16.
struct Place {
  int row, column;
};
DSQ_INLINE Place place_a(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 * 2 + i / 2 * 8}; }  // and the next column
DSQ_INLINE Place place_b(int lane, int i) { return {lane % 4 * 2 + i * 8, lane / 4}; }                  // and the next row
DSQ_INLINE Place place_sum(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// Returns the lower halves of two pairs as a pair, or the upper ones: 0x5410 or 0x7632.
template <uint32_t kBytes>
DSQ_INLINE uint32_t joined(uint32_t first, uint32_t second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(first, second, kBytes);
#else
  return kBytes == 0x5410 ? (first & 0xffff) | second << 16 : first >> 16 | (second & 0xffff0000);
#endif
}

// Returns a | b, which the compiler does not join with what follows: with two constants it takes two instructions.
DSQ_INLINE uint32_t united(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  asm("or.b32 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
#else
  return a | b;
#endif
}

// Returns both numbers of a pair times one constant plus another, where that is exact.
template <class Format>
DSQ_INLINE uint32_t scaled_pair(uint32_t pair, uint32_t factor, uint32_t summand) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  if (Format::kMantissa == 7)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(pair), "r"(factor), "r"(summand));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(pair), "r"(factor), "r"(summand));
  return out;
#else
  uint32_t out = 0;
  for (int at = 0; at < 32; at += 16) {
    const auto number = [at](uint32_t bits) { return Format::value(bits >> at & 0xffff); };
    out |= static_cast<uint32_t>(Format::rounded(number(pair) * number(factor) + number(summand))) << at;
  }
  return out;
#endif
}

// Codes of W bits, Q 2 where levels lie half way between integers, kGroups times 8 rows of x.
template <class Format, int W, int Q, int kGroups>
struct FewRowsProduct {
  using Numbers = Format;
  static constexpr int kWarps = W == 1 ? 8 : 16, kThreads = 32 * kWarps, kOuts = 16, kRows = 8 * kGroups;
  static constexpr int kBlocks = 2 / kGroups;                       // that a multiprocessor is to hold at once
  static constexpr int kPairs = 16 / W;                             // of a word
  static constexpr int kWide = 4, kSpan = 4 * kWide;                // words that a thread, and four, load of a row at once
  static constexpr int kAhead = W == 4 ? 2 : 1;                     // such spans that a warp loads before it multiplies
  static constexpr int kBelow = Q - 1;                              // bits that a level has below its code
  static constexpr int kShared = (Format::kMantissa - kBelow) / W;  // pairs that share a shift
  struct Shared {
    float sums[kWarps][kOuts][kRows + 1];
  };
  struct Own {
    uint32_t words[kAhead][2][kWide], x[kAhead][kGroups][kWide][kPairs];
    Fragments now[kGroups];
    float sums[kGroups][4];
  };

  static int64_t blocks(const FewRows& p) { return (p.outs + kOuts - 1) / kOuts; }

  // Which of a row's words a thread takes, from word `first` of all on.
  static DSQ_INLINE int begin(int first, int thread, int ahead) {
    return first + (thread / 32 * kAhead + ahead) * kSpan + thread % 4 * kWide;
  }

  // Loads 16 bytes that lie at a multiple of 16, or none: zeros.
  static DSQ_INLINE void load(bool there, const void* from, uint32_t* four) {
#if defined(__CUDA_ARCH__)
    const uint4 found = there ? *static_cast<const uint4*>(from) : uint4{};
    four[0] = found.x, four[1] = found.y, four[2] = found.z, four[3] = found.w;
#else
    std::memset(four, 0, 16);
    if (there) std::memcpy(four, from, 16);
#endif
  }

  // Loads x of `kWide` words' codes, in pairs as words have them.
  static DSQ_INLINE void load_x(const FewRows& p, int m, int word, uint32_t (&pairs)[kWide][kPairs]) {
    const uint16_t* row = p.x + static_cast<int64_t>(m < p.rows ? m : p.rows - 1) * p.cols;  // sums of more are not read
    uint32_t x[kWide * kPairs];
    for (int i = 0; i < kWide * kPairs; i += 4) load(word < p.row_words, row + word * 2 * kPairs + 2 * i, x + i);
    for (int i = 0; i < kWide; ++i)
      for (int pair = 0; pair < kPairs; pair += 2) {
        const uint32_t low = x[i * kPairs + pair / 2], high = x[i * kPairs + (pair + kPairs) / 2];
        pairs[i][pair] = joined<0x5410>(low, high);
        pairs[i][pair + 1] = joined<0x7632>(low, high);
      }
  }

  // Returns the levels of a pair of codes: those in place, 2^M + code 2^at, times 2^-at, less 2^(M - at) + least.
  static DSQ_INLINE uint32_t levels(uint32_t word, int pair) {
    constexpr uint32_t mantissa = Format::kMantissa, whole = Format::kBias + mantissa;
    const int shift = pair / kShared * kShared * W - kBelow, at = pair % kShared * W + kBelow;
    const uint32_t above = twice(whole << mantissa), mask = twice(((1u << W) - 1) << at) | above;
    const uint32_t moved = united(shift < 0 ? word << -shift : word >> shift, above);  // one for all that share a shift
    const uint32_t factor = (Format::kBias - at) << mantissa, least = ((1u << W) - kBelow) << at >> 1;
    const uint32_t summand = 0x8000 | (whole - at) << mantissa | least;
    return scaled_pair<Format>(moved & mask, twice(factor), twice(summand));
  }

  static DSQ_INLINE void finish(const FewRows& p, int n, int thread, const Shared& shared) {
    for (int i = thread; i < kOuts * kRows; i += kThreads) {
      const int out = i % kOuts, m = i / kOuts;
      if (m >= p.rows || n + out >= p.outs) continue;
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp][out][m];
      const float y = sum * p.scale[n + out] + (p.bias ? p.bias[n + out] : 0.0f);
      p.y[static_cast<int64_t>(m) * p.outs + n + out] = Format::rounded(y);
    }
  }

  // Call visit(there, words, ahead, half) with where words lie that a thread loads, from word `first` of rows on.
  template <class Visit>
  static DSQ_INLINE void each_load(const FewRows& p, int64_t block, int first, int thread, const Visit& visit) {
    for (int ahead = 0; ahead < kAhead; ++ahead)
      for (int half = 0; half < 2; ++half) {
        const int out = static_cast<int>(block) * kOuts + thread % 32 / 4 + half * 8, at = begin(first, thread, ahead);
        const uint32_t* row = p.words + static_cast<int64_t>(out) * p.row_words;
        visit(out < p.outs && at < p.row_words, row + at, ahead, half);
      }
  }

  template <class Phase>
  static DSQ_INLINE void run(const FewRows& p, int64_t block, Shared& shared, Phase& phase) {
    phase.alone([&](int, Own& own) {
      for (int group = 0; group < kGroups; ++group)
        for (float& sum : own.sums[group]) sum = 0;
    });
    for (int first = 0; first < p.row_words; first += kWarps * kAhead * kSpan) {
      phase([&](int thread, Own& own) {  // the barrier after it has the compiler begin all loads before it waits for one
        each_load(p, block, first, thread, [&](bool there, const uint32_t* words, int ahead, int half) {
          load(there, words, own.words[ahead][half]);
        });
        for (int ahead = 0; ahead < kAhead; ++ahead)
          for (int group = 0; group < kGroups; ++group)
            load_x(p, group * 8 + thread % 32 / 4, begin(first, thread, ahead), own.x[ahead][group]);
      });
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead)
#pragma unroll
        for (int i = 0; i < kWide; ++i)
#pragma unroll
          for (int pair = 0; pair < kPairs; pair += 2)
            phase.products([&](int, Own& own) {
              for (int part = 0; part < 4; ++part) {
                const uint32_t both = levels(own.words[ahead][part % 2][i], pair + part / 2);
                for (int group = 0; group < kGroups; ++group) own.now[group].a[part] = both;
              }
              for (int group = 0; group < kGroups; ++group)
                for (int part = 0; part < 2; ++part) own.now[group].b[part] = own.x[ahead][group][i][pair + part];
            });
    }
    phase([&](int thread, Own& own) {
      for (int group = 0; group < kGroups; ++group)
        for (int i = 0; i < 4; ++i) {
          const Place at = place_sum(thread % 32, i);
          shared.sums[thread / 32][at.row][group * 8 + at.column] = own.sums[group][i];
        }
    });
    phase([&](int thread, Own&) { finish(p, static_cast<int>(block) * kOuts, thread, shared); });
  }
};

// Call launch(kernel) with the kernel of a problem; codes have 1, 2 or 4 bits.
template <class Format, int W, class Launch>
void with_kernel(const FewRows& p, bool halves, const Launch& launch) {
  if (p.rows <= 8)
    halves ? launch(FewRowsProduct<Format, W, 2, 1>{}) : launch(FewRowsProduct<Format, W, 1, 1>{});
  else
    halves ? launch(FewRowsProduct<Format, W, 2, 2>{}) : launch(FewRowsProduct<Format, W, 1, 2>{});
}

template <class Format, class Launch>
void with_kernel(const FewRows& p, int64_t n_bits, bool halves, const Launch& launch) {
  if (n_bits == 1)
    with_kernel<Format, 1>(p, halves, launch);
  else
    n_bits == 2 ? with_kernel<Format, 2>(p, halves, launch) : with_kernel<Format, 4>(p, halves, launch);
}

template <class Launch>
void with_kernel(const FewRows& p, int64_t n_bits, bool halves, bool brain, const Launch& launch) {
  brain ? with_kernel<Brain>(p, n_bits, halves, launch) : with_kernel<Half>(p, n_bits, halves, launch);
}

}  // namespace dsq
