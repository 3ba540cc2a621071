"""Which implementation of an op runs: the plain PyTorch definition, or native code where this machine has it.

`DSQ_BACKEND`, or a recipe's `backend` where that is not set, forces one for every op that has native code, or for some:
`DSQ_BACKEND=torch`, `DSQ_BACKEND=quant_linear=triton,shard_step=torch`.

    auto      the fastest kind that this machine can run (the default)
    torch     the definitions
    cpu       native code on CPU: avx2 where the processor has it, else portable
    portable  native code in plain C++
    avx2      native code with AVX2, FMA and BMI2; AVX-512 where there is that, in all but activation quantizers
    triton    native code on GPUs; on CPU, for tests, in Triton's interpreter (TRITON_INTERPRET=1)
    cuda      native code on GPUs in CUDA C++, which `packed_linear` has where weights and inputs have 1 or 2 bits, and for up
              to 16 rows in bfloat16 or float16

What is forced and cannot run is an error that says why. Under auto an op without native code for a device runs its
definition; native code that should be there and cannot be built is warned of once.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from dsquant.errors import BuildError, ConfigError
from dsquant.ops import build

TORCH, PORTABLE, AVX2, TRITON, CUDA = "torch", "portable", "avx2", "triton", "cuda"
ON_CPU, ON_GPU = (PORTABLE, AVX2), (TRITON, CUDA)
NATIVE = (*ON_CPU, TRITON)  # what every op with native code has
OPS = ("fake_quantize", "quant_linear", "quant_attention", "packed_linear", "shard_step")
CHOICES = ("auto", TORCH, "cpu", *ON_CPU, *ON_GPU)
# What takes plain C++ under auto, where there is no AVX2: the former is faster so, and the latter gives the same bits however
# ZeRO cuts a weight, which torch's fused AdamW does not. Of products torch's own are faster.
ELEMENTWISE = ("fake_quantize", "shard_step")
# What takes CUDA C++ under auto, where Triton has code too: operators that are faster so, of `packed_linear`, which is that of
# floats, and `packed_linear_int`. On an H200 Triton's int8 tiles are faster than products by bits, and of floats each wins at
# some sizes.
FASTER_IN_CUDA = ()


@dataclass(frozen=True)
class Availability:
    """Say whether a backend can run here and, if not, why."""

    available: bool
    why: str = ""


def requested(op: str) -> str:
    """Return what DSQ_BACKEND asks for. Raises ConfigError for an unknown op or backend in it."""
    return _parse(os.environ.get("DSQ_BACKEND") or "auto").get(op, "auto")


@cache
def _parse(text: str) -> dict[str, str]:
    """Return the backend of each op that `torch`, or `quant_linear=triton,shard_step=torch`, or both, names."""
    found = {}
    for part in text.split(","):
        op, _, name = part.rpartition("=")
        if name not in CHOICES:
            raise ConfigError(f"DSQ_BACKEND is {text!r}; {name!r} is none of {', '.join(CHOICES)}")
        if op and op not in OPS:
            raise ConfigError(f"DSQ_BACKEND is {text!r}; {op!r} is no op; they are {', '.join(OPS)}")
        found = found | {op: name} if op else dict.fromkeys(OPS, name) | found
    return found


def use(choice: str) -> None:
    """Have this process run a recipe's `backend`, unless DSQ_BACKEND is set. Raises ConfigError as `requested` does."""
    if choice != "auto" and not os.environ.get("DSQ_BACKEND"):
        _parse(choice)
        os.environ["DSQ_BACKEND"] = choice


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Have ops that choose for themselves run one backend."""
    before = os.environ.get("DSQ_BACKEND")
    os.environ["DSQ_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["DSQ_BACKEND"]
        else:
            os.environ["DSQ_BACKEND"] = before


@cache
def availability(backend: str) -> Availability:
    """Say whether `backend` can run on this machine, building native code to find out."""
    if backend == TORCH:
        return Availability(True)
    if backend in ON_GPU:
        return _triton_availability() if backend == TRITON else _cuda_availability()
    try:
        level = build.load().dsquant_cpu_level()
    except BuildError as error:
        return Availability(False, str(error))
    if ON_CPU.index(backend) > level:
        return Availability(False, "this processor lacks AVX2, FMA or BMI2")
    return Availability(True)


def _triton_availability() -> Availability:
    try:
        interpreted = _gpu().interpreted()
    except ImportError as error:
        return Availability(False, f"{error}; it comes with PyTorch for CUDA")
    if not (torch.cuda.is_available() or interpreted):
        return Availability(
            False, "there is no GPU that PyTorch can use (TRITON_INTERPRET=1 runs kernels on CPU, for tests)"
        )
    return Availability(True)


def _cuda_availability() -> Availability:
    if not torch.cuda.is_available():
        return Availability(False, "there is no GPU that PyTorch can use")
    try:
        build.load_cuda()
    except BuildError as error:
        return Availability(False, str(error))
    return Availability(True)


def _gpu() -> ModuleType:
    from dsquant.ops import gpu  # Triton is loaded where something asks for it

    return gpu


def operator(name: str, backend: str, device: str) -> Callable[..., Any]:
    """Return the operator `dsquant::name`, which dispatches by device, or its kernels interpreted on CPU.

    On GPUs that one is Triton's; CUDA C++ has `name_cuda`.
    """
    if backend == TRITON and device == "cpu":
        return _gpu().OPERATORS[name]
    return getattr(torch.ops.dsquant, f"{name}_cuda" if backend == CUDA else name).default


@torch.compiler.assume_constant_result
def isa(backend: str) -> int:
    """Return the level of instructions that an operator is called with; those on GPUs have none."""
    return _level() if backend == AVX2 else 0


@cache
def _level() -> int:
    return build.load().dsquant_cpu_level()


@torch.compiler.assume_constant_result
def choose(op: str, device: str, native: tuple[str, ...] = NATIVE, lacking: str = "", operator: str = "") -> str:
    """Return the backend that runs `op` on a device type; `native` are those with code for it.

    Where others have none for these inputs alone, `lacking` says why, for the error. `operator` is which one these inputs take,
    where the op has several.
    Raises ConfigError where DSQ_BACKEND forces one that is missing or cannot run.
    """
    return _choose(op, device, native, requested(op), lacking, operator or op)


@cache
def _choose(op: str, device: str, native: tuple[str, ...], wanted: str, lacking: str, operator: str) -> str:
    if wanted == TORCH:
        return TORCH
    if wanted != "auto":
        return _forced(op, device, native, wanted, lacking)
    cuda = operator in FASTER_IN_CUDA and availability(CUDA).available
    on_gpu = ON_GPU if cuda else (TRITON,)
    kinds = {"cpu": ON_CPU, "cuda": on_gpu}
    here = [name for name in native if name in kinds.get(device, ())]
    best = here[-1] if here else TORCH
    if best == AVX2 and not availability(AVX2).available:
        best = PORTABLE
    if not (built := availability(best)).available:
        warnings.warn(f"{op} runs its plain PyTorch definition: {built.why}", stacklevel=3)
        return TORCH
    return TORCH if best == PORTABLE and op not in ELEMENTWISE else best


def _forced(op: str, device: str, native: tuple[str, ...], wanted: str, lacking: str) -> str:
    gpu = wanted in ON_GPU
    interpreted = wanted == TRITON and device == "cpu" and availability(TRITON).available
    if device != ("cuda" if gpu else "cpu") and not interpreted:
        kind = "GPU" if gpu else "CPU"
        raise ConfigError(
            f"DSQ_BACKEND={wanted} forces {kind} code, and {op} got tensors on {device}; use auto or torch"
        )
    names = [name for name in reversed(native) if wanted == name or (wanted == "cpu" and name in ON_CPU)]
    if not names:
        case = f" for {lacking}" if lacking else ""
        raise ConfigError(f"DSQ_BACKEND={wanted}: {op} has no such code{case}; use auto or torch")
    for name in names:
        if availability(name).available:
            return name
    raise ConfigError(f"DSQ_BACKEND={wanted} cannot run {op}: {availability(names[-1]).why}")
