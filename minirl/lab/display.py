"""Show a run to a person: live bars on a terminal, plain lines elsewhere.

Stages nest: the outer one (step, sft) stays while inner ones (rollout, evaluation) come and go under it. Where stdout
is no terminal, progress goes to stderr, a line at most every ten seconds: logs stay short, stdout holds results alone.
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from minirl.lab.preview import PlainDisplay, marked_example

CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}  # the letters that picture them
CONTROLS |= {0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "␛")  # each of the latter is an escape and a letter
PATIENCE, PAUSE = 2.0, 10.0  # plain progress: a stage's age at its first line, and the seconds between two lines


def _times(task: Task) -> str:
    """Write the time so far and to go; the pace counts from the first call, as a resumed run does not begin at 0."""
    now, steps = task.get_time(), task.completed - task.fields["first"]
    left = "-:--:--"
    if steps > 0:
        pace = (task.fields["updated"] - task.start_time) / steps
        left = _clock(max(0.0, pace * (task.total - task.completed) - (now - task.fields["updated"])))
    return f"{_clock(now - task.start_time)}  ETA {left}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class _Times(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_times(task), style="dim")


class RichDisplay(PlainDisplay):
    """`with RichDisplay() as display:` leaves the terminal as it was, also on an exception."""

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic):
        self.console, self.now = console or Console(), now
        self.live = _is_terminal(self.console)
        self.printed = -PAUSE
        columns = (TextColumn("{task.description}", markup=False), BarColumn(30), MofNCompleteColumn(), _Times())
        self.bars = Progress(*columns, console=self.console, get_time=now, refresh_per_second=4, transient=True)

    def __enter__(self) -> "RichDisplay":
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.bars.stop()

    def line(self, text: str) -> None:
        if self.live:
            self.console.print(Text(_harmless(text)), soft_wrap=True)
        else:
            print(_harmless(text), file=self.console.file, flush=True)

    def example(self, tokenizer, prompt, response, learned=None) -> None:
        if not self.live:
            return super().example(tokenizer, prompt, response, learned)
        text = Text("one example, what is trained underlined:\n")
        for part, trained in marked_example(tokenizer, prompt, response, learned):
            text.append(_harmless(part), style="bold underline" if trained else "")
        self.console.print(text, soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        now, task = self.now(), next((t for t in self.bars.tasks if t.fields["stage"] == stage), None)
        if task and (done < task.completed or done >= total or total != task.total):  # over, or begun anew
            self.bars.remove_task(task.id)
            task = None
        if done >= total:
            return
        if task is None:
            label = "  " * len(self.bars.tasks) + stage
            self.bars.add_task(label, total=total, completed=done, stage=stage, first=done, updated=now)
        elif done > task.completed:  # most calls bring nothing new: a rollout reports on every token
            self.bars.update(task.id, completed=done, updated=now)
        if not self.live:
            self._print_progress(stage, now)

    def _print_progress(self, stage: str, now: float) -> None:
        """Print one line for all stages under way, when this one has taken a while."""
        tasks = {task.fields["stage"]: task for task in self.bars.tasks}
        if now - tasks[stage].start_time >= PATIENCE and now - self.printed >= PAUSE:
            self.printed = now
            shown = (f"{name} {t.completed}/{t.total}  {_times(t)}" for name, t in tasks.items())
            print("  |  ".join(shown), file=sys.stderr, flush=True)


def _is_terminal(console: Console) -> bool:
    """Ask the file itself: FORCE_COLOR makes rich take the log of a CI for a terminal."""
    return console.file.isatty() and not console.is_dumb_terminal


def _harmless(text: str) -> str:
    """Replace control codes by letters that picture them: a completion may hold some that ring, move the cursor or
    begin a command of the terminal."""
    return text.translate(CONTROLS)


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else _harmless(str(value))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], console: Console | None = None
) -> None:
    """Print a table, columns of numbers to the right; without a terminal no frame, no colour, and no line is folded."""
    console = console or Console()
    framed = _is_terminal(console)
    shown = Table(title=Text(title), title_justify="left", box=box.ROUNDED if framed else None)
    cells = [[_cell(value) for value in row] for row in rows]
    for i, name in enumerate(columns):
        numbers = all(re.fullmatch(r"[-+]?[\d.][\d.,e+-]*%?|–|nan", row[i]) for row in cells)
        shown.add_column(Text(name), justify="right" if numbers else "left")
    for row in cells:
        shown.add_row(*map(Text, row))
    if not framed:
        console = Console(file=console.file, width=10_000, color_system=None, force_terminal=False)
    console.print(shown)
