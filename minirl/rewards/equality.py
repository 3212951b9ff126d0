"""Equality of two answers by math-verify, as it is called in the sandbox; an optional adapter."""

import logging

from math_verify import parse, verify

from minirl.rewards.numbers import whole_number

for name in ("parser", "grader"):  # each call would log that the timeouts are off
    logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
parse("$1$", parsing_timeout=None)  # the LaTeX parser is built at the first use


def is_readable(answer: str) -> bool:
    return bool(_parse_answer(answer))


def is_equal(answer: str, completion: str) -> bool:
    if completion.count(r"\boxed") > 1:
        return False
    return verify(_parse_answer(answer), _parse(completion), timeout_seconds=None)


def reading(text: str) -> str | None:
    parsed = [] if text.count(r"\boxed") > 1 else _parse(text)
    if not parsed:
        return None
    is_equation = getattr(parsed[0], "rel_op", None) == "=="  # of x = 7 the 7 is compared, so it is the vote
    found = str(parsed[0].rhs if is_equation else parsed[0])
    number = whole_number(found)
    return found if number is None else str(number)


def _parse_answer(answer: str) -> list:
    """A reference answer is often bare LaTeX, which math-verify reads only between dollars."""
    return _parse(answer) or _parse(f"${answer}$")


def _parse(text: str) -> list:
    return parse(text, parsing_timeout=None)
