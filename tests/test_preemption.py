"""A request to stop: heard by the process that was asked, agreed on by all ranks, and not heard by workers of a data loader."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import dsquant.data.workers as workers_module
from dsquant.data import ShardSet, TrainStream, write_shards
from dsquant.preemption import SIGNALS, Stopped, StopRequest
from tests.data.conftest import numbered_samples


@pytest.fixture
def listening():
    """Return a request that this process listens with; its handlers go after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest()
    stop.listen()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_one_process_stops_at_the_first_point_after_a_signal(listening, number):
    listening.join(1)
    listening.poll("training")
    signal.raise_signal(number)
    with pytest.raises(Stopped, match="stopped in training"):
        listening.poll("training")


RELEASED = """
import signal
from dsquant.preemption import StopRequest
stop = StopRequest()
stop.listen()
if {early}:
    signal.raise_signal(signal.SIGTERM)
stop.release()
print("released", flush=True)
signal.raise_signal(signal.SIGTERM)
print("outlived it", flush=True)
"""


@pytest.mark.parametrize("early", [False, True])
def test_a_released_process_ends_by_sigterm_also_by_one_that_came_before(early):
    """A rank that waits for another to report an error is ended by the launcher, and says nothing itself."""
    ended = subprocess.run([sys.executable, "-c", RELEASED.format(early=early)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "" if early else "released\n")


def polls_of_a_rank(asked_at, rounds):
    """Poll until all stop, rank r being signalled before poll asked_at[r]; return how often that went well."""
    rank, stop = torch.distributed.get_rank(), StopRequest()
    stop.listen()
    stop.join(torch.distributed.get_world_size())
    for done in range(rounds):
        if done == asked_at[rank]:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            stop.poll("training")
        except Stopped:
            return done
    return None


def agreed(asked):
    """Agree once, each rank with its own wish; return whether this rank was stopped."""
    stop = StopRequest()
    stop.join(torch.distributed.get_world_size())
    try:
        stop.agree(asked[torch.distributed.get_rank()], "soft labels")
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("asked_at", [[None, 3], [3, None], [2, 3]])
def test_ranks_stop_at_one_point_whichever_was_asked(run_ranks, asked_at):
    """The answer to the question of a point is looked at one point later."""
    first = min(at for at in asked_at if at is not None)
    assert run_ranks(2, "tests.test_preemption:polls_of_a_rank", asked_at=asked_at, rounds=9) == [first + 1] * 2


def test_ranks_that_nobody_asks_never_stop_and_one_wish_stops_all(run_ranks):
    found = run_ranks(2, "tests.test_preemption:polls_of_a_rank", asked_at=[None, None], rounds=50)
    assert found == [None, None]
    assert run_ranks(2, "tests.test_preemption:agreed", asked=[False, True]) == [True, True]


def workers():
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_that_reaches_a_worker_before_its_first_line_does_not_end_it(listening, tmp_path, monkeypatch):
    """torch gives a worker its own handler of SIGTERM, which ends it, before dsquant's first line in it runs."""
    write_shards(numbered_samples(8), tmp_path, "train", 8)
    start = workers_module._start_worker

    def signalled(worker):
        os.system(f"kill -{signal.SIGTERM.value} {os.getpid()}")
        start(worker)

    monkeypatch.setattr(workers_module, "_start_worker", signalled)
    stream = TrainStream(
        ShardSet.open(tmp_path), transform=lambda image: torch.zeros(1), batch_size=2, rank=0, world_size=1, seed=5,
        num_workers=2,
    )  # fmt: skip
    batches = stream.batches()
    assert len([next(batches) for _ in range(8)]) == 8
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches.close()


def test_workers_of_the_data_loader_go_on_through_signals_that_are_not_for_them(listening, tmp_path):
    """Slurm signals every process of a step; the parent ends its workers itself, by TERM too."""
    write_shards(numbered_samples(24), tmp_path, "train", 8)
    shards, others = ShardSet.open(tmp_path), {child.pid for child in workers()}

    def labels(num_workers):
        stream = TrainStream(
            shards, transform=lambda image: torch.zeros(1), batch_size=2, rank=0, world_size=1, seed=5,
            num_workers=num_workers,
        )  # fmt: skip
        return (batch[1].tolist() for batch in stream.batches())

    alone, batches = labels(0), labels(2)
    found = [next(batches)]
    mine = [child for child in workers() if child.pid not in others]
    assert len(mine) == 2
    for child in mine:  # as another process would: `kill` of this one is the parent's
        for number in SIGNALS:
            os.system(f"kill -{number.value} {child.pid}")
    time.sleep(0.2)
    found += [next(batches) for _ in range(30)]
    assert found == [next(alone) for _ in range(31)]
    assert all(child.is_running() for child in mine)
    assert not listening.asked
    mine[0].terminate()
    assert psutil.wait_procs(mine[:1], timeout=10)[0]
    batches.close()
    assert len(psutil.wait_procs(mine, timeout=20)[0]) == 2
