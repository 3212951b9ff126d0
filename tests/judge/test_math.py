r"""The reward `math`: reference answers as in the MATH data set, and completions that answer in a \boxed{} and without.

The cases are in math.toml. The comparison is called here in this process: the pool around it, where each takes a tenth
of a second, is tested by the corpus in test_adversarial.py.
"""

import re
import subprocess
import sys

import pytest
from cases import read_cases

import minirl.judge.math as math_reward
from minirl.judge.numbers import answer_number
from minirl.lab.rewards import REWARDS

pytest.importorskip("math_verify")
from minirl.judge.equality import is_equal, reading, simplest

CASES = read_cases("math")
MATH = CASES["parts"]["cases"]


def boxed(answer: str) -> str:
    return answer if r"\boxed" in answer else rf"\boxed{{{answer}}}"


@pytest.mark.parametrize(("gold", "wrong"), MATH)
def test_a_reference_answer_in_a_box_is_right_and_its_parts_are_wrong(gold, wrong):
    assert is_equal(gold, boxed(gold))
    assert [text for text in wrong if is_equal(gold, boxed(text)) or is_equal(gold, text)] == []


def test_a_reference_answer_without_a_box_is_right_too():
    words = {"AB"}  # bare words are no mathematics
    assert [gold for gold, _ in MATH if not is_equal(gold, gold) and gold not in words] == []


@pytest.mark.parametrize(("completion", "expected", "why"), CASES["two"]["cases"])
def test_a_number_is_an_answer_only_if_it_stands_alone(completion, expected, why):
    assert is_equal("2", completion) == expected, why


@pytest.mark.parametrize(("gold", "completion", "expected"), CASES["others"]["cases"])
def test_equal_in_another_form(gold, completion, expected):
    assert is_equal(gold, completion) == expected


@pytest.mark.parametrize(("place", "right"), [("bound", False), ("free", True)])
def test_a_box_is_an_answer_only_if_it_is_no_part_of_an_expression(place, right):
    texts = [text.replace("B", r"\boxed{7}") for text in re.split(" ; |\n", CASES["box"][place].strip())]
    assert [text for text in texts if is_equal("7", text) != right] == []
    assert [text for text in texts if (answer_number(text) == 7) != right] == []


def test_votes_are_of_the_whole_expression():
    texts = (r"2\sqrt{3}", "It is 2x + 1.", "so 2", r"\boxed{1}\boxed{2}")
    assert [reading(text) for text in texts] == ["2*sqrt(3)", "2*x + 1", "2", None]


@pytest.mark.parametrize(("one", "other"), CASES["same"]["cases"])
def test_equal_answers_are_one_vote(one, other):
    votes = {simplest(rf"\boxed{{{text}}}") for text in (one, other)}
    assert len(votes) == 1
    assert is_equal(one, rf"\boxed{{{other}}}")
    assert votes.isdisjoint(simplest(rf"\boxed{{{text}}}") for text in ("2", r"\sqrt{3}", "[1,2)", "x", "x<4"))


def test_a_float_of_the_reference_is_its_digits():
    """Python writes 1e-05 and 1e+20."""
    completions, answers = ["0.00001", "1e-05", "1" + "0" * 20], [1e-05, 1e-05, 1e20]
    assert REWARDS["math"](prompts=["p"] * 3, completions=completions, answer=answers) == [1, 0, 1]


def test_a_reference_with_a_unit_or_a_point_is_the_number_that_it_says():
    units = dict(CASES["units"]["cases"])
    pairs = [(answer, text) for answer, texts in units.items() for text in texts]
    assert [pair for pair in pairs if not is_equal(math_reward._gold(pair[0]), pair[1])] == []
    wrong = ["17", "4", "1", "18.5", "5", "3", "0.4", "2 ½"]
    assert [(a, text) for a in units for text in wrong if a != "5 km/h" and is_equal(math_reward._gold(a), text)] == []


AFTERWARDS = r"""
import sys
from minirl.judge.equality import is_equal
known = set(sys.modules)
for answer, completion in (line.split(" ; ") for line in sys.argv[1].splitlines()):
    is_equal(answer, completion)
print(*sorted(sys.modules.keys() - known))
"""


def test_a_comparison_imports_nothing_that_is_not_there_when_the_file_is_loaded():
    """In the sandbox every comparison has a process of its own, which would import it again."""
    found = subprocess.run(
        [sys.executable, "-c", AFTERWARDS, CASES["later"]["compared"].strip()], capture_output=True, check=True
    )
    assert found.stdout.split() == [], found.stdout


def test_a_reference_answer_that_took_too_long_is_read_again(monkeypatch):
    late, calls = [TimeoutError("no result within 5 s")], []

    def answers(name, arguments):
        calls.append((name, arguments))
        return [late.pop() if late and name == "is_readable" else True for _ in arguments]

    monkeypatch.setattr(math_reward, "_calls", answers)
    monkeypatch.setattr(math_reward, "_readable", {})
    scores = [REWARDS["math"](prompts=["p"], completions=["7"], answer=["7"]) for _ in range(3)]
    assert scores == [[None], [1.0], [1.0]]
    assert [arguments for name, arguments in calls if name == "is_readable"] == [[("7",)], [("7",)], []]
