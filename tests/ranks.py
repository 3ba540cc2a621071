"""Run a function on several ranks, each a process of its own, joined by gloo: the engine of the `run_ranks` fixture.

The parent starts `python -m tests.ranks TARGET FOLDER` once per rank with the environment that a launcher would set.
Arguments and results travel through files in FOLDER; each rank's output goes to FOLDER/rank<R>.log.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

REPO = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05
TAIL_LINES = 40


def launch(world_size, target, kwargs, folder, timeout=120.0, env=None):
    """Call `target` ("package.module:function") with `kwargs` on every rank and return the results, rank 0 first.

    Kills all ranks as soon as one fails or `timeout` (seconds) has passed; then raises AssertionError with the end
    of the output of the rank to blame.
    """
    folder.mkdir(parents=True)
    torch.save(kwargs, folder / "kwargs.pt")
    processes = []
    try:
        port = _free_port()
        for rank in range(world_size):
            processes.append(_start(rank, world_size, port, target, folder, env or {}))
        _wait(processes, target, folder, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            _kill(process)
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(rank, world_size, port, target, folder, extra_env):
    """Start one rank in a process group of its own, so that killing it also ends whatever it started."""
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open(folder / f"rank{rank}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", target, str(folder)],
            cwd=REPO,
            env=env | extra_env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes, target, folder, deadline, timeout):
    """Return when every rank has ended well; raise AssertionError on the first failure or at the deadline."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:  # more than one where the others noticed before this loop did: show them all
            reports = [f"rank {rank} exited with {codes[rank]}\n{_tail(folder, rank)}" for rank in failed]
            raise AssertionError("\n".join([f"{target} failed:", *reports]))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            tails = "\n".join(_tail(folder, rank) for rank in running)
            raise AssertionError(f"{target}: ranks {running} still ran after {timeout:g} s\n{tails}")
        time.sleep(POLL_SECONDS)


def _tail(folder, rank):
    lines = (folder / f"rank{rank}.log").read_text(errors="replace").splitlines()
    return "\n".join([f"--- end of rank {rank}'s output ---", *lines[-TAIL_LINES:]])


def _kill(process):
    with contextlib.suppress(ProcessLookupError):  # the rank and all it started have ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(target, folder):
    """Be one rank: join the process group, call the target, leave the result in the folder."""
    folder = Path(folder)
    module, function = target.split(":")
    dist.init_process_group("gloo")
    result = getattr(importlib.import_module(module), function)(**torch.load(folder / "kwargs.pt", weights_only=False))
    torch.save(result, folder / f"result{dist.get_rank()}.pt")
    dist.barrier()  # no rank leaves while another may still wait for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
