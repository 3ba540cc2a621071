// What the driver of quant_attention (quant_attention.cpp) asks of each instruction set: one head of one image at a time.
#pragma once
#include <algorithm>
#include <cstdint>

#include "fake_quantize.h"

namespace dsq {

constexpr int64_t kPad = 16;  // rows of scratch are whole vectors of every instruction set
inline int64_t padded_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix that lies in a tensor: element (i, j) is at[i * row + j * column].
struct Strided {
  const float* at = nullptr;
  int64_t row = 0, column = 1;
};

// The quantizer of q, k or v, one scale for the whole head.
struct HeadSite {
  bool quantized;
  float scale, offset;
  InputLevels levels;
};

struct Head {
  int64_t queries, keys, features, features_v;
  Strided q, k, v, bias, mask;  // the last two, added to the scores, may be absent
  HeadSite sites[3];            // of q, k, v
  bool probs_quantized;
  InputLevels probs;
  const float *softmax_scale, *probs_scale, *probs_offset;  // of each query
};

struct HeadGradients {
  Strided grad;                // of the output
  float *d_q, *d_k, *d_v;      // in rows of features
  double *d_softmax_scale, *d_probs_scale, *d_probs_offset;  // of each query; the first may be null
  double* d_bias;              // queries x keys, added to; null where there is no bias
  double* sums;                // of q, k, v: d scale and d offset
};

// Where a head's matrices lie while it is worked on. Scores are held for `block` queries at a time, which caches hold.
struct HeadScratch {
  static constexpr int64_t kScores = 1 << 16, kAtLeast = 48;
  int64_t keys, features, features_v, block;

  HeadScratch(int64_t queries, int64_t n_keys, int64_t d, int64_t d_v)
      : keys(padded_to(n_keys, kPad)), features(padded_to(d, kPad)), features_v(padded_to(d_v, kPad)),
        block(std::min(queries, std::max(kAtLeast, kScores / keys))) {}

  int64_t widest() const { return std::max({keys, features, features_v}); }
  // k and v, as they are and transposed, and their gradients; q and its gradient; the output or its gradient; scores and
  // gradients of probabilities; a few rows.
  int64_t size(int64_t n_keys) const {
    return (n_keys + kPad) * 2 * (features + features_v) + keys * (features + features_v) +
           block * (2 * features + 2 * features_v + 2 * keys) + 4 * widest();
  }
};

struct AttentionKernels {
  void (*forward)(const Head&, const QuantizeKernels&, const HeadScratch&, float* scratch, float* out, int64_t out_row);
  void (*backward)(const Head&, const QuantizeKernels&, const HeadScratch&, float* scratch, const HeadGradients&);
};

extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2, kAttentionAvx512;
constexpr const AttentionKernels* kAttentionAvx2OrNone = &kAttentionAvx2;
#else
constexpr const AttentionKernels* kAttentionAvx2OrNone = nullptr;
#endif

}  // namespace dsq
