"""The integer program against exhaustive search, and the recipes that carry its answer."""

import itertools
import random

import pytest
import yaml

from dsquant.analysis.allocation import Group, allocate, cost_of, size_of, write_policy, write_recipe
from dsquant.analysis.bit_search import bits_of, search_bits
from dsquant.config import QuantConfig, load_config
from dsquant.errors import ConfigError
from dsquant.models import build_model, insert_sites


def random_groups(seed):
    """Return up to 6 groups of odd sizes with costs that need not fall with more bits, as measured ones need not."""
    rng = random.Random(seed)
    candidates = rng.choice([(2, 3, 4, 8), (2, 4), (1, 2, 3)])
    count = rng.randint(1, 6)
    sizes = [rng.choice([7, 192, 36864, 147456, rng.randint(1, 10**6)]) for _ in range(count)]
    return [
        Group(f"layer{i}", size, {b: rng.gauss(1 / b, 0.3) for b in candidates}) for i, size in enumerate(sizes)
    ], candidates


@pytest.mark.parametrize("seed", range(40))
def test_the_answer_is_the_best_of_all_choices_within_the_budget(seed):
    groups, candidates = random_groups(seed)
    numel = sum(group.numel for group in groups)
    budget = int(numel * random.Random(seed + 1000).uniform(min(candidates), max(candidates)))
    every = [dict(zip([g.name for g in groups], bits, strict=True))
             for bits in itertools.product(candidates, repeat=len(groups))]  # fmt: skip
    best = min(cost_of(groups, bits) for bits in every if size_of(groups, bits) <= budget)
    found = allocate(groups, budget)
    assert size_of(groups, found) <= budget
    assert cost_of(groups, found) == pytest.approx(best, abs=1e-9)


def test_a_budget_that_is_exactly_met_is_met_and_one_bit_less_is_not():
    groups = [Group("a", 1000, {2: 1.0, 4: 0.0}), Group("b", 500, {2: 0.9, 4: 0.0})]
    assert allocate(groups, 4 * 1000 + 2 * 500) == {"a": 4, "b": 2}
    assert allocate(groups, 4 * 1000 + 2 * 500 - 1) == {"a": 2, "b": 4}


def test_a_budget_below_the_fewest_bits_is_an_error_that_says_what_is_possible():
    with pytest.raises(ConfigError, match=r"budget of 1\.500 bits is below the least possible, 2\.000"):
        allocate([Group("a", 10, {2: 1.0, 4: 0.0})], 15)


def test_a_written_recipe_loads_and_its_policy_resolves_to_the_allocated_bits(tmp_path):
    config = load_config("digits_w2a2")
    bits = {"blocks.0.attn.qkv.weight": 4, "blocks.3.mlp.fc2.weight": 3, "head.weight": 2, "blocks.1.attn.v": 8}
    path = write_recipe(tmp_path / "mixed.yaml", config, "w2a2", bits, "a note\nof two lines")
    written = load_config(str(path))
    sites = insert_sites(build_model(written.model), written.stages["w2a2"].quant.policy())
    resolved = {site.name: site.spec.n_bits for site in [*sites.weights, *sites.activations]}
    assert {name: resolved[name] for name in bits} == bits
    assert resolved["blocks.1.attn.qkv.weight"] == resolved["blocks.0.attn.qkv.input"] == 2
    assert resolved["patch_embed.proj.weight"] == resolved["head.input"] == 8  # the recipe's own rules are kept
    assert written.recipe == "mixed"
    rest = written.model_dump(exclude={"recipe", "stages"})
    assert rest == config.model_dump(exclude={"recipe", "stages"})
    assert written.stages["fp"] == config.stages["fp"]


def test_a_policy_file_is_what_a_stage_takes_as_its_rules(tmp_path):
    path = write_policy(tmp_path / "policy.yaml", {"head.weight": 3}, "note")
    rules = yaml.safe_load(path.read_text())
    quant = QuantConfig.model_validate({"weight": {"n_bits": 2}, "activation": {"n_bits": 2}, **rules})
    assert quant.policy().weight_spec("head.weight").n_bits == 3


def test_a_recipe_that_is_no_yaml_file_or_a_stage_in_float_is_an_error(tmp_path):
    config = load_config("digits_w2a2")
    with pytest.raises(ConfigError, match=r"a recipe is a \.yaml file"):
        write_recipe(tmp_path / "mixed.json", config, "w2a2", {}, "")
    with pytest.raises(ConfigError, match=r"stage 'fp' .* quantizes nothing; those that do: \['w2a2'\]"):
        write_recipe(tmp_path / "mixed.yaml", config, "fp", {}, "")


QUANT = QuantConfig.model_validate({
    "weight": {"n_bits": 2}, "activation": {"n_bits": 4},
    "rules": [{"match": "head*", "n_bits": 8}, {"match": "blocks.1.mlp.fc1.weight", "quantize": False}],
})  # fmt: skip


def test_a_search_keeps_its_budgets_and_leaves_float_what_the_recipe_leaves_float(subject):
    result = search_bits(subject, QUANT, (2, 4), budget_bits=2.6, activation_budget_bits=3.0)
    for part, budget in (("weights", 2.6), ("activations", 3.0)):
        found = result[part]
        sizes = {name: found["numel"][name] * n_bits for name, n_bits in found["bits"].items()}
        assert sum(sizes.values()) / sum(found["numel"].values()) == found["average_bits"] <= budget
        assert set(found["bits"].values()) <= {2, 4}
    assert "blocks.1.mlp.fc1.weight" not in result["weights"]["bits"]
    assert "blocks.1.mlp.fc1.input" in result["activations"]["bits"]
    assert result["activations"]["numel"]["blocks.0.attn.q"] == 16 * 48
    assert result["uniform"]["n_bits"] == [2]
    assert len(bits_of(result)) == len(result["weights"]["bits"]) + len(result["activations"]["bits"])


def test_a_budget_in_bytes_is_that_of_all_codes(subject):
    result = search_bits(subject, QUANT, (2, 8), budget_bytes=20000, cost="kl")
    bits, numel = result["weights"]["bits"], result["weights"]["numel"]
    assert sum(bits[name] * numel[name] for name in bits) <= 8 * 20000
    assert result["weights"]["bytes"] <= 20000
    assert result["activations"] is None
    assert all(cost[str(b)][0] >= 0 for cost in result["weights"]["costs"].values() for b in (2, 8))


def test_a_cost_is_the_loss_of_the_site_alone_at_those_bits(subject):
    from dsquant.analysis.modules import Part
    from dsquant.analysis.variants import at_bits, post_training

    result = search_bits(subject, QUANT, (2, 3), budget_bits=2.5)
    name = "blocks.1.attn.qkv.weight"
    variants = post_training(subject, at_bits(QUANT, {name: 3}))
    variants.quantize_only([Part(name, (0, 144))])
    expected = subject.scores(variants.model).loss - result["float"]["loss"]
    assert result["weights"]["costs"][name]["3"][0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget_bits": 3, "budget_bytes": 10}, "not both"),
        ({"candidates": (2, 2.5)}, "--bits is .* whole numbers"),
        ({"cost": "top1"}, "--cost is 'top1'; choose one of loss, kl"),
    ],
)
def test_options_that_do_not_go_together_are_errors(subject, options, says):
    with pytest.raises(ConfigError, match=says):
        search_bits(subject, QUANT, **{"candidates": (2, 4), **options})
