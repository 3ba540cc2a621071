"""A whole run with the product of q and k weights quantized (QKR): float, quantized, annealed (CGA), packed."""

import pytest
import torch
import yaml

from dsquant.checkpoint import load_float, load_run_checkpoint
from dsquant.convert import evaluate_packed
from dsquant.export import load_packed, read_packed
from tests import ranks
from tests.integration.runs import TINY, ds_config, records

OFQ = {
    "qk_reparam": True,
    "weight": {"n_bits": 2, "method": "statsq", "granularity": "per_channel"},
    "activation": {"n_bits": 2, "granularity": "per_token", "bias": "around"},
    "rules": [
        {"match": match, "n_bits": 8, "method": "lsq", "granularity": "per_tensor", "bias": "none"}
        for match in ("patch_embed.*", "head*")
    ],
    "calibration": {"batches": 1, "rounds": 1, "init": "lsq"},
}
CGA = {"oscillation": {"cga": {"enabled": True, "boundary_range": 0.05}}, "calibration": {"inherit": "all"}}
STEPS, WIDTH = 3, 16
PRECISIONS = ("fp32", "bf16")


def train_runs(folder):
    """On one rank: train the four stages in float32 and in bfloat16."""
    import deepspeed

    from dsquant.config import load_ds_config
    from dsquant.engine import init_world
    from dsquant.loop import Run
    from dsquant.run_folder import prepare_run

    deepspeed.init_distributed(dist_backend="gloo")
    world = init_world()
    for precision in PRECISIONS:
        overrides = {"telemetry.wandb": "disabled", "max_steps": STEPS, "precision": precision}
        config, run_dir = prepare_run(str(folder / "recipe.yaml"), overrides, folder / precision, False)
        world.use_precision(precision)
        Run(config, load_ds_config(ds_config("zero1")), run_dir, world).execute()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where the runs of all precisions lie."""
    made = tmp_path_factory.mktemp("reparam")
    tree = yaml.safe_load(TINY.read_text())
    tree["model"]["kwargs"] |= {"embed_dim": 16, "num_heads": 2}
    stage = tree["stages"].pop("w2a2") | {"quant": OFQ}
    tree["stages"]["first"] = stage
    tree["stages"]["second"] = stage | {"init_from": "first"}  # its latents alone: statistics are taken anew
    tree["stages"]["annealed"] = stage | {"init_from": "second", "quant": OFQ | CGA}
    (made / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    ranks.launch(1, f"{__name__}:train_runs", {"folder": made}, made / "ranks", 300, {"DS_ACCELERATOR": "cpu"})
    return made


@pytest.fixture(params=PRECISIONS)
def made(request, folder):
    """Return the folder of a run, and its precision."""
    return folder / request.param, request.param


def test_a_stage_starts_from_float_latents_of_the_one_before_float_or_quantized(made):
    folder, _ = made
    q_and_k = slice(0, 2 * WIDTH)
    names = [f"blocks.{i}.attn.qkv.weight" for i in range(2)]
    latents = {
        s: load_float(load_run_checkpoint(folder, s)).state_dict() for s in ("fp", "first", "second", "annealed")
    }
    for before, after in (("fp", "first"), ("first", "second"), ("second", "annealed")):
        for name in names:
            moved = (latents[before][name] - latents[after][name])[q_and_k].abs()
            assert (
                0 < moved.max() <= 3e-3 * STEPS
            )  # AdamW's steps of at most lr (and decay), from where the other ended
            assert latents[after][name][q_and_k].unique().numel() > WIDTH * WIDTH  # no image of few levels
    losses = {s: records(folder, "eval", s)[0]["loss"] for s in ("first", "second", "annealed")}
    assert len(set(losses.values())) == 3


def test_an_annealed_stage_begins_where_the_one_before_ended(made):
    folder, _ = made
    ended, begun = records(folder, "eval", "second")[-1], records(folder, "eval", "annealed")[0]
    assert begun["step"] == 0
    assert (begun["top1"], begun["loss"]) == (ended["top1"], ended["loss"])


def test_the_packed_model_scores_exactly_as_training_did_at_its_end(made):
    """In bf16 too: there the product is that of the bf16 weights, which is what forward passes saw."""
    folder, precision = made
    found = evaluate_packed(folder / "model.packed.safetensors", folder / "data" / "val", device="cpu")
    last = records(folder, "eval", "annealed")[-1]
    assert last["step"] == STEPS
    assert (found["top1"], found["loss"]) == (last["top1"], last["loss"])
    packed = read_packed(folder / "model.packed.safetensors")
    assert packed.training["precision"] == precision
    assert sorted(packed.products) == [f"blocks.{i}.attn.qkv.weight" for i in range(2)]


def test_a_packed_product_follows_the_model_to_another_dtype_and_its_scale_stays_float32(made):
    model = load_packed(made[0] / "model.packed.safetensors").bfloat16()
    qkv = model.blocks[0].attn.qkv
    assert qkv.packed_product.weight.dtype == qkv.weight.dtype == torch.bfloat16
    assert qkv.packed_product.weight_scale.dtype == torch.float32
    exact = read_packed(made[0] / "model.packed.safetensors").image("blocks.0.attn.qk.weight")
    assert torch.equal(qkv.packed_product.weight, exact.bfloat16())
