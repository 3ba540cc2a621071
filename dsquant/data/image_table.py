"""Pack images that a table lists with their labels (CSV, TSV, JSONL, or a folder that `datasets` has saved) into shards."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsquant.data.image_folder import ImageFile, image_member, write_classes
from dsquant.data.shard_jobs import write_sources
from dsquant.data.shards import LABEL_MEMBER, ShardSet
from dsquant.data.text_table import class_numbers, open_saved, table_rows
from dsquant.errors import DataError


def shard_image_table(
    src: str | Path,
    out: str | Path,
    *,
    image_column: str | int = "image",
    label_column: str | int = "label",
    root: str | Path | None = None,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardSet:
    """Write the images that a table lists as shards `out/prefix-*.tar`, index.json and classes.txt.

    src: a .tsv, .csv or .jsonl, read as shard_text_table reads it, whose image column holds paths, relative to `root` (by
    default the table's folder); or the folder of one split of a Hugging Face image classification data set (`save_to_disk`).
    Labels are numbered as shard_text_table does; a data set's ClassLabel keeps its numbers and names. Rows are shuffled by
    `seed`; files are stored as shard_image_folder does, by `workers` processes. Raises DataError naming the row at fault.
    """
    src, out = Path(src), Path(out)
    if src.is_dir():
        sources, classes = _saved_images(src, image_column, label_column, out)
    else:
        sources, classes = _listed_images(src, image_column, label_column, Path(root or src.parent), out)
    out.mkdir(parents=True, exist_ok=True)
    write_classes(out / "classes.txt", classes)
    random.Random(seed).shuffle(sources)
    return write_sources(
        sources, out, prefix, samples_per_shard=samples_per_shard, workers=workers, progress=progress
    )  # fmt: skip


def _listed_images(
    src: Path, image_column: str | int, label_column: str | int, root: Path, out: Path
) -> tuple[list[Any], list[str]]:
    paths, labels = [], []
    for number, row in enumerate(table_rows(src, [image_column, label_column]), 1):
        for column in (image_column, label_column):
            if not isinstance(row, dict) or row.get(column) in (None, ""):
                names = ", ".join(map(str, row)) if isinstance(row, dict) else "none, being no object"
                raise DataError(f"{src}, row {number}: no column {column!r}; it has {names}")
        path = root / str(row[image_column])
        if not path.is_file():
            raise DataError(f"{src}, row {number}: there is no image {path}; correct it, or give the folder as root")
        paths.append(path)
        labels.append(str(row[label_column]).strip())
    if not paths:
        raise DataError(f"{src} holds no rows")
    numbers, classes = class_numbers(labels, out / "classes.txt")
    return [ImageFile(path, label) for path, label in zip(paths, numbers, strict=True)], classes


def _saved_images(src: Path, image_column: str, label_column: str, out: Path) -> tuple[list[Any], list[str]]:
    found = open_saved(src)
    for column in (image_column, label_column):
        if column not in found.column_names:
            raise DataError(f"{src}: no column {column!r}; it has {', '.join(found.column_names)}")
    labels, names = list(found[label_column]), getattr(found.features[label_column], "names", None)
    if names is None:
        labels, names = class_numbers([str(label) for label in labels], out / "classes.txt")
    if odd := next((number for number, label in enumerate(labels) if not 0 <= label < len(names)), None):
        raise DataError(f"{src}, row {odd + 1}: the label {labels[odd]} is none of its {len(names)} classes")
    stamp = max(path.stat().st_mtime_ns for path in src.iterdir())
    rows = [_SavedImage(str(src), stamp, row, image_column, label) for row, label in enumerate(labels)]
    return rows, list(names)


@dataclass(frozen=True)
class _SavedImage:
    folder: str
    stamp: int  # of the folder's newest file
    row: int
    column: str
    label: int

    def identity(self) -> str:
        return repr(self)

    def members(self) -> dict[str, bytes]:
        image = _undecoded(self.folder, self.column)[self.row][self.column]
        where = f"{self.folder}, row {self.row + 1}"
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise DataError(f"{where}: the column {self.column!r} holds no image")
        name, data = image_member(image["bytes"] or Path(image["path"]).read_bytes(), where)
        return {name: data, LABEL_MEMBER: str(self.label).encode()}


@lru_cache(maxsize=1)
def _undecoded(folder: str, column: str) -> Any:
    """Open a data set once a process, its images as the bytes that were saved."""
    from datasets import Image

    return open_saved(Path(folder)).cast_column(column, Image(decode=False))
