r"""Numbers in text: what counts as one, and which one is the answer.

A number is ASCII digits standing free of letters: `7`, `-7`, `+7`, `1,000`, `0.5`, `.5`, `1/2`; `5-3` ends in 3, not in
-3. What stands around it is a unit: `$7` is 7, `50%` is 50. Digits of other scripts and digits glued to letters (`5km`,
`x2`, `7²`, `1_000`) are not numbers. Some are recognised only to be refused: `1e3` is neither 1000 nor 3, and in
`2**3`, `x^2`, `7//2`, `6/2/3`, `x/7`, `±7` and `≠ 7` the last number is no answer. Values are exact fractions, so
0.5 = 1/2 and 7.0 = 7, and no digit is lost in a float.

The answer of a text is what stands in its only \boxed{}, exactly one number, and no other number may be the text's last
one; without a box it is the last number. A text with several boxes has no answer.
"""

import re
from fractions import Fraction

from minirl.rewards.boxed import box_count, last_box

MAX_LENGTH = 1000  # characters; beyond 4300 digits Python itself refuses the conversion
WINDOW = 4096  # characters of a piece

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}]) [-−–] )?               # a minus after an operand subtracts
    (?<!\w)
    (?>                                            # atomic: 1.5km must not be read as 1
        (?P<value> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
                 | (?<!\.) \.[0-9]+ )              # .5, but not the 5 of ...5
        (?: / (?P<denominator> [0-9]+ ) )?
        (?P<exponent> [eE] [+-]? [0-9]+ )?
    )
    (?P<glued> \w+ )?                              # then it is none; a second look at its parts would take n² steps
    """,
    re.VERBOSE,
)
OPERATOR_BEFORE = re.compile(
    r"""
    (?: \^ \s* \{? | // | [\w)\]}] \s* /
      | (?: [0-9)\]}] | \b[A-Za-z] ) \*\* | [0-9)\]}] \s+ \*\* \s     # any other ** may be the start of bold type
      | [±∓≠] | \\pm | \\mp | \\neq? | !=
    ) \s* $
    """,
    re.VERBOSE,
)
OPERATOR_AFTER = re.compile(r"\s*(?:\^|//)|\*\*[\w(]")
LATEX = [  # in a box: fractions, thousands separators and text around the number
    (re.compile(r"(?<=\w)\s*(?=\\[dt]?frac)"), " "),  # 3\frac{1}{2} is not 31/2
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2 "),
    (re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])"), r"\1/\2 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])\\[,!]\s*(?=[0-9])"), ""),
    (re.compile(r"\\(?:pm|mp|neq?)(?![A-Za-z])"), "±"),
    (re.compile(r"\\[A-Za-z]+|\\."), " "),
]


def answer_number(text: str) -> Fraction | None:
    r"""The number in the only \boxed{}, else the last number of the text; None if there is no such."""
    boxes = box_count(text)
    if boxes == 0:
        return last_number(text)
    box, end = last_box(text)
    value = _only_number(box) if boxes == 1 and box is not None else None
    rest = text[end:]
    return value if value is not None and (_last(rest) is None or last_number(rest) == value) else None


def last_number(text: str) -> Fraction | None:
    """The last number in the text; None if there is none, or if the last one cannot be read (1e3, 1/0)."""
    match = _last(text)
    return _value(match) if match else None


def whole_number(text: str) -> Fraction | None:
    """The number that the text consists of, white space around it aside; None if it holds anything else."""
    match = NUMBER.fullmatch(text.strip())
    return _value(match) if match and not match["glued"] else None


def _last(text: str) -> re.Match | None:
    """The last number, readable or not; from the end in pieces, cut where there is white space, so in no number."""
    end = len(text)
    while end > 0:
        start = max(text.rfind(blank, 0, max(0, end - WINDOW)) for blank in " \n\t") + 1
        last = None
        for match in NUMBER.finditer(text, start, end):
            last = last if match["glued"] else match
        if last:
            return last
        end = start
    return None


def _only_number(box: str) -> Fraction | None:
    if len(box) > MAX_LENGTH:
        return None
    for pattern, plain in LATEX:
        box = pattern.sub(plain, box)
    found = [match for match in NUMBER.finditer(box) if not match["glued"]]
    return _value(found[0]) if len(found) == 1 else None


def _value(match: re.Match) -> Fraction | None:
    before = match.string[max(0, match.start() - 16) : match.start()]
    operand = OPERATOR_BEFORE.search(before) or OPERATOR_AFTER.match(match.string, match.end())
    if operand or match["exponent"] or len(match[0]) > MAX_LENGTH:
        return None
    denominator = int(match["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["value"].replace(",", "")) / denominator
    return -value if match["sign"] else value
