"""Read the logs of a run as streams: its metrics as columns of numbers, and the completions of a few steps.

A run of 200,000 steps has hundreds of megabytes of metrics. Of each line only what is wanted becomes numbers, and no
line stays in memory. Lines that hold no record are left out and counted, so that a damaged log can be read.
"""

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minirl.errors import InputError

BLOCK = 4096  # steps that are worked on at a time
LARGEST = 1e300  # of a metric: beyond it, as infinity is, it is no number that a mean could be taken of
FAST = 8  # layouts of lines that are looked for
BEGIN = re.compile(rb'\{"step": (\d{1,15})[,}]')  # of a line that a run wrote


@dataclass
class Columns:
    """Metrics of N steps: in each [N] NaN where there is no finite value, which is null in metrics.jsonl."""

    steps: np.ndarray  # [N], whole
    values: dict[str, np.ndarray]  # in the order in which the metrics came

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps in which a metric has a value, and these values."""
        values = self.column(name)
        known = ~np.isnan(values)
        return self.steps[known], values[known]

    def column(self, name: str) -> np.ndarray:
        return self.values[name] if name in self.values else np.full(len(self.steps), math.nan)

    def blocks(self) -> Iterator["Columns"]:
        """Yield the columns in parts of BLOCK steps at most."""
        for i in range(0, len(self.steps), BLOCK):
            part = slice(i, i + BLOCK)
            yield Columns(self.steps[part], {name: values[part] for name, values in self.values.items()})

    @classmethod
    def of(cls, records: Sequence[dict]) -> "Columns":
        """Make columns of records in memory."""
        names = dict.fromkeys(name for record in records for name in record if name != "step")
        steps = np.array([record["step"] for record in records], dtype=int)
        return cls(steps, {name: np.array([number(record.get(name)) for record in records]) for name in names})


def number(value: object) -> float:
    """Return the value of a metric; NaN where it is none, as texts and integers are that no float holds."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else math.nan


def damage(file: Path, lines: Sequence[int]) -> str:
    """Say which lines of a log hold no record: the first five by their numbers."""
    which = ", ".join(map(str, lines[:5])) + f" and {len(lines) - 5} more" * (len(lines) > 5)
    return f"{file}, line{'s' * (len(lines) > 1)} {which}: not a JSON object with a whole 'step'"


def refuse_empty(file: Path) -> list[dict]:
    raise InputError(f"{file} holds no finished step: wait for the first one, or check the folder")


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """Open a log as bytes, as lines end with a line feed alone: a completion may hold other line ends."""
    try:
        with file.open("rb") as lines:
            yield lines
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give the folder of a run") from None


def _record(line: bytes) -> dict | None:
    """Read an object with a whole "step"; None for anything else."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) and 0 <= record["step"] < 2**53 else None
    except (ValueError, TypeError, KeyError, RecursionError):  # bad JSON or UTF-8, no object, no step
        return None


def _is_damaged(line: bytes) -> bool:
    """Tell whether a line without a record is worth a word: a last one without an end was being written."""
    return line.endswith(b"\n") and bool(line.strip())


# ---- metrics ---------------------------------------------------------------------------------------------------------


def read_metrics(folder: str | Path) -> list[dict]:
    """Read a run's metrics.jsonl into memory, but for a last line that was cut off. InputError for a damaged line."""
    file, records, damaged = Path(folder) / "metrics.jsonl", [], []
    with _opened(file) as lines:
        for place, line in enumerate(lines, 1):
            if record := _record(line):
                records.append(record)
            elif _is_damaged(line):
                damaged.append(place)
    if damaged:
        raise InputError(f"{damage(file, damaged)}: remove what is damaged")
    return records or refuse_empty(file)


class Layout:
    """The metrics of a line in their order, which the lines of a run share, and the numbers of those that are wanted.

    `pattern` cuts these out of a line in a third of the time that its JSON takes. A line that holds anything but the
    same metrics with plain numbers does not match.
    """

    def __init__(self, record: dict, wanted: re.Pattern):
        self.names = [name for name in record if name == "step" or wanted.fullmatch(name)]
        self.rows: list[list[float]] = []  # the numbers of each line, after its place in the block
        plain = rb"[-+.\w]*+"
        texts = (json.dumps(name, ensure_ascii=False).encode("utf-8", "replace") for name in record)
        values = (
            rb"(\d{1,15})" if name == "step" else b"(" + plain + b")" if name in self.names else plain
            for name in record
        )
        fields = (re.escape(text) + b": " + value for text, value in zip(texts, values, strict=True))
        self.pattern = re.compile(rb"\{" + b", ".join(fields) + rb"\}\n")

    def read(self, line: bytes) -> list[float] | None:
        """Return the numbers of a line, NaN for null; None where the line is of another layout."""
        try:
            found = self.pattern.fullmatch(line)
            return found and [math.nan if text == b"null" else float(text) for text in found.groups()]
        except ValueError:
            return None


def read_columns(file: Path, wanted: re.Pattern, damaged: list[int]) -> Columns:
    """Read the metrics whose whole names match; numbers of lines without a record are appended to `damaged`."""
    fast: list[Layout] = []  # a few, whose pattern matches
    layouts: dict[tuple, Layout] = {}  # of this block, by the names of the metrics
    blocks, count = [], 0
    with _opened(file) as lines:
        for place, line in enumerate(lines, 1):
            for layout in fast:
                if row := layout.read(line):
                    break
            else:
                if not (record := _record(line)):
                    damaged += [place] * _is_damaged(line)
                    continue
                names = tuple(record)
                if names not in layouts:
                    layouts[names] = layout = Layout(record, wanted)
                    fast += [layout] if len(fast) < FAST and layout.read(line) else []
                layout = layouts[names]
                row = [number(record[name]) for name in layout.names]
            layout.rows.append([count, *row])
            count += 1
            if count == BLOCK:
                blocks.append(_block(layouts.values(), count))
                layouts, count = {names: layout for names, layout in layouts.items() if layout in fast}, 0
    blocks.append(_block(layouts.values(), count))
    names = dict.fromkeys(name for block in blocks for name in block.values)
    steps = np.concatenate([block.steps for block in blocks])
    return Columns(steps, {name: np.concatenate([block.column(name) for block in blocks]) for name in names})


def _block(layouts: Iterable[Layout], count: int) -> Columns:
    """Make columns of the rows that the layouts hold, and take these out."""
    steps, values = np.zeros(count, dtype=int), {}
    for layout in layouts:
        if layout.rows:
            rows = np.array(layout.rows)
            rows[~(np.abs(rows) <= LARGEST)] = math.nan
            places, found = rows[:, 0].astype(int), dict(zip(layout.names, rows.T[1:], strict=True))
            steps[places] = found.pop("step")
            for name, column in found.items():
                values.setdefault(name, np.full(count, math.nan))[places] = column
            layout.rows.clear()
    return Columns(steps, values)


# ---- completions -----------------------------------------------------------------------------------------------------


def read_completions(file: Path, damaged: list[int]) -> list[dict]:
    """Read the completions of the first, the middle and the last step that has some.

    Lines of other steps are looked at, not parsed: a long run has gigabytes of them.
    """
    steps, places, numbers, at, found = array("q"), array("q"), array("q"), 0, []
    with _opened(file) as lines:
        for i, line in enumerate(lines, 1):
            begin = BEGIN.match(line) if line.endswith(b"}\n") and b"\0" not in line else None
            if begin or (record := _record(line)):
                step = int(begin[1]) if begin else record["step"]
                if not steps or steps[-1] != step:  # the first line of a step
                    for values, value in ((steps, step), (places, at), (numbers, i)):
                        values.append(value)
            else:
                damaged += [i] * _is_damaged(line)
            at += len(line)
        having = np.unique(steps)
        shown = np.isin(steps, having[[0, len(having) // 2, -1]]) if steps else []
        for k in np.flatnonzero(shown):
            lines.seek(places[k])
            for i, line in enumerate(lines, numbers[k]):
                record = _record(line)
                if record and record["step"] != steps[k]:
                    break
                found += [record] if record else []
                damaged += [i] * (not record and _is_damaged(line) and i not in damaged)
    damaged.sort()
    return found
