r"""\boxed{} in a text: LaTeX's way of saying which part of it is the answer."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
LONGEST = 10_000  # characters of a content
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_box(text: str) -> tuple[str | None, int]:
    r"""(the content of the last \boxed{} or \fbox{}, where it ends); (None, -1) without one, or where it is not closed.

    Braces may be nested. Without braces, as in `\boxed 5$`, the content goes to the next dollar or the end of the line.
    """
    last = None
    for last in BOX.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None, -1
    start = last.end() + len(text[last.end() :]) - len(text[last.end() :].lstrip())
    if text[start : start + 1] != "{":
        end = re.compile(r"[^$\n]*").match(text, start).end()
        return text[start:end].strip(), end
    depth = 0
    for brace in BRACE.finditer(text, start, start + LONGEST):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip(), brace.end()
    return None, -1


def box_count(text: str) -> int:
    return sum(1 for _ in BOX.finditer(text))
