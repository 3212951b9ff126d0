"""Time a decode step on a CPU and the share of it that truncated sampling takes: the model, then the draw by top-p with
the ids that it kept, which training uses again. All parts take turns in one process, so that noise is shared evenly.
"""

from typing import NamedTuple

import torch

from bench import measure


class Size(NamedTuple):
    slots: int = 256
    vocab: int = 16_384
    width: int = 576  # SmolLM2-135M's
    layers: int = 8
    position: int = 128  # of the token that is drawn

    def __str__(self) -> str:
        return f"{self.slots} slots, V {self.vocab}, D {self.width}, layers: {self.layers}, position {self.position}"


def _forward(size: Size) -> measure.Run:
    from minirl.attention import Slots
    from minirl.model import ModelConfig, Transformer

    heads, length = size.width // 64, size.position + 1
    sizes = {"heads": heads, "kv_heads": heads // 3, "head_dim": 64, "mlp_width": 3 * size.width}
    model = Transformer(ModelConfig(vocab_size=size.vocab, width=size.width, layers=size.layers, **sizes)).initialise(0)
    cache = Slots(size.layers, size.slots, heads // 3, length, 64, torch.float32, "cpu")
    tokens, positions = torch.arange(size.slots) % size.vocab, torch.full((size.slots,), size.position)

    @torch.inference_mode()
    def run() -> dict:
        return {"logits": model.logits(model(tokens, cache.step(positions, size.position)))}

    return run


def _draw(size: Size, **options) -> measure.Run:
    """Return a run that draws from logits with a standard deviation of 2, as in the other suites: those of an untrained
    model are flatter, and top-p would keep more of them."""
    from minirl.kernels import sample_tokens
    from minirl.sampler import _kept_ids

    logits = torch.empty(size.slots, size.vocab).normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    place = torch.arange(size.slots)

    @torch.inference_mode()
    def run() -> dict:
        draw = sample_tokens(logits, 0, place, place, entropy=False, **options)
        return {"token": draw.token, "kept": None if draw.floor is None else _kept_ids(logits, draw.floor)}

    return run


def compare(size: Size, rounds: int) -> dict:
    """Return the seconds of each part, and the share of a step that top-p sampling takes."""
    runs = {"forward": _forward(size), "plain draw": _draw(size), "top-p 0.9": _draw(size, top_p=0.9)}
    for run in runs.values():
        run()
    seconds = measure.time_rivals(runs, measure.Clock(torch.device("cpu")), rounds, 60.0)
    forward, top_p = (seconds[name]["median"] for name in ("forward", "top-p 0.9"))
    return {"size": size._asdict(), "parts": seconds, "top_p_share": top_p / (forward + top_p)}
