"""Runs whose quantized stage is calibrated and not trained, on two ranks: weights kept, and refitted to quantized inputs."""

import pytest
import torch

from dsquant.checkpoint import load_float, load_run_checkpoint
from dsquant.convert import evaluate_packed
from tests import ranks
from tests.integration.runs import ds_config, records, train_in_process

CALIBRATED = {"stages.fp.epochs": None, "stages.fp.steps": 0, "stages.w2a2.epochs": None, "stages.w2a2.steps": 0}
REFITTED = CALIBRATED | {"stages.w2a2.quant.calibration.weights": "least_squares"}
RUNS = {
    "kept": ("zero1", CALIBRATED), "zero0": ("zero0", REFITTED), "zero1": ("zero1", REFITTED), "zero3": ("zero3", REFITTED)
}  # fmt: skip


def calibrate_runs(folder, checkpoint):
    """On every rank: take the float model as it is and calibrate the 2-bit one."""
    return train_in_process(
        [
            {"overrides": overrides | {"model.checkpoint": checkpoint}, "ds_config": ds_config(zero),
             "out_dir": folder / name, "max_steps": 1}
            for name, (zero, overrides) in RUNS.items()
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained):
    """Return where the runs lie, by name."""
    made = tmp_path_factory.mktemp("refit")
    arguments = {"folder": made, "checkpoint": str(pretrained)}
    ranks.launch(2, f"{__name__}:calibrate_runs", arguments, made / "ranks", 300, {"DS_ACCELERATOR": "cpu"})
    return made


def test_refitted_weights_score_better_than_those_that_are_kept(folder):
    kept, refitted = (records(folder / name, "eval", "w2a2") for name in ("kept", "zero1"))
    assert len(kept) == len(refitted) == 1  # evaluated once, where training would begin
    assert refitted[0]["loss"] < 0.8 * kept[0]["loss"]


@pytest.mark.parametrize("other", ["zero0", "zero3"])
def test_every_zero_stage_refits_alike(folder, other):
    one, same = (load_run_checkpoint(folder / name, "w2a2") for name in ("zero1", other))
    for name, weight in load_float(one).state_dict().items():
        assert torch.equal(weight, load_float(same).state_dict()[name]), name
    scores = [records(folder / name, "eval", "w2a2")[0] for name in ("zero1", other)]
    assert scores[0]["loss"] == scores[1]["loss"]


def test_weights_and_biases_of_linear_layers_alone_have_moved(folder):
    before = load_float(load_run_checkpoint(folder / "zero1", "fp")).state_dict()
    after = load_float(load_run_checkpoint(folder / "zero1", "w2a2")).state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert moved == {f"{layer}.{part}" for layer in [*layers, "head"] for part in ("weight", "bias")}


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_the_packed_model_scores_exactly_as_calibration_left_it(folder, name):
    found = evaluate_packed(folder / name / "model.packed.safetensors", folder / name / "data" / "val", device="cpu")
    last = records(folder / name, "eval", "w2a2")[-1]
    assert last["step"] == 0
    assert (found["top1"], found["loss"]) == (last["top1"], last["loss"])
