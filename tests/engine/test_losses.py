"""The policy loss against golden numbers, a scalar derivation, autograd on the papers' formulas, and its promises."""

import ast
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN, close, f64, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl import advantages as adv
from minirl import losses
from minirl.errors import InputError
from minirl.kernels import TokenInputs, TokenLoss, token_loss
from minirl.loss_metrics import combine_metrics
from minirl.losses import PolicyLoss, Totals, aggregation_weights, policy_loss, value_loss
from minirl.presets import PRESETS, overrides

INF, NAN = math.inf, math.nan
SURROGATE_OPTIONS = {
    "clip": {"surrogate": "clip", "eps_high": 0.28, "dual_clip": 1.6},
    "is_pg": {"surrogate": "is_pg", "w_min": 0.7, "w_max": 1.3},
    "sapo": {"surrogate": "sapo"},
}
LEVELS = ["token", "seq_mean", "seq_sum", "none"]
KLS = ["none", "k2", "k3", "k3_is"]
AGGREGATIONS = ["seq_mean", "token_mean", "seq_sum_const", "seq_sum", "group_token_mean"]
IMPORTANCES = ["none", "token_truncate", "token_mask", "seq_truncate", "seq_mask", "geo_mask"]


def run(options, x, **changes):
    """policy_loss on the tensors of x, and its gradients: loss, metrics, dlogp, dentropy (None without entropy)."""
    x = {"old_logp": None, "ref_logp": None} | x | changes
    logp = x["logp"].detach().clone().requires_grad_()
    entropy = x["entropy"].detach().clone().requires_grad_() if x.get("entropy") is not None else None
    extra = {k: x[k] for k in ("rollout_logp", "group_ids", "totals") if k in x}
    A, mask = x["advantages"], x["mask"]
    loss, metrics = policy_loss(logp, x["old_logp"], x["ref_logp"], A, mask, options, entropy=entropy, **extra)
    loss.backward()
    return loss.detach(), metrics, logp.grad, None if entropy is None else entropy.grad


def batch(seed=0, rows=5, time=6, dtype=torch.float64, **fixed):
    """A full row, one with a stop, one with a hole (tool output), an empty one, then random ones; 2 rows a group."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale, shift=0.0, shape=(rows, time)):
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift

    mask = torch.ones(rows, time)
    for i, length in enumerate(torch.randint(1, time + 1, (rows,), generator=g).tolist()):
        mask[i, length:] = 0
    special = [[1] * time, [1, 1, 1] + [0] * (time - 3), [1, 0, 0, 1, 1] + [0] * (time - 5), [0] * time]
    mask[: min(4, rows)] = torch.tensor(special, dtype=mask.dtype)[:rows]
    logp = normal(0.8, -2)
    x = {"logp": logp, "old_logp": logp + normal(0.3), "ref_logp": logp + normal(0.5)}
    x |= {"rollout_logp": logp + normal(0.3)}
    x |= {"advantages": normal(1, shape=(rows,)), "entropy": normal(0.5).abs() + 0.1}
    x = {k: v.to(dtype) for k, v in x.items()}
    return x | {"mask": mask, "group_ids": torch.arange(rows) // 2} | fixed


def options(surrogate="clip", level="token", kl="none", aggregation="token_mean", importance="none", **more):
    row = {"ratio_level": level, "kl": kl, "kl_coef": 0.1 if kl != "none" else 0.0, "aggregation": aggregation}
    row |= {"const_length": 7 if aggregation == "seq_sum_const" else None, "importance": importance}
    return PolicyLoss(**(row | {"importance_cap": 1.4, "importance_floor": 0.7} | SURROGATE_OPTIONS[surrogate] | more))


# ---- golden numbers --------------------------------------------------------------------------------------------------


SIGNED = [
    (n, sign)
    for n in ("ppo_clip", "clip_higher", "dual_clip", "cispo", "sapo")
    for sign in GOLDEN[f"surrogate_{n}"]["expected"]
]


@pytest.mark.parametrize(("name", "sign"), SIGNED)
def test_surrogate_value_gradient_and_clip_flags_match_golden(name, sign):
    x, params, expected = golden(f"surrogate_{name}")
    params = {"dual_clip" if k == "dual_c" else k: v for k, v in params.items()}
    o = PolicyLoss(surrogate={"cispo": "is_pg", "sapo": "sapo"}.get(name, "clip"), aggregation="seq_sum", **params)
    for i, (logp, old) in enumerate(zip(x["logp"], x["old_logp"], strict=True)):
        token = {"logp": logp.view(1, 1), "old_logp": old.view(1, 1)}
        loss, metrics, grad, _ = run(o, token | {"advantages": x[sign].view(1), "mask": torch.ones(1, 1)})
        close(loss, expected[sign]["loss"][i])
        close(grad.squeeze(), expected[sign]["dlogp"][i])
        for flag in ("high", "low", "dual") if "clip_high" in expected[sign] else ():
            assert metrics[f"clip/{flag}"] == expected[sign][f"clip_{flag}"][i]


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_is"])
def test_kl_value_and_gradient_match_golden(kl):
    x, _, expected = golden("kl_estimators")
    x = {k: v[:, None] for k, v in x.items()} | {"advantages": torch.zeros(6), "mask": torch.ones(6, 1)}
    for i in range(6):
        row = {k: v[i : i + 1] for k, v in x.items()}
        loss, _, grad, _ = run(PolicyLoss(kl=kl, kl_coef=1.0), row)
        close(loss, expected[kl]["value"][i])
        close(grad.squeeze(), expected[kl]["dlogp"][i])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_grpo_loss_under_every_aggregation_matches_golden(aggregation):
    x, p, expected = golden("grpo_loss_aggregations")
    expected = expected[aggregation]
    o = PolicyLoss(kl="k3", kl_coef=p["beta"], aggregation=aggregation, const_length=p["const_len"])
    loss, metrics, grad, _ = run(o, x)
    close(loss, expected["loss"])
    close(grad, expected["dlogp"])
    close(metrics["loss/kl"], p["beta"] * expected["kl"])
    close(
        aggregation_weights(x["mask"], o, Totals.of(x["mask"], x["group_ids"]), x["group_ids"], torch.float64),
        expected["weights"],
    )


@pytest.mark.parametrize("name", ["dr_grpo", "cispo", "gspo", "reinforce", "ppo_penalty"])
def test_named_losses_match_golden(name):
    x, p, expected = golden(f"{name}_loss")
    o = PolicyLoss(
        surrogate=p["surr"],
        aggregation=p["agg"],
        const_length=p.get("const"),
        ratio_level=p.get("level", "token"),
        **p["p"],
    )
    loss, metrics, grad, _ = run(o, x, advantages=f64(expected["advantages"]))
    close(loss, expected["loss"])
    close(grad, expected["dlogp"])
    ratio = f64(expected["ratio"])[x["mask"] > 0]
    for name, value in {
        "mean": ratio.mean(),
        "std": ratio.std(correction=0),
        "min": ratio.min(),
        "max": ratio.max(),
    }.items():
        close(metrics[f"ratio/{name}"], value)


def test_metrics_match_golden():
    x, p, expected = golden("policy_metrics")
    metrics = combine_metrics([run(PolicyLoss(**p), x)[1]])
    names = {"clip_frac_high": "clip/high", "clip_frac_low": "clip/low", "clip_frac": "clip/frac"}
    names |= {
        "approx_kl_k1": "kl_old/k1",
        "approx_kl_k3": "kl_old/k3",
        "ref_kl_k1": "kl_ref/k1",
        "ref_kl_k3": "kl_ref/k3",
    }
    names |= {"ratio_mean": "ratio/mean", "ratio_max": "ratio/max", "ratio_min": "ratio/min"}
    for theirs, ours in names.items():
        assert metrics[ours] == pytest.approx(expected[theirs], abs=1e-9), ours


def test_micro_batches_reproduce_the_golden_step_and_not_the_mean_of_means():
    x, p, expected = golden("micro_batch_invariance")
    o, totals = PolicyLoss(), Totals.of(x["mask"])
    parts = [run(o, {k: v[rows] for k, v in x.items()}, totals=totals) for rows in p["micro_batches"]]
    close(sum(part[0] for part in parts), expected["loss"])
    close(torch.cat([part[2] for part in parts]), expected["dlogp"])
    alone = [run(o, {k: v[rows] for k, v in x.items()})[0] for rows in p["micro_batches"]]
    close(sum(alone) / 2, expected["WRONG_mean_of_micro_means"])


def test_sft_and_rejection_sampling_are_rows_of_the_same_loss():
    x, _, expected = golden("sft_and_rft")
    o = PolicyLoss(ratio_level="none", surrogate="is_pg")
    loss, _, grad, _ = run(o, x, advantages=torch.ones(4))
    close(loss, expected["sft_token_mean"])
    close(grad, expected["sft_dlogp"])
    close(loss.exp(), expected["perplexity"])
    close(run(replace(o, aggregation="seq_mean"), x, advantages=torch.ones(4))[0], expected["sft_seq_mean"])
    A = adv.correct_only(x["correct"], torch.arange(4))
    loss, _, grad, _ = run(o, x, advantages=A, mask=x["mask"] * A[:, None])
    close(loss, expected["rft_token_mean"])
    close(grad, expected["rft_dlogp"])


@pytest.mark.parametrize("name", ["T1", "keep_sampling_mask"])
def test_gradient_through_the_softmax_matches_golden(name):
    x, p, expected = golden(f"softmax_core_{name}")
    logits = x["logits"].clone().requires_grad_()
    z = logits / p["temperature"]
    z = z if "keep_mask" not in x else z.masked_fill(x["keep_mask"] == 0, -INF)
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
    logp = log_p.gather(1, x["target"].long()[:, None]).squeeze(1)
    close(logp.detach(), expected["logp"])
    close(entropy.detach(), expected["entropy"])
    for i in range(3):  # one token each: c = −A and e = −α are the golden incoming gradients
        o = PolicyLoss(ratio_level="none", surrogate="is_pg", entropy_coef=-x["grad_entropy"][i].item())
        tokens = {"logp": logp[i].view(1, 1), "entropy": entropy[i].view(1, 1)}
        A = -x["grad_logp"][i].view(1)
        policy_loss(tokens["logp"], None, None, A, torch.ones(1, 1), o, entropy=tokens["entropy"])[0].backward(
            retain_graph=True
        )
    close(logits.grad, expected["dlogits"])


def test_end_to_end_logit_gradient_is_c_and_e_through_the_softmax():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    target, mask, T = torch.tensor([[0, 3, 1], [2, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), 0.9
    log_p = (logits / T).log_softmax(-1)
    logp, H = log_p.gather(2, target[..., None]).squeeze(2), -(log_p.exp() * log_p).sum(-1)
    noise = torch.randn(2, 2, 3, generator=g, dtype=torch.float64) * 0.2
    old, ref, A = logp.detach() + noise[0], logp.detach() + noise[1], f64([0.7, -0.7])
    o = PolicyLoss(kl="k3", kl_coef=0.04, entropy_coef=0.01, aggregation="seq_mean")
    policy_loss(logp, old, ref, A, mask, o, entropy=H)[0].backward()
    x = {"logp": logp.detach(), "old_logp": old, "ref_logp": ref, "entropy": H.detach(), "mask": mask}
    _, c, e = closed_form(o, x | {"advantages": A})
    p, hot = log_p.detach().exp(), torch.nn.functional.one_hot(target, 4)
    expected = (c[..., None] * (hot - p) - e[..., None] * p * (log_p.detach() + H.detach()[..., None])) / T
    close(logits.grad, expected)


def named_cases(statement: ast.stmt) -> Iterator[str]:
    """The texts in a test that reads the golden numbers, and what its f-strings make of them."""
    nodes = list(ast.walk(statement))
    if {"golden", "GOLDEN"} & {node.id for node in nodes if isinstance(node, ast.Name)}:
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        yield from texts
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                yield from ("".join(text if part is None else part for part in parts) for text in texts)


def test_every_golden_case_is_read_by_some_test():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert not GOLDEN.keys() - {name for tree in trees for part in tree.body for name in named_cases(part)}


# ---- the product of all options against two other derivations --------------------------------------------------------


def closed_form(o, x):
    """loss, c and e as the head of minirl/losses.py defines them, token by token in Python floats."""
    B, T = x["logp"].shape
    m = x["mask"].tolist()
    rows = [[t for t in range(T) if m[i][t]] for i in range(B)]
    n_seq, n_tok = sum(1 for r in rows if r), sum(len(r) for r in rows)
    gid = x.get("group_ids", torch.zeros(B)).tolist()
    group_tokens = {g: sum(len(rows[i]) for i in range(B) if gid[i] == g) for g in set(gid)}
    n_groups = sum(1 for n in group_tokens.values() if n)
    val = {k: v.tolist() for k, v in x.items() if k.endswith("logp") or k == "entropy"}
    A = x["advantages"] if x["advantages"].dim() == 2 else x["advantages"][:, None].expand(B, T)
    loss, c, e = 0.0, torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    for i, r in enumerate(rows):
        lr = {t: val["logp"][i][t] - val["old_logp"][i][t] for t in r}
        level = {"token": lr, "none": dict.fromkeys(r, 0.0), "seq_sum": dict.fromkeys(r, sum(lr.values()))}
        level["seq_mean"] = dict.fromkeys(r, sum(lr.values()) / max(len(r), 1))
        for t in r:
            a, rho = A[i, t].item(), math.exp(level[o.ratio_level][t])
            S, gain = surrogate_by_hand(o, rho, a, val["logp"][i][t])
            log_u = [val["old_logp"][i][s] - val["rollout_logp"][i][s] for s in r] if o.importance != "none" else []
            omega = importance_by_hand(o, log_u, r.index(t))
            K, kappa = kl_by_hand(o.kl, val["logp"][i][t] - val["ref_logp"][i][t], math.exp(lr[t]))
            w = {"seq_mean": 1 / (n_seq * len(r)), "token_mean": 1 / n_tok, "seq_sum": 1 / n_seq}
            w |= {"seq_sum_const": 1 / (n_seq * (o.const_length or 1))}
            w |= {"group_token_mean": 1 / (n_groups * group_tokens[gid[i]])}
            w = w[o.aggregation]
            K_old, kappa_old = math.exp(lr[t]) - 1 - lr[t], math.exp(lr[t]) - 1
            once = len(r) if o.ratio_level == "seq_sum" and o.surrogate != "is_pg" else 1  # ρ of the row is one action
            loss += w * (omega * S / once + o.kl_coef * K + o.kl_old_coef * K_old)
            c[i, t] = w * (-omega * a * gain + o.kl_coef * kappa + o.kl_old_coef * kappa_old)
            if o.entropy_coef:
                loss -= w * o.entropy_coef * val["entropy"][i][t]
                e[i, t] = -w * o.entropy_coef
    return loss, c, e


def surrogate_by_hand(o, rho, a, logp):
    if o.surrogate == "is_pg":
        weight = min(max(rho, o.w_min), o.w_max)
        return -weight * a * logp, weight
    if o.surrogate == "sapo":
        tau = o.tau_pos if a > 0 else o.tau_neg
        sigma = 1 / (1 + math.exp(-tau * (rho - 1)))
        return -4 / tau * sigma * a, 4 * sigma * (1 - sigma) * rho
    dual = o.dual_clip or INF
    S = -min(rho * a, min(max(rho, 1 - o.eps_low), 1 + o.eps_high) * a)
    S = min(S, -dual * a) if a < 0 else S
    cut = (a > 0 and rho > 1 + o.eps_high) or (a < 0 and (rho < 1 - o.eps_low or rho > dual))
    return S, 0.0 if cut else rho


def kl_by_hand(kind, d, rho):
    k3 = math.exp(-d) + d - 1
    return {"none": (0, 0), "k2": (d * d / 2, d), "k3": (k3, 1 - math.exp(-d)), "k3_is": (rho * k3, rho * d)}[kind]


def importance_by_hand(o, log_u, t):
    if o.importance == "none":
        return 1.0
    level, mode = o.importance.split("_")
    u = math.exp({"token": log_u[t], "seq": sum(log_u), "geo": sum(log_u) / len(log_u)}[level])
    weight = 1.0 if level == "geo" else u
    return min(u, o.importance_cap) if mode == "truncate" else weight * (o.importance_floor <= u <= o.importance_cap)


def by_autograd(o, x):
    """The papers' formulas in plain torch, left to autograd; a sequence ratio in GSPO-token's form."""
    keep, n = x["mask"] > 0, x["mask"].sum(1, keepdim=True).double().clamp(min=1)
    logp, entropy = x["logp"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()
    lr = (logp - x["old_logp"]).masked_fill(~keep, 0)
    A = x["advantages"] if x["advantages"].dim() == 2 else x["advantages"][:, None].expand_as(lr)
    row = {"seq_mean": lr.sum(1, keepdim=True) / n, "seq_sum": lr.sum(1, keepdim=True)}.get(o.ratio_level, 0 * lr)
    rho = lr.exp() if o.ratio_level == "token" else (row.detach() + logp - logp.detach()).exp()
    if o.surrogate == "is_pg":
        S = -rho.detach().clamp(o.w_min, o.w_max) * A * logp
    elif o.surrogate == "sapo":
        tau = torch.full_like(A, o.tau_neg).masked_fill(A > 0, o.tau_pos)
        S = -4 / tau * torch.sigmoid(tau * (rho - 1)) * A
    else:
        S = -torch.min(rho * A, rho.clamp(1 - o.eps_low, 1 + o.eps_high) * A)
        S = torch.where(A < 0, torch.min(S, -(o.dual_clip or INF) * A), S)
    d = logp - x["ref_logp"]
    k3 = (-d).exp() + d - 1
    K = {"none": 0 * d, "k2": d**2 / 2, "k3": k3, "k3_is": lr.exp() * k3}[o.kl].clamp(max=o.kl_clamp or INF)
    K = o.kl_coef * K + o.kl_old_coef * (lr.exp() - 1 - lr)
    S = S * omega_by_torch(o, x, keep, n, A)
    if o.ratio_level == "seq_sum" and o.surrogate != "is_pg":
        S = S + S.detach() * (1 / n - 1)  # a row is one action: its value counts once, its gradient is token-local
    w = aggregation_weights(x["mask"], o, Totals.of(x["mask"], x["group_ids"]), x["group_ids"], torch.float64)
    loss = (w * (S + K - o.entropy_coef * entropy)).sum()
    loss.backward()
    return loss.detach(), logp.grad, torch.zeros_like(entropy) if entropy.grad is None else entropy.grad


def omega_by_torch(o, x, keep, n, A):
    """Importance weight × off-policy sequence mask (2512.02556 §3.1) × the tokens of highest entropy, as constants."""
    level, _, mode = o.importance.partition("_")
    lr = (x["old_logp"] - x["rollout_logp"]).masked_fill(~keep, 0)
    log_u = {"token": lr, "seq": lr.sum(1, keepdim=True), "geo": lr.sum(1, keepdim=True) / n}.get(level, 0 * lr)
    u = log_u.exp().expand_as(A)
    inside = (o.importance_floor <= u) & (u <= o.importance_cap)
    weight = torch.ones_like(u) if level == "geo" else u
    omega = {"": torch.ones_like(A), "truncate": u.clamp(max=o.importance_cap), "mask": weight * inside}[mode]
    if o.opsm_delta is not None:
        drift = (x["rollout_logp"] - x["logp"]).masked_fill(~keep, 0).sum(1, keepdim=True) / n
        omega = omega * ~((A < 0) & (drift > o.opsm_delta))
    if o.entropy_quantile is not None:
        omega = omega * (x["entropy"] >= x["entropy"][keep].quantile(1 - o.entropy_quantile))
    return omega


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", list(SURROGATE_OPTIONS))
def test_loss_and_gradient_equal_the_closed_form_and_autograd(surrogate, level, kl, aggregation):
    x = batch(seed=1)
    for importance, alpha in itertools.product(IMPORTANCES, (0.0, 0.03)):
        o = options(surrogate, level, kl, aggregation, importance, entropy_coef=alpha)
        loss, _, c, e = run(o, x)
        e = torch.zeros_like(c) if e is None else e
        hand, hand_c, hand_e = closed_form(o, x)
        close(loss, hand, 1e-12)
        close(c, hand_c, 1e-12)
        close(e, hand_e, 1e-12)
        theirs, their_c, their_e = by_autograd(o, x)
        close(loss, theirs, 1e-12)
        close(c, their_c, 1e-12)
        close(e, their_e, 1e-12)


FURTHER = {
    "no clip": {"eps_low": INF, "eps_high": INF, "dual_clip": None},
    "penalty to the old policy": {"kl_old_coef": 0.5},
    "clamped KL": {"kl_clamp": 0.05},
    "off-policy sequence mask": {"opsm_delta": 0.05},
    "top entropy": {"entropy_quantile": 0.4},
}


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("kl", ["none", "k3"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FURTHER)
def test_loss_and_gradient_under_every_further_option_are_those_of_autograd(name, level, kl, of_tokens):
    x = batch(seed=26, rows=8)
    if of_tokens:
        x["advantages"] = torch.randn(8, 6, generator=torch.Generator().manual_seed(27), dtype=torch.float64)
    moved = False
    for surrogate, importance in itertools.product(SURROGATE_OPTIONS, ("none", "seq_mask")):
        plain = options(surrogate, level, kl, "seq_mean", importance, entropy_coef=0.03)
        o = replace(plain, **FURTHER[name])
        found, wanted = run(o, x), by_autograd(o, x)
        for ours, theirs in zip((found[0], found[2], found[3]), wanted, strict=True):
            close(ours, theirs, 1e-12)
        moved = moved or not found[2].equal(run(plain, x)[2])
    assert moved == ((name, kl) != ("clamped KL", "none") and (name, level) != ("no clip", "none"))


CONSTANT_WEIGHT = {"w_min": 0.9, "w_max": 0.9}  # of is_pg: the gradient never sees how a weight changes
MOVING = [(s, level) for s in ("clip", "sapo") for level in ("token", "seq_mean", "seq_sum")]  # the value has a ρ


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("surrogate", "level"), [*MOVING, *(("is_pg", level) for level in LEVELS)])
def test_gradient_is_the_numerical_derivative_of_the_value(surrogate, level, aggregation):
    x, h = batch(seed=2, rows=6), 1e-5
    more = {"entropy_coef": 0.1, "kl_old_coef": 0.3} | (CONSTANT_WEIGHT if surrogate == "is_pg" else {})
    towards = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for kl, importance in (("none", "none"), ("k3_is", "seq_truncate"), ("k2", "geo_mask"), ("k3", "seq_mask")):
        o = options(surrogate, level, kl, aggregation, importance, **more)

        def value(step, o=o):
            moved = {"logp": x["logp"] + step * towards[0], "entropy": x["entropy"] + step * towards[1]}
            return run(o, x | moved)[0].item()

        _, _, c, e = run(o, x)
        slope = (value(h) - value(-h)) / (2 * h)
        assert slope == pytest.approx(((c * towards[0]).sum() + (e * towards[1]).sum()).item(), rel=1e-6, abs=1e-8)


def test_a_product_of_ratios_is_reported_once_a_row():
    """REINFORCE with importance sampling by whole rows: L = −mean_i ρ_i A_i, whatever the lengths."""
    x = batch(seed=7, rows=4)
    o = PolicyLoss(ratio_level="seq_sum", eps_low=INF, eps_high=INF, aggregation="seq_sum")
    ratios = ((x["logp"] - x["old_logp"]) * x["mask"]).sum(1).exp()
    counted = x["mask"].any(1)
    close(run(o, x)[0], -(ratios * x["advantages"])[counted].mean())
    A = torch.randn(4, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)  # of tokens: their mean
    mean = (A * x["mask"]).sum(1) / x["mask"].sum(1).clamp(min=1)
    close(run(o, x, advantages=A)[0], -(ratios * mean)[counted].mean())


def test_geo_mask_rejects_rows_and_weighs_none():
    x = {"logp": f64([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]]), "mask": torch.ones(3, 2)}
    x |= {"old_logp": x["logp"], "ref_logp": x["logp"], "advantages": torch.ones(3, dtype=torch.float64)}
    x["rollout_logp"] = x["logp"] - f64([[0.3, 0.1], [1.0, 0.8], [-2.0, 0.4]])  # geometric means e^0.2, e^0.9, e^-0.8
    o = PolicyLoss(importance="geo_mask", importance_cap=2.0, importance_floor=0.5, aggregation="seq_mean")
    _, metrics, c, _ = run(o, x)
    close(c, -f64([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]) / 6)
    close(metrics["tis/masked_frac"], 2 / 3)
    close(metrics["tis/mean"], f64([0.2, 0.9, -0.8]).exp().mean())  # logged as it is


def test_the_quantile_of_the_entropy_is_taken_of_any_number_of_tokens():
    """Tensor.quantile ends at 2²⁴ entries; between two order statistics both interpolate linearly."""
    n = (1 << 24) + 2
    entropy = torch.arange(n, 0, -1, dtype=torch.int32)[None]  # 1 … n, backwards
    floor = Totals.of(torch.ones(1, 1, dtype=torch.bool).expand(1, n), None, entropy, 0.2).entropy_floor
    assert floor == pytest.approx(1 + 0.8 * (n - 1), rel=1e-12)
    few = torch.randn(1, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for size in (1, 2, 9):
        for share in (0.2, 0.35, 0.999, 1.0):
            found = Totals.of(torch.ones(1, size), None, few[:, :size], share).entropy_floor
            assert found == pytest.approx(few[0, :size].quantile(1 - share).item(), rel=1e-12)


# ---- edges of the formulas -------------------------------------------------------------------------------------------


def one_token(lr, A, **more):
    x = {
        "logp": f64([[lr]]),
        "old_logp": f64([[0.0]]),
        "ref_logp": f64([[0.0]]),
        "advantages": f64([A]),
        "mask": torch.ones(1, 1),
    }
    return x | more


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_gradient_flows_where_the_ratio_equals_the_clip_bound(A):
    _, metrics, grad, _ = run(PolicyLoss(eps_low=0.0, eps_high=0.0), one_token(0.0, A))
    assert grad.item() == -A
    assert metrics["clip/frac"] == 0


def test_gradient_flows_where_the_ratio_equals_the_dual_clip():
    ratio = f64(1.1).exp().item()
    assert run(PolicyLoss(dual_clip=ratio), one_token(1.1, -1.0))[2].item() == ratio
    assert run(PolicyLoss(dual_clip=ratio), one_token(1.1 + 1e-12, -1.0))[2].item() == 0


def test_zero_advantage_gives_zero_gradient_at_any_ratio():
    for lr, (name, level) in itertools.product((-30, -1, 0, 1, 30), itertools.product(SURROGATE_OPTIONS, LEVELS)):
        assert run(options(name, level), one_token(float(lr), 0.0))[2].item() == 0


@pytest.mark.parametrize("lr", [-25.0, 25.0, 800.0])
def test_exponents_beyond_the_guard_are_finite_and_without_gradient(lr):
    unclipped = PolicyLoss(eps_low=INF, eps_high=INF)
    loss, metrics, grad, _ = run(unclipped, one_token(lr, 1.0))
    close(loss, -math.exp(20 if lr > 0 else -20))
    assert grad.item() == 0
    assert metrics["ratio/guarded"] == 1
    inside = run(unclipped, one_token(20.0, 1.0))[2]
    close(inside.squeeze(), -math.exp(20))


GRID = f64([-60, -25, -20.001, -20, -19.999, -3, -0.2, 0.2, 3, 19.999, 20, 20.001, 25, 60])  # of log-ratios
KL_OPTIONS = {"k2": {"kl": "k2", "kl_coef": 1.0}, "k3": {"kl": "k3", "kl_coef": 1.0}, "k3_is": {"kl": "k3_is"}}
KL_OPTIONS["k3_is"] |= {"kl_coef": 1.0}
KL_OPTIONS["old"] = {"kl_old_coef": 1.0}


def kl_alone(name, logp, d, token_lr):
    """Value and slope of a KL of each token: d = ℓ − ℓr, token_lr = ℓ − ℓo, no advantage."""
    o, nothing = TokenLoss(**KL_OPTIONS[name]), torch.zeros_like(logp)
    terms = token_loss(o, logp, None, TokenInputs(nothing, nothing + 1, old_logp=logp - token_lr, ref_logp=logp - d))
    return terms.kl, terms.c


@pytest.mark.parametrize("name", KL_OPTIONS)
def test_beyond_the_guard_a_kl_still_pulls_towards_the_other_policy(name):
    """The true slopes: d, 1 − e^{−d}, ρd and ρ − 1, where the guard lets the exponential only reach e^20."""
    d, lr = (x.flatten() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
    slope = kl_alone(name, torch.full_like(d, -30.0), d, lr)[1]
    g = lambda x: x.clamp(-20, 20).exp()  # noqa: E731
    wanted = {"k2": d, "k3": 1 - g(-d), "k3_is": g(lr) * d, "old": g(lr) - 1}[name]
    towards = lr if name == "old" else d
    assert (slope.sign() == towards.sign()).all()
    close(slope, wanted, 1e-8)
    inside = (d.abs() <= 20) & (lr.abs() <= 20)
    close(
        slope[inside], {"k2": d, "k3": 1 - (-d).exp(), "k3_is": lr.exp() * d, "old": lr.exp() - 1}[name][inside], 1e-8
    )


@pytest.mark.parametrize("name", KL_OPTIONS)
def test_the_value_of_a_kl_is_the_integral_of_its_slope_on_both_sides_of_the_guard(name):
    d, lr = (x.flatten() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
    zero, h = torch.zeros_like(d), 1e-2  # the step ℓ → ℓ ± h moves both; it crosses the guard's edges too
    slope = kl_alone(name, zero, d, lr)[1]
    above, value, below = (kl_alone(name, zero, d + step, lr + step)[0] for step in (h, 0.0, -h))
    noise = 1e-9 + 1e-14 * value / h  # of the difference of two large values; at an edge the slope's own bends
    assert ((above - below) / (2 * h) - slope).abs().le(1e-2 * slope.abs() + noise).all()
    assert (value > -1e-4).all()  # beyond lr = −20 the ratio is held too large, at 2e-9, and the fall of K with it


def test_the_weighted_k3_of_a_token_far_from_the_reference_has_the_true_slope():
    x = one_token(-30.0, 0.0, old_logp=f64([[-30.0]]), ref_logp=f64([[-5.0]]))
    loss, _, grad, _ = run(PolicyLoss(kl="k3_is", kl_coef=1.0), x)
    close(grad.squeeze(), -25.0)
    close(loss, math.exp(25) - 26)
    close(run(PolicyLoss(kl="k3", kl_coef=1.0), x)[2].squeeze(), 1 - math.exp(20))
    close(run(PolicyLoss(kl_old_coef=1.0), x | {"old_logp": f64([[-2.0]])})[2].squeeze(), math.exp(-20) - 1)


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_is"])
def test_clamped_kl_keeps_the_bound_as_value_and_loses_its_gradient(kl):
    x = one_token(0.1, 0.0, ref_logp=f64([[3.1]]))  # d = −3
    free, _, slope, _ = run(PolicyLoss(kl=kl, kl_coef=1.0), x)
    assert free > 4 and slope != 0
    loss, _, grad, _ = run(PolicyLoss(kl=kl, kl_coef=1.0, kl_clamp=4.0), x)
    assert loss == 4 and grad == 0
    assert run(PolicyLoss(kl=kl, kl_coef=1.0, kl_clamp=free.item()), x)[2] == slope


# ---- constant factors of the surrogate -------------------------------------------------------------------------------


def test_off_policy_sequence_mask_drops_drifted_rows_with_negative_advantage_from_the_surrogate_only():
    x, _, _ = golden("policy_metrics")  # mean of ℓo − ℓ: .02, −.0075, −.075, .188
    x["advantages"] = f64([-1.0, -1.0, -1.0, -1.0])
    base = PolicyLoss(kl="k3", kl_coef=0.1)
    for delta, dropped in ((0.01, [0, 3]), (0.1, [3]), (0.2, [])):
        _, metrics, grad, _ = run(replace(base, opsm_delta=delta), x)
        A = x["advantages"].clone()
        A[dropped] = 0
        close(grad, run(base, x, advantages=A)[2])
        close(metrics["opsm/masked_frac"], sum(x["mask"][i].sum() for i in dropped) / 16)
    positive = run(replace(base, opsm_delta=0.0), x, advantages=-x["advantages"])[2]
    close(positive, run(base, x, advantages=-x["advantages"])[2])


def test_off_policy_sequence_mask_measures_drift_from_the_sampler_when_it_is_known():
    x, _, _ = golden("policy_metrics")
    x["advantages"] = -torch.ones(4, dtype=torch.float64)
    metrics = run(PolicyLoss(opsm_delta=0.01), x, rollout_logp=x["logp"] - 1)[1]
    assert metrics["opsm/masked_frac"] == 0
    metrics = run(PolicyLoss(opsm_delta=0.01), x, rollout_logp=x["logp"] + 1)[1]
    assert metrics["opsm/masked_frac"] == 1


def test_off_policy_sequence_mask_takes_the_sign_of_each_tokens_advantage():
    x, _, _ = golden("policy_metrics")
    A = torch.ones(4, 5, dtype=torch.float64)
    A[3, 1] = -1.0  # row 3 drifted
    o = PolicyLoss(ratio_level="none")
    close(run(replace(o, opsm_delta=0.1), x, advantages=A)[2], run(o, x, advantages=A.clamp(min=0))[2])


def test_top_entropy_mask_trains_on_that_share_of_the_tokens():
    x = batch(seed=8, rows=6)
    o = PolicyLoss(ratio_level="none", surrogate="is_pg", entropy_quantile=0.25)
    _, _, grad, entropy_grad = run(o, x, advantages=torch.ones(6))
    keep = x["mask"] > 0
    trained = grad[keep] != 0
    assert trained.sum() == math.ceil(0.25 * keep.sum())
    assert x["entropy"][keep][trained].min() > x["entropy"][keep][~trained].max()
    assert entropy_grad is None
    everything = run(replace(o, entropy_quantile=1.0), x, advantages=torch.ones(6))[2]
    assert (everything[keep] != 0).all()


def test_importance_weights_leave_the_kl_alone():
    x = batch(seed=9)
    for importance in IMPORTANCES:
        o = options("clip", kl="k3", importance=importance)
        close(
            run(o, x, advantages=torch.zeros(5))[2], run(replace(o, importance="none"), x, advantages=torch.zeros(5))[2]
        )


def test_importance_and_mismatch_metrics_describe_sampler_against_trainer():
    lr = f64([[0.0, 0.5, -0.2], [-1.2, 0.05, 9.0]])
    x = {"logp": lr, "old_logp": lr, "rollout_logp": 0 * lr, "advantages": f64([1.0, 1.0])}
    x["mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    u = lr.exp()[x["mask"] > 0]
    metrics = run(PolicyLoss(importance="token_mask", importance_cap=2.0, importance_floor=0.5), x)[1]
    close(metrics["tis/mean"], u.mean())
    close(metrics["tis/max"], u.max())
    close(metrics["tis/ess"], u.sum() ** 2 / (5 * (u**2).sum()))
    close(metrics["tis/masked_frac"], 1 / 5)
    close(metrics["mismatch/abs_mean"], 1.95 / 5)
    close(metrics["mismatch/abs_max"], 1.2)
    close(metrics["mismatch/k3"], (u - 1 - u.log()).mean())
    close(metrics["mismatch/outside"], 3 / 5)


# ---- promises --------------------------------------------------------------------------------------------------------


def test_missing_old_policy_gives_ratio_one_and_the_reinforce_gradient():
    x = batch(seed=10)
    for level, surrogate in itertools.product(LEVELS, SURROGATE_OPTIONS):
        _, metrics, grad, _ = run(options(surrogate, level, aggregation="seq_mean"), x, old_logp=None)
        w = aggregation_weights(x["mask"], options(aggregation="seq_mean"), Totals.of(x["mask"]), dtype=torch.float64)
        close(grad, -w * x["advantages"][:, None], 1e-12)
        assert metrics["ratio/mean"] == 1 and metrics["ratio/std"] == 0 and metrics["kl_old/k3"] == 0


def test_group_without_variance_has_no_policy_gradient_but_keeps_its_kl():
    x = batch(seed=11)
    rewards = f64([0.3, 0.3, 1.0, 0.0, 0.7])
    A = adv.grpo(rewards, x["group_ids"])
    without, with_kl = (run(options("clip", kl=kl), x, advantages=A)[2] for kl in ("none", "k3"))
    assert (without[:2] == 0).all() and (without[2] != 0).any()
    assert (with_kl[:2][x["mask"][:2] > 0] != 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_masked_batch_has_loss_zero_and_gradient_zero(aggregation):
    x = batch(seed=12, mask=torch.zeros(5, 6))
    o = options(
        "clip", "seq_mean", "k3", aggregation, "seq_mask", entropy_coef=0.1, opsm_delta=0.1, entropy_quantile=0.2
    )
    loss, metrics, grad, entropy_grad = run(o, x)
    assert loss == 0 and (grad == 0).all() and (entropy_grad == 0).all()
    combined = combine_metrics([metrics])
    assert combined["ratio/mean"] == 0 and math.isnan(combined["ratio/min"])


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_garbage_under_the_mask_changes_nothing(garbage):
    x = batch(seed=13, advantages=torch.randn(5, 6, dtype=torch.float64))
    dirty = {
        k: v.masked_fill(x["mask"] == 0, garbage) if v.shape == (5, 6) and k != "mask" else v for k, v in x.items()
    }
    for surrogate, level, kl in itertools.product(SURROGATE_OPTIONS, LEVELS, KLS):
        o = options(
            surrogate, level, kl, "seq_mean", "seq_truncate", entropy_coef=0.1, opsm_delta=0.1, entropy_quantile=0.5
        )
        for clean, spoiled in zip(run(o, x), run(o, dirty), strict=True):
            assert (
                combine_metrics([clean]) == combine_metrics([spoiled])
                if isinstance(clean, dict)
                else clean.equal(spoiled)
            )


def test_rows_without_tokens_are_not_counted():
    x = batch(seed=14)
    rows = [0, 1, 2, 4]  # row 3 is empty
    for aggregation in AGGREGATIONS:
        o = options("clip", kl="k3", aggregation=aggregation)
        close(run(o, x)[0], run(o, {k: v[rows] for k, v in x.items()})[0], 1e-12)


def test_groups_without_tokens_are_not_counted():
    x = batch(seed=21)
    x["mask"][2:4] = 0  # the whole of group 1
    o, rows = options("clip", kl="k3", aggregation="group_token_mean"), [0, 1, 4]
    close(run(o, x)[0], run(o, {k: v[rows] for k, v in x.items()})[0], 1e-12)


def test_stop_token_inside_the_mask_is_trained():
    x = batch(seed=15, rows=1)
    x["mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]])  # the fourth token is the stop
    grad = run(PolicyLoss(ratio_level="none"), x)[2]
    assert (grad[0, :4] != 0).all() and (grad[0, 4:] == 0).all()


def split(x, rows):
    """A micro-batch: some rows, cut to their longest."""
    width = max(int(x["mask"][rows].bool().any(0).nonzero().max()) + 1 if x["mask"][rows].any() else 1, 1)
    return {k: v[rows, :width] if v.dim() == 2 else v[rows] for k, v in x.items()}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    time=st.integers(5, 9),
    surrogate=st.sampled_from(list(SURROGATE_OPTIONS)),
    level=st.sampled_from(LEVELS),
    kl=st.sampled_from(KLS),
    importance=st.sampled_from(IMPORTANCES),
    quantile=st.sampled_from([None, 0.4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_metrics(
    seed, rows, time, surrogate, level, kl, importance, quantile, dtype
):
    x, g = batch(seed, rows, time, dtype), torch.Generator().manual_seed(seed)
    x["group_ids"] = torch.randint(0, 3, (rows,), generator=g) * 10 - 7
    owner = torch.randint(0, 3, (rows,), generator=g)
    parts = [(owner == k).nonzero().flatten() for k in range(3) if (owner == k).any()]
    totals = Totals.of(x["mask"], x["group_ids"], x["entropy"], quantile)
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    for aggregation in AGGREGATIONS:
        o = options(
            surrogate, level, kl, aggregation, importance, entropy_coef=0.02, opsm_delta=0.1, entropy_quantile=quantile
        )
        loss, metrics, grad, entropy_grad = run(o, x)
        micro = [run(o, split(x, part), totals=totals) for part in parts]
        scale = max(1.0, loss.abs().item())
        assert abs(sum(m[0] for m in micro) - loss) <= tol * scale
        for part, m in zip(parts, micro, strict=True):
            width = m[2].shape[1]
            close(m[2], grad[part, :width], tol)
            close(m[3], entropy_grad[part, :width], tol)
        combined, whole = combine_metrics([m[1] for m in micro]), combine_metrics([metrics])
        assert combined.keys() == whole.keys()
        for name, value in whole.items():
            assert combined[name] == pytest.approx(value, rel=10 * tol, abs=10 * tol, nan_ok=True), name


def test_metrics_of_the_last_micro_batch_are_not_those_of_the_step():
    x = batch(seed=16)
    totals, o = Totals.of(x["mask"]), PolicyLoss(kl="k3", kl_coef=0.1)
    micro = [run(o, split(x, torch.tensor(rows)), totals=totals)[1] for rows in ([0, 1], [2, 3, 4])]
    step = combine_metrics(micro)
    for name in ("loss/total", "ratio/mean", "ratio/std", "kl_ref/k3", "entropy", "mismatch/abs_mean", "tis/ess"):
        assert step[name] != pytest.approx(micro[-1][name].item(), rel=1e-3), name


def test_rows_left_out_for_lack_of_gradient_count_in_the_loss_and_not_in_the_metrics():
    x = batch(seed=22)
    x["advantages"][1] = 0
    rows, o = [0, 2, 3, 4], PolicyLoss(aggregation="seq_mean")
    part = {k: v[rows] for k, v in x.items()}
    totals = Totals.of(x["mask"]).measured_over(int(part["mask"].sum()))
    loss, metrics, grad, _ = run(o, part, totals=totals)
    whole, _, whole_grad, _ = run(o, x)
    close(loss, whole, 1e-12)
    close(grad, whole_grad[rows], 1e-12)
    for name in ("ratio/mean", "ratio/std", "entropy", "mismatch/abs_mean"):
        close(metrics[name], run(o, part)[1][name], 1e-12)


def test_metrics_are_constant_scalars():
    metrics = run(options("clip", kl="k3", importance="seq_mask", opsm_delta=0.1), batch())[1]
    assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())
    named = {"loss/policy", "loss/kl", "loss/entropy", "loss/total", "clip/high", "clip/low", "clip/dual", "clip/frac"}
    named |= {"ratio/mean", "ratio/std", "ratio/min", "ratio/max", "ratio/outside", "kl_old/k1", "kl_old/k3"}
    named |= {
        "kl_ref/k1",
        "kl_ref/k3",
        "entropy",
        "opsm/masked_frac",
        "tis/mean",
        "tis/max",
        "tis/ess",
        "tis/masked_frac",
    }
    named |= {"mismatch/abs_mean", "mismatch/abs_max", "mismatch/k3", "mismatch/outside"}
    assert named <= combine_metrics([metrics]).keys()


def test_ratio_std_is_exact_close_to_one_in_float32():
    x = batch(seed=17, rows=8, dtype=torch.float32)
    x["old_logp"] = x["logp"] + 1e-4 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    ratio = (x["logp"] - x["old_logp"]).exp()[x["mask"] > 0]
    assert run(PolicyLoss(), x)[1]["ratio/std"].item() == pytest.approx(
        ratio.double().std(correction=0).item(), rel=1e-6
    )


def test_sequence_kl_metric_is_the_mean_of_row_sums():
    x = batch(seed=18)
    sums = ((x["logp"] - x["ref_logp"]) * x["mask"]).sum(1)
    close(run(PolicyLoss(), x)[1]["kl_ref/seq_k1"], sums.sum() / 4)


def test_bfloat16_log_probs_are_treated_in_float32():
    x = batch(seed=19, dtype=torch.bfloat16)
    up = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in x.items()}
    loss, _, grad, _ = run(PolicyLoss(kl="k3", kl_coef=0.1), x)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert loss == run(PolicyLoss(kl="k3", kl_coef=0.1), up)[0]


# ---- critic, controllers, shaping ------------------------------------------------------------------------------------


def test_value_loss_matches_golden():
    x, p, expected = golden("value_loss_clipped")
    values = x["values"].requires_grad_()
    loss, metrics = value_loss(values, x["old_values"], x["returns"], x["mask"], p["clip"])
    loss.backward()
    close(loss.detach(), expected["loss"])
    close(values.grad, expected["dvalues"])
    close(metrics["value/explained_var"], expected["explained_variance"])
    assert metrics["value/clip_frac"] == expected["clip_frac"]
    close(value_loss(values, None, x["returns"], x["mask"], None)[0].detach(), expected["loss_unclipped"])


def test_value_loss_has_no_gradient_where_the_clipped_error_is_larger():
    values = f64([[1.0, 0.25, NAN]]).requires_grad_()
    loss, metrics = value_loss(values, f64([[0.0, 0.2, NAN]]), f64([[2.0, 0.0, NAN]]), torch.tensor([[1, 1, 0]]), 0.2)
    loss.backward()
    close(loss.detach(), 0.25 * (1.8**2 + 0.25**2))
    close(values.grad, [[0.0, 0.125, 0.0]])
    assert metrics["value/clip_frac"] == 0.5


def test_value_metrics_of_micro_batches_combine_to_those_of_the_step():
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(6, 5, generator=g) + 100 for _ in range(3))
    mask = (torch.rand(6, 5, generator=g) > 0.3).float()
    loss, metrics = value_loss(values, old, returns, mask)
    parts = [
        value_loss(*(t[rows] for t in (values, old, returns, mask)), totals=Totals.of(mask))
        for rows in ([0], [1, 2, 3], [4, 5])
    ]
    close(sum(p[0] for p in parts), loss, 1e-6)
    whole, combined = combine_metrics([metrics]), combine_metrics([p[1] for p in parts])
    assert combined == pytest.approx(whole, rel=1e-6)
    v, R = values[mask > 0].double(), returns[mask > 0].double()
    assert whole["value/explained_var"] == pytest.approx(1 - ((R - v).var() / R.var()).item(), rel=1e-9)


def test_explained_variance_of_constant_returns_is_undefined():
    metrics = value_loss(torch.rand(2, 3), None, torch.full((2, 3), 0.3), torch.ones(2, 3), None)[1]
    assert metrics["value/explained_var"].isnan()


def test_kl_controllers_match_golden():
    x, p, expected = golden("kl_controllers")
    z, d = p["ziegler"], p["ppo_penalty"]
    episodes = round(z["n_steps_over_horizon"] * 10_000)
    beta, chained = z["beta0"], []
    for kl in x["ziegler_kl"].tolist():
        beta = losses.adaptive_kl_ziegler(beta, kl, target=z["target"], episodes=episodes)
        chained.append(beta)
    assert chained == pytest.approx(expected["ziegler_beta"], abs=1e-9)
    beta, chained = d["beta0"], []
    for kl in x["ppo_d"].tolist():
        beta = losses.adaptive_kl_ppo(beta, kl, target=d["d_target"])
        chained.append(beta)
    assert chained == pytest.approx(expected["ppo_beta"], abs=1e-9)


# ---- presets and errors ----------------------------------------------------------------------------------------------

TABLE = {  # advantage, ratio level, surrogate, kl, aggregation
    "reinforce": ("reinforce", "none", "is_pg", "none", "seq_sum"),
    "rloo": ("rloo", "none", "is_pg", "none", "seq_sum"),
    "reinforce++": ("reinforce_pp", "token", "clip", "none", "token_mean"),
    "ppo": ("gae", "token", "clip", "none", "token_mean"),
    "ppo_penalty": ("gae", "token", "clip", "none", "token_mean"),
    "ppo_actor_only": ("reinforce", "token", "clip", "none", "token_mean"),
    "grpo": ("grpo", "token", "clip", "k3", "seq_mean"),
    "grpo_ps": ("grpo_process", "token", "clip", "k3", "seq_mean"),
    "dr_grpo": ("grpo_mean", "token", "clip", "none", "seq_sum_const"),
    "dapo": ("grpo", "token", "clip", "none", "token_mean"),
    "gspo": ("grpo", "seq_mean", "clip", "none", "seq_mean"),
    "gspo_token": ("grpo_process", "seq_mean", "clip", "none", "seq_mean"),
    "dual_clip": ("grpo", "token", "clip", "none", "seq_mean"),
    "tis": ("grpo", "token", "clip", "none", "seq_mean"),
    "mis": ("grpo", "token", "clip", "none", "seq_mean"),
    "cispo": ("grpo", "token", "is_pg", "none", "token_mean"),
    "sapo": ("grpo", "token", "sapo", "none", "seq_mean"),
    "scaling_grpo": ("grpo_mean", "token", "clip", "k3_is", "seq_mean"),
    "online_rft": ("correct_only", "none", "is_pg", "none", "token_mean"),
}


ROWS = {name: overrides(name, SimpleNamespace(max_tokens=3000, prompts=16)) for name in PRESETS}
LOSSES = {name: row["loss"] for name, row in ROWS.items()}


def test_presets_are_the_rows_of_the_table():
    rows = {
        name: (ROWS[name]["advantage"], o.ratio_level, o.surrogate, o.kl, o.aggregation) for name, o in LOSSES.items()
    }
    assert rows == TABLE
    assert all(callable(getattr(adv, row["advantage"])) for row in ROWS.values())
    eps = {name: (o.eps_low, o.eps_high) for name, o in LOSSES.items() if o.surrogate == "clip"}
    special = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "ppo_penalty": (INF, INF)}
    assert eps == {name: special.get(name, (0.2, 0.2)) for name in eps}
    penalised = {name for name, row in ROWS.items() if row.get("kl_in_reward")}
    assert penalised == {"reinforce", "rloo", "reinforce++", "ppo"}
    assert LOSSES["scaling_grpo"].opsm_delta == 0.5
    assert {name: row["mini_batches"] for name, row in ROWS.items() if "mini_batches" in row} == dict.fromkeys(
        ("dapo", "gspo", "gspo_token", "cispo", "sapo", "scaling_grpo", "dual_clip"), 4
    )
    assert ROWS["dapo"]["dynamic_sampling"] and ROWS["dapo"]["overlong_cache"] == 600
    assert [name for name, o in LOSSES.items() if o.dual_clip] == ["dual_clip"]
    assert {name: o.importance for name, o in LOSSES.items() if o.importance != "none"} == {
        "tis": "token_truncate",
        "mis": "token_mask",
    }
    assert LOSSES["cispo"].w_max == 5 and LOSSES["grpo"].kl_coef == 0.04


@pytest.mark.parametrize("name", list(TABLE))
def test_every_preset_trains_towards_tokens_with_positive_advantage(name):
    x = batch(seed=20, rows=2)
    x["mask"] = torch.ones(2, 6)
    grad = run(LOSSES[name], x, old_logp=None, ref_logp=x["logp"], advantages=f64([1.0, -1.0]))[2]
    assert (grad[0] < 0).all() and (grad[1] > 0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kl": "k1"}, "reward"),
        ({"kl": "k4"}, "k2, k3, k3_is"),
        ({"surrogate": "ppo"}, "clip, is_pg, sapo"),
        ({"ratio_level": "row"}, "seq_mean"),
        ({"eps_low": -0.1}, "eps_low"),
        ({"eps_high": NAN}, "eps_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"w_min": 2.0, "w_max": 1.0}, "w_min"),
        ({"tau_pos": 0.0}, "tau_pos"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_old_coef": INF}, "kl_old_coef"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"kl_clamp": 0.0}, "kl_clamp"),
        ({"aggregation": "seq_sum_const"}, "const_length"),
        ({"aggregation": "seq_sum_const", "const_length": 0}, "const_length"),
        ({"importance_floor": 3.0}, "importance_floor"),
        ({"opsm_delta": -0.1}, "opsm_delta"),
        ({"entropy_quantile": 0.0}, "entropy_quantile"),
    ],
)
def test_impossible_options_are_refused_with_the_option_named(wrong, message):
    with pytest.raises(InputError, match=message):
        PolicyLoss(**wrong)


@pytest.mark.parametrize(
    ("option", "change", "message"),
    [
        ({"kl": "k3"}, {"ref_logp": None}, "ref_logp"),
        ({"entropy_coef": 0.1}, {"entropy": None}, "entropy_coef"),
        ({"entropy_quantile": 0.2}, {"entropy": None}, "entropy_quantile"),
        ({"entropy_quantile": 0.2}, {"totals": Totals(4, 16)}, "whole step"),
        ({"importance": "token_mask"}, {"rollout_logp": None}, "rollout_logp"),
        ({"aggregation": "group_token_mean"}, {"group_ids": None}, "group_ids"),
        ({"aggregation": "group_token_mean"}, {"totals": Totals.of(torch.ones(1, 1), torch.tensor([99]))}, "whole"),
        ({}, {"old_logp": torch.zeros(5, 7)}, "old_logp"),
        ({}, {"advantages": torch.zeros(6)}, "advantages"),
        ({}, {"mask": torch.ones(5)}, "mask"),
        ({}, {"group_ids": torch.zeros(5, 6)}, "group_ids"),
    ],
)
def test_missing_or_misshapen_inputs_are_refused_with_their_name(option, change, message):
    with pytest.raises(InputError, match=message):
        run(PolicyLoss(**option), batch() | change)
