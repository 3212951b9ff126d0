"""Make tasks from files, JSONL or tables: one object a row, with a prompt, and columns such as the answer."""

import json
import math
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from minirl.conversation import messages_of, tools_of, with_system
from minirl.errors import InputError
from minirl.files import Placed, kind_of
from minirl.judge.answers import Vote, answer_match, number_vote, text_vote
from minirl.judge.latex import to_plain_text
from minirl.judge.math import math_match, math_vote
from minirl.judge.numbers import reference_number
from minirl.lab.rewards import load_reward
from minirl.lab.tasks.rows import two_sides
from minirl.lab.tasks.style import in_style, styled_task
from minirl.records import filled, read_objects
from minirl.rules import Reward
from minirl.task import Task

PROMPTS = ("prompt", "question", "problem", "messages", "conversations", "instruction", "query", "input", "text")
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|log|ln|exp|sin|cos|tan|pi)\b)[A-Za-z]{3,}(?![{A-Za-z(])")
RESERVED = {"prompts", "completions", "completion_ids"}  # what every reward is given beside the columns


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
    config: str | None = None,
    split: str | None = None,
) -> Task:
    """Make the examples of a file, at most the first `limit`; held out are those of another file, or a share of its
    prompts (default: a tenth).

    `config` and `split` choose those of a folder or of a data set of the hub; "system" and "tools" of a row are written
    by the chat template. Of an answer that ends in "#### 72" only the 72 is kept.
    Prompts that are chat messages already stay so in any style. `reward` (a name or path/to/file.py:function, see
    `load_reward`) defines accuracy; the default compares numbers where the answer is one and the whole text elsewhere,
    and cannot score examples without an answer. Other answers than a text, a number or true and false need a reward of
    their own.
    """
    path = ":".join([path, *filter(None, [config, split or (config and "train")])])
    correct = load_reward(reward)
    columns = {"prompt": prompt_column, "answer": answer_column}

    def read(place: Path, most: int | None) -> list[dict]:
        return read_examples(place, columns, style, most, _check_answer if correct is answer_match else None)

    train, heldout = two_sides("jsonl", read, path, heldout_path, heldout_fraction, limit, seed)
    name = Path(path.partition(":")[0].removesuffix(".gz")).stem
    vote, notes = _vote(correct, train + heldout), _notes(correct, train + heldout)
    return styled_task(style, name, train, heldout, correct, vote, notes=notes)


def read_examples(
    path: Path,
    columns: dict[str, str],
    style: str = "plain",
    limit: int | None = None,
    check_answer: Callable[[object, str, str], None] | None = None,
) -> list[dict]:
    """Read the examples of a file under the names "prompt" and "answer"; `columns` says what the file calls these two.
    `check_answer(answer, its column, where)` raises an InputError for what cannot be one."""
    examples = []
    for row, where in islice(read_objects(path), limit):
        examples.append(Placed(_example(row, where, columns, style), where))
        if check_answer and "answer" in examples[-1]:
            check_answer(examples[-1]["answer"], columns["answer"], where)
    if columns["answer"] != "answer" and not any("answer" in example for example in examples):
        raise InputError(f"{path}: no line has a {columns['answer']!r}: name the column by answer_column.")
    return examples


def _example(row: dict, where: str, columns: dict[str, str], style: str) -> dict:
    if columns["prompt"] not in row:
        found = ", ".join(row) or "nothing"
        known = next((f"={name}" for name in PROMPTS if name in row), "")
        advice = f"name the column by prompt_column{known}."
        raise InputError(f"{where}: there is no {columns['prompt']!r}, only {found}: {advice}")
    prompt = in_style(style, _prompt(row.pop(columns["prompt"]), where, columns["prompt"]))
    answer = row.pop(columns["answer"], None)
    reserved = [name for name in row if name in RESERVED]
    if reserved:
        raise InputError(f"{where}: a column cannot be called {reserved[0]!r}, rewards already take that: rename it.")
    tools = tools_of(row, where)
    for name in ("system", "system_prompt", "tools"):
        if row.get(name) and isinstance(prompt, str):
            advice = "set style=chat, or rename the column"
            raise InputError(f"{where}: {name!r} is written by a chat template, and the prompt is a text: {advice}.")
    row["prompt"] = with_system(prompt, row, where)
    if "tools" in row:
        row["tools"] = tools
    if answer is not None:
        row["answer"] = answer.rpartition("####")[2].strip() if isinstance(answer, str) else answer
    return row


def _check_answer(answer: object, column: str, where: str) -> None:
    """Raise an InputError for an answer that the default reward, which compares texts and numbers, cannot read."""
    known = isinstance(answer, str | int) or (isinstance(answer, float) and math.isfinite(answer))
    if not known or answer == "":
        what = "empty" if answer == "" else json.dumps(answer) if isinstance(answer, float) else kind_of(answer)
        raise InputError(
            f"{where}: {column!r} is {what}, which no completion can equal: give a text or a number, null for none, or "
            "by reward=FILE.py:FUNCTION a reward that reads it."
        )


def _prompt(prompt, where: str, column: str) -> str | list[dict]:
    if isinstance(prompt, str):
        return filled(prompt, column, where)
    messages = messages_of(prompt, where, column)
    for message in messages:
        # An empty system message replaces a template's own, and a call of a tool needs no text beside it.
        if "tool_calls" not in message and (message["role"] != "system" or message["content"].strip()):
            filled(message["content"], column, where)
    return messages


def _notes(correct: Reward, examples: list[dict]) -> tuple[str, ...]:
    """Return a note on the answers that the default reward compares as texts, with what to use for them; or on those
    with a number that `math` takes for words."""
    answers = [example["answer"] for example in examples if example.get("answer") is not None]
    answers = [json.dumps(answer) if isinstance(answer, bool) else str(answer) for answer in answers]
    texts = [answer for answer in answers if reference_number(answer) is None]
    if correct is math_match:
        texts = [text for text in texts if re.search("[0-9]", text) and WORD.search(to_plain_text(text))]
    if correct not in (answer_match, math_match) or not texts:
        return ()
    formula = any(re.search(r"[\\^0-9½¼¾]", text) and not WORD.search(to_plain_text(text)) for text in texts)
    advice = "reward=math compares formulas" if formula else "reward=FILE.py:FUNCTION may read more"
    return (
        f"{len(texts)} of {len(answers)} answers are no numbers ({texts[0]!r:.60} is the first), and only a completion "
        f"with that very text is right: {advice}",
    )


def _vote(correct: Reward, examples: list[dict]) -> Vote:
    if correct is math_match:
        return math_vote
    answers = [example["answer"] for example in examples if example.get("answer") is not None]
    if answers and all(reference_number(answer) is not None for answer in answers):
        return number_vote
    return _truth_vote if answers and all(isinstance(answer, bool) for answer in answers) else text_vote


def _truth_vote(completion: str) -> str | None:
    """Read the vote where answers are true and false, in any case."""
    text = text_vote(completion)
    return text and text.casefold()
