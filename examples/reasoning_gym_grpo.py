"""GRPO on a task of reasoning-gym: SmolLM2-135M-Instruct learns chain_sum; products and gcd show what carries over.

    pip install gguf 'minirl[cli,reasoning]' && python examples/reasoning_gym_grpo.py

The reward is minirl's own rule alone (the last number of the completion is the answer). The models before and after are
compared on problems that training never saw, by reasoning-gym's own scorers, which it never used: the same prompts and
seeds for both, and an interval of the paired difference. Takes less than half an hour on two cores and draws
runs/reasoning_gym/before_after.png.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from smollm2_grpo import MODEL, fetch_model

from minirl.lab.cli import main
from minirl.lab.logs import read_metrics

OUT = Path("runs/reasoning_gym")
TERMS = "min_terms=2,max_terms=2,min_digits=1,max_digits=1"
TASKS = {
    "chain_sum": f"reasoning_gym:dataset=chain_sum,{TERMS}",
    "products": f"reasoning_gym:dataset=products,{TERMS}",
    "gcd": "reasoning_gym:dataset=gcd,min_numbers=2,max_numbers=2,min_value=1,max_value=30",
}
SETTINGS = {
    "--model": str(MODEL),
    "--task": TASKS["chain_sum"],
    "--out": str(OUT / "run"),
    "--steps": "60",
    "--prompts": "16",
    "--group": "8",
    "--max-tokens": "24",
    "--lr": "1e-5",
    "--warmup": "3",
    "--micro-batch-tokens": "1024",
    "--eval-every": "15",
    "--eval-prompts": "32",
    "--save-every": "30",
}
REWARDS = ["--rewards", "correct=0", "last_number=1"]  # reasoning-gym's scorer is logged, and weighs nothing


def compare(task: str, prompts: int) -> dict:
    """Measure the trained model, the one before it, and their paired differences."""
    out = OUT / f"eval-{task}"
    if not (out / "eval.json").exists():  # a run that goes on has it already
        words = ["--model", str(OUT / "run" / "model"), "--compare", str(MODEL), "--task", TASKS[task]]
        sizes = ["--prompts", str(prompts), "--samples", "8", "--max-tokens", "24", "--shown", "2"]
        main(["eval", *words, *sizes, "--out", str(out)])
    return json.loads((out / "eval.json").read_text())


def draw(found: dict[str, dict], file: Path) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    steps = read_metrics(OUT / "run")
    held = [m for m in steps if "eval/mean" in m]
    paid = [m for m in steps if "reward/last_number" in m]
    curve.plot(
        [m["step"] for m in paid], [m["reward/last_number"] for m in paid], color="#bbbbbb", label="training reward"
    )
    for name, colour in (("mean", "#0072b2"), ("greedy", "#d55e00")):
        values = [m[f"eval/{name}"] for m in held]
        curve.plot([m["step"] for m in held], values, "o-", color=colour, label=f"held-out, {name}")
    curve.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title="chain_sum while it trains")
    curve.legend()
    for shift, part, label, colour in (
        (-0.2, "before", "before", "#bbbbbb"),
        (0.2, "after", "after GRPO on chain_sum", "#0072b2"),
    ):
        for x, content in enumerate(found.values()):
            side = content["compare"] if part == "before" else content
            value, (low, high) = side["metrics"]["eval/mean"], side["intervals"]["eval/mean"]
            bars.bar(x + shift, value, 0.36, color=colour, label=label if x == 0 else None)
            bars.errorbar(x + shift, value, [[value - low], [high - value]], color="black", capsize=4)
    bars.set(
        xticks=range(len(found)), xticklabels=found, ylim=(0, 1.2), title="mean@8 on held-out problems, 95 % interval"
    )
    bars.legend(loc="upper right")
    figure.savefig(file, dpi=150)


def run(given: list[str]) -> None:
    if not MODEL.exists():
        fetch_model()
    if not (OUT / "run" / "model").exists():
        defaults = [word for flag, value in SETTINGS.items() if flag not in given for word in (flag, value)]
        main(["grpo", *defaults, *REWARDS, *given])
    found = {task: compare(task, 64) for task in TASKS}
    draw(found, OUT / "before_after.png")
    for task, content in found.items():
        difference = content["compare"]["differences"]["eval/mean"]
        low, high = difference["interval"]
        before, after = content["compare"]["metrics"]["eval/mean"], content["metrics"]["eval/mean"]
        change = f"{before:.3f} -> {after:.3f}, difference {difference['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"{task:10} mean@8 {change}")
    print(f"picture: {OUT / 'before_after.png'}")


if __name__ == "__main__":
    run(sys.argv[1:])
