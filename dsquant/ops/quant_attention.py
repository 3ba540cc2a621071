"""Attention with quantized q, k, probabilities and v that saves q, k, v and what is added to the scores only.

The scores and probabilities of a few images at a time are formed, used and dropped; backward forms them again. So the
memory of a training step does not grow with the square of the sequence, and the work stays in a core's cache. Where there is
native code (native_attention.py), it runs instead.
"""

import torch
from torch import Tensor

from dsquant.ops import backends, native_attention
from dsquant.ops.fake_quantize import (
    BLOCK_ELEMENTS,
    QuantArgs,
    ScaleGradient,
    backward_block,
    blocks,
    quantize_dequantize,
    sum_like,
)
from dsquant.ops.native_attention import through_site

NATIVE_BLOCK = 1 << 18  # elements of the scores at a time: 1 MiB, which a core's caches hold


def _apply(x: Tensor, args: QuantArgs | None) -> Tensor:
    """Return x_hat in float32, or x itself where the site is float."""
    if args is None:
        return x.float()
    return quantize_dequantize(x.float(), args.scale, args.offset, args.levels)


def _probabilities(q_scaled: Tensor, k_hat: Tensor, *additions: Tensor | None) -> Tensor:
    scores = q_scaled @ k_hat.transpose(-2, -1)
    for addition in additions:
        if addition is not None:
            scores.add_(addition)
    return scores.softmax(dim=-1)


class _QuantAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, bias, mask, specs, *tensors):
        learned = isinstance(softmax_scale, Tensor)
        saved = q, k, v, softmax_scale if learned else None, bias, mask
        ctx.softmax_scale, ctx.specs = None if learned else softmax_scale, specs
        args = _assemble(specs, tensors)
        of = native_attention.Attention(q, k, v, softmax_scale, bias, mask, args)
        if (backend := native_attention.choose(of)) != backends.TORCH:
            out, kept = native_attention.forward(of, backend)
            ctx.save_for_backward(*saved, kept, *tensors)
            return out
        ctx.save_for_backward(*saved, None, *tensors)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for block in _image_blocks(q, k):
            q_scaled = _apply(q[block], args[0]) * softmax_scale
            p = _probabilities(q_scaled, _apply(k[block], args[1]), bias, _rows(mask, block, q.shape[0]))
            _product(_apply(p, args[2]), _apply(v[block], args[3]), out[block])
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, scale, bias, mask, kept, *tensors = ctx.saved_tensors
        args = _assemble(ctx.specs, tensors)
        sums = [None if a is None else ScaleGradient(a.scale, a.offset) for a in args]
        softmax_scale = ctx.softmax_scale if scale is None else scale
        d_scale, d_bias = (None if t is None else torch.zeros_like(t, dtype=torch.float64) for t in (scale, bias))
        of = native_attention.Attention(q, k, v, softmax_scale, bias, mask, args)
        if (backend := native_attention.choose(of)) != backends.TORCH:
            d_qkv = native_attention.backward(
                of, backend, kept, grad, native_attention.Gradients(sums, d_scale, d_bias)
            )
        else:
            d_qkv = _backward_by_blocks(of, grad, sums, d_scale, d_bias)
        d_scale, d_bias = (None if d is None else d.to(t.dtype) for d, t in ((d_scale, scale), (d_bias, bias)))
        return *d_qkv, d_scale, d_bias, None, None, *_flat_results(args, sums)


def _backward_by_blocks(of: native_attention.Attention, grad, sums, d_scale, d_bias) -> list[Tensor]:
    """Return dL/dq, dL/dk and dL/dv; add what is summed over the batch to `sums`, d_scale and d_bias."""
    q, k, v, softmax_scale, bias, mask, args = of
    d_q, d_k, d_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for block in _image_blocks(q, k):
        g = grad[block].float()
        q_hat, k_hat, v_hat = _apply(q[block], args[0]), _apply(k[block], args[1]), _apply(v[block], args[3])
        q_scaled = q_hat * softmax_scale
        p = _probabilities(q_scaled, k_hat, bias, _rows(mask, block, q.shape[0]))
        d_p, p_hat = _through_probabilities(p, g @ v_hat.transpose(-2, -1), args[2], sums[2])
        through_site(v[block], p_hat.transpose(-2, -1) @ g, args[3], sums[3], d_v[block])
        d_s = torch._softmax_backward_data(d_p, p, -1, torch.float32)
        d_q_scaled = d_s @ k_hat
        if d_scale is not None:
            d_scale += sum_like(d_q_scaled * q_hat, d_scale)
        if d_bias is not None:
            d_bias += sum_like(d_s, d_bias)
        through_site(q[block], d_q_scaled.mul_(softmax_scale), args[0], sums[0], d_q[block])
        through_site(k[block], d_s.transpose(-2, -1) @ q_scaled, args[1], sums[1], d_k[block])
    return [d_q, d_k, d_v]


def _through_probabilities(
    p: Tensor, grad: Tensor, args: QuantArgs | None, sums: ScaleGradient | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of float probabilities and their image."""
    if args is None:
        return grad, p
    return backward_block(p, grad, args.scale, args.offset, args.levels, sums)


def _flat_results(args: list[QuantArgs | None], sums: list[ScaleGradient | None]) -> list[Tensor]:
    """Return the gradients of all scales and offsets in the order in which `_assemble` takes them."""
    found = []
    for a, s in zip(args, sums, strict=True):
        if a is not None:
            d_scale, d_offset = s.results(a.grad_scale)
            found += [d_scale] if a.offset is None else [d_scale, d_offset]
    return found


def _rows(mask: Tensor | None, block: slice, batch: int) -> Tensor | None:
    """Return a mask's part for a block of the batch, whose row i takes row `i % len(mask)`."""
    if mask is None or mask.shape[0] == 1:
        return mask
    if mask.shape[0] == batch:
        return mask[block]
    return mask[torch.arange(block.start, block.stop, device=mask.device) % mask.shape[0]]


def _image_blocks(q: Tensor, k: Tensor):
    """Split the batch so that the scores of a block, (b, H, N, N), stay in cache."""
    scores = q[..., :1].expand(*q.shape[:-1], k.shape[-2])
    return blocks(scores, _block_elements(q.device.type))


def _block_elements(device: str) -> int:
    """Return how many scores are formed at a time on CPU: fewer where native passes cost little to begin."""
    native = device == "cpu" and backends.choose("fake_quantize", "cpu") != backends.TORCH
    return NATIVE_BLOCK if native else BLOCK_ELEMENTS


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b to `out`, in its dtype."""
    if out.dtype is a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(a @ b)


def _assemble(specs, tensors) -> list[QuantArgs | None]:
    """Put saved tensors back into their quantizers; autograd needs them flat."""
    found, rest = [], list(tensors)
    for spec in specs:
        if spec is None:
            found.append(None)
            continue
        has_offset, levels, grad_scale = spec
        scale = rest.pop(0)
        found.append(QuantArgs(scale, rest.pop(0) if has_offset else None, levels, grad_scale))
    return found


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | Tensor,
    q_args: QuantArgs | None,
    k_args: QuantArgs | None,
    probs_args: QuantArgs | None,
    v_args: QuantArgs | None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `Q_p(softmax((Q_q(q) * softmax_scale) Q_k(k)^T + bias + mask)) Q_v(v)`, each Q a `fake_quantize` or identity.

    Args:
        q, k, v: (B, H, N, D), float32 or bfloat16; the arithmetic is float32, the result (B, H, N, D) of v's dtype. Triton's
            kernels round what enters a product to bfloat16 where q, k and v are, and sum in float32.
        softmax_scale: a number, or a float tensor that broadcasts to (B, H, N, D) and is the same along dim 0, such as
            the (H, 1, 1) of cosine attention; a tensor gets a gradient.
        q_args, k_args, probs_args, v_args: quantizers; None leaves a site in float. Scales broadcast to (B, H, N, D) for
            q, k, v and to (B, H, N, N) for the probabilities.
        bias: float tensor that broadcasts to (1, H, N, N), added to the scores; gets a gradient, summed over the batch.
        mask: constant float tensor that broadcasts to (M, H, N, N), M a divisor of B: image or window i of the batch takes
            row `i % M`. M = 1 is one mask for all, M = B one each, windows of an image repeat every M.

    Saves its tensor arguments only. Raises ValueError for a bias or mask of another kind.
    Sites: Quantization Variation (TMLR 2024), multi-head self-attention; bias and windows: Swin (Liu et al. 2021), eq. 4.
    """
    if bias is not None and bias.dim() > 3 and bias.shape[0] != 1:
        raise ValueError(f"bias {tuple(bias.shape)} differs along the batch; it must broadcast to (1, H, N, N)")
    if mask is not None:
        mask = _checked_mask(mask, q.shape[0])
    all_args = (q_args, k_args, probs_args, v_args)
    specs = tuple(None if a is None else (a.offset is not None, a.levels, a.grad_scale) for a in all_args)
    tensors = [t for a in all_args if a is not None for t in (a.scale, a.offset) if t is not None]
    return _QuantAttention.apply(q, k, v, softmax_scale, bias, mask, specs, *tensors)


def _checked_mask(mask: Tensor, batch: int) -> Tensor:
    """Return a mask with all four dimensions."""
    if not mask.is_floating_point() or mask.requires_grad:
        raise ValueError("mask is added to the scores and constant: give floats without a gradient, or give it as bias")
    mask = mask[(None,) * (4 - mask.dim())]
    if batch % mask.shape[0]:
        raise ValueError(f"mask {tuple(mask.shape)} has {mask.shape[0]} rows, which do not divide a batch of {batch}")
    return mask
