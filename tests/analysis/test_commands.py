"""The command on a real run and on a model by name: what it writes, and what it says when it cannot."""

import builtins
import json
import shutil
import struct

import pytest
import timm
from PIL import Image
from safetensors.torch import load_file, save_file

from dsquant.config import load_config
from dsquant.data import write_shards
from dsquant.models import build_model, insert_sites
from dsquant.telemetry.metrics import read_metrics
from tests.integration.runs import TINY, ds_config, run_forked, train_command
from tools.analyze import main

pytestmark = pytest.mark.slow  # one real run, analysed several times
STEPS = 30


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """Return the folder of the tiny recipe trained for 30 steps a stage."""
    folder = tmp_path_factory.mktemp("analyzed")
    options = ["--recipe", TINY, "--ds_config", ds_config("zero0"), "--max_steps", STEPS, "--out_dir", folder / "run"]
    run_forked(train_command(*options), folder / "log.txt").ok()
    return folder / "run"


def analyze(*words):
    return main([str(word) for word in words])


def read(path):
    return json.loads(path.read_text())


def png_size(path):
    """Return (width, height) of a PNG file that is one, and is not of one colour."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 20
    return struct.unpack(">II", data[16:24])


def test_all_writes_every_result_and_picture_of_a_run(trained_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert analyze("all", "--run", trained_run, "--stage", "fp", "--n_bits", 3, "--batch_size", 60, "--out", out) == 0
    for name in ("sensitivity", "outliers", "oscillation", "allocation"):
        assert read(out / f"{name}.json")
    pictures = ["sensitivity", "sensitivity_recovery_loss", "sensitivity_harm_loss", "sensitivity_harm_kl",
                "outliers_channels_max_over_std", "outliers_channels_kurtosis", "outliers_heads", "oscillation",
                "allocation_weights"]  # fmt: skip
    assert sorted(p.stem for p in out.glob("*.png")) == sorted(pictures)
    assert all(min(png_size(out / f"{name}.png")) > 300 for name in pictures)
    sensitivity = read(out / "sensitivity.json")
    assert (sensitivity["n_bits"], sensitivity["samples"]) == ([3], 360)
    assert len(sensitivity["modules"]) == 2 + 2 * 8
    written = load_config(str(out / "recipe.yaml"))
    sites = insert_sites(build_model(written.model), written.stages["w2a2"].quant.policy())
    assert {s.name: s.spec.n_bits for s in sites.weights} == read(out / "allocation.json")["weights"]["bits"]
    assert "blocks.1.attn.v" in capsys.readouterr().out  # names are never cut


def test_trained_quantizers_measure_what_training_measured(trained_run, tmp_path):
    assert analyze("sensitivity", "--run", trained_run, "--eval_batches", 0, "--modules", "*.attn.v", "--by", "kind",
                   "--plots=false", "--out", tmp_path) == 0  # fmt: skip
    found, last = read(tmp_path / "sensitivity.json"), read_metrics(trained_run / "metrics.jsonl", "eval", "w2a2")[-1]
    assert found["quantized"]["top1"] == pytest.approx(last["top1"])
    assert found["quantized"]["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert found["n_bits"] == [2, 8]
    assert [row["name"] for row in found["modules"]] == ["attn.v"]
    assert not list(tmp_path.glob("*.png"))


def test_shares_of_q_k_and_v_average_to_the_recorded_share_of_their_weight(trained_run, tmp_path):
    assert analyze("oscillation", "--run", trained_run, "--plots=false", "--out", tmp_path) == 0
    found = read(tmp_path / "oscillation.json")
    for block in ("blocks.0", "blocks.1"):
        parts = [found["final_parts"][f"{block}.attn.{x}"] for x in "qkv"]
        recorded = found["sites"][f"{block}.attn.qkv.weight"]["oscillating_pct"][-1]
        assert sum(parts) / 3 == pytest.approx(recorded, abs=1e-9)


def test_allocate_writes_a_recipe_that_the_training_command_takes(trained_run, tmp_path):
    out = tmp_path / "my_recipe.yaml"
    assert analyze("allocate", "--run", trained_run, "--recipe", TINY, "--stage", "w2a2", "--budget_bits", 2.5,
                   "--bits", "2,4", "--plots=false", "--out", out) == 0  # fmt: skip
    allocated = read(tmp_path / "my_recipe_allocation.json")["weights"]
    assert allocated["average_bits"] <= 2.5
    options = ["--recipe", out, "--ds_config", ds_config("zero0"), "--max_steps", 2, "--out_dir", tmp_path / "run"]
    run_forked(train_command(*options), tmp_path / "log.txt").ok()
    sites = read_metrics(tmp_path / "run" / "metrics.jsonl", "oscillation", "w2a2")[-1]["sites"]
    assert {name: site["n_bits"] for name, site in sites.items()} == allocated["bits"]


@pytest.fixture
def named_model(tmp_path):
    """Return the options that analyse a small ViT by its name, with weights and shards of its own."""
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3, **kwargs)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")

    def samples():
        for index in range(12):
            Image.new("RGB", (16, 16), (20 * index, 255 - 20 * index, 90)).save(tmp_path / "one.png")
            yield f"{index:04d}", {"png": (tmp_path / "one.png").read_bytes(), "cls": str(index % 3).encode()}

    write_shards(samples(), tmp_path / "shards", "val", 12)
    return ["--model", "deit_tiny_patch16_224", "--checkpoint", tmp_path / "weights.safetensors", "--num_classes", 3,
            "--model_kwargs", json.dumps(kwargs), "--data", tmp_path / "shards", "--batch_size", 4]  # fmt: skip


def test_a_model_by_name_is_analysed_with_its_own_preparation_of_images(named_model, tmp_path, capsys):
    assert analyze("all", *named_model, "--out", tmp_path / "out") == 0
    assert "oscillation and allocation left out: they need --run" in capsys.readouterr().out
    found = read(tmp_path / "out" / "outliers.json")
    weights = load_file(tmp_path / "weights.safetensors")
    largest = weights["head.weight"].double().abs().max() / weights["head.weight"].double().std(correction=0)
    assert found["weights"]["head.weight"]["max_over_std"] == pytest.approx(float(largest))
    assert read(tmp_path / "out" / "sensitivity.json")["samples"] == 12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sensitivity"], "give either --run RUN or --model NAME"),
        (["sensitivity", "--run", "RUN", "--model", "deit_tiny_patch16_224"], "give either --run RUN or --model NAME"),
        (["sensitivity", "--run", "nowhere"], "nowhere holds no recipe.yaml"),
        (["sensitivity", "--run", "RUN", "--stage", "w1"], "no checkpoint of stage 'w1'; it has ['fp', 'w2a2']"),
        (["sensitivity", "--run", "RUN", "--modules", "*.value"], "--modules '*.value' matches none"),
        (["sensitivity", "--run", "RUN", "--by", "layer"], "by is 'layer'; choose module, kind or block"),
        (["sensitivity", "--run", "RUN", "--n_bits", "9"], "n_bits is 9"),
        (["sensitivity", "--run", "RUN", "--n_bits", "4", "--granularity", "row"], "weights take per_tensor"),
        (["sensitivity", "--run", "RUN", "--out", "x.yaml"], "--out x.yaml is a file"),
        (["sensitivity", "--model", "deit_tiny_patch16_224"], "--model needs --data"),
        (["sensitivity", "--run", "RUN", "--plots", "maybe"], "--plots is 'maybe'; it takes true or false"),
        (["oscillation", "--model", "deit_tiny_patch16_224"], "give --run"),
        (["allocate", "--model", "deit_tiny_patch16_224"], "give --recipe"),
        (["allocate", "--run", "RUN", "--stage", "fp"], "stage 'fp' of recipe tiny quantizes nothing"),
        (["allocate", "--run", "RUN", "--recipe", "cifar10_w2a2"], "what is measured is ('vit_tiny_patch16_224'"),
        (["allocate", "--run", "RUN", "--budget_bits", "1"], "below the least possible, 2.000"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(trained_run, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert analyze(*(trained_run if word == "RUN" else word for word in words), "--batch_size", 60) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert says in message


def test_without_matplotlib_the_fix_is_named_before_anything_is_measured(trained_run, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert analyze("sensitivity", "--run", trained_run, "--out", tmp_path) == 1
    assert "pip install 'dsquant[analysis]', or pass --plots=false" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoints_has_its_records_alone(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    assert analyze("outliers", "--run", tmp_path / "run", "--out", tmp_path / "out") == 1
    assert "holds no checkpoint; give the --out_dir of a run" in capsys.readouterr().err
    assert analyze("oscillation", "--run", tmp_path / "run", "--plots=false", "--out", tmp_path / "out") == 0
    assert "q, k and v are not told apart: stage w2a2 has no checkpoint" in capsys.readouterr().out
