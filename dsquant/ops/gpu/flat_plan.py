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
from dsquant.ops.gpu.shard_step import WIDE, WIDER
from dsquant.ops.shard_step import LONGEST_RUN, Column

NARROWEST = 32  # columns of a block: a warp's width
ALIGNED = 16  # elements: where rows begin at multiples of it, a thread reads 16 bytes at a time
LONGEST_ROW = LONGEST_RUN["triton"]  # that a program takes whole
CHUNK = 1024  # partial sums that are added up at a time

# What the table of tiles says of one, int64. The first nine are as in `ops.shard_step.Column`; the others say how to sum it, and
# where in a buffer: the i-th sum (of a group that one program sees whole: ALONE, else of a run) of d scale and of bin b lie at
# SUM_AT + i and BIN_AT + i * N_BINS + b, and the other sums that far APART. Moments of the
# i-th run lie at MOMENT_AT + 3 i in a buffer of their own.
START, ROWS, COLS, STATE, FIRST_GROUP, N_GROUPS, GROUP, BIN, N_BINS = (tl.constexpr(i) for i in range(9))
PLAIN, LATE, ALONE, SUM_AT, SUM_APART, BIN_AT, BIN_APART, MOMENT_AT = (tl.constexpr(i) for i in range(9, 17))
FIELDS = tl.constexpr(17)
NUMBERS = tl.constexpr(5)  # float32: qmin, qmax, shift, low, high


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


class Shape(NamedTuple):
    """Hold the programs of one launch: the block that each takes, and units, int32 (programs, 2): its tile and its first run."""

    block_rows: int
    block_cols: int
    aligned: bool
    units: Tensor

    def launch(self, kernel: triton.JITFunction, **arguments: Tensor | float | bool | None) -> None:
        wide = WIDE if self.block_rows * self.block_cols <= TILE else WIDER
        launch(
            kernel, (len(self.units),), wide, unit=self.units, ALIGNED=self.aligned, BLOCK_ROWS=self.block_rows,
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
        whole: tiles that one pass steps, each of whose rows fits into a block.
        asked, late, all_of_it: what other passes visit: tiles that sums are asked of, those with a late image, and all others.
        room: float64 values of the buffer of sums: those of groups, those of bins, and of runs that make up the former.
        groups: how they do so.
        moment_room, moments: the same of the moments of late tiles, the three of a group side by side.
        weights, whole_weights: how squares that programs of `all_of_it` and of `whole` find make up those of weights, which lie
            before them in a buffer.
    """

    tiles: Tensor
    numbers: Tensor
    whole: list[Shape]
    asked: list[Shape]
    late: list[Shape]
    all_of_it: list[Shape]
    room: int
    groups: Sums
    moment_room: int
    moments: Sums
    weights: Sums
    whole_weights: Sums


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
    _check(rows, numbers[:, Column.FACTOR] != 0, numel, state, n_groups, n_bins)
    of = {column: rows[:, column] for column in Column}
    quantized = of[Column.N_GROUPS] > 0
    late, whole = quantized & (of[Column.LATE] > 0), numbers[:, Column.FACTOR] != 0
    asked = quantized & ~whole & (~late | (of[Column.N_BINS] > 0))
    longest = np.where(whole, LONGEST_ROW, TILE)
    widths = [max(triton.next_power_of_2(int(cols)), NARROWEST) for cols in of[Column.COLS]]
    blocks = np.minimum(widths, longest)
    runs = of[Column.ROWS] * -(-of[Column.COLS] // blocks)
    tiles = np.zeros((len(rows), FIELDS.value), dtype=np.int64)
    tiles[:, : PLAIN.value] = rows[:, _AS_THEY_ARE]
    tiles[:, PLAIN.value], tiles[:, LATE.value] = of[Column.PLAIN], late
    room, groups = 2 * (n_groups + n_bins), Sums()
    for weight in np.unique(of[Column.WEIGHT][quantized & ~whole]):
        mine = np.flatnonzero(quantized & ~whole & (of[Column.WEIGHT] == weight))
        used = _lay_out_sums(mine, rows, runs, tiles, (room, n_groups, n_bins), groups, bool(asked[mine[0]]))
        room += used
    moment_room, moments = _lay_out_moments(np.flatnonzero(late), rows, runs, tiles, n_groups)
    in_one, every, of_late, of_asked = (
        _shapes(np.flatnonzero(which), rows, blocks, runs, device) for which in (whole, ~whole, late, asked)
    )
    weights, whole_weights = Sums(), Sums()
    if n_weights:
        _lay_out_squares(every, of[Column.WEIGHT], quantized, n_weights, weights)
        _lay_out_squares(in_one, of[Column.WEIGHT], quantized, n_weights, whole_weights)
    grid = numbers[:, [Column.QMIN, Column.QMAX, Column.SHIFT, Column.LOW, Column.HIGH]].astype(np.float32, order="C")
    return Plan(
        torch.from_numpy(tiles).to(device), torch.from_numpy(grid).to(device), in_one, of_asked, of_late, every, room,
        groups.to(device), moment_room, moments.to(device), weights.to(device), whole_weights.to(device),
    )  # fmt: skip


_AS_THEY_ARE = [Column.START, Column.ROWS, Column.COLS, Column.STATE, Column.FIRST_GROUP, Column.N_GROUPS, Column.GROUP,
                Column.BIN, Column.N_BINS]  # fmt: skip


def _one_run_a_group(row: np.ndarray) -> bool:
    return row[Column.ROWS] <= row[Column.N_GROUPS] and row[Column.COLS] <= LONGEST_ROW and not row[Column.LATE]


def _check(rows: np.ndarray, whole: np.ndarray, numel: int, state: int, n_groups: int, n_bins: int) -> None:
    """Refuse tiles that would have kernels read or write elsewhere, as C++ does."""
    for tile, row in enumerate(rows):
        size, quantized = row[Column.ROWS] * row[Column.COLS], row[Column.N_GROUPS] > 0
        for what, lies in {
            "lie in the flat": size > 0 and 0 <= row[Column.START] <= numel - size,
            "have a tracker": not quantized or 0 <= row[Column.STATE] <= state - size,
            "have scales": not quantized or 0 <= row[Column.GROUP] <= n_groups - row[Column.N_GROUPS],
            "have bins": whole[tile] or 0 <= row[Column.BIN] <= n_bins - row[Column.N_BINS] * row[Column.N_GROUPS],
        }.items():
            if not lies:
                raise RuntimeError(f"tile {tile} does not {what}")
        if whole[tile] and not _one_run_a_group(row):
            raise RuntimeError(f"tile {tile} is not of groups of one run each")


def _groups_of(tile: int, rows: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Return the group of each run of a tile among those of its weight."""
    pieces = runs[tile] // rows[tile, Column.ROWS]
    return (rows[tile, Column.FIRST_GROUP] + np.arange(runs[tile]) // pieces) % rows[tile, Column.N_GROUPS]


def _lay_out_moments(
    late: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray, n_groups: int
) -> tuple[int, Sums]:
    """Say in `tiles` where the moments of late tiles' runs go, behind those of all groups; return the buffer's size, and sums."""
    moments, room = Sums(), 3 * n_groups
    if not len(late):
        return room, moments
    tiles[late, MOMENT_AT.value] = room + 3 * np.cumsum([0, *runs[late][:-1]])
    group_of = np.concatenate([rows[tile, Column.GROUP] + _groups_of(tile, rows, runs) for tile in late])
    found, sizes = np.unique(group_of, return_counts=True)
    order = np.argsort(group_of, kind="stable")
    for k in range(3):
        moments.add(room + 3 * order + k, sizes, 3 * found + k)
    return room + 3 * len(group_of), moments


def _lay_out_sums(
    mine: np.ndarray, rows: np.ndarray, runs: np.ndarray, tiles: np.ndarray, sizes: tuple[int, int, int], groups: Sums,
    asked: bool,
) -> int:  # fmt: skip
    """Say in `tiles` where the sums of a weight's tiles `mine` go, and in `groups` what of it is to be added up.

    `sizes` are those of the buffer so far, of all groups and of all bins. Returns how much of the buffer its runs take.
    """
    (room, n_groups, n_bins), first = sizes, rows[mine[0]]
    group_of, bins = np.concatenate([_groups_of(tile, rows, runs) for tile in mine]), first[Column.N_BINS]
    found, sizes_of = np.unique(group_of, return_counts=True)
    to_sums, to_bins = first[Column.GROUP], 2 * n_groups + first[Column.BIN]
    if sizes_of.max() == 1:
        tiles[mine, ALONE.value : MOMENT_AT.value] = 1, to_sums, n_groups, to_bins, n_bins
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
    for k in range(2 if every else 0):
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
        each = max(1, TILE // block)
        units = [
            np.stack([np.full(-(-runs[tile] // each), tile), np.arange(0, runs[tile], each)], axis=1)
            for tile in wanted
            if blocks[tile] == block and aligned[tile] == whole
        ]
        found.append(Shape(each, block, whole, _on(device, np.concatenate(units))))
    return found
