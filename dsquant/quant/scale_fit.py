"""Find the scale, and the offset, of an activation site from what was seen there: least squares, or a published rule."""

import torch
from torch import Tensor

from dsquant.quant.state import SCALE_FLOOR
from dsquant.spec import QuantSpec

SCALE_GRID, OFFSET_GRID, REFINEMENTS = 128, 24, 20


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
