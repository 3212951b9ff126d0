"""A folder that holds something else than a checkpoint is named for what it is."""

import json
import sys

import pytest
from helpers import tiny_checkpoint

from minirl import __main__ as program
from minirl import __version__
from minirl.errors import InputError
from minirl.model import Transformer

BITS = {"bits": 4, "group_size": 64}
CONFIGS = {  # what config.json says more -> words of the sentence
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", **BITS}}, "GPTQ to 4 bits"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", **BITS}}, "AWQ to 4 bits"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}},
        "bitsandbytes to 4 bits",
    ),
    "8-bit bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "bitsandbytes to 8 bits",
    ),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantised by fp8"),
    "MLX": ({"quantization": BITS}, "MLX to 4 bits"),
    "a newer MLX": ({"quantization": BITS, "quantization_config": BITS}, "MLX to 4 bits"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantised_weights_are_named_with_their_method(kind, tmp_path):
    more, words = CONFIGS[kind]
    folder = tiny_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(InputError, match=words) as error:
        Transformer.from_pretrained(folder)
    assert str(folder) in str(error.value) and "take the checkpoint that it was made from" in str(error.value)


FILES = {
    "GGUF alone": ("smollm2.Q4_K_M.gguf", ["GGUF", "examples/gguf_to_hf.py"]),
    "pickles": ("pytorch_model-00001-of-00002.bin", ["pickled", "convert them to safetensors"]),
    "Llama's own": ("consolidated.00.pth", ["pickled", "version for transformers"]),
    "Mistral's own": ("consolidated.safetensors", ["names of tensors", "version for transformers"]),
    "ONNX": ("model.onnx", ["ONNX"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_in_another_format_alone_are_named(kind, tmp_path):
    name, words = FILES[kind]
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"holds no model.safetensors") as error:
        Transformer.from_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_gguf_file_is_no_directory(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"is a file: make a directory of it as examples/gguf_to_hf.py"):
        Transformer.from_pretrained(tmp_path / "m.gguf")


def test_a_gguf_repository_of_the_hub_is_named_though_its_weights_are_not_fetched(tmp_path):
    (tmp_path / "models--someone--Small-GGUF").mkdir()
    with pytest.raises(InputError, match=r"GGUF weights.*gguf_to_hf"):
        Transformer.from_pretrained(tmp_path / "models--someone--Small-GGUF")


def test_gguf_files_beside_a_whole_checkpoint_do_no_harm(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model-gguf")
    (folder / "m.gguf").touch()
    Transformer.from_pretrained(folder)


@pytest.mark.parametrize("base", ["some/base", None])
def test_an_adapter_is_named_with_its_base_model(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match=r"is a PEFT adapter.*not a whole model.*merge_and_unload") as error:
        Transformer.from_pretrained(tmp_path)
    assert ("for some/base" in str(error.value)) == (base is not None)


def test_the_folder_of_a_run_points_to_its_model(tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(InputError, match=r"is the folder of a run, no model: give .*/model"):
        Transformer.from_pretrained(tmp_path)


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minirl", "--version"])
    program.main()
    assert capsys.readouterr().out == f"minirl {__version__}\n"
    assert __version__ == "0.2.0"
