"""Find WebDataset shards, know how many samples each holds, and write them so that a set is whole or absent.

A sample is the run of tar members whose names agree up to the first dot of the file name (webdataset's rule);
dsquant's samples hold one image member (jpg, jpeg, png or webp) and `cls`, the label as an ASCII integer.
`index.json` beside the shards has webdataset's wids layout: {"shardlist": [{"url", "nsamples", "filesize"}, ...]}.
"""

import fnmatch
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from webdataset import TarWriter
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from dsquant.errors import DataError

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
LABEL_MEMBER = "cls"
FIX = "re-create it with tools/make_shards.py, or remove it"
INDEX = "index.json"
PENDING_INDEX = "index.json.partial"  # there while a set is put in place, so half a set is never taken for a whole one
SHARD_NAME = re.compile(r"[^\s/'\"=]+\.tar")
SKIPPED_MEMBER = re.compile(r"__[^/]*__($|/)")  # the members that webdataset's reader leaves out


@dataclass(frozen=True)
class ShardSet:
    """Hold the addresses of shards and their sample counts; `len` is the number of shards, `total` that of samples."""

    urls: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def open(cls, location: str | Path, cache_dir: Path | None = None, index: str | None = None) -> "ShardSet":
        """Find the shards of `location`, each with its sample count.

        location: a folder of *.tar, a glob, a brace pattern (`train-{0000..0019}.tar`), or a brace pattern of
        `http(s)://` or `pipe:` addresses. Counts come from `index` (a path or address; by default index.json beside
        the shards); local shards without one are scanned, tar headers only, and `cache_dir` keeps their counts for as
        long as size and modification time stay. Raises DataError where shards are missing, truncated, corrupt or
        half-written, lack the image or `cls`, or are remote without an index.
        """
        if _is_remote(str(location)):
            urls = expand_urls(str(location))
            counts = _remote_counts(urls, index)
        else:
            urls = _local_shards(str(location))
            counts = _local_counts(urls, cache_dir, index)
        if sum(counts) == 0:
            raise DataError(f"{location}: the shards hold no samples; {FIX}")
        return cls(tuple(urls), tuple(counts))

    @property
    def total(self) -> int:
        """Give the number of samples of all shards."""
        return sum(self.counts)

    def __len__(self) -> int:
        return len(self.urls)


def image_member(url: str, sample: Mapping[str, object]) -> str:
    """Name the image member of a sample; raise DataError where it has none, or no `cls`."""
    found = next((name for name in IMAGE_MEMBERS if name in sample), None)
    if found is None or LABEL_MEMBER not in sample:
        missing = LABEL_MEMBER if found else f"image ({', '.join(IMAGE_MEMBERS)})"
        members = ", ".join(name for name in sample if not name.startswith("__")) or "nothing"
        raise DataError(f"shard {url}, sample {sample['__key__']}: no {missing} member, only {members}; {FIX}")
    return found


def count_samples(path: str) -> int:
    """Count the samples of a local tar from its headers; raise DataError where it is truncated or corrupt."""
    names, position = [], 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                position = member.offset
                tar.members = []  # tarfile keeps every header otherwise
                if member.isreg() and not SKIPPED_MEMBER.match(member.name):
                    names.append(member.name)
            position = tar.offset
            # tarfile takes any unreadable header for the end; a whole tar ends with a block of zeros
            file.seek(position)
            block = file.read(tarfile.BLOCKSIZE)
            if block != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("corrupt header" if len(block) == tarfile.BLOCKSIZE else "the tar is truncated")
        samples = list(group_by_keys({"fname": name, "data": b"", "__url__": path} for name in names))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise DataError(f"shard {path}: {read_failure(error)}, at byte {position} of {size}; {FIX}") from error
    for sample in samples:
        image_member(path, sample)
    return len(samples)


def read_failure(error: Exception) -> str:
    """Give the reason of a failed read, without the stream and address that webdataset adds to it."""
    reason = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return reason.split(" @ <")[0] or type(error).__name__


def beside(url: str, name: str) -> str:
    """Give the address of the file `name` that lies beside a shard."""
    return SHARD_NAME.sub(name, url) if _is_remote(url) else os.path.join(os.path.dirname(url), name)


def _is_remote(location: str) -> bool:
    return re.match(r"[a-z][a-z0-9+]+:", location) is not None


def _local_shards(location: str) -> list[str]:
    folder = os.path.expanduser(location)
    try:
        patterns = [os.path.join(glob.escape(folder), "*.tar")] if os.path.isdir(folder) else expand_urls(location)
    except ValueError as error:
        raise DataError(f"shard pattern {location}: {error}; correct its braces") from error
    absolute = [os.path.abspath(os.path.expanduser(pattern)) for pattern in patterns]
    found = list(chain.from_iterable(map(_matches, absolute)))
    prefixes = sorted({re.sub(r"[-_.]?\d*\.tar$", "", os.path.basename(shard)) for shard in found})
    if os.path.isdir(folder) and len(prefixes) > 1:
        raise DataError(
            f"{location} holds several sets of shards ({', '.join(prefixes)}); name one: {folder}/{prefixes[0]}-*.tar"
        )
    return found


def _matches(pattern: str) -> list[str]:
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    for folder in {os.path.dirname(shard) for shard in found}:
        if os.path.exists(os.path.join(folder, PENDING_INDEX)):
            raise DataError(f"{folder} was left half-written; run the tool that writes it again, or remove it")
        for name in _read_index(os.path.join(folder, INDEX)) or ():
            listed = os.path.join(folder, name)
            if fnmatch.fnmatch(listed, pattern) and not os.path.exists(listed):
                raise DataError(f"{folder}/{INDEX} lists {name}, which is missing; restore it, or {FIX}")
    if not found:
        folder = os.path.dirname(pattern)
        state = "that folder has no such file" if os.path.isdir(folder) else f"the folder {folder} does not exist"
        raise DataError(f"no shards at {pattern}: {state}; correct the path, or make shards with tools/make_shards.py")
    return found


def _read_index(address: str) -> dict[str, dict] | None:
    """Give the entries of an index by shard name, or None where there is none."""
    if not _is_remote(address) and not os.path.exists(address):
        return None
    try:
        stream = gopen(address)
        try:
            entries = json.loads(stream.read())["shardlist"]
        finally:
            with suppress(OSError):  # a failed fetch shows as unreadable JSON already
                stream.close()
        return {shard_name(entry["url"]): {**entry, "nsamples": int(entry["nsamples"])} for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"no usable shard index at {address} ({type(error).__name__}: {error}); "
            f"make one from local shards with `python tools/make_shards.py index --shards LOCATION`"
        ) from error


def shard_name(url: str) -> str:
    """Give the file name in the address of a shard; raise DataError where it has none."""
    if not _is_remote(url):
        return os.path.basename(url)
    name = SHARD_NAME.search(url)
    if name is None:
        raise DataError(f"shard address {url} names no .tar file; dsquant needs the name to find its count in {INDEX}")
    return name.group()


def _remote_counts(urls: list[str], index: str | None) -> list[int]:
    address = index or beside(urls[0], INDEX)
    entries = _read_index(address)
    if entries is None:
        raise DataError(f"shard index {address} does not exist; copy it there, or write it with tools/make_shards.py")
    unknown = [url for url in urls if shard_name(url) not in entries]
    if unknown:
        raise DataError(f"{address} does not list {unknown[0]}; write the index anew with tools/make_shards.py index")
    return [entries[shard_name(url)]["nsamples"] for url in urls]


def _local_counts(paths: list[str], cache_dir: Path | None, index: str | None) -> list[int]:
    addresses = {path: index or beside(path, INDEX) for path in paths}
    indexes = {address: _read_index(address) for address in set(addresses.values())}
    if index and indexes[index] is None:
        raise DataError(f"shard index {index} does not exist; write it with tools/make_shards.py index")
    cache = _CountCache(paths, cache_dir)
    counts = []
    for path, address in addresses.items():
        entry = (indexes[address] or {}).get(os.path.basename(path))
        size = os.path.getsize(path)
        if entry and entry.get("filesize", size) != size:
            told = f"{address} says {entry['filesize']}"
            raise DataError(f"shard {path}: {size} bytes, but {told}: truncated or changed; {FIX}")
        counts.append(entry["nsamples"] if entry else cache.count(path))
    cache.save()
    return counts


class _CountCache:
    """Keep scanned counts in a file of `cache_dir`, each valid for one size and modification time of its shard."""

    def __init__(self, paths: list[str], cache_dir: Path | None):
        digest = hashlib.blake2b("\n".join(paths).encode(), digest_size=8).hexdigest()
        self.path = Path(cache_dir) / f"shards-{digest}.json" if cache_dir else None
        self.entries, self.changed = {}, False
        if self.path and self.path.exists():
            with suppress(ValueError):  # an unreadable cache is rebuilt
                self.entries = json.loads(self.path.read_bytes())

    def count(self, path: str) -> int:
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns]
        if self.entries.get(path, {}).get("stamp") != stamp:
            self.entries[path] = {"stamp": stamp, "nsamples": count_samples(path)}
            self.changed = True
        return self.entries[path]["nsamples"]

    def save(self) -> None:
        if self.path and self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self.entries).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # every rank may write the same file
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shards(
    samples: Iterable[tuple[str, dict[str, bytes]]], folder: str | Path, prefix: str, samples_per_shard: int
) -> ShardSet:
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
        _put_in_place(folder, prefix, partials)
    finally:
        for partial, _ in partials.values():
            partial.unlink(missing_ok=True)
    return ShardSet(tuple(map(str, partials)), tuple(count for _, count in partials.values()))


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
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
    write_whole(folder / PENDING_INDEX, _index_bytes([]))


def finish_set(folder: Path, counts: Mapping[str, int]) -> ShardSet:
    """Write the index of the shards {file name: samples} of a folder, beside those it lists already."""
    entries = [_entry(folder / name, name, count) for name, count in counts.items()]
    entries += [entry for name, entry in (_read_index(str(folder / INDEX)) or {}).items() if name not in counts]
    write_whole(folder / PENDING_INDEX, _index_bytes(entries))
    os.replace(folder / PENDING_INDEX, folder / INDEX)
    return ShardSet(tuple(str(folder / name) for name in counts), tuple(counts.values()))


def _write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    keys = set()
    with open(path, "wb") as file:
        with TarWriter(file, user="root", group="root", mode=0o644, mtime=0, encoder=False) as tar:
            for key, members in samples:
                if not key or "." in os.path.basename(key) or SKIPPED_MEMBER.match(key) or key in keys:
                    raise DataError(f"sample key {key!r} is empty, has a dot, is reserved, or occurs twice; rename it")
                keys.add(key)
                image_member(str(path.parent), {"__key__": key, **members})
                tar.write({"__key__": key, **members})
        file.flush()
        os.fsync(file.fileno())
    return len(keys)


def _put_in_place(folder: Path, prefix: str, partials: dict[Path, tuple[Path, int]]) -> None:
    old = _read_index(str(folder / INDEX)) or {}
    superseded = re.compile(re.escape(prefix) + r"-\d+\.tar")
    entries = [_entry(partial, path.name, count) for path, (partial, count) in partials.items()]
    entries += [entry for name, entry in old.items() if not superseded.fullmatch(name)]
    write_whole(folder / PENDING_INDEX, _index_bytes(entries))
    for path in folder.glob("*.tar"):
        if superseded.fullmatch(path.name) and path not in partials:
            path.unlink()
    for path, (partial, _) in partials.items():
        os.replace(partial, path)
    os.replace(folder / PENDING_INDEX, folder / INDEX)


def _entry(path: str | Path, name: str, count: int) -> dict:
    return {"url": name, "nsamples": count, "filesize": os.path.getsize(path)}


def _index_bytes(entries: list[dict]) -> bytes:
    return json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries}, indent=1).encode()


def write_index(location: str | Path) -> ShardSet:
    """Scan the local shards of `location`, all in one folder, and write the index.json of that folder anew."""
    if _is_remote(str(location)):
        raise DataError(f"{location}: only local shards can be scanned; make the index from a local copy")
    paths = _local_shards(str(location))
    folders = {os.path.dirname(path) for path in paths}
    if len(folders) > 1:
        raise DataError(f"{location} spans {len(folders)} folders; write one index a folder")
    counts = [count_samples(path) for path in paths]
    entries = [_entry(path, os.path.basename(path), count) for path, count in zip(paths, counts, strict=True)]
    write_whole(Path(folders.pop()) / INDEX, _index_bytes(entries))
    return ShardSet(tuple(paths), tuple(counts))
