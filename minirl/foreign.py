"""Recognise folders that look like a checkpoint but cannot be read as one, and say what they are and what to do."""

from pathlib import Path

from minirl.errors import InputError
from minirl.files import read_json

GGUF = "it holds GGUF weights, which are for llama.cpp: make a folder of them as examples/gguf_to_hf.py does"
WEIGHTS = {  # file names, and what a folder with one of them and no safetensors is
    "*.gguf": GGUF,
    "pytorch_model*.bin": "pickled weights are never loaded: convert them to safetensors",
    "consolidated*.pth": "it holds its author's own pickled weights, which are never loaded: take the version for "
    "transformers",
    "consolidated*.safetensors": "it holds its author's own names of tensors: take the version for transformers",
    "*.onnx": "it holds an ONNX export, which cannot be trained: take the checkpoint that it was made from",
    "tf_model.h5": "it holds TensorFlow weights: convert them to safetensors",
    "flax_model.msgpack": "it holds Flax weights: convert them to safetensors",
}
QUANTISERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "llm-compressor"}


def refuse_foreign(folder: Path) -> None:
    """Raise an InputError for an adapter, the folder of a run, or a folder with weights in another format only."""
    if (folder / "adapter_config.json").is_file() and not _safetensors(folder):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        whose = f" for {base}" if isinstance(base, str) and base else ""
        raise InputError(
            f"{folder} is a PEFT adapter{whose}, not a whole model: merge it into its base model "
            "(merge_and_unload, save_pretrained in peft) and give that folder"
        )
    if (folder / "metrics.jsonl").is_file() and (folder / "config.json").is_file():
        raise InputError(f"{folder} is the folder of a run, no model: give {folder / 'model'} or a checkpoint of it")
    if _safetensors(folder):
        return
    if not (folder / "config.json").exists() and "gguf" in str(folder).lower():  # `resolve` fetches no *.gguf
        raise InputError(f"{folder} holds no model.safetensors: {GGUF}")
    for pattern, what in WEIGHTS.items():
        if any(folder.glob(pattern)):
            raise InputError(f"{folder} holds no model.safetensors: {what}")


def refuse_quantised(config: dict, folder: str | Path) -> None:
    """Raise an InputError for the config.json of a quantised model: its integers have no gradient."""
    mlx, method = config.get("quantization"), config.get("quantization_config")
    if isinstance(mlx, dict):  # first, as MLX repeats it as a quantization_config without a method
        by = f"MLX{_bits(mlx)}"
    elif isinstance(method, dict):
        name = str(method.get("quant_method", "a quantiser that it does not name"))
        by = QUANTISERS.get(name, name) + _bits(method)
    else:
        return
    raise InputError(
        f"{folder} holds weights quantised by {by}, and only float weights can be trained: "
        "take the checkpoint that it was made from, or one that was converted back to bfloat16"
    )


def _bits(options: dict) -> str:
    """Return " to 4 bits" for options that give the width of a weight, else an empty text."""
    loaded = 4 * (options.get("load_in_4bit") is True) or 8 * (options.get("load_in_8bit") is True)
    bits = options.get("bits") or loaded
    return f" to {bits} bits" if type(bits) is int and bits else ""


def _safetensors(folder: Path) -> bool:
    """Tell whether a folder has model weights under the names that minirl reads."""
    return any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
