"""Log-probability and entropy of given tokens from logits: the definition, and two row sweeps that do the same.

The forward sweep reads a row once and keeps a running maximum, Σ e^x and Σ x·e^x of shifted logits; the backward sweep
reads it again and writes its gradient, over the logits if that is asked for. Nothing of size [N, V] is made in between.

Shapes: N rows, V vocabulary. For any dtype of the logits, all that follows is fp32 (fp64 for fp64 logits).
A head may have more rows than there are tokens, so that its size is round: the first `active` of the V logits count and
the rest is as if it were not there. Rows keep their stride V, since a slice would cost the kernels their 16-byte loads.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend as run
from .backend import Backend, tl, triton, use_triton

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 4096  # logits of a tile, 16 a thread
LANE = tl.constexpr(8)  # logits that a thread reads side by side, one 16-byte load of bf16

# ---- the definition --------------------------------------------------------------------------------------------------


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    kept: Tensor | None = None,
    *,
    active: int | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Give log p(target) and the entropy of p = softmax(logits[:, :active] / temperature) over the kept set.

    logits [N, V], targets [N], temperature a number or [N], kept bool [N, V] -> (logp [N], entropy [N] in nats).
    The gradient of logits from `active` on is exactly 0; None makes all of them count.
    `inplace` lets the kernel's backward pass write the gradient over the logits: whoever needs them again gets an error
    from autograd. The definition never overwrites.
    """
    check_rows(logits.shape[:1], logits, targets=targets, temperature=temperature)
    if kept is not None and kept.shape != logits.shape:
        raise ValueError(f"kept has shape {list(kept.shape)}, the logits {list(logits.shape)}: they must be the same")
    active = active_entries(active, logits.shape[1])
    if use_triton(backend, logits):
        logits = logits if kept is None else logits.masked_fill(~kept, float("-inf"))
        return _TokenLogprobs.apply(logits, targets, temperature, inplace, active)
    z = scaled(logits[:, :active], temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if kept is not None:
        z = z.masked_fill(~kept[:, :active], float("-inf"))
    logp = z.log_softmax(-1)
    p = logp.exp()
    # 0 · log 0 = 0, in the gradient too: a `where` around the product would still differentiate 0 · -inf
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def active_entries(active: int | None, vocab: int) -> int | None:
    """Check how many of the logits count; None where all of them do, ValueError for a number that cannot be."""
    if active is not None and not 0 < active <= vocab:
        raise ValueError(f"active = {active}: of {vocab} logits at least one must count, and at most all")
    return None if active == vocab else active


def scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(temperature, Tensor):
        return z / temperature.to(z.dtype).unsqueeze(1)
    return z if temperature == 1.0 else z / temperature


def check_rows(rows: torch.Size, matrix: Tensor, **vectors) -> None:
    """Refuse what is not one number a row, by its name, with a ValueError."""
    if matrix.dim() != 2:
        raise ValueError(f"expected a matrix with a row a token, got shape {list(matrix.shape)}")
    for name, x in vectors.items():
        if isinstance(x, Tensor) and x.shape != rows:
            raise ValueError(f"{name} has shape {list(x.shape)}, and there are {rows[0]} rows: pass one number a row")
    t = vectors.get("temperature")
    if isinstance(t, int | float) and not t > 0:
        raise ValueError(f"temperature = {t}: log-probs need one above 0")


# ---- the sweeps ------------------------------------------------------------------------------------------------------


@triton.jit
def mask_inactive(z, column, active):
    """Give the logits z of some columns, -inf where no token has that id. They are loaded up to the row's round end all
    the same: under a mask that ends elsewhere they would be loaded one by one."""
    return z if active is None else tl.where(column < active, z, float("-inf"))


@triton.jit
def row_stats(row, vocab, active, inv_t, BLOCK: tl.constexpr):
    """Read a row z once -> max z, log Σ e^{(z − max)/T} and the entropy; `row` points to its first logit.

    Each lane keeps sums of its own over the eight logits that it reads at a time, so that no thread waits for another
    before the row's end; the next tile is on its way while one is summed.
    """
    k = inv_t * LOG2E
    offset = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    largest = tl.full([BLOCK // LANE], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)  # Σ e^{(z − max)/T}
    weighted = tl.zeros([BLOCK // LANE], tl.float32)  # Σ e^{(z − max)/T}·(z − max)
    tile = tl.load(row + offset, mask=offset < vocab, other=float("-inf"))
    for start in range(BLOCK, vocab + BLOCK, BLOCK):
        z = mask_inactive(tile.to(tl.float32), start - BLOCK + offset, active)
        tile = tl.load(row + start + offset, mask=start + offset < vocab, other=float("-inf"))
        new = tl.maximum(largest, tl.max(z, 1))
        # What has only seen -inf has no maximum to shift by.
        shift = tl.where(largest == float("-inf"), 0.0, largest - new)
        d = z - tl.where(new == float("-inf"), 0.0, new)[:, None]
        e = tl.exp2(d * k)
        decay = tl.exp2(shift * k)
        weighted = decay * (weighted + total * shift) + tl.sum(tl.where(e > 0, e * d, 0.0), 1)
        total = decay * total + tl.sum(e, 1)
        largest = new
    top = tl.max(largest, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest - top)
    decay = tl.exp2(shift * k)
    sum_e = tl.sum(decay * total, 0)
    log_total = tl.log(sum_e)
    return top, log_total, log_total - inv_t * tl.sum(decay * (weighted + total * shift), 0) / sum_e


@triton.jit
def row_gradient(
    row, out, vocab, active, target, inv_t, largest, log_total, entropy, c, e, softcap,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out_j = (1/T)[c·(1[j = target] − p_j) − e·p_j(log p_j + H)]; where c = e = 0, zeros without reading.

    Logits that are softcap·tanh(x/softcap) get the gradient by x, with the factor 1 − (z/softcap)². REVERSE sweeps from
    the row's end, which a forward sweep just before has left in the cache.
    """
    silent = (c == 0) & (e == 0)
    readable = tl.where(silent, 0, vocab)
    offset = tl.arange(0, BLOCK)
    tiles = tl.cdiv(vocab, BLOCK)
    column = (tiles - 1 if REVERSE else 0) * BLOCK + offset
    tile = tl.load(row + column, mask=column < readable, other=float("-inf"))
    for _ in range(0, tiles):
        here = column
        z = mask_inactive(tile.to(tl.float32), here, active)
        column += -BLOCK if REVERSE else BLOCK
        tile = tl.load(row + column, mask=(column >= 0) & (column < readable), other=float("-inf"))
        logp = (z - largest) * inv_t - log_total
        p = tl.exp2(logp * LOG2E)
        g = tl.where(here == target, c, 0.0) - tl.where(p == 0, 0.0, p * (c + e * (logp + entropy)))
        if softcap is not None:
            capped = tl.where(z == float("-inf"), 0.0, z) / softcap
            g *= 1.0 - capped * capped
        g = tl.where(silent, 0.0, g * inv_t)
        if active is not None:
            g = tl.where(here < active, g, 0.0)  # also in a row of NaN
        tl.store(out + here, g.to(out.dtype.element_ty), mask=here < vocab)


@triton.jit
def token_at(row, target, vocab, active):
    """Load the target's logit; NaN for a target outside the vocabulary, where PyTorch raises."""
    inside = (target >= 0) & (target < (vocab if active is None else active))
    return tl.load(row + tl.where(inside, target, 0), mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def inverse_temperature(temperature, i, PER_ROW: tl.constexpr):
    return 1.0 / (tl.load(temperature + i).to(tl.float32) if PER_ROW else temperature)


@triton.jit
def _stats_kernel(
    logits, stride, targets, temperature, logp, entropy, largest, log_total, vocab, active,
    PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)  # N·V passes 2³¹
    row = logits + i * stride
    inv_t = inverse_temperature(temperature, i, PER_ROW)
    top, log_sum, h = row_stats(row, vocab, active, inv_t, BLOCK)
    tl.store(logp + i, (token_at(row, tl.load(targets + i), vocab, active) - top) * inv_t - log_sum)
    tl.store(entropy + i, h)
    tl.store(largest + i, top)
    tl.store(log_total + i, log_sum)


@triton.jit
def _gradient_kernel(
    logits, stride, rows, out, out_stride, targets, temperature, largest, log_total, entropy, c, e,
    vocab, active, softcap,
    PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    i = place if rows is None else tl.load(rows + place).to(tl.int64)
    row_gradient(
        logits + i * stride, out + place * out_stride, vocab, active, tl.load(targets + i),
        inverse_temperature(temperature, i, PER_ROW), tl.load(largest + i), tl.load(log_total + i),
        tl.load(entropy + i), tl.load(c + i), tl.load(e + i), softcap, False, BLOCK,
    )  # fmt: skip


class Stats(NamedTuple):
    """Hold numbers of each row, fp32 [N]. log Σ e^{z/T} comes in two parts, log p_j = (z_j − largest)/T − log_total,
    since a shift of the logits by 1e4 would cost their sum three digits."""

    logp: Tensor
    entropy: Tensor
    largest: Tensor
    log_total: Tensor


def tiling(vocab: int, most: int = BLOCK) -> dict[str, int]:
    """Choose the logits of a tile, and the warps that give each thread 16 of them: two 16-byte loads of bf16."""
    block = max(256, min(most, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def kernel_arguments(targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """Give both as the kernels read them: side by side, or one number."""
    per_row = isinstance(temperature, Tensor)
    return targets.contiguous(), temperature.contiguous() if per_row else float(temperature)


def empty_vectors(rows: Tensor, count: int) -> list[Tensor]:
    """Allocate vectors of fp32 numbers, one a row. Each is an allocation of its own: Triton compiles anew for what is
    not aligned, as parts of a larger tensor would be for some numbers of rows."""
    return [rows.new_empty(len(rows), dtype=torch.float32) for _ in range(count)]


def stats_triton(logits: Tensor, targets: Tensor, temperature: float | Tensor, active: int | None = None) -> Stats:
    """Compute `Stats` in one read of logits [N, V], whose rows may have any stride."""
    out = Stats(*empty_vectors(logits, len(Stats._fields)))
    if len(logits):
        args = (logits, logits.stride(0), *kernel_arguments(targets, temperature), *out, logits.shape[1], active)
        per_row = isinstance(temperature, Tensor)
        run.launch(_stats_kernel, (len(logits),), *args, PER_ROW=per_row, **tiling(logits.shape[1]))
    return out


def gradient_triton(
    logits, targets, temperature, stats: Stats, c, e, out: Tensor, rows=None, softcap=None, active=None
) -> None:
    """Write ∂L/∂z, with c = ∂L/∂logp and e = ∂L/∂H [N], into `out` [N, V], which may be `logits`; or of the given rows
    [n] alone, into [n, V], which may not. With `softcap`, z is what went into the cap."""
    if len(out):
        per_row = isinstance(temperature, Tensor)
        args = (logits, logits.stride(0), rows, out, out.stride(0), *kernel_arguments(targets, temperature))
        args += (stats.largest, stats.log_total, stats.entropy, c, e, logits.shape[1], active, softcap)
        run.launch(_gradient_kernel, (len(out),), *args, PER_ROW=per_row, **tiling(logits.shape[1]))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, inplace, active):
        logits = rows_together(logits)
        stats = stats_triton(logits, targets, temperature, active)
        ctx.save_for_backward(logits, targets, *stats)
        ctx.temperature, ctx.inplace, ctx.active = temperature, inplace, active
        return stats.logp, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, targets, *stats = ctx.saved_tensors
        out = logits if ctx.inplace else logits.new_empty(logits.shape)
        c, e = grad_logp.contiguous(), grad_entropy.contiguous()  # a sum's gradient comes as an expanded number
        gradient_triton(logits, targets, ctx.temperature, Stats(*stats), c, e, out, active=ctx.active)
        # Autograd does not see what a kernel writes: the version alone tells it that these logits are gone.
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None


def rows_together(logits: Tensor) -> Tensor:
    """Give the matrix with the logits of a row side by side, and no two rows in one place: they may be overwritten."""
    apart = logits.stride(0) >= logits.shape[1] or len(logits) < 2
    return logits if logits.stride(1) == 1 and apart else logits.contiguous()
