"""Numbers in text: what counts as one, and which one is the answer.

A number is ASCII digits standing free of letters: `7`, `-7`, `1,000`, `0.5`, `.5`, `1/2`; `5-3` ends in 3, not in -3.
Digits of other scripts and digits glued to letters (`5km`, `x2`, `7²`, `1_000`) are not numbers. Scientific notation is
recognised only to be refused: `1e3` is neither 1000 nor 3. Values are exact fractions, so 0.5 = 1/2 and 7.0 = 7, and no
digit is lost in a float.
"""

import re
from fractions import Fraction

MAX_LENGTH = 1000  # characters; beyond 4300 digits Python itself refuses the conversion

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}]) [-−] )?                # a minus after an operand subtracts
    (?<!\w)
    (?>                                            # atomic: 1.5km must not be read as 1
        (?P<value> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
                 | (?<!\.) \.[0-9]+ )              # .5, but not the 5 of ...5
        (?: / (?P<denominator> [0-9]+ ) )?
        (?P<exponent> [eE] [+-]? [0-9]+ )?
    )
    (?!\w)
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Fraction | None:
    """The last number in the text; None if there is none, or if the last one cannot be read (1e3, 1/0)."""
    matches = list(NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def whole_number(text: str) -> Fraction | None:
    """The number that the text consists of, white space around it aside; None if it holds anything else."""
    match = NUMBER.fullmatch(text.strip())
    return _value(match) if match else None


def _value(match: re.Match) -> Fraction | None:
    if match["exponent"] or len(match[0]) > MAX_LENGTH:
        return None
    denominator = int(match["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["value"].replace(",", "")) / denominator
    return -value if match["sign"] else value
