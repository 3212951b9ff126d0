"""A sentence never names an option that the command which says it has not."""

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Quiet

from minirl.grpo import GRPOConfig
from minirl.lab import cli
from minirl.lab.tasks import parse_task
from minirl.lab.training import train_grpo

ROOT = Path(__file__).parents[2] / "minirl"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OF_ANOTHER = re.compile(rf"minirl (\w+) ({FLAG.pattern})")  # advice to take another command
PROGRAM = {"--help", "--version"}
# Sentences that the fixed data and options of the demo never meet, and that of a run which says that it is resumable.
FIXED = {"--resume", "--device", "--group", "--max-tokens", "--overlong-prompts", "--system", "--template"}
ELSEWHERE = {"demo": FIXED | {"--fork", "--lr", "--on-nonfinite"}}

Place = tuple[str, str]  # module, name of a function or class in it


def modules() -> dict[str, ast.Module]:
    files = (path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    named = ((path.relative_to(ROOT.parent).with_suffix("").parts, path) for path in files)
    return {".".join(parts): ast.parse(path.read_text(encoding="utf-8")) for parts, path in named}


TREES = modules()
BODIES: dict[Place, ast.AST] = {
    (module, node.name): node
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


def names(module: str) -> dict[str, Place]:
    """What a name of a module stands for, of those that minirl defines."""
    found = {name: (owner, name) for owner, name in BODIES if owner == module}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minirl"):
            for alias in node.names:
                places = [(node.module, alias.name)]  # a package hands on what its modules define
                places += [p for p in BODIES if p[1] == alias.name and p[0].startswith(f"{node.module}.")]
                if known := [place for place in places if place in BODIES]:
                    found[alias.asname or alias.name] = known[-1]
    return found


NAMES = {module: names(module) for module in TREES}


def types_of(tree: ast.AST) -> set[str]:
    """Names that stand in annotations alone: nothing is called by them."""
    notes = [getattr(node, key) for node in ast.walk(tree) for key in ("annotation", "returns") if hasattr(node, key)]
    within = [node for note in notes if note for node in ast.walk(note) if isinstance(node, ast.Name)]
    ids = {id(node) for node in within}
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in ids}
    return {node.id for node in within} - called


def reachable(roots: list[Place]) -> set[Place]:
    """The functions and classes that are mentioned, a class with all its methods: more than can be called."""
    seen, waiting = set(), list(roots)
    while waiting:
        place = waiting.pop()
        if place not in seen:
            seen.add(place)
            used = {node.id for node in ast.walk(BODIES[place]) if isinstance(node, ast.Name)} - types_of(BODIES[place])
            waiting += [NAMES[place[0]][name] for name in used if name in NAMES[place[0]]]
    return seen


def flags(tree: ast.AST) -> Iterator[str]:
    """Options in texts, docstrings left out."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield from FLAG.findall(OF_ANOTHER.sub("", node.value))


def roots() -> dict[str, list[Place]]:
    """The config and the functions of each command, as the table of commands names them."""
    tree, known = TREES["minirl.lab.commands"], NAMES["minirl.lab.commands"]
    [table] = [node.value for node in tree.body if "COMMANDS" in ast.unparse(getattr(node, "target", ast.Pass()))]
    return {
        key.value: [known[node.id] for node in ast.walk(value) if isinstance(node, ast.Name) and node.id in known]
        for key, value in zip(table.keys, table.values, strict=True)
    }


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_sentences_name_only_options_that_the_command_has(command):
    options = set(cli._options(cli.COMMANDS[command][0])) | PROGRAM | ELSEWHERE.get(command, set())
    named = {(flag, place) for place in reachable(roots()[command]) for flag in flags(BODIES[place])}
    assert not {(flag, place) for flag, place in named if flag not in options}


def test_advice_to_take_another_command_names_its_options():
    found = {match for path in ROOT.rglob("*.py") for match in OF_ANOTHER.findall(path.read_text(encoding="utf-8"))}
    assert ("reward", "--kind") in found
    for command, flag in found:
        assert command == "COMMAND" or flag in {*cli._options(cli.COMMANDS[command][0]), *PROGRAM}


def test_the_walk_reaches_sentences_far_below_a_command():
    found = {flag for place in reachable(roots()["grpo"]) for flag in flags(BODIES[place])}
    assert {"--resume", "--out", "--device", "--overlong-prompts", "--group"} <= found
    assert "--heldout" not in found and "--scorer" not in found
    assert ("minirl.policy", "pick_device") in reachable(roots()["generate"])


class Interrupting(Quiet):
    """Ctrl-C while the first step samples."""

    def progress(self, stage: str, done: int, total: int) -> None:
        super().progress(stage, done, total)
        if [bar[0] for bar in self.bars].count("rollout") == 1 and stage == "rollout":
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("made_by_hand", [True, False])
def test_a_run_without_a_command_of_its_own_is_not_told_to_resume(made_by_hand, checkpoint, tmp_path):
    """The demo makes its task and calls the trainer; its command has no --resume."""
    spec, out = "arithmetic:op=sum,digits=1,style=plain", tmp_path / "run"
    sizes = {"steps": 3, "prompts": 2, "group": 2, "max_tokens": 2, "eval_prompts": 1, "eval_samples": 1}
    config = GRPOConfig(str(checkpoint), spec, out=str(out), **sizes)
    display = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        train_grpo(config, display, parse_task(spec) if made_by_hand else None)
    saved = f"saved in {out / 'checkpoints/step-000001'}"
    advice = saved if made_by_hand else f"continue with --resume --out {out}"
    assert display.lines[-1] == f"stopped after step 1; {advice}"
