import pytest
import torch

from dsquant.config import DistillConfig
from dsquant.errors import ConfigError
from dsquant.losses import hidden_loss, stage_loss


def hidden_states(seed, batch=3, tokens=5, features=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, tokens, features, generator=generator) for _ in range(3))


REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def test_hidden_loss_is_the_sum_over_layers_of_the_mean_over_real_tokens_and_features():
    own, taught = hidden_states(0), hidden_states(1)
    expected = 0.0
    for a, b in zip(own, taught, strict=True):
        rows = [(a[i, j] - b[i, j]) ** 2 for i in range(3) for j in range(5) if REAL[i, j]]
        expected += sum(float(row.sum()) for row in rows) / (len(rows) * 4)
    assert hidden_loss(own, taught, REAL).item() == pytest.approx(expected, rel=1e-6)


def test_padding_has_no_part_in_the_hidden_loss_or_its_gradient():
    own, taught = hidden_states(0), hidden_states(1)
    leaves = tuple(h.clone().requires_grad_() for h in own)
    loss = hidden_loss(leaves, taught, REAL)
    loss.backward()
    assert all(bool((h.grad[REAL == 0] == 0).all() and (h.grad[REAL == 1] != 0).all()) for h in leaves)
    changed = tuple(torch.where(REAL[..., None] == 0, 1e3, h) for h in own)
    assert torch.equal(hidden_loss(changed, taught, REAL), loss.detach())
    assert hidden_loss(taught, taught, REAL).item() == 0.0


def test_hidden_loss_of_bf16_states_is_computed_in_float32():
    own, taught = (tuple(h.bfloat16() for h in hidden_states(seed)) for seed in (0, 1))
    loss = hidden_loss(own, taught, REAL)
    assert loss.dtype == torch.float32
    wide = [tuple(h.float() for h in states) for states in (own, taught)]
    assert torch.equal(loss, hidden_loss(*wide, REAL))


def test_scores_are_regressed_on_and_a_teachers_scores_too():
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 5.0])
    assert stage_loss(logits, labels, None, None, 0.0).item() == 2.5
    teacher = torch.tensor([[2.0], [3.0]])
    distill = DistillConfig(teacher="fp", soft=2.0, hard=0.5)
    assert stage_loss(logits, labels, teacher, distill, 0.0).item() == 2.0 * 0.5 + 0.5 * 2.5


def test_labels_of_another_kind_than_the_model_are_an_error():
    with pytest.raises(ConfigError, match="hold classes and the model has 1 outputs"):
        stage_loss(torch.ones(2, 1), torch.tensor([0, 1]), None, None, 0.0)
    with pytest.raises(ConfigError, match="hold scores and the model has 3 outputs"):
        stage_loss(torch.ones(2, 3), torch.tensor([0.0, 1.0]), None, None, 0.0)
