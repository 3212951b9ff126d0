"""Rules on text: which number is the answer, when tool calls are equal, and that no text takes long."""

import json
import time

import pytest
from cases import joined, read_cases, values_of

from minirl.errors import InputError
from minirl.judge.answers import answer_block
from minirl.judge.expressions import compute, countdown_correct
from minirl.judge.numbers import answer_number, last_number, reference_number
from minirl.judge.programs import code_block
from minirl.judge.reasoning_gym import GUARDS, may_be_right
from minirl.lab.rewards import REWARDS, load_reward
from minirl.lab.tasks import load_task

# --- what each reader finds in a text

READERS = {reader.__name__: reader for reader in (answer_number, last_number, reference_number, code_block)}
READERS |= {"answer_block": answer_block, "compute": lambda text: (compute(text) or [None])[0]}
TEXTS = [
    (name, text, value)
    for name, table in read_cases("answers").items()
    for text, value in [*table["cases"], *((text, None) for text in table["nothing"])]
]


@pytest.mark.parametrize(("name", "text", "value"), TEXTS, ids=[f"{name} {i}" for i, (name, *_) in enumerate(TEXTS)])
def test_a_text_is_read_as(name, text, value):
    found = READERS[name](joined(text))
    assert (None if found is None else str(found)) == value


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

HOSTILE = read_cases("hostile")["rules"] | {"distinct words": " ".join(map(str, range(150_000)))}

RULES = {name: rule for name, rule in REWARDS.items() if name not in ("math", "answer")}  # in the sandbox; two others
TASK = load_task("countdown", train_size=1, heldout_size=1)
COLUMNS = {"numbers": [[1, 2, 3]], "target": [6]}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_rule_takes_long_on_a_megabyte_of_anything(text):
    """CPU time, as other processes may run here."""
    text = joined(text)
    rules = {
        **{
            name: lambda rule=rule: rule(prompts=["p"], completions=[text], answer=["7"])
            for name, rule in RULES.items()
        },
        "function_call": lambda: RULES["function_call"](prompts=["p"], completions=[text], answer=[CALL]),
        "countdown": lambda: countdown_correct(["p"], [text], **COLUMNS),
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
