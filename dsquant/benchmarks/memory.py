"""Measure the memory of training: what is saved for backward, what a shard keeps for each weight, the peak of every rank."""

import gc
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from dsquant.engine import Engine, World, init_world, serve
from dsquant.footprint import Job, example_batch, footprint, open_job, passes, training_loss
from dsquant.memory import PeakMemory
from dsquant.models import build_model, model_outputs, open_weights, skeleton
from dsquant.plan import predict, shipped
from dsquant.quant.calibrate import calibrate


def memory(
    model: str = "deit_tiny_patch16_224", batch: int = 16, recipe: str = "imagenet_deit_tiny", stage: str | None = None,
    zero: str | tuple = "zero0,zero1,zero2,zero3", ranks: int = 2, steps: int = 3, out: str | None = None, **overrides: Any,
) -> None:  # fmt: skip
    """Take optimizer steps on every ZeRO stage and print the memory they took, measured and predicted, as one JSON line.

    Weights and samples are random. Saved bytes: distinct storages that autograd keeps for backward, parameters excluded, of
    the stage as it is and with `quant` left out. Peaks are those of the fullest rank, beyond what a process holds that has
    trained a tiny model before (`host`).

    Args:
        model: name in place of the recipe's ("" for the recipe's own).
        batch: samples a rank and pass.
        recipe, stage: what is trained (default: its first quantized stage); dotted overrides as for train.py.
        zero: ds_configs to measure. ranks: processes, on a CPU.
        steps: optimizer steps of each.
        out: also write the line to this file.
    """
    named = {"model.name": model} if model else {}
    job = open_job(recipe, {"model.pretrained": False} | named | overrides, ranks, stage, batch)
    need = footprint(job, torch.float32)
    plain = job.stage.model_copy(update={"quant": None})
    unquantized = Job(
        job.config.model_copy(update={"stages": job.config.stages | {job.name: plain}}), job.name, job.micro_batch
    )
    saved = {
        "quantized": passes(job, torch.float32, device="cpu")[0],
        "float": passes(unquantized, torch.float32, device="cpu")[0],
    }
    found = {}
    for name in zero.split(",") if isinstance(zero, str) else zero:
        (ds,) = shipped((name,)).values()
        by_rank = _on_ranks(ranks, job, ds, steps)
        fullest = max(by_rank, key=lambda rank: rank["step"])
        predicted = predict(name, job, need, ds, ranks, cuda=False)
        found[name] = fullest | {
            "predicted": predicted.peak,
            "predicted_over_measured": predicted.peak / fullest["step"],
        }
    line = json.dumps(
        {
            "model": job.config.model.name, "recipe": recipe, "stage": job.name, "batch": batch, "ranks": ranks, "steps": steps,
            "weights": sum(need.parameters), "quantized_weights": need.quantized, "saved_bytes": saved,
            "saved_ratio": saved["quantized"] / saved["float"], "peaks": found, "torch": torch.__version__,
        }
    )  # fmt: skip
    print(line)
    if out:
        Path(out).write_text(line + "\n")


def _on_ranks(ranks: int, job: Job, ds_config: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Call `measure` on ranks of this machine, each a process of its own."""
    with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        mp.start_processes(_rank, (ranks, port, job, ds_config, steps, folder), nprocs=ranks, start_method="spawn")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, job: Job, ds_config: dict[str, Any], steps: int, folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    found = measure(job, ds_config, steps)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def measure(job: Job, ds_config: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Take optimizer steps of a job's stage on random samples; return losses, and bytes of this rank. Every rank calls this.

    host: of a process that has trained a tiny model, with all that is mapped. Beyond that, build: the most while models are
    built and calibrated; step: the most in the steps; kept: held after them; tracking: what shards keep beyond AdamW's state.
    """
    world = init_world()
    world.use_precision(job.config.precision)
    world.use_threads(job.config.cpu_threads)
    _run(open_job("digits_w2a2", {}, world.size, micro_batch=1), ds_config, world, 1)
    gc.collect()
    memory = PeakMemory(world.device)
    found = _run(job, ds_config, world, steps, memory)
    return {"host": memory.base + memory.mapped()} | found


def _run(
    job: Job, ds_config: dict[str, Any], world: World, steps: int, memory: PeakMemory | None = None
) -> dict[str, Any]:
    memory = memory or PeakMemory(world.device)
    engine, teacher = _start(job, ds_config, world)
    batch = example_batch(job, world.device, world.rank)
    _calibrate(engine, batch[0])
    build = memory.peak()
    memory.start()
    losses = [_step(engine, teacher, job, batch) for _ in range(steps)]
    found = {"build": build, "step": memory.peak(), "kept": memory.held() - memory.base, "losses": losses}
    if engine.quantization is not None:
        owned = [w for w in engine.quantization.weights.values() if w.fragment is not None]
        held = sum(t.nbytes for w in owned for t in w.tracker.tensors().values())
        found["tracking_bytes_per_weight"] = held / sum(w.fragment.numel for w in owned)
    engine.destroy()
    if hasattr(teacher, "destroy"):
        teacher.destroy()
    return found


def _start(job: Job, ds_config: dict[str, Any], world: World) -> tuple[Engine, nn.Module | None]:
    """Build the engine of a stage, and its teacher, as a run does, from random weights."""
    stage, model = job.stage, job.config.model
    teacher = None
    if ds_config["zero_optimization"]["stage"] == 3:
        weights = open_weights(model, job.config.seed)
        if job.taught:
            teacher = serve(skeleton(model), weights, stage, ds_config, world)
        return Engine(skeleton(model), job.config, stage, ds_config, world, 1000, weights), teacher
    torch.manual_seed(job.config.seed)
    if job.taught:
        teacher = build_model(model).to(world.device, torch.bfloat16 if world.bf16 else torch.float32).eval()
        torch.manual_seed(job.config.seed)
    return Engine(build_model(model), job.config, stage, ds_config, world, 1000), teacher


def _calibrate(engine: Engine, inputs: Any) -> None:
    if engine.state is None:
        return
    few = {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    engine.eval()
    bind = lambda: engine.sites.bind(engine.state)  # noqa: E731
    calibrate(engine.sites.quantizers, engine.state, engine.evaluate_logits, [few], 1, bind)
    engine.train()
    engine.finish_calibration()


def _step(engine: Engine, teacher: nn.Module | None, job: Job, batch: tuple[Any, Tensor]) -> float:
    """Take one optimizer step, all its micro-batches being the same one, and return the last loss."""
    for _ in range(job.stage.gradient_accumulation):
        inputs, labels, taught = engine.cast(batch[0]), batch[1], None
        if teacher is not None:
            with torch.no_grad():
                taught = model_outputs(teacher, inputs, hidden=job.stage.distill.hidden > 0)
        loss = training_loss(job, engine.ds, inputs, labels, taught)
        engine.backward(loss)
        engine.step(job.stage.lr)
    return loss.item()
