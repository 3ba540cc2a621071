import math

import pytest
import timm
import torch
from timm.layers import GluMlp

from dsquant.config import QuantConfig
from dsquant.errors import ConfigError
from dsquant.models import insert_sites
from dsquant.quant.state import QuantState
from dsquant.spec import Grouping

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
DEFAULT = QuantConfig(weight={"n_bits": 2}, activation={"n_bits": 2})
TOKENS = 17


def small_vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **kwargs})
    for p in model.parameters():  # timm starts biases at zero and tokens near it; a trained model has neither
        torch.nn.init.trunc_normal_(p, mean=1.0 if p.dim() == 1 and p.mean() == 1 else 0.0, std=0.1)
    return model


def config(*rules, **kwargs):
    return QuantConfig(weight={"n_bits": 2}, activation={"n_bits": 2}, rules=rules, **kwargs)


def images(count=8, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def calibrated(model, sites):
    """Return a state with scale = 2 mean|x| / sqrt(qmax) on each site (a method-table value), offset -0.1."""
    seen = {}
    for name, quantizer in sites.quantizers.items():
        quantizer.observer = lambda x, name=name: seen.__setitem__(name, x.abs().mean())
    with torch.no_grad():
        model(images())
    state = QuantState(sites.weights, sites.activations)
    for name, quantizer in sites.quantizers.items():
        quantizer.observer = None
        state.get(name).fill_(2 * seen[name] / math.sqrt(quantizer.site.spec.qmax))
        if quantizer.site.spec.offset:
            state.get(name, "offset").fill_(-0.1)
    return state


def bound(*rules, seed=0):
    model = small_vit(seed)
    sites = insert_sites(model, (config(*rules) if rules else DEFAULT).policy())
    state = calibrated(model, sites)
    sites.bind(state)
    return model, sites, state


@pytest.fixture(scope="module")
def deit():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    x = images(2, 224)
    with torch.no_grad():
        logits = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites = insert_sites(model, DEFAULT.policy())
    return model, sites, before, x, logits


def test_deit_tiny_has_the_74_weight_and_98_activation_quantizers_of_the_method(deit):
    _, sites, *_ = deit
    assert sum(site.grouping.n_groups for site in sites.weights) == 74
    assert len(sites.activations) == len(sites.quantizers) == 98
    assert all(site.n_groups == 1 for site in sites.activations)


def test_each_site_has_the_sign_offset_and_bits_of_the_method_table(deit):
    _, sites, *_ = deit
    found = {s.name: (s.spec.n_bits, s.spec.signed, s.spec.offset) for s in sites.activations}
    signed, unsigned, with_offset, eight = (2, True, False), (2, False, False), (2, False, True), (8, True, False)
    expected = {"patch_embed.proj.input": eight, "head.input": eight}
    for i in range(12):
        for part in ("attn.qkv.input", "attn.q", "attn.k", "attn.v", "attn.proj.input", "mlp.fc1.input"):
            expected[f"blocks.{i}.{part}"] = signed
        expected[f"blocks.{i}.attn.probs"] = unsigned
        expected[f"blocks.{i}.mlp.fc2.input"] = with_offset
    assert found == expected
    bits = {s.name: s.spec.n_bits for s in sites.weights}
    assert [name for name, n in bits.items() if n == 8] == ["patch_embed.proj.weight", "head.weight"]
    assert set(bits.values()) == {2, 8}


def test_the_gradient_factor_is_that_of_lsq_over_the_elements_of_one_sample(deit):
    _, sites, *_ = deit
    numel = {"patch_embed.proj.input": 3 * 224 * 224, "head.input": 192, "blocks.0.attn.probs": 3 * 197 * 197,
             "blocks.0.attn.qkv.input": 197 * 192, "blocks.0.attn.k": 197 * 192, "blocks.0.mlp.fc2.input": 197 * 768}  # fmt: skip
    for name, n in numel.items():
        quantizer = sites.quantizers[name]
        assert quantizer.grad_scale == pytest.approx(1 / math.sqrt(n * quantizer.site.spec.qmax)), name
    unscaled = insert_sites(small_vit(), DEFAULT.policy(), "none")
    assert {q.grad_scale for q in unscaled.quantizers.values()} == {1.0}


def test_insertion_renames_nothing_and_float_weights_load_strictly(deit):
    model, _, before, *_ = deit
    assert list(model.state_dict()) == list(before)
    assert [name for name, _ in model.named_parameters()] == list(before)
    model.load_state_dict(before, strict=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_before_binding_the_logits_are_those_of_the_float_model(deit):
    model, _, _, x, logits = deit
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [{"qk_norm": True}, {"scale_attn_norm": True}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2},
     {"init_values": 0.1}, {"qkv_bias": False}],
    ids=lambda kwargs: next(iter(kwargs)),
)  # fmt: skip
def test_variants_of_the_plain_block_keep_their_float_logits(kwargs):
    model = small_vit(**kwargs).eval()
    with torch.no_grad():
        expected = model(images())
        sites = insert_sites(model, DEFAULT.policy())
        torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
        calibrated(model, sites)
        torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


def test_once_bound_every_parameter_and_every_activation_scale_gets_a_gradient():
    model, _, state = bound()
    model(images()).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    grads = {key: state.grads[e.slice] for key, e in state.entries.items() if e.start < state.n_activation}
    assert len(grads) == 2 * 8 + 2 + 2  # sites and the offsets of two GELUs
    assert not [key for key, grad in grads.items() if not bool((grad.abs() > 0).all() and grad.isfinite().all())]


def reference_logits(model, state, x):
    """Run a bound small ViT with a quantizer written out at each site, on modules of the float model."""

    def quantize(name, x, qmin, qmax, offset=0.0):
        s = state.get(name)
        return ((x - offset) / s).clamp(qmin, qmax).round() * s + offset

    def linear(module, name, x, qmin=-2, qmax=1, offset=0.0):
        return torch.nn.functional.linear(quantize(f"{name}.input", x, qmin, qmax, offset), module.weight, module.bias)

    conv = model.patch_embed.proj
    x = torch.nn.functional.conv2d(quantize("patch_embed.proj.input", x, -128, 127), conv.weight, conv.bias, 4)
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        name, (b, n, c) = f"blocks.{i}", x.shape
        qkv = linear(block.attn.qkv, f"{name}.attn.qkv", block.norm1(x))
        heads = [t.reshape(b, n, 2, 16).transpose(1, 2) for t in qkv.split(c, dim=-1)]
        q, k, v = (quantize(f"{name}.attn.{part}", t, -2, 1) for part, t in zip("qkv", heads, strict=True))
        p = quantize(f"{name}.attn.probs", (q @ k.transpose(-2, -1) / 4).softmax(-1), 0, 3)
        x = x + linear(block.attn.proj, f"{name}.attn.proj", (p @ v).transpose(1, 2).reshape(b, n, c))
        h = torch.nn.functional.gelu(linear(block.mlp.fc1, f"{name}.mlp.fc1", block.norm2(x)))
        x = x + linear(block.mlp.fc2, f"{name}.mlp.fc2", h, 0, 3, state.get(f"{name}.mlp.fc2.input", "offset"))
    return linear(model.head, "head", model.norm(x)[:, 0], -128, 127)


def test_once_bound_the_logits_are_those_of_a_quantizer_written_out_at_each_site():
    model, _, state = bound()
    with torch.no_grad():
        found, expected = model.eval()(images()), reference_logits(model, state, images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_calibration_shows_each_site_what_it_quantizes():
    model = small_vit()
    sites = insert_sites(model, DEFAULT.policy())
    seen = {}
    for name, quantizer in sites.quantizers.items():
        quantizer.observer = lambda x, name=name: seen.__setitem__(name, x)
    with torch.no_grad():
        model(images())
    assert list(seen) == list(sites.quantizers)  # each once, in the order of the model
    attention = model.blocks[0].attn
    qkv = torch.nn.functional.linear(seen["blocks.0.attn.qkv.input"], attention.qkv.weight, attention.qkv.bias)
    for part, expected in zip("qkv", qkv.split(32, dim=-1), strict=True):
        torch.testing.assert_close(seen[f"blocks.0.attn.{part}"].transpose(1, 2).flatten(2), expected)
    torch.testing.assert_close(seen["blocks.0.attn.probs"].sum(-1), torch.ones(8, 2, TOKENS))


def test_q_k_and_v_are_shown_themselves_where_the_probabilities_stay_float():
    model = small_vit()
    sites = insert_sites(model, config({"match": "*.probs", "quantize": False}).policy())
    seen = {}
    for part in "qkv":
        name = f"blocks.0.attn.{part}"
        sites.quantizers[name].observer = lambda x, part=part: seen.__setitem__(part, x)
    with torch.no_grad():
        model(images())
    assert not torch.equal(seen["q"], seen["k"])
    assert not torch.equal(seen["q"], seen["v"])


PER_HEAD = (
    {"match": "*.attn.*", "granularity": "per_head"},
    {"match": "*.qkv.input", "granularity": "per_tensor"},
)


def test_per_head_policies_give_each_head_its_groups():
    sites = insert_sites(small_vit(), config(*PER_HEAD).policy())
    groupings = {site.name: site.grouping for site in sites.weights}
    i = torch.arange(96 * 32)
    row = i // 32
    by_timm = (row // 32) * 2 + (row % 32) // 16  # rows of qkv are (3, heads, head_dim)
    qkv, proj = groupings["blocks.1.attn.qkv.weight"], groupings["blocks.1.attn.proj.weight"]
    assert torch.equal((i // qkv.inner) % qkv.n_groups, by_timm)
    i = torch.arange(32 * 32)
    assert torch.equal((i // proj.inner) % proj.n_groups, (i % 32) // 16)  # columns of proj are (heads, head_dim)
    assert groupings["blocks.1.mlp.fc1.weight"].n_groups == 1
    groups = {site.name: (site.n_groups, site.numel) for site in sites.activations}
    assert groups["blocks.0.attn.q"] == groups["blocks.0.attn.proj.input"] == (2, TOKENS * 16)
    assert groups["blocks.0.attn.probs"] == (2, TOKENS * TOKENS)
    assert groups["blocks.0.attn.qkv.input"] == (1, TOKENS * 32)


def test_a_per_head_scale_acts_on_its_head_only():
    _, sites, state = bound(*PER_HEAD)
    x = {"blocks.0.attn.q": torch.randn(4, 2, TOKENS, 16), "blocks.0.attn.proj.input": torch.randn(4, TOKENS, 32)}
    for name, value in x.items():
        state.get(name).copy_(torch.tensor([0.5, 0.25]))
        found = sites.quantizers[name](value)
        heads = value if name.endswith("q") else value.view(4, TOKENS, 2, 16).transpose(1, 2)
        found = found if name.endswith("q") else found.view(4, TOKENS, 2, 16).transpose(1, 2)
        for head, scale in enumerate((0.5, 0.25)):
            assert torch.equal(found[:, head], (heads[:, head] / scale).clamp(-2, 1).round() * scale)


def test_per_head_scales_get_a_gradient_each():
    model, _, state = bound(*PER_HEAD)
    model(images()).square().sum().backward()
    assert bool((state.grads[: state.n_activation].abs() > 0).all())


def test_per_channel_policies_give_each_output_row_its_group():
    sites = insert_sites(small_vit(), config({"match": "*.weight", "granularity": "per_channel"}).policy())
    groupings = {site.name: (site.grouping, site.shape) for site in sites.weights}
    assert groupings["blocks.0.attn.qkv.weight"] == (Grouping(96, 32), (96, 32))
    assert groupings["blocks.0.mlp.fc2.weight"] == (Grouping(32, 128), (32, 128))
    assert groupings["patch_embed.proj.weight"] == (Grouping(32, 48), (32, 3, 4, 4))


def test_q_k_and_v_have_a_scale_each_in_the_fused_weight():
    sites = insert_sites(small_vit(), DEFAULT.policy())
    groupings = {site.name: site.grouping for site in sites.weights}
    assert groupings["blocks.0.attn.qkv.weight"] == Grouping(3, 32 * 32)
    assert groupings["blocks.0.attn.proj.weight"] == Grouping(1, 32 * 32)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"match": "blocks.*.attn.qkvv.*", "n_bits": 4}, r"'blocks\.\*\.attn\.qkvv\.\*' matches no site"),
        ({"match": "*.attn.k", "granularity": "per_channel"}, r"blocks\.0\.attn\.k has no per_channel"),
        ({"match": "head.input", "granularity": "per_token"}, r"head\.input has no per_token"),
        ({"match": "*.fc1.weight", "granularity": "per_token"}, r"blocks\.0\.mlp\.fc1\.weight is a weight; per_token"),
        ({"match": "*.qkv.input", "granularity": "per_head"}, r"blocks\.0\.attn\.qkv\.input has no per_head"),
        ({"match": "*.fc1.weight", "granularity": "per_head"}, r"blocks\.0\.mlp\.fc1\.weight has no heads"),
        ({"match": "patch_embed.proj.weight", "granularity": "per_head"}, r"patch_embed\.proj\.weight has no heads"),
    ],
)
def test_a_rule_that_fits_no_site_is_an_error_that_names_it(rule, said):
    with pytest.raises(ConfigError, match=said):
        insert_sites(small_vit(), config(rule).policy())


def test_sites_left_in_float_compute_as_the_float_model():
    model = small_vit().eval()
    with torch.no_grad():
        expected = model(images())
        sites = insert_sites(model, config({"match": "*", "quantize": False}).policy())
        assert (sites.weights, sites.activations) == ([], [])
        torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_known_sites_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"ResNet has no quantization sites.*VisionTransformer"):
        insert_sites(timm.create_model("resnet18"), DEFAULT.policy())


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"attn_drop_rate": 0.1}, "attn_drop_rate must be 0"),
        ({"mlp_layer": GluMlp}, "blocks.0 is not a plain ViT block"),
    ],
)
def test_a_variant_whose_sites_are_not_known_is_refused_and_left_as_it_was(kwargs, said):
    model = small_vit(**kwargs)
    with pytest.raises(ConfigError, match=said):
        insert_sites(model, DEFAULT.policy())
    assert not any(type(module).__module__.startswith("dsquant") for module in model.modules())


def test_a_mask_is_refused():
    model, _, _ = bound()
    with pytest.raises(ConfigError, match="takes no mask"):
        model.blocks[0].attn(torch.zeros(1, TOKENS, 32), attn_mask=torch.ones(TOKENS, TOKENS))
