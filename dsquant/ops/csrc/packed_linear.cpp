// The operators dsquant::packed_linear and dsquant::packed_linear_int on CPU: blocking, threads, epilogue, registration.
// Written against torch's stable ABI, so that a build takes seconds and outlives a version of torch. Threads are torch's
// own (torch_parallel_for): torch.set_num_threads governs them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "native.h"
#include "packed_linear.h"

namespace dsq {

int cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 0;
  const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512bw");
  return vnni && __builtin_cpu_supports("avx512vpopcntdq") ? 3 : vnni ? 2 : 1;
#else
  return 0;
#endif
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockBytes = 640 * 1024;  // of x, which stay in an L2 of 1 MiB while all panels pass
constexpr int64_t kMaxRows = 240;            // of a block, a multiple of the tiles' 12 and 3
constexpr int64_t kTaskWork = 400 * 1000;    // products that are worth a thread

const Kernels& kernels_for(int64_t isa) {
#if defined(__x86_64__)
  static const Kernels vnni = [] {
    Kernels found = kAvx2;
    found.flushes = false, found.quantize = quantize_vnni, found.stream = stream_vnni;
    found.decode_panel = decode_vnni, found.multiply = multiply_vnni;
    return found;
  }();
  static const Kernels popcount = [] {
    Kernels found = vnni;
    found.quantize_bits = quantize_bits, found.multiply_bits = multiply_bits;
    return found;
  }();
  if (isa >= 2 && isa <= cpu_level()) return isa == 2 ? vnni : popcount;
#endif
  return kernels_of(isa, kPortable, kAvx2OrNone);
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The matrix W (rows, cols) of packed words and what comes with it; every pointer has been checked.
struct Weight {
  const uint8_t* words;
  const float *scale, *bias;
  int64_t rows, cols, row_bytes;
  int n_bits;
  float shift;

  Weight(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& biases, int64_t bits,
         double level_shift)
      : rows(packed.size(0)), cols(x.size(-1)), row_bytes(4 * packed.size(1)), n_bits(static_cast<int>(bits)),
        shift(static_cast<float>(level_shift)) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() >= 1, "x must be float32 (..., in)");
    STD_TORCH_CHECK(bits >= 1 && bits <= 8, "n_bits must be 1 to 8");
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int && packed.is_contiguous(), "words must be packed int32");
    STD_TORCH_CHECK(packed.size(1) == (cols * bits + 31) / 32, "words do not hold rows of ", cols, " codes");
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.numel() == rows,
                    "scale must be float32 (out,)");
    words = static_cast<const uint8_t*>(packed.const_data_ptr());
    scale = static_cast<const float*>(scales.const_data_ptr());
    bias = nullptr;
    if (biases) {
      STD_TORCH_CHECK(biases->scalar_type() == ScalarType::Float && biases->is_contiguous() && biases->numel() == rows,
                      "bias must be float32 (out,)");
      bias = static_cast<const float*>(biases->const_data_ptr());
    }
  }

  // Codes of an image of `features` rows, for x's features.
  Weight(const Tensor& x, const uint8_t* codes, const float* scales, const std::optional<Tensor>& biases, int64_t features,
         int bits, float level_shift)
      : words(codes), scale(scales), bias(nullptr), rows(features), cols(x.size(-1)), row_bytes(words_in(cols, bits) * 4),
        n_bits(bits), shift(level_shift) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() >= 1, "x must be float32 (..., in)");
    if (biases) bias = values_of<const float>(*biases, ScalarType::Float, rows, "bias");
  }

  static int64_t words_in(int64_t cols, int64_t bits) { return (cols * bits + 31) / 32; }

  const uint8_t* row(int64_t n) const { return words + n * row_bytes; }

  // Ask for elements [k, k + depth) of a row that will be decoded soon: with few rows of x the weights are all the
  // traffic, and slices of rows are too short for the processor to guess what comes next.
  void prefetch(int64_t n, int64_t k, int64_t depth) const {
    if (n >= rows) return;
    const uint8_t* begin = row(n) + k * n_bits / 8;
    for (int64_t offset = 0; offset < depth * n_bits / 8; offset += 64) __builtin_prefetch(begin + offset);
  }
};

// Both go past the dispatcher, whose look-ups take longer than a row of x does in a small layer.
Tensor as_rows(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor output_like(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), strides(shape.size(), 1);
  shape.back() = features;
  for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

float scalar_of(const Tensor& value, const char* name) {
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.numel() == 1, name, " must be one float32 value");
  return *static_cast<const float*>(value.const_data_ptr());
}

// Run f(block of rows, panel) for every pair, a thread's tasks sharing a block as long as they can.
template <class F>
void for_tasks(int64_t blocks, int64_t panels, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task / panels, task % panels);
  });
}

int64_t block_rows(int64_t row_bytes) {
  return std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(1, row_bytes), 12, kMaxRows) / 12 * 12;
}

// ---- float x -----------------------------------------------------------------------------------------------------

void float_panel(const Kernels& kernels, const Weight& w, const float* x, int64_t rows, int64_t first, float* y) {
  alignas(64) float panel[kFloatRows * kFloatDepth];
  alignas(64) float sums[kMaxRows * kFloatRows];
  const int64_t held = std::min<int64_t>(kFloatRows, w.rows - first);
  const float zero = static_cast<float>(1 << (w.n_bits - 1)) - w.shift;
  std::memset(sums, 0, sizeof(float) * rows * kFloatRows);
  if (held < kFloatRows) std::memset(panel, 0, sizeof(panel));
  for (int64_t k = 0; k < w.cols; k += kFloatDepth) {
    const int64_t depth = std::min<int64_t>(kFloatDepth, w.cols - k);
    for (int64_t n = 0; n < held; ++n) {
      w.prefetch(first + n + kFloatRows, k, depth);
      kernels.decode_float(w.row(first + n), w.row_bytes, k, depth, w.n_bits, zero, panel + n * kFloatDepth);
    }
    kernels.multiply_float(x + k, w.cols, rows, panel, kFloatDepth, depth, sums);
  }
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < held; ++n) {
      const float scaled = sums[m * kFloatRows + n] * w.scale[first + n];
      y[m * w.rows + first + n] = w.bias ? scaled + w.bias[first + n] : scaled;
    }
}

Tensor packed_linear(const Tensor& input, const Tensor& words, const Tensor& scale, std::optional<Tensor> bias,
                     int64_t n_bits, double shift, int64_t isa) {
  const Kernels& kernels = kernels_for(isa);
  const Tensor x = as_rows(input);
  const Weight w(x, words, scale, bias, n_bits, shift);
  Tensor y = output_like(x, w.rows);
  if (y.numel() == 0) return y;
  const int64_t rows = y.numel() / w.rows, size = std::min(rows, block_rows(4 * w.cols));
  const auto* source = static_cast<const float*>(x.const_data_ptr());
  auto* target = static_cast<float*>(y.mutable_data_ptr());
  const int64_t panels = (w.rows + kFloatRows - 1) / kFloatRows;
  for_tasks((rows + size - 1) / size, panels, size * kFloatRows * w.cols, [&](int64_t block, int64_t panel) {
    const int64_t m = block * size;
    float_panel(kernels, w, source + m * w.cols, std::min(size, rows - m), panel * kFloatRows, target + m * w.rows);
  });
  return y;
}

// ---- quantized x -------------------------------------------------------------------------------------------------

// With a = code - zero of x and u = code + 2^(b-1) of w, and p and q the factors, 1 or 2, that make every level whole:
//   sum p (code_x + shift_x) * q (code_w + shift_w)
//     = p q sum a u  +  p (zero + shift_x) * q sum u  +  q (shift_w - 2^(b-1)) * p sum (a + zero + shift_x)
// exactly, in 32 bits modulo 2^32: the caller has made sure that the left side fits.
struct Product {
  const Kernels& kernels;
  const Weight& w;
  const InputGrid& grid;
  const int32_t* code_sums;  // sum of code_w over a row
  IntLayout layout;
  int32_t p, q;

  // of a row of x
  int64_t bytes() const { return layout.planes ? layout.padded / 8 * layout.planes : layout.padded * (layout.wide ? 2 : 1); }
  // sum of p (code_x + shift_x) over a row of x
  int32_t row_sum(const RowStats& stats) const {
    const int64_t shift = static_cast<int64_t>(p * (grid.zero + grid.shift));
    return static_cast<int32_t>(p * stats.sum + shift * w.cols);
  }
};

// Bit planes that x is cut into; 0: none. Of more bits, or of a row or two, a code in a byte is faster.
int planes_of(const Kernels& kernels, const Weight& w, int64_t rows, int64_t qmin, int64_t qmax) {
  if (!kernels.multiply_bits || w.n_bits != 1 || qmax - qmin > 3 || rows <= kFewRows) return 0;
  return qmax - qmin > 1 ? 2 : 1;
}

Product make_product(const Kernels& kernels, const Weight& w, const InputGrid& grid, const int32_t* code_sums, int64_t rows,
                     int planes) {
  if (planes)
    return {kernels, w, grid, code_sums, {1, false, 0, round_up(w.cols, 32), planes}, grid.shift != 0 ? 2 : 1, w.shift != 0 ? 2 : 1};
  const float reach = std::max(grid.zero - grid.qmin, grid.qmax - grid.zero);
  const int64_t pair = 2 * ((1 << w.n_bits) - 1) * static_cast<int64_t>(reach);
  const int flush = static_cast<int>(std::min<int64_t>(32767 / std::max<int64_t>(1, pair), 1 << 20));
  // Under four steps a flush costs more than 16-bit operands do.
  const bool wide = !kernels.can_be_narrow || (kernels.flushes && flush < 4);
  const int64_t padded = round_up(w.cols, kernels.step(w.n_bits, wide));
  const int panel_rows = kernels.decode_panel && rows > kFewRows ? 2 * kPanelRows : kPanelRows;
  const IntLayout layout{w.n_bits, wide, flush, padded, 0, panel_rows};
  return {kernels, w, grid, code_sums, layout, grid.shift != 0 ? 2 : 1, w.shift != 0 ? 2 : 1};
}

// Turn sums (rows, panel) into y: the parts of Product come to whole levels, which scales and biases follow. `row_part` is of x.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))  // the same bits; the loader takes the widest
#endif
void scale_rows(const int32_t* sums, int64_t rows, int panel, int doublings, const uint32_t* row_part, const uint32_t* column,
                const float* factor, const float* constant, float* out) {
  for (int64_t m = 0; m < rows; ++m)
    for (int n = 0; n < panel; ++n) {
      const uint32_t total = (static_cast<uint32_t>(sums[m * panel + n]) << doublings) + column[n] + row_part[m];
      out[m * panel + n] = static_cast<float>(static_cast<int32_t>(total)) * factor[n] + constant[n];
    }
}

void finish(const Product& product, const int32_t* sums, const RowStats* stats, int64_t rows, int64_t first,
            int64_t held, float* y) {
  const Weight& w = product.w;
  const InputGrid& grid = product.grid;
  const int32_t zero = 1 << (w.n_bits - 1);
  const auto x_part = static_cast<int32_t>(product.p * (grid.zero + grid.shift));
  const auto w_part = static_cast<int32_t>(product.q * (w.shift - zero));
  const int panel = product.layout.panel_rows;
  uint32_t column[2 * kPanelRows] = {};
  float factor[2 * kPanelRows] = {}, constant[2 * kPanelRows] = {};
  const float whole = 1.0f / static_cast<float>(product.p * product.q);  // a power of two: exact
  for (int64_t n = 0; n < held; ++n) {
    const int64_t row = first + n, u_sum = product.code_sums[row] + zero * w.cols;
    column[n] = static_cast<uint32_t>(x_part * product.q * u_sum);
    factor[n] = grid.scale * w.scale[row] * whole;
    constant[n] = w.bias ? w.bias[row] : 0.0f;
    if (grid.offset != 0.0f) {
      const double levels = product.code_sums[row] + static_cast<double>(w.shift) * w.cols;
      const double moved = static_cast<double>(grid.offset) * w.scale[row] * levels;
      constant[n] = static_cast<float>(w.bias ? moved + w.bias[row] : moved);
    }
  }
  const int doublings = product.p * product.q / 2;  // 1, 2 or 4 times is 0, 1 or 2 to the left
  uint32_t row_part[kMaxRows];
  float out[kMaxRows * 2 * kPanelRows];
  for (int64_t m = 0; m < rows; ++m)
    row_part[m] = static_cast<uint32_t>(w_part) * static_cast<uint32_t>(product.row_sum(stats[m]));
  scale_rows(sums, rows, panel, doublings, row_part, column, factor, constant, out);
  for (int64_t m = 0; m < rows; ++m) {
    float* const row = out + m * panel;
    if (stats[m].nan) std::fill(row, row + panel, std::numeric_limits<float>::quiet_NaN());
    std::memcpy(y + m * w.rows + first, row, sizeof(float) * held);
  }
}

// Multiply x by the rows of a panel as they lie: bit planes, or a row or two of x. False where the kernels cannot.
bool stream_panel(const Product& product, const uint8_t* codes, int64_t rows, const uint8_t* const* packed, int32_t* sums) {
  if (!product.layout.planes && (rows > kFewRows || !product.kernels.stream)) return false;
  const Weight& w = product.w;
  if (product.layout.planes) {
    product.kernels.multiply_bits(codes, product.bytes(), rows, packed, product.layout, sums);
    return true;
  }
  for (int64_t m = 0; m < rows; ++m)
    if (!product.kernels.stream(codes + m * product.bytes(), packed, w.row_bytes, product.layout, sums + m * kPanelRows))
      return false;
  return true;
}

void int_panel(const Product& product, const uint8_t* codes, const RowStats* stats, int64_t rows, int64_t first,
               float* y) {
  alignas(64) uint8_t panel[kPanelBytes];
  alignas(64) int32_t sums[kMaxRows * 2 * kPanelRows];
  const Weight& w = product.w;
  const IntLayout& layout = product.layout;
  const int64_t size = layout.wide ? 2 : 1, stride = kPanelBytes / layout.panel_rows, slice = stride / size;
  const int64_t held = std::min<int64_t>(layout.panel_rows, w.rows - first);
  const uint8_t* packed[2 * kPanelRows];  // behind the last row the last again: its sums are not used
  for (int64_t n = 0; n < layout.panel_rows; ++n) packed[n] = w.row(first + std::min(n, held - 1));
  std::memset(sums, 0, sizeof(int32_t) * rows * layout.panel_rows);
  if (stream_panel(product, codes, rows, packed, sums)) return finish(product, sums, stats, rows, first, held, y);
  for (int64_t k = 0; k < layout.padded; k += slice) {
    const int64_t depth = std::min(slice, layout.padded - k);
    for (int64_t n = 0; n < held; ++n) w.prefetch(first + n + layout.panel_rows, k, depth);
    if (product.kernels.decode_panel)
      product.kernels.decode_panel(packed, w.row_bytes, k, depth, layout, panel);
    else
      for (int64_t n = 0; n < kPanelRows; ++n)
        product.kernels.decode(packed[n], w.row_bytes, k, depth, layout, panel + n * stride);
    product.kernels.multiply(codes + k * size, layout.padded, rows, panel, slice, depth, layout, sums);
  }
  finish(product, sums, stats, rows, first, held, y);
}

// Quantize some blocks of rows, then multiply them by every panel.
void int_rows(const Product& product, const float* x, int64_t rows, int64_t size, uint8_t* codes, RowStats* stats,
              float* y) {
  const Weight& w = product.w;
  const int64_t bytes = product.bytes(), held = product.layout.panel_rows, panels = (w.rows + held - 1) / held;
  const int64_t grain = std::max<int64_t>(1, kTaskWork / (20 * std::max<int64_t>(1, w.cols)));
  const auto quantize = product.layout.planes ? product.kernels.quantize_bits : product.kernels.quantize;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      quantize(x + m * w.cols, w.cols, product.grid, product.layout, codes + m * bytes, stats + m);
  });
  for_tasks((rows + size - 1) / size, panels, size * held * w.cols, [&](int64_t block, int64_t panel) {
    const int64_t m = block * size;
    int_panel(product, codes + m * bytes, stats + m, std::min(size, rows - m), panel * held, y + m * w.rows);
  });
}

// Quantizers of an input with one scale.
struct Input {
  float scale, offset, shift;
  int64_t qmin, qmax;

  Input(const Tensor& in_scale, const std::optional<Tensor>& in_offset, double in_shift, int64_t low, int64_t high)
      : scale(scalar_of(in_scale, "in_scale")), offset(in_offset ? scalar_of(*in_offset, "in_offset") : 0.0f),
        shift(static_cast<float>(in_shift)), qmin(low), qmax(high) {
    STD_TORCH_CHECK(-128 <= qmin && qmin <= qmax && qmax <= 255 && qmax - qmin <= 255, "codes of x must have 8 bits");
  }
};

Tensor product_of(const Kernels& kernels, const Tensor& x, const Weight& w, const int32_t* code_sums, const Input& in) {
  Tensor y = output_like(x, w.rows);
  if (y.numel() == 0) return y;
  const int64_t rows = y.numel() / w.rows;
  const int planes = planes_of(kernels, w, rows, in.qmin, in.qmax);
  const auto zero = static_cast<int32_t>(planes ? in.qmin : in.qmax > 127 ? 128 : 0);  // planes hold no sign
  const InputGrid grid{in.scale, in.offset, in.shift, static_cast<float>(in.qmin), static_cast<float>(in.qmax), zero};
  const Product product = make_product(kernels, w, grid, code_sums, rows, planes);
  const int64_t size = std::min(rows, block_rows(product.bytes()));
  const int64_t batch = std::min(rows, 8 * size);  // what is quantized at a time: workspace stays small at any batch
  const std::unique_ptr<uint8_t[]> codes(new uint8_t[batch * product.bytes() + 32]);  // behind it a vector may be read
  const std::unique_ptr<RowStats[]> stats(new RowStats[batch]);
  const auto* source = static_cast<const float*>(x.const_data_ptr());
  auto* target = static_cast<float*>(y.mutable_data_ptr());
  for (int64_t m = 0; m < rows; m += batch)
    int_rows(product, source + m * w.cols, std::min(batch, rows - m), size, codes.get(), stats.get(), target + m * w.rows);
  return y;
}

Tensor packed_linear_int(const Tensor& input, const Tensor& words, const Tensor& scale, const Tensor& code_sums,
                         std::optional<Tensor> bias, const Tensor& in_scale, std::optional<Tensor> in_offset,
                         int64_t n_bits, double shift, int64_t qmin, int64_t qmax, double in_shift, int64_t isa) {
  const Tensor x = as_rows(input);
  const Weight w(x, words, scale, bias, n_bits, shift);
  STD_TORCH_CHECK(code_sums.scalar_type() == ScalarType::Int && code_sums.is_contiguous() && code_sums.numel() == w.rows,
                  "code_sums must be int32 (out,)");
  const Input in(in_scale, in_offset, in_shift, qmin, qmax);
  return product_of(kernels_for(isa), x, w, static_cast<const int32_t*>(code_sums.const_data_ptr()), in);
}

// ---- weights that are images ---------------------------------------------------------------------------------------

// Codes of a row of an image, offset to be unsigned, and their sum; false where a value is no level times the scale.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))  // the same bits; the loader takes the widest
#endif
bool codes_of_row(const float* w, int64_t cols, float scale, float shift, float least, float most, int32_t zero, uint8_t* codes,
                  int32_t* sum) {
  constexpr float kRound = 12582912.0f;  // adding it rounds half to even
  int32_t total = 0, wrong = 0;
  for (int64_t k = 0; k < cols; ++k) {
    const float code = (w[k] / scale - shift + kRound) - kRound;
    const bool right = ((code + shift) * scale == w[k]) & (code >= least) & (code <= most);
    const auto whole = static_cast<int32_t>(right ? code : 0.0f);  // what is no code need not fit an integer
    wrong |= !right;
    total += whole;
    codes[k] = static_cast<uint8_t>(whole + zero);
  }
  *sum = total;
  return !wrong;
}

template <int n_bits>
void pack_row(const uint8_t* codes, int64_t bytes, uint8_t* out) {
  constexpr int per = 8 / n_bits;
  for (int64_t i = 0; i < bytes; ++i) {
    unsigned byte = 0;
    for (int j = 0; j < per; ++j) byte |= static_cast<unsigned>(codes[per * i + j]) << (n_bits * j);
    out[i] = static_cast<uint8_t>(byte);
  }
}

// A weight that is an image w_hat = (code + shift) * scale, a scale for so many rows, as packed codes of 1, 2, 4 or 8 bits.
struct ImageCodes {
  std::unique_ptr<uint8_t[]> words;
  std::vector<float> scale;
  std::vector<int32_t> sums;

  ImageCodes(const Tensor& image, const Tensor& scales, int bits, float shift, float least, float most)
      : scale(image.size(0)), sums(image.size(0)) {
    const int64_t rows = image.size(0), cols = image.numel() / std::max<int64_t>(1, rows), groups = scales.numel();
    const int64_t row_bytes = Weight::words_in(cols, bits) * 4, padded = row_bytes * 8 / bits;
    STD_TORCH_CHECK(groups > 0 && rows % groups == 0, "a weight of ", rows, " rows has no ", groups, " scales");
    const auto* w = values_of<const float>(image, ScalarType::Float, rows * cols, "weight");
    const auto* s = values_of<const float>(scales, ScalarType::Float, groups, "weight_scale");
    words.reset(new uint8_t[rows * row_bytes + 32]);
    std::vector<char> right(rows);
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cols));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> codes(padded);
      for (int64_t n = begin; n < end; ++n) {
        scale[n] = s[n / (rows / groups)];
        right[n] = codes_of_row(w + n * cols, cols, scale[n], shift, least, most, 1 << (bits - 1), codes.data(), &sums[n]);
        uint8_t* out = words.get() + n * row_bytes;
        if (bits == 1) pack_row<1>(codes.data(), row_bytes, out);
        else if (bits == 2) pack_row<2>(codes.data(), row_bytes, out);
        else if (bits == 4) pack_row<4>(codes.data(), row_bytes, out);
        else pack_row<8>(codes.data(), row_bytes, out);
      }
    });
    for (int64_t n = 0; n < rows; ++n)
      STD_TORCH_CHECK(right[n], "row ", n, " of a weight holds a value that is no level of its quantizer");
  }
};

Tensor image_linear_int(const Tensor& input, const Tensor& image, const Tensor& image_scale, std::optional<Tensor> bias,
                        const Tensor& in_scale, std::optional<Tensor> in_offset, double shift, int64_t least, int64_t most,
                        int64_t qmin, int64_t qmax, double in_shift, int64_t isa) {
  const Tensor x = as_rows(input), w_hat = as_rows(image);
  STD_TORCH_CHECK(-128 <= least && least <= most && most <= 127, "codes of weights are int8");
  STD_TORCH_CHECK(w_hat.dim() == 2 && x.size(-1) == w_hat.size(1), "x and the weight have other features");
  int bits = 1;
  while (least < -(1 << (bits - 1)) || most > (1 << (bits - 1)) - 1) bits *= 2;
  const ImageCodes codes(w_hat, image_scale, bits, static_cast<float>(shift), static_cast<float>(least), static_cast<float>(most));
  const Weight w(x, codes.words.get(), codes.scale.data(), bias, w_hat.size(0), bits, static_cast<float>(shift));
  return product_of(kernels_for(isa), x, w, codes.sums.data(), Input(in_scale, in_offset, in_shift, qmin, qmax));
}

}  // namespace
}  // namespace dsq

// Read by Python through ctypes.
extern "C" int dsquant_cpu_level() { return dsq::cpu_level(); }

// The schemas are in dsquant/ops/packed_linear.py and quant_linear.py.
STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&dsq::packed_linear));
  m.impl("packed_linear_int", TORCH_BOX(&dsq::packed_linear_int));
  m.impl("image_linear_int", TORCH_BOX(&dsq::image_linear_int));
}
