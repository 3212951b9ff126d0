"""Tasks of reasoning-gym: over a hundred generators of problems with scorers, an optional adapter.

The package lives in processes outside of the trainer (`reasoning_worker`): one makes the problems, those of the sandbox
score answers. Only a full score counts as right, and only for an answer that the guards let pass: the default scorer
pays for any text that holds the oracle's, and others execute what they get.
"""

import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from minirl.errors import InputError
from minirl.rewards.numbers import answer_number, whole_number
from minirl.rewards.registry import did_you_mean
from minirl.rewards.rules import Reward
from minirl.rewards.thoughts import after_thoughts
from minirl.sandbox import call_each
from minirl.tasks.reasoning_guards import may_be_right
from minirl.tasks.split import check_sizes, draw_split
from minirl.tasks.style import check_style, in_style, with_style
from minirl.tasks.task import Task

WORKER = Path(__file__).resolve().with_name("reasoning_worker.py")
SECONDS = 5.0  # for one answer; the slowest honest one takes half of one
BATCH_SECONDS = 600.0  # for 32 problems
MOST = (1024, 128)  # examples where no size is asked for: the slowest data sets make two problems a second

Read = Callable[[str], str | None]


def reasoning_gym(
    *,
    dataset: str,
    style: str = "chat",
    train_size: int | None = None,
    heldout_size: int | None = None,
    seed: int = 0,
    **config,
) -> Task:
    """Problems of one of the package's data sets; further options are those of its configuration, lists as a|b|c.

    No question occurs twice, and a fifth of all questions can only be held out. A size of None stands for all there is,
    up to 1024 and 128. Where all answers are numbers, a completion is read as by `last_number`; else its answer is its
    last line, or all of it where answers have several lines. Columns: answer (None where the scorer knows no single
    one), and entry, the scorer's own data.
    """
    check_style("reasoning_gym", style)
    check_sizes("reasoning_gym", train_size, heldout_size)
    if importlib.util.find_spec("reasoning_gym") is None:
        message = (
            "task 'reasoning_gym' needs the package reasoning-gym: install it with `pip install 'minirl[reasoning]'`."
        )
        raise InputError(message)
    options = _as_json(config)
    problems = _problems(dataset, options, seed)

    def draw(rng: random.Random) -> tuple[str, dict]:
        problem = next(problems)
        question = problem["question"]
        return question, {"prompt": in_style(style, question), "answer": problem["answer"], "entry": problem["entry"]}

    advice = "ask for fewer, or choose options with more problems"
    name = f"reasoning_gym:dataset={dataset}"
    train, heldout = draw_split(name, draw, train_size, heldout_size, seed, advice, MOST)
    read = _reader([example["answer"] for example in train + heldout])
    correct = scorer(dataset, options, read)
    return with_style(Task(dataset, train, heldout, {"correct": (1.0, correct)}, correct, read), style)


def scorer(dataset: str, options: str, read: Read) -> Reward:
    """1 where what `read` finds in a completion gets the data set's full score. An answer that kills its scorer is
    wrong; one that takes it longer than `SECONDS` is a TimeoutError, which counts as 0."""

    def correct(prompts, completions, answer, entry, **columns) -> list[float | Exception]:
        values: list[float | Exception] = [0.0] * len(completions)
        jobs: dict[tuple, list[int]] = {}
        for i, (completion, oracle, problem) in enumerate(zip(completions, answer, entry, strict=True)):
            found = read(completion)
            if (
                found is not None
                and whole_number(oracle or "") is not None
                and whole_number(found) == whole_number(oracle)
            ):
                found = oracle  # 7.0 is 7, but the default scorer compares texts
            if found is not None and may_be_right(dataset, found, json.loads(problem)):
                jobs.setdefault((dataset, options, found, problem), []).append(i)
        outcomes = call_each(f"{WORKER}:score", list(jobs), SECONDS) if jobs else []
        for rows, outcome in zip(jobs.values(), outcomes, strict=True):
            for i in rows:
                values[i] = outcome if isinstance(outcome, TimeoutError) else float(outcome == 1.0)
        return values

    return correct


def _reader(oracles: list[str | None]) -> Read:
    """Where the answer of a completion stands."""
    if all(oracle is not None and whole_number(oracle) is not None for oracle in oracles):
        return _last_number
    return _all_of_it if any("\n" in (oracle or "").strip() for oracle in oracles) else _last_line


def _last_number(completion: str) -> str | None:
    """In the notation that scorers read: 1,000 is "1000", 1/2 is "0.5"."""
    value = answer_number(completion)
    if value is None:
        return None
    return str(value) if value.denominator == 1 else repr(float(value))


def _last_line(completion: str) -> str | None:
    lines = after_thoughts(completion).strip().splitlines()
    return lines[-1].strip() if lines else None


def _all_of_it(completion: str) -> str | None:
    return after_thoughts(completion).strip() or None


def _as_json(config: dict) -> str:
    try:
        return json.dumps(config, sort_keys=True)
    except TypeError as error:
        raise InputError(f"reasoning_gym: {error}: give options as numbers, texts or lists of them.") from error


def _problems(dataset: str, options: str, seed: int) -> Iterator[dict]:
    """Endless problems; they may repeat."""
    for number in itertools.count():
        (batch,) = call_each(f"{WORKER}:problems", [(dataset, options, seed, number)], BATCH_SECONDS, trusted=True)
        if isinstance(batch, Exception):
            raise InputError(f"reasoning_gym: data set {dataset!r} makes no problems ({batch}): choose other options.")
        if "refused" in batch:
            raise InputError(_refusal(**batch["refused"]))
        yield from batch["problems"]


def _refusal(why: str, word: str | None, choices: list[str]) -> str:
    if word is None:
        return f"reasoning_gym: {why}: correct the options."
    return f"reasoning_gym: {why} {word!r}{did_you_mean(word, choices)}: choose from {', '.join(choices)}."
