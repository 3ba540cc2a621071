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

void backward_run(int64_t n, const float* x, const float* grad, float scale, float offset, const InputLevels& levels,
                  float* d_x, float* x_hat, double* sums) {
  const InputLevels l = levels;
  alignas(32) float of_x[kBlock], of_scale[kBlock], of_offset[kBlock], image[kBlock];
  Sum d_scale, d_offset;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
    const float *xs = x + begin, *gs = grad + begin;
    for (int i = 0; i < count; ++i) {
      const Gradients found = gradients(xs[i], gs[i], scale, offset, l);
      of_x[i] = found.d_x;
      of_scale[i] = found.d_scale;
      of_offset[i] = found.blocked;
      image[i] = found.x_hat;
    }
    std::copy_n(of_x, count, d_x + begin);
    if (x_hat) std::copy_n(image, count, x_hat + begin);
    clear_tail(of_scale, count);
    clear_tail(of_offset, count);
    d_scale.add(of_scale, padded(count));
    d_offset.add(of_offset, padded(count));
  }
  sums[0] += d_scale.total();
  sums[1] += d_offset.total();
}

void backward_each(int64_t n, const float* x, const float* grad, const float* scale, const float* offset,
                   const InputLevels& levels, float* d_x, float* x_hat, double* sums) {
  const InputLevels l = levels;
  alignas(32) float of_x[kBlock], of_scale[kBlock], of_offset[kBlock], image[kBlock], zero[kBlock] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
    const float *xs = x + begin, *gs = grad + begin, *scales = scale + begin;
    if (offset) std::copy_n(offset + begin, count, zero);
    for (int i = 0; i < count; ++i) {
      const Gradients found = gradients(xs[i], gs[i], scales[i], zero[i], l);
      of_x[i] = found.d_x;
      of_scale[i] = found.d_scale;
      of_offset[i] = found.blocked;
      image[i] = found.x_hat;
    }
    std::copy_n(of_x, count, d_x + begin);
    if (x_hat) std::copy_n(image, count, x_hat + begin);
    double *d_scale = sums + begin, *d_offset = sums + n + begin;
    for (int i = 0; i < count; ++i) d_scale[i] += static_cast<double>(of_scale[i]);
    for (int i = 0; i < count; ++i) d_offset[i] += static_cast<double>(of_offset[i]);
  }
}

}  // namespace
}  // namespace dsq
