"""Models by name with strict float weights, and the table of their quantization sites."""

import pytest
import torch

import dsquant
from dsquant.config import ModelConfig
from dsquant.errors import CheckpointError, ConfigError
from dsquant.models import build_model, insert_sites
from tests.models.test_vit import SMALL, config, small_vit

DEFAULT_RULES = ({"match": "patch_embed.*", "n_bits": 8}, {"match": "head*", "n_bits": 8})


def described(*rules, **kwargs):
    model = small_vit()
    insert_sites(model, config(*rules, **kwargs).policy())
    return {line.split()[0]: line.split()[1:] for line in dsquant.describe(model).splitlines()}


def test_the_table_of_sites_names_each_with_its_method_bits_levels_and_groups():
    rows = described(*DEFAULT_RULES)
    assert len(rows) == 1 + 10 + 18
    assert rows["site"] == ["method", "bits", "codes", "levels", "granularity", "groups", "offset", "bias", "lr"]
    plain = ["per_tensor", "1", "-", "-", "1"]
    assert rows["blocks.0.attn.qkv.weight"] == ["lsq", "2", "-2..1", "-2..1", "per_tensor", "3", "-", "-", "1"]
    assert rows["blocks.1.mlp.fc2.input"] == ["lsq", "2", "0..3", "0..3", "per_tensor", "1", "learned", "-", "1"]
    assert rows["head.input"] == ["lsq", "8", "-128..127", "-128..127", *plain]


def test_the_table_shows_what_rules_have_changed():
    rows = described(
        *DEFAULT_RULES,
        {"match": "*.fc1.weight", "method": "statsq", "granularity": "per_channel"},
        {"match": "*.fc1.input", "method": "elastic", "n_bits": 1, "granularity": "per_token", "bias": "around"},
        {"match": "*.attn.q", "lr_scale": 0.5},
        {"match": "*.proj.*", "quantize": False},
    )
    assert rows["blocks.0.mlp.fc1.weight"] == ["statsq", "2", "-2..1", "-1.5..1.5", "per_channel", "128", "-", "-", "-"]
    one_bit = ["elastic", "1", "-1..0", "-0.5..0.5", "per_token", "17", "-", "around", "1"]
    assert rows["blocks.1.mlp.fc1.input"] == one_bit
    assert rows["blocks.1.attn.q"][-1] == "0.5"
    assert not [name for name in rows if ".proj." in name and not name.startswith("patch_embed")]


def test_a_model_that_is_not_quantized_has_no_table():
    with pytest.raises(ConfigError, match="this VisionTransformer is not quantized: describe the model of a quantized"):
        dsquant.describe(small_vit())


def test_a_model_is_built_by_its_timm_name_and_odd_ones_are_named():
    kwargs = {key: value for key, value in SMALL.items() if key != "num_classes"}
    built = build_model(ModelConfig(name="vit_tiny_patch16_224", num_classes=7, kwargs=kwargs))
    assert built.head.weight.shape == (7, 32)
    with pytest.raises(ConfigError, match=r"model\.name 'vit_tinny'.*similar names: \w"):
        build_model(ModelConfig(name="vit_tinny", num_classes=7))
    with pytest.raises(ConfigError, match=r"model\.name 'vit_tiny_patch16_224'.*'patch_sise'"):
        build_model(ModelConfig(name="vit_tiny_patch16_224", num_classes=7, kwargs={"patch_sise": 4}))


def test_float_weights_must_fit_exactly(tmp_path):
    kwargs = {key: value for key, value in SMALL.items() if key != "num_classes"}
    weights = small_vit(seed=3).state_dict()
    faults = {
        "fits": (weights, None),
        "lacks": ({k: v for k, v in weights.items() if k != "norm.bias"}, r"lacks 1 tensors.*first norm\.bias"),
        "extra": ({**weights, "blocks.0.attn.q.weight": torch.zeros(1)}, r"1 tensors.*first blocks\.0\.attn\.q\."),
        "shape": ({**weights, "head.bias": torch.zeros(9)}, r"head\.bias is \(9,\), this model has \(5,\)"),
    }
    for name, (tensors, said) in faults.items():
        path = str(tmp_path / f"{name}.pt")
        torch.save({"model": tensors}, path)
        model = ModelConfig(name="vit_tiny_patch16_224", num_classes=5, kwargs=kwargs, checkpoint=path)
        if said is None:
            assert torch.equal(build_model(model).pos_embed, weights["pos_embed"])
            continue
        with pytest.raises(CheckpointError, match=said):
            build_model(model)
    with pytest.raises(CheckpointError, match="does not exist"):
        build_model(model.model_copy(update={"checkpoint": str(tmp_path / "none.pt")}))
