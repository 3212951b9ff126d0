"""Truncation of a distribution: top-k, top-p and min-p leave what comes first in one order of a row's tokens.

The order is that of larger logits first and, among equal ones, of smaller ids, so that top_k = 1 is greedy and top_k
keeps k tokens and no more, however many logits are tied; logits from bf16 often are. A kept set is then named by its
last token, the floor. The definition sorts a row; the kernel searches for the floor, a fourth of the numbers a sweep.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as run
from .backend import Backend, tl, triton, use_triton, whole_rows
from .logprobs import active_entries, mask_inactive

BLOCK = 256  # entries that the definition adds up at a time
CACHED = 1 << 17  # entries of the logits that a CPU keeps in its cache through all that is done with them
LOWEST = torch.finfo(torch.float32).min  # no floor lies below: a token at -inf is never kept


class Floor(NamedTuple):
    """Name the last token of each row that is kept: the others have a larger logit, or the same and a smaller id."""

    logit: Tensor  # fp32 [B]
    id: Tensor  # int64 [B]; V - 1 where every token with that logit is kept

    def mask(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Give fp32 1 for a token that is kept and 0 for others, of logits [B, V] or of those of some ids, both [B, n].

        Comparing into floats and multiplying takes a CPU a tenth of the time of a mask of bools.
        """

        def compare(how, a, b):
            return how(a, b[:, None], out=torch.empty(logits.shape, device=logits.device))

        kept = compare(torch.ge, logits, self.logit)
        if ids is None and not (self.id < logits.shape[1] - 1).any():  # no tie is cut: the rule for fp32 logits
            return kept
        ids = torch.arange(logits.shape[1], device=logits.device) if ids is None else ids
        behind = compare(torch.eq, logits, self.logit).mul_(compare(torch.gt, ids.int(), self.id.int()))
        return kept.sub_(behind)

    def rows(self, part: slice) -> "Floor":
        return Floor(self.logit[part], self.id[part])


# ---- the definition --------------------------------------------------------------------------------------------------


def truncation_floor(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    active: int | None = None,
    backend: Backend = "auto",
) -> Floor | None:
    """Find the floor of what top-k, then top-p, then min-p leave of softmax(logits[:, :active]/T); None if all is left.

    logits [B, V]; tokens come in the order of larger logits first, then smaller ids. top_k: the first k (0 = off).
    top_p: the fewest first ones with mass >= p (Holtzman et al. 1904.09751), of the distribution that top-k left.
    min_p: those with at least p times the largest probability (2407.01082). T = 0 is greedy: nothing to cut. The floor
    of a row that holds NaN means nothing.
    """
    if not (temperature >= 0 and top_k >= 0 and top_p > 0 and 0 <= min_p <= 1):
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}: none may be negative, top_p must "
            "be above 0 and min_p at most 1"
        )
    active = active_entries(active, logits.shape[1])
    if temperature == 0 or (not top_k and top_p >= 1.0 and min_p <= 0.0):
        return None
    V = active or logits.shape[1]
    top_k = top_k if top_k < V else 0
    drop = temperature * math.log(min_p) if min_p > 0.0 else -math.inf  # the largest logit plus this
    if use_triton(backend, logits):
        return _floor_triton(logits, active, temperature, top_k, top_p, drop)
    parts = []
    for part in row_parts(logits):
        z = logits[part, :active].detach().float()
        floor = _last_kept(z, temperature, top_k, top_p) if top_k or top_p < 1.0 else _everything(z)
        if min_p > 0.0:
            threshold = z.amax(-1) + drop
            id = floor.id.masked_fill(threshold > floor.logit, V - 1)
            floor = Floor(torch.maximum(floor.logit, threshold), id)
        parts.append(Floor(floor.logit.clamp(min=LOWEST), floor.id))
    return Floor(*map(torch.cat, zip(*parts, strict=True)))


def row_parts(logits: Tensor) -> list[slice]:
    """Cut the rows into parts that a CPU's cache holds; one part at least, which may be empty."""
    B, V = logits.shape
    rows = max(1, B if logits.is_cuda else CACHED // V)
    return [slice(i, i + rows) for i in range(0, max(B, 1), rows)]


def _everything(z: Tensor) -> Floor:
    return Floor(z.new_full((len(z),), LOWEST), torch.full((len(z),), z.shape[1] - 1, device=z.device))


def _last_kept(z: Tensor, temperature: float, top_k: int, top_p: float) -> Floor:
    """Find the n-th token of each row of z [B, V] in the order, n = top_k, or less where top_p is reached before."""
    # NumPy sorts upwards only; negated, the largest logit comes first.
    x = _ascending(-z)  # the order, without ids
    n = torch.full((len(z), 1), top_k or z.shape[1], device=z.device)
    if top_p < 1.0:
        below = x[:, :1] - x[:, : top_k or None]
        shares = (below if temperature == 1.0 else below.div_(temperature)).exp_()
        n = torch.minimum(n, _reaching(shares, top_p))
    last = x.gather(1, n - 1)
    first, end = torch.searchsorted(x, last), torch.searchsorted(x, last, right=True)  # of those with the same logit
    id = torch.full_like(n, z.shape[1] - 1)
    cut = (n < end).squeeze(1).nonzero().squeeze(1)
    if len(cut):
        tied = torch.eq(z[cut], -last[cut], out=torch.empty(len(cut), z.shape[1], device=z.device))
        # fp32 counts exactly up to 2²⁴, more than any vocabulary has.
        counted = tied.cumsum(-1)
        id[cut] = torch.searchsorted(counted, (n - first)[cut].float()).clamp_(max=z.shape[1] - 1)
    return Floor(-last.squeeze(1), id.squeeze(1))


def _reaching(shares: Tensor, p: float) -> Tensor:
    """Count the entries from the first on that bring p of a row's sum, [B, n] -> [B, 1]: the block, then inside it. A
    float64 sum at every entry would take a CPU longer than the sort."""
    shares = torch.nn.functional.pad(shares, (0, -shares.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    blocks = shares.sum(-1).double()
    mass = blocks.cumsum(-1)
    aim = p * mass[:, -1:]
    block = torch.searchsorted(mass, aim).clamp_(max=blocks.shape[1] - 1)
    inside = shares[torch.arange(len(shares), device=shares.device), block.squeeze(1)].double().cumsum(-1)
    return block * BLOCK + torch.searchsorted(inside, aim - (mass - blocks).gather(1, block)) + 1


def _ascending(x: Tensor) -> Tensor:
    """Sort the values of each row, in place on a CPU: NumPy's sort needs no ids beside them, and takes a twentieth of
    the time of PyTorch's."""
    if x.device.type != "cpu":
        return x.sort(-1).values
    x.numpy().sort(-1)
    return x


# ---- the same in Triton: one program a row searches for a threshold --------------------------------------------------

TILE = 4096  # entries of the vocabulary that one program reads
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def row_offset(row, stride):
    """Give the place of a row's first entry; int64, since B·V passes 2**31."""
    return row.to(tl.int64) * stride


@triton.jit
def load_tile(row, V, active, tile, TILE: tl.constexpr):
    """Load a tile of the row at pointer `row`: fp32 logits [TILE], -inf past `active`, and their ids."""
    at = tile * TILE + tl.arange(0, TILE)
    z = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
    return mask_inactive(z, at, active), at


@triton.jit
def bits_of(z, scale, largest):
    """Give (z - largest)·scale, log₂ of the share relative to the largest; all -inf gives -inf."""
    return (z - tl.where(largest == float("-inf"), 0.0, largest)) * scale


@triton.jit
def _key(z):
    """Map fp32 to int64 of the same order, so that a search can halve the range of all numbers."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unkey(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _measures(row, V, active, a, b, c, scale, largest, MASS: tl.constexpr, TILE: tl.constexpr):
    """Count the logits from the thresholds a, b and c up, or with MASS sum their shares."""
    in_a = tl.zeros([TILE], tl.float32)
    in_b = tl.zeros([TILE], tl.float32)
    in_c = tl.zeros([TILE], tl.float32)
    for tile in range(0, tl.cdiv(V, TILE)):
        z, _ = load_tile(row, V, active, tile, TILE)
        share = tl.exp2(bits_of(z, scale, largest)) if MASS else 1.0
        in_a += tl.where(z >= a, share, 0.0)
        in_b += tl.where(z >= b, share, 0.0)
        in_c += tl.where(z >= c, share, 0.0)
    return tl.sum(in_a), tl.sum(in_b), tl.sum(in_c)


@triton.jit
def _search(row, V, active, floor, target, scale, largest, MASS: tl.constexpr, TILE: tl.constexpr):
    """Find the largest threshold with a measure of at least `target`, or the floor if there is none above it.

    Each sweep over the row tries three thresholds and so leaves a quarter of the fp32 numbers: 16 sweeps at most.
    """
    low, high = _key(floor), _key(largest) + 1
    while high - low > 1:
        step = (high - low + 3) >> 2
        a, b, c = _unkey(low + step), _unkey(low + 2 * step), _unkey(low + 3 * step)
        a, b, c = _measures(row, V, active, a, b, c, scale, largest, MASS, TILE)
        quarters = (a >= target).to(tl.int64) + (b >= target).to(tl.int64) + (c >= target).to(tl.int64)
        low += quarters * step
        high = tl.minimum(high, low + step)
    return _unkey(low)


@triton.jit
def _above(row, V, active, floor, scale, largest, MASS: tl.constexpr, TILE: tl.constexpr):
    """Measure the logits above the floor, without it."""
    higher = _unkey(_key(floor) + 1)
    above, _, _ = _measures(row, V, active, higher, higher, higher, scale, largest, MASS, TILE)
    return above


@triton.jit
def _tied_id(row, V, active, floor, count, TILE: tl.constexpr):
    """Find the id of the count-th logit that equals the floor; V - 1 where there are not as many."""
    found, seen = tl.full([], V - 1, tl.int32), tl.full([], 0, tl.int32)
    for tile in range(0, tl.cdiv(V, TILE)):
        z, at = load_tile(row, V, active, tile, TILE)
        equal = (z == floor).to(tl.int32)
        found = tl.minimum(found, tl.min(tl.where((equal == 1) & (seen + tl.cumsum(equal) == count), at, V - 1)))
        seen += tl.sum(equal)
    return found


@triton.jit(do_not_specialize=["top_k"])
def _floor_kernel(logits, stride, V, active, scale, top_k, top_p, drop, floors, ids, TILE: tl.constexpr):
    """Find the floor of one row; of the logits that equal it, keep `count`, those of the smallest ids."""
    row = logits + row_offset(tl.program_id(0), stride)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    for tile in range(0, tl.cdiv(V, TILE)):
        peaks = tl.maximum(peaks, load_tile(row, V, active, tile, TILE)[0])
    largest = tl.max(peaks)
    floor, count = tl.full([], _LOWEST, tl.float32), tl.full([], V, tl.float32)
    if top_k > 0:
        floor = _search(row, V, active, floor, top_k, scale, largest, False, TILE)
        count = top_k - _above(row, V, active, floor, scale, largest, False, TILE)
    if top_p < 1.0:
        left = count * tl.exp2(bits_of(floor, scale, largest)) + _above(
            row, V, active, floor, scale, largest, True, TILE
        )
        last = _search(row, V, active, floor, top_p * left, scale, largest, True, TILE)
        missing = top_p * left - _above(row, V, active, last, scale, largest, True, TILE)
        needed = tl.maximum(tl.ceil(missing / tl.exp2(bits_of(last, scale, largest))), 1.0)
        # Above the floor of top-k every tied token is still there; at it, only those that top-k left.
        count = tl.minimum(needed, tl.where(last > floor, V, count))
        floor = last
    if largest + drop > floor:
        floor, count = largest + drop, tl.full([], V, tl.float32)
    tl.store(floors + tl.program_id(0), floor)
    tl.store(ids + tl.program_id(0), _tied_id(row, V, active, floor, count.to(tl.int32), TILE).to(tl.int64))


def _floor_triton(
    logits: Tensor, active: int | None, temperature: float, top_k: int, top_p: float, drop: float
) -> Floor:
    logits, (B, V) = whole_rows(logits), logits.shape
    floor = Floor(*(torch.empty(B, dtype=dtype, device=logits.device) for dtype in (torch.float32, torch.int64)))
    scale = math.log2(math.e) / temperature
    args = (logits, logits.stride(0), V, active, scale, top_k, top_p, drop, *floor)
    run.launch(_floor_kernel, (B,), *args, TILE=TILE, num_warps=8)
    return floor
