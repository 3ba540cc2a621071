"""What a bound Swin or SwinV2 computes: against a forward pass without windows, rolls or masks, packed, and in bfloat16."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsquant.config import ModelConfig
from dsquant.export import load_packed, write_packed
from dsquant.models import insert_sites
from dsquant.models.swin import _unit
from dsquant.quant.calibrate import calibrate
from dsquant.quant.state import QuantState
from tests.export.conftest import DATA, expected_codes, expected_image
from tests.models.test_swin import BLOCKS, CLASSES, HEADS, SMALL, V1, V2, bound, config, images, small_swin


@pytest.mark.parametrize("name", [V1, V2])
def test_the_fused_op_with_fine_scales_computes_as_timms(name):
    """8 bits at v alone: all else passes the op unquantized, windows at the edge padded and shifted."""
    off = ({"match": "*", "quantize": False}, {"match": "*.attn.v", "quantize": True, "n_bits": 8})
    model = small_swin(name, window_size=3).eval()
    with torch.no_grad():
        expected = model(images())
        sites = insert_sites(model, config(*off).policy())
        assert set(sites.quantizers) == {f"{block}.attn.v" for block in BLOCKS}
        state = QuantState(sites.weights, sites.activations)
        calibrate(sites.quantizers, state, model, [images()], 1, lambda: sites.bind(state))
        found = model(images())
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


class Reference:
    """Run a bound Swin of either version with a quantizer written out at each site.

    Attention is over all tokens of an image: a token sees another where both lie in the same window of the shifted grid
    and neither, in either direction, has come round from the other side. Bits are those of `config()`.
    """

    def __init__(self, model, state, version):
        self.model, self.state, self.version = model, state, version

    def quantize(self, name, x, n_bits=2, signed=True):
        s, offset = self.state.get(name), self.state.get(name, "offset")
        if s.numel() > 1:  # per head; the first dimension after the batch
            s = s.view(-1, 1, 1)
        offset = 0.0 if offset is None else offset
        low, high = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
        return ((x - offset) / s).clamp(low, high).round() * s + offset

    def linear(self, name, x, bias=None, **kwargs):
        module = self.model.get_submodule(name)
        return F.linear(
            self.quantize(f"{name}.input", x, **kwargs), module.weight, module.bias if bias is None else bias
        )

    def attend(self, block, x, h, w):
        name, attention = block, self.model.get_submodule(block + ".attn")
        heads, n = attention.num_heads, h * w
        bias = None
        if self.version == 2:
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        qkv = self.linear(f"{name}.attn.qkv", x, bias)
        q, k, v = (t.reshape(len(x), n, heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        scale = q.shape[-1] ** -0.5
        if self.version == 2:
            q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
            scale = attention.logit_scale.exp()
        q, k, v = (self.quantize(f"{name}.attn.{part}", t) for part, t in zip("qkv", (q, k, v), strict=True))
        seen, bias = self.seen_and_bias(self.model.get_submodule(block), h, w)
        scores = q @ k.transpose(-2, -1) * scale + bias
        p = self.quantize(f"{name}.attn.probs", scores.masked_fill(~seen, -torch.inf).softmax(-1), signed=False)
        return self.linear(f"{name}.attn.proj", (p @ v).transpose(1, 2).reshape(len(x), n, -1))

    def seen_and_bias(self, block, h, w):
        row, col = (t.reshape(-1) for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        home = []
        for at, side, size, shift in zip((row, col), (h, w), block.window_size, block.shift_size, strict=True):
            home += [((at - shift) % side) // size, at < shift]
        seen = torch.stack([t[:, None] == t[None, :] for t in home]).all(0)
        dr, dc = (t[:, None] - t[None, :] for t in (row, col))
        (wr, wc), attention = block.window_size, block.attn
        dr, dc = (torch.where(seen, t, 0) for t in (dr, dc))
        if self.version == 1:
            table = attention.relative_position_bias_table
            return seen, table[(dr + wr - 1) * (2 * wc - 1) + dc + wc - 1].permute(2, 0, 1)
        far = torch.stack([8 * dr / (wr - 1), 8 * dc / (wc - 1)], -1)
        table = attention.cpb_mlp(far.sign() * (far.abs() + 1).log2() / math.log2(8))
        return seen, 16 * torch.sigmoid(table).permute(2, 0, 1)

    def mlp(self, block, x):
        hidden = F.gelu(self.linear(f"{block}.mlp.fc1", x))
        return self.linear(f"{block}.mlp.fc2", hidden, signed=False)

    def merge(self, name, x, h, w):
        x = x.reshape(len(x), h, w, -1)
        x = torch.cat([x[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))], -1).flatten(1, 2)
        norm = self.model.get_submodule(f"{name}.norm")
        if self.version == 1:
            return self.linear(f"{name}.reduction", norm(x), n_bits=8)
        return norm(self.linear(f"{name}.reduction", x, n_bits=8))

    def logits(self, x):
        conv = self.model.patch_embed.proj
        x = F.conv2d(self.quantize("patch_embed.proj.input", x, 8), conv.weight, conv.bias, 2)
        h, w = x.shape[2:]
        x = self.model.patch_embed.norm(x.flatten(2).transpose(1, 2))
        for i in range(2):
            if i:
                x, h, w = self.merge(f"layers.{i}.downsample", x, h, w), h // 2, w // 2
            for j in range(2):
                name = f"layers.{i}.blocks.{j}"
                block = self.model.get_submodule(name)
                if self.version == 1:
                    x = x + self.attend(name, block.norm1(x), h, w)
                    x = x + self.mlp(name, block.norm2(x))
                else:
                    x = x + block.norm1(self.attend(name, x, h, w))
                    x = x + block.norm2(self.mlp(name, x))
        return self.linear("head.fc", self.model.norm(x).mean(1), n_bits=8)


@pytest.mark.parametrize("rules", [(), HEADS], ids=["per_tensor", "per_head"])
@pytest.mark.parametrize(("name", "version"), [(V1, 1), (V2, 2)])
def test_once_bound_the_logits_are_those_of_a_quantizer_written_out_at_each_site(name, version, rules):
    """Maps of 16 x 16 and 8 x 8 in windows of 4: both stages have a shifted block."""
    model, _, state = bound(name, *rules, size=32)
    assert [b.shift_size for layer in model.layers for b in layer.blocks] == [(0, 0), (2, 2)] * 2
    x = images(5, 32)
    with torch.no_grad():
        found, expected = model.eval()(x), Reference(model, state, version).logits(x)
    apart = (found - expected).abs().amax(1)
    assert (apart < 1e-4).sum() >= 4, apart  # sums are ordered differently: a code on an edge may fall otherwise
    assert found.std(dim=0).min() > 0.01


@pytest.mark.parametrize("name", [V1, V2])
def test_a_bound_model_takes_images_of_another_size(name):
    model, _, _ = bound(name)
    model.set_input_size(img_size=(32, 32), window_size=4)
    model(images(2, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(images(2, 32)).shape == (2, CLASSES)


@pytest.mark.parametrize("name", [V1, V2])
def test_recomputed_blocks_give_the_same_gradients(name):
    model, _, _ = bound(name)
    grads = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [V1, V2])
def test_a_packed_model_gives_the_logits_of_the_model_it_was_written_from(name, tmp_path):
    model, sites, state = bound(name, *HEADS)
    latents = {key: p.detach().clone() for key, p in model.named_parameters()}
    for site in sites.weights:
        state.get(site.name).fill_(latents[site.name].abs().mean())
        codes = expected_codes(latents[site.name], state.get(site.name), site)
        model.get_parameter(site.name).data.copy_(expected_image(codes, state.get(site.name), site))
    sites.bind_images(model, state)
    kwargs = {**SMALL, "depths": [2, 2], "num_heads": [2, 4]}
    write_packed(
        tmp_path / "m.safetensors",
        latents=latents,
        buffers={key: t for key, t in model.state_dict().items() if key not in latents},
        weight_sites=sites.weights,
        activation_sites=sites.activations,
        scales={key: state.get(entry.name, entry.role) for key, entry in state.entries.items()},
        model=ModelConfig(name=name, num_classes=CLASSES, kwargs=kwargs),
        quant=config(*HEADS),
        data=DATA,
    )
    with torch.no_grad():
        expected = model.eval()(images())
        assert torch.equal(load_packed(tmp_path / "m.safetensors")(images()), expected)
    assert expected.std() > 0.01


def test_learned_biases_join_the_qkv_bias_that_swinv2_keeps_beside_the_weight():
    model, _, state = bound(V2, {"match": "*.qkv.input", "bias": "around"})
    attention, name = model.layers[0].blocks[1].attn, "layers.0.blocks.1.attn.qkv.input"
    for role in ("before", "after"):
        state.get(name, role).copy_(torch.randn(16))
    x, scale = torch.randn(3, 16, 16), state.get(name)
    x_hat = ((x + state.get(name, "before")) / scale).clamp(-2, 1).round() * scale + state.get(name, "after")
    bias = torch.cat([attention.q_bias, torch.zeros(16), attention.v_bias])
    with torch.no_grad():
        found = attention.qkv(x, attention._qkv_bias())
        torch.testing.assert_close(found, x_hat @ attention.qkv.weight.T + bias, rtol=1e-4, atol=1e-5)
    model(images()).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (attention.q_bias, attention.v_bias))


@pytest.mark.parametrize("name", [V1, V2])
def test_in_bfloat16_the_logits_are_near_and_gradients_have_the_dtype_of_their_tensors(name):
    model, _, state = bound(name, {"match": "*", "n_bits": 8})
    wide = model(images()).detach()
    low = model.bfloat16()(images().bfloat16())
    low.square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert (low.float() - wide).norm() < 0.1 * wide.norm()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    assert state.grads.dtype == torch.float32
    assert state.grads[: state.n_activation].abs().min() > 0


def test_a_token_whose_codes_are_all_zero_makes_a_key_of_zero_and_no_gradient_explodes():
    model, _, state = bound(V2)
    attention = model.layers[0].blocks[0].attn
    x = torch.randn(2, 16, 16)
    x[:, 3] *= 1e-4 * state.get("layers.0.blocks.0.attn.qkv.input")
    x.requires_grad_()
    key = attention.qkv(x, attention._qkv_bias())[:, 3, 16:32]
    assert not key.any()
    attention(x).square().sum().backward()
    ordinary = x.grad[:, :3].norm(dim=-1).max()
    assert 0 < ordinary < 1e3
    assert x.grad[:, 3].norm(dim=-1).max() < 10 * ordinary


def test_vectors_with_a_length_are_normalized_as_timm_does():
    x = torch.randn(4, 2, 7, 8) * torch.logspace(-4, 2, 7)[:, None]
    assert torch.equal(_unit(x), F.normalize(x, dim=-1))
    x[0, 0, 0] = 0
    x.requires_grad_()
    _unit(x).sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[0, 0, 0].any()
