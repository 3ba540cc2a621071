"""Refitting linear layers to quantized inputs: the solution, what it is fitted to, and that nothing else changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsquant.config import ModelConfig
from dsquant.errors import TrainingError
from dsquant.models import build_model, insert_sites
from dsquant.models.inputs import logits_of
from dsquant.quant.calibrate import calibrate
from dsquant.quant.least_squares import RIDGE, least_squares, refit
from dsquant.quant.modules import QuantLinear
from dsquant.quant.state import QuantState
from dsquant.shard.whole_weights import images_of, weight_images
from dsquant.spec import PolicyRule, QuantSpec, SitePolicy

VIT = ModelConfig(
    name="vit_tiny_patch16_224", num_classes=5,
    kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
)  # fmt: skip
BERT = ModelConfig(
    library="transformers", name="bert", num_classes=3, max_length=8,
    kwargs={"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
            "attention_probs_dropout_prob": 0.0},
)  # fmt: skip
SRET = ModelConfig(
    name="sret_tiny", num_classes=5,
    kwargs={"img_size": 32, "heads": [1, 2], "depths": [2, 2], "recursions": [1, 2], "slices": [1, 1], "groups": [1, 1]},
)  # fmt: skip
SWINV2 = ModelConfig(
    name="swinv2_tiny_window8_256", num_classes=5,
    kwargs={"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2]},
)  # fmt: skip


def samples_of(config, count=64):
    generator = torch.Generator().manual_seed(1)
    if config.library == "transformers":
        mask = torch.ones(count, 8, dtype=torch.long)
        mask[::2, 5:] = 0
        return {"input_ids": torch.randint(0, 50, (count, 8), generator=generator), "attention_mask": mask}
    return torch.randn(count, 3, config.kwargs["img_size"], config.kwargs["img_size"], generator=generator)


def quantized(config, n_bits=2, rules=(), **activation):
    """Return a float model with sites, whose weights are larger than a fresh model's, and its state."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(3)
    granularity = {"granularity": "per_channel", "method": "seq"} if n_bits == 2 else {"granularity": "per_channel"}
    eight = [PolicyRule("patch_embed*", {"n_bits": 8, "method": "lsq"})] if config.library == "timm" else []
    sites = insert_sites(
        model, SitePolicy(QuantSpec(n_bits, **granularity), QuantSpec(n_bits, **activation), [*eight, *rules])
    )
    return model, sites, QuantState(sites.weights, sites.activations)


def refitted(model, sites, state, samples, **options):
    by_name = {site.name: site for site in sites.weights}

    def image(name, latent):
        return images_of([(by_name[name], latent)])[name] if name in by_name else latent

    return refit(
        model, sites.quantizers, state, lambda: sites.bind(state, trainable=False), lambda x: logits_of(model, x), samples,
        image, **options,
    )  # fmt: skip


def quantized_logits(model, sites, state, samples):
    """Return the logits of the model quantized by plain calibration of its present weights, which stay as they are."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, image in weight_images(model, sites.weights).items():
            model.get_parameter(name).copy_(image)
        calibrate(
            sites.quantizers, state, lambda x: logits_of(model, x), [samples], 2,
            bind=lambda: sites.bind(state, trainable=False),
        )  # fmt: skip
        found = logits_of(model, samples)
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    return found


@pytest.mark.parametrize("constant", [False, True])
def test_the_change_is_that_of_ridge_regression(constant):
    generator = np.random.default_rng(0)
    x, residual = generator.normal(size=(40_000, 6)) + 1.0, generator.normal(size=(40_000, 3))
    found = least_squares(torch.tensor(x).float(), torch.tensor(residual).float(), constant=constant)
    wide = np.concatenate([x, np.ones((len(x), 1))], 1) if constant else x
    strength = np.sqrt(RIDGE * np.mean(np.diag(wide.T @ wide)))
    rows = np.concatenate([wide, strength * np.eye(wide.shape[1])])
    wanted = np.linalg.lstsq(rows, np.concatenate([residual, np.zeros((wide.shape[1], 3))]), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


def halves(x, residual):
    """Solve on each rank for its half of the tokens."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    return least_squares(x.chunk(2)[rank], residual.chunk(2)[rank], constant=True)


def test_ranks_solve_for_the_tokens_of_all(run_ranks):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(64, 5, generator=generator), torch.randn(64, 2, generator=generator)
    first, second = run_ranks(2, f"{__name__}:halves", x=x, residual=residual, env={"DS_ACCELERATOR": "cpu"})
    assert torch.equal(first, second)
    torch.testing.assert_close(first, least_squares(x, residual, constant=True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", [VIT, SRET, SWINV2, BERT], ids=["vit", "sret", "swinv2", "bert"])
def test_a_refitted_model_is_nearer_to_its_float_self_and_is_left_in_float(config):
    model, sites, state = quantized(config)
    samples = samples_of(config)
    with torch.no_grad():
        wanted = logits_of(model, samples)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = (quantized_logits(model, sites, state, samples) - wanted).square().mean()
    changes = refitted(model, sites, state, samples)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(quantizer.observer is None for quantizer in sites.quantizers.values())
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert {name.rpartition(".")[0] for name in changes} == layers
    for name, change in changes.items():
        p = model.get_parameter(name)
        assert change.shape == p.shape
        p.data.add_(change)
    assert (quantized_logits(model, sites, state, samples) - wanted).square().mean() < 0.8 * plain


def test_8_bits_leave_little_to_refit():
    model, sites, state = quantized(VIT, n_bits=8)
    for name, change in refitted(model, sites, state, samples_of(VIT)).items():
        if name.endswith("weight"):
            share = 0.1 if name == "head.weight" else 0.03  # the head sees 64 tokens for its 48 features
            assert change.norm() < share * model.get_parameter(name).norm(), name


def test_a_float_activation_leaves_the_error_of_earlier_weights_to_refit():
    rules = [PolicyRule("*.input", quantize=False), PolicyRule("*.attn.*", quantize=False)]
    model, sites, state = quantized(VIT, rules=rules)
    assert not sites.quantizers
    changes = refitted(model, sites, state, samples_of(VIT))
    assert changes["blocks.0.attn.qkv.weight"].abs().max() < 1e-4  # nothing before it is quantized
    assert changes["blocks.1.mlp.fc1.weight"].abs().max() > 1e-2


def test_biases_around_start_at_the_means_unless_they_are_given():
    name = "blocks.1.mlp.fc1.input"
    for given in (frozenset(), frozenset([name])):
        model, sites, state = quantized(VIT, bias="around")
        state.get(name, "before").fill_(0.25)
        refitted(model, sites, state, samples_of(VIT), given=given)
        assert bool((state.get(name, "before") == 0.25).all()) == bool(given)
        assert bool((state.get("blocks.0.mlp.fc1.input", "before") != 0).all())


def test_padding_counts_for_nothing():
    model, sites, state = quantized(BERT)
    samples = samples_of(BERT)
    first = refitted(model, sites, state, samples)
    other = {"input_ids": samples["input_ids"].clone(), "attention_mask": samples["attention_mask"]}
    other["input_ids"][::2, 5:] = 7
    second = refitted(model, sites, state, other)
    for name, change in first.items():
        torch.testing.assert_close(second[name], change, rtol=1e-4, atol=1e-5, msg=name)


def test_a_layer_whose_outputs_are_not_finite_is_named():
    model, sites, state = quantized(VIT)
    model.blocks[1].mlp.fc1.weight.data[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"blocks\.1\.mlp\.fc1 saw a value that is not finite"):
        refitted(model, sites, state, samples_of(VIT))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_gets_the_least_error_that_any_weight_has():
    """Of the first quantized layer, whose input is float but for its own quantizer: no other weight does better."""
    model, sites, state = quantized(VIT, n_bits=3)
    samples = samples_of(VIT)
    seen = {}
    layer = model.blocks[0].attn.qkv
    layer.register_forward_pre_hook(lambda _module, given: seen.update(x=given[0]))
    with torch.no_grad():
        logits_of(model, samples)
    changes = refitted(model, sites, state, samples)
    sites.bind(state, trainable=False)
    with torch.no_grad():
        x_hat = layer.input_quantizer(seen["x"][: len(samples)]).flatten(0, -2)
        y = F.linear(seen["x"][: len(samples)], layer.weight, layer.bias).flatten(0, -2)

    def error(weight, bias):
        return (y - F.linear(x_hat, weight, bias)).square().sum().item()

    weight = layer.weight.detach() + changes["blocks.0.attn.qkv.weight"]
    bias = layer.bias.detach() + changes["blocks.0.attn.qkv.bias"]
    generator = torch.Generator().manual_seed(0)
    for size in (0.3, 0.03):
        noise = size * weight.std() * torch.randn(weight.shape, generator=generator)
        assert error(weight, bias) < error(weight + noise, bias)
    assert error(weight, bias) < error(layer.weight.detach(), layer.bias.detach())
