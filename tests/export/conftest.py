"""A small quantized ViT, and what its packed file must hold, computed here without dsquant's packing or decoding."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsquant.config import ModelConfig, QuantConfig
from dsquant.export import write_packed
from dsquant.models import build_model, insert_sites

KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DATA = {
    "image_size": 16,
    "channels": 3,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


def group_of(numel, grouping):
    return (np.arange(numel) // grouping.inner) % grouping.n_groups


SHIFTS = {"lsq": 0.0, "ternary": 0.0, "seq": 0.5, "elastic": 0.5, "statsq": 0.5, "bwn": 0.5}


def expected_codes(latent, scale, site, centre=None):
    """Round half to even in float32, element by element by the rule of the format."""
    w, group = latent.numpy().reshape(-1), group_of(latent.numel(), site.grouping)
    if centre is not None:
        w = w - centre.numpy()[group]
    half = 2 ** (site.spec.n_bits - 1)
    low, high = (-1, 1) if site.spec.method == "ternary" else (-half, half - 1)
    v = w / scale.numpy()[group] - np.float32(SHIFTS[site.spec.method])
    return np.rint(np.clip(v, np.float32(low), np.float32(high))).astype(np.int8).reshape(site.shape)


def expected_image(codes, scale, site):
    levels = codes.reshape(-1).astype(np.float32) + np.float32(SHIFTS[site.spec.method])
    flat = levels * scale.numpy()[group_of(codes.size, site.grouping)]
    return torch.from_numpy(flat.reshape(site.shape))


@dataclass
class Case:
    """Hold the arguments of write_packed and `oracle`, the trained model: images as weights, activations quantized."""

    arguments: dict[str, Any]
    oracle: torch.nn.Module
    codes: dict[str, np.ndarray]

    @property
    def weight_sites(self):
        return self.arguments["weight_sites"]

    def write(self, path, **changes):
        return write_packed(path, **{**self.arguments, **changes})

    def images(self, count=3):
        return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def make_case(
    n_bits=2, granularity="per_tensor", rules=(), activation="per_tensor", method="lsq", activation_quant=None, **kwargs
):
    generator = torch.Generator().manual_seed(n_bits)
    model_config = ModelConfig(name="vit_tiny_patch16_224", num_classes=5, kwargs={**KWARGS, **kwargs})
    eight = {"n_bits": 8, "method": "lsq", "bias": "none"}
    rules = [{"match": "patch_embed.*", **eight}, {"match": "head*", **eight}, *rules]
    if granularity == "per_head":  # these have no heads
        rules += [{"match": m, "granularity": "per_tensor"} for m in ("patch_embed.*", "head*", "*.mlp.*")]
    if activation == "per_token":  # these have no tokens
        rules += [{"match": m, "granularity": "per_tensor"} for m in ("patch_embed.*input", "head*input")]
    if activation == "per_head":
        no_heads = ("patch_embed.*input", "head*input", "*.mlp.*input", "*.qkv.input")
        rules += [{"match": m, "granularity": "per_tensor"} for m in no_heads]
    quant = QuantConfig.model_validate(
        {
            "weight": {"n_bits": n_bits, "granularity": granularity, "method": method},
            "activation": {"n_bits": n_bits, "granularity": activation, **(activation_quant or {})},
            "rules": rules,
        }
    )
    oracle = build_model(model_config)
    sites = insert_sites(oracle, quant.policy())
    latents = {k: 0.3 * torch.randn(p.shape, generator=generator) for k, p in oracle.named_parameters()}
    sizes = {f"{s.name}:scale": s.grouping.n_groups for s in sites.weights}
    sizes |= {f"{s.name}:scale": s.n_groups for s in sites.activations}
    scales = {key: 0.05 + 0.3 * torch.rand(n, generator=generator) for key, n in sizes.items()}
    for site in sites.activations:
        if site.spec.offset:
            scales[f"{site.name}:offset"] = torch.randn(site.n_groups, generator=generator)
        for role in {"before": ("before",), "around": ("before", "after")}.get(site.spec.bias, ()):
            scales[f"{site.name}:{role}"] = 0.2 * torch.randn(site.features, generator=generator)
    for site in sites.weights:
        if site.spec.method == "bwn":
            scales[f"{site.name}:centre"] = 0.1 * torch.randn(site.grouping.n_groups, generator=generator)
    codes = {
        s.name: expected_codes(latents[s.name], scales[f"{s.name}:scale"], s, scales.get(f"{s.name}:centre"))
        for s in sites.weights
    }
    images = {s.name: expected_image(codes[s.name], scales[f"{s.name}:scale"], s) for s in sites.weights}
    oracle.load_state_dict({**latents, **images})
    for name, quantizer in sites.quantizers.items():
        quantizer.bind({role: scales[f"{name}:{role}"] for role in quantizer.site.values})
    sites.bind_images(oracle, SimpleNamespace(get=lambda name: scales[f"{name}:scale"]))
    arguments = {
        "latents": latents,
        "buffers": {},
        "weight_sites": sites.weights,
        "activation_sites": sites.activations,
        "scales": scales,
        "model": model_config,
        "quant": quant,
        "data": DATA,
        "training": {"recipe": "test", "stage": "w2a2", "step": 7},
    }
    return Case(arguments, oracle.eval().requires_grad_(False), codes)


def rewrite(path, *, header=None, tensors=None, drop=()):
    """Write a packed file again with other header entries or tensors, some dropped."""
    with safe_open(path, "pt") as file:
        entries = {k: v for k, v in {**file.metadata(), **(header or {})}.items() if k not in drop}
        held = {k: file.get_tensor(k).clone() for k in file.keys() if k not in drop}  # noqa: SIM118 - no mapping
    save_file({**held, **(tensors or {})}, path, entries)


# Every method of weights and activations: what make_case takes.
METHODS = {
    "one bit": {"n_bits": 1, "method": "elastic", "activation_quant": {"method": "elastic", "bias": "before"}},
    "bwn": {"n_bits": 1, "method": "bwn", "activation_quant": {"method": "elastic"}},
    "seq": {"n_bits": 2, "method": "seq"},
    "ternary": {"n_bits": 2, "method": "ternary"},
    "statsq a row": {"n_bits": 3, "method": "statsq", "granularity": "per_channel"},
    "tokens and biases": {"n_bits": 2, "method": "statsq", "granularity": "per_channel", "activation": "per_token",
                          "activation_quant": {"bias": "around"}},
}  # fmt: skip


@pytest.fixture(params=METHODS)
def method_case(request, case):
    """Give the Case of each method in turn."""
    return case(**METHODS[request.param])


@pytest.fixture(scope="session")
def case():
    """Give `case(n_bits, granularity, ...) -> Case`; a case is made once and must not be changed."""
    made = {}

    def get(n_bits=2, granularity="per_tensor", **options):
        key = repr((n_bits, granularity, options))
        if key not in made:
            made[key] = make_case(n_bits, granularity, **options)
        return made[key]

    return get


@pytest.fixture(name="rewrite")
def rewrite_fixture():
    return rewrite
