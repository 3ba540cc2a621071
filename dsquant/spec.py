"""The shared vocabulary of quantization: ranges, granularities, groupings, sites and the policy that orders them.

Standard library only, so that configuration, packing and kernels can all speak it without torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from math import prod

from dsquant.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8


class Granularity(StrEnum):
    """Name how many elements share one scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_HEAD = "per_head"


def qrange(n_bits: int, signed: bool) -> tuple[int, int]:
    """Return (qmin, qmax), the smallest and largest code of an n-bit uniform quantizer.

    Signed: (-2^(b-1), 2^(b-1) - 1). Unsigned: (0, 2^b - 1). Source: LSQ (Esser et al. 2020), section 2.
    """
    if not MIN_BITS <= n_bits <= MAX_BITS:
        raise ConfigError(f"n_bits is {n_bits}; uniform quantizers take {MIN_BITS} to {MAX_BITS} bits")
    return (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)


@dataclass(frozen=True)
class QuantSpec:
    """Say how one tensor is quantized: `x_hat = scale * round(clip((x - offset) / scale, qmin, qmax)) + offset`.

    Attributes:
        n_bits: bits of a code, 2 to 8.
        signed: whether codes run from -2^(b-1) or from 0.
        granularity: how many elements share a scale.
        offset: whether a learned float offset is part of the quantizer (activations only).
        lr_scale: multiplier of the learning rate of this quantizer's scale and offset.
    """

    n_bits: int
    signed: bool = True
    granularity: Granularity = Granularity.PER_TENSOR
    offset: bool = False
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        qrange(self.n_bits, self.signed)
        object.__setattr__(self, "granularity", Granularity(self.granularity))

    @property
    def qmin(self) -> int:
        return qrange(self.n_bits, self.signed)[0]

    @property
    def qmax(self) -> int:
        return qrange(self.n_bits, self.signed)[1]


@dataclass(frozen=True)
class Grouping:
    """Map the elements of a contiguous tensor to quantizer groups: `group(i) = (i // inner) % n_groups`.

    One rule serves every granularity: a whole tensor (1, numel), rows (out, in), the q, k and v blocks of a fused
    projection (3, numel / 3), heads along the output rows (H, head_dim * in) and heads along the input columns
    (H, head_dim), the last of which repeats for every row.
    """

    n_groups: int
    inner: int

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless whole cycles of groups fill a tensor of this shape."""
        if prod(shape) % (self.n_groups * self.inner):
            raise ConfigError(f"{self.n_groups} groups of {self.inner} elements do not divide a weight of {shape}")


@dataclass(frozen=True)
class WeightSite:
    """Name a quantized parameter, its shape, its spec and how its elements fall into scale groups.

    `fused` is how many weights of the method lie in this parameter, one below another: 3 for a fused q, k, v.
    """

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec
    grouping: Grouping
    fused: int = 1

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ActivationSite:
    """Name a quantized activation, its spec, its number of scale groups and the elements of one sample per group."""

    name: str
    spec: QuantSpec
    n_groups: int = 1
    numel: int = 1


@dataclass(frozen=True)
class PolicyRule:
    """Change the spec of every site whose name matches a glob; `quantize=False` leaves the site in float."""

    match: str
    changes: Mapping[str, object] = field(default_factory=dict)
    quantize: bool = True


class SitePolicy:
    """Resolve the spec of each site: a default per kind, then every matching rule in order, the last word winning.

    Sites are named after parameters: `blocks.0.attn.qkv.weight` is a weight; `blocks.0.attn.qkv.input`,
    `blocks.0.attn.probs` and the like are activations. A rule that matches no site is an error, found by `finish`.
    """

    def __init__(self, weight: QuantSpec, activation: QuantSpec, rules: Iterable[PolicyRule] = ()):
        self.weight, self.activation, self.rules = weight, activation, tuple(rules)
        self._names: list[str] = []
        self._matched: set[int] = set()

    def weight_spec(self, name: str) -> QuantSpec | None:
        """Return the spec of the weight `name`, or None where it stays float. Raises ConfigError for an offset."""
        spec = self._resolve(name, self.weight)
        if spec is not None and spec.offset:
            raise ConfigError(
                f"a quant rule gives {name} an offset; weights are symmetric, match activations (*.input)"
            )
        return spec

    def activation_spec(self, name: str, *, signed: bool, offset: bool) -> QuantSpec | None:
        """Return the spec of the activation `name`; `signed` is the site's nature, `offset` its own default."""
        return self._resolve(name, replace(self.activation, signed=signed, offset=self.activation.offset or offset))

    def _resolve(self, name: str, spec: QuantSpec) -> QuantSpec | None:
        self._names.append(name)
        quantize = True
        for index, rule in enumerate(self.rules):
            if fnmatchcase(name, rule.match):
                self._matched.add(index)
                quantize = rule.quantize
                spec = replace(spec, **rule.changes)
        return spec if quantize else None

    def finish(self) -> None:
        """Raise ConfigError naming the first rule that matched no site of the model."""
        for index, rule in enumerate(self.rules):
            if index not in self._matched:
                shown = ", ".join([*self._names[:3], "...", *self._names[-3:]])
                raise ConfigError(f"quant rule {rule.match!r} matches no site of this model; its sites are {shown}")
