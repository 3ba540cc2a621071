"""Triton kernels of the ops, for GPUs: the operators of `dsquant` on CUDA, and what TRITON_INTERPRET=1 runs on CPU.

Nothing here is imported before an op runs on a GPU, or somebody asks for it by name. `python -m dsquant.ops.gpu` compiles all
of it without a GPU.
"""

import torch

from dsquant.ops.gpu import (
    fake_quantize,
    int8_product,
    packed_linear,
    quant_attention,
    quant_attention_backward,
    quant_linear,
    shard_flat,
    shard_step,
)
from dsquant.ops.gpu.launch import interpreted, recorded

_MODULES = (
    fake_quantize,
    packed_linear,
    quant_attention,
    quant_attention_backward,
    quant_linear,
    shard_flat,
    shard_step,
)
OPERATORS = {operator.__name__: operator for module in _MODULES for operator in module.OPERATORS}
SAMPLES = tuple(module.samples for module in _MODULES if hasattr(module, "samples"))  # what is compiled ahead of time

_LIBRARY = torch.library.Library("dsquant", "IMPL", "CUDA")
for _name, _operator in OPERATORS.items():
    _LIBRARY.impl(_name, _operator)

__all__ = ["OPERATORS", "SAMPLES", "int8_product", "interpreted", "packed_linear", "recorded"]
