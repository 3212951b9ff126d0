r"""Numbers in text: what counts as one, and which one is the answer.

A number is ASCII digits standing free of letters: `7`, `-7`, `+7`, `1,000`, `0.5`, `.5`, `1/2`, and in LaTeX also
`\frac{1}{2}`, `12{,}000`, `12\,000` and `12,\!000`. What stands around it is a unit: `$7` is 7, `50%` is 50, `90^\circ`
is 90. Digits of other scripts and digits glued to letters (`5km`, `7th`, `x2`, `7²`, `1_000`) are not numbers. Some are
recognised only to be refused: `1e3` is neither 1000 nor 3, and in `2**3`, `x^2`, `x_{2}`, `7//2`, `6/2/3`, `x/7`,
`7/x`, `7!`, `\sqrt{7}`, `7\pi`, `-(7)`, `±7` and `≠ 7` the last number is no answer. Values are exact fractions, so
0.5 = 1/2 and 7.0 = 7, and no digit is lost in a float.

A minus is the number's sign, also before a currency (`-$7`), unless an operand stands right before it: `5-3` ends in 3.
With a space after it, it is the sign behind `=`, `:`, `is`, an opening bracket or dollar (`x = - 7`), but subtracts
after an operand (`5 - 7` ends in 7); elsewhere, as in a line `- 7`, it may be a bullet, so there is no answer.

The answer of a text is what stands in its only \boxed{}, and no other number may be the text's last one; without a box
it is the last number. A box holds one number, with nothing else than `name =` before it, units, and \text{} without
digits: no operator, bracket, other command, or single letter. A text with several boxes has no answer.
"""

import math
import re
from fractions import Fraction

from minirl.rewards.boxed import BOX, last_box
from minirl.rewards.latex import plain

MAX_LENGTH = 1000  # characters; beyond 4300 digits Python itself refuses the conversion
WINDOW = 4096  # characters at the end of a text that are read first

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}]) [-−–－﹣‐‑] (?P<gap> [ \t]? (?: [$€£¥] [ \t]? )? ) )?
    (?<!\w)
    (?>                                            # atomic: 1.5km must not be read as 1
        (?P<value> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
                 | (?<!\.) \.[0-9]+ )              # .5, but not the 5 of ...5
        (?: / (?P<denominator> [0-9]+ (?: \.[0-9]+ )? ) )?
        (?P<exponent> [eE] [+-]? [0-9]+ )?
    )
    (?P<glued> \w+ )?                              # then it is none; a second look at its parts would take n² steps
    """,
    re.VERBOSE,
)
OPERATOR_BEFORE = re.compile(
    r"""
    (?: [\^_] \s* \{? | // | [\w)\]}] \s* / | \} \s* \{
      | (?: [0-9)\]}] | \b[A-Za-z] ) \*\* | [0-9)\]}] \s+ \*\* \s     # any other ** may be the start of bold type
      | (?: \\[A-Za-z]+ | \b(?:sqrt|log|ln|exp|sin|cos|tan) ) (?: _\{?\w+\}? )? [\s{(]*
      | (?: ^ | [^\w)\]}\s] ) \s* [-−–－﹣‐‑] \s* [({\[|]+ \s*
      | (?<![\w)\]}]) [-−–] | [⁻±∓≠] | !=
    ) \s* $
    """,
    re.VERBOSE,
)
OPERATOR_AFTER = re.compile(
    r"[ \t]*(?:\^|//|\\[A-Za-z]|[π√∞]|/[ \t]*(?:[A-Za-z](?![A-Za-z])|[({\\]))|!|\}\s*\{|\*\*[\w(]"
)
IS_SIGN = re.compile(r"(?:[=:≈⇒({\[<>≤≥][ \t]*|\bis[ \t]*|\$)$")
SUBTRACTS = re.compile(r"[\w)\]}%°$!][ \t]*$")
AROUND_BOX = re.compile(r"(?:[-−^_/]|(?:\^|\\sqrt)\{)$")  # -\boxed{7} is not 7
IN_BOX = re.compile(  # before and after the number, whose place is the #
    r"[\s${]*(?:(?:[A-Za-z][\w{}()'= ]*)?[=:≈])?[\s${€£¥+]*"
    r"#[\s}$%€£¥.]*(?:°[CF]?[\s}$.]*)?(?:(?!pi\b)[A-Za-z]{2,}(?![A-Za-z])(?:/[A-Za-z]++)?[\s}$.]*)*"
)


def answer_number(text: str) -> Fraction | None:
    r"""The number in the only \boxed{}, else the last number of the text; None if there is no such."""
    boxes = [box.start() for box in BOX.finditer(text)]
    if not boxes:
        return last_number(text)
    box, end = last_box(text)
    if len(boxes) > 1 or box is None or AROUND_BOX.search(text[max(0, boxes[0] - 8) : boxes[0]]):
        return None
    value, last = _only_number(box), _last(text[end:])
    return value if last is None or _signed(last) == value else None


def last_number(text: str) -> Fraction | None:
    """The last number in the text; None if there is none, or if the last one cannot be read (1e3, 1/0)."""
    match = _last(text)
    return _signed(match) if match else None


def whole_number(text: str) -> Fraction | None:
    """The number that the text consists of, white space around it aside; None if it holds anything else."""
    match = NUMBER.fullmatch(text.strip())
    return _value(match) if match and not match["glued"] else None


def reference_number(answer) -> Fraction | None:
    """The number that a reference answer is; a float, which Python may write as 1e-05, counts as its decimal digits."""
    if isinstance(answer, float):
        return Fraction(str(answer)) if math.isfinite(answer) else None
    return whole_number(str(answer))


def _last(text: str) -> re.Match | None:
    """The last number, readable or not: first sought in the last lines, as long texts are many."""
    for start in dict.fromkeys((text.rfind("\n", 0, max(0, len(text) - WINDOW)) + 1, 0)):
        last = None
        for match in NUMBER.finditer(plain(text[start:])):
            last = last if match["glued"] else match
        if last:
            return last
    return None


def _only_number(box: str) -> Fraction | None:
    if len(box) > MAX_LENGTH:
        return None
    box = plain(box)
    found = [match for match in NUMBER.finditer(box) if not match["glued"]]
    if len(found) != 1 or "#" in box:
        return None
    return _value(found[0]) if IN_BOX.fullmatch(f"{box[: found[0].start()]}#{box[found[0].end() :]}") else None


def _signed(match: re.Match) -> Fraction | None:
    """The value of a number in a text; None also where it is open what a minus before it means."""
    value = _value(match)
    if value is None or not match["sign"] or not match["gap"][:1].isspace():
        return value
    before = _before(match).rpartition("\n")[2]
    if IS_SIGN.search(before):
        return value
    return -value if SUBTRACTS.search(before) else None


def _value(match: re.Match) -> Fraction | None:
    operand = OPERATOR_BEFORE.search(_before(match)) or OPERATOR_AFTER.match(match.string, match.end())
    if operand or match["exponent"] or len(match[0]) > MAX_LENGTH:
        return None
    denominator = Fraction(match["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["value"].replace(",", "")) / denominator
    return -value if match["sign"] else value


def _before(match: re.Match) -> str:
    return match.string[max(0, match.start() - 48) : match.start()]
