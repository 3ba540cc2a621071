"""Products of int8 codes on tensor cores, and what surrounds them: x quantized row by row, sums scaled once at the end.

Sums are int32, so no tile's shape or order changes a bit. Where the GPU can copy whole tiles (Hopper and later), as many programs
as run at once take tile after tile, and the copies of the next go on under the end of one.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import INTERPRETED, ROUND, divisor, fitting, pieces, quotient
from dsquant.ops.gpu.launch import launch

QUANTIZE_TILE = 2048  # elements
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "SHARED_M": 8}
OPTIONS = {"num_warps": 4, "num_stages": 3}
RESIDENT = 2  # programs of the above that a multiprocessor runs at once: one multiplies while the other ends its tile
LOADED = TILE, {"num_warps": 8, "num_stages": 3}  # on GPUs that do not copy whole tiles, and of float32 outputs
ODD = (
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SHARED_M": 8},
    {"num_warps": 4, "num_stages": 2},
)  # rows off 16 bytes


ROUND_BITS = tl.constexpr(0x4B400000)  # of ROUND
EXACT = 1 << 22  # sums below it are turned to float32 by their bits


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
    v = quotient(v, divisor(tl.load(in_scale))) - in_shift
    nan = v != v
    if INTERPRETED:  # elsewhere a clip that does not let NaN through makes it an end
        v = tl.where(nan, qmin, v)
    rounded = tl.clamp(v, qmin, qmax) + ROUND  # whose last bits are the code
    code = rounded.to(tl.int32, bitcast=True) - (ROUND_BITS + zero)
    return tl.where(there, code, 0), nan & there


@triton.jit
def scaled(sums, n, there, cols, s, bias, code_sums, x_sum, nan, in_scale, in_offset, x_level, P: tl.constexpr, Q: tl.constexpr,
           SMALL: tl.constexpr = False):  # fmt: skip
    """Return outputs (rows, outs) of int32 sums by the arithmetic of `integer_definition`; s are scales of rows n.

    With a = code_x - zero and code_w, p and q that make levels whole, x_level = p (zero + shift_x) and q shift_w = q - 1:
        sum X W = p q sum a code_w + x_level q sum code_w + (q - 1) (p sum a + x_level cols)
    SMALL says that it is less than 2**22: turned to float32 by the bits of `round_half_even`, which takes no conversion.
    """
    of_codes = tl.load(code_sums + n, mask=there, other=0)
    of_column = of_codes * (x_level * Q)
    if SMALL:
        of_column += ROUND_BITS
    total = sums if P * Q == 1 else sums * (P * Q)
    if Q > 1:
        total = total + ((x_sum * P + x_level * cols) * (Q - 1))[:, None]
    total = total + of_column[None, :]
    factor = tl.load(in_scale) * s * (1.0 / (P * Q))
    if SMALL:
        out = (total.to(tl.float32, bitcast=True) - ROUND) * factor[None, :]
    else:
        out = total.to(tl.float32) * factor[None, :]
    if in_offset is not None or bias is not None:
        constant = tl.zeros_like(s).to(tl.float64)
        if in_offset is not None:
            levels = of_codes.to(tl.float64) + cols * (0.5 * (Q - 1))
            constant = tl.load(in_offset).to(tl.float64) * s.to(tl.float64) * levels
        if bias is not None:
            constant = constant + tl.load(bias + n, mask=there, other=0.0).to(tl.float64)
        out = out + constant.to(tl.float32)[None, :]
    return tl.where(nan[:, None], float("nan"), out)


@triton.jit
def store_tile(y, out, m, n, rows, outs):
    where = m.to(tl.int64)[:, None] * outs + n[None, :]
    tl.store(y + where, out.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < outs)[None, :])


@triton.jit
def quantize_rows(program, x, x_codes, of_rows, rows, cols, in_scale, in_offset, qmin, qmax, in_shift, zero, WHOLE: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Write int8 `code - zero` of a few rows of x, and to `of_rows` (2, rows) their sums and whether there is a NaN in them."""
    m = program * BLOCK_M + tl.arange(0, BLOCK_M)
    line = m.to(tl.int64)[:, None] * cols
    total, found = tl.zeros((BLOCK_M, BLOCK_K), tl.int32), tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = tl.full((BLOCK_M, BLOCK_K), True, tl.int1) if WHOLE else (m < rows)[:, None] & (k < cols)[None, :]
        v = tl.load(x + line + k[None, :], mask=there, other=0.0)
        code, bad = quantized(v, there, in_scale, in_offset, qmin, qmax, in_shift, zero)
        tl.store(x_codes + line + k[None, :], code.to(tl.int8), mask=there)
        total += code
        found |= bad.to(tl.int32)
    tl.store(of_rows + m, tl.sum(total, axis=1), mask=m < rows)
    tl.store(of_rows + rows + m, tl.max(found, axis=1), mask=m < rows)


@triton.jit
def _quantize_rows(x, x_codes, of_rows, rows, cols, in_scale, in_offset, qmin, qmax, in_shift, zero, WHOLE: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    quantize_rows(tl.program_id(0), x, x_codes, of_rows, rows, cols, in_scale, in_offset, qmin, qmax, in_shift, zero, WHOLE,
                  BLOCK_M, BLOCK_K)  # fmt: skip


@triton.jit
def _place(tile, rows, outs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARED_M: tl.constexpr):
    """Return where a tile begins: those that follow each other go down SHARED_M before they go across, so that L2 holds both."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(outs, BLOCK_N)
    band = tile // (SHARED_M * across) * SHARED_M
    place, height = tile % (SHARED_M * across), tl.minimum(down - band, SHARED_M)
    return (band + place % height) * BLOCK_M, (place // height) * BLOCK_N


@triton.jit
def finish(y, sums, m, n, rows, outs, cols, scale, bias, code_sums, of_rows, in_scale, in_offset, x_level, P: tl.constexpr,
           Q: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    """Scale a tile of int32 sums and write it."""
    there = n < outs
    s = tl.load(scale + n, mask=there, other=0.0)
    x_sum = tl.load(of_rows + m, mask=m < rows, other=0)
    nan = tl.load(of_rows + rows + m, mask=m < rows, other=0) > 0
    out = scaled(sums, n, there, cols, s, bias, code_sums, x_sum, nan, in_scale, in_offset, x_level, P, Q, SMALL)
    store_tile(y, out, m, n, rows, outs)


@triton.jit
def _product(x_codes, codes, scale, bias, code_sums, of_rows, in_scale, in_offset, y, rows, outs, cols, x_level,
             P: tl.constexpr, Q: tl.constexpr, SMALL: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARED_M: tl.constexpr):  # fmt: skip
    """Multiply a tile of codes of x (rows, cols) and of a weight (outs, cols)."""
    top, left = _place(tl.program_id(0), rows, outs, BLOCK_M, BLOCK_N, SHARED_M)
    m, n = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    of_x, of_w = x_codes + m.to(tl.int64)[:, None] * cols, codes + n.to(tl.int64)[None, :] * cols
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x_there, w_there = (m < rows)[:, None], (n < outs)[None, :]
        if not WHOLE:
            x_there, w_there = x_there & (k < cols)[None, :], w_there & (k < cols)[:, None]
        a = tl.load(of_x + k[None, :], mask=x_there, other=0)
        w = tl.load(of_w + k[:, None], mask=w_there, other=0)
        sums = tl.dot(a, w, sums, out_dtype=tl.int32)
    finish(y, sums, m, n, rows, outs, cols, scale, bias, code_sums, of_rows, in_scale, in_offset, x_level, P, Q, SMALL)


@triton.jit
def _product_by_copies(x_codes, codes, scale, bias, code_sums, of_rows, in_scale, in_offset, y, rows, outs, cols, x_level,
                       P: tl.constexpr, Q: tl.constexpr, SMALL: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARED_M: tl.constexpr):  # fmt: skip
    """Do what `_product` does for tile after tile, which the GPU copies whole.

    FLAT makes one loop of the parts of all tiles: copies for the next are under way where one ends, at the cost of registers.
    """
    of_x = tl.make_tensor_descriptor(x_codes, [rows, cols], [cols, 1], [BLOCK_M, BLOCK_K])
    of_w = tl.make_tensor_descriptor(codes, [outs, cols], [cols, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(outs, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        top, left = _place(tile, rows, outs, BLOCK_M, BLOCK_N, SHARED_M)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for first in range(0, cols, BLOCK_K):
            a, w = of_x.load([top, first]), of_w.load([left, first])
            sums = tl.dot(a, tl.trans(w), sums, out_dtype=tl.int32)
        m, n = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
        finish(
            y, sums, m, n, rows, outs, cols, scale, bias, code_sums, of_rows, in_scale, in_offset, x_level, P, Q, SMALL
        )


@cache
def _quantize_tile(rows: int, cols: int) -> dict[str, int | bool]:
    """Return what a program quantizes, and whether none goes beyond x."""
    height, width = fitting(rows, max(cols, 64), QUANTIZE_TILE)
    return {"BLOCK_M": height, "BLOCK_K": width, "WHOLE": rows % height == cols % width == 0}


def quantizing(x: Tensor, rows: int, grid: InputGrid) -> tuple[int, dict[str, Any]]:
    """Return how many programs quantize contiguous x, and the arguments of `quantize_rows`, where its results go among them."""
    tile, cols = _quantize_tile(rows, x.shape[-1]), x.shape[-1]
    found = {
        "x_codes": torch.empty_like(x, dtype=torch.int8),
        "of_rows": torch.empty(2 * rows, dtype=torch.int32, device=x.device),
    }
    return pieces(rows, tile["BLOCK_M"]), {"x": x, "rows": rows, "cols": cols, **found, **grid._asdict(), **tile}


def quantize(x: Tensor, rows: int, grid: InputGrid) -> tuple[Tensor, Tensor]:
    """Return int8 `code - zero` of contiguous x, and (2, rows) of the sum of each row and whether it holds a NaN, flat."""
    programs, told = quantizing(x, rows, grid)
    launch(_quantize_rows, (programs,), **told)
    return told["x_codes"], told["of_rows"]


@cache
def _copies(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has that copies whole tiles; 0 for others, 1 for the interpreter."""
    if device.type == "cpu":
        return 1
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count if found.major >= 9 else 0


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Give kernels room for the descriptors of what they copy."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def multiply(
    quantized_x: dict[str, Any], y: Tensor, grid: InputGrid, codes: Tensor, scale: Tensor, code_sums: Tensor,
    bias: Tensor | None, shift: float, reach: float,
) -> None:  # fmt: skip
    """Write to y (..., out) the product of x, quantized as `quantizing` said, and int8 codes (out, in) with a scale each row.

    `reach` is the largest level of the weight.
    """
    (outs, cols), rows = codes.shape, quantized_x["rows"]
    levels = grid.whole_levels(shift)
    furthest = max(abs(grid.qmin + grid.in_shift), abs(grid.qmax + grid.in_shift))
    told = {
        "x_codes": quantized_x["x_codes"], "of_rows": quantized_x["of_rows"], "in_scale": grid.in_scale,
        "in_offset": grid.in_offset, "codes": codes, "scale": scale, "code_sums": code_sums, "bias": bias, "y": y,
        "rows": rows, "outs": outs, "cols": cols, "SMALL": levels["P"] * levels["Q"] * furthest * reach * cols < EXACT,
        **levels,
    }  # fmt: skip
    # The end of a float32 tile takes the registers that this needs.
    at_once = _copies(y.device) * RESIDENT if cols % 16 == 0 and y.element_size() < 4 else 0
    tile, options = (TILE, OPTIONS) if at_once else ODD if cols % 16 else LOADED
    tiles = pieces(rows, tile["BLOCK_M"]) * pieces(outs, tile["BLOCK_N"])
    if at_once:
        triton.set_allocator(_scratch)
        launch(_product_by_copies, (min(tiles, at_once),), options, **told, **tile, FLAT=told["SMALL"])
    else:
        launch(_product, (tiles,), options, **told, **tile, WHOLE=cols % tile["BLOCK_K"] == 0)
