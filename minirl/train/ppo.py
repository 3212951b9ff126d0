"""Proximal policy optimisation (1707.06347) with a critic.

    for each step:  prompts -> completions -> rewards of tokens (KL to the reference, score at the end)
                    -> generalised advantages from the critic's values -> μ epochs of clipped updates of both

The token is the action, and V(s_t) is read before it. With `--preset ppo_penalty` a KL to the policy before the update
takes the place of the clip. PPO without a critic is `minirl grpo --preset ppo_actor_only`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from minirl.advantages import gae, whiten
from minirl.errors import InputError
from minirl.losses import PolicyLoss
from minirl.rollout import Rollout
from minirl.tasks import Task
from minirl.train.config import PolicyConfig, common_defaults, presets, refuse_preset
from minirl.train.critic import Critic
from minirl.train.policy import PolicyTrainer, train_policy
from minirl.train.run import Display, Run, refuse_negative, refuse_not_positive
from minirl.train.step import Batch, accumulate


@dataclass(frozen=True)
class PPOConfig(PolicyConfig):
    """Train a checkpoint by PPO with a critic, on a task with verifiable rewards."""

    out: str = "runs/ppo"
    """Folder of the run."""
    preset: str | None = None
    """ppo or ppo_penalty: on the command line it sets the defaults of the loss, its KL, updates a rollout and
    truncation; in Python pass `**preset_defaults(name, max_tokens, prompts)`. None: ppo."""
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy loss."""
    kl_in_reward: float = 0.05
    """Weight of the KL to the reference, subtracted from the reward of each token."""
    epochs: int = 4
    """Passes of the optimizer over a rollout (μ)."""
    critic: Literal["own", "shared"] = "own"
    """A model of its own that starts from the policy's checkpoint, or a head on the policy's trunk, which then learns
    from both losses: half the memory."""
    critic_from: str | None = None
    """critic=own: another checkpoint to start from, for instance a reward model with a linear head, which is kept
    (InstructGPT). None: the policy's, with a head of zeros."""
    critic_lr: float = 1e-5
    """Peak learning rate of the critic; warm-up and schedule are the policy's."""
    critic_warmup: int = 0
    """First steps in which only the critic is trained (of a shared one, the head)."""
    lam: float = 0.95
    """λ of the advantages: 0 trusts the critic (TD), 1 the return (Monte Carlo)."""
    bootstrap_truncated: bool = False
    """A completion cut at max_tokens goes on for the critic: the value after its last token stands for the rest. Else
    its return ends there."""
    whiten: bool = True
    """Advantages of a step with mean 0 and deviation 1."""
    value_clip: float | None = 0.2
    """A value moves by so much in a step at most; None: no limit."""
    value_coef: float = 0.1
    """critic=shared: weight of the value loss beside the policy loss."""

    def __post_init__(self):
        super().__post_init__()
        refuse_not_positive(self, "critic_lr", "value_coef", *(["value_clip"] if self.value_clip is not None else []))
        refuse_negative(self, "critic_warmup", "lam")
        if self.preset is not None:
            refuse_preset(self.preset, critic=True)
        for fine, sentence in (
            (self.lam <= 1, f"lam = {self.lam}: it must be from 0 to 1"),
            (
                self.critic_warmup < self.steps,
                f"critic_warmup = {self.critic_warmup}: there are only {self.steps} steps, so the policy would stay",
            ),
            (
                self.critic == "own" or self.critic_from is None,
                "critic_from is where a critic of its own starts: leave it away, or take critic = own",
            ),
            (
                self.truncation != "penalty" or not self.bootstrap_truncated,
                "bootstrap_truncated lets a cut completion go on, truncation = penalty punishes it: choose one",
            ),
        ):
            if not fine:
                raise InputError(sentence)


def runnable_presets() -> list[str]:
    """The rows of the table with a critic."""
    return presets(critic=True)


def preset_defaults(name: str, max_tokens: int = PPOConfig.max_tokens, prompts: int = PPOConfig.prompts) -> dict:
    """What a preset sets in a PPOConfig with these sizes; an InputError for one without a critic."""
    refuse_preset(name, critic=True)
    return common_defaults(name, max_tokens, prompts)


class PPO(PolicyTrainer):
    """Advantages from a critic that is trained beside the policy."""

    def __init__(self, config: PPOConfig, run: Run, display: Display, task: Task, stored: Sequence[dict] = ()):
        super().__init__(config, run, display, task, stored)
        saved = run.checkpoint / "critic" if run.checkpoint else None
        source = (saved or config.critic_from or config.model) if config.critic == "own" else None
        self.critic = Critic(self.model, source, config.value_clip, config.value_coef, config.weight_decay)
        self.critic.refuse_short(self.longest, source)
        if saved:
            if config.critic == "shared":
                self.critic.restore_head(saved)
            run.restore(self.critic.optimizer, "critic")

    @property
    def saved(self) -> list[torch.nn.Module]:
        return [*super().saved, self.critic.trunk if self.critic.own else self.critic.head]

    def credit(self, rollout: Rollout, batch: Batch, rewards: torch.Tensor) -> None:
        c = self.config
        V, after = self.critic.score(batch.rows, c.micro_batch_tokens)
        bootstrap = torch.where(rollout.truncated.to(V.device), after, 0) if c.bootstrap_truncated else None
        tokens = self.token_rewards(batch, rewards)
        A, returns = gae(tokens, V, batch.mask, gamma=c.gamma, lam=c.lam, bootstrap=bootstrap)
        if c.whiten:
            A = whiten(A, batch.mask)
        batch.advantages, batch.old_values, batch.returns = A.float(), V, returns.float()

    def gradient(self, batch: Batch, step: int) -> dict[str, float]:
        c = self.config
        if step < c.critic_warmup:
            return self.critic.accumulate(batch, c.micro_batch_tokens)
        also = None if self.critic.own else self.critic.loss
        known = c.target_kl is not None
        metrics = accumulate(self.model, batch, self.kl.loss, c.micro_batch_tokens, c.temperature, also, known)
        return self.critic.accumulate(batch, c.micro_batch_tokens) | metrics if self.critic.own else metrics

    def apply(self, step: int) -> dict[str, float]:
        c = self.config
        metrics = super().apply(step) if self.optimizer.grads else {}
        norm = self.critic.optimizer.step(self.rate(step, c.critic_lr), c.clip_norm)
        return metrics | {"value/grad_norm": norm}

    def forget(self) -> None:
        super().forget()
        self.critic.optimizer.zero_grad()

    def save_more(self, folder: Path) -> None:
        super().save_more(folder)
        self.critic.save(folder / "critic")


def train_ppo(config: PPOConfig, display: Display | None = None, task: Task | None = None) -> Path:
    """Run the whole of `minirl ppo`; returns the folder of the trained model. `task` overrides config.task."""
    return train_policy(PPO, config, display, task)
