"""Find tasks by name or path, and check their options."""

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path

from minirl.errors import InputError, did_you_mean
from minirl.lab.tasks.arithmetic import arithmetic
from minirl.lab.tasks.code import humaneval, mbpp
from minirl.lab.tasks.countdown import countdown
from minirl.lab.tasks.gsm8k import gsm8k
from minirl.lab.tasks.jsonl import jsonl
from minirl.lab.tasks.math import math_problems
from minirl.lab.tasks.reasoning_gym import reasoning_gym
from minirl.lab.tasks.style import check_style
from minirl.tables import is_hub_name
from minirl.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "gsm8k": gsm8k,
    "math": math_problems,
    "reasoning_gym": reasoning_gym,
}


def load_task(name_or_path: str | Path, **options) -> Task:
    """Make a built-in task, or one from a file, a folder or a data set of the hub (see minirl.tables); the options are
    the keyword arguments of its function in this folder.

    Values may be texts, as a command line gives them ("3", "true", "none"). InputError names the choices for an unknown
    task or option.
    """
    name = str(name_or_path)
    if name in TASKS:
        return TASKS[name](**_checked(name, TASKS[name], options))
    if name and (name.endswith((".jsonl", ".jsonl.gz", ".parquet")) or Path(name).exists() or is_hub_name(name)):
        return jsonl(name, **_checked(name, jsonl, options))
    what = f"task {name!r} is unknown{did_you_mean(name, TASKS)}" if name else "the task has no name"
    raise InputError(
        f"{what}: choose from {', '.join(TASKS)}, or give a file (.jsonl, .parquet), a folder or a data set's name."
    )


def parse_task(spec: str) -> Task:
    """Make a task as a command line names it: `arithmetic:op=sum,digits=2`, `data.jsonl:heldout_fraction=0.2`."""
    name, colon, rest = spec.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if colon else []
    for option, equals, _ in pairs:
        if not equals:
            raise InputError(f"task {spec!r}: {option!r} is no option=value: write it as {name}:option=value,...")
    given = [option for option, _, _ in pairs]
    for option in given:
        if given.count(option) > 1:
            raise InputError(f"task {spec!r}: option {option} is given {given.count(option)} times: give it once.")
    return load_task(name, **{option: value for option, _, value in pairs})


def _checked(task: str, function: Callable, options: dict) -> dict:
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    missing = [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in options
    ]
    if missing:
        raise InputError(f"task {task!r} needs the option {missing[0]!r}: write it as {task}:{missing[0]}=...")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # the function checks the others itself
        known |= {option: None for option in options if option not in known}
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise InputError(f"task {task!r} has no option {option!r}{hint}: choose from {', '.join(known)}.")
    converted = {
        option: value if known[option] is None else _converted(task, option, value, known[option])
        for option, value in options.items()
    }
    check_style("jsonl" if function is jsonl else task, converted.get("style", "plain"))
    return converted


def _converted(task: str, option: str, value, annotation):
    """Convert the value to the annotated type: int, float, bool, str, or a union of one with None."""
    if value == "":
        raise InputError(f"task {task!r}: option {option} is empty: give a value, or leave it away.")
    accepted = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for wanted in sorted(accepted, key=lambda wanted: wanted is not types.NoneType):
        try:
            return _READERS[wanted](value)
        except (KeyError, TypeError, ValueError):
            continue
    names = " or ".join("none" if wanted is types.NoneType else wanted.__name__ for wanted in accepted)
    raise InputError(f"task {task!r}: option {option} must be {names}, not {value!r}.")


def _read_int(value) -> int:
    if isinstance(value, bool | float):
        raise TypeError
    return int(value)


def _read_text(value) -> str:
    if not isinstance(value, str | Path):
        raise TypeError
    return str(value)


_READERS = {
    types.NoneType: lambda value: {None: None, "none": None}[value],
    bool: lambda value: {True: True, False: False, "true": True, "false": False}[value],
    int: _read_int,
    float: float,
    str: _read_text,
}
