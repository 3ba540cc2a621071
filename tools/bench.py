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

from dsquant.benchmark import step
from dsquant.errors import DsquantError
from dsquant.loader_benchmark import loader
from dsquant.memory_benchmark import memory
from dsquant.model_benchmark import packed_model
from dsquant.ops_benchmark import ops
from dsquant.packed_benchmark import packed
from dsquant.shard_benchmark import shard

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
