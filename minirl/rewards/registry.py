"""Rewards by name: the built-in ones, functions in files of the user's, and reward models."""

import difflib
import importlib.util
from pathlib import Path

from minirl.errors import InputError
from minirl.rewards import rules
from minirl.rewards.math import math_match
from minirl.rewards.model import RewardModel
from minirl.rewards.rules import Reward

REWARDS: dict[str, Reward] = {
    "answer": rules.answer_match,
    "exact_match": rules.exact_match,
    "last_number": rules.last_number,
    "math": math_match,
    "format": rules.think_answer_format,
    "repetition": rules.repetition,
    "repetitive": rules.repetitive,
    "too_short": rules.too_short,
}


def load_reward(spec: str) -> Reward:
    """The reward named `spec` in REWARDS, the function of a file, as in `path/to/file.py:function`, or a reward model,
    as in `model:path/to/folder`."""
    if spec in REWARDS:
        return REWARDS[spec]
    if spec.startswith("model:"):
        return RewardModel.from_pretrained(spec.removeprefix("model:"))
    path, colon, name = spec.rpartition(":")
    if not colon:
        hint = did_you_mean(spec, REWARDS)
        choices = ", ".join(REWARDS)
        raise InputError(
            f"reward {spec!r} is unknown{hint}: choose from {choices}, or give path/to/file.py:function or "
            "model:path/to/folder."
        )
    module = _load_module(Path(path), spec)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        found = ", ".join(functions) or "none"
        raise InputError(f"reward {spec!r}: {path} has no function {name!r}; its functions are: {found}.")
    return function


def _load_module(path: Path, spec: str):
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"reward {spec!r}: there is no Python file {path}: give path/to/file.py:function.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"reward {spec!r}: {path} cannot be imported ({what}): correct the file.") from error
    return module


def did_you_mean(word: str, choices) -> str:
    """' (did you mean 'sum'?)' for an error message, or nothing where no choice is close."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
