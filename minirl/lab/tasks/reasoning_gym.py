"""Make tasks of reasoning-gym: over a hundred generators of problems with scorers, an optional adapter.

The package runs in processes outside of the trainer (minirl.judge.reasoning_worker), and minirl.judge.reasoning_gym
says which answers count as right.
"""

import importlib.util
import itertools
import json
import random
from collections.abc import Iterator

from minirl.errors import InputError, did_you_mean
from minirl.judge.pool import call_each
from minirl.judge.reasoning_gym import WORKER, reader, scorer
from minirl.lab.tasks.draw import check_sizes, draw_split
from minirl.lab.tasks.style import in_style, styled_task
from minirl.task import Task

BATCH_SECONDS = 600.0  # for 32 problems
MOST = (1024, 128)  # examples where no size is asked for: the slowest data sets make two problems a second


def reasoning_gym(
    *,
    dataset: str,
    style: str = "chat",
    train_size: int | None = None,
    heldout_size: int | None = None,
    seed: int = 0,
    **config,
) -> Task:
    """Make problems of one of the package's data sets; further options are those of its configuration, lists as a|b|c.

    No question occurs twice, and a fifth of all questions can only be held out. A size of None stands for all problems,
    at most 1024 and 128. Where all answers are numbers, a completion is read as by `last_number`; else its answer is
    its last line, or the whole text where answers have several lines. Columns: answer (None where the scorer knows no
    single one), and entry, the scorer's own data.
    """
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
    read = reader([example["answer"] for example in train + heldout])
    return styled_task(style, dataset, train, heldout, scorer(dataset, options, read), read)


def _as_json(config: dict) -> str:
    try:
        return json.dumps(config, sort_keys=True)
    except TypeError as error:
        raise InputError(f"reasoning_gym: {error}: give options as numbers, texts or lists of them.") from error


def _problems(dataset: str, options: str, seed: int) -> Iterator[dict]:
    """Yield problems without end; they may repeat."""
    for number in itertools.count():
        (batch,) = call_each(f"{WORKER}:problems", [(dataset, options, seed, number)], BATCH_SECONDS, trusted=True)
        if isinstance(batch, Exception):
            raise InputError(f"reasoning_gym: data set {dataset!r} makes no problems ({batch}): choose other options.")
        if "refused" in batch:
            raise InputError(_refusal(*batch["refused"]))
        yield from batch["problems"]


def _refusal(why: str, word: str | None, choices: list[str]) -> str:
    """Word the worker's refusal as a sentence."""
    if word is None:
        return f"reasoning_gym: {why}: correct the options."
    return f"reasoning_gym: {why} {word!r}{did_you_mean(word, choices)}: choose from {', '.join(choices)}."
