"""Options that are set and change nothing are named at the start, and presets bring the updates that they need."""

import ast
import inspect
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, TASK, Quiet, has_seven, sevens
from safetensors.torch import load_file

from minirl import presets as presets_module
from minirl.grpo import GRPOConfig
from minirl.lab.no_effect import without_effect
from minirl.lab.training import train_grpo
from minirl.losses import PolicyLoss
from minirl.ppo import PPOConfig
from minirl.presets import PRESETS, overrides, preset_defaults, presets

SINGLE = "every ratio is 1 in a single update of a rollout: raise epochs or mini_batches"
FLAT = "every ratio is 1 where loss.ratio_level is none"


@pytest.fixture
def trained(checkpoint, tmp_path):
    """The weights after a step in one vector."""

    numbers = count()

    def weights(**changes) -> torch.Tensor:
        out, once = str(tmp_path / f"run{next(numbers)}"), {"steps": 1, "eval_prompts": 1, "eval_samples": 1}
        config = GRPOConfig(**{"model": str(checkpoint), "out": out, **SMALL, **once, **changes})
        task = replace(TASK, rewards={"seven": (1.0, has_seven), "sevens": (0.2, sevens)})
        model = train_grpo(config, Quiet(), task) / "model.safetensors"
        return torch.cat([weight.flatten() for weight in load_file(model).values()])

    return weights


def config(loss: dict | None = None, **changes) -> GRPOConfig:
    return GRPOConfig("model", loss=PolicyLoss(**loss or {}), **changes)


IDLE = {
    "row ratio": ({"ratio_level": "seq_mean"}, {}, ["loss.ratio_level"], SINGLE),
    "gate": ({"surrogate": "sapo", "tau_pos": 2.0}, {}, ["loss.surrogate", "loss.tau_pos"], SINGLE),
    "weights": ({"surrogate": "is_pg", "w_max": 5.0}, {}, ["loss.surrogate", "loss.w_max"], SINGLE),
    "clips": ({"eps_high": 0.0, "eps_low": 0.0, "dual_clip": 1.5}, {}, ["eps_low", "eps_high", "dual_clip"], SINGLE),
    "old kl": ({"kl_old_coef": 3.0}, {}, ["loss.kl_old_coef"], SINGLE),
    "off-policy mask": ({"opsm_delta": 0.1}, {}, ["loss.opsm_delta"], SINGLE),
    "no ratio": ({"ratio_level": "none", "eps_high": 0.0}, {"mini_batches": 2}, ["loss.eps_high"], FLAT),
    "other surrogate": (
        {"surrogate": "is_pg", "eps_low": 0.0, "tau_neg": 3.0},
        {"mini_batches": 2},
        ["loss.eps_low", "loss.tau_neg"],
        "loss.surrogate is is_pg",
    ),
    "no kl": ({"kl_coef": 0.3, "kl_clamp": 0.1}, {}, ["loss.kl_coef", "loss.kl_clamp"], "loss.kl is none"),
    "kl of weight 0": ({"kl": "k3"}, {}, ["loss.kl"], "loss.kl_coef is 0"),
    "no wrong ones": (
        {"opsm_delta": 0.0, "eps_low": 0.0},
        {"advantage": "correct_only", "mini_batches": 2},
        ["loss.opsm_delta", "loss.eps_low"],
        "no advantage of correct_only is negative",
    ),
    "no group": (
        {},
        {"advantage": "reinforce", "baseline": "none", "truncation": "mask", "exclude_from_baseline": True},
        ["exclude_from_baseline"],
        "no completion is compared with the mean of its group",
    ),
    "one model": ({"importance": "seq_mask"}, {}, ["loss.importance"], "its weights are 1"),
    "no weights": ({"importance_cap": 1.0}, {}, ["loss.importance_cap"], "loss.importance is none"),
    "no constant": ({"const_length": 9.0}, {}, ["loss.const_length"], "loss.aggregation is token_mean"),
    "no controller": ({}, {"kl_target": 0.1, "kl_horizon": 9}, ["kl_target", "kl_horizon"], "adaptive_kl is none"),
    "no penalty": ({}, {"truncation_penalty": 9.0}, ["truncation_penalty"], "truncation is keep"),
    "no cache": ({}, {"overlong_penalty": 9.0}, ["overlong_penalty"], "overlong_cache is 0"),
    "all groups": ({}, {"max_gen_batches": 2}, ["max_gen_batches"], "dynamic_sampling is False"),
    "completions": ({}, {"gamma": 0.5, "baseline": "none"}, ["baseline", "gamma"], "advantage is grpo"),
    "verdict": ({}, {"advantage": "correct_only", "rewards": ("sevens=3",)}, ["rewards"], "takes the verdict alone"),
}


@pytest.mark.parametrize("name", IDLE)
def test_what_is_named_changes_nothing(name, trained):
    """A step without the named options ends with the same weights, but for rounding."""
    loss, changes, named, reason = IDLE[name]
    said = " ".join(without_effect(config(loss, **changes)))
    assert all(option in said for option in named) and reason in said
    names = [option.removeprefix("loss.") for option in named]
    less = {option: value for option, value in loss.items() if option not in names}
    rest = {option: value for option, value in changes.items() if option not in names}
    got, wanted = trained(loss=PolicyLoss(**loss), **changes), trained(loss=PolicyLoss(**less), **rest)
    assert torch.allclose(got, wanted, atol=3e-4)  # Adam's first steps are lr·sign(g): 1e-2 where g is no rounding


ACTING = {
    "row ratio": ({"ratio_level": "seq_mean"}, {"mini_batches": 2}),
    "bounds that move a weight": ({"surrogate": "is_pg", "w_max": 0.5}, {}),
    "policy gradient": ({"ratio_level": "none", "surrogate": "is_pg"}, {}),
    "unbiased kl": ({"kl": "k3_is", "kl_coef": 0.1}, {}),
    "entropy": ({"entropy_coef": 0.1, "entropy_quantile": 0.2}, {}),
    "penalty": ({}, {"truncation": "penalty", "truncation_penalty": 2.0}),
    "discount": ({}, {"advantage": "reinforce", "gamma": 0.9, "baseline": "none"}),
}


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_is_not_named(name):
    loss, changes = ACTING[name]
    assert without_effect(config(loss, **changes)) == []


def test_options_of_ppo_are_named_too():
    set_all = {"value_coef": 1.0, "gamma": 0.9, "mini_batches": 2}
    assert without_effect(PPOConfig("model", **set_all)) == ["value_coef (critic is own)"]
    assert without_effect(PPOConfig("model", **set_all, critic="shared")) == []
    assert "value_clip" in " ".join(without_effect(PPOConfig("model", epochs=1, value_clip=0.05)))


def test_how_to_sample_has_no_effect_on_what_is_stored():
    assert "top_p, stop (stored" in " ".join(without_effect(config(data="stored.jsonl", top_p=0.5, stop=("x",))))


def test_what_corrects_for_another_policy_acts_where_there_is_one():
    other = config({"opsm_delta": 0.5, "importance": "token_truncate"})
    assert without_effect(other, drift=True) == []
    assert len(without_effect(other)) == 2


def made_by(preset: str) -> GRPOConfig | PPOConfig:
    if preset in presets(critic=True):
        return PPOConfig("model", **preset_defaults(preset, critic=True))
    return GRPOConfig("model", **preset_defaults(preset))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_nothing_without_effect(preset):
    """But for the weights against a sampler that is another engine: here it is the same model."""
    made = made_by(preset)
    assert without_effect(made, drift=True) == []
    assert len(without_effect(made)) == (preset in ("tis", "mis"))


SPECIAL = {  # of presets whose ratio makes them: the options without which they are another algorithm
    "dapo": {"eps_high": 0.2},
    "gspo": {"ratio_level": "token"},
    "gspo_token": {"ratio_level": "token"},
    "cispo": {"surrogate": "clip", "w_max": float("inf")},
    "sapo": {"surrogate": "clip"},
    "scaling_grpo": {"opsm_delta": None},
    "dual_clip": {"dual_clip": None},
}


@pytest.mark.parametrize("preset", SPECIAL)
def test_a_preset_whose_ratio_makes_it_trains_as_no_other_one(preset, trained):
    """With the updates a rollout that it brings; in a single one it would be the other to the bit."""
    chosen = preset_defaults(preset, 6, 4) | {"dynamic_sampling": False, "overlong_cache": 0, "lr": 0.1}
    chosen |= {"lr": 0.006, "group": 32} if preset == "dapo" else {}  # so that some ratios are between 1.2 and 1.28
    plain = chosen | {"loss": replace(chosen["loss"], **SPECIAL[preset])}
    assert not torch.allclose(trained(**chosen), trained(**plain), atol=1e-3)
    once = without_effect(GRPOConfig("model", **chosen | {"mini_batches": 1}))
    assert once and SINGLE in once[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_a_preset_is_one_of_its_command(preset, monkeypatch):
    """Another name raises, so that no row sets what nobody reads."""
    made, row = made_by(preset), overrides(preset, SimpleNamespace(max_tokens=256, prompts=16))
    assert {name: getattr(made, name, "gae") for name in row} == row
    monkeypatch.setitem(PRESETS, preset, PRESETS[preset] | {"keep_sampling_mask": True})
    with pytest.raises(TypeError, match="keep_sampling_mask"):
        made_by(preset)


def test_every_preset_writes_out_how_it_aggregates():
    """Another default of PolicyLoss changes no algorithm."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(presets_module))) if isinstance(node, ast.Call)]
    losses = [{word.arg for word in call.keywords} for call in calls if ast.unparse(call.func) == "PolicyLoss"]
    assert losses and all("aggregation" in words for words in losses)


def test_a_run_says_at_its_start_what_has_no_effect(checkpoint, tmp_path):
    def lines(name: str, **changes) -> list[str]:
        made = GRPOConfig(**{"model": str(checkpoint), "out": str(tmp_path / name), **SMALL, "steps": 1, **changes})
        display = Quiet()
        train_grpo(made, display, TASK)
        return [line for line in display.lines if "without effect" in line]

    once = preset_defaults("gspo", 6, 1) | {"prompts": 1, "kl_target": 1.0}
    assert lines("gspo", **once) == [
        f"without effect in this run: loss.ratio_level, loss.eps_low, loss.eps_high ({SINGLE}); "
        "kl_target (adaptive_kl is none)"
    ]
    assert lines("plain") == []
