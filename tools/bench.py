"""Benchmarks; each prints JSON lines.

python tools/bench.py step --model deit_tiny_patch16_224 --batch 16 --n_bits 2     training, float against quantized
python tools/bench.py shard --threads 2                                            the shard step against fused AdamW
python tools/bench.py ops                                                          each op by each backend
python tools/bench.py packed --threads 1,2                                         linear layers on packed weights
python tools/bench.py packed_model --batch 1,8                                     a packed model against float ones
python tools/bench.py loader --shards 'val-*.tar'                                  the data stream against other loaders
python tools/bench.py memory --model deit_tiny_patch16_224 --batch 16              memory on every ZeRO stage
"""

import sys

import fire

from dsquant.benchmarks.loader import loader
from dsquant.benchmarks.memory import memory
from dsquant.benchmarks.ops import ops
from dsquant.benchmarks.packed import packed
from dsquant.benchmarks.packed_model import packed_model
from dsquant.benchmarks.shard import shard
from dsquant.benchmarks.step import step
from dsquant.errors import DsquantError

COMMANDS = {
    "step": step,
    "shard": shard,
    "ops": ops,
    "packed": packed,
    "packed_model": packed_model,
    "loader": loader,
    "memory": memory,
}

if __name__ == "__main__":
    try:
        fire.Fire(COMMANDS)
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
