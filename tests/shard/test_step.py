"""The shard step as a whole, on the simplest layout: parameters that are their own shards, as under ZeRO 0."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dsquant.config import QuantConfig
from dsquant.engine import OPTIMIZERS
from dsquant.models import insert_sites
from dsquant.quant.calibrate import calibrate
from dsquant.quant.state import QuantState
from dsquant.shard.fragments import Fragment, ShardMap
from dsquant.shard.optimizer import ShardOptimizer, ShardQuantization

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 8}


class HostReads(TorchDispatchMode):
    """Count what makes a GPU's host wait: values read back, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def make(optimizer="adamw", device="cpu", depth=SMALL["depth"], **quant):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL | {"depth": depth}).to(device)
    tensor = {"n_bits": 2}
    config = QuantConfig(**{"weight": tensor, "activation": tensor, **quant})
    sites = insert_sites(model, config.policy())
    shard_optimizer = ShardOptimizer(OPTIMIZERS[optimizer](model.parameters(), lr=1e-3))
    named = list(model.named_parameters())
    shards = ShardMap(
        [p for _, p in named],
        [[Fragment(name, p, 0, p.numel(), 0, tuple(p.shape))] for name, p in named],
        [[name] for name, _ in named],
        replicated=True,
        in_place=True,
        publish=lambda: None,
    )
    state = QuantState(sites.weights, sites.activations, torch.device(device))
    quantization = ShardQuantization(shards, sites.weights, state, config)
    quantization.initialize_scales()
    quantization.start()
    images = torch.randn(8, 3, 16, 16).to(device)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSQ_BACKEND", "torch")  # the same start for each backend: sums in activations round elsewhere
        calibrate(sites.quantizers, state, model.eval(), [images], 1, lambda: sites.bind(state))
    state.set_learning_rates(config.scale_lr, config.scale_lr_mode)
    shard_optimizer.quantization = quantization
    return model.train(), shard_optimizer, quantization, images


def train_step(model, optimizer, quantization, images, progress=0.5, observe=False):
    loss = F.cross_entropy(model(images), torch.arange(8, device=images.device) % 5)
    loss.backward()
    quantization.begin_step(progress, 1.0, observe)
    optimizer.step()
    quantization.finish_step()
    optimizer.zero_grad()
    quantization.state.zero_grad()
    return loss.detach()


FREEZE = {"momentum": 0.1, "freeze": {"enabled": True, "start": 0.0}}
CGA = {"cga": {"enabled": True}, "dampening": {"weight": 0.1, "start": 0.0}}
STATSQ = {"n_bits": 2, "method": "statsq", "granularity": "per_channel"}
BINARY = {"n_bits": 1, "method": "elastic", "bias": "around"}


@pytest.mark.parametrize(
    "quant",
    [
        {"obr": {"weight": 0.01, "start": 0.0}, "oscillation": FREEZE},
        {
            "weight": {"n_bits": 2, "method": "seq"},
            "oscillation": FREEZE,
            "grad_scale": "mdq",
            "scale_optimizer": "sgd",
        },
        {"weight": STATSQ, "oscillation": CGA},
        {"weight": {"n_bits": 1, "method": "bwn"}, "activation": BINARY, "oscillation": CGA},
    ],
    ids=["obr and freezing", "seq, mdq and freezing", "statsq and annealing", "binary and annealing"],
)
def test_a_step_with_the_whole_method_reads_nothing_back(quant):
    model, optimizer, quantization, images = make(**quant)
    train_step(model, optimizer, quantization, images)
    optimizer.inner.step = lambda: None  # torch's own AdamW reads its step count, on CPU a CPU scalar
    with HostReads() as reads:
        train_step(model, optimizer, quantization, images, observe=True)
    assert reads.seen == []


def test_after_every_optimizer_parameters_hold_images_and_latents_have_moved():
    for name in OPTIMIZERS:
        model, optimizer, quantization, images = make(name)
        before = {n: quantization.latent(w).clone() for n, w in quantization.weights.items()}
        for _ in range(3):
            assert torch.isfinite(train_step(model, optimizer, quantization, images)), name
        parameters = dict(model.named_parameters())
        for weight_name, weight in quantization.weights.items():
            latent, site = quantization.latent(weight), weight.site
            scale = weight.replicated_scale.repeat_interleave(site.grouping.inner)
            codes = (latent / scale).clamp(site.spec.qmin, site.spec.qmax).round()
            assert torch.equal(weight.tracker.codes, codes.to(torch.int8)), (name, weight_name)
            assert torch.equal(parameters[weight_name].detach().flatten(), codes * scale), (name, weight_name)
            assert not torch.equal(latent, before[weight_name]), (name, weight_name)


def test_training_lowers_the_loss():
    model, optimizer, quantization, images = make()
    losses = [train_step(model, optimizer, quantization, images).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_first_quantized_loss_is_that_of_a_model_that_knows_something():
    """Calibration keeps most of a trained float model: far from chance, where clipped softmax sites would put it."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 5
    images += labels.view(-1, 1, 1, 1) * 0.5
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        adam.step()
    config = QuantConfig(weight={"n_bits": 4}, activation={"n_bits": 4})
    sites = insert_sites(model, config.policy())
    state = QuantState(sites.weights, sites.activations)
    with torch.no_grad():
        float_loss = F.cross_entropy(model.eval()(images), labels)
        calibrate(sites.quantizers, state, model, [images], 2, lambda: sites.bind(state))
        quantized_loss = F.cross_entropy(model(images), labels)
    chance = torch.log(torch.tensor(5.0))
    assert quantized_loss < float_loss + 0.25 * (chance - float_loss)


def test_obr_keeps_weights_nearer_to_their_bins():
    distance = {}
    for weight in (0.0, 1.0):
        model, optimizer, quantization, images = make(obr={"weight": weight, "start": 0.0})
        for _ in range(30):
            train_step(model, optimizer, quantization, images, progress=1.0)
        spread = [
            (quantization.latent(w) / w.replicated_scale.repeat_interleave(w.site.grouping.inner)).clamp(-2, 1)
            for w in quantization.weights.values()
            if w.site.spec.n_bits == 2
        ]
        distance[weight] = torch.cat([(v - v.round()).abs() for v in spread]).mean()
    assert distance[1.0] < 0.7 * distance[0.0]
