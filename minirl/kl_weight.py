"""The weight of a KL: fixed, or moved by a controller after each step."""

from dataclasses import replace
from pathlib import Path

import torch

from minirl.batch import Batch
from minirl.config import PolicyConfig
from minirl.kernels.per_token import k3
from minirl.losses import PolicyLoss, adaptive_kl_ppo, adaptive_kl_ziegler

TARGETS = {"ziegler": 6.0, "ppo_penalty": 0.01}  # nats a completion (1909.08593), nats a token (1707.06347)


class KLWeight:
    """β. Ziegler's controller moves that of the KL to the reference, PPO's that of the KL to the policy before."""

    models = ()

    def __init__(self, config: PolicyConfig):
        self.config = config
        ziegler = "kl_in_reward" if config.kl_in_reward else "kl_coef"
        self.moves = {"none": None, "ziegler": ziegler, "ppo_penalty": "kl_old_coef"}[config.adaptive_kl]
        fixed = {"kl_in_reward": config.kl_in_reward, "kl_coef": config.loss.kl_coef}
        self.beta = fixed.get(self.moves, config.loss.kl_old_coef)

    def save(self, folder: Path) -> dict[str, float]:
        return {"beta": self.beta} if self.moves else {}

    def restore(self, folder: Path, state: dict) -> None:
        if self.moves:
            self.beta = float(state["beta"])

    @property
    def policy_loss(self) -> PolicyLoss:
        in_loss = self.moves in ("kl_coef", "kl_old_coef")
        return replace(self.config.loss, **{self.moves: self.beta}) if in_loss else self.config.loss

    @property
    def in_reward(self) -> float:
        return self.beta if self.moves == "kl_in_reward" else self.config.kl_in_reward

    def adapt(self, batch: Batch, policy, moved: bool) -> dict[str, float]:
        """Show the controller the KL of a step; one that has not moved the policy tells it nothing.

        The KL is that of everything that was sampled: a completion that does not count in the loss is a sample of the
        policy all the same, and to leave it in the denominator alone would make the KL look small.
        """
        c, used = self.config, self.beta
        if not self.moves:
            return {}
        target = c.kl_target or TARGETS[c.adaptive_kl]
        if c.adaptive_kl == "ziegler":
            rows = batch.sampled.any(1)
            kl = torch.where(batch.sampled, batch.old_logp - batch.ref_logp, 0).sum(1)[rows].mean().item()
            new = adaptive_kl_ziegler(used, kl, episodes=int(rows.sum()), target=target, horizon=c.kl_horizon)
        else:  # KL(π_old‖π_θ) from samples of π_old
            tokens = k3(batch.old_logp - policy.logprobs(batch.rows))[0]
            kl = tokens[batch.sampled].mean().item()
            new = adaptive_kl_ppo(used, kl, target=target)
        self.beta = new if moved else used
        return {"beta": used, "beta/kl": kl}
