"""Runs of the shard step on ranks, one for each method and cure of oscillation, for `test_methods.py` to look at."""

import torch
import torch.nn.functional as F

from dsquant.checkpoint import Checkpoint, restore, save_checkpoint
from dsquant.config import parse_config
from dsquant.engine import Engine, init_world
from dsquant.models import build_model

STEPS, LR, WEIGHT_DECAY, BATCH = 12, 4e-3, 0.1, 16
KWARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
FLOAT = [
    {"match": match, "quantize": False} for match in ("patch_embed.*", "head*", "*.input", "*.attn.[qkv]", "*.probs")
]
DAMPEN = {"dampening": {"weight": 0.5, "start": 0.0}}
OBR = {"weight": 0.05, "start": 0.0, "aggregation": "kernel_mean"}
FREEZE = {"momentum": 0.3, "freeze": {"enabled": True, "start": 0.0, "first": 0.4, "last": 0.2}}
CGA = {"cga": {"enabled": True, "boundary_range": 0.1}}
SEQ, STATSQ = {"n_bits": 2, "method": "seq"}, {"n_bits": 2, "method": "statsq", "granularity": "per_channel"}
CASES = {
    "lsq": {"weight": {"n_bits": 2}},
    "lsq_plus": {"weight": {"n_bits": 3}, "weight_init": "lsq_plus"},
    "mdq": {"weight": {"n_bits": 2}, "grad_scale": "mdq", "scale_optimizer": "sgd"},
    "seq": {"weight": SEQ},
    "ternary": {"weight": {"n_bits": 2, "method": "ternary"}},
    "elastic": {"weight": {"n_bits": 1, "method": "elastic"}},
    "statsq": {"weight": STATSQ},
    "bwn": {"weight": {"n_bits": 1, "method": "bwn"}},
    "dampening": {"weight": {"n_bits": 2}, "oscillation": DAMPEN},
    "dampened statsq": {"weight": STATSQ, "oscillation": DAMPEN},
    "obr": {"weight": {"n_bits": 2}, "obr": OBR},
    "obr by channel": {"weight": {"n_bits": 2, "granularity": "per_channel"}, "obr": OBR},
    "obr of bwn": {"weight": {"n_bits": 1, "method": "bwn"}, "obr": OBR},
    "obr and dampening": {"weight": SEQ, "obr": OBR, "oscillation": DAMPEN},
    "freezing": {"weight": SEQ, "oscillation": FREEZE},
    "cga": {"weight": STATSQ, "oscillation": CGA},
    "cga of lsq": {"weight": {"n_bits": 2}, "oscillation": CGA},
}
ZERO = {
    1: {"stage": 1},
    3: {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000},  # several flats
}


def quant_of(case):
    return {"activation": {"n_bits": 2}, "rules": FLOAT, "scale_lr": 0.02, **CASES[case]}


def config_of(case):
    stage = {"quant": quant_of(case), "steps": STEPS, "batch_size": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY}
    model = {"name": "vit_tiny_patch16_224", "num_classes": 5, "kwargs": KWARGS}
    data = {"source": "digits", "image_size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    return parse_config({"recipe": "methods", "model": model, "data": data, "stages": {"q": stage}}, case)


def float_model():
    """Build the model that every run starts from, with weights as large as training leaves them."""
    torch.manual_seed(0)
    model = build_model(config_of("lsq").model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(std=0.2)
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def start_engine(case, zero, world):
    config = config_of(case)
    ds_config = {"zero_optimization": ZERO[zero], "zero_allow_untested_optimizer": True}
    engine = Engine(float_model(), config, config.stages["q"], ds_config, world, STEPS)
    engine.finish_calibration()
    return engine


def train(engine, until):
    """Train up to a step on this rank's share of each batch; return its losses and the latents before each step."""
    losses, latents, world = [], [], engine.world
    engine.train()
    while engine.step_index < until:
        images, labels = (part.chunk(world.size)[world.rank] for part in batch(engine.step_index))
        latents.append(fragments(engine, "latent"))
        loss = F.cross_entropy(engine.forward(images), labels)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step(LR, observe=True)
    return losses, latents


def fragments(engine, part):
    """Return {name: (offset, values)} of this rank: its latents, or a part of the tracker."""
    found, quantization = {}, engine.quantization
    for name, weight in quantization.weights.items():
        if weight.fragment is not None:
            values = quantization.latent(weight) if part == "latent" else getattr(weight.tracker, part)
            found[name] = weight.fragment.offset, values.detach().clone()
    return found


def outcome(engine, losses, latents):
    parts = ["codes", "frozen"] if engine.quant.oscillation.freeze.enabled else ["codes"]
    return {
        "losses": losses,
        "latents": [*latents, fragments(engine, "latent")],
        **{part: fragments(engine, part) for part in parts},
        "scales": {key: engine.state.values[e.slice].clone() for key, e in engine.state.entries.items()},
        "apart": engine.quantization.apart,
        "ratios": {n: s.get("regularizer_ratio") for n, s in engine.quantization.statistics().items()},
    }


def run_cases(zero, cases):
    """On one rank: the outcome of every case."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    world, found = init_world(), {}
    for case in cases:
        engine = start_engine(case, zero, world)
        found[case] = outcome(engine, *train(engine, STEPS))
        engine.destroy()
    return found


def run_and_resume(folder, cases, middle):
    """On one rank: what a run that went through ends with, what one restored in its middle does, and the model there."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    world, found = init_world(), {}
    for case in cases:
        config, engine = config_of(case), start_engine(case, 1, world)
        losses, _ = train(engine, middle)
        path = save_checkpoint(folder / case, config, "q", engine, done=False)
        parameters = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        losses += train(engine, STEPS)[0]
        through = losses[middle:], everything(engine)
        engine.destroy()
        engine = start_engine(case, 1, world)
        train(engine, 2)  # it has a history of its own, which must not show
        restore(engine, Checkpoint.open(path))
        resumed = train(engine, STEPS)[0], everything(engine)
        engine.destroy()
        found[case] = through, resumed, parameters
    return found


def everything(engine):
    """Return all that this rank will go on from: latents, moments, tracker, quantizer state."""
    found = dict(engine.state.state_dict())
    for flat in engine.shards.flats:
        found |= {f"{key} {flat.numel()}": value.clone() for key, value in engine.optimizer.state[flat].items()}
    for part in ("latent", "codes", "direction", "frequency"):
        found |= {f"{part} {name}": values for name, (_, values) in fragments(engine, part).items()}
    return found
