"""Proximal policy optimisation (1707.06347) with a critic.

    for each step:  prompts -> completions -> rewards of tokens (KL to the reference, score at the end)
                    -> generalised advantages from the critic's values -> μ epochs of clipped updates of both

The token is the action, and V(s_t) is read before it. With `--preset ppo_penalty` a KL to the policy before the update
takes the place of the clip. PPO without a critic is `minirl grpo --preset ppo_actor_only`.

The page reads downwards, as grpo.py does: it repeats that run and that step, and adds the critic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from minirl.advantages import gae, whiten
from minirl.batch import Batch, compared_rewards, make_batch, mini_batches, token_rewards
from minirl.config import Count, NotNegative, PolicyConfig, Positive, Whole, require
from minirl.critic import Critic
from minirl.kl_weight import KLWeight
from minirl.optimizer import learning_rate
from minirl.policy import Cursor, Policy, Reference, log_rollout, log_updates, past_target_kl, policy_gradient
from minirl.rollout import Rollout, finish_rollout, scored_batch
from minirl.run import Display, Run, identity
from minirl.step import Step


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyConfig):
    """Train a checkpoint by PPO with a critic, on a task with verifiable rewards."""

    out: str = "runs/ppo"
    preset: str | None = None
    """ppo or ppo_penalty: on the command line it sets the defaults of the loss, its KL, updates a rollout and
    truncation; in Python pass `**preset_defaults(name, max_tokens, prompts)`. None: ppo."""
    kl_in_reward: NotNegative = 0.05
    """Weight of the KL to the reference, subtracted from the reward of each token."""
    epochs: Count = 4
    critic: Literal["own", "shared"] = "own"
    """A model of its own that starts from the policy's checkpoint, or a head on the policy's trunk, which then learns
    from both losses: half the memory."""
    critic_from: str | None = None
    """critic=own: another checkpoint to start from, for instance a reward model with a linear head, which is kept
    (InstructGPT). None: the policy's, with a head of zeros."""
    critic_lr: Positive = 1e-5
    """Peak learning rate of the critic; warm-up and schedule are the policy's."""
    critic_warmup: Whole = 0
    """First steps in which only the critic is trained (of a shared one, the head)."""
    lam: NotNegative = 0.95
    """λ of the advantages: 0 trusts the critic (TD), 1 the return (Monte Carlo)."""
    bootstrap_truncated: bool = False
    """A completion cut at max_tokens goes on for the critic: the value after its last token stands for the rest. Else
    its return ends there."""
    whiten: bool = True
    """Advantages of a step with mean 0 and deviation 1."""
    value_clip: Positive | None = 0.2
    """A value moves by so much in a step at most; None: no limit."""
    value_coef: Positive = 0.1
    """critic=shared: weight of the value loss beside the policy loss."""

    def __post_init__(self):
        super().__post_init__()
        if self.preset is not None:
            from minirl.presets import refuse_preset  # whoever names no preset needs no table of them

            refuse_preset(self.preset, critic=True)
        few = f"there are only {self.steps} steps, so the policy would stay"
        self.require("lam", self.lam <= 1, "it must be from 0 to 1")
        self.require("critic_warmup", self.critic_warmup < self.steps, few)
        require(
            self.critic == "own" or self.critic_from is None,
            "critic_from is where a critic of its own starts: leave it away, or take critic = own",
        )
        require(
            self.truncation != "penalty" or not self.bootstrap_truncated,
            "bootstrap_truncated lets a cut completion go on, truncation = penalty punishes it: choose one",
        )


class Parts(NamedTuple):
    """The parts of a run; all but the source are saved and restored with it."""

    policy: Policy
    critic: Critic
    reference: Reference
    source: object  # prompts to sample, or stored completions
    cursor: Cursor
    rewards: object  # minirl.rewards.Rewards
    beta: KLWeight


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def ppo(
    config: PPOConfig, source: Callable, rewards, data=(), display: Display | None = None, observers: Sequence = ()
) -> Path:
    """Train, from the config or from the run's last checkpoint; returns the folder of the trained model. The arguments
    are those of minirl.grpo.grpo."""
    with Run(config.out, identity(config, data), config.resume, display, observers) as run:
        parts = prepare(run, config, source, rewards)
        run.example = (parts.policy.tokenizer, *parts.source.first())
        for step in run.steps("step", config.steps, config.save_every):
            step.attempt(ppo_step, config, parts)
        rewards.finish(run)
        return run.finish(parts.policy.model, parts.policy.tokenizer)


def ppo_step(step: Step, config: PPOConfig, parts: Parts) -> None:
    """Sample, reward, estimate advantages, update policy and critic."""
    policy, critic, reference, _, cursor, rewards, beta = parts
    batch = step.kept(Batch.load, policy.model.device) or step.keep(sampled_batch(step, config, parts))
    schedule = (config.warmup, config.steps, config.schedule)
    rate, critic_rate = (learning_rate(step.number, peak, *schedule) for peak in (config.lr, config.critic_lr))
    warming = step.number < config.critic_warmup
    with step.time("train"):
        for part in step.remaining(mini_batches(batch, config, step)):
            of_critic = critic.add_gradient(part, config.micro_batch_tokens) if critic.own or warming else None
            shared = None if critic.own else critic.loss  # on the policy's trunk both losses share one forward
            of_policy = None if warming else policy_gradient(policy, part, beta.policy_loss, config, shared)
            metrics = (of_critic or {}) | (of_policy or {}) or None  # None: no token of the part counts
            if past_target_kl(metrics, config):
                policy.optimizer.zero_grad()
                critic.optimizer.zero_grad()
                break
            optimizers = {"grad_norm": (policy.optimizer, rate)} if of_policy is not None else {}
            optimizers["value/grad_norm"] = critic.optimizer, critic_rate
            step.update(part, metrics, optimizers, config)
    rewards.refresh(step)
    moved = any("grad_norm" in (metrics or {}) for metrics in step.updates)
    step.add(lr=rate, **beta.adapt(batch, policy, moved))
    if step.due(config.ref_reset_every):
        reference.reset(policy)
    log_updates(step)
    cursor.batches += step.draws  # last, when nothing can fail: until then a step that failed can be taken up again


def sampled_batch(step: Step, config: PPOConfig, parts: Parts) -> Batch:
    """Sample, reward and estimate advantages: all of a step before its first update."""
    policy, critic, reference, source, cursor, rewards, beta = parts
    with step.untouched():
        with step.time("rollout"):
            rollout = collect(source, cursor, rewards, config, step)  # prompts -> completions -> rewards
        with step.time("train"):
            batch = make_batch(rollout, policy, reference, config)  # rows, masks, old and reference log-probs
            found = estimate_advantages(rollout, batch, critic, beta, config)
            batch.advantages, batch.old_values, batch.returns = found
            if rollout.idle:  # neither KL nor entropy nor value alone shall move anything
                batch.mask = torch.zeros_like(batch.mask)
        log_rollout(step, rollout, batch, config)
    rewards.watch(rollout)
    return batch


def prepare(run: Run, config: PPOConfig, source: Callable, rewards) -> Parts:
    """Load or restore all that a run holds."""
    policy = run.hold("policy", Policy.load(config, run).with_optimizer())
    source = source(policy, config, run.display)
    rewards = run.hold("rewards", rewards.beside(policy, source, run))
    reference = run.hold("reference", Reference(policy, config, run))
    critic = run.hold("critic", Critic(policy.model, config, run, source.longest))
    cursor, beta = run.hold("cursor", Cursor()), run.hold("beta", KLWeight(config))
    return Parts(policy, critic, reference, source, cursor, rewards, beta)


# ---- its stages ------------------------------------------------------------------------------------------------------


def collect(source, cursor: Cursor, rewards, config: PPOConfig, step: Step) -> Rollout:
    """Sample and reward the prompts of a step."""
    rollout = scored_batch(source, cursor.batches, rewards, config, step)
    rewards.correct_distrusted(rollout)
    return finish_rollout(rollout, rewards, step)


def estimate_advantages(
    rollout: Rollout, batch: Batch, critic: Critic, beta: KLWeight, config: PPOConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A, V and the returns of every token, [B, T] each."""
    V, after = critic.values_of_rows(batch.rows, config.micro_batch_tokens)
    bootstrap = torch.where(rollout.truncated.to(V.device), after, 0) if config.bootstrap_truncated else None
    tokens = token_rewards(compared_rewards(rollout, batch, config), batch, beta, config)
    A, returns = gae(tokens, V, batch.mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
    return (whiten(A, batch.mask) if config.whiten else A).float(), V, returns.float()
