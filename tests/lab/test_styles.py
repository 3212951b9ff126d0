"""Prompt styles: what is asked, and what is read as the answer."""

import pytest
from cases import write_rows

from minirl.errors import InputError
from minirl.judge.answers import exact_match, in_block, last_number
from minirl.lab.tasks import load_task
from minirl.lab.tasks.style import INSTRUCTION, in_style
from minirl.rewards import score

SIZES = {"train_size": 4, "heldout_size": 2}


def values(rewards, completions, **columns):
    columns = {name: [value] * len(completions) for name, value in columns.items()}
    return score(rewards, ["p"] * len(completions), completions, columns)


def test_a_text_becomes_a_text_a_message_or_a_message_that_asks_for_tags():
    assert in_style("plain", "2+2=") == "2+2="
    assert in_style("chat", "2+2?") == [{"role": "user", "content": "2+2?"}]
    assert in_style("think", "2+2?") == [{"role": "user", "content": f"2+2?\n\n{INSTRUCTION}"}]


def test_messages_stay_and_the_last_question_asks_for_tags():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": ""},
    ]
    assert in_style("plain", messages) == in_style("chat", messages) == messages
    assert [m["content"] for m in in_style("think", messages)] == ["s", f"q\n\n{INSTRUCTION}", ""]
    assert messages[1]["content"] == "q"


@pytest.mark.parametrize("task", ["arithmetic", "countdown", "jsonl", "gsm8k", "math"])
def test_an_unknown_style_names_the_choices(task, tmp_path):
    place = write_rows(tmp_path / "a.jsonl", [{}])
    where = {"jsonl": str(place)}.get(task, task)
    options = {"path": str(place)} if task in ("gsm8k", "math") else {}
    with pytest.raises(
        InputError, match=rf"{task}: style 'chats' is unknown \(did you mean 'chat'\?\): choose from plain,"
    ):
        load_task(where, style="chats", **options)


def test_tasks_ask_in_their_style():
    assert load_task("arithmetic", **SIZES).train[0]["prompt"][0]["content"].endswith("Answer with just the number.")
    asked = load_task("arithmetic", style="think", **SIZES).train[0]["prompt"][0]["content"]
    assert "just the number" not in asked and asked.endswith(INSTRUCTION)
    assert load_task("countdown", style="plain", **SIZES).train[0]["prompt"].endswith("<answer>(1 + 2) * 3</answer>.")
    asked = load_task("countdown", style="think", **SIZES).train[0]["prompt"][0]["content"]
    assert "(1 + 2)" not in asked and asked.endswith(INSTRUCTION)


def test_content_in_parts_gets_the_instruction_as_a_part():
    parts = [{"type": "text", "text": "q"}]
    (message,) = in_style("think", [{"role": "user", "content": parts}])
    assert message["content"] == [*parts, {"type": "text", "text": f"\n\n{INSTRUCTION}"}]
    assert parts == [{"type": "text", "text": "q"}]


def test_only_the_block_is_read_and_the_format_pays_little():
    task = load_task("arithmetic", style="think", **SIZES)
    good = "<think>8 or 9?</think><answer>it is 7</answer>"
    completions = [good, "<answer>7</answer>", "<think>7</think><answer>8</answer>", "7", good + " 8", ""]
    total, parts = values(task.rewards, completions, answer="7")
    assert parts["correct"] == [1, 1, 0, 0, 1, 0] and parts["format"] == [1, 0, 1, 0, 0, 0]
    assert total == pytest.approx([1.1, 1, 0.1, 0, 1, 0])
    assert [task.extract(text) for text in completions] == ["7", "7", "8", None, "7", None]
    assert all(weight < task.rewards["correct"][0] for name, (weight, _) in task.rewards.items() if name != "correct")


def test_countdown_in_style_think_reads_the_block():
    task = load_task("countdown", style="think", **SIZES)
    row = task.train[0]
    good = f"<think>hm</think><answer>{row['solution']}</answer>"
    completions = [good, row["solution"], f"<think>{good}</think>", "<think>x</think><answer>1</answer>"]
    total, _ = values(task.rewards, completions, **{name: row[name] for name in ("numbers", "target")})
    assert total == pytest.approx([1.1, 0, 0, 0.1])
    assert task.extract(good) is not None and task.extract(row["solution"]) is None


def test_what_cannot_be_scored_stays_so_without_a_block():
    assert in_block(last_number)(["p"] * 2, ["7", "<answer>7</answer>"], answer=["x", None]) == [None, None]
    assert in_block(exact_match)(["p"], ["no block"], answer=[""]) == [0.0]  # "" would be the right answer


def test_a_result_of_the_wrong_length_is_named_by_whoever_called():
    with pytest.raises(InputError, match="returned 1 value for 2"):
        values({"mine": (1.0, in_block(lambda **_: [1.0]))}, ["a", "b"])
    with pytest.raises(InputError, match="returned None, not a list"):
        values({"mine": (1.0, in_block(lambda **_: None))}, ["a", "b"])


def test_a_file_of_the_users_with_a_reward_of_the_users_in_every_style(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, level, **columns):\n"
        "    return [float(len(c) < most) for c, most in zip(completions, level)]\n"
    )
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{i}", "level": 3} for i in range(10)])
    reward = f"{tmp_path / 'mine.py'}:short"
    for style, completion in (("plain", "ab"), ("chat", "ab"), ("think", "<think>long</think><answer>ab</answer>")):
        task = load_task(path, style=style, reward=reward, heldout_fraction=0.2)
        assert (len(task.train), len(task.heldout)) == (8, 2)
        wrong = completion.replace("ab", "abcd")
        total, parts = values(task.rewards, [completion, wrong, "<answer>"], level=3)
        assert parts["correct"] == [1, 0, 0]
        assert total == pytest.approx([1.1, 0.1, 0] if style == "think" else [1, 0, 0])


def test_the_timeout_reaches_a_reward_of_the_users_behind_a_block(tmp_path):
    (tmp_path / "slow.py").write_text("def slow(completions, **columns):\n    while True: pass\n")
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "p"}])
    task = load_task(path, style="think", reward=f"{tmp_path / 'slow.py'}:slow", heldout_fraction=0)
    total, _ = score(task.rewards, ["p"], ["<think></think><answer>7</answer>"], {}, timeout=0.5)
    assert total == pytest.approx([0.1])  # late: 0 of the rule, and the format's
