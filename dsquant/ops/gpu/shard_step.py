"""What Triton kernels of the shard step are made of, and AdamW alone; arithmetic is in the order of `csrc/shard_step_runs.h`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsquant.ops.gpu.fake_quantize import TILE, clip, round_half_even
from dsquant.ops.gpu.launch import launch

WIDE = {"num_warps": 8}  # of kernels that hold many values of an element at a time


@triton.jit
def adamw_step(w, g, m, v, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step):
    """Return w, m and v after a step of AdamW, rounded where torch's fused one on CPU rounds."""
    m = tl.math.fma(one_minus_beta1 + tl.zeros_like(m), g - m, m)
    v = tl.math.fma(one_minus_beta2 * g, g, v * beta2)
    root = tl.math.div_rn(tl.math.sqrt_rn(v), correction + tl.zeros_like(v)) + eps
    return w * decay + tl.math.div_rn(-step * m, root), m, v


@triton.jit
def _adamw(w, grad, exp_avg, exp_avg_sq, numel, decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step,
           BLOCK: tl.constexpr):  # fmt: skip
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = where < numel
    stepped, m, v = adamw_step(
        tl.load(w + where, mask=there, other=0.0), tl.load(grad + where, mask=there, other=0.0),
        tl.load(exp_avg + where, mask=there, other=0.0), tl.load(exp_avg_sq + where, mask=there, other=0.0), decay,
        one_minus_beta1, beta2, one_minus_beta2, correction, eps, step,
    )  # fmt: skip
    tl.store(w + where, stepped, mask=there)
    tl.store(exp_avg + where, m, mask=there)
    tl.store(exp_avg_sq + where, v, mask=there)


@triton.jit
def show(kept, x, s, codes, direction, frequency, code_mean, frozen, state, where, there, qmin, qmax, shift, momentum, keep,
         gain, threshold, FREEZES: tl.constexpr):  # fmt: skip
    """Return the latents, which freezing may move, and their image, and record the new codes in the tracker at `state`.

    kept and x are the latents and what they are less the centre of their group; where and there lie beside them. Few codes
    change in a step: of the others the tracker is neither read nor written.
    """
    code = round_half_even(clip(tl.math.div_rn(x, s + tl.zeros_like(x)) - shift, qmin, qmax))
    before = tl.load(codes + state + where, mask=there, other=0).to(tl.float32)
    if FREEZES:
        still = tl.load(frozen + state + where, mask=there, other=0) != 0
        code = tl.where(still, before, code)
        kept = tl.where(still, (code + shift) * s, kept)
    delta = (code > before).to(tl.int8) - (code < before).to(tl.int8)
    changed = there & (delta != 0)
    last = tl.load(direction + state + where, mask=changed, other=0)
    tl.store(direction + state + where, delta, mask=changed)
    turned = changed & (delta * last == -1)
    often = tl.load(frequency + state + where, mask=there if FREEZES else turned, other=0.0)
    often = tl.where(turned, often + gain, often)
    tl.store(frequency + state + where, often, mask=turned)
    if FREEZES:
        mean = tl.load(code_mean + state + where, mask=there, other=0.0) * keep
        mean = tl.math.fma(code, momentum + tl.zeros_like(code), mean)
        tl.store(code_mean + state + where, mean, mask=there)
        newly = (often > threshold) & (threshold >= 0) & (still == 0)
        code = tl.where(newly, clip(round_half_even(mean), qmin, qmax), code)
        kept = tl.where(newly, (code + shift) * s, kept)
        tl.store(frozen + state + where, still | newly, mask=there)
        changed = there & (code != before)
    tl.store(codes + state + where, code.to(tl.int8), mask=changed)
    return kept, (code + shift) * s


def adamw_numbers(
    decay: float, beta1: float, beta2: float, correction: float, eps: float, step: float
) -> dict[str, float]:
    return {"decay": decay, "one_minus_beta1": 1 - beta1, "beta2": beta2, "one_minus_beta2": 1 - beta2,
            "correction": correction, "eps": eps, "step": step}  # fmt: skip


def shard_adamw(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: float, beta1: float, beta2: float,
    correction: float, eps: float, step: float, isa: int = 0,
) -> None:  # fmt: skip
    """Step float32 values that nothing quantizes."""
    launch(
        _adamw, (triton.cdiv(w.numel(), TILE),), WIDE, w=w, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, numel=w.numel(),
        **adamw_numbers(decay, beta1, beta2, correction, eps, step), BLOCK=TILE,
    )  # fmt: skip


OPERATORS = (shard_adamw,)


def samples() -> None:
    """Launch the kernel."""
    w, grad, m, v = torch.zeros(4, 192 * 192)
    shard_adamw(w, grad, m, v, 0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
