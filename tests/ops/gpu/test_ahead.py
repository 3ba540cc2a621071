"""Every GPU kernel compiles for the GPUs of a cluster, on a machine that has none: down to machine code.

Attention's may spill a few registers, where that lets one program more run at once; compilers differ by as many.

Those in CUDA C++ need nvcc, which the extra `dev` brings: a skip would hide kernels that do not compile.
"""

import os
import subprocess
import sys

import pytest

FEW_BYTES = 48  # a thread


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["triton", "cuda"])
def test_every_kernel_compiles_within_the_limits_of_a_gpu(kind, arch):
    command = [sys.executable, "-m", "dsquant.ops.gpu", f"--arch={arch}", f"--kind={kind}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) >= 10
    assert all(line.startswith(f"sm_{arch} ") for line in lines)
    for line in lines:
        most = FEW_BYTES if " quant_attention" in line else 0
        assert int(line.rpartition(" ")[2]) <= most, f"spilled registers: {line}"
