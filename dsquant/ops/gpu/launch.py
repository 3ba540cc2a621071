"""Launch Triton kernels, or compile the same launches ahead of time for a GPU that this machine need not have.

Kernels are compiled with `enable_fp_fusion` off: a product and a sum round separately, as in the definitions, unless the
kernel says `tl.fma`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

OPTIONS = {"enable_fp_fusion": False}
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip

HOPPER = 90  # compute capability from which on a product is a group's of four warps, 64 rows at least

_recorded: "list[Launch] | None" = None
_arch: int | None = None  # that tiles are chosen for in place of a device's


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 since before they were imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> int:
    """Return the compute capability that tiles are chosen for (80, 90, ...); without a GPU Hopper's, as its tests are to see."""
    if _arch is not None or device.type != "cuda":
        return _arch or HOPPER
    return _capability(device.index)


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@dataclass(frozen=True)
class Launch:
    """Hold one call of a kernel: its grid, all of its arguments by name, and options (num_warps, num_stages)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Run the kernel on the device of its tensors, or on CPU in the interpreter."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cpu":
            self.kernel[self.grid](**self.arguments)
            return
        here = device.index in (None, torch.cuda.current_device())  # to choose one takes as long as a launch
        with nullcontext() if here else torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **OPTIONS, **self.options)

    def compile(self, arch: int) -> CompiledKernel:
        """Compile the kernel for compute capability `arch` (80, 90, ...), down to machine code; no GPU takes part."""
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        constants = {
            name: value for name, value in self.arguments.items() if name in fixed or value is None or _is_one(value)
        }
        signature = {
            name: "constexpr" if name in constants else _type(self.arguments[name]) for name in self.kernel.arg_names
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]  # as a launch does: it makes loads wide
            for place, name in enumerate(self.kernel.arg_names)
            if name not in constants and _aligned(self.arguments[name])
        }
        source = ASTSource(self.kernel, signature, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS | self.options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i1" if isinstance(value, bool) else "fp32" if isinstance(value, float) else "i32"


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _aligned(value: Any) -> bool:
    """Say whether an argument is a multiple of 16: an integer, or the address of a tensor."""
    value = value.data_ptr() if isinstance(value, Tensor) else value
    return type(value) is int and value % 16 == 0


def launch(kernel: Any, grid: tuple[int, ...], options: dict[str, Any] | None = None, **arguments: Any) -> None:
    """Run a kernel, or note it down within `recorded`."""
    call = Launch(kernel, grid, arguments, options or {})
    if _recorded is None:
        call.run()
    else:
        _recorded.append(call)


@contextmanager
def recorded(arch: int | None = None) -> Iterator[list[Launch]]:
    """Have launches written to a list in place of running them; with tiles for a compute capability, where that is given."""
    global _recorded, _arch
    before, _recorded, _arch = (_recorded, _arch), [], arch
    try:
        yield _recorded
    finally:
        _recorded, _arch = before
