"""Find the options that are set and change nothing, so that a run can name them at its start.

A single update of a rollout has every ratio at 1: there PPO's clip, GSPO's ratio of a row, SAPO's gate and CISPO's
bounded weight are all the same policy gradient.
"""

from collections.abc import Callable
from dataclasses import fields

from minirl.config import PolicyConfig


def _single(c: PolicyConfig, drift: bool = False) -> str:
    """Say that there is one update a rollout; empty where there are several. All reasons have this form."""
    once = c.epochs * c.mini_batches == 1
    return "every ratio is 1 in a single update of a rollout: raise epochs or mini_batches" if once else ""


def _one_ratio(c: PolicyConfig, drift: bool = False) -> str:
    """Say why every ratio is 1; empty where they differ."""
    return _single(c) or ("every ratio is 1 where loss.ratio_level is none" if c.loss.ratio_level == "none" else "")


def _unless(option: str, *values) -> Callable[[PolicyConfig, bool], str]:
    """Make the reason of options that act only where another option has one of these values."""

    def reason(c: PolicyConfig, drift: bool) -> str:
        value = _value(c, option)
        return "" if value in values else f"{option} is {value}"

    return reason


def _weights(c: PolicyConfig, drift: bool) -> str:
    """Say why a surrogate that bends the weights of tokens bends none.

    Not said of REINFORCE, which asks for no ratio, nor where a bound turns even the weight 1 into another one.
    """
    asked = c.loss.surrogate == "is_pg" and c.loss.ratio_level == "none"
    return "" if asked or not c.loss.w_min <= 1 <= c.loss.w_max else _one_ratio(c)


def _same_policy(c: PolicyConfig, drift: bool) -> str:
    """Say that the sampler's log-probs are the trainer's, but for rounding."""
    return "" if drift else "sampler and trainer are one model, so that its weights are 1"


def _no_group_mean(c: PolicyConfig, drift: bool) -> str:
    """Say that no completion is compared with the mean of its group, so that none can be left out of it."""
    advantage, baseline = _value(c, "advantage"), _value(c, "baseline")
    grouped = advantage not in (None, "reinforce", "reinforce_pp", "correct_only")  # None: PPO has no such choice
    grouped |= advantage == "reinforce" and baseline == "group_mean"
    return "" if grouped else "no completion is compared with the mean of its group"


def _never_negative(c: PolicyConfig, drift: bool) -> str:
    """Say that what concerns negative advantages alone has none to act on."""
    return "no advantage of correct_only is negative" if _value(c, "advantage") == "correct_only" else ""


# The order is a part of the meaning: of two reasons for one option the later, narrower one is said.
NO_EFFECT = (  # options, and why they change nothing by the config and `drift` (see below); empty where they act
    ("loss.ratio_level", lambda c, drift: "" if c.loss.ratio_level == "none" else _one_ratio(c)),
    ("loss.surrogate loss.w_min loss.w_max", _weights),
    ("loss.eps_low loss.eps_high loss.dual_clip loss.tau_pos loss.tau_neg", _one_ratio),
    ("loss.eps_low loss.eps_high loss.dual_clip", _unless("loss.surrogate", "clip")),
    ("loss.w_min loss.w_max", _unless("loss.surrogate", "is_pg")),
    ("loss.tau_pos loss.tau_neg", _unless("loss.surrogate", "sapo")),
    ("loss.kl_old_coef", _single),
    ("loss.opsm_delta", lambda c, drift: "" if drift else _single(c)),
    ("loss.importance", _same_policy),
    (
        "loss.importance_cap",
        _unless("loss.importance", "token_truncate", "seq_truncate", "token_mask", "seq_mask", "geo_mask"),
    ),
    ("loss.importance_floor", _unless("loss.importance", "token_mask", "seq_mask", "geo_mask")),
    ("loss.kl loss.kl_clamp", lambda c, drift: "" if c.loss.kl_coef else "loss.kl_coef is 0"),
    ("loss.kl_coef loss.kl_clamp", _unless("loss.kl", "k2", "k3", "k3_is")),
    ("loss.const_length", _unless("loss.aggregation", "seq_sum_const")),
    ("kl_target", _unless("adaptive_kl", "ziegler", "ppo_penalty")),
    ("kl_horizon", _unless("adaptive_kl", "ziegler")),
    ("truncation_penalty", _unless("truncation", "penalty")),
    ("overlong_penalty", lambda c, drift: "" if c.overlong_cache else "overlong_cache is 0"),
    ("max_gen_batches", _unless("dynamic_sampling", True)),
    ("value_coef", _unless("critic", "shared")),
    ("value_clip", lambda c, drift: "the critic stands where it stood in a single update" if _single(c) else ""),
    ("exclude_from_baseline", _no_group_mean),
    ("loss.eps_low loss.dual_clip loss.opsm_delta", _never_negative),
    ("top_k top_p min_p stop", lambda c, drift: "stored completions are not sampled, evaluation is" if c.data else ""),
    ("baseline", _unless("advantage", "reinforce")),
    ("gamma", _unless("advantage", "reinforce", "reinforce_pp", None)),  # None: PPO has no such choice
    (
        "rewards",
        lambda c, drift: "correct_only takes the verdict alone" if _value(c, "advantage") == "correct_only" else "",
    ),
)


def without_effect(config: PolicyConfig, drift: bool = False) -> list[str]:
    """Name the options that are not at their defaults and cannot change what a run trains on, each with the reason.

    `drift`: the policy that drew the completions may be another than the trained one, by stored log-probs or bfloat16.
    """
    found: dict[str, str] = {}
    for names, why in NO_EFFECT:
        for name in names.split():
            if _is_set(config, name) and (reason := why(config, drift)):
                found[name] = reason  # the later one is the narrower
    reasons = dict.fromkeys(found.values())
    return [f"{', '.join(name for name in found if found[name] == reason)} ({reason})" for reason in reasons]


def _value(config: PolicyConfig, name: str):
    """Return the value of an option such as loss.kl; None where this config has no such option."""
    owner = config.loss if name.startswith("loss.") else config
    return getattr(owner, name.removeprefix("loss."), None)


def _is_set(config: PolicyConfig, name: str) -> bool:
    """Tell whether an option has another value than its default."""
    owner = config.loss if name.startswith("loss.") else config
    return any(f.name == name.removeprefix("loss.") and _value(config, name) != f.default for f in fields(owner))
