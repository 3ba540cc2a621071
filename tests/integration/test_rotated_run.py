"""Whole runs with rotated inputs from a float file, on two ranks: float, quantized, packed, and back to float."""

import pytest
import torch
from safetensors.torch import load_file

from dsquant.checkpoint import load_float, load_model, load_run_checkpoint
from dsquant.convert import evaluate_packed, export_float
from dsquant.export import load_packed, read_packed
from dsquant.models import build_model
from dsquant.models.rotation import rotate, rotated_layers
from tests import ranks
from tests.integration.runs import ds_config, records, train_in_process

ROTATE = ["blocks.*.qkv", "blocks.*.fc1"]


def train_runs(folder, checkpoint):
    """On every rank: train the float and the 2-bit stage for 3 steps each, under ZeRO 1 and ZeRO 3."""
    overrides = {"model.checkpoint": checkpoint, "model.rotate": ROTATE}
    return train_in_process(
        [
            {"overrides": overrides, "ds_config": ds_config(zero), "out_dir": folder / zero, "max_steps": 3}
            for zero in ("zero1", "zero3")
        ]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, pretrained):
    """Return the folder of the runs and the float file that they start from."""
    folder = tmp_path_factory.mktemp("rotated")
    arguments = {"folder": folder, "checkpoint": str(pretrained)}
    ranks.launch(2, f"{__name__}:train_runs", arguments, folder / "ranks", 300, {"DS_ACCELERATOR": "cpu"})
    return folder, pretrained


@pytest.fixture(params=["zero1", "zero3"])
def run(request, made):
    """Return the folder of a run."""
    return made[0] / request.param


def test_both_zero_stages_start_from_the_rotated_file_and_train_alike(made):
    folder, checkpoint = made
    one, three = (records(folder / zero, "train", "fp") for zero in ("zero1", "zero3"))
    assert [r["loss"] for r in one] == [r["loss"] for r in three]
    trained = load_float(load_run_checkpoint(folder / "zero3", "fp")).state_dict()
    for name, weight in load_file(checkpoint).items():
        if name.endswith(("qkv.weight", "fc1.weight")):
            assert (trained[name] - rotate(weight)).abs().max() < 0.02 < (trained[name] - weight).abs().max()


def test_the_packed_model_rotates_and_scores_exactly_as_training_did(run):
    found = evaluate_packed(run / "model.packed.safetensors", run / "data" / "val", device="cpu")
    last = records(run, "eval", "w2a2")[-1]
    assert (found["top1"], found["loss"]) == (last["top1"], last["loss"])
    packed = read_packed(run / "model.packed.safetensors")
    assert packed.model.rotate == ROTATE
    assert packed._file.metadata()["version"] == "3"
    model, x = load_packed(run / "model.packed.safetensors"), torch.randn(4, 1, 8, 8)
    assert torch.equal(model(x), load_model(load_run_checkpoint(run))(x))


def test_a_float_file_of_the_run_is_of_the_model_without_rotations(run, tmp_path):
    checkpoint = load_run_checkpoint(run, "fp")
    path = export_float(run, tmp_path / "float.safetensors", "fp")
    config = checkpoint.config.model
    plain = build_model(config.model_copy(update={"rotate": [], "checkpoint": str(path)})).eval()
    again = build_model(config.model_copy(update={"checkpoint": str(path)})).eval()
    trained, x = load_float(checkpoint).eval(), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(plain(x), trained(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again(x), trained(x), rtol=1e-4, atol=1e-5)
    assert len(rotated_layers(trained, ROTATE)) == 4
