"""A pool of workers outside the trainer, which call functions and test programs: none of them can hang it or harm it.

A worker that does not answer in time is killed with all its processes and replaced, one that dies is replaced, and the
results come back in the order of the jobs, with an exception where there is none. What a job holds and what comes back
is JSON.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirl.errors import InputError
from minirl.sandbox.folder import remove
from minirl.sandbox.messages import FRAME
from minirl.sandbox.worker import CALL, GRACE, HEADER, LOAD, LOADING, TESTS, TRUSTED

STILLBORN = 5  # workers in a row that die before their first word


class ChildError(RuntimeError):
    """The function raised, or its process died; the message says which."""


@dataclass(frozen=True)
class Job:
    kind: bytes
    parts: tuple[bytes, bytes] = (b"", b"")
    function: str = ""
    trusted: bool = False

    @property
    def use(self) -> str:
        """Workers are of one use: what a function leaves behind in its process shall reach no program and no judge, and
        what a trusted one does no other function."""
        return "trusted" if self.trusted else "tests" if self.kind == TESTS else "calls"

    @classmethod
    def call(cls, function: str, args: Sequence = (), kwargs: dict | None = None, trusted: bool = False) -> "Job":
        """`function` is "package.module:name" or "path/to/file.py:name"; trusted: without walls but for time, and with
        this process's environment."""
        arguments = json.dumps([list(args), kwargs or {}]).encode()
        return cls(TRUSTED if trusted else CALL, (arguments, b""), function, trusted)

    @classmethod
    def tests(cls, program: str, tests: str, helpers: str = "", entry: str = "") -> "Job":
        """See `minirl.sandbox.judge`."""
        parts = json.dumps({"helpers": helpers, "tests": tests, "entry": entry})
        return cls(TESTS, (program.encode(errors="replace"), parts.encode()))


class Worker:
    """The trainer's end of a worker."""

    def __init__(self, selector: selectors.BaseSelector, use: str):
        program = Path(__file__).with_name("worker.py")
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="minirl-"))  # of its cells
        path = json.dumps([p or os.getcwd() for p in sys.path])
        words = [sys.executable, "-P", "-s", str(program), path, self.folder]  # -I would ignore PYTHONHASHSEED
        keep = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
        env = {name: os.environ[name] for name in (os.environ if use == "trusted" else keep) if name in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}  # the same result on every run
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0, start_new_session=True
        )
        self.inbox, self.outbox, self.selector = self.process.stdin.fileno(), self.process.stdout.fileno(), selector
        os.set_blocking(self.inbox, False)
        self.unsent, self.received = memoryview(b""), b""
        self.walls: set[str] = set()  # that stand there; none before its first words
        self.use = use
        self.function = ""  # that it has loaded
        self.task: Task | None = None
        self.deadline = time.monotonic() + LOADING  # for its first words
        selector.register(self.outbox, selectors.EVENT_READ, self)

    def send(self, kind: bytes, parts: Sequence[bytes], seconds: float, memory_mb: int) -> None:
        header = HEADER.pack(kind, seconds, memory_mb, *map(len, parts))
        self.unsent = memoryview(b"".join((header, *parts)))
        self.deadline = time.monotonic() + (LOADING if kind == LOAD else seconds + (0 if kind == TRUSTED else GRACE))
        self.selector.register(self.inbox, selectors.EVENT_WRITE, self)

    def write(self) -> None:
        """What the pipe takes now; BrokenPipeError if the worker is dead."""
        self.unsent = self.unsent[os.write(self.inbox, self.unsent) :]
        if not self.unsent:
            self.selector.unregister(self.inbox)

    def read(self) -> dict | None:
        """A whole message, if there is one by now; EOFError if the worker is dead."""
        part = os.read(self.outbox, 2**20)
        if not part:
            raise EOFError
        self.received += part
        if len(self.received) < FRAME.size:
            return None
        size = FRAME.size + FRAME.unpack(self.received[: FRAME.size])[0]
        if len(self.received) < size:
            return None
        body, self.received = self.received[FRAME.size : size], b""
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        return message if isinstance(message, dict) else {"error": "its result is no JSON"}

    def end(self) -> None:
        """Kill it; its cells die with their parent."""
        for pipe in (self.inbox, self.outbox):
            if pipe in self.selector.get_map():
                self.selector.unregister(pipe)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        remove(self.folder)


@dataclass
class Task:
    """A job on its way."""

    index: int
    job: Job
    outcome: Any = None
    loading: bool = False
    orphaned: bool = False  # its worker died; the second time it is the job's own doing


class Pool:
    """`workers` processes for each use of them (default: one a core, at least 2, started when they are needed). One
    `map` at a time: other threads wait for it."""

    def __init__(self, workers: int | None = None):
        if workers is not None and workers < 1:
            raise InputError(f"Pool: workers must be at least 1, not {workers}.")
        self.size = workers or max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker] = []
        self.waiting: dict[str, deque[Task]] = {}
        self.stillborn = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        while self.workers:
            self.workers.pop().end()

    def map(
        self,
        jobs: Sequence[Job],
        seconds: float,
        memory_mb: int = 1024,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Any | Exception]:
        """The result of each job, or a TimeoutError if it took longer than `seconds`, or a ChildError.

        InputError if a function cannot be loaded, or if programs shall run where the walls do not stand.
        """
        with self.lock:
            return self._map(jobs, seconds, memory_mb, progress)

    def _map(self, jobs, seconds, memory_mb, progress) -> list[Any | Exception]:
        self.waiting = {job.use: deque() for job in jobs}
        for i, job in enumerate(jobs):
            self.waiting[job.use].append(Task(i, job))
        outcomes: list[Any] = [None] * len(jobs)
        done = 0
        try:
            while done < len(jobs):
                self._deal(seconds, memory_mb)
                for task in self._step():
                    outcomes[task.index], done = task.outcome, done + 1
                    if progress:
                        progress(done, len(jobs))
        except BaseException:  # a Ctrl-C, too: what is under way is of no use any more
            for worker in [w for w in self.workers if w.task]:
                self._drop(worker)
            raise
        return [_named(outcome, seconds) for outcome in outcomes]

    def _deal(self, seconds: float, memory_mb: int) -> None:
        """Give every idle worker a job."""
        for use, waiting in self.waiting.items():
            free = sum(worker.use == use and not worker.task for worker in self.workers)
            room = self.size - sum(worker.use == use for worker in self.workers)
            self.workers += [Worker(self.selector, use) for _ in range(min(room, len(waiting) - free))]
        for worker in self.workers:
            waiting = self.waiting.get(worker.use)
            if not waiting or worker.task or not worker.walls:
                continue
            worker.task = task = waiting.popleft()
            job = task.job
            if job.kind == TESTS and not {"files", "network"} <= worker.walls:
                raise InputError(
                    "programs that a model wrote run only where Linux can shut them in (Landlock, from kernel 5.13 on, "
                    f"and seccomp); this machine has but: {', '.join(sorted(worker.walls))}"
                )
            task.loading = bool(job.function) and worker.function != job.function and job.kind != LOAD
            if job.kind == LOAD or task.loading:
                worker.function = job.function
                worker.send(LOAD, (job.function.encode(), b""), LOADING, memory_mb)
            else:
                worker.send(job.kind, job.parts, seconds, memory_mb)
            worker.limits = seconds, memory_mb

    def _step(self) -> list[Task]:
        """Wait for something to happen; the tasks that it ended."""
        now = time.monotonic()
        first = min((w.deadline for w in self.workers if w.task or not w.walls), default=now)
        ended = []
        for key, _ in self.selector.select(max(0.0, first - now)):
            worker = key.data
            if worker not in self.workers:  # dropped a moment ago
                continue
            try:
                if key.fd == worker.inbox:
                    worker.write()
                elif message := worker.read():
                    ended += self._hear(worker, message)
            except (EOFError, BrokenPipeError):
                ended += self._drop(worker, {"error": "its process died"})
        for worker in [w for w in self.workers if (w.task or not w.walls) and time.monotonic() > w.deadline]:
            ended += self._drop(worker, {"timeout": True})
        return ended

    def _hear(self, worker: Worker, message: dict) -> list[Task]:
        task = worker.task
        if task is None:  # its first words
            worker.walls, self.stillborn = set(message["walls"]), 0
            return []
        if task.loading or task.job.kind == LOAD:
            if "error" in message:
                worker.task, worker.function = None, ""
                raise InputError(f"{task.job.function} cannot be loaded ({message['error']}): correct it")
            if task.loading:
                task.loading = False
                worker.send(task.job.kind, task.job.parts, *worker.limits)
                return []
        worker.task = None
        task.outcome = message
        return [task]

    def _drop(self, worker: Worker, outcome: dict | None = None) -> list[Task]:
        """Kill a worker; `_deal` starts another."""
        self.workers.remove(worker)
        worker.end()
        self.stillborn += not worker.walls
        if self.stillborn == STILLBORN:
            raise InputError(
                f"{STILLBORN} processes of the sandbox in a row could not be started: see what they printed"
            )
        task = worker.task
        if task is None or outcome is None:
            return []
        if "error" in outcome and not task.orphaned:
            task.orphaned, task.loading = True, False
            self.waiting[worker.use].appendleft(task)
            return []
        if task.loading:
            what = "the process died" if "error" in outcome else f"it took longer than {LOADING:g} s"
            raise InputError(f"{task.job.function} cannot be loaded ({what}): correct it")
        task.outcome = outcome
        return [task]


def _named(outcome: dict, seconds: float) -> Any | Exception:
    if "timeout" in outcome:
        return TimeoutError(f"no result within {seconds:g} s")
    if "error" in outcome:
        return ChildError(str(outcome["error"]))
    return outcome.get("value")


_shared: list[Pool] = []


def shared() -> Pool:
    """The process's own pool, which ends with it."""
    if not _shared:
        _shared.append(Pool())
        atexit.register(_shared[0].close)
    return _shared[0]


def call_each(
    function: str,
    arguments: Sequence[Sequence | dict],
    seconds: float,
    memory_mb: int = 2048,
    trusted: bool = False,
) -> list[Any | Exception]:
    """function(*args), or function(**args) for a dict, for each of the arguments, in the shared pool."""
    jobs = [
        Job.call(function, kwargs=a, trusted=trusted) if isinstance(a, dict) else Job.call(function, a, trusted=trusted)
        for a in arguments
    ]
    return shared().map(jobs, seconds, memory_mb)


def load(function: str, trusted: bool = False) -> None:
    """InputError if the function cannot be loaded; nothing of it is imported here."""
    (outcome,) = shared().map([Job(LOAD, function=function, trusted=trusted)], LOADING)
    if isinstance(outcome, Exception):
        raise InputError(f"{function} cannot be loaded ({outcome}): correct it")
