"""Passes over a flat: the same bits whatever the instructions, the threads and the place of a weight in its flat."""

import pytest
import torch

from dsquant.ops import backends, shard_step
from dsquant.ops.shard_step import AdamWStep, Column, TrackerStep
from dsquant.shard.flat_step import FlatStore
from dsquant.shard.oscillation import TrackerState
from dsquant.spec import QuantSpec
from tests.ops.conftest import require
from tests.shard.test_native_step import OBR, trained

SMALL = 5, 83  # five whole vectors of 16 a row, and three weights
GRIDS = {"lsq": 2, "seq": 2, "ternary": 2, "elastic": 1, "lsq of 4 bits": 4}
CPU_LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
TRACKING = TrackerStep(0.1, 1)
EVERYWHERE = [*CPU_LEVELS, "Triton"]
INTERPRETED = -1  # stands for Triton's interpreter where others say how much of the processor is used


def level(name):
    """Return the number of an instruction set, or skip the test where this processor lacks it; that of Triton's interpreter."""
    if name == "Triton":
        require(backends.TRITON)
        return INTERPRETED
    require(backends.PORTABLE)
    if CPU_LEVELS[name] > backends._level():
        pytest.skip(f"this processor lacks {name}")
    return CPU_LEVELS[name]


def call(name, isa, *arguments):
    """Run an operator of flats on CPU; that of INTERPRETED is Triton's."""
    backend = backends.TRITON if isa == INTERPRETED else backends.PORTABLE
    backends.operator(f"shard_flat_{name}", backend, "cpu")(*arguments, max(isa, 0))


def table(tiles, levels):
    """Return the table of a flat of such tiles, one behind the other, each said by its columns."""
    found = torch.zeros(len(tiles), len(Column), dtype=torch.float64)
    grid = {"QMIN": levels.qmin, "QMAX": levels.qmax, "SHIFT": levels.shift, "LOW": levels.low, "HIGH": levels.high}
    start = state = 0
    for row, tile in zip(found, tiles, strict=True):
        quantized = tile.get("N_GROUPS", 0) > 0
        places = {"START": start, "ROWS": 1} | (
            {"STATE": state, "PLAIN": levels.elastic, "FACTOR": 0.6} if quantized else {}
        )
        for name, value in (places | (grid if quantized else {}) | tile).items():
            row[Column[name]] = value
        size = int(row[Column.ROWS] * row[Column.COLS])
        start, state = start + size, state + size * quantized
    return found


def stepped(isa, method, shape=SMALL, spread=0.01, pull=0.02, before=3, steps=4, sizes=False, centred=False, freeze=False,
            over=False):  # fmt: skip
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
    centre = torch.linspace(-0.1, 0.1, rows) if centred else None
    codes = (own.view(shape) / scale[:, None] - levels.shift).clamp(levels.qmin, levels.qmax).round()
    tracker = TrackerState.start(codes.view(-1), freeze=freeze)
    if freeze:
        tracker.frozen[::7] = True
    m, v, image = torch.zeros(3, w.numel())
    own_rows = {"ROWS": rows, "COLS": cols, "N_GROUPS": rows, "N_BINS": n_bins if spread else 0, "PULL": pull}
    tiles = table([{"COLS": before}, own_rows, {"COLS": 2}], levels)
    held = torch.zeros(2 * rows * n_bins if spread else 0, dtype=torch.float64)
    call("bins", isa, w, tracker.codes, scale, centre, tiles, held)
    found = {"bins": held}
    for step in range(steps):
        grad = torch.cat([torch.ones(before), torch.randn(numel, generator=generator), torch.ones(2)])
        sums, bins = torch.zeros(1 + sizes, rows, dtype=torch.float64), torch.zeros_like(held)
        after = scale * (1 + 0.03 * (-1) ** step)
        state, numbers = vars(tracker).values(), AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, step + 1).numbers()
        image = grad if over else image
        call("step", isa, w, grad, m, v, image, *state, scale, after, centre, held, spread, tiles, *numbers, 0.1, 0.1, 0.15, None,
             sums, bins)  # fmt: skip
        scale, held = after, bins
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


HOW = {
    "OBR": {}, "dampening": {"spread": 0.0}, "neither": {"spread": 0.0, "pull": 0.0}, "freezing": {"freeze": True},
    "sizes": {"sizes": True}, "a centre": {"centred": True},
}  # fmt: skip


@pytest.mark.parametrize("isa", ["AVX2", "AVX-512"])
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_every_instruction_set_leaves_the_same_bits(isa, method, how):
    wanted, found = (stepped(level(name), method, **how) for name in ("portable", isa))
    assert_same(wanted, found)


@pytest.mark.parametrize("isa", EVERYWHERE)
@pytest.mark.parametrize("how", [{}, {"freeze": True}], ids=["OBR", "freezing"])
def test_images_may_take_the_place_of_the_gradient(isa, how):
    wanted, found = (stepped(level(isa), "lsq", over=over, **how) for over in (False, True))
    assert_same(wanted, found)


def test_a_gradient_that_is_kept_is_zero_after_a_step_and_no_image():
    """DeepSpeed keeps those of offloaded and of bfloat16 masters, and copies or adds to them; others it lets go of."""
    flat = torch.nn.Parameter(torch.randn(6))
    store, place, latents = FlatStore(flat, [], {}, in_place=False, scales=None), flat.data_ptr(), flat.detach().clone()
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
    "a centre": ("lsq", {"centred": True}),
    "rows that several programs share": ("lsq", {"shape": (3, 2300), "sizes": True}),
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


def with_bins(tiles, n_bins):
    """Return tiles that lie as their groups do, of which each has bins."""
    return [t | ({"N_BINS": n_bins, "BIN": 2 * n_bins * t.get("GROUP", 0)} if "N_GROUPS" in t else {}) for t in tiles]


def sizes_of(tiles):
    """Return how many elements tiles have, and how many quantized ones."""
    numels, quantized = tiles[:, Column.ROWS] * tiles[:, Column.COLS], tiles[:, Column.N_GROUPS] > 0
    return int(numels.sum()), int(numels[quantized].sum())


def runs_of(tiles):
    """Yield each row of quantized tiles: its tile, its group, and where it lies in the flat and beside trackers."""
    for tile in tiles[tiles[:, Column.N_GROUPS] > 0].nan_to_num(posinf=0, neginf=0).long():
        for row in range(int(tile[Column.ROWS])):
            group = int(tile[Column.GROUP] + (tile[Column.FIRST_GROUP] + row) % tile[Column.N_GROUPS])
            starts = (int(tile[start] + row * tile[Column.COLS]) for start in (Column.START, Column.STATE))
            yield tile, group, *(slice(start, start + int(tile[Column.COLS])) for start in starts)


def codes_of(tiles, w, scale, levels, of_codes):
    """Return the codes of quantized elements."""
    codes = torch.empty(of_codes, dtype=torch.int8)
    for _, group, here, beside in runs_of(tiles):
        codes[beside] = (w[here].double() / scale[group]).clamp(levels.qmin, levels.qmax).round()
    return codes


def in_bins(tiles, w, codes, scale, levels, n_bins):
    """Return how many weights the bins of each group hold, and the sum of their values, (groups, 2, n_bins)."""
    held = torch.zeros(len(scale), 2, n_bins, dtype=torch.float64)
    for _, group, here, beside in runs_of(tiles):
        parts = ((w[here].double() / scale[group]).clamp(levels.low, levels.high) * 2**22).round()
        index = codes[beside].long() - levels.qmin
        held[group] += torch.stack([torch.bincount(index, part, minlength=n_bins) for part in (parts**0, parts)])
    return held


@pytest.mark.parametrize("isa", EVERYWHERE)
@pytest.mark.parametrize("n_bits", [2, 4])
@pytest.mark.parametrize("n_sums", [1, 2])
def test_sums_and_bins_are_those_of_float64(isa, n_bits, n_sums):
    generator, levels, n_bins = torch.Generator().manual_seed(0), QuantSpec(n_bits).levels, 2**n_bits
    tiles = table([t | {"PULL": 0.02} for t in with_bins(CUT, n_bins)], levels)
    numel, of_codes = sizes_of(tiles)
    w, grad, m, v, image = *torch.randn(2, numel, generator=generator), *torch.zeros(3, numel)
    before, after = 2.0 ** torch.randint(-2, 2, (2, 12), generator=generator)  # powers of two: v is exact
    tracker = TrackerState.start(codes_of(tiles, w, before, levels, of_codes), freeze=False)
    wanted, held = torch.zeros(2, 12, dtype=torch.float64), torch.full((12, 2, n_bins), 7.0, dtype=torch.float64)
    for _, group, here, beside in runs_of(tiles):
        x, g, level_of = w[here].double() / before[group], grad[here].double(), tracker.codes[beside].double()
        inside = (x >= levels.low) & (x <= levels.high)
        wanted[0, group] += 0.6 * (g * torch.where(inside, level_of - x, level_of)).sum()
        wanted[1, group] += w[here].double().abs().sum()
    isa = level(isa)
    call("bins", isa, w, tracker.codes, before, None, tiles, held)
    assert torch.equal(held, in_bins(tiles, w, tracker.codes, before, levels, n_bins))
    sums, bins = torch.full((n_sums, 12), 7.0, dtype=torch.float64), torch.full_like(held, 7.0)
    rest = held, 0.01, tiles, *AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, 1).numbers(), 0.1, 0.1, -1.0, None
    call("step", isa, w, grad, m, v, image, *vars(tracker).values(), before, after, None, *rest, sums, bins)
    torch.testing.assert_close(sums[0], wanted[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums[1:], wanted[1:n_sums], rtol=1e-12, atol=0)
    assert torch.equal(tracker.codes, codes_of(tiles, w, after, levels, of_codes))
    assert torch.equal(bins, in_bins(tiles, w, tracker.codes, after, levels, n_bins))


@pytest.mark.parametrize("isa", EVERYWHERE)
@pytest.mark.parametrize("method", ["lsq", "seq"])
def test_late_tiles_are_moved_by_the_step_and_shown_and_binned_by_their_image(isa, method):
    isa, levels = level(isa), QuantSpec(2, method=method).levels
    tiles, late = (
        table([t | {"LATE": "N_GROUPS" in t and of, "PULL": 0.02} for t in with_bins(CUT, 4)], levels) for of in (0, 1)
    )
    numel, of_codes = sizes_of(tiles)
    generator, found = torch.Generator().manual_seed(0), []
    start, grad, scale = *torch.randn(2, numel, generator=generator), 0.5 + torch.rand(12, generator=generator)
    centre, codes = torch.linspace(-0.1, 0.1, 12), (torch.arange(of_codes) % 4 + levels.qmin).to(torch.int8)
    seven, sevens = (torch.full(shape, 7.0, dtype=torch.float64) for shape in ((2, 12), (12, 2, 4)))
    for rows in (tiles, late):
        w, m, v, image = start.clone(), *torch.zeros(2, numel), torch.full((numel,), 9.0)
        tracker = TrackerState.start(torch.zeros(of_codes), freeze=False)
        tracker.codes.copy_(codes)
        held, bins, sums = torch.zeros_like(sevens), sevens.clone(), seven.clone()
        call("bins", isa, w, tracker.codes, scale, centre, rows, held)
        rest = held, 0.01, rows, *AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, 1).numbers(), 0.1, 0.1, -1.0, None
        call("step", isa, w, grad, m, v, image, *vars(tracker).values(), scale, scale, centre, *rest, sums, bins)
        if rows is late:
            assert torch.equal(sums, seven)
            assert torch.equal(bins, sevens)
            assert torch.equal(tracker.codes, codes)
            assert all(image[here].eq(9).all() for _, _, here, _ in runs_of(rows))
            call("image", isa, w, image, *vars(tracker).values(), scale, centre, rows, 0.1, 0.1, -1.0, bins)
        found.append({"w": w, "exp_avg": m, "exp_avg_sq": v, "image": image, "bins": bins} | tracker.tensors())
    assert_same(*found)


@pytest.mark.parametrize("isa", EVERYWHERE)
def test_groups_that_have_nothing_in_a_flat_keep_their_sums_and_bins(isa):
    """Flats of one step, and weights that other ranks have, share them; a flat may begin and end within a weight."""
    isa, levels = level(isa), QuantSpec(2).levels
    parts = {"ROWS": 2, "COLS": 40, "FIRST_GROUP": 1}, {"COLS": 9, "FIRST_GROUP": 3}
    alone = {"ROWS": 3, "COLS": 40, "N_GROUPS": 5, "GROUP": 8, "FIRST_GROUP": 1, "WEIGHT": 1}
    tiles = table(with_bins([*({"N_GROUPS": 6, "GROUP": 1} | part for part in parts), alone], 4), levels)
    numel, of_codes = sizes_of(tiles)
    w, grad, m, v, image = torch.ones(5, numel)
    scale, tracker = torch.ones(14), TrackerState.start(torch.zeros(of_codes), freeze=False)
    held, ours = torch.zeros(14, 2, 4, dtype=torch.float64), torch.zeros(14, dtype=torch.bool)
    ours[[2, 3, 4, 9, 10, 11]] = True
    rest = held, 0.01, tiles, *AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, 1).numbers(), 0.1, 0.1, -1.0, None
    late = tiles.clone()
    late[:, Column.LATE] = 1
    runs = {
        "bins": lambda _, bins: (w, tracker.codes, scale, None, tiles, bins),
        "step": lambda s, bins: (w, grad, m, v, image, *vars(tracker).values(), scale, scale, None, *rest, s, bins),
        "image": lambda _, bins: (w, image, *vars(tracker).values(), scale, None, late, 0.1, 0.1, -1.0, bins),
        "moments": lambda s, _: (w, late, s),
    }  # fmt: skip
    for name, arguments in runs.items():
        sums, bins = torch.full((3, 14), 7.5, dtype=torch.float64), torch.full_like(held, 7.5)
        sums = sums.view(14, 3) if name == "moments" else sums[:2]
        call(name, isa, *arguments(sums, bins))
        if name != "moments":
            assert torch.equal(bins.ne(7.5).any(2).any(1), ours), name
            assert torch.equal(bins.eq(7.5).all(2).all(1), ~ours), name
        if name in ("step", "moments"):
            sums = sums if name == "moments" else sums.T
            assert torch.equal(sums.ne(7.5).all(1), ours), name
            assert torch.equal(sums.eq(7.5).all(1), ~ours), name


@pytest.mark.parametrize("isa", EVERYWHERE)
def test_moments_are_those_of_late_tiles_in_float64(isa):
    tiles = [t | ({"LATE": t.get("WEIGHT", 0) != 1} if "N_GROUPS" in t else {}) for t in (*CUT, LONG)]
    tiles = table(tiles, QuantSpec(2).levels)
    w = torch.randn(sizes_of(tiles)[0], generator=torch.Generator().manual_seed(0))
    expected, found = torch.zeros(13, 3, dtype=torch.float64), torch.full((13, 3), 7.0, dtype=torch.float64)
    for tile, group, here, _ in runs_of(tiles):
        x = w[here].double()
        expected[group] += torch.stack([x.abs().sum(), x.sum(), x.square().sum()]) * (tile[Column.LATE] > 0)
    expected[7] = 7.0  # of the tile that is not late
    call("moments", level(isa), w, tiles, found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected[[0, 6, 8, 12], 0].gt(0).all()


@pytest.mark.parametrize("isa", EVERYWHERE)
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("binned", [False, True], ids=["no bins", "bins"])
@pytest.mark.parametrize("n_parts", [1, 2], ids=["whole", "cut"])
def test_a_nan_shows_in_the_image_and_does_not_become_a_level(isa, method, n_parts, binned):
    """What comes after it would go on as if nothing had happened."""
    levels, odd = QuantSpec(GRIDS[method], method=method.split()[0]).levels, torch.arange(40) % 7 == 3
    w = torch.linspace(-0.4, 0.4, 40)
    grad, m, v, image = torch.where(odd, torch.nan, 0.1), *torch.zeros(3, 40)
    n_bins = 2 ** GRIDS[method] * binned
    tile = {"COLS": 40 // n_parts, "N_GROUPS": 1, "PULL": 0.1, "N_BINS": n_bins}
    tiles = table([tile] * n_parts, levels)
    tracker, scale = TrackerState.start(torch.zeros(40), freeze=False), torch.tensor([0.9])
    rest = 0.01, tiles, *AdamWStep(0.05, 0.9, 0.999, 1e-8, 0.05, 1).numbers(), 0.1, 0.1, -1.0, None
    sums, held, bins = (torch.zeros(size, dtype=torch.float64) for size in (1, 2 * n_bins, 2 * n_bins))
    call("step", level(isa), w, grad, m, v, image, *vars(tracker).values(), scale, scale, None, held, *rest, sums, bins)
    assert sums.isnan()
    assert torch.equal(image.isnan(), odd)
    assert torch.equal(w.isnan(), odd)


@pytest.mark.parametrize("shape", [(37, 192), (5, 17), (18, 1), (3, 48), (40, 95), (2, 5000)], ids=str)
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("strength", [(0.01, 0.02), (0.0, 0.02), (0.0, 0.0)], ids=["OBR", "dampening", "neither"])
def test_rows_that_are_stepped_together_get_the_bits_of_one_after_another(method, shape, strength):
    """AVX-512 takes up to 16 rows at a time, here full ones, single ones and the rest of some; other code takes one."""
    spread, pull = strength
    assert_same(*(stepped(level(isa), method, shape, spread, pull) for isa in ("portable", "AVX-512")))


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
@pytest.mark.parametrize(
    ("what", "tile"),
    {
        "lie in the flat": {"START": 17},
        "tracker": {"STATE": 1},
        "scales": {"GROUP": 1},
        "bins": {"N_BINS": 4, "BIN": 1},
    }.items(),
)  # fmt: skip
def test_tiles_that_do_not_lie_in_their_flat_are_refused(backend, what, tile):
    require(backend)
    w, grad, m, v, image = torch.zeros(5, 40)
    rows = table([{"ROWS": 3, "COLS": 8, "N_GROUPS": 3} | tile], QuantSpec(2).levels)
    tracker, scale = vars(TrackerState.start(torch.zeros(24), freeze=False)), torch.ones(3)
    sums, bins = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    step = AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(RuntimeError, match=f"tile 0 .*{what}"):
        shard_step.flat_step(
            w, grad, m, v, image, tracker, scale, scale, None, bins.clone(), 0.0, rows, step, TRACKING, None, sums, bins, backend
        )  # fmt: skip


def test_rows_beside_parts_of_rows_are_stepped_alike_by_triton_and_in_cpp():
    """As ranks have them: a part of a row, whole rows of the same weight, and a part of the next."""
    parts = {"COLS": 9, "FIRST_GROUP": 0}, {"ROWS": 2, "COLS": 40, "FIRST_GROUP": 1}, {"COLS": 21, "FIRST_GROUP": 3}
    tiles = table([{"N_GROUPS": 4, "N_BINS": 4, "PULL": 0.02} | part for part in parts], QuantSpec(2).levels)
    found = []
    for backend in (backends.PORTABLE, backends.TRITON):
        require(backend)
        generator = torch.Generator().manual_seed(0)
        w, grad, m, v = torch.randn(4, 110, generator=generator)
        scale, image = torch.tensor([0.9, 1.0, 1.1, 1.2]), torch.zeros(110)
        tracker = vars(TrackerState.start(w.clamp(-2, 1).round(), freeze=False))
        sums, held, bins, norms = (
            torch.zeros(*size, dtype=torch.float64) for size in ((2, 4), (4, 2, 4), (4, 2, 4), (1, 2))
        )
        moments, step = (m, v.square_()), AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.0, 3)
        shard_step.flat_bins(w, tracker["codes"], scale, None, tiles, held, backend)
        shard_step.flat_step(w, grad, *moments, image, tracker, scale, 1.1 * scale, None, held, 0.01, tiles, step, TRACKING,
                             norms, sums, bins, backend)  # fmt: skip
        found.append((w, *moments, image, *tracker.values(), sums, held, bins, norms))
    assert bins[:, 0].sum(1).tolist() == [9, 40, 40, 21]
    assert norms.gt(0).all()
    assert image.ne(0).any()
    for ours, theirs in zip(*found, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_operators_of_flats_pass_torchs_checks():
    require(backends.PORTABLE)
    w, grad, m, v, image, frequency = torch.rand(6, 24)
    scale, codes = torch.tensor([0.5, 1.0, 2.0]), torch.zeros(24, dtype=torch.int8)
    tracker, numbers = (codes, codes.clone(), frequency, None, None), (0.1, 0.1, -1.0)
    rows = table([{"ROWS": 3, "COLS": 8, "N_GROUPS": 3, "N_BINS": 4}], QuantSpec(2).levels)
    late = rows.clone()
    late[0, Column.LATE] = 1
    sums, held = torch.zeros(2, 3, dtype=torch.float64), torch.ones(24, dtype=torch.float64)
    ops, adam = torch.ops.dsquant, (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    for op, arguments in {
        ops.shard_flat_bins: (w, codes, scale, None, rows, held, 0),
        ops.shard_flat_step: (
            w, grad, m, v, image, *tracker, scale, scale.clone(), None, held, 0.1, rows, *adam, *numbers, None, sums,
            held.clone(), 0
        ),
        ops.shard_flat_moments: (w, late, torch.zeros(3, 3, dtype=torch.float64), 0),
        ops.shard_flat_image: (w, image, *tracker, scale, None, late, *numbers, held, 0),
        ops.shard_scales: (*(scale.clone() for _ in range(6)), 0, 1.0, 0.9, 0.999, 0.1, 0.1, 1e-8, 1e-6, 0),
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
            tile["GROUP"], tile["BIN"], groups = groups, 8 * groups, groups + tile["ROWS"]
        numel = sum(r * c for r, c in shapes)
        w, grad, m, v, image = torch.zeros(5, numel)
        tracker = vars(TrackerState.start(torch.zeros(numel), freeze=False))
        scale, sums = torch.ones(groups), torch.zeros(1, groups, dtype=torch.float64)
        bins, rows = torch.zeros(8 * groups, dtype=torch.float64), table(tiles, QuantSpec(2).levels)
        step = AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
        with gpu.recorded() as found:
            shard_step.flat_bins(w, tracker["codes"], scale, None, rows, bins, backends.TRITON)
            shard_step.flat_step(w, grad, m, v, image, tracker, scale, scale, None, bins, 0.1, rows, step, TRACKING, None, sums,
                                 bins.clone(), backends.TRITON)  # fmt: skip
        return [launch.kernel.__name__ for launch in found]

    assert launches(1) == launches(7) == ["_bins", "_bins", "_step", "_step"]
