"""Train from a config alone: read data, task and rewards, and watch the run.

Each `train_*` runs the whole of a command and returns the folder of the trained model. The engine gets plain objects:
a source of prompts or stored completions, rewards, records of a file; and observers, which see every step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minirl.evaluate import HeldOutAccuracy
from minirl.files import contents
from minirl.grpo import GRPOConfig, grpo
from minirl.judge.numbers import NUMBER
from minirl.lab.alarms import Alarms
from minirl.lab.no_effect import without_effect
from minirl.lab.preview import DiskCheck, PlainDisplay, ShowExample
from minirl.lab.rewards import rewards_of
from minirl.lab.tasks import parse_task
from minirl.metrics import shown
from minirl.outcomes import OutcomesConfig, Same, SampleConfig, the_text, write_outcomes
from minirl.policy import Policy
from minirl.ppo import PPOConfig, ppo
from minirl.prefer import PreferConfig, prefer
from minirl.prompts import Prompts
from minirl.records import read_demonstrations, read_outcomes, read_preferences
from minirl.reward_training import RewardConfig, heldout_line, read_data, train_reward_model
from minirl.rft import RFTConfig, rft
from minirl.run import Display, Observer, Run, due
from minirl.sft import SFTConfig, sft
from minirl.step import Step
from minirl.stored import Stored
from minirl.task import Task

# ---- one line a step -------------------------------------------------------------------------------------------------


class StepLines(Observer):
    """The observer that prints a line a step: `line(step, steps, metrics)`, or "" where a person needs none."""

    def __init__(self, line: Callable[[int, int, dict], str]):
        self.line = line

    def after(self, step: Step) -> None:
        if text := self.line(step.done, step.total, step.metrics):
            step.run.display.line(text)


def tenth(done: int, steps: int) -> bool:
    """Tell whether a run of many quick steps has a line for a person: ten in all."""
    return due(done, steps, max(1, steps // 10))


def tenths(line: Callable[[int, int, dict], str], and_where: str = "") -> Callable[[int, int, dict], str]:
    """Give a run of many quick steps ten lines in all, and one wherever the metric `and_where` was measured."""
    return lambda done, total, m: line(done, total, m) if and_where in m or tenth(done, total) else ""


def policy_line(step: int, steps: int, m: dict) -> str:
    """Format a step of grpo or ppo: what matters, first things first."""
    held = (
        f"  held-out {shown(m, 'eval/mean', '.3f')} (greedy {shown(m, 'eval/greedy', '.3f')})"
        if "eval/mean" in m
        else ""
    )
    kl = next((name for name in ("kl_ref/k3", "kl_old/k3") if name in m), "trained/kl_old/k3")
    critic = f"critic {shown(m, 'value/explained_var', '.2f')}" if "value/mean" in m else ""
    model = f"reward model {shown(m, 'reward_model/accuracy', '.2f')}  " if "reward_model/accuracy" in m else ""
    return (
        f"step {step}/{steps}  reward {shown(m, 'reward/mean', '.3f')}{held}  {model}kl {shown(m, kl, '.4f')}  "
        f"entropy {shown(m, 'entropy', '.3f')}  {critic or 'signal ' + shown(m, 'group/signal_frac', '.2f')}  "
        f"clip {shown(m, 'clip/frac', '.3f')}  "
        f"mismatch {shown(m, 'mismatch/abs_mean', '.1e')}  len {m['len/mean']:.1f}  "
        f"{shown(m, 'tokens_per_s/rollout', '.0f')}+{shown(m, 'tokens_per_s/train', '.0f')} tok/s  "
        f"{m['memory/peak_gb']:.1f} GB"
    )


def sft_line(step: int, steps: int, m: dict) -> str:
    return (
        f"sft {step}/{steps}  loss {m['loss']:.4f}  entropy {m['entropy']:.3f}  grad {shown(m, 'grad_norm', '.2f')}  "
        f"lr {m['lr']:.1e}  {m['tokens_per_s/train']:.0f} tok/s"
    )


def prefer_line(step: int, steps: int, m: dict) -> str:
    held = f"  held-out {m['eval/accuracy']:.3f}" if "eval/accuracy" in m else ""
    return (
        f"prefer {step}/{steps}  loss {m['loss']:.4f}  accuracy {m['accuracy']:.3f}{held}  "
        f"reward {m['reward/chosen']:.3f} / {m['reward/rejected']:.3f}  "
        f"logp {m['logp/chosen']:.1f} / {m['logp/rejected']:.1f}  grad {shown(m, 'grad_norm', '.2f')}  "
        f"lr {m['lr']:.1e}  {m['tokens_per_s/train']:.0f} tok/s"
    )


def reward_line(step: int, steps: int, m: dict) -> str:
    return (
        f"reward {step}/{steps}  loss {m['loss']:.4f}  accuracy {shown(m, 'accuracy', '.3f')}  "
        f"margin {shown(m, 'margin', '.2f')}{heldout_line(m)}  grad {shown(m, 'grad_norm', '.2f')}  lr {m['lr']:.1e}  "
        f"{m['tokens_per_s/train']:.0f} tok/s"
    )


# ---- algorithms that sample ------------------------------------------------------------------------------------------


class Announcement(Observer):
    """The observer that says at the start which options of a run change nothing."""

    def __init__(self, config, stored: Sequence[dict], resumable: bool):
        self.config, self.stored, self.resumable = config, stored, resumable

    def begin(self, run: Run) -> None:
        run.resumable = self.resumable
        announce(self.config, self.stored, run)


def announce(config, stored: Sequence[dict], run: Run) -> None:
    """Say which options change nothing in a run that is prepared."""
    drift = "logprobs" in stored[0] if stored else run.held["policy"].model.dtype != torch.float32
    if said := without_effect(config, drift):
        run.display.line(f"without effect in this run: {'; '.join(said)}")


def say_notes(task: Task, display: Display) -> None:
    """Say what a person should know of a task."""
    for note in task.notes:
        display.line(note)


def source_of(config, task: Task) -> tuple[Callable, list[dict], list]:
    """Return what makes the source of a run's rollouts, the stored completions, and the data that a resumed run must
    find unchanged."""
    stored = read_outcomes(config.data) if config.data else []

    def source(policy: Policy, config, display: Display):
        if stored:
            return Stored(stored, policy.tokenizer, policy.model.config, config, display)
        return Prompts(task, policy, config, display)

    return source, stored, [task.train, task.heldout, *([contents(stored)] if stored else [])]


def _train(run_of: Callable, config, display: Display | None, task: Task | None) -> Path:
    given, display = task is not None, display or PlainDisplay()
    task = task or parse_task(config.task)
    source, stored, data = source_of(config, task)
    say_notes(task, display)
    observers = [Announcement(config, stored, not given), DiskCheck(), ShowExample()]
    observers += [HeldOutAccuracy(task, config), Alarms(), StepLines(policy_line)]
    return run_of(config, source, rewards_of(config, task), data, display, observers)


def train_grpo(config: GRPOConfig, display: Display | None = None, task: Task | None = None) -> Path:
    """Run the whole of `minirl grpo`. `task` overrides config.task."""
    return _train(grpo, config, display, task)


def train_ppo(config: PPOConfig, display: Display | None = None, task: Task | None = None) -> Path:
    """Run the whole of `minirl ppo`. `task` overrides config.task."""
    return _train(ppo, config, display, task)


def same_of(config: SampleConfig) -> Same:
    """Tell which completions are one: those of equal texts, or of equal numbers."""

    def numbers(line: dict):
        text = line["completion"]  # one without any number is one of its own kind
        return tuple(match[0].replace(",", "") for match in NUMBER.finditer(text)) or text

    return numbers if config.distinct == "numbers" else the_text


def train_rft(config: RFTConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl rft`."""
    display, task = display or PlainDisplay(), parse_task(config.task)
    say_notes(task, display)
    return rft(config, task, same_of(config), display, sft_observers())


def sample_outcomes(config: OutcomesConfig, display: Display | None = None) -> list[Path]:
    """Run the whole of `minirl outcomes`; returns its files."""
    display, task = display or PlainDisplay(), parse_task(config.task)
    say_notes(task, display)
    return write_outcomes(config, task, same_of(config), display)


# ---- algorithms that learn from a file -------------------------------------------------------------------------------


def sft_observers() -> list:
    return [DiskCheck(), StepLines(tenths(sft_line))]


def train_sft(config: SFTConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl sft`."""
    return sft(config, read_demonstrations(config.data), display or PlainDisplay(), sft_observers())


def train_prefer(config: PreferConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl prefer`."""
    observers = [DiskCheck(), StepLines(tenths(prefer_line))]
    return prefer(config, read_preferences(config.data), display or PlainDisplay(), observers)


def train_reward(config: RewardConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl reward`."""
    observers = [DiskCheck(), StepLines(tenths(reward_line, and_where="eval/loss"))]
    return train_reward_model(config, read_data(config), display or PlainDisplay(), observers)
