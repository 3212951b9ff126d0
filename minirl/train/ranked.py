"""Ranked responses: lines of a file, token rows, and micro-batches that never part the responses of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minirl.errors import InputError
from minirl.preferences import ranked_pairs
from minirl.tasks.jsonl import read_examples
from minirl.tasks.split import problem_hash
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row, micro_batches


@dataclass
class Ranked:
    """A prompt with K ranked responses."""

    rows: list[Row]  # K
    pairs: list[tuple[int, int]]  # (better, worse), each an index of `rows`
    best: int  # index of the first row with the highest score
    ref_logp: torch.Tensor | None = None  # [K], sums over the tokens

    @property
    def tokens(self) -> int:
        return len(self.rows[0].prompt) + sum(len(row.response) for row in self.rows)


def read_preferences(path: str | Path) -> list[dict]:
    """Lines of a JSONL file as {"prompt", "responses", "scores"}; chosen and rejected become scores 1 and 0."""
    examples = read_examples(Path(path), {"prompt": "prompt", "answer": "answer"})
    return [_ranked_example(example, f"{path}, example {i}") for i, example in enumerate(examples, 1)]


def _ranked_example(example: dict, where: str) -> dict:
    if "chosen" in example or "rejected" in example:
        responses, scores = [example.get("chosen"), example.get("rejected")], [1.0, 0.0]
        what = "its 'chosen' and its 'rejected' must both be texts"
    else:
        responses, scores = example.get("responses"), example.get("scores")
        what = "it needs 'chosen' and 'rejected', or 'responses' (two texts or more) and 'scores' (as many numbers)"
    lists = isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores) >= 2
    if not lists or not all(isinstance(response, str) for response in responses) or not all(map(_is_number, scores)):
        raise InputError(f"{where}: {what}")
    return {"prompt": example["prompt"], "responses": responses, "scores": [float(score) for score in scores]}


def _is_number(score: object) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < float("inf")


def ranked_lists(tokenizer: Tokenizer, examples: Sequence[dict], max_length: int) -> list[Ranked]:
    """Token rows, each with its stop token unless it had to be cut at `max_length` tokens in all.

    Of equal responses (also: equal after the cut) the first stays. Examples without a pair, where all is equal or tied,
    are left out.
    """
    if not tokenizer.stop_ids:
        raise InputError("the tokenizer names no stop token: give eos_token_id in generation_config.json")
    lists = []
    for i, example in enumerate(examples, 1):
        prompt = tokenizer.prompt_ids(example["prompt"])
        if not prompt or len(prompt) >= max_length:
            raise InputError(
                f"example {i}: its prompt has {len(prompt)} tokens, and between 1 and {max_length - 1} fit"
            )
        responses: dict[tuple[int, ...], float] = {}
        for text, score in zip(example["responses"], example["scores"], strict=True):
            tokens = [*tokenizer.encode(text), tokenizer.stop_ids[0]]
            responses.setdefault(tuple(tokens[: max_length - len(prompt)]), score)
        rows, scores = [Row(prompt, tokens, group=i) for tokens in responses], list(responses.values())
        if pairs := ranked_pairs(scores):
            lists.append(Ranked(rows, pairs, scores.index(max(scores))))
    return lists


def held_out(lists: Sequence[Ranked], share: float, seed: int) -> tuple[list[Ranked], list[Ranked]]:
    """(training, held out): a seeded share of the distinct prompts, each with all its lists; at least one of them if
    the share is not 0."""
    prompts = sorted({tuple(item.rows[0].prompt) for item in lists}, key=lambda prompt: problem_hash(seed, prompt))
    if share and len(prompts) == 1:
        raise InputError("one prompt cannot be both trained on and held out: add more, or set eval_share = 0")
    held = set(prompts[: min(max(1, round(share * len(prompts))), len(prompts) - 1)]) if share else set()
    sides: tuple[list[Ranked], list[Ranked]] = [], []
    for item in lists:
        sides[tuple(item.rows[0].prompt) in held].append(item)
    return sides


def whole_lists(lists: Sequence[Ranked], budget: int) -> list[list[int]]:
    """Indices of lists in micro-batches of at most `budget` tokens; one with more is alone."""
    joined = [
        Row(item.rows[0].prompt, [t for row in item.rows for t in row.response], group=i)
        for i, item in enumerate(lists)
    ]
    return micro_batches(joined, range(len(lists)), budget)
