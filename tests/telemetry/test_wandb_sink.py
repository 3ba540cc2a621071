"""W&B gets every record, offline too, and its failure costs nothing but W&B."""

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from dsquant.errors import ConfigError, DsquantError
from dsquant.telemetry import wandb_sink
from dsquant.telemetry.metrics import MetricsLog, read_metrics, write_summary
from dsquant.telemetry.wandb_sink import WandbSink, replay, resolve_mode

REPO = Path(__file__).resolve().parents[2]
STAGES = [("fp", 3), ("w2a2", 2)]
SITE = {"oscillating_pct": 2.5, "clip_ratio": 0.01, "scale": [0.1, 0.3], "bins": [0.1, 0.4, 0.4, 0.1], "qmin": -2}


class FakeRun:
    """Keep what is logged; fail at one call when told to."""

    def __init__(self, fail_at=None):
        self.rows, self.summary, self.finished, self.fail_at = [], {}, None, fail_at

    def log(self, values):
        if len(self.rows) + 1 == self.fail_at:
            raise ConnectionError("server\n  gone")
        self.rows.append(values)

    def finish(self, exit_code=0):
        self.finished = exit_code


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Hide keys and modes of the machine the test runs on."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def write_run(log):
    for stage, total in STAGES:
        for step in range(1, total + 1):
            log.write("train", stage, step, loss=1.0 / step, lr=1e-3, note="text")
    log.write("oscillation", "w2a2", 2, oscillating_pct=2.5, sites={"blocks.0.attn.q": SITE})
    log.write("eval", "w2a2", 2, top1=96.0, loss=None, samples=360)
    log.write("summary", "w2a2", 2, top1=96.0, checkpoint="last")


HEADER_BYTES = 7  # of a log that holds nothing yet


def offline_bytes(run_dir, patience=60.0):
    """Return the transaction logs of the offline runs in a run folder, one bytes each, once W&B's own process wrote them."""
    files, deadline = sorted(run_dir.glob("wandb/offline-run-*/*.wandb")), time.monotonic() + patience
    while any(file.stat().st_size <= HEADER_BYTES for file in files) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [file.read_bytes() for file in files]


def test_an_offline_run_holds_every_record_and_lies_in_the_run_folder(tmp_path):
    sink = WandbSink(tmp_path, {"recipe": "digits_w2a2"}, stages=STAGES, mode="offline", project="p")
    assert sink.active
    with MetricsLog(tmp_path / "metrics.jsonl", sinks=[sink]) as log:
        write_run(log)
    (content,) = offline_bytes(tmp_path)
    # Each of the 5 training steps names its loss once in the history and once in the running summary.
    assert content.count(b"train/loss") >= len(read_metrics(tmp_path / "metrics.jsonl", kind="train")) == 5
    for text in (b"digits_w2a2", b"global_step", b"oscillation/blocks.0.attn.q/bins", b"eval/top1"):
        assert text in content
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{run_id}"))


def test_a_replay_is_one_fresh_run_of_everything(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        write_run(log)
    write_summary(tmp_path, {"recipe": "digits_w2a2", "top1": 96.0})
    where = replay(tmp_path, mode="offline")
    (content,) = offline_bytes(tmp_path)
    assert where.startswith(str(tmp_path / "wandb" / "offline-run-"))
    assert content.count(b"train/loss") >= 5
    assert b"digits_w2a2" in content
    with pytest.raises(DsquantError, match="no metrics at"):
        replay(tmp_path / "absent", mode="offline")


def test_steps_count_over_stages_and_sites_are_flattened(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(wandb_sink, "_start_run", lambda *_, **__: run)
    sink = WandbSink(tmp_path, {}, stages=STAGES, mode="offline")
    with MetricsLog(tmp_path / "metrics.jsonl", sinks=[sink]) as log:
        write_run(log)
    assert [row["global_step"] for row in run.rows] == [1, 2, 3, 4, 5, 5, 5]
    assert run.rows[3] == {"global_step": 4, "stage": "w2a2", "stage_step": 1, "train/loss": 1.0, "train/lr": 1e-3}
    site = {k.rsplit("/", 1)[1]: v for k, v in run.rows[5].items() if k.startswith("oscillation/blocks.0.attn.q/")}
    bins = site.pop("bins")
    assert isinstance(bins, wandb.Histogram)
    assert list(bins.histogram) == SITE["bins"]
    assert list(bins.bins) == [-2.5, -1.5, -0.5, 0.5, 1.5]
    assert site == {
        "oscillating_pct": 2.5,
        "clip_ratio": 0.01,
        "scale": pytest.approx(0.2),
        "scale_min": 0.1,
        "scale_max": 0.3,
    }
    assert run.rows[6]["eval/top1"] == 96.0
    assert "eval/loss" not in run.rows[6]
    assert run.summary == {"top1": 96.0, "checkpoint": "last"}
    assert run.finished == 0


def test_wandb_failing_to_log_warns_once_and_loses_no_record(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_sink, "_start_run", lambda *_, **__: FakeRun(fail_at=3))
    sink = WandbSink(tmp_path, {}, stages=STAGES, mode="offline")
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path / "metrics.jsonl", sinks=[sink]) as log:
        write_run(log)
    (warning,) = [r.getMessage() for r in caplog.records]
    assert "could not log (ConnectionError: server gone)" in warning
    assert "wandb_sync" in warning
    assert not sink.active
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_wandb_failing_to_start_is_said_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(**_):
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        sink = WandbSink(tmp_path, {}, stages=STAGES, mode="online")
    assert not sink.active
    assert "could not start (CommError: no such host)" in caplog.text
    with MetricsLog(tmp_path / "metrics.jsonl", sinks=[sink]) as log:
        write_run(log)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8
    with pytest.raises(DsquantError, match=r"could not take the run \(no such host\); try --mode offline"):
        replay(tmp_path, mode="online")


def test_a_failed_training_marks_the_wandb_run_as_failed(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(wandb_sink, "_start_run", lambda *_, **__: run)
    sink = WandbSink(tmp_path, {}, stages=STAGES, mode="offline")
    with pytest.raises(RuntimeError), MetricsLog(tmp_path / "metrics.jsonl", sinks=[sink]):
        raise RuntimeError
    assert run.finished == 1


@pytest.mark.parametrize(("key_in", "mode"), [("environment", "online"), ("netrc", "online"), ("nowhere", "offline")])
def test_auto_is_online_exactly_where_wandb_finds_a_key(tmp_path, key_in, mode):
    key = "0123456789" * 4
    env = os.environ | {"WANDB_BASE_URL": "https://wandb.invalid", "NETRC": str(tmp_path / "netrc")}
    if key_in == "environment":
        env["WANDB_API_KEY"] = key
    if key_in == "netrc":
        (tmp_path / "netrc").write_text(f"machine wandb.invalid\n  login user\n  password {key}\n")
        (tmp_path / "netrc").chmod(0o600)
    code = "from dsquant.telemetry.wandb_sink import resolve_mode; print(resolve_mode('auto'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{mode}\n"


def test_wandb_mode_wins_over_auto_and_over_nothing_else(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert resolve_mode("auto") == "offline"


def test_an_unknown_mode_is_one_clear_error(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=re.escape("W&B mode 'onlin' is unknown; allowed: auto, online")):
        WandbSink(tmp_path, {}, stages=STAGES, mode="onlin")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ConfigError, match="WANDB_MODE is 'sometimes'"):
        WandbSink(tmp_path, {}, stages=STAGES)


def test_a_disabled_sink_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb.init was called"))
    sink = WandbSink(tmp_path, {}, stages=STAGES, mode="disabled")
    sink.write({"kind": "train", "stage": "fp", "step": 1, "loss": 1.0})
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    ids = []
    monkeypatch.setattr(wandb_sink, "_start_run", lambda *_, id, **__: ids.append(id) or FakeRun())
    for _ in range(2):
        WandbSink(tmp_path, {}, stages=STAGES, mode="offline").close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()
