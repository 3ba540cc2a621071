"""Check a machine or a job before it starts: the same launch line as for train.py, with this file in its place."""

import os
import sys
from pathlib import Path

import fire

from dsquant.errors import DsquantError

MARKS = {True: "ok  ", False: "FAIL"}


def doctor(
    recipe: str | None = None,
    ds_config: str | None = None,
    out_dir: str | None = None,
    local_rank: int = 0,
    **overrides,
) -> None:
    """Run every check on all ranks, print what each found, and leave with 1 if any failed.

    Args:
        recipe: name of a recipe in dsquant/recipes, or the path of a YAML file (default: digits_w2a2); overrides as for train.py.
        ds_config: DeepSpeed JSON with the ZeRO stage, see ds_configs/ (default: ZeRO 1).
        out_dir: folder of the run to come (default: runs/RECIPE).
        local_rank: set by the launcher; ignored, the environment says it.
    """
    from dsquant.config import DEFAULT_RECIPE, load_config, load_ds_config
    from dsquant.doctor import Doctor
    from dsquant.engine import init_world
    from dsquant.ops import backends

    del local_rank
    config = load_config(recipe or DEFAULT_RECIPE, overrides)
    ds = load_ds_config(ds_config) if ds_config else {"zero_optimization": {"stage": 1}}
    world = init_world()
    world.use_precision(config.precision)
    world.use_threads(config.cpu_threads)
    backends.use(config.backend)
    good = True
    for finding in Doctor(world, config, ds, Path(out_dir or f"runs/{config.recipe}")).examine():
        good &= finding.fault is None
        if world.rank == 0:
            told = (finding.fault or finding.found).replace("\n", "\n" + " " * 30)
            print(f"{MARKS[finding.fault is None]} {finding.name:24} {told}", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    try:
        fire.Fire(doctor, name="doctor.py")
    except DsquantError as error:
        sys.exit(f"dsquant: {error}" if os.environ.get("RANK", "0") == "0" else 1)
