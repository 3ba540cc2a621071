import json
import math
from pathlib import Path

import pytest
import torch

from dsquant.config import FreezeConfig
from dsquant.ops.fake_quantize import near_boundary
from dsquant.ops.shard_step import TrackerStep
from dsquant.shard.fragments import Fragment
from dsquant.shard.oscillation import TrackerState, freeze, freeze_threshold, track
from dsquant.shard.weight_quantizers import ShardedWeight
from dsquant.spec import Grouping, QuantSpec, WeightSite

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())["oscillation"]


def int8(codes):
    return torch.as_tensor(codes).to(torch.int8)


def follow(state, sequence, momentum, first=1):
    """Record codes as steps from `first` on, and give for each which weights oscillated, and all frequencies."""
    for number, codes in enumerate(sequence, first):
        step = TrackerStep(momentum, number)
        state.frequency.mul_(step.fade)
        yield track(state, int8(codes), step), state.frequency * step.left


def test_golden_sequence():
    first, *rest = GOLDEN["codes"]
    state = TrackerState.start(torch.tensor(first, dtype=torch.float32), freeze=False)
    total, steps = torch.zeros(4), follow(state, rest, GOLDEN["momentum"])
    wanted = zip(rest, GOLDEN["frequency"][1:], GOLDEN["total"][1:], strict=True)
    for (codes, frequency, count), (oscillated, often) in zip(wanted, steps, strict=True):
        total += oscillated
        torch.testing.assert_close(often, torch.tensor(frequency), rtol=1e-6, atol=1e-9)
        assert total.tolist() == count
        assert state.codes.tolist() == codes


def nagel(sequence, momentum):
    """Follow one weight's codes by the rule of Nagel et al.: return frequency, number of oscillations, mean code."""
    direction, frequency, total, mean, last = 0, 0.0, 0, float(sequence[0]), sequence[0]
    for code in sequence[1:]:
        change = (code > last) - (code < last)
        oscillated = change * direction == -1
        frequency = momentum * oscillated + (1 - momentum) * frequency
        mean = momentum * code + (1 - momentum) * mean
        total += oscillated
        direction, last = change or direction, code
    return frequency, total, mean


@pytest.mark.parametrize("momentum", [0.05, 0.5, 1.0], ids=["one spell", "spells of 40 steps", "of one"])
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_every_weight_is_followed_by_the_rule_of_nagel(n_bits, momentum):
    torch.manual_seed(n_bits)
    walk = torch.randint(-1, 2, (60, 40)).cumsum(0).clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
    state, total = TrackerState.start(walk[0].float(), freeze=True), torch.zeros(40)
    for oscillated, often in follow(state, walk[1:], momentum, first=17):  # noqa: B007 - the last counts
        total += oscillated
    frequency, count, mean = zip(*(nagel(column, momentum) for column in walk.t().tolist()), strict=True)
    torch.testing.assert_close(often, torch.tensor(frequency), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.code_mean, torch.tensor(mean), rtol=1e-5, atol=1e-5)
    assert total.tolist() == list(count)
    assert sum(count) > 100


def test_a_pause_does_not_hide_a_reversal_and_a_march_is_none():
    state = TrackerState.start(torch.zeros(2), freeze=False)
    seen = [oscillated.tolist() for oscillated, _ in follow(state, ([1, 1], [1, 2], [1, 2], [0, 3]), 0.01)]
    assert seen == [[0, 0], [0, 0], [0, 0], [1, 0]]


def test_a_jump_over_more_than_half_of_the_8_bit_range_keeps_its_direction():
    state = TrackerState.start(torch.tensor([-100.0, 100.0, -128.0]), freeze=False)
    assert track(state, int8([100, -100, 127]), TrackerStep(0.01, 1)).sum() == 0
    assert state.direction.tolist() == [1, -1, 1]
    assert track(state, int8([99, -101, 126]), TrackerStep(0.01, 2)).tolist() == [1, 0, 1]


def test_a_view_of_the_state_is_a_window_on_its_storage():
    state = TrackerState.start(torch.zeros(10), freeze=True)
    track(state.view(2, (2, 3)), int8([[1, 0, 1], [0, 1, 0]]), TrackerStep(0.5, 1))
    assert state.codes.tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert state.direction.tolist() == state.codes.tolist()
    assert state.code_mean[2] == 0.5
    state.view(2, (2, 3)).frozen[0, 0] = True
    assert state.frozen.tolist() == [False] * 2 + [True] + [False] * 7


@pytest.mark.parametrize(("freezing", "bytes_a_weight"), [(False, 6), (True, 11)])
def test_the_state_takes_the_stated_bytes_a_weight(freezing, bytes_a_weight):
    tensors = TrackerState.start(torch.zeros(100), freeze=freezing).tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 100 * bytes_a_weight


def oscillating_state(momentum=0.5):
    """Track four weights for 8 steps: one flips 0/1, one flips -1/-2 and rests on -1, one marches, one rests.

    Returns the state and frequencies.
    """
    state = TrackerState.start(torch.tensor([0.0, -1.0, -2.0, 1.0]), freeze=True)
    codes = ([t % 2, -1 - (t % 3 == 0), min(1, t // 4 - 2), 1] for t in range(1, 9))
    *_, (_, often) = follow(state, codes, momentum)
    return state, often


def test_only_weights_above_the_threshold_freeze_and_at_the_nearest_code_to_their_mean():
    state, often = oscillating_state()
    before, mean = state.codes.clone(), state.code_mean.clone()
    assert often[0] > 0.9
    assert often[2:].tolist() == [0.0, 0.0]
    threshold = float(state.frequency[1])
    assert TrackerStep(0.5, 8, float(often[1])).limit == threshold
    freeze(state, threshold, -2, 1)
    assert state.frozen.tolist() == [True, False, False, False]  # at the threshold is not above it
    assert state.codes[0] == mean[0].round()
    assert torch.equal(state.codes[1:], before[1:])
    freeze(state, threshold * 0.9, -2, 1)
    assert state.frozen.tolist() == [True, True, False, False]
    assert state.codes[1] == mean[1].round()


def test_a_weight_freezes_where_it_mostly_was_and_not_where_it_is():
    state = TrackerState.start(torch.tensor([1.0, -2.0]), freeze=True)
    list(follow(state, ([1 - t % 2, -2 + t % 2] for t in range(1, 6)), 0.1))
    assert state.codes.tolist() == [0, -1]
    torch.testing.assert_close(state.code_mean, torch.tensor([0.75, -1.75]), rtol=0, atol=0.03)
    freeze(state, 0.1, -2, 1)
    assert state.codes.tolist() == [1, -2]


def test_what_is_frozen_stays_frozen_at_its_code():
    state, _ = oscillating_state()
    freeze(state, TrackerStep(0.5, 8, 0.2).limit, -2, 1)
    code = int(state.codes[0])
    for number, (_, often) in enumerate(follow(state, [state.codes.clone()] * 50, 0.5, first=9), 9):  # noqa: B007
        freeze(state, TrackerStep(0.5, number, 0.5).limit, -2, 1)
    assert often[0] < 1e-6
    assert bool(state.frozen[0])
    assert int(state.codes[0]) == code


def frozen_weight(scale, freezing=True):
    """Return a 2-bit weight of six elements whose second and fifth are frozen at code -1."""
    w = torch.tensor([0.3, 0.4, -1.0, 1.2, 0.1, -0.4])
    site = WeightSite("w", (2, 3), QuantSpec(2), Grouping(1, 6))
    weight = ShardedWeight(site, scale, Fragment("w", w.clone(), 0, 6, 0, (2, 3)))
    codes = (w / scale).clamp(-2, 1).round()
    codes[[1, 4]] = -1
    weight.tracker = TrackerState.start(codes, freeze=freezing)
    if freezing:
        weight.tracker.frozen[[1, 4]] = True
    return weight


def test_a_frozen_weight_keeps_its_code_while_latents_and_scale_move():
    scale = torch.tensor([0.5])
    weight = frozen_weight(scale)
    (tile,) = weight.tiles
    free = torch.tensor([True, False, True, True, False, True])
    for step in range(20):
        torch.manual_seed(step)
        scale.fill_(0.3 + 0.05 * step)
        latent = tile.of(weight.fragment.values)
        latent.add_(torch.randn(1, 6))
        moved = latent.clone()
        codes, image = weight.image_tile(tile, latent, scale.view(1, 1))
        expected = (moved / scale).clamp(-2, 1).round()
        assert torch.equal(codes[0, free], expected[0, free])
        assert torch.equal(latent[0, free], moved[0, free])
        assert codes[0, ~free].tolist() == [-1.0, -1.0]
        assert torch.equal(latent[0, ~free], -scale.expand(2))
        assert torch.equal(image, codes * scale)


def straight_through(v, qmin, qmax):
    """Round and clip v; its gradient is 1 on [qmin, qmax], both edges included (`clamp`'s own is 0 there in some torch)."""
    inside = (v >= qmin) & (v <= qmax)
    return v.clamp(qmin, qmax).round().detach() + torch.where(inside, v - v.detach(), 0.0)


def gradients_of_frozen(weight, scale, grad):
    """Return d w and d scale of the step, and those of float64 autograd through an image with fixed codes where frozen."""
    (tile,) = weight.tiles
    latent, frozen = tile.of(weight.fragment.values), weight.tracker.frozen.view(1, 6)
    weight.image_tile(tile, latent, scale.view(1, 1))
    w, s = latent.double().requires_grad_(), scale.double().requires_grad_()
    codes = torch.where(frozen, tile.of(weight.tracker.codes).double(), straight_through(w / s, -2, 1))
    expected = torch.autograd.grad(codes * s, (w, s), grad.double())
    masked = grad.clone()
    rows = weight.lsq_tile(tile, latent, masked, scale.view(1, 1))
    return (masked.double(), rows), expected


def test_a_frozen_weight_gets_no_gradient():
    scale, grad = torch.tensor([0.5]), torch.tensor([[0.5, -1.0, 2.0, 0.3, -0.7, 1.1]])
    (masked, _), (expected, _) = gradients_of_frozen(frozen_weight(scale), scale, grad)
    assert masked[0, [1, 4]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(masked, expected)


def test_the_scale_gets_the_gradient_of_the_image_of_frozen_weights_too():
    """The image of a frozen weight is scale * code with a fixed code: d image / d scale is the code."""
    scale, grad = torch.tensor([0.5]), torch.tensor([[0.5, -1.0, 2.0, 0.3, -0.7, 1.1]])
    (_, d_scale), (_, expected) = gradients_of_frozen(frozen_weight(scale), scale, grad)
    torch.testing.assert_close(d_scale, expected, rtol=1e-6, atol=1e-6)


def test_statistics_count_every_weight():
    weight = frozen_weight(torch.tensor([0.5]))
    weight.tracker.frequency.copy_(torch.tensor([0.0, 0.006, 0.005, 0.0051, 0.0, 0.9]))
    counts = weight.statistics(weight.fragment.values, 0.005)
    #  oscillating, frozen, clipped (1.2 is; -1.0 is on the edge), then codes -2, -1, 0, 1 of [1, -1, -2, 1, -1, -1]
    assert counts.tolist() == [3, 2, 1, 1, 3, 0, 2]
    plain = frozen_weight(torch.tensor([0.5]), freezing=False)
    assert plain.statistics(plain.fragment.values, 0.005).tolist() == [0, 0, 1, 1, 3, 0, 2]


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, None), (0.2499, None), (0.25, 0.1), (0.4375, 0.01 + 0.045 * (1 + math.sqrt(0.5))), (0.625, 0.055),
     (1.0, 0.01), (1.01, 0.01)],
)  # fmt: skip
def test_the_threshold_falls_by_a_cosine_from_the_start_of_freezing(progress, expected):
    config = FreezeConfig(enabled=True, start=0.25, first=0.1, last=0.01)
    assert freeze_threshold(config, progress) == (None if expected is None else pytest.approx(expected))


def test_nothing_freezes_where_freezing_is_off():
    assert [freeze_threshold(FreezeConfig(), p) for p in (0.0, 0.5, 1.0)] == [None] * 3
    assert set(TrackerState.start(torch.zeros(3), freeze=False).tensors()) == {"codes", "direction", "frequency"}


@pytest.mark.parametrize(
    ("method", "n_bits", "boundaries"),
    [
        ("lsq", 2, [-1.5, -0.5, 0.5]),
        ("seq", 2, [-1.0, 0.0, 1.0]),
        ("statsq", 2, [-1.0, 0.0, 1.0]),
        ("ternary", 2, [-0.5, 0.5]),
        ("elastic", 1, [0.0]),
        ("bwn", 1, [0.0]),
        ("lsq", 4, [k + 0.5 for k in range(-8, 7)]),
    ],
)
@pytest.mark.parametrize("reach", [0.005, 0.0625, 0.5])
def test_a_weight_is_near_a_boundary_exactly_where_its_code_can_change_within_reach(method, n_bits, boundaries, reach):
    """The outermost levels have no boundary beyond them."""
    levels = QuantSpec(n_bits, method=method).levels
    v = torch.linspace(-9.7, 9.7, 4001)
    distance = (v[:, None] - torch.tensor(boundaries)).abs().amin(1)
    decided = (distance - reach).abs() > 1e-5
    assert torch.equal(near_boundary(v, levels, reach)[decided], (distance <= reach)[decided])
    grid = torch.arange(levels.qmin, levels.qmax + 1) + levels.shift
    nearest = [grid[(x[:, None] - grid).abs().argmin(1)] for x in (v - reach, v + reach)]
    changes = nearest[0] != nearest[1]
    assert torch.equal(near_boundary(v, levels, reach)[decided], changes[decided])
