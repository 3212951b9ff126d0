"""One policy loss. An algorithm is a row of options: see PRESETS, at the end.

    loss = Σ_t w_t [ ω_t·S_t + β·K_t − α·H_t ]

What happens to one token, S, K, their derivatives and the clips, is `minirl.kernels.token_loss`; here is what takes
whole rows and whole optimizer steps: ratios and importance weights of sequences, the weights w_t, metrics. A
micro-batch is only a memory knob: denominators are those of the whole optimizer step (`Totals`).
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from minirl.errors import InputError
from minirl.kernels import TokenLoss, linear_policy_loss, linear_token_logprobs, token_loss
from minirl.kernels.per_token import GUARD, guarded_exp, importance_weight, k3


@dataclass(frozen=True)
class PolicyLoss(TokenLoss):
    """The options of the policy loss; they are orthogonal."""

    ratio_level: Literal["token", "seq_mean", "seq_sum", "none"] = "token"
    """ρ of a token (PPO), from the mean (GSPO) or the sum (RLOO) of its row's log-ratios, or 1 (REINFORCE)."""
    aggregation: Literal["seq_mean", "token_mean", "seq_sum_const", "seq_sum", "group_token_mean"] = "token_mean"
    """Mean of row means (GRPO), mean over tokens (DAPO, PPO), mean of row sums over const_length (Dr. GRPO),
    mean of row sums (REINFORCE), or mean of the groups' token means (DAPO's formula read literally)."""
    const_length: float | None = None
    """seq_sum_const: the length that row sums are divided by, normally the generation budget."""
    importance: Literal["none", "token_truncate", "token_mask", "seq_truncate", "seq_mask", "geo_mask"] = "none"
    """Where sampler and trainer disagree, weigh with u = exp(ℓo − ℓb) of a token or a row: truncated at importance_cap,
    or 0 outside [importance_floor, importance_cap]. geo_mask only rejects rows: the weight is 0 where the geometric
    mean of the row's u is outside, else 1, because that mean is no importance weight."""
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
            floor = _quantile(entropy.detach()[keep], 1 - entropy_quantile)
        groups = 0 if ids is None else int((group_tokens > 0).sum())
        return cls(int((lengths > 0).sum()), int(lengths.sum()), groups, ids, group_tokens, floor)

    def scoring(self, tokens: int) -> "Totals":
        """The same step when rows without gradient are left out: metrics are means over the `tokens` that remain."""
        return replace(self, scored=tokens)


def _quantile(x: Tensor, share: float) -> float:
    """Interpolate linearly between the order statistics of x [N]; `Tensor.quantile` refuses more than 2²⁴ of them."""
    ordered, place = x.sort().values, share * (len(x) - 1)
    below, above = (ordered[rank].double() for rank in (math.floor(place), math.ceil(place)))
    return torch.lerp(below, above, place - math.floor(place)).item()


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


# ---- log-ratios of rows ----------------------------------------------------------------------------------------------


def _row_sum(x, keep):  # [B, T]: every entry holds the sum of its row
    return torch.where(keep, x, 0).sum(1, keepdim=True).expand_as(x)


def _row_mean(x, keep):
    return _row_sum(x, keep) / keep.sum(1, keepdim=True).clamp(min=1)


LEVELS = {  # (log-ratio of the tokens, mask) -> log-ratio
    "token": lambda lr, keep: lr,
    "seq_mean": _row_mean,
    "seq_sum": _row_sum,
    "none": lambda lr, keep: torch.zeros_like(lr),
}


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
    computed: Tensor | None = None  # the tokens that metrics are about, where those are not all

    @property
    def counted(self):
        return self.keep if self.computed is None else self.computed

    def mean(self, x):  # over the tokens of the step, so that the means of its micro-batches add up
        return torch.where(self.counted, x, 0).sum(dtype=torch.float64) / max(self.scored, 1)

    @property
    def scored(self):
        return self.totals.tokens if self.totals.scored is None else self.totals.scored

    def max(self, x):
        return torch.where(self.counted, x, -math.inf).amax() if x.numel() else x.new_tensor(-math.inf)


def policy_loss(
    logp, old_logp, ref_logp, advantages, mask, options, *, entropy=None, rollout_logp=None, group_ids=None, totals=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss = Σ_t w_t [ω_t·S_t + β·K_t + β_old·(ρ_t − 1 − log ρ_t) − α·H_t], to be minimised, and its metrics.

    logp and entropy [B, T] carry the gradient; old_logp, ref_logp, rollout_logp [B, T], advantages [B] or [B, T],
    mask [B, T] and group_ids [B] are constants. old_logp=None takes sg[logp]: ρ = 1, a single on-policy update.
    ref_logp may be None if options.kl is "none". Nothing under mask 0, NaN included, reaches loss or gradient.
    The gradient of a sequence ratio is token-local, ∂ρ/∂ℓ_t = ρ, as in GSPO-token (2507.18071). For advantages [B] the
    loss is the function that has this gradient: a product of ratios (seq_sum) is the ratio of one action, the whole
    row, so its surrogate counts once a row and not once a token.
    totals=None: this batch is the whole optimizer step. Otherwise it is one of its micro-batches, and their losses
    and gradients add up; `combine_metrics` adds up the metrics.
    """
    tensors = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp, "entropy": entropy}
    b, w = _batch(options, advantages, mask, group_ids, totals, logp=logp, **tensors)
    terms, metrics = _terms(b, w, options)

    def slope(by, x, x0):  # worth 0, and its gradient is `by`
        return (by * (torch.where(b.keep, x.to(by.dtype), 0) - x0)).sum()

    loss = metrics["loss/total"] + slope(terms.c, logp, b.logp)
    if options.entropy_coef:
        loss = loss + slope(terms.e, entropy, b.entropy)
    return loss, metrics


def head_policy_loss(
    hidden,
    weight,
    targets,
    present,
    old_logp,
    ref_logp,
    advantages,
    mask,
    options,
    *,
    rollout_logp=None,
    group_ids=None,
    totals=None,
    temperature=1.0,
    kept=None,
    active=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` from hidden states [M, D] and the head's weight [V, D], without logits of all tokens at once.

    targets [M] and `kept` belong to the tokens that are `present` [B, T], row by row; only the first `active` of V ids
    have probability (None = all); the rest is as in `policy_loss`.
    One sweep over the head makes loss and gradient; a second one comes before it where the loss of a token depends on
    the log-probs of its row. Metrics are means over the tokens that can have a gradient: no other is computed.
    """

    def grid(x):
        return x.new_zeros(present.shape).masked_scatter(present, x)

    def flat(x):
        return None if x is None else x[present]

    o, logp, entropy, head = options, None, None, {"temperature": temperature, "kept": kept, "active": active}
    if _waits_for_rows(o, old_logp):
        with torch.no_grad():
            logp, entropy = map(grid, linear_token_logprobs(hidden, weight, targets, **head))
    tensors = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    b, w = _batch(o, advantages, mask, group_ids, totals, logp=logp, entropy=entropy, dtype=dtype, **tensors)
    inputs = {"advantages": b.A, "weights": w, "old_logp": b.old, "ref_logp": b.ref, **_of_rows(b, o)}
    inputs = {name: flat(x) for name, x in inputs.items()}
    loss, *computed = linear_policy_loss(hidden, weight, targets, options=o, **inputs, **head)
    with torch.no_grad():
        counted = with_gradient(b.keep & present, b.A, o)
        totals = b.totals if b.totals.scored is not None else b.totals.scoring(int(counted.sum()))
        if b.logp is None:
            logp, entropy = (torch.where(b.keep, grid(x), 0) for x in computed)
            b = replace(b, logp=logp, entropy=entropy, old=logp if b.old is None else b.old)
        metrics = _terms(replace(b, computed=counted, totals=totals), w, o)[1]
    return metrics["loss/total"].to(loss) + (loss - loss.detach()), metrics  # the kernel knows no rows to count once


def with_gradient(mask, advantages, o: PolicyLoss) -> Tensor:
    """bool [B, T]: the counted tokens whose gradient is not zero for certain; advantages are [B] or [B, T]."""
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    return mask.bool() & (A != 0) if o.follows_advantage else mask.bool()


def _waits_for_rows(o: PolicyLoss, old_logp) -> bool:
    """Whether the loss of a token depends on the policy's log-probs of other tokens."""
    if o.opsm_delta is not None or o.entropy_quantile is not None:
        return True
    if old_logp is None:  # every ratio is 1; the sampler's weights are taken against the policy itself
        return o.importance.startswith(("seq", "geo"))
    return o.ratio_level.startswith("seq")


def _batch(o: PolicyLoss, advantages, mask, group_ids, totals, logp, old_logp, entropy, dtype=None, **others):
    """Checked tensors [B, T], 0 under the mask and without gradient; and the weights w [B, T]."""
    keep = mask.bool()
    tensors = {"logp": logp, "old_logp": old_logp, "entropy": entropy, **others}
    _check(o, keep, advantages, group_ids, totals, **tensors)
    dtype = dtype or torch.promote_types(logp.dtype, torch.float32)
    totals = Totals.of(keep, group_ids, entropy, o.entropy_quantile) if totals is None else totals
    A = advantages if advantages.dim() == 2 else advantages[:, None].expand(keep.shape)

    def fill(x):
        return None if x is None else torch.where(keep, x.detach().to(dtype), 0)

    old_logp = logp if old_logp is None else old_logp
    constants = (A, logp, old_logp, others["ref_logp"], others["rollout_logp"], entropy)
    return _Batch(keep, totals, *map(fill, constants)), aggregation_weights(keep, o, totals, group_ids, dtype)


def _of_rows(b: _Batch, o: PolicyLoss) -> dict[str, Tensor | None]:
    """What `token_loss` takes beside the log-probs: ratios and weights of rows, as far as they are known."""
    if b.logp is None and (b.old is None or o.importance.startswith("token")):
        return {"rollout_logp": b.rollout}
    inputs = {"omega": _omega(b, o)[0]}
    return inputs if b.logp is None else inputs | {"log_ratio": LEVELS[o.ratio_level](b.logp - b.old, b.keep)}


def _terms(b: _Batch, w, o: PolicyLoss):
    """Every token's terms, and the metrics."""
    omega, metrics = _omega(b, o)
    lr = LEVELS[o.ratio_level](b.logp - b.old, b.keep)
    t = token_loss(o, b.logp, b.entropy, b.A, w, old_logp=b.old, ref_logp=b.ref, log_ratio=lr, omega=omega)
    policy = t.policy / b.keep.sum(1, keepdim=True).clamp(min=1) if _once_a_row(o) else t.policy
    parts = {"loss/policy": policy.sum(), "loss/kl": t.kl.sum(), "loss/entropy": t.entropy.sum()}
    parts["loss/total"] = sum(parts.values())
    metrics = parts | _ratio_metrics(b, lr, t.ratio, t.cut) | _kl_metrics(b, b.logp - b.old) | metrics
    return t, _derive(metrics)


def _once_a_row(o: PolicyLoss) -> bool:
    """Whether every token of a row holds the S of the whole row; is_pg has a term for each, −A·ℓ_t times a constant."""
    return o.ratio_level == "seq_sum" and o.surrogate != "is_pg"


def _check(o: PolicyLoss, keep, advantages, group_ids, totals, logp, entropy, **others):
    full, rows = keep.shape, keep.shape[:1]
    fits = {"advantages": (full, rows), "group_ids": (rows,)}
    given = {"advantages": advantages, "group_ids": group_ids, "logp": logp, "entropy": entropy, **others}
    for name, x in given.items():
        if x is not None and x.shape not in fits.get(name, (full,)):
            raise InputError(f"policy_loss: {name} is {list(x.shape)}, mask [B, T] is {list(full)}; make them fit")
    step = totals is None or not totals.tokens or totals.entropy_floor is not None
    ref, rollout, known = others["ref_logp"], others["rollout_logp"], entropy is not None or logp is None
    for fine, need in (
        (ref is not None or o.kl == "none", f"kl={o.kl!r} needs ref_logp; pass it or set kl='none'"),
        (rollout is not None or o.importance == "none", "importance needs rollout_logp; pass it or set 'none'"),
        (known or not o.entropy_coef, "entropy_coef needs entropy; pass it or set 0"),
        (known or o.entropy_quantile is None, "entropy_quantile needs entropy; pass it or set None"),
        (step or o.entropy_quantile is None, "entropy_quantile is one of the whole step; pass it to Totals.of"),
    ):
        if not fine:
            raise InputError(f"policy_loss: {need}")


def _omega(b: _Batch, o: PolicyLoss):
    """ω = importance weight × off-policy sequence mask × top-entropy mask, a constant factor of S alone; metrics."""
    omega, metrics = torch.ones_like(b.A), {}
    if b.rollout is not None:
        lr, (level, _, mode) = b.old - b.rollout, o.importance.partition("_")
        u, _ = guarded_exp(LEVELS[{"seq": "seq_sum", "geo": "seq_mean"}.get(level, "token")](lr, b.keep))
        weight, outside = importance_weight(u, mode, o)
        if o.importance != "none":
            omega = (~outside).to(weight) if level == "geo" else weight
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
    rows = _Batch(b.counted.any(1, keepdim=True).expand_as(b.keep), b.totals)
    return {
        "clip/high": b.mean(high),
        "clip/low": b.mean(low),
        "clip/dual": b.mean(dual),
        "clip/frac": b.mean(high | low | dual),
        "clip/seq_high_max": rows.max(_row_mean(high.to(lr), b.counted)),
        "clip/seq_low_min": -rows.max(-_row_mean(low.to(lr), b.counted)),
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
    epochs: int = 1  # passes over a rollout
    mini_batches: int = 1  # updates a pass; 4 where it is the ratio, 1 in a single update, that makes the algorithm
    kl_in_reward: float = 0.0  # β of the k1 penalty in the reward
    adaptive_kl: Literal["none", "ziegler", "ppo_penalty"] = "none"  # controller of the KL weight
    truncation: Literal["keep", "mask", "penalty"] = "keep"  # a cut completion keeps its reward, leaves, or pays
    dynamic_sampling: bool = False  # sample on until enough groups have a reward variance
    overlong_punishment: bool = False  # add `overlong_penalty` to the reward
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
    "dapo": Preset("grpo", PolicyLoss(eps_high=0.28), mini_batches=4, dynamic_sampling=True, overlong_punishment=True),
    "gspo": Preset("grpo", _GSPO, mini_batches=4),
    "gspo_token": Preset("grpo_process", _GSPO, mini_batches=4),
    "cispo": Preset("grpo", PolicyLoss(surrogate="is_pg", w_max=5.0), mini_batches=4),
    "sapo": Preset("grpo", PolicyLoss(surrogate="sapo", aggregation="seq_mean"), mini_batches=4),
    "scaling_grpo": Preset("grpo_mean", _V32, mini_batches=4),
    "dual_clip": Preset("grpo", PolicyLoss(dual_clip=3.0, aggregation="seq_mean"), mini_batches=4),
    "tis": Preset("grpo", PolicyLoss(importance="token_truncate", aggregation="seq_mean")),
    "mis": Preset("grpo", PolicyLoss(importance="token_mask", importance_floor=0.5, aggregation="seq_mean")),
    "online_rft": Preset("correct_only", PolicyLoss(ratio_level="none", surrogate="is_pg"), drop_zero_advantage=True),
}
