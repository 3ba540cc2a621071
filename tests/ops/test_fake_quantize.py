import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dsquant.ops import backends
from dsquant.ops import fake_quantize as op
from dsquant.ops.fake_quantize import blocks, dequantize, fake_quantize, quantize
from dsquant.quant.modules import lsq_grad_scale
from dsquant.spec import Levels

pytestmark = pytest.mark.usefixtures("each_backend")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
X, GRAD, ALPHA = (torch.tensor(GOLDEN["input"][key]) for key in ("w", "grad_out", "alpha"))


def leaf(values):
    return torch.as_tensor(values, dtype=torch.float32).clone().requires_grad_()


def straight_through(v, qmin, qmax):
    """Round and clip v; its gradient is 1 on [qmin, qmax], both edges included (`clamp`'s own is 0 there in some torch)."""
    inside = (v >= qmin) & (v <= qmax)
    return v.clamp(qmin, qmax).round().detach() + torch.where(inside, v - v.detach(), 0.0)


def oracle(x, scale, offset, qmin, qmax, grad):
    """Return x_hat and the gradients of x, scale and offset by plain float64 autograd, straight-through written out."""
    x, scale, offset = (t if t is None else t.detach().double().requires_grad_() for t in (x, scale, offset))
    codes = straight_through((x if offset is None else x - offset) / scale, qmin, qmax)
    x_hat = codes * scale if offset is None else codes * scale + offset
    inputs = [t for t in (x, scale, offset) if t is not None]
    return x_hat.detach(), torch.autograd.grad(x_hat, inputs, grad.double())


def run(x, scale, offset, qmin, qmax, grad, factor=1.0):
    """Return the same of the op under test."""
    x, scale, offset = (t if t is None else t.detach().clone().requires_grad_() for t in (x, scale, offset))
    x_hat = fake_quantize(x, scale, offset, Levels(qmin, qmax), factor)
    x_hat.backward(grad)
    return x_hat.detach(), [t.grad for t in (x, scale, offset) if t is not None]


def away_from_ties(x, scale, offset, qmin, qmax):
    """Nudge what lies so near a rounding or clip boundary that float32 and float64 may decide differently."""
    v = (x.double() - (0 if offset is None else offset.double())) / scale.double()
    near = ((v - v.floor() - 0.5).abs() < 1e-3) | ((v - qmin).abs() < 1e-3) | ((v - qmax).abs() < 1e-3)
    return torch.where(near, x + 0.01 * scale, x)


def assert_close(found, expected, rtol=2e-5, atol=1e-5):
    torch.testing.assert_close(found.double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol)


def cast(x, backend):
    """Return x in bfloat16, rounded to nearest; cut off as by Triton's interpreter, where that made what x is compared with."""
    if backend == backends.TRITON and not torch.cuda.is_available():
        return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    return x.bfloat16()


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_signed_golden_vectors(n_bits):
    """The golden vector of 2 bits halves the gradient at its one tie with the clip edge; here it passes in full."""
    golden = GOLDEN[f"lsq_w{n_bits}"]
    grad_w, grad_alpha = list(golden["grad_w"]), golden["grad_alpha"]
    if n_bits == 2:
        assert X[1] / ALPHA == -2  # -0.2 / 0.1 is a tie in float32 as well
        grad_w[1], grad_alpha = -1.0, 0.624
    qmax = 2 ** (n_bits - 1) - 1
    factor = lsq_grad_scale(X.numel(), qmax)
    assert factor == pytest.approx(golden["lsq_grad_scale"], rel=1e-12)
    for scaled in (1.0, factor):
        y, (d_x, d_scale) = run(X, ALPHA, None, -qmax - 1, qmax, GRAD, scaled)
        assert_close(y, golden["y"], atol=1e-6)
        assert_close(d_x, grad_w, atol=1e-6)
        assert_close(d_scale, grad_alpha * scaled, atol=2e-6)


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_unsigned_golden_vectors_with_an_offset(n_bits):
    golden = GOLDEN[f"lsq_unsigned{n_bits}_offset-0.17"]
    y, (d_x, d_scale, d_offset) = run(X, ALPHA, torch.tensor(-0.17), 0, 2**n_bits - 1, GRAD)
    assert_close(y, golden["y"], atol=1e-6)
    assert_close(d_x, golden["grad_x"], atol=1e-6)
    assert_close(d_scale, golden["grad_alpha"], atol=5e-6)
    assert_close(d_offset, golden["grad_offset"], atol=1e-6)


def test_rounding_is_half_to_even():
    v = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    expected = torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0])
    assert torch.equal(quantize(v, torch.tensor(1.0), None, Levels(-8, 7)), expected)
    assert torch.equal(fake_quantize(v * 0.25, torch.tensor(0.25), None, Levels(-8, 7)), expected * 0.25)
    assert torch.equal(
        fake_quantize(v * 0.25 + 1, torch.tensor(0.25), torch.tensor(1.0), Levels(-8, 7)), expected * 0.25 + 1
    )


@pytest.mark.parametrize(("qmin", "qmax"), [(-2, 1), (0, 3)])
def test_the_gradient_passes_in_full_at_both_clip_edges_and_not_beyond(qmin, qmax):
    beyond = 2.0**-10
    v = torch.tensor([qmin - beyond, qmin, qmin + beyond, qmax - beyond, qmax, qmax + beyond])
    for offset in (None, torch.tensor(0.75)):
        x = v * 0.5 if offset is None else v * 0.5 + offset  # powers of two: v is exact
        _, grads = run(x, torch.tensor(0.5), offset, qmin, qmax, torch.full((6,), 3.0))
        assert grads[0].tolist() == [0.0, 3.0, 3.0, 3.0, 3.0, 0.0]
        assert grads[1] == 3.0 * (qmin - beyond + beyond + qmax)  # qmin below, rounding inside, qmax above
        assert offset is None or grads[2] == 6.0


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((4, 6, 10), ()), ((4, 6, 10), (1,)), ((4, 6, 10), (10,)),
     ((5, 3, 6, 4), (3, 1, 1)), ((5, 3, 6, 4), (1, 3, 1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), [(-2, 1), (-8, 7), (0, 3), (0, 255)])
def test_values_and_gradients_are_those_of_autograd(shape, scale_shape, has_offset, qmin, qmax):
    torch.manual_seed(0)
    x, grad = torch.randn(shape), torch.randn(shape)
    scale = (torch.rand(scale_shape) + 0.5) * 3 / qmax
    offset = torch.randn(scale_shape) * 0.3 if has_offset else None
    x = away_from_ties(x, scale, offset, qmin, qmax)
    y, grads = run(x, scale, offset, qmin, qmax, grad)
    expected, expected_grads = oracle(x, scale, offset, qmin, qmax, grad)
    assert_close(y, expected)
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert found.shape == wanted.shape
        assert_close(found, wanted, atol=1e-4)


def test_the_gradient_factor_scales_scale_and_offset_only():
    plain = run(X, ALPHA, torch.tensor(-0.17), 0, 3, GRAD)[1]
    halved = run(X, ALPHA, torch.tensor(-0.17), 0, 3, GRAD, 0.5)[1]
    assert [torch.equal(h, p * f) for h, p, f in zip(halved, plain, (1, 0.5, 0.5), strict=True)] == [True] * 3


def test_bfloat16_is_float32_arithmetic_then_a_cast(each_backend):
    torch.manual_seed(1)
    x, grad = torch.randn(8, 33).bfloat16(), torch.randn(8, 33).bfloat16()
    scale, offset = torch.tensor(0.313), torch.tensor(-0.171)
    low, low_grads = run(x, scale, offset, 0, 7, grad)
    high, high_grads = run(x.float(), scale, offset, 0, 7, grad.float())
    assert low.dtype is torch.bfloat16
    assert torch.equal(low, cast(high, each_backend))
    assert torch.equal(low_grads[0], cast(high_grads[0], each_backend))
    assert torch.equal(low_grads[1], high_grads[1])
    assert torch.equal(low_grads[2], high_grads[2])
    assert low_grads[1].dtype is torch.float32


@pytest.mark.parametrize("has_offset", [False, True])
def test_only_the_input_and_the_scales_are_saved(has_offset):
    x, scale = leaf(torch.randn(16, 16)), leaf(0.2)
    offset = leaf(0.1) if has_offset else None
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, scale, offset, Levels(0, 3))
    inputs = [t for t in (x, scale, offset) if t is not None]
    assert len(saved) == len(inputs)
    assert [s.data_ptr() for s in saved] == [t.data_ptr() for t in inputs]


@pytest.mark.parametrize(("shape", "elements"), [((7, 5, 3), 15), ((7, 5), 12), ((3,), 1), ((1, 9), 2), ((0, 4), 8)])
def test_blocks_cover_the_first_dimension_once(shape, elements):
    rows = [row for block in blocks(torch.zeros(shape), elements) for row in range(shape[0])[block]]
    assert rows == list(range(shape[0]))


def test_blocks_hold_about_as_many_elements_as_asked():
    found = list(blocks(torch.zeros(64, 100), 1000))
    assert {block.stop - block.start for block in found[:-1]} == {10}
    assert list(blocks(torch.zeros(64, 100), 10**6)) == [slice(0, 64)]


@pytest.mark.parametrize("scale_shape", [(), (12,), (6, 1)])
def test_the_size_of_blocks_changes_no_result(monkeypatch, scale_shape):
    torch.manual_seed(2)
    x, grad = torch.randn(9, 6, 12), torch.randn(9, 6, 12)
    scale, offset = torch.rand(scale_shape) + 0.2, torch.randn(scale_shape) * 0.1
    whole, whole_grads = run(x, scale, offset, 0, 3, grad)
    monkeypatch.setattr(blocks, "__defaults__", (2 * 72,))
    assert len(list(op.blocks(x))) == 5
    split, split_grads = run(x, scale, offset, 0, 3, grad)
    assert torch.equal(split, whole)
    assert torch.equal(split_grads[0], whole_grads[0])
    for found, expected in zip(split_grads[1:], whole_grads[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (5,), (0, 3)])
def test_an_activation_may_have_any_shape(shape):
    x, grad = torch.full(shape, 0.26), torch.ones(shape)
    y, (d_x, d_scale) = run(x, torch.tensor(0.1), None, -8, 7, grad)
    assert_close(y, torch.full(shape, 0.3), atol=1e-6)
    assert torch.equal(d_x, grad)
    assert_close(d_scale, 0.4 * x.numel(), atol=1e-5)


def test_a_strided_input_gives_what_a_contiguous_one_gives():
    torch.manual_seed(4)
    x, grad = torch.randn(6, 8).t(), torch.randn(6, 8).t()
    y, grads = run(x, torch.tensor(0.3), None, -2, 1, grad)
    same, same_grads = run(x.contiguous(), torch.tensor(0.3), None, -2, 1, grad.contiguous())
    assert torch.equal(y, same)
    assert torch.equal(grads[0], same_grads[0])
    assert_close(grads[1], same_grads[1])


def test_codes_are_integers_in_range_and_rebuild_x_hat():
    torch.manual_seed(5)
    x = torch.randn(64, 64) * 3
    codes = quantize(x, torch.tensor(0.37), torch.tensor(-0.2), Levels(0, 7))
    assert torch.equal(codes, codes.round())
    assert (codes.min(), codes.max()) == (0, 7)
    x_hat = fake_quantize(x, torch.tensor(0.37), torch.tensor(-0.2), Levels(0, 7))
    assert torch.equal(dequantize(codes, torch.tensor(0.37), torch.tensor(-0.2), Levels(0, 7)), x_hat)
    again = quantize(x_hat, torch.tensor(0.37), torch.tensor(-0.2), Levels(0, 7))
    assert torch.equal(again * 0.37 + -0.2, x_hat)
