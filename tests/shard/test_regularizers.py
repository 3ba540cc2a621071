import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsquant.config import ObrConfig
from dsquant.shard.regularizers import (
    bin_index,
    bin_sums,
    divisor,
    in_parts,
    obr_loss,
    regularizer_gradient,
    regularizer_weight,
)
from dsquant.shard.weight_quantizers import make_tiles
from dsquant.spec import Grouping, Levels

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
GROUPINGS = {"tensor": (1, 240), "rows": (12, 20), "qkv": (3, 80), "in heads": (4, 5)}
CUTS = {"whole": (), "halves": (120,), "odd": (7, 131), "many": (1, 2, 95, 96, 239)}


def limits(n_bits):
    return -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1


def loop_loss(w, scales, grouping, n_bits, config):
    """Return the OBR loss of a float64 weight, bin by bin as the paper has it; scales and w_q are constants."""
    qmin, qmax = limits(n_bits)
    group = (torch.arange(w.numel()) // grouping[1]) % grouping[0]
    s = scales.double()[group]
    inside = (w.flatten() >= s * qmin) & (w.flatten() <= s * qmax)
    clipped = torch.where(inside, w.flatten(), (w.detach().flatten() / s).clamp(qmin, qmax) * s)
    codes = (w.detach().flatten() / s).clamp(qmin, qmax).round()
    squared = ((codes * s).detach() - clipped).square()
    rows = squared.view(w.shape[0], -1)
    loss = (
        config.mse_weight
        * {"sum": squared.sum(), "mean": squared.mean(), "kernel_mean": rows.mean(1).sum()}[config.aggregation]
    )
    for g in range(grouping[0]):
        for k in range(qmin, qmax + 1):
            members = clipped[(group == g) & (codes == k)]
            if members.numel() > 1:
                loss = loss + config.variance_weight * members.var(unbiased=True)
    return loss


def prepare(w, scales, grouping, n_bits, start, stop):
    """Return per tile of a fragment: (place, scale, w, codes int8, limits, index)."""
    qmin, qmax = limits(n_bits)
    found = []
    fragment = w.flatten()[start:stop]
    for tile in make_tiles(start, stop - start, Grouping(*grouping), torch.device("cpu")):
        scale, values = scales[tile.groups].unsqueeze(1), tile.of(fragment)
        v = values / scale
        codes = v.clamp(qmin, qmax).round().to(torch.int8)
        found.append((tile, scale, values, codes, (qmin, qmax), bin_index(codes, tile.groups, qmin, 2**n_bits)))
    return found


def closed_form(w, scales, grouping, n_bits, config, *, weight=1.0, cuts=(), start_grad=None):
    """Return the gradient that the shard step adds, with the bins summed over fragments as over ranks."""
    qmin, qmax = limits(n_bits)
    edges = sorted({0, *cuts, w.numel()})
    parts = [prepare(w, scales, grouping, n_bits, *span) for span in pairwise(edges)]
    size = grouping[0] * 2**n_bits
    sums = torch.zeros(2, size, dtype=torch.float64)
    for _, scale, values, _, _, index in (tile for part in parts for tile in part):
        sums += bin_sums(in_parts(values, scale, Levels(qmin, qmax)), index, size)
    grad = torch.zeros(w.numel()) if start_grad is None else start_grad.clone().flatten()
    for begin, part in zip(edges, parts, strict=False):
        own = grad[begin:]
        for tile, scale, values, codes, edges_of, index in part:
            pull = weight * config.mse_weight / divisor(config.aggregation, w.numel(), w.shape[0])
            spread = weight * config.variance_weight
            level, levels = codes.float(), Levels(*edges_of)
            tile.of(own).add_(regularizer_gradient(values, scale, level, levels, index, sums, pull, spread))
    return grad.view(w.shape)


def random_case(n_bits, grouping):
    torch.manual_seed(n_bits)
    w = torch.randn(12, 20)
    return w, (torch.rand(grouping[0]) * 0.5 + 0.75) * 3 / 2**n_bits  # some weights clipped, all bins in use


def autograd(w, scales, grouping, n_bits, config):
    w = w.double().requires_grad_()
    loop_loss(w, scales, grouping, n_bits, config).backward()
    return w.grad


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_golden_loss_and_bin_counts(n_bits):
    golden = GOLDEN["obr"][str(n_bits)]
    w, (qmin, qmax) = torch.tensor(GOLDEN["input"]["w"], dtype=torch.float64), limits(n_bits)
    clipped, codes = w.clamp(0.1 * qmin, 0.1 * qmax), (w / 0.1).clamp(qmin, qmax).round()
    index = bin_index(codes.view(1, -1), torch.zeros(1, dtype=torch.int64), qmin, 2**n_bits).view(-1)
    assert bin_sums(clipped, index, 2**n_bits)[0].tolist() == golden["count"]
    for aggregation in ("mean", "sum"):
        loss = obr_loss(clipped, codes * 0.1, index, 2**n_bits, ObrConfig(aggregation=aggregation))
        assert loss.dtype is torch.float64
        assert float(loss) == pytest.approx(golden[f"mse_{aggregation}"] + golden["var_sum"], rel=1e-12)


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("cuts", [(), (5,), (3, 8)], ids=len)
def test_golden_gradient(n_bits, cuts):
    """`sum` differs from the golden `mean` by the factor N of its first term, 2 (w - s k) where w is not clipped."""
    golden, lsq = GOLDEN["obr"][str(n_bits)], GOLDEN[f"lsq_w{n_bits}"]
    w, scale = torch.tensor(GOLDEN["input"]["w"]), torch.tensor([GOLDEN["input"]["alpha"]])
    mean = torch.tensor(golden["grad_mean"])
    unclipped = torch.tensor([g != 0 for g in lsq["grad_w"]])
    expected = {"mean": mean, "sum": mean + 2 * (w - torch.tensor(lsq["y"])) * (1 - 1 / 14) * unclipped}
    for aggregation, wanted in expected.items():
        found = closed_form(w, scale, (1, 14), n_bits, ObrConfig(aggregation=aggregation), cuts=cuts)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("aggregation", ["sum", "mean", "kernel_mean"])
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_the_closed_form_is_the_gradient_of_the_loop_over_bins(n_bits, aggregation, grouping, cuts):
    w, scales = random_case(n_bits, grouping)
    config = ObrConfig(aggregation=aggregation)
    expected = autograd(w, scales, grouping, n_bits, config)
    found = closed_form(w, scales, grouping, n_bits, config, cuts=cuts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(("mse", "variance"), [(0.0, 1.0), (1.0, 0.0), (3.0, 0.5)])
def test_each_term_has_its_weight(mse, variance):
    w, scales = random_case(3, GROUPINGS["qkv"])
    config = ObrConfig(aggregation="mean", mse_weight=mse, variance_weight=variance)
    expected = autograd(w, scales, GROUPINGS["qkv"], 3, config)
    found = closed_form(w, scales, GROUPINGS["qkv"], 3, config, cuts=(50,))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("grouping", [GROUPINGS["tensor"], GROUPINGS["rows"]], ids=["tensor", "rows"])
def test_clipped_weights_get_no_gradient_and_still_count_in_their_bin(grouping):
    w, scales = random_case(2, grouping)
    s = scales[(torch.arange(240) // grouping[1]) % grouping[0]].view(w.shape)
    clipped = (w > s) | (w < -2 * s)
    assert 10 < int(clipped.sum()) < 200
    found = closed_form(w, scales, grouping, 2, ObrConfig())
    assert torch.equal(found[clipped], torch.zeros(int(clipped.sum())))
    assert bool((found[~clipped] != 0).all())


def test_a_weight_alone_in_its_bin_is_drawn_to_the_bin_centre_only():
    found = closed_form(torch.tensor([0.3, 2.25]), torch.tensor([1.0]), (1, 2), 3, ObrConfig())
    torch.testing.assert_close(found, torch.tensor([2 * 0.3, 2 * 0.25]))


def test_the_gradient_is_added_with_its_weight_to_what_is_there():
    w, scales = random_case(2, GROUPINGS["tensor"])
    start = torch.randn(12, 20)
    plain = closed_form(w, scales, GROUPINGS["tensor"], 2, ObrConfig())
    found = closed_form(w, scales, GROUPINGS["tensor"], 2, ObrConfig(), weight=0.01, start_grad=start)
    torch.testing.assert_close(found - start, 0.01 * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_the_loss_is_that_of_the_loop_over_bins(grouping):
    w, scales = random_case(3, grouping)
    w, scales = w.double(), scales.double()
    group = ((torch.arange(240) // grouping[1]) % grouping[0]).view(w.shape)
    s = scales[group]
    clipped, codes = w.clamp(-4 * s, 3 * s), (w / s).clamp(-4, 3).round()
    index = (group * 8 + codes.long() + 4).flatten()
    for aggregation in ("sum", "mean"):
        config = ObrConfig(aggregation=aggregation)
        loss = obr_loss(clipped.flatten(), (codes * s).flatten(), index, grouping[0] * 8, config)
        assert float(loss) == pytest.approx(float(loop_loss(w, scales, grouping, 3, config)), rel=1e-12)


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_bin_sums_of_fragments_add_up_to_those_of_the_whole(grouping):
    w, scales = random_case(4, grouping)
    size = grouping[0] * 16
    group = (torch.arange(240) // grouping[1]) % grouping[0]
    codes = (w.flatten() / scales[group]).clamp(-8, 7).round().long()
    expected = torch.zeros(2, size, dtype=torch.float64)
    for g, k, value in zip(group.tolist(), codes.tolist(), w.flatten().tolist(), strict=True):
        expected[:, g * 16 + k + 8] += torch.tensor([1.0, value], dtype=torch.float64)
    for cuts in CUTS.values():
        found = torch.zeros_like(expected)
        for span in pairwise(sorted({0, *cuts, 240})):
            for _, _, values, _, _, index in prepare(w, scales, grouping, 4, *span):
                found += bin_sums(values, index, size)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=1e-14)


def test_parts_of_a_scale_add_up_to_the_same_bits_in_any_order():
    """So that a bin's mean does not depend on how ZeRO cuts a weight."""
    torch.manual_seed(0)
    w, scale = torch.randn(1, 4096) * 0.3, torch.tensor([[0.17]])
    parts = in_parts(w, scale, Levels(-2, 1))
    assert torch.equal(parts, parts.round())
    torch.testing.assert_close(parts * scale / 2**22, w.clamp(-2 * scale, scale), rtol=0, atol=float(scale) * 2**-22)
    index, shuffled = torch.zeros(4096, dtype=torch.int64), torch.randperm(4096)
    assert torch.equal(bin_sums(parts, index, 1), bin_sums(parts[:, shuffled], index, 1))
    unbounded, odd = Levels(0, 1, reach=math.inf), torch.tensor([[300.0, -300.0]])
    assert in_parts(odd, torch.ones(1, 1), unbounded).tolist() == [[15 * 2.0**22, -15 * 2.0**22]]
    assert in_parts(odd, torch.ones(1, 1), Levels(-128, 127)).tolist() == [[127 * 2.0**22, -128 * 2.0**22]]


@pytest.mark.parametrize(
    ("epoch", "expected", "half_digit"),
    [(0, 0, 0), (36, 0, 0), (37.4, 0, 0), (40, 1e-5, 5e-6), (60, 9.5e-4, 5e-6), (80, 3.1e-3, 5e-5), (100, 5.9e-3, 5e-5),
     (120, 8.35e-3, 5e-6), (140, 9.8e-3, 6e-5), (149, 0.01, 5e-6), (150, 0.01, 1e-12)],
)  # fmt: skip
def test_the_schedule_is_that_of_the_authors_code(epoch, expected, half_digit):
    """lambda(t) = 0.01 + (0 - 0.01) / 2 * (1 + cos(pi (t - T/4) / (3T/4))) from a quarter of T = 150 on."""
    found = regularizer_weight(ObrConfig(weight=0.01, start=0.25), epoch / 150)
    assert found == pytest.approx(expected, abs=half_digit)
    if epoch >= 37.5:
        formula = 0.01 + 0.5 * (0 - 0.01) * (1 + math.cos(math.pi * (epoch - 37.5) / 112.5))
        assert found == pytest.approx(formula, rel=1e-9)


def test_the_schedule_ends_at_its_weight_wherever_it_starts():
    for start in (0.0, 0.5, 1.0):
        assert regularizer_weight(ObrConfig(weight=0.2, start=start), 1.5) == pytest.approx(0.2)
    assert regularizer_weight(ObrConfig(weight=0.0, start=0.0), 1.0) == 0
