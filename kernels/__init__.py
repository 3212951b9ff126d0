"""The per-token core. Knows torch and triton, nothing of minirl. Each file opens with the eager definition of what it
computes, and every function takes backend="auto" | "torch" | "triton": a CPU runs the definition, a GPU the kernel.
"""

from .linear import Kept, linear_policy_loss, linear_token_logprobs
from .logprobs import token_logprobs
from .policy_loss import TokenLoss, fused_policy_loss, token_loss
from .sampling import draw, kept_mask, keyed_uniform

__all__ = [
    "Kept",
    "TokenLoss",
    "draw",
    "fused_policy_loss",
    "kept_mask",
    "keyed_uniform",
    "linear_policy_loss",
    "linear_token_logprobs",
    "token_logprobs",
    "token_loss",
]
