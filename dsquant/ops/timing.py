"""Time functions against each other: all take turns in one run, so that a noisy machine is noisy for each."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Return the median wall-clock seconds of each function, all taking turns in one run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
