"""Helpers of the benchmarks: checks before a run, a description of the machine, medians, tables. Imports no torch.

A process that starts another must stay small: at the fork Linux counts its memory in the child's `ru_maxrss`.
Importing this file finds minirl in this repository where it is not installed (`kernels/` is `minirl.kernels`).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss
PACKAGES = ("minirl", "torch", "triton", "transformers", "trl", "liger_kernel")

if importlib.util.find_spec("minirl") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("minirl.kernels") is None:
    import minirl

    minirl.__path__.append(str(ROOT))

Report = Callable[..., None]  # passes one event, keyword arguments, to the process that started this one


def arguments(doc: str, repeats: str, times: int) -> argparse.ArgumentParser:
    """Make the parser with the options that the scripts share. `repeats` names what --repeats counts."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", default="models/smollm2", help="a Hugging Face directory (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    add("--repeats", type=int, default=times, help=f"{repeats} (default: %(default)s)")
    add("--json", metavar="PATH", help="write every number there")
    return parser


def at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **limits: int) -> None:
    for name, limit in limits.items():
        if getattr(args, name) < limit:
            parser.error(f"--{name.replace('_', '-')} must be at least {limit}, not {getattr(args, name)}")


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake in its input ends it with the sentence that says so."""
    from minirl.errors import InputError

    try:
        main()
    except (InputError, RuntimeError) as error:
        sys.exit(str(error))


def need(*packages: str) -> None:
    """End the program with one sentence where a peer is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: this comparison needs `pip install 'minirl[peers]'`")


def need_checkpoint(path: str) -> None:
    """End the program with one sentence on how to make a checkpoint where there is none."""
    if not (Path(path) / "config.json").is_file():
        sys.exit(f"{path} holds no checkpoint: make one with `python examples/gguf_to_hf.py smollm2 {path}`")


def machine(device: str) -> dict:
    """Return the processor, package versions and `device` (a name of what the work ran on) that a reader needs."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = {"cpu": _cpu_field("model name") or platform.processor() or platform.machine(), "cores": cores}
    # Without AMX a CPU may multiply bf16 matrices slower than fp32 ones: the dtypes then compare the other way round.
    cpu["amx"] = "amx_bf16" in (_cpu_field("flags") or "").split()
    return {**cpu, "device": device, "python": platform.python_version(), **versions}


def describe(machine: dict) -> str:
    """Return one line that describes the machine."""
    amx = "with AMX" if machine["amx"] else "without AMX"
    words = [f"{machine['cpu']} {amx}, {machine['cores']} cores", f"run on {machine['device']}"]
    return ", ".join(words + [f"{name} {machine[name]}" for name in PACKAGES if name in machine])


def _cpu_field(name: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def device_name(device) -> str:
    """Return the name of a torch device for a reader."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU with threads: {torch.get_num_threads()}"


def now(device) -> float:
    """Return seconds on a clock, after all work that a GPU was given has ended."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_gb(device: str = "cpu") -> float:
    """Return this process's peak memory so far in GB: allocated on the GPU where it works on one, else resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio_text(values: Sequence[float]) -> str:
    """Return the median and range of ratios that were measured pair by pair, as text."""
    s = spread(values)
    return f"{s['median']:.2f} (of {len(values)} pairs; {s['min']:.2f} to {s['max']:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a text table: the first column aligned left, the others right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    pad = [str.ljust, *[str.rjust] * (len(head) - 1)]
    return "\n".join("  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)) for line in lines)


def progress(text: str) -> None:
    """Print a line of progress to stderr, so that stdout holds only the results."""
    print(text, file=sys.stderr, flush=True)


def write_json(args: argparse.Namespace, result: dict, path: str | Path | None = None) -> None:
    """Write the measurements and the options that gave them to `path`, or else to the path of --json."""
    path = path or args.json
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"options": vars(args), **result}, indent=2, default=str)
        Path(path).write_text(text + "\n", encoding="utf-8")
        progress(f"wrote {path}")


def reporter(device: str) -> Report:
    """Return the function with which a child process reports: it writes lines of JSON to stdout, and from now on
    nothing else can write there."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    def report(event: str, **values) -> None:
        print(json.dumps({"event": event, "memory_gb": peak_gb(device), **values}), file=events, flush=True)

    return report


def events_of(command: Sequence[str]) -> Iterator[dict]:
    """Yield the reports of a child process as they come; its stderr is shown only where it fails."""
    with tempfile.TemporaryFile("w+") as noise:
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=noise, text=True) as child:
            yield from map(json.loads, child.stdout)
        if child.returncode:
            noise.seek(0)
            sys.exit(f"{noise.read()[-3000:]}\n`{' '.join(command)}` ended with status {child.returncode}")


def minirl(command: str, log: Path | None = None, threads: int | None = None) -> tuple[str, dict]:
    """Run a command of minirl; return its output, CPU seconds, wall seconds and peak memory in GB. With `log` the
    output goes to that file too. A RuntimeError holds the end of the output where the command fails."""
    if log is None:
        with tempfile.TemporaryDirectory() as folder:
            return minirl(command, Path(folder) / "log", threads)
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    began = time.perf_counter()
    with log.open("w") as output:
        args = [sys.executable, "-m", "minirl", *command.split()]
        process = subprocess.Popen(args, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        raise RuntimeError(f"{said[-2000:]}\n`{' '.join(args)}` ended with status {process.returncode}")
    seconds = {"seconds": usage.ru_utime + usage.ru_stime, "wall_seconds": time.perf_counter() - began}
    return said, seconds | {"memory_gb": usage.ru_maxrss * RSS_UNIT / 1e9}


def run_child(command: Sequence[str], name: str) -> dict:
    """Run a child process that reports imported, built, step (several times) and done; return its steps without the
    first one, which warms it up, and its memory at each stage."""
    last, steps = {}, []
    for event in events_of(command):
        last[event["event"]] = event
        if event["event"] == "step":
            steps.append(event)
            progress(f"{name}  step {len(steps)}  {event['seconds']:6.2f} s")
    memory = {stage: last[stage]["memory_gb"] for stage in ("imported", "built", "done")}
    return {"steps": steps[1:], "memory_gb": memory, "device": last["done"]["device"]}
