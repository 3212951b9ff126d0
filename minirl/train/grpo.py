"""Group-relative policy optimisation and its family: critic-free RL on verifiable rewards.

    for each step:  prompts -> G completions each -> rewards -> advantage within the group -> one or more updates of the
    one policy loss

DeepSeekMath 2402.03300, Alg. 1. Which member of the family runs is a row of options: an advantage estimator and a
`PolicyLoss` (`--preset` takes both from the table in losses.py).
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minirl.advantages import OUTCOME, kl_in_sequence_reward
from minirl.errors import InputError
from minirl.evaluate import evaluate
from minirl.losses import PRESETS, PolicyLoss
from minirl.model import Transformer
from minirl.rewards import load_reward
from minirl.rewards.rules import overlong_penalty
from minirl.rollout import Rollout, sample, task_rewards
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import Task, parse_task
from minirl.train.batch import Row, score
from minirl.train.optimizer import AdamW, learning_rate
from minirl.train.run import (
    Display,
    Run,
    identity,
    interruptible,
    load,
    peak_memory_gb,
    refuse_below_one,
    refuse_negative,
    refuse_not_positive,
    refuse_unknown_choices,
    say_if_finished,
)
from minirl.train.sft import order, take
from minirl.train.step import Batch, accumulate, response_mask


@dataclass(frozen=True)
class GRPOConfig:
    """Train a checkpoint by GRPO, or a relative of it, on a task with verifiable rewards."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    task: str = "arithmetic"
    """arithmetic, countdown or a .jsonl file, with options after a colon: arithmetic:op=product,digits=2"""
    out: str = "runs/grpo"
    """Folder of the run."""
    preset: str | None = None
    """A row of the table of algorithms: on the command line it sets advantage, loss and truncation; in Python pass
    `**preset_defaults(name)`. None: GRPO without a reference."""
    advantage: Literal[tuple(OUTCOME)] = "grpo"
    """Advantage estimator."""
    loss: PolicyLoss = field(default_factory=lambda: PolicyLoss(aggregation="seq_mean"))
    """The policy loss."""
    kl_in_reward: float = 0.0
    """Weight of the KL to the reference, subtracted from the reward of a completion."""
    truncation: Literal["keep", "mask", "penalty"] = "keep"
    """A completion cut at max_tokens keeps its reward, leaves the loss, or pays `truncation_penalty`."""
    truncation_penalty: float = 1.0
    """What truncation=penalty subtracts from the reward."""
    overlong_cache: int = 0
    """DAPO's soft punishment over the last so many tokens before max_tokens; 0 = off."""
    drop_zero_advantage: bool = False
    """Completions with advantage 0 leave the loss, and so its denominators."""
    rewards: tuple[str, ...] = ()
    """Further rewards beside the task's: name=weight or file.py:function=weight."""
    reward_timeout: float | None = None
    """Seconds a completion that a reward function may take, in a process that can be killed; one that takes longer has
    no score. None calls it directly."""
    steps: int = 100
    """Rollouts."""
    prompts: int = 16
    """Prompts a step."""
    group: int = 8
    """Completions a prompt."""
    epochs: int = 1
    """Passes of the optimizer over a rollout (μ)."""
    mini_batches: int = 1
    """Optimizer steps a pass."""
    max_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs in training."""
    top_k: int = 0
    """Truncated sampling; what was kept is replayed in training."""
    top_p: float = 1.0
    """Truncated sampling; what was kept is replayed in training."""
    min_p: float = 0.0
    """Truncated sampling; what was kept is replayed in training."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; rewards see what comes before them."""
    slots: int = 64
    """Completions sampled at a time: a memory knob that changes no completion."""
    micro_batch_tokens: int = 4096
    """Tokens in one training forward: a memory knob that changes no gradient."""
    lr: float = 1e-6
    """Peak learning rate."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decay of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int = 10
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation."""
    eval_samples: int = 8
    """Completions a held-out prompt (k of mean@k, pass@k and maj@k), at `temperature`; the greedy one comes on top."""
    save_every: int = 50
    """Steps between checkpoints."""
    shown: int = 2
    """Completions a step that are written to completions.jsonl."""
    seed: int = 0
    """Decides prompts and draws: a run is a function of its config."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; masters are fp32."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    resume: bool = False
    """Continue the run in `out`; slots, micro_batch_tokens, recompute, device, save_every and shown
    may differ, as they change no result."""

    def __post_init__(self):
        refuse_below_one(self, "steps", "prompts", "group", "epochs", "mini_batches", "max_tokens", "slots")
        refuse_below_one(self, "micro_batch_tokens", "eval_prompts", "eval_samples", "save_every")
        refuse_not_positive(self, "lr", "clip_norm", "temperature")
        if self.reward_timeout is not None:
            refuse_not_positive(self, "reward_timeout")
        refuse_negative(self, "kl_in_reward", "weight_decay", "truncation_penalty")
        refuse_negative(self, "warmup", "eval_every", "shown", "seed")
        refuse_unknown_choices(self)
        if self.group == 1 and self.advantage != "correct_only":
            raise InputError(
                f"group = 1: advantage {self.advantage!r} compares the completions of a prompt, so one trains nothing: "
                "ask for 2 at least"
            )
        if self.mini_batches > self.prompts:
            raise InputError(f"mini_batches = {self.mini_batches}: there are only {self.prompts} prompts to share out")
        if not 0 <= self.overlong_cache <= self.max_tokens:
            raise InputError(f"overlong_cache = {self.overlong_cache}: it must be from 0 to max_tokens")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"preset {self.preset!r} is unknown: choose from {', '.join(runnable_presets())}")
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            n=self.group,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )


def preset_defaults(name: str, max_tokens: int = GRPOConfig.max_tokens) -> dict:
    """What a preset sets in a GRPOConfig; an InputError for one that this loop does not run."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: choose from {', '.join(runnable_presets())}")
    preset = PRESETS[name]
    if name not in runnable_presets():
        choices = ", ".join(runnable_presets())
        raise InputError(
            f"preset {name!r} needs more than this loop has (a critic, rewards of steps): choose from {choices}"
        )
    loss = preset.loss
    if loss.aggregation == "seq_sum_const":
        loss = replace(loss, const_length=float(max_tokens))
    overlong = max_tokens // 5 if preset.overlong_punishment else 0  # 4096 of 20480, as in DAPO
    return {
        "preset": name,
        "advantage": preset.advantage,
        "loss": loss,
        "kl_in_reward": preset.kl_in_reward,
        "truncation": preset.truncation,
        "epochs": preset.epochs,
        "overlong_cache": overlong,
        "drop_zero_advantage": preset.drop_zero_advantage,
    }


def runnable_presets() -> list[str]:
    """Presets without a critic whose advantage is one number a completion, and which take every group that is drawn."""
    return [name for name, p in PRESETS.items() if p.advantage in OUTCOME and not p.critic and not p.dynamic_sampling]


class GRPO:
    """Everything that a run holds, and one method for each stage of a step."""

    def __init__(self, config: GRPOConfig, run: Run, display: Display, task: Task):
        self.config, self.run, self.display, self.task = config, run, display, task
        self.late: set[str] = set()  # the rewards that have been named for taking too long
        if not self.task.train:
            raise InputError(f"task {config.task!r} has no training examples: ask for some")
        self.rewards = task_rewards(self.task)
        for name, reward in map(_extra_reward, config.rewards):
            if name in self.rewards:
                raise InputError(f"reward {name!r} is given twice, by the task or by --rewards: leave one away")
            self.rewards[name] = reward
        self.model, self.tokenizer = load(run.checkpoint or config.model, config.dtype, config.device)
        self.model.checkpointing = config.recompute
        self.reference = None
        if config.loss.kl != "none" or config.kl_in_reward:
            self.reference, _ = load(config.model, config.dtype, config.device)
            self.reference.requires_grad_(False)
        self.optimizer = AdamW(self.model, weight_decay=config.weight_decay)
        if run.checkpoint:
            run.restore(self.optimizer)
        self.sampler = Sampler(self.model, config.slots, tokenizer=self.tokenizer)
        self.params = replace(config.sampling, stop_ids=self.tokenizer.stop_ids)

    # --- one step ---------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        """Rollout, rewards, advantages, updates; returns the step's metrics."""
        started = time.perf_counter()
        rollout = self.collect(step)
        sampled = time.perf_counter()
        metrics = rollout.metrics() | self.update(rollout, step)
        trained = time.perf_counter()
        tokens = sum(rollout.lengths)
        self.show(rollout, step + 1)
        return metrics | {
            "tokens_per_s/rollout": tokens / (sampled - started),
            # Rows without a gradient are not computed, so they are not counted either.
            "tokens_per_s/train": metrics["trained_tokens"] / (trained - sampled)
            if metrics["trained_tokens"]
            else math.nan,
            "time/rollout": sampled - started,
            "time/train": trained - sampled,
            "memory/peak_gb": peak_memory_gb(),
        }

    def show(self, rollout: Rollout, step: int) -> None:
        """Write the first completion of some prompts to completions.jsonl."""
        for i in range(min(self.config.shown, len(rollout.prompts))):
            row, completion = i * rollout.group_size, rollout.completions[i * rollout.group_size]
            self.run.log_completion(
                step,
                prompt=rollout.examples[i]["prompt"],
                completion=rollout.texts[row],
                reward=rollout.rewards[row].item(),
                advantage=rollout.advantages[row].item(),
                finish_reason=completion.finish_reason,
            )

    def collect(self, step: int) -> Rollout:
        """Sample the step's prompts and score what comes back."""
        c = self.config
        chosen = take(len(self.task.train), c.seed, step * c.prompts, c.prompts)
        params = replace(self.params, seed=(c.seed << 32) + step)

        def progress(done: int, total: int) -> None:
            self.display.progress("rollout", done, total)

        rollout = sample(self.sampler, self.tokenizer, [self.task.train[i] for i in chosen], params, progress)
        rollout.score(self.rewards, c.reward_timeout)
        self.name_late(rollout)
        if step == 0:  # later it may be a passing failure, which must not cost the run
            rollout.require_score()
        elif rollout.unscored:
            self.display.line(f"step {step + 1} trains nothing: {rollout.unscored}")
        if c.overlong_cache:
            rollout.rewards += torch.from_numpy(overlong_penalty(rollout.lengths, c.max_tokens, c.overlong_cache))
        if c.truncation == "penalty":
            cut = torch.tensor([x.finish_reason == "length" for x in rollout.completions])
            rollout.rewards -= c.truncation_penalty * cut
        return rollout

    def batch(self, rollout: Rollout) -> Batch:
        """Rows, mask, log-probs and advantages of a rollout."""
        c, device = self.config, self.model.device
        prompts = [rollout.prompts[i // rollout.group_size] for i in range(len(rollout.completions))]
        rows = [
            Row(prompt, completion.tokens, i // rollout.group_size, completion.kept)
            for i, (prompt, completion) in enumerate(zip(prompts, rollout.completions, strict=True))
        ]
        mask = response_mask(rows, device)
        sampled = torch.zeros(mask.shape, device=device)
        sampled[mask] = torch.tensor([lp for x in rollout.completions for lp in x.logprobs], device=device)
        if c.truncation == "mask":
            mask &= torch.tensor([x.finish_reason != "length" for x in rollout.completions], device=device)[:, None]
        old = ref = None
        if c.epochs * c.mini_batches > 1 or c.kl_in_reward:
            old = self.score(self.model, rows)
        if self.reference is not None:
            ref = self.score(self.reference, rows)
        rewards = rollout.rewards.to(device)
        if c.kl_in_reward:
            rewards = kl_in_sequence_reward(rewards, old, ref, mask, c.kl_in_reward)
        rollout.advantages = OUTCOME[c.advantage](rewards, rollout.group_ids.to(device)).float()
        if rollout.unscored:  # neither KL nor entropy alone shall move the policy
            mask &= False
        if c.drop_zero_advantage:
            mask &= (rollout.advantages != 0)[:, None]
        return Batch(rows, rollout.advantages, mask, old, ref, sampled)

    def score(self, model: Transformer, rows: list[Row]) -> torch.Tensor:
        return score(model, rows, self.config.micro_batch_tokens, self.config.temperature)

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """μ passes over mini-batches of whole groups; metrics are means over the optimizer steps."""
        c, batch = self.config, self.batch(rollout)
        lr = learning_rate(step, c.lr, c.warmup, c.steps, c.schedule)
        updates, skipped = [], 0
        for epoch in range(c.epochs):
            groups = order(len(rollout.prompts), c.seed, 1 + step * c.epochs + epoch)
            for part in np.array_split(groups, c.mini_batches):
                indices = [g * c.group + j for g in sorted(part.tolist()) for j in range(c.group)]
                metrics = accumulate(self.model, batch.select(indices), c.loss, c.micro_batch_tokens, c.temperature)
                if metrics:
                    updates.append(metrics | {"grad_norm": self.optimizer.step(lr, c.clip_norm)})
                skipped += not metrics
        names = dict.fromkeys(name for metrics in updates for name in metrics)
        means = {name: float(np.mean([m[name] for m in updates if name in m])) for name in names}
        means["trained_tokens"] = sum(m["trained_tokens"] for m in updates)
        adv = rollout.advantages
        return means | {
            "lr": lr,
            "skip_step": skipped,
            "adv/mean": adv.mean().item(),
            "adv/std": adv.std(correction=0).item(),
            "adv/min": adv.min().item(),
            "adv/max": adv.max().item(),
        }

    def name_late(self, rollout: Rollout) -> None:
        """Once for each reward; how many completions there are of them is logged as late_frac."""
        for name, line in rollout.late_lines(self.config.reward_timeout).items():
            if name not in self.late:
                self.late.add(name)
                self.display.line(line)

    def evaluate(self, require_score: bool = False) -> dict[str, float]:
        c = self.config

        def progress(done: int, total: int) -> None:
            self.display.progress("evaluation", done, total)

        params = replace(self.params, n=c.eval_samples, seed=(c.seed << 32) + (1 << 31))
        examples = self.task.heldout[: c.eval_prompts]
        result = evaluate(
            self.sampler, self.tokenizer, self.task, params, examples, True, c.reward_timeout, progress, require_score
        )
        self.name_late(result.rollout)
        return result.metrics


def _extra_reward(spec: str) -> tuple[str, tuple[float, object]]:
    name, _, weight = spec.rpartition("=")
    try:
        return name, (float(weight), load_reward(name))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"reward {spec!r} must be given as name=weight, for instance format=0.2") from None


def step_line(step: int, steps: int, m: dict) -> str:
    """What matters, first things first."""

    def shown(name: str, digits: str) -> str:  # what was not computed, or of nothing, is no number
        return "–" if math.isnan(m.get(name, math.nan)) else format(m[name], digits)

    held = f"  held-out {shown('eval/mean', '.3f')} (greedy {shown('eval/greedy', '.3f')})" if "eval/mean" in m else ""
    kl = "kl_ref/k3" if "kl_ref/k3" in m else "kl_old/k3"
    return (
        f"step {step}/{steps}  reward {shown('reward/mean', '.3f')}{held}  kl {shown(kl, '.4f')}  "
        f"entropy {shown('entropy', '.3f')}  signal {m['group/signal_frac']:.2f}  clip {shown('clip/frac', '.3f')}  "
        f"mismatch {shown('mismatch/abs_mean', '.1e')}  len {m['len/mean']:.1f}  "
        f"{shown('tokens_per_s/rollout', '.0f')}+{shown('tokens_per_s/train', '.0f')} tok/s  "
        f"{m['memory/peak_gb']:.1f} GB"
    )


def train_grpo(config: GRPOConfig, display: Display | None = None, task: Task | None = None) -> Path:
    """Run the whole of `minirl grpo`; returns the folder of the trained model. `task` overrides config.task."""
    display = display or Display()
    task = task or parse_task(config.task)
    run = Run(config.out, identity(config, [task.train, task.heldout]), config.resume)
    trainer = GRPO(config, run, display, task)
    say_if_finished(run, config.steps, display)
    if run.start == 0:
        before = trainer.evaluate(require_score=True)
        display.line(f"before: held-out {before['eval/mean']:.3f} (greedy {before['eval/greedy']:.3f})")
    display.progress("step", run.start, config.steps)
    with interruptible(display) as stop_requested:
        for step in range(run.start, config.steps):
            metrics = trainer.step(step)
            if step == 0:  # only now: a run whose first step fails leaves no folder
                run.log(0, before)
            last = step + 1 == config.steps
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                metrics |= trainer.evaluate()
            run.log(step + 1, metrics)
            display.progress("step", step + 1, config.steps)
            display.line(step_line(step + 1, config.steps, metrics))
            stopping = stop_requested()  # asked once: what stops has saved
            if last or (step + 1) % config.save_every == 0 or stopping:
                run.save(step + 1, trainer.model, trainer.tokenizer, trainer.optimizer)
            if stopping and not last:
                display.line(f"stopped after step {step + 1}; continue with --resume --out {run.out}")
                raise KeyboardInterrupt
    return run.finish(trainer.model, trainer.tokenizer)
