import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs, blocks, fake_quantize
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import integer_definition, packed_matrix
from dsquant.ops.quant_linear import WeightGrid, quant_linear
from dsquant.spec import Levels, QuantSpec

pytestmark = pytest.mark.usefixtures("each_backend")


def inputs(shape=(5, 7, 12), out=9, *, bias=True, offset=True, groups=1, dtype=torch.float32):
    """Return fresh leaves x, weight, bias, scale, offset."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, dtype=dtype),
        torch.randn(out, shape[-1], dtype=dtype) * 0.3,
        torch.randn(out, dtype=dtype) if bias else None,
        (torch.rand(groups) * 0.3 + 0.3).repeat_interleave(shape[-1] // groups) if groups > 1 else torch.tensor([0.4]),
        torch.full((shape[-1] if groups > 1 else 1,), -0.2) if offset else None,
    ]
    return [None if t is None else t.requires_grad_() for t in tensors]


def compose(x, weight, bias, scale, offset, levels, grad_scale=1.0):
    return F.linear(fake_quantize(x, scale, offset, levels, grad_scale), weight, bias)


def outcome(function, tensors, grad, *limits):
    """Return the output and the gradient of every leaf."""
    y = function(*tensors, *limits)
    leaves = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("shape", [(6, 12), (5, 7, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_equals_quantizing_then_a_linear_layer(shape, bias, offset, groups):
    tensors = inputs(shape, bias=bias, offset=offset, groups=groups)
    grad = torch.randn(*shape[:-1], 9)
    fused = outcome(quant_linear, tensors, grad, Levels(0, 3), 0.25)
    composed = outcome(compose, tensors, grad, Levels(0, 3), 0.25)
    assert torch.equal(fused[0], composed[0])
    for found, expected in zip(fused[1:], composed[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def straight_through(v, qmin, qmax):
    """Round and clip v; its gradient is 1 on [qmin, qmax], both edges included (`clamp`'s own is 0 there in some torch)."""
    inside = (v >= qmin) & (v <= qmax)
    return v.clamp(qmin, qmax).round().detach() + torch.where(inside, v - v.detach(), 0.0)


def test_it_equals_autograd_in_float64():
    x, weight, bias, scale, offset = tensors = inputs()
    grad = torch.randn(5, 7, 9)
    found = outcome(quant_linear, tensors, grad, Levels(0, 3))
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    x, weight, bias, scale, offset = doubles
    y = (straight_through((x - offset) / scale, 0, 3) * scale + offset) @ weight.t() + bias
    expected = [y.detach(), *torch.autograd.grad(y, doubles, grad.double())]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4)


def of_gelu(*tensors):
    return quant_linear(*tensors, gelu=True)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_with_a_gelu_before_the_quantizer_it_equals_autograd_in_float64(groups, offset):
    tensors = inputs((5, 7, 12), groups=groups, offset=offset)
    grad = torch.randn(5, 7, 9)
    found = outcome(of_gelu, tensors, grad, Levels(0, 3))
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, weight, bias, scale, zero = doubles
    zero = torch.zeros(()) if zero is None else zero
    y = (straight_through((F.gelu(x) - zero) / scale, 0, 3) * scale + zero) @ weight.t() + bias
    expected = [y.detach(), *torch.autograd.grad(y, [t for t in doubles if t is not None], grad.double())]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4)


def test_with_a_gelu_the_layer_saves_what_enters_the_gelu_and_nothing_else_of_its_size():
    tensors, saved = inputs((5, 7, 12)), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        of_gelu(*tensors, Levels(0, 3))
    assert [t.data_ptr() for t in saved if t.shape == (5, 7, 12)] == [tensors[0].data_ptr()]


def test_bfloat16_equals_the_composition_in_bfloat16():
    tensors = inputs(dtype=torch.bfloat16)
    grad = torch.randn(5, 7, 9).bfloat16()
    fused = outcome(quant_linear, tensors, grad, Levels(0, 3))
    composed = outcome(compose, tensors, grad, Levels(0, 3))
    assert [t.dtype for t in fused] == [t.dtype for t in composed]
    assert torch.equal(fused[0], composed[0])
    assert torch.equal(fused[1], composed[1])
    for found, expected in zip(fused[2:], composed[2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("offset", [True, False])
def test_the_input_is_saved_once_and_no_quantized_copy_of_it(offset):
    tensors = inputs(offset=offset)
    x, weight, _, scale, shift = tensors
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quant_linear(*tensors, Levels(0, 3))
    expected = [t.data_ptr() for t in (x, weight, scale, shift) if t is not None]
    assert sorted(t.data_ptr() for t in saved) == sorted(expected)


def test_the_size_of_blocks_changes_no_result(monkeypatch):
    tensors, grad = inputs(groups=3), torch.randn(5, 7, 9)
    whole = outcome(quant_linear, tensors, grad, Levels(0, 3))
    monkeypatch.setattr(blocks, "__defaults__", (1,))
    split = outcome(quant_linear, tensors, grad, Levels(0, 3))
    for found, expected in zip(split[:4], whole[:4], strict=True):  # y, x, weight and bias: no sum crosses blocks
        assert torch.equal(found, expected)
    for found, expected in zip(split[4:], whole[4:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_gradients_arrive_where_the_input_needs_none():
    """The first layer of a model: its input is the image."""
    x, weight, bias, scale, offset = inputs()
    y = quant_linear(x.detach(), weight, bias, scale, offset, Levels(0, 3))
    y.sum().backward()
    expected = outcome(compose, [x, weight, bias, scale, offset], torch.ones_like(y), Levels(0, 3))
    for leaf, wanted in zip((weight, bias, scale, offset), expected[2:], strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-5)


def image(n_bits, method, groups, rows=9, cols=37):
    """Return codes, scales and the image of a weight with so many scales, each of neighbouring rows."""
    levels, generator = QuantSpec(n_bits, method=method).levels, torch.Generator().manual_seed(n_bits)
    codes = torch.randint(levels.qmin, levels.qmax + 1, (rows, cols), generator=generator)
    scale = torch.rand(groups, generator=generator) + 0.2
    return (
        codes.to(torch.int8),
        scale,
        levels,
        (codes + levels.shift) * scale.repeat_interleave(rows // groups)[:, None],
    )


INPUTS = {
    "2 bits": Levels(-2, 1),
    "8 bits": Levels(0, 255),
    "1 bit": Levels(-1, 0, 0.5),
    "1 bit, unsigned": Levels(0, 1),
}
WEIGHTS = [(1, "elastic"), (2, "lsq"), (2, "seq"), (3, "lsq"), (4, "lsq"), (8, "lsq")]


@pytest.mark.parametrize(("n_bits", "method"), WEIGHTS)
@pytest.mark.parametrize("levels", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("groups", [1, 3, 9])
def test_the_product_with_an_image_is_exact_and_its_gradients_are_those_of_floats(
    each_backend, n_bits, method, levels, groups
):
    codes, weight_scale, weight_levels, w_hat = image(n_bits, method, groups)
    x, bias = torch.randn(5, 4, 37), torch.randn(9)
    scale, offset, grad = torch.tensor([0.3]), torch.tensor([0.1]), torch.randn(5, 4, 9)
    leaves = [t.requires_grad_() for t in (x, w_hat.clone(), bias, scale, offset)]
    plain, known = (
        outcome(lambda *given, grid=grid: quant_linear(*given, levels, 0.5, grid), leaves, grad)
        for grid in (None, WeightGrid(weight_scale, weight_levels))
    )
    for found, expected in zip(known[1:], plain[1:], strict=True):
        assert torch.equal(found, expected)
    assert (known[0] - plain[0]).abs().max() <= 2e-6 * plain[0].abs().max()
    if each_backend != backends.TORCH:
        rows = weight_scale.repeat_interleave(9 // groups)
        matrix = packed_matrix(pack(codes, n_bits), rows, n_bits, 37, weight_levels.shift)
        with torch.no_grad():
            exact = integer_definition(x, matrix, bias, QuantArgs(scale, offset, levels))
        assert torch.equal(known[0], exact)


def test_with_a_gelu_the_product_with_an_image_takes_codes_of_what_the_gelu_gives(each_backend):
    _, weight_scale, weight_levels, w_hat = image(2, "lsq", 9)
    x, args = torch.randn(5, 4, 37), QuantArgs(torch.tensor([0.3]), torch.tensor([-0.1]), Levels(0, 3))
    grid = WeightGrid(weight_scale, weight_levels)
    found = quant_linear(x, w_hat, None, *args, grid, gelu=True)
    assert torch.equal(found, quant_linear(F.gelu(x), w_hat, None, *args, grid))


@pytest.mark.parametrize("factor", [1.01, 1e30, float("nan")])
def test_a_weight_that_is_no_image_is_refused(each_backend, factor):
    _, scale, levels, w_hat = image(2, "lsq", 3)
    w_hat[4, 5] = 0.3 * factor
    given = torch.randn(2, 37), w_hat, None, torch.ones(1), None, Levels(0, 3), 1.0, WeightGrid(scale, levels)
    if each_backend not in backends.ON_CPU:
        lost = quant_linear(*given).isnan()
        on_gpu = each_backend == backends.TRITON  # which does not wait for what its kernels find
        assert not lost[:, [0, 1, 2, 3, 5, 6, 7, 8]].any()
        assert lost[:, 4].all() == (on_gpu or factor != factor)
        return
    with pytest.raises(RuntimeError, match="row 4 of a weight holds a value that is no level of its quantizer"):
        quant_linear(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_with_a_scale_for_each_channel_and_other_dtypes_take_floats(each_backend, dtype):
    _, weight_scale, levels, w_hat = image(2, "lsq", 3)
    scale = torch.rand(37 if dtype is torch.float32 else 1) + 0.3
    if each_backend == backends.TRITON and dtype is torch.bfloat16:  # which its kernels take: gpu/test_quant_linear.py
        scale = scale.expand(37).contiguous()
    given = torch.randn(6, 37).to(dtype), w_hat.to(dtype), None, scale, None, Levels(0, 3), 1.0
    assert torch.equal(quant_linear(*given, WeightGrid(weight_scale, levels)), quant_linear(*given))


def test_sums_beyond_32_bits_are_left_to_floats(each_backend):
    cols, levels, weight_levels = 1 << 15, Levels(0, 255, 0.5), Levels(-128, 127, 0.5)
    given = torch.full((1, cols), 1e4), torch.full((1, cols), 127.5), None, torch.ones(1), None, levels, 1.0
    y = quant_linear(*given, WeightGrid(torch.ones(1), weight_levels))
    assert 511 * 255 * cols > 1 << 31  # of whole levels, twice as large each
    assert y.item() == pytest.approx(255.5 * 127.5 * cols, rel=1e-4)


def test_the_operator_passes_torchs_checks(each_backend):
    _, weight_scale, levels, w_hat = image(2, "seq", 3)
    grids = (levels.shift, levels.qmin, levels.qmax, 0, 3, 0.0)
    for bias, offset in ((None, None), (torch.randn(9), torch.tensor([0.1]))):
        given = (torch.randn(2, 4, 37), w_hat, weight_scale, bias, torch.ones(1), offset, *grids, 0)
        torch.library.opcheck(torch.ops.dsquant.image_linear_int.default, given)
