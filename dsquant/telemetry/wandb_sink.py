"""Weights & Biases as a sink of the metrics log: it may fail, be absent or be offline, and training goes on.

An online run continues after a resume under the id kept in `RUN/wandb_id`; steps trained twice show twice there.
W&B cannot merge offline runs (0.31 ignores `resume` there), so a resumed offline run lies in several folders.
`python tools/report.py wandb_sync --run DIR` sends one clean merged run, replayed from `metrics.jsonl`.
"""

import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsquant.errors import ConfigError, DsquantError
from dsquant.files import write_atomically
from dsquant.telemetry.metrics import (
    METRICS_FILE,
    SUMMARY_FILE,
    read_metrics,
    read_summary,
    stage_offsets,
    stage_totals,
)

MODES = ("auto", "online", "offline", "disabled")
LEGACY_MODES = {"run": "online", "dryrun": "offline"}  # values of WANDB_MODE that W&B still accepts
ID_FILE = "wandb_id"
INIT_TIMEOUT_S = 30.0  # a compute node without internet must not hold the start of training for long
FINISH_TIMEOUT_S = 120.0  # an unreachable server must not hold a finished job; what was not sent stays on disk

logger = logging.getLogger(__name__)


class WandbSink:
    """Send records to W&B against the axis `global_step`, which counts training steps over all stages.

    Create it on rank 0 only. `stages` holds (name, total steps) in order. `mode` "auto" means WANDB_MODE where set,
    else online where W&B finds a key (WANDB_API_KEY, netrc), else offline. Files lie under `run_dir/wandb`.
    The first failure of W&B is logged as one warning and turns the sink off; it never raises.
    Raises ConfigError for an unknown mode.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        *,
        stages: Sequence[tuple[str, int]],
        mode: str = "auto",
        project: str = "dsquant",
        name: str | None = None,
        group: str | None = None,
    ) -> None:
        _check_mode(mode)
        self._offsets = stage_offsets(stages)
        self._run = None
        try:
            mode = resolve_mode(mode)
            if mode != "disabled":
                run_id = _kept_run_id(Path(run_dir))
                self._run = _start_run(run_dir, config, mode=mode, project=project, name=name, group=group, id=run_id)
        except ConfigError:
            raise
        except Exception as error:
            self._turn_off("start", error)

    @property
    def active(self) -> bool:
        """Tell whether records still reach W&B."""
        return self._run is not None

    def write(self, record: dict[str, Any]) -> None:
        """Log one record of the metrics log; does nothing once the sink is off."""
        if self._run is None:
            return
        try:
            _log(self._run, record, self._offsets)
        except Exception as error:
            self._turn_off("log", error)

    def close(self, failed: bool = False) -> None:
        """Finish the W&B run, marked as failed where training was; closing twice is harmless."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=int(failed))
        except Exception as error:
            self._turn_off("finish", error)

    def _turn_off(self, action: str, error: Exception) -> None:
        self._run = None
        logger.warning(
            "W&B is off for the rest of this run: it could not %s (%s: %s). Training and %s are not affected; "
            "tools/report.py wandb_sync can send the run later.",
            action, type(error).__name__, _one_line(error), METRICS_FILE,
        )  # fmt: skip


def replay(
    run_dir: Path,
    *,
    project: str = "dsquant",
    mode: str = "auto",
    name: str | None = None,
    group: str | None = None,
    config: dict[str, Any] | None = None,
) -> str:
    """Replay `RUN/metrics.jsonl` into one fresh W&B run and return its URL, or its folder where offline.

    `config` defaults to the contents of summary.json. Raises DsquantError where the run has no metrics, and, unlike
    the sink, where W&B fails.
    """
    _check_mode(mode)
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / METRICS_FILE)
    if config is None:
        config = read_summary(run_dir) if (run_dir / SUMMARY_FILE).exists() else {}
    offsets = stage_offsets(stage_totals(records))
    try:
        mode = resolve_mode(mode)
        if mode == "disabled":
            raise ConfigError("W&B is disabled, so there is nowhere to replay to; pass --mode online or offline")
        run = _start_run(
            run_dir, config, mode=mode, project=project, name=name or run_dir.resolve().name, group=group,
            id=secrets.token_hex(4), x_disable_stats=True, x_disable_meta=True,  # not of this machine
        )  # fmt: skip
        for record in records:
            _log(run, record, offsets)
        where = run.url if mode == "online" else str(Path(run.dir).parent)
        run.finish()
    except DsquantError:
        raise
    except Exception as error:
        raise DsquantError(f"W&B could not take the run ({_one_line(error)}); try --mode offline") from error
    return where


def resolve_mode(mode: str) -> str:
    """Return "online", "offline" or "disabled" for a mode of `MODES`; raises ConfigError for an unknown WANDB_MODE."""
    if mode != "auto":
        return mode
    if asked := os.environ.get("WANDB_MODE"):
        asked = LEGACY_MODES.get(asked, asked)
        if asked not in MODES[1:]:
            raise ConfigError(f"environment variable WANDB_MODE is {asked!r}; allowed: {', '.join(MODES[1:])}")
        return asked
    return "online" if _has_key() else "offline"


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ConfigError(f"W&B mode {mode!r} is unknown; allowed: {', '.join(MODES)}")


def _has_key() -> bool:
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def _kept_run_id(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    if path.is_file() and (kept := path.read_text().strip()):
        return kept
    fresh = secrets.token_hex(4)
    write_atomically(path, fresh + "\n")
    return fresh


def _start_run(
    run_dir: Path,
    config: dict[str, Any],
    *,
    mode: str,
    project: str,
    name: str | None,
    group: str | None,
    id: str,
    **settings: Any,
) -> Any:
    import wandb  # takes a second to import, and a run with W&B disabled does not need it

    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        dir=str(run_dir),
        config=config,
        mode=mode,
        project=project,
        name=name,
        group=group,
        id=id,
        resume="allow",
        reinit="create_new",  # a run the caller may have open is left alone
        settings=wandb.Settings(
            silent=True,
            console="off",  # capturing the terminal would garble the live display
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            **settings,
        ),
    )
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def _log(run: Any, record: dict[str, Any], offsets: dict[str, int]) -> None:
    fields = {k: v for k, v in record.items() if k not in ("kind", "stage", "step", "time", "nonfinite", "sites")}
    if record["kind"] == "summary":
        run.summary.update({k: v for k, v in fields.items() if v is not None})
        return
    values = {f"{record['kind']}/{k}": v for k, v in fields.items() if _is_number(v)}
    for site, stats in record.get("sites", {}).items():
        values.update(_flat_site(f"oscillation/{site}", stats))
    if values:
        step = offsets[record["stage"]] + record["step"]
        run.log({"global_step": step, "stage": record["stage"], "stage_step": record["step"], **values})


def _flat_site(prefix: str, stats: dict[str, Any]) -> dict[str, Any]:
    """Return W&B values of one site: numbers as they are, `scale` as mean, min, max, `bins` as a histogram of codes.

    The first bin is code `qmin` where the record has it, else 0.
    """
    import wandb

    values: dict[str, Any] = {f"{prefix}/{k}": v for k, v in stats.items() if k != "qmin" and _is_number(v)}
    if scale := [v for v in stats.get("scale") or () if v is not None]:
        values[f"{prefix}/scale"] = sum(scale) / len(scale)
        if len(scale) > 1:
            values |= {f"{prefix}/scale_min": min(scale), f"{prefix}/scale_max": max(scale)}
    if (bins := stats.get("bins")) and None not in bins:
        first = stats.get("qmin", 0)
        edges = [first + i - 0.5 for i in range(len(bins) + 1)]
        values[f"{prefix}/bins"] = wandb.Histogram(np_histogram=(bins, edges))
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
