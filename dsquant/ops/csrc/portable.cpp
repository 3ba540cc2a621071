// packed_linear in plain C++: every n_bits, any little-endian machine. Integers are 16 bits wide and in natural order,
// which compilers turn into a multiply-and-add of pairs wherever the machine has one.
#include <cmath>
#include <cstring>

#include "packed_linear.h"

namespace dsq {
namespace {

int step(int, bool) { return 8; }

// Read the eight elements of group `index`, n_bits whole bytes, as one number; bytes behind the row are 0.
inline uint64_t load_group(const uint8_t* row, int64_t row_bytes, int64_t index, int n_bits) {
  uint64_t bits = 0;
  const int64_t begin = index * n_bits;
  const int64_t held = begin + n_bits <= row_bytes ? n_bits : row_bytes - begin;
  if (held > 0) std::memcpy(&bits, row + begin, held);
  return bits;
}

void quantize(const float* x, int64_t cols, const InputGrid& grid, const IntLayout& layout, void* out, RowStats* stats) {
  auto* codes = static_cast<int16_t*>(out);
  int64_t sum = 0;
  int32_t nan = 0;
  for (int64_t k = 0; k < cols; ++k) {
    float v = (x[k] - grid.offset) / grid.scale - grid.shift;
    nan |= v != v;
    v = v > grid.qmin ? v : grid.qmin;  // NaN becomes qmin: the conversion below stays defined
    v = v < grid.qmax ? v : grid.qmax;
    const auto code = static_cast<int32_t>(std::nearbyintf(v)) - grid.zero;  // half to even, the default mode
    codes[k] = static_cast<int16_t>(code);
    sum += code;
  }
  for (int64_t k = cols; k < layout.padded; ++k) codes[k] = 0;
  *stats = {sum, nan};
}

void decode(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, const IntLayout& layout, void* out) {
  auto* levels = static_cast<int16_t*>(out);
  const uint64_t mask = (1u << layout.n_bits) - 1;
  for (int64_t group = 0; group < count / 8; ++group) {
    const uint64_t bits = load_group(row, row_bytes, first / 8 + group, layout.n_bits);
    for (int lane = 0; lane < 8; ++lane)
      levels[8 * group + lane] = static_cast<int16_t>(bits >> (lane * layout.n_bits) & mask);
  }
}

void multiply(const void* x, int64_t x_stride, int64_t rows, const void* panel, int64_t panel_stride, int64_t depth,
              const IntLayout&, int32_t* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const int16_t* a = static_cast<const int16_t*>(x) + m * x_stride;
    for (int n = 0; n < kPanelRows; ++n) {
      const int16_t* u = static_cast<const int16_t*>(panel) + n * panel_stride;
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += static_cast<int32_t>(a[k]) * u[k];
      sums[m * kPanelRows + n] += sum;
    }
  }
}

void decode_float(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, int n_bits, float zero,
                  float* out) {
  const uint64_t mask = (1u << n_bits) - 1;
  for (int64_t k = 0; k < count; k += 8) {
    const uint64_t bits = load_group(row, row_bytes, (first + k) / 8, n_bits);
    for (int lane = 0; lane < 8 && k + lane < count; ++lane)
      out[k + lane] = static_cast<float>(bits >> (lane * n_bits) & mask) - zero;
  }
}

// Eight running sums: faster than one, and their rounding errors grow with an eighth of the depth.
void multiply_float(const float* x, int64_t x_stride, int64_t rows, const float* panel, int64_t panel_stride,
                    int64_t depth, float* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* a = x + m * x_stride;
    for (int n = 0; n < kFloatRows; ++n) {
      const float* w = panel + n * panel_stride;
      float part[8] = {};
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8)
        for (int lane = 0; lane < 8; ++lane) part[lane] += a[k + lane] * w[k + lane];
      for (; k < depth; ++k) part[k % 8] += a[k] * w[k];
      const float low = (part[0] + part[1]) + (part[2] + part[3]), high = (part[4] + part[5]) + (part[6] + part[7]);
      sums[m * kFloatRows + n] += low + high;
    }
  }
}

}  // namespace

const Kernels kPortable = {step, false, false, quantize, decode, multiply, nullptr, decode_float, multiply_float};

}  // namespace dsq
