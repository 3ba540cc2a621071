"""A packed model computes what the trained model computed, bit for bit, and refuses files that are of another model."""

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open

import dsquant
from dsquant.errors import ExportError
from dsquant.export import PackedConv2d, PackedLinear, load_packed, runtime
from dsquant.export.runtime import PackedActivation
from dsquant.ops import backends

QKV = "blocks.0.attn.qkv.weight"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_head"])
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_logits_are_those_of_the_trained_model_bit_for_bit(case, path, n_bits, granularity):
    made = case(n_bits, granularity)
    made.write(path)
    logits = load_packed(path)(made.images())
    assert torch.equal(logits, made.oracle(made.images()))
    assert logits.std() > 0.01  # not a constant that any model would give


@pytest.mark.parametrize("cache", [False, True])
def test_logits_of_every_method_are_those_of_the_trained_model_bit_for_bit(method_case, path, cache):
    method_case.write(path)
    logits = load_packed(path, cache=cache)(method_case.images())
    assert torch.equal(logits, method_case.oracle(method_case.images()))
    assert logits.std() > 0.01


def test_in_bfloat16_every_method_computes_as_the_trained_model_does(method_case, path):
    method_case.write(path)
    images = method_case.images().bfloat16()
    expected = copy.deepcopy(method_case.oracle).bfloat16()(images)
    assert torch.equal(load_packed(path).bfloat16()(images), expected)


@pytest.mark.parametrize("n_bits", [2, 3])
def test_layers_that_training_takes_in_integers_multiply_packed_codes(case, path, n_bits, monkeypatch):
    """No image is made, and bits stay those of training, which found its codes in images."""
    made = case(n_bits)
    made.write(path)
    images, expected = made.images(), made.oracle(made.images())
    model, decoded = load_packed(path), []
    of_codes = runtime.decode
    monkeypatch.setattr(runtime, "decode", lambda *given: decoded.append(given) or of_codes(*given))
    taken = backends.choose("quant_linear", "cpu") != backends.TORCH
    assert torch.equal(model(images), expected)
    assert bool(decoded) != taken
    decoded.clear()
    monkeypatch.setenv("DSQ_BACKEND", "quant_linear=torch")
    assert torch.equal(model(images), made.oracle(images))
    assert len(decoded) == 10


def test_a_gradient_of_the_input_takes_training_s_own_code(case, path):
    made = case(2)
    made.write(path)
    images = made.images().requires_grad_()
    grads = [torch.autograd.grad(model(images).square().sum(), images)[0] for model in (load_packed(path), made.oracle)]
    assert torch.equal(*grads)


def test_a_packed_model_describes_its_sites(case, path):
    made = case(1, method="bwn", activation_quant={"method": "elastic"})
    made.write(path)
    table = dsquant.describe(load_packed(path))
    assert table == dsquant.describe(made.oracle)
    assert re.search(r"blocks\.0\.attn\.qkv\.weight +bwn +1 +-1\.\.0 +-0\.5\.\.0\.5 +per_tensor +3 ", table)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "per_head"},
        {"mlp_ratio": 1.25},  # rows of 40 codes of 3 bits end inside a word
        {"rules": [{"match": "*.fc1.weight", "quantize": False}, {"match": "*.proj.input", "quantize": False}]},
        {"qkv_bias": False, "class_token": False, "global_pool": "avg"},
        {"num_heads": 4, "rules": [{"match": "blocks.1.*.weight", "n_bits": 5, "granularity": "per_channel"}]},
    ],
    ids=lambda options: ",".join(options),
)
def test_logits_are_the_same_for_other_policies_and_variants(case, path, options):
    made = case(3, **options)
    made.write(path)
    assert torch.equal(load_packed(path)(made.images()), made.oracle(made.images()))


def test_weights_stay_packed_in_memory_unless_a_cache_is_asked_for(case, path):
    made = case(2)
    made.write(path)
    lean, cached = load_packed(path), load_packed(path, cache=True)
    assert isinstance(lean.patch_embed.proj, PackedConv2d)
    assert isinstance(lean.blocks[0].mlp.fc1, PackedLinear)
    quantized = {site.name for site in made.weight_sites}
    upstream = made.oracle.state_dict().keys()
    expected = (upstream - quantized) | {f"{name}_{part}" for name in quantized for part in ("packed", "scale")}
    assert lean.state_dict().keys() == cached.state_dict().keys() == expected
    floats = [t for t in [*lean.parameters(), *lean.buffers()] if t.is_floating_point() and t.dim() > 1]
    assert {tuple(t.shape) for t in floats} == {(1, 1, 32), (1, 17, 32)}  # class token and positions only
    assert cached.blocks[0].attn.qkv.weight is cached.blocks[0].attn.qkv.weight
    assert torch.equal(cached(made.images()), lean(made.images()))


def test_a_packed_model_is_in_evaluation_mode_and_takes_no_gradient(case, path):
    case(2, drop_path_rate=0.5).write(path)
    model = load_packed(path)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError):
        model.head.weight = torch.nn.Parameter(torch.zeros(5, 32))


@pytest.mark.parametrize("cache", [False, True])
def test_in_bfloat16_images_are_rounded_once_and_scales_not_at_all(case, path, cache):
    """Training in bf16 rounds the float32 image; its scales stay float32."""
    made = case(3, "per_channel")
    made.write(path)
    oracle = made.oracle.state_dict()
    model = load_packed(path, cache=cache).bfloat16()
    assert model.blocks[0].attn.qkv.weight_scale.dtype == torch.float32
    for name in made.codes:
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight, oracle[name].bfloat16()), name
        assert torch.equal(module.weight_scale, made.arguments["scales"][f"{name}:scale"]), name
    for quantizer in (m for m in model.modules() if isinstance(m, PackedActivation)):
        assert quantizer._values.keys() == quantizer.site.values.keys()
        for role, values in quantizer._values.items():
            assert torch.equal(values, made.arguments["scales"][f"{quantizer.site.name}:{role}"])
    images = made.images().bfloat16()
    assert torch.equal(model(images), copy.deepcopy(made.oracle).bfloat16()(images))


def test_a_model_moved_to_bfloat16_and_back_keeps_its_exact_weights(case, path):
    made = case(2)
    made.write(path)
    model = load_packed(path).bfloat16().float()
    assert torch.equal(model.get_submodule("blocks.0.attn.qkv").weight, made.oracle.get_parameter(QKV))


def test_a_model_moves_whole_to_another_device(case, path):
    """`meta` stands for any device: every tensor that the forward pass reads must have gone there."""
    case(2).write(path)
    model = load_packed(path, "meta")
    assert model(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 5)


def test_loading_leaves_random_numbers_alone(case, path):
    case(2).write(path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_packed(path)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("name", ["norm.weight", "blocks.1.mlp.fc2.bias", "cls_token"])
def test_a_missing_float_tensor_is_named(case, path, rewrite, name):
    case(2).write(path)
    rewrite(path, drop=[name])
    with pytest.raises(ExportError, match=f"lacks the tensor {re.escape(name)}"):
        load_packed(path)


def test_a_tensor_of_another_model_is_named(case, path, rewrite):
    case(2).write(path)
    rewrite(path, tensors={"dist_token": torch.zeros(1, 1, 32)})
    with pytest.raises(ExportError, match="holds dist_token, which vit_tiny_patch16_224 does not have"):
        load_packed(path)
    case(2).write(path)
    rewrite(path, tensors={"norm.bias": torch.zeros(31)})
    with pytest.raises(ExportError, match=r"norm\.bias is \(31,\), vit_tiny_patch16_224 needs \(32,\)"):
        load_packed(path)


def test_a_policy_that_gives_other_sites_than_the_file_is_refused(case, path, rewrite):
    """Were the policy's meaning to change between versions, a file must not silently run as another model."""
    case(2).write(path)
    with safe_open(path, "pt") as file:
        quant, model = (json.loads(file.metadata()[key]) for key in ("quant", "model"))
    whole = path.read_bytes()
    changes = {
        r"site blocks\.0\.attn\.k is .*'n_bits': 2.* in the file and .*'n_bits': 4": {
            "quant": json.dumps({**quant, "activation": {"n_bits": 4, "granularity": "per_tensor", "offset": False}})
        },
        r"site blocks\.2\.attn\.proj\.weight is None in the file": {
            "model": json.dumps({**model, "kwargs": {**model["kwargs"], "depth": 3}})
        },
        r"its model cannot be built: model\.name 'vit_unknown'": {
            "model": json.dumps({**model, "name": "vit_unknown"})
        },
        r"its model cannot be built: ResNet has no quantization sites": {
            "model": json.dumps({"name": "resnet18", "num_classes": 5})
        },
        r"its model cannot be built: quant rule 'nothing\.\*' matches no site": {
            "quant": json.dumps({**quant, "rules": [{"match": "nothing.*"}]})
        },
    }
    for message, header in changes.items():
        path.write_bytes(whole)
        rewrite(path, header=header)
        with pytest.raises(ExportError, match=message):
            load_packed(path)
