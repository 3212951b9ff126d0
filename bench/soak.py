"""Run GRPO for an hour in one process: does its memory stay as it was, and is it as fast as a process that is fresh?

    python -m bench.soak                  an hour, and then some minutes of turns
    python -m bench.soak --minutes 1      a look at it

The model has the shape of SmolLM2 on a smaller scale and random weights; the reward differs among completions for any
policy, so each step does the work of the first. After so many minutes the old process stops behind a checkpoint, a
fresh one resumes a copy of the run, and both take the same steps in turns, old first and fresh first, while the other
waits. Time a token is that of rollout and training over the sampled tokens. Written to bench/results/cpu/soak.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import common

# SmolLM2-135M has width 576, 30 layers, heads of 64 (9, with 3 of keys), 1,536 in the MLP, and ties the 49,152 tokens.
SHAPE = {"width": 128, "layers": 6, "heads": 2, "kv_heads": 1, "head_dim": 64, "mlp_width": 352, "tied": True}
VOCABULARY = 4096
SAMPLED = {"prompts": 8, "group": 8, "max_tokens": 32}
ALPHABET = "0123456789+=~(,)abcdefghijklmnopqrstuvwxyz "
SAVE_EVERY = 20  # steps
WARM_UP = 3  # pairs of steps that do not count: the fresh process has to warm up
MEMORY_BOUND, TIME_BOUND = 1.02, 1.05
PAUSE = 0.3  # seconds before a turn, until the threads of the other process sleep


# ---- a process that trains -------------------------------------------------------------------------------------------


def varied(prompts, completions, **columns) -> list[float]:
    """Reward different characters: random completions of one prompt differ in it."""
    return [len(set(text)) / 16 for text in completions]


def make_checkpoint(folder: Path) -> int:
    """Write the model with random weights; return its number of parameters."""
    from minirl.model import ModelConfig, Transformer
    from minirl.tokenizer import Tokenizer

    model = Transformer(ModelConfig(vocab_size=VOCABULARY, max_positions=256, **SHAPE)).initialise(0)
    model.save_pretrained(folder)
    Tokenizer.from_chars(ALPHABET).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def train(args) -> None:
    """Train in args.child, from its checkpoint where it has one, and report each step."""
    report = common.reporter("cpu")
    import torch

    from minirl.grpo import GRPOConfig, grpo
    from minirl.lab.rewards import rewards_of
    from minirl.lab.training import source_of
    from minirl.losses import PolicyLoss
    from minirl.run import Observer
    from minirl.task import Task

    torch.set_num_threads(args.threads)
    began = time.monotonic()

    class Watch(Observer):
        """Report a step. From the first step behind a checkpoint after so many minutes on, wait for a word after it."""

        def after(self, step) -> None:
            m = step.metrics
            seconds, tokens = m["time/rollout"] + m["time/train"], m["sampled_tokens"]
            bits = [m[name] for name in ("reward/mean", "loss/total", "grad_norm")]
            report("step", number=step.done, seconds=seconds, tokens=tokens, bits=bits, resident=resident())
            self.waits = getattr(self, "waits", False) or (
                time.monotonic() - began > 60 * args.minutes and step.done % SAVE_EVERY == 1 and step.done > 1
            )
            if self.waits:
                report("waiting")
                if not sys.stdin.readline():
                    os._exit(0)  # the one who asked is gone

    examples = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(32) for b in range(32)]
    task = Task("varied", examples, [], {"varied": (1.0, varied)}, varied, lambda text: text or None)
    run = Path(args.child)
    config = GRPOConfig(
        model=str(run.parent / "model"),
        out=str(run),
        resume=(run / "config.json").exists(),
        steps=1_000_000,
        lr=1e-6,
        schedule="constant",
        save_every=SAVE_EVERY,
        loss=PolicyLoss(aggregation="seq_mean", kl="k3", kl_coef=0.04),
        dtype="float32",
        device="cpu",
        **SAMPLED,
    )
    source, _, data = source_of(config, task)
    grpo(config, source, rewards_of(config, task), data, None, [Watch()])


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the process that measures ---------------------------------------------------------------------------------------


class Process:
    """A process that trains in a folder, and the steps that it has reported."""

    def __init__(self, folder: Path, minutes: float, threads: int):
        words = [sys.executable, "-m", "bench.soak", "--child", str(folder), "--threads", str(threads)]
        self.log = folder.with_suffix(".log").open("w")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = subprocess.Popen([*words, "--minutes", str(minutes)], cwd=common.ROOT, **pipes)
        self.steps: list[dict] = []

    def until_it_waits(self, say: bool = False) -> dict:
        """Collect its steps until it waits; return the last one."""
        said = time.monotonic()
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "waiting":
                return self.steps[-1]
            self.steps.append(event)
            if say and time.monotonic() - said > 30:
                said = time.monotonic()
                common.progress(f"step {event['number']}  {event['seconds']:.2f} s  {event['resident'] / 1e6:.0f} MB")
        self.process.wait()
        said = Path(self.log.name).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{said}\nthe process that trains ended with status {self.process.returncode}")

    def step(self) -> dict:
        """Let it take one step."""
        time.sleep(PAUSE)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.until_it_waits()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def measure(args, folder: Path) -> dict:
    """Let a process grow old, then let it and a fresh one take the same steps in turns."""
    old, fresh = Process(folder / "old", args.minutes, args.threads), None
    try:
        last = old.until_it_waits(say=True)
        alone = list(old.steps)
        shutil.copytree(folder / "old", folder / "fresh")
        fresh = Process(folder / "fresh", -1, args.threads)
        first = fresh.until_it_waits()
        if first["number"] != last["number"]:
            raise RuntimeError(f"the fresh process took step {first['number']}, the old one step {last['number']}")
        pairs = []
        for i in range(WARM_UP + args.pairs):
            taken = {side: side.step() for side in ((old, fresh) if i % 2 == 0 else (fresh, old))}
            pairs.append((taken[old], taken[fresh]))
            common.progress("  ".join(f"{1e3 * a_token(step):.2f} ms a token" for step in pairs[-1]))
    finally:
        for process in filter(None, (old, fresh)):
            process.end()
    return result(alone, pairs[WARM_UP:])


def a_token(step: dict) -> float:
    return step["seconds"] / step["tokens"]


def result(alone: list[dict], pairs: list[tuple[dict, dict]]) -> dict:
    """Compare halves of the old process's life, and it with the fresh process."""
    half = len(alone) // 2
    memory = [median(step["resident"] for step in part) for part in (alone[:half], alone[half:])]
    times = [median(a_token(pair[side]) for pair in pairs) for side in (0, 1)]
    growth, ratio = memory[1] / memory[0], times[0] / times[1]
    every = max(1, len(alone) // 200)
    return {
        "steps": len(alone),
        "seconds_a_step": median(step["seconds"] for step in alone),
        "tokens_a_step": median(step["tokens"] for step in alone),
        "memory": {
            "first_half_bytes": memory[0],
            "last_half_bytes": memory[1],
            "last_over_first": growth,
            "bound": MEMORY_BOUND,
            "holds": growth <= MEMORY_BOUND,
            "resident_bytes": [[step["number"], step["resident"]] for step in alone[::every]],
        },
        "time_a_token": {
            "old_seconds": times[0],
            "fresh_seconds": times[1],
            "old_over_fresh": ratio,
            "bound": TIME_BOUND,
            "holds": ratio <= TIME_BOUND,
            "of_pairs": common.spread([a_token(old) / a_token(fresh) for old, fresh in pairs]),
            "pairs": [[a_token(old), a_token(fresh)] for old, fresh in pairs],
            "pairs_with_the_same_bits": sum(old["bits"] == fresh["bits"] for old, fresh in pairs),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.soak", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="that the old process trains alone (default: %(default)s)")
    add("--pairs", type=int, default=20, help="of steps in turns, after the warm-up (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: the cores, %(default)s)")
    add("--json", metavar="PATH", default="bench/results/cpu/soak.json", help="(default: %(default)s)")
    add("--child", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train(args)
    common.at_least(parser, args, pairs=1, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_checkpoint(Path(folder) / "model")
        found = measure(args, Path(folder))
    shapes = SHAPE | {"vocabulary": VOCABULARY, "parameters": parameters, **SAMPLED, "dtype": "float32"}
    host = common.machine(f"the CPU with threads: {args.threads}")
    memory, times = found["memory"], found["time_a_token"]
    print(common.describe(host))
    print(
        f"{found['steps']} steps of {found['seconds_a_step']:.2f} s, {found['tokens_a_step']:.0f} sampled tokens each"
    )
    rows = [
        ("resident memory, MB", *(f"{memory[k] / 1e6:.1f}" for k in ("first_half_bytes", "last_half_bytes"))),
        ("time a token, ms", *(f"{1e3 * times[k]:.3f}" for k in ("fresh_seconds", "old_seconds"))),
    ]
    ratios = [(memory["last_over_first"], memory), (times["old_over_fresh"], times)]
    rows = [
        (*row, f"{ratio:.4f}", f"{of['bound']:.2f}", "holds" if of["holds"] else "MISSED")
        for row, (ratio, of) in zip(rows, ratios, strict=True)
    ]
    print(common.table(("", "first half / fresh", "last half / old", "ratio", "bound", ""), rows))
    common.write_json(args, {"machine": host, "shapes": shapes, **found})
    sys.exit(not (memory["holds"] and times["holds"]))


if __name__ == "__main__":
    common.run(main)
