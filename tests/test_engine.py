"""The engine on two ranks: what must not change a result, and what must be refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from dsquant.config import QuantConfig, RunConfig, StageConfig
from dsquant.engine import Engine, init_world, micro_batch_size
from dsquant.errors import ConfigError, TrainingError
from dsquant.models import logits_of, stop_dropout
from tests.integration.runs import free_port

KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
BATCH = 8
ZERO = {"zero_allow_untested_optimizer": True}


def build(zero_stage, *, quantized=True, perturb=False, drops=0.0, **stage_options):
    """Build an engine whose activation scales are all 0.5, so that nothing but the options differs."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate"), drops)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **KWARGS, **rates)
    quant = QuantConfig(weight={"n_bits": 4}, activation={"n_bits": 4}) if quantized else None
    stage = StageConfig(steps=10, batch_size=BATCH, lr=1e-3, weight_decay=0.0, quant=quant, **stage_options)
    data = {"source": "digits", "image_size": 16}
    run = RunConfig(recipe="test", model={"name": "x", "num_classes": 5}, data=data, stages={"s": stage})
    world = init_world()
    engine = Engine(model, run, stage, ZERO | {"zero_optimization": {"stage": zero_stage}}, world, 10)
    if quantized:
        engine.state.values[: engine.state.n_activation] = 0.5 + (0.1 * world.rank if perturb else 0.0)
        engine.finish_calibration()
    return engine


def batches(world, parts):
    """Cut the same global batches of 8 into `parts` micro-batches a rank."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        images = torch.randn(BATCH, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 5, (BATCH,), generator=generator)
        yield list(
            zip(
                images.chunk(world.size * parts)[world.rank :: world.size],
                labels.chunk(world.size * parts)[world.rank :: world.size],
                strict=True,
            )
        )


def losses(zero_stage, **stage_options):
    engine = build(zero_stage, **stage_options)
    found = []
    for micro_batches in batches(engine.world, engine.stage.gradient_accumulation):
        total = torch.zeros(())
        for images, labels in micro_batches:
            loss = F.cross_entropy(engine.forward(images), labels)
            engine.backward(loss)
            engine.step(1e-3)
            total += loss.detach() / len(micro_batches)
        torch.distributed.all_reduce(total)
        found.append(total.item() / engine.world.size)
    engine.destroy()
    return found


def first_moves(zero_stage):
    """Return how far AdamW's first step takes any element of each weight, in learning rates, of what this rank holds."""
    engine = build(zero_stage, quantized=False, vector_lr_scale=3.0)
    fragments = [f for held in engine.shards.fragments for f in held]
    before = [f.values.clone() for f in fragments]
    images, labels = next(batches(engine.world, 1))[0]
    engine.backward(F.cross_entropy(engine.forward(images), labels))
    engine.step(1e-3)
    moved = {f.name: ((f.values - old).abs().max() / 1e-3).item() for f, old in zip(fragments, before, strict=True)}
    engine.destroy()
    return moved


def compare_options():
    """Run on each rank: the same training with options that must not matter."""
    return {
        "plain": losses(2),
        "checkpointed": losses(2, activation_checkpointing=True),
        "accumulated": losses(2, gradient_accumulation=2),
        "accumulated on zero 3": losses(3, gradient_accumulation=2),
        "loosely clipped": losses(1, gradient_clipping=1e6),
        "tightly clipped": losses(1, gradient_clipping=1e-6, optimizer="sgd"),
        "dropping": losses(2, drops=0.5),
        "dropping, not in this stage": losses(2, drops=0.5, dropout=False),
        "first moves": [first_moves(zero_stage) for zero_stage in range(4)],
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    from tests.ranks import launch

    return launch(2, "tests.test_engine:compare_options", {}, tmp_path_factory.mktemp("engine") / "ranks", timeout=300)[
        0
    ]


def test_activation_checkpointing_changes_no_loss(compared):
    assert compared["checkpointed"] == compared["plain"]


def test_a_stage_without_dropout_trains_as_a_model_that_has_none(compared):
    assert compared["dropping"] != compared["plain"]
    assert compared["dropping, not in this stage"] == compared["plain"]


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "drop_path_rate": 0.5}
ONE = (1, 1, 1)  # slices of one size in one order: else SReT trains with random ones
DROPPING = {
    "BERT": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "RoBERTa": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
    "Swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
    "SwinV2": lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN),
    "SReT": lambda: timm.create_model(
        "sret_tiny", img_size=64, drop_path_rate=0.5, drop_rate=0.5, slices=ONE, groups=ONE
    ),
}


@pytest.mark.parametrize("family", DROPPING)
def test_every_family_can_be_kept_from_dropping(family):
    torch.manual_seed(0)
    model, tokens = DROPPING[family]().train(), torch.randint(5, 50, (2, 9))
    inputs = tokens if "BERT" in family.upper() else torch.randn(2, 3, *[64 if family == "SReT" else 32] * 2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # SwinV2's blocks begin as nothing
    dropped = [logits_of(model, inputs).detach() for _ in range(5)]
    stop_dropout(model)
    kept = [logits_of(model, inputs).detach() for _ in range(5)]
    assert not all(torch.equal(logits, dropped[0]) for logits in dropped)
    assert all(torch.equal(logits, kept[0]) for logits in kept)


@pytest.mark.parametrize("how", ["accumulated", "accumulated on zero 3"])
def test_accumulated_micro_batches_equal_one_large_batch(compared, how):
    assert compared[how] == pytest.approx(compared["plain"], abs=1e-4)


def test_clipping_acts_only_beyond_its_norm(compared):
    assert compared["loosely clipped"] == pytest.approx(compared["plain"], abs=1e-5)
    free = compared["tightly clipped"]
    assert free != pytest.approx(compared["plain"], abs=1e-3)


@pytest.mark.parametrize("zero_stage", range(4))
def test_vectors_learn_at_their_own_rate(compared, zero_stage):
    """AdamW's first step moves every element by its rate, wherever its gradient is not next to nothing."""
    moved = compared["first moves"][zero_stage]
    assert {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"} <= moved.keys()
    for name, rates in moved.items():
        vector = name.endswith("bias") or ".norm" in name or name.startswith(("norm", "cls_token", "pos_embed"))
        assert rates == pytest.approx(3.0 if vector else 1.0, rel=1e-2), name


def perturbed_state():
    with pytest.raises(TrainingError, match=r"rank 0 and ranks \[1\]"):
        build(1, perturb=True)
    return True


def test_ranks_whose_scales_differ_are_found_before_training(run_ranks):
    assert run_ranks(2, "tests.test_engine:perturbed_state", timeout=200) == [True, True]


JOIN_AND_REDUCE = """
import torch
from dsquant.engine import init_world
init_world()
total = torch.ones(1)
torch.distributed.all_reduce(total)
assert total.item() == 2
"""


def test_no_name_stays_in_shared_memory():
    """DeepSpeed leaves 69 MB a rank there after every run."""
    port = free_port()
    env = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    places = [{"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2"} for rank in "01"]
    ranks = [subprocess.Popen([sys.executable, "-c", JOIN_AND_REDUCE], env=env | place) for place in places]
    assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))


def test_a_batch_that_ranks_do_not_divide_is_refused():
    stage = StageConfig(steps=1, batch_size=10, lr=1e-3, gradient_accumulation=2)
    assert micro_batch_size(stage, 5) == 1
    with pytest.raises(ConfigError, match="10 is not divisible by 4 ranks x 2"):
        micro_batch_size(stage, 4)
