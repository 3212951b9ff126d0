"""Check the kernels for more than speed: equal bits in two runs, for every chunk size and order of rows; no new
compilation for new lengths; right results on matrices of more than 2³¹ elements.
"""

import torch

from bench import operations
from minirl import kernels

LENGTHS = 50


def _small(device: torch.device, rows: int = 96) -> operations.Inputs:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return operations.make_inputs("head", operations.Shape(rows, 4096, 64), device, dtype)


def _head(x: operations.Inputs, rows=None, **options) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, d_hidden and d_weight of the rows, in their order."""
    rows = torch.arange(x.shape.rows, device=x.targets.device) if rows is None else rows
    hidden = x.hidden.detach()[rows].requires_grad_()
    args = (hidden, x.weight, x.targets[rows], x.advantages[rows], x.weights[rows], operations.PLAIN)
    loss, logp, entropy = kernels.linear_policy_loss(*args, old_logp=x.old_logp[rows], **options)
    return logp, entropy, *torch.autograd.grad(loss, [hidden, x.weight])


def _equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def two_runs(device: torch.device) -> bool:
    x = _small(device)
    return _equal(_head(x), _head(x))


def chunk_sizes(device: torch.device) -> bool:
    """logp, entropy and d_hidden; the sum over chunks in d_weight is taken in another order."""
    x = _small(device)
    sizes = (rows * 4096 * 6 for rows in (17, 32, 96))
    first, *others = (_head(x, workspace=size)[:3] for size in sizes)
    return all(_equal(first, other) for other in others)


def row_orders(device: torch.device) -> bool:
    x = _small(device)
    order = torch.randperm(x.shape.rows, device=device)
    return _equal([y[order] for y in _head(x)[:3]], _head(x, order)[:3])


def new_compilations(device: torch.device) -> int:
    """Count the kernels that triton compiles for 50 numbers of rows, after the first."""
    from triton import knobs

    count = 0

    def hook(**_):
        nonlocal count
        count += 1

    x = _small(device, 16 * LENGTHS + 64)
    lengths = range(64, 64 + 16 * LENGTHS, 16)
    for i, n in enumerate(lengths):
        if i == 1:
            before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, hook
        rows = torch.arange(n + i % 2, device=device)
        _head(x, rows)
        logits = torch.zeros(len(rows), 4096, device=device, dtype=x.hidden.dtype, requires_grad=True)
        y = [t[rows] for t in (x.targets, x.advantages, x.weights)]
        kernels.fused_policy_loss(logits, *y, operations.PLAIN, old_logp=x.old_logp[rows])[0].backward()
    knobs.runtime.jit_post_compile_hook = before
    return count


def beyond_32_bits(device: torch.device) -> float:
    """Return the largest error of log-probs and entropies in the last rows of logits with more than 2³¹ elements."""
    rows, vocab = 16384, 151_936
    logits = torch.empty(rows, vocab, device=device, dtype=torch.bfloat16).normal_(std=2.0)
    targets = torch.randint(vocab, (rows,), device=device)
    ours = kernels.token_logprobs(logits, targets)
    right = operations.eager_logprobs(logits[-64:], targets[-64:])
    return max((a[-64:] - b).abs().max().item() for a, b in zip(ours, right, strict=True))
