"""Weight quantizers on the shards of one weight: initialisation, gradients, images, statistics.

One piece of code serves every method: `spec.Levels` says where the levels are and how far the gradient passes, and a
scale is either learned or, for StatsQ and BWN, a statistic of the latents that every step takes anew.

A weight's fragments are viewed as 2-D tiles whose rows each belong to one scale group, so that one piece of code serves
every granularity and every way ZeRO slices a weight. Sums over elements are float64: they must not show the slicing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.fake_quantize import pass_inside, quantize
from dsquant.ops.shard_step import Column
from dsquant.shard.fragments import Fragment
from dsquant.shard.oscillation import TrackerState
from dsquant.spec import LEARNED, Grouping, WeightSite

MSE_TOLERANCE, MSE_ITERATIONS = 1e-5, 2000


@dataclass
class Tile:
    """View a run of a fragment as (rows, cols), row r belonging to scale group `groups[r]`."""

    start: int
    shape: tuple[int, int]
    groups: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Return the tile of a 1-D tensor laid out like the fragment."""
        numel = self.shape[0] * self.shape[1]
        run = values if values.numel() == numel else values[self.start : self.start + numel]
        return run.view(self.shape)


def make_tiles(offset: int, numel: int, grouping: Grouping, device: torch.device) -> list[Tile]:
    """Cut elements [offset, offset + numel) of a weight into tiles: a partial run, whole runs, a partial run."""
    if numel == 0:
        return []
    n_groups, inner = grouping.n_groups, grouping.inner
    if n_groups == 1:
        return [Tile(0, (1, numel), torch.zeros(1, dtype=torch.int64, device=device))]
    run, head = divmod(offset, inner)
    head = min(numel, (inner - head) % inner)
    rows, tail = divmod(numel - head, inner)
    tiles, start = [], 0
    for count, cols in ((1, head), (rows, inner), (1, tail)):
        if count and cols:
            groups = (torch.arange(run, run + count, device=device)) % n_groups
            tiles.append(Tile(start, (count, cols), groups))
            start += count * cols
            run += count
    return tiles


class ShardedWeight:
    """Quantize this rank's part of one weight, in native code where its device has it: `backend`.

    `scale` is the (n_groups,) float32 view in QuantState, the same on every rank, and so is `centre`, which only BWN has:
    the mean that its codes are decided around. A rank that owns no element of the weight has no fragment and still takes
    part in its sums.
    """

    def __init__(self, site: WeightSite, scale: Tensor, fragment: Fragment | None, centre: Tensor | None = None):
        self.site, self.fragment = site, fragment
        self.replicated_scale, self.replicated_centre = scale, centre
        self.levels = site.spec.levels
        self.learned = site.spec.method in LEARNED
        self.qmin, self.qmax = self.levels.qmin, self.levels.qmax
        self.n_groups, self.n_bins = site.grouping.n_groups, 2**site.spec.n_bits
        self.device = fragment.flat.device if fragment else torch.device("cpu")
        offset, numel = (fragment.offset, fragment.numel) if fragment else (0, 0)
        self.tiles = make_tiles(offset, numel, site.grouping, self.device)
        self.tracker: TrackerState | None = None
        self.backend = backends.choose("shard_step", self.device.type)

    def table_rows(self, start: int, tracked: int, index: int, group: int) -> list[list[float]]:
        """Return the rows of this part's tiles in the table of a flat, where it begins at `start`, beside a tracker at `tracked`.

        `index` is the weight's number, and `group` where its groups begin. Bins and pull are those of a step.
        """
        rows, levels = [], self.levels
        for tile in self.tiles:
            row = [0.0] * len(Column)
            row[Column.START], row[Column.STATE] = start + tile.start, tracked + tile.start
            row[Column.ROWS], row[Column.COLS] = tile.shape
            row[Column.FIRST_GROUP], row[Column.N_GROUPS] = int(tile.groups[0]), self.n_groups
            row[Column.GROUP], row[Column.WEIGHT] = group, index
            row[Column.QMIN], row[Column.QMAX], row[Column.SHIFT] = levels.qmin, levels.qmax, levels.shift
            row[Column.LOW], row[Column.HIGH] = levels.low, levels.high
            row[Column.PLAIN], row[Column.LATE] = levels.elastic or not self.learned, not self.learned
            rows.append(row)
        return rows

    @cached_property
    def own_table(self) -> Tensor:
        """Return the table of a flat that is this part alone, whose image is made late."""
        table = torch.tensor(self.table_rows(0, 0, 0, 0), dtype=torch.float64)
        table[:, Column.LATE] = 1
        return table

    def scales(self) -> Tensor:
        """Return the scales on the device of the shard."""
        return self.replicated_scale.to(self.device)

    def centres(self) -> Tensor | None:
        """Return the centres, where the method has them, on the device of the shard."""
        return None if self.replicated_centre is None else self.replicated_centre.to(self.device)

    @property
    def gradient(self) -> Tensor:
        """Return this rank's part of the gradient, 1-D."""
        return self.fragment.of(self.fragment.flat.grad)

    def around_centre(self, tile: Tile, w: Tensor) -> Tensor:
        """Return w less the mean of its group for BWN, and w itself otherwise."""
        centres = self.centres()
        return w if centres is None else w - centres[tile.groups].unsqueeze(1)

    def group_sums(self, rows_of: Callable[[Tile], Tensor]) -> Tensor:
        """Add up (rows, k) float64 results of each tile into (n_groups, k)."""
        totals = None
        for tile in self.tiles:
            rows = rows_of(tile)
            if totals is None:
                totals = torch.zeros(self.n_groups, rows.shape[1], dtype=torch.float64, device=rows.device)
            totals.index_add_(0, tile.groups, rows)
        return totals

    def absolute_max(self) -> Tensor:
        """Return max |w| of each group in this rank's part, (n_groups,) float32."""
        found = torch.zeros(self.n_groups, device=self.device)
        for tile in self.tiles:
            row_max = tile.of(self.fragment.values).abs().amax(dim=1)
            found.scatter_reduce_(0, tile.groups, row_max, "amax")
        return found

    def mse_sums(self, scale: Tensor) -> Tensor:
        """Return float64 (n_groups, 2): <w, q> and <q, q> for levels q under `scale`, of this rank's part."""
        scale = scale.to(self.device)

        def rows_of(tile: Tile) -> Tensor:
            w = tile.of(self.fragment.values)
            q = quantize(w, scale[tile.groups].unsqueeze(1), None, self.levels).add_(self.levels.shift)
            return torch.stack([(w * q).sum(1, dtype=torch.float64), q.square().sum(1, dtype=torch.float64)], dim=1)

        found = self.group_sums(rows_of)
        return torch.zeros(self.n_groups, 2, dtype=torch.float64) if found is None else found

    def moment_sums(self) -> Tensor:
        """Return float64 (n_groups, 3): sums of |w|, w and w^2 over this rank's part."""

        def rows_of(tile: Tile) -> Tensor:
            w = tile.of(self.fragment.values).double()
            return torch.stack([w.abs().sum(1), w.sum(1), w.square().sum(1)], dim=1)

        found = self.group_sums(rows_of)
        return torch.zeros(self.n_groups, 3, dtype=torch.float64) if found is None else found

    def lsq_tile(self, tile: Tile, w: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """Mask `grad` by the straight-through rule in place and return float64 row sums of d scale.

        d scale = sum G * (w_hat - w inside, w_hat outside) / scale, or G * w_hat / scale throughout for an elastic grid, with
        w_hat = scale * level the image that the forward pass used. A scale that is a statistic has no gradient.
        """
        v, image = w / scale, self.level(tile) * scale
        passed, within = pass_inside(grad, v, self.levels), pass_inside(w, v, self.levels)
        if self.tracker.frozen is not None:  # a frozen weight's level is a constant
            frozen = tile.of(self.tracker.frozen)
            passed.masked_fill_(frozen, 0.0)
            within.masked_fill_(frozen, 0.0)
        if self.learned and not self.levels.elastic:
            image -= within
        d_scale = image.mul_(grad).sum(1, dtype=torch.float64)
        grad.copy_(passed)
        return d_scale / scale.view(-1)

    def level(self, tile: Tile) -> Tensor:
        """Return code + shift of a tile, in units of the scale."""
        codes = tile.of(self.tracker.codes)
        return codes + self.levels.shift if self.levels.shift else codes

    def image_tile(self, tile: Tile, latent: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes float32, w_hat float32) of a tile; frozen weights keep their code, and their latent its centre."""
        codes = quantize(self.around_centre(tile, latent), scale, None, self.levels)
        frozen = None
        if self.tracker is not None and self.tracker.frozen is not None:
            frozen = tile.of(self.tracker.frozen)
            codes = torch.where(frozen, tile.of(self.tracker.codes).float(), codes)
        image = (codes + self.levels.shift) * scale if self.levels.shift else codes * scale
        if frozen is not None:
            latent.copy_(torch.where(frozen, image, latent))
        return codes, image

    def statistics(self, latent: Tensor, threshold: float) -> Tensor:
        """Return float64 counts of this rank's part: oscillating, frozen, clipped, then one a bin."""
        counts = torch.zeros(3 + self.n_bins, dtype=torch.float64, device=self.device)
        if not self.tiles:
            return counts
        state, scales = self.tracker, self.scales()
        counts[0] = (state.frequency > threshold).sum()
        counts[1] = state.frozen.sum() if state.frozen is not None else 0
        for tile in self.tiles:
            v = self.around_centre(tile, tile.of(latent)) / scales[tile.groups].unsqueeze(1)
            counts[2] += ((v < self.levels.low) | (v > self.levels.high)).sum()
        counts[3:] = torch.bincount(state.codes.to(torch.int64) - self.qmin, minlength=self.n_bins)
        return counts


def mse_scales(
    weights: list[ShardedWeight], all_sum: Callable[[Tensor], Tensor], all_max: Callable[[Tensor], Tensor],
    floor: float,
) -> list[Tensor]:  # fmt: skip
    """Return, for each weight, the (n_groups,) float32 scales that minimise ||w - s q(w, s)||^2 from max|w| / high on.

    Fixed point: q the levels of w / s, s = <w, q> / <q, q>, until every scale moves by less than 1e-5 of itself; sums
    over shards in float64. Source: method of the authors' code (Quantization Variation, initialisation).
    """
    if not weights:  # every scale is a statistic
        return []
    sizes = [w.n_groups for w in weights]
    biggest = all_max(torch.cat([w.absolute_max().cpu() for w in weights]))
    scales = [m / w.levels.high for m, w in zip(biggest.split(sizes), weights, strict=True)]
    scales = [s.clamp(min=floor) for s in scales]
    active = list(range(len(weights)))
    for _ in range(MSE_ITERATIONS):
        sums = all_sum(torch.cat([weights[i].mse_sums(scales[i]).cpu().view(-1) for i in active]))
        still = []
        for i, part in zip(active, sums.split([2 * sizes[i] for i in active]), strict=True):
            wq, qq = part.view(-1, 2).unbind(1)
            new = torch.where(qq > 0, wq / qq.clamp(min=1e-300), scales[i].double()).float().clamp(min=floor)
            if bool(((new - scales[i]).abs() >= MSE_TOLERANCE * scales[i]).any()):
                still.append(i)
            scales[i] = new
        active = still
        if not active:
            break
    return scales


def moment_scales(weight: ShardedWeight, sums: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Return float32 (n_groups,) scale and mean of a weight from its sums of |w|, w and w^2 over all shards.

    lsq: 2 mean|w| / sqrt(qmax) (Esser et al. 2020). lsq_plus: max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1) (Bhalgat et
    al. 2020, weights). statistic: 2 mean|w| / 2^(b-1), which is StatsQ's (OFQ) and at 1 bit BWN's step 2 mean|w|.
    """
    n = weight.site.numel // weight.n_groups
    mean_abs, mean, mean_square = (sums / n).unbind(1)
    if rule == "lsq":
        scale = 2 * mean_abs / weight.site.spec.grad_qmax**0.5
    elif rule == "lsq_plus":
        sigma = (mean_square - mean.square()).clamp(min=0).sqrt()
        scale = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / half_of(weight)
    else:
        scale = statistic_scale(mean_abs, half_of(weight))
    return scale.float(), mean.float()


def half_of(weight: ShardedWeight) -> int:
    """Return half the number of a weight's levels."""
    return 2 ** (weight.site.spec.n_bits - 1)


def statistic_scale(mean_abs: Tensor, half: Tensor | int) -> Tensor:
    """Return the scale that StatsQ and BWN take from mean |w|, for half that number of levels."""
    return 2 * mean_abs / half
