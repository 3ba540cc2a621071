"""Set the first scales of activation quantizers so that training starts from a useful point.

Every rank runs training images through the model; ranges and histograms (or means) of each site are reduced over all
ranks, and the same scale and offset are then found on each: those of least squared error, or those of a published rule.
Later rounds repeat this with all sites quantizing, so that a site is fitted to what it will really see. Before that, biases
around a signed site are set to its features' means: a feature that hardly leaves its mean, as the outliers of BERT do not,
would otherwise stretch the scale of all, and keep one code for every token.
"""

from collections.abc import Callable, Iterable, Set
from functools import partial
from math import inf
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dsquant.errors import TrainingError
from dsquant.quant.modules import ActivationQuantizer, Mode
from dsquant.quant.padding import real_elements, real_tokens
from dsquant.quant.scale_fit import fit, mean_scale
from dsquant.quant.state import SCALE_FLOOR, QuantState
from dsquant.spec import Bias, Granularity

Inputs = Tensor | dict[str, Tensor]
BINS = 1024


def group_rows(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """Return x as float32 (n_groups, elements), one row for each scale of the quantizer."""
    groups, x = quantizer.site.n_groups, x.float()
    if groups == 1:
        return x.reshape(1, -1)
    if quantizer.site.spec.granularity is Granularity.PER_TOKEN:
        quantizer.check_tokens(x)
        return x.movedim(-2, 0).reshape(groups, -1)
    if quantizer.heads_first:
        return x.transpose(0, 1).reshape(groups, -1)
    return x.unflatten(-1, (groups, -1)).movedim(-2, 0).reshape(groups, -1)


def real_rows(quantizer: ActivationQuantizer, x: Tensor) -> Tensor | None:
    """Return which elements of `group_rows` are of real tokens, bool of the same shape, or None where all are."""
    real = real_elements(quantizer, x)
    return None if real is None else group_rows(quantizer, real.expand_as(x)).bool()


class RangeObserver:
    """Record the smallest and largest value of each group; padding counts for nothing."""

    def __init__(self, quantizer: ActivationQuantizer):
        self.quantizer = quantizer
        self.low = self.high = None

    def __call__(self, x: Tensor) -> None:
        rows, real = group_rows(self.quantizer, x), real_rows(self.quantizer, x)
        if real is None:
            low, high = rows.aminmax(dim=1)
        else:
            low, high = rows.masked_fill(~real, inf).amin(dim=1), rows.masked_fill(~real, -inf).amax(dim=1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


class HistogramObserver:
    """Count values of each group, without padding, in equal bins between a low and a high; the ends take what lies beyond."""

    def __init__(self, quantizer: ActivationQuantizer, low: Tensor, high: Tensor):
        self.quantizer, self.low = quantizer, low
        self.width = ((high - low) / BINS).clamp(min=1e-12)
        self.counts = torch.zeros(low.numel(), BINS, dtype=torch.float64, device=low.device)

    def __call__(self, x: Tensor) -> None:
        rows, real = group_rows(self.quantizer, x), real_rows(self.quantizer, x)
        index = ((rows - self.low[:, None]) / self.width[:, None]).long().clamp_(0, BINS - 1)
        ones = torch.ones_like(rows, dtype=torch.float64) if real is None else real.double()
        self.counts.scatter_add_(1, index, ones)

    def centers(self) -> Tensor:
        """Return the middle of each bin, (n_groups, BINS) float64."""
        steps = torch.arange(BINS, dtype=torch.float64, device=self.low.device) + 0.5
        return self.low.double()[:, None] + steps * self.width.double()[:, None]


class MeanObserver:
    """Add up |x| of each group in float64, and count its elements, both without padding: (n_groups,)."""

    def __init__(self, quantizer: ActivationQuantizer):
        self.quantizer, self.total, self.count = quantizer, None, None

    def __call__(self, x: Tensor) -> None:
        rows, real = group_rows(self.quantizer, x).abs(), real_rows(self.quantizer, x)
        real = torch.ones_like(rows, dtype=torch.bool) if real is None else real
        total, count = rows.masked_fill(~real, 0.0).sum(dim=1, dtype=torch.float64), real.sum(dim=1).double()
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count


class FeatureMeanObserver:
    """Add up each feature, the last dimension, over real tokens in float64, and count these: (features + 1,)."""

    def __init__(self, quantizer: ActivationQuantizer):
        self.quantizer, self.total = quantizer, None

    def __call__(self, x: Tensor) -> None:
        real = real_elements(self.quantizer, x)
        real = torch.ones_like(x, dtype=torch.bool) if real is None else real.expand_as(x)
        counted = torch.cat([x.double().masked_fill(~real, 0.0), real[..., :1].double()], dim=-1)
        total = counted.flatten(0, -2).sum(dim=0)
        self.total = total if self.total is None else self.total + total


def calibrate(
    quantizers: dict[str, ActivationQuantizer], state: QuantState, forward: Callable[[Inputs], object],
    batches: Iterable[Inputs], rounds: int, bind: Callable[[], None], init: str = "mse", sequential: bool = False,
    given: Set[str] = frozenset(),
) -> None:  # fmt: skip
    """Fit every activation quantizer to the training samples in `batches`, the same values on every rank.

    A batch is a tensor, or a dict of tensors whose `attention_mask` (B, N) says which tokens are no padding.

    Args:
        quantizers: by site name, in the order of the model, the same on every rank.
        forward: runs the model on a batch in evaluation mode without gradients.
        rounds: the first fits to float activations; each further one refits with all sites quantizing.
        bind: makes the quantizers read their values from `state` and quantize.
        init: "mse" for the least squared error, with biases around signed sites at their means; or a rule of `mean_scale`,
            with biases at 0.
        sequential: the first round fits each site in its turn to what the sites before it, quantizing already, pass on: one
            pass over all batches at once. A site that is applied several times is fitted to the first.
        given: sites whose biases are in `state` already, to be kept.

    Raises TrainingError naming a site that no image reached or that saw a non-finite value.
    """
    batches = list(batches)
    centred = {name: q for name, q in quantizers.items() if init == "mse" and _centred(q) and name not in given}
    bind()
    _set_mode(quantizers, Mode.FLOAT)  # biases act from now on, scales are yet to be fitted
    if sequential:
        _one_by_one(quantizers, state, forward, batches, init, centred)
    else:
        if centred:
            _centre(centred, state, partial(_observe, centred, forward, batches))
        _fit(quantizers, state, partial(_observe, quantizers, forward, batches), init)
        _set_mode(quantizers, Mode.QUANTIZE)
    for _ in range(1, rounds):
        _fit(quantizers, state, partial(_observe, quantizers, forward, batches), init)


def fit_to(
    name: str, quantizer: ActivationQuantizer, state: QuantState, x: Tensor, init: str, given: Set[str] = frozenset()
) -> None:  # fmt: skip
    """Fit one site, its biases first where `init` sets them and they are not given, to what enters it on all ranks."""
    if init == "mse" and _centred(quantizer) and name not in given:
        _centre({name: quantizer}, state, partial(_shown, x))
    _fit({name: quantizer}, state, partial(_shown, quantizer.shifted(x)), init)


def _one_by_one(quantizers, state, forward, batches, init, centred) -> None:
    """Fit each site where the pass meets it, and let it quantize from there on."""
    left = dict(quantizers)

    def meet(name: str, x: Tensor) -> None:
        if name in left:
            quantizer = left.pop(name)
            _fit({name: quantizer}, state, partial(_shown, x), init)
            quantizer.mode = Mode.QUANTIZE

    def centre(name: str, x: Tensor) -> None:
        if name in left:
            _centre({name: left[name]}, state, partial(_shown, x))

    for name, quantizer in quantizers.items():
        quantizer.observer = partial(meet, name)
        if name in centred:
            quantizer.input_observer = partial(centre, name)
    try:
        together = put_together(batches)
        with real_tokens(together):
            forward(together)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = quantizer.input_observer = None
    for name in left:
        _check_reached(name, None)


def put_together(batches: list[Inputs]) -> Inputs:
    """Make one batch of several; of sentences the shorter are padded with zeros, which their masks leave out."""
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    longest = max(tensor.shape[1] for batch in batches for tensor in batch.values())
    return {
        name: torch.cat([F.pad(batch[name], (0, longest - batch[name].shape[1])) for batch in batches])
        for name in batches[0]
    }


def _shown(x: Tensor, observers: dict[str, Any]) -> dict[str, Any]:
    for observer in observers.values():
        observer(x)
    return observers


def _set_mode(quantizers: dict[str, ActivationQuantizer], mode: Mode) -> None:
    for quantizer in quantizers.values():
        quantizer.mode = mode


def _centred(quantizer: ActivationQuantizer) -> bool:
    spec = quantizer.site.spec
    return spec.bias is Bias.AROUND and spec.signed


def _centre(quantizers, state, observe) -> None:
    """Set the biases around signed sites to -mean and mean of each feature, which leaves the float function as it is."""
    seen = observe({name: FeatureMeanObserver(q) for name, q in quantizers.items()})
    for name, observer in seen.items():
        _check_reached(name, observer.total)
    together = torch.cat([observer.total for observer in seen.values()])
    if dist.is_initialized():
        dist.all_reduce(together)
    for name, sums in zip(seen, together.split([o.total.numel() for o in seen.values()]), strict=True):
        _check_finite(name, sums)
        mean = sums[:-1] / sums[-1]
        state.get(name, "before").copy_(-mean)
        state.get(name, "after").copy_(mean)


def _fit(quantizers, state, observe, init: str) -> None:
    """Set scales and offsets to what `observe` shows the observers that it is given."""
    found = _least_error(quantizers, observe) if init == "mse" else _from_means(quantizers, observe, init)
    for name, (scale, offset) in found.items():
        state.get(name).copy_(scale)
        if offset is not None:
            state.get(name, "offset").copy_(offset)


def _least_error(quantizers, observe) -> dict[str, tuple[Tensor, Tensor | None]]:
    ranges = observe({name: RangeObserver(q) for name, q in quantizers.items()})
    limits = _reduce_ranges(ranges)
    histograms = observe({name: HistogramObserver(q, *limits[name]) for name, q in quantizers.items()})
    _reduce_counts(histograms)
    return {
        name: fit(histogram.counts.cpu(), histogram.centers().cpu(), quantizers[name].site.spec)
        for name, histogram in histograms.items()
    }


def _from_means(quantizers, observe, rule: str) -> dict[str, tuple[Tensor, Tensor | None]]:
    seen = observe({name: MeanObserver(q) for name, q in quantizers.items()})
    for name, observer in seen.items():
        _check_reached(name, observer.total)
    if not seen:
        return {}
    sums = [torch.stack([o.total, o.count]) for o in seen.values()]
    together = torch.cat(sums, dim=1)
    if dist.is_initialized():
        dist.all_reduce(together)
    found = {}
    for name, part in zip(seen, together.split([s.shape[1] for s in sums], dim=1), strict=True):
        _check_seen(name, part[1] > 0)
        _check_finite(name, part)
        spec = quantizers[name].site.spec
        scale = mean_scale(part[0] / part[1], spec, rule).float().clamp(min=SCALE_FLOOR)
        found[name] = scale, torch.zeros_like(scale) if spec.offset else None
    return found


def _observe(quantizers, forward, batches, observers):
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        for batch in batches:
            with real_tokens(batch):
                forward(batch)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    return observers


def _reduce_ranges(ranges: dict[str, RangeObserver]) -> dict[str, tuple[Tensor, Tensor]]:
    for name, seen in ranges.items():
        _check_reached(name, seen.low)
    sizes = [seen.low.numel() for seen in ranges.values()]
    ends = torch.cat([-torch.cat([s.low for s in ranges.values()]), torch.cat([s.high for s in ranges.values()])])
    if dist.is_initialized():
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    low, high = -ends[: sum(sizes)], ends[sum(sizes) :]
    found = {}
    for name, lo, hi in zip(ranges, low.split(sizes), high.split(sizes), strict=True):
        _check_seen(name, ~(lo > hi))  # as they are before the first value; NaN is for the next check
        _check_finite(name, lo, hi)
        found[name] = (lo, hi)
    return found


def _check_reached(name: str, seen: Tensor | None) -> None:
    if seen is None:
        raise TrainingError(f"calibration: no image reached {name}; leave it out with a quant rule (quantize: false)")


def _check_seen(name: str, seen: Tensor) -> None:
    if not bool(seen.all()):
        raise TrainingError(
            f"calibration: no real token stood at position {int((~seen).nonzero()[0])} of {name}, whose scales are "
            "per_token; calibrate on more batches, shorten data.max_length, or give it per_tensor by a quant rule"
        )


def _check_finite(name: str, *seen: Tensor) -> None:
    if not all(bool(values.isfinite().all()) for values in seen):
        raise TrainingError(f"calibration: {name} saw a value that is not finite; check the weights and the images")


def _reduce_counts(histograms: dict[str, HistogramObserver]) -> None:
    if not dist.is_initialized() or not histograms:
        return
    together = torch.cat([h.counts for h in histograms.values()])
    dist.all_reduce(together)
    sizes = [h.counts.shape[0] for h in histograms.values()]
    for histogram, counts in zip(histograms.values(), together.split(sizes), strict=True):
        histogram.counts = counts
