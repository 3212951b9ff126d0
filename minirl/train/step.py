"""The shared step: any number of rows, one gradient, whatever the micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minirl.losses import PolicyLoss, Totals, combine_metrics, head_policy_loss, with_gradient
from minirl.model import Transformer
from minirl.train.batch import MicroBatch, Row, micro_batches


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

    def select(self, indices: Sequence[int]) -> "Batch":
        """Some of the rows, tensors cut to the longest of them."""
        width = max((len(self.rows[i].response) for i in indices), default=0)
        index = torch.as_tensor(indices, dtype=torch.long, device=self.mask.device)

        def take(x: torch.Tensor | None):
            return None if x is None else x[index] if x.dim() == 1 else x[index, :width]

        policy = (self.advantages, self.mask, self.old_logp, self.ref_logp, self.rollout_logp)
        return Batch([self.rows[i] for i in indices], *map(take, (*policy, self.old_values, self.returns)))


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
) -> dict[str, float]:
    """Add the gradient of the policy loss over all rows, in micro-batches of `budget` tokens; metrics of the whole.

    Rows whose gradient is exactly zero (no advantage, and neither KL nor entropy in the loss) are not computed; they
    count in the denominators of the loss, not in those of the metrics. `also` is a further loss on the same hidden
    states; with it every row that counts is computed.
    """
    groups = torch.tensor([row.group for row in batch.rows], device=batch.mask.device)
    entropy = _entropies(model, batch, budget, temperature) if options.entropy_quantile is not None else None
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
    return combine_metrics(parts) | ({"trained_tokens": int(computed.sum())} if parts else {})


@torch.no_grad()
def _entropies(model: Transformer, batch: Batch, budget: int, temperature: float) -> torch.Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    out = torch.zeros(batch.mask.shape, dtype=dtype, device=batch.mask.device)
    for indices in micro_batches(batch.rows, range(len(batch.rows)), budget):
        _, entropy = MicroBatch([batch.rows[i] for i in indices], model.device).logprobs(model, temperature)
        out[torch.tensor(indices, device=out.device), : entropy.shape[1]] = entropy
    return out
