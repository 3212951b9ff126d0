"""Rows of data in files, and their two sides: what tasks from files have in common."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from minirl.errors import InputError
from minirl.files import kind_of, parse_json
from minirl.tables import is_json_folder, rows_of
from minirl.tasks.split import prompt_key, split_by_problem

Row = tuple[dict, str]  # what a line holds, and where it stands


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a file or a table (see `rows_of`), or of a folder's .json files, one in each; InputError if
    there are none."""
    empty = True
    for row, where in _json_files(path) if is_json_folder(path) else rows_of(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: this is {kind_of(row)}, but must be an object.")
        empty = False
        yield row, where
    if empty:
        raise InputError(f"{path}: the file is empty: it needs one JSON object a line.")


def two_sides(
    task: str,
    read: Callable[[Path, int | None], list[dict]],
    path: str,
    heldout_path: str | None,
    heldout_fraction: float | None,
    limit: int | None,
    seed: int,
) -> tuple[list[dict], list[dict]]:
    """(training, held out) by `read(path, limit)`: at most the first `limit` examples, and beside them those of another
    file, or in their place a share (default: a tenth) of their own prompts. All have the same columns, None where a
    line lacks one."""
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


def value_of(row: dict, column: str, where: str) -> object:
    """Whatever is there."""
    if column not in row:
        raise InputError(f"{where}: there is no {column!r}, only {', '.join(row) or 'nothing'}.")
    return row[column]


def text_of(row: dict, column: str, where: str) -> str:
    """A text that is there and holds something."""
    text = value_of(row, column, where)
    if not isinstance(text, str):
        raise InputError(f"{where}: {column!r} is {kind_of(text)}, but must be a text.")
    return filled(text, column, where)


def text_or_none(row: dict, column: str, where: str) -> str:
    """A text, "" where it is not there or null."""
    return "" if row.get(column) in (None, "") else text_of(row, column, where)


def texts_of(row: dict, column: str, where: str) -> list[str]:
    """A list of texts, [] where it is not there or null."""
    texts = [] if row.get(column) is None else row[column]
    if not isinstance(texts, list):
        raise InputError(f"{where}: {column!r} is {kind_of(texts)}, but must be a list of texts.")
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise InputError(f"{where}: {column!r} holds {kind_of(wrong[0])}, but must be a list of texts.")
    return texts


def filled(text: str, column: str, where: str) -> str:
    """The text, unless it is empty or cannot be encoded."""
    if not text.strip():
        raise InputError(f"{where}: {column!r} is empty: write something.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {column!r} holds half of a surrogate pair ({error}): correct the text.") from error
    return text


def _json_files(folder: Path) -> Iterator[tuple[object, str]]:
    for file in sorted(folder.rglob("*.json")):
        if file.is_file():
            yield parse_json(file.read_bytes(), str(file), "each file must be one object"), str(file)


def _warn_of_overlap(train: list[dict], heldout: list[dict], heldout_path: str) -> None:
    shared = set(map(prompt_key, train)) & set(map(prompt_key, heldout))
    if shared:
        warnings.warn(f"{heldout_path}: {len(shared)} of its prompts are in the training file too.", stacklevel=4)


def _fill(examples: list[dict]) -> None:
    names = list(dict.fromkeys(name for example in examples for name in example))
    for example in examples:
        for name in names:
            example.setdefault(name, None)
