"""Measure minirl beside eager PyTorch, torch.compile, Liger, TRL and transformers, and beside the device's limits.

    python -m bench                  every suite, from the root of the repository
    python -m bench kernels --quick  the kernels alone, in a minute
    python -m bench compile          registers, spills and load widths for GPUs that are not here

Results go to bench/results/<device>/: a JSON file a suite, written as soon as the suite is done, and plots.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import common

CHECKPOINT = "models/smollm2"


def arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add(
        "suite",
        nargs="?",
        default="all",
        choices=("compile", "kernels", "train", "sampler", "all"),
        help="(default: %(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    add("--quick", action="store_true", help="fewer shapes and rounds, no torch.compile; not for publishing")
    add("--only", metavar="NAME", help="of the suite kernels: one operation, checks, training_step, or decode_step")
    add("--model", default=CHECKPOINT, help="checkpoint of train and sampler (default: %(default)s)")
    add("--out", metavar="DIR", help="(default: bench/results/<device>, with --quick <device>-quick)")
    return parser.parse_args()


def kernels(args) -> None:
    from bench import kernel_suite, measure, plots, targets
    from minirl.policy import pick_device

    device = pick_device(args.device)
    if device.type == "cpu":
        print("ON A CPU: small shapes in fp32. They say how the ways compare here, and nothing about a GPU.\n")
    host, plan = measure.machine(device), kernel_suite.plan(device, args.quick)
    path = Path(args.out) / "kernels.json"

    def save(result: dict) -> None:
        common.write_json(args, {"machine": host} | result, path)

    known = [*kernel_suite.MAIN, "checks", "training_step", "decode_step"]
    if args.only and args.only not in known:
        sys.exit(f"--only {args.only} is unknown: choose from {', '.join(known)}")
    result = kernel_suite.run(kernel_suite.Bench(device, plan), args.only, save)
    if args.only in (None, "checks"):
        result["checks"] = run_checks(device)
    if args.only in (None, "training_step") and device.type == "cpu":
        result["training_step"] = training_step(args)
    if args.only in (None, "decode_step") and device.type == "cpu":
        result["decode_step"] = decode_step(args)
    reached = targets.judge(result, device.type == "cuda")
    print(common.describe(host))
    print(common.table(("what must hold", "target", "measured", ""), targets.lines(reached)), flush=True)
    save(result | {"targets": [t._asdict() for t in reached]})
    for axis, name in (("by_vocab", "kernels_vs_vocab.png"), ("by_rows", "kernels_vs_rows.png")):
        if result[axis]:
            plots.draw(result[axis], axis, title_of(result[axis], host), Path(args.out) / name)


def title_of(records: list[dict], host: dict) -> str:
    dtype = records[0]["dtype"].removeprefix("torch.")
    fixed = {k: {r["shape"][k] for r in records} for k in ("rows", "vocab", "width")}
    words = [f"{letter} {min(fixed[k])}" for k, letter in zip(fixed, "NVD", strict=True) if len(fixed[k]) == 1]
    return f"{host['device'] if host['slug'] != 'cpu' else host['cpu']}, {dtype}, {', '.join(words)}"


def run_checks(device) -> dict:
    """Return each property with its result, or the reason why it was not measured."""
    from bench import checks, measure

    found = {}
    for name in ("two_runs", "chunk_sizes", "row_orders", "new_compilations", "beyond_32_bits"):
        common.progress(f"check  {name}")
        if device.type == "cpu" and name in ("new_compilations", "beyond_32_bits"):
            found[name] = "not measured: no GPU"
            continue
        try:
            found[name] = getattr(checks, name)(device)
        except Exception as error:
            found[name] = f"not measured: {measure.sentence(error)}"
    return found


def training_step(args) -> dict:
    """Measure peak memory and time of a whole training step on a CPU, each side in a process of its own."""
    from bench.training_step import Size, compare

    size = Size(256, width=128, row=128) if args.quick else Size(4096)
    common.progress(f"training step  {size}")
    result = compare(size, 1 if args.quick else 3)
    rows = [
        (side, f"{s['seconds']['median']:.2f}", f"{s['peak'] / 1e9:.2f}", f"{s['built'] / 1e9:.2f}", f"{s['loss']:.6f}")
        for side, s in result["sides"].items()
    ]
    print(f"training step on a CPU; {size}")
    print(common.table(("", "s", "peak GB", "before it", "loss"), rows), end="\n\n", flush=True)
    return result


def decode_step(args) -> dict:
    """Time the parts of a decode step on a CPU, and the share of top-p sampling."""
    from bench.decode_step import Size, compare

    size = Size(64, vocab=4096, layers=2) if args.quick else Size()
    common.progress(f"decode step  {size}")
    result = compare(size, 3 if args.quick else 15)
    rows = [(part, *(f"{s[q] * 1e3:.1f}" for q in ("median", "p20", "p80"))) for part, s in result["parts"].items()]
    print(f"decode step on a CPU; {size}; top-p sampling is {result['top_p_share']:.1%} of it")
    print(common.table(("", "ms", "p20", "p80"), rows), end="\n\n", flush=True)
    return result


def compile_suite(args) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("compile needs a process without TRITON_INTERPRET=1: unset it")
    import torch

    from bench import compiled, measure

    result = {"machine": measure.machine(torch.device("cpu"))} | compiled.suite(args)
    common.write_json(args, result, Path(args.out) / "compile.json")
    if result["failures"]:
        sys.exit(1)


def script(name: str, *options: str) -> None:
    """Run one of the scripts in this folder in a process of its own."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name(name)), *options], cwd=common.ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def train(args) -> None:
    short = ("--repeats", "1", "--steps", "2") if args.quick else ()
    script("grpo_step_vs_trl.py", args.model, "--device", args.device, "--json", f"{args.out}/grpo_step.json", *short)


def sampler(args) -> None:
    short = ("--repeats", "1") if args.quick else ()
    options = ("--device", args.device, "--json", f"{args.out}/sampler.json", *short)
    script("sampler_vs_transformers.py", args.model, *options)
    if not args.quick:
        script("parity_with_transformers.py", args.model)


class Suite(NamedTuple):
    run: Callable[[argparse.Namespace], None]
    needs: tuple[str, ...]  # packages that minirl itself does without
    checkpoint: bool = False


SUITES = {
    "compile": Suite(compile_suite, ("triton",)),
    "kernels": Suite(kernels, ("matplotlib",)),
    "train": Suite(train, ("transformers", "trl"), True),
    "sampler": Suite(sampler, ("transformers",), True),
}


def need(suite: Suite, args) -> None:
    """End the program with one sentence where a suite cannot run."""
    common.need(*suite.needs)
    if suite.checkpoint:
        common.need_checkpoint(args.model)


def run_all(args) -> None:
    """Run every suite in a process of its own. One that cannot run here is named, and the others go on."""
    failed = []
    for name, suite in SUITES.items():
        started = time.perf_counter()
        common.progress(f"---- {name}")
        try:
            need(suite, args)
        except SystemExit as stop:
            common.progress(f"{name} is left out: {stop.code}")
            continue
        if subprocess.run([sys.executable, "-m", "bench", name, *sys.argv[1:]], cwd=common.ROOT).returncode:
            failed.append(name)
        common.progress(f"---- {name}: {time.perf_counter() - started:.0f} s")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def main() -> None:
    args = arguments()
    if args.suite == "all":
        sys.argv[1:] = [option for option in sys.argv[1:] if option != "all"]
        return run_all(args)
    need(SUITES[args.suite], args)
    import torch

    from bench import measure
    from minirl.policy import pick_device

    device = pick_device(args.device)
    if device.type == "cpu":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside those that are measured
    args.out = args.out or f"bench/results/{measure.device_slug(device)}{'-quick' if args.quick else ''}"
    torch.manual_seed(0)
    SUITES[args.suite].run(args)


if __name__ == "__main__":
    common.run(main)
