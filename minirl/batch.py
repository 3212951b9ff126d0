"""The batch of an optimizer step, and its gradient of the policy loss, the same for every cut into micro-batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minirl.advantages import kl_in_reward
from minirl.loss_metrics import Metrics, Over, combine_metrics, distance_metrics
from minirl.losses import HiddenStates, LossInputs, PolicyLoss, Totals, loss_and_metrics, with_gradient
from minirl.manifest import BATCH
from minirl.model import Transformer
from minirl.rollout import Rollout, counted
from minirl.step import Step
from minirl.trees import (
    MicroBatch,
    Row,
    load_rows,
    micro_batches,
    response_logprobs_and_entropy,
    response_mask,
    save_rows,
)

CLIPS = ("clip/high", "clip/low", "clip/dual", "clip/frac")
# What a token without gradient has too:
MEASURED = ("entropy", "kl_old/k1", "kl_old/k3", "kl_ref/k1", "kl_ref/k3", "kl_ref/seq_k1")


@dataclass
class Batch:
    """Hold B rows with what the loss needs of them; T is their longest response.

    The batch of a rollout has all of its rows. Its mini-batches (`mini_batches`) are batches again, one an optimizer
    step, and so are the micro-batches of these, one a forward.
    """

    rows: Sequence[Row]
    advantages: torch.Tensor  # [B] or [B, T]
    mask: torch.Tensor  # [B, T], 1 where a token counts
    old_logp: torch.Tensor | None = None  # [B, T]; None = the policy itself, a single on-policy update
    ref_logp: torch.Tensor | None = None  # [B, T]
    rollout_logp: torch.Tensor | None = None  # [B, T], what the sampler reported
    old_values: torch.Tensor | None = None  # [B, T], the critic's before the update
    returns: torch.Tensor | None = None  # [B, T], what its values should be
    sampled: torch.Tensor | None = None  # [B, T], every token that was drawn, also one that does not count; None = mask
    entropy: torch.Tensor | None = None  # [B, T], of the policy before the update

    def __post_init__(self):
        self.sampled = (self.mask if self.sampled is None else self.sampled).bool()

    def select(self, indices: Sequence[int]) -> "Batch":
        """Take some of the rows, tensors cut to the longest of them."""
        # A micro-batch of short rows must not pay for the longest row of the step.
        width = max((len(self.rows[i].response) for i in indices), default=0)
        index = torch.as_tensor(indices, dtype=torch.long, device=self.mask.device)

        def take(x: torch.Tensor | None):
            return None if x is None else x[index] if x.dim() == 1 else x[index, :width]

        tensors = {f.name: take(getattr(self, f.name)) for f in fields(self) if f.name != "rows"}
        return Batch([self.rows[i] for i in indices], **tensors)

    def save(self, folder: Path) -> None:
        """Write rows and tensors, with which a step that was cut goes on, or that can be looked at."""
        save_rows(self.rows, folder)
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        # Copies: mask and sampled may be one tensor, which safetensors does not write twice.
        save_file({name: x.clone().contiguous() for name, x in tensors.items() if x is not None}, folder / BATCH)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Batch":
        """Read what `save` wrote."""
        tensors = load_file(folder / BATCH)
        return cls(load_rows(folder), **{name: x.to(device) for name, x in tensors.items()})

    def groups(self) -> torch.Tensor:  # [B]
        return torch.tensor([row.group for row in self.rows], device=self.mask.device)

    def loss_inputs(self) -> LossInputs:
        return LossInputs(self.advantages, self.mask, self.old_logp, self.ref_logp, self.rollout_logp, self.groups())

    def micro_batches(self, tokens: torch.Tensor, budget: int) -> Iterator["Batch"]:
        """Cut the rows that have one of the `tokens` [B, T] into micro-batches of at most `budget` tokens."""
        rows = tokens.any(1).nonzero().squeeze(1).tolist()
        return (self.select(indices) for indices in micro_batches(self.rows, rows, budget))


# hidden states [M, D], their places, the rows that they are of, the whole step's totals -> a loss and its metrics
HiddenLoss = Callable[[torch.Tensor, MicroBatch, Batch, Totals], tuple[torch.Tensor, Metrics]]


def add_policy_gradient(
    model: Transformer,
    batch: Batch,
    options: PolicyLoss,
    budget: int,
    temperature: float = 1.0,
    further_loss: HiddenLoss | None = None,
    measure_all: bool = False,
) -> dict[str, float] | None:
    """Add the gradient of the policy loss over all rows, in micro-batches of `budget` tokens; give the step's metrics.

    Return None, with no gradient added, where no token can have one. Rows whose gradient is exactly zero (no advantage,
    and neither KL nor entropy in the loss) are not computed; they count in the denominators of the loss. Metrics are
    means over the tokens with a gradient, but for those that `_of_all` makes means over all tokens that count;
    `measure_all` computes, without gradient, what it needs for that. `further_loss` is added on the same hidden states
    (a critic's, on a shared trunk); with it every row that counts is computed.
    """
    groups, entropy = batch.groups(), None
    # The threshold is one of the whole step, so every entropy is needed before the first gradient.
    if options.entropy_quantile is not None:
        entropy = response_logprobs_and_entropy(model, batch.rows, budget, temperature)[1]
    counts = Totals.of(batch.mask, groups, entropy, options.entropy_quantile)
    trained = with_gradient(batch.mask, batch.advantages, options)
    # The loss divides by all tokens that count, its metrics by those with a gradient.
    totals = counts.measured_over(int(trained.sum()))
    computed = trained if further_loss is None else batch.mask.bool()
    parts = []
    for part in batch.micro_batches(computed, budget):
        micro = MicroBatch(part.rows, model.device)
        head = {"temperature": temperature, "kept": micro.kept, "active": model.active_vocab}
        policy = HiddenStates(micro.hidden(model), model.head_weight, micro.targets, micro.mask, head)
        loss, metrics = loss_and_metrics(policy, part.loss_inputs(), options, totals)
        if further_loss is not None:
            # A value has something to learn at tokens where the policy has no gradient: its means are over all.
            more, its = further_loss(policy.hidden, micro, part, counts)
            loss, metrics = loss + more, metrics | its
        # Here, inside the loop: the activations of one micro-batch are freed before the next one needs the memory.
        loss.backward()
        parts.append(metrics)
    if not parts:
        return None
    rest = replace(batch, mask=batch.mask.bool() & ~trained)
    others = _without_gradient(model, rest, totals, budget, temperature) if measure_all else {}
    return _of_all(combine_metrics(parts), others, totals) | {"trained_tokens": int(computed.sum())}


def _of_all(trained: dict[str, float], others: dict[str, float], totals: Totals) -> dict[str, float]:
    """Give clips, entropy and KLs as means over all tokens that count, and as trained/... over those with a gradient.

    A token without a gradient is not clipped. Its entropy and KLs are among `others`, if they were measured; else the
    means over all are known only where all tokens have a gradient, and are left out elsewhere.
    """
    share, found = totals.metric_tokens / max(totals.tokens, 1), dict(trained)
    for name in (name for name in (*CLIPS, *MEASURED) if name in trained):
        found["trained/" + name] = trained[name]
        if name in CLIPS or name in others:
            found[name] = share * trained[name] + (1 - share) * others.get(name, 0.0)
        elif share < 1:
            del found[name]
    return found


@torch.no_grad()
def _without_gradient(model: Transformer, batch: Batch, totals: Totals, budget: int, temperature: float) -> dict:
    """Measure entropy and KLs of the tokens that the mask holds; nothing where there are none."""
    parts, tokens = [], int(batch.mask.sum())
    for part in batch.micro_batches(batch.mask, budget):
        logp, entropy = MicroBatch(part.rows, model.device).logprobs(model, temperature)
        old = logp if part.old_logp is None else part.old_logp
        parts.append(distance_metrics(Over(part.mask, tokens), logp, entropy, old, part.ref_logp, totals.length))
    return combine_metrics(parts)


# ---- from a rollout to a batch ---------------------------------------------------------------------------------------


def make_batch(rollout: Rollout, policy, reference, config) -> Batch:
    """Lay a rollout out as rows with masks and log-probs; advantages are 0 until they are known.

    `mask` holds the tokens that count in the loss and in statistics of the batch, `sampled` every token. The log-probs
    of the policy before the update are computed where something needs them: several updates, a KL in the reward, an
    adaptive weight, or completions that came without the log-probs of their sampler. Else they are the forward itself
    (a single update: every ratio is 1). The sampler's own log-probs are `rollout_logp`, never the old ones: they act in
    importance weights and in the metrics of mismatch."""
    device = policy.model.device
    prompts = [rollout.prompts[i // rollout.group_size] for i in range(len(rollout.completions))]
    rows = [
        Row(prompt, completion.tokens, i // rollout.group_size, completion.kept)
        for i, (prompt, completion) in enumerate(zip(prompts, rollout.completions, strict=True))
    ]
    present = response_mask(rows, device)
    old = entropy = reported = None
    if rollout.completions[0].logprobs:
        reported = torch.zeros(present.shape, device=device)
        reported[present] = torch.tensor([lp for x in rollout.completions for lp in x.logprobs], device=device)
    several = config.epochs * config.mini_batches > 1
    if several or config.kl_in_reward or config.adaptive_kl != "none" or reported is None:
        old, entropy = response_logprobs_and_entropy(policy.model, rows, config.micro_batch_tokens, config.temperature)
    mask = present & counted(rollout, config).to(device)[:, None]
    zeros, more = torch.zeros(len(rows), device=device), {"sampled": present, "entropy": entropy}
    return Batch(rows, zeros, mask, old, reference.logprobs(rows), reported, **more)


def compared_rewards(rollout: Rollout, batch: Batch, config) -> torch.Tensor:
    """Return the rewards [B]: NaN where there is none, and for cut completions that shall be in no mean of a group."""
    rewards = rollout.rewards.to(batch.mask.device)
    excluded = config.exclude_from_baseline
    return rewards.masked_fill(rollout.truncated.to(rewards.device), math.nan) if excluded else rewards


def token_rewards(rewards: torch.Tensor, batch: Batch, beta, config) -> torch.Tensor:
    """Put the reward of a completion [B] at its last token, less the KL to the reference of each token, [B, T]."""
    if config.kl_in_reward:
        return kl_in_reward(rewards, batch.old_logp, batch.ref_logp, batch.sampled, beta.in_reward)
    nothing = torch.zeros(batch.mask.shape, device=rewards.device)
    return kl_in_reward(rewards, nothing, nothing, batch.sampled, 0.0)


def mini_batches(batch: Batch, config, step: Step) -> Iterator[Batch]:
    """Yield μ passes over mini-batches of whole groups, each pass in an order of its own."""
    groups = len(batch.rows) // config.group
    for epoch in range(config.epochs):
        shuffled = epoch_order(groups, config.seed, 1 + step.number * config.epochs + epoch)
        # Fewer groups than mini-batches give fewer updates, never an empty one.
        for part in np.array_split(shuffled, min(config.mini_batches, groups)):
            yield batch.select([g * config.group + j for g in sorted(part.tolist()) for j in range(config.group)])


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `count` examples in an epoch, a function of the seed alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def endless_epochs(count: int, seed: int, start: int, number: int) -> list[int]:
    """Return indices start .. start+number of the endless sequence of shuffled epochs."""
    epochs = range(start // count, (start + number - 1) // count + 1)
    sequence = np.concatenate([epoch_order(count, seed, epoch) for epoch in epochs])
    offset = start - epochs[0] * count
    return sequence[offset : offset + number].tolist()
