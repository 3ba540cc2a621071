"""Train a recipe: `deepspeed dsquant/train.py --ds_config ds_configs/zero2.json`."""

import os
import sys
from pathlib import Path

# The launcher puts this file's own folder first on the path, where dsquant's modules would pass for top-level ones.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(str(Path(__file__).resolve().parents[1]))

import fire  # noqa: E402

from dsquant.errors import DsquantError  # noqa: E402
from dsquant.heartbeat import Heartbeat  # noqa: E402
from dsquant.preemption import EXIT_STOPPED, Stopped, StopRequest, leave_together  # noqa: E402

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
)
STOP, HEARTBEAT = StopRequest(), Heartbeat()
NO_DS_CONFIG = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def train(
    *words: str,
    recipe: str | None = None,
    ds_config: str | None = None,
    out_dir: str | None = None,
    max_steps: int | None = None,
    resume: bool = False,
    local_rank: int = 0,
    **overrides,
) -> None:
    """Train the stages of a recipe, then pack the result.

    Any recipe field can be set by its dotted name: --stages.w2a2.epochs=30 --data.num_workers=8 --seed=1
    SIGUSR1 or SIGTERM to any rank: all stop after the same step, with a checkpoint and exit code 75; --resume goes on.

    Args:
        words: none; every option has a name.
        recipe: name of a recipe in dsquant/recipes, or the path of a YAML file (default: digits_w2a2).
        ds_config: DeepSpeed JSON with the ZeRO stage, see ds_configs/ (default: ZeRO 1).
        out_dir: folder of the run (default: runs/RECIPE, numbered where taken; with --resume, the newest of these).
        max_steps: at most so many optimizer steps in each stage.
        resume: continue the run in out_dir from its newest whole checkpoint.
        local_rank: set by the launcher; ignored, the environment says it.
    """
    if words:
        raise DsquantError(f"{words[0]!r} belongs to no option; see --help")
    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.loop import Run
    from dsquant.ops import backends
    from dsquant.run_folder import prepare_run

    del local_rank
    ds = load_ds_config(ds_config) if ds_config else dict(NO_DS_CONFIG)
    world = init_world()
    HEARTBEAT.start(world.rank, world.size)
    if max_steps is not None:
        overrides["max_steps"] = max_steps
    config, run_dir = prepare_run(recipe, overrides, out_dir, resume)
    world.use_precision(config.precision)
    world.use_threads(config.cpu_threads)
    backends.use(config.backend)
    Run(config, ds, run_dir, world, resume=resume, stop=STOP, heartbeat=HEARTBEAT).execute()
    HEARTBEAT.stop()


def main() -> None:
    STOP.listen()  # before torch is loaded: a signal that comes earlier would end the process
    wants_help = {"-h", "--help"} & set(sys.argv[1:])  # fire would take it for one more override
    try:
        fire.Fire(train, ["--", "--help"] if wants_help else None, name="train.py")
    except Stopped as stopped:
        HEARTBEAT.stop()
        leave_together()
        if os.environ.get("RANK", "0") == "0":
            print(f"dsquant: {stopped}; --resume goes on from there", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except DsquantError as error:
        HEARTBEAT.stop(error=True)
        if os.environ.get("RANK", "0") != "0":
            STOP.release()
            if HEARTBEAT.rank_0_tells(within_s=5):  # what every rank meets; the launcher then ends the others
                sys.exit(1)
        sys.exit(f"dsquant: {error}")
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        STOP.release()
        HEARTBEAT.verdict()  # ends this process with the rank that is lost; a launcher may do so before
        sys.exit("dsquant: another rank has ended; its message says why")


if __name__ == "__main__":
    main()
