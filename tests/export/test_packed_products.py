"""What a packed file holds of products of q and k weights (QKR), and what is refused when one is written or read."""

import json
import re

import numpy as np
import pytest
import torch

from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import ExportError
from dsquant.export import load_packed, read_packed, write_packed
from dsquant.models import build_model, insert_sites
from dsquant.quant.reparam import encode_product
from tests.export.conftest import DATA, KWARGS
from tests.export.test_packed import edited, header_of, weights_by_the_document

QKV, PRODUCT, WIDTH, HEADS = "blocks.0.attn.qkv.weight", "blocks.0.attn.qk.weight", 32, 2


@pytest.fixture(
    scope="module", params=[("statsq", 2, "per_channel"), ("statsq", 3, "per_head"), ("bwn", 1, "per_tensor")]
)
def made(request):
    """Return the arguments of write_packed for a small ViT whose products have a method, bits and a granularity."""
    method, n_bits, granularity = request.param
    eight = {"n_bits": 8, "method": "lsq"}
    quant = QuantConfig.model_validate(
        {
            "qk_reparam": True,
            "weight": {"n_bits": 2},
            "activation": {"n_bits": 2},
            "rules": [
                *({"match": match, **eight} for match in ("patch_embed.*", "head*")),
                {"match": "*.qk.weight", "method": method, "n_bits": n_bits, "granularity": granularity},
            ],
        }
    )
    model = ModelConfig(name="vit_tiny_patch16_224", num_classes=5, kwargs=KWARGS)
    torch.manual_seed(0)
    built = build_model(model)
    sites = insert_sites(built, quant.policy())
    latents = {name: 0.3 * torch.randn(p.shape) for name, p in built.named_parameters()}
    scales = {f"{s.name}:scale": 0.2 + torch.rand(s.grouping.n_groups) for s in sites.weights}
    scales |= {f"{s.name}:{role}": 0.2 + torch.rand(n) for s in sites.activations for role, n in s.values.items()}
    codes = {}
    for fused, site in sites.products.items():
        codes[site.name], scales[f"{site.name}:scale"] = encode_product(latents[fused], site)
    return {
        "latents": latents, "buffers": {}, "weight_sites": sites.weights, "activation_sites": sites.activations,
        "scales": scales, "model": model, "quant": quant, "data": DATA, "codes": codes, "products": sites.products,
    }  # fmt: skip


@pytest.fixture
def path(made, tmp_path):
    write_packed(tmp_path / "m.safetensors", **made)
    return tmp_path / "m.safetensors"


def exact_products(weight):
    """Return the products of every head in float64, one below another."""
    q, k, _ = weight.double().numpy().reshape(3, HEADS, -1, WIDTH)
    return np.concatenate([q[h].T @ k[h] for h in range(HEADS)])


def test_a_reader_written_from_the_document_decodes_products_and_v_rows(made, path):
    """OFQ's image is s (round(u n - 1/2) + 1/2) / n with u = w / s and s = 2 mean|w|; BWN's is mean|w| sign(w - mean)."""
    found = {name: image for name, _, image in weights_by_the_document(path, "products")}
    assert found.keys() == {f"blocks.{i}.attn.qk.weight" for i in range(2)}
    for name, image in found.items():
        site = made["products"][name.replace("qk", "qkv")]
        rows = exact_products(made["latents"][name.replace("qk", "qkv")]).reshape(site.grouping.n_groups, -1)
        mean_abs, n = np.abs(rows).mean(1, keepdims=True), 2 ** (site.spec.n_bits - 1)
        if site.spec.method == "bwn":
            wanted = mean_abs * np.where(rows >= rows.mean(1, keepdims=True), 1, -1)
        else:
            u = np.clip(rows / (2 * mean_abs), -1, 1 - 1e-6)
            wanted = 2 * mean_abs * (np.rint(u * n - 0.5) + 0.5) / n
        assert image.shape == (HEADS * WIDTH, WIDTH)
        np.testing.assert_allclose(image, wanted.reshape(image.shape), rtol=1e-5)
    fused = {name: image for name, _, image in weights_by_the_document(path)}[QKV]
    s = made["scales"][f"{QKV}:scale"]
    v = made["latents"][QKV][2 * WIDTH :]
    assert np.array_equal(fused, ((v / s).clamp(-2, 1).round() * s).numpy())


def test_a_file_with_products_is_of_version_2_and_says_which_weight_each_stands_for(made, path):
    metadata = header_of(path)[0]["__metadata__"]
    sites = json.loads(metadata["sites"])
    assert metadata["version"] == "2"
    assert sites["products"][PRODUCT]["of"] == QKV
    assert sites["products"][PRODUCT]["shape"] == [HEADS * WIDTH, WIDTH]
    assert sites["weights"][QKV]["rows"] == [2 * WIDTH, 3 * WIDTH]
    assert sites["weights"][QKV]["shape"] == [WIDTH, WIDTH]
    assert QKV not in header_of(path)[0]  # latents of q and k are not shipped
    packed = read_packed(path)
    assert torch.equal(packed.codes(PRODUCT), made["codes"][PRODUCT])
    assert packed.rest == made["latents"].keys() - packed.weights.keys()


def test_a_product_without_its_codes_cannot_be_written(made, tmp_path):
    codes = {name: tensor for name, tensor in made["codes"].items() if name != PRODUCT}
    with pytest.raises(ExportError, match=rf"{PRODUCT} is a product of weights"):
        write_packed(tmp_path / "m.safetensors", **{**made, "codes": codes})


def test_a_weight_that_lacks_the_rows_of_its_site_cannot_be_written(made, tmp_path):
    latents = {**made["latents"], QKV: made["latents"][QKV][: 2 * WIDTH]}
    with pytest.raises(ExportError, match=r"its site has \(32, 32\) in rows 64 to 96"):
        write_packed(tmp_path / "m.safetensors", **{**made, "latents": latents})


def test_a_damaged_file_with_products_is_refused(path, rewrite):
    whole = path.read_bytes()
    edits = {
        "damaged header (ValueError: blocks.0.attn.qkv.weight has shape (32, 32) and rows (64, 95)": lambda: edited(
            path, "sites", lambda s: s["weights"][QKV].update(rows=[64, 95])
        ),
        "damaged header (KeyError: 'of'": lambda: edited(path, "sites", lambda s: s["products"][PRODUCT].pop("of")),
        "in the file and None in the model that dsquant builds": lambda: edited(
            path, "quant", lambda q: q.update(qk_reparam=False, rules=[])
        ),
        f"site {PRODUCT} is": lambda: edited(path, "sites", lambda s: s["products"][PRODUCT].update(of="head.weight")),
    }  # fmt: skip
    for message, edit in edits.items():
        path.write_bytes(whole)
        rewrite(path, header=edit())
        with pytest.raises(ExportError, match=re.escape(message)):
            load_packed(path)
    path.write_bytes(whole)
    rewrite(path, tensors={f"{PRODUCT}_packed": torch.zeros(64, 99, dtype=torch.int32)})
    with pytest.raises(ExportError, match=re.escape(f"{PRODUCT}_packed is I32 [64, 99], its site needs I32 [64, ")):
        load_packed(path)
    path.write_bytes(whole)
    rewrite(path, drop=[f"{PRODUCT}_scale"])
    with pytest.raises(ExportError, match=f"lacks the tensor {PRODUCT}_scale"):
        load_packed(path)
