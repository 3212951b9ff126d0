"""Three rooms whose imports go down only, in no circle, and an engine on five packages: read from every source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROOMS = {  # what each room may import of the others
    "lab": {"engine", "judge", "kernels"},
    "engine": {"kernels"},
    "judge": {"leaves"},
    "kernels": set(),
}
LEAVES = {"minirl.errors", "minirl.files", "minirl.thoughts"}  # engine files that stand on nothing

ENGINE = {"torch", "triton", "safetensors", "tokenizers", "numpy"}
PACKAGES = {"engine": ENGINE, "judge": set(), "kernels": {"torch", "triton"}}  # kernels/ can be lifted out
PACKAGES["lab"] = ENGINE | {"tyro", "rich", "matplotlib"}
OWN = {
    "minirl.chat": {"jinja2"},
    "minirl.metered": {"jinja2"},
    "minirl.judge.equality": {"math_verify"},
    "minirl.judge.reasoning_worker": {"reasoning_gym"},
}
LAZY = {  # inside a function only: a model by its hub name, and tables
    "minirl.checkpoint": {"huggingface_hub"},
    "minirl.tables": {"pyarrow", "datasets"},
}


def sources() -> dict[str, str]:
    """Module name to source; `kernels/x.py` is minirl.kernels.x."""
    files = {path.relative_to(ROOT): path for path in (ROOT / "minirl").rglob("*.py")}
    files |= {"minirl" / path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path.read_text(encoding="utf-8") for name, path in files.items()}


SOURCES = sources()
MODULES = {name.removesuffix(".__init__") for name in SOURCES}


def room_of(module: str) -> str:
    part = [*module.split("."), ""][1]
    return part if part in ROOMS else "engine"


def imports(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, absolute, and whether it does so inside a function.

    `from minirl import losses` gives minirl.losses; `import_module("x")` counts like the statement.
    """
    package = module.split(".")[:-1]  # also that of a/__init__.py, whose module is a.__init__ here

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named = (f"{base}.{alias.name}" for alias in node.names)
            yield from ((name if name in MODULES else base, lazy) for name in named)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, lazy
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), lazy=False)


def faults(module: str, source: str) -> list[str]:
    """Return what is wrong with a file's imports, a line each."""
    found, own = [], room_of(module)
    for name, lazy in imports(module, source):
        top = name.split(".")[0]
        if top != "minirl":
            allowed = PACKAGES[own] | OWN.get(module, set()) | (LAZY.get(module, set()) if lazy else set())
            if top not in sys.stdlib_module_names | allowed:
                found.append(f"{module} imports {name}, which is not among its packages")
            continue
        other = "leaves" if own == "judge" and name in LEAVES else room_of(name)
        if other != own and other not in ROOMS[own]:
            found.append(f"{module} imports {name}: the {own} knows nothing of it")
    return found


ENTRIES = {"minirl.__main__", "minirl.__init__"}  # the program and the public names lead into every room


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - ENTRIES))
def test_imports_go_down_and_stay_among_the_allowed_packages(module):
    assert faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("minirl.losses", "import pandas", "not among its packages"),
        ("minirl.losses", "def f():\n    from pandas.core import frame", "not among its packages"),
        ("minirl.losses", "try:\n    import rich\nexcept ImportError:\n    rich = None", "not among its packages"),
        ("minirl.losses", "from importlib import import_module\nimport_module('pandas')", "not among its packages"),
        ("minirl.losses", "from minirl.lab.display import RichDisplay", "knows nothing of it"),
        ("minirl.losses", "from minirl.lab import display", "knows nothing of it"),
        ("minirl.losses", "def f():\n    from .judge import numbers", "knows nothing of it"),
        ("minirl.losses", "__import__('minirl.judge.numbers')", "knows nothing of it"),
        ("minirl.judge.numbers", "from ..sampler import Sampler", "knows nothing of it"),
        ("minirl.judge.numbers", "from minirl.lab.tasks import TASKS", "knows nothing of it"),
        ("minirl.judge.pool", "import torch", "not among its packages"),
        ("minirl.checkpoint", "import huggingface_hub", "not among its packages"),
        ("minirl.model", "def f():\n    import huggingface_hub", "not among its packages"),
        ("minirl.kernels.logprobs", "from minirl.errors import InputError", "knows nothing of it"),
        ("minirl.kernels.logprobs", "from ..errors import InputError", "knows nothing of it"),
        ("minirl.kernels.logprobs", "import numpy", "not among its packages"),
    ],
)
def test_the_check_finds(module, source, fault):
    (found,) = faults(module, source)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minirl.lab.cli", "import tyro\nfrom minirl.grpo import grpo\nfrom minirl.judge.pool import call_each"),
        ("minirl.checkpoint", "def f():\n    from huggingface_hub import snapshot_download"),
        ("minirl.losses", "import json, os.path\nimport torch.nn.functional as F\nfrom minirl import __version__"),
        ("minirl.losses", "from . import advantages, errors\nfrom minirl.kernels import token_logprobs"),
        ("minirl.judge.equality", "import math_verify\nfrom .numbers import x\nfrom minirl.errors import InputError"),
        ("minirl.kernels.logprobs", "import triton.language as tl\nfrom .tiles import block\nimport minirl.kernels.x"),
    ],
)
def test_the_check_lets_pass(module, source):
    assert faults(module, source) == []


def circle(below: dict[str, set[str]]) -> list[str]:
    """Return a circle of modules, of any length, among those that each module imports; empty where there is none."""
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_make_no_circle():
    """Count also what is imported late, inside a function."""
    modules = {module.removesuffix(".__init__"): module for module in SOURCES.keys() - ENTRIES}
    below = {name: {found for found, _ in imports(module, SOURCES[module])} for name, module in modules.items()}
    assert below["minirl.grpo"] & modules.keys() and not circle(below)


def test_circles_of_any_length_are_found():
    ring = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"a"}}
    assert set(circle(ring)) == set(ring) and not circle(ring | {"d": {"e"}})


def test_sources_are_found():
    """A check that reads no file passes; so the files that stay are named."""
    assert {"minirl.model", "minirl.tokenizer", "minirl.kernels.__init__", "minirl.judge.pool"} <= SOURCES.keys()


BLOCKED_IMPORT = """
import importlib, importlib.metadata as metadata, re, sys

def with_dependencies(names):
    seen = set()
    while names:
        name = re.sub("[-_.]+", "-", names.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        names += [re.match("[A-Za-z0-9._-]+", r)[0] for r in required if "extra ==" not in r]
    return seen

installed = with_dependencies(ENGINE)
allowed = {top for top, owners in metadata.packages_distributions().items()
           if any(re.sub("[-_.]+", "-", owner).lower() in installed for owner in owners)}

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed | {"minirl"} | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r} (only the engine's packages are here)", name=name)

sys.meta_path.insert(0, Wall())
for module in MODULES:
    importlib.import_module(module)
"""


def import_behind_the_wall(modules: list[str]) -> subprocess.CompletedProcess:
    script = BLOCKED_IMPORT.replace("ENGINE", repr(sorted(ENGINE))).replace("MODULES", repr(modules))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_the_engine_imports_where_only_its_packages_exist():
    engine = sorted(name for name in MODULES if room_of(name) != "lab" and name not in {"minirl.__main__", *OWN})
    done = import_behind_the_wall(engine)
    assert done.returncode == 0, done.stderr


def test_the_wall_stands():
    done = import_behind_the_wall(["pytest"])
    assert "No module named 'pytest'" in done.stderr
