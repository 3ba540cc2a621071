"""Validation: loss, top-1 and the metrics of GLUE over a set of shards, on one rank or all."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsquant.config import DataConfig
from dsquant.data import EvalStream, Tokenize, build_transform
from dsquant.models import logits_of, move

METRICS = ("f1", "matthews", "pearson_spearman")


def transform_of(
    config: DataConfig, train: bool, tokenizer: Any = None, replace: Callable[[Tensor], Tensor] | None = None
):
    """Build what turns samples into a model's inputs: an image transform, or the tokenizer of a folder for text.

    replace: what is then done to a sentence's tokens.
    """
    if config.task == "text":
        return Tokenize(tokenizer, config.max_length, config.pad_to, replace)
    return build_transform(
        image_size=config.image_size,
        channels=config.channels,
        train=train,
        augment=config.augment,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )


def score_name(config: DataConfig) -> str:
    """Return the key of the result that stands for a model in summaries: top1 for accuracy, else the metric."""
    return "top1" if config.metric == "accuracy" else config.metric


class Scores:
    """Add up what a model says about labelled batches, without reading anything back before the end."""

    def __init__(self, metric: str, device: torch.device | str):
        self.metric = metric
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.kept: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take logits (B, C) and labels (B,); rows with label -1, or NaN among scores, are padding and do not count."""
        logits = logits.float()
        if labels.is_floating_point():
            real, predicted = ~labels.isnan(), logits.squeeze(-1)
            loss = (predicted - labels).square().where(real, 0.0).sum()
            right = torch.zeros_like(loss)
        else:
            real, predicted = labels >= 0, logits.argmax(dim=-1)
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            right = ((predicted == labels) & real).sum()
        self.sums += torch.stack([loss.double(), right.double(), real.sum().double()])
        if self.metric in METRICS:
            self.kept.append(torch.stack([predicted.double(), labels.double(), real.double()]))

    def result(self) -> dict[str, float | int]:
        """Return `loss`, `samples`, `top1` (%) for classes, and the metric (%), over all ranks; each calls this."""
        sums, kept = self.sums, torch.cat(self.kept, dim=1) if self.kept else None
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            if kept is not None:
                parts = [torch.empty_like(kept) for _ in range(dist.get_world_size())]  # as many rows on every rank
                dist.all_gather(parts, kept)
                kept = torch.cat(parts, dim=1)
        loss, right, samples = sums.tolist()
        found = {"loss": loss / samples, "samples": int(samples)}
        if self.metric != "pearson_spearman":
            found = {"top1": 100 * right / samples, **found}
        if kept is not None:
            predicted, labels = kept[:2, kept[2] > 0].cpu().numpy()
            found |= glue_metric(self.metric, predicted, labels)
        return found


def glue_metric(metric: str, predicted, labels) -> dict[str, float]:
    """Return a metric of GLUE in %, by scikit-learn or SciPy: f1 (of class 1), matthews, or pearson_spearman, their mean.

    A model that says the same of every sample correlates with nothing: 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    if metric == "f1":
        return {"f1": 100 * float(f1_score(labels, predicted, zero_division=0.0))}
    if metric == "matthews":
        return {"matthews": 100 * float(matthews_corrcoef(labels, predicted))}
    pearson = spearman = 0.0
    if predicted.min() < predicted.max() and labels.min() < labels.max():
        pearson, spearman = (100 * float(r(predicted, labels).statistic) for r in (pearsonr, spearmanr))
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


@torch.no_grad()
def evaluate(
    model: nn.Module, stream: EvalStream, scores: Scores, device: torch.device | str, dtype: torch.dtype,
    after_batch: Callable[[], None] = lambda: None,
) -> Scores:  # fmt: skip
    """Run a model in evaluation mode over a rank's batches of validation samples, add them to `scores`, and return these.

    Whatever `after_batch` raises ends the evaluation.
    """
    for inputs, labels in stream.batches():
        scores.add(logits_of(model, move(inputs, device, dtype)), labels.to(device))
        after_batch()
    return scores
