"""Make and check WebDataset shards: python tools/make_shards.py image_folder|image_table|text|index|check --help"""

import sys
from collections.abc import Callable

import fire
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsquant.data import ShardSet, check_shards, shard_image_folder, shard_image_table, shard_text_table, write_index
from dsquant.errors import DataError, DsquantError


def with_bar(doing: str, function: Callable, *arguments, **options):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(doing, total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        return function(*arguments, **options, progress=show)
    finally:
        if bar.live.is_started:
            bar.stop()


def written(shards: ShardSet, out: str) -> None:
    print(f"{shards.total} samples in {len(shards)} shards under {out}")


def image_folder(
    src: str, out: str, prefix: str = "train", samples_per_shard: int = 1000, seed: int = 0, workers: int = 1
) -> None:
    """Pack SRC/CLASS/*.jpg into OUT/PREFIX-0000.tar, ..., with index.json and classes.txt, by so many processes.

    Started again after it was killed, this goes on with the shards that are whole; so do image_table and text.
    """
    options = {"prefix": prefix, "samples_per_shard": samples_per_shard, "seed": seed, "workers": workers}
    written(with_bar("writing", shard_image_folder, src, out, **options), out)


def image_table(
    src: str, out: str, image_column: str | int = "image", label_column: str | int = "label", root: str | None = None,
    prefix: str = "train", samples_per_shard: int = 1000, seed: int = 0, workers: int = 1,
) -> None:  # fmt: skip
    """Pack the images that SRC lists (.tsv, .csv, .jsonl, or a saved Hugging Face data set) into OUT/PREFIX-0000.tar, ...

    Args:
        src: the table, or the folder of one split that `datasets` has saved.
        out: where shards, index.json and classes.txt go.
        image_column: name of the column of paths (of images in a data set), or its number from 0 in a file without names.
        label_column: the same for the label.
        root: folder that paths are relative to (default: that of the table).
        prefix: train, val and so on.
        samples_per_shard: images in a shard.
        seed: of the order of the rows.
        workers: processes that write.
    """
    options = {"image_column": image_column, "label_column": label_column, "root": root, "prefix": prefix}
    options |= {"samples_per_shard": samples_per_shard, "seed": seed, "workers": workers}
    written(with_bar("writing", shard_image_table, src, out, **options), out)


def text(
    src: str, out: str, text_column: str | int = "sentence", label_column: str | int = "label",
    text_pair_column: str | int | None = None, regression: bool = False, prefix: str = "train",
    samples_per_shard: int = 10000, seed: int = 0, workers: int = 1,
) -> None:  # fmt: skip
    """Pack the rows of SRC (.tsv, .csv, .jsonl, or a saved Hugging Face data set) into OUT/PREFIX-0000.tar, ...

    Args:
        src, out, label_column, prefix, samples_per_shard, seed, workers: as of image_table.
        text_column: name of the column, or its number from 0 in a file without a line of names.
        text_pair_column: the same for the second of two sentences.
        regression: labels are numbers to regress on, not classes.
    """
    options = {"text_column": text_column, "label_column": label_column, "text_pair_column": text_pair_column}
    options |= {"regression": regression, "prefix": prefix, "seed": seed, "workers": workers}
    written(with_bar("writing", shard_text_table, src, out, samples_per_shard=samples_per_shard, **options), out)


def index(shards: str) -> None:
    """Count the samples of local shards and write index.json beside them; remote copies of the shards need it."""
    found = write_index(shards)
    print(f"{found.total} samples in {len(found)} shards indexed")


def check(shards: str, workers: int = 1) -> None:
    """Hold SHARDS (a folder, glob or brace pattern) against their index, decode every sample, and count each label.

    Everything that is damaged is named, a line each, and the exit status is 1.
    """
    found = with_bar("checking", check_shards, shards, workers=workers)
    if found.damage:
        raise DataError("\n".join([*found.damage, f"{len(found.damage)} damages in {found.shards} shards"]))
    total = sum(found.labels.values())
    print(f"{total} samples in {found.shards} shards, {len(found.labels)} labels, all readable")
    for label, count in found.labels.items():
        print(f"label {label}: {count}")


def main(command: list[str] | None = None) -> int:
    """Run one command; give the exit status."""
    commands = {"image_folder": image_folder, "image_table": image_table, "text": text, "index": index, "check": check}
    try:
        fire.Fire(commands, command=command)
    except DsquantError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
