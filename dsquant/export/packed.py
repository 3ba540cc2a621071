"""Write and read the packed file: codes, scales, offsets and the float rest of one model in one safetensors file."""

import json
import os
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsquant import __version__
from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import ConfigError, ExportError
from dsquant.export.layout import (
    FORMAT,
    VERSION,
    VERSIONS,
    WITH_PRODUCTS,
    WITH_ROTATIONS,
    activation_site,
    data_keys,
    decode,
    encode,
    packed_shape,
    site_table,
    site_tensors,
    weight_site,
)
from dsquant.files import sync
from dsquant.ops.pack import pack, unpack
from dsquant.spec import ActivationSite, WeightSite

POLICY_KEYS = {
    "weight",
    "activation",
    "rules",
    "qk_reparam",
}  # of QuantConfig; its other keys only record how training went
NOT_SHIPPED = {"pretrained", "checkpoint"}  # of ModelConfig; the weights are in the file
TEXT_ONLY = {"library", "max_length"}  # of ModelConfig; timm models have no use for them
TEXT_NAMES = ("bert", "roberta")  # built from kwargs alone
LOADING_KWARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True)
class PackedInfo:
    """Say what was written.

    Attributes:
        file_bytes: size of the file.
        float_bytes: bytes of the same parameters and buffers in float32.
        bits_per_weight: for each n_bits, bits of packed words in the file per weight, the padding of rows included.
    """

    path: Path
    file_bytes: int
    float_bytes: int
    bits_per_weight: dict[int, float]


def write_packed(
    path: str | Path,
    *,
    latents: dict[str, Tensor],
    buffers: dict[str, Tensor],
    weight_sites: list[WeightSite],
    activation_sites: list[ActivationSite],
    scales: dict[str, Tensor],
    model: ModelConfig,
    quant: QuantConfig,
    data: dict[str, Any],
    training: dict[str, Any] | None = None,
    codes: dict[str, Tensor] | None = None,
    products: dict[str, WeightSite] | None = None,
) -> PackedInfo:
    """Write a packed file, whole or not at all; the same input gives the same bytes.

    Args:
        latents: every parameter of the model by upstream name, float32.
        buffers: every persistent buffer; floats are stored in float32, other dtypes as they are.
        scales: "site:scale", "site:offset" and so on: the values of every site and role.
        model: a timm name, or a text model's family and whole configuration (`models.portable`).
        data: image_size, channels, mean, std, interpolation and crop_pct of the images that the model takes; for text, task,
            metric, max_length and pad_to.
        training: a JSON mapping that records where the model comes from.
        codes: int8 codes, weight-shaped, that training used; a weight without them is encoded from its latent.
        products: sites of products of q and k weights (QKR), by the fused weight they stand for, whose q and k rows are not
            in the file; `scales` and `codes` hold theirs (`quant.reparam.encode_product`).

    Raises ExportError naming the tensor that is missing, of another shape or dtype, not finite or out of range.
    """
    _check_model(model)
    if data.keys() != (wanted := data_keys(data.get("task", "image"))):
        raise ExportError(f"data must hold {sorted(wanted)}, not {sorted(data)}")
    _check_latents(latents, weight_sites)
    codes, products = codes or {}, products or {}
    packed_sites = [*weight_sites, *products.values()]
    scales = _checked_scales(scales, weight_sites, activation_sites, [*products.values()])
    quantized = {site.name for site in weight_sites}
    if lacking := [site.name for site in products.values() if site.name not in codes]:
        raise ExportError(f"{lacking[0]} is a product of weights, no latent is its own: give its codes")
    if stray := sorted(codes.keys() - {site.name for site in packed_sites}):
        raise ExportError(f"{stray[0]} has codes but is no quantized weight of this model")
    rest = [(name, tensor) for name, tensor in [*latents.items(), *buffers.items()] if name not in quantized]
    parts = [{name: tensor.float() if tensor.is_floating_point() else tensor} for name, tensor in rest]
    parts += [_weight_tensors(s, latents.get(s.name), scales, codes.get(s.name)) for s in packed_sites]
    parts += [{f"{s.name}.{role}": scales[f"{s.name}:{role}"]} for s in activation_sites for role in s.values]
    unshipped = (
        NOT_SHIPPED | (TEXT_ONLY if model.library == "timm" else set()) | (set() if model.rotate else {"rotate"})
    )
    header = {
        "format": FORMAT,
        "version": WITH_ROTATIONS if model.rotate else WITH_PRODUCTS if products else VERSION,
        "dsquant_version": __version__,
        "model": json.dumps(model.model_dump(mode="json", exclude=unshipped)),
        "quant": json.dumps(quant.model_dump(mode="json")),
        "sites": json.dumps(site_table(weight_sites, activation_sites, products)),
        "data": json.dumps(data),
        "training": json.dumps(training or {}),
    }
    file_bytes = _write_whole(Path(path), _merged(parts), header)
    float_bytes = 4 * sum(tensor.numel() for tensor in [*latents.values(), *buffers.values()])
    return PackedInfo(Path(path), file_bytes, float_bytes, _bits_per_weight(packed_sites))


def _check_model(model: ModelConfig) -> None:
    """Refuse what would make timm or transformers fetch or unpickle something when a file that somebody sent is loaded."""
    if model.pretrained or model.checkpoint:
        raise ExportError("model.pretrained and model.checkpoint load weights; a packed file brings its own")
    if model.library == "transformers":
        if model.name not in TEXT_NAMES:
            raise ExportError(
                f"model.name {model.name!r} leads to a hub or a folder; a packed text model is one of {TEXT_NAMES} with its "
                "whole configuration in kwargs"
            )
        return  # building refuses kwargs that are no part of an architecture
    if ":" in model.name:
        raise ExportError(f"model.name {model.name!r} is an address; a packed file needs the name of a timm model")
    if bad := sorted(LOADING_KWARGS & model.kwargs.keys()):
        raise ExportError(f"model.kwargs sets {bad[0]}; a packed file brings its own weights")


def _check_latents(latents: dict[str, Tensor], weight_sites: list[WeightSite]) -> None:
    for name, latent in latents.items():
        if latent.dtype != torch.float32:
            raise ExportError(f"{name} is {latent.dtype}; latents are float32")
        if not bool(latent.isfinite().all()):
            raise ExportError(f"{name} holds NaN or infinity; convert an earlier checkpoint")
    for site in weight_sites:
        if site.name not in latents:
            raise ExportError(f"{site.name} is a quantized weight but has no latent")
        if tuple(site.of(latents[site.name]).shape) != site.shape:
            rows = "" if site.rows is None else f" in rows {site.rows[0]} to {site.rows[1]}"
            raise ExportError(f"{site.name} is {tuple(latents[site.name].shape)}, its site has {site.shape}{rows}")


def _checked_scales(
    scales: dict[str, Tensor], weights: list[WeightSite], activations: list[ActivationSite], products: list[WeightSite]
) -> dict[str, Tensor]:
    """Return float32 scales on the CPU, one for each site and role. Raises ExportError naming the first odd one."""
    sizes = {f"{s.name}:{role}": s.grouping.n_groups for s in weights for role in s.roles}
    sizes |= {f"{s.name}:scale": s.grouping.n_groups for s in products}  # their codes are given: no centre decides them
    sizes |= {f"{s.name}:{role}": numel for s in activations for role, numel in s.values.items()}
    if odd := sorted(sizes.keys() ^ scales.keys()):
        raise ExportError(f"{odd[0]} is {'missing' if odd[0] in sizes else 'of no site of this model'}")
    found = {key: value.detach().float().cpu() for key, value in scales.items()}
    for key, value in found.items():
        if tuple(value.shape) != (sizes[key],):
            raise ExportError(f"{key} is {tuple(value.shape)}, its site has {sizes[key]} values")
        if not bool(value.isfinite().all()):
            raise ExportError(f"{key} holds NaN or infinity; convert an earlier checkpoint")
        if key.endswith(":scale") and bool((value <= 0).any()):
            raise ExportError(f"{key} holds {float(value.min())}; scales are positive")
    return found


def _weight_tensors(
    site: WeightSite, latent: Tensor | None, scales: dict[str, Tensor], codes: Tensor | None
) -> dict[str, Tensor]:
    scale = scales[f"{site.name}:scale"]
    if codes is None:
        codes = encode(site.of(latent).detach().cpu(), scale, site, scales.get(f"{site.name}:centre"))
    elif codes.dtype != torch.int8 or tuple(codes.shape) != site.shape:
        raise ExportError(f"{site.name}: codes are {codes.dtype} {tuple(codes.shape)}, not int8 {site.shape}")
    low, high = int(codes.min()), int(codes.max())
    if low < site.spec.qmin or high > site.spec.qmax:
        raise ExportError(f"{site.name}: codes from {low} to {high} do not fit {site.spec.n_bits} bits")
    return {
        f"{site.name}_packed": pack(codes.cpu().reshape(site.shape[0], -1), site.spec.n_bits),
        f"{site.name}_scale": scale,
        f"{site.name}_shape": torch.tensor(site.shape, dtype=torch.int64),
    }


def _merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if taken := sorted(tensors.keys() & part.keys()):
            raise ExportError(f"two tensors of this model would be called {taken[0]} in the file")
        for name, tensor in part.items():
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def _bits_per_weight(sites: list[WeightSite]) -> dict[int, float]:
    totals: dict[int, tuple[int, int]] = {}
    for site in sites:
        bits, numel = totals.get(site.spec.n_bits, (0, 0))
        totals[site.spec.n_bits] = (bits + 32 * prod(packed_shape(site)), numel + site.numel)
    return {n_bits: bits / numel for n_bits, (bits, numel) in sorted(totals.items())}


def _write_whole(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> int:
    """Write a safetensors file beside `path`, sync it, rename it; return its size.

    The library writes the header's entries in an order that differs from run to run: they are sorted here.
    """
    blob = memoryview(save(tensors, header))
    (length,) = struct.unpack("<Q", blob[:8])
    entries = json.dumps(json.loads(bytes(blob[8 : 8 + length])), sort_keys=True, separators=(",", ":")).encode()
    entries = entries.ljust(-(-len(entries) // 8) * 8)  # tensor data starts at a multiple of 8 bytes
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            for piece in (struct.pack("<Q", len(entries)), entries, blob[8 + length :]):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


@dataclass(frozen=True)
class PackedModel:
    """Hold the header of a packed file, checked, and read its tensors on demand.

    `model` and `quant` rebuild the model and its policy; `sites` is the header's own table, from which `weights`,
    `activations` and `products` (QKR, by the fused weight they stand for) are made; `names` are those of all tensors.
    """

    path: Path
    dsquant_version: str
    model: ModelConfig
    quant: QuantConfig
    sites: dict[str, dict[str, dict[str, Any]]]
    weights: dict[str, WeightSite]
    activations: dict[str, ActivationSite]
    products: dict[str, WeightSite]
    data: dict[str, Any]
    training: dict[str, Any]
    names: frozenset[str]
    _file: Any = field(repr=False)

    @property
    def rest(self) -> frozenset[str]:
        """Return the names of the parameters and buffers that are stored as they are."""
        return self.names - site_tensors(self.packed_sites, [*self.activations.values()]).keys()

    @property
    def packed_sites(self) -> list[WeightSite]:
        """Return every site whose codes are in the file, products last."""
        return [*self.weights.values(), *self.products.values()]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the file in memory of its own. Raises ExportError where the file has none of that name."""
        if name not in self.names:
            raise ExportError(f"{self.path} has no tensor {name}")
        return self._file.get_tensor(name).clone()

    def codes(self, name: str) -> Tensor:
        """Return the int8 codes of a quantized weight or product in its shape."""
        site = self._site(name)
        packed = self.tensor(f"{name}_packed")
        return unpack(packed, site.spec.n_bits, site.numel // site.shape[0]).view(site.shape)

    def image(self, name: str) -> Tensor:
        """Return `w_hat` of a quantized weight or product, float32."""
        return decode(self.tensor(f"{name}_packed"), self.tensor(f"{name}_scale"), self._site(name))

    def _site(self, name: str) -> WeightSite:
        return {site.name: site for site in self.packed_sites}[name]


def read_packed(path: str | Path) -> PackedModel:
    """Open a packed file and check its header against its tensors.

    Raises ExportError for a file that is missing, truncated, of another format or version, or lacks a site's tensor.
    """
    path = Path(path)
    try:
        file = safe_open(path, framework="pt")
        header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is missing, truncated or no safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise ExportError(f"{path} is no packed model: its format is {header.get('format')!r}, not {FORMAT!r}")
    if header.get("version") not in VERSIONS:
        found = f"version {header.get('version')!r} of the packed format"
        raise ExportError(
            f"{path} has {found}; this dsquant reads {', '.join(map(repr, VERSIONS))}: update the older one"
        )
    try:
        packed = _parsed(path, header, file)
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError, ConfigError) as error:
        raise ExportError(f"{path} has a damaged header ({type(error).__name__}: {error}); convert it again") from None
    _check_tensors(packed)
    return packed


def _parsed(path: Path, header: dict[str, str], file: Any) -> PackedModel:
    model, quant, sites, data = (json.loads(header[key]) for key in ("model", "quant", "sites", "data"))
    model = ModelConfig.model_validate(model)
    _check_model(model)
    if lacking := data_keys(data.get("task", "image")) - data.keys():
        raise ValueError(f"data lacks {min(lacking)}")
    return PackedModel(
        path=path,
        dsquant_version=header["dsquant_version"],
        model=model,
        quant=QuantConfig.model_validate({key: quant[key] for key in POLICY_KEYS & quant.keys()}),
        sites=sites,
        weights={name: weight_site(name, entry) for name, entry in sites["weights"].items()},
        activations={name: activation_site(name, entry) for name, entry in sites["activations"].items()},
        products={entry["of"]: weight_site(name, entry) for name, entry in sites.get("products", {}).items()},
        data=data,
        training=json.loads(header.get("training", "{}")),
        names=frozenset(file.keys()),
        _file=file,
    )


def _check_tensors(packed: PackedModel) -> None:
    """Raise ExportError unless every site's tensors are there, with the dtype and shape that its entry calls for."""
    for name, expected in site_tensors(packed.packed_sites, [*packed.activations.values()]).items():
        if name not in packed.names:
            raise ExportError(f"{packed.path} lacks the tensor {name}; convert it again")
        found = packed._file.get_slice(name)
        if (found.get_dtype(), tuple(found.get_shape())) != expected:
            held = f"{found.get_dtype()} {found.get_shape()}"
            raise ExportError(f"{packed.path}: {name} is {held}, its site needs {expected[0]} {list(expected[1])}")
    for site in packed.packed_sites:
        if tuple(packed.tensor(f"{site.name}_shape").tolist()) != site.shape:
            raise ExportError(f"{packed.path}: {site.name}_shape disagrees with the header's {list(site.shape)}")
