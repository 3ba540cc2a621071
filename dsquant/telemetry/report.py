"""One self-contained HTML page of a run, made from `metrics.jsonl` and `summary.json`; opens without a network."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dsquant.files import write_atomically
from dsquant.telemetry.charts import Series, legend, line_chart, smooth, sparkline, thin
from dsquant.telemetry.metrics import (
    METRICS_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    read_metrics,
    read_summary,
    stage_offsets,
    stage_totals,
)

SMOOTHING = 50  # a smoothed curve averages over about 1/50 of a stage
MARKED = 60  # measurements of a stage; with more, dots would hide the curve
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Curves:
    """One field of one kind of record, drawn as one curve a stage."""

    kind: str
    field: str
    label: str = ""
    smooth: bool = False
    raw: bool = False
    marks: bool = False
    dashed: bool = False
    skip_zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A card of the page; left out where no record has its fields."""

    title: str
    note: str
    curves: tuple[Curves, ...]
    from_zero: bool = True


CHARTS = (
    Chart(
        "Training loss",
        "smoothed over 2 % of a stage; thin: as recorded",
        (Curves("train", "loss", smooth=True, raw=True),),
    ),
    Chart(
        "Top-1",
        "percent",
        (
            Curves("eval", "top1", "validation", marks=True),
            Curves("train", "top1", "training", smooth=True, dashed=True),
        ),
        from_zero=False,
    ),
    Chart(
        "Oscillating weights",
        "percent of the weights at 4 bits or less",
        (
            Curves("oscillation", "oscillating_pct", "oscillating", marks=True),
            Curves("oscillation", "frozen_pct", "frozen", dashed=True, skip_zero=True),
        ),
    ),
    Chart("Learning rate", "of the weights", (Curves("train", "lr"),)),
    Chart("Throughput", "images/s, smoothed", (Curves("train", "images_per_second", smooth=True),)),
    Chart(
        "Gradient norm",
        "before clipping, smoothed; thin: as recorded",
        (Curves("train", "grad_norm", smooth=True, raw=True),),
    ),
)

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$css</style></head>
<body><main>
<header><h1>$title</h1><p>$subtitle</p></header>
<section class="tiles">$tiles</section>
<section class="charts">$charts</section>
<section><h2>Stages</h2><div class="scroll">$stages</div></section>
$sites
<section><h2>Run</h2><div class="scroll">$facts</div></section>
</main></body></html>
""")

CSS = """
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#1c1c1a;--muted:#66655f;--grid:#e4e3de;--bar:#2a78d626;
--series-0:#2a78d6;--series-1:#d9581f;--series-2:#14936a;--series-3:#7a52c7;--series-4:#b5790a;--series-5:#c83a6b}
@media (prefers-color-scheme:dark){:root{--page:#141413;--card:#1e1e1c;--ink:#ecebe6;--muted:#a3a29a;--grid:#34342f;
--bar:#4d94e840;--series-0:#4d94e8;--series-1:#ee7c48;--series-2:#33b98b;--series-3:#a585e8;--series-4:#d9a033;
--series-5:#e8719a}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}h1{font-size:25px;margin:0;font-weight:650}
h2{font-size:17px;margin:34px 0 10px;font-weight:650}header p{margin:2px 0 20px;color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px}
.tile,.card,.scroll{background:var(--card);border:1px solid var(--grid);border-radius:8px}
.tile{padding:12px 16px}.tile b{display:block;font-size:24px;font-weight:650;line-height:1.25}
.tile span{color:var(--muted);font-size:13px}
.tile small{display:block;color:var(--muted);font-size:12.5px;min-height:1.4em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:14px;margin-top:14px}
.card{padding:14px 16px 8px}.card h2{margin:0;font-size:15px}.card p{margin:0;color:var(--muted);font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:3px 16px;font-size:13px;margin:6px 0 2px;min-height:20px}
.legend span{display:inline-flex;align-items:center;gap:6px}.legend i{width:18px;border-top:2.5px solid var(--c)}
.legend i.dash{border-top-style:dashed}svg.chart{width:100%;height:auto;display:block}
svg text{fill:var(--muted);font-size:11.5px}
svg .span-label{font-size:11.5px;font-weight:600}.grid{stroke:var(--grid);stroke-width:1}
.span{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3;opacity:.7}
polyline{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}.curve{stroke-width:2}
.dashed{stroke-width:1.8;stroke-dasharray:5 4}.faint{stroke-width:1;opacity:.28}
circle{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{color:var(--muted);font-weight:600;font-size:12.5px}tr:last-child td{border-bottom:0}
th:first-child,td:first-child,.facts td{text-align:left}.facts td{white-space:normal;overflow-wrap:anywhere}
.facts td:first-child{white-space:nowrap;color:var(--muted);width:1%}
td.share{background:linear-gradient(to left,var(--bar) var(--w),transparent var(--w))}
.spark{height:22px;display:block;margin-left:auto}.spark rect{fill:var(--series-0)}
details{margin-top:10px}summary{cursor:pointer;font-weight:600;padding:6px 0}
"""


def write_report(run_dir: Path) -> Path:
    """Write `RUN/report.html` whole or not at all and return its path; works while the run still goes on.

    Raises DsquantError where the run has no metrics, or where they or summary.json cannot be read.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / METRICS_FILE)
    summary = read_summary(run_dir) if (run_dir / SUMMARY_FILE).exists() else {}
    recipe = summary.get("recipe") or run_dir.resolve().name
    text = PAGE.substitute(
        title=escape(f"dsquant · {recipe}"),
        subtitle=escape(_subtitle(run_dir, records, summary)),
        css=CSS,
        tiles=_tiles(summary),
        charts=_charts(records),
        stages=_stage_table(records),
        sites=_site_tables(records),
        facts=_table((), [(escape(k), _fact(v)) for k, v in summary.items()], "facts") if summary else "no summary yet",
    )
    path = run_dir / REPORT_FILE
    write_atomically(path, text)
    return path


def _subtitle(run_dir: Path, records: Records, summary: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(records[-1].get("time", 0))) if records else "no records yet"
    state = f"finished {when}" if summary else f"in progress or stopped, last record {when}"
    return f"{run_dir} · {state}"


def _tiles(summary: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        value = summary.get(key)
        return "-" if value is None else form.format(value)

    def change(key: str) -> str:
        before, after = summary.get(f"float_{key}"), summary.get(key)
        return "" if None in (before, after) else f"{after - before:+.2f} against float"

    scores = {"top1": "top-1"} | ({name: name} if (name := summary.get("metric")) else {})
    float_bytes, packed_bytes = summary.get("float_bytes"), summary.get("packed_bytes")
    ratio = f"{float_bytes / packed_bytes:.1f}×" if float_bytes and packed_bytes else "-"
    sizes = f"{float_bytes / 1e6:.3g} MB → {packed_bytes / 1e6:.3g} MB" if float_bytes and packed_bytes else ""
    ranks = f"{number('world_size', '{}')} ranks, ZeRO stage {number('zero_stage', '{}')}"
    tiles = [
        *((f"float {name}", number(f"float_{key}", "{:.2f} %"), "") for key, name in scores.items()),
        *((f"quantized {name}", number(key, "{:.2f} %"), change(key)) for key, name in scores.items()),
        ("oscillating weights", number("oscillating_pct", "{:.2f} %"), ""),
        ("packed file, smaller by", ratio, sizes),
        ("images/s", number("images_per_second", "{:,.0f}"), ranks),
        ("training time", number("seconds", "{:,.0f} s"), number("steps", "{:,} steps")),
    ]
    return "".join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><small>{escape(note)}</small></div>'
        for name, value, note in tiles
    )


def _charts(records: Records) -> str:
    totals = stage_totals(records)
    offsets = stage_offsets(totals)
    spans = [(offsets[name], offsets[name] + total, name) for name, total in totals]
    cards = []
    for chart in CHARTS:
        series = []
        for curves in chart.curves:
            for color, stage in enumerate(offsets):
                xs, ys = _points(records, curves.kind, curves.field, stage)
                if xs:
                    series += _series(
                        curves, f"{stage} {curves.label}".strip(), [offsets[stage] + x for x in xs], ys, color
                    )
        if series:
            svg = line_chart(series, name=chart.title, x_max=spans[-1][1], boundaries=spans, from_zero=chart.from_zero)
            cards.append(f'<div class="card"><h2>{chart.title}</h2><p>{chart.note}</p>{legend(series)}{svg}</div>')
    return "".join(cards)


def _points(records: Records, kind: str, field: str, stage: str) -> tuple[list[float], list[float]]:
    rows = [r for r in records if r["kind"] == kind and r["stage"] == stage and r.get(field) is not None]
    return [r["step"] for r in rows], [r[field] for r in rows]


def _series(curves: Curves, label: str, xs: list[float], ys: list[float], color: int) -> list[Series]:
    if curves.skip_zero and not any(ys):
        return []
    raw = [Series(label, *thin(xs, ys), color, faint=True)] if curves.raw else []
    if curves.smooth:
        ys = smooth(ys, len(ys) // SMOOTHING)
    return [*raw, Series(label, *thin(xs, ys), color, marks=curves.marks and len(xs) <= MARKED, dashed=curves.dashed)]


def _stage_table(records: Records) -> str:
    rows = []
    for stage, steps in stage_totals(records):
        train = [r for r in records if r["stage"] == stage and r["kind"] == "train"]
        evals = [
            r["top1"] for r in records if r["stage"] == stage and r["kind"] == "eval" and r.get("top1") is not None
        ]
        losses = [r["loss"] for r in train if r.get("loss") is not None]
        rates = [r["images_per_second"] for r in train if r.get("images_per_second") is not None]
        first, last = (losses[0], losses[-1]) if losses else (None, None)
        rows.append(
            (
                escape(stage),
                f"{steps:,}",
                _num(first, ".4f"),
                _num(last, ".4f"),
                _num(evals[-1] if evals else None, ".2f"),
                _num(max(evals, default=None), ".2f"),
                _num(sum(rates) / len(rates) if rates else None, ",.0f"),
            )
        )
    head = ("stage", "steps", "first loss", "last loss", "last top-1 %", "best top-1 %", "mean images/s")
    return _table(head, rows)


def _site_tables(records: Records) -> str:
    """Return a table of the quantized weights at the end of every stage that has them, the last stage's open."""
    last = {r["stage"]: r for r in records if r["kind"] == "oscillation" and r.get("sites")}
    parts = []
    for stage, record in last.items():
        is_last = stage == next(reversed(last))
        parts.append(
            f"<details{' open' if is_last else ''}><summary>{escape(stage)}, step {record['step']:,}: "
            f'{len(record["sites"])} sites</summary><div class="scroll">{_site_table(record["sites"])}</div></details>'
        )
    return f"<section><h2>Quantized weights</h2>{''.join(parts)}</section>" if parts else ""


def _site_table(sites: dict[str, dict[str, Any]]) -> str:
    highest = max((s.get("oscillating_pct") or 0 for s in sites.values()), default=0) or 1
    rows = []
    for name, site in sites.items():
        share = 100 * (site.get("oscillating_pct") or 0) / highest
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="share" style="--w:{share:.0f}%">'
            f"{_num(site.get('oscillating_pct'), '.2f')}</td><td>{_num(site.get('frozen_pct'), '.2f')}</td>"
            f"<td>{_num(site.get('clip_ratio'), '.4f')}</td>"
            f"<td>{_scale(site.get('scale'))}</td><td>{_bins(site)}</td></tr>"
        )
    head = ("site", "oscillating %", "frozen %", "clip ratio", "scale", "codes, lowest to highest")
    return f"<table><thead>{_head(head)}</thead><tbody>{''.join(rows)}</tbody></table>"


def _scale(scale: Iterable[float | None] | None) -> str:
    values = [v for v in scale or () if v is not None]
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g}, {len(values)} groups)"


def _bins(site: dict[str, Any]) -> str:
    return sparkline(site["bins"], site.get("qmin", 0)) if site.get("bins") else "-"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], css_class: str = "") -> str:
    """Return a table of cells that are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{css_class}"><thead>{_head(head)}</thead><tbody>{body}</tbody></table>'


def _head(names: Iterable[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<tr>{cells}</tr>" if cells else ""


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    return "-" if value is None else escape(f"{value:,}" if isinstance(value, int) else str(value))


def _num(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
