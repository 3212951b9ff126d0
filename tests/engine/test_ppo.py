"""PPO: values, advantages and gradients are those on paper, and the loop does with them what its options say."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    TASK,
    Quiet,
    Trainer,
    check_close,
    has_seven,
    hidden_states,
    randomise,
    records,
    sevens,
    tiny_model,
)

from minirl import ppo
from minirl.errors import InputError
from minirl.lab.training import policy_line, train_ppo
from minirl.losses import PolicyLoss
from minirl.model import ScalarHead, Transformer
from minirl.ppo import PPOConfig
from minirl.presets import preset_defaults, presets
from minirl.task import Task

CRITICS = pytest.mark.parametrize("critic", ["own", "shared"])
QUICK = SMALL | {"group": 2, "critic_lr": 1e-2, "eval_prompts": 1, "eval_samples": 1}


@pytest.fixture
def make(checkpoint, tmp_path):
    """A trainer whose critic's head is not zero."""
    numbers = itertools.count()

    def trainer(task: Task = TASK, **changes) -> Trainer:
        out = tmp_path / f"run-{next(numbers)}"
        made = Trainer(ppo, PPOConfig(**{"model": str(checkpoint), "out": str(out), **QUICK, **changes}), task)
        randomise(made.critic.head, seed=5)
        return made

    return trainer


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(p, before[name]) for name, p in module.named_parameters()]


# --- values and advantages -------------------------------------------------------------------------------------------


def values_of_row(trainer: Trainer, row) -> torch.Tensor:
    """V(s_0) .. V(s_T) from a forward over the row alone: s_t ends with the token before token t."""
    hidden = hidden_states(trainer.critic.trunk, [*row.prompt, *row.response])
    return (hidden @ trainer.critic.head.weight[0])[len(row.prompt) - 1 :]


@CRITICS
@pytest.mark.parametrize("budget", [1, 25, 4096])
def test_values_are_read_at_the_state_before_each_token_and_after_the_last(critic, budget, make):
    trainer = make(critic=critic, max_tokens=20)
    rows = trainer.batch(trainer.collect(0)).rows
    assert len({len(row.response) for row in rows}) > 1
    V, after = trainer.critic.values_of_rows(rows, budget)
    assert V.abs().max() > 0.05
    for row, got, last in zip(rows, V, after, strict=True):
        wanted, length = values_of_row(trainer, row), len(row.response)
        assert torch.allclose(got[:length], wanted[:-1], atol=1e-5)
        assert torch.allclose(last, wanted[-1], atol=1e-5)
        assert not got[length:].any()


def by_hand(rewards: list[float], V: list[float], after: float, gamma: float, lam: float) -> list[float]:
    """Eq. 11 and 12 of 1707.06347, from the end."""
    A, advantages = 0.0, []
    for r, value, following in zip(reversed(rewards), reversed(V), reversed([*V[1:], after]), strict=True):
        A = r + gamma * following - value + gamma * lam * A
        advantages.append(A)
    return advantages[::-1]


@pytest.mark.parametrize(("lam", "gamma"), [(0.95, 1.0), (0.0, 0.9), (1.0, 0.9)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_advantages_are_those_by_hand(lam, gamma, bootstrap, make):
    """Token rewards −β(ℓ − ℓr) and the score at the last token, then GAE, then whitening."""
    options = {"lam": lam, "gamma": gamma, "bootstrap_truncated": bootstrap, "kl_in_reward": 0.3, "max_tokens": 4}
    plain, white = make(whiten=False, **options), make(**options)
    for trainer in (plain, white):
        randomise(trainer.model, seed=9)
    rollout = plain.collect(0)
    batch = plain.batch(rollout)
    assert 0 < rollout.truncated.sum() < 8
    wanted = []
    for i, row in enumerate(batch.rows):
        n, V = len(row.response), values_of_row(plain, row).tolist()
        r = (-0.3 * (batch.old_logp[i] - batch.ref_logp[i]))[:n].tolist()
        r[-1] += rollout.rewards[i].item()
        wanted.append(by_hand(r, V[:-1], V[-1] if bootstrap and rollout.truncated[i] else 0.0, gamma, lam))
        assert batch.advantages[i, :n].tolist() == pytest.approx(wanted[-1], abs=1e-4)
        returns = [A + value for A, value in zip(wanted[-1], V, strict=False)]
        assert batch.returns[i, :n].tolist() == pytest.approx(returns, abs=1e-4)
        if lam == 1:  # Monte Carlo: the return does not depend on the critic but for the bootstrap
            rest = V[-1] if bootstrap and rollout.truncated[i] else 0.0
            assert returns[0] == pytest.approx(sum(gamma**k * x for k, x in enumerate([*r, rest])), abs=1e-4)
    flat = np.concatenate(wanted)
    got = white.batch(rollout).advantages[batch.mask].numpy()
    assert got == pytest.approx((flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8), abs=1e-3)


def test_what_has_no_score_is_in_neither_loss(make):
    trainer = make()
    rollout = trainer.collect(0)
    rollout.rewards[[1, 4]] = math.nan
    batch = trainer.batch(rollout)
    assert [i for i, any_left in enumerate(batch.mask.any(1).tolist()) if not any_left] == [1, 4]
    assert torch.isfinite(batch.returns).all()
    A = batch.advantages[batch.mask]
    assert abs(A.mean()) < 1e-6
    assert A.std() == pytest.approx(1, abs=1e-4)


def test_advantages_are_whitened_over_the_completions_that_count(make):
    trainer = make(truncation="mask", max_tokens=4)
    randomise(trainer.model, seed=9)
    batch = trainer.batch(rollout := trainer.collect(0))
    assert 0 < rollout.truncated.sum() < 8
    assert batch.mask.any(1).tolist() == (~rollout.truncated).tolist()
    A = batch.advantages[batch.mask]
    assert abs(A.mean()) < 1e-6
    assert A.std() == pytest.approx(1, abs=1e-4)


# --- gradients -------------------------------------------------------------------------------------------------------


def value_loss_by_hand(trainer: Trainer, batch) -> torch.Tensor:
    """½·mean max((V − R)², (clip(V, V_old ± 0.2) − R)²), from a forward over each row alone."""
    total = 0.0
    for i, row in enumerate(batch.rows):
        n, V = len(row.response), values_of_row(trainer, row)[:-1]
        old, R = batch.old_values[i, :n], batch.returns[i, :n]
        clipped = torch.maximum(torch.minimum(V, old + 0.2), old - 0.2)
        total = total + torch.maximum((V - R) ** 2, (clipped - R) ** 2).sum()
    return total / (2 * batch.mask.sum())


@pytest.mark.parametrize("budget", [1, 25, 4096])
def test_the_gradient_of_a_critic_of_its_own_is_that_by_hand(budget, make):
    trainer = make()
    batch = trainer.batch(trainer.collect(0))
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1))
    batch.old_values = batch.old_values + 0.4 * noise
    metrics = trainer.critic.add_gradient(batch, budget)
    got, trainer.critic.optimizer.grads = trainer.critic.optimizer.grads, {}
    assert not trainer.optimizer.grads
    loss = value_loss_by_hand(trainer, batch)
    loss.backward()
    check_close(got, trainer.critic.optimizer.grads, 1e-4)
    assert metrics["loss/value"] == pytest.approx(loss.item(), rel=1e-4)
    assert 0 < metrics["value/clip_frac"] < 1
    V, R = trainer.critic.values_of_rows(batch.rows, 4096)[0][batch.mask], batch.returns[batch.mask]
    assert metrics["value/mean"] == pytest.approx(V.mean().item(), rel=1e-4)
    assert metrics["value/explained_var"] == pytest.approx((1 - (R - V).var() / R.var()).item(), abs=1e-4)


@pytest.mark.parametrize("budget", [1, 25, 4096])
def test_a_shared_trunk_learns_from_both_losses(budget, make):
    """The gradient is that of the policy loss and 0.1 times that of the value loss."""
    trainer = make(critic="shared", micro_batch_tokens=budget, epochs=1, kl_in_reward=0.0)
    batch = trainer.batch(trainer.collect(0))
    batch.advantages[:3] = 0  # rows that teach the critic alone
    got = trainer.gradient(batch), dict(trainer.critic.optimizer.grads)
    trainer.critic.optimizer.zero_grad()
    rows = zip(batch.advantages, token_log_probs(trainer, batch), strict=True)
    loss = -sum((A[: len(logp)] * logp).sum() for A, logp in rows) / batch.mask.sum()
    (loss + 0.1 * value_loss_by_hand(trainer, batch)).backward()
    check_close(got[0], trainer.optimizer.grads, 1e-4)
    check_close(got[1], trainer.critic.optimizer.grads, 1e-4)


def token_log_probs(trainer: Trainer, batch) -> list[torch.Tensor]:
    out = []
    for row in batch.rows:
        logits = hidden_states(trainer.model, [*row.prompt, *row.response]) @ trainer.model.head_weight.t()
        logp = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
        out.append(logp.gather(1, torch.tensor(row.response)[:, None]).squeeze(1))
    return out


# --- the loop --------------------------------------------------------------------------------------------------------


@CRITICS
@pytest.mark.parametrize("preset", presets(critic=True))
def test_every_preset_takes_a_step(preset, critic, make):
    row = preset_defaults(preset, critic=True)
    trainer = make(task=replace(TASK, rewards={"sevens": (2.0, sevens)}), critic=critic, **row)
    policy, trunk = bits(trainer.model), bits(trainer.critic.trunk)
    metrics = trainer.step(0)
    assert trainer.optimizer.updates == trainer.critic.optimizer.updates == metrics["updates"] == row["epochs"]
    assert not any(same(trainer.model, policy)) and not any(same(trainer.critic.trunk, trunk))
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []
    promised = "loss/value value/mean value/clip_frac value/explained_var value/grad_norm grad_norm entropy adv/std"
    assert set(promised.split()) <= metrics.keys()
    assert f"critic {metrics['value/explained_var']:.2f}  clip" in policy_line(1, 2, metrics | {"memory/peak_gb": 1.0})
    assert ("beta" in metrics) == (preset == "ppo_penalty")


def test_presets_without_a_critic_are_those_of_another_command():
    assert presets(critic=True) == ["ppo", "ppo_penalty"]
    assert PPOConfig("m", **preset_defaults("ppo", critic=True)) == PPOConfig("m", preset="ppo")
    with pytest.raises(InputError, match="'ppo_actor_only' has no critic, minirl grpo runs it: choose from ppo, "):
        preset_defaults("ppo_actor_only", critic=True)


def test_one_completion_a_prompt_is_enough(make):
    metrics = make(group=1, prompts=8).step(0)
    assert metrics["grad_norm"] > 0
    assert "group/signal_frac" not in metrics


@CRITICS
def test_the_critic_warms_up_while_the_policy_keeps_its_bits(critic, make):
    trainer = make(critic=critic, critic_warmup=1, weight_decay=0.1)
    policy, state, head = bits(trainer.model), trainer.optimizer.state_dict(), bits(trainer.critic.head)
    state = {name: tensor.clone() for name, tensor in state.items()}
    metrics = trainer.step(0)
    assert all(same(trainer.model, policy))
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.optimizer.state_dict().items())
    assert not any(same(trainer.critic.head, head))
    assert "grad_norm" not in metrics and metrics["trained_tokens"] == 4 * metrics["sampled_tokens"]
    assert f"entropy {metrics['entropy']:.3f}  critic" in policy_line(
        1, 2, metrics | {"memory/peak_gb": 1.0}
    )  # that of what was sampled
    assert "clip –" in policy_line(1, 2, metrics | {"memory/peak_gb": 1.0})
    assert "grad_norm" in trainer.step(1)
    assert not any(same(trainer.model, policy))


@pytest.mark.parametrize(("target", "updates"), [(1e-9, 1), (0.05, range(2, 8)), (100.0, 8)])
def test_updates_end_when_the_policy_is_too_far(target, updates, make):
    """The gradient that was too far is dropped, the critic's too."""
    trainer = make(epochs=4, mini_batches=2, target_kl=target, lr=3e-3)
    metrics = trainer.step(0)
    assert metrics["updates"] in (updates if isinstance(updates, range) else [updates])
    assert trainer.optimizer.updates == trainer.critic.optimizer.updates == metrics["updates"]
    assert not trainer.optimizer.grads and not trainer.critic.optimizer.grads


def test_a_loss_that_asks_for_entropy_has_more_of_it(make):
    after = []
    for coef in (0.0, 0.5):
        trainer = make(loss=PolicyLoss(entropy_coef=coef), epochs=1)
        trainer.step(0)
        after.append(trainer.step(1)["entropy"])
    assert after[1] > after[0] + 0.01


def test_the_penalty_follows_how_far_the_policy_went(make):
    """Twice where the KL after the updates was above 1.5 times the target, half below its two thirds."""
    trainer = make(**preset_defaults("ppo_penalty", critic=True), kl_target=1e-6)
    assert trainer.beta.policy_loss.kl_old_coef == 1
    assert trainer.step(0)["beta"] == 1
    assert trainer.beta.policy_loss.kl_old_coef == 2
    trainer = make(**preset_defaults("ppo_penalty", critic=True), kl_target=100.0, critic_warmup=1)
    trainer.step(0)
    assert trainer.beta.beta == 1  # the policy has not moved, which says nothing about the weight
    far = trainer.step(1)
    assert (far["beta"], trainer.beta.beta) == (1, 0.5)
    assert 0 < far["beta/kl"] < 10


@pytest.mark.parametrize("seed", range(3))
def test_ppo_learns_to_say_seven(seed, checkpoint, tmp_path):
    sizes = QUICK | {"steps": 15, "prompts": 8, "group": 4, "lr": 3e-3, "critic_lr": 5e-3, "seed": seed}
    config = PPOConfig(str(checkpoint), out=str(tmp_path / "run"), **sizes, eval_every=0)
    train_ppo(config, Quiet(), TASK)
    rewards = [record["reward/mean"] for record in records(tmp_path / "run")[1:]]
    assert rewards[0] < 0.6 and np.mean(rewards[-4:]) > 0.85


def test_a_critic_learns_what_a_prompt_is_worth(make):
    """Only prompts that begin with an even number are paid for: with the policy frozen that is what is to be known."""

    def even(prompts, completions, **columns) -> list[float]:
        return [float(int(prompt[0]) % 2 == 0) for prompt in prompts]

    task = replace(TASK, rewards={"even": (1.0, even)}, correct=has_seven)
    trainer = make(task=task, steps=20, prompts=10, critic_warmup=12, kl_in_reward=0.0, lam=1.0)
    explained = [trainer.step(step)["value/explained_var"] for step in range(12)]
    assert explained[0] < 0 and np.mean(explained[-3:]) > 0.3


def test_a_checkpoint_holds_the_critic_and_a_resumed_trainer_has_its_bits(checkpoint, tmp_path):
    for critic in ("own", "shared"):
        out = tmp_path / critic
        options = {"critic": critic, "adaptive_kl": "ziegler", "ref_reset_every": 1}
        config = PPOConfig(str(checkpoint), out=str(out), **QUICK, **options)
        trainer = Trainer(ppo, config)
        trainer.step(0)
        with trainer.run:
            trainer.run.save(1)
        again = Trainer(ppo, replace(config, resume=True))
        for name in ("model", "reference"):
            assert all(same(getattr(again, name), bits(getattr(trainer, name))))
        assert all(same(again.critic.trunk, bits(trainer.critic.trunk)))
        assert all(same(again.critic.head, bits(trainer.critic.head)))
        assert again.beta.beta == trainer.beta.beta != 0.05
        wanted = trainer.critic.optimizer.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.critic.optimizer.state_dict().items())
        saved = Transformer.from_pretrained(out / "checkpoints/step-000001")
        assert all(same(saved, bits(trainer.model)))


def test_a_lost_head_is_named(checkpoint, tmp_path):
    config = PPOConfig(str(checkpoint), out=str(tmp_path), critic="shared", **QUICK)
    with Trainer(ppo, config).run as run:
        run.save(1)
    head = tmp_path / "checkpoints/step-000001/critic/head.safetensors"
    head.write_bytes(head.read_bytes()[:-3])
    with pytest.raises(
        InputError, match=r"no checkpoint .* is whole: step-000001 is damaged \(critic/head.safetensors has changed"
    ):
        Trainer(ppo, replace(config, resume=True))


# --- a critic that starts from another checkpoint --------------------------------------------------------------------


@pytest.fixture
def judge(checkpoint, tmp_path) -> Path:
    """A reward model."""
    model = Transformer.from_pretrained(checkpoint, scalar_head=ScalarHead("linear", "pairwise", bias=0.3))
    randomise(model, seed=9).save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_a_critic_can_start_from_a_reward_model_with_its_head(judge, make, checkpoint, tmp_path):
    config = PPOConfig(model=str(checkpoint), out=str(tmp_path / "run"), critic_from=str(judge), **QUICK)
    critic = Trainer(ppo, config).critic
    wanted = bits(Transformer.from_pretrained(judge, scalar_head=True))
    assert all(same(critic.trunk, wanted)) and wanted["score.weight"].any()
    hidden = torch.randn(3, 32)
    whole = Transformer.from_pretrained(judge, scalar_head=True)
    assert torch.allclose(critic.values(hidden), whole.values(hidden), atol=1e-5)  # its bias included
    assert not any(same(critic.trunk, bits(make().critic.trunk)))


def test_a_critic_that_does_not_fit_is_refused(judge, checkpoint, tmp_path):
    def start(source: Path):
        config = PPOConfig(model=str(checkpoint), out=str(tmp_path / "run"), critic_from=str(source), **QUICK)
        return Trainer(ppo, config)

    mlp = Transformer.from_pretrained(checkpoint, scalar_head=ScalarHead("mlp")).initialise_score(0)
    mlp.save_pretrained(tmp_path / "mlp")
    Transformer.from_pretrained(checkpoint, scalar_head=ScalarHead(kind="bce")).save_pretrained(tmp_path / "bce")
    for kind in ("mlp", "bce"):
        with pytest.raises(InputError, match="a critic starts from a linear one whose numbers are rewards"):
            start(tmp_path / kind)
    tiny_model(vocab_size=11, width=32, layers=1, heads=4, head_dim=8).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has a vocabulary of 11 and the policy one of"):
        start(tmp_path / "other")
    with pytest.raises(InputError, match="critic_from is where a critic of its own starts"):
        PPOConfig(model=str(checkpoint), critic="shared", critic_from=str(judge))
