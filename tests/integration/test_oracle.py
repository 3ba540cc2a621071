"""The shard step trains as fake quantization in the forward pass does: the losses of an independent oracle."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from dsquant.checkpoint import load_run_checkpoint
from dsquant.config import load_config
from dsquant.data import ShardSet, TrainStream
from dsquant.evaluation import transform_of
from dsquant.loop import learning_rate
from tests import ranks
from tests.integration import oracle
from tests.integration.runs import TINY, ds_config, losses, pretrain

STEPS, WORLD, TOLERANCE = 20, 2, 1e-4
ZERO_STAGES = ["zero1", "zero3"]
# The first leaves the float weights as they are. The last orders samples so that no code lies at the edge of another, where last
# bits decide it: of five orders three have such a code within these steps, and every later loss shows it.
CHANGES = {"stages.fp.lr": 1e-30, "stages.w2a2.distill.hidden": 0.2, "seed": 3}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Return the folder of all runs, their recipe, and their overrides, from pre-trained float weights on."""
    folder = tmp_path_factory.mktemp("oracle")
    weights = pretrain(load_config(str(TINY)), folder)
    overrides = CHANGES | {"model.checkpoint": str(weights)}
    return folder, load_config(str(TINY), overrides), overrides


@pytest.fixture(scope="module")
def trained(setting):
    """Return the folders of real runs on ZeRO 1 and 3, and of one whose scales stand still at their calibrated values."""
    folder, _, overrides = setting
    still = overrides | {"stages.w2a2.quant.scale_lr": 1e-30}
    runs = [
        {"ds_config": ds_config("zero1"), "overrides": still, "out_dir": str(folder / "calibrated"), "max_steps": 1},
        *(
            {"ds_config": ds_config(z), "overrides": overrides, "out_dir": str(folder / z), "max_steps": STEPS}
            for z in ZERO_STAGES
        ),
    ]
    target = "tests.integration.runs:train_in_process"
    ranks.launch(WORLD, target, {"runs": runs}, folder / "ranks", 200, {"DS_ACCELERATOR": "cpu"})
    return {name: folder / name for name in ("calibrated", *ZERO_STAGES)}


def batches(config, run_dir):
    """Return the images of each step, those of every rank one after another."""
    shards, stage = ShardSet.open(run_dir / "data" / "train"), config.stages["w2a2"]
    streams = [
        TrainStream(
            shards, transform=transform_of(config.data, train=True), batch_size=stage.batch_size // WORLD, rank=rank,
            world_size=WORLD, seed=config.seed, shuffle_buffer=config.data.shuffle_buffer,
        ).batches()
        for rank in range(WORLD)
    ]  # fmt: skip
    return [torch.cat([next(stream)[0] for stream in streams]) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def train_oracle(setting, trained):
    """Return `train(**changes)`: the losses of the oracle and its model, from the weights and calibrated values of the runs."""
    _, config, overrides = setting
    stage, weights = config.stages["w2a2"], load_file(overrides["model.checkpoint"])
    calibrated = load_run_checkpoint(trained["calibrated"], "w2a2").quant
    images = batches(config, trained["zero1"])
    rates = {"steps": [learning_rate(stage, step, STEPS) for step in range(STEPS)], "base": stage.lr}

    def built():
        model = timm.create_model(config.model.name, num_classes=config.model.num_classes, **config.model.kwargs)
        model.load_state_dict(weights)
        return model

    def train(**changes):
        model = oracle.insert_quantizers(built(), stage.quant.weight.n_bits, calibrated).train()
        options = {"scale_lr": stage.quant.scale_lr, "weight_decay": stage.weight_decay}
        options |= {"obr_weight": stage.quant.obr.weight, "hidden": stage.distill.hidden}
        return oracle.train(model, built().eval(), images, rates, **options | changes), model

    return train


@pytest.fixture(scope="module")
def oracle_run(train_oracle):
    return train_oracle()


def w2a2_losses(run_dir):
    found = losses(run_dir)
    return [found["w2a2", step] for step in range(1, STEPS + 1)]


def furthest(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_the_first_losses_are_those_of_fake_quantization_in_the_forward_pass(trained, oracle_run, zero):
    assert furthest(w2a2_losses(trained[zero]), oracle_run[0]) < TOLERANCE


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_latents_codes_and_scales_after_these_steps_are_those_of_the_oracle(trained, oracle_run, zero):
    checkpoint = load_run_checkpoint(trained[zero], "w2a2")
    model, codes, latents = oracle_run[1], checkpoint.codes, checkpoint.latents
    assert checkpoint.step == STEPS
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, oracle.Quantized):
            quantizer, weight = module.weight_quantizer, module.layer.weight.detach()
            scale = torch.cat([s.detach() for s in quantizer.scales])
            torch.testing.assert_close(checkpoint.quant[f"{name}.weight:scale"], scale, rtol=1e-4, atol=0)
            torch.testing.assert_close(latents[f"{name}.weight"], weight, rtol=0, atol=1e-4)
            rows = weight.view(quantizer.groups, -1) / scale.unsqueeze(1)
            wanted = rows.clip(quantizer.qmin, quantizer.qmax).round().view(weight.shape)
            assert (codes[f"{name}.weight"] != wanted).float().mean() < 1e-3, name
            seen.add(f"{name}.weight")
        if isinstance(module, oracle.Quantizer) and not name.endswith("weight_quantizer"):
            site = name.replace("_quantizer", "")
            scale = module.scales[0].detach()
            torch.testing.assert_close(checkpoint.quant[f"{site}:scale"], scale, rtol=1e-4, atol=0)
            if module.offset is not None:
                torch.testing.assert_close(
                    checkpoint.quant[f"{site}:offset"], module.offset.detach(), rtol=1e-4, atol=1e-5
                )
            seen.add(site)
    assert seen == {key.split(":")[0] for key in checkpoint.quant}


@pytest.mark.parametrize(
    "left_out",
    [{"obr_weight": 0.0}, {"hidden": 0.0}, {"scale_lr": 1e-30}, {"weight_decay": 0.0}],
    ids=lambda change: next(iter(change)),
)
def test_leaving_out_a_part_of_the_method_would_be_seen(trained, train_oracle, left_out):
    assert furthest(w2a2_losses(trained["zero1"]), train_oracle(**left_out)[0]) > 10 * TOLERANCE


def test_the_float_stage_left_the_weights_that_the_oracle_starts_from(setting, trained):
    weights = load_file(setting[2]["model.checkpoint"])
    for zero in ZERO_STAGES:
        latents = load_run_checkpoint(trained[zero], "fp").latents
        assert all(torch.equal(latents[name], weights[name]) for name in weights)
