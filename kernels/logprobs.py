"""Log-probability and entropy of given tokens: the definition on logits, and the same from hidden states in bounded
chunks.

`token_logprobs` is the specification, plain differentiable PyTorch. `linear_token_logprobs` computes the same two
numbers a row without ever holding [N, V]: it walks over chunks of rows, keeps only the log-sum-exp and the entropy of
each, and in the backward pass makes each chunk of logits again. Its gradients are exact.

Shapes: N rows, V vocabulary, D width. Everything behind the head's product is fp32 (fp64 for fp64 inputs).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 << 20  # workspace of one chunk of fp32 logits


class Kept(NamedTuple):
    """The tokens that truncated sampling kept, a list a row: row i holds `ids[offsets[i] : offsets[i + 1]]`; an empty
    list means all."""

    ids: torch.Tensor  # [K] int
    offsets: torch.Tensor  # [N + 1] int

    def mask(self, start: int, stop: int, vocab: int) -> torch.Tensor:
        """bool [stop - start, V], True where a token may be drawn."""
        counts = (self.offsets[start + 1 : stop + 1] - self.offsets[start:stop]).long()
        rows = torch.repeat_interleave(torch.arange(stop - start, device=counts.device), counts)
        mask = torch.zeros(stop - start, vocab, dtype=torch.bool, device=counts.device)
        mask[rows, self.ids[int(self.offsets[start]) : int(self.offsets[stop])].long()] = True
        mask[counts == 0] = True
        return mask


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy of p = softmax(logits / temperature) over the kept set; the definition.

    logits [N, V], targets [N], temperature a number or [N], kept bool [N, V] -> (logp [N], entropy [N] in nats).
    """
    z = _scaled(logits, temperature)
    if kept is not None:
        z = z.masked_fill(~kept, float("-inf"))
    logp = z.log_softmax(-1)
    p = logp.exp()
    # 0 · log 0 = 0, in the gradient too: a `where` around the product would still differentiate 0 · -inf
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    kept: Kept | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs(hidden @ weight.T, targets, ...)` in chunks of at most `chunk_bytes` of logits.

    hidden [N, D], weight [V, D], targets [N] -> (logp [N], entropy [N]); gradients reach hidden and weight, none
    reaches temperature.
    """
    return _LinearTokenLogprobs.apply(hidden, weight, targets, temperature, kept, chunk_bytes)


def _scaled(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    z = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if isinstance(temperature, torch.Tensor):
        return z / temperature.to(z.dtype).unsqueeze(1)
    return z if temperature == 1.0 else z / temperature


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept, chunk_bytes):
        out_dtype = torch.promote_types(hidden.dtype, torch.float32)
        # The log-sum-exp is kept in two parts: as one number, a shift of the logits by 1e4 would cost p three digits.
        logp, entropy, largest, log_total = (hidden.new_empty(len(hidden), dtype=out_dtype) for _ in range(4))
        for rows in _chunks(len(hidden), len(weight), chunk_bytes):
            z, outside = _chunk_logits(hidden, weight, temperature, kept, rows)
            largest[rows] = z.amax(1)
            z -= largest[rows].unsqueeze(1)
            target = z.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            e = z.exp()
            total = e.sum(1)
            if outside is not None:
                z.masked_fill_(outside, 0.0)  # e is 0 there, and 0 · -inf would be NaN
            log_total[rows] = total.log()
            logp[rows] = target - log_total[rows]
            entropy[rows] = log_total[rows] - e.mul_(z).sum(1) / total
        ctx.save_for_backward(hidden, weight, targets, largest, log_total, entropy)
        ctx.temperature, ctx.kept, ctx.chunk_bytes = temperature, kept, chunk_bytes
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        """dz_j = c·1[j = target] - p_j (c + e (log p_j + H)), with c, e the incoming gradients, z = logits /
        temperature."""
        hidden, weight, targets, largest, log_total, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), len(weight), ctx.chunk_bytes):
            z, outside = _chunk_logits(hidden, weight, ctx.temperature, ctx.kept, rows)
            z -= largest[rows].unsqueeze(1)
            z -= log_total[rows].unsqueeze(1)
            p = z.exp()
            if outside is not None:
                z.masked_fill_(outside, 0.0)
            c, e = grad_logp[rows].unsqueeze(1), grad_entropy[rows].unsqueeze(1)
            dz = z.add_(entropy[rows].unsqueeze(1)).mul_(e).add_(c).mul_(p).neg_()
            dz.scatter_add_(1, targets[rows].unsqueeze(1), c)
            dz = _scaled(dz, _rows_of(ctx.temperature, rows)).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = dz @ weight
            if d_weight is not None:
                d_weight += dz.t() @ hidden[rows]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _chunks(n: int, vocab: int, chunk_bytes: int):
    step = max(1, chunk_bytes // (4 * vocab))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _rows_of(temperature, rows: slice):
    return temperature[rows] if isinstance(temperature, torch.Tensor) else temperature


def _chunk_logits(hidden, weight, temperature, kept: Kept | None, rows: slice):
    """Scaled logits of some rows, [n, V], a fresh tensor; and where the kept set excludes them."""
    z = F.linear(hidden[rows], weight)
    z = _scaled(z, _rows_of(temperature, rows))
    if kept is None:
        return z, None
    outside = ~kept.mask(rows.start, rows.stop, len(weight))
    return z.masked_fill_(outside, float("-inf")), outside
