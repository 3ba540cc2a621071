"""Attention with the product of q and k weights quantized (QKR): each family against it written out, and what is refused."""

import pytest
import torch

from dsquant import describe
from dsquant.analysis.variants import at_bits, post_training
from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import ConfigError
from dsquant.models import build_model, insert_sites
from dsquant.quant.calibrate import calibrate
from dsquant.quant.state import QuantState

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SRET = {"img_size": 64, "head_dim": 8, "depths": [4, 2], "recursions": [2, 1], "heads": [2, 4], "slices": [4, 1],
        "groups": [2, 1], "drop_path_rate": 0.0}  # fmt: skip
SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "drop_path_rate": 0.0}  # fmt: skip
OFQ = {"n_bits": 3, "granularity": "per_token", "bias": "around"}
FAMILIES = {  # kwargs, activation, what no per_token scale serves
    "vit_tiny_patch16_224": (VIT, OFQ, []),
    "swin_tiny_patch4_window7_224": (SWIN, OFQ, ["*.downsample.*"]),
    "sret_tiny": (SRET, {"n_bits": 3}, ["pools.*"]),
}
PLAIN = {"n_bits": 8, "method": "lsq", "granularity": "per_tensor", "bias": "none"}
STATSQ = {"n_bits": 2, "method": "statsq", "granularity": "per_channel"}


def quant_config(activation, eight=(), weight=STATSQ, rules=()):
    ends = [{"match": match, **PLAIN} for match in ("patch_embed.*", "head*", *eight)]
    tree = {"qk_reparam": True, "weight": weight, "activation": activation, "rules": [*ends, *rules]}
    return QuantConfig.model_validate(tree)


def float_model(name, kwargs):
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, num_classes=5, kwargs=kwargs))
    for key, p in model.named_parameters():
        if p.dim() > 1 or (key.endswith("bias") and "coefficient" not in key):
            torch.nn.init.normal_(p, std=0.2)
    return model


def quantized(name, **options):
    """Return a model with calibrated sites, its sites and state; biases around quantizers are made to differ from 0."""
    kwargs, activation, eight = FAMILIES[name]
    model = float_model(name, kwargs)
    sites = insert_sites(model, quant_config(activation, eight, **options).policy())
    state = QuantState(sites.weights, sites.activations)
    with torch.no_grad():
        calibrate(sites.quantizers, state, model.eval(), [images(kwargs)], 1, lambda: sites.bind(state))
    for key, entry in state.entries.items():
        if key.endswith((":before", ":after")):
            state.values[entry.slice] = 0.1 * torch.randn(entry.numel)
    return model, sites, state


def images(kwargs):
    return torch.randn(4, 3, kwargs["img_size"], kwargs["img_size"], generator=torch.Generator().manual_seed(1))


def w_qk(weight, heads, n_bits=2):
    """Return OFQ's image of the products, (H, C, C): s (round(u n - 1/2) + 1/2) / n with u = w / s, s = 2 mean|w| a row."""
    q, k, _ = weight.double().view(3, heads, -1, weight.shape[1])
    product, n = (q.transpose(1, 2) @ k).float(), 2 ** (n_bits - 1)
    s = 2 * product.double().abs().mean(-1, keepdim=True).float()
    return s * (((product / s).clip(-1, 1 - 1e-6) * n - 0.5).round() + 0.5) / n


class WrittenOut:
    """Compute an attention's output from its own input, its parameters and the values of its sites."""

    def __init__(self, name, module, sites, state):
        self.name, self.module, self.sites, self.state = name, module, sites, state

    def quantize(self, part, x):
        site = self.sites.quantizers[f"{self.name}.{part}"].site
        s = self.state.get(site.name).view(-1, 1)
        return (x / s).clip(site.spec.qmin, site.spec.qmax).round() * s

    def entering(self, part, x):
        before, after = (self.state.get(f"{self.name}.{part}", role) for role in ("before", "after"))
        x = x if before is None else x + before
        return self.quantize(part, x) + (0.0 if after is None else after)

    def output(self, x, bias=None, mask=None, groups=1):
        m, heads = self.module, self.module.num_heads
        shape, x = x.shape, self.entering("qkv.input", x)
        x = x.view(-1, x.shape[1] // groups, x.shape[2])
        keys = self.quantize("qk", torch.einsum("hac,bjc->bhja", w_qk(m.qkv.weight, heads), x))
        scores = torch.einsum("bia,bhja->bhij", x, keys) * m.scale
        scores = scores if bias is None else scores + bias
        if mask is not None:
            scores = (scores.view(-1, len(mask), *scores.shape[1:]) + mask[:, None]).view(scores.shape)
        first = 2 * m.qkv.out_features // 3
        v = (x @ m.qkv.weight[first:].T + m.qkv.bias[first:]).unflatten(-1, (heads, -1)).transpose(1, 2)
        out = self.quantize("probs", scores.softmax(-1)) @ self.quantize("v", v)
        out = self.entering("proj.input", out.transpose(1, 2).reshape(shape[0], shape[1], -1))
        return out @ m.proj.weight.T + m.proj.bias


def arguments(name, module, inputs):
    """Return x as an attention sees it, what else takes part, and which tokens its output belongs to."""
    x, *rest = inputs
    if name == "swin_tiny_patch4_window7_224":
        return x, {"bias": module._get_rel_pos_bias(), "mask": rest[0] if rest else None}, None
    if name == "sret_tiny":
        groups = module.groups[min(rest[0], 1)]
        order = module.order(x.shape[1], x.device) if rest[0] and groups > 1 else torch.arange(x.shape[1])
        return x[:, order], {"groups": groups}, order
    return x, {}, None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_gives_what_the_formulas_give_for_its_input(name):
    model, sites, state = quantized(name)
    calls, found = [], 0
    for path, module in model.named_modules():
        if path.endswith(".attn"):
            keep = lambda m, given, kwargs, out, path=path: calls.append((path, m, [*given, *kwargs.values()], out))  # noqa: E731
            module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(images(FAMILIES[name][0]))
        for path, module, inputs, out in calls:
            x, more, order = arguments(name, module, inputs)
            wanted = WrittenOut(path, module, sites, state).output(x, **more)
            out = out if order is None else out[:, order]
            odd = ((out - wanted).abs() > 1e-3 * out.std() + 1e-4).float().mean()
            assert odd < 0.01, path  # a code on an edge of rounding may fall either way
            assert out.std() > 0.01, path
            found += 1
    assert found == {"vit_tiny_patch16_224": 2, "swin_tiny_patch4_window7_224": 4, "sret_tiny": 6}[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient_and_biases_of_q_and_k_get_zeros(name):
    model, _, state = quantized(name)
    model.train()(images(FAMILIES[name][0])).square().sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    for path, module in model.named_modules():
        if path.endswith(".attn"):
            weights, biases = module.qkv.weight.grad.chunk(3), module.qkv.bias.grad.chunk(3)
            assert all(part.abs().sum() > 0 for part in weights), path
            assert [bool(part.any()) for part in biases] == [False, False, True], path
            assert state.grads[state.entries[f"{path}.qk:scale"].slice].any(), path


def test_the_biases_of_q_and_k_have_no_part_in_the_logits():
    model, _, _ = quantized("vit_tiny_patch16_224")
    with torch.no_grad():
        before = model(images(VIT))
        model.blocks[0].attn.qkv.bias[:64] += 1.0
        assert torch.equal(model(images(VIT)), before)
        model.blocks[0].attn.qkv.bias[64:] += 1.0
        assert not torch.equal(model(images(VIT)), before)


def test_the_sites_are_the_product_and_the_v_rows_in_place_of_q_and_k():
    model, sites, _ = quantized("vit_tiny_patch16_224", rules=[{"match": "blocks.1.attn.qk.weight", "n_bits": 4}])
    weights, fused = {site.name: site for site in sites.weights}, "blocks.0.attn.qkv.weight"
    assert (weights[fused].rows, weights[fused].shape, weights[fused].grouping.n_groups) == ((64, 96), (32, 32), 32)
    assert sites.products[fused].shape == (64, 32)
    assert [site.spec.n_bits for site in sites.products.values()] == [2, 4]
    attention = [name.removeprefix("blocks.0.attn.") for name in sites.quantizers if name.startswith("blocks.0.attn.")]
    assert attention == ["qkv.input", "qk", "v", "probs", "proj.input"]
    assert sites.quantizers["blocks.0.attn.qk"].grad_scale == pytest.approx(
        (2 * 32 * 3) ** -0.5
    )  # H C elements a token
    lines = describe(model).splitlines()
    assert any(line.startswith("blocks.0.attn.qkv.weight[64:96] ") for line in lines)
    assert any(line.split()[:3] == ["blocks.1.attn.qk.weight", "statsq", "4"] for line in lines)


REFUSED = {
    "whose scale is learned": ("vit_tiny_patch16_224", VIT, {"weight": {"n_bits": 2}}),
    "leaves blocks.0.attn.qk.weight in float": (
        "vit_tiny_patch16_224", VIT, {"rules": [{"match": "*.qk.weight", "quantize": False}]},
    ),
    "leaves blocks.0.attn.qkv.weight in float": (
        "vit_tiny_patch16_224", VIT, {"rules": [{"match": "*.qkv.weight", "quantize": False}]},
    ),
    "quant rule '*.attn.q' matches no site": ("vit_tiny_patch16_224", VIT, {"rules": [{"match": "*.attn.q", "n_bits": 4}]}),
    "blocks.0 normalizes q and k": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}, {}),
    "SwinV2 attends by cosine": ("swinv2_tiny_window8_256", SWIN, {}),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_no_product_to_quantize_is_refused_with_its_reason(said):
    name, kwargs, options = REFUSED[said]
    model = build_model(ModelConfig(name=name, num_classes=5, kwargs=kwargs))
    with pytest.raises(ConfigError) as caught:
        insert_sites(model, quant_config({"n_bits": 2}, **options).policy())
    assert said in str(caught.value)


def test_a_bert_whose_q_k_and_v_are_three_layers_is_refused():
    kwargs = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
              "attention_probs_dropout_prob": 0.0}  # fmt: skip
    config = ModelConfig(library="transformers", name="bert", num_classes=2, max_length=8, kwargs=kwargs)
    quant = QuantConfig.model_validate({"qk_reparam": True, "weight": STATSQ, "activation": {"n_bits": 2}, "rules": []})
    with pytest.raises(ConfigError, match="q, k and v fused"):
        insert_sites(build_model(config), quant.policy())


def test_analysis_refuses_a_product_that_it_cannot_take_apart():
    class Subject:
        device = torch.device("cpu")

        def build(self):
            return float_model("vit_tiny_patch16_224", VIT)

    policy = at_bits(quant_config({"n_bits": 2}), {"blocks.0.attn.proj.weight": 4})
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.qk\.weight is formed in every forward pass"):
        post_training(Subject(), policy, activations=False)
