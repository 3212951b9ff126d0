"""Checkpoints that are broken say so in one sentence, and a save that fails leaves what was there."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import full_logits, random_ids, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from minirl import checkpoint
from minirl.checkpoint import save_model
from minirl.errors import InputError
from minirl.model import Transformer
from minirl.model_config import parse_config

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(rope_scaling={"rope_type": "linear", "factor": 2.0}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of its own for a test to break."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


# --- a save and what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_is_read(tmp_path, scalar_head, tied, dtype):
    model = Transformer(tiny_config(tied=tied), scalar_head).initialise(1).to(dtype)
    save_model(model, tmp_path)
    again = Transformer.from_pretrained(tmp_path, scalar_head=scalar_head)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in again.named_parameters()]
    assert ("lm_head.weight" in names) == (not tied and not scalar_head) and ("score.weight" in names) == scalar_head
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and q.dtype == dtype and q.requires_grad
    assert again.config == model.config
    save_model(again, tmp_path / "again")
    assert files(tmp_path / "again")[WEIGHTS] == files(tmp_path)[WEIGHTS]


def test_keys_that_this_engine_does_not_read_are_written_back(folder):
    edit_config(
        folder, transformers_version="4.51.0", initializer_range=0.02, eos_token_id=[7, 9], torch_dtype="float16"
    )
    Transformer.from_pretrained(folder).bfloat16().save_pretrained(folder / "again")
    config = json.loads((folder / "again" / CONFIG).read_text())
    assert (config["initializer_range"], config["eos_token_id"]) == (0.02, [7, 9])
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_a_reward_model_starts_from_a_language_model_and_is_not_taken_for_one(folder):
    model = Transformer.from_pretrained(folder, scalar_head=True)
    assert model.lm_head is None and model.score.weight.shape == (1, 20) and not model.score.weight.any()
    save_model(model, folder / "reward")
    with pytest.raises(InputError, match=r"'score\.weight' has no place"):
        Transformer.from_pretrained(folder / "reward")


def test_reading_does_not_keep_the_file_mapped(folder):
    model = Transformer.from_pretrained(folder)
    before = [p.clone() for p in model.parameters()]
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert all(map(torch.equal, model.parameters(), before))


def test_tensors_of_several_dtypes_are_brought_to_that_of_the_embedding(folder):
    tensors = load_file(folder / WEIGHTS)
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, folder / WEIGHTS)
    model = Transformer.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full_logits(model, random_ids(5))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qkv_bias": True}, "qkv_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"windows": (5, None, 5)}, "windows"),
        ({"model_type": "mistral", "windows": (5, None, 5)}, "windows"),
        ({"model_type": "qwen3", "qk_norm": True, "windows": (5, 7, 5)}, "windows"),
        ({"rope_layers": (True, False, True)}, "rope_layers"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}, "rope_theta"),
    ],
)
def test_a_config_that_other_engines_would_read_otherwise_is_not_written(tmp_path, changes, named):
    with pytest.raises(InputError, match=named) as error:
        tiny_model(**changes).save_pretrained(tmp_path)
    one_sentence(error)
    assert not files(tmp_path)


def test_a_config_that_no_longer_fits_its_source_is_not_written(folder):
    config = replace(Transformer.from_pretrained(folder).config, rope_theta=123.0)
    with pytest.raises(InputError, match=r"rope_theta = 123\.0,.* source"):
        Transformer(config).save_pretrained(folder)


# --- a save that fails -----------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(folder, monkeypatch):
    before = files(folder)

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(seed=5).save_pretrained(folder)
    assert files(folder) == before
    with pytest.raises(OSError, match="No space left"):
        tiny_model(seed=5).save_pretrained(folder / "new")
    assert not files(folder / "new")


def test_a_save_leaves_two_files_that_others_may_read(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a" / "b")
    tiny_model(seed=1).save_pretrained(tmp_path / "a" / "b")
    assert sorted(files(tmp_path)) == [f"a/b/{CONFIG}", f"a/b/{WEIGHTS}"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "a" / "b").iterdir())


def test_a_save_over_shards_counts_even_if_it_was_killed_before_the_index_went(folder):
    model = tiny_model(seed=6, rope_scaling={"rope_type": "linear", "factor": 2.0})
    shard(folder)
    save_file(dict(model.named_parameters()), folder / WEIGHTS)
    assert torch.equal(Transformer.from_pretrained(folder).model.norm.weight, model.model.norm.weight)


# --- broken checkpoints ----------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, **changes) -> None:
    tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


def shard(folder: Path) -> None:
    """Cut the one weight file in two, with an index."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def break_index(folder: Path, change: Callable[[dict], object]) -> None:
    shard(folder)
    (folder / INDEX).write_text(json.dumps(change(json.loads((folder / INDEX).read_text()))))


def configured(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def with_tensor(name: str, tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, **{name: tensor})


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# what is broken: (how, what the message names)
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), (CONFIG, "does not exist")),
    "config is no JSON": (with_bytes(CONFIG, lambda text: text[:-9]), (CONFIG, "not valid JSON", "line")),
    "config is no text": (with_bytes(CONFIG, lambda _: b"\xff\xfe{"), (CONFIG, "not valid JSON")),
    "config is nested without end": (with_bytes(CONFIG, lambda _: b"[" * 100_000), (CONFIG, "not valid JSON")),
    "config is a list": (with_bytes(CONFIG, lambda _: b"[1]"), (CONFIG, "list")),
    "config is a folder": (lambda f: [(f / CONFIG).unlink(), (f / CONFIG).mkdir()], (CONFIG, "cannot be read")),
    "key missing": (configured(hidden_size=...), (CONFIG, "'hidden_size' is missing")),
    "key null": (configured(vocab_size=None), (CONFIG, "'vocab_size' is missing")),
    "size is text": (configured(num_hidden_layers="3"), (CONFIG, "'num_hidden_layers' is '3'")),
    "size is a fraction": (configured(intermediate_size=31.5), (CONFIG, "'intermediate_size' is 31.5")),
    "size is true": (configured(num_key_value_heads=True), (CONFIG, "'num_key_value_heads' is True")),
    "size is zero": (configured(num_attention_heads=0), (CONFIG, "'num_attention_heads' is 0")),
    "size has many digits": (
        with_bytes(CONFIG, lambda text: text.replace(b": 20,", b": " + b"9" * 5000 + b",")),
        (CONFIG,),
    ),
    "layers without end": (configured(num_hidden_layers=10**9), (CONFIG, "'num_hidden_layers' is 1000000000", "1,000")),
    "size overflows": (configured(vocab_size=2**40), (CONFIG, "'vocab_size'", "at most")),
    "product overflows": (
        configured(num_attention_heads=2**40, num_key_value_heads=1),
        (CONFIG, "num_attention_heads"),
    ),
    "size is negative": (configured(max_position_embeddings=-1), (CONFIG, "'max_position_embeddings' is -1")),
    "flag is text": (configured(tie_word_embeddings="false"), (CONFIG, "'tie_word_embeddings' is 'false'")),
    "epsilon is text": (configured(rms_norm_eps="tiny"), (CONFIG, "'rms_norm_eps' is 'tiny'")),
    "epsilon is a list": (configured(rms_norm_eps=[1e-6]), (CONFIG, "'rms_norm_eps' is [1e-06]")),
    "model_type missing": (configured(model_type=...), (CONFIG, "model_type None", "llama")),
    "model_type unknown": (configured(model_type="gpt2"), (CONFIG, "model_type 'gpt2'", "llama")),
    "model_type is a list": (configured(model_type=["llama"]), (CONFIG, "model_type ['llama']")),
    "activation unknown": (configured(hidden_act="gelu"), (CONFIG, "hidden_act 'gelu'")),
    "heads are no multiple": (
        configured(num_key_value_heads=4),
        (CONFIG, "num_attention_heads 6", "num_key_value_heads 4"),
    ),
    "width is no multiple": (
        configured(head_dim=..., hidden_size=21),
        (CONFIG, "hidden_size 21", "num_attention_heads 6"),
    ),
    "head_dim is odd": (configured(head_dim=15), (CONFIG, "head_dim 15")),
    "rope_theta is zero": (configured(rope_theta=0), (CONFIG, "'rope_theta' is 0")),
    "rope_theta is infinite": (configured(rope_theta=float("inf")), (CONFIG, "'rope_theta' is inf")),
    "rope_scaling is text": (configured(rope_scaling="linear"), (CONFIG, "'rope_scaling' is 'linear'")),
    "rope_type unknown": (configured(rope_scaling={"rope_type": "su"}), (CONFIG, "rope_type 'su'", "yarn")),
    "rope_type is a list": (configured(rope_scaling={"rope_type": []}), (CONFIG, "rope_type []")),
    "linear without factor": (
        configured(rope_scaling={"type": "linear"}),
        (CONFIG, "rope_scaling", "'factor' is missing"),
    ),
    "factor is text": (configured(rope_scaling={"type": "yarn", "factor": "4"}), (CONFIG, "'factor' is '4'")),
    "factor is zero": (
        configured(rope_parameters={"rope_type": "yarn", "factor": 0}),
        (CONFIG, "rope_parameters", "'factor' is 0"),
    ),
    "llama3 without its length": (
        configured(rope_scaling=SCALING),
        (CONFIG, "'original_max_position_embeddings' is missing"),
    ),
    "yarn option is text": (
        configured(rope_scaling={"type": "yarn", "factor": 4, "beta_fast": "32"}),
        (CONFIG, "'beta_fast' is '32'"),
    ),
    "window is zero": (configured(model_type="mistral", sliding_window=0), (CONFIG, "'sliding_window' is 0")),
    "too few layer_types": (
        configured(model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=["full_attention"]),
        (CONFIG, "'layer_types'", "3 layers"),
    ),
    "layer_types unknown": (
        configured(
            model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=["chunked_attention"] * 3
        ),
        (CONFIG, "'layer_types'", "sliding_attention"),
    ),
    "too few no_rope_layers": (configured(model_type="smollm3", no_rope_layers=[1, 0]), (CONFIG, "'no_rope_layers'")),
    "tensor missing": (with_tensor(Q_PROJ, None), (Q_PROJ, "missing")),
    "embedding missing": (with_tensor("model.embed_tokens.weight", None), ("model.embed_tokens.weight", "missing")),
    "every tensor missing": (lambda f: save_file({}, f / WEIGHTS), ("model.embed_tokens.weight", "missing", "more")),
    "tensor too many": (with_tensor("model.layers.3.x", torch.zeros(2)), (WEIGHTS, "'model.layers.3.x'", CONFIG)),
    "tensor misshapen": (with_tensor(Q_PROJ, torch.zeros(84, 19)), (WEIGHTS, Q_PROJ, "[84, 19]", "[84, 20]")),
    "tensor of integers": (with_tensor(Q_PROJ, torch.zeros(84, 20, dtype=torch.int32)), (WEIGHTS, Q_PROJ, "int32")),
    "head differs from its tie": (configured(tie_word_embeddings=True), ("lm_head.weight", "tie_word_embeddings")),
    "weights truncated": (with_bytes(WEIGHTS, lambda data: data[:-100]), (WEIGHTS, "truncated")),
    "weights cut in the header": (with_bytes(WEIGHTS, lambda data: data[:50]), (WEIGHTS, "truncated")),
    "weights are empty": (with_bytes(WEIGHTS, lambda _: b""), (WEIGHTS, "truncated")),
    "weights are garbage": (with_bytes(WEIGHTS, lambda data: bytes(range(256)) * 99), (WEIGHTS, "truncated")),
    "weights are an error page": (with_bytes(WEIGHTS, lambda _: b"<html>not found</html>"), (WEIGHTS, "truncated")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), (str("holds no " + WEIGHTS),)),
    "pickled weights alone": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        (WEIGHTS, "pickled weights are never loaded"),
    ),
    "shard missing": (
        lambda f: [shard(f), (f / "model-00002-of-00002.safetensors").unlink()],
        ("model-00002-of-00002", INDEX),
    ),
    "shard lacks a tensor": (
        lambda f: break_index(
            f, lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "model-00001-of-00002.safetensors")}
        ),
        ("model-00001-of-00002", "missing although"),
    ),
    "index lacks a tensor": (
        lambda f: break_index(f, lambda i: {"weight_map": {k: v for k, v in i["weight_map"].items() if k != Q_PROJ}}),
        (Q_PROJ, "missing"),
    ),
    "index without weight_map": (lambda f: break_index(f, lambda i: {"metadata": {}}), (INDEX, "weight_map")),
    "weight_map is a list": (lambda f: break_index(f, lambda i: {"weight_map": [1]}), (INDEX, "weight_map")),
    "weight_map to numbers": (lambda f: break_index(f, lambda i: {"weight_map": {Q_PROJ: 1}}), (INDEX, "weight_map")),
    "index is no JSON": (lambda f: [shard(f), (f / INDEX).write_text("{")], (INDEX, "not valid JSON")),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_sentence_that_names_the_file_and_the_key(folder, what):
    damage, named = BROKEN[what]
    damage(folder)
    with pytest.raises(InputError) as error:
        Transformer.from_pretrained(folder)
    message = one_sentence(error)
    assert all(word in message for word in (str(folder), *named)), message


def test_the_broken_checkpoints_were_whole_before(folder):
    full_logits(Transformer.from_pretrained(folder), random_ids(5))
    shard(folder)
    full_logits(Transformer.from_pretrained(folder), random_ids(5))


def test_a_shard_is_looked_for_in_the_folder_alone(folder):
    """An index from elsewhere must not make us read files outside."""
    break_index(folder, lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "../../etc/secret.safetensors")})
    with pytest.raises(InputError, match=re.escape(str(folder / "secret.safetensors"))):
        Transformer.from_pretrained(folder)


def test_a_path_that_is_no_folder_is_one_sentence(folder, tmp_path):
    with pytest.raises(InputError, match="is a file: give the directory") as error:
        Transformer.from_pretrained(folder / CONFIG)
    assert str(folder / CONFIG) in one_sentence(error)
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere", "~/no/where", "a/b/c"):
        with pytest.raises(InputError, match="does not exist") as error:
            Transformer.from_pretrained(missing)
        assert str(missing) in one_sentence(error)


def test_a_hub_id_needs_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"some/model .* huggingface_hub: pip install") as error:
        Transformer.from_pretrained("some/model")
    one_sentence(error)


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(repo, **options):
        assert options["allow_patterns"] == ["*.json", "*.safetensors", "*.jinja"]  # no code, no pickles
        raise OSError("no network\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"some/model .* \(no network\)") as error:
        Transformer.from_pretrained("some/model")
    one_sentence(error)


def test_a_config_is_read_in_all_the_spellings_of_its_rotary_embedding():
    base = {
        "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    for spelling in (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}},
    ):
        frequency = Transformer(parse_config(base | spelling)).rope_frequency
        torch.testing.assert_close(frequency, torch.tensor([0.5, 0.5 * 5e5**-0.5]))
    for spelling in ({}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_parameters": {"rope_type": "default"}}):
        assert parse_config(base | spelling).rope_scaling is None
