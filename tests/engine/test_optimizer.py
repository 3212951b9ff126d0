"""AdamW against torch's own, and the bf16 parameters that lose no step."""

import math

import numpy as np
import pytest
import torch
from helpers import full_logits, random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from minirl import optimizer as optimizer_module
from minirl.errors import InputError
from minirl.optimizer import AdamW, join, learning_rate, split

FINFO = torch.finfo(torch.float32)


# --- two halves of a number ------------------------------------------------------------------------------------------


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


EDGES = [
    0.0, -0.0, 1.0, -1.0, FINFO.smallest_normal, -FINFO.smallest_normal, 1e-45, -1e-45, FINFO.max, FINFO.min,
    math.inf, -math.inf, math.nan, 1 + 2**-7, 1 + 2**-8, 1 + 2**-9, 1 + 2**-8 + 2**-23, 1 - 2**-24, 65504.0, math.pi,
]  # fmt: skip


def test_edge_values_are_joined_as_they_were_split():
    master = torch.tensor(EDGES)
    assert torch.equal(bits(join(*split(master))), bits(master))


@settings(max_examples=200)
@given(hnp.arrays(np.uint32, st.integers(1, 50)))
def test_any_bit_pattern_is_joined_as_it_was_split(pattern):
    master = torch.from_numpy(pattern.view(np.int32).copy()).view(torch.float32)
    high, low = split(master)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(bits(join(high, low)), bits(master))


@given(hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_the_upper_half_is_the_nearest_bf16(values):
    master = torch.from_numpy(values)
    ours, nearest = split(master)[0].float(), master.bfloat16().float()
    assert torch.equal((ours - master).abs(), (nearest - master).abs())  # ties may go either way


# --- the step --------------------------------------------------------------------------------------------------------


class Parameters(nn.Module):
    """A matrix, a vector and a matrix that no loss reaches."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(7, 5, generator=g).bfloat16().to(dtype))
        self.vector = nn.Parameter(torch.randn(11, generator=g).bfloat16().to(dtype))
        self.unused = nn.Parameter(torch.ones(2, 2, dtype=dtype))

    def pull(self, step: int, scale: float = 1.0) -> None:
        """Backward of a loss whose gradients are random and exact in bf16."""
        g = torch.Generator().manual_seed(step)
        for p in (self.matrix, self.vector):
            (p * (torch.randn(p.shape, generator=g) * scale).to(torch.bfloat16).to(p.dtype)).sum().backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
def test_twenty_steps_in_fp32_are_those_of_torch(weight_decay, clip):
    """torch decays whatever it is given, ours the matrices alone."""
    ours, theirs = Parameters(), Parameters()
    optimizer = AdamW(ours, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    groups = [
        {"params": [theirs.matrix, theirs.unused], "weight_decay": weight_decay},
        {"params": [theirs.vector], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    for step in range(20):
        lr = 1e-2 / (1 + step)
        ours.pull(step)
        norm = optimizer.step(lr, clip)
        theirs.pull(step)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if clip is None else clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert ours.unused.eq(1).all()


def masters(model: nn.Module, optimizer: AdamW) -> dict[str, torch.Tensor]:
    return {name: join(p.data, optimizer.state[f"low.{name}"]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [3, 1 << 18])
def test_a_bf16_model_follows_fp32_masters_to_the_bit(chunk, monkeypatch):
    monkeypatch.setattr(optimizer_module, "CHUNK", chunk)
    half, full = Parameters(torch.bfloat16), Parameters()
    ours, reference = (AdamW(model, weight_decay=0.1) for model in (half, full))
    for step in range(50):
        for model, optimizer in ((half, ours), (full, reference)):
            model.pull(step)
            optimizer.step(1e-4, clip=2.0)
        for (name, master), p in zip(masters(half, ours).items(), full.parameters(), strict=True):
            assert torch.equal(bits(master), bits(p.data)), name
            assert torch.equal(half.get_parameter(name), split(p.data)[0])
    assert not torch.equal(half.matrix, Parameters(torch.bfloat16).matrix)


def test_steps_of_a_millionth_are_not_lost_in_bf16():
    """Adam's step is the learning rate where the gradient is constant; bf16 next to 1 knows only steps of 4e-3."""
    model, lost = Parameters(torch.bfloat16), Parameters(torch.bfloat16)
    with torch.no_grad():
        for p in (*model.parameters(), *lost.parameters()):
            p.fill_(1.0)
    optimizer, plain = AdamW(model), torch.optim.AdamW([lost.vector], weight_decay=0.0)
    plain.param_groups[0]["lr"] = 1e-6
    for step in range(1, 3001):
        model.vector.sum().backward()
        optimizer.step(1e-6)
        lost.vector.sum().backward()
        plain.step()
        plain.zero_grad()
        if step == 1000:
            assert model.vector.eq(1.0).all()
            torch.testing.assert_close(masters(model, optimizer)["vector"], torch.full((11,), 0.999), rtol=0, atol=5e-5)
    assert model.vector.eq(1 - 2.0**-8).all()
    assert lost.vector.eq(1.0).all()


def test_gradients_are_summed_in_fp32_over_micro_batches():
    model = Parameters(torch.bfloat16)
    optimizer = AdamW(model)
    for value in (1.0, 2.0**-10, 2.0**-10):
        (model.vector * torch.tensor(value, dtype=torch.bfloat16)).sum().backward()
        assert model.vector.grad is None  # gone at once
    assert optimizer.grads["vector"].eq(1 + 2.0**-9).all()  # in bf16 it would be 1
    assert optimizer.grad_norm() == pytest.approx(math.sqrt(11) * (1 + 2.0**-9))
    optimizer.step(1e-3)
    assert not optimizer.grads and optimizer.grad_norm() == 0.0


def test_clipping_scales_the_whole_gradient_to_the_limit():
    """The first step's moments show the gradient that was used: m is a tenth of it."""
    model = Parameters()
    optimizer = AdamW(model)
    model.pull(0, scale=100.0)
    raw = {name: g.clone() for name, g in optimizer.grads.items()}
    norm = optimizer.step(1e-3, clip=0.25)
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in raw.values())), rel=1e-6)
    for name, g in raw.items():
        torch.testing.assert_close(optimizer.state[f"m.{name}"], g * (0.25 / norm) * 0.1, rtol=1e-5, atol=0)
    model.pull(0)
    small = {name: g.clone() for name, g in optimizer.grads.items()}
    fresh = AdamW(copy := Parameters())
    copy.pull(0)
    fresh.step(1e-3, clip=1e6)
    for name, g in small.items():
        torch.testing.assert_close(fresh.state[f"m.{name}"], g * 0.1)


def test_what_is_frozen_is_neither_stepped_nor_kept():
    model = Parameters()
    model.matrix.requires_grad_(False)
    optimizer = AdamW(model, weight_decay=0.5)
    before = model.matrix.clone()
    (model.matrix.sum() * model.vector.sum()).backward()
    optimizer.step(1e-2)
    assert torch.equal(model.matrix, before) and "m.matrix" not in optimizer.state


def test_a_step_on_a_transformer_lowers_its_loss():
    model = tiny_model()
    optimizer, tokens = AdamW(model), random_ids(30)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(full_logits(model, tokens)[:-1], torch.tensor(tokens[1:]))
        loss.backward()
        optimizer.step(3e-3, clip=1.0)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_names_its_tensor_and_steps_nothing(value):
    model = Parameters()
    optimizer = AdamW(model)
    before = [p.clone() for p in model.parameters()]
    model.pull(0)
    (model.vector[4] * value).backward()
    with pytest.raises(InputError, match="gradient of 'vector' is not finite"):
        optimizer.step(1e-3, clip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.updates == 0 and not optimizer.state["m.matrix"].any()


def test_a_parameter_in_another_precision_is_refused():
    with pytest.raises(InputError, match=r"'matrix' is torch\.float16"):
        AdamW(Parameters(torch.float16))


# --- kill and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_resumed_goes_on_to_the_bit(dtype):
    def steps(model, optimizer, which):
        for step in which:
            model.pull(step)
            optimizer.step(1e-3, clip=1.0)

    straight = Parameters(dtype)
    reference = AdamW(straight, weight_decay=0.1)
    steps(straight, reference, range(10))

    first = Parameters(dtype)
    optimizer = AdamW(first, weight_decay=0.1)
    steps(first, optimizer, range(6))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    second = Parameters(dtype, seed=9)
    second.load_state_dict(first.state_dict())
    resumed = AdamW(second, weight_decay=0.1)
    resumed.load_state_dict(saved)
    steps(second, resumed, range(6, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    assert reference.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("steps"), "steps"),
        (lambda s: s.pop("v.vector"), r"v\.vector"),
        (lambda s: s.update({"m.matrix": torch.zeros(5, 7)}), r"m\.matrix"),
        (lambda s: s.update({"m.matrix": torch.zeros(7, 5, dtype=torch.bfloat16)}), r"m\.matrix"),
        (lambda s: s.update({"low.matrix": torch.zeros(7, 5, dtype=torch.int16)}), r"low\.matrix"),
    ],
)
def test_a_state_of_another_model_is_refused_whole(change, named):
    """The last is the state of a bf16 run: in fp32 its masters' lower halves would be dropped in silence."""
    optimizer, other = AdamW(Parameters()), AdamW(model := Parameters())
    model.pull(0)
    other.step(1e-3)
    state = other.state_dict()
    change(state)
    with pytest.raises(InputError, match=named):
        optimizer.load_state_dict(state)
    assert optimizer.updates == 0 and not any(tensor.any() for tensor in optimizer.state.values())


def test_the_learning_rate_warms_up_and_decays():
    assert [learning_rate(step, 1.0, 4, 10, "constant") for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [learning_rate(step, 2.0, 0, 4, "linear") for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    cosine = [learning_rate(step, 1.0, 2, 6, "cosine") for step in range(2, 7)]
    assert cosine == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0])
    assert learning_rate(12, 1.0, 2, 6, "linear") == learning_rate(12, 1.0, 2, 6, "cosine") == 0.0
    assert learning_rate(0, 1.0, 0, 0, "linear") == 1.0
