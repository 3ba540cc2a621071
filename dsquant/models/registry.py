"""Build float models by upstream name with strict weights, and put quantization sites into them."""

from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dsquant.config import ModelConfig
from dsquant.errors import CheckpointError, ConfigError
from dsquant.models import vit
from dsquant.models.sites import Sites
from dsquant.spec import SitePolicy

FAMILIES = {VisionTransformer: vit.insert_sites}
TEXT_FAMILIES = ("BertForSequenceClassification", "RobertaForSequenceClassification")  # transformers loads when needed


def build_model(config: ModelConfig) -> nn.Module:
    """Build a float model; its weights, if any are named, must fit exactly.

    Raises ConfigError for an unknown name or bad kwargs, CheckpointError for weights that do not match.
    """
    if config.library == "transformers":
        from dsquant.models.language import build_text_model

        model = build_text_model(config)
    else:
        model = _build_timm_model(config)
    if config.checkpoint:
        load_strict(model, read_float_weights(config.checkpoint), config.checkpoint)
    return model


def _build_timm_model(config: ModelConfig) -> nn.Module:
    try:
        return timm.create_model(
            config.name, pretrained=config.pretrained, num_classes=config.num_classes, **config.kwargs
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        near = ", ".join(get_close_matches(config.name, timm.list_models(), n=4)) or "none; see timm.list_models()"
        hint = "" if timm.is_model(config.name) else f"; similar names: {near}"
        raise ConfigError(f"model.name {config.name!r} with {config.kwargs}: {error}{hint}") from None
    except OSError as error:
        raise ConfigError(
            f"pretrained weights of {config.name} cannot be fetched ({error}); set model.checkpoint"
        ) from None


def portable(config: ModelConfig) -> ModelConfig:
    """Return a ModelConfig that any machine can build from: a timm name, or a text model's whole configuration."""
    if config.library == "timm":
        return config
    from dsquant.models.language import self_contained

    return self_contained(config)


def tokenizer_location(config: ModelConfig, tokenizer: str | None = None) -> str:
    """Return where the tokenizer of a text model lies: `tokenizer` where given, else with the model. Raises ConfigError."""
    from dsquant.models.language import CLASSES, location_of

    if tokenizer is None and config.name in CLASSES:
        raise ConfigError(f"model.name {config.name!r} is a family and brings no tokenizer; set data.tokenizer")
    return location_of(tokenizer or config.name)


def read_float_weights(path: str) -> dict[str, Tensor]:
    """Read a float state dict from a safetensors or (weights-only) torch file, unwrapping "model" or "state_dict"."""
    if not Path(path).is_file():
        raise CheckpointError(f"model.checkpoint {path} does not exist")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} holds more than tensors or is no checkpoint ({error})") from None
    for key in ("model", "state_dict"):
        if isinstance(tree.get(key), dict):
            tree = tree[key]
    return tree


def load_strict(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy weights into a model whose names and shapes must match exactly. Raises CheckpointError naming the first odd one."""
    own = model.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise CheckpointError(f"{where} lacks {len(missing)} tensors of this model, first {missing[0]}: another model?")
    if extra := sorted(weights.keys() - own.keys()):
        raise CheckpointError(f"{where} has {len(extra)} tensors this model lacks, first {extra[0]}: another model?")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(f"{where}: {name} is {tuple(tensor.shape)}, this model has {tuple(own[name].shape)}")
    model.load_state_dict(weights)


def insert_sites(model: nn.Module, policy: SitePolicy, grad_scale: str = "lsq") -> Sites:
    """Put activation quantizers into a model in place and list its weight sites; no parameter is moved or renamed.

    Raises ConfigError for a family without sites and for a rule that matches nothing.
    """
    insert = next((insert for family, insert in FAMILIES.items() if isinstance(model, family)), None)
    if type(model).__name__ in TEXT_FAMILIES:
        from dsquant.models import bert

        insert = bert.insert_sites
    if insert is not None:
        sites = Sites(policy, grad_scale)
        insert(model, sites)
        policy.finish()
        return sites
    known = ", ".join([*(family.__name__ for family in FAMILIES), *TEXT_FAMILIES])
    raise ConfigError(f"{type(model).__name__} has no quantization sites in dsquant; families with sites: {known}")


def describe(sites: Sites) -> str:
    """Return a table of every site: bits, sign, granularity, groups, offset."""
    rows = [("site", "bits", "codes", "granularity", "groups", "offset")]
    for site in [*sites.weights, *sites.activations]:
        spec = site.spec
        groups = getattr(site, "n_groups", None) or site.grouping.n_groups
        offset = "learned" if spec.offset else "-"
        rows.append(
            (site.name, str(spec.n_bits), f"{spec.qmin}..{spec.qmax}", str(spec.granularity), str(groups), offset)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
