"""Native code is compiled once however many ask for it, and says what is missing where it cannot be."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsquant.errors import BuildError, ConfigError
from dsquant.ops import backends, build

REPO = Path(__file__).resolve().parents[2]
LOAD = "from dsquant.ops import build; print(build.load().dsquant_cpu_level())"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Give an empty cache of libraries, and nothing remembered of another one."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("DSQ_BACKEND", raising=False)
    caches = (build.load, backends.availability, backends._choose)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def needs_compiler():
    try:
        return build.compiler()
    except BuildError as error:
        pytest.skip(str(error))


def test_processes_that_build_at_once_compile_once_and_all_load_the_library(tmp_path):
    log = tmp_path / "calls"
    count = f'case "$*" in *-shared*) echo run >> {log};; esac'
    cxx = script(tmp_path / "cxx", f'{count}\nexec {needs_compiler()} "$@" -O0')  # it is not how fast the code is
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": cxx, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", LOAD]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    levels = {process.communicate(timeout=500)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(levels) == 1
    assert log.read_text() == "run\n"
    (library,) = (tmp_path / "cache").rglob("*.so")
    assert [path.suffix for path in sorted(library.parent.iterdir())] == [".lock", ".so"]


def test_a_compiler_that_fails_is_named_with_what_it_said_and_leaves_nothing(fresh, monkeypatch):
    cxx = script(fresh / "cxx", "echo 'no such flag: -std=c++17' >&2; exit 3")
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(BuildError, match=r"cxx cannot compile .*exit 3.*\n.*no such flag(.|\n)*install a C\+\+17"):
        build.load()
    assert not [path for path in fresh.rglob("*") if path.suffix in (".so", ".partial")]


def test_a_missing_compiler_is_named_with_the_fix(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX is 'no-such-compiler', which is not on PATH; install a C"):
        build.load()


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch):
    needs_compiler()
    (fresh / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(fresh / "file"))
    with pytest.raises(BuildError, match=r"cannot be written .*set TORCH_EXTENSIONS_DIR"):
        build.load()


def test_another_compiler_torch_or_source_is_another_library(fresh, monkeypatch):
    first = script(fresh / "first", "echo 12.1")
    monkeypatch.setenv("CXX", first)
    paths = [build.library_path()]
    script(fresh / "first", "echo 12.2")
    paths.append(build.library_path())
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    paths.append(build.library_path())
    (fresh / "csrc").mkdir()
    (fresh / "csrc" / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", fresh / "csrc")
    paths.append(build.library_path())
    (fresh / "csrc" / "a.cpp").write_text("int b;")
    paths.append(build.library_path())
    assert len(set(paths)) == 5
    assert paths[-1] == build.library_path()


def test_without_a_compiler_auto_runs_the_definition_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(
        UserWarning, match="packed_linear runs its plain PyTorch definition: CXX is 'no-such-compiler'"
    ) as seen:
        assert {backends.choose("packed_linear", "cpu") for _ in range(3)} == {"torch"}
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["cpu", "portable", "avx2"])
def test_a_forced_backend_that_cannot_be_built_is_an_error(fresh, monkeypatch, name):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("DSQ_BACKEND", name)
    with pytest.raises(ConfigError, match=f"DSQ_BACKEND={name} cannot run packed_linear: CXX is 'no-such-compiler'"):
        backends.choose("packed_linear", "cpu")


def test_a_forced_backend_that_an_op_or_the_processor_lacks_is_an_error(fresh, monkeypatch):
    class OldProcessor:
        dsquant_cpu_level = staticmethod(lambda: 0)

    monkeypatch.setattr(build, "load", OldProcessor)
    monkeypatch.setenv("DSQ_BACKEND", "avx2")
    with pytest.raises(ConfigError, match="DSQ_BACKEND=avx2 cannot run packed_linear: this processor lacks AVX2"):
        backends.choose("packed_linear", "cpu")
    with pytest.raises(ConfigError, match="DSQ_BACKEND=avx2: fake_quantize has no such code"):
        backends.choose("fake_quantize", "cpu", native=())
    monkeypatch.setenv("DSQ_BACKEND", "cpu")
    assert backends.choose("packed_linear", "cpu") == "portable"
    monkeypatch.setenv("DSQ_BACKEND", "gpu")
    with pytest.raises(ConfigError, match="DSQ_BACKEND is 'gpu'; 'gpu' is none of auto, torch, cpu, portable, avx2"):
        backends.choose("packed_linear", "cpu")


def test_a_backend_is_forced_for_some_ops_or_all(monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", "quant_linear=torch,shard_step=portable")
    assert [backends.choose(op, "cpu") for op in ("quant_linear", "shard_step")] == ["torch", "portable"]
    assert backends.requested("fake_quantize") == "auto"
    for order in ("torch,quant_linear=cpu", "quant_linear=cpu,torch"):
        monkeypatch.setenv("DSQ_BACKEND", order)
        assert [backends.requested(op) for op in ("quant_linear", "packed_linear")] == ["cpu", "torch"]
    monkeypatch.setenv("DSQ_BACKEND", "linear=torch")
    with pytest.raises(ConfigError, match="'linear' is no op; they are fake_quantize, quant_linear"):
        backends.choose("packed_linear", "cpu")


def test_the_environment_decides_before_the_recipe(monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", "portable")
    backends.use("torch")
    assert backends.requested("shard_step") == "portable"
    monkeypatch.setenv("DSQ_BACKEND", "")
    backends.use("auto")
    assert backends.requested("shard_step") == "auto"
    backends.use("shard_step=torch")
    assert backends.requested("shard_step") == "torch"
    monkeypatch.setenv("DSQ_BACKEND", "")
    with pytest.raises(ConfigError, match="'gpu' is none of"):
        backends.use("gpu")
    assert not os.environ["DSQ_BACKEND"]


def test_the_table_of_backends_checks_each_and_names_the_fastest():
    command = [sys.executable, "-m", "dsquant.ops"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for backend in ("torch", *backends.ON_CPU):
        (line,) = [x for x in lines if "x of 8 bits, one scale; M 197" in x and f" {backend} " in x]
        held = backends.availability(backend).available
        assert f" {'yes' if held else 'no'} " in line
        assert ("equal" in line) == (held and backend != "torch")
    assert sum(x.endswith("fastest") for x in lines if "M 197" in x) == 5
