"""Run kernels in CUDA C++ thread by thread on CPU: their own source, compiled as plain C++."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsquant.ops import backends, build
from dsquant.ops.packed_linear import run


def compile_on_host(source: Path, target: Path, *options: str) -> None:
    """Compile a source with what has a block's threads do a phase one after the other."""
    flags = [f"-I{build.SOURCES / 'cuda'}", str(source), *options, "-o", str(target)]
    subprocess.run([build.compiler(), "-std=c++17", "-O2", "-ffp-contract=off", build.STABLE_ABI, *flags], check=True)


def by_threads_in_turn(source: Path, folder: Path) -> Callable[..., Tensor]:
    """Return `run(x, weight, bias=None, quant=None)`: the backend `cuda` with the kernels of `source`, on CPU tensors."""
    path = folder / "operator.so"
    compile_on_host(source, path, "-fPIC", "-shared", *build.against_torch())
    torch.ops.load_library(path)
    backwards = ctypes.c_bool.in_dll(ctypes.CDLL(str(path)), "backwards")

    def compute(x, weight, bias=None, quant=None):
        found = []
        for backwards.value in (False, True):
            found.append(run(backends.CUDA, x, weight, bias, quant))
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True, msg="the order of threads shows")
        return found[0]

    return compute
