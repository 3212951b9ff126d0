"""Options that several commands share, as frozen dataclasses that the config of a command is mixed from.

A field's docstring is its text in --help, its type says which values it may have, and `Config` holds it to them. The
fields of a config are named in the call, but for the checkpoint and the data, or the task, which come first.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_args, get_origin

from minirl.errors import InputError
from minirl.losses import PolicyLoss
from minirl.sampler import SamplingParams

LIMITS = {  # finite in fp32 too, and after a division by a small number
    "at least 1": lambda value: value >= 1,
    "positive and finite, below 1e30": lambda value: 0 < value < 1e30,
    "finite and not negative, below 1e30": lambda value: 0 <= value < 1e30,
}
Count = Annotated[int, "at least 1"]
Positive = Annotated[float, "positive and finite, below 1e30"]
NotNegative = Annotated[float, "finite and not negative, below 1e30"]
Whole = Annotated[int, "finite and not negative, below 1e30"]


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise InputError(sentence)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hold every field to the limit, or to the choices, that its type states."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if get_origin(f.type) is Literal and value not in get_args(f.type):  # the command line looks itself
                raise InputError(f"{f.name} = {value!r} is unknown: choose from {', '.join(get_args(f.type))}")
            for kind in (f.type, *get_args(f.type)):  # the type, or those of a union with None
                if value is not None and get_origin(kind) is Annotated and (limit := kind.__metadata__[0]) in LIMITS:
                    self.require(f.name, LIMITS[limit](value), f"it must be {limit}")

    def require(self, name: str, holds: bool, sentence: str) -> None:
        """Raise an InputError about the value of a field unless something holds."""
        require(holds, f"{name} = {getattr(self, name)!r}: {sentence}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """The model that a command starts from, and how its prompts are written."""

    model: str = field(kw_only=False)
    """Checkpoint: a Hugging Face directory or hub id."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template reads, each as --template.NAME VALUE: --template.enable_thinking false."""
    system: str | None = None
    """System message of the prompts whose messages have none."""
    seed: int = 0
    """Same seed, same completions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto is bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig(CheckpointConfig):
    """The task whose prompts are completed."""

    task: str = field(default="arithmetic", kw_only=False)
    """arithmetic, countdown, gsm8k, math, humaneval, mbpp, reasoning_gym, or a file (JSONL, Parquet), folder or name of
    a data set, with options after a colon: arithmetic:op=product,digits=2"""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in the model's context: stop before the first step, or leave it
    out."""
    reward_timeout: Positive = 10.0
    """Seconds a completion that a checker from a file may take; longer is wrong."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(CheckpointConfig):
    """The folder of a run, which can be resumed."""

    out: str
    """Folder of the run."""
    seed: Whole = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto is bfloat16 on a GPU, float32 on a CPU. Masters are fp32."""
    save_every: Count = 100
    """Steps between checkpoints."""
    resume: bool = False
    """Continue the run in `out`; micro_batch_tokens, recompute, device and save_every
    may differ, as they change a result by rounding at most."""
    fork: bool = False
    """With resume: go on with other steps, lr, critic_lr, warmup, schedule, weight_decay, clip_norm, target_kl,
    eval_every or reward_timeout than the run began with; config.json keeps both, and the step of the change."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """The optimizer's steps."""

    steps: Count = 200
    """Optimizer steps."""
    lr: Positive = 1e-5
    """Peak learning rate."""
    warmup: Whole = 10
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: NotNegative = 0.0
    """Decay of the matrices."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""
    micro_batch_tokens: Count = 4096
    """Tokens in one forward: a memory knob that changes no result."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is NaN or infinite: stop, or leave the update out (several in a row stop the run). Its
    rows are kept in the run's folder nonfinite/."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How completions are drawn."""

    max_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """Temperature of sampling."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; rewards see what comes before them."""
    slots: Count = 64
    """Completions sampled at a time: a memory knob that changes no token, and log-probs by rounding at most."""

    def sampling_params(self, n: int, **others) -> SamplingParams:
        """Return the parameters of n completions a prompt, with `others` that the config does not hold."""
        names = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "stop")
        return SamplingParams(n, **{name: getattr(self, name) for name in names if hasattr(self, name)}, **others)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Config):
    """The KL to the reference, and the controller of its weight."""

    kl_in_reward: NotNegative = 0.0
    """Weight of the KL to the reference, subtracted from the rewards."""
    adaptive_kl: Literal["none", "ziegler", "ppo_penalty"] = "none"
    """After each step move a KL weight towards `kl_target`: that of the KL to the reference (ziegler; in the reward,
    else in the loss), or loss.kl-old-coef (ppo_penalty)."""
    kl_target: Positive | None = None
    """KL that adaptive_kl aims at. None: 6 nats a completion (ziegler), 0.01 nats a token (ppo_penalty)."""
    kl_horizon: Count = 10_000
    """ziegler: completions in which the weight may grow or shrink by about 20 %."""
    ref_reset_every: Whole = 0
    """Steps after which the reference becomes the policy of that moment (iterative RL); 0 = never."""


@dataclass(frozen=True, kw_only=True)
class Refresh(Config):
    """How the reward model among `rewards` learns on."""

    every: Whole = 0
    """Steps between updates of the reward model on the rule's outcomes of what was sampled since; 0 = it stays as it
    is."""
    lr: Positive = 1e-5
    """Learning rate of an update."""
    epochs: Count = 1
    """Passes of an update over the new outcomes."""
    batch: Count = 32
    """Lines of a gradient step: prompts with right and wrong completions (pairwise), else completions."""
    replay: NotNegative = 0.1
    """Share of older lines in a batch."""
    memory: Count = 4096
    """Older lines that are kept, a fair sample of all there were."""

    def __post_init__(self):
        super().__post_init__()
        idle = any(getattr(self, f.name) != f.default for f in fields(self)) and not self.every
        require(not idle, "refresh.every = 0: the reward model stays as it is: leave the other refresh options away")
        require(self.replay < 1, f"refresh.replay = {self.replay}: it must be below 1, or nothing new is learned")


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Config):
    """The rewards of a completion, and what length does to them."""

    rewards: tuple[str, ...] = ()
    """Further rewards: name=weight, file.py:function=weight, or model:FOLDER=weight for a trained reward model;
    guarded is 0.7 correct + 0.2 format - 0.5 repetitive - 0.3 too_short. The name of one of the task's own gives that
    another weight: correct=0 only logs it."""
    refresh: Refresh = field(default_factory=Refresh)
    """How the reward model among `rewards` learns on: an online reward model."""
    reward_timeout: Positive = 10.0
    """Seconds a completion that a reward function of a file may take; one that takes longer gets 0 from it."""
    on_bad_reward: Literal["stop", "skip", "strict"] = "stop"
    """A reward that raises, or returns infinity, a text or a list of another length: stop the run (what is trained is
    saved), or skip: that completion has no score. strict also stops at None, NaN and what takes too long."""
    gamma: Positive = 1.0
    """Discount of a token, where rewards are those of tokens."""
    truncation: Literal["keep", "mask", "penalty"] = "keep"
    """A completion cut at max_tokens keeps its reward, leaves the loss, or pays `truncation_penalty`."""
    truncation_penalty: NotNegative = 0.5
    """Loss of reward by truncation=penalty, as a share of what being right pays. Half of it, so that what is right and
    cut stays above what is wrong."""
    exclude_from_baseline: bool = False
    """truncation=mask: completions that leave the loss leave the means and deviations of the rewards too."""
    overlong_cache: int = 0
    """DAPO's soft punishment over the last so many tokens before max_tokens; 0 = off."""
    overlong_penalty: NotNegative = 0.5
    """overlong_cache: the loss of a completion of max_tokens, as a share of what being right pays (the weight of the
    task's rule; 1 where it has none, or rewards are stored). Half, as in DAPO, where rewards are ±1 and it is 1: what
    is right and too long stays above what is wrong."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(RewardsConfig, ReferenceConfig, SamplingConfig, OptimizerConfig, RunConfig, TaskConfig):
    """Train a checkpoint on what it samples; GRPO and PPO add what is theirs."""

    preset: str | None = None
    """A row of the table of algorithms: on the command line it sets the options of the algorithm; in Python pass
    `**preset_defaults(name, max_tokens, prompts)`."""
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy loss."""
    steps: Count = 100
    """Rollouts."""
    prompts: Count = 16
    """Prompts a step."""
    group: Count = 8
    """Completions a prompt."""
    data: str | None = None
    """File (JSONL, a .json list, Parquet), folder or name of a data set of stored completions with their rewards
    (prompt, completion, reward; minirl outcomes writes one) to train on in place of sampled ones: offline RL. The task
    is for evaluation only."""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt, held-out ones too, that leaves no room for a completion in the model's context: stop before the first
    step, or leave it out."""
    epochs: Count = 1
    """Passes of the optimizer over a rollout (μ)."""
    mini_batches: Count = 1
    """Optimizer steps a pass."""
    target_kl: Positive | None = None
    """End a step's updates once the policy is this far from the one that sampled (kl_old/k3, nats a token), over all
    completions: those without a gradient are scored for it."""
    lr: Positive = 1e-6
    warmup: Whole = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    micro_batch_tokens: Count = 4096
    """Tokens in one training forward: a memory knob that changes no gradient."""
    max_tokens: Count = 256
    temperature: Positive = 1.0
    """Temperature of sampling, and of the log-probs in training."""
    top_k: int = 0
    """Truncated sampling; what was kept is replayed in training."""
    top_p: float = 1.0
    """Truncated sampling; what was kept is replayed in training."""
    min_p: float = 0.0
    """Truncated sampling; what was kept is replayed in training."""
    eval_every: Whole = 10
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_prompts: Count = 64
    """Held-out prompts of an evaluation."""
    eval_samples: Count = 8
    """Completions a held-out prompt (k of mean@k, pass@k and maj@k), at `temperature`; the greedy one comes on top."""
    save_every: Count = 50
    shown: Whole = 2
    """Completions a step that are written to completions.jsonl."""
    seed: Whole = 0
    """Decides prompts and draws: a run is a function of its config."""
    resume: bool = False
    """Continue the run in `out`; slots, micro_batch_tokens, recompute, device, save_every and shown may differ, as they
    change a result by rounding at most, and on_bad_reward."""

    def __post_init__(self):
        super().__post_init__()
        several = self.epochs * self.mini_batches > 1
        enough = self.mini_batches <= self.prompts
        self.require("gamma", self.gamma <= 1, "a discount is at most 1")
        self.require("mini_batches", enough, f"there are only {self.prompts} prompts to share out")
        self.require("overlong_cache", 0 <= self.overlong_cache <= self.max_tokens, "it must be from 0 to max_tokens")
        require(
            self.truncation == "mask" or not self.exclude_from_baseline,
            "exclude_from_baseline is about completions that leave the loss: it needs truncation = mask",
        )
        if self.adaptive_kl != "none":
            weight, options = {
                "ziegler": (self.kl_in_reward or self.loss.kl_coef, "kl_in_reward, or loss.kl and its kl_coef"),
                "ppo_penalty": (self.loss.kl_old_coef, "loss.kl_old_coef"),
            }[self.adaptive_kl]
            self.require("adaptive_kl", weight > 0, f"the weight that it moves starts at 0: give {options}")
        if self.ref_reset_every:
            self.require("ref_reset_every", self.has_reference, "there is no reference: give loss.kl or kl_in_reward")
        if self.data is not None:
            offline = not (self.rewards or self.refresh.every)
            require(offline, "data holds completions with their rewards: leave rewards and refresh away")
        if every := self.refresh.every:
            models = sum(spec.startswith("model:") for spec in self.rewards)
            one = "refresh is about the one reward model among the rewards: give one as model:FOLDER=weight"
            few = f"refresh.every = {every}: there are only {self.steps} steps, so nothing is refreshed"
            require(models == 1, one)
            require(every <= self.steps, few)
        if self.target_kl is not None:
            self.require("target_kl", several, "a step of one update has nothing to end: raise epochs or mini_batches")
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        return self.sampling_params(self.group)

    @property
    def has_reference(self) -> bool:
        return self.loss.kl != "none" or self.kl_in_reward > 0
