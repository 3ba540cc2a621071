"""How the programs of a launch share the tiles of a flat, for `shard_flat.py`.

Tables say what is where, so that one launch serves weights of any number and size. Sums that several programs find are added up
in one order: neither threads nor the way ZeRO cuts a weight must show, and there are no atomics.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import TILE
from dsquant.ops.gpu.launch import launch
from dsquant.ops.gpu.shard_step import WIDE
from dsquant.ops.shard_step import Column

NARROWEST = 32  # columns of a block: a warp's width
SEVERAL = TILE // 2  # elements that a program of several rows takes: what it holds of each row takes registers, too
ALIGNED = 16  # elements: where rows begin at multiples of it, a thread reads 16 bytes at a time
CHUNK = 1024  # partial sums that are added up at a time

# What the table of tiles says of one, int64. The first nine are as in `ops.shard_step.Column`; the others say how to sum it, and
# where to. Groups of a weight that are each in one run (a piece of a row that one program takes) are ALONE: the i-th group's d
# scale goes to SUM_AT + i of all groups' sums, and what its bins hold to BIN_AT + 2 i N_BINS of all bins. Else that holds for
# the i-th run, and of a buffer that has parts of sums. |w| goes SUM_APART from d scale. Moments of the i-th run go to
# MOMENT_AT + 3 i of a buffer of their own.
START, ROWS, COLS, STATE, FIRST_GROUP, N_GROUPS, GROUP, BIN, N_BINS = (tl.constexpr(i) for i in range(9))
PLAIN, LATE, ALONE, SUM_AT, SUM_APART, BIN_AT, MOMENT_AT = (tl.constexpr(i) for i in range(9, 16))
FIELDS = tl.constexpr(16)
NUMBERS = tl.constexpr(5)  # float32: qmin, qmax, shift, low, high


@triton.jit
def _add_up(found, into, sources, firsts, places, CHUNK: tl.constexpr):
    """Add up what belongs together: into[places[p]] = sum of found[sources[i]] for firsts[p] <= i < firsts[p + 1]."""
    first, last = tl.load(firsts + tl.program_id(0)), tl.load(firsts + tl.program_id(0) + 1)
    total = tl.zeros((CHUNK,), tl.float64)
    for i in range(first, last, CHUNK):
        at = i + tl.arange(0, CHUNK)
        source = tl.load(sources + at, mask=at < last, other=0)
        total += tl.load(found + source, mask=at < last, other=0.0)
    tl.store(into + tl.load(places + tl.program_id(0)), tl.sum(total))


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
    """Say which values of a tensor are the sums of which parts in a buffer."""

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

    def add_up(self, found: Tensor, into: Tensor) -> None:
        """Put the sums of the parts `found` in their places; other values of `into` stay as they are."""
        sources, firsts, places = self._written
        if len(places):
            launch(
                _add_up,
                (len(places),),
                found=found,
                into=into,
                sources=sources,
                firsts=firsts,
                places=places,
                CHUNK=CHUNK,
            )


class Plan(NamedTuple):
    """Hold how the programs of all launches over a flat share its tiles, on the flat's device.

    Attributes:
        tiles, numbers: the tables that kernels read.
        all_of_it, binned, late: all tiles, those with bins, and those with a late image.
        room: float64 values of the buffer of parts of sums.
        groups, bins, late_bins: how they make up those of groups, and what bins hold of tiles with an image now and later.
        moment_room, moments: the same of the moments of late tiles, the three of a group side by side.
        weights: how the squares that programs of `all_of_it` find make up those of weights.
    """

    tiles: Tensor
    numbers: Tensor
    all_of_it: list[Shape]
    binned: list[Shape]
    late: list[Shape]
    room: int
    groups: Sums
    bins: Sums
    late_bins: Sums
    moment_room: int
    moments: Sums
    weights: Sums


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(device)


class Sizes(NamedTuple):
    """Hold how large is what lies beside a flat's `numel` elements.

    Attributes:
        state: elements of trackers.
        groups, bins: scales of all groups, and values of all bins.
        sums, weights: how many sums are asked of a group, and of how many weights squares are asked.
    """

    numel: int
    state: int
    groups: int
    bins: int
    sums: int = 0
    weights: int = 0


def plan_of(table: Tensor, sizes: Sizes, device: torch.device) -> Plan:
    """Return the plan of a flat.

    What a step pulls with is no part of it, so that a flat has a few in a run.
    """
    known = table.clone()
    known[:, Column.PULL] = 0
    return _plan(known.numpy().tobytes(), sizes, device)


@lru_cache(maxsize=64)
def _plan(table: bytes, sizes: Sizes, device: torch.device) -> Plan:
    numbers = np.frombuffer(table).reshape(-1, len(Column))
    rows = np.where(np.isfinite(numbers), numbers, 0).astype(np.int64)  # the ends of a grid may be infinite
    _check(rows, sizes)
    of = {column: rows[:, column] for column in Column}
    quantized = of[Column.N_GROUPS] > 0
    late, binned = quantized & (of[Column.LATE] > 0), quantized & (of[Column.N_BINS] > 0)
    blocks = np.array([min(max(triton.next_power_of_2(int(cols)), NARROWEST), TILE) for cols in of[Column.COLS]])
    runs = of[Column.ROWS] * -(-of[Column.COLS] // blocks)
    tiles = np.zeros((len(rows), FIELDS.value), dtype=np.int64)
    tiles[:, : PLAIN.value] = rows[:, _AS_THEY_ARE]
    tiles[:, PLAIN.value], tiles[:, LATE.value] = of[Column.PLAIN], late
    room = _lay_out_sums(quantized, rows, runs, tiles, sizes.groups)
    cut = quantized & (tiles[:, ALONE.value] == 0)
    groups = _sums_of(np.flatnonzero(cut & ~late), rows, runs, tiles, sizes.sums, sizes.groups)
    bins, late_bins = (_bins_of(np.flatnonzero(cut & binned & which), rows, runs, tiles) for which in (~late, late))
    moment_room, moments = _lay_out_moments(np.flatnonzero(late), rows, runs, tiles)
    every, of_binned, of_late = (
        _shapes(np.flatnonzero(which), rows, blocks, runs, device) for which in (runs > 0, binned, late)
    )
    weights = _lay_out_squares(every, of[Column.WEIGHT], quantized, sizes.weights)
    grid = numbers[:, [Column.QMIN, Column.QMAX, Column.SHIFT, Column.LOW, Column.HIGH]].astype(np.float32, order="C")
    return Plan(
        torch.from_numpy(tiles).to(device), torch.from_numpy(grid).to(device), every, of_binned, of_late, room,
        groups.to(device), bins.to(device), late_bins.to(device), moment_room, moments.to(device), weights.to(device),
    )  # fmt: skip


_AS_THEY_ARE = [Column.START, Column.ROWS, Column.COLS, Column.STATE, Column.FIRST_GROUP, Column.N_GROUPS, Column.GROUP,
                Column.BIN, Column.N_BINS]  # fmt: skip


def _check(rows: np.ndarray, sizes: Sizes) -> None:
    """Refuse tiles that would have kernels read or write elsewhere, as C++ does."""
    for tile, row in enumerate(rows):
        size, quantized = row[Column.ROWS] * row[Column.COLS], row[Column.N_GROUPS] > 0
        held = 2 * row[Column.N_BINS] * row[Column.N_GROUPS]
        for what, lies in {
            "lie in the flat": size > 0 and 0 <= row[Column.START] <= sizes.numel - size,
            "have a tracker": not quantized or 0 <= row[Column.STATE] <= sizes.state - size,
            "have scales": not quantized or 0 <= row[Column.GROUP] <= sizes.groups - row[Column.N_GROUPS],
            "have bins": not held or 0 <= row[Column.BIN] <= sizes.bins - held,
        }.items():
            if not lies:
                raise RuntimeError(f"tile {tile} does not {what}")


def _groups_of(tiles: np.ndarray, rows: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Return the group of each run of some tiles among all groups."""
    found = [np.zeros(0, dtype=np.int64)]
    for tile in tiles:
        first, n_groups, start = rows[tile, [Column.FIRST_GROUP, Column.N_GROUPS, Column.GROUP]]
        pieces = runs[tile] // rows[tile, Column.ROWS]
        found.append(start + (first + np.arange(runs[tile]) // pieces) % n_groups)
    return np.concatenate(found)


def _before(sizes: np.ndarray) -> np.ndarray:
    """Return where each of some parts begins that lie one behind the other."""
    return np.cumsum(sizes) - sizes


def _of_weights(tiles: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Return tiles by weight."""
    weight_of = rows[tiles, Column.WEIGHT]
    return [tiles[weight_of == weight] for weight in np.unique(weight_of)]


def _lay_out_sums(quantized: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray, n_groups: int) -> int:
    """Say in `tiles` where sums go; return the size of the buffer that has parts of them: d scale, |w|, and bins."""
    alone = np.zeros_like(quantized)
    for mine in _of_weights(np.flatnonzero(quantized), rows):
        alone[mine] = np.unique(_groups_of(mine, rows, runs), return_counts=True)[1].max() == 1
    cut = quantized & ~alone
    n_runs, held = runs[cut].sum(), 2 * rows[cut, Column.N_BINS] * runs[cut]
    tiles[:, ALONE.value], tiles[:, SUM_APART.value] = alone, np.where(alone, n_groups, n_runs)
    tiles[alone, SUM_AT.value], tiles[alone, BIN_AT.value] = rows[alone, Column.GROUP], rows[alone, Column.BIN]
    tiles[cut, SUM_AT.value], tiles[cut, BIN_AT.value] = _before(runs[cut]), 2 * n_runs + _before(held)
    return int(2 * n_runs + held.sum())


def _parts(
    mine: np.ndarray, rows: np.ndarray, runs: np.ndarray, firsts: np.ndarray, each: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the parts of some tiles' groups lie, how many each group has, and which groups these are.

    A tile's runs have `each` values from its place in `firsts` on.
    """
    sources = np.concatenate([np.zeros(0), *(firsts[tile] + each * np.arange(runs[tile]) for tile in mine)])
    group_of = _groups_of(mine, rows, runs)
    found, counts = np.unique(group_of, return_counts=True)
    return sources[np.argsort(group_of, kind="stable")], counts, found


def _sums_of(
    summed: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray, n_sums: int, n_groups: int
) -> Sums:
    """Return what makes up the sums of groups that several runs have a part of."""
    groups, (sources, counts, found) = Sums(), _parts(summed, rows, runs, tiles[:, SUM_AT.value], 1)
    for k in range(n_sums if len(summed) else 0):
        groups.add(sources + k * tiles[summed[0], SUM_APART.value], counts, found + k * n_groups)
    return groups


def _bins_of(summed: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray) -> Sums:
    """Return what makes up that which bins of such groups hold."""
    bins = Sums()
    for mine in _of_weights(summed, rows):
        first = rows[mine[0]]
        each = 2 * first[Column.N_BINS]
        sources, counts, found = _parts(mine, rows, runs, tiles[:, BIN_AT.value], each)
        for b in range(each):
            bins.add(sources + b, counts, first[Column.BIN] + each * (found - first[Column.GROUP]) + b)
    return bins


def _lay_out_moments(late: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray) -> tuple[int, Sums]:
    """Say in `tiles` where the moments of late tiles' runs go; return the size of their buffer, and what makes up a group's."""
    tiles[late, MOMENT_AT.value] = 3 * _before(runs[late])
    moments, (sources, counts, found) = Sums(), _parts(late, rows, runs, tiles[:, MOMENT_AT.value], 3)
    for k in range(3):
        moments.add(sources + k, counts, 3 * found + k)
    return int(3 * runs[late].sum()), moments


def _lay_out_squares(every: list[Shape], weight_of: np.ndarray, quantized: np.ndarray, n_weights: int) -> Sums:
    """Return what makes up the squares of weights: those of a launch's programs, of one kind and then of the other."""
    weights = Sums()
    for k in range(2 if n_weights else 0):
        at, parts = 0, []
        for shape in every:
            tile = shape.units[:, 0].cpu().numpy()
            programs = np.flatnonzero(quantized[tile])
            parts.append((weight_of[tile[programs]], at + k * len(tile) + programs))
            at += 2 * len(tile)
        weight, source = (np.concatenate(part) for part in zip(*parts, strict=True))
        order, (found, sizes) = np.argsort(weight, kind="stable"), np.unique(weight, return_counts=True)
        weights.add(source[order], sizes, 2 * found + k)
    return weights


def _shapes(
    wanted: np.ndarray, rows: np.ndarray, blocks: np.ndarray, runs: np.ndarray, device: torch.device
) -> list[Shape]:
    """Share out tiles: one launch for each width of a block, and where rows begin at multiples of 16 one of its own."""
    places = rows[:, [Column.START, Column.STATE, Column.COLS]]
    aligned = (places % ALIGNED == 0).all(1)
    found = []
    for block, whole in sorted({(int(blocks[tile]), bool(aligned[tile])) for tile in wanted}):
        each = max(1, SEVERAL // block)
        units = [
            np.stack([np.full(-(-runs[tile] // each), tile), np.arange(0, runs[tile], each)], axis=1)
            for tile in wanted
            if blocks[tile] == block and aligned[tile] == whole
        ]
        found.append(Shape(each, block, whole, _on(device, np.concatenate(units))))
    return found
