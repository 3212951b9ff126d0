"""Tokens of responses: as they follow their prompt, with one token that ends them, on every way into training; and the
tokens in which their steps end."""

import random

import pytest
import tokenizers
from helpers import byte_level, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minirl.examples import demonstration_rows, ranked_lists, reward_lines
from minirl.reward_model import RewardModel
from minirl.rollout import _token_at
from minirl.stored import _turns
from minirl.tokenizer import Tokenizer
from minirl.trees import LAST
from minirl.turns import answered, continuation_ids, conversation, spelled_tokens, step_ends

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (  # Llama 2: white space around an answer
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
THOUGHTS = ZEPHYR.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
ASK = [{"role": "user", "content": "q"}]


def spaced(kind: str, template: str | None = ZEPHYR) -> Tokenizer:
    """A token a character and "yes" with and without a space before it; the tokenizer puts a space before a text."""
    space = "Ġ" if kind == "byte level" else "▁"
    characters = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "byte level" else [*map(chr, range(32, 127))]
    merges = [("y", "e"), ("ye", "s"), (space, "yes")]
    words = dict.fromkeys(["<unk>", "<s>", "</s>", space, *characters, "\n", *map("".join, merges)])
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    if kind == "prepend":  # Llama 2, TinyLlama, Zephyr
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})


KINDS = ("prepend", "metaspace", "byte level")


def pieces(tokenizer: Tokenizer, ids) -> list[str]:
    return [tokenizer._backend.id_to_token(i).replace("Ġ", "▁") for i in ids]


def every_way(tokenizer: Tokenizer, prompt, text: str) -> list[list[int]]:
    """The tokens of one response as demonstration, preference, label, stored line, and text that is scored."""
    line = {"prompt": prompt, "completion": text, "where": "line 1", "format": "prompt", "label": 1}
    size = tiny_config(vocab_size=tokenizer.vocab_size)
    ranked = line | {"responses": [text, "other"], "scores": [1.0, 0.0], "tokens": None}
    judge, scored = RewardModel(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer), []
    judge.score = lambda prompts, completions: scored.extend(completions)
    judge([prompt], [text])
    found = [
        demonstration_rows(tokenizer, [line], 200)[0].response,
        ranked_lists(tokenizer, [ranked], 200)[0].rows[0].response,
        reward_lines([ranked], "pairwise", tokenizer, size)[0][0].rows[0].response,
        reward_lines([line], "bce", tokenizer, size)[0][0].rows[0].response,
        _turns(line, tokenizer).response,
        scored[0],
    ]
    return [list(row) for row in found]


# ---- as they follow the prompt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "prompt", "text", "wanted"),
    [
        (ZEPHYR, ASK, "yes", ["yes", "</s>"]),
        (INST, ASK, "yes", ["▁yes", "▁", "</s>"]),
        (THOUGHTS, ASK, "yes", [*"<think></think>", "yes", "</s>"]),  # as the template writes a turn
        (None, "q:", "yes", ["yes", "</s>"]),
        (None, "q:", " yes", ["▁yes", "</s>"]),
        (None, "q ", "yes", ["yes", "</s>"]),  # joined, the last token of the prompt would be another
    ],
)
def test_a_response_has_no_space_that_nobody_wrote(kind, template, prompt, text, wanted):
    tokenizer = spaced(kind, template)
    assert [pieces(tokenizer, row) for row in every_way(tokenizer, prompt, text)] == [wanted] * 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [ZEPHYR, INST])
def test_a_response_goes_on_as_in_the_whole_conversation(kind, template):
    """The prompt with its response begins the tokens of the text that the template writes, also over several turns."""
    tokenizer = spaced(kind, template)
    answer = {"role": "assistant", "content": "yes"}
    whole = tokenizer.chat([*ASK, answer], add_generation_prompt=False)
    both = [*tokenizer.prompt_ids(ASK), *answered(tokenizer, ASK, "yes").response]
    assert both == whole[: len(both)]
    talk = [*ASK, answer, *ASK, answer]
    (turns,) = conversation(tokenizer, talk, [1, 3])
    both = [*turns.prompt, *turns.response]
    assert both == tokenizer.chat(talk, add_generation_prompt=False)[: len(both)]
    learned = [token for token, counted in zip(turns.response, turns.counted, strict=True) if counted]
    assert learned == answered(tokenizer, ASK, "yes").response * 2


def test_other_tokenizers_encode_a_response_alone():
    """Where nothing is put before a text, its tokens are its own, whatever stands before it."""
    tokenizer, rng = Tokenizer.from_chars("ab \n"), random.Random(0)
    for _ in range(50):
        before, text = ("".join(rng.choices("ab \n", k=rng.randint(0, 300))) for _ in range(2))
        assert tokenizer.encode_behind(before, text) == tokenizer.encode(text)


# ---- one end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["yes", "yes</s>", "yes</s>\n"])
@pytest.mark.parametrize(
    ("template", "prompt", "wanted"),
    [
        (None, "q:", ["yes", "</s>"]),
        (ZEPHYR, ASK, ["yes", "</s>"]),
        (INST, ASK, ["▁yes", "▁", "</s>"]),
    ],
)
def test_a_response_that_holds_its_end_is_given_no_second_one(kind, text, template, prompt, wanted):
    tokenizer = spaced(kind, template)
    assert [pieces(tokenizer, row) for row in every_way(tokenizer, prompt, text)] == [wanted] * 6


def test_a_response_with_its_end_is_the_one_without_it():
    """Two spellings of one response are no preference."""
    tokenizer = Tokenizer.from_chars("abc")
    line = {"prompt": "a", "responses": ["b<eos>", "b"], "scores": [1.0, 0.0], "tokens": None}
    line |= {"format": "prompt", "where": "line 1"}
    assert ranked_lists(tokenizer, [line], 32) == []
    assert reward_lines([line], "pairwise", tokenizer, tiny_config()) == ([], "1 that compare equal or tied responses")


def test_an_end_inside_a_response_stays():
    tokenizer = Tokenizer.from_chars("abc")
    assert continuation_ids(tokenizer, "a", "b<eos>c") == [4, 2, 5, 2]
    assert continuation_ids(tokenizer, "a", "b<eos>", ended=False) == [4]


@pytest.mark.parametrize("end", ["</s>", "</s>\n"])
def test_turns_and_documents_that_hold_their_end_are_given_no_second_one(end):
    tokenizer = spaced("prepend")
    answer = [{"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "yes" + end}]
    plain, twice = (conversation(tokenizer, [*ASK, turn, *ASK, turn], [1, 3]) for turn in answer)
    assert plain == twice and len(plain) == 1
    (row,) = demonstration_rows(tokenizer, [{"text": "a yes" + end}], 200)
    assert pieces(tokenizer, [*row.prompt, *row.response]) == ["▁", "a", "▁yes", "</s>"]


def test_stored_tokens_may_stand_beside_a_text_that_shows_its_end():
    tokenizer = Tokenizer.from_chars("abc")
    assert spelled_tokens(tokenizer, "b<eos>", [4, 2], "line 1") == (4, 2)


# ---- steps, and characters of several tokens -------------------------------------------------------------------------


def steps_of(separator: str) -> str:
    return f"1{separator}2{separator}"


@pytest.mark.parametrize("separator", ["\n", "。", "ки", "🔷", "é", "aé"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_separator_may_be_several_tokens_and_part_of_one(separator, stopped):
    """A token a byte: the separator has as many tokens as bytes."""
    tokenizer, n = Tokenizer(byte_level("<eos>"), {"eos_token": "<eos>"}), len(separator.encode())
    tokens = tokenizer.encode(steps_of(separator)) + [tokenizer.stop_id] * stopped
    assert step_ends(tokenizer, tokens, separator) == [n, 2 * n + 1]
    assert step_ends(tokenizer, tokens[: -n - stopped], separator) == [n, LAST]  # without the second one


def test_bytes_that_are_no_character_hide_no_later_step():
    tokenizer = Tokenizer(byte_level("<eos>"), {"eos_token": "<eos>"})
    [broken, *_] = tokenizer.encode("。")
    tokens = [*tokenizer.encode("1"), *[broken] * 40, *tokenizer.encode("。2")]
    assert step_ends(tokenizer, tokens, "。") == [len(tokens) - 2, LAST]


@pytest.mark.parametrize("kind", KINDS)
def test_a_separator_may_begin_with_a_space(kind):
    tokenizer = spaced(kind)
    assert step_ends(tokenizer, tokenizer.encode("a yes b yes"), " yes") == [2, 5]  # ▁ a ▁yes ▁ b ▁yes


def test_steps_in_any_letters_are_data():
    tokenizer = Tokenizer(byte_level("<eos>"), {"eos_token": "<eos>"})
    example = {"prompt": "p", "steps": ["1", "2"], "labels": [1, 0], "where": "line 1"}
    (line,) = reward_lines([example], "process", tokenizer, tiny_config(vocab_size=400), "。")[0]
    assert line.rows[0].places == (3, LAST)


@given(st.text("aé二🔷", min_size=1, max_size=8))
def test_the_token_of_a_character_is_that_of_its_last_byte(text):
    tokenizer = Tokenizer(byte_level("<eos>"), {"eos_token": "<eos>"})
    tokens = [*tokenizer.encode(text), tokenizer.stop_id]
    found = [_token_at(tokenizer, tokens, text, end) for end in range(1, len(text))]
    assert found == [len(text[:end].encode()) - 1 for end in range(1, len(text))]
