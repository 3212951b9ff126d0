"""The tabular example: its optimum is the optimum, its sampled methods come close, and it runs as a script."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

from minirl.advantages import reinforce

SCRIPT = Path(__file__).parents[2] / "examples" / "tabular.py"


@pytest.fixture(scope="module")
def tabular():
    spec = importlib.util.spec_from_file_location("tabular", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_world_moves_as_drawn(tabular):
    P, r = tabular.grid_world()
    cells, start = "".join(tabular.GRID), tabular.START
    assert torch.allclose(P.sum(2), torch.ones(tabular.S, tabular.A))
    entered = P.sum(1)
    for wall in (i for i, cell in enumerate(cells) if cell == "#"):
        assert set(entered[:, wall].nonzero().flatten().tolist()) <= {wall}
    # The start lies in the lower left corner: up and right are free, down and left are the edge.
    up, right = start - tabular.W, start + 1
    assert P[start, 0, [up, right, start]].tolist() == pytest.approx([0.9, 0.05, 0.05])
    assert P[start, 2, [up, right, start]].tolist() == pytest.approx([0.0, 0.05, 0.95])
    above = tabular.GOAL + tabular.W  # below the goal
    assert r[above, 0].item() == pytest.approx(0.9 - tabular.STEP_COST)
    assert r[start].tolist() == pytest.approx([-tabular.STEP_COST] * 4)
    assert r[tabular.GOAL].tolist() == [0.0] * 4
    assert P[tabular.GOAL, :, tabular.GOAL].tolist() == [1.0] * 4


def test_value_iteration_ends_at_the_solution_of_the_bellman_equation(tabular):
    P, r = tabular.grid_world()
    Q = tabular.value_iteration(P, r)
    states = range(tabular.S)
    best = Q.argmax(1)
    rows = torch.eye(tabular.S) - tabular.GAMMA * P[states, best]  # (I − γ P_π) V = r_π
    V = torch.linalg.solve(rows, r[states, best])
    assert torch.allclose(Q.amax(1), V, atol=1e-4)
    assert torch.allclose(tabular.value_of(torch.eye(tabular.A)[best], P, r), V, atol=1e-5)
    assert (r + tabular.GAMMA * P @ V).amax(1).sub(V).max() < 1e-4  # no other action is better anywhere
    assert 0.5 < V[tabular.START] < 1


@pytest.mark.parametrize("method", ["Q-learning", "REINFORCE", 0.0, 0.95, 1.0])
def test_every_method_reaches_95_percent_of_the_optimum(method, tabular, seed=1):
    P, r = tabular.grid_world()
    best = tabular.value_iteration(P, r)[tabular.START].max().item()
    if method == "Q-learning":
        curve = tabular.q_learning(P, r, seed=seed)
    else:
        curve = tabular.policy_gradient(P, r, None if method == "REINFORCE" else method, seed=seed)
    assert curve[0][1] < 0
    assert 0.95 * best <= curve[-1][1] <= best + 1e-5


@pytest.mark.parametrize("baseline", [False, True])
def test_the_variance_of_the_bandit_is_that_of_its_samples(baseline, tabular):
    """Single pulls under the uniform policy: the mean is ∇E[R] = (μ − mean)/arms with any baseline."""
    curve, mu, variance = tabular.bandit(baseline)
    torch.manual_seed(5)
    n, arms = 200_000, len(mu)
    a = torch.randint(arms, (n,))
    R = mu[a] + torch.randn(n)
    A = reinforce(R[:, None], torch.ones(n, 1), baseline=mu.mean().item() if baseline else "none")
    gradients = A * (torch.eye(arms)[a] - 1 / arms)
    assert gradients.var(0).sum().item() == pytest.approx(variance, rel=0.02)
    assert gradients.mean(0).tolist() == pytest.approx(((mu - mu.mean()) / arms).tolist(), abs=0.02)
    assert curve[-1][1] > 0.98 * mu.max()


def test_a_baseline_takes_most_of_the_variance_away(tabular):
    assert tabular.bandit(True, pulls=1)[2] < tabular.bandit(False, pulls=1)[2] / 5


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy on torch, where matplotlib is given tensors
def test_the_file_runs_as_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--out", str(tmp_path / "out")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    shares = [float(line.split()[-1].rstrip("%")) for line in said if line.endswith("%")]
    assert len(shares) == 7
    assert min(shares) >= 95
    assert (tmp_path / "out" / "tabular.png").read_bytes().startswith(b"\x89PNG")
