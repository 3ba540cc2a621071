"""The forward of a linear layer in training on int8 tensor cores: a weight that is an image is read back as its codes.

Reading them costs a pass over the weight, which is small beside a batch of activations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import clip, divisor, pieces, quotient, round_half_even
from dsquant.ops.gpu.int8_product import InputGrid, multiply, quantize_rows, quantizing
from dsquant.ops.gpu.launch import interpreted, launch


@triton.jit
def _image_codes(program, image, image_scale, codes, code_sums, scale, outs, cols, rows_a_scale, shift, least, most,
                 TOLERANCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Write the codes of rows of an image, their sums, and scales: NaN where a value is no level, which the product shows."""
    n = program * BLOCK_M + tl.arange(0, BLOCK_M)
    line = n.to(tl.int64)[:, None] * cols
    s = tl.load(image_scale + n // rows_a_scale, mask=n < outs, other=1.0)[:, None]
    by = divisor(s)
    total, wrong = tl.zeros((BLOCK_M, BLOCK_K), tl.int32), tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for first in range(0, cols, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = (n < outs)[:, None] & (k < cols)[None, :]
        w = tl.load(image + line + k[None, :], mask=there, other=0.0).to(tl.float32)
        v = quotient(w, by) - shift
        level = round_half_even(clip(tl.where(v == v, v, 0.0), least, most))  # a NaN has no integer
        right = tl.abs((level + shift) * s - w) <= TOLERANCE * tl.abs(w)
        code = tl.where(there, level.to(tl.int32), 0)
        tl.store(codes + line + k[None, :], code.to(tl.int8), mask=there)
        total += code
        wrong |= (~right & there).to(tl.int32)
    tl.store(code_sums + n, tl.sum(total, axis=1), mask=n < outs)
    s = tl.load(image_scale + n // rows_a_scale, mask=n < outs, other=1.0)
    tl.store(scale + n, tl.where(tl.max(wrong, axis=1) > 0, float("nan"), s), mask=n < outs)


@triton.jit
def _both_codes(image, image_scale, codes, code_sums, scale, outs, rows_a_scale, shift, least, most, x, x_codes, of_rows, rows,
                cols, in_scale, in_offset, qmin, qmax, in_shift, zero, TOLERANCE: tl.constexpr, WHOLE: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Quantize rows of x, and after them read rows of an image."""
    of_x = tl.cdiv(rows, BLOCK_M)
    if tl.program_id(0) < of_x:
        quantize_rows(tl.program_id(0), x, x_codes, of_rows, rows, cols, in_scale, in_offset, qmin, qmax, in_shift, zero, WHOLE,
                      BLOCK_M, BLOCK_K)  # fmt: skip
    else:
        _image_codes(tl.program_id(0) - of_x, image, image_scale, codes, code_sums, scale, outs, cols, rows_a_scale, shift,
                     least, most, TOLERANCE, BLOCK_M, BLOCK_K)  # fmt: skip


def image_linear_int(
    x: Tensor, image: Tensor, image_scale: Tensor, bias: Tensor | None, in_scale: Tensor, in_offset: Tensor | None,
    shift: float, least: int, most: int, qmin: int, qmax: int, in_shift: float, isa: int = 0,
) -> Tensor:  # fmt: skip
    """Return the product of quantized x (..., in) and an image (out, in), float32 or bfloat16 both, rounded once to that dtype.

    `image_scale` holds scales of as many rows each. Outputs of a row of the weight that is no image are NaN: an error would
    have to wait for the GPU.
    """
    dtype, (outs, cols) = x.dtype, image.shape
    # A value of an image that was rounded to few digits is within half a unit of the last of its level.
    tolerance = 0.0 if image.dtype is torch.float32 else torch.finfo(image.dtype).eps / 2
    if dtype is torch.bfloat16 and interpreted():
        x = x.float()  # the interpreter does not round bfloat16 as a GPU does
    y = x.new_empty((*x.shape[:-1], outs))
    if not y.numel():
        return y.to(dtype)
    codes = torch.empty(outs, cols, dtype=torch.int8, device=x.device)
    code_sums = torch.empty(outs, dtype=torch.int32, device=x.device)
    scale = torch.empty(outs, dtype=torch.float32, device=x.device)
    grid = InputGrid.of(in_scale, in_offset, qmin, qmax, in_shift)
    programs, told = quantizing(x.contiguous(), y.numel() // outs, grid)
    launch(
        _both_codes, (programs + pieces(outs, told["BLOCK_M"]),), image=image.contiguous(), image_scale=image_scale,
        codes=codes, code_sums=code_sums, scale=scale, outs=outs, rows_a_scale=outs // image_scale.numel(), shift=float(shift),
        least=float(least), most=float(most), TOLERANCE=tolerance, **told,
    )  # fmt: skip
    multiply(told, y, grid, codes, scale, code_sums, bias, shift, max(abs(least + shift), abs(most + shift)))
    return y.to(dtype)


OPERATORS = (image_linear_int,)


def samples() -> None:
    """Launch each kernel in the kinds that differ once compiled."""
    one = torch.ones(1)
    for dtype in (torch.float32, torch.bfloat16):
        x, image, bias = (
            torch.zeros(197, 768, dtype=dtype),
            torch.zeros(768, 768, dtype=dtype),
            torch.zeros(768, dtype=dtype),
        )
        image_linear_int(x, image, one, bias, one, one, 0.0, -2, 1, 0, 3, 0.0)
        image_linear_int(x, image, torch.ones(768), None, one, None, 0.5, -2, 1, -1, 0, 0.5)
