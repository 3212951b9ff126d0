"""A token's log-prob has the same bits in any company: alone, beside other rows, in any order and micro-batch, and in
the loss as in scoring. `make test-processors` asks it of other instruction sets too."""

import random

import pytest
import torch
from helpers import random_ids, tiny_model

from minirl.attention import Packed
from minirl.batch import Batch, add_policy_gradient
from minirl.kernels import Kept, linear_token_logprobs
from minirl.losses import PolicyLoss
from minirl.model import Transformer
from minirl.trees import Row, micro_batches, response_logprobs, response_mask

DTYPES = [torch.float32, torch.bfloat16]
MODELS = {
    "windows": {"windows": (None, 40, None)},
    "wide": {"width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp_width": 320, "qkv_bias": True, "layers": 2},
}


@pytest.fixture(scope="module", params=[(name, dtype) for name in MODELS for dtype in DTYPES], ids=str)
def model(request) -> Transformer:
    name, dtype = request.param
    return tiny_model(max_positions=2048, **MODELS[name]).to(dtype)


def rows_up_to(longest: int, seed: int) -> list[Row]:
    """A few groups, some lengths 1 and the others up to `longest`."""
    rng, rows = random.Random(seed), []

    def ids() -> list[int]:
        return random_ids(rng.choice([1, rng.randint(1, longest), rng.randint(1, longest)]), seed=rng.randrange(10**6))

    for group in range(5):
        prompt = ids()
        rows += [Row(prompt, ids(), group) for _ in range(rng.randint(1, 4))]
    return rows


@pytest.mark.parametrize("longest", [6, 250, 700])
def test_a_row_is_scored_to_the_same_bits_in_every_company_order_and_split(model, longest):
    rows = rows_up_to(longest, seed=longest)
    alone = response_logprobs(model, rows, budget=1)
    rng = random.Random(longest)
    for budget in (2 * longest, 10**6):
        chosen = rng.sample(range(len(rows)), rng.randint(2, len(rows)))
        together = response_logprobs(model, [rows[i] for i in chosen], budget)
        assert torch.equal(together, alone[chosen][:, : together.shape[1]]), budget


@pytest.mark.parametrize("longest", [9, 250])
def test_the_ratio_is_one_before_an_update_whatever_the_micro_batches(model, longest):
    """eq. 7 of 2507.18071 clips at 3e-4: rounding alone must not move a ratio."""
    rows = rows_up_to(longest, seed=longest)
    old = response_logprobs(model, rows, budget=2 * longest, temperature=0.9)
    advantages = torch.tensor([(1.0, -1.0, 0.0)[i % 3] for i in range(len(rows))])  # every third row is left out
    batch = Batch(rows, advantages, response_mask(rows), old)
    for budget, level in ((1, "seq_mean"), (10**6, "token")):
        options = PolicyLoss(ratio_level=level, eps_low=3e-4, eps_high=4e-4)
        metrics = add_policy_gradient(model, batch, options, budget, temperature=0.9)
        assert (metrics["ratio/min"], metrics["ratio/max"], metrics["clip/frac"]) == (1.0, 1.0, 0.0), budget
    model.zero_grad()


@torch.no_grad()
def test_a_prompt_is_prefilled_to_the_same_bits_in_every_company(model):
    prompts = [random_ids(n, seed=n) for n in (1, 17, 64, 193, 300, 513)]

    def prefilled(chosen: list[int]) -> list[list[torch.Tensor]]:
        layout = Packed([(prompts[i], []) for i in chosen], keep_kv=True)
        model(layout.tokens, layout)
        return [[x[start : start + n] for kv in layout.kv for x in kv] for start, n in layout.prompt_spans]

    alone = [prefilled([i])[0] for i in range(len(prompts))]
    for chosen in ([0, 1, 2, 3, 4, 5], [5, 1], [3, 4, 0]):
        for i, found in zip(chosen, prefilled(chosen), strict=True):
            assert all(map(torch.equal, found, alone[i]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [53, 3001])
def test_the_head_gives_a_row_the_same_bits_in_every_chunk(dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(700, 576, generator=generator).to(dtype)
    weight = (torch.randn(vocab, 576, generator=generator) / 24).to(dtype)
    targets = torch.randint(vocab, (700,), generator=generator)
    sets = [torch.cat([t[None], torch.randint(vocab, (i % 4,), generator=generator)]) for i, t in enumerate(targets)]

    def at(rows: torch.Tensor):
        offsets = torch.tensor([0, *(len(sets[i]) for i in rows)]).cumsum(0)
        kept = Kept(torch.cat([sets[i] for i in rows]).int(), offsets)
        of = linear_token_logprobs(hidden[rows], weight, targets[rows], 0.7)
        return *of, *linear_token_logprobs(hidden[rows], weight, targets[rows], 0.7, kept)

    whole = at(torch.arange(700))
    tiles = linear_token_logprobs(hidden, weight, targets, 0.7, workspace=192 * vocab * dtype.itemsize)
    assert all(map(torch.equal, tiles, whole))
    for n in (1, 2, 15, 47, 193, 520):
        rows = torch.randperm(700, generator=generator)[:n]
        assert all(torch.equal(found, x[rows]) for found, x in zip(at(rows), whole, strict=True)), n


def test_a_group_that_is_split_scores_as_one_that_is_not(model):
    """The prompt is then computed twice, in other company."""
    prompt = random_ids(90)
    rows = [Row(prompt, random_ids(n, seed=n), 0) for n in (1, 40, 41, 200)]
    assert len(micro_batches(rows, range(4), 150)) == 3
    assert torch.equal(response_logprobs(model, rows, 150), response_logprobs(model, rows, 10_000))
