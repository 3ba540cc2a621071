"""The losses of a stage: soft labels without a dense target are the dense formula, and only they are used where named."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsquant.config import DistillConfig
from dsquant.errors import ConfigError
from dsquant.losses import (
    block_loss,
    hidden_loss,
    rest_share,
    soft_cross_entropy,
    sparse_soft_cross_entropy,
    stage_loss,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["marginal_smoothing_k5"]


def sparse_target(batch, classes, k, dtype=torch.float64):
    """Give logits, and the top k of a random teacher."""
    generator = torch.Generator().manual_seed(batch * classes + k)
    logits = torch.randn(batch, classes, generator=generator, dtype=dtype) * 3
    teacher = (torch.randn(batch, classes, generator=generator, dtype=dtype) * 2).softmax(dim=-1)
    probabilities, indices = teacher.topk(k)
    return logits.requires_grad_(), indices, probabilities


def dense_target(indices, probabilities, classes):
    """Recover every class of marginal smoothing one by one, as its definition reads."""
    rows = []
    for row_indices, row in zip(indices.tolist(), probabilities.tolist(), strict=True):
        stored = dict(zip(row_indices, row, strict=True))
        rest = (1 - sum(row)) / (classes - len(row)) if classes > len(row) else 0.0
        rows.append([stored.get(c, rest) for c in range(classes)])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_rest_is_shared_as_in_the_golden_vector():
    top5 = torch.tensor([GOLDEN["top5"]], dtype=torch.float64)
    assert rest_share(top5, GOLDEN["C"]).item() == pytest.approx(GOLDEN["minor"], rel=1e-12)


def test_rounding_above_one_leaves_nothing_and_never_less():
    probabilities = torch.tensor([[0.75, 0.2505], [0.75, 0.25]])
    assert rest_share(probabilities, 10).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("classes", "k"), [(10, 1), (10, 5), (10, 9), (10, 10), (1000, 5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_sparse_loss_and_its_gradient_are_those_of_the_dense_formula(classes, k, temperature):
    logits, indices, probabilities = sparse_target(7, classes, k)
    dense = dense_target(indices, probabilities, classes)
    expected = -(dense * (logits / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
    loss = sparse_soft_cross_entropy(logits, indices, probabilities, temperature)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


def test_with_all_classes_stored_it_is_distillation_from_an_online_teacher():
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    probabilities, indices = teacher.softmax(-1).topk(12)
    torch.testing.assert_close(
        sparse_soft_cross_entropy(logits, indices, probabilities), soft_cross_entropy(logits, teacher)
    )


def test_half_precision_logits_give_a_float32_loss():
    logits, indices, probabilities = sparse_target(4, 20, 5, torch.float32)
    loss = sparse_soft_cross_entropy(logits.bfloat16(), indices, probabilities.half())
    assert loss.dtype == torch.float32
    expected = sparse_soft_cross_entropy(logits.bfloat16().double(), indices, probabilities.half().double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_stage_taught_by_soft_labels_mixes_them_with_its_labels_as_told():
    logits, indices, probabilities = sparse_target(6, 10, 5, torch.float32)
    labels = torch.arange(6)
    distill = DistillConfig(teacher="soft_labels", soft=0.5, hard=0.25)
    loss = stage_loss(logits, labels, None, distill, 0.1, [indices, probabilities])
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, 0.5 * sparse_soft_cross_entropy(logits, indices, probabilities) + 0.25 * hard)


def test_a_stage_taught_otherwise_does_not_look_at_the_soft_labels_of_its_batch():
    logits, indices, probabilities = sparse_target(6, 10, 5, torch.float32)
    labels, teacher, soft = torch.arange(6), torch.randn(6, 10), [indices, probabilities]
    assert torch.equal(stage_loss(logits, labels, None, None, 0.0, soft), F.cross_entropy(logits, labels))
    online = stage_loss(logits, labels, teacher, DistillConfig(teacher="fp"), 0.0, soft)
    assert torch.equal(online, soft_cross_entropy(logits, teacher))


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


def test_outputs_of_blocks_are_compared_relative_to_the_teacher():
    generator = torch.Generator().manual_seed(1)
    own = [torch.randn(shape, generator=generator) for shape in ((2, 5, 3), (2, 4, 4, 6))]
    taught = [torch.randn(shape, generator=generator) for shape in ((2, 5, 3), (2, 4, 4, 6))]
    pairs = [(a[i], b[i]) for a, b in zip(own, taught, strict=True) for i in range(2)]
    wanted = sum(((a - b).norm() / b.norm()).item() ** 2 for a, b in pairs) / 2
    assert block_loss(own, taught).item() == pytest.approx(wanted, rel=1e-5)
    larger = block_loss([own[0] * 100, own[1]], [taught[0] * 100, taught[1]])
    assert larger.item() == pytest.approx(wanted, rel=1e-5)  # the size of a block's output gives it no weight
