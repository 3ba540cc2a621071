"""The step of learned weight scales, all of them at once, from sums over all shards."""

import torch
from torch import Tensor

from dsquant.quant.modules import lsq_grad_scale, mdq_grad_scale
from dsquant.quant.state import QuantState
from dsquant.shard.weight_quantizers import ShardedWeight


class ScaleStep:
    """Step the learned scales of weights in a QuantState.

    Args:
        state: scales and their optimizer.
        grad_scale: lsq, mdq or none: the factor on a scale's gradient.
        betas: of the Adam that steps the scales.
    """

    def __init__(self, state: QuantState, grad_scale: str, betas: tuple[float, float]):
        self.state, self.grad_scale, self.betas = state, grad_scale, betas
        self._known: dict[tuple[str, ...], tuple[Tensor | None, slice | Tensor, Tensor]] = {}

    def step(self, weights: list[ShardedWeight], sums: Tensor, lr_factor: float) -> None:
        """Step by float64 `sums` (2, groups of all weights): d scale and |w|_1, over all shards."""
        key = tuple(w.site.name for w in weights)
        if key not in self._known:
            self._known[key] = self._learned_among(weights)
        columns, where, factor = self._known[key]
        if not factor.numel():
            return
        d_scale, norm = sums if columns is None else sums[:, columns]
        if self.grad_scale == "mdq":
            factor = mdq_grad_scale(norm, factor)
        self.state.grads[where] = (d_scale * factor).float()
        self.state.update(where, lr_factor, self.betas)

    def _learned_among(self, weights: list[ShardedWeight]) -> tuple[Tensor | None, slice | Tensor, Tensor]:
        """Return which columns of the sums are of learned scales (None: all), where these lie, and their gradients' factors."""
        device, learned = self.state.values.device, [w for w in weights if w.learned]
        where, factor = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        for weight in learned:
            entry = self.state.entries[f"{weight.site.name}:scale"]
            where = torch.cat([where, torch.arange(entry.start, entry.start + entry.numel)])
            factor = torch.cat([factor, torch.full((entry.numel,), self._factor(weight), dtype=torch.float64)])
        columns = torch.cat([torch.full((w.n_groups,), w.learned) for w in weights]).nonzero().view(-1)
        all_of_them = None if len(learned) == len(weights) else columns.to(device)
        if learned and bool((where.diff() == 1).all()):  # a slice is read and written without a look-up
            return all_of_them, slice(int(where[0]), int(where[-1]) + 1), factor.to(device)
        return all_of_them, where.to(device), factor.to(device)

    def _factor(self, weight: ShardedWeight) -> float:
        """Return the factor of the gradient of a weight's scales, or what mdq's follows from: qmax."""
        per_group, qmax = weight.site.numel // weight.n_groups, weight.site.spec.grad_qmax
        if self.grad_scale == "mdq":
            return float(max(1, qmax))
        return lsq_grad_scale(per_group, qmax) if self.grad_scale == "lsq" else 1.0
