"""Compare a GRPO step (rollout, rewards, update) of minirl with one of TRL's GRPOTrainer, in separate processes.

    python bench/grpo_step_vs_trl.py models/smollm2 --json grpo.json

Both have the same checkpoint, prompts in the same order, reward function, number of sampled rows, temperature 1, one
update a rollout, beta 0, learning rate, gradients clipped to norm 1, AdamW, and no gradient checkpointing. The
differences are printed below the numbers. The first step of a process warms it up and is dropped.
"""

import argparse
import os
import sys
import tempfile
from statistics import fmean, median

import common

from minirl.judge.answers import last_number
from minirl.lab.tasks import load_task

SIDES = ("minirl", "trl")
TRL = {"loss_type": "grpo", "beta": 0.0, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
TRL |= {"shuffle_dataset": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
DIFFERENCES = """\
What differs:
- minirl keeps fp32 masters and moments of bf16 weights; TRL's fused Adam runs in the dtype of the weights. With
  bf16, TRL also runs its forward under autocast, its default.
- minirl computes a prompt once for all of its completions, pads nothing, and drops a row when it ends; TRL pads prompts
  and completions, and generates until the last row has ended.
- minirl leaves rows whose advantage is exactly zero, which cannot change the gradient, out of the update; TRL computes
  them. "signal" is the share of groups with other rows.
- minirl's forward holds 512 tokens at a time (a memory knob that changes no gradient), TRL's all rows, its default;
  --micro-batch-tokens and --trl-rows change that.
- The random numbers; length and reward show whether both sides drew from the same distribution.
Memory in GB is the peak so far: after the imports, with the trainer built (minirl's optimizer state too, TRL makes its
own in the first step), and at the end."""


def run_minirl(args, report: common.Report) -> None:
    from minirl.grpo import GRPOConfig, grpo_step, prepare
    from minirl.lab.rewards import rewards_of
    from minirl.lab.training import source_of
    from minirl.run import Run
    from minirl.step import Step

    report("imported")
    shared = {k: getattr(args, k) for k in ("model", "prompts", "group", "max_tokens", "lr", "seed", "dtype", "device")}
    shared["micro_batch_tokens"] = args.micro_batch_tokens
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(out=f"{folder}/run", steps=args.steps + 1, **shared)
        task, run = load_task("arithmetic", heldout_size=0), Run(config.out, {})
        parts = prepare(run, config, source_of(config, task)[0], rewards_of(config, task))
        report("built")
        for step in range(args.steps + 1):
            started = common.now(args.device)
            grpo_step(of := Step(run, step, config.steps), config, parts)
            m, seconds = of.metrics, common.now(args.device) - started
            signal = m["group/signal_frac"]
            report("step", seconds=seconds, length=m["len/mean"], reward=m["reward/mean"], signal=signal)


def run_trl(args, report: common.Report) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    report("imported")
    from minirl.batch import endless_epochs

    train = load_task("arithmetic", heldout_size=0).train
    examples = [
        train[i] for i in endless_epochs(len(train), args.seed, 0, (args.steps + 1) * args.prompts)
    ]  # minirl's order

    def correct(prompts, completions, answer, **columns):
        return last_number(prompts, [messages[0]["content"] for messages in completions], answer)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            reward_funcs=correct,
            args=trl_config(args, folder),
            train_dataset=Dataset.from_list(examples),
            callbacks=[step_clock(args.device, report)],
        )
        trainer.remove_callback(PrinterCallback)
        report("built")
        trainer.train()


def trl_config(args, folder: str):
    from trl import GRPOConfig

    rows = args.prompts * args.group
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.trl_rows or rows,
        gradient_accumulation_steps=rows // (args.trl_rows or rows),
        num_generations=args.group,
        max_completion_length=args.max_tokens,
        max_steps=args.steps + 1,
        learning_rate=args.lr,
        bf16=args.dtype == "bfloat16",
        seed=args.seed,
        use_cpu=args.device == "cpu",
        **TRL,
    )


def step_clock(device: str, report: common.Report):
    """Return a callback that reports each of TRL's steps, from before the rollout to after the optimizer."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = common.now(device)

        def on_step_end(self, *_, **__):
            self.seconds = common.now(device) - self.started

        def on_log(self, args, state, control, logs, **_):
            if "completions/mean_length" in logs:
                length, signal = logs["completions/mean_length"], 1 - logs["frac_reward_zero_std"]
                report("step", seconds=self.seconds, length=length, reward=logs["reward"], signal=signal)

    return Clock()


def run_side(args) -> None:
    """Run one side in this process and report each event to the process that started it."""
    from minirl.policy import pick_device

    args.device = pick_device(args.device).type
    report = common.reporter(args.device)
    (run_trl if args.side == "trl" else run_minirl)(args, report)
    report("done", device=common.device_name(args.device))


def summary(rounds: list[dict]) -> dict:
    steps = [step for r in rounds for step in r["steps"]]
    means = {name: fmean(step[name] for step in steps) for name in ("length", "reward", "signal")}
    memory = {name: max(r["memory_gb"][name] for r in rounds) for name in rounds[0]["memory_gb"]}
    seconds = common.spread([step["seconds"] for step in steps])
    return {"seconds": seconds, **means, "memory_gb": memory, "rounds": rounds}


def show(sides: dict[str, dict], ratios: list[float]) -> None:
    rows = []
    for name, s in sides.items():
        t, memory = s["seconds"], [f"{gb:.2f}" for gb in s["memory_gb"].values()]
        times = (f"{t['median']:.2f}", f"{t['min']:.2f} to {t['max']:.2f}")
        rows.append((name, *times, f"{s['length']:.1f}", f"{s['reward']:.2f}", f"{s['signal']:.0%}", *memory))
    print(common.table(("", "s/step", "range", "length", "reward", "signal", "GB: imports", "built", "peak"), rows))
    peak = sides["trl"]["memory_gb"]["done"] / sides["minirl"]["memory_gb"]["done"]
    print(f"TRL / minirl, median time of a step: {common.ratio_text(ratios)}")
    print(f"TRL / minirl, peak memory: {peak:.2f}\n{DIFFERENCES}")


def arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__, "processes of each side, in turns", 2)
    add = parser.add_argument
    add("--prompts", type=int, default=4, help="a step (default: %(default)s)")
    add("--group", type=int, default=8, help="completions a prompt (default: %(default)s)")
    add("--max-tokens", type=int, default=16, help="longest completion (default: %(default)s)")
    add("--lr", type=float, default=1e-6, help="learning rate (default: %(default)s)")
    add("--steps", type=int, default=4, help="measured in each process, after a first one (default: %(default)s)")
    add("--micro-batch-tokens", type=int, default=512, help="in one forward of minirl (default: %(default)s)")
    add("--trl-rows", type=int, help="rows in one forward of TRL (default: all)")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)  # how the script starts its own children
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.at_least(parser, args, prompts=1, group=2, max_tokens=1, steps=1, repeats=1)
    if args.trl_rows is not None and (args.trl_rows < 1 or args.prompts * args.group % args.trl_rows):
        parser.error(f"--trl-rows must divide the {args.prompts * args.group} rows of a step")
    return args


def compare(args) -> dict[str, list[dict]]:
    """Run the processes of both sides one after another; every second round the other side goes first."""
    rounds = {side: [] for side in SIDES}
    for seed in range(1, args.repeats + 1):
        for side in SIDES if seed % 2 else reversed(SIDES):
            command = [*sys.argv, "--side", side, "--seed", str(seed)]
            rounds[side].append(common.run_child(command, f"round {seed}/{args.repeats}  {side:6}"))
    return rounds


def main() -> None:
    args = arguments()
    common.need("transformers", "trl")
    common.need_checkpoint(args.model)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.side:
        return run_side(args)
    rounds = compare(args)
    medians = {side: [median(step["seconds"] for step in r["steps"]) for r in rounds[side]] for side in SIDES}
    ratios = [theirs / ours for ours, theirs in zip(medians["minirl"], medians["trl"], strict=True)]
    host, sides = common.machine(rounds["minirl"][0]["device"]), {side: summary(rounds[side]) for side in SIDES}
    print(f"{common.describe(host)}, {args.dtype}")
    print(f"{args.prompts} prompts x {args.group} completions of up to {args.max_tokens} tokens a step")
    show(sides, ratios)
    common.write_json(args, {"machine": host, "sides": sides, "ratio": common.spread(ratios), "ratios": ratios})


if __name__ == "__main__":
    common.run(main)
