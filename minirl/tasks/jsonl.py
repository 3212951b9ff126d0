"""Tasks in JSONL files: one JSON object a line, with a prompt, and columns such as the answer."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from minirl.errors import InputError
from minirl.rewards.math import math_answer, math_match
from minirl.rewards.numbers import whole_number
from minirl.rewards.registry import load_reward
from minirl.rewards.rules import Reward
from minirl.tasks.arithmetic import last_number_text
from minirl.tasks.split import prompt_key, split_by_problem
from minirl.tasks.style import check_style, in_style, with_style
from minirl.tasks.task import Task


def jsonl(
    path: str,
    *,
    heldout_path: str | None = None,
    heldout_fraction: float | None = None,
    limit: int | None = None,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    reward: str = "answer",
    style: str = "plain",
    seed: int = 0,
) -> Task:
    """The examples of a file, at most the first `limit`; held out are those of another file, or a share of its prompts
    (default: a tenth).

    GSM8K's files are read with prompt_column="question": of an answer that ends in "#### 72" only the 72 is kept.
    Prompts that are chat messages already stay so in any style. `reward` (a name or path/to/file.py:function, see
    `load_reward`) defines accuracy; the default compares numbers where the answer is one and the whole text elsewhere,
    and cannot score examples without an answer.
    """
    if heldout_path is not None and heldout_fraction is not None:
        raise InputError("jsonl: give heldout_path or heldout_fraction, not both.")
    if heldout_fraction is not None and not 0 <= heldout_fraction < 1:
        raise InputError(f"jsonl: heldout_fraction must lie in [0, 1), not {heldout_fraction}.")
    if limit is not None and limit < 1:
        raise InputError(f"jsonl: limit must be at least 1, not {limit}.")
    check_style("jsonl", style)
    correct = load_reward(reward)
    columns = {"prompt": prompt_column, "answer": answer_column}
    examples = read_examples(Path(path), columns, style, limit)
    if heldout_path is None:
        share = 0.1 if heldout_fraction is None else heldout_fraction
        refusal = "jsonl: one prompt cannot be split: add more, or set heldout_fraction=0 or a heldout_path."
        train, heldout = split_by_problem(examples, prompt_key, share, seed, refusal)
    else:
        train, heldout = examples, read_examples(Path(heldout_path), columns, style)
        _warn_of_overlap(train, heldout, heldout_path)
    _fill(train + heldout)
    task = Task(Path(path).stem, train, heldout, {"correct": (1.0, correct)}, correct, _extractor(correct, examples))
    return with_style(task, style)


def read_examples(path: Path, columns: dict[str, str], style: str = "plain", limit: int | None = None) -> list[dict]:
    """The examples of a file under the names "prompt" and "answer"; `columns` says what the file calls these two."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file: give the path of a JSONL file.")
    examples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                examples.append(_example(line, f"{path}, line {number}", columns, style))
            if len(examples) == limit:
                break
    if not examples:
        raise InputError(f"{path}: the file is empty: it needs one JSON object a line.")
    if columns["answer"] != "answer" and not any("answer" in example for example in examples):
        raise InputError(f"{path}: no line has a {columns['answer']!r}: name the column by answer_column.")
    return examples


def _example(line: bytes, where: str, columns: dict[str, str], style: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: this is not JSON ({error}): write one object a line, in UTF-8.") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: this is a {type(row).__name__}, but must be a JSON object with a prompt.")
    if columns["prompt"] not in row:
        found = ", ".join(row) or "nothing"
        raise InputError(f"{where}: there is no {columns['prompt']!r}, only {found}: name the column by prompt_column.")
    prompt = _prompt(row.pop(columns["prompt"]), where, columns["prompt"])
    answer = row.pop(columns["answer"], None)
    row["prompt"] = in_style(style, prompt)
    if answer is not None:
        row["answer"] = answer.rpartition("####")[2].strip() if isinstance(answer, str) else answer
    return row


def _prompt(prompt, where: str, column: str) -> str | list[dict]:
    if isinstance(prompt, str):
        return _text(prompt, where, column)
    if not isinstance(prompt, list):
        kind = type(prompt).__name__
        raise InputError(f"{where}: {column!r} is a {kind}, but must be a text or a list of chat messages.")
    if not prompt:
        raise InputError(f"{where}: {column!r} is an empty list: it needs at least one chat message.")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{where}: message {i} of {column!r} needs a 'role' and a 'content', both texts.")
        _text(message["content"], where, column)
    return prompt


def _text(text: str, where: str, column: str) -> str:
    if not text.strip():
        raise InputError(f"{where}: {column!r} is empty: write something to answer.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {column!r} holds half of a surrogate pair ({error}): correct the text.") from error
    return text


def _warn_of_overlap(train: list[dict], heldout: list[dict], heldout_path: str) -> None:
    shared = set(map(prompt_key, train)) & set(map(prompt_key, heldout))
    if shared:
        warnings.warn(f"{heldout_path}: {len(shared)} of its prompts are in the training file too.", stacklevel=3)


def _fill(examples: list[dict]) -> None:
    """Gives all examples the same columns: None where a line lacks one."""
    names = list(dict.fromkeys(name for example in examples for name in example))
    for example in examples:
        for name in names:
            example.setdefault(name, None)


def _extractor(correct: Reward, examples: list[dict]) -> Callable[[str], str | None]:
    if correct is math_match:
        return math_answer
    answers = [example["answer"] for example in examples if example.get("answer") is not None]
    if answers and all(whole_number(str(answer)) is not None for answer in answers):
        return last_number_text
    return _stripped


def _stripped(completion: str) -> str | None:
    return completion.strip() or None
