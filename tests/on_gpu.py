"""Have Triton's kernels run on the GPU in tests that hold their tensors on CPU, where the interpreter runs them otherwise."""

import torch
from torch import Tensor

from dsquant.ops.gpu.launch import Launch

on_device = Launch.run


def run(launch: Launch) -> None:
    """Run a launch over copies of its tensors on the GPU, those that share memory sharing it there, and copy them back."""
    storages: dict[int, tuple[Tensor, Tensor]] = {}

    def sent(value):
        if not isinstance(value, Tensor) or value.is_cuda:
            return value
        here = value.untyped_storage()
        if here.data_ptr() not in storages:
            whole = torch.empty(0, dtype=torch.uint8).set_(here)
            storages[here.data_ptr()] = whole, whole.cuda()
        there = torch.empty(0, dtype=value.dtype, device="cuda")
        copy = storages[here.data_ptr()][1].untyped_storage()
        return there.set_(copy, value.storage_offset(), value.shape, value.stride())

    arguments = {name: sent(value) for name, value in launch.arguments.items()}
    on_device(Launch(launch.kernel, launch.grid, arguments, launch.options))
    for whole, copy in storages.values():
        whole.copy_(copy)
