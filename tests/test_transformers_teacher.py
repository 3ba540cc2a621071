"""Soft labels by an image classifier of transformers, through the real tool: its own view, its own classes."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from torchvision.transforms import functional
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTImageProcessor,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from dsquant.data import ShardSet, write_shards
from dsquant.data.shards import PENDING_INDEX
from dsquant.engine import World
from dsquant.errors import CheckpointError, ConfigError, DataError
from dsquant.models.image_classifiers import open_image_classifier
from dsquant.soft_labels import SoftLabelWriter, make_settings, open_teacher
from tests.integration.runs import run_forked
from tests.test_soft_labels_tool import command, contents, jpeg, labelled

CLASSES, SIZE, CROPS = 7, 16, 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": SIZE,
        "patch_size": 4, "num_labels": CLASSES}  # fmt: skip
WORLD = World(0, 1, torch.device("cpu"))


def save(model, folder, processor=None):
    """Write a model as transformers does, its head drawn anew: transformers' is nearly zero, all classes would be as likely."""
    for name, p in model.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(p)
    model.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    (processor or ViTImageProcessor(size=square, image_mean=MEAN, image_std=STD, resample=2)).save_pretrained(folder)
    return folder


def vit(folder, **changed):
    torch.manual_seed(0)
    return save(ViTForImageClassification(ViTConfig(**{**TINY, **changed})), folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with shards (`plain`), a ViT as transformers saves it (`vit`), and the shards labelled by it (`alone`)."""
    folder = tmp_path_factory.mktemp("made")
    samples = [(f"picture{number:02d}", {"jpg": jpeg(number), "cls": str(number % CLASSES).encode()})
               for number in range(9)]  # fmt: skip
    write_shards(samples, folder / "plain", "train", 4)
    (folder / "plain" / "classes.txt").write_text("".join(f"{c}\n" for c in "abcdefg"))
    vit(folder / "vit")
    run_forked(command(*options(folder, "alone")), folder / "alone.log").ok()
    return folder


def options(folder, out, **changed):
    chosen = {"shards": folder / "plain", "out": folder / out, "model": folder / "vit", "library": "transformers",
              "crops": CROPS, "top_k": 3, "dtype": "float32", "batch_size": 12} | changed  # fmt: skip
    return [f"--{key}={value}" for key, value in chosen.items()]


def test_soft_labels_are_what_transformers_says_of_the_crops_prepared_by_its_own_processor(made):
    model = ViTForImageClassification.from_pretrained(made / "vit").eval()
    processor = ViTImageProcessor.from_pretrained(made / "vit")
    records = labelled(made / "alone")
    assert len(records) == 9
    for record in records:
        soft, image = load(bytes(record["soft.safetensors"])), Image.open(io.BytesIO(record["jpg"]))
        shares = soft["crops"].double() * torch.tensor([image.height, image.width] * 2)
        crops = []
        for (top, left, height, width), flip in zip(shares.round().int().tolist(), soft["flips"].tolist(), strict=True):
            height, width = min(height, image.height - top), min(width, image.width - left)
            crop = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            crops.append(functional.hflip(crop) if flip else crop)
        with torch.no_grad():
            expected = model(**processor(crops, return_tensors="pt")).logits.softmax(-1)
        told = soft["probabilities"]
        torch.testing.assert_close(told, expected.sort(dim=1, descending=True).values[:, :3], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(told, expected.gather(1, soft["indices"].long()), rtol=1e-4, atol=1e-6)
    assert told.std() > 0.05  # the teacher does tell classes apart


def test_the_settings_say_which_model_and_how_it_sees(made):
    settings = json.loads((made / "alone" / "soft_labels.json").read_text())
    assert {key: settings["teacher"][key] for key in ("model", "library")} == {
        "model": "vit",
        "library": "transformers",
    }
    assert len(settings["teacher"]["weights"]) == 32
    assert settings["view"] == {"image_size": SIZE, "channels": 3, "mean": list(MEAN), "std": list(STD),
                                "interpolation": "bilinear", "precision": "fp32"}  # fmt: skip
    assert settings["num_classes"] == CLASSES


def test_two_ranks_write_what_one_writes(made):
    run_forked(command(*options(made, "two"), ranks=2), made / "two.log").ok()
    assert contents(made / "two") == contents(made / "alone")


def test_an_interrupted_set_goes_on_to_the_same_bytes_and_other_weights_are_refused(made):
    out = made / "interrupted"
    shutil.copytree(made / "alone", out)
    (out / "train-0001.tar").unlink()
    (out / "index.json").rename(out / PENDING_INDEX)
    kept = (out / "train-0000.tar").stat().st_mtime_ns
    run_forked(command(*options(made, "interrupted")), made / "interrupted.log").ok()
    assert contents(out) == contents(made / "alone")
    assert (out / "train-0000.tar").stat().st_mtime_ns == kept
    shutil.copytree(made / "vit", made / "other" / "vit")
    weights = load_file(made / "vit" / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, made / "other" / "vit" / "model.safetensors", {"format": "pt"})
    ended = run_forked(command(*options(made, "interrupted", model=made / "other" / "vit")), made / "other.log")
    assert ended.code == 1
    assert "were made with teacher" in ended.output
    assert "Traceback" not in ended.output


SMALL = {"image_size": SIZE, "num_labels": CLASSES}
OTHERS = {
    "deit": (DeiTForImageClassification, DeiTConfig(**TINY)),
    "beit": (BeitForImageClassification, BeitConfig(**TINY)),
    "swin": (SwinForImageClassification, SwinConfig(**SMALL, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                                                     window_size=4)),
    "convnext": (ConvNextForImageClassification, ConvNextConfig(**SMALL, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_load_and_give_the_probabilities_of_upstream(family, tmp_path):
    torch.manual_seed(1)
    model_class, config = OTHERS[family]
    save(model_class(config), tmp_path)
    teacher = open_teacher(WORLD, model=str(tmp_path), library="transformers")
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    found, classes = teacher.top_k(images, CLASSES, 2.0)
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = (model_class.from_pretrained(tmp_path).eval()(pixels).logits / 2).softmax(-1)
    torch.testing.assert_close(found, expected.gather(1, classes), rtol=1e-4, atol=1e-6)


def view_of(folder, **changed):
    told = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(told | changed))
    return open_image_classifier(str(folder))[1]


def test_the_size_is_that_of_the_centre_crop_and_interpolation_that_of_the_processor(tmp_path):
    square = {"height": SIZE, "width": SIZE}
    processor = DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size=square)
    torch.manual_seed(0)
    save(ViTForImageClassification(ViTConfig(**TINY)), tmp_path, processor)
    view = open_image_classifier(str(tmp_path))[1]
    assert (view["image_size"], view["interpolation"]) == (SIZE, "bicubic")
    save(ViTForImageClassification(ViTConfig(**TINY)), tmp_path, ConvNextImageProcessor(size={"shortest_edge": SIZE}))
    assert open_image_classifier(str(tmp_path))[1]["image_size"] == SIZE


@pytest.mark.parametrize(
    ("changed", "pixel"),
    [
        ({}, lambda p: (p / 255 - 0.4) / 0.2),
        ({"rescale_factor": 1 / 127.5}, lambda p: (p / 127.5 - 0.4) / 0.2),
        ({"do_rescale": False}, lambda p: (p - 0.4) / 0.2),
        ({"do_normalize": False}, lambda p: p / 255),
        ({"do_normalize": False, "do_rescale": False}, lambda p: p),
    ],
)
def test_mean_and_std_make_of_a_pixel_what_the_processor_makes(changed, pixel, tmp_path):
    view = view_of(vit(tmp_path), **changed)
    for value in (0, 17, 255):
        assert (value / 255 - view["mean"][0]) / view["std"][0] == pytest.approx(pixel(value), rel=1e-9, abs=1e-9)


def bert(folder):
    BertForSequenceClassification(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                             intermediate_size=8)).save_pretrained(folder)  # fmt: skip
    return folder


def backbone(folder):
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    ViTModel(ViTConfig(**TINY)).save_pretrained(folder)
    return folder


def without_processor(folder):
    (vit(folder) / "preprocessor_config.json").unlink()
    return folder


def flipped(folder):
    told = json.loads((vit(folder) / "preprocessor_config.json").read_text())
    told |= {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("make", "given", "error", "says"),
    [
        (bert, {}, ConfigError, "is a bert, which classifies no images"),
        (backbone, {}, CheckpointError, "a backbone whose head is not trained cannot teach"),
        (without_processor, {}, ConfigError, "no usable preprocessor_config.json lies with it"),
        (flipped, {}, ConfigError, "sets do_flip_channel_order"),
        (vit, {"image_size": 20}, ConfigError, "does not take images of 20 x 20"),
        (vit, {"num_classes": 10}, ConfigError, "num_classes is 10, but"),
        (vit, {"checkpoint": "c"}, ConfigError, "--checkpoint is for a teacher of timm; one of transformers brings its own"),
        (vit, {"model_kwargs": {"depth": 3}}, ConfigError, "--model_kwargs is for a teacher of timm"),
        (vit, {"library": "hf"}, ConfigError, "library is 'hf'; choose timm or transformers"),
        (vit, {"stage": "fp"}, ConfigError, "--stage is for a teacher by --run"),
        (lambda folder: "/nowhere/at/all", {}, ConfigError, "'/nowhere/at/all' is no folder with a config.json here"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_be_had_is_named_with_the_fix(make, given, error, says, tmp_path):
    with pytest.raises(error) as raised:
        open_teacher(WORLD, **{"model": str(make(tmp_path)), "library": "transformers"} | given)
    assert says in str(raised.value)


def test_without_the_hub_a_name_of_it_is_one_clear_message(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'some-org/no-such-vit' is no folder .* the hub does not give it"):
        open_teacher(WORLD, model="some-org/no-such-vit", library="transformers")


@pytest.mark.parametrize("names", [3, None])
def test_classes_that_the_teacher_does_not_tell_are_refused(made, names, tmp_path):
    teacher = open_teacher(WORLD, model=str(vit(tmp_path / "vit", num_labels=3)), library="transformers")
    settings, shards = make_settings(teacher, {"crops": 2, "top_k": 2}), ShardSet.open(made / "plain")
    with pytest.raises(ConfigError, match=r"classes\.txt names 7 classes and the teacher tells 3"):
        SoftLabelWriter(shards, tmp_path / "out", teacher, settings, WORLD)
    shutil.copytree(made / "plain", tmp_path / "plain")
    if names is None:
        (tmp_path / "plain" / "classes.txt").unlink()
    else:
        (tmp_path / "plain" / "classes.txt").write_text("a\nb\nc\n")
    writer = SoftLabelWriter(ShardSet.open(tmp_path / "plain"), tmp_path / "out", teacher, settings, WORLD)
    with pytest.raises(DataError, match=r"sample picture\d+: it is of class [3-6], and the teacher tells 3 classes"):
        list(writer._labelled(shards.urls[0], shards.counts[0], ThreadPoolExecutor(1), lambda done, total: None))
