"""Rewards by name: the built-in ones, functions in files of the user's, and reward models."""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path

from minirl.errors import InputError
from minirl.rewards import rules
from minirl.rewards.calls import function_call
from minirl.rewards.math import math_match
from minirl.rewards.rules import Reward
from minirl.rewards.scoring import Outside
from minirl.sandbox import load

REWARDS: dict[str, Reward] = {
    "answer": rules.answer_match,
    "exact_match": rules.exact_match,
    "last_number": rules.last_number,
    "math": math_match,
    "format": rules.think_answer_format,
    "repetition": rules.repetition,
    "repetitive": rules.repetitive,
    "too_short": rules.too_short,
    "function_call": function_call,
}
FACTORIES: dict[str, Callable[..., Reward]] = {"overlong": rules.overlong, "too_short": rules.shorter_than}


def load_reward(spec: str) -> Reward:
    """The reward named `spec` in REWARDS, or in FACTORIES with its numbers (overlong:256:64); the function of a file,
    as in `path/to/file.py:function`, which is called outside the trainer, and with `trusted:` before it without walls;
    or a reward model, as in `model:path/to/folder`.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    name, colon, numbers = spec.partition(":")
    if name in FACTORIES:
        return _made(name, numbers)
    if spec.startswith("model:"):
        from minirl.rewards.model import RewardModel  # needs torch, which the workers of the sandbox do without

        return RewardModel.from_pretrained(spec.removeprefix("model:"))
    place = spec.removeprefix("trusted:")
    path, colon, _ = place.rpartition(":")
    if not colon:
        hint = did_you_mean(spec, REWARDS)
        choices = ", ".join([*REWARDS, "overlong:L_MAX:L_CACHE"])
        raise InputError(
            f"reward {spec!r} is unknown{hint}: choose from {choices}, or give path/to/file.py:function or "
            "model:path/to/folder."
        )
    if not path.endswith(".py") or not Path(path).is_file():
        raise InputError(f"reward {spec!r}: there is no Python file {path}: give path/to/file.py:function.")
    function, trusted = str(Path(path).resolve()) + place[len(path) :], place != spec
    load(function, trusted)
    return Outside(function, trusted)


def _made(name: str, numbers: str) -> Reward:
    """The reward of a factory, with its whole numbers as in overlong:256:64."""
    wanted = list(inspect.signature(FACTORIES[name]).parameters)
    try:
        given = [int(number) for number in numbers.split(":")]
        if len(given) != len(wanted):
            raise ValueError
    except ValueError:
        usage = ":".join([name, *(word.upper() for word in wanted)])
        raise InputError(f"reward {':'.join((name, numbers))!r} needs whole numbers: write it as {usage}.") from None
    return FACTORIES[name](*given)


def did_you_mean(word: str, choices) -> str:
    """' (did you mean 'sum'?)' for an error message, or nothing where no choice is close."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
