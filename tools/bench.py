"""Benchmarks: `python tools/bench.py step --model deit_tiny_patch16_224 --batch 16 --n_bits 2` prints one JSON line."""

import sys

import fire

from dsquant.benchmark import step
from dsquant.errors import DsquantError

if __name__ == "__main__":
    try:
        fire.Fire({"step": step})
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
