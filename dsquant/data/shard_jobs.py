"""Write the shards of a set in several processes, so that a run that was killed goes on where it was.

Finished shards wait in `.PREFIX.partial` beside their final place, each with a record of what it was made from and the
hash of its bytes; a later run takes over those whose sources are the same and whose bytes are whole. A shard is a
function of its sources, so the bytes of a set depend neither on the number of processes nor on interruptions.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from dsquant.data.shard_writing import index_entry, put_in_place, write_shard
from dsquant.data.shards import ShardSet, file_hash
from dsquant.data.workers import map_in_processes
from dsquant.errors import DataError
from dsquant.files import write_atomically

RECORD = ".json"  # beside a finished shard
LOCK_SECONDS = 10.0  # the processes of a run that was killed end within this time
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Stand for a sample that is still to be read."""

    def identity(self) -> str:
        """Say what the sample is made from: equal identities make equal bytes."""

    def members(self) -> dict[str, bytes]:
        """Read the sample. Raises DataError naming where it lies."""


class _Job(NamedTuple):
    path: Path
    samples: list[tuple[str, Source]]


def write_sources(
    sources: Sequence[Source],
    folder: str | Path,
    prefix: str,
    *,
    samples_per_shard: int,
    workers: int,
    progress: Progress,
) -> ShardSet:
    """Write samples as `folder/prefix-0000.tar`, ... and index.json, in place of an earlier set of that prefix.

    Keys are prefix00000000, ... in the order of `sources`. Nothing shows under its final name before the last shard is
    written. progress is called with (samples done, samples in all). Raises DataError for no samples, a sample that cannot be
    read, or another process that writes the same set; shards that are finished then wait for the next call.
    """
    for name, value in (("samples_per_shard", samples_per_shard), ("workers", workers)):
        if type(value) is not int or value < 1:
            raise DataError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if not sources:
        raise DataError(f"no samples to write to {folder}")
    folder = Path(folder).absolute()
    waiting = folder / f".{prefix}.partial"
    waiting.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(waiting / ".lock", timeout=LOCK_SECONDS):
            return _write(sources, folder, waiting, prefix, samples_per_shard, workers, progress)
    except Timeout:
        raise DataError(f"another process writes {prefix} shards to {folder}; wait for it, or end it") from None
    finally:
        if not list(waiting.glob(f"*{RECORD}")):
            shutil.rmtree(waiting, ignore_errors=True)


def _write(
    sources: Sequence[Source],
    folder: Path,
    waiting: Path,
    prefix: str,
    per_shard: int,
    workers: int,
    progress: Progress,
) -> ShardSet:
    keyed = [(f"{prefix}{number:08d}", source) for number, source in enumerate(sources)]
    parts = [keyed[first : first + per_shard] for first in range(0, len(keyed), per_shard)]
    jobs = [_Job(waiting / f"{prefix}-{number:04d}.tar", part) for number, part in enumerate(parts)]
    entries, done = [], 0
    for entry in map_in_processes(_finished_shard, jobs, workers):
        entries.append(entry)
        done += entry["nsamples"]
        progress(done, len(sources))
    shards = put_in_place(folder, prefix, entries, [job.path for job in jobs])
    shutil.rmtree(waiting, ignore_errors=True)
    return shards


def _finished_shard(job: _Job) -> dict[str, Any]:
    """Write a shard, or find it written, and return its entry of the index."""
    record = job.path.with_name(job.path.name + RECORD)
    identity = hashlib.blake2b(digest_size=16)
    for key, source in job.samples:
        identity.update(repr((key, source.identity())).encode())
    made_from = identity.hexdigest()
    if record.exists() and job.path.exists():
        found = json.loads(record.read_bytes())
        entry = found["entry"]
        whole = os.path.getsize(job.path) == entry["filesize"] and file_hash(job.path) == entry["blake2b"]
        if found["made_from"] == made_from and whole:
            return entry
    record.unlink(missing_ok=True)
    count = write_shard(job.path, ((key, source.members()) for key, source in job.samples))
    entry = index_entry(job.path, job.path.name, count)
    write_atomically(record, json.dumps({"made_from": made_from, "entry": entry}).encode())
    return entry
