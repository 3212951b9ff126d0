"""Rows of tables: Parquet files, folders of data files or of a saved data set, and data sets of the Hugging Face hub.

    data.parquet    folder[:split]    owner/name[:config][:split]

Without a split it is "train" where there are several. pyarrow reads files and folders, datasets reads the hub; both are
optional and imported only here.
"""

import re
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path

from minirl.errors import InputError
from minirl.files import json_values, parse_json, read_bounded, read_json

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # words that name a split in a file's path
FILES = (".parquet", ".jsonl", ".jsonl.gz")
SAVED = ("dataset_dict.json", "state.json")  # of a folder that the datasets library saved
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


def is_table(path: str | Path) -> bool:
    """Return whether the path names a table and no JSON file."""
    path = str(path)
    folder = Path(path).is_dir() or (not Path(path).exists() and Path(path.partition(":")[0]).is_dir())
    return path.endswith(".parquet") or folder or is_hub_name(path)


def is_hub_name(path: str) -> bool:
    """Tell whether a path is owner/name, with a config and a split at most, and no file or folder here."""
    if not HUB_NAME.fullmatch(path) or path.removesuffix(".gz").endswith((".json", ".jsonl", ".parquet")):
        return False
    return not Path(path).exists() and not Path(path.split("/")[0]).is_dir()


def rows_of(path: str | Path) -> Iterator[tuple[object, str]]:
    """Yield each row of a table as plain JSON values, or what a JSON file holds (see `json_values`), and its place; of
    a folder of .json files what each of them holds."""
    name, *rest = str(path).split(":")
    if not is_table(path):
        if not Path(path).exists():
            choices = "a file (JSONL, a .json list, Parquet), a folder, or the name of a data set"
            raise InputError(f"{path}: there is no such file: give {choices}.")
        yield from json_values(path)
    elif is_hub_name(str(path)):
        yield from _hub_rows(str(path), name, rest)
    elif files := _json_files(Path(path)):
        for file in files:
            yield parse_json(read_bounded(file), str(file), "each file must be one object"), str(file)
    elif Path(name).is_dir():
        for file in data_files(Path(name), rest[0] if rest else None):
            yield from json_values(file) if ".jsonl" in file.name else _arrow_rows(file)
    else:
        yield from _arrow_rows(Path(path))


def _json_files(folder: Path) -> list[Path]:
    """List the .json files of a folder that holds an object in each, and no table."""
    tables = any((folder / name).is_file() for name in SAVED) or any(any(folder.rglob(f"*{kind}")) for kind in FILES)
    return [] if tables else sorted(file for file in folder.rglob("*.json") if file.is_file())


def data_files(folder: Path, split: str | None = None) -> list[Path]:
    """List the files of a split: those that a saved data set lists, else all .parquet or all .jsonl files below the
    folder whose path has the split's name, or no such word at all where none is asked for."""
    splits, state = (folder / name for name in SAVED)
    if splits.is_file():
        return data_files(folder / _chosen(read_json(splits).get("splits", []), split, folder))
    if state.is_file():
        return [folder / entry["filename"] for entry in read_json(state)["_data_files"]]
    kinds = [sorted(file for file in folder.rglob(f"*{kind}") if file.is_file()) for kind in FILES]
    files = kinds[0] or sorted(kinds[1] + kinds[2])
    if not files:
        raise InputError(f"{folder}: there is no such file, but a folder that holds no .parquet, .jsonl or .json file")
    named = {file: _split_of(file.relative_to(folder), split) for file in files}
    found = list(dict.fromkeys(name for name in named.values() if name))
    if not found and split is None:
        return files
    wanted = _chosen(found, split, folder)
    return [file for file in files if named[file] == wanted]


def _split_of(file: Path, asked: str | None) -> str | None:
    words = re.split(r"[^a-zA-Z0-9]+", str(file)) + ([asked] if asked and asked in str(file) else [])
    return next((word for word in words[::-1] if word in (*SPLITS, asked)), None)


def _chosen(splits: list[str], split: str | None, where: str | Path) -> str:
    """Choose the split that is asked for, else the only one, else "train"."""
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        raise InputError(f"{where}: it has no split {wanted!r}: write PATH:SPLIT with one of {', '.join(splits)}")
    return wanted


def _arrow_rows(file: Path) -> Iterator[tuple[dict, str]]:
    """Yield the rows of a .parquet file, or of an .arrow file as a saved data set has them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file} needs pyarrow to be read: pip install 'minirl[parquet]'") from None
    number = 0
    try:
        reader = pyarrow.ipc.open_stream(file) if file.suffix == ".arrow" else parquet.ParquetFile(file).iter_batches()
        for batch in reader:
            for row in batch.to_pylist():
                number += 1
                yield _plain_row(row, f"{file}, row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{file} cannot be read ({reason}): check the path, and that the file is whole") from None


def _hub_rows(path: str, name: str, rest: list[str]) -> Iterator[tuple[dict, str]]:
    """Yield rows of a data set on the hub. One part behind its name is a split, two are a config and a split."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{path}: there is no such file, and reading it as a data set of the hub needs datasets: "
            "pip install 'minirl[datasets]'"
        ) from None
    config, split = rest if len(rest) == 2 else (None, rest[0] if rest else None)
    try:
        found = (
            datasets.load_dataset(name, config) if split is None else datasets.load_dataset(name, config, split=split)
        )
    except Exception as error:  # the library raises many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: there is no such file, and the hub's data set cannot be read ({reason}): write "
            "OWNER/NAME[:CONFIG][:SPLIT]"
        ) from None
    table = found[_chosen(list(found), None, path)] if isinstance(found, dict) else found
    for number, row in enumerate(table, 1):
        yield _plain_row(row, f"{path}, row {number}")


def _plain_row(row: dict, where: str) -> tuple[dict, str]:
    return {name: _plain(value, name, where) for name, value in row.items()}, where


def _plain(value: object, name: str, where: str) -> object:
    """Turn a value into one of JSON. Keys of an object that are null are left out: Arrow gives all rows the same
    keys."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_plain(entry, name, where) for entry in value]
        case dict():
            return {key: _plain(entry, name, where) for key, entry in value.items() if entry is not None}
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _plain(value.tolist(), name, where)
    known = "only texts, numbers, lists and objects can be read"
    raise InputError(f"{where}: column {name!r} holds {type(value).__name__}, and {known}: leave the column out")
