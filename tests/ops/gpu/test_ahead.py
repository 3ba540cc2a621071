"""Every GPU kernel compiles for the GPUs of a cluster, on a machine that has none: Triton down to machine code."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_within_the_limits_of_a_gpu(arch):
    command = [sys.executable, "-m", "dsquant.ops.gpu", f"--arch={arch}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) >= 10
    assert all(line.startswith(f"sm_{arch} ") for line in lines)
    assert {int(line.rpartition(" ")[2]) for line in lines} == {0}, "no kernel may spill registers"
