"""Draw the problems of a task at random: each once, on one side of the split."""

import random
from collections.abc import Callable, Hashable

from minirl.errors import InputError
from minirl.split import problem_hash

HELDOUT_SHARE = 0.2  # of all problems that can be drawn
PATIENCE = 5000  # draws in a row without a new problem, before giving up
DEFAULT_TRAIN, DEFAULT_HELDOUT = 4096, 256


def draw_split(
    name: str,
    draw: Callable[[random.Random], tuple[Hashable, dict]],
    train_size: int | None,
    heldout_size: int | None,
    seed: int,
    advice: str = "ask for fewer, or widen the range of the numbers",
    most: tuple[int, int] = (DEFAULT_TRAIN, DEFAULT_HELDOUT),
) -> tuple[list[dict], list[dict]]:
    """Return distinct examples for (training, held out) from `draw(rng) -> (problem, example)`. The hash of a problem
    decides on its side, so that a larger split moves none to the other side.

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
    needed = [1 if size is None else size for size in (train_size, heldout_size)]
    if any(len(side) < size for side, size in zip(sides, needed, strict=True)):
        found = f"{len(sides[0])} of train_size={sizes[0]} and {len(sides[1])} of heldout_size={sizes[1]}"
        raise InputError(f"{name}: only {found} distinct problems were found: {advice}.")
    return sides


def check_sizes(name: str, *sizes: int | None) -> None:
    """Raise an InputError for a negative size."""
    if any(size is not None and size < 0 for size in sizes):
        raise InputError(f"{name}: train_size and heldout_size must be 0 or more.")
