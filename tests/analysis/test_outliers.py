"""Outlier statistics against numpy and scipy on whole tensors, where the code sees batches."""

import numpy as np
import pytest
import scipy.stats
import timm
import torch

from dsquant.analysis.outliers import Moments, outliers, weight_outliers
from dsquant.spec import Grouping


def expected(x):
    """Return the statistics of a numpy array as a whole."""
    x = x.astype(np.float64).ravel()
    return {
        "max_over_std": np.abs(x).max() / x.std(),
        "kurtosis": scipy.stats.kurtosis(x, fisher=False),
        "mean_abs": np.abs(x).mean(),
    }


def assert_groups(found, groups):
    """Compare per-group lists with the statistics of each of `groups`, a list of numpy arrays."""
    for key in ("max_over_std", "kurtosis", "mean_abs"):
        np.testing.assert_allclose(found[key], [expected(g)[key] for g in groups], rtol=1e-6)


def heavy(*shape):
    return torch.distributions.StudentT(3.0).sample(shape)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(11)


def test_a_weight_is_described_whole_by_row_and_by_head():
    weight = heavy(24, 10) + 0.5
    found, w = weight_outliers(weight, Grouping(6, 40)), weight.numpy()
    for key, value in expected(w).items():
        assert found[key] == pytest.approx(value, rel=1e-9)
    assert_groups(found["channels"], list(w))
    assert_groups(found["heads"], np.split(w, 6))
    means = np.abs(w.astype(np.float64)).mean(axis=1)
    assert found["sdam"] == pytest.approx(means.std())
    assert found["sdam_relative"] == pytest.approx(means.std() / means.mean())


def test_heads_along_the_input_columns_of_a_weight_are_its_columns():
    weight = heavy(6, 20)
    found = weight_outliers(weight, Grouping(4, 5))
    assert_groups(found["heads"], np.split(weight.numpy(), 4, axis=1))


def test_what_lies_beyond_six_deviations_of_the_tensor_is_counted_where_it_lies():
    weight = torch.randn(8, 500).clamp(-3, 3)
    weight[2, :4], weight[5, 7] = 40.0, -40.0
    found = weight_outliers(weight, None)
    deviation = weight.double().std(correction=0)
    assert ((weight.double() - weight.double().mean()).abs() > 6 * deviation).sum() == 5
    assert found["beyond_6_sigma"] == 5 / 4000
    assert found["channels"]["beyond_6_sigma"] == [0, 0, 4 / 500, 0, 0, 1 / 500, 0, 0]


def test_a_constant_group_has_no_kurtosis_and_breaks_nothing():
    rows = torch.stack([torch.full((9,), 0.1), torch.arange(9.0)])
    found = Moments.of(rows).statistics()
    assert found["kurtosis"][0] is None
    assert found["max_over_std"][0] is None
    assert found["kurtosis"][1] == pytest.approx(scipy.stats.kurtosis(np.arange(9.0), fisher=False))


def test_moments_of_batches_add_up_to_those_of_all():
    x = heavy(5, 300)
    together = Moments.of(x[:, :100])
    together.add(Moments.of(x[:, 100:]))
    torch.testing.assert_close(together.sums, Moments.of(x).sums)


@pytest.fixture
def seen(subject):
    """Return (result, activations): of the analysis, and whole tensors by hooks on the upstream model."""
    model = timm.create_model(subject.config.name, num_classes=10, **subject.config.kwargs).eval()
    model.load_state_dict(subject.weights)
    kept = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: kept.setdefault(name, []).append((inputs[0], output))
        )
    with torch.no_grad():
        for images in subject.calibration:
            model(images)
    tensors = {name: tuple(torch.cat(side) for side in zip(*calls, strict=True)) for name, calls in kept.items()}
    return outliers(subject), tensors


def test_an_input_is_described_by_feature_over_all_batches(seen):
    result, tensors = seen
    x = tensors["blocks.1.mlp.fc2"][0].numpy()
    found = result["activations"]["blocks.1.mlp.fc2.input"]
    assert found["heads"] is None
    assert_groups(found["channels"], [x[..., c] for c in range(x.shape[-1])])
    far = np.abs(x.astype(np.float64) - x.mean(dtype=np.float64)) > 6 * x.astype(np.float64).std()
    assert found["beyond_6_sigma"] == pytest.approx(far.mean())
    assert far.sum() > 0


def test_q_k_and_v_are_described_by_head_and_by_feature_of_a_head(seen):
    result, tensors = seen
    qkv = tensors["blocks.0.attn.qkv"][1]
    q, k, v = qkv.unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4).numpy()
    for name, x in (("q", q), ("k", k), ("v", v)):
        found = result["activations"][f"blocks.0.attn.{name}"]
        assert_groups(found["heads"], [x[:, h] for h in range(4)])
        assert_groups(found["channels"], [x[:, h, :, d] for h in range(4) for d in range(12)])
    probs = torch.from_numpy(q * 12**-0.5 @ k.swapaxes(-1, -2)).softmax(-1).numpy()
    found = result["activations"]["blocks.0.attn.probs"]
    assert found["max_over_std"] == pytest.approx(expected(probs)["max_over_std"], rel=1e-4)
    assert found["kurtosis"] == pytest.approx(expected(probs)["kurtosis"], rel=1e-4)


def test_an_image_is_described_by_colour_and_a_projection_input_by_head(seen):
    result, tensors = seen
    image = tensors["patch_embed.proj"][0].numpy()
    assert_groups(result["activations"]["patch_embed.proj.input"]["channels"], [image[:, c] for c in range(1)])
    x = tensors["blocks.1.attn.proj"][0].numpy()
    found = result["activations"]["blocks.1.attn.proj.input"]["heads"]
    assert_groups(found, np.split(x, 4, axis=-1))


def test_every_weight_of_the_model_that_is_quantized_is_described(seen, subject):
    result, _ = seen
    matrices = {name for name, w in subject.weights.items() if w.dim() > 1 and "embed.proj" not in name}
    assert set(result["weights"]) == (matrices - {"pos_embed"}) | {"patch_embed.proj.weight"}
    assert len(result["weights"]["blocks.0.attn.qkv.weight"]["heads"]["kurtosis"]) == 12
    assert len(result["weights"]["blocks.0.attn.proj.weight"]["heads"]["kurtosis"]) == 4
