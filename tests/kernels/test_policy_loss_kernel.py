"""The policy loss in PyTorch and Triton, on log-probs, on logits and from hidden states, against float64 autograd of
the papers' formulas; and what the fused forms promise: exact zeros, no wasted product, little memory, no recompile."""

import itertools
import math
import random

import pytest
import torch
from test_kernels import (  # noqa: F401 (the fixture `seed` is used by its name)
    DEVICE,
    INF,
    KERNEL_DTYPES,
    NAN,
    VOCABULARIES,
    Largest,
    Products,
    assert_near,
    assert_no_worse_than_torch,
    far_rows,
    fresh_seed,
    generator,
    kept_of,
    one_chunk,
    random_mask,
    same_bits,
)

from minirl.kernels import (
    TokenInputs,
    TokenLoss,
    fused_policy_loss,
    linear_policy_loss,
    linear_policy_terms,
    linear_token_logprobs,
    token_logprobs,
    token_loss,
)
from minirl.kernels import backend as run
from minirl.kernels.per_token import token_loss_triton
from minirl.kernels.policy_loss import scale_
from minirl.losses import HiddenStates, LossInputs, PolicyLoss, Totals, loss_and_metrics, policy_loss, with_gradient

SURROGATES = {
    "clip": {"surrogate": "clip", "eps_high": 0.28, "dual_clip": 1.6},
    "is_pg": {"surrogate": "is_pg", "w_min": 0.7, "w_max": 1.3},
    "sapo": {"surrogate": "sapo"},
}
LEVELS = ("token", "none", "row")  # "row": log_ratio is given
KLS = ("none", "k2", "k3", "k3_is")
IMPORTANCES = ("none", "token_truncate", "token_mask")
TRIFLES = list(itertools.product((None, 0.0512), (0.0, 0.2), (0.0, 0.03)))  # kl_clamp, kl_old_coef, entropy_coef
VARIANTS = list(itertools.product(SURROGATES, LEVELS, KLS, IMPORTANCES, (False, True), (False, True)))


def options(surrogate, level, kl, importance, clamp=None, old=0.0, entropy=0.0, **more) -> TokenLoss:
    row = {"ratio_level": "none" if level == "none" else "token", "kl": kl, "kl_coef": 0.1, "kl_clamp": clamp}
    row |= {"kl_old_coef": old, "entropy_coef": entropy, "importance": importance}
    return TokenLoss(**SURROGATES[surrogate] | row | {"importance_cap": 1.4, "importance_floor": 0.7} | more)


def token_inputs(logp: torch.Tensor, seed: int, level="token", old=True, omega=False) -> dict[str, torch.Tensor | None]:
    """Every number a row. Differences of log-probs are multiples of 1/64, which no clip's edge is: rounding to fp32
    decides no branch. Under weight 0 stands NaN, which must reach nothing."""
    g, n = generator(seed), len(logp)

    def steps(scale):
        return ((torch.randn(n, generator=g) * scale * 64).round() / 64).to(logp)

    old_logp = logp - steps(0.3)
    x = {"advantages": torch.randn(n, generator=g).to(logp), "old_logp": old_logp, "ref_logp": logp - steps(0.5)}
    x |= {"rollout_logp": old_logp - steps(0.3), "log_ratio": steps(0.3), "omega": torch.rand(n, generator=g).to(logp)}
    x["advantages"][:5] = 0
    off = torch.arange(n, device=logp.device) % 5 == 3
    x = {name: value.masked_fill(off, NAN) for name, value in x.items()}
    x["weights"] = ((torch.rand(n, generator=g) + 0.5) / n).to(logp).masked_fill(off, 0)
    absent = {"old_logp": not old, "log_ratio": level != "row", "omega": not omega}
    return {name: None if absent.get(name) else value for name, value in x.items()}


def by_formula(o: TokenLoss, logp, entropy, x) -> torch.Tensor:
    """Loss of each live row as the papers write it, for autograd: 1707.06347 eq. 7 and 1912.09729 eq. 5, 2506.13585
    eq. 4, 2511.20347; K3 of 2402.03300 eq. 4. The gradient of a ratio that is given is that of GSPO-token."""
    A, w, ref, rollout = (x[name] for name in ("advantages", "weights", "ref_logp", "rollout_logp"))
    old = logp.detach() if x["old_logp"] is None else x["old_logp"]
    lr, itself = logp - old, logp - logp.detach()
    rho = (itself if o.ratio_level == "none" else lr).exp()
    rho = rho if x["log_ratio"] is None else (x["log_ratio"] + itself).exp()
    if o.surrogate == "clip":
        S = -torch.min(rho * A, rho.clamp(1 - o.eps_low, 1 + o.eps_high) * A)
        S = torch.where(A < 0, torch.min(S, -(o.dual_clip or INF) * A), S)
    elif o.surrogate == "is_pg":
        S = -rho.detach().clamp(o.w_min, o.w_max) * A * logp
    else:
        tau = torch.full_like(A, o.tau_neg).masked_fill(A > 0, o.tau_pos)
        S = -4 / tau * torch.sigmoid(tau * (rho - 1)) * A
    if x["omega"] is not None:
        S = S * x["omega"]
    if o.importance != "none":
        u = (old - rollout).detach().exp()
        inside = (u >= o.importance_floor) & (u <= o.importance_cap)
        S = S * (u.clamp(max=o.importance_cap) if o.importance == "token_truncate" else u * inside)
    d = logp - ref
    k3 = (-d).exp() + d - 1
    K = {"none": 0 * d, "k2": d**2 / 2, "k3": k3, "k3_is": lr.exp() * k3}[o.kl].clamp(max=o.kl_clamp or INF)
    K_old = lr.exp() - 1 - lr
    return w * (S + o.kl_coef * K + o.kl_old_coef * K_old - o.entropy_coef * entropy)


def rows_of(x: dict, rows) -> dict:
    return {name: None if value is None else value[rows] for name, value in x.items()}


def by_autograd(o: TokenLoss, logp, entropy, x) -> list[torch.Tensor]:
    """Loss, c and e of each row in float64; zeros under weight 0."""
    on = x["weights"] != 0
    inputs = [z[on].double().requires_grad_(True) for z in (logp, entropy)]
    wide = {name: None if value is None else value[on].double() for name, value in x.items()}
    loss = by_formula(o, *inputs, wide)
    slopes = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
    return [
        torch.zeros(len(on), dtype=torch.float64, device=on.device).index_put((on,), z.detach())
        for z in (loss, *slopes)
    ]


def log_probs(n: int, seed: int, dtype=torch.float32):
    """logp on the grid of 1/64, and an entropy."""
    g = generator(seed)
    logp, entropy = torch.randint(-256, 0, (n,), generator=g) / 64.0, torch.rand(n, generator=g) * 3
    return logp.to(DEVICE, dtype), entropy.to(DEVICE, dtype)


# ---- the token's loss: the product of its options --------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_definition_is_float64_autograd_of_the_formulas(surrogate, level, seed):
    logp, entropy = log_probs(40, seed, torch.float64)
    for old, omega in itertools.product((False, True), repeat=2):
        x = token_inputs(logp, seed, level, old, omega)
        for kl, importance, trifles in itertools.product(KLS, IMPORTANCES, TRIFLES):
            o = options(surrogate, level, kl, importance, *trifles)
            t, expected = token_loss(o, logp, entropy, TokenInputs(**x)), by_autograd(o, logp, entropy, x)
            for ours, exact in zip((t.loss, t.c, t.e), expected, strict=True):
                torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12, msg=lambda m, o=o: f"{o}: {m}")


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_compiled_variant_is_float64_autograd_of_the_formulas(surrogate, level, seed):
    """Every form that Triton compiles; the numbers among the options, which it does not, are drawn.

    What metrics read is that of the definition in float64 too: the parts of the loss, ratios, which tokens were cut.
    """
    logp, entropy = log_probs(40, seed)
    draw = random.Random(seed)
    for kl, importance, old in itertools.product(KLS, IMPORTANCES, (False, True)):
        omega = draw.random() < 0.5
        o = options(surrogate, level, kl, importance, *draw.choice(TRIFLES))
        x = token_inputs(logp, seed, level, old, omega)
        ours = token_loss_triton(o, logp, entropy, TokenInputs(**x))
        print(o)
        for value, exact in zip((ours.loss, ours.c, ours.e), by_autograd(o, logp, entropy, x), strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-7)
        wide = token_loss(o, logp.double(), entropy.double(), TokenInputs(**x).map(torch.Tensor.double))
        for name, value in ours._asdict().items():
            exact = getattr(wide, name)
            torch.testing.assert_close(value.to(exact), exact, rtol=1e-5, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("choice", [{"surrogate": "new"}, {"kl": "new"}, {"importance": "token_new"}])
@pytest.mark.parametrize("evaluate", [token_loss, token_loss_triton])
def test_a_choice_that_a_copy_of_the_loss_does_not_know_does_not_run(evaluate, choice):
    """A surrogate that stood in the definition alone would otherwise train as another one on a GPU."""
    o = TokenLoss()
    for name, value in choice.items():  # as if the definition's table had it
        object.__setattr__(o, name, value)
    logp, entropy = log_probs(4, 0)
    with pytest.raises(Exception) as caught:  # a compile-time error where the kernel is compiled, in its cause
        evaluate(o, logp, entropy, TokenInputs(**token_inputs(logp, 0)))
    sentences = f"{caught.value} {caught.value.__cause__}"
    assert "does not know" in sentences or isinstance(caught.value, KeyError)


def test_more_rows_than_one_program_takes(seed):
    logp, entropy = log_probs(600, seed)
    o, x = options("clip", "token", "k3_is", "token_mask", None, 0.2, 0.03), TokenInputs(**token_inputs(logp, seed))
    expected = by_autograd(o, logp, entropy, x._asdict())
    for rows in (slice(0, 600), slice(0, 513), slice(0, 256), slice(0, 1)):
        t = token_loss_triton(o, logp[rows], entropy[rows], x.map(lambda z, rows=rows: z[rows]))
        ours = [z.double() for z in (t.loss, t.c, t.e)]
        torch.testing.assert_close(ours, [z[rows] for z in expected], rtol=1e-5, atol=2e-7)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def one_term(o: TokenLoss, backend: str, logp, **x) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and c of tokens of weight 1; A = 0 where it is not given."""
    inputs = TokenInputs(**{"advantages": torch.zeros_like(logp), "weights": torch.ones_like(logp)} | x)
    t = (token_loss_triton if backend == "triton" else token_loss)(o, logp, torch.zeros_like(logp), inputs)
    return t.loss, t.c


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_k3_keeps_its_digits_near_zero_and_is_never_negative(backend, seed):
    """e^{−d} + d − 1 as it is written is 8 % off at d = 1e-3, and below zero at 1e-4."""
    # The kernel sums the series; in PyTorch's fp32 the difference keeps what it can, and is exact in fp64.
    tolerance = {"torch": 1e-3, "triton": 1e-5}[backend]
    d = numbers(1e-3, -1e-3, 1e-4, -1e-4, 0.3, -0.3, 0.499, -0.499, 0.501, -0.501, 3.0, -3.0)
    x = d.double()
    loss, c = one_term(TokenLoss(kl="k3", kl_coef=1.0), backend, torch.zeros_like(d), ref_logp=-d)
    assert ((loss.double() / (torch.expm1(-x) + x) - 1).abs() < tolerance).all(), loss
    assert ((c.double() / -torch.expm1(-x) - 1).abs() < tolerance).all(), c
    tiny = torch.randn(4000, generator=generator(seed)).to(DEVICE) * 10.0 ** -torch.arange(8, device=DEVICE).repeat(500)
    assert (one_term(TokenLoss(kl="k3", kl_coef=1.0), backend, torch.zeros_like(tiny), ref_logp=-tiny)[0] >= 0).all()
    loss, c = one_term(TokenLoss(kl_old_coef=1.0), backend, d, old_logp=torch.zeros_like(d))  # ρ − 1 − log ρ
    assert ((loss.double() / (torch.expm1(x) - x) - 1).abs() < tolerance).all(), loss
    assert ((c.double() / torch.expm1(x) - 1).abs() < tolerance).all(), c


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_exponents_beyond_the_guard_are_finite_a_ratio_stands_still_and_a_kl_goes_on(backend):
    big, small = math.exp(20), math.exp(-20)
    d = numbers(-25, 25, -200, 200, 20, -20)
    at, x = torch.zeros_like(d), d.double()
    held = x.clamp(-20, 20)
    slope = 1 - (-held).exp()
    k3 = (-held).exp() + held - 1 + slope * (x - held)  # its tangent
    loss, c = one_term(TokenLoss(kl="k3", kl_coef=1.0), backend, at, ref_logp=-d)
    torch.testing.assert_close(loss, k3.float())
    torch.testing.assert_close(c, slope.float())
    loss, c = one_term(TokenLoss(kl="k3_is", kl_coef=1.0), backend, at, ref_logp=-d, old_logp=at - 0.5)
    rho = math.exp(0.5)
    weighted = rho * (x - 1) + (0.5 - x).clamp(max=40).exp()  # ρ(d − 1) + π_ref/π_old, true up to e^40
    torch.testing.assert_close(loss, weighted.float())
    torch.testing.assert_close(c, rho * d)
    loss, c = one_term(TokenLoss(kl="k3_is", kl_coef=1.0), backend, at, ref_logp=at - 3, old_logp=-d)  # ρ guarded
    torch.testing.assert_close(c, 3 * numbers(small, big, small, big, big, small))
    loss, c = one_term(TokenLoss(kl_old_coef=1.0), backend, at, old_logp=-d)
    torch.testing.assert_close(c, numbers(small, big, small, big, big, small) - 1)
    plain = TokenLoss(eps_low=INF, eps_high=INF)
    loss, c = one_term(plain, backend, d, old_logp=at, advantages=torch.ones_like(d))
    torch.testing.assert_close(loss, -numbers(small, big, small, big, big, small))
    torch.testing.assert_close(c, -numbers(0, 0, 0, 0, big, small))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_nan_shows_and_stays_alone(backend, surrogate):
    logp = numbers(-1, NAN, -2, -3)
    x = {"old_logp": numbers(-1.5, -1, NAN, -3), "advantages": torch.ones_like(logp)}
    for z in one_term(TokenLoss(**SURROGATES[surrogate]), backend, logp, **x):
        assert z.isnan().tolist() == [False, True, True, False]
    o = TokenLoss(**SURROGATES[surrogate], kl="k3_is", kl_coef=0.1, importance="token_truncate")
    for name in ("ref_logp", "rollout_logp", "old_logp"):
        y = {"old_logp": numbers(-1, -1), "ref_logp": numbers(-1, -1), "rollout_logp": numbers(-1, -1)}
        y[name] = numbers(NAN, -1)
        loss, _ = one_term(o, backend, numbers(-1, -1), advantages=numbers(1, 1), **y)
        assert loss.isnan().tolist() == [True, False], name


# ---- on logits and from hidden states --------------------------------------------------------------------------------


class Model:
    """hidden [N, D], weight [V, D], bias [V] and what scores them; truth is float64 on the same rounded numbers."""

    def __init__(self, seed, n=18, vocab=123, width=16, dtype=torch.float32, softcap=3.0, per_row=False):
        g = generator(seed)
        hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((n, width), (vocab, width), (vocab,)))
        self.inputs = [x.to(DEVICE, dtype) for x in (hidden, weight * 0.5, bias * 0.3)]
        self.targets = torch.randint(vocab, (n,), generator=g).to(DEVICE)
        self.softcap, self.vocab, self.n = softcap, vocab, n
        self.temperature = (torch.rand(n, generator=g) + 0.5).to(DEVICE) if per_row else 0.8
        self.logp, self.entropy = (z.float() for z in self.score(*(x.double() for x in self.inputs)))

    def logits(self, hidden, weight, bias):
        z = hidden @ weight.t() + bias
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def score(self, *inputs):
        t = self.temperature.double()[:, None] if isinstance(self.temperature, torch.Tensor) else self.temperature
        log_p = (self.logits(*inputs) / t).log_softmax(-1)
        return log_p.gather(1, self.targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    def truth(self, o, x) -> list[torch.Tensor]:
        """loss, logp, entropy, and the loss's gradients, in float64."""
        leaves, on = [z.double().requires_grad_(True) for z in self.inputs], x["weights"] != 0
        logp, entropy = self.score(*leaves)
        wide = {name: None if value is None else value[on].double() for name, value in x.items()}
        loss = by_formula(o, logp[on], entropy[on], wide).sum()
        return [loss.detach(), logp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]

    def loss(self, form: str, o, x, hidden, weight, bias, **more):
        kind, _, backend = form.partition(" ")
        common = x | {"options": o, "temperature": self.temperature}
        if kind == "linear":
            common |= {"bias": bias, "softcap": self.softcap, "workspace": one_chunk(16, self.vocab)} | more
            return linear_policy_loss(hidden, weight, self.targets, backend=backend, **common)
        z, inplace = self.logits(hidden, weight, bias) * 1, backend.endswith("in place")
        return fused_policy_loss(z, self.targets, backend=backend.split()[0], inplace=inplace, **common)

    def run(self, form: str, o, x, factor=1.0, **more) -> list[torch.Tensor]:
        leaves = [z.clone().requires_grad_(True) for z in self.inputs]
        loss, logp, entropy = self.loss(form, o, x, *leaves, **more)
        (loss * factor).backward()
        return [loss.detach(), logp, entropy, *(leaf.grad for leaf in leaves)]


FORMS = ("fused torch", "fused triton", "fused triton in place", "linear torch", "linear triton")


def alive(o, x) -> torch.Tensor:
    return (x["weights"] != 0) & (x["advantages"] != 0 if o.follows_advantage else True)


def assert_right(ours, exact, computed, tolerance=3e-5) -> None:
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=tolerance, atol=1e-5)  # terms of up to 20 cancel
    assert_near(ours[3:], exact[3:], tolerance)
    assert_near([z[computed] for z in ours[1:3]], [z[computed] for z in exact[1:3]], tolerance)
    assert not ours[1][~computed].any() and not ours[2][~computed].any()


def sample(seed: int, count: int, n: int):
    """Options and inputs, drawn from their product."""
    draw = random.Random(seed)
    for _ in range(count):
        surrogate, level, kl, importance, old, omega = draw.choice(VARIANTS)
        model = Model(draw.randrange(1 << 30), n, per_row=draw.random() < 0.5, softcap=draw.choice((None, 3.0)))
        o = options(surrogate, level, kl, importance, *draw.choice(TRIFLES))
        print(o)
        yield model, o, token_inputs(model.logp, draw.randrange(1 << 30), level, old, omega)


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_float64(form, seed):
    for model, o, x in sample(seed, 5 if "triton" in form else 30, 8 if form.startswith("fused") else 18):
        computed = alive(o, x) if form.startswith("linear") else x["weights"] != 0
        assert_right(model.run(form, o, x), model.truth(o, x), computed)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(v, d) for v in VOCABULARIES for d in KERNEL_DTYPES]
    + [(v, d) for v in (50257, 262144) for d in KERNEL_DTYPES[1:]],
)
def test_the_error_is_not_above_that_of_torch_in_the_same_dtype(vocab, dtype, seed):
    """Targets: the first token, the last, the first of the last tile; with a KL and an entropy bonus."""
    logits = (torch.randn(3, vocab, generator=generator(seed)) * 2).to(DEVICE, dtype)
    targets = torch.tensor([0, vocab - 1, (vocab - 1) // 16384 * 16384], device=DEVICE)
    logp = token_logprobs(logits.double(), targets, backend="torch")[0].float()
    o = TokenLoss(kl="k3", kl_coef=0.1, entropy_coef=0.1)
    x = {"advantages": numbers(1, -1, 2), "weights": torch.ones_like(logp), "old_logp": logp - 0.1}

    def form(dtype, backend, inplace=False):
        z = logits.to(dtype, copy=True).requires_grad_(True)
        more = {"ref_logp": logp + 0.3, "backend": backend, "inplace": inplace}
        loss, logp_, entropy = fused_policy_loss(z, targets, options=o, **x, **more)
        return [logp_, entropy, *torch.autograd.grad(loss, z), loss.detach()]

    exact, plain, ours = form(torch.float64, "torch"), form(dtype, "torch"), form(dtype, "triton")
    assert_no_worse_than_torch(ours[:3], plain[:3], exact[:3], targets)
    assert (ours[3] - exact[3]).abs() <= (plain[3] - exact[3]).abs() + 1e-5 * exact[3].abs()
    if vocab in VOCABULARIES:
        assert same_bits(form(dtype, "triton", inplace=True), ours)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_terms_of_each_token_come_from_the_sweep_in_both_backends_alike(surrogate, seed):
    """What metrics read: 0 where a row is not computed, and else what the definition makes of the float64 log-probs."""
    model, o = Model(seed), options(surrogate, "token", "k3", "token_mask", None, 0.2, 0.03)
    x, (hidden, weight, bias) = token_inputs(model.logp, seed), model.inputs
    wide, more = TokenInputs(**x).map(torch.Tensor.double), {"bias": bias, "softcap": 3.0, "temperature": 0.8}
    exact = token_loss(o, *model.score(*(z.double() for z in model.inputs)), wide)._asdict()
    for backend in ("torch", "triton"):
        *_, t = linear_policy_terms(hidden, weight, model.targets, TokenInputs(**x), o, backend=backend, **more)
        for name, value in t._asdict().items():
            wanted = exact[name].masked_fill(x["weights"] == 0, 0)
            torch.testing.assert_close(
                value.to(wanted), wanted, rtol=3e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("active", [1, 117])
def test_rows_that_pad_the_head_have_no_probability_and_no_gradient(form, active, seed):
    """Truth is float64 on a head without them; theirs are the largest logits by far."""
    o, exact = options("clip", "token", "k3", "none", entropy=0.02), Model(seed, vocab=active, per_row=True)
    x = token_inputs(exact.logp, seed)
    padded = Model(seed, vocab=active, per_row=True)
    hidden, weight, bias = exact.inputs
    more = torch.full((11, weight.shape[1]), 30.0, device=DEVICE), torch.full((11,), 60.0, device=DEVICE)
    padded.inputs = [hidden, torch.cat([weight, more[0]]), torch.cat([bias, more[1]])]
    padded.softcap = exact.softcap = None
    exact.logp, exact.entropy = (z.float() for z in exact.score(*(z.double() for z in exact.inputs)))
    ours, truth = padded.run(form, o, x | {"active": active}), exact.truth(o, x)
    for gradient in ours[4:]:
        assert not gradient[active:].any()
    assert_right([*ours[:4], ours[4][:active], ours[5][:active]], truth, alive(o, x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_ratio_of_one_gives_the_gradient_of_reinforce(form, surrogate):
    model = Model(3, n=6, softcap=None)
    x = {"advantages": torch.linspace(-1, 1, 6, device=DEVICE), "weights": torch.full((6,), 1 / 6, device=DEVICE)}
    leaves = [z.double().requires_grad_(True) for z in model.inputs]
    expected = torch.autograd.grad(-(x["advantages"] * x["weights"] * model.score(*leaves)[0]).sum(), leaves)
    o = TokenLoss(**SURROGATES[surrogate])
    for old in (None, model.logp.clone()):  # a single on-policy update, or one that has not moved yet
        assert_near(model.run(form, o, x | {"old_logp": old})[3:], expected, 3e-5)


@pytest.mark.parametrize("form", FORMS)
def test_with_all_rows_masked_the_loss_is_zero_and_the_gradients_are_exactly_zero(form):
    model = Model(4)
    o, x = options("clip", "token", "k3", "token_mask", None, 0.2, 0.03), token_inputs(model.logp, 5)
    for z in model.run(form, o, x | {"weights": torch.zeros(18, device=DEVICE)}):
        assert z.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_at_all(form):
    model = Model(4, n=0)
    o, x = options("clip", "token", "k3", "none"), token_inputs(model.logp, 5)
    outputs = model.run(form, o, x)
    assert all(z.eq(0).all() for z in outputs) and [z.shape for z in outputs[:3]] == [(), (0,), (0,)]


@pytest.mark.parametrize("form", FORMS)
def test_nan_logits_under_weight_zero_reach_nothing(form):
    n, vocab = 6, 37
    logits, weights = torch.randn(n, vocab, generator=generator(6)).to(DEVICE), numbers(1, 0, 1, 0, 1, 1)
    targets, A = torch.arange(n, device=DEVICE), numbers(1, 1, -1, -1, 2, 0.5)
    o, (kind, _, backend) = TokenLoss(entropy_coef=0.1), form.partition(" ")

    def run_(bad):
        leaf = logits.clone().index_fill_(0, torch.tensor([1, 3], device=DEVICE), bad).requires_grad_(True)
        if kind == "linear":
            out = linear_policy_loss(leaf, torch.eye(vocab, device=DEVICE), targets, A, weights, o, backend=backend)
        else:
            more = {"backend": backend.split()[0], "inplace": backend.endswith("in place")}
            out = fused_policy_loss(leaf * 1, targets, A, weights, o, **more)
        return [z.detach() for z in out] + list(torch.autograd.grad(out[0], leaf))

    assert same_bits(run_(NAN), run_(0.0))
    assert not run_(NAN)[3][[1, 3]].any()


@pytest.mark.parametrize("form", FORMS)
def test_nan_logits_of_a_live_row_show_in_the_loss_and_stay_in_their_row(form):
    model = Model(4, n=6, softcap=None)
    x = {"advantages": torch.ones(6, device=DEVICE), "weights": torch.ones(6, device=DEVICE)}
    clean = model.run(form, TokenLoss(), x)
    model.inputs[0][2] = NAN
    broken, others = model.run(form, TokenLoss(), x), torch.arange(6, device=DEVICE) != 2
    assert broken[0].isnan() and broken[1][2].isnan()
    for i in (1, 2, 3):
        torch.testing.assert_close(broken[i][others], clean[i][others])


# ---- what autograd is promised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_incoming_gradient_is_honoured(form):
    model = Model(7, n=6)
    o, x = options("clip", "token", "k3", "none", None, 0.0, 0.03), token_inputs(model.logp, 8)
    plain = model.run(form, o, x)
    for factor in (2.0, 1 / 3, 0.0):
        scaled = model.run(form, o, x, factor)
        assert_near(scaled[3:], [z * factor for z in plain[3:]], 1e-6)
        assert same_bits(scaled[:3], plain[:3])


class AsIfOnGpu(torch.Tensor):
    """Has `scale_` launch its kernel, in the interpreter."""

    is_cuda = True


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("size", [5, 4096 * 8 + 7])
def test_the_kernel_that_scales_gradients(dtype, size):
    plain = torch.randn(size, generator=generator(9)).to(DEVICE, dtype)
    for factor in (1.0, -2.5):
        x, version = plain.clone(), None
        x = x if x.is_cuda else x.as_subclass(AsIfOnGpu)
        version = x._version
        scale_(x, numbers(factor)[0])
        assert torch.equal(x.as_subclass(torch.Tensor), (plain.float() * factor).to(dtype)) and x._version > version


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_second_backward_pass_is_refused(form, factor):
    """The first one hands out the gradient that the forward pass has made, and scales it in place."""
    model = Model(7, n=6)
    leaves = [z.clone().requires_grad_(True) for z in model.inputs]
    loss = model.loss(form, TokenLoss(), token_inputs(model.logp, 8), *leaves)[0] * factor
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|handed out in a first backward pass"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_second_derivative_is_refused_rather_than_wrong(form):
    model = Model(7, n=6)
    leaves = [z.clone().requires_grad_(True) for z in model.inputs]
    loss = model.loss(form, TokenLoss(), token_inputs(model.logp, 8), *leaves)[0].square()
    gradient, *_ = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_overwritten_logits_cannot_be_used_again():
    leaf, targets, ones = torch.randn(3, 37, device=DEVICE, requires_grad=True), torch.arange(3), torch.ones(3)
    targets, ones, logits = targets.to(DEVICE), ones.to(DEVICE), leaf * 1
    square = (logits**2).sum()
    fused_policy_loss(logits, targets, ones, ones, TokenLoss(), backend="triton", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_without_a_gradient_wanted_the_logits_stay():
    logits = torch.randn(3, 37, device=DEVICE)
    before, ones, targets = logits.clone(), torch.ones(3, device=DEVICE), torch.arange(3, device=DEVICE)
    loss, _, _ = fused_policy_loss(logits, targets, ones, ones, TokenLoss(), backend="triton", inplace=True)
    assert torch.equal(logits, before) and not loss.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_and_entropies_carry_no_gradient(form):
    model = Model(7, n=6)
    leaves = [z.clone().requires_grad_(True) for z in model.inputs]
    loss, logp, entropy = model.loss(form, TokenLoss(), token_inputs(model.logp, 8), *leaves)
    assert loss.requires_grad and not logp.requires_grad and not entropy.requires_grad


# ---- rows, chunks, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_without_signal_cost_no_product(backend):
    """Half of the rows have no advantage, some are masked: their logits are never made. Clipped rows have logits, which
    tell that they are clipped, and no part in dH and dW."""
    model = Model(11, n=80)
    x = {"advantages": torch.ones(80, device=DEVICE), "weights": torch.ones(80, device=DEVICE)}
    x["advantages"][::2], x["weights"][1:17:2] = 0, 0
    clipped = torch.arange(80, device=DEVICE) % 8 == 5
    x["old_logp"] = model.logp - clipped.float()  # ratio e, beyond the clip
    with Products() as seen:
        ours = model.run(f"linear {backend}", TokenLoss(), x)
    rows, gone = int(alive(TokenLoss(), x).sum()), int((clipped & alive(TokenLoss(), x)).sum())
    assert (rows, gone) == (32, 8)
    heads = [m for m, k, n in seen.shapes if (k, n) == (16, 123)]
    hidden = [m for m, k, n in seen.shapes if (k, n) == (123, 16)]
    weight = [k for m, k, n in seen.shapes if (m, n) == (123, 16)]
    padded = 32 if DEVICE.type == "cpu" else rows - gone  # two chunks with 12 live rows each; a CPU takes 16 at least
    assert (sum(heads), sum(hidden), sum(weight)) == (rows, padded, rows - gone), seen.shapes
    assert len(seen.shapes) == len(heads) + len(hidden) + len(weight)
    plain = model.run("fused torch", TokenLoss(), x)
    assert_near(ours[3:], plain[3:], 3e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kl", ["none", "k3"])
def test_a_row_with_zero_advantage_counts_where_something_else_pulls(backend, kl):
    model = Model(12, n=32)
    o, zeros = options("clip", "token", kl, "none"), torch.zeros(32, device=DEVICE)
    x = token_inputs(model.logp, 13) | {"advantages": zeros, "weights": zeros + 1 / 32}
    x = {name: None if z is None else z.nan_to_num(-1.0) for name, z in x.items()}
    with Products() as seen:
        ours = model.run(f"linear {backend}", o, x)
    assert bool(seen.shapes) == ours[3].any() == (kl != "none")


@pytest.mark.parametrize("form", ["fused torch", "fused triton", "linear torch", "linear triton"])
def test_micro_batches_chunks_and_the_order_of_rows_change_nothing(form, seed):
    n = {"fused triton": 9, "linear triton": 20}.get(form, 36)
    model, draw = Model(seed, n=n), random.Random(seed)
    o = options("clip", "token", "k3", "token_truncate", None, 0.0, 0.03)
    x = token_inputs(model.logp, seed + 1)
    whole = (
        model.run(form, o, x, workspace=one_chunk(n, model.vocab))
        if form.startswith("linear")
        else model.run(form, o, x)
    )
    order = torch.randperm(n, generator=generator(seed)).to(DEVICE)
    cut = draw.randrange(1, n)

    def part(rows):
        own = Model(seed, n=n)
        own.inputs[0], own.targets = model.inputs[0][rows], model.targets[rows]
        return own.run(form, o, rows_of(x, rows))

    split = [part(order[:cut]), part(order[cut:])]
    by_row = [torch.cat([z[i] for z in split])[order.argsort()] for i in (1, 2, 3)]
    summed = [sum(z[i] for z in split) for i in (4, 5, 0)]
    torch.testing.assert_close(summed.pop(), whole[0], rtol=1e-5, atol=1e-6)
    assert_near([*by_row, *summed], whole[1:], 2e-6)
    for rows in (17, 21, n) if form == "linear torch" else (16,) if form == "linear triton" else ():
        chunked = model.run(form, o, x, workspace=one_chunk(rows, model.vocab))
        assert_near(chunked[1:], whole[1:], 2e-6)
        assert DEVICE.type == "cuda" or same_bits(chunked[1:4], whole[1:4])
    if form != "linear triton":
        again = model.run(form, o, x, **({"workspace": one_chunk(n, model.vocab)} if form == "linear torch" else {}))
        assert same_bits(again, whole)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's product may add up in another order for other rows")
def test_few_live_rows_in_a_chunk_have_the_same_bits(seed):
    """A product of one or two rows is another routine on a CPU."""
    model = Model(seed, n=48, width=64)
    x = {"advantages": torch.ones(48), "weights": torch.ones(48)}
    live = torch.tensor([0, 20, 40])
    x["old_logp"] = (model.logp - 1).index_copy(0, live, model.logp[live])  # all the others are clipped
    for rows in (16, 24):
        whole, chunked = (
            model.run("linear torch", TokenLoss(), x, workspace=one_chunk(n, model.vocab)) for n in (48, rows)
        )
        assert same_bits(chunked[1:4], whole[1:4]), rows


@pytest.mark.parametrize("form", FORMS[1:3])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(form, seed):
    n = 6
    logits = torch.randn(n, 517, generator=generator(seed)).to(DEVICE)
    targets = torch.randint(517, (n,), generator=generator(seed)).to(DEVICE)
    logp = token_logprobs(logits, targets, backend="torch")[0]
    o, x = options("sapo", "token", "k3", "none", None, 0.1, 0.03), token_inputs(logp, seed)

    def of(rows):
        leaf = logits[rows].clone().requires_grad_(True)
        more = {"backend": "triton", "inplace": form.endswith("in place")}
        loss, *others = fused_policy_loss(leaf, targets[rows], options=o, **rows_of(x, rows), **more)
        return [*others, *torch.autograd.grad(loss, leaf)]

    whole = of(torch.arange(n, device=DEVICE))
    order = torch.randperm(n, generator=generator(seed)).to(DEVICE)
    for rows in (torch.arange(n, device=DEVICE), order, order[:3]):
        assert same_bits(of(rows), [z[rows] for z in whole])


@pytest.mark.parametrize(("backend", "rows"), [("torch", 160), ("triton", 68)])
def test_the_whole_of_the_logits_is_never_held(backend, rows):
    model = Model(14, n=rows, vocab=1031, width=8, softcap=None)
    x = {"advantages": torch.ones(rows, device=DEVICE), "weights": torch.ones(rows, device=DEVICE)}

    def largest(form) -> int:
        with Largest() as seen:
            model.run(form, TokenLoss(), x)
        return seen.bytes

    whole, chunk = rows * 1031 * 4, one_chunk(16, 1031)
    assert largest("fused torch") >= whole  # the measure sees what it should
    assert largest(f"linear {backend}") <= max(chunk, 4 * 1031 * 8) < whole / 4


def test_in_place_takes_no_memory_of_the_logits_size():
    x = {"advantages": torch.ones(8, device=DEVICE), "weights": torch.ones(8, device=DEVICE)}
    targets = torch.arange(8, device=DEVICE)

    def largest(inplace) -> int:
        leaf = torch.randn(8, 1031, device=DEVICE, requires_grad=True)
        with Largest(but=leaf) as seen:
            loss, *_ = fused_policy_loss(leaf, targets, options=TokenLoss(), **x, inplace=inplace, backend="triton")
            torch.autograd.grad(loss, leaf)
        return seen.bytes

    assert largest(True) < 1031 * 4 < 8 * 1031 * 4 <= largest(False)


# ---- views, offsets, mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["[:, :-1]", "[:, 1:]", "[::2]", "[:, ::2]"])
@pytest.mark.parametrize("inplace", [False, True])
def test_views_of_larger_tensors_are_taken_as_they_are(view, inplace, seed):
    base = torch.randn(6, 264, generator=generator(seed)).to(DEVICE)
    index = {"[:, :-1]": (slice(None), slice(None, -1)), "[:, 1:]": (slice(None), slice(1, None))}
    index |= {"[::2]": (slice(None, None, 2),), "[:, ::2]": (slice(None), slice(None, None, 2))}
    logits = base[index[view]].clone()
    n, vocab = logits.shape
    targets, x = torch.tensor([0, vocab - 1, 5, 5, 7, 9], device=DEVICE)[:n], {"weights": torch.ones(n, device=DEVICE)}
    x["advantages"] = torch.linspace(-1, 1, n, device=DEVICE)

    def form(z, leaf):
        loss, logp, entropy = fused_policy_loss(z, targets, options=TokenLoss(), **x, inplace=inplace, backend="triton")
        return [loss.detach(), logp, entropy, *torch.autograd.grad(loss, leaf)]

    plain = logits.clone().requires_grad_(True)
    expected = form(plain * 1, plain)
    leaf = base.clone().requires_grad_(True)
    whole = leaf * 1
    ours = form(whole[index[view]], leaf)
    assert_near([*ours[:3], ours[3][index[view]]], expected, 1e-6)
    beside = torch.ones(base.shape, dtype=torch.bool, device=DEVICE)
    beside[index[view]] = False
    assert torch.equal(whole.detach()[beside], base[beside]) and not ours[3][beside].any()


@pytest.mark.parametrize("name", ["targets", "temperature", "advantages"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_number_a_row_may_be_strided_too(backend, name, seed):
    logits, g = torch.randn(6, 123, generator=generator(seed)).to(DEVICE), generator(seed)
    x = {"targets": torch.randint(123, (12,), generator=g).to(DEVICE), "weights": torch.ones(12, device=DEVICE)}
    x |= {
        "temperature": torch.linspace(0.3, 2, 12, device=DEVICE),
        "advantages": torch.linspace(-1, 1, 12, device=DEVICE),
    }
    plain = {key: z[::2].contiguous() for key, z in x.items()}
    strided = plain | {name: x[name][::2]}
    loss, logp, _ = fused_policy_loss(logits, options=TokenLoss(), backend=backend, **strided)
    expected = fused_policy_loss(logits, options=TokenLoss(), backend="torch", **plain)
    assert_near([loss, logp], expected[:2], 1e-5)


def test_offsets_pass_two_to_the_31():
    logits, wrapped, small = far_rows()
    targets, ones = torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE)

    def in_place(z):
        z.requires_grad_(True)
        more = {"backend": "triton", "inplace": True}
        return [x.detach() for x in fused_policy_loss(z, targets, ones, ones, TokenLoss(), **more)]

    assert same_bits(in_place(logits), in_place(small))
    assert torch.equal(logits, small) and wrapped.eq(1.0).all()


MISTAKES = [
    ({"advantages": torch.ones(5)}, {}, r"advantages has shape \[5\].* 6 rows"),
    ({"weights": torch.ones(6, 1)}, {}, r"weights has shape \[6, 1\]"),
    ({"old_logp": torch.ones(1)}, {}, "old_logp has shape"),
    ({}, {"kl": "k3"}, "kl='k3' needs ref_logp"),
    ({}, {"importance": "token_mask"}, "importance='token_mask' needs rollout_logp"),
    ({"old_logp": torch.ones(6)}, {"ratio_level": "seq_mean"}, "ratio_level='seq_mean' needs log_ratio"),
    ({}, {"importance": "seq_truncate"}, "importance='seq_truncate' needs omega"),
    ({}, {"importance": "geo_mask"}, "importance='geo_mask' needs omega"),
    ({"targets": torch.zeros(5, dtype=torch.long)}, {}, "targets has shape"),
    ({"temperature": torch.ones(5)}, {}, "temperature has shape"),
    ({"backend": "cuda"}, {}, "backend='cuda' is unknown"),
]


@pytest.mark.parametrize(("change", "more", "sentence"), MISTAKES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("function", [fused_policy_loss, linear_policy_loss])
def test_a_mistake_is_one_clear_sentence(function, backend, change, more, sentence):
    inputs = {"targets": torch.zeros(6, dtype=torch.long), "advantages": torch.ones(6), "weights": torch.ones(6)}
    inputs |= {"backend": backend} | change
    inputs = {name: z.to(DEVICE) if isinstance(z, torch.Tensor) else z for name, z in inputs.items()}
    head = (torch.zeros(6, 4, device=DEVICE), torch.zeros(7, 4, device=DEVICE))
    head = head if function is linear_policy_loss else (torch.zeros(6, 7, device=DEVICE),)
    with pytest.raises(ValueError, match=sentence):
        function(*head, options=PolicyLoss(**more), **inputs)


# ---- no recompilation ------------------------------------------------------------------------------------------------


def specialised(kernel, args, settings):
    """What Triton compiles apart: an integer's width, if it is 1, if 16 divides it; a pointer's alignment; None."""
    free = (
        kernel.kwargs["do_not_specialize"] or ()
        if run.INTERPRETED
        else [p.name for p in kernel.params if p.do_not_specialize]
    )

    def of(x, free=False):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16 == 0
        if isinstance(x, tuple):
            return tuple(map(of, x))
        if isinstance(x, int) and not isinstance(x, bool):
            width = 32 if -(1 << 31) <= x < 1 << 31 else 64
            return (width,) if free else (width, x == 1, x % 16 == 0)
        return type(x)

    return tuple(of(x, name in free) for name, x in zip(kernel.arg_names, args, strict=False)), tuple(settings.items())


def test_nothing_is_compiled_anew_for_another_length_weight_or_range(monkeypatch, seed):
    seen, compiled, draw = {}, {}, random.Random(seed)

    def launch(kernel, grid, *args, **settings):
        key = specialised(kernel, args, settings)
        seen.setdefault((kernel.__name__, settings.get("GRADIENT")), set()).add(key)
        if not run.INTERPRETED or kernel.__name__ == "_token_kernel":  # whose coefficients choose the live rows
            kernel[grid](*args, **settings)
        if not run.INTERPRETED:
            compiled.setdefault(kernel.__name__, kernel)

    monkeypatch.setattr(run, "launch", launch)
    lengths, counts = [1, 2, 16, 17, 500, *draw.sample(range(3, 300), 45)], []
    for n in lengths:
        o = TokenLoss(
            eps_low=draw.choice((0, 1, 16, draw.random())), eps_high=draw.random(), entropy_coef=draw.random()
        )
        temperature, x = draw.choice((1, 16, draw.random() + 0.1)), {"advantages": torch.ones(n, device=DEVICE)}
        x["weights"], targets = (
            torch.full((n,), draw.random() + 0.1, device=DEVICE),
            torch.zeros(n, device=DEVICE).long(),
        )
        x["old_logp"] = torch.zeros(n, device=DEVICE) if n % 2 else torch.full((n,), -1.0, device=DEVICE)
        logits = torch.randn(n, 37, device=DEVICE, requires_grad=True)
        for inplace in (False, True):
            more = {"temperature": temperature, "inplace": inplace, "backend": "triton"}
            token_logprobs(logits.clone(), targets, **more)[0].sum().backward()
            fused_policy_loss(logits.clone(), targets, options=o, **x, **more)[0].backward()
        more = {"temperature": temperature, "workspace": one_chunk(200, 37), "backend": "triton"}
        hidden, weight = torch.randn(n, 8, device=DEVICE, requires_grad=True), torch.randn(37, 8, device=DEVICE)
        x["old_logp"] = None  # no ratio to clip: every row is live
        linear_policy_loss(hidden, weight, targets, options=o, **x, **more)[0].backward()
        size = torch.zeros(n * 37) if DEVICE.type == "cpu" else torch.zeros(n * 37, device=DEVICE)
        scale_(size.as_subclass(AsIfOnGpu) if DEVICE.type == "cpu" else size, numbers(2.0)[0])
        counts.append(sum(len(cache[0]) for kernel in compiled.values() for cache in kernel.device_caches.values()))
    assert len({name for name, _ in seen}) == 5, "a kernel was not launched"
    for name, keys in seen.items():
        assert len(keys) == 1, f"{name} is compiled {len(keys)} times"
    assert len(set(counts[1:])) == 1, counts


# ---- the training loop's loss: from hidden states, as on logits ------------------------------------------------------

HEAD_OPTIONS = {  # the quantile lies between two tokens: which of them it cuts is no matter of rounding
    "clip": {"eps_high": 0.28, "dual_clip": 1.6},
    "reinforce": {"ratio_level": "none", "surrogate": "is_pg", "aggregation": "seq_sum"},
    "cispo": {"surrogate": "is_pg", "w_min": 0.7, "w_max": 1.3},
    "gspo": {"ratio_level": "seq_mean", "aggregation": "seq_mean"},
    "gspo, penalties": {"ratio_level": "seq_mean", "kl": "k3_is", "kl_coef": 0.1, "entropy_coef": 0.01},
    "sapo, sums": {"ratio_level": "seq_sum", "surrogate": "sapo", "kl": "k3", "kl_coef": 0.1},
    "grpo": {"kl": "k3", "kl_coef": 0.04, "aggregation": "seq_mean"},
    "dr_grpo": {"aggregation": "seq_sum_const", "const_length": 7},
    "group means": {"aggregation": "group_token_mean", "kl": "k2", "kl_coef": 0.1},
    "group means, bonus": {"aggregation": "group_token_mean", "entropy_coef": 0.05},
    "penalty": {"eps_low": INF, "eps_high": INF, "kl_old_coef": 1.0},
    "clamped": {"kl": "k3", "kl_coef": 1.0, "kl_clamp": 0.05},
    "v3.2": {"kl": "k3_is", "kl_coef": 0.1, "opsm_delta": 0.1, "aggregation": "seq_mean"},
    "opsm": {"opsm_delta": 0.1},
    "quantile": {"entropy_quantile": 0.37},
    "quantile, bonus": {"entropy_quantile": 0.37, "entropy_coef": 0.02, "ratio_level": "seq_mean"},
} | {
    f"importance {name}": {"importance": name, "importance_cap": 1.4, "importance_floor": 0.7, "eps_high": 0.28}
    for name in ("token_truncate", "token_mask", "seq_truncate", "seq_mask", "geo_mask")
}  # fmt: skip


def step(seed: int, advantages: str, dtype=torch.float64, rows=5, time=7, vocab=37, width=12) -> dict:
    """A batch with a full row, holes, an empty row; present tokens that do not count; temperature 0.8; kept sets."""
    g = generator(seed)
    present = torch.rand(rows, time, generator=g) < 0.8
    present[0], present[3] = True, False
    mask = present & (torch.rand(rows, time, generator=g) < 0.85)
    mask[0] = True
    m, A = int(present.sum()), torch.randn(rows, time, generator=g, dtype=torch.float64)
    A = A[:, 0].clone() if advantages.startswith("row") else A.masked_fill(torch.rand(A.shape, generator=g) < 0.3, 0)
    if advantages == "rows with zeros":
        A[1] = 0
    hidden, weight = torch.randn(m, width, generator=g), torch.randn(vocab, width, generator=g) * 0.5
    targets = torch.randint(vocab, (m,), generator=g)
    batch = {"hidden": hidden.to(DEVICE, dtype), "weight": weight.to(DEVICE, dtype), "targets": targets.to(DEVICE)}
    allowed = random_mask(m, vocab, batch["targets"], seed)
    logp, _ = grids(batch, present.to(DEVICE), allowed)
    noise = [(torch.randn(rows, time, generator=g) * scale).to(logp) for scale in (0.3, 0.5, 0.3)]
    batch |= {"old_logp": logp + noise[0], "ref_logp": logp + noise[1], "rollout_logp": logp + noise[0] + noise[2]}
    batch |= {"mask": mask.to(DEVICE), "advantages": A.to(DEVICE), "group_ids": torch.arange(rows, device=DEVICE) // 2}
    return batch | {"present": present.to(DEVICE), "allowed": allowed}


def grids(batch, present, allowed):
    logits = batch["hidden"] @ batch["weight"].t()
    scored = token_logprobs(logits, batch["targets"], 0.8, allowed, backend="torch")
    return [z.new_zeros(present.shape).masked_scatter(present, z) for z in scored]


def leaves_of(batch) -> dict:
    return batch | {name: batch[name].clone().requires_grad_(True) for name in ("hidden", "weight")}


ROWS = ("advantages", "mask", "old_logp", "ref_logp", "rollout_logp", "group_ids")  # the fields of LossInputs


def on_logits(batch, o, **changes):
    """loss, metrics, gradients of `policy_loss`."""
    batch = leaves_of(batch)
    logp, entropy = grids(batch, batch["present"], batch["allowed"])
    loss, metrics = policy_loss(logp, options=o, entropy=entropy, **{name: batch[name] for name in ROWS} | changes)
    return loss.detach(), metrics, torch.autograd.grad(loss, [batch["hidden"], batch["weight"]], materialize_grads=True)


def from_hidden(batch, o, totals=None):
    batch = leaves_of(batch)
    head = {"temperature": 0.8, "kept": kept_of(batch["allowed"])}
    policy = HiddenStates(*(batch[name] for name in ("hidden", "weight", "targets", "present")), head)
    loss, metrics = loss_and_metrics(policy, LossInputs(**{name: batch[name] for name in ROWS}), o, totals)
    return loss.detach(), metrics, torch.autograd.grad(loss, [batch["hidden"], batch["weight"]])


@pytest.mark.parametrize("name", HEAD_OPTIONS)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("advantages", ["rows", "rows with zeros", "tokens with zeros"])
def test_the_loss_from_hidden_states_is_that_on_logits(name, old, advantages, seed):
    o, batch = PolicyLoss(**HEAD_OPTIONS[name]), step(seed, advantages)
    batch["old_logp"] = batch["old_logp"] if old else None
    (loss, metrics, slopes), (expected, theirs, gradients) = from_hidden(batch, o), on_logits(batch, o)
    torch.testing.assert_close([loss, *slopes], [expected, *gradients], rtol=1e-10, atol=1e-12)
    if advantages == "tokens with zeros" and o.follows_advantage and takes_rows(o):
        return  # the next test
    parts = {"loss/total", "loss/policy", "loss/kl", "loss/entropy"}
    assert metrics.keys() == theirs.keys()
    assert_same(metrics, theirs, parts)
    assert_same(metrics, on_trained_tokens(batch, o), metrics.keys() - parts)


def takes_rows(o: PolicyLoss) -> bool:
    """Whether the loss of a token depends on other tokens of its row."""
    return o.ratio_level.startswith("seq") or o.importance.startswith(("seq", "geo")) or o.opsm_delta is not None


def assert_same(metrics, theirs, keys):
    for key in keys:
        ours, exact = metrics[key].double(), theirs[key].double()
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")


def on_trained_tokens(batch, o) -> dict:
    """Metrics of `policy_loss` as means over the tokens that can have a gradient."""
    trained = with_gradient(batch["mask"], batch["advantages"], o)
    entropy = grids(batch, batch["present"], batch["allowed"])[1]
    totals = Totals.of(batch["mask"], batch["group_ids"], entropy, o.entropy_quantile).measured_over(int(trained.sum()))
    return on_logits(batch, o, mask=trained, totals=totals)[1]


@pytest.mark.parametrize("name", ["gspo", "importance seq_truncate", "importance geo_mask"])
def test_metrics_of_row_ratios_are_those_of_the_loss_where_single_tokens_have_no_advantage(name):
    o, batch = PolicyLoss(**HEAD_OPTIONS[name]), step(3, "tokens with zeros")
    loss, metrics, _ = from_hidden(batch, o)
    torch.testing.assert_close(metrics["loss/total"], loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "gspo", "grpo", "importance seq_mask", "quantile", "group means, bonus"])
def test_micro_batches_of_hidden_states_add_up_to_the_step(name, seed):
    o, batch = PolicyLoss(**HEAD_OPTIONS[name]), step(seed, "rows")
    entropy = grids(batch, batch["present"], batch["allowed"])[1]
    totals = Totals.of(batch["mask"], batch["group_ids"], entropy, o.entropy_quantile)
    place = batch["present"].new_zeros(batch["present"].shape, dtype=torch.long)
    place[batch["present"]] = torch.arange(len(batch["targets"]), device=DEVICE)
    loss, by_hidden, by_weight = 0.0, torch.zeros_like(batch["hidden"]), 0.0
    for rows in ([0, 2], [1, 3, 4]):
        own = place[rows][batch["present"][rows]]
        part = {n: batch[n][rows] for n in (*ROWS, "present")} | {"weight": batch["weight"]}
        part |= {"hidden": batch["hidden"][own], "targets": batch["targets"][own], "allowed": batch["allowed"][own]}
        value, _, (dh, dw) = from_hidden(part, o, totals=totals)
        loss, by_weight, by_hidden[own] = loss + value, by_weight + dw, dh
    expected, _, gradients = on_logits(batch, o)
    torch.testing.assert_close([loss, by_hidden, by_weight], [expected, *gradients], rtol=1e-10, atol=1e-12)


def test_rows_without_signal_need_not_be_present(seed):
    """The training loop runs no forward pass over them; they count in the denominators all the same."""
    o, batch = PolicyLoss(), step(seed, "rows with zeros")
    expected, _, gradients = on_logits(batch, o)
    kept = batch["present"].clone()
    kept[1] = False
    own = kept[batch["present"]]
    part = batch | {"present": kept} | {n: batch[n][own] for n in ("hidden", "targets", "allowed")}
    loss, _, (by_hidden, by_weight) = from_hidden(part, o)
    torch.testing.assert_close([loss, by_weight], [expected, gradients[1]], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_hidden, gradients[0][own], rtol=1e-10, atol=1e-12)


# ---- in somebody else's trainer --------------------------------------------------------------------------------------


def small(n=18, vocab=37, width=8):
    g = generator(3)
    hidden, weight = torch.randn(n, width, generator=g).to(DEVICE), torch.randn(vocab, width, generator=g).to(DEVICE)
    targets = torch.randint(vocab, (n,), generator=g).to(DEVICE)
    return hidden, weight, targets, torch.ones(n, device=DEVICE), torch.full((n,), 1 / n, device=DEVICE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_around_the_loss_changes_nothing(backend):
    hidden, weight, *rest = small()

    def gradients():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, *_ = linear_policy_loss(h, w, *rest, TokenLoss(), backend=backend)
        (loss + linear_token_logprobs(h, w, rest[0], backend=backend)[0].sum()).backward()
        return h.grad, w.grad

    plain = gradients()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_the_logits_carry_a_gradient(backend):
    """Advantages of a critic and old log-probs that are still attached are constants all the same."""
    hidden, weight, targets, A, w = small()
    A, old = A.clone().requires_grad_(), torch.zeros_like(A, requires_grad=True)
    logits = (hidden @ weight.t()).requires_grad_()
    given = {"old_logp": old, "temperature": torch.ones_like(w, requires_grad=True), "backend": backend}
    fused_policy_loss(logits, targets, A, w, TokenLoss(surrogate="is_pg"), **given)[0].backward()
    assert logits.grad.any() and A.grad is None and old.grad is None and given["temperature"].grad is None


def test_without_gradients_nothing_is_overwritten_and_no_gradient_product_is_made():
    hidden, weight, *rest = small()
    logits = (hidden @ weight.t()).requires_grad_()
    before = logits.detach().clone()
    weight.requires_grad_()
    with torch.no_grad(), Products() as seen:
        fused_policy_loss(logits, *rest, TokenLoss(), inplace=True, backend="triton")
        linear_policy_loss(hidden, weight, *rest, TokenLoss())
    assert torch.equal(logits, before)
    assert [shape[1:] for shape in seen.shapes] == [(8, 37)]  # the logits alone


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_target_under_weight_zero_may_be_any_number(backend):
    hidden, weight, targets, A, w = small()
    targets[3], w[3] = -100, 0
    loss, *_ = fused_policy_loss(hidden @ weight.t(), targets, A, w.double(), TokenLoss(), backend=backend)
    assert loss.isfinite()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_old_log_prob_of_minus_infinity_is_a_ratio_at_its_guard(backend):
    hidden, weight, targets, A, w = small()
    old = torch.full_like(w, -math.inf)
    loss, *_ = fused_policy_loss(hidden @ weight.t(), targets, A, w, TokenLoss(), old_logp=old, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(-1.2, device=DEVICE))  # clipped at 1 + eps_high


@pytest.mark.parametrize("wrong", [{"surrogate": "foo"}, {"kl": "k1"}, {"importance": "foo"}, {"ratio_level": "seq"}])
def test_an_unknown_choice_is_refused_by_the_options(wrong):
    with pytest.raises(ValueError, match="is unknown: use one of"):
        TokenLoss(**wrong)
