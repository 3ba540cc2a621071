"""Image classifiers of transformers (ViT, DeiT, Swin, BEiT, ConvNeXt, ...) with their own weights, to teach by.

They come from a hub name, a local folder or `package:NAME`, and see images as the image processor beside their weights says.
No code of a repository is run, and no weight may be missing: a backbone without a trained head cannot teach.
"""

import math
import re
from typing import Any

import torch
from PIL.Image import Resampling
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
)
from transformers.utils import logging as hf_logging

from dsquant.errors import CheckpointError, ConfigError
from dsquant.models.language import location_of

LEFT_OUT = r"(\w+\.)?pooler\..*|.*position_index|.*mask_token|lm_head\..*"  # what a classifier's file may hold besides
# What an image processor may do that mean, std, size and interpolation cannot say; each changes the pixels.
REFUSED = ("rescale_offset", "include_top", "do_flip_channel_order", "do_color_quantize")


def open_image_classifier(name: str, image_size: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a classifier with its weights, float32 in evaluation mode, and its view of images.

    name: of the hub, a local folder, or `package:NAME`. Its view has the keys of `pretrained_view`: num_classes, image_size,
    channels, mean, std, interpolation; mean and std are of pixels in [0, 1]. `image_size` overrides that of the processor.
    Raises ConfigError for a name that leads to no image classifier, an image processor that is absent or does what the view
    cannot say, and a size that the model does not take; CheckpointError for weights that do not fill the model.
    """
    location = location_of(name)
    config = _read_config(name, location)
    channels = getattr(config, "num_channels", 3)
    view = {"num_classes": config.num_labels, **_view(name, location, channels, image_size)}
    model = _load(name, location, config)
    _check_takes(model, name, view)
    return model, view


def _read_config(name: str, location: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name!r} is no folder with a config.json here, and the hub does not give it: {_first_line(error)}"
        ) from None
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigError(f"{name} is a {config.model_type}, which classifies no images; give an image classifier")
    if config.model_type == "timm_wrapper":
        raise ConfigError(f"{name} is a model of timm; give its timm name, with --library timm and --pretrained")
    return config


def _view(name: str, location: str, channels: int, image_size: int | None) -> dict[str, Any]:
    """Return image_size, channels, mean, std and interpolation of the image processor that lies with a model."""
    try:
        processor = AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name} does not say how it sees images: no usable preprocessor_config.json lies with it "
            f"({_first_line(error)}); save its image processor there"
        ) from None
    told = processor.to_dict()
    if odd := next((key for key in REFUSED if told.get(key)), None):
        raise ConfigError(
            f"the image processor of {name} sets {odd}, which stored crops cannot follow; take another teacher"
        )
    if told.get("resample") is None:
        raise ConfigError(f"the image processor of {name} names no `resample`: 2 is bilinear, 3 bicubic")
    mean, std = _normalization(name, told, channels)
    interpolation = Resampling(int(told["resample"])).name.lower()
    return {
        "image_size": image_size or _side(name, told),
        "channels": channels,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
    }


def _normalization(name: str, told: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixels in [0, 1]: a processor's own apply to pixels in [0, 255] times its rescale_factor."""
    top = 255 * told["rescale_factor"] if told.get("do_rescale") else 255.0
    top = 1.0 if math.isclose(top, 1.0) else top  # 1/255 is no binary fraction
    if not told.get("do_normalize"):
        return (0.0,) * channels, (1 / top,) * channels
    found = []
    for key in ("image_mean", "image_std"):
        values = told[key] if isinstance(told[key], list | tuple) else [told[key]] * channels
        if len(values) != channels:
            raise ConfigError(f"{name}: its image processor has {len(values)} values of {key} for {channels} channels")
        found.append(tuple(float(value) / top for value in values))
    return found[0], found[1]


def _side(name: str, told: dict[str, Any]) -> int:
    """Return the side of the square that the model sees: of the centre crop where there is one."""
    key = "crop_size" if told.get("do_center_crop") else "size"
    size = told.get(key) or {}
    height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
    if not height or height != width:
        raise ConfigError(f"the image processor of {name} has {key} {size}; stored crops are square, give --image_size")
    return int(height)


def _load(name: str, location: str, config: PretrainedConfig) -> nn.Module:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # what it would report, dsquant says or refuses
    hf_logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            location, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except OSError as error:
        raise ConfigError(f"weights of {name} cannot be had: {_first_line(error)}") from None
    except RuntimeError as error:
        raise CheckpointError(f"weights of {name} do not fit: {error}") from None
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors of a {type(model).__name__}, first {missing[0]}: a backbone whose head is "
            "not trained cannot teach; give a fine-tuned classifier"
        )
    if extra := sorted(key for key in report["unexpected_keys"] if not re.fullmatch(LEFT_OUT, key)):
        raise CheckpointError(f"{name} has {len(extra)} tensors that a {type(model).__name__} lacks, first {extra[0]}")
    if report.get("mismatched_keys"):
        raise CheckpointError(f"weights of {name} have other shapes: {report['mismatched_keys']}")
    return model.eval()


@torch.no_grad()
def _check_takes(model: nn.Module, name: str, view: dict[str, Any]) -> None:
    """Raise ConfigError unless the model takes an image of this size and gives one logit a class."""
    side = view["image_size"]
    try:
        logits = model(torch.zeros(1, view["channels"], side, side)).logits
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} does not take images of {side} x {side}: {_first_line(error)}") from None
    if tuple(logits.shape) != (1, view["num_classes"]):
        raise ConfigError(
            f"{name} gives logits of shape {tuple(logits.shape)} for one image, and its config says {view['num_classes']} classes"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
