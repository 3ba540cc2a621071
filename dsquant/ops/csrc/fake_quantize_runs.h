// Passes of fake_quantize over a run of values. Included as shard_step_runs.h is, and after it.

namespace dsq {
namespace {

inline float level_of(float v, const InputLevels& l) { return std::nearbyint(clip(v - l.shift, l.qmin, l.qmax)) + l.shift; }

void quantize_run(int64_t n, const float* x, float scale, float offset, const InputLevels& levels, float* x_hat) {
  const InputLevels l = levels;
  for (int64_t i = 0; i < n; ++i) x_hat[i] = level_of((x[i] - offset) / scale, l) * scale + offset;
}

void quantize_each(int64_t n, const float* x, const float* scale, const float* offset, const InputLevels& levels,
                   float* x_hat) {
  const InputLevels l = levels;
  for (int64_t i = 0; i < n; ++i) {
    const float zero = offset ? offset[i] : 0.0f;
    x_hat[i] = level_of((x[i] - zero) / scale[i], l) * scale[i] + zero;
  }
}

struct Gradients {
  float d_x, d_scale, blocked, x_hat;
};

// Where clip(v) lies outside it has the level of a plain grid, and lies at low or high otherwise.
inline Gradients gradients(float x, float grad, float scale, float offset, const InputLevels& l) {
  const float v = (x - offset) / scale, level = level_of(v, l), clipped = clip(v, l.low, l.high);
  const bool inside = (v >= l.low) & (v <= l.high);
  const float d_x = inside ? grad : 0.0f, blocked = grad - d_x;
  const float learned = (level - clipped) * grad + blocked * clipped;
  return {d_x, l.elastic ? level * grad : learned, blocked, level * scale + offset};
}

// What a block of values gives before it is added up; d_x is kept apart since it may overwrite grad.
struct BlockGradients {
  alignas(32) float d_x[kBlock], d_scale[kBlock], d_offset[kBlock], x_hat[kBlock];

  // scale_of(i) and offset_of(i): those of the i-th value.
  template <class Scale, class Offset>
  void form(int count, const float* x, const float* grad, const InputLevels& l, Scale scale_of, Offset offset_of) {
    for (int i = 0; i < count; ++i) {
      const Gradients found = gradients(x[i], grad[i], scale_of(i), offset_of(i), l);
      d_x[i] = found.d_x;
      d_scale[i] = found.d_scale;
      d_offset[i] = found.blocked;
      x_hat[i] = found.x_hat;
    }
  }

  void put(int count, float* to, float* image) const {
    std::copy_n(d_x, count, to);
    if (image) std::copy_n(x_hat, count, image);
  }
};

inline int block_at(int64_t begin, int64_t n) { return static_cast<int>(n - begin < kBlock ? n - begin : kBlock); }

void backward_run(int64_t n, const float* x, const float* grad, float scale, float offset, const InputLevels& levels,
                  float* d_x, float* x_hat, double* sums) {
  const InputLevels l = levels;
  BlockGradients block;
  Sum d_scale, d_offset;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = block_at(begin, n);
    block.form(count, x + begin, grad + begin, l, [=](int) { return scale; }, [=](int) { return offset; });
    block.put(count, d_x + begin, x_hat ? x_hat + begin : nullptr);
    clear_tail(block.d_scale, count);
    clear_tail(block.d_offset, count);
    d_scale.add(block.d_scale, padded(count));
    d_offset.add(block.d_offset, padded(count));
  }
  sums[0] += d_scale.total();
  sums[1] += d_offset.total();
}

void backward_each(int64_t n, const float* x, const float* grad, const float* scale, const float* offset,
                   const InputLevels& levels, float* d_x, float* x_hat, double* sums) {
  const InputLevels l = levels;
  BlockGradients block;
  alignas(32) float zero[kBlock] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = block_at(begin, n);
    if (offset) std::copy_n(offset + begin, count, zero);
    const float* scales = scale + begin;
    block.form(count, x + begin, grad + begin, l, [=](int i) { return scales[i]; }, [&](int i) { return zero[i]; });
    block.put(count, d_x + begin, x_hat ? x_hat + begin : nullptr);
    double *d_scale = sums + begin, *d_offset = sums + n + begin;
    for (int i = 0; i < count; ++i) d_scale[i] += static_cast<double>(block.d_scale[i]);
    for (int i = 0; i < count; ++i) d_offset[i] += static_cast<double>(block.d_offset[i]);
  }
}

}  // namespace
}  // namespace dsq
