"""The shard step of a whole flat as Triton kernels: what `csrc/shard_step.cpp` does for CPU, arithmetic in the same order.

A program takes some rows of a tile, or a piece of a long row; which, it reads from the tables of `flat_plan.py`. So the number
of launches is that of the block shapes that rows ask for, whatever the number of weights. Sums over elements are float64 from
the first. A group that one program sees whole is written to its place, the others' partial sums are added up in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import clip
from dsquant.ops.gpu.flat_plan import (
    ALONE,
    BIN,
    BIN_APART,
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
def _drawn(x, image, twice_pull, factor, mean):
    """Return the gradient of both terms of OBR; factor and mean float64 (`regularizers.regularizer_gradient`)."""
    strength, goal = (factor + twice_pull).to(tl.float32), (image * twice_pull + mean * factor).to(tl.float32)
    return tl.math.fma(x, strength + tl.zeros_like(x), -goal)


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
    v = tl.math.div_rn(x, s + tl.zeros_like(x))
    free = (v >= low) & (v <= high)
    if HAS_FROZEN:
        free = free & (tl.load(frozen + state + where, mask=there, other=0) == 0)
    of_scale = _of_scales(x, s, code.to(tl.float32) + shift, g, free, tl.load(tile + PLAIN))
    index = tl.where(tl.load(tile + ALONE) != 0, own, run.to(tl.int64))
    at, apart = found + tl.load(tile + SUM_AT) + index, tl.load(tile + SUM_APART)
    tl.store(at, of_scale, mask=here)
    if SIZES:
        tl.store(at + apart, tl.sum(tl.abs(x).to(tl.float64), axis=1), mask=here)
    at, apart = found + tl.load(tile + BIN_AT) + index * n_bins, tl.load(tile + BIN_APART)
    parts = _in_parts(x, s, low, high)
    for b in range(n_bins):
        held = (code.to(tl.float32) == qmin + b) & there
        tl.store(at + b, tl.sum(held.to(tl.int32), axis=1).to(tl.float64), mask=here)
        tl.store(at + apart + b, tl.sum(tl.where(held, parts, 0.0).to(tl.float64), axis=1), mask=here)


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
def _step(w, grad, exp_avg, exp_avg_sq, image, codes, direction, frequency, code_mean, frozen, before, after, centre, mean,
          factor, pulls, squares, n_units, unit, tiles, numbers, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps,
          step, momentum, keep, gain, threshold, PULLED: tl.constexpr, HAS_TABLES: tl.constexpr, HAS_CENTRE: tl.constexpr,
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
        level, twice = code.to(tl.float32) + shift, tl.load(pulls + tl.load(unit + 2 * tl.program_id(0)))
        pull = (x - level * s) * twice.to(tl.float32)
        if HAS_TABLES:
            n_bins = tl.load(tile + N_BINS)
            entry = (tl.load(tile + BIN) + own * n_bins)[:, None] + (code.to(tl.float32) - qmin).to(tl.int32)
            held, wide = of_quantized & (n_bins > 0), s.to(tl.float64)
            of_bin = tl.load(mean + entry, mask=held, other=0.0) * (wide / PARTS)
            drawn = _drawn(x, level.to(tl.float64) * wide, twice, tl.load(factor + entry, mask=held, other=0.0), of_bin)
            pull = tl.where(held, drawn, pull)
        pull = tl.where(free & of_quantized, pull, 0.0)
        if HAS_NORMS:
            _keep_norms(squares, n_units, g, pull)
        g = g + pull
    kept = _moved(kept, g, exp_avg + start + where, exp_avg_sq + start + where, there, decay, one_minus_beta1, beta2,
                  one_minus_beta2, correction, eps, step)  # fmt: skip
    s = _of_rows(after, group, here & quantized)
    x = kept
    if HAS_CENTRE:
        x = tl.where(of_quantized, kept - middle, kept)
    latent, shown = show(
        kept, x, s, codes, direction, frequency, code_mean, frozen, state, where,
        of_quantized & (late == 0), qmin, qmax, shift, momentum, keep, gain, threshold, FREEZES,
    )  # fmt: skip
    images = quantized & (late == 0)
    tl.store(w + start + where, tl.where(images, latent, kept), mask=there)
    tl.store(image + start + where, tl.where(images, shown, kept), mask=there & (late == 0))


@triton.jit
def _next_scale(scale, scale_avg, scale_avg_sq, scale_lr, of_step, group, here, g, sums, n_groups):
    """Return the scales of some groups after the Adam of scales, float64 (`QuantState.update`), and put them into `sums`.

    `of_step` holds its numbers as `ScaleAdam.numbers` gives them; g is the gradient.
    """
    rate, beta1, beta2 = tl.load(of_step), tl.load(of_step + 1), tl.load(of_step + 2)
    s, g = tl.load(scale + group, mask=here, other=1.0).to(tl.float64), g.to(tl.float64)
    m = tl.load(scale_avg + group, mask=here, other=0.0).to(tl.float64) * beta1 + (1 - beta1) * g
    v = tl.load(scale_avg_sq + group, mask=here, other=0.0).to(tl.float64) * beta2 + (1 - beta2) * g * g
    m, v = m.to(tl.float32).to(tl.float64), v.to(tl.float32).to(tl.float64)
    size = tl.sqrt(v / tl.load(of_step + 4)) + tl.load(of_step + 5)
    away = tl.load(scale_lr + group, mask=here, other=0.0).to(tl.float64) * rate * (m / tl.load(of_step + 3)) / size
    s = tl.maximum((s - away).to(tl.float32), tl.load(of_step + 6).to(tl.float32))
    tl.store(sums + group, s.to(tl.float64), mask=here)
    tl.store(sums + n_groups + group, m, mask=here)
    tl.store(sums + 2 * n_groups + group, v, mask=here)
    return s[:, None]


@triton.jit
def _whole(w, grad, exp_avg, exp_avg_sq, image, codes, direction, frequency, code_mean, frozen, scale, scale_avg, scale_avg_sq,
           scale_lr, of_step, factors, pulls, squares, n_units, sums, n_groups, unit, tiles, numbers, decay, one_minus_beta1,
           beta2, one_minus_beta2, correction, eps, step, momentum, keep, gain, threshold, PULLED: tl.constexpr,
           HAS_NORMS: tl.constexpr, FREEZES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
           BLOCK_COLS: tl.constexpr):  # fmt: skip
    tile, start, state, where, there, here, _, own = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    qmin, qmax, shift, low, high = _grid(numbers, unit)
    number, group = tl.load(unit + 2 * tl.program_id(0)), tl.load(tile + GROUP) + own
    s = _of_rows(scale, group, here)
    x = tl.load(w + start + where, mask=there, other=0.0)
    g = tl.load(grad + start + where, mask=there, other=0.0)
    code = tl.load(codes + state + where, mask=there, other=0).to(tl.float32)
    v, level = tl.math.div_rn(x, s + tl.zeros_like(x)), code + shift
    free = (v >= low) & (v <= high)
    if FREEZES:
        free = free & (tl.load(frozen + state + where, mask=there, other=0) == 0)
    of_scale = _of_scales(x, s, level, g, free, tl.load(tile + PLAIN)) * tl.load(factors + number)
    of_scale = of_scale.to(tl.float32)
    after = _next_scale(scale, scale_avg, scale_avg_sq, scale_lr, of_step, group, here, of_scale, sums, n_groups)
    g = tl.where(free, g, 0.0)
    if PULLED:
        n_bins = tl.load(tile + N_BINS).to(tl.int32)
        pull = (x - level * s) * tl.load(pulls + number).to(tl.float32)
        parts, wide = _in_parts(x, s, low, high), s.to(tl.float64)
        for b in range(n_bins):
            held = (code == qmin + b) & there
            count = tl.sum(held.to(tl.int32), axis=1).to(tl.float64)[:, None]
            total = tl.sum(tl.where(held, parts, 0.0).to(tl.float64), axis=1)[:, None]
            mean = total / tl.maximum(count, 1.0) * (wide / PARTS)
            factor = tl.where(count > 1, tl.load(of_step + 7) / tl.maximum(count - 1, 1.0), 0.0)
            of_code = (qmin + b + shift).to(tl.float64) * wide
            pull = tl.where(held, _drawn(x, of_code, tl.load(pulls + number), factor, mean), pull)
        pull = tl.where(free & there, pull, 0.0)
        if HAS_NORMS:
            _keep_norms(squares, n_units, g, pull)
        g = g + pull
    kept = _moved(x, g, exp_avg + start + where, exp_avg_sq + start + where, there, decay, one_minus_beta1, beta2,
                  one_minus_beta2, correction, eps, step)  # fmt: skip
    latent, shown = show(
        kept, kept, after, codes, direction, frequency, code_mean, frozen, state, where, there, qmin, qmax, shift, momentum,
        keep, gain, threshold, FREEZES,
    )  # fmt: skip
    tl.store(w + start + where, latent, mask=there)
    tl.store(image + start + where, shown, mask=there)


@triton.jit
def _moments(w, unit, tiles, found, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    tile, start, _, where, there, here, run, _ = _block(unit, tiles, ALIGNED, BLOCK_ROWS, BLOCK_COLS)
    x = tl.load(w + start + where, mask=there, other=0.0).to(tl.float64)
    at = found + tl.load(tile + MOMENT_AT) + 3 * run
    tl.store(at, tl.sum(tl.abs(x), axis=1), mask=here)
    tl.store(at + 1, tl.sum(x, axis=1), mask=here)
    tl.store(at + 2, tl.sum(x * x, axis=1), mask=here)


@triton.jit
def _late_image(w, image, codes, direction, frequency, code_mean, frozen, scale, centre, unit, tiles, numbers, momentum, keep,
                gain, threshold, HAS_CENTRE: tl.constexpr, FREEZES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
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
        where, there, qmin, qmax, shift, momentum, keep, gain, threshold, FREEZES,
    )  # fmt: skip
    tl.store(w + start + where, latent, mask=there)
    tl.store(image + start + where, shown, mask=there)


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
    step: float, momentum: float, gain: float, threshold: float, norms: Tensor | None, isa: int = 0,
) -> None:  # fmt: skip
    """Step a flat as `ops.shard_step.flat_step` says."""
    counts, totals = bins.view(2, -1)
    n_weights = 0 if norms is None else norms.numel() // 2
    plan = plan_of(tiles, w.numel(), codes.numel(), before.numel(), counts.numel(), n_weights, w.device)
    pulls = 2 * tiles[:, Column.PULL]
    mean = factor = None
    if counts.numel():
        mean = totals / counts.clamp(min=1)  # in parts of a scale
        factor = torch.where(counts > 1, 2 * spread / (counts - 1).clamp(min=1), 0.0)
    pulled = mean is not None or bool(pulls.numpy().any())
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
            momentum=float(momentum), keep=1.0 - momentum, gain=float(gain), threshold=float(threshold), PULLED=pulled,
            HAS_TABLES=mean is not None, HAS_CENTRE=centre is not None, HAS_NORMS=squares is not None,
            FREEZES=frozen is not None,
        )  # fmt: skip
        at += 2 * len(shape.units)
    if squares is not None:
        plan.weights.add_up(squares)
        norms += squares[: 2 * n_weights].view_as(norms)


def shard_flat_whole(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, image: Tensor, codes: Tensor, direction: Tensor,
    frequency: Tensor, code_mean: Tensor | None, frozen: Tensor | None, scale: Tensor, scale_avg: Tensor,
    scale_avg_sq: Tensor, scale_lr: Tensor, rate: float, scale_beta1: float, scale_beta2: float, correction1: float,
    correction2: float, scale_eps: float, floor: float, spread: float, tiles: Tensor, decay: float, beta1: float, beta2: float,
    correction: float, eps: float, step: float, momentum: float, gain: float, threshold: float, norms: Tensor | None,
    sums: Tensor, isa: int = 0,
) -> None:  # fmt: skip
    """Step a flat's whole tiles as `ops.shard_step.flat_whole` says."""
    n_weights = 0 if norms is None else norms.numel() // 2
    plan = plan_of(tiles, w.numel(), codes.numel(), scale.numel(), _n_bins(tiles), n_weights, w.device)
    of_scales = [rate, scale_beta1, scale_beta2, correction1, correction2, scale_eps, floor, 2 * spread]
    of_scales = torch.tensor(of_scales, dtype=torch.float64)
    of_step = torch.cat([of_scales, tiles[:, Column.FACTOR]]).to(w.device, non_blocking=True)
    pulls = 2 * tiles[:, Column.PULL]
    pulled = bool((pulls.numpy() != 0).any() or (tiles[:, Column.N_BINS].numpy() != 0).any())
    pulls, squares, at = pulls.to(w.device, non_blocking=True), None, 2 * n_weights
    if norms is not None and pulled:
        squares = w.new_zeros(2 * (n_weights + sum(len(s.units) for s in plan.whole)), dtype=torch.float64)
    for shape in plan.whole:
        shape.launch(
            _whole, w=w, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, image=image, codes=codes, direction=direction,
            frequency=frequency, code_mean=code_mean, frozen=frozen, scale=scale, scale_avg=scale_avg,
            scale_avg_sq=scale_avg_sq, scale_lr=scale_lr, of_step=of_step, factors=of_step[len(of_scales) :], pulls=pulls,
            squares=None if squares is None else squares[at:], n_units=len(shape.units), sums=sums, n_groups=scale.numel(),
            tiles=plan.tiles, numbers=plan.numbers, **adamw_numbers(decay, beta1, beta2, correction, eps, step),
            momentum=float(momentum), keep=1.0 - momentum, gain=float(gain), threshold=float(threshold), PULLED=pulled,
            HAS_NORMS=squares is not None, FREEZES=frozen is not None,
        )  # fmt: skip
        at += 2 * len(shape.units)
    if squares is not None:
        plan.whole_weights.add_up(squares)
        norms += squares[: 2 * n_weights].view_as(norms)


def shard_flat_moments(w: Tensor, tiles: Tensor, sums: Tensor, isa: int = 0) -> None:
    """Add to `sums` what `ops.shard_step.flat_moments` says."""
    n_groups = sums.numel() // 3
    plan = plan_of(tiles, w.numel(), w.numel(), n_groups, _n_bins(tiles), 0, w.device)
    found = w.new_zeros(plan.moment_room, dtype=torch.float64)
    for shape in plan.late:
        shape.launch(_moments, w=w, tiles=plan.tiles, found=found)
    plan.moments.add_up(found)
    sums += found[: 3 * n_groups].view_as(sums)


def shard_flat_image(
    w: Tensor, image: Tensor, codes: Tensor, direction: Tensor, frequency: Tensor, code_mean: Tensor | None,
    frozen: Tensor | None, scale: Tensor, centre: Tensor | None, tiles: Tensor, momentum: float, gain: float,
    threshold: float, isa: int = 0,
) -> None:  # fmt: skip
    """Leave the images of late tiles in `image`, as `ops.shard_step.flat_image` says."""
    plan = plan_of(tiles, w.numel(), codes.numel(), scale.numel(), _n_bins(tiles), 0, w.device)
    for shape in plan.late:
        shape.launch(
            _late_image, w=w, image=image, codes=codes, direction=direction, frequency=frequency, code_mean=code_mean,
            frozen=frozen, scale=scale, centre=centre, tiles=plan.tiles, numbers=plan.numbers, momentum=float(momentum),
            keep=1.0 - momentum, gain=float(gain), threshold=float(threshold), HAS_CENTRE=centre is not None,
            FREEZES=frozen is not None,
        )  # fmt: skip


def _n_bins(tiles: Tensor) -> int:
    return int((tiles[:, Column.BIN] + tiles[:, Column.N_BINS] * tiles[:, Column.N_GROUPS]).max())


OPERATORS = (shard_flat_gather, shard_flat_step, shard_flat_whole, shard_flat_moments, shard_flat_image)


def _sample_table(*shapes: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Return the table of 2-bit weights with a scale a row, one behind the other, their elements and their groups."""
    table, at, groups = torch.zeros(len(shapes), len(Column), dtype=torch.float64), 0, 0
    for index, (row, (rows, cols)) in enumerate(zip(table, shapes, strict=True)):
        for column, value in {
            Column.START: at, Column.STATE: at, Column.ROWS: rows, Column.COLS: cols, Column.N_GROUPS: rows,
            Column.GROUP: groups, Column.BIN: 4 * groups, Column.N_BINS: 4, Column.WEIGHT: index, Column.QMIN: -2,
            Column.QMAX: 1, Column.LOW: -2, Column.HIGH: 1, Column.PULL: 0.1,
        }.items():  # fmt: skip
            row[column] = value
        at, groups = at + rows * cols, groups + rows
    return table, at, groups


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled: narrow and wide rows, one scale for all, odd places."""
    table, at, groups = _sample_table((192, 192), (192, 768), (1, 192 * 192), (30, 50))
    table[1::2, Column.LATE] = 1
    bins = 4 * groups
    w, grad, m, v, image, often = torch.zeros(6, at)
    codes, direction = torch.zeros(2, at, dtype=torch.int8)
    scale, still, norms = (
        torch.ones(groups),
        torch.zeros(at, dtype=torch.bool),
        torch.zeros(len(table), 2, dtype=torch.float64),
    )
    sums, held = torch.zeros(2, groups, dtype=torch.float64), torch.zeros(2, bins, dtype=torch.float64)
    adam = (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    for centre, mean, frozen, squares in ((None, None, None, None), (scale, often, still, norms)):
        shard_flat_gather(w, grad, codes, frozen, scale, centre, table, True, sums, held)
        tracker = (codes, direction, often, mean, frozen)
        rest = (held, 0.1, table, *adam, 0.1, 0.1, 0.1, squares)
        shard_flat_step(w, grad, m, v, image, *tracker, scale, scale, centre, *rest)
        shard_flat_moments(w, table, torch.zeros(groups, 3, dtype=torch.float64))
        shard_flat_image(w, image, *tracker, scale, centre, table, 0.1, 0.1, 0.1)
    _whole_samples()


def _whole_samples() -> None:
    """Launch the kernel of one pass for rows of one block, of half and of the longest, in odd places too."""
    tiles, at, groups = _sample_table((64, 192), (4, 3072), (30, 50))
    tiles[:, Column.FACTOR] = 0.1
    w, grad, m, v, image, often, mean = torch.zeros(7, at)
    codes, direction = torch.zeros(2, at, dtype=torch.int8)
    scales, still = torch.ones(4, groups), torch.zeros(at, dtype=torch.bool)
    norms, sums = torch.zeros(len(tiles), 2, dtype=torch.float64), torch.zeros(3, groups, dtype=torch.float64)
    adams = (1.0, 0.9, 0.999, 0.1, 0.1, 1e-8, 1e-6, 0.1, tiles, 0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3, 0.1, 0.1, 0.1)
    for code_mean, frozen, squares in ((None, None, None), (mean, still, norms)):
        tracker = codes, direction, often, code_mean, frozen
        shard_flat_whole(w, grad, m, v, image, *tracker, *scales, *adams, squares, sums)
