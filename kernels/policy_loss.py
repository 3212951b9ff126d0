"""The policy loss on logits: `token_loss` behind `token_logprobs`, and one launch that goes from logits to loss and
gradient.

A row is swept once for its statistics; the loss and its derivatives follow at once, and a second sweep from the row's
end, which the cache still holds, writes the gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend as run
from .backend import Backend, tl, triton, use_triton
from .logprobs import (
    BLOCK,
    active_entries,
    check_rows,
    empty_vectors,
    inverse_temperature,
    kernel_arguments,
    row_gradient,
    row_stats,
    rows_together,
    tiling,
    token_at,
    token_logprobs,
)
from .per_token import TokenInputs, TokenLoss, kernel_inputs, kernel_options, token_loss, token_terms, token_values

FUSED_BYTES = 32 << 10  # of logits in a tile, where one program has a multiprocessor to itself: 32 warps of bf16


def fused_policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    options: TokenLoss,
    *,
    temperature: float | Tensor = 1.0,
    active: int | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
    **inputs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum `token_loss` over rows of logits [N, V], with its gradient; log-prob and entropy of the targets without.

    targets, advantages and weights [N] -> (loss, logp [N], entropy [N]); `inputs` are the others of `TokenInputs` [N]
    by their names: old_logp, ref_logp, rollout_logp, log_ratio, omega. Weights are what a token counts in the loss, 1/N
    each for a mean; a row of weight 0 is not read, its logp and entropy are 0. The first `active` logits of a row
    count. `inplace` writes the gradient over the logits, in the forward pass already: whoever needs them later gets an
    error from autograd; the definition never overwrites.
    """
    check_rows(logits.shape[:1], logits, targets=targets, temperature=temperature)
    inputs = TokenInputs(advantages, weights, **inputs).checked(options, len(logits))
    active = active_entries(active, logits.shape[1])
    if use_triton(backend, logits):
        gradient = logits.requires_grad and torch.is_grad_enabled()
        return _FusedPolicyLoss.apply(logits, targets, temperature, options, inputs, gradient, inplace, active)
    on = inputs.weights != 0
    # A row of weight 0 may hold anything: NaN · 0 would reach its gradient.
    logits, targets = torch.where(on[:, None], logits, 0), torch.where(on, targets, 0)
    logp, entropy = token_logprobs(logits, targets, temperature, active=active, backend="torch")
    t = token_loss(options, logp.detach(), entropy.detach(), inputs)
    # Both slopes are worth 0, and their gradients are c and e.
    slopes = torch.where(on, t.c * (logp - logp.detach()) + t.e * (entropy - entropy.detach()), 0)
    return t.loss.sum() + slopes.sum(), torch.where(on, logp.detach(), 0), torch.where(on, entropy.detach(), 0)


# ---- in one launch ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _fused_kernel(
    logits, stride, out, out_stride, targets, temperature, t, o, loss, logp, entropy, rows, vocab, active,
    PER_ROW: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take a row after the other: statistics in one sweep, the loss, the gradient in a second sweep, from the end."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        i = tl.cast(index, tl.int64)  # N·V passes 2³¹
        row = logits + i * stride
        target = tl.load(targets + i)
        inv_t = inverse_temperature(temperature, i, PER_ROW)
        at_target = token_at(row, target, vocab, active)
        values = token_values(t, i)
        on = values[1] != 0
        # A masked row has length 0: it may hold anything and is not read.
        largest, log_total, h = row_stats(row, tl.where(on, vocab, 0), active, inv_t, BLOCK)
        lp = tl.where(on, (at_target - largest) * inv_t - log_total, 0.0)
        h = tl.where(on, h, 0.0)
        policy, kl, bonus, c, e, _, _, _, _ = token_terms(lp, h, t, values, o)
        tl.store(loss + i, policy + kl + bonus)
        tl.store(logp + i, lp)
        tl.store(entropy + i, h)
        if GRADIENT:
            row_gradient(
                row, out + i * out_stride, vocab, active, target, inv_t, largest, log_total, h, c, e, None, True, BLOCK
            )


def _programs(logits: Tensor) -> int:
    """Take one program for each multiprocessor, so that the second sweep over a row finds it in the cache: on an H200
    the rows under way, of 152k bf16 logits, fill 40 of its 50 MB."""
    return torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 4


class _FusedPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, options, inputs: TokenInputs, gradient, inplace, active):
        logits = rows_together(logits)
        n, vocab = logits.shape
        loss, logp, entropy = empty_vectors(logits, 3)
        out = logits if inplace or not gradient else logits.new_empty(n, vocab)
        if n:
            per_row = isinstance(temperature, Tensor)
            args = (logits, logits.stride(0), out, out.stride(0), *kernel_arguments(targets, temperature))
            args += (kernel_inputs(options, inputs), kernel_options(options), loss, logp, entropy, n, vocab, active)
            tiles, grid = tiling(vocab, FUSED_BYTES // logits.element_size()), (min(n, _programs(logits)),)
            run.launch(_fused_kernel, grid, *args, PER_ROW=per_row, GRADIENT=gradient, **tiles)
        if gradient:
            # Autograd does not see what the kernel wrote: the version tells whoever still needs the logits.
            if inplace:
                torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(out)
        ctx.mark_non_differentiable(logp, entropy)
        return loss.sum(), logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_logp, grad_entropy):
        (out,) = ctx.saved_tensors  # refuses what a first backward pass has scaled already
        scale_(out, grad_loss)
        return out, None, None, None, None, None, None, None


# ---- the incoming gradient -------------------------------------------------------------------------------------------


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x by a number on the device, in place. Where it is 1, as for `loss.backward()`, nothing is read or
    written, and the host need not wait to know."""
    if use_triton("auto", x) and x.is_contiguous():
        run.launch(_scale_kernel, (triton.cdiv(x.numel(), 8 * BLOCK),), x, factor.float(), x.numel(), BLOCK=BLOCK)
        torch.autograd.graph.increment_version(x)
    elif factor != 1:
        x.mul_(factor)
    else:
        # As if it had been scaled: a second backward pass must fail, whatever the factor of the first.
        torch.autograd.graph.increment_version(x)


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        for k in range(8):
            i = (tl.program_id(0).to(tl.int64) * 8 + k) * BLOCK + tl.arange(0, BLOCK)
            tl.store(x + i, (tl.load(x + i, mask=i < size) * f).to(x.dtype.element_ty), mask=i < size)
