"""The numbers to watch beside a loss: clips, ratios, KLs, and how far the sampler and the trainer disagree.

Means are over the tokens of the whole optimizer step, so that those of its micro-batches add up; `combine_metrics`
makes one record of them. Nothing here has a gradient, and nothing evaluates the loss again.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minirl.kernels.per_token import GUARD, Terms, guarded_exp, k3

Metrics = dict[str, Tensor]  # scalars


@dataclass(frozen=True)
class Over:
    """Take means and extremes over the tokens that `counted` marks."""

    counted: Tensor  # bool [B, T]
    tokens: int  # what a mean divides by: as many as count in the whole optimizer step

    def mean(self, x: Tensor) -> Tensor:
        return torch.where(self.counted, x, 0).sum(dtype=torch.float64) / max(self.tokens, 1)

    def max(self, x: Tensor) -> Tensor:
        return _largest(x, self.counted)

    def row_max(self, x: Tensor) -> Tensor:
        """Give the largest mean of a row."""
        return _largest(torch.where(self.counted, x, 0).sum(1) / self.counted.sum(1).clamp(min=1), self.counted.any(1))


def _largest(x, counted):
    return torch.where(counted, x, -math.inf).amax() if x.numel() else x.new_tensor(-math.inf)


def _outside_band(ratio):
    return (ratio < 0.9) | (ratio > 1.1)


def ratio_metrics(over: Over, log_ratio: Tensor, t: Terms) -> Metrics:
    """Report clips and ratios as the sweep over the tokens had them."""
    ratio, high, low = t.ratio, t.high.to(log_ratio), t.low.to(log_ratio)
    return {
        "clip/high": over.mean(t.high),
        "clip/low": over.mean(t.low),
        "clip/dual": over.mean(t.dual),
        "clip/frac": over.mean(t.high | t.low | t.dual),
        "clip/seq_high_max": over.row_max(high),
        "clip/seq_low_min": -over.row_max(-low),
        "ratio/mean": over.mean(ratio),
        "_ratio/square": over.mean((ratio.double() - 1) ** 2),  # around 1, where ratios are: no digits cancel
        "ratio/min": -over.max(-ratio),
        "ratio/max": over.max(ratio),
        "ratio/outside": over.mean(_outside_band(ratio)),
        "ratio/guarded": over.mean(log_ratio.abs() > GUARD),
    }


def distance_metrics(over: Over, logp, entropy, old_logp, ref_logp, length: float) -> Metrics:
    """Estimate KL(π_old‖π), KL(π‖π_ref) and the entropy of a token, the second also of a sequence of mean length; logp
    to ref_logp are [B, T], and entropy and ref_logp may be None."""
    old = old_logp - logp
    metrics = {"kl_old/k1": over.mean(old), "kl_old/k3": over.mean(k3(old)[0])}
    if ref_logp is not None:
        d = logp - ref_logp
        metrics |= {"kl_ref/k1": over.mean(d), "kl_ref/k3": over.mean(k3(d)[0]), "kl_ref/seq_k1": over.mean(d) * length}
    return metrics if entropy is None else metrics | {"entropy": over.mean(entropy)}


def mismatch_metrics(over: Over, log_ratio: Tensor, u: Tensor, outside: Tensor) -> Metrics:
    """Report the trainer's log-probs less the sampler's, and the importance weights u that they make."""
    return {
        "tis/mean": over.mean(u),
        "_tis/square": over.mean(u.double() ** 2),
        "tis/max": over.max(u),
        "tis/masked_frac": over.mean(outside),
        "mismatch/abs_mean": over.mean(log_ratio.abs()),
        "mismatch/abs_max": over.max(log_ratio.abs()),
        "mismatch/k3": over.mean(k3(-log_ratio)[0]),
        "mismatch/outside": over.mean(_outside_band(guarded_exp(log_ratio)[0])),
    }


def value_metrics(over: Over, values: Tensor, returns: Tensor, clipped: Tensor) -> Metrics:
    v, R = values.detach().double(), returns.double()
    return {
        "value/mean": over.mean(v),
        "value/clip_frac": over.mean(clipped),
        "_value/return": over.mean(R),
        "_value/return_square": over.mean(R**2),
        "_value/error": over.mean(R - v),
        "_value/error_square": over.mean((R - v) ** 2),
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


def derived(metrics: Metrics) -> Metrics:
    """Add what follows from the moments; all without gradient."""
    more = {name: rule(metrics) for name, (moment, rule) in DERIVED.items() if moment in metrics}
    return {name: value.detach() for name, value in (metrics | more).items()}


def combine_metrics(parts: list[Metrics]) -> dict[str, float]:
    """Make the metrics of an optimizer step from those of its micro-batches: sums, except for …min, …max and DERIVED.

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
    return {name: value.item() for name, value in derived(step).items() if not name.startswith("_")}
