"""A run whose ranks are killed, and stopped, at random moments ends bit for bit as one that nothing happened to.

DSQ_SOAK_KILLS and DSQ_SOAK_STOPS set how many SIGKILLs and SIGUSR1s one run gets (default 1 and 1), DSQ_SOAK_SEED the moments.
What happened is left in the test's folder, `soak.json`.
"""

import json
import os
import random
import signal
import time

import psutil
import pytest

from dsquant.checkpoint import MANIFEST, Checkpoint, latest_checkpoint
from dsquant.preemption import EXIT_STOPPED
from tests.integration.runs import TINY, ds_config, kill, records, run_forked, start, train_command
from tests.integration.test_resume import assert_same_tensors, tensors, without_time

KILLS, STOPS = int(os.environ.get("DSQ_SOAK_KILLS", 1)), int(os.environ.get("DSQ_SOAK_STOPS", 1))
EVERY, STEPS = 5, max(15, 3 * (KILLS + STOPS))
STAGES = ("fp", "w2a2")
FREEZE = "stages.w2a2.quant.oscillation"
OPTIONS = (
    *("--recipe", TINY, "--ds_config", ds_config("zero2"), "--max_steps", STEPS, "--seed=7", "--telemetry.log_every=1"),
    *(f"--checkpoint.every_steps={EVERY}", "--checkpoint.keep_last=2", "--model.kwargs.proj_drop_rate=0.1"),
    *("--stages.fp.eval_every=0.5", "--stages.w2a2.eval_every=0.5", f"--{FREEZE}.momentum=0.1"),
    *(f"--{FREEZE}.freeze.enabled=True", f"--{FREEZE}.freeze.start=0", f"--{FREEZE}.freeze.first=0.05"),
    f"--{FREEZE}.freeze.last=0.02",
)
LEAVES_WITHIN_S = 60
CALIBRATING = "calibrating activation quantizers on training samples ..."


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_forked(train_command(*OPTIONS, "--out_dir", folder / "run", ranks=2), folder / "log", timeout=600).ok()
    return folder / "run"


def ranks_of(process, run_dir):
    """Return the ranks of a launcher once rank 0 has its log open, or None while it has not, and where it has ended."""
    try:
        found = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_rank(p)]
        if any(file.path == str(run_dir / "metrics.jsonl") for p in found for file in p.open_files()):
            return found
    except psutil.Error:
        return None


def _is_rank(process):
    return any(word.startswith("--local_rank") for word in process.cmdline())


def disturb(out_dir, log, number, chance):
    """Resume or start the run and signal one rank at a random moment of it; return what happened."""
    resume = ["--resume"] if (out_dir / "metrics.jsonl").exists() and (out_dir / "metrics.jsonl").stat().st_size else []
    process = start(train_command(*OPTIONS, "--out_dir", out_dir, *resume, ranks=2), log)
    try:
        found = wait_for_a_moment(process, out_dir, log, chance)
        if found is None:
            return {"ended": process.wait(LEAVES_WITHIN_S)}
        which = chance.randrange(len(found))
        saving = any(out_dir.glob("checkpoints/*/.step_*.partial"))
        try:
            found[which].send_signal(number)
        except psutil.NoSuchProcess:
            return {"ended": process.wait(LEAVES_WITHIN_S)}
        began, told = time.monotonic(), log.read_text()
        code = process.wait(4 * LEAVES_WITHIN_S)
        stage, step = reached(out_dir)
        phase = (
            "saving" if saving else "calibration" if told.rstrip().endswith(CALIBRATING) else "training or evaluation"
        )
        return {
            "signal": number.name, "rank": which, "stage": stage, "step": step, "phase": phase, "code": code,
            "seconds_to_end": round(time.monotonic() - began, 2),
        }  # fmt: skip
    finally:
        kill(process)


def wait_for_a_moment(process, out_dir, log, chance):
    """Return the ranks some steps after the start, some of the time in a save or a calibration; None where the run ends."""
    total, found, begun = STEPS * len(STAGES), None, None
    goal, in_save, in_calibration = (
        chance.uniform(0, min(1.6 * total / (KILLS + STOPS), total / 2)),
        *(chance.random() < 0.4 for _ in "ab"),
    )
    deadline = time.monotonic() + 240
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        found = found or ranks_of(process, out_dir)
        stage, step = reached(out_dir)
        done = STEPS * STAGES.index(stage) + step
        if found:
            begun = done if begun is None else begun
            saving = any(out_dir.glob("checkpoints/*/.step_*.partial"))
            calibrating = log.read_text().rstrip().endswith(CALIBRATING)
            late = done - begun - goal  # a save may pass between two looks
            if (late >= 0 and (saving or not in_save or late > EVERY)) or (calibrating and in_calibration):
                time.sleep(0 if saving else chance.uniform(0, 0.3))
                return found
        time.sleep(0.02)


def reached(out_dir):
    """Return stage and step of the last training record."""
    done = records(out_dir, "train") if (out_dir / "metrics.jsonl").exists() else []
    return (done[-1]["stage"], done[-1]["step"]) if done else (STAGES[0], 0)


def steps_lost(out_dir):
    """Return how many recorded steps a resume has to take again; every checkpoint that has its name must open."""
    for path in out_dir.glob(f"checkpoints/*/step_*/{MANIFEST}"):
        Checkpoint.open(path.parent)
    newest = latest_checkpoint(out_dir, list(STAGES))
    saved = STEPS * STAGES.index(newest.stage) + newest.step if newest else 0
    done = [STEPS * STAGES.index(r["stage"]) + r["step"] for r in records(out_dir, "train")]
    return max([0, *done]) - saved


def test_a_run_of_random_kills_and_stops_ends_as_one_that_was_left_alone(undisturbed, tmp_path):
    seed = int(os.environ.get("DSQ_SOAK_SEED") or random.SystemRandom().randrange(2**31))
    chance, out_dir, events = random.Random(seed), tmp_path / "run", []
    signals = [signal.SIGKILL] * KILLS + [signal.SIGUSR1] * STOPS
    chance.shuffle(signals)
    for index, number in enumerate(signals):
        event = disturb(out_dir, tmp_path / f"log{index}", number, chance)
        event["steps_lost"] = steps_lost(out_dir)
        events.append(event)
        (tmp_path / "soak.json").write_text(json.dumps({"seed": seed, "steps": STEPS, "events": events}, indent=1))
        told = (seed, event, (tmp_path / f"log{index}").read_text()[-3000:])
        if 0 in (event.get("ended"), event.get("code")):  # the run had no more than a moment left
            break
        assert event["steps_lost"] <= EVERY, told
        if number is signal.SIGUSR1:
            assert event.get("code") == EXIT_STOPPED, told
            assert event["steps_lost"] == 0, told
        else:
            assert event.get("code") not in (None, 0, EXIT_STOPPED), told
            assert event["seconds_to_end"] < LEAVES_WITHIN_S, told
    else:
        run_forked(
            train_command(*OPTIONS, "--out_dir", out_dir, "--resume", ranks=2), tmp_path / "last", timeout=600
        ).ok()
    assert any("signal" in event for event in events), events
    for kind in ("train", "eval", "oscillation"):
        assert without_time(records(out_dir, kind)) == without_time(records(undisturbed, kind)), (kind, seed)
    for stage in STAGES:
        end = f"checkpoints/{stage}/step_{STEPS:08d}"
        assert_same_tensors(tensors(out_dir / end), tensors(undisturbed / end))
    packed = "model.packed.safetensors"
    assert (out_dir / packed).read_bytes() == (undisturbed / packed).read_bytes()
    assert not [p for p in out_dir.rglob("*") if p.name.endswith((".partial", ".former", ".deleted", ".tmp"))]
