"""Imports go down only, and the engine stands on five packages: read from the source of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [  # from the top; a file may import from its own layer or from one below
    {"cli", "commands", "eval_command", "check", "__main__"},
    {"report", "display"},
    {"demo"},
    {"train"},
    {"evaluate"},
    {"rollout"},
    {"rewards", "tasks"},
    {"sampler"},
    {"losses", "preferences", "reward_losses", "advantages", "metrics", "alarms"},
    {"model", "attention", "checkpoint", "tokenizer", "turns", "chat_template"},
    {"kernels", "sandbox", "foreign"},
    {"tables", "conversation"},
    {"files"},
    {"errors", "__init__"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

ENGINE = {"torch", "triton", "safetensors", "tokenizers", "numpy"}
KERNELS = {"torch", "triton"}  # the folder can be lifted out and used alone
EXTRAS = {"tyro", "rich", "matplotlib", "jinja2", "math_verify", "reasoning_gym"}
ADAPTERS = {
    "minirl.cli",
    "minirl.commands",
    "minirl.eval_command",
    "minirl.report",
    "minirl.display",
    "minirl.check",
    "minirl.chat_template",
    "minirl.rewards.equality",
    "minirl.tasks.reasoning_worker",
}
LAZY = {  # inside a function only: fetching a model by its hub name, and reading tables
    "minirl.checkpoint": {"huggingface_hub"},
    "minirl.tables": {"pyarrow", "datasets"},
}


def sources() -> dict[str, str]:
    """Module name to source; `kernels/x.py` is minirl.kernels.x."""
    files = {path.relative_to(ROOT): path for path in (ROOT / "minirl").rglob("*.py")}
    files |= {"minirl" / path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path.read_text(encoding="utf-8") for name, path in files.items()}


def layer_of(module: str) -> str:
    """The name in LAYERS that a module belongs to: minirl.rewards.math to rewards, minirl itself to __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """Every name that a file imports, absolute, and whether it does so inside a function.

    `from minirl import losses` gives minirl.losses; `import_module("x")` counts like the statement.
    """
    package = module.split(".")[:-1]  # also that of a/__init__.py, whose module is a.__init__ here

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, lazy
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), lazy=False)


def allowed_packages(module: str, lazy: bool) -> set[str]:
    if layer_of(module) == "kernels":
        return KERNELS
    return ENGINE | (EXTRAS if module in ADAPTERS else set()) | (LAZY.get(module, set()) if lazy else set())


def faults(module: str, source: str) -> list[str]:
    """What is wrong with a file's imports, a line each."""
    own = layer_of(module)
    if own not in DEPTH:
        return [f"{module} belongs to no layer: name it in LAYERS"]
    found = []
    for name, lazy in imports(module, source):
        top = name.split(".")[0]
        if top != "minirl":
            if top not in sys.stdlib_module_names | allowed_packages(module, lazy):
                found.append(f"{module} imports {name}, which is not among its packages")
            continue
        other = layer_of(name) if layer_of(name) in DEPTH else "__init__"  # `from minirl import __version__`
        if own == "kernels" != other:
            found.append(f"{module} imports {name}: kernels know nothing of minirl")
        elif DEPTH[other] < DEPTH[own]:
            found.append(f"{module} imports {name}, which is above it")
    return found


@pytest.mark.parametrize("module", sources())
def test_imports_go_down_and_stay_among_the_allowed_packages(module):
    assert faults(module, sources()[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("minirl.losses", "import pandas", "not among its packages"),
        ("minirl.losses", "def f():\n    from pandas.core import frame", "not among its packages"),
        ("minirl.losses", "try:\n    import rich\nexcept ImportError:\n    rich = None", "not among its packages"),
        ("minirl.losses", "from importlib import import_module\nimport_module('pandas')", "not among its packages"),
        ("minirl.losses", "from minirl.sampler import Sampler", "above it"),
        ("minirl.losses", "from minirl import sampler", "above it"),
        ("minirl.losses", "import minirl.sampler", "above it"),
        ("minirl.losses", "def f():\n    from . import sampler", "above it"),
        ("minirl.losses", "__import__('minirl.sampler')", "above it"),
        ("minirl.rewards.rules", "from ..train.grpo import step", "above it"),
        ("minirl.rewards.__init__", "from ..train import grpo", "above it"),
        ("minirl.demo", "from minirl.display import line", "above it"),
        ("minirl.errors", "from minirl.files import read_json", "above it"),
        ("minirl.checkpoint", "import huggingface_hub", "not among its packages"),
        ("minirl.model", "def f():\n    import huggingface_hub", "not among its packages"),
        ("minirl.kernels.logprobs", "from minirl.errors import InputError", "know nothing of minirl"),
        ("minirl.kernels.logprobs", "from ..errors import InputError", "know nothing of minirl"),
        ("minirl.kernels.logprobs", "import numpy", "not among its packages"),
        ("minirl.attic", "import torch", "belongs to no layer"),
    ],
)
def test_the_check_finds(module, source, fault):
    (found,) = faults(module, source)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minirl.cli", "import tyro\nfrom minirl.train.grpo import run"),
        ("minirl.checkpoint", "def f():\n    from huggingface_hub import snapshot_download"),
        ("minirl.losses", "import json, os.path\nimport torch.nn.functional as F\nfrom minirl import __version__"),
        ("minirl.losses", "from . import advantages, errors\nfrom minirl.kernels import token_logprobs"),
        ("minirl.rewards.equality", "import math_verify\nfrom .rules import last_number\nfrom minirl.tasks import gcd"),
        ("minirl.kernels.logprobs", "import triton.language as tl\nfrom .tiles import block\nimport minirl.kernels.x"),
    ],
)
def test_the_check_lets_pass(module, source):
    assert faults(module, source) == []


def test_sources_are_found():
    """A check that reads no file passes; so the files that stay are named."""
    assert {"minirl.model", "minirl.tokenizer", "minirl.kernels.__init__", "minirl.rewards.__init__"} <= set(sources())


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
    engine = sorted(name.removesuffix(".__init__") for name in sources() if name not in ADAPTERS | {"minirl.__main__"})
    done = import_behind_the_wall(engine)
    assert done.returncode == 0, done.stderr


def test_the_wall_stands():
    done = import_behind_the_wall(["pytest"])
    assert "No module named 'pytest'" in done.stderr
