"""The step of weight scales, all of them at once, from sums over all shards: those that are learned, and statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.shard_step import ScaleAdam, scales
from dsquant.quant.modules import lsq_grad_scale, mdq_grad_scale
from dsquant.quant.state import ADAM_EPS, SCALE_FLOOR, QuantState
from dsquant.shard.weight_quantizers import ShardedWeight, half_of, statistic_scale


@dataclass(frozen=True)
class ScalePlan:
    """Say which groups of some weights `ScaleStep` steps: where their scales lie, and the factors of their gradients.

    `columns` are theirs in sums over all groups, None for all; `before` has room for the scales before a step, and `grads` are
    theirs in the state, where they lie in one slice. `backend` steps them.
    """

    columns: Tensor | None
    where: slice | Tensor
    factor: Tensor
    before: Tensor
    grads: Tensor | None
    backend: str


class ScaleStep:
    """Step the learned scales of weights in a QuantState, by the gradients that the step before found.

    Those of a step are known once it has read every weight, over all ranks; to wait for them would take another pass over the
    shards, and all ranks would wait for each other in the middle of every step. A first step leaves scales where they are.

    Args:
        state: scales and their optimizer.
        grad_scale: lsq, mdq or none: the factor on a scale's gradient.
        betas: of the Adam that steps the scales.
    """

    def __init__(self, state: QuantState, grad_scale: str, betas: tuple[float, float]):
        self.state, self.grad_scale, self.betas = state, grad_scale, betas

    def step(self, plan: ScalePlan, lr_factor: float) -> None:
        """Step scales by the gradients that were kept; `plan.before` holds them as they were."""
        if not plan.factor.numel():
            return
        state = self.state
        if plan.backend in backends.ON_CPU and isinstance(plan.where, slice) and state.optimizer == "adam":
            adam = ScaleAdam(lr_factor, *self.betas, ADAM_EPS, SCALE_FLOOR, state.step_count)
            parts = (state.values, state.exp_avg, state.exp_avg_sq, state.grads, state.lr)
            scales(*parts, plan.before, plan.where.start, adam, plan.backend)
            return
        plan.before.copy_(state.values[plan.where])
        state.update(plan.where, lr_factor, self.betas)

    def keep(self, plan: ScalePlan, sums: Tensor, with_factor: bool = False) -> None:
        """Keep gradients for the next step, from float64 `sums` (k, groups of all weights) over all shards: d scale, and for mdq
        |w|_1. `with_factor`: the former are times their factors, where these follow from no sums.
        """
        if not plan.factor.numel():
            return
        sums = sums if plan.columns is None else sums[:, plan.columns]
        found = sums[0]
        if self.grad_scale == "mdq":
            found = found * mdq_grad_scale(sums[1], plan.factor)
        elif not with_factor:
            found = found * plan.factor
        if plan.grads is not None:
            plan.grads.copy_(found)
        else:
            self.state.grads[plan.where] = found.float()

    def plan(self, weights: list[ShardedWeight]) -> ScalePlan:
        """Return how to step the scales of some weights."""
        groups = torch.tensor([w.n_groups for w in weights], dtype=torch.int64)
        learned = torch.tensor([w.learned for w in weights], dtype=torch.bool).repeat_interleave(groups)
        factor = torch.tensor([self.factor(w) for w in weights], dtype=torch.float64).repeat_interleave(groups)
        device = self.state.values.device
        columns = None if bool(learned.all()) else learned.nonzero().view(-1).to(device)
        where = places(self.state, [w for w in weights if w.learned], "scale")
        factor = factor[learned].to(device)
        grads = self.state.grads[where] if isinstance(where, slice) else None
        backend = backends.choose("shard_step", device.type)
        return ScalePlan(columns, where, factor, torch.empty_like(factor, dtype=torch.float32), grads, backend)

    def known_factor(self, weight: ShardedWeight) -> float:
        """Return the factor of the gradient of a weight's scales, or 1 where it follows from sums."""
        return 1.0 if self.grad_scale == "mdq" else self.factor(weight)

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
