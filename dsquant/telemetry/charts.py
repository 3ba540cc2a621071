"""Line charts and sparklines as inline SVG: no script, no font, no file besides; colours come from the page's CSS.

The page defines --ink, --muted, --grid and --series-0 ... --series-5; text and lines follow its light or dark scheme.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 42
COLORS = 6
MAX_POINTS = 400  # a curve has about one pixel column a point; more would only make the file large
X_LABEL = "training step, all stages"
SPARK_BARS, SPARK_WIDTH, SPARK_HEIGHT = 32, 96, 22

Place = Callable[[float, float], tuple[float, float]]  # data to SVG coordinates


@dataclass(frozen=True)
class Series:
    """One curve: `color` indexes the page's palette, `faint` draws it thin behind others, `marks` dots its points."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int
    faint: bool = False
    marks: bool = False
    dashed: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    x_max: float,
    boundaries: Sequence[tuple[float, float, str]] = (),
    from_zero: bool = False,
) -> str:
    """Return an `<svg>` of curves over x from 0 to `x_max`; `boundaries` (begin, end, label) mark spans of x.

    `from_zero` starts the y axis at 0; otherwise it fits the data.
    """
    values = [y for s in series for y in s.ys]
    ticks = nice_ticks(0.0 if from_zero else min(values), max(values))
    low, high = min(ticks[0], min(values)), max(ticks[-1], max(values))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / max(x_max, 1),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low),
        )

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    parts += [_y_tick(tick, ticks, at) for tick in ticks]
    parts += [_x_tick(tick, at, low) for tick in nice_ticks(0.0, x_max, count=8) if tick <= x_max]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{X_LABEL}</text>')
    parts += [_span(begin, end, label, at, low, high, x_max) for begin, end, label in boundaries]
    parts += [_curve(s, at) for s in sorted(series, key=lambda s: not s.faint)]
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """Return the HTML legend of a chart: one entry for each curve that is not faint."""
    entries = [
        f'<span><i class="{"dash" if s.dashed else "line"}" style="--c:var(--series-{s.color % COLORS})"></i>'
        f"{escape(s.label)}</span>"
        for s in series
        if not s.faint
    ]
    return f'<div class="legend">{"".join(entries)}</div>'


def sparkline(fractions: Sequence[float | None], first: int = 0) -> str:
    """Return a small bar chart of bin fractions (neighbours are added up beyond 32 bins); `first` is the first code."""
    shares = [f or 0.0 for f in fractions]
    step = max(1, math.ceil(len(shares) / SPARK_BARS))
    bars = [sum(shares[i : i + step]) for i in range(0, len(shares), step)]
    slot, top = min(SPARK_WIDTH / max(len(bars), 1), 16), max([*bars, 1e-12])
    width = slot * len(bars)
    parts = [f'<svg class="spark" width="{width:.1f}" viewBox="0 0 {width:.1f} {SPARK_HEIGHT}" role="img">']
    text = ", ".join(f"{first + i * step}: {100 * bar:.1f} %" for i, bar in enumerate(bars))
    parts.append(f"<title>{escape(text)}</title>")
    for i, bar in enumerate(bars):
        height = max(1.0, (SPARK_HEIGHT - 1) * bar / top)
        parts.append(
            f'<rect x="{i * slot:.1f}" y="{SPARK_HEIGHT - height:.1f}" '
            f'width="{max(slot - (2 if slot > 6 else 0.5), 1):.1f}" height="{height:.1f}" rx="1"/>'
        )
    return "".join([*parts, "</svg>"])


def thin(xs: Sequence[float], ys: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Return at most `limit` points: means over runs of neighbours, with the last point of the curve kept."""
    step = math.ceil(len(xs) / limit)
    if step <= 1:
        return list(xs), list(ys)
    groups = [range(i, min(i + step, len(xs))) for i in range(0, len(xs), step)]
    thin_xs = [sum(xs[i] for i in g) / len(g) for g in groups]
    thin_ys = [sum(ys[i] for i in g) / len(g) for g in groups]
    thin_xs[-1], thin_ys[-1] = xs[-1], ys[-1]
    return thin_xs, thin_ys


def smooth(ys: Sequence[float], window: int) -> list[float]:
    """Return the exponential moving average over about `window` points, corrected for its empty start."""
    keep = 1 - 2 / (max(window, 1) + 1)
    total = weight = 0.0
    out = []
    for y in ys:
        total, weight = keep * total + y, keep * weight + 1
        out.append(total / weight)
    return out


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return ticks at multiples of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low, high + pad) if low == 0 else (low - pad, high + pad)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _y_tick(tick: float, ticks: Sequence[float], at: Place) -> str:
    x, y = at(0, tick)
    step = ticks[1] - ticks[0]
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{x - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{_number(tick, step)}</text>'
    )


def _x_tick(tick: float, at: Place, low: float) -> str:
    x, y = at(tick, low)
    text = f"{tick / 1000:g}k" if tick >= 10_000 else f"{tick:g}"
    return f'<text class="tick" x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{text}</text>'


def _span(begin: float, end: float, label: str, at: Place, low: float, high: float, x_max: float) -> str:
    """Label a span of x above the plot and close it with a hairline, except at the right edge."""
    (x0, bottom), (x1, top) = at(begin, low), at(end, high)
    line = (
        f'<line class="span" x1="{x1:.1f}" x2="{x1:.1f}" y1="{bottom:.1f}" y2="{top - 16:.1f}"/>' if end < x_max else ""
    )
    return f'<text class="span-label" x="{x0 + 4:.1f}" y="{top - 8:.1f}">{escape(label)}</text>{line}'


def _curve(series: Series, at: Place) -> str:
    points = [at(x, y) for x, y in zip(series.xs, series.ys, strict=True)]
    style = f'style="--c:var(--series-{series.color % COLORS})"'
    parts = []
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = "faint" if series.faint else "dashed" if series.dashed else "curve"
        parts.append(f'<polyline class="{kind}" {style} points="{path}"/>')
    if series.marks or len(points) == 1:
        for (x, y), step, value in zip(points, series.xs, series.ys, strict=True):
            tip = f"<title>{escape(series.label)}, step {step:g}: {value:.4g}</title>"
            parts.append(f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    return "".join(parts)


def _number(value: float, step: float) -> str:
    """Return an axis label with the digits that `step` needs."""
    if value == 0:
        return "0"
    if max(abs(value), step) >= 10_000 or step < 1e-4:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
