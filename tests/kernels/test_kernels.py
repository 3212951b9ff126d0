"""Log-probs and entropies of given tokens against float64 and the golden numbers: the definition, the Triton row sweeps
(in Triton's interpreter where there is no GPU), and both from hidden states."""

import math
import os
import secrets

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirl.kernels import Kept, backend, linear_token_logprobs, token_logprobs
from minirl.kernels.logprobs import gradient_triton, stats_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * DEVICE.type.count(
    "cuda"
)  # interpreted bf16 is wrong
VOCABULARIES = (7, 123, 517, 2053)
LARGE = (32000, 49152, 50257, 128256, 129920, 151936, 262144)
BACKENDS = ("torch", "triton")
INF, NAN = math.inf, math.nan


@pytest.fixture(name="seed")
def fresh_seed() -> int:
    """Fresh inputs on every run; pytest prints the number beside a failure, and SEED=… repeats it."""
    number = int(os.environ.get("SEED", secrets.randbelow(1 << 30)))
    print(f"SEED={number}")
    return number


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_case(rows: int, vocab: int, width: int = 24, dtype=torch.float64, seed: int = 0):
    """hidden [N, D], weight [V, D], targets [N] with the first and the last token of the vocabulary among them."""
    g = generator(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    weight = (torch.randn(vocab, width, generator=g, dtype=torch.float64) * 0.5).to(DEVICE, dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[0], targets[-1] = 0, vocab - 1
    return hidden, weight, targets.to(DEVICE)


def kept_of(mask: torch.Tensor) -> Kept:
    """From bool [N, V]; a full row becomes an empty list, which means the same."""
    rows = [row.nonzero().squeeze(1) if not row.all() else row.new_empty(0, dtype=torch.long) for row in mask]
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in rows])], device=mask.device)
    return Kept(torch.cat(rows).int(), offsets)


def random_mask(rows: int, vocab: int, targets: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Kept sets that hold their target: of any size, one of the target alone, one of everything."""
    mask = torch.rand(rows, vocab, generator=generator(seed)) < torch.rand(rows, 1, generator=generator(seed + 1))
    mask[0], mask[-1] = False, True
    return mask.to(DEVICE).scatter(1, targets.unsqueeze(1), True)


def by_hand(logits: torch.Tensor, targets: torch.Tensor, temperature=1.0, mask=None):
    """log p(target) and -sum p log p in plain float64, a row at a time."""
    logp, entropy = [], []
    for i, row in enumerate(logits.double()):
        z = row / float(temperature if isinstance(temperature, float) else temperature[i])
        kept = z if mask is None else z[mask[i]]
        log_sum = kept.max() + (kept - kept.max()).exp().sum().log()
        p = (kept - log_sum).exp()
        logp.append(z[targets[i]] - log_sum)
        entropy.append(-(p[p > 0] * p[p > 0].log()).sum())
    return torch.stack(logp), torch.stack(entropy)


def backward(function, inputs: list[torch.Tensor], seed: int = 7, only: int | None = None) -> list[torch.Tensor]:
    """Value and gradients of a weighting of the outputs by ±[½, 1½): logp, entropy, then a gradient for each input.

    `only`: just this output is used.
    """
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    outputs, total = function(*leaves), 0.0
    for i, out in enumerate(outputs):
        sign, size = torch.rand(2, len(out), generator=generator(seed + i), dtype=torch.float64).to(out.device)
        if only in (None, i):
            total = total + (out.double() * (size + 0.5) * (sign - 0.5).sign()).sum()
    total.backward()
    return [*(out.detach() for out in outputs), *(leaf.grad for leaf in leaves)]


def one_chunk(rows: int, vocab: int) -> int:
    """Bytes of that many rows of fp32 logits."""
    return 4 * vocab * rows


def identity_head(backend: str):
    def form(logits, targets, temperature=1.0, mask=None):
        kept, eye = None if mask is None else kept_of(mask), torch.eye(logits.shape[1]).to(logits)
        options = {"workspace": one_chunk(16, len(eye)), "backend": backend}
        return linear_token_logprobs(logits, eye, targets, temperature, kept, **options)

    return form


SWEEPS = {  # (logits, targets, temperature, mask) -> logp, entropy
    "triton": lambda z, *args: token_logprobs(z, *args, backend="triton"),
    "triton in place": lambda z, *args: token_logprobs(z, *args, inplace=True, backend="triton"),
}
ON_LOGITS = {"torch": lambda z, *args: token_logprobs(z, *args, backend="torch"), **SWEEPS}
FORMS = ON_LOGITS | {f"linear {name}": identity_head(name) for name in BACKENDS}


def run(form: str, logits: torch.Tensor, targets: torch.Tensor, *args, only: int | None = None) -> list[torch.Tensor]:
    """logp, entropy and d/dlogits."""
    return backward(lambda z: FORMS[form](z, targets, *args), [logits], only=only)


def truth(logits: torch.Tensor, *args, only: int | None = None) -> list[torch.Tensor]:
    return run("torch", logits.double(), *args, only=only)


def assert_near(ours, exact, tolerance: float) -> None:
    """In relation to the largest entry of each tensor."""
    for i, (x, y) in enumerate(zip(ours, exact, strict=True)):
        error, size = (x.double() - y.double()).abs().max(), y.double().abs().max()
        assert error <= tolerance * size, f"output {i} is off by {error:.2e}, and its largest entry is {size:.2e}"


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_logprobs_are_those_of_float64(vocab, dtype, kept, backend, seed):
    if backend == "triton" and dtype not in KERNEL_DTYPES:
        pytest.skip("not a dtype of the kernels here")
    hidden, weight, targets = random_case(5, vocab, seed=seed)
    logits = (hidden @ weight.t()).to(dtype)
    mask = random_mask(5, vocab, targets, seed) if kept else None
    temperature = torch.linspace(0.3, 2, 5, device=DEVICE)
    for t in (1.0, 0.6, temperature):
        logp, entropy = token_logprobs(logits, targets, t, mask, backend=backend)
        expected = by_hand(logits, targets, t, mask)
        assert logp.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close((logp.double(), entropy.double()), expected, rtol=tolerance, atol=tolerance)


def test_the_definition_has_exact_gradients_also_through_kept_sets():
    hidden, weight, targets = random_case(5, 7)
    logits = (hidden @ weight.t()).requires_grad_(True)
    mask = random_mask(5, 7, targets)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, 0.7), logits)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, 0.7, mask), logits)


@pytest.mark.parametrize("case", ["softmax_core_T1", "softmax_core_keep_sampling_mask"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_softmax_core(golden, case, form, dtype):
    if "triton" in form and dtype == torch.float64:
        pytest.skip("the kernels compute in fp32")
    numbers = golden["cases"][case]
    data, expected, temperature = numbers["inputs"], numbers["expected"], numbers["params"]["temperature"]
    logits = torch.tensor(data["logits"], dtype=dtype, device=DEVICE, requires_grad=True)
    mask = torch.tensor(data["keep_mask"], dtype=torch.bool, device=DEVICE) if "keep_mask" in data else None
    logp, entropy = FORMS[form](logits, torch.tensor(data["target"], device=DEVICE), temperature, mask)
    c, e = (torch.tensor(data[key], dtype=dtype, device=DEVICE) for key in ("grad_logp", "grad_entropy"))
    (logp @ c + entropy @ e).backward()
    tolerance = golden["tolerance"][str(dtype).removeprefix("torch.")]
    for ours, name in ((logp, "logp"), (entropy, "entropy"), (logits.grad, "dlogits")):
        torch.testing.assert_close(
            ours.detach().cpu(), torch.tensor(expected[name], dtype=dtype), rtol=0, atol=tolerance
        )


# --- rows that pad the head -------------------------------------------------------------------------------------------


def padded_form(form: str, active: int | None):
    """(logits, targets, temperature, mask) -> logp, entropy of the first `active` logits."""
    if form.startswith("linear"):

        def linear(z, targets, temperature, mask):
            kept, eye = None if mask is None else kept_of(mask), torch.eye(z.shape[1]).to(z)
            more = {"active": active, "workspace": one_chunk(16, len(eye)), "backend": form.split()[1]}
            return linear_token_logprobs(z, eye, targets, temperature, kept, **more)

        return linear
    more = {"active": active, "inplace": form.endswith("in place"), "backend": form.split()[0]}
    return lambda z, targets, temperature, mask: token_logprobs(z, targets, temperature, mask, **more)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab", "active"), [(32, 15), (4112, 4000), (64, 1), (37, 37)])
def test_logits_from_active_on_are_as_if_they_were_not_there(form, dtype, vocab, active, seed):
    """Against float64 on a slice; what lies behind it is large, or NaN where the logits are given."""
    if form.startswith("linear") and vocab > 1000:
        pytest.skip("an identity of that size")
    g = generator(seed)
    logits = (torch.randn(5, vocab, generator=g) * 2).to(DEVICE, dtype)
    logits[:, active:] = 60.0
    if not form.startswith("linear"):
        logits[1, active:], logits[2, active:] = NAN, INF
    targets = torch.randint(active, (5,), generator=g).to(DEVICE)
    targets[0] = active - 1
    temperature = torch.linspace(0.3, 2, 5, device=DEVICE)
    for mask in (None, random_mask(5, vocab, targets, seed)):
        inside = None if mask is None else mask[:, :active]
        exact = truth(logits[:, :active], targets, temperature, inside)
        ours = backward(lambda z, m=mask: padded_form(form, active)(z, targets, temperature, m), [logits])
        assert not ours[2][:, active:].any()
        assert_near([*ours[:2], ours[2][:, :active]], exact, 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("form", ["triton", "triton in place"])
def test_a_broken_row_and_a_target_without_a_token_give_no_gradient_behind_active(form):
    logits = torch.randn(3, 32, device=DEVICE)
    logits[1, 3] = NAN
    targets = torch.tensor([4, 5, 20], device=DEVICE)
    logp, _, gradient = backward(lambda z: padded_form(form, 15)(z, targets, 1.0, None), [logits], only=0)
    assert logp.isnan().tolist() == [False, True, True] and not gradient[:, 15:].any()


@pytest.mark.parametrize("form", ["torch", "linear torch"])
def test_a_target_without_a_token_is_an_error_of_the_definition(form):
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        padded_form(form, 15)(torch.randn(2, 32), torch.tensor([3, 20]), 1.0, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("active", [0, -1, 33])
def test_an_impossible_number_of_active_logits_is_refused(form, active):
    with pytest.raises(ValueError, match=f"active = {active}: of 32 logits"):
        padded_form(form, active)(torch.randn(2, 32, device=DEVICE), torch.tensor([3, 2], device=DEVICE), 1.0, None)


# --- the error rule: never worse than PyTorch in the same dtype, each against float64 ---------------------------------


def off_target(gradient: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Where a gradient of 152k entries goes wrong unseen: its largest entry by far is the target's."""
    return gradient.double().scatter(1, targets.unsqueeze(1), 0.0)


def assert_no_worse_than_torch(ours, plain, exact, targets) -> None:
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
    for x, theirs, y in zip(ours, plain, exact, strict=True):
        error, limit = ((z.double() - y).abs().max() for z in (x, theirs))
        assert error <= limit + tolerance[x.dtype] * y.abs().max(), (error, limit)
    x, theirs, y = (off_target(z[2], targets) for z in (ours, plain, exact))
    error, limit = ((z - y).norm(dim=1) / y.norm(dim=1) for z in (x, theirs))
    assert (error <= 1.1 * limit + 1e-5).all(), (error, limit)
    assert (torch.cosine_similarity(x, y) > 0.9999).all()
    sums = ours[2].double().sum(1).abs() / ours[2].double().abs().sum(1)
    assert (sums < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[ours[2].dtype]).all(), sums


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(v, d) for v in VOCABULARIES for d in KERNEL_DTYPES]
    + [(v, d) for v in LARGE for d in KERNEL_DTYPES[1:]]
    + [(151936, torch.float32)],
)
def test_the_error_is_not_above_that_of_torch_in_the_same_dtype(vocab, dtype, seed):
    """Targets: the first token, the last, the first of the last tile."""
    logits = (torch.randn(3, vocab, generator=generator(seed)) * 2).to(DEVICE, dtype)
    targets = torch.tensor([0, vocab - 1, (vocab - 1) // 4096 * 4096], device=DEVICE)
    temperature = torch.tensor([1.0, 0.6, 1.4], device=DEVICE)
    plain, exact = run("torch", logits, targets, temperature), truth(logits, targets, temperature)
    ours = run("triton", logits, targets, temperature)
    assert_no_worse_than_torch(ours, plain, exact, targets)
    assert (ours[0] <= 0).all() and (ours[1] >= 0).all()
    if vocab in VOCABULARIES:
        in_place = run("triton in place", logits, targets, temperature)
        assert all(torch.equal(x, y) for x, y in zip(in_place, ours, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_of_the_linear_form_is_not_above_that_of_plain_torch(dtype, masked, backend, seed):
    """Worst error in relation to the largest entry, over several draws."""
    if backend == "triton" and dtype not in KERNEL_DTYPES:
        pytest.skip("not a dtype of the kernels here")
    worst = []
    n, draws = (33, 4) if backend == "torch" else (18, 1)
    for s in range(seed, seed + draws):
        hidden, weight, targets = random_case(n, 517, width=48, dtype=dtype, seed=s)
        mask = random_mask(n, 517, targets, s) if masked else None
        kept = kept_of(mask) if masked else None

        def definition(h, w, m=mask, y=targets):
            return token_logprobs(h @ w.t(), y, 0.7, m, backend="torch")

        def linear(h, w, k=kept, y=targets):
            return linear_token_logprobs(h, w, y, 0.7, k, workspace=one_chunk(17, 517), backend=backend)

        exact = backward(definition, [hidden.double(), weight.double()])
        ours, plain = (backward(f, [hidden, weight]) for f in (linear, definition))
        assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 2
        worst.append(
            [
                [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(xs, exact, strict=True)]
                for xs in (ours, plain)
            ]
        )
    ours, plain = torch.tensor(worst).amax(0)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
    assert (ours <= plain + tolerance).all(), (ours, plain)


# --- what autograd is promised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [name for name in FORMS if name != "torch"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_outputs_may_be_used_alone(form, which, seed):
    """A kernel that drops the gradient of the entropy passes every test of log-probs."""
    logits = torch.randn(5, 123, generator=generator(seed)).to(DEVICE)
    targets = torch.randint(123, (5,), generator=generator(seed)).to(DEVICE)
    assert_near(run(form, logits, targets, 0.8, only=which), truth(logits, targets, 0.8, only=which), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_unweighted_sum_has_its_gradient(form):
    """Autograd hands the gradient of a sum out as one expanded number."""
    logits = torch.randn(5, 123, generator=generator(8)).to(DEVICE)
    targets = torch.arange(5, device=DEVICE)
    leaf, exact = logits.clone().requires_grad_(True), logits.double().requires_grad_(True)
    token_logprobs(exact, targets, backend="torch")[0].sum().backward()
    FORMS[form](leaf, targets)[0].sum().backward()
    assert_near([leaf.grad], [exact.grad], 1e-5)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "torch"])
def test_a_second_derivative_is_refused_rather_than_wrong(form):
    logits = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    loss = FORMS[form](logits, torch.arange(3, device=DEVICE))[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_gradient_overwrites_the_logits_only_if_asked_and_only_in_the_backward_pass():
    x = torch.randn(3, 37, device=DEVICE)
    for inplace in (False, True):
        leaf = x.clone().requires_grad_(True)
        logits = leaf * 1
        logp, _ = token_logprobs(logits, torch.arange(3, device=DEVICE), inplace=inplace, backend="triton")
        assert torch.equal(logits, x)
        logp.sum().backward()
        assert torch.equal(logits, leaf.grad if inplace else x) and not torch.equal(leaf.grad, x)


def test_overwritten_logits_cannot_be_used_again():
    leaf, targets = torch.randn(3, 37, device=DEVICE, requires_grad=True), torch.arange(3, device=DEVICE)
    logits = leaf * 1
    logp, _ = token_logprobs(logits, targets, inplace=True, backend="triton")
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()
    logits = leaf * 1
    square, (logp, _) = (logits**2).sum(), token_logprobs(logits, targets, inplace=True, backend="triton")
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("form", ["torch", "triton", "linear torch", "linear triton"])
def test_a_second_backward_pass_repeats_the_first_where_nothing_is_overwritten(form):
    leaf = torch.randn(3, 37, device=DEVICE, requires_grad=True)
    logp, entropy = FORMS[form](leaf, torch.arange(3, device=DEVICE))
    first, second = (torch.autograd.grad((logp - entropy).sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# --- views -----------------------------------------------------------------------------------------------------------

VIEWS = {
    "all but the last column": lambda x: x[:, :-1],
    "all but the first column": lambda x: x[:, 1:],
    "part of wider rows": lambda x: x[:, 3:-9],
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "columns side by side": lambda x: x.t().contiguous().t(),
    "one row": lambda x: x[2:3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", ON_LOGITS)
def test_views_of_larger_tensors_are_taken_as_they_are(form, view, seed):
    base = torch.randn(6, 264, generator=generator(seed)).to(DEVICE)
    expected_base, logits = base.clone(), VIEWS[view](base).clone()
    targets = torch.randint(logits.shape[1], (len(logits),), generator=generator(seed)).to(DEVICE)
    targets[-1] = logits.shape[1] - 1
    expected = run(form, logits, targets)
    leaf = base.clone().requires_grad_(True)
    seen = []

    def whole(x):
        seen.append(x * 1)
        return FORMS[form](VIEWS[view](seen[0]), targets)

    logp, entropy, gradient = backward(whole, [base])
    place = torch.zeros_like(base, requires_grad=True)
    VIEWS[view](place).backward(expected[2])
    assert_near([logp, entropy, gradient], [*expected[:2], place.grad], 1e-6)
    outside = torch.autograd.grad(VIEWS[view](leaf).sum(), leaf)[0] == 0
    assert torch.equal(seen[0].detach()[outside], expected_base[outside])  # nothing beside the view was written


@pytest.mark.parametrize("name", ["targets", "temperature"])
@pytest.mark.parametrize(
    "form",
    ["torch", "linear torch", "linear triton", *SWEEPS],
)
def test_one_number_a_row_may_be_strided_too(form, name, seed):
    logits = torch.randn(6, 123, generator=generator(seed)).to(DEVICE)
    given = {"targets": torch.randint(123, (12,), generator=generator(seed)).to(DEVICE)}
    given["temperature"] = torch.linspace(0.3, 2, 12, device=DEVICE)
    plain = {key: x[::2].contiguous() for key, x in given.items()}
    given = {key: x[::2] if key == name else plain[key] for key, x in given.items()}
    assert_near(run(form, logits, *given.values()), truth(logits, *plain.values()), 1e-5)


# --- extreme logits, through an identity head where the form has one --------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [120.0, -120.0, 1000.0, -1000.0])
def test_rows_of_large_logits_are_exact(form, level):
    """A running maximum that starts at 0 gives -inf for a row near -120."""
    logits = level + torch.randint(-64, 65, (6, 37), generator=generator(1)).to(DEVICE) / 16.0  # exact in fp32
    targets = torch.randint(37, (6,), generator=generator(2)).to(DEVICE)
    ours = [x.double() for x in run(form, logits, targets)]
    torch.testing.assert_close(ours, truth(logits, targets), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [100.0, 1e4, -1e4])
def test_a_shift_of_all_logits_changes_neither_values_nor_gradients(form, shift):
    logits = torch.randint(-64, 65, (6, 37), generator=generator(3)).to(DEVICE) / 16.0  # shifts are exact in fp32
    targets = torch.randint(37, (6,), generator=generator(4)).to(DEVICE)
    plain, shifted = run(form, logits, targets), run(form, logits + shift, targets)
    torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-6)
    assert shifted[2].sum(1).abs().max() < 1e-5  # every row of d/dlogits sums to zero


@pytest.mark.parametrize("form", FORMS)
def test_a_certain_token_has_no_entropy_and_no_gradient(form):
    logits = torch.zeros(3, 37, device=DEVICE)
    logits[:, 5] = 1e4
    for x in run(form, logits, torch.tensor([5, 5, 5], device=DEVICE)):
        assert not x.any()
    logp, entropy, gradient = run(form, logits, torch.tensor([0, 36, 6], device=DEVICE))
    assert logp.eq(-1e4).all() and not entropy.any() and gradient.isfinite().all()
    assert gradient[:, 5].abs().gt(0).all()  # towards the target, all from the certain token


@pytest.mark.parametrize("form", ON_LOGITS)
@pytest.mark.parametrize("vocab", [37, 9000])
@pytest.mark.parametrize("part", ["head", "tail", "scattered"])
def test_a_token_of_probability_zero_stays_without_gradient(form, vocab, part):
    """Also where the first or the last tiles of a row hold nothing else."""
    logits = torch.randn(4, vocab, generator=generator(5)).to(DEVICE)
    finite = torch.ones(vocab, dtype=torch.bool, device=DEVICE)
    finite[{"head": slice(None, -20), "tail": slice(20, None), "scattered": slice(0, -1, 3)}[part]] = False
    places = finite.nonzero().squeeze(1)
    expected = truth(logits[:, finite], torch.arange(4, device=DEVICE))
    logp, entropy, gradient = run(form, logits.masked_fill(~finite, -INF), places[:4])
    torch.testing.assert_close([logp.double(), entropy.double()], expected[:2], rtol=2e-6, atol=2e-6)
    assert_near([gradient[:, finite]], [expected[2]], 1e-5)
    assert gradient[:, ~finite].eq(0).all()


@pytest.mark.parametrize("form", ON_LOGITS)
def test_a_target_that_could_not_be_drawn_has_log_prob_minus_infinity(form):
    logits = (
        torch.randn(2, 37, generator=generator(5)).to(DEVICE).index_fill_(1, torch.tensor([3], device=DEVICE), -INF)
    )
    logp, entropy = FORMS[form](logits, torch.tensor([3, 4], device=DEVICE))
    assert logp[0] == -INF and logp[1].isfinite() and entropy.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_ties_share_their_probability(form):
    logp, entropy, _ = run(form, torch.full((2, 8), 3.0, device=DEVICE), torch.tensor([0, 7], device=DEVICE))
    torch.testing.assert_close(logp, torch.full((2,), -math.log(8.0), device=DEVICE))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(8.0), device=DEVICE))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_nan_stays_alone(form):
    logits = torch.randn(5, 37, generator=generator(6)).to(DEVICE)
    targets = torch.arange(5, device=DEVICE)
    clean = run(form, logits, targets)
    logits[2, 3] = NAN
    broken, others = run(form, logits, targets), [0, 1, 3, 4]
    assert broken[0][2].isnan() and broken[1][2].isnan() and broken[2][2].isnan().any()
    torch.testing.assert_close([x[others] for x in broken], [x[others] for x in clean])


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_has_empty_results_and_zero_gradients(form):
    targets = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert [x.shape for x in run(form, torch.randn(0, 37, device=DEVICE), targets)] == [(0,), (0,), (0, 37)]
    if form.startswith("linear"):
        options = {"backend": form.split()[1]}
        hidden, weight = torch.randn(0, 24, device=DEVICE), torch.randn(37, 24, device=DEVICE)
        outputs = backward(lambda h, w: linear_token_logprobs(h, w, targets, **options), [hidden, weight])
        assert [x.shape for x in outputs[:3]] == [(0,), (0,), (0, 24)] and not outputs[3].any()


# --- bits ------------------------------------------------------------------------------------------------------------


def same_bits(xs, ys) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("form", ON_LOGITS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(form, dtype, seed):
    """Two runs, another order, fewer rows."""
    logits = torch.randn(7, 517, generator=generator(seed)).to(DEVICE, dtype)
    targets = torch.randint(517, (7,), generator=generator(seed)).to(DEVICE)
    temperature = torch.linspace(0.3, 2, 7, device=DEVICE)

    c, e = torch.linspace(1, 2, 7, device=DEVICE), torch.linspace(-1, 1, 7, device=DEVICE)

    def of(rows):
        leaf = logits[rows].clone().requires_grad_(True)
        logp, entropy = FORMS[form](leaf, targets[rows], temperature[rows])
        (logp * c[rows] + entropy * e[rows]).sum().backward()
        return logp.detach(), entropy.detach(), leaf.grad

    whole = of(torch.arange(7, device=DEVICE))
    order = torch.randperm(7, generator=generator(seed)).to(DEVICE)
    for rows in (torch.arange(7, device=DEVICE), order, order[:3]):
        assert same_bits(of(rows), [x[rows] for x in whole])


def test_the_gradient_sweep_of_chosen_rows_is_that_of_all(seed):
    logits = torch.randn(6, 517, generator=generator(seed)).to(DEVICE)
    targets = torch.randint(517, (6,), generator=generator(seed)).to(DEVICE)
    temperature, (c, e) = torch.linspace(0.3, 2, 6, device=DEVICE), torch.randn(2, 6, device=DEVICE)
    stats, every = stats_triton(logits, targets, temperature), torch.empty_like(logits)
    gradient_triton(logits, targets, temperature, stats, c, e, every)
    rows = torch.tensor([3, 0, 5], device=DEVICE)
    some = torch.empty(3, 517, device=DEVICE)
    gradient_triton(logits, targets, temperature, stats, c, e, some, rows)
    assert torch.equal(some, every[rows])


def test_the_gradient_sweep_zeroes_a_row_without_coefficients_and_does_not_read_it():
    logits = torch.randn(3, 37, device=DEVICE)
    targets, c = torch.arange(3, device=DEVICE), torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    stats = stats_triton(logits, targets, 1.0)
    logits[1], out = NAN, torch.full_like(logits, 7.0)
    gradient_triton(logits, targets, 1.0, stats, c, torch.zeros_like(c), out)
    assert not out[1].any() and out[[0, 2]].isfinite().all() and out[[0, 2]].any(1).all()


def far_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [3, 37] whose row 2 lies 2³¹ + 32 logits behind row 0, the memory (ones) on which an int32 offset
    of that row would fall, and a dense copy of the logits."""
    stride = (1 << 30) + 16
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 8.6 GB of GPU memory")
    memory = torch.empty((1 << 31) + 2 * stride + 64, dtype=torch.float16, device=DEVICE)  # on a CPU, only addresses
    logits = memory.as_strided((3, 37), (stride, 1), 1 << 31)
    wrapped = memory.as_strided((1, 37), (1, 1), (1 << 31) + 2 * stride - (1 << 32))
    small = torch.randn(3, 37, generator=generator(9)).to(DEVICE, torch.float16)
    logits.copy_(small), wrapped.fill_(1.0)
    return logits, wrapped, small


def test_offsets_pass_two_to_the_31():
    logits, wrapped, small = far_rows()
    targets, c = torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE)
    stats = stats_triton(logits, targets, 1.0)
    expected = stats_triton(small, targets, 1.0)
    assert same_bits(stats, expected)
    gradient_triton(logits, targets, 1.0, stats, c, c, logits)
    gradient_triton(small, targets, 1.0, expected, c, c, small)
    assert torch.equal(logits, small) and wrapped.eq(1.0).all()


# --- from hidden states, in chunks -----------------------------------------------------------------------------------

ROUGHLY = {"torch": (torch.float64, 1e-10), "triton": (torch.float32, 2e-5)}  # dtype of a comparison, its tolerance


def definition(hidden, weight, targets, temperature=1.0, mask=None):
    return token_logprobs(hidden @ weight.t(), targets, temperature, mask, backend="torch")


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("backend", "temperature"), [("torch", "1"), ("torch", "0.6"), ("torch", "per row"), ("triton", "per row")]
)
def test_the_linear_form_is_the_definition_in_value_and_gradient(vocab, temperature, masked, backend, seed):
    dtype, tolerance = ROUGHLY[backend]
    n = {"torch": 50, "triton": 18}[backend]
    hidden, weight, targets = random_case(n, vocab, dtype=dtype, seed=seed)
    t = {"1": 1.0, "0.6": 0.6, "per row": torch.linspace(0.3, 2, n, device=DEVICE)}[temperature]
    mask = random_mask(n, vocab, targets, seed) if masked else None
    kept = kept_of(mask) if masked else None
    expected = backward(lambda h, w: definition(h, w, targets, t, mask), [hidden.double(), weight.double()])
    for rows in (16, 20, 50) if backend == "torch" else (16,):
        options = {"workspace": one_chunk(rows, vocab) * dtype.itemsize // 4, "backend": backend}
        ours = backward(lambda h, w, o=options: linear_token_logprobs(h, w, targets, t, kept, **o), [hidden, weight])
        assert_near(ours, expected, tolerance)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_soft_cap_are_part_of_the_head(softcap, biased, masked, backend, seed):
    dtype, tolerance = ROUGHLY[backend]
    n = {"torch": 40, "triton": 18}[backend]
    hidden, weight, targets = random_case(n, 123, dtype=dtype, seed=seed)
    bias = torch.randn(123, generator=generator(seed)).to(hidden) if biased else None
    mask = random_mask(n, 123, targets, seed) if masked else None
    kept = kept_of(mask) if masked else None

    def by_hand(h, w, b=None):
        z = h @ w.t() if b is None else h @ w.t() + b
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return token_logprobs(z, targets, 0.7, mask, backend="torch")

    def linear(h, w, b=None):
        options = {"bias": b, "softcap": softcap, "workspace": one_chunk(16, 123), "backend": backend}
        return linear_token_logprobs(h, w, targets, 0.7, kept, **options)

    inputs = [hidden, weight] + ([bias] if biased else [])
    assert_near(backward(linear, inputs), backward(by_hand, [x.double() for x in inputs]), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_be_wider_than_the_weights(backend, seed):
    """Rounding them to half precision is the larger part of the error."""
    hidden, weight, targets = random_case(18, 517, width=48, dtype=torch.float16, seed=seed)
    exact = backward(lambda h, w: definition(h, w, targets), [hidden.double(), weight.double()])

    def error(dtype):
        options = {"logits_dtype": dtype, "workspace": one_chunk(17, 517), "backend": backend}
        ours = backward(lambda h, w: linear_token_logprobs(h, w, targets, **options), [hidden, weight])
        assert [x.dtype for x in ours[2:]] == [torch.float16] * 2
        return (ours[0].double() - exact[0]).abs().max(), ours

    (wide, ours), (narrow, _) = error(torch.float32), error(torch.float16)
    assert wide < 2e-5 < narrow
    assert_near(ours, exact, 1e-3)


def test_the_linear_form_passes_gradcheck():
    hidden, weight, targets = random_case(4, 7, width=3)
    kept, t = kept_of(random_mask(4, 7, targets)), torch.linspace(0.4, 1.5, 4, dtype=torch.float64, device=DEVICE)
    inputs = (hidden.requires_grad_(True), weight.requires_grad_(True))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_token_logprobs(h, w, targets, t, kept, workspace=one_chunk(16, 7)), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_nothing(backend):
    """Beyond rounding: a product of other rows than whole tiles may add up in another order."""
    most = {"torch": 80, "triton": 40}[backend]

    @settings(max_examples={"torch": 40, "triton": 3}[backend])
    @given(rows=st.integers(1, most), chunk=st.integers(16, 90), width=st.integers(2, 96), seed=st.integers(0, 1000))
    def check(rows, chunk, width, seed):
        hidden, weight, targets = random_case(rows, 37, width, torch.float32, seed=seed)
        kept = kept_of(random_mask(rows, 37, targets, seed))

        def in_chunks_of(n):
            options = {"workspace": one_chunk(n, 37), "backend": backend}
            return backward(lambda h, w: linear_token_logprobs(h, w, targets, 0.8, kept, **options), [hidden, weight])

        assert_near(in_chunks_of(chunk), in_chunks_of(rows), 1e-5)

    check()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's product may add up in another order for other rows")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_scored_alone_has_the_bits_that_it_has_among_others(backend, seed):
    """A sampler scores a token at a time, a trainer thousands: on a CPU they agree to the bit."""
    hidden, weight, targets = random_case(20, 517, 64, torch.float32, seed)
    whole = linear_token_logprobs(hidden, weight, targets, 0.8, backend=backend)
    for rows in (slice(3, 4), slice(5, 7), slice(0, 15), slice(0, 17)):
        some = linear_token_logprobs(hidden[rows], weight, targets[rows], 0.8, backend=backend)
        assert same_bits(some, [x[rows] for x in whole])


@pytest.mark.parametrize("needs", ["hidden", "weight"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_side_is_left_alone(needs, backend):
    hidden, weight, targets = random_case(6, 37, dtype=torch.float32)
    both = backward(lambda h, w: linear_token_logprobs(h, w, targets, backend=backend), [hidden, weight])
    if needs == "hidden":
        alone = backward(lambda h: linear_token_logprobs(h, weight, targets, backend=backend), [hidden])
        assert torch.equal(alone[2], both[2])
    else:
        alone = backward(lambda w: linear_token_logprobs(hidden, w, targets, backend=backend), [weight])
        assert torch.equal(alone[2], both[3])
    assert hidden.grad is None and weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_and_weights_may_be_views(backend):
    dtype, tolerance = ROUGHLY[backend]
    hidden, weight, targets = random_case(12, 74, width=48, dtype=dtype)
    hidden, weight, targets = hidden[1::2, :-1], weight[::2, 1:], targets[::2] // 2

    def linear(h, w):
        return linear_token_logprobs(h[:, ::2], w[:, ::2], targets, backend=backend)

    expected = backward(lambda h, w: definition(h[:, ::2], w[:, ::2], targets), [hidden.double(), weight.double()])
    assert_near(backward(linear, [hidden, weight]), expected, tolerance)


class Products(TorchDispatchMode):
    """[m, k, n] of every product of matrices."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_incoming_gradient_leave_the_backward_products(backend):
    hidden, weight, targets = random_case(96, 37, 24, torch.float32)
    hidden, weight = hidden.requires_grad_(True), weight.requires_grad_(True)
    used = torch.arange(96, device=DEVICE) % 3 == 0
    options = {"workspace": one_chunk(32, 37), "backend": backend}
    logp, entropy = linear_token_logprobs(hidden, weight, targets, **options)
    loss = (logp[used] + 0.1 * entropy[used]).sum()
    with Products() as seen:
        loss.backward()
    assert sorted(seen.shapes) == sorted([(32, 24, 37), (32, 37, 24), (37, 32, 24)])  # logits, dH, dW
    assert hidden.grad[~used].eq(0).all() and hidden.grad[used].any(1).all()


# --- mistakes --------------------------------------------------------------------------------------------------------


def long(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long, device=DEVICE)


def matrix(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


FLAGS = matrix(5, 7, dtype=torch.bool)
MISTAKES = {
    "targets": (lambda b: token_logprobs(matrix(6, 7), long(5), backend=b), r"targets has shape \[5\].* 6 rows"),
    "temperature": (lambda b: token_logprobs(matrix(6, 7), long(6), matrix(5), backend=b), "temperature has shape"),
    "not a matrix": (lambda b: token_logprobs(matrix(6), long(6), backend=b), "expected a matrix"),
    "unknown backend": (lambda b: token_logprobs(matrix(6, 7), long(6), backend=b + "s"), "is unknown: use auto"),
    "linear targets": (lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 4), long(5), backend=b), "targets has"),
    "width": (
        lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 5), long(6), backend=b),
        r"\[N, D\] and \[V, D\]",
    ),
    "dtype": (lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 4).half(), long(6), backend=b), "of one dtype"),
    "workspace": (
        lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 4), long(6), workspace=0, backend=b),
        "workspace = 0",
    ),
    "linear temperature": (
        lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 4), long(6), matrix(5), backend=b),
        "temperature has shape",
    ),
    "kept": (lambda b: token_logprobs(matrix(6, 7), long(6), kept=FLAGS, backend=b), "kept"),
    "bias": (
        lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 4), long(6), bias=matrix(1), backend=b),
        "bias",
    ),
    "linear kept": (
        lambda b: linear_token_logprobs(matrix(6, 4), matrix(7, 4), long(6), 1.0, Kept(long(3), long(2)), backend=b),
        "kept",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mistake_is_one_clear_sentence(name, backend):
    call, sentence = MISTAKES[name]
    with pytest.raises(ValueError, match=sentence):
        call(backend)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    def call(dtype):
        return token_logprobs(torch.zeros(6, 7, dtype=dtype), torch.zeros(6, dtype=torch.long), backend="triton")

    with pytest.raises(ValueError, match="float64 needs backend='torch'"):
        call(torch.float64)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU"):
        call(torch.float32)
    monkeypatch.setattr(backend, "triton", backend._Absent())
    with pytest.raises(ValueError, match="not installed"):
        call(torch.float32)


# --- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in bytes; `but` its views are not counted."""

    def __init__(self, but: torch.Tensor | None = None):
        super().__init__()
        self.bytes, self.known = 0, None if but is None else but.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize(
    ("backend", "masked", "rows"), [("torch", False, 160), ("torch", True, 160), ("triton", False, 68)]
)
def test_the_whole_of_the_logits_is_never_held(backend, masked, rows):
    vocab, width = 1031, 8
    hidden, weight, targets = random_case(rows, vocab, width, torch.float32)
    mask = random_mask(rows, vocab, targets)
    kept = kept_of(mask) if masked else None
    chunk = one_chunk(16, vocab)

    def largest(function) -> int:
        with Largest() as seen:
            backward(function, [hidden, weight])
        return seen.bytes

    def linear(h, w):
        return linear_token_logprobs(h, w, targets, 0.9, kept, workspace=chunk, backend=backend)

    whole = rows * vocab * 4
    assert largest(lambda h, w: definition(h, w, targets)) >= whole  # the measure sees what it should
    # The places of a chunk's kept tokens are 8 bytes each, so lists that keep nearly everything count twice.
    bound = max(2 * chunk if masked else chunk, 4 * vocab * width)
    assert largest(linear) <= bound < whole / 4


def test_the_gradient_in_place_takes_no_memory_of_the_logits_size():
    logits, targets = torch.randn(8, 1031, device=DEVICE), torch.arange(8, device=DEVICE)

    def largest(inplace) -> int:
        leaf = logits.clone().requires_grad_(True)
        with Largest(but=leaf) as seen:
            logp, _ = token_logprobs(leaf, targets, inplace=inplace, backend="triton")
            torch.autograd.grad(logp.sum(), leaf)
        return seen.bytes

    assert largest(True) < logits.nbytes / 8 < logits.nbytes <= largest(False)
