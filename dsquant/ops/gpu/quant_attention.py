"""Attention through its four quantizers as Triton kernels: q, k and v are quantized as they are read, nothing of N^2 is stored.

A program takes a block of queries of one head of one image (row `image * heads + head`). Where a block of keys holds the whole
sequence, scores are formed once (`_forward_rows`); else it goes over the keys twice, first for the maximum and the sum of each
row of scores (`_forward`).
Where several programs share a head, k and v are quantized by a kernel of their own first, once, to operands (READY).
Backward is in `quant_attention_backward.py`.

Operands of products are levels, small integers or halves of them, exact in bfloat16 as in float32, and sums of products get
their scale once, at the end; with an offset they are images, rounded. Products of float32 are float32's. Those of bfloat16 are
tensor cores', summed in float32, and probabilities between them are float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import clip, exp2, round_half_even
from dsquant.ops.gpu.launch import HOPPER, architecture, interpreted, launch

INTERPRETED = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
ALL = tl.constexpr(tl.PropagateNan.ALL)
WINDOW = 64  # tokens that one block of bfloat16 takes whole, where features are few
PLAIN_ROWS = 256  # tokens of which forward holds whole rows of scores where it has little else to hold
OPERAND_ROWS = 64  # of a program that makes operands


class Tile(NamedTuple):
    """Say how many queries and keys a program takes at a time, and its warps and stages: what spills a few registers at most.

    `registers` a thread are enough where `is_plain`, and let one program more run at once.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def arguments(self, length: int) -> dict[str, Any]:
        shortest = max(16, triton.next_power_of_2(length))
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers:
            options["maxnreg"] = self.registers
        return {"BLOCK_Q": min(self.queries, shortest), "BLOCK_K": min(self.keys, shortest), "options": options}

    def turned(self) -> "Tile":
        return self._replace(queries=self.keys, keys=self.queries)


class Tiles(NamedTuple):
    """Hold the tiles of the kernels: forward, and of the gradients of queries and of keys.

    `few` is that of forward and of queries for the last rows of a sequence, where they are as few: the 5 of a ViT's 197 that
    blocks of 64 leave. `turned` it is that of keys.
    """

    forward: Tile
    queries: Tile
    keys: Tile
    few: Tile | None = None

    def whole(self, length: int) -> bool:
        """Say whether one block of each kernel holds a sequence: then backward, too, is one kernel, which needs no sums kept."""
        return all(length <= min(tile.queries, tile.keys) for tile in (self.forward, self.queries, self.keys))


class Part(NamedTuple):
    """Say which blocks of rows of each sequence one launch takes, and its tile."""

    first: int
    blocks: int
    slot: int  # of the first among all blocks of a sequence
    tile: dict[str, Any]

    def told(self, slots: int) -> dict[str, Any]:
        return {"first": self.first, "blocks": self.blocks, "slot": self.slot, "slots": slots} | self.tile


def parts_of(length: int, rows: str, tile: Tile, few: Tile | None) -> list[Part]:
    """Cut a sequence into blocks of `rows`, BLOCK_Q or BLOCK_K; rows that are left over are a part of their own where few."""
    own = tile.arguments(length)
    blocks, rest = divmod(length, own[rows])
    if few is not None and blocks and 0 < rest <= few.arguments(length)[rows]:
        return [Part(0, blocks, 0, own), Part(length - rest, 1, blocks, few.arguments(length))]
    return [Part(0, blocks + (rest > 0), 0, own)]


FLOAT32 = {  # by the most features that rows have
    32: Tiles(*[Tile(16, 16, 8, 1)] * 2, Tile(16, 16, 4, 2)), 64: Tiles(*[Tile(16, 16, 4, 2)] * 3),
    128: Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 4, 2)),
}  # fmt: skip
WIDE = {128: Tiles(*[Tile(16, 32, 8, 2)] * 3), 256: Tiles(*[Tile(16, 16, 8, 1)] * 3)}
USUAL = Tiles(Tile(64, 64, 4, 3, 128), Tile(64, 32, 4, 3, 168), Tile(32, 64, 4, 3, 168), Tile(16, 32, 2, 3))
# Of bfloat16 by the longest sequence, too: one block holds a window, and forward whole rows of what is not too long.
BFLOAT16 = {
    WINDOW: {32: Tiles(*[Tile(64, WINDOW, 4, 2)] * 3), 64: Tiles(*[Tile(64, WINDOW, 8, 2)] * 3)},
    128: {64: USUAL._replace(forward=Tile(128, 128, 8, 1))},
    PLAIN_ROWS: {64: USUAL._replace(forward=Tile(64, PLAIN_ROWS, 4, 1, 168))},
    None: {64: USUAL},
}
# Before Hopper a product's rows are shared out among all warps.
BEFORE_HOPPER = {
    WINDOW: {32: Tiles(*[Tile(64, WINDOW, 8, 1)] * 3)},
    None: {64: Tiles(*[Tile(32, 32, 4, 2)] * 3)},
}


def is_plain(told: dict[str, Any]) -> bool:
    """Say whether nothing is added to scores, no site has an offset, and a head shares its scales: registers are left then."""
    more = ("bias", "mask", "q_offset", "k_offset", "p_offset", "v_offset", "factor_n", "p_n")
    return all(told[name] is None for name in more)


def tiles_of(told: dict[str, Any], arch: int) -> Tiles:
    """Return the tiles for what kernels are told on a compute capability."""
    dim, plain = max(told["DIM"], told["DIM_V"]), is_plain(told)
    known = FLOAT32
    if told["q"].dtype is torch.bfloat16:
        found = BFLOAT16 if arch >= HOPPER else BEFORE_HOPPER
        longest = next(n for n in found if n is None or (told["length"] <= n and (plain or n < PLAIN_ROWS)))
        known = found[None] | found[longest] | WIDE
    tiles = known[min(most for most in known if dim <= most)]
    if plain:
        return tiles
    tiles = Tiles(*(tile and tile._replace(registers=None) for tile in tiles))
    if told["p_offset"] is None or tiles.whole(told["length"]):
        return tiles
    return tiles._replace(queries=tiles.queries._replace(stages=1))  # no register is left for loads that are under way


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round to nearest even, also in the interpreter, which cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """Return a @ b in float32; the interpreter, which takes the bits of bfloat16 for integers, is given float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.constexpr_function
def padded(dim):
    """Return the columns that a block of `dim` features takes: a power of two, 16 at least, as products need."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def load_rows(x, row, step, length, DIM: tl.constexpr):
    """Return rows of a matrix (length, DIM) that lie `step` apart, with zeros beyond it."""
    col = tl.arange(0, padded(DIM))[None, :]
    return tl.load(x + row[:, None] * step + col, mask=(row < length)[:, None] & (col < DIM), other=0.0)


@triton.jit
def store_rows(x, value, row, step, length, DIM: tl.constexpr):
    col = tl.arange(0, padded(DIM))[None, :]
    value = cast(value, x.dtype.element_ty)
    tl.store(x + row[:, None] * step + col, value, mask=(row < length)[:, None] & (col < DIM))


@triton.jit
def scale_of(scale, head, EACH: tl.constexpr):
    """Return a site's scale, or offset, of a head, which are one for all or one EACH."""
    return tl.load(scale + head) if EACH else tl.load(scale)


@triton.jit
def in_units(x, s, offset, head, EACH: tl.constexpr):
    """Return v = (x - offset) / s in float32, by a product with 1 / s: each of several programs does this to all keys and values.

    It may be a last bit from the quotient, and x on the boundary between two codes then fall to the other side.
    """
    v = x.to(tl.float32)
    if offset is not None:
        v = v - scale_of(offset, head, EACH)
    return v * tl.math.div_rn(tl.zeros_like(s) + 1.0, s)


@triton.jit
def level_of(v, GRID: tl.constexpr):
    if GRID[2] == 0:  # adding 0 would turn a -0.0 and is not left out by compilers
        level = round_half_even(clip(v, GRID[0], GRID[1]))
    else:
        level = round_half_even(clip(v - GRID[2], GRID[0], GRID[1])) + GRID[2]
    return level


@triton.jit
def exp(x):
    return exp2(x * LOG2E)


@triton.jit
def keep_sums(kept, inverse_at, top, total, at, there, bias, mask):
    """Keep of each row of scores what `probabilities` takes: the power of 2 by which its exponentials are to shrink, one number.

    Or, with a bias or mask, the maximum and the sum's inverse: a mask may be the lowest number, which would swallow the
    logarithm of a sum.
    """
    if bias is None and mask is None:
        tl.store(kept + at, -tl.log2(total) - top, mask=there)
    else:
        tl.store(kept + at, top, mask=there)
        tl.store(inverse_at + at, inverse_of(total), mask=there)


@triton.jit
def kept_sums(kept, inverse_at, at, there, bias, mask):
    """Return what `keep_sums` has kept."""
    top = tl.load(kept + at, mask=there, other=0.0)
    inverse = top
    if bias is not None or mask is not None:
        inverse = tl.load(inverse_at + at, mask=there, other=1.0)
    return top, inverse


@triton.jit
def probabilities(product, by, top, inverse, bias, mask, query, key, length, bias_q, bias_k, mask_q, mask_k):
    """Return p = exp(product * by + bias + mask) of products of queries and keys over its sum, by what is kept of the rows.

    by and what is kept are of queries; these, query and key are shaped to broadcast. Keys that do not exist get values, too:
    their operands are 0.
    """
    if bias is None and mask is None:
        of_rows = tl.broadcast_to(factor_of(by, bias, mask), product.shape)
        p = exp2(at_most_0(tl.fma(product, of_rows, tl.broadcast_to(top, product.shape))))
    else:
        s = add_to_scores(product * by, bias, mask, query, key, length, bias_q, bias_k, mask_q, mask_k)
        p = exp(at_most_0(s - top)) * inverse
    return p


@triton.jit
def at_most_0(x):
    """Return x, a logarithm that only a key may have above 0 which does not exist; an infinity would meet its 0."""
    return tl.minimum(x, 0.0, propagate_nan=ALL)


@triton.jit
def unit_of(scale, offset, head, GRID: tl.constexpr):
    """Return what one unit of a site's operand is worth: its scale where operands are levels, else 1."""
    if GRID is None or offset is not None:
        unit = 1.0
    else:
        unit = scale_of(scale, head, GRID[6])
    return unit


@triton.jit
def operand(x, row, length, scale, offset, head, GRID: tl.constexpr, READY: tl.constexpr):
    """Return what enters a product for rows of a site, in the dtype of x: levels, with an offset images, or x itself.

    READY: x is that already.
    """
    found = x
    if GRID is not None and not READY:
        s = scale_of(scale, head, GRID[6])
        level = level_of(in_units(x, s, offset, head, GRID[6]), GRID)
        if offset is not None:
            level = level * s + scale_of(offset, head, GRID[6])
        found = cast(tl.where((row < length)[:, None], level, 0.0), x.dtype)
    return found


@triton.jit
def of_queries(x, head, query, length, h, n):
    """Return a value of each query: of a tensor with strides h and n, the latter None where a head shares it, or a number x."""
    if h is None:
        found = tl.zeros_like(query).to(tl.float32) + x
    elif n is None:
        found = tl.zeros_like(query).to(tl.float32) + tl.load(x + head * h)
    else:
        found = tl.load(x + head * h + query * n, mask=query < length, other=1.0)
    return found


@triton.jit
def add_to_scores(s, bias, mask, query, key, length, bias_q, bias_k, mask_q, mask_k):
    """Add what lies at bias and mask, of a head of an image, to scores; query and key are shaped to broadcast."""
    there = (query < length) & (key < length)
    if bias is not None:
        s += tl.load(bias + query * bias_q + key * bias_k, mask=there, other=0.0).to(tl.float32)
    if mask is not None:
        s += tl.load(mask + query * mask_q + key * mask_k, mask=there, other=0.0).to(tl.float32)
    return s


@triton.jit
def scores(queries, keys, factor, query, key, length, bias, mask, bias_q, bias_k, mask_q, mask_k):
    """Return the scores queries keys^T * factor + bias + mask, or their powers of 2; -inf for keys that do not exist."""
    s = dot(queries, tl.trans(keys)) * factor_of(factor, bias, mask)[:, None]
    s = add_to_scores(s, bias, mask, query[:, None], key[None, :], length, bias_q, bias_k, mask_q, mask_k)
    return tl.where((key < length)[None, :], s, float("-inf"))


@triton.jit
def factor_of(factor, bias, mask):
    """Return what turns products to scores, or, where nothing is added to these, to powers of 2: one product less for each."""
    if bias is None and mask is None:
        factor = factor * LOG2E
    return factor


@triton.jit
def exp_of(s, bias, mask):
    """Return e to the power of differences of scores, or 2 to the power of what they are where nothing is added to them."""
    if bias is None and mask is None:
        e = exp2(s)
    else:
        e = exp(s)
    return e


@triton.jit
def statistics(s, bias, mask):
    """Return the maximum of each row of scores, exp(s - maximum), and its sum."""
    top = tl.max(s, axis=1)
    e = exp_of(s - top[:, None], bias, mask)
    total = tl.sum(e, axis=1)
    return top, e, total


@triton.jit
def running_statistics(queries, k, k_n, k_scale, k_offset, head, factor, query, length, bias, mask, bias_q, bias_k, mask_q,
                       mask_k, K_GRID: tl.constexpr, READY: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Return the same of rows of scores against all keys, block by block, but for the exponentials."""
    top = tl.zeros_like(factor) - float("inf")
    total = tl.zeros_like(factor)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = operand(load_rows(k, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
        s = scores(queries, keys, factor, query, key, length, bias, mask, bias_q, bias_k, mask_q, mask_k)
        higher = tl.maximum(top, tl.max(s, axis=1))
        at = tl.where(higher == float("-inf"), 0.0, higher)  # of keys that are all masked: -inf less -inf is NaN
        total = total * exp_of(top - at, bias, mask) + tl.sum(exp_of(s - at[:, None], bias, mask), axis=1)
        top = higher
    return top, total


@triton.jit
def inverse_of(total):
    return tl.math.div_rn(tl.full(total.shape, 1.0, tl.float32), total)


@triton.jit
def level_of_probs(v, GRID: tl.constexpr):
    """Return the level of v = p / scale, which is not negative."""
    if GRID[0] == 0 and GRID[2] == 0:
        level = round_half_even(tl.minimum(v, GRID[1], propagate_nan=ALL))
    else:
        level = level_of(v, GRID)
    return level


@triton.jit
def image_of_probs(e, total, scale, offset, GRID: tl.constexpr):
    """Return the operand of e over its sum: levels, with an offset images, or probabilities where these are not quantized."""
    inverse = inverse_of(total)
    if GRID is None:
        p = e * inverse[:, None]
    elif offset is None:
        p = level_of_probs(e * tl.math.div_rn(inverse, scale)[:, None], GRID)
    else:
        p = e * tl.math.div_rn(inverse, scale)[:, None] - tl.math.div_rn(offset, scale)[:, None]
        p = level_of(p, GRID) * scale[:, None] + offset[:, None]
    return p


@triton.jit
def _forward_rows(q, k, v, out, top_of, inverse_at, bias, mask, factor, q_scale, q_offset, k_scale, k_offset, p_scale, p_offset,
                  v_scale, v_offset, first, blocks, heads, length, mask_rows, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b,
                  o_h, o_n, factor_h, factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
                  Q_GRID: tl.constexpr, K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr,
                  KEPT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr,
                  DIM_V: tl.constexpr):  # fmt: skip
    """Do `_forward` where one block holds all keys: scores are formed once."""
    row = tl.program_id(0) // blocks
    query = first + (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image, head = (row // heads).to(tl.int64), row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
    queries = load_rows(q + image * q_b + head * q_h, query, q_n, length, DIM)
    queries = operand(queries, query, length, q_scale, q_offset, head, Q_GRID, False)
    units = unit_of(q_scale, q_offset, head, Q_GRID) * unit_of(k_scale, k_offset, head, K_GRID)
    by = of_queries(factor, head, query, length, factor_h, factor_n) * units
    scale, offset = by, None
    if P_GRID is not None:
        scale = of_queries(p_scale, head, query, length, p_h, p_n)
        if p_offset is not None:
            offset = of_queries(p_offset, head, query, length, p_h, p_n)
    key = tl.arange(0, BLOCK_K)
    keys = operand(load_rows(k, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
    values = operand(load_rows(v, key, v_n, length, DIM_V), key, length, v_scale, v_offset, head, V_GRID, READY)
    s = scores(queries, keys, by, query, key, length, bias, mask, bias_q, bias_k, mask_q, mask_k)
    top, e, total = statistics(s, bias, mask)
    p = image_of_probs(e, total, scale, offset, P_GRID)
    found = dot(cast(p, values.dtype), values) * unit_of(v_scale, v_offset, head, V_GRID)
    if P_GRID is not None and p_offset is None:
        found = found * scale[:, None]
    if KEPT:  # of a window they are formed again: storing them would have the compiler form scores twice here
        keep_sums(top_of, inverse_at, top, total, row.to(tl.int64) * length + query, query < length, bias, mask)
    store_rows(out + image * o_b + head * o_h, found, query, o_n, length, DIM_V)


@triton.jit
def _forward(q, k, v, out, top_of, inverse_at, bias, mask, factor, q_scale, q_offset, k_scale, k_offset, p_scale, p_offset,
             v_scale, v_offset, first, blocks, heads, length, mask_rows, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h,
             o_n, factor_h, factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, Q_GRID: tl.constexpr,
             K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr, BLOCK_Q: tl.constexpr,
             BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) // blocks
    query = first + (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image, head = (row // heads).to(tl.int64), row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
    queries = load_rows(q + image * q_b + head * q_h, query, q_n, length, DIM)
    queries = operand(queries, query, length, q_scale, q_offset, head, Q_GRID, False)
    units = unit_of(q_scale, q_offset, head, Q_GRID) * unit_of(k_scale, k_offset, head, K_GRID)
    by = of_queries(factor, head, query, length, factor_h, factor_n) * units
    scale, offset = by, None
    if P_GRID is not None:
        scale = of_queries(p_scale, head, query, length, p_h, p_n)
        if p_offset is not None:
            offset = of_queries(p_offset, head, query, length, p_h, p_n)
    top, total = running_statistics(
        queries, k, k_n, k_scale, k_offset, head, by, query, length, bias, mask, bias_q, bias_k, mask_q, mask_k, K_GRID,
        READY, BLOCK_K, DIM,
    )  # fmt: skip
    found = tl.zeros([BLOCK_Q, padded(DIM_V)], tl.float32)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = operand(load_rows(k, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
        values = operand(load_rows(v, key, v_n, length, DIM_V), key, length, v_scale, v_offset, head, V_GRID, READY)
        s = scores(queries, keys, by, query, key, length, bias, mask, bias_q, bias_k, mask_q, mask_k)
        p = image_of_probs(exp_of(s - top[:, None], bias, mask), total, scale, offset, P_GRID)
        found += dot(cast(p, values.dtype), values)
    found = found * unit_of(v_scale, v_offset, head, V_GRID)
    if P_GRID is not None and p_offset is None:
        found = found * scale[:, None]
    keep_sums(top_of, inverse_at, top, total, row.to(tl.int64) * length + query, query < length, bias, mask)
    store_rows(out + image * o_b + head * o_h, found, query, o_n, length, DIM_V)


@triton.jit
def _write_operand(x, found, scale, offset, heads, length, x_b, x_h, x_n, GRID: tl.constexpr, BLOCK: tl.constexpr,
                   DIM: tl.constexpr):  # fmt: skip
    """Write the operands of a block of rows of a head."""
    blocks = tl.cdiv(length, BLOCK)
    row = tl.program_id(0) // blocks
    token = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    image, head = (row // heads).to(tl.int64), row % heads
    values = load_rows(x + image * x_b + head * x_h, token, x_n, length, DIM)
    values = operand(values, token, length, scale, offset, head, GRID, False)
    store_rows(found + row.to(tl.int64) * length * DIM, values, token, DIM, length, DIM)


@triton.jit
def _operands(q, k, v, found_q, found_k, found_v, q_scale, q_offset, k_scale, k_offset, v_scale, v_offset, heads, length, q_b,
              q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, Q_GRID: tl.constexpr, K_GRID: tl.constexpr, V_GRID: tl.constexpr,
              BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    """Write those of q, k and v, each by a row of programs, where there is room for them."""
    site = tl.program_id(1)
    if found_k is not None:  # noqa: SIM102 - decided when compiled
        if site == 0:
            _write_operand(k, found_k, k_scale, k_offset, heads, length, k_b, k_h, k_n, K_GRID, BLOCK, DIM)
    if found_v is not None:  # noqa: SIM102 - decided when compiled
        if site == 1:
            _write_operand(v, found_v, v_scale, v_offset, heads, length, v_b, v_h, v_n, V_GRID, BLOCK, DIM_V)
    if found_q is not None:  # noqa: SIM102 - decided when compiled
        if site == 2:
            _write_operand(q, found_q, q_scale, q_offset, heads, length, q_b, q_h, q_n, Q_GRID, BLOCK, DIM)


SITES = ("q", "k", "p", "v")
GRID = 7  # numbers of a site: qmin, qmax, shift, low, high, whether it is elastic, whether each head has a scale


def arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, factor: Tensor | None, softmax_scale: float,
    scales: list[Tensor | None], grids: list[float],
) -> dict[str, Any]:  # fmt: skip
    """Return what every kernel is told, by name, but its tile.

    q, k and v (B, H, N, D) have features that lie one after another. `scales` are scale and offset of q, k, probabilities and v,
    `grids` the `GRID` numbers of each, none for a site that is not quantized; of q, k and v one for all or for a head, of
    probabilities, as `factor`, what broadcasts to (H, N, 1).
    """
    heads, length, dim = q.shape[1:]
    told: dict[str, Any] = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "heads": heads, "length": length}
    for name, x in zip(SITES[:2] + SITES[3:], (q, k, v), strict=True):
        told |= zip((f"{name}_b", f"{name}_h", f"{name}_n"), x.stride(), strict=False)
    told |= _strides(bias, ("bias_h", "bias_q", "bias_k"), (1, heads, length, length))
    batch = 1 if mask is None else mask.shape[0]
    told |= _strides(mask, ("mask_b", "mask_h", "mask_q", "mask_k"), (batch, heads, length, length))
    told |= dict.fromkeys(("factor_h", "factor_n", "p_h", "p_n"))
    told["factor"] = softmax_scale if factor is None else factor
    for name, x in (("factor", factor), ("p", scales[4])):
        if x is not None:
            told |= _strides(x, (f"{name}_h", f"{name}_n"), (heads, length, 1), last=1)
            told[f"{name}_n"] = told[f"{name}_n"] or None
    at = 0
    for i, name in enumerate(SITES):
        told[f"{name}_scale"], told[f"{name}_offset"] = scales[2 * i : 2 * i + 2]
        told[f"{name.upper()}_GRID"] = None
        if scales[2 * i] is not None:
            *numbers, elastic = grids[at : at + GRID - 1]
            told[f"{name.upper()}_GRID"] = (*numbers, bool(elastic), scales[2 * i].numel() > 1)
            at += GRID - 1
    return told | {"mask_rows": batch, "DIM": dim, "DIM_V": v.shape[-1]}


def _strides(x: Tensor | None, names: tuple[str, ...], shape: tuple[int, ...], last: int = 0) -> dict[str, int]:
    """Return the strides of x, expanded to a shape, by name, but the `last`; 0 for what is not there."""
    if x is None:
        return dict.fromkeys(names, 0)
    strides = x.expand(shape).stride()
    return dict(zip(names, strides[len(strides) - last - len(names) : len(strides) - last], strict=True))


def made_ready(told: dict[str, Any], names: str) -> dict[str, Any]:
    """Return what kernels are told where several programs share a head: those of q, k and v in `names` as operands, made once."""
    batch, heads, length, _ = told["q"].shape
    ready: dict[str, Any] = {"READY": True}
    for name in names:
        if told[f"{name.upper()}_GRID"] is not None:
            x = told[name]
            dim = x.shape[-1]
            ready[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            ready |= {f"{name}_b": heads * length * dim, f"{name}_h": length * dim, f"{name}_n": dim}
    if len(ready) > 1:
        block = min(OPERAND_ROWS, max(16, 1 << (length - 1).bit_length()))
        of_sites = {
            f"{site}_{name}": told[f"{site}_{name}"] for site in "qkv" for name in ("scale", "offset", "b", "h", "n")
        }
        found = {f"found_{name}": ready.get(name) for name in "qkv"}
        same = {
            name: told[name]
            for name in ("q", "k", "v", "heads", "length", "Q_GRID", "K_GRID", "V_GRID", "DIM", "DIM_V")
        }
        launch(
            _operands, (batch * heads * -(-length // block), 2 + ("q" in names)), BLOCK=block, **same, **of_sites, **found
        )  # fmt: skip
    return told | ready


def by_tokens(like: Tensor) -> Tensor:
    """Return a new (B, H, N, D) in which a token's heads lie one after another, as the layer behind it reads them."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def quant_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, factor: Tensor | None, softmax_scale: float,
    scales: list[Tensor | None], grids: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output (B, H, N, D_v) in the dtype of v, by tokens.

    And of each row of scores what `keep_sums` says, float32 (2, B, H, N), unless one block holds all.
    """
    out, told = by_tokens(v), arguments(q, k, v, bias, mask, factor, softmax_scale, scales, grids)
    length = q.shape[2]
    tiles = tiles_of(told, architecture(q.device))
    rows = (
        length <= tiles.forward.keys
    )  # of scores are held whole, by programs so long that a launch more would not pay
    parts = parts_of(length, "BLOCK_Q", tiles.forward, None if rows else tiles.few)
    told |= zip(("o_b", "o_h", "o_n"), out.stride(), strict=False)
    kept = torch.empty(2, *q.shape[:3], dtype=torch.float32, device=q.device)
    told |= {"out": out, "top_of": kept[0], "inverse_at": kept[1]}
    shared = len(parts) > 1 or parts[0].blocks > 1
    told = made_ready(told, "kv") if shared else told | {"READY": False}
    for part in parts:
        grid, at = (q.shape[0] * q.shape[1] * part.blocks,), {"first": part.first, "blocks": part.blocks}
        if rows:
            launch(_forward_rows, grid, **part.tile, **told, **at, KEPT=not tiles.whole(length))
        else:
            launch(_forward, grid, **part.tile, **told, **at)
    return out, kept


OPERATORS = (quant_attention,)
