"""Reward rules that read no answer: length, repetition, and a weighted sum that guards a task's own rewards with them.

Each is a plain function `reward(prompts, completions, **columns) -> list[float | None]`; a function with parameters
returns such a reward. Tokens are the sampler's ids where the caller passes a `completion_ids` column, words otherwise.
"""

from collections.abc import Callable, Hashable, Sequence

from minirl.errors import InputError
from minirl.rollout import is_repetitive, ngrams_of, overlong_penalty

Reward = Callable[..., list[float | None]]


def repetition_penalty(tokens: Sequence[Hashable], n: int = 3, penalty: float = -1.0) -> float:
    """Return penalty · (1 − unique / total n-grams), 0 for fewer than n tokens (2502.03373); in [penalty, 0]."""
    ngrams = ngrams_of(tokens, n)
    return penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def repetition(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """Give each completion its `repetition_penalty`, in [−1, 0]."""
    return [repetition_penalty(tokens) for tokens in _tokens(completions, completion_ids)]


def repetitive(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """Give 1 where `is_repetitive` or where the completion is empty, as an empty one must not escape the guards; else
    0."""
    rows = zip(completions, _tokens(completions, completion_ids), strict=True)
    return [float(not completion.strip() or is_repetitive(tokens)) for completion, tokens in rows]


def too_short(prompts, completions, min_words: int = 1, **columns) -> list[float]:
    """Give 1 where the completion has fewer than `min_words` words, else 0; a lone stop token decodes to no word."""
    return [float(len(completion.split()) < min_words) for completion in completions]


def shorter_than(min_words: int) -> Reward:
    """Return `too_short` with another least number of words."""
    if min_words < 1:
        raise InputError(f"too_short: the least number of words must be at least 1, not {min_words}.")
    return lambda prompts, completions, **columns: too_short(prompts, completions, min_words)


def overlong(l_max: int, l_cache: int) -> Reward:
    """Return `overlong_penalty` as a reward, which needs the `completion_ids` column."""
    overlong_penalty([], l_max, l_cache)  # bad parameters are reported now, not at the first step

    def overlong_reward(prompts, completions, completion_ids, **columns) -> list[float]:
        return overlong_penalty([len(ids) for ids in completion_ids], l_max, l_cache).tolist()

    return overlong_reward


def guarded(
    correct: Reward,
    format: Reward,
    repetitive: Reward = repetitive,
    too_short: Reward = too_short,
    w_correct: float = 0.7,
    w_format: float = 0.2,
    p_repeat: float = 0.5,
    p_short: float = 0.3,
) -> dict[str, tuple[float, Reward]]:
    """Return w_correct·correct + w_format·format − p_repeat·repetitive − p_short·too_short as the weighted rewards that
    `rewards.score` takes.

    Each part is a reward in [0, 1]. An empty completion gets both penalties and so the lowest total.
    """
    if w_format > w_correct:
        raise InputError(
            f"guarded: w_format={w_format} exceeds w_correct={w_correct}: the policy would farm the format."
        )
    return {
        "correct": (w_correct, correct),
        "format": (w_format, format),
        "repetitive": (-p_repeat, repetitive),
        "too_short": (-p_short, too_short),
    }


def _tokens(completions, completion_ids) -> Sequence[Sequence[Hashable]]:
    return [completion.lower().split() for completion in completions] if completion_ids is None else completion_ids
