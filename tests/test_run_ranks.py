"""The fixture that runs a function on several ranks does what tests rely on."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.integration.runs import run_forked


def sum_over_ranks(start):
    value = start + dist.get_rank()
    dist.all_reduce(value)
    return {"rank": dist.get_rank(), "local_rank": int(os.environ["LOCAL_RANK"]), "sum": value}


def fail_on_rank(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} cannot go on")
    dist.barrier()


def sleep_on_rank(rank, seconds):
    if dist.get_rank() == rank:
        time.sleep(seconds)


def test_an_all_reduce_over_two_ranks_gives_the_sum(run_ranks):
    results = run_ranks(2, "tests.test_run_ranks:sum_over_ranks", start=torch.tensor([10.0, 20.0]))
    assert [(r["rank"], r["local_rank"]) for r in results] == [(0, 0), (1, 1)]
    assert all(torch.equal(r["sum"], torch.tensor([21.0, 41.0])) for r in results)


def test_a_failing_rank_fails_the_test_with_its_message_and_ends_the_others(run_ranks):
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 exited with 1(?s:.*)ValueError: rank 1 cannot go on"):
        run_ranks(2, "tests.test_run_ranks:fail_on_rank", rank=1, timeout=100)
    assert time.monotonic() - started < 60  # rank 0 waits in a barrier; it is ended, not waited for


def test_a_rank_that_hangs_fails_the_test_at_the_timeout(run_ranks):
    with pytest.raises(AssertionError, match=r"still ran after 5 s"):
        run_ranks(2, "tests.test_run_ranks:sleep_on_rank", rank=1, seconds=300, timeout=5)


SCRIPT = """
import atexit, os, sys
atexit.register(print, "at the end")
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("RANK"), os.path.basename(sys.path[0]))
sys.exit(eval(sys.argv[1]))
"""


@pytest.mark.parametrize(("how", "code"), [("None", 0), ("3", 3), ("'a message'", 1), ("1/0", 1)])
def test_a_forked_script_is_told_and_ends_as_by_python(tmp_path, monkeypatch, how, code):
    monkeypatch.setenv("RANK", "0")  # as `init_world` leaves it
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    ended = run_forked([sys.executable, "scripts/script.py", how], tmp_path / "log", cwd=tmp_path)
    first, *rest = ended.output.splitlines()
    assert ended.code == code
    assert first == f"__main__ {[how]} {tmp_path} None scripts"
    assert "at the end" in rest
    assert ("a message" in rest, "Traceback (most recent call last):" in rest) == ("a" in how, how == "1/0")


def test_a_forked_script_runs_on_every_rank_and_one_that_fails_ends_the_others(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys, time\nsys.exit(4) if os.environ['RANK'] == '1' else time.sleep(100)\n"
    )
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", "0", str(tmp_path / "script.py")]
    started = time.monotonic()
    assert run_forked(command, tmp_path / "log").code == 4
    assert time.monotonic() - started < 60
