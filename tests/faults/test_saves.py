"""A save that dies at any of its file operations leaves the old or the new, whole; the next one goes on from there."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dsquant.checkpoint import Checkpoint, latest_checkpoint, load_run_checkpoint, save_checkpoint
from dsquant.config import CheckpointConfig
from dsquant.errors import CheckpointError, TrainingError
from dsquant.export.packed import _write_whole
from dsquant.files import put_in_place, write_atomically
from dsquant.telemetry.metrics import MetricsLog, read_metrics
from tests.faults.disk import Disk, deaths

ENV = {"DS_ACCELERATOR": "cpu"}
STAGE = "s"


def one_engine(zero=1):
    """Return an engine after a step, and a recipe that keeps one checkpoint."""
    from tests.test_engine import batches, build

    engine = build(zero)
    (images, labels), *_ = next(batches(engine.world, 1))
    engine.backward(torch.nn.functional.cross_entropy(engine.forward(images), labels))
    engine.step(1e-3)
    from dsquant.config import RunConfig

    stages = {STAGE: engine.stage}
    data = {"source": "digits", "image_size": 16}
    config = RunConfig(
        recipe="test", model={"name": "x", "num_classes": 5}, data=data, stages=stages,
        checkpoint=CheckpointConfig(keep_last=1),
    )  # fmt: skip
    return engine, config


# what is there before the save that dies: (step, version) of the saves, and that of the one that dies
CASES = {
    "the first of a stage": ([], (1, 1)),
    "a later step, over one that rotates out": ([(1, 1)], (2, 2)),
    "the same step again, after a resume": ([(1, 1)], (1, 2)),
}


def saves_that_die(folder):
    """Die at every operation of the save of every case; return the number of deaths of each, and what was found wrong."""
    engine, config = one_engine()
    found, wrong = {}, []

    def save(run_dir, step, version):
        engine.step_index = step
        save_checkpoint(run_dir, config, STAGE, engine, done=False, results={"version": version})

    for case, (before, dying) in CASES.items():
        source = Path(folder) / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        with Disk(source):
            for step in before:
                save(source, *step)
        allowed = {version for _, version in [*before[-1:], dying]} | ({None} if not before else set())
        found[case] = []
        for run_dir, disk in deaths(source, Path(folder) / "run", partial(save, step=dying[0], version=dying[1])):
            where = (case, disk.power_cut, len(disk.done), disk.done[-1:])
            found[case].append(disk.dead)
            version = opened(run_dir)
            if version not in (allowed if disk.dead else {dying[1]}):
                wrong.append((*where, version))
            with Disk(run_dir):
                save(run_dir, 3, 3)
            left = sorted(path.name for path in (run_dir / "checkpoints" / STAGE).iterdir())
            if opened(run_dir) != 3 or left != ["step_00000003"]:
                wrong.append((*where, "the next save", left))
    return found, wrong


def opened(run_dir):
    """Return the version that opening the newest whole checkpoint finds, every tensor read, or None where there is none."""
    try:
        checkpoint = latest_checkpoint(run_dir, [STAGE])
    except CheckpointError:
        return "damaged"
    if checkpoint is None:
        return None
    assert all(checkpoint.whole(part) for part in checkpoint.parts)
    assert load_run_checkpoint(run_dir).path == checkpoint.path
    return checkpoint.manifest["results"]["version"]


def test_a_save_that_dies_at_any_operation_leaves_the_old_or_the_new_checkpoint_whole(run_ranks, tmp_path):
    ((found, wrong),) = run_ranks(1, "tests.faults.test_saves:saves_that_die", folder=str(tmp_path / "runs"), env=ENV)
    assert not wrong, "\n".join(map(str, wrong))
    assert set(found) == set(CASES)
    assert all(sum(dead) >= 20 for dead in found.values()), {case: sum(dead) for case, dead in found.items()}


def test_the_folder_that_is_replaced_is_there_at_every_operation(tmp_path):
    source = tmp_path / "source"
    for name in ("final", "new"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text(name)

    def found(folder):
        from dsquant.files import versions

        return [(path / "file").read_text() for path in versions(folder, "final")]

    seen = set()
    for folder, disk in deaths(source, tmp_path / "run", lambda to: put_in_place(to / "new", to / "final")):
        (version,) = found(folder)
        assert version == "new" or disk.dead
        seen.add(version)
    assert seen == {"final", "new"}


def packed(path, version):
    _write_whole(path, {"a": torch.full((100,), version)}, {"version": str(version)})


@pytest.mark.parametrize("write", [lambda path, n: write_atomically(path, f"{n}" * 999), packed])
@pytest.mark.parametrize("over", [False, True])
def test_a_file_that_is_written_dies_whole(tmp_path, write, over):
    """summary.json, recipe.yaml, a log that is cut at a resume, and a packed file."""
    source, versions = tmp_path / "source", {}
    source.mkdir()
    for version in (2, 1):
        write(source / "file", version)
        versions[version] = (source / "file").read_bytes()
    if not over:
        (source / "file").unlink()
    allowed = {versions[2], versions[1] if over else None}
    seen = set()
    for folder, disk in deaths(source, tmp_path / "run", lambda to: write(to / "file", 2)):
        content = (folder / "file").read_bytes() if (folder / "file").exists() else None
        assert content in (allowed if disk.dead else {versions[2]}), (disk.done, disk.power_cut)
        seen.add(content)
    assert seen == allowed


def test_a_resume_that_dies_in_the_log_leaves_one_that_resumes(tmp_path):
    source = tmp_path / "source"
    with MetricsLog(source / "metrics.jsonl") as log:
        for step in range(1, 6):
            log.write("train", "s", step, loss=1.0)
    with (source / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra')

    def resume(folder):
        MetricsLog.resume(folder / "metrics.jsonl", ["s"], ("s", 3)).close()

    for folder, _ in deaths(source, tmp_path / "run", resume):
        resume(folder)
        assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
        lost = (folder / "metrics.discarded.jsonl").read_text().splitlines()
        lost = [json.loads(line) for line in lost if line.endswith("}")]
        assert {record["step"] for record in lost if record["kind"] == "train"} == {4, 5}


def full_disk_and_nan(folder):
    """Return what saving says on a disk that is full, and with a latent, a moment and a scale that is not finite."""
    engine, config = one_engine()
    folder, said = Path(folder), []

    def attempt():
        try:
            save_checkpoint(folder, config, STAGE, engine, done=False)
        except (CheckpointError, TrainingError) as error:
            said.append(str(error))

    engine.step_index = 1
    attempt()
    engine.step_index = 2
    flat = engine.shards.flats[0]
    for tensor in (flat.data, engine.optimizer.state[flat]["exp_avg"], engine.state.values):
        kept = tensor.view(-1)[0].clone()
        tensor.view(-1)[0] = torch.nan
        attempt()
        tensor.view(-1)[0] = kept
    (folder / "checkpoints" / STAGE / ".step_00000002.partial" / "rank_00000.safetensors").mkdir(parents=True)
    rmtree, shutil.rmtree = shutil.rmtree, lambda *_, **__: None
    mkdir, Path.mkdir = Path.mkdir, lambda *_, **__: None
    attempt()
    shutil.rmtree, Path.mkdir = rmtree, mkdir
    return (
        said,
        sorted(os.listdir(folder / "checkpoints" / STAGE)),
        Checkpoint.open(latest_checkpoint(folder, [STAGE]).path).step,
    )


def test_what_is_not_finite_or_cannot_be_written_is_an_error_and_the_last_checkpoint_stays(run_ranks, tmp_path):
    ((said, left, step),) = run_ranks(
        1, "tests.faults.test_saves:full_disk_and_nan", folder=str(tmp_path / "run"), env=ENV
    )
    assert len(said) == 4
    assert all("is not finite; nothing was saved" in text for text in said[:3])
    assert "rank_00000.safetensors cannot be written" in said[3]
    assert "step_00000001" in left
    assert step == 1


def nan_in_padding(folder):
    """Save with NaN in every element of ZeRO 3's flats that belongs to no weight; return how many there are."""
    engine, config = one_engine(zero=3)
    padding = 0
    for flat, fragments in zip(engine.shards.flats, engine.shards.fragments, strict=True):
        owned = torch.zeros(flat.numel(), dtype=torch.bool)
        for fragment in fragments:
            fragment.of(owned).fill_(True)
        flat.data.view(-1)[~owned] = torch.nan
        padding += (~owned).sum().item()
    save_checkpoint(Path(folder), config, STAGE, engine, done=False)
    return padding


def test_what_zero_3_pads_weights_with_may_be_anything(run_ranks, tmp_path):
    paddings = run_ranks(2, "tests.faults.test_saves:nan_in_padding", folder=str(tmp_path), env=ENV)
    assert sum(paddings) > 0
    assert Checkpoint.open(latest_checkpoint(tmp_path, [STAGE]).path).step == 1


def keep_the_best(folder):
    """Train with an evaluation every step and the best kept; return the scores and the steps that are left, by stage."""
    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.loop import Run
    from dsquant.run_folder import prepare_run
    from tests.integration.runs import TINY, ds_config, records

    overrides = {"telemetry.wandb": "disabled", "max_steps": 8, "checkpoint.keep_best": True, "checkpoint.keep_last": 1}
    overrides |= {f"stages.{stage}.eval_every": 0.01 for stage in ("fp", "w2a2")}
    config, run_dir = prepare_run(str(TINY), overrides, folder, False)
    summary = Run(config, load_ds_config(ds_config("zero1")), run_dir, init_world()).execute()
    found = {}
    for stage in ("fp", "w2a2"):
        scores = {r["step"]: r["top1"] for r in records(run_dir, "eval", stage) if r["step"]}
        found[stage] = scores, sorted(path.name for path in (run_dir / "checkpoints" / stage).iterdir())
    return found, summary["best_step"], load_run_checkpoint(run_dir, "w2a2", summary["best_step"]).step


def test_the_checkpoint_of_the_best_score_is_kept_beside_the_last(run_ranks, tmp_path):
    ((found, best_step, opened_step),) = run_ranks(
        1, "tests.faults.test_saves:keep_the_best", folder=str(tmp_path / "run"), env=ENV
    )
    for scores, left in found.values():
        best = max(scores, key=scores.get)  # the first of equals
        assert left == [f"step_{step:08d}" for step in sorted({best, 8})], scores
    assert best_step == opened_step == best
    with pytest.raises(CheckpointError, match=r"step_00000099 does not exist; there are \['step_"):
        load_run_checkpoint(tmp_path / "run", "w2a2", 99)
