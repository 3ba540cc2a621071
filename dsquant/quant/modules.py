"""Modules that quantize their inputs. They take a float module's class, not its place: no parameter moves or is renamed.

Weights need no code here: the shard step leaves the image w_hat in the parameter itself.
"""

import math
from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from dsquant.errors import ConfigError
from dsquant.ops.fake_quantize import QuantArgs, fake_quantize
from dsquant.ops.quant_linear import WeightGrid, quant_linear
from dsquant.spec import ActivationSite, Granularity


class Mode(Enum):
    """Say what a quantizer does with a tensor that passes: leave it, quantize it, or show it to an observer first."""

    FLOAT = "float"
    QUANTIZE = "quantize"


class ActivationQuantizer(nn.Module):
    """Quantize one activation site with scales that live in QuantState.

    `heads_first` says that groups lie along dim 1 of (B, H, N, D) rather than along the last dimension; `keys_last` that
    the last dimension goes over tokens, as in (B, H, N, N).
    It owns no parameter, so that a model keeps its state-dict names and ZeRO never sees a scale.
    """

    def __init__(
        self, site: ActivationSite, *, heads_first: bool = False, keys_last: bool = False, grad_scale: float = 1.0
    ):
        super().__init__()
        self.site, self.heads_first, self.keys_last, self.grad_scale = site, heads_first, keys_last, grad_scale
        self.mode = Mode.FLOAT
        self.observer = self.input_observer = None  # the latter sees a linear layer's input before its bias
        self._values: dict[str, Tensor] = {}

    def bind(self, values: dict[str, Tensor]) -> None:
        """Read scale and offset (n_groups,), biases before and after (features,), float32, from these from now on."""
        self._values = values
        self.mode = Mode.QUANTIZE

    def args(self, x: Tensor) -> QuantArgs | None:
        """Return what an op needs to quantize x, or None in float mode; an observer sees x first."""
        if self.observer is not None:
            self.observer(x.detach())
        if self.mode is Mode.FLOAT:
            return None
        spec = self.site.spec
        scale, offset = (self._spread(self._values.get(role), x) for role in ("scale", "offset"))
        return QuantArgs(scale, offset, spec.levels, self.grad_scale)

    def takes_as_is(self) -> bool:
        """Say whether what enters is quantized and nothing else: no bias is added before, nobody is to see it."""
        observed = self.observer is not None or self.input_observer is not None
        return self.mode is Mode.QUANTIZE and not observed and "before" not in self._values

    def shifted(self, x: Tensor) -> Tensor:
        """Return x plus the bias before the quantizer, where it has one; an observer of inputs sees x first."""
        if self.input_observer is not None:
            self.input_observer(x.detach())
        before = self._values.get("before")
        return x if before is None else x + before.to(x.dtype)

    def moved(self, x_hat: Tensor) -> Tensor:
        """Return x_hat plus the bias after the quantizer, where it has one."""
        after = self._values.get("after")
        return x_hat if after is None else x_hat + after.to(x_hat.dtype)

    def shifted_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return a linear layer's bias with the one after the quantizer folded in: `bias + weight @ after`."""
        after = self._values.get("after")
        return bias if after is None else F.linear(after.to(weight.dtype), weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        args = self.args(x)
        return x if args is None else fake_quantize(x, *args)

    def _spread(self, values: Tensor | None, x: Tensor) -> Tensor | None:
        """Give (n_groups,) values a shape that broadcasts to x."""
        if values is None or self.site.n_groups == 1:
            return values
        if self.site.spec.granularity is Granularity.PER_TOKEN:
            self.check_tokens(x)
            return values.view(-1, 1)
        if self.heads_first:
            return values.view(x.shape[1], 1, -1)
        return values.repeat_interleave(x.shape[-1] // self.site.n_groups)

    def check_tokens(self, x: Tensor) -> None:
        """Raise ConfigError unless x (..., tokens, features) has as many tokens as this site has scales."""
        if x.shape[-2] != self.site.n_groups:
            raise ConfigError(
                f"{self.site.name} has a scale for each of {self.site.n_groups} tokens and got {x.shape[-2]}; "
                "give inputs of one length, or per_tensor by a quant rule"
            )

    def extra_repr(self) -> str:
        spec = self.site.spec
        return f"{self.site.name}: {spec.n_bits} bits, {'signed' if spec.signed else 'unsigned'}, {spec.granularity}"


def lsq_grad_scale(numel: int, qmax: int) -> float:
    """Return LSQ's gradient factor 1 / sqrt(N * qmax), N the elements that share the scale. Esser et al. 2020, 2.2."""
    return 1.0 / math.sqrt(max(1, numel) * max(1, qmax))


def mdq_grad_scale(norm: Tensor, qmax: int | Tensor) -> Tensor:
    """Return 1 / sqrt(qmax * |w|_1), `norm` being |w|_1 of each group. Quantization Variation (TMLR 2024), its code."""
    return (norm.clamp(min=1e-12) * qmax).rsqrt()


class QuantLinear(nn.Linear):
    """Apply a linear layer to its quantized input; `input_quantizer` is set by `become`."""

    input_quantizer: ActivationQuantizer | None
    weight_grid: WeightGrid | None = None  # once the weight is an image

    def forward(self, x: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        """Return the layer's output; `bias` stands in for its own where a model keeps it elsewhere (SwinV2's qkv).

        With `gelu` what is quantized is GELU(x), which is not kept; a quantizer that `takes_as_is` alone allows it.
        """
        quantizer, weight = self.input_quantizer, self.weight
        bias = self.bias if bias is None else bias
        if quantizer is None:
            return F.linear(x, weight, bias)
        x = quantizer.shifted(x)
        args = quantizer.args(x)
        bias = quantizer.shifted_bias(weight, bias)
        if args is None:
            return F.linear(x, weight, bias)
        return quant_linear(x, weight, bias, *args, self.weight_grid, gelu=gelu)


class QuantConv2d(nn.Conv2d):
    """Apply a convolution to its quantized input; `input_quantizer` is set by `become`.

    Patches that do not overlap are a linear layer's input, and go the way of `quant_linear`: it saves them once, and the
    gradient that the input's scale needs is one product.
    """

    input_quantizer: ActivationQuantizer | None
    weight_grid: WeightGrid | None = None  # once the weight is an image

    def forward(self, x: Tensor) -> Tensor:
        args = None if self.input_quantizer is None else self.input_quantizer.args(x)
        if args is None:
            return super().forward(x)
        patches = self.patches(x)
        if patches is None:
            return super().forward(fake_quantize(x, *args))
        return quant_linear(patches, self.weight.flatten(1), self.bias, *args, self.weight_grid).permute(0, 3, 1, 2)

    def patches(self, x: Tensor) -> Tensor | None:
        """Return x (B, C, H, W) as patches (B, rows, columns, C * height * width), or None where they overlap or do not fit."""
        height, width = self.kernel_size
        patchwise = self.stride == self.kernel_size and self.groups == 1 and self.padding in (0, (0, 0), "valid")
        if not patchwise or self.dilation != (1, 1) or x.shape[-2] % height or x.shape[-1] % width:
            return None
        return x.unflatten(-2, (-1, height)).unflatten(-1, (-1, width)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def become(module: nn.Module, quant_class: type[nn.Module], **quantizers: ActivationQuantizer | None) -> None:
    """Turn a float module into its quantized subclass in place, keeping its parameters, buffers, hooks and names."""
    module.__class__ = quant_class
    for name, quantizer in quantizers.items():
        setattr(module, name, quantizer)
