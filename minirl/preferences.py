"""Losses on pairs of responses, one preferred to the other: the DPO family against a reference, RRHF without one.

    x_i = (ℓ_i − ℓr_i) / L_i^α      ℓ_i the log-prob of response i, the sum over its L_i tokens, the stop token included
    Δ = x_w − x_l,  z = βΔ          of a pair (w preferred to l)

Every loss here depends on the log-probs through Δ alone, so its derivative is one number a response, the same for each
of its tokens: ∂L/∂ℓ_i = Σ_pairs ±(∂L/∂Δ) / L_i^α. It is written down, not left to autograd. Denominators are those of
the whole optimizer step (`PairCounts`), so a micro-batch of whole pairs is only a memory knob. All pairs of a ranked
list are compared, each with the weight 1/(number of them): a list counts once, however long (InstructGPT 2203.02155,
eq. 1), as in the training of reward models. RRHF sums over the pairs of a list, as its paper does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from minirl.errors import InputError

Kind = Literal["dpo", "robust", "hinge", "ipo", "rrhf"]
Finetuning = Literal["sum", "token_mean"]


@dataclass(frozen=True)
class PreferenceLoss:
    """Choose a preference loss."""

    kind: Kind = "dpo"
    """dpo −log σ(z) (2305.18290 eq. 7), robust its unbiased form where labels are noisy (2403.00409), hinge
    max(0, 1 − z) (SLiC 2305.10425), ipo (Δ − 1/(2β))² (2310.12036), or rrhf: ranks and likelihood, no reference
    (2304.05302)."""
    beta: float = 0.1
    """How closely the reference binds: β of z, τ of ipo; rrhf has none."""
    label_smoothing: float = 0.0
    """Share of the pairs that are thought to be labelled the wrong way round; dpo (then called cDPO) and robust."""
    length_power: float | None = None
    """α: the log-prob of a response is divided by its length to this power, so 0 takes sums and 1 averages. None: 1 for
    rrhf, 0 for the others."""
    rank_coef: float = 1.0
    """rrhf: weight of the ranks beside the likelihood of the best response (λ)."""
    ft: Finetuning = "sum"
    """rrhf: that likelihood is summed over tokens, or averaged."""

    def __post_init__(self):
        s, alpha = self.label_smoothing, self.length_power
        for fine, rule in (
            (self.kind in get_args(Kind), f"kind must be one of {', '.join(get_args(Kind))}"),
            (self.ft in get_args(Finetuning), f"ft must be one of {', '.join(get_args(Finetuning))}"),
            (0 < self.beta < math.inf, "beta must be > 0 and finite"),
            (0 <= s < 0.5, "label_smoothing must be in [0, 0.5): at a half the labels say nothing"),
            (s == 0 or self.kind in ("dpo", "robust"), "label_smoothing belongs to kind dpo or robust"),
            (alpha is None or 0 <= alpha < math.inf, "length_power must be >= 0 and finite, or None"),
            (0 <= self.rank_coef < math.inf, "rank_coef must be >= 0 and finite"),
        ):
            if not fine:
                raise InputError(f"PreferenceLoss: {rule}; got {getattr(self, rule.split()[0])!r}")

    @property
    def alpha(self) -> float:
        return self.length_power if self.length_power is not None else float(self.kind == "rrhf")

    @property
    def has_reference(self) -> bool:
        return self.kind != "rrhf"


def sequence_logp(logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum logp [B, T] over the tokens that mask [B, T] counts, and count them: float64 [B] each.

    Small differences of long sums decide here, hence float64. Nothing under mask 0 reaches sum or gradient.
    """
    keep = mask.bool()
    return torch.where(keep, logp, 0).sum(1, dtype=torch.float64), keep.sum(1, dtype=torch.float64)


def ranked_pairs(scores: Sequence[float], responses: Sequence | None = None) -> list[tuple[int, int]]:
    """Pair (better, worse) all responses of one prompt; equal scores, NaN, and equal responses where they are given,
    make no pair."""
    pairs = [(i, j) for i, better in enumerate(scores) for j, worse in enumerate(scores) if better > worse]
    return pairs if responses is None else [(i, j) for i, j in pairs if responses[i] != responses[j]]


def pair_loss(delta: Tensor, o: PreferenceLoss) -> tuple[Tensor, Tensor]:
    """Give loss and ∂loss/∂Δ of pairs, [N] each, s being the label smoothing:

    dpo     −(1−s)·log σ(z) − s·log σ(−z)               −β·[(1−s)·σ(−z) − s·σ(z)]
    robust  (−(1−s)·log σ(z) + s·log σ(−z)) / (1−2s)    −β·[(1−s)·σ(−z) + s·σ(z)] / (1−2s)
    hinge   max(0, 1−z)                                 −β·𝟙[z<1]
    ipo     (Δ − 1/(2β))²                               2·(Δ − 1/(2β))
    rrhf    λ·max(0, −Δ)                                −λ·𝟙[Δ<0]
    """
    z, s = o.beta * delta, o.label_smoothing
    match o.kind:
        case "dpo":
            loss = -(1 - s) * logsigmoid(z) - s * logsigmoid(-z)
            return loss, -o.beta * ((1 - s) * (-z).sigmoid() - s * z.sigmoid())
        case "robust":
            loss = (s * logsigmoid(-z) - (1 - s) * logsigmoid(z)) / (1 - 2 * s)
            return loss, -o.beta * ((1 - s) * (-z).sigmoid() + s * z.sigmoid()) / (1 - 2 * s)
        case "hinge":
            return (1 - z).clamp(min=0), -o.beta * (z < 1).to(z)
        case "ipo":
            gap = delta - 1 / (2 * o.beta)
            return gap**2, 2 * gap
        case "rrhf":
            return o.rank_coef * (-delta).clamp(min=0), -o.rank_coef * (delta < 0).to(delta)


def even_weights(pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Weigh each pair of one ranked list by 1/(number of pairs), so that the list counts once (2203.02155, eq. 1)."""
    return [1 / len(pairs) for _ in pairs]


class PairCounts(NamedTuple):
    """The counts that only the whole optimizer step knows; each of its micro-batches gets the same ones."""

    pairs: int  # without those that have an empty response; the denominator of metrics, and of the loss without weights
    prompts: int  # without those whose best response is empty; the denominator of the loss where pairs have weights


def preference_loss(
    logp: Tensor, ref_logp: Tensor, lengths: Tensor, pairs: Tensor, options: PreferenceLoss, totals=None, weights=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the mean loss of N pairs of the DPO family, and its metrics, which are means over pairs.

    logp [B] carries the gradient; ref_logp and lengths [B] are constants (`sequence_logp` makes all three); pairs
    [N, 2] are rows (chosen, rejected), and `weights` [N] what each counts in the loss, 1 if None: those of
    `even_weights` for each prompt make it the mean over prompts. A pair with an empty response has nothing to compare:
    it is left out. totals=None: these are all pairs of the optimizer step. Otherwise they are one of its micro-batches,
    and losses, gradients and metrics add up.
    """
    if not options.has_reference:
        raise InputError(f"preference_loss: kind={options.kind!r} has no reference; call rrhf_loss")
    comparable = (lengths[pairs] > 0).all(1)
    pairs, w = pairs[comparable], None if weights is None else weights[comparable].double()
    count = max(len(pairs) if totals is None else totals.pairs, 1)
    total = count if w is None else w.sum().clamp(min=1e-12) if totals is None else max(totals.prompts, 1)
    scale = lengths.clamp(min=1) ** options.alpha
    x = (logp.detach() - ref_logp.detach()).double() / scale
    loss, slopes, metrics = _compare(x, logp, pairs, options, count, w)
    return _with_slope(loss / total, logp, slopes / (scale * total)), {"loss": loss / total, **metrics}


def rrhf_loss(
    logp: Tensor, lengths: Tensor, pairs: Tensor, best: Tensor, options: PreferenceLoss, totals=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give λ Σ_pairs max(0, p_l − p_w) − ℓ_best, the mean over prompts (2304.05302), and its metrics.

    p = ℓ/L^α; ft="token_mean" divides ℓ_best by its length. logp, lengths [B] and totals are as in `preference_loss`;
    pairs [N, 2] are all (better, worse) of each prompt, best [P] is the best row of each of P prompts.
    """
    if options.has_reference:
        raise InputError(f"rrhf_loss: kind={options.kind!r} needs a reference; call preference_loss")
    pairs, best = pairs[(lengths[pairs] > 0).all(1)], best[lengths[best] > 0]
    totals = PairCounts(len(pairs), len(best)) if totals is None else totals
    count, scale = max(totals.prompts, 1), lengths.clamp(min=1) ** options.alpha
    p = logp.detach().double() / scale
    rank, slopes, metrics = _compare(p, logp, pairs, options, max(totals.pairs, 1))
    weight = 1.0 if options.ft == "sum" else 1 / lengths.clamp(min=1)
    share = one_hot(best, len(logp)).sum(0) * weight  # of each row in the likelihood
    ft = -(share * logp.detach()).sum()
    parts = {"loss": (rank + ft) / count, "loss/rank": rank / count, "loss/ft": ft / count}
    return _with_slope(parts["loss"], logp, (slopes / scale - share) / count), parts | metrics


def _difference(pairs: Tensor, rows: int) -> Tensor:
    """Make D [N, B], 1 at the chosen row and −1 at the rejected one: Δ = D x, and back ∂L/∂x = Dᵀ ∂L/∂Δ. Products sum
    in a fixed order, which scattered additions on a GPU do not."""
    chosen, rejected = pairs.unbind(1)
    return (one_hot(chosen, rows) - one_hot(rejected, rows)).double()


def _compare(x: Tensor, logp: Tensor, pairs: Tensor, o: PreferenceLoss, count: int, weights: Tensor | None = None):
    """Give the weighted sum of the pairs' losses, its derivative by x [B], and metrics, means over pairs: the share in
    right order, ties half, rewards and log-probs. A log-prob of chosen responses that falls is DPO's known failure."""
    D = _difference(pairs, len(x))
    losses, slopes = pair_loss(delta := D @ x, o)
    w = torch.ones_like(losses) if weights is None else weights
    right = (delta > 0).double() + 0.5 * (delta == 0)
    (chosen, rejected), logp = pairs.unbind(1), logp.detach().double()
    reward = o.beta * x if o.has_reference else x
    metrics = {
        "accuracy": right,
        "reward/chosen": reward[chosen],
        "reward/rejected": reward[rejected],
        "reward/margin": reward[chosen] - reward[rejected],
        "logp/chosen": logp[chosen],
        "logp/rejected": logp[rejected],
    }
    return (w * losses).sum(), (w * slopes) @ D, {name: value.sum() / count for name, value in metrics.items()}


def _with_slope(value: Tensor, logp: Tensor, slope: Tensor) -> Tensor:
    """Give `value` the derivative `slope` by logp."""
    return value + (slope * (logp - logp.detach())).sum()
