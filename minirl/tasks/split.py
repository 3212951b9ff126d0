"""Seeded splits by problem: whatever side a problem is on, all its wordings are on, and no list of all problems is
needed.
"""

import hashlib
import json
import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from minirl.errors import InputError

Item = TypeVar("Item")

HELDOUT_SHARE = 0.2  # of the problems of a task that are drawn rather than listed
PATIENCE = 5000  # draws
DEFAULT_TRAIN, DEFAULT_HELDOUT = 4096, 256


def problem_hash(seed: int, problem: Hashable) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the problem: its place in the split."""
    digest = hashlib.blake2b(repr((seed, problem)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def prompt_key(example: dict) -> str:
    """What tells the prompts of examples apart, texts or messages, with the tools that are written into them."""
    prompt, tools = example["prompt"], example.get("tools")
    return json.dumps([prompt, tools] if tools else prompt, sort_keys=True)


def split_by_problem(
    items: Sequence[Item], problem: Callable[[Item], Hashable], share: float, seed: int, refusal: str
) -> tuple[list[Item], list[Item]]:
    """(training, held out): a seeded share of the distinct problems is held out, each with all its items. On both sides
    is at least one, or none is held out for a share of 0; `refusal` says what to do where there is one in all."""
    problems = sorted({problem(item) for item in items}, key=lambda found: problem_hash(seed, found))
    if share and len(problems) == 1:
        raise InputError(refusal)
    held = set(problems[: min(max(1, round(share * len(problems))), len(problems) - 1)]) if share else set()
    sides: tuple[list[Item], list[Item]] = [], []
    for item in items:
        sides[problem(item) in held].append(item)
    return sides


def draw_split(
    name: str,
    draw: Callable[[random.Random], tuple[Hashable, dict]],
    train_size: int | None,
    heldout_size: int | None,
    seed: int,
    advice: str = "ask for fewer, or widen the range of the numbers",
    most: tuple[int, int] = (DEFAULT_TRAIN, DEFAULT_HELDOUT),
) -> tuple[list[dict], list[dict]]:
    """Distinct examples for both sides from `draw(rng) -> (problem, example)`; a problem's hash decides on its side.

    A size of None stands for all that are found, up to `most`. InputError if `PATIENCE` draws in a row bring nothing
    new: the task has too few problems.
    """
    check_sizes(name, train_size, heldout_size)
    rng = random.Random(f"{name} {seed}")
    sizes = [limit if size is None else size for size, limit in zip((train_size, heldout_size), most, strict=True)]
    sides, seen, idle = ([], []), set(), 0
    while idle < PATIENCE and [len(side) for side in sides] != sizes:
        problem, example = draw(rng)
        idle += 1
        held = problem_hash(seed, problem) < HELDOUT_SHARE
        if len(sides[held]) < sizes[held] and str(example["prompt"]) not in seen:
            seen.add(str(example["prompt"]))
            sides[held].append(example)
            idle = 0
    if any(
        len(side) < (1 if size is None else size) for side, size in zip(sides, (train_size, heldout_size), strict=True)
    ):
        found = f"{len(sides[0])} of train_size={sizes[0]} and {len(sides[1])} of heldout_size={sizes[1]}"
        raise InputError(f"{name}: only {found} distinct problems were found: {advice}.")
    return sides


def check_sizes(name: str, *sizes: int | None) -> None:
    if any(size is not None and size < 0 for size in sizes):
        raise InputError(f"{name}: train_size and heldout_size must be 0 or more.")
