"""Measure what quantization-aware training costs over float training, interleaved in one run."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from dsquant.config import ModelConfig, QuantConfig, RunConfig, StageConfig
from dsquant.engine import Engine, World, init_world
from dsquant.models import build_model
from dsquant.ops.timing import interleaved
from dsquant.quant.calibrate import calibrate

DS_CONFIG = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
STEPS_OF_SCHEDULE = 1000
OPERATORS = 12  # that the profile names


def step(
    model: str = "deit_tiny_patch16_224", batch: int = 16, n_bits: int = 2, steps: int = 10, threads: int | None = None,
    out: str | None = None,
) -> None:  # fmt: skip
    """Time a float training step against one of full-method QAT and print one JSON line.

    Both train the same model by the same engine on the same random images: forward, backward, AdamW. QAT adds all
    activation sites, weight quantization on the shards, OBR and oscillation tracking. Steps alternate, medians of
    wall-clock seconds are given. Saved bytes: distinct storages that autograd keeps for backward, parameters excluded.
    `by_operator`: seconds a step within operators (not those that they call) of the float and the QAT step, from a profile of
    some more steps; those that differ most. `in_operators_s`: of all; on a GPU the time of its kernels, which a step takes where
    the batch is large enough that the GPU is never without work.

    Args:
        model: timm name of a family with quantization sites.
        batch: images a step.
        n_bits: of weights and activations (8 at patch embedding and head).
        steps: timed steps of each, after two warm-up steps.
        threads: CPU threads (default: torch's).
        out: also write the line to this file.
    """
    if threads:
        torch.set_num_threads(threads)
    world = init_world()
    world.use_precision("auto")
    float_engine, qat_engine = (_engine(model, batch, quant, world) for quant in (None, full_method(n_bits)))
    images, labels = _images(float_engine.module, batch, world)
    _calibrate(qat_engine, images)
    runs = {
        name: (lambda engine=engine: train_step(engine, images, labels))
        for name, engine in (("float", float_engine), ("qat", qat_engine))
    }
    saved = {
        name: saved_bytes(run, _parameters(e))
        for (name, run), e in zip(runs.items(), (float_engine, qat_engine), strict=True)
    }
    seconds = interleaved(runs, steps)
    float_ops, qat_ops = (by_operator(run, world.device.type) for run in runs.values())
    differing = sorted(float_ops | qat_ops, key=lambda op: -abs(qat_ops.get(op, 0.0) - float_ops.get(op, 0.0)))
    line = json.dumps(
        {
            "model": model,
            "batch": batch,
            "n_bits": n_bits,
            "threads": torch.get_num_threads(),
            "device": _device_name(world),
            "float_s": seconds["float"],
            "qat_s": seconds["qat"],
            "time_ratio": seconds["qat"] / seconds["float"],
            "float_saved_bytes": saved["float"],
            "qat_saved_bytes": saved["qat"],
            "saved_ratio": saved["qat"] / saved["float"],
            "in_operators_s": [sum(float_ops.values()), sum(qat_ops.values())],
            "by_operator": {op: [float_ops.get(op, 0.0), qat_ops.get(op, 0.0)] for op in differing[:OPERATORS]},
            "torch": torch.__version__,
        }
    )
    print(line)
    if out:
        with open(out, "w") as file:
            file.write(line + "\n")


def full_method(n_bits: int) -> QuantConfig:
    """Return the whole method at n bits: all sites, OBR active from the first step, tracking."""
    tensor = {"n_bits": n_bits}
    return QuantConfig(weight=tensor, activation=tensor, obr={"weight": 0.01, "start": 0.0, "max_bits": 8})


def _engine(model: str, batch: int, quant: QuantConfig | None, world: World) -> Engine:
    torch.manual_seed(0)
    config = ModelConfig(name=model, num_classes=1000)
    stage = StageConfig(steps=STEPS_OF_SCHEDULE, batch_size=batch * world.size, lr=5e-4, weight_decay=0.0, quant=quant)
    data = {"source": "digits", "image_size": 224}  # the engine reads none of it
    run = RunConfig(recipe="bench", model=config, data=data, stages={"bench": stage})
    return Engine(build_model(config), run, stage, DS_CONFIG, world, STEPS_OF_SCHEDULE)


def _images(model: nn.Module, batch: int, world: World) -> tuple[Tensor, Tensor]:
    size = getattr(model.patch_embed, "img_size", (224, 224))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *size, generator=generator)
    return images.to(world.device), torch.randint(0, 1000, (batch,), generator=generator).to(world.device)


def _calibrate(engine: Engine, images: Tensor) -> None:
    engine.eval()
    bind = lambda: engine.sites.bind(engine.state)  # noqa: E731
    calibrate(engine.sites.quantizers, engine.state, engine.evaluate_logits, [images[:4]], 1, bind)
    engine.train()
    engine.finish_calibration()


def train_step(engine: Engine, images: Tensor, labels: Tensor) -> None:
    """Take one optimizer step on a batch."""
    loss = F.cross_entropy(engine.forward(images).float(), labels)
    engine.backward(loss)
    engine.step(engine.stage.lr)


def by_operator(run: Callable[[], Any], device: str, steps: int = 3) -> dict[str, float]:
    """Return the seconds of each operator in one call of `run`, without those of operators that it calls."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if device == "cuda" else [kind.CPU]) as profile:
        for _ in range(steps):
            run()
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    operators = (event for event in profile.key_averages() if event.device_type == DeviceType.CPU)  # kernels are theirs
    found = {event.key: getattr(event, own) / steps / 1e6 for event in operators}
    return {op: seconds for op, seconds in found.items() if seconds > 0}


def _parameters(engine: Engine) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in engine.module.parameters()}


def saved_bytes(run: Callable[[], Any], excluded: set[int]) -> int:
    """Return the bytes of distinct storages that autograd saves for backward while `run` runs, parameters excluded."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
