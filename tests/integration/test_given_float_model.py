"""A float model of an earlier run starts and teaches a later one without being trained again."""

import sys

import torch
from safetensors.torch import load_file

from dsquant.checkpoint import load_run_checkpoint
from tests.integration.runs import REPO, TINY, records, run, train_command


def test_float_weights_leave_one_run_and_enter_another_unchanged(tmp_path):
    first, second, weights = tmp_path / "first", tmp_path / "second", tmp_path / "float.safetensors"
    run(train_command("--recipe", TINY, "--max_steps", 3, "--out_dir", first), tmp_path / "first.log").ok()
    convert = [sys.executable, str(REPO / "tools" / "convert.py"), "--run", str(first), "--out", str(weights)]
    run([*convert, "--stage", "fp", "--as_float"], tmp_path / "convert.log").ok()
    trained, written = load_run_checkpoint(first, "fp").latents, load_file(weights)
    assert trained.keys() <= written.keys()
    assert all(torch.equal(written[name], latent) for name, latent in trained.items())
    given = ["--model.checkpoint", weights, "--stages.fp.epochs=None", "--stages.fp.steps=0"]
    run(train_command("--recipe", TINY, *given, "--max_steps", 3, "--out_dir", second), tmp_path / "second.log").ok()
    taken = load_run_checkpoint(second, "fp")
    assert taken.done
    assert all(torch.equal(taken.latents[name], latent) for name, latent in trained.items())
    assert not records(second, "train", "fp")
    assert records(second, "eval", "fp")[-1]["top1"] == records(first, "eval", "fp")[-1]["top1"]
    assert [r["loss"] for r in records(second, "train", "w2a2")] == [r["loss"] for r in records(first, "train", "w2a2")]
