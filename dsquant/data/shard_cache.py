"""Keep shards of remote addresses in a folder of this node, which all of its processes share.

A shard appears whole, after its size and hash have been found to be those of the index; one process downloads it while
others that want it wait. The least recently used are removed where the next would not fit. (webdataset's FileCache does
without locks and hashes, tells shards of two sets apart by the last part of their address alone, and looks at its limit
at most every 30 s.)
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from dsquant.data.remote import ATTEMPTS, READ_BYTES, TransferError, open_url, wait_before
from dsquant.data.shards import file_hash, shard_name
from dsquant.errors import ConfigError, DataError

POLL_SECONDS = 0.05


class ShardCache:
    """Open remote shards through a folder that holds at most `max_bytes` of them, downloads under way included.

    A shard that is removed while a process reads it stays on the disk until that process has done.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def check(self, urls: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Raise DataError for a shard of unknown size, ConfigError for one that does not fit."""
        for url, size in zip(urls, sizes, strict=True):
            if size is None:
                raise DataError(
                    f"the index does not tell the size of {url}; write it anew with tools/make_shards.py index"
                )
            if size > self.max_bytes:
                raise ConfigError(f"{url} has {size} bytes and data.cache_gib allows {self.max_bytes}; raise it")

    def open(self, url: str, size: int, digest: str | None) -> BinaryIO:
        """Open a shard, downloaded first where it is not there. Raises OSError where it cannot be had as the index says."""
        name = hashlib.blake2b(f"{url} {size} {digest}".encode(), digest_size=8).hexdigest()
        path = self.folder / f"{name}-{shard_name(url)}"
        with self._lock_of(path):
            try:
                file = open(path, "rb")  # noqa: SIM115
            except FileNotFoundError:
                return self._download(url, path, size, digest)
            with suppress(FileNotFoundError):  # another process has just removed it
                os.utime(path)
            return file

    def prefetch(self, url: str, size: int, digest: str | None) -> None:
        """Start to download a shard in the background; what fails is left for `open` to meet again."""

        def fetch() -> None:
            with suppress(OSError):
                self.open(url, size, digest).close()

        threading.Thread(target=fetch, daemon=True).start()

    def _lock_of(self, path: Path) -> FileLock:
        return FileLock(path.with_name(f".{path.name}.lock"))

    def _download(self, url: str, path: Path, size: int, digest: str | None) -> BinaryIO:
        partial = path.with_name(f".{path.name}.partial")
        try:
            self._reserve(partial, size)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    _copy(url, partial, size, digest)
                    break
                except TransferError:
                    raise
                except OSError:
                    if attempt == ATTEMPTS:
                        raise
                    wait_before(attempt)
            file = open(partial, "rb")  # noqa: SIM115
            os.replace(partial, path)
            return file
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a shard and take it, by a file of its size that holds nothing yet."""
        partial.unlink(missing_ok=True)  # of a download that was killed
        with FileLock(self.folder / ".lock"):
            while self._used() + size > self.max_bytes:
                if not self._remove_one():
                    time.sleep(POLL_SECONDS)  # all there is, others are downloading: each ends, and may then be removed
            with open(partial, "wb") as file:
                file.truncate(size)

    def _used(self) -> int:
        """Return the bytes of all files. One that takes its final name meanwhile may be met under both, or under none."""
        while None in (found := [_status(path) for path in self.folder.iterdir()]):
            pass
        return sum({status.st_ino: status.st_size for status in found}.values())

    def _remove_one(self) -> bool:
        """Remove the shard that was used least recently, or what is left of a download that was killed."""
        shards = sorted(self.folder.glob("*.tar"), key=_used_at)
        if shards:
            shards[0].unlink(missing_ok=True)
            return True
        for partial in self.folder.glob(".*.partial"):
            with suppress(Timeout), self._lock_of(self.folder / partial.name[1 : -len(".partial")]).acquire(timeout=0):
                partial.unlink(missing_ok=True)
                return True
        return False


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()  # a link to nothing is there, and must not be waited for
    except FileNotFoundError:
        return None


def _used_at(path: Path) -> int:
    status = _status(path)
    return status.st_mtime_ns if status else 0


def _copy(url: str, path: Path, size: int, digest: str | None) -> None:
    """Copy what an address delivers to a file; OSError where it is not what the index says."""
    with open_url(url) as stream, open(path, "r+b") as file:
        shutil.copyfileobj(stream, file, READ_BYTES)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    found = path.stat().st_size
    if found != size:
        raise OSError(f"{found} bytes came where the index says {size}")
    if digest is not None and file_hash(path) != digest:
        raise OSError("what came has another hash than the index says")
