"""Measure time, memory and the limits of the device, for all benchmarks."""

import ctypes
import gc
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench import common

FLUSH = 1 << 30  # bytes written between two runs on a GPU: no input is left in its cache
MIN_ROUNDS = 3

Run = Callable[[], dict]  # does the work once and returns what it computed, by name


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    x = torch.tensor(seconds, dtype=torch.float64)
    median, p20, p80 = (x.quantile(q).item() for q in (0.5, 0.2, 0.8))
    return {"median": median, "p20": p20, "p80": p80, "rounds": len(seconds)}


def reset(run: Run) -> None:
    """Restore the inputs that a run overwrites, where it has a `reset`."""
    getattr(run, "reset", lambda: None)()


class Clock:
    """A clock that returns the seconds of one run: by events on a GPU, else by the wall. On a GPU the cache is flushed
    first; while that runs, the host can queue the work that is timed."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, run: Run) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def time_rivals(runs: dict[str, Run], clock: Clock, rounds: int, budget: float) -> dict[str, dict[str, float]]:
    """Return quantiles of each run, measured in turns so that noise is shared evenly; the caller has warmed them up.

    It measures as many rounds as fit into `budget` seconds, at most `rounds` and at least MIN_ROUNDS. A run's `reset`
    is called before it and not timed.
    """
    seconds, started = {name: [] for name in runs}, time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - started > budget:
            break
        for name, run in runs.items():
            reset(run)
            seconds[name].append(clock(run))
    return {name: quantiles(x) for name, x in seconds.items()}


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_on_gpu(run: Run) -> int:
    """Return the peak of allocated bytes during a run, above those allocated before it."""
    reset(run)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_here(run: Run) -> int:
    """Return the bytes by which this process grew at most during a run, after a warm-up run (Linux)."""
    reset(run)
    run()
    reset(run)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = status("VmHWM")
    run()
    return status("VmHWM") - before


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def in_child(function: Callable, *args):
    """Return function(*args) of a new process, forked from one that holds nothing but imported packages.

    A RuntimeError tells what it raised, or that it was killed, for example for its memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.operations", "trl.trainer.utils", "liger_kernel.chunked_loss"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(theirs, torch.get_num_threads(), function, args))
    child.start()
    theirs.close()
    try:
        failed, result = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the process ended with code {child.exitcode}") from None
    child.join()
    if failed:
        raise RuntimeError(result)
    return result


def _report(pipe, threads: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    gc.freeze()  # collecting all that was imported would take longer than what is measured
    try:
        pipe.send((False, function(*args)))
    except Exception as error:
        traceback.print_exc()
        pipe.send((True, sentence(error)))


def sentence(error: BaseException) -> str:
    """Return an error in one line of at most 160 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"[:160]


# ---- limits ----------------------------------------------------------------------------------------------------------


def copy_rate(clock: Clock, device: torch.device, rounds: int) -> float:
    """Return bytes a second, reads and writes together, of copying one large buffer to another."""
    size = (2 << 30) if clock.cuda else (256 << 20)
    a, b = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    b.copy_(a)
    best = time_rivals({"copy": lambda: b.copy_(a)}, clock, rounds, 5.0)["copy"]
    return 2 * size / best["median"]


def head_products(clock: Clock, hidden, weight, rounds: int) -> dict[str, float]:
    """Return the seconds of the three products that any loss from hidden states needs: logits [N, V], their gradient
    times the weight [N, D], and its transpose times the hidden states [V, D]; 2NVD operations each."""
    logits = hidden.detach() @ weight.detach().t()
    h, w = hidden.detach(), weight.detach()
    runs = {
        "logits": lambda: torch.mm(h, w.t(), out=logits),
        "d_hidden": lambda: torch.mm(logits, w),
        "d_weight": lambda: torch.mm(logits.t(), h),
    }
    for run in runs.values():
        run()
    return {name: q["median"] for name, q in time_rivals(runs, clock, rounds, 3.0).items()}


def error_of(outputs: dict, exact: dict) -> dict[str, float]:
    """Return the errors of outputs against float64: the largest difference of a log-prob or entropy; for a gradient 1 −
    cosine, and the largest difference over the largest entry."""
    errors = {}
    for name, right in exact.items():
        if name not in outputs:
            continue
        rows = min(len(right), len(outputs[name]))
        got, right = outputs[name].detach()[:rows].double(), right[:rows].double()
        worst = (got - right).abs().max().item()
        if name.startswith("d_"):
            cosine = (got * right).sum().item() / max(got.norm().item() * right.norm().item(), 1e-300)
            errors[f"{name}: 1 - cosine"] = 1 - cosine
            worst /= max(right.abs().max().item(), 1e-300)
        errors[name] = worst if math.isfinite(worst) else math.inf
    return errors


def device_slug(device: torch.device) -> str:
    """Return the name of a results folder: cpu, h200, ..."""
    if device.type == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().replace("nvidia", "").replace("geforce", "").split()
    return "-".join(words) or "cuda"


def machine(device: torch.device) -> dict:
    return common.machine(common.device_name(device)) | {"slug": device_slug(device)}
