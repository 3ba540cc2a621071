// What the drivers of packed_linear (packed_linear.cpp) ask of each instruction set.
//
// Weights stay in the packed format: row n is `row_bytes` bytes, element k its bits [k * b, (k + 1) * b), and holds
// u = code + 2^(b-1), unsigned. Work goes through a panel of a few rows decoded for one slice of the columns, small
// enough to stay in L1 while every row of x in a block passes over it.
#pragma once
#include <cstdint>

namespace dsq {

constexpr int kPanelRows = 16;      // rows of a panel of integers; a wide one has twice as many
constexpr int kPanelBytes = 16384;  // 1024 8-bit elements a row or 512 16-bit ones; half as many in a wide panel
constexpr int kFloatRows = 8;       // rows of a panel of floats
constexpr int kFloatDepth = 512;    // elements of such a row
constexpr int kFewRows = 2;         // rows of x for which a panel does not pay
constexpr int kChunk = 256;         // elements: row slices start at multiples of it, for every n_bits

// A quantizer of the input, one scale: code = round(clip((x - offset) / scale - shift, qmin, qmax)), kept as code - zero.
struct InputGrid {
  float scale, offset, shift, qmin, qmax;
  int32_t zero;
};

struct RowStats {
  int64_t sum;   // of code - zero over the row
  int32_t nan;   // whether x holds a NaN: there is no code for it
};

// How integers are laid out. `wide`: 16 bits an element. `flush`: steps of 32 that 16-bit sums can take (not wide).
struct IntLayout {
  int n_bits;
  bool wide;
  int flush;
  int64_t padded;  // elements of a row of x, a multiple of the kernel's step; those behind the last are 0
  int planes = 0;  // bit planes of x, one behind the other, element k at bit k; 0: a code has bytes of its own
  int panel_rows = kPanelRows;
};

struct Kernels {
  // Elements that one step of a row takes, so that `padded` can be a multiple of it.
  int (*step)(int n_bits, bool wide);
  bool can_be_narrow;  // whether `multiply` has 8-bit operands,
  bool flushes;        // and then sums of 16 bits
  void (*quantize)(const float* x, int64_t cols, const InputGrid&, const IntLayout&, void* codes, RowStats*);
  // Decode elements [first, first + count) of a packed row; count is a multiple of step, what lies behind the row is 0.
  void (*decode)(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, const IntLayout&, void* out);
  // sums[m][panel_rows] += x[m][:depth] . panel[n][:depth]; strides in elements.
  void (*multiply)(const void* x, int64_t x_stride, int64_t rows, const void* panel, int64_t panel_stride,
                   int64_t depth, const IntLayout&, int32_t* sums);
  // sums[0][0..15] += x . the packed rows of a panel, decoded in registers: for a row or two of x. May be null, and returns
  // false for what it has no code for.
  bool (*stream)(const void* x, const uint8_t* const* rows, int64_t row_bytes, const IntLayout&, int32_t* sums);
  // The same for floats: levels u - zero; sums[m][8] += ...; depth need not be a multiple of anything.
  void (*decode_float)(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, int n_bits, float zero,
                       float* out);
  void (*multiply_float)(const float* x, int64_t x_stride, int64_t rows, const float* panel, int64_t panel_stride,
                         int64_t depth, float* sums);
  // Decode all rows of a panel, which may be wide, in the order that `multiply` takes them. May be null: `decode` lays out rows,
  // and no panel is wide.
  void (*decode_panel)(const uint8_t* const* rows, int64_t row_bytes, int64_t first, int64_t count, const IntLayout&,
                       void* panel) = nullptr;
  // `quantize` and `multiply` for bit planes of x and the 16 packed rows of a panel, of 1 bit, as they lie. May be null.
  void (*quantize_bits)(const float* x, int64_t cols, const InputGrid&, const IntLayout&, void* codes, RowStats*) = nullptr;
  void (*multiply_bits)(const void* x, int64_t x_stride, int64_t rows, const uint8_t* const* packed, const IntLayout&,
                        int32_t* sums) = nullptr;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
constexpr const Kernels* kAvx2OrNone = &kAvx2;
// With AVX-512 VNNI and VPOPCNTDQ; the rest of their kernels are kAvx2's.
void quantize_vnni(const float* x, int64_t cols, const InputGrid&, const IntLayout&, void* codes, RowStats*);
void decode_vnni(const uint8_t* const* rows, int64_t row_bytes, int64_t first, int64_t count, const IntLayout&, void* panel);
void multiply_vnni(const void* x, int64_t x_stride, int64_t rows, const void* panel, int64_t panel_stride, int64_t depth,
                   const IntLayout&, int32_t* sums);
void quantize_bits(const float* x, int64_t cols, const InputGrid&, const IntLayout&, void* codes, RowStats* stats);
void multiply_bits(const void* x, int64_t x_stride, int64_t rows, const uint8_t* const* packed, const IntLayout&, int32_t* sums);
bool stream_vnni(const void* x, const uint8_t* const* rows, int64_t row_bytes, const IntLayout&, int32_t* sums);
#else
constexpr const Kernels* kAvx2OrNone = nullptr;
#endif

}  // namespace dsq
