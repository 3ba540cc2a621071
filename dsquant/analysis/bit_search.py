"""From measured sensitivities to the bits of each site: what `analyze.py allocate` does between opening and writing."""

from collections.abc import Callable, Iterable
from math import floor
from typing import Any

from dsquant.analysis.allocation import Group, allocate, cost_of, size_of
from dsquant.analysis.modules import Module, Part, split_name
from dsquant.analysis.sensitivity import only_it
from dsquant.analysis.subject import Scores, Subject
from dsquant.analysis.variants import at_bits, post_training
from dsquant.config import QuantConfig
from dsquant.errors import ConfigError
from dsquant.models import Sites, insert_sites

DEFAULT_BUDGET = 3.0
COSTS = ("loss", "kl")
Tracker = Callable[[Iterable[Module]], Iterable[Module]]
Costs = dict[str, dict[int, tuple[float, float]]]


def search_bits(
    subject: Subject, quant: QuantConfig, candidates: tuple[int, ...], *, budget_bits: float | None = None,
    budget_bytes: int | None = None, activation_budget_bits: float | None = None, cost: str = "loss",
    progress: Callable[[str], Tracker] = lambda label: lambda modules: modules,
) -> dict[str, Any]:  # fmt: skip
    """Measure each weight at each candidate, all else in float, and return the allocation as a JSON-ready result.

    The budget of weights is `budget_bits` an element on average (3 by default) or `budget_bytes` of codes; activations
    are allocated where `activation_budget_bits` is given, each site by itself, weighed by its elements in one sample.
    `cost` is what is added up: the increase of the loss, or the KL of predictions from float's, which is less noisy.
    Granularities, methods and sites left in float are those of `quant`. `allocated` and `uniform` are then measured with
    everything quantized; uniform has the most bits that the budget would allow every weight (and activation).
    """
    _check_options(candidates, cost, budget_bits, budget_bytes)
    sites = insert_sites(subject.build(), quant.policy())
    modules = {"weights": [Module(s.name, *_kind(s.name), _whole_weight(s.name, s.shape[0])) for s in sites.weights]}
    if activation_budget_bits is not None:
        modules["activations"] = [Module(n, *_kind(n), frozenset({Part(n)})) for n in sites.quantizers]
    in_float = _float_scores(subject)
    costs = _measure(subject, quant, candidates, modules, in_float, cost, progress)
    numel = {s.name: s.numel for s in sites.weights} | {a.name: a.numel * a.n_groups for a in sites.activations}
    if budget_bytes is None:
        weight_budget = _in_all(budget_bits or DEFAULT_BUDGET, modules["weights"], numel)
    else:
        weight_budget = 8 * int(budget_bytes)
    result = {"subject": subject.name, "samples": len(in_float.losses), "candidates": sorted(candidates), "cost": cost}
    result |= {"float": in_float.summary(), "activations": None}
    result["weights"] = _allocated(modules["weights"], numel, costs, weight_budget)
    if activation_budget_bits is not None:
        budget = _in_all(activation_budget_bits, modules["activations"], numel)
        result["activations"] = _allocated(modules["activations"], numel, costs, budget)
    chosen = bits_of(result)
    result["allocated"] = _quantized_scores(subject, quant, chosen).summary()
    result["uniform"] = _uniform(subject, quant, candidates, result)
    check_resolves(insert_sites(subject.build(), at_bits(quant, chosen)), chosen)
    return result


def _check_options(candidates: tuple[int, ...], cost: str, budget_bits: float | None, budget_bytes: int | None) -> None:
    if cost not in COSTS:
        raise ConfigError(f"--cost is {cost!r}; choose one of {', '.join(COSTS)}")
    if not candidates or not all(type(n_bits) is int for n_bits in candidates):
        raise ConfigError(f"--bits is {candidates}; give whole numbers separated by commas, for example 2,3,4,8")
    if budget_bits is not None and budget_bytes is not None:
        raise ConfigError("give --budget_bits or --budget_bytes, not both")


def _kind(name: str) -> tuple[str, str | None]:
    block, kind = split_name(name)
    return kind, block


def _whole_weight(name: str, rows: int) -> frozenset[Part]:
    return frozenset({Part(name, (0, rows))})


def _in_all(bits: float, modules: list[Module], numel: dict[str, int]) -> int:
    """Return an average budget as bits of all elements together; the epsilon undoes binary fractions (2.1, say)."""
    return floor(bits * sum(numel[module.name] for module in modules) + 1e-6)


def bits_of(result: dict[str, Any]) -> dict[str, int]:
    """Return the bits of every allocated site of a result, weights first."""
    activations = result["activations"] or {"bits": {}}
    return {**result["weights"]["bits"], **activations["bits"]}


def check_resolves(sites: Sites, bits: dict[str, int]) -> None:
    """Raise ConfigError where a policy does not give a site the bits that were allocated to it."""
    specs = {site.name: site.spec for site in [*sites.weights, *sites.activations]}
    for name, n_bits in bits.items():
        if name not in specs or specs[name].n_bits != n_bits:
            raise ConfigError(f"the rules give {name} {getattr(specs.get(name), 'n_bits', 'no')} bits, not {n_bits}")


def _float_scores(subject: Subject) -> Scores:
    return subject.scores(subject.build())


def _measure(
    subject: Subject, quant: QuantConfig, candidates: tuple[int, ...], modules: dict[str, list[Module]],
    in_float: Scores, cost: str, progress: Callable[[str], Tracker],
) -> Costs:  # fmt: skip
    """Return the cost and its standard error of each site at each number of bits, it alone quantized."""
    together = [module for group in modules.values() for module in group]
    costs: Costs = {module.name: {} for module in together}
    for n_bits in sorted(candidates):
        policy = at_bits(quant, {module.name: n_bits for module in together})
        variants = post_training(subject, policy, activations="activations" in modules)
        found = only_it(variants, subject, together, in_float, cost, progress(f"{n_bits} bits"))
        for name, measured in found.items():
            costs[name][n_bits] = measured
    return costs


def _allocated(modules: list[Module], numel: dict[str, int], costs: Costs, budget: int) -> dict[str, Any]:
    groups = [Group(m.name, numel[m.name], {b: cost for b, (cost, _) in costs[m.name].items()}) for m in modules]
    bits = allocate(groups, budget)
    total, size = sum(group.numel for group in groups), size_of(groups, bits)
    return {
        "budget_bits": budget / total,
        "average_bits": size / total,
        "bytes": -(-size // 8),
        "predicted_cost": cost_of(groups, bits),
        "bits": bits,
        "numel": {group.name: group.numel for group in groups},
        "costs": {group.name: {str(b): list(cost) for b, cost in costs[group.name].items()} for group in groups},
    }


def _quantized_scores(subject: Subject, quant: QuantConfig, bits: dict[str, int]) -> Scores:
    variants = post_training(subject, at_bits(quant, bits))
    variants.quantize_only(variants.everything)
    return subject.scores(variants.model)


def _uniform(
    subject: Subject, quant: QuantConfig, candidates: tuple[int, ...], result: dict[str, Any]
) -> dict[str, Any] | None:
    """Measure the same bits everywhere that fit the same budgets; None where the fewest bits do not."""
    bits = {}
    for part in ("weights", "activations"):
        if result[part] is None:
            continue
        fitting = [b for b in candidates if b <= result[part]["budget_bits"]]
        if not fitting:
            return None
        bits |= {name: max(fitting) for name in result[part]["bits"]}
    return {"n_bits": sorted(set(bits.values())), **_quantized_scores(subject, quant, bits).summary()}
