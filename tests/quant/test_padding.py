"""Observers under an attention mask, against loops that pick the elements of real tokens one by one."""

import pytest
import torch

from dsquant.errors import TrainingError
from dsquant.quant.calibrate import FeatureMeanObserver, HistogramObserver, MeanObserver, RangeObserver
from dsquant.quant.modules import ActivationQuantizer
from dsquant.quant.padding import real_elements, real_tokens
from dsquant.spec import ActivationSite, Granularity, QuantSpec

B, H, N, D = 3, 2, 5, 4
LENGTHS = (5, 2, 3)
BATCH = {"attention_mask": (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).long()}


def real(b, *positions):
    return all(p < LENGTHS[b] for p in positions)


# shape, granularity, layout of the quantizer, (group, is it real) of the element at an index
CASES = {
    "input of a linear layer": ((B, N, D), "per_tensor", {}, lambda b, n, d: (0, real(b, n))),
    "the same, per token": ((B, N, D), "per_token", {}, lambda b, n, d: (n, real(b, n))),
    "the same, per head": ((B, N, D), "per_head", {}, lambda b, n, d: (d // 2, real(b, n))),
    "q": ((B, H, N, D), "per_tensor", {"heads_first": True}, lambda b, h, n, d: (0, real(b, n))),
    "q, per head": ((B, H, N, D), "per_head", {"heads_first": True}, lambda b, h, n, d: (h, real(b, n))),
    "q, as many features as tokens": ((B, H, N, N), "per_head", {"heads_first": True}, lambda b, h, n, d: (h, real(b, n))),
    "probabilities": (
        (B, H, N, N), "per_head", {"heads_first": True, "keys_last": True}, lambda b, h, n, m: (h, real(b, n, m)),
    ),
    "input of a head": ((B, D), "per_tensor", {}, lambda b, d: (0, True)),
}  # fmt: skip


def case(name):
    shape, granularity, layout, place = CASES[name]
    groups = {"per_tensor": 1, "per_head": H, "per_token": N}[granularity]
    site = ActivationSite("site", QuantSpec(4, granularity=Granularity(granularity)), groups)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = [[] for _ in range(groups)]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        group, counts = place(*index)
        if counts:
            values[group].append(x[tuple(index)].item())
        else:
            x[tuple(index)] = float("nan")  # whatever stands there
    return ActivationQuantizer(site, **layout), x, values


@pytest.mark.parametrize("name", CASES)
def test_ranges_and_counts_are_of_real_tokens_only(name):
    quantizer, x, values = case(name)
    with real_tokens(BATCH):
        ranges = RangeObserver(quantizer)
        ranges(x)
        low, high = torch.full_like(ranges.low, -5.0), torch.full_like(ranges.high, 5.0)
        histogram = HistogramObserver(quantizer, low, high)
        histogram(x)
    assert ranges.low.tolist() == [min(v) for v in values]
    assert ranges.high.tolist() == [max(v) for v in values]
    for counts, group in zip(histogram.counts, values, strict=True):
        expected = torch.histc(torch.tensor(group), 1024, -5, 5).double()
        assert counts.sum() == len(group)
        assert (counts - expected).abs().sum() <= 2  # one value may lie at the edge of its bin


@pytest.mark.parametrize("name", CASES)
def test_means_are_of_real_tokens_only(name):
    quantizer, x, values = case(name)
    observer = MeanObserver(quantizer)
    with real_tokens(BATCH):
        observer(x)
    assert observer.count.tolist() == [len(v) for v in values]
    torch.testing.assert_close(observer.total.tolist(), [sum(map(abs, v)) for v in values])


@pytest.mark.parametrize("name", ["input of a linear layer", "input of a head"])
def test_means_of_features_are_of_real_tokens_only(name):
    quantizer, x, _ = case(name)
    observer = FeatureMeanObserver(quantizer)
    with real_tokens(BATCH):
        observer(x)
        observer(x)
    rows = x if x.dim() == 2 else torch.stack([x[b, n] for b in range(B) for n in range(LENGTHS[b])])
    assert observer.total[-1] == 2 * len(rows)
    torch.testing.assert_close(observer.total[:-1] / observer.total[-1], rows.double().mean(0))


def test_the_mask_lasts_as_long_as_its_batch():
    quantizer, x, _ = case("q")
    assert real_elements(quantizer, x) is None
    with real_tokens(BATCH):
        assert real_elements(quantizer, x) is not None
        with real_tokens(torch.zeros(1, 3, 8, 8)):
            assert real_elements(quantizer, x) is None
    assert real_elements(quantizer, x) is None


def test_a_mask_of_another_length_is_an_error_that_names_the_site():
    quantizer, x, _ = case("q")
    with (
        real_tokens({"attention_mask": torch.ones(B, N + 1)}),
        pytest.raises(TrainingError, match=r"site: a batch of \(3"),
    ):
        real_elements(quantizer, x)
