"""Train a transformer from nothing on an embedded task: SFT on demonstrations, then GRPO until it is right.

The task is the sum of two numbers below 100, one token a character. Most demonstrations only guess: `37+85=~140`. The
others show their work, the sum of the ones and the sum of the tens with the carry, and are right: `37+85=(12,12)122`.
So the fine-tuned model is right now and then, and greedy decoding, which guesses, almost never. Only the reward
tells it which habit is better. Held-out problems are in neither the demonstrations nor the prompts of GRPO.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from minirl.config import Config, Count
from minirl.errors import InputError
from minirl.examples import demonstration_rows
from minirl.grpo import GRPOConfig
from minirl.lab.tasks import parse_task
from minirl.lab.training import sft_observers, train_grpo
from minirl.model import ModelConfig, Transformer
from minirl.policy import Policy
from minirl.run import Display, Run
from minirl.sft import SFTConfig, fit
from minirl.task import Task
from minirl.tokenizer import Tokenizer

GUESSES = 0.55  # share of the demonstrations that guess
COPIES = 4  # demonstrations of each problem
TASK = "arithmetic:op=sum,digits=2,style=plain,template={a:02}+{b:02}="


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Train a small transformer from nothing: SFT on sums, most of them guessed, then GRPO. No download."""

    out: str = "runs/demo"
    """Folder of the runs; what an earlier demo left there is replaced."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each."""
    sft_steps: Count = 600
    """Supervised steps."""
    grpo_steps: Count = 120
    """RL steps."""

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds = {self.seeds}: give at least one, each once, none negative")


def demonstrations(task: Task, seed: int) -> list[dict]:
    """Write COPIES answers to each training problem, a share GUESSES of them guessed and the others worked out."""
    rng = random.Random(seed)
    examples = []
    for example in task.train:
        a, b = map(int, example["prompt"].rstrip("=").split("+"))
        ones = a % 10 + b % 10
        tens = a // 10 + b // 10 + ones // 10
        for _ in range(COPIES):
            guess = rng.random() < GUESSES
            answer = f"~{rng.randint(0, 198)}" if guess else f"({ones},{tens}){a + b}"
            examples.append({"prompt": example["prompt"], "completion": answer})
    return examples


def small_transformer(tokenizer: Tokenizer, seed: int) -> Transformer:
    """Make a transformer of the Qwen3 family with 0.4 million parameters."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp_width=384,
        model_type="qwen3",
        qk_norm=True,
        tied=True,
        rope_theta=100.0,
        max_positions=32,
    )
    return Transformer(config).initialise(seed)


def pretrain(task: Task, seed: int, steps: int, out: Path, display: Display) -> Path:
    """Run SFT from random weights; return the model's folder."""
    tokenizer = Tokenizer.from_chars("0123456789+=~(,)")
    model = small_transformer(tokenizer, seed)
    rows = demonstration_rows(tokenizer, demonstrations(task, seed), model.config.max_positions)
    config = SFTConfig(
        model="", data="", steps=steps, batch=128, lr=3e-3, warmup=50, weight_decay=0.01, seed=seed, save_every=steps
    )
    with Run(out, {"demo": "sft", "seed": seed, "steps": steps}, display=display, observers=sft_observers()) as run:
        run.resumable = False
        policy = run.hold("policy", Policy(model, tokenizer, config).with_optimizer(betas=(0.9, 0.95)))
        return fit(run, policy, rows, config)


def reinforce(task: Task, model: Path, seed: int, steps: int, out: Path, display: Display) -> Path:
    """Run GRPO on the same problems without their answers; return the model's folder."""
    config = GRPOConfig(
        model=str(model),
        task=TASK,
        out=str(out),
        steps=steps,
        prompts=64,
        group=8,
        max_tokens=12,
        slots=256,
        lr=4e-4,
        warmup=5,
        schedule="linear",
        eval_every=10,
        eval_prompts=len(task.heldout),
        save_every=steps,
        seed=seed,
    )
    return train_grpo(config, display, task)


def run_demo(config: DemoConfig, seed: int, display: Display) -> tuple[Path, Path]:
    """Run the demo with one seed; return the two run folders."""
    task, folder = parse_task(TASK), Path(config.out) / f"seed-{seed}"
    display.line(
        f"seed {seed}: {len(task.train)} sums to train on, {len(task.heldout)} held out; SFT, mostly on guesses"
    )
    model = pretrain(task, seed, config.sft_steps, folder / "sft", display)
    display.line(f"seed {seed}: GRPO")
    reinforce(task, model, seed, config.grpo_steps, folder / "grpo", display)
    return folder / "sft", folder / "grpo"
