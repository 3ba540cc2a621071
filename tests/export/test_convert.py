"""From a run to a packed file to its top-1: the numbers are those that training itself recorded."""

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dsquant.config import parse_config
from dsquant.convert import convert_run, evaluate_packed, pack_checkpoint, validation_data
from dsquant.data import write_shards
from dsquant.errors import ConfigError, DataError, ExportError
from dsquant.export import load_packed, read_packed
from tests.integration.runs import run_forked, train_command

REPO = Path(__file__).resolve().parents[2]


def command(*arguments):
    """Run a script of the project as a user would; return (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Give `command` without the seconds that a new interpreter takes to import PyTorch."""

    def run_script(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run_script


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the default recipe for a few steps: two stages, the second quantized."""
    folder = tmp_path_factory.mktemp("run")
    ds_config = REPO / "ds_configs" / "zero2.json"
    words = train_command("--ds_config", ds_config, "--max_steps", 12, "--out_dir", folder)
    run_forked(words, tmp_path_factory.mktemp("log") / "log").ok()
    return folder


def last_evaluation(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "eval"][-1]


def test_the_packed_model_repeats_the_evaluation_of_training_exactly(run, tmp_path):
    info = convert_run(run, tmp_path / "m.safetensors")
    found = evaluate_packed(tmp_path / "m.safetensors", validation_data(run))
    expected = last_evaluation(run)
    assert expected["stage"] == "w2a2"
    assert {key: expected[key] for key in ("top1", "loss", "samples")} == found
    assert info.bits_per_weight[2] <= 2.1
    assert info.file_bytes < info.float_bytes / 5


def test_the_codes_in_the_file_are_those_of_the_last_training_step(run, tmp_path):
    from dsquant.checkpoint import load_run_checkpoint

    convert_run(run, tmp_path / "m.safetensors", "w2a2")
    packed, checkpoint = read_packed(tmp_path / "m.safetensors"), load_run_checkpoint(run, "w2a2")
    codes = checkpoint.codes
    assert packed.weights.keys() == codes.keys()
    for name, expected in codes.items():
        assert torch.equal(packed.codes(name), expected), name
    assert packed.training["step"] == checkpoint.step == 12


def test_the_command_line_converts_and_evaluates(run, tmp_path, in_process):
    path = tmp_path / "m.safetensors"
    status, out, _ = in_process("tools/convert.py", "--run", run, "--out", path)
    assert status == 0
    assert f"{path.stat().st_size:,} bytes" in out
    status, out, error = command("tools/evaluate.py", "--packed", path, "--run", run)
    assert status == 0, error
    assert out == f"top-1 {last_evaluation(run)['top1']:.2f} % of 360 samples ({path})\n"
    assert in_process("tools/evaluate.py", "--packed", path, "--data", run / "data" / "val")[:2] == (0, out)


def test_a_user_error_is_one_line_and_a_status(tmp_path, in_process):
    for arguments, message in {
        ("tools/convert.py", "--run", tmp_path, "--out", tmp_path / "m"): "holds no checkpoint; give the --out_dir",
        ("tools/evaluate.py", "--packed", tmp_path / "m", "--data", tmp_path): "m is missing, truncated or no",
        ("tools/evaluate.py", "--packed", tmp_path / "m"): "give either --run RUN or --data LOCATION",
    }.items():
        status, out, error = in_process(*arguments)
        assert (status, out) == (1, "")
        assert message in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_float_stage_is_refused(run, tmp_path):
    with pytest.raises(
        ExportError, match=r"stage 'fp' trains in float; its run has these quantized stages: \['w2a2'\]"
    ):
        convert_run(run, tmp_path / "m.safetensors", "fp")
    assert list(tmp_path.iterdir()) == []


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def fake_checkpoint(made, **changes):
    """Stand in for a checkpoint of the case's model."""
    arguments = made.arguments
    config = parse_config(
        {
            "recipe": "tiny",
            "precision": "fp32",
            "model": {**arguments["model"].model_dump(), "checkpoint": "/not/there.pth"},
            "data": {"train": "a", "val": "b", "eval_batch_size": 7, **arguments["data"]},
            "stages": {
                "fp": {"batch_size": 8, "lr": 1, "steps": 1},
                "q": {"batch_size": 8, "lr": 1, "steps": 1, "quant": arguments["quant"].model_dump()},
            },
        },
        "test",
    )
    fields = {
        "config": config,
        "stage": "q",
        "step": 5,
        "manifest": {"world_size": 3},
        "latents": arguments["latents"],
        "buffers": {},
        "quant": arguments["scales"],
        "codes": {name: torch.from_numpy(codes) for name, codes in made.codes.items()},
    }
    return SimpleNamespace(**{**fields, **changes})


def test_a_packed_checkpoint_says_how_it_was_trained_and_not_where(case, tmp_path):
    made = case(2)
    pack_checkpoint(fake_checkpoint(made), tmp_path / "m.safetensors")
    packed = read_packed(tmp_path / "m.safetensors")
    assert packed.training == {
        "recipe": "tiny",
        "stage": "q",
        "step": 5,
        "precision": "fp32",
        "world_size": 3,
        "eval_batch_size": 7,
    }
    assert packed.data == made.arguments["data"]
    assert b"/not/there" not in packed.path.read_bytes()
    assert torch.equal(load_packed(packed.path)(made.images()), made.oracle(made.images()))


def test_a_checkpoint_of_another_model_is_refused(case, tmp_path):
    made = case(2)
    latents = made.arguments["latents"]
    for message, changed in {
        "only its model has norm.bias": {k: v for k, v in latents.items() if k != "norm.bias"},
        "only its checkpoint has dist_token": {**latents, "dist_token": torch.zeros(1)},
    }.items():
        with pytest.raises(ExportError, match=message):
            pack_checkpoint(fake_checkpoint(made, latents=changed), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_every_image_is_counted_once_however_the_batches_are_cut(case, tmp_path):
    """An evaluation cut for 3 ranks into padded batches of 7 agrees with the oracle on all 20 images at once."""
    made = case(4)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    logits = made.oracle(images)
    labels = torch.where(torch.arange(20) < 13, logits.argmax(dim=1), (logits.argmax(dim=1) + 1) % 5)
    rows = zip(pixels, labels.tolist(), strict=True)
    samples = ((f"{i:04d}", {"png": png(image), "cls": str(label).encode()}) for i, (image, label) in enumerate(rows))
    write_shards(samples, tmp_path / "val", "val", 8)
    pack_checkpoint(fake_checkpoint(made), tmp_path / "m.safetensors")
    found = evaluate_packed(tmp_path / "m.safetensors", tmp_path / "val", device="cpu")
    assert found["samples"] == 20
    assert found["top1"] == 65.0
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    alone = evaluate_packed(tmp_path / "m.safetensors", tmp_path / "val", 1, device="cpu")
    assert (alone["top1"], alone["samples"]) == (65.0, 20)


def test_what_an_evaluation_lacks_is_named(case, tmp_path):
    made = case(2)
    made.write(tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="does not say with which batch size"):
        evaluate_packed(tmp_path / "m.safetensors", tmp_path)
    with pytest.raises(DataError):
        evaluate_packed(tmp_path / "m.safetensors", tmp_path / "none", 4)
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml"):
        validation_data(tmp_path)
