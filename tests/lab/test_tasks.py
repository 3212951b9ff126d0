"""Tasks: their examples, their splits, and what their checkers accept."""

import gzip
import math
import re

import pytest
from cases import values_of, write_rows

from minirl.errors import InputError
from minirl.files import kind_of, read_jsonl
from minirl.lab.tasks import load_task, parse_task
from minirl.rewards import score

NUMBER_PAIR = re.compile(r"(\d+)\D+(\d+)")


def text_of(row):
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


def problems(rows):
    return {tuple(sorted(map(int, NUMBER_PAIR.search(text_of(row)).groups()))) for row in rows}


def correct_of(task, row, completion):
    return values_of(task.correct, [completion], **row)[0]


# --- any task


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_a_task_is_a_function_of_its_seed(name):
    task, again, other = (load_task(name, seed=seed, train_size=50, heldout_size=20) for seed in (3, 3, 4))
    assert (task.train, task.heldout) == (again.train, again.heldout)
    assert task.train != other.train and task.heldout != other.heldout


def test_the_examples_are_the_same_on_every_machine():
    assert text_of(load_task("arithmetic", train_size=1, heldout_size=0).train[0]) == (
        "What is 8 + 3? Answer with just the number."
    )


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_a_tasks_rewards_give_the_right_answer_the_full_score(name):
    task = load_task(name, train_size=8, heldout_size=8)
    answers = [row.get("solution") or row["answer"] for row in task.train]
    completions = [f"<answer>{answer}</answer>" for answer in answers]
    columns = {key: [row[key] for row in task.train] for key in task.train[0] if key != "prompt"}
    total, parts = score(task.rewards, [row["prompt"] for row in task.train], completions, columns)
    assert parts["correct"] == [1.0] * 8
    assert total == pytest.approx([sum(weight for weight, _ in task.rewards.values())] * 8)


def test_an_unknown_task_names_the_choices_and_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'arithmetic'\?.*arithmetic, countdown.*\.jsonl"):
        load_task("arithmetics")


def test_an_unknown_option_names_the_choices_and_the_nearest():
    with pytest.raises(InputError, match=r"no option 'digit' \(did you mean 'digits'\?\): choose from op, digits"):
        load_task("arithmetic", digit=2)


@pytest.mark.parametrize(
    "option, value",
    [("digits", "two"), ("digits", 1.5), ("digits", True), ("op", 3), ("train_size", [])],
)
def test_an_option_of_the_wrong_type_is_refused(option, value):
    with pytest.raises(InputError, match=f"option {option} must be"):
        load_task("arithmetic", **{option: value})


def test_options_may_be_texts_from_a_command_line():
    typed = load_task("arithmetic", digits=2, style="plain", train_size=None, template=None)
    assert load_task("arithmetic", digits="2", style="plain", train_size="none", template="none") == typed


# --- arithmetic


def test_one_digit_sums_are_all_there_on_one_side_or_the_other():
    task = load_task("arithmetic", digits=1)
    prompts = [text_of(row) for row in task.train + task.heldout]
    assert len(prompts) == len(set(prompts)) == 100
    assert len(task.heldout) == 20
    assert problems(task.train) | problems(task.heldout) == {(a, b) for a in range(10) for b in range(a, 10)}


@pytest.mark.parametrize("op", ["sum", "product", "gcd"])
@pytest.mark.parametrize("digits, sizes", [(1, (20, 30)), (2, (500, 500)), (3, (3000, 1000)), (12, (300, 300))])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_problem_is_trained_on_in_either_order(op, digits, sizes, seed):
    task = load_task("arithmetic", op=op, digits=digits, train_size=sizes[0], heldout_size=sizes[1], seed=seed)
    assert (len(task.train), len(task.heldout)) == sizes
    assert not problems(task.train) & problems(task.heldout)


def test_both_orders_of_a_problem_are_on_one_side_where_problems_are_drawn():
    task = load_task("arithmetic", digits=3, train_size=20000, heldout_size=5000)
    swapped = {(a, b) for a, b in (NUMBER_PAIR.search(text_of(row)).groups() for row in task.train)}
    assert sum((b, a) in swapped for a, b in swapped if a != b) > 100  # so the next line has something to show
    assert not problems(task.train) & problems(task.heldout)


@pytest.mark.parametrize(
    "op, function, smallest",
    [("sum", lambda a, b: a + b, 0), ("product", lambda a, b: a * b, 0), ("gcd", math.gcd, 1)],
)
@pytest.mark.parametrize("digits", [1, 2, 4])
def test_answers_and_operands_are_those_of_the_operation(op, function, smallest, digits):
    task = load_task("arithmetic", op=op, digits=digits)
    for row in task.train + task.heldout:
        a, b = map(int, NUMBER_PAIR.search(text_of(row)).groups())
        assert smallest <= min(a, b) <= max(a, b) < 10**digits
        assert row["answer"] == str(function(a, b))


def test_a_mix_holds_all_three_operations():
    texts = " ".join(text_of(row) for row in load_task("arithmetic", op="mix").train)
    assert "+" in texts and "*" in texts and "greatest common divisor" in texts


def test_prompts_are_plain_continuations_without_chat():
    assert all(re.fullmatch(r"\d\+\d=", row["prompt"]) for row in load_task("arithmetic", style="plain").train)


def test_a_template_words_the_prompt():
    task = load_task("arithmetic", op="mix", template="{op} of {b}, {a}:", style="plain")
    assert all(re.fullmatch(r"(\+|\*|gcd) of \d, \d:", row["prompt"]) for row in task.train)


@pytest.mark.parametrize("template", ["{a} plus", "{a} {b} {c}", "{a} {b", "{} {}", "{a.real} {b}", ""])
def test_a_template_with_other_fields_is_refused(template):
    with pytest.raises(InputError, match="template"):
        load_task("arithmetic", template=template)


@pytest.mark.parametrize(
    "spec",
    ["{a:zz} {b}", "{a:.2} {b}", "{a:>999999999} {b}", "{a:{b}} {b}", "{a} {b!r:d}", "{a:c} {b}", "{a} {b} {op:d}"],
)
def test_a_template_that_cannot_be_filled_is_refused_before_it_is(spec):
    with pytest.raises(InputError, match=r"template .* is malformed"):
        load_task("arithmetic", template=spec, digits=20)
    assert load_task("arithmetic", template="{a:>03} {b:x}", digits=20).train


def test_a_mix_needs_the_operation_in_its_template():
    with pytest.raises(InputError, match=r"\{op\}"):
        load_task("arithmetic", op="mix", template="{a} {b}")


def test_more_prompts_than_there_are_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"100 prompts, 80 for training.*heldout_size=20.*train_size=90"):
        load_task("arithmetic", train_size=90, heldout_size=20)
    with pytest.raises(InputError, match="100 prompts"):
        load_task("arithmetic", heldout_size=101)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"op": "sums"}, "did you mean 'sum'"),
        ({"digits": 0}, "digits must lie in 1..100"),
        ({"train_size": -1}, "0 or more"),
        ({"heldout_size": -1, "digits": 5}, "0 or more"),
    ],
)
def test_arithmetic_refuses_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        load_task("arithmetic", **options)


def test_the_extracted_number_is_in_normal_form():
    extract_number = load_task("arithmetic").extract
    assert [extract_number(text) for text in ("it is 7.", "07", "7.0", "2/4", "1e3", "seven", "")] == [
        "7",
        "7",
        "7",
        "1/2",
        None,
        None,
        None,
    ]


# --- countdown


def test_every_countdown_problem_is_solvable_and_solved_by_its_solution():
    for options in ({}, {"count": 3, "max_number": 9, "max_target": 24, "train_size": 300, "heldout_size": 50}):
        task = load_task("countdown", **options)
        for row in task.train + task.heldout:
            assert len(row["numbers"]) in ((3, 4) if not options else (3,))
            assert all(1 <= number <= options.get("max_number", 99) for number in row["numbers"])
            assert 1 <= row["target"] <= options.get("max_target", 99)
            assert correct_of(task, row, row["solution"]) == 1.0
            assert correct_of(task, {**row, "target": row["target"] + 1}, row["solution"]) == 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_no_countdown_problem_occurs_twice_or_on_both_sides(seed):
    task = load_task("countdown", max_number=12, train_size=1500, heldout_size=300, seed=seed)
    sides = [[(tuple(sorted(row["numbers"])), row["target"]) for row in side] for side in (task.train, task.heldout)]
    assert [len(set(side)) for side in sides] == [1500, 300]
    assert not set(sides[0]) & set(sides[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 5}, "count must be 3, 4 or none"),
        ({"max_number": 0}, "at least 1"),
        ({"max_number": 1, "max_target": 1, "count": 3}, "only .* distinct problems"),
        ({"template": "make {target}"}, "template"),
        ({"train_size": -1}, "0 or more"),
    ],
)
def test_countdown_refuses_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        load_task("countdown", **options)


# --- jsonl


def test_a_file_is_read_with_its_columns(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "level": "easy"} for i in range(20)]
    task = load_task(write_rows(tmp_path / "sums.jsonl", rows))
    assert task.name == "sums"
    assert sorted(task.train + task.heldout, key=lambda row: row["answer"]) == rows
    assert len(task.heldout) == 2
    assert correct_of(task, rows[6], "that is 7.0") == 1.0
    assert correct_of(task, rows[6], "that is 8") == 0.0
    assert task.extract("that is 7.0") == "7"


def test_chat_messages_are_kept_and_texts_become_messages_on_request(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"prompt": messages}, {"prompt": "Hello"}])
    task = load_task(path, style="chat", heldout_fraction=0)
    assert [row["prompt"] for row in task.train] == [messages, [{"role": "user", "content": "Hello"}]]


def test_the_split_is_seeded_and_keeps_equal_prompts_together(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{i % 30}", "answer": f"a{i}"} for i in range(90)])
    task = load_task(path, heldout_fraction=0.3, seed=1)
    assert len(task.heldout) == 27 and len(task.train) == 63
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.heldout}
    assert load_task(path, heldout_fraction=0.3, seed=1) == task
    assert load_task(path, heldout_fraction=0.3, seed=2).heldout != task.heldout


def test_held_out_examples_come_from_their_own_file(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    heldout = write_rows(tmp_path / "test.jsonl", [{"prompt": "c", "answer": "3", "level": 1}])
    task = load_task(train, heldout_path=str(heldout))
    assert [row["prompt"] for row in task.train] == ["a", "b"]
    assert task.heldout == [{"prompt": "c", "answer": "3", "level": 1}]
    assert task.train[0]["level"] is None  # all examples have the same columns


def test_held_out_prompts_that_are_trained_on_bring_a_warning(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.warns(UserWarning, match="2 of its prompts are in the training file"):
        load_task(path, heldout_path=str(path))


def test_limit_keeps_the_first_lines_and_reads_no_further(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}, "", {"prompt": "b"}, "not json"])
    assert [row["prompt"] for row in load_task(path, limit=2, heldout_fraction=0).train] == ["a", "b"]


def test_the_files_of_gsm8k_are_read_as_they_are(tmp_path):
    rows = [
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"question": "?", "answer": "#### 1,000"},
    ]
    path = write_rows(tmp_path / "gsm8k.jsonl", rows)
    task = load_task(path, prompt_column="question", heldout_fraction=0)
    assert task.train == [{"prompt": "Two and two?", "answer": "4"}, {"prompt": "?", "answer": "1,000"}]
    assert correct_of(task, task.train[1], "So it is $1000.") == 1.0


def test_text_answers_are_compared_whole(tmp_path):
    task = load_task(write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "Paris"}]), heldout_fraction=0)
    assert correct_of(task, task.train[0], " Paris\n") == 1.0
    assert correct_of(task, task.train[0], "Paris or Rome") == 0.0
    assert (task.extract(" Paris\n"), task.extract(" ")) == ("Paris", None)


def test_prompts_without_an_answer_cannot_be_scored(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "1"}]
    task = load_task(write_rows(tmp_path / "d.jsonl", rows), heldout_fraction=0)
    assert correct_of(task, task.train[0], "1") is None
    assert correct_of(task, {"prompt": "a"}, "1") is None  # no answer column at all


def test_a_reward_of_the_users_defines_accuracy(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [len(c) < 3 for c in completions]\n"
    )
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "a"}])
    task = load_task(path, heldout_fraction=0, reward=f"{tmp_path / 'mine.py'}:short")
    assert correct_of(task, task.train[0], "ab") == 1.0 and correct_of(task, task.train[0], "abc") == 0.0


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("prompt", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ("[1]", "this is a list"),
        ('"a"', "this is a text, but must be an object"),
        ('{"question": "a"}', r"there is no 'prompt', only question: name the column by prompt_column"),
        ("{}", "there is no 'prompt', only nothing"),
        ('{"prompt": 3}', "'prompt' is a number, but must be a text or a list"),
        ('{"prompt": null}', "'prompt' is null"),
        ('{"prompt": " "}', "'prompt' is empty"),
        ('{"prompt": []}', "an empty list"),
        ('{"prompt": ["a"]}', "message 0 of 'prompt' needs a 'role' and a 'content'"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}', "message 1"),
        ('{"prompt": [{"role": "user", "content": null}]}', "message 0"),
        ('{"prompt": [{"role": "user", "content": ""}]}', "'prompt' is empty"),
        (r'{"prompt": "\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "fine"}, line])
    with pytest.raises(InputError, match=message) as error:
        load_task(path)
    assert str(error.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize(
    "answer, what",
    [
        ("[1, 2]", "a list"),
        ('{"a": 1}', "an object"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ('""', "empty"),
        ('"so #### "', "empty"),
    ],
)
def test_an_answer_that_no_completion_can_equal_is_named_unless_a_reward_of_the_users_reads_it(tmp_path, answer, what):
    path = write_rows(tmp_path / "data.jsonl", ['{"prompt": "a", "gold": "1"}', f'{{"prompt": "b", "gold": {answer}}}'])
    with pytest.raises(InputError, match=f"^{path}, line 2: 'gold' is {what}, which no completion can equal"):
        load_task(path, answer_column="gold")
    (tmp_path / "mine.py").write_text("def any_of(completions, answer, **columns):\n    return [1.0] * len(answer)\n")
    task = load_task(path, answer_column="gold", reward=f"{tmp_path / 'mine.py'}:any_of", heldout_fraction=0)
    assert len(task.train) == 2


def test_texts_numbers_and_truth_values_are_answers(tmp_path):
    answers = ["Paris", 7, 10**50, 0.5, True, None]
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "answer": answer} for answer in answers])
    task = load_task(path, heldout_fraction=0)
    right = ["Paris", "7", str(10**50), "1/2", "True", "None"]
    assert [correct_of(task, *pair) for pair in zip(task.train, right, strict=True)] == [1.0] * 5 + [None]


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_that_rewards_already_take_is_named(tmp_path, name):
    rows = [{"prompt": "a"}, {"prompt": "b", "timeout": 1, "self": 2}, {"prompt": "c", name: 1}]
    path = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(InputError, match=f"^{path}, line 3: a column cannot be called '{name}'"):
        load_task(path)
    assert len(load_task(path, limit=2, heldout_fraction=0).train) == 2
    assert load_task(write_rows(path, [{name: "a"}]), prompt_column=name, heldout_fraction=0).train == [{"prompt": "a"}]


def test_a_packed_file_is_read_and_its_lines_are_named(tmp_path):
    path = tmp_path / "sums.jsonl.gz"
    with pytest.raises(InputError, match=r"sums\.jsonl\.gz: there is no such file"):
        load_task(path)
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": 3}'))
    task = load_task(path, limit=2, heldout_fraction=0)
    assert task.name == "sums" and [row["prompt"] for row in task.train] == ["a", "b"]
    with pytest.raises(InputError, match=f"^{path}, line 4: 'prompt' is a number"):
        load_task(path)
    assert read_jsonl(path)[-1] == {"prompt": 3}  # the same reader


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "^the task has no name: choose from arithmetic,"),
        (":digits=1", "^the task has no name: choose from arithmetic,"),
        ("gsm8k:path=", "^task 'gsm8k': option path is empty: give a value, or leave it away"),
        ("gsm8k:path=x,heldout_path=", "option heldout_path is empty"),
        ("humaneval:path=", "option path is empty"),
        ("gsm8k:path=x,limit=3,limit=5", "option limit is given 2 times: give it once"),
    ],
)
def test_a_spec_without_a_name_or_a_value_or_with_two_is_refused(spec, message):
    with pytest.raises(InputError, match=message):
        parse_task(spec)


@pytest.mark.parametrize(
    "value, kind",
    [
        (None, "null"),
        (False, "false"),
        (0, "a number"),
        (0.5, "a number"),
        ("", "a text"),
        ([], "a list"),
        ({}, "an object"),
    ],
)
def test_what_json_holds_is_said_in_words(value, kind):
    assert kind_of(value) == kind


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n')  # the first line's byte order mark is fine
    with pytest.raises(InputError, match=r"line 2: not valid JSON.*UTF-8"):
        load_task(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="the file is empty"):
        load_task(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            load_task(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heldout_path": "x.jsonl", "heldout_fraction": 0.1}, "not both"),
        ({"heldout_path": "x.jsonl"}, "x.jsonl: there is no such file"),
        ({"heldout_fraction": 1.0}, r"\[0, 1\)"),
        ({"heldout_fraction": "nan"}, r"\[0, 1\)"),
        ({"heldout_fraction": 0.5}, "one prompt cannot be split"),
        ({"limit": 0}, "limit"),
        ({"answer_column": "solution"}, "no line has a 'solution'"),
        ({"reward": "exakt_match"}, "did you mean 'exact_match'"),
        ({"limits": 3}, "did you mean 'limit'"),
    ],
)
def test_jsonl_refuses_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load_task(write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}]), **options)


# --- answers that are numbers in other words


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("$18", "The answer is $18.", "The answer is $19."),
        ("18 dollars", "18", "180"),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"),
        (r"\frac{1}{2}", "0.5", "0.50000000000000000001"),
        ("2 Samuel", "2 Samuel", "2 Kings"),
        (r"\sqrt{2}", r"\sqrt{2}", "2"),
    ],
)
def test_the_default_reward_of_a_file_reads_such_answers(tmp_path, answer, right, wrong):
    rows = [{"prompt": "a", "answer": answer}]
    task = load_task(write_rows(tmp_path / "d.jsonl", rows), heldout_fraction=0)
    assert [correct_of(task, rows[0], text) for text in (right, wrong, "", f"<think>{right}")] == [1, 0, 0, 0]
    assert correct_of(task, rows[0], f"<think>{wrong}</think>{right}") == 1
    assert correct_of(task, rows[0], f"<think>{right}</think>{wrong}") == 0


def test_true_and_false_are_right_and_vote_in_any_case(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "p", "answer": True}, {"prompt": "q", "answer": False}])
    task = load_task(path, heldout_fraction=0.5)
    assert [correct_of(task, {"prompt": "p", "answer": True}, text) for text in ("true", "True", "false")] == [1, 1, 0]
    assert task.extract("True\n") == task.extract("true") != task.extract("false")


@pytest.mark.parametrize(
    "answers, note",
    [
        ([7, "$18", r"\frac{1}{2}", None], None),
        (["7", r"\sqrt{2}", "x^2", None], r"2 of 3 answers are no numbers ('\\sqrt{2}' is the first)"),
        (["7", "Paris"], "1 of 2 answers are no numbers ('Paris' is the first)"),
        ([True, "7"], "1 of 2 answers are no numbers ('true' is the first)"),
    ],
)
def test_a_file_says_how_many_answers_only_their_own_text_matches(tmp_path, answers, note):
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "answer": a} for i, a in enumerate(answers)])
    notes = load_task(path, heldout_fraction=0.3, style="think").notes
    assert [line.partition(", and")[0] for line in notes] == ([] if note is None else [note])
    advice = "reward=FILE.py:FUNCTION" if {"Paris", True} & set(answers) else "reward=math"
    assert all(advice in line for line in notes)
    assert load_task(path, heldout_fraction=0.3, reward="exact_match").notes == ()


def test_a_file_says_which_answers_math_takes_for_words(tmp_path):
    answers = ["7", "3 apples", r"\sqrt{2}", "½", "Paris", r"\sin 2x", "5 thousand", "1.5 million"]
    answers += [r"\begin{pmatrix}1\\2\end{pmatrix}", r"2\sqrt{3}\text{ inches}"]
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "answer": a} for i, a in enumerate(answers)])
    (note,) = load_task(path, heldout_fraction=0.3, reward="math").notes
    assert note.startswith("2 of 10 answers are no numbers (") and "FILE.py" in note and "reward=math" not in note
