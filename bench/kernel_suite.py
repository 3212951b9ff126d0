"""Run the suite `kernels`: every operation at every shape, minirl beside its rivals and the limit of the device, which
is measured in the same run.

Minimal traffic is passes · N · V · bytes of a logit (statistics read the logits once; log-probs with their gradient
read twice and write once; the fused loss reads once, its second sweep coming from the cache, and writes once). Minimal
arithmetic of a head is three products, 6·N·V·D, of the rows that have a gradient. The limit is that traffic at the rate
of a copy, or the time of those products.
"""

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench import common, measure, operations
from bench.operations import OPERATIONS, Inputs, Shape

MAIN = ("stats", "logprobs", "policy", "linear_logprobs", "linear_policy", "linear_policy_half", "sample")
MAIN += ("sample_top_p", "gae")
SWEPT = ("policy", "linear_policy")
DRAWS = 1024  # rows of a sampling step at most


class Plan(NamedTuple):
    """The shapes to measure, the time for each, and the rivals to leave out."""

    shapes: list[Shape]
    by_vocab: list[Shape]
    by_rows: list[Shape]
    scan: Shape  # sequences and their length; no vocabulary
    rounds: int
    budget: float  # seconds of timing an operation
    leave_out: dict[str, str]  # rival to reason
    leave_out_of_sweeps: dict[str, str]


def plan(device: torch.device, quick: bool) -> Plan:
    """Choose real vocabularies on a GPU, and small shapes on a CPU, whose results hold for a CPU only."""
    late = {"compile": "left out by --quick"} if quick else {}
    swept = {"compile": "not in the sweeps: it would compile for every point"}
    if device.type == "cuda":
        shapes = [Shape(8192, 151_936, 1536, 16), Shape(8192, 128_256, 2048, 16), Shape(8192, 49_152, 576, 16)]
        by_vocab = [Shape(4096, v, 1024, 16) for v in (16_384, 32_768, 65_536, 131_072, 262_144)]
        by_rows = [Shape(n, 151_936, 1024, 16) for n in (512, 1024, 2048, 4096, 8192, 16384)]
        scan = Shape(256 * 1024, 0, 0, 256)
        return Plan(shapes[:1] if quick else shapes, by_vocab, by_rows, scan, 10 if quick else 20, 3.0, late, swept)
    if quick:
        peers = {"Liger": "left out by --quick", "TRL": "left out by --quick"}
        by_vocab = [Shape(128, v, 128) for v in (2048, 8192, 32_768)]
        by_rows = [Shape(n, 8192, 128) for n in (64, 256, 1024)]
        return Plan([Shape(256, 16_384, 128)], by_vocab, by_rows, Shape(32 * 128, 0, 0, 32), 5, 1.0, late, late | peers)
    by_vocab = [Shape(256, v, 256) for v in (8192, 16_384, 32_768, 65_536, 131_072)]
    by_rows = [Shape(n, 32_768, 256) for n in (64, 128, 256, 512, 1024)]
    shapes = [Shape(1024, 49_152, 576), Shape(512, 151_936, 896)]
    return Plan(shapes, by_vocab, by_rows, Shape(256 * 512, 0, 0, 256), 7, 8.0, late, swept)


class Bench:
    """The device, its clock and its copy rate."""

    def __init__(self, device: torch.device, plan: Plan):
        self.device, self.plan = device, plan
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.clock = measure.Clock(device)
        self.copy_rate = measure.copy_rate(self.clock, device, plan.rounds)
        self.products: dict[Shape, dict[str, float]] = {}

    def shape_of(self, name: str, shape: Shape) -> Shape:
        if name == "gae":
            return self.plan.scan
        return shape._replace(rows=min(shape.rows, DRAWS)) if name.startswith("sample") else shape

    def measure(self, name: str, shape: Shape, leave_out: dict[str, str]) -> dict:
        """Measure one operation at one shape: time, memory and errors of every rival, or the reason why it has none."""
        operation, shape = OPERATIONS[name], self.shape_of(name, shape)
        x = operations.make_inputs(operation.kind, shape, self.device, self.dtype, operation.silent)
        exact = operations.exact(name, x)
        record = {"operation": name, "title": operation.title, "shape": shape._asdict(), "dtype": str(self.dtype)}
        record |= self._limit(operation, x)
        rivals, runs = {}, {}
        for rival, make in operation.rivals.items():
            rivals[rival], run = self._warm(rival, make, x, exact, leave_out)
            if run is not None:
                runs[rival] = run
        for rival in runs:
            rivals[rival]["memory"] = self._memory(name, rival, shape, runs[rival])
        for rival, seconds in measure.time_rivals(runs, self.clock, self.plan.rounds, self.plan.budget).items():
            rivals[rival] |= {"seconds": seconds} | _rates(record, seconds["median"])
        return record | {"rivals": rivals}

    def _warm(self, rival: str, make: Callable, x: Inputs, exact: dict, leave_out: dict) -> tuple[dict, object]:
        """Run a rival once; return its errors and the run, or the reason why it cannot be measured and None."""
        if rival in leave_out:
            return {"reason": leave_out[rival]}, None
        try:
            run = make(x)
            _restoring(run, x)
            measure.reset(run)
            return {"errors": measure.error_of(run(), exact)}, run
        except operations.Unavailable as reason:
            return {"reason": str(reason)}, None
        except Exception as error:
            common.progress(f"  {rival} failed: {measure.sentence(error)}")
            return {"reason": measure.sentence(error), "failed": True}, None

    def _memory(self, name: str, rival: str, shape: Shape, run) -> int | str:
        """Return the bytes at the peak above the inputs, or the error of a child process that failed."""
        if self.clock.cuda:
            return measure.peak_on_gpu(run)
        try:
            return measure.in_child(memory_of, name, rival, shape, self.dtype)
        except RuntimeError as error:
            return str(error)

    def _limit(self, operation: operations.Operation, x: Inputs) -> dict:
        n, v, d, _ = x.shape
        if operation.passes:
            size = int(operation.passes * n * v * self.dtype.itemsize)
            return {"minimal_bytes": size, "limit_seconds": size / self.copy_rate, "gradients": 0}
        if not operation.products:
            return {}
        if x.shape not in self.products:
            self.products[x.shape] = measure.head_products(self.clock, x.hidden, x.weight, self.plan.rounds)
        whole = sum(self.products[x.shape].values())
        size = (n + v) * d * self.dtype.itemsize
        limit = {"minimal_flop": operation.products * 2 * n * v * d, "limit_seconds": whole * operation.products / 3}
        return limit | {"product_seconds": self.products[x.shape], "gradients": size}


def _restoring(run, x: Inputs) -> None:
    """Make a run's `reset` restore the logits too, which another rival may have overwritten."""
    own = getattr(run, "reset", None)

    def reset():
        if x.saved is not None:
            x.logits.detach().copy_(x.saved)
        if own is not None:
            own()

    run.reset = reset


def memory_of(name: str, rival: str, shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of a rival's run on a CPU; to be called in a process of its own."""
    operation = OPERATIONS[name]
    x = operations.make_inputs(operation.kind, shape, torch.device("cpu"), dtype, operation.silent)
    return measure.peak_here(operation.rivals[rival](x))


def _rates(record: dict, seconds: float) -> dict:
    rates = {}
    if "minimal_bytes" in record:
        rates["bytes_per_s"] = record["minimal_bytes"] / seconds
    if "minimal_flop" in record:
        rates["flop_per_s"] = record["minimal_flop"] / seconds
    return rates | ({"share": record["limit_seconds"] / seconds} if "limit_seconds" in record else {})


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(bench: Bench, only: str | None, save: Callable[[dict], None]) -> dict:
    """Measure everything and return the records; `save` gets those so far after each shape."""
    result = {"copy_bytes_per_s": bench.copy_rate, "records": [], "by_vocab": [], "by_rows": []}
    common.progress(f"copy: {bench.copy_rate / 1e9:.1f} GB/s")
    names = [name for name in MAIN if only in (None, name)]
    for i, shape in enumerate(bench.plan.shapes):
        for name in names:
            if name == "gae" and i:
                continue  # has no vocabulary
            torch._dynamo.reset()  # every shape is compiled for itself
            result["records"].append(_shown(bench, name, shape, bench.plan.leave_out))
        save(result)
    for axis in ("by_vocab", "by_rows"):
        for shape in getattr(bench.plan, axis):
            for name in SWEPT:
                if only in (None, name):
                    result[axis].append(_shown(bench, name, shape, bench.plan.leave_out_of_sweeps, axis))
        save(result)
    return result


def _shown(bench: Bench, name: str, shape: Shape, leave_out: dict, axis: str = "") -> dict:
    common.progress(f"{axis} {name}  {bench.shape_of(name, shape)}".strip())
    record = bench.measure(name, shape, leave_out)
    gc.collect()
    if bench.clock.cuda:
        torch.cuda.empty_cache()
    if not axis:
        print(table(record), end="\n\n", flush=True)
    return record


def table(record: dict) -> str:
    """Return the table of an operation at one shape, with a line for each rival."""
    shape = Shape(**record["shape"])
    where = f"sequences: {shape.sequences}, T {shape.rows // shape.sequences}" if not shape.vocab else str(shape)
    title = f"{record['title']}; {where}, {record['dtype'].removeprefix('torch.')}"
    if "limit_seconds" in record:
        title += f"; limit {record['limit_seconds'] * 1e3:.3g} ms"
    head = ("", "ms", "p20", "p80", "minirl is", "of the limit", "GB/s", "TFLOP/s", "peak MB", "worst error")
    ours = record["rivals"]["minirl"].get("seconds", {}).get("median")
    lines = [(rival, *_cells(numbers, ours)) for rival, numbers in record["rivals"].items() if "seconds" in numbers]
    text = f"{title}\n{common.table(head, lines)}"
    return "\n".join([text, *(f"{k}: {v['reason']}" for k, v in record["rivals"].items() if "reason" in v)])


def _cells(numbers: dict, ours: float | None) -> tuple[str, ...]:
    t, memory, errors = numbers["seconds"], numbers["memory"], numbers["errors"]
    times = tuple(f"{t[q] * 1e3:.3f}" for q in ("median", "p20", "p80"))
    gain = f"{t['median'] / ours:.2f} x" if ours else "-"
    share = f"{numbers['share']:.0%}" if "share" in numbers else "-"
    rates = (_scaled(numbers, "bytes_per_s", 1e9), _scaled(numbers, "flop_per_s", 1e12))
    worst = max((f"{value:.1e} {name}" for name, value in errors.items() if ":" not in name), default="-", key=_leading)
    return (*times, gain, share, *rates, memory if isinstance(memory, str) else f"{memory / 1e6:.0f}", worst)


def _leading(text: str) -> float:
    return float(text.split()[0])


def _scaled(numbers: dict, name: str, unit: float) -> str:
    return f"{numbers[name] / unit:.3g}" if name in numbers else "-"
