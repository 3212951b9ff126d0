"""The backward scan and GAE of both backends against plain loops in float64. Without a GPU the kernels run in Triton's
interpreter, slowly, so blocks are made short; that also puts many of them into a row."""

import math

import pytest
import torch

from minirl.kernels import backend as backends
from minirl.kernels import gae, scan, suffix_scan
from minirl.kernels.backend import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
NAN = math.nan
both = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(scan, "BLOCK", 16)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scan_by_hand(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = b.double().clone()
    for t in reversed(range(b.shape[1] - 1)):
        out[:, t] += a[:, t].double() * out[:, t + 1]
    return out


def gae_by_hand(r, v, m, gamma: float, lam: float, after: float) -> tuple[list[float], list[float]]:
    """One row, a step at a time."""
    r, v, m = r.tolist(), v.tolist(), m.tolist()
    A, returns, next_A, broken = [0.0] * len(r), [0.0] * len(r), 0.0, any(map(math.isnan, (r[t] for t in where(m))))
    for t in reversed(where(m)):
        next_A = r[t] + gamma * after - v[t] + gamma * lam * next_A
        after, A[t] = v[t], 0.0 if broken else next_A
        returns[t] = A[t] + v[t]
    return A, returns


def where(mask: list) -> list[int]:
    return [t for t, counted in enumerate(mask) if counted]


def ragged(rows: int, time: int, seed: int, dtype=torch.float64):
    """rewards, values, mask and bootstrap: rows of any length with holes, one empty, one full; NaN under the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=g) > 0.3 * torch.rand(rows, 1, generator=g)
    mask &= torch.arange(time) < torch.randint(time + 1, (rows, 1), generator=g)
    mask[0], mask[-1] = True, False
    r, v, after = normal(rows, time, seed=seed + 1), normal(rows, time, seed=seed + 2), normal(rows, seed=seed + 3)
    return r.masked_fill(~mask, NAN).to(dtype), v.masked_fill(~mask, NAN).to(dtype), mask, after.to(dtype)


def advantages(r, v, m, backend: str, bootstrap=None, **rates) -> list[torch.Tensor]:
    after = None if bootstrap is None else bootstrap.to(DEVICE)
    out = gae(*(x.to(DEVICE) for x in (r, v, m)), bootstrap=after, backend=backend, **rates)
    return [x.cpu() for x in out]


# --- the scan --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 33, 50])
def test_a_scan_is_the_backward_recurrence(backend, dtype, time):
    a, b = normal(3, time + 1, dtype=dtype)[:, 1:], normal(3, time + 2, seed=1, dtype=dtype)[:, :-2]  # not aligned
    x = suffix_scan(a.to(DEVICE), b.to(DEVICE), backend).cpu()
    assert x.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(x.double(), scan_by_hand(a, b), rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_an_empty_scan_is_empty(backend, shape):
    assert suffix_scan(torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE), backend).shape == shape


@both
def test_nothing_is_added_across_a_zero(backend):
    """Decay 0 at step 20 keeps all that comes later away, whatever it is."""
    a, b = torch.ones(1, 40, dtype=torch.float64), torch.ones(1, 40, dtype=torch.float64)
    a[0, 20] = 0.0
    expected = [21.0 - t for t in range(21)] + [40.0 - t for t in range(21, 40)]
    assert suffix_scan(a.to(DEVICE), b.to(DEVICE), backend).tolist() == [expected]


def test_the_kernel_sums_in_float64():
    a, b = torch.ones(1, 64), torch.full((1, 64), 0.1)
    b[0, -1] = 2.0**24  # an fp32 sum would drop every tenth that is added to it
    x = suffix_scan(a.to(DEVICE), b.to(DEVICE), "triton").cpu()
    assert torch.equal(x, scan_by_hand(a, b).float())


# --- GAE -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("time", "gamma", "lam"), [(1, 1.0, 0.95), (9, 0.9, 0.0), (16, 1.0, 1.0), (45, 0.99, 0.95)])
@pytest.mark.parametrize("truncated", [False, True])
def test_gae_is_the_recursion_over_ragged_rows_with_holes(backend, dtype, time, gamma, lam, truncated):
    r, v, m, after = ragged(5, time, seed=time, dtype=dtype)
    A, returns = advantages(r, v, m, backend, after if truncated else None, gamma=gamma, lam=lam)
    assert A.dtype == returns.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for i in range(5):
        hand = gae_by_hand(r[i], v[i], m[i], gamma, lam, after[i].item() if truncated else 0.0)
        expected = torch.tensor(hand, dtype=torch.float64)
        torch.testing.assert_close(torch.stack([A[i], returns[i]]).double(), expected, rtol=tolerance, atol=tolerance)


@both
def test_value_and_advantage_are_carried_across_a_hole_of_several_blocks(backend):
    m = torch.tensor([t < 4 or t >= 44 for t in range(60)]).expand(2, -1)
    r, v = normal(2, 60).masked_fill(~m, NAN), normal(2, 60, seed=1).masked_fill(~m, NAN)
    across = advantages(r, v, m, backend, gamma=0.9, lam=0.8)
    closed = advantages(*(x[m].view(2, 20) for x in (r, v, m)), backend, gamma=0.9, lam=0.8)
    for x, y in zip(across, closed, strict=True):
        torch.testing.assert_close(x[m].view(2, 20), y, rtol=1e-12, atol=1e-12)
        assert not x[~m].any()


@both
def test_a_reward_of_nan_takes_the_advantages_of_its_row_and_no_other(backend):
    r, v, m, after = ragged(5, 40, seed=3)
    m[1], r[1], v[1] = True, normal(40, seed=8), normal(40, seed=9)
    clean = advantages(r, v, m, backend, after)
    r[1, 35] = NAN
    A, returns = advantages(r, v, m, backend, after)
    assert (A[1] == 0).all() and torch.equal(returns[1], v[1])
    others = [0, 2, 3, 4]
    assert torch.equal(A[others], clean[0][others]) and torch.equal(returns[others], clean[1][others])


@both
def test_a_row_depends_neither_on_the_batch_nor_on_its_place(backend):
    case = ragged(5, 40, seed=4)
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = advantages(*case[:3], backend, case[3])
    permuted = advantages(*(x[order] for x in case[:3]), backend, case[3][order])
    alone = advantages(*(x[2:3] for x in case[:3]), backend, case[3][2:3])
    for x, y, z in zip(whole, permuted, alone, strict=True):
        assert torch.equal(x[order], y) and torch.equal(x[2:3], z)


@both
def test_results_are_fp32_at_least_and_rows_may_lie_anywhere(backend):
    r, v, m, after = ragged(4, 20, seed=5, dtype=torch.float16)
    plain = advantages(r, v, m, backend, after)
    assert plain[0].dtype == plain[1].dtype == torch.float32
    wide = [torch.nn.functional.pad(x, (3, 2), value=value)[:, 3:-2] for x, value in ((r, NAN), (v, NAN), (m, True))]
    turned = [x.T.contiguous().T for x in (r, v, m)]
    for case in (wide, turned):
        for x, y in zip(advantages(*case, backend, after), plain, strict=True):
            assert torch.equal(x, y)


@both
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_steps_give_no_advantages(backend, shape):
    x = torch.zeros(shape)
    assert [tuple(y.shape) for y in advantages(x, x, x.bool(), backend)] == [shape] * 2


def test_gae_is_one_launch_whose_compilation_does_not_depend_on_the_lengths(monkeypatch):
    launches = []
    monkeypatch.setattr(backends, "launch", lambda kernel, grid, *args, **options: launches.append((kernel, options)))
    for time in (1, 16, 37):
        advantages(*ragged(3, time, seed=6)[:3], "triton")
    assert len(launches) == 3 and launches[0] == launches[1] == launches[2]


def test_shapes_that_do_not_agree_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"suffix_scan: a is \[2, 3\] and b \[2, 2\]"):
        suffix_scan(x, x[:, 1:])
    with pytest.raises(ValueError, match=r"gae: rewards, values and mask are \[2, 3\], \[2, 3\] and \[2\]"):
        gae(x, x, x[:, 0])
