r"""\boxed{} in a text: LaTeX's way of saying which part of it is the answer."""

import re
from collections.abc import Iterator
from typing import NamedTuple

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
LONGEST = 10_000  # characters of a content
SPACE = re.compile(r"\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class Box(NamedTuple):
    content: str | None  # None where it is not closed
    start: int
    end: int  # -1 where it is not closed


def boxes(text: str) -> Iterator[Box]:
    """All boxes by their beginnings, one inside of another too; read as far as is asked for."""
    for command in BOX.finditer(text):
        content, end = _content(text, command)
        yield Box(content, command.start(), end)


def last_box(text: str) -> tuple[str | None, int]:
    r"""(the content of the last \boxed{} or \fbox{}, where it ends); (None, -1) without one, or where it is not closed.

    Braces may be nested. Without braces, as in `\boxed 5$`, the content goes to the next dollar or the end of the line.
    """
    last = None
    for last in BOX.finditer(text):  # noqa: B007
        pass
    return (None, -1) if last is None else _content(text, last)


def _content(text: str, command: re.Match) -> tuple[str | None, int]:
    """What stands in the box of a command, and where it ends."""
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
    """The boxes of a text whose contents are equal, white space aside: one answer, however often it is given. Empty
    where one is not closed, stands in another, or says something else."""
    found: list[Box] = []
    for box in boxes(text):
        if box.content is None or (found and box.start < found[-1].end):
            return []
        if found and "".join(box.content.split()) != "".join(found[0].content.split()):
            return []
        found.append(box)
    return found


def box_count(text: str) -> int:
    return sum(1 for _ in BOX.finditer(text))
