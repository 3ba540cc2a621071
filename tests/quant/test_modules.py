"""Quantized layers with biases around their input quantizer and a scale a token: against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsquant.errors import ConfigError
from dsquant.quant.modules import ActivationQuantizer, QuantLinear, become
from dsquant.quant.state import QuantState
from dsquant.spec import ActivationSite, QuantSpec

BATCH, TOKENS, IN, OUT = 4, 6, 10, 7
SPECS = {
    "biases around": QuantSpec(2, bias="around"),
    "a bias before": QuantSpec(2, bias="before"),
    "tokens": QuantSpec(2, granularity="per_token"),
    "tokens and biases around": QuantSpec(3, granularity="per_token", bias="around"),
    "tokens, unsigned, offset, biases": QuantSpec(2, False, "per_token", True, bias="around"),
    "one bit after a bias": QuantSpec(1, method="elastic", bias="before"),
    "one bit a token": QuantSpec(1, granularity="per_token", method="elastic", bias="around"),
    "one unsigned bit": QuantSpec(1, False, method="elastic", offset=True),
}


def quantized_layer(spec, bias=True):
    """Return a QuantLinear, its quantizer, and a state with values that are all different."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias)
    groups = TOKENS if spec.granularity == "per_token" else 1
    site = ActivationSite("fc.input", spec, groups, TOKENS * IN // groups, IN)
    quantizer = ActivationQuantizer(site, grad_scale=0.25)
    become(layer, QuantLinear, input_quantizer=quantizer)
    state = QuantState([], [site])
    for role, numel in site.values.items():
        values = torch.rand(numel) * 0.4 + 0.4 if role == "scale" else torch.randn(numel) * 0.3
        state.get("fc.input", role).copy_(values)
    return layer, quantizer, state


def bind(quantizer, state):
    quantizer.bind({role: state.leaf("fc.input", role) for role in quantizer.site.values})


def away_from_boundaries(x, spec, values):
    """Nudge what lies so near a boundary that float32 and float64 may decide differently."""
    scale, offset, before = (values.get(role, torch.zeros(1)) for role in ("scale", "offset", "before"))
    if spec.granularity == "per_token":
        scale, offset = scale[:, None], offset[:, None] if offset.numel() > 1 else offset
    v = 2 * (x.double() + before - offset) / scale
    return torch.where((v - v.round()).abs() < 2e-3, x + 0.02 * scale, x).float()


def reference(x, weight, bias, spec, values):
    """Return the layer's output by plain arithmetic whose autograd is the straight-through gradient, scaled by 1/4.

    values: float64 leaves by role. The scale's and offset's gradient is a quarter, as the quantizer's grad_scale has it.
    """

    def quarter(t):
        return t.detach() + 0.25 * (t - t.detach())

    scale, offset = quarter(values["scale"]), quarter(values["offset"]) if "offset" in values else 0.0
    if spec.granularity == "per_token":
        scale, offset = scale[:, None], offset[:, None] if spec.offset else 0.0
    x = x + values["before"] if "before" in values else x
    binary = spec.method == "elastic" and spec.signed
    v = (x - offset) / scale
    if binary:
        level = torch.where(v.detach() >= 0, 0.5, -0.5)
        x_hat = scale * level + passed(x - offset, v, 0.5, -0.5) + offset
    else:
        low, high = (-(2 ** (spec.n_bits - 1)), 2 ** (spec.n_bits - 1) - 1) if spec.signed else (0, 2**spec.n_bits - 1)
        x_hat = scale * (v.detach().clamp(low, high).round() + passed(v, v, high, low)) + offset
    x_hat = x_hat + values["after"] if "after" in values else x_hat
    return F.linear(x_hat, weight, bias)


def passed(x, v, high, low):
    """Return zeros whose gradient is that of x where low <= v <= high."""
    return torch.where((v >= low) & (v <= high), x - x.detach(), 0.0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_every_gradient_are_those_of_autograd_in_float64(name, has_bias):
    spec = SPECS[name]
    layer, quantizer, state = quantized_layer(spec, has_bias)
    bind(quantizer, state)
    torch.manual_seed(1)
    values = {role: state.get("fc.input", role).double().requires_grad_() for role in quantizer.site.values}
    x = away_from_boundaries(torch.randn(BATCH, TOKENS, IN), spec, {r: v.detach() for r, v in values.items()})
    x.requires_grad_()
    grad = torch.randn(BATCH, TOKENS, OUT)
    y = layer(x)
    y.backward(grad)
    doubles = [
        x.detach().double().requires_grad_(),
        *(p.detach().double().requires_grad_() for p in layer.parameters()),
    ]
    expected = reference(doubles[0], doubles[1], doubles[2] if has_bias else None, spec, values)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward(grad.double())
    for found, wanted in zip([x, *layer.parameters()], doubles, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)
    for role, wanted in values.items():
        found = state.grads[state.entries[f"fc.input:{role}"].slice]
        assert wanted.grad.abs().min() > 0, role
        torch.testing.assert_close(found.double(), wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_before_it_is_bound_a_layer_computes_in_float_whatever_biases_it_will_have(name):
    layer, _, _ = quantized_layer(SPECS[name])
    x = torch.randn(BATCH, TOKENS, IN)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_an_observer_sees_the_input_behind_its_bias():
    layer, quantizer, state = quantized_layer(SPECS["biases around"])
    bind(quantizer, state)
    seen = []
    quantizer.observer = seen.append
    x = torch.randn(BATCH, TOKENS, IN)
    layer(x)
    assert torch.equal(seen[0], x + state.get("fc.input", "before"))


@pytest.mark.parametrize("tokens", [TOKENS - 1, 2 * TOKENS, 1])
def test_another_number_of_tokens_is_refused_by_the_name_of_the_site(tokens):
    layer, quantizer, state = quantized_layer(SPECS["tokens"])
    bind(quantizer, state)
    with pytest.raises(ConfigError, match=f"fc.input has a scale for each of {TOKENS} tokens and got {tokens}; give"):
        layer(torch.randn(BATCH, tokens, IN))


def test_each_token_has_its_own_levels():
    layer, quantizer, state = quantized_layer(SPECS["tokens"])
    state.get("fc.input").copy_(2.0 ** torch.arange(TOKENS))
    bind(quantizer, state)
    x = torch.randn(BATCH, TOKENS, IN) * 4
    for token in range(TOKENS):
        found = quantizer(x)[:, token]
        assert torch.equal(found, (x[:, token] / 2**token).clamp(-2, 1).round() * 2**token)
    assert layer.input_quantizer is quantizer


def test_in_relative_mode_biases_move_with_the_mean_scale_also_where_features_are_as_many_as_groups():
    site = ActivationSite("fc.input", QuantSpec(2, granularity="per_token", bias="around", offset=True), 3, 3, 3)
    state = QuantState([], [site])
    state.get("fc.input").copy_(torch.tensor([1.0, 2.0, 6.0]))
    state.set_learning_rates(0.5, "relative")
    rates = {role: state.lr[state.entries[f"fc.input:{role}"].slice].tolist() for role in site.values}
    own, mean = [0.5, 1.0, 3.0], [1.5, 1.5, 1.5]
    assert rates == {"scale": own, "offset": own, "before": mean, "after": mean}
