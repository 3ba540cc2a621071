"""Passes over a flat: the same bits whatever the instructions, the threads and the place of a weight in its flat."""

import pytest
import torch

from dsquant.ops import backends, shard_step
from dsquant.ops.shard_step import AdamWStep, Column, ScaleAdam, TrackerStep
from dsquant.shard.flat_step import FlatStore
from dsquant.shard.oscillation import TrackerState
from dsquant.spec import QuantSpec
from tests.ops.conftest import require
from tests.shard.test_native_step import OBR, trained

SMALL = 5, 83  # five whole vectors of 16 a row, and three weights
GRIDS = {"lsq": 2, "seq": 2, "ternary": 2, "elastic": 1, "lsq of 4 bits": 4}
CPU_LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
TRACKING = TrackerStep(0.1, 1)
INTERPRETED = -1  # stands for Triton's interpreter where others say how much of the processor is used


def level(name):
    """Return the number of an instruction set, or skip the test where this processor lacks it."""
    require(backends.PORTABLE)
    if CPU_LEVELS[name] > backends._level():
        pytest.skip(f"this processor lacks {name}")
    return CPU_LEVELS[name]


def operator(name, isa):
    """Return an operator on CPU; INTERPRETED is Triton's."""
    return backends.operator(name, backends.TRITON if isa == INTERPRETED else backends.PORTABLE, "cpu")


def table(tiles, levels):
    """Return the table of a flat of such tiles, one behind the other, each said by its columns."""
    found = torch.zeros(len(tiles), len(Column), dtype=torch.float64)
    grid = {"QMIN": levels.qmin, "QMAX": levels.qmax, "SHIFT": levels.shift, "LOW": levels.low, "HIGH": levels.high}
    start = state = 0
    for row, tile in zip(found, tiles, strict=True):
        quantized = tile.get("N_GROUPS", 0) > 0
        places = {"START": start, "ROWS": 1} | ({"STATE": state, "PLAIN": levels.elastic} if quantized else {})
        for name, value in (places | (grid if quantized else {}) | tile).items():
            row[Column[name]] = value
        size = int(row[Column.ROWS] * row[Column.COLS])
        start, state = start + size, state + size * quantized
    return found


def stepped(isa, method, shape=SMALL, spread=0.01, pull=0.02, before=3, steps=4, freeze=False, over=False):
    """Return, by name, all that some steps of a weight leave, `before` strange values before it in its flat.

    `over` has images take the place of the gradient.
    """
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
    own_rows = {"ROWS": rows, "COLS": cols, "N_GROUPS": rows, "N_BINS": n_bins if spread else 0, "PULL": pull}
    tiles = table([{"COLS": before}, own_rows, {"COLS": 2}], levels)
    gather, step_flat = (operator(f"shard_flat_{name}", isa) for name in ("gather", "step"))
    isa, found = max(isa, 0), {}
    for step in range(steps):
        grad = torch.cat([torch.ones(before), torch.randn(numel, generator=generator), torch.ones(2)])
        sums = torch.zeros(2, rows, dtype=torch.float64)
        bins = torch.zeros(2, rows * n_bins if spread else 0, dtype=torch.float64)
        gather(w, grad, tracker.codes, tracker.frozen, scale, None, tiles, True, sums, bins, isa)
        after = scale * (1 + 0.03 * (-1) ** step)
        state, numbers = vars(tracker).values(), AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, step + 1).numbers()
        image = grad if over else image
        step_flat(
            w, grad, m, v, image, *state, scale, after, None, bins, spread, tiles, *numbers, 0.1, 0.1, 0.15, None, isa
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


@pytest.mark.parametrize("isa", [*CPU_LEVELS, "Triton"])
@pytest.mark.parametrize("how", [{}, {"freeze": True}], ids=["OBR", "freezing"])
def test_images_may_take_the_place_of_the_gradient(isa, how):
    if isa == "Triton":
        require(backends.TRITON)
    number = INTERPRETED if isa == "Triton" else level(isa)
    wanted, found = (stepped(number, "lsq", over=over, **how) for over in (False, True))
    assert_same(wanted, found)


def test_a_gradient_that_is_kept_is_zero_after_a_step_and_no_image():
    """DeepSpeed keeps those of offloaded and of bfloat16 masters, and copies or adds to them; others it lets go of."""
    flat = torch.nn.Parameter(torch.randn(6))
    store, place, latents = FlatStore(flat, [], {}, in_place=False, factors={}), flat.data_ptr(), flat.detach().clone()
    for kept in (True, False):
        flat.grad = grad = torch.randn(6)
        store.begin({})
        store.images.fill_(7.0)
        store.show_images()
        assert flat.data_ptr() == grad.data_ptr()
        flat.grad = grad if kept else None
        store.show_latents()
        assert flat.data_ptr() == place
        assert torch.equal(flat, latents)
        assert torch.equal(grad, torch.zeros(6) if kept else torch.full((6,), 7.0))


KINDS = {method: (method, {}) for method in GRIDS} | {
    "no regularizer": ("lsq", {"spread": 0.0, "pull": 0.0}),
    "freezing": ("seq", {"freeze": True}),
    "rows that several programs share": ("lsq", {"shape": (3, 2300)}),
}


@pytest.mark.parametrize(("method", "how"), KINDS.values(), ids=KINDS)
def test_kernels_for_gpus_step_as_c_plus_plus_does(method, how):
    """The interpreter's fma rounds twice, and a long row is summed in pieces: all but codes may differ in last bits."""
    require(backends.TRITON)
    wanted, found = (stepped(isa, method, **how) for isa in (level("portable"), INTERPRETED))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, of=name: f"{of}: {text}"
            )
        else:
            assert torch.equal(found[name], tensor), name


CUT = (  # a weight of 7 rows of 300 that begins and ends within a row, one scale for 5,000, heads that share scales, and others
    {"COLS": 5}, {"COLS": 100, "N_GROUPS": 7, "WEIGHT": 0}, {"ROWS": 5, "COLS": 300, "FIRST_GROUP": 1, "N_GROUPS": 7},
    {"COLS": 40, "FIRST_GROUP": 6, "N_GROUPS": 7}, {"COLS": 1}, {"COLS": 5000, "N_GROUPS": 1, "WEIGHT": 1, "GROUP": 7},
    {"ROWS": 9, "COLS": 33, "FIRST_GROUP": 2, "N_GROUPS": 4, "WEIGHT": 2, "GROUP": 8},
)  # fmt: skip


LONG = {"COLS": 20_000, "N_GROUPS": 1, "WEIGHT": 3, "GROUP": 12}  # more than any program takes at once


@pytest.mark.parametrize("isa", [*CPU_LEVELS, "triton"])
@pytest.mark.parametrize("n_bits", [2, 4])
def test_sums_are_those_of_float64(isa, n_bits):
    isa = INTERPRETED if isa == "triton" else level(isa)
    require(backends.TRITON if isa == INTERPRETED else backends.PORTABLE)
    generator, levels, n_bins = torch.Generator().manual_seed(0), QuantSpec(n_bits).levels, 2**n_bits
    tiles = table(
        [t | ({"N_BINS": n_bins, "BIN": n_bins * t.get("GROUP", 0)} if "N_GROUPS" in t else {}) for t in CUT], levels
    )
    numel, of_codes = (int((tiles[rows, Column.ROWS] * tiles[rows, Column.COLS]).sum())
                       for rows in (slice(None), tiles[:, Column.N_GROUPS] > 0))  # fmt: skip
    w, grad = torch.randn(2, numel, generator=generator)
    scale = 2.0 ** torch.randint(-2, 2, (12,), generator=generator)  # powers of two: v is exact
    codes = torch.empty(of_codes, dtype=torch.int8)
    expected, held = torch.zeros(2, 12, dtype=torch.float64), torch.zeros(2, 12, n_bins, dtype=torch.float64)
    for tile in tiles[tiles[:, Column.N_GROUPS] > 0].long():
        rows, cols = int(tile[Column.ROWS]), int(tile[Column.COLS])
        for row in range(rows):
            group = int(tile[Column.GROUP] + (tile[Column.FIRST_GROUP] + row) % tile[Column.N_GROUPS])
            at, beside = int(tile[Column.START]) + row * cols, int(tile[Column.STATE]) + row * cols
            v, g = w[at : at + cols].double() / scale[group], grad[at : at + cols].double()
            level_of = v.clamp(levels.qmin, levels.qmax).round()
            codes[beside : beside + cols] = level_of
            inside = (v >= levels.low) & (v <= levels.high)
            expected[0, group] += (g * torch.where(inside, level_of - v, level_of)).sum()
            expected[1, group] += w[at : at + cols].double().abs().sum()
            index = level_of.long() - levels.qmin
            held[0, group] += torch.bincount(index, minlength=n_bins)
            parts = (v.clamp(levels.low, levels.high) * 2**22).round()
            held[1, group] += torch.bincount(index, parts, minlength=n_bins)
    sums, bins = torch.zeros_like(expected), torch.zeros(2, 12 * n_bins, dtype=torch.float64)
    run = operator("shard_flat_gather", isa)
    run(w, grad, codes, None, scale, None, tiles, True, sums, bins, max(isa, 0))
    torch.testing.assert_close(sums[0], expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums[1], expected[1], rtol=1e-12, atol=0)
    assert torch.equal(bins.view(2, 12, n_bins), held)


@pytest.mark.parametrize("isa", [*CPU_LEVELS, "triton"])
def test_moments_are_those_of_late_tiles_in_float64(isa):
    isa = INTERPRETED if isa == "triton" else level(isa)
    require(backends.TRITON if isa == INTERPRETED else backends.PORTABLE)
    tiles = [t | ({"LATE": t.get("WEIGHT", 0) != 1} if "N_GROUPS" in t else {}) for t in (*CUT, LONG)]
    tiles = table(tiles, QuantSpec(2).levels)
    w = torch.randn(
        int((tiles[:, Column.ROWS] * tiles[:, Column.COLS]).sum()), generator=torch.Generator().manual_seed(0)
    )
    expected, found = torch.zeros(2, 13, 3, dtype=torch.float64)
    for tile in tiles[tiles[:, Column.LATE] > 0].long():
        for row in range(int(tile[Column.ROWS])):
            at = int(tile[Column.START]) + row * int(tile[Column.COLS])
            x = w[at : at + int(tile[Column.COLS])].double()
            group = int(tile[Column.GROUP] + (tile[Column.FIRST_GROUP] + row) % tile[Column.N_GROUPS])
            expected[group] += torch.stack([x.abs().sum(), x.sum(), x.square().sum()])
    operator("shard_flat_moments", isa)(w, tiles, found, max(isa, 0))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected[[0, 6, 8, 12], 0].gt(0).all()


@pytest.mark.parametrize("isa", [*CPU_LEVELS, "triton"])
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("whole", [False, True], ids=["two passes", "one pass"])
def test_a_nan_shows_in_the_image_and_does_not_become_a_level(isa, method, whole):
    """What comes after it would go on as if nothing had happened."""
    isa = INTERPRETED if isa == "triton" else level(isa)
    require(backends.TRITON if isa == INTERPRETED else backends.PORTABLE)
    levels, odd = QuantSpec(GRIDS[method], method=method.split()[0]).levels, torch.arange(40) % 7 == 3
    w = torch.linspace(-0.4, 0.4, 40)
    grad, m, v, image = torch.where(odd, torch.nan, 0.1), *torch.zeros(3, 40)
    tiles = table([{"COLS": 40, "N_GROUPS": 1, "PULL": 0.1, "FACTOR": float(whole)}], levels)
    tracker, scale = TrackerState.start(torch.zeros(40), freeze=False), torch.tensor([0.9])
    rest = tiles, *AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, 1).numbers(), 0.1, 0.1, -1.0, None
    parts = w, grad, m, v, image, *vars(tracker).values()
    if whole:
        scales, sums = (scale, scale / 9, scale / 99, torch.zeros(1)), torch.zeros(3, 1, dtype=torch.float64)
        adam = ScaleAdam(1.0, 0.9, 0.999, 1e-8, 1e-6, 1).numbers()
        operator("shard_flat_whole", isa)(*parts, *scales, *adam, 0.0, *rest, sums, max(isa, 0))
        assert sums[1].isnan()  # the scale's own moment; the weights' NaNs are those of their gradients
    else:
        bins = torch.zeros(2, 0, dtype=torch.float64)
        operator("shard_flat_step", isa)(*parts, scale, scale, None, bins, 0.0, *rest, max(isa, 0))
    assert torch.equal(image.isnan(), odd)
    assert torch.equal(w.isnan(), odd)


@pytest.mark.parametrize("shape", [(37, 192), (5, 17), (18, 1), (3, 48), (40, 95), (2, 5000)], ids=str)
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("strength", [(0.01, 0.02), (0.0, 0.02), (0.0, 0.0)], ids=["OBR", "dampening", "neither"])
def test_rows_that_are_stepped_together_get_the_bits_of_one_after_another(method, shape, strength):
    """AVX-512 takes up to 16 rows at a time, here full ones, single ones and the rest of some; other code takes one."""
    (rows, cols), (spread, pull), of_both = shape, strength, []
    levels, n_bins = QuantSpec(GRIDS[method], method=method.split()[0]).levels, 2 ** GRIDS[method]
    own = {"ROWS": rows, "COLS": cols, "N_GROUPS": rows, "PULL": pull, "FACTOR": 0.5, "N_BINS": n_bins if spread else 0}
    tiles = table([own], levels)
    for isa in (level("portable"), level("AVX-512")):
        generator = torch.Generator().manual_seed(0)
        w, scale = torch.randn(rows * cols, generator=generator) * 0.5, torch.rand(rows, generator=generator) + 0.3
        codes = (w.view(shape) / scale[:, None] - levels.shift).clamp(levels.qmin, levels.qmax).round()
        tracker = TrackerState.start(codes.view(-1), freeze=False)
        m, v, image = torch.zeros(3, rows * cols)
        scales, numbers = (
            torch.stack([scale, scale / 9, scale / 99, scale / 50]),
            (1.0, 0.9, 0.999, 0.1, 0.2, 1e-8, 1e-6),
        )
        for step in range(4):
            grad, sums = torch.randn(rows * cols, generator=generator), torch.zeros(3, rows, dtype=torch.float64)
            adamw = AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, step + 1).numbers()
            operator("shard_flat_whole", isa)(
                w, grad, m, v, image, *vars(tracker).values(), *scales, *numbers, spread, tiles, *adamw, 0.1, 0.1, -1.0, None,
                sums, isa,
            )  # fmt: skip
            scales[:3] = sums.float()
        of_both.append({"w": w, "exp_avg": m, "exp_avg_sq": v, "image": image, "sums": sums} | tracker.tensors())
    assert of_both[0]["direction"].any()
    for name, wanted in of_both[0].items():
        assert torch.equal(of_both[1][name], wanted), name


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


@pytest.mark.parametrize("backend", [backends.PORTABLE, backends.TRITON])
def test_tiles_that_do_not_lie_in_their_flat_are_refused(backend):
    require(backend)
    w, grad, m, v, image = torch.zeros(5, 8)
    rows = torch.zeros(1, len(Column), dtype=torch.float64)
    rows[0, Column.START], rows[0, Column.ROWS], rows[0, Column.COLS] = 4, 1, 8
    tracker = vars(TrackerState.start(torch.zeros(0), freeze=False))
    bins = torch.zeros(2, 0, dtype=torch.float64)
    step = AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(RuntimeError, match="tile 0 does not lie in the flat"):
        shard_step.flat_step(w, grad, m, v, image, tracker, w, w, None, bins, 0.0, rows, step, TRACKING, None, backend)


@pytest.mark.parametrize("backend", [backends.PORTABLE, backends.TRITON])
@pytest.mark.parametrize("odd", [{"N_GROUPS": 2}, {"LATE": 1}], ids=str)
def test_a_tile_that_is_not_of_groups_of_a_run_is_not_stepped_in_one_pass(odd, backend):
    require(backend)
    w, grad, m, v, image, frequency = torch.zeros(6, 24)
    scale, codes = torch.ones(4), torch.zeros(24, dtype=torch.int8)
    rows = table([{"ROWS": 3, "COLS": 8, "N_GROUPS": 3, "FACTOR": 0.5} | odd], QuantSpec(2).levels)
    tracker = vars(TrackerState(codes, codes.clone(), frequency))
    sums, adam = torch.zeros(12, dtype=torch.float64), ScaleAdam(1.0, 0.9, 0.999, 1e-8, 1e-6, 1)
    step = AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(RuntimeError, match="tile 0 is not of groups of one run each"):
        shard_step.flat_whole(
            w, grad, m, v, image, tracker, (scale,) * 4, adam, 0.0, rows, step, TRACKING, None, sums, backend
        )


def test_rows_in_one_pass_beside_rows_that_are_cut_are_stepped_alike_by_triton_and_in_cpp():
    """As ranks have them: a part of a row, whole rows of the same weight, and a part of the next."""
    whole = {"ROWS": 2, "COLS": 40, "FIRST_GROUP": 1, "FACTOR": 0.5}
    parts = {"COLS": 9, "FIRST_GROUP": 0}, whole, {"COLS": 21, "FIRST_GROUP": 3}
    tiles = table([{"N_GROUPS": 4, "N_BINS": 4, "PULL": 0.02} | part for part in parts], QuantSpec(2).levels)
    found = []
    for backend in (backends.PORTABLE, backends.TRITON):
        require(backend)
        generator = torch.Generator().manual_seed(0)
        w, grad, m, v = torch.randn(4, 110, generator=generator)
        codes, scale, image = (
            w.clamp(-2, 1).round().to(torch.int8),
            torch.tensor([0.9, 1.0, 1.1, 1.2]),
            torch.zeros(110),
        )
        tracker = vars(TrackerState.start(codes, freeze=False))
        sums, bins, norms = (torch.zeros(*size, dtype=torch.float64) for size in ((3, 4), (2, 16), (1, 2)))
        moments, step = (m, v.square_()), AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.0, 3)
        adam, scales = ScaleAdam(1.0, 0.9, 0.999, 1e-8, 1e-6, 3), (scale, scale / 9, scale / 99, scale / 50)
        rest = 0.01, tiles, step, TRACKING, norms
        shard_step.flat_whole(w, grad, *moments, image, tracker, scales, adam, *rest, sums, backend)
        shard_step.flat_gather(w, grad, tracker["codes"], None, scale, None, tiles, True, sums[:2], bins, backend)
        shard_step.flat_step(w, grad, *moments, image, tracker, scale, scale, None, bins, *rest, backend)
        found.append((w, *moments, image, *tracker.values(), sums, bins, norms))
    assert bins[0].view(4, 4).sum(1).tolist() == [9, 0, 0, 21]  # of rows in two passes alone
    assert norms.gt(0).all()
    assert image.ne(0).any()
    for ours, theirs in zip(*found, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_operators_of_flats_pass_torchs_checks():
    require(backends.PORTABLE)
    w, grad, m, v, image, frequency = torch.rand(6, 24)
    scale, codes = torch.tensor([0.5, 1.0, 2.0]), torch.zeros(24, dtype=torch.int8)
    tracker = (codes, codes.clone(), frequency, None, None)
    rows = torch.zeros(1, len(Column), dtype=torch.float64)
    grid = {Column.QMIN: -2, Column.QMAX: 1, Column.LOW: -2, Column.HIGH: 1}
    for column, value in {Column.ROWS: 3, Column.COLS: 8, Column.N_GROUPS: 3, Column.N_BINS: 4, **grid}.items():
        rows[0, column] = value
    whole = rows.clone()
    whole[0, Column.FACTOR] = 0.5
    sums, bins = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 12, dtype=torch.float64)
    ops, adam = torch.ops.dsquant, (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    for op, arguments in {
        ops.shard_flat_gather: (w, grad, codes, None, scale, None, rows, True, sums, bins, 0),
        ops.shard_flat_step: (
            w, grad, m, v, image, *tracker, scale, scale.clone(), None, bins, 0.1, rows, *adam, 0.1, 0.1, -1.0, None, 0
        ),
        ops.shard_flat_whole: (
            w, grad, m, v, image, *tracker, scale, scale.clone(), scale.clone(), scale.clone(), 1.0, 0.9, 0.999, 0.1, 0.1, 1e-8,
            1e-6, 0.1, whole, *adam, 0.1, 0.1, -1.0, None, torch.zeros(9, dtype=torch.float64), 0
        ),
        ops.shard_flat_moments: (w, rows, torch.zeros(3, 3, dtype=torch.float64), 0),
        ops.shard_flat_image: (w, image, *tracker, scale, None, rows, 0.1, 0.1, -1.0, 0),
    }.items():  # fmt: skip
        torch.library.opcheck(op.default, arguments)


def test_the_number_of_launches_is_that_of_block_shapes_not_of_weights():
    require(backends.TRITON)
    from dsquant.ops import gpu

    def launches(n_weights):
        shapes = [(6, 64), (4, 200)] * n_weights
        tiles = [{"ROWS": r, "COLS": c, "N_GROUPS": r, "N_BINS": 4, "WEIGHT": i} for i, (r, c) in enumerate(shapes)]
        groups = 0
        for tile in tiles:
            tile["GROUP"], tile["BIN"], groups = groups, 4 * groups, groups + tile["ROWS"]
        numel = sum(r * c for r, c in shapes)
        w, grad, m, v, image = torch.zeros(5, numel)
        tracker = vars(TrackerState.start(torch.zeros(numel), freeze=False))
        scale, sums = torch.ones(groups), torch.zeros(2, groups, dtype=torch.float64)
        bins, rows = torch.zeros(2, 4 * groups, dtype=torch.float64), table(tiles, QuantSpec(2).levels)
        step = AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
        with gpu.recorded() as found:
            shard_step.flat_gather(
                w, grad, tracker["codes"], None, scale, None, rows, True, sums, bins, backends.TRITON
            )
            shard_step.flat_step(
                w,
                grad,
                m,
                v,
                image,
                tracker,
                scale,
                scale,
                None,
                bins,
                0.1,
                rows,
                step,
                TRACKING,
                None,
                backends.TRITON,
            )
        return [launch.kernel.__name__ for launch in found]

    assert launches(1) == launches(7) == ["_gather", "_gather", "_step", "_step"]
