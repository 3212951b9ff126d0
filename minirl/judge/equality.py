r"""Compare two answers by math-verify; an optional adapter, whose functions are called in the pool.

math-verify reads LaTeX in a \boxed{} or between dollars, and elsewhere only bare numbers: of 2\sqrt{3} in plain text it
reads the 2. So text that is not marked is first put between dollars: a reference answer; the last line of a completion
if it has no words; else each run of symbols in it that is more than arithmetic. In a completion with a box only the box
is read. The last expression is the answer: if it cannot be read, no earlier one takes its place.
"""

import logging
import re
import unicodedata
from fractions import Fraction

from math_verify import parse, verify

from minirl.judge.boxed import answer_boxes, box_count
from minirl.judge.latex import to_plain_text
from minirl.judge.numbers import is_changed, reference_number, whole_number
from minirl.thoughts import after_thoughts

for name in ("parser", "grader"):  # otherwise each call logs that the timeouts are off
    logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)

MARK = re.compile(r"(?<!\\)\$|\\[()\[\]]")
BOLD = re.compile(r"(?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?!\w)")
LEAD = re.compile(r"(?:[-=]*>|[=:→`]|[0-9A-Za-z]\))?[ \t]*")  # -> 7, = 7, a) 7
COMMAND = r"\\(?:text|math|mbox|operatorname|begin|end)[a-z]*\{[^{}\n]*\} | \\[A-Za-z]+ | \\."
SYMBOLS = re.compile(
    rf"(?! [0-9.] [-+*/=.\s0-9]* \Z) (?: {COMMAND} | [^\\A-Za-z] | [A-Za-z](?![A-Za-z]) )*", re.VERBOSE
)
ATOM = rf"""(?: {COMMAND} | [0-9]+ (?: [.,][0-9]+ )*
    | (?<=[0-9]) [^\W\d_]+                                                   # 5km is not 5
    | (?<![^\W\d_]) [^\W\d_] (?![^\W\d_]) | (?<![A-Za-z]) [A-Za-z]++ (?=\()  # x and sqrt(, but no other words
    | [(){{}}^_|√∛²³¹⁰⁴⁵⁶⁷⁸⁹ⁿ½⅓¼¾∞] )"""
RUN = re.compile(
    rf"[-+]? {ATOM} (?: {ATOM} | [ \t]+ (?=\\) {ATOM} | [ \t]* [-+*/=<>^_±×·≤≥,] [ \t]* [-+]? {ATOM} )*", re.VERBOSE
)
ARITHMETIC = re.compile(r"[-+*/=(),.\s0-9]*|[^0-9\\]*|[0-9.,]*\\[%$]")  # math-verify reads it, or there is no number
DIGITS = 12  # after the point, by which math-verify compares roots and the like; it computes 15 digits in all
VULGAR = re.compile("[¼½¾⅐-⅞]")
BASE = re.compile(r"[0-9]_\{?([0-9]+)\}?$")


def is_readable(answer: str) -> bool:
    """Return whether math-verify reads anything in a reference answer."""
    return bool(_parse_answer(answer))


def is_equal(answer: str, completion: str) -> bool:
    """Return whether the last expression of the completion equals the reference answer."""
    marked = _marked(completion)
    if is_changed(answer):
        return _spelled(answer) == _spelled(marked)  # math-verify drops the words of 5\text{ million}
    number = reference_number(answer)
    if number is not None and is_changed(marked):
        return False
    if number is not None and number == reference_number(marked or "none"):
        return True  # also with units that math-verify does not know
    gold, found = _parse_answer(answer), _parse(marked)
    numbers = _number(gold), _number(found)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _base(gold) == _base(found) and verify(gold, found, DIGITS, timeout_seconds=None)


def _spelled(text: str) -> str:
    """Return the letters of an answer without spaces, LaTeX and case, to compare answers with words."""
    boxes = answer_boxes(text)
    return re.sub(r"[\s${}*]", "", to_plain_text(boxes[0].content if boxes else text)).rstrip(".").casefold()


def reading(text: str) -> str | None:
    """Return the last expression of a text as math-verify reads it, None if there is none."""
    found = _last(text)
    return None if found is None else _written(found)


def simplest(text: str) -> str:
    """Return the reading in a form that equal expressions share: √8 as 2√2."""
    return _written(_simplest(_last(text)))


def _written(expression) -> str:
    number = whole_number(str(expression))
    return str(expression) if number is None else str(number)


def _last(text: str):
    """Parse the last expression of a text, None if there is none."""
    parsed = _parse(_marked(text))
    is_equation = bool(parsed) and getattr(parsed[0], "rel_op", None) == "=="
    return (parsed[0].rhs if is_equation else parsed[0]) if parsed else None  # of x = 7 the 7 is compared


def _simplest(expression):
    """Simplify and expand an expression; a matrix, a set, an interval or a tuple part by part."""
    if hasattr(expression, "applyfunc"):
        return expression.applyfunc(_simplest)
    if hasattr(expression, "expand"):
        return expression.simplify().expand()
    parts = getattr(expression, "args", ())
    return expression.func(*map(_simplest, parts)) if parts else expression


def _parse_answer(answer: str) -> list:
    answer = VULGAR.sub(_in_latex, answer)
    return _parse(answer if MARK.search(answer) or box_count(answer) else f"${answer}$")


def _marked(completion: str) -> str:
    """Mark the answer in a completion without its thoughts, so that math-verify reads it right; "" where boxes differ,
    one is not closed, or one is a part of an expression."""
    text = BOLD.sub("", after_thoughts(completion)).replace("°", r"^\circ ").strip()
    text = VULGAR.sub(_in_latex, text)
    if box_count(text):
        boxes = answer_boxes(text)
        return rf"\boxed{{{boxes[0].content}}}" if boxes and boxes[0].content else ""
    marks = list(MARK.finditer(text))
    unmarked = marks[-1].end() if marks else 0
    line = LEAD.match(text, max(unmarked, text.rfind("\n") + 1)).end()
    if line < len(text) and (line > unmarked or not marks) and SYMBOLS.fullmatch(text, line):
        return f"{text[:line]}${text[line:].rstrip('.`')}$"
    return text[:unmarked] + RUN.sub(_in_dollars, text[unmarked:])


def _in_latex(fraction: re.Match) -> str:
    r"""Write ½ as \frac{1}{2}."""
    numerator, _, denominator = unicodedata.normalize("NFKC", fraction[0]).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _in_dollars(run: re.Match) -> str:
    return run[0] if ARITHMETIC.fullmatch(run[0]) else f"${run[0]}$"


def _number(parsed: list) -> Fraction | None:
    """Return the exact value of plain digits, which math-verify rounds; None where it reads anything else."""
    return whole_number(to_plain_text(parsed[-1])) if parsed and isinstance(parsed[-1], str) else None


def _base(parsed: list) -> str | None:
    """Return the base, 2 for 111_2, which math-verify does not read."""
    base = BASE.search(parsed[-1]) if parsed and isinstance(parsed[-1], str) else None
    return base and base[1]


def _parse(text: str) -> list:
    return parse(text, parsing_timeout=None, extraction_mode="first_match")


WARM_UP = (  # comparisons, each of which uses other parts of sympy
    ("(x+1)^2", "x^2+2x+1"),
    ("x=3", "3=y"),
    ("1+2i", "i+3"),
    (r"(1,\pi)", "(1,3)"),
    ("[1,2)", "[1,2]"),
    (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty,-1)"),
    (r"\{1,2\}", r"\{1,x\}"),
    ("x<3", "x>y"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&3\end{pmatrix}"),
    (r"\frac{\sqrt{8}}{3}", r"\frac{2\sqrt{3}}{5}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\log_2 8", "e^{x}"),
    (r"\int x dx", r"\frac{x^2}{2}"),
    (r"\binom{5}{2}", "n!"),
)
for _answer, _other in WARM_UP:  # sympy imports and builds much at its first use, which each fork would repeat
    is_equal(_answer, f"${_other}$")
