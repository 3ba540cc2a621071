"""A run that is stopped by signals, by hand or by Slurm, ends bit for bit as one that nothing happened to.

All runs here are the same: two ranks, float then 2 bits, with dropout, freezing and regularization. One of them is left alone.
"""

import os
import random
import signal
import sys
import time

import pytest

from dsquant.preemption import EXIT_STOPPED
from tests.integration.runs import (
    REPO,
    TINY,
    ds_config,
    kill,
    records,
    run,
    run_forked,
    start,
    start_forked,
    train_command,
)
from tests.integration.test_resume import assert_same_tensors, tensors, without_time
from tests.slurm.cluster import Cluster, missing

pytestmark = pytest.mark.slow
STEPS = 13
PAUSED = REPO / "tests" / "integration" / "paused_train.py"
FREEZE = "stages.w2a2.quant.oscillation"
OPTIONS = [
    "--recipe", str(TINY), "--max_steps", str(STEPS), "--seed=3", "--telemetry.wandb=disabled", "--telemetry.log_every=3",
    "--telemetry.oscillation_every=5", "--checkpoint.every_steps=5", "--checkpoint.keep_last=9", "--data.num_workers=1",
    "--data.eval_batch_size=30", "--stages.fp.eval_every=0.25", "--stages.w2a2.eval_every=0.25",
    "--model.kwargs.proj_drop_rate=0.1", f"--{FREEZE}.momentum=0.1", f"--{FREEZE}.freeze.enabled=True",
    f"--{FREEZE}.freeze.start=0", f"--{FREEZE}.freeze.first=0.05", f"--{FREEZE}.freeze.last=0.02",
]  # fmt: skip
PER_EVALUATION = 6  # batches of a rank: 360 samples / (2 ranks x 30)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of the run under the deepspeed launcher that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = ["--ds_config", ds_config("zero2"), *OPTIONS, "--out_dir", folder / "run"]
    run(train_command(*options, ranks=2), folder / "log").ok()
    return folder / "run"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Return a Slurm of two nodes."""
    if reason := missing():
        pytest.skip(reason)
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture
def pauses(tmp_path):
    """Return the folder that says where the run waits for a signal, and a function that adds such a point."""
    folder = tmp_path / "pauses"
    folder.mkdir()

    def add(order, where, count):
        (folder / f"{order}.{where}.{count}").touch()
        return folder / f"{order}.{where}.{count}.reached"

    return folder, add


def assert_as_undisturbed(out_dir, undisturbed):
    """Compare records, and every tensor of the last checkpoints: latents, moments, trackers, scales and their moments."""
    for kind in ("train", "eval", "oscillation", "stage"):
        assert without_time(records(out_dir, kind)) == without_time(records(undisturbed, kind)), kind
    written = [(r["stage"], r["step"]) for r in records(out_dir, "checkpoint")]
    assert len(written) == len(set(written))
    for stage in ("fp", "w2a2"):
        end = f"checkpoints/{stage}/step_{STEPS:08d}"
        assert_same_tensors(tensors(out_dir / end), tensors(undisturbed / end))
    packed = "model.packed.safetensors"
    assert (out_dir / packed).read_bytes() == (undisturbed / packed).read_bytes()


def test_the_run_has_evaluations_and_state_worth_comparing(undisturbed):
    evaluated = [(r["stage"], r["step"]) for r in records(undisturbed, "eval")]
    assert evaluated == [("fp", 6), ("fp", 12), ("fp", 13), ("w2a2", 0), ("w2a2", 6), ("w2a2", 12), ("w2a2", 13)]
    assert any(r["frozen_pct"] > 0 for r in records(undisturbed, "oscillation"))


def wait_until_reached(reached, running, log):
    """Wait until rank 1 waits for a signal; return its process id."""
    deadline = time.monotonic() + 240
    while not reached.exists():
        assert running(), log.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(reached.read_text())


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step_in_any_phase(
    undisturbed, pauses, tmp_path, monkeypatch
):
    """Without Slurm: the first time under the deepspeed launcher, then without it, the third time at a random step."""
    folder, add = pauses
    monkeypatch.setenv("PAUSES", str(folder))
    later = random.SystemRandom().randint(2, 5)  # 1 would be answered in the evaluation of step 6
    reached, out_dir, log = add(1, "training", 4), tmp_path / "run", tmp_path / "log"
    options = ["--ds_config", ds_config("zero2"), *OPTIONS, "--out_dir", out_dir]
    process = start(train_command(*options, ranks=2, script=PAUSED), log)
    try:
        os.kill(wait_until_reached(reached, lambda: process.poll() is None, log), signal.SIGUSR1)
        assert process.wait(60) == EXIT_STOPPED, log.read_text()[-4000:]
    finally:
        kill(process)
    # The question of step 4 is answered yes, and the answer is looked at after step 5.
    assert f"stopped in training: stage fp is saved at step 5 of {STEPS}" in log.read_text()
    assert records(out_dir, "train")[-1]["step"] == 5
    assert (out_dir / "checkpoints" / "fp" / "step_00000005" / "manifest.json").exists()
    for number, (where, count, step) in enumerate(
        [
            ("evaluation", 4 * PER_EVALUATION + 3, 6),  # of step 6, after three of the stage before and that of step 0
            ("training", later, 6 + later),  # after step 6, whose evaluation is done anew
            ("evaluation", PER_EVALUATION + 2, STEPS),  # of step 13, after that of 12
        ],
        2,
    ):
        reached, log = add(number, where, count), tmp_path / f"log{number}"
        with start_forked(train_command(*options, "--resume", ranks=2, script=PAUSED), log) as script:
            os.kill(wait_until_reached(reached, lambda s=script: s.codes() == [None, None], log), signal.SIGUSR1)
            assert script.wait(60, every=True) == [EXIT_STOPPED, EXIT_STOPPED], log.read_text()[-4000:]
        assert f"dsquant: stopped in {where}: stage w2a2 is saved at step {step} of {STEPS};" in log.read_text()
    run_forked(train_command(*options, "--resume", ranks=2), tmp_path / "resumed.log").ok()
    assert_as_undisturbed(out_dir, undisturbed)


def submit(cluster, folder, *options, **env):
    """Submit slurm/swin_w2.sh from a folder, two nodes with one CPU rank each; return the job."""
    fixed = {
        "PYTHONPATH": str(REPO),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "DSQUANT_PYTHON": sys.executable,
    }
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    script = REPO / "slurm" / "swin_w2.sh"
    words = ["sbatch", "--parsable", *shape, *options, script, *OPTIONS, "--out_dir", "a run"]
    return cluster.run(*words, cwd=folder, env=fixed | env)


def told(folder):
    """Return what the job's script and ranks have printed, for a failure."""
    return "\n".join(f"{p}:\n{p.read_text()[-3000:]}" for p in [*folder.glob("*.out"), *folder.rglob("rank_*.log")])


def wait_for_end(cluster, job, folder):
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.wait(job, lambda: cluster.field(job, "JobState") in ends, about="ends")
    assert cluster.field(job, "JobState") == "COMPLETED", told(folder)


def test_srun_trains_what_the_deepspeed_launcher_trains(cluster, undisturbed, tmp_path):
    """Submitted from another folder, into one whose name has a space, with nothing of the environment but what it needs."""
    job = submit(cluster, tmp_path)
    wait_for_end(cluster, job, tmp_path)
    assert_as_undisturbed(tmp_path / "a run", undisturbed)
    assert sorted(p.name for p in (tmp_path / "a run" / "logs" / f"{job}-start0").glob("rank_*.log")) == [
        "rank_0.log",
        "rank_1.log",
    ]
    assert "2 ranks on n[1-2]" in (tmp_path / f"slurm-swin_w2-{job}.out").read_text()


def test_a_job_stopped_by_its_time_limit_and_by_scancel_requeues_itself_and_ends_the_same(
    cluster, undisturbed, pauses, tmp_path
):
    """The limit comes in training, scancel in calibration."""
    folder, add = pauses
    points = [add(1, "training", 3), add(2, "calibration", 5)]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{PAUSED}" "$@"\n')
    python.chmod(0o755)
    job = submit(cluster, tmp_path, "--time=30", PAUSES=str(folder), DSQUANT_PYTHON=str(python))
    for number, reached in enumerate(points):
        stop_there(cluster, job, reached, by_limit=number == 0)
    wait_for_end(cluster, job, tmp_path)
    assert_as_undisturbed(tmp_path / "a run", undisturbed)
    log = (tmp_path / f"slurm-swin_w2-{job}.out").read_text()
    assert log.count(f"ended with exit code {EXIT_STOPPED}") == len(points)
    assert [line.split(";")[0] for line in log.splitlines() if line.startswith("dsquant: stopped in")] == [
        f"dsquant: stopped in training: stage fp is saved at step 4 of {STEPS}",
        "dsquant: stopped in calibration",
    ]


def stop_there(cluster, job, reached, by_limit):
    """Wait until a job is where it waits for a signal, have it signalled, and wait until it has requeued itself."""
    starts = int(cluster.field(job, "Restarts"))
    cluster.wait(job, reached.exists, about=f"gets to {reached.name}")
    if by_limit:  # in less than the 10 minutes of the script's --signal: Slurm sends it when it next looks, every 30 s
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=9")
    else:
        cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(job, lambda: has_requeued(cluster, job, starts), about="requeues")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")


def has_requeued(cluster, job, starts):
    return int(cluster.field(job, "Restarts")) > starts and cluster.field(job, "JobState") != "COMPLETING"
