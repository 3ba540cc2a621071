"""Files and folders that appear whole: written under another name, synced, renamed, and the rename synced too.

A process that is killed at any moment, and a machine that loses its power, leave the old one or the new one. What takes the
place of a folder cannot do so in one rename: the old one is kept under a hidden name meanwhile, and `versions` finds it.
"""

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that readers see the old one or the new one, whole, even across a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, and return once its content is on the disk."""
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Return once the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(partial: Path, final: Path) -> None:
    """Give a finished folder its final name; the one that had it goes once the new one is on the disk."""
    former = final.with_name(f".{final.name}.former")
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)  # half deleted by a process that was killed here
        os.rename(final, former)
    os.rename(partial, final)
    sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def versions(folder: Path, pattern: str) -> list[Path]:
    """Return the folders in `folder` whose names match, by name; one that was being replaced counts under its hidden name."""
    found = {p.name[1:].removesuffix(".former"): p for p in folder.glob(f".{pattern}.former")}
    found |= {p.name: p for p in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]


def discard(path: Path) -> None:
    """Delete a folder; it has no name that anybody reads from the first moment on."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
