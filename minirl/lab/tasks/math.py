r"""Make MATH, competition mathematics (2103.03874), as JSONL or as the folder of JSON files that it was published as.

A problem has a solution, whose last \boxed{} is the answer, a level (1 to 5), and a subject, which some files call its
type; MATH-500's files give the answer beside the solution.
"""

from itertools import islice
from pathlib import Path

from minirl.errors import InputError, did_you_mean
from minirl.files import Placed, is_number
from minirl.judge.boxed import last_box
from minirl.judge.math import answer_text, math_match, math_vote
from minirl.lab.tasks.rows import two_sides
from minirl.lab.tasks.style import in_style, styled_task
from minirl.records import read_objects, text_of
from minirl.task import Task

INSTRUCTION = r"Put the final answer in \boxed{}."


def math_problems(
    *,
    path: str,
    heldout_path: str | None = None,
    heldout_fraction: float | None = None,
    limit: int | None = None,
    level: int | None = None,
    subject: str | None = None,
    style: str = "chat",
    seed: int = 0,
) -> Task:
    """Make the problems of a file or folder, of one level and one subject where these are given, at most the first
    `limit`; held out are those of another file, or a share of them (default: a tenth).

    Columns: answer, solution, level, subject. The reward is `math` (math-verify).
    """

    def read(place: Path, most: int | None) -> list[dict]:
        examples = [Placed(_example(row, where, style), where) for row, where in read_objects(place)]
        chosen = _chosen(_chosen(examples, "subject", subject, place), "level", level, place)
        return list(islice(chosen, most))

    train, heldout = two_sides("math", read, path, heldout_path, heldout_fraction, limit, seed)
    return styled_task(style, "math", train, heldout, math_match, math_vote)


def _example(row: dict, where: str, style: str) -> dict:
    problem = text_of(row, "problem", where)
    solution = row.get("solution")
    box, _ = last_box(solution) if isinstance(solution, str) else (None, -1)
    beside = row.get("answer")
    if not box and beside in (None, ""):
        raise InputError(rf"{where}: the solution has no \boxed{{}}, and there is no 'answer' beside it: give one.")
    answer = box or (answer_text(beside) if is_number(beside) else text_of(row, "answer", where))
    return {
        "prompt": in_style(style, f"{problem}\n{INSTRUCTION}" if style == "chat" else problem),
        "answer": answer.strip(),
        "solution": solution,
        "level": _level(row.get("level")),
        "subject": row.get("subject", row.get("type")),
    }


def _level(found) -> int | None:
    """Read the level: 5 for 5, "5" and "Level 5", None for "Level ?", which a few problems have."""
    number = str(found).removeprefix("Level ").strip()
    return int(number) if number.isascii() and number.isdigit() else None


def _chosen(examples: list[dict], column: str, wanted: int | str | None, path: Path) -> list[dict]:
    chosen = examples if wanted is None else [example for example in examples if example[column] == wanted]
    if not chosen:
        found = sorted({str(example[column]) for example in examples})
        hint = did_you_mean(str(wanted), found)
        raise InputError(f"{path}: no problem has {column} {wanted!r}{hint}: choose from {', '.join(found)}.")
    return chosen
