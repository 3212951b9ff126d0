"""The training loops: the gradient is that on paper whatever the micro-batches, and each option does what it says."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EXAMPLES,
    SMALL,
    TASK,
    Quiet,
    Trainer,
    check_close,
    fp32_tolerance,
    full_logits,
    gradients,
    has_seven,
    random_ids,
    records,
    sevens,
    tiny_checkpoint,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st

from minirl import grpo, policy, prompts
from minirl.batch import Batch, add_policy_gradient, endless_epochs, epoch_order
from minirl.errors import InputError
from minirl.examples import demonstration_rows
from minirl.grpo import GRPOConfig
from minirl.kl_weight import KLWeight
from minirl.lab.rewards import load_reward
from minirl.lab.training import policy_line, train_grpo, train_sft
from minirl.losses import PolicyLoss, policy_loss
from minirl.model import Transformer
from minirl.presets import PRESETS, preset_defaults, presets
from minirl.records import read_demonstrations
from minirl.rewards import Fault, RewardError, Rewards
from minirl.rollout import Rollout, completion_text
from minirl.rules import overlong_penalty
from minirl.sampler import Completion, SamplingParams
from minirl.sft import SFTConfig, add_likelihood_gradient
from minirl.task import Task
from minirl.tokenizer import Tokenizer
from minirl.trees import MicroBatch, Row, response_logprobs, response_logprobs_and_entropy, response_mask

AGGREGATIONS = ["seq_mean", "token_mean", "seq_sum_const", "seq_sum", "group_token_mean"]


# --- the shared step -------------------------------------------------------------------------------------------------

GROUPS = [(5, [3, 1, 7, 2]), (1, [4, 4]), (9, [2, 6, 5]), (3, [1, 1, 2])]


def random_batch(dtype: torch.dtype) -> Batch:
    """Rows with and without advantage, one of them masked out, one in parts; a group without any advantage."""
    rows = [
        Row(random_ids(prompt, seed=group), random_ids(n, seed=100 + 10 * group + i), group)
        for group, (prompt, responses) in enumerate(GROUPS)
        for i, n in enumerate(responses)
    ]
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(len(rows), generator=generator, dtype=dtype)
    advantages[[1, 6, *range(9, 12)]] = 0
    mask = response_mask(rows)
    mask[3] = False
    mask[2, 2:4] = False

    def near(scale: float) -> torch.Tensor:
        return -3 + scale * torch.randn(mask.shape, generator=generator, dtype=dtype)

    return Batch(rows, advantages, mask, near(0.5), near(0.5), near(0.5))


def gradient_of_all_rows(model: Transformer, batch: Batch, options: PolicyLoss) -> dict[str, torch.Tensor]:
    """The loss in one call on one forward, without skipping any row."""
    logp, entropy = MicroBatch(batch.rows).logprobs(model, 0.8)
    others = (batch.old_logp, batch.ref_logp, batch.advantages, batch.mask, options)
    groups = torch.tensor([row.group for row in batch.rows])
    loss, _ = policy_loss(logp, *others, entropy=entropy, rollout_logp=batch.rollout_logp, group_ids=groups)
    loss.backward()
    return gradients(model)


LOSSES = {
    "plain": PolicyLoss(),
    "kl": PolicyLoss(kl="k3", kl_coef=0.3),
    "old kl": PolicyLoss(kl_old_coef=0.2),
    "entropy": PolicyLoss(entropy_coef=0.1),
    "sequence ratio": PolicyLoss(ratio_level="seq_mean", eps_low=9.0, eps_high=9.0),
    "weights": PolicyLoss(surrogate="is_pg", w_max=5.0, importance="token_truncate"),
    "gate": PolicyLoss(surrogate="sapo"),
    "quantile": PolicyLoss(entropy_quantile=0.4),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_budget_and_skipping_rows_give_the_gradient_of_all_rows_at_once(name, aggregation):
    options = replace(LOSSES[name], aggregation=aggregation, const_length=8.0)
    model, batch = tiny_model().double(), random_batch(torch.float64)
    wanted = gradient_of_all_rows(model, batch, options)
    for budget in (1, 17, 40, 10_000):
        add_policy_gradient(model, batch, options, budget, temperature=0.8)
        check_close(gradients(model), wanted, 1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_in_fp32_is_as_exact_in_micro_batches_as_at_once(aggregation):
    options = PolicyLoss(kl="k3", kl_coef=0.3, aggregation=aggregation, const_length=8.0)
    model, batch = tiny_model(), random_batch(torch.float32)
    wide = {name: x.double() for name, x in vars(batch).items() if torch.is_tensor(x) and x.is_floating_point()}
    exact = gradient_of_all_rows(tiny_model().double(), replace(batch, **wide), options)
    tolerance = fp32_tolerance(gradient_of_all_rows(model, batch, options), exact)
    assert tolerance < 1e-4
    for budget in (1, 17, 40):
        add_policy_gradient(model, batch, options, budget, temperature=0.8)
        check_close(gradients(model), exact, tolerance)


def test_rows_without_a_gradient_are_not_computed_and_their_absence_is_seen_in_the_names_of_metrics():
    model, batch = tiny_model().double(), random_batch(torch.float64)
    active = (batch.advantages != 0) & batch.mask.any(1)
    skipping = add_policy_gradient(model, batch, PolicyLoss(), 40)
    alone = add_policy_gradient(model, batch.select(active.nonzero().squeeze(1).tolist()), PolicyLoss(), 40)
    assert skipping["trained_tokens"] == int(batch.mask[active].sum()) < int(batch.mask.sum())
    assert skipping["trained/entropy"] == pytest.approx(alone["entropy"], rel=1e-12)
    assert alone["entropy"] == alone["trained/entropy"]
    assert not {"entropy", "kl_old/k3", "kl_ref/k3"} & skipping.keys()  # of all tokens: unknown
    assert skipping["ratio/std"] == pytest.approx(alone["ratio/std"], rel=1e-9)
    everything = add_policy_gradient(model, batch, PolicyLoss(kl="k3", kl_coef=0.1), 40)
    assert everything["trained_tokens"] == int(batch.mask.sum())


@pytest.mark.parametrize("level", ["token", "seq_mean"])
def test_means_over_all_tokens_hold_those_of_rows_without_a_gradient(level):
    model, batch = tiny_model().double(), random_batch(torch.float64)
    o = PolicyLoss(ratio_level=level, eps_low=0.05, eps_high=0.05)
    here, m = response_logprobs(model, batch.rows, 1000), batch.mask.bool()
    lr, trained = here - batch.old_logp, m & (batch.advantages != 0)[:, None]
    k3 = lr.exp() - 1 - lr
    assert k3[trained].mean() != pytest.approx(k3[m].mean().item(), rel=1e-2)
    for budget in (17, 1000):
        found = add_policy_gradient(model, batch, o, budget, measure_all=True)
        assert found["kl_old/k3"] == pytest.approx(k3[m].mean().item(), rel=1e-9)
        assert found["trained/kl_old/k3"] == pytest.approx(k3[trained].mean().item(), rel=1e-9)
        entropy = response_logprobs_and_entropy(model, batch.rows, 1000)[1]
        assert found["entropy"] == pytest.approx(entropy[m].mean().item(), rel=1e-9)
        assert found["clip/frac"] > 0
        share = int(trained.sum()) / int(m.sum())
        assert found["clip/frac"] == pytest.approx(found["trained/clip/frac"] * share, rel=1e-9)
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        without = add_policy_gradient(model, batch, o, budget)
        assert without == pytest.approx({name: found[name] for name in without}, rel=1e-9)
        assert all(torch.equal(p.grad, gradient[name]) for name, p in model.named_parameters())
        model.zero_grad()


def test_metrics_are_the_same_for_every_budget():
    model, batch = tiny_model().double(), random_batch(torch.float64)
    options = PolicyLoss(kl="k3", kl_coef=0.3, entropy_coef=0.1)
    whole = add_policy_gradient(model, batch, options, 10_000)
    for budget in (1, 17, 40):
        assert add_policy_gradient(model, batch, options, budget) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("change", [{"advantages": torch.zeros(12)}, {"mask": torch.zeros(12, 7, dtype=torch.bool)}])
def test_a_step_without_a_signal_has_neither_gradient_nor_metrics(change):
    model, batch = tiny_model(), replace(random_batch(torch.float32), **change)
    assert add_policy_gradient(model, batch, PolicyLoss(), 40) is None
    assert all(p.grad is None for p in model.parameters())


# --- supervised fine-tuning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_an_sft_step_is_plain_cross_entropy_on_the_completions(budget):
    model = tiny_model().double()
    rows = [
        Row(random_ids(p, seed=i), random_ids(n, seed=50 + i), i) for i, (p, n) in enumerate([(4, 6), (9, 1), (1, 3)])
    ]
    for row in rows:
        logits = full_logits(model, [*row.prompt, *row.response])[len(row.prompt) - 1 : -1]
        (F.cross_entropy(logits, torch.tensor(row.response), reduction="sum") / 10).backward()
    wanted = gradients(model)
    _, metrics = add_likelihood_gradient(model, rows, budget)
    check_close(gradients(model), wanted, 1e-12)
    losses = [-MicroBatch([row]).logprobs(model)[0].sum().item() for row in rows]
    assert metrics["loss"] == pytest.approx(sum(losses) / 10, rel=1e-9)
    assert metrics["tokens"] == 10


def test_demonstrations_end_with_the_stop_token_unless_they_are_cut(checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    examples = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "1+2=", "completion": "3333"}]
    short, cut = demonstration_rows(tokenizer, examples, 7)
    assert short.prompt == cut.prompt == tokenizer.encode("1+2=")
    assert short.response == [*tokenizer.encode("3"), tokenizer.eos_id]
    assert cut.response == tokenizer.encode("333")


def test_demonstrations_hold_any_line_end_within_a_text(tmp_path):
    text = "a\u2028b\u0085c\x1cd"
    record = json.dumps({"prompt": text, "completion": text}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{record}\r\n\r\n{record}".encode())
    found = read_demonstrations(tmp_path / "data.jsonl")
    assert [(line["prompt"], line["completion"]) for line in found] == [(text, text)] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fine_tuning_learns_its_demonstrations(dtype, checkpoint, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}+1=", "completion": "{i + 1}"}}\n' for i in range(4)))
    out, display = tmp_path / "run", Quiet()
    config = SFTConfig(str(checkpoint), str(data), out=str(out), steps=40, batch=6, lr=1e-2, dtype=dtype, save_every=30)
    model = train_sft(config, display)
    losses = [record["loss"] for record in records(out)]
    assert len(losses) == 40
    assert losses[0] > 2
    assert np.mean(losses[-5:]) < 0.3
    tokenizer, trained = Tokenizer.from_pretrained(model), Transformer.from_pretrained(model)
    assert full_logits(trained, tokenizer.encode("3+1="))[-1].argmax() == tokenizer.encode("4")[0]
    assert full_logits(trained, tokenizer.encode("3+1=4"))[-1].argmax() == tokenizer.eos_id
    rendering = [("examples", done, 4) for done in (0, 4)]
    assert display.bars == [*rendering, *(("sft", done, 40) for done in range(41))]
    assert sorted(folder.name for folder in (out / "checkpoints").iterdir()) == ["step-000030", "step-000040"]
    assert {"entropy", "grad_norm", "lr", "tokens_per_s/train", "memory/peak_gb", "time/step"} <= records(out)[0].keys()


# --- the order of the examples ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_holds_every_example_once(count, seed, epoch):
    assert sorted(epoch_order(count, seed, epoch)) == list(range(count))


@given(st.integers(1, 30), st.integers(0, 9), st.integers(1, 40))
def test_taking_goes_through_whole_epochs_whatever_is_taken_at_a_time(count, seed, number):
    steps = 4 * count // number + 1
    taken = [i for step in range(steps) for i in endless_epochs(count, seed, step * number, number)]
    assert len(taken) == steps * number
    for epoch in range(len(taken) // count):
        assert taken[epoch * count : (epoch + 1) * count] == epoch_order(count, seed, epoch).tolist()


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


# --- GRPO ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(checkpoint, tmp_path):
    """The stages of a run on the task of sevens."""

    def made(task=TASK, **changes) -> Trainer:
        config = GRPOConfig(**{"model": str(checkpoint), "out": str(tmp_path / "run"), **SMALL, **changes})
        return Trainer(grpo, config, task)

    return made


def log_likelihoods(model: Transformer, batch: Batch) -> list[torch.Tensor]:
    """Σ_t log π of each row, from a forward over the row alone."""
    out = []
    for row in batch.rows:
        logits = full_logits(model, [*row.prompt, *row.response])[len(row.prompt) - 1 : -1]
        out.append(-F.cross_entropy(logits, torch.tensor(row.response), reduction="sum"))
    return out


def gradient_of(trainer: Trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return trainer.collected()


@pytest.mark.parametrize(
    "loss", [PolicyLoss(aggregation="seq_mean"), PolicyLoss(surrogate="is_pg", aggregation="seq_mean")]
)
def test_the_first_update_is_the_reinforce_gradient(loss, make):
    """−1/N Σ_i A_i/L_i Σ_t ∇log π, with A_i = (R_i − μ)/(σ + ε) of the row's group."""
    trainer = make(loss=loss)
    rollout = trainer.collect(0)
    batch = trainer.batch(rollout)
    rewards = rollout.rewards.view(4, 6)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert rewards.std(1).count_nonzero() >= 2
    rows = zip(advantages.flatten().tolist(), log_likelihoods(trainer.model, batch), batch.rows, strict=True)
    wanted = gradient_of(trainer, -sum(A * logp / len(row.response) for A, logp, row in rows) / 24)
    check_close(trainer.gradient(batch), wanted, 1e-5)


def test_rows_that_pad_the_vocabulary_have_no_part_in_a_step(make, tmp_path):
    """A model of 40 ids and a tokenizer of 19: truth is softmax over the first 19 logits, for the reference too."""
    padded = tiny_checkpoint(tmp_path / "padded", seed=5, vocab_size=40)
    trainer = make(model=str(padded), loss=PolicyLoss(aggregation="seq_mean", kl="k3", kl_coef=0.1))
    size = trainer.tokenizer.vocab_size
    assert trainer.model.active_vocab == size == 19
    rollout = trainer.collect(0)
    assert max(t for completion in rollout.completions for t in completion.tokens) < size
    batch, logps = trainer.batch(rollout), []
    for row, ref in zip(batch.rows, batch.ref_logp, strict=True):
        logits = full_logits(trainer.model, [*row.prompt, *row.response])[len(row.prompt) - 1 : -1, :size]
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(row.response)[:, None]).squeeze(1))
        torch.testing.assert_close(ref[: len(row.response)], logps[-1].detach(), rtol=0, atol=1e-5)
    # KL has no slope where policy and reference are the same.
    rows = zip(batch.advantages.tolist(), logps, strict=True)
    wanted = gradient_of(trainer, -sum(A * logp.mean() for A, logp in rows) / len(logps))
    got = trainer.gradient(batch)
    check_close(got, wanted, 1e-5)
    assert not got["lm_head.weight"][size:].any() and got["lm_head.weight"][:size].any(1).all()


def test_a_group_without_variance_gives_no_gradient(make):
    trainer = make()
    rollout = trainer.collect(0)
    rollout.rewards = torch.tensor([1.0] * 6 + [0.0] * 6 + [1.0, 0.0] * 3 + [0.3] * 6, dtype=torch.float64)
    batch = trainer.batch(rollout)
    assert batch.advantages.nonzero().flatten().tolist() == list(range(12, 18))
    rows = zip(batch.advantages.tolist(), log_likelihoods(trainer.model, batch), batch.rows, strict=True)
    wanted = gradient_of(trainer, -sum(A * logp / len(row.response) for A, logp, row in rows if A) / 24)
    check_close(trainer.gradient(batch), wanted, 1e-5)


def test_a_step_in_which_all_agree_changes_nothing_and_says_so(make):
    trainer = make(task=replace(TASK, rewards={"seven": (0.0, has_seven)}))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step(0)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.optimizer.updates == 0
    assert metrics["skip_step"] == 1
    assert metrics["group/signal_frac"] == 0
    line = policy_line(1, 2, metrics | {"memory/peak_gb": 1.0})
    assert f"kl –  entropy {metrics['entropy']:.3f}  signal 0.00  clip –  mismatch –  len " in line
    assert "+– tok/s" in line
    assert "nan" not in line


@pytest.mark.parametrize("loss", [PolicyLoss(aggregation="seq_mean"), PolicyLoss(kl="k3", kl_coef=0.1)])
def test_a_completion_that_cannot_be_scored_is_in_no_mean(loss, make):
    trainer = make(prompts=1, group=4, loss=loss)
    rollout = trainer.collect(0)
    rollout.rewards = torch.tensor([1.0, math.nan, 0.0, 0.5], dtype=torch.float64)
    batch = trainer.batch(rollout)
    assert batch.advantages[1] == 0
    assert batch.advantages[[0, 2, 3]].tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0], abs=1e-6)
    assert batch.mask.any(1).tolist() == [True, False, True, True]  # nor in a denominator, nor in the KL
    got, alone = trainer.gradient(batch), trainer.gradient(batch.select([0, 2, 3]))
    assert all(torch.allclose(got[p], alone[p], rtol=1e-4, atol=1e-7) for p in alone)


# Completions by hand: a text, and whether it was cut off.
WRITTEN = [("7", False), ("12", False), ("777777", True), ("123456", True), ("1", False), ("7777", False)]


def written(monkeypatch, trainer: Trainer) -> Rollout:
    """The rollout of a step whose completions are WRITTEN."""

    def sample(sampler, tokenizer, examples, params, progress=None, indices=()) -> Rollout:
        completions = []
        for text, cut in WRITTEN * len(examples):
            tokens = tokenizer.encode(text) + ([] if cut else [tokenizer.eos_id])
            completions.append(Completion(tokens, [-1.0] * len(tokens), "length" if cut else "stop"))
        prompts = [tokenizer.encode(example["prompt"]) for example in examples]
        texts = [text for text, _ in WRITTEN] * len(examples)
        return Rollout(list(examples), prompts, completions, texts, indices=list(indices))

    monkeypatch.setattr(prompts, "sample", sample)
    return trainer.collect(0)


LENGTHS = [2, 3, 6, 6, 2, 5]


def test_a_stop_text_is_trained_on_and_rewards_do_not_see_it(make):
    trainer = make(stop=("7", "1"), max_tokens=20)
    rollout = trainer.collect(0)
    batch = trainer.batch(rollout)
    whole = [trainer.tokenizer.decode(c.tokens) for c in rollout.completions]
    for stop in ("7", "1"):
        assert any(text.endswith(stop) for text in whole)
        assert not any(stop in text for text in rollout.texts)
    assert all(
        seen == text.removesuffix("1").removesuffix("7") for text, seen in zip(whole, rollout.texts, strict=True)
    )
    assert rollout.rewards.tolist() == [0] * 24
    assert batch.mask.sum(1).tolist() == rollout.lengths
    assert [row.response for row in batch.rows] == [c.tokens for c in rollout.completions]


@pytest.mark.parametrize(
    ("text", "seen"), [("ab", "ab"), ("a;b", "a"), (";", ""), ("a.;b", "a"), ("a;.", "a"), ("a\n\nb.", "a"), ("", "")]
)
def test_a_text_ends_before_the_first_stop_text(text, seen):
    """Also where a token holds more than the stop text."""
    tokenizer = Tokenizer.from_chars("ab;.\n")
    completion = Completion([*tokenizer.encode(text), tokenizer.eos_id])
    params = SamplingParams(stop=(".", "\n\n", ";"), stop_ids=tokenizer.stop_ids)
    assert completion_text(tokenizer, completion, params) == seen


def test_the_guarded_reward_takes_the_place_of_the_tasks_and_logs_its_parts(make, monkeypatch):
    trainer = make(prompts=1, rewards=("guarded",), task=replace(TASK, rewards={"sevens": (2.0, has_seven)}))
    rollout = written(monkeypatch, trainer)
    parts = rollout.parts
    assert list(parts) == ["correct", "format", "repetitive", "too_short"]
    assert parts["correct"] == [1, 0, 1, 0, 0, 1] and parts["too_short"] == [0] * 6
    weighted = zip(parts["correct"], parts["format"], parts["repetitive"], strict=True)
    assert rollout.rewards.tolist() == pytest.approx([0.7 * c + 0.2 * f - 0.5 * r for c, f, r in weighted])
    assert rollout.metrics()["reward/repetitive"] == sum(parts["repetitive"]) / 6


def test_the_guarded_reward_is_weighted_and_its_parts_can_be(make):
    trainer = make(rewards=("repetition=1", "guarded=2", "correct=0.9", "too_short=-1"))
    weights = {name: weight for name, (weight, _) in trainer.rewards.functions.items()}
    assert weights == {"correct": 0.9, "format": 0.4, "repetitive": -1.0, "too_short": -1.0, "repetition": 1.0}


def test_a_cut_completion_keeps_its_reward(make, monkeypatch):
    trainer = make(prompts=1, truncation="keep")
    rollout = written(monkeypatch, trainer)
    assert rollout.rewards.tolist() == [1, 0, 1, 0, 0, 1]
    assert trainer.batch(rollout).mask.sum(1).tolist() == LENGTHS


def test_a_cut_completion_leaves_the_loss(make, monkeypatch):
    trainer = make(prompts=1, truncation="mask")
    rollout = written(monkeypatch, trainer)
    batch = trainer.batch(rollout)
    assert rollout.rewards.tolist() == [1, 0, 1, 0, 0, 1]
    assert batch.mask.sum(1).tolist() == [2, 3, 0, 0, 2, 5]
    rows = zip(batch.advantages.tolist(), log_likelihoods(trainer.model, batch), batch.rows, strict=True)
    kept = [A * logp / len(row.response) for i, (A, logp, row) in enumerate(rows) if i not in (2, 3)]
    check_close(trainer.gradient(batch), gradient_of(trainer, -sum(kept) / 4), 1e-5)


def test_a_cut_completion_pays_its_penalty(make, monkeypatch):
    trainer = make(prompts=1, truncation="penalty", truncation_penalty=0.25)
    rollout = written(monkeypatch, trainer)
    assert rollout.rewards.tolist() == [1, 0, 0.75, -0.25, 0, 1]
    assert trainer.batch(rollout).mask.sum(1).tolist() == LENGTHS


def test_by_default_what_is_right_and_cut_stays_above_what_is_wrong(make, monkeypatch):
    rollout = written(monkeypatch, make(prompts=1, truncation="penalty"))
    assert rollout.rewards[2] > rollout.rewards[1] > rollout.rewards[3]  # right and cut, wrong, wrong and cut


def test_the_soft_punishment_of_long_completions_is_added_to_the_reward(make, monkeypatch):
    """As a share of what being right pays, here the weight 2, not of what else is paid."""
    task = replace(TASK, rewards={"seven": (2.0, has_seven), "sevens": (3.0, lambda **columns: [0.0] * 6)})
    for share in (0.5, 1.0):
        rollout = written(monkeypatch, make(task=task, prompts=1, overlong_cache=3, overlong_penalty=share))
        most = 2 * share
        assert rollout.rewards.tolist() == pytest.approx([2, 0, 2 - most, 0 - most, 0, 2 - most * 2 / 3])
    assert overlong_penalty(LENGTHS, 6, 3).tolist() == pytest.approx([0, 0, -1, -1, 0, -2 / 3])
    unknown = make(task=replace(TASK, rewards={"sevens": (3.0, sevens)}), overlong_cache=3)
    assert unknown.rewards.pay == 1  # a rule that only is logged tells no range


def test_what_is_right_and_too_long_ranks_above_what_is_wrong_as_where_rewards_are_plus_and_minus_one(make):
    """DAPO's punishment is 1 where rewards are ±1, so half of that where they are 0 and 1."""
    trainer = make(prompts=1, group=4, **preset_defaults("dapo", 6, 1) | {"dynamic_sampling": False})
    tokens = {"1": 2, "7": 2, "2": 3, "777777": 6}  # with the stop token
    right = [1.0, 0.0, 0.0, 1.0]
    rollout = Rollout(EXAMPLES[:1], [[1]], [Completion([5] * n, [-1.0] * n) for n in tokens.values()], list(tokens))
    trainer.config = replace(trainer.config, overlong_cache=3)
    trainer.source.draw = lambda number, step: rollout
    rollout.rewards, rollout.parts = torch.tensor(right, dtype=torch.float64), {"seven": right}
    paper = [2 * R - 1 for R in right]
    paper[3] -= 1
    mean, std = np.mean(paper), np.std(paper, ddof=1)
    found = trainer.batch(trainer.draw(0)).advantages.tolist()
    assert found == pytest.approx([(R - mean) / (std + 1e-4) for R in paper], abs=1e-3)
    assert found[1:] == pytest.approx([-0.783, -0.783, 0.261], abs=1e-3)


def test_the_kl_to_the_reference_is_taken_from_the_reward_of_the_completion(make, monkeypatch):
    """R − β·Σ_t (ℓ_t − ℓr_t), before the group is compared."""
    trainer = make(prompts=2, kl_in_reward=0.5)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.1)
    batch = trainer.batch(rollout := written(monkeypatch, trainer))
    kl = [
        (policy - reference).item()
        for policy, reference in zip(
            log_likelihoods(trainer.model, batch), log_likelihoods(trainer.reference, batch), strict=True
        )
    ]
    assert max(map(abs, kl)) > 0.1
    rewards = (rollout.rewards - 0.5 * torch.tensor(kl, dtype=torch.float64)).view(2, 6)
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert batch.advantages.tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-4)


def test_online_rft_is_the_mean_log_likelihood_of_what_is_right(make, monkeypatch):
    """Rows without a reward leave the denominator too."""
    trainer = make(prompts=1, **preset_defaults("online_rft", 6))
    batch = trainer.batch(written(monkeypatch, trainer))
    assert batch.mask.sum(1).tolist() == [2, 0, 6, 0, 0, 5]
    right = [logp for i, logp in enumerate(log_likelihoods(trainer.model, batch)) if i in (0, 2, 5)]
    check_close(trainer.gradient(batch), gradient_of(trainer, -sum(right) / 13), 1e-5)


def test_online_rft_asks_the_rule_and_not_the_sum_of_the_rewards(make, monkeypatch):
    """Neither a wrong completion that is paid for something else nor one that is half right is learned."""
    polite = replace(TASK, rewards={"seven": (1.0, has_seven), "polite": (1.0, lambda **columns: [1.0] * 6)})
    half = lambda prompts, completions, **columns: [0.6 * x for x in has_seven(prompts, completions)]  # noqa: E731
    partly = replace(TASK, rewards={"half": (1.0, half)}, correct=half)
    for task, kept in ((polite, [2, 0, 6, 0, 0, 5]), (partly, [0] * 6)):
        trainer = make(task=task, prompts=1, **preset_defaults("online_rft", 6))
        batch = trainer.batch(written(monkeypatch, trainer))
        assert batch.mask.sum(1).tolist() == kept


@pytest.mark.parametrize(
    "other",
    [{"kl_in_reward": 0.1}, {"overlong_cache": 3}, {"truncation": "penalty"}],
    ids=lambda other: next(iter(other)),
)
def test_what_changes_the_reward_is_refused_where_the_verdict_alone_counts(other):
    with pytest.raises(InputError, match=r"changes the reward of a completion, correct_only takes the verdict alone"):
        GRPOConfig("model", **preset_defaults("online_rft") | other)


def test_zero_advantage_stays_in_the_denominator_otherwise(make, monkeypatch):
    trainer = make(prompts=1, **preset_defaults("online_rft", 6) | {"drop_zero_advantage": False})
    batch = trainer.batch(written(monkeypatch, trainer))
    right = [logp for i, logp in enumerate(log_likelihoods(trainer.model, batch)) if i in (0, 2, 5)]
    check_close(trainer.gradient(batch), gradient_of(trainer, -sum(right) / 24), 1e-5)


@pytest.mark.parametrize(("epochs", "mini_batches"), [(1, 1), (1, 3), (2, 2), (3, 4)])
def test_each_epoch_takes_every_group_whole_and_once(epochs, mini_batches, make, monkeypatch):
    trainer, batches = make(epochs=epochs, mini_batches=mini_batches, loss=PolicyLoss(kl="k3", kl_coef=0.1)), []

    def watch(model, batch, *args):
        batches.append(batch)
        return add_policy_gradient(model, batch, *args)

    monkeypatch.setattr(policy, "add_policy_gradient", watch)
    metrics = trainer.step(0)
    assert len(batches) == trainer.optimizer.updates == epochs * mini_batches
    assert metrics["skip_step"] == 0
    for epoch in range(epochs):
        part = batches[epoch * mini_batches : (epoch + 1) * mini_batches]
        assert Counter(row.group for batch in part for row in batch.rows) == dict.fromkeys(range(4), 6)
        assert all(set(Counter(row.group for row in batch.rows).values()) == {6} for batch in part)
    if epochs > 1:
        first = [[row.group for batch in batches[:mini_batches] for row in batch.rows]]
        second = [[row.group for batch in batches[mini_batches : 2 * mini_batches] for row in batch.rows]]
        assert first != second
    several = epochs * mini_batches > 1
    assert all((batch.old_logp is not None) == several for batch in batches)
    assert (metrics["ratio/std"] > 1e-3) == several


def test_the_old_policy_is_the_one_before_the_first_update(make):
    trainer = make(epochs=2)
    batch = trainer.batch(trainer.collect(0))
    logp, _ = MicroBatch(batch.rows).logprobs(trainer.model)
    assert torch.allclose(batch.old_logp, logp, atol=1e-5)
    assert torch.allclose(batch.old_logp, batch.rollout_logp, atol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 3}, {"min_p": 0.2}])
def test_sampler_and_trainer_agree(sampling, make):
    metrics = make(loss=PolicyLoss(kl="k3", kl_coef=0.1), **sampling).step(0)
    assert metrics["mismatch/abs_max"] < 1e-5
    assert metrics["mismatch/outside"] == 0


def test_a_sampler_that_disagrees_is_seen(make, monkeypatch):
    trainer, collect = make(), grpo.collect

    def and_move(*args):
        rollout = collect(*args)
        with torch.no_grad():
            trainer.model.head_weight.mul_(1.5)
        return rollout

    monkeypatch.setattr(grpo, "collect", and_move)
    metrics = trainer.step(0)
    assert metrics["mismatch/abs_mean"] > 0.05
    assert metrics["mismatch/outside"] > 0.1


def test_the_reference_stays_where_it_was(make, checkpoint):
    trainer = make(loss=PolicyLoss(kl="k3", kl_coef=0.1))
    first, second = trainer.step(0), trainer.step(1)
    assert abs(first["kl_ref/k3"]) < 1e-6 < second["kl_ref/k3"]
    start = Transformer.from_pretrained(checkpoint)
    assert all(torch.equal(p, dict(start.named_parameters())[name]) for name, p in trainer.reference.named_parameters())


@pytest.mark.parametrize("preset", presets(critic=False))
def test_every_preset_takes_a_step(preset, make):
    row = preset_defaults(preset, 6, 4)
    trainer = make(task=replace(TASK, rewards={"sevens": (2.0, sevens)}), **row)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step(0)
    assert trainer.optimizer.updates == row.get("epochs", 1) * row.get("mini_batches", 1)
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []
    assert metrics["grad_norm"] > 0


def test_presets_with_a_critic_are_those_of_another_command():
    assert set(PRESETS) - set(presets(critic=False)) == {"ppo", "ppo_penalty"}
    with pytest.raises(InputError, match="'ppo' needs a critic, which minirl ppo trains: choose from reinforce, "):
        preset_defaults("ppo", critic=False)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(GRPOConfig, {"schedule": "lol"}), (GRPOConfig, {"advantage": "best"}), (SFTConfig, {"dtype": "float16"})],
)
def test_python_is_told_the_choices_as_the_command_line_is(kind, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=rf"^{name} = '{value}' is unknown: choose from \w+, "):
        kind("model", "data", **wrong)


def test_one_completion_a_prompt_is_enough_where_none_are_compared():
    assert GRPOConfig("model", group=1, **preset_defaults("online_rft")).group == 1


def test_a_preset_is_its_row_of_the_table():
    defaults = preset_defaults("dr_grpo", 512)
    assert defaults["advantage"] == "grpo_mean"
    assert defaults["loss"] == PolicyLoss(aggregation="seq_sum_const", const_length=512.0)
    assert preset_defaults("gspo")["mini_batches"] == 4 and preset_defaults("gspo", prompts=3)["mini_batches"] == 3
    assert preset_defaults("rloo")["kl_in_reward"] == 0.05
    assert [name for name in presets(critic=False) if "drop_zero_advantage" in preset_defaults(name)] == ["online_rft"]


# --- rewards of tokens and of steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "batch_mean", "group_mean"])
def test_reinforce_is_the_return_to_go_less_a_baseline(baseline, make, monkeypatch):
    """A_t = score − β·Σ_{k≥t} (ℓ_k − ℓr_k) − b, with b a mean over the batch's tokens, or over the group's returns."""
    trainer = make(prompts=2, **preset_defaults("reinforce", 6) | {"kl_in_reward": 0.5}, baseline=baseline)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.1)
    batch = trainer.batch(rollout := written(monkeypatch, trainer))
    d = batch.old_logp - batch.ref_logp
    R = [
        [rollout.rewards[i].item() - 0.5 * d[i, t:n].sum().item() for t in range(n)] for i, n in enumerate(LENGTHS * 2)
    ]
    means = []
    for i, row in enumerate(R):
        returns = [[other[0]] for other in (R[:6] if i < 6 else R[6:])]
        over = {"none": [[0.0]], "batch_mean": R, "group_mean": returns}[baseline]
        wanted = np.array(row) - np.mean([x for other in over for x in other])
        assert batch.advantages[i, : len(row)].tolist() == pytest.approx(wanted, abs=1e-4)
        assert not batch.advantages[i, len(row) :].any()
        means.append(wanted.mean())
    step = trainer.begin(0)
    step.add(**rollout.metrics(), **{"time/rollout": 1.0, "time/train": 1.0})
    policy.log_rollout(step, rollout, batch, trainer.config)
    logged = [record["advantage"] for record in step.records["completions.jsonl"]]
    assert logged == pytest.approx([means[0], means[6]], abs=1e-4)  # the first completion of each prompt


def test_the_gradient_of_reinforce_is_the_textbook_one(make, monkeypatch):
    """−1/N Σ_i Σ_t A_t ∇log π: without a KL every token of a row has the row's score."""
    trainer = make(prompts=1, **preset_defaults("reinforce", 6) | {"kl_in_reward": 0.0}, baseline="none")
    batch = trainer.batch(rollout := written(monkeypatch, trainer))
    rows = zip(rollout.rewards.tolist(), log_likelihoods(trainer.model, batch), strict=True)
    check_close(trainer.gradient(batch), gradient_of(trainer, -sum(R * logp for R, logp in rows) / 6), 1e-5)


def test_reinforce_pp_whitens_over_the_tokens_of_the_batch(make):
    trainer = make(**preset_defaults("reinforce++", 6))
    batch = trainer.batch(trainer.collect(0))
    A = batch.advantages[batch.mask]
    assert abs(A.mean().item()) < 1e-6
    assert A.std().item() == pytest.approx(1, abs=1e-5)


def process(returns) -> Task:
    """A task whose completions are scored by `returns` (completion -> rewards of its steps)."""

    def steps(prompts, completions, **columns):
        return [returns(c) for c in completions]

    return replace(TASK, rewards={"steps": (2.0, steps)})


PS = {"prompts": 1, "advantage": "grpo_process", "loss": PolicyLoss(aggregation="seq_mean")}


def test_every_step_is_compared_with_all_steps_of_the_group(make, monkeypatch):
    """Â_t is the sum of the normalised rewards of the steps that end at t or after it; here each digit is a step."""
    trainer = make(task=process(lambda text: [(i + 1, float(digit)) for i, digit in enumerate(text)]), **PS)
    batch = trainer.batch(rollout := written(monkeypatch, trainer))
    digits = [[2.0 * int(digit) for digit in text] for text, _ in WRITTEN]
    every = np.array([x for row in digits for x in row])
    for i, (row, (_, cut)) in enumerate(zip(digits, WRITTEN, strict=True)):
        normal = (np.array(row) - every.mean()) / (every.std(ddof=1) + 1e-4)
        # The last step ends with the text, so with the stop token; that one is the last token of the step before.
        wanted = normal[::-1].cumsum()[::-1]
        wanted = wanted if cut else [*wanted, normal[-1]]
        assert batch.advantages[i, : len(wanted)].tolist() == pytest.approx(list(wanted), abs=1e-4)
    assert rollout.rewards.tolist() == [sum(row) for row in digits]


def test_nothing_after_the_last_step_is_credited(make, monkeypatch):
    trainer = make(task=process(lambda text: [(1, float(text[0]))] if len(text) > 1 else [(0, 0.0)]), **PS)
    batch = trainer.batch(written(monkeypatch, trainer))
    assert batch.advantages.count_nonzero(1).tolist() == [1] * 6


def test_one_number_for_the_whole_is_grpo(make, monkeypatch):
    outcome, steps = make(prompts=1), make(**PS)
    wanted = outcome.batch(written(monkeypatch, outcome))
    got = steps.batch(written(monkeypatch, steps))
    assert wanted.advantages.abs().min() > 0
    assert torch.allclose(got.advantages, wanted.advantages[:, None] * got.mask, atol=1e-6)


def test_steps_of_a_completion_without_a_score_are_in_no_mean(make, monkeypatch):
    trainer = make(task=process(lambda text: None if text == "777777" else [float(text[0])]), **PS)
    batch = trainer.batch(written(monkeypatch, trainer))
    assert not batch.advantages[2].any()
    firsts = np.array([14.0, 2, 2, 2, 14])
    wanted = (firsts - firsts.mean()) / (firsts.std(ddof=1) + 1e-4)
    assert batch.advantages[[0, 1, 3, 4, 5], 0].tolist() == pytest.approx(wanted, abs=1e-4)


def test_steps_of_what_is_excluded_are_in_no_mean(make, monkeypatch):
    """Completions 2 and 3 were cut off."""
    task = process(lambda text: [float(text[0])])
    trainer = make(task=task, truncation="mask", exclude_from_baseline=True, **PS)
    batch = trainer.batch(written(monkeypatch, trainer))
    firsts = np.array([14.0, 2, 2, 14])
    wanted = (firsts - firsts.mean()) / (firsts.std(ddof=1) + 1e-4)
    assert batch.advantages[[0, 1, 4, 5], 0].tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_step_ends_with_the_token_that_completes_its_characters():
    """Also where a token is several characters; the end of the text is the end of the completion."""
    tokenizer = Tokenizer.from_chars("ab\n;")
    text = "ab\na;"
    completion = Completion([*tokenizer.encode(text), tokenizer.eos_id])
    rollout = Rollout([{}], [[]], [completion], [text], torch.zeros(1), {"s": [0.0], "whole": [0.5], "off": [9.0]})
    rollout.steps["s"] = [[(0, 1.0), (2, 2.0), (3, 3.0), (5, 4.0)]]
    rollout.weights = {"s": 1.0, "whole": 2.0, "off": 0.0}
    values, ends = rollout.step_rewards(tokenizer)
    assert values.tolist() == [[1.0, 2.0, 3.0, 0, 0, 5.0]]
    assert ends.tolist() == [[True, True, True, False, False, True]]

    class Wide:  # every token is three characters
        def shown(self, tokens):
            return "xyz" * len(tokens)

    rollout = Rollout([{}], [[]], [Completion([1, 2, 3])], ["xyzxyzxyz"], torch.zeros(1), {"s": [0.0], "off": [9.0]})
    rollout.steps["s"] = [[(1, 1.0), (3, 1.0), (4, 1.0), (6, 1.0)]]
    rollout.weights = {"s": 1.0, "off": 0.0}
    values, ends = rollout.step_rewards(Wide())
    assert values.tolist() == [[2.0, 2.0, 0.0]]
    assert ends.tolist() == [[True, True, False]]


def test_rewards_of_steps_are_refused_where_nothing_takes_them(make):
    with pytest.raises(
        InputError, match=r"'steps' returned .*only advantage grpo_process takes .* for prompt 4, completion 0"
    ):
        make(task=process(lambda text: [1.0])).collect(0)


# --- dynamic sampling ------------------------------------------------------------------------------------------------

DYNAMIC = {"dynamic_sampling": True, "group": 3, "max_tokens": 4}


def test_only_groups_with_right_and_wrong_completions_are_trained_on(make):
    """Sampled until there are enough of them; statistics are of everything that was sampled."""
    trainer = make(**DYNAMIC)
    rollout = trainer.collect(0)
    assert len(rollout.prompts) == 4 and len(rollout.completions) == 12
    assert all(0 < sum(rollout.rewards.view(4, 3)[i]) < 3 for i in range(4))
    assert trainer.metrics["gen_batches"] > 1
    assert 0 < trainer.metrics["kept_frac"] < 1
    assert trainer.metrics["sampled_tokens"] > sum(rollout.lengths)
    plain = make(**DYNAMIC | {"dynamic_sampling": False})
    batches = [plain.draw(i) for i in range(trainer.metrics["gen_batches"])]
    rewards = torch.cat([batch.rewards for batch in batches])
    assert trainer.metrics["reward/mean"] == pytest.approx(rewards.mean().item())
    assert trainer.metrics["kept_frac"] == trainer.metrics["group/signal_frac"]
    mixed = [i for i, group in enumerate(rewards.view(-1, 3)) if 0 < sum(group) < 3]
    texts = np.array([text for batch in batches for text in batch.texts]).reshape(-1, 3)
    assert np.array(rollout.texts).reshape(-1, 3).tolist() == texts[mixed[:4]].tolist()


def test_what_dynamic_sampling_draws_is_a_function_of_the_config_and_the_cursor(make):
    first, second = make(**DYNAMIC), make(**DYNAMIC)
    for step in range(3):
        first.collect(step)
    first.cursor = second.cursor = 5
    later, fresh = first.collect(5), second.collect(5)
    assert later.texts == fresh.texts and later.prompts == fresh.prompts and first.metrics == second.metrics
    second.cursor = 6
    assert later.texts != second.collect(6).texts


PLENTY = replace(TASK, train=[{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(8) for j in range(8)])


def watched(trainer: Trainer) -> list[int]:
    """The numbers of the examples in the order in which the trainer will sample them."""
    seen, draw = [], trainer.source.draw

    def watching(number, step):
        rollout = draw(number, step)
        seen.extend(rollout.indices)
        return rollout

    trainer.source.draw = watching
    return seen


@pytest.mark.parametrize("most", [1, 2, 10])
def test_no_prompt_is_sampled_again_before_every_other_one(most, make):
    """Steps with few and with many batches alike: 64 prompts, 16 a step."""
    trainer = make(task=PLENTY, **DYNAMIC | {"prompts": 16, "max_tokens": 2, "max_gen_batches": most})
    seen, metrics = watched(trainer), []
    for step in range(5):
        metrics.append(trainer.step(step))
    assert len(seen) == 16 * trainer.cursor == 16 * sum(m["gen_batches"] for m in metrics) >= 80
    for start in range(0, len(seen), 64):
        assert len(set(seen[start : start + 64])) == len(seen[start : start + 64])
    assert sorted(seen[:64]) == list(range(64))


def test_without_dynamic_sampling_step_n_samples_batch_n(make):
    trainer = make(task=PLENTY, prompts=5, group=2, max_tokens=1)
    seen = watched(trainer)
    for step in range(4):
        trainer.step(step)
    assert seen == endless_epochs(64, 0, 0, 20) and trainer.cursor == 4


def test_mixed_groups_beyond_what_a_step_needs_are_counted(make, monkeypatch):
    trainer = make(**DYNAMIC)
    mixed = iter([[0, 2, 3], [0, 1, 3]])
    monkeypatch.setattr(grpo, "mixed_groups", lambda *args: next(mixed))
    rollout = trainer.collect(0)
    assert trainer.metrics["surplus_groups"] == 2 and rollout.batches == 2
    assert rollout.prompts == [*(trainer.draw(0).prompts[i] for i in (0, 2, 3)), trainer.draw(1).prompts[0]]
    monkeypatch.setattr(grpo, "mixed_groups", lambda *args: [])
    trainer.collect(0)
    assert trainer.metrics["surplus_groups"] == 0


def test_a_step_that_fails_is_drawn_again_on_resume(make, monkeypatch):
    """Also where some of its batches were sampled: the saved cursor is that of its beginning."""
    calls = []

    def fails_later(prompts, completions, **columns):
        calls.append(completions)
        return [math.inf if len(calls) > 5 else float(i % 2) * (len(calls) % 2) for i in range(len(completions))]

    trainer = make(task=replace(TASK, rewards={"fickle": (1.0, fails_later)}, correct=fails_later), **DYNAMIC, seed=2)
    monkeypatch.setattr(grpo, "mixed_groups", lambda *args: [0, 1])  # two batches a step
    for step in range(2):
        trainer.step(step)
    with pytest.raises(RewardError, match="the 2 steps before it are saved"):
        trainer.step(2)
    saved = json.loads((trainer.run.checkpoint / "state.json").read_text())
    assert saved == {"step": 2, "nonfinite": 0, "cursor": 4} and len(calls) == 6
    assert Trainer(grpo, replace(trainer.config, resume=True)).cursor == 4


def test_batches_have_prompts_and_draws_of_their_own(make):
    trainer = make(**DYNAMIC | {"prompts": 5})
    prompts = [prompt for number in range(4) for prompt in trainer.draw(number).prompts]
    assert len({tuple(prompt) for prompt in prompts}) == 20  # an epoch
    one = make(task=replace(TASK, train=EXAMPLES[:1]), prompts=1)
    assert len({tuple(one.draw(number).texts) for number in range(4)}) == 4
    numbers, draw = [], trainer.source.draw
    trainer.source.draw = lambda number, step: numbers.append(number) or draw(number, step)
    trainer.collect(0)
    assert 1 < len(numbers) <= 10 and numbers == list(range(len(numbers)))
    trainer.cursor = 20
    trainer.collect(2)
    assert min(set(numbers) - set(range(10))) == 20


def test_a_step_trains_on_the_groups_that_there_are(make):
    trainer = make(**DYNAMIC | {"max_gen_batches": 2}, mini_batches=4)
    right = iter([1.0, 0.0, 0.0] + [0.0] * 9 + [1.0] * 12)
    trainer.rewards.correct = lambda completions, **_: [next(right) for _ in completions]
    trainer.rewards.functions = {"few": (1.0, trainer.rewards.correct)}
    metrics = trainer.step(0)
    assert (metrics["gen_batches"], metrics["kept_frac"]) == (2, 1 / 8)
    assert metrics["updates"] == 1 and metrics["adv/max"] > 1
    assert metrics["reward/mean"] == 13 / 24


def test_a_step_without_any_mixed_group_trains_nothing_and_says_so(make):
    """A punishment of length does not make a group of equals one with a signal."""

    def wrong(prompts, completions, **columns):
        return [0.0] * len(completions)

    task = replace(TASK, rewards={"wrong": (1.0, wrong)}, correct=wrong)
    trainer = make(task=task, **preset_defaults("dapo", 6, 1) | {"overlong_cache": 6}, max_gen_batches=2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step(0)
    assert metrics["group/signal_frac"] > 0 and metrics["kept_frac"] == 0 and metrics["skip_step"] == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.display.lines == ["step 1 trains nothing: none of 8 groups has right and wrong completions"]


def test_an_accuracy_that_is_not_known_is_no_difference(make):
    trainer = make(**DYNAMIC)
    rollout = trainer.draw(0)
    nan = math.nan
    rollout.verdicts = [1.0, nan, 1.0, nan, nan, nan, nan, 0.0, 1.0, 0.0, 0.0, nan]
    assert grpo.mixed_groups(rollout, trainer.config) == [2]


def test_rollouts_are_joined_and_chosen_from(make):
    trainer = make()
    parts = [trainer.draw(i) for i in range(3)]
    parts[1].faults = [Fault("seven", row, "late", "") for row in (0, 5)]
    parts[2].steps = {"seven": [[(1, 1.0)]] * 24}
    joined = Rollout.join(parts)
    assert [fault.row for fault in joined.faults] == [24, 29]
    assert joined.steps["seven"] == [None] * 48 + [[(1, 1.0)]] * 24
    chosen = joined.select([11, 4])
    assert chosen.prompts == [parts[2].prompts[3], parts[1].prompts[0]]
    assert chosen.texts == parts[2].texts[18:] + parts[1].texts[:6]
    assert chosen.rewards.tolist() == [*parts[2].rewards[18:].tolist(), *parts[1].rewards[:6].tolist()]
    assert chosen.steps == {"seven": [[(1, 1.0)]] * 6 + [None] * 6}
    assert chosen.parts["seven"] == parts[2].parts["seven"][18:] + parts[1].parts["seven"][:6]


# --- the reference, its weight, and what is compared -----------------------------------------------------------------


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_zieglers_controller_moves_the_weight_of_the_kl(where, make):
    """β·(1 + n/horizon·clip(KL/target − 1, ±0.2)), KL the mean of the completions' sums."""
    loss = PolicyLoss(kl="k3", kl_coef=0.1) if where == "loss" else PolicyLoss()
    settings = {"adaptive_kl": "ziegler", "kl_horizon": 48, "loss": loss, "kl_in_reward": 0.1 * (where == "reward")}
    trainer = make(**settings, kl_target=1e-9)
    metrics = trainer.step(0)  # here the KL is a rounding error
    assert metrics["beta"] == 0.1 and abs(metrics["beta/kl"]) < 1e-4
    beta = trainer.beta.beta
    metrics = trainer.step(1)
    assert metrics["beta"] == beta and metrics["beta/kl"] > 0.01
    assert trainer.beta.beta == pytest.approx(beta * (1 + 24 / 48 * 0.2))
    used = trainer.beta.in_reward if where == "reward" else trainer.beta.policy_loss.kl_coef
    assert used == trainer.beta.beta
    assert (trainer.beta.policy_loss == loss) == (where == "reward")


@pytest.mark.parametrize("in_trainer", [False, True])
def test_a_controller_measures_the_kl_of_all_completions_whatever_counts_in_the_loss(in_trainer):
    """8 nats a row, half of the rows cut and masked, target 6: KL/target − 1 = 1/3, so β grows by the largest step."""
    config = GRPOConfig("m", kl_in_reward=0.1, adaptive_kl="ziegler", kl_horizon=8)
    rows = [Row([1], [2] * 4, 0)] * 8
    mask = torch.ones(8, 4, dtype=torch.bool)
    cut = mask & (torch.arange(8) < 4)[:, None]
    old, ref = torch.full((8, 4), -1.0), torch.full((8, 4), -3.0)
    sampled = mask if in_trainer else None  # a batch made by hand knows no other rows than those that count
    kl = KLWeight(config)
    found = kl.adapt(Batch(rows, torch.ones(8), cut, old, ref, sampled=sampled), None, True)
    assert found == {"beta": 0.1, "beta/kl": 8.0}
    assert kl.beta == pytest.approx(0.1 * (1 + (8 if in_trainer else 4) / 8 * 0.2))
    penalty = GRPOConfig("m", loss=PolicyLoss(kl_old_coef=1.0), adaptive_kl="ppo_penalty", kl_target=0.4)
    kl, moved = (
        KLWeight(penalty),
        SimpleNamespace(logprobs=lambda rows: old + math.log(2)),
    )  # 2 − 1 − log 2 nats a token
    found = kl.adapt(Batch(rows, torch.ones(8), cut, old, ref, sampled=sampled), moved, True)
    assert found["beta/kl"] == pytest.approx(1 - math.log(2), abs=1e-6)
    assert kl.beta == 1.0


@pytest.mark.parametrize("advantage", ["reinforce", "reinforce_pp", "grpo_batch_std", "reinforce_pp_baseline"])
def test_completions_that_leave_the_loss_are_in_no_statistic_of_the_batch(advantage, make, monkeypatch):
    trainer = make(truncation="mask", advantage=advantage, prompts=2)
    batch = trainer.batch(rollout := written(monkeypatch, trainer))
    cut, R = rollout.truncated, rollout.rewards.double()
    assert batch.mask.any(1).tolist() == (~cut).tolist()
    centred = R - R.view(2, 6).mean(1).repeat_interleave(6)  # a group keeps its rows that are cut
    A = batch.advantages.double()
    if advantage == "grpo_batch_std":
        assert torch.allclose(A[~cut], centred[~cut] / (R[~cut].std() + 1e-4), atol=1e-5)
    elif advantage == "reinforce_pp_baseline":
        kept = centred[~cut]
        assert torch.allclose(A[~cut], (kept - kept.mean()) / (kept.std() + 1e-4), atol=1e-5)
    else:  # of tokens
        kept = A[batch.mask]
        assert abs(kept.mean()) < 1e-6
        assert advantage == "reinforce" or kept.std().item() == pytest.approx(1, abs=1e-5)
        assert abs(A[batch.sampled].mean()) > 1e-3 or advantage == "reinforce_pp"


def seven_after_even(prompts, completions, **columns) -> list[float]:
    """Groups of prompts with an odd second number agree."""
    return [float("7" in c and int(p[-2]) % 2 == 0) for p, c in zip(prompts, completions, strict=True)]


SOME_AGREE = replace(TASK, rewards={"seven": (1.0, seven_after_even)})


def test_the_entropy_of_a_step_is_that_of_all_that_was_sampled(make):
    """Of groups without a signal too, and of those that dynamic sampling does not train on; estimated from the sampler,
    or exact where the policy was scored beforehand."""
    trainer = make(task=SOME_AGREE, shown=0)
    rollout = trainer.collect(0)
    signal = [bool(group.std() > 0) for group in rollout.rewards.view(4, 6)]
    assert any(signal) and not all(signal)
    metrics = trainer.step(0)
    drawn = [lp for c in rollout.completions for lp in c.logprobs]
    assert metrics["entropy"] == pytest.approx(-np.mean(drawn), abs=1e-5)
    before = make(task=SOME_AGREE, mini_batches=2, shown=0)
    exact = [entropies(before.model, row) for row in trainer.batch(rollout).rows]
    trained = [e for i, row in enumerate(exact) if signal[i // 6] for e in row]
    assert metrics["trained/entropy"] == pytest.approx(np.mean(trained), abs=1e-4)
    metrics = before.step(0)
    assert metrics["entropy"] == pytest.approx(np.mean([e for row in exact for e in row]), abs=1e-4)
    assert metrics["entropy"] != pytest.approx(metrics["trained/entropy"], abs=1e-4)
    dynamic = make(task=SOME_AGREE, mini_batches=2, shown=0, dynamic_sampling=True, max_gen_batches=1)
    assert dynamic.step(0)["entropy"] == pytest.approx(-np.mean(drawn), abs=1e-5)


@torch.no_grad()
def entropies(model: Transformer, row: Row) -> list[float]:
    logits = full_logits(model, [*row.prompt, *row.response])[len(row.prompt) - 1 : -1]
    return torch.distributions.Categorical(logits=logits.double()).entropy().tolist()


def test_the_kl_to_the_reference_of_a_step_is_that_of_all_that_was_sampled(make):
    trainer = make(kl_in_reward=0.1, mini_batches=2)
    trainer.step(0)
    rollout = trainer.collect(1)
    batch = trainer.batch(rollout)
    d = (batch.old_logp - batch.ref_logp)[batch.sampled].double()
    metrics = trainer.step(1)
    assert metrics["kl_ref/k3"] == pytest.approx(((-d).exp() + d - 1).mean().item(), rel=1e-4) and d.abs().max() > 0.01
    assert metrics["kl_ref/seq_k1"] == pytest.approx(d.sum().item() / 24, rel=1e-3)


@pytest.mark.parametrize("adaptive", ["none", "ziegler"])
def test_in_bf16_a_policy_that_is_its_reference_has_no_kl_to_it(adaptive, make):
    """The sampler's log-probs differ from the trainer's by rounding, which is no KL."""
    loss = PolicyLoss(kl="k3", kl_coef=0.1, aggregation="seq_mean")
    metrics = make(loss=loss, dtype="bfloat16", adaptive_kl=adaptive).step(0)
    assert metrics["kl_ref/k3"] == metrics["kl_ref/k1"] == 0.0
    assert metrics.get("beta/kl", 0.0) == 0.0


@pytest.mark.parametrize("settings", [{"exclude_from_baseline": True}, {}])
def test_a_group_that_can_train_nothing_is_not_mixed(settings, make, monkeypatch):
    """Completions 2, 3 and 5 of the written group are cut; with them excluded, or all cut, no difference is left."""
    trainer = make(prompts=1, truncation="mask", **settings)
    rollout = written(monkeypatch, trainer)
    assert rollout.truncated.any() and not rollout.truncated.all()
    verdicts = torch.zeros(6)
    verdicts[rollout.truncated] = 1.0
    rollout.verdicts = verdicts.tolist()
    assert grpo.mixed_groups(rollout, trainer.config) == ([] if settings else [0])
    for completion in rollout.completions:
        completion.finish_reason = "length"
    rollout.verdicts[0] = 1 - rollout.verdicts[1]
    assert grpo.mixed_groups(rollout, trainer.config) == []


def test_the_updates_of_a_step_end_by_the_kl_of_all_tokens(make):
    """Rows without a gradient move less: between their mean with the others and that of the others lies the target."""
    settings = {"task": SOME_AGREE, "epochs": 2, "shown": 0}
    found = make(**settings, target_kl=100.0).step(0)
    of_all, of_trained = 2 * found["kl_old/k3"], 2 * found["trained/kl_old/k3"]  # means over two updates, the first 0
    assert found["updates"] == 2 and of_all != pytest.approx(of_trained, rel=0.01)
    for target in (of_all * 0.99, of_all * 1.01):
        assert make(**settings, target_kl=target).step(0)["updates"] == (1 if target < of_all else 2)


def test_the_weight_is_the_one_that_is_trained_with(make):
    trainer = make(kl_in_reward=0.1, adaptive_kl="ziegler", loss=PolicyLoss(), prompts=1)
    with torch.no_grad():
        trainer.model.head_weight.mul_(1.3)
    rollout, taken = trainer.collect(0), []
    for trainer.beta.beta in (0.0, 3.0):
        taken.append(trainer.batch(rollout).advantages)
    assert not torch.allclose(*taken, atol=1e-3)


def test_the_reference_is_reset_to_the_policy_of_that_moment(make):
    trainer = make(loss=PolicyLoss(kl="k3", kl_coef=0.1), ref_reset_every=2, steps=3)
    apart = []
    for step in range(3):
        trainer.step(step)
        pairs = zip(trainer.model.parameters(), trainer.reference.parameters(), strict=True)
        apart.append(not all(torch.equal(p, r) for p, r in pairs))
    assert apart == [True, False, True]


def test_what_leaves_the_loss_may_leave_the_means_too(make, monkeypatch):
    """Completions 2 and 3 were cut off."""
    for exclude, over in ((False, range(6)), (True, (0, 1, 4, 5))):
        trainer = make(prompts=1, truncation="mask", exclude_from_baseline=exclude)
        batch = trainer.batch(rollout := written(monkeypatch, trainer))
        R = rollout.rewards[list(over)].numpy()
        wanted = (rollout.rewards.numpy() - R.mean()) / (R.std(ddof=1) + 1e-4)
        kept = [0, 1, 4, 5]
        assert batch.advantages[kept].tolist() == pytest.approx(wanted[kept], abs=1e-5)
        assert batch.mask.any(1).tolist() == [i in kept for i in range(6)]


@pytest.mark.parametrize(("target", "updates"), [(1e-9, 1), (100.0, 4)])
def test_the_updates_of_a_step_end_when_the_policy_is_too_far(target, updates, make):
    trainer = make(epochs=2, mini_batches=2, target_kl=target)
    assert trainer.step(0)["updates"] == trainer.optimizer.updates == updates
    assert not trainer.optimizer.grads


PROMISED = """reward/mean reward/std reward/seven reward/sevens reward/unscored_frac late_frac
unusable_frac group/signal_frac adv/std
    entropy kl_ref/k1 kl_ref/k3 kl_old/k3 clip/frac ratio/max mismatch/abs_mean mismatch/abs_max mismatch/k3
    mismatch/outside len/mean len/max truncated_frac grad_norm lr skip_step trained_tokens loss/total
    tokens_per_s/rollout tokens_per_s/train time/rollout time/train memory/peak_gb"""


def test_a_run_logs_what_is_promised_on_every_step(checkpoint, tmp_path):
    out, display = tmp_path / "run", Quiet()
    task = replace(TASK, rewards={"seven": (1.0, has_seven), "sevens": (0.5, sevens)})
    loss = PolicyLoss(kl="k3", kl_coef=0.1, aggregation="seq_mean")
    config = GRPOConfig(model=str(checkpoint), out=str(out), loss=loss, **SMALL | {"steps": 5}, eval_every=2, shown=3)
    model = train_grpo(config, display, task)
    steps = records(out)
    assert [record["step"] for record in steps] == list(range(6))
    for record in steps[1:]:
        assert set(PROMISED.split()) <= record.keys()
        assert all(isinstance(record[name], int | float) for name in PROMISED.split())
    assert [record["step"] for record in steps if "eval/mean" in record] == [0, 2, 4, 5]
    assert {"eval/greedy", "eval/pass@2", "eval/maj@2"} <= steps[0].keys()
    shown = records(out, "completions.jsonl")
    assert [record["step"] for record in shown] == [step for step in range(1, 6) for _ in range(3)]
    assert {"prompt", "completion", "reward", "advantage", "finish_reason"} <= shown[0].keys()
    assert display.bars[[bar[0] for bar in display.bars].index("step")] == ("step", 0, 5)  # where the clock starts
    assert [bar for bar in display.bars if bar[0] == "step"] == [("step", done, 5) for done in range(6)]
    assert len([line for line in display.lines if line.startswith("step ")]) == 5
    assert Transformer.from_pretrained(model).config.width == 32


def test_accuracy_is_measured_before_and_after_where_it_is_not_asked_for_between(checkpoint, tmp_path):
    config = GRPOConfig(model=str(checkpoint), out=str(tmp_path / "run"), **SMALL | {"steps": 3}, eval_every=0)
    train_grpo(config, Quiet(), TASK)
    assert [record["step"] for record in records(tmp_path / "run") if "eval/mean" in record] == [0, 3]


def test_a_run_that_goes_wrong_stops_with_the_last_good_checkpoint(checkpoint, tmp_path):
    calls = []

    def fails_later(prompts, completions, **columns):
        calls.append(completions)
        return [math.inf if len(calls) > 3 else float("7" in c) for c in completions]

    task = replace(TASK, rewards={"fickle": (1.0, fails_later)})
    config = GRPOConfig(model=str(checkpoint), out=str(tmp_path / "run"), **SMALL | {"steps": 9}, save_every=1)
    with pytest.raises(InputError, match=r"'fickle' returned inf for prompt [0-9]+, completion 0 "):
        train_grpo(config, Quiet(), task)
    assert records(tmp_path / "run")[-1]["step"] == 3
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "model.safetensors").exists()


def test_a_later_step_without_any_score_trains_nothing_and_the_run_goes_on(checkpoint, tmp_path):
    """Not even the KL moves the policy then; the evaluation after it has no score either."""
    steps = []

    def passing(prompts, completions, **columns):
        steps.append(len(completions))
        return [math.nan if steps.count(24) == 2 else float("7" in c) for c in completions]

    task, display = replace(TASK, rewards={"passing": (1.0, passing)}, correct=passing), Quiet()
    loss = PolicyLoss(kl="k3", kl_coef=0.1)
    config = GRPOConfig(model=str(checkpoint), out=str(tmp_path / "run"), loss=loss, **SMALL | {"steps": 3})
    train_grpo(replace(config, save_every=1, eval_every=2), display, task)
    metrics = records(tmp_path / "run")
    assert [record.get("skip_step") for record in metrics] == [None, 0, 1, 0]
    assert [record.get("reward/unscored_frac") for record in metrics] == [None, 0, 1, 0]
    assert [record.get("eval/unscored_frac") for record in metrics] == [0, None, 1, 0]
    (line,) = [line for line in display.lines if "trains nothing" in line]
    assert line.startswith("step 2 trains nothing: reward 'passing' gave none of 24 completions a score")


MOODY = """
import time
def moody(prompts, completions, **columns):
    if "7" in completions[0]:
        MOOD
    return [float(len(c)) for c in completions]
"""


def moody(folder: Path, mood: str) -> Task:
    """A task whose reward, in a file, does something else where there is a 7."""
    file = folder / "moody.py"
    file.write_text(MOODY.replace("MOOD", mood))
    return replace(TASK, rewards={"moody": (1.0, load_reward(f"{file}:moody"))})


FEW = SMALL | {"steps": 3, "prompts": 1, "group": 8}


def test_a_completion_that_takes_a_reward_too_long_gets_0_and_is_named_once(checkpoint, tmp_path):
    task, display = moody(tmp_path, "time.sleep(60)"), Quiet()
    train_grpo(GRPOConfig(str(checkpoint), out=str(tmp_path / "run"), **FEW, reward_timeout=0.3), display, task)
    late = [record["late_frac"] for record in records(tmp_path / "run")[1:]]
    assert sum(share > 0 for share in late) > 1
    assert all(record["reward/unscored_frac"] == 0 for record in records(tmp_path / "run")[1:])
    (line,) = [line for line in display.lines if "no result within 0.3 s" in line]
    assert re.fullmatch(
        r"reward 'moody' gave no result within 0.3 s for prompt \d+, completion \d \('.*'\): it counts as 0; is the "
        r"timeout long enough\? \(\d of 8 completions\)",
        line,
    )
    faults = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert len(faults) == round(8 * sum(late)) and all("7" in fault["completion"] for fault in faults)
    assert {fault["fault"] for fault in faults} == {"late"} and {fault["step"] for fault in faults} <= {1, 2, 3}


@pytest.mark.parametrize("mood", ["return [1 / 0]", "return 'x'", "return ['x']", "return []", "return [1e999]"])
def test_a_bad_reward_is_skipped_on_request(mood, checkpoint, tmp_path):
    task, display = moody(tmp_path, mood), Quiet()
    train_grpo(GRPOConfig(str(checkpoint), out=str(tmp_path / "run"), **FEW, on_bad_reward="skip"), display, task)
    shares = [record["unusable_frac"] for record in records(tmp_path / "run")[1:]]
    assert max(shares) > 0 and shares == [record["reward/unscored_frac"] for record in records(tmp_path / "run")[1:]]
    assert sum("reward 'moody'" in line for line in display.lines) == 1


def test_a_run_that_a_bad_reward_stops_has_saved_its_steps_and_goes_on_when_it_is_mended(checkpoint, tmp_path):
    """With the files of a run that nothing stopped."""
    healthy = moody(tmp_path, "pass")
    config = GRPOConfig(str(checkpoint), out=str(tmp_path / "whole"), **SMALL | {"steps": 4}, save_every=100)
    train_grpo(config, Quiet(), healthy)
    calls, config = [], replace(config, out=str(tmp_path / "stopped"))

    def fails_in_the_third_step(**batch):
        calls.append(batch)
        return healthy.rewards["moody"][1](**batch) if len(calls) < 3 else ["high"] * len(batch["completions"])

    broken = replace(healthy, rewards={"moody": (1.0, fails_in_the_third_step)})
    with pytest.raises(RewardError, match=r"returned 'high'.*; the 2 steps before it are saved: add --resume"):
        train_grpo(config, Quiet(), broken)
    train_grpo(replace(config, resume=True), Quiet(), healthy)
    model = "model/model.safetensors"
    assert (tmp_path / "stopped" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tiny_model_learns_to_say_seven(dtype, checkpoint, tmp_path):
    settings = SMALL | {"steps": 30, "prompts": 8, "group": 8, "lr": 5e-3, "eval_prompts": 5, "eval_samples": 16}
    config = GRPOConfig(model=str(checkpoint), out=str(tmp_path / "run"), dtype=dtype, **settings, eval_every=0)
    train_grpo(config, Quiet(), TASK)
    metrics = records(tmp_path / "run")
    rewards = [record["reward/mean"] for record in metrics[1:]]
    assert rewards[0] < 0.7 and np.mean(rewards[-5:]) > 0.9
    assert metrics[0]["eval/mean"] < 0.7 and metrics[-1]["eval/mean"] > 0.9


def test_a_rule_that_is_not_among_the_rewards_is_logged_without_weight():
    """Also one that is a method, which is another object at each look."""

    class Task:
        def correct(self, prompts, completions, **columns) -> list[float]:
            return [1.0] * len(completions)

    task = Task()
    paid, logged = (
        Rewards({"rule": (2.0, task.correct)}, task.correct),
        Rewards({"seven": (1.0, has_seven)}, task.correct),
    )
    assert list(paid.functions) == ["rule"] and paid.pay == 2.0
    assert {name: weight for name, (weight, _) in logged.functions.items()} == {"seven": 1.0, "correct": 0.0}
    assert Rewards({}, task.correct).functions == {}  # completions that bring their rewards
