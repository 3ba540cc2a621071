"""`tools/bench.py packed` prints one line for each engine and case, those of engines that are not there included."""

import importlib.util
import json

import pytest

from dsquant.benchmarks.packed import DSQUANT_BITS, packed
from dsquant.errors import ConfigError


def test_every_engine_has_a_line_for_every_case(tmp_path, capsys):
    packed(shapes="64x48,48x64", m="1,5", threads="1", repeats=1, copies=2, out=str(tmp_path / "packed.jsonl"))
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "packed.jsonl").read_text().splitlines() == printed
    lines = [json.loads(line) for line in printed]
    cases = {(line["m"], line["k"], line["n"]) for line in lines}
    assert cases == {(1, 64, 48), (5, 64, 48), (1, 48, 64), (5, 48, 64)}
    assert len(lines) == len(cases) * (6 + len(DSQUANT_BITS))
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
