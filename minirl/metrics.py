"""Metrics of sampled answers: pass@k, maj@k and mean@k, with confidence intervals over prompts."""

import itertools
import math
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np

from minirl.errors import InputError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k samples is right, from n samples of which c are
    right (Chen et al. 2107.03374, eq. 1).

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
    """Return the chance that the most frequent of k answers is right (self-consistency, Wang et al. 2203.11171; maj@k,
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
    values = list(dict.fromkeys(answer for answer in answers if answer))  # U different ones
    if not values:
        return 0.0
    given = np.array([[answer == value for value in values] for answer in answers])  # [n, U]
    chosen = _subsets(n, k, draws, seed)  # [S, n]
    counts = chosen @ given.astype(chosen.dtype)  # [S, U] votes
    winners = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    if ties == "first":
        place = (chosen[:, :, None].astype(bool) & given).argmax(1)  # [S, U], where an answer is given first
        place = np.where(winners, place, n)  # n: behind all winners
        winners &= place == place.min(1, keepdims=True)
    good = np.array([value in right for value in values])
    return float(((winners & good).sum(1) / winners.sum(1).clip(1)).mean())


def mean_at_k(correct: Sequence[float | None]) -> float:
    """Return the mean accuracy of the k samples of one prompt, an estimate of pass@1. Samples without a score (None,
    NaN) do not count; NaN where none has one.
    """
    values = _scored(correct)
    return float(values.mean()) if values.size else math.nan


def bootstrap_ci(
    per_prompt_values: Sequence[float], level: float = 0.95, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over prompts (Efron 1979). Prompts are resampled, never
    single completions, which depend on their prompt.

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


def accuracy_interval(per_prompt_values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return `bootstrap_ci`, or where it would have no width because all values are 0 or all are 1, the exact binomial
    interval over prompts (Clopper & Pearson 1934)."""
    values = _scored(per_prompt_values)
    if not values.size or values.min() != values.max() or values[0] not in (0, 1):
        return bootstrap_ci(values, level)
    width = 1 - ((1 - level) / 2) ** (1 / values.size)
    return (0.0, width) if values[0] == 0 else (1 - width, 1.0)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over prompts of first − second, and the ends of its 95 % bootstrap interval.

    Both were measured on the same prompts, which are resampled as pairs: a prompt's difficulty is in both values and
    cancels, so the interval is narrower than those of the two means. Prompts where either has no value (NaN) are left
    out.
    """
    if len(first) != len(second):
        raise InputError(f"paired_difference: {len(first)} and {len(second)} values: give one a prompt for both.")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return mean_at_k(differences), *bootstrap_ci(differences)


@lru_cache(maxsize=32)
def _subsets(n: int, k: int, draws: int, seed: int) -> np.ndarray:
    """Return [S, n], 1 where an answer is in a subset: all k-subsets, or `draws` random ones if there are more. Every
    prompt may use the same ones, because the answers of different prompts are independent."""
    if math.comb(n, k) <= draws:
        rows = np.array(list(itertools.combinations(range(n), k)))
    else:
        rows = np.random.default_rng(seed).random((draws, n)).argpartition(k - 1, axis=1)[:, :k]
    chosen = np.zeros((len(rows), n), dtype=np.float32)
    np.put_along_axis(chosen, rows, 1, axis=1)
    return chosen


def _scored(values: Sequence[float | None]) -> np.ndarray:
    """Return the values that are numbers, without None and NaN."""
    values = np.asarray(values, dtype=np.float64)  # None becomes NaN
    return values[~np.isnan(values)]


def shown(m: dict[str, float], name: str, digits: str) -> str:
    """Format a metric for a step line; one that was not computed, or is a mean of nothing, as a dash."""
    return "–" if math.isnan(m.get(name, math.nan)) else format(m[name], digits)
