"""Show runs, going on or finished: `html` writes a report page, `compare` sets seeds side by side, `curves` draws stages."""

import json
import sys
from pathlib import Path

import fire

from dsquant.errors import DsquantError
from dsquant.telemetry.comparison import as_text, compare
from dsquant.telemetry.report import write_report
from dsquant.telemetry.wandb_sink import replay


def html(run: str) -> None:
    """Write RUN/report.html, one self-contained page, from RUN/metrics.jsonl and RUN/summary.json.

    Args:
        run: the run folder.
    """
    print(write_report(str(run)))


def wandb_sync(run: str, project: str = "dsquant", mode: str = "auto") -> None:
    """Replay RUN/metrics.jsonl into one fresh W&B run and print its URL, or its folder where offline.

    Offline runs that were resumed lie in several folders that W&B cannot merge; this is the one run of them all.

    Args:
        run: the run folder.
        project: the W&B project.
        mode: online, offline, or auto (online where W&B finds a key).
    """
    print(replay(str(run), project=project, mode=mode))


def seeds(*runs: str, out: str | None = None) -> None:
    """Print, for every stage of several runs of one recipe, the mean and standard deviation of what it reached.

    Args:
        runs: run folders, one a seed.
        out: also write the numbers to this JSON file.
    """
    table = compare([str(run) for run in runs])
    print(as_text(table))
    if out:
        Path(out).write_text(json.dumps(table, indent=1) + "\n")


def curves(run: str, out: str, stages: str | None = None, title: str | None = None) -> None:
    """Draw training loss, top-1 and oscillating weights of a run's stages into one PNG (needs matplotlib).

    Args:
        run: the run folder.
        out: the file to write.
        stages: those to draw, separated by commas; all by default.
        title: of the picture; the name of the run folder by default.
    """
    from dsquant.analysis.curves import stage_curves
    from dsquant.analysis.plots import run_curves

    chosen = stages.split(",") if isinstance(stages, str) else list(stages or ())
    found = stage_curves(str(run), [name.strip() for name in chosen])
    print(run_curves(found, Path(out), title=title or Path(str(run)).name))


if __name__ == "__main__":
    try:
        fire.Fire({"html": html, "compare": seeds, "curves": curves, "wandb_sync": wandb_sync}, name="report.py")
    except DsquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
