"""Activation quantizers as Triton kernels: forward in one pass, backward with the sums of d scale and d offset in another.

An activation is read as a matrix (rows, cols) in which either a row has one scale, row r that of group r % n_groups (a scale
for all, for each head or token), or a column has (a scale for each channel). A program takes a tile of it and, backward, writes
one float32 sum for each row or column of its tile; those are added up in float64, in one order: no atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.launch import launch

TILE = 2048  # elements of a program
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to |v| < 2**22 rounds half to even, as float32 addition does


class Layout(NamedTuple):
    """Say how an activation lies as a matrix, and what part of it a program takes."""

    rows: int
    cols: int
    per_column: bool
    block_rows: int
    block_cols: int

    @classmethod
    def of(cls, numel: int, n_groups: int, inner: int) -> "Layout":
        """Lay out elements of which the i-th has the scale (i // inner) % n_groups."""
        per_column = inner == 1 and n_groups > 1
        cols = n_groups if per_column else numel if n_groups == 1 else inner
        block_cols = min(triton.next_power_of_2(cols), TILE)
        rows = numel // cols
        return cls(rows, cols, per_column, min(triton.next_power_of_2(rows), TILE // block_cols), block_cols)

    @property
    def tiles(self) -> tuple[int, int]:
        """Give how many tiles there are along rows and columns."""
        return triton.cdiv(self.rows, self.block_rows), triton.cdiv(self.cols, self.block_cols)

    def arguments(self, n_groups: int) -> dict[str, int | bool]:
        return {"rows": self.rows, "cols": self.cols, "n_groups": n_groups, "PER_COLUMN": self.per_column,
                "BLOCK_ROWS": self.block_rows, "BLOCK_COLS": self.block_cols}  # fmt: skip


@triton.jit
def clip(v, low, high):
    """Clip v, and let a NaN through, which minimum and maximum would hide."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def round_half_even(v):
    return (v + ROUND) - ROUND


@triton.jit
def straight_through(v, g, qmin, qmax, shift, low, high, ELASTIC: tl.constexpr, ENDS_TOGETHER: tl.constexpr):
    """Return what passes of the gradient g at v, in units of the scale; the level of v; what each entry adds to d scale."""
    passed = tl.where((v >= low) & (v <= high), g, 0.0)
    level = round_half_even(clip(v - shift, qmin, qmax)) + shift
    if ELASTIC:
        of_scale = g * level
    else:
        clipped = clip(v, low, high)
        outside = level if ENDS_TOGETHER else clipped
        of_scale = g * (level - clipped) + (g - passed) * outside
    return passed, level, of_scale


@triton.jit
def tile_of(rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return the rows and columns of this program's tile, where they are, and which of it exists."""
    across = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = (tl.program_id(0) % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    where = row.to(tl.int64)[:, None] * cols + col[None, :]
    return row, col, where, (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def _of_groups(values, row, col, rows, cols, n_groups, PER_COLUMN: tl.constexpr):
    """Return the values of the groups that a tile's rows or columns belong to, shaped to broadcast."""
    if PER_COLUMN:
        found = tl.load(values + col, mask=col < cols, other=1.0)[None, :]
    else:
        found = tl.load(values + row % n_groups, mask=row < rows, other=1.0)[:, None]
    return found


@triton.jit
def _forward(x, out, scale, offset, rows, cols, n_groups, qmin, qmax, shift, HAS_OFFSET: tl.constexpr,
             PER_COLUMN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, col, where, there = tile_of(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    s = _of_groups(scale, row, col, rows, cols, n_groups, PER_COLUMN)
    v = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        o = _of_groups(offset, row, col, rows, cols, n_groups, PER_COLUMN)
        v = v - o
    v = tl.math.div_rn(v, s + tl.zeros_like(v))
    x_hat = (round_half_even(clip(v - shift, qmin, qmax)) + shift) * s
    if HAS_OFFSET:
        x_hat = x_hat + o
    tl.store(out + where, x_hat.to(out.dtype.element_ty), mask=there)


@triton.jit
def _backward(x, grad, scale, offset, d_x, x_hat, d_scale, d_offset, rows, cols, n_groups, qmin, qmax, shift, low, high,
              HAS_OFFSET: tl.constexpr, HAS_IMAGE: tl.constexpr, ELASTIC: tl.constexpr, ENDS_TOGETHER: tl.constexpr,
              PER_COLUMN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    row, col, where, there = tile_of(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    s = _of_groups(scale, row, col, rows, cols, n_groups, PER_COLUMN)
    v = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        o = _of_groups(offset, row, col, rows, cols, n_groups, PER_COLUMN)
        v = v - o
    v = tl.math.div_rn(v, s + tl.zeros_like(v))
    passed, level, of_scale = straight_through(v, g, qmin, qmax, shift, low, high, ELASTIC, ENDS_TOGETHER)
    AXIS: tl.constexpr = 0 if PER_COLUMN else 1
    across = tl.cdiv(cols, BLOCK_COLS)
    # Of the partial sums, one a row and column of tiles: (rows, tiles across), or (tiles down, cols).
    slot = (tl.program_id(0) // across) * cols + col if PER_COLUMN else row * across + tl.program_id(0) % across
    exists = col < cols if PER_COLUMN else row < rows
    tl.store(d_scale + slot, tl.sum(of_scale, axis=AXIS), mask=exists)
    if HAS_OFFSET:
        tl.store(d_offset + slot, tl.sum(g - passed, axis=AXIS), mask=exists)
    tl.store(d_x + where, passed.to(d_x.dtype.element_ty), mask=there)
    if HAS_IMAGE:
        image = level * s
        if HAS_OFFSET:
            image = image + o
        tl.store(x_hat + where, image.to(x_hat.dtype.element_ty), mask=there)


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, inner: int, qmin: int, qmax: int, shift: float, isa: int = 0
) -> Tensor:
    """Return x_hat in the dtype of contiguous x; the i-th element has the scale (i // inner) % n_groups."""
    out, n_groups = torch.empty_like(x), scale.numel()
    layout = Layout.of(x.numel(), n_groups, inner)
    down, across = layout.tiles
    launch(
        _forward, (down * across,), x=x, out=out, scale=scale, offset=offset, qmin=float(qmin), qmax=float(qmax),
        shift=float(shift), HAS_OFFSET=offset is not None, **layout.arguments(n_groups),
    )  # fmt: skip
    return out


def fake_quantize_backward(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, inner: int, qmin: int, qmax: int, shift: float,
    low: float, high: float, elastic: bool, d_x: Tensor, x_hat: Tensor | None, sums: Tensor, isa: int = 0,
) -> None:  # fmt: skip
    """Write dL/dx, which may take grad's place, and x_hat; add d scale and d offset to float64 `sums` (2, n_groups)."""
    n_groups = scale.numel()
    layout = Layout.of(x.numel(), n_groups, inner)
    down, across = layout.tiles
    shape = (down, n_groups) if layout.per_column else (layout.rows, across)
    partial = torch.empty(1 if offset is None else 2, *shape, dtype=torch.float32, device=x.device)
    launch(
        _backward, (down * across,), x=x, grad=grad, scale=scale, offset=offset, d_x=d_x, x_hat=x_hat, d_scale=partial[0],
        d_offset=None if offset is None else partial[1], qmin=float(qmin), qmax=float(qmax), shift=float(shift),
        low=float(low), high=float(high), HAS_OFFSET=offset is not None, HAS_IMAGE=x_hat is not None, ELASTIC=elastic,
        ENDS_TOGETHER=shift == 0 and low == qmin, **layout.arguments(n_groups),
    )  # fmt: skip
    by_group = partial if layout.per_column else partial.view(len(partial), -1, n_groups, across)
    sums[: len(partial)] += by_group.sum(dim=1 if layout.per_column else (1, 3), dtype=torch.float64)


OPERATORS = (fake_quantize, fake_quantize_backward)


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
