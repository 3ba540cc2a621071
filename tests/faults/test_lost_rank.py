"""A rank that dies or hangs, with no launcher that would notice, takes the others down, and they say which it was and where.

DSQ_SILENCE_S is 15 here; with its default of 40 the ranks leave as soon after that (docs/results/lost_rank.json).
"""

import os
import signal
import sys
import time

import pytest
import torch

from tests import ranks
from tests.integration.runs import TINY, ds_config, records

SILENCE_S = float(os.environ.get("DSQ_SILENCE_S", 15))
ENDLESS = [f"--stages.{stage}.epochs=100000" for stage in ("fp", "w2a2")]
OPTIONS = ["--recipe", TINY, "--ds_config", ds_config("zero2"), "--telemetry.log_every=1", "--telemetry.wandb=disabled"]
CASES = [(0, "SIGKILL"), (0, "SIGSTOP"), (1, "SIGKILL"), (1, "SIGSTOP"), (1, "error")]


def command(options):
    """Be the training command on this rank."""
    from dsquant.train import main

    sys.argv = ["train.py", *map(str, options)]
    main()


def fail_at_step(options, rank, step):
    """Be the training command, with an error that rank `rank` alone meets."""
    from dsquant.errors import DataError
    from dsquant.loop import Run

    take = Run._step

    def taken(self, name, stage, engine, *rest):
        if self.world.rank == rank and engine.step_index + 1 == step:
            raise DataError("this sample cannot be decoded")
        return take(self, name, stage, engine, *rest)

    Run._step = taken
    command(options)


def start(folder, victim, how):
    """Start two ranks as plain processes."""
    folder.mkdir(parents=True)
    kwargs, target = {"options": [*OPTIONS, *ENDLESS, "--out_dir", folder / "run"]}, "command"
    if how == "error":
        kwargs, target = kwargs | {"rank": victim, "step": 5}, "fail_at_step"
    torch.save(kwargs, folder / "kwargs.pt")
    env = {"DS_ACCELERATOR": "cpu", "DSQ_SILENCE_S": str(SILENCE_S)}
    port = ranks._free_port()
    target = f"tests.faults.test_lost_rank:{target}"
    return [ranks._start(rank, 2, port, folder, env, target=target) for rank in range(2)]


def until(condition, seconds):
    """Wait and return how long it took; fail after `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def steps(folder):
    path = folder / "run" / "metrics.jsonl"
    return len(records(folder / "run", "train")) if path.exists() else 0


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return, for every case, exit code and output of the rank that is left, and how long it stayed; all run side by side."""
    top, found = tmp_path_factory.mktemp("lost"), {}
    running = {case: (top / f"{case[0]}_{case[1]}", None) for case in CASES}
    running = {(victim, how): (folder, start(folder, victim, how)) for (victim, how), (folder, _) in running.items()}
    try:
        lost = {}
        for (victim, how), (folder, pair) in running.items():
            if how != "error":
                until(lambda folder=folder: steps(folder) >= 3, 120)
                os.kill(pair[victim]._read("pid"), getattr(signal, how))
            lost[victim, how] = time.monotonic()
        for (victim, how), (folder, pair) in running.items():
            other = pair[1 - victim]
            until(lambda other=other: other.poll() is not None, 100)
            output = (folder / f"rank{1 - victim}.log").read_text()
            ends = (folder / f"rank{1 - victim}.code").stat().st_mtime - time.time() + time.monotonic()
            found[victim, how] = other.poll(), output, ends - lost[victim, how]
    finally:
        for _, pair in running.values():
            for rank in pair:
                rank.kill()
    print({case: round(took, 1) for case, (_, _, took) in found.items()})
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_others_leave_in_time_with_an_error(ended, case):
    code, output, took = ended[case]
    assert code == 1, output[-3000:]
    assert took < 1.5 * SILENCE_S, took


@pytest.mark.parametrize("case", CASES)
def test_they_say_once_which_rank_is_lost_and_where(ended, case):
    victim, how = case
    _, output, _ = ended[case]
    said = [line for line in output.splitlines() if line.startswith("dsquant: ")]
    assert len(said) == 1, output[-3000:]
    if how == "error":
        assert said[0].startswith(f"dsquant: rank {victim} has ended; its message says why")
    elif victim == 0:
        assert said[0].startswith("dsquant: rank 0, which holds the ranks together, is gone or hangs")
    else:
        assert f"rank 1 is gone or hangs: nothing heard of it for {SILENCE_S:g} s, last in " in said[0]
    assert f"rank {1 - victim} leaves in stage fp, step " in said[0]


def beat_while_busy(seconds):
    """Rank 0 works alone for longer than the silence that is allowed; then both leave, rank 0 last."""
    from dsquant import heartbeat

    rank, found = torch.distributed.get_rank(), heartbeat.Heartbeat()
    found.start(rank, 2)
    if rank == 0:
        time.sleep(seconds)
    torch.distributed.barrier()
    found.stop()
    return rank


def test_a_rank_that_is_busy_alone_for_long_is_not_lost(run_ranks):
    silence = 4
    kwargs = {"seconds": 2.5 * silence, "env": {"DSQ_SILENCE_S": str(silence)}}
    assert run_ranks(2, "tests.faults.test_lost_rank:beat_while_busy", **kwargs) == [0, 1]


def leave(failing, rank_0_first):
    """Leave, some ranks with an error, one after the other; return whether rank 1 may be silent about it."""
    from dsquant import heartbeat

    rank, found = torch.distributed.get_rank(), heartbeat.Heartbeat()
    found.start(rank, 2)
    if (rank == 0) is not rank_0_first:
        time.sleep(1)
    found.stop(error=rank in failing)
    if rank == 1:
        return found.rank_0_tells(within_s=0.5 if rank_0_first else 3)
    time.sleep(2)  # the store is this process's
    return None


@pytest.mark.parametrize("rank_0_first", [True, False])
def test_rank_0_alone_tells_what_both_ranks_meet(run_ranks, rank_0_first):
    target, kwargs = "tests.faults.test_lost_rank:leave", {"rank_0_first": rank_0_first}
    assert run_ranks(2, target, failing=[0, 1], **kwargs)[1] is True
    assert run_ranks(2, target, failing=[1], **kwargs)[1] is False


def leave_and_start_anew():
    leave([0, 1], rank_0_first=True)
    return leave([1], rank_0_first=True)


def test_ranks_that_start_anew_on_the_same_store_forget_what_rank_0_told(run_ranks):
    assert run_ranks(2, "tests.faults.test_lost_rank:leave_and_start_anew")[1] is False


def fail_when_rank_0_is_gone():
    from dsquant import heartbeat

    rank, found = torch.distributed.get_rank(), heartbeat.Heartbeat()
    found.start(rank, 2)
    if rank == 0:
        return None
    time.sleep(5)
    found.stop(error=True)
    return found.rank_0_tells(within_s=0.5)


def test_a_rank_0_that_is_gone_without_a_word_keeps_no_other_from_telling_its_error(run_ranks):
    kwargs = {"env": {"DSQ_SILENCE_S": "200"}}  # nobody looks for it in the meantime
    assert run_ranks(2, "tests.faults.test_lost_rank:fail_when_rank_0_is_gone", **kwargs)[1] is False
