"""The folder of a run: which one, and the recipe it was started with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from dsquant.config import DEFAULT_RECIPE, RunConfig, load_config, parse_config
from dsquant.errors import ConfigError, DsquantError
from dsquant.files import write_atomically

RECIPE_FILE = "recipe.yaml"
TOKENIZER = "tokenizer"  # folder
SIMILAR_TOKENS = "similar_tokens.safetensors"
FREE_TO_CHANGE = ("telemetry", "checkpoint", "max_skipped")  # what a resumed run may have otherwise


def prepare_run(
    recipe: str | None, overrides: dict[str, Any], out_dir: str | None, resume: bool
) -> tuple[RunConfig, Path]:
    """Decide the run's folder and recipe on rank 0 and tell every rank.

    A new run keeps its resolved recipe in `recipe.yaml`; a resumed one must agree with it. Raises ConfigError for a
    folder that already holds a run, for nothing to resume, and for a recipe that differs.
    """

    def decide() -> tuple[dict[str, Any], str]:
        config, run_dir = _resumed(recipe, overrides, out_dir) if resume else _new(recipe, overrides, out_dir)
        return config.model_dump(mode="json"), str(run_dir)

    tree, run_dir = _from_rank0(decide)
    return parse_config(tree, f"{run_dir}/{RECIPE_FILE}"), Path(run_dir)


def _from_rank0(decide: Callable[[], Any]) -> Any:
    """Return on every rank what `decide` returns, or raise what it raises, on rank 0."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [decide()]
        except DsquantError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], DsquantError):
        raise box[0]
    return box[0]


def _new(recipe: str | None, overrides: dict[str, Any], out_dir: str | None) -> tuple[RunConfig, Path]:
    config = load_config(recipe or DEFAULT_RECIPE, overrides)
    if out_dir is None:
        run_dir = next(p for p in _candidates(config.recipe) if not _has_begun(p))
    else:
        run_dir = Path(out_dir)
        if _has_begun(run_dir):
            raise ConfigError(f"{run_dir} already holds a run; pass --resume to continue it, or another --out_dir")
    run_dir = run_dir.resolve()
    write_atomically(run_dir / RECIPE_FILE, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return config, run_dir


def _resumed(recipe: str | None, overrides: dict[str, Any], out_dir: str | None) -> tuple[RunConfig, Path]:
    if out_dir is None:
        taken = [p for p in _candidates(recipe or DEFAULT_RECIPE, until_free=True) if (p / RECIPE_FILE).exists()]
        if not taken:
            raise ConfigError("nothing to resume: no run of this recipe under runs/; name it with --out_dir")
        run_dir = taken[-1]
    else:
        run_dir = Path(out_dir)
    run_dir = run_dir.resolve()
    if not (run_dir / RECIPE_FILE).exists():
        raise ConfigError(f"nothing to resume: {run_dir} holds no {RECIPE_FILE}")
    kept = load_config(str(run_dir / RECIPE_FILE))
    config = load_config(recipe, overrides) if recipe else load_config(str(run_dir / RECIPE_FILE), overrides)
    if difference := _difference(kept.model_dump(mode="json"), config.model_dump(mode="json")):
        raise ConfigError(f"--resume: {difference}; a resumed run keeps its recipe, start a new --out_dir to change it")
    return config, run_dir


def _has_begun(run_dir: Path) -> bool:
    """Tell whether a folder holds records of training; one whose start failed (a wrong path, say) is free."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def _candidates(recipe: str, until_free: bool = False):
    """Yield runs/RECIPE, runs/RECIPE-2, ...; endlessly, or up to the first that does not exist."""
    number = 1
    while True:
        path = Path("runs") / (recipe if number == 1 else f"{recipe}-{number}")
        if until_free and not path.exists():
            return
        yield path
        number += 1


def _difference(kept: Any, now: Any, where: str = "") -> str | None:
    """Name the first key whose value differs, leaving out what may change."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in [*kept, *(k for k in now if k not in kept)]:
            if not where and key in FREE_TO_CHANGE:
                continue
            if found := _difference(kept.get(key), now.get(key), f"{where}.{key}" if where else str(key)):
                return found
        return None
    return None if kept == now else f"{where} was {json.dumps(kept)} and is now {json.dumps(now)}"
