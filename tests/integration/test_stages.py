"""What a stage starts from: a float model of another run, or the very quantizers of the stage before."""

import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dsquant.checkpoint import load_run_checkpoint
from tests.integration.runs import REPO, TINY, records, run_forked, train_command


def test_float_weights_leave_one_run_and_enter_another_unchanged(tmp_path):
    first, second, weights = tmp_path / "first", tmp_path / "second", tmp_path / "float.safetensors"
    run_forked(train_command("--recipe", TINY, "--max_steps", 3, "--out_dir", first), tmp_path / "first.log").ok()
    convert = [sys.executable, str(REPO / "tools" / "convert.py"), "--run", str(first), "--out", str(weights)]
    run_forked([*convert, "--stage", "fp", "--as_float"], tmp_path / "convert.log").ok()
    trained, written = load_run_checkpoint(first, "fp").latents, load_file(weights)
    assert trained.keys() <= written.keys()
    assert all(torch.equal(written[name], latent) for name, latent in trained.items())
    given = ["--model.checkpoint", weights, "--stages.fp.epochs=None", "--stages.fp.steps=0"]
    run_forked(
        train_command("--recipe", TINY, *given, "--max_steps", 3, "--out_dir", second), tmp_path / "second.log"
    ).ok()
    taken = load_run_checkpoint(second, "fp")
    assert taken.done
    assert all(torch.equal(taken.latents[name], latent) for name, latent in trained.items())
    assert not records(second, "train", "fp")
    assert records(second, "eval", "fp")[-1]["top1"] == records(first, "eval", "fp")[-1]["top1"]
    assert [r["loss"] for r in records(second, "train", "w2a2")] == [r["loss"] for r in records(first, "train", "w2a2")]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """Return the folder of a run whose last stages go on from a quantized one, learning nothing: again with all quantizers
    of it, fewer with its biases, and anew with none.
    """
    folder = tmp_path_factory.mktemp("inherit")
    tree = yaml.safe_load(TINY.read_text())
    again = tree["stages"]["w2a2"]
    again["quant"]["activation"]["bias"] = "around"
    still = {"lr": 1e-30, "weight_decay": 0.0, "init_from": "w2a2", "quant": again["quant"] | {"scale_lr": 1e-30}}
    still["quant"] = still["quant"] | {"obr": {"weight": 0.0}, "calibration": {"inherit": "all"}}
    tree["stages"]["again"] = again | still
    fewer = still["quant"] | {"activation": {"n_bits": 1, "method": "elastic", "bias": "around"}}
    for name, how in {"fewer": {}, "anew": {"inherit": "none"}}.items():
        tree["stages"][name] = again | still | {"quant": fewer | {"calibration": how}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    options = ["--recipe", folder / "recipe.yaml", "--max_steps", 4, "--out_dir", folder / "run"]
    run_forked(train_command(*options, ranks=2), folder / "log").ok()
    return folder / "run"


def test_a_stage_that_inherits_starts_with_the_codes_and_scales_of_the_one_before(fine_tuned):
    before, after = (load_run_checkpoint(fine_tuned, stage) for stage in ("w2a2", "again"))
    assert before.quant.keys() == after.quant.keys()
    assert all(torch.equal(after.quant[key], values) for key, values in before.quant.items())
    assert all(torch.equal(after.codes[name], codes) for name, codes in before.codes.items())


def test_a_stage_that_inherits_starts_at_the_accuracy_where_the_one_before_ended(fine_tuned):
    ended, begun = records(fine_tuned, "eval", "w2a2")[-1], records(fine_tuned, "eval", "again")[0]
    assert begun["step"] == 0
    assert (begun["top1"], begun["loss"]) == (ended["top1"], ended["loss"])


def test_a_stage_of_fewer_bits_takes_over_learned_biases_and_fits_its_scales(fine_tuned):
    ended, begun, anew = (load_run_checkpoint(fine_tuned, stage).quant for stage in ("w2a2", "fewer", "anew"))
    biases = [key for key in ended if key.endswith((":before", ":after"))]
    assert len(biases) > 8
    assert all(torch.allclose(begun[key], ended[key], rtol=0, atol=1e-20) for key in biases)
    assert not any(torch.equal(anew[key], ended[key]) for key in biases)
    scales = [key for key in ended if key.endswith(":scale") and "qkv.weight" not in key]
    assert any(not torch.equal(begun[key], ended[key]) for key in scales)


def test_inheriting_from_a_stage_of_other_sites_is_an_error_that_names_the_first(tmp_path):
    tree = yaml.safe_load(TINY.read_text())
    tree["stages"]["w2a2"]["quant"]["calibration"] = {"inherit": "all"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    options = ["--recipe", tmp_path / "recipe.yaml", "--max_steps", 2, "--out_dir", tmp_path / "run"]
    ended = run_forked(train_command(*options), tmp_path / "log")
    assert ended.code != 0
    assert "calibration.inherit: blocks.0.attn.k:scale has no values in the stage of init_from" in ended.output
