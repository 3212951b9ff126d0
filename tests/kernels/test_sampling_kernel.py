"""Draws and kept sets of both backends against float64 and slow references. Without a GPU Triton's interpreter runs the
kernels, at some 20 ms a row, so few rows are drawn with them."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from by_hand import LIMIT_49, chi_square, kept_by_hand, uniform_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl.kernels import Floor, keyed_uniform, sample_tokens, sampling, truncation, truncation_floor
from minirl.kernels import backend as backends
from minirl.kernels.backend import INTERPRETED, tl, triton

DEVICE = "cpu" if INTERPRETED else "cuda"
both = pytest.mark.parametrize("backend", ["torch", "triton"])
VOCABULARIES = (7, 123, 517, 2053, 32000)
TRUNCATIONS = [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 1e-9}, {"min_p": 0.05},
    {"min_p": 1.0}, {"top_k": 20, "top_p": 0.8}, {"top_k": 9, "min_p": 0.1}, {"top_p": 0.7, "min_p": 0.2},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.01},
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count)


def sampled(logits: torch.Tensor, backend: str, seed: int = 3, keys=None, **options) -> sampling.Draw:
    """One token a row, on the machine's device, back on the CPU; `keys` are (sample, position), by default 0, 1, .."""
    sample, position = keys or (rows(len(logits)), rows(len(logits), 100))
    sample, position = sample.to(DEVICE), position.to(DEVICE)
    draw = sample_tokens(logits.to(DEVICE), seed, sample, position, backend=backend, **options)
    floor = None if draw.floor is None else Floor(*(x.cpu() for x in draw.floor))
    return sampling.Draw(*(None if x is None else x.cpu() for x in draw[:3]), floor)


def kept_set(logits: torch.Tensor, backend: str, **options) -> torch.Tensor | None:
    floor = truncation_floor(logits.to(DEVICE), backend=backend, **options)
    return None if floor is None else Floor(*(x.cpu() for x in floor)).mask(logits).bool()


# --- references ------------------------------------------------------------------------------------------------------


def assert_drawn_from(
    logits: torch.Tensor, draw: sampling.Draw, u: Sequence[float], temperature: float = 1.0, **options
) -> list[float]:
    """Each row's token is where its uniform falls, and its numbers are those of float64; -> the worst errors of
    log-prob and entropy."""
    errors = np.zeros(2)
    for i, row in enumerate(logits.double().numpy()):
        row = row / (temperature or 1.0)
        kept = kept_by_hand(row, **options)
        shares = np.exp(row[kept] - row[kept].max())
        shares /= shares.sum()
        place = int(np.searchsorted(kept, draw.token[i].item()))
        assert kept[place] == draw.token[i]
        cumulative = np.cumsum(shares)
        if temperature:
            assert cumulative[place] - shares[place] - 2e-6 <= u[i] <= cumulative[place] + 2e-6
        else:
            assert place == row.argmax()
        entropy = -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))
        found = np.array([draw.logp[i].item(), draw.entropy[i].item()])
        errors = np.maximum(errors, np.abs(found - [np.log(shares[place]), entropy]))
    return errors.tolist()


# --- uniforms --------------------------------------------------------------------------------------------------------


def uniforms(seed: int, samples, positions) -> torch.Tensor:
    shape = torch.broadcast_shapes(torch.as_tensor(samples).shape, torch.as_tensor(positions).shape)
    return keyed_uniform(seed, *(torch.as_tensor(x).expand(shape).contiguous() for x in (samples, positions)))


KEYS = {"seed": st.integers(-(2**70), 2**70), "sample": st.integers(0, 2**62), "position": st.integers(0, 2**62)}


@given(**KEYS)
def test_a_uniform_is_splitmix_of_seed_sample_and_position(seed, sample, position):
    assert uniforms(seed, [sample], [position]).tolist() == [uniform_by_hand(seed, sample, position)]


@triton.jit(do_not_specialize=["seed_key"])
def uniform_kernel(seed_key, samples, positions, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, sampling._uniform_tile(seed_key, tl.load(samples + at), tl.load(positions + at)))


@settings(max_examples=20)
@given(seed=KEYS["seed"], samples=st.lists(KEYS["sample"], min_size=8, max_size=8), position=KEYS["position"])
def test_the_kernel_has_the_same_uniforms_to_the_bit(seed, samples, position):
    out = torch.empty(8, dtype=torch.float64, device=DEVICE)
    keys = torch.tensor([samples, [position - i if position > 8 else i for i in range(8)]])
    uniform_kernel[(1,)](sampling._seed_key(seed), *keys.to(DEVICE), out, N=8)
    assert torch.equal(out.cpu(), keyed_uniform(seed, *keys))


def test_no_two_draws_share_a_uniform():
    """Neighbouring seeds, samples and positions least of all: training numbers its steps and samples from 0."""
    grid = [uniforms(seed, torch.arange(50).unsqueeze(1), torch.arange(40)).flatten() for seed in range(-5, 15)]
    everything = torch.cat(grid)
    assert len(everything.unique()) == len(everything) == 40_000


@pytest.mark.parametrize("along", ["seed", "sample", "position"])
def test_uniforms_are_uniform_and_independent(along):
    """Kolmogorov-Smirnov and the correlation of neighbours, both at the level of 0.1 %."""
    n = 20_000
    steps = torch.arange(n)
    u = {
        "seed": lambda: torch.cat([uniforms(seed, [3], [5]) for seed in range(n // 4)]),
        "sample": lambda: uniforms(0, steps, 0),
        "position": lambda: uniforms(0, 0, steps),
    }[along]()
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    ranks = torch.arange(n, dtype=torch.float64)
    ordered = u.sort().values
    distance = torch.maximum(ordered - ranks / n, (ranks + 1) / n - ordered).max()
    assert distance < 1.95 / math.sqrt(n)
    for lag in (1, 2, 8):
        assert torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1].abs() < 3.3 / math.sqrt(n)


def test_streams_are_independent_of_one_another():
    streams = torch.stack([uniforms(seed, sample, torch.arange(5000)) for seed in (0, 1) for sample in (0, 1, 2)])
    between = torch.corrcoef(streams) - torch.eye(6)
    assert between.abs().max() < 4 / math.sqrt(5000)


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_drawn_tokens_have_the_distribution_of_softmax(temperature):
    logits = normal(50) * 1.2
    keys = (torch.arange(20_000), torch.zeros(20_000, dtype=torch.long))
    tokens = sampled(logits.expand(20_000, -1), "torch", 11, keys, temperature=temperature).token.tolist()
    assert chi_square(tokens, (logits / temperature).softmax(-1)) < LIMIT_49
    for wrong in (0.92, 1.08):  # the test would see a temperature that is off by a tenth
        assert chi_square(tokens, (logits / temperature / wrong).softmax(-1)) > LIMIT_49


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(backend, dtype, vocab, temperature):
    """That is the distribution, exactly: a token for every interval of the uniform, as long as its probability."""
    count = min(300, 200_000 // vocab) if backend == "torch" else 4
    logits = (normal(count, vocab + 1, seed=vocab) * 3).to(dtype)[:, :-1]  # rows that are not aligned
    u = uniforms(3, rows(count), rows(count, 100))
    errors = assert_drawn_from(logits, sampled(logits, backend, temperature=temperature), u, temperature)
    assert max(errors) < 3e-6


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_the_kernel_is_as_near_to_float64_as_the_definition(options):
    logits = normal(8, 2053, seed=int(torch.randint(1000, ()))) * 4
    u = uniforms(3, rows(8), rows(8, 100))
    plain, kernel = (
        assert_drawn_from(logits, sampled(logits, b, **options), u, **options) for b in ("torch", "triton")
    )
    assert kernel[0] <= plain[0] + 1e-6 and kernel[1] <= plain[1] + 1e-6


def from_position(monkeypatch) -> None:
    """Uniforms are position · 2**-53 from here on, for both backends."""

    @triton.jit
    def given_uniform(seed_key, sample, position):
        return position.to(tl.float64) * (2.0**-53)

    monkeypatch.setattr(sampling, "_uniform_tile", given_uniform)
    monkeypatch.setattr(sampling, "keyed_uniform", lambda seed, sample, position: position.double() * 2.0**-53)


needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="replaces a function inside a compiled kernel")


@both
@needs_interpreter
@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 4096, 4097])
def test_the_ends_of_the_uniform_draw_the_first_and_the_last_token(backend, vocab, monkeypatch):
    from_position(monkeypatch)
    keys = (rows(2), torch.tensor([0, 2**53 - 1]))
    draw = sampled(torch.zeros(2, vocab), backend, keys=keys)
    assert draw.token.tolist() == [0, vocab - 1]
    torch.testing.assert_close(draw.logp, torch.full((2,), -math.log(vocab)))


@both
@needs_interpreter
@pytest.mark.parametrize("alive", [[0], [5299], [300], [255, 256], [2, 4095, 4096], [17, 530]], ids=str)
@pytest.mark.parametrize("through", ["-inf", "floor"])
def test_a_token_without_probability_is_never_drawn(backend, alive, through, monkeypatch):
    from_position(monkeypatch)
    logits = torch.full((1, 5300), -math.inf if through == "-inf" else 3.0)
    logits[0, alive] = 3.5
    options = {"top_k": len(alive)} if through == "floor" else {}
    u = torch.tensor([0, 2**53 - 1, 2**53 // 2, 2**53 * 9 // 10])
    draw = sampled(logits.expand(4, -1), backend, keys=(rows(4), u), **options)
    assert set(draw.token.tolist()) <= set(alive) and {alive[0], alive[-1]} <= set(draw.token.tolist())
    torch.testing.assert_close(draw.logp, torch.full((4,), -math.log(len(alive))))
    torch.testing.assert_close(draw.entropy, torch.full((4,), math.log(len(alive))))


@triton.jit
def first_past_kernel(shares, aims, out, N: tl.constexpr):
    at, share = tl.arange(0, N), tl.load(shares + tl.arange(0, N))
    place = sampling._first_past(tl.cumsum(share), share, tl.load(aims + tl.program_id(0)), at, N)
    tl.store(out + tl.program_id(0), place)


def test_an_aim_past_the_end_takes_the_last_token_with_a_share():
    """Rounding aims there: the sum of a tile and its cumulative sum are added up in different orders."""
    shares = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0, 0.0], dtype=torch.float64)
    aims = torch.tensor([0.0, 0.2, 0.25, 0.75, 0.999, 1.0, 1.5], dtype=torch.float64)
    out = torch.empty(7, dtype=torch.int32, device=DEVICE)
    first_past_kernel[(7,)](shares.to(DEVICE), aims.to(DEVICE), out, N=8)
    assert out.tolist() == [1, 1, 3, 4, 4, 4, 4]


@both
@pytest.mark.parametrize("level", [1000.0, -1000.0, 120.0, -120.0])
def test_the_level_of_the_logits_changes_nothing(backend, level):
    """A running maximum that starts at 0, or an entropy from unshifted sums, would be off."""
    logits = torch.randint(-64, 65, (4, 517), generator=torch.Generator().manual_seed(1)) / 16.0  # shifts are exact
    plain, shifted = sampled(logits, backend), sampled(logits + level, backend)
    assert torch.equal(plain.token, shifted.token)
    torch.testing.assert_close(plain[1:3], shifted[1:3], rtol=0, atol=2e-6)


@both
def test_a_certain_token_is_drawn_with_certainty(backend):
    logits = torch.zeros(3, 5000)
    logits[:, 4321] = 1e4
    for options in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"min_p": 0.5}):
        draw = sampled(logits, backend, **options)
        assert draw.token.eq(4321).all() and draw.logp.eq(0).all() and draw.entropy.eq(0).all()


@both
@pytest.mark.filterwarnings("ignore:invalid value|divide by zero:RuntimeWarning")  # of numpy in the interpreter
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_broken_row_stays_alone(backend, options):
    logits = normal(5, 517)
    clean = sampled(logits, backend, **options)
    logits[1, 40], logits[2, 516], logits[3] = math.nan, math.inf, -math.inf
    draw = sampled(logits, backend, **options)
    assert draw.logp[1:4].isnan().all() and draw.entropy[1:4].isnan().all()
    assert (draw.token >= 0).all() and (draw.token < 517).all()
    for found, expected in zip(draw[:3], clean[:3], strict=True):
        assert torch.equal(found[[0, 4]], expected[[0, 4]])


@both
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_a_row_depends_neither_on_the_batch_nor_on_its_place(backend, options):
    logits, keys = normal(5, 517) * 2, (rows(5), rows(5, 7))
    whole = sampled(logits, backend, keys=keys, **options)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = sampled(logits[order], backend, keys=tuple(key[order] for key in keys), **options)
    alone = sampled(logits[3:4], backend, keys=tuple(key[3:4] for key in keys), **options)
    for x, y, z in zip(whole[:3], permuted[:3], alone[:3], strict=True):
        assert torch.equal(x[order], y) and torch.equal(x[3:4], z)


@both
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3}], ids=str)
def test_the_logits_are_left_as_they_are_and_an_empty_batch_is_empty(backend, options):
    logits = normal(2, 123)
    before = logits.clone()
    sampled(logits, backend, **options)
    assert torch.equal(logits, before)
    empty = sampled(logits[:0], backend, **options)
    assert [len(x) for x in (*empty[:3], *(empty.floor or ()))] == [0] * (5 if "top_k" in options else 3)


@both
def test_columns_may_lie_apart_and_the_entropy_may_be_left_out(backend):
    logits = normal(123, 3)
    plain, turned = sampled(logits.T.contiguous(), backend), sampled(logits.T, backend, entropy=False)
    assert torch.equal(plain.token, turned.token) and torch.equal(plain.logp, turned.logp) and turned.entropy is None


def test_bf16_logits_are_drawn_from_in_fp32():
    """By the definition: Triton's interpreter has no true bf16."""
    logits = normal(50, 517).bfloat16()
    for options in ({}, {"temperature": 0.7, "top_k": 20}):
        ours, wide = sampled(logits, "torch", **options), sampled(logits.float(), "torch", **options)
        assert (ours.floor is None) == (wide.floor is None) == (not options)
        for x, y in zip((*ours[:3], *(ours.floor or ())), (*wide[:3], *(wide.floor or ())), strict=True):
            assert torch.equal(x, y)


# --- truncation ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_kept_sets_are_those_of_the_slow_reference(backend, options, spread):
    logits = normal(40 if backend == "torch" else 2, 517, seed=3) * spread
    keep = kept_set(logits.clone(), backend, temperature=0.8, **options)
    for row, kept in zip(logits.double().numpy() / 0.8, keep, strict=True):
        assert kept.nonzero().squeeze(1).tolist() == kept_by_hand(row, **options).tolist()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draws_of_a_large_vocabulary_are_from_the_kept_set(backend, dtype):
    """In fp16 most logits are tied with others."""
    logits, options = (normal(2, 32001, seed=9) * 2).to(dtype)[:, 1:], {"top_k": 3000, "top_p": 0.8, "min_p": 0.01}
    draw = sampled(logits, backend, **options)
    assert max(assert_drawn_from(logits, draw, uniforms(3, rows(2), rows(2, 100)), **options)) < 3e-6
    for row, kept in zip(logits, draw.floor.mask(logits), strict=True):
        assert kept.nonzero().squeeze(1).tolist() == kept_by_hand(row.double().numpy(), **options).tolist()


@both
def test_a_nucleus_wider_than_the_shortlist_is_exact(backend):
    """A nearly flat row needs most of 3000 tokens for its mass of 0.9; its neighbours need a few, and stay the same."""
    logits = normal(4, 3000, seed=5) * torch.tensor([[0.2], [4.0], [0.5], [1.0]])
    keep = kept_set(logits, backend, top_p=0.9)
    assert keep[0].sum() > 2000 > 100 > keep[1].sum()
    for row, kept in zip(logits.double().numpy(), keep, strict=True):
        assert kept.nonzero().squeeze(1).tolist() == kept_by_hand(row, top_p=0.9).tolist()


@both
def test_a_nucleus_ends_with_the_token_that_brings_its_mass(backend):
    shares = torch.tensor([0.02, 0.5, 0.08, 0.3, 0.1])
    for top_p, ids in ((0.499, [1]), (0.501, [1, 3]), (0.799, [1, 3]), (0.801, [1, 3, 4])):
        assert kept_set(shares.log()[None], backend, top_p=top_p)[0].nonzero().squeeze(1).tolist() == ids
    # Of what top-k leaves, 0.5 + 0.3, the first is 62.5 %.
    for top_p, ids in ((0.62, [1]), (0.63, [1, 3])):
        assert kept_set(shares.log()[None], backend, top_k=2, top_p=top_p)[0].nonzero().squeeze(1).tolist() == ids
    # Mass that just reaches p is enough: tokens of a quarter or of half each, in exact arithmetic.
    quarters = torch.tensor([[0.0, 0.0, 0.0, 0.0, -200.0], [1.0, 1.0, -199.0, -198.0, -197.0]])
    expected = [[True, True, False, False, False], [True, False, False, False, False]]
    assert kept_set(quarters, backend, top_p=0.5).tolist() == expected


@both
def test_of_equal_logits_those_of_smaller_ids_are_kept(backend):
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 2.0, 1.0]])
    shares = logits[0].exp() / logits[0].exp().sum()
    for options, counts in (
        ({"top_k": 1}, 1), ({"top_k": 2}, 2), ({"top_k": 3}, 3), ({"top_k": 4}, 4),
        ({"top_p": shares[:2].sum().item() - 1e-3}, 2), ({"top_p": shares[:2].sum().item() + 1e-3}, 3),
        ({"top_k": 3, "top_p": 0.99}, 3), ({"top_k": 3, "top_p": 0.7}, 2),
        ({"min_p": math.exp(-1.0) * 0.999}, 4), ({"top_k": 2, "min_p": math.exp(-1.0) * 0.999}, 2),
    ):  # fmt: skip
        order = torch.tensor([[0, 1, 2, 3, 4], [3, 0, 2, 4, 1]])
        expected = torch.zeros(2, 5).scatter_(1, order[:, :counts], 1.0)
        assert torch.equal(kept_set(logits, backend, **options), expected.bool()), options
    zeros = torch.tensor([[-0.0, 0.0, -1.0, -0.0]])
    assert kept_set(zeros, backend, top_k=2).tolist() == [[True, True, False, False]]


@both
def test_one_kept_token_is_the_greedy_one_of_the_smallest_id(backend):
    """Ties that lie 256 and 4096 places apart, in rows with one tile and with several."""
    for vocab, tied in ((3, [1, 2]), (517, [260, 4, 516]), (5000, [4999, 4100, 300])):
        count = 20 if backend == "torch" else 1
        logits = torch.zeros(count, vocab).index_fill_(1, torch.tensor(tied), 2.0)
        for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
            draw = sampled(logits, backend, **options)
            assert draw.token.tolist() == [min(tied)] * count
            assert options == {"temperature": 0.0} or draw.logp.eq(0).all()


@both
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_kept_sets_of_logits_with_many_ties_are_those_of_the_slow_reference(backend, options):
    """Sixteen values, as of bf16 logits near one another; a nucleus may end within a tie of 300 tokens."""
    logits = (normal(9 if backend == "torch" else 1, 4500, seed=7) * 2).round() / 2
    for row, kept in zip(logits.double().numpy(), kept_set(logits, backend, **options), strict=True):
        expected = kept_by_hand(row, **options)
        assert abs(int(kept.sum()) - len(expected)) <= 1  # the mass may reach p one token earlier in fp32
        if len(expected) == kept.sum():
            assert kept.nonzero().squeeze(1).tolist() == expected.tolist()
        if "top_p" not in options:
            assert len(expected) == kept.sum()


@both
def test_neighbouring_fp32_numbers_are_told_apart(backend):
    tops = [torch.tensor(x) for x in (3.0, 1e-30, -7.0)]
    logits = torch.stack([torch.stack([x.nextafter(torch.tensor(-math.inf)), x, x - 9]) for x in tops])
    for options in ({"top_k": 1}, {"top_p": 0.3}, {"min_p": 1.0}):
        assert kept_set(logits, backend, **options).tolist() == [[False, True, False]] * 3


@both
def test_a_token_at_minus_infinity_is_not_kept(backend):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0], [0.0, 1.0, 2.0, 3.0]])
    for options in ({"top_k": 3}, {"top_k": 9}, {"top_p": 0.99}, {"min_p": 1e-9}):
        assert kept_set(logits, backend, **options)[0].tolist() == [False, True, False, True]
    assert kept_set(logits, backend, top_k=9)[1].all()


def test_there_is_no_floor_where_nothing_is_cut():
    logits = torch.randn(2, 9)
    assert truncation_floor(logits) is None and truncation_floor(logits, temperature=0.0, top_k=3) is None
    assert sampled(logits, "torch").floor is None


@settings(max_examples=60)
@given(
    top_k=st.integers(0, 60), top_p=st.floats(0.01, 1.0), min_p=st.floats(0.0, 1.0),
    spread=st.floats(0.1, 8.0), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_kept_tokens_share_all_probability_and_the_drawn_one_is_among_them(top_k, top_p, min_p, spread, seed):
    logits = normal(20, 53, seed=seed) * spread
    draw = sampled(logits, "torch", seed, top_k=top_k, top_p=top_p, min_p=min_p)
    keep = torch.ones_like(logits).bool() if draw.floor is None else draw.floor.mask(logits).bool()
    assert keep.gather(1, draw.token.unsqueeze(1)).all()
    assert keep.gather(1, logits.argmax(-1, keepdim=True)).all()
    shares = logits.double().masked_fill(~keep, -math.inf).softmax(-1)  # of the kept tokens alone they are the whole
    torch.testing.assert_close(
        draw.logp.double().exp(), shares.gather(1, draw.token.unsqueeze(1)).squeeze(1), rtol=0, atol=1e-5
    )


# --- rows that pad the head -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("vocab", "active", "dtype"), [(32, 15, torch.float32), (4112, 4000, torch.float16)])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 20, "min_p": 0.01}, {"top_k": 9, "top_p": 0.7}], ids=str
)
def test_ids_without_a_token_are_neither_drawn_nor_counted(backend, vocab, active, dtype, options):
    """Their logits are the largest by far, and top_k is above the number of tokens in the small vocabulary."""
    count = 5 if backend == "torch" else 2
    logits = (normal(count, vocab, seed=4) * 2).to(dtype)
    logits[:, active:] = 60.0
    logits[0, active:] = math.nan
    u = uniforms(3, rows(count), rows(count, 100))
    draw = sampled(logits, backend, active=active, **options)
    errors = assert_drawn_from(logits[:, :active], draw, u, **options)
    assert draw.token.max() < active and max(errors) < 3e-6
    if draw.floor is not None:
        for row, kept in zip(logits[:, :active], draw.floor.mask(logits[:, :active]), strict=True):
            assert kept.nonzero().squeeze(1).tolist() == kept_by_hand(row.double().numpy(), **options).tolist()


@both
def test_an_impossible_number_of_tokens_is_refused(backend):
    for active in (0, 33):
        with pytest.raises(ValueError, match=f"active = {active}: of 32 logits"):
            sampled(normal(2, 32), backend, active=active)


# --- what a launch depends on ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["row", "stride"])
def offset_kernel(row, stride, out):
    tl.store(out, truncation.row_offset(row + tl.program_id(0), stride))


def test_offsets_of_rows_pass_two_to_the_31():
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    offset_kernel[(1,)](70_000, 151_936, out)
    assert out.item() == 70_000 * 151_936 > 2**33


def test_a_kernel_is_compiled_anew_neither_for_the_batch_nor_for_the_seed(monkeypatch):
    """What the kernels are given is the same for every batch, but for tensors and arguments without specialization."""
    launches = []

    def record(kernel, grid, *args, **options):
        free = {p.name for p in kernel.params if p.do_not_specialize} if hasattr(kernel, "params") else {"seed_key"}
        given = [x for name, x in zip(kernel.arg_names, args, strict=False) if name not in free]
        launches.append([kernel, options, [x for x in given if not isinstance(x, torch.Tensor)]])

    monkeypatch.setattr(backends, "launch", record)
    for count, seed in ((1, 1), (3, 2**40), (16, -5)):
        launches.append(count)
        sampled(normal(count, 517), "triton", seed, top_k=5)
    assert launches[1:4] == launches[5:8] == launches[9:12] and len(launches) == 12


def test_what_cannot_be_drawn_from_is_refused():
    logits = normal(3, 9)
    for bad, keys in (
        (logits, (rows(2), rows(3))),
        (logits[0], (rows(9), rows(9))),
        (logits[:, :0], (rows(3), rows(3))),
    ):
        with pytest.raises(ValueError, match=r"sample_tokens: .* must be \[B, V\], \[B\] and \[B\]"):
            sampled(bad, "torch", keys=keys)
    with pytest.raises(ValueError, match="float64"):
        sampled(logits.double(), "triton")
    with pytest.raises(ValueError, match="unknown"):
        sampled(logits, "cuda")
