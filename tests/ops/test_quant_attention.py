import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dsquant.ops import backends, gpu
from dsquant.ops.fake_quantize import QuantArgs, fake_quantize
from dsquant.ops.quant_attention import quant_attention
from dsquant.spec import Levels

pytestmark = pytest.mark.usefixtures("each_backend")

B, H, N, D = 3, 2, 7, 4
SOFTMAX_SCALE = D**-0.5
LIMITS = {"q": (-2, 1), "k": (-4, 3), "probs": (0, 3), "v": (-8, 7)}
# which sites are quantized, whether scales differ by head, which sites have an offset
CASES = {
    "all, per tensor": ("q k probs v", False, ""),
    "all, per head": ("q k probs v", True, ""),
    "all, per head, offsets": ("q k probs v", True, "q k probs v"),
    "offset at the probabilities": ("q k probs v", False, "probs"),
    "q and v only": ("q v", False, "v"),
    "k only": ("k", True, ""),
    "probabilities only": ("probs", False, ""),
    "none": ("", False, ""),
}


def case(name, dtype=torch.float32):
    """Return leaves [q, k, v], the gradient of the output, and QuantArgs or None a site, with leaves for scales."""
    torch.manual_seed(0)
    quantized, per_head, offsets = CASES[name]
    qkv = [torch.randn(B, H, N, D).to(dtype).requires_grad_() for _ in range(3)]
    shape, args = ((H, 1, 1) if per_head else (1,)), {}
    for site, (qmin, qmax) in LIMITS.items():
        base = 0.12 if site == "probs" else 2.5 / (qmax + 1)
        scale = (base * (1 + 0.3 * torch.rand(shape))).requires_grad_()
        offset = (0.05 * torch.randn(shape)).requires_grad_() if site in offsets.split() else None
        args[site] = QuantArgs(scale, offset, Levels(qmin, qmax), 0.5) if site in quantized.split() else None
    return qkv, torch.randn(B, H, N, D).to(dtype), args


def leaves(qkv, args):
    return qkv + [t for a in args.values() if a is not None for t in (a.scale, a.offset) if t is not None]


def outcome(attend, qkv, args, grad):
    out = attend(*qkv, SOFTMAX_SCALE, *args.values())
    return [out.detach(), *torch.autograd.grad(out, leaves(qkv, args), grad)]


def attend_by(quantize):
    """Return attention that keeps everything, with `quantize(x, QuantArgs)` at each site that has args."""

    def attend(q, k, v, softmax_scale, *args):
        def site(x, a):
            return x if a is None else quantize(x, a)

        q, k, v = site(q, args[0]), site(k, args[1]), site(v, args[3])
        return site((q @ k.transpose(-2, -1) * softmax_scale).softmax(-1), args[2]) @ v

    return attend


def straight_through(v, qmin, qmax):
    """Round and clip v; its gradient is 1 on [qmin, qmax], both edges included (`clamp`'s own is 0 there in some torch)."""
    inside = (v >= qmin) & (v <= qmax)
    return v.clamp(qmin, qmax).round().detach() + torch.where(inside, v - v.detach(), 0.0)


def by_autograd(x, args):
    """Quantize by plain autograd; the gradient factor is applied to scale and offset by a detached identity."""
    scale, offset = (
        None if t is None else t * args.grad_scale + (t * (1 - args.grad_scale)).detach() for t in args[:2]
    )
    x_hat = straight_through((x if offset is None else x - offset) / scale, args.levels.qmin, args.levels.qmax) * scale
    return x_hat if offset is None else x_hat + offset


def as_double(qkv, args):
    def double(t):
        return None if t is None else t.detach().double().requires_grad_()

    wide = {site: a and QuantArgs(double(a.scale), double(a.offset), *a[2:]) for site, a in args.items()}
    return [double(t) for t in qkv], wide


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_composition_of_its_parts(name):
    qkv, grad, args = case(name)
    fused = outcome(quant_attention, qkv, args, grad)
    composed = outcome(attend_by(lambda x, a: fake_quantize(x, *a)), qkv, args, grad)
    for found, expected in zip(fused, composed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_kernels_run_where_they_are_asked_for_and_nowhere_else(each_backend):
    qkv, grad, args = case("all, per head, offsets")
    with gpu.recorded() as launches:
        outcome(quant_attention, qkv, args, grad)
    own = [
        launch.kernel.__name__
        for launch in launches
        if launch.kernel.fn.__module__.startswith("dsquant.ops.gpu.quant_att")
    ]
    assert own == (["_forward_rows", "_of_window", "_sum_sites"] if each_backend == backends.TRITON else [])


@pytest.mark.parametrize("name", CASES)
def test_it_equals_autograd_in_float64(name):
    qkv, grad, args = case(name)
    fused = outcome(quant_attention, qkv, args, grad)
    expected = outcome(attend_by(by_autograd), *as_double(qkv, args), grad.double())
    for found, wanted in zip(fused, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["all, per head, offsets", "q and v only", "none"])
def test_bfloat16_inputs_are_computed_in_float32_and_cast_at_the_end(name, each_backend):
    if each_backend == backends.TRITON:
        pytest.skip("rounds what enters a product: gpu/test_quant_attention.py bounds its error")
    qkv, grad, args = case(name, torch.bfloat16)
    low = outcome(quant_attention, qkv, args, grad)
    wide_qkv = [t.detach().float().requires_grad_() for t in qkv]
    high = outcome(quant_attention, wide_qkv, args, grad.float())
    assert [t.dtype for t in low[:4]] == [torch.bfloat16] * 4
    for found, expected in zip(low, high, strict=True):
        assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("name", CASES)
def test_q_k_v_and_the_scales_are_saved_and_nothing_of_the_size_of_the_scores(name, each_backend):
    qkv, _, args = case(name)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quant_attention(*qkv, SOFTMAX_SCALE, *args.values())
    check_saved(saved, leaves(qkv, args), qkv[0], each_backend)


def check_saved(saved, given, q, backend):
    """Hold what is saved against the tensors given: on GPUs two values of each row of scores are kept beside."""
    known = {t.data_ptr() for t in given}
    own = [t for t in saved if t.data_ptr() not in known]
    assert len(saved) - len(own) == len(known)
    assert [t.shape for t in own] == ([(2, *q.shape[:3])] if backend == backends.TRITON else [])


@pytest.mark.parametrize("name", ["all, per tensor", "all, per head, offsets"])
def test_the_size_of_blocks_changes_no_result(monkeypatch, name):
    qkv, grad, args = case(name)
    whole = outcome(quant_attention, qkv, args, grad)
    monkeypatch.setattr("dsquant.ops.quant_attention._block_elements", lambda device: 1)
    split = outcome(quant_attention, qkv, args, grad)
    for found, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_probability_on_the_edge_of_its_range_passes_its_gradient():
    """A zero query makes four equal probabilities of 1/4, and a scale of 1/12 puts each exactly on qmax = 3."""
    q, eye = torch.zeros(1, 1, 4, 4, requires_grad=True), torch.eye(4).view(1, 1, 4, 4)
    scale = torch.tensor([0.25 / 3], requires_grad=True)
    assert 0.25 / scale == 3
    out = quant_attention(q, eye, eye, 1.0, None, None, QuantArgs(scale, None, Levels(0, 3)), None)
    out[0, 0, 0, 0].backward()
    assert scale.grad == 0  # inside: round(v) - v; beyond the edge it would be qmax
    assert torch.equal(q.grad[0, 0, 0], 0.25 * (torch.tensor([1.0, 0.0, 0.0, 0.0]) - 0.25))


def test_a_strided_q_k_v_gives_what_a_contiguous_one_gives():
    """As they come out of a fused qkv projection: views of one tensor."""
    torch.manual_seed(1)
    args = case("all, per head")[2]
    fused = torch.randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    strided = [t.detach().requires_grad_() for t in fused.unbind(0)]
    contiguous = [t.detach().contiguous().requires_grad_() for t in strided]
    grad = torch.randn(B, H, N, D)
    for a, b in zip(outcome(quant_attention, strided, args, grad), outcome(quant_attention, contiguous, args, grad),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


WINDOWS = 4  # two images of two windows; a mask of two rows repeats


def scored_case(bias=None, mask=None, head_scale=False, dtype=torch.float32):
    """Return leaves and QuantArgs of four batch rows, and keywords: a softmax scale for each head, a bias, a mask."""
    torch.manual_seed(3)
    _, _, args = case("all, per head, offsets")
    qkv = [torch.randn(WINDOWS, H, N, D).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(WINDOWS, H, N, D).to(dtype)
    scale = (0.3 + torch.rand(H, 1, 1)).requires_grad_() if head_scale else SOFTMAX_SCALE
    extra = {
        "bias": None if bias is None else torch.randn(bias).requires_grad_(),
        "mask": None if mask is None else torch.where(torch.rand(mask) < 0.3, -100.0, 0.0),
    }
    return qkv, grad, args, scale, extra


def scored_outcome(attend, qkv, args, scale, extra, grad):
    out = attend(*qkv, scale, *args.values(), **extra)
    learned = [t for t in (scale, extra["bias"]) if isinstance(t, torch.Tensor)]
    return [out.detach(), *torch.autograd.grad(out, leaves(qkv, args) + learned, grad)]


def attend_with_scores(q, k, v, softmax_scale, q_args, k_args, probs_args, v_args, bias, mask):
    """Add everything to whole scores and leave the gradients to autograd; images outermost, then their windows."""
    q, k, v = by_autograd(q, q_args), by_autograd(k, k_args), by_autograd(v, v_args)
    scores = (q * softmax_scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = (scores.view(-1, len(mask), H, N, N) + mask.double()).view(-1, H, N, N)
    return by_autograd(scores.softmax(-1), probs_args) @ v


SCORED = {
    "bias": {"bias": (H, N, N)},
    "bias with a leading 1": {"bias": (1, H, N, N)},
    "mask of two windows": {"mask": (2, 1, N, N)},
    "mask of keys, one row an image": {"mask": (WINDOWS, 1, 1, N)},
    "mask of all": {"mask": (1, 1, N, N)},
    "bias and mask": {"bias": (H, N, N), "mask": (2, 1, N, N)},
    "a softmax scale each head": {"head_scale": True},
    "all": {"bias": (1, H, N, N), "mask": (2, 1, N, N), "head_scale": True},
}


@pytest.mark.parametrize("name", SCORED)
def test_bias_mask_and_head_scales_equal_autograd_in_float64_in_blocks_of_any_size(monkeypatch, name, each_backend):
    """In one block, row by row and in blocks across images; Triton's kernels have blocks of their own."""
    qkv, grad, args, scale, extra = scored_case(**SCORED[name])
    wide_qkv, wide_args = as_double(qkv, args)
    wide_scale, wide_bias = (
        t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in (scale, extra["bias"])
    )
    wide = {"bias": wide_bias, "mask": extra["mask"]}
    expected = scored_outcome(attend_with_scores, wide_qkv, wide_args, wide_scale, wide, grad.double())
    for elements in (None,) if each_backend == backends.TRITON else (None, 1, 3 * H * N * N):
        if elements is not None:
            monkeypatch.setattr("dsquant.ops.quant_attention._block_elements", lambda device, n=elements: n)
        for found, wanted in zip(scored_outcome(quant_attention, qkv, args, scale, extra, grad), expected, strict=True):
            assert found.shape == wanted.shape
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5)


def test_a_mask_of_minus_infinity_gives_its_keys_neither_probability_nor_gradient():
    qkv, grad, args, scale, _ = scored_case()
    mask = torch.zeros(WINDOWS, 1, 1, N)
    mask[1, ..., 4:] = -torch.inf
    no_offset = {site: a._replace(offset=None) for site, a in args.items()}
    out = quant_attention(*qkv, scale, *no_offset.values(), mask=mask)
    out.backward(grad)
    assert out.isfinite().all()
    for t in qkv[1:]:
        assert not t.grad[1, :, 4:].any()
        assert t.grad[0, :, 4:].any()


def test_no_bias_a_bias_of_zero_and_a_mask_of_zero_are_the_same_to_the_bit(each_backend):
    """Triton's kernels, where nothing is added, turn products to powers of 2 at once: the same to rounding."""
    qkv, grad, args, scale, _ = scored_case()
    plain = outcome(quant_attention, qkv, args, grad)
    nothing = {"bias": torch.zeros(H, N, N, requires_grad=True), "mask": torch.zeros(2, 1, N, N)}
    *found, _ = scored_outcome(quant_attention, qkv, args, scale, nothing, grad)
    digits = {"rtol": 1e-5, "atol": 1e-6} if each_backend == backends.TRITON else {"rtol": 0, "atol": 0}
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, **digits)


def test_a_bfloat16_bias_gets_a_bfloat16_gradient():
    qkv, grad, args, scale, extra = scored_case(**SCORED["all"], dtype=torch.bfloat16)
    with torch.no_grad():
        exact = {**extra, "bias": extra["bias"].bfloat16()}
    low = {**extra, "bias": exact["bias"].clone().requires_grad_()}
    high = {**extra, "bias": exact["bias"].float().requires_grad_()}
    found = scored_outcome(quant_attention, qkv, args, scale, low, grad)
    expected = scored_outcome(quant_attention, qkv, args, scale, high, grad)
    assert found[-1].dtype == torch.bfloat16
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, expected, strict=True))


def test_beside_q_k_v_and_scales_only_what_is_added_is_saved(each_backend):
    qkv, _, args, scale, extra = scored_case(**SCORED["all"])
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quant_attention(*qkv, scale, *args.values(), **extra)
    check_saved(saved, [*leaves(qkv, args), scale, *extra.values()], qkv[0], each_backend)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"bias": torch.zeros(WINDOWS, H, N, N)}, "differs along the batch"),
        ({"mask": torch.zeros(3, 1, N, N)}, "3 rows, which do not divide a batch of 4"),
        ({"mask": torch.ones(N, N, dtype=torch.bool)}, "give floats without a gradient"),
        ({"mask": torch.zeros(N, N, requires_grad=True)}, "or give it as bias"),
    ],
)
def test_a_bias_or_mask_of_another_kind_is_refused(extra, said):
    qkv, _, args, scale, _ = scored_case()
    with pytest.raises(ValueError, match=said):
        quant_attention(*qkv, scale, *args.values(), **extra)


@pytest.mark.parametrize("shared", [False, True], ids=["a row an image", "one for all"])
@pytest.mark.parametrize("name", ["all, per head", "none"])
def test_a_mask_is_added_to_the_scores_of_its_own_image_in_every_block(name, shared, monkeypatch):
    monkeypatch.setattr("dsquant.ops.quant_attention._block_elements", lambda device: 1)
    qkv, grad, args = case(name)
    real = torch.arange(N) < torch.tensor([N, 4, 2])[:, None]
    mask = torch.zeros(B, 1, 1, N).masked_fill(~real[:, None, None, :], torch.finfo(torch.float32).min)
    mask = mask[1:2] if shared else mask

    def reference(q, k, v, softmax_scale, *args):
        def site(x, a):
            return x if a is None else fake_quantize(x, *a)

        scores = site(q, args[0]) @ site(k, args[1]).transpose(-2, -1) * softmax_scale + mask
        return site(scores.softmax(-1), args[2]) @ site(v, args[3])

    found = outcome(lambda *a: quant_attention(*a, mask=mask), qkv, args, grad)
    for one, other in zip(found, outcome(reference, qkv, args, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    padded = ~(real[1:2] if shared else real).expand(B, N)
    d_k, d_v = found[2].transpose(1, 2)[padded], found[3].transpose(1, 2)[padded]
    assert not d_k.any()
    assert not d_v.any()
