"""The losses of reward models against golden numbers, their closed-form gradients and TRL, and what they promise."""

import math
from collections import defaultdict
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN, f64
from hypothesis import given
from hypothesis import strategies as st

from minirl.preferences import even_weights, ranked_pairs
from minirl.reward_losses import (
    auc,
    bce_loss,
    brier,
    expected_calibration_error,
    inverse_frequency,
    label_metrics,
    pair_metrics,
    pairwise_loss,
    pointwise_loss,
    process_loss,
    ranking_accuracy,
    score_stats,
)


def close(actual, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(f64(actual), f64(expected), rtol=tolerance, atol=tolerance, equal_nan=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(loss, *inputs: torch.Tensor) -> list[list[float]]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return [g.tolist() for g in torch.autograd.grad(loss(*inputs), inputs)]


# --- golden numbers --------------------------------------------------------------------------------------------------


def test_pairs_have_the_golden_loss_gradient_and_measures():
    case = GOLDEN["reward_model_pairwise"]
    chosen, rejected, margin = (f64(case["inputs"][name]) for name in ("chosen", "rejected", "margin"))
    expected, center = case["expected"], case["params"]["center_coef"]
    close(pairwise_loss(chosen, rejected).item(), expected["bt_loss"])
    close(pairwise_loss(chosen, rejected).item(), expected["nll"])
    close(pairwise_loss(chosen, rejected, margin).item(), expected["bt_margin_loss"])
    close(pairwise_loss(chosen, rejected, margin, center).item(), expected["bt_margin_center_loss"])
    close(gradients(lambda w: pairwise_loss(w, rejected), chosen)[0], expected["d_chosen_bt"])
    got = pair_metrics(chosen, rejected, case["params"]["ece_bins"])
    assert got.keys() == {"accuracy", "margin", "ece", "brier"}
    for name, wanted in (("accuracy", "accuracy"), ("margin", "mean_margin"), ("ece", "ece"), ("brier", "brier")):
        close(got[name], expected[wanted])


def test_labels_have_the_golden_loss_and_gradient():
    case = GOLDEN["reward_model_pointwise"]
    pred, target = f64(case["inputs"]["pred"]), f64(case["inputs"]["target"])
    close(pointwise_loss(pred, target).item(), case["expected"]["mse"])
    close(gradients(lambda r: pointwise_loss(r, target), pred)[0], case["expected"]["dpred"])
    close(bce_loss(pred, (target + 1) / 2).item(), case["expected"]["bce_on_01"])


def test_steps_have_the_loss_and_gradient_worked_out_by_hand():
    # Two solutions of three and two steps; σ of the logits is 3/4, 1/2, 1/10 and 4/5, and the second step has no label.
    logits = f64([[math.log(3), 0.0, -math.log(9)], [math.log(4), 0.0, 0.0]])
    labels, mask = f64([[1, 0, 1], [0, 0.5, 0]]), f64([[1, 0, 1], [1, 1, 0]])
    # −ln 3/4, −ln 1/10, −ln 1/5, and ln 2 where the label is a half: the mean over four steps, not over two solutions
    wanted = math.log(4 / 3 * 10 * 5 * 2) / 4
    assert wanted == pytest.approx(1.2232131, abs=1e-7)
    close(process_loss(logits, labels, mask).item(), wanted)
    grad = gradients(lambda s: process_loss(s, labels, mask), logits)[0]
    close(grad, [[-0.25 / 4, 0.0, -0.9 / 4], [0.8 / 4, 0.0, 0.0]])


# --- gradients on paper ----------------------------------------------------------------------------------------------


def test_the_gradients_are_those_of_the_docstrings():
    w, b, m, weights = normal(9), normal(9, seed=1), normal(9, seed=2).abs(), normal(9, seed=3).abs()
    for total in (None, 7.5):
        share = weights / (total or weights.sum())
        miss, level = torch.sigmoid(-(w - b - m)), 2 * 0.3 * (w + b)
        got = gradients(lambda w, b: pairwise_loss(w, b, m, 0.3, weights, total), w, b)  # noqa: B023
        close(got[0], (share * (-miss + level)).tolist())
        close(got[1], (share * (miss + level)).tolist())
        got = gradients(lambda r: pointwise_loss(r, b, weights, total), w)  # noqa: B023
        close(got[0], (share * 2 * (w - b)).tolist())
        y = torch.sigmoid(b)
        got = gradients(lambda s: bce_loss(s, y, weights, total), w)  # noqa: B023
        close(got[0], (share * (w.sigmoid() - y)).tolist())
    mask = f64([[1, 0, 1], [0, 0, 1], [1, 1, 0]])
    s, y = w.view(3, 3), torch.sigmoid(b).view(3, 3)
    close(gradients(lambda s: process_loss(s, y, mask), s)[0], (mask * (s.sigmoid() - y) / mask.sum()).tolist())


def test_gradients_agree_with_finite_differences():
    w, b = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    y = torch.sigmoid(normal(4, seed=2))
    assert torch.autograd.gradcheck(lambda w, b: pairwise_loss(w, b, 0.5, 0.1), (w, b))
    assert torch.autograd.gradcheck(lambda s: bce_loss(s, y), (w,))
    assert torch.autograd.gradcheck(lambda s: process_loss(s, y, f64([1, 0, 1, 1])), (w,))
    assert torch.autograd.gradcheck(lambda r: pointwise_loss(r, y), (w,))


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_far_apart_scores_overflow_nowhere(gap):
    w, b = f64([gap]), f64([0.0])
    loss, [grad] = pairwise_loss(w, b).item(), gradients(lambda w: pairwise_loss(w, b), w)
    assert (loss, grad) == ((1e4, [-1.0]) if gap < 0 else (0.0, [0.0]))


@pytest.mark.parametrize(("margin", "center"), [(False, None), (True, None), (True, 0.01)])
def test_pairs_agree_with_trl(margin, center):
    trainer = pytest.importorskip("trl").RewardTrainer
    w, b = normal(6).float(), normal(6, seed=1).float()
    m = normal(6, seed=2).abs().float()
    args = SimpleNamespace(center_rewards_coefficient=center)
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    stub = SimpleNamespace(args=args, accelerator=accelerator, model=SimpleNamespace(training=False))
    stub._metrics, stub._total_train_tokens = {"eval": defaultdict(list)}, 0

    def theirs(w, b):
        def model(**inputs):
            return SimpleNamespace(logits=torch.cat([w, b]).unsqueeze(-1))

        return trainer.compute_loss(stub, model, {"margin": m} if margin else {})

    def ours(w, b):
        return pairwise_loss(w, b, m if margin else 0.0, center or 0.0)

    close(ours(w, b).item(), theirs(w, b).item(), 1e-5)
    for got, wanted in zip(gradients(ours, w, b), gradients(theirs, w, b), strict=True):
        close(got, wanted, 1e-5)
    close(ranking_accuracy(w, b), stub._metrics["eval"]["accuracy"][0], 1e-5)


# --- promises --------------------------------------------------------------------------------------------------------

SCORES = st.lists(st.floats(-5, 5), min_size=2, max_size=12)


@given(SCORES, SCORES)
def test_swapping_all_pairs_is_the_same_loss_of_mirrored_scores(a, b):
    n = min(len(a), len(b))
    a, b = f64(a[:n]), f64(b[:n])
    close(pairwise_loss(a, b).item(), pairwise_loss(-b, -a).item())
    forth, back = gradients(pairwise_loss, a, b), gradients(pairwise_loss, b, a)
    close([x + y for x, y in zip(forth[0], forth[1], strict=True)], [0.0] * n)
    close([n * (x + y) for x, y in zip(forth[0], back[0], strict=True)], [-1.0] * n)  # σ(d) + σ(−d) = 1
    close(ranking_accuracy(a, b), 1 - ranking_accuracy(b, a))


@given(SCORES, st.floats(-50, 50))
def test_a_shift_of_all_scores_changes_no_pairwise_loss(values, shift):
    a, b = f64(values), f64(values[::-1])
    close(pairwise_loss(a + shift, b + shift, 0.3).item(), pairwise_loss(a, b, 0.3).item())
    close(pair_metrics(a + 16, b + 16)["margin"], pair_metrics(a, b)["margin"])


def test_centring_pulls_the_level_down_and_leaves_the_gap_alone():
    w, b = f64([3.0]), f64([2.0])
    for name, center in (("without", 0.0), ("with", 0.5)):
        d_w, d_b = (g[0] for g in gradients(lambda w, b: pairwise_loss(w, b, 0.0, center), w, b))  # noqa: B023
        close(d_w - d_b, -2 * torch.sigmoid(b - w).item())
        close(d_w + d_b, {"without": 0.0, "with": 4 * 0.5 * 5.0}[name])


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(0, 99))
def test_a_ranked_list_is_the_mean_of_its_pairs_and_ties_are_dropped(ranks, seed):
    k, r = len(ranks), normal(len(ranks), seed=seed)
    pairs = ranked_pairs(ranks)
    by_hand = [(i, j) if ranks[i] > ranks[j] else (j, i) for i, j in combinations(range(k), 2) if ranks[i] != ranks[j]]
    assert sorted(pairs) == sorted(by_hand)
    assert set(even_weights(pairs)) <= {1 / max(len(by_hand), 1)}
    if pairs:
        better, worse = torch.tensor(pairs).unbind(1)
        loss = pairwise_loss(r[better], r[worse], weights=f64(even_weights(pairs)))
        close(loss.item(), sum(pairwise_loss(r[[i]], r[[j]]).item() for i, j in by_hand) / len(by_hand))


def test_lists_of_all_lengths_weigh_the_same():
    long, short = ranked_pairs([3, 2, 1, 0, 5]), ranked_pairs([0, 1])
    assert (len(long), len(short)) == (10, 1)
    close(sum(even_weights(long)), sum(even_weights(short)))
    for scores, responses, pairs in (([2, 2, 0], None, 2), ([3, 2, 1], "aab", 2), ([3, 1, 1, 0], "abbc", 5)):
        found = ranked_pairs(scores, responses)
        assert len(found) == pairs and sum(even_weights(found)) == pytest.approx(1)  # also with ties and equal ones
    assert ranked_pairs([2, 2, 2]) == [] and ranked_pairs([1.0]) == []


@given(st.integers(1, 9), st.integers(0, 99))
def test_micro_batches_add_up_to_the_step(cut, seed):
    w, b, weights = normal(10, seed=seed), normal(10, seed=seed + 1), normal(10, seed=seed + 2).abs()
    y, total = torch.sigmoid(b), weights.sum().item()
    for loss in (
        lambda s, total=None: pairwise_loss(w[s], b[s], 0.2, 0.1, weights[s], total),
        lambda s, total=None: pointwise_loss(w[s], b[s], weights[s], total),
        lambda s, total=None: bce_loss(w[s], y[s], weights[s], total),
    ):
        close((loss(slice(0, cut), total) + loss(slice(cut, None), total)).item(), loss(slice(None)).item())
    mask = (weights > 0.5).double()
    if mask.any():
        parts = [process_loss(w[s], y[s], mask[s], mask.sum().item()) for s in (slice(0, cut), slice(cut, None))]
        close(sum(parts).item(), process_loss(w, y, mask).item())


def test_what_lies_under_the_mask_does_not_count():
    s, y, mask = f64([[0.3, math.nan], [math.inf, 2.0]]), f64([[1, math.nan], [1, 0]]), f64([[1, 0], [0, 1]])
    loss, [grad] = process_loss(s, y, mask).item(), gradients(lambda s: process_loss(s, y, mask), s)
    close(loss, (bce_loss(f64([0.3, 2.0]), f64([1.0, 0.0]))).item())
    assert grad[0][1] == grad[1][0] == 0
    assert process_loss(s, y, 0 * mask).item() == 0
    assert pairwise_loss(f64([]), f64([])).item() == 0


def test_inverse_frequency_gives_both_classes_half():
    labels = f64([1, 1, 1, 1, 1, 0, 1, 0])
    weights = inverse_frequency(labels)
    close([weights[labels == y].sum().item() for y in (0, 1)], [4.0, 4.0])
    assert len(set(weights.tolist())) == 2
    assert inverse_frequency(f64([1, 1, 1])).tolist() == [1, 1, 1]


# --- measures --------------------------------------------------------------------------------------------------------


def test_ties_count_half():
    same = f64([1.0, 2.0])
    assert ranking_accuracy(same, same) == 0.5
    assert pair_metrics(same, same)["ece"] == 0
    assert auc(f64([1, 1, 1, 0]), f64([1, 0, 1, 0])) == (0.5 + 0.5 + 1 + 1) / 4


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12))
def test_auc_is_the_share_of_all_pairs(items):
    right = [s for s, y in items if y]
    wrong = [s for s, y in items if not y]
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    got = auc(f64([s for s, _ in items]), f64([float(y) for _, y in items]))
    close(got, sum(pairs) / len(pairs) if pairs else math.nan)


def test_calibration_by_hand():
    p, y = f64([0.95, 0.85, 0.15, 0.55]), f64([1, 0, 0, 1])
    # bins [.5, .75): .55 hit; [.75, 1]: confidences .95, .85, .85, hits 1, 0, 1
    close(expected_calibration_error(p, y, bins=2), (abs(1 - 0.55) + abs(2 - 2.65)) / 4)
    close(brier(p, y), (0.05**2 + 0.85**2 + 0.15**2 + 0.45**2) / 4)
    close(expected_calibration_error(f64([1.0, 0.0]), f64([1, 0])), 0.0)
    assert math.isnan(expected_calibration_error(f64([]), f64([])))


def test_a_calibrated_judge_has_no_error_and_a_bragging_one_has():
    p = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < p).double()
    assert expected_calibration_error(p, y) < 0.01
    bragging = torch.sigmoid(5 * torch.logit(p))
    assert expected_calibration_error(bragging, y) > 0.1
    assert brier(bragging, y) > brier(p, y)


def test_labels_are_ranked_within_their_prompts():
    scores, labels, groups = f64([2.0, 1.0, 9.0, 8.0, 0.0]), f64([1, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 2])
    got = label_metrics(scores, labels, groups, logits=True)
    assert got["accuracy"] == 0.5  # 2 > 1 in prompt 0, 8 < 9 in prompt 1, nothing to compare in prompt 2
    close(got["auc"], (1 + 0 + 1 + 0 + 0 + 0) / 6)
    close(got["margin"], 10 / 3 - 5)
    close(got["brier"], brier(torch.sigmoid(scores), labels))
    close(label_metrics(f64([3.0, -0.5]), f64([1, 0]), groups[:2], logits=False)["brier"], (0 + 0.25**2) / 2)
    lonely = label_metrics(f64([1.0]), f64([1]), torch.tensor([0]), logits=True)
    assert all(math.isnan(lonely[name]) for name in ("accuracy", "auc", "margin"))


def test_score_stats():
    close(list(score_stats(f64([1, 3]), "x/").values()), [2, 1, 1, 3])
    assert list(score_stats(f64([1, 3]), "x/")) == ["x/mean", "x/std", "x/min", "x/max"]
