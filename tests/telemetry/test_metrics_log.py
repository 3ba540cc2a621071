"""The metrics log holds every training step exactly once, in order, whatever happened to the process."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsquant.errors import DsquantError
from dsquant.telemetry.metrics import (
    MetricsLog,
    discarded_path,
    read_metrics,
    read_summary,
    stage_offsets,
    stage_totals,
    write_summary,
)

REPO = Path(__file__).resolve().parents[2]
STAGES = ["fp", "w2a2"]


def train(log, stage, first, last):
    for step in range(first, last + 1):
        log.write("train", stage, step, loss=1.0 / step, lr=1e-3)


def steps(path, stage):
    return [r["step"] for r in read_metrics(path, kind="train", stage=stage)]


def test_a_record_has_kind_stage_step_fields_and_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("train", "fp", 1, loss=0.1 + 0.2, lr=1e-3, top1=None)
        log.write("eval", "fp", 1, top1=97.5, loss=0.2, samples=360)
    lines = path.read_bytes().splitlines()
    first = json.loads(lines[0])
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"kind": "train", "stage": "fp", "step": 1, "loss": 0.1 + 0.2, "lr": 1e-3, "top1": None}
    assert len(lines) == 2
    assert [r["top1"] for r in read_metrics(path, kind="eval")] == [97.5]


def test_a_record_is_in_the_file_as_soon_as_write_returns(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    train(log, "fp", 1, 3)
    assert steps(tmp_path / "metrics.jsonl", "fp") == [1, 2, 3]
    log.close()


def test_nonfinite_floats_become_null_and_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("train", "fp", 1, loss=float("nan"), lr=1e-3, grad_norm=float("inf"))
        log.write("oscillation", "fp", 1, sites={"blocks.0.attn.q": {"clip_ratio": float("-inf"), "scale": [0.5]}})

    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert (first["loss"], first["grad_norm"], first["nonfinite"]) == (None, None, ["loss", "grad_norm"])
    assert second["sites"]["blocks.0.attn.q"] == {"clip_ratio": None, "scale": [0.5]}
    assert second["nonfinite"] == ["sites.blocks.0.attn.q.clip_ratio"]


def test_values_that_json_cannot_hold_are_refused_by_name_and_leave_no_trace(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    with pytest.raises(TypeError, match=r"'loss' is a object"):
        log.write("train", "fp", 1, loss=object())
    with pytest.raises(ValueError, match="unknown kind of record 'trian'"):
        log.write("trian", "fp", 1)
    with pytest.raises(ValueError, match="reserved"):
        log.write("train", "fp", 1, time=0.0)
    log.close()
    assert path.read_bytes() == b""


def test_a_training_step_cannot_be_written_twice(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        train(log, "fp", 1, 3)
        with pytest.raises(ValueError, match="step 3 of stage fp written after step 3"):
            train(log, "fp", 3, 3)
        train(log, "w2a2", 1, 1)


def test_an_existing_run_is_not_appended_to_unasked(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        train(log, "fp", 1, 1)
    with pytest.raises(DsquantError, match=r"already holds a run; pass --resume"):
        MetricsLog(path)


@pytest.mark.parametrize("after", [("fp", 2), ("fp", 5), ("w2a2", 1), ("w2a2", 3)])
def test_resume_keeps_what_lies_at_or_before_the_checkpoint_and_moves_the_rest(tmp_path, after):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        train(log, "fp", 1, 5)
        log.write("eval", "fp", 5, top1=98.0)
        train(log, "w2a2", 1, 3)
        log.write("oscillation", "w2a2", 3, oscillating_pct=1.0)
        log.write("summary", "w2a2", 3, top1=96.0)
    before = read_metrics(path)
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "stage": "w2a2", "st')
    with MetricsLog.resume(path, STAGES, after) as log:
        if after[0] == "fp":
            train(log, "fp", after[1] + 1, 5)
            train(log, "w2a2", 1, 3)
        else:
            train(log, "w2a2", after[1] + 1, 3)
    assert steps(path, "fp") == [1, 2, 3, 4, 5]
    assert steps(path, "w2a2") == [1, 2, 3]
    assert [r["stage"] for r in read_metrics(path, kind="train")] == ["fp"] * 5 + ["w2a2"] * 3
    assert read_metrics(path, kind="summary") == []

    *moved, unfinished = [json.loads(line) for line in discarded_path(path).read_text().splitlines()]
    kept = [r for r in read_metrics(path) if r in before]
    assert sorted(map(str, kept + moved)) == sorted(map(str, before))
    assert unfinished == {"kind": "unfinished", "text": '{"kind": "train", "stage": "w2a2", "st'}


def test_resume_without_a_checkpoint_starts_over_and_loses_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        train(log, "fp", 1, 4)
    with MetricsLog.resume(path, STAGES, None) as log:
        train(log, "fp", 1, 2)
    with MetricsLog.resume(path, STAGES, None) as log:
        train(log, "fp", 1, 3)
    assert steps(path, "fp") == [1, 2, 3]
    discarded = [json.loads(line)["step"] for line in discarded_path(path).read_text().splitlines()]
    assert discarded == [1, 2, 3, 4, 1, 2]


def test_a_last_line_that_lost_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        train(log, "fp", 1, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with MetricsLog.resume(path, STAGES, ("fp", 2)) as log:
        train(log, "fp", 3, 3)
    assert steps(path, "fp") == [1, 2, 3]
    assert not discarded_path(path).exists()


def test_a_gap_between_log_and_checkpoint_is_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        train(log, "fp", 1, 2)
    with caplog.at_level(logging.WARNING):
        MetricsLog.resume(path, STAGES, ("fp", 2)).close()
        assert caplog.text == ""
        MetricsLog.resume(path, STAGES, ("fp", 4)).close()
    assert "ends at stage fp step 2 but the checkpoint is at stage fp step 4" in caplog.text


def test_a_log_of_another_recipe_and_a_broken_line_are_refused_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        train(log, "w4a4", 1, 2)
    content = path.read_bytes()
    with pytest.raises(DsquantError, match=r"holds stage 'w4a4' but the recipe has fp, w2a2"):
        MetricsLog.resume(path, STAGES, ("fp", 1))
    assert path.read_bytes() == content
    path.write_bytes(b"not a record\n" + content)
    with pytest.raises(DsquantError, match=r"metrics\.jsonl line 1 is not a record"):
        MetricsLog.resume(path, STAGES, ("fp", 1))
    with pytest.raises(DsquantError, match="no metrics at"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_process_killed_mid_run_continues_as_if_nothing_had_happened(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from dsquant.telemetry.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1]); step = 0\n"
        "while True:\n"
        "    step += 1; log.write('train', 'fp', step, loss=1.0 / step, lr=1e-3, pad='x' * 3000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=REPO)
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size > 300_000):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = len(steps(path, "fp"))
    assert written > 50
    with MetricsLog.resume(path, STAGES, ("fp", written // 2)) as log:
        train(log, "fp", written // 2 + 1, written + 5)
    assert steps(path, "fp") == list(range(1, written + 6))


def test_sinks_see_each_record_after_the_file_and_how_the_run_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen = []

    class Spy:
        def write(self, record):
            assert read_metrics(path)[-1] == record
            seen.append(record["step"])

        def close(self, failed=False):
            seen.append(f"failed={failed}")

    with MetricsLog(path, sinks=[Spy()]) as log:
        train(log, "fp", 1, 2)
    log.close()
    assert seen == [1, 2, "failed=False"]
    with pytest.raises(KeyboardInterrupt), MetricsLog.resume(path, STAGES, ("fp", 2), sinks=[Spy()]):
        raise KeyboardInterrupt
    assert seen[-1] == "failed=True"


def test_global_steps_count_over_stages(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("stage", "fp", 0, event="begin")
        train(log, "fp", 1, 7)
        train(log, "w2a2", 1, 3)
    totals = stage_totals(read_metrics(path))
    assert totals == [("fp", 7), ("w2a2", 3)]
    assert stage_offsets(totals) == {"fp": 0, "w2a2": 7}


def test_the_summary_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_summary(tmp_path, {"recipe": "digits_w2a2", "top1": 96.25, "packed_file": tmp_path / "m.safetensors"})
    assert path == tmp_path / "summary.json"
    assert read_summary(tmp_path) == {
        "recipe": "digits_w2a2",
        "top1": 96.25,
        "packed_file": str(tmp_path / "m.safetensors"),
    }

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_summary(tmp_path, {"recipe": "another"})
    assert read_summary(tmp_path)["recipe"] == "digits_w2a2"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_an_absent_or_broken_summary_is_one_clear_error(tmp_path):
    with pytest.raises(DsquantError, match="no summary at"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"recipe": ')
    with pytest.raises(DsquantError, match="is not JSON"):
        read_summary(tmp_path)
