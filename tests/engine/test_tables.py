"""Tables as data: Parquet files, folders, saved data sets and names of the hub, with the same rows as JSONL."""

import json
import sys
from datetime import date, datetime
from decimal import Decimal
from types import ModuleType

import pytest

from minirl.errors import InputError
from minirl.lab.tasks import load_task, parse_task
from minirl.records import read_demonstrations
from minirl.tables import is_hub_name, rows_of

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = [
    {"messages": [Q, A | {"tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}], "source": "x"},
    {"messages": [Q, A], "source": None},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_parquet(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def save_to_disk(folder, rows, shards: int = 2) -> None:
    """As the datasets library lays a data set out."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    table = pyarrow.Table.from_pylist(rows)
    for i, name in enumerate(names):
        part = table.slice(i * len(rows) // shards, (i + 1) * len(rows) // shards - i * len(rows) // shards)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_parquet_file_gives_the_records_of_its_rows_in_jsonl(folder):
    write_parquet(folder / "data.parquet", ROWS)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_table, of_lines = (read_demonstrations(f"data.{kind}") for kind in ("parquet", "jsonl"))
    assert [record["where"] for record in of_table] == ["data.parquet, row 1", "data.parquet, row 2"]
    assert [record | {"where": 0} for record in of_table] == [record | {"where": 0} for record in of_lines]
    assert "tool_calls" not in of_table[1]["messages"][1]  # a template would ask whether it is there


def test_values_are_those_of_json(folder):
    values = {"day": date(2026, 1, 2), "time": datetime(2026, 1, 2, 3, 4), "n": Decimal("7.00"), "x": Decimal("0.5")}
    write_parquet(folder / "data.parquet", [values | {"f": 1.5, "list": [1, 2], "none": None, "yes": True}])
    [(row, _)] = rows_of("data.parquet")
    dates = {"day": "2026-01-02", "time": "2026-01-02T03:04:00"}
    assert row == {**dates, "n": 7, "x": 0.5, "f": 1.5, "list": [1, 2], "none": None, "yes": True}
    assert type(row["n"]) is int and json.loads(json.dumps(row)) == row
    write_parquet(folder / "data.parquet", [{"prompt": "q", "image": b"x"}])
    with pytest.raises(InputError, match=r"data.parquet, row 1: column 'image' holds bytes, .*: leave the column out"):
        list(rows_of("data.parquet"))


def texts(path) -> list[str]:
    return [row["prompt"] for row, _ in rows_of(path)]


def prompts(*texts: str) -> list[dict]:
    return [{"prompt": text, "answer": "1"} for text in texts]


def test_a_folder_of_tables_has_the_splits_that_its_names_say(folder):
    write_parquet(folder / "data/train-00001-of-00002.parquet", prompts("c"))
    write_parquet(folder / "data/train-00000-of-00002.parquet", prompts("a", "b"))
    write_parquet(folder / "data/test-00000-of-00001.parquet", prompts("d"))
    assert texts("data") == texts("data:train") == ["a", "b", "c"] and texts("data:test") == ["d"]
    with pytest.raises(InputError, match="data: it has no split 'dev': write PATH:SPLIT with one of test, train"):
        texts("data:dev")
    task = parse_task("data:split=train,heldout_path=data:test")
    assert [[row["prompt"] for row in side] for side in (task.train, task.heldout)] == [["a", "b", "c"], ["d"]]
    (folder / "lines").mkdir()
    for name, text in (("b.jsonl", "y"), ("a.jsonl", "x")):
        (folder / "lines" / name).write_text(json.dumps({"prompt": text}))
    assert texts("lines") == ["x", "y"]
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty: there is no such file, but a folder that holds no"):
        texts("empty")


def test_a_saved_data_set_is_read_in_its_order(folder):
    save_to_disk(folder / "one", prompts("a", "b", "c"))
    assert texts("one") == ["a", "b", "c"]
    for split, text in (("train", "x"), ("test", "y")):
        save_to_disk(folder / "both" / split, prompts(text), shards=1)
    (folder / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts("both") == ["x"] and texts("both:test") == ["y"]
    assert [row["prompt"] for row in load_task("both", split="test", heldout_fraction=0).train] == ["y"]
    with pytest.raises(InputError, match="both: it has no split 'dev'"):
        texts("both:dev")


def test_a_broken_or_a_missing_table_is_named(folder):
    (folder / "data.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"data.parquet cannot be read \("):
        texts("data.parquet")
    with pytest.raises(InputError, match=r"none.parquet"):
        texts("none.parquet")


def test_a_missing_package_is_a_sentence_with_its_command(folder, monkeypatch):
    write_parquet(folder / "data.parquet", prompts("a"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"data.parquet needs pyarrow to be read: pip install 'minirl\[parquet\]'"):
        texts("data.parquet")
    with pytest.raises(InputError, match=r"owner/name: there is no such file, .*pip install 'minirl\[datasets\]'"):
        texts("owner/name")


@pytest.fixture
def hub(folder, monkeypatch):
    """A datasets library that knows one data set, and notes how it is asked."""
    asked, module = [], ModuleType("datasets")

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name != "owner/name":
            raise FileNotFoundError("Dataset 'x' doesn't exist on the Hub\nmore")
        splits = {"train": prompts("a", "b"), "test": prompts("c")}
        return splits if split is None else splits[split]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_of_the_hub_is_read_by_name_config_and_split(hub):
    assert texts("owner/name") == ["a", "b"] and texts("owner/name:test") == ["c"]
    assert texts("owner/name:main:test") == ["c"]
    assert hub == [("owner/name", None, None), ("owner/name", None, "test"), ("owner/name", "main", "test")]
    [(_, where), _] = rows_of("owner/name")
    assert where == "owner/name, row 1"
    task = parse_task("owner/name:config=main,split=train,heldout_path=owner/name:test")
    assert [len(task.train), len(task.heldout)] == [2, 1]
    assert hub[-2:] == [
        ("owner/name", "main", "train"),
        ("owner/name", None, "test"),
    ]
    with pytest.raises(InputError, match=r"^other/name: .* \(Dataset 'x' doesn't exist on the Hub\): write OWNER/NAME"):
        texts("other/name")


def test_what_is_here_is_no_name_of_the_hub(folder):
    (folder / "data").mkdir()
    names = ["data/x", "a/b.jsonl", "a/b.json.gz", "a/b.parquet", "a/b/c", "x.jsonl", "/a/b", "./a/b", "a/b:c:d:e"]
    assert not any(map(is_hub_name, names))
    assert all(map(is_hub_name, ["owner/name", "owner/name-2.1", "owner/name:test", "owner/name:main:test"]))
