"""Attention with quantized q, k, probabilities and v that saves q, k and v only.

The scores and probabilities of a few images at a time are formed, used and dropped; backward forms them again. So the
memory of a training step does not grow with the square of the sequence, and the work stays in a core's cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsquant.ops.fake_quantize import ScaleGradient, backward_block, blocks, dequantize, quantize
from dsquant.spec import Levels


class QuantArgs(NamedTuple):
    """Bundle what one quantizer needs: scale and offset tensors, the grid, gradient factor."""

    scale: Tensor
    offset: Tensor | None
    levels: Levels
    grad_scale: float = 1.0


def _apply(x: Tensor, args: QuantArgs | None) -> Tensor:
    """Return x_hat in float32, or x itself where the site is float."""
    if args is None:
        return x.float()
    return dequantize(quantize(x, args.scale, args.offset, args.levels), args.scale, args.offset, args.levels)


def _apply_backward(x: Tensor, grad: Tensor, args: QuantArgs | None, sums: ScaleGradient | None) -> Tensor:
    if args is None:
        return grad
    return backward_block(x, grad, args.scale, args.offset, args.levels, sums)[0]


def _probabilities(q_scaled: Tensor, k_hat: Tensor, mask: Tensor | None) -> Tensor:
    scores = q_scaled @ k_hat.transpose(-2, -1)
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def _mask_of(block: slice, mask: Tensor | None, batch: int) -> Tensor | None:
    """Return the mask of a block of images: its own rows, or all of a mask that the images share."""
    return mask[block] if mask is not None and mask.shape[0] == batch else mask


class _QuantAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, softmax_scale, specs, *tensors):
        ctx.save_for_backward(q, k, v, mask, *tensors)
        ctx.softmax_scale, ctx.specs = softmax_scale, specs
        args = _assemble(specs, tensors)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for block in _image_blocks(q, k):
            q_scaled, k_hat = _apply(q[block], args[0]) * softmax_scale, _apply(k[block], args[1])
            p = _probabilities(q_scaled, k_hat, _mask_of(block, mask, len(q)))
            out[block] = _apply(p, args[2]) @ _apply(v[block], args[3])
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, *tensors = ctx.saved_tensors
        args = _assemble(ctx.specs, tensors)
        sums = [None if a is None else ScaleGradient(a.scale, a.offset) for a in args]
        d_q, d_k, d_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for block in _image_blocks(q, k):
            g = grad[block].float()
            q_scaled = _apply(q[block], args[0]) * ctx.softmax_scale
            k_hat, v_hat = _apply(k[block], args[1]), _apply(v[block], args[3])
            p = _probabilities(q_scaled, k_hat, _mask_of(block, mask, len(q)))
            d_p_hat = g @ v_hat.transpose(-2, -1)
            if args[2] is None:
                d_p, p_hat = d_p_hat, p
            else:
                a = args[2]
                d_p, p_hat = backward_block(p, d_p_hat, a.scale, a.offset, a.levels, sums[2])
            d_v[block] = _apply_backward(v[block], p_hat.transpose(-2, -1) @ g, args[3], sums[3])
            d_s = torch._softmax_backward_data(d_p, p, -1, torch.float32)
            d_q[block] = _apply_backward(q[block], (d_s @ k_hat).mul_(ctx.softmax_scale), args[0], sums[0])
            d_k[block] = _apply_backward(k[block], d_s.transpose(-2, -1) @ q_scaled, args[1], sums[1])
        d_tensors = []
        for a, s in zip(args, sums, strict=True):
            if a is not None:
                d_scale, d_offset = s.results(a.grad_scale)
                d_tensors += [d_scale] if a.offset is None else [d_scale, d_offset]
        return d_q, d_k, d_v, None, None, None, *d_tensors


def _image_blocks(q: Tensor, k: Tensor):
    """Split the batch so that the scores of a block, (b, H, N, N), stay in cache."""
    scores = q[..., :1].expand(*q.shape[:-1], k.shape[-2])
    return blocks(scores)


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
    softmax_scale: float,
    q_args: QuantArgs | None,
    k_args: QuantArgs | None,
    probs_args: QuantArgs | None,
    v_args: QuantArgs | None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `Q_p(softmax((Q_q(q) * softmax_scale) Q_k(k)^T + mask)) Q_v(v)`, each Q a `fake_quantize` or, for None, identity.

    q, k, v are (B, H, N, D), float32 or bfloat16; the arithmetic is float32 and the result (B, H, N, D) has the dtype
    of v. Scales broadcast to (B, H, N, D) for q, k, v and to (B, H, N, N) for the probabilities, as does `mask`, a constant
    that is added to the scores: (B, 1, 1, N) with a large negative number at padded keys.
    Sites: Quantization Variation (TMLR 2024), multi-head self-attention.
    """
    all_args = (q_args, k_args, probs_args, v_args)
    specs = tuple(None if a is None else (a.offset is not None, a.levels, a.grad_scale) for a in all_args)
    tensors = [t for a in all_args if a is not None for t in (a.scale, a.offset) if t is not None]
    return _QuantAttention.apply(q, k, v, mask, softmax_scale, specs, *tensors)
