"""The shard step in native code, where the inner optimizer is AdamW, however many weights lie in a flat: one pass.

It reads weights, gradients, moments and codes, and writes latents, moments, images and codes, each byte once. What a scale's
gradient and OBR's bins ask for of a whole group, which may lie on several ranks, the pass sums for the next step: the bins of
what it leaves are those that the next step starts from, and scales move by the gradient of the step before. So ranks wait for
each other once, when nothing but sums is left. A scale that is a statistic of the latents takes two passes more.

Latents stay where they are and images take the gradient's place, which nobody reads after the step: between the step and its end
(`ShardQuantization.finish_step`) the flat's `data` is the images, so nothing is copied back.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsquant.config import QuantConfig
from dsquant.ops import backends, shard_step
from dsquant.ops.shard_step import AdamWStep, Column, TrackerStep
from dsquant.shard.native_step import next_step
from dsquant.shard.oscillation import TrackerState
from dsquant.shard.regularizers import Regularizer
from dsquant.shard.scale_step import ScaleStep
from dsquant.shard.weight_quantizers import ShardedWeight


def has_all_of_its_groups(weight: ShardedWeight) -> bool:
    """Say whether this rank has all of each group of a weight that it has anything of."""
    return all(weight.site.numel == weight.n_groups * cols and rows <= weight.n_groups
               for rows, cols in (tile.shape for tile in weight.tiles))  # fmt: skip


class FlatStore:
    """Hold what lies beside one flat: images (or, where the flat is the model's own parameter, latents) and trackers.

    Args:
        flat: float32, of any shape; `weights` are this rank's quantized weights in it.
        places: of each weight, its number among all of a step and where its groups begin.
        in_place: the flat holds images between steps, not latents.
        scales: knows the factors of the gradients of scales.
    """

    def __init__(
        self, flat: Tensor, weights: list[ShardedWeight], places: Mapping[str, tuple[int, int]], in_place: bool,
        scales: ScaleStep,
    ):  # fmt: skip
        self.flat, self.in_place = flat, in_place
        self.weights = sorted(weights, key=lambda w: w.fragment.start)
        self.latents = self.images = None
        self._pinned = flat.is_pinned()
        self.of_weights: dict[str, Tensor] = {}  # latents
        self._first_tracker: TrackerState | None = None
        self.state: dict[str, Tensor | None] = {}
        self.rest: list[slice] = []  # of the flat, that nothing quantizes
        rows, done, tracked = [], 0, 0
        for weight in self.weights:
            start, numel, name = weight.fragment.start, weight.fragment.numel, weight.site.name
            own = weight.table_rows(start, tracked, *places[name])
            for row in own:
                row[Column.FACTOR] = scales.known_factor(weight)
            rows += self._plain_row(done, start) + own
            done, tracked = start + numel, tracked + numel
        rows += self._plain_row(done, flat.numel())
        self.tiles = torch.tensor(rows, dtype=torch.float64)
        self.table = self.tiles.numpy()
        self.weight_of = self.tiles[:, Column.WEIGHT].long().numpy()
        self.quantized = (self.tiles[:, Column.N_GROUPS] > 0).numpy()

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
        grad = self.flat.grad
        if grad.is_contiguous() and grad.shape == shown.shape and (not self._pinned or grad.is_pinned()):
            return grad.detach()
        return torch.empty_like(shown, pin_memory=self._pinned)

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


class Found(NamedTuple):
    """Hold what a step finds, in one float64 buffer, and its parts.

    Attributes:
        added_up: what is to be added up over ranks: `room` for other values, sums of groups, and bins that lie on several ranks.
        groups: (kinds, groups), as `ScaleStep.keep` takes them; `bins`: all of them, also those that lie on this rank alone.
    """

    added_up: Tensor
    room: Tensor
    groups: Tensor
    bins: Tensor


class FlatStep:
    """Step some flats, all on one device, with an AdamW, quantized weights and all, by native code.

    Args:
        in_flat: the weights of each flat, also those that this rank has nothing of.
        apart: names of the weights of which no group lies on two ranks: nobody else asks for what their bins hold. The same on
            all ranks.
    """

    def __init__(
        self, flats: list[Tensor], in_flat: Mapping[int, list[ShardedWeight]], scales: ScaleStep, config: QuantConfig,
        in_place: bool, apart: set[str],
    ):  # fmt: skip
        self.flats, self.scales, self.state, self.config = flats, scales, scales.state, config
        self.device = flats[0].device if flats else self.state.values.device
        self.weights = [w for flat in flats for w in in_flat[id(flat)]]
        self.scale_plan = scales.plan(self.weights)
        places, self.n_groups = {}, 0
        for index, weight in enumerate(self.weights):
            places[weight.site.name] = index, self.n_groups
            self.n_groups += weight.n_groups
        self._kinds = 2 if config.grad_scale == "mdq" else 1  # of sums over a group: d scale, and |w|
        self.n_sums = self.n_groups * self._kinds
        self._sizes = np.array(
            [2 * w.n_bins * w.n_groups for w in self.weights], dtype=np.int64
        )  # values of their bins
        self._apart = np.array([w.site.name in apart for w in self.weights], dtype=bool)
        self.stores: dict[int, FlatStore] = {}
        for flat in flats:
            if mine := [w for w in in_flat[id(flat)] if w.fragment is not None]:
                self.stores[id(flat)] = FlatStore(flat, mine, places, in_place, scales)
        self.any_late = any(not w.learned for w in self.weights)
        self._shares, self._most_varied = np.zeros((0, 3)), 0.0  # of each weight in the regularizers' strengths
        self._pulls: dict[int, np.ndarray] = {}  # the same of each tile, by flat
        self._binned: bool | None = None  # whether the tables of tiles have bins
        self._n_held, self._n_reduced = 0, 0  # values of all bins, the first of which ranks add up
        self._n_bins = np.array([w.n_bins for w in self.weights], dtype=np.int64)
        self._scales, self._centres = (self._entries(role) for role in ("scale", "centre"))
        # Of values that lie in one piece, by where they lie: they stay there.
        self._views: dict[tuple[int, int], Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._numbers: dict[int, tuple[Tensor, tuple[Tensor, Tensor], AdamWStep]] = {}  # each flat's moments and step
        self._has_all = all(w.fragment is not None and w.fragment.numel == w.site.numel for w in self.weights)
        self._spare: list[Found] = []  # what the last step found, and what the next one fills
        self.found: Found | None = None
        self._held: Tensor | None = None  # what bins hold before the step
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

    def _values(self, entries: list[slice | int]) -> Tensor | None:
        """Return the values of a role, float32 (n_groups,) on the device of the flats; 0 where a weight has none.

        They may be a part of the state, and not a copy.
        """
        if not entries:
            return None
        values = self.state.values
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

    def plan(self, regularizer: Regularizer) -> bool:
        """Put this step's regularizers into the tables of tiles; say whether it asks for bins that no step has summed."""
        if len(self._shares) < len(self.weights):
            self._shares = np.array([regularizer.shares(w) for w in self.weights])
            self._most_varied = float(self._shares[:, 2].max(initial=0))
        obr, dampening = regularizer.strengths
        self._most_spread = obr * self._most_varied
        changes = (self._most_spread != 0) is not self._binned
        if changes:
            self._binned = self._most_spread != 0
            self._place_bins((self._shares[:, 2] != 0) & self._binned)
            self._spare.clear()
            self._held = None
        for key, store in self.stores.items():
            of_obr, damped = self._pulls[key]  # in NumPy: what PyTorch takes for as little is a share of the step
            store.table[:, Column.PULL] = obr * of_obr + dampening * damped if dampening else obr * of_obr
        return changes and self._binned

    def _place_bins(self, varied: np.ndarray) -> None:
        """Say in the tables of tiles which weights have bins, bool (weights,), and where: first those that ranks add up."""
        held = self._sizes * varied
        reduced, own = held * ~self._apart, held * self._apart
        self._n_reduced, self._n_held = int(reduced.sum()), int(held.sum())
        first = np.where(self._apart, self._n_reduced + own.cumsum() - own, reduced.cumsum() - reduced)
        for key, store in self.stores.items():
            for column, values in ((Column.BIN, first), (Column.N_BINS, self._n_bins * varied)):
                store.table[:, column] = values[store.weight_of] * store.quantized
            self._pulls[key] = self._shares.T[:2, store.weight_of] * store.quantized

    @property
    def has_bins(self) -> bool:
        return self._n_held > 0

    def gather_bins(self) -> Tensor:
        """Sum what bins hold before the step, where none before it has; return what is to be added up over ranks."""
        self._held = torch.zeros(self._n_held, dtype=torch.float64, device=self.device)
        scale, centre = self._values(self._scales), self._values(self._centres)
        for store in self.stores.values():
            shard_step.flat_bins(
                store.latents, store.state["codes"], scale, centre, store.tiles, self._held, self.backend
            )
        return self._held[: self._n_reduced]

    def step_scales(self, lr_factor: float) -> None:
        """Step the learned scales, and remember those of the images that the forward pass used."""
        plan = self.scale_plan
        before = None if plan.columns is None else self._values(self._scales).clone()
        self.scales.step(plan, lr_factor)
        self._before = (plan.before if before is None else before).to(self.device)

    def step(self, regularizer: Regularizer, tracking: TrackerStep, room: int) -> None:
        """Step the flats; `found` is what this rank finds, with `room` for other values."""
        self.found = found = self._next_found(room)
        held = found.bins if self._held is None else self._held  # none are asked for
        self._norms, squares = {}, None
        if regularizer.observed:
            pulled = (i for i in range(len(self.weights)) if self._is_pulled(i, regularizer))
            self._norms = {i: regularizer.new_norms(self.weights[i]) for i in pulled}
            squares = torch.zeros(len(self.weights), 2, dtype=torch.float64, device=self.device)
        after, centre = self._values(self._scales), self._values(self._centres)
        for key, (flat, moments, numbers) in self._numbers.items():
            store = self.stores.get(key)
            if store is None:
                parts = (flat.data, flat.grad, *moments)
                shard_step.adamw(*(part.view(-1) for part in parts), numbers, self.backend)
                continue
            shard_step.flat_step(
                store.latents, flat.grad, *moments, store.images, store.state, self._before, after, centre, held,
                self._most_spread, store.tiles, numbers, tracking, squares, found.groups, found.bins, self.backend,
            )  # fmt: skip
        for index, norms in self._norms.items():
            norms.copy_(squares[index])

    def _next_found(self, room: int) -> Found:
        """Return a buffer to fill, in which this rank's part of what ranks add up is 0."""
        if len(self._spare) == 2 and self._spare[0].room.numel() == room:
            found = self._spare.pop(0)
            if not self._has_all:
                found.added_up.zero_()
        else:
            self._spare = self._spare[-1:]
            ends = np.cumsum([room, self.n_sums, self._n_held]).tolist()
            buffer = torch.zeros(ends[-1], dtype=torch.float64, device=self.device)
            groups = buffer[room : ends[1]].view(self._kinds, self.n_groups)
            found = Found(buffer[: ends[1] + self._n_reduced], buffer[:room], groups, buffer[ends[1] :])
        self._spare.append(found)
        return found

    def _is_pulled(self, index: int, regularizer: Regularizer) -> bool:
        weight = self.weights[index]
        return weight.fragment is not None and bool(regularizer.pull(weight) or regularizer.spread(weight))

    def end(self) -> None:
        """Go on, once ranks have added up, from what was found: keep the gradients of scales, and bins."""
        self._held = self.found.bins
        self.scales.keep(self.scale_plan, self.found.groups.to(self.state.values.device), with_factor=True)

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
                shard_step.flat_image(*parts, scale, centre, store.tiles, tracking, self.found.bins, self.backend)
            store.show_images()
            found |= store.of_weights
        return found
