"""Turns of a conversation: where they end, how an unfinished one goes on, and what goes into every prompt."""

import json
from dataclasses import fields
from datetime import datetime

import pytest
import torch
from helpers import ALPHABET, END, PAD, START, byte_level, tiny_checkpoint, tiny_model, write_folder
from safetensors.torch import load_file

from minirl.errors import InputError
from minirl.examples import demonstration_rows, response_turns
from minirl.judge.answers import last_number, think_answer_format
from minirl.lab import cli
from minirl.lab.tasks import load_task
from minirl.lab.training import train_sft
from minirl.policy import load
from minirl.reward_model import RewardModel
from minirl.rewards import score_rollout
from minirl.rollout import Rollout, completion_text, sample
from minirl.run import Display
from minirl.sampler import Completion, Sampler, SamplingParams
from minirl.sft import SFTConfig
from minirl.stored import _turns
from minirl.tokenizer import Tokenizer, check_messages
from minirl.turns import spelled_tokens, step_ends

# Small templates, each with one habit of a real one.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
EMPTY_THOUGHTS = (  # before an answer without thoughts; the generation prompt has them on request
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DROPS_THOUGHTS = (  # and opens them in the generation prompt
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
DOCUMENT_END = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
NEXT_TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DATED = "{{ strftime_now('%d+%m') }}={% for m in messages %}{{ m.content }}{% endfor %}"
OPENS_THOUGHTS = EMPTY_THOUGHTS.replace(
    "</think>\n\n{% endif %}{% endif %}", "</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
TEMPLATES = {
    "opens": OPENS_THOUGHTS,
    "chatml": CHATML,
    "trims": TRIMS,
    "thoughts": EMPTY_THOUGHTS,
    "drops": DROPS_THOUGHTS,
    "inst": NO_SYSTEM,
}

ASK = {"role": "user", "content": "2+5?"}
FIRST, TURN, DOCUMENT = 257, 258, 259  # ids of START, END and PAD


def chat_tokenizer(folder, template=None, stops=None, *special: str, **config) -> Tokenizer:
    config = {"eos_token": PAD, **({"chat_template": template} if template else {}), **config}
    files = {"generation_config": {"eos_token_id": stops}} if stops is not None else {}
    return Tokenizer.from_pretrained(
        write_folder(folder, byte_level(START, END, PAD, *special), tokenizer_config=config, **files)
    )


# --- the end of a turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "stops", "eos", "taught", "known"),
    [
        (CHATML, [DOCUMENT, 3, TURN], END, TURN, (DOCUMENT, 3, TURN)),  # Llama 3: the first is never drawn
        (CHATML, [0, TURN], END, TURN, (0, TURN)),  # SmolLM2
        (CHATML, DOCUMENT, PAD, TURN, (DOCUMENT, TURN)),  # a base model whose files do not name the end of a turn
        (CHATML, DOCUMENT, END, TURN, (DOCUMENT, TURN)),
        (DOCUMENT_END, [DOCUMENT, TURN], PAD, TURN, (DOCUMENT, TURN)),  # Phi 3 closes the conversation, too
        (TRIMS, [TURN], PAD, TURN, (TURN, DOCUMENT)),
        (EMPTY_THOUGHTS, [TURN, DOCUMENT], PAD, TURN, (TURN, DOCUMENT)),
        (NO_SYSTEM, [DOCUMENT, TURN], END, TURN, (DOCUMENT, TURN)),
        (NEXT_TURN, [DOCUMENT, FIRST], PAD, FIRST, (DOCUMENT, FIRST)),  # GLM 4: the next turn ends the last one
        (NEXT_TURN, [DOCUMENT], PAD, DOCUMENT, (DOCUMENT,)),
        (NO_END, [TURN, DOCUMENT], PAD, DOCUMENT, (TURN, DOCUMENT)),
        ("{{ raise_exception('no') }}", [TURN, DOCUMENT], PAD, DOCUMENT, (TURN, DOCUMENT)),
        (None, [TURN, DOCUMENT], PAD, DOCUMENT, (TURN, DOCUMENT)),
        (None, [TURN], PAD, DOCUMENT, (TURN, DOCUMENT)),
    ],
)
def test_the_template_says_with_what_a_turn_ends(template, stops, eos, taught, known, tmp_path):
    tokenizer = chat_tokenizer(tmp_path, template, stops, bos_token=START if taught != FIRST else PAD, eos_token=eos)
    assert (tokenizer.stop_id, tokenizer.stop_ids) == (taught, known)


def test_every_kind_of_training_data_ends_with_the_end_of_a_turn(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, CHATML, [DOCUMENT, 3, TURN])
    (row,) = demonstration_rows(tokenizer, [{"prompt": [ASK], "completion": "7"}], 256)
    assert row.response == [*tokenizer.encode("7"), TURN]
    line = {"prompt": [ASK], "completion": "7", "where": "line 1"}
    assert [t.response for t in response_turns(tokenizer, line, ["7"], None)] == [[*tokenizer.encode("7"), TURN]]
    assert _turns(line, tokenizer).response == [*tokenizer.encode("7"), TURN]
    scored = []
    judge = RewardModel(tiny_model(vocab_size=260), tokenizer)
    judge.score = lambda prompts, completions: scored.extend(completions)
    judge(prompts=[[ASK]], completions=["7"])
    assert list(scored[0]) == [*tokenizer.encode("7"), TURN]


def test_a_template_set_by_hand_decides_at_once(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, None, [DOCUMENT, TURN])
    assert tokenizer.stop_id == DOCUMENT
    tokenizer.chat_template = CHATML
    assert tokenizer.stop_id == TURN


# --- stop texts and special tokens in a text -------------------------------------------------------------------------


def test_a_stop_text_that_is_a_special_token_stops():
    tokenizer, model = Tokenizer.from_chars(ALPHABET), tiny_model(vocab_size=20)
    sampler = Sampler(model, tokenizer=tokenizer)
    prompt = [[*tokenizer.encode("1+2="), 1]]  # a stop text in the prompt stops nothing
    free = SamplingParams(n=16, max_tokens=24, seed=3)
    stopping = SamplingParams(n=16, max_tokens=24, seed=3, stop=("<bos>", "="))
    ends = {1, *tokenizer.encode("=")}
    kinds = set()
    for whole, cut in zip(sampler.generate(prompt, free)[0], sampler.generate(prompt, stopping)[0], strict=True):
        at = next((i + 1 for i, token in enumerate(whole.tokens) if token in ends), None)
        assert cut.tokens == whole.tokens[:at]
        assert cut.finish_reason == ("length" if at is None else "stop")
        said = [token for token in cut.tokens if token > 2 and token not in ends]
        assert completion_text(tokenizer, cut, stopping) == tokenizer.decode(said)
        kinds.add(cut.tokens[-1] if at else None)
    assert {1, *tokenizer.encode("=")} <= kinds


@pytest.fixture
def thinker(tmp_path):
    return chat_tokenizer(
        tmp_path, CHATML, [TURN], "<think>", "</think>", "<answer>", "</answer>", "<step>", bos_token=START
    )


def test_tags_that_are_special_tokens_reach_rewards_and_named_tokens_do_not(thinker):
    text = "<think>a</think><answer>1</answer>"
    ids = thinker.encode(text)
    assert len(ids) == 6
    tokens = [START_ID := FIRST, *ids, TURN]
    params = SamplingParams(stop_ids=(TURN,))
    assert completion_text(thinker, Completion(tokens), params) == text
    assert completion_text(thinker, Completion([*ids, START_ID, DOCUMENT]), SamplingParams()) == text
    seen = completion_text(thinker, Completion(tokens), params)
    assert think_answer_format(["p"], [seen]) == [1.0]
    stop = SamplingParams(stop=("</answer>",))
    assert completion_text(thinker, Completion(ids), stop) == text.removesuffix("</answer>")
    assert completion_text(thinker, Completion([FIRST, *ids]), stop) == text.removesuffix("</answer>")


def test_stored_texts_are_spelled_by_their_tokens_with_or_without_special_ones(thinker):
    ids = thinker.encode("<think>a</think>1")
    for text in ("<think>a</think>1", "a1"):
        assert list(spelled_tokens(thinker, text, [*ids, TURN], "line 1")) == [*ids, TURN]
    with pytest.raises(InputError, match="of another tokenizer"):
        spelled_tokens(thinker, "<answer>a1", ids, "line 1")


def test_a_separator_of_steps_may_be_a_special_token(thinker):
    assert step_ends(thinker, thinker.encode("ab<step>c<step>"), "<step>") == [2, 4]


def test_a_step_ends_at_the_token_of_its_last_character_also_behind_special_tokens(thinker):
    ids = thinker.encode("<think>a</think>1")
    rollout = Rollout([{"prompt": "p"}], [[1]], [Completion(ids)], [thinker.shown(ids)])
    rollout.parts, rollout.steps = {"r": [1.0]}, {"r": [[(len("<think>a"), 1.0)]]}
    rollout.weights = {"r": 1.0}
    values, _ = rollout.step_rewards(thinker)
    assert values.tolist() == [[0, 1, 0, 0]]


def test_special_tokens_that_only_the_configuration_knows_are_whole(tmp_path):
    listed = {"260": {"content": "<a>", "special": True}, "261": {"content": "<b>", "special": False}}
    tokenizer = chat_tokenizer(
        tmp_path,
        added_tokens_decoder=listed,
        additional_special_tokens=["<c>", {"content": "<d>", "lstrip": False}],
        extra_special_tokens={"image_token": "<e>"},
    )
    assert tokenizer.encode("<a>us<b><c><d><e>") == [260, 256, 261, 262, 263, 264]
    assert tokenizer.decode([260, 256, 261, 262]) == "us<b>"
    with pytest.raises(InputError, match=r"gives '<a>' the id 300, and tokenizer.json 260"):
        chat_tokenizer(tmp_path, added_tokens_decoder={"300": {"content": "<a>", "special": True}})


def test_a_named_token_that_is_added_but_not_marked_is_special(tmp_path):
    backend = byte_level()
    backend.add_tokens([END])
    folder = write_folder(tmp_path, backend, tokenizer_config={"eos_token": END})
    assert Tokenizer.from_pretrained(folder).decode([256, 257]) == "us"


class Said:
    """A sampler that says what it is told."""

    def __init__(self, *texts: list[int]):
        self.texts = texts

    def generate(self, prompts, params, progress=None):
        return [[Completion(list(text)) for text in self.texts] for _ in prompts]


@pytest.mark.parametrize("words", [None, "<think>", "<think>\nWell, "])
def test_thoughts_that_the_prompt_opens_and_that_never_end_hold_no_answer(words, tmp_path):
    tokenizer = chat_tokenizer(tmp_path, DROPS_THOUGHTS if words is None else CHATML, [TURN])
    prompt = [ASK, *([] if words is None else [{"role": "assistant", "content": words}])]
    texts = ["so 7", "8?\n</think>\n\n7", "7</think> 8"]
    sampler = Said(*(tokenizer.encode(text) for text in texts))
    example = {"prompt": prompt, "answer": "7"}
    rollout = sample(sampler, tokenizer, [example], SamplingParams(n=3))
    score_rollout(rollout, {"correct": (1.0, last_number)})
    assert rollout.texts == texts and rollout.rewards.tolist() == [0, 1, 0]
    ends = {"lines": (1.0, lambda completions, **_: [[(len(c), 1.0)] for c in completions])}
    score_rollout(rollout, ends, in_steps=True)
    assert rollout.steps["lines"] == [[(len(text), 1.0)] for text in texts]
    plain = sample(
        sampler, tokenizer, [{"prompt": [{**ASK, "content": "use <think>"}], "answer": "7"}], SamplingParams()
    )
    score_rollout(plain, {"correct": (1.0, last_number)})
    assert plain.rewards[0] == (0 if words is None else 1)


def test_a_reward_model_reads_a_completion_whose_thoughts_never_end(thinker):
    ids = thinker.encode("so 7")
    assert list(spelled_tokens(thinker, "<think>so 7", ids, "line 1")) == ids


# --- unfinished turns ------------------------------------------------------------------------------------------------

OPEN = "Step by step.\n<think>"
CLOSED = "<think>\nr\n</think>\n\nIt is "
HEADS = {  # what stands before the assistant's words
    "opens": "<|im_start|>user\n2+5?<|im_end|>\n<|im_start|>assistant\n",
    "chatml": "<|im_start|>user\n2+5?<|im_end|>\n<|im_start|>assistant\n",
    "trims": "<|im_start|>user\n2+5?<|im_end|>\n<|im_start|>assistant\n",
    "thoughts": "<|im_start|>user\n2+5?<|im_end|>\n<|im_start|>assistant\n",
    "drops": "2+5?<|im_start|>",
    "inst": "[INST] 2+5? [/INST] ",
}


def test_a_template_that_opens_thoughts_does_so_for_a_question_alone(tmp_path):
    assert chat_tokenizer(tmp_path, OPENS_THOUGHTS).render([ASK]) == HEADS["opens"] + "<think>\n"


@pytest.mark.parametrize("words", [OPEN, CLOSED, "", "2+5?", "<|im_end|>"])
@pytest.mark.parametrize("name", HEADS)
def test_a_conversation_that_ends_with_the_assistant_is_continued(name, words, tmp_path):
    tokenizer = chat_tokenizer(tmp_path, TEMPLATES[name])
    talk = [ASK, {"role": "assistant", "content": words}]
    assert tokenizer.render(talk) == HEADS[name] + words
    assert tokenizer.prompt_ids(talk) == tokenizer.encode(HEADS[name] + words)
    talk[1]["content"] = [{"type": "text", "text": words[:3]}, {"type": "text", "text": words[3:]}]
    if name == "chatml":
        assert tokenizer.render(talk) == HEADS[name] + words


def test_a_finished_conversation_is_closed_and_a_question_opens_a_turn(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    talk = [ASK, {"role": "assistant", "content": "7"}]
    assert tokenizer.render(talk, add_generation_prompt=False) == HEADS["chatml"] + "7<|im_end|>\n"
    assert tokenizer.render([ASK]) == HEADS["chatml"]


def test_empty_thoughts_that_were_asked_for_stay_before_an_unfinished_turn(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, EMPTY_THOUGHTS)
    tokenizer.prompt_with({"enable_thinking": False})
    talk = [ASK, {"role": "assistant", "content": "It is"}]
    assert tokenizer.render(talk) == HEADS["thoughts"] + "<think>\n\n</think>\n\nIt is"
    for words in (CLOSED, "<think>\n"):  # a turn with thoughts of its own has no empty ones before
        assert tokenizer.render([ASK, {"role": "assistant", "content": words}]) == HEADS["thoughts"] + words


@pytest.mark.parametrize(
    "template, last, why",
    [
        (CHATML, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, "no text to go on from"),
        (CHATML, {"role": "assistant", "content": [{"type": "image"}]}, "no text to go on from"),
        ("{{ messages[0].content }}", {"role": "assistant", "content": "x"}, "does not show the assistant's last"),
    ],
)
def test_a_turn_that_cannot_be_continued_is_named(template, last, why, tmp_path):
    with pytest.raises(InputError, match=why):
        chat_tokenizer(tmp_path, template).prompt_ids([ASK, last])


def test_prompts_are_what_a_template_takes(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    check_messages([ASK, call, {"role": "tool", "content": "7"}])
    check_messages([{"role": "user", "content": [{"type": "text", "text": "q"}]}])
    check_messages([{"role": "system", "content": ""}, ASK])
    for wrong in ([], [{"role": "user", "content": None}], 7):
        with pytest.raises(InputError, match="message"):
            check_messages(wrong)
    template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{{ messages[0].content }}"
    tokenizer = chat_tokenizer(tmp_path, template)
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert tokenizer.prompt_ids([ASK], tools=tools) == tokenizer.encode("add;2+5?")
    assert tokenizer.prompt_ids([ASK]) == tokenizer.encode("2+5?")


# --- system message and template variables ---------------------------------------------------------------------------


def test_a_system_message_goes_first_where_there_is_none(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    tokenizer.prompt_with({}, "Be brief.")
    brief = {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "Be kind."}, ASK]
    rendered = [tokenizer.render(talk) for talk in ([ASK], [brief, ASK], own)]
    assert rendered[0] == rendered[1] == "<|im_start|>system\nBe brief.<|im_end|>\n" + HEADS["chatml"]
    assert "kind" in rendered[2] and "brief" not in rendered[2]
    tokenizer.prompt_with({}, "")  # an empty one is one: it keeps a template from writing its own
    assert tokenizer.render([ASK]) == "<|im_start|>system\n<|im_end|>\n" + HEADS["chatml"]
    with pytest.raises(InputError, match="a text cannot be given a system message"):
        tokenizer.prompt_ids("2+5?")
    with pytest.raises(InputError, match="refuses these messages: no system turn"):
        tokenizer = chat_tokenizer(tmp_path, NO_SYSTEM)
        tokenizer.prompt_with({}, "Be brief.")
        tokenizer.prompt_ids([ASK])


def test_an_empty_system_message_is_one_to_a_task_too(tmp_path):
    talk = [{"role": "system", "content": ""}, ASK]
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": talk, "answer": 7}) + "\n")
    assert load_task(str(tmp_path / "data.jsonl"), heldout_fraction=0).train[0]["prompt"] == talk


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, EMPTY_THOUGHTS)
    with pytest.raises(InputError, match=r"no variable 'enable_thinkin': choose from enable_thinking$"):
        tokenizer.prompt_with({"enable_thinkin": False})
    with pytest.raises(InputError, match="no variable 'messages'"):
        tokenizer.prompt_with({"messages": []})
    bare = chat_tokenizer(tmp_path)
    bare.prompt_with({})
    for variables, system in (({"x": 1}, None), ({}, "Be brief.")):
        with pytest.raises(InputError, match="no chat template"):
            bare.prompt_with(variables, system)
    llama = chat_tokenizer(
        tmp_path,
        "{% if date is not defined %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}{{ messages[0].content }}",
    )
    llama.prompt_with({"date": "26 Jul 2024"})
    assert llama.render([ASK]) == "26 Jul 20242+5?"


WITH_PROMPTS = ("generate", "eval", "sft", "outcomes", "rft", "prefer", "reward", "grpo", "ppo")
NEEDED = {
    "generate": ["--prompts", "1"],
    "eval": ["--task", "arithmetic"],
    "sft": ["--data", "d"],
    "prefer": ["--data", "d"],
    "reward": ["--data", "d"],
}


@pytest.mark.parametrize("command", WITH_PROMPTS)
def test_every_command_takes_template_variables_and_a_system_message(command):
    args = ["--model", "m", *NEEDED.get(command, []), "--system", "", "--template.enable-thinking", "False"]
    more = ["--template.date=26 Jul 2024", "--template.n", "7", "--template.x=null", "--template.year", '"2024"']
    config = cli.parse(command, [*args, *more, "--template.inf", "NaN"])
    assert config.template == {
        "enable_thinking": False,
        "date": "26 Jul 2024",
        "n": 7,
        "x": None,
        "year": "2024",
        "inf": "NaN",
    }
    assert config.system == ""
    assert cli.parse(command, args[:-4]).template == {}


def test_commands_with_prompts_are_those_with_variables():
    kinds = {name: {f.name for f in fields(kind)} for name, (kind, _) in cli.COMMANDS.items()}
    assert {name for name, names in kinds.items() if "template" in names} == set(WITH_PROMPTS)
    assert all("system" in kinds[name] for name in WITH_PROMPTS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", False),
        ("Off", False),
        ("FALSE", False),
        ("yes", True),
        ("on", True),
        ("0", 0),
        ("1", 1),
        ("nope", "nope"),
    ],
)
def test_words_for_yes_and_no_are_booleans_and_numbers_stay_numbers(text, value):
    found = cli.parse("generate", ["--model", "m", "--prompts", "1", "--template.x", text]).template["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "args, why", [(["--template.x"], "--template.x has no value"), (["--template", "x", "1"], "has no name")]
)
def test_a_variable_needs_a_name_and_a_value(args, why):
    with pytest.raises(InputError, match=why):
        cli.parse("generate", ["--model", "m", "--prompts", "1", *args])


@pytest.fixture
def chat_model(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", max_positions=64)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}{{ n }}"
    )
    tokenizer.save_pretrained(folder)
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"prompt": [{"role": "user", "content": f"{i}+1="}], "completion": str(i), "answer": i}) + "\n"
            for i in range(8)
        )
    )
    pairs = [
        {"prompt": [{"role": "user", "content": f"{i}+1="}], "chosen": str(i), "rejected": f"{i}0"} for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.mark.parametrize("command", WITH_PROMPTS)
def test_every_command_renders_its_prompts_with_them(command, chat_model, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    encode, found = Tokenizer.encode, []

    def watched(tokenizer, text, add_special_tokens=False):
        if text.endswith("=24"):
            found.append(text)
            raise Seen
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    monkeypatch.chdir(tmp_path)
    task = ["--task", "data.jsonl:heldout_fraction=0.5"]
    needed = {
        "generate": ["--prompts", "0+1="],
        "sft": ["--data", "data.jsonl"],
        "prefer": ["--data", "pairs.jsonl"],
        "reward": ["--data", "pairs.jsonl"],
    }
    with pytest.raises(Seen):
        told = ["--system", "(3)", "--template.n=24"]
        cli.main([command, "--model", str(chat_model), *needed.get(command, task), *told])
    assert len(found) == 1 and found[0].startswith("(3)")


def test_variables_are_kept_in_a_run_and_may_not_change(chat_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", str(chat_model), "--data", "data.jsonl", "--out", "run", "--batch", "2", "--steps", "1"]
    train_sft(cli.parse("sft", [*args, "--template.n", "24", "--system", "(3)"]), KilledAt(9))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["template"], kept["system"]) == ({"n": 24}, "(3)") and "date" not in kept
    train_sft(cli.parse("sft", ["--resume", "--out", "run"]), KilledAt(9))
    for changed, what in ((["--template.n", "25"], "template.n: 24 -> 25"), (["--system", "(4)"], "system: ")):
        with pytest.raises(InputError, match=what):
            train_sft(cli.parse("sft", ["--resume", "--out", "run", *changed]), KilledAt(9))
    config = cli.parse("sft", ["--resume", "--out", "run"])
    assert load(chat_model, "float32", "cpu", config=config)[1].render([ASK]) == "(3)2+5?24"


# --- the date --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KilledAt(Display):
    def __init__(self, step: int):
        self.step = step

    def line(self, text: str) -> None:
        pass

    def progress(self, stage: str, done: int, total: int) -> None:
        if done == self.step:
            raise Killed


def on_day(monkeypatch, day: int) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 11, day, 23, 59)

    monkeypatch.setattr("minirl.tokenizer.datetime", Clock)


def test_a_run_that_goes_on_the_next_day_keeps_the_date_of_its_start(chat_model, tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(chat_model)

    def config(out: str, **options) -> SFTConfig:
        shared = {"steps": 4, "batch": 4, "save_every": 2, "lr": 1e-2, "warmup": 0, "dtype": "float32"}
        return SFTConfig(str(chat_model), str(tmp_path / "data.jsonl"), out=str(tmp_path / out), **shared, **options)

    on_day(monkeypatch, 12)
    weights = [load_file(train_sft(config("whole"), KilledAt(9)) / "model.safetensors")]
    with pytest.raises(Killed):
        train_sft(config("killed"), KilledAt(3))
    on_day(monkeypatch, 13)
    weights.append(load_file(train_sft(config("killed", resume=True), KilledAt(9)) / "model.safetensors"))
    weights.append(load_file(train_sft(config("later"), KilledAt(9)) / "model.safetensors"))
    same = [all(torch.equal(other[name], t) for name, t in weights[0].items()) for other in weights[1:]]
    assert same == [True, False]  # another date is another prompt
    assert json.loads((tmp_path / "killed" / "config.json").read_text())["date"] == "2026-11-12T23:59:00"
    assert cli.parse("sft", ["--resume", "--out", str(tmp_path / "killed")]).steps == 4


def test_all_prompts_of_a_tokenizer_have_one_date(tmp_path, monkeypatch):
    on_day(monkeypatch, 12)
    tokenizer = chat_tokenizer(tmp_path, DATED)
    on_day(monkeypatch, 13)
    assert tokenizer.render([ASK]) == "12+11=2+5?"
    tokenizer.now = datetime(2027, 1, 2)
    assert tokenizer.render([ASK]) == "02+01=2+5?"
