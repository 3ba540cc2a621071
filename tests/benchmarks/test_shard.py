"""The benchmark of the shard step runs every backend that is here, on the weights it says."""

import json

import pytest

from dsquant.benchmarks.shard import shard
from dsquant.ops import backends


@pytest.mark.parametrize("spec", [{}, {"n_bits": 1, "method": "bwn"}, {"granularity": "per_tensor"}], ids=str)
def test_it_times_each_backend_and_writes_what_it_prints(tmp_path, capsys, spec):
    shard(**spec, blocks=1, steps=1, out=str(tmp_path / "shard.json"))
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "shard.json").read_text())
    here = {b for b in (backends.TORCH, *backends.ON_CPU) if backends.availability(b).available}
    assert found["seconds"].keys() == {"fused_adamw", *here}
    assert min(found["seconds"].values()) > 0
    assert found["weights"] == 442_368
    assert found["spec"] == {"n_bits": 2, "method": "lsq", "granularity": "per_channel"} | spec
