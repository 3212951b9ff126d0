"""What the KL estimators estimate, by exact enumeration of a small vocabulary in float64: no sample, no noise.

With d = log π − log π_ref of the drawn token, k1 = d, k2 = d²/2, k3 = e^{−d} + d − 1 and ρ = π/π_old:

    as a loss, drawn from π        value            expected gradient
    k1                             KL(π‖π_ref)      0
    k2                             biased           ∇KL(π‖π_ref)
    k3                             KL(π‖π_ref)      ∇KL(π_ref‖π)
    ρ·k3, drawn from π_old         KL(π‖π_ref)      ∇KL(π‖π_ref)

and k1 in the reward of a policy gradient gives ∇KL(π‖π_ref), that of whole sequences too (2510.01555).
"""

import pytest
import torch

from minirl import advantages as adv
from minirl.errors import InputError
from minirl.kernels import TokenLoss, fused_policy_loss
from minirl.losses import PolicyLoss, policy_loss

V = 5
SEEDS = [0, 1, 2]
POLICY_GRADIENT = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="seq_sum")


def close(actual, expected, tolerance: float = 1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def apart(actual, expected):
    assert (actual - expected).norm() > 0.01 * expected.norm()


def distributions(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy, and the log-probs of the policy before the update and of the reference."""
    g = torch.Generator().manual_seed(seed)
    policy, old, ref = (torch.randn(*shape, V, generator=g, dtype=torch.float64) for _ in range(3))
    return policy.requires_grad_(), (policy.detach() + 0.7 * old).log_softmax(-1), ref.log_softmax(-1)


def reverse_kl(logits, ref):  # KL(π‖π_ref) of each context
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum(-1)


def forward_kl(logits, ref):  # KL(π_ref‖π)
    return (ref.exp() * (ref - logits.log_softmax(-1))).sum(-1)


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


# --- one token -------------------------------------------------------------------------------------------------------


def by_policy_loss(logits, sampler, ref, **options):
    """Σ_y sampler(y)·loss(y): one call a token, with the log-probs that autograd takes back to the logits."""
    total, tokens = 0.0, torch.ones(1, 1)
    for y in range(V):
        logp = logits.log_softmax(-1)[y].view(1, 1)
        given = (sampler[y].view(1, 1), ref[y].view(1, 1), torch.zeros(1), tokens)
        total = total + sampler[y].exp() * policy_loss(logp, *given, PolicyLoss(**options))[0]
    return total.detach(), gradient(total, logits)


def by_fused_loss(logits, sampler, ref, **options):
    """The same in one call from the logits: a row for each token, its weight the probability that it is drawn."""
    rows, given = logits.detach().expand(V, V).clone().requires_grad_(), (torch.zeros(V), sampler.exp())
    loss, *_ = fused_policy_loss(
        rows, torch.arange(V), *given, TokenLoss(**options), old_logp=sampler, ref_logp=ref, backend="torch"
    )
    loss.backward()
    return loss.detach(), rows.grad.sum(0)


@pytest.fixture(params=[by_policy_loss, by_fused_loss])
def expectation(request):
    """(logits, log-probs that tokens are drawn with, reference, options) -> expected loss, expected gradient."""
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_k3_has_the_value_of_the_kl_and_k2_has_not(seed, expectation):
    logits, _, ref = distributions(seed)
    now = logits.detach().log_softmax(-1)
    for kl in ("k3", "k3_is"):
        close(expectation(logits, now, ref, kl=kl, kl_coef=0.3)[0], 0.3 * reverse_kl(logits, ref).detach())
    biased = expectation(logits, now, ref, kl="k2", kl_coef=1.0)[0]
    close(biased, 0.5 * now.exp() @ (now - ref) ** 2)
    apart(biased, reverse_kl(logits, ref).detach())


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_k2_has_the_gradient_of_the_reverse_kl_and_k3_that_of_the_forward_kl(seed, expectation):
    logits, _, ref = distributions(seed)
    now = logits.detach().log_softmax(-1)
    reverse, forward = gradient(reverse_kl(logits, ref), logits), gradient(forward_kl(logits, ref), logits)
    close(forward, now.exp() - ref.exp())
    grads = {kl: expectation(logits, now, ref, kl=kl, kl_coef=1.0)[1] for kl in ("k2", "k3", "k3_is")}
    close(grads["k2"], reverse)
    close(grads["k3_is"], reverse)
    close(grads["k3"], forward)
    apart(grads["k3"], reverse)


@pytest.mark.parametrize("seed", SEEDS)
def test_off_policy_only_the_weighted_k3_has_the_value_and_the_gradient_of_the_reverse_kl(seed, expectation):
    logits, old, ref = distributions(seed)
    exact = reverse_kl(logits, ref)
    value, grad = expectation(logits, old, ref, kl="k3_is", kl_coef=0.3)
    close(value, 0.3 * exact.detach())
    close(grad, 0.3 * gradient(exact, logits))
    for kl in ("k2", "k3"):
        value, grad = expectation(logits, old, ref, kl=kl, kl_coef=1.0)
        apart(value, exact.detach())
        apart(grad, gradient(reverse_kl(logits, ref), logits))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_penalty_to_the_old_policy_is_the_kl_from_it(seed, expectation):
    logits, old, ref = distributions(seed)  # PPO's penalty: KL(π_old‖π), drawn from π_old
    value, grad = expectation(logits, old, ref, kl_old_coef=0.3)
    close(value, 0.3 * forward_kl(logits, old).detach())
    close(grad, 0.3 * gradient(forward_kl(logits, old), logits))


def policy_gradient(logits, logp, A, mask=None) -> torch.Tensor:
    """The gradient by the logits of −E[Σ_t A_t log π_t], every sequence being a row of logp, A and mask [B, T]."""
    mask, total = torch.ones(logp.shape) if mask is None else mask, 0.0
    for i, probability in enumerate((logp.detach() * mask).sum(1).exp()):
        row = slice(i, i + 1)
        total = total + probability * policy_loss(logp[row], None, None, A[row], mask[row], POLICY_GRADIENT)[0]
    return gradient(total, logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_is_no_loss_for_its_expected_gradient_is_zero(seed):
    logits, _, _ = distributions(seed)
    logp = logits.log_softmax(-1)[:, None]
    close(policy_gradient(logits, logp, -torch.ones(V, 1)), torch.zeros(V, dtype=torch.float64))  # ∂k1/∂log π = 1
    with pytest.raises(InputError, match="put it in the reward"):
        PolicyLoss(kl="k1", kl_coef=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_reward_has_the_value_and_the_gradient_of_the_reverse_kl(seed):
    logits, _, ref = distributions(seed)
    logp, mask, nothing = logits.log_softmax(-1)[:, None], torch.ones(V, 1), torch.zeros(V)
    rewards = {kl: adv.kl_in_reward(nothing, logp, ref[:, None], mask, 0.3, kl) for kl in ("k1", "k3")}
    exact, p = reverse_kl(logits, ref), logits.detach().softmax(-1)
    for reward in rewards.values():
        close(-(p @ reward).squeeze(), 0.3 * exact.detach())
    wanted = 0.3 * gradient(exact, logits)
    close(policy_gradient(logits, logp, adv.reinforce(rewards["k1"], mask)), wanted)
    apart(policy_gradient(logits, logits.log_softmax(-1)[:, None], adv.reinforce(rewards["k3"], mask)), wanted)


def test_k1_in_the_reward_has_its_golden_values(golden):
    case = golden["cases"]["kl_estimators"]
    logp, ref = (torch.tensor(case["inputs"][name], dtype=torch.float64)[:, None] for name in ("logp", "ref_logp"))
    reward = adv.kl_in_reward(torch.zeros(len(logp)), logp, ref, torch.ones(logp.shape), 1.0)
    close(-reward.squeeze(1), torch.tensor(case["expected"]["k1"]["value"], dtype=torch.float64))


# --- sequences -------------------------------------------------------------------------------------------------------

STOP = 0
SEQUENCES = [(STOP, STOP)] + [(a, b) for a in range(1, V) for b in range(V)]  # after a stop nothing counts
MASK = torch.tensor([[1, int(a != STOP)] for a, _ in SEQUENCES])


def sequence_logp(table: torch.Tensor) -> torch.Tensor:
    """[B, 2] of all sequences; table [1 + V, V] holds the log-probs of the first token, then of the second by first."""
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in SEQUENCES])


def sequence_kl(logits, ref):
    """KL(π‖π_ref) of whole sequences: how often the policy comes to the second token counts."""
    kl = reverse_kl(logits, ref)
    return kl[0] + (logits.softmax(-1)[0, 1:] * kl[2:]).sum()


def test_the_sequences_are_all_there_are():
    logits, _, _ = distributions(0, 1 + V)
    total = (sequence_logp(logits.log_softmax(-1)) * MASK).sum(1).exp().sum().item()
    assert len(SEQUENCES) == 1 + (V - 1) * V and total == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scored", [False, True])
def test_k1_in_the_reward_of_tokens_or_of_sequences_has_the_gradient_of_the_sequence_kl(scored, seed):
    logits, _, ref = distributions(seed, 1 + V)
    scores = torch.randn(len(SEQUENCES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scored
    logp, ref_logp = sequence_logp(logits.log_softmax(-1)), sequence_logp(ref)
    expected_score = (logp * MASK).sum(1).exp() @ scores
    wanted = gradient(0.3 * sequence_kl(logits, ref) - expected_score, logits)
    tokens = adv.kl_in_reward(scores, logp, ref_logp, MASK, 0.3)
    whole = adv.kl_in_sequence_reward(scores, logp, ref_logp, MASK, 0.3)
    for A in (
        adv.reinforce(tokens, MASK),
        adv.reinforce(tokens, MASK, reward_to_go=False),
        adv.reinforce(tokens, MASK, baseline=0.7),
        whole,
    ):
        close(policy_gradient(logits, sequence_logp(logits.log_softmax(-1)), A, MASK), wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_logged_kl_of_sequences_is_that_of_sequences(seed):
    logits, _, ref = distributions(seed, 1 + V)
    logp, ref_logp, total = sequence_logp(logits.detach().log_softmax(-1)), sequence_logp(ref), 0.0
    for i, probability in enumerate((logp * MASK).sum(1).exp()):
        row = slice(i, i + 1)
        _, metrics = policy_loss(logp[row], None, ref_logp[row], torch.zeros(1), MASK[row], PolicyLoss())
        total += probability * metrics["kl_ref/seq_k1"]
    close(total, sequence_kl(logits, ref).detach())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", ["token", "seq_mean", "seq_sum", "none"])
def test_as_a_loss_the_kl_is_that_of_each_position_where_the_sampler_came_to(level, seed):
    """The contexts are those of π_old and carry no gradient; the ratio is the token's at every `ratio_level`."""
    logits, old, ref = distributions(seed, 1 + V)
    logp, old_logp, ref_logp = sequence_logp(logits.log_softmax(-1)), sequence_logp(old), sequence_logp(ref)
    o = PolicyLoss(kl="k3_is", kl_coef=0.3, ratio_level=level, aggregation="seq_sum")
    total = 0.0
    for i, probability in enumerate((old_logp * MASK).sum(1).exp()):
        row = slice(i, i + 1)
        given = (old_logp[row], ref_logp[row], torch.zeros(1), MASK[row])
        total = total + probability * policy_loss(logp[row], *given, o)[0]

    def penalty(contexts):
        kl = reverse_kl(logits, ref)
        return 0.3 * (kl[0] + (contexts * kl[2:]).sum())

    close(total.detach(), penalty(old[0, 1:].exp()).detach())
    wanted = gradient(penalty(old[0, 1:].exp()), logits)
    close(gradient(total, logits), wanted)
    apart(gradient(0.3 * sequence_kl(logits, ref), logits), wanted)
