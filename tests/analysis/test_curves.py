"""The curves of a run are its records, stage by stage, and become a picture."""

import pytest

from dsquant.analysis.curves import POINTS, stage_curves
from dsquant.analysis.plots import run_curves
from dsquant.errors import ConfigError
from dsquant.telemetry.metrics import MetricsLog


@pytest.fixture
def run(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for stage, steps in (("fp", 3 * POINTS), ("w2a2", 4)):
            for step in range(1, steps + 1):
                log.write("train", stage, step, loss=float(step), lr=1e-3)
            log.write("eval", stage, steps, top1=50.0 + steps, loss=1.0)
        log.write("oscillation", "w2a2", 4, oscillating_pct=2.5, frozen_pct=0.0)
    return tmp_path


def test_losses_are_means_of_runs_of_steps_and_the_rest_is_as_recorded(run):
    found = stage_curves(run)
    assert list(found) == ["fp", "w2a2"]
    assert len(found["fp"]["loss"]) == POINTS
    assert found["fp"]["loss"][:2] == [(3, 2.0), (6, 5.0)]
    assert found["w2a2"]["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert found["w2a2"]["top1"] == [(4, 54.0)]
    assert found["w2a2"]["oscillating_pct"] == [(4, 2.5)]
    assert found["fp"]["oscillating_pct"] == []


def test_stages_are_chosen_and_ordered_and_a_wrong_one_is_named(run):
    assert list(stage_curves(run, ["w2a2", "fp"])) == ["w2a2", "fp"]
    with pytest.raises(ConfigError, match=r"no records of stage 'w9a9'; it has \['fp', 'w2a2'\]"):
        stage_curves(run, ["w9a9"])


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl"):
        stage_curves(tmp_path)


def test_the_picture_has_a_panel_for_each_measure(run, tmp_path):
    path = run_curves(stage_curves(run), tmp_path / "curves.png", title="a run")
    assert path.read_bytes()[:4] == b"\x89PNG"
