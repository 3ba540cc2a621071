"""The ImageNet recipes: their sites at full size, and a few training steps of each stage at reduced size."""

import pytest
import torch
import torch.nn.functional as F

from dsquant.config import load_config
from dsquant.models import build_model, insert_sites
from tests.models.test_families_on_shards import SRET, SWIN

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
REDUCED = {
    "imagenet_deit_tiny": VIT,
    "imagenet_deit_small": VIT,
    "imagenet_vit_large": VIT,
    "imagenet_swin_tiny": SWIN,
    "imagenet_swin_large": SWIN,
    "imagenet_sret_tiny": SRET,
}
VIT_ENDS, SWIN_ENDS = ["patch_embed.proj", "head"], ["patch_embed.proj", "head.fc"]
MERGINGS = [f"layers.{i}.downsample.reduction" for i in (1, 2, 3)]
WEIGHTS_OF_8_BITS = {
    "imagenet_deit_tiny": VIT_ENDS,
    "imagenet_deit_small": VIT_ENDS,
    "imagenet_vit_large": VIT_ENDS,
    "imagenet_swin_tiny": [*SWIN_ENDS, *MERGINGS],
    "imagenet_swin_large": [*SWIN_ENDS, *MERGINGS],
    "imagenet_sret_tiny": ["patch_embed.conv1", "patch_embed.conv2", "patch_embed.conv3", "pools.0", "pools.1", "head"],
}


@pytest.mark.parametrize("recipe", REDUCED)
def test_every_stage_quantizes_all_sites_first_and_last_layers_and_mergings_at_8_bits(recipe):
    config = load_config(recipe, {"model.pretrained": False, "model.checkpoint": None})
    assert config.targets.keys() == config.stages.keys()
    for n_bits, stage in ((4, "w4a4"), (3, "w3a3"), (2, "w2a2")):
        with torch.device("meta"):
            model = build_model(config.model)
        sites = insert_sites(model, config.stages[stage].quant.policy())
        eight = {site.name for site in sites.weights if site.spec.n_bits == 8}
        assert eight == {f"{name}.weight" for name in WEIGHTS_OF_8_BITS[recipe]}
        inputs = {site.name for site in sites.activations if site.spec.n_bits == 8}
        assert inputs == {f"{name}.input" for name in WEIGHTS_OF_8_BITS[recipe]}
        assert {site.spec.n_bits for site in [*sites.weights, *sites.activations]} == {8, n_bits}


def step_each_stage(recipe):
    """Take four steps of each quantized stage from the same float weights; return their losses, by stage."""
    from dsquant.config import load_ds_config
    from dsquant.engine import Engine, init_world
    from dsquant.quant.calibrate import calibrate

    kwargs = REDUCED[recipe]
    changes = {"model.pretrained": False, "model.checkpoint": None, "model.kwargs": kwargs, "model.num_classes": 5,
               "data.image_size": kwargs["img_size"]}  # fmt: skip
    config, world, found = load_config(recipe, changes), init_world(), {}
    world.use_precision("fp32")
    images = torch.randn(16, 3, *[kwargs["img_size"]] * 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 5
    for name, stage in config.stages.items():
        if stage.quant is None:
            continue
        stage = stage.model_copy(update={"batch_size": 16, "epochs": None, "steps": 4})
        torch.manual_seed(0)
        engine = Engine(build_model(config.model), config, stage, load_ds_config("ds_configs/zero1.json"), world, 4)
        engine.eval()
        bind = lambda engine=engine: engine.sites.bind(engine.state)  # noqa: E731
        calibrate(engine.sites.quantizers, engine.state, engine.evaluate_logits, [images], 1, bind)
        engine.train()
        engine.finish_calibration()
        losses = []
        for _ in range(4):
            loss = F.cross_entropy(engine.forward(images), labels)
            engine.backward(loss)
            engine.step(stage.lr)
            losses.append(loss.item())
        found[name] = losses
        engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", REDUCED)
def test_at_reduced_size_every_stage_steps_and_learns(run_ranks, recipe):
    (found,) = run_ranks(1, "tests.models.test_imagenet_recipes:step_each_stage", recipe=recipe)
    assert list(found) == ["w4a4", "w3a3", "w2a2"]
    for losses in found.values():
        assert losses[-1] < losses[0], losses
