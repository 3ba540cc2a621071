"""The quantized product of q and k weights against its formula in float64 and autograd."""

import pytest
import torch
import torch.nn.functional as F

from dsquant.ops.qk_product import ProductArgs, qk_linear, qk_product, quantize_product
from dsquant.spec import Method, levels_of

HEADS, WIDTH, ROWS = 3, 24, 8  # 8 rows a head


def fused(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.3 * torch.randn(3 * HEADS * ROWS, WIDTH, generator=generator)
    return weight, 0.1 * torch.randn(3 * HEADS * ROWS, generator=generator)


def inputs(seed=1):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def written_out(weight, n_bits, groups, centred=False):
    """Return the float64 product (H * C, C) of a float64 fused weight, and its image by OFQ's formula (or BWN's)."""
    q, k = weight[: HEADS * ROWS], weight[HEADS * ROWS : 2 * HEADS * ROWS]
    heads = [q[i * ROWS : (i + 1) * ROWS].T @ k[i * ROWS : (i + 1) * ROWS] for i in range(HEADS)]
    product = torch.cat(heads)
    rows, n = product.detach().reshape(groups, -1), 2 ** (n_bits - 1)
    if centred:
        image = torch.where(rows >= rows.mean(1, keepdim=True), 1.0, -1.0) * rows.abs().mean(1, keepdim=True)
    else:
        s = 2 * rows.abs().mean(1, keepdim=True)
        u = (rows / s).clip(-1, 1 - 1e-6)
        image = s * ((u * n - 0.5).round() + 0.5) / n
    return product, image.view_as(product)


def args_of(method, n_bits, groups, reach=None):
    return ProductArgs(groups, levels_of(Method(method), n_bits, True), method == "bwn", reach)


CASES = [("statsq", 2, HEADS * WIDTH), ("statsq", 4, HEADS), ("statsq", 3, 1), ("bwn", 1, HEADS * WIDTH)]


@pytest.mark.parametrize(("method", "n_bits", "groups"), CASES)
def test_keys_are_those_of_the_quantized_product_and_values_those_of_the_v_rows(method, n_bits, groups):
    weight, bias = fused()
    _, image = written_out(weight.double(), n_bits, groups, method == "bwn")
    keys, values = qk_linear(inputs(), weight, bias, HEADS, args_of(method, n_bits, groups))
    x, v = inputs().double(), weight[2 * HEADS * ROWS :].double()
    torch.testing.assert_close(keys, (x @ image.T).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, (x @ v.T + bias[2 * HEADS * ROWS :]).float(), rtol=1e-4, atol=1e-4)


def test_scores_with_the_float_product_are_those_of_queries_and_keys_without_biases():
    weight, _ = fused()
    x = inputs().double()
    q, k, _ = (x @ weight.double().T).unflatten(-1, (3, HEADS, ROWS)).permute(2, 0, 3, 1, 4)
    product = qk_product(weight, HEADS).double().view(HEADS, WIDTH, WIDTH)
    found = x.unsqueeze(1) @ product @ x.unsqueeze(1).transpose(-2, -1)
    torch.testing.assert_close(found, q @ k.transpose(-2, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "n_bits", "groups"), CASES)
def test_gradients_are_those_of_the_identity_around_rounding(method, n_bits, groups):
    weight, bias = fused()
    reach = args_of(method, n_bits, groups)
    grad_keys, grad_values = torch.randn(2, 5, HEADS * WIDTH), torch.randn(2, 5, HEADS * ROWS)
    own = [t.clone().requires_grad_() for t in (inputs(), weight, bias)]
    keys, values = qk_linear(*own, HEADS, reach)
    ((keys * grad_keys).sum() + (values * grad_values).sum()).backward()
    x, w, b = (t.double().requires_grad_() for t in (inputs(), weight, bias))
    product, image = written_out(w, n_bits, groups, method == "bwn")
    through = product + (image - product).detach()
    first = 2 * HEADS * ROWS
    loss = (x @ through.T * grad_keys).sum() + (F.linear(x, w[first:], b[first:]) * grad_values).sum()
    loss.backward()
    for mine, wanted in zip(own, (x, w, b), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad.float(), rtol=1e-4, atol=1e-4)
    assert own[2].grad[:first].abs().max() == 0  # biases of q and k have no part
    assert own[1].grad[:first].abs().min() > 0


def test_annealing_lets_the_gradient_of_entries_near_a_boundary_alone_reach_the_factors():
    """Written out: z = u n - 1/2 of OFQ's formula; an entry counts where z is within 0.1 of a half integer between codes."""
    weight, bias = fused()
    grad = torch.randn(2, 5, HEADS * WIDTH)
    own = weight.clone().requires_grad_()
    keys, _ = qk_linear(inputs(), own, bias, HEADS, args_of("statsq", 2, HEADS * WIDTH, reach=0.1))
    (keys * grad).sum().backward()
    w = weight.double().requires_grad_()
    product, _ = written_out(w, 2, HEADS * WIDTH)
    z = (product / (2 * product.abs().mean(1, keepdim=True)) * 2 - 0.5).detach()
    near = torch.stack([(z - i - 0.5).abs() for i in (-2, -1, 0)]).amin(0) <= 0.1
    assert 0.05 < near.double().mean() < 0.5
    (inputs().double() @ torch.where(near, product, product.detach()).T * grad).sum().backward()
    torch.testing.assert_close(own.grad, w.grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_exact_arithmetic_whatever_the_number_of_threads(dtype):
    """The product is a float64 sum, so its float32 value, and with it a code, does not depend on how the sum is split."""
    weight = fused()[0].to(dtype)
    args, threads = args_of("statsq", 4, HEADS * WIDTH), torch.get_num_threads()
    rows, image = written_out(weight.double(), 4, HEADS * WIDTH)
    codes, scale, _ = quantize_product(qk_product(weight, HEADS), args)
    torch.testing.assert_close((codes + 0.5) * scale.unsqueeze(1), image.float(), rtol=1e-6, atol=1e-7)
    torch.set_num_threads(2)
    try:
        again, same, _ = quantize_product(qk_product(weight, HEADS), args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes, again)
    assert torch.equal(scale, same)
    assert torch.equal(qk_product(weight, HEADS), rows.float())


def test_what_backward_keeps_is_the_input_and_the_weight_alone():
    weight, bias = (t.requires_grad_() for t in fused())
    x, kept = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        qk_linear(x, weight, bias, HEADS, args_of("statsq", 2, HEADS))
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
    assert all(t.shape in (x.shape, weight.shape) for t in kept)
