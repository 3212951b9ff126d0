"""Seeded splits by problem: whatever side a problem is on, all its wordings are on, and no list of all problems is
needed.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from minirl.errors import InputError

Item = TypeVar("Item")


def problem_hash(seed: int, problem: Hashable) -> float:
    """Compute a number in [0, 1) that depends on nothing but the seed and the problem: its place in the split."""
    digest = hashlib.blake2b(repr((seed, problem)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def prompt_key(example: dict) -> str:
    """Make the key that tells prompts of examples apart, texts or messages, with the tools that are written into
    them."""
    prompt, tools = example["prompt"], example.get("tools")
    return json.dumps([prompt, tools] if tools else prompt, sort_keys=True)


def split_by_problem(
    items: Sequence[Item], problem: Callable[[Item], Hashable], share: float, seed: int, refusal: str
) -> tuple[list[Item], list[Item]]:
    """Return (training, held out): a seeded share of the distinct problems is held out, each with all its items.

    Each side has at least one problem; a share of 0 holds none out. InputError(refusal) for a single problem.
    """
    problems = sorted({problem(item) for item in items}, key=lambda found: problem_hash(seed, found))
    if share and len(problems) == 1:
        raise InputError(refusal)
    held = set(problems[: min(max(1, round(share * len(problems))), len(problems) - 1)]) if share else set()
    sides: tuple[list[Item], list[Item]] = [], []
    for item in items:
        sides[problem(item) in held].append(item)
    return sides
