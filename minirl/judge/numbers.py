r"""Read numbers in text: what counts as one, and which one is the answer.

A number is ASCII digits apart from letters: `7`, `-7`, `+7`, `1,000`, `0.5`, `.5`, `1/2`, `1 / 2`, and in LaTeX also
`\frac{1}{2}`, `12{,}000`, `12\,000` and `12,\!000`. A unit beside it is ignored: `$7` is 7, `50%` is 50, `90^\circ` is
90, `7 cm^2` is 7. Digits of other scripts and digits glued to letters (`5km`, `7th`, `x2`, `7²`, `1_000`) are not
numbers. Some forms are recognised as a whole only to be refused: `1e3`, `0,5`, `1 000`, `1 1/2`, `7:00`, `1.2.3` and
`2024-05-07`; a list has spaces after its commas: `1, 2` ends in 2. In `2**3`, `x^2`, `x_{2}`, `7//2`, `6/2/3`, `3*4/5`,
`x/7`, `7/x`, `7!`, `\sqrt{7}`, `√7`, `7\pi`, `-(7)`, `±7` and `≠ 7` the last number is no answer; nor is one beside
words that change its value: `7 million`, `7 and a half`, `7 squared`, `minus 7`. But where a word, a number and `!` end
a line or sentence, `!` is punctuation: `It is 7!`. Values are exact fractions: 0.5 = 1/2, 7.0 = 7.

A minus is the number's sign, also before a currency (`-$7`), unless an operand is directly before it: `5-3` ends in 3.
With a space after it, it is the sign behind `=`, `:`, `is` and an opening bracket (`x = - 7`), but subtracts after an
operand: a digit, closing bracket, single letter, `%`, `°`, `5!` (`5 - 7` ends in 7); elsewhere it may be a bullet or a
dash (`- 7`, `gives - 7`), so there is no answer. Behind the odd dollars of a line, which open formulas, it is a sign
if no operand touches them; behind the even ones it subtracts if one does (`$5$ - 7`); else there is no answer.

The answer of a text is the number in its only \boxed{}, which must have no operator beside it, and no other number may
be the text's last one. Without a box it is the last number. Several boxes are one answer if they are equal, else none;
thoughts are left out (see `after_thoughts`). A box has one number, also in parentheses, with at most `name =` before
it, units and \text{} without digits: no operator, other bracket or command, or single letter. A reference answer is
read as a box is: `$18`, `\frac{1}{2}`, `18.` and `3 apples` are numbers. `2 Samuel` is none, as units there have small
letters, except currencies and a few others; `The answer is`, bold type and \[ \] around it are ignored.
"""

import math
import re
from fractions import Fraction

from minirl.judge.boxed import BOX, answer_boxes
from minirl.judge.latex import CHANGED_AFTER, CHANGED_BEFORE, to_plain_text
from minirl.thoughts import after_thoughts

MAX_LENGTH = 1000  # characters of a number; beyond 4300 digits Python itself refuses the conversion
WINDOW = 4096  # characters at the end of a text that are read first

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}%°]) [-−–－﹣‐‑] (?P<gap> [ \t]? (?: [$€£¥¤] [ \t]? )? ) )?
    (?<!\w)
    (?>                                            # atomic: 1.5km must not be read as 1
        (?: [0-9]{1,3} (?:[ \u00a0\u2009\u202f][0-9]{3})+ (?![0-9])    # 1 000
          | [0-9]{4} (?:-[0-9]{2}){2} (?![0-9])                        # 2024-05-07
          | (?P<value> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
                     | (?<!\.) \.[0-9]+ )          # .5, but not the 5 of ...5
            (?: [ \t]? / [ \t]? (?P<denominator> [0-9]+ (?: \.[0-9]+ )? ) )? )
        (?P<more> [eE][+-]?[0-9]+ | [ \u00a0\u2009\u202f][0-9]+/[0-9]+ )?      # 1e3, 1 1/2
    )
    (?P<glued> \w+ )?                              # then it is no number; a search inside of it would take n² time
    """,
    re.VERBOSE,
)
OPERATOR_BEFORE = re.compile(
    r"""
    (?: [\^_] \s* \{? | // | [\w)\]}] \s* / | \} \s* \{
      | (?: [0-9)\]}] | \b[A-Za-z] ) \*\* | [0-9)\]}] \s+ \*\* \s     # any other ** may be the start of bold type
      | (?: \\[A-Za-z]+ | \b(?:sqrt|log|ln|exp|sin|cos|tan) | [√∛∜] ) (?: _\{?\w+\}? )? [\s{(]*
      | (?: ^ | [^\w)\]}\s] ) \s* [-−–－﹣‐‑] \s* [({\[|]+ \s*
      | (?<![\w)\]}%°]) [-−–] | [⁻±∓≠] | !=
    ) \s* $ | [0-9][,.:] $                         # 0,5, 7:00
    """,
    re.VERBOSE,
)
OPERATOR_AFTER = re.compile(
    r"[ \t]*(?:\^|//|\\[A-Za-z]|[π√∛∜∞]|/[ \t]*(?:[A-Za-z](?![A-Za-z])|[({\\]))|\}\s*\{|\*\*[\w(]"
    r"|[,.:][0-9]|!++(?![*\"]*(?:\s*\Z|[ \t]*\n|\s+[A-Z*]))"
)
FACTOR_BEFORE = re.compile(r"(?:[0-9)\]}]\s*\*|[×·]|[0-9]\s+and)\s*$")  # 3*4/5 is not 4/5, nor is 3 and 4/5
WORD_BEFORE = re.compile(r"[A-Za-z]{2}:?[ \t]+[*$€£¥¤]*$")
IS_SIGN = re.compile(r"(?:[=:≈⇒({\[<>≤≥]|\bis)[ \t]*$")
OPERAND = re.compile(r"(?:[0-9²³)\]}%°]|[0-9]!|\b[A-Za-z])\$*[ \t]*$")
IN_BOX = re.compile(  # the text around the number in a box; # stands for the number
    r"[\s${]*(?:(?:[A-Za-z][\w{}()'= ]*)?[=:≈])?[\s${€£¥¤+]*(?:#|\(\s*#\s*\))"
    r"[\s}$%€£¥¤.]*(?:°\s*[CF]?[\s}$.]*)?(?:(?!pi\b)[A-Za-z]{2,}(?![A-Za-z])(?:/[A-Za-z]++)?[\s}$.]*)*"
)

NAME = re.compile(  # a reference answer with a name in it is not a number with its unit
    r"(?<![\\A-Za-z])(?!(?:USD|EUR|GBP|JPY|CNY|INR|AUD|CAD|CHF"
    r"|(?:Year|Month|Week|Day|Hour|Minute|Second|Dollar|Cent|Euro|Pound|Meter|Metre|Mile)s?)\b)"
    r"[A-Z][A-Za-z]|[A-Za-z]\s*:"
)
SAID = re.compile(
    r"(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is|:)\s+)?(?:\*\*(.*)\*\*|\\\[(.*)\\\]|(.*))", re.DOTALL | re.I
)


def answer_number(text: str) -> Fraction | None:
    r"""Return the number in the only \boxed{}, else the last number of the text behind its thoughts; None if there is
    none."""
    text = after_thoughts(text)
    if not BOX.search(text):
        return last_number(text)
    boxes = answer_boxes(text)
    if not boxes:
        return None
    value, last = _only_number(boxes[0].content), _last(text[boxes[-1].end :])
    return value if last is None or _signed(last) == value else None


def last_number(text: str) -> Fraction | None:
    """Return the last number in the text; None if there is none, or if the last one cannot be read (1e3, 1/0)."""
    match = _last(text)
    return _signed(match) if match else None


def is_changed(text: str) -> bool:
    """Return whether words beside the last number of the text change its value: 7 million, 7 and a half, minus 7."""
    match = _last(text)
    return match is not None and _is_changed(match)


def whole_number(text: str) -> Fraction | None:
    """Return the number that is the whole text apart from white space; None if there is anything else."""
    match = NUMBER.fullmatch(text.strip())
    return _value(match) if match and not match["glued"] else None


def reference_number(answer) -> Fraction | None:
    r"""Return the number that a reference answer is, also with a unit, in LaTeX or in its only \boxed{}, else None; a
    float, which Python may write as 1e-05, is read by its decimal digits."""
    if isinstance(answer, float):
        return Fraction(str(answer)) if math.isfinite(answer) else None
    text = str(answer)
    if BOX.search(text):
        return answer_number(text)
    said = SAID.fullmatch(text.strip().removesuffix("."))
    text = next((part for part in said.groups() if part), text)
    number = whole_number(text)
    return _only_number(text) if number is None and not NAME.search(text) else number


def _last(text: str) -> re.Match | None:
    """Return the last number, readable or not. The last lines are searched first, as most texts are long and end in
    their number."""
    for start in dict.fromkeys((text.rfind("\n", 0, max(0, len(text) - WINDOW)) + 1, 0)):
        last = None
        for match in NUMBER.finditer(to_plain_text(text[start:])):
            last = last if match["glued"] else match
        if last:
            return last
    return None


def _only_number(box: str) -> Fraction | None:
    """Return the number of a box, None if it has several or anything else than a name and units beside it."""
    if len(box) > MAX_LENGTH:
        return None
    box = to_plain_text(box)
    found = [match for match in NUMBER.finditer(box) if not match["glued"]]
    if len(found) != 1 or "#" in box:
        return None
    return _value(found[0]) if IN_BOX.fullmatch(f"{box[: found[0].start()]}#{box[found[0].end() :]}") else None


def _signed(match: re.Match) -> Fraction | None:
    """Return the value of a number in a text; None also where the meaning of a minus before it is unclear."""
    value = _value(match)
    line = match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.start()].rstrip(" \t")
    if value is None or not match["sign"] or not (match["gap"][:1].isspace() or line.endswith("$")):
        return value
    is_sign = len(re.findall(r"\$+", line)) % 2 if line.endswith("$") else IS_SIGN.search(line[-48:])
    if bool(is_sign) == bool(OPERAND.search(line[-48:])):
        return None
    return value if is_sign else -value


def _is_changed(match: re.Match) -> bool:
    before = match.string[max(0, match.start() - 48) : match.start()]
    return bool(CHANGED_BEFORE.search(before) or CHANGED_AFTER.match(match.string, match.end()))


def _value(match: re.Match) -> Fraction | None:
    """Return the value of a number with its sign; None for a refused form, or beside an operator or a changing word."""
    if match["value"] is None or match["more"] or len(match[0]) > MAX_LENGTH:
        return None
    before, end = match.string[max(0, match.start() - 48) : match.start()], match.end()
    if OPERATOR_BEFORE.search(before) or OPERATOR_AFTER.match(match.string, end) or _is_changed(match):
        return None
    is_factorial = match.string.startswith("!", end) and not WORD_BEFORE.search(before)
    denominator = Fraction(match["denominator"] or 1)
    if is_factorial or denominator == 0 or (match["denominator"] and FACTOR_BEFORE.search(before)):
        return None
    value = Fraction(match["value"].replace(",", "")) / denominator
    return -value if match["sign"] else value
