"""What a run records of its weights: how many oscillate, are frozen or clipped, and where they lie."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsquant.shard.weight_quantizers import ShardedWeight

SHOWN_SCALES = 1024


def weight_statistics(
    weights: list[ShardedWeight], latents: dict[str, Tensor], norms: dict[str, Tensor], threshold: float, contributes: bool,
    all_sum: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, float | list[float]]]:  # fmt: skip
    """Return, for each weight over all shards: oscillating, frozen and clipped %, scales and bin occupancy.

    Of more than 1024 scales (the rows of a word embedding) only the smallest, the mean and the largest are given. Where the
    last step was observed (`norms`, of the task's gradient and the regularizers', squared, by weight), `regularizer_ratio` is
    the norm of the regularizers' gradient over the task's.

    Args:
        latents: this rank's part of each weight that it has one of.
        threshold: frequency above which a weight oscillates, as a tracker keeps it (over `TrackerStep.left`).
        contributes: whether this rank's parts count, which replicas but the first do not.
        all_sum: adds up a tensor over all ranks.
    """
    none = torch.zeros(2, dtype=torch.float64)
    counts = [
        torch.cat([norms.get(w.site.name, none).cpu(), w.statistics(latents.get(w.site.name), threshold).cpu()])
        for w in weights
    ]
    if not contributes:
        counts = [torch.zeros_like(c) for c in counts]
    totals = all_sum(torch.cat(counts)).split([c.numel() for c in counts])
    return {weight.site.name: _of(weight, total) for weight, total in zip(weights, totals, strict=True)}


def _of(weight: ShardedWeight, total: Tensor) -> dict[str, float | list[float]]:
    task, regularizer = total[:2].sqrt().tolist()
    share = (total[2:] / weight.site.numel).tolist()
    found = {
        "oscillating_pct": 100 * share[0],
        "frozen_pct": 100 * share[1],
        "clip_ratio": share[2],
        "bins": share[3:],
        "scale": _shown(weight.replicated_scale),
        "qmin": weight.qmin,
        "numel": weight.site.numel,
        "n_bits": weight.site.spec.n_bits,
    }
    return found | ({"regularizer_ratio": regularizer / max(task, 1e-30)} if regularizer else {})


def _shown(scale: Tensor) -> list[float]:
    few = scale if scale.numel() <= SHOWN_SCALES else torch.stack([scale.min(), scale.mean(), scale.max()])
    return few.tolist()
