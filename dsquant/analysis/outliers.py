"""Outlier statistics of every weight and activation, of the whole tensor, per channel and per head.

A channel is an output row of a weight (of an embedding: a token), a feature of an activation (of q, k, v a head's feature,
of probabilities a key of a head). A head is what `models` says it is: rows of a fused q, k, v, input columns of the output
projection, or one matrix of (B, H, N, D). Padding of sentences is no element of anything. Sums are float64; activations
are seen batch by batch and never kept.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsquant.analysis.subject import Subject, float_logits
from dsquant.analysis.variants import trained, uniform_policy
from dsquant.models import Inputs, Sites, insert_sites
from dsquant.quant.modules import ActivationQuantizer
from dsquant.quant.padding import real_elements, real_tokens
from dsquant.spec import Grouping

FAR = 6.0  # standard deviations
N, S1, S2, S3, S4, ABS, MAX, BEYOND = range(8)
COLUMNS = ("max_over_std", "kurtosis", "mean_abs", "beyond_6_sigma")


class Moments:
    """Hold, for each of G groups of elements, float64 sums of x^0 ... x^4 and |x|, max |x| and the count beyond 6 sigma.

    `sums` is (G, 8). Groups can be pooled into larger ones; max|x| is the largest of theirs.
    """

    def __init__(self, sums: Tensor):
        self.sums = sums

    @classmethod
    def of(cls, rows: Tensor, real: Tensor | None = None) -> "Moments":
        """Count the elements of (G, n), one row a group; of those, where given, that `real`, bool (G, n), picks."""
        x = rows.double() if real is None else rows.double().masked_fill(~real, 0.0)
        count = torch.full_like(x[:, 0], x.shape[1]) if real is None else real.sum(1, dtype=torch.float64)
        square = x.square()
        magnitude = x.abs()
        parts = [count, x.sum(1), square.sum(1), (square * x).sum(1)]
        parts += [square.square().sum(1), magnitude.sum(1), magnitude.amax(1), torch.zeros_like(x[:, 0])]
        return cls(torch.stack(parts, dim=1))

    def add(self, other: "Moments") -> None:
        """Take in the moments of further elements of the same groups."""
        largest = torch.maximum(self.sums[:, MAX], other.sums[:, MAX])
        self.sums = self.sums + other.sums
        self.sums[:, MAX] = largest

    def count_beyond(self, rows: Tensor, mean: float, std: float, real: Tensor | None = None) -> None:
        """Count the (real) elements of (G, n) that lie further than 6 std from the mean of the whole tensor."""
        beyond = (rows.double() - mean).abs() > FAR * std
        self.sums[:, BEYOND] += (beyond if real is None else beyond & real).sum(1)

    def pooled(self, n_groups: int) -> "Moments":
        """Put consecutive groups together into `n_groups`."""
        split = self.sums.unflatten(0, (n_groups, -1))
        sums = split.sum(1)
        sums[:, MAX] = split[..., MAX].amax(1)
        return Moments(sums)

    def centre(self) -> tuple[float, float]:
        """Return mean and standard deviation of all groups together."""
        n, s1, s2 = self.sums[:, :S3].sum(0).tolist()
        return s1 / n, math.sqrt(max(0.0, s2 / n - (s1 / n) ** 2))

    def statistics(self) -> dict[str, list[float | None]]:
        """Return each statistic of each group; None where a group is constant, or empty (a key that no sentence reaches).

        max_over_std = max|x| / std(x); kurtosis = E[(x - mu)^4] / std^4, 3 for a normal distribution; mean_abs = E|x|;
        beyond_6_sigma: the share of elements beyond 6 standard deviations of the whole tensor. std is the population's.
        """
        n, s1, s2, s3, s4, magnitude, largest, beyond = self.sums.unbind(1)
        mean = s1 / n
        variance = (s2 / n - mean.square()).clamp(min=0)
        fourth = s4 / n - 4 * mean * s3 / n + 6 * mean.square() * s2 / n - 3 * mean.square().square()
        varies = variance > 1e-12 * (s2 / n)  # less is rounding
        found = {
            "max_over_std": torch.where(varies, largest / variance.sqrt(), torch.nan),
            "kurtosis": torch.where(varies, fourth / variance.square(), torch.nan),
            "mean_abs": magnitude / n,
            "beyond_6_sigma": beyond / n,
        }
        return {key: [None if math.isnan(v) else v for v in values.tolist()] for key, values in found.items()}

    def sdam(self) -> dict[str, float | None]:
        """Return SDAM = std_c(mean|x_c|) over the groups, and SDAM over the mean of mean|x_c|."""
        filled = self.sums[self.sums[:, N] > 0]
        magnitude = filled[:, ABS] / filled[:, N]
        sdam, mean = float(magnitude.std(correction=0)), float(magnitude.mean())
        return {"sdam": sdam, "sdam_relative": sdam / mean if mean else None}


def tensor_result(channels: Moments, heads: Moments | None) -> dict[str, Any]:
    """Return the statistics of one tensor: whole, per channel, and per head where it has heads."""
    whole = {key: values[0] for key, values in channels.pooled(1).statistics().items()}
    result = {**whole, **channels.sdam(), "channels": channels.statistics(), "heads": None}
    if heads is not None:
        result["heads"] = heads.statistics() | heads.sdam()
    return result


def weight_outliers(weight: Tensor, heads: Grouping | None) -> dict[str, Any]:
    """Return the statistics of a weight (out, ...): channels are its rows."""
    rows = weight.detach().reshape(weight.shape[0], -1)
    by_head = None if heads is None else head_rows(rows, heads)
    channels = Moments.of(rows)
    mean, std = channels.centre()
    channels.count_beyond(rows, mean, std)
    found = None
    if by_head is not None:
        found = Moments.of(by_head)
        found.count_beyond(by_head, mean, std)
    return tensor_result(channels, found)


def head_rows(weight: Tensor, heads: Grouping) -> Tensor:
    """Return the elements of a weight as (heads, elements), a row for each group of the per-head grouping."""
    return weight.reshape(-1, heads.n_groups, heads.inner).transpose(0, 1).reshape(heads.n_groups, -1)


class OutlierObserver:
    """Count the moments of one activation site by channel; the second time over the samples, what lies beyond 6 sigma.

    longest: tokens of the longest batch, to which the keys of probabilities are filled up, or None for images.
    """

    def __init__(self, quantizer: ActivationQuantizer, channel_dim: int, longest: int | None = None):
        self.quantizer, self.channel_dim, self.longest = quantizer, channel_dim, longest
        self.moments: Moments | None = None
        self.centre: tuple[float, float] | None = None

    def __call__(self, x: Tensor) -> None:
        real = real_elements(self.quantizer, x)
        rows, real = self.rows(x), None if real is None else self.rows(real.expand_as(x))
        if self.centre is not None:
            self.moments.count_beyond(rows, *self.centre, real)
        elif self.moments is None:
            self.moments = Moments.of(rows, real)
        else:
            self.moments.add(Moments.of(rows, real))

    def rows(self, x: Tensor) -> Tensor:
        """Return (channels, elements); for (B, H, N, D) a channel is (head, feature), heads first."""
        if self.quantizer.keys_last and self.longest is not None:
            x = F.pad(x, (0, self.longest - x.shape[-1]))  # batches of other lengths have the same keys
        if self.quantizer.heads_first:
            return x.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)
        return x.movedim(self.channel_dim, 0).flatten(1)


@torch.no_grad()
def outliers(subject: Subject, batches: Iterable[Inputs] | None = None) -> dict[str, Any]:
    """Return the statistics of every weight and activation site of a subject, by site name, as JSON-ready values.

    A float model's activations are those of its float weights; a trained quantized stage's are what its quantizers see,
    its weights the latents. Activations are seen over `batches`, by default the calibration batches.
    """
    batches = subject.calibration if batches is None else list(batches)
    if subject.quantized:
        variants = trained(subject)
        floats = {site.name: subject.weights[site.name] for site in variants.sites.weights}
        variants.quantize_only(variants.everything)
        model, sites = variants.model, variants.sites
    else:
        model = subject.build()
        sites = insert_sites(model, uniform_policy(8))
        floats = {site.name: model.get_parameter(site.name) for site in sites.weights}
    return {
        "subject": subject.name,
        "samples": sum(len(_any_tensor(batch)) for batch in batches),
        "weights": {name: weight_outliers(weight, sites.heads.get(name)) for name, weight in floats.items()},
        "activations": activation_outliers(model, sites, batches),
    }


def _any_tensor(batch: Inputs) -> Tensor:
    return batch if isinstance(batch, Tensor) else next(iter(batch.values()))


def activation_outliers(model: nn.Module, sites: Sites, batches: list[Inputs]) -> dict[str, Any]:
    """Run the batches twice through a model, and return the statistics of each activation site, padding left out."""
    observers = {}
    longest = max((batch["input_ids"].shape[1] for batch in batches if isinstance(batch, dict)), default=None)
    for name, quantizer in sites.quantizers.items():
        is_image = name.endswith(".input") and isinstance(model.get_submodule(name.removesuffix(".input")), nn.Conv2d)
        observers[name] = quantizer.observer = OutlierObserver(quantizer, 1 if is_image else -1, longest)
    try:
        for turn in range(2):
            for observer in observers.values() if turn else ():
                observer.centre = observer.moments.centre()
            for batch in batches:
                with real_tokens(batch):
                    float_logits(model, batch)
    finally:
        for quantizer in sites.quantizers.values():
            quantizer.observer = None
    found = {}
    for name, observer in observers.items():
        heads = sites.heads.get(name)
        found[name] = tensor_result(observer.moments, observer.moments.pooled(heads) if heads else None)
    return found
