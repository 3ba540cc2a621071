"""Uniform quantization of activations: the one definition of codes, of x_hat and of their gradients.

All arithmetic is float32: divide, clip, round half to even, multiply, add. Work proceeds in blocks along the first
dimension, because every pass over a whole activation costs as much as the passes it replaces; 4 MiB a block was fastest
on two cores.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops import backends
from dsquant.spec import Levels

BLOCK_ELEMENTS = 1 << 20


def blocks(x: Tensor, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Yield slices of dim 0 of about `elements` elements each on CPU; one slice for everything elsewhere."""
    rows = x.shape[0] if x.dim() else 1
    step = rows if x.device.type != "cpu" else max(1, elements * rows // max(1, x.numel()))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(rows, start + step))


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels) -> Tensor:
    """Return float32 integer codes `round(clip((x - offset) / scale - shift, qmin, qmax))`, rounding half to even.

    x is any float tensor, scale and offset float32 tensors that broadcast to it. LSQ+ (Bhalgat et al. 2020), eq. 1.
    """
    x = x.float()
    v = x / scale if offset is None else (x - offset).div_(scale)
    return to_codes_(v, levels)


def to_codes_(v: Tensor, levels: Levels) -> Tensor:
    """Turn float32 `v = (x - offset) / scale` into its codes, in place."""
    if levels.shift:
        v.sub_(levels.shift)
    return v.clamp_(levels.qmin, levels.qmax).round_()


def dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return `x_hat = (codes + shift) * scale + offset` in float32, overwriting float32 `codes`; in `out`, where given."""
    return _scaled(codes.add_(levels.shift) if levels.shift else codes, scale, offset, out)


def _scaled(level: Tensor, scale: Tensor, offset: Tensor | None, out: Tensor | None) -> Tensor:
    """Return `level * scale + offset`, in `out` (cast to its dtype) or in place of float32 `level`."""
    direct = level.mul_(scale) if out is None or out.dtype is not torch.float32 else torch.mul(level, scale, out=out)
    if offset is not None:
        direct.add_(offset)
    return direct if out is None or direct is out else out.copy_(direct)


def quantize_dequantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, *, gelu: bool = False
) -> Tensor:  # fmt: skip
    """Return x_hat, or that of GELU(x), in the dtype of x, contiguous: in one native pass, or block by block."""
    native = _native(x, scale)
    if gelu and (native is None or native.backend != backends.TRITON):
        return quantize_dequantize(F.gelu(x), scale, offset, levels)
    if native is not None:
        return native.forward(x, scale, offset, levels, "gelu_quantize" if gelu else "fake_quantize")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for block in blocks(x):
        dequantize(quantize(x[block], scale, offset, levels), scale, offset, levels, out[block])
    return out


class _Native(NamedTuple):
    """Run the native passes, in which element i has the ((i // inner) % n_groups)-th scale."""

    inner: int
    backend: str

    def forward(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, name: str = "fake_quantize"
    ) -> Tensor:  # fmt: skip
        """Do `quantize_dequantize` by an operator."""
        run = backends.operator(name, self.backend, x.device.type)
        grid = levels.qmin, levels.qmax, levels.shift
        return run(x.contiguous(), *self._flat(scale, offset), *grid, backends.isa(self.backend))

    def backward(
        self, x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, sums: "ScaleGradient",
        d_x: Tensor, x_hat: Tensor | None, name: str = "fake_quantize",
    ) -> None:  # fmt: skip
        """Do `backward_block` in one pass, into contiguous d_x, which may be grad, and x_hat, or None."""
        run = backends.operator(f"{name}_backward", self.backend, x.device.type)
        run(
            x.contiguous(), grad.contiguous(), *self._flat(scale, offset), levels.qmin, levels.qmax, levels.shift,
            levels.low, levels.high, levels.elastic, d_x, x_hat, sums.parts, backends.isa(self.backend),
        )  # fmt: skip

    def _flat(self, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        return scale.contiguous().view(-1), None if offset is None else offset.contiguous().view(-1), self.inner


def _native(x: Tensor, scale: Tensor) -> _Native | None:
    """Return how native code takes x with scales that broadcast to it, or None where the definition has to."""
    if not x.numel():
        return None
    backend = backends.choose("fake_quantize", x.device.type)
    if backend in backends.ON_CPU and x.dtype is not torch.float32:
        return None
    inner = inner_length(tuple(x.shape), tuple(scale.shape))
    return None if backend == backends.TORCH or inner is None else _Native(inner, backend)


@cache
def inner_length(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> int | None:
    """Return how many elements in a row share a scale that broadcasts to `shape`, or None where they are not in a row."""
    if math.prod(scale_shape) == 1:
        return math.prod(shape)
    own = (1,) * (len(shape) - len(scale_shape)) + scale_shape
    held = [i for i, size in enumerate(own) if size != 1]
    first, last = held[0], held[-1]
    if own[first : last + 1] != shape[first : last + 1]:
        return None
    return math.prod(shape[last + 1 :])


def sum_like(x: Tensor, like: Tensor) -> Tensor:
    """Sum float32 x over the dimensions that `like` broadcast along; float64, so that blocks add up exactly enough."""
    total = x.sum().view(like.shape) if like.numel() == 1 else x.sum_to_size(like.shape)
    return total.double()


def dot_like(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Return `sum_like(x * y, like)`, without forming the product where one scale serves all."""
    if like.numel() == 1 and x.is_contiguous() and y.is_contiguous():
        return torch.dot(x.view(-1), y.view(-1)).double().view(like.shape)
    return sum_like(x * y, like)


class QuantArgs(NamedTuple):
    """Bundle what one quantizer needs: scale and offset tensors, the grid, gradient factor."""

    scale: Tensor
    offset: Tensor | None
    levels: Levels
    grad_scale: float = 1.0


class ScaleGradient:
    """Add up d scale and d offset in float64: block by block, or put at once."""

    def __init__(self, scale: Tensor, offset: Tensor | None):
        self._like, self._has_offset = scale, offset is not None
        self._parts: Tensor | None = None

    @property
    def parts(self) -> Tensor:
        """Hold both, (2, scales); the second counts for nothing without an offset."""
        if self._parts is None:
            self._parts = torch.zeros(2, self._like.numel(), dtype=torch.float64, device=self._like.device)
        return self._parts

    @property
    def scale(self) -> Tensor:
        return self.parts[0].view(self._like.shape)

    @property
    def offset(self) -> Tensor | None:
        return self.parts[1].view(self._like.shape) if self._has_offset else None

    def put(self, parts: Tensor) -> None:
        """Add both at once, or, where there is no offset, the first alone."""
        self._parts = parts if self._parts is None else self._parts + parts

    def results(self, grad_scale: float) -> tuple[Tensor, Tensor | None]:
        """Return float32 gradients; `grad_scale` applies to both, so that scale and offset move at one pace."""
        found = (self.parts * grad_scale).float().view(-1, *self._like.shape)
        return found[0], found[1] if self._has_offset else None


def pass_inside(grad: Tensor, v: Tensor, levels: Levels) -> Tensor:
    """Return G where low <= v <= high, both edges included, else 0; one pass, no mask.

    hardtanh's own backward leaves the edges out, so it is given the next float32 beyond each.
    """
    return torch.ops.aten.hardtanh_backward(grad, v, *_just_beyond(levels.low, levels.high))


def near_boundary(v: Tensor, levels: Levels, reach: float) -> Tensor:
    """Return which weights lie within `reach` of a boundary between two codes, bool; v = w / scale.

    With z = v - shift, boundaries are the half integers from qmin + 1/2 to qmax - 1/2. Source: OFQ (Liu et al. 2023), CGA.
    """
    z = v - levels.shift
    nearest = z.floor().clamp_(levels.qmin, levels.qmax - 1).add_(0.5)
    return z.sub_(nearest).abs_() <= reach


@cache
def _just_beyond(low: float, high: float) -> tuple[float, float]:
    low, high = np.nextafter(np.float32([low, high]), np.float32([-np.inf, np.inf]))
    return float(low), float(high)


def backward_block(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, sums: ScaleGradient,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (dL/dx, x_hat), both float32, of one block and add its share of the scale and offset gradients.

    x_hat is written to `out`, in its dtype, where that is given.

    With v = (x - offset) / scale: dL/dx = G where low <= v <= high, else 0;
    dL/dscale = sum G * (level - v inside, level outside), level = code + shift, or G * level throughout where the grid is
    elastic; dL/doffset = sum G outside. LSQ eq. 3, LSQ+; BiT (Liu et al. 2022), section 3.2.
    The first is summed as G * (level - clip(v)) plus (G - dL/dx) * clip(v), zero inside: no cancellation.
    """
    x, grad = x.float(), grad.float()
    if (native := _native(x, scale)) is not None:
        d_x, x_hat = torch.empty_like(x, memory_format=torch.contiguous_format), out
        if out is None or out.dtype is not torch.float32 or not out.is_contiguous():
            x_hat = torch.empty_like(d_x)
        native.backward(x, grad, scale, offset, levels, sums, d_x, x_hat)
        return d_x, x_hat if out is None or out is x_hat else out.copy_(x_hat)
    v = x / scale if offset is None else (x - offset).div_(scale)
    d_x = pass_inside(grad, v, levels)
    if levels.shift or levels.reach:
        level = to_codes_(v.clone(), levels).add_(levels.shift)
        v.clamp_(levels.low, levels.high)
    else:  # the levels end where the gradient does: one clip serves both
        level = v.clamp_(levels.qmin, levels.qmax).round()
    if levels.elastic:
        sums.scale.add_(dot_like(grad, level, scale))
        blocked = grad - d_x if offset is not None else None
    else:
        sums.scale.add_(dot_like(grad, level - v, scale))
        blocked = torch.empty_like(v).copy_(grad).sub_(d_x)  # laid out as v, so that sums are taken in one order
        sums.scale.add_(dot_like(blocked, v, scale))
    if offset is not None:
        sums.offset.add_(sum_like(blocked, offset))
    return d_x, _scaled(level, scale, offset, out)


def backward_into(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, sums: ScaleGradient, d_x: Tensor,
    x_hat: Tensor | None = None, *, gelu: bool = False,
) -> None:  # fmt: skip
    """Do `backward_block` for a whole activation: dL/dx into contiguous `d_x`, which may be grad, x_hat into `x_hat`.

    With `gelu` GELU(x) is what is quantized, and is formed again.
    """
    native = _native(x, scale)
    if gelu and native is not None and native.backend == backends.TRITON:
        native.backward(x, grad, scale, offset, levels, sums, d_x, x_hat, "gelu_quantize")
        return
    if gelu:
        backward_into(F.gelu(x), grad, scale, offset, levels, sums, d_x, x_hat)
        d_x.copy_(torch.ops.aten.gelu_backward(d_x, x))
        return
    if native is not None and (native.backend == backends.TRITON or grad.dtype is d_x.dtype is torch.float32):
        native.backward(x, grad, scale, offset, levels, sums, d_x, x_hat)
        return
    for block in blocks(x):
        out = None if x_hat is None else x_hat[block]
        d_x[block], _ = backward_block(x[block], grad[block], scale, offset, levels, sums, out)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, levels, grad_scale):
        ctx.save_for_backward(x, scale, offset)
        ctx.levels, ctx.grad_scale = levels, grad_scale
        return quantize_dequantize(x, scale, offset, levels)

    @staticmethod
    def backward(ctx, grad):
        x, scale, offset = ctx.saved_tensors
        sums = ScaleGradient(scale, offset)
        d_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        backward_into(x, grad, scale, offset, ctx.levels, sums, d_x)
        return d_x, *sums.results(ctx.grad_scale), None, None


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, grad_scale: float = 1.0) -> Tensor:
    """Return x_hat = scale * (round(clip((x - offset) / scale - shift, qmin, qmax)) + shift) + offset, differentiable.

    Args:
        x: activation (B, ...), float32 or bfloat16; the result has its shape and dtype.
        scale: positive float32 tensor that broadcasts to x and is the same along dim 0, the samples.
        offset: float32 tensor of the shape of scale, or None.
        levels: the grid, and how far the gradient passes.
        grad_scale: factor on the gradients of scale and offset.

    Saves x and the scales only. Straight-through: the gradient passes in full where low <= (x - offset)/scale <= high,
    both edges included. Source: LSQ (Esser et al. 2020), LSQ+ (Bhalgat et al. 2020).
    """
    return _FakeQuantize.apply(x, scale, offset, levels, grad_scale)


# The schemas are here and their kernels in csrc/, attached when the library is loaded: tracing needs no compiler.
_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_GRID = "Tensor scale, Tensor? offset, int inner, int qmin, int qmax, float shift"
for _name in ("fake_quantize", "gelu_quantize"):
    _LIBRARY.define(f"{_name}(Tensor x, {_GRID}, int isa) -> Tensor")
    _LIBRARY.define(
        f"{_name}_backward(Tensor x, Tensor grad, {_GRID}, float low, float high, bool elastic, Tensor(a!) d_x, "
        "Tensor(b!)? x_hat, Tensor(c!) sums, int isa) -> ()"
    )
    torch.library.register_fake(f"dsquant::{_name}", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)
    torch.library.register_fake(f"dsquant::{_name}_backward", lambda *_: None, lib=_LIBRARY)
