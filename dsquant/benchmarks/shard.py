"""Measure the shard step against torch's fused AdamW on the same weights, interleaved in one run."""

import json
import os
from collections.abc import Callable

import torch

from dsquant.config import QuantConfig
from dsquant.ops import backends
from dsquant.ops.timing import interleaved
from dsquant.quant.state import QuantState
from dsquant.shard.fragments import Fragment, ShardMap
from dsquant.shard.optimizer import ShardOptimizer, ShardQuantization
from dsquant.spec import Grouping, QuantSpec, WeightSite

BLOCK = ((576, 192), (192, 192), (768, 192), (192, 768))  # of DeiT-T


def shard(
    n_bits: int = 2, method: str = "lsq", granularity: str = "per_channel", blocks: int = 12, steps: int = 15,
    threads: int | None = None, out: str | None = None,
) -> None:  # fmt: skip
    """Time the whole shard step (gradients, OBR, AdamW, codes, tracking, images), native and by definition, on CPU.

    The weights are those of DeiT-T's blocks, all in one fp32 flat as ZeRO 1 keeps them. Prints one JSON line; `passes` are
    the mean seconds of each native pass of the fastest backend in a step.

    Args:
        n_bits, method, granularity: of the weights.
        blocks: transformer blocks, 0.44 M weights each.
        steps: timed steps of each, after two warm-up steps.
        threads: CPU threads (default: torch's).
        out: also write the line to this file.
    """
    if threads:
        torch.set_num_threads(threads)
    spec = QuantSpec(n_bits, method=method, granularity=granularity)
    shapes = [shape for _ in range(blocks) for shape in BLOCK]
    numel = sum(rows * cols for rows, cols in shapes)
    inner = _adamw(numel)
    runs, before = {"fused_adamw": inner.step}, {"fused_adamw": _new_gradients(inner)}
    for backend in (backends.TORCH, *backends.ON_CPU):
        if backends.availability(backend).available:
            runs[backend], inner = _shard_step(backend, spec, shapes, numel)
            before[backend] = _new_gradients(inner, backend)
    fastest = list(runs)[-1]
    with backends.forced(backends.TORCH):  # which each of them replaces, before its steps
        seconds, passes = interleaved(runs, steps, before=before), _passes(runs[fastest], before[fastest])
    base = seconds["fused_adamw"]
    line = json.dumps(
        {
            "weights": numel,
            "spec": {"n_bits": n_bits, "method": method, "granularity": granularity},
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "over_fused_adamw": {name: value / base for name, value in seconds.items()},
            "passes": passes,
            "torch": torch.__version__,
        }
    )
    print(line)
    if out:
        with open(out, "w") as file:
            file.write(line + "\n")


def _passes(step: Callable[[], None], before: Callable[[], None], steps: int = 10) -> dict[str, float]:
    """Return the mean seconds of each operator of the shard step in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            before()
            step()
    found = {event.key.removeprefix("dsquant::"): event.self_cpu_time_total for event in profile.key_averages()}
    return {name: total / steps / 1e6 for name, total in found.items() if name.startswith("shard_")}


def _adamw(numel: int) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(numel, generator=generator) * 0.05)
    flat.grad = torch.randn(numel, generator=generator) * 1e-3
    return torch.optim.AdamW([flat], lr=1e-4, fused=True)


def _new_gradients(inner: torch.optim.AdamW, backend: str = backends.TORCH) -> Callable[[], None]:
    """Return what gives a flat a gradient in memory of its own, as DeepSpeed's ZeRO does before each step, which `backend`
    takes.
    """
    (flat,) = inner.param_groups[0]["params"]
    source, kept = flat.grad.clone(), []

    def renew() -> None:
        os.environ["DSQ_BACKEND"] = backend  # as a run does, once; to do so in a step would be timed
        kept[:] = [source.clone()]  # freed here, before the next step, and not while a step is timed
        (flat.grad,) = kept

    return renew


def _shard_step(
    backend: str, spec: QuantSpec, shapes: list[tuple[int, int]], numel: int
) -> tuple[Callable[[], None], torch.optim.AdamW]:  # fmt: skip
    with backends.forced(backend):
        inner = _adamw(numel)
        (flat,) = inner.param_groups[0]["params"]
        sites, fragments, start = [], [], 0
        for index, (rows, cols) in enumerate(shapes):
            grouping = Grouping(rows, cols) if spec.granularity == "per_channel" else Grouping(1, rows * cols)
            sites.append(WeightSite(f"w{index}", (rows, cols), spec, grouping))
            fragments.append(Fragment(f"w{index}", flat, start, rows * cols, 0, (rows, cols)))
            start += rows * cols
        members = [[site.name for site in sites]]
        shards = ShardMap([flat], [fragments], members, replicated=False, in_place=False, publish=lambda: None)
        state = QuantState(sites, [])
        config = QuantConfig(
            weight={"n_bits": spec.n_bits, "method": spec.method, "granularity": spec.granularity},
            activation={"n_bits": 2}, obr={"weight": 0.01, "start": 0.0},
        )  # fmt: skip
        quantization = ShardQuantization(shards, sites, state, config)
        quantization.initialize_scales()
        quantization.start()
        state.set_learning_rates(config.scale_lr, config.scale_lr_mode)
        optimizer = ShardOptimizer(inner)
        optimizer.quantization = quantization

    def step() -> None:
        quantization.begin_step(0.5, 1.0)
        optimizer.step()
        flat.grad = None  # as DeepSpeed does, but where it offloads
        quantization.finish_step()

    return step, inner
