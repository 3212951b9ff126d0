"""CountDown: reach a target from 3 or 4 numbers with + - * /, each number used exactly once.

The answer is an arithmetic expression, read by a parser for just that and computed in exact fractions. Nothing is ever
evaluated as code, so `9**9**9**9` costs nothing, and `2**3` and `7//2` are not answers.
"""

import ast
import operator
import random
import re
from fractions import Fraction

from minirl.errors import InputError
from minirl.rewards.rules import format_match
from minirl.rewards.thoughts import after_thoughts
from minirl.tasks.split import DEFAULT_HELDOUT, DEFAULT_TRAIN, draw_split
from minirl.tasks.style import check_style, in_style, with_style
from minirl.tasks.task import Task

QUESTION = (
    "Using the numbers {numbers}, write an expression that equals {target}. "
    "Use +, -, *, / and parentheses, and each number exactly once."
)
TAGS = " Give the expression alone in answer tags, for example <answer>(1 + 2) * 3</answer>."
MAX_EXPRESSION = 200  # characters; bounds the depth of the tree and the size of its numbers
ATTEMPTS = 1000  # random expressions for one reachable target

CHARACTERS = re.compile(r"[0-9+\-*/() ]+")
UNICODE_OPERATORS = str.maketrans("×÷−", "*/-")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


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
    """Solvable problems of `count` numbers in 1..max_number (None: 3 or 4) with a target in 1..max_target.

    No problem (the numbers in any order, and the target) occurs twice. The template holds {numbers} and {target}.
    Columns: numbers, target, and solution, one of the expressions that reach it.
    """
    check_style("countdown", style)
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
    rewards = {"correct": (1.0, correct), "format": (0.1, answer_format)}
    return with_style(Task("countdown", train, heldout, rewards, correct, extract), style)


def correct(prompts, completions, numbers, target, **columns) -> list[float]:
    """1 if the completion's expression uses each number exactly once and equals the target, else 0."""
    rows = zip(completions, target, numbers, strict=True)
    return [float(read_answer(completion) == (value, sorted(given))) for completion, value, given in rows]


_ends_in_answer = format_match(r"(?:(?!</?answer>).)*<answer>(?:(?!</?answer>).)+</answer>\s*")


def answer_format(prompts, completions, **columns) -> list[float]:
    """1 if the completion behind its thoughts ends in its only <answer>...</answer>, else 0."""
    return _ends_in_answer(prompts, [after_thoughts(completion) for completion in completions])


def extract(completion: str) -> str | None:
    """What is computed from what, as in "24 from [1, 2, 3, 4]": expressions with this in common are right or wrong
    together.
    """
    answer = read_answer(completion)
    return None if answer is None else "{} from {}".format(*answer)


def read_answer(completion: str) -> tuple[Fraction, list[int]] | None:
    """The value and the sorted numbers of the expression in the answer tags behind the thoughts, or of the last line
    where there are no tags.

    None if it cannot be read, or if there is more than one answer: spraying answers must not pay.
    """
    completion = after_thoughts(completion)
    if completion.count("<answer>") > 1 or completion.count("</answer>") > 1:
        return None
    answers = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    lines = completion.strip().splitlines()
    return evaluate(answers[0] if answers else lines[-1] if lines else "")


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression in + - * / and the sorted numbers in it; None if it is anything else or divides
    by 0.

    × ÷ − are read as * / -. A minus sign before a number or a parenthesis is allowed, a plus sign is not.
    """
    expression = expression.strip().translate(UNICODE_OPERATORS)
    if len(expression) > MAX_EXPRESSION or not CHARACTERS.fullmatch(expression):
        return None
    numbers = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, sorted(numbers)


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    """The node's value; its numbers are appended to the list."""
    match node:
        case ast.Constant(value=int(number)):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, numbers), _value(right, numbers))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _solvable(rng: random.Random, count: int | None, max_number: int, max_target: int) -> tuple[list[int], int, str]:
    """Numbers, a target and the expression that it was made with."""
    for _ in range(ATTEMPTS):
        numbers = [rng.randint(1, max_number) for _ in range(count or rng.choice((3, 4)))]
        value, solution = _random_expression(rng, numbers)
        if value is not None and 1 <= value <= max_target:
            return numbers, value, solution
    message = f"countdown: no target in 1..{max_target} was found in {ATTEMPTS} attempts: raise max_target."
    raise InputError(message)


def _random_expression(rng: random.Random, numbers: list[int]) -> tuple[int | None, str]:
    """Joins two terms at a time until one is left; the value is None if a division on the way leaves a remainder."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        rng.shuffle(terms)
        (a, left), (b, right), op = terms.pop(), terms.pop(), rng.choice("+-*/")
        if op == "/" and (b == 0 or a % b):
            return None, ""
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[op]
        terms.append((value, f"({left} {op} {right})" if terms else f"{left} {op} {right}"))
    return terms[0]
