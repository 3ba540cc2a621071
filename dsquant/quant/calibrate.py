"""Set the first scales of activation quantizers so that training starts from a useful point.

Every rank runs training images through the model; ranges and histograms (or means) of each site are reduced over all
ranks, and the same scale and offset are then found on each: those of least squared error, or those of a published rule.
Later rounds repeat this with all sites quantizing, so that a site is fitted to what it will really see. Before that, biases
around a signed site are set to its features' means: a feature that hardly leaves its mean, as the outliers of BERT do not,
would otherwise stretch the scale of all, and keep one code for every token.
"""

from collections.abc import Callable, Iterable
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor

from dsquant.errors import TrainingError
from dsquant.quant.modules import ActivationQuantizer, Mode
from dsquant.quant.padding import real_elements, real_tokens
from dsquant.quant.state import SCALE_FLOOR, QuantState
from dsquant.spec import Bias, Granularity, QuantSpec

Inputs = Tensor | dict[str, Tensor]
BINS = 1024
SCALE_GRID, OFFSET_GRID, REFINEMENTS = 128, 24, 20


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
    """Add up |x| of each group in float64, and count its elements."""

    def __init__(self, quantizer: ActivationQuantizer):
        self.quantizer, self.total, self.count = quantizer, None, 0

    def __call__(self, x: Tensor) -> None:
        rows = group_rows(self.quantizer, x)
        total = rows.abs().sum(dim=1, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count += rows.shape[1]


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
    batches: Iterable[Inputs], rounds: int, bind: Callable[[], None], init: str = "mse",
) -> None:  # fmt: skip
    """Fit every activation quantizer to the training samples in `batches`, the same values on every rank.

    A batch is a tensor, or a dict of tensors whose `attention_mask` (B, N) says which tokens are no padding.

    Args:
        quantizers: by site name, in the order of the model, the same on every rank.
        forward: runs the model on a batch in evaluation mode without gradients.
        rounds: 1 fits to float activations; each further round refits with all sites quantizing.
        bind: makes the quantizers read their values from `state`; called after the first round.
        init: "mse" for the least squared error, with biases around signed sites at their means; or a rule of `mean_scale`,
            with biases at 0.

    Raises TrainingError naming a site that no image reached or that saw a non-finite value.
    """
    batches = list(batches)
    if init == "mse":
        _centre(quantizers, state, forward, batches, bind)
    for turn in range(rounds):
        if init == "mse":
            found = _least_error(quantizers, forward, batches)
        else:
            found = _from_means(quantizers, forward, batches, init)
        for name, (scale, offset) in found.items():
            state.get(name).copy_(scale)
            if offset is not None:
                state.get(name, "offset").copy_(offset)
        if turn == 0:
            bind()


def _centre(quantizers, state, forward, batches, bind) -> None:
    """Set the biases around signed sites to -mean and mean of each feature, which leaves the float function as it is."""
    chosen = {name: q for name, q in quantizers.items() if q.site.spec.bias is Bias.AROUND and q.site.spec.signed}
    if not chosen:
        return
    seen = _observe(chosen, {name: FeatureMeanObserver(q) for name, q in chosen.items()}, forward, batches)
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
    bind()
    for quantizer in quantizers.values():
        quantizer.mode = Mode.FLOAT  # the biases act from now on, the scales are yet to be fitted


def _least_error(quantizers, forward, batches) -> dict[str, tuple[Tensor, Tensor | None]]:
    ranges = _observe(quantizers, {name: RangeObserver(q) for name, q in quantizers.items()}, forward, batches)
    limits = _reduce_ranges(ranges)
    histograms = {name: HistogramObserver(q, *limits[name]) for name, q in quantizers.items()}
    _observe(quantizers, histograms, forward, batches)
    _reduce_counts(histograms)
    return {
        name: fit(histogram.counts.cpu(), histogram.centers().cpu(), quantizers[name].site.spec)
        for name, histogram in histograms.items()
    }


def _from_means(quantizers, forward, batches, rule: str) -> dict[str, tuple[Tensor, Tensor | None]]:
    seen = _observe(quantizers, {name: MeanObserver(q) for name, q in quantizers.items()}, forward, batches)
    for name, observer in seen.items():
        _check_reached(name, observer.total)
    if not seen:
        return {}
    sums = [torch.stack([o.total, torch.full_like(o.total, o.count)]) for o in seen.values()]
    together = torch.cat(sums, dim=1)
    if dist.is_initialized():
        dist.all_reduce(together)
    found = {}
    for name, part in zip(seen, together.split([s.shape[1] for s in sums], dim=1), strict=True):
        _check_finite(name, part)
        spec = quantizers[name].site.spec
        scale = mean_scale(part[0] / part[1], spec, rule).float().clamp(min=SCALE_FLOOR)
        found[name] = scale, torch.zeros_like(scale) if spec.offset else None
    return found


def mean_scale(mean_abs: Tensor, spec: QuantSpec, rule: str) -> Tensor:
    """Return the scales that a rule finds from mean|x| of each group.

    lsq: 2 mean|x| / sqrt(qmax) where signed (Esser et al. 2020), 4 mean|x| / sqrt(qmax) where unsigned (OFQ, BiT). qv: 2
    mean|x| / sqrt(2^(b-1) - 1), unsigned or not (Quantization Variation, code). qmax is at least 1; the two levels of a
    signed site of 1 bit are what its rule gives, and lie one scale apart.
    """
    if rule == "qv":
        scale = 2 * mean_abs / max(1, 2 ** (spec.n_bits - 1) - 1) ** 0.5
    else:
        scale = (2 if spec.signed else 4) * mean_abs / spec.grad_qmax**0.5
    return 2 * scale if spec.levels.elastic else scale


def _observe(quantizers, observers, forward, batches):
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
        if bool((lo > hi).any()):  # as both were before the first value
            raise TrainingError(
                f"calibration: no real token stood at position {int((lo > hi).nonzero()[0])} of {name}, whose scales are "
                "per_token; calibrate on more batches, shorten data.max_length, or give it per_tensor by a quant rule"
            )
        _check_finite(name, lo, hi)
        found[name] = (lo, hi)
    return found


def _check_reached(name: str, seen: Tensor | None) -> None:
    if seen is None:
        raise TrainingError(f"calibration: no image reached {name}; leave it out with a quant rule (quantize: false)")


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


def fit(counts: Tensor, centers: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Return float32 (n_groups,) scale and offset (None without one) of least squared error on histograms.

    counts, centers: (n_groups, bins) float64. A grid finds the basin; alternating least squares, offset <- mean(x - s q)
    and s <- <x - offset, q> / <q, q>, finds its bottom. Error of a candidate: sum counts * (x - x_hat)^2.
    """
    fitted = [_fit_group(n, x, spec) for n, x in zip(counts, centers, strict=True)]
    scale = torch.tensor([s for s, _ in fitted], dtype=torch.float32).clamp(min=SCALE_FLOOR)
    return scale, torch.tensor([o for _, o in fitted], dtype=torch.float32) if spec.offset else None


def _fit_group(n: Tensor, x: Tensor, spec: QuantSpec) -> tuple[float, float]:
    seen = n > 0
    n, x = n[seen], x[seen]
    scales, offsets = _candidates(float(x.min()), float(x.max()), spec)
    error = _errors(n, x, scales, offsets, spec)
    best = int(error.argmin())
    return _refine(n, x, float(scales[best]), float(offsets[best]), float(error[best]), spec)


def _candidates(low: float, high: float, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    shares = torch.logspace(-2, 0, SCALE_GRID, dtype=torch.float64)
    if not spec.offset:
        grid = spec.levels
        reach = max(high / grid.high, low / grid.low if grid.low else 0.0, SCALE_FLOOR)
        scales = reach * shares
        return scales, torch.zeros_like(scales)
    span = max(high - low, SCALE_FLOOR)
    scales = (span * shares / (spec.qmax - spec.qmin)).repeat_interleave(OFFSET_GRID)
    room = span - scales * (spec.qmax - spec.qmin)
    starts = torch.linspace(0, 1, OFFSET_GRID, dtype=torch.float64).repeat(SCALE_GRID)
    return scales, low + room * starts - spec.levels.low * scales


def _levels(x: Tensor, scale, offset, spec: QuantSpec) -> Tensor:
    """Return code + shift of float64 values, in units of the scale."""
    grid = spec.levels
    return ((x - offset) / scale - grid.shift).clamp(grid.qmin, grid.qmax).round() + grid.shift


def _errors(n: Tensor, x: Tensor, scales: Tensor, offsets: Tensor, spec: QuantSpec) -> Tensor:
    s, o = scales[:, None], offsets[:, None]
    return ((_levels(x, s, o, spec) * s + o - x).square() * n).sum(1)


def _refine(n: Tensor, x: Tensor, s: float, o: float, error: float, spec: QuantSpec) -> tuple[float, float]:
    best = (error, s, o)
    for _ in range(REFINEMENTS):
        q = _levels(x, s, o, spec)
        if spec.offset:
            o = float((n * (x - s * q)).sum() / n.sum())
        qq = float((n * q * q).sum())
        if qq == 0:
            break
        s = max(float((n * (x - o) * q).sum()) / qq, SCALE_FLOOR)
        error = float(_errors(n, x, torch.tensor([s]), torch.tensor([o]), spec)[0])
        best = min(best, (error, s, o))
    return best[1], best[2]
