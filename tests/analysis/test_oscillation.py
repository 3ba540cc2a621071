"""Oscillation by module, from records written by hand."""

import json

import pytest

from dsquant.analysis.oscillation import oscillation
from dsquant.errors import ConfigError, DsquantError


def site(oscillating, numel, n_bits=2, frozen=0.0):
    return {"oscillating_pct": oscillating, "frozen_pct": frozen, "numel": numel, "n_bits": n_bits}


def record(stage, step, total, sites):
    return {"kind": "oscillation", "stage": stage, "step": step, "sites": sites, "oscillating_pct": total,
            "frozen_pct": 0.0, "time": 0.0}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    records = [
        {"kind": "train", "stage": "fp", "step": 1, "loss": 2.0, "time": 0.0},
        record("w4a4", 10, 9.0, {"blocks.0.mlp.fc1.weight": site(9.0, 100)}),
        record("w2a2", 10, 2.5, {
            "blocks.0.mlp.fc1.weight": site(1.0, 300), "blocks.1.mlp.fc1.weight": site(5.0, 100),
            "blocks.0.attn.qkv.weight": site(2.0, 50, frozen=10.0), "head.weight": site(80.0, 10, 8),
        }),
        record("w2a2", 20, 1.5, {
            "blocks.0.mlp.fc1.weight": site(0.0, 300), "blocks.1.mlp.fc1.weight": site(4.0, 100),
            "blocks.0.attn.qkv.weight": site(3.0, 50, frozen=20.0), "head.weight": site(90.0, 10, 8),
        }),
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_a_kind_is_the_share_of_all_its_weights_in_all_blocks(run):
    kinds = oscillation(run)["kinds"]
    assert list(kinds) == ["mlp.fc1", "attn.qkv", "head"]
    assert kinds["mlp.fc1"]["oscillating_pct"] == [(300 * 1 + 100 * 5) / 400, 100 * 4 / 400]
    assert (kinds["mlp.fc1"]["numel"], kinds["mlp.fc1"]["blocks"]) == (400, 2)
    assert kinds["attn.qkv"]["frozen_pct"] == [10.0, 20.0]
    assert kinds["head"]["n_bits"] == 8


def test_the_last_stage_with_records_is_taken_and_another_by_name(run):
    found = oscillation(run)
    assert (found["stage"], found["steps"], found["total"]["oscillating_pct"]) == ("w2a2", [10, 20], [2.5, 1.5])
    assert found["final"]["blocks.1.mlp.fc1.weight"] == {"oscillating_pct": 4.0}
    other = oscillation(run, "w4a4")
    assert (other["stage"], other["sites"]["blocks.0.mlp.fc1.weight"]["oscillating_pct"]) == ("w4a4", [9.0])


def test_a_stage_without_records_and_a_folder_without_a_run_are_errors(run, tmp_path):
    with pytest.raises(ConfigError, match=r"stage 'fp' of .* has no oscillation records"):
        oscillation(run, "fp")
    with pytest.raises(DsquantError, match="no metrics at"):
        oscillation(tmp_path / "nothing")
