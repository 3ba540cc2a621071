// Attention in plain C++.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace dsq {
namespace {
constexpr int kWidth = 4, kRows = 4, kVecs = 2;
struct Vec {
  float lane[kWidth];
};
inline Vec load(const float* x) { return {x[0], x[1], x[2], x[3]}; }
inline void store(float* x, const Vec& v) { std::copy_n(v.lane, kWidth, x); }
inline Vec spread(float x) { return {x, x, x, x}; }
inline float madd(float a, float b, float c) { return a * b + c; }
template <class F>
inline Vec each(const F& f) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v.lane[i] = f(i);
  return v;
}
inline Vec plus(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec larger(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i]; });
}
inline Vec madd(const Vec& a, const Vec& b, const Vec& c) {
  return each([&](int i) { return madd(a.lane[i], b.lane[i], c.lane[i]); });
}
}  // namespace
}  // namespace dsq

#include "attention_runs.h"

namespace dsq {
const AttentionKernels kAttentionPortable{attend, attend_backward};
}  // namespace dsq
