"""Uniform quantization of activations: the one definition of codes, of x_hat and of their gradients.

All arithmetic is float32: divide, clip, round half to even, multiply, add. Work proceeds in blocks along the first
dimension that fit a core's cache, because every pass over a whole activation costs as much as the passes it replaces.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18


def blocks(x: Tensor, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Yield slices of dim 0 of about `elements` elements each on CPU; one slice for everything elsewhere."""
    rows = x.shape[0] if x.dim() else 1
    step = rows if x.device.type != "cpu" else max(1, elements * rows // max(1, x.numel()))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + step))


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Return float32 integer codes `round(clip((x - offset) / scale, qmin, qmax))`, rounding half to even.

    x is any float tensor, scale and offset float32 tensors that broadcast to it. LSQ+ (Bhalgat et al. 2020), eq. 1.
    """
    x = x.float()
    v = x / scale if offset is None else (x - offset).div_(scale)
    return v.clamp_(qmin, qmax).round_()


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return `x_hat = codes * scale + offset` in float32, overwriting float32 `codes`."""
    x_hat = codes.mul_(scale)
    return x_hat if offset is None else x_hat.add_(offset)


def quantize_dequantize(x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Return x_hat in the dtype of x, block by block."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for block in blocks(x):
        out[block] = dequantize(quantize(x[block], scale, offset, qmin, qmax), scale, offset)
    return out


def sum_like(x: Tensor, like: Tensor) -> Tensor:
    """Sum float32 x over the dimensions that `like` broadcast along; float64, so that blocks add up exactly enough."""
    total = x.sum().view(like.shape) if like.numel() == 1 else x.sum_to_size(like.shape)
    return total.double()


def dot_like(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Return `sum_like(x * y, like)`, without forming the product where one scale serves all."""
    if like.numel() == 1 and x.is_contiguous() and y.is_contiguous():
        return torch.dot(x.view(-1), y.view(-1)).double().view(like.shape)
    return sum_like(x * y, like)


class ScaleGradient:
    """Accumulate d scale and d offset over blocks in float64."""

    def __init__(self, scale: Tensor, offset: Tensor | None):
        self.scale = torch.zeros_like(scale, dtype=torch.float64)
        self.offset = None if offset is None else torch.zeros_like(offset, dtype=torch.float64)

    def results(self, grad_scale: float) -> tuple[Tensor, Tensor | None]:
        """Return float32 gradients; `grad_scale` applies to both, so that scale and offset move at one pace."""
        d_offset = None if self.offset is None else (self.offset * grad_scale).float()
        return (self.scale * grad_scale).float(), d_offset


def pass_inside(grad: Tensor, v: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return G where qmin <= v <= qmax, both edges included, else 0; one pass, no mask.

    hardtanh's own backward leaves the edges out, so it is given the next float32 beyond each.
    """
    return torch.ops.aten.hardtanh_backward(grad, v, *_just_beyond(qmin, qmax))


@cache
def _just_beyond(qmin: int, qmax: int) -> tuple[float, float]:
    low, high = np.nextafter(np.float32([qmin, qmax]), np.float32([-np.inf, np.inf]))
    return float(low), float(high)


def backward_block(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, sums: ScaleGradient
) -> tuple[Tensor, Tensor]:
    """Return (dL/dx, x_hat), both float32, of one block and add its share of the scale and offset gradients.

    With v = (x - offset) / scale: dL/dx = G where qmin <= v <= qmax, else 0;
    dL/dscale = sum G * (round(v) - v inside, qmin below, qmax above); dL/doffset = sum G outside. LSQ eq. 3, LSQ+.
    The first is summed as G * (code - clip(v)), zero outside, plus (G - dL/dx) * code, zero inside: no cancellation.
    """
    x, grad = x.float(), grad.float()
    v = x / scale if offset is None else (x - offset).div_(scale)
    d_x = pass_inside(grad, v, qmin, qmax)
    codes = v.clamp_(qmin, qmax).round()
    sums.scale += dot_like(grad, torch.sub(codes, v, out=v), scale)
    blocked = torch.sub(grad, d_x, out=v)
    sums.scale += dot_like(blocked, codes, scale)
    if offset is not None:
        sums.offset += sum_like(blocked, offset)
    return d_x, dequantize(codes, scale, offset)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, qmin, qmax, grad_scale):
        ctx.save_for_backward(x, scale, offset)
        ctx.limits = qmin, qmax, grad_scale
        return quantize_dequantize(x, scale, offset, qmin, qmax)

    @staticmethod
    def backward(ctx, grad):
        x, scale, offset = ctx.saved_tensors
        qmin, qmax, grad_scale = ctx.limits
        sums = ScaleGradient(scale, offset)
        d_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        for block in blocks(x):
            d_x[block], _ = backward_block(x[block], grad[block], scale, offset, qmin, qmax, sums)
        return d_x, *sums.results(grad_scale), None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, grad_scale: float = 1.0
) -> Tensor:
    """Return `x_hat = scale * round(clip((x - offset) / scale, qmin, qmax)) + offset`, differentiable in all three.

    Args:
        x: activation (B, ...), float32 or bfloat16; the result has its shape and dtype.
        scale: positive float32 tensor that broadcasts to x and is the same along dim 0, the samples.
        offset: float32 tensor of the shape of scale, or None.
        grad_scale: factor on the gradients of scale and offset.

    Saves x and the scales only. Straight-through: the gradient passes in full where qmin <= (x - offset)/scale <= qmax,
    both edges included. Source: LSQ (Esser et al. 2020), LSQ+ (Bhalgat et al. 2020).
    """
    return _FakeQuantize.apply(x, scale, offset, qmin, qmax, grad_scale)
