"""SFT, then GRPO: a model learns from demonstrations how to answer, and from a rule's reward to be right.

    python examples/sft_grpo.py                          # a small transformer from scratch; minutes on two cores
    python examples/sft_grpo.py --model models/smollm2   # a checkpoint, on one-digit sums

Prints the held-out accuracy after each stage. `python examples/smollm2_grpo.py` fetches SmolLM2.
"""

import argparse
import json
import sys
from pathlib import Path

from minirl import GRPOConfig, InputError, Sampler, SamplingParams, SFTConfig, parse_task, train_grpo, train_sft
from minirl.evaluate import evaluate
from minirl.lab import demo
from minirl.lab.display import RichDisplay, print_table
from minirl.policy import load

SIZES = {  # what the policy's stages share, on the embedded model and on a checkpoint
    "demo": {"task": demo.TASK, "max_tokens": 12, "slots": 256, "prompts": 64, "eval_prompts": 256},
    "checkpoint": {"task": "arithmetic:op=sum,digits=1", "max_tokens": 20, "prompts": 16, "eval_prompts": 20},
}
SFT = {"steps": 20, "batch": 16, "lr": 1e-5, "warmup": 5}  # of a checkpoint, on few demonstrations
SHOWN = 32
GRPO = {
    "demo": {"steps": 120, "group": 8, "lr": 4e-4, "warmup": 5, "schedule": "linear"},
    "checkpoint": {"steps": 30, "group": 8, "lr": 1e-5, "warmup": 3, "micro_batch_tokens": 1024},
}


def arguments(description: str, out: str, given: list[str] | None) -> argparse.Namespace:
    """Parse the options that both pipelines take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or the folder of a checkpoint with a chat template")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    parser.add_argument("--sft-steps", type=int, help="default: 600 of the demo, 20 of a checkpoint")
    parser.add_argument("--steps", type=int, help="rollouts of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(given)
    args.kind = "demo" if args.model == "demo" else "checkpoint"
    return args


def supervised(args, display) -> Path:
    """Stage 1: train on demonstrations, and return the folder of the model."""
    task, out = parse_task(SIZES[args.kind]["task"]), args.out / "sft"
    if args.kind == "demo":
        return demo.pretrain(task, args.seed, args.sft_steps or demo.DemoConfig.sft_steps, out, display)
    lines = [{"prompt": example["prompt"], "completion": example["answer"]} for example in task.train[:SHOWN]]
    out.mkdir(parents=True, exist_ok=True)
    data = out / "demonstrations.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = SFT | ({"steps": args.sft_steps} if args.sft_steps else {})
    return train_sft(SFTConfig(args.model, str(data), out=str(out), seed=args.seed, **options), display)


def accuracy(model: str | Path, kind: str) -> list[float]:
    """Return the share of held-out prompts that are right: mean of 8 samples, best of 8, greedy."""
    sizes, (policy, tokenizer) = SIZES[kind], load(model, "auto", "auto")
    params = SamplingParams(n=8, max_tokens=sizes["max_tokens"], stop_ids=tokenizer.stop_ids)
    task = parse_task(sizes["task"])
    sampler = Sampler(policy, sizes.get("slots", 64), tokenizer=tokenizer)
    metrics = evaluate(sampler, tokenizer, task, params, task.heldout[: sizes["eval_prompts"]]).metrics
    return [metrics[f"eval/{name}"] for name in ("mean", "pass@8", "greedy")]


def gains(stages: list[tuple[str, str | Path]], kind: str) -> None:
    """Print the accuracy after each stage; before the first the demo has only an untrained transformer."""
    rows = [(name, *accuracy(model, kind)) for name, model in stages if model != "demo"]
    print_table("held-out accuracy", ("after", "mean@8", "pass@8", "greedy"), rows)


def main(given: list[str] | None = None) -> None:
    args = arguments(__doc__, "runs/sft_grpo", given)
    with RichDisplay() as display:
        sft = supervised(args, display)
        options = SIZES[args.kind] | GRPO[args.kind] | ({"steps": args.steps} if args.steps else {})
        grpo = train_grpo(GRPOConfig(str(sft), out=str(args.out / "grpo"), seed=args.seed, **options), display)
    gains([("nothing", args.model), ("SFT", sft), ("GRPO", grpo)], args.kind)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
