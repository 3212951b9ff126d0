"""Small models for tests: odd sizes, so that no two dimensions can be mistaken for one another."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minirl.attention import Packed
from minirl.model import ModelConfig, Transformer
from minirl.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=53,
    width=20,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=14,
    mlp_width=31,
    rope_theta=100.0,
    max_positions=256,
)


def tiny_config(**changes) -> ModelConfig:
    return replace(CONFIG, **changes)


def tiny_model(seed: int = 0, **changes) -> Transformer:
    """Random weights, norms and biases too, wide enough that the logits tell one token from another."""
    return randomise(Transformer(tiny_config(**changes)), seed)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: fresh biases of 0 and norms of 1 would hide that they are not used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise * (0.3 if p.dim() == 1 or "embed" in name else p.shape[1] ** -0.5))
    return model


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models hold the same bits. Their logits need not be compared so: a processor may add in another order
    where the weights lie at another address."""
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(p, theirs[name]) for name, p in one.state_dict().items()
    )


def fp32_tolerance(in_fp32: dict[str, torch.Tensor], in_fp64: dict[str, torch.Tensor]) -> float:
    """What a second fp32 computation may be off from the one in float64, relative to the largest entry of all: four
    times the error of a first, and at least four roundings."""
    largest = max(x.abs().max().item() for x in in_fp64.values())
    error = max((in_fp32[name].double() - x).abs().max().item() for name, x in in_fp64.items())
    return 4 * max(error / largest, torch.finfo(torch.float32).eps)


def random_ids(count: int, vocab: int = CONFIG.vocab_size, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def hidden_states(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    """[T, D] of one plain causal row."""
    layout = Packed([(list(tokens), [])])
    return model(layout.tokens, layout)


def full_logits(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] of one plain causal row, in the model's precision."""
    return hidden_states(model, tokens) @ model.head_weight.t()


ALPHABET = "0123456789+=~(,)"  # one token a character


def tiny_checkpoint(folder: str | Path, seed: int = 0, **changes) -> Path:
    """A checkpoint on disk that reads and writes sums, with random weights."""
    tokenizer = Tokenizer.from_chars(ALPHABET)
    sizes = {"width": 32, "layers": 1, "heads": 4, "head_dim": 8, "mlp_width": 48, "max_positions": 32}
    model = tiny_model(seed, **{"vocab_size": tokenizer.vocab_size, **sizes, **changes})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
