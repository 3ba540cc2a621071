"""Attention with quantized q, k, probabilities and v that saves q, k, v and what is added to the scores only.

The scores and probabilities of a few images at a time are formed, used and dropped; backward forms them again. So the
memory of a training step does not grow with the square of the sequence, and the work stays in a core's cache. On GPUs
Triton's kernels (gpu/quant_attention.py) hold a block of scores at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.fake_quantize import (
    BLOCK_ELEMENTS,
    ScaleGradient,
    backward_block,
    backward_into,
    blocks,
    quantize_dequantize,
    sum_like,
)
from dsquant.spec import Levels

FUSED_DIM = {torch.float32: 128, torch.bfloat16: 256}  # the most features of q, k and v that Triton's kernels take
NATIVE_BLOCK = 1 << 18  # elements of the scores at a time: 1 MiB, which a core's caches hold


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
    return quantize_dequantize(x.float(), args.scale, args.offset, args.levels)


def _apply_backward(x: Tensor, grad: Tensor, args: QuantArgs | None, sums: ScaleGradient | None, d_x: Tensor) -> None:
    """Write dL/dx to contiguous `d_x`."""
    if args is None:
        d_x.copy_(grad)
    else:
        backward_into(x, grad, args.scale, args.offset, args.levels, sums, d_x)


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
        ctx.save_for_backward(q, k, v, softmax_scale if learned else None, bias, mask, *tensors)
        ctx.softmax_scale, ctx.specs = None if learned else softmax_scale, specs
        args = _assemble(specs, tensors)
        if _fused(q, k, v, softmax_scale, args[2]):
            return _fused_forward(q, k, v, softmax_scale, bias, mask, args)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for block in _image_blocks(q, k):
            q_scaled = _apply(q[block], args[0]) * softmax_scale
            p = _probabilities(q_scaled, _apply(k[block], args[1]), bias, _rows(mask, block, q.shape[0]))
            _product(_apply(p, args[2]), _apply(v[block], args[3]), out[block])
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, scale, bias, mask, *tensors = ctx.saved_tensors
        args = _assemble(ctx.specs, tensors)
        sums = [None if a is None else ScaleGradient(a.scale, a.offset) for a in args]
        softmax_scale = ctx.softmax_scale if scale is None else scale
        d_scale, d_bias = (None if t is None else torch.zeros_like(t, dtype=torch.float64) for t in (scale, bias))
        run = _fused_backward if _fused(q, k, v, softmax_scale, args[2]) else _backward_by_blocks
        d_qkv = run(q, k, v, softmax_scale, bias, mask, args, grad, sums, d_scale, d_bias)
        d_scale, d_bias = (None if d is None else d.to(t.dtype) for d, t in ((d_scale, scale), (d_bias, bias)))
        return *d_qkv, d_scale, d_bias, None, None, *_flat_results(args, sums)


def _backward_by_blocks(q, k, v, softmax_scale, bias, mask, args, grad, sums, d_scale, d_bias) -> list[Tensor]:
    """Return dL/dq, dL/dk and dL/dv; add what is summed over the batch to `sums`, d_scale and d_bias."""
    d_q, d_k, d_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for block in _image_blocks(q, k):
        g = grad[block].float()
        q_hat, k_hat, v_hat = _apply(q[block], args[0]), _apply(k[block], args[1]), _apply(v[block], args[3])
        q_scaled = q_hat * softmax_scale
        p = _probabilities(q_scaled, k_hat, bias, _rows(mask, block, q.shape[0]))
        d_p, p_hat = _through_probabilities(p, g @ v_hat.transpose(-2, -1), args[2], sums[2])
        _apply_backward(v[block], p_hat.transpose(-2, -1) @ g, args[3], sums[3], d_v[block])
        d_s = torch._softmax_backward_data(d_p, p, -1, torch.float32)
        d_q_scaled = d_s @ k_hat
        if d_scale is not None:
            d_scale += sum_like(d_q_scaled * q_hat, d_scale)
        if d_bias is not None:
            d_bias += sum_like(d_s, d_bias)
        _apply_backward(q[block], d_q_scaled.mul_(softmax_scale), args[0], sums[0], d_q[block])
        _apply_backward(k[block], d_s.transpose(-2, -1) @ q_scaled, args[1], sums[1], d_k[block])
    return [d_q, d_k, d_v]


def _fused(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | Tensor, probs_args: QuantArgs | None) -> bool:
    """Say whether Triton's kernels run. Raises ConfigError where they are forced and do not take these."""
    if not q.numel():
        return False
    lacking = _beyond_kernels(q, k, v, softmax_scale, probs_args)
    native = backends.ON_CPU if lacking else backends.NATIVE
    return backends.choose("quant_attention", q.device.type, native, lacking) == backends.TRITON


def _beyond_kernels(q, k, v, softmax_scale, probs_args) -> str:
    """Name what Triton's kernels do not take, which want a query to have one softmax scale and one scale of probabilities."""
    if q.dtype not in FUSED_DIM or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}: they must share float32 or bfloat16"
    if not q.shape[:3] == k.shape[:3] == v.shape[:3]:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: they must share batch, heads and tokens"
    if max(q.shape[-1], v.shape[-1]) > FUSED_DIM[q.dtype]:
        limits = " and ".join(f"{most} of {dtype}" for dtype, most in FUSED_DIM.items())
        return f"q {tuple(q.shape)} and v {tuple(v.shape)} of {q.dtype}: at most {limits} features"
    given = {"softmax scale": softmax_scale}
    if probs_args is not None:
        given |= {"scale of probabilities": probs_args.scale, "offset of probabilities": probs_args.offset}
    for name, value in given.items():
        if isinstance(value, Tensor) and not _one_a_query(value.shape):
            return f"a {name} of shape {tuple(value.shape)}: it must be the same for all images and keys"
    return ""


def _one_a_query(shape: torch.Size) -> bool:
    """Say whether what broadcasts to (B, H, N, N) is the same for all images and keys."""
    return shape.numel() == 1 or (shape[-1] == 1 and (len(shape) < 4 or shape[0] == 1))


def _fused_arguments(q, k, v, softmax_scale, bias, mask, args) -> tuple:
    """Return what both operators take: images in the dtype of q, what is added, values of each query, the grid."""
    q_hat, k_hat, v_hat = (
        x if a is None else quantize_dequantize(x, a.scale, a.offset, a.levels)
        for x, a in ((q, args[0]), (k, args[1]), (v, args[3]))
    )
    probs = QuantArgs(1.0, None, Levels(0, 1)) if args[2] is None else args[2]
    rows = torch.empty(3, *q.shape[1:3], 1, dtype=torch.float32, device=q.device)
    for row, value in zip(rows, (softmax_scale, probs.scale, probs.offset), strict=True):
        if isinstance(value, Tensor):
            row.copy_(value.view(value.shape[-3:]))
        else:
            row.fill_(value or 0.0)
    q_hat = q_hat if q_hat.stride()[2:] == (q.shape[-1], 1) else q_hat.contiguous()  # heads may share one
    return q_hat, k_hat.contiguous(), v_hat.contiguous(), bias, mask, rows, *probs.levels, args[2] is not None


def _fused_forward(q, k, v, softmax_scale, bias, mask, args) -> Tensor:
    run = backends.operator("quant_attention", backends.TRITON, q.device.type)
    return run(*_fused_arguments(q, k, v, softmax_scale, bias, mask, args))


def _fused_backward(q, k, v, softmax_scale, bias, mask, args, grad, sums, d_scale, d_bias) -> list[Tensor]:
    """Do `_backward_by_blocks` by Triton's kernels."""
    run = backends.operator("quant_attention_backward", backends.TRITON, q.device.type)
    of_images = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    of_rows = torch.empty(3, *q.shape[:3], 1, dtype=torch.float32, device=q.device)
    of_bias = None if bias is None else torch.empty(q.shape[1], *[q.shape[2]] * 2, device=q.device, dtype=torch.float64)
    told = _fused_arguments(q, k, v, softmax_scale, bias, mask, args)
    run(*told, grad.contiguous(), *of_images, of_rows, of_bias)
    probs = (None, None) if sums[2] is None else (sums[2].scale, sums[2].offset)
    for total, part in zip((d_scale, *probs, d_bias), (*of_rows.double(), of_bias), strict=True):
        if total is not None:
            total += sum_like(part, total.view(total.shape[-part.dim() :])).view(total.shape)
    found = []
    for x, of_image, i in zip((q, k, v), of_images, (0, 1, 3), strict=True):
        d_x = of_image if x.dtype is torch.float32 else torch.empty_like(x, memory_format=torch.contiguous_format)
        _apply_backward(x, of_image, args[i], sums[i], d_x)
        found.append(d_x)
    return found


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


# The schemas are here and their kernels in gpu/, attached where a GPU is used.
_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_TOLD = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor rows, int qmin, int qmax, float shift, float reach, "
    "bool elastic, bool quantized"
)
_LIBRARY.define(f"quant_attention({_TOLD}) -> Tensor")
_LIBRARY.define(
    f"quant_attention_backward({_TOLD}, Tensor grad, Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!) d_v, Tensor(d!) d_rows, "
    "Tensor(e!)? d_bias) -> ()"
)


@torch.library.register_fake("dsquant::quant_attention", lib=_LIBRARY)
def _(q, k, v, *_):
    return torch.empty_like(v)


@torch.library.register_fake("dsquant::quant_attention_backward", lib=_LIBRARY)
def _(*_):
    return None
