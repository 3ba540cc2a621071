"""A tiny ViT that has learned the digits for a moment, as a subject, and policies that quantize parts of it."""

import pytest
import torch
from safetensors.torch import load_file

from dsquant.analysis.subject import Subject
from dsquant.config import load_config
from dsquant.data import EvalStream, ShardSet
from dsquant.evaluation import transform_of
from dsquant.spec import PolicyRule, QuantSpec, SitePolicy
from tests.integration.runs import TINY, pretrain

ACTIVATIONS = ("*.input", "*.attn.q", "*.attn.k", "*.attn.v", "*.probs")


def make_subject(folder, weights):
    config = load_config(str(TINY))
    shards = ShardSet.open(folder / "data" / "val")
    transform = transform_of(config.data, train=False)
    stream = EvalStream(shards, transform=transform, batch_size=100, rank=0, world_size=1)
    batches = list(stream.batches())  # 360 samples: the last batch is padded
    images = [batch for batch, _ in batches[:2]]
    return Subject("tiny", config.model, weights, batches, images, torch.device("cpu"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Return (folder, file of float weights): digits shards lie in folder/data."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, pretrain(load_config(str(TINY)), folder)


@pytest.fixture
def subject(digits):
    """Return a subject whose weights a test may change."""
    folder, weights = digits
    return make_subject(folder, load_file(weights))


@pytest.fixture
def weights_only():
    """Return `policy(n_bits)` that quantizes weights and leaves every activation in float."""

    def policy(n_bits):
        rules = [PolicyRule(match, quantize=False) for match in ACTIVATIONS]
        return SitePolicy(QuantSpec(n_bits), QuantSpec(n_bits), rules)

    return policy
