"""Formats of training data: each gives the tokens that a chat template writes, and the loss is on the right ones."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import full_logits, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch.nn import functional as F

from minirl.errors import InputError, NoChatTemplate
from minirl.examples import demonstration_rows, encode_responses, ranked_lists, reward_lines, share_prompt
from minirl.examples import description as comparisons
from minirl.lab.tasks import load_task
from minirl.lab.training import train_prefer, train_reward, train_sft
from minirl.model import Transformer
from minirl.prefer import PreferConfig
from minirl.records import demonstration, read_demonstrations, read_labels, read_outcomes, read_preferences
from minirl.reward_training import RewardConfig
from minirl.rewards import score_rollout
from minirl.rollout import sample
from minirl.run import Display
from minirl.sampler import Completion, SamplingParams
from minirl.sft import SFTConfig, add_likelihood_gradient, description
from minirl.split import prompt_key
from minirl.stored import _turns as stored_turns
from minirl.tokenizer import Tokenizer
from minirl.trees import Row
from minirl.turns import common_start, conversation, turn

END, DOCUMENT_END, BEGIN = "<end>", "<|eos|>", "<|bos|>"
CHAT = (
    "{% if tools %}{{ '<tools>' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) }}{% endfor %}"
    "{{ '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
LAST_THOUGHTS = (  # like Qwen3: thoughts stay in the last turn only
    "{% for m in messages %}{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{{ '<' + m.role + '>' + text + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
OPENS_THOUGHTS = (  # like DeepSeek-R1: thoughts are opened in the prompt, and stay in no turn
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content.split('</think>')[-1] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
)
Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat_tokenizer(template: str | None = CHAT, bos: bool = False) -> Tokenizer:
    """One token a byte, and one for each special token; <end> ends a turn, <|eos|> a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, DOCUMENT_END, BEGIN])
    config = {"eos_token": DOCUMENT_END, "chat_template": template}
    if bos:
        config["bos_token"] = BEGIN
        ids = [(BEGIN, backend.token_to_id(BEGIN))]
        backend.post_processor = tokenizers.processors.TemplateProcessing(f"{BEGIN} $A", None, ids)
    return Tokenizer(backend, config, stop_ids=[backend.token_to_id(END), backend.token_to_id(DOCUMENT_END)])


def write(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def spans(tokenizer: Tokenizer, row) -> list[tuple[str, bool]]:
    """The text of the prompt, and of the response in stretches that are learned or not."""
    found = [(tokenizer.decode(row.prompt, skip_special_tokens=False), False)]
    counted = [True] * len(row.response) if row.counted is None else row.counted
    for learned, pairs in groupby(zip(row.response, counted, strict=True), key=lambda pair: pair[1]):
        found.append((tokenizer.decode([token for token, _ in pairs], skip_special_tokens=False), learned))
    return found


def rows_of(tmp_path, *rows: dict, tokenizer: Tokenizer | None = None, length: int = 500, loss_on: str = "all"):
    tokenizer = tokenizer or chat_tokenizer()
    examples = read_demonstrations(write(tmp_path / "data.jsonl", *rows))
    found = demonstration_rows(tokenizer, examples, length, loss_on)
    for row in found:  # a special token is one token, and all others are a byte
        text = tokenizer.decode([*row.prompt, *row.response], skip_special_tokens=False)
        assert [*row.prompt, *row.response] == tokenizer.encode(text)
    return [spans(tokenizer, row) for row in found]


# ---- demonstrations --------------------------------------------------------------------------------------------------

ONE_TURN = [("<user>q<end>\n<assistant>", False), ("a<end>", True)]


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"messages": [Q, A]}, ONE_TURN),
        ({"prompt": [Q], "completion": [A]}, ONE_TURN),
        ({"prompt": "q", "completion": [A]}, ONE_TURN),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ONE_TURN),
        ({"conversations": [Q, A], "messages": None}, ONE_TURN),
        ({"instruction": "q", "input": "", "output": "a"}, ONE_TURN),
        (
            {"instruction": "q", "input": "x", "output": "a"},
            [("<user>q\nx<end>\n<assistant>", False), ("a<end>", True)],
        ),
        ({"question": "q", "response": "a"}, ONE_TURN),
        ({"prompt": [Q], "completion": "a"}, ONE_TURN),
        ({"prompt": [Q | {"content": [{"type": "text", "text": "q"}]}], "completion": "a"}, ONE_TURN),
        ({"messages": [Q | {"content": [{"type": "text", "text": "q"}]}, A | {"content": ["a"]}]}, ONE_TURN),
        ({"messages": [Q | {"content": [{"type": "text", "value": "q"}]}, A]}, ONE_TURN),
        ({"prompt": "q", "response": "a"}, [("q", False), ("a<end>", True)]),
        ({"text": "a document"}, [("a", False), (" document<|eos|>", True)]),
        ({"text": "a document<|eos|>"}, [("a", False), (" document<|eos|>", True)]),
        (
            {"system": "s", "instruction": "q", "output": "a", "history": [["h", "i"]]},
            [("<system>s<end>\n<user>h<end>\n<assistant>i<end>\n<user>q<end>\n<assistant>", False), ("a<end>", True)],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [("<system>s<end>\n<user>q<end>\n<assistant>", False), ("a<end>", True)],
        ),
    ],
)
def test_a_format_gives_its_tokens_and_the_loss_is_on_the_answer(row, wanted, tmp_path):
    assert rows_of(tmp_path, row) == [wanted]


def test_a_document_is_learned_whole_behind_a_bos_token(tmp_path):
    assert rows_of(tmp_path, {"text": "ab"}, tokenizer=chat_tokenizer(bos=True)) == [
        [(BEGIN, False), ("ab<|eos|>", True)]
    ]


TALK = [{"role": "system", "content": "s"}, Q, A, {"role": "user", "content": "r"}, B, {"role": "user", "content": "t"}]


def test_every_turn_of_the_assistant_is_learned_in_one_row(tmp_path):
    first = ("<system>s<end>\n<user>q<end>\n<assistant>", False)
    gap = ("\n<user>r<end>\n<assistant>", False)
    assert rows_of(tmp_path, {"messages": TALK}) == [[first, ("a<end>", True), gap, ("b<end>", True)]]


def test_only_the_last_turn_is_learned_where_that_is_asked_for(tmp_path):
    before = "<system>s<end>\n<user>q<end>\n<assistant>a<end>\n<user>r<end>\n<assistant>"
    assert rows_of(tmp_path, {"messages": TALK}, loss_on="last") == [[(before, False), ("b<end>", True)]]


def test_turns_of_weight_0_and_turns_of_the_prompt_are_not_learned(tmp_path):
    asked = ("<system>s<end>\n<user>q<end>\n<assistant>a<end>\n<user>r<end>\n<assistant>", False)
    talk = [*TALK[:2], A | {"weight": 0}, *TALK[3:5]]
    assert rows_of(tmp_path, {"messages": talk}) == [[asked, ("b<end>", True)]]
    talk[2] = A | {"loss_weight": 0.0}
    assert rows_of(tmp_path, {"messages": talk}) == [[asked, ("b<end>", True)]]
    assert rows_of(tmp_path, {"prompt": TALK[:4], "completion": [B]}) == [[asked, ("b<end>", True)]]


def test_two_turns_of_the_assistant_in_a_row_are_two_turns(tmp_path):
    [row] = rows_of(tmp_path, {"messages": [A, Q, A, B]})
    asked = ("<assistant>a<end>\n<user>q<end>\n<assistant>", False)
    assert row == [asked, ("a<end>", True), ("\n<assistant>", False), ("b<end>", True)]


def thought(text: str) -> dict:
    return {"role": "assistant", "content": f"<think>\nt</think>{text}"}


def test_a_template_that_strips_earlier_thoughts_gives_a_row_for_each_turn(tmp_path):
    talk = [Q, thought("a"), TALK[3], thought("b")]
    assert rows_of(tmp_path, {"messages": talk}, tokenizer=chat_tokenizer(LAST_THOUGHTS)) == [
        [("<user>q<end>\n<assistant>", False), ("<think>\nt</think>a<end>", True)],
        [("<user>q<end>\n<assistant>a<end>\n<user>r<end>\n<assistant>", False), ("<think>\nt</think>b<end>", True)],
    ]


def test_thoughts_go_on_from_those_that_the_template_opens_and_an_answer_without_any_comes_before(tmp_path):
    tokenizer = chat_tokenizer(OPENS_THOUGHTS)
    thinking = [("<user>q<end>\n<assistant><think>\n", False), ("t</think>a<end>", True)]
    assert rows_of(tmp_path, {"messages": [Q, thought("a")]}, tokenizer=tokenizer) == [thinking]
    assert rows_of(tmp_path, {"messages": [Q, A]}, tokenizer=tokenizer) == [ONE_TURN]


@pytest.mark.parametrize("text", ["<answer>2</answer>", "<b>x</b>", "[T]", "<thin", ""])
def test_an_answer_that_begins_like_the_tag_of_opened_thoughts_is_learned_before_them(text, tmp_path):
    tokenizer = chat_tokenizer(OPENS_THOUGHTS)
    wanted = [(ONE_TURN[0][0], False), (text + END, True)]
    assert rows_of(tmp_path, {"messages": [Q, A | {"content": text}]}, tokenizer=tokenizer) == [wanted]


def test_thoughts_are_learned_before_empty_ones_of_the_prompt(tmp_path):
    tokenizer = chat_tokenizer(CHAT.replace("<assistant>' }}", "<assistant><think>\\n\\n</think>\\n\\n' }}"))
    wanted = [ONE_TURN[0], ("<think>\nt</think>a<end>", True)]
    assert rows_of(tmp_path, {"messages": [Q, thought("a")]}, tokenizer=tokenizer) == [wanted]


@pytest.mark.parametrize("template", [CHAT, LAST_THOUGHTS, OPENS_THOUGHTS])
def test_each_part_of_a_long_conversation_is_encoded_about_once(template, monkeypatch):
    tokenizer, encode, sizes = chat_tokenizer(template), Tokenizer.encode, []
    talk = [m for i in range(60) for m in ({"role": "user", "content": f"{i} " + "x" * 80}, thought("y" * 80))]
    wanted = [turn(tokenizer, talk[: i + 1]) for i in range(1, 120, 2)]
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, *more: sizes.append(len(text)) or encode(self, text, *more)
    )
    pieces = conversation(tokenizer, talk, range(1, 120, 2))
    assert sum(sizes) < 15 * len(tokenizer.render(talk, False))
    learned = [token for piece in pieces for token, yes in zip(piece.response, piece.counted, strict=True) if yes]
    assert learned == [token for _, response in wanted for token in response]
    assert pieces[-1].prompt + pieces[-1].response == wanted[-1][0] + wanted[-1][1]


def test_tools_and_calls_of_them_reach_the_template(tmp_path):
    call = {"name": "add", "arguments": {"x": 1}}
    written = '<call>{"name": "add", "arguments": {"x": 1}}<end>'
    wanted = [
        ("<tools>" + json.dumps([ADD]) + "\n<user>q<end>\n<assistant>", False),
        (written, True),
        ("\n<tool>2<end>\n<assistant>", False),
        ("a<end>", True),
    ]
    of_text = {"role": "assistant", "content": None, "tool_calls": [{"function": call | {"arguments": '{"x": 1}'}}]}
    said = {"role": "tool", "content": "2"}
    sharegpt = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "a")]
    for row in (
        {"messages": [Q, of_text, said, A], "tools": [ADD]},
        {"messages": [Q, of_text | {"tool_calls": [call]}, said, A], "tools": json.dumps([ADD["function"]])},
        {"conversations": [{"from": who, "value": text} for who, text in sharegpt], "tools": json.dumps([ADD])},
    ):
        assert rows_of(tmp_path, row) == [wanted]


R1_CALLS = (  # like DeepSeek-R1: arguments are joined as text, and a null is no turn of its own
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<assistant><call>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{{ '<end>' }}{% endif %}"
    "{% if m.content is not none %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_template_that_joins_arguments_as_text_gets_them_so_and_null_stays_null(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"x": "é"}}]}
    wanted = [("<user>q<end><assistant>", False), ('<call>add {"x": "é"}<end>', True)]
    assert rows_of(tmp_path, {"messages": [Q, call]}, tokenizer=chat_tokenizer(R1_CALLS)) == [wanted]
    printing = chat_tokenizer(CHAT.replace("'<' + m.role + '>' + m.content", "'<' ~ m.role ~ '>' ~ m.content"))
    written = [(ONE_TURN[0][0], False), ('<call>{"name": "add", "arguments": {"x": "é"}}<end>', True)]
    for tokenizer in (printing, chat_tokenizer()):
        assert rows_of(tmp_path, {"messages": [Q, call]}, tokenizer=tokenizer) == [written]


def test_words_before_a_call_are_one_turn_with_it(tmp_path):
    call = {"name": "add", "arguments": {}}
    talk = [("human", "q"), ("gpt", "a"), ("function_call", json.dumps(call))]
    row = {"conversations": [{"from": who, "value": text} for who, text in talk]}
    wanted = [(ONE_TURN[0][0], False), ('a<call>{"name": "add", "arguments": {}}<end>', True)]
    assert rows_of(tmp_path, row) == [wanted]
    template = CHAT.replace("+ m.content", "+ ('<x>' if loop.last else '') + m.content")
    with pytest.raises(InputError, match=r"line 1: .* follow one another in another way: join them into one message"):
        rows_of(tmp_path, {"messages": [Q, A, A | {"tool_calls": [call]}]}, tokenizer=chat_tokenizer(template))


@pytest.mark.parametrize("role", ["Assistant", "model", "GPT", " assistant"])
def test_roles_are_read_in_any_spelling_and_unknown_ones_refused(role, tmp_path):
    assert rows_of(tmp_path, {"messages": [Q | {"role": "User"}, A | {"role": role}]}) == [ONE_TURN]
    with pytest.raises(InputError, match="line 1: message 1 of 'messages' is from 'asistant': it must be one of"):
        rows_of(tmp_path, {"messages": [Q, A | {"role": "asistant"}, A]})
    with pytest.raises(InputError, match="line 1: 'messages' is the text of a list: write the list itself"):
        rows_of(tmp_path, {"messages": json.dumps([Q, A])})


def test_a_template_that_leaves_tools_or_calls_or_thoughts_out_is_refused(tmp_path):
    call = A | {"tool_calls": [{"name": "add", "arguments": {}}]}
    for row, words in (
        ({"messages": [Q, A], "tools": [ADD]}, "the chat template does not write tools"),
        ({"messages": [Q, call]}, "does not write the tool_calls"),
        ({"messages": [Q, A | {"reasoning_content": "t"}]}, "does not write the thoughts"),
    ):
        with pytest.raises(InputError, match=f"line 1: .*{words}"):
            rows_of(tmp_path, row, tokenizer=chat_tokenizer(LAST_THOUGHTS))


def test_a_cut_row_has_the_tokens_that_fit_and_no_stop_token_behind_them(tmp_path):
    tokenizer, talk = chat_tokenizer(), [Q, A | {"content": "abc"}, TALK[3], B]
    for row in ({"messages": talk}, {"text": "x" * 60}, {"prompt": [Q], "response": "x" * 60}):
        examples = read_demonstrations(write(tmp_path / "data.jsonl", row))
        [whole] = demonstration_rows(tokenizer, examples, 500)
        assert whole.lost == 0
        for length in range(len(whole.prompt) + 1, 60):
            room = length - len(whole.prompt)
            [cut] = demonstration_rows(tokenizer, examples, length)
            assert (cut.response, list(cut.counted)) == (whole.response[:room], list(whole.counted[:room]))
            assert cut.lost == sum(whole.counted[room:])
    with pytest.raises(InputError, match="line 1: its prompt has 20 tokens, and between 1 and 19 fit"):
        rows_of(tmp_path, {"messages": talk}, length=20)


def test_a_mask_inside_a_row_gives_the_loss_of_its_turns():
    """The mean over the learned tokens, as rows of one turn each have it, in float64."""
    model = tiny_model().double()
    ids = random_ids(12)
    counted = [True, True, False, False, False, True, True, True]
    row = Row(ids[:4], ids[4:], 0, counted=counted)
    logits = full_logits(model, ids)[3:-1]
    losses = F.cross_entropy(logits, torch.tensor(ids[4:]), reduction="none")
    wanted = losses[torch.tensor(counted)].sum() / 5
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    _, metrics = add_likelihood_gradient(model, [row], 100)
    assert metrics["tokens"] == 5 and metrics["loss"] == pytest.approx(wanted.item(), rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_the_format_is_said_in_a_line(tmp_path):
    def said(*rows: dict, loss_on: str = "all") -> str:
        return description(read_demonstrations(write(tmp_path / "data.jsonl", *rows)), loss_on)

    talks = [{"messages": TALK}, {"messages": [Q, A]}]
    assert said(*talks) == "2 conversations, loss on 3 assistant turns"
    assert said(*talks, loss_on="last") == "2 conversations, loss on 2 assistant turns"
    assert said({"text": "a"}) == "1 documents, loss on all of their tokens"
    assert said(*[{"prompt": "q", "response": "a"}] * 1200) == "1,200 prompts, loss on their completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model with a chat template, and room for 60 tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"width": 32, "layers": 1, "heads": 4, "head_dim": 8, "mlp_width": 48}
    tiny_model(vocab_size=259, max_positions=60, **sizes).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


class Lines(Display):
    """Remembers what it was told."""

    def __init__(self):
        self.said = []

    def line(self, text):
        self.said.append(text)


def test_a_run_says_its_format_and_what_it_cuts_and_learns_the_turns(checkpoint, tmp_path):
    rows = [{"messages": [Q, A]}] * 3 + [{"messages": [Q, A, {"role": "user", "content": "r" * 40}, A]}]
    data, shown = str(write(tmp_path / "data.jsonl", *rows)), Lines()
    model = train_sft(
        SFTConfig(str(checkpoint), data, out=str(tmp_path / "run"), steps=20, batch=4, lr=1e-2, warmup=0), shown
    )
    assert shown.said[0] == "4 conversations, loss on 5 assistant turns; cut at 60 tokens: 1"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[0]["tokens"] == 8  # "a" and the end of the turn in each; the long one's second turn does not fit
    tokenizer, trained = Tokenizer.from_pretrained(model), Transformer.from_pretrained(model)
    ids = tokenizer.encode(PAIR[0])
    for token in tokenizer.encode("a<end>"):
        assert full_logits(trained, ids)[-1].argmax() == token
        ids.append(token)


def test_prompts_that_are_too_long_are_dropped_on_request_and_counted(checkpoint, tmp_path):
    rows = [{"messages": [Q, A]}, {"messages": [Q | {"content": "q" * 70}, A]}]
    pairs = [{"prompt": row["messages"][:1], "chosen": "a", "rejected": "b"} for row in rows]
    for kind, train, lines in ((SFTConfig, train_sft, rows), (PreferConfig, train_prefer, pairs)):
        data = str(write(tmp_path / "data.jsonl", *lines))
        more = {} if kind is SFTConfig else {"eval_share": 0.0}
        shared = {"steps": 1, "batch": 1, "dtype": "float32", "device": "cpu", **more}
        with pytest.raises(InputError, match=r"line 2: its prompt has .* tokens, .*overlong_prompts = drop"):
            train(kind(str(checkpoint), data, out=str(tmp_path / "stops"), **shared), Lines())
        shown = Lines()
        train(kind(str(checkpoint), data, out=str(tmp_path / kind.__name__), overlong_prompts="drop", **shared), shown)
        assert "1 of 2 training prompts leave no room for a completion and are dropped" in shown.said


def test_conversations_whose_turns_all_weigh_0_are_left_out_and_counted(tmp_path):
    rows = [{"messages": [Q, A]}, {"messages": [Q, A | {"weight": 0}]}]
    assert rows_of(tmp_path, *rows) == [ONE_TURN]
    examples = read_demonstrations(write(tmp_path / "data.jsonl", *rows))
    wanted = "2 conversations, loss on 1 assistant turns; left out, as the weights of all their turns are 0: 1"
    assert description(examples, "all") == wanted
    for weight in (0.5, -1, "1"):
        with pytest.raises(InputError, match=f"line 1: message 1 has the 'weight' {weight!r}, which must be 0 or 1"):
            read_demonstrations(write(tmp_path / "data.jsonl", {"messages": [Q, A | {"weight": weight}]}))


def test_rows_for_each_turn_are_said_with_their_tokens(tmp_path):
    tokenizer = chat_tokenizer(LAST_THOUGHTS)
    examples = read_demonstrations(write(tmp_path / "data.jsonl", {"messages": [Q, thought("a"), Q, thought("b")]}))
    rows = demonstration_rows(tokenizer, examples, 500)
    tokens = sum(len(row.prompt) + len(row.response) for row in rows)
    said = description(examples, "all", rows)
    assert said.startswith(f"1 conversations, loss on 2 assistant turns in 2 rows of {tokens} tokens")


def test_a_run_on_pairs_says_its_format(checkpoint, tmp_path):
    others = [{"role": "user", "content": f"{i}"} for i in range(4)]
    rows = [LISTS] + [{"chosen": [other, A], "rejected": [other, B]} for other in others]
    data, shown = str(write(tmp_path / "data.jsonl", *rows)), Lines()
    train_prefer(PreferConfig(str(checkpoint), data, out=str(tmp_path / "run"), steps=1), shown)
    assert shown.said[0] == "5 pairs (conversations without an explicit prompt)"
    train_reward(RewardConfig(str(checkpoint), data, out=str(tmp_path / "reward"), steps=1), shown)
    assert shown.said.count("5 pairs (conversations without an explicit prompt)") == 2


@pytest.mark.parametrize(
    "row, words",
    [
        ({"a": 1, "b": 2}, r"line 1: no format has its keys \(a, b\): give 'messages', .*'text'$"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs are for minirl prefer"),
        ({"messages": [Q]}, "line 1: it has no answer of the assistant"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "q"}, "'messages' is a text, but must be"),
        ({"messages": [Q, {"role": "assistant"}]}, "message 1 of 'messages' needs a 'role' and a 'content'"),
        ({"messages": [Q | {"content": [{"type": "image_url"}]}, A]}, "message 0 .* a part of type 'image_url'"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "message 0 of 'conversations' is from 'alien'"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "a function_call: not valid JSON"),
        ({"messages": [Q, A], "images": ["x.jpg"]}, "it has images, and only text can be read"),
        ({"messages": [Q, A], "tools": "["}, "'tools': not valid JSON"),
        ({"messages": [Q, A], "tools": 3}, "'tools' must be a list of functions"),
        ({"prompt": "q", "completion": "a", "tools": [ADD]}, "'tools' are written by a chat template"),
        ({"messages": TALK, "system": "other"}, "two system texts"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "'history' must be a list of pairs"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_line(row, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_demonstrations(write(tmp_path / "data.jsonl", row))


def test_a_row_of_another_format_is_named(tmp_path):
    rows = {"messages": [Q, A]}, {"instruction": "q", "output": "a"}
    with pytest.raises(
        InputError, match=r"line 2: its format is instruction and output, and that of .*line 1 is messages"
    ):
        read_demonstrations(write(tmp_path / "data.jsonl", *rows))


def test_conversations_need_a_chat_template(tmp_path):
    with pytest.raises(NoChatTemplate, match="line 1: this tokenizer has no chat template"):
        rows_of(tmp_path, {"messages": [Q, A]}, tokenizer=chat_tokenizer(None))


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=7), st.booleans())
def test_what_is_learned_is_what_the_assistant_said(roles, strips):
    """Whatever the order of the roles, the learned text is the assistant's turns that answer somebody."""
    tokenizer = chat_tokenizer(LAST_THOUGHTS if strips else CHAT)
    messages = [Q, *({"role": role, "content": f"<think>{i}</think>{i}"} for i, role in enumerate(roles))]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    pieces = conversation(tokenizer, messages, turns)
    learned = [text for piece in pieces for text, counted in spans(tokenizer, piece) if counted]
    assert learned == [messages[i]["content"] + END for i in turns]
    assert strips or len(pieces) == min(1, len(turns))


@given(st.lists(st.text("ab", max_size=4), min_size=1, max_size=3))
def test_the_common_start_is_the_longest(texts):
    start = common_start(texts)
    assert all(text.startswith(start) for text in texts)
    assert any(len(t) == len(start) for t in texts) or len({text[len(start)] for text in texts}) > 1


# ---- preferences -----------------------------------------------------------------------------------------------------

LISTS = {"chosen": [Q, A], "rejected": [Q, B]}
PAIR = ("<user>q<end>\n<assistant>", ["a<end>", "b<end>"])
SYSTEM = ("<system>s<end>\n" + PAIR[0], PAIR[1])
HH_ENDS = {"chosen": " a", "rejected": " "}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}


def texts_of(tokenizer: Tokenizer, example: dict) -> tuple[str, list[str]]:
    found = encode_responses(tokenizer, example)
    assert all(turns.prompt == found[0].prompt for turns in found)
    decode = [tokenizer.decode(turns.response, skip_special_tokens=False) for turns in found]
    return tokenizer.decode(found[0].prompt, skip_special_tokens=False), decode


@pytest.mark.parametrize(
    "row, wanted",
    [
        (LISTS, PAIR),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, PAIR),
        ({"prompt": [Q], "chosen": A, "rejected": B}, PAIR),
        ({"prompt": [Q], "chosen": "a", "rejected": "b"}, PAIR),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, PAIR),
        ({"prompt": "q", "prompt_id": "7", **LISTS, "score_chosen": 8.0, "score_rejected": 3.0}, PAIR),
        (HH, PAIR),
        (
            {
                name: f"\n\nHuman: q\n\nAssistant: a: b\n\nHuman: r\n\nAssistant:{text}"
                for name, text in HH_ENDS.items()
            },
            ("<user>q<end>\n<assistant>a: b<end>\n<user>r<end>\n<assistant>", ["a<end>", "<end>"]),
        ),
        ({"question": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, SYSTEM),
        ({"system": "s", **LISTS}, SYSTEM),
        ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PAIR),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            PAIR,
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", PAIR[1])),
        (
            {"chosen": TALK[:5], "rejected": [*TALK[:4], A]},
            (SYSTEM[0] + "a<end>\n<user>r<end>\n<assistant>", ["b<end>", "a<end>"]),
        ),
    ],
)
def test_a_format_of_pairs_gives_the_prompt_and_both_answers(row, wanted, tmp_path):
    [example] = read_preferences(write(tmp_path / "data.jsonl", row))
    assert texts_of(chat_tokenizer(), example) == wanted
    assert example["scores"][0] > example["scores"][1]
    [item] = ranked_lists(chat_tokenizer(), [example], 500)
    assert item.pairs == [(0, 1)] and item.best == 0
    [line] = reward_lines(read_labels(tmp_path / "data.jsonl", "pairwise"), "pairwise", chat_tokenizer(), BIG)[0]
    assert [row.response for row in line.rows] == [row.response for row in item.rows]


BIG = tiny_model(vocab_size=300, max_positions=500).config


@pytest.mark.parametrize(
    "row, order",
    [
        ({"prompt": "q", "responses": [[A], [B], "c"], "scores": [1, 3, 2]}, ["b", "c", "a"]),
        (
            {
                "instruction": "q",
                "completions": [{"response": r, "overall_score": s} for r, s in zip("abc", [1, 3, 2], strict=True)],
            },
            ["b", "c", "a"],
        ),
        (
            {
                "prompt": "\n\nHuman: q\n\nAssistant: ",
                "answers": [{"answer": r, "rank": s} for r, s in zip("abc", [3, 1, 2], strict=True)],
            },
            ["b", "c", "a"],
        ),
    ],
)
def test_ranked_lists_compare_better_with_worse(row, order, tmp_path):
    [example] = read_preferences(write(tmp_path / "data.jsonl", row))
    tokenizer = chat_tokenizer()
    [item] = ranked_lists(tokenizer, [example], 500)
    assert tokenizer.decode(item.rows[0].prompt, skip_special_tokens=False) == PAIR[0]
    texts = [tokenizer.decode(row.response) for row in item.rows]
    pairs = {(texts[i], texts[j]) for i, j in item.pairs}
    assert pairs == {(order[0], order[1]), (order[0], order[2]), (order[1], order[2])}


def test_equal_scores_are_a_tie_and_margins_stay(tmp_path):
    tied = {"prompt": "q", **LISTS, "score_chosen": 7, "score_rejected": 7}
    examples = read_preferences(write(tmp_path / "data.jsonl", tied, {"prompt": "q", **LISTS, "margin": 0.5}))
    assert [example.get("margin") for example in examples] == [None, 0.5]
    [item] = ranked_lists(chat_tokenizer(), examples, 500)
    assert item.rows[0].group == 2


def test_texts_of_human_and_assistant_stay_texts_without_a_chat_template(tmp_path):
    [example] = read_preferences(write(tmp_path / "data.jsonl", HH))
    prompt, answers = texts_of(chat_tokenizer(None), example)
    assert prompt == "\n\nHuman: q\n\nAssistant:"
    assert [answer.removesuffix(END).removesuffix(DOCUMENT_END) for answer in answers] == [" a", " b"]


def test_only_the_assistant_counts_in_a_response_of_several_turns(tmp_path):
    row = {"chosen": [Q, A, TALK[3], B], "rejected": [Q, B, TALK[3], A]}
    [example] = read_preferences(write(tmp_path / "data.jsonl", row))
    tokenizer = chat_tokenizer()
    [item] = ranked_lists(tokenizer, [example], 500)
    gap = ("\n<user>r<end>\n<assistant>", False)
    assert spans(tokenizer, item.rows[0]) == [(PAIR[0], False), ("a<end>", True), gap, ("b<end>", True)]
    with pytest.raises(InputError, match="line 1: the chat template writes earlier turns in another way"):
        talk = [Q, thought("a"), TALK[3], thought("b")]
        row = {"chosen": talk, "rejected": [*talk[:1], thought("c"), *talk[2:]]}
        ranked_lists(chat_tokenizer(LAST_THOUGHTS), read_preferences(write(tmp_path / "data.jsonl", row)), 500)


def test_answers_with_and_without_thoughts_share_their_prompt(tmp_path):
    [example] = read_preferences(write(tmp_path / "data.jsonl", {"prompt": [Q], "chosen": thought("a"), "rejected": B}))
    assert texts_of(chat_tokenizer(OPENS_THOUGHTS), example) == (PAIR[0], ["<think>\nt</think>a<end>", "b<end>"])


def test_the_format_of_pairs_is_said_in_a_line(tmp_path):
    def said(*rows: dict) -> str:
        return comparisons(read_preferences(write(tmp_path / "data.jsonl", *rows)))

    assert said(*[LISTS] * 1200) == "1,200 pairs (conversations without an explicit prompt)"
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
    assert (
        said({"prompt": "q", "chosen": "a", "rejected": "b"}, ranked) == "1 pairs and 1 ranked lists (below a prompt)"
    )


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [Q, A]}, r"no format has its keys \(messages\): give 'chosen' and 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "there is no 'prompt' above them"),
        ({**LISTS, "chosen_tokens": [1]}, "it has tokens beside its responses"),
        ({"chosen": [Q, A], "rejected": [TALK[3], B]}, "part at message 0, which must be the assistant's"),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, A, TALK[3], A]}, "part at message 2, which must be"),
        ({"prompt": "other", **LISTS}, "do not begin with its prompt"),
        ({**LISTS, "prompt": "q", "score_chosen": 1, "score_rejected": 2}, "'score_chosen' is below"),
        ({"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]}, "a number 'overall_score'"),
    ],
)
def test_a_row_of_pairs_that_cannot_be_read_is_named(row, words, tmp_path):
    with pytest.raises(InputError, match=f"line 1: .*{words}"):
        read_preferences(write(tmp_path / "data.jsonl", row))


# ---- labels and stored completions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "answered"), [("question", "answer"), ("input", "output"), ("query", "response")])
def test_other_names_of_a_question_and_its_answer_are_read(asked, answered, tmp_path):
    assert rows_of(tmp_path, {asked: "q", answered: "a"}) == [ONE_TURN]


@pytest.mark.parametrize("end", ["\r\n\r\n", "\n", "\r\n"])
def test_speakers_without_an_empty_line_before_them_are_named(end, tmp_path):
    row = {key: f"{end}Human: q{end}Assistant: {key}" for key in ("chosen", "rejected")}
    with pytest.raises(InputError, match=r"line 1: its 'Human:' and 'Assistant:' must each follow an empty line"):
        read_preferences(write(tmp_path / "data.jsonl", row))


@pytest.mark.parametrize(("row", "kind"), [({"label": 1}, "pointwise"), ({"steps": ["a"], "labels": [1]}, "process")])
def test_labels_without_a_kind_name_the_kind_they_are_for(row, kind, tmp_path):
    with pytest.raises(InputError, match=f"labels are for minirl reward --kind {kind}$"):
        read_labels(write(tmp_path / "data.jsonl", {"messages": [Q, A]} | row), "pairwise")


def test_steps_may_answer_a_question(tmp_path):
    data = write(tmp_path / "data.jsonl", {"question": "q", "steps": ["a", "b"], "labels": [1, 0]})
    [line] = reward_lines(read_labels(data, "process"), "process", chat_tokenizer(), BIG)[0]
    decode = chat_tokenizer().decode
    assert (decode(line.rows[0].prompt), decode(line.rows[0].response)) == ("<user>q\n<assistant>", "a\nb")
    assert line.labels == (1.0, 0.0)


def test_labelled_and_stored_completions_may_be_messages(tmp_path):
    data = write(tmp_path / "data.jsonl", {"messages": [Q, A], "label": True}, {"messages": [Q, B], "label": 0})
    good, bad = reward_lines(read_labels(data, "bce"), "bce", chat_tokenizer(), BIG)[0]
    decode = chat_tokenizer().decode
    row = good.rows[0]
    assert [decode(x, skip_special_tokens=False) for x in (row.prompt, row.response)] == [
        PAIR[0],
        "a<end>",
    ]
    assert (good.labels, bad.labels) == ((1.0,), (0.0,))
    stored = {"prompt": [Q | {"content": [{"type": "text", "text": "q"}]}], "completion": [A], "reward": None}
    [line] = read_outcomes(write(tmp_path / "data.jsonl", stored))
    assert (line["prompt"], line["completion"], line["reward"]) == ([Q], "a", None)
    with pytest.raises(InputError, match="line 1: its 'completion' must be one message"):
        read_outcomes(write(tmp_path / "data.jsonl", stored | {"completion": [A, Q, A]}))


THOUGHT = "<think>\nt</think>a"


@pytest.mark.parametrize(
    ("template", "text", "wanted"),
    [
        (OPENS_THOUGHTS, THOUGHT, "<user>q<end>\n<assistant><think>\n|t</think>a<end>"),
        (OPENS_THOUGHTS, "a", "<user>q<end>\n<assistant>|a<end>"),
        (OPENS_THOUGHTS, "t</think>a", "<user>q<end>\n<assistant><think>\n|t</think>a<end>"),
        (LAST_THOUGHTS, "a", "<user>q<end>\n<assistant>|a<end>"),
        (CHAT.replace("'>' + m", "'>' + ('<x>' if m.role == 'assistant' else '') + m"), "a", f"{PAIR[0]}|<x>a<end>"),
    ],
)
def test_a_text_below_messages_is_a_turn_on_every_way_into_training(template, text, wanted, tmp_path):
    tokenizer, data = chat_tokenizer(template), tmp_path / "data.jsonl"
    talk, below = {"messages": [Q, A | {"content": text}]}, {"prompt": [Q], "completion": text}
    pair = {"prompt": [Q], "chosen": text, "rejected": text + "b"}
    nectar = [{"answer": text, "rank": 1}, {"answer": text + "b", "rank": 2}]
    ranked = [*read_preferences(write(data, pair))]
    ranked += read_preferences(write(data, {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": nectar}))
    rows = [ranked_lists(tokenizer, [example], 500)[0].rows[0] for example in ranked]
    for row in (talk, below):
        rows += demonstration_rows(tokenizer, read_demonstrations(write(data, row)), 500)
        labelled = read_labels(write(data, row | {"label": 1}), "pointwise")
        rows += [line.rows[0] for line in reward_lines(labelled, "pointwise", tokenizer, BIG)[0]]
        rows.append(stored_turns(read_outcomes(write(data, row | {"reward": 1.0}))[0], tokenizer))
    shown = {"|".join(tokenizer.decode(ids, skip_special_tokens=False) for ids in (r.prompt, r.response)) for r in rows}
    assert shown == {wanted}


def test_stored_completions_of_one_prompt_share_it_with_and_without_thoughts(tmp_path):
    tokenizer = chat_tokenizer(OPENS_THOUGHTS)
    sampled = tokenizer.encode("t</think>a<end>")
    lines = [{"completion": THOUGHT}, {"completion": "a"}, {"completion": "t</think>a", "completion_tokens": sampled}]
    lines.append({"completion": "<think>\nwell", "finish_reason": "length"})
    found = read_outcomes(write(tmp_path / "data.jsonl", *({"prompt": [Q], "reward": 1.0} | line for line in lines)))
    turns = [stored_turns(line, tokenizer) for line in found]
    assert turns[2].response == sampled
    share_prompt(turns)
    texts = [tokenizer.decode(turn.response, skip_special_tokens=False) for turn in turns]
    assert [tokenizer.decode(turn.prompt, skip_special_tokens=False) for turn in turns] == [PAIR[0]] * 4
    thought = "<think>\nt</think>a<end>"
    assert texts == [thought, "a<end>", thought, "<think>\nwell"]


def test_tokens_beside_a_completion_are_learned_as_they_are(tmp_path):
    row = {"prompt": "q", "completion": "a", "completion_tokens": chat_tokenizer().encode("a<|eos|>")}
    assert rows_of(tmp_path, row) == [[("q", False), ("a<|eos|>", True)]]
    with pytest.raises(InputError, match=r"^[^:]*, line 1: its tokens spell 'a' and not 'b'"):
        rows_of(tmp_path, row | {"completion": "b"})


def test_a_demonstration_keeps_only_what_is_learned_from():
    row = {"prompt": "q", "completion": "a", "source": "x", "messages": None}
    assert demonstration(row, "here") == {"prompt": "q", "completion": "a", "format": "prompt and completion"}


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A sampler that keeps the prompts and draws nothing but the stop token."""

    def generate(self, prompts, params, progress=None):
        self.prompts = prompts
        return [[Completion([256], [0.0], "stop")] for _ in prompts]


def prompts_of(examples: list[dict]) -> list[str]:
    sampler, tokenizer = Recorder(), chat_tokenizer()
    sample(sampler, tokenizer, examples, SamplingParams(n=1, stop_ids=(256,)))
    return [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in sampler.prompts]


def test_tools_and_system_of_a_task_reach_the_template_and_its_rewards(tmp_path):
    parts = [Q | {"content": [{"type": "text", "text": "q"}]}]
    rows = [
        {"prompt": parts, "tools": json.dumps([ADD["function"]]), "answer": "1"},
        {"prompt": [Q], "tools": None, "system": "s", "answer": "2"},
    ]
    task = load_task(write(tmp_path / "data.jsonl", *rows), heldout_fraction=0)
    assert [example["tools"] for example in task.train] == [[ADD], None]
    tools = "<tools>" + json.dumps([ADD]) + "\n"
    assert prompts_of(task.train) == [tools + PAIR[0], SYSTEM[0]]
    seen = []

    def reward(prompts, completions, tools, **columns):
        seen.extend(tools)
        return [1.0 for _ in completions]

    rollout = sample(Recorder(), chat_tokenizer(), task.train, SamplingParams(n=1, stop_ids=(256,)))
    score_rollout(rollout, {"seen": (1.0, reward)})
    assert seen == [[ADD], None]


@pytest.mark.parametrize("column", [{"tools": [ADD]}, {"system": "s"}, {"system_prompt": "s"}])
def test_what_only_a_template_can_write_is_refused_beside_a_text(column, tmp_path):
    data = write(tmp_path / "data.jsonl", {"prompt": "q", **column})
    with pytest.raises(InputError, match=f"line 1: '{next(iter(column))}' is written by a chat template.*style=chat"):
        load_task(data, heldout_fraction=0)
    [prompt] = prompts_of(load_task(data, style="chat", heldout_fraction=0).train)
    assert prompt.endswith(PAIR[0]) and len(prompt) > len(PAIR[0])


def test_the_column_that_may_be_the_prompt_is_named(tmp_path):
    for name in ("question", "messages", "conversations"):
        data = write(tmp_path / "data.jsonl", {"id": 1, name: [Q]})
        with pytest.raises(InputError, match=f"name the column by prompt_column={name}"):
            load_task(data)
        assert load_task(data, prompt_column=name, heldout_fraction=0).train[0]["prompt"] == [Q]


def test_equal_prompts_with_different_tools_are_different_problems():
    other = ADD | {"function": ADD["function"] | {"name": "subtract"}}
    keys = {prompt_key({"prompt": [Q], "tools": tools}) for tools in (None, [ADD], [other])}
    assert len(keys) == 3 and prompt_key({"prompt": [Q]}) in keys


def test_tools_beside_a_text_prompt_or_for_a_template_without_them_are_refused():
    with pytest.raises(InputError, match="this prompt is a text: give messages"):
        chat_tokenizer().prompt_ids("q", [ADD])
    with pytest.raises(InputError, match="does not write tools"):
        chat_tokenizer(LAST_THOUGHTS).prompt_ids([Q], [ADD])
