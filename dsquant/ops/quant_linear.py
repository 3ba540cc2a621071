"""Activation quantization and linear in one op, so that only the float input is kept for backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops.fake_quantize import ScaleGradient, backward_into, quantize_dequantize
from dsquant.spec import Levels


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, offset, levels, grad_scale):
        ctx.save_for_backward(x, weight, scale, offset)
        ctx.levels, ctx.grad_scale = levels, grad_scale
        ctx.has_bias = bias is not None
        return F.linear(quantize_dequantize(x, scale, offset, levels), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, offset = ctx.saved_tensors
        sums = ScaleGradient(scale, offset)
        d_x = grad @ weight
        x_hat = torch.empty_like(x, memory_format=torch.contiguous_format)
        backward_into(x, d_x, scale, offset, ctx.levels, sums, d_x, x_hat)
        rows = grad.reshape(-1, grad.shape[-1])
        d_weight = rows.t() @ x_hat.view(-1, x_hat.shape[-1])
        d_bias = rows.sum(0) if ctx.has_bias else None
        return d_x, d_weight, d_bias, *sums.results(ctx.grad_scale), None, None


def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    levels: Levels,
    grad_scale: float = 1.0,
) -> Tensor:
    """Return `linear(fake_quantize(x), weight, bias)` and save x once.

    x is (..., in), weight (out, in), bias (out,) or None, scale, offset and levels as in `fake_quantize`. The quantized input
    is recomputed in backward. Equal to the composition of the two ops, gradients included.
    """
    return _QuantLinear.apply(x, weight, bias, scale, offset, levels, grad_scale)
