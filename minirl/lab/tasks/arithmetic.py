"""Make problems of arithmetic: sums, products and greatest common divisors of two numbers."""

import math
import operator
import random
import re
import string
from collections.abc import Callable
from typing import NamedTuple

from minirl.errors import InputError, did_you_mean
from minirl.judge.answers import last_number, number_vote
from minirl.lab.tasks.draw import DEFAULT_HELDOUT, DEFAULT_TRAIN, check_sizes, draw_split
from minirl.lab.tasks.style import in_style, styled_task
from minirl.split import problem_hash
from minirl.task import Task


class Operation(NamedTuple):
    symbol: str  # stands for {op} in a template
    apply: Callable[[int, int], int]
    smallest: int  # operand
    question: str  # the template for chat models; what they are to answer with depends on the style
    bare: str  # the template for models that continue a text


OPERATIONS = {
    "sum": Operation("+", operator.add, 0, "What is {a} + {b}?", "{a}+{b}="),
    "product": Operation("*", operator.mul, 0, "What is {a} * {b}?", "{a}*{b}="),
    "gcd": Operation("gcd", math.gcd, 1, "What is the greatest common divisor of {a} and {b}?", "gcd({a},{b})="),
}
TEMPLATES: dict[str, Callable[[Operation], str]] = {
    "plain": lambda operation: operation.bare,
    "chat": lambda operation: operation.question + " Answer with just the number.",
    "think": lambda operation: operation.question,
}
MAX_LISTED_DIGITS = 2  # up to here all problems are listed, beyond they are drawn

Problem = tuple[str, int, int]  # operation, smaller operand, larger operand: 3+4 and 4+3 are one problem


def arithmetic(
    *,
    op: str = "sum",
    digits: int = 1,
    template: str | None = None,
    style: str = "chat",
    train_size: int | None = None,
    heldout_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Make problems in one operation, or in all three for op="mix", on operands of up to `digits` digits (gcd: from 1).

    No prompt occurs twice; 3+4 and 4+3 are two prompts of one problem and always on the same side. A size of None
    stands for all problems, at most 4096 prompts for training and 256 of a fifth of them held out. The template holds
    {a} and {b}, and {op} where wanted. The reward is `last_number`.
    """
    ops = _operations(op)
    check_sizes("arithmetic", train_size, heldout_size)
    if not 1 <= digits <= 100:
        raise InputError(f"arithmetic: digits must lie in 1..100, not {digits}.")
    _check_template(template, op, 10**digits - 1)

    def example(name: str, a: int, b: int) -> dict:
        operation = OPERATIONS[name]
        text = (template or TEMPLATES[style](operation)).format(a=a, b=b, op=operation.symbol)
        return {"prompt": in_style(style, text), "answer": str(operation.apply(a, b))}

    split = _listed if digits <= MAX_LISTED_DIGITS else _drawn
    train, heldout = split(ops, 10**digits - 1, train_size, heldout_size, seed, example)
    return styled_task(style, "arithmetic", train, heldout, last_number, number_vote)


def _listed(ops, largest: int, train_size, heldout_size, seed: int, example) -> tuple[list[dict], list[dict]]:
    """List all problems in the order of their hashes: the first are held out, the others are for training."""
    problems = [
        (op, a, b) for op in ops for a in range(OPERATIONS[op].smallest, largest + 1) for b in range(a, largest + 1)
    ]
    problems.sort(key=lambda problem: problem_hash(seed, problem))
    total = sum(len(_wordings(problem)) for problem in problems)
    wanted = min(DEFAULT_HELDOUT, total // 5) if heldout_size is None else heldout_size
    heldout, taken = [], 0
    while len(heldout) < wanted and taken < len(problems):
        heldout += _wordings(problems[taken])
        taken += 1
    train = [wording for problem in problems[taken:] for wording in _wordings(problem)]
    if len(heldout) < wanted or (train_size is not None and len(train) < train_size):
        raise InputError(
            f"arithmetic: these numbers give {total} prompts, {len(train)} for training beside heldout_size={wanted}, "
            f"but train_size={train_size}: ask for fewer, or for more digits."
        )
    random.Random(f"arithmetic {seed}").shuffle(train)  # else 3+4 and 4+3 are neighbours
    train = train[: DEFAULT_TRAIN if train_size is None else train_size]
    return [example(*wording) for wording in train], [example(*wording) for wording in heldout[:wanted]]


def _drawn(ops, largest: int, train_size, heldout_size, seed: int, example) -> tuple[list[dict], list[dict]]:
    def draw(rng: random.Random) -> tuple[Problem, dict]:
        op = rng.choice(ops)
        a, b = rng.randint(OPERATIONS[op].smallest, largest), rng.randint(OPERATIONS[op].smallest, largest)
        return (op, min(a, b), max(a, b)), example(op, a, b)

    return draw_split("arithmetic", draw, train_size, heldout_size, seed)


def _wordings(problem: Problem) -> list[tuple[str, int, int]]:
    op, a, b = problem
    return [(op, a, b)] if a == b else [(op, a, b), (op, b, a)]


def _operations(op: str) -> list[str]:
    if op == "mix":
        return list(OPERATIONS)
    if op not in OPERATIONS:
        choices = [*OPERATIONS, "mix"]
        raise InputError(
            f"arithmetic: op {op!r} is unknown{did_you_mean(op, choices)}: choose from {', '.join(choices)}."
        )
    return [op]


def _check_template(template: str | None, op: str, largest: int) -> None:
    if template is None:
        return
    try:
        parts = [(field, spec) for _, field, spec, _ in string.Formatter().parse(template) if field is not None]
        if any(re.search(r"\d{4}|{", spec) for _, spec in parts):
            raise ValueError("a width is a number of three digits at most")
        fields = {field for field, _ in parts}
        if fields <= {"a", "b", "op"}:
            template.format(a=largest, b=largest, op="+")
    except (ValueError, OverflowError) as error:
        raise InputError(f"arithmetic: the template {template!r} is malformed ({error}).") from error
    needed = {"a", "b", "op"} if op == "mix" else {"a", "b"}
    if not needed <= fields or not fields <= {"a", "b", "op"}:
        braces = ", ".join(f"{{{field}}}" for field in sorted(needed))
        raise InputError(f"arithmetic: the template must hold {braces} and no other field, but it is {template!r}.")
