"""Mathematical equality of answers by math-verify (numbers, fractions, LaTeX).

math-verify guards itself with signals, which work only in the main thread, and still hands `9**9**9**9` to sympy. Here
its own timeouts are off and `equality.py` is called in the sandbox, which ends what takes too long.
"""

import functools
import importlib.util
from decimal import Decimal

from minirl.errors import InputError
from minirl.rewards.numbers import reference_number, whole_number
from minirl.sandbox import call_each

SECONDS = 5.0  # for one completion, and for reading one reference answer

_readable: dict[str, bool] = {}  # the reference answers that were read, and whether they could be
_votes: dict[str, str] = {}  # by reading: two of one reading never part, not even where the second takes too long


def math_match(prompts, completions, answer, **columns) -> list[float | Exception | None]:
    r"""1 if the completion's last mathematical expression equals the answer, else 0; None if the answer itself cannot
    be read.

    Boxes that differ are an attempt to answer several times and score 0; a comparison that takes longer than
    `SECONDS` is a TimeoutError, which counts as 0.
    """
    golds = [None if a is None else _gold(a) for a in answer]
    unknown = [gold for gold in dict.fromkeys(golds) if gold is not None and gold not in _readable]
    verdicts = zip(unknown, _calls("is_readable", [(gold,) for gold in unknown]), strict=True)
    _readable.update((gold, verdict) for gold, verdict in verdicts if isinstance(verdict, bool))
    rows = [i for i, gold in enumerate(golds) if _readable.get(gold) is True]
    scores: list[float | Exception | None] = [None] * len(golds)
    for i, equal in zip(rows, _calls("is_equal", [(golds[i], completions[i]) for i in rows]), strict=True):
        scores[i] = equal if isinstance(equal, TimeoutError) else float(equal is True)
    return scores


@functools.lru_cache(1 << 16)
def math_answer(text: str) -> str | None:
    r"""The text's answer as a vote: math-verify's reading of its last expression, simplified, so that \sqrt{8} and
    2\sqrt{2} vote together; as it was read where that fails or takes longer than `SECONDS`. None if there is none, or
    boxes that differ."""
    (reading,) = _calls("reading", [(text,)])
    if reading is None or isinstance(reading, Exception):
        return None
    if reading not in _votes:
        simplest = reading if whole_number(reading) is not None else _calls("simplest", [(text,)])[0]
        _votes[reading] = simplest if isinstance(simplest, str) else reading
    return _votes[reading]


def answer_text(answer) -> str:
    """A float without the exponent that Python may write: 1e-05 would be read as 1·e − 5."""
    return f"{Decimal(str(answer)):f}" if isinstance(answer, float) else str(answer)


def _gold(answer) -> str:
    """The reference as math-verify reads it: a number without its unit or its sentence's point, 4/5 of `4/5 cups`; but
    50% stays, which is also 1/2."""
    text = answer_text(answer)
    number = None if "%" in text else reference_number(text)
    return text if number is None else str(number)


def _calls(name: str, arguments: list[tuple]) -> list:
    """math-verify fails on some texts; to it they are no answer."""
    if importlib.util.find_spec("math_verify") is None:
        message = "reward 'math' needs the package math-verify: install it with `pip install 'minirl[math]'`."
        raise InputError(message)
    return call_each(f"minirl.rewards.equality:{name}", arguments, SECONDS)
