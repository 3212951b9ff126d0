"""From rewards to advantages: pure functions without gradient.

Sequence estimators (the table OUTCOME) map rewards [B] and group_ids [B] to A [B]; token estimators, `gae` among them,
map rewards and mask [B, T] to A [B, T]. NaN is a reward that could not be scored: its row has A = 0 and is in no mean
and no deviation. Rewards that all agree (max − min ≤ 1e-8, hence also a group of one) give A = 0 exactly, never a
rounding error over ε. Statistics are float64 inside; A is at least float32.
"""

from typing import Literal

import torch
from torch import Tensor

from minirl.errors import InputError
from minirl.kernels import gae as gae
from minirl.kernels import suffix_scan
from minirl.kernels.per_token import k3

SAME = 1e-8  # rewards closer than this are equal


def _dtype(x):  # of the result: float32 even for bf16 or integers, float64 stays
    return torch.promote_types(x.dtype, torch.float32)


# ---- one reward a completion -----------------------------------------------------------------------------------------


def group_stats(rewards: Tensor, group_ids: Tensor, ddof: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Give R − μ_g, σ_g and G (scored completions) of each row's group, [B] each, for rewards and group_ids [B].

    R − μ_g is exactly 0 where the row is NaN or its group has no spread.
    """
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise InputError(f"advantages: rewards {list(rewards.shape)} and group_ids {list(group_ids.shape)} must be [B]")
    dtype = _dtype(rewards)
    scored = ~rewards.isnan()
    R = torch.where(scored, rewards.double(), 0)
    ids, group = group_ids.unique(return_inverse=True)

    def total(x):  # [B]: the sum over the row's group
        return R.new_zeros(len(ids)).index_add_(0, group, x)[group]

    def extreme(x, kind):
        return R.new_zeros(len(ids)).scatter_reduce_(0, group[scored], x[scored], kind, include_self=False)[group]

    size = total(scored.double())
    centred = R - total(R) / size.clamp(min=1)
    # By the extremes: the deviation of equal rewards may be a rounding error, and dividing by it would give ±1.
    signal = scored & (extreme(R, "amax") - extreme(R, "amin") > SAME)
    std = (total(torch.where(scored, centred, 0) ** 2) / (size - ddof).clamp(min=1)).sqrt()
    return torch.where(signal, centred, 0).to(dtype), std.to(dtype), size.to(dtype)


def _scaled(centred, std):
    # Without a signal σ may be 0 as well, and 0/0 is NaN.
    return torch.where(centred == 0, 0, centred / std)


@torch.no_grad()
def grpo(rewards, group_ids, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Give A_i = (R_i − μ_g)/(σ_g + ε) (2402.03300 §4.1.2)."""
    centred, std, _ = group_stats(rewards, group_ids, ddof)
    return _scaled(centred, std + eps)


@torch.no_grad()
def grpo_mean(rewards, group_ids, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Give A_i = R_i − μ_g (Dr. GRPO, 2503.20783)."""
    return group_stats(rewards, group_ids, ddof)[0]


@torch.no_grad()
def rloo(rewards, group_ids, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Give A_i = R_i − mean_{j≠i} R_j = G/(G − 1)·(R_i − μ_g) (2402.14740)."""
    centred, _, size = group_stats(rewards, group_ids, ddof)
    # A completion alone has no others to be compared with; its centred reward is 0 already.
    return centred * size / (size - 1).clamp(min=1)


@torch.no_grad()
def grpo_batch_std(rewards, group_ids, *, eps: float = 1e-4, ddof: int = 1, mask: Tensor | None = None) -> Tensor:
    """Give A_i = (R_i − μ_g)/(σ_batch(R) + ε), σ of the rows with a counted token in mask [B, T] (2508.08221,
    2510.13786).

    A row without one still counts in the mean of its group; only a reward of NaN leaves that too.
    """
    _, std = _batch_stats(rewards, mask, ddof)
    return _scaled(group_stats(rewards, group_ids, ddof)[0], std + eps)


def _batch_stats(x, mask, ddof):
    """Give mean and deviation of x [B] over the rows that are not NaN and, given mask [B, T], have a counted token; a
    mean of rounding errors alone is 0."""
    rows = ~x.isnan() if mask is None else ~x.isnan() & mask.bool().any(1)
    counted = x[rows].double()
    _, std, _ = group_stats(counted, torch.zeros_like(counted, dtype=torch.long), ddof)
    mean = counted.mean() if len(counted) else counted.sum()
    return torch.where(mean.abs() > SAME, mean, 0).to(_dtype(x)), std.amax() if len(std) else std.sum()


@torch.no_grad()
def reinforce_pp_baseline(
    rewards,
    group_ids,
    *,
    eps: float = 1e-4,
    ddof: int = 1,
    whiten_over: Literal["seq", "token"] = "seq",
    mask: Tensor | None = None,
) -> Tensor:
    """Give A = R − μ_g, whitened over the batch's sequences -> [B], or over its tokens -> [B, T] (2501.03262).

    mask [B, T]: only counted tokens, and sequences that have one, are in the batch's mean and deviation.
    """
    centred, _, _ = group_stats(rewards, group_ids, ddof)
    if whiten_over == "token":
        if mask is None:
            raise InputError("reinforce_pp_baseline: whiten_over='token' needs mask [B, T]; pass it, or use 'seq'")
        return whiten(centred[:, None].expand(mask.shape), mask.bool() & ~rewards.isnan()[:, None], ddof=ddof)
    mean, std = _batch_stats(centred.masked_fill(rewards.isnan(), torch.nan), mask, ddof)
    return _scaled(torch.where(rewards.isnan(), 0, centred - mean), std + eps)  # the mean is 0 where all rows count


@torch.no_grad()
def correct_only(rewards, group_ids, *, eps: float = 1e-4, ddof: int = 1, threshold: float = 0.5) -> Tensor:
    """Give A_i = 1 where R_i > threshold, else 0: online rejection-sampling fine-tuning (2402.03300 App. A)."""
    return (rewards > threshold).to(_dtype(rewards))


OUTCOME = {f.__name__: f for f in (grpo, grpo_mean, rloo, grpo_batch_std, reinforce_pp_baseline, correct_only)}

OF_BATCH = ("grpo_batch_std", "reinforce_pp_baseline")  # take the mask, for statistics of the whole batch


# ---- rewards of tokens -----------------------------------------------------------------------------------------------


def _fill(x, mask):  # float64, 0 under the mask
    return torch.where(mask, x.double(), 0)


def _decay(rate, mask):  # [B, T]: a hole in the mask is no step
    return torch.ones_like(mask, dtype=torch.float64).masked_fill(mask, rate)


def _scorable(rewards, mask):  # [B, T]: the mask without the rows that hold a NaN reward
    return mask & ~(rewards.isnan() & mask).any(1, keepdim=True)


@torch.no_grad()
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Give R_t = Σ_{k≥t} γ^{k−t} r_k over the counted tokens of each row; [B, T] -> [B, T], 0 under the mask."""
    mask = mask.bool()
    return _fill(suffix_scan(_decay(gamma, mask), _fill(rewards, mask)), mask).to(_dtype(rewards))


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8, ddof: int = 1, shift_mean: bool = True) -> Tensor:
    """Scale to (x − μ)/√(σ² + ε) over the counted entries, 0 if all are equal or masked; + μ if not shift_mean."""
    mask = mask.bool()
    n, y = mask.sum(), _fill(x, mask)
    mean = y.sum() / n.clamp(min=1)
    centred = _fill(y - mean, mask)
    # Equal entries leave rounding errors here, which a deviation of the same size would blow up to ±1.
    varies = (centred.abs() > SAME).any()
    white = centred * varies / ((centred**2).sum() / (n - ddof).clamp(min=1) + eps).sqrt()
    return _fill(white if shift_mean else white + mean, mask).to(_dtype(x))


@torch.no_grad()
def reinforce(
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    reward_to_go: bool = True,
    baseline: Literal["none", "batch_mean", "group_mean"] | float = "none",
    group_ids: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Give A_t = R_t − b for token rewards [B, T], R_t the reward-to-go, or R_0 for every token (Williams 1992).

    b is 0; group_mean, the mean return R_0 of the completions of the row's group, an estimate of the prompt's value
    V(s_0) = E[R_0], in which a long completion counts as much as a short one; batch_mean, the mean of R_t over the
    tokens of the batch that are `counted` [B, T] (the mask's if None), as in `reinforce_pp`; or a number: a running
    mean.
    """
    mask = _scorable(rewards, mask.bool())
    R = returns_to_go(rewards, mask, gamma).double()
    whole = torch.where(mask & (mask.cumsum(1) == 1), R, 0).sum(1, keepdim=True)  # R_0 [B, 1]
    if not reward_to_go:
        R = whole.expand_as(R)
    tokens = mask if counted is None else mask & counted.bool()
    b = _baseline(baseline, R, whole, tokens, mask.any(1), group_ids)
    return _fill(R - b, mask).to(_dtype(rewards))


def _baseline(baseline, R, whole, tokens, rows, group_ids):
    if not isinstance(baseline, str):
        return baseline
    if baseline == "none":
        return 0.0
    if baseline not in ("batch_mean", "group_mean") or (baseline == "group_mean" and group_ids is None):
        raise InputError(
            f"reinforce: baseline={baseline!r}; use none, batch_mean, group_mean (+ group_ids) or a number"
        )
    if baseline == "batch_mean":
        return _fill(R, tokens).sum() / tokens.sum().clamp(min=1)
    ids, group = group_ids.unique(return_inverse=True)
    sums = R.new_zeros(2, len(ids)).index_add_(1, group, torch.stack([whole.squeeze(1), rows.double()]))
    return (sums[0] / sums[1].clamp(min=1))[group][:, None]


@torch.no_grad()
def reinforce_pp(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, eps: float = 1e-8) -> Tensor:
    """Give the rewards-to-go of token rewards [B, T], whitened over all counted tokens of the batch (2501.03262)."""
    mask = _scorable(rewards, mask.bool())
    return whiten(returns_to_go(rewards, mask, gamma), mask, eps=eps)


@torch.no_grad()
def grpo_process(
    step_rewards: Tensor, step_ends: Tensor, group_ids: Tensor, *, eps: float = 1e-4, ddof: int = 1
) -> Tensor:
    """Give Â_t = Σ_{steps that end at or after t} (r − μ_g)/(σ_g + ε), μ and σ of all steps of the group.

    step_rewards [B, T] hold a step's reward where step_ends [B, T] marks its last token -> A [B, T], 0 after the last
    (2402.03300 §4.1.3).
    """
    ends = step_ends.bool()
    ids = group_ids[:, None].expand(ends.shape)
    normalised = torch.zeros_like(step_rewards, dtype=_dtype(step_rewards))
    # A step is to its group what a completion is in `grpo`: one sample of the mean and the deviation.
    normalised[ends] = grpo(step_rewards[ends], ids[ends], eps=eps, ddof=ddof)
    return normalised.flip(1).cumsum(1).flip(1)


# ---- KL in the reward ------------------------------------------------------------------------------------------------


def _penalty(logp, ref_logp, mask, beta, kl):  # [B, T]
    if kl not in ("k1", "k3"):
        raise InputError(f"kl_in_reward: kl={kl!r} is unknown; use k1 or k3")
    d = _fill(logp, mask) - _fill(ref_logp, mask)
    return beta * (d if kl == "k1" else k3(d)[0])


@torch.no_grad()
def kl_in_reward(scores: Tensor, logp, ref_logp, mask, beta: float, kl: Literal["k1", "k3"] = "k1") -> Tensor:
    """Give r_t = −β·KL_t, plus the score [B] at the last counted token; logp [B, T] of the old policy (1909.08593)."""
    mask = mask.bool()
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (_fill(scores[:, None].expand(mask.shape), last) - _penalty(logp, ref_logp, mask, beta, kl)).to(_dtype(logp))


@torch.no_grad()
def kl_in_sequence_reward(scores: Tensor, logp, ref_logp, mask, beta: float, kl: Literal["k1", "k3"] = "k1") -> Tensor:
    """Give R − β·Σ_t KL_t [B], the reward of a whole completion as one action (RLOO, 2402.14740)."""
    return (scores.double() - _penalty(logp, ref_logp, mask.bool(), beta, kl).sum(1)).to(_dtype(logp))
