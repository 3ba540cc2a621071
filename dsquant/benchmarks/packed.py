"""Measure a linear layer with packed weights against torch and ONNX Runtime at the shapes of a ViT, interleaved in one run."""

import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsquant.benchmarks.packed_engines import EngineError, Layer, engines
from dsquant.errors import ConfigError
from dsquant.ops.timing import captured, interleaved

SHAPES = "768x3072,3072x768,768x2304"  # in x out: fc1, fc2 and qkv of ViT-B
COPIES = {"cpu": 4, "cuda": 32}


def packed(
    shapes: str = SHAPES, m: str = "1,197", threads: str = "1,2", repeats: int = 15, copies: int | None = None,
    device: str = "cpu", out: str | None = None,
) -> None:  # fmt: skip
    """Time a linear layer in every engine and print one JSON line a case.

    A line holds m, k (in), n (out), n_bits, a_bits, threads, engine, seconds and ratio_to_torch_fp32, how many times faster
    than torch in float32 the engine is. Engines take turns; seconds are medians of wall-clock time for one layer. Activation
    codes are made inside the timed call. An engine that is not there gets a line that says so. On a GPU a run is a CUDA graph, so
    that kernels are timed and not their launches, and gb_per_s says how fast the weights were read, beside a line for a copy.

    Args:
        shapes: in x out, comma-separated.
        m: rows of the input, comma-separated.
        threads: of torch and ONNX Runtime, comma-separated.
        repeats: timed runs of each engine, after two warm-up runs.
        copies: layers of a shape that one run goes through in turn (default: 4, on a GPU 32). Several, as in a model, do not
            find their weights in the cache from the run before; with 1 the weights may stay there.
        device: cpu or cuda.
        out: also write the lines to this file.
    """
    if device not in COPIES or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"device is {device!r}; here is {'cpu or cuda' if torch.cuda.is_available() else 'cpu alone'}"
        )
    lines = [_copy(repeats)] if device == "cuda" else []
    for line in lines:
        print(line)
    for count in integers(threads) if device == "cpu" else [1]:
        torch.set_num_threads(count)
        for shape in str(shapes).split(","):
            k, n = _shape(shape)
            for rows in integers(m):
                for line in _case(rows, k, n, device, count, repeats, copies or COPIES[device]):
                    print(json.dumps(line), flush=True)
                    lines.append(json.dumps(line))
    if out:
        Path(out).write_text("\n".join(lines) + "\n")


def _shape(text: str) -> tuple[int, int]:
    sizes = integers(text.replace("x", ","))
    if len(sizes) != 2:
        raise ConfigError(f"{text!r} is no shape in x out, such as 768x3072")
    return sizes[0], sizes[1]


def integers(text: object) -> list[int]:
    """Parse `1,197`, which fire gives as a tuple, an int or a string."""
    parts = text if isinstance(text, (tuple, list)) else str(text).split(",")
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of whole numbers, such as 1,197 or 768x3072") from None


def _run(layers: list[Layer], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _copy(repeats: int) -> str:
    """Return the line of a copy of 256 MiB on the GPU, which reads and writes as fast as its memory goes."""
    source = torch.ones(1 << 26, device="cuda")
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return json.dumps({"engine": "copy", "seconds": seconds, "gb_per_s": 2 * source.nbytes / seconds / 1e9})


@torch.inference_mode()
def _case(m: int, k: int, n: int, device: str, threads: int, repeats: int, copies: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    x, weights = randn(m, k), [(randn(n, k), randn(n)) for _ in range(copies)]
    runs, missing = {}, {}
    for engine in engines(device, threads):
        try:
            layers = [engine.build(*weight) for weight in weights]
        except EngineError as error:
            missing[engine] = str(error)
            continue
        run = partial(_run, layers, x.to(engine.dtype))
        runs[engine] = run if device == "cpu" else captured(run)
    seconds = interleaved(runs, repeats)
    floats = next(taken for engine, taken in seconds.items() if engine.name == "torch fp32")
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    machine = {"copies": copies, device.replace("cuda", "gpu"): name, "torch": torch.__version__}
    common = {"m": m, "k": k, "n": n, "threads": threads}
    lines = []
    for engine in [*runs, *missing]:
        line = {**common, "n_bits": engine.n_bits, "a_bits": engine.a_bits, "engine": engine.name}
        if engine in missing:
            lines.append({**line, "seconds": None, "ratio_to_torch_fp32": None, "unavailable": missing[engine]})
            continue
        taken = seconds[engine] / copies
        line |= {"seconds": taken, "ratio_to_torch_fp32": round(floats / seconds[engine], 3)}
        if device == "cuda":
            line["gb_per_s"] = round(n * k * engine.n_bits / 8 / taken / 1e9, 1)
        lines.append(line | machine)
    return lines
