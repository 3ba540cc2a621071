"""Triton kernels of the ops, for GPUs: the operators of `dsquant` on CUDA, and what TRITON_INTERPRET=1 runs on CPU.

Nothing here is imported before an op runs on a GPU, or somebody asks for it by name. `python -m dsquant.ops.gpu` compiles all
of it without a GPU.
"""

import torch

from dsquant.ops.gpu import fake_quantize as _activations
from dsquant.ops.gpu import shard_step as _shards
from dsquant.ops.gpu.launch import interpreted, recorded

OPERATORS = {
    operator.__name__: operator
    for operator in (
        _activations.fake_quantize,
        _activations.fake_quantize_backward,
        _shards.shard_gather,
        _shards.shard_update,
        _shards.shard_adamw,
        _shards.shard_moments,
        _shards.shard_image,
    )
}
SAMPLES = (_activations.samples, _shards.samples)  # what is compiled ahead of time

_LIBRARY = torch.library.Library("dsquant", "IMPL", "CUDA")
for _name, _operator in OPERATORS.items():
    _LIBRARY.impl(_name, _operator)

__all__ = ["OPERATORS", "SAMPLES", "interpreted", "recorded"]
