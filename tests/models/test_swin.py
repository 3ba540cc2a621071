"""Swin and SwinV2: where their sites are, that insertion changes nothing else, and what is refused."""

import math

import pytest
import timm
import torch

from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import ConfigError
from dsquant.models import build_model, describe, insert_sites
from dsquant.quant.calibrate import calibrate
from dsquant.quant.state import QuantState
from dsquant.spec import Grouping

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SMALL = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
CLASSES = 5
MERGING = {"match": "*.downsample.reduction.*", "n_bits": 8}
EIGHT = ({"match": "patch_embed.*", "n_bits": 8}, {"match": "head*", "n_bits": 8}, MERGING)
BLOCKS = [f"layers.{i}.blocks.{j}" for i in range(2) for j in range(2)]
SIGNED = ("attn.qkv.input", "attn.q", "attn.k", "attn.v", "attn.proj.input", "mlp.fc1.input")


def small_swin(name, seed=0, **kwargs):
    """Build a Swin of two stages, each of a plain and, where the map is larger than a window, a shifted block."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, **{**SMALL, **kwargs})
    for key, p in model.named_parameters():  # a trained model's norms are no zeros (SwinV2), its biases neither
        mean = {"norm": 1.0, "logit_scale": 2.0}.get(next((k for k in ("norm", "logit_scale") if k in key), ""), 0.0)
        torch.nn.init.trunc_normal_(p, mean=0.0 if key.endswith("bias") else mean, std=0.15)
    return model


def config(*rules, n_bits=2):
    return QuantConfig(weight={"n_bits": n_bits}, activation={"n_bits": n_bits}, rules=[*EIGHT, *rules])


def images(count=4, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def bound(name, *rules, size=16):
    """Return a calibrated model in training mode, its sites and their state."""
    model = small_swin(name, img_size=size)
    sites = insert_sites(model, config(*rules).policy())
    state = QuantState(sites.weights, sites.activations)
    with torch.no_grad():
        calibrate(sites.quantizers, state, model.eval(), [images(4, size)], 2, lambda: sites.bind(state))
    return model.train(), sites, state


@pytest.mark.parametrize("name", [V1, V2])
def test_each_site_has_the_sign_offset_and_bits_of_the_method_table(name):
    sites = insert_sites(small_swin(name), config().policy())
    found = {s.name: (s.spec.n_bits, s.spec.signed, s.spec.offset) for s in sites.activations}
    expected = {f"{layer}.input": (8, True, False) for layer in ("patch_embed.proj", "layers.1.downsample.reduction")}
    expected |= {"head.fc.input": (8, True, False)}
    for block in BLOCKS:
        expected |= {f"{block}.{site}": (2, True, False) for site in SIGNED}
        expected |= {f"{block}.attn.probs": (2, False, False), f"{block}.mlp.fc2.input": (2, False, True)}
    assert found == expected
    linears = [f"{block}.{part}" for block in BLOCKS for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    bits = {s.name: s.spec.n_bits for s in sites.weights}
    expected = {f"{linear}.weight": 2 for linear in linears}
    expected |= {f"{x}.weight": 8 for x in ("patch_embed.proj", "layers.1.downsample.reduction", "head.fc")}
    assert bits == expected
    groupings = {s.name: s.grouping for s in sites.weights}
    assert groupings["layers.1.blocks.0.attn.qkv.weight"] == Grouping(3, 32 * 32)


@pytest.mark.parametrize(
    "name",
    [V1, "swin_small_patch4_window7_224", "swin_base_patch4_window12_384", "swin_large_patch4_window7_224",
     "swin_s3_tiny_224", V2, "swinv2_base_window12to24_192to384", "swinv2_large_window12_192"],
)  # fmt: skip
def test_published_sizes_have_six_weight_and_eight_activation_quantizers_a_block(name):
    """Swin-T: the method's 77 and 98, and the inputs of three mergings that the authors left in float."""
    with torch.device("meta"):
        model = timm.create_model(name)
    before = list(model.state_dict())
    sites = insert_sites(model, config().policy())
    blocks = sum(len(layer.blocks) for layer in model.layers)
    assert sum(s.grouping.n_groups for s in sites.weights) == 6 * blocks + 5
    assert len(sites.activations) == 8 * blocks + 5
    assert list(model.state_dict()) == before
    if name == V1:
        assert (6 * blocks + 5, 8 * blocks + 5) == (77, 98 + 3)


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [({}, 16), ({"window_size": 3}, 16), ({"img_size": (16, 24)}, (16, 24)), ({"always_partition": True}, 16),
     ({"strict_img_size": False}, 24), ({"qkv_bias": False}, 16)],
    ids=["plain", "padded", "oblong", "always shifted", "another size", "no qkv bias"],
)  # fmt: skip
@pytest.mark.parametrize("name", [V1, V2])
def test_unbound_and_observed_models_compute_as_timms(name, kwargs, size):
    model = small_swin(name, **kwargs).eval()
    x = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    with torch.no_grad():
        expected = model(x)
        sites = insert_sites(model, config().policy())
        assert torch.equal(model(x), expected)
        seen = []
        for site, quantizer in sites.quantizers.items():
            quantizer.observer = lambda x, site=site: seen.append(site)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == list(sites.quantizers)  # each once, in the order of the model


@pytest.mark.parametrize("name", [V1, V2])
def test_insertion_renames_nothing_keeps_buffers_and_upstream_weights_load_strictly(name, tmp_path):
    upstream = small_swin(name, seed=3)
    path = str(tmp_path / "float.pt")
    torch.save({"model": upstream.state_dict()}, path)
    kwargs = {**SMALL, "depths": [2, 2], "num_heads": [2, 4]}
    model = build_model(ModelConfig(name=name, num_classes=CLASSES, kwargs=kwargs, checkpoint=path))
    insert_sites(model, config().policy())
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in upstream.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), upstream.buffers(), strict=True))
    assert [k for k, _ in model.named_buffers()] == [k for k, _ in upstream.named_buffers()]
    assert "layers.0.blocks.1.attn.relative_position_index" in dict(model.named_buffers())
    assert "layers.0.blocks.1.attn_mask" in dict(model.named_buffers())
    later = small_swin(name, seed=4).state_dict()
    model.load_state_dict(later, strict=True)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in later.items())


@pytest.mark.parametrize("name", [V1, V2])
def test_once_bound_every_parameter_and_every_activation_scale_gets_a_gradient(name):
    model, _, state = bound(name)
    model(images()).square().sum().backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    grads = {key: state.grads[e.slice] for key, e in state.entries.items() if e.start < state.n_activation}
    assert len(grads) == 8 * len(BLOCKS) + 3 + len(BLOCKS)  # sites, and the offsets of the GELUs
    assert not [key for key, grad in grads.items() if not bool((grad.abs() > 0).all() and grad.isfinite().all())]


HEADS = [{"match": f"*.attn.{part}", "granularity": "per_head"} for part in ("q", "k", "v", "probs")]


@pytest.mark.parametrize("name", [V1, V2])
def test_per_head_scales_are_as_many_as_a_stage_has_heads_and_get_a_gradient_each(name):
    rules = [*HEADS, {"match": "*.attn.proj.*", "granularity": "per_head"}]
    model, sites, state = bound(name, *rules, {"match": "*.qkv.weight", "granularity": "per_head"})
    model(images()).square().sum().backward()
    groups = {s.name: s.n_groups for s in sites.activations}
    assert [groups[f"{block}.attn.probs"] for block in BLOCKS] == [2, 2, 4, 4]
    assert [groups[f"{block}.attn.proj.input"] for block in BLOCKS] == [2, 2, 4, 4]
    weights = {s.name: s.grouping for s in sites.weights}
    assert weights["layers.1.blocks.0.attn.qkv.weight"] == Grouping(12, 8 * 32)
    assert weights["layers.1.blocks.0.attn.proj.weight"] == Grouping(4, 8)
    assert bool((state.grads[: state.n_activation].abs() > 0).all())


def test_per_token_scales_are_as_many_as_a_window_has_tokens_and_a_merging_has_none():
    token = {"granularity": "per_token"}
    sites = insert_sites(small_swin(V1), config({"match": "*.attn.*.input", **token}).policy())
    assert {q.site.n_groups for name, q in sites.quantizers.items() if ".attn." in name and "input" in name} == {16}
    model, _, state = bound(V1, {"match": "*.attn.*.input", **token}, {"match": "*.mlp.fc1.input", **token})
    model(images()).square().sum().backward()
    assert state.grads[: state.n_activation].isfinite().all()
    with pytest.raises(ConfigError, match=r"layers\.1\.downsample\.reduction\.input has no per_token"):
        insert_sites(small_swin(V1), config({"match": "*.reduction.input", **token}).policy())


@pytest.mark.parametrize("name", [V1, V2])
def test_the_gradient_factor_counts_the_elements_of_an_image_over_all_its_windows(name):
    sites = insert_sites(small_swin(name, window_size=3), config().policy())
    tokens = 9 * 9  # 8 x 8, padded to whole windows
    numel = {
        "layers.0.blocks.1.attn.qkv.input": tokens * 16,
        "layers.0.blocks.1.attn.probs": 2 * tokens * 9,
        "layers.0.blocks.1.mlp.fc2.input": 64 * 64,
        "layers.1.downsample.reduction.input": 16 * 64,
        "patch_embed.proj.input": 3 * 16 * 16,
        "head.fc.input": 32,
    }
    for site, n in numel.items():
        quantizer = sites.quantizers[site]
        assert quantizer.grad_scale == pytest.approx(1 / math.sqrt(n * quantizer.site.spec.qmax)), site


def test_the_table_of_sites_names_each_with_its_bits_codes_and_groups():
    model = small_swin(V1)
    insert_sites(model, config().policy())
    lines = describe(model).splitlines()
    assert len(lines) == 1 + 4 * 4 + 3 + 8 * 4 + 3
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["layers.0.blocks.1.attn.qkv.weight"][:6] == ["lsq", "2", "-2..1", "-2..1", "per_tensor", "3"]
    assert rows["layers.1.downsample.reduction.input"][:3] == ["lsq", "8", "-128..127"]


@pytest.mark.parametrize("name", [V1, V2])
def test_attention_dropout_is_refused_and_the_model_left_as_it_was(name):
    model = small_swin(name, attn_drop_rate=0.1)
    with pytest.raises(ConfigError, match="attn_drop_rate must be 0"):
        insert_sites(model, config().policy())
    assert not any(type(module).__module__.startswith("dsquant") for module in model.modules())


def test_another_kind_of_block_is_refused_by_name():
    model = small_swin(V1)
    model.layers[1].blocks[0].mlp = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"layers\.1\.blocks\.0 is not a plain Swin block"):
        insert_sites(model, config().policy())
