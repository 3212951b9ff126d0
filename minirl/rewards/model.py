"""A reward model as a reward: what a trained scalar head says of a completion.

Completions of one prompt share it (attention.Packed), so that scoring a group costs P + G·R tokens. The score is read
at the completion's last token, the stop token unless it was cut; that of a process model at the last token of each
step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minirl.attention import Packed
from minirl.errors import InputError
from minirl.model import Transformer
from minirl.rewards.thoughts import OPENING
from minirl.tokenizer import Tokenizer
from minirl.turns import Turns, answered, continuation_ids

LAST = -1  # as a place: the last token
BROKEN = 16  # tokens that may end in half a character; more are bytes that will never be one


@dataclass(frozen=True)
class Tree:
    """A prompt with responses, and the token of each response that is read (places, LAST the last one of all). What is
    compared with one another stays in one tree."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]


def micro_batches(trees: Sequence[Tree], budget: int) -> list[list[int]]:
    """Indices of trees, in lists of at most `budget` tokens (a single tree may have more). Trees with one prompt come
    together, as `read` computes it once for all of them, and so do those of similar length."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, tree in enumerate(trees):
        groups.setdefault(tree.prompt, []).append(i)
    batches: list[list[int]] = [[]]
    size = 0
    for prompt, members in sorted(groups.items(), key=lambda g: max(len(r) for i in g[1] for r in trees[i].responses)):
        for n, i in enumerate(members):
            own = sum(map(len, trees[i].responses))
            cost = own + (len(prompt) if n == 0 else 0)
            if batches[-1] and size + cost > budget:
                batches.append([])
                size, cost = 0, own + len(prompt)
            batches[-1].append(i)
            size += cost
    return [batch for batch in batches if batch]


def read(model: Transformer, trees: Sequence[Tree]) -> torch.Tensor:
    """The scores of all places of the trees, fp32 [M]: tree by tree, response by response. With gradients where they
    are on. Equal prompts, and equal responses below one, are computed once."""
    below: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for tree in trees:
        shared = below.setdefault(tree.prompt, {})
        for response in tree.responses:
            shared.setdefault(response, len(shared))
    layout = Packed([(prompt, list(responses)) for prompt, responses in below.items()], model.device)
    spans, ends = iter(layout.response_spans), {}
    for (prompt, responses), (start, length) in zip(below.items(), layout.prompt_spans, strict=True):
        for response in responses:
            ends[prompt, response] = (next(spans)[0], start + length - 1)
    index = []
    for tree in trees:
        for response, places in zip(tree.responses, tree.places, strict=True):
            first, prompt_end = ends[tree.prompt, response]
            last = first + len(response) - 1 if response else prompt_end
            index += [last if place == LAST else first + place for place in places]
    hidden = model(layout.tokens, layout)
    return model.values(hidden.index_select(0, torch.tensor(index, dtype=torch.long, device=model.device)))


@torch.no_grad()
def read_all(model: Transformer, trees: Sequence[Tree], budget: int) -> torch.Tensor:
    """`read` without gradient, in micro-batches of `budget` tokens; [M] in the order of the trees."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(trees)
    for indices in micro_batches(trees, budget):
        part = [trees[i] for i in indices]
        sizes = [sum(map(len, tree.places)) for tree in part]
        for i, scores in zip(indices, read(model, part).split(sizes), strict=True):
            found[i] = scores
    return torch.cat(found) if found else torch.empty(0, device=model.device)


def step_ends(tokenizer: Tokenizer, tokens: Sequence[int], separator: str) -> list[int]:
    """Index of each step's last token: that in which the step's separator ends, for a last step without one the last
    token of all. A step of white space alone is none; a text without any step has one, at its end.

    Tokens are read behind those before them, as a token alone may be part of a character, or lose its space."""
    read, known, pending, ends, step = [], 0, [], [], ""
    for i, token in enumerate(tokens):
        pending.append(token)
        piece = tokenizer.shown([*read, *pending])[known:]
        if piece.endswith("\ufffd") and i + 1 < len(tokens) and len(pending) < BROKEN:
            continue
        read, known, pending, step = pending, len(tokenizer.shown(pending)), [], step + piece
        if separator in step:
            before, _, step = step.rpartition(separator)
            if before.strip():
                ends.append(i)
    if step.strip() or not ends:
        ends.append(LAST)
    return ends


def spelled_tokens(tokenizer: Tokenizer, text: str, tokens: Sequence[int], where: str) -> tuple[int, ...]:
    """The tokens of a sampled text; InputError where they do not spell it, as those of another tokenizer. They may go
    on, as a stop text is cut from what a reward sees."""
    if not isinstance(tokens, list | tuple) or any(type(token) is not int or token < 0 for token in tokens):
        raise InputError(f"{where}: its tokens are {tokens!r:.60}: they must be a list of token ids")
    text, spelled = tokenizer.without_end(text)[0], tokenizer.shown(tokens)
    begun = text.removeprefix(OPENING)  # it may stand in the prompt
    if not spelled.startswith((text, begun)) and not tokenizer.decode(tokens).startswith(text):  # without special ones
        raise InputError(
            f"{where}: its tokens spell {spelled[:40]!r} and not {text[:40]!r}: they are of another "
            "tokenizer; a reward model needs the policy's, and stored tokens that of the checkpoint"
        )
    return tuple(tokens)


class RewardModel:
    """A trained reward model that can be called as a reward function.

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
        """`budget`: tokens in one forward."""
        self.model, self.tokenizer, self.budget, self.steps = model.requires_grad_(False), tokenizer, budget, steps

    @classmethod
    def from_pretrained(cls, path: str | Path, device=None, dtype: torch.dtype | None = None) -> "RewardModel":
        """A folder that `minirl reward` wrote, or another sequence classifier with one label; `device` None is the GPU
        where there is one, `dtype` None the checkpoint's own."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = Transformer.from_pretrained(path, dtype, device, scalar_head=True)
        if not any(p.any() for p in model.score.parameters()):
            raise InputError(f"{path} is no reward model, it has no score head: train one with `minirl reward`")
        return cls(model, Tokenizer.from_pretrained(path))

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """One number for each pair of token rows."""
        trees = [Tree(tuple(p), (tuple(c),), (self._places(c),)) for p, c in zip(prompts, completions, strict=True)]
        for i, tree in enumerate(trees):
            self._refuse(i, tree)
        scores = read_all(self.model, trees, self.budget)
        return [self._solution(s) for s in scores.split([len(tree.places[0]) for tree in trees])]

    def __call__(self, prompts, completions, completion_ids=None, **columns) -> list[float]:
        """The reward function: `completion_ids` are the sampler's tokens; without them a completion is taken to have
        ended by itself."""
        tools, ids = (column or [None] * len(prompts) for column in (columns.get("tools"), completion_ids))
        rows = [self._turns(i, *row) for i, row in enumerate(zip(prompts, tools, completions, ids, strict=True))]
        return self.score([row.prompt for row in rows], [row.response for row in rows])

    def _turns(self, i: int, prompt, tools, text: str, ids: Sequence[int] | None) -> Turns:
        """A prompt and its completion, as `minirl reward` reads them in training."""
        tokenizer, ended, head = self.tokenizer, bool(self.tokenizer.stop_ids), self.model.head
        if ids is None and (head is None or head.kind != "process"):
            return answered(tokenizer, prompt, text, tools, ended)
        tokens = tokenizer.prompt_ids(prompt, tools)
        if ids is None:
            return Turns(tokens, continuation_ids(tokenizer, prompt, text, tools, ended))
        return Turns(tokens, list(spelled_tokens(tokenizer, text, ids, f"completion {i}")))

    def _places(self, completion: Sequence[int]) -> tuple[int, ...]:
        head = self.model.head
        return tuple(step_ends(self.tokenizer, completion, head.separator)) if head.kind == "process" else (LAST,)

    def _solution(self, scores: torch.Tensor) -> float:
        if self.model.head.kind not in ("bce", "process"):
            return scores.item()
        right = scores.sigmoid().tolist()
        return {"min": min, "prod": math.prod, "last": lambda p: p[-1]}[self.steps](right)

    def _refuse(self, i: int, tree: Tree) -> None:
        """What the model cannot read."""
        tokens, config = tree.prompt + tree.responses[0], self.model.config
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
