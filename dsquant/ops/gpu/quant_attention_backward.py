"""The gradients of attention through its four quantizers as Triton kernels, which form scores and probabilities again.

With s the scores, p = softmax(s), p_hat its image and G = g v_hat^T the image's gradient: dL/dp = G where p lies on the grid,
else 0; dL/ds = p (dL/dp - delta), delta = sum_j p_j dL/dp_j over the whole row. (It is not g . out: that takes p_hat = p.)

Forward has left what turns a product to a probability at once. `_of_queries` goes over the keys once: with delta known only at
the end of a row, its gradients are (p dL/dp) k - delta (p k), two products. `_of_keys`, which turns scores round, has those of
keys and values with these sums at hand. A sequence of one block has `_of_window` for both, and for the gradient of
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
    kept_sums,
    level_of,
    level_of_probs,
    load_rows,
    made_ready,
    of_queries,
    operand,
    padded,
    parts_of,
    probabilities,
    quant_attention,
    scale_of,
    scores,
    statistics,
    store_rows,
    tiles_of,
    unit_of,
)

SUMS = 1024  # that are added up at a time
PROGRAMS = 1024  # into which the gradient of the bias is cut by runs of the batch, where heads and blocks are fewer


@triton.jit
def _through_probs(p, g, inverse, zero, GRID: tl.constexpr):
    """Return dL/dp of the gradient g of the image of p, and the level of p, or p itself where it is not quantized.

    The inverse of the scale, and `zero`, offset over scale or None, of queries, are shaped to broadcast.
    """
    d_p, level = g, p
    if GRID is not None:
        v = p * inverse
        inside = v <= GRID[4]
        if zero is not None:
            v = v - zero
            inside = (v >= GRID[3]) & (v <= GRID[4])
            level = level_of(v, GRID)
        else:
            if GRID[3] > 0:  # a probability is never below 0
                inside = inside & (v >= GRID[3])
            level = level_of_probs(v, GRID)
        d_p = tl.where(inside, g, 0.0)
    return d_p, level


@triton.jit
def _of_probs(p, d_p, g, level, inverse, zero, GRID: tl.constexpr):
    """Return the sums over keys of p dL/dp, and of what is added to d scale: G level, less dL/dp v unless the grid is elastic."""
    delta, of_scale = tl.sum(p * d_p, axis=1), tl.sum(g * level, axis=1)
    if GRID is not None and not GRID[5]:
        of_scale -= delta * inverse
        if zero is not None:
            of_scale += zero * tl.sum(d_p, axis=1)
    return delta, of_scale


@triton.jit
def _grid_of_probs(scale, offset, head, query, length, h, n, GRID: tl.constexpr):
    """Return of each query the scale of probabilities, its inverse, the offset, and offset over scale; zeros where there is none.

    Formed before a loop where they can be: compilers leave divisions in it.
    """
    s = tl.zeros_like(query).to(tl.float32)
    inverse, o, zero = s, s, s
    if GRID is not None:
        s = of_queries(scale, head, query, length, h, n)
        inverse = inverse_of(s)
        if offset is not None:
            o = of_queries(offset, head, query, length, h, n)
            zero = tl.math.div_rn(o, s)
    return s, inverse, o, zero


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
def _of_window(q, k, v, grad, d_q, d_k, d_v, d_scale, d_offset, d_factor, d_bias, q_sums, kv_sums, bias, mask, factor, q_scale,
               q_offset, k_scale, k_offset, p_scale, p_offset, v_scale, v_offset, batch, run, heads, length, mask_rows, q_b,
               q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
               factor_h, factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, Q_GRID: tl.constexpr,
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
    scale, inverse, offset, zero = _grid_of_probs(p_scale, p_offset, head, token, length, p_h, p_n, P_GRID)
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
        _, e, total = statistics(s, bias, mask)
        p, of_image = e * inverse_of(total)[:, None], dot(g, tl.trans(values))
        at = row * length + token
        if p_offset is None:
            d_p, image_p = _through_probs(p, of_image, inverse[:, None], None, P_GRID)
            delta, of_scale = _of_probs(p, d_p, of_image, image_p, inverse, None, P_GRID)
            if P_GRID is not None:
                image_p = image_p * scale[:, None]
        else:
            d_p, level = _through_probs(p, of_image, inverse[:, None], zero[:, None], P_GRID)
            delta, of_scale = _of_probs(p, d_p, of_image, level, inverse, zero, P_GRID)
            image_p = level * scale[:, None] + offset[:, None]
            tl.store(d_offset + at, tl.sum(of_image - d_p, axis=1) * unit_v, mask=there)
        if P_GRID is not None:
            tl.store(d_scale + at, of_scale * unit_v, mask=there)
        of_values = dot(tl.trans(cast(image_p, g.dtype)), g)
        at_sums = kv_sums + row * 4
        of_values = _through_site(raw_v, of_values, at_sums + 2, token, length, v_scale, v_offset, head, V_GRID)
        store_rows(d_v + image * dv_b + head * dv_h, of_values, token, dv_n, length, DIM_V)
        d_s = p * (d_p - delta[:, None])
        if d_bias is not None:
            of_bias += d_s * unit_v
        of_keys = dot(tl.trans(cast(d_s * of_softmax[:, None], queries.dtype)), queries) * (unit_v * unit_q)
        of_keys = _through_site(raw_k, of_keys, at_sums, token, length, k_scale, k_offset, head, K_GRID)
        store_rows(d_k + image * dk_b + head * dk_h, of_keys, token, dk_n, length, DIM)
        of_product = dot(cast(d_s, keys.dtype), keys) * (unit_v * unit_k)
        if d_factor is not None:
            tl.store(d_factor + at, tl.sum(of_product * queries.to(tl.float32), axis=1) * unit_q, mask=there)
        of_product = of_product * of_softmax[:, None]
        of_product = _through_site(raw_q, of_product, q_sums + row * 2, token, length, q_scale, q_offset, head, Q_GRID)
        store_rows(d_q + image * dq_b + head * dq_h, of_product, token, dq_n, length, DIM)
    if d_bias is not None:
        where = tl.program_id(0).to(tl.int64) * length * length + token[:, None] * length + token[None, :]
        tl.store(d_bias + where, of_bias, mask=there[:, None] & there[None, :])


@triton.jit
def _of_queries(q, k, v, raw_q, grad, d_q, top_of, inverse_at, delta_of, d_scale, d_offset, d_factor, sums, bias, mask, factor,
                q_scale, q_offset, k_scale, k_offset, p_scale, p_offset, v_scale, v_offset, first, blocks, slot, slots, heads,
                length, mask_rows, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dq_b, dq_h, dq_n, rq_b, rq_h,
                rq_n, factor_h, factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
                Q_GRID: tl.constexpr, K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    query = first + block * BLOCK_Q + tl.arange(0, BLOCK_Q)
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
    _scale, of_grid, _offset, zero = _grid_of_probs(p_scale, p_offset, head, query, length, p_h, p_n, P_GRID)
    at, there = row.to(tl.int64) * length + query, query < length
    top, inverse = kept_sums(top_of, inverse_at, at, there, bias, mask)
    delta, sum_scale, sum_offset = tl.zeros_like(by), tl.zeros_like(by), tl.zeros_like(by)
    of_product = tl.zeros([BLOCK_Q, padded(DIM)], tl.float32)
    of_mean = tl.zeros([BLOCK_Q, padded(DIM)], tl.float32)
    for start in range(0, length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = operand(load_rows(k, key, k_n, length, DIM), key, length, k_scale, k_offset, head, K_GRID, READY)
        values = operand(load_rows(v, key, v_n, length, DIM_V), key, length, v_scale, v_offset, head, V_GRID, READY)
        p = probabilities(
            dot(queries, tl.trans(keys)), by[:, None], top[:, None], inverse[:, None], bias, mask, query[:, None], key[None, :],
            length, bias_q, bias_k, mask_q, mask_k,
        )  # fmt: skip
        of_image = dot(g, tl.trans(values))
        if p_offset is None:
            d_p, level = _through_probs(p, of_image, of_grid[:, None], None, P_GRID)
            of_row, of_scale = _of_probs(p, d_p, of_image, level, of_grid, None, P_GRID)
        else:
            d_p, level = _through_probs(p, of_image, of_grid[:, None], zero[:, None], P_GRID)
            of_row, of_scale = _of_probs(p, d_p, of_image, level, of_grid, zero, P_GRID)
            sum_offset += tl.sum(of_image - d_p, axis=1)
        delta += of_row
        sum_scale += of_scale
        of_product += dot(cast(p * d_p, keys.dtype), keys)
        of_mean += dot(cast(p, keys.dtype), keys)
    of_product -= delta[:, None] * of_mean
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
    at_sums = sums + (row.to(tl.int64) * slots + slot + block) * 2
    of_product = _through_site(raw, of_product, at_sums, query, length, q_scale, q_offset, head, Q_GRID)
    store_rows(d_q + image * dq_b + head * dq_h, of_product, query, dq_n, length, DIM)


@triton.jit
def _of_keys(q, k, v, raw_k, raw_v, grad, d_k, d_v, top_of, inverse_at, delta_of, sums, bias, mask, factor, q_scale, q_offset,
             k_scale, k_offset, p_scale, p_offset, v_scale, v_offset, first, blocks, slot, slots, heads, length, mask_rows,
             q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, rk_b, rk_h, rk_n,
             rv_b, rv_h, rv_n, factor_h, factor_n, p_h, p_n, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
             Q_GRID: tl.constexpr, K_GRID: tl.constexpr, P_GRID: tl.constexpr, V_GRID: tl.constexpr, READY: tl.constexpr,
             BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    key = first + block * BLOCK_K + tl.arange(0, BLOCK_K)
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
    query = tl.arange(0, BLOCK_Q)  # what is the same for all queries is so for these
    of_softmax = of_queries(factor, head, query, length, factor_h, factor_n)
    scale, of_grid, offset, zero = _grid_of_probs(p_scale, p_offset, head, query, length, p_h, p_n, P_GRID)
    for start in range(0, length, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        at, there = row.to(tl.int64) * length + query, query < length
        queries = operand(load_rows(q, query, q_n, length, DIM), query, length, q_scale, q_offset, head, Q_GRID, READY)
        g = load_rows(grad, query, g_n, length, DIM_V)
        if factor_n is not None:
            of_softmax = of_queries(factor, head, query, length, factor_h, factor_n)
        if p_n is not None:
            scale, of_grid, offset, zero = _grid_of_probs(p_scale, p_offset, head, query, length, p_h, p_n, P_GRID)
        top, inverse = kept_sums(top_of, inverse_at, at, there, bias, mask)
        p = probabilities(
            dot(keys, tl.trans(queries)), (of_softmax * (unit_q * unit_k))[None, :], top[None, :], inverse[None, :], bias, mask,
            query[None, :], key[:, None], length, bias_q, bias_k, mask_q, mask_k,
        )  # fmt: skip
        of_image = dot(values, tl.trans(g))
        if p_offset is None:
            d_p, image_p = _through_probs(p, of_image, of_grid[None, :], None, P_GRID)
            if p_n is not None:  # else once, at the end
                image_p = image_p * scale[None, :]
        else:
            d_p, image_p = _through_probs(p, of_image, of_grid[None, :], zero[None, :], P_GRID)
            image_p = image_p * scale[None, :] + offset[None, :]
        of_values += dot(cast(image_p, g.dtype), g)
        d_s = p * (d_p - tl.load(delta_of + at, mask=there, other=0.0)[None, :])
        if factor_n is not None:  # else once, at the end
            d_s = d_s * of_softmax[None, :]
        of_keys += dot(cast(d_s, queries.dtype), queries)
    at_sums = sums + (row.to(tl.int64) * slots + slot + block) * 4
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
def _of_bias(q, k, v, grad, d_bias, top_of, inverse_at, delta_of, batch, run, bias, mask, factor, q_scale, q_offset, k_scale,
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
    _scale, of_grid, _offset, zero = _grid_of_probs(p_scale, p_offset, head, query, length, p_h, p_n, P_GRID)
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
        top, inverse = kept_sums(top_of, inverse_at, at, there, bias, mask)
        of_row = tl.load(delta_of + at, mask=there, other=0.0)
        product = dot(queries, tl.trans(keys))
        if mask is None:
            p = probabilities(
                product, by[:, None], top[:, None], inverse[:, None], bias, mask, query[:, None], key[None, :], length, bias_q,
                bias_k, mask_q, mask_k,
            )  # fmt: skip
        else:
            own = mask + (image % mask_rows) * mask_b + head * mask_h
            p = probabilities(
                product, by[:, None], top[:, None], inverse[:, None], bias, own, query[:, None], key[None, :], length, bias_q,
                bias_k, mask_q, mask_k,
            )  # fmt: skip
        if p_offset is None:
            d_p, _level = _through_probs(p, dot(g, tl.trans(values)), of_grid[:, None], None, P_GRID)
        else:
            d_p, _level = _through_probs(p, dot(g, tl.trans(values)), of_grid[:, None], zero[:, None], P_GRID)
        found += p * (d_p - of_row[:, None])
    where = plane.to(tl.int64) * length * length + query[:, None] * length + key[None, :]
    tl.store(d_bias + where, found * unit_v, mask=there[:, None] & (key < length)[None, :])


@triton.jit
def _sum_sites(q_sums, kv_sums, d_sites, images, heads, n_q, n_kv, BLOCK: tl.constexpr):
    """Add up, in float64, what programs left of a head of all images: of q, k and v the sums for scale and offset in turn."""
    head, kind = tl.program_id(0), tl.program_id(1)
    if kind < 2:
        _sum_of_head(q_sums + kind, d_sites, images, head, heads, n_q, 2, BLOCK)
    else:
        _sum_of_head(kv_sums + kind - 2, d_sites, images, head, heads, n_kv, 4, BLOCK)


@triton.jit
def _sum_of_head(sums, d_sites, images, head, heads, slots, step, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, images * slots, BLOCK):
        line = first + tl.arange(0, BLOCK)
        at = ((line // slots * heads + head).to(tl.int64) * slots + line % slots) * step
        total += tl.load(sums + at, mask=line < images * slots, other=0.0).to(tl.float64)
    tl.store(d_sites + tl.program_id(1) * heads + head, tl.sum(total))


def quant_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, factor: Tensor | None, softmax_scale: float,
    scales: list[Tensor | None], grids: list[float], kept: Tensor, grad: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    d_sites: Tensor, d_probs: Tensor | None, d_factor: Tensor | None, d_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v (B, H, N, D), whose features lie one after another, and sums over their parts in float64.

    Of scale and offset of q, k and v in turn for each head (6, H); of those of the probabilities for each image (2, B, H, N)
    float32, of the softmax scale likewise (B, H, N), and of the bias (H, N, N), float64.
    """
    batch, heads, length, _ = q.shape
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
    tiles = tiles_of(told, architecture(q.device))
    by_keys, sizes = tiles.keys.arguments(length), {"images": batch, "heads": heads, "BLOCK": SUMS}
    new = lambda *size: torch.empty(size, dtype=torch.float32, device=q.device)  # noqa: E731
    if tiles.whole(length):
        run = 1 if d_bias is None else triton.cdiv(batch, max(1, PROGRAMS // heads))
        parts = triton.cdiv(batch, run)
        of_bias = None if d_bias is None else new(parts, heads, length, length)
        of_q, of_kv = new(batch, heads, 2), new(batch, heads, 4)
        launch(
            _of_window, (parts * heads,), d_q=d_q, d_k=d_k, d_v=d_v, d_factor=d_factor, d_bias=of_bias, q_sums=of_q,
            kv_sums=of_kv, batch=batch, run=run, **of_probs, **by_keys, **told,
        )  # fmt: skip
        launch(_sum_sites, (heads, 6), q_sums=of_q, kv_sums=of_kv, d_sites=d_sites, n_q=1, n_kv=1, **sizes)
    else:
        down = parts_of(length, "BLOCK_Q", tiles.queries, tiles.few)
        across = parts_of(length, "BLOCK_K", tiles.keys, tiles.few and tiles.few.turned())
        slots = [sum(part.blocks for part in parts) for parts in (down, across)]
        delta, of_q, of_kv = new(batch, heads, length), new(batch, heads, slots[0], 2), new(batch, heads, slots[1], 4)
        told |= {"top_of": kept[0], "inverse_at": kept[1], "delta_of": delta}
        told = made_ready(told | _strides_of("rq", q) | _strides_of("rk", k) | _strides_of("rv", v), "qkv")
        for part in down:
            launch(
                _of_queries, (batch * heads * part.blocks,), d_q=d_q, d_factor=d_factor, sums=of_q, raw_q=q,
                **of_probs, **part.told(slots[0]), **_without(told, "dk", "dv", "rk", "rv"),
            )  # fmt: skip
        for part in across:
            launch(
                _of_keys, (batch * heads * part.blocks,), d_k=d_k, d_v=d_v, sums=of_kv, raw_k=k, raw_v=v,
                **part.told(slots[1]), **_without(told, "dq", "rq"),
            )  # fmt: skip
        launch(
            _sum_sites, (heads, 6), q_sums=of_q, kv_sums=of_kv, d_sites=d_sites, n_q=slots[0], n_kv=slots[1], **sizes
        )
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


OPERATORS = (quant_attention_backward,)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled: dtypes, tiles, grids, offsets, what is added and learned."""
    plain, elastic, signed = (0, 3, 0.0, 0.0, 3.0, 0.0), (0, 1, 0.0, 0.0, 1.0, 1.0), (-2, 1, 0.0, -2.0, 1.0, 0.0)
    kinds = {  # tokens, features, probabilities' grid, whether all is learned and added
        torch.float32: ((16, 32, plain, False), (197, 32, elastic, True), (197, 64, plain, True), (197, 128, plain, False)),
        torch.bfloat16: (
            (49, 32, plain, True), (49, 32, plain, False), (64, 64, plain, True), (128, 64, plain, False),
            (128, 64, elastic, True), (197, 64, plain, False),
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
