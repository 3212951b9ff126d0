"""The sizes and switches of a model, and their translation from and to the config.json of a Hugging Face directory.

A key or value that does not fit is named in an InputError.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch

from minirl.errors import InputError
from minirl.files import read_json
from minirl.foreign import refuse_foreign, refuse_quantised

FAMILIES = {
    # model_type: name in "architectures", biases and norms on q and k, and the defaults of two keys that may be absent
    "llama": {"architecture": "Llama", "qkv_bias": False, "qk_norm": False, "theta": 1e4, "window": None},
    "mistral": {"architecture": "Mistral", "qkv_bias": False, "qk_norm": False, "theta": 1e4, "window": 4096},
    "qwen2": {"architecture": "Qwen2", "qkv_bias": True, "qk_norm": False, "theta": 1e4, "window": 4096},
    "qwen3": {"architecture": "Qwen3", "qkv_bias": False, "qk_norm": True, "theta": 1e4, "window": 4096},
    "smollm3": {"architecture": "SmolLM3", "qkv_bias": False, "qk_norm": False, "theta": 2e6, "window": None},
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of a model; `checkpoint.read_config` makes one from the words of config.json."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    model_type: str = "llama"
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    """The `rope_scaling` entry of config.json: rope_type linear, llama3 or yarn with its parameters."""
    max_positions: int = 2048
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens, None = full attention; empty = full everywhere."""
    rope_layers: tuple[bool, ...] = ()
    """For each layer, True where it rotates its queries and keys; empty = all do."""
    source: dict = field(default_factory=dict, compare=False)
    """The config.json that this came from; written back with the weights."""

    def rotates(self, layer: int) -> bool:
        """Tell whether a layer rotates its queries and keys."""
        return self.rope_layers[layer] if self.rope_layers else True


@dataclass(frozen=True)
class ScalarHead:
    """The head of a reward model or critic and the meaning of its numbers; the key `scalar_head` of config.json."""

    layers: Literal["linear", "mlp"] = "linear"
    """Linear, or Linear-ReLU-Linear."""
    kind: Literal["value", "pairwise", "pointwise", "bce", "process"] = "value"
    """The loss that it was trained with."""
    bias: float = 0.0
    """Subtracted from every number: the mean score of a reference set, so that similar texts score about 0."""
    separator: str = "\n"
    """Text that ends a step (kind process)."""


def read_config(folder: str | Path) -> ModelConfig:
    """Read the config.json of a folder; InputError where the folder or the model in it is of a kind that cannot be
    trained."""
    refuse_foreign(Path(folder))
    file = Path(folder) / "config.json"
    content = read_json(file)
    refuse_quantised(content, folder)
    return parse_config(content, str(file))


def parse_config(c: dict, where: str = "config.json") -> ModelConfig:
    """Translate the content of config.json, with `rope_parameters` or the older `rope_theta` and `rope_scaling`. An
    InputError names it as `where`."""
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is not supported: it must be one of {', '.join(FAMILIES)}")
    if c.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act {c['hidden_act']!r} is not supported: only 'silu' is")
    family, keys = FAMILIES[kind], _Keys(c, where)
    heads, layers = keys.size("num_attention_heads", most=2**16), keys.size("num_hidden_layers", most=1000)
    kv_heads = keys.size("num_key_value_heads", heads, most=2**16)
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    width = keys.size("hidden_size")
    # Without head_dim a family has either width / heads or, in Qwen3's reference code, 128.
    if c.get("head_dim") is None and kind != "qwen3" and width % heads:
        raise InputError(f"{where}: hidden_size {width} is no multiple of num_attention_heads {heads}: give head_dim")
    head_dim = keys.size("head_dim", width // heads if kind != "qwen3" else 128, most=2**16)
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
        max_positions=keys.size("max_position_embeddings", 2048, most=2**31),
        tied=keys.flag("tie_word_embeddings", kind == "smollm3"),
        qkv_bias=family["qkv_bias"] or bias,
        out_bias=bias and kind != "qwen2",  # whose reference code reads no attention_bias
        mlp_bias=keys.flag("mlp_bias"),
        qk_norm=family["qk_norm"],
        windows=_windows(keys, kind, layers, rope_layers),
        rope_layers=rope_layers,
        source=c,
    )


@dataclass
class _Keys:
    """Read keys of a config, each with one sentence for a value that does not fit. A null counts as absent."""

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

    def size(self, key: str, default: int | None = None, most: int = 2**24) -> int:
        """Read a size, far above those of real models at `most`: more would take forever, or overflow a product."""
        wanted = f"a positive whole number of at most {most:,}"
        return self.read(key, default, wanted, lambda x: type(x) is int and 0 < x <= most)

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
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _rope(keys: _Keys, default_theta: float) -> tuple[float, dict | None]:
    """Return theta and the checked scaling, None where positions are rotated without one."""
    name = "rope_parameters" if keys.config.get("rope_parameters") else "rope_scaling"
    scaling = keys.config.get(name) or {}
    if not isinstance(scaling, dict):
        raise InputError(f"{keys.where}: {name!r} is {scaling!r:.80}: it must be an object with a rope_type")
    inside = _Keys(scaling, f"{keys.where}: {name}")
    theta = inside.number("rope_theta", keys.number("rope_theta", default_theta))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise InputError(f"{keys.where}: rope_type {kind!r} is not supported: it must be one of {', '.join(ROPE_KEYS)}")
    for key in ROPE_KEYS[kind]:
        inside.number(key)
    for key in ("original_max_position_embeddings", *YARN_OPTIONS):
        inside.number(key, 1.0)
    return theta, None if kind == "default" else scaling


def _windows(keys: _Keys, kind: str, layers: int, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Return the window of each layer. Mistral has one for all; other families must ask for it with
    `use_sliding_window`, and name the layers or follow their family's rule."""
    default = FAMILIES[kind]["window"]
    asked = kind == "mistral" or (kind != "llama" and keys.flag("use_sliding_window"))
    if not asked or keys.config.get("sliding_window", default) is None:  # a null turns the window off
        return ()
    window = keys.size("sliding_window", default, most=2**31)
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
    """Return which layers rotate: in SmolLM3 all but every fourth. Its key `no_rope_layers`, despite the name, holds 1
    for a layer that *does* rotate."""
    if kind != "smollm3":
        return ()
    interval = keys.size("no_rope_layer_interval", 4)
    flags = keys.per_layer("no_rope_layers", layers, (0, 1)) or [(layer + 1) % interval for layer in range(layers)]
    return () if all(flags[:layers]) else tuple(bool(flag) for flag in flags[:layers])


def read_scalar_head(config: ModelConfig, where: str = "config.json") -> ScalarHead | None:
    """Return the head that the config.json of a reward model or critic describes; None where it describes none."""
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
    """Return a config.json for other engines: the one that was read, or for a fresh model one made of its ModelConfig.
    InputError where its family's config.json cannot describe it."""
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
    """Refuse a config.json that would not be read back as this ModelConfig: a family's keys cannot express every one,
    and a `source` may be out of date after a change with `dataclasses.replace`."""
    read = parse_config(content)
    for name in (f.name for f in fields(config) if f.compare):
        meant, said = getattr(config, name), getattr(read, name)
        if meant != said:
            raise InputError(
                f"the config.json of a {config.model_type} model cannot say {name} = {meant!r:.80}, it would be read "
                f"as {said!r:.80}: change the ModelConfig, its source too if it has one"
            )


def _layers_for_others(config: ModelConfig) -> dict:
    """Return the keys of config.json for what differs from layer to layer."""
    out: dict = {"sliding_window": next((w for w in config.windows if w), None)}
    if config.windows and config.model_type != "mistral":
        types = ["sliding_attention" if w else "full_attention" for w in config.windows]
        out |= {"use_sliding_window": True, "layer_types": types}
    if config.model_type == "smollm3":
        out["no_rope_layers"] = [int(config.rotates(layer)) for layer in range(config.layers)]
    return out
