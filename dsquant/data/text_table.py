"""Pack a table of sentences (TSV, CSV, JSONL, or a folder that `datasets` has saved) into shards."""

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.data.image_folder import write_classes
from dsquant.data.shard_jobs import write_sources
from dsquant.data.shards import LABEL_MEMBER, SCORE_MEMBER, TEXT_MEMBER, ShardSet
from dsquant.errors import DataError

Row = dict[str, Any]


def shard_text_table(
    src: str | Path,
    out: str | Path,
    *,
    text_column: str | int,
    label_column: str | int,
    text_pair_column: str | int | None = None,
    regression: bool = False,
    prefix: str = "train",
    samples_per_shard: int = 10000,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardSet:
    """Write the rows of a table as shards `out/prefix-*.tar`, index.json and, without `regression`, classes.txt.

    src: a .tsv or .csv whose columns are named by its first line, or numbered from 0 where every column given is a number
    (then there is no such line); a .jsonl of objects; or the folder of one split of a Hugging Face data set (`save_to_disk`).
    Labels that are all whole numbers from 0 are taken as they are; others are classes, numbered in sorted order. With
    `regression` a label is a number and becomes the member `score`. Rows are shuffled by `seed` and written by `workers`
    processes; a call that was killed goes on with the shards that it had finished. Raises DataError naming the row at fault,
    for an absent column, and for classes other than those of a classes.txt already in `out`.
    """
    columns = [text_column, label_column] + ([] if text_pair_column is None else [text_pair_column])
    rows = list(table_rows(Path(src), columns))
    if not rows:
        raise DataError(f"{src} holds no rows")
    samples = [_sample(row, columns, f"{src}, row {number}") for number, row in enumerate(rows, 1)]
    out = Path(out)
    if regression:
        labels = [_score(label, f"{src}, row {number}") for number, (_, label) in enumerate(samples, 1)]
        member = SCORE_MEMBER
    else:
        labels, classes = class_numbers([label for _, label in samples], out / "classes.txt")
        out.mkdir(parents=True, exist_ok=True)
        write_classes(out / "classes.txt", classes)
        member = LABEL_MEMBER
    texts = [
        TextRow(json.dumps(sample, ensure_ascii=False), member, str(label))
        for (sample, _), label in zip(samples, labels, strict=True)
    ]
    random.Random(seed).shuffle(texts)
    return write_sources(texts, out, prefix, samples_per_shard=samples_per_shard, workers=workers, progress=progress)


@dataclass(frozen=True)
class TextRow:
    """Stand for a row to be packed: its JSON, and its label under the name of its member."""

    content: str
    label_member: str
    label: str

    def identity(self) -> str:
        """Give all of the row."""
        return repr(self)

    def members(self) -> dict[str, bytes]:
        """Encode the row."""
        return {TEXT_MEMBER: self.content.encode(), self.label_member: self.label.encode()}


def table_rows(src: Path, columns: list[str | int]) -> Iterator[Row]:
    """Yield the rows of a .tsv, .csv or .jsonl, or of a saved data set, by column; see shard_text_table."""
    if src.is_dir():
        yield from open_saved(src)
        return
    if not src.is_file():
        raise DataError(f"{src} does not exist; give a .tsv, .csv or .jsonl file, or a saved data set's folder")
    try:
        with open(src, newline="", encoding="utf-8") as file:
            if src.suffix in (".jsonl", ".json"):
                yield from (json.loads(line) for line in file if line.strip())
                return
            # a TSV of GLUE has quotes that open and never close
            quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if src.suffix == ".tsv" else {}
            if all(isinstance(column, int) for column in columns):
                yield from (dict(enumerate(row)) for row in csv.reader(file, **quoting) if row)
            else:
                yield from csv.DictReader(file, **quoting)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{src} cannot be read as a table: {error}") from None


def open_saved(src: Path) -> Any:
    """Open one split of a data set that `datasets` has saved. Raises DataError without `datasets`, or where it is none."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise DataError(f"{src} is a folder; reading a saved data set needs: pip install datasets") from error
    try:
        found = load_from_disk(str(src))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{src} holds no data set that `save_to_disk` has written: {error}") from None
    if isinstance(found, DatasetDict):
        raise DataError(f"{src} holds the splits {', '.join(found)}; name one: {src}/{next(iter(found))}")
    return found


def _sample(row: Row, columns: list[str | int], where: str) -> tuple[dict[str, str], str]:
    for column in columns:
        if not isinstance(row, dict) or row.get(column) is None:
            names = ", ".join(map(str, row)) if isinstance(row, dict) else "none, being no object"
            raise DataError(f"{where}: no column {column!r}; it has {names}")
    texts = dict(zip(("text", "text_pair"), [columns[0], *columns[2:]], strict=False))
    sample = {name: str(row[column]) for name, column in texts.items()}
    if not sample["text"].strip():
        raise DataError(f"{where}: its text is empty; remove the row")
    return sample, str(row[columns[1]]).strip()


def _score(label: str, where: str) -> float:
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: the label {label!r} is no number to regress on")
    return score


def class_numbers(labels: list[str], known: Path) -> tuple[list[int], list[str]]:
    """Return class numbers and names; a classes.txt of an earlier split decides which names there are."""
    if known.exists():
        names = known.read_text(encoding="utf-8").splitlines()
        if stray := sorted(set(labels) - set(names)):
            raise DataError(f"label {stray[0]!r} is none of the classes in {known}: {', '.join(names[:20])}")
    elif all(label.isascii() and label.isdigit() for label in labels):
        names = [str(number) for number in range(max(map(int, labels)) + 1)]
        labels = [str(int(label)) for label in labels]
    else:
        names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[label] for label in labels], names
