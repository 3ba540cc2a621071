"""The record of a run: `metrics.jsonl`, append-only, one JSON object a line, and `summary.json` at its end.

Everything else that shows a run (W&B, the report) is derived from these two files. A record is
`{"kind", "stage", "step", ...fields, "time"}`: `step` counts the optimizer steps done in that stage (the first is 1),
`time` is in seconds since the epoch.
"""

import json
import logging
import math
import os
import time
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

from dsquant.errors import DsquantError
from dsquant.files import write_atomically

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
KINDS = ("train", "eval", "oscillation", "stage", "checkpoint", "data", "summary")
RESERVED = ("time", "nonfinite")

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receive every record after it is in the file; a sink must not raise for reasons of its own."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class MetricsLog:
    """Append records to a JSONL file and hand each to the sinks; the file is the source of truth.

    Every record is one `write(2)`, so a killed process leaves at most one unfinished line, which `resume` removes.
    Raises DsquantError where `path` already holds records: use `MetricsLog.resume` to continue a run.
    """

    def __init__(self, path: Path, sinks: Iterable[Sink] = ()) -> None:
        path = Path(path)
        if path.exists() and path.stat().st_size:
            raise DsquantError(f"{path} already holds a run; pass --resume to continue it or another --out_dir")
        self._open(path, sinks)

    def _open(self, path: Path, sinks: Iterable[Sink]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._sinks = tuple(sinks)
        self._last_train: tuple[str, int] | None = None
        self._file = path.open("ab", buffering=0)

    @classmethod
    def resume(
        cls, path: Path, stages: Sequence[str], after: tuple[str, int] | None, sinks: Iterable[Sink] = (),
        owed: Collection[str] = (),
    ) -> "MetricsLog":  # fmt: skip
        """Continue the log of a run from a checkpoint, so that it holds every training step exactly once, in order.

        `stages` names the stages in order; `after` is the checkpoint's (stage, step), None where the run starts over.
        Records of later steps of that stage, of later stages, and summaries move to `metrics.discarded.jsonl` beside
        `path` (appended), as does an unfinished last line; records at exactly that position stay: write all records
        of a step, and call `flush`, before saving its checkpoint. `owed` names the kinds of record that this step has yet
        to get, where its checkpoint was saved before them: what there is of them goes too, and they are written once.
        Raises DsquantError where a record belongs to no stage of `stages`, or a line is no record.
        """
        path = Path(path)
        after = None if after is None else (after[0], int(after[1]))
        records, unfinished = _parse(path) if path.exists() else ([], b"")
        kept, discarded = [], []
        for record in records:
            due = record["kind"] in owed and (record["stage"], record["step"]) == after
            (kept if _happened_by(record, stages, after, path) and not due else discarded).append(record)
        if unfinished:
            discarded.append({"kind": "unfinished", "text": unfinished.decode("utf-8", errors="replace")})
        if discarded:
            _append(discarded_path(path), discarded)
        text = "".join(map(_line, kept))
        if path.exists() and path.read_bytes() != text.encode():
            write_atomically(path, text)
        log = cls.__new__(cls)
        log._open(path, sinks)
        log._last_train = next(((r["stage"], r["step"]) for r in reversed(kept) if r["kind"] == "train"), None)
        log._warn_of_gap(after)
        return log

    def _warn_of_gap(self, after: tuple[str, int] | None) -> None:
        if after and after[1] > 0 and self._last_train != after:
            last = "nothing" if self._last_train is None else "stage {} step {}".format(*self._last_train)
            logger.warning(
                "%s ends at %s but the checkpoint is at stage %s step %d: the steps between are in no record",
                self.path, last, *after,
            )  # fmt: skip

    def write(self, kind: str, stage: str, step: int, **fields: Any) -> None:
        """Append one record; non-finite floats become null and are named, dotted, in its field `nonfinite`.

        Raises ValueError for an unknown kind, a reserved field or a training step that is not after the last one,
        TypeError for a value JSON cannot hold (a tensor: pass `.item()`).
        """
        if self._file.closed:
            raise ValueError(f"{self.path} is closed")
        if kind not in KINDS:
            raise ValueError(f"unknown kind of record {kind!r}; kinds are {', '.join(KINDS)}")
        if taken := [name for name in RESERVED if name in fields]:
            raise ValueError(f"field names {taken} are reserved in {self.path.name}; choose others")
        if kind == "train" and self._last_train and self._last_train[0] == stage and step <= self._last_train[1]:
            raise ValueError(f"training step {step} of stage {stage} written after step {self._last_train[1]}")
        nonfinite: list[str] = []
        record = {"kind": kind, "stage": stage, "step": int(step), **_plain(fields, "", nonfinite)}
        record["time"] = round(time.time(), 3)
        if nonfinite:
            record["nonfinite"] = nonfinite
        _write_all(self._file, _line(record).encode())
        if kind == "train":
            self._last_train = (stage, int(step))
        for sink in self._sinks:
            sink.write(record)

    def flush(self) -> None:
        """Return once every record written so far is on the disk."""
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        """Flush and close the file and the sinks; closing twice is harmless."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        for sink in self._sinks:
            sink.close(failed=failed)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self.close(failed=exc_type is not None)


def read_metrics(path: Path, kind: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a log in order, of one kind and one stage where given.

    An unfinished last line (a run being written, or killed) is left out. Raises DsquantError where the file is absent
    or another line is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise DsquantError(f"no metrics at {path}; give the folder of a run that has started training")
    return [r for r in _parse(path)[0] if kind in (None, r["kind"]) and stage in (None, r["stage"])]


def stage_totals(records: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return (stage, last step) of each stage in the order of its first record."""
    totals: dict[str, int] = {}
    for record in records:
        if record["kind"] != "summary":
            totals[record["stage"]] = max(totals.get(record["stage"], 0), record["step"])
    return list(totals.items())


def stage_offsets(stages: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return how many training steps precede each stage: global step = offset[stage] + step."""
    offsets, done = {}, 0
    for name, total in stages:
        offsets[name] = done
        done += total
    return offsets


def discarded_path(path: Path) -> Path:
    """Return where `MetricsLog.resume` keeps the records it takes out of `path`."""
    return path.with_name(f"{path.stem}.discarded{path.suffix}")


def write_summary(run_dir: Path, summary: dict[str, Any]) -> Path:
    """Write `RUN/summary.json` whole or not at all and return its path; non-finite floats as in `MetricsLog.write`."""
    nonfinite: list[str] = []
    plain = _plain(summary, "", nonfinite)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    path = Path(run_dir) / SUMMARY_FILE
    write_atomically(path, json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return `RUN/summary.json`; raises DsquantError where it is absent or not JSON."""
    path = Path(run_dir) / SUMMARY_FILE
    if not path.is_file():
        raise DsquantError(f"no summary at {path}; a run writes it when it finishes")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DsquantError(f"{path} is not JSON ({error}); restore it or run again") from None


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """Return `value` as JSON types; `nonfinite` collects the dotted names of floats replaced by None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(name)
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{name}.{k}" if name else str(k), nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name}.{i}", nonfinite) for i, v in enumerate(value)]
    raise TypeError(f"field {name!r} is a {type(value).__name__}, which JSON cannot hold; pass a number, text or list")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _parse(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return the records of a log and the bytes of an unfinished last line (b"" where there is none)."""
    *lines, last = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            raise DsquantError(f"{path} line {number} is not a record of a run; remove that line or the file")
        records.append(record)
    record = _record(last)
    return (records, last) if record is None else ([*records, record], b"")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "stage", "step"} <= record.keys() else None


def _happened_by(record: dict[str, Any], stages: Sequence[str], after: tuple[str, int] | None, path: Path) -> bool:
    """Tell whether a record lies at or before the position `after`; a summary closes a run, so it never does."""
    if after is None or record["kind"] == "summary":
        return False
    for where, stage in ((path, record["stage"]), ("the checkpoint", after[0])):
        if stage not in stages:
            raise DsquantError(
                f"{where} holds stage {stage!r} but the recipe has {', '.join(stages)}; resume with its own recipe"
            )
    return (stages.index(record["stage"]), record["step"]) <= (stages.index(after[0]), after[1])


def _append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("ab") as file:
        torn = file.tell() and not path.read_bytes().endswith(b"\n")  # by a resume that was killed here
        file.write((b"\n" if torn else b"") + "".join(map(_line, records)).encode())
        file.flush()
        os.fsync(file.fileno())


def _write_all(file: Any, data: bytes) -> None:
    """Write to an unbuffered file; a short write (disk nearly full) continues where it stopped."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
