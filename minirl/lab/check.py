"""`minirl check COMMAND ...`: all that a run does before its first step, and one try of what it does in it.

The data is read, every prompt rendered, the model loaded; one prompt is completed and given to each reward; the disk is
compared with what the checkpoints need. Nothing is written. It is a command of its own and no option of each: whether a
run was looked at first is no part of its config.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from minirl import grpo, ppo, prefer, reward_training, sft
from minirl.errors import InputError
from minirl.evaluate import HeldOutAccuracy
from minirl.files import contents
from minirl.lab.display import RichDisplay
from minirl.lab.preview import disk_of, show_disk
from minirl.lab.rewards import rewards_of
from minirl.lab.tasks import parse_task
from minirl.lab.training import announce, say_notes, source_of
from minirl.outcomes import OutcomesConfig, SampleConfig, refuse_existing
from minirl.policy import Policy, load
from minirl.prefer import PreferConfig
from minirl.prompts import measure
from minirl.records import read_demonstrations, read_preferences
from minirl.reward_training import RewardConfig
from minirl.rewards import score_rollout
from minirl.rft import RFTConfig
from minirl.rollout import Rollout, sample
from minirl.run import Run, holds_run, identity
from minirl.sampler import Sampler
from minirl.sft import SFTConfig
from minirl.task import Task

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
    """Make the check of a command from the function that looks at its config."""

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


def _policy(prepare: Callable) -> Callable:
    def look(config, display: Timed) -> None:
        task = parse_task(config.task)
        say_notes(task, display)
        source, stored, data = source_of(config, task)
        with Run(config.out, identity(config, data), display=display) as run:
            parts = prepare(run, config, source, rewards_of(config, task))
            announce(config, stored, run)
            heldout = HeldOutAccuracy(task, config).measured(run)
            train = "" if stored else f"{len(parts.source.measured.examples):,} training and "
            display.line(f"data: {train}{len(heldout):,} held-out examples of task {task.name} are used")
            if stored:
                display.example(parts.policy.tokenizer, *parts.source.first())
            else:
                rollout = _tried(parts.policy.sampler, parts.source.measured.examples, parts.source.params, display)
                functions, in_steps = parts.rewards.functions, getattr(config, "advantage", None) == "grpo_process"
                score_rollout(rollout, functions, config.reward_timeout, in_steps, config.on_bad_reward)
                _show_rewards(rollout, {name: weight for name, (weight, _) in functions.items()}, display)
            show_disk(disk_of(run, config.steps, config.save_every), display, always=True)

    return look


def _sampling(config: SampleConfig, display: Timed, task: Task, policy: Policy | None = None) -> None:
    """Complete one prompt, and check the completion."""
    if not task.train:
        raise InputError(f"task {config.task!r} has no training examples: ask for some")
    model, tokenizer = (
        load(config.model, config.dtype, config.device, config=config)
        if policy is None
        else (policy.model, policy.tokenizer)
    )
    prompts = measure(task, "train", tokenizer, model.config, config, display, config.prompts)
    display.line(f"data: {len(prompts.examples):,} training examples of task {task.name} are used")
    params = replace(config.sampling, stop_ids=tokenizer.stop_ids)
    rollout = _tried(Sampler(model, config.slots, tokenizer=tokenizer), prompts.examples, params, display)
    score_rollout(rollout, {"correct": (1.0, task.correct)}, config.reward_timeout)
    _show_rewards(rollout, {"correct": 1.0}, display)


def _outcomes(config: OutcomesConfig, display: Timed) -> None:
    refuse_existing(Path(config.out))
    task = parse_task(config.task)
    say_notes(task, display)
    _sampling(config, display, task)


def _rft(config: RFTConfig, display: Timed) -> None:
    task = parse_task(config.task)
    with Run(config.out, identity(config, task.train), display=display) as run:
        say_notes(task, display)
        policy = run.hold("policy", Policy.load(config, run))
        _sampling(config, display, task, policy)
        show_disk(disk_of(run, config.steps, config.save_every), display, always=True)


def _tried(sampler: Sampler, examples: Sequence[dict], params, display: Timed) -> Rollout:
    """Complete the first training prompt once, and show it."""
    params = replace(params, n=1, max_tokens=min(params.max_tokens, TRIED))

    def progress(done: int, total: int) -> None:
        display.progress("completion", done, total)

    rollout = sample(sampler, sampler.tokenizer, examples[:1], params, progress, [0])
    display.example(sampler.tokenizer, rollout.prompts[0], rollout.completions[0].tokens)
    return rollout


def _show_rewards(rollout: Rollout, weights: dict[str, float], display: Timed) -> None:
    for line in rollout.fault_lines().values():
        display.line(line)
    for name, weight in weights.items():
        value = rollout.parts[name][0]
        display.line(f"reward {name}, weight {weight:g}: {f'{value:g}' if value == value else 'no score'}")


# --- commands that learn from a file ---------------------------------------------------------------------------------


def _sft(config: SFTConfig, display: Timed) -> None:
    examples = read_demonstrations(config.data)
    with Run(config.out, identity(config, contents(examples)), display=display) as run:
        policy, rows = sft.prepare(run, config, examples)
        display.example(policy.tokenizer, *sft.first_example(rows[0]))
        show_disk(disk_of(run, config.steps, config.save_every), display, always=True)


def _prefer(config: PreferConfig, display: Timed) -> None:
    examples = read_preferences(config.data)
    with Run(config.out, identity(config, contents(examples)), display=display) as run:
        model, tokenizer, train, _ = prefer.prepare(run, config, examples)
        run.hold("policy", Policy(model, tokenizer, config))
        display.example(tokenizer, *prefer.first_example(train[0]))
        show_disk(disk_of(run, config.steps, config.save_every), display, always=True)


def _reward(config: RewardConfig, display: Timed) -> None:
    examples = reward_training.read_data(config)
    with Run(config.out, identity(config, examples.data), display=display) as run:
        parts = reward_training.prepare(run, config, examples)
        display.line(f"data: {len(parts.train):,} lines to train on, {len(parts.heldout):,} held out")
        display.example(parts.policy.tokenizer, *reward_training.first_example(parts.train[0].rows[0]))
        steps = config.steps or parts.steps_of_a_pass
        show_disk(disk_of(run, steps, config.save_every), display, always=True)


CHECKS: dict[str, Callable] = {
    "sft": check(_sft),
    "rft": check(_rft),
    "outcomes": check(_outcomes),
    "prefer": check(_prefer),
    "reward": check(_reward),
    "grpo": check(_policy(grpo.prepare)),
    "ppo": check(_policy(ppo.prepare)),
}
