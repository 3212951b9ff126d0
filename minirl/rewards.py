"""Score completions by several weighted rewards, each checked and kept apart for the logs."""

import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from minirl.errors import InputError, told
from minirl.files import place_of
from minirl.rollout import Rollout
from minirl.rules import Reward

TIMEOUT = 10.0  # seconds for one completion, where nothing else is said


class RewardError(InputError):
    """A reward that is no reward; the sentence names it and the completion."""


class Unusable(Exception):
    """Something that a reward did instead of giving one, to follow its name in a sentence."""

    kind, value = "unusable", math.nan
    advice = "correct it, or return None for what it cannot score"
    strict = advice  # where everything stops the run


class Unscored(Unusable):
    kind, advice, strict = "unscored", "it has no score and is left out", "strict scoring stops at that"


class Late(Unusable):
    kind, value, advice = "late", 0.0, "it counts as 0; is the timeout long enough?"
    strict = "strict scoring stops at that; is the timeout long enough?"


@dataclass(frozen=True)
class Fault:
    """A completion without a reward: a "late" one counts as 0, an "unscored" or "unusable" one has no score."""

    reward: str
    row: int
    kind: Literal["late", "unscored", "unusable"]
    sentence: str


class Rewards:
    """The weighted rewards of a run: plain functions by name, among them reward models.

    The task's rule `correct` is logged where it is not among them; without any function, completions bring their
    rewards. `learned` are the reward models that the run watches (see minirl.online_reward): they compare their scores
    with the rule, and one of them may learn on."""

    def __init__(self, functions: Mapping[str, tuple[float, Reward]], correct: Reward, learned: Sequence = ()):
        known = not functions or any(function == correct for _, function in functions.values())
        self.functions = dict(functions) if known else {**functions, "correct": (0.0, correct)}  # so that it is logged
        self.correct, self.learned = correct, learned
        self._said: set[tuple[str, str]] = set()  # rewards and their kinds of faults

    def beside(self, policy, source, run) -> "Rewards":
        """Load what lies on disk, and refuse a reward model that cannot read what the policy may write."""
        for model in self.learned:
            model.beside(policy, source, run)
        return self

    @property
    def pay(self) -> float:
        """Return how much the reward of a right completion is above that of a wrong one, as far as it is known.

        That is the weight of the task's rule, which gives 0 to 1; or 1 where that is 0, or rewards are stored."""
        return abs(sum(weight for weight, function in self.functions.values() if function == self.correct)) or 1.0

    def score(self, rollout, config, step, in_steps: bool = False) -> None:
        """Reward a rollout; say each kind of fault of each reward once, and log all of them. `in_steps`: a reward may
        be one of steps."""
        score_rollout(rollout, self.functions, config.reward_timeout, in_steps, config.on_bad_reward)
        rule = next(name for name, (_, function) in self.functions.items() if function == self.correct)
        rollout.verdicts = rollout.parts[rule]
        for key, line in rollout.fault_lines().items():
            if key not in self._said:
                self._said.add(key)
                step.run.display.line(line)
        for fault in rollout.faults:
            example, text = rollout.indices[fault.row // rollout.group_size], rollout.texts[fault.row]
            known = {"reward": fault.reward, "fault": fault.kind, "prompt": example, "completion": text}
            step.record("faults.jsonl", **known, sentence=fault.sentence)

    def correct_distrusted(self, rollout) -> None:
        """Put the rule's label in the place of the scores of a reward model that is not to be believed."""
        for model in self.learned:
            model.correct_distrusted(rollout)

    def watch(self, rollout) -> None:
        """Let reward models take note of all that a step has sampled, once none of it can fail any more."""
        for model in self.learned:
            model.watch(rollout.everything or rollout)

    def halve(self) -> None:
        """Let reward models read half as many tokens at a time."""
        for model in self.learned:
            model.read_at_a_time(model.reward.budget // 2)

    def agreement(self, rollout) -> dict[str, float]:
        """Measure how far each reward model agrees with the task's rule."""
        found = {f"reward_model{i or ''}/": model.agreement(rollout) for i, model in enumerate(self.learned)}
        return {prefix + name: value for prefix, metrics in found.items() for name, value in metrics.items()}

    def refresh(self, step) -> None:
        """Let the reward models learn whose turn it is."""
        for model in self.learned:
            model.refresh_if_due(step)

    @property
    def models(self) -> list:
        return [module for model in self.learned for module in model.models]

    def save(self, folder) -> dict:
        for model in self.learned:
            model.save(folder)
        return {"reward_budgets": [model.reward.budget for model in self.learned]} if self.learned else {}

    def restore(self, folder, state) -> None:
        for model, budget in zip(self.learned, state.get("reward_budgets", ()), strict=True):
            model.restore(folder)
            model.read_at_a_time(budget)

    def finish(self, run) -> None:
        """Write the reward model that has learned."""
        for model in self.learned:
            model.finish(run)


def score_rollout(
    rollout: Rollout,
    rewards: Mapping[str, tuple[float, Reward]],
    timeout: float = TIMEOUT,
    in_steps: bool = False,
    on_bad: str = "stop",
) -> None:
    """`score` all completions of a rollout. `in_steps`: a reward may be one of steps, and counts as their sum."""
    prompts = [e["prompt"] for e in rollout.examples for _ in range(rollout.group_size)]
    indices = rollout.indices or range(len(rollout.prompts))
    known = [place_of(e, f"prompt {i}") for e, i in zip(rollout.examples, indices, strict=True)]
    places = [f"{place}, completion {j}" for place in known for j in range(rollout.group_size)]
    rollout.faults, rollout.steps, answers = [], {}, rollout.answers
    rollout.weights = {name: weight for name, (weight, _) in rewards.items()}

    def keep_steps(name: str, row: int, found: list[tuple[int, float]]) -> None:
        tag = len(answers[row]) - len(rollout.texts[row])
        steps = [(max(end - tag, 0), reward) for end, reward in found]
        rollout.steps.setdefault(name, [None] * len(rollout.completions))[row] = steps

    listen = keep_steps if in_steps else None
    total, rollout.parts = score(
        rewards, prompts, answers, rollout.columns(), timeout, on_bad, rollout.faults.append, listen, places
    )
    rollout.rewards = torch.tensor(total, dtype=torch.float64)


def score(
    rewards: Mapping[str, tuple[float, Reward]],
    prompts: Sequence,
    completions: Sequence[str],
    columns: Mapping[str, Sequence],
    timeout: float = TIMEOUT,
    on_bad: Literal["stop", "skip", "strict"] = "stop",
    on_fault: Callable[[Fault], object] | None = None,
    on_steps: Callable[[str, int, list[tuple[int, float]]], object] | None = None,
    places: Sequence[str] | None = None,
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the weighted sum of the rewards for each completion, and each reward's unweighted values by its name.

    A completion that one of the rewards cannot score (None, NaN) has the total NaN, unless its weight is 0. One for
    which a reward `Outside` takes longer than `timeout` seconds gets 0 from it, and so does one for which any reward
    has a TimeoutError in its list. What is no reward at all (an exception, infinity, a text, a list of another length)
    is a RewardError that names the reward and the completion, or, with on_bad="skip", a completion without score; with
    "strict" None, NaN and being late are such errors, too. on_fault is told of each, and `places` says what a
    completion is called in its sentence.

    With `on_steps` a reward may also return for a completion the rewards of its steps: a list with a number for each of
    its lines, or (end, reward) pairs with rising ends, in characters of the completion. They count as their sum, and
    on_steps is told the reward's name, the completion's index and the pairs.
    """
    if on_bad not in ("stop", "skip", "strict"):
        raise InputError(f"score: on_bad must be 'stop', 'skip' or 'strict', not {on_bad!r}.")
    if not 0 < timeout < math.inf:
        raise InputError(f"score: timeout must be a positive number of seconds, not {timeout!r}.")
    if not rewards:
        raise InputError("score: there is no reward function: give at least one.")
    batch = _batch(prompts, completions, columns)
    stops = {"stop": ("unusable",), "skip": (), "strict": ("late", "unscored", "unusable")}[on_bad]
    parts = {name: [] for name in rewards}
    for name, (weight, function) in rewards.items():
        if not _is_number(weight) or not math.isfinite(weight):
            raise InputError(f"reward {name!r}: its weight must be a finite number, not {weight!r}.")
        for i, entry in enumerate(_entries(function, batch, timeout)):
            try:
                value, steps = _checked(entry, completions[i], on_steps is not None)
                if steps:
                    on_steps(name, i, steps)
            except Unusable as found:
                value, place = found.value, places[i] if places else f"completion {i}"
                advice = found.strict if on_bad == "strict" else found.advice
                sentence = f"reward {name!r} {found} for {place} ({_short(completions[i])}): {advice}"
                if found.kind in stops:
                    raise RewardError(sentence) from None
                if on_fault:
                    on_fault(Fault(name, i, found.kind, sentence))
            parts[name].append(value)
    weights = [weight for weight, _ in rewards.values()]
    total = [sum(w * v for w, v in zip(weights, row, strict=True) if w) for row in zip(*parts.values(), strict=True)]
    return total, parts


def _batch(prompts, completions, columns) -> dict[str, Sequence]:
    """Return the keyword arguments of a reward, all of one length."""
    reserved = {"prompts", "completions"} & set(columns)
    if reserved:
        raise InputError(f"score: a column cannot be called {reserved.pop()!r}, rewards already take that: rename it.")
    batch = {"prompts": prompts, "completions": completions, **columns}
    for name, values in batch.items():
        if len(values) != len(completions):
            raise InputError(f"score: {name!r} has {len(values)} entries for {len(completions)} completions.")
    return batch


def row_of(batch, i: int) -> dict[str, list]:
    return {name: [values[i]] for name, values in batch.items()}


def _entries(function: Reward, batch, timeout: float) -> list:
    """Return for each completion what the reward gave, or the exception that stands for it."""
    size = len(batch["completions"])
    function = function.within(timeout) if hasattr(function, "within") else function
    try:
        entries = as_list(function(**batch), size)
        return [Late(f"gave {e}") if isinstance(e, TimeoutError) else e for e in entries]
    except InputError:
        raise
    except Exception as error:
        problem = _unusable(error)
    alone = []
    for i in range(size):  # which of them is it?
        try:
            alone += as_list(function(**row_of(batch, i)), 1)
        except Exception as error:
            alone.append(_unusable(error))
    return alone if any(isinstance(entry, Exception) for entry in alone) else [problem] * size


def _unusable(error: Exception) -> Exception:
    return error if isinstance(error, Unusable) else Unusable(f"failed with {told(error)}")


def as_list(values, expected: int) -> list:
    values = values.tolist() if hasattr(values, "tolist") else values  # numpy and torch
    if not isinstance(values, list | tuple):
        raise Unusable(f"returned {_short(values)}, not a list with one number a completion,")
    if len(values) != expected:
        raise Unusable(f"returned {len(values)} value{'s' * (len(values) != 1)} for {expected}, not one for each,")
    return list(values)


def _checked(entry, text: str, in_steps: bool) -> tuple[float, list[tuple[int, float]]]:
    """Return the value of an entry and, where it is one of steps, its steps."""
    if isinstance(entry, Exception):
        raise entry
    entry = entry.tolist() if hasattr(entry, "tolist") else entry  # numpy and torch
    if in_steps and isinstance(entry, list | tuple):
        steps = _steps(entry, text)
        return sum(reward for _, reward in steps), steps
    if entry is None or entry != entry:
        raise Unscored("returned None" if entry is None else "returned NaN")
    if not _is_number(entry):
        steps = "; only advantage grpo_process takes rewards of steps" if isinstance(entry, list | tuple) else ""
        raise Unusable(f"returned {_short(entry)}, which is no number{steps},")
    if abs(entry) > sys.float_info.max:  # also integers beyond any float
        raise Unusable(f"returned {_short(entry)}")
    return float(entry), []


def _steps(value: Sequence, text: str) -> list[tuple[int, float]]:
    """Check rewards of lines, or pairs, and return pairs of a step's end in characters and its reward."""
    lines, pairs = text.split("\n"), value
    if all(map(_is_number, value)):
        if len(value) != len(lines):
            raise Unusable(f"returned {len(value)} step rewards, not one for each of {len(lines)} lines, nor pairs,")
        pairs = zip(accumulate(len(line) + (n > 0) for n, line in enumerate(lines)), value, strict=True)
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in pairs]
    whole = all(len(pair) == 2 and isinstance(pair[0], numbers.Integral) and _is_number(pair[1]) for pair in pairs)
    if not whole or not all(math.isfinite(reward) for _, reward in pairs):
        raise Unusable(
            f"returned {_short(value)}, which are no finite numbers, one for each line, and no pairs of a whole number "
            "of characters and such a reward,"
        )
    ends = [end for end, _ in pairs]
    if ends != sorted(ends) or not 0 <= ends[0] <= ends[-1] <= len(text):
        raise Unusable(
            f"returned steps that end at {_short(ends)}, where ends must rise, up to {len(text)} characters at most,"
        )
    return [(int(end), float(reward)) for end, reward in pairs]


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real)


def _short(value, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"
