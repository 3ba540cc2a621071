"""Triton kernels of activation quantizers, interpreted: what `tests/ops/test_native_fake_quantize.py` does not say of them."""

import pytest
import torch

from dsquant.ops import gpu
from dsquant.ops.fake_quantize import ScaleGradient, backward_into, quantize_dequantize
from dsquant.ops.gpu import fake_quantize as kernels
from dsquant.spec import Levels

LEVELS = Levels(-2, 1)
GROUPS = {"all": (1,), "head": (3, 1, 1), "token": (13, 1), "channel": (24,)}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", "triton")


@pytest.fixture
def several_steps(monkeypatch):
    """Have programs of small activations take several tiles, as those of large ones do."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "TILE", 256)
    kernels._told.cache_clear()
    yield
    kernels._told.cache_clear()


def backward(backend, x, grad, scale, offset, monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", backend)
    sums, d_x = ScaleGradient(scale, offset), torch.empty_like(x)
    backward_into(x, grad, scale, offset, LEVELS, sums, d_x)
    return d_x, sums


@pytest.mark.parametrize("images", [1, 5, 16])
@pytest.mark.parametrize("groups", GROUPS)
def test_programs_of_several_steps_find_the_definition_s_sums(groups, images, monkeypatch, several_steps):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, images, 3, 13, 24, generator=generator)
    scale = 0.2 + torch.rand(GROUPS[groups], generator=generator)
    given = x, grad, scale, 0.3 * torch.randn(GROUPS[groups], generator=generator), monkeypatch
    (wanted, sums), (found, own) = backward("torch", *given), backward("triton", *given)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(own.scale, sums.scale, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(own.offset, sums.offset, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", GROUPS)
def test_forward_is_one_launch_and_backward_two(groups):
    x, scale = torch.zeros(2, 3, 13, 24), torch.ones(GROUPS[groups])
    with gpu.recorded() as launches:
        quantize_dequantize(x, scale, None, LEVELS)
        backward_into(x, x, scale, None, LEVELS, ScaleGradient(scale, None), torch.empty_like(x))
    assert [launch.kernel.__name__ for launch in launches] == ["_forward", "_backward", "_add_partial"]


def test_the_gelu_of_the_kernels_and_its_slope_are_those_of_float64_to_float32_s_digits():
    x, scale, wide = torch.linspace(-12, 12, 4001), torch.tensor([2.0**-18]), Levels(-(1 << 22), 1 << 22)
    exact = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(exact).sum(), exact)
    d_x, x_hat = torch.empty_like(x), torch.empty_like(x)
    backward_into(x, torch.ones_like(x), scale, None, wide, ScaleGradient(scale, None), d_x, x_hat, gelu=True)
    assert (d_x - slope).abs().max() < 4e-7
    assert (x_hat - torch.nn.functional.gelu(exact)).abs().max() < 0.5 * float(scale) + 1e-6
    assert torch.equal(quantize_dequantize(x, scale, None, wide, gelu=True), x_hat)


def test_a_gelu_costs_no_launch_more():
    x, scale = torch.zeros(2, 3, 13, 24), torch.ones(1)
    with gpu.recorded() as launches:
        quantize_dequantize(x, scale, None, LEVELS, gelu=True)
        backward_into(x, x, scale, None, LEVELS, ScaleGradient(scale, None), torch.empty_like(x), gelu=True)
    assert [launch.kernel.__name__ for launch in launches] == ["_forward", "_backward", "_add_partial"]


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-15, 0.1, 1e15, 1e30])
def test_quotients_by_scales_of_any_size_are_rounded_as_those_of_division(size):
    """At ties, and one unit of the last digit beside them. The interpreter divides: what compiled kernels do, `make gpu` says."""
    generator = torch.Generator().manual_seed(0)
    scale = size * (1 + torch.rand(61, 1, generator=generator))
    ties = scale * (torch.arange(-24, 24) / 2)
    x = torch.cat([ties, *(torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf))], 1)
    levels = Levels(-8, 7)
    found = quantize_dequantize(x, scale, None, levels)
    assert torch.equal(found, torch.round(torch.clamp(x / scale, -8, 7)) * scale)


@pytest.mark.filterwarnings("ignore:overflow")
def test_infinite_values_take_the_end_levels():
    x = torch.tensor([[-torch.inf, torch.inf, 3e38, -3e38]])
    found = quantize_dequantize(x, torch.tensor([1e-3]), None, LEVELS)
    assert torch.equal(found, torch.tensor([[-2.0, 1.0, 1.0, -2.0]]) * 1e-3)


@pytest.mark.parametrize(
    ("n_groups", "inner", "shape"),
    [(1, 38731776, (1, 2048)), (197, 768, (8, 256)), (768, 1, (8, 256)), (6, 12608, (2, 1024))],
)
def test_tiles_hold_little_that_does_not_exist(n_groups, inner, shape):
    """A row of 768 is three blocks of 256: as one of 1024, a quarter of it would be none."""
    layout = kernels.Layout.of(256 * 197 * 768, n_groups, inner, 2048, 8)
    assert (layout.block_rows, layout.block_cols) == shape


def test_on_gpus_the_dispatcher_finds_the_kernels():
    for name in ("fake_quantize", "fake_quantize_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsquant::{name}", "CUDA")
