"""One model in which every part can be in float or quantized by itself, switched in place between measurements.

Building a model for each variant would cost more than measuring it. Float weights and their images are both kept; a
switch copies the rows that change and sets the mode of activation quantizers. Scales do not depend on the variant.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsquant.analysis.modules import Part
from dsquant.analysis.subject import Subject, float_logits
from dsquant.config import QuantConfig
from dsquant.errors import ConfigError
from dsquant.models import Sites, insert_sites
from dsquant.quant.calibrate import calibrate
from dsquant.quant.modules import Mode
from dsquant.quant.state import QuantState
from dsquant.shard.whole_weights import weight_images
from dsquant.spec import Granularity, PolicyRule, QuantSpec, SitePolicy


class Variants:
    """Hold a model, its sites, and what each weight is in float and quantized; `quantize_only` makes a variant."""

    def __init__(self, model: nn.Module, sites: Sites, images: dict[str, Tensor]):
        if sites.products:
            raise ConfigError(
                f"{next(iter(sites.products.values())).name} is formed in every forward pass: analysis cannot leave it in float; "
                "analyse a stage without quant.qk_reparam, or the float model (--n_bits)"
            )
        self.model, self.sites = model, sites
        self._parameters = {site.name: model.get_parameter(site.name) for site in sites.weights}
        self._floats = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._images = images
        self._rows: dict[str, frozenset[tuple[int, int]]] = {name: frozenset() for name in self._parameters}
        self.quantize_only(())

    @property
    def everything(self) -> frozenset[Part]:
        """Return all parts: whole weights and every activation site."""
        weights = {Part(site.name, (0, site.shape[0])) for site in self.sites.weights}
        return frozenset(weights | {Part(name) for name in self.sites.quantizers})

    @torch.no_grad()
    def quantize_only(self, parts: Iterable[Part]) -> None:
        """Quantize these parts and leave all others in float."""
        parts = frozenset(parts)
        known = self._parameters.keys() | self.sites.quantizers.keys()
        if odd := sorted(part.site for part in parts if part.site not in known):
            raise ConfigError(f"{odd[0]} is no quantized site of this model")
        for name, parameter in self._parameters.items():
            rows = frozenset(part.rows for part in parts if part.site == name)
            if rows != self._rows[name]:
                parameter.copy_(self._floats[name])
                for start, stop in rows:
                    parameter[start:stop] = self._images[name][start:stop]
                self._rows[name] = rows
        active = {part.site for part in parts if part.rows is None}
        for name, quantizer in self.sites.quantizers.items():
            quantizer.mode = Mode.QUANTIZE if name in active else Mode.FLOAT

    def quantize_all_but(self, parts: Iterable[Part]) -> None:
        """Leave these parts in float and quantize all others; of a fused weight the rows that remain."""
        floats = frozenset(parts)
        remaining = {part for part in self.everything if part.rows is None} - floats
        for site in self.sites.weights:
            spans = sorted(part.rows for part in floats if part.site == site.name)
            remaining |= {Part(site.name, rows) for rows in _complement(spans, site.shape[0])}
        self.quantize_only(remaining)


def _complement(spans: list[tuple[int, int]], stop: int) -> list[tuple[int, int]]:
    """Return what sorted spans, which may overlap, leave of [0, stop)."""
    left, at = [], 0
    for low, high in spans:
        if low > at:
            left.append((at, low))
        at = max(at, high)
    return [*left, (at, stop)] if at < stop else left


def uniform_policy(n_bits: int, granularity: str = "per_tensor") -> SitePolicy:
    """Return the policy that gives every site, first and last layer included, the same bits: LSQ levels.

    Raises ConfigError for bits or a granularity that not every site can have.
    """
    known = [str(g) for g in Granularity if g is not Granularity.PER_TOKEN]
    if granularity not in known:
        raise ConfigError(f"--granularity is {granularity!r}; weights take {', '.join(known)}")
    weight = QuantSpec(n_bits, granularity=Granularity(granularity))
    return SitePolicy(weight, QuantSpec(n_bits))


def at_bits(quant: QuantConfig, bits: dict[str, int]) -> SitePolicy:
    """Return the policy of a recipe's stage with the bits of some sites, by their exact names, set otherwise."""
    policy = quant.policy()
    rules = [PolicyRule(name, {"n_bits": n_bits}) for name, n_bits in bits.items()]
    return SitePolicy(policy.weight, policy.activation, [*policy.rules, *rules], qk_reparam=policy.qk_reparam)


def post_training(subject: Subject, policy: SitePolicy, *, activations: bool = True) -> Variants:
    """Quantize a float model without training: weight scales of least squared error, calibrated activations.

    Activation scales are fitted to what each site sees in the float model, so that they are the same in every variant.
    With `activations=False` all activations stay in float and are not calibrated, which spares most of the time.
    Raises TrainingError where a site sees nothing or a value that is not finite.
    """
    model = subject.build()
    sites = insert_sites(model, policy)
    if not activations:
        sites.quantizers.clear()  # unbound, they let everything pass
    state = QuantState(sites.weights, sites.activations, subject.device)
    if sites.quantizers:
        with torch.no_grad():
            calibrate(
                sites.quantizers, state, lambda inputs: float_logits(model, inputs), subject.calibration, rounds=1,
                bind=lambda: sites.bind(state, trainable=False),
            )  # fmt: skip
    return Variants(model, sites, weight_images(model, sites.weights))


def trained(subject: Subject) -> Variants:
    """Take the quantizers that a quantized stage has trained: its scales, offsets and codes, and latents as floats."""
    from dsquant.checkpoint import load_model

    if not subject.quantized:
        raise ConfigError(f"{subject.name} has no trained quantizers; give --n_bits, or a quantized --stage")
    quant = subject.checkpoint.config.stages[subject.checkpoint.stage].quant
    model = subject.build()
    sites = insert_sites(model, quant.policy())
    state = QuantState(sites.weights, sites.activations, subject.device)
    state.load_state_dict(subject.checkpoint.replicated("quant"))
    sites.bind(state, trainable=False)
    whole = dict(load_model(subject.checkpoint).named_parameters())
    return Variants(model, sites, {site.name: whole[site.name].detach().to(subject.device) for site in sites.weights})
