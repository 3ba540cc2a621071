"""The shard step in native code, where the inner optimizer is AdamW, however many weights lie in a flat.

A row with a learned scale of its own that one rank has all of is stepped in one pass, scale and all: it stays in a core's cache
(on a GPU: in registers) between what is summed over it and what the sums decide. Of all else a first pass reads weights,
gradients and codes for the sums that are reduced over ranks; a second does all the rest and writes each byte once. Latents stay
where they are and images take the gradient's place, which nobody reads after the step: between the step and its end
(`ShardQuantization.finish_step`) the flat's `data` is the images, so nothing is copied back.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dsquant.config import QuantConfig
from dsquant.ops import backends, shard_step
from dsquant.ops.shard_step import LONGEST_RUN, AdamWStep, Column, TrackerStep
from dsquant.shard.native_step import next_step
from dsquant.shard.oscillation import TrackerState
from dsquant.shard.regularizers import Regularizer
from dsquant.shard.scale_step import ScaleStep
from dsquant.shard.weight_quantizers import ShardedWeight, Tile


def steps_in_one_pass(weight: ShardedWeight, tile: Tile) -> bool:
    """Say whether each row of a tile is a group of its own, with a learned scale, and short enough for one native pass."""
    rows, cols = tile.shape
    alone = weight.site.numel == weight.n_groups * cols
    return weight.learned and alone and rows <= weight.n_groups and cols <= LONGEST_RUN.get(weight.backend, 0)


def in_one_pass(weight: ShardedWeight) -> Tensor:
    """Return which groups of a weight this rank can step in one pass, or has nothing of; bool (n_groups,)."""
    found = torch.ones(weight.n_groups, dtype=torch.bool)
    for tile in weight.tiles:
        if not steps_in_one_pass(weight, tile):
            found[tile.groups.cpu()] = False
    return found


class FlatStore:
    """Hold what lies beside one flat: images (or, where the flat is the model's own parameter, latents) and trackers.

    Args:
        flat: float32, of any shape; `weights` are this rank's quantized weights in it.
        places: of each weight, its number among all of a step and where its groups begin.
        in_place: the flat holds images between steps, not latents.
        factors: of the gradients of scales, by weight, of which one pass steps what it can.
    """

    def __init__(
        self, flat: Tensor, weights: list[ShardedWeight], places: Mapping[str, tuple[int, int]], in_place: bool,
        factors: Mapping[str, float],
    ):  # fmt: skip
        self.flat, self.in_place = flat, in_place
        self.weights = sorted(weights, key=lambda w: w.fragment.start)
        self.latents = self.images = None
        self.of_weights: dict[str, Tensor] = {}  # latents
        self._first_tracker: TrackerState | None = None
        self.state: dict[str, Tensor | None] = {}
        self.rest: list[slice] = []  # of the flat, that nothing quantizes
        rows, done, tracked = [], 0, 0
        for weight in self.weights:
            start, numel, name = weight.fragment.start, weight.fragment.numel, weight.site.name
            rows += self._plain_row(done, start) + weight.table_rows(start, tracked, *places[name])
            for row, tile in zip(rows[-len(weight.tiles) :], weight.tiles, strict=True):
                row[Column.FACTOR] = factors[name] if name in factors and steps_in_one_pass(weight, tile) else 0.0
            done, tracked = start + numel, tracked + numel
        rows += self._plain_row(done, flat.numel())
        self.tiles = torch.tensor(rows, dtype=torch.float64)
        self.table = self.tiles.numpy()
        self.weight_of = self.tiles[:, Column.WEIGHT].long().numpy()
        self.quantized = (self.tiles[:, Column.N_GROUPS] > 0).numpy()
        whole = (self.tiles[:, Column.FACTOR] != 0).numpy()
        self.any_in_one_pass, self.any_in_two = bool(whole.any()), not bool(whole.all())
        self.any_to_gather = bool(self.quantized[~whole].any())
        self.tracked = tracked

    def _plain_row(self, start: int, stop: int) -> list[list[float]]:
        if start == stop:
            return []
        self.rest.append(slice(start, stop))
        row = [0.0] * len(Column)
        row[Column.START], row[Column.ROWS], row[Column.COLS] = start, 1, stop - start
        return [row]

    def begin(self, latents: Mapping[str, Tensor]) -> None:
        """Have the flat hold its latents; `latents` are those kept elsewhere so far."""
        if self.weights and self.weights[0].tracker is not self._first_tracker:  # those of a flat are replaced together
            self._take_trackers()
        shown = self.flat.data
        if not self.in_place:
            self.images = self._room_for_images(shown)
            if self.latents is None or self.latents.data_ptr() != shown.data_ptr():
                self._keep(shown)
            return
        self.images = shown
        if self.latents is None:
            self._keep(torch.empty_like(shown))
        for weight in self.weights:
            name, kept = weight.site.name, self.of_weights[weight.site.name]
            if latents.get(name) is not kept:
                kept.copy_(latents.get(name, weight.fragment.values))
        for part in self.rest:
            self.latents.view(-1)[part].copy_(shown.view(-1)[part])
        self.flat.data = self.latents

    def show_images(self) -> None:
        """Have the flat hold its images."""
        self.flat.data = self.images

    def show_latents(self) -> None:
        """Have the flat hold its latents again; the next backward pass needs the images' memory more."""
        kept = self.flat.grad  # by DeepSpeed, to add to or to copy into: images must not pass for a gradient
        if kept is not None and kept.data_ptr() == self.images.data_ptr():
            kept.zero_()
        self.flat.data, self.images = self.latents, None

    def _room_for_images(self, shown: Tensor) -> Tensor:
        """Return the gradient's memory, or other where that does not lie as the flat does."""
        grad, pinned = self.flat.grad, shown.is_pinned()
        if grad.is_contiguous() and grad.shape == shown.shape and grad.is_pinned() == pinned:
            return grad.detach()
        return torch.empty_like(shown, pin_memory=pinned)

    def _keep(self, latents: Tensor) -> None:
        self.latents = latents
        self.of_weights = {w.site.name: w.fragment.of(latents) for w in self.weights}

    def _take_trackers(self) -> None:
        """Put the trackers of all weights into one tensor a part, one behind the other; each weight keeps a view."""
        self.state = dict.fromkeys(vars(self.weights[0].tracker))
        for part in self.weights[0].tracker.tensors():
            self.state[part] = torch.cat([getattr(w.tracker, part).view(-1) for w in self.weights])
        sizes, start = [w.fragment.numel for w in self.weights], 0
        for weight, size in zip(self.weights, sizes, strict=True):
            views = {part: None if t is None else t[start : start + size] for part, t in self.state.items()}
            weight.tracker = TrackerState(**views)
            start += size
        self._first_tracker = self.weights[0].tracker


class FlatStep:
    """Step some flats, all on one device, with an AdamW, quantized weights and all, by native code.

    Args:
        in_flat: the weights of each flat, also those that this rank has nothing of.
        in_one_pass: of each weight, the groups that the rank which has them steps in one pass, and tells the others the scales;
            bool (n_groups,), the same on all ranks.
    """

    def __init__(
        self, flats: list[Tensor], in_flat: Mapping[int, list[ShardedWeight]], scales: ScaleStep, config: QuantConfig,
        in_place: bool, in_one_pass: Mapping[str, Tensor],
    ):  # fmt: skip
        self.flats, self.scales, self.state, self.config = flats, scales, scales.state, config
        self.device = flats[0].device if flats else self.state.values.device
        self.weights = [w for flat in flats for w in in_flat[id(flat)]]
        one_pass = [in_one_pass[w.site.name] for w in self.weights]
        self.scale_plan = scales.plan(self.weights, torch.cat([torch.zeros(0, dtype=torch.bool), *one_pass]))
        # How many bins of each weight the ranks add up: all of a weight, where any of its groups takes two passes.
        bins = [w.n_bins * w.n_groups * (not of.all()) for w, of in zip(self.weights, one_pass, strict=True)]
        self._reduced = np.array(bins, dtype=np.int64)
        places, factors, self.n_groups = {}, {}, 0
        for index, weight in enumerate(self.weights):
            name = weight.site.name
            places[name] = index, self.n_groups
            self.n_groups += weight.n_groups
            if in_one_pass[name].any():
                factors[name] = scales.factor(weight)
        self.n_sums = 3 * self.n_groups if factors else 2 * self.n_groups
        self.stores: dict[int, FlatStore] = {}
        for flat in flats:
            if mine := [w for w in in_flat[id(flat)] if w.fragment is not None]:
                self.stores[id(flat)] = FlatStore(flat, mine, places, in_place, factors)
        self.any_in_one_pass = any(store.any_in_one_pass for store in self.stores.values())
        self.any_in_two = any(store.any_in_two for store in self.stores.values())
        self.any_late = any(not w.learned for w in self.weights)
        self._shares, self._most_varied = np.zeros((0, 3)), 0.0  # of each weight in the regularizers' strengths
        self._pulls: dict[int, np.ndarray] = {}  # the same of each tile, by flat
        self._binned: bool | None = None  # whether the tables of tiles have bins
        self._n_reduced = 0  # how many of them are added up over ranks
        self._n_bins = np.array([w.n_bins for w in self.weights], dtype=np.int64)
        self._scales, self._centres = (self._entries(role) for role in ("scale", "centre"))
        # Of values that lie in one piece, by where they lie: they stay there, but for rates.
        self._views: dict[tuple[int, int], Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._numbers: dict[int, tuple[Tensor, tuple[Tensor, Tensor], AdamWStep]] = {}  # each flat's moments and step
        self._buffer = torch.empty(0, dtype=torch.float64)
        self.backend = backends.choose("shard_step", self.device.type)

    def _entries(self, role: str) -> list[slice | int]:
        """Return where the values of a role lie in the state, in the fewest slices, or how many a weight without it would have.

        It is empty where no weight has it.
        """
        found, any_of_them = [], False
        for weight in self.weights:
            entry = self.state.entries.get(f"{weight.site.name}:{role}")
            any_of_them |= entry is not None
            if entry is None:
                found.append(weight.n_groups)
            elif found and isinstance(found[-1], slice) and found[-1].stop == entry.start:
                found[-1] = slice(found[-1].start, entry.slice.stop)
            else:
                found.append(entry.slice)
        return found if any_of_them else []

    def _values(self, entries: list[slice | int], of: Tensor | None = None) -> Tensor | None:
        """Return the values of a role, float32 (n_groups,) on the device of the flats; 0 where a weight has none.

        `of`: the state's values, or another of its tensors. They may be a part of it, and not a copy.
        """
        if not entries:
            return None
        values = self.state.values if of is None else of
        key = id(entries), values.data_ptr()
        if key in self._views:
            return self._views[key]
        found = [values[e] if isinstance(e, slice) else values.new_zeros(e) for e in entries]
        if len(found) == 1 and isinstance(entries[0], slice) and values.device == self.device:
            self._views[key] = found[0]
        return (found[0] if len(found) == 1 else torch.cat(found)).to(self.device)

    def begin(self, latents: Mapping[str, Tensor], inner: torch.optim.AdamW) -> None:
        """Have the flats hold their latents, and count a step of each."""
        for store in self.stores.values():
            store.begin(latents)
        self._numbers = {}
        for group in inner.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    state, numbers = next_step(inner, flat, group)
                    self._numbers[id(flat)] = flat, (state["exp_avg"], state["exp_avg_sq"]), numbers

    def first_pass(self, regularizer: Regularizer, tracking: TrackerStep, lr_factor: float, room: int) -> Tensor:
        """Step what one pass can, and return what is to be added up over ranks.

        That is, float64 and in a row: (2, groups) and (2, bins), this rank's sums of all else, as
        `ShardQuantization._gather_sums` defines them for a weight; where any group is stepped in one pass (3, groups) and
        (2, bins), in which it has its next scale and the moments of that; and `room` for other values: a buffer that the next
        step takes again.
        """
        self._scale, self._centre = self._values(self._scales), self._values(self._centres)
        if self.any_in_two:
            self._scale = self._scale.clone()  # the second pass wants those from before the step, too
        bins = self._plan(regularizer)
        if self._buffer.numel() != self.n_sums + bins + room:
            self._buffer = torch.empty(self.n_sums + bins + room, dtype=torch.float64, device=self.device)
        sums, bins, _ = self._buffer.zero_().split([self.n_sums, bins, room])
        self._norms, self._squares = {}, None
        if regularizer.observed:
            pulled = (i for i in range(len(self.weights)) if self._is_pulled(i, regularizer))
            self._norms = {i: regularizer.new_norms(self.weights[i]) for i in pulled}
            self._squares = torch.zeros(len(self.weights), 2, dtype=torch.float64, device=self.device)
        if self.any_in_one_pass:
            self._step_whole(sums, tracking, lr_factor)
        for store in self.stores.values():
            if store.any_to_gather:
                shard_step.flat_gather(
                    store.latents, store.flat.grad, store.state["codes"], store.state["frozen"], self._scale, self._centre,
                    store.tiles, self.config.grad_scale == "mdq", sums[: 2 * self.n_groups], bins, self.backend,
                )  # fmt: skip
        return self._buffer

    def _plan(self, regularizer: Regularizer) -> int:
        """Put this step's regularizers into the tables of tiles; return how many values bins take in what is added up."""
        if len(self._shares) < len(self.weights):
            self._shares = np.array([regularizer.shares(w) for w in self.weights])
            self._most_varied = float(self._shares[:, 2].max(initial=0))
        obr, dampening = regularizer.strengths
        self._most_spread = obr * self._most_varied
        if (self._most_spread != 0) is not self._binned:
            self._binned = self._most_spread != 0
            self._place_bins((self._shares[:, 2] != 0) & self._binned)
        for key, store in self.stores.items():
            of_obr, damped = self._pulls[key]  # in NumPy: what PyTorch takes for as little is a share of the step
            store.table[:, Column.PULL] = obr * of_obr + dampening * damped if dampening else obr * of_obr
        return 2 * self._n_reduced

    def _place_bins(self, varied: np.ndarray) -> None:
        """Say in the tables of tiles which weights have bins, bool (weights,), and where."""
        held, reduced = self._n_bins * varied, self._reduced * varied
        first, self._n_reduced = reduced.cumsum() - reduced, int(reduced.sum())
        for key, store in self.stores.items():
            for column, values in ((Column.BIN, first), (Column.N_BINS, held)):
                store.table[:, column] = values[store.weight_of] * store.quantized
            self._pulls[key] = self._shares.T[:2, store.weight_of] * store.quantized

    def _is_pulled(self, index: int, regularizer: Regularizer) -> bool:
        weight = self.weights[index]
        return weight.fragment is not None and bool(regularizer.pull(weight) or regularizer.spread(weight))

    def _step_whole(self, sums: Tensor, tracking: TrackerStep, lr_factor: float) -> None:
        moments = (self._values(self._scales, of) for of in (self.state.exp_avg, self.state.exp_avg_sq, self.state.lr))
        scales, adam = (self._scale, *moments), self.scales.adam(lr_factor)
        for key, store in self.stores.items():
            if store.any_in_one_pass:
                flat, moments, numbers = self._numbers[key]
                shard_step.flat_whole(
                    store.latents, flat.grad, *moments, store.images, store.state, scales, adam, self._most_spread,
                    store.tiles, numbers, tracking, self._squares, sums, self.backend,
                )  # fmt: skip

    def prepare(self, bins: Tensor) -> None:
        """Note what bins hold over all ranks."""
        self._bins = bins.to(self.device).contiguous()

    def second_pass(self, tracking: TrackerStep) -> None:
        """Step all that the first pass did not; weights whose scale is a statistic have no image yet."""
        after = None
        for key, (flat, moments, numbers) in self._numbers.items():
            store = self.stores.get(key)
            if store is None:
                parts = (flat.data, flat.grad, *moments)
                shard_step.adamw(*(part.view(-1) for part in parts), numbers, self.backend)
            elif store.any_in_two:
                after = self._values(self._scales) if after is None else after
                shard_step.flat_step(
                    store.latents, flat.grad, *moments, store.images, store.state, self._scale, after, self._centre,
                    self._bins, self._most_spread, store.tiles, numbers, tracking, self._squares, self.backend,
                )  # fmt: skip
        for index, found in self._norms.items():
            found.copy_(self._squares[index])

    def moments(self, weights: list[ShardedWeight]) -> Tensor:
        """Return this rank's sums of |w|, w and w^2, float64 (groups, 3), of weights whose scales are statistics."""
        found = torch.zeros(self.n_groups, 3, dtype=torch.float64, device=self.device)
        for store in self.stores.values():
            shard_step.flat_moments(store.latents, store.tiles, found, self.backend)
        if len(weights) == len(self.weights):
            return found
        wanted = {id(weight) for weight in weights}
        parts = zip(self.weights, found.split([w.n_groups for w in self.weights]), strict=True)
        return torch.cat([part for weight, part in parts if id(weight) in wanted])

    def finish(self, tracking: TrackerStep) -> dict[str, Tensor]:
        """Form the images that are missing, have the flats hold images, and return the latents by name."""
        scale, centre = (self._values(of) for of in (self._scales, self._centres)) if self.any_late else (None, None)
        found = {}
        for store in self.stores.values():
            if self.any_late:
                parts = (store.latents, store.images, store.state)
                shard_step.flat_image(*parts, scale, centre, store.tiles, tracking, self.backend)
            store.show_images()
            found |= store.of_weights
        return found
