"""See before you train: `minirl check`, the first lines of a run, the disk, and the format of a run's folder."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import ALPHABET, Terminal, Trainer, all_files, tiny_checkpoint, tiny_model
from rich.console import Console

from minirl import grpo, ppo, prefer, rft
from minirl.files import write_json
from minirl.grpo import GRPOConfig
from minirl.lab import cli, commands
from minirl.lab.check import CHECKS
from minirl.lab.display import RichDisplay
from minirl.lab.preview import disk_of, marked, marked_example
from minirl.lab.report import report
from minirl.lab.tasks import parse_task
from minirl.optimizer import AdamW, state_bytes
from minirl.ppo import PPOConfig
from minirl.run import FORMAT
from minirl.tokenizer import Tokenizer

TASK = "arithmetic:op=sum,digits=1,style=plain"
POLICY = f"--model model --task {TASK} --steps 2 --prompts 2 --group 2 --max-tokens 4 --eval-prompts 2 --device cpu"
COMMANDS = {
    "grpo": POLICY,
    "ppo": POLICY,
    "outcomes": f"--model model --task {TASK} --max-tokens 4 --device cpu",
    "rft": f"--model model --task {TASK} --max-tokens 4 --device cpu",
    "sft": "--model model --data sft.jsonl --device cpu",
    "prefer": "--model model --data pairs.jsonl --device cpu",
    "reward": "--model model --data pairs.jsonl --device cpu",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "draw", lambda config: None)  # the plots of a run take longer than the run
    tiny_checkpoint("model")
    sides = {"sft": {"completion": "12"}, "pairs": {"chosen": "12", "rejected": "7"}}
    for name, more in sides.items():
        lines = [json.dumps({"prompt": prompt, **more}) for prompt in ("3+9=", "4+8=", "5+7=")]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def checked(capsys, command: str, *more: str) -> str:
    """What `minirl check` prints; it must write nothing."""
    before = all_files()
    cli.main(["check", command, *COMMANDS[command].split(), *more])
    assert all_files() == before
    return capsys.readouterr().out


# --- check -----------------------------------------------------------------------------------------------------------


def test_every_command_that_trains_or_samples_for_training_can_be_checked():
    assert set(CHECKS) == set(COMMANDS) == set(cli.COMMANDS) - {"demo", "eval", "generate", "report"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_check_says_what_is_known_before_the_first_step(command, capsys):
    said = checked(capsys, command)
    assert "one example, what is trained in ⟦ ⟧:" in said
    assert ("rendering: 3 examples in" if command in ("sft", "prefer", "reward") else " prompts in ") in said
    assert ("disk: " in said) == (command != "outcomes")
    assert ("reward correct, weight 1: " in said) == (command in ("grpo", "ppo", "rft", "outcomes"))
    assert said.endswith("nothing was written\n")


@pytest.mark.parametrize("command", ["sft", "prefer"])
def test_the_response_is_marked_with_its_stop_token(command, capsys):
    assert "=⟦12<eos>⟧\n" in checked(capsys, command)


def test_of_a_reward_model_the_token_is_marked_at_which_the_score_is_read(capsys):
    assert "=12⟦<eos>⟧\n" in checked(capsys, "reward")


def test_rewards_are_called_and_what_they_do_is_said(capsys, complaint):
    Path("rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(p) for p in prompts]\n"
        "def none(prompts, completions, **columns):\n    return [None for p in prompts]\n"
        "def broken(prompts, completions, **columns):\n    return [1 / 0]\n"
    )
    said = checked(capsys, "grpo", "--rewards", "rewards.py:length=0.5", "rewards.py:none=0.25")
    assert "reward rewards.py:length, weight 0.5: 4\n" in said  # a prompt is 1+2=
    assert "reward rewards.py:none, weight 0.25: no score\n" in said
    args = ["check", "grpo", *POLICY.split(), "--rewards", "rewards.py:broken=1"]
    assert "reward 'rewards.py:broken' failed with ZeroDivisionError" in complaint(*args)


def test_stored_completions_are_shown_and_nothing_is_sampled(capsys):
    lines = [{"prompt": "1+1=", "completion": text, "reward": float(text == "2")} for text in ("2", "3")]
    Path("stored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = checked(capsys, "grpo", "--data", "stored.jsonl", "--prompts", "1")
    assert "1+1=⟦2<eos>⟧" in said and "2 stored completions of 1 prompts" in said


def test_a_run_that_goes_on_is_not_checked(capsys, complaint):
    cli.main(["sft", *COMMANDS["sft"].split(), "--steps", "1"])
    capsys.readouterr()
    said = {complaint("check", "sft", *more) for more in (["--resume"], COMMANDS["sft"].split())}
    assert (
        len(said) == 1 and "runs/sft already holds one: choose another --out" in said.pop()
    )  # not from one to another


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_a_check_says_how_it_is_used(flag, capsys):
    cli.main(["check", flag])
    said = capsys.readouterr().out
    assert said.startswith("usage: minirl check COMMAND") and ", ".join(CHECKS) in said


# --- before the first step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_a_step_of_more_prompts_than_there_are_is_said(command, capsys):
    lines = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    Path("task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = ["--task", "task.jsonl:heldout_fraction=0.5"]
    said = "there are only 2 training prompts, so a step samples some of them more than once"
    assert f"prompts = 3: {said}" in checked(capsys, command, *spec, "--prompts", "3")
    assert said not in checked(capsys, command, *spec, "--prompts", "2")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_before_the_first_step_says_that_nothing_was_written(command, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "from_pretrained", interrupted)
    before = all_files()
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *COMMANDS[command].split()])
    assert stop.value.code == 130 and all_files() == before
    assert capsys.readouterr().out.endswith("stopped before the first step; nothing was written\n")


# --- one example -----------------------------------------------------------------------------------------------------


def test_parts_are_cut_where_training_begins_and_ends_and_spell_the_text():
    tokenizer = Tokenizer.from_chars(ALPHABET)
    tokens = tokenizer.encode("1+2=3~4")
    parts = marked(tokenizer, tokens, [False, False, True, True, False, True, True])
    assert parts == [("1+", False), ("2=", True), ("3", False), ("~4", True)]
    prompt, response = tokenizer.encode("1+2="), [*tokenizer.encode("3"), tokenizer.stop_id]
    assert marked_example(tokenizer, prompt, response) == [("1+2=", False), ("3<eos>", True)]
    assert marked_example(tokenizer, prompt, 7) == [("1+2=", False), ("a completion of up to 7 tokens", True)]


def test_a_long_part_is_cut_in_its_middle():
    tokenizer = Tokenizer.from_chars(ALPHABET)
    [(text, _)] = marked(tokenizer, tokenizer.encode("1" * 3000 + "2" * 3000), [False] * 6000)
    assert text.startswith("1" * 1000 + " … (4,000 characters) … ") and text.endswith("2" * 1000)


def test_on_a_terminal_what_is_trained_is_underlined_and_markup_is_text():
    file = Terminal()
    display = RichDisplay(Console(file=file, force_terminal=True, color_system="standard", width=100))
    tokenizer = Tokenizer.from_chars("[]/ABJQbdelor \x1b2")
    display.example(tokenizer, tokenizer.encode("[bold]Q[/bold]\x1b[2J "), tokenizer.encode("[red]A"))
    written = file.getvalue()
    assert "[bold]Q[/bold]␛[2J " in written and "\x1b[1;4m[red]A\x1b[0m" in written


@pytest.mark.parametrize("command", ["grpo", "ppo", "sft", "prefer", "reward"])
def test_the_first_lines_of_a_run_show_an_example_once(command, capsys):
    cli.main([command, *COMMANDS[command].split(), "--steps", "1", "--out", "run"])
    said = capsys.readouterr().out
    assert said.count("one example, what is trained") == 1
    if command in ("grpo", "ppo"):
        assert "=⟦a completion of up to 4 tokens⟧" in said.split("before: ")[0]
    cli.main([command, "--resume", "--out", "run"])
    assert "one example" not in capsys.readouterr().out


# --- disk ------------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def written(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


@pytest.mark.parametrize("options", [{}, {"ref_reset_every": 1, "kl_in_reward": 0.1}])
@pytest.mark.parametrize(("page", "config"), [(grpo, GRPOConfig), (ppo, PPOConfig)])
def test_the_size_of_a_checkpoint_is_that_of_the_files_it_will_have(page, config, options):
    trainer = Trainer(page, config("model", TASK, max_tokens=4, device="cpu", **options), parse_task(TASK))
    trainer.run.save(1)
    headers, disk = 40_000, disk_of(trainer.run, steps=1, save_every=1)  # headers hold names and shapes
    assert 0 <= written(trainer.run.out / "checkpoints") - disk.checkpoint < headers
    assert disk.model == sum(4 * p.numel() for p in trainer.model.parameters())


def test_a_disk_that_holds_no_checkpoint_is_said_before_the_first_step(monkeypatch, complaint):
    """And before the long work that comes before it, in a run as in a check of one."""

    def no_work(*args, **options):
        raise AssertionError("the disk comes first")

    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**6, 0, 10**4))
    monkeypatch.setattr(prefer, "list_logprobs", no_work)
    for check in ([], ["check"]):
        for command in ("grpo", "ppo", "sft", "prefer", "reward", "rft"):
            if not check:
                monkeypatch.setattr(rft, "sample_and_keep", no_work)
            said = complaint(*check, command, *COMMANDS[command].split())
            assert "not enough for one checkpoint: free some space" in said


def test_a_resumed_run_of_prefer_looks_at_the_disk_before_it_computes_the_reference(monkeypatch, complaint):
    cli.main(["prefer", *COMMANDS["prefer"].split(), "--steps", "2", "--save-every", "1", "--out", "run"])
    for done in ("run/checkpoints/step-000002", "run/model"):  # as if it had been killed after its first step
        shutil.rmtree(done)

    def no_work(*args, **options):
        raise AssertionError("the disk comes first")

    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**6, 0, 10**4))
    monkeypatch.setattr(prefer, "list_logprobs", no_work)
    said = complaint("prefer", "--resume", "--out", "run")
    assert "not enough for one checkpoint: free some space" in said


def test_a_disk_that_will_be_too_small_is_said(capsys, monkeypatch):
    size = written("model")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 0, int(4.5 * size)))  # 3 a checkpoint
    args = [*COMMANDS["sft"].split(), "--steps", "4", "--save-every", "1"]
    for words in (["check", "sft"], ["sft", "--out", "run"]):  # a check has no rule of its own
        cli.main([*words, *args])
        said = capsys.readouterr().out
        assert "not enough for all of them in the end: free some space, or raise save_every" in said
        assert said.count("disk: ") == 1 and "(3 checkpoints of" in said
    cli.main(["check", "sft", *args, "--save-every", "4", "--out", "other"])
    said = capsys.readouterr().out
    assert "(1 checkpoint of" in said and "in the end" not in said


@pytest.mark.parametrize("command", ["outcomes", "rft", "grpo", "ppo"])
def test_a_check_says_what_the_task_says(command, capsys):
    lines = [{"prompt": f"{i}+1=", "answer": "x" if i else "1"} for i in range(9)]
    Path("task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = checked(capsys, command, "--task", "task.jsonl:heldout_fraction=0.3")
    assert said.count("8 of 9 answers are no numbers") == 1


def test_the_state_of_an_optimizer_has_as_many_bytes_as_are_said():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        model.lm_head.requires_grad_(False)
        held = AdamW(model).state_dict().values()
        assert state_bytes(model) == sum(t.numel() * t.element_size() for t in held)


# --- format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [{}, {"format": FORMAT + 1, "a_newer_option": 1}, {"format": "x"}])
def test_a_run_of_another_format_is_refused_in_a_sentence_and_still_drawn(old, capsys, complaint):
    cli.main(["sft", *COMMANDS["sft"].split(), "--steps", "1", "--out", "run"])
    content = json.loads(Path("run/config.json").read_text())
    assert content.pop("format") == FORMAT
    write_json("run/config.json", content | old)
    capsys.readouterr()
    said = complaint("sft", "--resume", "--out", "run")
    assert f"the run in run has format {old.get('format', 1)!r}" in said and f"goes on with format {FORMAT}" in said
    assert report(Path("run")).exists()
