"""Log-probs and entropies of given tokens against float64 and the golden numbers, on logits and from hidden states."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirl.kernels import Kept, linear_token_logprobs, token_logprobs

VOCABULARIES = (7, 123, 517, 2053)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_case(rows: int, vocab: int, width: int = 24, dtype=torch.float64, seed: int = 0):
    """hidden [N, D], weight [V, D], targets [N] with the first and the last token of the vocabulary among them."""
    g = generator(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, width, generator=g, dtype=torch.float64) * 0.5).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[0], targets[-1] = 0, vocab - 1
    return hidden, weight, targets


def kept_of(mask: torch.Tensor) -> Kept:
    """From bool [N, V]; a full row becomes an empty list, which means the same."""
    rows = [row.nonzero().squeeze(1) if not row.all() else torch.empty(0, dtype=torch.long) for row in mask]
    return Kept(torch.cat(rows).int(), torch.tensor([0, *np.cumsum([len(row) for row in rows])]))


def random_mask(rows: int, vocab: int, targets: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Kept sets that hold their target: of any size, one of the target alone, one of everything."""
    mask = torch.rand(rows, vocab, generator=generator(seed)) < torch.rand(rows, 1, generator=generator(seed + 1))
    mask[0], mask[-1] = False, True
    return mask.scatter(1, targets.unsqueeze(1), True)


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


def backward(function, inputs: list[torch.Tensor], seed: int = 7) -> list[torch.Tensor]:
    """Value and gradients of a random weighting of both outputs: logp, entropy, then a gradient for each input."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    outputs = function(*leaves)
    weights = [
        torch.randn(len(out), generator=generator(seed + i), dtype=torch.float64) for i, out in enumerate(outputs)
    ]
    sum((out.double() * w).sum() for out, w in zip(outputs, weights, strict=True)).backward()
    return [*(out.detach() for out in outputs), *(leaf.grad for leaf in leaves)]


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
def test_token_logprobs_are_those_of_float64(vocab, dtype, kept):
    hidden, weight, targets = random_case(9, vocab)
    logits = (hidden @ weight.t()).to(dtype)
    mask = random_mask(9, vocab, targets) if kept else None
    temperature = torch.linspace(0.3, 2, 9)
    for t in (1.0, 0.6, temperature):
        logp, entropy = token_logprobs(logits, targets, t, mask)
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
@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_softmax_core(golden, case, form, dtype):
    numbers = golden["cases"][case]
    data, expected, temperature = numbers["inputs"], numbers["expected"], numbers["params"]["temperature"]
    logits = torch.tensor(data["logits"], dtype=dtype, requires_grad=True)
    targets = torch.tensor(data["target"])
    mask = torch.tensor(data["keep_mask"], dtype=torch.bool) if "keep_mask" in data else None
    if form == "logits":
        logp, entropy = token_logprobs(logits, targets, temperature, mask)
    else:
        kept = None if mask is None else kept_of(mask)
        logp, entropy = linear_token_logprobs(logits, torch.eye(5, dtype=dtype), targets, temperature, kept)
    c, e = (torch.tensor(data[key], dtype=dtype) for key in ("grad_logp", "grad_entropy"))
    (logp @ c + entropy @ e).backward()
    tolerance = golden["tolerance"][str(dtype).removeprefix("torch.")]
    for ours, name in ((logp, "logp"), (entropy, "entropy"), (logits.grad, "dlogits")):
        torch.testing.assert_close(ours.detach(), torch.tensor(expected[name], dtype=dtype), rtol=0, atol=tolerance)


# --- from hidden states, in chunks -----------------------------------------------------------------------------------


def one_chunk(rows: int, vocab: int) -> int:
    return 4 * vocab * rows


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("temperature", ["1", "0.6", "per row"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_linear_form_is_the_definition_in_value_and_gradient(vocab, temperature, masked):
    hidden, weight, targets = random_case(50, vocab)
    t = {"1": 1.0, "0.6": 0.6, "per row": torch.linspace(0.3, 2, 50)}[temperature]
    mask = random_mask(50, vocab, targets) if masked else None
    kept = kept_of(mask) if masked else None
    expected = backward(lambda h, w: token_logprobs(h @ w.t(), targets, t, mask), [hidden, weight])
    for rows in (16, 20, 50):
        ours = backward(
            lambda h, w, n=rows: linear_token_logprobs(h, w, targets, t, kept, workspace=one_chunk(n, vocab)),
            [hidden, weight],
        )
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_linear_form_passes_gradcheck():
    hidden, weight, targets = random_case(4, 7, width=3)
    kept, t = kept_of(random_mask(4, 7, targets)), torch.linspace(0.4, 1.5, 4, dtype=torch.float64)
    inputs = (hidden.requires_grad_(True), weight.requires_grad_(True))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_token_logprobs(h, w, targets, t, kept, workspace=one_chunk(16, 7)), inputs
    )


@settings(max_examples=30)
@given(rows=st.integers(1, 80), chunk=st.integers(16, 90), seed=st.integers(0, 1000))
def test_chunks_change_nothing(rows, chunk, seed):
    hidden, weight, targets = random_case(rows, 37, seed=seed)
    kept = kept_of(random_mask(rows, 37, targets, seed))

    def in_chunks_of(n):
        return backward(
            lambda h, w: linear_token_logprobs(h, w, targets, 0.8, kept, workspace=one_chunk(n, 37)), [hidden, weight]
        )

    torch.testing.assert_close(in_chunks_of(chunk), in_chunks_of(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_a_frozen_side_is_left_alone(needs):
    hidden, weight, targets = random_case(6, 37)
    both = backward(lambda h, w: linear_token_logprobs(h, w, targets), [hidden, weight])
    if needs == "hidden":
        alone = backward(lambda h: linear_token_logprobs(h, weight, targets), [hidden])
        assert torch.equal(alone[2], both[2])
    else:
        alone = backward(lambda w: linear_token_logprobs(hidden, w, targets), [weight])
        assert torch.equal(alone[2], both[3])
    assert hidden.grad is None and weight.grad is None


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_outputs_may_be_used_alone(which):
    hidden, weight, targets = random_case(6, 37)
    ours = backward(lambda h, w: (linear_token_logprobs(h, w, targets)[which],), [hidden, weight])
    expected = backward(lambda h, w: (token_logprobs(h @ w.t(), targets)[which],), [hidden, weight])
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_views_of_larger_tensors_are_taken_as_they_are():
    hidden, weight, targets = random_case(12, 74, width=48)
    hidden, weight, targets = hidden[1::2, :-1], weight[::2, 1:], targets[::2] // 2
    ours = backward(lambda h, w: linear_token_logprobs(h[:, ::2], w[:, ::2], targets), [hidden, weight])
    expected = backward(lambda h, w: token_logprobs(h[:, ::2] @ w[:, ::2].t(), targets), [hidden, weight])
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_second_derivative_is_refused_rather_than_wrong():
    hidden, weight, targets = random_case(3, 7)
    hidden.requires_grad_(True)
    loss = linear_token_logprobs(hidden, weight, targets)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_its_error_is_not_above_that_of_plain_torch_in_the_same_dtype(dtype, masked):
    """Worst error in relation to the largest entry, over several draws."""
    worst = []
    for seed in range(4):
        hidden, weight, targets = random_case(33, 517, width=48, dtype=dtype, seed=seed)
        mask = random_mask(33, 517, targets, seed) if masked else None
        kept = kept_of(mask) if masked else None
        exact = [hidden.double(), weight.double()]
        truth = backward(lambda h, w, m=mask, y=targets: token_logprobs(h @ w.t(), y, 0.7, m), exact)
        plain = backward(lambda h, w, m=mask, y=targets: token_logprobs(h @ w.t(), y, 0.7, m), [hidden, weight])
        ours = backward(
            lambda h, w, k=kept, y=targets: linear_token_logprobs(h, w, y, 0.7, k, workspace=one_chunk(16, 517)),
            [hidden, weight],
        )
        errors = [
            [
                ((x.double() - exact_x).abs().max() / exact_x.abs().max()).item()
                for x, exact_x in zip(xs, truth, strict=True)
            ]
            for xs in (ours, plain)
        ]
        assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 2
        worst.append(errors)
    ours, plain = torch.tensor(worst).amax(0)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
    assert (ours <= plain + tolerance).all(), (ours, plain)


# --- extreme logits, through an identity head ------------------------------------------------------------------------


def both_forms(logits: torch.Tensor, targets: torch.Tensor) -> list[list[torch.Tensor]]:
    """logp, entropy and d/dlogits of the definition and of the linear form."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return [
        backward(lambda z: token_logprobs(z, targets), [logits]),
        backward(lambda z: linear_token_logprobs(z, eye, targets, workspace=one_chunk(16, len(eye))), [logits]),
    ]


@pytest.mark.parametrize("level", [120.0, -120.0, 1000.0, -1000.0])
def test_rows_of_large_logits_are_exact(level):
    """A running maximum that starts at 0 gives -inf for a row near -120."""
    logits = level + torch.randint(-64, 65, (6, 37), generator=generator(1)) / 16.0  # exact in fp32
    targets = torch.randint(37, (6,), generator=generator(2))
    truth, _ = both_forms(logits.double(), targets)
    for ours in both_forms(logits, targets):
        torch.testing.assert_close([x.double() for x in ours], truth, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shift", [100.0, 1e4, -1e4])
def test_a_shift_of_all_logits_changes_neither_values_nor_gradients(shift):
    logits = torch.randint(-64, 65, (6, 37), generator=generator(3)) / 16.0  # shifts are exact in fp32
    targets = torch.randint(37, (6,), generator=generator(4))
    for plain, shifted in zip(both_forms(logits, targets), both_forms(logits + shift, targets), strict=True):
        torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-6)
        assert shifted[2].sum(1).abs().max() < 1e-5  # every row of d/dlogits sums to zero


def test_a_certain_token_has_no_entropy_and_no_gradient():
    logits = torch.zeros(3, 37)
    logits[:, 5] = 1e4
    for logp, entropy, gradient in both_forms(logits, torch.tensor([5, 5, 5])):
        assert not logp.any() and not entropy.any() and not gradient.any()
    for logp, entropy, gradient in both_forms(logits, torch.tensor([0, 36, 6])):
        assert logp.eq(-1e4).all() and not entropy.any() and gradient.isfinite().all()
        assert gradient[:, 5].abs().gt(0).all()  # towards the target, all from the certain token


def test_a_token_of_probability_zero_stays_without_gradient():
    logits = torch.randn(4, 37, generator=generator(5))
    logits[:, 20:] = float("-inf")
    finite = backward(lambda z: token_logprobs(z, torch.tensor([0, 1, 2, 3])), [logits[:, :20]])
    logp, entropy, gradient = backward(lambda z: token_logprobs(z, torch.tensor([0, 1, 2, 3])), [logits])
    torch.testing.assert_close([logp, entropy, gradient[:, :20]], finite)
    assert gradient[:, 20:].eq(0).all()


def test_ties_share_their_probability():
    for logp, entropy, _ in both_forms(torch.full((2, 8), 3.0, dtype=torch.float64), torch.tensor([0, 7])):
        torch.testing.assert_close(logp, torch.full((2,), -math.log(8.0), dtype=torch.float64))
        torch.testing.assert_close(entropy, torch.full((2,), math.log(8.0), dtype=torch.float64))


def test_a_row_of_nan_stays_alone():
    logits = torch.randn(5, 37, generator=generator(6))
    targets = torch.arange(5)
    clean = both_forms(logits, targets)
    logits[2, 3] = float("nan")
    others = [0, 1, 3, 4]
    for plain, broken in zip(clean, both_forms(logits, targets), strict=True):
        assert broken[0][2].isnan() and broken[1][2].isnan()
        torch.testing.assert_close([x[others] for x in broken], [x[others] for x in plain])


def test_an_empty_batch_has_empty_results_and_zero_gradients():
    hidden, weight = torch.randn(0, 24), torch.randn(37, 24)
    targets = torch.empty(0, dtype=torch.long)
    for function in (token_logprobs, lambda z, y: linear_token_logprobs(z, torch.eye(37), y)):
        assert [len(x) for x in function(torch.randn(0, 37), targets)] == [0, 0]
    logp, entropy, d_hidden, d_weight = backward(lambda h, w: linear_token_logprobs(h, w, targets), [hidden, weight])
    assert (logp.shape, entropy.shape, d_hidden.shape) == ((0,), (0,), (0, 24)) and not d_weight.any()


# --- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_of_the_logits_is_never_held(masked):
    rows, vocab, width = 160, 1031, 8
    hidden, weight, targets = random_case(rows, vocab, width, torch.float32)
    mask = random_mask(rows, vocab, targets)
    kept = kept_of(mask) if masked else None
    chunk = one_chunk(16, vocab)

    def largest(function) -> int:
        with Largest() as seen:
            backward(function, [hidden, weight])
        return seen.bytes

    whole = rows * vocab * 4
    assert largest(lambda h, w: token_logprobs(h @ w.t(), targets)) >= whole  # the measure sees what it should
    # The places of a chunk's kept tokens are 8 bytes each, so lists that keep nearly everything count twice.
    bound = max(2 * chunk if masked else chunk, 4 * vocab * width)
    assert largest(lambda h, w: linear_token_logprobs(h, w, targets, 0.9, kept, workspace=chunk)) <= bound < whole / 4
