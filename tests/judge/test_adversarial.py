"""Texts that try to be paid without being right: each with what it is worth, and why, in adversarial.toml.

All go through `minirl.rewards.score`, as in training. Attacks by programs are in the tests of the sandbox.
"""

import functools

import pytest
from cases import joined, read_cases

from minirl.judge import reasoning_gym
from minirl.judge.answers import in_block, last_number
from minirl.judge.expressions import countdown_correct
from minirl.lab.rewards import REWARDS
from minirl.rewards import score

RULES = REWARDS | {"countdown": countdown_correct, "last_number in a block": in_block(last_number)}
GROUPS = [(dict(columns), group["cases"]) for group in read_cases("adversarial")["group"] for columns in group["rules"]]
NAMES = [columns.pop("rule") for columns, _ in GROUPS]
CASES = [(number, i) for number, (_, cases) in enumerate(GROUPS) for i in range(len(cases))]


def rule_of(name: str):
    if not name.startswith("reasoning_gym "):
        return RULES[name]
    dataset = name.removeprefix("reasoning_gym ")
    read = reasoning_gym.last_number if dataset == "chain_sum" else reasoning_gym.last_line
    return reasoning_gym.scorer(dataset, "{}", read)


@functools.cache
def scores(number: int) -> list[float]:
    columns, cases = GROUPS[number]
    columns = {column: [value] * len(cases) for column, value in columns.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minirl.judge.math.SECONDS", 1.5)  # for the towers of powers
        completions = [joined(completion) for completion, _, _ in cases]
        return score({"mine": (1.0, rule_of(NAMES[number]))}, ["p"] * len(cases), completions, columns)[0]


@pytest.mark.parametrize(("number", "case"), CASES, ids=[f"{NAMES[number]} {number}-{case}" for number, case in CASES])
def test_a_completion_is_worth(number, case):
    for package in ("math_verify", "reasoning_gym"):
        if NAMES[number].startswith(package.removesuffix("_verify")):
            pytest.importorskip(package)
    completion, expected, why = GROUPS[number][1][case]
    assert scores(number)[case] == expected, f"{joined(completion)[:80]!r}: {why}"


def test_the_corpus_is_large_and_has_both_sides():
    assert len({(NAMES[number], joined(GROUPS[number][1][case][0])) for number, case in CASES}) >= 250
    for _, cases in GROUPS:
        assert {expected for _, expected, _ in cases} == {0, 1}


@pytest.mark.parametrize(
    ("name", "answer", "worth"),
    [
        ("answer", 7, 0),
        ("exact_match", "x", 0),
        ("last_number", 0, 0),
        ("format", "", 0),
        ("function_call", {"name": "add", "arguments": {"a": 1, "b": 2}}, 0),
        ("repetitive", "", 1),  # these two are penalties, so 1 is what silence costs
        ("too_short", "", 1),
    ],
)
def test_no_reward_is_paid_for_silence(name, answer, worth):
    total, _ = score({name: (1.0, REWARDS[name])}, ["p"] * 2, ["", " \n"], {"answer": [answer] * 2})
    assert total == [worth, worth]
