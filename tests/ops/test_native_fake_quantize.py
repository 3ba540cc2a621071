"""Native passes of activation quantizers against their definition: bits for values, float64 rounding for sums."""

import pytest
import torch

from dsquant.ops import backends
from dsquant.ops.fake_quantize import ScaleGradient, backward_into, inner_length, quantize_dequantize
from dsquant.spec import Levels

SHAPE = (3, 4, 37, 24)  # images, heads, tokens, features
SCALES = {
    "tensor": (1,), "head": (4, 1, 1), "token": (37, 1), "channel": (24,), "head and token": (4, 37, 1), "all": (4, 37, 24),
}  # fmt: skip
LEVELS = {
    "2 bits": Levels(-2, 1), "unsigned": Levels(0, 3), "8 bits": Levels(-128, 127), "elastic": Levels(-1, 0, 0.5, 0.0, True),
    "half integers": Levels(-2, 1, 0.5, 0.5), "all passes": Levels(-2, 1, 0.5, float("inf")),
}  # fmt: skip


def case(scales, offset):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *SHAPE, generator=generator)
    scale = 0.2 + torch.rand(scales, generator=generator)
    x.view(-1)[:6] = torch.tensor([0.5, -0.5, 1.5, -2.0, 1.0, 0.0]) * scale.view(-1)[0]  # ties and edges
    return x, grad, scale, 0.3 * torch.randn(scales, generator=generator) if offset else None


def run(backend, monkeypatch, x, grad, scale, offset, levels):
    monkeypatch.setenv("DSQ_BACKEND", backend)
    sums, d_x, x_hat = ScaleGradient(scale, offset), torch.empty(x.shape), torch.empty(x.shape)
    backward_into(x, grad, scale, offset, levels, sums, d_x, x_hat)
    return quantize_dequantize(x, scale, offset, levels), x_hat, d_x, sums


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scales", SCALES)
def test_native_passes_give_the_bits_of_the_definition(monkeypatch, native_backend, scales, levels, offset):
    given = (*case(SCALES[scales], offset), LEVELS[levels])
    *wanted, sums = run("torch", monkeypatch, *given)
    *found, own = run(native_backend, monkeypatch, *given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    torch.testing.assert_close(own.scale, sums.scale, rtol=1e-4, atol=1e-3)
    if offset:
        torch.testing.assert_close(own.offset, sums.offset, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scales", SCALES)
def test_sums_are_the_same_for_any_number_of_threads_and_any_layout(monkeypatch, scales):
    x, grad, scale, offset = case(SCALES[scales], True)
    before, results = torch.get_num_threads(), []
    swapped = x.transpose(1, 2).contiguous().transpose(1, 2)
    try:
        for threads, source in ((1, x), (2, x), (2, swapped)):
            torch.set_num_threads(threads)
            results.append(run("cpu", monkeypatch, source, grad, scale, offset, Levels(-2, 1)))
    finally:
        torch.set_num_threads(before)
    for *values, sums in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(values, results[0][:3], strict=True))
        assert torch.equal(sums.scale, results[0][3].scale)
        assert torch.equal(sums.offset, results[0][3].offset)


def test_a_gradient_may_be_turned_in_place(monkeypatch):
    x, grad, scale, _ = case((1,), False)
    wanted = run("cpu", monkeypatch, x, grad, scale, None, Levels(-2, 1))[2]
    sums = ScaleGradient(scale, None)
    backward_into(x, grad, scale, None, Levels(-2, 1), sums, grad)
    assert torch.equal(grad, wanted)


def test_scales_that_do_not_lie_in_a_row_are_left_to_the_definition(monkeypatch):
    assert inner_length((3, 4, 5, 6), (4, 1, 6)) is None
    assert inner_length((3, 4, 5, 6), (4, 1, 1)) == 30
    assert inner_length((3, 4, 5, 6), (1,)) == 360
    x, grad, _, _ = case((1,), False)
    given = (x, grad, 0.2 + torch.rand(4, 1, 24), None, Levels(-2, 1))
    wanted, found = (run(backend, monkeypatch, *given) for backend in ("torch", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))


def test_a_nan_stays_one(monkeypatch, native_backend):
    monkeypatch.setenv("DSQ_BACKEND", native_backend)
    x = torch.tensor([[0.1, float("nan"), 3.0]])
    assert quantize_dequantize(x, torch.ones(1), None, Levels(-2, 1)).isnan().tolist() == [[False, True, False]]


def test_operators_pass_torchs_checks():
    assert backends.availability("portable").available
    x, grad, scale, offset = case((37, 1), True)
    flat = (scale.view(-1), offset.view(-1), 24, -2, 1, 0.0)
    torch.library.opcheck(torch.ops.dsquant.fake_quantize.default, (x, *flat, 0))
    sums = torch.zeros(2, 37, dtype=torch.float64)
    arguments = (x, grad, *flat, -2.0, 1.0, False, torch.empty(x.shape), torch.empty(x.shape), sums, 0)
    torch.library.opcheck(torch.ops.dsquant.fake_quantize_backward.default, arguments)
