"""Writing so that a reader sees the old content or the new, never half of it."""

import codecs
import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minirl.errors import InputError


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, sync it, and rename it into place; on any failure `path` stays
    as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(fd)
    staging = Path(name)
    try:
        write(staging)
        os.chmod(staging, 0o644)
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda staging: staging.write_text(text, encoding="utf-8"))


def write_jsonl(path: str | Path, records: Sequence[dict]) -> None:
    """Write one object a line. Half of a surrogate pair has no UTF-8; as a backslash and its code it is JSON again."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, lambda staging: staging.write_bytes(text.encode("utf-8", "backslashreplace")))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill the folder that is handed out; at the end it takes the place of `path`, whole, or on an exception
    vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield staging
        os.chmod(staging, 0o755)
        for file in staging.rglob("*"):
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        os.rename(staging, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_number(x: object) -> bool:
    """Return whether this is a finite number that fp32 can hold; JSON also has integers of any size, and Python counts
    True as one."""
    return isinstance(x, int | float) and not isinstance(x, bool) and -3e38 < x < 3e38


def kind_of(value: object) -> str:
    """Name the kind of a JSON value, for a sentence."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
    return "an object"


def read_json(path: str | Path) -> dict:
    """Read a JSON object from a file; an InputError names the file, and the line if its content is broken."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is {path.parent} a complete folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore the file or download it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {kind_of(content)} where a JSON object is needed: restore the file")
    return content


class Placed(dict):
    """An example that knows its place, "file, line n". The place is no column, and no part of what decides a run."""

    def __init__(self, content: dict, where: str):
        super().__init__(content)
        self.where = where


def place_of(example: dict, otherwise: str) -> str:
    """Name the place where an example was read, for a sentence; `otherwise` if it was made."""
    return getattr(example, "where", None) or otherwise


def contents(examples: Sequence[dict]) -> list[dict]:
    """Return the examples without their places ("where"), which decide nothing about a run."""
    return [{name: value for name, value in example.items() if name != "where"} for example in examples]


def read_jsonl(path: str | Path) -> list[dict]:
    """Read the values of a file (see `json_values`), at least one of them."""
    examples = [example for example, _ in json_values(path)]
    if not examples:
        raise InputError(f"{path} holds no examples: give at least one line")
    return examples


def json_values(path: str | Path) -> Iterator[tuple[object, str]]:
    """Yield what each line of a JSONL file holds and its place; blank lines are left out. Of a .json file that holds
    a list, its entries. Any file may be packed by gzip. InputError names the file, and the line that is no JSON, or a
    list where there are lines."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            lines = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            is_json = path.name.removesuffix(".gz").endswith(".json")
            for number, line in enumerate(lines, start=1):  # a line ends with \n alone: a text may hold other ends
                where, line = f"{path}, line {number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                is_list = line.lstrip().startswith(b"[")
                if is_list and is_json:
                    entries = parse_json(line + lines.read(), str(path), "correct the file")
                    yield from ((entry, f"{path}, entry {i}") for i, entry in enumerate(entries, start=1))
                    return
                if line.strip():
                    hint = "; a file that is a list needs a name that ends in .json" * (is_list and number == 1)
                    value = parse_json(line.rstrip(), where, f"write one object a line, in UTF-8{hint}")
                    if is_list:
                        raise InputError(f"{where}: this is a list, but must be an object{hint}")
                    yield value, where
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): check the path, and that the file is whole") from None


def parse_json(text: bytes, where: str, advice: str) -> object:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}): {advice}") from None
