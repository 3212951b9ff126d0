"""Scoring: several weighted rewards on one batch of completions, each checked and kept apart for the logs."""

import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from minirl.errors import InputError
from minirl.rewards.rules import Reward
from minirl.rewards.sandbox import map_with_timeout


def score(
    rewards: Mapping[str, tuple[float, Reward]],
    prompts: Sequence,
    completions: Sequence[str],
    columns: Mapping[str, Sequence],
    timeout: float | None = None,
    on_timeout: str | Callable[[str, int], object] = "error",
    on_steps: Callable[[str, int, list[tuple[int, float]]], object] | None = None,
) -> tuple[list[float], dict[str, list[float]]]:
    """The weighted sum of the rewards for each completion, and the unweighted values of each reward by its name.

    A completion that one of the rewards cannot score has the total NaN, unless its weight is 0. With `timeout` each
    completion is scored by itself in a child process, at most that many seconds each; one that takes longer is an
    error, or unscorable with on_timeout="nan", and also with a function, which is told the reward's name and the
    completion's index. A reward with a true attribute `in_process` has no child: a model is slow to copy and cannot
    hang. InputError names the reward and the completion when a reward raises or returns anything but one finite number,
    NaN or None a completion.

    With `on_steps` a reward may also return for a completion the rewards of its steps: a list with a number for each of
    its lines, or (end, reward) pairs with rising ends, in characters of the completion. They count as their sum, and
    on_steps is told the reward's name, the completion's index and the pairs.
    """
    if on_timeout not in ("error", "nan") and not callable(on_timeout):
        raise InputError(f"score: on_timeout must be 'error', 'nan' or a function, not {on_timeout!r}.")
    if timeout is not None and not timeout > 0:
        raise InputError(f"score: timeout must be a positive number of seconds, not {timeout!r}.")
    if not rewards:
        raise InputError("score: there is no reward function: give at least one.")
    batch = _batch(prompts, completions, columns)
    parts = {name: [] for name in rewards}
    for name, (weight, function) in rewards.items():
        if not _is_number(weight) or not math.isfinite(weight):
            raise InputError(f"reward {name!r}: its weight must be a finite number, not {weight!r}.")
        if timeout is None or getattr(function, "in_process", False):
            values = _call(name, function, batch)
        else:
            values = _call_each(name, function, batch, timeout, on_timeout)
        for i, value in enumerate(values):
            value = value.tolist() if hasattr(value, "tolist") else value  # numpy and torch
            if on_steps and isinstance(value, list | tuple):
                steps = _steps(name, i, value, completions[i])
                on_steps(name, i, steps)
                value = sum(reward for _, reward in steps)
            parts[name].append(_checked(name, i, value))
    weights = [weight for weight, _ in rewards.values()]
    total = [sum(w * v for w, v in zip(weights, row, strict=True) if w) for row in zip(*parts.values(), strict=True)]
    return total, parts


def _batch(prompts, completions, columns) -> dict[str, Sequence]:
    """The keyword arguments of a reward, all of one length."""
    reserved = {"prompts", "completions"} & set(columns)
    if reserved:
        raise InputError(f"score: a column cannot be called {reserved.pop()!r}, rewards already take that: rename it.")
    batch = {"prompts": prompts, "completions": completions, **columns}
    for name, values in batch.items():
        if len(values) != len(completions):
            raise InputError(f"score: {name!r} has {len(values)} entries for {len(completions)} completions.")
    return batch


def _row(batch, i: int) -> dict[str, list]:
    return {name: [values[i]] for name, values in batch.items()}


def _call(name: str, function: Reward, batch) -> list:
    try:
        values = function(**batch)
    except InputError:
        raise
    except Exception as error:
        i = _first_failure(function, batch)
        where = "on the batch" if i is None else f"at completion {i} ({_short(batch['completions'][i])})"
        raise InputError(_failed(name, _describe(error), where)) from error
    return _as_list(name, values, len(batch["completions"]))


def _call_each(name: str, function: Reward, batch, timeout: float, on_timeout: str | Callable) -> list:
    rows = [(_row(batch, i),) for i in range(len(batch["completions"]))]
    outcomes = map_with_timeout(lambda row: function(**row), rows, timeout)
    values = []
    for i, outcome in enumerate(outcomes):
        where = f"at completion {i} ({_short(batch['completions'][i])})"
        if isinstance(outcome, TimeoutError) and on_timeout != "error":
            outcome = [None]
            if callable(on_timeout):
                on_timeout(name, i)
        elif isinstance(outcome, TimeoutError):
            message = f"reward {name!r} took longer than {timeout:g} s {where}: speed it up or raise the timeout."
            raise InputError(message) from outcome
        elif isinstance(outcome, Exception):
            raise InputError(_failed(name, str(outcome), where)) from outcome
        values += _as_list(name, outcome, 1)
    return values


def _first_failure(function: Reward, batch) -> int | None:
    """The completion at which a reward raises when it scores each by itself."""
    for i in range(len(batch["completions"])):
        try:
            function(**_row(batch, i))
        except Exception:
            return i
    return None


def _as_list(name: str, values, expected: int) -> list:
    values = values.tolist() if hasattr(values, "tolist") else values  # numpy and torch
    if not isinstance(values, list | tuple):
        kind = type(values).__name__
        raise InputError(f"reward {name!r} returned a {kind}: it must return a list with one number a completion.")
    if len(values) != expected:
        raise InputError(
            f"reward {name!r} returned {len(values)} values for {expected} completions: return one for each."
        )
    return list(values)


def _checked(name: str, i: int, value) -> float:
    if value is None:
        return math.nan
    if not _is_number(value):
        steps = "; only advantage grpo_process takes rewards of steps" if isinstance(value, list | tuple) else ""
        raise InputError(
            f"reward {name!r} returned {_short(value)} for completion {i}: it must be a number, NaN or None{steps}."
        )
    if abs(value) > sys.float_info.max:  # also integers beyond any float; false for NaN
        raise InputError(f"reward {name!r} returned {_short(value)} for completion {i}: return NaN if it has no score.")
    return float(value)


def _steps(name: str, i: int, value: Sequence, text: str) -> list[tuple[int, float]]:
    """Rewards of lines, or pairs, as checked pairs of a step's end in characters and its reward."""
    lines, pairs = text.split("\n"), value
    if all(map(_is_number, value)):
        if len(value) != len(lines):
            raise InputError(
                f"reward {name!r} returned {len(value)} step rewards for completion {i}, which has {len(lines)} lines "
                f"({_short(text)}): return one for each line, or (end, reward) pairs."
            )
        pairs = zip(accumulate(len(line) + (n > 0) for n, line in enumerate(lines)), value, strict=True)
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in pairs]
    whole = all(len(pair) == 2 and isinstance(pair[0], numbers.Integral) and _is_number(pair[1]) for pair in pairs)
    if not whole or not all(math.isfinite(reward) for _, reward in pairs):
        raise InputError(
            f"reward {name!r} returned {_short(value)} for completion {i}: rewards of steps are finite numbers, one "
            "for each line, or pairs of a whole number of characters and such a reward."
        )
    ends = [end for end, _ in pairs]
    if ends != sorted(ends) or not 0 <= ends[0] <= ends[-1] <= len(text):
        raise InputError(
            f"reward {name!r} returned steps that end at {_short(ends)} for completion {i}: the ends must rise, up to "
            f"its {len(text)} characters at most."
        )
    return [(int(end), float(reward)) for end, reward in pairs]


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real)


def _failed(name: str, what: str, where: str) -> str:
    return f"reward {name!r} failed with {what} {where}: correct it, or return None for what it cannot score."


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _short(value, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"
