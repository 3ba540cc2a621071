"""Collect the quantization sites of a model while its family file walks it."""

from dataclasses import replace
from math import prod

from torch import nn

from dsquant.errors import ConfigError
from dsquant.ops.quant_linear import WeightGrid
from dsquant.quant.modules import ActivationQuantizer, QuantConv2d, QuantLinear, become, lsq_grad_scale
from dsquant.quant.reparam import QuantQkv
from dsquant.quant.state import QuantState
from dsquant.spec import STATISTICS, ActivationSite, Granularity, Grouping, QuantSpec, SitePolicy, WeightSite


class Sites:
    """Hold the weight sites and activation quantizers that one policy puts into one model.

    `products` are sites of what no parameter holds (QKR), by the name of the fused weight whose q and k rows they multiply.
    """

    def __init__(self, policy: SitePolicy, grad_scale: str = "lsq"):
        self.policy, self.grad_scale = policy, grad_scale
        self.weights: list[WeightSite] = []
        self.products: dict[str, WeightSite] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.heads: dict[
            str, int | Grouping
        ] = {}  # what belongs to a head: of activations their number, of weights where

    @property
    def activations(self) -> list[ActivationSite]:
        return [quantizer.site for quantizer in self.quantizers.values()]

    def linear(self, name: str, module: nn.Linear, *, features: int, signed: bool = True, offset: bool = False,
               heads: int | None = None, out_blocks: int = 1, out_heads: int | None = None,
               tokens: int | None = None) -> None:  # fmt: skip
        """Quantize a linear layer's input and weight.

        features: elements of the input of one sample. heads: heads that lie side by side in the input.
        out_blocks: separate quantizers along the output rows (3 for a fused q, k, v); out_heads: heads in one such block.
        tokens: length of the input's next to last dimension, where that is not all positions of a sample; 1 allows no
        per_token scales.
        """
        input_quantizer = self.activation(
            f"{name}.input", features, signed=signed, offset=offset, heads=heads,
            tokens=tokens or features // module.in_features, features=module.in_features,
        )  # fmt: skip
        shape = (module.out_features, module.in_features)
        self._weight(f"{name}.weight", shape, heads=heads, out_blocks=out_blocks, out_heads=out_heads)
        become(module, QuantLinear, input_quantizer=input_quantizer)

    def reparametrized(self, name: str, module: nn.Linear, *, features: int, heads: int, tokens: int) -> None:
        """Quantize the input of `{name}.qkv`, its v rows, and of each head the product of its q and k rows (QKR).

        features, heads and tokens are those of `linear`, for a fused layer (3 * H * D, C). Raises ConfigError where either
        weight is left in float, and for a method whose scale is learned.
        """
        width, size = module.in_features, module.out_features // 3
        input_quantizer = self.activation(f"{name}.qkv.input", features, tokens=tokens, features=width)
        values = self._weight(f"{name}.qkv.weight", (size, width), out_heads=heads, rows=(2 * size, 3 * size))
        product, shape = f"{name}.qk.weight", (heads * width, width)
        spec = self.policy.weight_spec(product)
        if spec is None or values is None:
            raise ConfigError(
                f"a quant rule leaves {product if spec is None else f'{name}.qkv.weight'} in float; with quant.qk_reparam the v "
                "rows and the product of q and k rows are quantized together: remove the rule, or qk_reparam"
            )
        if spec.method not in STATISTICS:
            raise ConfigError(
                f"{product} has method {spec.method}, whose scale is learned, but no shard holds this product; give it a "
                "statistic by a quant rule: {match: '*.attn.qk.weight', method: statsq, granularity: per_channel}"
            )
        site = WeightSite(product, shape, spec, _weight_grouping(product, spec, shape, None, 1, heads))
        self.products[values.name] = site
        become(module, QuantQkv, input_quantizer=input_quantizer, product=site, heads=heads)

    def conv(self, name: str, module: nn.Conv2d, *, features: int, signed: bool = True) -> None:
        """Quantize a convolution's input and weight, one scale each (per_channel: one a filter)."""
        input_quantizer = self.activation(f"{name}.input", features, signed=signed)
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        self._weight(f"{name}.weight", shape)
        become(module, QuantConv2d, input_quantizer=input_quantizer)

    def embedding(self, name: str, module: nn.Embedding) -> None:
        """Quantize the weight of an embedding, with one scale or (per_channel) one a row; a look-up has no input to quantize."""
        self._weight(f"{name}.weight", (module.num_embeddings, module.embedding_dim))

    def activation(
        self, name: str, numel: int, *, signed: bool = True, offset: bool = False, heads: int | None = None,
        heads_first: bool = False, keys_last: bool = False, tokens: int | None = None, features: int | None = None,
    ) -> ActivationQuantizer | None:  # fmt: skip
        """Return the quantizer of an activation of `numel` elements a sample, or None where the policy leaves it float.

        tokens: length of its next to last dimension, for per_token. features: of its last, for an input of a linear layer.
        keys_last: its last dimension goes over tokens too, as that of attention probabilities does.
        """
        spec = self.policy.activation_spec(name, signed=signed, offset=offset, linear=features is not None)
        if spec is None:
            return None
        if heads:
            self.heads[name] = heads
        n_groups = _activation_groups(name, spec, heads, tokens, features)
        site = ActivationSite(name, spec, n_groups, numel // n_groups, features or 1)
        factor = 1.0 if self.grad_scale == "none" else lsq_grad_scale(site.numel, spec.grad_qmax)
        self.quantizers[name] = ActivationQuantizer(
            site, heads_first=heads_first, keys_last=keys_last, grad_scale=factor
        )
        return self.quantizers[name]

    def _weight(self, name: str, shape: tuple[int, ...], *, heads: int | None = None, out_blocks: int = 1,
                out_heads: int | None = None, rows: tuple[int, int] | None = None) -> WeightSite | None:  # fmt: skip
        spec = self.policy.weight_spec(name)
        if spec is None:
            return None
        grouping = _weight_grouping(name, spec, shape, heads, out_blocks, out_heads)
        grouping.check(shape)
        if heads or out_heads:
            per_head = replace(spec, granularity=Granularity.PER_HEAD)
            self.heads[name] = _weight_grouping(name, per_head, shape, heads, out_blocks, out_heads)
        self.weights.append(WeightSite(name, shape, spec, grouping, out_blocks, rows))
        return self.weights[-1]

    def bind_images(self, model: nn.Module, state: QuantState) -> None:
        """Tell layers that their weights are images of these scales from now on; those with a scale along a row need not know."""
        for site in self.weights:
            module = model.get_submodule(site.name.rpartition(".")[0])
            if isinstance(module, QuantLinear | QuantConv2d) and site.rows is None and has_scale_a_row(site):
                module.weight_grid = WeightGrid(state.get(site.name), site.spec.levels)

    def bind(self, state: QuantState, *, trainable: bool = True) -> None:
        """Point every activation quantizer at its values in `state`; frozen copies serve inference."""
        find = state.leaf if trainable else state.get
        for name, quantizer in self.quantizers.items():
            quantizer.bind({role: find(name, role) for role in quantizer.site.values})


def has_scale_a_row(site: WeightSite) -> bool:
    """Say whether each row of a weight, as a matrix, has one scale, and those that share it are neighbours."""
    grouping, cols = site.grouping, site.numel // site.shape[0]
    return grouping.inner % cols == 0 and grouping.n_groups * grouping.inner == site.numel


def _activation_groups(
    name: str, spec: QuantSpec, heads: int | None, tokens: int | None, features: int | None
) -> int:  # fmt: skip
    if spec.granularity is Granularity.PER_TENSOR:
        return 1
    if spec.granularity is Granularity.PER_HEAD and heads:
        return heads
    if spec.granularity is Granularity.PER_TOKEN and tokens and tokens > 1:
        return tokens
    if spec.granularity is Granularity.PER_CHANNEL and features:
        return features
    raise ConfigError(f"{name} has no {spec.granularity} quantizer; give it per_tensor by a quant rule")


def _weight_grouping(
    name: str, spec: QuantSpec, shape: tuple[int, ...], heads: int | None, out_blocks: int, out_heads: int | None
) -> Grouping:
    numel = prod(shape)
    if spec.granularity is Granularity.PER_TENSOR:
        return Grouping(out_blocks, numel // out_blocks)
    if spec.granularity is Granularity.PER_CHANNEL:
        return Grouping(shape[0], numel // shape[0])
    if spec.granularity is Granularity.PER_TOKEN:
        raise ConfigError(f"{name} is a weight; per_token is for activations, match them with *.input and the like")
    if out_heads:
        return Grouping(out_blocks * out_heads, numel // (out_blocks * out_heads))
    if heads:
        return Grouping(heads, shape[1] // heads)
    raise ConfigError(f"{name} has no heads; give it per_tensor or per_channel by a quant rule")
