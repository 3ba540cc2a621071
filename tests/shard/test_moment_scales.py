"""Scales and centres from sums of |w|, w and w^2: golden vectors of StatsQ and BWN, formulas, and any slicing."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsquant.quant.modules import mdq_grad_scale
from dsquant.shard.fragments import Fragment
from dsquant.shard.weight_quantizers import ShardedWeight, moment_scales
from dsquant.spec import Grouping, QuantSpec, WeightSite

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
W = torch.tensor(GOLDEN["input"]["w"])
CUTS = [(), (6,), (1, 5, 11)]


def shards(w, spec, grouping, cuts=()):
    """Cut a weight into fragments, each in a flat of its own between strange elements; scales and centres are not set."""
    site = WeightSite("w", tuple(w.shape), spec, Grouping(*grouping))
    scale, centre = torch.full((grouping[0],), 7.0), torch.zeros(grouping[0]) if spec.has_centre else None
    made = []
    for start, stop in pairwise(sorted({0, *cuts, w.numel()})):
        flat = torch.cat([torch.full((3,), 1e3), w.flatten()[start:stop], torch.full((2,), 1e3)])
        fragment = Fragment("w", flat, 3, stop - start, start, tuple(w.shape))
        made.append(ShardedWeight(site, scale, fragment, centre))
    return made


def take(parts, rule):
    """Set scale and centre of all parts from their summed moments, as the ranks that own them would."""
    sums = sum(part.moment_sums() for part in parts)
    scale, mean = moment_scales(parts[0], sums, rule)
    for part in parts:
        part.replicated_scale.copy_(scale)
        if part.replicated_centre is not None:
            part.replicated_centre.copy_(mean)
    return scale, mean


def images(parts, shape):
    found = []
    for part in parts:
        for tile in part.tiles:
            scale = part.scales()[tile.groups].unsqueeze(1)
            found.append(part.image_tile(tile, tile.of(part.fragment.values), scale)[1].flatten())
    return torch.cat(found).view(shape)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_golden_statsq_by_rows(n_bits, cuts):
    """The golden scale is 2 mean|w|; ours is the distance of two levels, 2^(b-1) times less."""
    golden, w = GOLDEN["statsq"][str(n_bits)], W[:12].view(2, 6)
    parts = shards(w, QuantSpec(n_bits, method="statsq", granularity="per_channel"), (2, 6), cuts)
    scale, _ = take(parts, "statistic")
    torch.testing.assert_close(scale * 2 ** (n_bits - 1), torch.tensor(golden["scale"]))
    torch.testing.assert_close(images(parts, w.shape), torch.tensor(golden["y"]))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_golden_bwn(cuts):
    golden = GOLDEN["bwn"]
    parts = shards(W, QuantSpec(1, method="bwn"), (1, 14), cuts)
    scale, mean = take(parts, "statistic")
    assert scale.item() / 2 == pytest.approx(golden["scale"], rel=1e-6)
    assert mean.item() == pytest.approx(golden["mean"], rel=1e-6)
    torch.testing.assert_close(images(parts, W.shape), torch.tensor(golden["y"]))


def test_a_binary_weight_is_decided_around_its_mean_and_its_image_is_not_moved_by_it():
    w = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-1.0, -1.0, -1.0, 5.0]])
    parts = shards(w, QuantSpec(1, method="bwn", granularity="per_channel"), (2, 4))
    scale, mean = take(parts, "statistic")
    assert (scale.tolist(), mean.tolist()) == ([6.0, 4.0], [3.0, 0.5])
    expected = [[-3.0, -3.0, 3.0, 3.0], [-2.0, -2.0, -2.0, 2.0]]  # 3 is its row's mean: on the boundary, up
    assert images(parts, w.shape).tolist() == expected


@pytest.mark.parametrize(
    ("rule", "spec", "formula"),
    [
        ("lsq", QuantSpec(2), lambda w: 2 * w.abs().mean() / 1),
        ("lsq", QuantSpec(4), lambda w: 2 * w.abs().mean() / 7**0.5),
        ("lsq", QuantSpec(1, method="elastic"), lambda w: 2 * w.abs().mean()),  # alpha = mean|w|, as BWN has it
        ("lsq_plus", QuantSpec(3), lambda w: max(abs(w.mean() - 3 * sigma(w)), abs(w.mean() + 3 * sigma(w))) / 4),
        ("lsq_plus", QuantSpec(2, method="seq"), lambda w: abs(w.mean() + 3 * sigma(w)) / 2),
        ("statistic", QuantSpec(4, method="statsq"), lambda w: 2 * w.abs().mean() / 8),
    ],
)
def test_each_rule_is_its_formula_in_each_group(rule, spec, formula):
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, _ = take(shards(w, spec, (3, 16), (5, 31)), rule)
    expected = [formula(group).item() for group in w.double().view(3, 16)]
    assert scale.tolist() == pytest.approx(expected, rel=1e-6)


def sigma(w):
    return w.std(unbiased=False)


@pytest.mark.parametrize("rule", ["lsq", "lsq_plus", "statistic"])
def test_scales_of_a_split_weight_are_those_of_the_whole_to_the_last_bit(rule):
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)) * 0.05
    spec = QuantSpec(2, method="statsq")
    whole = take(shards(w, spec, (3, 320)), rule)
    for cuts in ((480,), (1, 500), (123, 700, 960)):
        assert all(torch.equal(a, b) for a, b in zip(take(shards(w, spec, (3, 320), cuts), rule), whole, strict=True))


def test_a_rank_that_owns_nothing_adds_nothing_to_the_moments():
    site = WeightSite("w", (2, 6), QuantSpec(2, method="statsq"), Grouping(2, 6))
    assert torch.equal(ShardedWeight(site, torch.ones(2), None).moment_sums(), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_golden_mdq_factor(n_bits):
    (part,) = shards(W, QuantSpec(n_bits), (1, 14))
    norm = part.moment_sums()[:, 0]
    expected = GOLDEN[f"lsq_w{n_bits}"]["mdq_grad_scale"]
    assert mdq_grad_scale(norm, part.site.spec.grad_qmax).tolist() == pytest.approx([expected], rel=1e-6)
