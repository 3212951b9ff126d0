"""Leave out the thoughts of a completion: nothing in <think>...</think> is an answer."""

OPENING, CLOSING = "<think>", "</think>"


def after_thoughts(completion: str) -> str:
    """Return the part of a completion that may contain its answer: the text after the last </think>, or "" where
    thoughts do not end. A </think> counts without its <think>, which may be in the prompt."""
    answer = completion.rpartition(CLOSING)[2]
    return "" if OPENING in answer else answer
