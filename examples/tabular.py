"""The background of RL for language models, small enough to be exact: a bandit, and a grid world.

    python examples/tabular.py [--out runs/tabular]

For a language model the state is the prompt with the tokens so far, and an action is a token; here both are few, so the
optimum is known (value iteration). REINFORCE and actor-critic run on the engine's advantages and policy loss.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from minirl import PolicyLoss, policy_loss
from minirl.advantages import gae, reinforce

GRID = ("....#G", ".##...", "....#.", ".##...", "S....#")  # start, goal, walls
MOVES = torch.tensor([(-1, 0), (0, 1), (1, 0), (0, -1)])  # (dy, dx) of an action
GAMMA, STEP_COST, SLIP, HORIZON, BATCH, H, W = 0.97, 0.02, 0.1, 60, 16, len(GRID), len(GRID[0])
START, GOAL, S, A = "".join(GRID).index("S"), "".join(GRID).index("G"), H * W, len(MOVES)
TEXTBOOK = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="seq_sum")  # −mean_i Σ_t A_t log π(a_t|s_t)


def bandit(baseline: bool, arms: int = 10, pulls: int = 2000, seed: int = 0):
    """REINFORCE, R ~ N(μ_a, 1): ∇E[R] = E[(R − b) ∇log π(a)] (log-derivative trick); E[∇log π] = 0, so b changes the
    variance alone. Returns (pull, E[R] after it), μ, and the first gradient's variance (π uniform, b 0 or the mean)."""
    torch.manual_seed(seed)
    mu, theta, b, curve = torch.randn(arms) + 4, torch.zeros(arms), 0.0, []
    square = (1 - 1 / arms) * ((mu - mu.mean() * baseline).square() + 1).mean()  # E|∇|²: |∇log π|² = 1 − 1/arms
    for pull in range(pulls):
        a = theta.softmax(0).multinomial(1)
        R = mu[a] + torch.randn(1)
        theta += 0.05 * reinforce(R[None], torch.ones(1, 1), baseline=b)[0] * (torch.eye(arms)[a[0]] - theta.softmax(0))
        b += 0.05 * (R.item() - b) * baseline  # a running mean of the rewards before the next
        curve.append((pull + 1, (theta.softmax(0) @ mu).item()))
    return curve, mu, (square - ((mu - mu.mean()) / arms).square().sum()).item()


def grid_world():
    """P [S, A, S'] and r [S, A]: each step costs STEP_COST, reaching the goal pays 1 and ends. A move goes to either
    side with probability SLIP/2 each; one into a wall stays."""
    P = torch.zeros(S, A, S)
    for s, a in torch.cartesian_prod(torch.arange(S), torch.arange(A)).tolist():
        for turn, p in ((0, 1 - SLIP), (1, SLIP / 2), (-1, SLIP / 2)):
            y, x = (torch.tensor(divmod(s, W)) + MOVES[(a + turn) % A]).tolist()
            free = s != GOAL and 0 <= y < H and 0 <= x < W and GRID[y][x] != "#"
            P[s, a, y * W + x if free else s] += p
    return P, (P[:, :, GOAL] - STEP_COST) * (torch.arange(S) != GOAL)[:, None]


def value_iteration(P, r):
    """Q [S, A] of the best policy: Q(s, a) ← r + γ Σ_s' P max_a' Q(s', a') (Bellman optimality) shrinks errors by γ."""
    Q = torch.zeros(S, A)
    for _ in range(500):
        Q = r + GAMMA * P @ Q.amax(1)
    return Q


def value_of(pi, P, r):
    """V [S] of a policy [S, A], exactly: Bellman's equation V = r_π + γ P_π V is linear."""
    return torch.linalg.solve(torch.eye(S) - GAMMA * torch.einsum("sa,sat->st", pi, P), (pi * r).sum(1))


def q_learning(P, r, episodes: int = 1200, seed: int = 0):
    """Q(s, a) ← Q + α [r + γ max_a' Q(s', a') − Q]: model-free TD control. ε-greedy acts, what is learned is the greedy
    policy (off-policy). Returns (episode, the exact value of the start under it)."""
    torch.manual_seed(seed)
    Q, curve = torch.zeros(S, A), []
    for episode in range(1, episodes + 1):
        s, t = START, 0
        while s != GOAL and (t := t + 1) <= HORIZON:
            a = int(Q[s].argmax() if torch.rand(()) > 0.2 else torch.randint(A, ()))
            n = int(P[s, a].multinomial(1))
            Q[s, a] += 0.1 * ((n == GOAL) - STEP_COST + GAMMA * Q[n].max() - Q[s, a])  # Q(goal) stays 0
            s = n
        curve.append((episode, value_of(torch.eye(A)[Q.argmax(1)], P, r)[START].item()))
    return curve


def policy_gradient(P, r, lam: float | None, updates: int = 150, lr: float = 4.0, seed: int = 0):
    """∇J = E[Σ_t A_t ∇log π(a_t|s_t)] (γ^t left out, as usual). lam None: REINFORCE, A_t = Σ_{k≥t} γ^(k−t) r_k − mean.
    Else actor-critic, A by GAE: λ = 0 TD error (low variance, biased by V), λ = 1 Monte Carlo − V. Returns the same."""
    torch.manual_seed(seed)
    theta, V, curve = torch.zeros(S, A, requires_grad=True), torch.zeros(S), []
    for episodes in range(BATCH, BATCH * (updates + 1), BATCH):
        pi, now, steps = theta.detach().softmax(1), torch.full((BATCH,), START), []
        for _ in range(HORIZON):
            action = pi[now].multinomial(1)[:, 0]
            following = P[now, action].multinomial(1)[:, 0]
            steps.append((now, action, (following == GOAL).float() - STEP_COST, now != GOAL))
            now = following
        s, a, rewards, mask = (torch.stack(column, 1) for column in zip(*steps, strict=True))  # [B, T]
        if lam is None:
            advantages = reinforce(rewards, mask, gamma=GAMMA, baseline="batch_mean")
        else:  # an episode that was cut goes on for the critic; V(goal) stays 0
            advantages, target = gae(rewards, V[s], mask, gamma=GAMMA, lam=lam, bootstrap=V[now])
            V.scatter_reduce_(0, s[mask], (0.7 * V[s] + 0.3 * target)[mask], "mean", include_self=False)
        loss, _ = policy_loss(theta.log_softmax(1)[s, a], None, None, advantages, mask, TEXTBOOK)
        theta.data -= lr * torch.autograd.grad(loss, theta)[0]
        curve.append((episodes, value_of(theta.detach().softmax(1), P, r)[START].item()))
    return curve


def main(out: Path):
    (P, r), (plain, mu, high), (steady, _, low) = grid_world(), bandit(baseline=False), bandit(baseline=True)
    Q = value_iteration(P, r)
    pulls = {f"REINFORCE, variance {high:.1f}": plain, f"REINFORCE with baseline, variance {low:.1f}": steady}
    grid = {"Q-learning": q_learning(P, r), "REINFORCE, reward-to-go": policy_gradient(P, r, None)}
    grid |= {f"actor-critic, GAE λ = {lam}": policy_gradient(P, r, lam) for lam in (0, 0.95, 1)}
    figure, (*plots, right) = plt.subplots(1, 3, figsize=(16, 4), layout="constrained")
    panels = ("bandit: reward over pulls", mu.max(), pulls), ("grid: V(start) over episodes", Q[START].max(), grid)
    for axes, (title, best, curves) in zip(plots, panels, strict=True):
        print(f"{title:<44}value  optimal   share")
        for name, curve in curves.items():
            print(f"  {name:<40}{curve[-1][1]:7.3f}{best:9.3f}{curve[-1][1] / best:8.1%}")
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.axhline(best, color="black", linestyle=":", label="optimal")
        axes.legend(title=title)
    Q[[cell in "#G" for cell in "".join(GRID)]] = torch.nan  # not drawn: neither colour, nor arrow (white on white)
    right.imshow(Q.amax(1).view(H, W))
    right.quiver(range(W), range(H), *MOVES[Q.argmax(1)].flip(1).T.view(2, H, W), angles="xy", pivot="mid", color="w")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "tabular.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabular"), help="folder of the plot")
    main(parser.parse_args().out)
