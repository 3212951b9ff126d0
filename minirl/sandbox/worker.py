"""A worker of the pool: a process that forks a cell for each job, and ends it when its time is over.

    python -P -s worker.py SYS_PATH FOLDER      jobs on standard input, results on standard output

The worker forks before it has read what the job is about, and the cell reads it: so no cell inherits anything of
another job, and a program nothing of its tests. What is trusted is called in the worker itself, one that does nothing
else; the kernel ends it with its time, even if the trainer is gone by then.
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
    sys.path[:] = json.loads(sys.argv[1])

from minirl.sandbox import judge
from minirl.sandbox.folder import empty, is_full, remove
from minirl.sandbox.messages import FRAME, Channel, exactly, send
from minirl.sandbox.walls import Limits, Walls, import_folders, python_folders, python_path, standing

HEADER = struct.Struct(">cdIII")  # kind, seconds, memory in MiB, bytes of the two parts that follow
LOAD, CALL, TRUSTED, TESTS = b"L", b"C", b"T", b"P"
ACK = b"+"  # of a cell: it has read its part
MAX_RESULT = 16 * 2**20  # bytes
TICK = 0.02  # seconds between two looks at it
LOADING = 120.0  # seconds to import a function; torch alone may take ten
GRACE = 5.0  # seconds beyond those of a job
LONGEST = 500  # characters of an exception's message

PRELOADED = (  # what programs import most, so that none of them waits for it
    *("abc", "array", "ast", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "dataclasses"),
    *("datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "itertools", "math"),
    *("numbers", "operator", "queue", "random", "re", "secrets", "statistics", "string", "textwrap", "types"),
    *("typing", "unicodedata", "zlib", "_strptime", "encodings.idna"),
)


class Worker:
    def __init__(self, jobs: int, results: int, folder: str):
        self.jobs, self.results, self.folder = jobs, results, folder
        self.function: Callable | None = None
        self.own = ""  # the folder of the function's file
        self.walls = {TESTS: Walls(folder, python_folders())}

    def serve(self) -> None:
        while True:
            gc.freeze()  # a collection in a cell shall not copy the worker's memory
            kind, seconds, memory_mb, first, second = HEADER.unpack(exactly(self.jobs, HEADER.size))
            limits = Limits(seconds, memory_mb)
            if kind == LOAD:
                result = self.load(exactly(self.jobs, first).decode())
            elif kind == TRUSTED:
                arguments = exactly(self.jobs, first)
                with mortal(seconds + GRACE):
                    result = _call(self.function, arguments)
            elif kind == CALL:
                result = self.call(first, limits)
            else:
                result = self.test(first, second, limits)
            send(self.results, result)

    def load(self, spec: str) -> bytes:
        """Import the function here, so that its cells need not."""
        self._enter_folder(str(Path(spec.rpartition(":")[0]).resolve().parent) if ".py:" in spec else "")
        try:
            with mortal(LOADING + GRACE):
                self.function = load_function(spec)
            self.walls[CALL] = Walls(self.folder, [*import_folders(), *filter(None, [self.own])])
        except BaseException as error:
            return _as_json({"error": told(error)})
        return _as_json({"value": True})

    def _enter_folder(self, folder: str) -> None:
        """A file imports what lies beside it, unless a package has that name: a file random.py shall hide no module
        from others. What was beside the one before is forgotten."""
        if self.own in sys.path:
            sys.path.remove(self.own)
            for name, module in list(sys.modules.items()):
                top, place = name.partition(".")[0], getattr(module, "__file__", None) or ""
                if place.startswith((f"{self.own}/{top}/", f"{self.own}/{top}.")):
                    del sys.modules[name]
        self.own = folder if folder and folder not in sys.path else ""
        sys.path += [self.own] if self.own else []

    def call(self, size: int, limits: Limits) -> bytes:
        def run(cell: "Cell") -> None:
            arguments = cell.enter(self.jobs, size, self.walls[CALL], limits)
            send(cell.results, _call(self.function, arguments))

        return self._result([self._start(run)], limits)

    def test(self, program_size: int, tests_size: int, limits: Limits) -> bytes:
        """The program in one cell, its tests in another."""
        questions, answers = os.pipe(), os.pipe()

        def run_program(cell: "Cell") -> None:
            ends = questions[0], answers[1]
            program = cell.enter(self.jobs, program_size, self.walls[TESTS], limits, ends, reports=False)
            sys.path[:] = python_path()
            judge.serve(program.decode(), Channel(*ends))

        def run_tests(cell: "Cell") -> None:
            ends = answers[0], questions[1]
            parts = json.loads(cell.enter(self.jobs, tests_size, self.walls[TESTS], limits, ends))
            sys.path[:] = python_path()
            send(cell.results, _as_json({"value": judge.verdict(Channel(*ends), **parts)}))

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
        if os.read(cell.results, 1) != ACK:  # what it has left unread would be taken for a job
            cell.end()
            raise SystemExit(f"a cell of the sandbox died before it began ({cell.fate})")
        return cell

    def _result(self, cells: list["Cell"], limits: Limits) -> bytes:
        """What the last cell reports. All are ended, and what they have written is removed."""
        try:
            return self._watched(cells[-1], time.monotonic() + limits.seconds)
        finally:
            for cell in cells:
                cell.end()
            empty(self.folder)

    def _watched(self, cell: "Cell", deadline: float) -> bytes:
        received, size = b"", FRAME.size
        while len(received) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                return _as_json({"timeout": True})
            if is_full(self.folder):
                return _as_json({"error": "it wrote too much to its folder"})
            if not select.select([cell.results], [], [], min(left, TICK))[0]:
                continue
            part = os.read(cell.results, min(size - len(received), 2**20))
            if not part:
                cell.end()
                return _as_json({"error": f"its process died ({cell.fate})"})
            received += part
            if len(received) == FRAME.size == size:
                size += FRAME.unpack(received)[0]
                if size > MAX_RESULT:
                    return _as_json({"error": f"its result has more than {MAX_RESULT} bytes"})
        return received[FRAME.size :]


class Cell:
    """A process of its own for one job, in a group of its own."""

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
        """In the new process: read the job, then shut the walls and every file but `keep`, and the pipe for results
        unless it `reports` nothing."""
        payload = exactly(jobs, size)
        os.write(self.results, ACK)
        for output in (1, 2):
            os.dup2(0, output)  # the worker's 0 is /dev/null
        os.chdir(walls.folder)
        os.environ.update(HOME=walls.folder, TMPDIR=walls.folder)
        tempfile.tempdir = None
        walls.close(limits)
        kept = sorted({*keep, *([self.results] if reports else [])})
        for low, high in zip([2, *kept], [*kept, 2**16], strict=True):
            os.closerange(low + 1, high)
        return payload

    def end(self) -> None:
        """Kill the group, whatever is left of it."""
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
    """The function of "package.module:name" or "path/to/file.py:name"."""
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


def told(error: BaseException) -> str:
    """What an exception says, whatever its __str__ does and however much it is."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be shown"
    return f"{type(error).__name__}: {message[:LONGEST]}{'…' * (len(message) > LONGEST)}"


@contextlib.contextmanager
def mortal(seconds: float) -> Iterator[None]:
    """Within, the process dies by SIGALRM when its time is over, also in a call of C that never returns."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _as_json(value) -> bytes:
    return json.dumps(value, default=_plain).encode()


def _plain(value):
    """numpy and torch numbers and arrays as plain ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result of type {type(value).__name__} does not fit in JSON")


def main() -> None:
    jobs, results = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # what a trusted function prints
    folder = sys.argv[2]
    try:
        for module in PRELOADED:
            importlib.import_module(module)
        send(results, _as_json({"walls": sorted(standing())}))
        Worker(jobs, results, folder).serve()
    except (EOFError, BrokenPipeError):  # the trainer is gone
        pass
    finally:
        remove(folder)


if __name__ == "__main__":
    main()
