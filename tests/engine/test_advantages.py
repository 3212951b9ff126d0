"""Advantages against golden numbers, plain Python re-derivations, and what they promise about odd groups and rows."""

import inspect
import math
import statistics

import pytest
import torch
from helpers import close, f64, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl import advantages as adv
from minirl.errors import InputError

NAN = math.nan
SEEDS = st.integers(0, 2**31)


def one_group(rewards):
    return torch.zeros(len(rewards), dtype=torch.long)


def random_rows(seed, rows=5, time=9):
    """Token rewards and values, with a random mask: ragged, holed, possibly empty rows; garbage under it."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=g) > torch.rand(rows, 1, generator=g)
    rewards, values = (torch.randn(rows, time, generator=g, dtype=torch.float64) for _ in range(2))
    return (
        rewards.masked_fill(~mask, NAN),
        values.masked_fill(~mask, NAN),
        mask,
        torch.randn(rows, generator=g).double(),
    )


# ---- golden numbers --------------------------------------------------------------------------------------------------


def test_grpo_family_on_one_group_matches_golden():
    x, p, expected = golden("grpo_advantage_example")
    R, ids = x["rewards"], one_group(x["rewards"])
    close(adv.grpo_mean(R, ids), expected["adv_mean_only"])
    close(adv.grpo(R, ids, eps=p["eps"]), expected["adv_std_sample"])
    close(adv.grpo(R, ids, eps=p["eps"], ddof=0), expected["adv_std_population"])
    close(adv.grpo(R, ids, eps=0.0), expected["adv_std_sample_eps0"])
    close(adv.grpo(R, ids, eps=1e-6), expected["adv_std_sample_eps1e6"])
    close(adv.rloo(R, ids), expected["adv_rloo"])


def test_estimators_on_many_groups_match_golden():
    x, _, expected = golden("grpo_advantage_multi_group")
    R, ids = x["rewards"], x["group_ids"].long()
    names = {
        "grpo": "group_std",
        "grpo_mean": "mean_only",
        "grpo_batch_std": "batch_std_of_raw_rewards",
        "rloo": "rloo",
    }
    for ours, theirs in (names | {"reinforce_pp_baseline": "reinforce_pp_baseline"}).items():
        close(adv.OUTCOME[ours](R, ids), expected[theirs])


def test_degenerate_groups_match_golden():
    x, _, expected = golden("grpo_advantage_degenerate")
    for name in ("identical", "singleton"):
        R = x[f"rewards_{name}"]
        assert adv.grpo(R, one_group(R)).tolist() == expected[name]
    R = x["rewards_pair"]
    close(adv.grpo(R, one_group(R)), expected["pair"])
    close(adv.grpo(R, one_group(R), ddof=0), expected["pair_population"])


@pytest.mark.parametrize("name", ["g1.0_l0.95", "g1.0_l1.0", "g1.0_l0.0", "truncated_bootstrap", "padded_rows"])
def test_gae_matches_golden(name):
    x, p, expected = golden(f"gae_{name}")
    A, returns = adv.gae(x["rewards"], x["values"], x["mask"], bootstrap=x.get("bootstrap_value"), **p)
    close(A, expected["adv"])
    close(returns, expected["returns"])
    if "adv_whitened" in expected:
        close(adv.whiten(A, x["mask"]), expected["adv_whitened"])


def test_kl_in_reward_matches_golden():
    x, p, expected = golden("kl_in_reward")
    policy = (x["score"], x["logp"], x["ref_logp"], x["mask"], p["beta"])
    close(adv.kl_in_reward(*policy), expected["token_rewards_k1"])
    close(adv.kl_in_reward(*policy, kl="k3"), expected["token_rewards_k3"])
    close(adv.kl_in_sequence_reward(*policy), expected["rloo_style_seq_reward_k1"])
    for kl in ("k1", "k3"):
        close((x["score"] - adv.kl_in_sequence_reward(*policy, kl=kl)) / p["beta"], expected[f"seq_kl_{kl}"])


def test_reward_to_go_its_baseline_and_its_whitening_match_golden():
    x, p, expected = golden("reinforce_reward_to_go")
    close(adv.returns_to_go(x["rewards"], x["mask"], p["gamma"]), expected["returns"])
    close(adv.reinforce(x["rewards"], x["mask"], gamma=p["gamma"]), expected["returns"])
    close(
        adv.reinforce(x["rewards"], x["mask"], gamma=p["gamma"], baseline="batch_mean"),
        expected["adv_batch_mean_baseline"],
    )
    close(adv.reinforce_pp(x["rewards"], x["mask"], gamma=p["gamma"]), expected["reinforce_pp_whitened"])


# ---- one reward a completion -----------------------------------------------------------------------------------------


def by_hand(name, rewards, ids, eps, ddof):
    """The estimators group by group in Python floats; NaN rows take no part."""

    def spread(xs):
        return (
            0.0 if len(xs) <= ddof else math.sqrt(sum((x - statistics.fmean(xs)) ** 2 for x in xs) / (len(xs) - ddof))
        )

    scored = [r for r in rewards if not math.isnan(r)]
    members = {g: [r for r, i in zip(rewards, ids, strict=True) if i == g and not math.isnan(r)] for g in ids}
    centred = [r - statistics.fmean(members[g]) for r, g in zip(rewards, ids, strict=True) if not math.isnan(r)]
    A = []
    for r, g in zip(rewards, ids, strict=True):
        peers = members[g]
        if math.isnan(r) or max(peers) - min(peers) <= 1e-8:
            A.append(0.0)
            continue
        d, n = r - statistics.fmean(peers), len(peers)
        scale = {"grpo": spread(peers), "grpo_batch_std": spread(scored), "reinforce_pp_baseline": spread(centred)}
        A.append(d * n / (n - 1) if name == "rloo" else d if name == "grpo_mean" else d / (scale[name] + eps))
    return A


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 0.1, -0.5, 2.5, NAN]), st.integers(-2, 2)), min_size=1, max_size=16
    ),
    eps=st.sampled_from([1e-4, 1e-6]),
    ddof=st.sampled_from([0, 1]),
)
def test_every_estimator_equals_its_definition_group_by_group(rows, eps, ddof):
    rewards, ids = (list(column) for column in zip(*rows, strict=True))
    for name in adv.OUTCOME.keys() - {"correct_only"}:
        A = adv.OUTCOME[name](f64(rewards), torch.tensor(ids), eps=eps, ddof=ddof)
        close(A, by_hand(name, rewards, ids, eps, ddof))


@pytest.mark.parametrize("name", list(adv.OUTCOME))
def test_estimators_do_not_depend_on_the_order_of_rows(name):
    g = torch.Generator().manual_seed(0)
    R, ids = torch.randn(12, generator=g, dtype=torch.float64), torch.arange(12) // 4
    order = torch.randperm(12, generator=g)
    close(adv.OUTCOME[name](R[order], ids[order]), adv.OUTCOME[name](R, ids)[order], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(adv.OUTCOME.keys() - {"correct_only"}))
def test_identical_rewards_single_rows_and_unscorable_rows_have_exactly_no_advantage(name, dtype):
    R = torch.tensor([0.1] * 6 + [0.7] + [NAN, 1.0, 0.0, 1.0] + [NAN, NAN, 3.0], dtype=dtype)
    ids = torch.tensor([0] * 6 + [1] + [2] * 4 + [3] * 3)
    for eps in (1e-4, 0.0):
        A = adv.OUTCOME[name](R, ids, eps=eps)
        assert A.dtype == dtype
        assert (A[:8] == 0).all() and (A[11:] == 0).all()
        assert A[8] > 0 > A[9]


def test_unscorable_rows_do_not_move_the_statistics_of_others():
    R, ids = f64([1.0, NAN, 0.0, 0.0, NAN, 5.0, 2.0]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    keep = ~R.isnan()
    for estimate in adv.OUTCOME.values():
        close(estimate(R, ids)[keep], estimate(R[keep], ids[keep]), 1e-12)


def test_grpo_is_scale_free_and_grpo_mean_is_not():
    R, ids = f64([1.0, 0.0, 0.3, -2.0]), torch.zeros(4, dtype=torch.long)
    close(adv.grpo(100 * R + 7, ids, eps=0.0), adv.grpo(R, ids, eps=0.0))
    close(adv.grpo_mean(100 * R + 7, ids), 100 * adv.grpo_mean(R, ids))


def test_estimators_of_outcome_share_one_signature():
    for estimate in adv.OUTCOME.values():
        parameters = inspect.signature(estimate).parameters
        assert list(parameters)[:4] == ["rewards", "group_ids", "eps", "ddof"]
        assert parameters["eps"].default == 1e-4 and parameters["ddof"].default == 1


def test_whitening_over_tokens_weighs_long_answers_more():
    R, ids = f64([1.0, 0.0, 0.5, 0.0, NAN]), torch.tensor([0, 0, 1, 1, 1])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    centred = f64([0.5, -0.5, 0.25, -0.25])
    tokens = centred.repeat_interleave(mask[:4].sum(1))
    expected = (centred - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    A = adv.reinforce_pp_baseline(R, ids, whiten_over="token", mask=mask)
    close(A[:4], expected[:, None] * mask[:4])
    assert (A[4] == 0).all()
    with pytest.raises(InputError, match="mask"):
        adv.reinforce_pp_baseline(R, ids, whiten_over="token")


def test_correct_only_is_the_indicator_of_a_correct_answer():
    for rewards in ([1, 0, 1], [1.0, -1.0, 1.0], [1.0, NAN, 0.9]):
        A = adv.correct_only(torch.tensor(rewards), torch.zeros(3, dtype=torch.long))
        assert A.tolist() == [1.0, 0.0, 1.0] and A.dtype == torch.float32
    assert adv.correct_only(f64([0.2, 0.1]), torch.zeros(2), threshold=0.15).tolist() == [1.0, 0.0]


def test_mismatched_group_ids_are_refused():
    with pytest.raises(InputError, match="group_ids"):
        adv.grpo(torch.zeros(4), torch.zeros(3, dtype=torch.long))


# ---- rewards of tokens -----------------------------------------------------------------------------------------------


def gae_by_hand(r, v, m, gamma, lam, bootstrap):
    A, returns, next_value, next_A = [0.0] * len(r), [0.0] * len(r), bootstrap, 0.0
    for t in reversed(range(len(r))):
        if m[t]:
            next_A = r[t] + gamma * next_value - v[t] + gamma * lam * next_A
            next_value, A[t], returns[t] = v[t], next_A, next_A + v[t]
    return A, returns


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, time=st.integers(1, 17), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_equals_the_backward_recursion_across_holes_and_ragged_rows(seed, time, gamma, lam):
    r, v, m, bootstrap = random_rows(seed, time=time)
    A, returns = adv.gae(r, v, m, gamma=gamma, lam=lam, bootstrap=bootstrap)
    for i in range(len(r)):
        hand, hand_returns = gae_by_hand(*(x[i].tolist() for x in (r, v, m)), gamma, lam, bootstrap[i].item())
        close(A[i], hand)
        close(returns[i], hand_returns)


def test_gae_carries_value_and_advantage_across_a_tool_observation():
    r, v, m = f64([[0.1, NAN, NAN, 1.0]]), f64([[0.3, NAN, NAN, 0.6]]), torch.tensor([[1, 0, 0, 1]])
    A, returns = adv.gae(r, v, m, gamma=0.9, lam=0.8)
    close(A, [[0.1 + 0.9 * 0.6 - 0.3 + 0.9 * 0.8 * 0.4, 0, 0, 0.4]])
    close(returns, [[A[0, 0].item() + 0.3, 0, 0, 1.0]])


def test_gae_at_lambda_one_is_return_minus_value_and_at_zero_the_td_error():
    r, v, m, _ = random_rows(1)
    keep = m.double()
    v0 = v.nan_to_num()
    close(adv.gae(r, v, m, gamma=0.9, lam=1.0)[0], (adv.returns_to_go(r, m, 0.9) - v0) * keep)
    r, v = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    td = r + 0.9 * torch.cat([v[:, 1:], torch.zeros(2, 1)], 1) - v
    close(adv.gae(r, v, torch.ones(2, 4), gamma=0.9, lam=0.0)[0], td)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, time=st.integers(1, 17), gamma=st.sampled_from([1.0, 0.7]))
def test_reward_to_go_discounts_later_rewards_over_counted_tokens_only(seed, time, gamma):
    r, _, m, _ = random_rows(seed, time=time)
    returns = adv.returns_to_go(r, m, gamma)
    for row, keep, R in zip(r, m, returns, strict=True):
        counted = row[keep].tolist()
        close(
            R[keep],
            f64([sum(gamma ** (k - t) * counted[k] for k in range(t, len(counted))) for t in range(len(counted))]),
        )
        assert (R[~keep] == 0).all()


def test_whole_return_gives_every_token_the_return_of_its_row():
    r, m = f64([[NAN, 1.0, 2.0, NAN], [3.0, 0.0, 0.0, 4.0]]), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    expected = [[0, 2.0, 2.0, 0], [3 + 0.25 * 4, 4.0, 0, 4.0]]
    close(adv.reinforce(r, m, gamma=0.5, reward_to_go=False), expected)


def test_a_group_mean_counts_a_completion_once_whatever_its_length():
    mask = torch.arange(9) < torch.tensor([1, 9, 4, 2])[:, None]
    rewards = torch.zeros(4, 9, dtype=torch.float64)
    rewards[[0, 2, 3], [0, 3, 1]] = f64([1.0, 5.0, 2.0])  # R = 1, 0 and 5, 2
    A = adv.reinforce(rewards, mask, baseline="group_mean", group_ids=torch.tensor([0, 0, 1, 1]))
    close(A, f64([0.5, -0.5, 1.5, -1.5])[:, None] * mask)
    rewards[0, 0], rewards[1, 2] = NAN, 3.0  # R = 3 · 0.5² seen from the first token
    A = adv.reinforce(rewards, mask, gamma=0.5, baseline="group_mean", group_ids=torch.tensor([0, 0, 1, 1]))
    assert (A[0] == 0).all()
    close(A[1], f64([0, 0.75, 2.25, -0.75, -0.75, -0.75, -0.75, -0.75, -0.75]))


def test_rows_outside_the_loss_are_in_no_mean_and_deviation_of_the_batch_and_stay_in_those_of_their_group():
    R, ids = f64([1.0, 0.0, 5.0, 0.5, 0.0, NAN]), torch.tensor([0, 0, 0, 1, 1, 1])
    lengths, cut = torch.tensor([2, 3, 4, 1, 2, 3]), torch.tensor([0, 0, 1, 0, 0, 0]).bool()
    mask = (torch.arange(4) < lengths[:, None]) & ~cut[:, None]
    centred = f64([-1.0, -2.0, 3.0, 0.25, -0.25])  # of group 0 with the row that is cut
    close(adv.grpo_batch_std(R, ids, mask=mask)[:5], centred / (R[[0, 1, 3, 4]].std() + 1e-4))
    counted = centred[[0, 1, 3, 4]]
    A = adv.reinforce_pp_baseline(R, ids, mask=mask)
    close(A[[0, 1, 3, 4]], (counted - counted.mean()) / (counted.std() + 1e-4))
    assert A[5] == 0
    everywhere = adv.reinforce_pp_baseline(R, ids)
    close(everywhere[:5], centred / (centred.std() + 1e-4))
    assert adv.grpo_batch_std(R, ids, mask=torch.zeros(6, 4)).isfinite().all()
    tokens = torch.zeros(6, 4, dtype=torch.float64).scatter(1, lengths[:, None] - 1, R[:, None])
    present = torch.arange(4) < lengths[:, None]
    A = adv.reinforce(tokens, present, baseline="batch_mean", counted=mask)
    close(A[0, :2], 1 - f64([2 * 1.0 + 0.5] * 2) / 8)
    A = adv.reinforce(tokens, present, baseline="group_mean", group_ids=ids, counted=mask)
    close(A[:, 0], f64([-1.0, -2.0, 3.0, 0.25, -0.25, 0.0]))


def test_the_k3_in_the_reward_grows_with_the_distance_beyond_the_guard():
    logp = f64([[-45.0, -30.0, -25.0, -5.0, 0.0, 20.0, 30.0]])
    penalty = -adv.kl_in_reward(f64([0.0]), logp, torch.zeros(1, 7), torch.ones(1, 7), 1.0, kl="k3").flatten()
    assert (penalty[:5].diff() < 0).all() and (penalty[4:].diff() > 0).all() and penalty[4] == 0


def test_baselines_are_subtracted_from_counted_tokens_only():
    r = f64([[0.0, 1.0, NAN], [0.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    m = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    R = f64([[1, 1, 0], [3, 3, 3], [5, 5, 0]])
    close(adv.reinforce(r, m, baseline=0.5), (R - 0.5) * m)
    close(adv.reinforce(r, m, baseline="batch_mean"), (R - R.sum() / 8) * m)
    group = f64([2, 2, 5])[:, None]  # of the completions' returns 1, 3 and 5
    close(adv.reinforce(r, m, baseline="group_mean", group_ids=torch.tensor([4, 4, 9])), (R - group) * m)
    for wrong in ("group_mean", "ema"):
        with pytest.raises(InputError, match="baseline"):
            adv.reinforce(r, m, baseline=wrong)


def test_rows_with_an_unscorable_token_reward_have_no_advantage_and_do_not_move_others():
    r, v, m, _ = random_rows(3, rows=6)
    m[:] = True
    r, v = torch.randn(6, 9).double(), torch.randn(6, 9).double()
    r[2, 4] = NAN
    others = [0, 1, 3, 4, 5]
    for estimate in (
        lambda r, v, m: adv.reinforce(r, m, baseline="batch_mean"),
        lambda r, v, m: adv.reinforce_pp(r, m),
    ):
        A = estimate(r, v, m)
        assert (A[2] == 0).all()
        close(A[others], estimate(r[others], v[others], m[others]))
    A, returns = adv.gae(r, v, m)
    assert (A[2] == 0).all() and returns[2].equal(v[2])
    close(A[others], adv.gae(r[others], v[others], m[others])[0])


def test_whitened_tokens_have_mean_zero_and_sample_variance_one():
    r, _, m, _ = random_rows(5, rows=8)
    for shift, mean in ((True, 0.0), (False, r[m].mean().item())):
        x = adv.whiten(r, m, shift_mean=shift)
        close(x[m].mean(), mean)
        close(x[m].var(), 1.0, 1e-6)
        assert (x[~m] == 0).all()


def test_whitening_what_does_not_vary_gives_exactly_zero():
    same = f64([[0.1] * 6, [0.1] * 6])
    assert same[0].sum() / 6 != 0.1  # the mean is rounded
    assert (adv.whiten(same, torch.tensor([[1] * 6, [0] * 6])) == 0).all()
    assert (adv.whiten(f64([[3.0, NAN, NAN]]), torch.tensor([[1, 0, 0]])) == 0).all()
    assert (adv.whiten(f64([[3.0]]), torch.tensor([[0]])) == 0).all()


def test_process_supervision_normalises_all_steps_of_a_group_and_sums_those_still_to_end():
    rewards = f64([[NAN, 1.0, NAN, 0.0, NAN], [0.5, NAN, 2.0, NAN, NAN], [NAN, 0.3, NAN, 0.3, NAN]])
    ends = ~rewards.isnan()
    A = adv.grpo_process(rewards, ends, torch.tensor([0, 0, 1]), eps=1e-4)
    steps = [1.0, 0.0, 0.5, 2.0]
    a, b, c, d = ((s - statistics.fmean(steps)) / (statistics.stdev(steps) + 1e-4) for s in steps)
    close(A, [[a + b, a + b, b, b, 0], [c + d, d, d, 0, 0], [0] * 5])


def test_process_supervision_leaves_out_an_unscorable_step():
    rewards, ends = f64([[1.0, NAN, 0.0, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(adv.grpo_process(rewards, ends, torch.tensor([0])), [[0, -a, -a, 0]])


# ---- KL in the reward ------------------------------------------------------------------------------------------------


def test_score_lands_on_the_last_counted_token_and_garbage_stays_under_the_mask():
    logp, ref = f64([[-1.0, NAN, -2.0, math.inf]]), f64([[-1.5, NAN, -1.0, NAN]])
    r = adv.kl_in_reward(f64([3.0]), logp, ref, torch.tensor([[1, 0, 1, 0]]), 0.1)
    close(r, [[-0.05, 0.0, 3.1, 0.0]])


def test_unscorable_completion_stays_unscorable_with_kl_in_its_reward():
    logp, mask = f64([[-1.0, -1.0], [-1.0, -1.0]]), torch.ones(2, 2)
    token = adv.kl_in_reward(f64([NAN, 1.0]), logp, logp, mask, 0.1)
    assert (adv.reinforce(token, mask)[0] == 0).all() and (adv.reinforce(token, mask)[1] == 1).all()
    assert adv.kl_in_sequence_reward(f64([NAN, 1.0]), logp, logp, mask, 0.1).isnan().tolist() == [True, False]


def test_row_without_tokens_gets_no_token_reward():
    logp = torch.full((1, 3), NAN)
    assert (adv.kl_in_reward(torch.ones(1), logp, logp, torch.zeros(1, 3), 0.1) == 0).all()


def test_unknown_kl_estimator_in_the_reward_is_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(InputError, match="k1 or k3"):
        adv.kl_in_reward(torch.zeros(1), x, x, x, 0.1, kl="k2")


def test_advantages_carry_no_gradient():
    values = torch.randn(2, 3, requires_grad=True)
    A, returns = adv.gae(torch.randn(2, 3), values, torch.ones(2, 3))
    assert not A.requires_grad and not returns.requires_grad
    rewards = torch.randn(4, requires_grad=True)
    assert not any(estimate(rewards, torch.arange(4) // 2).requires_grad for estimate in adv.OUTCOME.values())


def test_low_precision_inputs_give_float32_advantages():
    x = torch.randn(2, 3).bfloat16()
    mask = torch.ones(2, 3)
    assert adv.gae(x, x, mask)[0].dtype == torch.float32
    assert adv.reinforce(x, mask).dtype == torch.float32
    assert adv.kl_in_reward(torch.zeros(2), x, x, mask, 0.1).dtype == torch.float32
    assert adv.grpo(torch.tensor([0, 1]), torch.zeros(2)).dtype == torch.float32
