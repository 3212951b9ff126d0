"""Mathematical equality of answers by math-verify (numbers, fractions, LaTeX); an optional adapter.

math-verify guards itself with signals, which work only in the main thread, and still hands `9**9**9**9` to sympy. Here
its own timeouts are off and the work is done in a child process that is killed when it takes too long.
"""

import functools
import logging

from minirl.errors import InputError
from minirl.rewards.numbers import whole_number
from minirl.rewards.sandbox import call_with_timeout, map_with_timeout

SECONDS = 5.0  # for one completion, and for reading one reference answer


def math_match(prompts, completions, answer, **columns) -> list[float | None]:
    r"""1 if the completion's last mathematical expression equals the answer, else 0; None if the answer itself cannot
    be read.

    More than one \boxed{} is an attempt to answer several times and scores 0; so does a comparison that takes longer
    than `SECONDS`.
    """
    math_verify()  # imported and warmed up once, before the child processes are forked
    golds = [None if a is None else str(a) for a in answer]
    readable = _readable(set(golds) - {None})
    pairs = [(gold, c) for c, gold in zip(completions, golds, strict=True) if gold in readable]
    outcomes = iter(map_with_timeout(_is_equal, pairs, SECONDS))
    return [float(next(outcomes) is True) if gold in readable else None for gold in golds]


def math_answer(text: str) -> str | None:
    r"""The text's answer as a vote: math-verify's reading of its last expression; None if there is none, or more than
    one \boxed{}.
    """
    math_verify()
    try:
        return call_with_timeout(_reading, (text,), SECONDS)
    except (TimeoutError, RuntimeError):
        return None


@functools.cache
def math_verify():
    """The package, warmed up: its LaTeX parser is built at the first use. InputError if it is not installed."""
    try:
        import math_verify as package
    except ImportError as error:
        message = "reward 'math' needs the package math-verify: install it with `pip install 'minirl[math]'`."
        raise InputError(message) from error
    for name in ("parser", "grader"):  # each call would log that the timeouts are off
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    package.parse("$1$", parsing_timeout=None)
    return package


def _readable(answers: set[str]) -> set[str]:
    answers = list(answers)
    outcomes = map_with_timeout(lambda answer: bool(_parse_answer(answer)), [(answer,) for answer in answers], SECONDS)
    return {answer for answer, outcome in zip(answers, outcomes, strict=True) if outcome is True}


def _is_equal(answer: str, completion: str) -> bool:
    if completion.count(r"\boxed") > 1:
        return False
    return math_verify().verify(_parse_answer(answer), _parse(completion), timeout_seconds=None)


def _reading(text: str) -> str | None:
    parsed = [] if text.count(r"\boxed") > 1 else _parse(text)
    if not parsed:
        return None
    is_equation = getattr(parsed[0], "rel_op", None) == "=="  # of x = 7 the 7 is compared, so it is the vote
    reading = str(parsed[0].rhs if is_equation else parsed[0])
    number = whole_number(reading)
    return reading if number is None else str(number)


def _parse_answer(answer: str) -> list:
    """A reference answer is often bare LaTeX, which math-verify reads only between dollars."""
    return _parse(answer) or _parse(f"${answer}$")


def _parse(text: str) -> list:
    return math_verify().parse(text, parsing_timeout=None)
