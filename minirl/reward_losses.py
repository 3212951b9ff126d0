"""Losses and measures of reward models: pure functions of scores, with their gradients on paper.

Scores r are fp32 numbers of any level for pairs, ±1 targets or logits for single completions and steps. Every loss is

    L = Σ_n w_n ℓ_n / W,    W = Σ_n w_n

over pairs, completions or steps; `total` gives the W of the whole optimizer step where the call sees only a part of it,
so that the sum over micro-batches is the loss of the step. Nothing here knows of models or texts.
"""

import math

import torch
import torch.nn.functional as F


def pairwise_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | float = 0.0,
    center: float = 0.0,
    weights: torch.Tensor | None = None,
    total: float | None = None,
) -> torch.Tensor:
    """Fit Bradley-Terry, P(w ≻ l) = σ(r_w − r_l); chosen r_w, rejected r_l and margin m are [N].

        ℓ = −log σ(r_w − r_l − m) + η (r_w + r_l)²
        ∂ℓ/∂r_w = −σ(−(r_w − r_l − m)) + 2η (r_w + r_l),    ∂ℓ/∂r_l = σ(−(r_w − r_l − m)) + 2η (r_w + r_l)

    Margin as in Llama 2 (2307.09288, eq. 2); η = `center` pulls the level of the scores to 0 (2312.09244, eq. 2), to
    which the first term is blind.
    """
    losses = F.softplus(margin - (chosen - rejected))
    if center:
        losses = losses + center * (chosen + rejected).square()
    return _mean(losses, weights, total)


def pointwise_loss(
    scores: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None, total: float | None = None
) -> torch.Tensor:
    """Give ℓ = (r − y)² for targets y, +1 right and −1 wrong; ∂ℓ/∂r = 2 (r − y). All [N]."""
    return _mean((scores - targets).square(), weights, total)


def bce_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None, total: float | None = None
) -> torch.Tensor:
    """Give ℓ = −y log σ(s) − (1 − y) log σ(−s) for labels y in [0, 1]; ∂ℓ/∂s = σ(s) − y. All [N]."""
    return _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), weights, total)


def process_loss(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, total: float | None = None
) -> torch.Tensor:
    """Take `bce_loss` over the steps that have a label (mask 1): the mean over steps, not over solutions (Lightman et
    al. 2305.20050). Any shape, for instance [B, S]. ∂L/∂s = m (σ(s) − y) / Σ m."""
    mask = mask.bool()
    return bce_loss(logits[mask], labels[mask], None, total)  # selected, not multiplied: 0 · NaN is NaN


def _mean(losses: torch.Tensor, weights: torch.Tensor | None, total: float | None) -> torch.Tensor:
    """Give Σ w ℓ / W, 0 for no losses at all."""
    if weights is None:
        weights = torch.ones_like(losses)
    total = weights.sum() if total is None else total
    return (weights * losses).sum() / total if losses.numel() else losses.sum()


def inverse_frequency(labels: torch.Tensor) -> torch.Tensor:
    """Give weights [N] by which both classes (label > ½ and not) make half of N; 1 each where there is one class."""
    positive = labels > 0.5
    counts = torch.stack([(~positive).sum(), positive.sum()])
    if not counts.all():
        return torch.ones(len(labels), device=labels.device)
    return (len(labels) / (2 * counts))[positive.long()]


# ---- measures -------------------------------------------------------------------------------------------------------


def ranking_accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Give the share of pairs with r_w > r_l; a tie counts ½, as the toss of a coin would. NaN for no pairs."""
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Give the area under the ROC curve: `ranking_accuracy` over every right one (label > ½) against every wrong one;
    NaN where there are not both."""
    right, wrong = scores[labels > 0.5], scores[labels <= 0.5].sort().values
    below, not_above = torch.searchsorted(wrong, right), torch.searchsorted(wrong, right, right=True)
    return ((below + not_above).double().mean() / (2 * len(wrong))).item() if len(right) and len(wrong) else math.nan


def expected_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> float:
    """Give Σ_b n_b/N |hits_b − confidence_b| with confidence max(p, 1 − p) in `bins` equal bins on [½, 1] (Guo et al.
    1706.04599, eq. 3). For pairs p = σ(r_w − r_l) and every label is 1; p = ½ is half a hit. NaN for none."""
    p, right = probabilities.double(), labels > 0.5
    confidence = torch.maximum(p, 1 - p)
    hits = torch.where(p == 0.5, 0.5, ((p > 0.5) == right).double())
    index = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double, device=p.device).index_add_(0, index, hits - confidence)
    return (gaps.abs().sum() / len(p)).item() if len(p) else math.nan


def brier(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Give the mean of (p − y)²; for pairs that of (1 − p)²."""
    return (probabilities - labels).double().square().mean().item()


def pair_metrics(chosen: torch.Tensor, rejected: torch.Tensor, bins: int = 10) -> dict[str, float]:
    """Measure N pairs: ranking accuracy, mean margin, and calibration of P(w ≻ l) = σ(r_w − r_l)."""
    p, ones = torch.sigmoid(chosen - rejected), torch.ones_like(chosen)
    return {
        "accuracy": ranking_accuracy(chosen, rejected),
        "margin": (chosen - rejected).mean().item(),
        "ece": expected_calibration_error(p, ones, bins),
        "brier": brier(p, ones),
    }


def label_metrics(
    scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor, logits: bool, bins: int = 10
) -> dict[str, float]:
    """Measure N labelled completions or steps: ranking accuracy among those of one group (a prompt), area under the ROC
    curve over all, mean margin of right over wrong, and calibration of P(right) = σ(r) for logits, else (1 + r)/2 cut
    to [0, 1]. A measure that needs right and wrong ones is NaN without."""
    p = torch.sigmoid(scores) if logits else ((1 + scores) / 2).clamp(0, 1)
    right = labels > 0.5
    sizes = groups.unique(return_counts=True)[1].tolist()
    pairs = [torch.cartesian_prod(m[right[m]], m[~right[m]]) for m in groups.argsort(stable=True).split(sizes)]
    better, worse = torch.cat([groups.new_empty(0, 2), *pairs]).unbind(1)
    return {
        "accuracy": ranking_accuracy(scores[better], scores[worse]),
        "auc": auc(scores, labels),
        "margin": (scores[right].mean() - scores[~right].mean()).item(),
        "ece": expected_calibration_error(p, labels, bins),
        "brier": brier(p, labels),
    }


def score_stats(scores: torch.Tensor, prefix: str) -> dict[str, float]:
    """Give mean, standard deviation, minimum and maximum."""
    values = {"mean": scores.mean(), "std": scores.std(correction=0), "min": scores.min(), "max": scores.max()}
    return {prefix + name: value.item() for name, value in values.items()}
