"""The shared vocabulary of quantization: ranges, granularities, groupings, sites and the policy that orders them.

Standard library only, so that configuration, packing and kernels can all speak it without torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from math import inf, prod
from typing import Any, NamedTuple

from dsquant.errors import ConfigError

MIN_BITS, MAX_BITS = 1, 8
SCALE_FLOOR = 1e-6  # no scale is smaller


class Granularity(StrEnum):
    """Name how many elements share one scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_HEAD = "per_head"
    PER_TOKEN = "per_token"  # activations only: one scale a position (OFQ)


class Method(StrEnum):
    """Name how codes and scales are made.

    lsq: learned scale, levels at integers (Esser et al. 2020). seq: learned scale, levels at half integers (ParetoQ).
    ternary: learned scale, levels -1, 0, 1 of equal bins (ParetoQ). elastic: 1 bit, learned scale (BiT).
    statsq: scale 2 mean|w|, levels at half integers (OFQ). bwn: 1 bit, scale mean|w| around mean(w) (BWN, BiT).
    """

    LSQ = "lsq"
    SEQ = "seq"
    TERNARY = "ternary"
    ELASTIC = "elastic"
    STATSQ = "statsq"
    BWN = "bwn"


class Bias(StrEnum):
    """Name the learned per-feature biases around an activation quantizer: before it (BiT), or on both sides (OFQ)."""

    NONE = "none"
    BEFORE = "before"
    AROUND = "around"


LEARNED = frozenset({Method.LSQ, Method.SEQ, Method.TERNARY, Method.ELASTIC})  # the scale is trained
OF_ACTIVATIONS = frozenset({Method.LSQ, Method.ELASTIC})
STATISTICS = frozenset({Method.STATSQ, Method.BWN})  # the scale follows from the tensor itself
BITS_OF_METHOD = {Method.TERNARY: 2, Method.ELASTIC: 1, Method.BWN: 1}


class Levels(NamedTuple):
    """Describe the grid of a quantizer in units of its scale, v = (x - offset) / scale.

    code = round(clip(v - shift, qmin, qmax)), half to even, and x_hat = scale * (code + shift) + offset. The gradient
    passes where v lies within `reach` of the outermost levels, edges included. `elastic` says that the gradient of the
    scale takes the level alone (BiT) and not its distance from v (LSQ).
    """

    qmin: int
    qmax: int
    shift: float = 0.0
    reach: float = 0.0
    elastic: bool = False

    @property
    def low(self) -> float:
        return self.qmin + self.shift - self.reach

    @property
    def high(self) -> float:
        return self.qmax + self.shift + self.reach


def qrange(n_bits: int, signed: bool) -> tuple[int, int]:
    """Return (qmin, qmax), the smallest and largest code of an n-bit uniform quantizer.

    Signed: (-2^(b-1), 2^(b-1) - 1). Unsigned: (0, 2^b - 1). Source: LSQ (Esser et al. 2020), section 2.
    """
    if not MIN_BITS <= n_bits <= MAX_BITS:
        raise ConfigError(f"n_bits is {n_bits}; quantizers take {MIN_BITS} to {MAX_BITS} bits")
    return (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)


def check_bits(method: Method, n_bits: int) -> None:
    """Raise ConfigError for bits that a method does not have."""
    wanted = BITS_OF_METHOD.get(method)
    if wanted not in (None, n_bits):
        raise ConfigError(f"method {method} takes n_bits {wanted}, not {n_bits}; change one of the two")


def levels_of(method: Method, n_bits: int, signed: bool) -> Levels:
    """Return the grid of a method. Raises ConfigError for bits or a sign that the method has no grid for."""
    qmin, qmax = qrange(n_bits, signed)
    check_bits(method, n_bits)
    if method is Method.ELASTIC:
        return Levels(qmin, qmax, 0.5, 0.0, elastic=True) if signed else Levels(qmin, qmax)
    if method is Method.LSQ:
        if n_bits == 1 and signed:
            raise ConfigError("1 bit has no signed lsq levels; use method elastic (or bwn, statsq for weights)")
        return Levels(qmin, qmax)
    if not signed:
        raise ConfigError(f"method {method} is for signed tensors")
    if method is Method.TERNARY:
        return Levels(-1, 1, 0.0, 0.5)
    return Levels(qmin, qmax, 0.5, 0.5 if method is Method.SEQ else inf)


@dataclass(frozen=True)
class QuantSpec:
    """Say how one tensor is quantized, on the grid that `levels` describes.

    Attributes:
        n_bits: bits of a code, 1 to 8.
        signed: whether codes run from -2^(b-1) or from 0.
        granularity: how many elements share a scale.
        offset: whether a learned float offset is part of the quantizer (activations only).
        lr_scale: multiplier of the learning rate of this quantizer's scale and offset.
        method: how codes and scales are made.
        bias: whether learned per-feature biases stand before and after the quantizer (inputs of linear layers; OFQ, and
            before it alone in BiT).
    """

    n_bits: int
    signed: bool = True
    granularity: Granularity = Granularity.PER_TENSOR
    offset: bool = False
    lr_scale: float = 1.0
    method: Method = Method.LSQ
    bias: Bias = Bias.NONE

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", Granularity(self.granularity))
        object.__setattr__(self, "method", Method(self.method))
        object.__setattr__(self, "bias", Bias(self.bias))
        levels_of(self.method, self.n_bits, self.signed)

    @property
    def levels(self) -> Levels:
        return levels_of(self.method, self.n_bits, self.signed)

    @property
    def qmin(self) -> int:
        return self.levels.qmin

    @property
    def qmax(self) -> int:
        return self.levels.qmax

    @property
    def has_centre(self) -> bool:
        """Say whether codes are decided around the mean of the group, which is kept beside the scale."""
        return self.method is Method.BWN

    @property
    def grad_qmax(self) -> int:
        """Return the qmax of LSQ's gradient factor: at least 1, also at 1 bit (BiT)."""
        return max(1, self.qmax)


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

    `fused` is how many weights of the method lie in this parameter, one below another: 3 for a fused q, k, v. A site may
    be `rows` [start, stop) of its parameter alone: shape and grouping are then those of the rows, the others stay float.
    """

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec
    grouping: Grouping
    fused: int = 1
    rows: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def first(self) -> int:
        """Return the site's first element in its parameter."""
        return 0 if self.rows is None else self.rows[0] * (self.numel // self.shape[0])

    def of(self, parameter: Any) -> Any:
        """Return the site's part of its whole parameter, or of any tensor of that shape."""
        return parameter if self.rows is None else parameter[self.rows[0] : self.rows[1]]

    @property
    def roles(self) -> tuple[str, ...]:
        """Return the values that a site has, each (n_groups,)."""
        return ("scale", "centre") if self.spec.has_centre else ("scale",)


@dataclass(frozen=True)
class ActivationSite:
    """Name a quantized activation, its spec, its number of scale groups and the elements of one sample per group.

    `features` is the size of its last dimension, which biases have.
    """

    name: str
    spec: QuantSpec
    n_groups: int = 1
    numel: int = 1
    features: int = 1

    @property
    def values(self) -> dict[str, int]:
        """Return what the site learns, by role, and how many values each has."""
        found = {"scale": self.n_groups}
        if self.spec.offset:
            found["offset"] = self.n_groups
        if self.spec.bias is not Bias.NONE:
            found["before"] = self.features
        if self.spec.bias is Bias.AROUND:
            found["after"] = self.features
        return found


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
    `qk_reparam` asks for the product of q and k weights as a site in place of the two (OFQ's QKR).
    """

    def __init__(
        self, weight: QuantSpec, activation: QuantSpec, rules: Iterable[PolicyRule] = (), *, qk_reparam: bool = False
    ):
        self.weight, self.activation, self.rules, self.qk_reparam = weight, activation, tuple(rules), qk_reparam
        self._names: list[str] = []
        self._matched: set[int] = set()

    def weight_spec(self, name: str) -> QuantSpec | None:
        """Return the spec of the weight `name`, or None where it stays float. Raises ConfigError for an offset."""
        spec = self._resolve(name, self.weight)
        if spec is not None and (spec.offset or spec.bias is not Bias.NONE):
            raise ConfigError(
                f"a quant rule gives {name} an offset or a bias; weights are symmetric, match activations (*.input)"
            )
        return spec

    def activation_spec(self, name: str, *, signed: bool, offset: bool, linear: bool = False) -> QuantSpec | None:
        """Return the spec of the activation `name`; `signed` is the site's nature, `offset` its own default.

        `linear` says that it is the input of a linear layer: the only sites that a default `bias` reaches. Raises
        ConfigError for a method that is for weights alone, and for a rule that gives another site a bias.
        """
        default = self.activation if linear else replace(self.activation, bias=Bias.NONE)
        spec = self._resolve(name, default, signed=signed, offset=self.activation.offset or offset)
        if spec is not None and spec.bias is not Bias.NONE and not linear:
            raise ConfigError(f"a quant rule gives {name} a bias; only inputs of linear layers take one")
        if spec is not None and spec.method not in OF_ACTIVATIONS:
            raise ConfigError(f"{name} is an activation and {spec.method} is for weights; methods: lsq, elastic")
        return spec

    def _resolve(self, name: str, spec: QuantSpec, **changes: object) -> QuantSpec | None:
        """Change a default by the site's own nature and then by the rules; only the result has to make sense."""
        self._names.append(name)
        quantize, matching = True, []
        for index, rule in enumerate(self.rules):
            if fnmatchcase(name, rule.match):
                self._matched.add(index)
                quantize = rule.quantize
                changes |= rule.changes
                matching.append(rule.match)
        try:
            return replace(spec, **changes) if quantize else None
        except ConfigError as error:
            rules = f"quant rules {matching}" if matching else "quant defaults"
            raise ConfigError(f"{name}, by the {rules}: {error}") from None

    def finish(self) -> None:
        """Raise ConfigError naming the first rule that matched no site of the model."""
        for index, rule in enumerate(self.rules):
            if index not in self._matched:
                shown = ", ".join([*self._names[:3], "...", *self._names[-3:]])
                raise ConfigError(f"quant rule {rule.match!r} matches no site of this model; its sites are {shown}")
