"""The step of weight scales, all of them at once, from sums over all shards: those that are learned, and statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.ops.shard_step import ScaleAdam
from dsquant.quant.modules import lsq_grad_scale, mdq_grad_scale
from dsquant.quant.state import ADAM_EPS, SCALE_FLOOR, QuantState
from dsquant.shard.weight_quantizers import ShardedWeight, half_of, statistic_scale


@dataclass(frozen=True)
class _Part:
    """Say which columns of sums over all groups are of some of them (None: all), and where their scales lie in the state."""

    columns: Tensor | None
    where: slice | Tensor

    @classmethod
    def of(cls, state: QuantState, weights: list[ShardedWeight], wanted: Tensor) -> "_Part":
        """Take the groups that are `wanted`, bool (groups of all weights,)."""
        if bool(wanted.all()):
            return cls(None, places(state, weights, "scale"))
        entries = [state.entries[f"{w.site.name}:scale"] for w in weights]
        every = torch.cat([torch.arange(e.start, e.start + e.numel) for e in entries])
        device = state.values.device
        return cls(wanted.nonzero().view(-1).to(device), every[wanted].to(device))

    def columns_of(self, sums: Tensor) -> Tensor:
        return sums if self.columns is None else sums[:, self.columns]


@dataclass(frozen=True)
class ScalePlan:
    """Say which groups `ScaleStep` steps, with the factors of their gradients, and which native code has stepped."""

    n_groups: int
    part: _Part
    factor: Tensor
    taken: _Part | None


class ScaleStep:
    """Step the learned scales of weights in a QuantState.

    Args:
        state: scales and their optimizer.
        grad_scale: lsq, mdq or none: the factor on a scale's gradient.
        betas: of the Adam that steps the scales.
    """

    def __init__(self, state: QuantState, grad_scale: str, betas: tuple[float, float]):
        self.state, self.grad_scale, self.betas = state, grad_scale, betas

    def adam(self, lr_factor: float) -> ScaleAdam:
        """Return the numbers by which native code takes the present step."""
        return ScaleAdam(lr_factor, *self.betas, ADAM_EPS, SCALE_FLOOR, self.state.step_count)

    def step(self, plan: ScalePlan, sums: Tensor, lr_factor: float) -> None:
        """Step by float64 `sums` (2, groups of all weights): d scale and |w|_1, over all shards.

        Of groups that native code has stepped by `adam`, they are the next scale and its moments, (3, groups).
        """
        sums, factor, taken = sums.view(-1, plan.n_groups), plan.factor, plan.taken
        if taken is not None:
            tensors = self.state.values, self.state.exp_avg, self.state.exp_avg_sq
            for tensor, row in zip(tensors, taken.columns_of(sums), strict=True):
                if isinstance(taken.where, slice):
                    tensor[taken.where].copy_(row)
                else:
                    tensor[taken.where] = row.float()
        if factor.numel():
            d_scale, norm = plan.part.columns_of(sums[:2])
            if self.grad_scale == "mdq":
                factor = mdq_grad_scale(norm, factor)
            self.state.grads[plan.part.where] = (d_scale * factor).float()
            self.state.update(plan.part.where, lr_factor, self.betas)

    def plan(self, weights: list[ShardedWeight], stepped: Tensor | None = None) -> ScalePlan:
        """Return how to step the scales of some weights, of which native code has stepped some groups: bool (groups,)."""
        groups = torch.tensor([w.n_groups for w in weights], dtype=torch.int64)
        learned = torch.tensor([w.learned for w in weights], dtype=torch.bool).repeat_interleave(groups)
        factor = torch.tensor([self.factor(w) for w in weights], dtype=torch.float64).repeat_interleave(groups)
        ours = learned if stepped is None else learned & ~stepped
        taken = None if stepped is None or not bool(stepped.any()) else _Part.of(self.state, weights, stepped)
        device = self.state.values.device
        return ScalePlan(len(ours), _Part.of(self.state, weights, ours), factor[ours].to(device), taken)

    def factor(self, weight: ShardedWeight) -> float:
        """Return the factor of the gradient of a weight's scales, or what mdq's follows from: qmax."""
        per_group, qmax = weight.site.numel // weight.n_groups, weight.site.spec.grad_qmax
        if self.grad_scale == "mdq":
            return float(max(1, qmax))
        return lsq_grad_scale(per_group, qmax) if self.grad_scale == "lsq" else 1.0


class StatisticStep:
    """Set the scales and centres in a QuantState that are statistics of the latents."""

    def __init__(self, state: QuantState):
        self.state = state
        self._known: dict[tuple[str, ...], tuple[Tensor, ...]] = {}

    def step(self, weights: list[ShardedWeight], sums: Tensor) -> None:
        """Set those of weights by float64 `sums` (groups of all weights, 3) of |w|, w and w^2, over all shards."""
        key = tuple(w.site.name for w in weights)
        if key not in self._known:
            self._known[key] = self._places_of(weights)
        size, half, scales, centred, centres = self._known[key]
        mean_abs, mean, _ = (sums / size).unbind(1)
        self.state.values[scales] = statistic_scale(mean_abs, half).float().clamp(min=SCALE_FLOOR)
        if len(centred):
            self.state.values[centres] = mean[centred].float()

    def _places_of(self, weights: list[ShardedWeight]) -> tuple[Tensor | slice, ...]:
        """Return elements a group (groups, 1), half its levels, where scales lie; which groups have centres, and where."""
        device, groups = self.state.values.device, torch.tensor([w.n_groups for w in weights])
        with_centre = [w for w in weights if w.replicated_centre is not None]

        def of_groups(values: list[int | bool]) -> Tensor:
            return torch.tensor(values).repeat_interleave(groups).to(device)

        size = of_groups([w.site.numel // w.n_groups for w in weights])
        centred = of_groups([w.replicated_centre is not None for w in weights]).nonzero().view(-1)
        half, state = of_groups([half_of(w) for w in weights]), self.state
        return size[:, None], half, places(state, weights, "scale"), centred, places(state, with_centre, "centre")


def places(state: QuantState, weights: list[ShardedWeight], role: str) -> slice | Tensor:
    """Return where the values of a role of some weights lie: in one slice, which takes no look-up, or as an index."""
    found = torch.zeros(0, dtype=torch.int64)
    for weight in weights:
        entry = state.entries[f"{weight.site.name}:{role}"]
        found = torch.cat([found, torch.arange(entry.start, entry.start + entry.numel)])
    if len(found) and bool((found.diff() == 1).all()):
        return slice(int(found[0]), int(found[-1]) + 1)
    return found.to(state.values.device)
