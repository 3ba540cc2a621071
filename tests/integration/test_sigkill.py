"""A run whose ranks are killed, and stopped, at random moments ends bit for bit as one that nothing happened to.

DSQ_SOAK_KILLS and DSQ_SOAK_STOPS set how many SIGKILLs and SIGUSR1s one run gets (default 2 and 2), DSQ_SOAK_SEED the moments.
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
from tests.integration.runs import TINY, ds_config, kill, records, run, start, train_command
from tests.integration.test_resume import assert_same_tensors, tensors, without_time

KILLS, STOPS = (int(os.environ.get(f"DSQ_SOAK_{name}", 2)) for name in ("KILLS", "STOPS"))
EVERY, STEPS = 5, max(20, 8 * (KILLS + STOPS))
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(train_command(*OPTIONS, "--out_dir", folder / "run", ranks=2), folder / "log", timeout=600).ok()
    return folder / "run"


def seconds_of(run_dir):
    """Return how long a run took from its first record to its last."""
    times = [record["time"] for kind in ("stage", "summary") for record in records(run_dir, kind)]
    return max(times) - min(times)


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


def disturb(out_dir, log, number, delay, which):
    """Resume or start the run, and signal one rank `delay` seconds after it has begun; return what happened."""
    resume = ["--resume"] if (out_dir / "metrics.jsonl").exists() and (out_dir / "metrics.jsonl").stat().st_size else []
    process, found = start(train_command(*OPTIONS, "--out_dir", out_dir, *resume, ranks=2), log), None
    try:
        deadline = time.monotonic() + 180
        while process.poll() is None and not (found := ranks_of(process, out_dir)):
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is not None:
            return {"ended": process.returncode}
        victim = found[which % len(found)]
        saving = any(out_dir.glob("checkpoints/*/.step_*.partial"))
        last = (records(out_dir, "train") or [{"stage": STAGES[0], "step": 0}])[-1]
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            return {"ended": process.wait(60)}
        began = time.monotonic()
        code = process.wait(LEAVES_WITHIN_S)
        took = round(time.monotonic() - began, 2)
        return {
            "signal": number.name, "rank": which % len(found), "stage": last["stage"], "step": last["step"],
            "saving": saving, "code": code, "seconds_to_end": took,
        }  # fmt: skip
    finally:
        kill(process)


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
    longest = 1.4 * seconds_of(undisturbed) / len(signals)
    for index, number in enumerate(signals):
        event = disturb(out_dir, tmp_path / f"log{index}", number, chance.uniform(0, longest), chance.randrange(2))
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
    else:
        run(train_command(*OPTIONS, "--out_dir", out_dir, "--resume", ranks=2), tmp_path / "last", timeout=600).ok()
    assert len(events) > 1, events
    for kind in ("train", "eval", "oscillation"):
        assert without_time(records(out_dir, kind)) == without_time(records(undisturbed, kind)), (kind, seed)
    for stage in STAGES:
        end = f"checkpoints/{stage}/step_{STEPS:08d}"
        assert_same_tensors(tensors(out_dir / end), tensors(undisturbed / end))
    packed = "model.packed.safetensors"
    assert (out_dir / packed).read_bytes() == (undisturbed / packed).read_bytes()
    assert not [p for p in out_dir.rglob("*") if p.name.endswith((".partial", ".former", ".deleted", ".tmp"))]
