"""Completions against slow references: the same whatever the slots, with exact log-probs and the right distribution."""

import copy
import math
import random
from collections.abc import Sequence
from itertools import count, pairwise

import numpy as np
import pytest
import tokenizers
import torch
from by_hand import LIMIT_49, chi_square, kept_by_hand, uniform_by_hand
from helpers import full_logits, random_ids, tiny_config, tiny_model
from tokenizers import decoders, models, pre_tokenizers

from minirl import sampler as sampler_module
from minirl.attention import Packed
from minirl.errors import InputError
from minirl.grpo import GRPOConfig
from minirl.model import Transformer
from minirl.sampler import Completion, Sampler, SamplingParams
from minirl.tokenizer import Tokenizer
from minirl.trees import MicroBatch, Row

V = 53
PROMPTS = [random_ids(length, seed=length) for length in (7, 1, 19, 2, 40)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(seed=2, windows=(None, 9, None))


class Scripted:
    """Stands in for a model whose logits are known: those of `table` [rows, V], looked up by token or by position."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, table: torch.Tensor, by: str = "token"):
        self.table, self.by = table.float(), by
        self.config = tiny_config(layers=0, vocab_size=table.shape[1], max_positions=100_000)
        self.active_vocab = self.config.vocab_size

    def __call__(self, tokens, layout) -> torch.Tensor:
        return self.table[tokens if self.by == "token" else layout.positions]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


def saying(ids: Sequence[int], vocab: int) -> Scripted:
    """Says these ids one after another, for sure, behind a prompt of one token."""
    return Scripted(torch.nn.functional.one_hot(torch.tensor(ids), vocab) * 200.0, by="position")


# --- references ------------------------------------------------------------------------------------------------------


def one_by_one(model: Transformer, prompt: list[int], p: SamplingParams, sample: int, context: int) -> Completion:
    """One completion, a full forward a token, in float64 behind the logits."""
    out = Completion(kept=[] if p.truncates else None)
    for position in count():
        logits = full_logits(model, prompt + out.tokens)[-1].double().numpy() / (p.temperature or 1.0)
        kept = kept_by_hand(logits, p.top_k, p.top_p, p.min_p) if p.truncates else np.arange(len(logits))
        shares = np.exp(logits[kept] - logits[kept].max())
        cumulative = shares.cumsum() / shares.sum()
        place = int((cumulative <= uniform_by_hand(p.seed, sample, position)).sum())
        place = place if p.temperature else int(logits.argmax())
        out.tokens.append(int(kept[place]))
        out.logprobs.append(math.log(shares[place] / shares.sum()))
        if out.kept is not None:
            out.kept.append(kept)
        if out.tokens[-1] in p.stop_ids or len(out.tokens) == p.max_tokens or len(prompt) + len(out.tokens) == context:
            out.finish_reason = "stop" if out.tokens[-1] in p.stop_ids else "length"
            return out


def assert_same(ours: Completion, expected: Completion, tolerance: float = 1e-5) -> None:
    assert ours.tokens == expected.tokens and ours.finish_reason == expected.finish_reason
    assert np.allclose(ours.logprobs, expected.logprobs, rtol=0, atol=tolerance)
    assert (ours.kept is None) == (expected.kept is None)
    for kept, reference in zip(ours.kept or [], expected.kept or [], strict=True):
        assert kept.dtype == np.int32 and kept.tolist() == reference.tolist()


# --- draws through the sampler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_drawn_tokens_have_the_distribution_of_softmax(temperature):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1.2
    sampler = Sampler(Scripted(logits.expand(50, -1)), slots=130)
    groups = sampler.generate([[0]], SamplingParams(n=400, temperature=temperature, max_tokens=50, seed=4))
    tokens = [token for completion in groups[0] for token in completion.tokens]
    assert len(tokens) == 20_000
    assert chi_square(tokens, (logits / temperature).softmax(-1)) < LIMIT_49
    for wrong in (0.92, 1.08):  # the test would see a temperature that is off by a tenth
        assert chi_square(tokens, (logits / temperature / wrong).softmax(-1)) > LIMIT_49


def test_neighbouring_tokens_are_drawn_independently():
    """Pairs of successive draws over 7 tokens: 48 degrees of freedom, so the limit of 49 is a little wide."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1))
    completions = Sampler(Scripted(logits.expand(7, -1))).generate([[0]], SamplingParams(n=200, max_tokens=100))[0]
    pairs = [7 * a + b for completion in completions for a, b in pairwise(completion.tokens)]
    p = logits.softmax(-1)
    assert chi_square(pairs, torch.outer(p, p).flatten()) < LIMIT_49


# --- the sampler against one completion at a time --------------------------------------------------------------------

MODES = {
    "plain": SamplingParams(n=3, max_tokens=20, seed=5),
    "cool": SamplingParams(n=3, temperature=0.6, max_tokens=9, seed=-1),
    "greedy": SamplingParams(n=2, temperature=0.0, top_k=3, max_tokens=12),
    "stops": SamplingParams(n=4, temperature=1.5, max_tokens=30, stop_ids=tuple(range(0, V, 9)), seed=1),
    "truncated": SamplingParams(
        n=3, top_k=20, top_p=0.9, min_p=0.02, max_tokens=8, stop_ids=(3, 4, 5, 6, 7), seed=2**65
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_completions_are_those_of_a_slow_loop_whatever_the_slots(model, mode):
    params, context = MODES[mode], 50
    samples = [(prompt, i * params.n + j) for i, prompt in enumerate(PROMPTS) for j in range(params.n)]
    with torch.no_grad():
        expected = [one_by_one(model, prompt, params, sample, context) for prompt, sample in samples]
    assert len({tuple(c.tokens) for c in expected}) > len(PROMPTS) - 1
    if mode == "stops":
        assert {c.finish_reason for c in expected} == {"stop", "length"} and any(len(c.tokens) == 1 for c in expected)
    for slots in (1, 2, 5, 12, 40):
        groups = Sampler(model, slots, max_length=context).generate(PROMPTS, params)
        assert [len(group) for group in groups] == [params.n] * len(PROMPTS)
        for ours, reference in zip((c for group in groups for c in group), expected, strict=True):
            assert_same(ours, reference)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_admission_changes_no_completion(model, seed):
    params = SamplingParams(n=4, top_p=0.95, max_tokens=15, stop_ids=(1, 2, 3, 4))
    sampler = Sampler(model, slots=3 + seed)
    order = list(range(len(PROMPTS) * 4))
    expected = sampler.generate(PROMPTS, params)
    random.Random(seed).shuffle(order)
    for ours, reference in zip(sampler.generate(PROMPTS, params, order=order), expected, strict=True):
        for a, b in zip(ours, reference, strict=True):
            assert_same(a, b)


def test_a_sample_depends_on_its_seed_and_number_alone(model):
    def tokens(prompts, **options):
        groups = Sampler(model).generate(prompts, SamplingParams(max_tokens=12, **options))
        return [[c.tokens for c in group] for group in groups]

    first = tokens(PROMPTS[:1], n=6)[0]
    assert len({tuple(t) for t in first}) == 6
    assert first == tokens(PROMPTS[:1], n=6)[0]
    assert first[:2] == tokens(PROMPTS[:1], n=2)[0]  # more completions do not change the first ones
    assert not set(map(tuple, first)) & set(map(tuple, tokens(PROMPTS[:1], n=6, seed=1)[0]))
    assert tokens([PROMPTS[2], PROMPTS[2]], n=1)[0] != tokens([PROMPTS[2], PROMPTS[2]], n=1)[1]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_a_full_forward_in_fp32_and_float64(model, temperature):
    double = tiny_model(seed=2, windows=(None, 9, None)).double()
    groups = Sampler(model, slots=4).generate(PROMPTS, SamplingParams(n=3, temperature=temperature, max_tokens=60))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            for exact in (model, double):
                with torch.no_grad():
                    logits = full_logits(exact, prompt + completion.tokens)[len(prompt) - 1 : -1]
                expected = (logits / (temperature or 1.0)).log_softmax(-1)
                expected = expected.gather(1, torch.tensor(completion.tokens).unsqueeze(1)).squeeze(1).tolist()
                assert np.allclose(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_a_bf16_model_is_sampled_with_fp32_log_probs_of_its_own_logits():
    model = tiny_model(seed=2).bfloat16()
    groups = Sampler(model, slots=4).generate(PROMPTS, SamplingParams(n=3, max_tokens=10))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = full_logits(model, prompt + completion.tokens)[len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens).unsqueeze(1)).squeeze(1)
            # As near as bf16 activations are when their batch is summed in another order.
            assert (torch.tensor(completion.logprobs) - expected).abs().max() < 0.1


PADDED = {
    "plain": SamplingParams(n=9, max_tokens=20, seed=5),
    "greedy": SamplingParams(n=1, temperature=0.0, max_tokens=12),
    "truncated": SamplingParams(n=6, temperature=1.3, top_k=20, top_p=0.9, max_tokens=12),
}


@pytest.mark.parametrize("mode", PADDED)
def test_ids_without_a_token_are_never_drawn_and_sampler_and_trainer_leave_them_out_alike(model, mode):
    """A model of 53 ids and a tokenizer of 15: truth is softmax over the first 15 logits of a full forward."""
    params, prompts = PADDED[mode], [[3, 14, 0], [7]]
    drawn = {t for group in Sampler(model).generate(prompts, params) for c in group for t in c.tokens}
    assert max(drawn) >= 15
    padded = copy.deepcopy(model)
    padded.active_vocab = 15
    groups = Sampler(padded).generate(prompts, params)
    rows = [Row(p, c.tokens, i, c.kept) for i, (p, g) in enumerate(zip(prompts, groups, strict=True)) for c in g]
    with torch.no_grad():
        scored, _ = MicroBatch(rows).logprobs(padded, params.temperature or 1.0)
    for row, completion, trainers in zip(rows, (c for g in groups for c in g), scored, strict=True):
        assert max(completion.tokens) < 15
        with torch.no_grad():
            logits = full_logits(model, row.prompt + completion.tokens)[len(row.prompt) - 1 : -1, :15].double()
        logits = logits / (params.temperature or 1.0)
        for t, token in enumerate(completion.tokens):
            kept = list(range(15)) if row.kept is None else row.kept[t].tolist()
            if row.kept is not None:
                assert kept == kept_by_hand(logits[t].numpy(), params.top_k, params.top_p).tolist()
            logp = logits[t, kept].log_softmax(-1)[kept.index(token)].item()
            assert completion.logprobs[t] == pytest.approx(logp, abs=1e-5)
            assert trainers[t].item() == pytest.approx(logp, abs=1e-5)


def test_a_prompt_with_an_id_that_has_no_token_is_refused(model):
    padded = copy.deepcopy(model)
    padded.active_vocab = 15
    with pytest.raises(InputError, match="prompt 1 holds a token outside the vocabulary of 15"):
        Sampler(padded).generate([[3], [15]], SamplingParams())


def test_top_k_of_one_says_the_same_as_greedy_where_logits_are_tied():
    """Two ids lead every row with the same logit."""
    sampler = Sampler(Scripted(torch.tensor([0.0, 5.0, 1.0, 5.0]).expand(4, -1)))
    for options in ({"temperature": 0.0}, {"top_k": 1}):
        completions = sampler.generate([[0]], SamplingParams(n=20, max_tokens=10, **options))[0]
        assert {t for c in completions for t in c.tokens} == {1}
    kept = sampler.generate([[0]], SamplingParams(n=1, max_tokens=3, top_k=3))[0][0].kept
    assert [ids.tolist() for ids in kept] == [[1, 2, 3]] * 3


# --- what it costs ---------------------------------------------------------------------------------------------------


def calls_of(model: Transformer, run) -> tuple[list[int], list[int]]:
    """Tokens in each prefill and in each decode step."""
    prefill, decode = [], []

    def count_tokens(_, args):
        (prefill if isinstance(args[1], Packed) else decode).append(len(args[0]))

    hook = model.register_forward_pre_hook(count_tokens)
    try:
        run()
    finally:
        hook.remove()
    return prefill, decode


@pytest.mark.parametrize("slots", [2, 7, 40])
def test_a_prompt_is_prefilled_once_for_all_of_its_completions(model, slots):
    groups = []
    params = SamplingParams(n=5, max_tokens=10, stop_ids=(1, 2, 3, 4, 5, 6))
    prefill, decode = calls_of(model, lambda: groups.extend(Sampler(model, slots).generate(PROMPTS, params)))
    assert sum(prefill) == sum(len(prompt) - 1 for prompt in PROMPTS)
    lengths = [len(c.tokens) for group in groups for c in group]
    assert sum(decode) == sum(lengths)  # nothing is computed for a completion that has ended
    assert all(a == min(slots, 25) for a in decode[: min(lengths)])
    if slots == 40:
        assert len(prefill) == 1 and len(decode) == max(lengths)


def test_prefills_are_cut_to_their_size_and_hold_every_prompt_once(model, monkeypatch):
    expected = Sampler(model, slots=3).generate(PROMPTS, SamplingParams(n=2, max_tokens=5))
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 21)
    groups = []
    params = SamplingParams(n=2, max_tokens=5)
    prefill, _ = calls_of(model, lambda: groups.extend(Sampler(model, slots=3).generate(PROMPTS, params)))
    assert len(prefill) > 2 and max(prefill) == 39 and sum(prefill) == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert [[c.tokens for c in g] for g in groups] == [[c.tokens for c in g] for g in expected]


def test_the_result_is_reported_as_it_grows(model):
    seen = []
    params = SamplingParams(n=3, max_tokens=6, stop_ids=(1, 2, 3, 4))
    Sampler(model, slots=2).generate(PROMPTS, params, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (15, 15) and {total for _, total in seen} == {15}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("temperature", [1e-39, 1e-7, -1.0, math.inf, math.nan])
def test_a_temperature_that_no_logit_can_be_divided_by_is_named(temperature):
    sentence = r"temperature = .*: it must be 0, .*or a finite number from 1e-06"
    with pytest.raises(InputError, match=sentence):
        SamplingParams(temperature=temperature)
    with pytest.raises(InputError, match=r"temperature = "):
        GRPOConfig(model="m", task="arithmetic", temperature=temperature)


def test_the_least_temperature_is_as_good_as_greedy(model):
    coldest, greedy = (
        Sampler(model).generate(PROMPTS, SamplingParams(temperature=temperature, max_tokens=6))
        for temperature in (1e-6, 0.0)
    )
    assert [c.tokens for group in coldest for c in group] == [c.tokens for group in greedy for c in group]


def test_no_prompts_give_no_completions(model):
    assert Sampler(model).generate([], SamplingParams()) == []


def test_weights_that_change_are_seen_by_the_next_call():
    model = tiny_model(seed=2)
    sampler, params = Sampler(model, slots=4), SamplingParams(n=2, max_tokens=12)
    before = sampler.generate(PROMPTS, params)
    with torch.no_grad():
        for p in model.parameters():  # in place, as an optimizer does
            p.mul_(1.1)
    after = sampler.generate(PROMPTS, params)
    fresh = Sampler(model, slots=4).generate(PROMPTS, params)
    assert [[c.logprobs for c in g] for g in after] == [[c.logprobs for c in g] for g in fresh]
    assert all(a.logprobs != b.logprobs for x, y in zip(after, before, strict=True) for a, b in zip(x, y, strict=True))


def test_training_goes_on_behind_a_sample():
    """Sampling runs in inference mode; nothing that it leaves behind may be an inference tensor."""
    model = tiny_model(seed=2)
    Sampler(model).generate(PROMPTS, SamplingParams(max_tokens=3))
    full_logits(model, PROMPTS[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- where a completion ends -----------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_completion_and_is_returned_with_its_log_prob():
    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(n=300, max_tokens=20, stop_ids=(4, 7))
    ended = set()
    for completion in Sampler(Scripted(table)).generate([[1]], params)[0]:
        path = [1, *completion.tokens]
        assert len(completion.logprobs) == len(completion.tokens)
        assert np.allclose(
            completion.logprobs, [table[a].log_softmax(-1)[b].item() for a, b in pairwise(path)], atol=1e-6
        )
        assert not set(completion.tokens[:-1]) & {4, 7}
        if completion.finish_reason == "stop":
            ended.add(completion.tokens[-1])
        else:
            assert (completion.finish_reason, len(completion.tokens)) == ("length", 20)
    assert ended == {4, 7}


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "context", "length"),
    [(1, 5, 100, 5), (9, 5, 14, 5), (9, 6, 14, 5), (9, 60, 14, 5), (13, 60, 14, 1), (1, 60, 2, 1), (1, 1, 100, 1)],
)
def test_length_is_that_of_max_tokens_or_of_the_context(model, prompt, max_tokens, context, length):
    sampler = Sampler(model, max_length=context)
    for group in sampler.generate([random_ids(prompt), random_ids(1)], SamplingParams(max_tokens=max_tokens))[:1]:
        assert (len(group[0].tokens), group[0].finish_reason) == (length, "length")


def test_a_context_longer_than_the_model_is_cut_to_it():
    model = tiny_model(max_positions=16)
    completion = Sampler(model, max_length=1000).generate([random_ids(10)], SamplingParams())[0][0]
    assert (len(completion.tokens), completion.finish_reason) == (6, "length")


def test_a_stop_at_the_last_place_counts_as_stop():
    table = torch.full((3, 3), -200.0).fill_diagonal_(0.0).roll(1, 1)  # 0 -> 1 -> 2
    completion = Sampler(Scripted(table)).generate([[0]], SamplingParams(max_tokens=2, stop_ids=(2,)))[0][0]
    assert (completion.tokens, completion.finish_reason) == ([1, 2], "stop")


@pytest.mark.parametrize(
    ("stop", "said", "reason"),
    [
        (("cde",), "abcde", "stop"),
        (("e",), "abcde", "stop"),
        (("efgh", "bc"), "abc", "stop"),
        (("abcdefgh",), "abcdefgh", "stop"),
        (("x", "ba", "abd"), "abcdefgh", "length"),
        (("cd\n",), "abcdefgh", "length"),
    ],
)
def test_a_stop_text_ends_a_completion_however_many_tokens_it_spans(stop, said, reason):
    tokenizer = Tokenizer.from_chars("abcdefgh\nx")
    model = saying(tokenizer.encode("abcdefgh"), tokenizer.vocab_size)
    completion = Sampler(model, tokenizer=tokenizer).generate([[0]], SamplingParams(max_tokens=8, stop=stop))[0][0]
    assert (tokenizer.decode(completion.tokens), completion.finish_reason) == (said, reason)


def test_a_stop_text_of_characters_that_are_several_tokens_each_is_found():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, {})
    ids = tokenizer.encode("ja! 🎉🎉🎉🎉 nein")
    model = saying(ids, 256)
    completion = Sampler(model, tokenizer=tokenizer).generate(
        [[0]], SamplingParams(max_tokens=len(ids), stop=("🎉🎉🎉🎉",))
    )
    assert tokenizer.decode(completion[0][0].tokens) == "ja! 🎉🎉🎉🎉"
    assert completion[0][0].finish_reason == "stop"


def test_a_prompt_that_ends_with_the_stop_text_stops_nothing():
    tokenizer = Tokenizer.from_chars("abc")
    model = saying([*tokenizer.encode("c"), *tokenizer.encode("abc")], tokenizer.vocab_size)
    prompt = tokenizer.encode("ab")  # the first word said makes "abc" together with the prompt
    completion = Sampler(model, tokenizer=tokenizer).generate([prompt], SamplingParams(max_tokens=3, stop=("abc",)))[0][
        0
    ]
    assert tokenizer.decode(completion.tokens) == "abc" and completion.finish_reason == "stop"


# --- what cannot be sampled ------------------------------------------------------------------------------------------

BAD = [
    {"n": 0}, {"n": 1.5}, {"n": "2"}, {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan},
    {"temperature": None}, {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan},
    {"min_p": -0.1}, {"min_p": 1.5}, {"max_tokens": 0}, {"max_tokens": 3.0}, {"stop": ("",)}, {"stop": "text"},
    {"stop": (3,)}, {"stop_ids": 3}, {"stop_ids": (1.5,)}, {"stop_ids": (-1,)}, {"seed": 0.5}, {"seed": None},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD, ids=str)
def test_a_sampling_option_out_of_range_is_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2, V]], f"prompt 1 holds a token outside the vocabulary of {V}"),
        ([[-1]], "prompt 0 holds a token outside"),
        ([[1] * 20], "prompt 0 has 20 tokens and the context holds 20"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named(model, prompts, message):
    with pytest.raises(InputError, match=message):
        Sampler(model, max_length=20).generate(prompts, SamplingParams())


def test_a_sampler_that_cannot_work_says_why(model):
    for options, named in (
        ({"slots": 0}, "slots"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": -3}, "max_length"),
    ):
        with pytest.raises(InputError, match=named):
            Sampler(model, **options)
    with pytest.raises(InputError, match="tokenizer"):
        Sampler(model).generate([[1]], SamplingParams(stop=("a",)))
    for order in ([0, 1], [0, 1, 2, 2], [1, 2, 3, 4]):
        with pytest.raises(InputError, match="order"):
            Sampler(model).generate([[1], [2]], SamplingParams(n=2), order=order)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("broken", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_nan_stop_the_sampling(options, broken):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(broken)[7] = math.nan
    with pytest.raises(InputError, match="NaN for prompt 1"):
        Sampler(model, slots=1).generate(
            [[7], [7]] if broken != "model.embed_tokens.weight" else [[1], [7]],
            SamplingParams(max_tokens=1, **options),
            order=[1, 0],
        )
