"""One policy loss. An algorithm is a row of options: see `minirl.presets`.

    loss = Σ_t w_t [ ω_t·S_t + β·K_t − α·H_t ]

What happens to one token, S, K, their derivatives and the clips, is `minirl.kernels.token_loss`; here is what takes
whole rows and whole optimizer steps: ratios and importance weights of sequences, and the weights w_t. A micro-batch is
only a memory knob: denominators are those of the whole optimizer step (`Totals`). `loss_and_metrics` is the one way in,
from log-probs or from hidden states.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minirl.errors import InputError
from minirl.kernels import TokenInputs, TokenLoss, linear_policy_terms, linear_token_logprobs, token_loss
from minirl.kernels.per_token import TOKEN_IMPORTANCES, TOKEN_LEVELS, Terms, guarded_exp, importance_weight
from minirl.loss_metrics import Over, derived, distance_metrics, mismatch_metrics, ratio_metrics, value_metrics


@dataclass(frozen=True)
class PolicyLoss(TokenLoss):
    """Choose a policy loss; the options are orthogonal."""

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


# ---- inputs and weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossInputs:
    """Hold the constants of the loss, of B rows with at most T tokens. Nothing under mask 0, NaN included, is read."""

    advantages: Tensor  # [B] or [B, T]
    mask: Tensor  # [B, T], 1 where a token counts
    old_logp: Tensor | None = None  # [B, T]; None: ρ = 1, a single on-policy update
    ref_logp: Tensor | None = None  # [B, T]; may be None if options.kl is "none"
    rollout_logp: Tensor | None = None  # [B, T], the sampler's
    group_ids: Tensor | None = None  # [B]


@dataclass(frozen=True)
class Totals:
    """Hold the counts that only the whole optimizer step knows; each of its micro-batches gets the same ones."""

    sequences: int  # rows with at least one counted token
    tokens: int  # counted tokens
    groups: int = 0  # groups with at least one counted token
    group_ids: Tensor | None = None  # [K] sorted ids of the step's groups
    group_tokens: Tensor | None = None  # [K] counted tokens of each
    entropy_floor: float | None = None  # the entropy_quantile of the step: tokens below it are not trained on
    metric_tokens: int | None = None  # the denominator of metrics where not all counted tokens are computed

    @classmethod
    def of(cls, mask, group_ids=None, entropy=None, entropy_quantile=None) -> "Totals":
        """Count mask [B, T] and group_ids [B] of the whole step; entropy [B, T] where its quantile is an option."""
        keep = mask.bool()
        lengths, ids, group_tokens, floor = keep.sum(1), None, None, None
        if group_ids is not None:
            ids, index = group_ids.unique(return_inverse=True)
            group_tokens = lengths.new_zeros(len(ids)).index_add_(0, index, lengths)
        # One threshold for the step: that of a micro-batch would depend on which rows happen to share it.
        if entropy_quantile is not None and keep.any():
            floor = _quantile(entropy.detach()[keep], 1 - entropy_quantile)
        groups = 0 if ids is None else int((group_tokens > 0).sum())
        return cls(int((lengths > 0).sum()), int(lengths.sum()), groups, ids, group_tokens, floor)

    @property
    def length(self) -> float:
        return self.tokens / max(self.sequences, 1)  # the mean

    def measured_over(self, tokens: int) -> "Totals":
        """Let metrics be means over `tokens`, those that are computed; the loss is the same."""
        return replace(self, metric_tokens=tokens)


def _quantile(x: Tensor, share: float) -> float:
    """Interpolate linearly between the order statistics of x [N]; `Tensor.quantile` refuses more than 2²⁴ of them."""
    ordered, place = x.sort().values, share * (len(x) - 1)
    below, above = (ordered[rank].double() for rank in (math.floor(place), math.ceil(place)))
    return torch.lerp(below, above, place - math.floor(place)).item()


def aggregation_weights(mask, options: PolicyLoss, totals: Totals, group_ids=None, dtype=torch.float32) -> Tensor:
    """Give w [B, T], the weight of a token in the loss; m = mask, L_i the counted tokens of row i, N those of the step:

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
    # A row without counted tokens is 0/0 here, and NaN · 0 would stay NaN.
    return torch.where(count > 0, m / count, 0)


def _group_tokens(group_ids, totals: Totals) -> Tensor:  # [B]
    if group_ids is None or totals.group_ids is None:
        raise InputError("group_token_mean needs group_ids; pass them to policy_loss and to Totals.of")
    # searchsorted gives a place for an id that is not there too.
    if not torch.isin(group_ids, totals.group_ids).all():
        raise InputError("policy_loss: totals lacks the group of a row; build Totals.of over the whole optimizer step")
    return totals.group_tokens[torch.searchsorted(totals.group_ids, group_ids)]


# ---- ratios and weights of rows --------------------------------------------------------------------------------------


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


def _waits_for_rows(o: PolicyLoss, old_logp) -> bool:
    """Tell whether the loss of a token depends on the policy's log-probs of other tokens."""
    if o.opsm_delta is not None or o.entropy_quantile is not None:
        return True
    if old_logp is None:  # every ratio is 1; the sampler's weights are taken against the policy itself
        return o.importance not in TOKEN_IMPORTANCES
    return o.ratio_level not in TOKEN_LEVELS


def _sampler_weights(o: PolicyLoss, log_ratio, keep):
    """Give u = exp(ℓo − ℓb) at the level of the importance weight, the weight, and where it was set to 0."""
    level, _, mode = o.importance.partition("_")
    levels = {"none": "token", "token": "token", "seq": "seq_sum", "geo": "seq_mean"}
    u, _ = guarded_exp(LEVELS[levels[level]](log_ratio, keep))
    weight, outside = importance_weight(u, mode or "truncate", o)
    return u, (~outside).to(weight) if level == "geo" else weight, outside


def _row_factors(o: PolicyLoss, x: LossInputs, logp, entropy, totals: Totals):
    """Give what whole rows decide: the log-ratio, None where each token has its own; a constant factor of S, namely
    importance weight × off-policy sequence mask (2512.02556 §3.1) × top-entropy mask; and what that mask drops."""
    log_ratio, omega, dropped = None, torch.ones_like(x.advantages), None
    old = logp if x.old_logp is None else x.old_logp
    if o.ratio_level not in TOKEN_LEVELS and x.old_logp is not None:
        log_ratio = LEVELS[o.ratio_level](logp - old, x.mask)
    if o.importance not in TOKEN_IMPORTANCES:
        omega = _sampler_weights(o, old - x.rollout_logp, x.mask)[1]
    if o.opsm_delta is not None:
        # From the sampler where it is known: the paper counts old data and the mismatch of the two engines alike.
        drift = (old if x.rollout_logp is None else x.rollout_logp) - logp
        dropped = (x.advantages < 0) & (_row_mean(drift, x.mask) > o.opsm_delta)
        omega = omega.masked_fill(dropped, 0)
    # A step without counted tokens has no threshold.
    if o.entropy_quantile is not None and totals.tokens:
        omega = omega.masked_fill(entropy < totals.entropy_floor, 0)
    return log_ratio, omega, dropped


# ---- the loss --------------------------------------------------------------------------------------------------------


# The gradient is written down, not left to autograd. For each token the kernels give c = ∂loss/∂ℓ and e = ∂loss/∂H
# (Terms, kernels/per_token.py), where the clip and the KL have done their work; a scalar worth 0 with exactly these
# slopes hands them to autograd, and the value of the loss is added. From log-probs `slope` below makes that scalar, and
# from hidden states by `linear_policy_terms` (kernels/linear.py), which passes c and e on through the head's softmax.


class Sweep(NamedTuple):
    """Hold what one pass over the tokens found, [B, T] each."""

    gradient: Tensor  # a scalar worth 0 whose gradient is that of the loss
    logp: Tensor
    entropy: Tensor | None
    terms: Terms
    computed: Tensor  # bool: the tokens that can have a gradient, which metrics are about


class LogProbs(NamedTuple):
    """Hold the policy's log-probs and, if an option needs them, entropies of the tokens, [B, T]; both with gradient."""

    logp: Tensor
    entropy: Tensor | None = None

    def known(self, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Give log-probs and entropies before the sweep; `wanted`: make them where they are not at hand."""
        return self

    def sweep(self, o: PolicyLoss, tokens: TokenInputs, logp: Tensor, entropy: Tensor | None) -> Sweep:
        """Evaluate the loss of each token; logp and entropy are those of `known`, 0 under the mask and detached."""
        t, on = token_loss(o, logp, entropy, tokens), tokens.weights != 0

        # Selected before it is multiplied: what stands under the mask, NaN too, reaches neither value nor gradient.
        def slope(by, x, x0):  # worth 0, and its gradient is `by`
            return (by * (torch.where(on, x.to(by.dtype), 0) - x0)).sum()

        gradient = slope(t.c, self.logp, logp)
        if o.entropy_coef:
            gradient = gradient + slope(t.e, self.entropy, entropy)
        return Sweep(gradient, logp, entropy, t, on)


class HiddenStates(NamedTuple):
    """Hold the hidden states that predict the tokens, and the head: no logits of all tokens exist at once."""

    hidden: Tensor  # [M, D], with gradient
    weight: Tensor  # [V, D], with gradient
    targets: Tensor  # [M]
    present: Tensor  # bool [B, T]: where the M tokens stand, row by row; a row without gradient need not be there
    head: dict  # temperature, kept and active of linear_token_logprobs

    def _grid(self, x: Tensor) -> Tensor:  # [M] -> [B, T]
        return x.new_zeros(self.present.shape).masked_scatter(self.present, x)

    @torch.no_grad()
    def known(self, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        # A sweep that makes all logits once more: only a loss that reads whole rows pays for it. Without
        # gradient, which is left to `sweep`.
        if not wanted:
            return None, None
        found = linear_token_logprobs(self.hidden, self.weight, self.targets, **self.head)
        return self._grid(found[0]), self._grid(found[1])

    def sweep(self, o: PolicyLoss, tokens: TokenInputs, logp: Tensor | None, entropy: Tensor | None) -> Sweep:
        flat = tokens.map(lambda x: x[self.present])
        loss, *found, t = linear_policy_terms(self.hidden, self.weight, self.targets, flat, o, **self.head)
        # What was known before holds for all tokens of a row, which its ratio needs; the sweep skips some of them.
        logp, entropy = map(self._grid, found) if logp is None else (logp, entropy)
        computed = with_gradient((tokens.weights != 0) & self.present, tokens.advantages, o)
        return Sweep(loss - loss.detach(), logp, entropy, Terms(*map(self._grid, t)), computed)


def loss_and_metrics(
    policy: LogProbs | HiddenStates, inputs: LossInputs, options: PolicyLoss, totals: Totals | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give loss = Σ_t w_t [ω_t·S_t + β·K_t + β_old·(ρ_t − 1 − log ρ_t) − α·H_t], to be minimised, and its metrics.

    One sweep over the tokens makes loss, gradient and what the metrics are made of; from hidden states a second sweep
    over the head comes before it where the loss of a token depends on the log-probs of its row. There metrics are means
    over the tokens that can have a gradient: no other is computed.
    The gradient of a sequence ratio is token-local, ∂ρ/∂ℓ_t = ρ, as in GSPO-token (2507.18071). For advantages [B] the
    loss is the function that has this gradient: a product of ratios (seq_sum) is the ratio of one action, the whole
    row, so its surrogate counts once a row and not once a token.
    totals=None: these rows are the whole optimizer step. Otherwise they are one of its micro-batches, and their losses
    and gradients add up; `combine_metrics` adds up the metrics.
    """
    o, keep, dtype = options, inputs.mask.bool(), torch.promote_types(policy[0].dtype, torch.float32)
    logp, entropy = policy.known(_waits_for_rows(o, inputs.old_logp))
    _check(o, inputs, logp, entropy, totals)
    whole_step = totals is None
    totals = Totals.of(keep, inputs.group_ids, entropy, o.entropy_quantile) if whole_step else totals

    def fill(x):  # selected, not multiplied: 0 · NaN is NaN
        return None if x is None else torch.where(keep, x.detach().to(dtype), 0)

    A = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages[:, None].expand(keep.shape)
    A, old, ref, rollout = map(fill, (A, inputs.old_logp, inputs.ref_logp, inputs.rollout_logp))
    x, logp, entropy = LossInputs(A, keep, old, ref, rollout), fill(logp), fill(entropy)
    log_ratio, omega, dropped = _row_factors(o, x, logp, entropy, totals)
    w = aggregation_weights(keep, o, totals, inputs.group_ids, dtype)
    sweep = policy.sweep(o, TokenInputs(A, w, old, ref, rollout, log_ratio, omega), logp, entropy)
    totals = totals.measured_over(int(sweep.computed.sum())) if whole_step else totals
    with torch.no_grad():
        metrics = _metrics(o, x, sweep, dropped, totals)
    # The value is that of the metrics: the sum over tokens would count the S of a row once for each of its tokens.
    return metrics["loss/total"].to(sweep.gradient) + sweep.gradient, metrics


def policy_loss(
    logp, old_logp, ref_logp, advantages, mask, options, *, entropy=None, rollout_logp=None, group_ids=None, totals=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call `loss_and_metrics` on log-probs: logp and entropy [B, T] carry the gradient, the others are `LossInputs`."""
    inputs = LossInputs(advantages, mask, old_logp, ref_logp, rollout_logp, group_ids)
    return loss_and_metrics(LogProbs(logp, entropy), inputs, options, totals)


def with_gradient(mask, advantages, o: PolicyLoss) -> Tensor:
    """Mark [B, T] the counted tokens whose gradient is not zero for certain; advantages are [B] or [B, T]."""
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    return mask.bool() & (A != 0) if o.follows_advantage else mask.bool()


def _metrics(o: PolicyLoss, x: LossInputs, sweep: Sweep, dropped, totals: Totals) -> dict[str, Tensor]:
    t, logp, counted = sweep.terms, sweep.logp, sweep.computed
    old = logp if x.old_logp is None else x.old_logp
    # The product of a row's ratios is the ratio of one action, so its S counts once; yet each token carries it, so that
    # each has its gradient. is_pg needs no such division: its S is a sum over tokens, −A·ℓ_t times a constant.
    once_a_row = o.ratio_level == "seq_sum" and o.surrogate != "is_pg"
    policy = t.policy / x.mask.sum(1, keepdim=True).clamp(min=1) if once_a_row else t.policy
    metrics = {"loss/policy": policy.sum(), "loss/kl": t.kl.sum(), "loss/entropy": t.entropy.sum()}
    metrics["loss/total"] = sum(metrics.values())

    over = Over(counted, totals.tokens if totals.metric_tokens is None else totals.metric_tokens)
    metrics |= ratio_metrics(over, LEVELS[o.ratio_level](logp - old, x.mask), t)
    metrics |= distance_metrics(over, logp, sweep.entropy, old, x.ref_logp, totals.length)
    if x.rollout_logp is not None:
        u, _, outside = _sampler_weights(o, old - x.rollout_logp, x.mask)
        metrics |= mismatch_metrics(over, old - x.rollout_logp, u, outside)
    if dropped is not None:
        metrics["opsm/masked_frac"] = over.mean(dropped)
    return derived(metrics)


def _check(o: PolicyLoss, x: LossInputs, logp, entropy, totals) -> None:
    full, rows = x.mask.shape, x.mask.shape[:1]
    fits = {"advantages": (full, rows), "group_ids": (rows,)}
    for name, value in ({"logp": logp, "entropy": entropy} | vars(x)).items():
        if value is not None and value.shape not in fits.get(name, (full,)):
            raise InputError(f"policy_loss: {name} is {list(value.shape)}, mask [B, T] is {list(full)}; make them fit")
    step = totals is None or not totals.tokens or totals.entropy_floor is not None
    known = entropy is not None or logp is None  # hidden states have their entropy
    for fine, need in (
        (x.ref_logp is not None or o.kl == "none", f"kl={o.kl!r} needs ref_logp; pass it or set kl='none'"),
        (x.rollout_logp is not None or o.importance == "none", "importance needs rollout_logp; pass it or set 'none'"),
        (known or not o.entropy_coef, "entropy_coef needs entropy; pass it or set 0"),
        (known or o.entropy_quantile is None, "entropy_quantile needs entropy; pass it or set None"),
        (step or o.entropy_quantile is None, "entropy_quantile is one of the whole step; pass it to Totals.of"),
    ):
        if not fine:
            raise InputError(f"policy_loss: {need}")


# ---- critic, controllers ---------------------------------------------------------------------------------------------


def value_loss(values, old_values, returns, mask, clip: float | None = 0.2, totals: Totals | None = None):
    """Give ½·mean_t max((V − R)², (clip(V, V_old ± ε) − R)²) and its metrics; clip=None is the plain square.

    values [B, T] carry the gradient; old_values (unused where clip is None), returns and mask [B, T] are constants.
    """
    keep, totals = mask.bool(), Totals.of(mask) if totals is None else totals
    dtype = torch.promote_types(values.dtype, torch.float32)
    v, R = torch.where(keep, values.to(dtype), 0), torch.where(keep, returns, 0)
    square, cut = (v - R) ** 2, torch.zeros_like(keep)
    if clip is not None:
        old = torch.where(keep, old_values, 0)
        clipped = (old + (v - old).clamp(-clip, clip) - R) ** 2
        cut = clipped > square
        # Where a value has come nearer to its return by more than ε, the constant square of the clip is the larger: no
        # gradient moves it on.
        square = torch.where(cut, clipped, square)
    loss = 0.5 * square.sum() / max(totals.tokens, 1)
    return loss, derived({"loss/value": loss} | value_metrics(Over(keep, totals.tokens), v, R, cut))


def adaptive_kl_ziegler(beta: float, kl: float, *, episodes: int, target: float = 6.0, horizon: int = 10_000) -> float:
    """Give β·(1 + episodes/horizon·clip(KL/target − 1, ±0.2)), KL the mean of sequence sums (1909.08593 §2.2)."""
    return beta * (1 + episodes / horizon * min(max(kl / target - 1, -0.2), 0.2))


def adaptive_kl_ppo(beta: float, kl: float, *, target: float) -> float:
    """Give β/2 where KL < target/1.5, 2β where KL > 1.5·target (1707.06347 §4)."""
    return beta / 2 if kl < target / 1.5 else beta * 2 if kl > target * 1.5 else beta
