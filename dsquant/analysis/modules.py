"""Modules of a model as its variation is spoken of: layers, and q, k, v and probabilities of each attention.

A part is what can be quantized by itself: an activation site, or some rows of a weight. Of a fused q, k, v weight the
rows of each are a part, so that value projections can be told from queries and keys.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from dsquant.errors import ConfigError
from dsquant.models import Sites
from dsquant.spec import WeightSite

FUSED = {2: "kv", 3: "qkv"}
LAYERS_OF = {
    "q": "query",
    "k": "key",
    "v": "value",
}  # where they are apart: layers of BERT, and the sites of what they give
What = Literal["both", "weights", "activations"]


class Part(NamedTuple):
    """Name an activation site, or rows [start, stop) of a weight."""

    site: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Module:
    """Name parts that are quantized together. `kind` is the name within its block, `block` the name of that."""

    name: str
    kind: str
    block: str | None
    parts: frozenset[Part]


def split_name(name: str) -> tuple[str | None, str]:
    """Return (block, kind) of a dotted name: what stands up to its last number, and the rest.

    `blocks.3.attn.q` is ("blocks.3", "attn.q"), `patch_embed.proj` is (None, "patch_embed.proj").
    """
    words = name.split(".")
    cut = max((i + 1 for i, word in enumerate(words[:-1]) if word.isdecimal()), default=0)
    return ".".join(words[:cut]) or None, ".".join(words[cut:])


def layer_of(site: str) -> str:
    """Return the layer of a weight or of its input, and of another activation its own name."""
    return site.removesuffix(".input").removesuffix(".weight")


def fused_rows(site: WeightSite) -> dict[str, tuple[int, int]]:
    """Return the rows of each weight that lies in a fused one, by module name (`blocks.0.attn.v`); none otherwise."""
    if site.fused == 1:
        return {}
    if site.fused not in FUSED:
        raise ConfigError(f"{site.name} fuses {site.fused} weights; analysis knows {FUSED}")
    parent, rows = layer_of(site.name).rpartition(".")[0], site.shape[0] // site.fused
    return {f"{parent}.{x}".lstrip("."): (i * rows, (i + 1) * rows) for i, x in enumerate(FUSED[site.fused])}


def find_modules(sites: Sites, what: What = "both") -> list[Module]:
    """Return every module of a model in its order: layers (input and weight) and the sites of attention.

    A fused weight belongs to its own layer as a whole (`attn.qkv`) and by rows to `attn.q`, `attn.k` and `attn.v`, next
    to the activation of that name. Where q, k and v have a layer each (`self.query`), it takes that activation in. `what`
    keeps the parts that are weights or activations only.
    """
    if what not in ("both", "weights", "activations"):
        raise ConfigError(f"what is {what!r}; choose both, weights or activations")
    layers = {layer_of(name) for name in (*sites.quantizers, *(site.name for site in sites.weights))}
    found: dict[str, set[Part]] = {name: set() for name in _in_order(sites, layers)}
    for name in sites.quantizers:
        found[_module_of(name, layers)].add(Part(name))
    for site in sites.weights:
        found[layer_of(site.name)].add(Part(site.name, (0, site.shape[0])))
        for name, rows in fused_rows(site).items():
            found.setdefault(name, set()).add(Part(site.name, rows))
    wanted = {"both": (True, False), "weights": (False,), "activations": (True,)}[what]
    kept = {name: frozenset(p for p in parts if (p.rows is None) in wanted) for name, parts in found.items()}
    return [Module(name, split_name(name)[1], split_name(name)[0], parts) for name, parts in kept.items() if parts]


def _in_order(sites: Sites, layers: Collection[str]) -> list[str]:
    """Return module names as the model has them: by activations, and a layer without one (embeddings) by its weight."""
    names = list(dict.fromkeys(_module_of(name, layers) for name in sites.quantizers))
    after = 0
    for name in (layer_of(site.name) for site in sites.weights):
        if name not in names:
            names.insert(after, name)
        after = names.index(name) + 1
    return names


def _module_of(site: str, layers: Collection[str]) -> str:
    """Return the layer of an activation site; of q, k or v the layer that gives it, where it has one to itself."""
    parent, _, last = site.rpartition(".")
    giver = f"{parent}.{LAYERS_OF.get(last)}"
    return giver if giver in layers else layer_of(site)


def select(modules: Iterable[Module], patterns: str | Iterable[str] | None) -> list[Module]:
    """Return the modules whose name matches any of some globs (one string: separated by commas).

    Raises ConfigError for a pattern that matches no module.
    """
    modules = list(modules)
    if patterns is None:
        return modules
    globs = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    for glob in globs:
        if not any(fnmatchcase(m.name, glob) for m in modules):
            raise ConfigError(f"--modules {glob!r} matches none; modules are {', '.join(m.name for m in modules)}")
    return [m for m in modules if any(fnmatchcase(m.name, glob) for glob in globs)]


def pool(modules: Iterable[Module], by: Literal["module", "kind", "block"]) -> list[Module]:
    """Put modules together that are of one kind in all blocks (every `attn.v`), or that lie in one block."""
    if by not in ("module", "kind", "block"):
        raise ConfigError(f"by is {by!r}; choose module, kind or block")
    pooled: dict[str, set[Part]] = {}
    modules = list(modules)
    if by == "module":
        return modules
    for module in modules:
        name = module.kind if by == "kind" else module.block or module.kind
        pooled.setdefault(name, set()).update(module.parts)
    return [Module(name, name, None, frozenset(parts)) for name, parts in pooled.items()]
