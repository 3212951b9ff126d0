"""Find the program in a completion, whatever the model wrote around it, and judge it by its tests.

Of several programs the last one is judged, so that it does not pay to write many. What counts as one is found with
`ast`, not with patterns: a block that shows how to call the function, or what it prints, defines nothing. The work is
bounded, as hostile text is parsed in the trainer: by MAX_CODE for a program, by MAX_TRIES and MAX_PARSED for a text.
"""

import ast
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from minirl.judge.answers import Reward
from minirl.judge.pool import Job, shared
from minirl.thoughts import after_thoughts

MEMORY_MB = 512  # for a program and for its tests, each
MAX_CODE = 2**16  # characters of a program that is searched for; a longer last block is judged as it is
MAX_TRIES, MAX_PARSED = 64, 2**18  # candidates for one completion, and their characters, that are parsed
NEAR = 64  # fences, from the end, that can open a program
ENDS = 8  # fences that are tried as its end, as there may be some inside of its strings
STARTS = 16  # lines that are tried as the beginning of a program without a fence

FUTURE = re.compile(r"^from __future__ import [^(\n]*\n", re.MULTILINE)
LANGUAGE = re.compile(r"[\w+#.-]*")
HEAD = re.compile(r"^(?:import |from |def |async |class |@|[A-Za-z_]\w* *=)", re.MULTILINE)  # how a program begins


def passes_tests(seconds: float) -> Reward:
    """Return a reward: 1 where a completion's program passes the tests of its row within `seconds`, else 0; a
    TimeoutError where it takes longer. None where the tests themselves fail to run, or where the problem's own solution
    does not pass them.

    Columns: `source`, the beginning of the program; `entry_point`, its function; `test`; `helpers`, what the tests may
    call on their own side, by default the source; `solution`, empty where there is none.
    """
    sound: dict[Job, bool] = {}  # whether a problem's own solution passes its tests, asked once in a run

    def correct(prompts, completions, source, entry_point, test, helpers=None, solution=None, **columns) -> list:
        tests = list(zip(test, helpers or source, entry_point, strict=True))
        texts = zip(completions, source, entry_point, strict=True)
        jobs = [Job.tests(program_of(*text), *of) for text, of in zip(texts, tests, strict=True)]
        codes = solution or [""] * len(jobs)
        own = [Job.tests(code, *of) if code else None for code, of in zip(codes, tests, strict=True)]
        # Equal programs of one problem run once.
        distinct = list(dict.fromkeys(jobs + [job for job in own if job and job not in sound]))
        outcomes = dict(zip(distinct, shared().map(distinct, seconds, MEMORY_MB), strict=True))
        sound.update((job, outcomes[job]["passed"]) for job in own if isinstance(outcomes.get(job), dict))
        return [None if sound.get(o) is False else _value(outcomes[job]) for o, job in zip(own, jobs, strict=True)]

    return correct


def _value(outcome: dict | Exception) -> float | Exception | None:
    if isinstance(outcome, TimeoutError):
        return outcome
    verdict = outcome if isinstance(outcome, dict) else {"passed": False}
    return None if verdict.get("at_fault") else float(verdict["passed"])


def program_of(completion: str, source: str, entry: str) -> str:
    """Return the completion's program, which is to define `entry`: the last fenced block that defines it, else the part
    of the text before the first fence that does, else the last block, or the text. Thoughts are left out.

    The part of `source`, the beginning of a program, that is above `entry` is put above it. A completion that does not
    define `entry` continues the source instead, up to where it leaves the function.
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
    """Return the last fenced block, or the text where there is none, None for nothing; a block that is open at the end
    counts, thoughts do not."""
    completion = after_thoughts(completion)
    opened, closed = _last_block(_fences(completion))
    code = completion
    if opened:
        code = completion[opened.after : max(opened.after, closed.start - 1) if closed else None]
    return code if code.strip() else None


class Fence(NamedTuple):
    """Note a line with ``` or ~~~ and at most the name of a language behind it."""

    start: int  # index in the text where the part before it ends
    after: int  # where the next line begins
    alone: bool  # nothing precedes it on its line; only such a fence surely closes a block


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
    """Return the fence that opens the last block and the one that closes it; None for one that is open at the end."""
    opened: Fence | None = None
    closed: Fence | None = None
    for fence in fences:
        if opened is None or closed:
            opened, closed = fence, None
        elif fence.alone:
            closed = fence
    return opened, closed


def _body(code: str) -> str:
    """Return the first lines, up to one that is not indented: there the text leaves the function."""
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
    """Yield the text between two fences, the last first. A fence can also be inside a string of the program, so each
    later one is tried as the end: first those alone on their line, then the end of the completion, then the others. A
    block that is never closed may end in prose."""
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
    """Return the text, if it is Python; else the longest part that is, from the last line on that begins to define
    `entry`, with the imports and definitions directly above it."""
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
    """Return whether the text continues a function: its first line that is not empty is indented, and no indented line
    defines `entry`."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    return line[:1].isspace() and not re.search(rf"^[ \t]+(?:async\s+)?def\s+{re.escape(entry)}\b", text, re.MULTILINE)


def _outdented(text: str, indent: str) -> str:
    """Return the first lines, as far as they have this indentation, without it."""
    lines = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith(indent):
            break
        lines.append(line.removeprefix(indent))
    return "\n".join(lines)


class Parser:
    """Parse hostile text with `ast.parse`, as long as the budget of one completion lasts."""

    def __init__(self):
        self.tries, self.characters = 2 * MAX_TRIES, MAX_PARSED

    def parse(self, code: str) -> ast.Module | SyntaxError | None:
        """Return the tree, or the error of text that is no Python; None for text that is too long or too deep, or once
        the budget is spent."""
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
        """Return the first lines, as many as are Python, without expressions at their end: a word of prose is one."""
        lines = code.split("\n")
        while isinstance(tree := self.parse("\n".join(lines)), SyntaxError):
            lines = lines[: min((tree.lineno or 1) - 1, len(lines) - 1)]
        kept = [node for node in tree.body if not _defines_nothing(node)] if tree else []
        return "\n".join(lines[: kept[-1].end_lineno]) if kept else ""


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module defines. `from solution import f` defines none, as it shows how f
    is used; nor does a function without a body, as it shows how f is called."""
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
    """Return whether this is `def f(x): ...`, or one with `pass` or a docstring alone."""
    told = [part.value if isinstance(part, ast.Expr) else part for part in node.body]
    return not isinstance(node, ast.ClassDef) and all(isinstance(part, ast.Constant | ast.Pass) for part in told)


def _defines_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and node.value is None)
