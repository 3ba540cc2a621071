"""Products of int8 codes on tensor cores, and what surrounds them: x quantized row by row, sums scaled once at the end.

Sums are int32, so no tile's shape or order changes a bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import clip, round_half_even
from dsquant.ops.gpu.launch import launch

QUANTIZE_TILE = {"BLOCK_K": 1024}
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "SHARED_M": 8}
OPTIONS = {"num_warps": 8, "num_stages": 3}


class InputGrid(NamedTuple):
    """Say how x is quantized: `code = round(clip((x - in_offset) / in_scale - in_shift, qmin, qmax))`, kept less `zero`."""

    in_scale: Tensor | None = None
    in_offset: Tensor | None = None
    qmin: float = 0.0
    qmax: float = 0.0
    in_shift: float = 0.0
    zero: int = 0

    @classmethod
    def of(cls, in_scale: Tensor, in_offset: Tensor | None, qmin: int, qmax: int, in_shift: float) -> "InputGrid":
        """Return the grid of codes with one scale, kept so that they fill int8."""
        return cls(in_scale, in_offset, float(qmin), float(qmax), float(in_shift), qmin + 128)

    def whole_levels(self, shift: float) -> dict[str, int]:
        """Return P and Q, which make levels of x and of weights whole, and x_level = P (zero + in_shift)."""
        p, q = 2 if self.in_shift else 1, 2 if shift else 1
        return {"P": p, "Q": q, "x_level": int(p * (self.zero + self.in_shift))}


@triton.jit
def quantized(v, there, in_scale, in_offset, qmin, qmax, in_shift, zero):
    """Return int32 `code - zero` of each value, 0 where there is none, and whether it is NaN."""
    v = v.to(tl.float32)
    if in_offset is not None:
        v = v - tl.load(in_offset)
    v = tl.math.div_rn(v, tl.load(in_scale) + tl.zeros_like(v)) - in_shift
    nan = v != v
    code = round_half_even(clip(tl.where(nan, qmin, v), qmin, qmax)).to(tl.int32)
    return tl.where(there, code - zero, 0), nan & there


@triton.jit
def scaled(sums, n, there, cols, s, bias, code_sums, x_sum, nan, in_scale, in_offset, x_level, P: tl.constexpr,
           Q: tl.constexpr):  # fmt: skip
    """Return outputs (rows, outs) of int32 sums by the arithmetic of `integer_definition`; s are scales of rows n.

    With a = code_x - zero and code_w, p and q that make levels whole, x_level = p (zero + shift_x) and q shift_w = q - 1:
        sum X W = p q sum a code_w + x_level q sum code_w + (q - 1) (p sum a + x_level cols)
    """
    of_codes = tl.load(code_sums + n, mask=there, other=0)
    total = sums * (P * Q) + (of_codes * x_level * Q)[None, :] + ((x_sum * P + x_level * cols) * (Q - 1))[:, None]
    constant = tl.zeros_like(s).to(tl.float64)
    if in_offset is not None:
        levels = of_codes.to(tl.float64) + cols * (0.5 * (Q - 1))
        constant = tl.load(in_offset).to(tl.float64) * s.to(tl.float64) * levels
    if bias is not None:
        constant = constant + tl.load(bias + n, mask=there, other=0.0).to(tl.float64)
    factor = tl.load(in_scale) * s * (1.0 / (P * Q))
    out = total.to(tl.float32) * factor[None, :] + constant.to(tl.float32)[None, :]
    return tl.where(nan[:, None], float("nan"), out)


@triton.jit
def store_tile(y, out, m, n, rows, outs):
    where = m.to(tl.int64)[:, None] * outs + n[None, :]
    tl.store(y + where, out.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < outs)[None, :])


@triton.jit
def _quantize_rows(x, codes, x_sum, nan, cols, in_scale, in_offset, qmin, qmax, in_shift, zero, BLOCK_K: tl.constexpr):
    """Write int8 `code - zero` of a row of x, their sum, and whether the row holds a NaN."""
    row = tl.program_id(0).to(tl.int64)
    total, found = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        v = tl.load(x + row * cols + k, mask=k < cols, other=0.0)
        code, bad = quantized(v, k < cols, in_scale, in_offset, qmin, qmax, in_shift, zero)
        tl.store(codes + row * cols + k, code.to(tl.int8), mask=k < cols)
        total += code
        found |= bad.to(tl.int32)
    tl.store(x_sum + row, tl.sum(total, axis=0))
    tl.store(nan + row, tl.max(found, axis=0))


@triton.jit
def _product(x, codes, scale, bias, code_sums, x_sum, nan, in_scale, in_offset, y, rows, outs, cols, x_level,
             P: tl.constexpr, Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             SHARED_M: tl.constexpr):  # fmt: skip
    # Programs that follow each other go down SHARED_M tiles of x before they go across: both operands stay in L2.
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(outs, BLOCK_N)
    band = tl.program_id(0) // (SHARED_M * across) * SHARED_M
    place, height = tl.program_id(0) % (SHARED_M * across), tl.minimum(down - band, SHARED_M)
    m = (band + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_x, of_w = x + m.to(tl.int64)[:, None] * cols, codes + n.to(tl.int64)[None, :] * cols
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(of_x + k[None, :], mask=(m < rows)[:, None] & (k < cols)[None, :], other=0)
        w = tl.load(of_w + k[:, None], mask=(n < outs)[None, :] & (k < cols)[:, None], other=0)
        sums = tl.dot(a, w, sums, out_dtype=tl.int32)
    there = n < outs
    s = tl.load(scale + n, mask=there, other=0.0)
    of_row = tl.load(x_sum + m, mask=m < rows, other=0)
    bad = tl.load(nan + m, mask=m < rows, other=0) > 0
    out = scaled(sums, n, there, cols, s, bias, code_sums, of_row, bad, in_scale, in_offset, x_level, P, Q)
    store_tile(y, out, m, n, rows, outs)


def quantize(x: Tensor, rows: int, grid: InputGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 `code - zero` of contiguous x, and for each row their sum and whether it holds a NaN."""
    codes = torch.empty_like(x, dtype=torch.int8)
    x_sum, nan = torch.empty(2, rows, dtype=torch.int32, device=x.device)
    found = {"codes": codes, "x_sum": x_sum, "nan": nan, "cols": x.shape[-1]}
    launch(_quantize_rows, (rows,), x=x, **found, **grid._asdict(), **QUANTIZE_TILE)
    return codes, x_sum, nan


def multiply(
    x: Tensor, y: Tensor, grid: InputGrid, codes: Tensor, scale: Tensor, code_sums: Tensor, bias: Tensor | None,
    shift: float,
) -> None:  # fmt: skip
    """Write to y (..., out) the product of contiguous x (..., in), quantized, and int8 codes (out, in) with a scale each row."""
    outs, cols = codes.shape
    rows = y.numel() // outs
    quantized_x, x_sum, nan = quantize(x, rows, grid)
    weight = {"codes": codes, "scale": scale, "code_sums": code_sums, "bias": bias, "outs": outs, "cols": cols}
    of_x = {"x": quantized_x, "x_sum": x_sum, "nan": nan, "in_scale": grid.in_scale, "in_offset": grid.in_offset}
    programs = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(outs, TILE["BLOCK_N"])
    launch(_product, (programs,), OPTIONS, y=y, rows=rows, **of_x, **weight, **grid.whole_levels(shift), **TILE)
