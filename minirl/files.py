"""Write files so that a reader sees the old content or the new, never half of it, and read those of strangers within
bounds: a file, a line and what is made of them have a largest size, and no device or idle pipe holds the reader up."""

import codecs
import fcntl
import gzip
import json
import os
import re
import secrets
import select
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader, RawIOBase
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from minirl.errors import InputError

LARGEST = 64 << 20  # bytes of a config, a line or an entry of a list; the largest tokenizer.json have 35 MB
MOST_VALUES = 4_000_000  # in one of them; an empty list takes 2 bytes in a file, and 64 in memory
DEEPEST = 100  # lists and objects within one another: what is deeper ends in the recursion limit of some later step
PATIENCE = 3.0  # seconds for somebody to begin to write into a pipe
CHUNK = 1 << 20  # bytes that are read at a time
UNPACKED, RATIO = 4 << 20, 200  # bytes that any .gz may hold; how many for one of its own where it holds more
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON


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
    with _reserved(path, is_folder=False) as staging:
        write(staging)
        os.chmod(staging, 0o644)
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON. Half of a surrogate pair has no UTF-8; as a backslash and its code it is JSON again."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda staging: staging.write_bytes(text.encode("utf-8", "backslashreplace")))


def write_jsonl(path: str | Path, records: Sequence[dict]) -> None:
    """Write one object a line."""
    content = b"".join(map(json_line, records))
    write_atomic(path, lambda staging: staging.write_bytes(content))


def json_line(record: dict) -> bytes:
    """Return an object as a line; half of a surrogate pair is written as in `write_json`."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill the folder that is handed out; at the end it takes the place of `path`, whole, or on an exception
    vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _reserved(path, is_folder=True) as staging:
        yield staging
        os.chmod(staging, 0o755)
        for file in staging.rglob("*"):
            os.chmod(file, 0o755 if file.is_dir() else 0o644)  # safetensors writes its files for their owner alone
            _sync(file)
        if path.exists():
            remove_folder(path)
        os.rename(staging, path)
        _sync(path.parent)


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


def open_to_read(path: str | Path) -> BinaryIO:
    """Open a file, or a pipe that somebody writes into. InputError for a device, which may never end, and for a pipe
    without a writer, which would be waited for."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISFIFO(mode):
            _await_writer(file.fileno(), path)
        elif not stat.S_ISREG(mode) and not file.isatty():
            raise InputError(f"{path} is a device, which may never end: give a file or a pipe")
        os.set_blocking(file.fileno(), True)
    except BaseException:
        file.close()
        raise
    return file


def _await_writer(fd: int, path: str | Path) -> None:
    """Wait a little for a pipe's first writer; one that is there may take its time."""
    try:  # a hang-up is reported only after a writer was there, so be one
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return
    waiting, end = select.poll(), time.monotonic() + PATIENCE
    waiting.register(fd, select.POLLIN)
    while waiting.poll(0) == [(fd, select.POLLHUP)]:  # nobody writes, and nothing is left to read
        if time.monotonic() > end:
            raise InputError(f"{path} is a pipe into which nobody writes: start its writer, or give a file")
        time.sleep(0.02)


def read_bounded(path: str | Path) -> bytes:
    """Read a file or pipe of at most LARGEST bytes; InputError for a larger one."""
    with open_to_read(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise InputError(
            f"{path} has more than {LARGEST >> 20} MB, too many for a file of its kind: is it the right one?"
        )
    return content


def read_json(path: str | Path) -> dict:
    """Read a JSON object from a file; an InputError names the file, and the line if its content is broken."""
    path = Path(path)
    try:
        text = read_bounded(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is {path.parent} a complete folder?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    content = parse_json(text, str(path), "restore the file or download it again")
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
        with open_to_read(path) as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            lines = BufferedReader(_Unpacked(file, path), 1 << 16) if packed else file
            is_json, number = path.name.removesuffix(".gz").endswith(".json"), 0
            while line := lines.readline(LARGEST + 1):  # a line ends with \n alone: a text may hold other ends
                number += 1
                line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).lstrip()
                is_list = line.startswith(b"[")
                if is_list and is_json:
                    yield from _entries(line[1:], lines, path, number)
                    return
                if not line:
                    continue
                where, first = f"{path}, line {number}", is_list and number == 1
                hint = "; a file that is a list needs a name that ends in .json" * first
                value = parse_json(line.rstrip(), where, f"write one object a line, in UTF-8{hint}")
                if is_list:
                    raise InputError(f"{where}: this is a list, but must be an object{hint}")
                yield value, where
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): check the path, and that the file is whole") from None


class _Unpacked(RawIOBase):
    """The content of a .gz file; an InputError where it is out of proportion: 2 MB can unpack to 2 GB."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.content, self.held = file, path, gzip.GzipFile(fileobj=file), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.content.readinto(buffer)
        self.held += count
        if self.held > UNPACKED and self.file.seekable() and self.held > RATIO * self.file.tell():
            raise InputError(f"{self.path} holds more than {RATIO} times its size: if it is right, unpack it (gunzip)")
        return count


def _entries(begun: bytes, file: BinaryIO, path: Path, line: int) -> Iterator[tuple[object, str]]:
    """Yield the entries of a list and their places. What follows its bracket begins with `begun`, in this line, and
    goes on in a file, of which no more is held than an entry and a chunk."""
    decoder, scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    chunks = chain((begun[i : i + CHUNK] for i in range(0, len(begun), CHUNK)), iter(lambda: file.read(CHUNK), b""))
    text, at, number, ended = "", 0, 0, False
    while True:
        try:
            start = SPACE.match(text, at).end()
            if number == 0 and text[start] == "]":
                break
            value, end = scan(text, start)
            end = SPACE.match(text, end).end()
            if text[end] not in ",]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except (ValueError, IndexError, RecursionError) as error:  # perhaps the entry is not whole yet
            if ended or isinstance(error, RecursionError):
                line += text.count("\n", 0, getattr(error, "pos", 0))
                why = "it has no end" if isinstance(error, IndexError) else getattr(error, "msg", error)
                raise InputError(f"{path}: not valid JSON ({why}: line {line}): correct the file") from None
            line, text, at = line + text.count("\n", 0, at), text[at:], 0
            refuse_large(text, f"{path}, entry {number + 1}")
            more = []
            while not ended and sum(map(len, more)) < len(text) + 1:
                ended = not (chunk := next(chunks, b""))
                try:
                    more.append(decoder.decode(chunk, final=ended))
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}: not valid JSON ({error}): write it in UTF-8") from None
            text += "".join(more)
            continue
        number += 1
        where = f"{path}, entry {number}"
        refuse_deep(value, where, text.count("[", start, end) + text.count("{", start, end))
        yield value, where
        at = end + 1
        if text[end] == "]":
            break
    if text[max(at, start + 1) :].strip() or next(chunks, b"").strip():
        raise InputError(f"{path}: not valid JSON (Extra data behind the list): correct the file")


def refuse_large(text: bytes | str, where: str) -> None:
    """Refuse a JSON text that would take more memory than any honest one."""
    if len(text) > LARGEST:
        raise InputError(f"{where}: it has more than {LARGEST >> 20} MB: is this the right file?")
    marks = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if len(text) > MOST_VALUES and sum(map(text.count, marks)) > MOST_VALUES:
        raise InputError(f"{where}: it holds more than {MOST_VALUES:,} values: is this the right file?")


def refuse_deep(value: object, where: str, brackets: int) -> None:
    """Refuse a value of lists and objects within one another, of which there are so many in all, that is too deep."""
    level, depth = [value] if brackets > DEEPEST else [], 0
    while level and depth < DEEPEST:
        depth += 1
        below = (x.values() if type(x) is dict else x for x in level if type(x) in (dict, list))
        level = [x for inner in below for x in inner]
    if level:
        raise InputError(f"{where}: not valid JSON for minirl: it is nested deeper than {DEEPEST} levels")


def parse_json(text: bytes | str, where: str, advice: str) -> object:
    """Parse a JSON text; InputError says where and what to do if it is none, too large or too deep."""
    refuse_large(text, where)
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}): {advice}") from None
    refuse_deep(value, where, text.count("[") + text.count("{"))
    return value


@contextmanager
def _reserved(path: Path, is_folder: bool) -> Iterator[Path]:
    """Make a file or folder beside `path` to write it in, which is gone at the end unless it took its place. It is
    locked until then: one that nobody locks was left by a process that was killed, and is removed."""
    prefix, lock = f".{path.name}-", None
    clear_left(path)
    while lock is None:
        if is_folder:
            staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
        else:
            fd, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
            os.close(fd)
            staging = Path(name)
        try:
            lock = _locked(staging)
        except FileNotFoundError:  # somebody took it for left before it was locked
            continue
        except OSError:  # a file system without locks: nobody can take it for left
            lock = os.open(staging, os.O_RDONLY)
    try:
        yield staging
    finally:
        _remove(staging, is_folder)
        os.close(lock)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves nothing half under its name: `clear_left` finds what it leaves."""
    gone = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    os.rename(path, gone)
    shutil.rmtree(gone)


def clear_left(path: Path) -> None:
    """Remove what writes of `path` have left beside it that were killed. In its name, `*` stands for digits."""
    name = re.escape(path.name).replace(r"\*", "[0-9]+(-update-[0-9]+)?")
    for left in path.parent.glob(".*") if path.parent.is_dir() else ():
        if re.fullmatch(rf"\.{name}-[a-z0-9_]{{8}}", left.name):
            with suppress(OSError):  # such as that it is locked
                lock = _locked(left, fcntl.LOCK_NB)
                try:
                    _remove(left, left.is_dir())
                finally:
                    os.close(lock)


def _locked(path: Path, flags: int = 0) -> int:
    """Return a descriptor that holds a lock on a file or folder that is still there until it is closed."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        os.stat(path)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove(path: Path, is_folder: bool) -> None:
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
