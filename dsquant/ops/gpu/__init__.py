"""Triton kernels of the ops, for GPUs: the operators of `dsquant` on CUDA, and what TRITON_INTERPRET=1 runs on CPU.

Nothing here is imported before an op runs on a GPU, or somebody asks for it by name. `python -m dsquant.ops.gpu` compiles all
of it without a GPU.
"""

import torch

from dsquant.ops.gpu import fake_quantize as _activations
from dsquant.ops.gpu.launch import interpreted, recorded

OPERATORS = {f.__name__: f for f in (_activations.fake_quantize, _activations.fake_quantize_backward)}
SAMPLES = (_activations.samples,)  # what is compiled ahead of time

_LIBRARY = torch.library.Library("dsquant", "IMPL", "CUDA")
for _name, _operator in OPERATORS.items():
    _LIBRARY.impl(_name, _operator)

__all__ = ["OPERATORS", "SAMPLES", "interpreted", "recorded"]
