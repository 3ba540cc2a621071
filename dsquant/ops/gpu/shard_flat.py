"""The shard step of a whole flat as Triton kernels: what `csrc/shard_flat.cpp` does for CPU, arithmetic in the same order.

A flat is a list of tiles, and a program takes some rows of one, or a piece of a long row; which, it reads from a table. So the
number of launches is that of the block shapes that rows ask for, whatever the number of weights. Sums over elements are
float64 from the first. A group that one program sees whole is written to its place; the others' partial sums are added up in
one order: neither threads nor the way ZeRO cuts a weight must show, and there are no atomics.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import TILE, clip
from dsquant.ops.gpu.launch import launch
from dsquant.ops.gpu.shard_step import WIDE, adamw_numbers, adamw_step, show
from dsquant.ops.shard_step import Column

NARROWEST = 32  # columns of a block: a warp's width
ALIGNED = 16  # elements: where rows begin at multiples of it, a thread reads 16 bytes at a time
CHUNK = 1024  # partial sums that are added up at a time

# What the table of tiles says of one, int64. The first nine are as in `ops.shard_step.Column`; the others say how to sum it, and
# where in a buffer: the i-th sum (of a group that one program sees whole: ALONE, else of a run) of d scale and of bin b lie at
# SUM_AT + i and BIN_AT + i * N_BINS + b, and the other sums that far APART.
START, ROWS, COLS, STATE, FIRST_GROUP, N_GROUPS, GROUP, BIN, N_BINS = (tl.constexpr(i) for i in range(9))
PLAIN, LATE, ALONE, SUM_AT, SUM_APART, BIN_AT, BIN_APART = (tl.constexpr(i) for i in range(9, 16))
FIELDS = tl.constexpr(16)
NUMBERS = tl.constexpr(5)  # float32: qmin, qmax, shift, low, high


@triton.jit
def _block(unit, tiles, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return this program's tile in the table, its first element in the flat and beside the tracker, and its elements from there.

    Then which of them there are, the runs (pieces of a row) that they form, and the groups of these among those of their weight.
    """
    tile = tiles + tl.load(unit + 2 * tl.program_id(0)).to(tl.int64) * FIELDS
    first = tl.load(unit + 2 * tl.program_id(0) + 1)
    rows, cols = tl.load(tile + ROWS), tl.load(tile + COLS).to(tl.int32)
    pieces = tl.cdiv(cols, BLOCK_COLS)
    row, from_col = (first // pieces).to(tl.int64), first % pieces * BLOCK_COLS
    start = tl.load(tile + START) + row * cols + from_col
    state = tl.load(tile + STATE) + row * cols + from_col
    if ALIGNED:
        start, state, cols = tl.multiple_of(start, 16), tl.multiple_of(state, 16), tl.multiple_of(cols, 16)
    down, across = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    here = row + down < rows
    there = here[:, None] & (from_col + across < cols)[None, :]
    own = (tl.load(tile + FIRST_GROUP) + row + down) % tl.maximum(tl.load(tile + N_GROUPS), 1)
    return tile, start, state, down[:, None] * cols + across[None, :], there, here, first + down, own


@triton.jit
def _of_rows(values, where, here):
    return tl.load(values + where, mask=here, other=1.0)[:, None]


@triton.jit
def _grid(numbers, unit):
    """Return qmin, qmax, shift, low and high of this program's tile."""
    at = numbers + tl.load(unit + 2 * tl.program_id(0)) * NUMBERS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def _gather(w, grad, codes, frozen, scale, centre, unit, tiles, numbers, found, SIZES: tl.constexpr, HAS_CENTRE: tl.constexpr,
            HAS_FROZEN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, run, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    qmin, _, shift, low, high = _grid(numbers, unit)
    group, n_bins = tl.load(tile + GROUP) + own, tl.load(tile + N_BINS).to(tl.int32)
    s = _of_rows(scale, group, here)
    x = tl.load(w + start + where, mask=there, other=0.0)
    if HAS_CENTRE:
        x = tl.where(there, x - _of_rows(centre, group, here), 0.0)
    g = tl.load(grad + start + where, mask=there, other=0.0)
    code = tl.load(codes + state + where, mask=there, other=0)
    level = code.to(tl.float32) + shift
    plain = tl.load(tile + PLAIN) != 0
    still = plain
    if HAS_FROZEN:
        still = plain | (tl.load(frozen + state + where, mask=there, other=0) != 0)
    v = tl.math.div_rn(x, s + tl.zeros_like(x))
    passed, clipped = tl.where((v >= low) & (v <= high), g, 0.0), clip(v, low, high)
    outside = tl.where((shift == 0) & (low == qmin), level, clipped)  # no shift and no reach: ends and levels are one
    of_scale = tl.where(still, level * g, tl.math.fma(g - passed, outside, (level - clipped) * g))
    index = tl.where(tl.load(tile + ALONE) != 0, own, run.to(tl.int64))
    at, apart = found + tl.load(tile + SUM_AT) + index, tl.load(tile + SUM_APART)
    tl.store(at, tl.sum(of_scale.to(tl.float64), axis=1), mask=here)
    if SIZES:
        tl.store(at + apart, tl.sum(tl.abs(x).to(tl.float64), axis=1), mask=here)
    at, apart = found + tl.load(tile + BIN_AT) + index * n_bins, tl.load(tile + BIN_APART)
    clipped = tl.where(there, clip(x, low * s, high * s), 0.0).to(tl.float64)
    for b in range(n_bins):
        held = (code.to(tl.float32) == qmin + b) & there
        tl.store(at + b, tl.sum(held.to(tl.int32), axis=1).to(tl.float64), mask=here)
        tl.store(at + apart + b, tl.sum(tl.where(held, clipped, 0.0), axis=1), mask=here)


@triton.jit
def _add_up(found, sources, firsts, places, CHUNK: tl.constexpr):
    """Add up what belongs together: found[places[p]] = sum of found[sources[i]] for firsts[p] <= i < firsts[p + 1]."""
    first, last = tl.load(firsts + tl.program_id(0)), tl.load(firsts + tl.program_id(0) + 1)
    total = tl.zeros((CHUNK,), tl.float64)
    for i in range(first, last, CHUNK):
        at = i + tl.arange(0, CHUNK)
        source = tl.load(sources + at, mask=at < last, other=0)
        total += tl.load(found + source, mask=at < last, other=0.0)
    tl.store(found + tl.load(places + tl.program_id(0)), tl.sum(total))


@triton.jit
def _step(w, grad, exp_avg, exp_avg_sq, image, codes, direction, frequency, code_mean, frozen, before, after, centre, mean,
          factor, pulls, squares, n_units, unit, tiles, numbers, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps,
          step, momentum, keep, threshold, PULLED: tl.constexpr, HAS_TABLES: tl.constexpr, HAS_CENTRE: tl.constexpr,
          HAS_NORMS: tl.constexpr, FREEZES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
          BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, _, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    qmin, qmax, shift, low, high = _grid(numbers, unit)
    quantized, late = tl.load(tile + N_GROUPS) > 0, tl.load(tile + LATE) != 0
    group = tl.load(tile + GROUP) + own
    s = _of_rows(before, group, here & quantized)
    kept = tl.load(w + start + where, mask=there, other=0.0)
    x, of_quantized = kept, there & quantized
    if HAS_CENTRE:
        middle = _of_rows(centre, group, here & quantized)
        x = tl.where(of_quantized, kept - middle, kept)
    v = tl.math.div_rn(x, s + tl.zeros_like(x))
    free = (v >= low) & (v <= high)
    if FREEZES:
        free = free & (tl.load(frozen + state + where, mask=of_quantized, other=0) == 0)
    free = free | (quantized == 0)
    g = tl.where(free, tl.load(grad + start + where, mask=there, other=0.0), 0.0)
    if PULLED:
        code = tl.load(codes + state + where, mask=of_quantized, other=0)
        pull = (x - (code.to(tl.float32) + shift) * s) * tl.load(pulls + tl.load(unit + 2 * tl.program_id(0)))
        if HAS_TABLES:
            n_bins = tl.load(tile + N_BINS)
            entry = (tl.load(tile + BIN) + own * n_bins)[:, None] + (code.to(tl.float32) - qmin).to(tl.int32)
            held = of_quantized & (n_bins > 0)
            spread = x - tl.load(mean + entry, mask=held, other=0.0)
            pull = tl.math.fma(spread, tl.load(factor + entry, mask=held, other=0.0), pull)
        pull = tl.where(free & of_quantized, pull, 0.0)
        if HAS_NORMS:
            task, added = g.to(tl.float64), pull.to(tl.float64)
            tl.store(squares + tl.program_id(0), tl.sum(task * task))
            tl.store(squares + n_units + tl.program_id(0), tl.sum(added * added))
        g = g + pull
    kept, m, square = adamw_step(
        kept, g, tl.load(exp_avg + start + where, mask=there, other=0.0),
        tl.load(exp_avg_sq + start + where, mask=there, other=0.0), decay, one_minus_beta1, beta2, one_minus_beta2, correction,
        eps, step,
    )  # fmt: skip
    tl.store(exp_avg + start + where, m, mask=there)
    tl.store(exp_avg_sq + start + where, square, mask=there)
    s = _of_rows(after, group, here & quantized)
    x = kept
    if HAS_CENTRE:
        x = tl.where(of_quantized, kept - middle, kept)
    latent, shown = show(
        kept, x, s, codes, direction, frequency, code_mean, frozen, state, where,
        of_quantized & (late == 0), qmin, qmax, shift, momentum, keep, threshold, FREEZES,
    )  # fmt: skip
    images = quantized & (late == 0)
    tl.store(w + start + where, tl.where(images, latent, kept), mask=there)
    tl.store(image + start + where, tl.where(images, shown, kept), mask=there & (late == 0))


@triton.jit
def _late_image(w, image, codes, direction, frequency, code_mean, frozen, scale, centre, unit, tiles, numbers, momentum, keep,
                threshold, HAS_CENTRE: tl.constexpr, FREEZES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, _, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    qmin, qmax, shift, _, _ = _grid(numbers, unit)
    there, group = there & (tl.load(tile + LATE) != 0), tl.load(tile + GROUP) + own
    kept = tl.load(w + start + where, mask=there, other=0.0)
    x = kept
    if HAS_CENTRE:
        x = tl.where(there, kept - _of_rows(centre, group, here), 0.0)
    latent, shown = show(
        kept, x, _of_rows(scale, group, here), codes, direction, frequency, code_mean, frozen, state,
        where, there, qmin, qmax, shift, momentum, keep, threshold, FREEZES,
    )  # fmt: skip
    tl.store(w + start + where, latent, mask=there)
    tl.store(image + start + where, shown, mask=there)


class Shape(NamedTuple):
    """Hold the programs of one launch: the block that each takes, and units, int32 (programs, 2): its tile and its first run."""

    block_rows: int
    block_cols: int
    aligned: bool
    units: Tensor

    def launch(self, kernel: triton.JITFunction, **arguments: Tensor | float | bool | None) -> None:
        launch(
            kernel, (len(self.units),), WIDE, unit=self.units, ALIGNED=self.aligned, BLOCK_ROWS=self.block_rows,
            BLOCK_COLS=self.block_cols, **arguments,
        )  # fmt: skip


class Sums:
    """Say which values of a buffer are the sums of which others."""

    def __init__(self):
        self._sources, self._sizes, self._places = [], [], []

    def add(self, sources: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> None:
        """Note that the first of `places` is the sum of so many of `sources` as the first of `sizes` says, and so on."""
        self._sources.append(sources)
        self._sizes.append(sizes)
        self._places.append(places)

    def to(self, device: torch.device) -> "Sums":
        """Write all of that down on a device."""
        sources, sizes, places = (
            np.concatenate([np.zeros(0), *of]) for of in (self._sources, self._sizes, self._places)
        )
        self._written = [_on(device, part) for part in (sources, np.cumsum([0, *sizes]), places)]
        return self

    def add_up(self, buffer: Tensor) -> None:
        sources, firsts, places = self._written
        if len(places):
            launch(_add_up, (len(places),), found=buffer, sources=sources, firsts=firsts, places=places, CHUNK=CHUNK)


class Plan(NamedTuple):
    """Hold how the programs of all launches over a flat share its tiles, on the flat's device.

    Attributes:
        tiles, numbers: the tables that kernels read.
        asked, late, all_of_it: what the passes visit: tiles that sums are asked of, those with a late image, and all.
        room: float64 values of the buffer of sums: those of groups, those of bins, and of runs that make up the former.
        groups: how they do so.
        weights: how squares that programs of `all_of_it` find make up those of weights, which lie before them in a buffer.
    """

    tiles: Tensor
    numbers: Tensor
    asked: list[Shape]
    late: list[Shape]
    all_of_it: list[Shape]
    room: int
    groups: Sums
    weights: Sums


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(device)


def plan_of(
    table: Tensor, numel: int, state: int, n_groups: int, n_bins: int, n_weights: int, device: torch.device
) -> Plan:
    """Return the plan of a flat of `numel` elements, `state` of them quantized; groups, bins and weights are those of a step.

    What a step pulls with is no part of it, so that a flat has two or three in a run.
    """
    known = table.clone()
    known[:, Column.PULL] = 0
    return _plan(known.numpy().tobytes(), numel, state, n_groups, n_bins, n_weights, device)


@lru_cache(maxsize=64)
def _plan(
    table: bytes, numel: int, state: int, n_groups: int, n_bins: int, n_weights: int, device: torch.device
) -> Plan:
    numbers = np.frombuffer(table).reshape(-1, len(Column))
    rows = np.where(np.isfinite(numbers), numbers, 0).astype(np.int64)  # the ends of a grid may be infinite
    _check(rows, numel, state, n_groups, n_bins)
    of = {column: rows[:, column] for column in Column}
    quantized = of[Column.N_GROUPS] > 0
    late = quantized & (of[Column.LATE] > 0)
    asked = quantized & (~late | (of[Column.N_BINS] > 0))
    blocks = np.array([min(max(triton.next_power_of_2(int(cols)), NARROWEST), TILE) for cols in of[Column.COLS]])
    runs = of[Column.ROWS] * -(-of[Column.COLS] // blocks)
    tiles = np.zeros((len(rows), FIELDS.value), dtype=np.int64)
    tiles[:, : PLAIN.value] = rows[:, _AS_THEY_ARE]
    tiles[:, PLAIN.value], tiles[:, LATE.value] = of[Column.PLAIN], late
    room, groups = 2 * (n_groups + n_bins), Sums()
    for weight in np.unique(of[Column.WEIGHT][quantized]):
        mine = np.flatnonzero(quantized & (of[Column.WEIGHT] == weight))
        used = _lay_out_sums(mine, rows, runs, tiles, (room, n_groups, n_bins), groups, bool(asked[mine[0]]))
        room += used
    every, weights = _shapes(np.flatnonzero(runs), rows, blocks, runs, device), Sums()
    if n_weights:
        _lay_out_squares(every, of[Column.WEIGHT], quantized, n_weights, weights)
    grid = numbers[:, [Column.QMIN, Column.QMAX, Column.SHIFT, Column.LOW, Column.HIGH]].astype(np.float32, order="C")
    return Plan(
        torch.from_numpy(tiles).to(device), torch.from_numpy(grid).to(device),
        *(_shapes(np.flatnonzero(which), rows, blocks, runs, device) for which in (asked, late)), every, room,
        groups.to(device), weights.to(device),
    )  # fmt: skip


_AS_THEY_ARE = [Column.START, Column.ROWS, Column.COLS, Column.STATE, Column.FIRST_GROUP, Column.N_GROUPS, Column.GROUP,
                Column.BIN, Column.N_BINS]  # fmt: skip


def _check(rows: np.ndarray, numel: int, state: int, n_groups: int, n_bins: int) -> None:
    """Refuse tiles that would have kernels read or write elsewhere, as C++ does."""
    for tile, row in enumerate(rows):
        size, quantized = row[Column.ROWS] * row[Column.COLS], row[Column.N_GROUPS] > 0
        for what, lies in {
            "lie in the flat": size > 0 and 0 <= row[Column.START] <= numel - size,
            "have a tracker": not quantized or 0 <= row[Column.STATE] <= state - size,
            "have scales": not quantized or 0 <= row[Column.GROUP] <= n_groups - row[Column.N_GROUPS],
            "have bins": 0 <= row[Column.BIN] <= n_bins - row[Column.N_BINS] * row[Column.N_GROUPS],
        }.items():
            if not lies:
                raise RuntimeError(f"tile {tile} does not {what}")


def _lay_out_sums(
    mine: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray, sizes: tuple[int, int, int], groups: Sums,
    asked: bool,
) -> int:  # fmt: skip
    """Say in `tiles` where the sums of a weight's tiles `mine` go, and in `groups` what of it is to be added up.

    `sizes` are those of the buffer so far, of all groups and of all bins. Returns how much of the buffer its runs take.
    """
    (room, n_groups, n_bins), first = sizes, rows[mine[0]]
    pieces = runs[mine] // rows[mine, Column.ROWS]
    own = [
        (rows[tile, Column.FIRST_GROUP] + np.arange(runs[tile]) // each) % rows[tile, Column.N_GROUPS]
        for tile, each in zip(mine, pieces, strict=True)
    ]
    group_of, bins = np.concatenate(own), first[Column.N_BINS]
    found, sizes_of = np.unique(group_of, return_counts=True)
    to_sums, to_bins = first[Column.GROUP], 2 * n_groups + first[Column.BIN]
    if sizes_of.max() == 1:
        tiles[mine, ALONE.value :] = 1, to_sums, n_groups, to_bins, n_bins
        return 0
    total, before = len(group_of), np.cumsum([0, *runs[mine][:-1]])
    from_bins = room + 2 * total
    tiles[mine, SUM_AT.value], tiles[mine, SUM_APART.value] = room + before, total
    tiles[mine, BIN_AT.value], tiles[mine, BIN_APART.value] = from_bins + before * bins, total * bins
    order = np.argsort(group_of, kind="stable")
    for k in range(2 if asked else 0):
        groups.add(room + k * total + order, sizes_of, to_sums + k * n_groups + found)
        for b in range(bins):
            source, place = from_bins + k * total * bins + b, to_bins + k * n_bins + b
            groups.add(source + order * bins, sizes_of, place + found * bins)
    return 2 * total * (1 + bins)


def _lay_out_squares(
    every: list[Shape], weight_of: np.ndarray, quantized: np.ndarray, n_weights: int, weights: Sums
) -> None:
    before = 2 * n_weights
    for k in range(2):
        at, parts = before, []
        for shape in every:
            tile = shape.units[:, 0].cpu().numpy()
            programs = np.flatnonzero(quantized[tile])
            parts.append((weight_of[tile[programs]], at + k * len(tile) + programs))
            at += 2 * len(tile)
        weight, source = (np.concatenate(part) for part in zip(*parts, strict=True))
        order, (found, sizes) = np.argsort(weight, kind="stable"), np.unique(weight, return_counts=True)
        weights.add(source[order], sizes, 2 * found + k)


def _shapes(
    wanted: np.ndarray, rows: np.ndarray, blocks: np.ndarray, runs: np.ndarray, device: torch.device
) -> list[Shape]:
    """Share out tiles: one launch for each width of a block, and where rows begin at multiples of 16 one of its own."""
    places = rows[:, [Column.START, Column.STATE, Column.COLS]]
    aligned = (places % ALIGNED == 0).all(1)
    found = []
    for block, whole in sorted({(int(blocks[tile]), bool(aligned[tile])) for tile in wanted}):
        each = TILE // block
        units = [
            np.stack([np.full(-(-runs[tile] // each), tile), np.arange(0, runs[tile], each)], axis=1)
            for tile in wanted
            if blocks[tile] == block and aligned[tile] == whole
        ]
        found.append(Shape(each, block, whole, _on(device, np.concatenate(units))))
    return found


def shard_flat_gather(
    w: Tensor, grad: Tensor, codes: Tensor, frozen: Tensor | None, scale: Tensor, centre: Tensor | None, tiles: Tensor,
    sizes: bool, sums: Tensor, bins: Tensor, isa: int = 0,
) -> None:  # fmt: skip
    """Add to `sums` and `bins` what `ops.shard_step.flat_gather` says."""
    n_groups, n_bins = scale.numel(), bins.numel() // 2
    plan = plan_of(tiles, w.numel(), codes.numel(), n_groups, n_bins, 0, w.device)
    found = w.new_zeros(plan.room, dtype=torch.float64)
    for shape in plan.asked:
        shape.launch(
            _gather, w=w, grad=grad, codes=codes, frozen=frozen, scale=scale, centre=centre, tiles=plan.tiles,
            numbers=plan.numbers, found=found, SIZES=sizes, HAS_CENTRE=centre is not None, HAS_FROZEN=frozen is not None,
        )  # fmt: skip
    plan.groups.add_up(found)
    of_groups, of_bins = found[: 2 * n_groups], found[2 * n_groups : 2 * (n_groups + n_bins)]
    sums += of_groups.view_as(sums)
    bins += of_bins.view_as(bins)


def shard_flat_step(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, image: Tensor, codes: Tensor, direction: Tensor,
    frequency: Tensor, code_mean: Tensor | None, frozen: Tensor | None, before: Tensor, after: Tensor, centre: Tensor | None,
    bins: Tensor, spread: float, tiles: Tensor, decay: float, beta1: float, beta2: float, correction: float, eps: float,
    step: float, momentum: float, threshold: float, norms: Tensor | None, isa: int = 0,
) -> None:  # fmt: skip
    """Step a flat as `ops.shard_step.flat_step` says."""
    counts, totals = bins.view(2, -1)
    n_weights = 0 if norms is None else norms.numel() // 2
    plan = plan_of(tiles, w.numel(), codes.numel(), before.numel(), counts.numel(), n_weights, w.device)
    pulls = (2 * tiles[:, Column.PULL]).float()
    mean = factor = None
    if counts.numel():
        mean = (totals / counts.clamp(min=1)).float()
        factor = torch.where(counts > 1, 2 * spread / (counts - 1).clamp(min=1), 0.0).float()
    pulled = mean is not None or bool(pulls.any())
    squares = None
    if norms is not None and pulled:
        squares = w.new_zeros(2 * (n_weights + sum(len(s.units) for s in plan.all_of_it)), dtype=torch.float64)
    pulls, at = pulls.to(w.device, non_blocking=True), 2 * n_weights
    for shape in plan.all_of_it:
        shape.launch(
            _step, w=w, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, image=image, codes=codes, direction=direction,
            frequency=frequency, code_mean=code_mean, frozen=frozen, before=before, after=after, centre=centre, mean=mean,
            factor=factor, pulls=pulls, squares=None if squares is None else squares[at:], n_units=len(shape.units),
            tiles=plan.tiles, numbers=plan.numbers, **adamw_numbers(decay, beta1, beta2, correction, eps, step),
            momentum=float(momentum), keep=1.0 - momentum, threshold=float(threshold), PULLED=pulled,
            HAS_TABLES=mean is not None, HAS_CENTRE=centre is not None, HAS_NORMS=squares is not None,
            FREEZES=frozen is not None,
        )  # fmt: skip
        at += 2 * len(shape.units)
    if squares is not None:
        plan.weights.add_up(squares)
        norms += squares[: 2 * n_weights].view_as(norms)


def shard_flat_image(
    w: Tensor, image: Tensor, codes: Tensor, direction: Tensor, frequency: Tensor, code_mean: Tensor | None,
    frozen: Tensor | None, scale: Tensor, centre: Tensor | None, tiles: Tensor, momentum: float, threshold: float, isa: int = 0,
) -> None:  # fmt: skip
    """Leave the images of late tiles in `image`, as `ops.shard_step.flat_image` says."""
    n_bins = int((tiles[:, Column.BIN] + tiles[:, Column.N_BINS] * tiles[:, Column.N_GROUPS]).max())
    plan = plan_of(tiles, w.numel(), codes.numel(), scale.numel(), n_bins, 0, w.device)
    for shape in plan.late:
        shape.launch(
            _late_image, w=w, image=image, codes=codes, direction=direction, frequency=frequency, code_mean=code_mean,
            frozen=frozen, scale=scale, centre=centre, tiles=plan.tiles, numbers=plan.numbers, momentum=float(momentum),
            keep=1.0 - momentum, threshold=float(threshold), HAS_CENTRE=centre is not None, FREEZES=frozen is not None,
        )  # fmt: skip


OPERATORS = (shard_flat_gather, shard_flat_step, shard_flat_image)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled: narrow and wide rows, one scale for all, odd places."""
    shapes = (192, 192), (192, 768), (1, 192 * 192), (30, 50)
    table = torch.zeros(len(shapes), len(Column), dtype=torch.float64)
    at = groups = bins = 0
    for index, (row, (rows, cols)) in enumerate(zip(table, shapes, strict=True)):
        for column, value in {
            Column.START: at, Column.STATE: at, Column.ROWS: rows, Column.COLS: cols, Column.N_GROUPS: rows,
            Column.GROUP: groups, Column.BIN: bins, Column.N_BINS: 4, Column.WEIGHT: index, Column.QMIN: -2, Column.QMAX: 1,
            Column.LOW: -2, Column.HIGH: 1, Column.PULL: 0.1, Column.LATE: index % 2,
        }.items():  # fmt: skip
            row[column] = value
        at, groups, bins = at + rows * cols, groups + rows, bins + 4 * rows
    w, grad, m, v, image, often = torch.zeros(6, at)
    codes, direction = torch.zeros(2, at, dtype=torch.int8)
    scale, still, norms = (
        torch.ones(groups),
        torch.zeros(at, dtype=torch.bool),
        torch.zeros(len(shapes), 2, dtype=torch.float64),
    )
    sums, held = torch.zeros(2, groups, dtype=torch.float64), torch.zeros(2, bins, dtype=torch.float64)
    adam = (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    for centre, mean, frozen, squares in ((None, None, None, None), (scale, often, still, norms)):
        shard_flat_gather(w, grad, codes, frozen, scale, centre, table, True, sums, held)
        tracker = (codes, direction, often, mean, frozen)
        rest = (held, 0.1, table, *adam, 0.1, 0.1, squares)
        shard_flat_step(w, grad, m, v, image, *tracker, scale, scale, centre, *rest)
        shard_flat_image(w, image, *tracker, scale, centre, table, 0.1, 0.1)
