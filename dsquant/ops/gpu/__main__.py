"""Compile every Triton kernel for GPUs that this machine need not have: `python -m dsquant.ops.gpu --arch=80,90`.

Each line says what a kernel needs: bytes of shared memory and registers a thread, and how many of these spill.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fire
from triton import knobs
from triton.compiler import CompiledKernel

from dsquant.ops import gpu
from dsquant.ops.gpu.launch import Launch

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes a program may have


def resources(kernel: CompiledKernel, arch: int) -> tuple[int, int]:
    """Return registers a thread and bytes that it spills, as ptxas says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    counted = (re.search(pattern, said).group(1) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill loads"))
    return tuple(map(int, counted))


def compiled(arch: int) -> Iterator[tuple[Launch, CompiledKernel]]:
    """Compile each launch that the operators make of their sample inputs."""
    for sample in gpu.SAMPLES:
        with gpu.recorded() as launches:
            sample()
        for launch in launches:
            yield launch, launch.compile(arch)


def main(arch: int | tuple[int, ...] = (80, 90)) -> None:
    """Compile for compute capabilities such as 80, 90 or 100, and print what each kernel needs."""
    for capability in arch if isinstance(arch, tuple) else (arch,):
        for launch, kernel in compiled(capability):
            registers, spilled = resources(kernel, capability)
            name = f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
            shared = kernel.metadata.shared
            print(f"sm_{capability} {name:28} shared {shared:6} registers {registers:3} spilled {spilled}")
            if shared > SHARED_LIMIT.get(capability, max(SHARED_LIMIT.values())):
                raise SystemExit(f"dsquant: {name} needs more shared memory than sm_{capability} has")


if __name__ == "__main__":
    fire.Fire(main)
