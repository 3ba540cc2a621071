"""Leave-one-out sensitivity: what a model gets back when one module stays in float, and loses when only it is quantized.

Source: "Quantization Variation" (TMLR 2024), section 4.1: all modules but one quantized; a larger recovery says that the
module is more sensitive. Differences are taken sample by sample, so that their standard error is that of paired samples.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from dsquant.analysis.modules import Module
from dsquant.analysis.subject import Scores, Subject
from dsquant.analysis.variants import Variants

DIFFERENCES = ("recovery_loss", "recovery_top1", "recovery_kl", "harm_loss", "harm_top1", "harm_kl")
Progress = Callable[[Iterable[Module]], Iterable[Module]]


def leave_one_out(
    variants: Variants, subject: Subject, modules: list[Module], progress: Progress = lambda modules: modules
) -> dict[str, Any]:
    """Measure every module both ways and return a JSON-ready result.

    recovery_loss = loss(all quantized) - loss(all but it); recovery_top1 = top1(all but it) - top1(all quantized);
    harm_loss = loss(only it quantized) - loss(float); harm_top1 = top1(float) - top1(only it). recovery_kl and harm_kl
    are the same of KL(float || variant), which knows no labels and so has no lucky errors. `*_se` are standard errors.
    Losses and KL in nats, top-1 in percent. `kinds` holds the means over blocks.
    """
    everything = variants.everything
    variants.quantize_only(())
    in_float = subject.scores(variants.model)
    variants.quantize_only(everything)
    quantized = subject.scores(variants.model)
    rows = []
    for module in progress(modules):
        variants.quantize_all_but(module.parts)
        without = subject.scores(variants.model)
        variants.quantize_only(module.parts)
        only = subject.scores(variants.model)
        rows.append(_row(module, in_float, quantized, without, only))
    return {
        "subject": subject.name,
        "samples": len(in_float.losses),
        "n_bits": sorted({s.spec.n_bits for s in [*variants.sites.weights, *variants.sites.activations]}),
        "float": in_float.summary(),
        "quantized": quantized.summary(),
        "modules": rows,
        "kinds": by_kind(rows),
    }


def _row(module: Module, in_float: Scores, quantized: Scores, without: Scores, only: Scores) -> dict[str, Any]:
    recovery, recovery_se = mean_and_error(quantized.losses - without.losses)
    harm, harm_se = mean_and_error(only.losses - in_float.losses)
    recovery_kl, recovery_kl_se = mean_and_error(in_float.divergence(quantized) - in_float.divergence(without))
    harm_kl, harm_kl_se = mean_and_error(in_float.divergence(only))
    return {
        "name": module.name,
        "kind": module.kind,
        "block": module.block,
        "parts": [
            part.site if part.rows is None else f"{part.site}[{part.rows[0]}:{part.rows[1]}]"
            for part in sorted(module.parts, key=str)
        ],
        "all_but_it": without.summary(),
        "only_it": only.summary(),
        "recovery_loss": recovery,
        "recovery_loss_se": recovery_se,
        "recovery_top1": without.top1 - quantized.top1,
        "recovery_kl": recovery_kl,
        "recovery_kl_se": recovery_kl_se,
        "harm_loss": harm,
        "harm_loss_se": harm_se,
        "harm_top1": in_float.top1 - only.top1,
        "harm_kl": harm_kl,
        "harm_kl_se": harm_kl_se,
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values (N,) and its standard error, std / sqrt(N); of differences, that of paired samples."""
    n = len(values)
    return float(values.mean()), float(values.std()) / n**0.5 if n > 1 else 0.0


def by_kind(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean of every difference over the blocks of each kind, and how many there are."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kind"]].append(row)
    return {
        kind: {"blocks": len(group), **{key: sum(row[key] for row in group) / len(group) for key in DIFFERENCES}}
        for kind, group in groups.items()
    }


def only_it(
    variants: Variants, subject: Subject, modules: list[Module], in_float: Scores, cost: str = "loss",
    progress: Progress = lambda modules: modules,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Return the cost and its standard error of each module when it alone is quantized.

    cost "loss": the increase of the loss over float; "kl": KL(float || variant), which is never negative.
    """
    found = {}
    for module in progress(modules):
        variants.quantize_only(module.parts)
        scores = subject.scores(variants.model)
        found[module.name] = mean_and_error(
            in_float.divergence(scores) if cost == "kl" else scores.losses - in_float.losses
        )
    return found
