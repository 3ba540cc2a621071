"""Run a function, or a script, on several ranks, each a process of its own: the engine of the `run_ranks` fixture.

Ranks are forked from a server that has imported torch, DeepSpeed and dsquant already, which takes five seconds a process: the
first call of a test process starts `python -m tests.ranks`, and writes it a line for each rank, with the environment that a
launcher would set. Arguments and results of functions, which gloo joins, travel through files in a folder; each rank's output
goes to FOLDER/rank<R>.log, its process id to rank<R>.pid and its exit code to rank<R>.code.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
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

REPO = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05
TAIL_LINES = 40
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


def run_script(world_size, words, output, cwd, env, timeout):
    """Run `python SCRIPT OPTIONS` (`words`) on every rank, or as one process with no environment of a launcher for None.

    All output goes to one file. Returns the exit code: that of the first rank that fails, which ends the others. Raises
    TimeoutError after `timeout` seconds.
    """
    output.write_text("")
    processes, port, deadline = [], _free_port(), time.monotonic() + timeout
    script = {"words": [str(word) for word in words], "cwd": str(cwd), "log": str(output.resolve())}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size or 1):
                processes.append(_start(rank, world_size, port, Path(folder), env, **script))
            codes = _codes(processes, deadline)
        finally:
            for process in processes:
                process.kill()
    if not any(codes) and None in codes:
        raise TimeoutError
    return next((code for code in codes if code), 0)


def _codes(processes, deadline):
    """Return exit codes once a rank has failed, all have ended, or the deadline is over; None for those that run."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes or time.monotonic() > deadline:
            return codes
        if (ended := _server().poll()) is not None:
            raise AssertionError(f"the server that forks ranks ended with {ended}; its output is above")
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

    def kill(self):
        """End the rank and all it has started, and wait for it."""
        _until(lambda: self._read("pid") is not None or self.poll() is not None)
        with contextlib.suppress(ProcessLookupError, TypeError):  # TypeError: it never had a pid
            os.killpg(self._read("pid"), signal.SIGKILL)
        _until(lambda: self.poll() is not None)


def _until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


_starting = threading.Lock()  # tests start ranks from several threads; there is one server, which reads line by line


@functools.cache
def _server():
    return subprocess.Popen([sys.executable, "-m", "tests.ranks"], cwd=REPO, stdin=subprocess.PIPE, text=True)


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
    order = {"rank": rank, "folder": str(folder.resolve()), "env": env, "task": task}
    with _starting:
        server = _server()
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
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


def serve():
    """Fork a rank for every line of stdin, until it ends; a second process waits for each and writes its exit code."""
    for module in PRELOADED:
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(**json.loads(line))


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
    serve()
