"""Metrics of sampled answers: pass@k, maj@k, mean@k, and how far each is to be trusted."""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from minirl.errors import InputError


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased chance that one of k samples is right, from n samples of which c are (Chen et al. 2107.03374, eq.
    1).

    1 − C(n−c, k) / C(n, k) = 1 − Π_{i=n−c+1}^{n} (1 − k/i); 1 if n − c < k. The plug-in 1 − (1 − c/n)^k is biased low.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise InputError(f"pass_at_k: it needs 0 <= c <= n and 1 <= k <= n, but n={n}, c={c}, k={k}.")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def majority_at_k(
    answers: Sequence[str | None],
    gold: str | Collection[str],
    k: int | None = None,
    ties: str = "expected",
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """The chance that the most frequent of k answers is right (self-consistency, Wang et al. 2203.11171; maj@k,
    Lewkowycz et al. 2206.14858).

    `answers` are the normalised answers to one prompt, None or "" where there is none: those do not vote, and with no
    vote at all the result is 0. `gold` is the right answer, or all the right ones. Tied winners: "expected" is the
    share of right ones among them, "first" takes the one that was seen first. For k below the number of answers this is
    the mean over all k-subsets, or over `draws` random ones if there are more.
    """
    n = len(answers)
    k = n if k is None else k
    if not 1 <= k <= n:
        raise InputError(f"majority_at_k: k must lie in 1..{n}, the number of answers, not {k}.")
    if ties not in ("expected", "first"):
        raise InputError(f"majority_at_k: ties must be 'expected' or 'first', not {ties!r}.")
    right = {gold} if isinstance(gold, str) else set(gold)
    votes = [_vote([answers[i] for i in subset], right, ties) for subset in _subsets(n, k, draws, seed)]
    return float(np.mean(votes))


def mean_at_k(correct: Sequence[float | None]) -> float:
    """The mean accuracy of the k samples of one prompt: an estimate of pass@1. Samples without a score (None, NaN) are
    left out.
    """
    values = _scored(correct)
    return float(values.mean()) if values.size else math.nan


def bootstrap_ci(
    per_prompt_values: Sequence[float], level: float = 0.95, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over prompts (Efron 1979): prompts are resampled, never single
    completions.

    Prompts without a value (NaN) are left out; with none left the interval is (NaN, NaN).
    """
    if not 0 < level < 1:
        raise InputError(f"bootstrap_ci: level must lie between 0 and 1, not {level}.")
    values = _scored(per_prompt_values)
    if not values.size:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(values.size, size=values.size)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _subsets(n: int, k: int, draws: int, seed: int):
    if math.comb(n, k) <= draws:
        return itertools.combinations(range(n), k)
    rng = np.random.default_rng(seed)
    return (np.sort(rng.choice(n, size=k, replace=False)) for _ in range(draws))  # sorted: "first" is the order sampled


def _vote(answers: Sequence[str | None], right: set[str], ties: str) -> float:
    counts = Counter(answer for answer in answers if answer)  # in the order in which the answers are first seen
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    if ties == "first":
        winners = winners[:1]
    return sum(winner in right for winner in winners) / len(winners) if winners else 0.0


def _scored(values: Sequence[float | None]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)  # None becomes NaN
    return values[~np.isnan(values)]
