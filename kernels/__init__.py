"""The per-token core. Knows torch and triton, nothing of minirl. Each file opens with the eager definition of what it
computes."""

from minirl.kernels.logprobs import Kept, linear_token_logprobs, token_logprobs
from minirl.kernels.sampling import draw, kept_mask, keyed_uniform

__all__ = ["Kept", "draw", "kept_mask", "keyed_uniform", "linear_token_logprobs", "token_logprobs"]
