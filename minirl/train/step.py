"""The shared step: any number of rows, one gradient, whatever the micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from minirl.losses import PolicyLoss, Totals, combine_metrics, head_policy_loss, policy_loss, with_gradient
from minirl.model import Transformer
from minirl.train.batch import MicroBatch, Row, micro_batches, score_with_entropy

CLIPS = ("clip/high", "clip/low", "clip/dual", "clip/frac")
MEASURED = ("entropy", "kl_old/k1", "kl_old/k3", "kl_ref/k1", "kl_ref/k3", "kl_ref/seq_k1")  # of any token


@dataclass
class Batch:
    """The rows of one optimizer step with what the loss needs of them; B rows, T their longest response."""

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
        """Some of the rows, tensors cut to the longest of them."""
        width = max((len(self.rows[i].response) for i in indices), default=0)
        index = torch.as_tensor(indices, dtype=torch.long, device=self.mask.device)

        def take(x: torch.Tensor | None):
            return None if x is None else x[index] if x.dim() == 1 else x[index, :width]

        tensors = {f.name: take(getattr(self, f.name)) for f in fields(self) if f.name != "rows"}
        return Batch([self.rows[i] for i in indices], **tensors)


def response_mask(rows: Sequence[Row], device=None) -> torch.Tensor:
    """bool [B, T]: every token of a response counts, its stop token too."""
    lengths = torch.tensor([len(row.response) for row in rows])
    return (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(device)


# hidden states [M, D], their places, the rows that they are of, the whole step's totals -> a loss and its metrics
HiddenLoss = Callable[[torch.Tensor, MicroBatch, Batch, Totals], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def accumulate(
    model: Transformer,
    batch: Batch,
    options: PolicyLoss,
    budget: int,
    temperature: float = 1.0,
    also: HiddenLoss | None = None,
    measure_all: bool = False,
) -> dict[str, float]:
    """Add the gradient of the policy loss over all rows, in micro-batches of `budget` tokens; metrics of the whole.

    Rows whose gradient is exactly zero (no advantage, and neither KL nor entropy in the loss) are not computed; they
    count in the denominators of the loss. Metrics are means over the tokens with a gradient, but for those that
    `_of_all` makes means over all tokens that count; `measure_all` scores, without gradient, what it needs for that.
    `also` is a further loss on the same hidden states; with it every row that counts is computed.
    """
    groups = torch.tensor([row.group for row in batch.rows], device=batch.mask.device)
    entropy = None
    if options.entropy_quantile is not None:
        entropy = score_with_entropy(model, batch.rows, budget, temperature)[1]
    totals = Totals.of(batch.mask, groups, entropy, options.entropy_quantile)
    trained = with_gradient(batch.mask, batch.advantages, options)
    totals = totals.scoring(int(trained.sum()))
    computed = trained if also is None else batch.mask.bool()
    parts = []
    for indices in micro_batches(batch.rows, computed.any(1).nonzero().squeeze(1).tolist(), budget):
        part = batch.select(indices)
        micro = MicroBatch(part.rows, model.device)
        hidden = micro.hidden(model)
        loss, metrics = head_policy_loss(
            hidden,
            model.head_weight,
            micro.targets,
            micro.mask,
            part.old_logp,
            part.ref_logp,
            part.advantages,
            part.mask,
            options,
            rollout_logp=part.rollout_logp,
            group_ids=groups[torch.tensor(indices, device=groups.device)],
            totals=totals,
            temperature=temperature,
            kept=micro.kept,
            active=model.active_vocab,
        )
        if also is not None:
            further, its = also(hidden, micro, part, totals)
            loss, metrics = loss + further, metrics | its
        loss.backward()
        parts.append(metrics)
    if not parts:
        return {}
    rest = replace(batch, mask=batch.mask.bool() & ~trained)
    others = _without_gradient(model, rest, totals, budget, temperature) if measure_all else {}
    return _of_all(combine_metrics(parts), others, totals) | {"trained_tokens": int(computed.sum())}


def _of_all(trained: dict[str, float], others: dict[str, float], totals: Totals) -> dict[str, float]:
    """Give clips, entropy and KLs as means over all tokens that count, and as trained/... over those with a gradient.

    A token without a gradient is not clipped. Its entropy and KLs are among `others`, if they were measured; else the
    means over all are known only where all tokens have a gradient, and are left out elsewhere.
    """
    share, found = totals.scored / max(totals.tokens, 1), dict(trained)
    for name in (name for name in (*CLIPS, *MEASURED) if name in trained):
        found["trained/" + name] = trained[name]
        if name in CLIPS or name in others:
            found[name] = share * trained[name] + (1 - share) * others.get(name, 0.0)
        elif share < 1:
            del found[name]
    return found


@torch.no_grad()
def _without_gradient(model: Transformer, batch: Batch, totals: Totals, budget: int, temperature: float) -> dict:
    """Entropy and KLs of the tokens that the mask holds, scored without gradient; nothing where there are none."""
    totals, parts = totals.scoring(int(batch.mask.sum())), []
    for indices in micro_batches(batch.rows, batch.mask.any(1).nonzero().squeeze(1).tolist(), budget):
        part = batch.select(indices)
        logp, entropy = MicroBatch(part.rows, model.device).logprobs(model, temperature)
        given = (part.old_logp, part.ref_logp, torch.zeros_like(part.advantages), part.mask, PolicyLoss())
        parts.append(policy_loss(logp, *given, entropy=entropy, totals=totals)[1])
    return {name: value for name, value in combine_metrics(parts).items() if name in MEASURED}
