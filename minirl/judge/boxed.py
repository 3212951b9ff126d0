r"""Find \boxed{} in a text: LaTeX's way of marking the answer."""

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from minirl.judge.latex import CHANGED_AFTER, CHANGED_BEFORE, to_plain_text

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
LONGEST = 10_000  # characters in a box
SPACE = re.compile(r"\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
BESIDE = 256  # characters on each side of a box that are read to see whether it is part of an expression
MOST = 1000  # boxes in one text, as each costs a close look
STYLE = re.compile(r"\\(?:text|math|underline|mbox)[a-z]*\s*(?=\{\s*$)")
FACTOR_BEFORE = re.compile(  # in the text as it is written
    r"(?:[0-9²³]|(?<![\\A-Za-z])[A-Za-z]|(?<!\\)[)\]]|\\(?:[dt]?frac|sqrt)\S*\}|[\^_]\{[^{}]*\})(?:\\[,;:! ]|\$)*\(?$"
)
BEFORE = re.compile(  # in plain text, as all below
    r"""
    (?: [-−–－﹣‐‑+/^_√∛∜×·÷±∓⁻≠] | != | (?: [0-9)\]}] | \b[A-Za-z] ) (?: \*+ | \s+\*{1,2}\s+ ) 
      | (?: \\[A-Za-z]+ | \b(?:sqrt|log|ln|exp|sin|cos|tan) ) (?:_\{?\w+\}?)? \s* ) [\s{(\[$|]* $
    | [\w)\]}] \{ \s* $ | \} \s* \{ \s* $
    """,
    re.VERBOSE,
)
AFTER = re.compile(
    r"""
    [0-9²³π½¼¾√∛∜∞] | [A-Za-z](?![A-Za-z]) | [.,:][0-9] | ,[ ]*-?[0-9]
    | [ \t})\]$|]* (?: [\^_+×·÷±²³] | \*[0-9(\\] | \*\*[0-9(] | \*[A-Za-z]\b | [ \t]\*[ \t] | [π√∛∜∞]
      | /[ \t]* (?: [0-9({\\$] | [A-Za-z](?![A-Za-z]) ) | [-−–][ \t]* (?: [0-9({\\$.] | [A-Za-z](?![A-Za-z]) )
      | !++(?! [*"]* (?: \s*\Z | [ \t]*\n | \s+[A-Z*] ) )
      | \\(?! (?:boxed|fbox|blacksquare|square|hfill|tag|qed|checkmark|l?dots|in|sim|equiv|end|big[a-z]*)\b ) [A-Za-z]
      | [,;]?[ \t]*(?:or|and)\b [\s$({]* (?: [-−–]? [0-9] | \\(?!boxed|fbox)[A-Za-z] ) )
    """,
    re.VERBOSE,
)
WORD_BEFORE = re.compile(r"[A-Za-z]{2}:?[ \t]+[*$]*$")  # then "!" is punctuation


class Box(NamedTuple):
    content: str | None  # None where it is not closed
    start: int
    end: int  # -1 where it is not closed


def boxes(text: str) -> Iterator[Box]:
    """Yield all boxes in the order of their beginnings, also one inside of another."""
    for command in BOX.finditer(text):
        content, end = _content(text, command)
        yield Box(content, command.start(), end)


def last_box(text: str) -> tuple[str | None, int]:
    r"""Return (the content of the last \boxed{} or \fbox{}, where it ends); (None, -1) if there is none, or if it is
    not closed.

    Braces may be nested. Without braces, as in `\boxed 5$`, the content ends at the next dollar or the end of the line.
    """
    last = deque(BOX.finditer(text), maxlen=1)
    return _content(text, last[0]) if last else (None, -1)


def _content(text: str, command: re.Match) -> tuple[str | None, int]:
    """Return the content of the box that a command opens, and where it ends."""
    start = SPACE.match(text, command.end()).end()
    if text[start : start + 1] != "{":
        end = re.compile(r"[^$\n]*").match(text, start).end()
        return text[start:end].strip(), end
    depth = 0
    for brace in BRACE.finditer(text, start, start + LONGEST):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip(), brace.end()
    return None, -1


def equal_boxes(text: str) -> list[Box]:
    """Return the boxes of a text if their contents are equal apart from white space: they are one answer, however often
    it is given. Empty if one is not closed, is inside of another, or differs."""
    found: list[Box] = []
    for box in boxes(text):
        if box.content is None or (found and box.start < found[-1].end):
            return []
        if found and "".join(box.content.split()) != "".join(found[0].content.split()):
            return []
        found.append(box)
    return found


def answer_boxes(text: str) -> list[Box]:
    r"""Return `equal_boxes` if none is a part of an expression, as in `-\boxed{7}`, `2\boxed{7}`, `\sqrt{\boxed{7}}`,
    `\boxed{7}^2` or `\boxed{7}.5`, or is changed by words, as in `not \boxed{7}`, `\boxed{7} million` or
    `\boxed{7} or 8`; else empty, also for more than `MOST`."""
    found = equal_boxes(text)
    return found if len(found) <= MOST and all(_stands_free(text, box) for box in found) else []


def _stands_free(text: str, box: Box) -> bool:
    """Return whether nothing directly beside the box makes it a part of an expression or changes its value."""
    written = text[max(0, box.start - BESIDE) : box.start]
    before = to_plain_text(STYLE.sub(" ", written))
    # A digit comes before it, as `{,}000` is a separator of thousands behind a digit alone.
    after = to_plain_text("0" + text[box.end : box.end + BESIDE])[1:]
    bound = FACTOR_BEFORE.search(written) or BEFORE.search(before) or CHANGED_BEFORE.search(before)
    factorial = after.lstrip(" })]$").startswith("!") and not WORD_BEFORE.search(before)
    return not (bound or factorial or AFTER.match(after) or CHANGED_AFTER.match(after))


def box_count(text: str) -> int:
    """Count the boxes, closed or not."""
    return sum(1 for _ in BOX.finditer(text))
