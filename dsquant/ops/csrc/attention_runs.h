// Attention of one head with quantized q, k, probabilities and v, forward and backward. Included once for each instruction set,
// by files that give Vec (kWidth floats), load, store, spread, plus, larger and madd, and the size of a tile of a product, kRows x kVecs
// vectors, which registers hold.

namespace dsq {
namespace {

// One tile of C (+)= A B: ROWS rows, VECS vectors of columns. A's element (i, k) is a[i * a_row + k * a_step].
template <int ROWS, int VECS>
inline void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t depth, float* c,
                 int64_t c_row, bool add) {
  Vec sum[ROWS][VECS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) sum[i][j] = add ? load(c + i * c_row + j * kWidth) : spread(0.0f);
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
    Vec row[VECS];
    for (int j = 0; j < VECS; ++j) row[j] = load(b + j * kWidth);
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = spread(a[i * a_row]);
      for (int j = 0; j < VECS; ++j) sum[i][j] = madd(x, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) store(c + i * c_row + j * kWidth, sum[i][j]);
}

template <int VECS>
inline void columns(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t depth,
                    float* c, int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    tile<kRows, VECS>(a + i * a_row, a_row, a_step, b, b_row, depth, c + i * c_row, c_row, add);
  for (; i + 2 <= rows; i += 2)
    tile<2, VECS>(a + i * a_row, a_row, a_step, b, b_row, depth, c + i * c_row, c_row, add);
  if (i < rows) tile<1, VECS>(a + i * a_row, a_row, a_step, b, b_row, depth, c + i * c_row, c_row, add);
}

// C (rows x width) (+)= A B, B (depth x width) in rows; width is a multiple of kPad.
void product(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
             int64_t b_row, float* c, int64_t c_row, bool add = false) {
  int64_t j = 0;
  for (; j + kVecs * kWidth <= width; j += kVecs * kWidth)
    columns<kVecs>(rows, a, a_row, a_step, b + j, b_row, depth, c + j, c_row, add);
  for (; j < width; j += kWidth) columns<1>(rows, a, a_row, a_step, b + j, b_row, depth, c + j, c_row, add);
}

inline float at_least(float x, float low) { return x < low ? low : x; }
inline float held(float x, float low, float high) {
  x = x < low ? low : x;  // what is not a number stays so
  return x > high ? high : x;
}

// e^x for x <= 0, to 1 unit in the last place or so; 0 where that is no normal number. Cody and Waite, Cephes' polynomial.
inline float exp_of(float x) {
  constexpr float kLeast = -87.33654f;
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, which its last bits hold
  const float at = at_least(x, kLeast), shifted = madd(at, 1.44269504f, kWhole), n = shifted - kWhole;
  const float r = madd(n, 2.12194440e-4f, madd(n, -0.693359375f, at));
  float y = madd(1.9875691500e-4f, r, 1.3981999507e-3f);
  y = madd(y, r, 8.3334519073e-3f);
  y = madd(y, r, 4.1665795894e-2f);
  y = madd(y, r, 1.6666665459e-1f);
  y = madd(y, r, 5.0000001201e-1f);
  y = madd(y, r * r, r) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^n; unsigned, as x may be no number
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kLeast ? 0.0f : y * power;
}

inline float plus(float a, float b) { return a + b; }
inline float larger(float a, float b) { return a < b ? b : a; }

// join(... join(start, x[0]) ..., x[width - 1]), in an order that the instruction set sets.
template <class F>
float joined(const float* x, int64_t width, float start, const F& join) {
  constexpr int kChains = 4;  // so that one does not wait for another
  Vec part[kChains];
  for (Vec& p : part) p = spread(start);
  int64_t j = 0;
  for (; j + kChains * kWidth <= width; j += kChains * kWidth)
    for (int c = 0; c < kChains; ++c) part[c] = join(part[c], load(x + j + c * kWidth));
  for (; j < width; j += kWidth) part[0] = join(part[0], load(x + j));
  for (int c = 1; c < kChains; ++c) part[0] = join(part[0], part[c]);
  float lane[kWidth];
  store(lane, part[0]);
  for (int half = kWidth / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] = join(lane[l], lane[l + half]);
  return lane[0];
}

inline float sum_of(const float* x, int64_t width) {
  return joined(x, width, 0.0f, [](auto a, auto b) { return plus(a, b); });
}

inline void copy_row(const Strided& m, int64_t i, int64_t n, float* to) {
  const float* from = m.at + i * m.row;
  if (m.column == 1)
    std::memcpy(to, from, n * sizeof(float));
  else
    for (int64_t j = 0; j < n; ++j) to[j] = from[j * m.column];
}

inline void fill(float* x, int64_t from, int64_t to, float value) {
  for (int64_t j = from; j < to; ++j) x[j] = value;
}

// Probabilities of one query in place of its scores (keys of them, of a row `width` long, whose rest becomes 0).
inline void softmax(float* s, int64_t keys, int64_t width) {
  fill(s, keys, width, -INFINITY);
  const float most = joined(s, width, -INFINITY, [](auto a, auto b) { return larger(a, b); });
  for (int64_t j = 0; j < width; ++j) s[j] = exp_of(s[j] - most);
  fill(s, keys, width, 0.0f);
  const float part = 1.0f / sum_of(s, width);
  for (int64_t j = 0; j < width; ++j) s[j] *= part;
}

inline float nearest(float v, const InputLevels& l) {
  return std::nearbyint(held(v - l.shift, l.qmin, l.qmax)) + l.shift;
}

// What stays the same while a head is worked on, and where its parts lie in the scratch.
struct Work {
  const Head& h;
  const QuantizeKernels& quantize;
  const HeadScratch& size;
  float *q, *k, *v, *k_columns, *v_columns, *scores, *d_probs, *out, *d_q, *d_k, *d_v, *rows;

  Work(const Head& head, const QuantizeKernels& kernels, const HeadScratch& s, float* scratch)
      : h(head), quantize(kernels), size(s) {
    const auto take = [&scratch](int64_t count) {
      float* const from = scratch;
      scratch += count;
      return from;
    };
    k = take((h.keys + kPad) * s.features), d_k = take((h.keys + kPad) * s.features);
    v = take((h.keys + kPad) * s.features_v), d_v = take((h.keys + kPad) * s.features_v);
    k_columns = take(s.keys * s.features), v_columns = take(s.keys * s.features_v);
    q = take(s.block * s.features), d_q = take(s.block * s.features), out = take(2 * s.block * s.features_v);
    scores = take(s.block * s.keys), d_probs = take(s.block * s.keys);
    rows = take(4 * s.widest());
  }

  // Rows [first, first + count) of q, k or v as the products take them, without the softmax scale, `width` apart.
  void images(const Strided& x, const HeadSite& site, int64_t first, int64_t count, int64_t n, int64_t width,
              float* to) const {
    for (int64_t i = 0; i < count; ++i) {
      copy_row(x, first + i, n, to + i * width);
      fill(to + i * width, n, width, 0.0f);
    }
    if (!site.quantized) return;
    if (n == width)
      quantize.forward(count * n, to, site.scale, site.offset, site.levels, to);
    else
      for (int64_t i = 0; i < count; ++i)
        quantize.forward(n, to + i * width, site.scale, site.offset, site.levels, to + i * width);
  }

  // x (count x n, rows `width` apart) with rows and columns exchanged; columns beyond `count` become 0.
  void exchanged(const float* x, int64_t count, int64_t n, int64_t width, float* to) const {
    for (int64_t i = 0; i < size.keys; i += kPad)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t l = 0; l < kPad; ++l) to[j * size.keys + i + l] = i + l < count ? x[(i + l) * width + j] : 0.0f;
  }

  // Probabilities of `count` queries from the first.
  void probabilities(int64_t first, int64_t count) const {
    images(h.q, h.sites[0], first, count, h.features, size.features, q);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < size.features; ++d) q[i * size.features + d] *= h.softmax_scale[first + i];
    product(count, size.keys, h.features, q, size.features, 1, k_columns, size.keys, scores, size.keys);
    for (int64_t i = 0; i < count; ++i) {
      float* row = scores + i * size.keys;
      for (const Strided* added : {&h.bias, &h.mask}) {
        if (!added->at) continue;
        copy_row(*added, first + i, h.keys, rows);
        for (int64_t j = 0; j < h.keys; ++j) row[j] += rows[j];
      }
      softmax(row, h.keys, size.keys);
    }
  }
};

void attend(const Head& h, const QuantizeKernels& quantize, const HeadScratch& size, float* scratch, float* out,
            int64_t out_row) {
  const Work work(h, quantize, size, scratch);
  work.images(h.k, h.sites[1], 0, h.keys, h.features, size.features, work.k);
  work.exchanged(work.k, h.keys, h.features, size.features, work.k_columns);
  work.images(h.v, h.sites[2], 0, h.keys, h.features_v, size.features_v, work.v);
  for (int64_t first = 0; first < h.queries; first += size.block) {
    const int64_t count = std::min(size.block, h.queries - first);
    work.probabilities(first, count);
    if (h.probs_quantized)
      for (int64_t i = 0; i < count; ++i) {
        float* p = work.scores + i * size.keys;
        const float scale = h.probs_scale[first + i], offset = h.probs_offset[first + i];
        const InputLevels l = h.probs;
        for (int64_t j = 0; j < size.keys; ++j) p[j] = nearest((p[j] - offset) / scale, l) * scale + offset;
      }
    product(count, size.features_v, h.keys, work.scores, size.keys, 1, work.v, size.features_v, work.out, size.features_v);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(out + (first + i) * out_row, work.out + i * size.features_v, h.features_v * sizeof(float));
  }
}

// What n probabilities p with image gradients g give: their own gradients in place of g, their images, terms of the gradients of
// scale and offset, and p times its gradient. `restrict`, for without it the compiler makes no vectors.
template <bool elastic>
void prob_gradients(int64_t n, const float* __restrict p, float* __restrict g, float scale, float offset, const InputLevels& l,
                    float* __restrict image, float* __restrict d_scale, float* __restrict blocked, float* __restrict products) {
  const float qmin = l.qmin, qmax = l.qmax, shift = l.shift, low = l.low, high = l.high;
  for (int64_t j = 0; j < n; ++j) {
    const float v = (p[j] - offset) / scale, level = std::nearbyint(held(v - shift, qmin, qmax)) + shift, given = g[j];
    const bool inside = (v >= low) & (v <= high);
    const float passed = inside ? given : 0.0f, outside = given - passed;
    d_scale[j] = elastic ? level * given : madd(level - held(v, low, high), given, outside * held(v, low, high));
    blocked[j] = outside;
    products[j] = p[j] * passed;
    g[j] = passed;
    image[j] = level * scale + offset;
  }
}

// Backward of one query's probabilities p and the gradient g of their image: p becomes the image, g the gradient of the scores.
// `rows` is room for four rows.
inline void through_probabilities(const Head& h, int64_t query, int64_t width, float* p, float* g, float* rows,
                                  const HeadGradients& to) {
  float *image = rows, *d_scale = rows + width, *blocked = d_scale + width, *products = blocked + width;
  fill(g, h.keys, width, 0.0f);
  if (h.probs_quantized) {
    const auto form = h.probs.elastic ? prob_gradients<true> : prob_gradients<false>;
    form(width, p, g, h.probs_scale[query], h.probs_offset[query], h.probs, image, d_scale, blocked, products);
    to.d_probs_scale[query] = sum_of(d_scale, width);
    to.d_probs_offset[query] = sum_of(blocked, width);
  } else {
    for (int64_t j = 0; j < width; ++j) products[j] = p[j] * g[j];
  }
  const float all = sum_of(products, width);
  for (int64_t j = 0; j < width; ++j) g[j] = p[j] * (g[j] - all);
  if (h.probs_quantized) std::memcpy(p, image, width * sizeof(float));
}

// Write dL/dx of rows [first, first + count) of q, k or v, whose images have the gradients `grad`, `width` apart, which are
// overwritten, and add to the sums of the site. x is room for the rows.
inline void through_site(const Work& work, const Strided& from, const HeadSite& site, int64_t first, int64_t count, int64_t n,
                         int64_t width, float* grad, float* x, float* d_x, double* sums) {
  if (site.quantized && n == width) {
    for (int64_t i = 0; i < count; ++i) copy_row(from, first + i, n, x + i * n);
    work.quantize.backward(count * n, x, grad, site.scale, site.offset, site.levels, d_x + first * n, nullptr, sums);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float *row = grad + i * width, *d_row = d_x + (first + i) * n;
    if (!site.quantized) {
      std::memcpy(d_row, row, n * sizeof(float));
      continue;
    }
    copy_row(from, first + i, n, x);
    work.quantize.backward(n, x, row, site.scale, site.offset, site.levels, d_row, nullptr, sums);
  }
}

void attend_backward(const Head& h, const QuantizeKernels& quantize, const HeadScratch& size, float* scratch,
                     const HeadGradients& to) {
  const Work work(h, quantize, size, scratch);
  work.images(h.k, h.sites[1], 0, h.keys, h.features, size.features, work.k);
  work.exchanged(work.k, h.keys, h.features, size.features, work.k_columns);
  work.images(h.v, h.sites[2], 0, h.keys, h.features_v, size.features_v, work.v);
  work.exchanged(work.v, h.keys, h.features_v, size.features_v, work.v_columns);
  float *grad = work.out, *p = work.scores, *d_s = work.d_probs;
  for (int64_t first = 0; first < h.queries; first += size.block) {
    const int64_t count = std::min(size.block, h.queries - first);
    const bool add = first > 0;
    for (int64_t i = 0; i < count; ++i) {
      copy_row(to.grad, first + i, h.features_v, grad + i * size.features_v);
      fill(grad + i * size.features_v, h.features_v, size.features_v, 0.0f);
    }
    work.probabilities(first, count);
    product(count, size.keys, h.features_v, grad, size.features_v, 1, work.v_columns, size.keys, d_s, size.keys);
    for (int64_t i = 0; i < count; ++i)
      through_probabilities(h, first + i, size.keys, p + i * size.keys, d_s + i * size.keys, work.rows, to);
    product(h.keys, size.features_v, count, p, 1, size.keys, grad, size.features_v, work.d_v, size.features_v, add);
    product(h.keys, size.features, count, d_s, 1, size.keys, work.q, size.features, work.d_k, size.features, add);
    product(count, size.features, h.keys, d_s, size.keys, 1, work.k, size.features, work.d_q, size.features);
    if (to.d_softmax_scale) {
      work.images(h.q, h.sites[0], first, count, h.features, size.features, work.q);
      for (int64_t i = 0; i < count; ++i) {
        const float *d_row = work.d_q + i * size.features, *row = work.q + i * size.features;
        for (int64_t d = 0; d < size.features; ++d) work.rows[d] = d_row[d] * row[d];
        to.d_softmax_scale[first + i] = sum_of(work.rows, size.features);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float* d_row = work.d_q + i * size.features;
      for (int64_t d = 0; d < h.features; ++d) d_row[d] *= h.softmax_scale[first + i];
      if (!to.d_bias) continue;
      double* sum = to.d_bias + (first + i) * h.keys;
      for (int64_t j = 0; j < h.keys; ++j) sum[j] += d_s[i * size.keys + j];
    }
    through_site(work, h.q, h.sites[0], first, count, h.features, size.features, work.d_q, work.q, to.d_q, to.sums);
  }
  through_site(work, h.k, h.sites[1], 0, h.keys, h.features, size.features, work.d_k, work.k, to.d_k, to.sums + 2);
  through_site(work, h.v, h.sites[2], 0, h.keys, h.features_v, size.features_v, work.d_v, work.v, to.d_v, to.sums + 4);
}

}  // namespace
}  // namespace dsq
