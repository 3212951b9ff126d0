"""The three stages of RLHF: SFT, a reward model from compared answers, and PPO against that learned model alone.

    python examples/rlhf.py                          # a small transformer from scratch; minutes on two cores
    python examples/rlhf.py --model models/smollm2   # a checkpoint, on one-digit sums

A rule compares the answers here, in place of people. It labels the pairs for the reward model; afterwards its verdict
is only logged, so that rlhf.png can show the score that PPO raises beside what was meant, the share of right answers.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from sft_grpo import SIZES, arguments, gains, supervised

from minirl import InputError, OutcomesConfig, PPOConfig, RewardConfig, sample_outcomes, train_ppo, train_reward
from minirl.lab.display import RichDisplay
from minirl.lab.logs import Columns, read_metrics

OUTCOMES = {"demo": {"prompts": 1024, "samples": 8}, "checkpoint": {"prompts": 80, "samples": 16}}
REWARD = {
    "demo": {"steps": 60, "batch": 64, "lr": 1e-3},
    "checkpoint": {"steps": 20, "batch": 16, "lr": 1e-5, "micro_batch_tokens": 1024},
}
PPO = {
    "demo": {"steps": 50, "group": 4, "lr": 3e-4, "critic_lr": 1e-3, "kl_in_reward": 1.0, "schedule": "linear"},
    "checkpoint": {"steps": 20, "group": 8, "lr": 5e-6, "critic_lr": 2e-5, "kl_in_reward": 0.2},
}


def compared(sft: Path, args, display) -> Path:
    """Stage 2a: sample answers of the SFT model, and pair a right and a wrong one to the same prompt."""
    sizes, out = SIZES[args.kind], args.out / "outcomes"
    options = {name: sizes[name] for name in ("task", "max_tokens", "slots") if name in sizes} | OUTCOMES[args.kind]
    sample_outcomes(OutcomesConfig(str(sft), out=str(out), seed=args.seed, **options), display)
    return out / "pairs.jsonl"


def reward_model(sft: Path, pairs: Path, args, display) -> Path:
    """Stage 2b: minimise −log σ(r_w − r_l) from the SFT model's weights with a new head; a tenth is held out."""
    options = {"out": str(args.out / "reward"), "seed": args.seed, "eval_every": 20, **REWARD[args.kind]}
    return train_reward(RewardConfig(str(sft), str(pairs), **options), display)


def ppo(sft: Path, reward: Path, args, display) -> Path:
    """Stage 3: maximise E[r(x, y)] − β KL(π‖π_SFT), where r is the model alone: the rule has weight 0, and is logged.

    The reward model has only seen samples of the SFT model, so β must keep the policy near them: with β = 0.05 the
    policy of the demo finds wrong answers that score as high as any."""
    options = SIZES[args.kind] | PPO[args.kind] | ({"steps": args.steps} if args.steps else {})
    options |= {"rewards": ("correct=0", f"model:{reward}=1.0"), "epochs": 2, "warmup": 5}
    options |= {"value_clip": None, "micro_batch_tokens": 2048}  # scores, and so values, go far beyond 1
    return train_ppo(PPOConfig(str(sft), out=str(args.out / "ppo"), seed=args.seed, **options), display)


def draw(run: Path, score: str, path: Path) -> None:
    """Plot the score that PPO raises and the share of right answers over its steps."""
    metrics = Columns.of(read_metrics(run))
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    for axes, name, label, style in (
        (left, f"reward/{score}", "score of the reward model", "C1-"),
        (right, "reward/correct", "rule: right samples", "C0-"),
        (right, "eval/mean", "rule: right held-out samples", "C0o"),
    ):
        axes.plot(*metrics.series(name), style, label=label)
        axes.set_ylabel(label.partition(":")[0])
    left.set_xlabel("PPO step")
    right.set_ylim(0, 1)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    args = arguments(__doc__, "runs/rlhf", given)
    with RichDisplay() as display:
        sft = supervised(args, display)
        reward = reward_model(sft, compared(sft, args, display), args, display)
        policy = ppo(sft, reward, args, display)
    ranked = [record["eval/accuracy"] for record in read_metrics(args.out / "reward") if "eval/accuracy" in record][-1]
    print(f"reward model: ranks {ranked:.1%} of the held-out pairs right")
    gains([("nothing", args.model), ("SFT", sft), ("PPO on the reward model", policy)], args.kind)
    draw(args.out / "ppo", f"model:{reward}", args.out / "rlhf.png")
    print(f"plot: {args.out / 'rlhf.png'}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
