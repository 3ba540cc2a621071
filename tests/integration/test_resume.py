"""A run that was killed goes on as if nothing had happened, on any ZeRO stage; damaged checkpoints yield to whole ones."""

import json
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsquant.checkpoint import Checkpoint, _hash, load_model, load_run_checkpoint
from tests import ranks
from tests.integration.runs import TINY, ds_config, records, run_forked, start_forked, train_command

STEPS, EVERY = 28, 5  # an epoch is of 22
FREEZE = "stages.w2a2.quant.oscillation"
OPTIONS = (
    *("--recipe", TINY, "--data.num_workers=1", "--model.kwargs.proj_drop_rate=0.1", "--telemetry.log_every=1"),
    *(f"--checkpoint.every_steps={EVERY}", "--checkpoint.keep_last=9", f"--{FREEZE}.momentum=0.1"),
    *(f"--{FREEZE}.freeze.enabled=True", f"--{FREEZE}.freeze.start=0"),
    *(f"--{FREEZE}.freeze.first=0.05", f"--{FREEZE}.freeze.last=0.02"),
)
ENV = {"DS_ACCELERATOR": "cpu"}


def command(out_dir, *options, zero="zero3", ranks=2):
    return train_command(
        "--ds_config", ds_config(zero), "--max_steps", STEPS, "--out_dir", out_dir, *options, ranks=ranks
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of a run on two ranks, with regularization, freezing and dropout, that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_forked(command(folder / "run", *OPTIONS), folder / "log").ok()
    return folder / "run"


def kill_at(out_dir, log, stage, step):
    """Start the same run and kill it, with all it has started, once it has recorded a step of a stage."""
    deadline = time.monotonic() + 200
    with start_forked(command(out_dir, *OPTIONS), log) as script:
        while not (out_dir / "metrics.jsonl").exists() or _last_step(out_dir, stage) < step:
            assert script.codes() == [None, None], log.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)


def _last_step(out_dir, stage):
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    whole = [line for line in lines if line.endswith("}") and f'"train", "stage": "{stage}"' in line]
    return int(whole[-1].split('"step": ')[1].split(",")[0]) if whole else -1


def tensors(checkpoint):
    """Return every tensor of a checkpoint by file and key."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {(file.name, key): tensor for file in files for key, tensor in load_file(file).items()}


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


def without_time(found):
    return [{k: v for k, v in record.items() if k not in ("time", "images_per_second")} for record in found]


@pytest.mark.parametrize("stage", ["fp", "w2a2"])
def test_a_killed_run_resumes_bit_for_bit(undisturbed, tmp_path, stage):
    out_dir, step = tmp_path / "run", random.SystemRandom().randint(EVERY + 1, STEPS - 4)
    kill_at(out_dir, tmp_path / "killed.log", stage, step)
    reached = [(r["stage"], r["step"]) for r in records(out_dir, "train")][-1]
    assert reached[0] == stage, f"killed at step {step}: the run was already at {reached}"
    run_forked(command(out_dir, "--resume"), tmp_path / "resumed.log").ok()
    for kind in ("train", "eval", "oscillation"):
        assert without_time(records(out_dir, kind)) == without_time(records(undisturbed, kind)), (step, reached)
    for name in ("fp", "w2a2"):
        end = f"checkpoints/{name}/step_{STEPS:08d}"
        assert_same_tensors(tensors(out_dir / end), tensors(undisturbed / end))


def test_the_run_that_is_resumed_freezes_weights_and_keeps_all_of_its_state(undisturbed):
    checkpoint = load_run_checkpoint(undisturbed, "w2a2")
    moments = {"exp_avg", "exp_avg_sq"}
    trackers = {f"tracker.{part}" for part in ("codes", "direction", "frequency", "code_mean", "frozen")}
    assert {"weight", *moments, *trackers} == set(checkpoint.parts)
    frozen = sum(int(part.sum()) for part in checkpoint.whole("tracker.frozen").values())
    weights = sum(part.numel() for part in checkpoint.whole("tracker.frozen").values())
    assert 0 < frozen < weights
    assert any(r["frozen_pct"] > 0 for r in records(undisturbed, "oscillation"))


def as_version_1(checkpoint, folder):
    """Write a checkpoint as version 1 had it: frequencies as they are, no gradients of scales that wait."""
    shutil.copytree(checkpoint.path, folder)
    manifest = checkpoint.manifest | {"version": 1, "files": dict(checkpoint.manifest["files"])}
    for file in folder.glob("*.safetensors"):
        held = {key: t for key, t in load_file(file).items() if not key.endswith("/grad")}
        left = checkpoint.tracker_step.left
        save_file(held | {key: t * left for key, t in held.items() if key.startswith("tracker.frequency/")}, file)
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "blake2b": _hash(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Checkpoint.open(folder)


def test_a_checkpoint_of_version_1_held_frequencies_and_no_gradients_that_wait(undisturbed, tmp_path):
    now = load_run_checkpoint(undisturbed, "w2a2")
    old = as_version_1(now, tmp_path / "step")
    assert now.tracker_step.left < 1
    wanted, found = now.whole("tracker.frequency"), old.whole("tracker.frequency")
    assert any(t.any() for t in wanted.values())
    for name, kept in wanted.items():
        torch.testing.assert_close(found[name], kept, rtol=1e-6, atol=0)
    waiting = [key for key in now.quant_state if key.endswith("/grad")]
    assert any(now.quant_state[key].any() for key in waiting)
    assert now.quant_state.keys() == old.quant_state.keys()
    assert not any(old.quant_state[key].any() for key in waiting)


def state_of(engine):
    """Return the fragments of this rank: (part, weight, offset, values)."""
    found = []
    for flat, fragments in zip(engine.shards.flats, engine.shards.fragments, strict=True):
        for f in fragments:
            weight = engine.quantization.weights.get(f.name)
            parts = {"weight": engine.quantization.latent(weight) if weight else f.values}
            parts |= {key: f.of(engine.optimizer.state[flat][key]) for key in ("exp_avg", "exp_avg_sq")}
            if weight:
                parts |= {f"tracker.{key}": value for key, value in weight.tracker.tensors().items()}
            found += [(part, f.name, f.offset, value.detach().clone()) for part, value in parts.items()]
    return found


def restored(path, stages):
    """Restore a checkpoint into engines of several ZeRO stages; return (state, quantizer state, step, logits) of each."""
    import deepspeed

    from dsquant.checkpoint import restore
    from dsquant.config import load_ds_config
    from dsquant.engine import Engine, init_world
    from dsquant.models import build_model

    deepspeed.init_distributed(dist_backend="gloo")
    world, checkpoint, found = init_world(), Checkpoint.open(path), {}
    for zero in stages:
        config = checkpoint.config
        stage = config.stages["w2a2"]
        engine = Engine(build_model(config.model), config, stage, load_ds_config(ds_config(zero)), world, STEPS)
        restore(engine, checkpoint)
        engine.eval()
        quant = engine.state.state_dict()
        found[zero] = state_of(engine), quant, engine.step_index, engine.evaluate_logits(probe())
        engine.destroy()
    return found


def probe():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("world_size", [1, 2])
def test_any_zero_stage_and_world_size_restores_the_very_same_state(undisturbed, run_ranks, world_size):
    path = undisturbed / "checkpoints" / "w2a2" / f"step_{5 * EVERY:08d}"
    checkpoint, stages = Checkpoint.open(path), ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
    target = "tests.integration.test_resume:restored"
    per_rank = run_ranks(world_size, target, path=path, stages=stages, env=ENV)
    with torch.no_grad():
        logits = load_model(checkpoint)(probe())
    for zero in stages:
        covered = dict.fromkeys(checkpoint.parts, 0)
        for state, quant, step, found_logits in (rank[zero] for rank in per_rank):
            assert step == checkpoint.step
            assert_same_tensors(quant, checkpoint.replicated("quant"))
            torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
            for part, name, offset, held in state:
                assert torch.equal(held, checkpoint.read(part, name, offset, held.numel())), (zero, part, name)
                covered[part] += held.numel()
        copies = world_size if zero == "zero0" else 1
        assert covered == {p: copies * sum(t.numel() for t in checkpoint.whole(p).values()) for p in checkpoint.parts}


def resume_in_process(run_dir, legs):
    """Resume a run once for each (ZeRO stage, step): from that step of the 2-bit stage on, to its end."""
    import deepspeed
    import torch.distributed as dist

    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.loop import Run
    from dsquant.run_folder import prepare_run

    deepspeed.init_distributed(dist_backend="gloo")
    world = init_world()
    for zero, step in legs:
        if world.rank == 0:
            forget(run_dir, after=step)
        dist.barrier()
        config, folder = prepare_run(None, {}, str(run_dir), True)
        Run(config, load_ds_config(ds_config(zero)), folder, world, resume=True).execute()


def forget(run_dir, after):
    """Remove the checkpoints of the 2-bit stage after a step."""
    for path in (run_dir / "checkpoints" / "w2a2").glob("step_*"):
        if int(path.name.removeprefix("step_")) > after:
            shutil.rmtree(path)


def test_a_run_moves_from_zero_3_to_2_to_3_to_0_and_its_losses_go_on(undisturbed, tmp_path):
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    legs = [("zero2", 2 * EVERY), ("zero3", 3 * EVERY), ("zero0", 4 * EVERY)]
    target, kwargs = "tests.integration.test_resume:resume_in_process", {"run_dir": run_dir, "legs": legs}
    ranks.launch(2, target, kwargs, tmp_path / "ranks", 200, ENV)
    wanted, found = records(undisturbed, "train"), records(run_dir, "train")
    assert [(r["stage"], r["step"], r["lr"]) for r in found] == [(r["stage"], r["step"], r["lr"]) for r in wanted]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(found, wanted, strict=True)) <= 1e-4
    written_by = {c.name: Checkpoint.open(c).manifest["zero_stage"] for c in run_dir.glob("checkpoints/w2a2/step_*")}
    assert written_by == {
        f"step_{n:08d}": zero for n, zero in zip([*range(EVERY, STEPS, EVERY), STEPS], (3, 3, 2, 3, 0, 0), strict=True)
    }


def damage(checkpoint):
    """Change one byte in the middle of a rank's file, its size staying the same."""
    path = checkpoint / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    return path


def test_a_damaged_checkpoint_yields_with_a_message_and_a_save_that_was_killed_is_cleaned_up(undisturbed, tmp_path):
    """Resumed by one process where two ranks trained: any world size may go on."""
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    folder = run_dir / "checkpoints" / "w2a2"
    forget(run_dir, after=5 * EVERY)
    damaged, partial = damage(folder / f"step_{5 * EVERY:08d}"), folder / f".step_{6 * EVERY:08d}.partial"
    partial.mkdir()
    (partial / "rank_00000.safetensors").write_bytes(b"half a fi")
    output = run_forked(command(run_dir, "--resume", zero="zero1", ranks=None), tmp_path / "log").ok().output
    assert str(damaged) in output, output
    assert not partial.exists()
    found = records(run_dir, "train")
    assert [(r["stage"], r["step"]) for r in found] == [(s, n) for s in ("fp", "w2a2") for n in range(1, STEPS + 1)]
    split = STEPS + 4 * EVERY  # the newest whole checkpoint is of this step; one rank then draws other batches
    assert without_time(found[:split]) == without_time(records(undisturbed, "train")[:split])
    assert all(0 < r["loss"] < 10 for r in found[split:])
    assert Checkpoint.open(folder / f"step_{STEPS:08d}").manifest["world_size"] == 1


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_touches_nothing(undisturbed, tmp_path):
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = sorted(run_dir.glob("checkpoints/*/step_*"))
    damaged = [damage(checkpoint) for checkpoint in checkpoints]
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    ended = run_forked(command(run_dir, "--resume", ranks=None), tmp_path / "log")
    assert ended.code != 0
    assert "Traceback" not in ended.output
    assert "no checkpoint of this run is whole" in ended.output
    assert str(damaged[-1]) in ended.output
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
