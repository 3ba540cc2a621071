"""Products with packed weights as Triton kernels: codes are decoded in registers, beside the product that takes them.

A program reads whole words of the weight, each once. One row of x goes over a few rows of the weight lane by lane, its input
quantized on the way; more rows take tensor cores, thin tiles up to 16 rows; of quantized rows that are very many, the weight is
unpacked once. Codes, and half integers, are exact in every operand dtype (int8, float16, bfloat16, float32) and sums are int32
or float32: the scale comes once, at the end.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import pieces
from dsquant.ops.gpu.int8_product import (
    InputGrid,
    finish,
    multiply,
    quantize,
    quantize_rows,
    quantized,
    quantizing,
    scaled,
    store_tile,
)
from dsquant.ops.gpu.launch import HOPPER, architecture, interpreted, launch
from dsquant.ops.pack import packed_words

FEW_ROWS = 16
ROW_TILE = {"BLOCK_N": 4, "BLOCK_K": 1024}
MANY_ROWS = 1024  # of x beyond which the weight is unpacked once, not by every tile


def _row_tile(cols: int, n_bits: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile of a program that multiplies one row in floats, and its warps: most rows of x in one go.

    A thread takes four words of each of four rows of the weight, by 16-byte loads, so that four share their part of x.
    """
    depth = 2048 if cols % 2048 == 0 else min(max(triton.next_power_of_2(cols), 512), 4096)
    return {"BLOCK_N": 8, "BLOCK_K": depth}, {"num_warps": min(depth // 512, 4)}


def _tile(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tile of a program that multiplies several rows, and its warps."""
    few, wide = rows <= FEW_ROWS, dtype is torch.float32
    by_four = wide and architecture(device) >= HOPPER  # 13 us for 21 at 197 x 768 x 768 on an H200
    shape = ((16, 16, 128) if wide else (16, 16, 256)) if few else (64, 64, 64)
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), shape, strict=True)), {"num_warps": 4 if few or by_four else 8}


@triton.jit
def _unsigned(words, n, first, outs, row_words, BITS: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr):  # fmt: skip
    """Return codes (BLOCK_N, BLOCK_K) plus 2^(BITS - 1), uint32, of rows n of a weight from element `first` on.

    LANES codes fill whole words.
    """
    WORDS: tl.constexpr = BITS * LANES // 32
    place = (first // LANES + tl.arange(0, BLOCK_K // LANES)) * WORDS
    begin = words + n.to(tl.int64)[:, None] * row_words + place[None, :]
    bit = (tl.arange(0, LANES) * BITS)[None, None, :]  # where a lane's code begins
    there = (n < outs)[:, None]
    for i in tl.static_range(WORDS):
        word = tl.load(begin + i, mask=there & (place < row_words - i)[None, :], other=0)
        word = word.to(tl.uint32, bitcast=True)[:, :, None]
        if WORDS == 1:
            unsigned = word >> bit.to(tl.uint32)
        else:  # a lane takes the bits that its code has in this word, which may be none, or the rest of a code
            at = bit - 32 * i
            low = tl.where((at >= 0) & (at < 32), word >> (at & 31).to(tl.uint32), 0)
            high = tl.where((at < 0) & (at > -BITS), word << (-at & 31).to(tl.uint32), 0)
            unsigned = low if i == 0 else unsigned | low | high
    return tl.reshape(unsigned, (BLOCK_N, BLOCK_K)) & (2**BITS - 1)


@triton.jit
def _codes(words, n, first, outs, row_words, BITS: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the same codes as int32."""
    return _unsigned(words, n, first, outs, row_words, BITS, LANES, BLOCK_N, BLOCK_K).to(tl.int32) - 2 ** (BITS - 1)


@triton.jit
def _levels(words, n, first, outs, row_words, BITS: tl.constexpr, LANES: tl.constexpr, Q: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the levels of the same codes, float32."""
    code = _unsigned(words, n, first, outs, row_words, BITS, LANES, BLOCK_N, BLOCK_K)
    least: tl.constexpr = 2.0 ** (BITS - 1) - 0.5 * (Q - 1)
    if Q == 1:  # an exponent above the code makes it a float32 2^23 more, or 2^22 where there is a bit below
        level = (code | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + least)
    else:
        level = (code << 1 | 0x4A800000).to(tl.float32, bitcast=True) - (2.0**22 + least)
    return level


@triton.jit
def _finish(y, sums, m, n, rows, outs, cols, scale, bias, code_sums, x_sum, nan, in_scale, in_offset, x_level,
            P: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Scale a tile of sums and write it."""
    there = n < outs
    s = tl.load(scale + n, mask=there, other=0.0)
    out = scaled(sums, n, there, cols, s, bias, code_sums, x_sum, nan, in_scale, in_offset, x_level, P, Q, False)
    store_tile(y, out, m, n, rows, outs)


@triton.jit
def _finish_floats(y, sums, m, n, rows, outs, scale, bias):
    """Do the same with a tile of float32 sums."""
    out = sums * tl.load(scale + n, mask=n < outs, other=0.0)[None, :]
    if bias is not None:
        out = out + tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    store_tile(y, out, m, n, rows, outs)


@triton.jit
def _one_row(x, words, scale, bias, code_sums, in_scale, in_offset, y, outs, cols, row_words, qmin, qmax, in_shift, zero,
             x_level, BITS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    total, found = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        v = tl.load(x + k, mask=k < cols, other=0.0)
        code = _codes(words, n, first, outs, row_words, BITS, LANES, BLOCK_N, BLOCK_K)
        a, bad = quantized(v, k < cols, in_scale, in_offset, qmin, qmax, in_shift, zero)
        sums += a[None, :] * code
        total += a
        found |= bad.to(tl.int32)
    one = tl.zeros((1,), tl.int32)
    x_sum, nan = one + tl.sum(total, axis=0), one + tl.max(found, axis=0) > 0
    _finish(y, tl.sum(sums, axis=1)[None, :], one, n, 1, outs, cols, scale, bias, code_sums, x_sum, nan, in_scale, in_offset,
            x_level, P, Q)  # fmt: skip


@triton.constexpr_function
def _group(bits):
    """Return how many codes a lane's group has: a power of two, at most 20 bits."""
    return 1 << (20 // bits).bit_length() - 1


@triton.constexpr_function
def _reversed(place, count):
    """Return the binary digits of `place` in reverse, of as many as `count` has places."""
    return int(f"{place:0{count.bit_length() - 1}b}"[::-1], 2)


@triton.jit
def _lanes(x, COUNT: tl.constexpr):
    """Return the COUNT columns of x (units, COUNT), those of even place first, and so within each half."""
    even, odd = tl.split(x if COUNT == 2 else tl.reshape(x, (x.shape[0], COUNT // 2, 2)))
    if COUNT == 2:
        found = (even, odd)
    else:
        found = _lanes(even, COUNT // 2) + _lanes(odd, COUNT // 2)
    return found


@triton.jit
def _add_lane(sums, x, unit, BITS: tl.constexpr, Q: tl.constexpr, LANE: tl.constexpr):
    """Return sums (outs, units) plus a lane of x (units,) times its levels; `unit` holds words that begin and end with a code.

    A code that stays where it is in its word, AT, is the float32 2^23 + code 2^AT once an exponent is put above it: there are
    neither shifts nor conversions, and all of it is exact. A group of codes shares a shift.
    """
    GROUP: tl.constexpr = _group(BITS)
    BEGIN: tl.constexpr = LANE // GROUP * GROUP * BITS
    word = unit[BEGIN // 32]
    if BEGIN % 32 > 0:
        word = word >> BEGIN % 32
    if BEGIN % 32 + GROUP * BITS > 32:
        word |= unit[BEGIN // 32 + 1] << (32 - BEGIN % 32)
    if Q == 2:
        word = word << 1  # the least level, half an integer, takes a bit below the code
    AT: tl.constexpr = LANE % GROUP * BITS + Q - 1
    least: tl.constexpr = 2.0**23 + (2.0 ** (BITS - 1) - 0.5 * (Q - 1)) * 2.0**AT
    level = ((word | 0x4B000000) & (0x4B000000 | (2**BITS - 1) << AT)).to(tl.float32, bitcast=True) - least
    return tl.fma(level, (x * 2.0**-AT)[None, :], sums)


@triton.jit
def _one_row_of_floats(x, words, scale, bias, y, outs, cols, row_words, BITS: tl.constexpr, LANES: tl.constexpr,
                       Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    UNITS: tl.constexpr = BLOCK_K // LANES  # of LANES codes in WORDS words
    WORDS: tl.constexpr = BITS * LANES // 32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (n < outs)[:, None]
    sums = tl.zeros((BLOCK_N, UNITS), tl.float32)
    for first in range(0, cols, BLOCK_K):
        k = (first + tl.arange(0, UNITS) * LANES)[:, None] + tl.arange(0, LANES)[None, :]
        place = (first // LANES + tl.arange(0, UNITS)) * WORDS
        begin = words + n.to(tl.int64)[:, None] * row_words + place[None, :]
        unit = (tl.load(begin, mask=there & (place < row_words)[None, :], other=0).to(tl.uint32, bitcast=True),)
        for i in tl.static_range(1, WORDS):
            word = tl.load(begin + i, mask=there & (place < row_words - i)[None, :], other=0)
            unit += (word.to(tl.uint32, bitcast=True),)
        lanes = _lanes(tl.load(x + k, mask=k < cols, other=0.0).to(tl.float32), LANES)
        for i in tl.static_range(LANES):
            sums = _add_lane(sums, lanes[i], unit, BITS, Q, _reversed(i, LANES))
    _finish_floats(y, tl.sum(sums, axis=1)[None, :], tl.zeros((1,), tl.int32), n, 1, outs, scale, bias)


@triton.jit
def _upper_half(x):
    """Return float32 x cut to what a bfloat16 holds of it."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _tiles_of_floats(x, words, scale, bias, y, rows, outs, cols, row_words, PART: tl.constexpr, BITS: tl.constexpr,
                     LANES: tl.constexpr, Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr):  # fmt: skip
    down = tl.cdiv(rows, BLOCK_M)  # programs that follow each other share a part of the weight
    m = (tl.program_id(0) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // down) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = (m < rows)[:, None] & (k < cols)[None, :]
        a = tl.load(x + m.to(tl.int64)[:, None] * cols + k[None, :], mask=there, other=0.0)
        level = tl.trans(_levels(words, n, first, outs, row_words, BITS, LANES, Q, BLOCK_N, BLOCK_K).to(PART))
        if a.dtype == tl.float32:
            high = _upper_half(a)  # three bfloat16 hold a float32, which tensor cores do not take whole
            rest = tl.where(a == high, 0.0, a - high)  # an infinity leaves none
            middle = _upper_half(rest)
            part = tl.dot((rest - middle).to(PART), level)
            part = tl.dot(middle.to(PART), level, part)
            sums += tl.dot(high.to(PART), level, part)
        else:
            sums = tl.dot(a, level, sums)
    _finish_floats(y, sums, m, n, rows, outs, scale, bias)


@triton.jit
def _tiles(x, words, scale, bias, code_sums, of_rows, in_scale, in_offset, y, rows, outs, cols, row_words, x_level,
           BITS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    down = tl.cdiv(rows, BLOCK_M)  # programs that follow each other share a part of the weight
    m = (tl.program_id(0) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // down) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = (m < rows)[:, None] & (k < cols)[None, :]
        a = tl.load(x + m.to(tl.int64)[:, None] * cols + k[None, :], mask=there, other=0)
        code = _codes(words, n, first, outs, row_words, BITS, LANES, BLOCK_N, BLOCK_K)
        sums = tl.dot(a, tl.trans(code.to(tl.int8)), sums, out_dtype=tl.int32)
    finish(y, sums, m, n, rows, outs, cols, scale, bias, code_sums, of_rows, in_scale, in_offset, x_level, P, Q, False)


@triton.jit
def _both_codes(words, codes, outs, row_words, x, x_codes, of_rows, rows, cols, in_scale, in_offset, qmin, qmax, in_shift,
                zero, BITS: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Quantize rows of x, and after them write the codes of rows of a weight as int8."""
    of_x = tl.cdiv(rows, BLOCK_M)
    if tl.program_id(0) < of_x:
        quantize_rows(tl.program_id(0), x, x_codes, of_rows, rows, cols, in_scale, in_offset, qmin, qmax, in_shift, zero, WHOLE,
                      BLOCK_M, BLOCK_K)  # fmt: skip
    else:
        n = (tl.program_id(0) - of_x) * BLOCK_M + tl.arange(0, BLOCK_M)
        for first in range(0, cols, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            code = _codes(words, n, first, outs, row_words, BITS, LANES, BLOCK_M, BLOCK_K)
            where = n.to(tl.int64)[:, None] * cols + k[None, :]
            tl.store(codes + where, code.to(tl.int8), mask=(n < outs)[:, None] & (k < cols)[None, :])


def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, n_bits: int, shift: float, isa: int = 0
) -> Tensor:
    """Return `x @ w_hat.T + bias` in the dtype of x (..., in), float16, bfloat16 or float32, summed in float32."""
    dtype, (x, y, of_words) = x.dtype, _operands(x, words, n_bits)
    if not y.numel():
        return y.to(dtype)
    outs = len(words)
    rows, shared = y.numel() // outs, {"x": x, "y": y, "scale": scale, "bias": bias, "Q": 2 if shift else 1, **of_words}
    if rows == 1:
        tile, options = _row_tile(x.shape[-1], n_bits)
        launch(_one_row_of_floats, (triton.cdiv(outs, tile["BLOCK_N"]),), options, **shared, **tile)
        return y.to(dtype)
    tile, options = _tile(rows, x.dtype, x.device)
    programs = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(outs, tile["BLOCK_N"])
    part = tl.float16 if dtype is torch.float16 else tl.float32 if interpreted() else tl.bfloat16
    launch(_tiles_of_floats, (programs,), options, rows=rows, PART=part, **shared, **tile)
    return y.to(dtype)


def packed_linear_int(
    x: Tensor, words: Tensor, scale: Tensor, code_sums: Tensor, bias: Tensor | None, in_scale: Tensor,
    in_offset: Tensor | None, n_bits: int, shift: float, qmin: int, qmax: int, in_shift: float, isa: int = 0,
) -> Tensor:  # fmt: skip
    """Return what `integer_definition` does, bit for bit, rounded once to the dtype of x.

    Several rows are quantized by a kernel of their own, and the weight is unpacked by one for many.
    """
    dtype, (x, y, of_words) = x.dtype, _operands(x, words, n_bits)
    if not y.numel():
        return y.to(dtype)
    grid = InputGrid.of(in_scale, in_offset, qmin, qmax, in_shift)
    (outs, cols), rows = (len(words), x.shape[-1]), y.numel() // len(words)
    weight = {"scale": scale, "bias": bias, "code_sums": code_sums}
    if rows > MANY_ROWS:
        codes = torch.empty(outs, cols, dtype=torch.int8, device=x.device)
        programs, told = quantizing(x, rows, grid)
        programs += pieces(outs, told["BLOCK_M"])
        launch(_both_codes, (programs,), codes=codes, **told | of_words)
        multiply(told, y, grid, codes, **weight, shift=shift, reach=2 ** (n_bits - 1))
        return y.to(dtype)
    shared = {**weight, **of_words, "y": y, **grid.whole_levels(shift)}
    if rows == 1:
        launch(_one_row, (triton.cdiv(outs, ROW_TILE["BLOCK_N"]),), x=x, **shared, **grid._asdict(), **ROW_TILE)
        return y.to(dtype)
    x, of_rows = quantize(x, rows, grid)
    tile, options = _tile(rows, x.dtype, x.device)
    programs = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(outs, tile["BLOCK_N"])
    of_x = {"x": x, "of_rows": of_rows, "in_scale": grid.in_scale, "in_offset": grid.in_offset}
    launch(_tiles, (programs,), options, rows=rows, **of_x, **shared, **tile)
    return y.to(dtype)


def _operands(x: Tensor, words: Tensor, n_bits: int) -> tuple[Tensor, Tensor, dict[str, Tensor | int]]:
    """Return x as kernels take it, an empty y, and words with what says how they lie. Raises ValueError where they do not fit."""
    (outs, row_words), cols = words.shape, x.shape[-1]
    if row_words != packed_words(cols, n_bits):
        raise ValueError(f"words do not hold rows of {cols} codes: {row_words} words of {n_bits} bits")
    if x.dtype is torch.bfloat16 and interpreted():
        x = x.float()  # the interpreter neither multiplies nor rounds bfloat16 as a GPU does
    lie = {"outs": outs, "cols": cols, "row_words": row_words, "BITS": n_bits, "LANES": 32 // math.gcd(32, n_bits)}
    return x.contiguous(), x.new_empty((*x.shape[:-1], outs)), {"words": words, **lie}


OPERATORS = (packed_linear, packed_linear_int)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled."""
    cols, outs = 768, 768
    scale, sums, one = torch.ones(outs), torch.zeros(outs, dtype=torch.int32), torch.ones(1)
    for n_bits in (1, 2, 3, 4, 8):
        words = torch.zeros(outs, cols * n_bits // 32, dtype=torch.int32)
        for rows in (1, 16, 197, 2048) if n_bits in (2, 3) else (1, 197):  # codes that straddle words, and that do not
            for dtype in (torch.bfloat16, torch.float32) if n_bits in (2, 3) else (torch.float16,):
                packed_linear(torch.zeros(rows, cols, dtype=dtype), words, scale, scale, n_bits, n_bits % 2 / 2)
            x = torch.zeros(rows, cols)
            packed_linear_int(x, words, scale, sums, scale, one, one, n_bits, 0.0, -128, 127, 0.0)
    packed_linear_int(x.bfloat16(), words, scale, sums, None, one, None, n_bits, 0.5, -1, 0, 0.5)
