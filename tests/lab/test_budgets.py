"""Keep the house readable: code lines by room, what importing an algorithm pulls in, the page of GRPO, first words."""

import ast
from pathlib import Path

import pytest
from code_lines import ROOMS, ROOT, closure, code_lines

BUDGETS = {"engine": 7_850, "lab": 2_800, "judge": 2_250, "kernels": 1_400}  # .ci/run prints what there is
FILES, LINES = 24, 3_850  # of grpo.py's closure
SOURCES = sorted(file for files in ROOMS.values() for file in files)
RIDDLES = {"What", "Of", "Whatever", "Who", "Whether", "Where"}
NOUNS = {"The", "A", "An", "Means", "Batch", "Token", "Tokens", "How", "Some", "All"}  # may open a class or a module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stays_within_its_budget(room):
    assert sum(map(code_lines, ROOMS[room])) <= BUDGETS[room]


def test_importing_grpo_pulls_in_few_files():
    files = closure("minirl.grpo")
    assert ROOT / "minirl/sampler.py" in files and len(files) <= FILES
    assert sum(map(code_lines, files)) <= LINES


def test_grpo_reads_on_one_page():
    page = ROOT / "minirl/grpo.py"
    assert code_lines(page) <= 150 and 30 < code_lines(page, "grpo", "grpo_step", "sampled_batch") <= 45


def vague(source: str) -> list[tuple[str, str]]:
    """List names and first words of the docstrings that do not say what the thing does: in functions, verb first."""
    found = []
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.Module | ast.ClassDef)
        if not (named or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) or not (
            doc := ast.get_docstring(node)
        ):
            continue
        word = doc.split()[0].rstrip(".,:;")
        starts = word[:1].isalpha() or word.startswith("`")
        if not starts or word in RIDDLES or (not named and (word in NOUNS or word[0].islower())):
            found.append((getattr(node, "name", "module"), word))
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_docstrings_say_first_what_the_thing_does(file: Path):
    assert not vague(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""Who may look."""', 1),
        ('class A:\n    """Whatever is there."""\n    def f():\n        """Of sampling."""', 2),
        ('def f():\n    """(training, held out) by read."""', 1),
        ('def f():\n    """{"prompt"} to continue."""', 1),
        ('def f():\n    """Means over nothing are NaN."""', 1),
        ('async def f():\n    """hidden [M, D] -> [M]."""', 1),
        ('"""The rows."""\nclass A:\n    """A row."""\n    def f():\n        """`count` the rows."""', 0),
    ],
)
def test_vague_docstrings_are_found(source, found):
    assert len(vague(source)) == found
