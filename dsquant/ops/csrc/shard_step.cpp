// The operators dsquant::shard_* on CPU, each of which takes all that lies in a flat shard. The flat is cut into runs that share a scale, and these into units that threads take.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "native.h"
#include "shard_step.h"

namespace dsq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRun = 16 * 1024;  // elements at most: what a thread takes at a time, and what stays in L2

// Find the bounds of a grid; false where it has more than four levels, or none at its ends.
bool bounds_of(int qmin, int qmax, float shift, float low, float high, Bounds& found) {
  if (qmax - qmin > 3 || !std::isfinite(low) || !std::isfinite(high)) return false;
  const auto ordered = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  const auto number = [&](int32_t place) {
    float v;
    place = ordered(place);
    std::memcpy(&v, &place, sizeof v);
    return v;
  };
  const auto place = [&](float v) {
    int32_t bits;
    std::memcpy(&bits, &v, sizeof v);
    return ordered(bits);
  };
  found.inside[0] = low, found.inside[1] = number(place(high) + 1);
  for (int k = 0; k < 3; ++k) {
    if (k >= qmax - qmin) {
      found.code[k] = NAN;
      continue;
    }
    const float middle = static_cast<float>(qmin + k) + shift;
    int64_t under = place(middle - 2), over = place(middle + 2);  // codes less than qmin + k + 1, and not
    while (over - under > 1) {
      const auto half = static_cast<int32_t>((under + over) / 2);
      (std::nearbyint(number(half) - shift) > static_cast<float>(qmin + k) ? over : under) = half;
    }
    found.code[k] = number(static_cast<int32_t>(over));
  }
  return true;
}

// A row of the table of tiles: dsquant/ops/shard_step.py names the columns. Without groups: values that nothing quantizes.
struct FlatTile {
  int64_t start, rows, cols, state, first_group, n_groups, group_base, bin_base, n_bins, weight;
  double qmin, qmax, shift, low, high, plain, late, pull, factor;
  bool alone = true;  // no other run adds to the sums of a run's group
  Bounds bounds{};
  bool bounded = false;

  bool quantized() const { return n_groups > 0; }
  bool has_grid_of(const FlatTile& o) const {
    return quantized() == o.quantized() && qmin == o.qmin && qmax == o.qmax && shift == o.shift && low == o.low && high == o.high;
  }
  bool shares_groups(const FlatTile& later) const {
    const int64_t away = (later.first_group - first_group + n_groups) % n_groups;
    return away < rows || n_groups - away < later.rows;
  }
  int64_t pieces() const { return (cols + kRun - 1) / kRun; }
  int64_t count() const { return rows * pieces(); }
  RunGrid grid(float scale, float centre) const {
    return {scale, centre, static_cast<float>(shift), static_cast<float>(low), static_cast<float>(high),
            static_cast<int32_t>(qmin), static_cast<int32_t>(qmax), plain != 0, bounded ? &bounds : nullptr};
  }
};
constexpr int64_t kColumns = 19;

// Where a run lies: its elements in the flat and beside the tracker, its group among all scales, and what its bins hold.
struct Run {
  int64_t size, element, state, group, bin;

  // Divisions would cost as much as some vectors of a short row; most tiles need none.
  Run(const FlatTile& tile, int64_t run) {
    const int64_t pieces = tile.pieces(), row = pieces == 1 ? run : run / pieces, from = (run - row * pieces) * kRun;
    int64_t own = tile.first_group + row;
    if (own >= tile.n_groups && tile.quantized()) own %= tile.n_groups;
    size = std::min(kRun, tile.cols - from);
    element = tile.start + row * tile.cols + from;
    state = tile.state + row * tile.cols + from;
    group = tile.group_base + own;
    bin = tile.bin_base + own * 2 * tile.n_bins;
  }
};

struct Unit {
  int64_t tile, begin, end;  // runs [begin, end) of a tile
};

// The tiles of a flat of `numel` elements, beside trackers of `state` ones, checked; and their units.
struct FlatTiles {
  std::vector<FlatTile> tiles;
  std::vector<Unit> units;

  FlatTiles(const Tensor& table, int64_t numel, int64_t state, int64_t groups, int64_t bins, int64_t weights) {
    const int64_t count = table.numel() / kColumns;
    tiles.reserve(count);
    const auto* row = values_of<const double>(table, ScalarType::Double, count * kColumns, "tiles");
    for (int64_t t = 0; t < count; ++t, row += kColumns) {
      const auto at = [row](int column) { return static_cast<int64_t>(row[column]); };
      FlatTile tile{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), row[10], row[11], row[12],
                    row[13], row[14], row[15], row[16], row[17], row[18]};
      tile.alone = tile.pieces() == 1 && tile.rows <= tile.n_groups;
      const int64_t size = tile.rows * tile.cols;
      STD_TORCH_CHECK(tile.rows > 0 && tile.cols > 0 && tile.start >= 0 && tile.start + size <= numel, "tile ", t,
                      " does not lie in the flat");
      if (tile.quantized()) {
        STD_TORCH_CHECK(tile.state >= 0 && tile.state + size <= state, "tile ", t, " has no tracker");
        STD_TORCH_CHECK(tile.first_group >= 0 && tile.group_base >= 0 && tile.group_base + tile.n_groups <= groups,
                        "tile ", t, " has no scales");
        STD_TORCH_CHECK(-128 <= tile.qmin && tile.qmin <= tile.qmax && tile.qmax <= 127, "codes of weights are int8");
        STD_TORCH_CHECK(tile.weight >= 0 && tile.weight < weights, "tile ", t, " is of weight ", tile.weight);
        STD_TORCH_CHECK(tile.n_bins == 0 || (tile.n_bins > tile.qmax - tile.qmin && tile.n_bins <= 256 && tile.bin_base >= 0 &&
                                             tile.bin_base + 2 * tile.n_bins * tile.n_groups <= bins),
                        "tile ", t, " has no bins");
      }
      const bool same = !tiles.empty() && tiles.back().has_grid_of(tile);
      if (same)
        tile.bounded = tiles.back().bounded, tile.bounds = tiles.back().bounds;
      else if (tile.quantized())
        tile.bounded = bounds_of(static_cast<int>(tile.qmin), static_cast<int>(tile.qmax), static_cast<float>(tile.shift),
                                 static_cast<float>(tile.low), static_cast<float>(tile.high), tile.bounds);
      for (auto other = tiles.rbegin(); other != tiles.rend() && other->quantized() && other->weight == tile.weight; ++other)
        if (other->shares_groups(tile)) other->alone = tile.alone = false;  // the tiles of a weight are neighbours
      tiles.push_back(tile);
    }
    for (int64_t t = 0; t < count; ++t) cut(tiles[t], t);
  }

  void cut(const FlatTile& tile, int64_t index) {
    const int64_t each = std::max<int64_t>(1, kRun / std::min(tile.cols, kRun));
    for (int64_t begin = 0; begin < tile.count(); begin += each) {
      units.push_back({index, begin, std::min(tile.count(), begin + each)});
    }
  }

  // Call f(tile, unit, its number) for every unit of tiles that `wanted(tile)`.
  template <class W, class F>
  void each_unit(const W& wanted, const F& f) const {
    torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t u = first; u < last; ++u)
        if (wanted(tiles[units[u].tile])) f(tiles[units[u].tile], units[u], u);
    });
  }

  // Call f(tile, run, the number of its unit) for every run of them.
  template <class W, class F>
  void each(const W& wanted, const F& f) const {
    each_unit(wanted, [&](const FlatTile& tile, const Unit& unit, int64_t number) {
      for (int64_t run = unit.begin; run < unit.end; ++run) f(tile, run, number);
    });
  }
};

StepKernels kernels_for(int64_t isa) {
  StepKernels kernels = kernels_of(isa, kStepPortable, kStepAvx2OrNone);
#if defined(__x86_64__)
  if (isa >= 2) kernels.sums = sums_avx512, kernels.step = step_avx512, kernels.rows = rows_avx512;
#endif
  return kernels;
}

// What units find of each of their runs, `width(tile)` values, where a group's runs are in several.
struct Found {
  const FlatTiles& flat;
  std::vector<std::vector<double>> of_units;

  explicit Found(const FlatTiles& flat) : flat(flat), of_units(flat.units.size()) {}

  // A run's values, zero.
  double* of(int64_t unit, int64_t run, int64_t width) {
    const Unit& all = flat.units[unit];
    of_units[unit].resize(width * (all.end - all.begin));
    return &of_units[unit][width * (run - all.begin)];
  }
  // Call f(tile, run, its values, whether they are its group's first): in one order, whatever the number of threads.
  template <class F>
  void each(int64_t groups, const F& f) const {
    std::vector<bool> seen(groups);
    for (size_t u = 0; u < flat.units.size(); ++u) {
      const Unit& unit = flat.units[u];
      if (of_units[u].empty()) continue;
      const auto width = static_cast<int64_t>(of_units[u].size()) / (unit.end - unit.begin);
      for (int64_t run = unit.begin; run < unit.end; ++run) {
        const Run at(flat.tiles[unit.tile], run);
        f(flat.tiles[unit.tile], at, &of_units[u][width * (run - unit.begin)], !seen[at.group]);
        seen[at.group] = true;
      }
    }
  }
};

// What a run's bins hold, of `n_bins` ones.
void bins_of(const StepKernels& kernels, int64_t n, const float* w, const int8_t* codes, const RunGrid& grid, int64_t n_bins,
             double* bins) {
  double beside[2];  // w in the gradient's place: nobody reads that of the scale
  sums_of(kernels, n, w, w, codes, nullptr, grid, n_bins, false, beside, bins);
}

void put(const double* own, int64_t size, bool first, double* into) {
  for (int64_t k = 0; k < size; ++k) into[k] = first ? own[k] : into[k] + own[k];
}

void shard_flat_bins(const Tensor& w, const Tensor& codes, const Tensor& scale, std::optional<Tensor> centre,
                     const Tensor& table, const Tensor& bins, int64_t isa) {
  const StepKernels kernels = kernels_for(isa);
  const int64_t n = w.numel(), state = codes.numel(), n_groups = scale.numel();
  const FlatTiles flat(table, n, state, n_groups, bins.numel(), n);
  const auto* x = values_of<const float>(w, ScalarType::Float, n, "w");
  const auto* c = values_of<const int8_t>(codes, ScalarType::Char, state, "codes");
  const auto* scales = values_of<const float>(scale, ScalarType::Float, n_groups, "scale");
  const auto* centres = values_of<const float>(centre, ScalarType::Float, n_groups, "centre");
  auto* held = values_of<double>(bins, ScalarType::Double, bins.numel(), "bins");
  Found found(flat);
  flat.each([](const FlatTile& tile) { return tile.n_bins != 0; }, [&](const FlatTile& tile, int64_t run, int64_t unit) {
    const Run at(tile, run);
    bins_of(kernels, at.size, x + at.element, c + at.state, tile.grid(scales[at.group], centres ? centres[at.group] : 0.0f),
            tile.n_bins, found.of(unit, run, 2 * tile.n_bins));
  });
  found.each(n_groups, [&](const FlatTile& tile, const Run& at, const double* own, bool first) {
    put(own, 2 * tile.n_bins, first, held + at.bin);
  });
}

void shard_flat_moments(const Tensor& w, const Tensor& table, const Tensor& sums, int64_t isa) {
  const StepKernels kernels = kernels_for(isa);
  const int64_t n = w.numel(), n_groups = sums.numel() / 3;
  const FlatTiles flat(table, n, INT64_MAX, n_groups, INT64_MAX, INT64_MAX);
  const auto* x = values_of<const float>(w, ScalarType::Float, n, "w");
  auto* totals = values_of<double>(sums, ScalarType::Double, 3 * n_groups, "sums");
  const auto late = [](const FlatTile& tile) { return tile.quantized() && tile.late; };
  Found found(flat);
  flat.each(late, [&](const FlatTile& tile, int64_t run, int64_t unit) {
    const Run at(tile, run);
    kernels.moments(at.size, x + at.element, found.of(unit, run, 3));
  });
  found.each(n_groups, [&](const FlatTile&, const Run& at, const double* own, bool first) {
    put(own, 3, first, totals + 3 * at.group);
  });
}

// `update` and `image` one after another, on a run that stays in L1 or L2 between them.
void step_in_passes(const StepKernels& kernels, int64_t n, const RunStep& s, double* norms) {
  constexpr int64_t kPart = 1024;  // of a run of 16 Ki elements the second pass would find nothing in L1
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int64_t count = std::min(kPart, n - begin);
    Tracker t = s.tracker;
    t.codes += begin, t.direction += begin, t.frequency += begin;
    if (t.frozen) t.frozen += begin, t.code_mean += begin;
    kernels.update(count, s.w + begin, s.grad + begin, s.m + begin, s.v + begin, t.codes, t.frozen, s.before, s.pull, s.adam,
                   norms);
    std::memcpy(s.image + begin, s.w + begin, count * sizeof(float));
    kernels.image(count, s.image + begin, s.w + begin, s.after, t);
  }
}

// A run's step. out[0] += d scale, out[1] += |w| before it where `sizes` asks; where there are tables, `bins` += what they hold
// after it.
void step_run(const StepKernels& kernels, int64_t n, const RunStep& s, bool sizes, double* norms, double* out, double* bins) {
  if (!norms && !sizes && kernels.step && kernels.step(n, s, out, bins)) return;
  sums_of(kernels, n, s.w, s.grad, s.tracker.codes, s.tracker.frozen, s.before, 0, sizes, out, nullptr);
  step_in_passes(kernels, n, s, norms);
  if (s.pull.strength) bins_of(kernels, n, s.w, s.tracker.codes, s.after, s.pull.n_bins, bins);
}

// What every run of a flat steps with. `sums` is (1 or 2, groups), `held` and `bins` what bins hold before and after the step.
struct FlatStep {
  float* w;
  const float* grad;
  float *m, *v, *image;
  const float *before, *after, *centre;
  const double* held;
  double twice_spread;
  AdamW adam;
  Tracker tracker;
  bool sizes;
  double *sums, *bins;
  int64_t groups;

  ObrTables<0> tables_of(const FlatTile& tile, const Run& at) const {
    return {tile.n_bins, tile.grid(0.0f, 0.0f), before[at.group], held + at.bin, 2 * tile.pull, twice_spread};
  }

  Tracker tracker_at(const Run& at) const {
    Tracker t = tracker;
    t.codes += at.state, t.direction += at.state, t.frequency += at.state;
    if (t.frozen) t.frozen += at.state, t.code_mean += at.state;
    return t;
  }

  Pull pull_of(const FlatTile& tile, const float* strength, const float* goal) const {
    const bool spread = tile.n_bins != 0;
    return {static_cast<float>(2 * tile.pull), spread ? strength : nullptr, spread ? goal : nullptr, tile.n_bins,
            tile.pull != 0 || spread};
  }

  RunStep of(const FlatTile& tile, const Run& at, const ObrTables<0>& tables) const {
    const float middle = centre ? centre[at.group] : 0.0f;
    return {w + at.element, grad + at.element, m + at.element, v + at.element, image + at.element,
            tile.grid(before[at.group], middle), tile.grid(after[at.group], middle),
            pull_of(tile, tables.strength, tables.goal), adam, tracker_at(at)};
  }

  // Put a run's sums, d scale times its factor, or add them to those of others of its group.
  void put_sums(const FlatTile& tile, const Run& at, const double* own, bool first) const {
    const double d_scale = own[0] * tile.factor;
    put(&d_scale, 1, first, sums + at.group);
    if (sizes) put(own + 1, 1, first, sums + groups + at.group);
    put(own + 2, 2 * tile.n_bins, first, bins + at.bin);
  }
};

// `late` tiles, whose scale is a statistic of what the step leaves, take AdamW alone; shard_flat_image does the rest.
void run_tile(const StepKernels& kernels, const FlatStep& flat, const FlatTile& tile, int64_t run, double* norms, double* own) {
  const Run at(tile, run);
  const int64_t n = at.size, i = at.element;
  if (!tile.quantized()) {
    kernels.adamw(n, flat.w + i, flat.grad + i, flat.m + i, flat.v + i, flat.adam);
    std::memcpy(flat.image + i, flat.w + i, n * sizeof(float));
    return;
  }
  const ObrTables<0> tables = flat.tables_of(tile, at);
  const RunStep s = flat.of(tile, at, tables);
  if (tile.late)
    kernels.update(n, s.w, s.grad, s.m, s.v, s.tracker.codes, s.tracker.frozen, s.before, s.pull, s.adam, norms);
  else
    step_run(kernels, n, s, flat.sizes, norms, own, own + 2);
}

// Step a unit's rows together; false where there is no code for that.
bool step_rows(const StepKernels& kernels, const FlatStep& flat, const FlatTile& tile, const Unit& unit) {
  if (!kernels.rows || !tile.alone || tile.late || flat.sizes || tile.first_group + unit.end > tile.n_groups) return false;
  const Run at(tile, unit.begin);
  const int64_t i = at.element, g = at.group;
  const float none[1] = {};  // rows have tables of their own
  return kernels.rows({unit.end - unit.begin, tile.cols, flat.w + i, flat.grad + i, flat.m + i, flat.v + i, flat.image + i,
                       flat.tracker_at(at), tile.grid(0.0f, 0.0f), flat.before + g, flat.after + g, flat.held + at.bin,
                       flat.sums + g, flat.bins + at.bin, tile.factor, 2 * tile.pull, flat.twice_spread,
                       flat.pull_of(tile, none, none), flat.adam});
}

Tracker tracker_of(const Tensor& codes, const Tensor& direction, const Tensor& frequency,
                   const std::optional<Tensor>& code_mean, const std::optional<Tensor>& frozen, double momentum, double gain,
                   double threshold) {
  const int64_t n = codes.numel();
  Tracker found{values_of<int8_t>(codes, ScalarType::Char, n, "codes"),
                values_of<int8_t>(direction, ScalarType::Char, n, "direction"),
                values_of<float>(frequency, ScalarType::Float, n, "frequency"),
                values_of<float>(code_mean, ScalarType::Float, n, "code_mean"),
                values_of<bool>(frozen, ScalarType::Bool, n, "frozen"),
                static_cast<float>(momentum),
                static_cast<float>(1 - momentum),
                static_cast<float>(gain),
                static_cast<float>(threshold)};
  STD_TORCH_CHECK(!found.code_mean == !found.frozen, "code_mean and frozen come together");
  return found;
}

// The squared norms of a step, (weights, 2): units add to their own, which are added up in one order.
struct Norms {
  double* squares;
  std::vector<double> found;

  Norms(const std::optional<Tensor>& norms, const FlatTiles& tiles)
      : squares(values_of<double>(norms, ScalarType::Double, norms ? norms->numel() : 0, "norms")),
        found(squares ? 2 * tiles.units.size() : 0) {}
  double* of(int64_t unit) { return squares ? &found[2 * unit] : nullptr; }
  void add_up(const FlatTiles& tiles) {
    for (size_t u = 0; squares && u < tiles.units.size(); ++u) {
      const FlatTile& tile = tiles.tiles[tiles.units[u].tile];
      for (int k = 0; tile.quantized() && k < 2; ++k) squares[2 * tile.weight + k] += found[2 * u + k];
    }
  }
};

AdamW adamw_of(double decay, double beta1, double beta2, double correction, double eps, double step) {
  return {static_cast<float>(decay),     static_cast<float>(1 - beta1),  static_cast<float>(beta2),
          static_cast<float>(1 - beta2), static_cast<float>(correction), static_cast<float>(eps),
          static_cast<float>(step)};
}

void shard_flat_step(const Tensor& w, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     const Tensor& image, const Tensor& codes, const Tensor& direction, const Tensor& frequency,
                     std::optional<Tensor> code_mean, std::optional<Tensor> frozen, const Tensor& before,
                     const Tensor& after, std::optional<Tensor> centre, const Tensor& held, double spread,
                     const Tensor& table, double decay, double beta1, double beta2, double correction, double eps,
                     double step, double momentum, double gain, double threshold, std::optional<Tensor> norms,
                     const Tensor& sums, const Tensor& bins, int64_t isa) {
  const StepKernels kernels = kernels_for(isa);
  const int64_t n = w.numel(), n_groups = before.numel(), n_weights = norms ? norms->numel() / 2 : n;
  const FlatTiles tiles(table, n, codes.numel(), n_groups, bins.numel(), n_weights);
  const bool sizes = sums.numel() > n_groups;
  const FlatStep flat{values_of<float>(w, ScalarType::Float, n, "w"),
                      values_of<const float>(grad, ScalarType::Float, n, "grad"),
                      values_of<float>(exp_avg, ScalarType::Float, n, "exp_avg"),
                      values_of<float>(exp_avg_sq, ScalarType::Float, n, "exp_avg_sq"),
                      values_of<float>(image, ScalarType::Float, n, "image"),
                      values_of<const float>(before, ScalarType::Float, n_groups, "before"),
                      values_of<const float>(after, ScalarType::Float, n_groups, "after"),
                      values_of<const float>(centre, ScalarType::Float, n_groups, "centre"),
                      values_of<const double>(held, ScalarType::Double, bins.numel(), "held"),
                      2 * spread,
                      adamw_of(decay, beta1, beta2, correction, eps, step),
                      tracker_of(codes, direction, frequency, code_mean, frozen, momentum, gain, threshold),
                      sizes,
                      values_of<double>(sums, ScalarType::Double, (1 + sizes) * n_groups, "sums"),
                      values_of<double>(bins, ScalarType::Double, bins.numel(), "bins"),
                      n_groups};
  Norms squares(norms, tiles);
  Found found(tiles);
  tiles.each_unit([](const FlatTile&) { return true; }, [&](const FlatTile& tile, const Unit& unit, int64_t number) {
    if (!norms && step_rows(kernels, flat, tile, unit)) return;
    const int64_t width = 2 + 2 * tile.n_bins;
    double here[2 + 2 * 256];
    for (int64_t run = unit.begin; run < unit.end; ++run) {
      const bool apart = !tile.quantized() || tile.late || tile.alone;
      if (apart) std::fill_n(here, width, 0.0);
      double* own = apart ? here : found.of(number, run, width);
      run_tile(kernels, flat, tile, run, squares.of(number), own);
      if (tile.quantized() && !tile.late && tile.alone) flat.put_sums(tile, Run(tile, run), own, true);
    }
  });
  found.each(n_groups, [&](const FlatTile& tile, const Run& at, const double* own, bool first) {
    flat.put_sums(tile, at, own, first);
  });
  squares.add_up(tiles);
}

void shard_flat_image(const Tensor& w, const Tensor& image, const Tensor& codes, const Tensor& direction,
                      const Tensor& frequency, std::optional<Tensor> code_mean, std::optional<Tensor> frozen,
                      const Tensor& scale, std::optional<Tensor> centre, const Tensor& table, double momentum,
                      double gain, double threshold, const Tensor& bins, int64_t isa) {
  const StepKernels kernels = kernels_for(isa);
  const int64_t n = w.numel(), n_groups = scale.numel();
  const FlatTiles tiles(table, n, codes.numel(), n_groups, bins.numel(), n);
  auto* x = values_of<float>(w, ScalarType::Float, n, "w");
  const auto* scales = values_of<const float>(scale, ScalarType::Float, n_groups, "scale");
  const auto* centres = values_of<const float>(centre, ScalarType::Float, n_groups, "centre");
  auto* shown = values_of<float>(image, ScalarType::Float, n, "image");
  auto* held = values_of<double>(bins, ScalarType::Double, bins.numel(), "bins");
  const Tracker all = tracker_of(codes, direction, frequency, code_mean, frozen, momentum, gain, threshold);
  const auto late = [](const FlatTile& tile) { return tile.quantized() && tile.late; };
  Found found(tiles);
  tiles.each(late, [&](const FlatTile& tile, int64_t run, int64_t unit) {
    const Run at(tile, run);
    Tracker t = all;
    t.codes += at.state, t.direction += at.state, t.frequency += at.state;
    if (t.frozen) t.frozen += at.state, t.code_mean += at.state;
    std::memcpy(shown + at.element, x + at.element, at.size * sizeof(float));
    const RunGrid grid = tile.grid(scales[at.group], centres ? centres[at.group] : 0.0f);
    kernels.image(at.size, shown + at.element, x + at.element, grid, t);
    if (!tile.n_bins) return;
    bins_of(kernels, at.size, x + at.element, t.codes, grid, tile.n_bins, found.of(unit, run, 2 * tile.n_bins));
  });
  found.each(n_groups, [&](const FlatTile& tile, const Run& at, const double* own, bool first) {
    put(own, 2 * tile.n_bins, first, held + at.bin);
  });
}

void shard_scales(const Tensor& values, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grads, const Tensor& lr,
                  const Tensor& before, int64_t start, double rate, double beta1, double beta2, double correction1,
                  double correction2, double eps, double floor, int64_t isa) {
  const StepKernels kernels = kernels_for(isa);
  const int64_t all = values.numel(), n = before.numel();
  STD_TORCH_CHECK(start >= 0 && start + n <= all, "there are no scales from ", start, " on");
  auto* x = values_of<float>(values, ScalarType::Float, all, "values") + start;
  auto* m = values_of<float>(exp_avg, ScalarType::Float, all, "exp_avg") + start;
  auto* v = values_of<float>(exp_avg_sq, ScalarType::Float, all, "exp_avg_sq") + start;
  const auto* g = values_of<const float>(grads, ScalarType::Float, all, "grads") + start;
  const auto* rates = values_of<const float>(lr, ScalarType::Float, all, "lr") + start;
  auto* kept = values_of<float>(before, ScalarType::Float, n, "before");
  const ScaleAdam adam{rate, beta1, beta2, correction1, correction2, eps, static_cast<float>(floor)};
  torch::stable::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
    std::copy_n(x + begin, end - begin, kept + begin);
    kernels.scales(end - begin, x + begin, m + begin, v + begin, g + begin, rates + begin, adam);
  });
}

void shard_adamw(const Tensor& w, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, double decay,
                 double beta1, double beta2, double correction, double eps, double step, int64_t isa) {
  const StepKernels kernels = kernels_for(isa);
  const int64_t n = w.numel();
  auto* x = values_of<float>(w, ScalarType::Float, n, "w");
  const auto* g = values_of<const float>(grad, ScalarType::Float, n, "grad");
  auto* m = values_of<float>(exp_avg, ScalarType::Float, n, "exp_avg");
  auto* v = values_of<float>(exp_avg_sq, ScalarType::Float, n, "exp_avg_sq");
  const AdamW adam = adamw_of(decay, beta1, beta2, correction, eps, step);
  torch::stable::parallel_for(0, n, kRun, [&](int64_t begin, int64_t end) {
    kernels.adamw(end - begin, x + begin, g + begin, m + begin, v + begin, adam);
  });
}

}  // namespace
}  // namespace dsq

// The schemas are in dsquant/ops/shard_step.py.
STABLE_TORCH_LIBRARY_IMPL(dsquant, CPU, m) {
  m.impl("shard_flat_bins", TORCH_BOX(&dsq::shard_flat_bins));
  m.impl("shard_flat_step", TORCH_BOX(&dsq::shard_flat_step));
  m.impl("shard_flat_moments", TORCH_BOX(&dsq::shard_flat_moments));
  m.impl("shard_flat_image", TORCH_BOX(&dsq::shard_flat_image));
  m.impl("shard_scales", TORCH_BOX(&dsq::shard_scales));
  m.impl("shard_adamw", TORCH_BOX(&dsq::shard_adamw));
}
