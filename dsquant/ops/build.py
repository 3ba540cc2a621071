"""Compile the C++ and CUDA C++ of the ops when it is first needed, against torch's stable ABI: in seconds, once a machine.

One library holds every source in `csrc/`, another those in `csrc/cuda/`. Each lies in a folder keyed by its sources, flags,
compiler, torch's version and the processor's architecture, so that an update of any of them builds anew and two versions live
side by side. Code for one instruction set, or GPU, is chosen at run time: a cache on a shared disk serves machines of every kind.
To load a library is to compile it, and takes no GPU: `load()` and `load_cuda()` do so ahead of time.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from dsquant.errors import BuildError

SOURCES = Path(__file__).parent / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11, the oldest supported
# Products and sums round separately: every instruction set gives the same bits, those of the definition in PyTorch.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI,
)  # fmt: skip
# GPUs newer than the last of these compile its PTX as they load it. The CUDA runtime is the one that torch has loaded.
CUDA_ARCHES = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC", "-fmad=false", "-cudart=none", "-DUSE_CUDA", STABLE_ABI)
FIX_CUDA = "install dsquant[cuda], or name a CUDA toolkit of torch's version in CUDA_HOME"
TIMEOUT_S = 300


def compiler() -> str:
    """Return the path of the C++ compiler, $CXX or c++, g++, clang++. Raises BuildError where there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    asked = f"CXX is {wanted!r}, which is not on PATH" if wanted else "there is no c++, g++ or clang++ on PATH"
    raise BuildError(f"{asked}; install a C++17 compiler (apt-get install g++), or run with DSQ_BACKEND=torch")


def cache_root() -> Path:
    """Return the folder of compiled libraries: beside torch's own extensions where TORCH_EXTENSIONS_DIR is set."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dsquant"


def nvcc() -> str:
    """Return the path of NVIDIA's compiler: $CUDA_HOME's, that of the packages beside torch, or the one on PATH.

    Raises BuildError where there is none, or none in the folder that $CUDA_HOME names.
    """
    if home := os.environ.get("CUDA_HOME"):
        if found := shutil.which("nvcc", path=f"{home}/bin"):
            return found
        raise BuildError(
            f"CUDA_HOME is {home!r}, which has no bin/nvcc; name a folder of the CUDA toolkit, or unset it"
        )
    packages = find_spec("nvidia")  # a namespace: `nvidia/cu13/bin/nvcc` may lie in any folder of it
    folders = [
        str(folder)
        for root in (packages.submodule_search_locations if packages else ())
        for folder in sorted(Path(root).glob("cu*/bin"), reverse=True)
    ]
    if found := shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])):
        return found
    raise BuildError(
        "there is no nvcc beside torch or on PATH; install dsquant[cuda] (or pip install 'cuda-toolkit[nvcc]'), or name a "
        "CUDA toolkit in CUDA_HOME"
    )


def library_path() -> Path:
    """Return where the library of these sources, flags, compiler, torch and architecture lies, built or not."""
    return _path("dsquant_ops.so", compiler(), FLAGS, SOURCES.iterdir())


def cuda_library_path() -> Path:
    """Return where the library of kernels in CUDA C++ lies, built or not."""
    sources = [*(SOURCES / "cuda").iterdir(), SOURCES / "native.h"]
    return _path("dsquant_ops_cuda.so", nvcc(), (*CUDA_FLAGS, *CUDA_ARCHES, compiler()), sources)


def _path(name: str, by: str, flags: tuple[str, ...], sources: Iterable[Path]) -> Path:
    key = hashlib.sha256()
    for source in sorted(path for path in sources if path.is_file()):
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([by, "--version"], capture_output=True, text=True).stdout
    for part in (*flags, by, version.strip(), torch.__version__, platform.machine()):
        key.update(part.encode() + b"\0")
    return cache_root() / f"{torch.__version__}-{platform.machine()}-{key.hexdigest()[:16]}" / name


@cache
def load() -> ctypes.CDLL:
    """Build the library unless it is there, register its operators under `torch.ops.dsquant` and return it.

    Any number of processes may call this at once: one compiles, the others wait for its file. Raises BuildError naming
    the compiler, what it said and the fix.
    """
    command = [compiler(), *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp")))]
    return _load(library_path(), command, "install a C++17 compiler (g++ 11 or newer) or name one in CXX")


@cache
def load_cuda() -> ctypes.CDLL:
    """Do as `load` does for the kernels in CUDA C++, of sm_80, sm_90 and newer. No GPU takes part."""
    sources = [path for path in sorted((SOURCES / "cuda").iterdir()) if path.suffix in (".cpp", ".cu")]
    command = [*_nvcc_command(), *CUDA_ARCHES, "-shared", *map(str, sources), "-ltorch_cuda"]
    return _load(cuda_library_path(), command, FIX_CUDA)


def ptxas_report(arch: int) -> str:
    """Return what ptxas says of the kernels in CUDA C++ for a compute capability: registers, spills, shared memory.

    Raises BuildError where there is no nvcc, or it cannot compile them.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*_nvcc_command(), "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin", "-o", f"{folder}/cubin"]
        return "".join(_run([*command, str(source)], FIX_CUDA) for source in sorted((SOURCES / "cuda").glob("*.cu")))


def _nvcc_command() -> list[str]:
    return [nvcc(), f"-ccbin={compiler()}", *CUDA_FLAGS]


def _load(path: Path, command: list[str], fix: str) -> ctypes.CDLL:
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.is_file():
                    _compile(path, command, fix)
        except OSError as error:
            raise BuildError(
                f"{path.parent} cannot be written ({error}); set TORCH_EXTENSIONS_DIR to a folder"
            ) from None
    try:
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}); delete it, and it is built again") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the kernel drops should this process die."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def against_torch() -> list[str]:
    """Return the options that find torch's headers and libraries, at run time too."""
    root = Path(torch.__file__).parent
    found = ["-Xlinker", "-rpath", "-Xlinker", str(root / "lib")]
    return [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *found]


def _compile(path: Path, command: list[str], fix: str) -> None:
    """Write the library to a temporary name and rename it: nobody ever loads half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _run([*command, *against_torch(), "-o", str(partial)], fix)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _run(command: list[str], fix: str) -> str:
    """Run a compiler and return what it says. Raises BuildError with that, and the fix, where it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{command[0]} did not compile {SOURCES} in {TIMEOUT_S} s; try again on a less loaded machine"
        ) from None
    said = result.stdout + result.stderr
    if result.returncode:
        raise BuildError(
            f"{command[0]} cannot compile dsquant's kernels in {SOURCES} (exit {result.returncode}):\n"
            f"{said.strip()[-3000:]}\n{fix}, or run with DSQ_BACKEND=torch"
        )
    return said
