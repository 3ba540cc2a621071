"""Activation quantization and linear in one op, so that only the float input is kept for backward.

Where the weight is known to be the image of a quantizer and the input has one scale, both operands are small integers, and the
product may be taken so, exactly: on CPU by the kernels of `packed_linear`, in a fraction of a float product's time; on GPUs by
int8 tensor cores, where the weight is large or DSQ_BACKEND or the recipe asks for it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.fake_quantize import ScaleGradient, backward_into, quantize_dequantize
from dsquant.ops.packed_linear import sums_fit
from dsquant.spec import Levels

# Weights of a matrix from which on int8 products, with all that surrounds them, take a GPU less time than to quantize x and to
# multiply in bfloat16: on an H200 88 us for 99 with 768 x 3072 and 12,608 rows, 63 for 61 with 768 x 768.
LARGE = 1 << 20


class WeightGrid(NamedTuple):
    """Say that a weight is an image, `w_hat = (code + shift) * scale`: float32 scales, each of as many rows, and the levels."""

    scale: Tensor
    levels: Levels


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, offset, levels, grad_scale, gelu, weight_scale, weight_levels):
        ctx.save_for_backward(x, weight, scale, offset)
        ctx.levels, ctx.grad_scale, ctx.gelu = levels, grad_scale, gelu
        ctx.has_bias = bias is not None
        backend = integer_backend(x, weight.dtype, weight.shape, scale, levels, weight_levels)
        if backend == backends.TORCH:
            return F.linear(quantize_dequantize(x, scale, offset, levels, gelu=gelu), weight, bias)
        if gelu:
            x = F.gelu(x)
        w, x_grid = weight_levels, (levels.qmin, levels.qmax, levels.shift)
        multiply = backends.operator("image_linear_int", backend, x.device.type)
        return multiply(
            x, weight, weight_scale, bias, scale, offset, w.shift, w.qmin, w.qmax, *x_grid, backends.isa(backend)
        )

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, offset = ctx.saved_tensors
        sums = ScaleGradient(scale, offset)
        d_x = grad @ weight
        x_hat = torch.empty_like(x, memory_format=torch.contiguous_format)
        backward_into(x, d_x, scale, offset, ctx.levels, sums, d_x, x_hat, gelu=ctx.gelu)
        rows = grad.reshape(-1, grad.shape[-1])
        d_weight = rows.t() @ x_hat.view(-1, x_hat.shape[-1])
        d_bias = rows.sum(0) if ctx.has_bias else None
        return d_x, d_weight, d_bias, *sums.results(ctx.grad_scale), None, None, None, None, None


def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    levels: Levels,
    grad_scale: float = 1.0,
    grid: WeightGrid | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """Return `linear(fake_quantize(x), weight, bias)`, or with `gelu` that of GELU(x), and save x once.

    x is (..., in), weight (out, in), bias (out,) or None, scale, offset and levels as in `fake_quantize`. The quantized input
    is recomputed in backward. Equal to the composition of the two ops, gradients included, where `grid` is None. With the grid of
    a weight that is an image the product may be taken in integers: it is rounded once, where a float product rounds each sum.
    A weight that is none raises RuntimeError then on CPU; on GPUs outputs of the rows concerned are NaN.
    """
    return _QuantLinear.apply(x, weight, bias, scale, offset, levels, grad_scale, gelu, *(grid or (None, None)))


def integer_backend(
    x: Tensor, dtype: torch.dtype, shape: tuple[int, int], scale: Tensor, levels: Levels, weight_levels: Levels | None
) -> str:  # fmt: skip
    """Return the backend that multiplies codes of x and of a weight (out, in) of a dtype, or torch where floats are multiplied.

    Codes are multiplied where the weight's levels are known, x has one scale, and native code takes both and holds their sums.
    """
    if weight_levels is None or x.dtype != dtype or scale.numel() != 1:
        return backends.TORCH
    if x.device.type == "cuda" and math.prod(shape) < LARGE and backends.requested("quant_linear") == "auto":
        return backends.TORCH
    n_bits = max(-weight_levels.qmin, weight_levels.qmax + 1).bit_length()
    if not sums_fit(n_bits, shape[1], weight_levels.shift, levels):
        return backends.TORCH
    backend = backends.choose("quant_linear", x.device.type)
    dtypes = (torch.float32, torch.bfloat16) if backend == backends.TRITON else (torch.float32,)
    return backend if x.dtype in dtypes else backends.TORCH


_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_LIBRARY.define(
    "image_linear_int(Tensor x, Tensor image, Tensor image_scale, Tensor? bias, Tensor in_scale, Tensor? in_offset, float shift, "
    "int least, int most, int qmin, int qmax, float in_shift, int isa) -> Tensor"
)
torch.library.register_fake(
    "dsquant::image_linear_int", lambda x, image, *_: x.new_empty((*x.shape[:-1], image.shape[0])), lib=_LIBRARY
)
