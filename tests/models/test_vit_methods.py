"""A ViT as OFQ and BiT quantize it: scales a token, biases, one bit; logits against quantizers written out."""

import pytest
import timm
import torch
import torch.nn.functional as F

from dsquant.config import QuantConfig
from dsquant.errors import ConfigError
from dsquant.models import insert_sites
from dsquant.quant.calibrate import calibrate
from dsquant.quant.state import QuantState

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
TOKENS = 17
ENDS = [
    {"match": m, "n_bits": 8, "method": "lsq", "granularity": "per_tensor", "bias": "none"}
    for m in ("patch_embed.*", "head*")
]
OFQ = {"weight": {"n_bits": 2, "method": "statsq", "granularity": "per_channel"},
       "activation": {"n_bits": 2, "granularity": "per_token", "bias": "around"}}  # fmt: skip
BIT = {"weight": {"n_bits": 1, "method": "bwn"}, "activation": {"n_bits": 1, "method": "elastic", "bias": "before"}}


def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def quantized(quant, init="lsq"):
    """Return a small ViT with calibrated sites, its state; biases are made to differ from 0."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    for p in model.parameters():
        torch.nn.init.trunc_normal_(p, mean=1.0 if p.dim() == 1 and p.mean() == 1 else 0.0, std=0.1)
    sites = insert_sites(model, QuantConfig.model_validate({**quant, "rules": ENDS}).policy())
    state = QuantState(sites.weights, sites.activations)
    with torch.no_grad():
        calibrate(sites.quantizers, state, model.eval(), [images()], 1, lambda: sites.bind(state), init=init)
    for key, entry in state.entries.items():
        if key.endswith((":before", ":after")):
            state.values[entry.slice] = 0.1 * torch.randn(entry.numel)
    return model.train(), sites, state


def written_out(model, state, x, quantize):
    """Run a bound small ViT with `quantize(name, x, signed)` at each site of its blocks; ends are 8-bit LSQ."""

    def bias(name, role):
        found = state.get(name, role)
        return 0.0 if found is None else found

    def linear(module, name, x, signed=True):
        x = quantize(f"{name}.input", x + bias(f"{name}.input", "before"), signed)
        return F.linear(x + bias(f"{name}.input", "after"), module.weight, module.bias)

    def eight(name, x):
        s = state.get(name)
        return (x / s).clamp(-128, 127).round() * s

    conv = model.patch_embed.proj
    x = F.conv2d(eight("patch_embed.proj.input", x), conv.weight, conv.bias, 4)
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        name, (b, n, c) = f"blocks.{i}", x.shape
        qkv = linear(block.attn.qkv, f"{name}.attn.qkv", block.norm1(x))
        heads = [t.reshape(b, n, 2, 16).transpose(1, 2) for t in qkv.split(c, dim=-1)]
        q, k, v = (quantize(f"{name}.attn.{part}", t, True) for part, t in zip("qkv", heads, strict=True))
        p = quantize(f"{name}.attn.probs", (q @ k.transpose(-2, -1) / 4).softmax(-1), False)
        x = x + linear(block.attn.proj, f"{name}.attn.proj", (p @ v).transpose(1, 2).reshape(b, n, c))
        h = F.gelu(linear(block.mlp.fc1, f"{name}.mlp.fc1", block.norm2(x)))
        x = x + linear(block.mlp.fc2, f"{name}.mlp.fc2", h, False)
    return F.linear(eight("head.input", model.norm(x)[:, 0]), model.head.weight, model.head.bias)


def test_logits_with_a_scale_a_token_and_biases_around_are_those_of_quantizers_written_out():
    model, _, state = quantized(OFQ)

    def quantize(name, x, signed):
        s, low, high = state.get(name).view(TOKENS, 1), *((-2, 1) if signed else (0, 3))
        o = state.get(name, "offset").view(TOKENS, 1) if name.endswith("fc2.input") else 0.0
        return ((x - o) / s).clamp(low, high).round() * s + o

    with torch.no_grad():
        found = model(images())
        torch.testing.assert_close(found, written_out(model, state, images(), quantize), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.05


def test_logits_of_one_bit_after_a_bias_are_those_of_sign_and_step_written_out():
    model, _, state = quantized(BIT)

    def quantize(name, x, signed):
        s = state.get(name)
        if signed:
            return torch.where(x >= 0, s / 2, -s / 2)
        o = state.get(name, "offset") if name.endswith("fc2.input") else 0.0
        return torch.where((x - o) / s > 0.5, s, 0.0) + o

    with torch.no_grad():
        found = model(images())
        torch.testing.assert_close(found, written_out(model, state, images(), quantize), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.05


@pytest.mark.parametrize("quant", [OFQ, BIT], ids=["ofq", "bit"])
def test_every_scale_offset_bias_and_parameter_gets_a_gradient(quant):
    model, _, state = quantized(quant)
    (model(images()).square().sum() + model.forward_features(images()).square().sum()).backward()  # all tokens count
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    for key, entry in state.entries.items():
        if entry.start < state.n_activation:
            grad = state.grads[entry.slice]
            assert bool(grad.isfinite().all()), key
            assert (grad != 0).float().mean() > 0.5, key


def test_sites_of_ofq_have_a_scale_a_token_and_biases_at_linear_layers_alone():
    _, sites, state = quantized(OFQ)
    groups = {site.name: site.n_groups for site in sites.activations}
    assert {n for name, n in groups.items() if name.startswith("blocks")} == {TOKENS}
    assert groups["head.input"] == groups["patch_embed.proj.input"] == 1
    biased = {key.split(":")[0] for key in state.entries if key.endswith(":before")}
    assert biased == {name for name in groups if name.startswith("blocks") and name.endswith(".input")}
    assert state.get("blocks.0.mlp.fc2.input", "after").numel() == 128
    assert sites.quantizers["blocks.0.attn.qkv.input"].grad_scale == pytest.approx(32**-0.5)  # 1 / sqrt(C * qmax)
    assert sites.quantizers["blocks.0.attn.probs"].grad_scale == pytest.approx((2 * TOKENS * 3) ** -0.5)


def test_an_image_of_another_size_is_refused_at_the_first_site_with_a_scale_a_token():
    model, _, _ = quantized(OFQ)
    model.patch_embed.strict_img_size = False
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 26, 32))
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.qkv\.input has a scale for each of 17 tokens and got 26"):
        model(torch.randn(1, 3, 20, 20))


@pytest.mark.parametrize(
    ("activation", "said"),
    [
        ({"n_bits": 2, "granularity": "per_token"}, r"patch_embed\.proj\.input has no per_token quantizer"),
        ({"n_bits": 1, "method": "elastic", "granularity": "per_head"}, r"patch_embed\.proj\.input has no per_head"),
    ],
)
def test_a_granularity_that_a_site_does_not_have_is_refused_by_name(activation, said):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    quant = QuantConfig.model_validate({"weight": {"n_bits": 2}, "activation": activation})
    with pytest.raises(ConfigError, match=said):
        insert_sites(model, quant.policy())
