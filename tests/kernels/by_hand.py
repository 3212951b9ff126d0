"""Sampling by hand, for the tests of the kernel and of the sampler. It needs torch and numpy alone, as those do."""

from collections.abc import Sequence

import numpy as np
import torch


def uniform_by_hand(seed: int, sample: int, position: int) -> float:
    """Three rounds of splitmix64 on Python's integers."""
    key, whole = 0, 1 << 64
    for part in (seed, sample, position):
        key = (key + (part + 1) * 0x9E3779B97F4A7C15) % whole
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % whole
        key = (key ^ key >> 27) * 0x94D049BB133111EB % whole
        key ^= key >> 31
    return (key >> 11) / 2**53


def kept_by_hand(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The ids that top-k, then top-p of what is left, then min-p leave, of equal logits those of smaller ids first; by
    one sort."""
    order = np.lexsort((np.arange(len(logits)), -logits))[: top_k or None]
    weights = np.exp(logits[order] - logits.max())
    before = np.cumsum(weights) - weights
    inside = (before < top_p * weights.sum()) | (top_p == 1)
    return np.sort(order[inside & (weights >= min_p)])


def chi_square(tokens: Sequence[int], probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * len(tokens)
    return ((torch.tensor(tokens).bincount(minlength=len(expected)) - expected).square() / expected).sum().item()


LIMIT_49 = 85.35  # chi-square with 49 degrees of freedom exceeds it once in a thousand
