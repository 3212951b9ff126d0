"""Rewards that are rules: right answers, formats, and guards against degenerate text.

Each is a plain function `reward(prompts, completions, **columns) -> list[float | None]`; None means that the completion
cannot be scored (its reference answer is missing). A function with parameters is a factory that returns such a reward.
Tokens are the sampler's ids where the caller passes a `completion_ids` column, words otherwise.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby

import numpy as np

from minirl.errors import InputError
from minirl.rewards.numbers import answer_number, reference_number
from minirl.rewards.thoughts import after_thoughts

Reward = Callable[..., list[float | None]]


def exact_match(prompts, completions, answer, **columns) -> list[float | None]:
    """1 if the completion behind its thoughts is the answer, white space around both aside; else 0. Of true and false
    the case does not count: JSON and Python write them in different ways."""
    texts = [after_thoughts(completion).strip() for completion in completions]
    return [None if a is None else float(_spells(c, a)) for c, a in zip(texts, answer, strict=True)]


def _spells(text: str, answer: object) -> bool:
    return text.casefold() == json.dumps(answer) if isinstance(answer, bool) else text == str(answer).strip()


def last_number(prompts, completions, answer, **columns) -> list[float | None]:
    r"""1 if the number that the completion answers with equals the answer as an exact fraction; else 0. None if the
    answer is no number.

    The number is the last one behind the thoughts, or where there is a box that of the only \boxed{}: see `numbers`.
    """
    golds = [None if a is None else reference_number(a) for a in answer]
    return [None if g is None else float(answer_number(c) == g) for c, g in zip(completions, golds, strict=True)]


def answer_match(prompts, completions, answer=None, **columns) -> list[float | None]:
    """`last_number` where the answer is a number, `exact_match` where it is any other text, None where there is no
    answer.
    """
    if answer is None:
        return [None] * len(completions)
    by_number = last_number(prompts, completions, answer)
    by_text = exact_match(prompts, completions, answer)
    return [text if number is None else number for number, text in zip(by_number, by_text, strict=True)]


def format_match(regex: str) -> Reward:
    """A reward of 1 where the regular expression matches the whole completion (`.` also matches a newline), else 0."""
    try:
        pattern = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise InputError(f"format_match: {regex!r} is not a regular expression ({error}): correct it.") from error

    def format_reward(prompts, completions, **columns) -> list[float]:
        return [float(pattern.fullmatch(completion) is not None) for completion in completions]

    return format_reward


_OTHER = r"(?:(?!</?think>|</?answer>).)*"  # text without any of the four tags, so that each stands exactly once
# The chat templates of reasoning models write the opening <think> into the prompt.
think_answer_format = format_match(rf"\s*+(?:<think>)?{_OTHER}</think>\s*<answer>{_OTHER}</answer>\s*")


def repetition_penalty(tokens: Sequence[Hashable], n: int = 3, penalty: float = -1.0) -> float:
    """penalty · (1 − unique / total n-grams), 0 for fewer than n tokens (2502.03373); in [penalty, 0]."""
    ngrams = _ngrams(tokens, n)
    return penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def is_repetitive(tokens: Sequence[Hashable]) -> bool:
    """Any of three: more than half of the 3-grams repeat earlier ones, a 20-gram occurs more than 3 times (overlaps not
    counted), a token stands more than 50 times in a row. Linear in the tokens.
    """
    trigrams = _ngrams(tokens, 3)
    repeated = len(trigrams) - len(set(trigrams))
    if repeated < 48 and 2 * repeated <= len(trigrams):
        return False  # 51 equal tokens repeat 48 3-grams, four 20-grams 54: most texts need no closer look
    if 2 * repeated > len(trigrams) or any(sum(1 for _ in run) > 50 for _, run in groupby(tokens)):
        return True
    counts, ends = Counter(), {}
    for start, ngram in enumerate(_ngrams(tokens, 20)):
        if start >= ends.get(ngram, 0):
            counts[ngram] += 1
            ends[ngram] = start + 20
    return any(count > 3 for count in counts.values())


def repetition(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """`repetition_penalty` of each completion, in [−1, 0]."""
    return [repetition_penalty(tokens) for tokens in _tokens(completions, completion_ids)]


def repetitive(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """1 where `is_repetitive`, or where the completion is empty: silence must not be the cheap way around the guards.
    Else 0.
    """
    rows = zip(completions, _tokens(completions, completion_ids), strict=True)
    return [float(not completion.strip() or is_repetitive(tokens)) for completion, tokens in rows]


def too_short(prompts, completions, min_words: int = 1, **columns) -> list[float]:
    """1 where the completion has fewer than `min_words` words, else 0; a lone stop token decodes to no word."""
    return [float(len(completion.split()) < min_words) for completion in completions]


def shorter_than(min_words: int) -> Reward:
    """`too_short` with another least number of words."""
    if min_words < 1:
        raise InputError(f"too_short: the least number of words must be at least 1, not {min_words}.")
    return lambda prompts, completions, **columns: too_short(prompts, completions, min_words)


def overlong_penalty(lengths, l_max: int, l_cache: int) -> np.ndarray:
    """DAPO's soft overlong punishment (2503.14476 eq. 13) for completions of n tokens, to be added to a rule reward of
    ±1; a reward of 0 and 1 has half of that range, and takes half of it.

    0 for n ≤ l_max − l_cache; ((l_max − l_cache) − n) / l_cache up to l_max; −1 beyond.
    """
    if not 0 < l_cache <= l_max:
        raise InputError(f"overlong_penalty: l_cache must lie in 1..l_max, but l_cache={l_cache} and l_max={l_max}.")
    lengths = np.asarray(lengths, dtype=np.float64)
    return np.clip((l_max - l_cache - lengths) / l_cache, -1.0, 0.0)


def overlong(l_max: int, l_cache: int) -> Reward:
    """`overlong_penalty` as a reward, to be weighted with half of what being right pays; it needs the `completion_ids`
    column."""
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
    """w_correct·correct + w_format·format − p_repeat·repetitive − p_short·too_short, as the weighted rewards that
    `score` takes.

    Each part is a reward in [0, 1]. An empty completion takes both penalties and so scores the minimum.
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


def _ngrams(tokens, n: int) -> list[tuple]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
