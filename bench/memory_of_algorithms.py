"""Measure the peak memory of GRPO and PPO on one checkpoint, with and without a critic and a reward model.

    python -m bench.memory_of_algorithms [models/smollm2]

Each algorithm is a process of its own and takes two steps of 8 prompts x 4 completions on one-digit sums. The table
also gives the memory of the models alone: 16 bytes a trained weight in fp32 (weight, gradient, two moments), 4 a frozen
one. The reward model is trained first, on the checkpoint's own right and wrong answers.
"""

import json
import tempfile
from pathlib import Path

from bench import common

TASK = "--task arithmetic:op=sum,digits=1 --max-tokens 20"
STEPS = f"{TASK} --steps 2 --prompts 8 --group 4 --lr 1e-6 --eval-every 0 --eval-prompts 1 --eval-samples 1"
JUDGED = "--rewards correct=0 model:{reward}=1"
WAYS = (  # algorithm, trained models, frozen models, command
    ("GRPO, beta 0", "policy", "", f"grpo {STEPS}"),
    ("GRPO", "policy", "reference", f"grpo {STEPS} --preset grpo"),
    ("GRPO", "policy", "reference, reward model", f"grpo {STEPS} --preset grpo {JUDGED}"),
    ("PPO, shared critic", "policy", "reference", f"ppo {STEPS} --critic shared"),
    ("PPO", "policy, critic", "reference", f"ppo {STEPS}"),
    ("PPO", "policy, critic", "reference, reward model", f"ppo {STEPS} {JUDGED}"),
)


def make_reward_model(model: str, dtype: str, folder: Path) -> Path:
    """Train a reward model on right and wrong answers of the checkpoint, and return its folder."""
    common.progress("a reward model, from right and wrong answers of the checkpoint")
    common.minirl(f"outcomes --model {model} {TASK} --prompts 32 --samples 8 --temperature 1 --out {folder / 'data'}")
    data = f"--data {folder / 'data' / 'pairs.jsonl'} --heldout 0 --steps 2 --batch 4"
    common.minirl(f"reward --model {model} {data} --dtype {dtype} --out {folder / 'reward'}")
    return folder / "reward" / "model"


def models_gb(model: str, trained: str, frozen: str) -> float:
    """Return GB of the models alone: weights, gradients and moments in fp32."""
    from minirl.model import Transformer

    weights = sum(p.numel() for p in Transformer.from_pretrained(model).parameters())
    count = [len(names.split(",")) if names else 0 for names in (trained, frozen)]
    return weights * (16 * count[0] + 4 * count[1]) / 1e9


def main() -> None:
    parser = common.arguments(__doc__, "runs of each algorithm, of which the largest peak counts", 1)
    parser.set_defaults(dtype="float32", json="bench/results/cpu/memory_of_algorithms.json")
    args = parser.parse_args()
    common.need_checkpoint(args.model)
    common.at_least(parser, args, repeats=1)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        reward = make_reward_model(args.model, args.dtype, Path(scratch))
        for number, (name, trained, frozen, command) in enumerate(WAYS):
            peaks = []
            for repeat in range(args.repeats):
                out = Path(scratch) / f"{number}-{repeat}"
                options = f"--model {args.model} --dtype {args.dtype} --device {args.device} --out {out}"
                _, used = common.minirl(f"{command.replace('{reward}', str(reward))} {options}")
                logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                peaks.append(logged[-1]["memory/peak_gb"])
                common.progress(f"{name} ({trained}; {frozen})  {peaks[-1]:.2f} GB  {used['wall_seconds']:.0f} s")
            seconds = logged[-1]["time/rollout"] + logged[-1]["time/train"]
            needed = models_gb(args.model, trained, frozen) if args.dtype == "float32" else None
            found.append(
                {
                    "algorithm": name,
                    "trained": trained,
                    "frozen": frozen,
                    "models_gb": needed,
                    "peak_gb": max(peaks),
                    "seconds_a_step": seconds,
                }
            )
    rows = [
        (
            x["algorithm"],
            x["trained"],
            x["frozen"] or "-",
            f"{x['models_gb']:.2f}" if x["models_gb"] else "-",
            f"{x['peak_gb']:.2f}",
            f"{x['seconds_a_step']:.1f}",
        )
        for x in found
    ]
    print(common.table(("algorithm", "trained", "frozen", "models GB", "peak GB", "s a step"), rows))
    common.write_json(args, {"machine": common.machine(args.device), "algorithms": found})


if __name__ == "__main__":
    common.run(main)
