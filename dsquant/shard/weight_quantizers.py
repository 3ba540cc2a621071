"""LSQ with learned scales on the shards of one weight: initialisation, gradients, images, statistics.

A weight's fragments are viewed as 2-D tiles whose rows each belong to one scale group, so that one piece of code serves
every granularity and every way ZeRO slices a weight. Sums over elements are float64: they must not show the slicing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.ops.fake_quantize import pass_inside, quantize
from dsquant.shard.fragments import Fragment
from dsquant.shard.oscillation import TrackerState
from dsquant.spec import Grouping, WeightSite

MSE_TOLERANCE, MSE_ITERATIONS = 1e-5, 2000


@dataclass
class Tile:
    """View a run of a fragment as (rows, cols), row r belonging to scale group `groups[r]`."""

    start: int
    shape: tuple[int, int]
    groups: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Return the tile of a 1-D tensor laid out like the fragment."""
        rows, cols = self.shape
        return values[self.start : self.start + rows * cols].view(rows, cols)


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
    """Quantize this rank's part of one weight.

    `scale` is the (n_groups,) float32 view in QuantState, the same on every rank. A rank that owns no element of the
    weight has no fragment and still takes part in its sums.
    """

    def __init__(self, site: WeightSite, scale: Tensor, fragment: Fragment | None):
        self.site, self.fragment = site, fragment
        self.replicated_scale = scale
        self.qmin, self.qmax = site.spec.qmin, site.spec.qmax
        self.n_groups, self.n_bins = site.grouping.n_groups, 2**site.spec.n_bits
        self.device = fragment.flat.device if fragment else torch.device("cpu")
        offset, numel = (fragment.offset, fragment.numel) if fragment else (0, 0)
        self.tiles = make_tiles(offset, numel, site.grouping, self.device)
        self.tracker: TrackerState | None = None

    def scales(self) -> Tensor:
        """Return the scales on the device of the shard."""
        return self.replicated_scale.to(self.device)

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
        """Return float64 (n_groups, 2): <w, q> and <q, q> for codes q under `scale`, of this rank's part."""
        scale = scale.to(self.device)

        def rows_of(tile: Tile) -> Tensor:
            w = tile.of(self.fragment.values)
            q = quantize(w, scale[tile.groups].unsqueeze(1), None, self.qmin, self.qmax)
            return torch.stack([(w * q).sum(1, dtype=torch.float64), q.square().sum(1, dtype=torch.float64)], dim=1)

        found = self.group_sums(rows_of)
        return torch.zeros(self.n_groups, 2, dtype=torch.float64) if found is None else found

    def lsq_tile(self, tile: Tile, w: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        """Mask `grad` by the straight-through rule in place and return float64 row sums of d scale.

        d scale = sum G * (code - v inside, qmin below, qmax above) with v = w / scale; the codes are those of the image
        that the forward pass used.
        """
        v, codes = w / scale, tile.of(self.tracker.codes)
        passed = pass_inside(grad, v, self.qmin, self.qmax)
        d_scale = torch.sub(codes, v.clamp_(self.qmin, self.qmax), out=v).mul_(grad).addcmul_(grad - passed, codes)
        if self.tracker.frozen is not None:  # the image of a frozen weight is scale * code, and its code is a constant
            frozen = tile.of(self.tracker.frozen)
            d_scale = torch.where(frozen, codes * grad, d_scale)
            passed.masked_fill_(frozen, 0.0)
        grad.copy_(passed)
        return d_scale.sum(1, dtype=torch.float64)

    def image_tile(self, tile: Tile, latent: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes float32, w_hat float32) of a tile; frozen weights keep their code, and their latent its centre."""
        codes = quantize(latent, scale, None, self.qmin, self.qmax)
        if self.tracker is not None and self.tracker.frozen is not None:
            frozen = tile.of(self.tracker.frozen)
            codes = torch.where(frozen, tile.of(self.tracker.codes).float(), codes)
            latent.copy_(torch.where(frozen, codes * scale, latent))
        return codes, codes * scale

    def statistics(self, latent: Tensor, threshold: float) -> Tensor:
        """Return float64 counts of this rank's part: oscillating, frozen, clipped, then one a bin."""
        counts = torch.zeros(3 + self.n_bins, dtype=torch.float64, device=self.device)
        if not self.tiles:
            return counts
        state, scales = self.tracker, self.scales()
        counts[0] = (state.frequency > threshold).sum()
        counts[1] = state.frozen.sum() if state.frozen is not None else 0
        for tile in self.tiles:
            v = tile.of(latent) / scales[tile.groups].unsqueeze(1)
            counts[2] += ((v < self.qmin) | (v > self.qmax)).sum()
        counts[3:] = torch.bincount(state.codes.to(torch.int64) - self.qmin, minlength=self.n_bins)
        return counts


def mse_scales(
    weights: list[ShardedWeight], all_sum: Callable[[Tensor], Tensor], all_max: Callable[[Tensor], Tensor],
    floor: float,
) -> list[Tensor]:  # fmt: skip
    """Return, for each weight, the (n_groups,) float32 scales that minimise ||w - s q(w, s)||^2 from max|w| / qmax on.

    Fixed point: q = round(clip(w / s)), s = <w, q> / <q, q>, until every scale moves by less than 1e-5 of itself; sums
    over shards in float64. Source: method of the authors' code (Quantization Variation, initialisation).
    """
    sizes = [w.n_groups for w in weights]
    biggest = all_max(torch.cat([w.absolute_max().cpu() for w in weights]))
    scales = [m / w.qmax for m, w in zip(biggest.split(sizes), weights, strict=True)]
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
