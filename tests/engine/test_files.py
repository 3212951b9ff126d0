"""Files of strangers are read within bounds: sizes, depth, devices, pipes, packed files."""

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest

from minirl import files
from minirl.errors import InputError
from minirl.files import json_values, parse_json, read_bounded, read_json


def values(path: str | Path) -> list:
    return [value for value, _ in json_values(path)]


def refusal(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    return str(caught.value)


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[]", " [ ] \n", "[1]", '[1,2 , {"a": [3]}\n,\n"x"]\n', '["é", "\\ud83d", -1.5e3, null, true]', "[[[]], {}]"],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_a_list_is_read_by_entries_wherever_its_pieces_end(text, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert values(tmp_path / "x.json") == json.loads(text)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(text.encode()))
    assert values(tmp_path / "x.json.gz") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1", "it has no end: line 1"),
        ("[1,\n2,", "Expecting value: line 2"),
        ("[1 2]", "Expecting ',' delimiter: line 1"),
        ("[1,]", "Expecting value: line 1"),
        ("[1] x", "Extra data behind the list"),
        ("[\n1,\n2,\n}", "Expecting value: line 4"),
        ("[" * 5000, "recursion"),
        ("[" + "9" * 5000 + "]", "4300 digits"),
        ('["é', "Unterminated string"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_list_that_is_none(text, words, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert words in refusal(values, tmp_path / "x.json")


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b'["\xff"]')
    assert "UTF-8" in refusal(values, tmp_path / "x.json")


# --- what is too much ------------------------------------------------------------------------------------------------


def test_digits_and_depth():
    assert "4300 digits" in refusal(parse_json, b"9" * 5000, "here", "correct it")
    assert parse_json(b"[" * 100 + b"]" * 100, "here", "correct it")
    assert "deeper than 100 levels" in refusal(parse_json, b"[" * 101 + b"]" * 101, "here", "correct it")
    assert "deeper than 100 levels" in refusal(parse_json, b'{"a":' * 101 + b"1" + b"}" * 101, "here", "correct it")
    assert parse_json(b'["' + b"[" * 200 + b'"]', "here", "correct it")  # brackets in a text are none


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_line_or_an_entry_has_a_largest_size(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1000)
    monkeypatch.setattr(files, "CHUNK", 100)
    start, end = ("[", "]") if name == "x.json" else ("", "")
    fine = json.dumps({"a": "b" * 980})
    (tmp_path / name).write_text(start + f"{', ' if start else ''}\n".join([fine] * 5) + end)
    assert len(values(tmp_path / name)) == 5
    (tmp_path / name).write_text(start + json.dumps({"a": "b" * 5000}) + end)
    assert "it has more than" in refusal(values, tmp_path / name)


def test_values_are_counted_before_they_are_made(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "MOST_VALUES", 100)
    assert len(parse_json(b"[" + b"1," * 98 + b"1]", "here", "")) == 99
    assert "more than 100 values" in refusal(parse_json, b"[" + b"[]," * 200 + b"1]", "here", "")
    (tmp_path / "x.json").write_text("[[" + "[]," * 200 + "1]]")
    monkeypatch.setattr(files, "CHUNK", 10)
    assert "more than 100 values" in refusal(values, tmp_path / "x.json")


def test_a_config_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1000)
    (tmp_path / "config.json").write_text(json.dumps({"a": "b" * 900}))
    assert read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"a": "b" * 9000}))
    assert "too many for a file of its kind" in refusal(read_json, tmp_path / "config.json")


PIECES = {"zeros": b"\0" * (1 << 20), "blank lines": b"\n" * (1 << 20), "rows": b'{"text": "a"}\n' * 70_000}


@pytest.mark.parametrize("what", PIECES)
def test_a_small_file_that_unpacks_to_a_large_one(what, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNPACKED", 1 << 18)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        for _ in range(2):
            file.write(PIECES[what])
    assert "more than 200 times its size" in refusal(values, tmp_path / "x.jsonl.gz")


def test_a_packed_file_of_ordinary_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNPACKED", 1 << 18)
    rows = [{"prompt": f"{i} + {i * 7919 % 1000} =", "answer": i} for i in range(20_000)]
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert values(tmp_path / "x.jsonl.gz") == rows


# --- devices and pipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [values, read_json, read_bounded])
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_a_device_is_no_file(reader, device):
    assert "is a device" in refusal(reader, device)


def test_a_pipe_without_a_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    assert "into which nobody writes" in refusal(values, tmp_path / "pipe")
    assert "into which nobody writes" in refusal(read_json, tmp_path / "pipe")


@pytest.mark.parametrize("before, within", [(0.3, 0), (0, 0.6)], ids=["late", "slow"])
def test_a_pipe_with_a_writer_that_comes_late_or_is_slow(before, within, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 30 if before else 0.1)
    os.mkfifo(tmp_path / "pipe")
    there = threading.Event()

    def write():
        time.sleep(before)
        there.set()
        with (tmp_path / "pipe").open("wb") as file:  # waits for the reader
            time.sleep(within)
            file.write(b'{"a": 1}\n{"a": 2}')

    writer = threading.Thread(target=write)
    writer.start()
    if within:  # the writer must be there before the reader loses its patience
        reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        there.wait()
        time.sleep(0.1)
    assert values(tmp_path / "pipe") == [{"a": 1}, {"a": 2}]
    writer.join()
    if within:
        os.close(reading)


def test_a_pipe_that_is_whole_already_and_standard_input(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, gzip.compress(b'{"a": 1}\n'))
    os.close(writing)
    assert values(f"/dev/fd/{reading}") == [{"a": 1}]
    os.close(reading)


def test_links_in_a_circle_and_folders(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "x")
    assert "cannot be read" in refusal(read_json, tmp_path / "x")
    assert "cannot be read" in refusal(values, tmp_path / "x")
    assert "cannot be read (Is a directory)" in refusal(read_json, tmp_path)
