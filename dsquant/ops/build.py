"""Compile the C++ of the ops when it is first needed, against torch's stable ABI: a few seconds, once for each machine.

One library holds every source in `csrc/`. It lies in a folder keyed by the sources, the flags, the compiler, torch's version and
the processor's architecture, so that an update of any of them builds anew and two versions live side by side. Code for
one instruction set is chosen at run time: a cache on a shared disk serves machines of every kind.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from dsquant.errors import BuildError

SOURCES = Path(__file__).parent / "csrc"
# Products and sums round separately: every instruction set gives the same bits, those of the definition in PyTorch.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11, the oldest supported
)  # fmt: skip
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


def library_path() -> Path:
    """Return where the library of these sources, flags, compiler, torch and architecture lies, built or not."""
    key = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([compiler(), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout
    for part in (*FLAGS, compiler(), version.strip(), torch.__version__, platform.machine()):
        key.update(part.encode() + b"\0")
    return cache_root() / f"{torch.__version__}-{platform.machine()}-{key.hexdigest()[:16]}" / "dsquant_ops.so"


@cache
def load() -> ctypes.CDLL:
    """Build the library unless it is there, register its operators under `torch.ops.dsquant` and return it.

    Any number of processes may call this at once: one compiles, the others wait for its file. Raises BuildError naming
    the compiler, what it said and the fix.
    """
    path = library_path()
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.is_file():
                    _compile(path)
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


def _compile(path: Path) -> None:
    """Write the library to a temporary name and rename it: nobody ever loads half a file."""
    torch_root = Path(torch.__file__).parent
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    command = [
        compiler(), *FLAGS, f"-I{torch_root / 'include'}", *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(partial),
        f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_root / 'lib'}",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if result.returncode:
            raise BuildError(
                f"{command[0]} cannot compile dsquant's kernels in {SOURCES} (exit {result.returncode}):\n"
                f"{result.stderr.strip()[-3000:]}\n"
                "install a C++17 compiler (g++ 11 or newer) or name one in CXX, or run with DSQ_BACKEND=torch"
            )
        os.replace(partial, path)
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{command[0]} did not compile {SOURCES} in {TIMEOUT_S} s; try again on a less loaded machine"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
