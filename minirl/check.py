"""`minirl check COMMAND ...`: all that a run does before its first step, and one try of what it does in it.

The data is read, every prompt rendered, the model loaded; one prompt is completed and given to each reward; the disk is
compared with what the checkpoints need. Nothing is written. It is a command of its own and no option of each: whether a
run was looked at first is no part of its config.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from minirl.display import RichDisplay
from minirl.errors import InputError
from minirl.rollout import Rollout, sample
from minirl.sampler import Sampler
from minirl.tasks import Task, parse_task
from minirl.train.grpo import GRPO
from minirl.train.outcomes import OutcomesConfig, SampleConfig, refuse_existing
from minirl.train.policy import PolicyTrainer, prepare_policy
from minirl.train.ppo import PPO
from minirl.train.prefer import PreferConfig, prepare_prefer
from minirl.train.preview import disk_of, marked, marked_row, show_disk
from minirl.train.prompts import measure, show_notes
from minirl.train.reward import RewardConfig, prepare_reward
from minirl.train.rft import RFTConfig
from minirl.train.run import Run, holds_run, identity, load
from minirl.train.sft import SFTConfig, loss_mask, prepare_sft

TRIED = 64  # tokens of the completion that is tried, at most
RENDERED = ("prompts", "examples")  # stages of progress in which texts become tokens


class Timed(RichDisplay):
    """Keeps how long rendering took, and of how many."""

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic):
        super().__init__(console, now)
        self.started, self.seconds, self.counts = 0.0, Counter(), Counter()

    def progress(self, stage: str, done: int, total: int) -> None:
        super().progress(stage, done, total)
        if stage in RENDERED and done == 0:
            self.started = self.now()
        if stage in RENDERED and done >= total > 0:
            self.seconds[stage] += self.now() - self.started
            self.counts[stage] += total


def check(look: Callable) -> Callable:
    """The check of a command from the function that looks at its config."""

    def command(config) -> None:
        if hasattr(config, "resume") and holds_run(config.out):
            raise InputError(
                f"check looks at a run before it begins, and {config.out} already holds one: choose another --out, or "
                "go on with that run by its own command and --resume"
            )
        with Timed() as display:
            look(config, display)
            for stage, count in display.counts.items():
                display.line(f"rendering: {count:,} {stage} in {display.seconds[stage]:.1f} s")
            display.line("nothing was written")

    return command


# --- commands that sample --------------------------------------------------------------------------------------------


def _policy(kind: type[PolicyTrainer]) -> Callable:
    def look(config, display: Timed) -> None:
        trainer = prepare_policy(kind, config, display)
        task = trainer.task
        train = f"{len(task.train):,} training and " if trainer.prompts else ""
        display.line(f"data: {train}{len(task.heldout):,} held-out examples of task {task.name} are used")
        if trainer.stored:
            display.example(trainer.example())
        else:
            rollout = _tried(trainer.sampler, task, trainer.params, display)
            steps = getattr(config, "advantage", None) == "grpo_process"
            rollout.score(trainer.rewards, config.reward_timeout, steps, config.on_bad_reward)
            _show_rewards(rollout, {name: weight for name, (weight, _) in trainer.rewards.items()}, display)
        show_disk(trainer.disk(), display, always=True)

    return look


def _sampling(config: SampleConfig, display: Timed, task: Task) -> torch.nn.Module:
    """Complete one prompt, judge it, and return the model."""
    show_notes(task, display)
    if not task.train:
        raise InputError(f"task {config.task!r} has no training examples: ask for some")
    model, tokenizer = load(config.model, config.dtype, config.device, config=config)
    prompts = measure(task, "train", tokenizer, model.config, config, display, config.prompts)
    display.line(f"data: {len(prompts.examples):,} training examples of task {task.name} are used")
    params = replace(config.sampling, stop_ids=tokenizer.stop_ids)
    sampler = Sampler(model, config.slots, tokenizer=tokenizer)
    rollout = _tried(sampler, replace(task, train=prompts.examples), params, display)
    rollout.score({"correct": (1.0, task.correct)}, config.reward_timeout)
    _show_rewards(rollout, {"correct": 1.0}, display)
    return model


def _outcomes(config: OutcomesConfig, display: Timed) -> None:
    refuse_existing(Path(config.out))
    _sampling(config, display, parse_task(config.task))


def _rft(config: RFTConfig, display: Timed) -> None:
    task = parse_task(config.task)
    run = Run(config.out, identity(config, task.train))
    model = _sampling(config, display, task)
    show_disk(disk_of(run, [model], config.steps, config.save_every), display, always=True)


def _tried(sampler: Sampler, task: Task, params, display: Timed) -> Rollout:
    """The first training prompt with one completion of it, which is shown."""
    params = replace(params, n=1, max_tokens=min(params.max_tokens, TRIED))

    def progress(done: int, total: int) -> None:
        display.progress("completion", done, total)

    rollout = sample(sampler, sampler.tokenizer, task.train[:1], params, progress, [0])
    prompt, completion = rollout.prompts[0], rollout.completions[0]
    tokens = [*prompt, *completion.tokens]
    display.example(marked(sampler.tokenizer, tokens, [i >= len(prompt) for i in range(len(tokens))]))
    return rollout


def _show_rewards(rollout: Rollout, weights: dict[str, float], display: Timed) -> None:
    for line in rollout.fault_lines().values():
        display.line(line)
    for name, weight in weights.items():
        value = rollout.parts[name][0]
        display.line(f"reward {name}, weight {weight:g}: {f'{value:g}' if value == value else 'no score'}")


# --- commands that learn from a file ---------------------------------------------------------------------------------


def _sft(config: SFTConfig, display: Timed) -> None:
    model, tokenizer, rows, run = prepare_sft(config, display)
    display.example(marked_row(tokenizer, rows[0], loss_mask(rows[:1])[0].tolist()))
    show_disk(disk_of(run, [model], config.steps, config.save_every), display, always=True)


def _prefer(config: PreferConfig, display: Timed) -> None:
    trainer = prepare_prefer(config, display)
    display.example(trainer.example())
    show_disk(disk_of(trainer.run, [trainer.model], config.steps, config.save_every), display, always=True)


def _reward(config: RewardConfig, display: Timed) -> None:
    prepared = prepare_reward(config, display)
    display.line(f"data: {len(prepared.train):,} lines to train on, {len(prepared.heldout):,} held out")
    display.example(prepared.example())
    steps = config.steps or -(-len(prepared.train) // config.batch)
    show_disk(disk_of(prepared.run, [prepared.model], steps, config.save_every), display, always=True)


CHECKS: dict[str, Callable] = {
    "sft": check(_sft),
    "rft": check(_rft),
    "outcomes": check(_outcomes),
    "prefer": check(_prefer),
    "reward": check(_reward),
    "grpo": check(_policy(GRPO)),
    "ppo": check(_policy(PPO)),
}
