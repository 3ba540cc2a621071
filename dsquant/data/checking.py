"""Check a set of shards: size, hash and counts against its index, and every sample decoded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.data.reading import decode, read_shard
from dsquant.data.shards import (
    FIX,
    INDEX,
    ShardSet,
    beside,
    count_samples,
    file_hash,
    is_remote,
    local_shards,
    read_index,
    shard_name,
)
from dsquant.data.workers import map_in_processes
from dsquant.errors import DataError

Row = tuple[str, int | None, int | None, str | None]  # address, samples, bytes, hash


@dataclass(frozen=True)
class Verdict:
    """Say what was found: samples of each label or score, how many shards, and one line for each thing that is damaged."""

    labels: dict[int | float, int]
    shards: int
    damage: list[str]


def check_shards(
    location: str | Path, *, workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verdict:
    """Check the shards of a folder, glob, brace pattern or remote pattern, several at a time.

    A shard is held against its entry of the index: size, number of samples and, where it lies here, hash. Every sample is
    decoded; a key that a shard has twice is damage too. progress is called with (shards done, shards in all).
    Raises DataError where there are no shards, or no usable index of remote ones.
    """
    rows = _rows(str(location))
    labels, damage = Counter(), []
    for done, (found, faults) in enumerate(map_in_processes(_check_shard, rows, workers), 1):
        labels.update(found)
        damage += faults
        progress(done, len(rows))
    return Verdict(dict(sorted(labels.items())), len(rows), damage)


def _rows(location: str) -> list[Row]:
    if is_remote(location):
        shards = ShardSet.open(location)
        return [shards.row(index) for index in range(len(shards))]
    paths = local_shards(location, damaged=True)
    indexes = {address: read_index(address) or {} for address in {beside(path, INDEX) for path in paths}}
    entries = [indexes[beside(path, INDEX)].get(shard_name(path), {}) for path in paths]
    facts = ("nsamples", "filesize", "blake2b")
    return [(path, *(entry.get(fact) for fact in facts)) for path, entry in zip(paths, entries, strict=True)]


def _check_shard(row: Row) -> tuple[Counter[int | float], list[str]]:
    url, count, size, digest = row
    labels, faults, keys = Counter(), [], set()
    try:
        for record in read_shard(url, count_samples(url) if count is None else count, size):
            if record["__key__"] in keys:
                faults.append(f"shard {url}, sample {record['__key__']}: its key occurs twice; {FIX}")
            keys.add(record["__key__"])
            _decode(record, labels, faults)
        if digest and not is_remote(url) and file_hash(url) != digest:
            faults.append(f"shard {url}: its bytes are not those that its index holds the hash of; {FIX}")
    except DataError as error:
        faults.append(str(error))
    return labels, faults


def _decode(record: dict[str, Any], labels: Counter[int | float], faults: list[str]) -> None:
    try:
        labels[decode(record, lambda content: content)[1]] += 1
    except DataError as error:
        faults.append(str(error))
