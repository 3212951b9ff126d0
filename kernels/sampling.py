"""Drawing a token from logits: keyed uniforms, truncation of the distribution, inverse CDF.

One uniform a row, a pure function of (seed, sample, position), and a search in the cumulative sum: a draw costs one
exponential of the row and depends on nothing else in the batch. `multinomial` draws an exponential variate for every
entry of the vocabulary instead.
"""

import torch

BLOCK = 256  # the cumulative sum is searched in two levels: block sums, then inside one block
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # splitmix64's odd constants as signed 64-bit
_SHORTLIST = 1024  # top-p sorts the whole row only when the mass of this many largest falls short


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    x = (x ^ _shift(x, 30)) * _MIX[1]
    x = (x ^ _shift(x, 27)) * _MIX[2]
    return x ^ _shift(x, 31)


def keyed_uniform(seed: int, sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Uniforms in [0, 1), float64 with 53 random bits, from (seed, sample, position); int64 tensors of one shape.

    The seed is mixed before the sample is added: otherwise sample k of seed s would be sample k - 1 of seed s + 1.
    """
    key = torch.zeros_like(sample)
    for part in (torch.full_like(sample, (seed + (1 << 63)) % (1 << 64) - (1 << 63)), sample, position):
        key = _mix(key + (part + 1) * _MIX[0])
    return _shift(key, 11).double() * 2.0**-53


def kept_mask(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor | None:
    """bool [B, V]: what top-k, then top-p, then min-p leave of softmax(logits); None when nothing is cut.

    top_k: the k largest (0 = off), ties with the k-th kept. top_p: the smallest set of largest tokens with mass >= p
    (Holtzman et al. 1904.09751), of the distribution that top-k left. min_p: tokens with at least p times the largest
    probability (2407.01082).
    """
    if not top_k and top_p >= 1.0 and min_p <= 0.0:
        return None
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[1]:
        keep = logits >= logits.topk(top_k, -1).values[:, -1:]
    if top_p < 1.0:
        keep &= logits >= _nucleus_floor(logits.masked_fill(~keep, float("-inf")), top_p)
    if min_p > 0.0:
        largest = logits.amax(-1, keepdim=True)
        keep &= logits - largest >= torch.log(torch.tensor(min_p, dtype=logits.dtype))
    return keep


def _nucleus_floor(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest logit inside the nucleus, [B, 1]."""
    lse = logits.logsumexp(-1, keepdim=True)
    count = min(_SHORTLIST, logits.shape[1])
    while True:
        largest = logits.topk(count, -1).values
        mass = (largest - lse).double().exp().cumsum(-1)
        if count == logits.shape[1] or bool((mass[:, -1] >= top_p).all()):
            break
        count = logits.shape[1]
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=count - 1)
    return largest.gather(1, last)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and its log-probability under softmax(logits) over the kept set; overwrites the logits.

    logits fp32 [B, V] (temperature applied), uniform float64 [B] -> (token int64 [B], logp fp32 [B]). A row of NaN
    gives a logp of NaN.
    """
    e = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if keep is not None:
        e.masked_fill_(~keep, 0.0)
    if e.shape[1] % BLOCK:
        e = torch.nn.functional.pad(e, (0, BLOCK - e.shape[1] % BLOCK))
    blocks = e.unflatten(1, (-1, BLOCK))  # [B, V / BLOCK, BLOCK]
    cumulative = blocks.sum(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    aim = uniform.unsqueeze(1) * total
    block = torch.searchsorted(cumulative, aim, right=True).clamp_(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).double()  # [B, BLOCK]
    within = torch.searchsorted(inside.cumsum(-1), aim - before, right=True)
    # Rounding can aim past the block's end: then it is the block's last token that has any probability.
    last = BLOCK - 1 - (inside > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    token = block * BLOCK + torch.minimum(within, last)
    token.clamp_(max=logits.shape[1] - 1)
    logp = (e.gather(1, token).double().log() - total.log()).float()
    return token.squeeze(1), logp.squeeze(1)
