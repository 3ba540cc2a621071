"""The shard step: weights are quantized once per optimizer step, on the rank that owns them.

before the inner step   straight-through mask, scale gradients, bin sums -> one all-reduce -> regularizer, scale step
inner step              any torch optimizer, on the latent fp32 shards
after the inner step    new codes, oscillation statistics, image left in the shard for ZeRO to gather
after engine.step()     latents put back: between steps DeepSpeed's tensors are what DeepSpeed expects
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dsquant.config import QuantConfig
from dsquant.errors import ShardError
from dsquant.quant.modules import lsq_grad_scale
from dsquant.quant.state import SCALE_FLOOR, QuantState
from dsquant.shard.fragments import ShardMap
from dsquant.shard.oscillation import TrackerState, freeze, freeze_threshold, track
from dsquant.shard.regularizers import add_obr_gradient, bin_index, bin_sums, obr_weight
from dsquant.shard.weight_quantizers import ShardedWeight, mse_scales
from dsquant.spec import WeightSite


class ShardOptimizer(torch.optim.Optimizer):
    """Wrap any torch optimizer so that its step quantizes weights, once `quantization` is attached.

    DeepSpeed reads and writes `param_groups` and `state`; both are the inner optimizer's own.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        self.defaults = inner.defaults
        self.quantization: ShardQuantization | None = None

    @property
    def param_groups(self):
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self.inner.param_groups = groups

    @property
    def state(self):
        return self.inner.state

    @state.setter
    def state(self, state):
        self.inner.state = state

    def step(self, closure=None):
        """Step the flats that DeepSpeed has put into `param_groups`; called once or once a group in each engine step."""
        if closure is not None:
            raise ShardError("sharded quantization takes no closure")
        flats = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.quantization is not None:
            self.quantization.before_inner_step(flats)
        self.inner.step()
        if self.quantization is not None:
            self.quantization.after_inner_step(flats)

    def zero_grad(self, set_to_none: bool = True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)

    def __repr__(self):
        return f"ShardOptimizer({self.inner!r})"


class ShardQuantization:
    """Quantize the weights of a model on this rank's shards.

    Args:
        shards: where the masters are.
        sites: the weights to quantize, the same list on every rank.
        state: scales, offsets and their optimizer.
        config: learning rates, regularizer, tracker.
        betas: of the Adam that steps the scales.
    """

    def __init__(
        self, shards: ShardMap, sites: list[WeightSite], state: QuantState, config: QuantConfig,
        betas: tuple[float, float] = (0.9, 0.999),
    ):  # fmt: skip
        self.shards, self.state, self.config, self.betas = shards, state, config, betas
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.contributes = not shards.replicated or not dist.is_initialized() or dist.get_rank() == 0
        by_name = {site.name: site for site in sites}
        self.weights: dict[str, ShardedWeight] = {}
        self._in_flat: dict[int, list[ShardedWeight]] = {}
        for flat, fragments, members in zip(shards.flats, shards.fragments, shards.members, strict=True):
            mine = {f.name: f for f in fragments}
            found = [
                ShardedWeight(by_name[name], state.get(name), mine.get(name)) for name in members if name in by_name
            ]
            self._in_flat[id(flat)] = found
            self.weights.update((w.site.name, w) for w in found)
        if missing := [site.name for site in sites if site.name not in self.weights]:
            raise ShardError(f"{missing[0]} is to be quantized and no optimizer steps it (is it frozen?)")
        self._latents: dict[str, Tensor] = {}
        self._lr_factor, self._obr_weight, self._threshold = 1.0, 0.0, None
        self._activations_pending = False

    @torch.no_grad()
    def initialize_scales(self) -> None:
        """Set every weight scale to its MSE optimum over all shards."""
        weights = list(self.weights.values())
        for weight, scale in zip(weights, mse_scales(weights, self._sum, self._max, SCALE_FLOOR), strict=True):
            weight.replicated_scale.copy_(scale)

    @torch.no_grad()
    def start(self) -> None:
        """Begin tracking from the codes of the present latents and scales, and publish the first images."""
        for weight in self.weights.values():
            if weight.fragment is not None:
                codes = torch.empty(weight.fragment.numel, device=weight.device)
                for tile in weight.tiles:
                    scale = weight.scales()[tile.groups].unsqueeze(1)
                    tile.of(codes).copy_(weight.image_tile(tile, tile.of(self.latent(weight)), scale)[0])
                weight.tracker = TrackerState.start(codes, self.config.oscillation.freeze.enabled)
        self.publish()

    def resume(self, trackers: dict[str, dict[str, Tensor]]) -> None:
        """Go on from restored latents (in the flats), scales and tracker tensors (by weight name), and publish images."""
        self._latents.clear()
        for name, tensors in trackers.items():
            weight = self.weights[name]
            weight.tracker = TrackerState(**{part: t.to(weight.device) for part, t in tensors.items()})
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the images of all weights into the model's parameters, as the end of a step does."""
        for weight in self.weights.values():
            self._write_image(weight, record=False)
        self.shards.publish()
        self.finish_step()

    def begin_step(self, progress: float, lr_factor: float) -> None:
        """Fix what this optimizer step needs: `progress` through the stage in [0, 1], and the schedule's lr factor."""
        self._obr_weight = obr_weight(self.config.obr, progress)
        self._threshold = freeze_threshold(self.config.oscillation.freeze, progress)
        self._lr_factor = lr_factor
        self._activations_pending = True

    @torch.no_grad()
    def finish_step(self) -> None:
        """Put the latents back into the flats, after DeepSpeed has gathered the images."""
        if not self.shards.in_place:
            for name, latent in self._latents.items():
                self.weights[name].fragment.values.copy_(latent)
            self._latents.clear()

    def latent(self, weight: ShardedWeight) -> Tensor:
        """Return the latent of this rank's fragment, 1-D float32, wherever it is kept at the moment."""
        kept = self._latents.get(weight.site.name)
        return weight.fragment.values if kept is None else kept

    @torch.no_grad()
    def before_inner_step(self, flats: list[Tensor]) -> None:
        """Turn the gradients of the images in `flat.grad` into those of the latents, and step the scales."""
        weights = [w for flat in flats for w in self._in_flat[id(flat)]]
        if self.shards.in_place:
            for weight in weights:
                weight.fragment.values.copy_(self.latent(weight))
        sums = [self._gather_sums(weight) for weight in weights]
        payload = [torch.cat([s.view(-1) for s in pair]) for pair in sums]
        with_activations = self._activations_pending
        if with_activations:
            self.state.begin_step()
            payload.append(self.state.take_activation_grads(self.world_size))
        if not payload:
            return
        reduced = self._sum(torch.cat(payload)).split([p.numel() for p in payload])
        if with_activations:
            self.state.grads[: self.state.n_activation] = reduced[-1].float()
            self.state.update(slice(0, self.state.n_activation), self._lr_factor, self.betas)
            self._activations_pending = False
        for weight, total in zip(weights, reduced, strict=False):
            d_scale, bins = total[: weight.n_groups], total[weight.n_groups :]
            if bins.numel():
                self._regularize(weight, bins.view(2, -1))
            self._step_scale(weight, d_scale)

    def _gather_sums(self, weight: ShardedWeight) -> tuple[Tensor, Tensor]:
        """Mask this rank's gradient and return float64 sums: d scale (n_groups,), bins (2, n_groups * n_bins) or (2, 0)."""
        regularized, device = self._is_regularized(weight), self.state.values.device
        size = weight.n_groups * weight.n_bins
        bins = torch.zeros(2, size if regularized else 0, dtype=torch.float64, device=device)
        d_scale = torch.zeros(weight.n_groups, dtype=torch.float64, device=device)
        if weight.fragment is None:
            return d_scale, bins
        scales = weight.scales()
        grad_flat = weight.fragment.of(weight.fragment.flat.grad)
        for tile in weight.tiles:
            scale, w = scales[tile.groups].unsqueeze(1), tile.of(weight.fragment.values)
            rows = weight.lsq_tile(tile, w, tile.of(grad_flat), scale)
            d_scale.index_add_(0, tile.groups.to(device), rows.to(device))
            if regularized:
                index = bin_index(tile.of(weight.tracker.codes), tile.groups, weight.qmin, weight.n_bins)
                clipped = torch.clamp(w, weight.qmin * scale, weight.qmax * scale)
                bins += bin_sums(clipped, index, size).to(device)
        return (d_scale, bins) if self.contributes else (torch.zeros_like(d_scale), torch.zeros_like(bins))

    def _is_regularized(self, weight: ShardedWeight) -> bool:
        return self._obr_weight > 0 and weight.site.spec.n_bits <= self.config.obr.max_bits

    def _regularize(self, weight: ShardedWeight, bins: Tensor) -> None:
        if weight.fragment is None:
            return
        scales, bins = weight.scales(), bins.to(weight.device)
        grad_flat = weight.fragment.of(weight.fragment.flat.grad)
        for tile in weight.tiles:
            scale, w = scales[tile.groups].unsqueeze(1), tile.of(weight.fragment.values)
            codes = tile.of(weight.tracker.codes)
            index = bin_index(codes, tile.groups, weight.qmin, weight.n_bins)
            grad, limits = tile.of(grad_flat), (weight.qmin, weight.qmax)
            numel = weight.site.numel // weight.site.fused
            add_obr_gradient(grad, w, scale, codes, limits, index, bins, self.config.obr, self._obr_weight, numel)
            if weight.tracker.frozen is not None:
                grad.masked_fill_(tile.of(weight.tracker.frozen), 0.0)

    def _step_scale(self, weight: ShardedWeight, d_scale: Tensor) -> None:
        where = self.state.entries[f"{weight.site.name}:scale"].slice
        factor = 1.0
        if self.config.grad_scale == "lsq":
            factor = lsq_grad_scale(weight.site.numel // weight.n_groups, weight.qmax)
        self.state.grads[where] = (d_scale * factor).float()
        self.state.update(where, self._lr_factor, self.betas)

    @torch.no_grad()
    def after_inner_step(self, flats: list[Tensor]) -> None:
        """Decide new codes, record oscillations, and leave the image in the flats."""
        for flat in flats:
            for weight in self._in_flat[id(flat)]:
                self._write_image(weight, record=True)

    def _write_image(self, weight: ShardedWeight, record: bool) -> None:
        """Keep the latent aside and put the image in its place; `record` a step of the tracker on the way."""
        if weight.fragment is None:
            return
        values, scales, momentum = weight.fragment.values, weight.scales(), self.config.oscillation.momentum
        if self.shards.in_place and not record and weight.site.name in self._latents:
            values.copy_(self._latents[weight.site.name])
        for tile in weight.tiles:
            w, scale = tile.of(values), scales[tile.groups].unsqueeze(1)
            codes, image = weight.image_tile(tile, w, scale)
            if record:
                state = weight.tracker.view(tile.start, tile.shape)
                track(state, codes.to(torch.int8), momentum)
                if self._threshold is not None:
                    freeze(state, self._threshold, weight.qmin, weight.qmax)
                    codes, image = weight.image_tile(tile, w, scale)
            latent = self._latents.get(weight.site.name)
            if latent is None:
                latent = self._latents[weight.site.name] = torch.empty_like(values)
            tile.of(latent).copy_(w)
            w.copy_(image)

    def statistics(self) -> dict[str, dict[str, float | list[float]]]:
        """Return, for each weight over all shards: oscillating, frozen and clipped %, scales and bin occupancy."""
        threshold, weights = self.config.oscillation.threshold, list(self.weights.values())
        counts = [w.statistics(self.latent(w) if w.fragment else None, threshold).cpu() for w in weights]
        if not self.contributes:
            counts = [torch.zeros_like(c) for c in counts]
        totals = self._sum(torch.cat(counts)).split([c.numel() for c in counts])
        found = {}
        for weight, total in zip(weights, totals, strict=True):
            share = (total / weight.site.numel).tolist()
            found[weight.site.name] = {
                "oscillating_pct": 100 * share[0],
                "frozen_pct": 100 * share[1],
                "clip_ratio": share[2],
                "bins": share[3:],
                "scale": weight.replicated_scale.tolist(),
                "qmin": weight.qmin,
                "numel": weight.site.numel,
                "n_bits": weight.site.spec.n_bits,
            }
        return found

    def _sum(self, values: Tensor) -> Tensor:
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def _max(self, values: Tensor) -> Tensor:
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def _all_reduce(self, values: Tensor, op) -> Tensor:
        """Reduce a small tensor over all ranks, on the accelerator, where the backend needs it."""
        if self.world_size == 1:
            return values
        carried = values.to(self.state.values.device)
        dist.all_reduce(carried, op=op)
        return carried.to(values.device)
