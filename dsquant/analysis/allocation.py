"""Mixed bit allocation: the bits of each layer that cost the least loss within a size, as an integer program.

minimise sum_g sum_b c[g, b] x[g, b]  subject to  sum_b x[g, b] = 1 for each group g,
sum_g sum_b numel[g] * b * x[g, b] <= budget,  x binary;
c[g, b] is the measured increase of the loss when group g alone is quantized at b bits. Solved exactly by HiGHS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import Bounds, LinearConstraint, milp

from dsquant.config import QuantConfig, RunConfig, StageConfig
from dsquant.errors import ConfigError, DsquantError
from dsquant.files import write_atomically
from dsquant.spec import check_bits

CANDIDATES = (2, 3, 4, 8)


@dataclass(frozen=True)
class Group:
    """Name a site or layer whose bits are chosen together, its number of elements and its cost at each choice of bits."""

    name: str
    numel: int
    costs: Mapping[int, float]


def allocate(groups: Sequence[Group], budget: int) -> dict[str, int]:
    """Return the bits of each group: of all choices within `budget` (bits of all elements together), one of least cost.

    Raises ConfigError where even the fewest bits exceed the budget.
    """
    if not groups:
        raise ConfigError("there is nothing to allocate: the policy quantizes no such site")
    numel = sum(group.numel for group in groups)
    least = sum(group.numel * min(group.costs) for group in groups)
    if least > budget:
        raise ConfigError(
            f"a budget of {budget / numel:.3f} bits is below the least possible, {least / numel:.3f}; "
            "raise the budget or offer fewer bits as candidates"
        )
    choices = [(index, bits, cost) for index, group in enumerate(groups) for bits, cost in sorted(group.costs.items())]
    one_each = np.zeros((len(groups), len(choices)))
    for column, (index, _, _) in enumerate(choices):
        one_each[index, column] = 1
    loads = [groups[index].numel * bits for index, bits, _ in choices]
    unit = gcd(*loads)  # small whole coefficients: the solver's tolerance then cannot reach one unit
    solved = milp(
        np.array([cost for _, _, cost in choices]),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([[load // unit for load in loads]]), ub=budget // unit),
        ],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise DsquantError(f"the integer program was not solved: {solved.message}")
    chosen = {groups[index].name: bits for (index, bits, _), x in zip(choices, solved.x, strict=True) if x > 0.5}
    if len(chosen) != len(groups) or size_of(groups, chosen) > budget:
        raise DsquantError(f"the solver's answer breaks the budget of {budget} bits: {solved.message}")
    return chosen


def size_of(groups: Sequence[Group], bits: Mapping[str, int]) -> int:
    """Return the bits that all groups take together."""
    return sum(group.numel * bits[group.name] for group in groups)


def cost_of(groups: Sequence[Group], bits: Mapping[str, int]) -> float:
    """Return the sum of the groups' costs, which takes their effects for additive."""
    return sum(group.costs[bits[group.name]] for group in groups)


def rules_of(bits: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the policy rules, one a site, that give each site its bits."""
    return [{"match": name, "n_bits": n_bits} for name, n_bits in bits.items()]


def write_policy(path: str | Path, bits: Mapping[str, int], note: str) -> Path:
    """Write `rules:` as a recipe's `stages.NAME.quant` takes them; last in that list they have the last word."""
    return _write(path, {"rules": rules_of(bits)}, note)


def write_recipe(path: str | Path, config: RunConfig, stage: str, bits: Mapping[str, int], note: str) -> Path:
    """Write a whole recipe: `config` with the rules of an allocation after those that its stage has."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {path}: a recipe is a .yaml file")
    tree = config.model_dump(mode="json", exclude_unset=True)
    kept = [rule.model_dump(mode="json", exclude_defaults=True) for rule in quantized_stage(config, stage).quant.rules]
    tree["recipe"] = path.stem
    tree["stages"][stage]["quant"]["rules"] = [*kept, *rules_of(bits)]
    return _write(path, tree, note)


def quantized_stage(config: RunConfig, stage: str | None) -> StageConfig:
    """Return a stage that quantizes. Raises ConfigError naming those that do."""
    having = [name for name, other in config.stages.items() if other.quant is not None]
    if stage not in having:
        raise ConfigError(f"stage {stage!r} of recipe {config.recipe} quantizes nothing; those that do: {having}")
    return config.stages[stage]


def default_stage(config: RunConfig, candidates: Sequence[int]) -> str | None:
    """Return the last stage whose weights can have all of the candidate bits, or the last that quantizes where none can."""
    having = [name for name, stage in config.stages.items() if stage.quant is not None]
    able = [name for name in having if can_have(config.stages[name].quant, candidates)]
    return next(reversed(able or having), None)


def allocatable(config: RunConfig, stage: str | None, candidates: Sequence[int]) -> QuantConfig:
    """Return the quantization of a stage whose bits can be chosen among the candidates. Raises ConfigError naming such stages.

    BWN and elastic binarization have 1 bit and ternary has 2: there is nothing to choose.
    """
    quant = quantized_stage(config, stage).quant
    if not can_have(quant, candidates):
        others = [name for name, s in config.stages.items() if s.quant is not None and can_have(s.quant, candidates)]
        raise ConfigError(
            f"stage {stage!r} of recipe {config.recipe} has weights of method {quant.weight.method}, which cannot have "
            f"{'/'.join(map(str, candidates))} bits; stages that can, for --stage: {others or 'none'}"
        )
    return quant


def can_have(quant: QuantConfig, candidates: Sequence[int]) -> bool:
    """Say whether the weights of a stage, by their method, can have each of the candidate bits."""
    try:
        for n_bits in candidates:
            check_bits(quant.weight.method, n_bits)
    except ConfigError:
        return False
    return True


def _write(path: str | Path, tree: dict[str, Any], note: str) -> Path:
    path = Path(path)
    text = "".join(f"# {line}\n" for line in note.splitlines())
    write_atomically(path, text + yaml.safe_dump(tree, sort_keys=False, width=120))
    return path
