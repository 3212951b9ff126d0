"""The per-token core; it knows torch and triton, nothing of minirl. Each file opens with the eager definition of what
it computes, and every function takes backend="auto" | "torch" | "triton": a CPU runs the definition, a GPU the kernel.
"""

from .linear import Kept, linear_policy_loss, linear_policy_terms, linear_token_logprobs
from .logprobs import token_logprobs
from .per_token import TokenInputs, TokenLoss, token_loss
from .policy_loss import fused_policy_loss
from .sampling import Draw, keyed_uniform, sample_tokens
from .scan import gae, suffix_scan
from .truncation import Floor, truncation_floor

__all__ = [
    "Draw",
    "Floor",
    "Kept",
    "TokenInputs",
    "TokenLoss",
    "fused_policy_loss",
    "gae",
    "keyed_uniform",
    "linear_policy_loss",
    "linear_policy_terms",
    "linear_token_logprobs",
    "sample_tokens",
    "suffix_scan",
    "token_logprobs",
    "token_loss",
    "truncation_floor",
]
