"""Running a reward function where it can be killed: it may hang (`9**9**9**9`), exhaust memory or take the process
down.

The work happens in a forked child, so the function and its data need no pickling; results come back as JSON, so nothing
that the child was talked into runs here. The child must not touch the GPU. This bounds time and memory; it is no
security boundary: code that must not reach files or the network needs a container.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Sequence
from typing import Any


class ChildError(RuntimeError):
    """The function raised, or its process died; the message says which."""


def call_with_timeout(function: Callable, args: tuple, seconds: float, memory_mb: int = 2048) -> Any:
    """function(*args) in a child process that is killed after `seconds`.

    The result must fit in JSON (numbers, texts, lists, dicts). Raises TimeoutError, or ChildError if the function
    raises or its process dies.
    """
    (outcome,) = map_with_timeout(function, [args], seconds, memory_mb)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def map_with_timeout(
    function: Callable, arguments: Sequence[tuple], seconds: float, memory_mb: int = 2048
) -> list[Any | Exception]:
    """[function(*args) for args in arguments], `seconds` for each; a failure stands in its place as a TimeoutError or a
    ChildError.

    One child does all the calls; a new one takes over after a call that had to be killed.
    """
    outcomes = []
    while len(outcomes) < len(arguments):
        outcomes += _run_child(function, arguments[len(outcomes) :], seconds, memory_mb)
    return outcomes


def _run_child(function, arguments, seconds, memory_mb) -> list:
    """Outcomes up to the first call that hangs or kills its process, that call included."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    cpu_seconds = math.ceil(seconds * len(arguments)) * os.cpu_count() + 1
    child = context.Process(target=_work, args=(function, arguments, sender, cpu_seconds, memory_mb))
    child.start()
    sender.close()  # else the end of the child would not read as the end of the pipe
    outcomes = []
    try:
        while len(outcomes) < len(arguments):
            if not receiver.poll(seconds):
                return [*outcomes, TimeoutError(f"no result within {seconds:g} s")]
            message = json.loads(receiver.recv_bytes())
            outcomes.append(ChildError(message["error"]) if "error" in message else message["value"])
    except EOFError:
        child.join(timeout=1)
        outcomes.append(ChildError(f"the death of its process (exit code {child.exitcode})"))
    finally:
        _kill(child)
        receiver.close()
    return outcomes


def _work(function, arguments, sender, cpu_seconds: int, memory_mb: int) -> None:
    os.setsid()  # a process group of its own: children of the function die with it
    _limit(cpu_seconds, memory_mb)
    for args in arguments:
        try:
            message = json.dumps({"value": function(*args)}, default=_plain)
        except BaseException as error:
            message = json.dumps({"error": f"{type(error).__name__}: {error}"})
        sender.send_bytes(message.encode())


def _limit(cpu_seconds: int, memory_mb: int) -> None:
    # The time limit is for the case that the parent is killed first: an endless loop must not outlive it for ever.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        limit = in_use + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _plain(value):
    """numpy and torch numbers and arrays as plain ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result of type {type(value).__name__} does not fit in JSON")


def _kill(child) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # killed before it had its own group, or gone
        child.kill()
    child.join()
