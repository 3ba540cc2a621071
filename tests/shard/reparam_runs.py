"""Runs with the product of q and k weights quantized (QKR), for `test_qk_reparam.py`, and the same written out in one process."""

import torch
import torch.nn.functional as F
from torch import nn

from dsquant.checkpoint import Checkpoint, restore, save_checkpoint
from dsquant.config import parse_config
from dsquant.engine import Engine, init_world
from dsquant.quant.calibrate import calibrate
from tests.shard.method_oracle import FakeWeight
from tests.shard.method_runs import BATCH, KWARGS, LR, STEPS, WEIGHT_DECAY, ZERO, batch, everything, float_model, train

WIDTH, HEADS, QKV = 16, 2, "blocks.0.attn.qkv.weight"
ENDS = [{"match": match, "quantize": False} for match in ("patch_embed.*", "head*")]
FLOAT = [{"match": match, "quantize": False} for match in ("*.input", "*.attn.v", "*.attn.qk", "*.probs")]
STATSQ = {"n_bits": 2, "method": "statsq", "granularity": "per_channel"}
CASES = {
    "statsq": {"rules": [*ENDS, *FLOAT]},
    "four bits a head": {
        "rules": [*ENDS, *FLOAT, {"match": "*.attn.qk.weight", "n_bits": 4, "granularity": "per_head"}]
    },
    "bwn": {"weight": {"n_bits": 1, "method": "bwn"}, "rules": [*ENDS, *FLOAT]},
    "cga": {"rules": [*ENDS, *FLOAT], "oscillation": {"cga": {"enabled": True, "boundary_range": 0.1}}},
    "activations too": {"activation": {"n_bits": 3, "granularity": "per_token", "bias": "around"}, "rules": ENDS},
}
WRITTEN_OUT = [case for case in CASES if case != "activations too"]


def config_of(case):
    quant = {"qk_reparam": True, "weight": STATSQ, "activation": {"n_bits": 2}, "scale_lr": 0.02, **CASES[case]}
    stage = {"quant": quant, "steps": STEPS, "batch_size": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY}
    model = {"name": "vit_tiny_patch16_224", "num_classes": 5, "kwargs": KWARGS}
    data = {"source": "digits", "image_size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    return parse_config({"recipe": "reparam", "model": model, "data": data, "stages": {"q": stage}}, case)


class Oracle:
    """Train the model of a case with every quantizer in the forward pass, AdamW on plain parameters."""

    def __init__(self, case):
        quant = config_of(case).stages["q"].quant
        self.model, method = float_model().train(), str(quant.weight.method)
        self.cga = quant.oscillation.cga
        linear = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
        self.latents = {f"{name}.weight": module.weight for name, module in linear.items()}
        self.rows = {name: slice(2 * WIDTH if name == QKV else 0, None) for name in self.latents}
        n_bits = quant.weight.n_bits
        groups = {n: len(w[self.rows[n]]) if method == "statsq" else 1 for n, w in self.latents.items()}
        self.fakes = {n: FakeWeight(w, groups[n], method, n_bits) for n, w in self.latents.items()}
        special = quant.rules[-1] if "a head" in case else None
        count = HEADS if special else HEADS * WIDTH if method == "statsq" else 1
        self.product = FakeWeight(
            torch.zeros(HEADS * WIDTH, WIDTH), count, method, special.n_bits if special else n_bits
        )
        matrices = [p for n, p in self.model.named_parameters() if p.ndim >= 2 and n not in ("pos_embed", "cls_token")]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer, self.losses = torch.optim.AdamW(groups, lr=LR), []

    def image(self, name):
        return self.fakes[name](self.latents[name][self.rows[name]])

    def w_qk(self):
        """Return the image of the product of every head, (H * C, C)."""
        weight = self.latents[QKV].double()
        q, k = (part.view(HEADS, -1, WIDTH) for part in (weight[:WIDTH], weight[WIDTH : 2 * WIDTH]))
        product = torch.einsum("hda,hdb->hab", q, k).float().reshape(HEADS * WIDTH, WIDTH)
        if self.cga.enabled:
            product = torch.where(self.product.near(product, self.cga.boundary_range), product, product.detach())
        return self.product(product)

    def logits(self, images):
        model, block = self.model, self.model.blocks[0]
        x = model._pos_embed(model.patch_embed(images))
        h = block.norm1(x)
        scores = (
            torch.einsum("bia,hac,bjc->bhij", h, self.w_qk().view(HEADS, WIDTH, WIDTH), h) * (WIDTH / HEADS) ** -0.5
        )
        v = F.linear(h, self.image(QKV), block.attn.qkv.bias[2 * WIDTH :]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(out, self.image("blocks.0.attn.proj.weight"), block.attn.proj.bias)
        h = F.gelu(F.linear(block.norm2(x), self.image("blocks.0.mlp.fc1.weight"), block.mlp.fc1.bias))
        x = x + F.linear(h, self.image("blocks.0.mlp.fc2.weight"), block.mlp.fc2.bias)
        return model.head(model.norm(x)[:, 0])

    def step(self, images, labels):
        loss = F.cross_entropy(self.logits(images), labels)
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        held = {}
        if self.cga.enabled:
            for name, weight in self.latents.items():
                part = weight.detach()[self.rows[name]]
                held[name] = self.fakes[name].near(part, self.cga.boundary_range), part.clone()
                weight.grad[self.rows[name]] *= held[name][0]
        self.optimizer.step()
        for name, (free, before) in held.items():
            part = self.latents[name].data[self.rows[name]]
            part.copy_(torch.where(free, part, before))


def start_engine(case, zero, world):
    """Return an engine of a case; what is an activation site has its scales from a batch, the same on every rank."""
    config = config_of(case)
    ds_config = {"zero_optimization": ZERO.get(zero, {"stage": zero}), "zero_allow_untested_optimizer": True}
    engine = Engine(float_model(), config, config.stages["q"], ds_config, world, STEPS)
    if engine.sites.quantizers:
        engine.eval()
        bind = lambda: engine.sites.bind(engine.state)  # noqa: E731
        calibrate(engine.sites.quantizers, engine.state, engine.evaluate_logits, [batch(0)[0]], 1, bind, init="lsq")
        engine.train()
    engine.finish_calibration()
    return engine


def run_cases(zero, cases):
    """On one rank: losses, what `everything` holds of this rank, whole latents by fragments, and logits at the end."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    world, found = init_world(), {}
    for case in cases:
        engine = start_engine(case, zero, world)
        losses, _ = train(engine, STEPS)
        latents = {
            f.name: (f.offset, engine.quantization.latents_of(f).clone()) for fs in engine.shards.fragments for f in fs
        }
        codes = {
            name: (w.fragment.offset, w.tracker.codes.clone())
            for name, w in engine.quantization.weights.items()
            if w.fragment is not None
        }
        engine.eval()
        found[case] = {
            "losses": losses,
            "latents": latents,
            "codes": codes,
            "logits": engine.evaluate_logits(batch(99)[0]),
        }
        engine.destroy()
    return found


def run_and_resume(folder, cases, middle, zero):
    """On one rank: what a run that went through ends with, what one restored in its middle does, and logits there."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    world, found = init_world(), {}
    for case in cases:
        config, engine = config_of(case), start_engine(case, zero, world)
        losses, _ = train(engine, middle)
        path = save_checkpoint(folder / case, config, "q", engine, done=False)
        engine.eval()
        logits = engine.evaluate_logits(batch(99)[0])
        engine.train()
        losses += train(engine, STEPS)[0]
        through = losses[middle:], everything(engine)
        engine.destroy()
        engine = start_engine(case, zero, world)
        train(engine, 2)  # it has a history of its own, which must not show
        restore(engine, Checkpoint.open(path))
        resumed = train(engine, STEPS)[0], everything(engine)
        engine.destroy()
        found[case] = through, resumed, logits
    return found
