"""The policy loss of a token, with both derivatives written out: the definition, and the same in Triton.

    loss = Σ_t w_t [ ω_t·S_t + β·K_t + β_old·K_old,t − α·H_t ]
    c_t  = ∂loss/∂ℓ_t = w_t [ −ω_t·A_t·g_t + β·κ_t − β_old·κ_old,t ]        e_t = ∂loss/∂H_t = −α·w_t

ℓ, ℓo, ℓr, ℓb are the log-probs of the token under the policy, the policy before the update, the reference and the
sampler; H is the entropy of the policy's distribution. A surrogate returns its value S beside its gain g, a KL its
value K beside its slope κ: the gradient at a clip's edge, beyond the exponent's guard and of a sequence ratio is what
is written here, not what autograd makes of min and clamp. Supervised, preference and reward-weighted losses are rules
for (c, e) too: likelihood is surrogate "is_pg" with ratio_level "none" and A = 1.

The guard cuts a ratio off, and its derivative with it; a KL goes on beyond it. A κ that changed its sign there would
push the policy away from the reference where it is farthest from it. So κ is the true slope with guarded exponentials,
and K is its integral: finite differences of K give κ on both sides of the guard.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import backend as run
from .backend import tl, triton
from .logprobs import vectors

GUARD = 20.0  # exp never sees a log-ratio beyond ±GUARD, and the ratio's derivative is 0 there
GUARD_ = tl.constexpr(GUARD)


@dataclass(frozen=True)
class TokenLoss:
    """The options of the loss that concern one token at a time; they are orthogonal."""

    ratio_level: Literal["token", "none"] = "token"
    """ρ of a token (PPO), or 1 (REINFORCE)."""
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
    importance: Literal["none", "token_truncate", "token_mask"] = "none"
    """Where sampler and trainer disagree, weigh with u = exp(ℓo − ℓb): truncated at importance_cap, or 0 outside
    [importance_floor, importance_cap]."""
    importance_cap: float = 2.0
    """The largest importance weight."""
    importance_floor: float = 0.0
    """The mask modes: the smallest importance weight."""

    def __post_init__(self):
        for field in fields(self):
            allowed, value = get_args(field.type), getattr(self, field.name)
            if isinstance(field.default, str) and value not in allowed:
                raise ValueError(f"{field.name}={value!r} is unknown: use one of {', '.join(allowed)}")

    @property
    def follows_advantage(self) -> bool:
        """Whether a token with A = 0 has no gradient at all."""
        return self.kl == "none" and not self.kl_old_coef and not self.entropy_coef


# ---- the definition: ratio, surrogate, KL ----------------------------------------------------------------------------


def guarded_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(clamp(x, ±20)) and its derivative, which is 0 outside the guard."""
    y = x.clamp(-GUARD, GUARD).exp()
    return y, y.masked_fill(x.abs() > GUARD, 0)


def _never(x):
    return torch.zeros_like(x, dtype=torch.bool)


def clip(ratio, slope, A, logp, o: TokenLoss):
    """S = −min(ρA, clip(ρ, 1 − ε_lo, 1 + ε_hi)A), then min(S, −cA) where A < 0; g = ρ where nothing is cut.

    1707.06347 eq. 7; 1912.09729 eq. 5 for the dual clip c.
    """
    ceiling = math.inf if o.dual_clip is None else o.dual_clip
    high = (A > 0) & (ratio > 1 + o.eps_high)
    low = (A < 0) & (ratio < 1 - o.eps_low)
    dual = (A < 0) & (ratio > ceiling)
    held = ratio.masked_fill(high, 1 + o.eps_high).masked_fill(low, 1 - o.eps_low).masked_fill(dual, ceiling)
    return -A * held, slope.masked_fill(high | low | dual, 0), (high, low, dual)


def is_pg(ratio, slope, A, logp, o: TokenLoss):
    """S = −sg[clamp(ρ, w_min, w_max)]·A·ℓ; g is that weight (2506.13585 eq. 4). Its flags: the weight was clamped."""
    weight = ratio.clamp(o.w_min, o.w_max)
    return -weight * A * logp, weight, (ratio > o.w_max, ratio < o.w_min, _never(A))


def sapo(ratio, slope, A, logp, o: TokenLoss):
    """S = −(4/τ)·σ(τ(ρ − 1))·A; g = 4σ(1 − σ)ρ, with τ = tau_pos where A > 0, else tau_neg (2511.20347)."""
    tau = torch.full_like(A, o.tau_neg).masked_fill(A > 0, o.tau_pos)
    x = tau * (ratio - 1)
    return -4 / tau * x.sigmoid() * A, 4 * x.sigmoid() * (-x).sigmoid() * slope, (_never(A), _never(A), _never(A))


SURROGATES = {"clip": clip, "is_pg": is_pg, "sapo": sapo}  # (ρ, ∂ρ/∂ℓ, A, ℓ, options) -> S, g, (cut high, low, dual)


def k2(d, token_lr):
    """d²/2 with slope d = ℓ − ℓr: on policy its expected gradient is that of KL(π_θ‖π_ref)."""
    return d**2 / 2, d


def k3(d, token_lr=None):
    """e^{−d} + d − 1 with slope 1 − e^{−d} (2402.03300 eq. 4); expm1 keeps the digits that the plain form loses.

    Beyond the guard the slope stays as it is at the guard, so K goes on along its tangent.
    """
    held = d.clamp(-GUARD, GUARD)
    expm1 = (-held).expm1()
    return expm1 + held - expm1 * (d - held), -expm1


def k3_is(d, token_lr):
    """ρ·k3 with slope ρ·d, ρ being the unclipped token ratio: the exact gradient of KL(π_θ‖π_ref) (2512.02556 §3.1).

    Only ρ is guarded. K = ρ(d − 1) + π_ref/π_old needs no e^{−d} where that is beyond the guard; where ρ stands still K
    grows by ρ∫d from d₀, at which ρ met the guard.
    """
    held = token_lr.clamp(-GUARD, GUARD)
    ratio, d0 = held.exp(), d - (token_lr - held)
    far = ratio * (d0 - 1) + (held - d0).clamp(-2 * GUARD, 2 * GUARD).exp()
    K = torch.where(d0.abs() > GUARD, far, ratio * k3(d0)[0])
    return K + ratio * (d + d0) / 2 * (token_lr - held), ratio * d


KLS = {"k2": k2, "k3": k3, "k3_is": k3_is}  # (d = ℓ − ℓr, ℓ − ℓo) -> K, κ


def importance_weight(u: Tensor, mode: str, o: TokenLoss) -> tuple[Tensor, Tensor]:
    """ω from u = π_old/π_sampler, and where it was set to 0; `mode` is "truncate" or "mask"."""
    outside = (u < o.importance_floor) | (u > o.importance_cap) if mode == "mask" else _never(u)
    return u.clamp(max=o.importance_cap).masked_fill(outside, 0), outside


class Terms(NamedTuple):
    """Of each token: the parts of the loss, its derivatives by ℓ and H, and what the clips did."""

    policy: Tensor
    kl: Tensor
    entropy: Tensor
    c: Tensor
    e: Tensor
    ratio: Tensor
    cut: tuple[Tensor, Tensor, Tensor]

    @property
    def loss(self) -> Tensor:
        return self.policy + self.kl + self.entropy


def token_loss(
    options: TokenLoss,
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    log_ratio: Tensor | None = None,
    omega: Tensor | None = None,
) -> Terms:
    """The loss of each token and its derivatives; all tensors have one shape and carry no gradient.

    weights: w, what a token's loss counts in the sum; 0 = masked, and nothing there reaches the result. old_logp=None:
    ρ = 1, a single on-policy update. log_ratio replaces ℓ − ℓo in ρ, omega the importance weight: for ratios and
    weights of whole rows, which no token knows.
    """
    o, on, weights = options, weights != 0, weights.to(logp.dtype)
    old_logp = logp if old_logp is None else old_logp

    def fill(x):
        return None if x is None else torch.where(on, x, 0).to(logp.dtype)

    A, logp, old, ref, rollout, H = map(fill, (advantages, logp, old_logp, ref_logp, rollout_logp, entropy))
    token_lr = logp - old
    if log_ratio is None:
        log_ratio = torch.zeros_like(logp) if o.ratio_level == "none" else token_lr
    ratio, slope = guarded_exp(fill(log_ratio))
    S, g, cut = SURROGATES[o.surrogate](ratio, slope, A, logp, o)
    omega = torch.ones_like(logp) if omega is None else fill(omega)
    if o.importance.startswith("token") and rollout is not None:
        omega = omega * importance_weight(guarded_exp(old - rollout)[0], o.importance.partition("_")[2], o)[0]

    K = kappa = torch.zeros_like(logp)
    if o.kl != "none":
        K, kappa = KLS[o.kl](logp - ref, token_lr)
        if o.kl_clamp is not None:
            over = o.kl_clamp < K
            K, kappa = K.clamp(max=o.kl_clamp), kappa.masked_fill(over, 0)
    K, kappa = o.kl_coef * K, o.kl_coef * kappa
    if o.kl_old_coef:
        K_old, slope_old = k3(-token_lr)  # ρ − 1 − log ρ, the k3 of KL(π_old‖π_θ) on samples of π_old
        K, kappa = K + o.kl_old_coef * K_old, kappa - o.kl_old_coef * slope_old

    e = -o.entropy_coef * weights
    bonus = e * H if o.entropy_coef else torch.zeros_like(logp)
    return Terms(weights * omega * S, weights * K, bonus, weights * (kappa - omega * A * g), e, ratio, cut)


def check_tokens(o: TokenLoss, rows: int, **tokens: Tensor | None) -> None:
    """What the options need is there, one number a row; a ValueError says what is not."""
    for name, x in tokens.items():
        if x is not None and x.shape != (rows,):
            raise ValueError(f"{name} has shape {list(x.shape)}, and there are {rows} rows: pass one number a row")
    given = {name for name, x in tokens.items() if x is not None}
    for needed, name, why in (
        (o.kl != "none", "ref_logp", f"kl={o.kl!r}"),
        (o.importance.startswith("token") and "omega" not in given, "rollout_logp", f"importance={o.importance!r}"),
        (o.ratio_level.startswith("seq") and "old_logp" in given, "log_ratio", f"ratio_level={o.ratio_level!r}"),
        (o.importance.partition("_")[0] in ("seq", "geo"), "omega", f"importance={o.importance!r}"),
    ):
        if needed and name not in given:
            raise ValueError(f"{why} needs {name}, one number a row")


# ---- the same in Triton ----------------------------------------------------------------------------------------------


class Knobs(NamedTuple):
    """The numbers among the options: run-time arguments, so that another clip range compiles nothing anew."""

    eps_low: float
    eps_high: float
    dual_clip: float
    w_min: float
    w_max: float
    tau_pos: float
    tau_neg: float
    kl_coef: float
    kl_clamp: float
    kl_old_coef: float
    entropy_coef: float
    importance_cap: float
    importance_floor: float


def knobs(o: TokenLoss) -> Knobs:
    return Knobs(*(float(math.inf if getattr(o, name) is None else getattr(o, name)) for name in Knobs._fields))


class Tokens(NamedTuple):
    """Pointers to one number a row, or None."""

    advantages: Tensor
    weights: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    log_ratio: Tensor | None
    omega: Tensor | None


def pointers(o: TokenLoss, tokens: dict[str, Tensor | None]) -> Tokens:
    """fp32 and contiguous, as the kernels read them; only what the options need."""
    unused = {"rollout_logp"} if not o.importance.startswith("token") else set()
    unused |= {"ref_logp"} if o.kl == "none" else set()
    given = {name: x for name, x in tokens.items() if x is not None and name not in unused}
    return Tokens(
        **{name: None for name in Tokens._fields} | {n: x.detach().float().contiguous() for n, x in given.items()}
    )


@triton.jit
def _clamped(x):
    # Triton's min and max drop a NaN, which must show.
    return tl.where(x == x, tl.minimum(tl.maximum(x, -GUARD_), GUARD_), x)


@triton.jit
def _guarded_exp(x):
    y = tl.exp(_clamped(x))
    return y, tl.where(tl.abs(x) > GUARD_, 0.0, y)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _k3(d):
    """e^{−d} + d − 1 and its slope. Below ½ the plain form loses its digits, and the Taylor series has them all."""
    x = -_clamped(d)
    series = 1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))
    series += (1.0 / 40320 + x * (1.0 / 362880 + x / 3628800.0)) * (x * x * x) * (x * x * x)
    small = tl.abs(x) < 0.5
    plain = tl.exp(x) - 1.0
    expm1 = tl.where(small, x + x * x * series, plain)
    K = tl.where(small, x * x * series, plain - x) - expm1 * (d + x)  # d + x is 0 within the guard
    return K, -expm1


@triton.jit
def _k3_is(d, token_lr):
    held = _clamped(token_lr)
    ratio, d0 = tl.exp(held), d - (token_lr - held)
    far = ratio * (d0 - 1.0) + tl.exp(tl.minimum(tl.maximum(held - d0, -2.0 * GUARD_), 2.0 * GUARD_))
    K = tl.where(tl.abs(d0) > GUARD_, far, ratio * _k3(d0)[0])
    return K + ratio * (d + d0) * 0.5 * (token_lr - held), ratio * d


@triton.jit
def _at(pointer, i):
    if pointer is None:
        return 0.0
    else:
        return tl.load(pointer + i)


@triton.jit
def token_values(t, i):
    """What `Tokens` points to for the rows i, asked for before it is needed; 0 where there is nothing."""
    return (
        _at(t.advantages, i), _at(t.weights, i), _at(t.old_logp, i), _at(t.ref_logp, i), _at(t.rollout_logp, i),
        _at(t.log_ratio, i), _at(t.omega, i),
    )  # fmt: skip


@triton.jit
def token_terms(
    logp, entropy, t, values, o, RATIO: tl.constexpr, SURROGATE: tl.constexpr, KL: tl.constexpr, MASK: tl.constexpr
):
    """`token_loss`: loss, c and e. `t` tells which of the values there are."""
    A, w, old, ref, rollout, log_ratio, omega = values
    if t.old_logp is None:
        old = logp
    token_lr = logp - old
    if t.log_ratio is not None:
        ratio, slope = _guarded_exp(log_ratio)
    elif RATIO == "none":
        ratio, slope = _guarded_exp(tl.zeros_like(logp))
    else:
        ratio, slope = _guarded_exp(token_lr)

    if SURROGATE == "clip":
        high = (A > 0) & (ratio > 1.0 + o.eps_high)
        low = (A < 0) & (ratio < 1.0 - o.eps_low)
        dual = (A < 0) & (ratio > o.dual_clip)
        held = tl.where(dual, o.dual_clip, tl.where(low, 1.0 - o.eps_low, tl.where(high, 1.0 + o.eps_high, ratio)))
        S = -A * held
        g = tl.where(high | low | dual, 0.0, slope)
    elif SURROGATE == "is_pg":
        g = tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, o.w_min), o.w_max), ratio)
        S = -g * A * logp
    else:
        tau = tl.where(A > 0, o.tau_pos, o.tau_neg)
        x = tau * (ratio - 1.0)
        S = -4.0 / tau * _sigmoid(x) * A
        g = 4.0 * _sigmoid(x) * _sigmoid(-x) * slope

    if t.omega is None:
        omega = tl.zeros_like(A) + 1.0
    if t.rollout_logp is not None:
        u, _ = _guarded_exp(old - rollout)
        if MASK:
            u = tl.where((u < o.importance_floor) | (u > o.importance_cap), 0.0, u)
        omega *= tl.where(u > o.importance_cap, o.importance_cap, u)

    K_old, slope_old = _k3(-token_lr)
    value = tl.where(o.kl_old_coef == 0, 0.0, o.kl_old_coef * K_old)
    kappa = tl.where(o.kl_old_coef == 0, 0.0, -o.kl_old_coef * slope_old)
    if KL != "none":
        d = logp - ref
        if KL == "k2":
            K = d * d * 0.5
            k = d
        elif KL == "k3":
            K, k = _k3(d)
        else:
            K, k = _k3_is(d, token_lr)
        over = o.kl_clamp < K
        value += o.kl_coef * tl.where(over, o.kl_clamp, K)
        kappa += o.kl_coef * tl.where(over, 0.0, k)

    e = -o.entropy_coef * w
    loss = w * (omega * S + value) + e * entropy
    c = w * (kappa - omega * A * g)
    on = w != 0
    return tl.where(on, loss, 0.0), tl.where(on, c, 0.0), tl.where(on, e, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _token_kernel(
    logp, entropy, t, o, loss, c, e, rows,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, KL: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    i = tl.where(inside, i, 0)
    value, by_logp, by_entropy = token_terms(
        tl.load(logp + i), tl.load(entropy + i), t, token_values(t, i), o, RATIO, SURROGATE, KL, MASK
    )
    tl.store(loss + i, value, mask=inside)
    tl.store(c + i, by_logp, mask=inside)
    tl.store(e + i, by_entropy, mask=inside)


def kinds(o: TokenLoss) -> dict[str, object]:
    """The choices among the options: each combination is a kernel of its own."""
    ratio = "none" if o.ratio_level == "none" else "token"
    return {"RATIO": ratio, "SURROGATE": o.surrogate, "KL": o.kl, "MASK": o.importance.endswith("mask")}


def token_loss_triton(options: TokenLoss, logp: Tensor, entropy: Tensor, **tokens) -> tuple[Tensor, Tensor, Tensor]:
    """`token_loss` in one launch: loss, c and e of each row."""
    loss, c, e = vectors(logp, 3)
    block = 256
    args = (logp, entropy, pointers(options, tokens), knobs(options), loss, c, e, len(logp))
    run.launch(_token_kernel, (triton.cdiv(len(logp), block),), *args, **kinds(options), BLOCK=block)
    return loss, c, e
