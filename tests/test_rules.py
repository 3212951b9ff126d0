"""Rules on text: which number is the answer, when tool calls are equal, and that no text takes long."""

import json
import time
from fractions import Fraction

import pytest

from minirl.errors import InputError
from minirl.rewards import REWARDS, load_reward
from minirl.rewards.numbers import answer_number
from minirl.tasks import countdown, load_task
from minirl.tasks.reasoning_guards import GUARDS, may_be_right
from minirl.tasks.style import answer_block


def values_of(name, completions, **columns):
    columns = {key: [value] * len(completions) for key, value in columns.items()}
    return REWARDS[name](prompts=["p"] * len(completions), completions=completions, **columns)


# --- the number that a text answers with


@pytest.mark.parametrize(
    "text, value",
    [
        (r"so \boxed{7}", 7),
        (r"8, no: $\boxed{7}$.", 7),
        (r"\boxed{7} apples, that is 7.0", 7),
        (r"\boxed{x = 7}", 7),
        (r"\boxed{7\text{ cm}}", 7),
        (r"\boxed{\$1{,}234.50}", Fraction("1234.5")),
        (r"\boxed{1\,000}", 1000),
        (r"\boxed{50\%}", 50),
        (r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{\dfrac12}", Fraction(1, 2)),
        (r"$\boxed 7$", 7),
        (r"\fbox{7}", 7),
        ("+7", 7),
        ("–7", -7),
        ("3–7", 7),
        ("50%", 50),
        (r"\boxed{90^\circ}", 90),
        (r"90^{\circ}", 90),
        (r"$90^\circ$", 90),
        (r"\boxed{7\text{ cm}^2}", 7),
        ("12{,}000", 12000),
        (r"12\,000", 12000),
        (r"12,\!000", 12000),
        (r"\boxed{12,\!000}", 12000),
        (r"$\frac{1}{3}$", Fraction(1, 3)),
        (r"is -\tfrac13.", Fraction(-1, 3)),
        ("1/0.5", 2),
        ("**7** apples", 7),
        ("is **7**.", 7),
        ("14 / 2", 7),
        ("1, 2, 3", 3),
        ("2024-1-2", 2),
        ("$ - 7 $", -7),
        (r"-\$7", -7),
        (r"\boxed{\left(-42\right)}", -42),
        ("That makes 42!", 42),
        ("9.81 m/s^2", Fraction("9.81")),
        ("7\n" + "x " * 9000, 7),  # far before the end
        ("5 " + "7x " * 9000, 5),
    ],
)
def test_the_answer_is_the_box_or_the_last_number(text, value):
    assert answer_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{6} \boxed{7}",
        r"\boxed{\boxed{7}}",
        r"\boxed{7} or \fbox{8}",
        r"\boxed{7}, no, 8",
        r"\boxed{7} or 1e3",
        r"\boxed{7, 8}",
        r"\boxed{7 \text{ or } 8}",
        r"\boxed{} 7",
        r"\boxed{7",
        r"\boxed{2^3}",
        r"\boxed{\pm 7}",
        r"\boxed{3\frac{1}{2}}",
        r"\boxed{1e3}",
        "7!",
        "- 7",
        "2**3",
        "2 ** 3",
        "2^3",
        "2^{10}",
        "x^2",
        "7^x",
        "7//2",
        "97**89**83",
        "6/2/3",
        "x/7",
        "0,5",
        "2024-12-25",
        "√144",
        "gives - 7",
        "±7",
        r"\pm 7",
        "≠ 7",
    ],
)
def test_texts_that_answer_with_no_number(text):
    assert answer_number(text) is None


# --- tool calls

CALL = {"name": "add", "arguments": {"a": 1, "b": [2.5, True, None, "x"]}}


def calls(*found):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in found)


@pytest.mark.parametrize(
    "completion",
    [
        json.dumps(CALL),
        json.dumps([CALL]),
        json.dumps({"arguments": {"b": [2.5, True, None, "x"], "a": 1.0}, "name": "add"}, indent=1),
        calls(CALL),
        "I shall add them.\n" + calls(CALL) + "\n",
        f"```json\n{json.dumps(CALL)}\n```",
        f"```\n[{json.dumps(CALL)}]\n```\n",
    ],
)
def test_equal_calls_are_equal_in_any_of_their_forms(completion):
    assert values_of("function_call", [completion], answer=CALL) == [1.0]
    assert values_of("function_call", [completion], answer=json.dumps([CALL])) == [1.0]


def test_calls_come_in_their_order_and_number():
    other = {"name": "stop", "arguments": {}}
    completions = [
        calls(CALL, other),
        json.dumps([CALL, other]),
        calls(other, CALL),
        calls(CALL),
        calls(CALL, other, other),
    ]
    assert values_of("function_call", completions, answer=[CALL, other]) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("answer", [None, "", "no call", [], {"name": "add"}, "[]", '{"name": "f", "arguments": NaN}'])
def test_an_answer_without_a_call_cannot_be_scored(answer):
    assert values_of("function_call", [json.dumps(CALL), ""], answer=answer) == [None, None]


# --- rewards with parameters


def test_rewards_with_parameters_are_named_with_their_numbers():
    ids = [[0] * 6, [0] * 8, [0] * 30]
    assert load_reward("overlong:10:4")(prompts=["p"] * 3, completions=["a"] * 3, completion_ids=ids) == [0, -0.5, -1]
    assert load_reward("too_short:3")(prompts=["p"] * 2, completions=["a b", "a b c"]) == [1, 0]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("overlong", r"'overlong:' needs whole numbers: write it as overlong:L_MAX:L_CACHE"),
        ("overlong:10", "write it as overlong:L_MAX:L_CACHE"),
        ("overlong:ten:4", "write it as overlong:L_MAX:L_CACHE"),
        ("overlong:10:4:2", "write it as overlong:L_MAX:L_CACHE"),
        ("overlong:10:40", r"l_cache must lie in 1\.\.l_max"),
        ("too_short:0", "at least 1"),
    ],
)
def test_parameters_that_do_not_fit_are_explained(spec, message):
    with pytest.raises(InputError, match=message):
        load_reward(spec)


# --- time

MEGABYTE = 10**6
HOSTILE = {
    "nothing": "",
    "words": "a b " * (MEGABYTE // 4),
    "distinct words": " ".join(map(str, range(150_000))),
    "digits": "9" * MEGABYTE,
    "digits, glued": "9" * MEGABYTE + "x",
    "thousands, glued": "111," * (MEGABYTE // 4) + "111x",
    "numbers": "1 " * (MEGABYTE // 2),
    "numbers, glued": "1x " * (MEGABYTE // 3),
    "powers": "2**" * (MEGABYTE // 3) + "3",
    "parentheses": "(" * MEGABYTE,
    "brackets": "[" * MEGABYTE,
    "objects": '{"name":' * (MEGABYTE // 8),
    "braces": r"\boxed" + "{" * MEGABYTE,
    "boxes": r"\boxed{" * (MEGABYTE // 7),
    "fractions in a box": r"\boxed{" + r"\frac{1}" * (MEGABYTE // 8) + "}",
    "backslashes": "\\" * MEGABYTE,
    "blanks": " " * MEGABYTE,
    "thoughts": "<think>" * (MEGABYTE // 7),
    "half a tag": "<think>" + "<" * MEGABYTE,
    "answers": "<answer>" * (MEGABYTE // 8),
    "answers, closed": "<answer>7</answer>" * (MEGABYTE // 18),
    "one answer": "<answer>" + "1+" * (MEGABYTE // 2) + "1</answer>",
    "tool calls": "<tool_call>" * (MEGABYTE // 11),
    "a fence": "```json\n" + " \t" * (MEGABYTE // 2),
    "a string": '"' + "\\u0041" * (MEGABYTE // 6),
    "nul": "\0" * MEGABYTE,
    "commands": r"\sqrt{7}" * (MEGABYTE // 8),
    "text in LaTeX": r"\text{" * (MEGABYTE // 6),
    "fractions": r"\frac 1" * (MEGABYTE // 7),
    "minus signs": "- " * (MEGABYTE // 2) + "7",
    "dollars": "$ " * (MEGABYTE // 2) + "$ - 7",
    "dollars, glued": "$" * MEGABYTE + " - 7",
    "thousands by spaces": "111 " * (MEGABYTE // 4) + "1111",
    "thousands by spaces, glued": "111 " * (MEGABYTE // 4) + "111x",
    "mixed numbers": "1 1/2 " * (MEGABYTE // 6) + "1/",
    "decimal commas": "1," * (MEGABYTE // 2) + "1x",
    "dates": "2024-05-" * (MEGABYTE // 8),
    "exclamation marks": "is 7" + "!" * MEGABYTE + "x",
    "an exclamation mark and blanks": "is 7!" + " " * MEGABYTE + "x",
    "units": "7 m^2" * (MEGABYTE // 5),
    "units without an end": "7 " + "m/" * (MEGABYTE // 2) + "^2",
    "a long text before": "7\n" + "ab c" * (MEGABYTE // 4),
    "tool calls, closed": "<tool_call>{}</tool_call>" * (MEGABYTE // 25),
    "boxes, equal": r"\boxed{7} " * (MEGABYTE // 10),
    "thoughts, closed": "<think></think>" * (MEGABYTE // 15),
}
RULES = {name: rule for name, rule in REWARDS.items() if name not in ("math", "answer")}  # in the sandbox; two others
TASK = load_task("countdown", train_size=1, heldout_size=1)
COLUMNS = {"numbers": [[1, 2, 3]], "target": [6]}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_rule_takes_long_on_a_megabyte_of_anything(text):
    """CPU time, as other processes may run here."""
    rules = {
        **{
            name: lambda rule=rule: rule(prompts=["p"], completions=[text], answer=["7"])
            for name, rule in RULES.items()
        },
        "function_call": lambda: RULES["function_call"](prompts=["p"], completions=[text], answer=[CALL]),
        "countdown": lambda: countdown.correct(["p"], [text], **COLUMNS),
        "countdown format": lambda: TASK.rewards["format"][1](prompts=["p"], completions=[text]),
        "countdown vote": lambda: TASK.extract(text),
        "answer block": lambda: answer_block(text),
        "guards": lambda: [may_be_right(name, text, {"answer": "7", "metadata": {}}) for name in GUARDS],
    }
    slow = {}
    for name, rule in rules.items():
        start = time.process_time()
        rule()
        seconds = time.process_time() - start
        if seconds > 3:  # half a second at most on a quiet machine; quadratic time would be minutes
            slow[name] = seconds
    assert not slow


@pytest.mark.parametrize(
    "box", ["a" * 990, "ab/" * 330, "aa " * 330, "= " * 490, "x{" * 490, "$ " * 490, "ab/cdef" * 140]
)
def test_no_box_takes_long(box):
    start = time.process_time()
    answer_number(rf"{box}\boxed{{7}}{box}")
    for content in (box, box + " 7", "7 " + box, "7 " + box + "!", box + " 7 !"):
        answer_number(rf"\boxed{{{content}}}")
    assert time.process_time() - start < 1
