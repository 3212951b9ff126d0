"""Score completions by a trained reward model, a transformer with a scalar head, and use it as a reward function.

Completions of one prompt share it (attention.Packed), so that a group costs P + G·R tokens. The score is read at the
completion's last token, the stop token unless it was cut; that of a process model at the last token of each step.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch

from minirl.errors import InputError
from minirl.model import Transformer
from minirl.tokenizer import Tokenizer
from minirl.trees import LAST, MicroBatch, Row, micro_batches
from minirl.turns import Turns, continuation_ids, encode_answer, step_ends


def read(model: Transformer, rows: Sequence[Row]) -> torch.Tensor:
    """Compute the scores at all places of the rows, fp32 [M], row by row; with gradients where they are on. Equal
    prompts, and equal responses below one, are computed once."""
    numbers: dict[tuple, int] = {}
    found = [numbers.setdefault((tuple(row.prompt), tuple(row.response)), len(numbers)) for row in rows]
    # One token more behind each: a layout leaves the last one out, as it predicts nothing, and here it is read.
    longer = [Row(prompt, (*response, 0)) for prompt, response in numbers]
    micro, starts = MicroBatch(longer, model.device), [0, *accumulate(len(row.response) for row in longer)]
    index = [
        starts[i] + (len(row.response) if place == LAST else place + 1)  # the prompt's end is before the first token
        for row, i in zip(rows, found, strict=True)
        for place in row.places
    ]
    hidden = model(micro.layout.tokens, micro.layout)
    return model.values(hidden.index_select(0, micro.predict[index]))


@torch.no_grad()
def read_all(model: Transformer, rows: Sequence[Row], budget: int) -> torch.Tensor:
    """Compute `read` without gradient, in micro-batches of `budget` tokens; [M] in the order of the rows."""
    found: list[torch.Tensor] = [torch.empty(0, device=model.device)] * len(rows)
    for indices in micro_batches(rows, range(len(rows)), budget):
        part = [rows[i] for i in indices]
        sizes = [len(row.places) for row in part]
        for i, scores in zip(indices, read(model, part).split(sizes), strict=True):
            found[i] = scores
    return torch.cat(found) if found else torch.empty(0, device=model.device)


class RewardModel:
    """Hold a trained reward model that can be called as a reward function.

    Scores of a pairwise or pointwise model are its numbers, less their stored bias; those of a bce model are P(right),
    and a process model's are the least P(right) of any step, or the product, or that of the last step (`steps`).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        budget: int = 8192,
        steps: Literal["min", "prod", "last"] = "min",
    ):
        """Freeze the model; `budget` is the number of tokens in one forward."""
        self.model, self.tokenizer, self.budget, self.steps = model.requires_grad_(False), tokenizer, budget, steps

    @classmethod
    def from_pretrained(cls, path: str | Path, device=None, dtype: torch.dtype | None = None) -> "RewardModel":
        """Load a folder that `minirl reward` wrote, or another sequence classifier with one label; `device` None is the
        GPU where there is one, `dtype` None the checkpoint's own."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = Transformer.from_pretrained(path, dtype, device, scalar_head=True)
        if not any(p.any() for p in model.score.parameters()):
            raise InputError(f"{path} is no reward model, it has no score head: train one with `minirl reward`")
        return cls(model, Tokenizer.from_pretrained(path))

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """Return one number for each pair of token rows."""
        rows = [Row(p, c, places=self._places(c)) for p, c in zip(prompts, completions, strict=True)]
        for i, row in enumerate(rows):
            self._refuse(i, row)
        scores = read_all(self.model, rows, self.budget)
        return [self._solution(s) for s in scores.split([len(row.places) for row in rows])]

    def __call__(self, prompts, completions, completion_ids=None, **columns) -> list[float]:
        """Score completions as a reward function does: `completion_ids` are the sampler's tokens; without them a
        completion is taken to have ended by itself."""
        tools, ids = (column or [None] * len(prompts) for column in (columns.get("tools"), completion_ids))
        rows = [self._turns(i, *row) for i, row in enumerate(zip(prompts, tools, completions, ids, strict=True))]
        return self.score([row.prompt for row in rows], [row.response for row in rows])

    def _turns(self, i: int, prompt, tools, text: str, ids: Sequence[int] | None) -> Turns:
        """Encode a prompt and its completion as `minirl reward` does in training."""
        tokenizer, ended, head = self.tokenizer, bool(self.tokenizer.stop_ids), self.model.head
        if ids is None and head is not None and head.kind == "process":
            return Turns(tokenizer.prompt_ids(prompt, tools), continuation_ids(tokenizer, prompt, text, tools, ended))
        return encode_answer(tokenizer, {"prompt": prompt, "tools": tools}, text, ids, f"completion {i}", ended)

    def _places(self, completion: Sequence[int]) -> tuple[int, ...]:
        head = self.model.head
        return tuple(step_ends(self.tokenizer, completion, head.separator)) if head.kind == "process" else (LAST,)

    def _solution(self, scores: torch.Tensor) -> float:
        if self.model.head.kind not in ("bce", "process"):
            return scores.item()
        right = scores.sigmoid().tolist()
        return {"min": min, "prod": math.prod, "last": lambda p: p[-1]}[self.steps](right)

    def _refuse(self, i: int, row: Row) -> None:
        """Raise an InputError for a row that the model cannot read."""
        tokens, config = [*row.prompt, *row.response], self.model.config
        if not tokens:
            raise InputError(f"completion {i} and its prompt are empty: there is no token to score")
        if len(tokens) > config.max_positions:
            raise InputError(
                f"completion {i} and its prompt have {len(tokens)} tokens, and the reward model was made for "
                f"{config.max_positions}: lower max_tokens, or take another model"
            )
        if max(tokens) >= config.vocab_size:
            raise InputError(
                f"completion {i} or its prompt holds token {max(tokens)}, outside the reward model's vocabulary of "
                f"{config.vocab_size}: it needs the policy's tokenizer"
            )
