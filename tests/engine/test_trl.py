"""TRL's own losses beside ours on the same batch and the same weights: loss and gradient agree to 1e-5. Needs trl.

TRL's `_compute_loss` runs with a `GRPOConfig` of its own and its fused head on a transformers model loaded from our
checkpoint; only the trainer around them is a stub. DPO and its relatives stand in test_preferences.py. What differs,
each with its test or with the option that makes both sides equal:

- a row without a counted token counts in the mean of TRL's "grpo", "sapo" and "dr_grpo", and not in ours;
- `epsilon_high` of TRL's "cispo" is the absolute cap of the weight, our `w_max`;
- with a ratio of rows TRL's unbiased KL takes the row's ratio, ours always the token's, the unbiased one of the two;
- TRL's KL is the unbiased one unless told otherwise, our "grpo" takes the plain k3 of the paper;
- TRL's entropy bonus is a mean over tokens whatever the policy's mean is; ours has the weights of the policy's;
- a `delta` below 1 + ε_high cuts positive advantages at delta and negative ones at 1 + ε_high; our dual clip cuts
  negative ones alone, at its own bound (1912.09729); above 1 + ε_high they are the same;
- TRL exponentiates any log-ratio; ours stops at ±20 and has no gradient beyond;
- advantages: both take the sample deviation + 1e-4; where all rewards of a group agree, ours are 0 exactly and TRL's
  may be a rounding error over 1e-4;
- TRL's ranking accuracy calls a tie wrong, ours half right.
"""

import inspect
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import random_ids, randomise, tiny_config, tiny_model

from minirl import advantages as adv
from minirl.batch import Batch, add_policy_gradient
from minirl.examples import Line
from minirl.losses import PolicyLoss, policy_loss
from minirl.model import ScalarHead, Transformer
from minirl.presets import preset_defaults
from minirl.reward_losses import ranking_accuracy
from minirl.reward_training import RewardConfig, add_reward_gradient
from minirl.trees import Row, response_logprobs, response_mask

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")  # of every GRPOConfig
TEMPERATURE = 0.8
SHAPES = [(5, [4, 7, 2]), (3, [6, 1, 5]), (8, [3, 9, 6])]  # prompt, its completions
REWARDS = [1.0, 0.0, 0.5, 0.3, 0.3, 0.3, 0.0, 1.0, 1.0]  # the second prompt tells nothing


def trl(module: str = ""):
    pytest.importorskip("trl", minversion="1.16", reason="the peer of these tests is TRL 1.16 or newer")
    return pytest.importorskip(f"trl.{module}" if module else "trl")


def near(value, tolerance: float = 1e-5):
    return pytest.approx(value, rel=tolerance, abs=tolerance / 10)


def distance(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """The largest relative difference of the gradients of a weight."""
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == wanted.keys()
    return max(((p.grad - wanted[name]).norm() / wanted[name].norm()).item() for name, p in ours.named_parameters())


# --- one batch, two models, one set of weights -----------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """(ours, theirs) with the same weights, theirs as the trainer prepares it."""
    utils, transformers = trl("trainer.utils"), pytest.importorskip("transformers")
    model = tiny_model(heads=4)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    utils.add_fused_lm_head(theirs, TEMPERATURE, outputs=("log_probs", "entropy"))
    return model, theirs.train()


def experience(model, estimator: str = "grpo", drift: float = 0.3) -> Batch:
    """Completions with a tool's output inside one of them; old policy, reference and sampler are the policy plus noise.

    `drift` is the noise of the old policy, in nats a token.
    """
    rows = []
    for i, (prompt, lengths) in enumerate(SHAPES):
        ids = random_ids(prompt, seed=i)
        rows += [Row(ids, random_ids(n, seed=10 * i + j + 50), i) for j, n in enumerate(lengths)]
    mask = response_mask(rows)
    mask[1, 2:4] = False
    g = torch.Generator().manual_seed(0)
    logp = response_logprobs(model, rows, 1000, TEMPERATURE)
    old, ref, rollout = (logp + scale * torch.randn(logp.shape, generator=g) for scale in (drift, 0.5, 0.3))
    A = adv.OUTCOME[estimator](torch.tensor(REWARDS), torch.tensor([row.group for row in rows]))
    return Batch(rows, A, mask, old, ref, rollout)


def as_trl(batch: Batch) -> dict[str, torch.Tensor]:
    """[padding | prompt] and [completion | padding]; the mask of a tool's output beside that of the padding."""
    prompts, completions = [row.prompt for row in batch.rows], [row.response for row in batch.rows]
    width = max(map(len, prompts))
    attended = response_mask(batch.rows)
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([list(c) + [0] * (attended.shape[1] - len(c)) for c in completions]),
        "completion_mask": attended.long(),
        "tool_mask": batch.mask.long(),
        "num_items_in_batch": batch.mask.sum(),
        "advantages": batch.advantages,
    }
    others = {"old_per_token_logps": batch.old_logp, "ref_per_token_logps": batch.ref_logp}
    return inputs | {name: x for name, x in others.items() if x is not None}


def trl_trainer(model, **options) -> SimpleNamespace:
    """What `GRPOTrainer._compute_loss` asks of the trainer, from a real config of these options."""
    trainer = trl("trainer.grpo_trainer").GRPOTrainer
    sizes = {"per_device_train_batch_size": 9, "num_generations": 3, "steps_per_generation": 1}
    options = {"use_bias_correction_kl": False} | sizes | options
    args = trl().GRPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options)
    same = {name: lambda x, **kwargs: x for name in ("gather", "reduce", "pad_across_processes")}
    accelerator = SimpleNamespace(num_processes=1, autocast=nullcontext, sync_gradients=True, **same)
    copied = ("beta", "loss_type", "importance_sampling_level", "top_entropy_quantile", "off_policy_mask_threshold")
    copied += ("max_completion_length", "use_vllm", "vllm_importance_sampling_correction", "entropy_coef")
    stub = SimpleNamespace(args=args, model=model, accelerator=accelerator, **{k: getattr(args, k) for k in copied})
    stub.epsilon_low = args.epsilon
    stub.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    stub.aux_loss_enabled = stub.use_adaptive_entropy = False
    stub._entropy_bonus_enabled, stub.current_gradient_accumulation_steps = args.entropy_coef != 0, 1
    stub._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    stub.get_off_policy_mask = trainer.get_off_policy_mask
    for name in ("get_high_entropy_mask", "_get_per_token_logps_and_entropies", "_compute_loss"):
        setattr(stub, name, partial(inspect.unwrap(getattr(trainer, name)), stub))  # without its profiler
    return stub


def vllm_weights(args, batch: Batch) -> torch.Tensor:
    """The importance weights [B, T] or [B, 1]; these lines of TRL stand inside its sampling and are copied here."""
    diff = (batch.old_logp - batch.rollout_logp) * batch.mask
    diff = diff.sum(-1, keepdim=True) if args.vllm_importance_sampling_mode.startswith("sequence") else diff
    ratio, cap = diff.exp(), args.vllm_importance_sampling_clip_max
    if args.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(min=args.vllm_importance_sampling_clip_min, max=cap)
    return ratio.masked_fill((ratio < (args.vllm_importance_sampling_clip_min or 0.0)) | (ratio > cap), 0.0)


# --- loss and gradient of every weight -------------------------------------------------------------------------------

GRPO, DAPO, SEQ = preset_defaults("grpo")["loss"], preset_defaults("dapo")["loss"], PolicyLoss(aggregation="seq_mean")
VLLM = {"loss_type": "grpo", "use_vllm": True, "vllm_importance_sampling_clip_max": 1.4}
CASES = {  # ours, theirs; a preset's name stands for its loss, with an option bent where else it would not bite
    "grpo": (GRPO, {"loss_type": "grpo", "beta": 0.04}),
    "dr_grpo": (
        preset_defaults("dr_grpo", 16)["loss"],
        {"loss_type": "dr_grpo", "max_completion_length": 16},
    ),
    "dapo": (DAPO, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        preset_defaults("gspo")["loss"],
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": (replace(preset_defaults("cispo")["loss"], w_max=1.2), {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": (preset_defaults("sapo")["loss"], {"loss_type": "sapo"}),
    "scaling_grpo": (
        replace(preset_defaults("scaling_grpo")["loss"], kl_coef=0.1, opsm_delta=0.01),
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True, "off_policy_mask_threshold": 0.01},
    ),
    "two-sided clip": (replace(SEQ, dual_clip=1.3), {"loss_type": "grpo", "delta": 1.3}),
    "top entropy": (
        replace(GRPO, entropy_quantile=0.4),
        {"loss_type": "grpo", "beta": 0.04, "top_entropy_quantile": 0.4},
    ),
    "entropy bonus": (
        replace(DAPO, entropy_coef=0.05),
        {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.05},
    ),
    "token truncate": (
        replace(SEQ, importance="token_truncate", importance_cap=1.4),
        VLLM | {"vllm_importance_sampling_mode": "token_truncate"},
    ),
    "token mask": (
        replace(SEQ, importance="token_mask", importance_floor=0.7, importance_cap=1.4),
        VLLM | {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.7},
    ),
    "sequence truncate": (
        replace(SEQ, importance="seq_truncate", importance_cap=1.4),
        VLLM | {"vllm_importance_sampling_mode": "sequence_truncate"},
    ),
    "sequence mask": (
        replace(GRPO, importance="seq_mask", importance_cap=1.4),
        VLLM | {"vllm_importance_sampling_mode": "sequence_mask", "beta": 0.04},
    ),
}
ESTIMATORS = {"dr_grpo": "grpo_mean", "scaling_grpo": "grpo_mean"}
DRIFT = {"gspo": 2e-3}  # its clip is that narrow


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_every_weight_are_those_of_trl(name, models):
    (model, theirs), (o, options) = models, CASES[name]
    batch = experience(model, ESTIMATORS.get(name, "grpo"), DRIFT.get(name, 0.3))
    stub, inputs = trl_trainer(theirs, **options), as_trl(batch)
    if o.importance != "none":
        inputs["importance_sampling_ratio"] = vllm_weights(stub.args, batch)
    else:
        batch = replace(batch, rollout_logp=None)
    loss = stub._compute_loss(theirs, inputs)
    loss.backward()
    found = add_policy_gradient(model, batch, o, 30, TEMPERATURE)
    assert found["loss/total"] == near(loss.item())
    assert distance(model, theirs) < 1e-5
    if o.kl == "k3":  # without it our metrics leave out the rows that have no signal
        assert found["kl_ref/k3"] == near(stub._metrics["train"]["kl"][0])
        assert found["entropy"] == near(stub._metrics["train"]["entropy"][0])
    at_work = {"clip/frac": o.surrogate != "sapo", "clip/dual": o.dual_clip, "opsm/masked_frac": o.opsm_delta}
    at_work["tis/masked_frac"] = o.importance.endswith("mask")
    assert all(0 < found[fraction] < 1 for fraction, on in at_work.items() if on), "an option that does nothing"


def test_a_single_update_on_policy_is_that_of_trl(models):
    model, theirs = models
    batch = replace(experience(model), old_logp=None, rollout_logp=None)
    stub = trl_trainer(theirs, **CASES["grpo"][1])
    loss = stub._compute_loss(theirs, as_trl(batch))
    loss.backward()
    assert add_policy_gradient(model, batch, GRPO, 30, TEMPERATURE)["loss/total"] == near(loss.item())
    assert distance(model, theirs) < 1e-5


@pytest.mark.parametrize(("margin", "center"), [(0.0, 0.0), (0.7, 0.01)])
def test_the_loss_of_a_reward_model_and_the_gradient_of_every_weight_are_those_of_trl(margin, center, tmp_path):
    trainer, transformers = trl("trainer.reward_trainer"), pytest.importorskip("transformers")
    model = randomise(Transformer(tiny_config(heads=4), ScalarHead("linear")))
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = load(tmp_path, dtype=torch.float32, pad_token_id=0).train()
    lists = []
    for i, (prompt, lengths) in enumerate(SHAPES):
        rows = [[*random_ids(n - 1, seed=10 * i + j), 7] for j, n in enumerate(lengths[:2])]  # no padding id at the end
        lists.append([Row(random_ids(prompt, seed=i), row) for row in rows])
    lines = [Line(rows, [(0, 1)], margin=margin * (i + 1)) for i, rows in enumerate(lists)]
    config = RewardConfig("unused", "unused", center=center, micro_batch_tokens=20)
    loss, scores = add_reward_gradient(model, lines, config)

    rows = [[*rows[side].prompt, *rows[side].response] for side in (0, 1) for rows in lists]
    width = max(map(len, rows))
    inputs = {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows])}
    inputs["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    args = SimpleNamespace(center_rewards_coefficient=center or None)
    stub = SimpleNamespace(args=args, accelerator=same, model=theirs, _total_train_tokens=0, _tp_size=1)
    stub._metrics = {"train": defaultdict(list)}
    margins = torch.tensor([line.margin for line in lines])

    def forward(margin=None, **inputs):  # TRL hands the margin to the model too, and transformers' takes none
        return theirs(**inputs)

    inputs |= {"margin": margins} if margin else {}
    wanted = trainer.RewardTrainer.compute_loss(stub, forward, inputs)
    wanted.backward()
    assert loss == near(wanted.item())
    assert scores.max().item() == near(stub._metrics["train"]["max_reward"][0])
    assert distance(model, theirs) < 1e-5


# --- where both differ, from log-probs on ----------------------------------------------------------------------------


def both(o: PolicyLoss, x: dict[str, torch.Tensor], **options):
    """(ours, theirs), each a loss and its gradient by the log-probs, on the tensors of x."""
    found = []
    for theirs in (False, True):
        logp = x["logp"].clone().requires_grad_()
        if theirs:
            stub = trl_trainer(SimpleNamespace(training=True), **options)
            stub._get_per_token_logps_and_entropies = lambda *args, logp=logp, **kwargs: (logp, x["entropy"], None)
            ids = torch.zeros(x["mask"].shape, dtype=torch.long)
            inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
            inputs |= {"completion_mask": x["mask"], "num_items_in_batch": x["mask"].sum()}
            inputs |= {"advantages": x["advantages"], "old_per_token_logps": x["old"], "ref_per_token_logps": x["ref"]}
            loss = stub._compute_loss(None, inputs)
        else:
            loss, _ = policy_loss(logp, x["old"], x["ref"], x["advantages"], x["mask"], o, entropy=x["entropy"])
        loss.backward()
        found.append((loss.item(), logp.grad))
    return found


def tensors(rows: int = 4, time: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(4, rows, time, generator=g, dtype=torch.float64)
    mask = (torch.arange(time) < torch.tensor([5, 3, 4, 2])[:rows, None]).long()
    x = {"logp": noise[0] - 2, "old": noise[0] - 2 + 0.2 * noise[1], "ref": noise[0] - 2 + 0.5 * noise[2]}
    return x | {
        "entropy": noise[3].abs(),
        "mask": mask,
        "advantages": torch.tensor([1.0, -1.0, -0.5, 0.5])[:rows].double(),
    }


@pytest.mark.parametrize("name", ["grpo", "sapo", "dr_grpo"])
def test_a_row_without_tokens_counts_in_trls_mean_over_rows_and_not_in_ours(name):
    o, options = CASES[name]
    x = tensors()
    x["mask"][1] = 0  # a truncated completion, for instance, with mask_truncated_completions
    (ours, our_grad), (theirs, their_grad) = both(o, x, **options)
    assert ours == near(theirs * 4 / 3, 1e-7)  # TRL's temperatures of sapo are fp32
    torch.testing.assert_close(our_grad, their_grad * 4 / 3)
    rows = [0, 2, 3]
    (ours, _), (theirs, _) = both(o, {k: v[rows] for k, v in x.items()}, **options)
    assert ours == near(theirs, 1e-7)


def test_the_cap_of_cispo_is_an_absolute_number_on_both_sides():
    x = tensors()
    o = replace(preset_defaults("cispo")["loss"], w_max=0.9)  # read as 1 + 0.9 it would hardly bite
    (ours, our_grad), (theirs, their_grad) = both(o, x, loss_type="cispo", epsilon_high=0.9)
    assert ours == near(theirs, 1e-9)
    torch.testing.assert_close(our_grad, their_grad)
    assert ours != near(both(replace(o, w_max=1.9), x, loss_type="cispo", epsilon_high=0.9)[0][0], 1e-2)


def test_with_a_ratio_of_rows_trls_unbiased_kl_takes_the_rows_ratio():
    x = tensors()
    o = PolicyLoss(ratio_level="seq_mean", aggregation="seq_mean", kl="k3_is", kl_coef=0.3)
    options = {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3}
    (ours, _), (theirs, _) = both(o, x, use_bias_correction_kl=True, **options)
    keep, length = x["mask"], x["mask"].sum(1, keepdim=True)
    lr, d = (x["logp"] - x["old"]) * keep, x["logp"] - x["ref"]
    ratios = (lr.sum(1, keepdim=True) / length).exp() - lr.exp()
    apart = 0.3 * (ratios * (torch.exp(-d) + d - 1) * keep / length).sum() / 4
    assert theirs - ours == near(apart.item(), 1e-9) and abs(apart) > 1e-3
    # without the correction both take the plain k3, and with ratios of tokens both take theirs
    plain, same = both(replace(o, kl="k3"), x, **options)
    assert plain[0] == near(same[0], 1e-9)
    options["importance_sampling_level"] = "token"
    ours, theirs = both(replace(o, ratio_level="token"), x, use_bias_correction_kl=True, **options)
    assert ours[0] == near(theirs[0], 1e-9)
    torch.testing.assert_close(ours[1], theirs[1])


def test_the_unbiased_kl_is_trls_default():
    assert trl().GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default
    assert preset_defaults("grpo")["loss"].kl == "k3"


def test_trls_entropy_bonus_is_a_mean_over_tokens_beside_any_policy_loss():
    x = tensors()
    (ours, _), (theirs, _) = both(replace(SEQ, entropy_coef=0.1), x, loss_type="grpo", entropy_coef=0.1)
    keep, length = x["mask"], x["mask"].sum(1)
    over_rows = ((x["entropy"] * keep).sum(1) / length).mean()
    over_tokens = (x["entropy"] * keep).sum() / keep.sum()
    assert theirs - ours == near(0.1 * (over_rows - over_tokens).item(), 1e-9) and abs(over_rows - over_tokens) > 1e-2


def test_a_delta_below_the_clip_cuts_positive_advantages_in_trl_and_a_dual_clip_negative_ones():
    x = tensors()
    x["old"] = x["logp"] - 0.15  # a ratio of 1.16, between delta and 1 + ε
    (_, ours), (_, theirs) = both(replace(SEQ, dual_clip=1.1), x, loss_type="grpo", delta=1.1)
    rises, falls = ((sign * x["advantages"] > 0)[:, None] & (x["mask"] > 0) for sign in (1, -1))
    assert ours[rises].all() and not theirs[rises].any()
    assert theirs[falls].all() and not ours[falls].any()
    (_, ours), (_, theirs) = both(
        replace(SEQ, dual_clip=1.1, eps_high=0.05), x, loss_type="grpo", delta=1.1, epsilon_high=0.05
    )
    torch.testing.assert_close(ours, theirs)


def test_beyond_twenty_nats_our_ratio_stops_and_trls_does_not():
    x = tensors()
    x["old"] = x["logp"] - 25
    o = replace(SEQ, eps_low=float("inf"), eps_high=float("inf"))
    (_, ours), (_, theirs) = both(o, x, loss_type="grpo", epsilon=1e30, epsilon_high=1e30)
    assert not ours.any() and theirs.abs().max() > 1e9


def test_advantages_are_those_of_trl_up_to_its_rounding_where_rewards_agree():
    nanstd = trl("trainer.utils").nanstd
    rewards = torch.tensor([[1.0, 0.0, 0.5, float("nan"), 0.0, 2.0], [0.6] * 6])
    centred = rewards - rewards.nanmean(1, keepdim=True)  # as in GRPOTrainer._generate_and_score_completions
    theirs = (centred / (nanstd(rewards, dim=1).unsqueeze(1) + 1e-4)).nan_to_num(0.0)
    ids = torch.arange(2).repeat_interleave(6)
    torch.testing.assert_close(adv.grpo(rewards.flatten(), ids)[:6], theirs[0])
    torch.testing.assert_close(adv.grpo_mean(rewards.flatten(), ids)[:6], centred[0].nan_to_num(0.0))
    assert not adv.grpo(rewards.flatten(), ids)[6:].any() and 0 < theirs[1].abs().max() < 1e-3


def test_a_tie_is_wrong_for_trl_and_half_right_for_us():
    trainer = trl().RewardTrainer
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    args, model = SimpleNamespace(center_rewards_coefficient=None), SimpleNamespace(training=False)
    stub = SimpleNamespace(args=args, accelerator=same, model=model, _total_train_tokens=0)
    stub._metrics = {"eval": defaultdict(list)}
    scores = torch.tensor([1.0, 2.0, 1.0, 0.5])  # a tie, and a pair in the right order
    trainer.compute_loss(stub, lambda **inputs: SimpleNamespace(logits=scores.unsqueeze(-1)), {})
    assert stub._metrics["eval"]["accuracy"] == [0.5] and ranking_accuracy(scores[:2], scores[2:]) == 0.75
