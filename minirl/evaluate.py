"""Held-out accuracy: greedy, mean@k, pass@k and maj@k, each with a bootstrap interval over prompts; two models side by
side; every completion with what it was worth."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from minirl.errors import InputError
from minirl.metrics import accuracy_interval, majority_at_k, mean_at_k, paired_difference, pass_at_k
from minirl.rewards import Reward
from minirl.rewards.scoring import TIMEOUT
from minirl.rollout import Rollout, sample
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import Task
from minirl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    values: dict[str, list[float]]  # of each accuracy a value a prompt, NaN where it has no score
    rollout: Rollout  # the k samples a prompt
    correct: np.ndarray  # [P, k] of 1, 0, what the checker gives in between, or NaN

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % over prompts, of each accuracy."""
        return {name: accuracy_interval(values) for name, values in self.values.items()}

    @property
    def graded(self) -> bool:
        """Whether there are scores other than 0 and 1."""
        return not np.isin(self.correct[~np.isnan(self.correct)], (0, 1)).all()

    def over(self, other: "Evaluation") -> dict[str, tuple[float, float, float]]:
        """How much better this model is than another on the same prompts: of each accuracy the mean difference and the
        ends of its 95 % interval."""
        return {name: paired_difference(values, other.values[name]) for name, values in self.values.items()}


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    task: Task,
    params: SamplingParams,
    examples: Sequence[dict] | None = None,
    greedy: bool = True,
    timeout: float = TIMEOUT,
    progress: Callable[[int, int], None] | None = None,
    require_score: bool = True,
    on_bad: str = "stop",
    ties: str = "expected",
    curve: bool = False,
    sampled: list[Rollout] | None = None,
    name: str = "correct",
) -> Evaluation:
    """Accuracy of `task.correct` on examples (default: all held-out ones) from k = params.n samples each, and
    greedy.

    pass@k and maj@k are of k, with `curve` also of 1, 2, 4, ... up to it; `ties` is the rule of a tied vote (see
    `majority_at_k`). What is drawn is appended to `sampled` before it is scored: the samples, then the greedy ones.
    Right is a score of 1. What has no score is left out, what takes longer than `timeout` seconds is wrong; with no
    score at all the accuracies are NaN, or an InputError where one is required. `on_bad` is that of
    `minirl.rewards.score`, and `name` is what its sentences call the checker.
    """
    examples = task.heldout if examples is None else examples
    if not examples:
        raise InputError(f"task {task.name!r} has no held-out examples to evaluate on: ask for some")
    sampled = [] if sampled is None else sampled
    rollout = sample(sampler, tokenizer, examples, params, progress)
    sampled.append(rollout)
    correct = _correct(rollout, {name: task.correct}, timeout, on_bad)
    if require_score:
        rollout.require_score()
    k = params.n
    values = {"mean": [mean_at_k(row) for row in correct]}
    if k > 1:
        sizes = [2**i for i in range(k.bit_length()) if 2**i < k] if curve else []
        answers = np.array([task.extract(text) for text in rollout.answers], dtype=object).reshape(correct.shape)
        values |= {f"pass@{n}": [_passed(c, n) for c in correct] for n in (*sizes, k)}
        for n in (*sizes, k):
            values[f"maj@{n}"] = [_majority(a, c, n, ties) for a, c in zip(answers, correct, strict=True)]
    if greedy:
        single = sample(sampler, tokenizer, examples, replace(params, n=1, temperature=0.0))
        sampled.append(single)
        values["greedy"] = _correct(single, {name: task.correct}, timeout, on_bad)[:, 0].tolist()
    metrics = {f"eval/{name}": mean_at_k(v) for name, v in values.items()}
    metrics |= {"eval/prompts": len(examples), "eval/samples": k, "eval/temperature": params.temperature}
    metrics |= {f"eval/{name}": value for name, value in _lengths(rollout, correct.ravel()).items()}
    return Evaluation(metrics, {f"eval/{name}": v for name, v in values.items()}, rollout, correct)


def completion_records(model: str, sampled: Sequence[Rollout], task: Task) -> list[dict]:
    """A line for each completion that `evaluate` has sampled; what was not scored, or could not be, is None."""
    return [
        {
            "model": model,
            "problem": row // rollout.group_size,
            "prompt": rollout.examples[row // rollout.group_size]["prompt"],
            "sample": "greedy" if rollout is not sampled[0] else row % rollout.group_size,
            "completion": rollout.texts[row],
            "answer": task.extract(answers[row]),
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "correct": _or_none(rollout.rewards[row].item()) if len(rollout.rewards) else None,
        }
        for rollout in sampled
        for answers in (rollout.answers,)
        for row, completion in enumerate(rollout.completions)
    ]


def numbers(results: Sequence[Evaluation]) -> dict:
    """What was measured of one model, or of two on the same prompts, as JSON has it: NaN is null."""
    found = [
        {
            "metrics": {name: _or_none(value) for name, value in result.metrics.items()},
            "intervals": {name: list(map(_or_none, ends)) for name, ends in result.intervals.items()},
        }
        for result in results
    ]
    if len(results) == 1:
        return found[0]
    first, second = results
    differences = {
        name: {"mean": _or_none(mean), "interval": list(map(_or_none, ends))}
        for name, (mean, *ends) in first.over(second).items()
    }
    return found[0] | {"compare": found[1] | {"differences": differences}}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lengths(rollout: Rollout, correct: np.ndarray) -> dict[str, float]:
    """Lengths in tokens, of all and of right and wrong completions [B], and how they ended."""
    lengths, ended = np.array(rollout.lengths), [c.finish_reason == "stop" for c in rollout.completions]
    return {
        "len_mean": float(lengths.mean()),
        "len_p95": float(np.quantile(lengths, 0.95)),
        "len_correct_mean": mean_at_k(lengths[correct == 1]),
        "len_wrong_mean": mean_at_k(lengths[(correct != 1) & ~np.isnan(correct)]),
        "stop_frac": float(np.mean(ended)),
        "truncated_frac": rollout.truncated.double().mean().item(),
        "unscored_frac": float(np.isnan(correct).mean()),
    }


def _correct(rollout: Rollout, checker: dict[str, Reward], timeout: float, on_bad: str) -> np.ndarray:
    rollout.score({name: (1.0, rule) for name, rule in checker.items()}, timeout, on_bad=on_bad)
    return rollout.rewards.view(-1, rollout.group_size).numpy()


def _passed(correct: np.ndarray, k: int) -> float:
    """pass@k of the samples of a prompt that have a score, of all of these where they are fewer than k."""
    scored = correct[~np.isnan(correct)]
    n = len(scored)
    return pass_at_k(n, int((scored == 1).sum()), min(k, n)) if n else math.nan


def _majority(answers: np.ndarray, correct: np.ndarray, k: int, ties: str) -> float:
    """Votes are right if their completion was: that works for any task, also where several answers are right. Of those
    that have a score, of all of these where they are fewer than k; NaN where there is none."""
    scored = ~np.isnan(correct)
    if not scored.any():
        return math.nan
    right = {answer for answer, good in zip(answers, correct, strict=True) if answer and good == 1}
    return majority_at_k(list(answers[scored]), right, min(k, int(scored.sum())), ties)
