"""Group-relative policy optimisation and its family: critic-free RL on verifiable rewards.

    for each step:  prompts -> G completions each -> rewards -> advantage within the group -> one or more updates of the
    one policy loss

DeepSeekMath 2402.03300, Alg. 1. Which member of the family runs is a row of options: an advantage estimator and a
`PolicyLoss` (`--preset` takes both from the table in presets.py). The advantage is one number a completion (GRPO and
its successors), one of tokens (REINFORCE, REINFORCE++), or comes from rewards of steps (process supervision).

The page reads downwards: options, the run (`grpo`), its step (`grpo_step`), and the stages that are GRPO's own. The
stages that PPO shares stand with their nouns in rollout.py, batch.py and policy.py; whole-row ratios and denominators
in losses.py; the ratio, the clip and the KL of one token in kernels/per_token.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from minirl.advantages import OF_BATCH, OUTCOME, grpo_process, kl_in_sequence_reward, reinforce, reinforce_pp
from minirl.batch import Batch, compared_rewards, make_batch, mini_batches, token_rewards
from minirl.config import Count, PolicyConfig
from minirl.errors import InputError
from minirl.kl_weight import KLWeight
from minirl.losses import PolicyLoss
from minirl.optimizer import learning_rate
from minirl.policy import Cursor, Policy, Reference, log_rollout, log_updates, past_target_kl, policy_gradient
from minirl.rollout import Rollout, counted, finish_rollout, scored_batch
from minirl.run import Display, Run, identity
from minirl.step import Step

ALONE = ("correct_only", "reinforce", "reinforce_pp")  # advantages that need no other completion of the prompt


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyConfig):
    """Train a checkpoint by GRPO, or a relative of it, on a task with verifiable rewards."""

    out: str = "runs/grpo"
    preset: str | None = None
    """reinforce, rloo, reinforce++, ppo_actor_only, grpo, grpo_ps, dr_grpo, dapo, gspo, gspo_token, cispo, sapo,
    scaling_grpo, dual_clip, tis, mis or online_rft: on the command line a row of the table of algorithms, which sets
    the defaults of advantage, loss, KL, updates a rollout, truncation and dynamic sampling; in Python pass
    `**preset_defaults(name, max_tokens, prompts)`. None: GRPO without a reference."""
    loss: PolicyLoss = field(default_factory=lambda: PolicyLoss(aggregation="seq_mean"))
    advantage: Literal[(*OUTCOME, "reinforce", "reinforce_pp", "grpo_process")] = "grpo"
    """Advantage estimator: of completions (correct_only: 1 where the task's rule says right, other rewards are only
    logged), of tokens (reinforce, reinforce_pp: the KL in the reward is that of each
    token), or of steps (grpo_process: a reward may return for a completion a list with a number for each of its lines,
    or (end, reward) pairs, end = characters up to the end of the step; any other reward is one of the last step)."""
    baseline: Literal["none", "batch_mean", "group_mean"] = "batch_mean"
    """advantage=reinforce: what is subtracted from the return: the mean of the rewards-to-go over the tokens of the
    step, or of the whole returns over the completions of the prompt."""
    drop_zero_advantage: bool = False
    """Completions with advantage 0 leave the loss, and so its denominators."""
    dynamic_sampling: bool = False
    """Train only on groups with right and wrong completions, and sample on until there are `prompts` of them (DAPO)."""
    max_gen_batches: Count = 10
    """dynamic_sampling: batches of `prompts` that a step samples at most; then it trains on the groups that there
    are."""

    def __post_init__(self):
        super().__post_init__()
        grouped = self.advantage not in ALONE or (self.advantage == "reinforce" and self.baseline == "group_mean")
        if self.group == 1 and (grouped or self.dynamic_sampling):
            what = f"advantage {self.advantage!r}" if grouped else "dynamic_sampling"
            raise InputError(
                f"group = 1: {what} compares the completions of a prompt, so one trains nothing: ask for 2 at least"
            )
        if self.preset is not None:
            from minirl.presets import refuse_preset  # whoever names no preset needs no table of them

            refuse_preset(self.preset, critic=False)
        shaped = {"kl_in_reward": self.kl_in_reward, "overlong_cache": self.overlong_cache}
        shaped |= {"truncation = penalty": self.truncation == "penalty", "refresh": self.refresh.every > 0}
        taken = {"grpo_process": "those of steps", "correct_only": "the verdict alone"}.get(self.advantage)
        if taken and any(shaped.values()):
            name = next(name for name, on in shaped.items() if on)
            raise InputError(
                f"{name} changes the reward of a completion, {self.advantage} takes {taken}: leave it away"
            )


class Parts(NamedTuple):
    """The parts of a run; all but the source are saved and restored with it."""

    policy: Policy
    reference: Reference
    source: object  # prompts to sample, or stored completions
    cursor: Cursor
    rewards: object  # minirl.rewards.Rewards
    beta: KLWeight


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def grpo(
    config: GRPOConfig, source: Callable, rewards, data=(), display: Display | None = None, observers: Sequence = ()
) -> Path:
    """Train, from the config or from the run's last checkpoint; returns the folder of the trained model.

    `source(policy, config, display)` makes what the steps draw from (`partial(Prompts, task)`), `rewards` are
    minirl.rewards.Rewards, and `data` is what a resumed run must find unchanged.
    """
    with Run(config.out, identity(config, data), config.resume, display, observers) as run:
        parts = prepare(run, config, source, rewards)
        run.example = (parts.policy.tokenizer, *parts.source.first())
        for step in run.steps("step", config.steps, config.save_every):
            step.attempt(grpo_step, config, parts)
        rewards.finish(run)
        return run.finish(parts.policy.model, parts.policy.tokenizer)


def grpo_step(step: Step, config: GRPOConfig, parts: Parts) -> None:
    """Sample, reward, compare, update."""
    policy, reference, _, cursor, rewards, beta = parts
    batch = step.kept(Batch.load, policy.model.device) or step.keep(sampled_batch(step, config, parts))
    rate = learning_rate(step.number, config.lr, config.warmup, config.steps, config.schedule)
    with step.time("train"):
        for part in step.remaining(mini_batches(batch, config, step)):
            metrics = policy_gradient(policy, part, beta.policy_loss, config)  # of the one loss, in micro-batches
            if past_target_kl(metrics, config):
                policy.optimizer.zero_grad()
                break
            step.update(part, metrics, {"grad_norm": (policy.optimizer, rate)}, config)
    rewards.refresh(step)
    step.add(lr=rate, **beta.adapt(batch, policy, moved=any(step.updates)))
    if step.due(config.ref_reset_every):
        reference.reset(policy)
    log_updates(step)
    cursor.batches += step.draws  # last, when nothing can fail: until then a step that failed can be taken up again


def sampled_batch(step: Step, config: GRPOConfig, parts: Parts) -> Batch:
    """Sample, reward and compare: all of a step before its first update."""
    policy, reference, source, cursor, rewards, beta = parts
    with step.untouched():
        with step.time("rollout"):
            rollout = collect(source, cursor, rewards, config, step)  # prompts -> completions -> rewards
        with step.time("train"):
            batch = make_batch(rollout, policy, reference, config)  # rows, masks, old and reference log-probs
            batch.advantages = estimate_advantages(rollout, batch, policy.tokenizer, beta, config)
            batch.mask = trained_tokens(rollout, batch, config)
        log_rollout(step, rollout, batch, config)
    rewards.watch(rollout)
    return batch


def prepare(run: Run, config: GRPOConfig, source: Callable, rewards) -> Parts:
    """Load or restore all that a run holds."""
    policy = run.hold("policy", Policy.load(config, run).with_optimizer())
    source = source(policy, config, run.display)
    rewards = run.hold("rewards", rewards.beside(policy, source, run))
    reference = run.hold("reference", Reference(policy, config, run))
    return Parts(policy, reference, source, run.hold("cursor", Cursor()), rewards, run.hold("beta", KLWeight(config)))


# ---- samples and rewards ---------------------------------------------------------------------------------------------


def collect(source, cursor: Cursor, rewards, config: GRPOConfig, step: Step) -> Rollout:
    """Sample and reward the prompts of a step; with dynamic sampling (2503.14476 eq. 11) until enough groups have right
    and wrong completions.

    Accuracy decides, not the reward: a punishment of length would fake a signal. Statistics are of all samples.
    Mixed groups beyond `prompts` are dropped and counted: in a later step they would be of an older policy.
    """
    batches, kept, in_steps = [], [], config.advantage == "grpo_process"
    for i in range(config.max_gen_batches if config.dynamic_sampling else 1):
        batches.append(scored_batch(source, cursor.batches + i, rewards, config, step, in_steps))
        kept += [i * config.prompts + group for group in mixed_groups(batches[-1], config)]
        if len(kept) >= config.prompts:
            break
    rollout = everything = Rollout.join(batches)
    rewards.correct_distrusted(everything)
    if config.dynamic_sampling:
        rollout = everything.select(kept[: config.prompts] or range(config.prompts))
        step.add(gen_batches=len(batches), kept_frac=len(kept) / len(everything.prompts))
        step.add(surplus_groups=max(0, len(kept) - config.prompts))
        if not kept:
            rollout.idle = f"none of {len(everything.prompts)} groups has right and wrong completions"
    rollout.batches = len(batches)
    return finish_rollout(rollout, rewards, step)


def mixed_groups(rollout: Rollout, config: GRPOConfig) -> list[int]:
    """Return the groups that can train something: different accuracies among the completions that are compared, and at
    least one that counts in the loss."""
    compared = ~rollout.rewards.isnan()
    if config.exclude_from_baseline:
        compared &= ~rollout.truncated
    groups = torch.tensor(rollout.verdicts).masked_fill(~compared, torch.nan).view(-1, rollout.group_size)
    spread = groups.nan_to_num(-torch.inf).amax(1) - groups.nan_to_num(torch.inf).amin(1)
    in_loss = counted(rollout, config).view(-1, rollout.group_size).any(1)
    return ((spread > 1e-8) & in_loss).nonzero().flatten().tolist()


# ---- from rewards to advantages --------------------------------------------------------------------------------------


def estimate_advantages(rollout: Rollout, batch: Batch, tokenizer, beta: KLWeight, config: GRPOConfig) -> torch.Tensor:
    """Turn the rewards into A [B] of completions, or [B, T] of tokens.

    batch.mask holds the tokens that count in statistics of the batch, batch.sampled every token: a completion that
    truncation=mask takes out stays in the mean of its group, unless exclude_from_baseline gave it the reward NaN.
    """
    rewards, kind = compared_rewards(rollout, batch, config), config.advantage
    groups = rollout.group_ids.to(rewards.device)
    if kind in OUTCOME:
        if kind == "correct_only":
            rewards = right(rollout).to(rewards).masked_fill(rewards.isnan(), torch.nan)
        if config.kl_in_reward:
            rewards = kl_in_sequence_reward(rewards, batch.old_logp, batch.ref_logp, batch.sampled, beta.in_reward)
        return OUTCOME[kind](rewards, groups, **({"mask": batch.mask} if kind in OF_BATCH else {})).float()
    if kind == "grpo_process":
        of_steps, ends = (x.to(rewards.device) for x in rollout.step_rewards(tokenizer))
        return grpo_process(of_steps, ends & ~rewards.isnan()[:, None], groups).float()
    tokens = token_rewards(rewards, batch, beta, config)
    if kind == "reinforce":
        b = {"baseline": config.baseline, "group_ids": groups, "counted": batch.mask}
        return reinforce(tokens, batch.sampled, gamma=config.gamma, **b).float()
    return reinforce_pp(tokens, batch.mask, gamma=config.gamma).float()


def right(rollout: Rollout) -> torch.Tensor:
    """Return 1 where the task's rule says right, whatever else is paid, else 0 [B]; stored completions: their
    reward."""
    verdicts = torch.tensor(rollout.verdicts, dtype=torch.float64)
    return (verdicts == 1).double() if rollout.fresh else verdicts


def trained_tokens(rollout: Rollout, batch: Batch, config: GRPOConfig) -> torch.Tensor:
    """Return the mask [B, T] without tokens that shall train nothing: all of an idle step, where neither KL nor entropy
    alone shall move the policy, and on request those of completions, or tokens, whose advantage is 0."""
    mask = torch.zeros_like(batch.mask) if rollout.idle else batch.mask
    A = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
    return mask & (A != 0) if config.drop_zero_advantage else mask
