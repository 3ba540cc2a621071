"""Scores of GLUE against their formulas, with padding that must not count."""

import math

import numpy as np
import pytest
import torch

from dsquant.evaluation import Scores


def scored(metric, logits, labels, cut=3):
    found = Scores(metric, "cpu")
    for start in range(0, len(labels), cut):
        found.add(logits[start : start + cut], labels[start : start + cut])
    return found.result()


PREDICTED = np.array([1, 1, 0, 1, 0, 0, 1])
LABELS = np.array([1, 0, 0, 1, 1, 0, 1])


def classified():
    """Return logits that say PREDICTED, with two rows of padding among them, and labels."""
    logits = torch.nn.functional.one_hot(torch.from_numpy(PREDICTED), 2).float()
    padding = torch.tensor([[0.0, 9.0]])
    labels = torch.from_numpy(LABELS)
    mark = torch.tensor([-1])
    return torch.cat([logits[:4], padding, logits[4:], padding]), torch.cat([labels[:4], mark, labels[4:], mark])


def counts():
    return [int(((p == PREDICTED) & (y == LABELS)).sum()) for p, y in ((1, 1), (1, 0), (0, 1), (0, 0))]


def test_accuracy_and_loss_are_over_real_samples_only():
    logits, labels = classified()
    found = scored("accuracy", logits, labels)
    right = (PREDICTED == LABELS).mean()
    losses = [math.log(1 + math.e) - (1.0 if p == y else 0.0) for p, y in zip(PREDICTED, LABELS, strict=True)]
    assert found == {"top1": pytest.approx(100 * right), "loss": pytest.approx(np.mean(losses)), "samples": 7}


def test_f1_and_matthews_are_those_of_their_formulas():
    logits, labels = classified()
    tp, fp, fn, tn = counts()
    assert scored("f1", logits, labels)["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = scored("matthews", logits, labels)
    assert found["matthews"] == pytest.approx(100 * matthews)
    assert found["top1"] == pytest.approx(100 * (tp + tn) / 7)


def test_pearson_and_spearman_are_those_of_their_formulas_and_come_with_their_mean():
    x, y = np.array([0.5, 2.0, -1.0, 4.0, 3.0]), np.array([1.0, -2.5, 0.0, 5.0, 4.0])
    logits = torch.tensor([*x, 7.0])[:, None]
    found = scored("pearson_spearman", logits, torch.tensor([*y, math.nan], dtype=torch.float32))

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return 100 * float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (x, y)]
    assert found["pearson"] == pytest.approx(correlation(x, y), rel=1e-5)
    assert found["spearman"] == pytest.approx(correlation(*ranks))
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)
    assert found["loss"] == pytest.approx(float(((x - y) ** 2).mean()), rel=1e-5)
    assert found["samples"] == 5
    assert "top1" not in found


def test_a_model_that_says_one_thing_correlates_with_nothing():
    found = scored("pearson_spearman", torch.ones(4, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def gathered(metric):
    """On each rank, score its part of the samples."""
    rank = torch.distributed.get_rank()
    logits, labels = classified()
    padding = torch.zeros(1, 2), torch.tensor([-1])
    parts = [(logits[:5], labels[:5]), (torch.cat([logits[5:], padding[0]]), torch.cat([labels[5:], padding[1]]))]
    scores = Scores(metric, "cpu")
    scores.add(*parts[rank])
    return scores.result()


def test_two_ranks_score_as_one(run_ranks):
    found = run_ranks(2, "tests.test_evaluation:gathered", metric="matthews")
    assert found[0] == found[1] == pytest.approx(scored("matthews", *classified()))
