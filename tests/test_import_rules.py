"""Imports point one way, and each dependency stays in the layers that own it.

The three tables below are the rules; `violations` reads every import of a file from its syntax tree (in functions and
under `if TYPE_CHECKING` too, relative ones and `importlib.import_module("name")` included) and holds it against them.
"""

import ast
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# layer (a file or package directly in dsquant/) -> the other layers it may import. Nothing else: imports point down.
VOCABULARY = {"spec", "errors", "config", "files"}
KERNELS = VOCABULARY | {"ops"}
MODELS = KERNELS | {"quant", "models"}
ENGINE = MODELS | {"shard", "launcher"}
LAYERS = {
    "dsquant": {"models"},  # dsquant/__init__.py, in functions alone
    "errors": set(),
    "files": set(),
    "nonfinite": set(),
    "heartbeat": set(),
    "launcher": {"errors"},
    "spec": {"errors"},
    "config": {"spec", "errors"},
    "ops": {"spec", "errors"},
    "quant": KERNELS,
    "shard": KERNELS | {"quant"},
    "models": KERNELS | {"quant"},
    "losses": VOCABULARY,
    "run_folder": VOCABULARY,
    "preemption": set(),
    "run_data": VOCABULARY | {"data", "engine", "evaluation", "models", "run_folder"},
    "data": VOCABULARY,
    "telemetry": VOCABULARY,
    "analysis": ENGINE | {"checkpoint", "data", "evaluation", "run_folder", "telemetry", "convert"},
    "export": MODELS | {"config", "files"},
    "evaluation": VOCABULARY | {"models", "data"},
    "convert": MODELS | {"config", "checkpoint", "evaluation", "export", "data", "run_folder"},
    "engine": ENGINE,
    "benchmarks": ENGINE | {"engine", "data", "export", "footprint", "memory", "plan"},
    "doctor": ENGINE | {"engine", "data", "run_data", "analysis"},
    "checkpoint": ENGINE | {"engine"},
    "checkpoint_weights": ENGINE | {"engine", "checkpoint"},
    "memory": set(),
    "footprint": ENGINE | {"engine", "losses", "memory"},
    "plan": VOCABULARY | {"footprint", "memory"},
    "soft_labels": MODELS | {"config", "engine", "checkpoint", "data", "preemption"},
    "loop": ENGINE
    | {
        "engine",
        "checkpoint",
        "checkpoint_weights",
        "evaluation",
        "losses",
        "data",
        "telemetry",
        "analysis",
        "export",
        "convert",
        "run_folder",
        "run_data",
        "preemption",
        "nonfinite",
        "heartbeat",
    },
    "train": ENGINE
    | {"engine", "checkpoint", "losses", "data", "telemetry", "analysis", "export", "convert", "loop", "run_folder"}
    | {"preemption", "heartbeat"},
}
LAYERS["tools"] = set(LAYERS)  # tools/*.py: thin command lines over any layer

# dependency -> the layers that may import it; a dependency that is not listed is free for all layers but STDLIB_ONLY.
DEPENDENCIES = {
    "deepspeed": {"engine", "checkpoint", "shard"},
    "wandb": {"telemetry"},
    "webdataset": {"data", "benchmarks"},
    "timm": {"models", "export", "data"},
    "transformers": {"models", "export", "data"},
    "triton": {"ops"},
    "matplotlib": {"analysis"},
}

# layer -> the only dependencies it may import: these are read where torch is absent or must not be loaded.
STDLIB_ONLY = {"dsquant": set(), "errors": set(), "launcher": set(), "spec": set(), "config": {"pydantic", "yaml"}}

FORBIDDEN_NAMES = {"utils", "common", "base"}
THIN = 120  # lines of a file in tools/
NOT_THIN = {"bench.py"}


def source_files():
    return sorted([*REPO.glob("dsquant/**/*.py"), *REPO.glob("tools/**/*.py")])


def layer_of(path):
    """Return the row of LAYERS for a path relative to the repository: dsquant/shard/fragments.py -> shard."""
    parts = Path(path).with_suffix("").parts
    if parts[0] == "tools":
        return "tools"
    return "dsquant" if parts[1] == "__init__" else parts[1]


def imported_names(tree, path):
    """Yield (line, dotted name) for every import; `from a import b` yields a.b, so that b may be a module."""
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def broken_rule(layer, name):
    """Return the rule that importing the dotted `name` in `layer` breaks, or None."""
    top, *rest = name.split(".")
    if top == "dsquant":
        target = rest[0] if rest and rest[0] in LAYERS else "dsquant"  # `from dsquant import __version__`
        if target in LAYERS[layer] | {layer, "dsquant"}:
            return None
        return f"{layer} may import only {sorted(LAYERS[layer]) or 'nothing'} from dsquant"
    if top in DEPENDENCIES and layer not in DEPENDENCIES[top]:
        return f"{top} belongs to {sorted(DEPENDENCIES[top])}"
    if layer in STDLIB_ONLY and top not in STDLIB_ONLY[layer] | sys.stdlib_module_names:
        return f"{layer} may import only {sorted(STDLIB_ONLY[layer]) or 'nothing'} beside the standard library"
    return None


def violations(path, source):
    """Return one line for every import in `source` that the tables forbid for a file at `path`."""
    layer = layer_of(path)
    if layer not in LAYERS:
        return [f"{path}: '{layer}' has no row in LAYERS of tests/test_import_rules.py: say what it may import"]
    found = []
    for line, name in imported_names(ast.parse(source), path):
        rule = broken_rule(layer, name)
        if rule:
            found.append(f"{path}:{line}: imports {name}, but {rule}")
    return found


def test_every_import_follows_the_tables():
    found = []
    for path in source_files():
        found += violations(path.relative_to(REPO).as_posix(), path.read_text())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (
            "dsquant/quant/act.py",
            "import deepspeed",
            "dsquant/quant/act.py:1: imports deepspeed, but deepspeed belongs",
        ),
        ("dsquant/loop.py", "def f():\n    from wandb import init", "dsquant/loop.py:2: imports wandb.init"),
        (
            "dsquant/loop.py",
            "if TYPE_CHECKING:\n    import deepspeed.comm",
            "dsquant/loop.py:2: imports deepspeed.comm",
        ),
        ("dsquant/loop.py", "importlib.import_module('triton')", "imports triton, but triton belongs to ['ops']"),
        ("tools/bench.py", "import timm", "imports timm, but timm belongs to ['data', 'export', 'models']"),
        ("dsquant/quant/act.py", "from dsquant.shard import x", "imports dsquant.shard.x, but quant may import only"),
        ("dsquant/quant/act.py", "from dsquant import shard", "imports dsquant.shard, but quant may import only"),
        ("dsquant/quant/act.py", "from ..shard import x", "imports dsquant.shard.x, but quant may import only"),
        ("dsquant/export/convert.py", "import dsquant.checkpoint", "but export may import only"),
        ("dsquant/models/vit.py", "from dsquant.engine import Engine", "but models may import only"),
        ("dsquant/data/text.py", "from dsquant.models import vit", "but data may import only"),
        ("dsquant/spec.py", "import torch", "but spec may import only nothing beside the standard library"),
        ("dsquant/config.py", "import torch.nn", "but config may import only ['pydantic', 'yaml'] beside"),
        ("dsquant/helpers.py", "", "'helpers' has no row in LAYERS"),
    ],
)
def test_a_forbidden_import_is_reported_with_its_place_and_rule(path, source, expected):
    (found,) = violations(path, source)
    assert expected in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "dsquant/shard/fragments.py",
            "import deepspeed\nfrom . import optimizer\nfrom dsquant.shard import fragments",
        ),
        ("dsquant/shard/optimizer.py", "from dsquant.quant import QuantState\nfrom ..spec import QuantSpec"),
        ("dsquant/config.py", "import pydantic, yaml\nfrom dsquant.spec import QuantSpec"),
        ("dsquant/export/packed.py", "import torch\nfrom dsquant import __version__"),
        ("dsquant/train.py", "from dsquant.loop import run"),
        ("tools/convert.py", "import fire\nfrom dsquant.checkpoint import load\nfrom dsquant.export import convert"),
    ],
)
def test_an_allowed_import_is_not_reported(path, source):
    assert violations(path, source) == []


def test_pictures_alone_need_matplotlib():
    importing = []
    for path in source_files():
        names = imported_names(ast.parse(path.read_text()), path.relative_to(REPO).as_posix())
        if any(name.split(".")[0] == "matplotlib" for _, name in names):
            importing.append(path.relative_to(REPO).as_posix())
    assert importing == ["dsquant/analysis/plots.py"]


def test_the_layers_have_no_cycle():
    """Peel off, again and again, the layers that import only what is peeled off already: none may remain."""
    left = {layer: allowed - {layer} for layer, allowed in LAYERS.items() if layer != "tools"}
    while ready := [layer for layer, allowed in left.items() if not allowed & left.keys()]:
        for layer in ready:
            del left[layer]
    assert not left


def test_no_module_bears_the_name_of_the_standard_library_or_of_an_installed_package():
    """`deepspeed dsquant/train.py` puts dsquant/ first on sys.path: such a module would hide the other one."""
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    entries = [p for p in (REPO / "dsquant").iterdir() if p.suffix == ".py" or p.is_dir()]
    for name in {p.stem for p in entries} - {"__init__", "__pycache__"}:
        assert name not in sys.stdlib_module_names, f"dsquant/{name} hides {name} of the standard library"
        found = PathFinder.find_spec(name, installed)
        assert found is None or found.loader is None, f"dsquant/{name} hides the package at {found.origin}"


def test_no_file_has_a_name_that_says_nothing():
    assert not [str(p) for p in source_files() if p.stem in FORBIDDEN_NAMES]


def test_tools_hold_no_logic():
    for path in REPO.glob("tools/*.py"):
        source = path.read_text()
        lines = len(source.splitlines())
        assert path.name in NOT_THIN or lines < THIN, f"{path.name} has {lines} lines: move its logic into dsquant/"
        classes = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
        assert not classes, f"{path.name} defines {classes}: move them into dsquant/"


@pytest.mark.parametrize("heavy", ["deepspeed", "triton", "wandb"])
def test_importing_dsquant_loads_no_heavy_dependency(heavy):
    code = f"import sys, dsquant; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.mark.parametrize("module", ["dsquant", "dsquant.errors", "dsquant.spec", "dsquant.config"])
def test_the_package_and_its_vocabulary_load_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
