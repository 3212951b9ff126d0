"""Run jobs in a pool of workers outside the trainer, so that no function and no program can hang it or harm it.

A worker that does not answer in time is killed with all its processes and replaced; one that dies is replaced. The
results come back in the order of the jobs, with an exception where there is none. Jobs and results are JSON: nothing
that comes back is unpickled or run.
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
from minirl.judge.folder import remove
from minirl.judge.messages import FRAME
from minirl.judge.worker import CALL, GRACE, HEADER, LOAD, LOADING, TESTS, TRUSTED

STILLBORN = 5  # workers in a row that die before their first message: then the machine is at fault, not a job


class ChildError(RuntimeError):
    """Stand in place of a result: the function raised, or its process died; the message says which."""


@dataclass(frozen=True)
class Job:
    """Say what a worker is to do: load a function, call it, or test a program."""

    kind: bytes
    parts: tuple[bytes, bytes] = (b"", b"")
    function: str = ""
    trusted: bool = False

    @property
    def use(self) -> str:
        """Return which workers may take this job. Each has one use, so that nothing that a function leaves behind in
        its process reaches a program or its tests, and nothing of a trusted function reaches another."""
        return "trusted" if self.trusted else "tests" if self.kind == TESTS else "calls"

    @classmethod
    def call(cls, function: str, args: Sequence = (), kwargs: dict | None = None, trusted: bool = False) -> "Job":
        """Call `function`, "package.module:name" or "path/to/file.py:name". A trusted one has a time limit but no
        walls, and this process's environment."""
        arguments = json.dumps([list(args), kwargs or {}]).encode()
        return cls(TRUSTED if trusted else CALL, (arguments, b""), function, trusted)

    @classmethod
    def tests(cls, program: str, tests: str, helpers: str = "", entry: str = "") -> "Job":
        """Test a program; see `minirl.judge.tester` for what the parts mean."""
        parts = json.dumps({"helpers": helpers, "tests": tests, "entry": entry})
        return cls(TESTS, (program.encode(errors="replace"), parts.encode()))


class WorkerProcess:
    """Hold the trainer's end of a worker process: its pipes, and the job that it works on."""

    def __init__(self, selector: selectors.BaseSelector, use: str):
        program = Path(__file__).with_name("worker.py")
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="minirl-"))  # where its cells may write
        settings = json.dumps([[p or os.getcwd() for p in sys.path], self.folder, use])
        # -P and -s: neither the script's folder nor the user's packages hide a module; -I would ignore PYTHONHASHSEED
        command = [sys.executable, "-P", "-s", str(program)]
        # Keys and tokens in the environment are kept from code that is not trusted.
        keep = ("TMPDIR", "LD_LIBRARY_PATH", *(("PATH", "CUDA_VISIBLE_DEVICES") if use == "calls" else ()))
        env = {name: os.environ[name] for name in (os.environ if use == "trusted" else keep) if name in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}  # the same result on every run
        env["MALLOC_ARENA_MAX"] = "2"  # one for each thread would take 64 MB of the address space that is limited
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0, start_new_session=True
        )
        self.inbox, self.outbox, self.selector = self.process.stdin.fileno(), self.process.stdout.fileno(), selector
        os.set_blocking(self.inbox, False)
        self.unsent, self.received = memoryview(f"{settings}\n".encode()), b""
        self.walls: set[str] = set()  # that its machine has; empty until its first message
        self.use = use
        self.function = ""  # the one that it has loaded
        self.assignment: Assignment | None = None
        self.deadline = time.monotonic() + LOADING  # for its first message
        selector.register(self.outbox, selectors.EVENT_READ, self)
        selector.register(self.inbox, selectors.EVENT_WRITE, self)

    def send(self, kind: bytes, parts: Sequence[bytes], seconds: float, memory_mb: int) -> None:
        """Queue a message for the worker and set its deadline."""
        header = HEADER.pack(kind, seconds, memory_mb, *map(len, parts))
        self.unsent = memoryview(b"".join((header, *parts)))
        self.deadline = time.monotonic() + (LOADING if kind == LOAD else seconds + (0 if kind == TRUSTED else GRACE))
        self.selector.register(self.inbox, selectors.EVENT_WRITE, self)

    def write(self) -> None:
        """Write as much as the pipe takes now; BrokenPipeError if the worker is dead."""
        self.unsent = self.unsent[os.write(self.inbox, self.unsent) :]
        if not self.unsent:
            self.selector.unregister(self.inbox)

    def read(self) -> dict | None:
        """Return a whole message, or None until there is one; EOFError if the worker is dead."""
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
        """Kill it and remove its folder; its cells die with their parent."""
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
class Assignment:
    """Follow a job through the pool."""

    index: int
    job: Job
    outcome: Any = None
    loading: bool = False
    orphaned: bool = False  # its worker died once; if another dies too, the job itself is the cause


class Pool:
    """Keep up to `workers` processes for each use of them (default: one a core, at least 2), started when needed. One
    `map` runs at a time: other threads wait for it."""

    def __init__(self, workers: int | None = None):
        if workers is not None and workers < 1:
            raise InputError(f"Pool: workers must be at least 1, not {workers}.")
        self.size = workers or max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        self.selector = selectors.DefaultSelector()
        self.workers: list[WorkerProcess] = []
        self.waiting: dict[str, deque[Assignment]] = {}
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
        """Return for each job its result, a TimeoutError if it took longer than `seconds`, or a ChildError. Call
        `progress(done, total)` after each.

        InputError if a function cannot be loaded, or if programs are to run on a machine without the walls for them.
        """
        with self.lock:
            return self._map(jobs, seconds, memory_mb, progress)

    def _map(self, jobs, seconds, memory_mb, progress) -> list[Any | Exception]:
        self.waiting = {job.use: deque() for job in jobs}
        for i, job in enumerate(jobs):
            self.waiting[job.use].append(Assignment(i, job))
        outcomes: list[Any] = [None] * len(jobs)
        done = 0
        try:
            while done < len(jobs):
                self._deal(seconds, memory_mb)
                for assigned in self._step():
                    outcomes[assigned.index], done = assigned.outcome, done + 1
                    if progress:
                        progress(done, len(jobs))
        except BaseException:  # also Ctrl-C: the results of the jobs at work are no longer wanted
            for worker in [w for w in self.workers if w.assignment]:
                self._drop(worker)
            raise
        return [_result_or_error(outcome, seconds) for outcome in outcomes]

    def _deal(self, seconds: float, memory_mb: int) -> None:
        """Start the workers that are missing and give every idle one a job."""
        for use, waiting in self.waiting.items():
            free = sum(worker.use == use and not worker.assignment for worker in self.workers)
            room = self.size - sum(worker.use == use for worker in self.workers)
            self.workers += [WorkerProcess(self.selector, use) for _ in range(min(room, len(waiting) - free))]
        for worker in self.workers:
            waiting = self.waiting.get(worker.use)
            if not waiting or worker.assignment or not worker.walls:
                continue
            worker.assignment = assigned = waiting.popleft()
            job = assigned.job
            if job.kind == TESTS and not {"files", "network"} <= worker.walls:
                raise InputError(
                    "programs that a model wrote run only where Linux can shut them in (Landlock, from kernel 5.13 on, "
                    f"and seccomp); this machine has but: {', '.join(sorted(worker.walls))}"
                )
            assigned.loading = bool(job.function) and worker.function != job.function and job.kind != LOAD
            if job.kind == LOAD or assigned.loading:
                worker.function = job.function
                worker.send(LOAD, (job.function.encode(), b""), LOADING, memory_mb)
            else:
                worker.send(job.kind, job.parts, seconds, memory_mb)
            worker.limits = seconds, memory_mb

    def _step(self) -> list[Assignment]:
        """Wait until a pipe is ready or a deadline is over; return what has ended."""
        now = time.monotonic()
        first = min((w.deadline for w in self.workers if w.assignment or not w.walls), default=now)
        ended = []
        for key, _ in self.selector.select(max(0.0, first - now)):
            worker = key.data
            if worker not in self.workers:  # dropped earlier in this loop
                continue
            try:
                if key.fd == worker.inbox:
                    worker.write()
                elif (message := worker.read()) and "failed" in message:
                    ended += self._drop(worker, {"error": message["failed"]})
                elif message:
                    ended += self._hear(worker, message)
            except (EOFError, BrokenPipeError):
                ended += self._drop(worker, {"error": "its process died"})
        for worker in [w for w in self.workers if (w.assignment or not w.walls) and time.monotonic() > w.deadline]:
            ended += self._drop(worker, {"timeout": True})
        return ended

    def _hear(self, worker: WorkerProcess, message: dict) -> list[Assignment]:
        """Handle a message of a worker; return what it ends, if anything."""
        assigned = worker.assignment
        if assigned is None:  # its first message
            worker.walls, self.stillborn = set(message["walls"]), 0
            return []
        if assigned.loading or assigned.job.kind == LOAD:
            if "error" in message:
                worker.assignment, worker.function = None, ""
                raise InputError(f"{assigned.job.function} cannot be loaded ({message['error']}): correct it")
            if assigned.loading:
                assigned.loading = False
                worker.send(assigned.job.kind, assigned.job.parts, *worker.limits)
                return []
        worker.assignment = None
        assigned.outcome = message
        return [assigned]

    def _drop(self, worker: WorkerProcess, outcome: dict | None = None) -> list[Assignment]:
        """Kill a worker and return what this ends, if anything; `_deal` starts another worker."""
        self.workers.remove(worker)
        worker.end()
        self.stillborn += not worker.walls
        if self.stillborn == STILLBORN:
            raise InputError(
                f"{STILLBORN} processes of the sandbox in a row could not be started: see what they printed"
            )
        assigned = worker.assignment
        if assigned is None or outcome is None:
            return []
        if "error" in outcome and not assigned.orphaned:
            assigned.orphaned, assigned.loading = True, False
            self.waiting[worker.use].appendleft(assigned)
            return []
        if assigned.loading:
            what = "the process died" if "error" in outcome else f"it took longer than {LOADING:g} s"
            raise InputError(f"{assigned.job.function} cannot be loaded ({what}): correct it")
        assigned.outcome = outcome
        return [assigned]


def _result_or_error(outcome: dict, seconds: float) -> Any | Exception:
    """Return the value of a worker's message, or the exception that it stands for."""
    if "timeout" in outcome:
        return TimeoutError(f"no result within {seconds:g} s")
    if "error" in outcome:
        return ChildError(str(outcome["error"]))
    return outcome.get("value")


_shared: list[Pool] = []


def shared() -> Pool:
    """Return the pool of this process, which ends with it."""
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
    """Return function(*args), or function(**args) for a dict, for each of the arguments, from the shared pool; see
    `Pool.map` for what stands where there is no result."""
    calls = [((), args) if isinstance(args, dict) else (args, None) for args in arguments]
    return shared().map([Job.call(function, *call, trusted) for call in calls], seconds, memory_mb)


def load(function: str, trusted: bool = False) -> None:
    """Load the function in a worker; InputError if that fails. Nothing of it is imported here."""
    (outcome,) = shared().map([Job(LOAD, function=function, trusted=trusted)], LOADING)
    if isinstance(outcome, Exception):
        raise InputError(f"{function} cannot be loaded ({outcome}): correct it")
