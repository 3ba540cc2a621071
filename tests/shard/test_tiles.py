import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsquant.quant.modules import lsq_grad_scale
from dsquant.shard.fragments import Fragment, part_of
from dsquant.shard.oscillation import TrackerState
from dsquant.shard.weight_quantizers import ShardedWeight, make_tiles
from dsquant.spec import Grouping, QuantSpec, WeightSite

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
CPU = torch.device("cpu")
# per tensor, per channel, q/k/v of a fused projection, heads along the rows, heads along the columns of a (6, 8) weight
GROUPINGS = {"tensor": (1, 48), "rows": (6, 8), "qkv": (3, 16), "out heads": (2, 24), "in heads": (2, 4)}


@st.composite
def fragments(draw):
    """Return a Grouping, the numel of a weight that it divides, and sorted cuts of [0, numel] into fragments."""
    n_groups, inner, cycles = (draw(st.integers(1, most)) for most in (5, 7, 4))
    numel = n_groups * inner * cycles
    cuts = draw(st.lists(st.integers(0, numel), max_size=4))
    return Grouping(n_groups, inner), numel, sorted([0, numel, *cuts])


def spans(cuts):
    return list(pairwise(cuts))


@settings(max_examples=300, deadline=None)
@given(fragments())
def test_tiles_cover_every_element_once_with_its_group(case):
    grouping, numel, cuts = case
    covered = []
    for start, stop in spans(cuts):
        fragment = torch.arange(start, stop)  # each value is its own index in the weight
        for tile in make_tiles(start, stop - start, grouping, CPU):
            rows = tile.of(fragment)
            assert rows.shape == tile.shape
            assert rows.data_ptr() == fragment[tile.start :].data_ptr()
            expected = (rows // grouping.inner) % grouping.n_groups
            assert torch.equal(expected, tile.groups.unsqueeze(1).expand_as(rows))
            covered += rows.flatten().tolist()
    assert covered == list(range(numel))


@settings(max_examples=50, deadline=None)
@given(fragments())
def test_a_fragment_is_at_most_three_tiles(case):
    grouping, _, cuts = case
    for start, stop in spans(cuts):
        assert len(make_tiles(start, stop - start, grouping, CPU)) <= 3


def site(n_bits=2, grouping=GROUPINGS["tensor"], shape=(6, 8)):
    return WeightSite("w", shape, QuantSpec(n_bits), Grouping(*grouping))


def shards(weight_site, w, scale, cuts=None, pad=3, codes=None):
    """Cut w into fragments, each inside a flat of its own with `pad` strange elements before and after."""
    made = []
    for start, stop in spans(sorted({0, w.numel(), *(cuts or ())})):
        flat = torch.cat([torch.full((pad,), 1e3), w.flatten()[start:stop], torch.full((pad,), 1e3)])
        shard = ShardedWeight(weight_site, scale, Fragment("w", flat, pad, stop - start, start, tuple(w.shape)))
        if codes is not None:
            shard.tracker = TrackerState.start(codes.flatten()[start:stop].clone(), freeze=False)
        made.append(shard)
    return made


def group_of(w, grouping):
    return (torch.arange(w.numel()).view(w.shape) // grouping[1]) % grouping[0]


def straight_through(v, qmin, qmax):
    """Round and clip v; its gradient is 1 on [qmin, qmax], both edges included (`clamp`'s own is 0 there in some torch)."""
    inside = (v >= qmin) & (v <= qmax)
    return v.clamp(qmin, qmax).round().detach() + torch.where(inside, v - v.detach(), 0.0)


def oracle(w, scale, grouping, n_bits, grad):
    """Return float64 image, codes, d w and d scale: in-forward LSQ by plain autograd, straight-through written out."""
    w, scale = w.double().requires_grad_(), scale.double().requires_grad_()
    s, half = scale[group_of(w, grouping)], 2 ** (n_bits - 1)
    codes = straight_through(w / s, -half, half - 1)
    image = codes * s
    d_w, d_scale = torch.autograd.grad(image, (w, scale), grad.double())
    return image.detach(), codes.detach(), d_w, d_scale


def lsq(parts, grad):
    """Return the masked gradient and the summed d scale of fragments."""
    masked, total, start = [], 0, 0
    for part in parts:
        numel = part.fragment.numel
        own = grad.flatten()[start : start + numel].clone()
        start += numel

        def rows_of(tile, part=part, own=own):
            scale = part.scales()[tile.groups].unsqueeze(1)
            rows = part.lsq_tile(tile, tile.of(part.fragment.values), tile.of(own), scale)
            return rows.unsqueeze(1)

        total = total + part.group_sums(rows_of)
        masked.append(own)
    return torch.cat(masked).view(grad.shape), total.squeeze(1)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("cuts", [(), (20,), (5, 31), (1, 2, 47)], ids=len)
def test_images_and_gradients_on_fragments_are_those_of_lsq_in_the_forward_pass(n_bits, grouping, cuts):
    torch.manual_seed(n_bits)
    w, grad = torch.randn(6, 8), torch.randn(6, 8)
    scale = (torch.rand(grouping[0]) + 0.5) * 2 / 2**n_bits
    image, codes, d_w, d_scale = oracle(w, scale, grouping, n_bits, grad)
    parts = shards(site(n_bits, grouping), w, scale, cuts, codes=codes)
    found, found_codes = [], []
    for part in parts:
        for tile in part.tiles:
            latent = tile.of(part.fragment.values)
            tile_codes, tile_image = part.image_tile(tile, latent, scale[tile.groups].unsqueeze(1))
            found_codes.append(tile_codes.flatten())
            found.append(tile_image.flatten())
    assert torch.equal(torch.cat(found_codes).double(), codes.flatten())
    torch.testing.assert_close(torch.cat(found).double(), image.flatten(), rtol=1e-6, atol=1e-7)
    found_w, found_scale = lsq(parts, grad)
    assert found_scale.dtype is torch.float64
    torch.testing.assert_close(found_w.double(), d_w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_scale, d_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_the_summed_scale_gradient_does_not_show_the_slicing(grouping):
    torch.manual_seed(0)
    w, grad, scale = torch.randn(6, 8), torch.randn(6, 8), torch.rand(grouping[0]) + 0.5
    codes = oracle(w, scale, grouping, 3, grad)[1]
    whole_masked, whole = lsq(shards(site(3, grouping), w, scale, codes=codes), grad)
    for cuts in ((24,), (7, 9), (1, 15, 16, 40)):
        masked, total = lsq(shards(site(3, grouping), w, scale, cuts, codes=codes), grad)
        assert torch.equal(total.float(), whole.float())
        assert torch.equal(masked, whole_masked)


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("cuts", [(), (4, 9)], ids=len)
def test_golden_vectors_of_weights(n_bits, cuts):
    """At the one tie of 2 bits, -0.2 / 0.1, the gradient passes in full; the golden vector has half of it."""
    golden = GOLDEN[f"lsq_w{n_bits}"]
    grad_w, grad_alpha = list(golden["grad_w"]), golden["grad_alpha"]
    if n_bits == 2:
        grad_w[1], grad_alpha = -1.0, 0.624
    w, grad, alpha = (torch.tensor(GOLDEN["input"][key]) for key in ("w", "grad_out", "alpha"))
    codes = (torch.tensor(golden["y"]) / alpha).round()
    parts = shards(site(n_bits, (1, 14), (14,)), w, alpha.view(1), cuts, codes=codes)
    found_w, found_scale = lsq(parts, grad)
    torch.testing.assert_close(found_w, torch.tensor(grad_w), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_scale.float(), torch.tensor([grad_alpha]), rtol=1e-5, atol=2e-6)
    assert lsq_grad_scale(14, 2 ** (n_bits - 1) - 1) == pytest.approx(golden["lsq_grad_scale"], rel=1e-12)


def test_nothing_outside_its_fragment_is_touched():
    w, scale = torch.randn(6, 8), torch.tensor([0.5])
    (part,) = shards(site(), w, scale, codes=torch.zeros(6, 8))
    for tile in part.tiles:
        tile.of(part.fragment.values).zero_()
    flat = part.fragment.flat
    assert flat[:3].tolist() == flat[-3:].tolist() == [1e3] * 3
    assert flat[3:-3].abs().sum() == 0


def test_a_rank_that_owns_nothing_of_a_weight_adds_nothing_to_its_sums():
    part = ShardedWeight(site(2, GROUPINGS["rows"]), torch.ones(6), None)
    assert part.tiles == []
    assert part.absolute_max().tolist() == [0.0] * 6
    assert torch.equal(part.mse_sums(torch.ones(6)), torch.zeros(6, 2, dtype=torch.float64))
    assert torch.equal(part.statistics(None, 0.005), torch.zeros(3 + 4, dtype=torch.float64))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.integers(0, 100), max_size=5),
)
def test_parts_of_fragments_hold_every_element_of_a_sites_rows_once(cols, first, rows, after, cuts):
    """However a parameter is cut, each value lies where the part's offset within the site says it does."""
    numel = (first + rows + after) * cols
    edges = sorted([0, numel, *(min(cut, numel) for cut in cuts)])
    site = WeightSite("w", (rows, cols), QuantSpec(2), Grouping(1, rows * cols), rows=(first, first + rows))
    found = torch.full((rows * cols,), -1.0)
    for start, stop in spans(edges):
        flat = torch.cat([torch.full((7,), -2.0), torch.arange(start, stop).float()])  # something else lies before it
        part = part_of(Fragment("w", flat, 7, stop - start, start, (first + rows + after, cols)), site)
        if part is None:
            assert stop <= site.first or start >= site.first + site.numel or start == stop
            continue
        assert (part.shape, part.numel > 0) == (site.shape, True)
        assert torch.equal(found[part.offset : part.offset + part.numel], torch.full((part.numel,), -1.0))
        found[part.offset : part.offset + part.numel] = part.values
    assert torch.equal(found, torch.arange(numel).float().view(-1, cols)[first : first + rows].reshape(-1))


def test_a_site_that_is_the_whole_parameter_keeps_the_fragment_as_it_is():
    site = WeightSite("w", (2, 3), QuantSpec(2), Grouping(1, 6))
    fragment = Fragment("w", torch.zeros(4), 0, 4, 2, (2, 3))
    assert part_of(fragment, site) is fragment
    assert part_of(None, site) is None
