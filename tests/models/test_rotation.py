"""Rotated inputs: R is orthogonal and spreads what stands out, the function stays, and what cannot be rotated is refused."""

import pytest
import torch
from safetensors.torch import save_file

from dsquant.config import ModelConfig
from dsquant.errors import ConfigError
from dsquant.models import build_model, describe, insert_sites
from dsquant.models.rotation import float_weights, rotate, rotate_back, rotated_layers, rotation_block, rotation_matrix
from dsquant.spec import QuantSpec, SitePolicy

MODELS = {
    "vit": (
        {"name": "vit_tiny_patch16_224", "num_classes": 5,
         "kwargs": {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}},
        ["*.qkv", "*.proj", "*.fc[12]"],
    ),
    "swin": (
        {"name": "swin_tiny_patch4_window7_224", "num_classes": 5,
         "kwargs": {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2]}},
        ["*.qkv", "*.fc1", "*.reduction"],
    ),
    "swinv2": (
        {"name": "swinv2_tiny_window8_256", "num_classes": 5,
         "kwargs": {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2]}},
        ["*.fc1", "*.attn.proj"],
    ),
    "sret": (
        {"name": "sret_tiny", "num_classes": 5,
         "kwargs": {"img_size": 32, "heads": [1, 2], "depths": [2, 2], "recursions": [1, 2], "slices": [1, 1],
                    "groups": [1, 1]}},
        ["*.qkv", "*.fc1"],
    ),
    "bert": (
        {"library": "transformers", "name": "bert", "num_classes": 2, "max_length": 8,
         "kwargs": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 48, "attention_probs_dropout_prob": 0.0}},
        ["*.query", "*.key", "*.value", "*.dense"],
    ),
}  # fmt: skip
SMALL = MODELS["vit"][0]


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """Return a float model, the same function rotated, read from its file, and an input."""
    config, patterns = MODELS[request.param]
    torch.manual_seed(0)
    plain = build_model(ModelConfig(**config)).double().eval()
    for module in plain.modules():  # biases and norms that a fresh model leaves at 0 and 1 must matter
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, tmp_path / "w.safetensors")
    read = build_model(ModelConfig(**config, checkpoint=str(tmp_path / "w.safetensors"), rotate=patterns))
    if config.get("library") == "transformers":
        inputs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    else:
        inputs = {"x": torch.randn(2, 3, config["kwargs"]["img_size"], config["kwargs"]["img_size"]).double()}
    return plain, read.double().eval(), inputs, patterns


def output(model, inputs):
    found = model(inputs["x"]) if "x" in inputs else model(**inputs).logits
    return found.detach()


def test_a_rotated_model_is_the_same_function_with_other_weights(pair):
    plain, rotated, inputs, patterns = pair
    torch.testing.assert_close(output(rotated, inputs), output(plain, inputs), rtol=1e-5, atol=1e-6)
    layers = rotated_layers(rotated, patterns)
    assert layers
    for name, weight in plain.state_dict().items():
        same = torch.equal(weight.float(), rotated.state_dict()[name].float())
        assert same != (name.removesuffix(".weight") in layers and name.endswith(".weight")), name


def test_float_weights_are_those_of_the_file_and_quantization_sees_what_is_rotated(pair):
    plain, rotated, inputs, patterns = pair
    for name, weight in float_weights(rotated, patterns).items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=0, atol=1e-6)
    before = output(rotated, inputs)
    spec = QuantSpec(8)
    sites = insert_sites(rotated, SitePolicy(spec, spec))
    seen = {}
    name = next(iter(rotated_layers(rotated, patterns)))
    module = rotated.get_submodule(name)
    module.register_forward_pre_hook(lambda _module, given: seen.update(given=given[0]))  # after the rotation
    sites.quantizers[f"{name}.input"].observer = lambda x: seen.update(observed=x)
    torch.testing.assert_close(output(rotated, inputs), before)  # quantizers are off until they have scales
    assert torch.equal(seen["given"], seen["observed"])


@pytest.mark.parametrize("block", [16, 64, 256])
def test_the_rotation_is_orthogonal_and_exact_in_bf16_and_neither_a_feature_nor_a_mean_stays_in_one_place(block):
    matrix = rotation_matrix(block, torch.float64, torch.device("cpu"))
    assert torch.equal(matrix @ matrix.t(), torch.eye(block, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.full_like(matrix, block**-0.5))
    assert torch.equal(rotation_matrix(block, torch.bfloat16, torch.device("cpu")).double(), matrix)
    assert torch.equal(rotate(torch.ones(block, dtype=torch.float64)).abs(), torch.ones(block, dtype=torch.float64))


def test_rotations_keep_the_dtype_and_lose_no_more_than_it_does():
    x = torch.randn(7, 192, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        found = rotate(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), rotate(x.to(dtype).float()), rtol=1e-2, atol=1e-2)


def test_blocks_are_powers_of_4_that_divide_the_width_and_do_not_mix():
    assert [rotation_block(n) for n in (768, 384, 192, 3072, 4096, 48, 36, 30)] == [256, 64, 64, 256, 256, 16, 4, 1]
    x = torch.zeros(1, 3, 48)
    x[..., 20] = 1.0
    assert torch.equal(rotate(x).abs().sum((0, 1)), torch.tensor(16 * [0.0] + 16 * [0.75] + 16 * [0.0]))
    y = torch.randn(5, 48, dtype=torch.float64)
    torch.testing.assert_close(rotate_back(rotate(y)), y)


def test_describe_names_the_layers_that_rotate():
    model = build_model(ModelConfig(**SMALL, rotate=["*.fc1"]))
    insert_sites(model, SitePolicy(QuantSpec(8), QuantSpec(8)))
    assert describe(model).splitlines()[-1] == "rotated inputs: blocks.0.mlp.fc1, blocks.1.mlp.fc1"


def test_a_feature_that_stands_out_loses_less_at_2_bits_when_rotated():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    x[:, 5] *= 12

    def error(values):
        errors = []
        for scale in torch.linspace(0.2, 2.0, 60) * values.std():
            codes = (values / scale - 0.5).round().clamp(-2, 1) + 0.5
            errors.append((codes * scale - values).square().mean())
        return min(errors) / values.square().mean()

    assert error(rotate(x)) < 0.5 * error(x)


def test_gradients_of_a_rotated_layer_are_those_of_the_plain_one_rotated():
    layer = torch.nn.Linear(48, 8).double()
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = x.grad.clone(), rotate(layer.weight.grad)
    other = torch.nn.Linear(48, 8).double()
    other.weight.data, other.bias.data = rotate(layer.weight.data), layer.bias.data
    x.grad = None
    other(rotate(x)).square().sum().backward()
    torch.testing.assert_close((x.grad, other.weight.grad), wanted)


def test_a_rotated_layer_is_one_graph_under_compile():
    layer = build_model(ModelConfig(**SMALL, rotate=["*.fc1"])).blocks[0].mlp.fc1
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_model_that_is_not_rotated_has_no_hook_and_random_weights_stay_as_drawn():
    torch.manual_seed(3)
    plain = build_model(ModelConfig(**SMALL))
    torch.manual_seed(3)
    rotated = build_model(ModelConfig(**SMALL, rotate=["*.fc1"]))
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), rotated.parameters(), strict=True))
    assert not torch.allclose(plain(torch.ones(1, 3, 16, 16)), rotated(torch.ones(1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("config", "rotate", "said"),
    [
        (SMALL, ["*.fc3"], r"'\*\.fc3' names no linear layer of this model; it has blocks\.0\.attn\.qkv"),
        (SMALL | {"kwargs": SMALL["kwargs"] | {"embed_dim": 36}}, ["*.fc1"], "has 36 features; .* a multiple of 16"),
        (MODELS["swinv2"][0], ["*.qkv"], r"SwinV2 reads the weight of layers.*qkv and never calls it"),
    ],
    ids=["a glob that names nothing", "a width without a rotation", "SwinV2's qkv"],
)
def test_what_cannot_be_rotated_is_refused_by_name(config, rotate, said):
    with pytest.raises(ConfigError, match=said):
        build_model(ModelConfig(**config, rotate=rotate))


@pytest.mark.parametrize("block", [16, 64, 256])
def test_the_rotation_is_what_the_document_of_the_packed_format_says(block):
    def sign(i, j):
        bits = [(i >> k) & 1 for k in range(8)]
        return (-1) ** ((i & j).bit_count() + sum(a * b for a, b in zip(bits[::2], bits[1::2], strict=True)))

    x = torch.randn(block, dtype=torch.float64)
    wanted = [sum(sign(i, j) * x[i] for i in range(block)) / block**0.5 for j in range(block)]
    torch.testing.assert_close(rotate(x), torch.stack(wanted))
