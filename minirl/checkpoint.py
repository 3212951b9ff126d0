"""Read and write Hugging Face directories: config.json and one or many safetensors files. Nothing in them is executed
or unpickled.

`load_model` makes a `Transformer` by config.json (model_config.py) and fills it from safetensors, `save_model` writes
both so that other engines read them. A tensor that does not fit is named in an InputError.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minirl.errors import InputError
from minirl.files import read_json, write_atomic, write_json
from minirl.model_config import ScalarHead, read_config, read_scalar_head, write_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCORE = "score."  # the parameters of a scalar head
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve(path: str | Path) -> Path:
    """Return a local directory as it is, and fetch a hub id ("owner/name") with huggingface_hub. InputError where there
    is neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        gguf = folder.suffix == ".gguf"
        hint = "make a directory of it as examples/gguf_to_hf.py does" if gguf else "give the directory"
        raise InputError(f"{folder} is a file: {hint} that holds config.json")
    # "models/llama" looks like a hub id too, but where its first folder exists, or is the usual `models`, a mistyped
    # path is more likely, and no download should hide it.
    first = folder.parts[0] if folder.parts else ""
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")) or first == "models" or Path(first).is_dir():
        made = ", or make it as examples/gguf_to_hf.py says" if first == "models" else ""
        raise InputError(f"model directory {path} does not exist: check the path{made}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"{path} is not a directory, and reading it as a hub id needs huggingface_hub: pip install 'minirl[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is not a directory and could not be fetched from the hub ({reason})") from None


def load_model(model_class: type, path: str | Path, dtype, device, scalar_head: bool | ScalarHead) -> nn.Module:
    """Make a `model_class(config, scalar_head)` from a directory or hub id; `dtype` None keeps that of the embedding.

    `scalar_head` True takes the checkpoint's own head, or for a language model a linear one; a `ScalarHead` asks for
    that one. A head that the files do not hold starts at zero. A head is never rounded: in a bf16 model it keeps the
    fp32 of its file. InputError for tensors that are missing, unknown, or of another shape than config.json says.
    """
    folder = resolve(path)
    config = read_config(folder)
    held = read_scalar_head(config, str(folder / "config.json")) if scalar_head else None
    if scalar_head is True:
        scalar_head = held or ScalarHead()
    if held and held.layers != scalar_head.layers:
        raise InputError(f"{folder} has a head of kind {held.layers}, not {scalar_head.layers}: ask for that one")
    with torch.device("meta"):  # shapes without memory: the weights come from the files
        model = model_class(config, scalar_head)
    expected = {name: p.shape for name, p in model.named_parameters()}
    # A file may hold an lm_head that this model does not use: a copy of a tied one, or that of the language model from
    # which a reward model or critic starts.
    readable = {"lm_head.weight": model.head_weight.shape, **expected}
    tensors: dict[str, torch.Tensor] = {}
    for file, names in _files(folder).items():
        tensors |= _read(folder / file, names, readable, dtype, device)
    fresh = not any(name.startswith(SCORE) for name in tensors)
    missing = [name for name in expected if name not in tensors and not (fresh and name.startswith(SCORE))]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{folder}: tensor {missing[0]!r} is missing{more}: the checkpoint is incomplete")
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.pop("lm_head.weight") if "lm_head.weight" in tensors.keys() - expected else embedding
    if not scalar_head and config.tied and not torch.equal(head, embedding):
        raise InputError(
            f"{folder}: tensor 'lm_head.weight' differs from the embedding although config.json ties the two: "
            "set tie_word_embeddings to false"
        )
    for name in expected.keys() - tensors.keys():  # of a fresh scalar head
        tensors[name] = torch.zeros(expected[name], device=embedding.device)
    for name, tensor in tensors.items():  # files of mixed types: the embedding's type counts
        widest = torch.promote_types(tensor.dtype, embedding.dtype)
        tensors[name] = tensor.to(widest if name.startswith(SCORE) else embedding.dtype)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def _files(folder: Path) -> dict[str, list[str] | None]:
    """Return the weight files of a checkpoint, and the tensors to read from each (None: all that it holds)."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}  # even beside an index: `save_model` over a sharded checkpoint removes the index last
    if not (folder / INDEX).exists():
        raise InputError(f"{folder} holds no {WEIGHTS}: check the path")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{folder / INDEX}: 'weight_map' must map tensors to files: restore the file")
    files: dict = {}
    for name, file in weight_map.items():
        files.setdefault(Path(file).name, []).append(name)  # .name: never a file outside the folder
    return files


def _read(file: Path, names, expected, dtype, device) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors with their names from one file; `expected` holds the shape of each name that the model knows."""
    if not file.is_file():
        what = "is no file" if file.exists() else f"is named in {INDEX} but does not exist"
        raise InputError(f"{file} {what}: download it again")
    try:
        with safe_open(file, "pt", device="cpu") as content:
            held = list(content.keys())
            for name in held if names is None else names:
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # some older files hold the frequencies, which the model computes itself
                if name not in expected:
                    raise InputError(f"{file}: tensor {name!r} has no place in this architecture: check config.json")
                if name not in held:
                    raise InputError(f"{file}: tensor {name!r} is missing although {INDEX} places it here")
                yield name, _tensor(content.get_tensor(name), name, file, expected[name], dtype, device)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or no safetensors file ({error}): download it again") from None


def _tensor(tensor, name: str, file: Path, shape, dtype, device) -> torch.Tensor:
    """Check a tensor's shape and type and convert it; a scalar head keeps its own type."""
    if tensor.shape != shape:
        raise InputError(
            f"{file}: tensor {name!r} has shape {list(tensor.shape)} where config.json asks for {list(shape)}"
        )
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"{file}: tensor {name!r} is {tensor.dtype}: only {', '.join(DTYPES)} are read")
    if dtype is None or name.startswith(SCORE):
        dtype = tensor.dtype
    # Without copy=True the tensor would keep the whole file mapped.
    return tensor.to(dtype=dtype, device=device, copy=True)


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write config.json and model.safetensors, each atomically. The weights come first: a folder with a config.json is
    never without them."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    config = write_config(model.config, model.dtype, model.head)
    write_atomic(Path(path) / WEIGHTS, lambda staging: save_file(tensors, staging, metadata={"format": "pt"}))
    write_json(Path(path) / "config.json", config)
    (Path(path) / INDEX).unlink(missing_ok=True)
