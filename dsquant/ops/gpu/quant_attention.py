"""Attention with quantized probabilities as Triton kernels, on the images of q, k and v: nothing of size N^2 is stored.

A program takes a block of queries of one head of one image (row `image * heads + head`) and goes over blocks of keys: first
for the maximum and the sum of each row of scores; then, as probabilities are known, for their images and the output.
Backward is in `quant_attention_backward.py`.

Products of float32 are float32's. Those of bfloat16 are tensor cores', summed in float32, and what enters them is rounded to
bfloat16; between them, scores and probabilities are float32. What is the same for every key is one tensor `rows` (3, heads,
length), float32: the softmax scale, and the scale and offset of the probabilities.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import clip, round_half_even
from dsquant.ops.gpu.launch import interpreted, launch
from dsquant.spec import Levels

INTERPRETED = tl.constexpr(interpreted())
TILES = {  # the most features that rows have, queries and keys of a block, warps, stages
    torch.float32: ((32, 32, 32, 4, 2), (64, 16, 16, 4, 2), (128, 16, 16, 4, 3)),
    torch.bfloat16: ((64, 64, 32, 4, 2), (128, 64, 32, 8, 2), (256, 32, 32, 8, 2)),
}
WINDOW = 64  # tokens that one block of bfloat16 takes whole, where features are few


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
def load_rows(x, row, length, DIM: tl.constexpr):
    """Return rows of a matrix (length, DIM), with zeros beyond it."""
    col = tl.arange(0, padded(DIM))[None, :]
    return tl.load(x + row[:, None] * DIM + col, mask=(row < length)[:, None] & (col < DIM), other=0.0)


@triton.jit
def store_rows(x, value, row, length, DIM: tl.constexpr):
    col = tl.arange(0, padded(DIM))[None, :]
    value = cast(value, x.dtype.element_ty)
    tl.store(x + row[:, None] * DIM + col, value, mask=(row < length)[:, None] & (col < DIM))


@triton.jit
def of_queries(rows, head, heads, query, length):
    """Return softmax scale, and scale and offset of the probabilities, of each query."""
    at, there = rows + head * length + query, query < length
    factor = tl.load(at, mask=there, other=0.0)
    scale = tl.load(at + heads * length, mask=there, other=1.0)
    return factor, scale, tl.load(at + 2 * heads * length, mask=there, other=0.0)


@triton.jit
def score(queries, keys, factor, query, key, length, added):
    """Return the scores queries keys^T * factor + bias + mask; -inf for keys that do not exist.

    `added` is where bias and mask of a head of an image begin, or None, and their strides.
    """
    bias, bias_q, bias_k, mask, mask_q, mask_k = added
    query, key = query[:, None], key[None, :]
    s, there = dot(queries, tl.trans(keys)) * factor[:, None], (query < length) & (key < length)
    if bias is not None:
        s += tl.load(bias + query * bias_q + key * bias_k, mask=there, other=0.0).to(tl.float32)
    if mask is not None:
        s += tl.load(mask + query * mask_q + key * mask_k, mask=there, other=0.0).to(tl.float32)
    return tl.where(key < length, s, float("-inf"))


@triton.jit
def probability(s, top, inverse):
    """Return exp(s - maximum) / sum, given maximum and 1 / sum of each row."""
    return tl.exp(s - top[:, None]) * inverse[:, None]


@triton.jit
def statistics(s):
    """Return the maximum of each row of scores, and 1 / sum exp(s - maximum)."""
    top = tl.max(s, axis=1)
    total = tl.sum(tl.exp(s - top[:, None]), axis=1)
    return top, tl.math.div_rn(tl.zeros_like(total) + 1.0, total)


@triton.jit
def running_statistics(queries, k, factor, query, length, added, BLOCK_K: tl.constexpr, DIM: tl.constexpr):
    """Return the statistics of scores against all keys, block by block."""
    top = tl.zeros_like(factor) - float("inf")
    total = tl.zeros_like(factor)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        s = score(queries, load_rows(k, key, length, DIM), factor, query, key, length, added)
        higher = tl.maximum(top, tl.max(s, axis=1))
        at = tl.where(higher == float("-inf"), 0.0, higher)  # of keys that are all masked: -inf less -inf is NaN
        total = total * tl.exp(top - at) + tl.sum(tl.exp(s - at[:, None]), axis=1)
        top = higher
    return top, tl.math.div_rn(tl.zeros_like(total) + 1.0, total)


@triton.jit
def _image(p, scale, offset, LEVELS: tl.constexpr):
    v = tl.math.div_rn(p - offset[:, None], scale[:, None] + tl.zeros_like(p))
    level = round_half_even(clip(v - LEVELS[2], LEVELS[0], LEVELS[1])) + LEVELS[2]
    return level * scale[:, None] + offset[:, None]


@triton.jit
def _forward(q, k, v, out, bias, mask, rows, heads, length, mask_rows, q_b, q_h, bias_h, bias_q, bias_k, mask_b, mask_h,
             mask_q, mask_k, LEVELS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
             DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_Q)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    query = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image, head = row // heads, row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    added = (bias, bias_q, bias_k, mask, mask_q, mask_k)
    k, v = k + row * length * DIM, v + row * length * DIM_V
    queries = load_rows(q + image * q_b + head * q_h, query, length, DIM)
    factor, scale, offset = of_queries(rows, head, heads, query, length)
    if not ONE_BLOCK:
        top, inverse = running_statistics(queries, k, factor, query, length, added, BLOCK_K, DIM)
    found = tl.zeros([BLOCK_Q, padded(DIM_V)], tl.float32)
    for start in range(0, BLOCK_K if ONE_BLOCK else length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        s = score(queries, load_rows(k, key, length, DIM), factor, query, key, length, added)
        if ONE_BLOCK:
            top, inverse = statistics(s)
        p = probability(s, top, inverse)
        if LEVELS is not None:
            p = _image(p, scale, offset, LEVELS)
        values = load_rows(v, key, length, DIM_V)
        found += dot(cast(p, values.dtype), values)
    store_rows(out + row * length * DIM_V, found, query, length, DIM_V)


def tiling(length: int, dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many queries and keys a program takes at a time, and its warps and stages: what spills no register."""
    queries, keys, warps, stages = next(tile for most, *tile in TILES[dtype] if dim <= most)
    if dtype is torch.bfloat16 and dim <= 64 and length <= WINDOW:
        keys, warps = WINDOW, 8
    shortest = max(16, triton.next_power_of_2(length))
    return {"BLOCK_Q": min(queries, shortest), "BLOCK_K": min(keys, shortest)}, {
        "num_warps": warps,
        "num_stages": stages,
    }


def arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, rows: Tensor, levels: Levels | None
) -> dict[str, Any]:
    """Return what every kernel is told, by name; the rows of q lie one after another, k, v and `rows` are contiguous."""
    heads, length, dim = q.shape[1:]
    scores = (heads, length, length)
    strides = dict(zip(("q_b", "q_h"), q.stride(), strict=False))
    added = (0,) * 3 if bias is None else bias.expand(1, *scores).stride()[1:]
    strides |= zip(("bias_h", "bias_q", "bias_k"), added, strict=True)
    masked = (0,) * 4 if mask is None else mask.expand(mask.shape[0], *scores).stride()
    strides |= zip(("mask_b", "mask_h", "mask_q", "mask_k"), masked, strict=True)
    grid = None
    if levels is not None:
        grid = float(levels.qmin), float(levels.qmax), levels.shift, levels.low, levels.high, levels.elastic
    blocks, options = tiling(length, max(dim, v.shape[-1]), q.dtype)
    return strides | blocks | {
        "q": q, "k": k, "v": v, "bias": bias, "mask": mask, "rows": rows, "heads": heads, "length": length,
        "mask_rows": 1 if mask is None else mask.shape[0], "LEVELS": grid, "DIM": dim, "DIM_V": v.shape[-1],
        "options": options,
    }  # fmt: skip


def quant_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, rows: Tensor, qmin: int, qmax: int,
    shift: float, reach: float, elastic: bool, quantized: bool,
) -> Tensor:  # fmt: skip
    """Return the output (B, H, N, D_v) in the dtype of v; q, k, v are images, of one dtype."""
    out, levels = torch.empty_like(v), Levels(qmin, qmax, shift, reach, elastic) if quantized else None
    told = arguments(q, k, v, bias, mask, rows, levels)
    blocks = triton.cdiv(q.shape[2], told["BLOCK_Q"])
    launch(_forward, (q.shape[0] * q.shape[1] * blocks,), out=out, ONE_BLOCK=q.shape[2] <= told["BLOCK_K"], **told)
    return out


OPERATORS = (quant_attention,)
