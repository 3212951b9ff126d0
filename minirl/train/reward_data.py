"""What reward models learn from: JSONL lines of pairs, ranked lists, labelled completions or labelled steps.

    pairwise        {"prompt", "chosen", "rejected"[, "margin"]}  or  {"prompt", "responses", "scores"}, and the other
                    formats of preferences
    pointwise, bce  {"prompt", "completion", "label"}             label 1 or true is right; 0, -1 or false is wrong
    process         {"prompt", "steps", "labels"}                 labels in [0, 1], null where a step has none

A prompt is a text or chat messages. A completion is taken to have ended by itself and gets the stop token; where its
tokens stand beside it ("completion_tokens", "chosen_tokens", "rejected_tokens", "responses_tokens"), it has these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from minirl.errors import InputError
from minirl.files import is_number
from minirl.model import ModelConfig
from minirl.reward_losses import Pair, inverse_frequency, weighted_pairs
from minirl.rewards.model import LAST, Tree, step_ends
from minirl.tasks.split import prompt_key, split_by_problem
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row
from minirl.train.formats import demonstration, preference, read_rows, text_answer
from minirl.train.ranked import encoded
from minirl.train.sft import below, named, refuse_unknown_tokens
from minirl.turns import continuation_ids


@dataclass(frozen=True)
class Line:
    """One line as the loss takes it. `weights` has one entry a term: a pair, or a place of the tree."""

    tree: Tree
    weights: tuple[float, ...]
    pairs: tuple[Pair, ...] = ()  # over the tree's places (pairwise)
    margin: float = 0.0
    labels: tuple[float, ...] = ()  # of the tree's places, in [0, 1] (all other kinds)

    @property
    def tokens(self) -> int:
        return len(self.tree.prompt) + sum(map(len, self.tree.responses))


@dataclass
class Lines:
    """The lines that can be learned from, and how many could not."""

    lines: list[Line] = field(default_factory=list)
    too_long: int = 0  # beyond the model's positions
    no_contrast: int = 0  # equal responses, or tied scores

    def complaint(self, path: str, limit: int) -> str:
        """What was left out, in one sentence; empty for nothing."""
        parts = [f"{self.too_long} longer than {limit} tokens"] if self.too_long else []
        if self.no_contrast:
            parts.append(f"{self.no_contrast} that compare equal or tied responses")
        return f"{path}: lines left out: {' and '.join(parts)}" if parts else ""


def read_examples(path: str | Path, kind: str) -> list[dict]:
    """The rows of a file, each with what its kind needs; "where" says which row it was."""
    return read_rows(path, preference if kind == "pairwise" else lambda row, where: _labels(row, kind, where))


def _labels(row: dict, kind: str, where: str) -> dict:
    """The record of a labelled completion or of labelled steps, below a prompt."""
    if kind == "process":
        wanted = "'steps' (texts) and as many 'labels' (numbers from 0 to 1, null for none)"
        labels, steps = row.get("labels"), row.get("steps")
        fits = _are(steps, str) and isinstance(labels, list) and len(labels) == len(steps)
        fits = fits and all(y is None or (_are([y], int | float | bool) and 0 <= y <= 1) for y in labels)
    else:
        wanted = "a 'label' of 1, 0, -1, true or false"
        fits = _are([row.get("label")], int | float | bool) and row["label"] in (-1, 0, 1)
    if not fits:
        raise InputError(f"{where}: kind {kind} needs {wanted}, and it has {', '.join(row)}")
    if kind == "process":
        record = text_answer(demonstration({**row, "completion": ""}, where), where)
        return record | {"steps": row["steps"], "labels": row["labels"]}
    record = text_answer(demonstration(row, where), where)
    return record | {key: row[key] for key in ("label", "completion_tokens") if key in row}


def _are(values: object, kind) -> bool:
    """A list that is not empty, of texts or of finite numbers."""
    if not isinstance(values, list) or not values or not all(isinstance(value, kind) for value in values):
        return False
    return kind is str or all(is_number(value) or (kind == int | float | bool and value in (0, 1)) for value in values)


def split_by_prompt(examples: Sequence[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out lines: a seeded share of the prompts is held out with all their lines, one at least."""
    refusal = "all lines have one prompt, so none can be held out: set --heldout 0 or give --heldout-data"
    return split_by_problem(examples, prompt_key, share, seed, refusal)


def encode(
    examples: Iterable[dict], kind: str, tokenizer: Tokenizer, config: ModelConfig, separator: str = "\n"
) -> Lines:
    """Token trees with their pairs or labels."""
    found = Lines()
    for example in examples:
        line = {"pairwise": _ranked, "process": _steps}.get(kind, _labelled)(example, tokenizer, separator)
        prompt = line.tree.prompt
        if not prompt:
            raise InputError(f"{example['where']}: its prompt has no token: write something to answer")
        rows = [Row(prompt, response, group=0) for response in line.tree.responses]
        refuse_unknown_tokens(rows, config.vocab_size, example["where"])
        if len(prompt) + max(map(len, line.tree.responses)) > config.max_positions:
            found.too_long += 1
        elif kind == "pairwise" and not line.pairs:
            found.no_contrast += 1
        else:
            found.lines.append(line)
    return found


def balanced(lines: Sequence[Line]) -> list[Line]:
    """Labelled completions, weighted so that right and wrong ones have half of the whole weight each; else a model of
    an accurate policy says 'right' to everything."""
    weights = inverse_frequency(torch.tensor([line.labels[0] for line in lines])).tolist()
    return [replace(line, weights=(w,)) for line, w in zip(lines, weights, strict=True)]


def _ranked(example: dict, tokenizer: Tokenizer, separator: str) -> Line:
    found = encoded(tokenizer, example)
    rows = tuple(tuple(turns.response) for turns in found)
    pairs = tuple(weighted_pairs(example["scores"], rows))
    tree = Tree(tuple(found[0].prompt), rows, ((LAST,),) * len(rows))
    return Line(tree, tuple(pair[2] for pair in pairs), pairs, example.get("margin", 0.0))


def _labelled(example: dict, tokenizer: Tokenizer, separator: str) -> Line:
    found = below(tokenizer, example, example["completion"], example.get("completion_tokens"), example["where"])
    tree = Tree(tuple(found.prompt), (tuple(found.response),), ((LAST,),))
    return Line(tree, (1.0,), labels=(float(example["label"] > 0),))


def _steps(example: dict, tokenizer: Tokenizer, separator: str) -> Line:
    steps, labels = example["steps"], example["labels"]
    text = separator.join(step.removesuffix(separator) for step in steps)
    with named(example["where"]):
        prompt = tuple(tokenizer.prompt_ids(example["prompt"], example.get("tools")))
        row = continuation_ids(tokenizer, example["prompt"], text, example.get("tools"))
    places = tuple(step_ends(tokenizer, row, separator))
    if len(places) != len(steps):
        raise InputError(
            f"{example['where']}: its {len(steps)} steps are read as {len(places)}: a step may neither be blank nor "
            f"hold the separator {separator!r}"
        )
    mask = tuple(float(label is not None) for label in labels)
    return Line(
        Tree(prompt, (tuple(row),), (places,)),
        mask,
        labels=tuple(float(label or 0) for label in labels),
    )
