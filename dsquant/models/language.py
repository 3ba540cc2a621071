"""Build transformers' sequence classifiers: from a hub name, a local folder, an installed package, or a configuration alone."""

import importlib.util
import json
import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    PretrainedConfig,
    RobertaForSequenceClassification,
)
from transformers.utils import logging as hf_logging

from dsquant.config import ModelConfig
from dsquant.errors import CheckpointError, ConfigError
from dsquant.models.bert import ACTIVATIONS

logger = logging.getLogger(__name__)
CLASSES = {"bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification}
PACKAGE = "package:"
# What describes an architecture: the keys that a recipe may override, and all that a packed file takes along.
ARCHITECTURE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "max_position_embeddings",
    "type_vocab_size", "layer_norm_eps", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
FRESH = r"classifier\..*|(bert|roberta)\.pooler\..*"  # what an encoder's weights may lack
LEFT_OUT = r"cls\..*|lm_head\..*|(\w+\.)?pooler\..*|.*position_ids"  # what they may have besides: heads of pretraining


def build_text_model(config: ModelConfig) -> nn.Module:
    """Build a float BERT or RoBERTa classifier; pretrained weights must fit but for a fresh head.

    Raises ConfigError for a name that leads to no such model and for kwargs that are no part of its configuration,
    CheckpointError for weights that lack or exceed more than a head.
    """
    hf_config = read_config(config)
    model_class = CLASSES[hf_config.model_type]
    if config.pretrained:
        model = _pretrained(model_class, config, hf_config)
    else:
        model = model_class(hf_config)
    model.input_tokens = config.max_length
    return model


def location_of(name: str) -> str:
    """Return the folder of `package:NAME`, the one in the package whose config.json has a model_type; other names as they are.

    The package is found, not imported. Raises ConfigError where it is not installed or holds no model.
    """
    if not name.startswith(PACKAGE):
        return name
    module = name.removeprefix(PACKAGE).replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{name}: no package {module} is installed; pip install {module.replace('_', '-')}")
    root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("config.json"), key=lambda p: (len(p.parts), p)):
        if "model_type" in json.loads(path.read_text()):
            return str(path.parent)
    raise ConfigError(f"{name}: {root} holds no config.json of a transformers model")


def read_config(config: ModelConfig) -> PretrainedConfig:
    """Return the transformers configuration of a model with the recipe's overrides and number of classes.

    The bare name of a family makes it from `kwargs` alone and reads nothing. Raises ConfigError.
    """
    found = _upstream_config(config.name)
    for key, value in config.kwargs.items():
        if key not in ARCHITECTURE:
            near = get_close_matches(key, ARCHITECTURE, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(ARCHITECTURE)}"
            raise ConfigError(f"model.kwargs.{key} is no part of a {found.model_type}'s architecture; {hint}")
        setattr(found, key, value)
    found.num_labels = config.num_classes
    found.use_cache = False  # of decoders; it would only warn
    _check(config, found)
    return found


def own_classes(name: str) -> int:
    """Return the number of classes that a model's configuration says; 2, by transformers' default, of a mere encoder."""
    return _upstream_config(name).num_labels


def _upstream_config(name: str) -> PretrainedConfig:
    try:
        bare = name in CLASSES
        found = AutoConfig.for_model(name) if bare else AutoConfig.from_pretrained(location_of(name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name {name!r} is no folder with a config.json here, and the hub does not give it: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if found.model_type not in CLASSES:
        raise ConfigError(f"{name} is a {found.model_type}; text models here are {', '.join(CLASSES)}")
    return found


def _check(config: ModelConfig, found: PretrainedConfig) -> None:
    if found.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act is {found.hidden_act!r}; dsquant knows {', '.join(ACTIVATIONS)}")
    if found.hidden_size % found.num_attention_heads:
        raise ConfigError(f"hidden_size {found.hidden_size} does not divide into {found.num_attention_heads} heads")
    # RoBERTa numbers positions from pad_token_id + 1 on
    longest = found.max_position_embeddings - (found.pad_token_id + 1 if found.model_type == "roberta" else 0)
    if config.max_length and config.max_length > longest:
        raise ConfigError(f"data.max_length is {config.max_length}; {config.name} takes at most {longest} tokens")


def self_contained(config: ModelConfig) -> ModelConfig:
    """Return a ModelConfig that builds the same architecture from itself alone: no folder, package or hub is read."""
    found = read_config(config)
    kwargs = {key: getattr(found, key) for key in ARCHITECTURE if hasattr(found, key)}
    plain = {"name": found.model_type, "kwargs": kwargs, "pretrained": False, "checkpoint": None}
    return config.model_copy(update=plain)


def _pretrained(model_class: type, config: ModelConfig, hf_config: PretrainedConfig) -> nn.Module:
    if config.name in CLASSES:
        raise ConfigError(f"model.pretrained: {config.name!r} names a family; give a model of the hub or a folder")
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # what it would report, dsquant says or refuses
    hf_logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            location_of(config.name), config=hf_config, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ConfigError(f"weights of {config.name} cannot be had: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        raise CheckpointError(f"weights of {config.name} do not fit: {error}") from None
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
    _check_report(config, report)
    return model


def _check_report(config: ModelConfig, report: dict[str, Any]) -> None:
    """Raise CheckpointError unless all but a head has been loaded; say what is fresh."""
    fresh, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if (layers := config.kwargs.get("num_hidden_layers")) is not None:  # a recipe may cut a model short
        extra = [k for k in extra if not (m := re.search(r"encoder\.layer\.(\d+)\.", k)) or int(m[1]) < layers]
    if odd := [key for key in fresh if not re.fullmatch(FRESH, key)]:
        raise CheckpointError(f"{config.name} lacks {len(odd)} tensors of this model, first {odd[0]}: another model?")
    if odd := [key for key in extra if not re.fullmatch(LEFT_OUT, key)]:
        raise CheckpointError(f"{config.name} has {len(odd)} tensors this model lacks, first {odd[0]}: another model?")
    if report.get("mismatched_keys"):
        raise CheckpointError(f"weights of {config.name} have other shapes: {report['mismatched_keys']}")
    if fresh and not (dist.is_initialized() and dist.get_rank()):
        logger.warning("%s: untrained, as its weights lack them: %s", config.name, ", ".join(fresh))
