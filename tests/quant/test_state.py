import pytest
import torch

from dsquant.errors import CheckpointError
from dsquant.ops.fake_quantize import fake_quantize
from dsquant.quant.state import SCALE_FLOOR, QuantState
from dsquant.spec import ActivationSite, Grouping, Levels, QuantSpec, WeightSite

BETAS = (0.9, 0.999)
ACTIVATIONS = [
    ActivationSite("attn.q", QuantSpec(2, granularity="per_head"), n_groups=3, numel=64),
    ActivationSite("mlp.fc2.input", QuantSpec(2, signed=False, offset=True, lr_scale=0.5), numel=128),
]
WEIGHTS = [
    WeightSite("attn.qkv.weight", (12, 4), QuantSpec(2, lr_scale=2.0), Grouping(3, 16)),
    WeightSite("head.weight", (5, 4), QuantSpec(8), Grouping(1, 20)),
]


def make_state(seed=0, weights=WEIGHTS, activations=ACTIVATIONS):
    state = QuantState(list(weights), list(activations))
    state.values.copy_(torch.rand(state.values.numel(), generator=torch.Generator().manual_seed(seed)) + 0.1)
    state.set_learning_rates(1e-3, "absolute")
    return state


def step(state, grads, factor=1.0):
    state.begin_step()
    state.grads.copy_(grads)
    state.update(slice(None), factor, BETAS)


def some_grads(count, size, seed=1):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_activation_values_come_first_and_every_value_has_one_place():
    state = make_state()
    assert state.n_activation == 3 + 2
    assert state.values.numel() == 5 + 4
    assert state.values.dtype is torch.float32
    assert list(state.entries) == ["attn.q:scale", "mlp.fc2.input:scale", "mlp.fc2.input:offset",
                                   "attn.qkv.weight:scale", "head.weight:scale"]  # fmt: skip
    covered = [i for entry in state.entries.values() for i in range(9)[entry.slice]]
    assert covered == list(range(9))
    assert torch.equal(state.get("mlp.fc2.input", "offset"), state.values[4:5])
    assert state.get("attn.q", "offset") is None
    assert state.leaf("attn.q", "offset") is None


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_steps_are_those_of_adam_with_a_learning_rate_a_value(factor):
    state = make_state()
    multipliers = [1.0, 1.0, 1.0, 0.5, 0.5, 2.0, 2.0, 2.0, 1.0]
    params = [v.clone().requires_grad_() for v in state.values]
    groups = [{"params": [p], "lr": 1e-3 * m * factor} for p, m in zip(params, multipliers, strict=True)]
    adam = torch.optim.Adam(groups, betas=BETAS, eps=1e-8)
    for grads in some_grads(20, 9):
        step(state, grads, factor)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        adam.step()
        torch.testing.assert_close(state.values, torch.stack(params).detach(), rtol=1e-6, atol=1e-7)


def test_one_step_may_be_taken_in_parts():
    whole, parts = make_state(), make_state()
    for grads in some_grads(5, 9):
        step(whole, grads)
        parts.begin_step()
        parts.grads.copy_(grads)
        for where in (slice(0, 5), slice(8, 9), slice(5, 8)):
            parts.update(where, 1.0, BETAS)
    assert torch.equal(whole.values, parts.values)
    assert whole.step_count == 5


def test_in_relative_mode_a_value_moves_by_a_share_of_its_sites_scale():
    state = make_state()
    state.values.copy_(torch.tensor([0.1, 0.2, 0.4, 0.5, -0.3, 1.0, 2.0, 4.0, 0.01]))
    before = state.values.clone()
    state.set_learning_rates(1e-2, "relative")
    step(state, torch.ones(9))  # Adam's first step is lr times the sign of the gradient
    expected = 1e-2 * torch.tensor([0.1, 0.2, 0.4, 0.5 * 0.5, 0.5 * 0.5, 2 * 1.0, 2 * 2.0, 2 * 4.0, 0.01])
    torch.testing.assert_close(before - state.values, expected, rtol=1e-4, atol=1e-8)


def test_learning_rates_of_relative_mode_stay_those_of_the_scales_when_set():
    state = make_state()
    state.set_learning_rates(1e-2, "relative")
    rates = state.lr.clone()
    step(state, torch.ones(9))
    assert torch.equal(state.lr, rates)


def test_autograd_writes_into_the_flat_gradient_and_adds_up():
    state = make_state()
    scale, offset = state.leaf("mlp.fc2.input"), state.leaf("mlp.fc2.input", "offset")
    storage = state.grads.data_ptr()
    x = torch.linspace(-2, 2, 40)
    reference = [t.detach().clone().requires_grad_() for t in (scale, offset)]
    fake_quantize(x, *reference, Levels(0, 3)).sum().backward()
    for times in (1, 2):
        fake_quantize(x, scale, offset, Levels(0, 3)).sum().backward()
        torch.testing.assert_close(state.grads[3:5], times * torch.cat([r.grad for r in reference]))
    assert state.grads[3:5].abs().min() > 0
    assert state.grads.data_ptr() == storage
    assert scale.grad.data_ptr() == state.grads[3:4].data_ptr()
    assert torch.equal(state.grads[[0, 1, 2, 5, 6, 7, 8]], torch.zeros(7))


def test_zero_grad_clears_and_keeps_the_leaves_attached():
    state = make_state()
    leaf = state.leaf("attn.q")
    (leaf * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert state.grads[:3].tolist() == [1.0, 2.0, 3.0]
    state.grads[state.n_activation :] = 7.0  # of weight scales: they wait for the next step
    state.zero_grad()
    assert state.grads[: state.n_activation].abs().sum() == 0
    assert (state.grads[state.n_activation :] == 7.0).all()
    assert leaf.grad.tolist() == [0.0, 0.0, 0.0]
    (leaf * 5).sum().backward()
    assert state.grads[:3].tolist() == [5.0, 5.0, 5.0]


def test_a_leaf_sees_every_update():
    state = make_state()
    leaf = state.leaf("attn.q")
    step(state, torch.ones(9))
    assert torch.equal(leaf, state.values[:3])
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert not state.get("attn.q").requires_grad


def test_gradients_for_the_reduction_are_means_in_float64():
    state = make_state()
    state.grads.copy_(torch.arange(9.0))
    taken = state.take_activation_grads(4)
    assert taken.dtype is torch.float64
    assert taken.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_scale_never_falls_below_the_floor_and_an_offset_may_be_negative():
    state = make_state()
    state.set_learning_rates(10.0, "absolute")
    for _ in range(3):
        step(state, torch.ones(9))
    is_scale = torch.tensor([True, True, True, True, False, True, True, True, True])
    assert torch.equal(state.values[is_scale], torch.full((8,), SCALE_FLOOR))
    assert state.values[4] < -1


def test_a_restored_state_continues_as_the_saved_one():
    grads = some_grads(8, 9)
    state = make_state()
    state.set_learning_rates(1e-2, "relative")
    for g in grads[:4]:
        step(state, g)
    saved = {key: value.clone() for key, value in state.state_dict().items()}
    restored = make_state(seed=9)
    leaf = restored.leaf("attn.q")
    restored.load_state_dict(saved)
    assert restored.step_count == 4
    for g in grads[4:]:
        step(state, g)
        step(restored, g)
    assert torch.equal(restored.values, state.values)
    assert torch.equal(leaf, state.values[:3])
    found, expected = restored.state_dict(), state.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_saved_state_does_not_change_with_later_steps():
    state = make_state()
    saved, values = state.state_dict(), state.values.clone()
    step(state, torch.ones(9))
    assert torch.equal(torch.cat([saved[f"{key}/value"] for key in state.entries]), values)
    assert int(saved["step_count"]) == 0


def test_a_state_of_other_sites_or_groups_is_refused_by_name():
    saved = make_state().state_dict()
    with pytest.raises(CheckpointError, match=r"'head\.weight:scale/"):
        make_state(weights=WEIGHTS[:1]).load_state_dict(saved)
    plain = ActivationSite("mlp.fc2.input", QuantSpec(2, signed=False))
    with pytest.raises(CheckpointError, match=r"'mlp\.fc2\.input:offset/"):
        make_state(activations=[ACTIVATIONS[0], plain]).load_state_dict(saved)
    per_channel = WeightSite("head.weight", (5, 4), QuantSpec(8, granularity="per_channel"), Grouping(5, 4))
    with pytest.raises(CheckpointError, match=r"head\.weight:scale: checkpoint has 1 groups, this run 5"):
        make_state(weights=[WEIGHTS[0], per_channel]).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="step_count"):
        make_state().load_state_dict({k: v for k, v in saved.items() if k != "step_count"})


def test_the_digest_changes_with_any_value_and_only_with_values():
    state, same = make_state(), make_state()
    digest = state.digest()
    same.grads.fill_(3.0)
    assert same.digest() == digest
    for index in range(9):
        other = make_state()
        other.values[index] = torch.nextafter(other.values[index], torch.tensor(9.0))
        assert other.digest() != digest
