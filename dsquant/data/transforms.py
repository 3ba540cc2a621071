"""Turn decoded images into normalized tensors, with the augmentations of the field from timm and torchvision."""

from collections.abc import Callable

from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

from dsquant.errors import ConfigError

AUGMENTS = ("none", "shift", "flip_crop", "rrc", "rand_augment")
RAND_AUGMENT = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}  # DeiT's setting


def build_transform(
    *,
    image_size: int,
    channels: int,
    train: bool,
    augment: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_pct: float,
) -> Callable[[Image.Image], Tensor]:
    """Build the function from a PIL image of any mode and size to float32 (channels, image_size, image_size).

    train=False, or augment "none": resize the short side to image_size / crop_pct and crop the centre; an image that
    has the model's size already is taken as it is. "shift": random crop of the image padded by 1/8 of its size.
    "flip_crop": the same and a horizontal flip (CIFAR). "rrc": RandomResizedCrop and flip (ImageNet).
    "rand_augment": rrc, RandAugment m9 and random erasing 0.25 (DeiT). Raises ConfigError for another augment.
    """
    from timm.data import create_transform  # importing timm takes seconds

    if augment not in AUGMENTS:
        raise ConfigError(f"data.augment is {augment!r}; choose one of {', '.join(AUGMENTS)}")
    to_mode = ToMode("L" if channels == 1 else "RGB")
    normalize = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    shared = {"input_size": image_size, "interpolation": interpolation, "mean": tuple(mean), "std": tuple(std)}
    if train and augment in ("rrc", "rand_augment"):
        extra = RAND_AUGMENT if augment == "rand_augment" else {}
        steps = _pillow_safe(create_transform(**shared, is_training=True, color_jitter=None, **extra).transforms)
    elif train and augment in ("shift", "flip_crop"):
        fit = create_transform(**shared, crop_pct=1.0, normalize=False).transforms[:-1]  # all but the tensor conversion
        steps = [UnlessSized(image_size, transforms.Compose(fit))]
        steps += [transforms.RandomCrop(image_size, padding=max(1, image_size // 8))]
        steps += [transforms.RandomHorizontalFlip()] if augment == "flip_crop" else []
        steps += normalize
    else:
        fit = create_transform(**shared, crop_pct=crop_pct, normalize=False).transforms[:-1]
        steps = [UnlessSized(image_size, transforms.Compose(fit)), *normalize]
    return transforms.Compose([to_mode, *steps])


def _pillow_safe(steps: list[Callable]) -> list[Callable]:
    """Keep one bit where timm's posterize asks Pillow for none, at full magnitude: Pillow 13 refuses 0 bits."""
    from timm.data.auto_augment import RandAugment

    for step in steps:
        for op in step.ops if isinstance(step, RandAugment) else ():
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return steps


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))


class ToMode:
    """Convert an image to one PIL mode."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)


class UnlessSized:
    """Apply a transform to the images that are not `size` x `size` pixels already."""

    def __init__(self, size: int, transform: Callable[[Image.Image], Image.Image]):
        self.size, self.transform = size, transform

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.size == (self.size, self.size) else self.transform(image)
