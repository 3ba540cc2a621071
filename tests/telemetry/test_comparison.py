"""Runs of several seeds become means and spreads of what each stage reached."""

import json
import statistics

import pytest

from dsquant.errors import ConfigError
from dsquant.telemetry.comparison import as_text, compare
from dsquant.telemetry.metrics import MetricsLog


def write(folder, top1, *, finished=True, peak=5.0):
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("eval", "w2a2", 0, top1=top1 - 20, loss=2.0)
        log.write("train", "w2a2", 1, loss=1.5, lr=1e-3)
        log.write("oscillation", "w2a2", 1, oscillating_pct=peak, frozen_pct=0.0)
        log.write("eval", "w2a2", 1, top1=top1 + 1, loss=1.0)
        log.write("train", "w2a2", 2, loss=1.2, lr=1e-4)
        log.write("oscillation", "w2a2", 2, oscillating_pct=1.0, frozen_pct=0.0)
        log.write("eval", "w2a2", 2, top1=top1, loss=1.0)
        log.write("checkpoint", "w2a2", 2, path="x", done=finished)
    return folder


def test_mean_and_spread_are_those_of_the_last_evaluations(tmp_path):
    tops = [50.0, 53.0, 52.0]
    folders = [tmp_path / str(i) for i in range(3)]
    for folder, top1 in zip(folders, tops, strict=True):
        folder.mkdir()
        write(folder, top1)
    stage = compare(folders)["w2a2"]
    assert stage["top1"] == {"mean": statistics.fmean(tops), "std": statistics.stdev(tops), "values": tops}
    assert stage["best_top1"]["values"] == [51.0, 54.0, 53.0]
    assert stage["start_top1"]["values"] == [30.0, 33.0, 32.0]
    assert stage["first_loss"]["mean"] == 1.5
    assert stage["steps"]["values"] == [2, 2, 2]
    assert (stage["oscillating_pct"]["mean"], stage["oscillating_peak_pct"]["mean"]) == (1.0, 5.0)
    text = as_text(compare(folders))
    assert "w2a2" in text
    assert "51.67 ± 1.5" in text
    json.dumps(stage)


def test_a_stage_that_one_run_has_not_finished_is_left_out(tmp_path):
    for name, finished in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 50.0, finished=finished)
    assert compare([tmp_path / "a"]).keys() == {"w2a2"}
    with pytest.raises(ConfigError, match="no stage has been finished by all"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl"):
        compare([tmp_path])
