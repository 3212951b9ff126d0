"""Measure held-out accuracy: greedy, mean@k, pass@k and maj@k, each with an interval over prompts; the difference of
two models on the same prompts; a record of every completion with its score."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from minirl.errors import InputError
from minirl.metrics import accuracy_interval, majority_at_k, mean_at_k, paired_difference, pass_at_k
from minirl.prompts import measure
from minirl.rewards import TIMEOUT, score_rollout
from minirl.rollout import Rollout, sample
from minirl.rules import Reward
from minirl.run import Observer, Run
from minirl.sampler import Sampler, SamplingParams
from minirl.step import Step
from minirl.task import Task
from minirl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """The accuracies of one model on P prompts, and the completions that they were measured on."""

    metrics: dict[str, float]
    values: dict[str, list[float]]  # each accuracy's value for every prompt, NaN where no sample has a score
    rollout: Rollout  # the k samples a prompt
    correct: np.ndarray  # [P, k] of 1, 0, what the checker gives in between, or NaN

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the 95 % interval over prompts of each accuracy."""
        return {name: accuracy_interval(values) for name, values in self.values.items()}

    @property
    def graded(self) -> bool:
        """Tell whether there are scores other than 0 and 1."""
        return not np.isin(self.correct[~np.isnan(self.correct)], (0, 1)).all()

    def over(self, other: "Evaluation") -> dict[str, tuple[float, float, float]]:
        """Return how much better this model is than another on the same prompts: for each accuracy the mean difference
        and the ends of its 95 % interval."""
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
    """Measure the accuracy of `task.correct` on examples (default: all held-out ones) from k = params.n samples each,
    and from one greedy completion each.

    pass@n and maj@n are measured at n = k, with `curve` also at n = 1, 2, 4, ... below k; `ties` is the rule for a tied
    vote (see `majority_at_k`). A score of 1 is right. Completions without a score are left out; one whose check takes
    longer than `timeout` seconds is wrong. Without any score the accuracies are NaN, or with `require_score` an
    InputError is raised. Rollouts are appended to `sampled` before they are scored: the samples, then the greedy
    ones. `on_bad` is that of `minirl.rewards.score`, and `name` is what its sentences call the checker.
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
        # 1, 2, 4, ... below k: the curve of pass@n over the number of samples
        sizes = [2**i for i in range(k.bit_length()) if 2**i < k] if curve else []
        answers = np.array([task.extract(text) for text in rollout.answers], dtype=object).reshape(correct.shape)
        values |= {f"pass@{n}": [_passed(c, n) for c in correct] for n in (*sizes, k)}
        for n in (*sizes, k):
            values[f"maj@{n}"] = [_majority(a, c, n, ties) for a, c in zip(answers, correct, strict=True)]
    if greedy:
        # One each: greedy completions of the same prompt are equal.
        single = sample(sampler, tokenizer, examples, replace(params, n=1, temperature=0.0))
        sampled.append(single)
        values["greedy"] = _correct(single, {name: task.correct}, timeout, on_bad)[:, 0].tolist()
    metrics = {f"eval/{name}": mean_at_k(v) for name, v in values.items()}
    metrics |= {"eval/prompts": len(examples), "eval/samples": k, "eval/temperature": params.temperature}
    metrics |= {f"eval/{name}": value for name, value in _lengths(rollout, correct.ravel()).items()}
    return Evaluation(metrics, {f"eval/{name}": v for name, v in values.items()}, rollout, correct)


class HeldOutAccuracy(Observer):
    """The observer that measures held-out accuracy in grpo and ppo: before training, every `eval_every` steps and after
    the last one."""

    def __init__(self, task: Task, config):
        self.task, self.config = task, config

    def measured(self, run: Run) -> list[dict]:
        """Return at most `eval_prompts` held-out examples, those that leave room for a completion."""
        self.policy, self.display = run.held["policy"], run.display
        about = self.policy.tokenizer, self.policy.model.config, self.config, run.display
        return measure(self.task, "heldout", *about, most=self.config.eval_prompts).examples

    def begin(self, run: Run) -> dict[str, float]:
        """Measure before the first step, where an error in the task may still end the run."""
        self.task = replace(self.task, heldout=self.measured(run))
        if run.start:
            return {}
        before = self._measure(first=True)
        run.display.line(f"before: held-out {before['eval/mean']:.3f} (greedy {before['eval/greedy']:.3f})")
        return before

    def after(self, step: Step) -> dict[str, float]:
        """Measure after a step where it is due."""
        due = step.due(self.config.eval_every) or step.done == step.total
        return self._measure(first=False) if due else {}

    def _measure(self, first: bool) -> dict[str, float]:
        c, policy = self.config, self.policy
        params = replace(c.sampling, stop_ids=policy.tokenizer.stop_ids)
        result = evaluate(
            policy.sampler,
            policy.tokenizer,
            self.task,
            # The same seed each time, and never that of a training step, whose number is far below 2³¹.
            replace(params, n=c.eval_samples, seed=(c.seed << 32) + (1 << 31)),
            timeout=c.reward_timeout,
            progress=lambda done, total: self.display.progress("evaluation", done, total),
            require_score=first,
            on_bad=c.on_bad_reward if first else "skip",  # later it must not cost the steps before it
        )
        for line in result.rollout.fault_lines().values():
            self.display.line(f"held-out: {line}")
        return result.metrics


def completion_records(model: str, sampled: Sequence[Rollout], task: Task) -> list[dict]:
    """Return a record for each completion that `evaluate` has sampled; "correct" is None where it has no score."""
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
    """Return the measurements of one model, or of two on the same prompts with their differences, for a JSON file: NaN
    becomes None, which JSON can hold."""
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
    """Return mean lengths in tokens of all, right and wrong completions [B], and the shares of how they ended."""
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
    """Score a rollout with the checker alone and return its values [P, k]."""
    score_rollout(rollout, {name: (1.0, rule) for name, rule in checker.items()}, timeout, on_bad=on_bad)
    return rollout.rewards.view(-1, rollout.group_size).numpy()


def _passed(correct: np.ndarray, k: int) -> float:
    """Return pass@k of one prompt from its samples that have a score; with fewer than k of them, k is their number."""
    scored = correct[~np.isnan(correct)]
    n = len(scored)
    return pass_at_k(n, int((scored == 1).sum()), min(k, n)) if n else math.nan


def _majority(answers: np.ndarray, correct: np.ndarray, k: int, ties: str) -> float:
    """Return maj@k of one prompt from its samples that have a score; with fewer than k of them, k is their number, and
    without any the result is NaN.

    An answer is right if a completion that gives it was scored right, which works for any task, even where several
    answers are right."""
    scored = ~np.isnan(correct)
    if not scored.any():
        return math.nan
    right = {answer for answer, good in zip(answers, correct, strict=True) if answer and good == 1}
    return majority_at_k(list(answers[scored]), right, min(k, int(scored.sum())), ties)
