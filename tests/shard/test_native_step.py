"""Native passes of the shard step against its definitions: the same weights, moments, trackers and scales after some steps."""

import pytest
import torch
import torch.nn.functional as F

from dsquant.ops import backends, shard_step
from dsquant.shard.regularizers import bin_index
from dsquant.shard.weight_quantizers import make_tiles
from dsquant.spec import Grouping, Levels, QuantSpec
from tests.ops.conftest import require
from tests.shard.test_step import BINARY, make

FREEZE = {"momentum": 0.2, "freeze": {"enabled": True, "start": 0.0, "first": 0.1, "last": 0.1}}
DAMPENING = {"dampening": {"weight": 0.1, "start": 0.0, "aggregation": "mean"}}
OBR = {"weight": 0.05, "start": 0.0}
CASES = {
    "lsq": {},
    "lsq by channel, OBR": {"weight": {"n_bits": 2, "granularity": "per_channel"}, "obr": OBR},
    "seq, OBR, dampening": {
        "weight": {"n_bits": 2, "method": "seq", "granularity": "per_channel"}, "obr": OBR | {"aggregation": "sum"},
        "oscillation": DAMPENING,
    },
    "by head": {
        "weight": {"n_bits": 3}, "obr": OBR, "grad_scale": "mdq",
        "rules": [{"match": "*.attn.*.weight", "granularity": "per_head"}],
    },
    "4 bits, dampening alone": {"weight": {"n_bits": 4}, "oscillation": DAMPENING},
    "ternary": {"weight": {"n_bits": 2, "method": "ternary"}, "obr": OBR, "grad_scale": "mdq"},
    "elastic": {"weight": {"n_bits": 1, "method": "elastic"}, "activation": BINARY},
    "statsq": {"weight": {"n_bits": 2, "method": "statsq", "granularity": "per_channel"}, "obr": OBR},
    "bwn": {"weight": {"n_bits": 1, "method": "bwn", "granularity": "per_channel"}, "obr": OBR},
    "freezing": {"obr": OBR, "oscillation": FREEZE},
    "freezing, seq": {"weight": {"n_bits": 2, "method": "seq"}, "obr": OBR, "oscillation": FREEZE},
    "cga": {"oscillation": {"cga": {"enabled": True, "boundary_range": 0.1}}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def built():
    """Have native code built and loaded."""
    require(backends.PORTABLE)


def trained(monkeypatch, backend, quant, steps=6, **how):
    """Return all that a few steps by a backend leave: parameters, latents, AdamW's and the tracker's state, scales, norms."""
    monkeypatch.setenv("DSQ_BACKEND", backend)
    model, optimizer, quantization, images = make(**how, **quant)
    for step in range(steps):
        monkeypatch.setenv("DSQ_BACKEND", "torch")  # activations are not what is compared: their sums round elsewhere
        F.cross_entropy(model(images), torch.arange(8) % 5).backward()
        monkeypatch.setenv("DSQ_BACKEND", backend)
        quantization.begin_step(0.2 + 0.1 * step, 1.0, observe=step == steps - 1)
        optimizer.step()
        quantization.finish_step()
        optimizer.zero_grad()
        quantization.state.zero_grad()
    found = {f"image {name}": p.detach() for name, p in model.named_parameters()}
    for index, state in enumerate(optimizer.state.values()):
        found |= {f"{name} {index}": torch.as_tensor(value) for name, value in state.items() if value is not None}
    for name, weight in quantization.weights.items():
        found[f"latent {name}"] = quantization.latent(weight)
        found |= {f"{part} {name}": tensor for part, tensor in weight.tracker.tensors().items()}
        if name in quantization.regularizer.norms:
            found[f"norms {name}"] = quantization.regularizer.norms[name]
    return found | {"scales": quantization.state.values}


@pytest.mark.parametrize("backend", backends.NATIVE)
@pytest.mark.parametrize("name", CASES)
def test_native_steps_leave_the_bits_of_the_definition(monkeypatch, name, backend):
    require(backend)
    steps = 3 if backend == backends.TRITON else 6  # its interpreter is slow
    wanted, found = (trained(monkeypatch, how, CASES[name], steps) for how in ("torch", backend))
    assert wanted.keys() == found.keys()
    moved = sum(int((tensor != 0).sum()) for key, tensor in wanted.items() if key.startswith("direction"))
    assert moved > 50
    if "frozen blocks.0.mlp.fc1.weight" in wanted:
        assert any(tensor.any() for key, tensor in wanted.items() if key.startswith("frozen"))
    for key, tensor in wanted.items():
        if (
            backend == backends.TRITON and tensor.is_floating_point()
        ):  # a GPU's AdamW rounds elsewhere, its interpreter's fma twice
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-6)
            continue
        outside_vectors = tensor.numel() % 8 and key.startswith(("image", "exp_avg"))  # torch rounds these otherwise
        if outside_vectors or key.startswith(("norms", "code_mean")):
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["lsq by channel, OBR", "bwn"])
def test_native_passes_serve_other_optimizers_behind_the_inner_step(monkeypatch, name):
    wanted, *others = (
        trained(monkeypatch, how, CASES[name], optimizer="sgd") for how in ("torch", "portable", "triton")
    )
    for found in others:
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items() if not key.startswith("norms"))


@pytest.mark.parametrize("backend", backends.NATIVE)
@pytest.mark.parametrize(("method", "n_bits"), [("seq", 1), ("lsq", 2), ("lsq", 5)])
def test_sums_are_those_of_float64(backend, method, n_bits):
    require(backend)
    generator = torch.Generator().manual_seed(0)
    w, grad = torch.randn(2, 6, 401, generator=generator)
    levels, n_bins = QuantSpec(n_bits, method=method).levels, 2**n_bits
    scale, groups = 2.0 ** torch.arange(-2.0, 1.0), torch.tensor([2, 0, 1, 2, 0, 1])  # powers of two: v is exact
    v = w / scale[groups, None]
    codes = (v - levels.shift).clamp(levels.qmin, levels.qmax).round()
    sums, bins = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3 * n_bins, dtype=torch.float64)
    view = shard_step.TileView(w, groups, scale, None, levels, backend)
    shard_step.gather(view, grad, codes.to(torch.int8), None, False, sums, bins)
    level, clipped = codes.double() + levels.shift, v.double().clamp(levels.low, levels.high)
    inside = (v >= levels.low) & (v <= levels.high)
    expected = (grad.double() * torch.where(inside, level - v, level)).sum(1)
    index = bin_index(codes.to(torch.int8), groups, levels.qmin, n_bins).view(-1)
    held = clipped * scale[groups, None].double()
    assert torch.allclose(sums[0], torch.zeros(3, dtype=torch.float64).index_add_(0, groups, expected), rtol=1e-6)
    assert torch.allclose(
        sums[1], torch.zeros(3, dtype=torch.float64).index_add_(0, groups, w.double().abs().sum(1)), rtol=1e-12
    )
    assert torch.equal(bins[0], torch.bincount(index, minlength=3 * n_bins).double())
    assert torch.allclose(bins[1], torch.bincount(index, held.view(-1), minlength=3 * n_bins), rtol=1e-6, atol=1e-9)


def test_sums_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    w, grad = torch.randn(2, 300_000, generator=generator)
    codes = torch.randint(-2, 2, w.shape, generator=generator).to(torch.int8)
    grouping, scale = Grouping(3, 100_000), torch.tensor([0.5, 1.0, 2.0])

    def sums(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found, bins = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.float64)
        try:
            for tile in make_tiles(70_000, 230_000, grouping, torch.device("cpu")):
                view = shard_step.TileView(tile.of(w), tile.groups, scale, None, Levels(-2, 1), "portable")
                shard_step.gather(view, tile.of(grad), tile.of(codes), None, False, found, bins)
        finally:
            torch.set_num_threads(before)
        return found, bins

    for one, two in zip(sums(1), sums(2), strict=True):
        assert torch.equal(one, two)
        assert one.abs().min() > 0


def test_a_tile_of_another_size_is_refused():
    view = shard_step.TileView(
        torch.zeros(4), torch.zeros(1, dtype=torch.int64), torch.ones(1), None, Levels(-2, 1), "portable"
    )
    sums = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grad must be of 4 values"):
        shard_step.gather(view, torch.zeros(3), torch.zeros(4, dtype=torch.int8), None, False, sums, None)


def test_operators_pass_torchs_checks():
    tile = torch.tensor([0, 1, 2]), torch.tensor([0.5, 1.0, 2.0])  # groups and scales of three rows
    grid, adam = (-2, 1, 0.0), (0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3)
    w, grad, m, v, latent, frequency = torch.rand(6, 3, 8)
    codes, direction = torch.zeros(2, 3, 8, dtype=torch.int8)
    (groups, scale), sums = tile, torch.zeros(2, 3, dtype=torch.float64)
    bins, tables = torch.zeros(2, 12, dtype=torch.float64), torch.rand(2, 12)
    ops = torch.ops.dsquant
    tiled = (scale, groups, *grid)
    for op, arguments in {
        ops.shard_gather: (w, grad, codes, None, None, *tiled, -2.0, 1.0, False, sums, bins, 0),
        ops.shard_update: (w, grad, m, v, codes, None, None, *tiled, -2.0, 1.0, 0.1, *tables, *adam, None, 0),
        ops.shard_adamw: (w, grad, m, v, *adam, 0),
        ops.shard_moments: (w, groups, torch.zeros(3, 3, dtype=torch.float64), 0),
        ops.shard_image: (w, latent, codes, direction, frequency, None, None, None, *tiled, 0.1, -1.0, 0),
    }.items():
        torch.library.opcheck(op.default, arguments)
