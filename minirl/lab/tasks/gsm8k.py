"""Make GSM8K, word problems of grade-school mathematics (2110.14168), from its public JSONL files.

A line holds a question, and an answer: the solution in words, which ends in `#### 72`.
"""

from itertools import islice
from pathlib import Path

from minirl.errors import InputError
from minirl.files import Placed
from minirl.judge.answers import last_number, number_vote
from minirl.judge.numbers import reference_number
from minirl.lab.tasks.rows import two_sides
from minirl.lab.tasks.style import in_style, styled_task
from minirl.records import read_objects, text_of
from minirl.task import Task


def gsm8k(
    *,
    path: str,
    heldout_path: str | None = None,
    heldout_fraction: float | None = None,
    limit: int | None = None,
    style: str = "chat",
    seed: int = 0,
) -> Task:
    """Make the problems of train.jsonl, at most the first `limit`; held out are those of test.jsonl, or a share of them
    (default: a tenth). Columns: answer, a number without separators, and solution. The reward is `last_number`.
    """

    def read(place: Path, most: int | None) -> list[dict]:
        return [Placed(_example(row, where, style), where) for row, where in islice(read_objects(place), most)]

    train, heldout = two_sides("gsm8k", read, path, heldout_path, heldout_fraction, limit, seed)
    return styled_task(style, "gsm8k", train, heldout, last_number, number_vote)


def _example(row: dict, where: str, style: str) -> dict:
    prompt, solution = in_style(style, text_of(row, "question", where)), text_of(row, "answer", where)
    _, mark, answer = solution.rpartition("####")
    value = reference_number(answer)
    if not mark or value is None:
        raise InputError(f"{where}: the answer must end in '#### ' and a number, but ends in {solution[-30:]!r}.")
    return {"prompt": prompt, "answer": str(value), "solution": solution}
