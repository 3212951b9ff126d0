"""What every loop that trains on its own samples is told; GRPO and PPO add what is theirs."""

from dataclasses import dataclass, field, replace
from typing import Literal

from minirl.errors import InputError
from minirl.losses import PRESETS, PolicyLoss
from minirl.sampler import SamplingParams
from minirl.train.online_reward import Refresh
from minirl.train.run import refuse_below_one, refuse_negative, refuse_not_positive, refuse_unknown_choices


@dataclass(frozen=True)
class PolicyConfig:
    """Train a checkpoint on what it samples."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    task: str = "arithmetic"
    """arithmetic, countdown, gsm8k, math, humaneval, mbpp, reasoning_gym, or a file (JSONL, Parquet), folder or name of
    a data set, with options after a colon: arithmetic:op=product,digits=2"""
    out: str = "runs/policy"
    """Folder of the run."""
    preset: str | None = None
    """A row of the table of algorithms: on the command line it sets the options of the algorithm; in Python pass
    `**preset_defaults(name, max_tokens, prompts)`."""
    steps: int = 100
    """Rollouts."""
    prompts: int = 16
    """Prompts a step."""
    group: int = 8
    """Completions a prompt."""
    max_tokens: int = 256
    """Longest completion."""
    lr: float = 1e-6
    """Peak learning rate."""
    rewards: tuple[str, ...] = ()
    """Further rewards: name=weight, file.py:function=weight, or model:FOLDER=weight for a trained reward model;
    guarded is 0.7 correct + 0.2 format - 0.5 repetitive - 0.3 too_short. The name of one of the task's own gives that
    another weight: correct=0 only logs it."""
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy loss."""
    kl_in_reward: float = 0.0
    """Weight of the KL to the reference, subtracted from the rewards."""
    adaptive_kl: Literal["none", "ziegler", "ppo_penalty"] = "none"
    """After each step move a KL weight towards `kl_target`: that of the KL to the reference (ziegler; in the reward,
    else in the loss), or loss.kl-old-coef (ppo_penalty)."""
    kl_target: float | None = None
    """KL that adaptive_kl aims at. None: 6 nats a completion (ziegler), 0.01 nats a token (ppo_penalty)."""
    kl_horizon: int = 10_000
    """ziegler: completions in which the weight may grow or shrink by about 20 %."""
    ref_reset_every: int = 0
    """Steps after which the reference becomes the policy of that moment (iterative RL); 0 = never."""
    gamma: float = 1.0
    """Discount of a token, where rewards are those of tokens."""
    truncation: Literal["keep", "mask", "penalty"] = "keep"
    """A completion cut at max_tokens keeps its reward, leaves the loss, or pays `truncation_penalty`."""
    truncation_penalty: float = 0.5
    """What truncation=penalty subtracts from the reward, as a share of what being right pays: half of it,
    so that what is right and cut stays above what is wrong."""
    exclude_from_baseline: bool = False
    """truncation=mask: completions that leave the loss leave the means and deviations of the rewards too."""
    overlong_cache: int = 0
    """DAPO's soft punishment over the last so many tokens before max_tokens; 0 = off."""
    overlong_penalty: float = 0.5
    """overlong_cache: what a completion of max_tokens loses, as a share of what being right pays (the weight of the
    task's rule; 1 where it has none, or rewards are stored). Half, as in DAPO, where rewards are ±1 and it is 1: what
    is right and too long stays above what is wrong."""
    refresh: Refresh = field(default_factory=Refresh)
    """Online reward model: the model: among the rewards learns on."""
    data: str | None = None
    """File (JSONL, a .json list, Parquet), folder or name of a data set of stored completions with their rewards
    (prompt, completion, reward; minirl outcomes writes one) to train on in place of sampled ones: offline RL. The task
    is for evaluation only."""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt, held-out ones too, that leaves no room for a completion in the model's context: stop before the first
    step, or leave it out."""
    reward_timeout: float = 10.0
    """Seconds a completion that a reward function of a file may take; one that takes longer gets 0 from it."""
    on_bad_reward: Literal["stop", "skip", "strict"] = "stop"
    """A reward that raises, or returns infinity, a text or a list of another length: stop the run (what is trained is
    saved), or skip: that completion has no score. strict also stops at None, NaN and what takes too long."""
    epochs: int = 1
    """Passes of the optimizer over a rollout (μ)."""
    mini_batches: int = 1
    """Optimizer steps a pass."""
    target_kl: float | None = None
    """End a step's updates once the policy is this far from the one that sampled (kl_old/k3, nats a token), over all
    completions: those without a gradient are scored for it."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs in training."""
    top_k: int = 0
    """Truncated sampling; what was kept is replayed in training."""
    top_p: float = 1.0
    """Truncated sampling; what was kept is replayed in training."""
    min_p: float = 0.0
    """Truncated sampling; what was kept is replayed in training."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; rewards see what comes before them."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template reads, each as --template.NAME VALUE: --template.enable_thinking false."""
    system: str | None = None
    """System message of the prompts whose messages have none."""
    slots: int = 64
    """Completions sampled at a time: a memory knob that changes no token, and log-probs by rounding at most."""
    micro_batch_tokens: int = 4096
    """Tokens in one training forward: a memory knob that changes no gradient."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decay of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int = 10
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation."""
    eval_samples: int = 8
    """Completions a held-out prompt (k of mean@k, pass@k and maj@k), at `temperature`; the greedy one comes on top."""
    save_every: int = 50
    """Steps between checkpoints."""
    shown: int = 2
    """Completions a step that are written to completions.jsonl."""
    seed: int = 0
    """Decides prompts and draws: a run is a function of its config."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; masters are fp32."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    resume: bool = False
    """Continue the run in `out`; slots, micro_batch_tokens, recompute, device, save_every and shown may differ, as they
    change no result, and on_bad_reward."""

    def __post_init__(self):
        refuse_below_one(self, "steps", "prompts", "group", "epochs", "mini_batches", "max_tokens", "slots")
        refuse_below_one(self, "micro_batch_tokens", "eval_prompts", "eval_samples", "save_every", "kl_horizon")
        refuse_not_positive(self, "lr", "clip_norm", "temperature", "gamma")
        refuse_not_positive(
            self, "reward_timeout", *(n for n in ("kl_target", "target_kl") if getattr(self, n) is not None)
        )
        refuse_negative(self, "kl_in_reward", "weight_decay", "truncation_penalty", "ref_reset_every")
        refuse_negative(self, "overlong_penalty")
        refuse_negative(self, "warmup", "eval_every", "shown", "seed")
        refuse_unknown_choices(self)
        coefs = {"ziegler": self.kl_in_reward or self.loss.kl_coef, "ppo_penalty": self.loss.kl_old_coef}
        several = self.epochs * self.mini_batches > 1
        weight = "loss.kl_old_coef" if self.adaptive_kl == "ppo_penalty" else "kl_in_reward, or loss.kl and its kl_coef"
        for fine, sentence in (
            (self.gamma <= 1, f"gamma = {self.gamma}: a discount is at most 1"),
            (
                self.mini_batches <= self.prompts,
                f"mini_batches = {self.mini_batches}: there are only {self.prompts} prompts to share out",
            ),
            (
                0 <= self.overlong_cache <= self.max_tokens,
                f"overlong_cache = {self.overlong_cache}: it must be from 0 to max_tokens",
            ),
            (
                self.truncation == "mask" or not self.exclude_from_baseline,
                "exclude_from_baseline is about completions that leave the loss: it needs truncation = mask",
            ),
            (
                coefs.get(self.adaptive_kl, 1.0) > 0,
                f"adaptive_kl = {self.adaptive_kl!r}: the weight that it moves starts at 0: give {weight}",
            ),
            (
                self.has_reference or not self.ref_reset_every,
                f"ref_reset_every = {self.ref_reset_every}: there is no reference: give loss.kl or kl_in_reward",
            ),
            (
                self.data is None or not (self.rewards or self.refresh.every),
                "data holds completions with their rewards: leave rewards and refresh away",
            ),
            (
                not self.refresh.every or sum(spec.startswith("model:") for spec in self.rewards) == 1,
                "refresh is about the one reward model among the rewards: give one as model:FOLDER=weight",
            ),
            (
                self.refresh.every <= self.steps,
                f"refresh.every = {self.refresh.every}: there are only {self.steps} steps, so nothing is refreshed",
            ),
            (
                several or self.target_kl is None,
                f"target_kl = {self.target_kl}: a step of one update has nothing to end: raise epochs or mini_batches",
            ),
        ):
            if not fine:
                raise InputError(sentence)
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            n=self.group,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )

    @property
    def has_reference(self) -> bool:
        return self.loss.kl != "none" or self.kl_in_reward > 0


def presets(critic: bool) -> list[str]:
    """The rows of the table that a loop with or without a critic runs."""
    return [name for name, preset in PRESETS.items() if preset.critic == critic]


def refuse_preset(name: str, critic: bool) -> None:
    """An InputError for a preset that a loop with or without a critic does not run."""
    if name not in presets(critic):
        other = "has no critic, minirl grpo runs it" if critic else "needs a critic, which minirl ppo trains"
        why = other if name in PRESETS else "is unknown"
        raise InputError(f"preset {name!r} {why}: choose from {', '.join(presets(critic))}")


def common_defaults(name: str, max_tokens: int, prompts: int) -> dict:
    """What a preset sets in any of these configs; it has no more mini-batches than there are prompts to share out."""
    preset = PRESETS[name]
    loss = preset.loss
    if loss.aggregation == "seq_sum_const":
        loss = replace(loss, const_length=float(max_tokens))
    return {
        "preset": name,
        "loss": loss,
        "kl_in_reward": preset.kl_in_reward,
        "adaptive_kl": preset.adaptive_kl,
        "truncation": preset.truncation,
        "epochs": preset.epochs,
        "mini_batches": max(1, min(preset.mini_batches, prompts)),
        "overlong_cache": max_tokens // 5 if preset.overlong_punishment else 0,  # 4096 of 20480, as in DAPO
    }
