"""Preference losses against golden numbers, autograd of the papers' formulas, and TRL."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import full_logits, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from minirl.errors import InputError
from minirl.examples import Line, whole_lists
from minirl.prefer import add_preference_gradient, held_out_metrics, list_logprobs, totals_of
from minirl.preferences import PairCounts, PreferenceLoss, preference_loss, ranked_pairs, rrhf_loss, sequence_logp
from minirl.trees import Row

GOLDEN = {  # case of dpo_family -> options
    "sigmoid": PreferenceLoss(),
    "cdpo": PreferenceLoss(label_smoothing=0.1),
    "robust": PreferenceLoss("robust", label_smoothing=0.1),
    "hinge": PreferenceLoss("hinge"),
    "ipo_sum": PreferenceLoss("ipo"),
    "ipo_avg": PreferenceLoss("ipo", length_power=1.0),
    "sigmoid_len_norm": PreferenceLoss(length_power=1.0),
}
FAMILY = GOLDEN | {"half a power": PreferenceLoss(length_power=0.5)}
ALL = FAMILY | {"rrhf": PreferenceLoss("rrhf"), "rrhf mean": PreferenceLoss("rrhf", ft="token_mean", rank_coef=0.7)}


def near(value, tolerance: float = 1e-9):
    return pytest.approx(value, rel=tolerance, abs=tolerance)


def doubles(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=torch.float64) for x in values]


# --- golden numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_dpo_family_has_its_golden_numbers(name, golden):
    given, wanted = golden["cases"]["dpo_family"]["inputs"], golden["cases"]["dpo_family"]["expected"]
    names = ("{}_logp", "ref_{}_logp", "{}_len")
    logp, ref, lengths = doubles(*(given[n.format("chosen")] + given[n.format("rejected")] for n in names))
    logp.requires_grad_()
    pairs = torch.tensor([(0, 3), (1, 4), (2, 5)])
    loss, metrics = preference_loss(logp, ref, lengths, pairs, GOLDEN[name])
    loss.backward()
    assert loss.item() == metrics["loss"].item() == near(wanted[name]["loss"])
    assert logp.grad.tolist() == near(wanted[name]["d_chosen_logp"] + wanted[name]["d_rejected_logp"])
    for i, pair in enumerate(pairs):
        alone, _ = preference_loss(logp, ref, lengths, pair[None], GOLDEN[name])
        assert alone.item() == near(wanted[name]["per_pair"][i])
    if name == "sigmoid":
        assert metrics["reward/chosen"].item() == near(sum(wanted["rewards_chosen"]) / 3)
        assert metrics["reward/rejected"].item() == near(sum(wanted["rewards_rejected"]) / 3)
        assert metrics["reward/margin"].item() == near(sum(wanted["margins"]) / 3)
        assert metrics["accuracy"].item() == near(wanted["accuracy"])
        assert metrics["logp/chosen"].item() == near(sum(given["chosen_logp"]) / 3)
        assert metrics["logp/rejected"].item() == near(sum(given["rejected_logp"]) / 3)


@pytest.mark.parametrize("ft", ["sum", "token_mean"])
def test_rrhf_has_its_golden_numbers(ft, golden):
    given, wanted = golden["cases"]["rrhf"]["inputs"], golden["cases"]["rrhf"]["expected"]
    logp, lengths = doubles(given["seq_logp"][0], given["lengths"][0])
    pairs = torch.tensor(ranked_pairs(given["rewards"][0]))
    assert len(pairs) == 5  # of 6: two rewards are equal
    logp.requires_grad_()
    loss, metrics = rrhf_loss(logp, lengths, pairs, torch.tensor([1]), PreferenceLoss("rrhf", ft=ft))
    loss.backward()
    assert metrics["loss/rank"].item() == near(wanted["rank_loss"])
    assert metrics["loss/ft"].item() == near(wanted[f"sft_loss_{ft}"])
    assert loss.item() == near(wanted["rank_loss"] + wanted[f"sft_loss_{ft}"])
    slopes = list(wanted["d_seq_logp"][0])
    slopes[1] += 0 if ft == "sum" else 1 - 1 / given["lengths"][0][1]
    assert logp.grad.tolist() == near(slopes)


# --- autograd of the formulas ----------------------------------------------------------------------------------------


def pair_formula(delta, o: PreferenceLoss):
    z, s = o.beta * delta, o.label_smoothing
    clean, flipped = -logsigmoid(z), -logsigmoid(-z)
    return {
        "dpo": (1 - s) * clean + s * flipped,
        "robust": ((1 - s) * clean - s * flipped) / (1 - 2 * s),
        "hinge": torch.relu(1 - z),
        "ipo": (delta - 1 / (2 * o.beta)) ** 2,
        "rrhf": o.rank_coef * torch.relu(-delta),
    }[o.kind]


def formula(logp, ref, lengths, pairs, best, o: PreferenceLoss):
    """The loss as the papers print it, pair by pair, left to autograd."""
    x = (logp - ref) / lengths**o.alpha
    total = sum(pair_formula(x[better] - x[worse], o) for better, worse in pairs)
    if o.has_reference:
        return total / len(pairs)
    weight = lengths[best] if o.ft == "token_mean" else torch.ones_like(lengths[best])
    return (total - (logp[best] / weight).sum()) / len(best)


def ours(logp, ref, lengths, pairs, best, o: PreferenceLoss, totals=None):
    pairs = torch.tensor(pairs).reshape(-1, 2)
    if o.has_reference:
        return preference_loss(logp, ref, lengths, pairs, o, totals)
    return rrhf_loss(logp, lengths, pairs, torch.tensor(best), o, totals)


@pytest.mark.parametrize("name", ALL)
@given(st.integers(0, 1 << 30))
def test_loss_and_derivative_are_those_of_the_formula(name, seed):
    generator, o = torch.Generator().manual_seed(seed), ALL[name]
    logp, mask = -2 * torch.rand(7, 5, generator=generator).double(), torch.rand(7, 5, generator=generator) < 0.8
    mask[:, 2] = True
    ref = torch.zeros(7).double() if not o.has_reference else -4 * torch.rand(7, generator=generator).double()
    scores = torch.randint(4, (7,), generator=generator).tolist()
    pairs = [(i, j) for i, j in ranked_pairs(scores) if (i < 4) == (j < 4)] + [(1, 5)]  # of two prompts, and one more
    best = [max(range(4), key=scores.__getitem__), max(range(4, 7), key=scores.__getitem__)]
    logp.requires_grad_()
    (wanted,) = torch.autograd.grad(
        value := formula((logp * mask).sum(1), ref, mask.sum(1).double(), pairs, best, o), logp
    )
    loss, _ = ours(*[(x := sequence_logp(logp, mask))[0], ref, x[1]], pairs, best, o)
    (got,) = torch.autograd.grad(loss, logp)
    assert loss.item() == near(value.item())
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_at_the_kinks_of_hinge_and_rrhf_nothing_flows():
    lengths = torch.ones(2).double()
    for logp, o in (([10.0, 0.0], PreferenceLoss("hinge")), ([3.0, 3.0], PreferenceLoss("rrhf"))):
        x = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
        loss, metrics = ours(x, torch.zeros(2).double(), lengths, [(0, 1)], [0], o)
        loss.backward()
        assert metrics.get("loss/rank", loss).item() == 0
        assert x.grad.tolist() == ([0, 0] if o.has_reference else [-1, 0])


# --- properties ------------------------------------------------------------------------------------------------------


def test_a_policy_that_is_its_reference_loses_log_2():
    logp = torch.tensor([-3.0, -9.0, -1.0, -1.5], requires_grad=True)
    for o in (PreferenceLoss(), PreferenceLoss(label_smoothing=0.2), PreferenceLoss("robust", label_smoothing=0.2)):
        loss, metrics = preference_loss(logp, logp.detach(), torch.ones(4), torch.tensor([(0, 1), (2, 3)]), o)
        assert loss.item() == near(math.log(2))
        assert metrics["accuracy"] == 0.5 and metrics["reward/margin"] == 0
    (slope,) = torch.autograd.grad(loss, logp)
    wanted = -0.1 * 0.5 / (1 - 2 * 0.2) / 2
    assert slope.tolist() == near([wanted, -wanted, wanted, -wanted], 1e-6)


def test_log_probs_far_apart_overflow_nowhere():
    for gap in (1e4, -1e4):
        for o in FAMILY.values():
            logp = torch.tensor([gap, 0.0], dtype=torch.float64, requires_grad=True)
            loss, _ = preference_loss(logp, torch.zeros(2), torch.ones(2), torch.tensor([(0, 1)]), o)
            loss.backward()
            assert loss.isfinite() and logp.grad.isfinite().all()


def test_robust_dpo_is_dpo_on_average_when_labels_are_flipped():
    """E over labels that are wrong with probability s of the robust loss = the loss on the true labels."""
    s, lengths, ref = 0.3, torch.ones(2), torch.tensor([-2.0, -2.5])
    logp = torch.tensor([-1.0, -3.0])
    true, flipped = torch.tensor([(0, 1)]), torch.tensor([(1, 0)])
    robust = PreferenceLoss("robust", label_smoothing=s)
    mean = sum(p * preference_loss(logp, ref, lengths, pair, robust)[0] for p, pair in ((1 - s, true), (s, flipped)))
    assert mean.item() == near(preference_loss(logp, ref, lengths, true, PreferenceLoss())[0].item(), 1e-7)


def test_what_is_under_the_mask_reaches_nothing():
    logp = torch.tensor([[-1.0, math.nan], [-2.0, -math.inf]], requires_grad=True)
    sums, lengths = sequence_logp(logp, torch.tensor([[1, 0], [1, 0]]))
    loss, _ = preference_loss(sums, torch.zeros(2), lengths, torch.tensor([(0, 1)]), PreferenceLoss())
    loss.backward()
    assert sums.tolist() == [-1, -2] and lengths.tolist() == [1, 1]
    assert logp.grad[:, 1].tolist() == [0, 0] and logp.grad[:, 0].isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "ipo_avg", "rrhf", "rrhf mean"])
def test_a_pair_with_an_empty_response_does_not_count(name):
    o = ALL[name]
    logp, ref, lengths = doubles([-1.0, -2.0, 0.0, -4.0], [-1.5, -1.5, 0.0, -3.0], [2.0, 3.0, 0.0, 4.0])
    with_empty = ours(logp, ref, lengths, [(0, 1), (0, 2), (2, 3)], [0, 2], o)
    without = ours(logp, ref, lengths, [(0, 1)], [0], o)
    assert with_empty[0].item() == without[0].item()
    assert with_empty[1] == without[1]
    nothing, metrics = ours(logp.requires_grad_(), ref, lengths, [(2, 3)], [2], o)
    nothing.backward()
    assert nothing.item() == 0 and not logp.grad.any() and metrics["accuracy"] == 0


def test_ties_and_nan_rank_nothing():
    assert ranked_pairs([0.4, 0.9, 0.4, math.nan]) == [(1, 0), (1, 2)]
    assert ranked_pairs([1, 1]) == ranked_pairs([5]) == ranked_pairs([]) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "dop"}, ["kind", "'dop'", "rrhf"]),
        ({"ft": "mean"}, ["ft", "'mean'", "token_mean"]),
        ({"beta": 0.0}, ["beta", "0.0"]),
        ({"beta": math.nan}, ["beta", "nan"]),
        ({"label_smoothing": 0.5}, ["label_smoothing", "0.5"]),
        ({"label_smoothing": -0.1}, ["label_smoothing", "-0.1"]),
        ({"label_smoothing": 0.1, "kind": "ipo"}, ["label_smoothing", "dpo or robust"]),
        ({"length_power": -1.0}, ["length_power", "-1.0"]),
        ({"rank_coef": math.inf}, ["rank_coef", "inf"]),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(InputError) as error:
        PreferenceLoss(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_loss_of_the_other_family_is_named():
    x = torch.zeros(2)
    with pytest.raises(InputError, match="call rrhf_loss"):
        preference_loss(x, x, x, torch.tensor([(0, 1)]), PreferenceLoss("rrhf"))
    with pytest.raises(InputError, match="call preference_loss"):
        rrhf_loss(x, x, torch.tensor([(0, 1)]), torch.tensor([0]), PreferenceLoss())


# --- micro-batches of a model ----------------------------------------------------------------------------------------

SHAPES = [(5, [4, 7]), (9, [1, 2, 3]), (3, [6, 6, 6, 2]), (12, [3, 5]), (4, [8, 1])]  # prompt, responses


def ranked_data(seed: int = 0) -> list[Line]:
    lists = []
    for i, (prompt, responses) in enumerate(SHAPES):
        ids = random_ids(prompt, seed=seed + i)
        rows = [Row(ids, random_ids(n, seed=100 + 10 * i + j + seed), i) for j, n in enumerate(responses)]
        scores = [(3 * j) % 4 for j in range(len(rows))]
        lists.append(Line(rows, ranked_pairs(scores), best=scores.index(max(scores))))
    return lists


def referred(lists: list[Line], seed: int = 3) -> list[Line]:
    for item, sums in zip(lists, list_logprobs(tiny_model(seed).double(), lists, 100, lambda *_: None), strict=True):
        item.ref_logp = sums
    return lists


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def distance(got: dict, wanted: dict) -> float:
    return max(((got[n] - wanted[n]).norm() / (1e-9 + wanted[n].norm())).item() for n in wanted)


@pytest.mark.parametrize("name", ALL)
def test_every_budget_gives_the_gradient_and_the_metrics_of_all_lists_at_once(name):
    model, lists = tiny_model().double(), referred(ranked_data())
    whole = add_preference_gradient(model, lists, ALL[name], 10_000)
    wanted = gradients(model)
    assert all(g.any() for g in wanted.values())
    for budget in (1, 20, 45):
        assert len(whole_lists(lists, budget)) > 1
        assert add_preference_gradient(model, lists, ALL[name], budget) == near(whole, 1e-9)
        assert distance(gradients(model), wanted) < 1e-10


def test_lists_are_never_parted_and_a_budget_is_kept_where_it_can_be():
    lists = ranked_data()
    for budget in (1, 20, 45, 10_000):
        batches = whole_lists(lists, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lists)))
        assert all(len(batch) == 1 or sum(lists[i].tokens for i in batch) <= budget for batch in batches)
    assert lists[2].tokens == 3 + 20


def test_a_line_that_comes_twice_in_a_step_counts_twice():
    model, lists = tiny_model().double(), referred(ranked_data())[:2]
    once = add_preference_gradient(model, lists, PreferenceLoss(), 10_000)
    wanted = gradients(model)
    assert add_preference_gradient(model, lists + lists, PreferenceLoss(), 10_000) == near(once, 1e-9)
    assert distance(gradients(model), wanted) < 1e-10


def test_the_gradient_of_a_pair_of_equal_responses_cancels():
    model, prompt, response = tiny_model().double(), random_ids(4), random_ids(6, seed=1)
    pair = Line([Row(prompt, response), Row(prompt, response)], [(0, 1)], ref_logp=torch.tensor([-3.0, -4.0]))
    add_preference_gradient(model, [pair], PreferenceLoss(), 100)
    cancelled = gradients(model)
    pair.rows[1] = Row(prompt, random_ids(6, seed=2), 0)
    add_preference_gradient(model, [pair], PreferenceLoss(), 100)
    for name, g in gradients(model).items():
        assert cancelled[name].norm() < 1e-12 < 1e-4 < g.norm(), name


@torch.no_grad()
def plain_logp(model, row: Row) -> float:
    logp = full_logits(model, [*row.prompt, *row.response]).log_softmax(-1)[len(row.prompt) - 1 : -1]
    return logp.gather(1, torch.tensor(row.response)[:, None]).sum().item()


def test_the_table_holds_the_sums_of_every_response():
    model, lists = tiny_model().double(), ranked_data()
    for budget in (1, 45, 1000):
        calls = []
        sums = list_logprobs(model, lists, budget, lambda done, total, calls=calls: calls.append((done, total)))
        assert calls[-1] == (5, 5)
        for item, got in zip(lists, sums, strict=True):
            assert got.tolist() == near([plain_logp(model, row) for row in item.rows])


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].has_reference])
def test_a_prompt_counts_once_however_many_pairs_it_has(name):
    """The gradient of a step is the mean over prompts of the mean over the pairs of each, as in a reward model."""
    model, lists = tiny_model().double(), referred(ranked_data())
    loss = add_preference_gradient(model, lists, ALL[name], 10_000)["loss"]
    got, wanted, losses = gradients(model), {}, []
    assert len({len(item.pairs) for item in lists}) > 1
    for item in lists:
        losses.append(add_preference_gradient(model, [item], ALL[name], 10_000)["loss"])
        wanted = {k: wanted.get(k, 0) + g / len(lists) for k, g in gradients(model).items()}
    assert loss == near(sum(losses) / len(lists))
    assert distance(got, wanted) < 1e-10
    sums = list_logprobs(model, lists, 100, lambda *_: None)
    assert held_out_metrics(sums, lists, ALL[name])["eval/loss"] == near(loss)
    policy, item = sums[2], lists[2]  # of one list: the plain mean over its pairs
    x = (policy - item.ref_logp) / torch.tensor([len(row.response) for row in item.rows]).double() ** ALL[name].alpha
    alone = [pair_formula(x[i] - x[j], ALL[name]).item() for i, j in item.pairs]
    assert losses[2] == near(sum(alone) / len(alone))


@pytest.mark.parametrize("name", ["sigmoid", "rrhf"])
def test_held_out_metrics_are_those_of_one_large_step(name):
    model, lists = tiny_model().double(), referred(ranked_data())
    sums = list_logprobs(model, lists, 100, lambda *_: None)
    got = held_out_metrics(sums, lists, ALL[name])
    wanted = add_preference_gradient(model, lists, ALL[name], 10_000)
    assert {k: v for k, v in got.items() if k not in ("eval/likelier", "eval/pairs")} == near(
        {f"eval/{k}": v for k, v in wanted.items()}
    )
    right = [float(s[i] > s[j]) for s, item in zip(sums, lists, strict=True) for i, j in item.pairs]
    assert got["eval/likelier"] == near(sum(right) / len(right))
    assert got["eval/pairs"] == len(right) == totals_of(lists).pairs
    assert totals_of(lists) == PairCounts(len(right), 5)


# --- TRL -------------------------------------------------------------------------------------------------------------

TRL = {  # its loss_type -> ours
    "sigmoid": PreferenceLoss(beta=0.3),
    "ipo": PreferenceLoss("ipo", beta=0.3, length_power=1.0),
    "hinge": PreferenceLoss("hinge", beta=0.3),
    "robust": PreferenceLoss("robust", beta=0.3, label_smoothing=0.1),
    "sigmoid_norm": PreferenceLoss(beta=0.3, length_power=1.0),
}


class TheirModel:
    """A model of transformers in the place of the one that TRL patches to give log-probs of the labels."""

    training = True

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, attention_mask, labels, **kwargs):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        labels = labels[:, 1:]
        logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(logp)
        others = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        return SimpleNamespace(log_probs=logp * (labels >= 0), **others)


def trl_loss(trainer_class, model, inputs: dict, loss_type: str, o: PreferenceLoss):
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    off = dict.fromkeys(("aux_loss_enabled", "use_weighting"), False)
    stub = SimpleNamespace(model=model, accelerator=same, precompute_ref_logps=True, ld_alpha=None, **off)
    stub.f_divergence_type, stub.loss_types, stub.loss_weights = "reverse_kl", [loss_type], [1.0]
    stub.beta, stub.label_smoothing = o.beta, o.label_smoothing
    stub._metrics, stub._total_train_tokens, stub._tp_size = {"train": defaultdict(list)}, 0, 1
    return trainer_class._compute_loss(stub, model, inputs, False), stub._metrics["train"]


def trl_inputs(lists: list[Line]) -> dict:
    """Padded rows [prompt | response], all chosen ones above all rejected ones."""
    rows = [item.rows[item.pairs[0][side]] for side in (0, 1) for item in lists]
    width = max(len(row.prompt) + len(row.response) for row in rows)

    def padded(first: int, second: int, row: Row) -> list[int]:
        n, m = len(row.prompt), len(row.response)
        return [first] * n + [second] * m + [0] * (width - n - m)

    ids = [[*row.prompt, *row.response] + [0] * (width - len(row.prompt) - len(row.response)) for row in rows]
    ref = {
        f"ref_{name}_logps": torch.stack([item.ref_logp[item.pairs[0][side]] for item in lists]).float()
        for side, name in enumerate(("chosen", "rejected"))
    }
    masks = {
        "attention_mask": torch.tensor([padded(1, 1, row) for row in rows]),
        "completion_mask": torch.tensor([padded(0, 1, row) for row in rows]),
    }
    return {"input_ids": torch.tensor(ids), **masks, **ref}


@pytest.mark.parametrize("loss_type", TRL)
def test_trl_has_the_same_loss_and_the_same_gradient_on_the_same_weights(loss_type, tmp_path):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    transformers = pytest.importorskip("transformers")
    model, o = tiny_model(heads=4), TRL[loss_type]
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    lists = [replace(item, pairs=item.pairs[:1]) for item in referred(ranked_data())]
    loss, metrics = trl_loss(trainer.DPOTrainer, TheirModel(theirs), trl_inputs(lists), loss_type, o)
    loss.backward()
    found = add_preference_gradient(model, lists, o, 50)
    assert found["loss"] == near(loss.item(), 1e-5)
    assert found["logp/chosen"] == near(metrics["logps/chosen"][0], 1e-5)
    if o.alpha == 0:  # TRL's metrics do not follow the average over lengths
        assert found["reward/margin"] == near(metrics["rewards/margins"][0], 1e-5)
        assert found["accuracy"] == near(metrics["rewards/accuracies"][0], 1e-6)
    assert distance(gradients(model), {name: p.grad for name, p in theirs.named_parameters()}) < 1e-5
