"""`tools/bench.py ops` prints a line for every op, case and backend that runs here."""

import json

from dsquant.benchmarks.ops import ops
from dsquant.ops import backends
from dsquant.ops.cases import all_cases


def test_every_op_and_backend_has_a_line_with_its_bandwidth(tmp_path, capsys):
    ops(device="cpu", repeats=1, out=str(tmp_path / "ops.jsonl"))
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "ops.jsonl").read_text().splitlines() == printed
    copy, *lines = map(json.loads, printed)
    assert copy["op"] == "copy"
    here = [b for b in (backends.TORCH, *backends.ON_CPU) if backends.availability(b).available]
    assert len(lines) == len(here) * len(all_cases("cpu"))
    assert {line["op"] for line in lines} == set(backends.OPS)
    assert all(line["seconds"] > 0 and line["gb_per_s"] > 0 for line in lines)
