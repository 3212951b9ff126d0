"""Rewards: the rules, their guards, and what happens when one misbehaves."""

import itertools
import math
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirl.errors import InputError
from minirl.rewards import REWARDS, guarded, load_reward, score
from minirl.rewards import math as math_adapter
from minirl.rewards.numbers import last_number, whole_number
from minirl.rewards.rules import format_match, is_repetitive, overlong, overlong_penalty, repetition_penalty
from minirl.rewards.sandbox import ChildError, call_with_timeout, map_with_timeout

NAN = math.nan


def values_of(name, completions, answer=None, **columns):
    columns |= {} if answer is None else {"answer": [answer] * len(completions)}
    return REWARDS[name](prompts=["p"] * len(completions), completions=completions, **columns)


def score_one(function, completions=("a", "b", "c"), **options):
    return score({"mine": (1.0, function)}, ["p"] * len(completions), list(completions), {}, **options)


# --- numbers in text


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("3 + 4 = 7.", 7),
        ("**7**", 7),
        ("$1,234.50", Fraction("1234.5")),
        ("1,2", 2),
        ("1,2345", 2345),
        ("1 000", 0),  # a space separates two numbers
        ("007", 7),
        ("7.0", 7),
        (".5", Fraction(1, 2)),
        ("so...5", 5),
        ("2/4", Fraction(1, 2)),
        ("-2/4", Fraction(-1, 2)),
        ("14/2", 7),
        ("-7", -7),
        ("−7", -7),
        ("5-3", 3),
        ("(5)-3", 3),
        ("5 - 3", 3),
        ("5 -3", -3),
        ("x=-3", -3),
        ("50%", 50),
        ("7 or 8", 8),
        ("7 apples, CO2 and 3rd", 7),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seven",
        "٣",
        "７",
        "²",
        "½",
        "7²",
        "٣7",
        "1e3",
        "1E+3",
        "5 or 1e-3",
        "5km",
        "1.5km",
        "x2",
        "1_000",
        "0x10",
        "1/0",
    ],
)
def test_texts_without_a_readable_last_number(text):
    assert last_number(text) is None


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

ADVERSARIAL = [  # completion, and whether it answers 7
    ("", 0),
    ("  \n", 0),
    ("The answer is 7.", 1),
    ("7\n\nno, 8", 0),
    ("8, no, 7", 1),
    ("7 " * 1000, 1),
    ("1 2 3 4 5 6 7 8 9", 0),
    ("٧", 0),
    ("７", 0),
    ("7e0", 0),
    ("70", 0),
    ("0.7", 0),
    ("-7", 0),
    ("14/2", 1),
    ("7/2", 0),
    ("7//2", 0),
    ("9**9**9**9", 0),
]


@pytest.mark.parametrize("name", ["last_number", "answer"])
@pytest.mark.parametrize("completion, right", ADVERSARIAL)
def test_the_last_number_is_the_answer(name, completion, right):
    assert values_of(name, [completion], "7") == [right]


def test_scientific_notation_is_not_the_number_it_stands_for():
    assert values_of("last_number", ["1e3", "1000", "1,000", "1000.0", "1000 = 1e3"], "1000") == [0, 1, 1, 1, 0]


def test_fractions_and_decimals_are_equal_as_numbers():
    assert values_of("last_number", ["0.5", "1/2", "2/4", "1/3", "2"], "1/2") == [1, 1, 1, 0, 0]
    assert values_of("last_number", ["0.1"], 0.1) == [1]


def test_exact_match_compares_the_stripped_text():
    assert values_of("exact_match", ["Paris", " Paris\n", "paris", "Paris.", ""], "Paris") == [1, 1, 0, 0, 0]


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
    assert values_of("repetition", [text], completion_ids=[[5, 5, 5, 5]]) == [-0.5]
    assert values_of("repetitive", [text], completion_ids=[[5] * 9]) == [1.0]


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
        ([1, 2], r"'mine' returned 2 values for 3 completions"),
        ([1, 2, 3, 4], "4 values for 3"),
        (None, "returned a NoneType"),
        (1.0, "returned a float"),
        ("123", "returned a str"),
        ({0: 1, 1: 2, 2: 3}, "returned a dict"),
        (torch.tensor(1.0), "returned a float"),
        ([1, "2", 3], "returned '2' for completion 1"),
        ([1, 2, [3]], r"returned \[3\] for completion 2"),
        ([1, 1j, 3], "returned 1j for completion 1"),
        ([1, 2, math.inf], "returned inf for completion 2"),
        ([-math.inf, 2, 3], "returned -inf for completion 0"),
        ([1, 10**400, 3], "for completion 1"),
    ],
)
def test_a_result_that_is_not_one_number_a_completion_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        score_one(lambda **_: values)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_reward_that_raises_is_named_with_the_completion(timeout):
    def mine(prompts, completions, **columns):
        return [1 / (completion != "b") for completion in completions]

    with pytest.raises(InputError, match=r"reward 'mine' failed with ZeroDivisionError: .* at completion 1 \('b'\)"):
        score_one(mine, timeout=timeout)


def test_a_reward_that_raises_on_the_batch_alone_is_named():
    def mine(prompts, completions, **columns):
        return [1.0] if len(completions) == 1 else completions[99]

    with pytest.raises(InputError, match=r"'mine' failed with IndexError: .* on the batch"):
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
        (({"f": (1, len)}, ["p"], ["a"], {}, 1, "skip"), "on_timeout must be"),
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
        ("{folder}/broken.py:f", "cannot be imported .SyntaxError"),
        ("{folder}/quits.py:f", "cannot be imported .SystemExit"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_explained(tmp_path, spec, message):
    (tmp_path / "notes.txt").write_text("f")
    (tmp_path / "mine.py").write_text("NUMBER = 1\ndef good(completions, **columns): ...\n")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match=message):
        load_reward(spec.format(folder=tmp_path))


# --- sandbox


def evaluate_as_code(completion):
    return float(eval(completion))


def test_results_come_back_from_the_child():
    assert call_with_timeout(lambda a, b: {"sum": [a + b, None, NAN]}, (1, 2.5), 5)["sum"][:2] == [3.5, None]
    assert call_with_timeout(lambda: np.arange(3), (), 5) == [0, 1, 2]
    assert call_with_timeout(lambda: "x" * 10**6, (), 5) == "x" * 10**6  # more than a pipe holds
    assert call_with_timeout(os.getpid, (), 5) != os.getpid()


def test_a_call_that_hangs_is_killed_and_the_others_go_on():
    start = time.monotonic()
    outcomes = map_with_timeout(evaluate_as_code, [("1",), ("9**9**9**9",), ("2",), ("1/0",), ("3",)], 0.5)
    assert time.monotonic() - start < 5
    assert [outcomes[i] for i in (0, 2, 4)] == [1.0, 2.0, 3.0]
    assert isinstance(outcomes[1], TimeoutError) and isinstance(outcomes[3], ChildError)
    assert "ZeroDivisionError" in str(outcomes[3])


def test_a_call_that_ignores_signals_is_killed_with_its_children(tmp_path):
    def stubborn():
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "pid").write_text(str(child.pid))
        while True:
            time.sleep(1)

    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        call_with_timeout(stubborn, (), 0.5)
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid):
    """Whether the process ends within two seconds; a killed one that nobody has waited for counts as ended."""
    for _ in range(40):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: os._exit(3), "death of its process .exit code 3"),
        (lambda: os.kill(os.getpid(), 9), "death of its process .exit code -9"),
        (lambda: sys.exit("stop"), "SystemExit: stop"),
        (lambda: bytearray(2**40), "MemoryError"),
        (lambda: object(), "TypeError: a result of type object does not fit in JSON"),
    ],
)
def test_a_child_that_dies_or_raises_is_an_error(function, message):
    with pytest.raises(ChildError, match=message):
        call_with_timeout(function, (), 5)


def test_a_child_cannot_take_all_the_memory():
    with pytest.raises(ChildError, match="MemoryError"):
        call_with_timeout(lambda: len([0] * 2**26), (), 5, memory_mb=100)  # 512 MiB


def hang_on_b(prompts, completions, **columns):
    while "b" in completions:
        time.sleep(1)
    return [1.0] * len(completions)


def test_a_reward_that_hangs_is_an_error_that_names_the_completion():
    with pytest.raises(InputError, match=r"'mine' took longer than 0\.3 s at completion 1 \('b'\)"):
        score_one(hang_on_b, timeout=0.3)


def test_a_reward_that_hangs_leaves_one_completion_unscorable_on_request():
    late = []
    assert score_one(hang_on_b, timeout=0.3, on_timeout=lambda *where: late.append(where))[1]["mine"][0] == 1.0
    assert late == [("mine", 1)]
    total, parts = score_one(hang_on_b, timeout=0.3, on_timeout="nan")
    assert total[::2] == [1.0, 1.0] and math.isnan(total[1]) and math.isnan(parts["mine"][1])


def test_scores_in_the_sandbox_are_those_outside():
    rewards = {"answer": (1.0, REWARDS["answer"]), "repetition": (0.5, REWARDS["repetition"])}
    arguments = (rewards, ["p"] * 3, ["7", "a a a a", "8"], {"answer": ["7", "7", "x"]})
    assert score(*arguments, timeout=5) == score(*arguments)


# --- math-verify


@pytest.fixture
def math_verify():
    return pytest.importorskip("math_verify")


def test_mathematical_answers_are_equal_by_value(math_verify):
    completions = [r"so \boxed{\frac{1}{2}}", "0.5", "1/2", "$2/4$", r"\boxed{0.5} or \boxed{0.6}", "1/3", ""]
    for answer in ("1/2", r"\frac{1}{2}", r"$\frac12$"):
        assert values_of("math", completions, answer) == [1, 1, 1, 1, 0, 0, 0]


def test_the_last_mathematical_answer_counts(math_verify):
    completions = ["7", "7, no, 8", "8, no, 7", "7 " * 1000, "٧", ""]
    assert values_of("math", completions, "7") == [1, 0, 1, 1, 0, 0]


def test_mathematical_answers_that_cannot_be_read_are_unscorable(math_verify):
    got = REWARDS["math"](prompts=["p"] * 3, completions=["7"] * 3, answer=["", None, 7])
    assert got == [None, None, 1.0]


def test_a_tower_of_powers_does_not_hang_the_comparison(math_verify, monkeypatch):
    monkeypatch.setattr(math_adapter, "SECONDS", 1.0)
    start = time.monotonic()
    assert values_of("math", ["$9^{9^{9^9}}$", "9**9**9**9", "7"], "7") == [0, 0, 1]
    assert time.monotonic() - start < 10


def test_mathematical_votes_are_readings(math_verify):
    completions = [r"\boxed{0.50}", "so $x = 7$", r"\boxed{1} \boxed{2}", "none", ""]
    assert [math_adapter.math_answer(text) for text in completions] == ["1/2", "7", None, None, None]


def test_a_missing_math_verify_is_told_how_to_install(monkeypatch):
    math_adapter.math_verify.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install 'minirl\[math\]'"):
        score({"math": (1.0, REWARDS["math"])}, ["p"], ["7"], {"answer": ["7"]})
    math_adapter.math_verify.cache_clear()


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
@pytest.mark.parametrize("timeout", [None, 20])
def test_rewards_of_steps_are_told_and_count_as_their_sum(value, steps, timeout):
    assert steps_of(value, timeout=timeout) == ([steps], sum(reward for _, reward in steps))


@pytest.mark.parametrize("value, total", [(2, 2.0), (np.float32(0.5), 0.5), (torch.tensor(3), 3.0)])
def test_a_number_beside_rewards_of_steps_is_one_of_the_whole(value, total):
    assert steps_of(value) == ([], total)


@pytest.mark.parametrize(
    "value, complaint",
    [
        (
            [1, 2],
            r"2 step rewards for completion 0, which has 3 lines \('ab\\n\\ncd'\): return one for each line",
        ),
        ([], "0 step rewards for completion 0"),
        ([1, 2, math.nan], r"\[1, 2, nan\] for completion 0: rewards of steps are finite numbers"),
        ([1, "2", 3], r"\[1, '2', 3\] for completion 0: rewards of steps are finite numbers"),
        ([(1, 2), 3], r"\[\(1, 2\), 3\] for completion 0"),
        ([(1, 2, 3)], "or pairs of a whole number of characters and such a reward"),
        ([(1.5, 2)], "or pairs of a whole number of characters and such a reward"),
        ([(1, math.inf)], "rewards of steps are finite numbers"),
        ([(3, 1), (2, 1)], r"steps that end at \[3, 2\] for completion 0: the ends must rise, up to its 6 characters"),
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
        InputError, match="for completion 0: it must be a number, NaN or None; only advantage grpo_process"
    ):
        score_one(lambda completions, **_: [value], ("a",))
