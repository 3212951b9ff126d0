"""Hugging Face directories in and out: config.json, one or many safetensors files, and nothing else is ever executed or
unpickled.

`read_config` translates config.json, `load_model` fills a `Transformer` from safetensors, `save_model` writes both so
that other engines read them. Whatever does not fit is an InputError that names the key or the tensor.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minirl.errors import InputError
from minirl.files import read_json, write_atomic, write_json
from minirl.foreign import refuse_foreign, refuse_quantised
from minirl.model import ModelConfig, ScalarHead, Transformer

FAMILIES = {
    # model_type: biases on q, k, v without being asked for, norms on q and k, and what holds where a key is left out
    "llama": {"architecture": "Llama", "qkv_bias": False, "qk_norm": False, "theta": 1e4, "window": None},
    "mistral": {"architecture": "Mistral", "qkv_bias": False, "qk_norm": False, "theta": 1e4, "window": 4096},
    "qwen2": {"architecture": "Qwen2", "qkv_bias": True, "qk_norm": False, "theta": 1e4, "window": 4096},
    "qwen3": {"architecture": "Qwen3", "qkv_bias": False, "qk_norm": True, "theta": 1e4, "window": 4096},
    "smollm3": {"architecture": "SmolLM3", "qkv_bias": False, "qk_norm": False, "theta": 2e6, "window": None},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCORE = "score."  # the parameters of a scalar head
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve(path: str | Path) -> Path:
    """A local directory as it is; what is written like a hub id, and not below a folder that is here, is fetched with
    huggingface_hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        made = "make a directory of it as examples/gguf_to_hf.py does"
        hint = made if folder.suffix == ".gguf" else "give the directory"
        raise InputError(f"{folder} is a file: {hint} that holds config.json")
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


# --- config.json ---------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> ModelConfig:
    refuse_foreign(Path(folder))
    file = Path(folder) / "config.json"
    content = read_json(file)
    refuse_quantised(content, folder)
    return parse_config(content, str(file))


def parse_config(c: dict, where: str = "config.json") -> ModelConfig:
    """config.json's content to a ModelConfig, with the older `rope_theta`, `rope_scaling` or the `rope_parameters`."""
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is not supported: it must be one of {', '.join(FAMILIES)}")
    if c.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act {c['hidden_act']!r} is not supported: only 'silu' is")
    family, keys = FAMILIES[kind], _Keys(c, where)
    heads, layers = keys.size("num_attention_heads"), keys.size("num_hidden_layers")
    kv_heads = keys.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    width = keys.size("hidden_size")
    if c.get("head_dim") is None and kind != "qwen3" and width % heads:
        raise InputError(f"{where}: hidden_size {width} is no multiple of num_attention_heads {heads}: give head_dim")
    head_dim = keys.size("head_dim", width // heads if kind != "qwen3" else 128)
    if head_dim % 2:
        raise InputError(f"{where}: head_dim {head_dim} is odd: rotary embedding pairs its halves")
    theta, scaling = _rope(keys, family["theta"])
    bias = keys.flag("attention_bias")
    rope_layers = _rope_layers(keys, kind, layers)
    return ModelConfig(
        vocab_size=keys.size("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=keys.size("intermediate_size"),
        model_type=kind,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=keys.size("max_position_embeddings", 2048),
        tied=keys.flag("tie_word_embeddings", kind == "smollm3"),
        qkv_bias=family["qkv_bias"] or bias,
        out_bias=bias and kind != "qwen2",
        mlp_bias=keys.flag("mlp_bias"),
        qk_norm=family["qk_norm"],
        windows=_windows(keys, kind, layers, rope_layers),
        rope_layers=rope_layers,
        source=c,
    )


@dataclass
class _Keys:
    """Reads keys of a config, with one sentence for whatever else stands there. A null counts as left out."""

    config: dict
    where: str

    def read(self, key: str, default, wanted: str, right: Callable[[Any], bool]):
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: the key {key!r} is missing: restore the file")
        if not right(value):
            raise InputError(f"{self.where}: {key!r} is {value!r:.80}: it must be {wanted}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        return self.read(key, default, "a positive whole number", lambda x: type(x) is int and x > 0)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.read(key, default, "a positive number", lambda x: type(x) in (int, float) and 0 < x < 1e30))

    def flag(self, key: str, default: bool = False) -> bool:
        return self.read(key, default, "true or false", lambda x: isinstance(x, bool))

    def per_layer(self, key: str, layers: int, values: tuple) -> list | None:
        if not self.config.get(key):
            return None
        wanted = f"a list with one of {values} for each of {layers} layers"
        return self.read(
            key, None, wanted, lambda x: isinstance(x, list) and len(x) >= layers and all(v in values for v in x)
        )


ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
ROPE_OPTIONS = (
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def _rope(keys: _Keys, default_theta: float) -> tuple[float, dict | None]:
    name = "rope_parameters" if keys.config.get("rope_parameters") else "rope_scaling"
    scaling = keys.config.get(name) or {}
    if not isinstance(scaling, dict):
        raise InputError(f"{keys.where}: {name!r} is {scaling!r:.80}: it must be an object with a rope_type")
    theta = keys.number("rope_theta", default_theta)
    inside = _Keys(scaling, f"{keys.where}: {name}")
    theta = inside.number("rope_theta", theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise InputError(f"{keys.where}: rope_type {kind!r} is not supported: it must be one of {', '.join(ROPE_KEYS)}")
    for key in ROPE_KEYS[kind]:
        inside.number(key)
    for key in ROPE_OPTIONS:
        inside.number(key, 1.0)
    return theta, None if kind == "default" else scaling


def _windows(keys: _Keys, kind: str, layers: int, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Mistral has one window for all layers; the others must ask for it, and then say in which layers."""
    if kind == "llama" or (kind != "mistral" and not keys.flag("use_sliding_window")):
        return ()
    if keys.config.get("sliding_window", FAMILIES[kind]["window"]) is None:
        return ()
    window = keys.size("sliding_window", FAMILIES[kind]["window"])
    if kind == "mistral":
        return (window,) * layers
    types = keys.per_layer("layer_types", layers, ("full_attention", "sliding_attention"))
    if types:
        slides = [name == "sliding_attention" for name in types[:layers]]
    elif kind == "smollm3":
        slides = [not rotates for rotates in rope_layers or (True,) * layers]
    else:
        first = keys.read("max_window_layers", 28, "a whole number", lambda x: type(x) is int and x >= 0)
        slides = [layer >= first for layer in range(layers)]
    return tuple(window if slide else None for slide in slides) if any(slides) else ()


def _rope_layers(keys: _Keys, kind: str, layers: int) -> tuple[bool, ...]:
    """SmolLM3 leaves every fourth layer without rotation; `no_rope_layers` holds 1 where a layer *does* rotate."""
    if kind != "smollm3":
        return ()
    interval = keys.size("no_rope_layer_interval", 4)
    flags = keys.per_layer("no_rope_layers", layers, (0, 1)) or [(layer + 1) % interval for layer in range(layers)]
    return () if all(flags[:layers]) else tuple(bool(flag) for flag in flags[:layers])


def read_scalar_head(config: ModelConfig, where: str = "config.json") -> ScalarHead | None:
    """What the config.json of a reward model or critic says of its head; None where it says nothing."""
    content = config.source.get("scalar_head")
    if content is None:
        return None
    hints = get_type_hints(ScalarHead)

    def fits(name: str, value) -> bool:
        choices = get_args(hints.get(name))
        return value in choices if choices else name in hints and isinstance(value, hints[name])

    if not isinstance(content, dict) or not all(fits(name, value) for name, value in content.items()):
        raise InputError(f"{where}: 'scalar_head' is {content!r:.120}: restore the file, or take the key away")
    return ScalarHead(**content)


def write_config(config: ModelConfig, dtype: torch.dtype, scalar_head: ScalarHead | None) -> dict:
    """A config.json for other engines: the one that was read, or for a fresh model one made from the ModelConfig."""
    task = "ForSequenceClassification" if scalar_head else "ForCausalLM"
    content = dict(config.source) or {
        "model_type": config.model_type,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        # Left out, some families take the ids of their published model, which need not exist in this vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **_layers_for_others(config),
    }
    _check_read_back(config, content)
    content.pop("torch_dtype", None)  # the older name of the same key
    architecture = FAMILIES[config.model_type]["architecture"] + task
    content |= {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}
    return content | ({"num_labels": 1, "scalar_head": asdict(scalar_head)} if scalar_head else {})


def _check_read_back(config: ModelConfig, content: dict) -> None:
    """A ModelConfig can say more than a family's config.json, and its source may have become stale."""
    read = parse_config(content)
    for name in (f.name for f in fields(config) if f.compare):
        meant, said = getattr(config, name), getattr(read, name)
        if meant != said:
            raise InputError(
                f"the config.json of a {config.model_type} model cannot say {name} = {meant!r:.80}, it would be read "
                f"as {said!r:.80}: change the ModelConfig, its source too if it has one"
            )


def _layers_for_others(config: ModelConfig) -> dict:
    """What differs from layer to layer, in the words of config.json."""
    out: dict = {"sliding_window": next((w for w in config.windows if w), None)}
    if config.windows and config.model_type != "mistral":
        types = ["sliding_attention" if w else "full_attention" for w in config.windows]
        out |= {"use_sliding_window": True, "layer_types": types}
    if config.model_type == "smollm3":
        out["no_rope_layers"] = [int(config.rotates(layer)) for layer in range(config.layers)]
    return out


# --- weights -------------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device=None, scalar_head: bool | ScalarHead = False
) -> Transformer:
    """Read a directory or hub id. `scalar_head` True takes the head that the checkpoint has, on a language model's
    checkpoint a linear one; a `ScalarHead` asks for its own. A head that the files do not hold starts at zero.

    A scalar head is never rounded: in a bf16 model it keeps the fp32 of its file.
    """
    folder = resolve(path)
    config = read_config(folder)
    held = read_scalar_head(config, str(folder / "config.json")) if scalar_head else None
    if scalar_head is True:
        scalar_head = held or ScalarHead()
    if held and held.layers != scalar_head.layers:
        raise InputError(f"{folder} has a head of kind {held.layers}, not {scalar_head.layers}: ask for that one")
    with torch.device("meta"):
        model = Transformer(config, scalar_head)
    expected = {name: p.shape for name, p in model.named_parameters()}
    # A file may hold a head that the model has none of: a tied one a second time, a language model's for a scalar one.
    readable = {"lm_head.weight": model.head_weight.shape, **expected}
    tensors: dict[str, torch.Tensor] = {}
    for file, names in _files(folder).items():
        tensors |= _read(folder / file, names, readable, dtype, device)
    fresh = not any(name.startswith(SCORE) for name in tensors)
    missing = [name for name in expected if name not in tensors and not (fresh and name.startswith(SCORE))]
    if missing:
        raise InputError(f"{folder}: tensor {missing[0]!r} is missing{_more(missing)}: the checkpoint is incomplete")
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.pop("lm_head.weight") if "lm_head.weight" in tensors.keys() - expected else embedding
    if not scalar_head and config.tied and not torch.equal(head, embedding):
        raise InputError(
            f"{folder}: tensor 'lm_head.weight' differs from the embedding although config.json ties the two: "
            "set tie_word_embeddings to false"
        )
    for name in expected.keys() - tensors.keys():  # of a fresh scalar head
        tensors[name] = torch.zeros(expected[name], device=embedding.device)
    for name, tensor in tensors.items():
        widest = torch.promote_types(tensor.dtype, embedding.dtype)
        tensors[name] = tensor.to(widest if name.startswith(SCORE) else embedding.dtype)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _files(folder: Path) -> dict[str, list[str] | None]:
    """Weight files of a checkpoint -> the tensors to take from each (None: all there are)."""
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}  # also beside an index: a save over shards leaves the index for last
    if not (folder / INDEX).exists():
        raise InputError(f"{folder} holds no {WEIGHTS}: check the path")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{folder / INDEX}: 'weight_map' must map tensors to files: restore the file")
    files: dict = {}
    for name, file in weight_map.items():
        files.setdefault(Path(file).name, []).append(name)
    return files


def _read(file: Path, names, expected, dtype, device) -> dict[str, torch.Tensor]:
    if not file.exists():
        raise InputError(f"{file} is named in {INDEX} but does not exist: download it again")
    try:
        with safe_open(file, "pt", device="cpu") as content:
            held = list(content.keys())
            tensors = {}
            for name in held if names is None else names:
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # recomputed
                if name not in expected:
                    raise InputError(f"{file}: tensor {name!r} has no place in this architecture: check config.json")
                if name not in held:
                    raise InputError(f"{file}: tensor {name!r} is missing although {INDEX} places it here")
                tensors[name] = _tensor(content.get_tensor(name), name, file, expected[name], dtype, device)
            return tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or no safetensors file ({error}): download it again") from None


def _tensor(tensor, name: str, file: Path, shape, dtype, device) -> torch.Tensor:
    if tensor.shape != shape:
        raise InputError(
            f"{file}: tensor {name!r} has shape {list(tensor.shape)} where config.json asks for {list(shape)}"
        )
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"{file}: tensor {name!r} is {tensor.dtype}: only {', '.join(DTYPES)} are read")
    if dtype is None or name.startswith(SCORE):
        dtype = tensor.dtype
    # copy: without it the tensor would keep the whole file mapped
    return tensor.to(dtype=dtype, device=device, copy=True)


def save_model(model: Transformer, path: str | Path) -> None:
    """Write config.json and model.safetensors, weights first, each atomically."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    config = write_config(model.config, model.dtype, model.head)
    write_atomic(Path(path) / WEIGHTS, lambda staging: save_file(tensors, staging, metadata={"format": "pt"}))
    write_json(Path(path) / "config.json", config)
    (Path(path) / INDEX).unlink(missing_ok=True)
