"""Activation quantizers as Triton kernels: forward in one pass, backward with the sums of d scale and d offset in another.

An activation is read as a matrix of which either a row has one scale, row r that of group r % n_groups (a scale for each head or
token), or a column has (a scale for each channel), or all of it has: `Layout`. A program takes one tile of it forward; backward
several, one below the other, of the same groups, and writes a float32 sum for each group at the end. Those are added up in
float64 by one kernel more, in one order that the shape alone decides: no atomics.

Programs would spend more time on division than on memory, were it not for `quotient`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.launch import interpreted, launch

TILE = 2048  # elements of a program, or of its step
FORWARD_TILE = 4096
GELU_TILE = 1024  # where a program has more to do for each
STEPS, PROGRAMS = 8, 2048  # the most steps of a program backward; programs below which there are fewer steps
STAGES = 1  # steps whose loads are under way at once
NARROWEST = 64  # columns of a tile, where there are as many: whole sectors of memory
SUM_TILE = 4096  # partial sums that are added up at a time
OPTIONS, SUM_OPTIONS = {"num_warps": 4}, {"num_warps": 8}
INTERPRETED = tl.constexpr(interpreted())
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to |v| < 2**22 rounds half to even, as float32 addition does
ORDINARY = tl.constexpr(2.0**64)  # `quotient` divides by scales between this and its inverse
FAR = tl.constexpr(2.0**40)  # beyond any level
# Of 1 - Phi(x) = phi(x) (b1 t + ... + b5 t^5), t = 1 / (1 + 0.2316419 x) for x >= 0, to 7.5e-8: Abramowitz and Stegun, 26.2.17.
# Each b is divided by the root of 2 pi here.
SLOPE_OF_T, INVERSE_ROOT_2PI, HALF_LOG2E = (
    tl.constexpr(0.2316419),
    tl.constexpr(0.3989422804),
    tl.constexpr(0.7213475204),
)
B1, B2, B3 = tl.constexpr(0.12741479590), tl.constexpr(-0.14224836830), tl.constexpr(0.71070686870)
B4, B5 = tl.constexpr(-0.72657601310), tl.constexpr(0.53070271430)


def pieces(length: int, size: int) -> int:
    """Return how many pieces of a size cover a length: `triton.cdiv` takes as long as a launch."""
    return -(-length // size)


class Layout(NamedTuple):
    """Say how an activation lies as a matrix of `cols` columns, and what part of it a program takes.

    The scales of `period` rows repeat in the next `period`. A step of a program takes a tile within such rows, the next step the
    same tile `period` rows further down.
    """

    by: str  # what has a scale: "row", "column" or "all"
    cols: int
    period: int
    block_rows: int
    block_cols: int
    repeats: int
    steps: int

    @classmethod
    def of(cls, numel: int, n_groups: int, inner: int, tile: int, most_steps: int) -> "Layout":
        """Lay out elements of which the i-th has the scale (i // inner) % n_groups, in tiles of so many elements."""
        if n_groups == 1:
            by, cols, period = "all", tile, 1
            shape = 1, tile
        elif inner == 1:
            by, cols = "column", n_groups
            shape = fitting(pieces(numel, cols), cols, tile)
            period = shape[0]
        else:
            by, cols, period = "row", inner, n_groups
            shape = fitting(period, cols, tile)
        repeats = pieces(numel, cols * period)
        of_step = pieces(period, shape[0]) * pieces(cols, shape[1])
        return cls(by, cols, period, *shape, repeats, min(max(1, repeats * of_step // PROGRAMS), most_steps, repeats))

    @property
    def programs(self) -> tuple[int, int, int]:
        """Give how many programs there are down the whole matrix, within a period, and across."""
        turns, down = pieces(self.repeats, self.steps), pieces(self.period, self.block_rows)
        return turns, down, pieces(self.cols, self.block_cols)


def fitting(rows: int, cols: int, tile: int) -> tuple[int, int]:
    """Return the shape of tiles, powers of two, of which the fewest elements lie beyond the matrix; rows as long as can be."""
    longest = min(tile, triton.next_power_of_2(cols))
    lengths = [longest >> i for i in range(longest.bit_length()) if longest >> i >= min(NARROWEST, longest)]
    shapes = [(min(tile // length, triton.next_power_of_2(rows)), length) for length in lengths]
    return min(shapes, key=lambda shape: pieces(rows, shape[0]) * pieces(cols, shape[1]) * (shape[0] * shape[1] + 128))


@cache
def _told(numel: int, n_groups: int, inner: int, tile: int, steps: int) -> tuple[int, int, dict[str, Any]]:
    """Return how many programs there are, how many partial sums each group has, and what the kernels are told of the layout."""
    layout = Layout.of(numel, n_groups, inner, tile, steps)
    turns, down, across = layout.programs
    beyond = layout.period % layout.block_rows, layout.cols % layout.block_cols, numel % (layout.period * layout.cols)
    told = {"numel": numel, "cols": layout.cols, "period": layout.period, "BY": layout.by, "WHOLE": not any(beyond),
            "BLOCK_ROWS": layout.block_rows, "BLOCK_COLS": layout.block_cols}  # fmt: skip
    if steps > 1:
        told |= {"repeats": layout.repeats, "n_groups": n_groups, "STEPS": layout.steps, "STAGES": STAGES}
    return turns * down * across, turns * (1 if layout.by == "column" else across), told


@cache
def _sum_tile(n_partial: int, n_groups: int) -> tuple[int, dict[str, int]]:
    """Return how many programs add up partial sums, and how many sums of how many groups each takes at a time."""
    groups = min(triton.next_power_of_2(n_groups), 16)
    tile = {"BLOCK_PARTIAL": min(triton.next_power_of_2(n_partial), SUM_TILE // groups), "BLOCK_GROUPS": groups}
    return pieces(n_groups, groups), tile


@triton.jit
def clip(v, low, high):
    """Clip v, and let a NaN through, which minimum and maximum would hide."""
    return tl.clamp(v, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_half_even(v):
    return (v + ROUND) - ROUND


@triton.jit
def divisor(s):
    """Return what `quotient` divides by: a power of two that makes s ordinary, less their product, and its inverse."""
    size = tl.abs(s)
    unit = tl.where(size < 1.0 / ORDINARY, ORDINARY, tl.where(size > ORDINARY, 1.0 / ORDINARY, 1.0))
    return unit, -s * unit, tl.math.div_rn(tl.zeros_like(s) + 1.0, s * unit)


@triton.jit
def quotient(x, by):
    """Return x / s as division rounds it, without one: the `divisor` is shared by many x.

    x * inverse is off by less than two units of its last digit. With the remainder, which `fma` forms exactly, it rounds as the
    quotient: all that lie so near a tie that what is still off could matter were tried. Remainders of |x| < 2**-100 are not
    exact, but the level of such is that of 0. An infinite x stays so.
    """
    unit, less_s, inverse = by
    x = x * unit
    if INTERPRETED:  # where `fma` rounds twice
        v = tl.math.div_rn(x, tl.zeros_like(x) - less_s)
    else:
        near = clip(x * inverse, -FAR, FAR)
        v = tl.fma(tl.fma(near, less_s + tl.zeros_like(x), x), inverse + tl.zeros_like(x), near)
    return v


@triton.jit
def exp2(x):
    """Return 2^x, to two last bits or so; below the least normal float32 it is 0, which saves three instructions of four."""
    if INTERPRETED:
        found = tl.exp2(x)
    else:
        found = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return found


@triton.jit
def reciprocal(x):
    """Return 1 / x to two last bits or so."""
    if INTERPRETED:
        found = 1.0 / x
    else:
        found = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return found


@triton.jit
def gelu(x):
    """Return x Phi(x) and its derivative Phi(x) + x phi(x), Phi the normal distribution; float32.

    It takes a third of the instructions that an error function does, as Phi shares its power with phi.
    """
    none = tl.zeros_like(x)
    power = exp2(x * x * -HALF_LOG2E)
    t = reciprocal(tl.fma(tl.abs(x), none + SLOPE_OF_T, none + 1.0))
    beyond = tl.fma(tl.fma(tl.fma(t, none + B5, none + B4), t, none + B3), t, none + B2)
    beyond = tl.fma(beyond, t, none + B1) * t * power
    below = tl.where(x < 0.0, beyond, 1.0 - beyond)
    return x * below, tl.fma(x * INVERSE_ROOT_2PI, power, below)


@triton.jit
def straight_through(v, g, qmin, qmax, shift, low, high, ELASTIC: tl.constexpr, ENDS_TOGETHER: tl.constexpr):
    """Return what passes of the gradient g at v, in units of the scale; the level of v; what each entry adds to d scale.

    ENDS_TOGETHER says that levels end where the gradient does, and are not shifted.
    """
    if ENDS_TOGETHER:
        clipped = clip(v, qmin, qmax)
        inside = clipped == v
        level = round_half_even(clipped)
    else:
        inside = (v >= low) & (v <= high)
        level = round_half_even(clip(v - shift, qmin, qmax)) + shift
    of_scale = g * level if ELASTIC else g * (level - tl.where(inside, v, 0.0))
    return tl.where(inside, g, 0.0), level, of_scale


@triton.jit
def _place(cols, period, STEPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return rows within a period and columns of a program's tile, the repeat that it begins with, and where its elements are."""
    across = tl.cdiv(cols, BLOCK_COLS)
    tiles = tl.cdiv(period, BLOCK_ROWS) * across  # of a period
    tile = tl.program_id(0) % tiles
    row = (tile // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tile % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    begin = (tl.program_id(0) // tiles) * STEPS
    return row, col, begin, begin.to(tl.int64) * period * cols + (row[:, None] * cols + col[None, :])


@triton.jit
def _exist(row, col, where, numel, cols, period, BY: tl.constexpr, WHOLE: tl.constexpr):
    """Return which elements of a tile exist: masks of multiples of 16 leave loads wide."""
    if WHOLE:
        there = tl.full(where.shape, True, tl.int1)
    elif BY == "row":
        there = (row < period)[:, None] & (col < cols)[None, :]
    else:
        there = (col < cols)[None, :] & (where < numel)
    return there


@triton.jit
def _of_groups(values, row, col, cols, period, BY: tl.constexpr):
    """Return the values of the groups that a tile's rows or columns belong to, shaped to broadcast."""
    if BY == "all":
        found = tl.load(values)
    elif BY == "column":
        found = tl.load(values + col, mask=col < cols, other=1.0)[None, :]
    else:
        found = tl.load(values + row, mask=row < period, other=1.0)[:, None]
    return found


@triton.jit
def _forward(x, out, scale, offset, numel, cols, period, qmin, qmax, SHIFT: tl.constexpr, GELU: tl.constexpr,
             BY: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, col, _, where = _place(cols, period, 1, BLOCK_ROWS, BLOCK_COLS)
    there = _exist(row, col, where, numel, cols, period, BY, WHOLE)
    v = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    if GELU:
        v, _ = gelu(v)
    s = _of_groups(scale, row, col, cols, period, BY)
    by = divisor(s)
    if offset is not None:
        o = _of_groups(offset, row, col, cols, period, BY)
        v = v - o
    v = quotient(v, by)
    x_hat = (round_half_even(clip(v - SHIFT, qmin, qmax)) + SHIFT) * s
    if offset is not None:
        x_hat = x_hat + o
    tl.store(out + where, x_hat.to(out.dtype.element_ty), mask=there)


@triton.jit
def _backward(x, grad, scale, offset, d_x, x_hat, partial, numel, cols, period, repeats, n_groups, n_partial, qmin, qmax, low,
              high, SHIFT: tl.constexpr, GELU: tl.constexpr, ELASTIC: tl.constexpr, ENDS_TOGETHER: tl.constexpr,
              BY: tl.constexpr, WHOLE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
              BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, col, begin, where = _place(cols, period, STEPS, BLOCK_ROWS, BLOCK_COLS)
    s = _of_groups(scale, row, col, cols, period, BY)
    by = divisor(s)
    if offset is not None:
        o = _of_groups(offset, row, col, cols, period, BY)
    d_scale, d_offset = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32), tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for _ in tl.range(begin, tl.minimum(begin + STEPS, repeats), num_stages=STAGES):
        there = _exist(row, col, where, numel, cols, period, BY, WHOLE)
        v = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
        if GELU:
            v, slope = gelu(v)
        if offset is not None:
            v = v - o
        v = quotient(v, by)
        passed, level, of_scale = straight_through(v, g, qmin, qmax, SHIFT, low, high, ELASTIC, ENDS_TOGETHER)
        d_scale += of_scale
        if offset is not None:
            d_offset += g - passed
        if GELU:
            passed = passed * slope
        tl.store(d_x + where, passed.to(d_x.dtype.element_ty), mask=there)
        if x_hat is not None:
            image = level * s
            if offset is not None:
                image = image + o
            tl.store(x_hat + where, image.to(x_hat.dtype.element_ty), mask=there)
        where += period * cols
    turn = begin // STEPS
    _store_partial(partial, d_scale, row, col, turn, cols, period, n_groups, BY, BLOCK_COLS)
    if offset is not None:
        of_offset = partial + n_partial * n_groups
        _store_partial(of_offset, d_offset, row, col, turn, cols, period, n_groups, BY, BLOCK_COLS)


@triton.jit
def _store_partial(partial, entries, row, col, turn, cols, period, n_groups, BY: tl.constexpr,
                   BLOCK_COLS: tl.constexpr):  # fmt: skip
    """Write the sums of a program's entries for each group to its line of (n_partial, n_groups)."""
    if BY == "all":
        tl.store(partial + turn, tl.sum(entries))
    elif BY == "column":
        tl.store(partial + turn * n_groups + col, tl.sum(entries, axis=0), mask=col < cols)
    else:
        across = tl.cdiv(cols, BLOCK_COLS)
        line = turn * across + tl.program_id(0) % across
        tl.store(partial + line * n_groups + row, tl.sum(entries, axis=1), mask=row < period)


@triton.jit
def _add_partial(partial, sums, n_partial, n_groups, BLOCK_PARTIAL: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Add the partial sums of a few groups, of d scale or of d offset, to float64 sums."""
    group = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    total = tl.zeros((BLOCK_PARTIAL, BLOCK_GROUPS), tl.float64)
    for first in range(0, n_partial, BLOCK_PARTIAL):
        line = first + tl.arange(0, BLOCK_PARTIAL)
        at = (tl.program_id(1) * n_partial + line)[:, None] * n_groups + group[None, :]
        there = (line < n_partial)[:, None] & (group < n_groups)[None, :]
        total += tl.load(partial + at, mask=there, other=0.0).to(tl.float64)
    at = sums + tl.program_id(1) * n_groups + group
    tl.store(at, tl.load(at, mask=group < n_groups, other=0.0) + tl.sum(total, axis=0), mask=group < n_groups)


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, inner: int, qmin: int, qmax: int, shift: float, isa: int = 0, *,
    GELU: bool = False,
) -> Tensor:  # fmt: skip
    """Return x_hat in the dtype of contiguous x, or of its GELU; the i-th element has the scale (i // inner) % n_groups."""
    out = torch.empty_like(x)
    programs, _, told = _told(x.numel(), scale.numel(), inner, FORWARD_TILE, 1)
    launch(
        _forward, (programs,), OPTIONS, x=x, out=out, scale=scale, offset=offset, qmin=float(qmin), qmax=float(qmax),
        SHIFT=float(shift), GELU=GELU, **told,
    )  # fmt: skip
    return out


def fake_quantize_backward(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, inner: int, qmin: int, qmax: int, shift: float,
    low: float, high: float, elastic: bool, d_x: Tensor, x_hat: Tensor | None, sums: Tensor, isa: int = 0, *,
    GELU: bool = False,
) -> None:  # fmt: skip
    """Write dL/dx, which may take grad's place, and x_hat; add d scale and d offset to float64 `sums` (2, n_groups)."""
    n_groups, kinds = scale.numel(), 1 if offset is None else 2
    programs, n_partial, told = _told(x.numel(), n_groups, inner, GELU_TILE if GELU else TILE, STEPS)
    partial = torch.empty(kinds * n_partial * n_groups, dtype=torch.float32, device=x.device)
    launch(
        _backward, (programs,), OPTIONS, x=x, grad=grad, scale=scale, offset=offset, d_x=d_x, x_hat=x_hat, partial=partial,
        n_partial=n_partial, qmin=float(qmin), qmax=float(qmax), low=float(low), high=float(high), SHIFT=float(shift),
        GELU=GELU, ELASTIC=elastic, ENDS_TOGETHER=shift == 0 and low == qmin, **told,
    )  # fmt: skip
    groups, tile = _sum_tile(n_partial, n_groups)
    counts = {"n_partial": n_partial, "n_groups": n_groups}
    launch(_add_partial, (groups, kinds), SUM_OPTIONS, partial=partial, sums=sums, **counts, **tile)


def gelu_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, inner: int, qmin: int, qmax: int, shift: float, isa: int = 0
) -> Tensor:
    """Do `fake_quantize` of the GELU of x, which is not rounded in between."""
    return fake_quantize(x, scale, offset, inner, qmin, qmax, shift, GELU=True)


def gelu_quantize_backward(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, inner: int, qmin: int, qmax: int, shift: float,
    low: float, high: float, elastic: bool, d_x: Tensor, x_hat: Tensor | None, sums: Tensor, isa: int = 0,
) -> None:  # fmt: skip
    """Do `fake_quantize_backward` of the GELU of x, through which dL/dx goes."""
    fake_quantize_backward(
        x, grad, scale, offset, inner, qmin, qmax, shift, low, high, elastic, d_x, x_hat, sums, GELU=True
    )


OPERATORS = (fake_quantize, fake_quantize_backward, gelu_quantize, gelu_quantize_backward)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(8, 197, 192, dtype=dtype)
        for groups, inner in ((1, x.numel()), (197, 192), (192, 1)):
            scale, sums = torch.ones(groups), torch.zeros(2, groups, dtype=torch.float64)
            for offset, image in ((None, None), (scale, x)):
                fake_quantize(x, scale, offset, inner, -2, 1, 0.0)
                fake_quantize_backward(x, x, scale, offset, inner, -2, 1, 0.0, -2.0, 1.0, False, x, image, sums)
        fake_quantize_backward(x, x, scale, None, 1, -1, 0, 0.5, -0.5, 0.5, True, x, None, sums)
        one, sums = torch.ones(1), torch.zeros(2, 1, dtype=torch.float64)
        gelu_quantize(x, one, one, x.numel(), 0, 3, 0.0)
        gelu_quantize_backward(x, x, one, one, x.numel(), 0, 3, 0.0, 0.0, 3.0, False, x, x, sums)
    whole = torch.zeros(64, 192, 192, dtype=dtype)  # tiles end where it does
    for groups, inner in ((1, whole.numel()), (192, 192), (192, 1)):
        scale, sums = torch.ones(groups), torch.zeros(2, groups, dtype=torch.float64)
        fake_quantize(whole, scale, None, inner, -2, 1, 0.0)
        fake_quantize_backward(whole, whole, scale, None, inner, -2, 1, 0.0, -2.0, 1.0, False, whole, None, sums)
