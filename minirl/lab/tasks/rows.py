"""Split the examples of tasks from files into a training and a held-out side."""

import warnings
from collections.abc import Callable
from pathlib import Path

from minirl.errors import InputError
from minirl.split import prompt_key, split_by_problem


def two_sides(
    task: str,
    read: Callable[[Path, int | None], list[dict]],
    path: str,
    heldout_path: str | None,
    heldout_fraction: float | None,
    limit: int | None,
    seed: int,
) -> tuple[list[dict], list[dict]]:
    """Return (training, held out) examples, read by `read(path, limit)`; of the first file at most `limit`.

    Held out are the examples of the other file, or else a share (default: a tenth) of the prompts of the first. All
    have the same columns, None where a line lacks one.
    """
    if heldout_path is not None and heldout_fraction is not None:
        raise InputError(f"{task}: give heldout_path or heldout_fraction, not both.")
    if heldout_fraction is not None and not 0 <= heldout_fraction < 1:
        raise InputError(f"{task}: heldout_fraction must lie in [0, 1), not {heldout_fraction}.")
    if limit is not None and limit < 1:
        raise InputError(f"{task}: limit must be at least 1, not {limit}.")
    examples = read(Path(path), limit)
    if heldout_path is None:
        share = 0.1 if heldout_fraction is None else heldout_fraction
        refusal = f"{task}: one prompt cannot be split: add more, or set heldout_fraction=0 or a heldout_path."
        train, heldout = split_by_problem(examples, prompt_key, share, seed, refusal)
    else:
        train, heldout = examples, read(Path(heldout_path), None)
        _warn_of_overlap(train, heldout, heldout_path)
    _fill(train + heldout)
    return train, heldout


def _warn_of_overlap(train: list[dict], heldout: list[dict], heldout_path: str) -> None:
    shared = set(map(prompt_key, train)) & set(map(prompt_key, heldout))
    if shared:
        warnings.warn(f"{heldout_path}: {len(shared)} of its prompts are in the training file too.", stacklevel=4)


def _fill(examples: list[dict]) -> None:
    names = list(dict.fromkeys(name for example in examples for name in example))
    for example in examples:
        for name in names:
            example.setdefault(name, None)
