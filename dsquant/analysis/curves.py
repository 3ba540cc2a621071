"""Collect how the stages of a run went, step by step, for a picture: loss, validation top-1, oscillating weights."""

from collections.abc import Sequence
from pathlib import Path

from dsquant.errors import ConfigError
from dsquant.telemetry.metrics import METRICS_FILE, read_metrics

FIELDS = {"train": "loss", "eval": "top1", "oscillation": "oscillating_pct"}
POINTS = 60  # means of a stage's training losses: single steps would hide the curve


def stage_curves(run: str | Path, stages: Sequence[str] = ()) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return stage -> "loss" (means of runs of steps), "top1", "oscillating_pct" -> [(step of the stage, value)].

    `stages` chooses and orders; none takes all that were recorded. Raises ConfigError for a folder that holds no run and
    a stage that it has no records of.
    """
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        raise ConfigError(f"{run} holds no {METRICS_FILE}; give the --out_dir of a run")
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in read_metrics(path):
        field = FIELDS.get(record["kind"])
        if field in record:
            curves = found.setdefault(record["stage"], {field: [] for field in FIELDS.values()})
            curves[field].append((record["step"], record[field]))
    if missing := [name for name in stages if name not in found]:
        raise ConfigError(f"{path} has no records of stage {missing[0]!r}; it has {list(found)}")
    chosen = {name: found[name] for name in (stages or found)}
    return {name: curves | {"loss": _means(curves["loss"])} for name, curves in chosen.items()}


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(points) // POINTS) or 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]
