"""Run a packed model: codes stay packed in memory, and each layer unpacks its own to the image that training used.

A packed layer is the quantized layer with `weight` computed instead of stored: its forward pass is the same code.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dsquant.errors import CheckpointError, ConfigError, ExportError
from dsquant.export.layout import decode, site_table
from dsquant.export.packed import PackedModel, read_packed
from dsquant.models.registry import build_model, insert_sites
from dsquant.models.sites import Sites
from dsquant.ops.qk_product import keys_and_values
from dsquant.quant.modules import ActivationQuantizer, QuantConv2d, QuantLinear, become
from dsquant.quant.reparam import QuantQkv
from dsquant.spec import Grouping, WeightSite


class PackedWeight(nn.Module):
    """Give a module a `weight` decoded from `weight_packed` (int32) and `weight_scale` (float32) at each use.

    The image is float32 `(code + shift) * scale`, cast to the dtype that the module was moved to; scales stay float32.
    """

    site: WeightSite
    weight_packed: Tensor
    weight_scale: Tensor

    def store(self, site: WeightSite, packed: Tensor, scale: Tensor, *, cache: bool) -> None:
        """Replace the float weight by packed words; `cache` decodes once and keeps the image beside them."""
        self._parameters.pop("weight", None)
        self.site = site
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", scale)
        image = decode(packed, scale, site) if cache else None
        self.register_buffer("_image", image, persistent=False)
        self.register_buffer("_like", torch.empty(0), persistent=False)  # has the dtype the module was moved to

    @property
    def weight(self) -> Tensor:
        if self._image is not None:
            return self._image
        return decode(self.weight_packed, self.weight_scale, self.site).to(self._like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_scale = exact.to(self.weight_scale.device)
        return self


class PackedLinear(PackedWeight, QuantLinear):
    """Apply QuantLinear with a packed weight."""


class PackedConv2d(PackedWeight, QuantConv2d):
    """Apply QuantConv2d with a packed weight."""


class PackedEmbedding(PackedWeight, nn.Embedding):
    """Look up rows of a packed weight; only the rows that a batch asks for are unpacked."""

    def forward(self, ids: Tensor) -> Tensor:
        if self._image is not None:
            return self._image[ids]
        words, scale, rows = self.weight_packed[ids.reshape(-1)], self.weight_scale, ids.numel()
        if scale.numel() > 1:  # one a row
            scale = scale[ids.reshape(-1)]
        site = replace(self.site, shape=(rows, self.embedding_dim), grouping=Grouping(len(scale), self.embedding_dim))
        return decode(words, scale, site).view(*ids.shape, -1).to(self._like.dtype)


class PackedQkv(PackedWeight, QuantQkv):
    """Apply QuantQkv with packed v rows and a packed product of q and k weights, a PackedWeight of its own."""

    packed_product: PackedWeight

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the quantized input, by the arithmetic of training."""
        bias = None if self.bias is None else self.bias[self.site.rows[0] :]
        return keys_and_values(x, self.packed_product.weight, self.weight, bias)


class PackedActivation(ActivationQuantizer):
    """Quantize an activation with scales that follow the model to its device and stay float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = fn(self._values["scale"]).device
        self.bind({role: values.to(device) for role, values in self._values.items()})
        return self


PACKED_CLASSES = {
    QuantLinear: PackedLinear, QuantConv2d: PackedConv2d, nn.Embedding: PackedEmbedding, QuantQkv: PackedQkv,
}  # fmt: skip


def load_packed(path: str | Path, device: torch.device | str = "cpu", *, cache: bool = False) -> nn.Module:
    """Build the model of a packed file, in evaluation mode and without gradients.

    Its outputs are those of the trained model, bit for bit on the same device and at the same dtype (`.bfloat16()` for
    a model trained in bf16). By default weights are unpacked at each use; `cache` keeps float images as well.
    Raises ExportError for a file that `read_packed` refuses or that does not fit the model it names.
    """
    packed = read_packed(path)
    model, sites = _build(packed)
    _load_rest(model, packed)
    for name, quantizer in sites.quantizers.items():
        become(quantizer, PackedActivation)
        quantizer.bind({role: packed.tensor(f"{name}.{role}") for role in quantizer.site.values})
    for site in sites.weights:
        module = model.get_submodule(site.name.removesuffix(".weight"))
        become(module, PACKED_CLASSES[type(module)])
        module.store(site, *_stored(packed, site), cache=cache)
    for fused, site in sites.products.items():
        module = model.get_submodule(fused.removesuffix(".weight"))
        module.packed_product = PackedWeight()
        module.packed_product.store(site, *_stored(packed, site), cache=cache)
    return model.eval().requires_grad_(False).to(device)


def _stored(packed: PackedModel, site: WeightSite) -> tuple[Tensor, Tensor]:
    return packed.tensor(f"{site.name}_packed"), packed.tensor(f"{site.name}_scale")


def _build(packed: PackedModel) -> tuple[nn.Module, Sites]:
    """Build the float model with the policy's sites, which must be the file's."""
    try:
        with torch.random.fork_rng(devices=[]):  # loading a model must not move the caller's random numbers
            model = build_model(packed.model)
        sites = insert_sites(model, packed.quant.policy())
    except (ConfigError, CheckpointError) as error:
        raise ExportError(f"{packed.path}: its model cannot be built: {error}") from error
    own = {"products": {}} | site_table(sites.weights, sites.activations, sites.products)
    for kind, table in own.items():
        filed = packed.sites.get(kind, {})
        for name in sorted(table.keys() | filed.keys()):
            if table.get(name) != filed.get(name):
                raise ExportError(
                    f"{packed.path}: site {name} is {filed.get(name)} in the file and {table.get(name)} in the model "
                    f"that dsquant builds; the file is of dsquant {packed.dsquant_version}"
                )
    return model, sites


def _load_rest(model: nn.Module, packed: PackedModel) -> None:
    """Load every parameter and buffer that is not packed; nothing may be left over on either side."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in packed.weights}
    if missing := sorted(own.keys() - packed.rest):
        raise ExportError(f"{packed.path} lacks the tensor {missing[0]}; convert it again")
    if extra := sorted(packed.rest - own.keys()):
        raise ExportError(f"{packed.path} holds {extra[0]}, which {packed.model.name} does not have")
    rest = {name: packed.tensor(name) for name in own}
    for name, tensor in rest.items():
        if tensor.shape != own[name].shape:
            held, needed = tuple(tensor.shape), tuple(own[name].shape)
            raise ExportError(f"{packed.path}: {name} is {held}, {packed.model.name} needs {needed}")
    model.load_state_dict(rest, strict=False)
