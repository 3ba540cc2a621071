"""Write WebDataset shards, with their index, so that a set is whole or absent."""

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from dsquant.data.shards import (
    INDEX,
    PENDING_INDEX,
    SKIPPED_MEMBER,
    ShardSet,
    content_member,
    count_samples,
    file_hash,
    is_remote,
    local_shards,
    read_index,
)
from dsquant.errors import DataError
from dsquant.files import write_atomically

Sample = tuple[str, dict[str, bytes]]  # key, and bytes by member


def write_shards(samples: Iterable[Sample], folder: str | Path, prefix: str, samples_per_shard: int) -> ShardSet:
    """Write samples as `folder/prefix-0000.tar`, ... and index.json, replacing an earlier set of that prefix.

    samples: pairs (key, {member: bytes}); equal samples make equal bytes. Nothing shows under its final name before
    the last sample is written. Raises DataError for a key with a dot or used twice in a shard, a missing member, or
    no samples; whatever the iterable raises passes through; in both cases the shards are left as they were.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f".{glob.escape(prefix)}-*.tar.partial"):  # of a writer that was killed
        stale.unlink()
    samples, partials = iter(samples), {}
    try:
        for first in samples:
            final = folder / f"{prefix}-{len(partials):04d}.tar"
            partial = folder / f".{final.name}.partial"
            partials[final] = (partial, 0)
            partials[final] = (partial, _write_tar(partial, chain([first], islice(samples, samples_per_shard - 1))))
        if not partials:
            raise DataError(f"no samples to write to {folder}")
        entries = [index_entry(partial, final.name, count) for final, (partial, count) in partials.items()]
        return put_in_place(folder, prefix, entries, [partial for partial, _ in partials.values()])
    finally:
        for partial, _ in partials.values():
            partial.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one shard of a set that several processes write, between begin_set and finish_set, and count its samples."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        count = _write_tar(partial, samples)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def begin_set(folder: Path) -> None:
    """Mark a folder as half-written until finish_set."""
    write_atomically(folder / PENDING_INDEX, _index_bytes([]))


def finish_set(folder: Path, counts: Mapping[str, int]) -> ShardSet:
    """Write the index of the shards {file name: samples} of a folder, beside those it lists already."""
    entries = [index_entry(folder / name, name, count) for name, count in counts.items()]
    others = [entry for name, entry in (read_index(str(folder / INDEX)) or {}).items() if name not in counts]
    write_atomically(folder / PENDING_INDEX, _index_bytes(entries + others))
    os.replace(folder / PENDING_INDEX, folder / INDEX)
    return _set_of(folder, entries)


def write_index(location: str | Path) -> ShardSet:
    """Scan the local shards of `location`, all in one folder, and write the index.json of that folder anew."""
    if is_remote(str(location)):
        raise DataError(f"{location}: only local shards can be scanned; make the index from a local copy")
    paths = local_shards(str(location))
    folders = {os.path.dirname(path) for path in paths}
    if len(folders) > 1:
        raise DataError(f"{location} spans {len(folders)} folders; write one index a folder")
    folder = Path(folders.pop())
    entries = [index_entry(path, os.path.basename(path), count_samples(path)) for path in paths]
    write_atomically(folder / INDEX, _index_bytes(entries))
    return _set_of(folder, entries)


def put_in_place(folder: Path, prefix: str, entries: list[dict[str, Any]], partials: list[Path]) -> ShardSet:
    """Give whole shards their final names, those of their index entries, in place of an earlier set of that prefix."""
    old, names = read_index(str(folder / INDEX)) or {}, {entry["url"] for entry in entries}
    superseded = re.compile(re.escape(prefix) + r"-\d+\.tar")
    others = [entry for name, entry in old.items() if not superseded.fullmatch(name)]
    write_atomically(folder / PENDING_INDEX, _index_bytes(entries + others))
    for path in folder.glob("*.tar"):
        if superseded.fullmatch(path.name) and path.name not in names:
            path.unlink()
    for entry, partial in zip(entries, partials, strict=True):
        os.replace(partial, folder / entry["url"])
    os.replace(folder / PENDING_INDEX, folder / INDEX)
    return _set_of(folder, entries)


def _write_tar(path: Path, samples: Iterable[Sample]) -> int:
    keys = set()
    with open(path, "wb") as file:
        with TarWriter(file, user="root", group="root", mode=0o644, mtime=0, encoder=False) as tar:
            for key, members in samples:
                if not key or "." in os.path.basename(key) or SKIPPED_MEMBER.match(key) or key in keys:
                    raise DataError(f"sample key {key!r} is empty, has a dot, is reserved, or occurs twice; rename it")
                keys.add(key)
                content_member(str(path.parent), {"__key__": key, **members})
                tar.write({"__key__": key, **members})
        file.flush()
        os.fsync(file.fileno())
    return len(keys)


def index_entry(path: str | Path, name: str, count: int) -> dict[str, Any]:
    """Describe a whole shard as index.json does."""
    return {"url": name, "nsamples": count, "filesize": os.path.getsize(path), "blake2b": file_hash(path)}


def _set_of(folder: Path, entries: list[dict[str, Any]]) -> ShardSet:
    columns = ([entry[name] for entry in entries] for name in ("url", "nsamples", "filesize", "blake2b"))
    names, *rest = map(tuple, columns)
    return ShardSet(tuple(str(folder / name) for name in names), *rest)


def _index_bytes(entries: list[dict[str, Any]]) -> bytes:
    return json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries}, indent=1).encode()
