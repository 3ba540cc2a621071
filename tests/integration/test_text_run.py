"""A text model through the real command: every ZeRO stage alike, a packed model that agrees and loads nothing else."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast

from dsquant.config import load_config
from dsquant.convert import convert_run, evaluate_packed
from dsquant.data import shard_text_table, similar_tokens
from dsquant.errors import ExportError
from dsquant.export import load_packed, read_packed
from dsquant.models import build_model, logits_of
from dsquant.telemetry.metrics import read_summary
from tests.integration.runs import REPO, ds_config, losses, records, run_forked, train_command

TINY_TEXT = REPO / "tests" / "integration" / "tiny_text.yaml"
ROWS = 43  # of embeddings: the last three are of no token
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write 40 sentences of 1 to 10 words, whose class is whether the first is among the first 17, a tokenizer, and weights."""
    folder = tmp_path_factory.mktemp("text")
    for prefix, first, count in (("train", 0, 40), ("val", 11, 17)):
        rows = [(first + 7 * i) % 35 for i in range(count)]
        text = "".join(f"{' '.join(f'w{(r + j) % 35}' for j in range(1 + r % 10))}\t{int(r < 17)}\n" for r in rows)
        (folder / f"{prefix}.tsv").write_text(text)
        shard_text_table(folder / f"{prefix}.tsv", folder, text_column=0, label_column=1, prefix=prefix)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    paths = {f"data.{name}": f"{folder}/{name}-*.tar" for name in ("train", "val")}
    model = build_model(load_config(str(TINY_TEXT), paths | {"model.kwargs.vocab_size": ROWS}).model)
    save_file(model.state_dict(), folder / "float.safetensors")
    return folder


@pytest.fixture(scope="module")
def text_run(data, tmp_path_factory):
    """Return `run(zero)`: the folder of the tiny recipe, trained on two ranks with a ZeRO stage, three of ten tokens replaced."""
    folder, ended = tmp_path_factory.mktemp("runs"), {}

    def trained(zero):
        if zero not in ended:
            options = ["--recipe", TINY_TEXT, "--ds_config", ds_config(zero), "--out_dir", folder / zero]
            options += [f"--data.{name}={data}/{name}-*.tar" for name in ("train", "val")]
            options += [f"--data.tokenizer={data}/tokenizer", f"--model.checkpoint={data}/float.safetensors"]
            options += [f"--model.kwargs.vocab_size={ROWS}", "--stages.w2a2.distill.replace_tokens=0.3"]
            ended[zero] = run_forked(train_command(*options, ranks=2), folder / f"{zero}.log")
        ended[zero].ok()
        return folder / zero

    return trained


@pytest.mark.parametrize("zero", ["zero3"])
def test_the_loss_of_every_step_is_that_of_zero1(text_run, zero):
    wanted, found = losses(text_run("zero1")), losses(text_run(zero))
    assert list(found) == list(wanted) == [(s, n) for s in ("fp", "w2a2") for n in (1, 2, 3)]
    apart = {key: abs(found[key] - wanted[key]) for key in wanted}
    assert max(apart.values()) <= 1e-5, apart


def test_hidden_states_are_in_the_loss_of_the_quantized_stage(text_run):
    found = losses(text_run("zero1"))
    assert (
        found["w2a2", 1] > 1.0
    )  # the distance of 2-bit hidden states; cross-entropy to two classes alone is below 0.8
    assert 0.5 < found["fp", 1] < 0.9


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_the_packed_model_scores_what_training_measured(text_run, zero, data, tmp_path):
    run_dir = text_run(zero)
    packed, (last,) = run_dir / "model.packed.safetensors", records(run_dir, "eval", "w2a2")[-1:]
    assert {"f1", "top1", "loss"} <= last.keys()
    found = evaluate_packed(packed, f"{data}/val-*.tar")
    assert {name: found[name] for name in ("f1", "top1", "samples")} == {n: last[n] for n in ("f1", "top1", "samples")}
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert read_summary(run_dir)["f1"] == last["f1"]
    command = [sys.executable, str(REPO / "tools" / "evaluate.py"), "--packed", str(packed), "--run", str(run_dir)]
    output = run_forked(command, tmp_path / "evaluate.log").ok().output
    assert f"f1 {last['f1']:.2f} % of 17 samples" in output


def test_the_packed_file_holds_its_whole_architecture_and_reads_nothing_else(text_run, monkeypatch, tmp_path):
    convert_run(text_run("zero1"), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        model, data = (json.loads(file.metadata()[key]) for key in ("model", "data"))
    assert (model["library"], model["name"], model["max_length"]) == ("transformers", "bert", 12)
    assert (model["kwargs"]["hidden_size"], model["kwargs"]["layer_norm_eps"]) == (32, 1e-12)
    assert data == {"task": "text", "metric": "f1", "max_length": 12, "pad_to": "max_length"}

    def refuse(*args, **kwargs):
        raise AssertionError(f"a packed file made transformers read {args}")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("torch.load", refuse)
    batch = {"input_ids": torch.tensor([[2, 7, 9, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    packed = load_packed(tmp_path / "model.safetensors")
    assert type(packed.bert.embeddings.word_embeddings).__name__ == "PackedEmbedding"
    cached = load_packed(tmp_path / "model.safetensors", cache=True)
    assert torch.equal(logits_of(packed, batch), logits_of(cached, batch))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "somebody/bert"}, "'somebody/bert' leads to a hub or a folder"),
        ({"name": "/some/folder"}, "leads to a hub or a folder"),
        ({"name": "package:evil"}, "leads to a hub or a folder"),
        ({"pretrained": True}, "load weights"),
        ({"kwargs": {"auto_map": {"AutoConfig": "x.y"}}}, "auto_map is no part of a bert's architecture"),
        ({"kwargs": {"attn_implementation": "a/kernel"}}, "attn_implementation is no part"),
        ({"kwargs": {"hidden_act": "xielu"}}, "hidden_act is 'xielu'"),
    ],
)
def test_a_packed_file_that_would_load_more_than_itself_is_refused(text_run, change, said, tmp_path):
    source = text_run("zero1") / "model.packed.safetensors"
    with safe_open(source, "pt") as file:
        header = file.metadata()
    header["model"] = json.dumps({**json.loads(header["model"]), **change})
    save_file(load_file(source), tmp_path / "changed.safetensors", header)
    with pytest.raises(ExportError, match=said):
        load_packed(tmp_path / "changed.safetensors")


def test_the_run_holds_its_tokenizer_and_needs_the_given_one_no_more(text_run):
    run_dir = text_run("zero1")
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert read_packed(run_dir / "model.packed.safetensors").model.kwargs["vocab_size"] == ROWS


def test_a_run_finds_like_tokens_by_the_weights_it_starts_with(text_run, data):
    found = load_file(text_run("zero3") / "similar_tokens.safetensors")["similar_tokens"]
    weights = load_file(data / "float.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(found, similar_tokens(weights, [*WORDS, "", "", ""], {*range(5), 40, 41, 42}))


def test_the_minilm_recipe_goes_from_float_to_one_bit_by_all_its_stages(data, tmp_path):
    """At reduced size: its own stages and rules on a tiny BERT, one step each."""
    tiny = "{vocab_size: 40, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24, "
    tiny += "hidden_act: relu, attention_probs_dropout_prob: 0.0}"
    options = ["--recipe", "sst2_minilm", "--max_steps", 1, "--out_dir", tmp_path / "run", "--data.num_workers", 0]
    options += [f"--data.{name}={data}/{name}-*.tar" for name in ("train", "val")]
    options += [f"--data.tokenizer={data}/tokenizer", "--model.name=bert", "--model.pretrained=False"]
    run_forked(train_command(*options, f"--model.kwargs={tiny}"), tmp_path / "log").ok()
    assert list(losses(tmp_path / "run")) == [(s, 1) for s in ("fp", "w4a4", "w2a2", "w1a2", "w1a1")]
    packed = read_packed(tmp_path / "run" / "model.packed.safetensors")
    bits = {name: site.spec.n_bits for name, site in packed.weights.items()}
    assert bits.pop("classifier.weight") == 8
    assert set(bits.values()) == {1}
    assert packed.weights["bert.embeddings.word_embeddings.weight"].grouping.n_groups == 40
    kinds = {name: (site.spec.n_bits, str(site.spec.bias)) for name, site in packed.activations.items()}
    assert kinds["bert.encoder.layer.0.output.dense.input"] == (1, "before")
    assert kinds["bert.encoder.layer.0.attention.self.probs"] == (1, "none")
    found = evaluate_packed(tmp_path / "run" / "model.packed.safetensors", f"{data}/val-*.tar")
    assert found["loss"] == pytest.approx(records(tmp_path / "run", "eval", "w1a1")[-1]["loss"], rel=1e-6)
