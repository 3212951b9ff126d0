"""Micro-batches are a memory knob alone: the same log-probs and gradients as every row by itself."""

import numpy as np
import pytest
import torch
from helpers import CONFIG, full_logits, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minirl.kernels import Kept
from minirl.model import Transformer
from minirl.sampler import Sampler, SamplingParams
from minirl.trees import MicroBatch, Row, micro_batches, response_logprobs, response_logprobs_and_entropy

# (prompt length, response lengths) of each group, and the order in which the rows come
GROUPS = [(5, [3, 1, 7]), (1, [4, 4]), (9, [2]), (3, [1, 1, 1, 1])]
ORDER = [4, 0, 9, 2, 5, 3, 1, 8, 6, 7]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(windows=(None, 4, None)).double()


def rows_of(groups, order=None, kept: bool = False) -> list[Row]:
    rows = []
    for group, (prompt, responses) in enumerate(groups):
        shared = random_ids(prompt, seed=group)
        for n in responses:
            response = random_ids(n, seed=100 + len(rows))
            sets = [np.unique([t, *random_ids(9, seed=t)]).astype(np.int32) for t in response]
            rows.append(Row(shared, response, 10 * group, sets if kept else None))
    return rows if order is None else [rows[i] for i in order]


def by_itself(model: Transformer, row: Row, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log-prob and entropy of each response token from a full forward over the row alone."""
    logits = full_logits(model, [*row.prompt, *row.response])[len(row.prompt) - 1 :][: len(row.response)] / temperature
    for t, ids in enumerate(row.kept or []):
        outside = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, torch.from_numpy(ids).long(), False)
        logits = logits.index_put((torch.tensor(t), outside), torch.tensor(-1e9, dtype=logits.dtype))
    logp = logits.log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(row.response, dtype=torch.long).unsqueeze(1)).squeeze(1)
    return chosen, -(logp.exp() * logp).sum(-1)


# --- cutting ---------------------------------------------------------------------------------------------------------

lengths = st.integers(0, 30)


@st.composite
def batches_to_cut(draw):
    groups = draw(st.lists(st.tuples(st.integers(1, 20), st.lists(lengths, min_size=1, max_size=5)), max_size=6))
    count = sum(len(responses) for _, responses in groups)
    order = draw(st.permutations(range(count)))
    return rows_of(groups, order), draw(st.integers(1, 120))


def tokens_in(rows: list[Row]) -> int:
    """Of the trees: a prompt counts once."""
    return sum({row.group: len(row.prompt) for row in rows}.values()) + sum(len(row.response) for row in rows)


@given(batches_to_cut())
def test_every_row_comes_once_within_the_budget_and_groups_stay_together(case):
    rows, budget = case
    indices = [i for i in range(len(rows)) if i % 5 != 3]
    batches = micro_batches(rows, indices, budget)
    assert sorted(i for batch in batches for i in batch) == indices
    for batch in batches:
        assert batch
        assert len(batch) == 1 or tokens_in([rows[i] for i in batch]) <= budget
    for group in {rows[i].group for i in indices}:
        members = {i for i in indices if rows[i].group == group}
        if tokens_in([rows[i] for i in members]) <= budget:
            assert any(members <= set(batch) for batch in batches)


def test_a_budget_cuts_no_finer_than_it_must():
    rows = rows_of([(10, [5, 5, 5, 5]), (10, [6, 6]), (10, [40])])
    indices = range(7)
    assert micro_batches(rows, indices, 10_000) == [[0, 1, 2, 3, 4, 5, 6]]
    assert micro_batches(rows, indices, 52) == [[0, 1, 2, 3, 4, 5], [6]]
    assert micro_batches(rows, indices, 50) == [[0, 1, 2, 3], [4, 5], [6]]
    assert micro_batches(rows, indices, 20) == [[0, 1], [2, 3], [4], [5], [6]]
    assert micro_batches(rows, indices, 1) == [[i] for i in indices]
    assert micro_batches(rows, [], 50) == []


def test_rows_of_similar_length_come_together():
    """Attention pads to the longest of a micro-batch."""
    rows = rows_of([(2, [n]) for n in (30, 1, 28, 2, 29, 3)])
    assert micro_batches(rows, range(6), 95) == [[1, 3, 5, 2, 4], [0]]
    assert micro_batches(rows, range(6), 64) == [[1, 3, 5, 2], [4, 0]]


# --- log-probs -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_micro_batch_has_the_log_probs_and_entropies_of_each_row_alone(model, kept, temperature):
    rows = rows_of(GROUPS, ORDER, kept)
    batch = MicroBatch(rows)
    logp, entropy = batch.logprobs(model, temperature)
    assert logp.shape == entropy.shape == batch.mask.shape == (10, 7)
    assert batch.mask.sum(1).tolist() == [len(row.response) for row in rows]
    assert not logp[~batch.mask].any() and not entropy[~batch.mask].any()
    for i, row in enumerate(rows):
        expected = by_itself(model, row, temperature)
        n = len(row.response)
        torch.testing.assert_close((logp[i, :n], entropy[i, :n]), expected, rtol=0, atol=1e-10)


def test_a_prompt_is_computed_once_for_its_rows_and_last_tokens_not_at_all():
    rows = rows_of(GROUPS, ORDER)
    assert len(MicroBatch(rows).layout.tokens) == tokens_in(rows) - len(rows)


@torch.no_grad()
@pytest.mark.parametrize("kept", [False, True])
def test_a_row_without_a_response_takes_nothing_from_its_neighbours(model, kept):
    rows = rows_of([(5, [3, 0, 2]), (4, [0]), (1, [0, 1])], kept=kept)
    logp, entropy = MicroBatch(rows).logprobs(model)
    assert not logp[[1, 3, 4]].any() and not entropy[[1, 3, 4]].any()
    for i in (0, 2, 5):
        n = len(rows[i].response)
        torch.testing.assert_close((logp[i, :n], entropy[i, :n]), by_itself(model, rows[i], 1.0), rtol=0, atol=1e-10)
    alone, _ = MicroBatch(rows[3:4]).logprobs(model)
    assert alone.shape == (1, 0)


@torch.no_grad()
def test_rows_with_and_without_kept_sets_may_share_a_micro_batch(model):
    rows = [row for pair in zip(rows_of(GROUPS, kept=True), rows_of(GROUPS), strict=True) for row in pair]
    logp, _ = MicroBatch(rows).logprobs(model)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logp[i, : len(row.response)], by_itself(model, row, 1.0)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_for_every_budget(model, kept, checkpointing):
    rows = rows_of(GROUPS, ORDER, kept)
    weights = torch.randn(len(rows), 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(parts) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for loss in parts:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def in_micro_batches(budget: int):
        for indices in micro_batches(rows, range(len(rows)), budget):
            logp, entropy = MicroBatch([rows[i] for i in indices]).logprobs(model, 0.8)
            yield ((logp + 0.3 * entropy) * weights[indices, : logp.shape[1]]).sum()

    def row_by_row():
        for i, row in enumerate(rows):
            logp, entropy = by_itself(model, row, 0.8)
            yield ((logp + 0.3 * entropy) * weights[i, : len(logp)]).sum()

    expected = gradients(row_by_row())
    model.checkpointing = checkpointing
    try:
        for budget in (1, 12, 25, 10_000):
            for name, gradient in gradients(in_micro_batches(budget)).items():
                assert (gradient - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max(), (budget, name)
    finally:
        model.checkpointing = False


# --- what the sampler drew -------------------------------------------------------------------------------------------


def sampled(model: Transformer, params: SamplingParams) -> tuple[list[Row], list[list[float]]]:
    prompts = [random_ids(n, seed=n) for n in (4, 1, 11)]
    groups = Sampler(model, slots=5).generate(prompts, params)
    rows = [Row(prompts[i], c.tokens, i, c.kept) for i, group in enumerate(groups) for c in group]
    return rows, [c.logprobs for group in groups for c in group]


@pytest.mark.parametrize("budget", [1, 30, 10_000])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=4, max_tokens=12, stop_ids=(1, 2, 3, 4)),
        SamplingParams(n=4, max_tokens=12, stop_ids=(1, 2, 3, 4), temperature=0.7, top_p=0.8),
        SamplingParams(n=4, max_tokens=12, top_k=6, min_p=0.05, temperature=1.3),
    ],
    ids=["plain", "top_p", "top_k and min_p"],
)
def test_scoring_gives_the_log_probs_that_the_sampler_reported(params, budget):
    model = tiny_model(windows=(None, 4, None))
    rows, reported = sampled(model, params)
    scores = response_logprobs(model, rows, budget, params.temperature)
    assert scores.shape == (12, max(map(len, reported))) and not scores.requires_grad
    for i, logprobs in enumerate(reported):
        assert np.allclose(scores[i, : len(logprobs)], logprobs, rtol=0, atol=1e-5)
        assert not scores[i, len(logprobs) :].any()
    if params.truncates:
        # Kept sets are replayed from the record: without them the same tokens look less likely.
        free = response_logprobs(
            model, [Row(row.prompt, row.response, row.group) for row in rows], budget, params.temperature
        )
        assert (scores - free).max() > 0.1


def test_the_scores_of_a_float64_model_are_float64(model):
    rows = rows_of(GROUPS, ORDER)
    logp, entropy = response_logprobs_and_entropy(model, rows, 20, 0.7)
    assert logp.dtype == entropy.dtype == torch.float64 and torch.equal(response_logprobs(model, rows, 20, 0.7), logp)
    for row, found, its in zip(rows, logp, entropy, strict=True):
        wanted = by_itself(model, row, 0.7)
        for x, y in zip((found, its), wanted, strict=True):
            assert torch.allclose(x[: len(row.response)], y, rtol=0, atol=1e-12) and not x[len(row.response) :].any()


def test_no_rows_have_no_scores():
    assert response_logprobs(tiny_model(), [], 100).shape == (0, 0)


def test_kept_sets_are_packed_as_the_record_has_them():
    rows = rows_of([(2, [3, 2])], kept=True)
    packed = MicroBatch(rows).kept
    assert isinstance(packed, Kept) and packed.offsets.tolist()[0] == 0
    sets = [ids for row in rows for ids in row.kept]
    for m, ids in enumerate(sets):
        inside = ~packed.outside(torch.tensor([m]), CONFIG.vocab_size)[0]
        assert inside.nonzero().squeeze(1).tolist() == ids.tolist()
