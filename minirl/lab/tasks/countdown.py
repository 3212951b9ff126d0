"""Make CountDown: reach a target from 3 or 4 numbers with + - * /, each number used exactly once.

The answer is an arithmetic expression, which minirl.judge.expressions reads.
"""

import random

from minirl.errors import InputError
from minirl.judge.expressions import countdown_correct, countdown_format, countdown_vote
from minirl.lab.tasks.draw import DEFAULT_HELDOUT, DEFAULT_TRAIN, draw_split
from minirl.lab.tasks.style import in_style, styled_task
from minirl.task import Task

QUESTION = (
    "Using the numbers {numbers}, write an expression that equals {target}. "
    "Use +, -, *, / and parentheses, and each number exactly once."
)
TAGS = " Give the expression alone in answer tags, for example <answer>(1 + 2) * 3</answer>."
ATTEMPTS = 1000  # random expressions for one reachable target


def countdown(
    *,
    count: int | None = None,
    max_number: int = 99,
    max_target: int = 99,
    template: str | None = None,
    style: str = "chat",
    train_size: int = DEFAULT_TRAIN,
    heldout_size: int = DEFAULT_HELDOUT,
    seed: int = 0,
) -> Task:
    """Make solvable problems of `count` numbers in 1..max_number (None: 3 or 4) with a target in 1..max_target.

    No problem (the numbers in any order, and the target) occurs twice. The template holds {numbers} and {target}.
    Columns: numbers, target, and solution, one of the expressions that reach it.
    """
    template = template or QUESTION + ("" if style == "think" else TAGS)
    if count not in (None, 3, 4):
        raise InputError(f"countdown: count must be 3, 4 or none, not {count}.")
    if max_number < 1 or max_target < 1:
        raise InputError(f"countdown: max_number={max_number} and max_target={max_target} must be at least 1.")
    if "{numbers}" not in template or "{target}" not in template:
        raise InputError(f"countdown: the template must hold {{numbers}} and {{target}}, but it is {template!r}.")

    def draw(rng: random.Random) -> tuple[tuple, dict]:
        numbers, target, solution = _solvable(rng, count, max_number, max_target)
        numbers.sort()  # so that one problem has one prompt, and the order tells nothing about the solution
        text = template.replace("{numbers}", str(numbers)).replace("{target}", str(target))
        example = {"prompt": in_style(style, text), "numbers": numbers, "target": target, "solution": solution}
        return (tuple(numbers), target), example

    train, heldout = draw_split("countdown", draw, train_size, heldout_size, seed)
    return styled_task(style, "countdown", train, heldout, countdown_correct, countdown_vote, countdown_format)


def _solvable(rng: random.Random, count: int | None, max_number: int, max_target: int) -> tuple[list[int], int, str]:
    """Return numbers, a target and the expression that reaches it."""
    for _ in range(ATTEMPTS):
        numbers = [rng.randint(1, max_number) for _ in range(count or rng.choice((3, 4)))]
        value, solution = _random_expression(rng, numbers)
        if value is not None and 1 <= value <= max_target:
            return numbers, value, solution
    message = f"countdown: no target in 1..{max_target} was found in {ATTEMPTS} attempts: raise max_target."
    raise InputError(message)


def _random_expression(rng: random.Random, numbers: list[int]) -> tuple[int | None, str]:
    """Join two terms at a time until one is left; the value is None if a division on the way leaves a remainder."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        rng.shuffle(terms)
        (a, left), (b, right), op = terms.pop(), terms.pop(), rng.choice("+-*/")
        if op == "/" and (b == 0 or a % b):
            return None, ""
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[op]
        terms.append((value, f"({left} {op} {right})" if terms else f"{left} {op} {right}"))
    return terms[0]
