"""Put the sandbox under load: random programs, some of which hang.

    python -m bench.sandbox [--candidates 10000] [--hanging 0.05] [--workers 8] [--seconds 0.5]
    python -m bench.sandbox --against ../before --candidates 1000     in turns with another checkout, five of each

It fails unless every candidate has the right outcome and no process and no folder is left.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minirl.judge.pool import Job, Pool

TURNS = 5
HANGS = (
    "while True: pass",
    "import time\ntime.sleep(1000)",
    "def f(x):\n    while True: pass",
    "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
)
FAILS = ("def f(x): return x", "1 / 0", "import os\nos._exit(0)", "def f(", "import os\nos.fork()")


def candidates(count: int, hanging: float, rng: random.Random) -> list[tuple[str, Job]]:
    """Make programs that add a number, each with its expected fate: passes, fails or hangs."""
    found = []
    for _ in range(count):
        n = rng.randint(1, 10**6)
        fate = "hangs" if rng.random() < hanging else rng.choice(("passes", "fails"))
        program = {"hangs": rng.choice(HANGS), "fails": rng.choice(FAILS), "passes": f"def f(x): return x + {n}"}[fate]
        found.append((fate, Job.tests(program, f"assert f(1) == {n + 1}\nassert f({n}) == {2 * n}\n", entry="f")))
    return found


def fate(outcome) -> str:
    if isinstance(outcome, TimeoutError):
        return "hangs"
    return "passes" if isinstance(outcome, dict) and outcome["passed"] else "fails"


def processes() -> int:
    """Count the living descendants of this process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if rest[0] != "Z":
            parents[int(stat.parent.name)] = int(rest[1])
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return len(family) - 1


def compare(args: argparse.Namespace) -> None:
    """Print candidates a minute of this checkout and another, in turns, and the ratio of their medians."""
    options = [f"--{name}={getattr(args, name)}" for name in ("candidates", "hanging", "workers", "seconds")]
    rates: dict[str, list[float]] = {os.getcwd(): [], str(args.against.resolve()): []}
    with tempfile.TemporaryDirectory() as folder:
        for place in [*rates] * TURNS:
            env = os.environ | {"PYTHONPATH": place, "TMPDIR": folder}
            out = Path(folder, "out.json")
            command = [sys.executable, "-m", "bench.sandbox", *options, f"--out={out}"]
            subprocess.run(command, check=True, cwd=place, env=env, stdout=subprocess.DEVNULL)
            rates[place].append(json.loads(out.read_text())["candidates_a_minute"])
            print(place, round(rates[place][-1]), flush=True)
    here, there = map(statistics.median, rates.values())
    print(f"{here:.0f} against {there:.0f} a minute: {here / there:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--hanging", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/sandbox.json"))
    parser.add_argument("--against", type=Path, help="another checkout, to compare with")
    args = parser.parse_args()
    if args.against:
        compare(args)
        return
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp()  # so that what is left is this run's
    jobs = candidates(args.candidates, args.hanging, random.Random(0))
    folders = set(Path(tempfile.gettempdir()).glob("minirl-*"))
    before, started = processes(), time.monotonic()
    with Pool(args.workers) as pool:
        outcomes = pool.map([job for _, job in jobs], args.seconds, 512)
    took = time.monotonic() - started
    wrong = [
        (wanted, fate(outcome)) for (wanted, _), outcome in zip(jobs, outcomes, strict=True) if wanted != fate(outcome)
    ]
    left = processes() - before, len(set(Path(tempfile.gettempdir()).glob("minirl-*")) - folders)
    hung = sum(wanted == "hangs" for wanted, _ in jobs)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        **{name: getattr(args, name) for name in ("candidates", "workers", "seconds")},
        "hanging": hung,
        "minutes": took / 60,
        "candidates_a_minute": len(jobs) / took * 60,
        "lost": sum(outcome is None for outcome in outcomes),
        "wrong": len(wrong),
        "processes_left": left[0],
        "folders_left": left[1],
    }
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["lost"] or wrong or any(left):
        raise SystemExit(f"not as it must be: {wrong[:5]}")


if __name__ == "__main__":
    main()
