"""`tools/bench.py packed` prints one line for each engine and case, those of engines that are not there included."""

import importlib.util
import json

import pytest
import torch

from dsquant.benchmarks.packed import packed
from dsquant.benchmarks.packed_engines import ON_CPU, ON_GPU, EngineError, gpu_engines
from dsquant.errors import ConfigError


def test_every_engine_has_a_line_for_every_case(tmp_path, capsys):
    packed(shapes="64x48,48x64", m="1,5", threads="1", repeats=1, copies=2, out=str(tmp_path / "packed.jsonl"))
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "packed.jsonl").read_text().splitlines() == printed
    lines = [json.loads(line) for line in printed]
    cases = {(line["m"], line["k"], line["n"]) for line in lines}
    assert cases == {(1, 64, 48), (5, 64, 48), (1, 48, 64), (5, 48, 64)}
    assert len(lines) == len(cases) * (6 + len(ON_CPU))
    for line in lines:
        if "unavailable" in line:
            assert line["engine"].startswith(("onnxruntime", "torch int8"))
            assert line["seconds"] is None
        else:
            assert line["seconds"] > 0
            assert (line["ratio_to_torch_fp32"] == 1) or line["engine"] != "torch fp32"
    if importlib.util.find_spec("onnxruntime") is None:
        held = [line["unavailable"] for line in lines if line["engine"].startswith("onnxruntime")]
        assert held == ["onnxruntime is not installed"] * 12


@pytest.mark.parametrize("shapes", ["768", "768x", "axb"])
def test_a_shape_that_is_none_is_refused(shapes):
    with pytest.raises(ConfigError, match=r"no list of whole numbers|is no shape"):
        packed(shapes=shapes, m="1", threads="1")


def test_engines_of_a_gpu_compute_their_layers():
    """Triton's kernels run on CPU here, interpreted; the rest says why it does not."""
    weight, bias = torch.randn(40, 64), torch.randn(40)
    computed, refused = [], []
    for engine in gpu_engines():
        try:
            layer = engine.build(weight, bias)
        except EngineError as error:
            refused.append(str(error))
            continue
        y = layer(torch.randn(3, 64).to(engine.dtype))
        assert y.shape == (3, 40)
        assert y.isfinite().all()
        computed.append(engine.name)
    assert all("no GPU" in said or "gemlite" in said for said in refused)
    assert computed.count("dsquant triton") == len(ON_GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device is 'cuda'; here is cpu alone"):
        packed(device="cuda")
