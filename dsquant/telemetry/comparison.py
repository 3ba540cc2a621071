"""Put several runs of one recipe side by side: for every stage the mean and the spread over seeds of what it reached."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsquant.errors import ConfigError
from dsquant.telemetry.metrics import METRICS_FILE, read_metrics

MEASURES = ("first_loss", "start_top1", "top1", "best_top1", "oscillating_pct", "oscillating_peak_pct", "steps")


def compare(runs: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Return stage -> measure -> {mean, std, values}, values in the order of `runs`; std is the sample's, 0 for one run.

    first_loss: of the first step. start_top1: after calibration, before any step. top1: at the end; best_top1: of any
    evaluation. oscillating_pct: at the end, with its peak. A stage that not every run has finished is left out.
    Raises ConfigError for a folder without records and where no stage is common to all.
    """
    each = [_stages(Path(run)) for run in runs]
    common = [name for name in each[0] if all(name in other for other in each)] if each else []
    if not common:
        raise ConfigError("no stage has been finished by all of these runs: " + ", ".join(map(str, runs)))
    return {name: _summarized([stages[name] for stages in each]) for name in common}


def _stages(run: Path) -> dict[str, dict[str, float]]:
    if not (run / METRICS_FILE).is_file():
        raise ConfigError(f"{run} holds no {METRICS_FILE}; give the --out_dir of a run")
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_metrics(run / METRICS_FILE):
        found.setdefault(record["stage"], []).append(record)
    return {
        name: _reached(records)
        for name, records in found.items()
        if any(r["kind"] == "checkpoint" and r["done"] for r in records)
    }


def _reached(records: list[dict[str, Any]]) -> dict[str, float]:
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval", "oscillation")}
    measures: dict[str, float] = {"top1": of["eval"][-1]["top1"], "best_top1": max(r["top1"] for r in of["eval"])}
    if of["train"]:
        measures |= {"first_loss": of["train"][0]["loss"], "steps": of["train"][-1]["step"]}
    if of["eval"][0]["step"] == 0:
        measures["start_top1"] = of["eval"][0]["top1"]
    if of["oscillation"]:
        shares = [r["oscillating_pct"] for r in of["oscillation"]]
        measures |= {"oscillating_pct": shares[-1], "oscillating_peak_pct": max(shares)}
    return measures


def _summarized(reached: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    table = {}
    for measure in MEASURES:
        values = [stage[measure] for stage in reached if measure in stage]
        if len(values) == len(reached):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            table[measure] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return table


def as_text(table: dict[str, dict[str, Any]]) -> str:
    """Return the table as lines of equal columns, mean ± standard deviation."""
    rows = [("stage", *MEASURES)]
    for stage, measures in table.items():
        cells = [f"{measures[m]['mean']:.4g} ± {measures[m]['std']:.2g}" if m in measures else "-" for m in MEASURES]
        rows.append((stage, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
