"""GSM8K and MATH in the forms in which they are public."""

import gzip
import json

import pytest
from cases import values_of, write_rows

from minirl.errors import InputError
from minirl.judge.boxed import box_count, last_box
from minirl.lab.tasks import load_task

WORDS = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


# --- GSM8K


def test_gsm8k_is_read_and_held_out_by_file_or_by_share(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"question": f"Q{i}?", "answer": WORDS} for i in range(20)])
    test = write_rows(tmp_path / "test.jsonl", [{"question": "T?", "answer": "#### -1,000"}])
    task = load_task("gsm8k", path=train, heldout_path=test)
    assert task.train[0] == {"prompt": [{"role": "user", "content": "Q0?"}], "answer": "72", "solution": WORDS}
    assert [row["answer"] for row in task.heldout] == ["-1000"]
    task = load_task("gsm8k", path=train, style="plain")
    assert (len(task.train), len(task.heldout)) == (18, 2) and isinstance(task.train[0]["prompt"], str)
    assert len(load_task("gsm8k", path=train, limit=5, heldout_fraction=0).train) == 5


def test_gsm8k_takes_the_strict_number(tmp_path):
    task = load_task(
        "gsm8k",
        path=write_rows(
            tmp_path / "a.jsonl",
            [{"question": "?", "answer": WORDS}] * 2,
        ),
        heldout_fraction=0,
    )
    row = task.train[0]
    completions = ["It is $72.", "#### 72", "72 or 73", "7.2e1", r"\boxed{72}", r"\boxed{71}\boxed{72}", "", "72%"]
    assert values_of(task.correct, completions, **row) == [1, 1, 0, 0, 1, 0, 0, 1]
    assert [task.extract(text) for text in completions[:4]] == ["72", "72", "73", None]


@pytest.mark.parametrize("answer", ["#### $72", "#### 72.", "#### 72 dollars", r"#### \$72.00"])
def test_an_answer_of_gsm8k_may_have_a_unit(answer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "?", "answer": answer}])
    assert load_task("gsm8k", path=path, heldout_fraction=0).train[0]["answer"] == "72"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "Q?", "answer": "72"}, "must end in '#### ' and a number, but ends in '72'"),
        ({"question": "Q?", "answer": "#### about 72"}, "must end in '#### ' and a number"),
        ({"question": "Q?"}, "there is no 'answer', only question"),
        ({"answer": WORDS}, "there is no 'question'"),
        ({"question": " ", "answer": WORDS}, "'question' is empty"),
        ({"question": ["Q?"], "answer": WORDS}, "'question' is a list, but must be a text"),
        ("[]", "this is a list"),
        ("{", "not valid JSON"),
    ],
)
def test_a_line_that_is_not_of_gsm8k_is_named(tmp_path, row, message):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Q?", "answer": WORDS}, row])
    with pytest.raises(InputError, match=message) as error:
        load_task("gsm8k", path=path)
    assert str(error.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_the_path_is_needed_and_the_other_options_are_checked(task, tmp_path):
    with pytest.raises(InputError, match=f"task '{task}' needs the option 'path': write it as {task}:path="):
        load_task(task)
    with pytest.raises(InputError, match="there is no such file"):
        load_task(task, path=str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=rf"{task}: limit must be at least 1"):
        load_task(task, path=str(tmp_path), limit=0)
    with pytest.raises(InputError, match=r"a folder that holds no \.parquet, \.jsonl or \.json file"):
        load_task(task, path=str(tmp_path))


@pytest.mark.parametrize("task, row", [("gsm8k", {"question": "?", "answer": WORDS}), ("math", "PROBLEM")])
def test_packed_lines_and_lists_are_read_as_lines_are(task, row, tmp_path):
    row = PROBLEM if row == "PROBLEM" else row
    lines, entries = f"{json.dumps(row)}\n\n" * 3, f"\n{json.dumps([row] * 3, indent=2)}"
    plain = load_task(task, path=write_rows(tmp_path / "a.jsonl", [lines]), heldout_fraction=0)
    assert len(plain.train) == 3
    for name, content in (("b.jsonl.gz", lines), ("c.json", entries), ("d.json", lines), ("e.json.gz", entries)):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        assert load_task(task, path=str(tmp_path / name), heldout_fraction=0) == plain, name
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(f"{json.dumps(row)}\n\n5".encode()))
    with pytest.raises(InputError, match=r"f\.jsonl\.gz, line 3: this is a number, but must be an object"):
        load_task(task, path=str(tmp_path / "f.jsonl.gz"))


def test_a_byte_order_mark_and_blank_lines_are_nothing(tmp_path):
    rows = json.dumps([{"question": "?", "answer": WORDS}] * 2)
    for i, content in enumerate((f"\ufeff{rows}", f"\ufeff\n \n{rows}", f"\ufeff\r\n\r\n{rows}\n")):
        (tmp_path / f"{i}.json").write_bytes(content.encode())
        assert len(load_task("gsm8k", path=str(tmp_path / f"{i}.json"), heldout_fraction=0).train) == 2
    (tmp_path / "a.jsonl").write_text("\ufeff\n" + rows[1:-1].replace("}, {", "}\n{"))
    assert len(load_task("gsm8k", path=str(tmp_path / "a.jsonl"), heldout_fraction=0).train) == 2
    for name in ("b.json", "b.jsonl"):
        (tmp_path / name).write_text("\ufeff")
        with pytest.raises(InputError, match=f"{name}: the file is empty"):
            load_task("gsm8k", path=str(tmp_path / name))


@pytest.mark.parametrize("indent, what", [(None, "this is a list, but must be an object"), (2, "not valid JSON")])
def test_a_list_where_there_are_lines_is_told_what_it_should_be_called(indent, what, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([{"question": "?", "answer": WORDS}], indent=indent))
    with pytest.raises(InputError, match=rf"a\.jsonl, line 1: {what}.* ends in \.json$"):
        load_task("gsm8k", path=str(tmp_path / "a.jsonl"))


# --- boxes


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{3}", "3"),
        (r"$x = \boxed 5$ cm", "5"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        (r"\boxedx{1}", None),
        ("none", None),
    ],
)
def test_the_content_of_the_last_box(text, content):
    assert last_box(text)[0] == content


def test_boxes_are_counted_with_those_inside():
    assert box_count(r"\boxed{1} \fbox{2} \boxed{\boxed{3}} boxed") == 4


# --- MATH

PROBLEM = {
    "problem": "What is half?",
    "solution": r"It is $\boxed{\frac{1}{2}}$.",
    "level": "Level 2",
    "type": "Algebra",
}


def test_math_is_read_from_lines_and_from_the_folder_that_was_published(tmp_path):
    pytest.importorskip("math_verify")
    lines = write_rows(tmp_path / "train.jsonl", [PROBLEM])
    folder = tmp_path / "MATH" / "train"
    for name in ("algebra/1.json", "algebra/2.json", "geometry/7.json"):
        write_rows(folder / name, [json.dumps(PROBLEM | {"problem": name}, indent=2)])
    of_lines = load_task("math", path=lines, heldout_fraction=0)
    assert of_lines.train == [
        {
            "prompt": [{"role": "user", "content": "What is half?\nPut the final answer in \\boxed{}."}],
            "answer": r"\frac{1}{2}",
            "solution": PROBLEM["solution"],
            "level": 2,
            "subject": "Algebra",
        }
    ]
    of_folder = load_task("math", path=str(folder), heldout_path=lines, style="plain")
    assert [row["prompt"] for row in of_folder.train] == ["algebra/1.json", "algebra/2.json", "geometry/7.json"]
    assert len(of_folder.heldout) == 1


def test_the_form_of_math_500_gives_level_and_answer_otherwise(tmp_path):
    row = {"problem": "?", "answer": "7", "subject": "Algebra", "level": 5, "unique_id": "test/algebra/1.json"}
    task = load_task(
        "math", path=write_rows(tmp_path / "a.jsonl", [row | {"solution": "it is seven"}]), heldout_fraction=0
    )
    assert {name: task.train[0][name] for name in ("answer", "level", "subject")} == {
        "answer": "7",
        "level": 5,
        "subject": "Algebra",
    }


@pytest.mark.parametrize(
    "answer, text", [(5, "5"), (-0.5, "-0.5"), (1e-05, "0.00001"), (1e20, "100000000000000000000")]
)
def test_an_answer_of_math_may_be_a_number(answer, text, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"problem": "?", "answer": answer}])
    assert load_task("math", path=path, heldout_fraction=0).train[0]["answer"] == text


def test_math_is_chosen_by_level_and_subject(tmp_path):
    rows = [
        PROBLEM | {"problem": f"{i}", "level": f"Level {i % 3}", "type": "Algebra" if i % 2 else "Geometry"}
        for i in range(12)
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    options = {"path": path, "heldout_fraction": 0, "style": "plain"}
    assert [row["prompt"] for row in load_task("math", level=1, subject="Algebra", **options).train] == ["1", "7"]
    assert len(load_task("math", level="2", limit=3, **options).train) == 3
    with pytest.raises(InputError, match=r"no problem has level 5: choose from 0, 1, 2"):
        load_task("math", level=5, **options)
    with pytest.raises(
        InputError, match=r"subject 'algebra' \(did you mean 'Algebra'\?\): choose from Algebra, Geometry"
    ):
        load_task("math", subject="algebra", **options)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "?", "solution": "seven"}, r"the solution has no \\boxed{}, and there is no 'answer' beside it"),
        ({"problem": "?", "solution": r"\boxed{7"}, r"no \\boxed{}"),
        ({"problem": "?", "answer": None}, "there is no 'answer' beside it"),
        ({"problem": "?", "answer": " "}, "'answer' is empty"),
        ({"problem": "?", "answer": True}, "'answer' is true, but must be a text"),
        ({"problem": "?", "answer": [5]}, "'answer' is a list, but must be a text"),
        ({"solution": r"\boxed{7}"}, "there is no 'problem'"),
        ({"problem": None, "solution": r"\boxed{7}"}, "'problem' is null, but must be a text"),
    ],
)
def test_a_problem_without_an_answer_is_named(tmp_path, row, message):
    path = write_rows(tmp_path / "a.jsonl", [PROBLEM, row])
    with pytest.raises(InputError, match=message) as error:
        load_task("math", path=path)
    assert str(error.value).startswith(f"{path}, line 2: ")


def test_math_compares_by_value_in_text_and_in_a_block(tmp_path):
    pytest.importorskip("math_verify")
    path = write_rows(tmp_path / "a.jsonl", [PROBLEM])
    task = load_task("math", path=path, heldout_fraction=0)
    completions = [r"so $\boxed{0.5}$", r"\boxed{\frac{2}{4}}", r"\boxed{\frac12}\boxed{3}", "1/3", ""]
    assert values_of(task.correct, completions, **task.train[0]) == [1, 1, 0, 0, 0]
    think = load_task("math", path=path, heldout_fraction=0, style="think")
    blocks = [rf"<answer>{x}</answer>" for x in (r"\frac{1}{2}", "1/2", r"$\frac12$", r"\boxed{0.5}", r"\frac{1}{3}")]
    assert values_of(think.correct, [*blocks, r"\boxed{0.5}"], **think.train[0]) == [1, 1, 1, 1, 0, 0]
    assert [think.extract(blocks[i]) for i in (0, 1)] == ["1/2", "1/2"] and think.extract("1/2") is None
