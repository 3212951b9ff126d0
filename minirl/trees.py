"""Rows cut into micro-batches of bounded size, and the log-probs of their responses from one forward.

A micro-batch is only a memory knob. It holds trees (a prompt with some of its responses), so that a prompt is computed
once for all of the responses beside it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from minirl.attention import Packed
from minirl.files import read_json, write_json
from minirl.kernels import Kept, linear_token_logprobs
from minirl.model import Transformer

LAST = -1  # as a place: the last token
ROWS, TOKENS = "rows.json", "tokens.safetensors"  # files


@dataclass(frozen=True)
class Row:
    """One response below its prompt, with what some uses need beside it. Rows of one group have the same prompt."""

    prompt: Sequence[int]
    response: Sequence[int]
    group: int | None = None  # None: all rows with this prompt are one group
    kept: list[np.ndarray] | None = None  # for each token the ids that truncated sampling kept
    counted: Sequence[bool] | None = None  # for each token whether it is learned; None: all of them
    places: Sequence[int] = (LAST,)  # tokens of the response at which a reward model is read
    where: str = ""  # the place in a file, for sentences
    lost: int = 0  # tokens that did not fit

    @property
    def tree(self) -> Hashable:
        return tuple(self.prompt) if self.group is None else self.group


def save_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write rows so that `load_rows` makes them again: tokens, and the ids that truncated sampling kept, as tensors."""
    lists = {"prompt": [r.prompt for r in rows], "response": [r.response for r in rows]}
    lists["kept"] = [ids for row in rows for ids in row.kept or ()]
    tensors = {name: np.concatenate([np.asarray(x, np.int32) for x in some] or [[]]) for name, some in lists.items()}
    sizes = {f"{name} sizes": np.array([len(x) for x in some], np.int32) for name, some in lists.items()}
    save_file(tensors | sizes, folder / TOKENS)
    rest = [{f.name: getattr(row, f.name) for f in fields(Row) if f.name not in lists} for row in rows]
    write_json(folder / ROWS, {"rows": rest})


def load_rows(folder: Path) -> list[Row]:
    """Read what `save_rows` wrote."""
    found, lists = load_file(folder / TOKENS), {}
    for name in ("prompt", "response", "kept"):
        lists[name] = iter(np.split(found[name], found[f"{name} sizes"].cumsum()[:-1]))
    rows = []
    for rest in read_json(folder / ROWS)["rows"]:
        prompt, response = next(lists["prompt"]).tolist(), next(lists["response"]).tolist()
        kept = [next(lists["kept"]) for _ in response] if len(found["kept sizes"]) else None
        rows.append(Row(prompt, response, kept=kept, **rest))
    return rows


def micro_batches(rows: Sequence[Row | Sequence[Row]], indices: Sequence[int], budget: int) -> list[list[int]]:
    """Split indices into lists whose trees have at most `budget` tokens (a single entry may have more).

    An entry of `rows` is a row, or a list of rows of one prompt that a loss compares, which is never parted. Entries of
    one group stay together where they fit, and groups of similar length come together, so that attention pads little.
    """
    entries = {i: [rows[i]] if isinstance(rows[i], Row) else rows[i] for i in indices}
    own = {i: sum(len(row.response) for row in entry) for i, entry in entries.items()}
    groups: dict[Hashable, list[int]] = {}
    for i, entry in entries.items():
        groups.setdefault(entry[0].tree, []).append(i)
    batches: list[list[int]] = [[]]
    size = 0
    for members in sorted(groups.values(), key=lambda m: max(len(row.response) for i in m for row in entries[i])):
        prompt = len(entries[members[0]][0].prompt)
        if batches[-1] and size + prompt + sum(own[i] for i in members) > budget:
            batches.append([])
            size = 0
        for n, i in enumerate(members):
            cost = own[i] + (prompt if n == 0 else 0)
            if batches[-1] and size + cost > budget:
                batches.append([])
                size, cost = 0, prompt + own[i]
            batches[-1].append(i)
            size += cost
    return [batch for batch in batches if batch]


def response_mask(rows: Sequence[Row], device=None) -> torch.Tensor:
    """Make the mask [B, T] of the responses' tokens, the stop token included; T is the longest response."""
    lengths = torch.tensor([len(row.response) for row in rows])
    return (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(device)


def loss_mask(rows: Sequence[Row], device=None) -> torch.Tensor:
    """Make the mask [B, T] of the tokens that are learned: the `response_mask` without those that are not `counted`."""
    mask = response_mask(rows)
    for i, row in enumerate(rows):
        if row.counted is not None:
            mask[i, : len(row.response)] = torch.tensor(row.counted)
    return mask.to(device)


class MicroBatch:
    """Lay rows out for one forward: hidden state `predict[m]` predicts response token `targets[m]`.

    rows B, longest response T, all response tokens M (row by row).
    """

    def __init__(self, rows: Sequence[Row], device=None):
        trees: dict[Hashable, list[int]] = {}
        for i, row in enumerate(rows):
            trees.setdefault(row.tree, []).append(i)
        # The last token of a response predicts no other, so it is not computed.
        packed = [(rows[tree[0]].prompt, [rows[i].response[:-1] for i in tree]) for tree in trees.values()]
        self.layout = Packed(packed, device)
        order = [i for tree in trees.values() for i in tree]
        spans, predict = dict(zip(order, self.layout.response_spans, strict=True)), []
        for i, row in enumerate(rows):
            start, length, tree = spans[i]
            prompt, n = self.layout.prompt_spans[tree]
            places = [prompt + n - 1, *range(start, start + length)]
            predict += places[: len(row.response)]  # an empty response has no place, not even the prompt's end
        self.predict = torch.tensor(predict, dtype=torch.long, device=device)
        self.targets = torch.tensor([t for row in rows for t in row.response], dtype=torch.long, device=device)
        self.mask = response_mask(rows, device)  # [B, T]
        self.kept = _kept(rows, device)

    def unflatten(self, x: torch.Tensor) -> torch.Tensor:
        """Lay [M] out as [B, T], 0 where there is no token."""
        return torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(self.mask, x)

    def hidden(self, model: Transformer) -> torch.Tensor:
        """Compute the hidden states from which the head predicts each response token, [M, D]."""
        return model(self.layout.tokens, self.layout).index_select(0, self.predict)

    def logprobs(self, model: Transformer, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the log-prob of every response token and the entropy of its distribution, [B, T] each; with gradients
        where they are on."""
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


def response_logprobs(model: Transformer, rows: Sequence[Row], budget: int, temperature: float = 1.0) -> torch.Tensor:
    """Compute the log-probs of all rows without gradient, [B, T] with T the longest response, 0 where there is no
    token."""
    return response_logprobs_and_entropy(model, rows, budget, temperature)[0]


@torch.no_grad()
def response_logprobs_and_entropy(
    model: Transformer, rows: Sequence[Row], budget: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `response_logprobs` and the entropies of the distributions that the tokens are drawn from, [B, T] each;
    float64 from a model in float64."""
    width, dtype = max((len(row.response) for row in rows), default=0), torch.promote_types(model.dtype, torch.float32)
    out = torch.zeros(2, len(rows), width, dtype=dtype, device=model.device)
    for indices in micro_batches(rows, range(len(rows)), budget):
        found = torch.stack(MicroBatch([rows[i] for i in indices], model.device).logprobs(model, temperature))
        out[:, torch.tensor(indices, device=model.device), : found.shape[2]] = found
    return out[0], out[1]
