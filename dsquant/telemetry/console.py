"""What a person sees of a run: a live display on a terminal, sparse plain lines elsewhere, a table at the end."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dsquant.telemetry.metrics import METRICS_FILE, REPORT_FILE

PLAIN_INTERVAL_S = 5.0
ETA_WINDOW = 50  # updates: long enough to even out noise, short enough to forget a slow first step


class Console:
    """Show the progress of the stages on `stream` (default: standard output).

    On a terminal, one live row a stage: bar, steps, loss, top-1, images/s, ETA. Elsewhere plain lines, the first and
    the last step of a stage and at most one every five seconds in between:
    `[w2a2] step 120/600 loss 0.4312 top1 93.1 images/s 2210 eta 0:00:41`.
    `stages` holds (name, total steps) in order. With `enabled=False` (ranks other than 0) every method does nothing.
    """

    def __init__(
        self, stages: Sequence[tuple[str, int]], stream: TextIO | None = None, *, enabled: bool = True
    ) -> None:
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._progress: Progress | None = None
        self._stage: str | None = None
        if enabled and _is_live(self._stream):
            self._progress = _live_progress(self._stream)
            self._tasks = {name: self._add_row(name, total) for name, total in stages}
            self._progress.start()

    def begin_stage(self, name: str, total: int, start: int = 0) -> None:
        """Start to show a stage of `total` steps of which `start` are done already (a resumed run)."""
        if not self._enabled:
            return
        self._stage, self._total, self._step = name, total, start
        self._values: dict[str, float | None] = {"loss": None, "top1": None, "images_per_second": None}
        self._began = self._printed_at = time.monotonic()
        self._marks: deque[tuple[int, float]] = deque([(start, self._began)], maxlen=ETA_WINDOW)
        self._printed_step: int | None = None
        if self._progress is not None:
            if name not in self._tasks:
                self._tasks[name] = self._add_row(name, total)
            self._progress.update(self._tasks[name], total=total, completed=start)

    def update(
        self, step: int, loss: float | None = None, top1: float | None = None, images_per_second: float | None = None
    ) -> None:
        """Show that `step` steps of the stage are done; a value that is None keeps what was shown before."""
        if not self._enabled:
            return
        if self._stage is None:
            raise ValueError("begin_stage must be called before update")
        now = time.monotonic()
        self._step = step
        self._marks.append((step, now))
        given = {"loss": loss, "top1": top1, "images_per_second": images_per_second}
        self._values |= {name: value for name, value in given.items() if value is not None}
        if self._progress is not None:
            self._progress.update(self._tasks[self._stage], completed=step, text=self._live_text())
        elif self._printed_step is None or step >= self._total or now - self._printed_at >= PLAIN_INTERVAL_S:
            self._print_step(now)

    def message(self, text: str) -> None:
        """Print a line of its own, above the live rows on a terminal."""
        if not self._enabled:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def end_stage(self, text: str | None = None) -> None:
        """Close the stage: its last step is always shown, then `text`, say its evaluation."""
        if not self._enabled or self._stage is None:
            return
        if self._progress is None and self._printed_step != self._step:
            self._print_step(time.monotonic())
        seconds = _clock(time.monotonic() - self._began)
        self.message(f"[{self._stage}] done in {seconds}" + (f": {text}" if text else ""))
        self._stage = None

    def close(self) -> None:
        """Give the terminal back; what is shown afterwards comes as plain lines. Closing twice is harmless."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_row(self, name: str, total: int) -> Any:
        return self._progress.add_task(name, total=total, text="")

    def _print_step(self, now: float) -> None:
        values = "".join(f" {text}" for text in self._shown("top1 {:.1f}", "images/s {}"))
        print(
            f"[{self._stage}] step {self._step}/{self._total}{values} eta {self._eta()}", file=self._stream, flush=True
        )
        self._printed_at, self._printed_step = now, self._step

    def _live_text(self) -> str:
        return "  ".join([*self._shown("top-1 {:.1f}%", "{} img/s"), f"ETA {self._eta()}"])

    def _shown(self, top1: str, images_per_second: str) -> list[str]:
        formats = {"loss": "loss {:.4f}", "top1": top1, "images_per_second": images_per_second}
        values = {k: _rate(v) if k == "images_per_second" else v for k, v in self._values.items() if v is not None}
        return [formats[name].format(value) for name, value in values.items()]

    def _eta(self) -> str:
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if self._step >= self._total:
            return _clock(0)
        if last_step <= first_step:
            return "-"
        return _clock((self._total - self._step) * (last_time - first_time) / (last_step - first_step))


def closing_table(summary: dict[str, Any], stream: TextIO | None = None, *, run_dir: Path | None = None) -> None:
    """Print what a run achieved and where everything lies; what the summary lacks is shown as "-".

    Keys of `summary`: recipe, world_size, zero_stage, steps, seconds, images_per_second, float_top1, top1,
    oscillating_pct, oscillating_peak_pct (the last four in percent), float_bytes, packed_bytes, packed_file, checkpoint;
    where `metric` names one other than top-1, METRIC and float_METRIC.
    `run_dir` is where metrics and report lie.
    """
    stream = stream or sys.stdout
    results, places = _result_rows(summary), _place_rows(summary, run_dir)
    rows = [*results, *places]
    table = Table(title=f"dsquant · {summary.get('recipe') or 'run'}", box=box.ROUNDED, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for index, (name, value) in enumerate(rows):
        table.add_row(name, value, end_section=index == len(results) - 1)
    # In a file nothing limits the width, and a path broken over two lines cannot be copied.
    width = None if stream.isatty() else max(80, 30 + max(len(value) for _, value in rows))
    RichConsole(file=stream, width=width, highlight=False, markup=False).print(table)


def _result_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    def shown(key: str, form: str, absent: str = "-") -> str:
        value = summary.get(key)
        return absent if value is None else form.format(value)

    packed = _size(summary.get("packed_bytes"))
    if summary.get("packed_bytes") and summary.get("float_bytes"):
        packed += f", {summary['float_bytes'] / summary['packed_bytes']:.1f} times smaller"
    seconds, rate = summary.get("seconds"), summary.get("images_per_second")
    scores = {"top1": "top-1"} | ({name: name} if (name := summary.get("metric")) else {})
    return [
        *(
            (f"{kind} {name}", shown(f"{prefix}{key}", "{:.2f} %"))
            for key, name in scores.items()
            for kind, prefix in (("float", "float_"), ("quantized", ""))
        ),
        (
            "oscillating weights",
            shown("oscillating_pct", "{:.2f} %") + shown("oscillating_peak_pct", ", at most {:.2f} %", ""),
        ),
        ("float size", _size(summary.get("float_bytes"))),
        ("packed size", packed),
        ("steps", shown("steps", "{:,}")),
        ("time", "-" if seconds is None else f"{seconds:.1f} s ({_clock(seconds)})"),
        ("images/s", "-" if rate is None else _rate(rate)),
        ("ranks", shown("world_size", "{}") + ", ZeRO stage " + shown("zero_stage", "{}")),
    ]


def _place_rows(summary: dict[str, Any], run_dir: Path | None) -> list[tuple[str, str]]:
    def beside(name: str) -> str:
        return str(Path(run_dir, name)) if run_dir is not None and Path(run_dir, name).exists() else "-"

    return [
        ("run folder", "-" if run_dir is None else str(run_dir)),
        ("checkpoint", str(summary.get("checkpoint") or "-")),
        ("packed model", str(summary.get("packed_file") or "-")),
        ("metrics", beside(METRICS_FILE)),
        ("report", beside(REPORT_FILE)),
    ]


def _is_live(stream: TextIO) -> bool:
    return stream.isatty() and not RichConsole(file=stream).is_dumb_terminal


def _live_progress(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[text]}"),
        console=RichConsole(file=stream),
        refresh_per_second=4,
    )


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit} ({count:,} bytes)"
    return f"{count} bytes"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
