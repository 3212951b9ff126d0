"""Rows cut into micro-batches of bounded size, and the log-probs of their responses from one forward.

A micro-batch is only a memory knob. It holds trees (a prompt with some of its responses), so that a prompt is computed
once for all of the responses beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minirl.attention import Packed
from minirl.kernels import Kept, linear_token_logprobs
from minirl.model import Transformer


@dataclass(frozen=True)
class Row:
    """One response below its prompt. Rows with the same `group` have the same prompt."""

    prompt: Sequence[int]
    response: Sequence[int]
    group: int
    kept: list[np.ndarray] | None = None  # what truncated sampling kept, a token


def micro_batches(rows: Sequence[Row], indices: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows, in lists whose trees have at most `budget` tokens (a single row may have more).

    Rows of one group stay together where they fit, and groups of similar length come together, so that attention pads
    little.
    """
    groups: dict[int, list[int]] = {}
    for i in indices:
        groups.setdefault(rows[i].group, []).append(i)
    batches: list[list[int]] = [[]]
    size = 0
    for members in sorted(groups.values(), key=lambda m: max(len(rows[i].response) for i in m)):
        whole = len(rows[members[0]].prompt) + sum(len(rows[i].response) for i in members)
        if batches[-1] and size + whole > budget:
            batches.append([])
            size = 0
        for n, i in enumerate(members):
            cost = len(rows[i].response) + (len(rows[i].prompt) if n == 0 else 0)
            if batches[-1] and size + cost > budget:
                batches.append([])
                size, cost = 0, len(rows[i].prompt) + len(rows[i].response)
            batches[-1].append(i)
            size += cost
    return [batch for batch in batches if batch]


class MicroBatch:
    """The layout of some rows and the places to read: hidden state `predict[m]` predicts response token `targets[m]`.

    rows B, longest response T, all response tokens M (row by row).
    """

    def __init__(self, rows: Sequence[Row], device=None):
        trees: dict[int, tuple[Sequence[int], list[Sequence[int]]]] = {}
        for row in rows:
            # The last token of a response predicts nothing that is scored, so it is not computed.
            trees.setdefault(row.group, (row.prompt, []))[1].append(row.response[:-1])
        self.layout = Packed(list(trees.values()), device)
        self.predict = torch.cat(self._places(rows, list(trees))).to(device)
        self.targets = torch.tensor([t for row in rows for t in row.response], dtype=torch.long, device=device)
        lengths = torch.tensor([len(row.response) for row in rows])
        self.mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(device)  # [B, T]
        self.kept = _kept(rows, device)

    def _places(self, rows: Sequence[Row], order: list[int]) -> list[torch.Tensor]:
        spans: dict[int, list[tuple[int, int]]] = {}
        for start, length, tree in self.layout.response_spans:
            spans.setdefault(order[tree], []).append((start, length))
        ends = {group: start + n - 1 for group, (start, n) in zip(order, self.layout.prompt_spans, strict=True)}
        places = []
        for row in rows:
            start, length = spans[row.group].pop(0)
            own = torch.cat([torch.tensor([ends[row.group]]), torch.arange(start, start + length)])
            places.append(own[: len(row.response)])  # an empty response has no place, not even the prompt's end
        return places

    def unflatten(self, x: torch.Tensor) -> torch.Tensor:
        """[M] -> [B, T], 0 where there is no token."""
        return torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(self.mask, x)

    def hidden(self, model: Transformer) -> torch.Tensor:
        """What the head reads to predict each response token, [M, D]."""
        return model(self.layout.tokens, self.layout).index_select(0, self.predict)

    def logprobs(self, model: Transformer, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of every response token and entropy of its distribution, [B, T] each; with gradients where they are
        on."""
        hidden = self.hidden(model)
        logp, entropy = linear_token_logprobs(
            hidden, model.head_weight, self.targets, temperature, self.kept, active=model.active_vocab
        )
        return self.unflatten(logp), self.unflatten(entropy)


def _kept(rows: Sequence[Row], device) -> Kept | None:
    if all(row.kept is None for row in rows):
        return None
    sets = [ids for row in rows for ids in (row.kept or [np.empty(0, np.int32)] * len(row.response))]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sets])])
    ids = np.concatenate([np.empty(0, np.int32), *sets])
    return Kept(torch.from_numpy(ids).to(device), torch.from_numpy(offsets).to(device))


def score(model: Transformer, rows: Sequence[Row], budget: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of all rows without gradient, [B, T] with T the longest response, 0 where there is no token."""
    return score_with_entropy(model, rows, budget, temperature)[0]


@torch.no_grad()
def score_with_entropy(
    model: Transformer, rows: Sequence[Row], budget: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score`, and the entropies of the distributions that its tokens are drawn from; float64 from such a model."""
    width, dtype = max((len(row.response) for row in rows), default=0), torch.promote_types(model.dtype, torch.float32)
    out = torch.zeros(2, len(rows), width, dtype=dtype, device=model.device)
    for indices in micro_batches(rows, range(len(rows)), budget):
        found = torch.stack(MicroBatch([rows[i] for i in indices], model.device).logprobs(model, temperature))
        out[:, torch.tensor(indices, device=model.device), : found.shape[2]] = found
    return out[0], out[1]
