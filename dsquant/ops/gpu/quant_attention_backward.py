"""The gradients of attention with quantized probabilities as Triton kernels, which form scores and probabilities again.

With s the scores, p = softmax(s), p_hat its image and G = g v_hat^T the image's gradient: dL/dp = G where p lies on the grid,
else 0; dL/ds = p (dL/dp - delta), delta = sum_j p_j dL/dp_j over the whole row. (It is not g . out: that takes p_hat = p.)

`_of_queries` goes over the keys three times: for the statistics of its rows, for their delta, for dL/dq. `_of_keys` goes over
the queries with these at hand. A sequence of one block has `_of_window` for both. `_of_bias` goes over a run of the batch.
Each sum is of one program; what programs leave is added up in float64: no atomics, no result depends on their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import straight_through
from dsquant.ops.gpu.launch import launch
from dsquant.ops.gpu.quant_attention import (
    arguments,
    cast,
    dot,
    load_rows,
    of_queries,
    padded,
    probability,
    quant_attention,
    running_statistics,
    score,
    statistics,
    store_rows,
)
from dsquant.spec import Levels

PROGRAMS = 1024  # into which the gradient of the bias is cut by runs of the batch, where heads and blocks are fewer


@triton.jit
def _through(p, g, values, scale, offset, LEVELS: tl.constexpr):
    """Return dL/dp, the image of p, and what each entry adds to d scale and to d offset; g is the output's gradient."""
    of_image = dot(g, tl.trans(values))
    if LEVELS is None:
        d_p, image, of_scale, of_offset = of_image, p, tl.zeros_like(p), tl.zeros_like(p)
    else:
        v = tl.math.div_rn(p - offset[:, None], scale[:, None] + tl.zeros_like(p))
        ENDS_TOGETHER: tl.constexpr = LEVELS[2] == 0 and LEVELS[3] == LEVELS[0]
        d_p, level, of_scale = straight_through(
            v, of_image, LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3], LEVELS[4], LEVELS[5], ENDS_TOGETHER
        )
        image, of_offset = level * scale[:, None] + offset[:, None], of_image - d_p
    return d_p, image, of_scale, of_offset


@triton.jit
def _of_window(q, k, v, grad, d_q, d_k, d_v, top_of, inverse_of, delta_of, d_scale, d_offset, d_factor, bias, mask, rows,
               heads, length, mask_rows, q_b, q_h, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
               LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr,
               DIM_V: tl.constexpr):  # fmt: skip
    row, token = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_Q)
    image, head = row // heads, row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    added = (bias, bias_q, bias_k, mask, mask_q, mask_k)
    queries = load_rows(q + image * q_b + head * q_h, token, length, DIM)
    keys = load_rows(k + row * length * DIM, token, length, DIM)
    g = load_rows(grad + row * length * DIM_V, token, length, DIM_V)
    factor, scale, offset = of_queries(rows, head, heads, token, length)
    s = score(queries, keys, factor, token, token, length, added)
    top, inverse = statistics(s)
    p, at, there = probability(s, top, inverse), row * length + token, token < length
    values = load_rows(v + row * length * DIM_V, token, length, DIM_V)
    d_p, image_p, of_scale, of_offset = _through(p, g, values, scale, offset, LEVELS)
    tl.store(d_scale + at, tl.sum(of_scale, axis=1), mask=there)
    tl.store(d_offset + at, tl.sum(of_offset, axis=1), mask=there)
    store_rows(d_v + row * length * DIM_V, dot(tl.trans(cast(image_p, g.dtype)), g), token, length, DIM_V)
    delta = tl.sum(p * d_p, axis=1)
    d_s = p * (d_p - delta[:, None])
    of_keys = dot(tl.trans(cast(d_s * factor[:, None], queries.dtype)), queries)
    store_rows(d_k + row * length * DIM, of_keys, token, length, DIM)
    of_product = dot(cast(d_s, keys.dtype), keys)
    store_rows(d_q + row * length * DIM, of_product * factor[:, None], token, length, DIM)
    tl.store(d_factor + at, tl.sum(of_product * queries.to(tl.float32), axis=1), mask=there)
    tl.store(top_of + at, top, mask=there)
    tl.store(inverse_of + at, inverse, mask=there)
    tl.store(delta_of + at, delta, mask=there)


@triton.jit
def _of_queries(q, k, v, grad, d_q, top_of, inverse_of, delta_of, d_scale, d_offset, d_factor, bias, mask, rows, heads,
                length, mask_rows, q_b, q_h, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, LEVELS: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
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
    g = load_rows(grad + row * length * DIM_V, query, length, DIM_V)
    factor, scale, offset = of_queries(rows, head, heads, query, length)
    top, inverse = running_statistics(queries, k, factor, query, length, added, BLOCK_K, DIM)
    delta, sum_scale, sum_offset = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        s = score(queries, load_rows(k, key, length, DIM), factor, query, key, length, added)
        p = probability(s, top, inverse)
        d_p, _, of_scale, of_offset = _through(p, g, load_rows(v, key, length, DIM_V), scale, offset, LEVELS)
        delta += tl.sum(p * d_p, axis=1)
        sum_scale += tl.sum(of_scale, axis=1)
        sum_offset += tl.sum(of_offset, axis=1)
    at, there = row * length + query, query < length
    tl.store(top_of + at, top, mask=there)
    tl.store(inverse_of + at, inverse, mask=there)
    tl.store(delta_of + at, delta, mask=there)
    tl.store(d_scale + at, sum_scale, mask=there)
    tl.store(d_offset + at, sum_offset, mask=there)
    of_product = tl.zeros([BLOCK_Q, padded(DIM)], tl.float32)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = load_rows(k, key, length, DIM)
        p = probability(score(queries, keys, factor, query, key, length, added), top, inverse)
        d_p, _, _, _ = _through(p, g, load_rows(v, key, length, DIM_V), scale, offset, LEVELS)
        of_product += dot(cast(p * (d_p - delta[:, None]), keys.dtype), keys)
    store_rows(d_q + row * length * DIM, of_product * factor[:, None], query, length, DIM)
    tl.store(d_factor + at, tl.sum(of_product * queries.to(tl.float32), axis=1), mask=there)


@triton.jit
def _of_keys(q, k, v, grad, d_k, d_v, top_of, inverse_of, delta_of, bias, mask, rows, heads, length, mask_rows, q_b, q_h,
             bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr,
             BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_K)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    key = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    image, head = row // heads, row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    added = (bias, bias_q, bias_k, mask, mask_q, mask_k)
    keys = load_rows(k + row * length * DIM, key, length, DIM)
    values = load_rows(v + row * length * DIM_V, key, length, DIM_V)
    of_keys = tl.zeros([BLOCK_K, padded(DIM)], tl.float32)
    of_values = tl.zeros([BLOCK_K, padded(DIM_V)], tl.float32)
    for start in range(0, length, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        at, there = row * length + query, query < length
        queries = load_rows(q + image * q_b + head * q_h, query, length, DIM)
        g = load_rows(grad + row * length * DIM_V, query, length, DIM_V)
        factor, scale, offset = of_queries(rows, head, heads, query, length)
        top, inverse = tl.load(top_of + at, mask=there, other=0.0), tl.load(inverse_of + at, mask=there, other=0.0)
        p = probability(score(queries, keys, factor, query, key, length, added), top, inverse)
        d_p, image_p, _, _ = _through(p, g, values, scale, offset, LEVELS)
        of_values += dot(tl.trans(cast(image_p, g.dtype)), g)
        d_s = p * (d_p - tl.load(delta_of + at, mask=there, other=0.0)[:, None])
        of_keys += dot(tl.trans(cast(d_s * factor[:, None], queries.dtype)), queries)
    store_rows(d_k + row * length * DIM, of_keys, key, length, DIM)
    store_rows(d_v + row * length * DIM_V, of_values, key, length, DIM_V)


@triton.jit
def _of_bias(q, k, v, grad, d_bias, top_of, inverse_of, delta_of, batch, run, bias, mask, rows, heads, length, mask_rows,
             q_b, q_h, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr,
             BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    """Sum dL/ds over the images [part * run, (part + 1) * run) of the batch, into d_bias (parts, heads, length, length)."""
    across = tl.cdiv(length, BLOCK_K)
    tiles = tl.cdiv(length, BLOCK_Q) * across
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    head, first = plane % heads, plane // heads * run
    query, key = tile // across * BLOCK_Q + tl.arange(0, BLOCK_Q), tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    factor, scale, offset = of_queries(rows, head, heads, query, length)
    if bias is not None:
        bias += head * bias_h
    found, there = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), query < length
    for image in range(first, tl.minimum(first + run, batch)):
        row = image * heads + head
        at = row * length + query
        of_image = mask
        if mask is not None:
            of_image = mask + (image % mask_rows) * mask_b + head * mask_h
        added = (bias, bias_q, bias_k, of_image, mask_q, mask_k)
        queries = load_rows(q + image * q_b + head * q_h, query, length, DIM)
        keys = load_rows(k + row * length * DIM, key, length, DIM)
        g = load_rows(grad + row * length * DIM_V, query, length, DIM_V)
        values = load_rows(v + row * length * DIM_V, key, length, DIM_V)
        top, inverse = tl.load(top_of + at, mask=there, other=0.0), tl.load(inverse_of + at, mask=there, other=0.0)
        p = probability(score(queries, keys, factor, query, key, length, added), top, inverse)
        d_p, _, _, _ = _through(p, g, values, scale, offset, LEVELS)
        found += p * (d_p - tl.load(delta_of + at, mask=there, other=0.0)[:, None])
    where = plane * length * length + query[:, None] * length + key[None, :]
    tl.store(d_bias + where, found, mask=there[:, None] & (key < length)[None, :])


def quant_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, rows: Tensor, qmin: int, qmax: int,
    shift: float, reach: float, elastic: bool, quantized: bool, grad: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    d_rows: Tensor, d_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of the images q, k, v, of `rows` for each image (3, B, H, N), and of the bias (H, N, N), float64.

    grad is contiguous, of the dtype of v; d_q, d_k, d_v are contiguous float32.
    """
    batch, heads, length, _ = q.shape
    told = arguments(q, k, v, bias, mask, rows, Levels(qmin, qmax, shift, reach, elastic) if quantized else None)
    kept = torch.empty(3, batch, heads, length, dtype=torch.float32, device=q.device)
    told |= {"grad": grad, "top_of": kept[0], "inverse_of": kept[1], "delta_of": kept[2]}
    sums = {"d_factor": d_rows[0], "d_scale": d_rows[1], "d_offset": d_rows[2]}
    down, across = triton.cdiv(length, told["BLOCK_Q"]), triton.cdiv(length, told["BLOCK_K"])
    if down == across == 1:
        launch(_of_window, (batch * heads,), d_q=d_q, d_k=d_k, d_v=d_v, **sums, **told)
    else:
        launch(_of_queries, (batch * heads * down,), d_q=d_q, **sums, **told)
        launch(_of_keys, (batch * heads * across,), d_k=d_k, d_v=d_v, **told)
    if d_bias is not None:
        run = triton.cdiv(batch, max(1, PROGRAMS // (heads * down * across)))
        parts = torch.empty(triton.cdiv(batch, run), heads, length, length, dtype=torch.float32, device=q.device)
        launch(_of_bias, (len(parts) * heads * down * across,), d_bias=parts, batch=batch, run=run, **told)
        torch.sum(parts, 0, dtype=torch.float64, out=d_bias)


OPERATORS = (quant_attention_backward,)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled: dtypes, tiles, levels, what is added."""
    plain, elastic, none = (0, 3, 0.0, 0.0, False, True), (0, 1, 0.0, 0.0, True, True), (0, 1, 0.0, 0.0, False, False)
    kinds = {
        torch.float32: (
            (16, 32, plain, False),
            (197, 32, elastic, False),
            (197, 64, plain, True),
            (197, 128, plain, True),
        ),
        torch.bfloat16: (
            (49, 64, plain, True),
            (197, 64, plain, True),
            (197, 128, elastic, False),
            (197, 256, none, True),
        ),
    }
    for dtype, found in kinds.items():
        for length, dim, levels, added in found:
            x, rows = torch.zeros(2, 3, length, dim, dtype=dtype), torch.ones(3, 3, length)
            bias, mask = (torch.zeros(1, 3, length, length) if added else None for _ in range(2))
            told = x, x, x, bias, mask, rows, *levels
            quant_attention(*told)
            d_x, d_bias = torch.zeros(x.shape), torch.zeros(3, length, length, dtype=torch.float64) if added else None
            quant_attention_backward(*told, x, d_x, d_x, d_x, torch.zeros(3, 2, 3, length), d_bias)
