// Products of codes of 1 and 2 bits by their bit planes: an AND and a popcount take 32 products, in exact integers.
//
// Codes are unsigned here, a = code_x - qmin and u = code_w + 2^(W-1). Plane i holds bit i of every code, so
//     sum_k a_k u_k = sum_ij 2^(i+j) popcount(plane_i(a) & plane_j(u)).
// x is quantized into planes by `Quantize`, a block a row, then `Product` forms tiles of y. Weights stay as `pack` writes
// them. A block is a list of phases, what each thread does up to a barrier: on a GPU threads go through them together
// (bit_serial.cu), and plain C++ can do them one after the other, as the tests do on machines without one.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DSQ_INLINE __device__ __forceinline__
#else
#define DSQ_INLINE inline
#endif

namespace dsq {

constexpr int kChunk = 32;    // codes whose bits are a word of a plane
constexpr int kFewRows = 16;  // of x, for which tiles are thin

// y = x_hat w_hat^T + bias; x (rows, cols), w (outs, cols), y (rows, outs), all rows contiguous.
struct Problem {
  const float *x, *in_scale, *in_offset, *scale, *bias;  // in_scale one value, scale (outs,); in_offset and bias may be null
  const uint32_t* words;     // packed codes of w (outs, row_words)
  const int32_t* code_sums;  // of the rows of w
  uint32_t* planes;          // of x (rows, A, chunks)
  int32_t *x_sums, *x_nan;   // of the rows of x: sum of a, and whether there is a NaN, which has no code
  float* y;
  int64_t rows, outs, cols, chunks, row_words;
  float qmin, qmax, in_shift, shift;
};

DSQ_INLINE int32_t popcount(uint32_t bits) {
#if defined(__CUDACC__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Where the planes of a chunk have the bit of its element e. Two words hold a chunk of 2-bit codes: both planes take the
// elements of one in their even bits and those of the other in the odd ones, which saves weights a shuffle of bits.
template <int W>
DSQ_INLINE int place(int e) {
  return W == 1 ? e : e < kChunk / 2 ? 2 * e : 2 * e + 1 - kChunk;
}

template <int W>
DSQ_INLINE void weight_planes(const uint32_t* row, int64_t row_words, int64_t chunk, uint32_t (&plane)[W]) {
  if (W == 1) {
    plane[0] = row[chunk];
  } else {
    constexpr uint32_t even = 0x55555555;
    const uint32_t first = row[2 * chunk], second = 2 * chunk + 1 < row_words ? row[2 * chunk + 1] : 0;
    plane[0] = (first & even) | (second & even) << 1;
    plane[W - 1] = (first >> 1 & even) | (second & ~even);
  }
}

// Turns a row of x into planes of A bits, in the order of weights of W bits.
template <int A, int W>
struct Quantize {
  static constexpr int kThreads = 32;
  struct Shared {
    int32_t sums[kThreads], nans[kThreads];
  };
  struct Own {};  // what a thread keeps from phase to phase

  // The arithmetic of `quantize` in fake_quantize.py; a NaN takes qmin.
  static DSQ_INLINE uint32_t code(const Problem& p, float x, float scale, float offset, int32_t& nan) {
    const float v = (x - offset) / scale - p.in_shift;
    nan |= v != v;
    return static_cast<uint32_t>(rintf(fminf(fmaxf(v, p.qmin), p.qmax)) - p.qmin);
  }

  static DSQ_INLINE void write_planes(const Problem& p, int64_t row, int thread, Shared& shared) {
    const float scale = *p.in_scale, offset = p.in_offset ? *p.in_offset : 0.0f;
    int32_t sum = 0, nan = 0;
    for (int64_t chunk = thread; chunk < p.chunks; chunk += kThreads) {
      uint32_t plane[A] = {};
      for (int e = 0; e < kChunk; ++e) {
        const int64_t k = chunk * kChunk + e;
        if (k >= p.cols) break;
        const uint32_t a = code(p, p.x[row * p.cols + k], scale, offset, nan);
        sum += a;
        for (int i = 0; i < A; ++i) plane[i] |= (a >> i & 1) << place<W>(e);
      }
      for (int i = 0; i < A; ++i) p.planes[(row * A + i) * p.chunks + chunk] = plane[i];
    }
    shared.sums[thread] = sum;
    shared.nans[thread] = nan;
  }

  static DSQ_INLINE void write_totals(const Problem& p, int64_t row, const Shared& shared) {
    int32_t sum = 0, nan = 0;
    for (int thread = 0; thread < kThreads; ++thread) {
      sum += shared.sums[thread];
      nan |= shared.nans[thread];
    }
    p.x_sums[row] = sum;
    p.x_nan[row] = nan;
  }

  static int64_t blocks(const Problem& p) { return p.rows; }

  template <class Phase>
  static DSQ_INLINE void run(const Problem& p, int64_t block, Shared& shared, Phase& phase) {
    phase([&](int thread, Own&) { write_planes(p, block, thread, shared); });
    phase([&](int thread, Own&) {
      if (thread == 0) write_totals(p, block, shared);
    });
  }
};

// Forms a tile of y, kM * kLanesM rows by kN * kLanesN columns, of which a thread holds kM by kN.
template <int A, int W, int kM, int kN, int kLanesN>
struct Product {
  static constexpr int kThreads = 256, kLanesM = kThreads / kLanesN;
  static constexpr int kRows = kM * kLanesM, kOuts = kN * kLanesN;
  static constexpr int kDepth = 32;  // chunks that shared memory holds at a time
  struct Shared {  // a word more a row: threads that go down rows meet different banks
    uint32_t x[A][kRows][kDepth + 1], w[W][kOuts][kDepth + 1];
  };
  struct Own {
    int32_t sums[kM][kN];
  };
  struct Tile {
    int64_t m, n;
  };

  static int64_t blocks(const Problem& p) { return (p.rows + kRows - 1) / kRows * ((p.outs + kOuts - 1) / kOuts); }

  static DSQ_INLINE void load(const Problem& p, Tile tile, int64_t first, int thread, Shared& shared) {
    for (int i = thread; i < kOuts * kDepth; i += kThreads) {
      const int n = i / kDepth, k = i % kDepth;
      uint32_t plane[W] = {};
      if (tile.n + n < p.outs && first + k < p.chunks)
        weight_planes(p.words + (tile.n + n) * p.row_words, p.row_words, first + k, plane);
      for (int j = 0; j < W; ++j) shared.w[j][n][k] = plane[j];
    }
    for (int i = thread; i < A * kRows * kDepth; i += kThreads) {
      const int bit = i / (kRows * kDepth), m = i / kDepth % kRows, k = i % kDepth;
      const bool there = tile.m + m < p.rows && first + k < p.chunks;
      shared.x[bit][m][k] = there ? p.planes[((tile.m + m) * A + bit) * p.chunks + first + k] : 0;
    }
  }

  static DSQ_INLINE void multiply(int thread, const Shared& shared, Own& own) {
    const int lane_m = thread / kLanesN, lane_n = thread % kLanesN;
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < W; ++j)
        for (int n = 0; n < kN; ++n) {
          const uint32_t u = shared.w[j][lane_n + n * kLanesN][k];
          for (int i = 0; i < A; ++i)
            for (int m = 0; m < kM; ++m)
              own.sums[m][n] += popcount(shared.x[i][lane_m + m * kLanesM][k] & u) << (i + j);
        }
  }

  // The arithmetic of `integer_definition`. With r and q that make levels whole, X = r (a + qmin + shift_x) and
  // W = q (u - 2^(W-1) + shift_w):
  //     sum X W = r q sum a u + x_level q sum u + w_level sum X,  x_level = r (qmin + shift_x), w_level = q (shift_w - 2^(W-1)),
  // modulo 2^32: the caller has made sure that the left side fits 31 bits and a sign.
  static DSQ_INLINE float output(const Problem& p, int64_t m, int64_t n, int32_t sum) {
    constexpr int32_t half = 1 << (W - 1);
    const int32_t r = p.in_shift != 0 ? 2 : 1, q = p.shift != 0 ? 2 : 1;
    const auto x_level = static_cast<int32_t>(r * (p.qmin + p.in_shift));
    const auto w_level = static_cast<int32_t>(q * (p.shift - half));
    const uint32_t cols = p.cols, u_sum = p.code_sums[n] + half * cols, whole_x_sum = r * p.x_sums[m] + x_level * cols;
    const uint32_t total = static_cast<uint32_t>(sum) * (r * q) + x_level * q * u_sum + w_level * whole_x_sum;
    const float factor = *p.in_scale * p.scale[n] * (1.0f / (r * q));
    double constant = 0;
    if (p.in_offset)
      constant = static_cast<double>(*p.in_offset) * p.scale[n] * (p.code_sums[n] + static_cast<double>(p.shift) * p.cols);
    if (p.bias) constant += p.bias[n];
    return p.x_nan[m] ? NAN : static_cast<int32_t>(total) * factor + static_cast<float>(constant);
  }

  static DSQ_INLINE void finish(const Problem& p, Tile tile, int thread, const Own& own) {
    for (int i = 0; i < kM; ++i)
      for (int j = 0; j < kN; ++j) {
        const int64_t m = tile.m + thread / kLanesN + i * kLanesM, n = tile.n + thread % kLanesN + j * kLanesN;
        if (m < p.rows && n < p.outs) p.y[m * p.outs + n] = output(p, m, n, own.sums[i][j]);
      }
  }

  template <class Phase>
  static DSQ_INLINE void run(const Problem& p, int64_t block, Shared& shared, Phase& phase) {
    const int64_t down = (p.rows + kRows - 1) / kRows;  // blocks that follow each other share a part of the weight
    const Tile tile{block % down * kRows, block / down * kOuts};
    phase([&](int, Own& own) { own = {}; });
    for (int64_t first = 0; first < p.chunks; first += kDepth) {
      phase([&](int thread, Own&) { load(p, tile, first, thread, shared); });
      phase([&](int thread, Own& own) { multiply(thread, shared, own); });
    }
    phase([&](int thread, Own& own) { finish(p, tile, thread, own); });
  }
};

// Call launch(kernel) for the kernels of a problem with A and W bits, in order.
template <int A, int W, class Launch>
void each_kernel(const Problem& p, const Launch& launch) {
  launch(Quantize<A, W>{});
  if (p.rows <= kFewRows)
    launch(Product<A, W, 1, 1, 64>{});  // tiles of 4 rows by 64 columns
  else
    launch(Product<A, W, 2, 4, 16>{});  // of 32 by 64
}

template <class Launch>
void each_kernel(const Problem& p, int64_t a_bits, int64_t w_bits, const Launch& launch) {
  if (a_bits == 1)
    w_bits == 1 ? each_kernel<1, 1>(p, launch) : each_kernel<1, 2>(p, launch);
  else
    w_bits == 1 ? each_kernel<2, 1>(p, launch) : each_kernel<2, 2>(p, launch);
}

}  // namespace dsq
