"""Keep the house readable: code lines by room, what importing an algorithm pulls in, the page of GRPO, first words."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from code_lines import ROOMS, ROOT, closure, code_lines

BUDGETS = {"engine": 6_550, "lab": 2_550, "judge": 1_950, "kernels": 1_400}  # .ci/run prints what there is
FILES, LINES = 22, 3_200  # of grpo.py's closure
SOURCES = sorted(file for files in ROOMS.values() for file in files)
RIDDLES = {"What", "Of", "Whatever", "Who", "Whether", "Where"}  # a docstring says what the thing does, verb first


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stays_within_its_budget(room):
    assert sum(map(code_lines, ROOMS[room])) <= BUDGETS[room]


def test_importing_grpo_pulls_in_few_files():
    files = closure("minirl.grpo")
    assert ROOT / "minirl/sampler.py" in files and len(files) <= FILES
    assert sum(map(code_lines, files)) <= LINES


def test_grpo_reads_on_one_page():
    page = ROOT / "minirl/grpo.py"
    step = next(f for f in ast.parse(page.read_text(encoding="utf-8")).body if getattr(f, "name", "") == "grpo_step")
    assert code_lines(page) <= 150 and step.end_lineno - step.lineno < 45


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_docstrings_do_not_begin_with_a_riddle(file: Path):
    nodes = (n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef))
    found = [(n.name, doc.split()[0]) for n in nodes if (doc := ast.get_docstring(n))]
    assert not [name for name, word in found if word.rstrip(".,:") in RIDDLES]


def test_no_two_files_import_one_another():
    """Also where one of them does so late, inside a function."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOMS["engine"] + ROOMS["judge"]}
    names |= {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOMS["lab"]}
    below = {name: _imported(file) & names.keys() for name, file in names.items()}
    assert not [(a, b) for a in below for b in below[a] if a < b and a in below[b]]


def _imported(file: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    return {n.module or "" for n in nodes} | {f"{n.module}.{alias.name}" for n in nodes for alias in n.names}


def test_ci_prints_the_lines():
    done = subprocess.run([sys.executable, ROOT / "tests/code_lines.py"], capture_output=True, text=True, check=True)
    assert all(room in done.stdout for room in ROOMS) and "grpo.py" in done.stdout
