"""What a packed file holds: names, dtypes and shapes of its tensors, and how codes become weights.

Weights are symmetric: `w_hat = (code + shift) * scale`, element i of a weight in row-major order taking the scale of group
`(i // inner) % n_groups`. docs/packed_format.md says the same for readers that are not this one.
"""

from dataclasses import asdict
from math import prod
from operator import index
from typing import Any

import torch
from torch import Tensor

from dsquant.ops.fake_quantize import dequantize, quantize
from dsquant.ops.pack import packed_words, unpack
from dsquant.spec import ActivationSite, Grouping, QuantSpec, WeightSite

FORMAT, VERSION = "dsquant-packed", "1"
WITH_PRODUCTS, WITH_ROTATIONS = "2", "3"  # where a file holds products (QKR), where layers rotate their inputs
VERSIONS = (VERSION, WITH_PRODUCTS, WITH_ROTATIONS)
TensorType = tuple[str, tuple[int, ...]]  # safetensors dtype, shape
DATA_KEYS = {"image_size", "channels", "mean", "std", "interpolation", "crop_pct"}  # of an image model
TEXT_KEYS = {"task", "metric", "max_length", "pad_to"}  # of a text model


def data_keys(task: str) -> set[str]:
    """Return which fields of a recipe's data section a model of a task takes along."""
    return TEXT_KEYS if task == "text" else DATA_KEYS


def group_scales(scale: Tensor, shape: tuple[int, ...], grouping: Grouping) -> Tensor:
    """Spread (n_groups,) scales to a weight's shape: element i, row-major, has `scale[(i // inner) % n_groups]`."""
    cycles = prod(shape) // (grouping.n_groups * grouping.inner)
    return scale.view(1, -1, 1).expand(cycles, grouping.n_groups, grouping.inner).reshape(shape)


def encode(latent: Tensor, scale: Tensor, site: WeightSite, centre: Tensor | None = None) -> Tensor:
    """Return the int8 codes `round(clip((w - centre) / scale - shift, qmin, qmax))` of a float32 weight, in its shape."""
    scales = group_scales(scale, site.shape, site.grouping)
    centres = None if centre is None else group_scales(centre, site.shape, site.grouping)
    return quantize(latent, scales, centres, site.spec.levels).to(torch.int8)


def decode(packed: Tensor, scale: Tensor, site: WeightSite) -> Tensor:
    """Return the image `w_hat = (code + shift) * scale`, float32 in the weight's shape: what training's forward pass read."""
    codes = unpack(packed, site.spec.n_bits, site.numel // site.shape[0]).view(site.shape)
    return dequantize(codes.float(), group_scales(scale, site.shape, site.grouping), None, site.spec.levels)


def site_table(
    weights: list[WeightSite], activations: list[ActivationSite], products: dict[str, WeightSite] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Describe sites as the file's header does: all that decoding weights and quantizing activations needs.

    `products` (QKR), by the name of the fused weight that they stand for, are a table of their own, where there are any.
    """
    of_products = {site.name: _weight_entry(site) | {"of": fused} for fused, site in (products or {}).items()}
    return {
        "weights": {site.name: _weight_entry(site) for site in weights},
        **({"products": of_products} if of_products else {}),
        "activations": {
            site.name: {
                "n_bits": site.spec.n_bits,
                "signed": site.spec.signed,
                "granularity": str(site.spec.granularity),
                "method": str(site.spec.method),
                "shift": site.spec.levels.shift,
                "offset": site.spec.offset,
                "bias": str(site.spec.bias),
                "n_groups": site.n_groups,
                "features": site.features,
            }
            for site in activations
        },
    }


def _weight_entry(site: WeightSite) -> dict[str, Any]:
    entry = {
        "n_bits": site.spec.n_bits,
        "method": str(site.spec.method),
        "shift": site.spec.levels.shift,
        "shape": list(site.shape),
        **asdict(site.grouping),
    }
    return entry if site.rows is None else entry | {"rows": list(site.rows)}


def packed_shape(site: WeightSite) -> tuple[int, int]:
    """Return the shape of a weight's packed words: the weight is packed as (shape[0], numel / shape[0])."""
    return site.shape[0], packed_words(site.numel // site.shape[0], site.spec.n_bits)


def site_tensors(weights: list[WeightSite], activations: list[ActivationSite]) -> dict[str, TensorType]:
    """Return the name and type of every tensor that belongs to a site."""
    layout: dict[str, TensorType] = {}
    for site in weights:
        layout[f"{site.name}_packed"] = ("I32", packed_shape(site))
        layout[f"{site.name}_scale"] = ("F32", (site.grouping.n_groups,))
        layout[f"{site.name}_shape"] = ("I64", (len(site.shape),))
    for site in activations:
        for role, numel in site.values.items():
            layout[f"{site.name}.{role}"] = ("F32", (numel,))
    return layout


def weight_site(name: str, entry: dict[str, Any]) -> WeightSite:
    """Make a site of a header entry. Raises KeyError, TypeError, ValueError or ConfigError for a damaged one."""
    shape, grouping = tuple(map(index, entry["shape"])), Grouping(index(entry["n_groups"]), index(entry["inner"]))
    if min(*shape, grouping.n_groups, grouping.inner) < 1:
        raise ValueError(f"{name} has shape {shape} and {grouping}")
    grouping.check(shape)
    rows = tuple(map(index, entry["rows"])) if "rows" in entry else None
    if rows is not None and (len(rows) != 2 or rows[1] - rows[0] != shape[0] or rows[0] < 0):
        raise ValueError(f"{name} has shape {shape} and rows {rows}")
    return WeightSite(name, shape, QuantSpec(index(entry["n_bits"]), method=entry["method"]), grouping, rows=rows)


def activation_site(name: str, entry: dict[str, Any]) -> ActivationSite:
    """Make a site of a header entry; raises as `weight_site`."""
    given = {key: entry[key] for key in ("signed", "granularity", "offset", "method", "bias")}
    spec = QuantSpec(index(entry["n_bits"]), **given)
    return ActivationSite(name, spec, index(entry["n_groups"]), features=index(entry["features"]))
