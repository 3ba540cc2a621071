"""The shard step: weights are quantized once per optimizer step, on the rank that owns them.

before the inner step   straight-through mask, scale gradients, bin sums -> one all-reduce -> regularizer; scales step by the
                        gradients of the step before
inner step              any torch optimizer, on the latent fp32 shards
after the inner step    new codes, oscillation statistics, image left in the shard for ZeRO to gather
after engine.step()     latents put back: between steps DeepSpeed's tensors are what DeepSpeed expects

That is the definition, in PyTorch. Native code does all of it in one pass, and its all-reduce after that (`flat_step.py`).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dsquant.config import QuantConfig
from dsquant.errors import ShardError
from dsquant.ops import backends
from dsquant.ops.fake_quantize import near_boundary
from dsquant.ops.shard_step import TrackerStep
from dsquant.quant.state import SCALE_FLOOR, QuantState
from dsquant.shard.flat_step import FlatStep, has_all_of_its_groups
from dsquant.shard.fragments import Fragment, ShardMap, part_of
from dsquant.shard.native_step import can_step, step_float, write_image
from dsquant.shard.oscillation import TrackerState, freeze, freeze_threshold, track
from dsquant.shard.regularizers import Regularizer, bin_index, bin_sums, in_parts
from dsquant.shard.scale_step import ScalePlan, ScaleStep, StatisticStep
from dsquant.shard.statistics import weight_statistics
from dsquant.shard.weight_quantizers import ShardedWeight, moment_scales, mse_scales
from dsquant.spec import WeightSite


class ShardOptimizer(torch.optim.Optimizer):
    """Wrap any torch optimizer so that its step quantizes weights, once `quantization` is attached.

    DeepSpeed reads and writes `param_groups` and `state`; both are the inner optimizer's own. It takes no step whose gradient
    is not finite, but at ZeRO 0 in float32: with `checks_finite` this optimizer does so, and says it in `overflow`, which
    DeepSpeed reads. The norm is that of the reduced gradient, the same on every rank.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        self.defaults = inner.defaults
        self.quantization: ShardQuantization | None = None
        self.checks_finite, self.overflow = False, False

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
        if self.checks_finite:
            self.overflow = not bool(torch.nn.utils.get_total_norm([p.grad for p in flats]).isfinite())
            if self.overflow:
                return
        if self.quantization is not None:
            self.quantization.step(flats, self.inner)
        elif can_step(self.inner, flats):
            step_float(self.inner)
        else:
            self.inner.step()

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
                ShardedWeight(
                    by_name[name], state.get(name), part_of(mine.get(name), by_name[name]), state.get(name, "centre")
                )
                for name in members
                if name in by_name
            ]
            self._in_flat[id(flat)] = found
            self.weights.update((w.site.name, w) for w in found)
        if missing := [site.name for site in sites if site.name not in self.weights]:
            raise ShardError(f"{missing[0]} is to be quantized and no optimizer steps it (is it frozen?)")
        self._scales, self._statistics = ScaleStep(state, config.grad_scale, betas), StatisticStep(state)
        self._latents: dict[str, Tensor] = {}
        self._lr_factor, self._threshold, self._activations_pending = 1.0, None, False
        self._tracking = self._tracker_step()
        self._held: dict[str, tuple[Tensor, Tensor]] = {}  # CGA: which weights may move, and where all were
        self._flat: FlatStep | None = None  # of the step that is being taken, where native code takes it
        self._flat_steps: dict[tuple[int, ...], FlatStep] = {}  # by their flats
        self._scale_plans: dict[tuple[int, ...], ScalePlan] = {}  # the same, where native code takes no step
        self._native: bool | None = None  # whether native code takes the step, once the ranks have agreed on it
        self.apart: set[str] = set()  # weights of which no group lies on two ranks, known after a step
        self._binned: dict[int, FlatStep] = {}  # by flat: what has summed the bins that the next step starts from
        self._shown: list[FlatStep] = []  # whose flats hold images
        self.regularizer = Regularizer(config.obr, config.oscillation.dampening)

    @torch.no_grad()
    def initialize_scales(self) -> None:
        """Set every weight scale over all shards: a learned one by the recipe's `weight_init`, a statistic as it is."""
        learned = [w for w in self.weights.values() if w.learned]
        if self.config.weight_init == "mse":
            for weight, scale in zip(learned, mse_scales(learned, self._sum, self._max, SCALE_FLOOR), strict=True):
                weight.replicated_scale.copy_(scale)
        else:
            self._take_moments(learned, self.config.weight_init)
        self._take_statistics(list(self.weights.values()))

    def _moments(self, weights: list[ShardedWeight]) -> Tensor:
        """Return float64 (groups of all weights, 3) sums of |w|, w and w^2 over all shards."""
        if self._flat is not None:
            sums = self._flat.moments(weights)
        else:
            sums = torch.cat([w.moment_sums().to(self.state.values.device) for w in weights])
        return self._sum((sums if self.contributes else torch.zeros_like(sums)).to(self.state.values.device))

    def _take_moments(self, weights: list[ShardedWeight], rule: str) -> None:
        """Set the scales of some weights that are learned, for a start."""
        if not weights:
            return
        sums = self._moments(weights).split([w.n_groups for w in weights])
        for weight, total in zip(weights, sums, strict=True):
            weight.replicated_scale.copy_(moment_scales(weight, total, rule)[0].clamp(min=SCALE_FLOOR))

    def _take_statistics(self, weights: list[ShardedWeight]) -> None:
        """Set the scales and centres that are statistics of the latents; those that are learned stay as they are."""
        if late := [w for w in weights if not w.learned]:
            self._statistics.step(late, self._moments(late))

    @torch.no_grad()
    def start(self) -> None:
        """Begin tracking from the codes of the present latents and scales, and publish the first images."""
        self._binned.clear()
        for weight in self.weights.values():
            if weight.fragment is not None:
                codes = torch.empty(weight.fragment.numel, device=weight.device)
                for tile in weight.tiles:
                    scale = weight.scales()[tile.groups].unsqueeze(1)
                    tile.of(codes).copy_(weight.image_tile(tile, tile.of(self.latent(weight)), scale)[0])
                weight.tracker = TrackerState.start(codes, self.config.oscillation.freeze.enabled)
        self.publish()

    @torch.no_grad()
    def show_latents(self) -> None:
        """Have the model's parameters hold the latents in place of the images, until `start` or `move`."""
        self._put_latents_back()
        self.shards.publish()

    @torch.no_grad()
    def move(self, changes: dict[str, Tensor]) -> None:
        """Add to the weights, by parameter name and whole, while latents are shown; then fit scales anew, and `start`."""
        for fragment in (f for fragments in self.shards.fragments for f in fragments if f.name in changes):
            part = changes[fragment.name].reshape(-1)[fragment.offset : fragment.offset + fragment.numel]
            fragment.values.add_(part.to(fragment.values.device))
        self.initialize_scales()
        self.start()

    def resume(self, trackers: dict[str, dict[str, Tensor]]) -> None:
        """Go on from restored latents (in the flats), scales and tracker tensors (by weight name), and publish images."""
        self._latents.clear()
        self._binned.clear()
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

    def begin_step(self, progress: float, lr_factor: float, observe: bool = False) -> None:
        """Fix what this optimizer step needs: `progress` through the stage in [0, 1], and the schedule's lr factor.

        `observe` has the step measure how strong the regularizer's gradient is beside the task's.
        """
        self.regularizer.begin_step(progress, observe)
        self._threshold = freeze_threshold(self.config.oscillation.freeze, progress)
        self._lr_factor = lr_factor
        self._activations_pending = True

    @torch.no_grad()
    def finish_step(self) -> None:
        """Put the latents back into the flats, after DeepSpeed has gathered the images."""
        if not self.shards.in_place:
            for shown in self._shown:
                for store in shown.stores.values():
                    store.show_latents()
                    for name in store.of_weights:
                        self._latents.pop(name, None)
            self._shown.clear()
            self._put_latents_back()

    def _put_latents_back(self) -> None:
        for name, latent in self._latents.items():
            self.weights[name].fragment.values.copy_(latent)
        self._latents.clear()

    def latent(self, weight: ShardedWeight) -> Tensor:
        """Return the latent of this rank's fragment, 1-D float32, wherever it is kept at the moment."""
        kept = self._latents.get(weight.site.name)
        return weight.fragment.values if kept is None else kept

    def latents_of(self, fragment: Fragment) -> Tensor:
        """Return the latents of this rank's fragment of any parameter, quantized whole, in part or not at all; 1-D."""
        weight = self.weights.get(fragment.name)
        if weight is None or weight.fragment is None or weight.site.name not in self._latents:
            return fragment.values
        found, start = fragment.values.clone(), weight.fragment.start - fragment.start
        found[start : start + weight.fragment.numel] = self._latents[weight.site.name]
        return found

    @torch.no_grad()
    def step(self, flats: list[Tensor], inner: torch.optim.Optimizer) -> None:
        """Step the flats by the inner optimizer, with what quantization does before and after it."""
        if self._native is None:
            self._agree(flats, inner)
        if self._native:
            self._step_natively(flats, inner)
            return
        self._binned.clear()
        self.before_inner_step(flats)
        inner.step()
        self.after_inner_step(flats)

    def _agree(self, flats: list[Tensor], inner: torch.optim.Optimizer) -> None:
        """Find whether native code takes the step, and whose bins no two ranks share: all ranks must add up the same."""
        in_one_place = len({flat.device for flat in flats}) <= 1
        native = in_one_place and can_step(inner, flats) and not self.config.oscillation.cga.enabled
        mine = torch.tensor([native, *map(has_all_of_its_groups, self.weights.values())], dtype=torch.int32)
        native, *apart = self._all_reduce(mine, dist.ReduceOp.MIN).tolist()
        self._native = bool(native)
        self.apart = {name for name, alone in zip(self.weights, apart, strict=True) if alone}

    def _step_natively(self, flats: list[Tensor], inner: torch.optim.AdamW) -> None:
        self._flat = flat = self._flat_step(flats)
        flat.begin(self._latents, inner)
        room = self._begin_activations()
        asked = flat.plan(self.regularizer)
        if flat.has_bins and (asked or any(self._binned.get(id(f)) is not flat for f in flats)):
            self._add_up(flat.gather_bins())
        flat.step_scales(self._lr_factor)
        flat.step(self.regularizer, self._tracking, room)
        if flat.any_late:
            self._take_statistics(flat.weights)
        self._latents |= flat.finish(self._tracking)
        self._shown.append(flat)
        self._add_up(flat.found.added_up, room)
        self._step_activations(flat.found.room)
        flat.end()
        self._binned.update((id(f), flat) for f in flats)
        self._flat = None

    def _add_up(self, found: Tensor, room: int = 0) -> None:
        """Sum what this rank has found over all ranks, in its place; activations' gradients take the `room` before it."""
        if not self.contributes:
            found.zero_()
        if room:
            found[:room] = self.state.take_activation_grads(self.world_size)
        summed = self._sum(found)
        if summed is not found:
            found.copy_(summed)

    def _begin_activations(self) -> int:
        """Count a step, unless a step of other flats has; return how many gradients of activations it is to add up."""
        if not self._activations_pending:
            return 0
        self._count_step()
        return self.state.n_activation

    def _step_activations(self, grads: Tensor) -> None:
        """Step the scales of activations by their gradients over all ranks, where this step has any."""
        self._activations_pending = False
        if room := grads.numel():
            self.state.grads[:room] = grads.float()
            self.state.update(slice(0, room), self._lr_factor, self.betas)

    def _flat_step(self, flats: list[Tensor]) -> FlatStep:
        key = tuple(id(flat) for flat in flats)
        if key not in self._flat_steps:
            self._flat_steps[key] = FlatStep(
                flats, self._in_flat, self._scales, self.config, self.shards.in_place, self.apart
            )
        return self._flat_steps[key]

    @torch.no_grad()
    def before_inner_step(self, flats: list[Tensor]) -> None:
        """Turn the gradients of the images in `flat.grad` into those of the latents, and step the scales."""
        weights = self._weights_of(flats)
        if self.shards.in_place:
            for weight in weights:
                weight.fragment.values.copy_(self.latent(weight))
        if not (weights or self._activations_pending):
            return
        room = self._begin_activations()
        nothing = torch.zeros(2, 0, dtype=torch.float64, device=self.state.values.device)
        sums = [(nothing, nothing), *(self._gather_sums(weight) for weight in weights)]
        groups, bins = (torch.cat(of, dim=1) for of in zip(*sums, strict=True))
        payload = torch.cat([groups.new_zeros(room), groups.view(-1), bins.view(-1)])
        self._add_up(payload, room)
        self._step_activations(payload[:room])
        groups, bins = payload[room:].split([groups.numel(), bins.numel()])
        if not weights:
            return
        self._prepare(weights, bins.view(2, -1))
        plan = self._scale_plan(flats)
        self._scales.step(plan, self._lr_factor)
        self._scales.keep(plan, groups.view(2, -1))

    def _weights_of(self, flats: list[Tensor]) -> list[ShardedWeight]:
        return [w for flat in flats for w in self._in_flat[id(flat)]]

    def _scale_plan(self, flats: list[Tensor]) -> ScalePlan:
        """Return how the scales of these flats' weights are stepped: the same way at every step."""
        key = tuple(id(flat) for flat in flats)
        if key not in self._scale_plans:
            self._scale_plans[key] = self._scales.plan(self._weights_of(flats))
        return self._scale_plans[key]

    def _count_step(self) -> None:
        """Count a step of scales and trackers."""
        self.state.begin_step()
        self._tracking = self._tracker_step(self._threshold)
        if self._tracking.fade != 1:
            for weight in self.weights.values():
                if weight.tracker is not None:
                    weight.tracker.frequency.mul_(self._tracking.fade)

    def _tracker_step(self, threshold: float | None = None) -> TrackerStep:
        return TrackerStep(self.config.oscillation.momentum, self.state.step_count, threshold)

    def _prepare(self, weights: list[ShardedWeight], bins: Tensor) -> None:
        """Add the regularizers' gradient; `bins` (2, all bins) are over all shards."""
        sizes = [w.n_groups * w.n_bins if self.regularizer.spread(w) > 0 else 0 for w in weights]
        for weight, held in zip(weights, bins.split(sizes, dim=1), strict=True):
            self.regularizer.add(weight, held)
            self._hold(weight)

    def _gather_sums(self, weight: ShardedWeight) -> tuple[Tensor, Tensor]:
        """Mask this rank's gradient and return float64 sums over its part of a weight.

        They are (2, n_groups): d scale, and |w| where the gradient scale is mdq; and (2, n_groups * n_bins), or (2, 0) where
        no regularizer asks for them: how many weights each bin holds, and their sum in parts of the scale.
        """
        spread, device = self.regularizer.spread(weight) > 0, self.state.values.device
        size = weight.n_groups * weight.n_bins
        bins = torch.zeros(2, size if spread else 0, dtype=torch.float64, device=device)
        groups = torch.zeros(2, weight.n_groups, dtype=torch.float64, device=device)
        if weight.fragment is None:
            return groups, bins
        scales = weight.scales()
        grad_flat = weight.gradient
        for tile in weight.tiles:
            scale, w = scales[tile.groups].unsqueeze(1), weight.around_centre(tile, tile.of(weight.fragment.values))
            rows = weight.lsq_tile(tile, w, tile.of(grad_flat), scale)
            groups[0].index_add_(0, tile.groups.to(device), rows.to(device))
            if self.config.grad_scale == "mdq":
                groups[1].index_add_(0, tile.groups.to(device), w.abs().sum(1, dtype=torch.float64).to(device))
            if spread:
                index = bin_index(tile.of(weight.tracker.codes), tile.groups, weight.qmin, weight.n_bins)
                bins += bin_sums(in_parts(w, scale, weight.levels), index, size).to(device)
        return groups, bins

    def _hold(self, weight: ShardedWeight) -> None:
        """For CGA: stop the gradient of all but the weights near a boundary, and remember where they are."""
        cga = self.config.oscillation.cga
        if not cga.enabled or weight.fragment is None or weight.site.spec.n_bits > cga.max_bits:
            return
        values, scales = weight.fragment.values, weight.scales()
        free = torch.empty_like(values, dtype=torch.bool)
        for tile in weight.tiles:
            v = weight.around_centre(tile, tile.of(values)) / scales[tile.groups].unsqueeze(1)
            tile.of(free).copy_(near_boundary(v, weight.levels, cga.boundary_range))
        weight.gradient.mul_(free)
        self._held[weight.site.name] = free, values.clone()

    @torch.no_grad()
    def after_inner_step(self, flats: list[Tensor]) -> None:
        """Decide new codes, record oscillations, and leave the image in the flats."""
        weights = self._weights_of(flats)
        for weight in weights if self._held else ():
            if weight.site.name in self._held:
                free, before = self._held.pop(weight.site.name)
                weight.fragment.values.copy_(torch.where(free, weight.fragment.values, before))
        self._take_statistics(weights)
        for weight in weights:
            self._write_image(weight, record=True)

    def _write_image(self, weight: ShardedWeight, record: bool) -> None:
        """Keep the latent aside and put the image in its place; `record` a step of the tracker on the way."""
        if weight.fragment is None:
            return
        values, scales = weight.fragment.values, weight.scales()
        if self.shards.in_place and not record and weight.site.name in self._latents:
            values.copy_(self._latents[weight.site.name])
        latent = self._latents.get(weight.site.name)
        if latent is None:
            latent = self._latents[weight.site.name] = torch.empty_like(values)
        if record and weight.backend != backends.TORCH:
            write_image(weight, latent, self._tracking)
            return
        for tile in weight.tiles:
            w, scale = tile.of(values), scales[tile.groups].unsqueeze(1)
            codes, image = weight.image_tile(tile, w, scale)
            if record:
                state = weight.tracker.view(tile.start, tile.shape)
                track(state, codes.to(torch.int8), self._tracking)
                if self._tracking.limit is not None:
                    freeze(state, self._tracking.limit, weight.qmin, weight.qmax)
                    codes, image = weight.image_tile(tile, w, scale)
            tile.of(latent).copy_(w)
            w.copy_(image)

    def statistics(self) -> dict[str, dict[str, float | list[float]]]:
        """Return the statistics of each weight over all shards (`shard/statistics.py`); every rank calls this."""
        latents = {name: self.latent(w) for name, w in self.weights.items() if w.fragment is not None}
        threshold, weights = self.config.oscillation.threshold / self._tracker_step().left, list(self.weights.values())
        return weight_statistics(weights, latents, self.regularizer.norms, threshold, self.contributes, self._sum)

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
