"""Problems of reasoning-gym: their splits, where an answer is read, and what a scorer may be asked."""

import functools
import json
import re
import subprocess
import sys
import typing

import pytest
from cases import read_cases

pytest.importorskip("reasoning_gym")

from minirl.errors import InputError
from minirl.judge import reasoning_worker
from minirl.judge.pool import Job, Pool
from minirl.judge.reasoning_gym import GUARDS, WORKER, may_be_right, reader
from minirl.lab.tasks import load_task, parse_task
from minirl.lab.tasks.reasoning_gym import _refusal
from minirl.rewards import score

SUMS = "reasoning_gym:dataset=chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"


@pytest.fixture(scope="module")
def sums():
    return parse_task(SUMS)


def correct(task, completions, row):
    columns = {name: [row[name]] * len(completions) for name in ("answer", "entry")}
    return score({"correct": (1.0, task.correct)}, ["p"] * len(completions), completions, columns)[0]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(reasoning_worker, "BATCH", 2)  # some generators are slow


@functools.cache
def entry_of(name, number=0):
    entry = reasoning_worker.problems(name, "{}", 0, 0)["problems"][number]["entry"]
    return json.loads(entry)["answer"], entry


def paid(name, answer, entry):
    """What the guards and the scorer make of an answer that is known to be harmless."""
    return may_be_right(name, answer, json.loads(entry)) and reasoning_worker.score(name, "{}", answer, entry) == 1.0


# --- problems


def test_no_question_is_on_both_sides_or_twice(sums):
    questions = [row["prompt"][0]["content"] for row in sums.train + sums.heldout]
    assert len(set(questions)) == len(questions) == len(sums.train) + len(sums.heldout)
    assert 180 <= len(questions) <= 200  # all that there are: 100 sums and 100 differences
    assert 0.1 < len(sums.heldout) / len(questions) < 0.3


def test_a_larger_task_moves_no_question_to_the_other_side(sums):
    small = parse_task(SUMS + ",train_size=20,heldout_size=10")
    assert (len(small.train), len(small.heldout)) == (20, 10)
    assert all(row in sums.train for row in small.train) and all(row in sums.heldout for row in small.heldout)


def test_other_seeds_give_other_splits(sums):
    other = parse_task(SUMS + ",seed=1,train_size=50,heldout_size=10")
    assert not all(row["prompt"] in [r["prompt"] for r in sums.train] for row in other.train)


def test_problems_are_the_same_in_every_process():
    runs = []
    for _ in range(2):
        with Pool(1) as pool:
            job = Job.call(f"{WORKER}:problems", ("word_ladder", "{}", 0, 0), trusted=True)
            runs.append(pool.map([job], 60)[0]["problems"])
    assert runs[0] == runs[1] and len(runs[0]) == 32


@pytest.mark.parametrize(
    "spec, message",
    [
        ("reasoning_gym", r"needs the option 'dataset': write it as reasoning_gym:dataset="),
        ("reasoning_gym:dataset=composite", "there is no data set 'composite'"),
        ("reasoning_gym:dataset=chain_sum,min_terms=9,max_terms=2", "refuses .*max_terms must be >= min_terms"),
        ("reasoning_gym:dataset=chain_sum,style=thinking", r"style 'thinking' is unknown \(did you mean 'think'\?\)"),
        ("reasoning_gym:dataset=chain_sum,train_size=-1", "0 or more"),
        (SUMS + ",train_size=500", r"only 1\d\d of train_size=500 .* distinct problems were found: ask for fewer"),
    ],
)
def test_a_task_that_cannot_be_made_is_explained(spec, message):
    with pytest.raises(InputError, match=message) as error:
        parse_task(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("chainsum", {}, r"no data set 'chainsum' \(did you mean 'chain_sum'\?\): choose from ab, acre"),
        ("chain_sum", {"min_term": 2}, r"no option 'min_term' \(did you mean 'min_terms'\?\): choose from min_terms,"),
        ("chain_sum", {"size": 2}, "no option 'size'"),
        ("chain_sum", {"min_terms": "two"}, "refuses .*'two'"),
        ("word_sorting", {"transformation": "shout"}, "refuses .*'shout'"),
    ],
)
def test_what_the_package_does_not_know_is_explained_with_the_choices(name, options, message):
    refused = reasoning_worker.problems(name, json.dumps(options), 0, 0)["refused"]
    assert re.search(message, _refusal(*refused))


def test_an_option_that_is_no_text_or_number_is_refused():
    with pytest.raises(InputError, match="give options as numbers, texts or lists"):
        load_task("reasoning_gym", dataset="chain_sum", min_terms={1})


def test_a_missing_package_is_told_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'minirl\[reasoning\]'"):
        parse_task(SUMS)


def test_options_from_a_command_line_are_read_as_the_configuration_has_them():
    read = reasoning_worker._read
    assert read("3", int) == 3 and read("0.5", float) == 0.5 and read("false", bool) is False
    assert read("+|-", tuple[str, ...]) == ("+", "-") and read("0.5|1", list[float]) == [0.5, 1.0]
    assert read("none", typing.Optional[int]) is None and read("4", typing.Optional[int]) == 4  # noqa: UP045
    config = json.dumps({"operators": "+|-", "min_terms": 3})
    problems = reasoning_worker.problems("basic_arithmetic", config, 0, 0)["problems"]
    assert not any("*" in problem["question"] for problem in problems)


# --- where the answer is read


def test_a_number_is_the_last_one_and_a_right_one_is_paid(sums):
    row = next(row for row in sums.train if row["answer"] == "7")
    completions = ["7", "3 + 4 = 7.", "it is 7.0", "7 or 8", "8, no, 7", "", "seven", "٧", "1e0", "17", "-7", "7" * 999]
    assert correct(sums, completions, row) == [1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert [sums.extract(text) for text in ("it is 7.0", "1,000", "1/2", "no")] == ["7", "1000", "0.5", None]


def test_style_think_reads_the_block_and_pays_a_little_for_the_format():
    task = parse_task(SUMS + ",style=think,train_size=8,heldout_size=1")
    row = task.train[0]
    good, wrong = f"<think>hm</think><answer>{row['answer']}</answer>", "<think>hm</think><answer>99</answer>"
    columns = {name: [row[name]] * 4 for name in ("answer", "entry")}
    total, parts = score(task.rewards, ["p"] * 4, [good, wrong, row["answer"], good + good], columns)
    assert total == pytest.approx([1.1, 0.1, 0.0, 0.0]) and parts["correct"] == [1, 0, 0, 0]
    assert task.extract(good) == row["answer"] and task.extract(row["answer"]) is None
    assert "between <answer> and </answer>" in row["prompt"][0]["content"]


def test_answers_that_are_no_numbers_are_the_last_line_and_long_ones_the_whole_text():
    assert reader(["True", "False"])("thinking\nTrue\n") == "True"
    assert reader(["1", "Friday"])("7\nso Friday") == "so Friday"
    assert reader(["1 2\n3 4", "1"])(" 1 2\n3 4\n") == "1 2\n3 4"
    assert reader([None, None])("R U\n R' ") == "R'"
    assert [reader(["a", "b"])(text) for text in ("", " \n")] == [None, None]


# --- what is asked of a scorer


@pytest.mark.parametrize("name", [*GUARDS, "chain_sum", "sudoku", "codeio", "base_conversion", "arc_agi"])
def test_the_oracle_itself_is_paid(name):
    for number in range(2):
        oracle, entry = entry_of(name, number)
        if "Integral" not in oracle:  # of some integrals the package knows no answer but the question
            assert paid(name, oracle.strip(), entry)


@pytest.mark.parametrize(("name", "answer"), read_cases("reasoning_gym")["cases"])
def test_what_is_not_right_is_not_paid(name, answer):
    oracle, entry = entry_of(name)
    metadata = json.loads(entry)["metadata"]
    if name == "number_sorting":
        answer = json.dumps(["nan"] * len(metadata["sorted_numbers"]))
    answer = answer.format(oracle=oracle, **{k: metadata.get(k) for k in ("integrand", "variable")})
    assert not paid(name, answer, entry)


def test_the_guards_close_holes_that_are_there():
    """A guard against nothing could go: the package's own scorer gives these wrong answers the full mark."""
    holes = [("puzzle24", "6*4*1*1"), ("game_of_life_halting", "maybe"), ("complex_arithmetic", "nan")]
    for name, answer in holes:
        _, entry = entry_of(name)
        assert reasoning_worker.score(name, "{}", answer, entry) == 1.0
        assert not may_be_right(name, answer, json.loads(entry))


@pytest.mark.parametrize("text", ["x" * 10**6, "(" * 10**6, "9" * 10**6, "\0", "[" * 10**5, "1/" * 10**5, "- " * 10**5])
def test_the_guards_survive_any_text(text):
    for name in GUARDS:
        assert may_be_right(name, text, json.loads(entry_of(name)[1])) is False


def test_an_answer_that_hangs_its_scorer_is_wrong_and_the_others_are_scored(monkeypatch):
    monkeypatch.setattr("minirl.judge.reasoning_gym.SECONDS", 2.0)
    task = load_task("reasoning_gym", dataset="polynomial_multiplication", train_size=2, heldout_size=1)
    row = task.train[0]
    completions = [row["answer"], "9**9**9**9**9", row["answer"] + " + 1", row["answer"]]
    assert correct(task, completions, row) == [1.0, 0.0, 0.0, 1.0]


def test_the_scorer_needs_neither_torch_nor_minirl():
    script = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'minirl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", script, str(WORKER)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
