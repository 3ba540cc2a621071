"""A loss or gradient that is not finite skips its step, on every rank and ZeRO stage, and leaves all state as it was."""

import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch

from dsquant.checkpoint import Checkpoint
from dsquant.errors import TrainingError
from tests.integration.runs import TINY, ds_config, records
from tests.integration.test_resume import assert_same_tensors, tensors, without_time

ENV = {"DS_ACCELERATOR": "cpu"}
ZEROS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload"]


def digest(engine):
    """Return a hash of all that a step may change: latents, moments, trackers, scales, images and buffers."""
    found = hashlib.sha256()
    held = [f.values for fragments in engine.shards.fragments for f in fragments]
    held += [t for flat in engine.shards.flats for t in engine.optimizer.state.get(flat, {}).values()]
    if engine.quantization:
        for weight in engine.quantization.weights.values():
            if weight.fragment is not None:
                held += [engine.quantization.latent(weight), *weight.tracker.tensors().values()]
        held += list(engine.state.state_dict().values())
    held += [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in engine.module.parameters()]
    for tensor in [*held, *engine.module.buffers()]:
        found.update(torch.as_tensor(tensor).detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Poison:
    """Make chosen steps of a stage not finite on rank 1: in a parameter's gradient, or by inputs that are huge."""

    def __init__(self, run, how, steps):
        self.run, self.how, self.steps, self.states = run, how, steps, []
        self.step = run._step
        run._step = self.take

    def take(self, name, stage, engine, taken, *rest):
        bad = (name, engine.step_index + 1) in self.steps
        handle = None
        if bad and self.run.world.rank == 1:
            if self.how == "inputs":
                taken[0][0].fill_(1e38)
            else:
                parameter = dict(engine.module.named_parameters())[self.how]
                handle = parameter.register_hook(lambda gradient: gradient * math.nan)
        before = digest(engine)
        found = self.step(name, stage, engine, taken, *rest)
        if handle and engine.skipped_in_a_row <= self.run.config.max_skipped:
            handle.remove()
        self.states.append(((name, engine.step_index), found[1], before == digest(engine)))
        return found


def train(runs):
    """Train the tiny recipe for each of `runs`, with poisoned steps; return what became of each step, or the error."""
    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.loop import Run
    from dsquant.run_folder import prepare_run

    world, found = init_world(), []
    for entry in runs:
        overrides = {"telemetry.wandb": "disabled", "telemetry.log_every": 1, "max_steps": 6} | entry["overrides"]
        config, run_dir = prepare_run(
            *entry.get("recipe", (str(TINY), overrides)), entry["out_dir"], entry.get("resume", False)
        )
        world.use_precision(config.precision)
        run = Run(config, load_ds_config(ds_config(entry["zero"])), run_dir, world, resume=entry.get("resume", False))
        poison = Poison(run, entry["how"], entry["steps"])
        try:
            found.append((poison.states, run.execute()))
        except TrainingError as error:
            found.append((poison.states, str(error)))
    return found


BAD = {("fp", 3), ("w2a2", 2), ("w2a2", 3)}
HOWS = ["blocks.0.mlp.fc1.weight", "inputs"]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """Return folder, and by (ZeRO stage, how) what became of each step on each of two ranks, and the summary."""
    from tests.ranks import launch

    folder = tmp_path_factory.mktemp("skipping")
    cases = [(zero, HOWS[n % 2], {}) for n, zero in enumerate(ZEROS)]
    cases += [("zero2", "blocks.1.norm2.weight", {"precision": "bf16"}), ("zero0", HOWS[0], {"precision": "bf16"})]
    runs = [
        {"zero": zero, "how": how, "steps": BAD, "overrides": more, "out_dir": str(folder / str(n))}
        for n, (zero, how, more) in enumerate(cases)
    ]
    per_rank = launch(2, "tests.faults.test_nonfinite:train", {"runs": runs}, folder / "ranks", 300, ENV)
    return folder, [(*case, [rank[n] for rank in per_rank]) for n, case in enumerate(cases)]


def test_steps_that_are_not_finite_are_skipped_on_every_rank_and_leave_every_bit(skipping):
    for zero, how, more, per_rank in skipping[1]:
        for states, summary in per_rank:
            assert isinstance(summary, dict), summary
            assert [at for at, skipped, _ in states if skipped] == sorted(BAD), (zero, how, more)
            assert [at for at, _, same in states if same] == sorted(BAD), (zero, how, more)
            assert summary["skipped_steps"] == 3


def test_skipped_steps_are_in_the_log_and_the_learning_rate_goes_on(skipping):
    folder, cases = skipping
    for n in range(len(cases)):
        found = records(folder / str(n), "train")
        assert [(r["stage"], r["step"]) for r in found] == [(s, k) for s in ("fp", "w2a2") for k in range(1, 7)]
        assert {(r["stage"], r["step"]) for r in found if r.get("skipped")} == BAD
        assert len({r["lr"] for r in found if r["stage"] == "fp"}) > 3
        assert (folder / str(n) / "report.html").exists()


def test_zero_stages_that_skipped_the_same_steps_have_the_same_losses(skipping):
    folder, cases = skipping
    for how in HOWS:
        same = [n for n, case in enumerate(cases) if case[1] == how and not case[2]]
        losses = [[r["loss"] for r in records(folder / str(n), "train")] for n in same]
        assert len(losses) > 1
        for other in losses[1:]:
            assert other == pytest.approx(losses[0], abs=1e-4)


def resumed_after_a_skip(folder):
    """Train on with a checkpoint every two steps, then once more from the one whose step was skipped, poisoned alike."""
    first, again = Path(folder) / "first", Path(folder) / "again"
    entry = {"zero": "zero2", "how": HOWS[0], "steps": BAD, "out_dir": str(first), "overrides": OFTEN}
    found = train([entry])
    if torch.distributed.get_rank() == 0:
        shutil.copytree(first, again)
        for step in (4, 6):
            shutil.rmtree(again / "checkpoints" / "w2a2" / f"step_{step:08d}")
    torch.distributed.barrier()
    return found + train([entry | {"out_dir": str(again), "resume": True, "recipe": (None, {})}])


OFTEN = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 9}


def test_a_run_that_resumes_after_a_skipped_step_ends_bit_for_bit(run_ranks, tmp_path):
    target = "tests.faults.test_nonfinite:resumed_after_a_skip"
    (_, whole), (states, resumed) = run_ranks(2, target, folder=str(tmp_path), env=ENV)[0]
    assert [at for at, *_ in states] == [("w2a2", step) for step in (3, 4, 5, 6)]
    assert whole["skipped_steps"] == resumed["skipped_steps"] == 3
    first, again = tmp_path / "first", tmp_path / "again"
    saved = [Checkpoint.open(run / "checkpoints" / "w2a2" / "step_00000002") for run in (first, again)]
    assert [checkpoint.manifest["skipped_in_a_row"] for checkpoint in saved] == [1, 1]
    end = "checkpoints/w2a2/step_00000006"
    assert_same_tensors(tensors(again / end), tensors(first / end))
    assert without_time(records(again, "train")) == without_time(records(first, "train"))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("zero", ["zero3"])
def test_one_more_than_the_limit_ends_the_run_and_names_where_it_begins(run_ranks, tmp_path, how, zero):
    entry = {
        "zero": zero, "how": how, "steps": {("fp", k) for k in (2, 4, 5, 6)}, "out_dir": str(tmp_path / "run"),
        "overrides": {"max_skipped": 2, "checkpoint.every_steps": 3},
    }  # fmt: skip
    per_rank = run_ranks(2, "tests.faults.test_nonfinite:train", runs=[entry], env=ENV)
    (_, first), (_, second) = (rank[0] for rank in per_rank)
    assert first == second
    assert "in 3 steps in a row, the last of them step 6 (max_skipped: 2)" in first
    what = "in the inputs" if how == "inputs" else f"the gradient of {how}"
    assert what in first or "the output of" in first, first
    assert "on rank 1, in samples 160 to 191 that it has drawn" in first
