"""Real runs for the integration tests: the training command in processes of its own, and what it leaves behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import ranks

REPO = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
TRAIN = REPO / "dsquant" / "train.py"
QUIET = ("--telemetry.wandb=disabled",)
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass
class Ended:
    """Hold the exit code and all output of a command that has ended."""

    code: int
    output: str

    def ok(self) -> "Ended":
        """Return self; fail the test with the end of the output unless the command ended well."""
        assert self.code == 0, f"exit code {self.code}\n" + "\n".join(self.output.splitlines()[-60:])
        return self


def ds_config(name: str) -> Path:
    """Return the path of a shipped DeepSpeed configuration."""
    return REPO / "ds_configs" / f"{name}.json"


def train_command(*options: object, ranks: int | None = None, script: Path = TRAIN) -> list[str]:
    """Return the training command: through the deepspeed launcher, or as one process with `ranks=None`.

    script: train.py, or one that stands in for it.
    """
    start = [sys.executable]
    if ranks is not None:
        launcher = Path(sys.executable).with_name("deepspeed")
        start = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*start, str(script), *map(str, options), *QUIET]


def start(command: list[str], output: Path, cwd: Path = REPO) -> subprocess.Popen:
    """Start a command on the CPU in a process group of its own, all its output going to a file."""
    with open(output, "w") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=os.environ | ON_CPU, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a command and to everything it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: list[str], output: Path, cwd: Path = REPO, timeout: float = 240) -> Ended:
    """Run a command to its end; one that does not end in time is killed and fails the test."""
    process = start(command, output, cwd)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after {timeout} s:\n{output.read_text()[-4000:]}") from None
    finally:
        kill(process)
    return Ended(code, output.read_text(errors="replace"))


def start_forked(command: list[str], output: Path, cwd: Path = REPO) -> ranks.Script:
    """Start what `train_command` returns (or `python SCRIPT OPTIONS`) in processes that are forked, without the launcher.

    They have imported torch and DeepSpeed, which costs as much as many a run itself.
    """
    world_size, words = None, command[1:]
    if Path(command[0]).name == "deepspeed":
        assert (command[1], command[3]) == ("--num_accelerators", "--master_port"), command
        world_size, words = int(command[2]), command[5:]
    return ranks.start_script(world_size, words, output, cwd, ON_CPU)


def run_forked(command: list[str], output: Path, cwd: Path = REPO, timeout: float = 240) -> Ended:
    """Run a command as `run` does, in processes of `start_forked`; the first rank that fails ends the others."""
    with start_forked(command, output, cwd) as script:
        try:
            codes = script.wait(timeout)
        except TimeoutError:
            raise AssertionError(f"still running after {timeout} s:\n{output.read_text()[-4000:]}") from None
    return Ended(next((code for code in codes if code), 0), output.read_text(errors="replace"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def records(run_dir: Path, kind: str, stage: str | None = None) -> list[dict]:
    """Return the records of one kind in RUN/metrics.jsonl, read without dsquant; a line being written is left out."""
    whole, _, _ = (run_dir / "metrics.jsonl").read_text().rpartition("\n")
    found = [json.loads(line) for line in whole.splitlines()]
    return [r for r in found if r["kind"] == kind and stage in (None, r["stage"])]


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Return the training loss of every (stage, step)."""
    return {(r["stage"], r["step"]): r["loss"] for r in records(run_dir, "train")}


def train_in_process(runs: list[dict]) -> list[dict]:
    """Train the tiny recipe several times, one after another, on the ranks of `run_ranks`, and return their summaries.

    Each entry: overrides, ds_config (path), out_dir, max_steps, and a recipe in place of the tiny one, all as the command line
    takes them.
    """
    import deepspeed

    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.loop import Run
    from dsquant.run_folder import prepare_run

    deepspeed.init_distributed(dist_backend="gloo")
    world, summaries = init_world(), []
    for entry in runs:
        overrides = {"telemetry.wandb": "disabled", "max_steps": entry["max_steps"], **entry["overrides"]}
        config, run_dir = prepare_run(entry.get("recipe", str(TINY)), overrides, entry["out_dir"], False)
        world.use_precision(config.precision)
        summaries.append(Run(config, load_ds_config(entry["ds_config"]), run_dir, world).execute())
    return summaries


def pretrain(config, folder: Path, steps: int = 100) -> Path:
    """Train the float model of a recipe for a moment in plain PyTorch, so that quantization has something to lose.

    Returns a safetensors state dict for `model.checkpoint`.
    """
    import timm
    from safetensors.torch import save_file

    from dsquant.data import TrainStream, make_digits
    from dsquant.evaluation import transform_of

    torch.manual_seed(0)
    model = timm.create_model(config.model.name, num_classes=config.model.num_classes, **config.model.kwargs)
    stream = TrainStream(
        make_digits(folder / "data")[0], transform=transform_of(config.data, train=False), batch_size=64, rank=0,
        world_size=1, seed=1, shuffle_buffer=2048,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, (images, labels) in zip(range(steps), stream.batches(), strict=False):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5, f"the float model learned too little for what follows: loss {loss:.2f}"
    save_file(model.state_dict(), folder / "pretrained.safetensors")
    return folder / "pretrained.safetensors"
