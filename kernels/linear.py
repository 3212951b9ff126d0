"""Log-probs and the policy loss from hidden states: the head's product and everything behind it, in chunks of rows.

The logits of a chunk are made, read for their statistics, overwritten with their gradient and multiplied back at once,
so the [N, V] matrix never exists and nothing is computed twice: 6·N·V·D operations for loss and gradient, where
recomputation takes 8. Rows whose coefficients are exactly zero leave the products that are still to come, with no
error, unlike filtering by size: masked rows and rows without a signal leave all of them, a clipped row, which only its
logits tell, those of the gradient.

Shapes: N rows, V vocabulary, D width, n rows of a chunk. The two backends differ in who does the sweeps over a chunk of
logits, Triton's kernels or PyTorch on slices that fit a CPU's cache.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .logprobs import Stats, active_entries, check_rows, gradient_triton, stats_triton
from .per_token import Terms, TokenInputs, TokenLoss, token_loss, token_loss_triton
from .policy_loss import scale_

WORKSPACE = {"cpu": 128 << 20, "cuda": 512 << 20}  # bytes of a chunk of logits and of its gradient
SLICE = 1 << 19  # logits that PyTorch sweeps at a time
# A CPU's matrix library adds in another order for other numbers of rows (few of them, no multiple of 16, some sizes
# with bf16 tiles or several threads), so a row's bits would depend on how many share its product. Where they must not,
# every product has TILE rows, and a row gives the same in each place of them. A GPU is left to its library.
TILE = 192
MIN_ROWS = 16


class Kept(NamedTuple):
    """Hold the tokens that truncated sampling kept, a list a row: that of row i is `ids[offsets[i] : offsets[i + 1]]`,
    and an empty one means all."""

    ids: Tensor  # [K] int
    offsets: Tensor  # [N + 1] int

    def outside(self, rows: Tensor, vocab: int) -> Tensor:
        """Mark [len(rows), V] the tokens that could not be drawn."""
        start, count = self.offsets[rows].long(), (self.offsets[rows + 1] - self.offsets[rows]).long()
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), count)
        within = torch.arange(len(row), device=rows.device) - (count.cumsum(0) - count)[row]
        out = torch.ones(len(rows), vocab, dtype=torch.bool, device=rows.device)
        out[row, self.ids[start[row] + within].long()] = False
        out[count == 0] = False
        return out


class Head(NamedTuple):
    """Compute softcap(hidden @ weight.T + bias) for some rows at a time, and work on it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None  # logits become cap·tanh(logits/cap)
    dtype: torch.dtype  # of the logits
    temperature: float | Tensor
    kept: Kept | None
    active: int | None  # the logits of a row that count, its first; None = all V
    workspace: int
    triton: bool

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Cut the numbers of the rows into chunks of about one size."""
        return rows.chunk(-(-len(rows) // self.chunk_rows)) if len(rows) else ()

    @property
    def chunk_rows(self) -> int:
        """Count the rows of a chunk: whole tiles, or a smaller one where the workspace has no room for TILE rows."""
        cost = self.dtype.itemsize + (self.weight.dtype.itemsize if self.dtype != self.weight.dtype else 0)
        rows = self.workspace // (cost * len(self.weight))
        step = next((step for step in (TILE, 3 * MIN_ROWS) if step <= rows), MIN_ROWS)
        return max(rows // step * step, MIN_ROWS)

    def logits(self, hidden: Tensor, rows: Tensor, buffer: Tensor | None) -> Tensor:
        """Make the logits of some rows, [n, V], in the memory of `buffer` where that has room."""
        n, tile = len(rows), min(TILE, self.chunk_rows)
        h = pad_rows(hidden[rows], tile)
        # One buffer for all chunks, so that two of them never exist at once.
        if buffer is None or len(buffer) < len(h):
            buffer = h.new_empty(len(h), len(self.weight), dtype=self.dtype)
        multiply = product if h.is_cuda else partial(tiled_product, tile=tile)
        multiply(h, self.weight.t(), z := buffer[: len(h)])
        z = z[:n]
        if self.bias is not None:
            z += self.bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.kept is None else z.masked_fill_(self.kept.outside(rows, len(self.weight)), float("-inf"))

    def temperature_of(self, rows: Tensor) -> float | Tensor:
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature

    def stats(self, z: Tensor, targets: Tensor, rows: Tensor) -> Stats:
        return (stats_triton if self.triton else stats_torch)(z, targets[rows], self.temperature_of(rows), self.active)

    def gradient(
        self, z: Tensor, targets: Tensor, rows: Tensor, stats: Stats, c: Tensor, e: Tensor, live: Tensor
    ) -> Tensor:
        """Give ∂L/∂z of the live ones among the rows of a chunk, [len(live), V], in the dtype of the weights."""
        # Over the logits where that can be: another [n, V] would double the workspace. Not where rows are left out in
        # Triton, whose programs run in any order: one would overwrite a row that another has yet to read.
        inplace = z.dtype == self.weight.dtype and (len(live) == len(z) or not self.triton)
        out = z[: len(live)] if inplace else z.new_empty(len(live), z.shape[1], dtype=self.weight.dtype)
        write = gradient_triton if self.triton else gradient_torch
        live = None if len(live) == len(z) else live
        write(z, targets[rows], self.temperature_of(rows), stats, c, e, out, live, self.softcap, self.active)
        return out


def pad_rows(rows: Tensor, multiple: int = MIN_ROWS) -> Tensor:
    """Add rows of zeros up to the next multiple, on a CPU only."""
    missing = -len(rows) % multiple if rows.device.type == "cpu" else 0
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def tiled_product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, tile: int = TILE) -> Tensor:
    """Compute out = a @ b + bias on a CPU, `tile` rows at a time, in the dtype of `out`."""
    a, b = a.to(out.dtype), b.to(out.dtype)
    for x, y in zip(a.split(tile), out.split(tile), strict=True):
        torch.mm(x, b, out=y) if bias is None else torch.addmm(bias, x, b, out=y)
    return out


def product(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> None:
    """Compute out = beta·out + a @ b, accumulated in fp32 and rounded once, to the dtype of `out`.

    A GPU's matrix units give fp32 for bf16 operands; on a CPU such operands are converted (fp32 out) first.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def stats_torch(z: Tensor, targets: Tensor, temperature: float | Tensor, active: int | None = None) -> Stats:
    """Compute `Stats` as `stats_triton` does, of fp64 logits in fp64."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    out = Stats(*(z.new_empty(len(z), dtype=dtype) for _ in Stats._fields))
    for part in slices(z):
        n = len(z[part])
        # Several threads would share the sum of a row that comes alone.
        raw = z[part, :active].expand(max(n, 2), -1).to(dtype)
        largest = raw.amax(1, keepdim=True)
        t = temperature[part].to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature
        d = raw - largest
        target = d.gather(1, targets[part].unsqueeze(1)).squeeze(1)
        e = d.exp() if isinstance(t, float) and t == 1 else (d / t).exp_()
        total = e.sum(1)
        weighted = e.mul_(d).sum(1)
        if weighted.isnan().any():  # 0 · -inf, unless it is NaN that came in
            d.clamp_(min=-1e30)
            weighted = (d / t).exp_().mul_(d).sum(1)
        t = t.squeeze(1) if isinstance(t, Tensor) else t
        largest, total, weighted = largest[:n, 0], total[:n], weighted[:n]
        out.largest[part], out.log_total[part] = largest, total.log()
        out.logp[part] = target / t - out.log_total[part]
        out.entropy[part] = out.log_total[part] - weighted / (total * t)
    return out


def gradient_torch(
    z, targets, temperature, stats: Stats, c, e, out: Tensor, rows=None, softcap=None, active=None
) -> None:
    """Write ∂L/∂z as `gradient_triton` does; `out` may be the first rows of z: a row is read before it is written."""
    active = z.shape[1] if active is None else active
    for part in slices(out):
        chosen = part if rows is None else rows[part]
        raw = z[chosen, :active].to(stats.logp.dtype)

        def column(x, chosen=chosen):
            return x[chosen].unsqueeze(1)

        t = column(temperature).to(raw.dtype) if isinstance(temperature, Tensor) else temperature
        cold = isinstance(t, Tensor) or t != 1
        logp = raw - column(stats.largest)
        logp = (logp.div_(t) if cold else logp).sub_(column(stats.log_total))
        if e[chosen].any():
            p = logp.clamp_(min=-1e30).exp()  # 0 · -inf would be NaN
            p.mul_(logp.add_(column(stats.entropy)).mul_(-column(e)).sub_(column(c)))
        else:
            p = logp.exp_().mul_(-column(c))
        dz = p.scatter_add_(1, column(targets), column(c))
        if cold:
            dz.div_(t)
        if softcap is not None:
            dz.mul_(1 - (raw.masked_fill(raw == float("-inf"), 0) / softcap) ** 2)
        silent = ((c[chosen] == 0) & (e[chosen] == 0)).unsqueeze(1)
        out[part, :active] = dz.masked_fill_(silent, 0) if silent.any() else dz
        out[part, active:] = 0


def slices(z: Tensor):
    step = max(1, SLICE // max(z.shape[1], 1))
    return (slice(start, min(start + step, len(z))) for start in range(0, len(z), step))


# ---- log-probs -------------------------------------------------------------------------------------------------------


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    kept: Kept | None = None,
    *,
    active: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    workspace: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Get `token_logprobs(hidden @ weight.T + bias, targets, ...)` in chunks of `workspace` bytes of logits at most.

    hidden [N, D], weight [V, D], targets [N] -> (logp [N], entropy [N]). Gradients reach hidden, weight and bias; the
    backward pass makes the logits again, for rows whose incoming gradient is not zero. Rows of the weight from `active`
    on are no token's: no probability falls on them, and their gradient is exactly 0. logits_dtype, where not given:
    fp32 on a GPU, because rounding them to bf16 is what parts a trainer from its sampler; that of `hidden` on a CPU.
    """
    more = {"active": active, "bias": bias, "softcap": softcap, "logits_dtype": logits_dtype, "workspace": workspace}
    head = _head(hidden, weight, targets, temperature, kept, backend=backend, **more)
    return _LinearTokenLogprobs.apply(hidden, weight, bias, targets, head)


def _head(
    hidden, weight, targets, temperature=1.0, kept=None, *,
    active=None, bias=None, softcap=None, logits_dtype=None, workspace=None, backend="auto",
) -> Head:  # fmt: skip
    check_rows(hidden.shape[:1], hidden, targets=targets, temperature=temperature)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, weight is {list(weight.shape)} {weight.dtype}: expected "
            "[N, D] and [V, D] of one dtype"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}: expected one number for each of {len(weight)} tokens")
    if kept is not None and len(kept.offsets) != len(hidden) + 1:
        raise ValueError(f"kept holds {len(kept.offsets) - 1} sets of tokens, and there are {len(hidden)} rows")
    if workspace is not None and workspace < 1:
        raise ValueError(f"workspace = {workspace}: give the bytes of a chunk of logits")
    triton = use_triton(backend, hidden)
    dtype = logits_dtype or (torch.float32 if hidden.is_cuda and hidden.dtype != torch.float64 else hidden.dtype)
    workspace = workspace or WORKSPACE.get(hidden.device.type, WORKSPACE["cuda"])
    detached = None if bias is None else bias.detach()
    active = active_entries(active, len(weight))
    return Head(weight.detach(), detached, softcap, dtype, temperature, kept, active, workspace, triton)


class _Gradients:
    """Add up the gradients of the chunks by hidden states, weight and bias, as far as each is wanted."""

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, ...]):
        self.hidden, self.head = hidden, head
        weight, bias = head.weight, head.bias
        # A sum over many chunks in bf16 would lose what the later ones add.
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.by_hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Not filled with zeros: the first product overwrites it (beta = 0), a pass over [V, D] less.
        self.by_weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        self.by_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
        self.empty = True

    def add(self, dz: Tensor, rows: Tensor) -> None:
        """Multiply dz [n, V] of the rows back."""
        if self.by_hidden is not None:
            padded = pad_rows(dz)
            part = self.hidden.new_empty(len(padded), self.hidden.shape[1])
            product(padded, self.head.weight, part)
            self.by_hidden[rows] = part[: len(dz)]
        if self.by_weight is not None:
            product(dz.t(), self.hidden[rows], self.by_weight, beta=0.0 if self.empty else 1.0)
        if self.by_bias is not None:
            self.by_bias += dz.sum(0, dtype=self.by_bias.dtype)
        self.empty = False

    def result(self) -> tuple[Tensor | None, ...]:
        if self.empty and self.by_weight is not None:
            self.by_weight.zero_()
        by_weight = None if self.by_weight is None else self.by_weight.to(self.head.weight.dtype)
        by_bias = None if self.by_bias is None else self.by_bias.to(self.head.bias.dtype)
        return self.by_hidden, by_weight, by_bias


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head: Head):
        parts, buffer = [], None
        for rows in head.chunks(torch.arange(len(hidden), device=hidden.device)):
            buffer = z = head.logits(hidden, rows, buffer)
            parts.append(head.stats(z, targets, rows))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        stats = (
            Stats(*map(torch.cat, zip(*parts, strict=True))) if parts else Stats(*hidden.new_empty(4, 0, dtype=dtype))
        )
        ctx.save_for_backward(hidden, weight, targets, *stats)
        ctx.head = head
        return stats.logp, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, c, e):
        hidden, _, targets, *stats = ctx.saved_tensors
        head, sums, buffer = ctx.head, _Gradients(hidden, ctx.head, ctx.needs_input_grad), None
        for rows in head.chunks(((c != 0) | (e != 0)).nonzero().squeeze(1)):
            buffer = z = head.logits(hidden, rows, buffer)
            own = Stats(*(x[rows] for x in stats))
            every = torch.arange(len(rows), device=rows.device)
            sums.add(head.gradient(z, targets, rows, own, c[rows], e[rows], every), rows)
        return *sums.result(), None, None


# ---- the policy loss -------------------------------------------------------------------------------------------------


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, weights: Tensor, options: TokenLoss, **more
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `fused_policy_loss` from hidden states: the sum of `token_loss` over the rows, its gradient beside it.

    hidden [N, D], weight [V, D], bias [V], the rest [N] -> (loss, logp [N], entropy [N]); gradients reach hidden,
    weight and bias. `more` are the other `TokenInputs` (old_logp, ref_logp, rollout_logp, log_ratio, omega) and the
    options of `linear_token_logprobs`, by their names. A row that can have no gradient (weight 0; advantage 0 where
    nothing else pulls) is not computed: its logp and entropy are 0. The gradient is rounded to the dtype of `hidden`
    before a loss scaler could enlarge it: use bf16 or fp32, not fp16.
    """
    given = {name: more.pop(name) for name in TokenInputs._fields if name in more}
    inputs = TokenInputs(advantages, weights, **given)
    return linear_policy_terms(hidden, weight, targets, inputs, options, **more)[:3]


def linear_policy_terms(
    hidden: Tensor, weight: Tensor, targets: Tensor, inputs: TokenInputs, options: TokenLoss, **head
) -> tuple[Tensor, Tensor, Tensor, Terms]:
    """Compute `linear_policy_loss` and keep the terms of each token [N], so that metrics need no second evaluation. All
    terms of a row that is not computed are 0."""
    bias, inputs = head.get("bias"), inputs.checked(options, len(hidden))
    head = _head(hidden, weight, targets, **head)
    alive = inputs.weights != 0
    if options.follows_advantage:
        alive &= inputs.advantages != 0
    alive = alive.nonzero().squeeze(1)
    # Asked here, because inside the forward of a Function gradients are always off.
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, logp, entropy, *terms = _LinearPolicyLoss.apply(
        hidden, weight, bias, targets, head, options, inputs, alive, wanted
    )
    return loss, logp, entropy, Terms(*terms)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head: Head, options, inputs: TokenInputs, alive, wanted):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy, *parts = hidden.new_zeros(8, len(hidden), dtype=dtype)
        terms = Terms(*parts, *hidden.new_zeros(3, len(hidden), dtype=torch.bool))
        sums, buffer, z = _Gradients(hidden, head, wanted), None, None
        evaluate = token_loss_triton if head.triton else token_loss
        for rows in head.chunks(alive):
            buffer = z = head.logits(hidden, rows, buffer)
            stats = head.stats(z, targets, rows)
            t = evaluate(options, stats.logp, stats.entropy, inputs.map(lambda x, rows=rows: x[rows]))
            for whole, part in zip((logp, entropy, *terms), (stats.logp, stats.entropy, *t), strict=True):
                whole[rows] = part
            # A clipped token has no gradient either, which only its logits tell: its row leaves the products below.
            live = ((t.c != 0) | (t.e != 0)).nonzero().squeeze(1) if any(wanted) else alive[:0]
            if len(live):
                sums.add(head.gradient(z, targets, rows, stats, t.c, t.e, live), rows[live])
        del buffer, z  # before the sum by weight is rounded to the dtype of the weight
        ctx.gradients = sums.result()
        ctx.mark_non_differentiable(logp, entropy, *terms)
        return terms.loss.sum(), logp, entropy, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *others):
        # Given away, not kept: autograd would copy what it does not own alone, [V, D] in fp32.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_policy_loss: its gradient was handed out in a first backward pass already")
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_loss)
        return *gradients, None, None, None, None, None, None
