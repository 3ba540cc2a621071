"""Activation quantization and linear in one op, so that only the float input is kept for backward.

Where the weight is known to be the image of a quantizer, `weight.grid`, and the input has one scale, both operands are small
integers, and on CPU the product is taken so: exact, by the kernels of `packed_linear`, in a fraction of a float product's time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.fake_quantize import ScaleGradient, backward_into, quantize_dequantize
from dsquant.spec import Levels

MAX_COLS = 1 << 15  # of a product of 8-bit codes that 32 bits hold


class WeightGrid(NamedTuple):
    """Say that a weight is an image, `w_hat = (code + shift) * scale`: float32 scales, each of as many rows, and the levels."""

    scale: Tensor
    levels: Levels


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, offset, levels, grad_scale, weight_scale, weight_levels):
        ctx.save_for_backward(x, weight, scale, offset)
        ctx.levels, ctx.grad_scale = levels, grad_scale
        ctx.has_bias = bias is not None
        backend = _backend(x, weight, scale, levels, weight_scale)
        if backend == backends.TORCH:
            return F.linear(quantize_dequantize(x, scale, offset, levels), weight, bias)
        w, x_grid = weight_levels, (levels.qmin, levels.qmax, levels.shift)
        return torch.ops.dsquant.image_linear_int(
            x, weight, weight_scale, bias, scale, offset, w.shift, w.qmin, w.qmax, *x_grid, backends.isa(backend)
        )

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
        return d_x, d_weight, d_bias, *sums.results(ctx.grad_scale), None, None, None, None


def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    levels: Levels,
    grad_scale: float = 1.0,
    grid: WeightGrid | None = None,
) -> Tensor:
    """Return `linear(fake_quantize(x), weight, bias)` and save x once.

    x is (..., in), weight (out, in), bias (out,) or None, scale, offset and levels as in `fake_quantize`. The quantized input
    is recomputed in backward. Equal to the composition of the two ops, gradients included, where `grid` is None. With the grid of
    a weight that is an image the product may be taken in integers: it is rounded once, where a float product rounds each sum.
    Raises RuntimeError then for a weight that is none.
    """
    return _QuantLinear.apply(x, weight, bias, scale, offset, levels, grad_scale, *(grid or (None, None)))


def _backend(x: Tensor, weight: Tensor, scale: Tensor, levels: Levels, weight_scale: Tensor | None) -> str:
    """Return what takes the product: the definition, unless both operands are codes that native code takes."""
    if weight_scale is None or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return backends.TORCH
    if scale.numel() != 1 or levels.qmax - levels.qmin > 255 or weight.shape[1] > MAX_COLS:
        return backends.TORCH
    return _on_cpu()


@torch.compiler.assume_constant_result
def _on_cpu() -> str:
    if backends.requested() in backends.ON_GPU:  # kernels that are interpreted have no such product
        return backends.TORCH
    return backends.choose("quant_linear", "cpu", backends.ON_CPU)


_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_LIBRARY.define(
    "image_linear_int(Tensor x, Tensor image, Tensor image_scale, Tensor? bias, Tensor in_scale, Tensor? in_offset, float shift, "
    "int least, int most, int qmin, int qmax, float in_shift, int isa) -> Tensor"
)
torch.library.register_fake(
    "dsquant::image_linear_int", lambda x, image, *_: x.new_empty((*x.shape[:-1], image.shape[0])), lib=_LIBRARY
)
