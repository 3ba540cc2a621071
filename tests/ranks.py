"""Run a function, or a script, on several ranks, each a process of its own: the engine of the `run_ranks` fixture.

Ranks are forked from a server that has imported torch, DeepSpeed and dsquant already, which takes tens of seconds a process:
`python -m tests.ranks`, started by the first call of any test process and shared by all of one run of pytest. They write it a
line for each rank: the name of a file that says what to run, in which environment, as a launcher would set it. Arguments and
results of functions, which gloo joins, travel through files in a folder; each rank's output goes to FOLDER/rank<R>.log, its
process id to rank<R>.pid and its exit code to rank<R>.code.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock

REPO = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05
TAIL_LINES = 40
# The folder that test processes share, which `tests/conftest.py` sets; None: each has its own.
SHARED: Path | None = None
# What a run imports, most of it late: torch's compiler through DeepSpeed, scipy and pandas through scikit-learn.
PRELOADED = (
    "timm",
    "dsquant.loop",
    "dsquant.ops.backends",
    "torch._inductor.compile_fx",
    "sklearn.datasets",
    "sklearn.metrics",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.bert.modeling_bert",
)


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
            processes.append(_start(rank, world_size, port, folder, env or {}, target=target))
        _wait(processes, target, folder, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


@dataclass
class Script:
    """Stand for a script that runs on every rank; use it in a `with` statement, which ends whatever still runs."""

    ranks: list["Rank"]
    folder: tempfile.TemporaryDirectory

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.folder.cleanup()

    def codes(self):
        """Return the exit code of every rank, negative for a signal, or None while it runs."""
        return [rank.poll() for rank in self.ranks]

    def kill(self):
        """Send SIGKILL to all ranks and to all that they have started, and wait for them."""
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.kill()

    def wait(self, timeout, every=False):
        """Return the exit codes once a rank has failed or all have ended, or once all have ended with `every`.

        Raises TimeoutError after `timeout` seconds.
        """
        codes = _codes(self.ranks, time.monotonic() + timeout, every)
        if None in codes and (every or not any(codes)):
            raise TimeoutError
        return codes


def start_script(world_size, words, output, cwd, env):
    """Start `python SCRIPT OPTIONS` (`words`) on every rank, or as one process with no environment of a launcher for None.

    All output goes to one file.
    """
    output.write_text("")
    folder, port = tempfile.TemporaryDirectory(), _free_port()
    script = {"words": [str(word) for word in words], "cwd": str(cwd), "log": str(output.resolve())}
    started = [_start(rank, world_size, port, Path(folder.name), env, **script) for rank in range(world_size or 1)]
    return Script(started, folder)


def _codes(processes, deadline, every=False):
    """Return exit codes once a rank has failed (not with `every`), all have ended, or the deadline is over; None: it runs."""
    while True:
        codes = [process.poll() for process in processes]
        if (any(codes) and not every) or None not in codes or time.monotonic() > deadline:
            return codes
        if _has_ended(_server()):
            raise AssertionError("the server that forks ranks has ended; its output is above")
        time.sleep(POLL_SECONDS)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Rank:
    """Stand for a process that the server forks, which leads a group of its own: killing it ends all that it started."""

    folder: Path
    rank: int

    def _read(self, what):
        path = self.folder / f"rank{self.rank}.{what}"
        return int(path.read_text()) if path.exists() else None

    def poll(self):
        """Return the exit code, negative for a signal, or None while the rank runs."""
        return self._read("code")

    def signal(self, number):
        """Send a signal to the rank and to all it has started."""
        _until(lambda: self._read("pid") is not None or self.poll() is not None)
        with contextlib.suppress(ProcessLookupError, TypeError):  # TypeError: it never had a pid
            os.killpg(self._read("pid"), number)

    def kill(self):
        """End the rank and all it has started, and wait for it."""
        self.signal(signal.SIGKILL)
        _until(lambda: self.poll() is not None)


def _until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


_starting = threading.Lock()  # tests start ranks from several threads


@functools.cache
def _server():
    """Return the pipe that the server reads, a line at a time from whoever writes; this process holds it open to its end."""
    folder = SHARED or Path(tempfile.mkdtemp(prefix="ranks"))
    pipe, server, deadline = folder / "ranks.pipe", None, time.monotonic() + 120
    with FileLock(folder / "ranks.lock"):
        if not pipe.exists():
            os.mkfifo(pipe)
        while True:
            with contextlib.suppress(OSError):  # nobody reads it: no server yet, or no longer
                return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            server = server or subprocess.Popen([sys.executable, "-m", "tests.ranks", pipe], cwd=REPO)
            assert server.poll() is None, "the server that forks ranks has ended; its output is above"
            assert time.monotonic() < deadline, "the server that forks ranks does not listen"
            time.sleep(POLL_SECONDS)


def _has_ended(server):
    """Say whether nobody reads the pipe of a server any more."""
    looked = select.poll()
    looked.register(server, select.POLLERR)
    return bool(looked.poll(0))


def _start(rank, world_size, port, folder, extra_env, **task):
    """Have a rank forked; `task`: the arguments of `main`, or of `script` and `log`. A world of None is no launcher's."""
    launched = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # What the tests' own process has adopted of a launcher, with a port that is in use, is not for others.
    env = {key: value for key, value in os.environ.items() if key not in launched}
    env |= (launched if world_size else {}) | extra_env
    folder = folder.resolve()
    order = folder / f"rank{rank}.order"
    order.write_text(json.dumps({"rank": rank, "folder": str(folder), "env": env, "task": task}))
    with _starting:
        os.write(_server(), f"{order}\n".encode())  # so few bytes arrive together, whoever else writes
    return Rank(folder, rank)


def _wait(processes, target, folder, deadline, timeout):
    """Return when every rank has ended well; raise AssertionError on the first failure or at the deadline."""
    codes = _codes(processes, deadline)
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:  # more than one where the others noticed before this loop did: show them all
        reports = [f"rank {rank} exited with {codes[rank]}\n{_tail(folder, rank)}" for rank in failed]
        raise AssertionError("\n".join([f"{target} failed:", *reports]))
    running = [rank for rank, code in enumerate(codes) if code is None]
    if running:
        tails = "\n".join(_tail(folder, rank) for rank in running)
        raise AssertionError(f"{target}: ranks {running} still ran after {timeout:g} s\n{tails}")


def _tail(folder, rank):
    log = folder / f"rank{rank}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["(it never began)"]
    return "\n".join([f"--- end of rank {rank}'s output ---", *lines[-TAIL_LINES:]])


def main(target, folder):
    """Be one rank: join the process group, call the target, leave the result in the folder."""
    module, function = target.split(":")
    dist.init_process_group("gloo")
    result = getattr(importlib.import_module(module), function)(**torch.load(folder / "kwargs.pt", weights_only=False))
    torch.save(result, folder / f"result{dist.get_rank()}.pt")
    dist.barrier()  # no rank leaves while another may still wait for it
    dist.destroy_process_group()


def script(words, cwd):
    """Be `python SCRIPT OPTIONS`: run the file as `__main__`, and what is to run at the end of the process."""
    os.chdir(cwd)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def serve(pipe):
    """Fork a rank for every line of a pipe, until nobody holds it; a second process waits for each and writes its exit code."""
    orders = open(pipe)  # noqa: SIM115
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a rank neither looks through all of this again nor copies its pages

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    for line in orders:
        if os.fork() == 0:
            os.close(orders.fileno())  # whoever writes sees that the server has ended, also while ranks run
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(**json.loads(Path(line.rstrip("\n")).read_text()))
    os._exit(0)  # at once: nobody is to find the pipe open that nobody reads


def _watch(rank, folder, env, task):
    folder = Path(folder)
    child = os.fork()
    if child == 0:
        _be(rank, folder, env, **task)
    _write(folder / f"rank{rank}.pid", child)
    _, status = os.waitpid(child, 0)
    _write(folder / f"rank{rank}.code", os.waitstatus_to_exitcode(status))
    os._exit(0)


def _be(rank, folder, env, target=None, words=None, cwd=None, log=None):
    code = 1
    try:
        os.setsid()
        with open(log or folder / f"rank{rank}.log", "a") as log, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.clear()
        os.environ.update(env)
        torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
        if target:
            main(target, folder)
        else:
            script(words, cwd)
        code = 0
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _write(path, number):
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(str(number))
    partial.rename(path)


if __name__ == "__main__":
    serve(sys.argv[1])
