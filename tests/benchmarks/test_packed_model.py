"""`tools/bench.py packed_model` measures the same model in every engine, each in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest

from dsquant.benchmarks.packed_model import _answer, _start, packed_model
from dsquant.errors import ConfigError


def test_every_engine_has_a_line_with_its_time_size_and_memory(tmp_path, capsys):
    packed_model(batch="1", threads="1", repeats=1, out=str(tmp_path / "lines.jsonl"))
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "lines.jsonl").read_text().splitlines() == printed
    lines = {line["engine"]: line for line in map(json.loads, printed)}
    assert list(lines) == ["dsquant packed", "torch fp32", "onnxruntime fp32"]
    packed, floats, onnx = lines.values()
    assert floats["ratio_to_torch_fp32"] == 1
    assert packed["ratio_to_torch_fp32"] == pytest.approx(floats["seconds"] / packed["seconds"], abs=1e-3)
    assert floats["file_bytes"] > 4 * 5_700_000 > 12 * packed["file_bytes"]  # of DeiT-T; 2 bits, and 8 at both ends
    assert min(packed["peak_bytes"], floats["peak_bytes"]) > 100 << 20  # torch itself is in it
    absent = [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    assert onnx.get("unavailable") == (f"{absent[0]} is not installed" if absent else None)
    assert (onnx["seconds"] is None) == bool(absent)


def test_what_a_library_prints_is_no_answer():
    noisy = "lambda folder, threads: (print('loading'), lambda: print('running'))[1]"
    code = (
        f"from dsquant.benchmarks import model_engines as m; m.ENGINES['noisy'] = {noisy}; m.serve('noisy', '.', '1')"
    )
    worker = subprocess.run(
        [sys.executable, "-c", code], input="run\nrun\n", capture_output=True, text=True, check=True
    )
    ready, *seconds, peak = worker.stdout.splitlines()
    assert ready == "ready"
    assert len(seconds) == 2
    assert all(float(taken) < 1 for taken in seconds)
    assert int(peak) > 1 << 20
    assert "loading" in worker.stderr


def test_a_process_that_ends_early_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="the process of onnxruntime fp32 ended with 1"):
        _answer("onnxruntime fp32", _start("onnxruntime fp32", tmp_path / "nothing there", 1))


def test_an_unknown_library_is_refused():
    with pytest.raises(ConfigError, match="library is 'keras'; it takes timm or transformers"):
        packed_model(library="keras")
