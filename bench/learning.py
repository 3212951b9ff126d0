"""Measure what every algorithm learns: all presets and commands from the same supervised start, on the embedded sums.

    python -m bench.learning                    three seeds, some 40 minutes on two cores
    python -m bench.learning --only grpo ppo    some rows
    python -m bench.learning --seeds 0

A row is a command line that anybody can run. Its start is the model of `minirl demo` after SFT, which guesses most
answers; its end is the accuracy that `minirl eval` finds on 256 held-out sums, 8 samples each. Online rows
sample 32 prompts x 8 completions for 60 steps, two slow ones for 160. Written to --out: learning.json, learning.md (the
table) and plots.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import common

TASK = "--task arithmetic:op=sum,digits=2,style=plain,template={a:02}+{b:02}="
SIZES = "--max-tokens 12 --slots 256"
ONLINE = f"""{TASK} {SIZES} --prompts 32 --group 8 --warmup 5 --schedule linear --eval-prompts 256 --eval-samples 4
    --shown 0"""
GRPO = f"grpo {ONLINE} --steps 60 --eval-every 5 --lr 4e-4"
PPO = f"ppo {ONLINE} --steps 60 --eval-every 5 --lr 3e-4 --critic-lr 1e-3"
JUDGED = "--rewards correct=0 model:{reward}=1"  # the rule is only logged
# Slower, for a reward model that learns on can only keep up with a policy that gives it time.
SLOW = f"grpo {ONLINE} --steps 160 --eval-every 20 --lr 1e-4 --preset grpo {JUDGED}"
DATA = "--data {outcomes}/samples.jsonl --group 8"
PREFER = "prefer --data {outcomes}/pairs.jsonl --steps 60 --batch 64 --warmup 5 --lr 3e-4"
REWARD = """reward --data {outcomes}/pairs.jsonl --kind pairwise --steps 60 --batch 64 --lr 1e-3 --weight-decay 0.01
    --eval-every 10"""
SFT = "sft --data {start}/demonstrations.jsonl --steps 60 --batch 256 --lr 3e-4"
HACKED = "the frozen model is hacked: its score rises, the rule's accuracy does not"
NO_SAMPLES = "offline: learns from the start's own samples only"


@dataclass(frozen=True)
class Row:
    """A method: its command without --model and --out, and why it may gain less than 20 points."""

    command: str
    why: str = ""


METHODS = {
    "reinforce": Row(f"{GRPO} --preset reinforce"),
    "rloo": Row(f"{GRPO} --preset rloo"),
    "reinforce++": Row(f"{GRPO} --preset reinforce++"),
    "ppo_actor_only": Row(f"{GRPO} --preset ppo_actor_only"),
    "grpo": Row(f"{GRPO} --preset grpo"),
    "grpo_ps": Row(f"{GRPO} --preset grpo_ps --rewards bench/steps.py:working=1"),
    "dr_grpo": Row(f"{GRPO} --preset dr_grpo"),
    "dapo": Row(f"{GRPO} --preset dapo --mini-batches 2"),
    "gspo": Row(f"{GRPO} --preset gspo --mini-batches 2"),
    "gspo_token": Row(f"{GRPO} --preset gspo_token --mini-batches 2 --rewards bench/steps.py:working=1"),
    "cispo": Row(f"{GRPO} --preset cispo --mini-batches 2"),
    "sapo": Row(f"{GRPO} --preset sapo --mini-batches 2"),
    "scaling_grpo": Row(f"{GRPO} --preset scaling_grpo --mini-batches 2 --top-p 0.95"),
    "dual_clip": Row(f"{GRPO} --preset dual_clip --mini-batches 2"),
    "tis": Row(f"{GRPO} --preset tis --mini-batches 2"),
    "mis": Row(f"{GRPO} --preset mis --mini-batches 2"),
    "online_rft": Row(f"{GRPO} --preset online_rft"),
    "ppo": Row(f"{PPO} --preset ppo"),
    "ppo, shared critic": Row(f"{PPO} --preset ppo --critic shared"),
    "ppo_penalty": Row(f"{PPO} --preset ppo_penalty"),
    # Scores are not of the order of 1, so values are not clipped; beta holds the policy where the model knows its way.
    "ppo, reward model": Row(f"{PPO} --preset ppo {JUDGED} --value-clip None --kl-in-reward 1"),
    "grpo, reward model": Row(SLOW, HACKED),
    "grpo, online reward model": Row(f"{SLOW} --refresh.every 4 --refresh.lr 1e-3 --refresh.epochs 4"),
    "more sft": Row(SFT, "control: there is no reward in it"),
    "rft": Row(f"rft {TASK} {SIZES} --samples 8 --temperature 1 --steps 60 --batch 256 --lr 1e-3", NO_SAMPLES),
    "dpo": Row(f"{PREFER} --loss.beta 0.5", NO_SAMPLES),
    "cdpo": Row(f"{PREFER} --loss.label-smoothing 0.1 --loss.beta 0.5", NO_SAMPLES),
    "robust dpo": Row(f"{PREFER} --loss.kind robust --loss.label-smoothing 0.1 --loss.beta 0.5", NO_SAMPLES),
    "hinge": Row(f"{PREFER} --loss.kind hinge --loss.beta 0.5", NO_SAMPLES),
    "ipo": Row(f"{PREFER} --loss.kind ipo", NO_SAMPLES),
    "rrhf": Row(f"{PREFER} --loss.kind rrhf", NO_SAMPLES),
    "offline grpo": Row(f"{GRPO} --preset grpo {DATA}", NO_SAMPLES),
    "offline rft": Row(f"{GRPO} --preset online_rft {DATA}", NO_SAMPLES),
}


class Lab:
    """A folder of runs, runs/learning/seed-0/grpo and so on. Runs of the same command that exist already are kept."""

    def __init__(self, work: Path, jobs: int):
        self.work, self.jobs, self.done, self.total, self.began = work, jobs, 0, 0, time.perf_counter()
        self.failed: set[str] = set()  # the names of what failed for some seed

    def run_all(self, steps: Sequence[tuple[int, str, str]]) -> None:
        """Run commands (seed, name, command), `jobs` of them at a time, each on one core."""
        self.total = self.done + len(steps)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda step: self._try(*step), steps))

    def _try(self, seed: int, name: str, command: str) -> None:
        """Run a command and note it where it fails: the others go on."""
        try:
            self._step(seed, name, command)
        except RuntimeError as error:
            self.failed.add(name)
            common.progress(f"FAILED: {name}, seed {seed}: {error}")

    def result(self, seed: int, name: str) -> dict:
        return json.loads((self.folder(seed, name) / "result.json").read_text())

    def folder(self, seed: int, name: str) -> Path:
        return self.work / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")

    def fill(self, seed: int, command: str) -> str:
        """Put the folders of the start, its outcomes and the reward model into a command."""
        places = {name: self.folder(seed, name) for name in ("start", "outcomes")}
        places |= {"reward": self.folder(seed, "reward") / "model"}
        for name, folder in places.items():
            command = command.replace(f"{{{name}}}", str(folder))
        return command

    def _step(self, seed: int, name: str, command: str) -> None:
        """Run a command and evaluate its model, unless both results exist already."""
        folder, command = self.folder(seed, name), self.fill(seed, command)
        file = folder / "result.json"
        if not file.exists() or json.loads(file.read_text())["command"] != command:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _, used = common.minirl(f"{command} --out {folder}", folder.with_suffix(".log"), threads=1)
            result = {"command": command} | used
            model = next(iter(folder.glob("**/sft/model")), folder / "model")
            if name not in ("outcomes", "reward"):
                result |= self._evaluate(model, folder / "eval")
            file.write_text(json.dumps(result))
        self.done += 1
        self._say(seed, name, json.loads(file.read_text()))

    def _say(self, seed: int, name: str, result: dict) -> None:
        left = (time.perf_counter() - self.began) / self.done * (self.total - self.done) / 60
        accuracy = f"{result['eval/mean']:.3f}" if "eval/mean" in result else ""
        common.progress(
            f"{self.done:>3}/{self.total}  seed {seed}  {name:26} {accuracy:6} {result['seconds']:6.1f} s  "
            f"about {left:.0f} min to go"
        )

    def _evaluate(self, model: Path, out: Path) -> dict:
        command = f"eval --model {model} {TASK} {SIZES} --prompts 256 --samples 8 --seed 1000 --json --out {out}"
        said, _ = common.minirl(command, threads=1)
        return json.loads(said.splitlines()[-1])["metrics"]


def starts(lab: Lab, seeds: Iterable[int]) -> None:
    """Make the supervised start of each seed, its sampled and checked answers, and a reward model trained on them."""
    from minirl.files import write_jsonl
    from minirl.lab.demo import demonstrations
    from minirl.lab.tasks import parse_task

    lab.run_all([(seed, "start", f"demo --seeds {seed} --grpo-steps 1") for seed in seeds])
    for seed in seeds:
        task = parse_task(TASK.removeprefix("--task "))
        write_jsonl(lab.folder(seed, "start") / "demonstrations.jsonl", demonstrations(task, seed))
    outcomes = f"outcomes --model {{start}}/seed-%d/sft/model {TASK} {SIZES} --samples 8 --temperature 1 --prompts 2000"
    lab.run_all([(seed, "outcomes", outcomes % seed) for seed in seeds])
    lab.run_all([(seed, "reward", f"{REWARD} --model {{start}}/seed-{seed}/sft/model") for seed in seeds])


def summary(lab: Lab, seeds: Sequence[int], names: Sequence[str]) -> list[dict]:
    """Return a record for each method: accuracies of all seeds before and after."""
    lines = []
    for name in names:
        before, after = ([lab.result(seed, which) for seed in seeds] for which in ("start", name))
        why = METHODS[name].why
        if why == HACKED and not all(hacked(lab, seed, name) for seed in seeds):
            why = ""
        gains = [100 * (b["eval/mean"] - a["eval/mean"]) for a, b in zip(before, after, strict=True)]
        lines.append(
            {
                "method": name,
                "command": METHODS[name].command,
                "before": [x["eval/mean"] for x in before],
                "after": [x["eval/mean"] for x in after],
                "greedy": [x["eval/greedy"] for x in after],
                "gain": gains,
                "seconds": statistics.median(x["seconds"] for x in after),
                "memory_gb": max(x["memory_gb"] for x in after),
                "why": why if statistics.mean(gains) < 20 else "",
            }
        )
    return lines


def hacked(lab: Lab, seed: int, name: str) -> bool:
    """Tell whether the reward model's score of the samples rose from the first step to the last while the accuracy by
    the rule fell."""
    lines = (lab.folder(seed, name) / "metrics.jsonl").read_text().splitlines()[1:]
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    return last["reward_model/mean"] > first["reward_model/mean"] and last["reward/correct"] < first["reward/correct"]


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def cells(line: dict) -> tuple[str, ...]:
    missed = "" if line["why"] or statistics.mean(line["gain"]) >= 20 else "MISSED: an online method must gain 20"
    return (
        line["method"],
        f"{statistics.mean(line['before']):.3f}",
        mean_and_spread(line["after"], 3),
        mean_and_spread(line["greedy"], 3),
        mean_and_spread(line["gain"], 1),
        f"{line['seconds']:.0f}",
        f"{line['memory_gb']:.2f}",
        line["why"] or missed,
    )


HEAD = ("method", "before", "after", "greedy after", "gain, points", "CPU s", "peak GB", "")


def reward_models(lab: Lab, seeds: Sequence[int]) -> list[dict]:
    """Return the last held-out metrics of each seed's reward model."""
    lines = [json.loads((lab.folder(s, "reward") / "metrics.jsonl").read_text().splitlines()[-1]) for s in seeds]
    return [{name.removeprefix("eval/"): value for name, value in x.items() if name.startswith("eval/")} for x in lines]


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.learning", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--only", nargs="+", metavar="NAME", default=list(METHODS), help="some of the rows")
    add("--jobs", type=int, default=os.cpu_count(), help="commands at a time, a core each (default: %(default)s)")
    add(
        "--work", type=Path, default=Path("runs/learning"), help="the runs; those there are kept (default: %(default)s)"
    )
    add("--out", type=Path, default=Path("bench/results/cpu"), help="(default: %(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.only if name not in METHODS]:
        parser.error(f"no method is called {unknown[0]!r}: choose from {', '.join(METHODS)}")
    began = time.perf_counter()
    lab = Lab(args.work.absolute(), args.jobs)
    starts(lab, args.seeds)
    model = "--model {start}/seed-%d/sft/model"
    lab.run_all(
        [
            (seed, name, f"{METHODS[name].command} {model % seed} --seed {seed}")
            for name in args.only
            for seed in args.seeds
        ]
    )
    if lab.failed & {"start", "outcomes", "reward"}:
        sys.exit("what every row starts from has failed, see above")
    names = [name for name in args.only if name not in lab.failed]
    lines, judges = summary(lab, args.seeds, names), reward_models(lab, args.seeds)
    rows = [cells(line) for line in lines]
    print(common.table(HEAD, rows))
    print(f"\nreward model, held-out pairs: accuracy {mean_and_spread([x['accuracy'] for x in judges], 3)}")
    minutes = (time.perf_counter() - began) / 60
    print(f"{minutes:.0f} minutes")
    markdown = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "learning.md").write_text("\n".join(markdown) + "\n")
    machine = common.machine(f"one core a command, {args.jobs} commands at a time")
    cpu = sum(lab.result(s, n)["seconds"] for s in args.seeds for n in ("start", "outcomes", "reward", *names)) / 60
    found = {"machine": machine, "minutes_of_this_run": minutes, "cpu_minutes_of_all_commands": cpu}
    found |= {"methods": lines, "reward_model": judges}
    common.write_json(args, found, args.out / "learning.json")
    from bench import learning_plots

    for file in learning_plots.draw(lab, args.seeds, names, lines, args.out):
        common.progress(f"wrote {file}")
    if lab.failed:
        sys.exit(f"failed, and in no table: {', '.join(sorted(lab.failed))}")


if __name__ == "__main__":
    main()
