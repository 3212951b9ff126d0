"""Thoughts in a completion: what stands in <think>...</think> is no answer."""

OPENING, CLOSING = "<think>", "</think>"


def after_thoughts(completion: str) -> str:
    """The part of a completion that may hold its answer: all behind the last </think>, whose opening may stand in the
    prompt; nothing where thoughts do not end."""
    answer = completion.rpartition(CLOSING)[2]
    return "" if OPENING in answer else answer
