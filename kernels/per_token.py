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
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import backend as run
from .backend import tl, triton
from .logprobs import empty_vectors

GUARD = 20.0  # exp never sees a log-ratio beyond ±GUARD, and the ratio's derivative is 0 there
GUARD_ = tl.constexpr(GUARD)
TOKEN_LEVELS = ("token", "none")  # whose ratio a token knows by itself
TOKEN_IMPORTANCES = ("none", "token_truncate", "token_mask")


@dataclass(frozen=True)
class TokenLoss:
    """Choose what the loss does to one token at a time; the options are orthogonal."""

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
        """Tell whether a token with A = 0 has no gradient at all."""
        return self.kl == "none" and not self.kl_old_coef and not self.entropy_coef


# ---- the definition: ratio, surrogate, KL ----------------------------------------------------------------------------


def guarded_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Give exp(clamp(x, ±20)) and its derivative, which is 0 outside the guard."""
    y = x.clamp(-GUARD, GUARD).exp()
    return y, y.masked_fill(x.abs() > GUARD, 0)


def _never(x):
    return torch.zeros_like(x, dtype=torch.bool)


def clip(ratio, slope, A, logp, o: TokenLoss):
    """Give S = −min(ρA, clip(ρ, 1 − ε_lo, 1 + ε_hi)A), then min(S, −cA) where A < 0; g = ρ where nothing is cut.

    1707.06347 eq. 7; 1912.09729 eq. 5 for the dual clip c.
    """
    ceiling = math.inf if o.dual_clip is None else o.dual_clip
    high = (A > 0) & (ratio > 1 + o.eps_high)
    low = (A < 0) & (ratio < 1 - o.eps_low)
    dual = (A < 0) & (ratio > ceiling)
    held = ratio.masked_fill(high, 1 + o.eps_high).masked_fill(low, 1 - o.eps_low).masked_fill(dual, ceiling)
    return -A * held, slope.masked_fill(high | low | dual, 0), (high, low, dual)


def is_pg(ratio, slope, A, logp, o: TokenLoss):
    """Give S = −sg[clamp(ρ, w_min, w_max)]·A·ℓ and g, that weight (2506.13585 eq. 4); flags mark a clamped weight."""
    weight = ratio.clamp(o.w_min, o.w_max)
    return -weight * A * logp, weight, (ratio > o.w_max, ratio < o.w_min, _never(A))


def sapo(ratio, slope, A, logp, o: TokenLoss):
    """Give S = −(4/τ)·σ(τ(ρ − 1))·A; g = 4σ(1 − σ)ρ, with τ = tau_pos where A > 0, else tau_neg (2511.20347)."""
    tau = torch.full_like(A, o.tau_neg).masked_fill(A > 0, o.tau_pos)
    x = tau * (ratio - 1)
    return -4 / tau * x.sigmoid() * A, 4 * x.sigmoid() * (-x).sigmoid() * slope, (_never(A), _never(A), _never(A))


SURROGATES = {"clip": clip, "is_pg": is_pg, "sapo": sapo}  # (ρ, ∂ρ/∂ℓ, A, ℓ, options) -> S, g, (cut high, low, dual)


def k2(d, token_lr):
    """Give d²/2 with slope d = ℓ − ℓr: on policy its expected gradient is that of KL(π_θ‖π_ref)."""
    return d**2 / 2, d


def k3(d, token_lr=None):
    """Give e^{−d} + d − 1 with slope 1 − e^{−d} (2402.03300 eq. 4).

    expm1 keeps the digits that the plain form loses. Beyond the guard the slope stays as it is at the guard, so K goes
    on along its tangent.
    """
    held = d.clamp(-GUARD, GUARD)
    expm1 = (-held).expm1()
    return expm1 + held - expm1 * (d - held), -expm1


def k3_is(d, token_lr):
    """Give ρ·k3 with slope ρ·d, the exact gradient of KL(π_θ‖π_ref) (2512.02556 §3.1); ρ is the unclipped token ratio.

    Only ρ is guarded. K = ρ(d − 1) + π_ref/π_old needs no e^{−d} where that is beyond the guard; where ρ stands still K
    grows by ρ∫d from d₀, at which ρ met the guard.
    """
    held = token_lr.clamp(-GUARD, GUARD)
    ratio, d0 = held.exp(), d - (token_lr - held)
    far = ratio * (d0 - 1) + (held - d0).clamp(-2 * GUARD, 2 * GUARD).exp()
    K = torch.where(d0.abs() > GUARD, far, ratio * k3(d0)[0])
    return K + ratio * (d + d0) / 2 * (token_lr - held), ratio * d


KLS = {"k2": k2, "k3": k3, "k3_is": k3_is}  # (d = ℓ − ℓr, ℓ − ℓo) -> K, κ


def importance_weight(u: Tensor, mode: Literal["truncate", "mask"], o: TokenLoss) -> tuple[Tensor, Tensor]:
    """Give the importance weight from u = π_old/π_sampler, and where it was set to 0."""
    outside = {"truncate": _never, "mask": lambda u: (u < o.importance_floor) | (u > o.importance_cap)}[mode](u)
    return u.clamp(max=o.importance_cap).masked_fill(outside, 0), outside


# ---- the definition: one token --------------------------------------------------------------------------------------


class TokenInputs(NamedTuple):
    """Hold the constants of the loss, one number a token; None is not given."""

    advantages: Tensor
    weights: Tensor  # w; 0 = masked, and nothing that stands there reaches the result
    old_logp: Tensor | None = None  # ℓo; None: ρ = 1, a single on-policy update
    ref_logp: Tensor | None = None  # ℓr
    rollout_logp: Tensor | None = None  # ℓb
    log_ratio: Tensor | None = None  # takes the place of ℓ − ℓo in ρ: the ratio of a whole row
    omega: Tensor | None = None  # a factor of S beside the token's importance weight: the weight of a whole row

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenInputs":
        """Apply the function to every tensor that is given."""
        return TokenInputs(*(None if x is None else function(x) for x in self))

    def checked(self, o: TokenLoss, rows: int) -> "TokenInputs":
        """Detach all, once it is sure that what the options need is there, one number a row; else a ValueError."""
        given = {name: x for name, x in self._asdict().items() if x is not None}
        for name, x in given.items():
            if x.shape != (rows,):
                raise ValueError(f"{name} has shape {list(x.shape)}, and there are {rows} rows: pass one number a row")
        for needed, name, why in (
            (o.kl != "none", "ref_logp", f"kl={o.kl!r}"),
            (o.importance.startswith("token") and "omega" not in given, "rollout_logp", f"importance={o.importance!r}"),
            (o.ratio_level not in TOKEN_LEVELS and "old_logp" in given, "log_ratio", f"ratio_level={o.ratio_level!r}"),
            (o.importance not in TOKEN_IMPORTANCES, "omega", f"importance={o.importance!r}"),
        ):
            if needed and name not in given:
                raise ValueError(f"{why} needs {name}, one number a row")
        return self.map(Tensor.detach)


class Terms(NamedTuple):
    """Hold the loss of each token by its parts, its derivatives by ℓ and H, and what the surrogate cut."""

    policy: Tensor  # w·ω·S
    kl: Tensor  # w·(β·K + β_old·K_old)
    entropy: Tensor  # −w·α·H
    c: Tensor  # ∂loss/∂ℓ
    e: Tensor  # ∂loss/∂H
    ratio: Tensor  # ρ
    high: Tensor  # bool: ρ was cut from above, here and below by the clip or by the weight's limits
    low: Tensor  # bool: from below
    dual: Tensor  # bool: by the dual clip

    @property
    def loss(self) -> Tensor:
        return self.policy + self.kl + self.entropy


def token_loss(options: TokenLoss, logp: Tensor, entropy: Tensor | None, inputs: TokenInputs) -> Terms:
    """Compute the loss of each token and its derivatives; all tensors have one shape and carry no gradient."""
    o, on = options, inputs.weights != 0

    def fill(x):  # selected, not multiplied: 0 · NaN is NaN
        return torch.where(on, x, 0).to(logp.dtype)

    logp, H = fill(logp), None if entropy is None else fill(entropy)
    A, w, old, ref, rollout, log_ratio, omega = inputs.map(fill)
    old = logp if old is None else old
    token_lr = logp - old
    if log_ratio is None:
        log_ratio = torch.zeros_like(logp) if o.ratio_level == "none" else token_lr
    ratio, slope = guarded_exp(log_ratio)
    S, g, cut = SURROGATES[o.surrogate](ratio, slope, A, logp, o)
    omega = torch.ones_like(logp) if omega is None else omega
    # A constant of the loss, also where ℓo is the policy's own ℓ: an importance weight is never differentiated.
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

    e = -o.entropy_coef * w
    bonus = e * H if o.entropy_coef else torch.zeros_like(logp)
    return Terms(w * omega * S, w * K, bonus, w * (kappa - omega * A * g), e, ratio, *cut)


# ---- the same in Triton ----------------------------------------------------------------------------------------------
# token_terms repeats token_loss line by line. A choice that it does not know fails to compile: a surrogate that was
# added to the definition alone must not train as another one on a GPU.

KernelOptions = namedtuple("KernelOptions", [field.name for field in fields(TokenLoss)])


def kernel_options(o: TokenLoss) -> KernelOptions:
    """Give the options as kernels take them. Choices are compiled in; numbers come at run time, so that another clip
    range compiles nothing anew; None is infinity."""
    # What PolicyLoss adds concerns whole rows and comes in as log_ratio and omega: no kernel of its own is needed.
    level = o.ratio_level if o.ratio_level in TOKEN_LEVELS else "token"
    importance = o.importance if o.importance in TOKEN_IMPORTANCES else "none"
    chosen = {"ratio_level": level, "importance": importance, "surrogate": o.surrogate, "kl": o.kl}
    numbers = {name: getattr(o, name) for name in KernelOptions._fields if name not in chosen}
    return KernelOptions(
        **{name: tl.constexpr(choice) for name, choice in chosen.items()},
        **{name: math.inf if x is None else float(x) for name, x in numbers.items()},
    )


def kernel_inputs(o: TokenLoss, inputs: TokenInputs) -> TokenInputs:
    """Give the inputs as kernels take them, fp32 and contiguous, and only what the options need: each None makes a form
    of the kernel of its own."""
    ref = None if o.kl == "none" else inputs.ref_logp
    rollout = inputs.rollout_logp if o.importance.startswith("token") else None
    needed = inputs._replace(ref_logp=ref, rollout_logp=rollout)
    return needed.map(lambda x: x.detach().float().contiguous())


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
    """Give e^{−d} + d − 1 and its slope; below ½ by the Taylor series, as the plain form would lose its digits."""
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
    """Load the `TokenInputs` of the rows i, 0 where there is nothing; before the sweep over a row that needs them, so
    that they arrive while it runs."""
    return (
        _at(t.advantages, i), _at(t.weights, i), _at(t.old_logp, i), _at(t.ref_logp, i), _at(t.rollout_logp, i),
        _at(t.log_ratio, i), _at(t.omega, i),
    )  # fmt: skip


@triton.jit
def token_terms(logp, entropy, t, values, o):
    """Repeat `token_loss`, and give its `Terms`; `t` tells which of the values are given."""
    A, w, old, ref, rollout, log_ratio, omega = values
    if t.old_logp is None:
        old = logp
    token_lr = logp - old
    if t.log_ratio is not None:
        ratio, slope = _guarded_exp(log_ratio)
    elif o.ratio_level == "none":
        ratio, slope = _guarded_exp(tl.zeros_like(logp))
    else:
        ratio, slope = _guarded_exp(token_lr)

    high = tl.zeros_like(w) != 0  # false where a surrogate does not cut
    low = high
    dual = high
    if o.surrogate == "clip":
        high = (A > 0) & (ratio > 1.0 + o.eps_high)
        low = (A < 0) & (ratio < 1.0 - o.eps_low)
        dual = (A < 0) & (ratio > o.dual_clip)
        held = tl.where(dual, o.dual_clip, tl.where(low, 1.0 - o.eps_low, tl.where(high, 1.0 + o.eps_high, ratio)))
        S = -A * held
        g = tl.where(high | low | dual, 0.0, slope)
    elif o.surrogate == "is_pg":
        high = ratio > o.w_max
        low = ratio < o.w_min
        g = tl.where(high, o.w_max, tl.where(low, o.w_min, ratio))
        S = -g * A * logp
    elif o.surrogate == "sapo":
        tau = tl.where(A > 0, o.tau_pos, o.tau_neg)
        x = tau * (ratio - 1.0)
        S = -4.0 / tau * _sigmoid(x) * A
        g = 4.0 * _sigmoid(x) * _sigmoid(-x) * slope
    else:
        tl.static_assert(False, "token_terms does not know this surrogate: write it here as in token_loss")

    if t.omega is None:
        omega = tl.zeros_like(A) + 1.0
    if t.rollout_logp is not None:
        u, _ = _guarded_exp(old - rollout)
        if o.importance == "token_mask":
            u = tl.where((u < o.importance_floor) | (u > o.importance_cap), 0.0, u)
        else:
            tl.static_assert(o.importance == "token_truncate", "token_terms does not know this importance weight")
        omega *= tl.where(u > o.importance_cap, o.importance_cap, u)

    K_old, slope_old = _k3(-token_lr)
    # Selected, not multiplied: K_old of an ℓo that no option asks for may be NaN.
    K_sum = tl.where(o.kl_old_coef == 0, 0.0, o.kl_old_coef * K_old)
    kappa = tl.where(o.kl_old_coef == 0, 0.0, -o.kl_old_coef * slope_old)
    if o.kl != "none":
        d = logp - ref
        if o.kl == "k2":
            K = d * d * 0.5
            k = d
        elif o.kl == "k3":
            K, k = _k3(d)
        elif o.kl == "k3_is":
            K, k = _k3_is(d, token_lr)
        else:
            tl.static_assert(False, "token_terms does not know this kl: write it here as in token_loss")
        over = o.kl_clamp < K
        K_sum += o.kl_coef * tl.where(over, o.kl_clamp, K)
        kappa += o.kl_coef * tl.where(over, 0.0, k)

    on = w != 0
    e = tl.where(on, -o.entropy_coef * w, 0.0)
    c = tl.where(on, w * (kappa - omega * A * g), 0.0)
    policy = tl.where(on, w * omega * S, 0.0)
    kl = tl.where(on, w * K_sum, 0.0)
    bonus = tl.where(on & (o.entropy_coef != 0), e * entropy, 0.0)
    return policy, kl, bonus, c, e, tl.where(on, ratio, 1.0), on & high, on & low, on & dual


@triton.jit(do_not_specialize=["rows"])
def _token_kernel(logp, entropy, t, o, out, rows, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    i = tl.where(inside, i, 0)
    terms = token_terms(tl.load(logp + i), tl.load(entropy + i), t, token_values(t, i), o)
    for k in tl.static_range(len(terms)):
        tl.store(out[k] + i, terms[k], mask=inside)


def token_loss_triton(options: TokenLoss, logp: Tensor, entropy: Tensor, inputs: TokenInputs) -> Terms:
    """Compute `token_loss` of rows [N] in one launch."""
    cut = [logp.new_empty(len(logp), dtype=torch.bool) for _ in range(3)]
    out, block = Terms(*empty_vectors(logp, 6), *cut), 256
    args = (logp, entropy, kernel_inputs(options, inputs), kernel_options(options), out, len(logp))
    run.launch(_token_kernel, (triton.cdiv(len(logp), block),), *args, BLOCK=block)
    return out
