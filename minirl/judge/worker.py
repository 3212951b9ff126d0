"""Serve the pool: a process that forks a cell for each job, and kills it when its time is over.

    python -P -s worker.py      a line with its settings, then jobs on standard input; results on standard output

The worker forks before the content of the job is read, and the cell reads it: so no cell inherits anything of another
job, and the cell of a program nothing of its tests. A trusted function is called in the worker itself, one that does
nothing else; the kernel ends it when its time is over, even if the trainer is gone by then.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":  # before anything of the project or of a user is imported
    # Not in the command line, which every process of the machine can read, and not a byte beyond the line.
    sys.path[:], FOLDER, USE = json.loads(sys.stdin.buffer.raw.readline())

from minirl.errors import told
from minirl.judge import mounts, tester
from minirl.judge.folder import empty, is_full, pinned, remove
from minirl.judge.messages import FRAME, Channel, read_exactly, send
from minirl.judge.walls import (
    FILE_BYTES,
    THREADS,
    Limits,
    Walls,
    available_walls,
    import_folders,
    python_folders,
    python_library,
    python_path,
    threads,
)

HEADER = struct.Struct(">cdIII")  # kind, seconds, memory in MiB, bytes of the two parts that follow
LOAD, CALL, TRUSTED, TESTS, TESTER = b"L", b"C", b"T", b"P", b"J"
ACK = b"+"  # a cell sends it when it has read its part of the job
MAX_RESULT = 16 * 2**20  # bytes
TICK = 0.02  # seconds between two looks at a cell's folder
LOADING = 120.0  # seconds to import a function; torch alone may take ten
GRACE = 5.0  # seconds beyond those of a job, for starting and ending its cells

PRELOADED = (  # imported once, before the forks, so that no program waits for them
    *("abc", "array", "ast", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "dataclasses"),
    *("datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "itertools", "math"),
    *("numbers", "operator", "queue", "random", "re", "secrets", "statistics", "string", "textwrap", "types"),
    *("typing", "unicodedata", "zlib", "_strptime", "encodings.idna"),
)


class Worker:
    """Read jobs from a pipe, run each in cells of its own, write the results to another pipe."""

    def __init__(self, jobs: int, results: int, folder: str, use: str):
        self.jobs, self.results = jobs, results
        self.function: Callable | None = None
        self.report = bytearray()  # of the last job's cell
        self.own = ""  # the folder of the function's file, where that was added to sys.path
        # A program sees the standard library alone, a function whatever it may import.
        self.mounted = use != "trusted" and mounts.enter(folder, *(python_library() if use == "tests" else ()))
        self.folder = os.path.join(folder, mounts.CELL) if self.mounted else folder  # where cells write
        self.walls = {}
        if use == "tests":
            root = folder if self.mounted else ""
            self.walls = {
                kind: Walls(self.folder, python_folders(), root, self.mounted, number)
                for number, kind in enumerate((TESTS, TESTER))
            }

    def serve(self) -> None:
        """Serve until the trainer closes the pipe, which raises an EOFError."""
        while True:
            gc.freeze()  # otherwise a garbage collection in a cell writes to, and so copies, the worker's memory
            kind, seconds, memory_mb, first, second = HEADER.unpack(read_exactly(self.jobs, HEADER.size))
            limits = Limits(seconds, memory_mb)
            if kind == LOAD:
                result = self.load(read_exactly(self.jobs, first).decode())
            elif kind == TRUSTED:
                arguments = read_exactly(self.jobs, first)
                with killed_after(seconds + GRACE):
                    result = _call(self.function, arguments)
            elif kind == CALL:
                result = self.call(first, limits)
            else:
                result = self.test(first, second, limits)
            send(self.results, result)
            self.report[:] = bytes(len(self.report))  # the next cells inherit this memory

    def load(self, spec: str) -> bytes:
        """Import the function here, so that its cells need not; return the result as JSON."""
        self._enter_folder(str(Path(spec.rpartition(":")[0]).resolve().parent) if ".py:" in spec else "")
        try:
            with killed_after(LOADING + GRACE):
                self.function = load_function(spec)
            readable = [*import_folders(), *filter(None, [self.own])]
            self.walls[CALL] = Walls(self.folder, readable, own_mounts=self.mounted)
        except BaseException as error:
            return _as_json({"error": told(error)})
        return _as_json({"value": True})

    def _enter_folder(self, folder: str) -> None:
        """Let a file import the files beside it. The folder comes last in sys.path, as a file random.py must not hide
        the library's module; modules from the folder before are removed."""
        if self.own in sys.path:
            sys.path.remove(self.own)
            for name, module in list(sys.modules.items()):
                top, place = name.partition(".")[0], getattr(module, "__file__", None) or ""
                if place.startswith((f"{self.own}/{top}/", f"{self.own}/{top}.")):
                    del sys.modules[name]
        self.own = folder if folder and folder not in sys.path else ""
        sys.path += [self.own] if self.own else []

    def call(self, size: int, limits: Limits) -> bytes:
        """Call the loaded function in a cell."""

        def run(cell: "Cell") -> None:
            arguments = cell.enter(self.jobs, size, self.walls[CALL], limits)
            send(cell.results, _call(self.function, arguments))

        return self._result([self._start(run)], limits)

    def test(self, program_size: int, tests_size: int, limits: Limits) -> bytes:
        """Run the program in one cell and its tests in another, with two pipes between them."""
        questions, answers = os.pipe(), os.pipe()

        def run_program(cell: "Cell") -> None:
            ends = questions[0], answers[1]
            # It has no pipe to the worker: a program could write its own verdict there.
            program = cell.enter(self.jobs, program_size, self.walls[TESTS], limits, ends, reports=False)
            sys.path[:] = python_path()
            tester.serve(program.decode(), Channel(*ends))

        def run_tests(cell: "Cell") -> None:
            ends = answers[0], questions[1]
            parts = json.loads(cell.enter(self.jobs, tests_size, self.walls[TESTER], limits, ends))
            sys.path[:] = python_path()
            send(cell.results, _as_json({"value": tester.verdict(Channel(*ends), **parts)}))

        cells = []
        try:
            cells.append(self._start(run_program))
            cells.append(self._start(run_tests))
        finally:
            for end in (*questions, *answers):
                os.close(end)
        return self._result(cells, limits)

    def _start(self, run: Callable) -> "Cell":
        cell = Cell(run)
        if os.read(cell.results, 1) != ACK:  # the part that it has not read would be taken for the next job
            cell.end()
            raise SystemExit(f"a cell of the sandbox died before it began ({cell.fate})")
        return cell

    def _result(self, cells: list["Cell"], limits: Limits) -> bytes:
        """Return the report of the last cell; kill all of them and remove what they have written."""
        try:
            return self._watched(cells, time.monotonic() + limits.seconds)
        finally:
            for cell in cells:
                cell.end()
            empty(self.folder)

    def _watched(self, cells: list["Cell"], deadline: float) -> bytes | bytearray:
        """Read the report of the last cell while their time and their folder last, and their threads are few."""
        cell, filled, size = cells[-1], 0, None
        self.report = bytearray(FRAME.size)
        look = time.monotonic() + TICK  # by the clock: a cell may send a byte at a time
        while size is None or filled < size:
            now = time.monotonic()
            if now >= deadline:
                return _as_json({"timeout": True})
            if now >= look:
                if excess := self._excess(cells):
                    return _as_json({"error": excess})
                look = time.monotonic() + TICK
            if not select.select([cell.results], [], [], min(deadline - now, TICK))[0]:
                continue
            part = os.readv(cell.results, [memoryview(self.report)[filled:]])
            if not part:
                cell.end()
                return _as_json({"error": f"its process died ({cell.fate})"})
            filled += part
            if size is None and filled == FRAME.size:
                (size,) = FRAME.unpack(self.report)
                if size > MAX_RESULT:  # the cell may lie about it
                    return _as_json({"error": f"its result has more than {MAX_RESULT} bytes"})
                self.report, filled = bytearray(size), 0
        return self.report

    def _excess(self, cells: list["Cell"]) -> str:
        """Return what the cells have too much of, where the kernel may not have refused it."""
        try:
            held = 0 if self.mounted else sum(pinned(cell.pid, self.folder) for cell in cells)
            if is_full(self.folder, FILE_BYTES * held):
                return "it wrote too much to its folder"
            if any(threads(cell.pid) > THREADS for cell in cells):
                return f"it has more than {THREADS} threads"
        except ValueError as error:  # what cannot be counted is too much
            return str(error)
        return ""


class Cell:
    """Fork a process for one job, in a process group of its own, so that all that it starts can be killed."""

    def __init__(self, run: Callable[["Cell"], object]):
        self.fate = ""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                self.results = writing
                run(self)
            finally:
                os._exit(0)
        os.close(writing)
        self.results = reading

    def enter(self, jobs: int, size: int, walls: Walls, limits: Limits, keep=(), reports: bool = True) -> bytes:
        """Read the job in the new process, then close the walls and every file descriptor but those in `keep` and, if
        the cell `reports`, its pipe for results."""
        payload = read_exactly(jobs, size)
        os.write(self.results, ACK)
        for output in (1, 2):
            os.dup2(0, output)  # the worker's 0 is /dev/null: nothing that is printed is seen
        tempfile.tempdir = None
        walls.close(limits)
        kept = sorted({*keep, *([self.results] if reports else [])})
        for low, high in zip([2, *kept], [*kept, 2**16], strict=True):
            os.closerange(low + 1, high)
        return payload

    def end(self) -> None:
        """Kill all processes of the group, and note how the first one ended."""
        if self.fate:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no group yet, or is gone
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        self.fate = f"signal {-code}" if code < 0 else f"exit code {code}"
        os.close(self.results)


def load_function(spec: str) -> Callable:
    """Import the function of "package.module:name" or "path/to/file.py:name"; LookupError if there is none."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise LookupError(f"{place} has no function {name!r}; its functions are: {', '.join(known) or 'none'}")
    return function


def _call(function: Callable, arguments: bytes) -> bytes:
    try:
        args, kwargs = json.loads(arguments)
        return _as_json({"value": function(*args, **kwargs)})
    except BaseException as error:
        return _as_json({"error": told(error)})


@contextlib.contextmanager
def killed_after(seconds: float) -> Iterator[None]:
    """Let the kernel kill this process when its time is over, also inside a call of C that never returns."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _as_json(value) -> bytes:
    return json.dumps(value, default=_to_builtin).encode()


def _to_builtin(value):
    """Turn numbers and arrays of numpy and torch into Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result of type {type(value).__name__} does not fit in JSON")


def main() -> None:
    jobs, results = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # what a trusted function prints must not mix with the results
    try:
        for module in PRELOADED:
            importlib.import_module(module)
        walls = available_walls()
        worker = Worker(jobs, results, FOLDER, USE)
        send(results, _as_json({"walls": sorted(walls | ({"mounts"} if worker.mounted else set()))}))
        worker.serve()
    except (EOFError, BrokenPipeError):  # the trainer is gone
        pass
    except BaseException as error:
        send(results, _as_json({"failed": f"its worker failed ({told(error)})"}))
        raise
    finally:
        mounts.leave(FOLDER)
        remove(FOLDER)


if __name__ == "__main__":
    main()
