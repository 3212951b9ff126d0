"""Ranked responses: lines of a file, token rows, and micro-batches that never part the responses of a prompt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minirl.errors import InputError
from minirl.preferences import ranked_pairs
from minirl.tasks.split import split_by_problem
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row, micro_batches
from minirl.train.formats import HH, as_text, preference, read_rows
from minirl.train.sft import Demonstration, below, fits, named
from minirl.turns import Turns, common_start, conversation


@dataclass
class Ranked:
    """A prompt with K ranked responses."""

    rows: list[Demonstration]  # K
    pairs: list[tuple[int, int]]  # (better, worse), each an index of `rows`
    best: int  # index of the first row with the highest score
    ref_logp: torch.Tensor | None = None  # [K], sums over the tokens
    cut: int = 0  # rows that were too long

    @property
    def tokens(self) -> int:
        return len(self.rows[0].prompt) + sum(len(row.response) for row in self.rows)


def read_preferences(path: str | Path) -> list[dict]:
    """The rows of a file as records of `formats.preference`."""
    return read_rows(path, preference)


def description(examples: Sequence[dict]) -> str:
    """The format that was read."""
    form = {"prompt": "below a prompt", "whole conversations": "conversations without an explicit prompt"}
    lists = sum(len(example["responses"]) > 2 for example in examples)
    line = f"{len(examples) - lists:,} pairs" if lists < len(examples) else ""
    line += " and " * (0 < lists < len(examples)) + (f"{lists:,} ranked lists" if lists else "")
    name = examples[0]["format"]
    return f"{line} ({form.get(name, f'format {name}')})"


def response_turns(tokenizer: Tokenizer, example: dict, texts: Sequence[str], tokens: list | None) -> list[Turns]:
    """Each text below the example's prompt, with the tokens that stand beside it, or else its own and the stop token:
    it ended by itself."""
    tokens = [None] * len(texts) if tokens is None else tokens
    if not isinstance(tokens, list) or len(tokens) != len(texts):
        raise InputError(f"{example['where']}: 'responses_tokens' must be a list with the tokens of each response")
    pairs = zip(texts, tokens, strict=True)
    return [below(tokenizer, example, text, ids, example["where"]) for text, ids in pairs]


def encoded(tokenizer: Tokenizer, example: dict) -> list[Turns]:
    """The prompt of a record with each of its responses: texts below the prompt, or messages as the chat template
    writes them. All have the same prompt."""
    if example["format"] == HH and tokenizer.chat_template is None:
        example = as_text(example)
    prompt, responses, tools = example["prompt"], example["responses"], example.get("tools")
    if all(isinstance(response, str) for response in responses):
        found = response_turns(tokenizer, example, responses, example["tokens"])
    else:
        with named(example["where"]):
            found = [_messages(tokenizer, prompt, response, tools) for response in responses]
    share_prompt(found)
    return found


def share_prompt(found: Sequence[Turns]) -> None:
    """Give all the same prompt: one of them may begin before thoughts that the template opens in the others."""
    common = common_start([turns.prompt for turns in found])
    for turns in found:
        opening = turns.prompt[len(common) :]
        turns.response, turns.counted = opening + turns.response, [True] * len(opening) + turns.counted
        turns.prompt = common


def _messages(tokenizer: Tokenizer, prompt: list[dict], response: list[dict], tools: list[dict] | None) -> Turns:
    places = [i for i, message in enumerate(response, len(prompt)) if message["role"] == "assistant"]
    pieces = conversation(tokenizer, [*prompt, *response], places, tools)
    if len(pieces) > 1:
        raise InputError(
            "the chat template writes earlier turns in another way, so a response of several turns is not one text: "
            "keep its first turn"
        )
    return pieces[0]


def ranked_lists(
    tokenizer: Tokenizer, examples: Iterable[dict], max_length: int, overlong: list[str] | None = None
) -> list[Ranked]:
    """Token rows, each with its stop token (or as its tokens stand in the file) unless it had to be cut at `max_length`
    tokens in all.

    Of equal responses (also: equal after the cut) the first stays. Examples without a pair, where all is equal or tied,
    are left out; so are those whose prompt does not fit, and their places go to `overlong` (None: the first is named in
    an InputError).
    """
    lists = []
    for i, example in enumerate(examples, 1):
        found, scores, counted = encoded(tokenizer, example), {}, {}
        prompt = found[0].prompt
        if not fits(len(prompt), max_length, example["where"], overlong):
            continue
        room = max_length - len(prompt)
        for turns, score in zip(found, example["scores"], strict=True):
            row = tuple(turns.response[:room])
            scores.setdefault(row, score)
            counted.setdefault(row, turns.counted[:room])
        if pairs := ranked_pairs(ranks := list(scores.values())):
            cut = len({tuple(turns.response[:room]) for turns in found if len(turns.response) > room})
            rows = [Demonstration(prompt, row, group=i, counted=counted[row], where=example["where"]) for row in scores]
            lists.append(Ranked(rows, pairs, ranks.index(max(ranks)), cut=cut))
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
