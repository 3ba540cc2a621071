"""Analysis of sentences against transformers' own model: what is measured is of real tokens, whatever the padding."""

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import BertConfig, BertForSequenceClassification

from dsquant.analysis.modules import find_modules, select
from dsquant.analysis.outliers import Moments, outliers
from dsquant.analysis.sensitivity import leave_one_out
from dsquant.analysis.subject import Subject
from dsquant.analysis.variants import post_training, uniform_policy
from dsquant.config import ModelConfig
from dsquant.models import insert_sites

TINY = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
        "max_position_embeddings": 20, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}  # fmt: skip
LENGTHS = ((9, 4, 6), (5, 7, 2))  # of the sentences of two batches, each padded to its longest
LAYER = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.self.probs",
         "attention.output.dense", "intermediate.dense", "output.dense"]  # fmt: skip


def batch(index, width=None):
    """Return a batch of sentences; ids of padding are random, as nothing may depend on them."""
    generator = torch.Generator().manual_seed(index)
    lengths = torch.tensor(LENGTHS[index])
    width = width or int(lengths.max())
    ids = torch.randint(3, 40, (len(lengths), 20), generator=generator)[:, :width].clone()
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids[mask == 0] = torch.randint(3, 40, (int((mask == 0).sum()),))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def upstream():
    torch.manual_seed(5)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).eval()
    for p in model.parameters():  # zero biases and small weights would hide a mistake
        p.data.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def text_subject():
    """Return `make(width)`: the tiny BERT with two batches of sentences, padded to their longest or to `width`."""

    def make(width=None):
        config = ModelConfig(library="transformers", name="bert", num_classes=3, max_length=12, kwargs=TINY)
        inputs = [batch(index, width) for index in range(2)]
        labels = [torch.tensor([0, 2, 1]), torch.tensor([1, 0, -1])]  # the last is padding of the set
        measured = list(zip(inputs, labels, strict=True))
        return Subject("tiny bert", config, upstream().state_dict(), measured, inputs, torch.device("cpu"))

    return make


def expected(x):
    x = np.asarray(x, dtype=np.float64).ravel()
    return {
        "max_over_std": np.abs(x).max() / x.std(),
        "kurtosis": scipy.stats.kurtosis(x, fisher=False),
        "mean_abs": np.abs(x).mean(),
    }


def assert_groups(found, groups, rtol=1e-4):
    for key in ("max_over_std", "kurtosis", "mean_abs"):
        np.testing.assert_allclose(found[key], [expected(g)[key] for g in groups], rtol=rtol)


@pytest.fixture
def seen():
    """Return, of the upstream model, inputs and outputs of each module and the probabilities, batch by batch."""
    model = upstream()
    model.set_attn_implementation("eager")  # forms the probabilities
    kept = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: kept.setdefault(name, []).append((inputs, output))
        )
    with torch.no_grad():
        probs = [model(**batch(index), output_attentions=True).attentions for index in range(2)]
    return kept, probs


def of_real_tokens(calls, side):
    """Return (tokens, features): what a linear layer took (side 0) or gave at real tokens, sentence by sentence."""
    rows = []
    for lengths, (inputs, output) in zip(LENGTHS, calls, strict=True):
        x = inputs[0] if side == 0 else output
        rows += [x[row, :length] for row, length in enumerate(lengths)]
    return torch.cat(rows).numpy()


def test_outliers_of_a_layers_input_are_those_of_real_tokens(text_subject, seen):
    kept, _ = seen
    result = outliers(text_subject())
    assert result["samples"] == 6
    for layer in ("attention.self.query", "intermediate.dense", "output.dense"):
        x = of_real_tokens(kept[f"bert.encoder.layer.1.{layer}"], 0)
        found = result["activations"][f"bert.encoder.layer.1.{layer}.input"]
        assert_groups(found["channels"], list(x.T))
        assert found["kurtosis"] == pytest.approx(expected(x)["kurtosis"], rel=1e-4)
        far = np.abs(x - x.mean(dtype=np.float64)) > 6 * x.astype(np.float64).std()
        assert found["beyond_6_sigma"] == pytest.approx(far.mean())
    head = np.concatenate([inputs[0].numpy() for inputs, _ in kept["classifier"]])
    assert_groups(result["activations"]["classifier.input"]["channels"], list(head.T))


def test_outliers_of_q_k_and_v_are_of_real_tokens_by_head_and_feature(text_subject, seen):
    kept, _ = seen
    result = outliers(text_subject())
    for site, layer in (("q", "query"), ("k", "key"), ("v", "value")):
        x = of_real_tokens(kept[f"bert.encoder.layer.0.attention.self.{layer}"], 1)
        found = result["activations"][f"bert.encoder.layer.0.attention.self.{site}"]
        assert_groups(found["heads"], np.split(x, 3, axis=1))
        assert_groups(found["channels"], list(x.T))


def test_outliers_of_probabilities_are_of_real_queries_and_keys(text_subject, seen):
    _, probs = seen
    found = outliers(text_subject())["activations"]["bert.encoder.layer.1.attention.self.probs"]
    by_key = {(h, k): [] for h in range(3) for k in range(9)}
    for lengths, layers in zip(LENGTHS, probs, strict=True):
        for row, length in enumerate(lengths):
            for h in range(3):
                for k in range(length):
                    by_key[h, k] += layers[1][row, h, :length, k].tolist()
    assert_groups(found["channels"], list(by_key.values()))
    assert_groups(found["heads"], [np.concatenate([by_key[h, k] for k in range(9)]) for h in range(3)])
    every = np.concatenate(list(by_key.values()))
    assert found["max_over_std"] == pytest.approx(expected(every)["max_over_std"], rel=1e-4)


def test_a_wider_batch_has_the_same_outliers_and_its_unreached_keys_have_none(text_subject):
    narrow, wide = (outliers(text_subject(width))["activations"] for width in (None, 12))
    for name, site in narrow.items():
        found = wide[name]
        assert found["kurtosis"] == pytest.approx(site["kurtosis"], rel=1e-4), name
        assert found["sdam"] == pytest.approx(site["sdam"], rel=1e-4), name
        if not name.endswith("probs"):
            np.testing.assert_allclose(found["channels"]["max_over_std"], site["channels"]["max_over_std"], rtol=1e-3)
    channels = np.array(wide["bert.encoder.layer.0.attention.self.probs"]["channels"]["mean_abs"]).reshape(3, 12)
    assert (channels[:, 9:] == None).all()  # noqa: E711, an array of objects
    assert (channels[:, :9] != None).all()  # noqa: E711


def test_moments_of_picked_elements_are_those_of_them_alone():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    real = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.6
    real[3] = False
    found = Moments.of(x.masked_fill(~real, torch.nan), real).statistics()
    assert_groups({k: v[:3] for k, v in found.items()}, [x[g][real[g]].numpy() for g in range(3)], rtol=1e-9)
    assert {k: v[3] for k, v in found.items()} == dict.fromkeys(found)


def test_the_modules_of_a_bert_are_its_embeddings_layers_and_probabilities_in_order(text_subject):
    modules = find_modules(insert_sites(text_subject().build(), uniform_policy(4)))
    layers = [f"bert.encoder.layer.{i}.{kind}" for i in range(2) for kind in LAYER]
    assert [m.name for m in modules] == ["bert.embeddings.word_embeddings", *layers, "bert.pooler.dense", "classifier"]
    assert [m.kind for m in modules[1:8]] == LAYER


def test_a_query_layer_is_its_input_its_weight_and_q(text_subject):
    modules = find_modules(insert_sites(text_subject().build(), uniform_policy(4)))
    (query,) = select(modules, "*.layer.1.*.query")
    name = "bert.encoder.layer.1.attention.self"
    assert {(part.site, part.rows) for part in query.parts} == {
        (f"{name}.query.input", None), (f"{name}.query.weight", (0, 24)), (f"{name}.q", None),
    }  # fmt: skip
    parts = [part for module in modules for part in module.parts]
    assert len(parts) == len(set(parts))  # of BERT no weight is fused: every part lies in one module


def test_the_float_variant_is_upstreams_loss_and_padding_of_the_set_is_not_counted(text_subject):
    subject = text_subject()
    variants = post_training(subject, uniform_policy(4))
    variants.quantize_only(())
    scores = subject.scores(variants.model)
    with torch.no_grad():
        logits = torch.cat([upstream()(**batch(index)).logits for index in range(2)])[:5]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2, 1, 1, 0]), reduction="none")
    torch.testing.assert_close(scores.losses.float(), losses, rtol=1e-5, atol=1e-6)


def test_sensitivities_do_not_depend_on_padding(text_subject):
    found = []
    for width in (None, 12):
        subject = text_subject(width)
        variants = post_training(subject, uniform_policy(4))
        modules = select(find_modules(variants.sites), "*.layer.0.*,classifier,*embeddings")
        found.append(leave_one_out(variants, subject, modules))
    narrow, wide = (result["modules"] for result in found)
    assert [row["name"] for row in narrow] == [row["name"] for row in wide]
    for one, other in zip(narrow, wide, strict=True):
        assert one["harm_kl"] == pytest.approx(other["harm_kl"], rel=1e-3, abs=1e-7), one["name"]
        assert one["harm_kl"] > 0
