"""One policy loss. An algorithm is a row of options: see PRESETS, at the end.

    loss = Σ_t w_t [ ω_t·S_t + β·K_t − α·H_t ]
    c_t  = ∂loss/∂ℓ_t = w_t [ −ω_t·A_t·g_t + β·κ_t ]          e_t = ∂loss/∂H_t = −α·w_t

ℓ, ℓo, ℓr, ℓb are the log-probs of the sampled tokens under the policy, the policy before the update, the reference and
the sampler. A surrogate returns its value S beside its gain g, a KL its value K beside its slope κ: the gradient at a
clip's edge, beyond the exponent's guard and of a sequence ratio is what is written here, not what autograd makes of min
and clamp. A micro-batch is only a memory knob: denominators are those of the whole optimizer step (`Totals`).
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from minirl.errors import InputError

GUARD = 20.0  # exp never sees a log-ratio beyond ±GUARD, and its derivative is 0 there


@dataclass(frozen=True)
class PolicyLoss:
    """The options of the policy loss; they are orthogonal."""

    ratio_level: Literal["token", "seq_mean", "seq_sum", "none"] = "token"
    """ρ of a token (PPO), from the mean (GSPO) or the sum (RLOO) of its row's log-ratios, or 1 (REINFORCE)."""
    surrogate: Literal["clip", "is_pg", "sapo"] = "clip"
    """PPO's clip, a policy gradient with constant weights (REINFORCE, CISPO), or SAPO's soft gate."""
    eps_low: float = 0.2
    """clip: no gradient where A < 0 and ρ < 1 − eps_low; inf turns it off."""
    eps_high: float = 0.2
    """clip: no gradient where A > 0 and ρ > 1 + eps_high; inf turns it off."""
    dual_clip: float | None = None
    """clip: no gradient where A < 0 and ρ > dual_clip (usually 3)."""
    w_min: float = 0.0
    """is_pg: the smallest weight."""
    w_max: float = math.inf
    """is_pg: the largest weight, an absolute number (CISPO: 5)."""
    tau_pos: float = 1.0
    """sapo: temperature of the gate where A > 0."""
    tau_neg: float = 1.05
    """sapo: temperature of the gate elsewhere."""
    kl: Literal["none", "k2", "k3", "k3_is"] = "none"
    """Estimator of the KL to the reference; k3_is weighs k3 with the token ratio, so it is unbiased off policy too."""
    kl_coef: float = 0.0
    """β, the weight of the KL to the reference."""
    kl_clamp: float | None = None
    """The KL of one token counts at most this much, without gradient beyond."""
    kl_old_coef: float = 0.0
    """Weight of KL(π_old‖π_θ), the penalty form of PPO."""
    entropy_coef: float = 0.0
    """α, the weight of the entropy bonus."""
    aggregation: Literal["seq_mean", "token_mean", "seq_sum_const", "seq_sum", "group_token_mean"] = "token_mean"
    """Mean of row means (GRPO), mean over tokens (DAPO, PPO), mean of row sums over const_length (Dr. GRPO),
    mean of row sums (REINFORCE), or mean of the groups' token means (DAPO's formula read literally)."""
    const_length: float | None = None
    """seq_sum_const: the length that row sums are divided by, normally the generation budget."""
    importance: Literal["none", "token_truncate", "token_mask", "seq_truncate", "seq_mask", "geo_mask"] = "none"
    """Where sampler and trainer disagree, weigh with u = exp(ℓo − ℓb) of a token, a row or a row's geometric mean:
    truncated at importance_cap, or 0 outside [importance_floor, importance_cap]."""
    importance_cap: float = 2.0
    """The largest importance weight."""
    importance_floor: float = 0.0
    """The mask modes: the smallest importance weight."""
    opsm_delta: float | None = None
    """Off-policy sequence mask: tokens with A < 0 drop out of rows that drifted by more than this (nats a token)."""
    entropy_quantile: float | None = None
    """Train only on this share of the tokens, those of highest entropy (usually 0.2)."""

    def __post_init__(self):
        if self.kl == "k1":
            raise InputError("PolicyLoss: k1 has no gradient as a loss; put it in the reward, or use k2, k3 or k3_is")
        for field in fields(self):
            allowed, value = get_args(field.type), getattr(self, field.name)
            if isinstance(field.default, str) and value not in allowed:
                raise InputError(f"PolicyLoss: {field.name}={value!r} is unknown; use one of {', '.join(allowed)}")

        clamp, dual, const, opsm = self.kl_clamp, self.dual_clip, self.const_length, self.opsm_delta
        coefs, share = (self.kl_coef, self.kl_old_coef, self.entropy_coef), self.entropy_quantile
        for fine, rule in (
            (self.eps_low >= 0 and self.eps_high >= 0, "eps_low and eps_high must be >= 0 (inf turns a side off)"),
            (dual is None or dual > 1, "dual_clip must be > 1, or None"),
            (0 <= self.w_min <= self.w_max, "w_min and w_max must satisfy 0 <= w_min <= w_max"),
            (self.tau_pos > 0 and self.tau_neg > 0, "tau_pos and tau_neg must be > 0"),
            (all(0 <= x < math.inf for x in coefs), "kl_coef, kl_old_coef and entropy_coef must be >= 0 and finite"),
            (clamp is None or clamp > 0, "kl_clamp must be > 0, or None"),
            (const is None or 0 < const < math.inf, "const_length must be > 0"),
            (const or self.aggregation != "seq_sum_const", "seq_sum_const needs const_length, the generation budget"),
            (0 <= self.importance_floor < self.importance_cap, "importance_floor must be in [0, importance_cap)"),
            (opsm is None or opsm >= 0, "opsm_delta must be >= 0, or None"),
            (share is None or 0 < share <= 1, "entropy_quantile must be in (0, 1], or None"),
        ):
            if not fine:
                got = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name in rule)
                raise InputError(f"PolicyLoss: {rule}; got {got}")


# ---- aggregation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Totals:
    """What only the whole optimizer step knows; each of its micro-batches gets the same one."""

    sequences: int  # rows with at least one counted token
    tokens: int  # counted tokens
    groups: int = 0  # groups with at least one counted token
    group_ids: Tensor | None = None  # [K] sorted ids of the step's groups
    group_tokens: Tensor | None = None  # [K] counted tokens of each
    entropy_floor: float | None = None  # the entropy_quantile of the step: tokens below it are not trained on
    scored: int | None = None  # counted tokens that are really computed, the denominator of metrics; None: all

    @classmethod
    def of(cls, mask, group_ids=None, entropy=None, entropy_quantile=None) -> "Totals":
        """mask [B, T] and group_ids [B] of the whole step; entropy [B, T] and its quantile where that option is on."""
        keep = mask.bool()
        lengths, ids, group_tokens, floor = keep.sum(1), None, None, None
        if group_ids is not None:
            ids, index = group_ids.unique(return_inverse=True)
            group_tokens = lengths.new_zeros(len(ids)).index_add_(0, index, lengths)
        if entropy_quantile is not None and keep.any():
            floor = entropy.detach()[keep].double().quantile(1 - entropy_quantile).item()
        groups = 0 if ids is None else int((group_tokens > 0).sum())
        return cls(int((lengths > 0).sum()), int(lengths.sum()), groups, ids, group_tokens, floor)

    def scoring(self, tokens: int) -> "Totals":
        """The same step when rows without gradient are left out: metrics are means over the `tokens` that remain."""
        return replace(self, scored=tokens)


def aggregation_weights(mask, options: PolicyLoss, totals: Totals, group_ids=None, dtype=torch.float32) -> Tensor:
    """w [B, T], the weight of a token in the loss, with m = mask, L_i the counted tokens of row i, N those of the step:

    seq_mean m/(N_seq·L_i) (2402.03300 eq. 3), token_mean m/N_tok (2503.14476), seq_sum_const m/(N_seq·L_const)
    (2503.20783), seq_sum m/N_seq, group_token_mean m/(N_groups·N_tok(g)).
    """
    m = mask.bool().to(dtype)
    match options.aggregation:
        case "seq_mean":
            count = totals.sequences * m.sum(1, keepdim=True)
        case "token_mean":
            count = m.new_tensor(totals.tokens)
        case "seq_sum_const":
            count = m.new_tensor(totals.sequences * options.const_length)
        case "seq_sum":
            count = m.new_tensor(totals.sequences)
        case "group_token_mean":
            count = totals.groups * _group_tokens(group_ids, totals).to(dtype)[:, None]
    return torch.where(count > 0, m / count, 0)


def _group_tokens(group_ids, totals: Totals) -> Tensor:  # [B]
    if group_ids is None or totals.group_ids is None:
        raise InputError("group_token_mean needs group_ids; pass them to policy_loss and to Totals.of")
    if not torch.isin(group_ids, totals.group_ids).all():
        raise InputError("policy_loss: totals lacks the group of a row; build Totals.of over the whole optimizer step")
    return totals.group_tokens[torch.searchsorted(totals.group_ids, group_ids)]


# ---- the tables: ratio, surrogate, KL --------------------------------------------------------------------------------


def guarded_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(clamp(x, ±20)) and its derivative, which is 0 outside the guard."""
    y = x.clamp(-GUARD, GUARD).exp()
    return y, y.masked_fill(x.abs() > GUARD, 0)


def _row_sum(x, keep):  # [B, T]: every entry holds the sum of its row
    return torch.where(keep, x, 0).sum(1, keepdim=True).expand_as(x)


def _row_mean(x, keep):
    return _row_sum(x, keep) / keep.sum(1, keepdim=True).clamp(min=1)


def _never(x):
    return torch.zeros_like(x, dtype=torch.bool)


LEVELS = {  # (log-ratio of the tokens, mask) -> log-ratio
    "token": lambda lr, keep: lr,
    "seq_mean": _row_mean,
    "seq_sum": _row_sum,
    "none": lambda lr, keep: torch.zeros_like(lr),
}


def clip(ratio, slope, A, logp, o: PolicyLoss):
    """S = −min(ρA, clip(ρ, 1 − ε_lo, 1 + ε_hi)A), then min(S, −cA) where A < 0; g = ρ where nothing is cut.

    1707.06347 eq. 7; 1912.09729 eq. 5 for the dual clip c.
    """
    ceiling = math.inf if o.dual_clip is None else o.dual_clip
    high = (A > 0) & (ratio > 1 + o.eps_high)
    low = (A < 0) & (ratio < 1 - o.eps_low)
    dual = (A < 0) & (ratio > ceiling)
    held = ratio.masked_fill(high, 1 + o.eps_high).masked_fill(low, 1 - o.eps_low).masked_fill(dual, ceiling)
    return -A * held, slope.masked_fill(high | low | dual, 0), (high, low, dual)


def is_pg(ratio, slope, A, logp, o: PolicyLoss):
    """S = −sg[clamp(ρ, w_min, w_max)]·A·ℓ; g is that weight (2506.13585 eq. 4). Its flags: the weight was clamped."""
    weight = ratio.clamp(o.w_min, o.w_max)
    return -weight * A * logp, weight, (ratio > o.w_max, ratio < o.w_min, _never(A))


def sapo(ratio, slope, A, logp, o: PolicyLoss):
    """S = −(4/τ)·σ(τ(ρ − 1))·A; g = 4σ(1 − σ)ρ, with τ = tau_pos where A > 0, else tau_neg (2511.20347)."""
    tau = torch.full_like(A, o.tau_neg).masked_fill(A > 0, o.tau_pos)
    x = tau * (ratio - 1)
    return -4 / tau * x.sigmoid() * A, 4 * x.sigmoid() * (-x).sigmoid() * slope, (_never(A), _never(A), _never(A))


SURROGATES = {"clip": clip, "is_pg": is_pg, "sapo": sapo}  # (ρ, ∂ρ/∂ℓ, A, ℓ, options) -> S, g, (cut high, low, dual)


def k2(d, token_lr):
    """d²/2 with slope d = ℓ − ℓr: on policy its expected gradient is that of KL(π_θ‖π_ref)."""
    return d**2 / 2, d


def k3(d, token_lr=None):
    """e^{−d} + d − 1 with slope 1 − e^{−d} (2402.03300 eq. 4); expm1 keeps the digits that the plain form loses."""
    return (-d).clamp(-GUARD, GUARD).expm1() + d, 1 - guarded_exp(-d)[1]


def k3_is(d, token_lr):
    """ρ·k3 with slope ρ·d, ρ being the unclipped token ratio: the exact gradient of KL(π_θ‖π_ref) (2512.02556 §3.1)."""
    K, kappa = k3(d)
    ratio, slope = guarded_exp(token_lr)
    guarded = (d.abs() > GUARD) | (token_lr.abs() > GUARD)
    return ratio * K, torch.where(guarded, slope * K + ratio * kappa, ratio * d)


KLS = {"k2": k2, "k3": k3, "k3_is": k3_is}  # (d = ℓ − ℓr, ℓ − ℓo) -> K, κ


# ---- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """One call's tensors [B, T]: constant, and 0 under the mask."""

    keep: Tensor
    totals: Totals
    A: Tensor | None = None
    logp: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    rollout: Tensor | None = None
    entropy: Tensor | None = None

    def mean(self, x):  # over the tokens of the step, so that the means of its micro-batches add up
        return torch.where(self.keep, x, 0).sum(dtype=torch.float64) / max(self.scored, 1)

    @property
    def scored(self):
        return self.totals.tokens if self.totals.scored is None else self.totals.scored

    def max(self, x):
        return torch.where(self.keep, x, -math.inf).amax() if x.numel() else x.new_tensor(-math.inf)


def policy_loss(
    logp, old_logp, ref_logp, advantages, mask, options, *, entropy=None, rollout_logp=None, group_ids=None, totals=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss = Σ_t w_t [ω_t·S_t + β·K_t + β_old·(ρ_t − 1 − log ρ_t) − α·H_t], to be minimised, and its metrics.

    logp and entropy [B, T] carry the gradient; old_logp, ref_logp, rollout_logp [B, T], advantages [B] or [B, T],
    mask [B, T] and group_ids [B] are constants. old_logp=None takes sg[logp]: ρ = 1, a single on-policy update.
    ref_logp may be None if options.kl is "none". Nothing under mask 0, NaN included, reaches loss or gradient.
    The gradient of a sequence ratio is token-local, ∂ρ/∂ℓ_t = ρ, as in GSPO-token (2507.18071).
    totals=None: this batch is the whole optimizer step. Otherwise it is one of its micro-batches, and their losses
    and gradients add up; `combine_metrics` adds up the metrics.
    """
    others = {"old_logp": old_logp, "advantages": advantages, "mask": mask, "group_ids": group_ids}
    _check(options, logp, ref_logp, rollout_logp, entropy, totals, **others)
    o, keep, dtype = options, mask.bool(), torch.promote_types(logp.dtype, torch.float32)
    totals = Totals.of(keep, group_ids, entropy, o.entropy_quantile) if totals is None else totals
    A = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logp)
    old_logp = logp if old_logp is None else old_logp
    constants = [A, logp, old_logp, ref_logp, rollout_logp, entropy]

    def fill(x):
        return torch.where(keep, x.to(dtype), 0)

    b = _Batch(keep, totals, *[None if x is None else fill(x.detach()) for x in constants])
    token_lr = b.logp - b.old
    lr = LEVELS[o.ratio_level](token_lr, keep)
    ratio, slope = guarded_exp(lr)
    S, g, cut = SURROGATES[o.surrogate](ratio, slope, b.A, b.logp, o)
    omega, omega_metrics = _omega(b, o)
    K, kappa = _kl(b, token_lr, o)
    w = aggregation_weights(keep, o, totals, group_ids, dtype)

    parts = {"loss/policy": (w * omega * S).sum(), "loss/kl": (w * K).sum(), "loss/entropy": w.new_zeros(())}
    c = w * (kappa - omega * b.A * g)
    slopes = (c * (fill(logp) - b.logp)).sum()  # worth 0, and its gradient is c
    if o.entropy_coef:
        e = -o.entropy_coef * w
        parts["loss/entropy"] = (e * b.entropy).sum()
        slopes = slopes + (e * (fill(entropy) - b.entropy)).sum()
    total = sum(parts.values())
    metrics = parts | {"loss/total": total} | _ratio_metrics(b, lr, ratio, cut) | _kl_metrics(b, token_lr)
    return total + slopes, _derive(metrics | omega_metrics)


def _check(o: PolicyLoss, logp, ref_logp, rollout_logp, entropy, totals, **others):
    full, rows = logp.shape, logp.shape[:1]
    fits = {"advantages": (full, rows), "group_ids": (rows,)}
    for name, x in (others | {"ref_logp": ref_logp, "rollout_logp": rollout_logp, "entropy": entropy}).items():
        if x is not None and x.shape not in fits.get(name, (full,)):
            raise InputError(f"policy_loss: {name} is {list(x.shape)}, logp [B, T] is {list(full)}; make them fit")
    step = totals is None or not totals.tokens or totals.entropy_floor is not None
    for fine, need in (
        (ref_logp is not None or o.kl == "none", f"kl={o.kl!r} needs ref_logp; pass it or set kl='none'"),
        (rollout_logp is not None or o.importance == "none", "importance needs rollout_logp; pass it or set 'none'"),
        (entropy is not None or not o.entropy_coef, "entropy_coef needs entropy; pass it or set 0"),
        (entropy is not None or o.entropy_quantile is None, "entropy_quantile needs entropy; pass it or set None"),
        (step or o.entropy_quantile is None, "entropy_quantile is one of the whole step; pass it to Totals.of"),
    ):
        if not fine:
            raise InputError(f"policy_loss: {need}")


def _kl(b: _Batch, token_lr, o: PolicyLoss):
    """β·K and β·κ to the reference, plus those of KL(π_old‖π_θ), whose k3 is ρ − 1 − log ρ on samples of π_old."""
    K = kappa = torch.zeros_like(b.logp)
    if o.kl != "none":
        K, kappa = KLS[o.kl](b.logp - b.ref, token_lr)
        if o.kl_clamp is not None:
            over = o.kl_clamp < K
            K, kappa = K.clamp(max=o.kl_clamp), kappa.masked_fill(over, 0)
    K_old, slope = k3(-token_lr)
    return o.kl_coef * K + o.kl_old_coef * K_old, o.kl_coef * kappa - o.kl_old_coef * slope


def _omega(b: _Batch, o: PolicyLoss):
    """ω = importance weight × off-policy sequence mask × top-entropy mask, a constant factor of S alone; metrics."""
    omega, metrics = torch.ones_like(b.logp), {}
    if b.rollout is not None:
        lr, (level, _, mode) = b.old - b.rollout, o.importance.partition("_")
        u, _ = guarded_exp(LEVELS[{"seq": "seq_sum", "geo": "seq_mean"}.get(level, "token")](lr, b.keep))
        outside = (mode == "mask") & ((u < o.importance_floor) | (u > o.importance_cap))
        if o.importance != "none":
            omega = u.clamp(max=o.importance_cap).masked_fill(outside, 0)
        metrics = _mismatch_metrics(b, lr, u, outside)
    if o.opsm_delta is not None:
        source = b.old if b.rollout is None else b.rollout
        drop = (b.A < 0) & (_row_mean(source - b.logp, b.keep) > o.opsm_delta)
        omega, metrics["opsm/masked_frac"] = omega.masked_fill(drop, 0), b.mean(drop)
    if o.entropy_quantile is not None and b.totals.tokens:
        omega = omega.masked_fill(b.entropy < b.totals.entropy_floor, 0)
    return omega, metrics


# ---- metrics: token means over the whole step ------------------------------------------------------------------------


def _outside_band(ratio):
    return (ratio < 0.9) | (ratio > 1.1)


def _ratio_metrics(b: _Batch, lr, ratio, cut) -> dict[str, Tensor]:
    high, low, dual = cut
    rows = _Batch(b.keep.any(1, keepdim=True).expand_as(b.keep), b.totals)
    return {
        "clip/high": b.mean(high),
        "clip/low": b.mean(low),
        "clip/dual": b.mean(dual),
        "clip/frac": b.mean(high | low | dual),
        "clip/seq_high_max": rows.max(_row_mean(high.to(lr), b.keep)),
        "clip/seq_low_min": -rows.max(-_row_mean(low.to(lr), b.keep)),
        "ratio/mean": b.mean(ratio),
        "_ratio/square": b.mean((ratio.double() - 1) ** 2),  # around 1, where ratios are: no digits cancel
        "ratio/min": -b.max(-ratio),
        "ratio/max": b.max(ratio),
        "ratio/outside": b.mean(_outside_band(ratio)),
        "ratio/guarded": b.mean(lr.abs() > GUARD),
    }


def _kl_metrics(b: _Batch, token_lr) -> dict[str, Tensor]:
    metrics = {"kl_old/k1": b.mean(-token_lr), "kl_old/k3": b.mean(k3(-token_lr)[0])}
    if b.ref is not None:
        d = b.logp - b.ref
        length = b.totals.tokens / max(b.totals.sequences, 1)
        metrics |= {"kl_ref/k1": b.mean(d), "kl_ref/k3": b.mean(k3(d)[0]), "kl_ref/seq_k1": b.mean(d) * length}
    return metrics if b.entropy is None else metrics | {"entropy": b.mean(b.entropy)}


def _mismatch_metrics(b: _Batch, lr, u, outside) -> dict[str, Tensor]:
    return {
        "tis/mean": b.mean(u),
        "_tis/square": b.mean(u.double() ** 2),
        "tis/max": b.max(u),
        "tis/masked_frac": b.mean(outside),
        "mismatch/abs_mean": b.mean(lr.abs()),
        "mismatch/abs_max": b.max(lr.abs()),
        "mismatch/k3": b.mean(k3(-lr)[0]),
        "mismatch/outside": b.mean(_outside_band(guarded_exp(lr)[0])),
    }


def _explained_variance(m):
    variance = m["_value/return_square"] - m["_value/return"] ** 2
    residual = m["_value/error_square"] - m["_value/error"] ** 2
    return torch.where(variance > 1e-12 * m["_value/return_square"], 1 - residual / variance, math.nan)


DERIVED = {  # what no sum, min or max over micro-batches gives, from moments (keys with a leading _) that do add up
    "ratio/std": ("_ratio/square", lambda m: (m["_ratio/square"] - (m["ratio/mean"] - 1) ** 2).clamp(min=0).sqrt()),
    "tis/ess": ("_tis/square", lambda m: m["tis/mean"] ** 2 / m["_tis/square"]),  # (Σu)²/(N·Σu²)
    "value/explained_var": ("_value/error", _explained_variance),  # 1 − Var(R − V)/Var(R)
}


def _derive(metrics):
    derived = {name: rule(metrics) for name, (moment, rule) in DERIVED.items() if moment in metrics}
    return {name: value.detach() for name, value in (metrics | derived).items()}


def combine_metrics(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of an optimizer step from those of its micro-batches: sums, except for …min, …max and DERIVED.

    NaN stands for the extremes and the spread of no token at all.
    """
    step = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = torch.stack([part[name].double() for part in parts if name in part])
        if name.endswith(("min", "max")):
            extreme, empty = (values.amin(), math.inf) if name.endswith("min") else (values.amax(), -math.inf)
            step[name] = extreme.masked_fill(extreme == empty, math.nan)
        else:
            step[name] = values.sum()
    return {name: value.item() for name, value in _derive(step).items() if not name.startswith("_")}


# ---- critic, controllers ---------------------------------------------------------------------------------------------


def value_loss(values, old_values, returns, mask, clip: float | None = 0.2, totals: Totals | None = None):
    """½·mean_t max((V − R)², (clip(V, V_old ± ε) − R)²), and its metrics; clip=None is the plain square.

    values [B, T] carry the gradient; old_values (unused where clip is None), returns and mask [B, T] are constants.
    """
    keep = mask.bool()
    b = _Batch(keep, Totals.of(keep) if totals is None else totals)
    dtype = torch.promote_types(values.dtype, torch.float32)
    v, R = torch.where(keep, values.to(dtype), 0), torch.where(keep, returns, 0)
    square, cut = (v - R) ** 2, torch.zeros_like(keep)
    if clip is not None:
        old = torch.where(keep, old_values, 0)
        clipped = (old + (v - old).clamp(-clip, clip) - R) ** 2
        cut = clipped > square
        square = torch.where(cut, clipped, square)
    loss = 0.5 * square.sum() / max(b.totals.tokens, 1)
    v, R = v.detach().double(), R.double()
    metrics = {"loss/value": loss, "value/mean": b.mean(v), "value/clip_frac": b.mean(cut)}
    metrics |= {"_value/return": b.mean(R), "_value/return_square": b.mean(R**2)}
    metrics |= {"_value/error": b.mean(R - v), "_value/error_square": b.mean((R - v) ** 2)}
    return loss, _derive(metrics)


def adaptive_kl_ziegler(beta: float, kl: float, *, episodes: int, target: float = 6.0, horizon: int = 10_000) -> float:
    """β·(1 + episodes/horizon·clip(KL/target − 1, ±0.2)), KL being the mean of sequence sums (1909.08593 §2.2)."""
    return beta * (1 + episodes / horizon * min(max(kl / target - 1, -0.2), 0.2))


def adaptive_kl_ppo(beta: float, kl: float, *, target: float) -> float:
    """β/2 where KL < target/1.5, 2β where KL > 1.5·target (1707.06347 §4)."""
    return beta / 2 if kl < target / 1.5 else beta * 2 if kl > target * 1.5 else beta


# ---- presets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """An algorithm: an advantage, a policy loss, and what it asks of the training loop."""

    advantage: str  # a function of minirl.advantages
    loss: PolicyLoss = PolicyLoss()
    critic: bool = False  # train a value model
    epochs: int = 1  # passes over a batch of rollouts
    kl_in_reward: float = 0.0  # β of the k1 penalty in the reward
    adaptive_kl: Literal["none", "ziegler", "ppo_penalty"] = "none"  # controller of the KL weight
    truncation: Literal["keep", "mask", "penalty"] = "keep"  # a cut completion keeps its reward, leaves, or pays
    dynamic_sampling: bool = False  # sample on until enough groups have a reward variance
    overlong_punishment: bool = False  # add `overlong_penalty` to the reward
    keep_sampling_mask: bool = False  # score tokens over the sampler's kept set (top-k, top-p)
    drop_zero_advantage: bool = False  # rows with A = 0 leave the mask, and so the denominators


_PLAIN = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="seq_sum")
_PENALTY = PolicyLoss(eps_low=math.inf, eps_high=math.inf, kl_old_coef=1.0)
_GRPO = PolicyLoss(kl="k3", kl_coef=0.04, aggregation="seq_mean")
_DR_GRPO = PolicyLoss(aggregation="seq_sum_const", const_length=3000)
_GSPO = PolicyLoss(ratio_level="seq_mean", eps_low=3e-4, eps_high=4e-4, aggregation="seq_mean")
_V32 = PolicyLoss(kl="k3_is", kl_coef=0.001, opsm_delta=0.5, aggregation="seq_mean")

PRESETS: dict[str, Preset] = {
    "reinforce": Preset("reinforce", _PLAIN, kl_in_reward=0.05),
    "rloo": Preset("rloo", _PLAIN, kl_in_reward=0.05),
    "reinforce++": Preset("reinforce_pp", kl_in_reward=0.05),
    "ppo": Preset("gae", critic=True, epochs=4, kl_in_reward=0.05),
    "ppo_penalty": Preset("gae", _PENALTY, critic=True, epochs=4, adaptive_kl="ppo_penalty"),
    "ppo_actor_only": Preset("reinforce", epochs=4),
    "grpo": Preset("grpo", _GRPO),
    "grpo_ps": Preset("grpo_process", _GRPO),
    "dr_grpo": Preset("grpo_mean", _DR_GRPO),
    "dapo": Preset("grpo", PolicyLoss(eps_high=0.28), dynamic_sampling=True, overlong_punishment=True),
    "gspo": Preset("grpo", _GSPO),
    "cispo": Preset("grpo", PolicyLoss(surrogate="is_pg", w_max=5.0)),
    "sapo": Preset("grpo", PolicyLoss(surrogate="sapo", aggregation="seq_mean")),
    "scaling_grpo": Preset("grpo_mean", _V32, keep_sampling_mask=True),
    "online_rft": Preset("correct_only", PolicyLoss(ratio_level="none", surrogate="is_pg"), drop_zero_advantage=True),
}
