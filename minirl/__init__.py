"""A compact engine for reinforcement learning of language models on one GPU.

`__all__` is the public API, beside the functions of `minirl.advantages` and `minirl.kernels`. A module is imported when
one of its names is first used: the judge's workers, which run without torch, import this package too.
"""

from importlib import import_module

TYPE_CHECKING = False  # a type checker reads it as True; without the module `typing` Ctrl-C is handled sooner

if TYPE_CHECKING:  # the names of the table below once more: `X as X` tells a type checker that X is meant for others
    # isort: off
    from minirl.batch import Batch as Batch, add_policy_gradient as add_policy_gradient
    from minirl.errors import InputError as InputError
    from minirl.grpo import GRPOConfig as GRPOConfig
    from minirl.lab.tasks import parse_task as parse_task
    from minirl.lab.training import (
        sample_outcomes as sample_outcomes,
        train_grpo as train_grpo,
        train_ppo as train_ppo,
        train_prefer as train_prefer,
        train_reward as train_reward,
        train_rft as train_rft,
        train_sft as train_sft,
    )
    from minirl.losses import PolicyLoss as PolicyLoss, policy_loss as policy_loss
    from minirl.model import ModelConfig as ModelConfig, Transformer as Transformer
    from minirl.optimizer import AdamW as AdamW
    from minirl.outcomes import OutcomesConfig as OutcomesConfig
    from minirl.ppo import PPOConfig as PPOConfig
    from minirl.prefer import PreferConfig as PreferConfig
    from minirl.preferences import PreferenceLoss as PreferenceLoss, preference_loss as preference_loss
    from minirl.presets import PRESETS as PRESETS
    from minirl.reward_model import RewardModel as RewardModel
    from minirl.reward_training import RewardConfig as RewardConfig
    from minirl.rewards import score as score, score_rollout as score_rollout
    from minirl.rft import RFTConfig as RFTConfig
    from minirl.rollout import Rollout as Rollout, sample as sample
    from minirl.sampler import Completion as Completion, Sampler as Sampler, SamplingParams as SamplingParams
    from minirl.sft import SFTConfig as SFTConfig
    from minirl.task import Task as Task
    from minirl.tokenizer import Tokenizer as Tokenizer
    from minirl.trees import Row as Row, response_mask as response_mask

__version__ = "0.2.0"

_NAMES = {
    "minirl.batch": ("Batch", "add_policy_gradient"),
    "minirl.errors": ("InputError",),
    "minirl.grpo": ("GRPOConfig",),
    "minirl.lab.tasks": ("parse_task",),
    "minirl.lab.training": (
        "sample_outcomes",
        "train_grpo",
        "train_ppo",
        "train_prefer",
        "train_reward",
        "train_rft",
        "train_sft",
    ),
    "minirl.losses": ("PolicyLoss", "policy_loss"),
    "minirl.model": ("ModelConfig", "Transformer"),
    "minirl.optimizer": ("AdamW",),
    "minirl.outcomes": ("OutcomesConfig",),
    "minirl.ppo": ("PPOConfig",),
    "minirl.prefer": ("PreferConfig",),
    "minirl.preferences": ("PreferenceLoss", "preference_loss"),
    "minirl.presets": ("PRESETS",),
    "minirl.reward_model": ("RewardModel",),
    "minirl.reward_training": ("RewardConfig",),
    "minirl.rewards": ("score", "score_rollout"),
    "minirl.rft": ("RFTConfig",),
    "minirl.rollout": ("Rollout", "sample"),
    "minirl.sampler": ("Completion", "Sampler", "SamplingParams"),
    "minirl.sft": ("SFTConfig",),
    "minirl.task": ("Task",),
    "minirl.tokenizer": ("Tokenizer",),
    "minirl.trees": ("Row", "response_mask"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # for a type checker this function would make every name one of the package's

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
