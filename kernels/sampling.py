"""Drawing a token from logits: keyed uniforms, inverse CDF; truncation.py says from which tokens.

One uniform a row, a pure function of (seed, sample, position), and a search in the cumulative sum: a draw costs one
exponential of the row and depends on nothing else in the batch. Gumbel-max (argmax of z/T + Gumbel noise) and
`multinomial` draw from the same distribution, but need a random variate for every entry of the vocabulary. The token is
found in two levels: sums of tiles in one sweep over the logits, then inside the tile that holds the aim, read again.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as run
from .backend import Backend, tl, triton, use_triton, whole_rows
from .logprobs import active_entries
from .truncation import (
    BLOCK,
    LOWEST,
    TILE,
    Floor,
    bits_of,
    load_tile,
    row_offset,
    row_parts,
    truncation_floor,
)


class Draw(NamedTuple):
    """Hold one token a row, and what is known of the distribution that it was drawn from (temperature, truncation)."""

    token: Tensor  # int64 [B]
    logp: Tensor  # fp32 [B], nats; NaN for a row that holds NaN or +inf, or nothing above -inf
    entropy: Tensor | None  # fp32 [B], nats; None where it was not asked for
    floor: Floor | None  # the last token that was kept; None where nothing is cut


# ---- keyed uniforms --------------------------------------------------------------------------------------------------


def _absorb(key, part):
    """Mix both by a round of splitmix64 (Steele, Lea & Flood 2014): each of their bits reaches every bit of the result.

    On int64 in torch and in Triton alike, whose products wrap; on integers modulo 2**64. The masks make the right
    shifts logical; the factors are splitmix64's as signed integers.
    """
    # part + 1: a 0 absorbed into a key of 0 would stay 0.
    key = key + (part + 1) * -7046029254386353131
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return key ^ ((key >> 31) & 0x1FFFFFFFF)


def _seed_key(seed: int) -> int:
    """Mix the seed before the sample is added: else sample k of seed s would be sample k - 1 of seed s + 1."""
    return (_absorb(0, seed) + (1 << 63)) % (1 << 64) - (1 << 63)


def keyed_uniform(seed: int, sample: Tensor, position: Tensor) -> Tensor:
    """Make uniforms in [0, 1), float64 of 53 random bits, from (seed, sample, position); int64 tensors of one shape."""
    key = _absorb(_absorb(_seed_key(seed), sample), position)
    # float64 holds 53 bits exactly: with more, rounding could give 1.
    return ((key >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


# ---- the definition --------------------------------------------------------------------------------------------------


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
    active: int | None = None,
    entropy: bool = True,
    backend: Backend = "auto",
) -> Draw:
    """Draw one token a row of softmax(logits[:, :active]/T) cut by `truncation_floor`, by the uniform of (seed, sample,
    position).

    logits [B, V] in fp32, bf16 or fp16 are not changed; sample and position are int64 [B]. T = 0 takes the most likely
    token, of several the one with the smallest id, with the log-prob and the entropy of softmax(logits). entropy=False
    leaves the entropy out, which on a CPU is up to half of the work. ValueError where the shapes do not agree.
    """
    if logits.dim() != 2 or not logits.shape[1] or not sample.shape == position.shape == logits.shape[:1]:
        shapes = f"{list(logits.shape)}, {list(sample.shape)} and {list(position.shape)}"
        raise ValueError(f"sample_tokens: logits, sample and position are {shapes}: they must be [B, V], [B] and [B]")
    sample, position = sample.long(), position.long()
    active = active_entries(active, logits.shape[1])
    floor = truncation_floor(logits, temperature, top_k, top_p, min_p, active=active, backend=backend)
    if use_triton(backend, logits):
        return _sample_triton(logits, active, seed, sample, position, temperature, floor, entropy)
    logits = logits[:, :active]
    largest, sums, shifted = _sums(logits, temperature, floor, entropy)
    sums = sums.double()
    total = sums.sum(-1)
    if temperature == 0:
        # Relative to the largest, the share of the most likely token is 1.
        token, logp = logits.max(-1).indices, -total.log()
    else:
        uniform = keyed_uniform(seed, sample, position)
        token, logp = _pick(logits, temperature, floor, largest, sums, uniform)
    H = (total.log() - shifted.double() / total).float() if entropy else None
    return Draw(token, logp.float(), H, floor)


def _scaled(z: Tensor, temperature: float) -> Tensor:
    return z.float() if temperature in (0, 1) else z.float() / temperature


def _exp_(x: Tensor, z: Tensor, floor: Floor | None, ids: Tensor | None = None) -> Tensor:
    """Put exp(x) in place of x, 0 where the logits z, of all ids or of those given, are not kept."""
    return x.exp_() if floor is None else x.exp_().mul_(floor.mask(z, ids))


def _sums(logits: Tensor, temperature: float, floor: Floor | None, entropy: bool):
    """Give the largest z/T [B, 1] and, with x = z/T less it, the sum of exp(x) in each tile [B, ⌈V/BLOCK⌉] and that of
    x·exp(x) in the row [B], if the entropy is wanted. Some rows at a time, so that x stays in a CPU's cache."""
    V, parts = logits.shape[1], []
    for part in row_parts(logits):
        z, limit = logits[part], None if floor is None else floor.rows(part)
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
    """Find the token where the cumulative sum passes uniform · total, and its log-prob: the tile, then inside it.

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
    e = _exp_(_scaled(z, temperature) - largest, z, floor, ids).double()
    inside = e.cumsum(-1)
    # Rounding can aim past the tile's end: then it is the tile's last token that moves the sum, which has probability.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous()).clamp_(max=BLOCK - 1)  # BLOCK for a row of NaN
    within = torch.minimum(torch.searchsorted(inside, aim, right=True), last)
    return ids.gather(1, within).squeeze(1), (e.gather(1, within).log() - total.log()).squeeze(1)


# ---- the same in Triton ----------------------------------------------------------------------------------------------

_LN2 = tl.constexpr(math.log(2.0))

_absorb_tile = triton.jit(_absorb)


@triton.jit
def _uniform_tile(seed_key, sample, position):
    """Repeat `keyed_uniform` bit by bit; int64 -> fp64."""
    key = _absorb_tile(_absorb_tile(seed_key, sample), position)
    return ((key >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * (2.0**-53)


@triton.jit
def _kept(row, logits, stride, V, active, tile, floors, lasts, TILE: tl.constexpr):
    """Load a tile of the row with this number: -inf below the floor and past the last id at it, NaN stays; floors and
    lasts are None where nothing is cut."""
    z, at = load_tile(logits + row_offset(row, stride), V, active, tile, TILE)
    if floors is not None:
        floor, last = tl.load(floors + row), tl.load(lasts + row)
        z = tl.where((z < floor) | ((z == floor) & (at > last)), float("-inf"), z)
    return z


# The draw: sums of all tiles by one program each, then one program a row picks.


@triton.jit
def _sums_kernel(logits, stride, V, active, tiles, scale, floors, lasts, peaks, sums, shifted, TILE: tl.constexpr):
    """Give the largest logit of a tile, Σ 2^bits and Σ bits·2^bits with bits = (z - largest)·log2(e)/T; all [B, tiles].

    The sum for the entropy is shifted by the largest: Σ z·exp(z) would cancel at a large offset of all logits.
    """
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    z = _kept(row, logits, stride, V, active, tile, floors, lasts, TILE)
    peak = tl.max(z)
    bits = bits_of(z, scale, peak)
    e = tl.exp2(bits)
    tl.store(peaks + tl.program_id(0), peak)
    tl.store(sums + tl.program_id(0), tl.sum(e))
    tl.store(shifted + tl.program_id(0), tl.sum(tl.where(e > 0, bits, 0.0) * e))  # 0 · -inf is NaN


@triton.jit
def _first_past(cumulative, shares, aim, at, SIZE: tl.constexpr):
    """Find the first place whose cumulative sum passes `aim`, else the last, among those with a share (0 if none)."""
    first = tl.min(tl.where((cumulative > aim) & (shares > 0), at, SIZE))
    return tl.minimum(first, tl.max(tl.where(shares > 0, at, 0)))


@triton.jit(do_not_specialize=["seed_key"])
def _pick_kernel(
    logits, stride, V, active, tiles, scale, floors, lasts, peaks, sums, shifted,
    seed_key, samples, positions, tokens, logps, entropies,
    GREEDY: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.arange(0, TILES)
    here = row_offset(row, tiles) + at
    peak = tl.load(peaks + here, mask=at < tiles, other=float("-inf"))
    s = tl.load(sums + here, mask=at < tiles, other=0.0).to(tl.float64)
    h = tl.load(shifted + here, mask=at < tiles, other=0.0).to(tl.float64)
    largest = tl.max(peak)
    bits = bits_of(peak.to(tl.float64), scale, largest)
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
    # From shares of the row to shares of the tile, whose sums are relative to its own peak.
    aim = (aim - tl.sum(tl.where(at < tile, shares, 0.0))) / tl.sum(tl.where(at == tile, weight, 0.0))

    z = _kept(row, logits, stride, V, active, tile, floors, lasts, TILE)
    inside = tl.arange(0, TILE)
    if GREEDY:
        place = tl.minimum(tl.min(tl.where(z == largest, inside, TILE)), TILE - 1)
    else:
        e = tl.exp2(bits_of(z, scale, tl.max(z))).to(tl.float64)
        place = _first_past(tl.cumsum(e), e, aim, inside, TILE)
    drawn = tl.sum(tl.where(inside == place, z, 0.0))
    tl.store(tokens + row, tl.minimum(tile * TILE + place, (V if active is None else active) - 1).to(tl.int64))
    tl.store(logps + row, (bits_of(drawn.to(tl.float64), scale, largest) - tl.log2(total)) * _LN2)
    if entropies is not None:
        tl.store(entropies + row, (tl.log2(total) - mean_bits) * _LN2)


def _sample_triton(logits, active, seed, sample, position, temperature, floor, entropy) -> Draw:
    logits, (B, V) = whole_rows(logits), logits.shape
    tiles = triton.cdiv(V, TILE)
    partial = [torch.empty(B, tiles, dtype=torch.float32, device=logits.device) for _ in range(3)]
    logp, H = (torch.empty(B, dtype=torch.float32, device=logits.device) for _ in range(2))
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    H = H if entropy else None
    scale = math.log2(math.e) / (temperature or 1.0)
    read = (logits, logits.stride(0), V, active, tiles, scale, *(floor or (None, None)), *partial)
    run.launch(_sums_kernel, (B * tiles,), *read, TILE=TILE, num_warps=8)
    drawn = (_seed_key(seed), sample.contiguous(), position.contiguous(), token, logp, H)
    sizes = {"TILES": triton.next_power_of_2(tiles), "TILE": TILE}
    run.launch(_pick_kernel, (B,), *read, *drawn, GREEDY=temperature == 0, **sizes, num_warps=8)
    return Draw(token, logp, H, floor)
