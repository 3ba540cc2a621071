"""A linear layer on packed weights: the codes stay packed in memory and are decoded a cache-sized panel at a time.

With a quantized input both operands are small integers, so the product is exact and all rounding is in one conversion,
one multiplication and one addition for each output. Native code obeys the definitions in this file bit for bit there;
with a float input it rounds as any float32 product does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs, quantize, quantize_dequantize
from dsquant.ops.pack import unpack
from dsquant.spec import Levels

EXACT_FLOAT32, EXACT_INT32 = 1 << 24, 1 << 31
FEW_ROWS = 16  # of x, in 16 bits, that CUDA C++ multiplies


class PackedMatrix(NamedTuple):
    """Hold a packed weight (out, in), `w_hat[n] = (code[n] + shift) * scale[n]`.

    Attributes:
        words: int32 (out, ceil(in * n_bits / 32)), the order of `pack`.
        scale: float32 (out,), a scale for each row, equal ones where rows share one.
        code_sums: int32 (out,), the sum of each row's codes.
        n_bits: of a code, 1 to 8.
        cols: in.
        shift: 0 or 1/2, what a code lacks of its level.
    """

    words: Tensor
    scale: Tensor
    code_sums: Tensor
    n_bits: int
    cols: int
    shift: float = 0.0


def packed_matrix(words: Tensor, scale: Tensor, n_bits: int, cols: int, shift: float = 0.0) -> PackedMatrix:
    """Return the PackedMatrix of packed words; `scale` is float32 of 1 or (out,) values. Shares `words`.

    Raises ValueError for another shape or dtype of scale, for a shift other than 0 and 1/2, and as `unpack` does.
    """
    if scale.dtype != torch.float32 or scale.numel() not in (1, len(words)):
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}, not float32 of 1 or {len(words)} values")
    if shift not in (0.0, 0.5):
        raise ValueError(f"shift is {shift}; levels lie at integers (0) or half way between (0.5)")
    code_sums = unpack(words, n_bits, cols).sum(1, dtype=torch.int32)
    scale = scale.reshape(-1).expand(len(words)).contiguous()
    return PackedMatrix(words.contiguous(), scale, code_sums, n_bits, cols, shift)


def image(weight: PackedMatrix) -> Tensor:
    """Return `w_hat` (out, in), float32."""
    codes = unpack(weight.words, weight.n_bits, weight.cols).float()
    return (codes.add_(weight.shift) if weight.shift else codes) * weight.scale[:, None]


def is_integer(weight: PackedMatrix, quant: QuantArgs) -> bool:
    """Say whether the product of this input's codes and these weights' is taken in integers.

    So it is where one scale serves the whole input, its codes have at most 8 bits, and no sum can leave 32 bits.
    Inputs with a scale for each token, head or channel are dequantized first.
    """
    return quant.scale.numel() == 1 and sums_fit(weight.n_bits, weight.cols, weight.shift, quant.levels)


def sums_fit(n_bits: int, cols: int, shift: float, levels: Levels) -> bool:
    """Say whether x's codes have at most 8 bits and no sum of `cols` products with weights of n bits can leave 32."""
    operands = 128 * 2**n_bits * cols  # kernels take codes of 8 bits, offset to be signed or unsigned
    largest = max(_largest_sum(n_bits, cols, shift, levels), operands)
    return levels.qmax - levels.qmin <= 255 and largest < EXACT_INT32


def _factor(shift: float) -> int:
    """Return what makes levels whole numbers: 2 for levels half way between integers, else 1."""
    return 2 if shift else 1


def _largest_sum(n_bits: int, cols: int, shift: float, levels: Levels) -> int:
    """Return what no sum of products of whole levels goes beyond in magnitude."""
    x_reach = max(abs(levels.qmin + levels.shift), abs(levels.qmax + levels.shift)) * _factor(levels.shift)
    w_reach = 2 ** (n_bits - 1) * _factor(shift)
    return int(x_reach * w_reach * cols)


def linear_definition(x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
    """Define `packed_linear` of a float input: `x @ w_hat.T + bias`, float32."""
    return F.linear(x, image(weight), bias)


def integer_definition(x: Tensor, weight: PackedMatrix, bias: Tensor | None, quant: QuantArgs) -> Tensor:
    """Define `packed_linear` of an input with one scale, in exact integers.

    With whole levels X = p (code_x + shift_x), W = q (code_w + shift_w), p and q 1 or 2:

        y = float32(sum X W) * (s_x s_w / (p q)) + float32(offset s_w sum (code_w + shift_w) + bias)

    the last in float64 before it is rounded. The sum is formed in a float dtype that holds it exactly.
    """
    levels = quant.levels
    p, q = _factor(levels.shift), _factor(weight.shift)
    dtype = (
        torch.float32
        if _largest_sum(weight.n_bits, weight.cols, weight.shift, levels) < EXACT_FLOAT32
        else torch.float64
    )
    x_levels = quantize(x, quant.scale, quant.offset, levels).add_(levels.shift).mul_(p).to(dtype)
    w_levels = unpack(weight.words, weight.n_bits, weight.cols).to(dtype).add_(weight.shift).mul_(q)
    factor = quant.scale.reshape(()) * weight.scale / (p * q)
    constant = torch.zeros_like(weight.scale, dtype=torch.float64)
    if quant.offset is not None:
        sums = weight.code_sums.double() + weight.shift * weight.cols
        constant = quant.offset.reshape(()).double() * weight.scale.double() * sums
    if bias is not None:
        constant = constant + bias.double()
    return F.linear(x_levels, w_levels).float().mul_(factor).add_(constant.float())


def packed_linear(
    x: Tensor, weight: PackedMatrix, bias: Tensor | None = None, quant: QuantArgs | None = None
) -> Tensor:  # fmt: skip
    """Return `x_hat @ w_hat.T + bias`, x_hat being x quantized by `quant`, or x itself where that is None.

    Args:
        x: (..., in), float32, bfloat16 or float16; the result (..., out) has its dtype, rounded once from float32.
        weight: of `packed_matrix`.
        bias: float (out,) or None.
        quant: the input's quantizer. With one scale for the whole input the product is exact in integers
            (`integer_definition`), else x_hat is formed in float32 first (`linear_definition`).

    For inference: no gradient is defined. Runs what `backends.choose` says. Raises ValueError where x does not have `in`
    features, ConfigError where DSQ_BACKEND forces a backend that cannot run.
    """
    if x.shape[-1] != weight.cols:
        raise ValueError(f"x has {x.shape[-1]} features, the packed weight {weight.cols}")
    lacking = _beyond_cuda(x, weight, quant)
    native = backends.NATIVE if lacking else (*backends.NATIVE, backends.CUDA)
    operator = "packed_linear" if quant is None else "packed_linear_int"
    return run(backends.choose("packed_linear", x.device.type, native, lacking, operator), x, weight, bias, quant)


def _beyond_cuda(x: Tensor, weight: PackedMatrix, quant: QuantArgs | None) -> str:
    """Name what the kernels in CUDA C++ do not take: those of integers go by bits, those of floats have few rows."""
    if quant is None and x.dtype in (torch.bfloat16, torch.float16):
        if x.numel() > FEW_ROWS * x.shape[-1]:
            return f"inputs of more than {FEW_ROWS} rows"
        if weight.n_bits in (1, 2, 4) and weight.cols * weight.n_bits % 128 == 0:
            return ""
        return f"weights of {weight.n_bits} bits and {weight.cols} columns: rows must fill 16 bytes with 1, 2 or 4 bits"
    if quant is None or not is_integer(weight, quant):
        return f"weights of {weight.n_bits} bits and inputs without one scale for all: they must be integers"
    codes = quant.levels.qmax - quant.levels.qmin + 1
    if weight.n_bits > 2 or codes > 4:
        return f"weights of {weight.n_bits} bits and inputs of {codes} codes: they must have at most 2 bits, 4 codes"
    return ""


def run(backend: str, x: Tensor, weight: PackedMatrix, bias: Tensor | None, quant: QuantArgs | None) -> Tensor:
    """Compute `packed_linear` by one backend that is available, with none chosen for it."""
    if backend != backends.TRITON:  # whose kernels read and write any float dtype
        bias = bias if bias is None or bias.dtype is torch.float32 else bias.float()
    any_dtype = backend == backends.TRITON or (backend == backends.CUDA and quant is None)
    source = x if x.dtype is torch.float32 or any_dtype else x.float()
    plain = backend == backends.TORCH
    if quant is None or not is_integer(weight, quant):
        if quant is not None:
            source = quantize_dequantize(source.float(), quant.scale, quant.offset, quant.levels)
        y = linear_definition(source, weight, bias) if plain else _linear(source, weight, bias, backend)
    elif plain:
        y = integer_definition(source, weight, bias, quant)
    else:
        y = _integer(source, weight, bias, quant, backend)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _linear(x: Tensor, weight: PackedMatrix, bias: Tensor | None, backend: str) -> Tensor:
    multiply = backends.operator("packed_linear", backend, x.device.type)
    isa = backends.isa(backend)
    return multiply(x, weight.words, weight.scale, bias, weight.n_bits, weight.shift, isa)


def _integer(x: Tensor, weight: PackedMatrix, bias: Tensor | None, quant: QuantArgs, backend: str) -> Tensor:
    multiply = backends.operator("packed_linear_int", backend, x.device.type)
    levels, isa = quant.levels, backends.isa(backend)
    return multiply(
        x, weight.words, weight.scale, weight.code_sums, bias, quant.scale, quant.offset, weight.n_bits, weight.shift,
        levels.qmin, levels.qmax, levels.shift, isa,
    )  # fmt: skip


def _fake(x: Tensor, words: Tensor, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


# The schemas are here, their kernels in csrc/ and gpu/, attached when these are loaded: tracing needs no compiler.
_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_INPUT, _GRID = "Tensor x, Tensor words, Tensor scale", "int n_bits, float shift"
for _name in ("packed_linear", "packed_linear_cuda"):
    _LIBRARY.define(f"{_name}({_INPUT}, Tensor? bias, {_GRID}, int isa) -> Tensor")
for _name in ("packed_linear_int", "packed_linear_int_cuda"):
    _LIBRARY.define(
        f"{_name}({_INPUT}, Tensor code_sums, Tensor? bias, Tensor in_scale, Tensor? in_offset, {_GRID}, int qmin, "
        "int qmax, float in_shift, int isa) -> Tensor"
    )
for _name in ("packed_linear", "packed_linear_cuda", "packed_linear_int", "packed_linear_int_cuda"):
    torch.library.register_fake(f"dsquant::{_name}", _fake, lib=_LIBRARY)
