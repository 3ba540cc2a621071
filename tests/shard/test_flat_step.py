"""Passes over a flat: the same bits whatever the instructions, the threads and the place of a weight in its flat."""

from itertools import pairwise

import pytest
import torch

from dsquant.ops import backends, shard_step
from dsquant.ops.shard_step import AdamWStep, Column
from dsquant.shard.oscillation import TrackerState
from dsquant.spec import QuantSpec
from tests.ops.conftest import require
from tests.shard.test_native_step import OBR, trained

SMALL = 5, 83  # five whole vectors of 16 a row, and three weights
GRIDS = {"lsq": 2, "seq": 2, "ternary": 2, "elastic": 1, "lsq of 4 bits": 4}
CPU_LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}


def level(name):
    """Return the number of an instruction set, or skip the test where this processor lacks it."""
    require(backends.PORTABLE)
    if CPU_LEVELS[name] > backends._level():
        pytest.skip(f"this processor lacks {name}")
    return CPU_LEVELS[name]


def stepped(isa, method, shape=SMALL, spread=0.01, pull=0.02, before=3, steps=4, freeze=False):
    """Return, by name, all that some steps of a weight leave, `before` strange values before it in its flat."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    levels = QuantSpec(GRIDS[method], method=method.split()[0]).levels
    n_bins, numel = 2 ** GRIDS[method], rows * cols
    own = torch.randn(numel, generator=generator) * 0.5
    w = torch.cat([torch.ones(before), own, torch.ones(2)])
    scale = torch.rand(rows, generator=generator) + 0.3
    codes = (own.view(shape) / scale[:, None] - levels.shift).clamp(levels.qmin, levels.qmax).round()
    tracker = TrackerState.start(codes.view(-1), freeze=freeze)
    if freeze:
        tracker.frozen[::7] = True
    m, v, image = torch.zeros(3, w.numel())
    tiles = torch.zeros(3, len(Column), dtype=torch.float64)
    ends = 0, before, before + numel, w.numel()
    for row, (start, stop) in zip(tiles, pairwise(ends), strict=True):
        row[Column.START], row[Column.ROWS], row[Column.COLS] = start, 1, stop - start
    for column, value in {
        Column.ROWS: rows, Column.COLS: cols, Column.N_GROUPS: rows, Column.N_BINS: n_bins if spread else 0,
        Column.QMIN: levels.qmin, Column.QMAX: levels.qmax, Column.SHIFT: levels.shift, Column.LOW: levels.low,
        Column.HIGH: levels.high, Column.PLAIN: levels.elastic, Column.PULL: pull,
    }.items():  # fmt: skip
        tiles[1, column] = value
    ops, found = torch.ops.dsquant, {}
    for step in range(steps):
        grad = torch.cat([torch.ones(before), torch.randn(numel, generator=generator), torch.ones(2)])
        sums = torch.zeros(2, rows, dtype=torch.float64)
        bins = torch.zeros(2, rows * n_bins if spread else 0, dtype=torch.float64)
        ops.shard_flat_gather(w, grad, tracker.codes, tracker.frozen, scale, None, tiles, True, sums, bins, isa)
        after = scale * (1 + 0.03 * (-1) ** step)
        state, numbers = vars(tracker).values(), AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, step + 1).numbers()
        ops.shard_flat_step(
            w, grad, m, v, image, *state, scale, after, None, bins, spread, tiles, *numbers, 0.1, 0.15, None, isa
        )
        scale = after
        found |= {f"sums {step}": sums, f"bins {step}": bins}
    part = slice(before, before + numel)
    moved = {"w": w, "image": image, "exp_avg": m, "exp_avg_sq": v}
    return found | {name: t[part].clone() for name, t in moved.items()} | tracker.tensors()


def assert_same(one, two):
    """Hold two results of `stepped` against each other, bit for bit."""
    assert one.keys() == two.keys()
    assert one["direction"].any()  # codes have changed
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("isa", ["AVX2", "AVX-512"])
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize(
    "how",
    [{}, {"spread": 0.0}, {"spread": 0.0, "pull": 0.0}, {"freeze": True}],
    ids=["OBR", "dampening", "neither", "freezing"],
)
def test_every_instruction_set_leaves_the_same_bits(isa, method, how):
    wanted, found = (stepped(level(name), method, **how) for name in ("portable", isa))
    assert_same(wanted, found)


@pytest.mark.parametrize("isa", CPU_LEVELS)
def test_the_place_of_a_weight_in_its_flat_changes_nothing(isa):
    wanted, *others = (stepped(level(isa), "lsq", before=before) for before in (1, 2, 16))
    for found in others:
        assert_same(wanted, found)


@pytest.mark.parametrize("isa", CPU_LEVELS)
@pytest.mark.parametrize("shape", [(700, 83), (3, 40_000)], ids=str)
def test_steps_do_not_depend_on_the_number_of_threads(isa, shape):
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(stepped(level(isa), "lsq", shape, steps=2))
        finally:
            torch.set_num_threads(before)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_a_flat_that_other_code_stepped_in_between_goes_on_from_there(monkeypatch):
    """Native steps keep latents and trackers of their own; a step by definition in their middle must not be lost."""
    require(backends.PORTABLE)
    quant = {"weight": {"n_bits": 2, "granularity": "per_channel"}, "obr": OBR}
    wanted = trained(monkeypatch, "torch", quant)
    from dsquant.shard import optimizer

    choose, turn = optimizer.can_step, iter([True, False, True, False, False, True])
    monkeypatch.setattr(optimizer, "can_step", lambda *given: choose(*given) and next(turn))
    found = trained(monkeypatch, "cpu", quant)
    for key, tensor in wanted.items():
        if not key.startswith("norms") and tensor.numel() % 8 == 0:
            assert torch.equal(found[key], tensor), key


def test_tiles_that_do_not_lie_in_their_flat_are_refused():
    require(backends.PORTABLE)
    w, grad, m, v, image = torch.zeros(5, 8)
    rows = torch.zeros(1, len(Column), dtype=torch.float64)
    rows[0, Column.START], rows[0, Column.ROWS], rows[0, Column.COLS] = 4, 1, 8
    tracker = vars(TrackerState.start(torch.zeros(0), freeze=False))
    bins = torch.zeros(2, 0, dtype=torch.float64)
    step = AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(RuntimeError, match="tile 0 does not lie in the flat"):
        shard_step.flat_step(
            w, grad, m, v, image, tracker, w, w, None, bins, 0.0, rows, step, 0.1, None, None, backends.PORTABLE
        )


def test_operators_of_flats_pass_torchs_checks():
    require(backends.PORTABLE)
    w, grad, m, v, image, frequency = torch.rand(6, 24)
    scale, codes = torch.tensor([0.5, 1.0, 2.0]), torch.zeros(24, dtype=torch.int8)
    tracker = (codes, codes.clone(), frequency, None, None)
    rows = torch.zeros(1, len(Column), dtype=torch.float64)
    grid = {Column.QMIN: -2, Column.QMAX: 1, Column.LOW: -2, Column.HIGH: 1}
    for column, value in {Column.ROWS: 3, Column.COLS: 8, Column.N_GROUPS: 3, Column.N_BINS: 4, **grid}.items():
        rows[0, column] = value
    sums, bins = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 12, dtype=torch.float64)
    ops, adam = torch.ops.dsquant, (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    for op, arguments in {
        ops.shard_flat_gather: (w, grad, codes, None, scale, None, rows, True, sums, bins, 0),
        ops.shard_flat_step: (
            w, grad, m, v, image, *tracker, scale, scale.clone(), None, bins, 0.1, rows, *adam, 0.1, -1.0, None, 0
        ),
        ops.shard_flat_image: (w, image, *tracker, scale, None, rows, 0.1, -1.0, 0),
    }.items():  # fmt: skip
        torch.library.opcheck(op.default, arguments)
