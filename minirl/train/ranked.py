"""Ranked responses: lines of a file, token rows, and micro-batches that never part the responses of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minirl.errors import InputError
from minirl.preferences import ranked_pairs
from minirl.rewards.model import spelled_tokens
from minirl.tasks.jsonl import read_examples
from minirl.tasks.split import split_by_problem
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row, micro_batches
from minirl.train.sft import prompt_tokens


@dataclass
class Ranked:
    """A prompt with K ranked responses."""

    rows: list[Row]  # K
    pairs: list[tuple[int, int]]  # (better, worse), each an index of `rows`
    best: int  # index of the first row with the highest score
    ref_logp: torch.Tensor | None = None  # [K], sums over the tokens
    cut: int = 0  # rows that were too long

    @property
    def tokens(self) -> int:
        return len(self.rows[0].prompt) + sum(len(row.response) for row in self.rows)


def read_preferences(path: str | Path) -> list[dict]:
    """Lines of a JSONL file as {"prompt", "responses", "scores", "tokens"}; chosen and rejected become scores 1 and 0,
    and tokens are None where they do not stand beside the texts."""
    examples = read_examples(Path(path), {"prompt": "prompt", "answer": "answer"})
    return [_ranked_example(example, f"{path}, example {i}") for i, example in enumerate(examples, 1)]


def _ranked_example(example: dict, where: str) -> dict:
    responses, scores, tokens = responses_of(example)
    lists = isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores) >= 2
    if not lists or not all(isinstance(response, str) for response in responses) or not all(map(_is_number, scores)):
        what = "texts 'chosen' and 'rejected', or 'responses' (two texts or more) and 'scores' (as many numbers)"
        raise InputError(f"{where}: it needs {what}")
    numbers = [float(score) for score in scores]
    return {"prompt": example["prompt"], "responses": responses, "scores": numbers, "tokens": tokens}


def responses_of(example: dict) -> tuple[list[str], list[float], list | None]:
    """Texts of a line's responses, their scores, and the tokens beside them, as they stand there."""
    if "responses" in example:
        return example["responses"], example.get("scores"), example.get("responses_tokens")
    pair = ("chosen", "rejected")
    return [example.get(name) for name in pair], [1.0, 0.0], [example.get(f"{name}_tokens") for name in pair]


def response_tokens(tokenizer: Tokenizer, texts: Sequence[str], tokens: list | None, where: str) -> list[list[int]]:
    """Of each text the tokens that stand beside it, or else its own and the stop token: it ended by itself."""
    if tokens is None:
        tokens = [None] * len(texts)
    if not isinstance(tokens, list) or len(tokens) != len(texts):
        raise InputError(f"{where}: 'responses_tokens' must be a list with the tokens of each response")
    return [
        [*tokenizer.encode(text), tokenizer.stop_id] if ids is None else spelled_tokens(tokenizer, text, ids, where)
        for text, ids in zip(texts, tokens, strict=True)
    ]


def _is_number(score: object) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < float("inf")


def ranked_lists(tokenizer: Tokenizer, examples: Sequence[dict], max_length: int) -> list[Ranked]:
    """Token rows, each with its stop token (or as its tokens stand in the file) unless it had to be cut at `max_length`
    tokens in all.

    Of equal responses (also: equal after the cut) the first stays. Examples without a pair, where all is equal or tied,
    are left out.
    """
    lists = []
    for i, example in enumerate(examples, 1):
        prompt = prompt_tokens(tokenizer, example["prompt"], max_length, f"example {i}")
        rows = response_tokens(tokenizer, example["responses"], example["tokens"], f"example {i}")
        room, scores = max_length - len(prompt), {}
        for row, score in zip(rows, example["scores"], strict=True):
            scores.setdefault(tuple(row[:room]), score)
        if pairs := ranked_pairs(ranks := list(scores.values())):
            cut = len({tuple(row[:room]) for row in rows if len(row) > room})
            lists.append(Ranked([Row(prompt, row, group=i) for row in scores], pairs, ranks.index(max(ranks)), cut=cut))
    return lists


def held_out(lists: Sequence[Ranked], share: float, seed: int) -> tuple[list[Ranked], list[Ranked]]:
    """(training, held out): a seeded share of the distinct prompts, each with all its lists; at least one of them if
    the share is not 0."""
    refusal = "one prompt cannot be both trained on and held out: add more, or set eval_share = 0"
    return split_by_problem(lists, lambda item: tuple(item.rows[0].prompt), share, seed, refusal)


def whole_lists(lists: Sequence[Ranked], budget: int) -> list[list[int]]:
    """Indices of lists in micro-batches of at most `budget` tokens; one with more is alone."""
    joined = [
        Row(item.rows[0].prompt, [t for row in item.rows for t in row.response], group=i)
        for i, item in enumerate(lists)
    ]
    return micro_batches(joined, range(len(lists)), budget)
