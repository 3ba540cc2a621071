"""Soft labels in shards: what is stored comes back, and the stream serves stored crops as it serves samples."""

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, functional

from dsquant.config import parse_config
from dsquant.data import ShardSet, StoredCrops, TrainStream, read_settings, write_shards
from dsquant.data.soft_labels import MEMBER, SETTINGS, SoftLabels, SoftLabelSettings, cut, draw_crops
from dsquant.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
VIEW = {"image_size": 8, "channels": 1, "mean": [0.5], "std": [0.5], "interpolation": "bilinear", "precision": "fp32"}
LOOK = {"image_size": 6, "channels": 1, "mean": (0.5,), "std": (0.25,)}
CLASSES = 50


def settings_of(**options):
    return SoftLabelSettings(**{"num_classes": CLASSES, "teacher": {"model": "t"}, "view": VIEW, "crops": 7} | options)


def random_labels(settings, number=0):
    generator = torch.Generator().manual_seed(number)
    shape = (settings.crops, settings.num_classes)
    probabilities, indices = torch.randn(shape, generator=generator).softmax(-1).topk(settings.top_k)
    crops, flips = draw_crops(settings, f"sample{number:04d}", 8, 8)
    return SoftLabels(crops, flips, indices, probabilities)


def record_of(content, image=None):
    png = io.BytesIO()
    (image or Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))).save(png, format="PNG")
    members = {"png": png.getvalue(), "cls": b"3"} | ({MEMBER: content} if content is not None else {})
    return {"__url__": "s.tar", "__key__": "sample0000", **members}


@pytest.fixture
def soft_set(tmp_path, samples):
    """Return `make(count, **settings)`: shards of numbered samples with random soft labels, and the settings."""

    def make(count=45, per_shard=7, **options):
        settings, folder = settings_of(**options), tmp_path / "soft"
        labelled = ((key, members | {MEMBER: random_labels(settings, number).encode(settings)})
                    for number, (key, members) in enumerate(samples(count)))  # fmt: skip
        shards = write_shards(labelled, folder, "train", per_shard)
        (folder / SETTINGS).write_bytes(settings.to_json())
        return shards, settings

    return make


def soft_stream(shards, settings, m=3, **options):
    rows = StoredCrops(settings, crops_per_image=m, **LOOK)
    options = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 3, "shuffle_buffer": 10} | options
    return TrainStream(shards, decode_rows=rows, **options)


def assert_same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for batch, other in zip(left, right, strict=True):
        assert len(batch) == len(other) == 4
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("float32", 0)])
@pytest.mark.parametrize("classes", [50, 40_000])
def test_what_is_stored_comes_back(dtype, tolerance, classes):
    settings = settings_of(dtype=dtype, num_classes=classes)
    stored = random_labels(settings)
    content = stored.encode(settings)
    found = SoftLabels.of(record_of(content), settings)
    assert torch.equal(found.indices.long(), stored.indices)
    assert torch.equal(found.flips, stored.flips)
    assert torch.equal(found.crops, stored.crops)  # drawn in the dtype they are stored in
    torch.testing.assert_close(found.probabilities.float(), stored.probabilities, rtol=tolerance, atol=0)
    assert found.indices.dtype == (torch.int16 if classes == 50 else torch.int32)
    assert found.probabilities.dtype == found.crops.dtype == getattr(torch, dtype)
    assert len(content) == settings.bytes_per_image


def test_500_crops_of_float16_take_under_15_kilobytes():
    size = settings_of(crops=500, num_classes=1000).bytes_per_image
    payload = 500 * (4 * 2 + 1 + 5 * 2 + 5 * 2)
    assert payload < size < payload + 512


def test_settings_come_back_as_they_were_and_name_the_first_that_differs(tmp_path):
    settings = settings_of(scale=(0.1, 0.9), temperature=2)
    assert SoftLabelSettings.from_json(settings.to_json(), "x") == settings
    settings.check_same(SoftLabelSettings.from_json(settings.to_json(), "x"), tmp_path)
    for key, value in {"crops": 8, "seed": 1, "dtype": "float32", "teacher": {"model": "u"}}.items():
        with pytest.raises(ConfigError, match=rf"{tmp_path}: its soft labels were made with {key} "):
            settings_of(scale=(0.1, 0.9), temperature=2, **{key: value}).check_same(settings, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 51}, "top_k is 51; the teacher has 50 classes"),
        ({"top_k": 0}, "top_k is 0"),
        ({"crops": 0}, "crops is 0"),
        ({"crops": "many"}, "crops is 'many'"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of float16, float32"),
        ({"scale": (0.5, 0.1)}, "scale is"),
        ({"scale": 0.5}, "scale is 0.5; give two numbers"),
        ({"ratio": (0, 1)}, "ratio is"),
        ({"temperature": 0}, "temperature is 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(options, words):
    with pytest.raises(ConfigError) as raised:
        settings_of(**options)
    assert words in str(raised.value)


def test_crops_depend_on_seed_key_and_size_alone_and_move_no_generator():
    settings = settings_of(crops=20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_crops(settings, "a", 40, 30)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = draw_crops(settings, "a", 40, 30)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [
        draw_crops(settings, "b", 40, 30),
        draw_crops(settings, "a", 41, 30),
        draw_crops(settings_of(crops=20, seed=1), "a", 40, 30),
    ]
    assert not any(torch.equal(first[0], other[0]) for other in others)


def test_crops_keep_to_the_scale_and_ratio_and_half_of_them_are_flipped():
    settings = settings_of(crops=2000, dtype="float32", scale=(0.2, 0.5), ratio=(0.5, 2.0))
    crops, flips = draw_crops(settings, "a", 500, 400)
    top, left, height, width = crops.double().unbind(1)
    assert ((top >= 0) & (left >= 0) & (top + height <= 1 + 1e-6) & (left + width <= 1 + 1e-6)).all()
    area, ratio = height * width, width * 500 / (height * 400)
    assert 0.195 < area.min() < 0.21
    assert 0.48 < area.max() < 0.505
    assert 0.49 < ratio.min() < 0.55
    assert 1.8 < ratio.max() < 2.04
    assert 900 < flips.sum() < 1100


@pytest.mark.parametrize(("dtype", "height", "width"), [("float32", 333, 4517), ("float16", 333, 2047)])
def test_a_stored_crop_is_the_very_box_that_torchvision_drew(monkeypatch, dtype, height, width):
    boxes, draw = [], RandomResizedCrop.get_params
    monkeypatch.setattr(RandomResizedCrop, "get_params", lambda *args: boxes.append(draw(*args)) or boxes[-1])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
    crops, _ = draw_crops(settings_of(crops=50, dtype=dtype), "a", *image.size)
    for crop, box in zip(crops.tolist(), boxes, strict=True):
        expected = functional.resized_crop(image, *box, [16, 16])
        assert cut(image, crop, False, 16).tobytes() == expected.tobytes()
        assert cut(image, crop, True, 16).tobytes() == functional.hflip(expected).tobytes()


def test_a_float16_crop_stays_inside_the_image():
    """A white image: a box that left it would bring black pixels in."""
    image = Image.new("L", (2999, 2003), 255)
    crops, _ = draw_crops(settings_of(crops=100, scale=(0.9, 1.0)), "a", *image.size)
    edge = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for crop in [*crops.tolist(), *edge.tolist()]:
        assert np.asarray(cut(image, crop, False, 8)).min() == 255


@pytest.mark.parametrize(("content", "cause"), [
    (None, "no soft.safetensors member"),
    (b"", "cannot read soft.safetensors"),
    ("truncated", "cannot read soft.safetensors"),
    ("fewer crops", r"crops of shape \(6, 4\), but soft_labels.json says \(7, 4\)"),
    ("more classes", "names a class that is not one of 50"),
])  # fmt: skip
def test_a_bad_member_names_shard_and_key(content, cause):
    settings = settings_of()
    content = {
        "truncated": random_labels(settings).encode(settings)[:-1],
        "fewer crops": random_labels(settings_of(crops=6)).encode(settings),
        "more classes": random_labels(settings_of(num_classes=500)).encode(settings),
    }.get(content, content)
    with pytest.raises(DataError, match=f"shard s.tar, sample sample0000: .*{cause}.*tools/make_soft_labels.py"):
        StoredCrops(settings, crops_per_image=2, **LOOK)(record_of(content))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_member_ends_the_stream_with_its_name(soft_set, workers):
    shards, settings = soft_set()
    path = Path(shards.urls[2])
    content = path.read_bytes()
    begin = content.index(b"sample0017.soft.safetensors") + 512
    path.write_bytes(content[:begin] + bytes(64) + content[begin + 64 :])
    with pytest.raises(DataError, match=f"shard {path}, sample sample0017: cannot read {MEMBER}"):
        list(islice(soft_stream(shards, settings, num_workers=workers).batches(), 11))


def test_each_row_is_a_stored_crop_of_its_image_with_its_own_soft_label(soft_set, samples):
    shards, settings = soft_set(dtype="float32")
    originals = [Image.open(io.BytesIO(members["png"])) for _, members in samples(45)]
    stored = [random_labels(settings, number) for number in range(45)]
    stream = soft_stream(shards, settings)
    assert stream.batches_per_epoch == 11
    for images, labels, indices, probabilities in islice(stream.batches(), 11):
        assert (images.shape, labels.shape, indices.shape) == ((12, 1, 6, 6), (12,), (12, 5))
        assert (images.dtype, labels.dtype, indices.dtype) == (torch.float32, torch.int64, torch.int64)
        assert probabilities.dtype == torch.float32
        for image, label, top, values in zip(images, labels.tolist(), indices, probabilities, strict=True):
            soft = stored[label]
            (crop,) = (soft.probabilities == values).all(1).nonzero().flatten().tolist()
            assert torch.equal(soft.indices[crop], top)
            top, left, height, width = (soft.crops[crop].double() * 8).round().int().tolist()
            expected = functional.resized_crop(originals[label], top, left, height, width, [6, 6])
            expected = functional.hflip(expected) if soft.flips[crop] else expected
            assert torch.equal(image, (functional.to_tensor(expected) - 0.5) / 0.25)


def test_crops_of_a_visit_differ_and_visits_draw_anew(soft_set):
    shards, settings = soft_set(8, 8)
    stored = [random_labels(settings, number).encode(settings) for number in range(8)]
    soft = [SoftLabels.of(record_of(content), settings) for content in stored]
    drawn = []
    for _, labels, _, probabilities in islice(soft_stream(shards, settings, m=5, batch_size=8).batches(), 6):
        visit = {}
        for label, values in zip(labels.tolist(), probabilities, strict=True):
            (crop,) = (soft[label].probabilities.float() == values).all(1).nonzero().flatten().tolist()
            visit.setdefault(label, []).append(crop)
        assert all(len(set(crops)) == 5 for crops in visit.values())
        drawn.append(visit)
    for label in range(8):
        assert len({tuple(visit[label]) for visit in drawn}) > 1
        assert len(set().union(*(visit[label] for visit in drawn))) > 5


def test_all_crops_may_be_asked_for_and_no_more(soft_set):
    shards, settings = soft_set(8, 8)
    batch = next(soft_stream(shards, settings, m=7, batch_size=8).batches())
    assert len(batch[0]) == 56
    with pytest.raises(ConfigError, match=r"crops_per_image is 8, but the shards hold 7 crops an image"):
        soft_stream(shards, settings, m=8)


def test_an_image_is_decoded_once_a_visit(soft_set, monkeypatch):
    shards, settings = soft_set()
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or open_image(file))
    images, *_ = next(soft_stream(shards, settings, m=5).batches())
    assert (len(images), len(opened)) == (20, 4)


@pytest.mark.parametrize("start", [0, 5, 13])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_neither_workers_nor_a_resume_change_a_batch(soft_set, start, rank, world_size):
    shards, settings = soft_set()
    options = {"rank": rank, "world_size": world_size}
    expected = list(islice(soft_stream(shards, settings, **options).batches(), 18))[start:]
    for workers in (0, 2):
        resumed = soft_stream(shards, settings, num_workers=workers, **options).batches(start)
        assert_same(islice(resumed, 18 - start), expected)


def test_the_crops_of_a_sample_do_not_depend_on_the_rank_that_serves_it(soft_set):
    shards, settings = soft_set(48, 8)

    def served(world_size):
        found = {}
        for rank in range(world_size):
            stream = soft_stream(shards, settings, rank=rank, world_size=world_size)
            for images, labels, *_ in islice(stream.batches(), stream.batches_per_epoch):
                for image, label in zip(images, labels.tolist(), strict=True):
                    found.setdefault(label, []).append(image)
        return {label: torch.stack(images) for label, images in found.items()}

    alone, shared = served(1), served(3)
    assert alone.keys() == shared.keys() == set(range(48))
    assert all(torch.equal(alone[label], shared[label]) for label in alone)


def recipe_for(folder, **overrides):
    distill = {"teacher": "soft_labels", "temperature": overrides.pop("temperature", 1.0)}
    data = {"train": str(folder), "val": "v", "augment": "none", "soft_labels": {"crops_per_image": 2}}
    tree = {
        "recipe": "r",
        "model": {"name": "x", "num_classes": overrides.pop("num_classes", CLASSES)},
        "data": data | LOOK,
        "stages": {"s": {"steps": 1, "batch_size": 8, "lr": 0.1, "distill": distill}},
    }
    return parse_config(tree, "r")


def test_a_recipe_gets_the_crops_it_asks_for(soft_set):
    shards, settings = soft_set()
    folder = Path(shards.urls[0]).parent
    assert read_settings(ShardSet.open(folder)) == settings
    rows = StoredCrops.of_recipe(recipe_for(folder), shards)
    assert (rows.crops_per_image, rows.image_size, rows.settings) == (2, 6, settings)


def test_soft_labels_of_another_kind_than_the_recipe_needs_are_refused(soft_set):
    shards, _ = soft_set()
    folder = Path(shards.urls[0]).parent
    with pytest.raises(ConfigError, match=r"model.num_classes is 10, but .* are of 50 classes"):
        StoredCrops.of_recipe(recipe_for(folder, num_classes=10), shards)
    with pytest.raises(ConfigError, match=r"stages.s.distill.temperature is 4.0, but .* made at 1.0"):
        StoredCrops.of_recipe(recipe_for(folder, temperature=4.0), shards)


def test_shards_without_settings_are_named(make_set, soft_set):
    plain = make_set()
    with pytest.raises(DataError, match=rf"no {SETTINGS} at .*set/{SETTINGS}.*tools/make_soft_labels.py"):
        read_settings(plain)
    shards, _ = soft_set()
    path = Path(shards.urls[0]).with_name(SETTINGS)
    tree = json.loads(path.read_text())
    for broken in (path.read_text()[:50], json.dumps(tree | {"version": 9}), json.dumps(tree | {"top_k": 99})):
        path.write_text(broken)
        with pytest.raises(DataError, match=rf"{path}: no usable settings of soft labels"):
            read_settings(shards)
