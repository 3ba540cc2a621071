"""Pack a folder with one sub-folder of images a class, torchvision's ImageFolder layout, into shards."""

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from dsquant.data.shard_writing import write_shards
from dsquant.data.shards import IMAGE_MEMBERS, ShardSet, write_whole
from dsquant.errors import DataError


def shard_image_folder(
    src: str | Path,
    out: str | Path,
    *,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardSet:
    """Write the images of `src/CLASS/*` as shards `out/prefix-*.tar`, and the class names, in label order, classes.txt.

    The order is shuffled by `seed`, since a shard of one class would make batches of one class. JPEG, PNG and WebP
    files are stored as they are, others as PNG. progress is called with (samples done, samples in all). Raises
    DataError for a missing folder, no class folders, no images, a file that is no image, or classes other than those
    of a classes.txt already in `out`.
    """
    try:
        found = ImageFolder(str(src))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{src}: {error}; it must hold one folder of images for each class") from error
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_classes(out / "classes.txt", found.classes)
    files = list(found.samples)
    random.Random(seed).shuffle(files)
    return write_shards(_samples(files, prefix, progress), out, prefix, samples_per_shard)


def write_classes(path: Path, classes: list[str]) -> None:
    """Write class names in label order, one a line. Raises DataError where the file already lists others."""
    text = "".join(f"{name}\n" for name in classes)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{path} lists other classes than the {len(classes)} folders found, so labels would mean different things; "
            f"write to another folder, or remove the old shards and {path.name}"
        )
    write_whole(path, text.encode())


def _samples(
    files: list[tuple[str, int]], prefix: str, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (path, label) in enumerate(files):
        name, content = _image_member(Path(path))
        yield f"{prefix}{number:08d}", {name: content, "cls": str(label).encode()}
        progress(number + 1, len(files))


def _image_member(path: Path) -> tuple[str, bytes]:
    content, suffix = path.read_bytes(), path.suffix.lower().removeprefix(".")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes
        raise DataError(f"{path}: cannot be read as an image ({error}); repair or remove it") from error
    if suffix in IMAGE_MEMBERS:
        return suffix, content
    png = io.BytesIO()
    image.save(png, format="PNG")
    return "png", png.getvalue()
