"""The MLP of a block: its GELU goes to the quantizer behind it in training on a GPU, and nowhere else."""

from functools import partial

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsquant.config import QuantConfig
from dsquant.models.attention import QuantMlp, insert_mlp
from dsquant.models.sites import Sites
from dsquant.quant.modules import QuantLinear
from dsquant.quant.state import QuantState

DEFAULT = QuantConfig(weight={"n_bits": 2}, activation={"n_bits": 2})


@pytest.fixture
def on_gpu():
    """Have tensors be on a GPU that need not be there."""
    with FakeTensorMode():
        yield "cuda"


@pytest.fixture
def asked(monkeypatch):
    """Return whether each call of a linear layer was asked to take a GELU, in order."""
    found, forward = [], QuantLinear.forward

    def record(self, x, bias=None, *, gelu=False):
        found.append(gelu)
        return forward(self, x, bias, gelu=gelu)

    monkeypatch.setattr(QuantLinear, "forward", record)
    return found


def build(device="cpu", config=DEFAULT, **options):
    """Return an MLP with quantizers that are at work, and its input."""
    mlp, sites = Mlp(8, 16, device=device, **options), Sites(config.policy())
    insert_mlp("mlp", mlp, 5, sites)
    state = QuantState(sites.weights, sites.activations, device)
    state.values.fill_(0.5)
    sites.bind(state)
    return mlp.train(), torch.ones(2, 5, 8, device=device)


def test_in_training_on_a_gpu_the_layer_behind_a_gelu_takes_it(on_gpu, asked):
    mlp, x = build(on_gpu)
    assert mlp(x).shape == (2, 5, 8)
    assert asked == [False, True]


def test_it_stays_where_it_is_in_evaluation_and_where_something_has_to_see_what_it_gives(on_gpu, asked):
    mlp, x = build(on_gpu)
    mlp.eval()(x)
    mlp.train().fc2.input_quantizer.observer = lambda x: None
    mlp(x)
    mlp, x = build(on_gpu, QuantConfig(weight={"n_bits": 2}, activation={"n_bits": 2, "bias": "before"}))
    mlp(x)
    assert asked == [False] * 6


def test_on_cpu_it_stays_where_it_is(asked):
    mlp, x = build()
    mlp(x)
    assert asked == [False, False]


@pytest.mark.parametrize(
    "options",
    [{"drop": 0.1}, {"norm_layer": nn.LayerNorm}, {"act_layer": nn.ReLU}, {"act_layer": partial(nn.GELU, "tanh")}],
    ids=["dropout", "a norm", "ReLU", "tanh"],
)
def test_what_else_lies_between_the_layers_keeps_timm_s_own(options):
    assert type(build(**options)[0]) is Mlp
    assert type(build()[0]) is QuantMlp


def test_names_of_parameters_stay():
    assert list(build()[0].state_dict()) == list(Mlp(8, 16).state_dict())
