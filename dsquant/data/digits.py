"""Write scikit-learn's bundled handwritten digits as shards: a real data set that needs no download."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dsquant.data.shard_writing import write_shards
from dsquant.data.shards import INDEX, ShardSet
from dsquant.errors import DataError

VAL_SAMPLES = 360  # of 1797
SHARDS = {"train": 4, "val": 2}


def make_digits(folder: str | Path) -> tuple[ShardSet, ShardSet]:
    """Write `folder/train` (4 shards, 1437 samples) and `folder/val` (2 shards, 360), or find them written.

    Images are 8x8 grey PNGs, 0..16 scaled to 0..255 so that the integers can be had back; the split is fixed and
    stratified. Only one process may write; the others call this once it has. Raises DataError without scikit-learn.
    """
    folder = Path(folder)
    if not all((folder / split / INDEX).exists() for split in SHARDS):
        for split, (images, labels) in _splits().items():
            per_shard = -(-len(labels) // SHARDS[split])
            write_shards(_samples(split, images, labels), folder / split, split, per_shard)
    return ShardSet.open(folder / "train"), ShardSet.open(folder / "val")


def _splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the handwritten digits come with scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    train, val, train_labels, val_labels = train_test_split(
        digits.images, digits.target, test_size=VAL_SAMPLES, stratify=digits.target, random_state=0
    )
    return {"train": (train, train_labels), "val": (val, val_labels)}


def _samples(split: str, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        pixels = np.rint(image * (255 / 16)).astype(np.uint8)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, format="PNG")
        yield f"{split}{number:06d}", {"png": png.getvalue(), "cls": str(label).encode()}
