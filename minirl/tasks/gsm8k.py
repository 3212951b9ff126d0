"""GSM8K: word problems of grade-school mathematics (2110.14168), from its public JSONL files.

A line holds a question, and an answer: the solution in words, which ends in `#### 72`.
"""

from itertools import islice
from pathlib import Path

from minirl.errors import InputError
from minirl.files import Placed
from minirl.rewards.numbers import reference_number
from minirl.rewards.rules import last_number
from minirl.tasks.arithmetic import last_number_text
from minirl.tasks.rows import read_rows, text_of, two_sides
from minirl.tasks.style import check_style, in_style, with_style
from minirl.tasks.task import Task


def gsm8k(
    *,
    path: str,
    heldout_path: str | None = None,
    heldout_fraction: float | None = None,
    limit: int | None = None,
    style: str = "chat",
    seed: int = 0,
) -> Task:
    """The problems of train.jsonl, at most the first `limit`; held out are those of test.jsonl, or a share of them
    (default: a tenth). Columns: answer, a number without separators, and solution. The reward is `last_number`.
    """
    check_style("gsm8k", style)

    def read(place: Path, most: int | None) -> list[dict]:
        return [Placed(_example(row, where, style), where) for row, where in islice(read_rows(place), most)]

    train, heldout = two_sides("gsm8k", read, path, heldout_path, heldout_fraction, limit, seed)
    return with_style(
        Task("gsm8k", train, heldout, {"correct": (1.0, last_number)}, last_number, last_number_text), style
    )


def _example(row: dict, where: str, style: str) -> dict:
    prompt, solution = in_style(style, text_of(row, "question", where)), text_of(row, "answer", where)
    _, mark, answer = solution.rpartition("####")
    value = reference_number(answer)
    if not mark or value is None:
        raise InputError(f"{where}: the answer must end in '#### ' and a number, but ends in {solution[-30:]!r}.")
    return {"prompt": prompt, "answer": str(value), "solution": solution}
