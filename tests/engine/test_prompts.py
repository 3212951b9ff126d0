"""Every prompt is rendered and measured before the first step: one that cannot be completed is named or dropped."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import ALPHABET, Quiet, Trainer, randomise, tiny_checkpoint, tiny_config
from safetensors.torch import load_file

from minirl import grpo
from minirl.errors import InputError
from minirl.files import Placed
from minirl.grpo import GRPOConfig
from minirl.judge.answers import last_number
from minirl.lab import cli
from minirl.lab.tasks import load_task, parse_task
from minirl.lab.training import train_grpo
from minirl.model import ScalarHead, Transformer
from minirl.prompts import measure
from minirl.reward_model import RewardModel
from minirl.run import identity
from minirl.task import Task
from minirl.tokenizer import Tokenizer

CONTEXT = 32
SMALL = ["--max-tokens", "4", "--device", "cpu"]
SIZES = "--steps 3 --prompts 2 --group 2 --eval-prompts 2 --eval-samples 2 --save-every 2 --seed 4"
POLICY = [*SIZES.split(), *SMALL]
COMMANDS = {
    "grpo": POLICY,
    "ppo": POLICY,
    "outcomes": ["--samples", "2", *SMALL],
    "rft": ["--samples", "2", *SMALL],
    "eval": ["--samples", "2", "--prompts", "4", *SMALL],
}
TEMPLATE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
TEMPLATE += "{{ m.content }}{% endfor %}="


def write(name: str, prompts: list) -> None:
    """A file of prompts with a blank line in front: places count lines, not examples."""
    lines = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in prompts]
    Path(name).write_text("\n" + "\n".join(lines) + "\n")


SUMS = [f"{i}+{i + 1}=" for i in range(12)]
TOO_LONG = "1" * CONTEXT


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the commands run: `model`, good prompts in good.jsonl, and in bad.jsonl one that is too long in line 9."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint("model", max_positions=CONTEXT)
    write("good.jsonl", SUMS)
    write("bad.jsonl", [*SUMS[:7], TOO_LONG, *SUMS[7:]])
    return tmp_path


def task(name: str, command: str = "grpo") -> str:
    """The file on the side that the command samples."""
    train, heldout = ("good.jsonl", name) if command == "eval" else (name, "good.jsonl")
    return f"{train}:heldout_path={heldout}"


pytestmark = pytest.mark.filterwarnings("ignore:.*are in the training file too")


# --- stop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_prompt_without_room_is_named_before_the_first_step(command, complaint):
    spec = task("bad.jsonl", command)
    more = ["--prompts", "20"] if command == "eval" else []
    said = complaint(command, "--model", "model", "--task", spec, *COMMANDS[command], *more)
    assert "bad.jsonl, line 9: its prompt has 32 tokens and the context holds 32" in said
    assert "--overlong-prompts drop" in said


def test_a_held_out_prompt_without_room_is_named_too(complaint):
    write("held.jsonl", [SUMS[0], TOO_LONG])
    said = complaint("grpo", "--model", "model", "--task", "good.jsonl:heldout_path=held.jsonl", *POLICY)
    assert "held.jsonl, line 3: its prompt has 32 tokens" in said


def test_one_token_of_room_is_enough():
    write("edge.jsonl", ["1" * (CONTEXT - 1), *SUMS])
    run = train_grpo(config("edge.jsonl"), Quiet())
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize("overlong", ["stop", "drop"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_prompt_that_the_template_refuses_is_named_in_any_case(command, overlong, complaint):
    Path("model/chat_template.jinja").write_text(TEMPLATE)
    messages = [[{"role": "user", "content": f"{i}+1"}] for i in range(12)]
    write("good.jsonl", messages)
    write("bad.jsonl", [*messages[:3], [{"role": "system", "content": "1"}, *messages[3]]])
    args = ["--task", task("bad.jsonl", command), "--overlong-prompts", overlong, *COMMANDS[command]]
    said = complaint(command, "--model", "model", *args)
    assert "bad.jsonl, line 5: the chat template refuses these messages: no system turn" in said


def test_a_character_without_a_token_is_named_with_its_line(complaint):
    write("bad.jsonl", [*SUMS, "what?"])
    said = complaint("grpo", "--model", "model", "--task", task("bad.jsonl"), *POLICY)
    assert "bad.jsonl, line 14: the tokenizer has no token for 'w'" in said


def test_stored_prompts_and_those_of_reward_models_are_named_with_their_line(complaint):
    Path("model/chat_template.jinja").write_text(TEMPLATE)
    stored = {"prompt": [{"role": "system", "content": "1"}], "completion": "1", "reward": 1}
    Path("stored.jsonl").write_text(json.dumps(stored) + "\n")
    said = complaint("grpo", "--model", "model", "--task", task("good.jsonl"), "--data", "stored.jsonl", *POLICY)
    assert "stored.jsonl, line 1: the chat template refuses" in said
    pair = {"prompt": [{"role": "system", "content": "1"}], "chosen": "1", "rejected": "2"}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    said = complaint("reward", "--model", "model", "--data", "pairs.jsonl", "--heldout", "0")
    assert "pairs.jsonl, line 1: the chat template refuses" in said
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "1+1=", "chosen": "two", "rejected": "2"}) + "\n")
    for command, more in (("reward", ["--heldout", "0"]), ("prefer", ["--eval-share", "0"])):
        said = complaint(command, "--model", "model", "--data", "pairs.jsonl", *more)
        assert "pairs.jsonl, line 1: the tokenizer has no token for 't'" in said


def test_a_reward_model_that_is_too_short_for_what_may_be_sampled_is_named(capsys, complaint):
    tiny_checkpoint("judge-start", max_positions=8)
    lines = [{"prompt": p, "chosen": "1", "rejected": "2"} for p in ("1+1=", "1+2=")]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = "--heldout 0 --steps 1 --out judge --device cpu"
    cli.main(["reward", "--model", "judge-start", "--data", "pairs.jsonl", *args.split()])
    capsys.readouterr()
    args = ["--task", task("good.jsonl"), "--rewards", "model:judge/model=1", *POLICY]
    said = complaint("grpo", "--model", "model", *args)
    assert "was made for 8 tokens, and a prompt of 6 tokens with a completion of max_tokens = 4 has more" in said
    cli.main(["grpo", "--model", "model", *args, "--max-tokens", "2", "--steps", "1"])


def judge_model(template: str = "", **sizes) -> Path:
    """A reward model with a chat template of its own."""
    tiny_checkpoint("judge", max_positions=CONTEXT, **sizes)
    model = Transformer.from_pretrained("judge", scalar_head=ScalarHead("linear", "pairwise"))
    randomise(model, seed=3).save_pretrained("judge")
    if template:
        Path("judge/chat_template.jinja").write_text(template)
    return Path("judge")


def chats(count: int = 12) -> list:
    return [[{"role": "user", "content": f"{i}+1"}] for i in range(count)]


PLAIN_TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}="
JUDGED = ["--rewards", "model:judge=1", *POLICY]


def test_a_prompt_that_a_reward_model_s_own_template_refuses_is_named_before_the_first_step(complaint):
    Path("model/chat_template.jinja").write_text(PLAIN_TURNS)
    judge_model(TEMPLATE)
    write("bad.jsonl", [*chats(3), [{"role": "system", "content": "1"}, *chats(1)[0]]])
    write("good.jsonl", chats())
    said = complaint("grpo", "--model", "model", "--task", task("bad.jsonl"), *JUDGED)
    assert "reward 'model:judge': bad.jsonl, line 5: the chat template refuses these messages: no system turn" in said


def test_a_reward_model_reads_prompts_as_long_as_its_own_template_makes_them(complaint):
    """The policy reads "10+1=" as 5 tokens and the judge with 27 more: 4 of a completion make 36; with 23 more, 32."""
    Path("model/chat_template.jinja").write_text(PLAIN_TURNS)
    judge_model("{{ '1' * 27 }}" + PLAIN_TURNS)
    write("bad.jsonl", chats(11))
    write("good.jsonl", chats())
    args = ["grpo", "--model", "model", "--task", task("bad.jsonl"), *JUDGED]
    said = complaint(*args)
    assert "bad.jsonl, line 12: reward 'model:judge' was made for 32 tokens, and a prompt of 32 tokens" in said
    judge_model("{{ '1' * 23 }}" + PLAIN_TURNS)
    cli.main([*args, "--steps", "1"])


def test_the_steps_before_a_prompt_that_cannot_be_scored_are_saved(monkeypatch):
    judge_model()
    score, calls = RewardModel.score, []

    def fails_in_the_third_step(self, *rows):
        calls.append(rows)
        if len(calls) == 3:
            raise InputError("completion 0 cannot be read")
        return score(self, *rows)

    monkeypatch.setattr(RewardModel, "score", fails_in_the_third_step)
    options = {"rewards": ("model:judge=1",), "save_every": 100}
    with pytest.raises(InputError, match="cannot be read; the 2 steps before it are saved: add --resume"):
        train_grpo(config("good.jsonl", **options), Quiet())
    assert Path("run/checkpoints/step-000002/model.safetensors").exists()
    train_grpo(config("good.jsonl", **options, resume=True), Quiet())


def test_the_date_that_a_reward_model_reads_is_that_of_the_first_start(monkeypatch):
    """Also where the policy's own template reads none."""
    Path("model/chat_template.jinja").write_text(PLAIN_TURNS)
    judge_model("{{ strftime_now('%H%M%S') }}" + PLAIN_TURNS)
    write("good.jsonl", chats())
    about = config("good.jsonl", rewards=("model:judge=1",), save_every=1, steps=2)
    trainer = Trainer(grpo, about, parse_task(about.task))
    first = trainer.rewards.learned[0].reward.tokenizer
    assert trainer.run.config["date"] == first.now.isoformat()
    first.now = datetime(2001, 2, 3, 4, 5, 6)
    trainer.run.config["date"] = first.now.isoformat()
    with trainer.run:
        trainer.run.log(0, {})
    again = Trainer(grpo, replace(about, resume=True), parse_task(about.task)).rewards.learned[0].reward.tokenizer
    asked = [{"role": "user", "content": "1"}]
    assert again.render(asked) == first.render(asked) == "0405061="


def test_a_critic_that_is_too_short_for_what_may_be_sampled_is_refused(complaint):
    tiny_checkpoint("short", max_positions=8)
    args = ["ppo", "--model", "model", "--task", task("good.jsonl"), *POLICY, "--critic-from", "short"]
    said = complaint(*args)  # the longest prompt is 10+11=
    assert "short was made for 8 tokens, and the longest prompt with a completion may have 10" in said
    cli.main([*args, "--max-tokens", "2", "--steps", "1"])


# --- drop ------------------------------------------------------------------------------------------------------------


def config(name: str, **options) -> GRPOConfig:
    sizes = {"steps": 4, "prompts": 2, "group": 2, "max_tokens": 4, "eval_prompts": 2, "eval_samples": 2}
    spec = f"{name}:heldout_path=good.jsonl"
    return GRPOConfig("model", spec, **{**sizes, "out": "run", "save_every": 2, "seed": 4, "lr": 1e-2, **options})


def test_what_is_dropped_is_as_if_it_had_never_been_there():
    shown = Quiet()
    dropped = train_grpo(config("bad.jsonl", overlong_prompts="drop"), shown)
    without = train_grpo(config("good.jsonl", out="other"), Quiet())
    assert "1 of 13 training prompts leave no room for a completion and are dropped" in shown.lines
    pairs = zip(*(load_file(run / "model.safetensors").values() for run in (dropped, without)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_drops_the_same_prompts():
    whole = train_grpo(config("bad.jsonl", overlong_prompts="drop"), Quiet())
    shutil.copytree("run", "killed")
    shutil.rmtree("killed/model")
    shutil.rmtree("killed/checkpoints/step-000004")
    again = train_grpo(config("bad.jsonl", overlong_prompts="drop", out="killed", resume=True), Quiet())
    pairs = zip(*(load_file(run / "model.safetensors").values() for run in (whole, again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("command", ["outcomes", "eval"])
def test_commands_that_only_sample_drop_too(command, capsys):
    sampled = {"outcomes": "runs/outcomes/samples.jsonl", "eval": "runs/eval-1/completions.jsonl"}[command]
    more = {"outcomes": ["--prompts", "9", "--no-balance"], "eval": ["--prompts", "9"]}[command]
    spec = ["--task", task("bad.jsonl", command), "--overlong-prompts", "drop"]
    cli.main([command, "--model", "model", *spec, *COMMANDS[command], *more])
    prompts = [json.loads(line)["prompt"] for line in Path(sampled).read_text().splitlines()]
    assert list(dict.fromkeys(prompts)) == SUMS[:9]  # as many as were asked for, the first that fit
    side = "held-out" if command == "eval" else "training"
    assert f"1 of 10 {side} prompts leave no room" in capsys.readouterr().out


def test_two_checkpoints_are_compared_on_prompts_that_both_can_complete(capsys):
    tiny_checkpoint("short", max_positions=8)
    write("held.jsonl", ["1+1=", "1111+1111=", "2+2="])
    spec = ["--task", "good.jsonl:heldout_path=held.jsonl", "--overlong-prompts", "drop", "--json"]
    cli.main(["eval", "--model", "model", "--compare", "short", *spec, "--samples", "2", *SMALL])
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["eval/prompts"] == found["compare"]["metrics"]["eval/prompts"] == 2


def test_a_task_of_which_nothing_is_left_is_refused(complaint):
    write("bad.jsonl", [TOO_LONG, TOO_LONG + "1"])
    spec = ["--task", task("bad.jsonl"), "--overlong-prompts", "drop"]
    said = complaint("grpo", "--model", "model", *spec, *POLICY)
    assert "none of 2 prompts leaves room" in said and "bad.jsonl, line 2" in said


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Options:
    overlong_prompts: str = "stop"
    max_tokens: int = 4


def made(train: list, heldout: tuple = ()) -> Task:
    sides = ([{"prompt": p} for p in side] for side in (train, heldout))
    return Task("made", *sides, {"correct": (1.0, last_number)}, last_number, str)


def measured(prompts: list, side: str = "train", most: int | None = None, **options):
    tokenizer, display = Tokenizer.from_chars(ALPHABET), Quiet()
    examples = made(prompts) if side == "train" else made(["1"], prompts)
    model = tiny_config(vocab_size=options.pop("vocab_size", tokenizer.vocab_size), max_positions=10)
    return measure(examples, side, tokenizer, model, Options(**options), display, most), display


def test_lengths_are_those_of_the_tokens_and_no_ids_are_kept():
    found, display = measured(["1" * n for n in (3, 1, 9, 5)])
    assert found.lengths.dtype == np.int32 and found.lengths.tolist() == [3, 1, 9, 5]
    assert display.bars[0] == ("prompts", 0, 4) and display.bars[-1] == ("prompts", 4, 4)


def test_completions_that_the_context_cuts_are_counted():
    """Room 10: after 9, 7 and 6 tokens 1, 3 and 4 are left, where 4 may be drawn."""
    _, display = measured(["1" * n for n in (9, 7, 6, 2)])
    assert len(display.lines) == 1
    assert "2 of 4 training prompts leave room for fewer than max_tokens = 4" in display.lines[0]
    assert "cut after 1 tokens at the earliest" in display.lines[0]
    assert measured(["1" * 6])[1].lines == []


@pytest.mark.parametrize(
    ("side", "prompts", "options", "sentence"),
    [
        ("train", ["1", "1" * 10], {}, "prompt 1 of task made: its prompt has 10 tokens"),
        ("heldout", ["1", "1" * 10], {}, "held-out prompt 1 of task made: its prompt has 10 tokens"),
        ("train", ["1", ""], {"overlong_prompts": "drop"}, "prompt 1 of task made: its prompt has no token"),
        (
            "train",
            ["1", "a"],
            {"overlong_prompts": "drop"},
            "prompt 1 of task made: the tokenizer has no token",
        ),
        ("train", ["0", ")"], {"vocab_size": 18}, "prompt 1 of task made: its prompt holds token 18, outside"),
    ],
)
def test_a_prompt_that_was_made_is_named_by_its_number(side, prompts, options, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        measured(prompts, side, **options)


def test_only_as_many_prompts_are_measured_as_are_used():
    found, _ = measured(["1", "1" * 10, "11", "111", "?"], most=2, overlong_prompts="drop")
    assert [e["prompt"] for e in found.examples] == ["1", "11"] and found.dropped == 1


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_place_is_no_column_and_no_part_of_what_decides_a_run():
    [example] = load_task("good.jsonl", heldout_fraction=0.0, limit=1).train
    assert example == {"prompt": SUMS[0], "answer": "1"} and example.where == "good.jsonl, line 2"

    @dataclass
    class Config:
        out: ClassVar[str] = ""

    assert identity(Config(), [example]) == identity(Config(), [dict(example)])
    assert identity(Config(), [example]) == identity(Config(), [Placed(example, "moved.jsonl, line 7")])


def test_a_reward_that_fails_names_file_and_line(complaint):
    Path("rewards.py").write_text("def bad(prompts, completions, **columns):\n    return ['x' for c in completions]\n")
    write("good.jsonl", SUMS[:1] * 2)
    spec = ["--task", "good.jsonl:heldout_path=bad.jsonl", "--overlong-prompts", "drop"]
    said = complaint("grpo", "--model", "model", *spec, "--rewards", "rewards.py:bad=1", *POLICY)
    assert re.search(r"reward 'rewards.py:bad' returned 'x'.* for good.jsonl, line [23], completion 0", said)
