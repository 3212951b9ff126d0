"""A reward model in the loop: measured on what it has not seen, taught by the rule, and not believed blindly."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SMALL, TASK, Quiet, Trainer, has_seven, randomise, records

from minirl import grpo
from minirl.errors import InputError
from minirl.examples import Line
from minirl.grpo import GRPOConfig
from minirl.lab.training import train_grpo
from minirl.model import ScalarHead, Transformer
from minirl.online_reward import OnlineReward, Refresh, agreement
from minirl.reward_model import RewardModel, read_all
from minirl.reward_training import rows_of
from minirl.rewards import RewardError
from minirl.run import Run
from minirl.trees import Row

KINDS = pytest.mark.parametrize("kind", ["pairwise", "pointwise", "bce"])


@pytest.fixture
def judge(checkpoint, tmp_path):
    """The folder of a reward model that knows nothing."""

    def made(kind: str = "pairwise") -> Path:
        folder = tmp_path / kind
        model = Transformer.from_pretrained(checkpoint, scalar_head=ScalarHead("linear", kind))
        randomise(model.score, seed=3)
        model.save_pretrained(folder)
        for file in checkpoint.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return made


@pytest.fixture
def make(checkpoint, judge, tmp_path):
    def trainer(kind: str = "pairwise", **changes) -> Trainer:
        return Trainer(grpo, config(checkpoint, judge(kind), tmp_path / "run", **changes))

    return trainer


def config(checkpoint: Path, judge: Path, out: Path, **changes) -> GRPOConfig:
    rewards = ("seven=0", f"model:{judge}=1")
    return GRPOConfig(**{"model": str(checkpoint), "out": str(out), **SMALL, "rewards": rewards, **changes})


def scores(trainer: Trainer, lines: list[Line]) -> torch.Tensor:
    return read_all(trainer.rewards.learned[0].reward.model, rows_of(lines), 4096)


# --- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_is_within_the_groups_and_leaves_out_what_is_not_known():
    nan = math.nan
    found = agreement(
        torch.tensor([0.9, 0.1, 0.5, 0.5, -9.0, 7.0, nan]),
        torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, nan, 0.0]),
        torch.tensor([0, 0, 1, 1, 2, 2, 2]),
    )
    assert found["accuracy"] == (1 + 0.5) / 2  # one pair right, one tie; the third group has no wrong one
    known = np.array([[0.9, 0.1, 0.5, 0.5, -9.0], [1, 0, 1, 0, 1]])
    assert found["corr"] == pytest.approx(np.corrcoef(known)[0, 1])
    assert found["mean"] == pytest.approx(known[0].mean())


@pytest.mark.parametrize("same", ["scores", "labels", "all unknown"])
def test_agreement_is_no_number_where_nothing_differs(same):
    values, ones = torch.tensor([0.1, 0.7, 0.2]), torch.full((3,), math.nan if same == "all unknown" else 1.0)
    labels = torch.tensor([1.0, 0.0, 1.0]) if same == "scores" else ones
    found = agreement(ones if same == "scores" else values, labels, torch.zeros(3, dtype=torch.long))
    assert math.isnan(found["corr"])
    assert found["accuracy"] == 0.5 if same == "scores" else math.isnan(found["accuracy"])


def test_only_1_is_right():
    found = agreement(torch.tensor([0.9, 0.1]), torch.tensor([1.0, 0.9]), torch.tensor([0, 0]))
    assert found["accuracy"] == 1 and found["corr"] == pytest.approx(1)


def test_a_prompt_is_learned_as_it_was_scored(make):
    """With the model's own tokenizer, whose chat template may be another."""
    trainer = make(refresh=Refresh(every=1))
    reward = trainer.rewards.learned[0].reward
    plain = reward.tokenizer.prompt_ids
    reward.tokenizer.prompt_ids = lambda prompt, tools=None: [5, *plain(prompt, tools)]
    trainer.collect(0)
    assert all(line.rows[0].prompt[0] == 5 for line in trainer.rewards.learned[0].new)


def test_the_policy_learns_from_the_model_and_the_rule_is_only_logged(make):
    trainer = make()
    rollout = trainer.collect(0)
    name = trainer.rewards.learned[0].name
    assert rollout.rewards.tolist() == rollout.parts[name]
    assert 0 < np.mean(rollout.parts["seven"]) < 1
    wanted = agreement(rollout.rewards, torch.tensor(rollout.parts["seven"]), rollout.group_ids)
    assert {k: trainer.metrics[f"reward_model/{k}"] for k in wanted} == wanted


def test_two_models_are_measured_apart(make, judge):
    other = f"model:{judge('bce')}"
    trainer = make(rewards=("seven=0", f"model:{judge('pairwise')}=1", f"{other}=1"))
    trainer.collect(0)
    stats = trainer.metrics
    assert stats["reward_model/mean"] != stats["reward_model1/mean"] == pytest.approx(stats[f"reward/{other}"])


# --- the refresh -----------------------------------------------------------------------------------------------------


def test_what_a_failed_step_sampled_is_not_learned_from(make, monkeypatch):
    """It is drawn again when the run is resumed, and would be learned twice."""
    trainer = make(refresh=Refresh(every=2), dynamic_sampling=True, max_gen_batches=3)
    draw = trainer.source.draw
    monkeypatch.setattr(grpo, "mixed_groups", lambda *args: [0])

    def fails_at_the_third(number: int, step):
        if number == 2:
            raise RewardError("no score")
        return draw(number, step)

    trainer.source.draw = fails_at_the_third
    with pytest.raises(RewardError):
        trainer.collect(0)
    assert not trainer.rewards.learned[0].new and not trainer.rewards.learned[0].fresh
    trainer.source.draw = draw
    rollout = trainer.collect(0)
    (fresh,) = trainer.rewards.learned[0].fresh
    assert len(fresh[0]) == 3 * 24 and len(rollout.prompts) == 3


@KINDS
def test_a_refresh_teaches_the_rule(kind, make):
    trainer = make(kind, refresh=Refresh(every=1, lr=1e-2, epochs=30), prompts=8)
    trainer.collect(0)
    lines = list(trainer.rewards.learned[0].new)
    before = agreement_of(trainer, lines)
    metrics, _ = trainer.rewards.learned[0].refresh()
    assert agreement_of(trainer, lines) > max(0.9, before + 0.1)
    assert metrics["refresh/lines"] == len(lines) > 0 and math.isfinite(metrics["refresh/loss"])


def agreement_of(trainer: Trainer, lines: list[Line]) -> float:
    """Share of right answers that score above a wrong one."""
    values = iter(scores(trainer, lines).tolist())
    right, wrong, inside = [], [], []
    for line in lines:
        own = [next(values) for _ in line.rows]
        inside += [own[i] > own[j] for i, j in line.pairs]
        for value, label in zip(own, line.labels, strict=False):
            (right if label else wrong).append(value)
    return float(np.mean(inside or [r > w for r in right for w in wrong]))


@KINDS
def test_lines_hold_each_different_completion_once_with_its_label(kind, make):
    trainer = make(kind, refresh=Refresh(every=1))
    rollout = trainer.collect(0)
    wanted = Counter()
    for i, completion in enumerate(rollout.completions):
        wanted[tuple(rollout.prompts[i // 6]), tuple(completion.tokens), rollout.parts["seven"][i]] = 1
    found = Counter()
    for line in trainer.rewards.learned[0].new:
        labels = line.labels
        if kind == "pairwise":
            better = {i for i, _ in line.pairs}
            labels = [float(i in better) for i in range(len(line.rows))]
            assert len(line.pairs) == len(better) * (len(labels) - len(better)) > 0
            assert sum(line.weights) == pytest.approx(1)
        for row, label in zip(line.rows, labels, strict=True):
            found[row.prompt, row.response, label] += 1
    if kind == "pairwise":  # only prompts with right and wrong answers are in pairs
        both = {p for p, _, y in wanted if y} & {p for p, _, y in wanted if not y}
        wanted = Counter({key: n for key, n in wanted.items() if key[0] in both})
    assert found == wanted


def test_pairs_do_not_move_the_level(make):
    trainer = make(refresh=Refresh(every=1, lr=1e-2, epochs=5))
    trainer.collect(0)
    lines, before = list(trainer.rewards.learned[0].new), scores(trainer, trainer.rewards.learned[0].new)
    trainer.rewards.learned[0].refresh()
    after = scores(trainer, lines)
    assert (after - before).abs().max() > 0.05
    assert after.double().mean().item() == pytest.approx(before.double().mean().item(), abs=1e-5)


def toy(number: int) -> Line:
    return Line([Row((1,), (number,))], labels=(float(number % 2),), weights=(1.0,))


@pytest.fixture
def online(judge, make, tmp_path):
    def made(**options) -> OnlineReward:
        model, policy = OnlineReward("model:x", 1.0, judge("bce"), Refresh(every=1, **options), seed=0), make().policy
        model.beside(policy, SimpleNamespace(refuse_short_reader=lambda *args: None), Run(tmp_path / "other", {}))
        return model

    return made


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_a_tenth_of_what_is_learned_is_older(batch, online):
    model = online(batch=batch, epochs=2)
    model.new = [toy(i) for i in range(36)]
    parts, _ = model._batches()  # nothing is older yet
    assert [len(part) for part in parts] == 2 * [batch] * (36 // batch) or batch == 20
    model.old = [toy(100 + i) for i in range(50)]
    parts, _ = model._batches()
    numbers = [[line.rows[0].response[0] for line in part] for part in parts]
    older = [sum(n >= 100 for n in part) for part in numbers]
    assert sum(older) == 72 // 9 and max(older) - min(older) <= 1 and max(map(len, parts)) <= batch + 1
    assert Counter(n for part in numbers for n in part if n < 100) == dict.fromkeys(range(36), 2)


def test_what_is_kept_is_a_fair_sample_of_all_there_was(online):
    counts, model = Counter(), online(memory=10)
    for seed in range(300):
        model.seed, model.seen, model.rounds, model.old = seed, 0, 0, []
        for start in range(0, 50, 10):
            model.new = [toy(start + i) for i in range(10)]
            model._remember()
            model.rounds += 1
        assert len(model.old) == 10 and model.seen == 50 and not model.new
        counts.update(line.rows[0].response[0] for line in model.old)
    by_round = [sum(counts[start + i] for i in range(10)) for start in range(0, 50, 10)]
    assert all(abs(n - 600) < 120 for n in by_round), by_round  # 3000 places, five rounds; σ is about 20


# --- what is not believed --------------------------------------------------------------------------------------------


def test_a_model_that_contradicts_the_rule_is_replaced_by_it_until_it_does_not(make):
    trainer = make("bce", refresh=Refresh(every=1, lr=1e-2, epochs=40), prompts=8)
    judge = trainer.rewards.learned[0]
    lie = lambda self, prompts, completions, **columns: [1 - y for y in has_seven(prompts, completions)]  # noqa: E731
    judge.reward.__class__ = type("Liar", (RewardModel,), {"__call__": lie})
    trainer.collect(0)
    metrics, said = judge.refresh()
    assert metrics["refresh/alarm"] == 1 and not judge.trusted
    assert "ranks only 0.00 of fresh pairs right and correlates -1.00 with the rule" in said
    rollout = trainer.collect(1)
    assert rollout.rewards.tolist() == rollout.parts["seven"] != rollout.parts[judge.name]
    judge.reward.__class__ = RewardModel
    judge.fresh = []
    rollout = trainer.collect(2)
    assert rollout.rewards.tolist() == rollout.parts["seven"]  # still the rule's
    metrics, said = judge.refresh()
    assert judge.trusted and not metrics["refresh/alarm"] and not said
    rollout = trainer.collect(3)
    assert rollout.rewards.tolist() == rollout.parts[judge.name]


def test_scores_that_run_away_raise_the_alarm(online):
    model = online()
    model.fresh = [(torch.tensor([30.0, 10.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))]
    _, said = model.refresh()
    assert "gives 20.0 on average" in said and "ranks" not in said


@pytest.mark.parametrize("trusted", [True, False])
def test_where_nothing_can_be_compared_a_model_is_believed_as_before(trusted, online):
    model = online()
    model.trusted = trusted
    model.fresh = [(torch.tensor([0.3, 0.1]), torch.tensor([1.0, 1.0]), torch.tensor([0, 0]))]
    metrics, said = model.refresh()
    assert not said and metrics["refresh/lines"] == metrics["refresh/alarm"] == 0 and model.trusted == trusted


def test_a_policy_that_is_never_right_is_no_proof_of_its_judge(online):
    model = online()
    model.fresh = [(torch.tensor([9.0, 8.0]), torch.tensor([0.0, 0.0]), torch.tensor([0, 0]))]
    _, said = model.refresh()
    assert "the reward model was shown nothing that is right" in said and not model.trusted


# --- the whole run ---------------------------------------------------------------------------------------------------


def test_a_run_refreshes_when_it_should_and_hands_over_the_model(checkpoint, judge, tmp_path):
    folder = judge()
    refresh = Refresh(every=2, lr=1e-3)
    out = tmp_path / "run"
    train_grpo(config(checkpoint, folder, out, steps=5, refresh=refresh, save_every=2), Quiet(), TASK)
    lines = records(out)
    assert [line["step"] for line in lines if "refresh/lines" in line] == [2, 4]
    frozen = tmp_path / "frozen"
    train_grpo(config(checkpoint, folder, frozen, steps=5), Quiet(), TASK)
    means = [[line["reward_model/mean"] for line in records(run)[1:]] for run in (out, frozen)]
    assert means[0][:2] == means[1][:2] and means[0][2] != means[1][2]  # a step's scores come before its labels
    given, handed = (Transformer.from_pretrained(f, scalar_head=True) for f in (folder, out / "reward_model"))
    assert not torch.equal(given.score.weight, handed.score.weight)
    assert math.isfinite(RewardModel.from_pretrained(out / "reward_model")(["1+1="], ["2"])[0])
    assert not (frozen / "reward_model").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 1, "replay": 1.0}, "refresh.replay = 1.0: it must be below 1"),
        ({"every": -1}, "every = -1"),
        ({"every": 1, "lr": 0.0}, "lr = 0.0"),
        ({"epochs": 2}, "refresh.every = 0: the reward model stays as it is"),
    ],
)
def test_a_refresh_that_makes_no_sense_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Refresh(**options)


def test_there_must_be_one_model_to_refresh_and_a_rule_must_be_able_to_label(checkpoint, judge, make):
    with pytest.raises(InputError, match="the one reward model among the rewards"):
        GRPOConfig(model=str(checkpoint), refresh=Refresh(every=1))
    with pytest.raises(InputError, match=r"refresh.every = 9: there are only 2 steps"):
        make(refresh=Refresh(every=9))
    with pytest.raises(InputError, match="refresh changes the reward of a completion, grpo_process"):
        make(refresh=Refresh(every=1), advantage="grpo_process")
    with pytest.raises(InputError, match="is of kind 'process': a rule's labels can refresh"):
        make("process", refresh=Refresh(every=1))
