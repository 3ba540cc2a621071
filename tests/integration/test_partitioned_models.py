"""Models under ZeRO 3 start in parts: their weights are those of the whole model bit for bit, and nobody ever holds it."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dsquant.checkpoint import Checkpoint, load_run_checkpoint, save_checkpoint
from dsquant.checkpoint_weights import CheckpointWeights
from dsquant.config import ModelConfig, RunConfig, StageConfig
from dsquant.engine import Engine, fill, init_world
from dsquant.errors import CheckpointError
from dsquant.models import build_model, open_weights, skeleton
from tests import ranks
from tests.integration.runs import TINY, ds_config, losses

ENV = {"DS_ACCELERATOR": "cpu"}
ZERO3 = {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 30, "depth": 2, "num_heads": 3}  # 30: parts that do not divide
MODELS = {
    "vit": ModelConfig(name="vit_tiny_patch16_224", num_classes=5, kwargs=SMALL),
    "swin": ModelConfig(
        name="swin_tiny_patch4_window7_224", num_classes=5,
        kwargs={"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]},
    ),
    "sret": ModelConfig(
        name="sret_tiny",
        num_classes=5,
        kwargs={
            "img_size": 32,
            "depths": [2, 2, 2],
            "recursions": [1, 1, 1],
            "slices": [1, 1, 1],
            "groups": [1, 1, 1],
        },
    ),
    "bert": ModelConfig(
        library="transformers", name="bert", num_classes=2, max_length=8,
        kwargs={"vocab_size": 50, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40},
    ),
}  # fmt: skip


def join():
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    return init_world()


def engine_of(model, world, weights, quant=None, bf16=False):
    world.bf16 = bf16
    stage = StageConfig(steps=2, batch_size=2 * world.size, lr=1e-3, quant=quant)
    run = RunConfig(
        recipe="test",
        model={"name": "x", "num_classes": 5},
        data={"source": "digits", "image_size": 16},
        stages={"s": stage},
    )
    return Engine(model, run, stage, ZERO3, world, 2, weights)


def slices(engine):
    """Return every fragment of this rank as (name, offset, latent)."""
    of = engine.quantization.latents_of if engine.quantization else lambda fragment: fragment.values
    return [(f.name, f.offset, of(f).clone()) for fs in engine.shards.fragments for f in fs]


def starts(folder):
    """Return, for each source of weights, the slices of this rank and the model's buffers."""
    world, found = join(), {}
    quant = {"weight": {"n_bits": 2}, "activation": {"n_bits": 2}}
    for name, config in MODELS.items():
        sources = {"init": open_weights(config, 3), "file": None}
        if name != "sret":
            sources["file"] = open_weights(config.model_copy(update={"checkpoint": f"{folder}/{name}.safetensors"}), 3)
        for source, weights in sources.items():
            if weights is not None:
                engine = engine_of(skeleton(config), world, weights)
                found[name, source] = slices(engine), dict(engine.module.named_buffers())
                engine.destroy()
    vit = MODELS["vit"]
    for case, options in {
        "quantized": {"quant": quant},
        "bf16": {"bf16": True},
        "quantized bf16": {"quant": quant, "bf16": True},
    }.items():
        engine = engine_of(skeleton(vit), world, open_weights(vit, 3), **options)
        found["vit", case] = slices(engine), {}
        if case == "bf16":
            config = RunConfig(
                recipe="t", model=vit, data={"source": "digits", "image_size": 16}, stages={"s": engine.stage}
            )
            path = save_checkpoint(folder, config, "s", engine, done=True)
        engine.destroy()
    engine = engine_of(skeleton(vit), world, CheckpointWeights(Checkpoint.open(path)), bf16=True)
    found["vit", "checkpoint"] = slices(engine), {}
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return what `starts` found on two ranks, and the whole models."""
    folder, whole = tmp_path_factory.mktemp("partitioned"), {}
    for name, config in MODELS.items():
        torch.manual_seed(3)
        whole[name] = build_model(config)
        save_file(whole[name].state_dict(), folder / f"{name}.safetensors")
    return ranks.launch(2, f"{__name__}:starts", {"folder": folder}, folder / "ranks", 200, ENV), whole


CASES = [(m, s) for m in MODELS for s in ("init", "file") if (m, s) != ("sret", "file")]


@pytest.mark.parametrize(
    "case", [*CASES, *(("vit", c) for c in ("quantized", "bf16", "quantized bf16", "checkpoint"))], ids=" ".join
)
def test_the_parts_of_all_ranks_are_the_whole_model_bit_for_bit(started, case):
    by_rank, whole = started
    wanted = dict(whole[case[0]].named_parameters())
    seen = dict.fromkeys(wanted, 0)
    for found in by_rank:
        for name, offset, values in found[case][0]:
            assert torch.equal(values, wanted[name].detach().view(-1)[offset : offset + values.numel()]), name
            seen[name] += values.numel()
    assert seen == {name: p.numel() for name, p in wanted.items()}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_buffers_are_those_of_the_whole_model(started, case):
    by_rank, whole = started
    for found in by_rank:
        for name, buffer in whole[case[0]].named_buffers():
            assert torch.equal(found[case][1][name], buffer), name


class Watched:
    """Pass a source of weights on, and note the private memory of this process each time a weight is asked for."""

    def __init__(self, weights):
        self.weights, self.buffers, self.seen = weights, weights.buffers, []

    def part(self, name, numel, part):
        found = self.weights.part(name, numel, part)
        self.seen.append(private_bytes())
        return found


def private_bytes():
    """Return what this process holds besides mapped files, as which a safetensors file is read."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def resident(path):
    """Return how much memory this rank takes at most, in bytes, while a model is filled from a file, and that of the model."""
    world = join()
    config = ModelConfig(name="vit_tiny_patch16_224", num_classes=5, checkpoint=str(path), kwargs=LARGE)
    model, weights = skeleton(config), Watched(open_weights(config, 0))
    before = private_bytes()
    fill(model, weights, ZERO3 | {"train_micro_batch_size_per_gpu": 1}, world)
    return max(weights.seen) - before, sum(p.ds_numel for p in model.parameters()) * 4


LARGE = {"img_size": 16, "patch_size": 4, "embed_dim": 768, "depth": 12, "num_heads": 12}


def test_no_rank_ever_holds_the_whole_model(run_ranks, tmp_path):
    """Of 340 MB each of two ranks takes half, and a weight at a time."""
    path = tmp_path / "large.safetensors"
    model = skeleton(ModelConfig(name="vit_tiny_patch16_224", num_classes=5, kwargs=LARGE))
    save_file(model.state_dict(), path)
    for peak, whole in run_ranks(2, f"{__name__}:resident", path=path, env=ENV):
        assert peak < 0.6 * whole, f"{peak / 1e6:.0f} of {whole / 1e6:.0f} MB"


def misfits(folder):
    join()
    found = []
    for config in (
        MODELS["vit"].model_copy(update={"checkpoint": f"{folder}/absent.safetensors"}),
        MODELS["vit"].model_copy(update={"checkpoint": f"{folder}/other.safetensors"}),
        MODELS["vit"].model_copy(update={"checkpoint": f"{folder}/other.pt"}),
    ):
        with pytest.raises(CheckpointError) as error:
            open_weights(config, 0)
        found.append(str(error.value))
    return found


def test_weights_that_do_not_fit_are_refused_on_every_rank(run_ranks, tmp_path):
    other = build_model(MODELS["vit"].model_copy(update={"num_classes": 6})).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    torch.save(other, tmp_path / "other.pt")
    first, second = run_ranks(2, f"{__name__}:misfits", folder=tmp_path, env=ENV)
    assert first == second
    assert "absent.safetensors does not exist" in first[0]
    assert "other.safetensors: head.bias is (6,), this model has (5,)" in first[1]
    assert "other.pt: head.weight is (6, 30), this model has (5, 30)" in first[2]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, pretrained):
    """Return the folder of runs on ZeRO 1 and 3 that quantize given weights at once, and then teach by the result."""
    folder = tmp_path_factory.mktemp("taught")
    tree = yaml.safe_load(TINY.read_text())
    first = tree["stages"].pop("w2a2")
    tree["stages"].pop("fp")
    del first["init_from"], first["distill"]
    tree["stages"] = {
        "first": first,
        "second": first | {"init_from": "first", "distill": {"teacher": "first"}},
    }
    tree["model"]["checkpoint"] = str(pretrained)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    runs = [
        {
            "recipe": str(folder / "recipe.yaml"),
            "ds_config": ds_config(z),
            "overrides": {},
            "out_dir": str(folder / z),
            "max_steps": 4,
        }
        for z in ("zero1", "zero3")
    ]
    ranks.launch(2, "tests.integration.runs:train_in_process", {"runs": runs}, folder / "ranks", 200, ENV)
    return folder


def test_quantized_stages_and_quantized_teachers_of_partitioned_models_train_as_whole_ones(taught):
    assert losses(taught / "zero3") == losses(taught / "zero1")
    first, second = (load_run_checkpoint(taught / zero) for zero in ("zero1", "zero3"))
    for name, latent in first.latents.items():
        assert torch.equal(second.latents[name], latent), name


def test_a_partitioned_float_model_scores_what_the_whole_one_does(taught):
    scores = [load_run_checkpoint(taught / zero).manifest["results"]["float_top1"] for zero in ("zero1", "zero3")]
    assert scores[0] == scores[1] > 50
