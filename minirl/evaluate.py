"""Held-out accuracy: greedy, mean@k, pass@k and maj@k, each with a bootstrap interval over prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minirl.errors import InputError
from minirl.metrics import bootstrap_ci, majority_at_k, mean_at_k, pass_at_k
from minirl.rewards.scoring import TIMEOUT
from minirl.rollout import Rollout, sample
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import Task
from minirl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap over prompts, of each accuracy
    rollout: Rollout  # the k samples a prompt
    correct: np.ndarray  # [P, k] of 1, 0 or NaN


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
) -> Evaluation:
    """Accuracy of `task.correct` on examples (default: all held-out ones) from k = params.n samples each, and
    greedy.

    What has no score is left out, what takes longer than `timeout` seconds is wrong; with no score at all the
    accuracies are NaN, or an InputError where one is required. `on_bad` is that of `minirl.rewards.score`.
    """
    examples = task.heldout if examples is None else examples
    if not examples:
        raise InputError(f"task {task.name!r} has no held-out examples to evaluate on: ask for some")
    rollout = sample(sampler, tokenizer, examples, params, progress)
    correct = _correct(rollout, task, timeout, on_bad)
    if require_score:
        rollout.require_score()
    k = params.n
    values = {"mean": [mean_at_k(row) for row in correct]}
    if k > 1:
        scored = [row[~np.isnan(row)] for row in correct]
        values[f"pass@{k}"] = [pass_at_k(len(c), int((c == 1).sum()), len(c)) if len(c) else math.nan for c in scored]
        answers = np.array([task.extract(text) for text in rollout.texts], dtype=object).reshape(correct.shape)
        values[f"maj@{k}"] = [_majority(a, c) for a, c in zip(answers, correct, strict=True)]
    if greedy:
        single = sample(sampler, tokenizer, examples, replace(params, n=1, temperature=0.0))
        values["greedy"] = _correct(single, task, timeout, on_bad)[:, 0].tolist()
    lengths = rollout.lengths
    metrics = {f"eval/{name}": mean_at_k(v) for name, v in values.items()}
    metrics |= {"eval/prompts": len(examples), "eval/samples": k, "eval/temperature": params.temperature}
    metrics |= {"eval/len_mean": sum(lengths) / len(lengths), "eval/unscored_frac": float(np.isnan(correct).mean())}
    return Evaluation(metrics, {f"eval/{name}": bootstrap_ci(v) for name, v in values.items()}, rollout, correct)


def _correct(rollout: Rollout, task: Task, timeout: float, on_bad: str) -> np.ndarray:
    rollout.score({"correct": (1.0, task.correct)}, timeout, on_bad=on_bad)
    return rollout.rewards.view(-1, rollout.group_size).numpy()


def _majority(answers: np.ndarray, correct: np.ndarray) -> float:
    """Votes are right if their completion was: that works for any task, also where several answers are right. NaN where
    nothing could be scored."""
    if np.isnan(correct).all():
        return math.nan
    right = {answer for answer, good in zip(answers, correct, strict=True) if answer and good == 1}
    return majority_at_k(list(answers), right)
