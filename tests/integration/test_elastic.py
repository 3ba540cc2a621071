"""A checkpoint goes on with other numbers of ranks and other ZeRO stages: the very state that was saved, the same losses."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsquant.checkpoint import Checkpoint, load_run_checkpoint
from tests import ranks
from tests.integration.runs import ds_config, records
from tests.integration.test_resume import FREEZE

ENV = {"DS_ACCELERATOR": "cpu"}
BATCH, TOTAL, NEXT = 64, 40, 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the checkpoint of a 2-bit stage with weights frozen, of two ranks on ZeRO 2."""
    folder = tmp_path_factory.mktemp("elastic")
    overrides = {f"{FREEZE}.momentum": 0.1, f"{FREEZE}.freeze.enabled": True, f"{FREEZE}.freeze.start": 0}
    overrides |= {f"{FREEZE}.freeze.first": 0.05, f"{FREEZE}.freeze.last": 0.02, "seed": 5}
    entry = {"overrides": overrides, "ds_config": ds_config("zero2"), "out_dir": str(folder / "run"), "max_steps": 15}
    ranks.launch(2, "tests.integration.runs:train_in_process", {"runs": [entry]}, folder / "ranks", 200, ENV)
    return load_run_checkpoint(folder / "run", "w2a2").path


def go_on(path, folder, zeros, steps):
    """Restore a checkpoint, save it at once, take steps on fixed batches of 64 and save; so once for each ZeRO stage, in turn.

    Returns the losses of all steps over all ranks, the rates they were taken at, and the folders of what was saved at once.
    """
    from dsquant.checkpoint import restore, save_checkpoint
    from dsquant.config import load_ds_config
    from dsquant.engine import Engine, init_world
    from dsquant.loop import learning_rate
    from dsquant.models import build_model

    world, losses, rates, copies = init_world(), [], [], []
    config = Checkpoint.open(path).config
    stage = config.stages["w2a2"]
    for leg, zero in enumerate(zeros):
        engine = Engine(build_model(config.model), config, stage, load_ds_config(ds_config(zero)), world, TOTAL)
        restore(engine, Checkpoint.open(path))
        engine.train()
        copies.append(save_checkpoint(Path(folder) / f"copy{leg}", config, "w2a2", engine, done=False))
        for _ in range(steps):
            rates.append(learning_rate(stage, engine.step_index, TOTAL))
            losses.append(one_step(engine, rates[-1]))
        path = save_checkpoint(Path(folder) / "run", config, "w2a2", engine, done=False)
        engine.destroy()
    return torch.stack(losses).tolist(), rates, copies


def one_step(engine, lr):
    """Train on the batch of this step, of which every rank takes its part; return the mean loss over ranks."""
    world, generator = engine.world, torch.Generator().manual_seed(engine.step_index)
    images, labels = torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(10, (BATCH,), generator=generator)
    images, labels = (part.chunk(world.size)[world.rank] for part in (images, labels))
    loss = torch.nn.functional.cross_entropy(engine.forward(images), labels)
    engine.backward(loss)
    engine.step(lr)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / world.size


def state(path):
    """Return all that a checkpoint holds, whatever its layout: latents, moments, trackers, scales and their moments."""
    found = Checkpoint.open(path)
    whole = {(part, name): tensor for part in found.parts for name, tensor in found.whole(part).items()}
    quant = {("quant", key): tensor for key, tensor in found.replicated("quant").items()}
    buffers = {("buffer", key): tensor for key, tensor in found.buffers.items()}
    return whole | quant | buffers, found.manifest["optimizer_scalars"], found.step


def assert_same_state(path, other):
    (found, *rest), (wanted, *others) = state(path), state(other)
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert rest == others


@pytest.fixture(scope="module")
def undisturbed(saved, tmp_path_factory):
    """Return losses and rates of the next steps on two ranks and ZeRO 2, and the checkpoint saved at once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    kwargs = {"path": saved, "folder": str(folder), "zeros": ["zero2"], "steps": NEXT}
    losses, rates, (copy,) = ranks.launch(2, "tests.integration.test_elastic:go_on", kwargs, folder / "r", 200, ENV)[0]
    assert_same_state(copy, saved)
    return losses, rates, folder / "run" / copy.parent.relative_to(folder / "copy0")


def test_another_zero_stage_every_five_steps_changes_no_bit(saved, undisturbed, run_ranks, tmp_path):
    losses, rates, folder = undisturbed
    zeros = ["zero2", "zero3", "zero0", "zero1"]
    kwargs = {"path": saved, "folder": str(tmp_path), "zeros": zeros, "steps": NEXT // 4, "env": ENV}
    found, found_rates, copies = run_ranks(2, "tests.integration.test_elastic:go_on", **kwargs)[0]
    assert (found, found_rates) == (losses, rates)
    assert_same_state(copies[0], saved)
    ends = (tmp_path / "run" / "checkpoints" / "w2a2", folder)
    assert_same_state(*(max(end.glob("step_*")) for end in ends))


def test_from_two_ranks_to_one_and_back_every_bit_of_state_stays(saved, undisturbed, run_ranks, tmp_path):
    losses, rates, _ = undisturbed
    target, path = "tests.integration.test_elastic:go_on", saved
    for number, world_size in enumerate((1, 2)):
        kwargs = {"path": path, "folder": str(tmp_path / str(number)), "zeros": ["zero2"], "steps": NEXT, "env": ENV}
        found, found_rates, (copy,) = run_ranks(world_size, target, **kwargs)[0]
        assert_same_state(copy, saved)
        assert Checkpoint.open(copy).manifest["world_size"] == world_size
        assert found_rates == rates
        assert found == pytest.approx(losses, abs=1e-4) if world_size == 1 else found == losses
        path = copy


def test_a_run_goes_on_with_one_rank_and_with_two_again_on_the_samples_it_would_have_drawn(run_ranks, tmp_path):
    """The loss of every step, on the recipe's own data, is that of a run of two ranks to the end: in the middle of an epoch."""
    entry = {
        "overrides": {"checkpoint.every_steps": 10, "checkpoint.keep_last": 9, "telemetry.log_every": 1, "seed": 5}
    }
    entry |= {"ds_config": ds_config("zero2"), "out_dir": str(tmp_path / "whole"), "max_steps": 50}
    ranks.launch(2, "tests.integration.runs:train_in_process", {"runs": [entry]}, tmp_path / "ranks", 200, ENV)
    run_dir = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for world_size, step in ((1, 30), (2, 40)):
        kwargs = {"run_dir": run_dir, "legs": [("zero2", step)], "env": ENV}
        run_ranks(world_size, "tests.integration.test_resume:resume_in_process", **kwargs)
        assert load_run_checkpoint(run_dir, "w2a2").manifest["world_size"] == world_size
    wanted, found = records(tmp_path / "whole", "train"), records(run_dir, "train")
    assert [(r["stage"], r["step"], r["lr"]) for r in found] == [(r["stage"], r["step"], r["lr"]) for r in wanted]
    changed = [abs(a["loss"] - b["loss"]) for a, b in zip(found, wanted, strict=True)]
    assert 0 < max(changed) <= 1e-4  # another number of ranks adds gradients in another order
