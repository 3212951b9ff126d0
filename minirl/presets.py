"""The algorithms, a row each: what `--preset NAME` sets in the config of `minirl grpo` or `minirl ppo`.

A row names its advantage estimator (a function of `minirl.advantages`; "gae" needs the critic that ppo trains), its
policy loss, and every other option that makes the algorithm. A value that depends on the size of a run is a function of
the config. Options that a row leaves out keep the default of the config.
"""

import math
from types import SimpleNamespace

from minirl.config import PolicyConfig
from minirl.errors import InputError
from minirl.losses import PolicyLoss


def up_to_4(config) -> int:
    """Return 4 mini-batches, or as many as there are prompts to share out.

    A row has them where its ratio makes the algorithm: in a single update every ratio is 1.
    """
    return min(4, config.prompts)


def dr_grpo_loss(config) -> PolicyLoss:
    """Return Dr. GRPO's loss: row sums over a constant, here the generation budget (2503.20783)."""
    return PolicyLoss(aggregation="seq_sum_const", const_length=float(config.max_tokens))


def dapo_cache(config) -> int:
    """Return the last fifth of max_tokens: 4096 of 20480 in DAPO (2503.14476)."""
    return config.max_tokens // 5


REINFORCE = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="seq_sum")
PPO = PolicyLoss(surrogate="clip", aggregation="token_mean")
PPO_PENALTY = PolicyLoss(eps_low=math.inf, eps_high=math.inf, kl_old_coef=1.0, aggregation="token_mean")
GRPO = PolicyLoss(kl="k3", kl_coef=0.04, aggregation="seq_mean")
DAPO = PolicyLoss(eps_high=0.28, aggregation="token_mean")
GSPO = PolicyLoss(ratio_level="seq_mean", eps_low=3e-4, eps_high=4e-4, aggregation="seq_mean")
CISPO = PolicyLoss(surrogate="is_pg", w_max=5.0, aggregation="token_mean")
SAPO = PolicyLoss(surrogate="sapo", aggregation="seq_mean")
SCALING_GRPO = PolicyLoss(kl="k3_is", kl_coef=0.001, opsm_delta=0.5, aggregation="seq_mean")
DUAL_CLIP = PolicyLoss(dual_clip=3.0, aggregation="seq_mean")
TIS = PolicyLoss(importance="token_truncate", aggregation="seq_mean")
MIS = PolicyLoss(importance="token_mask", importance_floor=0.5, aggregation="seq_mean")
ONLINE_RFT = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="token_mean")

PRESETS: dict[str, dict] = {
    "reinforce": {"advantage": "reinforce", "loss": REINFORCE, "kl_in_reward": 0.05},
    "rloo": {"advantage": "rloo", "loss": REINFORCE, "kl_in_reward": 0.05},
    "reinforce++": {"advantage": "reinforce_pp", "loss": PPO, "kl_in_reward": 0.05},
    "ppo": {"advantage": "gae", "loss": PPO, "epochs": 4, "kl_in_reward": 0.05},
    "ppo_penalty": {
        "advantage": "gae",
        "loss": PPO_PENALTY,
        "epochs": 4,
        "kl_in_reward": 0.0,
        "adaptive_kl": "ppo_penalty",
    },
    "ppo_actor_only": {"advantage": "reinforce", "loss": PPO, "epochs": 4},
    "grpo": {"advantage": "grpo", "loss": GRPO},
    "grpo_ps": {"advantage": "grpo_process", "loss": GRPO},
    "dr_grpo": {"advantage": "grpo_mean", "loss": dr_grpo_loss},
    "dapo": {
        "advantage": "grpo",
        "loss": DAPO,
        "mini_batches": up_to_4,
        "dynamic_sampling": True,
        "overlong_cache": dapo_cache,
    },
    "gspo": {"advantage": "grpo", "loss": GSPO, "mini_batches": up_to_4},
    "gspo_token": {"advantage": "grpo_process", "loss": GSPO, "mini_batches": up_to_4},
    "cispo": {"advantage": "grpo", "loss": CISPO, "mini_batches": up_to_4},
    "sapo": {"advantage": "grpo", "loss": SAPO, "mini_batches": up_to_4},
    "scaling_grpo": {"advantage": "grpo_mean", "loss": SCALING_GRPO, "mini_batches": up_to_4},
    "dual_clip": {"advantage": "grpo", "loss": DUAL_CLIP, "mini_batches": up_to_4},
    "tis": {"advantage": "grpo", "loss": TIS},
    "mis": {"advantage": "grpo", "loss": MIS},
    "online_rft": {"advantage": "correct_only", "loss": ONLINE_RFT, "drop_zero_advantage": True},
}


def presets(critic: bool) -> list[str]:
    """List the rows that a loop with or without a critic runs."""
    return [name for name, row in PRESETS.items() if (row["advantage"] == "gae") == critic]


def refuse_preset(name: str, critic: bool) -> None:
    """Raise an InputError for a preset that a loop with or without a critic does not run."""
    if name not in presets(critic):
        other = "has no critic, minirl grpo runs it" if critic else "needs a critic, which minirl ppo trains"
        why = other if name in PRESETS else "is unknown"
        raise InputError(f"preset {name!r} {why}: choose from {', '.join(presets(critic))}")


def overrides(name: str, config) -> dict:
    """Return what a preset sets in a config with the sizes of `config`."""
    return {"preset": name} | {key: of(config) if callable(of) else of for key, of in PRESETS[name].items()}


def preset_defaults(
    name: str,
    max_tokens: int = PolicyConfig.max_tokens,
    prompts: int = PolicyConfig.prompts,
    critic: bool | None = None,
) -> dict:
    """Return what a preset sets in a GRPOConfig, or where it has a critic in a PPOConfig, of these sizes; raise an
    InputError for an unknown one, or where `critic` says which of the two loops shall run it and it does not."""
    critic = name in presets(critic=True) if critic is None else critic
    refuse_preset(name, critic)
    found = overrides(name, SimpleNamespace(max_tokens=max_tokens, prompts=prompts))
    return {key: value for key, value in found.items() if not (critic and key == "advantage")}  # from the critic
