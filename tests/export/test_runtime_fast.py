"""The fast path of a packed model: integers in place of images, equal on every backend, and close to the exact path."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dsquant.errors import ConfigError
from dsquant.export import PackedConv2d, PackedLinear, load_packed
from dsquant.ops import backends


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def packed_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (PackedLinear, PackedConv2d))}


def inputs_of(model, images):
    """Return what enters each packed layer when the model runs."""
    seen, hooks = {}, []
    for name, module in packed_layers(model).items():
        hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0])))
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_head"])
def test_fast_logits_are_the_trained_model_s_to_float_rounding(case, path, n_bits, granularity):
    made = case(n_bits, granularity)
    made.write(path)
    logits, expected = load_packed(path, fast=True)(made.images()), made.oracle(made.images())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.01


def test_fast_logits_of_every_method_are_the_trained_model_s_to_float_rounding(method_case, path):
    method_case.write(path)
    logits = load_packed(path, fast=True)(method_case.images())
    torch.testing.assert_close(logits, method_case.oracle(method_case.images()), rtol=1e-4, atol=1e-4)


def test_each_fast_layer_is_at_least_as_near_to_float64_as_the_exact_one(case, path):
    made = case(2, "per_channel")
    made.write(path)
    exact, fast = load_packed(path), load_packed(path, fast=True)
    layers = packed_layers(fast)
    assert len(layers) == 10
    for name, x in inputs_of(exact, made.images()).items():
        module = exact.get_submodule(name)
        if isinstance(module, PackedConv2d):
            continue
        args = module.input_quantizer.args(x)
        codes = torch.clamp(x / args.scale, args.levels.qmin, args.levels.qmax).round()
        if args.offset is not None:
            codes = torch.clamp((x - args.offset) / args.scale, args.levels.qmin, args.levels.qmax).round()
        x_hat = codes.double() * args.scale + (0 if args.offset is None else args.offset.double())
        levels = (module.weight / module.weight_scale[:, None]).round().double()
        oracle = F.linear(x_hat, levels * module.weight_scale.double()[:, None], module.bias.double())
        errors = [(m(x) - oracle).abs().max() for m in (layers[name], module)]
        assert errors[0] <= errors[1] + 1e-7 * oracle.abs().max(), name


def test_fast_logits_are_the_same_bits_on_every_backend(case, path, monkeypatch):
    """One scale for each input: every product is one of integers."""
    made = case(2)
    made.write(path)
    model, found = load_packed(path, fast=True), {}
    for backend in ("torch", *backends.ON_CPU):
        if backends.availability(backend).available:
            monkeypatch.setenv("DSQ_BACKEND", backend)
            found[backend] = model(made.images())
    assert len({logits.numpy().tobytes() for logits in found.values()}) == 1
    monkeypatch.setenv("DSQ_BACKEND", "no such backend")
    with pytest.raises(ConfigError, match="DSQ_BACKEND is 'no such backend'"):
        model(made.images())


def test_a_weight_whose_scales_change_along_its_rows_stays_exact(case, path):
    made = case(2, "per_head")
    made.write(path)
    fast, exact = load_packed(path, fast=True), load_packed(path)
    assert fast.blocks[0].attn.qkv.matrix is not None
    assert fast.blocks[0].attn.proj.matrix is None
    x = torch.randn(2, 17, 32)
    assert torch.equal(fast.blocks[0].attn.proj(x), exact.blocks[0].attn.proj(x))


def test_a_fast_model_holds_packed_codes_and_saves_as_the_exact_one(case, path):
    made = case(2)
    made.write(path)
    exact, fast = load_packed(path), load_packed(path, fast=True)
    assert fast.state_dict().keys() == exact.state_dict().keys()
    for module in packed_layers(fast).values():
        assert module.matrix.words.data_ptr() == module.weight_packed.data_ptr()
        beside = (module.matrix.scale, module.matrix.code_sums)
        assert [t.numel() * t.element_size() for t in beside] == [4 * len(module.weight_packed)] * 2
    with pytest.raises(ConfigError, match=r"cache keeps float images .* choose one"):
        load_packed(path, cache=True, fast=True)


def test_in_bfloat16_scales_of_the_fast_path_are_not_rounded(case, path):
    made = case(3, "per_channel")
    made.write(path)
    fast = load_packed(path, fast=True)
    before = {name: copy.deepcopy(m.matrix) for name, m in packed_layers(fast).items()}
    images = made.images().bfloat16()
    logits = fast.bfloat16()(images)
    assert logits.dtype == torch.bfloat16
    expected = copy.deepcopy(made.oracle).bfloat16()(images)  # rounds its images, and so other codes: not near, alike
    assert F.cosine_similarity(logits.float(), expected.float(), dim=1).min() > 0.98
    for name, module in packed_layers(fast).items():
        assert torch.equal(module.matrix.scale, before[name].scale), name


def test_a_fast_model_moves_whole_to_another_device(case, path):
    case(2).write(path)
    model = load_packed(path, "meta", fast=True)
    assert model(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 5)


def test_a_gradient_with_respect_to_the_images_is_that_of_the_exact_path(case, path):
    made = case(4)
    made.write(path)
    gradients = []
    for fast in (False, True):
        images = made.images().requires_grad_()
        load_packed(path, fast=fast)(images).square().sum().backward()
        gradients.append(images.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
