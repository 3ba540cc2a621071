"""Pack a folder with one sub-folder of images a class, torchvision's ImageFolder layout, into shards."""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from dsquant.data.shard_jobs import write_sources
from dsquant.data.shards import IMAGE_MEMBERS, LABEL_MEMBER, ShardSet
from dsquant.errors import DataError
from dsquant.files import write_atomically


def shard_image_folder(
    src: str | Path,
    out: str | Path,
    *,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardSet:
    """Write the images of `src/CLASS/*` as shards `out/prefix-*.tar`, and the class names, in label order, classes.txt.

    The order is shuffled by `seed`, since a shard of one class would make batches of one class. JPEG, PNG and WebP
    files are stored as they are, others as PNG, by `workers` processes. A call that was killed goes on with the shards that
    it had finished. progress is called with (samples done, samples in all). Raises DataError for a missing folder, no class
    folders, no images, a file that is no image, or classes other than those of a classes.txt already in `out`.
    """
    try:
        found = ImageFolder(str(src))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{src}: {error}; it must hold one folder of images for each class") from error
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_classes(out / "classes.txt", found.classes)
    files = [ImageFile(Path(path), label) for path, label in found.samples]
    random.Random(seed).shuffle(files)
    return write_sources(files, out, prefix, samples_per_shard=samples_per_shard, workers=workers, progress=progress)


def write_classes(path: Path, classes: list[str]) -> None:
    """Write class names in label order, one a line. Raises DataError where the file already lists others."""
    text = "".join(f"{name}\n" for name in classes)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{path} lists other classes than the {len(classes)} folders found, so labels would mean different things; "
            f"write to another folder, or remove the old shards and {path.name}"
        )
    write_atomically(path, text.encode())


@dataclass(frozen=True)
class ImageFile:
    """Stand for an image file with its label, to be packed."""

    path: Path
    label: int

    def identity(self) -> str:
        """Name path, label, size and time of change."""
        status = self.path.stat()
        return f"{self.path} {self.label} {status.st_size} {status.st_mtime_ns}"

    def members(self) -> dict[str, bytes]:
        """Read the file. Raises DataError where it is no image."""
        suffix = self.path.suffix.lower().removeprefix(".")
        name, content = image_member(self.path.read_bytes(), str(self.path), suffix)
        return {name: content, LABEL_MEMBER: str(self.label).encode()}


def image_member(content: bytes, where: str, suffix: str | None = None) -> tuple[str, bytes]:
    """Give the member of an image and its bytes: JPEG, PNG and WebP, by suffix or format, as they are, others as PNG.

    Raises DataError naming `where` it lies, if it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes
        raise DataError(f"{where}: cannot be read as an image ({error}); repair or remove it") from error
    name = image.format.lower() if suffix is None else suffix
    if name in IMAGE_MEMBERS:
        return name, content
    png = io.BytesIO()
    image.save(png, format="PNG")
    return "png", png.getvalue()
