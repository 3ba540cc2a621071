"""Fixtures and environment shared by all tests."""

import itertools
import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Set before torch is imported: OpenMP reads it once. Ranks under test share the cores of one machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# DeepSpeed compiles an op on first use: let it find this environment's ninja, and reuse what `make demo` compiled.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
if (REPO / ".venv").is_dir():
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPO / ".venv" / "torch_extensions"))

import torch  # noqa: E402

if os.environ.get("DSQ_TEST_DEVICE") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on CPU tensors, in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tests import ranks  # noqa: E402


def pytest_collection_modifyitems(items):
    """Put the folders of the longest tests first, so that no worker ends minutes after the others."""
    longest = [REPO / "tests" / name for name in ("slurm", "integration", "shard", "faults")]
    items.sort(key=lambda item: next((i for i, folder in enumerate(longest) if folder in item.path.parents), 99))


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of the data sets that lie beside the checkout; skip where there is none."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}")
    return folder


@pytest.fixture(autouse=os.environ.get("DSQ_TEST_DEVICE") == "cuda")
def kernels_run_on_the_gpu(monkeypatch):
    """Have what tests say of Triton's kernels in its interpreter said of compiled ones: `make gpu` asks for it."""
    from tests import on_gpu

    monkeypatch.setattr(on_gpu.Launch, "run", on_gpu.run)


@pytest.fixture(autouse=True, scope="session")
def shared_by_test_processes(tmp_path_factory):
    """Have the processes of pytest-xdist share one server of ranks, through the folder that holds those of them all."""
    folder = tmp_path_factory.getbasetemp()
    ranks.SHARED = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def run_ranks(tmp_path):
    """Return `run(world_size, target, *, timeout=120, env=None, **kwargs) -> list of results, rank 0 first`.

    `target` is "package.module:function"; the function is called with `kwargs` on every rank, in a process of its
    own, after `torch.distributed` is up on gloo (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set).
    Arguments and results may be anything that `torch.save` takes. The test fails with the end of the output of the
    rank to blame when a rank fails or `timeout` (seconds) passes; no process outlives the call.
    """
    calls = itertools.count()

    def run(world_size, target, *, timeout=120.0, env=None, **kwargs):
        return ranks.launch(world_size, target, kwargs, tmp_path / f"ranks{next(calls)}", timeout, env)

    return run
