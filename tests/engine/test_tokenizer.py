"""The tokenizer against small tokenizers built here, and against transformers where it is installed."""

import json
import subprocess
import sys

import pytest
import tokenizers
from helpers import END, PAD, START, byte_level, write_folder
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, processors

from minirl.errors import InputError
from minirl.tokenizer import Tokenizer

USER = [{"role": "user", "content": "What is 3 + 4?"}]
TALK = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Größe? 你好 \t"},
    {"role": "assistant", "content": "  Seven.\n"},
    {"role": "user", "content": 'Say "7".'},
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content.strip('\\n') }}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{% if not date_string is defined %}
    {% set date_string = strftime_now("%Y") %}
{% endif %}
Today: {{ date_string }}
{% for message in messages %}
    <|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}
{% endfor %}
{{ messages | tojson(indent=2) }}"""
TEMPLATES = {"smollm2": SMOLLM2, "qwen": QWEN, "llama3": LLAMA3}


CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": START,
    "eos_token": {"content": END, "lstrip": False},
    "pad_token": PAD,
}


@pytest.fixture
def chat_folder(tmp_path):
    return write_folder(tmp_path / "chat", tokenizer_config={**CONFIG, "chat_template": SMOLLM2})


# --- reading a folder ------------------------------------------------------------------------------------------------


def test_special_tokens_are_read_as_text_or_as_objects(chat_folder):
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (257, 258, 259)
    assert tokenizer.vocab_size == 260
    assert tokenizer.special_tokens == {"bos_token": START, "eos_token": END, "pad_token": PAD}


def test_special_tokens_map_fills_what_the_configuration_leaves_open(tmp_path):
    folder = write_folder(
        tmp_path, tokenizer_config={"eos_token": END}, special_tokens_map={"eos_token": PAD, "pad_token": PAD}
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 258, 259)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [258, 259, 258]}, {"eos_token_id": 1}, (258, 259)),
        ({"eos_token_id": 259}, {"eos_token_id": 1}, (259, 258)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, (0, 258)),
        ({}, {"eos_token_id": [7, 8]}, (7, 8, 258)),
        ({"eos_token_id": None}, {}, (258,)),
        (None, None, (258,)),
    ],
)
def test_stop_ids_are_those_of_the_model_and_the_eos_token(tmp_path, generation, config, expected):
    files = {
        name: content
        for name, content in (("generation_config", generation), ("config", config))
        if content is not None
    }
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, tokenizer_config=CONFIG, **files))
    assert tokenizer.stop_ids == expected
    assert tokenizer.eos_id == 258


def test_a_folder_that_names_no_eos_token_takes_the_first_stop_id(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, config={"eos_token_id": [5, 6]}))
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.stop_id) == (5, (5, 6), 5)


def test_a_folder_without_any_configuration_still_encodes(tmp_path):
    tokenizer = Tokenizer.from_pretrained(str(write_folder(tmp_path)))
    assert tokenizer.decode(tokenizer.encode("Größe us")) == "Größe us"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (None, None, None, ())
    with pytest.raises(InputError, match="names no stop token: give eos_token_id"):
        _ = tokenizer.stop_id


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_cut_prompts(tmp_path):
    backend = byte_level(START)
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, backend))
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert len(tokenizer.encode("a")) == 1


def test_vocabulary_size_reaches_the_largest_id_over_holes(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    content = json.loads(backend.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [{"id": 9, "content": "<x>", "special": True, **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<x>")[0] < tokenizer.vocab_size


# --- encoding and decoding -------------------------------------------------------------------------------------------


def test_special_tokens_are_whole_ids_and_are_left_out_of_the_text(chat_folder):
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    ids = tokenizer.encode(f"{START}us{END}")
    assert ids == [257, 256, 258]
    assert tokenizer.decode(ids) == "us"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{START}us{END}"


def test_a_named_token_is_special_even_if_it_stands_in_the_plain_vocabulary(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, byte_level(), tokenizer_config={"eos_token": "us"}))
    assert tokenizer.decode(tokenizer.encode("bus")) == "b"


def test_tokenizer_that_adds_bos_adds_it_to_text_prompts_once_and_to_chats_never(tmp_path):
    backend = byte_level(START, END, PAD)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 257), (END, 258)]
    )
    folder = write_folder(tmp_path, backend, tokenizer_config={**CONFIG, "chat_template": LLAMA3})
    tokenizer = Tokenizer.from_pretrained(folder)
    us = tokenizer.encode("us")
    assert us == [256]
    assert tokenizer.encode("us", add_special_tokens=True) == [257, 256, 258]
    assert tokenizer.prompt_ids("us") == [257, 256]
    assert tokenizer.prompt_ids(f"{START}us") == [257, 256]
    assert tokenizer.chat(USER).count(257) == 1


def test_chat_encodes_the_rendered_text(chat_folder):
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    ids = tokenizer.chat(USER)
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render(USER)
    assert tokenizer.render(USER).endswith(f"3 + 4?{END}\n{START}assistant\n")
    assert tokenizer.render(USER, add_generation_prompt=False).endswith(f"3 + 4?{END}\n")
    assert tokenizer.prompt_ids(USER) == ids
    assert tokenizer.prompt_ids("us") == tokenizer.encode("us")


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_the_same(tmp_path):
    config = {**CONFIG, "chat_template": QWEN, "model_max_length": 77}
    folder = write_folder(tmp_path / "a", tokenizer_config=config, config={"eos_token_id": [258, 259]})
    first = Tokenizer.from_pretrained(folder)
    first.save_pretrained(tmp_path / "b" / "c")
    second = Tokenizer.from_pretrained(tmp_path / "b" / "c")
    assert second.chat(TALK) == first.chat(TALK)
    assert (second.stop_ids, second.bos_id, second.eos_id, second.pad_id) == ((258, 259), 257, 258, 259)
    assert json.loads((tmp_path / "b/c/tokenizer_config.json").read_text())["model_max_length"] == 77


@pytest.mark.parametrize(("there", "kept"), [({"eos_token_id": 3}, 3), ({"temperature": 0.5}, 258), (None, 258)])
def test_saving_keeps_stop_ids_and_settings_that_the_folder_has(tmp_path, chat_folder, there, kept):
    target = write_folder(tmp_path / "target", **({"generation_config": there} if there else {}))
    Tokenizer.from_pretrained(chat_folder).save_pretrained(target)
    saved = json.loads((target / "generation_config.json").read_text())
    assert saved == {**(there or {}), "eos_token_id": kept}


@pytest.mark.parametrize("eos", [[258, 7], 258])
def test_how_other_engines_sample_goes_where_the_tokenizer_goes(tmp_path, eos):
    generation = {"eos_token_id": eos, "temperature": 0.6, "top_p": 0.95, "do_sample": True, "pad_token_id": 259}
    folder = write_folder(tmp_path / "start", tokenizer_config={"eos_token": END}, generation_config=generation)
    for i in range(2):  # a checkpoint, and one of a run that starts from there
        Tokenizer.from_pretrained(folder).save_pretrained(folder := tmp_path / f"run{i}")
    assert json.loads((folder / "generation_config.json").read_text()) == generation


def test_a_template_set_by_hand_is_saved_over_one_in_a_file_of_its_own(tmp_path, chat_folder):
    (chat_folder / "chat_template.jinja").write_text("old {{ messages[0].content }}")
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    assert tokenizer.render(USER) == "old What is 3 + 4?"
    tokenizer.chat_template = "new {{ messages[0].content }}"
    tokenizer.save_pretrained(chat_folder)
    assert Tokenizer.from_pretrained(chat_folder).render(USER) == "new What is 3 + 4?"


@pytest.mark.parametrize(
    "entries",
    [[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], [{"name": "x", "template": "d"}]],
)
def test_the_default_of_several_templates_is_for_chat(tmp_path, entries):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, tokenizer_config={"chat_template": entries}))
    assert tokenizer.chat_template == "d"
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == entries


# --- characters ------------------------------------------------------------------------------------------------------

ALPHABET = "0123456789+-= \n?é你ab<e>"


@given(st.text(ALPHABET))
def test_characters_round_trip(text):
    tokenizer = Tokenizer.from_chars(ALPHABET)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if "<" not in text:
        assert ids == [3 + ALPHABET.index(character) for character in text]


def test_the_size_of_a_vocabulary_with_holes_is_one_more_than_its_largest_id():
    """A hole in the vocabulary itself, not one below an added token; its count would leave out token 9."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert Tokenizer(backend, {}).vocab_size == 10
    backend.add_tokens(["c"])
    assert Tokenizer(backend, {}).vocab_size == 1 + max(backend.get_vocab().values())


def test_characters_have_three_special_tokens_in_front():
    tokenizer = Tokenizer.from_chars("abca")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, 2, (2,))
    assert tokenizer.vocab_size == 6
    assert tokenizer.prompt_ids("cab") == [5, 3, 4]
    assert tokenizer.decode([1, 5, 2, 0]) == "c"
    assert tokenizer.encode("a<eos>") == [3, 2]


@pytest.mark.parametrize(
    ("text", "named"), [("12x4", "'x' (at 2"), ("\t", "'\\t' (at 0"), ("1\ud8002", "'\\ud800' (at 1")]
)
def test_a_character_outside_the_alphabet_is_an_error_that_names_it(text, named, tmp_path):
    tokenizer = Tokenizer.from_chars("0123456789")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, Tokenizer.from_pretrained(tmp_path)):
        with pytest.raises(InputError) as error:
            each.encode(text)
        assert f"no token for {named}" in str(error.value)


def test_an_empty_alphabet_is_an_error():
    with pytest.raises(InputError, match="alphabet"):
        Tokenizer.from_chars("")


def test_transformers_reads_a_saved_character_tokenizer_with_equal_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_chars(ALPHABET)
    tokenizer.save_pretrained(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("1+2= 3\n?", "é你 ab", "a<eos>b", " <e> ", ""):
        ids = tokenizer.encode(text)
        assert peer(text)["input_ids"] == ids
        assert peer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (peer.pad_token_id, peer.bos_token_id, peer.eos_token_id, len(peer)) == (0, 1, 2, tokenizer.vocab_size)


def test_transformers_reads_a_saved_byte_level_tokenizer_with_equal_ids(tmp_path, chat_folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = peer(peer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    assert tokenizer.chat(TALK, add_generation_prompt=False) == ids
    assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (257, 258, 259)


# --- chat templates --------------------------------------------------------------------------------------------------


def with_template(template: str) -> Tokenizer:
    tokenizer = Tokenizer.from_chars(ALPHABET)
    tokenizer.chat_template = template
    return tokenizer


def test_smollm2_template_text():
    assert with_template(SMOLLM2).render(USER) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_template_text():
    tool = {"name": "größer", "html": "<a> & 'b'"}
    assert with_template(QWEN).render(TALK[1:], enable_thinking=False, tools=[tool]) == (
        '<|im_start|>system\n# Tools\n{"name": "größer", "html": "<a> & \'b\'"}<|im_end|>\n'
        "<|im_start|>user\nGröße? 你好 \t<|im_end|>\n<|im_start|>assistant\n  Seven.<|im_end|>\n"
        '<|im_start|>user\nSay "7".<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'
    )


def test_template_reads_special_tokens_and_trims_blocks():
    text = with_template(LLAMA3).render(USER, date_string="26 Jul")
    assert text.startswith("<bos>\nToday: 26 Jul\n    <|user|>What is 3 + 4?<eos>\n[\n  {\n")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("messages", [USER, TALK], ids=["user", "talk"])
@pytest.mark.parametrize("generation", [False, True], ids=["closed", "open"])
def test_templates_render_as_in_transformers(tmp_path, template, messages, generation):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(template)
    tokenizer.save_pretrained(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "größer", "description": "<a> & b"}}]
    for options in ({}, {"tools": tools}, {"enable_thinking": False}):
        expected = peer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False, **options)
        assert tokenizer.render(messages, generation, **options) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template):
    with pytest.raises(InputError, match="reaches for Python's internals"):
        with_template(template).render(USER)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% set _ = messages.append(1) %}", "the method list.append"),
        ("{{ 'a'.encode() }}", "the method str.encode"),
        ("\n{{ 'a' | striptags }}", "the filter 'striptags'"),
        ("{% if true %}{{ 'a' | striptags }}{% endif %}", "the filter 'striptags'"),
        ("{{ ['a'] | map('striptags') | list }}", "the filter 'striptags'"),
        ("{{ 1 is odious }}", "the test 'odious'"),
    ],
)
def test_what_a_template_is_not_given_is_named(template, what):
    said = f"the chat template asks for {what}, which is not among those that minirl gives templates"
    with pytest.raises(InputError, match=said):
        with_template(template).render(USER)


def test_a_template_sees_plain_values_only():
    class Loud(str):
        def shout(self):
            return "escaped"

    tokenizer = with_template("{{ messages[0].content.shout is defined }}")
    assert tokenizer.render([{"role": "user", "content": Loud("hi")}]) == "False"
    with pytest.raises(InputError, match="plain JSON"):
        tokenizer.render([{"role": "user", "content": [object()]}])


def test_a_template_that_refuses_says_why():
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the first turn must be the user\\'s') }}{% endif %}"
    )
    with pytest.raises(InputError, match="the first turn must be the user's"):
        with_template(template).render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 | }}", "{% generation %}"])
def test_a_broken_template_is_an_error(template):
    with pytest.raises(InputError, match=r"not valid Jinja.*line 1"):
        with_template(template).render(USER)


def test_a_template_that_trips_over_its_messages_is_an_error():
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    with pytest.raises(InputError, match=r"cannot render these messages.*TypeError"):
        with_template("{{ messages[0].content + '' }}").render([message])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_without_a_template_chat_says_so(tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer.from_chars("ab").chat(USER)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {"role": "user", "content": "x"},
        7,
        ["x"],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 4}],
        [{"role": "user", "text": "x"}],
        [{"role": 1, "content": "x"}],
    ],
)
def test_malformed_messages_are_an_error(messages):
    with pytest.raises(InputError, match=r"role|content"):
        with_template(SMOLLM2).prompt_ids(messages)


def test_a_folder_without_tokenizer_json_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b'{"a": ', b"\xff{}", b"[]"])
def test_broken_json_is_an_error_that_names_the_file(tmp_path, name, content):
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"\xff{{ messages }}", b"\xff\xfea"])
def test_a_template_that_is_no_text_is_an_error(tmp_path, content):
    (write_folder(tmp_path) / "chat_template.jinja").write_bytes(content)
    with pytest.raises(InputError, match=r"chat_template\.jinja is no text in UTF-8"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_link_to_nowhere_is_no_missing_file(tmp_path):
    (write_folder(tmp_path) / "tokenizer_config.json").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"tokenizer_config\.json does not exist"):
        Tokenizer.from_pretrained(tmp_path)


def test_json_that_is_no_tokenizer_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "telepathy"}}')
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer_config": {"pad_token": "<nowhere>"}}, "pad_token.*<nowhere>"),
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}},
            "default",
        ),
        ({"tokenizer_config": {"chat_template": [1]}}, "chat_template"),
        ({"tokenizer_config": {"chat_template": [{"name": 1, "template": ""}, {"name": "b", "template": ""}]}}, "1.*b"),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": 5}]}}, "chat_template"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "<a>"}}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<a>"]}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: "<a>"}}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"additional_special_tokens": 5}}, "additional_special_tokens"),
        ({"tokenizer_config": {"additional_special_tokens": ["\udcff"]}}, "additional_special_tokens"),
        ({"generation_config": {"eos_token_id": [2**40]}}, "generation_config.json"),
        ({"generation_config": {"eos_token_id": "2"}}, "generation_config.json"),
        ({"config": {"eos_token_id": [True]}}, "config.json"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(tmp_path, files, named):
    with pytest.raises(InputError, match=named):
        Tokenizer.from_pretrained(write_folder(tmp_path, **files))


def test_only_text_is_encoded():
    with pytest.raises(InputError, match="only text"):
        Tokenizer.from_chars("ab").encode(["a"])


def test_without_jinja2_chat_names_the_extra_and_the_rest_works():
    script = """
import sys
sys.modules["jinja2"] = None
from minirl.tokenizer import Tokenizer
tokenizer = Tokenizer.from_chars("ab")
assert tokenizer.encode("ab") == [3, 4]
tokenizer.chat_template = "{{ messages }}"
try:
    tokenizer.chat([{"role": "user", "content": "a"}])
except ValueError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("InputError"), done.stderr
    assert "pip install 'minirl[cli]'" in done.stdout
