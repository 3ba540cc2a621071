"""The report shows every stage and every site, stands alone, and its charts place points where the numbers say."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsquant.errors import DsquantError
from dsquant.telemetry.charts import Series, line_chart, nice_ticks, smooth, sparkline, thin
from dsquant.telemetry.metrics import MetricsLog, write_summary
from dsquant.telemetry.report import write_report

REPO = Path(__file__).resolve().parents[2]
STAGES = {"fp": 40, "w4a4<b>": 30, "w2a2": 50}
SITES = ["blocks.0.attn.q", "blocks.0.mlp.fc1", "head"]


class Checker(HTMLParser):
    """Collect text and addresses, and insist that every tag is closed by its own."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.polylines, self.tags = [], "", 0, set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "meta":  # the one void element of the page; shapes close themselves
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.polylines += tag == "polyline"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"


@pytest.fixture
def run_dir(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for stage, total in STAGES.items():
            log.write("stage", stage, 0, event="begin", total=total)
            for step in range(1, total + 1):
                loss = math.nan if step == 3 else 2.0 / step
                log.write("train", stage, step, loss=loss, lr=1e-3 / step, images_per_second=2000.0)
            log.write("eval", stage, total, top1=97.25, loss=0.1, samples=360)
            if stage != "fp":
                site = {"oscillating_pct": 3.21, "frozen_pct": None, "scale": [0.5, 0.25], "bins": [0.1, 0.4, 0.4, 0.1]}
                sites = {name: site | {"clip_ratio": 0.0125, "changed_pct": 0.5} for name in SITES}
                log.write("oscillation", stage, total, oscillating_pct=1.5, frozen_pct=0.0, sites=sites)
    return tmp_path


def test_the_report_holds_every_stage_and_every_site(run_dir):
    write_summary(run_dir, {"recipe": "digits<w2a2>", "float_top1": 98.33, "top1": 96.11, "steps": 120, "seconds": 9.5})
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Checker(path.read_text())
    for stage, total in STAGES.items():
        assert page.text.split("\n").count(stage) >= 1 + 4  # its table row, and its label in the charts
        assert f"{stage}, step {total}: 3 sites" in page.text or stage == "fp"
    for shown in (
        "dsquant · digits<w2a2>",
        "98.33 %",
        "96.11 %",
        "-2.22 against float",
        "0.375 (0.25 to 0.5, 2 groups)",
    ):
        assert shown in page.text
    assert all(page.text.count(name) == 2 for name in SITES)
    assert all(chart in page.text for chart in ("Training loss", "Top-1", "Oscillating weights", "Learning rate"))
    assert page.polylines == 3 * (2 + 1 + 1)  # loss raw and smooth, learning rate, images/s; single points are dots


def test_the_report_is_self_contained(run_dir):
    text = write_report(run_dir).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|\bhref=", text)
    assert Checker(text).tags.isdisjoint({"script", "link", "iframe", "img"})


def test_a_run_in_progress_has_a_report_too(run_dir):
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra')
    assert "in progress or stopped" in Checker(write_report(run_dir).read_text()).text


def test_a_log_without_records_still_gives_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "no records yet" in Checker(write_report(tmp_path).read_text()).text


def test_the_command_line_prints_the_path_or_one_clear_error(run_dir, tmp_path):
    def report(*args):
        command = [sys.executable, str(REPO / "tools" / "report.py"), *args]
        env = {"PYTHONPATH": str(REPO), "PATH": "", "WANDB_SILENT": "true"}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    done = report("html", "--run", str(run_dir))
    assert (done.returncode, done.stdout) == (0, f"{run_dir / 'report.html'}\n")
    for command in ("html", "wandb_sync"):
        done = report(command, "--run", "absent")
        assert done.returncode == 1
        assert done.stderr.startswith("error: no metrics at absent")
        assert "Traceback" not in done.stderr


def test_ticks_are_round_and_enclose_the_data():
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(0, 98.5) == [0, 20, 40, 60, 80, 100]
    for low, high in [(0.0, 3e-7), (-5.0, 12.0), (96.1, 96.3), (7.0, 7.0), (0.0, 0.0), (1e-9, 1e6)]:
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-9 * abs(low)
        assert ticks[-1] >= high - 1e-9 * abs(high)
        assert 2 <= len(ticks) <= 12


def test_a_curve_is_drawn_to_scale():
    series = Series("a", [0, 50, 100], [0.0, 1.0, 0.5], color=0)
    svg = line_chart([series], name="n", x_max=100, from_zero=True)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2))


def test_thinning_and_smoothing_keep_the_mean_level_and_the_end():
    xs, ys = list(range(1, 10_001)), [5.0 + (-1) ** i for i in range(10_000)]
    thin_xs, thin_ys = thin(xs, ys, limit=100)
    assert len(thin_xs) == len(thin_ys) == 100
    assert (thin_xs[-1], thin_ys[-1]) == (10_000, 4.0)
    assert thin_ys[:-1] == pytest.approx([5.0] * 99)
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
    assert smooth([2.0] * 10, 5) == pytest.approx([2.0] * 10)
    assert smooth([1.0, 4.0], 1) == [1.0, 4.0]


def test_a_sparkline_shows_each_code_and_adds_up_neighbours_of_wide_ones():
    assert sparkline([0.1, 0.4, 0.4, 0.1], first=-2).count("<rect") == 4
    assert "-2: 10.0 %, -1: 40.0 %" in sparkline([0.1, 0.4, 0.4, 0.1], first=-2)
    wide = sparkline([1 / 256] * 256, first=-128)
    assert wide.count("<rect") == 32
    assert "-128: 3.1 %" in wide


def test_a_missing_run_is_one_clear_error(tmp_path):
    with pytest.raises(DsquantError, match="no metrics at"):
        write_report(tmp_path)
