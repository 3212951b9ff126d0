"""Backward recurrences along time: x_t = b_t + a_t·x_{t+1}, and GAE, which is two of them in one sweep.

Inside everything is float64: returns add up thousands of terms, and the scans cost nothing beside a model.
"""

import torch
from torch import Tensor

from . import backend as run
from .backend import Backend, tl, triton, use_triton, whole_rows

BLOCK = 1024  # steps of a row that are scanned at once


# ---- the definitions -------------------------------------------------------------------------------------------------


@torch.no_grad()
def suffix_scan(a: Tensor, b: Tensor, backend: Backend = "auto") -> Tensor:
    """Solve x_t = b_t + a_t·x_{t+1} along T with x_T = 0; a, b [B, T] -> [B, T] in the dtype of b.

    By doubling, log₂ T steps on whole tensors in the dtype that is given; on a GPU one program a row, in float64.
    """
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"suffix_scan: a is {list(a.shape)} and b {list(b.shape)}: both must be [B, T]")
    if _use_triton(backend, b):
        return _suffix_scan_triton(a, b)

    def ahead(x, n):  # x_{t+n}, 0 past the end
        return torch.nn.functional.pad(x[:, n:], (0, n))

    n = 1
    while n < b.shape[1]:
        a, b, n = a * ahead(a, n), b + a * ahead(b, n), 2 * n
    return b


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Give A and A + V [B, T], 0 under the mask: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1} (1506.02438 eq. 16).

    λ = 0 is TD, λ = 1 is Monte Carlo minus V. V after the last counted token is bootstrap [B]: 0 for a finished row
    (default 0 for all), V(s_T) for a truncated one. V and A are carried across holes in the mask, such as tool output.
    A row with a reward of NaN has A = 0. Results are fp32 at least, float64 where the values are.
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        shapes = f"{list(rewards.shape)}, {list(values.shape)} and {list(mask.shape)}"
        raise ValueError(f"gae: rewards, values and mask are {shapes}: all must be [B, T]")
    mask = mask.bool()
    dtype = torch.promote_types(values.dtype, torch.float32)
    if _use_triton(backend, values):
        return _gae_triton(rewards, values, mask, gamma, lam, bootstrap, dtype)
    scored = mask & ~(rewards.isnan() & mask).any(1, keepdim=True)
    V = torch.where(mask, values.double(), 0)
    after = V.new_zeros(len(V)) if bootstrap is None else bootstrap.double()
    hole = torch.nn.functional.pad((~mask).double(), (0, 1))
    ahead = suffix_scan(hole, torch.cat([V, after[:, None]], 1), "torch")[:, 1:]
    delta = torch.where(scored, rewards.double() + gamma * ahead - V, 0)
    A = suffix_scan(torch.ones_like(V).masked_fill(mask, gamma * lam), delta, "torch")
    A = torch.where(scored, A, 0)
    return A.to(dtype), torch.where(mask, A + V, 0).to(dtype)


def _use_triton(backend: Backend, x: Tensor) -> bool:
    return use_triton(backend, torch.empty(0, device=x.device))  # unlike other kernels, these take float64 too


# ---- the same in Triton ----------------------------------------------------------------------------------------------
# Blocks are read from the end of a row with falling addresses and scanned forwards, because associative_scan with
# reverse=True gives wrong results for operations that do not commute (triton-lang/triton issue 4362).


@triton.jit
def _compose(a, x, a_t, x_t):
    """Put the step (a_t, x_t) behind the steps (a, x) that were read before it."""
    return a * a_t, x_t + a_t * x


@triton.jit
def _scan(a, b, carry):
    """Give x of a block in the order of reading, and its last, which the next block starts from."""
    a, b = tl.associative_scan((a, b), 0, _compose)
    x = b + a * carry
    read = tl.arange(0, x.shape[0])
    return x, tl.sum(tl.where(read == x.shape[0] - 1, x, 0.0))


@triton.jit(do_not_specialize=["T"])
def _suffix_scan_kernel(a, b, x, a_stride, b_stride, T, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    carry = tl.full([], 0.0, tl.float64)
    for start in range(0, T, BLOCK):
        t = T - 1 - start - tl.arange(0, BLOCK)
        a_t = tl.load(a + row * a_stride + t, mask=t >= 0, other=0.0).to(tl.float64)
        b_t = tl.load(b + row * b_stride + t, mask=t >= 0, other=0.0).to(tl.float64)
        x_t, carry = _scan(a_t, b_t, carry)
        tl.store(x + row * T + t, x_t.to(x.dtype.element_ty), mask=t >= 0)


@triton.jit
def _extent(rewards, mask, T, BLOCK: tl.constexpr):
    """Count the steps of a row up to its last counted one, and tell whether a counted reward is NaN."""
    length = tl.full([], 0, tl.int32)
    broken = tl.full([], 0, tl.int32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        counted = tl.load(mask + t, mask=t < T, other=0) != 0
        r = tl.load(rewards + t, mask=counted, other=0.0).to(tl.float32)
        length = tl.maximum(length, tl.max(tl.where(counted, t + 1, 0)))
        broken = tl.maximum(broken, tl.max(tl.where(r != r, 1, 0)))
    return length, broken


@triton.jit(do_not_specialize=["T"])
def _gae_kernel(
    rewards, values, mask, bootstrap, rates, advantages, returns, r_stride, v_stride, m_stride, T, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    rewards, values, mask = rewards + row * r_stride, values + row * v_stride, mask + row * m_stride
    # Asked first: the sweep stores from the row's end, and a NaN at its start makes all of the row's A 0.
    length, broken = _extent(rewards, mask, T, BLOCK)
    gamma, gamma_lam = tl.load(rates), tl.load(rates + 1)
    V_carry = tl.full([], 0.0, tl.float64) if bootstrap is None else tl.load(bootstrap + row)
    A_carry = tl.full([], 0.0, tl.float64)
    for start in range(0, T, BLOCK):
        t = T - 1 - start - tl.arange(0, BLOCK)
        ahead = tl.load(mask + t + 1, mask=(t >= -1) & (t + 1 < length), other=0) != 0
        V_ahead = tl.load(values + t + 1, mask=ahead, other=0.0).to(tl.float64)
        V_ahead, V_carry = _scan(tl.where(ahead, 0.0, 1.0).to(tl.float64), V_ahead, V_carry)
        counted = tl.load(mask + t, mask=(t >= 0) & (t < length), other=0) != 0
        r = tl.load(rewards + t, mask=counted, other=0.0).to(tl.float64)
        V = tl.load(values + t, mask=counted, other=0.0).to(tl.float64)
        delta = tl.where(counted, r + gamma * V_ahead - V, 0.0)
        A, A_carry = _scan(tl.where(counted, gamma_lam, 1.0), delta, A_carry)
        A = tl.where(counted & (broken == 0), A, 0.0)
        tl.store(advantages + row * T + t, A.to(advantages.dtype.element_ty), mask=t >= 0)
        tl.store(returns + row * T + t, (A + V).to(returns.dtype.element_ty), mask=t >= 0)


def _suffix_scan_triton(a: Tensor, b: Tensor) -> Tensor:
    a, b, (B, T) = whole_rows(a), whole_rows(b), b.shape
    x = torch.empty(B, T, dtype=b.dtype, device=b.device)
    run.launch(_suffix_scan_kernel, (B,), a, b, x, a.stride(0), b.stride(0), T, BLOCK=BLOCK, num_warps=4)
    return x


def _gae_triton(rewards, values, mask, gamma, lam, bootstrap, dtype) -> tuple[Tensor, Tensor]:
    B, T = values.shape
    rows = [whole_rows(rewards), whole_rows(values), whole_rows(mask).view(torch.uint8)]
    # As a tensor, since a Python float would reach the kernel in fp32.
    rates = torch.tensor([gamma, gamma * lam], dtype=torch.float64, device=values.device)
    after = None if bootstrap is None else bootstrap.double().contiguous()
    out = [torch.empty(B, T, dtype=dtype, device=values.device) for _ in range(2)]
    run.launch(_gae_kernel, (B,), *rows, after, rates, *out, *(x.stride(0) for x in rows), T, BLOCK=BLOCK, num_warps=4)
    return out[0], out[1]
