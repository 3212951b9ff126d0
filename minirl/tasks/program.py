"""The program that a completion stands for, whatever the model wrote around it.

Of several programs one is judged, the last, so that it does not pay to write many. What counts as one is found with
`ast`, not with patterns: a block that shows how to call the function, or what it prints, defines nothing. Everything
here is bounded, as hostile text is parsed in the trainer: MAX_CODE for a program, MAX_TRIES and MAX_PARSED for a text.
"""

import ast
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from minirl.rewards.thoughts import after_thoughts

MAX_CODE = 2**16  # characters of a program that is looked for; a longer last block is judged as it is
MAX_TRIES, MAX_PARSED = 64, 2**18  # programs, and their characters, that are parsed for one completion
NEAR = 64  # fences from the end that can open a program
ENDS = 8  # fences that can close it, where there are some inside of its texts
STARTS = 16  # lines without fences that a program may begin with

FUTURE = re.compile(r"^from __future__ import [^(\n]*\n", re.MULTILINE)
LANGUAGE = re.compile(r"[\w+#.-]*")
HEAD = re.compile(r"^(?:import |from |def |async |class |@|[A-Za-z_]\w* *=)", re.MULTILINE)  # how a program begins


def program_of(completion: str, source: str, entry: str) -> str:
    """The program of a completion that shall define `entry`: the last fenced block that defines it, else what defines
    it in the text before the first fence, else the last block, or the text. Thoughts are left out.

    Above it stands what `source`, the beginning of a program, has above `entry`. A completion that does not define
    `entry` continues the source instead, up to where it leaves the function.
    """
    completion = after_thoughts(completion)
    fences, parser = _fences(completion), Parser()
    before = completion[: fences[0].start] if fences else completion
    goes_on = bool(source) and _is_body(before, entry)
    code = _of_blocks(completion, fences, entry, parser)
    if code is None and not goes_on:
        code = _of_text(before.strip("\n"), entry, parser)
    if code is None:
        code = before if goes_on else code_block(completion) or ""
        if source:
            return source + _body(code) + "\n"
    above = re.split(rf"^(?:async\s+)?def\s+{re.escape(entry)}\b", source, maxsplit=1, flags=re.MULTILINE)[0]
    whole = f"{above}\n{code.rstrip()}\n"
    return "".join(FUTURE.findall(whole)) + FUTURE.sub("", whole)  # they must come first


def code_block(completion: str) -> str | None:
    """The last fenced block, or the text where there is none; a block that is open at the end counts, thoughts do
    not."""
    completion = after_thoughts(completion)
    opened, closed = _last_block(_fences(completion))
    code = completion
    if opened:
        code = completion[opened.after : max(opened.after, closed.start - 1) if closed else None]
    return code if code.strip() else None


class Fence(NamedTuple):
    """``` or ~~~ with at most the name of a language behind it."""

    start: int  # where what stands before it ends
    after: int  # where the next line begins
    alone: bool  # at the beginning of its line; only so it surely closes


def _fences(text: str) -> list[Fence]:
    found, offset = [], 0
    for line in text.split("\n"):
        after = offset + len(line) + 1
        mark = "```" if "```" in line else "~~~" if line.lstrip().startswith("~~~") else None
        if mark:
            before, _, info = line.rpartition(mark)
            before = before.rstrip(mark[0])
            alone = not before.strip()
            if alone or (mark == "```" and LANGUAGE.fullmatch(info.strip())):
                found.append(Fence(offset if alone else offset + len(before), after, alone))
        offset = after
    return found


def _last_block(fences: list[Fence]) -> tuple[Fence | None, Fence | None]:
    """What opens and what closes it; nothing closes one that is open at the end."""
    opened: Fence | None = None
    closed: Fence | None = None
    for fence in fences:
        if opened is None or closed:
            opened, closed = fence, None
        elif fence.alone:
            closed = fence
    return opened, closed


def _body(code: str) -> str:
    lines = []
    for line in code.split("\n"):
        if line.strip() and not line[0].isspace() and not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


# --- the part that defines a name -------------------------------------------------------------------------------------


def _of_blocks(text: str, fences: list[Fence], entry: str, parser: "Parser") -> str | None:
    tried = islice(_blocks(text, fences, entry, parser), MAX_TRIES)
    return next((code for code in tried if parser.defines(code, entry)), None)


def _blocks(text: str, fences: list[Fence], entry: str, parser: "Parser") -> Iterator[str]:
    """What stands between two fences, the last first. A fence can also stand in a text of the program, so each is tried
    as its end; those that other text precedes on their line come after the end of the completion. A block that is never
    closed may end in prose."""
    opened, closed = _last_block(fences)
    for i in range(len(fences) - 1, max(-1, len(fences) - 1 - NEAR), -1):
        first, later = fences[i].after, fences[i + 1 : i + 1 + ENDS]
        ends = [f.start for f in later if f.alone] + [len(text)] + [f.start for f in later if not f.alone]
        for end in ends:
            if end - first <= MAX_CODE and entry in (code := text[first:end]):
                yield textwrap.dedent(code)
        if fences[i] is opened and closed is None:
            yield _of_text(text[first:].strip("\n"), entry, parser) or ""


def _of_text(text: str, entry: str, parser: "Parser") -> str | None:
    """The text, if it is Python; else the longest part that is, from the last line on that begins to define `entry`,
    and what stands directly above it."""
    if len(text) <= MAX_CODE:
        for whole in (textwrap.dedent(text), text.lstrip()):
            if parser.defines(whole, entry):
                return parser.longest(whole)
    name = re.escape(entry)
    begins = rf"^([ \t]*)(?:(?:async[ \t]+)?def[ \t]+{name}\b|class[ \t]+{name}\b|{name}[ \t]*=)"
    found = list(re.finditer(begins, text, re.MULTILINE))[-STARTS:][::-1]
    for match in sorted(found, key=lambda match: len(match[1]) > 0):  # an indented one may be a method
        code = parser.longest(_outdented(text[match.start() : match.start() + MAX_CODE], match[1]))
        if not parser.defines(code, entry):
            continue
        low = max(0, match.start() - MAX_CODE + len(code))
        above = (text[m.start() : match.start()] for m in HEAD.finditer(text, low, match.start()))
        return next((a + code for a in islice(above, STARTS) if parser.defines(a + code, entry)), code)
    return None


def _is_body(text: str, entry: str) -> bool:
    """Whether it goes on with a function: its first line that says something is indented, and it does not define
    `entry` there."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    return line[:1].isspace() and not re.search(rf"^[ \t]+(?:async\s+)?def\s+{re.escape(entry)}\b", text, re.MULTILINE)


def _outdented(text: str, indent: str) -> str:
    """The lines that are indented as the first one, without it."""
    lines = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith(indent):
            break
        lines.append(line.removeprefix(indent))
    return "\n".join(lines)


class Parser:
    """`ast.parse` for hostile text, as long as its budget lasts."""

    def __init__(self):
        self.tries, self.characters = 2 * MAX_TRIES, MAX_PARSED

    def parse(self, code: str) -> ast.Module | SyntaxError | None:
        """None for text that is too long or too deep."""
        self.tries, self.characters = self.tries - 1, self.characters - min(len(code), MAX_CODE)
        if len(code) > MAX_CODE or self.tries < 0 or self.characters < 0:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in the model's texts
                return ast.parse(code)
        except SyntaxError as error:
            return error
        except (ValueError, RecursionError, MemoryError):  # a NUL, half a surrogate pair, brackets in brackets
            return None

    def defines(self, code: str, name: str) -> bool:
        tree = self.parse(code) if name in code else None
        return isinstance(tree, ast.Module) and any(name in _bound(node) for node in tree.body)

    def longest(self, code: str) -> str:
        """Its first lines, as many as are Python, without expressions at the end: a word is one, too."""
        lines = code.split("\n")
        while isinstance(tree := self.parse("\n".join(lines)), SyntaxError):
            lines = lines[: min((tree.lineno or 1) - 1, len(lines) - 1)]
        kept = [node for node in tree.body if not _says_nothing(node)] if tree else []
        return "\n".join(lines[: kept[-1].end_lineno]) if kept else ""


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a module defines. `from solution import f` shows how f is used, and a function that
    does nothing what it is called."""
    defining = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    if isinstance(node, defining):
        return set() if _is_skeleton(node) else {node.name}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names if _in_library(node.module or "")}
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name for alias in node.names if _in_library(alias.name)}
    parts = list(ast.walk(node))
    stored = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return stored | {part.name for part in parts if isinstance(part, defining)}


def _in_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _is_skeleton(node: ast.stmt) -> bool:
    """def f(x): ..., or with `pass` or a docstring alone."""
    told = [part.value if isinstance(part, ast.Expr) else part for part in node.body]
    return not isinstance(node, ast.ClassDef) and all(isinstance(part, ast.Constant | ast.Pass) for part in told)


def _says_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and node.value is None)
