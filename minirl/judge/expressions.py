"""Compute an arithmetic expression that a model wrote, in exact fractions, and judge the answers of CountDown by it.

An expression is read by a parser for just that. Nothing is ever evaluated as code, so `9**9**9**9` costs nothing, and
`2**3` and `7//2` are not answers.
"""

import ast
import operator
import re
from fractions import Fraction

from minirl.judge.answers import format_match
from minirl.thoughts import after_thoughts

MAX_EXPRESSION = 200  # characters; bounds the depth of the tree and the size of its numbers
CHARACTERS = re.compile(r"[0-9+\-*/() ]+")
UNICODE_OPERATORS = str.maketrans("×÷−", "*/-")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def compute(expression: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an expression in + - * / and the sorted numbers in it; None if it is anything else or
    divides by 0.

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
    """Return the node's value and append its numbers to the list."""
    match node:
        case ast.Constant(value=int(number)):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, numbers), _value(right, numbers))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


# --- CountDown --------------------------------------------------------------------------------------------------------


def countdown_correct(prompts, completions, numbers, target, **columns) -> list[float]:
    """Give 1 if the completion's expression uses each number exactly once and equals the target, else 0."""
    rows = zip(completions, target, numbers, strict=True)
    return [float(read_expression(completion) == (value, sorted(given))) for completion, value, given in rows]


_ends_in_answer = format_match(r"(?:(?!</?answer>).)*<answer>(?:(?!</?answer>).)+</answer>\s*")


def countdown_format(prompts, completions, **columns) -> list[float]:
    """Give 1 if the completion behind its thoughts ends in its only <answer>...</answer>, else 0."""
    return _ends_in_answer(prompts, [after_thoughts(completion) for completion in completions])


def countdown_vote(completion: str) -> str | None:
    """Return the value and the numbers of the answer, as in "24 from [1, 2, 3, 4]": expressions that share both are
    right or wrong together."""
    answer = read_expression(completion)
    return None if answer is None else "{} from {}".format(*answer)


def read_expression(completion: str) -> tuple[Fraction, list[int]] | None:
    """Return the value and the sorted numbers of the expression in the answer tags behind the thoughts, or of the last
    line where there are no tags.

    None if it cannot be read, or if there is more than one answer: listing many answers must not pay.
    """
    completion = after_thoughts(completion)
    if completion.count("<answer>") > 1 or completion.count("</answer>") > 1:
        return None
    answers = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    lines = completion.strip().splitlines()
    return compute(answers[0] if answers else lines[-1] if lines else "")
