"""Attention in Triton's kernels: in every shape and with every option, against float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsquant.errors import ConfigError
from dsquant.ops import backends, gpu
from dsquant.ops.fake_quantize import QuantArgs, fake_quantize
from dsquant.ops.native_attention import Attention, choose
from dsquant.ops.quant_attention import quant_attention
from dsquant.spec import Levels

FEW = 4
FLOAT32 = 3e-6  # what rounding alone may make of float32: a GPU's powers of 2 err by two last bits
GRIDS = {"q": Levels(-2, 1), "k": Levels(-4, 3), "probs": Levels(0, 3), "v": Levels(-2, 1)}
SHAPES = {  # B, H, N, D, D of v
    "one token": (2, 2, 1, 16, 16), "windows": (1, 2, 49, 32, 32), "windows of 24 features": (2, 1, 49, 24, 24),
    "a block to the last token": (1, 2, 64, 16, 16), "a token more": (1, 1, 65, 16, 16), "a prime": (1, 1, 53, 48, 48),
    "ViT": (1, 1, 197, 64, 64), "72 features": (1, 1, 35, 72, 72), "128 features": (1, 1, 35, 128, 128),
    "a block of keys for two of queries": (1, 2, 24, 128, 128),
    "keys wider than values": (1, 1, 50, 192, 64), "256 features": (1, 1, 33, 256, 80),
}  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", backends.TRITON)
    assert backends.availability(backends.TRITON).available


def launched(run):
    """Return the names of the kernels that `run` launches, in order."""
    with gpu.recorded() as launches:
        run()
    names = [launch.kernel.__name__ for launch in launches if "quant_attention" in launch.kernel.fn.__module__]
    return [name for name in names if name != "_sum_sites"]


def case(shape, dtype=torch.float32, seed=0, grids=GRIDS, offset=False, granularity="tensor", bias=False, mask=None):
    """Return q, k, v, the gradient, softmax scale, QuantArgs and what is added; x_hat is exact in bfloat16, p on no tie."""
    batch, heads, length, dim, dim_v = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    sizes = {"tensor": (1,), "head": (heads, 1, 1), "token": (length, 1), "both": (1, heads, length, 1)}[granularity]
    q, k, v, grad = (normal(batch, heads, length, d).to(dtype) for d in (dim, dim, dim_v, dim_v))
    args = []
    for site, grid in grids.items():
        if grid is None:
            args.append(None)
            continue
        scale = torch.full(sizes, 1.25 / (grid.qmax + 1)) if site != "probs" else (0.5 + normal(*sizes).abs()) / length
        shift = None if not offset else torch.full(sizes, 0.25) if site != "probs" else normal(*sizes) / (8 * length)
        args.append(QuantArgs(scale, shift, grid, 0.5))
    extra = {"bias": normal(heads, length, length) if bias else None, "mask": None}
    if mask is not None:
        extra["mask"] = torch.where(torch.rand(mask, generator=generator) < 0.3, -30.0, 0.0)
    each = (heads, length, 1) if granularity == "both" else (heads, 1, 1)
    softmax_scale = (1 + normal(*each).abs()) / dim**0.5 if bias else dim**-0.5
    return (q, k, v), grad, softmax_scale, args, extra


def through(x, args):
    """Quantize by plain autograd, straight-through written out; scale and offset get `grad_scale` of their gradient."""
    if args is None:
        return x
    levels = args.levels
    scale, offset = (t if t is None else t * args.grad_scale + (t * (1 - args.grad_scale)).detach() for t in args[:2])
    v = (x if offset is None else x - offset) / scale
    level = (v.detach() - levels.shift).clamp(levels.qmin, levels.qmax).round() + levels.shift
    inside = (v >= levels.low) & (v <= levels.high)
    if levels.elastic:
        x_hat = level * scale + torch.where(inside, x - x.detach(), 0.0)
    else:
        x_hat = (level + torch.where(inside, v - v.detach(), 0.0)) * scale
    return (
        x_hat
        if offset is None
        else x_hat + (offset if not levels.elastic else torch.where(inside, offset.detach(), offset))
    )


def composed(q, k, v, softmax_scale, *args, bias=None, mask=None, quantize=through):
    """Return attention that keeps everything."""
    q, k, v = quantize(q, args[0]), quantize(k, args[1]), quantize(v, args[3])
    scores = (q * softmax_scale).to(q.dtype) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if mask is not None:
        scores = scores + mask.repeat(len(q) // len(mask), 1, 1, 1).to(q.dtype)
    return quantize(scores.softmax(-1), args[2]) @ v


def outcome(attend, given, dtype=None):
    """Return the output and the gradients of all that has one, computed in `dtype`."""

    def leaf(t):
        return t.detach().to(dtype or t.dtype).requires_grad_() if isinstance(t, torch.Tensor) else t

    qkv, grad, softmax_scale, args, extra = given
    qkv, softmax_scale, bias = [leaf(t) for t in qkv], leaf(softmax_scale), leaf(extra["bias"])
    args = [a and QuantArgs(leaf(a.scale), leaf(a.offset), *a[2:]) for a in args]
    mask = extra["mask"] if dtype is None or extra["mask"] is None else extra["mask"].to(dtype)
    out = attend(*qkv, softmax_scale, *args, bias=bias, mask=mask)
    flat = [*qkv, softmax_scale, bias, *(t for a in args if a is not None for t in a[:2])]
    leaves = [t for t in flat if isinstance(t, torch.Tensor)]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def errors(found, exact):
    """Return the error of each tensor, relative to its norm, or absolute where that is 0."""
    return [
        float((f.double() - e).norm() / (e.norm() if e.norm() > 1e-9 else 1.0))
        for f, e in zip(found, exact, strict=True)
    ]


def naive(*given, **extra):
    """Attend as whole tensors of the dtype of q, by the quantizers' own op."""
    return composed(*given, **extra, quantize=lambda x, a: x if a is None else fake_quantize(x, *a))


def check(given, floor):
    """Hold every error against twice that of plain operations in the same dtype; `floor` is what rounding alone may make."""
    exact = outcome(composed, given, torch.float64)
    found, plain = outcome(quant_attention, given), outcome(naive, given)
    assert all(f.shape == e.shape for f, e in zip(found, exact, strict=True))
    others = errors(plain, exact)
    # Of what is a few values alone an error is chance: it is held against the worst that plain operations make of any of these.
    few = max((other for other, e in zip(others, exact, strict=True) if e.numel() <= FEW), default=0.0)
    for error, other, e in zip(errors(found, exact), others, exact, strict=True):
        assert error <= max(2 * (few if e.numel() <= FEW else other), floor)


def everything(shape):
    batch, _, length = shape[:3]
    return {"offset": True, "bias": True, "mask": (batch, 1, 1, length), "granularity": "both"}


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape[3] <= 128 and name != "ViT"])
def test_float32_errs_at_most_twice_as_much_as_plain_operations(name):
    check(case(SHAPES[name], **everything(SHAPES[name])), FLOAT32)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_operations(name):
    """Rounding of a result alone is 2^-9, and 2^-8 where the interpreter cuts off."""
    check(case(SHAPES[name], torch.bfloat16, **everything(SHAPES[name])), 2.0**-8)


OPTIONS = {
    "elastic": {"grids": {**GRIDS, "probs": Levels(0, 1, 0.0, 0.0, True)}, "granularity": "token"},
    "half integers": {"grids": {**GRIDS, "probs": Levels(-2, 1, 0.5, 0.5)}, "granularity": "head", "offset": True},
    "float probabilities": {"grids": {**GRIDS, "probs": None}, "granularity": "head", "bias": True},
    "nothing quantized": {"grids": dict.fromkeys(GRIDS), "mask": (2, 1, 35, 35)},
    "a mask each window": {"mask": (2, 1, 35, 35), "bias": True, "granularity": "head"},
    "a mask each head": {"mask": (1, 2, 1, 35)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_errs_at_most_twice_as_much_as_plain_operations(name, dtype):
    check(case((2, 2, 35, 16, 16), dtype, **OPTIONS[name]), FLOAT32 if dtype is torch.float32 else 2.0**-8)


def test_kernels_run_forward_and_backward_and_a_window_takes_one_of_each():
    many = case((1, 1, 90, 16, 16), torch.bfloat16, bias=True)
    one = case((1, 1, 49, 16, 16), torch.bfloat16)
    windows = case((1, 1, 49, 16, 16), torch.bfloat16, bias=True)
    forward, backward = ["_forward_rows"], ["_operands", "_of_queries", "_of_keys", "_of_bias"]
    assert launched(lambda: outcome(quant_attention, many)) == [*forward, *backward]
    assert launched(lambda: outcome(quant_attention, one)) == [*forward, "_of_window"]
    assert launched(lambda: outcome(quant_attention, windows)) == [*forward, "_of_window"]


def test_the_last_rows_of_a_sequence_are_a_launch_of_their_own_where_a_block_would_be_nearly_empty():
    with gpu.recorded() as launches:
        outcome(quant_attention, case((2, 3, 197, 64, 64), torch.bfloat16))
    rows = {"_forward_rows": "BLOCK_Q", "_forward": "BLOCK_Q", "_of_queries": "BLOCK_Q", "_of_keys": "BLOCK_K"}
    found = [(n, launch.arguments, launch.grid[0]) for launch in launches if (n := launch.kernel.__name__) in rows]
    blocks, rest = (0, 64, 2 * 3 * 3), (192, 16, 2 * 3)
    assert [(n, told["first"], told[rows[n]], programs) for n, told, programs in found] == [
        ("_forward_rows", 0, 64, 2 * 3 * 4), ("_of_queries", *blocks), ("_of_queries", *rest), ("_of_keys", *blocks),
        ("_of_keys", *rest),
    ]  # fmt: skip


BEYOND = {  # what the kernels do not take, and what the error says of it
    "129 features": ({"shape": (1, 2, 35, 129, 16)}, r"q \(1, 2, 35, 129\) and v \(1, 2, 35, 16\) of torch.float32"),
    "257 features": ({"shape": (1, 1, 9, 16, 257), "dtype": torch.bfloat16}, r"at most .* 256 of torch.bfloat16"),
    "float64": ({"dtype": torch.float64}, "q, k and v of torch.float64, torch.float64 and torch.float64"),
    "a scale for each key": ({"probs": (35,)}, r"a scale of probabilities of shape \(35,\)"),
    "a scale for each image": ({"softmax_scale": (2, 1, 1, 1)}, r"a softmax scale of shape \(2, 1, 1, 1\)"),
}


def beyond(name):
    change, said = BEYOND[name]
    given = list(case(change.get("shape", (2, 2, 35, 16, 16)), change.get("dtype", torch.float32)))
    if "probs" in change:
        given[3][2] = given[3][2]._replace(scale=torch.full(change["probs"], 0.02))
    if "softmax_scale" in change:
        given[2] = torch.full(change["softmax_scale"], 0.2)
    return given, said


@pytest.mark.parametrize("name", BEYOND)
def test_kernels_that_are_forced_and_do_not_take_the_inputs_are_an_error(name):
    given, said = beyond(name)
    with pytest.raises(
        ConfigError, match=f"DSQ_BACKEND=triton: quant_attention has no such code for .*{said}"
    ) as error:
        quant_attention(*given[0], given[2], *given[3])
    assert str(error.value).endswith("; use auto or torch")


@pytest.mark.parametrize("name", BEYOND)
def test_on_a_gpu_what_the_kernels_do_not_take_runs_the_definition_under_auto(name, monkeypatch):
    given, _ = beyond(name)
    monkeypatch.setenv("DSQ_BACKEND", "auto")
    assert on_gpu(chosen, *given[0], given[2], *given[3]) == backends.TORCH
    taken = case((2, 2, 35, 16, 16))
    assert on_gpu(chosen, *taken[0], taken[2], *taken[3]) == backends.TRITON


def chosen(q, k, v, softmax_scale, *args):
    return choose(Attention(q, k, v, softmax_scale, None, None, list(args)))


def on_gpu(run, *args):
    """Call `run` with tensors of the same kind on a GPU that need not be there."""

    def fake(value):
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")
        return QuantArgs(fake(value.scale), fake(value.offset), *value[2:]) if isinstance(value, QuantArgs) else value

    with FakeTensorMode():
        return run(*map(fake, args))


def test_attention_to_a_sequence_of_another_length_is_beyond_the_kernels():
    (q, k, v), _, softmax_scale, args, _ = case((1, 2, 35, 16, 16))
    with pytest.raises(ConfigError, match=r"k \(1, 2, 20, 16\).*must share batch, heads and tokens"):
        quant_attention(q, k[:, :, :20], v[:, :, :20], softmax_scale, *args)


def test_on_a_gpu_forward_is_one_operator_that_is_traced_without_one():
    qkv, _, softmax_scale, args, _ = case((2, 3, 20, 16, 16), torch.bfloat16)
    with FakeTensorMode():
        q, k, v = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in qkv)
        args = [QuantArgs(torch.empty(1, device="cuda"), *a[1:]) for a in args]
        out = quant_attention(q, k, v, softmax_scale, *args)
    assert (out.shape, out.dtype, out.device.type) == (v.shape, torch.bfloat16, "cuda")


def test_heads_share_a_query_without_a_copy():
    """As with the product of q and k weights: q is the input, the same in every head."""
    given = case((2, 3, 20, 16, 16), grids={**GRIDS, "q": None})
    shared = given[0][0][:, :1].expand(-1, 3, -1, -1)
    with gpu.recorded() as launches:
        quant_attention(shared, *given[0][1:], given[2], *given[3])
    assert launches[-1].arguments["q"].data_ptr() == shared.data_ptr()
    assert launches[-1].arguments["q_h"] == 0
    results = [quant_attention(q, *given[0][1:], given[2], *given[3]) for q in (shared, shared.contiguous())]
    assert torch.equal(*results)


@pytest.mark.parametrize("padding", [-torch.inf, torch.finfo(torch.float32).min], ids=["-inf", "the lowest number"])
@pytest.mark.parametrize("length", [16, 70], ids=["one block", "blocks that are padding alone"])
def test_padded_keys_get_no_gradient_and_a_row_of_padding_is_what_it_is_in_the_definition(length, padding, monkeypatch):
    given = case((3, 1, length, 16, 16))
    mask = torch.zeros(3, 1, 1, length)
    mask[1, ..., 5:], mask[2] = padding, padding
    given[4]["mask"] = mask
    found = outcome(quant_attention, given)
    monkeypatch.setenv("DSQ_BACKEND", backends.TORCH)
    for one, other in zip(found[:4], outcome(quant_attention, given)[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0][:2].isfinite().all()
    assert not found[2][1, :, 5:].any()
    assert not found[3][1, :, 5:].any()


@pytest.mark.parametrize(("length", "dtype"), [(20, torch.bfloat16), (40, torch.float32)], ids=["a window", "blocks"])
def test_results_do_not_change_from_run_to_run_nor_with_how_the_batch_is_cut_for_the_bias(length, dtype, monkeypatch):
    given = case((4, 2, length, 16, 16), dtype, bias=True, mask=(2, 1, length, length))
    first, (each, launched_by) = outcome(quant_attention, given), sums_of_bias(given)
    assert len(each) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, outcome(quant_attention, given), strict=True))
    monkeypatch.setattr("dsquant.ops.gpu.quant_attention_backward.PROGRAMS", 2 * launched_by // 4)
    assert len(sums_of_bias(given)[0]) == 2
    for one, other in zip(first, outcome(quant_attention, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def sums_of_bias(given):
    """Return the partial sums of the bias's gradient that a kernel is launched to fill, and by how many programs."""
    with gpu.recorded() as launches:
        outcome(quant_attention, given)
    found = next(launch for launch in launches if launch.arguments.get("d_bias") is not None)
    return found.arguments["d_bias"], found.grid[0]
