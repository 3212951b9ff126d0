"""The per-token core. Knows torch and triton, nothing of minirl. Each file opens with the eager definition of what it
computes."""

from minirl.kernels.logprobs import Kept, linear_token_logprobs, token_logprobs
from minirl.kernels.sampling import Draw, keyed_uniform, sample_tokens, truncation_floor
from minirl.kernels.scan import gae, suffix_scan

__all__ = [
    "Draw",
    "Kept",
    "gae",
    "keyed_uniform",
    "linear_token_logprobs",
    "sample_tokens",
    "suffix_scan",
    "token_logprobs",
    "truncation_floor",
]
