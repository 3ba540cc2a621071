"""Variants are what they say, and sensitivities are right where they can be known beforehand."""

import pytest
import timm
import torch

from dsquant.analysis.modules import Part, find_modules, pool
from dsquant.analysis.sensitivity import leave_one_out
from dsquant.analysis.variants import post_training, uniform_policy
from dsquant.errors import ConfigError
from dsquant.models import insert_sites
from dsquant.quant.modules import ActivationQuantizer, Mode, QuantLinear, become
from dsquant.spec import ActivationSite, PolicyRule, QuantSpec, SitePolicy

VALUE = "blocks.0.attn.v"


def on_grid(tensor, generator):
    """Return a weight of 4-bit codes -7..7 times 2^-5: least squares starts at, and keeps, this very scale."""
    codes = torch.randint(-7, 8, tensor.shape, generator=generator).float()
    codes.view(tensor.shape[0], -1)[:, 0] = 7  # in every row, so that it is the largest of q, k and v alike
    return codes / 32


@pytest.fixture
def gridded(subject):
    """Return the subject with all weights on a 4-bit grid but the rows of the values of block 0."""
    generator = torch.Generator().manual_seed(3)
    sites = insert_sites(subject.build(), uniform_policy(4))
    for site in sites.weights:
        weight = subject.weights[site.name]
        values = weight[-site.shape[0] // 3 :].clone()
        weight.copy_(on_grid(weight, generator))
        if site.name == "blocks.0.attn.qkv.weight":
            weight[-site.shape[0] // 3 :] = values
    return subject


def test_only_the_module_off_the_grid_has_an_effect_and_it_is_the_whole_effect(gridded, weights_only):
    variants = post_training(gridded, weights_only(4))
    result = leave_one_out(variants, gridded, find_modules(variants.sites))
    whole = result["quantized"]["loss"] - result["float"]["loss"]
    assert whole != 0
    for row in result["modules"]:
        if row["name"] in (VALUE, "blocks.0.attn.qkv"):
            assert row["recovery_loss"] == pytest.approx(whole, abs=1e-12)
            assert row["harm_loss"] == pytest.approx(whole, abs=1e-12)
            assert row["harm_kl"] > 0
        else:
            assert (row["recovery_loss"], row["harm_loss"], row["harm_kl"]) == (0, 0, 0), row["name"]


def test_weights_on_the_grid_are_their_own_image(gridded, weights_only):
    variants = post_training(gridded, weights_only(4))
    variants.quantize_only(variants.everything)
    for site in variants.sites.weights:
        same = variants.model.get_parameter(site.name) == gridded.weights[site.name]
        assert bool(same.all()) == (site.name != "blocks.0.attn.qkv.weight")


def test_quantizing_values_alone_changes_their_rows_alone(subject):
    variants = post_training(subject, uniform_policy(2))
    variants.quantize_only([Part("blocks.0.attn.qkv.weight", (96, 144))])
    weight, latent = (
        variants.model.get_parameter("blocks.0.attn.qkv.weight"),
        subject.weights["blocks.0.attn.qkv.weight"],
    )
    assert torch.equal(weight[:96], latent[:96])
    assert len(weight[96:].unique()) == 4
    variants.quantize_all_but([Part("blocks.0.attn.qkv.weight", (96, 144))])
    assert torch.equal(weight[96:], latent[96:])
    assert len(weight[:48].unique()) == len(weight[48:96].unique()) == 4


def test_switching_back_restores_the_float_model_exactly(subject):
    variants = post_training(subject, uniform_policy(3))
    before = subject.scores(variants.model).losses
    variants.quantize_only(variants.everything)
    assert not torch.equal(subject.scores(variants.model).losses, before)
    variants.quantize_only(())
    assert torch.equal(subject.scores(variants.model).losses, before)


def test_the_float_variant_is_the_upstream_model_and_padding_is_not_counted(subject):
    model = timm.create_model(subject.config.name, num_classes=10, **subject.config.kwargs).eval()
    model.load_state_dict(subject.weights)
    images = torch.cat([images for images, _ in subject.batches])[:360]
    labels = torch.cat([labels for _, labels in subject.batches])[:360]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    variants = post_training(subject, uniform_policy(4))
    variants.quantize_only(())
    scores = subject.scores(variants.model)
    assert len(scores.losses) == 360
    torch.testing.assert_close(scores.losses.float(), losses, rtol=1e-4, atol=1e-5)


def test_a_quantized_variant_is_the_upstream_model_with_images_as_weights(subject, weights_only):
    variants = post_training(subject, weights_only(3))
    model = timm.create_model(subject.config.name, num_classes=10, **subject.config.kwargs).eval()
    model.load_state_dict(subject.weights)
    with torch.no_grad():
        for site in variants.sites.weights:
            parameter = model.get_parameter(site.name)
            for rows in parameter.chunk(site.fused):
                scale = least_squares_scale(rows.double(), 3)
                rows.copy_((rows.double() / scale).clamp(-4, 3).round() * scale)
    variants.quantize_only(variants.everything)
    torch.testing.assert_close(
        subject.scores(variants.model).losses, subject.scores(model).losses, rtol=1e-3, atol=1e-3
    )


def least_squares_scale(w, n_bits):
    """Iterate s = <w, q> / <q, q> from max|w| / qmax on, in float64."""
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    scale = w.abs().max() / high
    for _ in range(2000):
        q = (w / scale).clamp(low, high).round()
        new = (w * q).sum() / (q * q).sum()
        if (new - scale).abs() < 1e-5 * scale:
            return new
        scale = new
    raise AssertionError("no fixed point")


def test_an_activation_switched_on_alone_is_what_a_policy_with_rules_would_quantize(subject):
    site = "blocks.1.attn.probs"
    variants = post_training(subject, uniform_policy(2))
    variants.quantize_only([Part(site)])
    rules = [PolicyRule("*", quantize=False), PolicyRule(site)]
    ruled = post_training(subject, SitePolicy(QuantSpec(2), QuantSpec(2), rules))
    assert ruled.everything == {Part(site)}
    ruled.quantize_only(ruled.everything)
    assert torch.equal(subject.scores(variants.model).losses, subject.scores(ruled.model).losses)


def test_top1_and_loss_of_a_row_belong_to_its_variants(subject):
    variants = post_training(subject, uniform_policy(2))
    modules = [m for m in pool(find_modules(variants.sites), "kind") if m.name in ("attn.v", "mlp.fc2")]
    result = leave_one_out(variants, subject, modules)
    for module, row in zip(modules, result["modules"], strict=True):
        variants.quantize_all_but(module.parts)
        without = subject.scores(variants.model)
        assert row["all_but_it"] == {"loss": without.loss, "top1": without.top1}
        assert row["recovery_top1"] == without.top1 - result["quantized"]["top1"]
        assert row["recovery_loss"] == pytest.approx(result["quantized"]["loss"] - without.loss)
        assert row["recovery_loss_se"] > 0


def test_a_site_switched_to_float_keeps_its_learned_biases():
    spec = QuantSpec(2, bias="around")
    quantizer = ActivationQuantizer(ActivationSite("layer.input", spec, features=6))
    layer = torch.nn.Linear(6, 3)
    become(layer, QuantLinear, input_quantizer=quantizer)
    before, after, x = torch.randn(6), torch.randn(6), torch.randn(4, 6)
    quantizer.bind({"scale": torch.ones(1), "before": before, "after": after})
    quantizer.mode = Mode.FLOAT
    expected = (x + before + after) @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_without_activations_they_stay_in_float_and_weights_are_the_same(subject):
    alone, both = (post_training(subject, uniform_policy(2), activations=value) for value in (False, True))
    assert alone.everything == {part for part in both.everything if part.rows is not None}
    for variants in (alone, both):
        variants.quantize_only(alone.everything)
    assert torch.equal(subject.scores(alone.model).losses, subject.scores(both.model).losses)


def test_a_part_of_another_model_is_an_error(subject):
    variants = post_training(subject, uniform_policy(4))
    with pytest.raises(ConfigError, match=r"blocks\.9\.attn\.q is no quantized site"):
        variants.quantize_only([Part("blocks.9.attn.q")])
