from functools import partial
from itertools import pairwise
from math import inf

import pytest

from dsquant.errors import ConfigError
from dsquant.spec import Bias, Granularity, Grouping, Method, PolicyRule, QuantSpec, SitePolicy, qrange

SITES = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"]


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_the_range_has_two_to_the_n_codes_and_zero_among_them(n_bits):
    for signed in (True, False):
        qmin, qmax = qrange(n_bits, signed)
        assert qmax - qmin + 1 == 2**n_bits
        assert qmin <= 0 < qmax
        spec = QuantSpec(n_bits, signed=signed)
        assert (spec.qmin, spec.qmax) == (qmin, qmax)


@pytest.mark.parametrize(
    ("n_bits", "signed", "expected"),
    [(2, True, (-2, 1)), (3, True, (-4, 3)), (4, True, (-8, 7)), (8, True, (-128, 127)),
     (2, False, (0, 3)), (3, False, (0, 7)), (4, False, (0, 15)), (8, False, (0, 255))],
)  # fmt: skip
def test_the_range_is_that_of_lsq(n_bits, signed, expected):
    assert qrange(n_bits, signed) == expected


@pytest.mark.parametrize("n_bits", [-1, 0, 9, 16])
def test_a_number_of_bits_outside_1_to_8_is_refused_by_name(n_bits):
    for build in (lambda: qrange(n_bits, True), lambda: QuantSpec(n_bits)):
        with pytest.raises(ConfigError, match=f"n_bits is {n_bits}.*1 to 8"):
            build()


def test_a_granularity_a_method_and_a_bias_may_be_given_by_their_names():
    spec = QuantSpec(1, granularity="per_head", method="elastic", bias="around")
    assert (spec.granularity, spec.method, spec.bias) == (Granularity.PER_HEAD, Method.ELASTIC, Bias.AROUND)


@pytest.mark.parametrize(
    ("method", "n_bits", "signed", "grid", "edges"),
    [
        ("lsq", 2, True, [-2, -1, 0, 1], (-2, 1)),
        ("lsq", 3, False, [0, 1, 2, 3, 4, 5, 6, 7], (0, 7)),
        ("lsq", 1, False, [0, 1], (0, 1)),
        ("seq", 2, True, [-1.5, -0.5, 0.5, 1.5], (-2, 2)),
        ("seq", 1, True, [-0.5, 0.5], (-1, 1)),
        ("ternary", 2, True, [-1, 0, 1], (-1.5, 1.5)),
        ("elastic", 1, True, [-0.5, 0.5], (-0.5, 0.5)),
        ("elastic", 1, False, [0, 1], (0, 1)),
        ("statsq", 2, True, [-1.5, -0.5, 0.5, 1.5], (-inf, inf)),
        ("bwn", 1, True, [-0.5, 0.5], (-inf, inf)),
    ],
)
def test_each_method_has_its_levels_and_passes_the_gradient_as_far_as_it_says(method, n_bits, signed, grid, edges):
    levels = QuantSpec(n_bits, signed=signed, method=method).levels
    assert [code + levels.shift for code in range(levels.qmin, levels.qmax + 1)] == grid
    assert (levels.low, levels.high) == edges
    assert levels.elastic == (method == "elastic" and signed)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"n_bits": 1}, "1 bit has no signed lsq levels; use method elastic"),
        ({"n_bits": 2, "method": "bwn"}, "method bwn takes n_bits 1, not 2"),
        ({"n_bits": 4, "method": "ternary"}, "method ternary takes n_bits 2, not 4"),
        ({"n_bits": 2, "method": "statsq", "signed": False}, "method statsq is for signed tensors"),
    ],
)
def test_a_spec_without_a_grid_is_refused(spec, said):
    with pytest.raises(ConfigError, match=said):
        QuantSpec(**spec)


def test_only_what_the_rules_come_to_has_to_make_sense():
    binary = QuantSpec(1, method="elastic")
    ends = [PolicyRule("head*", {"n_bits": 8}), PolicyRule("head*", {"method": "lsq"})]
    assert SitePolicy(binary, binary, ends).weight_spec("head.weight") == QuantSpec(8)
    with pytest.raises(
        ConfigError, match=r"head\.weight, by the quant rules \['head\*'\]: method elastic takes n_bits 1"
    ):
        SitePolicy(binary, binary, ends[:1]).weight_spec("head.weight")


def test_a_bias_of_all_activations_reaches_inputs_of_linear_layers_only():
    policy = SitePolicy(QuantSpec(2), QuantSpec(2, bias="before"))
    for linear, bias in ((True, Bias.BEFORE), (False, Bias.NONE)):
        assert policy.activation_spec("x", signed=True, offset=False, linear=linear).bias is bias


@pytest.mark.parametrize(
    ("site", "changes", "said"),
    [
        ("blocks.0.attn.q", {"bias": "around"}, r"gives blocks\.0\.attn\.q a bias; only inputs of linear layers"),
        ("blocks.0.attn.q", {"method": "statsq"}, r"blocks\.0\.attn\.q is an activation and statsq is for weights"),
        ("fc1.weight", {"bias": "before"}, r"gives fc1\.weight an offset or a bias"),
        ("fc1.weight", {"offset": True}, r"gives fc1\.weight an offset or a bias"),
    ],
)
def test_a_rule_that_gives_a_site_what_it_cannot_have_is_refused_by_its_name(site, changes, said):
    policy = SitePolicy(QuantSpec(2), QuantSpec(2), [PolicyRule(site, changes)])
    of_activation = partial(policy.activation_spec, signed=True, offset=False)
    resolve = policy.weight_spec if site.endswith("weight") else of_activation
    with pytest.raises(ConfigError, match=said):
        resolve(site)


def test_a_grouping_that_leaves_a_part_group_is_refused():
    Grouping(3, 4).check((6, 4))
    with pytest.raises(ConfigError, match=r"3 groups of 5 elements.*\(6, 4\)"):
        Grouping(3, 5).check((6, 4))


def policy(*rules):
    return SitePolicy(QuantSpec(2), QuantSpec(3), [PolicyRule(match, changes, **kw) for match, changes, kw in rules])


def test_rules_apply_in_order_and_the_last_word_wins():
    resolve = policy(("blocks.*", {"n_bits": 4, "lr_scale": 0.5}, {}), ("*.fc1.weight", {"n_bits": 3}, {}))
    specs = [resolve.weight_spec(name) for name in SITES]
    assert [spec.n_bits for spec in specs] == [2, 4, 3, 3]
    assert [spec.lr_scale for spec in specs] == [1.0, 0.5, 0.5, 0.5]
    resolve.finish()


def test_a_rule_can_leave_sites_in_float_and_a_later_one_can_take_them_back():
    resolve = policy(("blocks.*", {}, {"quantize": False}), ("blocks.1.*", {"n_bits": 8}, {}))
    assert [spec and spec.n_bits for spec in map(resolve.weight_spec, SITES)] == [2, None, None, 8]


def test_a_rule_that_matches_no_site_is_an_error_that_names_it_and_some_sites():
    resolve = policy(("blocks.*", {}, {}), ("layers.*", {"n_bits": 8}, {}))
    for name in SITES:
        resolve.weight_spec(name)
    with pytest.raises(ConfigError, match=r"'layers\.\*' matches no site.*patch_embed\.proj\.weight"):
        resolve.finish()


def test_the_sign_of_an_activation_is_that_of_its_site():
    resolve = policy(("probs", {"n_bits": 8}, {}))
    assert resolve.activation_spec("x", signed=True, offset=False) == QuantSpec(3)
    assert resolve.activation_spec("probs", signed=False, offset=False) == QuantSpec(8, signed=False)


def test_an_activation_has_an_offset_by_its_site_or_by_the_policy_unless_a_rule_says_no():
    plain = policy(("no.offset", {"offset": False}, {}))
    assert plain.activation_spec("gelu", signed=False, offset=True).offset
    assert not plain.activation_spec("ln", signed=True, offset=False).offset
    assert not plain.activation_spec("no.offset", signed=False, offset=True).offset
    everywhere = SitePolicy(QuantSpec(2), QuantSpec(2, offset=True))
    assert everywhere.activation_spec("ln", signed=True, offset=False).offset


def test_more_bits_only_add_codes_at_both_ends():
    for signed in (True, False):
        ranges = [qrange(n_bits, signed) for n_bits in range(2, 9)]
        assert all(b[0] <= a[0] and a[1] < b[1] for a, b in pairwise(ranges))
