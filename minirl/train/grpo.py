"""Group-relative policy optimisation and its family: critic-free RL on verifiable rewards.

    for each step:  prompts -> G completions each -> rewards -> advantage within the group -> one or more updates of the
    one policy loss

DeepSeekMath 2402.03300, Alg. 1. Which member of the family runs is a row of options: an advantage estimator and a
`PolicyLoss` (`--preset` takes both from the table in losses.py). The advantage is one number a completion (GRPO and its
successors), one of tokens (REINFORCE, REINFORCE++), or comes from rewards of steps (process supervision).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from minirl.advantages import OF_BATCH, OUTCOME, grpo_process, kl_in_sequence_reward, reinforce, reinforce_pp
from minirl.errors import InputError
from minirl.losses import PRESETS, PolicyLoss
from minirl.rollout import Rollout
from minirl.tasks import Task
from minirl.train.config import PolicyConfig, common_defaults, presets, refuse_preset
from minirl.train.policy import PolicyTrainer, step_line, train_policy
from minirl.train.run import Display, refuse_below_one
from minirl.train.step import Batch

__all__ = ["GRPO", "GRPOConfig", "preset_defaults", "runnable_presets", "step_line", "train_grpo"]

ALONE = ("correct_only", "reinforce", "reinforce_pp")  # advantages that need no other completion of the prompt


@dataclass(frozen=True)
class GRPOConfig(PolicyConfig):
    """Train a checkpoint by GRPO, or a relative of it, on a task with verifiable rewards."""

    out: str = "runs/grpo"
    """Folder of the run."""
    preset: str | None = None
    """reinforce, rloo, reinforce++, ppo_actor_only, grpo, grpo_ps, dr_grpo, dapo, gspo, gspo_token, cispo, sapo,
    scaling_grpo, dual_clip, tis, mis or online_rft: on the command line a row of the table of algorithms, which sets
    the defaults of advantage, loss, KL, updates a rollout, truncation and dynamic sampling; in Python pass
    `**preset_defaults(name, max_tokens, prompts)`. None: GRPO without a reference."""
    loss: PolicyLoss = field(default_factory=lambda: PolicyLoss(aggregation="seq_mean"))
    """The policy loss."""
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
    max_gen_batches: int = 10
    """dynamic_sampling: batches of `prompts` that a step samples at most; then it trains on the groups that there
    are."""

    def __post_init__(self):
        super().__post_init__()
        refuse_below_one(self, "max_gen_batches")
        grouped = self.advantage not in ALONE or (self.advantage == "reinforce" and self.baseline == "group_mean")
        if self.group == 1 and (grouped or self.dynamic_sampling):
            what = f"advantage {self.advantage!r}" if grouped else "dynamic_sampling"
            raise InputError(
                f"group = 1: {what} compares the completions of a prompt, so one trains nothing: ask for 2 at least"
            )
        if self.preset is not None:
            refuse_preset(self.preset, critic=False)
        shaped = {"kl_in_reward": self.kl_in_reward, "overlong_cache": self.overlong_cache}
        shaped |= {"truncation = penalty": self.truncation == "penalty", "refresh": self.refresh.every > 0}
        taken = {"grpo_process": "those of steps", "correct_only": "the verdict alone"}.get(self.advantage)
        if taken and any(shaped.values()):
            name = next(name for name, on in shaped.items() if on)
            raise InputError(
                f"{name} changes the reward of a completion, {self.advantage} takes {taken}: leave it away"
            )


def runnable_presets() -> list[str]:
    """The rows of the table without a critic."""
    return presets(critic=False)


def preset_defaults(name: str, max_tokens: int = GRPOConfig.max_tokens, prompts: int = GRPOConfig.prompts) -> dict:
    """What a preset sets in a GRPOConfig with these sizes; an InputError for one that needs a critic."""
    refuse_preset(name, critic=False)
    preset = PRESETS[name]
    return common_defaults(name, max_tokens, prompts) | {
        "advantage": preset.advantage,
        "drop_zero_advantage": preset.drop_zero_advantage,
        "dynamic_sampling": preset.dynamic_sampling,
    }


class GRPO(PolicyTrainer):
    """Advantages from rewards alone."""

    def collect(self, step: int) -> Rollout:
        """Sample and score the prompts of a step; with dynamic sampling (2503.14476 eq. 11) until enough groups have
        right and wrong completions.

        Accuracy decides, not the reward: a punishment of length would fake a signal. Statistics are of all samples.
        Mixed groups beyond `prompts` are dropped and counted: in a later step they would be of an older policy.
        """
        c = self.config
        batches, kept = [], []
        for i in range(c.max_gen_batches if c.dynamic_sampling else 1):
            batches.append(self.draw(self.cursor + i, steps=c.advantage == "grpo_process"))
            kept += [i * c.prompts + group for group in self.mixed_groups(batches[-1])]
            if len(kept) >= c.prompts:
                break
        everything = Rollout.join(batches)
        self.watch(everything)
        rollout = everything.select(kept[: c.prompts] or range(c.prompts)) if c.dynamic_sampling else everything
        rollout.stats, rollout.batches = self.statistics(everything), len(batches)
        if c.dynamic_sampling:
            rollout.stats |= {"gen_batches": len(batches), "kept_frac": len(kept) / len(everything.prompts)}
            rollout.stats |= {"surplus_groups": max(0, len(kept) - c.prompts)}
            if not kept:
                rollout.idle = f"none of {len(everything.prompts)} groups has right and wrong completions"
        self.say_idle(rollout, step)
        return rollout

    def mixed_groups(self, rollout: Rollout) -> list[int]:
        """The groups with different accuracies among the completions that are compared, and one at least that counts in
        the loss."""
        compared = ~rollout.rewards.isnan()
        if self.config.exclude_from_baseline:
            compared &= ~rollout.truncated
        groups = torch.tensor(self.verdicts(rollout)).masked_fill(~compared, torch.nan).view(-1, rollout.group_size)
        spread = groups.nan_to_num(-torch.inf).amax(1) - groups.nan_to_num(torch.inf).amin(1)
        counted = self.counted(rollout).view(-1, rollout.group_size).any(1)
        return ((spread > 1e-8) & counted).nonzero().flatten().tolist()

    def right(self, rollout: Rollout) -> torch.Tensor:
        """1 where the task's rule says so, whatever else is paid, else 0 [B]; of stored completions their reward."""
        verdicts = torch.tensor(self.verdicts(rollout), dtype=torch.float64)
        return verdicts if self.stored else (verdicts == 1).double()

    def credit(self, rollout: Rollout, batch: Batch, rewards: torch.Tensor) -> None:
        c, groups = self.config, rollout.group_ids.to(rewards.device)
        if c.advantage in OUTCOME:
            if c.advantage == "correct_only":
                rewards = self.right(rollout).to(rewards).masked_fill(rewards.isnan(), torch.nan)
            if c.kl_in_reward:
                logp = (batch.old_logp, batch.ref_logp, batch.sampled)
                rewards = kl_in_sequence_reward(rewards, *logp, self.kl.in_reward)
            mask = {"mask": batch.mask} if c.advantage in OF_BATCH else {}
            advantages = OUTCOME[c.advantage](rewards, groups, **mask)
        elif c.advantage == "grpo_process":
            steps, ends = rollout.step_rewards(self.rewards, self.tokenizer)
            ends = ends.to(rewards.device) & ~rewards.isnan()[:, None]
            advantages = grpo_process(steps.to(rewards.device), ends, groups)
        else:
            tokens = self.token_rewards(batch, rewards)
            if c.advantage == "reinforce":
                b = {"baseline": c.baseline, "group_ids": groups, "counted": batch.mask}
                advantages = reinforce(tokens, batch.sampled, gamma=c.gamma, **b)
            else:
                advantages = reinforce_pp(tokens, batch.mask, gamma=c.gamma)
        batch.advantages = advantages.float()

    def batch(self, rollout: Rollout) -> Batch:
        batch = super().batch(rollout)
        if self.config.drop_zero_advantage:
            A = batch.advantages
            batch.mask = batch.mask & ((A if A.dim() == 2 else A[:, None]) != 0)
        return batch


def train_grpo(config: GRPOConfig, display: Display | None = None, task: Task | None = None) -> Path:
    """Run the whole of `minirl grpo`; returns the folder of the trained model. `task` overrides config.task."""
    return train_policy(GRPO, config, display, task)
