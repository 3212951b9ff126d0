"""Drawing a token from logits: keyed uniforms, truncation of the distribution, inverse CDF.

One uniform a row, a pure function of (seed, sample, position), and a search in the cumulative sum: a draw costs one
exponential of the row and depends on nothing else in the batch. Gumbel-max (argmax of z/T + Gumbel noise) and
`multinomial` draw from the same distribution, but need a random variate for every entry of the vocabulary. The token is
found in two levels: sums of tiles in one sweep over the logits, then inside the tile that holds the aim, read again.

Truncation is a threshold on the raw logits, the floor [B]: the kept set of a row is {j : logits[j] >= floor}.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as run
from .backend import Backend, tl, triton, use_triton

BLOCK = 256  # tile of the definition
CACHED = 1 << 17  # entries of the logits that a CPU keeps in its cache through all of their sums
LOWEST = torch.finfo(torch.float32).min  # no floor lies below: a token at -inf is never kept
_SHORTLIST = 1024  # top-p sorts the whole row only when the mass of this many largest falls short


class Draw(NamedTuple):
    """One token a row, and the distribution that it was drawn from (temperature and truncation included)."""

    token: Tensor  # int64 [B]
    logp: Tensor  # fp32 [B], nats; NaN for a row that holds NaN or +inf, or nothing above -inf
    entropy: Tensor | None  # fp32 [B], nats; None where it was not asked for
    floor: Tensor | None  # fp32 [B], the smallest logit that is kept at most; None where nothing is cut


# ---- keyed uniforms --------------------------------------------------------------------------------------------------


def _absorb(key, part):
    """One round of splitmix64 (Steele, Lea & Flood 2014): every bit of both reaches every bit of the result.

    On int64 in torch and in Triton alike, whose products wrap; on integers modulo 2**64. The masks make the right
    shifts logical; the factors are splitmix64's as signed integers.
    """
    key = key + (part + 1) * -7046029254386353131
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return key ^ ((key >> 31) & 0x1FFFFFFFF)


def _seed_key(seed: int) -> int:
    """The seed is mixed before the sample is added: else sample k of seed s would be sample k - 1 of seed s + 1."""
    return (_absorb(0, seed) + (1 << 63)) % (1 << 64) - (1 << 63)


def keyed_uniform(seed: int, sample: Tensor, position: Tensor) -> Tensor:
    """Uniforms in [0, 1), float64 with 53 random bits, from (seed, sample, position); int64 tensors of one shape."""
    key = _absorb(_absorb(_seed_key(seed), sample), position)
    return ((key >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


# ---- the definition --------------------------------------------------------------------------------------------------


def truncation_floor(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor | None:
    """The floor of what top-k, then top-p, then min-p leave of softmax(logits/T); None where nothing is to be cut.

    logits [B, V] -> fp32 [B]. top_k: the k largest (0 = off), ties with the k-th kept. top_p: the smallest set of
    largest tokens with mass >= p (Holtzman et al. 1904.09751), of the distribution that top-k left, ties with its last
    kept. min_p: tokens with at least p times the largest probability (2407.01082). T = 0 is greedy: nothing to cut.
    The floor of a row that holds NaN means nothing.
    """
    if temperature == 0 or (not top_k and top_p >= 1.0 and min_p <= 0.0):
        return None
    top_k = top_k if top_k < logits.shape[1] else 0
    drop = temperature * math.log(min_p) if min_p > 0.0 else -math.inf  # the largest logit plus this
    if use_triton(backend, logits):
        return _floor_triton(logits, temperature, top_k, top_p, drop)
    z = logits.float()
    largest = z.amax(-1)
    floor = z.topk(top_k, -1).values[:, -1] if top_k else torch.full_like(largest, LOWEST)
    if top_p < 1.0:
        floor = _nucleus_floor(z, largest, floor, temperature, top_p)
    return torch.maximum(floor, largest + drop).clamp(min=LOWEST)


def _nucleus_floor(z: Tensor, largest: Tensor, floor: Tensor, temperature: float, top_p: float) -> Tensor:
    """The smallest logit inside the nucleus of the tokens from the floor up; fp32 [B, V], [B], [B] -> [B]."""

    def exps(x, floor):  # of the kept tokens
        return ((x - largest[:, None]) / temperature).exp_().masked_fill_(x < floor[:, None], 0.0)

    total = exps(z, floor).sum(-1, keepdim=True).double()
    count = min(_SHORTLIST, z.shape[1])
    while True:
        descending = z.topk(count, -1).values
        mass = exps(descending, floor).double().cumsum(-1) / total
        if count == z.shape[1] or bool((mass[:, -1] >= top_p).all()):
            break
        count = z.shape[1]
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=count - 1)
    return torch.maximum(descending.gather(1, last).squeeze(1), floor)


def sample_tokens(
    logits: Tensor,
    seed: int,
    sample: Tensor,
    position: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    entropy: bool = True,
    backend: Backend = "auto",
) -> Draw:
    """One token a row of softmax(logits/T) cut by `truncation_floor`, by the uniform of (seed, sample, position).

    logits [B, V] in fp32, bf16 or fp16 are not changed; sample and position are int64 [B]. T = 0 takes the most likely
    token, with the log-prob and the entropy of softmax(logits). ValueError where the shapes do not agree.
    """
    if logits.dim() != 2 or not logits.shape[1] or not sample.shape == position.shape == logits.shape[:1]:
        shapes = f"{list(logits.shape)}, {list(sample.shape)} and {list(position.shape)}"
        raise ValueError(f"sample_tokens: logits, sample and position are {shapes}: they must be [B, V], [B] and [B]")
    floor = truncation_floor(logits, temperature, top_k, top_p, min_p, backend)
    if use_triton(backend, logits):
        return _sample_triton(logits, seed, sample, position, temperature, floor, entropy)
    largest, sums, shifted = _sums(logits, temperature, floor, entropy)
    sums = sums.double()
    total = sums.sum(-1)
    if temperature == 0:
        token, logp = logits.max(-1).indices, -total.log()
    else:
        uniform = keyed_uniform(seed, sample, position)
        token, logp = _pick(logits, temperature, floor, largest, sums, uniform)
    H = (total.log() - shifted.double() / total).float() if entropy else None
    return Draw(token, logp.float(), H, floor)


def _scaled(z: Tensor, temperature: float) -> Tensor:
    return z.float() if temperature in (0, 1) else z.float() / temperature


def _exp_(x: Tensor, z: Tensor, floor: Tensor | None) -> Tensor:
    """exp(x) in place of x, 0 where the logits z lie below the floor."""
    return x.exp_() if floor is None else x.exp_().masked_fill_(z < floor[:, None], 0.0)


def _sums(logits: Tensor, temperature: float, floor: Tensor | None, entropy: bool):
    """With x = z/T less its largest: the largest z/T [B, 1], the sum of exp(x) in each tile [B, ⌈V/BLOCK⌉] and, where
    the entropy is wanted, that of x·exp(x) in the row [B]. Some rows at a time, so that x stays in a CPU's cache."""
    B, V = logits.shape
    rows = max(1, B if logits.is_cuda else CACHED // V)
    parts = []
    for i in range(0, max(B, 1), rows):
        z, limit = logits[i : i + rows], None if floor is None else floor[i : i + rows]
        x = _scaled(z, temperature)
        largest = x.amax(-1, keepdim=True)
        x = x - largest if x is z else x.sub_(largest)
        e = _exp_(x.clone() if entropy else x, z, limit)
        # 0 · -inf would be NaN; a broken row stays NaN by its sums.
        shifted = torch.linalg.vecdot(e, x.clamp_(min=LOWEST)) if entropy else largest[:, 0]
        e = torch.nn.functional.pad(e, (0, -V % BLOCK)) if V % BLOCK else e
        parts.append((largest, e.unflatten(1, (-1, BLOCK)).sum(-1), shifted))
    return parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))


def _pick(logits, temperature, floor, largest, sums, uniform) -> tuple[Tensor, Tensor]:
    """The token where the cumulative sum passes uniform · total, and its log-prob, float64: the tile, then inside it.

    sums float64 [B, tiles] and largest [B, 1] of `_sums`, uniform float64 [B].
    """
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    aim = uniform.unsqueeze(1) * total
    tile = torch.searchsorted(cumulative, aim, right=True).clamp_(max=sums.shape[1] - 1)
    aim = aim - (cumulative.gather(1, tile) - sums.gather(1, tile))
    # Past the end the last token is repeated: all that comes before it in the cumulative sum stays where it was.
    ids = (tile * BLOCK + torch.arange(BLOCK, device=tile.device)).clamp_(max=logits.shape[1] - 1)  # [B, BLOCK]
    z = logits.gather(1, ids)
    e = _exp_(_scaled(z, temperature) - largest, z, floor).double()
    inside = e.cumsum(-1)
    # Rounding can aim past the tile's end: then it is the tile's last token that moves the sum, which has probability.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous()).clamp_(max=BLOCK - 1)  # BLOCK for a row of NaN
    within = torch.minimum(torch.searchsorted(inside, aim, right=True), last)
    return ids.gather(1, within).squeeze(1), (e.gather(1, within).log() - total.log()).squeeze(1)


# ---- the same in Triton ----------------------------------------------------------------------------------------------

TILE = 4096  # entries of the vocabulary that one program reads
_LOWEST = tl.constexpr(LOWEST)
_LN2 = tl.constexpr(math.log(2.0))

_absorb_tile = triton.jit(_absorb)


@triton.jit
def _uniform_tile(seed_key, sample, position):
    """`keyed_uniform`, bit by bit; int64 -> fp64."""
    key = _absorb_tile(_absorb_tile(seed_key, sample), position)
    return ((key >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * (2.0**-53)


@triton.jit
def _offset(row, stride):
    """Of a row's first entry; int64, since B·V passes 2**31."""
    return row.to(tl.int64) * stride


@triton.jit
def _kept(row, V, tile, floor, TILE: tl.constexpr):
    """fp32 [TILE] logits of a tile of the row at pointer `row`; -inf past V and below the floor, NaN stays."""
    at = tile * TILE + tl.arange(0, TILE)
    z = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
    return tl.where(z < floor, float("-inf"), z)


@triton.jit
def _bits_of(z, scale, largest):
    """(z - largest)·scale, the logarithm to base 2 of the share relative to the largest; all -inf gives -inf."""
    return (z - tl.where(largest == float("-inf"), 0.0, largest)) * scale


# The floor: one program a row searches for a threshold.


@triton.jit
def _key(z):
    """fp32 -> int64 of the same order."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unkey(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _measures(row, V, a, b, c, scale, largest, MASS: tl.constexpr, TILE: tl.constexpr):
    """Count of the logits from the thresholds a, b and c up, or with MASS the sum of their shares."""
    in_a = tl.zeros([TILE], tl.float32)
    in_b = tl.zeros([TILE], tl.float32)
    in_c = tl.zeros([TILE], tl.float32)
    for tile in range(0, tl.cdiv(V, TILE)):
        z = _kept(row, V, tile, _LOWEST, TILE)
        share = tl.exp2(_bits_of(z, scale, largest)) if MASS else 1.0
        in_a += tl.where(z >= a, share, 0.0)
        in_b += tl.where(z >= b, share, 0.0)
        in_c += tl.where(z >= c, share, 0.0)
    return tl.sum(in_a), tl.sum(in_b), tl.sum(in_c)


@triton.jit
def _search(row, V, floor, target, scale, largest, MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest threshold with a measure of at least `target`, or the floor if there is none above it.

    Each sweep over the row tries three thresholds and so leaves a quarter of the fp32 numbers: 16 sweeps at most.
    """
    low, high = _key(floor), _key(largest) + 1
    while high - low > 1:
        step = (high - low + 3) >> 2
        a, b, c = _measures(
            row, V, _unkey(low + step), _unkey(low + 2 * step), _unkey(low + 3 * step), scale, largest, MASS, TILE
        )
        quarters = (a >= target).to(tl.int64) + (b >= target).to(tl.int64) + (c >= target).to(tl.int64)
        low += quarters * step
        high = tl.minimum(high, low + step)
    return _unkey(low)


@triton.jit(do_not_specialize=["top_k"])
def _floor_kernel(logits, stride, V, scale, top_k, top_p, drop, floors, TILE: tl.constexpr):
    row = logits + _offset(tl.program_id(0), stride)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    for tile in range(0, tl.cdiv(V, TILE)):
        peaks = tl.maximum(peaks, _kept(row, V, tile, _LOWEST, TILE))
    largest = tl.max(peaks)
    floor = tl.full([], _LOWEST, tl.float32)
    if top_k > 0:
        floor = _search(row, V, floor, top_k, scale, largest, False, TILE)
    if top_p < 1.0:
        total, _, _ = _measures(row, V, floor, floor, floor, scale, largest, True, TILE)
        floor = _search(row, V, floor, top_p * total, scale, largest, True, TILE)
    tl.store(floors + tl.program_id(0), tl.maximum(floor, largest + drop))


def _rows(logits: Tensor) -> Tensor:  # a row is read as a whole; rows may lie anywhere
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _floor_triton(logits: Tensor, temperature: float, top_k: int, top_p: float, drop: float) -> Tensor:
    logits, (B, V) = _rows(logits), logits.shape
    floors = torch.empty(B, dtype=torch.float32, device=logits.device)
    scale = math.log2(math.e) / temperature
    args = (logits, logits.stride(0), V, scale, top_k, top_p, drop, floors)
    run.launch(_floor_kernel, (B,), *args, TILE=TILE, num_warps=8)
    return floors


# The draw: sums of all tiles by one program each, then one program a row picks.


@triton.jit
def _sums_kernel(logits, stride, V, tiles, scale, floors, peaks, sums, shifted, TILE: tl.constexpr):
    """The largest logit of each tile, Σ 2^bits and Σ bits·2^bits with bits = (z - largest)·log2(e)/T; each [B, tiles].

    The sum for the entropy is shifted by the largest: Σ z·exp(z) would cancel at a large offset of all logits.
    """
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    floor = _LOWEST if floors is None else tl.load(floors + row)
    z = _kept(logits + _offset(row, stride), V, tile, floor, TILE)
    peak = tl.max(z)
    bits = _bits_of(z, scale, peak)
    e = tl.exp2(bits)
    tl.store(peaks + tl.program_id(0), peak)
    tl.store(sums + tl.program_id(0), tl.sum(e))
    tl.store(shifted + tl.program_id(0), tl.sum(tl.where(e > 0, bits, 0.0) * e))  # 0 · -inf is NaN


@triton.jit
def _first_past(cumulative, shares, aim, at, SIZE: tl.constexpr):
    """The first place whose cumulative sum passes `aim`, or else the last, of those that have a share (0 if none)."""
    first = tl.min(tl.where((cumulative > aim) & (shares > 0), at, SIZE))
    return tl.minimum(first, tl.max(tl.where(shares > 0, at, 0)))


@triton.jit(do_not_specialize=["seed_key"])
def _pick_kernel(
    logits, stride, V, tiles, scale, floors, peaks, sums, shifted,
    seed_key, samples, positions, tokens, logps, entropies,
    GREEDY: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.arange(0, TILES)
    here = _offset(row, tiles) + at
    peak = tl.load(peaks + here, mask=at < tiles, other=float("-inf"))
    s = tl.load(sums + here, mask=at < tiles, other=0.0).to(tl.float64)
    h = tl.load(shifted + here, mask=at < tiles, other=0.0).to(tl.float64)
    largest = tl.max(peak)
    bits = _bits_of(peak.to(tl.float64), scale, largest)
    weight = tl.exp2(bits)
    shares = s * weight
    total = tl.sum(shares)
    mean_bits = tl.sum(h * weight + tl.where(shares > 0, bits, 0.0) * shares) / total

    if GREEDY:
        aim = total * 0
        tile = tl.minimum(tl.min(tl.where(peak == largest, at, TILES)), tiles - 1)
    else:
        uniform = _uniform_tile(seed_key, tl.load(samples + row), tl.load(positions + row))
        aim = uniform * total
        tile = _first_past(tl.cumsum(shares), shares, aim, at, TILES)
    aim = (aim - tl.sum(tl.where(at < tile, shares, 0.0))) / tl.sum(tl.where(at == tile, weight, 0.0))

    floor = _LOWEST if floors is None else tl.load(floors + row)
    z = _kept(logits + _offset(row, stride), V, tile, floor, TILE)
    inside = tl.arange(0, TILE)
    if GREEDY:
        place = tl.minimum(tl.min(tl.where(z == largest, inside, TILE)), TILE - 1)
    else:
        e = tl.exp2(_bits_of(z, scale, tl.max(z))).to(tl.float64)
        place = _first_past(tl.cumsum(e), e, aim, inside, TILE)
    drawn = tl.sum(tl.where(inside == place, z, 0.0))
    tl.store(tokens + row, tl.minimum(tile * TILE + place, V - 1).to(tl.int64))
    tl.store(logps + row, (_bits_of(drawn.to(tl.float64), scale, largest) - tl.log2(total)) * _LN2)
    if entropies is not None:
        tl.store(entropies + row, (tl.log2(total) - mean_bits) * _LN2)


def _sample_triton(logits, seed, sample, position, temperature, floor, entropy) -> Draw:
    logits, (B, V) = _rows(logits), logits.shape
    tiles = triton.cdiv(V, TILE)
    partial = torch.empty(3, B, tiles, dtype=torch.float32, device=logits.device)
    logp, H = torch.empty(2, B, dtype=torch.float32, device=logits.device)
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    H = H if entropy else None
    read = (logits, logits.stride(0), V, tiles, math.log2(math.e) / (temperature or 1.0), floor, *partial)
    run.launch(_sums_kernel, (B * tiles,), *read, TILE=TILE, num_warps=8)
    drawn = (_seed_key(seed), sample.contiguous(), position.contiguous(), token, logp, H)
    sizes = {"TILES": triton.next_power_of_2(tiles), "TILE": TILE}
    run.launch(_pick_kernel, (B,), *read, *drawn, GREEDY=temperature == 0, **sizes, num_warps=8)
    return Draw(token, logp, H, floor)
