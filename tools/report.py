"""Show a run, going on or finished: `html` writes its report page, `wandb_sync` sends it to W&B as one merged run."""

import sys

import fire

from dsquant.errors import DsquantError
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


if __name__ == "__main__":
    try:
        fire.Fire({"html": html, "wandb_sync": wandb_sync}, name="report.py")
    except DsquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
