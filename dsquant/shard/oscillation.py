"""Weights that oscillate between bins: an exact tracker for every weight, and iterative freezing.

All state is elementwise on the shard: 6 bytes a weight (codes, last direction, frequency), 5 more where freezing is on.
Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", sections 3 and 4.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.config import FreezeConfig
from dsquant.ops.shard_step import TrackerStep


@dataclass
class TrackerState:
    """Hold what the tracker knows of a run of weights, all of one shape.

    codes: int8, the current integer weights. direction: int8 in {-1, 0, 1}, of the last change. frequency: float32, the moving
    average of oscillations over `TrackerStep.left`, so that most of it stays where it is. code_mean: float32 moving average of
    codes, and frozen: bool, where freezing is on.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    code_mean: Tensor | None = None
    frozen: Tensor | None = None

    @classmethod
    def start(cls, codes: Tensor, freeze: bool) -> "TrackerState":
        """Begin with the first codes, float or int8, and no history."""
        codes8 = codes.to(torch.int8)
        return cls(
            codes8,
            torch.zeros_like(codes8),
            torch.zeros_like(codes, dtype=torch.float32),
            codes.to(torch.float32, copy=True) if freeze else None,
            torch.zeros_like(codes, dtype=torch.bool) if freeze else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def view(self, start: int, shape: tuple[int, int]) -> "TrackerState":
        """Return a 2-D window of a flat state; it shares storage."""
        stop = start + shape[0] * shape[1]
        return TrackerState(**{name: t[start:stop].view(shape) for name, t in self.tensors().items()})


def track(state: TrackerState, codes: Tensor, step: TrackerStep) -> Tensor:
    """Record new codes (int8) and return which weights oscillated, 1 or 0: changed, opposite to their last change.

    o_t = [sign(delta_t) == -last_direction]; f_t = m * o_t + (1 - m) * f_{t-1}, kept as f_t / (1 - m)^k (`TrackerStep`); the
    direction moves only with a change.
    """
    delta = codes.gt(state.codes).to(torch.int8) - codes.lt(state.codes).to(
        torch.int8
    )  # codes may differ by more than 127
    oscillated = delta.mul(state.direction).eq_(-1)
    state.frequency.add_(oscillated.float(), alpha=step.gain)
    state.direction.mul_(1 - delta.abs()).add_(
        delta
    )  # the last change stays where there is none; no mask, masks are slow
    state.codes.copy_(codes)
    if state.code_mean is not None:
        state.code_mean.mul_(1 - step.momentum).add_(codes, alpha=step.momentum)
    return oscillated


def freeze(state: TrackerState, limit: float, qmin: int, qmax: int) -> None:
    """Freeze the weights whose kept frequency exceeds `TrackerStep.limit` at the nearest integer to their mean code."""
    newly = (state.frequency > limit).logical_and_(~state.frozen)
    settled = state.code_mean.round().clamp_(qmin, qmax).to(torch.int8)
    torch.where(newly, settled, state.codes, out=state.codes)
    state.frozen.logical_or_(newly)


def freeze_threshold(config: FreezeConfig, progress: float) -> float | None:
    """Return the threshold at a share of the stage, or None before `start`: a cosine from `first` down to `last`."""
    if not config.enabled or progress < config.start:
        return None
    t = (progress - config.start) / max(1e-12, 1 - config.start)
    return config.last + 0.5 * (config.first - config.last) * (1 + math.cos(math.pi * min(1.0, t)))
