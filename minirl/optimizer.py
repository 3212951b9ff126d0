"""AdamW with fp32 master weights, whatever the model computes in.

A bf16 parameter cannot take a 1e-6 step: the sum rounds back to the old value. So its fp32 master is kept as two
halves, the bf16 parameter itself and the 16 bits that bf16 lost: exact, and 2 bytes a weight smaller than a bf16 copy
beside an fp32 master. Gradients are summed in fp32, so that an update does not depend on the number of micro-batches.
"""

import math
from functools import partial

import torch
from torch import nn

from minirl.errors import InputError, NonFinite

CHUNK = 1 << 18  # weights updated at a time on a CPU: the temporaries stay in cache


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 master of a bf16 parameter and its int16 remainder, exactly."""
    # Integer addition: a negative remainder borrows from the high half, which undoes the rounding up in `split`.
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bf16 nearest to an fp32 master, and the signed int16 remainder that `join` adds to its bits."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16  # adds half of bf16's last place: rounds to the nearest, ties away from 0
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def learning_rate(step: int, peak: float, warmup: int, total: int, schedule: str) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up to `peak`, then constant, or linear or cosine decay to 0 at
    `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of the `state_dict` that an AdamW on this model will have."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # The int64 count; for each weight two fp32 moments, and for bf16 the remainder of the master.
    return 8 * bool(trained) + sum(p.numel() * (10 if p.dtype == torch.bfloat16 else 8) for p in trained)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 1711.05101) for a model in fp32 or bf16. Only matrices
    decay; biases and the weights of norms do not."""

    def __init__(self, model: nn.Module, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.betas, self.eps, self.weight_decay, self.updates = betas, eps, weight_decay, 0
        self.grads: dict[str, torch.Tensor] = {}
        self.state: dict[str, torch.Tensor] = {}  # m. and v., the two moments, and low., the remainder of a bf16 master
        for name, p in self.params.items():
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise InputError(f"parameter {name!r} is {p.dtype}: training runs in float32 or bfloat16")
            self.state[f"m.{name}"] = torch.zeros_like(p, dtype=torch.float32)
            self.state[f"v.{name}"] = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype == torch.bfloat16:
                self.state[f"low.{name}"] = torch.zeros_like(p, dtype=torch.int16)
            p.register_post_accumulate_grad_hook(partial(self._collect, name))

    def _collect(self, name: str, p: torch.Tensor) -> None:
        """Add a gradient to its fp32 sum as soon as backward has made it, so that the bf16 gradient of only one
        parameter exists at a time."""
        if name in self.grads:
            self.grads[name] += p.grad
        else:
            self.grads[name] = p.grad.float()
        p.grad = None  # frees it

    def zero_grad(self) -> None:
        self.grads.clear()
        for p in self.params.values():  # where an error has cut a backward
            p.grad = None

    def grad_norm(self) -> float:
        """Return the Euclidean norm of the whole gradient; NonFinite names a tensor that is not finite."""
        norms = {name: torch.linalg.vector_norm(g) for name, g in self.grads.items()}
        if not norms:
            return 0.0
        total = torch.linalg.vector_norm(torch.stack(list(norms.values()))).item()  # a GPU waits once
        if not math.isfinite(total):
            name = next((n for n, norm in norms.items() if not math.isfinite(norm)), "sum")
            raise NonFinite(f"the gradient of {name!r} is not finite")
        return total

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None, norm: float | None = None) -> float:
        """Update the weights with the gradient, scaled down to norm `clip` where it is longer; clear the gradient, and
        return its norm before scaling. `norm` is that norm where it is known."""
        norm = self.grad_norm() if norm is None else norm
        scale = 1.0 if clip is None or norm <= clip else clip / norm
        self.updates += 1
        for name, grad in self.grads.items():
            p = self.params[name]
            decay = 1 - lr * self.weight_decay if p.dim() > 1 else 1.0  # matrices only
            flat = [x.view(-1) for x in (p.data, grad, *self._state_of(name))]
            size = CHUNK if p.device.type == "cpu" else len(flat[0])  # a GPU wants few large launches
            for start in range(0, len(flat[0]), size):
                self._update(*(x[start : start + size] for x in flat), lr=lr, scale=scale, decay=decay)
        self.zero_grad()
        return norm

    def _state_of(self, name: str) -> list[torch.Tensor]:
        return [self.state[f"{kind}.{name}"] for kind in ("m", "v", "low") if f"{kind}.{name}" in self.state]

    def _update(self, p, grad, m, v, low=None, *, lr: float, scale: float, decay: float) -> None:
        """Update one chunk in place: p −= lr · m̂ / (√v̂ + eps) after the decay, m̂ and v̂ without the bias of their zero
        start (Kingma & Ba 1412.6980, algorithm 1)."""
        b1, b2 = self.betas
        if scale != 1.0:
            grad = grad * scale
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = (v / (1 - b2**self.updates)).sqrt_().add_(self.eps)
        master = p if low is None else join(p, low)
        master.mul_(decay).addcdiv_(m, denominator, value=-lr / (1 - b1**self.updates))
        if low is not None:
            high, rest = split(master)
            p.copy_(high)
            low.copy_(rest)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state by name; "steps", the number of updates, keeps the name that saved files have."""
        return {"steps": torch.tensor(self.updates), **self.state}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a saved state; InputError where a name, shape or type is not this model's."""
        own = self.state_dict()
        for name in {**own, **state}:
            a, b = own.get(name), state.get(name)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                raise InputError(f"optimizer state {name!r} does not fit: resume with the same model and precision")
        self.updates = int(state["steps"])
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
