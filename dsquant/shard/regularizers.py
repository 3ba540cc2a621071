"""Oscillation-aware bin regularization (OBR) and dampening in closed form, on shards.

L = sum_m [ agg((sg[w_q] - w_c)^2) + sum_bins Var(w_c in the bin) ] with w_c = clip(w, s low, s high), w_q its image.
Gradient of an unclipped weight in bin k of scale group g: 2 (w - s k) * a + 2 (w - mu_gk) / (n_gk - 1), zero where
clipped; a = 1 for `sum` (the paper), 1 / numel for `mean` (the authors' code), rows / numel for `kernel_mean`. Dampening is
the first term alone. The gradient that would reach the scale through clipped weights is stopped: the regularizer is to
move weights within bins, not the bins.
Sources: "Quantization Variation" (TMLR 2024), section 4.3; Nagel et al. 2022, section 4.1.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsquant.config import DampeningConfig, ObrConfig
from dsquant.ops.fake_quantize import pass_inside
from dsquant.spec import Levels

if TYPE_CHECKING:
    from dsquant.shard.weight_quantizers import ShardedWeight, Tile

PARTS = 2.0**22  # of a scale, in which bins are summed
NEAR = 15.0


def regularizer_weight(config: ObrConfig | DampeningConfig, progress: float) -> float:
    """Return lambda at a share of the stage: 0 before `start`, then a cosine rise to `weight`."""
    if config.weight == 0 or progress < config.start:
        return 0.0
    t = (progress - config.start) / max(1e-12, 1 - config.start)
    return config.weight * 0.5 * (1 - math.cos(math.pi * min(1.0, t)))


def bin_index(codes: Tensor, groups: Tensor, qmin: int, n_bins: int) -> Tensor:
    """Return int64 `group * n_bins + code - qmin` of a (rows, cols) tile whose rows belong to `groups` (rows,)."""
    return codes.to(torch.int64).add_((groups * n_bins - qmin).unsqueeze(1))


def in_parts(w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Return w / scale, clipped as the gradient is, in whole parts of 2^-22: their sums are exact, in any order.

    scale is (rows, 1); where nothing clips, values beyond 15 scales count as 15. A product, not a quotient: w (2^22 / scale).
    """
    low = -NEAR if levels.low == -math.inf else levels.low
    high = NEAR if levels.high == math.inf else levels.high
    return (w * (PARTS / scale)).clamp_(low * PARTS, high * PARTS).round_()


def bin_sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return float64 (2, size): how many weights each bin holds, and the sum of their values."""
    flat, values = index.view(-1), values.reshape(-1).double()
    if flat.device.type == "cpu":
        return torch.stack(
            [torch.bincount(flat, minlength=size).double(), torch.bincount(flat, values, minlength=size)]
        )
    sums = torch.zeros(2, size, dtype=torch.float64, device=flat.device)  # bincount would wait for the device
    sums[0].index_add_(0, flat, torch.ones_like(values))
    sums[1].index_add_(0, flat, values)
    return sums


def divisor(aggregation: str, numel: int, rows: int) -> int:
    """Return what a sum over a weight is divided by: 1 (sum), numel (mean), or numel / rows (kernel_mean)."""
    return {"sum": 1, "mean": numel, "kernel_mean": numel // rows}[aggregation]


def regularizer_gradient(
    w: Tensor, scale: Tensor, level: Tensor, levels: Levels, index: Tensor, sums: Tensor, pull: float, spread: float
) -> Tensor:
    """Return the closed-form gradient of `pull * sum (w_hat - w_c)^2 + spread * sum_bins Var(w_c in the bin)` for a tile.

    w, level (code + shift): (rows, cols); scale (rows, 1); index from `bin_index` and sums (2, bins) of `in_parts` over
    the whole weight, all shards, both read only where `spread` is not 0. Zero where the gradient of w does not pass.
    """
    if spread:
        # 2 pull (w - w_hat) + factor (w - mean) = strength w - goal, of which each bin of a group has one pair
        flat = index.view(-1)  # index_select: a table look-up by `[]` is ten times slower on CPU
        mean, factor = (table.index_select(0, flat).view_as(w) for table in bin_tables(sums, spread))
        scale64 = scale.double()
        strength = (factor + 2 * pull).float()
        goal = (level.double() * scale64 * (2 * pull) + mean * (scale64 / PARTS) * factor).float()
        found = torch.addcmul(goal.neg_(), w, strength)
    else:
        found = torch.sub(w, level * scale).mul_(2 * pull)
    return pass_inside(found, w / scale, levels)


def bin_tables(sums: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Return float64 (bins,): the mean of each bin, in parts of a scale, and the factor of `w - mean` in the gradient of its
    variance.
    """
    counts, totals = sums
    mean = totals / counts.clamp(min=1)
    return mean, torch.where(counts > 1, 2 * spread / (counts - 1).clamp(min=1), 0.0)


def obr_loss(w_clipped: Tensor, w_quantized: Tensor, index: Tensor, size: int, config: ObrConfig) -> Tensor:
    """Return the OBR value of a whole weight, float64; the shard step uses its gradient only, tests use both."""
    difference = (w_quantized - w_clipped).double().square()
    loss = config.mse_weight * difference.sum() / divisor(config.aggregation, w_clipped.numel(), w_clipped.shape[0])
    counts, totals = bin_sums(w_clipped, index, size)
    deviation = (w_clipped.double() - (totals / counts.clamp(min=1))[index]).square()
    spread = torch.zeros(size, dtype=torch.float64).index_add_(0, index.view(-1), deviation.view(-1))
    return loss + config.variance_weight * (spread / (counts - 1).clamp(min=1)).sum()


class Regularizer:
    """Add the gradient of OBR and dampening to that of the task, at the strength of a step.

    `norms` are float64 (2,), by weight, of the last observed step: the squared norms, over this rank's part, of the task's
    gradient once masked and of the regularizers'.
    """

    def __init__(self, obr: ObrConfig, dampening: DampeningConfig):
        self.obr, self.dampening = obr, dampening
        self.strengths = 0.0, 0.0  # lambda of OBR and of dampening at this step
        self.observed = False  # whether this step measures norms
        self.norms: dict[str, Tensor] = {}

    def begin_step(self, progress: float, observe: bool) -> None:
        """Fix the strengths at a share of the stage; `observe` has this step measure norms."""
        self.strengths = regularizer_weight(self.obr, progress), regularizer_weight(self.dampening, progress)
        self.observed = observe
        if observe:
            self.norms.clear()

    def shares(self, weight: "ShardedWeight") -> tuple[float, float, float]:
        """Return what a weight takes of the strengths: of OBR's and of dampening's for the factor of (w_hat - w)^2, and of OBR's
        for that of its variance term.
        """
        site, n_bits = weight.site, weight.site.spec.n_bits
        numel, rows = site.numel // site.fused, site.shape[0] // site.fused
        by_obr, damped = n_bits <= self.obr.max_bits, n_bits <= self.dampening.max_bits
        return (
            self.obr.mse_weight / divisor(self.obr.aggregation, numel, rows) if by_obr else 0.0,
            1 / divisor(self.dampening.aggregation, numel, rows) if damped else 0.0,
            self.obr.variance_weight if by_obr else 0.0,
        )

    def spread(self, weight: "ShardedWeight") -> float:
        """Return the factor of the variance term of OBR at this step; 0 where it is off for this weight."""
        return self.strengths[0] * self.shares(weight)[2]

    def pull(self, weight: "ShardedWeight") -> float:
        """Return the factor of (w_hat - w)^2 at this step, of OBR and of dampening together."""
        of_obr, damped, _ = self.shares(weight)
        return self.strengths[0] * of_obr + self.strengths[1] * damped

    def add(self, weight: "ShardedWeight", bins: Tensor) -> None:
        """Add to this rank's gradient of a weight; `bins` (2, n_groups * n_bins) are over all shards, (2, 0) without spread."""
        pull, spread = self.pull(weight), self.spread(weight)
        if not (pull or spread) or weight.fragment is None:
            return
        bins, norms = bins.to(weight.device), self.new_norms(weight)
        for tile in weight.tiles:
            found, grad = self._tile(weight, tile, bins, pull, spread), tile.of(weight.gradient)
            if norms is not None:
                norms += torch.stack([grad.double().square().sum(), found.double().square().sum()])
            grad.add_(found)

    def new_norms(self, weight: "ShardedWeight") -> Tensor | None:
        """Return where a weight's squared norms of this step are to be added up, or None where it is not observed."""
        if not self.observed:
            return None
        found = self.norms[weight.site.name] = torch.zeros(2, dtype=torch.float64, device=weight.device)
        return found

    def _tile(self, weight: "ShardedWeight", tile: "Tile", bins: Tensor, pull: float, spread: float) -> Tensor:
        scale = weight.scales()[tile.groups].unsqueeze(1)
        w = weight.around_centre(tile, tile.of(weight.fragment.values))
        codes = tile.of(weight.tracker.codes)
        index = bin_index(codes, tile.groups, weight.qmin, weight.n_bins) if spread else codes
        found = regularizer_gradient(w, scale, weight.level(tile), weight.levels, index, bins, pull, spread)
        if weight.tracker.frozen is not None:
            found.masked_fill_(tile.of(weight.tracker.frozen), 0.0)
        return found
