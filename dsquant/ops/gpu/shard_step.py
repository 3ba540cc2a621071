"""The passes of the shard step as Triton kernels: what `csrc/shard_step.cpp` does for CPU, with the arithmetic in the same order.

A tile of a weight is a matrix (rows, cols), row r of scale group groups[r]; a program takes a block of it. Sums over elements
are float64 from the first, one partial sum for each row and block, added up in one order: they must not show how ZeRO cuts
a weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import TILE, Layout, clip, round_half_even, tile_of
from dsquant.ops.gpu.launch import launch

WIDE = {"num_warps": 8}  # of kernels that hold many values of an element at a time


@triton.jit
def _rows(values, groups, row, rows):
    """Return values[groups[r]] of a block's rows, (rows, 1)."""
    group = tl.load(groups + row, mask=row < rows, other=0)
    return tl.load(values + group, mask=row < rows, other=1.0)[:, None]


@triton.jit
def _around_centre(w, where, there, centre, groups, row, rows, HAS_CENTRE: tl.constexpr):
    x = tl.load(w + where, mask=there, other=0.0)
    if HAS_CENTRE:
        x = tl.where(there, x - _rows(centre, groups, row, rows), 0.0)
    return x


@triton.jit
def _gather(w, grad, codes, frozen, centre, scale, groups, sums, bins, rows, cols, qmin, n_bins, shift, low, high,
            PLAIN: tl.constexpr, ENDS_TOGETHER: tl.constexpr, HAS_CENTRE: tl.constexpr, HAS_FROZEN: tl.constexpr,
            HAS_BINS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, _, where, there = tile_of(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    s = _rows(scale, groups, row, rows)
    x = _around_centre(w, where, there, centre, groups, row, rows, HAS_CENTRE)
    g = tl.load(grad + where, mask=there, other=0.0)
    code = tl.load(codes + where, mask=there, other=0)
    level = code.to(tl.float32) + shift
    found = level * g
    if not PLAIN:
        v = tl.math.div_rn(x, s + tl.zeros_like(x))
        passed = tl.where((v >= low) & (v <= high), g, 0.0)
        clipped = clip(v, low, high)
        outside = level if ENDS_TOGETHER else clipped
        learned = tl.math.fma(g - passed, outside, (level - clipped) * g)
        if HAS_FROZEN:
            learned = tl.where(tl.load(frozen + where, mask=there, other=0) != 0, found, learned)
        found = learned
    across = tl.cdiv(cols, BLOCK_COLS)
    slot, n_slots, here = row * across + tl.program_id(0) % across, rows * across, row < rows
    tl.store(sums + slot, tl.sum(found.to(tl.float64), axis=1), mask=here)
    tl.store(sums + n_slots + slot, tl.sum(tl.abs(x).to(tl.float64), axis=1), mask=here)
    if HAS_BINS:
        clipped = tl.where(there, clip(x, low * s, high * s), 0.0).to(tl.float64)
        for b in range(n_bins):
            held = (code.to(tl.int32) == qmin + b) & there
            tl.store(bins + b * n_slots + slot, tl.sum(held.to(tl.int32), axis=1).to(tl.float64), mask=here)
            total = tl.sum(tl.where(held, clipped, 0.0), axis=1)
            tl.store(bins + (n_bins + b) * n_slots + slot, total, mask=here)


@triton.jit
def _adamw_step(w, g, m, v, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step):
    """Return w, m and v after a step of AdamW, rounded where torch's fused one on CPU rounds."""
    m = tl.math.fma(one_minus_beta1 + tl.zeros_like(m), g - m, m)
    v = tl.math.fma(one_minus_beta2 * g, g, v * beta2)
    root = tl.math.div_rn(tl.math.sqrt_rn(v), correction + tl.zeros_like(v)) + eps
    return w * decay + tl.math.div_rn(-step * m, root), m, v


@triton.jit
def _update(w, grad, exp_avg, exp_avg_sq, codes, frozen, centre, scale, groups, mean, factor, norms, rows, cols, qmin,
            n_bins, shift, low, high, twice, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step,
            PULLED: tl.constexpr, HAS_TABLES: tl.constexpr, HAS_CENTRE: tl.constexpr, HAS_FROZEN: tl.constexpr,
            HAS_NORMS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, _, where, there = tile_of(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    s = _rows(scale, groups, row, rows)
    x = _around_centre(w, where, there, centre, groups, row, rows, HAS_CENTRE)
    v = tl.math.div_rn(x, s + tl.zeros_like(x))
    free = (v >= low) & (v <= high)
    if HAS_FROZEN:
        free = free & (tl.load(frozen + where, mask=there, other=0) == 0)
    g = tl.where(free, tl.load(grad + where, mask=there, other=0.0), 0.0)
    if PULLED:
        code = tl.load(codes + where, mask=there, other=0)
        pull = (x - (code.to(tl.float32) + shift) * s) * twice
        if HAS_TABLES:
            entry = tl.load(groups + row, mask=row < rows, other=0)[:, None] * n_bins + (code.to(tl.int32) - qmin)
            spread = x - tl.load(mean + entry, mask=there, other=0.0)
            pull = tl.math.fma(spread, tl.load(factor + entry, mask=there, other=0.0), pull)
        pull = tl.where(free & there, pull, 0.0)
        if HAS_NORMS:
            task, own = g.to(tl.float64), pull.to(tl.float64)
            tl.store(norms + tl.program_id(0), tl.sum(task * task))
            tl.store(norms + tl.num_programs(0) + tl.program_id(0), tl.sum(own * own))
        g = g + pull
    stepped, m, v = _adamw_step(
        tl.load(w + where, mask=there, other=0.0), g, tl.load(exp_avg + where, mask=there, other=0.0),
        tl.load(exp_avg_sq + where, mask=there, other=0.0), decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps,
        step,
    )  # fmt: skip
    tl.store(w + where, stepped, mask=there)
    tl.store(exp_avg + where, m, mask=there)
    tl.store(exp_avg_sq + where, v, mask=there)


@triton.jit
def _adamw(w, grad, exp_avg, exp_avg_sq, numel, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step,
           BLOCK: tl.constexpr):  # fmt: skip
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = where < numel
    stepped, m, v = _adamw_step(
        tl.load(w + where, mask=there, other=0.0), tl.load(grad + where, mask=there, other=0.0),
        tl.load(exp_avg + where, mask=there, other=0.0), tl.load(exp_avg_sq + where, mask=there, other=0.0), decay,
        one_minus_beta1, beta2, one_minus_beta2, correction, eps, step,
    )  # fmt: skip
    tl.store(w + where, stepped, mask=there)
    tl.store(exp_avg + where, m, mask=there)
    tl.store(exp_avg_sq + where, v, mask=there)


@triton.jit
def _moments(w, sums, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    row, _, where, there = tile_of(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    x = tl.load(w + where, mask=there, other=0.0).to(tl.float64)
    across = tl.cdiv(cols, BLOCK_COLS)
    slot, n_slots, here = row * across + tl.program_id(0) % across, rows * across, row < rows
    tl.store(sums + slot, tl.sum(tl.abs(x), axis=1), mask=here)
    tl.store(sums + n_slots + slot, tl.sum(x, axis=1), mask=here)
    tl.store(sums + 2 * n_slots + slot, tl.sum(x * x, axis=1), mask=here)


@triton.jit
def _image(w, latent, codes, direction, frequency, code_mean, frozen, centre, scale, groups, rows, cols, qmin, qmax, shift,
           momentum, keep, threshold, HAS_CENTRE: tl.constexpr, FREEZES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
           BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, _, where, there = tile_of(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    s = _rows(scale, groups, row, rows)
    x = _around_centre(w, where, there, centre, groups, row, rows, HAS_CENTRE)
    kept = tl.load(w + where, mask=there, other=0.0)
    code = round_half_even(clip(tl.math.div_rn(x, s + tl.zeros_like(x)) - shift, qmin, qmax))
    before = tl.load(codes + where, mask=there, other=0).to(tl.float32)
    if FREEZES:
        still = tl.load(frozen + where, mask=there, other=0) != 0
        code = tl.where(still, before, code)
        kept = tl.where(still, (code + shift) * s, kept)
    delta = (code > before).to(tl.int8) - (code < before).to(tl.int8)
    last = tl.load(direction + where, mask=there, other=0)
    oscillated = tl.where(delta * last == -1, momentum, 0.0)
    often = tl.load(frequency + where, mask=there, other=0.0) * keep + oscillated
    tl.store(frequency + where, often, mask=there)
    tl.store(direction + where, tl.where(delta != 0, delta, last), mask=there)
    if FREEZES:
        mean = tl.load(code_mean + where, mask=there, other=0.0) * keep
        mean = tl.math.fma(code, momentum + tl.zeros_like(code), mean)
        tl.store(code_mean + where, mean, mask=there)
        newly = (often > threshold) & (threshold >= 0) & (still == 0)
        code = tl.where(newly, clip(round_half_even(mean), qmin, qmax), code)
        kept = tl.where(newly, (code + shift) * s, kept)
        tl.store(frozen + where, still | newly, mask=there)
    tl.store(codes + where, code.to(tl.int8), mask=there)
    tl.store(latent + where, kept, mask=there)
    tl.store(w + where, (code + shift) * s, mask=there)


def _layout(w: Tensor, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return blocks down and across of a tile of `rows` rows, and what kernels are told of them."""
    cols = w.numel() // rows
    block_cols = min(triton.next_power_of_2(cols), TILE)
    layout = Layout(rows, cols, False, min(triton.next_power_of_2(rows), TILE // block_cols), block_cols)
    known = layout.arguments(0)
    return layout.tiles, {name: known[name] for name in ("rows", "cols", "BLOCK_ROWS", "BLOCK_COLS")}


def _add_rows(sums: Tensor, partial: Tensor, groups: Tensor) -> None:
    """Add (k, rows, across) partial sums to (k, n_groups) sums."""
    sums.index_add_(1, groups, partial.sum(2))


def shard_gather(
    w: Tensor, grad: Tensor, codes: Tensor, frozen: Tensor | None, centre: Tensor | None, scale: Tensor, groups: Tensor,
    qmin: int, qmax: int, shift: float, low: float, high: float, plain: bool, sums: Tensor, bins: Tensor | None,
    isa: int = 0,
) -> None:  # fmt: skip
    """Add to `sums` (2, n_groups) and `bins` (2, n_groups * n_bins) what `ops.shard_step.gather` says."""
    rows, n_groups = groups.numel(), scale.numel()
    (down, across), layout = _layout(w, rows)
    n_bins = bins.numel() // (2 * n_groups) if bins is not None else 0
    partial = w.new_empty(2 + 2 * n_bins, rows, across, dtype=torch.float64)
    launch(
        _gather, (down * across,), w=w, grad=grad, codes=codes, frozen=frozen, centre=centre, scale=scale, groups=groups,
        sums=partial, bins=partial[2:] if n_bins else None, qmin=qmin, n_bins=n_bins, shift=float(shift), low=float(low),
        high=float(high), PLAIN=plain, ENDS_TOGETHER=shift == 0 and low == qmin, HAS_CENTRE=centre is not None,
        HAS_FROZEN=frozen is not None, HAS_BINS=n_bins > 0, **layout,
    )  # fmt: skip
    _add_rows(sums, partial[:2], groups)
    if bins is not None:
        found = torch.zeros(2 * n_bins, n_groups, dtype=torch.float64, device=w.device)
        _add_rows(found, partial[2:], groups)
        bins += found.view(2, n_bins, n_groups).transpose(1, 2).reshape_as(bins)


def _numbers(decay: float, beta1: float, beta2: float, correction: float, eps: float, step: float) -> dict[str, float]:
    return {"decay": decay, "one_minus_beta1": 1 - beta1, "beta2": beta2, "one_minus_beta2": 1 - beta2,
            "correction": correction, "eps": eps, "step": step}  # fmt: skip


def shard_update(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, codes: Tensor, frozen: Tensor | None,
    centre: Tensor | None, scale: Tensor, groups: Tensor, qmin: int, qmax: int, shift: float, low: float, high: float,
    pull: float, mean: Tensor | None, factor: Tensor | None, decay: float, beta1: float, beta2: float, correction: float,
    eps: float, step: float, norms: Tensor | None, isa: int = 0,
) -> None:  # fmt: skip
    """Step the latents of a tile as `ops.shard_step.update` says."""
    (down, across), layout = _layout(w, groups.numel())
    pulled = pull != 0 or mean is not None
    squares = w.new_empty(2, down * across, dtype=torch.float64) if pulled and norms is not None else None
    launch(
        _update, (down * across,), {"num_warps": 4}, w=w, grad=grad,
        exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, codes=codes, frozen=frozen,
        centre=centre, scale=scale, groups=groups, mean=mean, factor=factor, norms=squares, qmin=qmin,
        n_bins=0 if mean is None else mean.numel() // scale.numel(), shift=float(shift), low=float(low), high=float(high),
        twice=2.0 * pull, **_numbers(decay, beta1, beta2, correction, eps, step), PULLED=pulled,
        HAS_TABLES=mean is not None, HAS_CENTRE=centre is not None, HAS_FROZEN=frozen is not None,
        HAS_NORMS=squares is not None, **layout,
    )  # fmt: skip
    if squares is not None:
        norms += squares.sum(1)


def shard_adamw(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: float, beta1: float, beta2: float,
    correction: float, eps: float, step: float, isa: int = 0,
) -> None:  # fmt: skip
    """Step float32 values that nothing quantizes."""
    launch(
        _adamw, (triton.cdiv(w.numel(), TILE),), WIDE, w=w, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, numel=w.numel(),
        **_numbers(decay, beta1, beta2, correction, eps, step), BLOCK=TILE,
    )  # fmt: skip


def shard_moments(w: Tensor, groups: Tensor, sums: Tensor, isa: int = 0) -> None:
    """Add to `sums` (n_groups, 3) the sums of |w|, w and w^2 of a tile's rows."""
    (down, across), layout = _layout(w, groups.numel())
    partial = w.new_empty(3, groups.numel(), across, dtype=torch.float64)
    launch(_moments, (down * across,), w=w, sums=partial, **layout)
    sums.index_add_(0, groups, partial.sum(2).t())


def shard_image(
    w: Tensor, latent: Tensor, codes: Tensor, direction: Tensor, frequency: Tensor, code_mean: Tensor | None,
    frozen: Tensor | None, centre: Tensor | None, scale: Tensor, groups: Tensor, qmin: int, qmax: int, shift: float,
    momentum: float, threshold: float, isa: int = 0,
) -> None:  # fmt: skip
    """Put images in the place of a tile's latents and record the new codes, as `ops.shard_step.image` says."""
    (down, across), layout = _layout(w, groups.numel())
    launch(
        _image, (down * across,), WIDE, w=w, latent=latent, codes=codes, direction=direction, frequency=frequency,
        code_mean=code_mean, frozen=frozen, centre=centre, scale=scale, groups=groups, qmin=float(qmin),
        qmax=float(qmax),
        shift=float(shift), momentum=float(momentum), keep=1.0 - momentum, threshold=float(threshold),
        HAS_CENTRE=centre is not None, FREEZES=frozen is not None, **layout,
    )  # fmt: skip


OPERATORS = (shard_gather, shard_update, shard_adamw, shard_moments, shard_image)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled."""
    adam = (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    for rows, cols in ((1, 192 * 192), (192, 192)):
        w, grad, m, v, latent, often = torch.zeros(6, rows, cols)
        codes, direction = torch.zeros(2, rows, cols, dtype=torch.int8)
        groups, scale, still = torch.arange(rows), torch.ones(rows), torch.zeros(rows, cols, dtype=torch.bool)
        sums, norms = torch.zeros(2, rows, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        shard_adamw(w, grad, m, v, *adam)
        shard_moments(w, groups, torch.zeros(rows, 3, dtype=torch.float64))
        for centre, frozen, table in ((None, None, None), (scale, still, torch.zeros(rows, 4))):
            bins = None if table is None else torch.zeros(2, 4 * rows, dtype=torch.float64)
            tile = (frozen, centre, scale, groups, -2, 1)
            for plain in (False, True):
                shard_gather(w, grad, codes, *tile, 0.0, -2.0, 1.0, plain, sums, bins)
            shard_update(
                w, grad, m, v, codes, *tile, 0.0, -2.0, 1.0, 0.1, table, table, *adam, table if table is None else norms
            )
            shard_image(w, latent, codes, direction, often, None if frozen is None else often, *tile, 0.0, 0.1, 0.1)
