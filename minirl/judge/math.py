"""Compare mathematical answers (numbers, fractions, LaTeX) by math-verify.

math-verify guards itself with signals, which work only in the main thread, and still gives `9**9**9**9` to sympy. Here
its own timeouts are off and `equality.py` is called in the pool, which kills what takes too long.
"""

import functools
import importlib.util
from decimal import Decimal

from minirl.errors import InputError
from minirl.judge.numbers import reference_number, whole_number
from minirl.judge.pool import call_each

SECONDS = 5.0  # for one completion, and for reading one reference answer

_readable: dict[str, bool] = {}  # reference answer -> whether it can be read
_votes: dict[str, str] = {}  # reading -> vote, so that equal readings vote alike even if one takes too long to simplify


def math_match(prompts, completions, answer, **columns) -> list[float | Exception | None]:
    r"""Give 1 if the completion's last mathematical expression equals the answer, else 0; None if the answer itself
    cannot be read.

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
def math_vote(text: str) -> str | None:
    r"""Return the text's answer as a vote: math-verify's reading of its last expression, simplified, so that \sqrt{8}
    and 2\sqrt{2} vote together; the reading itself where simplifying fails or takes longer than `SECONDS`. None if
    there is no expression, or boxes that differ."""
    (reading,) = _calls("reading", [(text,)])
    if reading is None or isinstance(reading, Exception):
        return None
    if reading not in _votes:
        simplest = reading if whole_number(reading) is not None else _calls("simplest", [(text,)])[0]
        _votes[reading] = simplest if isinstance(simplest, str) else reading
    return _votes[reading]


def answer_text(answer) -> str:
    """Write an answer without the exponent that Python may use for a float: 1e-05 would be read as 1·e − 5."""
    return f"{Decimal(str(answer)):f}" if isinstance(answer, float) else str(answer)


def _gold(answer) -> str:
    """Return the reference as math-verify can read it: a number without its unit or a final point, as 4/5 for
    `4/5 cups`; but 50% stays, as it is also 1/2."""
    text = answer_text(answer)
    number = None if "%" in text else reference_number(text)
    return text if number is None else str(number)


def _calls(name: str, arguments: list[tuple]) -> list:
    """Call a function of `equality` in the pool; math-verify raises on some texts, which then are no answer."""
    if importlib.util.find_spec("math_verify") is None:
        message = "reward 'math' needs the package math-verify: install it with `pip install 'minirl[math]'`."
        raise InputError(message)
    return call_each(f"minirl.judge.equality:{name}", arguments, SECONDS)
