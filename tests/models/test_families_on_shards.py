"""Every family under ZeRO 1 and 3 on two ranks: the same losses to the bit, and checkpoints that either stage reads."""

import pytest
import torch
import torch.nn.functional as F

SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "drop_path_rate": 0.0}  # fmt: skip
SRET = {"img_size": 64, "head_dim": 8, "depths": [4, 2], "recursions": [2, 1], "heads": [2, 4], "slices": [4, 1],
        "groups": [2, 1], "drop_path_rate": 0.0}  # fmt: skip
FAMILIES = {
    "swin_tiny_patch4_window7_224": (SWIN, "*.downsample.reduction.*"),
    "swinv2_tiny_window8_256": (SWIN, "*.downsample.reduction.*"),
    "sret_tiny": (SRET, "pools.*"),
    "sret_tiny, q and k as one": (
        SRET,
        "pools.*",
    ),  # QKR: a module that is applied several times and returns three tensors
}
STEPS = 3


def configuration(name):
    from dsquant.config import QuantConfig, RunConfig, StageConfig

    kwargs, eight = FAMILIES[name]
    rules = [{"match": match, "n_bits": 8} for match in ("patch_embed.*", "head*", eight)]
    model, _, as_one = name.partition(", ")
    rules += [{"match": "*.attn.qk.weight", "method": "statsq", "granularity": "per_channel"}] if as_one else []
    quant = QuantConfig(
        weight={"n_bits": 2}, activation={"n_bits": 2}, rules=rules, obr={"weight": 0.1, "start": 0.0},
        qk_reparam=bool(as_one),
    )  # fmt: skip
    stage = StageConfig(steps=STEPS, batch_size=8, lr=1e-3, weight_decay=0.01, quant=quant)
    return RunConfig(
        recipe="test",
        precision="fp32",
        model={"name": model, "num_classes": 5, "kwargs": kwargs},
        data={"source": "digits", "image_size": kwargs["img_size"]},
        stages={"w2a2": stage},
    )


def prepared(run, ds_config, world, start):
    """Return an engine with the float weights `start`, its activation scales fitted to the images of both ranks."""
    from dsquant.engine import Engine
    from dsquant.models import build_model
    from dsquant.quant.calibrate import calibrate

    model = build_model(run.model)
    model.load_state_dict(start)
    engine = Engine(model, run, run.stages["w2a2"], ds_config, world, STEPS)
    engine.eval()
    bind = lambda: engine.sites.bind(engine.state)  # noqa: E731
    calibrate(engine.sites.quantizers, engine.state, engine.evaluate_logits, [batch(run, world, 0)[0]], 1, bind)
    engine.train()
    engine.finish_calibration()
    return engine


def batch(run, world, step):
    size, count = run.data.image_size, 8 // world.size
    generator = torch.Generator().manual_seed(100 * step + world.rank)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(0, 5, (count,), generator=generator)


def train(engine, run, world):
    losses = []
    for step in range(engine.step_index, STEPS):
        torch.manual_seed(1000 * step + world.rank)  # as the training loop does: the groups that SReT draws
        images, labels = batch(run, world, step)
        loss = F.cross_entropy(engine.forward(images).float(), labels)
        engine.backward(loss)
        engine.step(1e-3)
        losses.append(loss.item())
    return losses


def outcome(name, stage, folder):
    """Train under one ZeRO stage, save, and return what the run and its checkpoint say; runs on every rank."""
    from dsquant.checkpoint import load_float, load_model, load_run_checkpoint, save_checkpoint
    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.models import build_model

    world, run = init_world(), configuration(name)
    world.use_precision("fp32")
    torch.manual_seed(0)
    start = build_model(run.model).state_dict()
    for key, tensor in start.items():
        if "norm" in key and key.endswith("weight"):
            tensor.fill_(1.0)  # SwinV2 starts its branches at zero
    engine = prepared(run, load_ds_config(f"ds_configs/zero{stage}.json"), world, start)
    losses = train(engine, run, world)
    save_checkpoint(folder / str(stage), run, "w2a2", engine, done=True)
    engine.eval()
    x = torch.randn(3, 3, *[run.data.image_size] * 2, generator=torch.Generator().manual_seed(7))
    logits = engine.evaluate_logits(x)
    engine.destroy()
    checkpoint = load_run_checkpoint(folder / str(stage))
    with torch.no_grad():
        reread = load_model(checkpoint)(x)
    weights = load_float(checkpoint).state_dict()
    moved = [key for key, p in weights.items() if p.is_floating_point() and not torch.equal(p, start[key])]
    return {"losses": losses, "logits": logits, "reread": reread, "weights": weights, "moved": moved}


def all_families(folder):
    return {name: {stage: outcome(name, stage, folder / name) for stage in (1, 3)} for name in FAMILIES}


def check_stages(name, one, three):
    assert one["losses"] == three["losses"], name
    assert torch.equal(one["logits"], three["logits"]), name
    assert one["weights"].keys() == three["weights"].keys()
    assert all(torch.equal(one["weights"][key], three["weights"][key]) for key in one["weights"]), name
    assert set(one["moved"]) == {key for key, p in one["weights"].items() if p.is_floating_point()}, name
    assert len(set(one["losses"])) == STEPS


@pytest.mark.slow
def test_zero_1_and_zero_3_train_the_same_model_to_the_bit_and_every_weight_moves(run_ranks, tmp_path):
    """Both ranks hold one model, BatchNorm's averages included, and it is the one that the checkpoint gives back."""
    ranks = run_ranks(2, "tests.models.test_families_on_shards:all_families", folder=tmp_path, timeout=240)
    for name in FAMILIES:
        for found in ranks:
            check_stages(name, found[name][1], found[name][3])
        for stage in (1, 3):
            here, there = (found[name][stage]["logits"] for found in ranks)
            assert torch.equal(here, there), name
            assert torch.equal(here, ranks[0][name][stage]["reread"]), name
