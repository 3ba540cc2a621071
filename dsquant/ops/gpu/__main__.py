"""Compile every GPU kernel for GPUs that this machine need not have: `python -m dsquant.ops.gpu --arch=80,90`.

Each line says what a kernel needs: bytes of shared memory and registers a thread, and how many of these spill. `--kind=triton`
and `--kind=cuda` take Triton's kernels and those in CUDA C++ alone; the latter need nvcc.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fire
from triton import knobs
from triton.compiler import CompiledKernel

from dsquant.errors import DsquantError
from dsquant.ops import backends, build, gpu
from dsquant.ops.gpu.launch import Launch

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes a program may have
SPILLED = r"(\d+) bytes spill loads"
USED = r"Used (\d+) registers"
FORMATS = {"": "", "NS_5Brain": "bfloat16,", "NS_4Half": "float16,"}  # of x, as the compiler writes them into names
NAME = r"entry function '\w*?_\d+_(\w+?)_cu_\w*?(Quantize|Product)I(\w*?)E?((?:Li\d+E)+)"
ENTRY = rf"{NAME}(?s:.*?){SPILLED}(?s:.*?){USED}.*?(\d+) bytes smem"


def resources(kernel: CompiledKernel, arch: int) -> tuple[int, int]:
    """Return registers a thread and bytes that it spills, as ptxas says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return tuple(int(re.search(pattern, said).group(1)) for pattern in (USED, SPILLED))


def compiled(arch: int) -> Iterator[tuple[Launch, CompiledKernel]]:
    """Compile each launch that the operators make of their sample inputs."""
    for sample in gpu.SAMPLES:
        with gpu.recorded(arch) as launches:
            sample()
        for launch in launches:
            yield launch, launch.compile(arch)


def of_triton(arch: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, shared memory, registers and bytes spilled of each of Triton's kernels."""
    for launch, kernel in compiled(arch):
        name = f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
        yield name, kernel.metadata.shared, *resources(kernel, arch)


def of_cuda(arch: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield the same of each kernel in CUDA C++. Raises BuildError where there is no nvcc, or it cannot compile them."""
    for source, name, of_x, sizes, spilled, registers, shared in re.findall(ENTRY, build.ptxas_report(arch)):
        kind = FORMATS.get(of_x, f"{of_x},") + ",".join(re.findall("[0-9]+", sizes))
        yield f"{source}.{name}<{kind}>", int(shared), int(registers), int(spilled)


KINDS = {backends.TRITON: of_triton, backends.CUDA: of_cuda}


def main(arch: int | tuple[int, ...] = (80, 90), kind: str | tuple[str, ...] = tuple(KINDS)) -> None:
    """Compile for compute capabilities such as 80, 90 or 100, and print what each kernel needs."""
    for capability in arch if isinstance(arch, tuple) else (arch,):
        for one in kind if isinstance(kind, tuple) else (kind,):
            for name, shared, registers, spilled in KINDS[one](capability):
                print(f"sm_{capability} {name:28} shared {shared:6} registers {registers:3} spilled {spilled}")
                if shared > SHARED_LIMIT.get(capability, max(SHARED_LIMIT.values())):
                    raise SystemExit(f"dsquant: {name} needs more shared memory than sm_{capability} has")


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
