"""Make and check WebDataset shards: python tools/make_shards.py image_folder|text|index|check --help"""

import sys

import fire
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsquant.data import ShardSet, shard_image_folder, shard_text_table, verify, write_index
from dsquant.errors import DsquantError


def bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def image_folder(src: str, out: str, prefix: str = "train", samples_per_shard: int = 1000, seed: int = 0) -> None:
    """Pack SRC/CLASS/*.jpg into OUT/PREFIX-0000.tar, ..., with index.json and classes.txt."""
    with bar() as progress:
        task = progress.add_task("writing", total=None)
        shards = shard_image_folder(
            src,
            out,
            prefix=prefix,
            samples_per_shard=samples_per_shard,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(f"{shards.total} samples in {len(shards)} shards under {out}")


def text(
    src: str,
    out: str,
    text_column: str | int = "sentence",
    label_column: str | int = "label",
    text_pair_column: str | int | None = None,
    regression: bool = False,
    prefix: str = "train",
    samples_per_shard: int = 10000,
    seed: int = 0,
) -> None:
    """Pack the rows of SRC (.tsv, .csv, .jsonl, or a saved Hugging Face data set) into OUT/PREFIX-0000.tar, ...

    Args:
        src: the table, or the folder of one split that `datasets` has saved.
        out: where shards, index.json and classes.txt go.
        text_column: name of the column, or its number from 0 in a file without a line of names.
        label_column: the same for the label.
        text_pair_column: the same for the second of two sentences.
        regression: labels are numbers to regress on, not classes.
        prefix: train, val and so on.
        samples_per_shard: rows in a shard.
        seed: of the order of the rows.
    """
    columns = {"text_column": text_column, "label_column": label_column, "text_pair_column": text_pair_column}
    with bar() as progress:
        task = progress.add_task("writing", total=None)
        shards = shard_text_table(
            src,
            out,
            **columns,
            regression=regression,
            prefix=prefix,
            samples_per_shard=samples_per_shard,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(f"{shards.total} samples in {len(shards)} shards under {out}")


def index(shards: str) -> None:
    """Count the samples of local shards and write index.json beside them; remote copies of the shards need it."""
    found = write_index(shards)
    print(f"{found.total} samples in {len(found)} shards indexed")


def check(shards: str) -> None:
    """Decode every sample of SHARDS (a folder, glob or brace pattern) and print how many there are of each label."""
    found = ShardSet.open(shards)
    with bar() as progress:
        task = progress.add_task("checking", total=found.total)
        labels = verify(found, lambda samples: progress.advance(task, samples))
    print(f"{found.total} samples in {len(found)} shards, {len(labels)} labels, all readable")
    for label, count in labels.items():
        print(f"label {label}: {count}")


def main(command: list[str] | None = None) -> int:
    """Run one command; give the exit status."""
    try:
        fire.Fire({"image_folder": image_folder, "text": text, "index": index, "check": check}, command=command)
    except DsquantError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
