"""Measure peak memory and time of one training step on a CPU: forward, loss and backward of a transformer of this
project whose vocabulary is large for its size, with minirl's loss on hidden states or with the eager one on logits.
"""

import time
from typing import NamedTuple

import torch

from bench import measure, operations

SIDES = ("minirl", "eager")


class Size(NamedTuple):
    tokens: int
    vocab: int = 151_936  # Qwen2.5's
    width: int = 896  # Qwen2.5-0.5B's
    layers: int = 2
    row: int = 512  # tokens of a sequence

    def __str__(self) -> str:
        return f"{self.tokens} tokens, V {self.vocab}, D {self.width}, layers: {self.layers}"


def _model(size: Size):
    from minirl.model import ModelConfig, Transformer

    heads = size.width // 64
    sizes = {"heads": heads, "kv_heads": heads, "head_dim": 64, "mlp_width": 4 * size.width, "layers": size.layers}
    return Transformer(ModelConfig(vocab_size=size.vocab, width=size.width, **sizes))


def step_of(side: str, size: Size) -> measure.Run:
    """Return a step with the policy loss as in training: clip, old log-probs given, a mean over tokens; the entropy has
    no gradient."""
    from minirl.attention import Packed

    torch.manual_seed(0)
    model, n = _model(size), size.tokens
    tokens = torch.randint(size.vocab, (n,)).tolist()
    layout = Packed([(tokens[i : i + size.row], []) for i in range(0, n, size.row)])
    shape = operations.Shape(n, size.vocab, size.width, n // size.row)
    x = operations.make_inputs("none", shape, "cpu", torch.float32)
    x.old_logp.sub_(12.0)  # about log(1/V)

    def run() -> dict:
        model.zero_grad(set_to_none=True)
        x.hidden, x.weight = model(layout.tokens, layout), model.head_weight
        if side == "minirl":
            args = (x.hidden, x.weight, x.targets, x.advantages, x.weights, operations.PLAIN)
            loss, *_ = operations.kernels.linear_policy_loss(*args, old_logp=x.old_logp)
        else:
            logp, _ = operations.eager_chosen(torch.nn.functional.linear(x.hidden, x.weight), x.targets)
            loss = operations.eager_loss(logp, x, 0.0)
        loss.backward()
        return {"loss": loss.detach(), "d_weight": model.head_weight.grad}

    return run


def measured(side: str, size: Size, repeats: int) -> dict:
    """Measure in a process of its own: seconds of each step after a first, bytes at the peak and before any step."""
    run = step_of(side, size)
    built = measure.status("VmRSS")
    seconds, outputs = [], None
    for _ in range(repeats + 1):
        del outputs  # the gradients of a step go before those of the next come
        started = time.perf_counter()
        outputs = run()
        seconds.append(time.perf_counter() - started)
    result = {"seconds": measure.quantiles(seconds[1:]), "peak": measure.status("VmHWM"), "built": built}
    return result | {"loss": outputs["loss"].item(), "d_weight_norm": outputs["d_weight"].norm().item()}


def compare(size: Size, repeats: int) -> dict:
    sides = {side: measure.in_child(measured, side, size, repeats) for side in SIDES}
    ours, theirs = sides["minirl"], sides["eager"]
    growth = [side["peak"] - side["built"] for side in (ours, theirs)]
    return {
        "size": size._asdict(),
        "sides": sides,
        "memory_ratio": growth[0] / growth[1],
        "whole_memory_ratio": ours["peak"] / theirs["peak"],
        "time_ratio": ours["seconds"]["median"] / theirs["seconds"]["median"],
    }
