"""Oscillation-aware bin regularization (OBR) in closed form, on shards.

L = sum_m [ agg((sg[w_q] - w_c)^2) + sum_bins Var(w_c in the bin) ] with w_c = clip(w, s qmin, s qmax), w_q its rounding.
Gradient of an unclipped weight in bin k of scale group g: 2 (w - s k) * a + 2 (w - mu_gk) / (n_gk - 1), zero where
clipped; a = 1 for `sum` (the paper), 1 / numel for `mean` (the authors' code). The gradient that would reach the scale
through clipped weights is stopped: the regularizer is to move weights within bins, not the bins.
Source: "Quantization Variation" (TMLR 2024), section 4.3.
"""

import math

import torch
from torch import Tensor

from dsquant.config import ObrConfig
from dsquant.ops.fake_quantize import pass_inside


def obr_weight(config: ObrConfig, progress: float) -> float:
    """Return lambda at a share of the stage: 0 before `start`, then a cosine rise to `weight`."""
    if config.weight == 0 or progress < config.start:
        return 0.0
    t = (progress - config.start) / max(1e-12, 1 - config.start)
    return config.weight * 0.5 * (1 - math.cos(math.pi * min(1.0, t)))


def bin_index(codes: Tensor, groups: Tensor, qmin: int, n_bins: int) -> Tensor:
    """Return int64 `group * n_bins + code - qmin` of a (rows, cols) tile whose rows belong to `groups` (rows,)."""
    return codes.to(torch.int64).add_((groups * n_bins - qmin).unsqueeze(1))


def bin_sums(w_clipped: Tensor, index: Tensor, size: int) -> Tensor:
    """Return float64 (2, size): how many weights each bin holds, and the sum of their clipped values."""
    flat, values = index.view(-1), w_clipped.reshape(-1).double()
    if flat.device.type == "cpu":
        return torch.stack(
            [torch.bincount(flat, minlength=size).double(), torch.bincount(flat, values, minlength=size)]
        )
    sums = torch.zeros(2, size, dtype=torch.float64, device=flat.device)  # bincount would wait for the device
    sums[0].index_add_(0, flat, torch.ones_like(values))
    sums[1].index_add_(0, flat, values)
    return sums


def add_obr_gradient(
    grad: Tensor, w: Tensor, scale: Tensor, codes: Tensor, limits: tuple[int, int], index: Tensor, sums: Tensor,
    config: ObrConfig, weight: float, numel: int,
) -> None:  # fmt: skip
    """Add `weight` times the closed-form OBR gradient of a tile to `grad`, in place.

    grad, w: (rows, cols) float32; scale (rows, 1); codes int8 like w; limits (qmin, qmax); index from `bin_index`; sums
    (2, bins) over the whole weight, all shards; numel: elements that `mean` divides by (a third of a fused q, k, v).
    """
    a = 2 * weight * config.mse_weight / (1 if config.aggregation == "sum" else numel)
    pull = torch.sub(w, codes * scale).mul_(a)
    if config.variance_weight:
        counts, totals = sums
        mean = (totals / counts.clamp(min=1)).float()
        factor = torch.where(counts > 1, 2 * weight * config.variance_weight / (counts - 1).clamp(min=1), 0.0).float()
        flat = index.view(-1)  # index_select: a table look-up by `[]` is ten times slower on CPU
        pull.addcmul_(w - mean.index_select(0, flat).view_as(w), factor.index_select(0, flat).view_as(w))
    grad.add_(pass_inside(pull, w / scale, *limits))


def obr_loss(w_clipped: Tensor, w_quantized: Tensor, index: Tensor, size: int, config: ObrConfig) -> Tensor:
    """Return the OBR value of a whole weight, float64; the shard step uses its gradient only, tests use both."""
    difference = (w_quantized - w_clipped).double().square()
    loss = config.mse_weight * (difference.sum() if config.aggregation == "sum" else difference.mean())
    counts, totals = bin_sums(w_clipped, index, size)
    deviation = (w_clipped.double() - (totals / counts.clamp(min=1))[index]).square()
    spread = torch.zeros(size, dtype=torch.float64).index_add_(0, index.view(-1), deviation.view(-1))
    return loss + config.variance_weight * (spread / (counts - 1).clamp(min=1)).sum()
