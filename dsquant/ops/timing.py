"""Time functions against each other: all take turns in one run, so that a noisy machine is noisy for each."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def interleaved(
    runs: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2, before: dict[str, Callable[[], Any]] | None = None
) -> dict[str, float]:  # fmt: skip
    """Return the median wall-clock seconds of each function, all taking turns in one run; `before` it may come one untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            if before and name in before:
                before[name]()
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def captured(run: Callable[[], Any], warmup: int = 3, times: int = 1) -> Callable[[], None]:
    """Return a replay of what `run` launches on the GPU, some times in a row, as a CUDA graph: Python's launches take longer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, and libraries set up, before the capture
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()

    def replay(keeping: Callable[[], Any] = run) -> None:  # what the graph reads lives as long as it does
        graph.replay()

    return replay


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
