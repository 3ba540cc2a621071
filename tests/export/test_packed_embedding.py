"""A packed embedding looks up the rows that unpacking the whole table would give."""

import pytest
import torch

from dsquant.config import ModelConfig, QuantConfig
from dsquant.export import load_packed, write_packed
from dsquant.models import build_model, insert_sites

NAME = "bert.embeddings.word_embeddings.weight"
KWARGS = {"vocab_size": 21, "hidden_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
          "max_position_embeddings": 8, "attention_probs_dropout_prob": 0.0}  # fmt: skip
TEXT = {"task": "text", "metric": "accuracy", "max_length": 6, "pad_to": "max_length"}


def written(path, n_bits, granularity):
    """Pack a random model, and return the embedding's image worked out here from latents and scales."""
    model_config = ModelConfig(library="transformers", name="bert", num_classes=2, max_length=6, kwargs=KWARGS)
    rules = [{"match": NAME, "granularity": granularity}]
    quant = QuantConfig(weight={"n_bits": n_bits}, activation={"n_bits": 4}, rules=rules)
    torch.manual_seed(0)
    model = build_model(model_config)
    latents = {name: p.detach().clone() for name, p in model.named_parameters()}
    sites = insert_sites(model, quant.policy())
    scales = {
        f"{s.name}:{role}": 0.01 + 0.02 * torch.rand(s.grouping.n_groups) for s in sites.weights for role in s.roles
    }
    scales |= {f"{s.name}:{role}": 0.1 + torch.rand(n) for s in sites.activations for role, n in s.values.items()}
    write_packed(
        path, latents=latents, buffers={}, weight_sites=sites.weights, activation_sites=sites.activations, scales=scales,
        model=model_config, quant=quant, data=TEXT,
    )  # fmt: skip
    scale, half = scales[f"{NAME}:scale"][:, None], 2 ** (n_bits - 1)
    return (latents[NAME] / scale).clamp(-half, half - 1).round() * scale


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("n_bits", [2, 3, 8])
def test_looked_up_rows_are_those_of_the_whole_table(n_bits, granularity, tmp_path):
    image = written(tmp_path / "model.safetensors", n_bits, granularity)
    ids = torch.tensor([[3, 20, 0], [7, 7, 1]])
    for cache in (False, True):
        embedding = load_packed(tmp_path / "model.safetensors", cache=cache).bert.embeddings.word_embeddings
        assert torch.equal(embedding(ids), image[ids])
        assert torch.equal(embedding.weight, image)
    rounded = load_packed(tmp_path / "model.safetensors").bfloat16().bert.embeddings.word_embeddings
    assert torch.equal(rounded(ids), image[ids].bfloat16())
