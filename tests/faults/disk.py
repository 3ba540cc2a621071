"""A disk that dies at a chosen operation: what a process that is killed there, or a machine that loses power, leaves behind.

Operations on the folder under test are those that Python reports to audit hooks (opening for writing, mkdir, rename, remove,
rmdir), fsync, and files that safetensors writes. Once dead, every later one fails too: a dead process cleans nothing up.
"""

import os
import shutil
import sys
from pathlib import Path

import dsquant.checkpoint

SYNC, SAVE_FILE = os.fsync, dsquant.checkpoint.save_file
ALL = "os.mkdir", "os.rename", "os.remove", "os.rmdir"


class Died(BaseException):
    """End the process, as far as its files are concerned; no `except Exception` stops it."""


class Disk:
    """Stand for the disk below `root` that dies before its operation number `at` (from 0; None: never).

    power_cut: what was written to a file and not synced is lost by half, and names that were given in a folder, and not
    synced, are lost; deletions are always on the disk at once. Otherwise all that was done is there, but for the file being
    written, of which half is.
    """

    current: "Disk | None" = None

    def __init__(self, root: Path, at: int | None = None, power_cut: bool = False):
        self.root, self.at, self.power_cut = Path(root), at, power_cut
        self.done, self.dead = [], False
        self.unsynced: dict[Path, int] = {}  # files, and how many bytes of each are safe
        self.names: list[tuple[Path, Path | None, bytes | None]] = []  # given: path, where from, what it replaced

    def __enter__(self):
        Disk.current = self
        os.fsync, dsquant.checkpoint.save_file = _fsync, _save_file
        return self

    def __exit__(self, kind, *_):
        Disk.current = None
        os.fsync, dsquant.checkpoint.save_file = SYNC, SAVE_FILE
        if self.dead:
            self._lose()
        return kind is Died

    def happens(self, what: str, *paths: Path, flags: int = 0) -> None:
        """Note an operation that is about to happen, or die before it."""
        if self.dead or len(self.done) == self.at:
            self.dead = True
            raise Died(f"{what} {paths}")
        self.done.append((what, *paths))
        if what in ("open", "os.mkdir") and not paths[0].exists():
            self.names.append((paths[0], None, None))
        if what == "open":
            appends = paths[0].exists() and flags & os.O_APPEND
            self.unsynced[paths[0]] = paths[0].stat().st_size if appends else 0
        if what == "os.rename":
            self._renamed(*paths)
        if what == "fsync":
            self.unsynced.pop(paths[0], None)
            self.names = [given for given in self.names if given[0].parent != paths[0]]

    def _renamed(self, old: Path, new: Path) -> None:
        replaced = new.read_bytes() if new.is_file() else None
        self.unsynced = {_moved(path, old, new): safe for path, safe in self.unsynced.items()}
        self.names.append((new, old, replaced))

    def _lose(self) -> None:
        lost = list(self.unsynced.items())[0 if self.power_cut else -1 :]
        for path, safe in lost:
            if path.exists():
                os.truncate(path, safe + (path.stat().st_size - safe) // 2)
        for path, old, replaced in reversed(self.names if self.power_cut else []):
            if not path.exists():
                continue
            if old is not None:
                os.rename(path, old)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            if replaced is not None:
                path.write_bytes(replaced)


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def _hook(event, args):
    disk = Disk.current
    if disk is None or event not in (*ALL, "open"):
        return
    if event == "open" and not (isinstance(args[0], str | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    paths = [Path(os.fsdecode(arg)) for arg in args[: 2 if event == "os.rename" else 1]]
    if not paths[0].is_absolute() or paths[0].is_relative_to(disk.root):  # relative: rmtree goes by folders' handles
        disk.happens(event, *paths, flags=args[2] if event == "open" else 0)


sys.addaudithook(_hook)


def _fsync(handle):
    disk, path = Disk.current, Path(os.readlink(f"/proc/self/fd/{handle}"))
    if path.is_relative_to(disk.root):
        disk.happens("fsync", path)


def _save_file(tensors, path):
    Disk.current.happens("open", Path(path))
    SAVE_FILE(tensors, path)


def deaths(source: Path, folder: Path, work):
    """Yield (folder, the disk) for every operation of `work(folder)` and both kinds of death, each on a copy of `source`.

    What the last two leave behind is that of a `work` that was not disturbed.
    """
    for power_cut in (False, True):
        at = 0
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            with Disk(folder, at, power_cut) as disk:
                work(folder)
            yield folder, disk
            if not disk.dead:
                break
            at += 1
