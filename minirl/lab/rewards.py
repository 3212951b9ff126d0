"""Find rewards by name: built-in ones, functions in the user's files, and reward models."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minirl import rules
from minirl.errors import InputError, did_you_mean
from minirl.judge import answers
from minirl.judge.calls import function_call
from minirl.judge.math import math_match
from minirl.judge.pool import call_each, load
from minirl.online_reward import OnlineReward
from minirl.reward_model import RewardModel
from minirl.rewards import TIMEOUT, Rewards, Unusable, as_list, row_of
from minirl.rules import Reward, guarded
from minirl.task import Task

REWARDS: dict[str, Reward] = {
    "answer": answers.answer_match,
    "exact_match": answers.exact_match,
    "last_number": answers.last_number,
    "math": math_match,
    "format": answers.think_answer_format,
    "repetition": rules.repetition,
    "repetitive": rules.repetitive,
    "too_short": rules.too_short,
    "function_call": function_call,
}
FACTORIES: dict[str, Callable[..., Reward]] = {"overlong": rules.overlong, "too_short": rules.shorter_than}


def load_reward(spec: str) -> Reward:
    """Return the reward named `spec`: one of REWARDS, or of FACTORIES with its numbers (overlong:256:64); the function
    of a file (`path/to/file.py:function`), which is called outside the trainer, behind walls unless `trusted:` is
    before its path; or a reward model (`model:path/to/folder`).
    """
    if spec in REWARDS:
        return REWARDS[spec]
    name, colon, numbers = spec.partition(":")
    if name in FACTORIES:
        return _made(name, numbers)
    if spec.startswith("model:"):
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
    """Call a factory with its whole numbers, written as in overlong:256:64."""
    wanted = list(inspect.signature(FACTORIES[name]).parameters)
    try:
        given = [int(number) for number in numbers.split(":")]
        if len(given) != len(wanted):
            raise ValueError
    except ValueError:
        usage = ":".join([name, *(word.upper() for word in wanted)])
        raise InputError(f"reward {':'.join((name, numbers))!r} needs whole numbers: write it as {usage}.") from None
    return FACTORIES[name](*given)


def rewards_of(config, task: Task) -> Rewards:
    """Make the rewards of a run, the task's and the config's, which may give one of the task's another weight; none
    where the completions are stored with theirs."""
    if config.data:
        return Rewards({}, task.correct)
    rewards, given, learned = task_rewards(task), set(), []
    for spec in config.rewards:
        name, weight = _name_and_weight(spec) if spec != "guarded" else (spec, 1.0)
        if name in given:
            raise InputError(f"reward {name!r} is given twice: leave one away")
        given.add(name)
        if name == "guarded":
            chosen = {other: reward for other, reward in rewards.items() if other in given}
            rewards = task_guarded(task, weight) | chosen
        elif name.startswith("model:"):
            learned.append(OnlineReward(name, weight, name.removeprefix("model:"), config.refresh, config.seed))
            rewards[name] = (weight, learned[-1])
        else:
            rewards[name] = (weight, rewards[name][1] if name in rewards else load_reward(name))
    return Rewards(rewards, task.correct, learned)


def _name_and_weight(spec: str) -> tuple[str, float]:
    name, _, weight = spec.rpartition("=")
    try:
        if math.isfinite(float(weight)):
            return name, float(weight)
    except ValueError:
        pass
    raise InputError(f"reward {spec!r} must be given as name=weight with a number, for instance format=0.2")


def task_guarded(task: Task, weight: float) -> dict:
    """Return the guarded reward in place of the task's own, from the task's rule and its format (that of think and
    answer tags where it has none), `weight` times."""
    _, form = task.rewards.get("format", (0.0, answers.think_answer_format))
    parts = guarded(task.correct, form)
    return {name: (weight * of_part, function) for name, (of_part, function) in parts.items()}


def task_rewards(task: Task) -> dict:
    """Return the rewards of a task and, if it is not among them, its accuracy with weight 0, so that both are
    logged."""
    known = any(function is task.correct for _, function in task.rewards.values())
    return dict(task.rewards) if known else {**task.rewards, "correct": (0.0, task.correct)}


@dataclass(frozen=True)
class Outside:
    """Call a reward function outside the trainer, one completion at a time, so that it can neither hang nor kill it.
    Unless it is `trusted`, it is called in an empty folder, has no network and nothing of the environment, reads only
    Python, its packages and its file's own folder, and nothing that it prints is seen.

    `function` is "path/to/file.py:name" or "package.module:name"; its file is imported there, never here.
    """

    function: str
    trusted: bool = False
    timeout: float = TIMEOUT  # seconds for one completion

    def within(self, timeout: float) -> "Outside":
        """Return the same reward with another time limit. A function that wraps such a reward has a `within` too."""
        return replace(self, timeout=timeout)

    def __call__(self, /, prompts, completions, **columns) -> list[Any | Exception]:
        """Return for each completion the function's value, a TimeoutError, or an Unusable."""
        batch = {"prompts": prompts, "completions": completions, **columns}
        rows = [row_of(batch, i) for i in range(len(completions))]
        try:
            json.dumps(rows)
        except (TypeError, ValueError) as error:
            message = f"reward {self.function}: a column cannot be sent to another process ({error}): leave it out"
            raise InputError(message) from error
        outcomes = call_each(self.function, rows, self.timeout, trusted=self.trusted)
        return [self._entry(outcome) for outcome in outcomes]

    def _entry(self, outcome):
        if isinstance(outcome, TimeoutError):
            return outcome
        if isinstance(outcome, Exception):
            hint = WALLS if "[Errno " in str(outcome) else ""
            return Unusable(f"failed with {outcome}{'' if self.trusted else hint}")
        try:
            return as_list(outcome, 1)[0]
        except Unusable as error:
            return error


WALLS = (
    " (it is called in an empty folder, without network and environment, and sees but Python and its file's folder: "
    "read by whole paths, or put `trusted:` before its path)"
)
