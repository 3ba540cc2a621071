"""Without a terminal progress comes as sparse plain lines; on one it is live; the closing table holds the numbers."""

import io
import itertools
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsquant.telemetry import console
from dsquant.telemetry.console import Console, closing_table

REPO = Path(__file__).resolve().parents[2]
SUMMARY = {
    "recipe": "digits_w2a2",
    "world_size": 2,
    "zero_stage": 3,
    "steps": 1200,
    "seconds": 183.4,
    "images_per_second": 2210.4,
    "float_top1": 98.333,
    "top1": 96.111,
    "oscillating_pct": 1.937,
    "float_bytes": 1_276_548,
    "packed_bytes": 104_312,
    "packed_file": "runs/a/packed.safetensors",
    "checkpoint": "runs/a/checkpoints/" + "deep/" * 30,
}


class Clock:
    """Stand in for time.monotonic; a test moves it."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def run_stage(clock, total, seconds_a_step, start=0):
    out = io.StringIO()
    progress = Console([("w2a2", total)], stream=out)
    progress.begin_stage("w2a2", total, start=start)
    for step in range(start + 1, total + 1):
        clock.now += seconds_a_step
        progress.update(step, loss=0.43124, top1=93.14, images_per_second=2210.4)
    progress.end_stage("top-1 96.11")
    progress.close()
    progress.close()
    return out.getvalue().splitlines()


def test_plain_lines_come_first_last_and_at_most_every_five_seconds(clock):
    lines = run_stage(clock, total=600, seconds_a_step=0.1)
    shown = [int(re.search(r"step (\d+)/600", line)[1]) for line in lines[:-1]]
    assert (shown[0], shown[-1]) == (1, 600)
    gaps = [b - a for a, b in itertools.pairwise(shown)]
    assert all(50 <= gap <= 51 for gap in gaps[:-1])
    assert lines[-1] == "[w2a2] done in 0:01:00: top-1 96.11"


def test_a_plain_line_is_machine_readable(clock):
    lines = run_stage(clock, total=600, seconds_a_step=0.1)
    assert lines[0] == "[w2a2] step 1/600 loss 0.4312 top1 93.1 images/s 2210 eta 0:01:00"
    assert lines[-2] == "[w2a2] step 600/600 loss 0.4312 top1 93.1 images/s 2210 eta 0:00:00"


def test_a_resumed_stage_counts_on_and_times_only_its_own_steps(clock):
    lines = run_stage(clock, total=600, seconds_a_step=1.0, start=500)
    assert lines[0].startswith("[w2a2] step 501/600 ")
    assert lines[0].endswith("eta 0:01:39")


def test_the_last_step_shows_even_where_a_stage_ends_early(clock):
    out = io.StringIO()
    progress = Console([("fp", 10)], stream=out)
    progress.begin_stage("fp", 10)
    progress.update(1, loss=2.0)
    progress.update(2, loss=1.0)
    progress.message("stopped on request")
    progress.end_stage()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("[fp] step 1/10 loss 2.0000 eta ")
    assert lines[1] == "stopped on request"
    assert lines[2].startswith("[fp] step 2/10 loss 1.0000 eta ")
    assert lines[3].startswith("[fp] done in ")


def test_a_disabled_console_prints_nothing():
    out = io.StringIO()
    progress = Console([("fp", 10)], stream=out, enabled=False)
    progress.begin_stage("fp", 10)
    progress.update(1, loss=2.0)
    progress.message("hello")
    progress.end_stage("done")
    progress.close()
    assert out.getvalue() == ""


def test_update_before_begin_stage_is_refused():
    with pytest.raises(ValueError, match="begin_stage must be called before update"):
        Console([("fp", 10)], stream=io.StringIO()).update(1)


def test_a_terminal_gets_one_live_row_a_stage_and_its_cursor_back():
    code = (
        "from dsquant.telemetry.console import Console\n"
        "with Console([('fp', 4), ('w2a2', 6)]) as progress:\n"
        "    for name, total in (('fp', 4), ('w2a2', 6)):\n"
        "        progress.begin_stage(name, total)\n"
        "        for step in range(1, total + 1):\n"
        "            progress.update(step, loss=0.5, top1=90.0, images_per_second=12.34)\n"
        "        progress.end_stage('top-1 97.00 [not markup]')\n"
    )
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the other side of a closed pseudo-terminal on Linux
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    text = b"".join(chunks).decode()
    assert process.wait() == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    last_frame = plain[plain.rindex("fp  ") :]
    assert re.search(r"fp +━+ 4/4 +loss 0.5000  top-1 90.0%  12.3 img/s  ETA 0:00:00", last_frame)
    assert re.search(r"w2a2 +━+ 6/6 +loss 0.5000", last_frame)
    assert "[w2a2] done in 0:00:00: top-1 97.00 [not markup]" in plain
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_closing_table_holds_the_numbers_and_where_everything_lies(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    out = io.StringIO()
    closing_table(SUMMARY, out, run_dir=tmp_path)
    text = out.getvalue()
    for shown in (
        "digits_w2a2",
        "98.33 %",
        "96.11 %",
        "1.94 %",
        "1,276,548 bytes",
        "104,312 bytes",
        "12.2 times smaller",
        "1,200",
        "183.4 s (0:03:03)",
        "2210",
        "2, ZeRO stage 3",
        SUMMARY["packed_file"],
        SUMMARY["checkpoint"],
        str(tmp_path / "metrics.jsonl"),
    ):
        assert shown in text, f"{shown} not in\n{text}"
    assert str(tmp_path / "report.html") not in text


def test_what_a_run_did_not_produce_is_a_dash():
    out = io.StringIO()
    closing_table(dict.fromkeys(SUMMARY) | {"recipe": "fp_only", "float_top1": 97.0}, out)
    rows = dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", out.getvalue()))
    assert rows["float top-1"] == "97.00 %"
    for name in ("quantized top-1", "packed size", "oscillating weights", "time", "checkpoint", "metrics"):
        assert rows[name] == "-"
