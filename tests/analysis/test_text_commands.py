"""The commands on text: a run of sentences by its folder, and a model of transformers by name."""

import json

import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from dsquant.config import load_config
from dsquant.data import shard_text_table, write_shards
from dsquant.models import build_model, insert_sites
from dsquant.telemetry.metrics import read_metrics
from tests.integration.runs import REPO, ds_config, run_forked, train_command
from tools.analyze import main

pytestmark = pytest.mark.slow  # one real run, analysed several times
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
TINY = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
        "max_position_embeddings": 20}  # fmt: skip
BINARY = """\
extends: {base}
stages:
  w1a2:
    init_from: fp
    steps: 2
    batch_size: 8
    lr: 1.0e-3
    quant:
      weight: {{n_bits: 1, method: bwn}}
      activation: {{n_bits: 2, bias: before}}
      rules: [{{match: "classifier*", n_bits: 8, method: lsq}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with shards of sentences of 1 to 10 words (train, val, scores) and a tokenizer."""
    folder = tmp_path_factory.mktemp("sentences")
    for prefix, count in (("train", 40), ("val", 27)):
        rows = [(7 * i) % 35 for i in range(count)]
        text = "".join(f"{' '.join(f'w{(r + j) % 35}' for j in range(1 + r % 10))}\t{int(r < 17)}\n" for r in rows)
        (folder / f"{prefix}.tsv").write_text(text)
        columns = {"text_column": 0, "label_column": 1, "prefix": prefix}
        shard_text_table(folder / f"{prefix}.tsv", folder / "shards", **columns)
        shard_text_table(folder / f"{prefix}.tsv", folder / "scores", regression=True, **columns)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def text_run(folder):
    """Return the folder of the tiny text recipe with a binary stage at its end, trained for some steps."""
    recipe = folder / "binary.yaml"
    recipe.write_text(BINARY.format(base=REPO / "tests" / "integration" / "tiny_text.yaml"))
    options = ["--recipe", recipe, "--ds_config", ds_config("zero0"), "--out_dir", folder / "run"]
    options += [f"--data.{name}={folder}/shards/{name}-*.tar" for name in ("train", "val")]
    run_forked(train_command(*options, f"--data.tokenizer={folder}/tokenizer"), folder / "log.txt").ok()
    return folder / "run"


@pytest.fixture(scope="module")
def named(folder):
    """Return the options that analyse an encoder in a local folder, as transformers and its tokenizer save them."""
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained(folder / "encoder")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "encoder")
    return ["--model", folder / "encoder", "--library", "transformers", "--max_length", 16,
            "--data", folder / "shards" / "val-*.tar", "--batch_size", 8]  # fmt: skip


def analyze(*words):
    return main([str(word) for word in words])


def read(path):
    return json.loads(path.read_text())


def test_all_of_a_text_run_writes_every_result_and_allocates_a_stage_that_has_a_choice(text_run, tmp_path, capsys):
    assert analyze("all", "--run", text_run, "--n_bits", 3, "--batch_size", 9, "--out", tmp_path) == 0
    pictures = ["sensitivity", "sensitivity_recovery_loss", "sensitivity_harm_loss", "sensitivity_harm_kl",
                "outliers_channels_max_over_std", "outliers_channels_kurtosis", "outliers_heads", "oscillation",
                "allocation_weights"]  # fmt: skip
    for name in pictures:
        assert len(Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(1 << 24)) > 20, name
    sensitivity = read(tmp_path / "sensitivity.json")
    assert (sensitivity["samples"], len(sensitivity["modules"])) == (27, 3 + 2 * 7)
    assert read(tmp_path / "oscillation.json")["stage"] == "w1a2"
    assert read(tmp_path / "outliers.json")["activations"]["bert.encoder.layer.1.attention.self.probs"]["heads"]
    written = load_config(str(tmp_path / "recipe.yaml"))
    sites = insert_sites(build_model(written.model), written.stages["w2a2"].quant.policy())
    allocated = read(tmp_path / "allocation.json")["weights"]["bits"]
    assert {site.name: site.spec.n_bits for site in sites.weights} == allocated
    assert "bert.embeddings.word_embeddings.weight" in allocated
    assert "bert.encoder.layer.1.intermediate.dense" in capsys.readouterr().out  # names are never cut


@pytest.mark.parametrize("stage", ["w2a2", "w1a2"])
def test_trained_quantizers_measure_what_training_measured(text_run, tmp_path, stage):
    assert analyze("sensitivity", "--run", text_run, "--stage", stage, "--eval_batches", 0, "--modules", "*.value",
                   "--by", "kind", "--batch_size", 9, "--plots=false", "--out", tmp_path) == 0  # fmt: skip
    found, last = read(tmp_path / "sensitivity.json"), read_metrics(text_run / "metrics.jsonl", "eval", stage)[-1]
    assert found["quantized"]["top1"] == pytest.approx(last["top1"])
    assert found["quantized"]["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert [row["name"] for row in found["modules"]] == ["attention.self.value"]
    assert len(found["modules"][0]["parts"]) == 3 * 2


def test_an_allocation_of_activations_weighs_the_elements_of_a_sentence(text_run, tmp_path):
    assert analyze("allocate", "--run", text_run, "--stage", "w2a2", "--bits", "2,4", "--activation_budget_bits", 3,
                   "--batch_size", 9,                   "--plots=false", "--out", tmp_path) == 0  # fmt: skip
    found = read(tmp_path / "allocation.json")["activations"]
    assert found["average_bits"] <= 3
    name = "bert.encoder.layer.0.attention.self"
    assert [found["numel"][f"{name}.{part}"] for part in ("q", "probs")] == [12 * 32, 2 * 12 * 12]


def test_a_model_by_name_is_analysed_with_its_own_tokenizer_and_the_same_head_each_time(named, tmp_path, capsys):
    for turn in range(2):
        assert analyze("all", *named, "--n_bits", 3, "--out", tmp_path / str(turn)) == 0
    assert "oscillation and allocation left out: they need --run" in capsys.readouterr().out
    first, second = (read(tmp_path / str(turn) / "sensitivity.json") for turn in range(2))
    assert first == second
    assert (first["samples"], first["n_bits"]) == (27, [3])
    found = read(tmp_path / "0" / "outliers.json")
    assert len(found["activations"]["bert.encoder.layer.0.attention.self.q"]["heads"]["kurtosis"]) == 3
    assert found["activations"]["bert.encoder.layer.0.output.dense.input"]["heads"] is None


def test_a_model_by_name_is_allocated_for_a_recipe_of_it(named, folder, tmp_path):
    tree = yaml.safe_load((REPO / "tests" / "integration" / "tiny_text.yaml").read_text())
    tree["model"] = {"library": "transformers", "name": str(folder / "encoder"), "num_classes": 2, "pretrained": True,
                     "kwargs": {"attention_probs_dropout_prob": 0.0}}  # fmt: skip
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(tree))
    assert analyze("allocate", *named, "--recipe", tmp_path / "named.yaml", "--bits", "2,4", "--out", tmp_path) == 0
    bits = read(tmp_path / "allocation.json")["weights"]["bits"]
    assert len(bits) == 1 + 2 * 6 + 2
    assert load_config(str(tmp_path / "recipe.yaml")).model.name == str(folder / "encoder")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["outliers", "NAMED", "--library", "hf"], "--library is 'hf'; it is timm or transformers"),
        (["outliers", "NAMED", "--max_length", "30"], "takes at most 20 tokens"),
        (["outliers", "NAMED", "--num_classes", "1"], "gives scores (num_classes 1)"),
        (["outliers", "NAMED", "--data", "SCORES"], "holds scores"),
        (["outliers", "NAMED", "--data", "IMAGES"], "holds images, and the model takes sentences"),
        (["outliers", "--model", "vit_tiny_patch16_224", "--num_classes", "2", "--data", "SHARDS", "--checkpoint", "VIT"],
         "holds sentences, and the model takes images; pass --library transformers"),
        (["outliers", "NAMED", "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["outliers", "NAMED", "--model_kwargs", '{"depth": 3}'], "model.kwargs.depth is no part of a bert"),
        (["allocate", "--run", "RUN", "--stage", "w1a2"],
         "weights of method bwn, which cannot have 2/3/4/8 bits; stages that can, for --stage: ['w2a2']"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(named, text_run, folder, tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody answers for "nowhere", and not soon
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    write_shards([("0", {"png": (tmp_path / "one.png").read_bytes(), "cls": b"0"})], tmp_path / "images", "val", 1)
    if "VIT" in words:
        import timm
        from safetensors.torch import save_file

        save_file(timm.create_model("vit_tiny_patch16_224", num_classes=2).state_dict(), tmp_path / "vit.safetensors")
    places = {"NAMED": named, "SCORES": [folder / "scores" / "val-*.tar"], "IMAGES": [tmp_path / "images"], "RUN": [text_run],
              "SHARDS": [folder / "shards" / "val-*.tar"], "VIT": [tmp_path / "vit.safetensors"]}  # fmt: skip
    assert analyze(*(part for word in words for part in places.get(word, [word])), "--plots=false") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert says in message
