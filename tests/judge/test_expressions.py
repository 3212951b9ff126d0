"""Arithmetic expressions of a model, computed exactly, and the answers of CountDown that they are.

How single texts are read is in answers.toml, and what completions are worth in adversarial.toml.
"""

import re
import sys
from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from minirl.judge.expressions import (
    MAX_EXPRESSION,
    compute,
    countdown_correct,
    countdown_format,
    countdown_vote,
    read_expression,
)


def test_deep_nesting_and_long_text_are_wrong_and_not_a_crash():
    for expression in ("(" * 10**5 + "1" + ")" * 10**5, "-" * 10**6 + "1", "1+" * 10**5 + "1", "9" * 10**6):
        assert compute(expression) is None
    assert compute("-" * (MAX_EXPRESSION - 1) + "1") == (-1, [1])  # the deepest that is read
    assert compute("(" * 99 + "1" + ")" * 99) == (1, [1])
    assert compute(" " + "1" * (MAX_EXPRESSION + 1)) is None


def test_a_checker_called_near_the_recursion_limit_says_wrong():
    def descend(depth):
        return descend(depth - 1) if depth else compute("-" * 199 + "1")

    room = sys.getrecursionlimit() - len_of_stack() - 60
    assert descend(room) is None


def len_of_stack():
    frame, depth = sys._getframe(), 0
    while frame:
        frame, depth = frame.f_back, depth + 1
    return depth


def is_correct(completion, numbers, target):
    return countdown_correct(["p"], [completion], [numbers], [target])[0]


def test_countdown_needs_a_number_as_often_as_it_is_given():
    assert is_correct("3 + 3 + 2", [3, 2, 3], 8) == 1.0
    assert is_correct("3 + 2 + 3 + 3 - 3", [3, 2, 3], 8) == 0.0
    assert is_correct("2 * 2 + 2 + 2", [3, 2, 3], 8) == 0.0


def test_countdown_is_exact_where_floats_are_not():
    assert is_correct("8 / (3 - 8 / 3)", [8, 3, 8, 3], 24) == 1.0
    huge = f"{10**40} + 1 - {10**40}"
    assert is_correct(huge, [10**40, 1, 10**40], 1) == 1.0


def test_countdown_format_is_one_answer_at_the_end():
    completions = [
        "so <answer>x</answer>\n",
        "<answer>1</answer>",
        "<answer></answer>",
        "<answer>1",
        "1",
        "",
        "<answer>1</answer> or so",
        "<answer>1</answer><answer>2</answer>",
    ]
    assert countdown_format(prompts=[""] * 8, completions=completions) == [1, 1, 0, 0, 0, 0, 0, 0]


def test_countdown_votes_are_equal_where_value_and_numbers_are():
    assert countdown_vote("1 + 2 + 3") == countdown_vote("<answer>3 + (2 + 1)</answer>") == "6 from [1, 2, 3]"
    assert countdown_vote("1 * 2 * 3") == "6 from [1, 2, 3]"
    assert countdown_vote("3 * 2") != countdown_vote("1 * 2 * 3")
    assert countdown_vote("none") is None


def expressions():
    """(text, value) of random expressions; a value of None divides by zero."""
    leaf = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))

    def join(left, op, right):
        (left_text, a), (right_text, b) = left, right
        text = f"({left_text}{op}{right_text})"
        if a is None or b is None or (op == "/" and b == 0):
            return text, None
        return text, {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[op]()

    def negate(inner):
        text, value = inner
        return f"(-{text})", None if value is None else -value

    def grow(inner):
        return st.one_of(st.builds(join, inner, st.sampled_from("+-*/"), inner), inner.map(negate))

    return st.recursive(leaf, grow, max_leaves=8).filter(lambda e: len(e[0]) <= MAX_EXPRESSION)


@given(expressions())
@settings(max_examples=200)
def test_random_expressions_are_computed_as_fractions(expression):
    text, value = expression
    got = compute(text)
    numbers = sorted(map(int, re.findall(r"\d+", text)))
    assert got == (None if value is None else (value, numbers))


@given(expressions(), st.data())
@settings(max_examples=200)
def test_mutated_expressions_are_refused(expression, data):
    text, _ = expression
    place = data.draw(st.integers(0, len(text)))
    bad = data.draw(
        st.sampled_from(["**", "//", "%", "_", ".", "e", "x", ",", "=", "!", "[", "(", ")", "1\n1", "٣", "#"])
    )
    mutated = text[:place] + bad + text[place:]
    got = compute(mutated)
    assert got is None, f"{mutated!r} was read as {got}"


@given(st.text(alphabet="0123456789+-*/() \n<answer>=.", max_size=80))
@example("<answer>")
@example("</answer>1<answer>")
@settings(max_examples=200)
def test_no_text_makes_the_checker_raise(text):
    answer = read_expression(text)
    assert answer is None or isinstance(answer[0], Fraction)
