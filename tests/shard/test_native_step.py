"""Native passes of the shard step against its definitions: the same weights, moments, trackers and scales after some steps."""

import pytest
import torch
import torch.nn.functional as F

from dsquant.ops import backends, shard_step
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
    "statsq beside lsq": {
        "weight": {"n_bits": 2, "method": "statsq", "granularity": "per_channel"}, "obr": OBR,
        "rules": [{"match": "*.mlp.*.weight", "method": "lsq", "granularity": "per_tensor"}],
    },
    "bwn": {"weight": {"n_bits": 1, "method": "bwn", "granularity": "per_channel"}, "obr": OBR},
    "freezing": {"obr": OBR, "oscillation": FREEZE},
    "freezing, seq": {"weight": {"n_bits": 2, "method": "seq"}, "obr": OBR, "oscillation": FREEZE},
    "cga": {"oscillation": {"cga": {"enabled": True, "boundary_range": 0.1}}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def built():
    """Have native code built and loaded."""
    require(backends.PORTABLE)


def trained(monkeypatch, backend, quant, steps=6, without=None, **how):
    """Return all that a few steps by a backend leave: parameters, latents, AdamW's and the tracker's state, scales, norms.

    The parameter named `without` has no gradient in every second step.
    """
    monkeypatch.setenv("DSQ_BACKEND", backend)
    model, optimizer, quantization, images = make(**how, **quant)
    for step in range(steps):
        monkeypatch.setenv("DSQ_BACKEND", "torch")  # activations are not what is compared: their sums round elsewhere
        F.cross_entropy(model(images), torch.arange(8) % 5).backward()
        monkeypatch.setenv("DSQ_BACKEND", backend)
        if without and step % 2:
            model.get_parameter(without).grad = None
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
    # Triton's interpreter is slow; one block has weights of every shape.
    size = {"steps": 3, "depth": 1} if backend == backends.TRITON else {}
    wanted, found = (trained(monkeypatch, how, CASES[name], **size) for how in ("torch", backend))
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
        assert tensor.numel() % 8 == 0 or not key.startswith(("image", "exp_avg"))  # torch rounds the rest otherwise
        if key.startswith(("norms", "code_mean")):
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["lsq by channel, OBR", "statsq"])
def test_bins_are_those_of_present_codes_where_other_weights_step_than_the_last_time(monkeypatch, name):
    """They are summed by the step before, which here did not step all of them, or another one did."""
    left_out = "blocks.0.mlp.fc1.weight"
    wanted, found = (trained(monkeypatch, how, CASES[name], without=left_out) for how in ("torch", "cpu"))
    assert found[f"direction {left_out}"].any()
    for key, tensor in wanted.items():
        if not key.startswith("norms"):
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_frequencies_follow_the_codes_of_every_step_past_several_spells(monkeypatch, backend):
    """Also those of weights whose codes no longer change: what is kept of them fades when a spell ends."""
    momentum, threshold = 0.999, 1e-4  # spells of four steps
    monkeypatch.setenv("DSQ_BACKEND", backend)
    model, optimizer, quantization, images = make(obr=OBR, oscillation={"momentum": momentum, "threshold": threshold})
    optimizer.param_groups[0]["lr"], wanted = 0.02, {}
    for step in range(11):
        before = {name: w.tracker.codes.clone() for name, w in quantization.weights.items()}
        last = {name: w.tracker.direction.clone() for name, w in quantization.weights.items()}
        F.cross_entropy(model(images), torch.arange(8) % 5).backward()
        quantization.begin_step(0.1 * step, 1.0)
        optimizer.step()
        quantization.finish_step()
        optimizer.zero_grad()
        quantization.state.zero_grad()
        for name, weight in quantization.weights.items():
            change = (weight.tracker.codes.int() - before[name].int()).sign()
            oscillated = (change * last[name] == -1).float()
            wanted[name] = momentum * oscillated + (1 - momentum) * wanted.get(name, torch.zeros_like(oscillated))
    found, left = quantization.statistics(), shard_step.TrackerStep(momentum, 11).left
    assert quantization.state.step_count == 11
    assert left == (1 - momentum) ** 3
    for name, frequency in wanted.items():
        torch.testing.assert_close(
            quantization.weights[name].tracker.frequency * left, frequency, rtol=1e-5, atol=1e-12
        )
        share = 100 * (frequency > threshold).double().mean()
        assert found[name]["oscillating_pct"] == pytest.approx(float(share), abs=1e-9)
    every = torch.cat(list(wanted.values()))
    assert 0.005 < (every > threshold).double().mean() < 0.9
    assert ((every > 0) & (every < threshold)).any()  # oscillated before the last spell and not since


@pytest.mark.parametrize("name", ["lsq by channel, OBR", "bwn"])
def test_native_passes_serve_other_optimizers_behind_the_inner_step(monkeypatch, name):
    size = {"steps": 3, "depth": 1, "optimizer": "sgd"}
    wanted, *others = (trained(monkeypatch, how, CASES[name], **size) for how in ("torch", "portable", "triton"))
    for found in others:
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items() if not key.startswith("norms"))


def test_the_operator_for_what_nothing_quantizes_passes_torchs_checks():
    w, grad, m, v = torch.rand(4, 3, 8)
    torch.library.opcheck(torch.ops.dsquant.shard_adamw.default, (w, grad, m, v, 0.999, 0.9, 0.999, 0.1, 1e-8, 1e-3, 0))
