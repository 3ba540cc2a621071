import copy

import pytest
import yaml

from dsquant.config import RECIPES, load_config, load_ds_config, merge_ds_config, parse_config
from dsquant.errors import ConfigError
from dsquant.spec import Granularity, Levels, QuantSpec

RECIPE = yaml.safe_load("""
recipe: inline
model: {name: vit_tiny_patch16_224, num_classes: 10, kwargs: {img_size: 16, patch_size: 4}}
data: {source: digits, image_size: 16, channels: 1, mean: [0.5], std: [0.5], augment: shift}
stages:
  fp: {epochs: 2, batch_size: 32, lr: 0.001}
  w2a2:
    init_from: fp
    distill: {teacher: fp}
    steps: 60
    batch_size: 32
    lr: 0.0005
    quant:
      weight: {n_bits: 2, granularity: per_channel}
      activation: {n_bits: 2}
      rules:
        - {match: "head*", n_bits: 8, granularity: per_tensor}
        - {match: "*.probs", n_bits: 4, lr_scale: 0.5}
        - {match: "*.qkv.input", quantize: false}
      obr: {weight: 0.01}
""")


def changed(**overrides):
    """Return the recipe with dotted keys (written with __) set; None as a value stays None."""
    tree = copy.deepcopy(RECIPE)
    for dotted, value in overrides.items():
        *parents, last = dotted.split("__")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    return tree


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "inline.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_under_its_own_name(path):
    config = load_config(path.stem)
    assert config.recipe == path.stem
    for stage in config.stages.values():
        if stage.quant is not None:
            stage.quant.policy()


def test_a_recipe_becomes_a_config_with_its_policy(recipe_file):
    config = load_config(recipe_file)
    stage = config.stages["w2a2"]
    assert list(config.stages) == ["fp", "w2a2"]
    assert config.stages["fp"].quant is None
    assert (stage.steps, stage.epochs, stage.distill.teacher, stage.quant.obr.weight) == (60, None, "fp", 0.01)
    policy = stage.quant.policy()
    weight = policy.weight_spec("blocks.0.attn.qkv.weight")
    assert (weight.n_bits, weight.granularity, weight.offset) == (2, Granularity.PER_CHANNEL, False)
    head = policy.weight_spec("head.weight")
    assert (head.n_bits, head.granularity) == (8, Granularity.PER_TENSOR)
    probs = policy.activation_spec("blocks.0.attn.probs", signed=False, offset=False)
    assert (probs.n_bits, probs.signed, probs.lr_scale) == (4, False, 0.5)
    assert policy.activation_spec("blocks.0.attn.qkv.input", signed=True, offset=False) is None


def test_patch_embedding_and_head_get_8_bits_where_no_rule_is_written():
    config = parse_config(changed(stages__w2a2__quant={"weight": {"n_bits": 2}, "activation": {"n_bits": 2}}), "inline")
    policy = config.stages["w2a2"].quant.policy()
    bits = {name: policy.weight_spec(name).n_bits for name in ("patch_embed.proj.weight", "head.weight", "blocks.0.x")}
    assert bits == {"patch_embed.proj.weight": 8, "head.weight": 8, "blocks.0.x": 2}


def refusal(tree):
    with pytest.raises(ConfigError) as found:
        parse_config(tree, "inline.yaml")
    return str(found.value)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("sede", "seed"),
        ("data__imagesize", "image_size"),
        ("stages__w2a2__learning_rate", "weight_decay"),
        ("stages__w2a2__distill__T", "temperature"),
        ("stages__w2a2__quant__obr__lambda", "variance_weight"),
        ("stages__w2a2__quant__activation__bits", "n_bits"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_what_is_allowed_there(key, allowed):
    message = refusal(changed(**{key: 12345}))
    line = next(line for line in message.splitlines() if "unknown key" in line)
    assert message.startswith("inline.yaml:")
    assert key.replace("__", ".") + ":" in line
    assert "12345" in line
    assert allowed in line.partition("allowed here")[2]


def test_an_unknown_key_of_a_rule_is_named_with_its_place_in_the_list():
    line = refusal(changed(stages__w2a2__quant__rules=[{"match": "head*"}, {"match": "*", "nbits": 8}]))
    assert "stages.w2a2.quant.rules.1.nbits: unknown key (value 8)" in line
    assert "lr_scale" in line


def test_what_is_allowed_in_a_stage_does_not_depend_on_the_name_of_the_stage():
    message = refusal(changed(stages={"quant": {**RECIPE["stages"]["fp"], "learning_rate": 1.0}}))
    assert "stages.quant.learning_rate" in message
    assert "batch_size" in message.partition("allowed here")[2]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("stages__w2a2__lr", "fast", "number"),
        ("stages__w2a2__steps", 2.5, "integer"),
        ("stages__w2a2__steps", -1, "greater than or equal to 0"),
        ("stages__w2a2__quant__weight__n_bits", "two", "integer"),
        ("stages__w2a2__quant__weight__n_bits", 0, "greater than or equal to 1"),
        ("stages__w2a2__quant__activation__n_bits", 9, "less than or equal to 8"),
        ("stages__w2a2__quant__weight__granularity", "per_row", "per_channel"),
        ("stages__w2a2__quant__obr__aggregation", "max", "'sum', 'mean' or 'kernel_mean'"),
        ("stages__w2a2__warmup", 1.5, "less than or equal to 1"),
        ("stages__w2a2__weight_decay", -0.1, "greater than or equal to 0"),
        ("stages__w2a2__lr", float("nan"), "greater than 0"),
        ("precision", "fp8", "'auto', 'fp32' or 'bf16'"),
        ("model", "vit", "dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_wanted(key, value, wanted):
    message = refusal(changed(**{key: value}))
    line = next(line for line in message.splitlines() if key.replace("__", ".") + ":" in line)
    assert wanted in line
    assert f"(value {value!r})" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("data__num_workers", True), ("stages__w2a2__steps", "60"), ("stages__w2a2__activation_checkpointing", "yes")],
)
def test_a_value_of_another_type_is_refused_rather_than_converted(key, value):
    assert key.replace("__", ".") + ":" in refusal(changed(**{key: value}))


def test_a_rate_may_be_written_without_a_dot(tmp_path):
    """YAML 1.1 reads 1e-3 as a string; people write it all the same."""
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(RECIPE).replace("lr: 0.001", "lr: 1e-3"))
    assert isinstance(yaml.safe_load(path.read_text())["stages"]["fp"]["lr"], str)
    assert load_config(str(path)).stages["fp"].lr == 1e-3


def test_a_missing_key_is_named():
    tree = changed()
    del tree["stages"]["w2a2"]["batch_size"]
    assert "stages.w2a2.batch_size: Field required" in refusal(tree)


@pytest.mark.parametrize("key", ["init_from", "distill.teacher"])
def test_a_stage_may_point_only_to_an_earlier_one(key):
    for source in ("w2a2", "later", "no_such_stage"):
        tree = changed(stages__w2a2__init_from=None, stages__w2a2__distill=None)
        tree["stages"]["later"] = dict(RECIPE["stages"]["fp"])
        tree["stages"]["w2a2"] |= {"init_from": source} if key == "init_from" else {"distill": {"teacher": source}}
        message = refusal(tree)
        assert f"stages.w2a2.{key} is {source!r}" in message
        assert "['fp']" in message


@pytest.mark.parametrize("lengths", [{"epochs": 1, "steps": 10}, {"epochs": None, "steps": None}])
def test_a_stage_has_either_epochs_or_steps(lengths):
    tree = changed()
    tree["stages"]["fp"] |= lengths
    message = refusal(tree)
    assert "stages.fp" in message
    assert "either epochs or steps" in message


def test_shards_must_be_named_and_mean_and_std_fit_the_channels():
    assert "data.train and data.val" in refusal(changed(data={"source": "shards", "image_size": 16}))
    assert "need 3 values" in refusal(changed(data={"source": "digits", "image_size": 16, "mean": [0.5]}))


@pytest.mark.parametrize(
    ("kind", "tensor", "said"),
    [
        ("weight", {"n_bits": 2, "offset": True}, "weight.offset: weights are symmetric"),
        ("weight", {"n_bits": 2, "bias": "around"}, "weight.bias: a bias is for activations"),
        ("weight", {"n_bits": 2, "granularity": "per_token"}, "weight.granularity: per_token is for activations"),
        ("weight", {"n_bits": 1}, "weight.method: 1 bit has no signed lsq levels; use method elastic"),
        ("weight", {"n_bits": 2, "method": "elastic"}, "weight.method: method elastic takes n_bits 1, not 2"),
        ("weight", {"n_bits": 3, "method": "ternary"}, "weight.method: method ternary takes n_bits 2, not 3"),
        ("weight", {"n_bits": 2, "method": "bwn"}, "weight.method: method bwn takes n_bits 1, not 2"),
        ("activation", {"n_bits": 2, "method": "statsq"}, "activation.method: statsq is for weights"),
        ("activation", {"n_bits": 2, "method": "seq"}, "seq is for weights; activations take lsq or elastic"),
        ("activation", {"n_bits": 1}, "activation.method: 1 bit has no signed lsq levels"),
        ("activation", {"n_bits": 4, "method": "elastic"}, "activation.method: method elastic takes n_bits 1, not 4"),
    ],
)  # fmt: skip
def test_a_quantizer_that_makes_no_sense_is_refused_with_its_key(kind, tensor, said):
    message = refusal(changed(**{f"stages__w2a2__quant__{kind}": tensor}))
    assert "stages.w2a2.quant:" in message
    assert said in message


def test_a_rule_whose_method_has_no_such_bits_is_refused_with_its_place():
    rules = [{"match": "head*", "n_bits": 8}, {"match": "*", "n_bits": 4, "method": "ternary"}]
    message = refusal(changed(stages__w2a2__quant__rules=rules))
    assert "stages.w2a2.quant.rules.1" in message
    assert "method ternary takes n_bits 2, not 4" in message


def test_each_method_may_be_the_default_of_weights_beside_8_bit_ends():
    bits = {"lsq": 2, "seq": 2, "ternary": 2, "elastic": 1, "statsq": 3, "bwn": 1}
    for method, n_bits in bits.items():
        quant = {"weight": {"n_bits": n_bits, "method": method}, "activation": {"n_bits": 1, "method": "elastic"}}
        policy = parse_config(changed(stages__w2a2__quant=quant), "inline").stages["w2a2"].quant.policy()
        assert policy.weight_spec("blocks.0.attn.qkv.weight").method == method
        assert policy.weight_spec("head.weight") == QuantSpec(8)
        probs = policy.activation_spec("blocks.0.attn.probs", signed=False, offset=False)
        assert probs.levels == Levels(0, 1)


def test_several_faults_are_all_told_at_once():
    message = refusal(changed(sede=1, stages__w2a2__lr="fast"))
    assert "sede" in message
    assert "stages.w2a2.lr" in message


def test_dotted_overrides_reach_into_stages(recipe_file):
    overrides = {
        "seed": 7,
        "stages.w2a2.steps": 3,
        "stages.w2a2.quant.weight.n_bits": 4,
        "model.kwargs.depth": 1,
        "stages.w2a2.quant.oscillation.freeze.enabled": True,
        "stages.w2a2.quant.rules": [{"match": "head*", "n_bits": 4}],
    }
    config, before = load_config(recipe_file, overrides), load_config(recipe_file)
    stage = config.stages["w2a2"]
    assert (config.seed, stage.steps, stage.quant.weight.n_bits) == (7, 3, 4)
    assert stage.quant.weight.granularity is Granularity.PER_CHANNEL
    assert stage.quant.oscillation.freeze.enabled
    assert config.model.kwargs == {**before.model.kwargs, "depth": 1}
    assert [rule.match for rule in stage.quant.rules] == ["head*"]
    assert config.stages["fp"] == before.stages["fp"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"stages.w2a2.quant.rules.0.n_bits": 4}, r"rules is a list; override it as a whole"),
        ({"seed.value": 4}, r"seed: Input should be a valid integer"),
        ({"model.name.x": 4}, r"model\.name is 'vit_tiny_patch16_224', not a section"),
        ({"stages.w2a2.lrr": 4}, r"stages\.w2a2\.lrr: unknown key"),
    ],
)
def test_an_override_that_fits_nothing_is_an_error_that_names_it(recipe_file, overrides, said):
    with pytest.raises(ConfigError, match=said) as found:
        load_config(recipe_file, overrides)
    assert next(iter(overrides)).split(".")[0] in str(found.value)


@pytest.mark.parametrize(("text", "said"), [("a: [", "is not YAML"), ("- a", "holds no mapping"), ("", "no mapping")])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, said):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as found:
        load_config(str(path))
    assert "odd.yaml" in str(found.value)


def test_a_recipe_that_does_not_exist_is_named_beside_those_that_do():
    with pytest.raises(ConfigError, match="no recipe 'nope'") as found:
        load_config("nope")
    assert all(path.stem in str(found.value) for path in RECIPES.glob("*.yaml"))


def test_the_recipe_fills_what_a_ds_config_leaves_out_or_calls_auto():
    ds_config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    merged = merge_ds_config(ds_config, {"gradient_clipping": 1.0, "bf16": {"enabled": True}, "train_batch_size": 32})
    assert merged == {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "train_batch_size": 32,
    }
    assert ds_config["gradient_clipping"] == "auto"


def test_the_same_value_on_both_sides_is_no_clash():
    merged = merge_ds_config({"train_batch_size": 32, "bf16": {"enabled": True, "x": 1}},
                             {"train_batch_size": 32, "bf16": {"enabled": True}})  # fmt: skip
    assert merged == {"train_batch_size": 32, "bf16": {"enabled": True, "x": 1}}


@pytest.mark.parametrize(
    ("ds_config", "owned", "key"),
    [
        ({"train_batch_size": 64}, {"train_batch_size": 32}, "train_batch_size is 64 .* 32"),
        ({"bf16": {"enabled": False}}, {"bf16": {"enabled": True}}, r"bf16\.enabled is False .* True"),
        ({"bf16": True}, {"bf16": {"enabled": True}}, "bf16 is True"),
    ],
)
def test_a_clash_names_the_key_and_both_values(ds_config, owned, key):
    with pytest.raises(ConfigError, match=key):
        merge_ds_config(ds_config, owned)


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "fp16", "amp"])
def test_what_the_recipe_decides_has_no_place_in_a_ds_config(section):
    with pytest.raises(ConfigError, match=f"ds_config sets '{section}'"):
        merge_ds_config({section: {"type": "Adam"}}, {})


@pytest.mark.parametrize(
    ("text", "said"), [(None, "does not exist"), ("{,}", "is not JSON"), ("[1]", "one JSON object")]
)
def test_a_ds_config_that_cannot_be_read_is_named(tmp_path, text, said):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said) as found:
        load_ds_config(path)
    assert "zero.json" in str(found.value)


def recipe_at(folder, name, text):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def test_a_recipe_is_laid_over_the_one_it_extends(tmp_path):
    path = recipe_at(
        tmp_path, "mine",
        "extends: digits_w2a2\nseed: 7\nstages:\n  w2a2: {quant: {weight: {n_bits: 3}}}\n  w3a3: {init_from: fp, epochs: 1,"
        " batch_size: 32, lr: 1.0e-3}\n",
    )  # fmt: skip
    found, base = load_config(path), load_config("digits_w2a2")
    assert (found.recipe, found.seed) == ("mine", 7)
    assert found.model == base.model
    assert list(found.stages) == ["fp", "w2a2", "w3a3"]
    assert found.stages["w2a2"].quant.weight.n_bits == 3
    assert found.stages["w2a2"].quant.activation == base.stages["w2a2"].quant.activation
    assert found.stages["w2a2"].lr == base.stages["w2a2"].lr


def test_an_override_takes_yamls_words_and_null_drops_a_stage():
    found = load_config("digits_w2a2", {"stages.w2a2.quant.activation.offset": "true", "stages.fp.epochs": 3})
    assert found.stages["w2a2"].quant.activation.offset is True
    assert list(load_config("digits_w2a2", {"stages.w2a2": "null"}).stages) == ["fp"]


def test_a_stage_set_to_null_is_left_out_of_the_recipe_beneath(tmp_path):
    found = load_config(recipe_at(tmp_path, "float_only", "extends: digits_w2a2\nstages: {w2a2: null}\n"))
    assert list(found.stages) == ["fp"]


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("cifar10_oscillation", ["fp", "lsq", "obr", "dampening", "freezing", "cga"]),
        ("cifar10_mckd", ["fp", "dsquant_logits_w2a2"]),
    ],
)
def test_what_is_added_to_the_comparison_is_not_trained_by_recipes_that_extend_it(recipe, stages):
    assert list(load_config(recipe).stages) == stages


def test_a_recipe_that_extends_itself_is_an_error(tmp_path):
    recipe_at(tmp_path, "a", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(recipe_at(tmp_path, "b", "extends: a.yaml\n"))


def test_an_extended_recipe_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recipe 'nonesuch'"):
        load_config(recipe_at(tmp_path, "a", "extends: nonesuch\n"))


def test_a_target_of_no_stage_is_an_error(tmp_path):
    target = "{metric: top1, published: 59.73, source: README of the authors}"
    text = "extends: digits_w2a2\ntargets: {%s: " + target + "}\n"
    assert load_config(recipe_at(tmp_path, "good", text % "w2a2")).targets["w2a2"].measured is None
    with pytest.raises(ConfigError, match=r"targets\.w9a9: no such stage"):
        load_config(recipe_at(tmp_path, "bad", text % "w9a9"))


@pytest.mark.parametrize("stage", ["fp", "w2a2"])
def test_a_stage_may_have_no_steps(stage):
    overrides = {f"stages.{stage}.epochs": None, f"stages.{stage}.steps": 0}
    assert load_config("digits_w2a2", overrides).stages[stage].steps == 0


def test_what_is_inherited_whole_is_not_refitted():
    options = {"stages.w2a2.quant.calibration": {"inherit": "all", "weights": "least_squares"}}
    with pytest.raises(ConfigError, match=r"inherit: all calibrates nothing"):
        load_config("digits_w2a2", options)


def test_a_product_of_weights_has_no_layer_to_refit():
    options = {"stages.w2a2.quant.qk_reparam": True, "stages.w2a2.quant.calibration.weights": "least_squares"}
    with pytest.raises(ConfigError, match=r"calibration\.weights: least_squares .* qk_reparam: false"):
        load_config("digits_w2a2", options)


def with_soft_labels(**overrides):
    """Return the recipe with its last stage taught by stored crops."""
    tree = changed(stages__w2a2__distill={"teacher": "soft_labels"})
    tree["data"] |= {"source": "shards", "train": "t", "val": "v", "augment": "none", "soft_labels": {}}
    for dotted, value in overrides.items():
        section, _, key = dotted.rpartition("__")
        node = tree
        for part in section.split("__"):
            node = node[part]
        node[key] = value
    return tree


def test_a_stage_may_be_taught_by_soft_labels():
    config = parse_config(with_soft_labels(), "inline")
    assert config.data.soft_labels.crops_per_image == 4
    assert config.stages["w2a2"].distill.teacher == "soft_labels"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__augment": "rrc"}, ["data.augment is 'rrc'", "data.soft_labels", "set data.augment: none"]),
        ({"data__source": "digits"}, ["data.soft_labels", "data.source is 'digits'"]),
        ({"data__soft_labels": None}, ["stages.w2a2.distill.teacher is 'soft_labels'", "data.soft_labels"]),
        ({"stages__w2a2__distill": None}, ["data.soft_labels is set", "distill.teacher: soft_labels"]),
        ({"data__soft_labels": {"crops_per_image": 5}}, ["stages.fp.batch_size is 32", "crops_per_image 5"]),
        ({"stages__soft_labels": dict(RECIPE["stages"]["fp"])}, ["stages.soft_labels", "distill.teacher"]),
        ({"data__soft_labels": {"crops": 5}}, ["data.soft_labels.crops: unknown key", "crops_per_image"]),
    ],
)
def test_soft_labels_that_cannot_be_used_as_written_are_refused_with_the_keys_to_change(overrides, words):
    message = refusal(with_soft_labels(**overrides))
    assert all(word in message for word in words), message


def test_no_stage_starts_from_soft_labels():
    message = refusal(with_soft_labels(stages__w2a2__init_from="soft_labels"))
    assert "stages.w2a2.init_from is 'soft_labels'" in message


def test_a_stage_that_is_left_out_takes_its_target_along():
    found = load_config("imagenet_swin_tiny_w2")
    assert list(found.stages) == list(found.targets) == ["fp", "w2a2"]
    assert found.stages["w2a2"] == load_config("imagenet_swin_tiny").stages["w2a2"]
