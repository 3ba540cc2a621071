"""Find WebDataset shards and know how many samples each holds.

A sample is the run of tar members whose names agree up to the first dot of the file name (webdataset's rule);
dsquant's samples hold one image member (jpg, jpeg, png or webp), or `json` for text, and `cls`, the label as an ASCII
integer; text may have `score`, a number, instead.
`index.json` beside the shards has webdataset's wids layout: {"shardlist": [{"url", "nsamples", "filesize", "blake2b"}, ...]}.
"""

import fnmatch
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from dsquant.data.remote import READ_BYTES, open_url
from dsquant.errors import DataError
from dsquant.files import write_atomically

if TYPE_CHECKING:
    from dsquant.data.shard_cache import ShardCache

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
LABEL_MEMBER = "cls"
TEXT_MEMBER, SCORE_MEMBER = "json", "score"
FIX = "re-create it with tools/make_shards.py, or remove it"
FAULT = "__fault__"  # key of a record: what is wrong with the sample as a whole
INDEX = "index.json"
PENDING_INDEX = "index.json.partial"  # there while a set is put in place, so half a set is never taken for a whole one
SHARD_NAME = re.compile(r"[^\s/'\"=]+\.tar")
SKIPPED_MEMBER = re.compile(r"__[^/]*__($|/)")  # the members that webdataset's reader leaves out


@dataclass(frozen=True)
class ShardSet:
    """Hold the addresses of shards and their sample counts; `len` is the number of shards, `total` that of samples.

    sizes (bytes) and hashes (blake2b of 16 bytes, in hex) are those of the index, None where it does not tell. Remote
    shards are read through `cache`, where there is one.
    """

    urls: tuple[str, ...]
    counts: tuple[int, ...]
    sizes: tuple[int | None, ...] = field(default=(), compare=False)
    hashes: tuple[str | None, ...] = field(default=(), compare=False)
    cache: "ShardCache | None" = field(default=None, compare=False)

    def __post_init__(self):
        for name in ("sizes", "hashes"):
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * len(self.urls))

    @classmethod
    def open(
        cls, location: str | Path, cache_dir: Path | None = None, index: str | None = None, *, damaged: bool = False,
        cache: "ShardCache | None" = None,
    ) -> "ShardSet":  # fmt: skip
        """Find the shards of `location`, each with its sample count.

        location: a folder of *.tar, a glob, a brace pattern (`train-{0000..0019}.tar`), or a brace pattern of
        `http(s)://` or `pipe:` addresses. Counts come from `index` (a path or address; by default index.json beside
        the shards); local shards without one are scanned, tar headers only, and `cache_dir` keeps their counts for as
        long as size and modification time stay. Raises DataError where shards are missing, truncated, corrupt or
        half-written, lack the image or `cls`, or are remote without an index. With `damaged`, shards that an index lists
        may be missing or of another size than it says: reading them finds what is lost.
        """
        if is_remote(str(location)):
            urls = expand_urls(str(location))
            entries = _remote_entries(urls, index)
            if cache:
                cache.check(urls, [entry.get("filesize") for entry in entries])
        else:
            urls = local_shards(str(location), damaged)
            entries = _local_entries(urls, cache_dir, index, damaged)
        columns = ([entry.get(name) for entry in entries] for name in ("nsamples", "filesize", "blake2b"))
        found = cls(tuple(urls), *map(tuple, columns), cache=cache)
        if found.total == 0:
            raise DataError(f"{location}: the shards hold no samples; {FIX}")
        return found

    @property
    def total(self) -> int:
        """Give the number of samples of all shards."""
        return sum(self.counts)

    def __len__(self) -> int:
        return len(self.urls)

    def row(self, index: int) -> tuple[str, int, int | None, str | None]:
        """Give address, count, size and hash of one shard."""
        return self.urls[index], self.counts[index], self.sizes[index], self.hashes[index]

    def prefetch(self, index: int) -> None:
        """Start to bring a remote shard into the cache, where there is one."""
        url, _, size, digest = self.row(index)
        if self.cache and is_remote(url):
            self.cache.prefetch(url, size, digest)


def image_member(url: str, sample: Mapping[str, object]) -> str:
    """Name the image member of a sample; raise DataError where it has none, or no `cls`."""
    found = next((name for name in IMAGE_MEMBERS if name in sample), None)
    if found is None or LABEL_MEMBER not in sample:
        missing = LABEL_MEMBER if found else f"image ({', '.join(IMAGE_MEMBERS)})"
        members = ", ".join(name for name in sample if not name.startswith("__")) or "nothing"
        raise DataError(f"shard {url}, sample {sample['__key__']}: no {missing} member, only {members}; {FIX}")
    return found


def content_member(url: str, sample: Mapping[str, object]) -> str:
    """Name the image or text member of a sample; raise DataError where it has neither, no label, or a fault."""
    if FAULT in sample:
        raise DataError(f"shard {url}, sample {sample['__key__']}: {sample[FAULT]}; {FIX}")
    if TEXT_MEMBER in sample and (LABEL_MEMBER in sample or SCORE_MEMBER in sample):
        return TEXT_MEMBER
    return image_member(url, sample)


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
            while block := file.read(READ_BYTES):  # a reader would take zeros among the samples for the end
                if block.strip(b"\0"):
                    raise tarfile.ReadError("more lies behind what looks like its end")
        samples = list(group_by_keys({"fname": name, "data": b"", "__url__": path} for name in names))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise DataError(f"shard {path}: {read_failure(error)}, at byte {position} of {size}; {FIX}") from error
    for sample in samples:
        content_member(path, sample)
    return len(samples)


def read_failure(error: Exception) -> str:
    """Give the reason of a failed read, without the stream and address that webdataset adds to it."""
    reason = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return reason.split(" @ <")[0] or type(error).__name__


def beside(url: str, name: str) -> str:
    """Give the address of the file `name` that lies beside a shard."""
    return SHARD_NAME.sub(name, url) if is_remote(url) else os.path.join(os.path.dirname(url), name)


def is_remote(location: str) -> bool:
    """Say whether an address has a scheme: http:, pipe: and so on."""
    return re.match(r"[a-z][a-z0-9+]+:", location) is not None


def local_shards(location: str, damaged: bool = False) -> list[str]:
    """Find the local shards of a folder, glob or brace pattern; see ShardSet.open."""
    folder = os.path.expanduser(location)
    try:
        patterns = [os.path.join(glob.escape(folder), "*.tar")] if os.path.isdir(folder) else expand_urls(location)
    except ValueError as error:
        raise DataError(f"shard pattern {location}: {error}; correct its braces") from error
    absolute = [os.path.abspath(os.path.expanduser(pattern)) for pattern in patterns]
    found = list(chain.from_iterable(_matches(pattern, damaged) for pattern in absolute))
    prefixes = sorted({re.sub(r"[-_.]?\d*\.tar$", "", os.path.basename(shard)) for shard in found})
    if os.path.isdir(folder) and len(prefixes) > 1:
        raise DataError(
            f"{location} holds several sets of shards ({', '.join(prefixes)}); name one: {folder}/{prefixes[0]}-*.tar"
        )
    return found


def _matches(pattern: str, damaged: bool) -> list[str]:
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    for folder in {os.path.dirname(shard) for shard in found} or {os.path.dirname(pattern)}:
        if os.path.exists(os.path.join(folder, PENDING_INDEX)):
            raise DataError(f"{folder} was left half-written; run the tool that writes it again, or remove it")
        listed = [os.path.join(folder, name) for name in read_index(os.path.join(folder, INDEX)) or ()]
        missing = [path for path in listed if fnmatch.fnmatch(path, pattern) and not os.path.exists(path)]
        if missing and not damaged:
            name = os.path.basename(missing[0])
            raise DataError(f"{folder}/{INDEX} lists {name}, which is missing; restore it, or {FIX}")
        found = sorted({*found, *missing})
    if not found:
        folder = os.path.dirname(pattern)
        state = "that folder has no such file" if os.path.isdir(folder) else f"the folder {folder} does not exist"
        raise DataError(f"no shards at {pattern}: {state}; correct the path, or make shards with tools/make_shards.py")
    return found


def read_index(address: str) -> dict[str, dict] | None:
    """Give the entries of an index by shard name, or None where there is none."""
    if not is_remote(address) and not os.path.exists(address):
        return None
    try:
        stream = open_url(address)
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
    if not is_remote(url):
        return os.path.basename(url)
    name = SHARD_NAME.search(url)
    if name is None:
        raise DataError(f"shard address {url} names no .tar file; dsquant needs the name to find its count in {INDEX}")
    return name.group()


def _remote_entries(urls: list[str], index: str | None) -> list[dict]:
    address = index or beside(urls[0], INDEX)
    entries = read_index(address)
    if entries is None:
        raise DataError(f"shard index {address} does not exist; copy it there, or write it with tools/make_shards.py")
    unknown = [url for url in urls if shard_name(url) not in entries]
    if unknown:
        raise DataError(f"{address} does not list {unknown[0]}; write the index anew with tools/make_shards.py index")
    return [entries[shard_name(url)] for url in urls]


def _local_entries(paths: list[str], cache_dir: Path | None, index: str | None, damaged: bool) -> list[dict]:
    addresses = {path: index or beside(path, INDEX) for path in paths}
    indexes = {address: read_index(address) for address in set(addresses.values())}
    if index and indexes[index] is None:
        raise DataError(f"shard index {index} does not exist; write it with tools/make_shards.py index")
    cache = _CountCache(paths, cache_dir)
    entries = []
    for path, address in addresses.items():
        entry = (indexes[address] or {}).get(os.path.basename(path))
        told = entry and entry.get("filesize")
        if told is not None and not damaged and told != (size := os.path.getsize(path)):
            raise DataError(f"shard {path}: {size} bytes, but {address} says {told}: truncated or changed; {FIX}")
        entries.append(entry or {"nsamples": cache.count(path)})
    cache.save()
    return entries


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
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"shard {path}: {error.strerror}; {FIX}") from error
        stamp = [status.st_size, status.st_mtime_ns]
        if self.entries.get(path, {}).get("stamp") != stamp:
            self.entries[path] = {"stamp": stamp, "nsamples": count_samples(path)}
            self.changed = True
        return self.entries[path]["nsamples"]

    def save(self) -> None:
        if self.path and self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.entries).encode())


def file_hash(path: str | Path) -> str:
    """Return the blake2b of a file, 16 bytes in hex, as index.json holds it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
