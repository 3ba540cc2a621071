"""Attention in C++ on every instruction set: its errors, the order of its sums, and what it does not take."""

import pytest
import torch

from dsquant.errors import ConfigError
from dsquant.ops import backends
from dsquant.ops.native_attention import Attention, choose
from dsquant.ops.quant_attention import quant_attention
from tests.ops.conftest import require
from tests.ops.gpu.test_quant_attention import (
    GRIDS,
    OPTIONS,
    SHAPES,
    case,
    check,
    composed,
    errors,
    everything,
    outcome,
)

LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
# B, H, N, D, D of v: more queries than are worked on at a time, features of no whole vector
MORE = {"blocks of queries": (1, 1, 530, 16, 24), "no whole vector": (2, 3, 21, 5, 3), "one feature": (1, 2, 7, 1, 1)}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Have attention run on one instruction set."""
    number = LEVELS[request.param]
    require(backends.PORTABLE)
    if number > backends._level():
        pytest.skip(f"this processor lacks {request.param}")
    monkeypatch.setattr(backends, "_level", lambda: number)
    monkeypatch.setenv("DSQ_BACKEND", backends.AVX2 if number else backends.PORTABLE)
    return number


@pytest.mark.parametrize("name", [*SHAPES, *MORE])
def test_it_errs_at_most_twice_as_much_as_plain_operations(name, level):
    shape = (SHAPES | MORE)[name]
    check(case(shape, **everything(shape)), 2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_errs_at_most_twice_as_much_as_plain_operations(name, level):
    check(case((2, 2, 35, 16, 16), **OPTIONS[name]), 2e-6)


def test_scales_of_single_features_and_tokens_are_those_of_the_definition(level):
    given = list(case((2, 3, 35, 20, 20), offset=True))
    generator = torch.Generator().manual_seed(5)
    for site, size in ((0, (3, 1, 20)), (1, (35, 1)), (3, (20,))):
        args = given[3][site]
        scale = args.scale * (1 + 0.1 * torch.rand(size, generator=generator))
        given[3][site] = args._replace(scale=scale, offset=torch.full(size, 0.25))
    check(given, 2e-6)


@pytest.mark.parametrize("keys", [1, 20, 90])
def test_keys_may_be_more_or_fewer_than_queries(keys, level):
    (q, k, v), grad, scale, args, extra = case((2, 2, 70, 16, 16), bias=True)
    k, v = (t.repeat(1, 1, 2, 1)[:, :, :keys] for t in (k, v))
    extra["bias"] = extra["bias"].repeat(1, 1, 2)[..., :keys]
    check(((q, k, v), grad, scale, args, extra), 2e-6)


def test_the_number_of_threads_changes_no_bit(level):
    given = case((7, 3, 35, 16, 16), **everything((7, 3, 35)))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(outcome(quant_attention, given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_tensors_of_any_strides_give_the_bits_of_contiguous_ones(level):
    """A fused projection gives views; so do features that lie apart, and a mask that is the same for all queries."""
    (q, k, v), grad, scale, args, extra = case((2, 2, 35, 16, 16), bias=True, mask=(2, 1, 1, 35))
    apart = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (q, k, v)]
    fused = torch.stack([q, k, v], 2).transpose(1, 3).contiguous().transpose(1, 3).unbind(2)
    assert apart[0].stride(-1) == 2
    assert not fused[0].is_contiguous()
    wanted = outcome(quant_attention, ((q, k, v), grad, scale, args, extra))
    across = grad.transpose(-2, -1).contiguous().transpose(-2, -1)
    for qkv, given_grad in ((apart, grad), (fused, across)):
        found = []
        leaves = [t.detach().requires_grad_() for t in qkv]
        out = quant_attention(*leaves, scale, *args, **extra)
        found = [out.detach(), *torch.autograd.grad(out, leaves, given_grad)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[:4], strict=True))


def test_scores_far_apart_and_infinite_ones_are_those_of_softmax(level):
    """e^x is 0 below -87.3 and nothing overflows; a NaN stays one, in its own query alone."""
    q = torch.tensor([[1e4, 0.0], [80.0, 0.0], [-3e38, 0.0], [float("nan"), 0.0]]).view(1, 1, 4, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]).view(1, 1, 3, 2)
    v = torch.eye(3).view(1, 1, 3, 3)
    found = quant_attention(q, k, v, 1.0, None, None, None, None)[0, 0]
    wanted = (q.double() @ k.double().mT).softmax(-1)[0, 0]
    torch.testing.assert_close(found[:3].double(), wanted[:3], rtol=1e-6, atol=1e-37)
    assert found[3].isnan().all()


def test_probabilities_err_by_units_in_the_last_place(level):
    """Scores from -90 to 0, one key a query against a key of score 0: the probability is e^x / (1 + e^x)."""
    x = -torch.linspace(0, 90, 4001)
    q = torch.stack([x, torch.zeros_like(x)], -1).view(1, 1, -1, 2)
    k, v = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2), torch.eye(2).view(1, 1, 2, 2)
    found = quant_attention(q, k, v, 1.0, None, None, None, None)[0, 0, :, 0].double()
    wanted = x.double().sigmoid()
    held = wanted > 2e-38
    assert ((found - wanted).abs()[held] / wanted[held]).max() < 6e-7
    assert (found[~held] <= 2e-38).all()


@pytest.mark.parametrize("what", ["a scale of probabilities", "a softmax scale"])
def test_what_it_does_not_take_runs_the_definition_or_is_an_error_where_it_is_forced(what, monkeypatch):
    qkv, grad, scale, args, extra = case((2, 2, 35, 16, 16))
    if what == "a softmax scale":
        scale = torch.full((2, 1, 1, 1), 0.2)
    else:
        args[2] = args[2]._replace(scale=torch.full((35,), 0.02))
    monkeypatch.setenv("DSQ_BACKEND", "cpu")
    with pytest.raises(
        ConfigError, match=f"quant_attention has no such code for {what} of shape .*; use auto or torch"
    ):
        quant_attention(*qkv, scale, *args, **extra)
    monkeypatch.setenv("DSQ_BACKEND", "auto")
    assert choose(Attention(*qkv, scale, None, None, args)) == backends.TORCH
    given = qkv, grad, scale, args, extra
    for error in errors(outcome(quant_attention, given), outcome(composed, given, torch.float64)):
        assert error < 1e-5


def test_the_operators_pass_opcheck(level):
    batch, heads, tokens, features = 2, 2, 9, 4
    q, k, v, grad = torch.randn(4, batch, heads, tokens, features)
    grids = torch.tensor(
        [[1.0, *grid[:2], grid.shift, grid.low, grid.high, 0.0] for grid in GRIDS.values()], dtype=torch.double
    )
    bias, mask = torch.randn(1, heads, tokens, tokens), torch.zeros(2, 1, 1, tokens).expand(2, heads, tokens, tokens)
    told = q, k, v, bias, mask, torch.full((3, 2, heads), 0.3), torch.full((3, heads, tokens, 1), 0.2), grids
    torch.library.opcheck(
        torch.ops.dsquant.quant_attention_cpu.default, (*told, torch.empty(batch, tokens, heads, features), level)
    )
    rooms = [torch.empty_like(q) for _ in range(3)]
    sums = torch.empty(batch, heads, 6).double(), torch.empty(3, batch, heads, tokens, 1).double()
    d_bias = torch.zeros(heads, tokens, tokens).double()
    run = torch.ops.dsquant.quant_attention_cpu_backward.default
    torch.library.opcheck(run, (*told, grad, True, *rooms, *sums, d_bias, level))


def test_tensors_of_another_shape_are_refused_by_name(level):
    given = case((1, 2, 5, 4, 4))
    told = [*given[0], None, None, torch.zeros(3, 2, 2), torch.zeros(3, 2, 5, 1), torch.zeros(4, 7, dtype=torch.double)]
    run, out = torch.ops.dsquant.quant_attention_cpu, torch.empty(1, 5, 2, 4)
    run(*told, out, level)
    for place, other, name in (
        (1, torch.zeros(1, 2, 5, 3), "k must be float32"), (2, torch.zeros(1, 2, 6, 4), "v must be float32"),
        (3, torch.zeros(1, 2, 5, 6), "bias must be float32"), (5, torch.zeros(3, 2, 1), "scales of q, k and v"),
        (7, torch.zeros(4, 6, dtype=torch.double), "grids must be"), (0, given[0][0].double(), "q must be float32"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=name):
            run(*told[:place], other, *told[place + 1 :], out, level)
