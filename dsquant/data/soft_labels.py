"""Soft labels: one more member of a sample, with crops of its image and what a teacher says of each.

`soft.safetensors` holds for K crops and k classes of each:
    crops          (K, 4) float16 or float32   (i/H, j/W, h/H, w/W): top, left, height, width as shares of the image
    flips          (K,)   uint8                1 where the crop is mirrored after it is cut
    indices        (K, k) int16, or int32 where the teacher has more than 32768 classes
    probabilities  (K, k) float16 or float32   the k largest, in falling order
`soft_labels.json` beside the shards says how all of them were made. Crops are RandomResizedCrop's, a function of (seed,
sample key, size of the image). Source: FKD (Shen and Xing 2022); "Quantization Variation" (TMLR 2024), multi-crop
distillation.
"""

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from dsquant.config import SOFT_LABELS, RunConfig
from dsquant.data.reading import Record, decode
from dsquant.data.remote import open_url
from dsquant.data.shards import ShardSet, beside
from dsquant.data.stream import Row
from dsquant.data.transforms import ToMode
from dsquant.errors import ConfigError, DataError

MEMBER = "soft.safetensors"
SETTINGS = "soft_labels.json"
MAKE = "make it with tools/make_soft_labels.py"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
FORMAT = {"format": "dsquant-soft-labels", "version": 1}


@dataclass(frozen=True)
class SoftLabelSettings:
    """Say how soft labels are made; two sets are the same labels where all of this is the same.

    crops: K of each image. top_k: classes stored of each crop. scale, ratio: RandomResizedCrop's area and aspect ratio.
    temperature: T of softmax(logits / T). num_classes: the teacher's. view: how the teacher sees a crop (image_size, channels,
    mean, std, interpolation, precision). teacher: which model it is, with a digest of its weights.
    Raises ConfigError naming the value that cannot be.
    """

    num_classes: int
    teacher: dict[str, Any]
    view: dict[str, Any]
    crops: int = 500
    top_k: int = 5
    dtype: str = "float16"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for key in ("scale", "ratio"):
            pair = getattr(self, key)
            if not (isinstance(pair, list | tuple) and len(pair) == 2):
                raise ConfigError(f"{key} is {pair!r}; give two numbers, such as --{key}=0.08,1.0")
            object.__setattr__(self, key, tuple(map(float, pair)))
        whole = {"crops": self.crops, "top_k": self.top_k, "seed": self.seed}
        if odd := next((key for key, value in whole.items() if type(value) is not int), None):
            raise ConfigError(f"{odd} is {whole[odd]!r}, not a whole number")
        if type(self.temperature) not in (int, float):
            raise ConfigError(f"temperature is {self.temperature!r}, not a number")
        faults = {
            f"crops is {self.crops}; it must be at least 1": self.crops < 1,
            f"top_k is {self.top_k}; the teacher has {self.num_classes} classes, give 1 to {self.num_classes}": not (
                1 <= self.top_k <= self.num_classes
            ),
            f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}": self.dtype not in DTYPES,
            f"scale is {self.scale}; it needs 0 < low <= high <= 1": not 0 < self.scale[0] <= self.scale[1] <= 1,
            f"ratio is {self.ratio}; it needs 0 < low <= high": not 0 < self.ratio[0] <= self.ratio[1],
            f"temperature is {self.temperature}; it must be above 0": not self.temperature > 0,
        }
        if fault := next((message for message, found in faults.items() if found), None):
            raise ConfigError(fault)

    def to_json(self) -> bytes:
        return json.dumps(FORMAT | asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> "SoftLabelSettings":
        """Read what `to_json` wrote. Raises DataError naming the file."""
        try:
            tree = json.loads(content)
            if any(tree[key] != value for key, value in FORMAT.items()):
                raise ValueError(f"not {FORMAT['format']} of version {FORMAT['version']}")
            return cls(**{field.name: tree[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise DataError(f"{where}: no usable settings of soft labels ({type(error).__name__}: {error})") from error

    def check_same(self, other: "SoftLabelSettings", where: Path) -> None:
        """Raise ConfigError naming the first setting in which soft labels already in a folder differ from these."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        if odd := next((key for key, value in mine.items() if value != theirs[key]), None):
            raise ConfigError(
                f"{where}: its soft labels were made with {odd} {theirs[odd]!r}, not {mine[odd]!r}; one folder holds one kind: "
                "give the same options, or another --out"
            )

    @property
    def bytes_per_image(self) -> int:
        """Give the size of an encoded member, the same for every image."""
        shape = (self.crops, self.top_k)
        blank = SoftLabels(torch.zeros(self.crops, 4), torch.zeros(self.crops), torch.zeros(shape), torch.zeros(shape))
        return len(blank.encode(self))


@dataclass(frozen=True)
class SoftLabels:
    """Hold the soft labels of one image; shapes and dtypes are those of the module's docstring."""

    crops: Tensor
    flips: Tensor
    indices: Tensor
    probabilities: Tensor

    def encode(self, settings: SoftLabelSettings) -> bytes:
        """Give the bytes of the member, in the dtypes of `settings`."""
        real = DTYPES[settings.dtype]
        dtypes = {
            "crops": real,
            "flips": torch.uint8,
            "indices": torch.int16 if settings.num_classes <= 1 << 15 else torch.int32,
            "probabilities": real,
        }
        return save({name: getattr(self, name).to(dtype).contiguous() for name, dtype in dtypes.items()})

    @classmethod
    def of(cls, record: Record, settings: SoftLabelSettings) -> "SoftLabels":
        """Read those of a record. Raises DataError naming shard and key where they are absent, damaged or of other settings."""
        where = f"shard {record['__url__']}, sample {record['__key__']}"
        if MEMBER not in record:
            raise DataError(f"{where}: no {MEMBER} member; {MAKE}")
        try:
            found = cls(**load(bytes(record[MEMBER])))
        except (SafetensorError, TypeError, ValueError) as error:
            raise DataError(f"{where}: cannot read {MEMBER} ({type(error).__name__}: {error}); {MAKE} again") from error
        crops, top = settings.crops, (settings.crops, settings.top_k)
        expected = {"crops": (crops, 4), "flips": (crops,), "indices": top, "probabilities": top}
        for name, shape in expected.items():
            if tuple(getattr(found, name).shape) != shape:
                shown = f"{name} of shape {tuple(getattr(found, name).shape)}"
                raise DataError(f"{where}: {MEMBER} holds {shown}, but {SETTINGS} says {shape}; {MAKE} again")
        if not 0 <= int(found.indices.min()) <= int(found.indices.max()) < settings.num_classes:
            raise DataError(f"{where}: {MEMBER} names a class that is not one of {settings.num_classes}; {MAKE} again")
        return found


def draw_crops(settings: SoftLabelSettings, key: str, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Draw the crops (K, 4), in the dtype they are stored in, and flips (K,) uint8 of an image.

    A function of (seed, key, size) alone, by torchvision's rule; half of the crops are flipped. No generator is moved.
    """
    blank = torch.empty((1, height, width), device="meta")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random.Random(f"{settings.seed}/{key}").getrandbits(63))
        boxes = [RandomResizedCrop.get_params(blank, settings.scale, settings.ratio) for _ in range(settings.crops)]
        flips = torch.rand(settings.crops) < 0.5
    shares = torch.tensor(boxes, dtype=torch.float64) / torch.tensor([height, width, height, width])
    return shares.to(DTYPES[settings.dtype]), flips.to(torch.uint8)


def cut(
    image: Image.Image, crop: Sequence[float], flip: bool, image_size: int, interpolation: str = "bilinear"
) -> Image.Image:
    """Cut a stored crop out of an image, resize it to `image_size` squared, and mirror it where `flip` says.

    Teacher and student cut through here, and see the same pixels: shares become pixels by rounding, within the image.
    """
    width, height = image.size
    top, left = (min(round(share * side), side - 1) for share, side in zip(crop[:2], (height, width), strict=True))
    h, w = (
        min(max(round(share * side), 1), side - first)
        for share, side, first in zip(crop[2:], (height, width), (top, left), strict=True)
    )
    size, mode = [image_size, image_size], InterpolationMode(interpolation)
    cropped = functional.resized_crop(image, top, left, h, w, size, mode)
    return functional.hflip(cropped) if flip else cropped


class StoredCrops:
    """Make the rows of a record for TrainStream: m of its stored crops, each with its soft label.

    A row is (image float32 (C, S, S), label, indices int64 (k,), probabilities float32 (k,)). The m crops are drawn without
    replacement from torch's generator, which the stream seeds by (seed, epoch, key); the image is decoded once, its crops
    are resized bilinearly and normalized, and nothing else is done to them.
    Raises ConfigError where m is more than the crops that are stored.
    """

    def __init__(
        self, settings: SoftLabelSettings, *, crops_per_image: int, image_size: int, channels: int,
        mean: tuple[float, ...], std: tuple[float, ...],
    ):  # fmt: skip
        if crops_per_image > settings.crops:
            raise ConfigError(
                f"data.soft_labels.crops_per_image is {crops_per_image}, but the shards hold {settings.crops} crops an image"
            )
        self.settings, self.crops_per_image, self.image_size = settings, crops_per_image, image_size
        self.to_mode, self.mean, self.std = ToMode("L" if channels == 1 else "RGB"), list(mean), list(std)

    @classmethod
    def of_recipe(cls, config: RunConfig, shards: ShardSet) -> "StoredCrops | None":
        """Make the one of a recipe and its training shards, or None where `data.soft_labels` is not set.

        Raises ConfigError where the labels are of other classes, of fewer crops or of another temperature than the recipe's.
        """
        data = config.data
        if data.soft_labels is None:
            return None
        settings, stored = read_settings(shards), f"the soft labels of {data.train}"
        if settings.num_classes != config.model.num_classes:
            classes = config.model.num_classes
            raise ConfigError(f"model.num_classes is {classes}, but {stored} are of {settings.num_classes} classes")
        for name, stage in config.stages.items():
            distill = stage.distill
            if distill and distill.teacher == SOFT_LABELS and distill.temperature != settings.temperature:
                key = f"stages.{name}.distill.temperature"
                raise ConfigError(f"{key} is {distill.temperature}, but {stored} were made at {settings.temperature}")
        look = {"image_size": data.image_size, "channels": data.channels, "mean": data.mean, "std": data.std}
        return cls(settings, crops_per_image=data.soft_labels.crops_per_image, **look)

    def __call__(self, record: Record) -> list[Row]:
        soft = SoftLabels.of(record, self.settings)
        picked = torch.randperm(self.settings.crops)[: self.crops_per_image]
        crops, flips = soft.crops[picked].tolist(), soft.flips[picked].tolist()
        images, label = decode(record, lambda image: self._cut(self.to_mode(image), crops, flips))
        indices, probabilities = soft.indices[picked].long(), soft.probabilities[picked].float()
        return [(image, label, *target) for image, *target in zip(images, indices, probabilities, strict=True)]

    def _cut(self, image: Image.Image, crops: list[list[float]], flips: list[int]) -> list[Tensor]:
        return [
            functional.normalize(functional.to_tensor(cut(image, crop, flip, self.image_size)), self.mean, self.std)
            for crop, flip in zip(crops, flips, strict=True)
        ]


def read_settings(shards: ShardSet) -> SoftLabelSettings:
    """Read the settings that lie beside the shards. Raises DataError where there are none, ConfigError for two kinds."""
    found: SoftLabelSettings | None = None
    for address in dict.fromkeys(beside(url, SETTINGS) for url in shards.urls):
        content = b""
        with suppress(OSError):  # an address without settings is named below
            stream = open_url(address)
            try:
                content = stream.read()
            finally:
                stream.close()
        if not content:
            raise DataError(
                f"no {SETTINGS} at {address}: these shards hold no soft labels; {MAKE}, and copy it with them"
            )
        settings = SoftLabelSettings.from_json(content, address)
        if found:
            settings.check_same(found, Path(address))
        found = settings
    return found
