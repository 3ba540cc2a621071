"""The shard step by native passes, tile by tile, where the inner optimizer is AdamW: in a fraction of the passes.

It serves GPUs; on CPU flats with quantized weights take `flat_step.py`, and from here what nothing quantizes and what serves
other optimizers. The definition masks gradients, adds the regularizers' to them, lets the inner optimizer step, and decides
codes. Native code reads the gradients once for the sums, and once more to do all of the first three, without writing them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dsquant.ops import backends, shard_step
from dsquant.shard.regularizers import Regularizer, bin_tables
from dsquant.shard.weight_quantizers import ShardedWeight

VARIANTS = ("amsgrad", "maximize", "capturable", "differentiable")  # of AdamW, that native code does not have


def can_step(inner: torch.optim.Optimizer, flats: list[Tensor]) -> bool:
    """Say whether native code can take the inner optimizer's step of these flats."""
    devices = {flat.device.type for flat in flats}
    return (
        type(inner) is torch.optim.AdamW
        and all(group["fused"] for group in inner.param_groups)  # others round elsewhere
        and not any(group[name] for group in inner.param_groups for name in VARIANTS)
        and all(flat.grad.dtype is torch.float32 for flat in flats)
        and all(backends.choose("shard_step", device) != backends.TORCH for device in devices)
    )


def next_step(inner: torch.optim.AdamW, flat: Tensor, group: dict) -> tuple[dict, shard_step.AdamWStep]:
    """Count a step of a flat; return its state, as AdamW itself would have begun it, and the numbers of the step."""
    state = inner.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    state["step"] = state["step"].cpu() + 1  # the host needs it; torch's own fused step keeps it on the device
    count = int(state["step"].numpy())
    return state, shard_step.AdamWStep(float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], count)


def gathered(weight: ShardedWeight, spread: bool) -> tuple[Tensor, Tensor]:
    """Return this rank's sums, as `ShardQuantization._gather_sums` defines them; the gradient stays as it is."""
    size, plain = weight.n_groups * weight.n_bins, weight.levels.elastic or not weight.learned
    groups = torch.zeros(2, weight.n_groups, dtype=torch.float64, device=weight.device)
    bins = torch.zeros(2, size if spread else 0, dtype=torch.float64, device=weight.device)
    if not (weight.learned or spread):  # a statistic needs no gradient of its scale
        return groups, bins
    gradient, scales = weight.gradient, weight.scales()
    for tile in weight.tiles:
        state = weight.tracked(tile)
        histogram = bins if spread else None
        shard_step.gather(
            weight.view(tile, scales), tile.run_of(gradient), state.codes, state.frozen, plain, groups, histogram
        )
    return groups, bins


def write_image(weight: ShardedWeight, latent: Tensor, momentum: float, threshold: float | None) -> None:
    """Keep this rank's part of a weight in `latent`, put its image in its place, and record a step of the tracker."""
    scales = weight.scales()
    for tile in weight.tiles:
        shard_step.image(
            weight.view(tile, scales), tile.run_of(latent), **vars(weight.tracked(tile)), momentum=momentum,
            threshold=threshold,
        )  # fmt: skip


@dataclass
class Prepared:
    """Hold what the gradient of a weight is formed with: the scale of the image that the forward pass used, and OBR's part."""

    scale: Tensor
    pull: float
    tables: tuple[Tensor, Tensor] | None
    norms: Tensor | None


class NativeStep:
    """Take one step of an AdamW, with the gradients of quantized weights formed on the way."""

    def __init__(self, inner: torch.optim.AdamW):
        self.inner = inner
        self._prepared: dict[str, Prepared] = {}

    def prepare(self, weights: list[ShardedWeight], bins: list[Tensor], regularizer: Regularizer) -> None:
        """Note the weights' scales before they are stepped, and their regularizers; `bins` of each are over all shards."""
        mine = [(weight, held) for weight, held in zip(weights, bins, strict=True) if weight.fragment is not None]
        if not mine:
            return
        device = mine[0][0].device
        scales = torch.cat([w.replicated_scale for w, _ in mine]).to(device).split([w.n_groups for w, _ in mine])
        tables = self._tables(mine, regularizer, device)
        for (weight, _), scale in zip(mine, scales, strict=True):
            name, pull = weight.site.name, regularizer.pull(weight)
            norms = regularizer.new_norms(weight) if pull or name in tables else None
            self._prepared[name] = Prepared(scale, pull, tables.get(name), norms)

    def _tables(
        self, mine: list[tuple[ShardedWeight, Tensor]], regularizer: Regularizer, device: torch.device
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `bin_tables` of the weights that OBR has a variance term for, by name; its factor is the same for all."""
        spread = [(weight, held) for weight, held in mine if regularizer.spread(weight)]
        if not spread:
            return {}
        together = torch.cat([held for _, held in spread], dim=1).to(device)
        sizes = [held.shape[1] for _, held in spread]
        mean, factor = (t.split(sizes) for t in bin_tables(together, regularizer.spread(spread[0][0])))
        return {w.site.name: (mean[i], factor[i]) for i, (w, _) in enumerate(spread)}

    @torch.no_grad()
    def step(self, weights: Mapping[int, list[ShardedWeight]] = MappingProxyType({})) -> None:
        """Step every flat that has a gradient; `weights` are the quantized ones in it, by its id.

        Float stages step so, too: torch's code rounds the last elements of a tensor otherwise, so that ZeRO stages, which
        cut tensors in different places, would part.
        """
        for group in self.inner.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_flat(flat, group, [w for w in weights.get(id(flat), []) if w.fragment is not None])

    def _step_flat(self, flat: Tensor, group: dict, weights: list[ShardedWeight]) -> None:
        state, numbers = next_step(self.inner, flat, group)
        parts = [part.view(-1) for part in (flat.data, flat.grad, state["exp_avg"], state["exp_avg_sq"])]
        done = 0
        for weight in sorted(weights, key=lambda w: w.fragment.start):
            self._between(parts, done, weight.fragment.start, numbers)
            self._step_weight(weight, parts, numbers)
            done = weight.fragment.start + weight.fragment.numel
        self._between(parts, done, flat.numel(), numbers)

    def _between(self, parts: list[Tensor], start: int, stop: int, numbers: shard_step.AdamWStep) -> None:
        if start < stop:
            backend = backends.choose("shard_step", parts[0].device.type)
            shard_step.adamw(*(part[start:stop] for part in parts), numbers, backend)

    def _step_weight(self, weight: ShardedWeight, parts: list[Tensor], numbers: shard_step.AdamWStep) -> None:
        known = self._prepared[weight.site.name]
        _, *beside = (weight.fragment.of(part) for part in parts)
        for tile in weight.tiles:
            state = weight.tracked(tile)
            shard_step.update(
                weight.view(tile, known.scale), *(tile.run_of(part) for part in beside), state.codes, state.frozen,
                known.pull, known.tables, numbers, known.norms,
            )  # fmt: skip
