"""Modules name what a person speaks of, and their parts cover a model as they should."""

import pytest

from dsquant.analysis.modules import find_modules, fused_rows, pool, select, split_name
from dsquant.analysis.variants import uniform_policy
from dsquant.errors import ConfigError
from dsquant.models import insert_sites

IN_BLOCK = ["attn.qkv", "attn.q", "attn.k", "attn.v", "attn.probs", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.fixture
def sites(subject):
    return insert_sites(subject.build(), uniform_policy(4))


def test_the_modules_of_a_vit_are_its_layers_and_the_sites_of_attention_in_order(sites):
    expected = ["patch_embed.proj", *(f"blocks.{i}.{kind}" for i in range(2) for kind in IN_BLOCK), "head"]
    assert [module.name for module in find_modules(sites)] == expected


def test_rows_of_q_k_and_v_cover_a_fused_weight_once(sites):
    site = next(s for s in sites.weights if s.name == "blocks.1.attn.qkv.weight")
    rows = fused_rows(site)
    assert rows == {"blocks.1.attn.q": (0, 48), "blocks.1.attn.k": (48, 96), "blocks.1.attn.v": (96, 144)}


def test_layers_and_other_sites_hold_every_part_once(sites):
    whole = [m for m in find_modules(sites) if m.kind not in ("attn.q", "attn.k", "attn.v")]
    parts = [part for module in whole for part in module.parts]
    letters = [f"blocks.{i}.attn.{x}" for i in range(2) for x in "qkv"]
    weights = {(site.name, (0, site.shape[0])) for site in sites.weights}
    activations = {(name, None) for name in sites.quantizers if name not in letters}
    assert len(parts) == len(set(parts))
    assert {tuple(part) for part in parts} == weights | activations


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.3.attn.q", ("blocks.3", "attn.q")),
        ("patch_embed.proj", (None, "patch_embed.proj")),
        ("layers.1.blocks.0.mlp.fc1", ("layers.1.blocks.0", "mlp.fc1")),
        ("layers.2.downsample.reduction", ("layers.2", "downsample.reduction")),
        ("encoder.layer.11.attention.self.query", ("encoder.layer.11", "attention.self.query")),
    ],
)
def test_a_name_splits_after_its_last_number(name, expected):
    assert split_name(name) == expected


def test_what_keeps_parts_of_one_sort(sites):
    assert all(part.rows is not None for m in find_modules(sites, "weights") for part in m.parts)
    assert all(part.rows is None for m in find_modules(sites, "activations") for part in m.parts)
    assert "blocks.0.attn.probs" not in [m.name for m in find_modules(sites, "weights")]


def test_pooling_by_kind_puts_all_blocks_together(sites):
    values = next(m for m in pool(find_modules(sites), "kind") if m.name == "attn.v")
    assert {part.site for part in values.parts} == {
        f"blocks.{i}.attn.{end}" for i in range(2) for end in ("v", "qkv.weight")
    }


def test_a_pattern_that_matches_no_module_is_an_error_that_lists_them(sites):
    with pytest.raises(ConfigError, match=r"'\*\.attn\.value' matches none; modules are patch_embed\.proj"):
        select(find_modules(sites), "*.attn.v,*.attn.value")


@pytest.mark.parametrize(("call", "says"), [(lambda s: find_modules(s, "all"), "what is 'all'"), (
    lambda s: pool(find_modules(s), "layer"), "by is 'layer'")])  # fmt: skip
def test_an_unknown_choice_is_an_error(sites, call, says):
    with pytest.raises(ConfigError, match=says):
        call(sites)
