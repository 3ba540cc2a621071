"""Build float models by upstream name with strict weights, and put quantization sites into them."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dsquant.config import ModelConfig
from dsquant.errors import CheckpointError, ConfigError
from dsquant.models import sret, swin, vit
from dsquant.models.rotation import insert_rotations, rotates
from dsquant.models.sites import Sites
from dsquant.spec import LEARNED, ActivationSite, Bias, SitePolicy, WeightSite

FAMILIES = {
    VisionTransformer: vit.insert_sites,
    SwinTransformer: swin.insert_sites,
    SwinTransformerV2: swin.insert_sites,
    sret.SReT: sret.insert_sites,
}
TEXT_FAMILIES = ("BertForSequenceClassification", "RobertaForSequenceClassification")  # transformers loads when needed


def build_model(config: ModelConfig) -> nn.Module:
    """Build a float model, `sret_tiny` included; its weights, if any are named, must fit exactly.

    Layers that `config.rotate` names rotate their inputs; so are the weights that are read, while random ones need not be.

    Raises ConfigError for an unknown name or bad kwargs, CheckpointError for weights that do not match.
    """
    if config.library == "transformers":
        from dsquant.models.language import build_text_model

        model = build_text_model(config)
    else:
        model = _build_timm_model(config)
    if config.checkpoint:
        weights = read_float_weights(config.checkpoint)
        if isinstance(model, sret.SReT):
            weights = sret.from_authors(model, weights)
        load_strict(model, weights, config.checkpoint)
    if config.rotate:
        insert_rotations(model, config.rotate, weights=config.pretrained or config.checkpoint is not None)
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


def word_embeddings(config: ModelConfig) -> Tensor:
    """Return the word embeddings (V, C) of a text model's float weights, float32; every generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_model(config).get_input_embeddings().weight.detach()


def text_model(name: str, *, num_classes: int | None = None, checkpoint: str | None = None, max_length: int,
               kwargs: dict[str, Any]) -> ModelConfig:  # fmt: skip
    """Return the ModelConfig of a text model that is looked at and not trained: no dropout of probabilities to be in the way.

    Without `checkpoint` its weights are its own; without `num_classes` it has those of its configuration. Raises ConfigError.
    """
    from dsquant.models.language import own_classes

    return ModelConfig(
        library="transformers", name=name, num_classes=num_classes or own_classes(name), max_length=max_length,
        pretrained=checkpoint is None, checkpoint=checkpoint, kwargs={"attention_probs_dropout_prob": 0.0} | kwargs,
    )  # fmt: skip


def pretrained_view(name: str) -> dict[str, Any]:
    """Return what timm says of a model's own weights: num_classes, and how it sees images.

    Keys: num_classes, image_size, channels, mean, std, interpolation. Raises ConfigError for an unknown name.
    """
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), n=4)) or "none; see timm.list_models()"
        raise ConfigError(f"timm has no model {name!r}; similar names: {near}")
    known = timm.get_pretrained_cfg(name).to_dict()
    found = timm.data.resolve_data_config(pretrained_cfg=known)
    channels, _, size = found["input_size"]
    shown = {key: found[key] for key in ("mean", "std", "interpolation")}
    return {"num_classes": known["num_classes"], "image_size": size, "channels": channels, **shown}


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
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}, where)
    model.load_state_dict(weights)


def check_fit(model: nn.Module, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError unless these are the names and shapes of a model's state dict, naming the first odd one."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(own.keys() - shapes.keys()):
        raise CheckpointError(f"{where} lacks {len(missing)} tensors of this model, first {missing[0]}: another model?")
    if extra := sorted(shapes.keys() - own.keys()):
        raise CheckpointError(f"{where} has {len(extra)} tensors this model lacks, first {extra[0]}: another model?")
    for name, shape in shapes.items():
        if shape != own[name]:
            raise CheckpointError(f"{where}: {name} is {shape}, this model has {own[name]}")


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
        model.quant_sites = (*sites.weights, *sites.products.values(), *sites.activations)  # for describe; no module
        return sites
    known = ", ".join([*(family.__name__ for family in FAMILIES), *TEXT_FAMILIES])
    raise ConfigError(f"{type(model).__name__} has no quantization sites in dsquant; families with sites: {known}")


def stop_dropout(model: nn.Module) -> None:
    """Have a model keep all values and blocks in training: no dropout, no stochastic depth (timm's DropPath)."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0


def describe(model: nn.Module) -> str:
    """Return a table of every quantization site of a model, a line each, weights first.

    codes are what is stored, levels what they stand for in units of the scale; lr is the multiplier of the scale's learning
    rate. `weight[a:b]` are rows of a weight whose others stay float. A last line names layers that rotate their inputs. Raises
    ConfigError for a model that `insert_sites` has not been through.
    """
    sites = getattr(model, "quant_sites", None)
    if sites is None:
        raise ConfigError(
            f"this {type(model).__name__} is not quantized: describe the model of a quantized stage, one that load_packed "
            "returned, or one that insert_sites has been through"
        )
    rows = [("site", "method", "bits", "codes", "levels", "granularity", "groups", "offset", "bias", "lr")]
    rows += [(_shown(site), *_cells(site)) for site in sites]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    rotated = [name for name, module in model.named_modules() if rotates(module)]
    closing = [f"rotated inputs: {', '.join(rotated)}"] if rotated else []
    return "\n".join([*(line.rstrip() for line in lines), *closing])


def _shown(site: WeightSite | ActivationSite) -> str:
    rows = getattr(site, "rows", None)
    return site.name if rows is None else f"{site.name}[{rows[0]}:{rows[1]}]"


def _cells(site: WeightSite | ActivationSite) -> tuple[str, ...]:
    spec, grid = site.spec, site.spec.levels
    groups = site.grouping.n_groups if isinstance(site, WeightSite) else site.n_groups
    return (
        str(spec.method),
        str(spec.n_bits),
        f"{grid.qmin}..{grid.qmax}",
        f"{grid.qmin + grid.shift:g}..{grid.qmax + grid.shift:g}",
        str(spec.granularity),
        str(groups),
        "learned" if spec.offset else "-",
        "-" if spec.bias is Bias.NONE else str(spec.bias),
        f"{spec.lr_scale:g}" if spec.method in LEARNED else "-",
    )
