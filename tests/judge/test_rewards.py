"""Rewards: the rules, their guards, and what happens when one misbehaves."""

import importlib.util
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from cases import values_of
from hypothesis import given
from hypothesis import strategies as st

from minirl.errors import InputError
from minirl.judge import math as math_adapter
from minirl.judge.answers import format_match, in_block
from minirl.judge.numbers import last_number, whole_number
from minirl.judge.pool import Job, shared
from minirl.lab.rewards import REWARDS, Outside, load_reward
from minirl.metrics import majority_at_k
from minirl.rewards import RewardError, score
from minirl.rules import guarded, is_repetitive, overlong, overlong_penalty, repetition_penalty

NAN = math.nan


def score_one(function, completions=("a", "b", "c"), **options):
    return score({"mine": (1.0, function)}, ["p"] * len(completions), list(completions), {}, **options)


# --- numbers in text


def test_numbers_too_long_to_be_meant_are_not_read():
    assert last_number("9" * 1000) == int("9" * 1000)
    for text in ("9" * 10**6, "1/" + "9" * 5000, "1" * 5000 + "/7"):
        assert last_number(text) is None


@given(st.fractions(), st.sampled_from(["{}", "it is {}.", "3 = {}", "({})", "{}\n"]))
def test_any_fraction_is_read_back_from_a_text(value, text):
    assert last_number(text.format(value)) == value
    assert whole_number(f" {value}\n") == value


def test_a_whole_number_is_the_whole_text():
    assert [whole_number(text) for text in ("7 apples", "1 2", "a", "", "1e3", " -1,000 ")] == [None] * 5 + [-1000]


# --- answers


def test_scientific_notation_is_not_the_number_it_stands_for():
    assert values_of("last_number", ["1e3", "1000", "1,000", "1000.0", "1000 = 1e3"], answer="1000") == [0, 1, 1, 1, 0]


def test_fractions_and_decimals_are_equal_as_numbers():
    assert values_of("last_number", ["0.5", "1/2", "2/4", "1/3", "2"], answer="1/2") == [1, 1, 1, 0, 0]
    assert values_of("last_number", ["0.1"], answer=0.1) == [1]


@pytest.mark.parametrize("name", ["answer", "exact_match"])
def test_true_and_false_are_those_of_json_and_of_python(name):
    said = ["true", "True", " TRUE\n", "<think>false</think>true", "false", "1", "yes", ""]
    assert values_of(name, said, answer=True) == [1, 1, 1, 1, 0, 0, 0, 0]
    assert values_of(name, ["false", "False", "true", "0", "no"], answer=False) == [1, 1, 0, 0, 0]
    assert values_of(name, ["True", "true"], answer="True") == [1, 0]  # a text is that text


def test_exact_match_compares_the_stripped_text():
    assert values_of("exact_match", ["Paris", " Paris\n", "paris", "Paris.", ""], answer="Paris") == [1, 1, 0, 0, 0]


def test_completions_without_a_usable_answer_are_unscorable():
    columns = {"prompts": ["p"] * 2, "completions": ["7", "7"]}
    assert REWARDS["last_number"](**columns, answer=["Paris", None]) == [None, None]
    assert REWARDS["exact_match"](**columns, answer=[7, None]) == [1.0, None]
    assert REWARDS["answer"](**columns, answer=["Paris", None]) == [0.0, None]
    assert REWARDS["answer"](**columns) == [None, None]


def test_a_format_is_the_whole_completion():
    reward = format_match(r"<a>.*</a>")
    assert reward(prompts=[""] * 4, completions=["<a>\n7</a>", "<a>7</a> ", "7", ""]) == [1, 0, 0, 0]
    with pytest.raises(InputError, match="not a regular expression"):
        format_match("(")


def test_the_think_answer_format_has_each_tag_once():
    good = "<think>one\ntwo</think>\n<answer>7</answer>\n"
    bad = [
        "",
        "<answer>7</answer>",
        good + "8",
        good + good,
        "<think>a</think><answer>6</answer><answer>7</answer>",
        "<think>a<think>b</think><answer>7</answer>",
        "<answer>7</answer><think>a</think>",
        "<think>a</think><answer>7",
    ]
    assert values_of("format", [good, *bad]) == [1] + [0] * len(bad)


# --- guards


@pytest.mark.parametrize(
    "tokens, n, penalty, expected",
    [
        (["a", "b", "c", "d"], 3, -1.0, 0.0),
        (["a", "b", "c", "a", "b", "c"], 3, -1.0, -0.25),  # abc bca cab abc: 3 of 4
        (["a", "a", "a", "a", "a"], 3, -1.0, -2 / 3),
        (["a", "a", "a", "a", "a"], 3, -0.3, -0.2),
        (["a", "b", "a", "b"], 1, -1.0, -0.5),
        ([1, 2], 3, -1.0, 0.0),
        ([], 3, -1.0, 0.0),
    ],
)
def test_the_repetition_penalty_is_the_share_of_repeated_ngrams(tokens, n, penalty, expected):
    assert repetition_penalty(tokens, n, penalty) == pytest.approx(expected)


def test_three_signs_of_repetition():
    assert not is_repetitive(range(500))
    assert is_repetitive([1, 2] * 5)  # 3-grams
    twenty = list(range(20))
    assert is_repetitive([*twenty, -1, *twenty, -2, *twenty, -3, *twenty, *range(100, 400)])
    assert not is_repetitive([*twenty, -1, *twenty, -2, *twenty, *range(100, 400)])
    assert is_repetitive([*range(300), *[7] * 51])
    assert not is_repetitive([*range(300), *[7] * 50])


@pytest.mark.parametrize("seed", range(60))
def test_repetition_is_as_its_three_signs_say(seed):
    """Against the definition, on texts near the borders of all three."""
    draw = random.Random(seed)
    loop = [draw.randrange(9) for _ in range(draw.choice([1, 5, 20, 30]))]
    fresh = iter(range(100, 10_000))
    tokens = [t for _ in range(draw.randint(2, 5)) for t in (*loop * draw.choice([1, 1, 49]), *(next(fresh),) * 3)]
    tokens += [next(fresh) for _ in range(draw.choice([0, 60, 400]))]
    starts, places = {}, range(len(tokens) - 19)
    for i in places:
        found = starts.setdefault(tuple(tokens[i : i + 20]), [])
        if not found or i >= found[-1] + 20:
            found.append(i)
    runs = max(len(list(run)) for _, run in itertools.groupby(tokens))
    many = repetition_penalty(tokens) < -0.5
    assert is_repetitive(tokens) == (many or runs > 50 or any(len(found) > 3 for found in starts.values()))


def test_repetition_counts_token_ids_where_they_are_given():
    text = "a b c d e f"
    assert values_of("repetition", [text, "A a a a a"]) == pytest.approx([0.0, -2 / 3])
    assert values_of("repetition", [text], completion_ids=[5, 5, 5, 5]) == [-0.5]
    assert values_of("repetitive", [text], completion_ids=[5] * 9) == [1.0]


def test_the_overlong_penalty_matches_the_golden_values(golden):
    case = golden["cases"]["dapo_overlong_penalty"]
    inputs, params, expected = case["inputs"], case["params"], case["expected"]
    got = overlong_penalty(inputs["lengths"], params["l_max"], params["l_cache"])
    np.testing.assert_allclose(got, expected["penalty"], atol=1e-12)
    got = overlong_penalty(inputs["lengths_paper"], params["paper_l_max"], params["paper_l_cache"])
    np.testing.assert_allclose(got, expected["penalty_paper"], atol=1e-12)


def test_the_overlong_reward_counts_token_ids():
    reward = overlong(l_max=10, l_cache=4)
    assert reward(prompts=["p"] * 3, completions=["a"] * 3, completion_ids=[[0] * 6, [0] * 8, [0] * 30]) == [
        0,
        -0.5,
        -1,
    ]


@pytest.mark.parametrize("l_max, l_cache", [(10, 0), (10, 11), (0, 0)])
def test_overlong_refuses_a_cache_outside_its_length(l_max, l_cache):
    with pytest.raises(InputError, match="l_cache"):
        overlong(l_max, l_cache)


def test_the_guarded_reward_matches_the_golden_values(golden):
    case = golden["cases"]["guarded_reward"]
    flags = case["inputs"]["correct_format_repetitive_short"]

    def part(column):
        return lambda **_: [row[column] for row in flags]

    rewards = guarded(part(0), part(1), part(2), part(3), **case["params"])
    total, parts = score(rewards, ["p"] * len(flags), [""] * len(flags), {})
    assert total == pytest.approx(case["expected"]["reward"], abs=1e-9)
    assert parts["too_short"] == [row[3] for row in flags]


def test_guards_cannot_be_farmed():
    rewards = guarded(REWARDS["last_number"], format_match(r".*[0-9]"))
    completions = ["7", "1", "", " ", "7 " * 1000, "ok"]
    total, _ = score(rewards, ["p"] * 6, completions, {"answer": ["7"] * 6})
    assert total == pytest.approx([0.9, 0.2, -0.8, -0.8, 0.2, 0.0])
    assert min(total) == total[2]  # empty is the worst, and a number
    with pytest.raises(InputError, match="farm the format"):
        guarded(REWARDS["last_number"], format_match(".*"), w_correct=0.2, w_format=0.3)


# --- score


def test_parts_are_kept_apart_and_weighted_into_the_total():
    rewards = {"a": (2.0, lambda **_: [1, 0.5]), "b": (-1.0, lambda **_: (True, False))}
    total, parts = score(rewards, ["p", "p"], ["x", "y"], {})
    assert parts == {"a": [1.0, 0.5], "b": [1.0, 0.0]}
    assert total == [1.0, 1.0]


def test_rewards_get_prompts_completions_and_columns_by_name():
    def mine(completions, answer, prompts, level):
        return [int(answer[i] == completions[i]) + len(prompts[i]) + level[i] for i in range(2)]

    total, _ = score({"mine": (1, mine)}, ["p", "pp"], ["x", "y"], {"answer": ["x", "z"], "level": [10, 20]})
    assert total == [12.0, 22.0]


@pytest.mark.parametrize(
    "values", [np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), [np.float32(1), torch.tensor(2), 3]]
)
def test_arrays_and_tensors_are_taken_as_lists(values):
    total, _ = score_one(lambda **_: values)
    assert total == [1.0, 2.0, 3.0] and all(type(value) is float for value in total)


def test_a_completion_that_one_part_cannot_score_has_no_total():
    rewards = {"a": (1.0, lambda **_: [1, None, 1]), "b": (0.1, lambda **_: [1, 1, NAN])}
    total, parts = score(rewards, ["p"] * 3, ["x"] * 3, {})
    assert [math.isnan(value) for value in total] == [False, True, True]
    assert parts["b"][:2] == [1.0, 1.0]


def test_a_part_of_weight_0_is_only_logged():
    rewards = {"a": (2.0, lambda **_: [1, None, 1]), "b": (0.0, lambda **_: [1, 1, NAN])}
    total, parts = score(rewards, ["p"] * 3, ["x"] * 3, {})
    assert [total[0], total[2]] == [2.0, 2.0] and math.isnan(total[1])
    assert parts["b"][:2] == [1.0, 1.0] and math.isnan(parts["b"][2])


@pytest.mark.parametrize(
    "values, message",
    [
        ([1, 2], r"'mine' returned 2 values for 1, not one for each, for completion 0"),
        ([1, 2, 3, 4], "4 values for 1"),
        (None, "returned None, not a list"),
        (1.0, "returned 1.0, not a list"),
        ("123", "returned '123', not a list"),
        ({0: 1, 1: 2, 2: 3}, "returned {0: 1, 1: 2, 2: 3}, not a list"),
        (torch.tensor(1.0), "returned 1.0, not a list"),
        ([1, "2", 3], "returned '2', which is no number, for completion 1"),
        ([1, 2, [3]], r"returned \[3\], which is no number; .* for completion 2"),
        ([1, 1j, 3], "returned 1j, which is no number, for completion 1"),
        ([1, 2, math.inf], "returned inf for completion 2"),
        ([-math.inf, 2, 3], "returned -inf for completion 0"),
        ([1, 10**400, 3], "for completion 1"),
    ],
)
def test_a_result_that_is_not_one_number_a_completion_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        score_one(lambda **_: values)


def test_a_reward_that_raises_is_named_with_the_completion():
    def mine(prompts, completions, **columns):
        return [1 / (completion != "b") for completion in completions]

    with pytest.raises(RewardError, match=r"reward 'mine' failed with ZeroDivisionError: .* for completion 1 \('b'\)"):
        score_one(mine)


def test_a_reward_that_does_not_take_the_columns_is_told_so():
    with pytest.raises(InputError, match="unexpected keyword argument 'answer'"):
        score({"mine": (1.0, lambda prompts, completions: [1.0])}, ["p"], ["a"], {"answer": ["x"]})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({}, ["p"], ["a"], {}), "no reward function"),
        (({"f": (NAN, len)}, ["p"], ["a"], {}), "weight must be a finite number"),
        (({"f": ("1", len)}, ["p"], ["a"], {}), "weight must be a finite number"),
        (({"f": (1, len)}, ["p", "q"], ["a"], {}), "'prompts' has 2 entries for 1 completions"),
        (({"f": (1, len)}, ["p"], ["a"], {"answer": []}), "'answer' has 0 entries"),
        (({"f": (1, len)}, ["p"], ["a"], {"prompts": ["x"]}), "cannot be called 'prompts'"),
        (({"f": (1, len)}, ["p"], ["a"], {}, 0), "timeout must be a positive"),
        (({"f": (1, len)}, ["p"], ["a"], {}, 1, "nan"), "on_bad must be"),
    ],
)
def test_score_refuses_a_batch_that_does_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        score(*arguments)


def test_no_completions_have_no_scores():
    assert score_one(lambda completions, **_: [1.0] * len(completions), completions=()) == ([], {"mine": []})


# --- a reward by its name


def test_a_reward_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "FACTOR = 2\ndef longer(completions, **columns):\n    return [FACTOR * len(c) for c in completions]\n"
    )
    assert score_one(load_reward(f"{path}:longer"), completions=["ab"])[0] == [4.0]
    assert load_reward("last_number") is REWARDS["last_number"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("exact_mach", r"did you mean 'exact_match'\?\): choose from answer, exact_match.*file\.py:function"),
        ("{folder}/none.py:f", "there is no Python file"),
        ("{folder}/notes.txt:f", "there is no Python file"),
        ("{folder}/mine.py", "give path/to/file.py:function"),
        ("{folder}/mine.py:f", "has no function 'f'; its functions are: good"),
        ("{folder}/mine.py:NUMBER", "has no function 'NUMBER'"),
        ("{folder}/broken.py:f", "cannot be loaded .SyntaxError"),
        ("{folder}/quits.py:f", "cannot be loaded .SystemExit"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_explained(tmp_path, spec, message):
    (tmp_path / "notes.txt").write_text("f")
    (tmp_path / "mine.py").write_text("NUMBER = 1\ndef good(completions, **columns): ...\n")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match=message):
        load_reward(spec.format(folder=tmp_path))


# --- rewards outside the trainer, and what is no reward

MINE = """
import math, os, time
state = []
def good(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]
def hangs(completions, **columns):
    while "b" in completions: pass
    return [1.0] * len(completions)
def raises(completions, **columns):
    return [1 / len(c.replace("b", "")) for c in completions]
def none(completions, **columns):
    return [None if c == "b" else 1 for c in completions]
def nan(completions, **columns):
    return [math.nan if c == "b" else 1 for c in completions]
def infinite(completions, **columns):
    return [math.inf if c == "b" else 1 for c in completions]
def text(completions, **columns):
    return ["high" if c == "b" else 1 for c in completions]
def long(completions, **columns):
    return [x for c in completions for x in ([1, 2] if c == "b" else [1])]
def no_list(completions, **columns):
    return "high" if "b" in completions else [1] * len(completions)
def dies(completions, **columns):
    if "b" in completions: os._exit(3)
    return [1] * len(completions)
def remembers(completions, **columns):
    state.append(completions)
    return [len(state)] * len(completions)
"""
BAD = {  # function: kind of the fault, words of the sentence
    "hangs": ("late", "gave no result within 0.3 s"),
    "raises": ("unusable", "failed with ZeroDivisionError"),
    "none": ("unscored", "returned None"),
    "nan": ("unscored", "returned NaN"),
    "infinite": ("unusable", "returned inf"),
    "text": ("unusable", "returned 'high', which is no number"),
    "long": ("unusable", "returned 2 values for 1, not one for each"),
    "no_list": ("unusable", "returned 'high', not a list"),
    "dies": ("unusable", "failed with its process died (exit code 3)"),
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Loads a reward of MINE: called outside the trainer, or inside as a function of Python's own."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(MINE)
    inside = {}
    exec(MINE, inside)
    return lambda name, outside=True: load_reward(f"{file}:{name}") if outside else inside[name]


def faults_of(reward, completions=("a", "b", "c"), **options):
    """The total of each completion, and the faults."""
    faults = []
    columns = {"answer": ["a"] * len(completions)}
    total, _ = score({"mine": (2.0, reward)}, ["p"] * 3, completions, columns, on_fault=faults.append, **options)
    return total, faults


def test_a_reward_of_a_file_is_called_outside_and_gives_what_it_gives_inside(mine):
    reward = mine("good")
    assert isinstance(reward, Outside) and faults_of(reward) == faults_of(mine("good", outside=False))
    assert reward(prompts=["p"] * 2, completions=["a", "b"], answer=["a", "a"]) == [1.0, 0.0]
    assert faults_of(mine("remembers"))[0] == [2.0] * 3  # each call is the first
    trusted = load_reward(f"trusted:{reward.function.rpartition(':')[0]}:remembers")
    assert trusted.trusted and sum(faults_of(trusted)[0]) > 6.0


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_reward_is_named_with_its_prompt(name, outside, mine):
    if name in ("hangs", "dies") and not outside:
        pytest.skip("only another process survives that")
    kind, words = BAD[name]
    options = {"timeout": 0.3 if name == "hangs" else 10, "places": [f"prompt {n}, completion 0" for n in (7, 8, 9)]}
    total, (fault,) = faults_of(mine(name, outside), on_bad="skip", **options)
    assert total == [2.0, 0.0 if name == "hangs" else pytest.approx(NAN, nan_ok=True), 2.0]
    assert (fault.reward, fault.row, fault.kind) == ("mine", 1, kind)
    assert (
        fault.sentence.startswith(f"reward 'mine' {words}") and "for prompt 8, completion 0 ('b'): " in fault.sentence
    )
    what = fault.sentence.partition("('b'): ")[0]
    stopping = {on_bad: _stops(mine(name, outside), on_bad, what, options) for on_bad in ("stop", "strict")}
    assert stopping["stop"] == (fault.sentence.removeprefix(what) if kind == "unusable" else "")
    assert ("strict scoring stops at that" in stopping["strict"]) == (kind != "unusable") and stopping["strict"]


def _stops(reward, on_bad, what, options) -> str:
    """The end of the sentence."""
    try:
        faults_of(reward, on_bad=on_bad, **options)
    except RewardError as error:
        assert str(error).startswith(what)
        return str(error).removeprefix(what)
    return ""


def test_a_reward_that_fails_on_the_batch_alone_spoils_all_of_it():
    def moody(completions, **columns):
        return [1.0] if len(completions) == 1 else []

    total, faults = faults_of(moody, on_bad="skip")
    assert all(map(math.isnan, total)) and [fault.row for fault in faults] == [0, 1, 2]
    assert "returned 0 values for 3" in faults[0].sentence


def test_a_column_that_cannot_be_sent_is_named(mine):
    with pytest.raises(InputError, match="cannot be sent to another process"):
        score({"mine": (1.0, mine("good"))}, ["p"], ["a"], {"answer": [object()]})


def test_a_wall_that_a_reward_runs_into_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("import socket\ndef f(completions, **columns): return [socket.socket()]\n")
    fault = faults_of(load_reward(f"{tmp_path}/mine.py:f"), on_bad="skip")[1][0]
    assert "PermissionError" in fault.sentence and "or put `trusted:` before its path)" in fault.sentence


@pytest.mark.parametrize("options", [{"on_bad": "ignore"}, {"timeout": 0}, {"timeout": math.nan}])
def test_options_of_scoring_are_checked(options):
    with pytest.raises(InputError, match=next(iter(options))):
        score_one(lambda completions, **columns: [1.0] * len(completions), **options)


# --- math-verify


@pytest.fixture
def math_verify():
    return pytest.importorskip("math_verify")


def test_mathematical_answers_are_equal_by_value(math_verify):
    completions = [r"so \boxed{\frac{1}{2}}", "0.5", "1/2", "$2/4$", r"\boxed{0.5} or \boxed{0.6}", "1/3", ""]
    for answer in ("1/2", r"\frac{1}{2}", r"$\frac12$"):
        assert values_of("math", completions, answer=answer) == [1, 1, 1, 1, 0, 0, 0]


def test_the_last_mathematical_answer_counts(math_verify):
    completions = ["7", "7, no, 8", "8, no, 7", "7 " * 1000, "٧", ""]
    assert values_of("math", completions, answer="7") == [1, 0, 1, 1, 0, 0]


def test_mathematical_answers_that_cannot_be_read_are_unscorable(math_verify):
    got = REWARDS["math"](prompts=["p"] * 3, completions=["7"] * 3, answer=["", None, 7])
    assert got == [None, None, 1.0]


def test_a_tower_of_powers_does_not_hang_the_comparison(math_verify, monkeypatch):
    monkeypatch.setattr(math_adapter, "SECONDS", 1.0)
    start = time.monotonic()
    late, power, right = values_of("math", ["$9^{9^{9^9}}$", "9**9**9**9", "7"], answer="7")
    assert isinstance(late, TimeoutError) and right == 1
    assert power == 0 or isinstance(power, TimeoutError)  # read as 9, or handed to sympy
    assert time.monotonic() - start < 10


def test_mathematical_votes_are_readings(math_verify):
    completions = [r"\boxed{0.50}", "so $x = 7$", r"\boxed{1} \boxed{2}", "none", ""]
    assert [math_adapter.math_vote(text) for text in completions] == ["1/2", "7", None, None, None]


def test_equal_answers_vote_together(math_verify):
    """Four of seven are right, in two spellings of two each; three agree on a wrong one."""
    texts = [r"\boxed{\sqrt{8}}"] * 2 + [r"\boxed{2\sqrt{2}}"] * 2 + [r"\boxed{3}"] * 3
    votes = [math_adapter.math_vote(text) for text in texts]
    assert majority_at_k(votes, {votes[0]}, 7) == 1.0


def test_a_vote_that_cannot_be_simplified_is_as_it_was_read(math_verify, monkeypatch):
    calls = math_adapter._calls

    def late(name, arguments):
        return [TimeoutError()] * len(arguments) if name == "simplest" else calls(name, arguments)

    monkeypatch.setattr(math_adapter, "_calls", late)
    assert math_adapter.math_vote(r"\boxed{\sqrt{11} + \sqrt{44}}") == "sqrt(11) + sqrt(44)"
    monkeypatch.setattr(math_adapter, "_calls", calls)  # the same reading later
    assert math_adapter.math_vote(r"so \boxed{\sqrt{11} + \sqrt{44}}") == "sqrt(11) + sqrt(44)"


def test_a_missing_math_verify_is_told_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'minirl\[math\]'"):
        score({"math": (1.0, REWARDS["math"])}, ["p"], ["7"], {"answer": ["7"]})


# --- rewards of steps


def steps_of(value, completion="ab\n\ncd", **options) -> tuple[list, float]:
    """What `score` tells of one completion whose reward is `value`: its steps and its total."""
    told = []

    def listen(*what):
        told.append(what)

    total, _ = score_one(lambda completions, **_: [value], (completion,), on_steps=listen, **options)
    assert [what[:2] for what in told] in ([], [("mine", 0)])
    return [what[2] for what in told], total[0]


@pytest.mark.parametrize(
    "value, steps",
    [
        ([1, 2.5, -1], [(2, 1.0), (3, 2.5), (6, -1.0)]),  # of lines, an empty one too
        (np.array([1, 2, -1]), [(2, 1.0), (3, 2.0), (6, -1.0)]),
        ([(1, 0.5), (6, 2)], [(1, 0.5), (6, 2.0)]),
        ([[0, 0.5]], [(0, 0.5)]),
        (((4, 1), (4, 1.5)), [(4, 1.0), (4, 1.5)]),
    ],
)
def test_rewards_of_steps_are_told_and_count_as_their_sum(value, steps):
    assert steps_of(value) == ([steps], sum(reward for _, reward in steps))


@pytest.mark.parametrize("value, total", [(2, 2.0), (np.float32(0.5), 0.5), (torch.tensor(3), 3.0)])
def test_a_number_beside_rewards_of_steps_is_one_of_the_whole(value, total):
    assert steps_of(value) == ([], total)


@pytest.mark.parametrize(
    "value, complaint",
    [
        ([1, 2], r"2 step rewards, not one for each of 3 lines, nor pairs, for completion 0 \('ab\\n\\ncd'\)"),
        ([], "0 step rewards, not one"),
        ([1, 2, math.nan], r"\[1, 2, nan\], which are no finite numbers"),
        ([1, "2", 3], r"\[1, '2', 3\], which are no finite numbers"),
        ([(1, 2), 3], r"\[\(1, 2\), 3\], which"),
        ([(1, 2, 3)], "no pairs of a whole number of characters and such a reward"),
        ([(1.5, 2)], "no pairs of a whole number of characters and such a reward"),
        ([(1, math.inf)], "no finite numbers"),
        ([(3, 1), (2, 1)], r"steps that end at \[3, 2\], where ends must rise, up to 6 characters"),
        ([(7, 1)], r"steps that end at \[7\]"),
        ([(-1, 1)], r"steps that end at \[-1\]"),
    ],
)
def test_malformed_rewards_of_steps_are_refused(value, complaint):
    with pytest.raises(InputError, match=f"^reward 'mine' returned .*{complaint}"):
        steps_of(value)


@pytest.mark.parametrize("value", [[1.0], [(0, 1.0)], [], np.array([1.0, 2.0])])
def test_rewards_of_steps_are_refused_where_nobody_listens(value):
    with pytest.raises(
        InputError, match="no number; only advantage grpo_process takes rewards of steps, for completion"
    ):
        score_one(lambda completions, **_: [value], ("a",))


def test_columns_may_have_any_name_that_rewards_do_not_take(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions, timeout, **columns): return [timeout[0] + columns['self'][0]]\n"
    )
    outside = load_reward(f"{tmp_path}/mine.py:f")
    for reward in (outside, in_block(outside)):
        total, _ = score({"f": (1.0, reward)}, ["p"], ["<answer>1</answer>"], {"timeout": [5], "self": [2]}, timeout=3)
        assert total == [7.0]


def test_a_message_that_never_ends_is_cut(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions, **columns): raise ValueError('x' * 10**6)\n")

    def inside(completions, **columns):
        raise ValueError("x" * 10**6)

    for reward in (load_reward(f"{tmp_path}/mine.py:f"), inside):
        sentence = faults_of(reward, on_bad="skip")[1][0].sentence
        assert "ValueError: xxx" in sentence and "…" in sentence and len(sentence) < 1000


def test_an_exception_that_cannot_be_shown_is_told(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Odd(Exception):\n    def __str__(self): return 1 / 0\ndef f(completions, **columns): raise Odd\n"
    )
    for spec in (f"{tmp_path}/mine.py:f", f"trusted:{tmp_path}/mine.py:f"):
        assert (
            "failed with Odd: its message cannot be shown" in faults_of(load_reward(spec), on_bad="skip")[1][0].sentence
        )


@pytest.mark.parametrize(
    "how", ["os._exit(0)", "os.kill(os.getpid(), 11)", "raise KeyboardInterrupt", "raise SystemExit"]
)
def test_a_file_whose_import_ends_its_process_is_refused_at_once(how, tmp_path):
    (tmp_path / "mine.py").write_text(f"import os\n{how}\ndef f(completions, **columns): return [1.0]\n")
    with pytest.raises(InputError, match=r"mine.py:f cannot be loaded \(.*\): correct it"):
        load_reward(f"{tmp_path}/mine.py:f")


def test_a_file_imports_what_lies_beside_it_and_nothing_of_another_one(tmp_path):
    for name, worth in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f"WORTH = {worth}\n")
        (tmp_path / name / "numpy.py").write_text("1 / 0\n")
        (tmp_path / name / "mine.py").write_text(
            "import helper, numpy\nnumpy.arange\ndef f(completions, **columns):\n    import helper as again\n"
            "    return [helper.WORTH + again.WORTH]\n"
        )
    for trusted in ("", "trusted:"):
        for name, worth in (("one", 2), ("two", 4), ("one", 2)):
            assert (
                score_one(load_reward(f"{trusted}{tmp_path}/{name}/mine.py:f"), completions=["a"] * 4)[0] == [worth] * 4
            )


def test_only_a_trusted_function_has_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "5")
    shared().close()  # workers take the environment when they start
    (tmp_path / "mine.py").write_text(
        "import os\nAT_IMPORT = os.environ.get('MY_KEY', '0')\n"
        "def f(completions, **columns): return [float(AT_IMPORT) + float(os.environ.get('MY_KEY', '0'))]\n"
    )
    for trusted, worth in (("trusted:", 10), ("", 0), ("trusted:", 10)):
        assert score_one(load_reward(f"{trusted}{tmp_path}/mine.py:f"), completions=["a"] * 3)[0] == [worth] * 3
    program = "import os\ndef f(): return os.environ.get('MY_KEY')"
    outcomes = shared().map([Job.tests(program, "assert f() is None", entry="f")] * 6, 5)
    assert all(outcome["passed"] for outcome in outcomes)
