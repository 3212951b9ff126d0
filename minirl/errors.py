"""Errors that a user can make, said in one sentence."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 500  # characters of an exception's message


class InputError(ValueError):
    """Input from outside that cannot be used: a file, a key, a value, a reward function's result.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it alone and
    exits with code 2; in Python it is an ordinary ValueError.
    """


class NoChatTemplate(InputError):
    """Chat messages, for a tokenizer that has no template for them."""


class NonFinite(InputError):
    """A loss, a gradient or weights with NaN or infinity."""


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put a place before the sentence of an InputError that passes through."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def told(error: BaseException) -> str:
    """Return what an exception says, whatever its __str__ does and however much it is."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be shown"
    return f"{type(error).__name__}: {message[:LONGEST]}{'…' * (len(message) > LONGEST)}"


def did_you_mean(word: str, choices) -> str:
    """Return " (did you mean 'sum'?)" for an error message, or "" where no choice is close."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
