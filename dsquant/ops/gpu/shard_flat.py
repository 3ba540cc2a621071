"""The shard step of a whole flat as Triton kernels: what `csrc/shard_step.cpp` does for CPU, arithmetic in the same order.

A program takes some rows of a tile, or a piece of a long row; which, it reads from the tables of `flat_plan.py`. So the number
of launches is that of the block shapes that rows ask for, whatever the number of weights. Sums over elements are float64 from
the first. A group that one program sees whole is written to its place, the others' parts are added up in one order.
"""

import sys
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import clip
from dsquant.ops.gpu.flat_plan import (
    ALONE,
    BIN,
    BIN_AT,
    COLS,
    FIELDS,
    FIRST_GROUP,
    GROUP,
    LATE,
    MOMENT_AT,
    N_BINS,
    N_GROUPS,
    NUMBERS,
    PLAIN,
    ROWS,
    START,
    STATE,
    SUM_APART,
    SUM_AT,
    Plan,
    Sizes,
    plan_of,
)
from dsquant.ops.gpu.shard_step import adamw_numbers, adamw_step, show
from dsquant.ops.shard_step import Column

PARTS, NEAR = tl.constexpr(2.0**22), tl.constexpr(15.0)  # as in `shard/regularizers.py`
WHOLE = tl.constexpr(1.5 * 2.0**52)


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
def _of_scales(x, s, level, g, free, plain):
    """Return the gradients of the scales of rows, float64; `free` are the elements whose gradient passes."""
    of_scale = (level * s - tl.where(free, x, 0.0) * (plain == 0).to(tl.float32)) * g
    return tl.sum(of_scale.to(tl.float64), axis=1) / tl.sum(s.to(tl.float64), axis=1)


@triton.jit
def _in_parts(x, s, low, high):
    """Return x / s, clipped, in whole parts of a scale (`regularizers.in_parts`)."""
    inf = float("inf")
    low, high = tl.where(low == -inf, -NEAR, low), tl.where(high == inf, NEAR, high)
    parts = clip(x * tl.math.div_rn(tl.zeros_like(s) + PARTS, s), low * PARTS, high * PARTS).to(tl.float64)
    return ((parts + WHOLE) - WHOLE).to(tl.float32)  # float64 holds no fraction beside it


@triton.jit
def _place(tile, of_groups, found, at, own, run, each):
    """Return where rows put their sums, `each` values a row: with those of all groups, or with parts to be added up."""
    alone = tl.load(tile + ALONE) != 0
    return tl.where(alone, of_groups, found) + tl.load(tile + at) + tl.where(alone, own, run.to(tl.int64)) * each


@triton.jit
def _put_bins(bins, found, unit, tile, numbers, own, run, x, s, shown, there, here):
    """Put what rows hold in each bin: how many elements, and the sum of their values. Codes are told by their images `shown`."""
    qmin, _, shift, low, high = _grid(numbers, unit)  # read again, where the caller has: a step has few registers left
    n_bins = tl.load(tile + N_BINS).to(tl.int32)
    at, parts = _place(tile, bins, found, BIN_AT, own, run, 2 * n_bins), _in_parts(x, s, low, high)
    for b in range(n_bins):
        held = (shown == (qmin + b + shift) * s) & there
        tl.store(at + b, tl.sum(held.to(tl.int32), axis=1).to(tl.float64), mask=here)
        tl.store(at + n_bins + b, tl.sum(tl.where(held, parts, 0.0).to(tl.float64), axis=1), mask=here)


@triton.jit
def _bins(w, codes, scale, centre, bins, found, unit, tiles, numbers, HAS_CENTRE: tl.constexpr, ALIGNED: tl.constexpr,
          BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, run, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    group = tl.load(tile + GROUP) + own
    s = _of_rows(scale, group, here)
    x = tl.load(w + start + where, mask=there, other=0.0)
    if HAS_CENTRE:
        x = x - _of_rows(centre, group, here)
    _, _, shift, _, _ = _grid(numbers, unit)
    shown = (tl.load(codes + state + where, mask=there, other=0).to(tl.float32) + shift) * s
    _put_bins(bins, found, unit, tile, numbers, own, run, x, s, shown, there, here)


@triton.jit
def _keep_norms(squares, n_units, task, pull):
    """Keep the squared norms of a program's part of both gradients."""
    task, pull = task.to(tl.float64), pull.to(tl.float64)
    tl.store(squares + tl.program_id(0), tl.sum(task * task))
    tl.store(squares + n_units + tl.program_id(0), tl.sum(pull * pull))


@triton.jit
def _moved(w, g, exp_avg, exp_avg_sq, there, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step):
    """Return w after a step of AdamW, and step its moments, which lie at exp_avg and exp_avg_sq."""
    m, square = tl.load(exp_avg, mask=there, other=0.0), tl.load(exp_avg_sq, mask=there, other=0.0)
    w, m, square = adamw_step(w, g, m, square, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step)
    tl.store(exp_avg, m, mask=there)
    tl.store(exp_avg_sq, square, mask=there)
    return w


@triton.jit
def _pull(x, s, code, held, spread, pull, n_bins, qmin, shift, here):
    """Return the gradient of dampening, or of both terms of OBR where rows have bins, which hold `held`.

    spread and pull are twice the factors of the two, float64 (`regularizers.regularizer_gradient`).
    """
    found, wide = (x - (code + shift) * s) * pull.to(tl.float32), s.to(tl.float64)
    for b in range(n_bins):
        count = tl.load(held + b, mask=here, other=0.0)[:, None]
        total = tl.load(held + n_bins + b, mask=here, other=0.0)[:, None]
        mean = total / tl.maximum(count, 1.0) * (wide / PARTS)
        factor = tl.where(count > 1, spread / tl.maximum(count - 1, 1.0), 0.0)
        goal = ((qmin + b + shift).to(tl.float64) * wide * pull + mean * factor).to(tl.float32)
        drawn = tl.math.fma(x, (factor + pull).to(tl.float32) + tl.zeros_like(x), -goal)
        found = tl.where(code == qmin + b, drawn, found)
    return found


@triton.jit
def _step(w, grad, exp_avg, exp_avg_sq, image, codes, direction, frequency, code_mean, frozen, before, after, centre, held,
          factors, squares, n_units, sums, bins, found, unit, tiles, numbers, decay, one_minus_beta1, beta2, one_minus_beta2,
          correction, eps, step, momentum, keep, gain, threshold, SIZES: tl.constexpr, PULLED: tl.constexpr,
          HAS_CENTRE: tl.constexpr, HAS_NORMS: tl.constexpr, FREEZES: tl.constexpr, ALIGNED: tl.constexpr,
          BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, run, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    qmin, qmax, shift, low, high = _grid(numbers, unit)
    quantized, late = tl.load(tile + N_GROUPS) > 0, tl.load(tile + LATE) != 0
    now = quantized & (late == 0)
    group = tl.load(tile + GROUP) + own
    of_tile = factors + 1 + 2 * tl.load(unit + 2 * tl.program_id(0))
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
    g = tl.load(grad + start + where, mask=there, other=0.0)
    code = tl.load(codes + state + where, mask=of_quantized, other=0).to(tl.float32)
    level = code + shift
    at = _place(tile, sums, found, SUM_AT, own, run, 1)
    of_scale = _of_scales(x, s, level, g, free, tl.load(tile + PLAIN)) * tl.load(of_tile + 1)
    tl.store(at, of_scale, mask=here & now)
    if SIZES:
        tl.store(at + tl.load(tile + SUM_APART), tl.sum(tl.abs(x).to(tl.float64), axis=1), mask=here & now)
    g = tl.where(free | (quantized == 0), g, 0.0)
    if PULLED:
        n_bins = tl.load(tile + N_BINS).to(tl.int32)
        of_rows = held + tl.load(tile + BIN) + own * 2 * n_bins
        pull = _pull(x, s, code, of_rows, tl.load(factors), tl.load(of_tile), n_bins, qmin, shift, here)
        pull = tl.where(free, pull, 0.0)
        if HAS_NORMS:
            _keep_norms(squares, n_units, g, tl.where(there, pull, 0.0))
        g = g + pull
    kept = _moved(kept, g, exp_avg + start + where, exp_avg_sq + start + where, there, decay, one_minus_beta1, beta2,
                  one_minus_beta2, correction, eps, step)  # fmt: skip
    s = _of_rows(after, group, here & quantized)
    x = kept
    if HAS_CENTRE:
        x = tl.where(of_quantized, kept - middle, kept)
    latent, shown = show(
        kept, x, s, codes, direction, frequency, code_mean, frozen, state, where, there & now, qmin, qmax, shift, momentum,
        keep, gain, threshold, FREEZES,
    )  # fmt: skip
    kept, shown = tl.where(now, latent, kept), tl.where(now, shown, kept)
    tl.store(w + start + where, kept, mask=there)
    tl.store(image + start + where, shown, mask=there & (late == 0))
    if HAS_CENTRE:
        kept = kept - middle
    _put_bins(bins, found, unit, tile, numbers, own, run, kept, s, shown, there, here & now)


@triton.jit
def _moments(w, unit, tiles, found, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    tile, start, _, where, there, here, run, _ = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    x = tl.load(w + start + where, mask=there, other=0.0).to(tl.float64)
    at = found + tl.load(tile + MOMENT_AT) + 3 * run
    tl.store(at, tl.sum(tl.abs(x), axis=1), mask=here)
    tl.store(at + 1, tl.sum(x, axis=1), mask=here)
    tl.store(at + 2, tl.sum(x * x, axis=1), mask=here)


@triton.jit
def _late_image(w, image, codes, direction, frequency, code_mean, frozen, scale, centre, bins, found, unit, tiles, numbers,
                momentum, keep, gain, threshold, HAS_CENTRE: tl.constexpr, FREEZES: tl.constexpr, ALIGNED: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, run, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    qmin, qmax, shift, _, _ = _grid(numbers, unit)
    group = tl.load(tile + GROUP) + own
    s = _of_rows(scale, group, here)
    kept = tl.load(w + start + where, mask=there, other=0.0)
    x = kept
    if HAS_CENTRE:
        middle = _of_rows(centre, group, here)
        x = kept - middle
    kept, shown = show(
        kept, x, s, codes, direction, frequency, code_mean, frozen, state, where, there, qmin, qmax, shift, momentum, keep,
        gain, threshold, FREEZES,
    )  # fmt: skip
    tl.store(w + start + where, kept, mask=there)
    tl.store(image + start + where, shown, mask=there)
    if HAS_CENTRE:
        kept = kept - middle
    _put_bins(bins, found, unit, tile, numbers, own, run, kept, s, shown, there, here)


def _room(plan: Plan, beside: Tensor) -> Tensor:
    """Return the buffer for parts of sums."""
    return beside.new_empty(plan.room, dtype=torch.float64)


@lru_cache(maxsize=16)
def _factors(spread: float, of_tiles: bytes, device: torch.device) -> Tensor:
    """Return float64 2 * spread, then of each tile 2 * pull and the factor of d scale; they change where a schedule does."""
    told = torch.frombuffer(bytearray(of_tiles), dtype=torch.float64).view(-1, 2) * torch.tensor([2.0, 1.0]).double()
    return torch.cat([told.new_tensor([2 * spread]), told.view(-1)]).to(device, non_blocking=True)


def shard_flat_bins(
    w: Tensor, codes: Tensor, scale: Tensor, centre: Tensor | None, tiles: Tensor, bins: Tensor, isa: int = 0
) -> None:
    """Put into `bins` what `ops.shard_step.flat_bins` says."""
    plan = plan_of(tiles, Sizes(w.numel(), codes.numel(), scale.numel(), bins.numel()), w.device)
    found = _room(plan, w)
    for shape in plan.binned:
        shape.launch(
            _bins, w=w, codes=codes, scale=scale, centre=centre, bins=bins, found=found, tiles=plan.tiles,
            numbers=plan.numbers, HAS_CENTRE=centre is not None,
        )  # fmt: skip
    plan.bins.add_up(found, bins)
    plan.late_bins.add_up(found, bins)


def shard_flat_step(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, image: Tensor, codes: Tensor, direction: Tensor,
    frequency: Tensor, code_mean: Tensor | None, frozen: Tensor | None, before: Tensor, after: Tensor, centre: Tensor | None,
    held: Tensor, spread: float, tiles: Tensor, decay: float, beta1: float, beta2: float, correction: float, eps: float,
    step: float, momentum: float, gain: float, threshold: float, norms: Tensor | None, sums: Tensor, bins: Tensor,
    isa: int = 0,
) -> None:  # fmt: skip
    """Step a flat as `ops.shard_step.flat_step` says."""
    n_groups, n_weights = before.numel(), 0 if norms is None else norms.numel() // 2
    n_sums = 2 if sums.numel() > n_groups else 1
    plan = plan_of(tiles, Sizes(w.numel(), codes.numel(), n_groups, bins.numel(), n_sums, n_weights), w.device)
    pulled = bool((tiles[:, [Column.PULL, Column.N_BINS]].numpy() != 0).any())
    factors = _factors(spread, tiles[:, [Column.PULL, Column.FACTOR]].numpy().tobytes(), w.device)
    found, squares, at = _room(plan, w), None, 0
    if norms is not None and pulled:
        squares = w.new_empty(2 * sum(len(s.units) for s in plan.all_of_it), dtype=torch.float64)
    for shape in plan.all_of_it:
        shape.launch(
            _step, w=w, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, image=image, codes=codes, direction=direction,
            frequency=frequency, code_mean=code_mean, frozen=frozen, before=before, after=after, centre=centre, held=held,
            factors=factors, squares=None if squares is None else squares[at:], n_units=len(shape.units), sums=sums, bins=bins,
            found=found, tiles=plan.tiles, numbers=plan.numbers,
            **adamw_numbers(decay, beta1, beta2, correction, eps, step), momentum=float(momentum), keep=1.0 - momentum,
            gain=float(gain), threshold=float(threshold), SIZES=n_sums > 1, PULLED=pulled, HAS_CENTRE=centre is not None,
            HAS_NORMS=squares is not None, FREEZES=frozen is not None,
        )  # fmt: skip
        at += 2 * len(shape.units)
    plan.groups.add_up(found, sums)
    plan.bins.add_up(found, bins)
    if squares is not None:
        own = torch.zeros_like(norms)
        plan.weights.add_up(squares, own)
        norms += own


def shard_flat_moments(w: Tensor, tiles: Tensor, sums: Tensor, isa: int = 0) -> None:
    """Put into `sums` what `ops.shard_step.flat_moments` says."""
    sizes = Sizes(w.numel(), w.numel(), sums.numel() // 3, sys.maxsize)  # no bins take part
    plan = plan_of(tiles, sizes, w.device)
    found = w.new_empty(plan.moment_room, dtype=torch.float64)
    for shape in plan.late:
        shape.launch(_moments, w=w, tiles=plan.tiles, found=found)
    plan.moments.add_up(found, sums)


def shard_flat_image(
    w: Tensor, image: Tensor, codes: Tensor, direction: Tensor, frequency: Tensor, code_mean: Tensor | None,
    frozen: Tensor | None, scale: Tensor, centre: Tensor | None, tiles: Tensor, momentum: float, gain: float,
    threshold: float, bins: Tensor, isa: int = 0,
) -> None:  # fmt: skip
    """Leave images in `image` and what bins hold in `bins`, as `ops.shard_step.flat_image` says."""
    plan = plan_of(tiles, Sizes(w.numel(), codes.numel(), scale.numel(), bins.numel()), w.device)
    found = _room(plan, w)
    for shape in plan.late:
        shape.launch(
            _late_image, w=w, image=image, codes=codes, direction=direction, frequency=frequency, code_mean=code_mean,
            frozen=frozen, scale=scale, centre=centre, bins=bins, found=found, tiles=plan.tiles, numbers=plan.numbers,
            momentum=float(momentum), keep=1.0 - momentum, gain=float(gain), threshold=float(threshold),
            HAS_CENTRE=centre is not None, FREEZES=frozen is not None,
        )  # fmt: skip
    plan.late_bins.add_up(found, bins)


OPERATORS = (shard_flat_bins, shard_flat_step, shard_flat_moments, shard_flat_image)


def _sample_table(*shapes: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Return the table of 2-bit weights with a scale a row, one behind the other, their elements and their groups."""
    table, at, groups = torch.zeros(len(shapes), len(Column), dtype=torch.float64), 0, 0
    for index, (row, (rows, cols)) in enumerate(zip(table, shapes, strict=True)):
        for column, value in {
            Column.START: at, Column.STATE: at, Column.ROWS: rows, Column.COLS: cols, Column.N_GROUPS: rows,
            Column.GROUP: groups, Column.BIN: 8 * groups, Column.N_BINS: 4, Column.WEIGHT: index, Column.QMIN: -2,
            Column.QMAX: 1, Column.LOW: -2, Column.HIGH: 1, Column.PULL: 0.1,
        }.items():  # fmt: skip
            row[column] = value
        at, groups = at + rows * cols, groups + rows
    return table, at, groups


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled: narrow and wide rows, one scale for all, odd places."""
    table, at, groups = _sample_table((192, 192), (192, 768), (1, 192 * 192), (30, 50))
    table[1::2, Column.LATE] = 1
    w, grad, m, v, image, often = torch.zeros(6, at)
    codes, direction = torch.zeros(2, at, dtype=torch.int8)
    scale, still = torch.ones(groups), torch.zeros(at, dtype=torch.bool)
    sums, held, bins = (torch.zeros(size, dtype=torch.float64) for size in (2 * groups, 8 * groups, 8 * groups))
    norms, numbers = (
        torch.zeros(len(table), 2, dtype=torch.float64),
        (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3, 0.1, 0.1, 0.1),
    )
    for n_sums, centre, mean, frozen, squares in ((1, None, None, None, None), (2, scale, often, still, norms)):
        tracker, own = (codes, direction, often, mean, frozen), sums[: n_sums * groups]
        shard_flat_bins(w, codes, scale, centre, table, bins)
        shard_flat_step(
            w, grad, m, v, image, *tracker, scale, scale, centre, held, 0.1, table, *numbers, squares, own, bins
        )
        shard_flat_moments(w, table, torch.zeros(3 * groups, dtype=torch.float64))
        shard_flat_image(w, image, *tracker, scale, centre, table, 0.1, 0.1, 0.1, bins)
