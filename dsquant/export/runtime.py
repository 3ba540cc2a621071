"""Run a packed model: codes stay packed in memory.

Layers multiply packed codes (`ops.packed_linear`) in integers where training's own code takes the product in integers, with the
same bits. Elsewhere, exact, a layer unpacks its codes to the image that training used, and its forward pass is training's own
code; fast, it multiplies packed codes all the same, and agrees to float rounding, not to the bit.
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
from dsquant.models.sites import Sites, has_scale_a_row
from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.packed_linear import PackedMatrix, packed_linear, packed_matrix
from dsquant.ops.qk_product import keys_and_values
from dsquant.ops.quant_linear import WeightGrid, integer_backend
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

    def store(self, site: WeightSite, packed: Tensor, scale: Tensor, *, cache: bool, fast: bool) -> None:
        """Replace the float weight by packed words.

        `cache` decodes once and keeps the image beside them; without it what products with codes need is kept, a scale and
        a sum of codes for each row. Weights whose scales change along a row have no such product.
        """
        self._parameters.pop("weight", None)
        self.site = site
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", scale)
        image = decode(packed, scale, site) if cache else None
        self.register_buffer("_image", image, persistent=False)
        self.register_buffer("_like", torch.empty(0), persistent=False)  # has the dtype the module was moved to
        multiplied = isinstance(self, (QuantLinear, QuantConv2d)) and not cache
        self.matrix = _matrix(site, packed, scale) if multiplied else None
        self.fast = fast

    @property
    def weight(self) -> Tensor:
        if self._image is not None:
            return self._image
        return decode(self.weight_packed, self.weight_scale, self.site).to(self._like.dtype)

    @property
    def weight_grid(self) -> WeightGrid | None:
        return WeightGrid(self.weight_scale, self.site.spec.levels) if has_scale_a_row(self.site) else None

    def multiplies_codes(self, x: Tensor, args: QuantArgs | None, after: Tensor | None = None) -> bool:
        """Say whether the product with x, which `args` quantize, is taken from packed codes.

        A gradient with respect to x is not, nor, exact, the product with a bias `after` the quantizer, which training takes in
        floats.
        """
        if self.matrix is None or (x.requires_grad and torch.is_grad_enabled()):
            return False
        if self.fast or args is None or after is not None:
            return self.fast
        levels = None if self.weight_grid is None else self.weight_grid.levels  # what training knows of the weight
        backend = integer_backend(
            x, self._like.dtype, (len(self.matrix.words), self.matrix.cols), args.scale, args.levels, levels
        )
        return backend != backends.TORCH

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.weight_scale
        super()._apply(fn, recurse)
        device = self.weight_scale.device
        self.weight_scale = exact.to(device)
        if self.matrix is not None:
            words, sums = self.weight_packed, self.matrix.code_sums.to(device)
            self.matrix = self.matrix._replace(words=words, scale=self.matrix.scale.to(device), code_sums=sums)
        return self


def _matrix(site: WeightSite, packed: Tensor, scale: Tensor) -> PackedMatrix | None:
    """Return a weight as (shape[0], rest) with a scale a row, or None where scales change along a row."""
    if not has_scale_a_row(site):
        return None
    rows, cols = site.shape[0], site.numel // site.shape[0]
    row_scale = scale.repeat_interleave(rows // scale.numel())
    return packed_matrix(packed, row_scale, site.spec.n_bits, cols, site.spec.levels.shift)


class PackedLinear(PackedWeight, QuantLinear):
    """Apply QuantLinear with a packed weight."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        quantizer, own = self.input_quantizer, self.bias if bias is None else bias
        if quantizer is None:
            return packed_linear(x, self.matrix, own) if self.multiplies_codes(x, None) else super().forward(x, bias)
        shifted = quantizer.shifted(x)
        args = quantizer.args(shifted)
        if not self.multiplies_codes(shifted, args, quantizer.after):
            return super().forward(x, bias)
        return packed_linear(shifted, self.matrix, quantizer.packed_bias(self.matrix, own), args)


class PackedConv2d(PackedWeight, QuantConv2d):
    """Apply QuantConv2d with a packed weight; patches that do not overlap are a linear layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        args = None if self.input_quantizer is None else self.input_quantizer.args(x)
        patches = self.patches(x) if args is not None and self.multiplies_codes(x, args) else None
        if patches is None:
            return super().forward(x)
        return packed_linear(patches, self.matrix, self.bias, args).permute(0, 3, 1, 2)


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

    @property
    def after(self) -> Tensor | None:
        """Give the bias that follows the quantizer, if there is one."""
        return self._values.get("after")

    def packed_bias(self, weight: PackedMatrix, bias: Tensor | None) -> Tensor | None:
        """Return a linear layer's bias with the one after the quantizer folded in, as `shifted_bias` does of an image."""
        return bias if self.after is None else packed_linear(self.after, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = fn(self._values["scale"]).device
        self.bind({role: values.to(device) for role, values in self._values.items()})
        return self


PACKED_CLASSES = {
    QuantLinear: PackedLinear, QuantConv2d: PackedConv2d, nn.Embedding: PackedEmbedding, QuantQkv: PackedQkv,
}  # fmt: skip


def load_packed(
    path: str | Path, device: torch.device | str = "cpu", *, cache: bool = False, fast: bool = False
) -> nn.Module:  # fmt: skip
    """Build the model of a packed file, in evaluation mode and without gradients.

    By default its outputs are those of the trained model, bit for bit on the same device and at the same dtype
    (`.bfloat16()` for a model trained in bf16); packed codes are multiplied where training multiplies codes, and weights are
    unpacked at each use elsewhere; `cache` keeps float images instead. `fast` multiplies packed codes everywhere
    (`ops.packed_linear`): outputs agree with the trained model's to float rounding. A value that rounding moves over a boundary
    of the next quantizer takes the neighbouring code, so a logit may differ by more than one rounding.

    Raises ExportError for a file that `read_packed` refuses or that does not fit the model it names, ConfigError for both
    `cache` and `fast`.
    """
    if cache and fast:
        raise ConfigError("cache keeps float images for the exact path and fast reads packed codes; choose one")
    packed = read_packed(path)
    model, sites = _build(packed)
    _load_rest(model, packed)
    for name, quantizer in sites.quantizers.items():
        become(quantizer, PackedActivation)
        quantizer.bind({role: packed.tensor(f"{name}.{role}") for role in quantizer.site.values})
    for site in sites.weights:
        module = model.get_submodule(site.name.removesuffix(".weight"))
        become(module, PACKED_CLASSES[type(module)])
        module.store(site, *_stored(packed, site), cache=cache, fast=fast)
    for fused, site in sites.products.items():
        module = model.get_submodule(fused.removesuffix(".weight"))
        module.packed_product = PackedWeight()
        module.packed_product.store(site, *_stored(packed, site), cache=cache, fast=False)
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
