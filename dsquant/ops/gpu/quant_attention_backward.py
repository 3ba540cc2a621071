"""The gradients of attention through its four quantizers as Triton kernels, which form scores and probabilities again.

With s the scores, p = softmax(s), p_hat its image and G = g v_hat^T the image's gradient: dL/dp = G where p lies on the grid,
else 0; dL/ds = p (dL/dp - delta), delta = sum_j p_j dL/dp_j over the whole row. (It is not g . out: that takes p_hat = p.)

Forward has left the maximum and the sum of each row of scores, so that probabilities come of a product at once. `_of_queries`
goes over the keys twice, for the sums of its rows and for the gradients of queries; `_of_keys`, which turns scores round, has
those of keys and values with these sums at hand. A sequence of one block has `_of_window` for both, and for the gradient of
the bias, of a run of images; longer ones have `_of_bias`. What passes a site's grid is decided where its gradient is summed,
and the gradients of a scale and an offset are one sum a program. Each sum is of one program; what programs leave is added up
in float64: no atomics, no result depends on their order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.launch import architecture, launch
from dsquant.ops.gpu.quant_attention import (
    arguments,
    cast,
    dot,
    in_units,
    inverse_of,
    level_of,
    level_of_probs,
    load_rows,
    made_ready,
    of_queries,
    operand,
    padded,
    probabilities,
    quant_attention,
    scale_of,
    scores,
    statistics,
    store_rows,
    tiles_of,
    unit_of,
)

PROGRAMS = 1024  # into which the gradient of the bias is cut by runs of the batch, where heads and blocks are fewer


@triton.jit
def _through_probs(p, g, scale, offset, GRID: tl.constexpr):
    """Return dL/dp of the gradient g of the image of p, and the level of p, or p itself where it is not quantized.

    scale and offset, of queries, are shaped to broadcast.
    """
    d_p, level = g, p
    if GRID is not None:
        v = p * tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        inside = v <= GRID[4]
        if offset is not None:
            v = v - tl.math.div_rn(offset, scale)
            inside = (v >= GRID[3]) & (v <= GRID[4])
            level = level_of(v, GRID)
        else:
            if GRID[3] > 0:  # a probability is never below 0
                inside = inside & (v >= GRID[3])
            level = level_of_probs(v, GRID)
        d_p = tl.where(inside, g, 0.0)
    return d_p, level


@triton.jit
def _of_probs(p, d_p, g, level, scale, offset, axis: tl.constexpr, GRID: tl.constexpr):
    """Return the sums over keys of p dL/dp, and of what is added to d scale: G level, less dL/dp v unless the grid is elastic."""
    delta, of_scale = tl.sum(p * d_p, axis=axis), tl.sum(g * level, axis=axis)
    if GRID is not None and not GRID[5]:
        of_scale -= tl.math.div_rn(delta, scale)
        if offset is not None:
            of_scale += tl.math.div_rn(offset, scale) * tl.sum(d_p, axis=axis)
    return delta, of_scale


@triton.jit
def _through_site(x, d_hat, sums, row, length, scale, offset, head, GRID: tl.constexpr):
    """Return dL/dx of rows of a site whose images have the gradient d_hat; leave parts of d scale and d offset at `sums`."""
    found = d_hat
    if GRID is not None:
        v = in_units(x, scale_of(scale, head, GRID[6]), offset, head, GRID[6])
        found = tl.where((v >= GRID[3]) & (v <= GRID[4]), d_hat, 0.0)
        level = level_of(v, GRID)
        if GRID[5]:
            of_scale = d_hat * level
        else:
            of_scale = d_hat * (level - tl.where((v >= GRID[3]) & (v <= GRID[4]), v, 0.0))
        there = (row < length)[:, None]
        tl.store(sums, tl.sum(tl.where(there, of_scale, 0.0)))
        if offset is not None:
            tl.store(sums + 1, tl.sum(tl.where(there, d_hat - found, 0.0)))
    return found


@triton.jit
def _of_window(q, k, v, grad, d_q, d_k, d_v, d_scale, d_offset, d_factor, d_bias, sums, bias, mask, factor, q_scale, q_offset,
               k_scale, k_offset, p_scale, p_offset, v_scale, v_offset, batch, run, heads, length, mask_rows, q_b, q_h, q_n,
               k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, factor_h,
               factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, Q_GRID: tl.constexpr,
               K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
               DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    """Go over the images [part * run, (part + 1) * run) of the batch, and sum dL/ds in d_bias (parts, heads, length, length)."""
    head, token = tl.program_id(0) % heads, tl.arange(0, BLOCK_Q)
    first = (tl.program_id(0) // heads).to(tl.int64) * run
    if bias is not None:
        bias += head * bias_h
    unit_v = unit_of(v_scale, v_offset, head, V_GRID)
    unit_q, unit_k = unit_of(q_scale, q_offset, head, Q_GRID), unit_of(k_scale, k_offset, head, K_GRID)
    of_softmax = of_queries(factor, head, token, length, factor_h, factor_n)
    by, there = of_softmax * (unit_q * unit_k), token < length
    scale, offset = by, by
    if P_GRID is not None:
        scale = of_queries(p_scale, head, token, length, p_h, p_n)
        if p_offset is not None:
            offset = of_queries(p_offset, head, token, length, p_h, p_n)
    if d_bias is not None:
        of_bias = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for image in range(first, tl.minimum(first + run, batch)):
        row = image * heads + head
        raw_q = load_rows(q + image * q_b + head * q_h, token, q_n, length, DIM)
        raw_k = load_rows(k + image * k_b + head * k_h, token, k_n, length, DIM)
        raw_v = load_rows(v + image * v_b + head * v_h, token, v_n, length, DIM_V)
        queries = operand(raw_q, token, length, q_scale, q_offset, head, Q_GRID, False)
        keys = operand(raw_k, token, length, k_scale, k_offset, head, K_GRID, False)
        values = operand(raw_v, token, length, v_scale, v_offset, head, V_GRID, False)
        g = load_rows(grad + image * g_b + head * g_h, token, g_n, length, DIM_V)
        if mask is None:
            s = scores(queries, keys, by, token, token, length, bias, mask, bias_q, bias_k, mask_q, mask_k)
        else:
            own = mask + (image % mask_rows) * mask_b + head * mask_h
            s = scores(queries, keys, by, token, token, length, bias, own, bias_q, bias_k, mask_q, mask_k)
        _, e, total = statistics(s)
        p, of_image = e * inverse_of(total)[:, None], dot(g, tl.trans(values))
        at = row * length + token
        if p_offset is None:
            d_p, image_p = _through_probs(p, of_image, scale[:, None], None, P_GRID)
            delta, of_scale = _of_probs(p, d_p, of_image, image_p, scale, None, 1, P_GRID)
            if P_GRID is not None:
                image_p = image_p * scale[:, None]
        else:
            d_p, level = _through_probs(p, of_image, scale[:, None], offset[:, None], P_GRID)
            delta, of_scale = _of_probs(p, d_p, of_image, level, scale, offset, 1, P_GRID)
            image_p = level * scale[:, None] + offset[:, None]
            tl.store(d_offset + at, tl.sum(of_image - d_p, axis=1) * unit_v, mask=there)
        if P_GRID is not None:
            tl.store(d_scale + at, of_scale * unit_v, mask=there)
        at_sums = sums + row * 6
        of_values = dot(tl.trans(cast(image_p, g.dtype)), g)
        of_values = _through_site(raw_v, of_values, at_sums + 4, token, length, v_scale, v_offset, head, V_GRID)
        store_rows(d_v + image * dv_b + head * dv_h, of_values, token, dv_n, length, DIM_V)
        d_s = p * (d_p - delta[:, None])
        if d_bias is not None:
            of_bias += d_s * unit_v
        of_keys = dot(tl.trans(cast(d_s * of_softmax[:, None], queries.dtype)), queries) * (unit_v * unit_q)
        of_keys = _through_site(raw_k, of_keys, at_sums + 2, token, length, k_scale, k_offset, head, K_GRID)
        store_rows(d_k + image * dk_b + head * dk_h, of_keys, token, dk_n, length, DIM)
        of_product = dot(cast(d_s, keys.dtype), keys) * (unit_v * unit_k)
        if d_factor is not None:
            tl.store(d_factor + at, tl.sum(of_product * queries.to(tl.float32), axis=1) * unit_q, mask=there)
        of_product = of_product * of_softmax[:, None]
        of_product = _through_site(raw_q, of_product, at_sums, token, length, q_scale, q_offset, head, Q_GRID)
        store_rows(d_q + image * dq_b + head * dq_h, of_product, token, dq_n, length, DIM)
    if d_bias is not None:
        where = tl.program_id(0).to(tl.int64) * length * length + token[:, None] * length + token[None, :]
        tl.store(d_bias + where, of_bias, mask=there[:, None] & there[None, :])


@triton.jit
def _of_queries(q, k, v, raw_q, grad, d_q, top_of, total_of, delta_of, d_scale, d_offset, d_factor, sums, bias, mask, factor,
                q_scale, q_offset, k_scale, k_offset, p_scale, p_offset, v_scale, v_offset, heads, length, mask_rows, q_b,
                q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dq_b, dq_h, dq_n, rq_b, rq_h, rq_n, factor_h, factor_n,
                p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, Q_GRID: tl.constexpr, K_GRID: tl.constexpr,
                P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_Q)
    row = tl.program_id(0) // blocks
    query = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image, head = (row // heads).to(tl.int64), row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
    queries = load_rows(q + image * q_b + head * q_h, query, q_n, length, DIM)
    queries = operand(queries, query, length, q_scale, q_offset, head, Q_GRID, READY)
    g = load_rows(grad + image * g_b + head * g_h, query, g_n, length, DIM_V)
    unit_v = unit_of(v_scale, v_offset, head, V_GRID)
    unit_q, unit_k = unit_of(q_scale, q_offset, head, Q_GRID), unit_of(k_scale, k_offset, head, K_GRID)
    of_softmax = of_queries(factor, head, query, length, factor_h, factor_n)
    by = of_softmax * (unit_q * unit_k)
    scale, offset = by, by
    if P_GRID is not None:
        scale = of_queries(p_scale, head, query, length, p_h, p_n)
        if p_offset is not None:
            offset = of_queries(p_offset, head, query, length, p_h, p_n)
    at, there = row.to(tl.int64) * length + query, query < length
    top, total = tl.load(top_of + at, mask=there, other=0.0), tl.load(total_of + at, mask=there, other=1.0)
    delta, sum_scale, sum_offset = tl.zeros_like(by), tl.zeros_like(by), tl.zeros_like(by)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = operand(load_rows(k, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
        values = operand(load_rows(v, key, v_n, length, DIM_V), key, length, v_scale, v_offset, head, V_GRID, READY)
        p = probabilities(
            dot(queries, tl.trans(keys)), by[:, None], top[:, None], total[:, None], bias, mask, query[:, None], key[None, :],
            length, bias_q, bias_k, mask_q, mask_k,
        )  # fmt: skip
        of_image = dot(g, tl.trans(values))
        if p_offset is None:
            d_p, level = _through_probs(p, of_image, scale[:, None], None, P_GRID)
            of_keys, of_scale = _of_probs(p, d_p, of_image, level, scale, None, 1, P_GRID)
        else:
            d_p, level = _through_probs(p, of_image, scale[:, None], offset[:, None], P_GRID)
            of_keys, of_scale = _of_probs(p, d_p, of_image, level, scale, offset, 1, P_GRID)
            sum_offset += tl.sum(of_image - d_p, axis=1)
        delta += of_keys
        sum_scale += of_scale
    of_product = tl.zeros([BLOCK_Q, padded(DIM)], tl.float32)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = operand(load_rows(k, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
        values = operand(load_rows(v, key, v_n, length, DIM_V), key, length, v_scale, v_offset, head, V_GRID, READY)
        p = probabilities(
            dot(queries, tl.trans(keys)), by[:, None], top[:, None], total[:, None], bias, mask, query[:, None], key[None, :],
            length, bias_q, bias_k, mask_q, mask_k,
        )  # fmt: skip
        of_image = dot(g, tl.trans(values))
        if p_offset is None:
            d_p, _ = _through_probs(p, of_image, scale[:, None], None, P_GRID)
        else:
            d_p, _ = _through_probs(p, of_image, scale[:, None], offset[:, None], P_GRID)
        of_product += dot(cast(p * (d_p - delta[:, None]), keys.dtype), keys)
    tl.store(delta_of + at, delta, mask=there)
    if P_GRID is not None:
        tl.store(d_scale + at, sum_scale * unit_v, mask=there)
        if p_offset is not None:
            tl.store(d_offset + at, sum_offset * unit_v, mask=there)
    of_product = of_product * (unit_v * unit_k)
    if d_factor is not None:
        tl.store(d_factor + at, tl.sum(of_product * queries.to(tl.float32), axis=1) * unit_q, mask=there)
    of_product = of_product * of_softmax[:, None]
    raw = load_rows(raw_q + image * rq_b + head * rq_h, query, rq_n, length, DIM)
    of_product = _through_site(
        raw, of_product, sums + tl.program_id(0).to(tl.int64) * 2, query, length, q_scale, q_offset, head, Q_GRID
    )
    store_rows(d_q + image * dq_b + head * dq_h, of_product, query, dq_n, length, DIM)


@triton.jit
def _of_keys(q, k, v, raw_k, raw_v, grad, d_k, d_v, top_of, total_of, delta_of, sums, bias, mask, factor, q_scale, q_offset,
             k_scale, k_offset, p_scale, p_offset, v_scale, v_offset, heads, length, mask_rows, q_b, q_h, q_n, k_b, k_h, k_n,
             v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, rk_b, rk_h, rk_n, rv_b, rv_h, rv_n, factor_h,
             factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, Q_GRID: tl.constexpr,
             K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr, BLOCK_Q: tl.constexpr,
             BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_K)
    row = tl.program_id(0) // blocks
    key = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    image, head = (row // heads).to(tl.int64), row % heads
    if bias is not None:
        bias += head * bias_h
    if mask is not None:
        mask += (image % mask_rows) * mask_b + head * mask_h
    q, grad = q + image * q_b + head * q_h, grad + image * g_b + head * g_h
    keys = load_rows(k + image * k_b + head * k_h, key, k_n, length, DIM)
    values = load_rows(v + image * v_b + head * v_h, key, v_n, length, DIM_V)
    keys = operand(keys, key, length, k_scale, k_offset, head, K_GRID, READY)
    values = operand(values, key, length, v_scale, v_offset, head, V_GRID, READY)
    unit_v = unit_of(v_scale, v_offset, head, V_GRID)
    unit_q, unit_k = unit_of(q_scale, q_offset, head, Q_GRID), unit_of(k_scale, k_offset, head, K_GRID)
    of_keys = tl.zeros([BLOCK_K, padded(DIM)], tl.float32)
    of_values = tl.zeros([BLOCK_K, padded(DIM_V)], tl.float32)
    for start in range(0, length, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        at, there = row.to(tl.int64) * length + query, query < length
        queries = operand(load_rows(q, query, q_n, length, DIM), query, length, q_scale, q_offset, head, Q_GRID, READY)
        g = load_rows(grad, query, g_n, length, DIM_V)
        of_softmax = of_queries(factor, head, query, length, factor_h, factor_n)
        top, total = tl.load(top_of + at, mask=there, other=0.0), tl.load(total_of + at, mask=there, other=1.0)
        p = probabilities(
            dot(keys, tl.trans(queries)), (of_softmax * (unit_q * unit_k))[None, :], top[None, :], total[None, :], bias, mask,
            query[None, :], key[:, None], length, bias_q, bias_k, mask_q, mask_k,
        )  # fmt: skip
        of_image = dot(values, tl.trans(g))
        if P_GRID is None:
            d_p, image_p = of_image, p
        else:
            scale = of_queries(p_scale, head, query, length, p_h, p_n)
            if p_offset is None:
                d_p, image_p = _through_probs(p, of_image, scale[None, :], None, P_GRID)
                if p_n is not None:  # else once, at the end
                    image_p = image_p * scale[None, :]
            else:
                offset = of_queries(p_offset, head, query, length, p_h, p_n)
                d_p, image_p = _through_probs(p, of_image, scale[None, :], offset[None, :], P_GRID)
                image_p = image_p * scale[None, :] + offset[None, :]
        of_values += dot(cast(image_p, g.dtype), g)
        d_s = p * (d_p - tl.load(delta_of + at, mask=there, other=0.0)[None, :])
        if factor_n is not None:  # else once, at the end
            d_s = d_s * of_softmax[None, :]
        of_keys += dot(cast(d_s, queries.dtype), queries)
    at_sums = sums + tl.program_id(0).to(tl.int64) * 4
    of_keys = of_keys * (unit_v * unit_q)
    if factor_h is None:
        of_keys = of_keys * factor
    elif factor_n is None:
        of_keys = of_keys * tl.load(factor + head * factor_h)
    raw = load_rows(raw_k + image * rk_b + head * rk_h, key, rk_n, length, DIM)
    of_keys = _through_site(raw, of_keys, at_sums, key, length, k_scale, k_offset, head, K_GRID)
    store_rows(d_k + image * dk_b + head * dk_h, of_keys, key, dk_n, length, DIM)
    if (P_GRID is not None) and (p_offset is None and p_n is None):
        of_values = of_values * tl.load(p_scale + head * p_h)
    raw = load_rows(raw_v + image * rv_b + head * rv_h, key, rv_n, length, DIM_V)
    of_values = _through_site(raw, of_values, at_sums + 2, key, length, v_scale, v_offset, head, V_GRID)
    store_rows(d_v + image * dv_b + head * dv_h, of_values, key, dv_n, length, DIM_V)


@triton.jit
def _of_bias(q, k, v, grad, d_bias, top_of, total_of, delta_of, batch, run, bias, mask, factor, q_scale, q_offset, k_scale,
             k_offset, p_scale, p_offset, v_scale, v_offset, heads, length, mask_rows, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h,
             v_n, g_b, g_h, g_n, factor_h, factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
             Q_GRID: tl.constexpr, K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr,
             BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    """Sum dL/ds over the images [part * run, (part + 1) * run) of the batch, into d_bias (parts, heads, length, length)."""
    across = tl.cdiv(length, BLOCK_K)
    tiles = tl.cdiv(length, BLOCK_Q) * across
    tile, plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, first = plane % heads, (plane // heads).to(tl.int64) * run
    query, key = tile // across * BLOCK_Q + tl.arange(0, BLOCK_Q), tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    bias += head * bias_h
    unit_v = unit_of(v_scale, v_offset, head, V_GRID)
    units = unit_of(q_scale, q_offset, head, Q_GRID) * unit_of(k_scale, k_offset, head, K_GRID)
    by = of_queries(factor, head, query, length, factor_h, factor_n) * units
    scale, offset = by, by
    if P_GRID is not None:
        scale = of_queries(p_scale, head, query, length, p_h, p_n)
        if p_offset is not None:
            offset = of_queries(p_offset, head, query, length, p_h, p_n)
    found, there = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), query < length
    for image in range(first, tl.minimum(first + run, batch)):
        at = (image * heads + head) * length + query
        queries, keys = q + image * q_b + head * q_h, k + image * k_b + head * k_h
        queries = operand(
            load_rows(queries, query, q_n, length, DIM), query, length, q_scale, q_offset, head, Q_GRID, READY
        )
        keys = operand(load_rows(keys, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
        values = load_rows(v + image * v_b + head * v_h, key, v_n, length, DIM_V)
        values = operand(values, key, length, v_scale, v_offset, head, V_GRID, READY)
        g = load_rows(grad + image * g_b + head * g_h, query, g_n, length, DIM_V)
        top, total = tl.load(top_of + at, mask=there, other=0.0), tl.load(total_of + at, mask=there, other=1.0)
        of_row = tl.load(delta_of + at, mask=there, other=0.0)
        product = dot(queries, tl.trans(keys))
        if mask is None:
            p = probabilities(
                product, by[:, None], top[:, None], total[:, None], bias, mask, query[:, None], key[None, :], length, bias_q,
                bias_k, mask_q, mask_k,
            )  # fmt: skip
        else:
            own = mask + (image % mask_rows) * mask_b + head * mask_h
            p = probabilities(
                product, by[:, None], top[:, None], total[:, None], bias, own, query[:, None], key[None, :], length, bias_q,
                bias_k, mask_q, mask_k,
            )  # fmt: skip
        if p_offset is None:
            d_p, _ = _through_probs(p, dot(g, tl.trans(values)), scale[:, None], None, P_GRID)
        else:
            d_p, _ = _through_probs(p, dot(g, tl.trans(values)), scale[:, None], offset[:, None], P_GRID)
        found += p * (d_p - of_row[:, None])
    where = plane.to(tl.int64) * length * length + query[:, None] * length + key[None, :]
    tl.store(d_bias + where, found * unit_v, mask=there[:, None] & (key < length)[None, :])


def quant_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, factor: Tensor | None, softmax_scale: float,
    scales: list[Tensor | None], grids: list[float], kept: Tensor, grad: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    d_sites: Tensor, d_probs: Tensor | None, d_factor: Tensor | None, d_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v (B, H, N, D), whose features lie one after another, and sums over their parts in float64.

    Of scale and offset of q, k and v in turn for each head (6, H); of those of the probabilities for each image (2, B, H, N)
    float32, of the softmax scale likewise (B, H, N), and of the bias (H, N, N), float64.
    """
    batch, heads, length, dim = q.shape
    told = arguments(q, k, v, bias, mask, factor, softmax_scale, scales, grids)
    told |= (
        {"grad": grad}
        | _strides_of("g", grad)
        | _strides_of("dq", d_q)
        | _strides_of("dk", d_k)
        | _strides_of("dv", d_v)
    )
    of_probs = (
        dict.fromkeys(("d_scale", "d_offset")) if d_probs is None else {"d_scale": d_probs[0], "d_offset": d_probs[1]}
    )
    tiles = tiles_of(length, max(dim, v.shape[-1]), q.dtype, architecture(q.device))
    by_queries, by_keys = tiles.queries.arguments(length), tiles.keys.arguments(length)
    down, across = triton.cdiv(length, by_queries["BLOCK_Q"]), triton.cdiv(length, by_keys["BLOCK_K"])
    new = lambda *size: torch.empty(size, dtype=torch.float32, device=q.device)  # noqa: E731
    if tiles.whole(length):
        run = 1 if d_bias is None else triton.cdiv(batch, max(1, PROGRAMS // heads))
        parts = triton.cdiv(batch, run)
        of_bias, sums = None if d_bias is None else new(parts, heads, length, length), new(batch, heads, 6)
        launch(
            _of_window, (parts * heads,), d_q=d_q, d_k=d_k, d_v=d_v, d_factor=d_factor, d_bias=of_bias, sums=sums, batch=batch,
            run=run, **of_probs, **by_keys, **told,
        )  # fmt: skip
        _sum_sites(((0, 6, sums),), scales, d_sites)
    else:
        delta, of_q, of_kv = new(batch, heads, length), new(batch, heads, down, 2), new(batch, heads, across, 4)
        told |= {"top_of": kept[0], "total_of": kept[1], "delta_of": delta}
        told |= _strides_of("rq", q) | _strides_of("rk", k) | _strides_of("rv", v)
        told = made_ready(told)
        launch(
            _of_queries, (batch * heads * down,), d_q=d_q, d_factor=d_factor, sums=of_q,
            **of_probs, **by_queries, **_without(told, "dk", "dv", "rk", "rv"), raw_q=q,
        )  # fmt: skip
        launch(
            _of_keys, (batch * heads * across,), d_k=d_k, d_v=d_v, sums=of_kv, raw_k=k, raw_v=v, **by_keys,
            **_without(told, "dq", "rq"),
        )  # fmt: skip
        _sum_sites(((0, 2, of_q), (2, 6, of_kv)), scales, d_sites)
        if d_bias is not None:
            tile = by_keys
            down, across = triton.cdiv(length, tile["BLOCK_Q"]), triton.cdiv(length, tile["BLOCK_K"])
            run = triton.cdiv(batch, max(1, PROGRAMS // (heads * down * across)))
            of_bias = new(triton.cdiv(batch, run), heads, length, length)
            launch(
                _of_bias, (len(of_bias) * heads * down * across,), d_bias=of_bias, batch=batch, run=run, **tile,
                **_without(told, "dq", "dk", "dv", "rq", "rk", "rv"),
            )  # fmt: skip
    if d_bias is not None:
        torch.sum(of_bias, 0, dtype=torch.float64, out=d_bias)


def _strides_of(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_b", f"{name}_h", f"{name}_n"), x.stride(), strict=False))


def _without(told: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return what a kernel is told that writes no tensors of these names."""
    return {key: value for key, value in told.items() if key.rpartition("_")[0] not in names}


def _sum_sites(parts: tuple[tuple[int, int, Tensor], ...], scales: list[Tensor | None], d_sites: Tensor) -> None:
    """Add up what programs left of the sites `first` to `last` of d_sites, where they have any; others' values are not read."""
    quantized = [scales[i] is not None for i in (0, 0, 2, 2, 6, 6)]
    for first, last, found in parts:
        if any(quantized[first:last]):
            sums = found.movedim(-1, 0)
            torch.sum(sums, [1, *range(3, sums.dim())], dtype=torch.float64, out=d_sites[first:last])


OPERATORS = (quant_attention_backward,)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled: dtypes, tiles, grids, offsets, what is added and learned."""
    plain, elastic, signed = (0, 3, 0.0, 0.0, 3.0, 0.0), (0, 1, 0.0, 0.0, 1.0, 1.0), (-2, 1, 0.0, -2.0, 1.0, 0.0)
    kinds = {  # tokens, features, probabilities' grid, whether all is learned and added
        torch.float32: ((16, 32, plain, False), (197, 32, elastic, True), (197, 64, plain, True), (197, 128, plain, False)),
        torch.bfloat16: (
            (49, 32, plain, True), (49, 32, plain, False), (64, 64, plain, True), (197, 64, plain, False),
            (197, 64, plain, True), (577, 64, plain, False), (577, 64, elastic, True), (197, 128, plain, False),
            (197, 128, elastic, True), (197, 256, None, True),
        ),
    }  # fmt: skip
    for dtype, found in kinds.items():
        for length, dim, probs, everything in found:
            x, one = torch.zeros(2, length, 3, 3, dim, dtype=dtype).permute(2, 0, 3, 1, 4), torch.ones(3, 1, 1)
            bias, mask = (torch.zeros(1, 3, length, length, dtype=dtype) if everything else None for _ in range(2))
            pair = [one, one if everything and probs is not plain else None]
            scales = [*pair, *pair, None, None, *pair] if probs is None else pair * 4
            grids = [*signed, *signed, *(probs or ()), *signed]
            factor = torch.ones(3, length, 1) if everything and probs is elastic else None
            told = *x, bias, mask, factor, 0.125, scales, grids
            out, kept = quant_attention(*told)
            of_probs, of_factor = (
                torch.zeros(2, 2, 3, length, 1),
                None if factor is None else torch.zeros(2, 3, length, 1),
            )
            d_bias = None if bias is None else torch.zeros(3, length, length, dtype=torch.float64)
            d_sites = torch.zeros(6, 3, dtype=torch.float64)
            quant_attention_backward(
                *told, kept, out, *torch.zeros_like(x), d_sites, None if probs is None else of_probs, of_factor, d_bias
            )
