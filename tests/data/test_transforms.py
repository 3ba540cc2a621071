import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from torchvision.transforms import functional as F

from dsquant.data import build_transform
from dsquant.data.transforms import AUGMENTS
from dsquant.errors import ConfigError


def transform(**options):
    channels = options.get("channels", 3)
    defaults = {"image_size": 32, "channels": 3, "train": False, "augment": "none", "mean": (0.4,) * channels,
                "std": (0.2,) * channels, "interpolation": "bicubic", "crop_pct": 0.875}  # fmt: skip
    return build_transform(**defaults | options)


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def normalized(image):
    return (F.to_tensor(image) - 0.4) / 0.2


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "CMYK"])
def test_every_augmentation_takes_every_kind_of_image(augment, channels, mode):
    build = transform(augment=augment, channels=channels, train=True)
    for size in ((32, 32), (57, 41), (20, 33)):
        for seed in range(4):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            image = build(picture(*size, mode))
            assert image.shape == (channels, 32, 32)
            assert image.dtype == torch.float32
            assert torch.isfinite(image).all()


def test_evaluation_takes_an_image_of_the_model_size_as_it_is():
    assert torch.allclose(transform()(picture(32, 32)), normalized(picture(32, 32)), atol=1e-6)


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = picture(90, 60)
    resized = F.resize(image, [36], F.InterpolationMode.BICUBIC)
    expected = normalized(F.center_crop(resized, [32, 32]))
    assert torch.allclose(transform()(image), expected, atol=1e-6)
    assert torch.allclose(transform(train=True)(image), expected, atol=1e-6)
    assert torch.allclose(transform(augment="rrc")(image), expected, atol=1e-6)


@pytest.mark.parametrize(("augment", "flips"), [("shift", False), ("flip_crop", True)])
def test_crops_shift_by_at_most_an_eighth_and_flip_only_where_asked(augment, flips):
    image = picture(32, 32)
    padded = F.pad(image, [4])
    crops = {}
    for flip in (False, True):
        for top in range(9):
            for left in range(9):
                crop = F.crop(padded, top, left, 32, 32)
                crops[normalized(F.hflip(crop) if flip else crop).numpy().tobytes()] = (flip, top, left)
    build, found = transform(augment=augment, train=True), set()
    by_tensor = {np.round(np.frombuffer(key, np.float32), 3).tobytes(): place for key, place in crops.items()}
    for seed in range(300):
        torch.manual_seed(seed)
        found.add(by_tensor[np.round(build(image).numpy().ravel(), 3).tobytes()])
    assert {flip for flip, _, _ in found} == ({False, True} if flips else {False})
    assert {top for _, top, _ in found} == {left for _, _, left in found} == set(range(9))


def test_rand_augment_erases_and_rrc_does_not():
    flat = Image.new("RGB", (32, 32), (102, 102, 102))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    rrc, rand = transform(augment="rrc", train=True), transform(augment="rand_augment", train=True)
    assert all(rrc(flat).unique().numel() == 1 for _ in range(20))
    assert any(rand(flat).unique().numel() > 50 for _ in range(20))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 20])
def test_every_operation_of_rand_augment_works_at_either_end_of_its_range(channels, magnitude):
    build = transform(augment="rand_augment", train=True, channels=channels)
    (rand_augment,) = (step for step in build.transforms if isinstance(step, RandAugment))
    for op in rand_augment.ops:
        op.prob, op.magnitude = 1.0, magnitude
        assert op(picture(32, 32, "L" if channels == 1 else "RGB")).size == (32, 32)


def test_grey_images_stay_grey_and_keep_their_values():
    image = picture(32, 32, "L")
    assert torch.allclose(transform(channels=1)(image), normalized(image), atol=1e-6)
    assert torch.allclose(transform(channels=3)(image), normalized(image).expand(3, -1, -1), atol=1e-6)


def test_transforms_travel_to_worker_processes():
    for augment in AUGMENTS:
        build = transform(augment=augment, train=True)
        results = []
        for function in (build, pickle.loads(pickle.dumps(build))):
            random.seed(5), np.random.seed(5), torch.manual_seed(5)
            results.append(function(picture(40, 40)))
        assert torch.equal(*results)


def test_an_unknown_augmentation_names_the_choices():
    with pytest.raises(ConfigError, match=r"data.augment is 'mixup'; choose one of none, shift, flip_crop"):
        transform(augment="mixup", train=True)
