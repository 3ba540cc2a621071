// Passes over a run of weights, plain loops that the compiler turns into vectors. Included once for each instruction set, by
// files that choose it; arithmetic is written in the order of the definitions, and a product and a sum stay two roundings
// unless std::fma says otherwise, as in PyTorch's addcmul and lerp.

namespace dsq {
namespace {

constexpr int kLanes = 8;      // partial sums of a run: their order depends on no instruction set
constexpr int kBlock = 512;    // elements at a time, on the stack
constexpr int kBanks = 4;      // copies of a histogram, so that neighbours do not wait for each other
constexpr int kMaxBins = 256;
constexpr int kFewBins = 4;    // of 1 and 2 bits: comparisons beat a look-up

struct Sum {
  double lane[kLanes] = {};
  void add(const float* x, int n) {  // x may be read up to the next multiple of kLanes, where it is 0
    for (int i = 0; i < n; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += static_cast<double>(x[i + j]);
  }
  double total() const {  // in the order of _mm512_reduce_add_pd
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

inline float clip(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline void clear_tail(float* x, int n) {
  for (int i = n; i < padded(n); ++i) x[i] = 0.0f;
}

// Times the scale.
template <bool plain, bool frozen_any>
void scale_gradient(int n, const float* w, const float* grad, const int8_t* codes, const bool* frozen, const RunGrid& g,
                    float* d) {
  for (int i = 0; i < n; ++i) {
    float away = (static_cast<float>(codes[i]) + g.shift) * g.scale;
    if (!plain) {
      const float x = w[i] - g.centre, v = x / g.scale;
      bool inside = (v >= g.low) & (v <= g.high);  // & and not &&: a branch would keep this loop from being vectors
      if (frozen_any) inside &= !frozen[i];
      away -= inside ? x : 0.0f;
    }
    d[i] = away * grad[i];
  }
}

// What a run holds in each bin: a comparison a bin where they are few, else a histogram.
struct BinSums {
  int64_t n_bins, counts[kBanks][kMaxBins];
  double sums[kBanks][kMaxBins];
  Sum few[kFewBins];

  explicit BinSums(int64_t n) : n_bins(n) {
    for (int bank = 0; bank < kBanks; ++bank) {
      std::fill_n(sums[bank], n_bins, 0.0);
      std::fill_n(counts[bank], n_bins, int64_t{0});
    }
  }

  void add(int n, const float* parts, const int8_t* codes, int qmin) {
    if (n_bins > kFewBins) {
      for (int i = 0; i < n; ++i) {
        sums[i % kBanks][codes[i] - qmin] += static_cast<double>(parts[i]);
        ++counts[i % kBanks][codes[i] - qmin];
      }
      return;
    }
    alignas(32) float of_bin[kBlock];
    for (int64_t bin = 0; bin < n_bins; ++bin) {
      const int8_t wanted = static_cast<int8_t>(qmin + bin);
      int count = 0;
      for (int i = 0; i < n; ++i) {
        of_bin[i] = codes[i] == wanted ? parts[i] : 0.0f;
        count += codes[i] == wanted;
      }
      clear_tail(of_bin, n);
      few[bin].add(of_bin, padded(n));
      counts[0][bin] += count;
    }
  }

  void put(double* bins) const {
    for (int64_t bin = 0; bin < n_bins; ++bin) {
      for (int bank = 0; bank < kBanks; ++bank) {
        bins[bin] += static_cast<double>(counts[bank][bin]);
        bins[n_bins + bin] += sums[bank][bin];
      }
      if (n_bins <= kFewBins) bins[n_bins + bin] += few[bin].total();
    }
  }
};

void gather(int64_t n, const float* w, const float* grad, const int8_t* codes, const bool* frozen, const RunGrid& g,
            int64_t n_bins, double* out, double* bins) {
  const float low = (std::isinf(g.low) ? -kNear : g.low) * kParts, high = (std::isinf(g.high) ? kNear : g.high) * kParts;
  const float inverse = kParts / g.scale;
  Sum d_scale, norm;
  BinSums in_bins(bins ? n_bins : 0);
  alignas(32) float d[kBlock], size[kBlock], parts[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
    const float* x = w + begin;
    const int8_t* c = codes + begin;
    if (g.plain)
      scale_gradient<true, false>(count, x, grad + begin, c, nullptr, g, d);
    else if (frozen)
      scale_gradient<false, true>(count, x, grad + begin, c, frozen + begin, g, d);
    else
      scale_gradient<false, false>(count, x, grad + begin, c, nullptr, g, d);
    for (int i = 0; i < count; ++i) size[i] = std::fabs(x[i] - g.centre);
    clear_tail(d, count);
    clear_tail(size, count);
    d_scale.add(d, padded(count));
    norm.add(size, padded(count));
    if (!bins) continue;
    for (int i = 0; i < count; ++i) parts[i] = std::nearbyint(clip((x[i] - g.centre) * inverse, low, high));
    in_bins.add(count, parts, c, g.qmin);
  }
  out[0] += d_scale.total() / g.scale;
  out[1] += norm.total();
  if (bins) in_bins.put(bins);
}

inline void adamw_step(float& w, float grad, float& m, float& v, const AdamW& a) {
  w *= a.decay;
  m = std::fma(a.one_minus_beta1, grad - m, m);
  v = std::fma(a.one_minus_beta2 * grad, grad, v * a.beta2);
  w += -a.step * m / (std::sqrt(v) / a.correction + a.eps);
}

// A table of kFewBins entries at most, or of any number.
template <bool few>
struct Table {
  float entry[kFewBins];
  const float* all;

  Table(const float* values, int64_t n_bins, int qmin) : all(values ? values - qmin : nullptr) {
    for (int k = 0; k < kFewBins; ++k) entry[k] = few && k < n_bins ? values[k] : 0.0f;
  }
  float operator()(int8_t code, int qmin) const {
    if (!few) return all[code];
    const float low = code == qmin ? entry[0] : entry[1], high = code == qmin + 2 ? entry[2] : entry[3];
    return code < qmin + 2 ? low : high;
  }
};

template <bool pulled, bool spread, bool few>
void masked(int n, const float* w, const float* grad, const int8_t* codes, const RunGrid& g, const Pull& p,
            float* __restrict task, float* __restrict pull) {
  const float scale = g.scale, centre = g.centre, low = g.low, high = g.high, shift = g.shift, twice = p.twice;
  const int qmin = g.qmin;
  const Table<few> strength(p.strength, p.n_bins, qmin), goal(p.goal, p.n_bins, qmin);
  for (int i = 0; i < n; ++i) {
    const float x = w[i] - centre, v = x / scale, d = grad[i];
    const bool inside = (v >= low) & (v <= high);  // & and not &&: a branch would keep this loop from being vectors
    task[i] = inside ? d : 0.0f;
    if constexpr (pulled) {
      float found;
      if constexpr (spread)
        found = std::fma(x, strength(codes[i], qmin), -goal(codes[i], qmin));
      else
        found = (x - (static_cast<float>(codes[i]) + shift) * scale) * twice;
      pull[i] = inside ? found : 0.0f;
    }
  }
}

void update(int64_t n, float* w, const float* grad, float* m, float* v, const int8_t* codes, const bool* frozen,
            const RunGrid& g, const Pull& p, const AdamW& a, double* norms) {
  alignas(32) float task[kBlock], pull[kBlock];
  Sum of_task, of_pull;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
    const auto mask = !p.any               ? masked<false, false, false>
                      : !p.strength        ? masked<true, false, false>
                      : p.n_bins > kFewBins ? masked<true, true, false>
                                            : masked<true, true, true>;
    mask(count, w + begin, grad + begin, codes + begin, g, p, task, pull);
    if (frozen)
      for (int i = 0; i < count; ++i) {
        task[i] = frozen[begin + i] ? 0.0f : task[i];
        if (p.any) pull[i] = frozen[begin + i] ? 0.0f : pull[i];
      }
    if (norms && p.any) {
      for (int i = 0; i < count; ++i) {
        of_task.lane[i % kLanes] += static_cast<double>(task[i]) * task[i];
        of_pull.lane[i % kLanes] += static_cast<double>(pull[i]) * pull[i];
      }
    }
    if (p.any)
      for (int i = 0; i < count; ++i) task[i] += pull[i];
    for (int i = 0; i < count; ++i) adamw_step(w[begin + i], task[i], m[begin + i], v[begin + i], a);
  }
  if (norms) {
    norms[0] += of_task.total();
    norms[1] += of_pull.total();
  }
}

void adamw(int64_t n, float* w, const float* grad, float* m, float* v, const AdamW& a) {
  for (int64_t i = 0; i < n; ++i) adamw_step(w[i], grad[i], m[i], v[i], a);
}

void moments(int64_t n, const float* w, double* out) {
  double size[kLanes] = {}, sum[kLanes] = {}, square[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double x = w[i + j];
      size[j] += std::fabs(x);
      sum[j] += x;
      square[j] += x * x;
    }
  for (int64_t i = whole; i < n; ++i) {
    const double x = w[i];
    size[i - whole] += std::fabs(x);
    sum[i - whole] += x;
    square[i - whole] += x * x;
  }
  for (int j = 0; j < kLanes; ++j) {
    out[0] += size[j];
    out[1] += sum[j];
    out[2] += square[j];
  }
}

inline float code_of(float w, const RunGrid& g) {
  const float v = (w - g.centre) / g.scale - g.shift;
  return std::nearbyint(clip(v, static_cast<float>(g.qmin), static_cast<float>(g.qmax)));
}

void image(int64_t n, float* w, float* latent, const RunGrid& g, const Tracker& t) {
  alignas(32) float fresh[kBlock];
  const float gain = t.gain;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int count = static_cast<int>(n - begin < kBlock ? n - begin : kBlock);
    float *x = w + begin, *kept = latent + begin, *frequency = t.frequency + begin;
    int8_t *codes = t.codes + begin, *direction = t.direction + begin;
    bool* frozen = t.frozen ? t.frozen + begin : nullptr;
    for (int i = 0; i < count; ++i) fresh[i] = code_of(x[i], g);
    if (frozen)
      for (int i = 0; i < count; ++i) {
        fresh[i] = frozen[i] ? static_cast<float>(codes[i]) : fresh[i];
        x[i] = frozen[i] ? (fresh[i] + g.shift) * g.scale : x[i];
      }
    for (int i = 0; i < count; ++i) {
      const int code = static_cast<int>(fresh[i]), delta = (code > codes[i]) - (code < codes[i]);
      const float oscillated = delta * direction[i] == -1 ? 1.0f : 0.0f;
      frequency[i] += oscillated * gain;
      direction[i] = static_cast<int8_t>(delta ? delta : direction[i]);
      codes[i] = static_cast<int8_t>(code);
    }
    if (frozen) {
      float* mean = t.code_mean + begin;
      for (int i = 0; i < count; ++i) mean[i] = std::fma(fresh[i], t.momentum, mean[i] * t.keep);
      if (t.threshold >= 0)
        for (int i = 0; i < count; ++i) {
          const bool newly = frequency[i] > t.threshold && !frozen[i];
          const float settled = clip(std::nearbyint(mean[i]), static_cast<float>(g.qmin), static_cast<float>(g.qmax));
          fresh[i] = newly ? settled : fresh[i];
          codes[i] = static_cast<int8_t>(fresh[i]);
          frozen[i] = frozen[i] || newly;
          x[i] = newly ? (fresh[i] + g.shift) * g.scale : x[i];
        }
    }
    for (int i = 0; i < count; ++i) {
      kept[i] = x[i];
      x[i] = (fresh[i] + g.shift) * g.scale;
    }
  }
}

// QuantState.update by Adam, of scales: float64, and what is kept rounded once.
void scales(int64_t n, float* __restrict scale, float* __restrict m, float* __restrict v, const float* __restrict grad,
            const float* __restrict lr, const ScaleAdam& adam) {
  const ScaleAdam a = adam;  // no float that is written can be part of it
  for (int64_t i = 0; i < n; ++i) {
    const double g = grad[i];
    m[i] = static_cast<float>(m[i] * a.beta1 + (1 - a.beta1) * g);
    v[i] = static_cast<float>(v[i] * a.beta2 + (1 - a.beta2) * g * g);
    const double away = lr[i] * a.rate * (m[i] / a.correction1) / (std::sqrt(v[i] / a.correction2) + a.eps);
    const float next = static_cast<float>(scale[i] - away);
    scale[i] = next < a.floor ? a.floor : next;
  }
}

}  // namespace
}  // namespace dsq
