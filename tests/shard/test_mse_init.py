import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsquant.shard.fragments import Fragment
from dsquant.shard.weight_quantizers import ShardedWeight, mse_scales
from dsquant.spec import Grouping, QuantSpec, WeightSite

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
BITS = [2, 3, 4, 8]
FLOOR = 1e-6
GROUPINGS = {"tensor": (1, 960), "rows": (24, 40), "qkv": (3, 320), "in heads": (4, 10)}


class Ranks:
    """Reduce over threads as `all_reduce` does over processes: every rank gets the same sum, added in rank order."""

    def __init__(self, count):
        self.count, self.barrier, self.given = count, threading.Barrier(count, timeout=20), [None] * count

    def reduce(self, rank, values, how):
        self.given[rank] = values
        self.barrier.wait()
        result = how(torch.stack(self.given))
        self.barrier.wait()
        return result

    def scales(self, weights_of_rank):
        """Run `mse_scales` on every rank at once; return what each found."""

        def run(rank):
            try:
                return mse_scales(
                    weights_of_rank[rank],
                    lambda v: self.reduce(rank, v, lambda all_: all_.sum(0)),
                    lambda v: self.reduce(rank, v, lambda all_: all_.amax(0)),
                    FLOOR,
                )
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(run, range(self.count)))


def site(w, n_bits, grouping):
    return WeightSite("w", tuple(w.shape), QuantSpec(n_bits), Grouping(*grouping))


def part_of(w, n_bits, grouping, start, stop):
    """Return the part [start, stop) of a weight in a flat shard of its own, or the part of a rank that owns nothing."""
    fragment = None
    if stop > start:
        flat = torch.cat([torch.full((5,), 7e3), w.flatten()[start:stop], torch.full((2,), 7e3)])
        fragment = Fragment("w", flat, 5, stop - start, start, tuple(w.shape))
    return ShardedWeight(site(w, n_bits, grouping), torch.zeros(grouping[0]), fragment)


def unsplit(w, n_bits, grouping):
    (scale,) = Ranks(1).scales([[part_of(w, n_bits, grouping, 0, w.numel())]])[0]
    return scale


def lloyd(values, n_bits):
    """Return the scale of the method in float64: s0 = max|w| / qmax, then s = <w, q> / <q, q> until it settles."""
    values, half = values.double(), 2 ** (n_bits - 1)
    s = values.abs().max() / (half - 1)
    while True:
        q = (values / s).clamp(-half, half - 1).round()
        new = (values * q).sum() / (q * q).sum()
        if abs(new - s) < 1e-5 * s:
            return float(new)
        s = new


def group_values(w, grouping):
    group = (torch.arange(w.numel()) // grouping[1]) % grouping[0]
    return [w.flatten()[group == g] for g in range(grouping[0])]


@pytest.mark.parametrize("n_bits", BITS)
def test_golden_scales(n_bits):
    scale = unsplit(torch.tensor(GOLDEN["input"]["w"]), n_bits, (1, 14))
    assert scale.dtype is torch.float32
    assert float(scale) == pytest.approx(GOLDEN["mse_init"][str(n_bits)], rel=1e-6)


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_each_group_gets_the_scale_of_the_method(n_bits, grouping):
    torch.manual_seed(n_bits)
    w = torch.randn(24, 40) * torch.linspace(0.02, 0.2, 24)[:, None]
    expected = [lloyd(values, n_bits) for values in group_values(w, grouping)]
    assert unsplit(w, n_bits, grouping).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_bits", BITS)
def test_the_scale_is_a_fixed_point_and_better_than_where_it_began(n_bits):
    torch.manual_seed(0)
    w = torch.randn(24, 40)
    scale, half = unsplit(w, n_bits, GROUPINGS["tensor"]).double(), 2 ** (n_bits - 1)

    def error(s):
        return ((w.double() / s).clamp(-half, half - 1).round() * s - w).square().sum()

    q = (w.double() / scale).clamp(-half, half - 1).round()
    torch.testing.assert_close((w * q).sum() / q.square().sum(), scale.squeeze(), rtol=2e-5, atol=0)
    assert error(scale) < error(w.double().abs().max() / (half - 1))


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("cuts", [(480,), (1, 500), (0, 333), (123, 960), (40, 41, 42)], ids=str)
def test_the_scales_of_a_split_weight_are_those_of_the_whole_to_the_last_bit(n_bits, grouping, cuts):
    torch.manual_seed(n_bits)
    w = torch.randn(24, 40) * 0.05
    edges = [0, *cuts, w.numel()]
    ranks = [[part_of(w, n_bits, grouping, *span)] for span in pairwise(edges)]
    whole = unsplit(w, n_bits, grouping)
    for (scale,) in Ranks(len(ranks)).scales(ranks):
        assert torch.equal(scale, whole)


def test_a_weight_gets_the_same_scale_alone_and_among_others():
    torch.manual_seed(0)
    weights = [torch.randn(24, 40) * s for s in (0.01, 1.0, 30.0)]
    together = Ranks(1).scales([[part_of(w, b, (3, 320), 0, 960) for w, b in zip(weights, (2, 8, 4), strict=True)]])[0]
    for scale, w, n_bits in zip(together, weights, (2, 8, 4), strict=True):
        assert torch.equal(scale, unsplit(w, n_bits, (3, 320)))


def test_a_group_of_zeros_gets_the_floor_and_leaves_the_others_alone():
    torch.manual_seed(0)
    w = torch.randn(24, 40)
    w[5] = 0
    scale = unsplit(w, 2, GROUPINGS["rows"])
    assert scale[5] == torch.tensor(FLOOR)
    assert scale.isfinite().all()
    assert scale[:5].tolist() == pytest.approx([lloyd(row, 2) for row in w[:5]], rel=1e-6)
