"""Every grid of levels, not LSQ's alone: golden vectors of BiT's elastic binarization, and autograd in float64."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsquant.ops.fake_quantize import QuantArgs, fake_quantize, quantize
from dsquant.ops.quant_attention import quant_attention
from dsquant.ops.quant_linear import quant_linear
from dsquant.spec import Method, levels_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
W, GRAD = (torch.tensor(GOLDEN["input"][key]) for key in ("w", "grad_out"))
ZERO = 6  # the index of w == 0
GRIDS = {
    "lsq 3": levels_of(Method.LSQ, 3, True),
    "lsq unsigned 1": levels_of(Method.LSQ, 1, False),
    "seq 2": levels_of(Method.SEQ, 2, True),
    "seq 4": levels_of(Method.SEQ, 4, True),
    "ternary": levels_of(Method.TERNARY, 2, True),
    "elastic": levels_of(Method.ELASTIC, 1, True),
    "elastic unsigned": levels_of(Method.ELASTIC, 1, False),
    "statsq 2": levels_of(Method.STATSQ, 2, True),
}


def run(x, scale, levels, factor, grad):
    x, scale = x.clone().requires_grad_(), torch.tensor([scale], requires_grad=True)
    y = fake_quantize(x, scale, None, levels, factor)
    y.backward(grad)
    return y.detach(), x.grad, scale.grad.item()


def test_golden_signed_elastic_binarization():
    """x_hat = alpha * sign(x) has its levels at +-1/2 of S = 2 alpha, so that d alpha = 2 d S.

    At x == 0 the golden vector has sign(0) = 0; a 1-bit code has no such level, and ours is +alpha.
    """
    golden = GOLDEN["elastic_signed_alpha0.1"]
    y, d_x, d_scale = run(W, 0.2, GRIDS["elastic"], golden["grad_scale"], GRAD)
    expected, d_alpha = torch.tensor(golden["y"]), golden["grad_alpha"]
    assert W[ZERO] == expected[ZERO] == 0.0
    expected[ZERO] = 0.1
    d_alpha += golden["grad_scale"] * GRAD[ZERO].item()  # G * sign of the one level that differs
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(d_x, torch.tensor(golden["grad_x"]))
    assert 2 * d_scale == pytest.approx(d_alpha, rel=1e-5)


def test_golden_unsigned_elastic_binarization():
    golden = GOLDEN["elastic_unsigned_alpha0.2"]
    y, d_x, d_scale = run(W.abs(), 0.2, GRIDS["elastic unsigned"], golden["grad_scale"], GRAD)
    torch.testing.assert_close(y, torch.tensor(golden["y"]))
    torch.testing.assert_close(d_x, torch.tensor(golden["grad_x"]))
    assert d_scale == pytest.approx(golden["grad_alpha"], rel=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_the_nearest_level(name):
    """Half way between two levels either may be taken; nothing here lies there."""
    levels = GRIDS[name]
    v = torch.linspace(-6.01, 6.013, 997)
    grid = torch.arange(levels.qmin, levels.qmax + 1) + levels.shift
    codes = quantize(v * 0.3, torch.tensor(0.3), None, levels)
    assert torch.equal(grid[(v[:, None] - grid).abs().argmin(1)], codes + levels.shift)


def test_half_integer_levels_part_at_integers_and_zero_goes_up():
    v = torch.tensor([-9.0, -1.001, -0.999, -0.001, 0.0, 0.001, 0.999, 1.001, 9.0])
    codes = quantize(v, torch.tensor(1.0), None, GRIDS["seq 2"])
    assert codes.tolist() == [-2, -2, -1, -1, 0, 0, 0, 1, 1]


def oracle(x, scale, offset, levels):
    """Quantize by plain arithmetic whose autograd is the straight-through gradient, in the dtype of x."""
    v = (x - offset) / scale
    level = ((v - levels.shift).clamp(levels.qmin, levels.qmax).round() + levels.shift).detach()
    inside = (v >= levels.low) & (v <= levels.high)
    if levels.elastic:  # x passes, and the scale is seen through the level alone
        shifted = x - offset
        return scale * level + torch.where(inside, shifted - shifted.detach(), 0.0) + offset
    return scale * (level + torch.where(inside, v - v.detach(), 0.0)) + offset


def away_from_boundaries(x, scale, offset, levels):
    """Nudge what float32 and float64 may decide differently: roundings lie at multiples of 1/2, as do the edges."""
    v = 2 * (x.double() - offset.double()) / scale.double()
    return torch.where((v - v.round()).abs() < 2e-3, x + 0.02 * scale, x)


def leaves(*tensors, dtype=torch.float32):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("scale_shape", [(1,), (6, 1), (10,)], ids=["tensor", "tokens", "features"])
@pytest.mark.parametrize("name", GRIDS)
def test_values_and_gradients_of_every_grid_are_those_of_autograd(name, scale_shape):
    torch.manual_seed(0)
    levels, grad = GRIDS[name], torch.randn(4, 6, 10)
    scale, offset = torch.rand(scale_shape) * 0.4 + 0.4, torch.randn(scale_shape) * 0.2
    x = away_from_boundaries(torch.randn(4, 6, 10), scale, offset, levels)
    found, wanted = leaves(x, scale, offset), leaves(x, scale, offset, dtype=torch.float64)
    y, expected = fake_quantize(*found, levels), oracle(*wanted, levels)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.backward(grad)
    expected.backward(grad.double())
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.grad.double(), w.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["elastic", "elastic unsigned", "seq 2", "ternary"])
def test_the_linear_op_of_every_grid_equals_quantizing_then_a_linear_layer(name):
    torch.manual_seed(1)
    levels, grad = GRIDS[name], torch.randn(3, 6, 5)
    values = torch.randn(3, 6, 10), torch.randn(5, 10), torch.randn(5), torch.rand(6, 1) + 0.3
    fused, composed = leaves(*values), leaves(*values)
    y = quant_linear(*fused, None, levels, 0.5)
    x, weight, bias, scale = composed
    expected = F.linear(fake_quantize(x, scale, None, levels, 0.5), weight, bias)
    assert torch.equal(y, expected)
    for tensors, out in ((fused, y), (composed, expected)):
        out.backward(grad)
        assert all(t.grad is not None for t in tensors)
    for f, w in zip(fused, composed, strict=True):
        torch.testing.assert_close(f.grad, w.grad, rtol=1e-5, atol=1e-5)


def test_attention_of_one_bit_with_a_scale_a_token_equals_its_composition():
    torch.manual_seed(2)
    signed, unsigned = GRIDS["elastic"], GRIDS["elastic unsigned"]
    q, k, v = (torch.randn(2, 3, 7, 4) for _ in range(3))
    scales = [torch.rand(7, 1) + 0.5 for _ in range(3)] + [torch.rand(7, 1) * 0.2 + 0.1]
    grids = (signed, signed, unsigned, signed)
    fused, composed = leaves(q, k, v, *scales), leaves(q, k, v, *scales)
    q, k, v, s_q, s_k, s_v, s_p = fused
    args = [QuantArgs(s, None, grid) for s, grid in zip((s_q, s_k, s_p, s_v), grids, strict=True)]
    y = quant_attention(q, k, v, 0.5, *args)
    q, k, v, s_q, s_k, s_v, s_p = composed
    q, k, v = (fake_quantize(t, s, None, signed) for t, s in ((q, s_q), (k, s_k), (v, s_v)))
    p = fake_quantize((q * 0.5 @ k.transpose(-2, -1)).softmax(-1), s_p, None, unsigned)
    expected = p @ v
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for f, w in zip(fused, composed, strict=True):
        torch.testing.assert_close(f.grad, w.grad, rtol=1e-4, atol=1e-5)
