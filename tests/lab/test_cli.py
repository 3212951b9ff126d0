"""The commands as a person types them: what --help says, what is understood, and what comes out."""

import ast
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import Field, asdict, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
from helpers import Terminal, read_jsonl, tiny_checkpoint, write_jsonl
from rich.console import Console

from minirl.config import Refresh
from minirl.errors import InputError
from minirl.evaluate import evaluate
from minirl.grpo import GRPOConfig
from minirl.lab import cli, eval_command
from minirl.lab.display import print_table
from minirl.losses import PolicyLoss
from minirl.model import Transformer
from minirl.ppo import PPOConfig
from minirl.presets import PRESETS, preset_defaults, presets
from minirl.run import Run
from minirl.sft import SFTConfig
from minirl.tokenizer import Tokenizer

TASK = "arithmetic:op=sum,digits=1,style=plain"
SMALL = "--steps 2 --prompts 2 --group 2 --max-tokens 4 --eval-prompts 3 --eval-samples 2"


@pytest.fixture
def model(checkpoint) -> str:
    return str(checkpoint)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch) -> Path:
    """Where commands leave what they are not told a place for."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    return folder


def output(capsys, *args: str) -> str:
    """What a command prints; nothing may come on stderr."""
    capsys.readouterr()
    cli.main(list(args))
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- help ------------------------------------------------------------------------------------------------------------


def documented(kind: type, prefix: str = "--") -> dict[str, str]:
    """Flag -> the docstring of its field, read from the source."""
    texts = {
        field.target.id: text.value.value
        for base in reversed([base for base in kind.__mro__ if is_dataclass(base)])
        for field, text in pairwise(ast.parse(inspect.getsource(base)).body[0].body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    found = {}
    for f in fields(kind):
        flag = prefix + f.name.replace("_", "-")
        found |= documented(f.type, flag + ".") if is_dataclass(f.type) else {flag: texts[f.name]}
    return found


def plain(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_every_option_with_its_docstring(command, capsys):
    cli.main([command, "--help"])
    shown, kind = plain(capsys.readouterr().out), cli.COMMANDS[command][0]
    assert plain(kind.__doc__.splitlines()[0]) in shown
    options = documented(kind)
    assert len(options) == len(cli._options(kind))
    for flag, text in options.items():
        assert f"{flag} " in shown or f"{flag}, " in shown, flag
        assert plain(text) in shown, flag


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_help_names_every_preset_that_a_command_takes(command):
    names = re.findall(r"[a-z_]+\+*", documented(cli.COMMANDS[command][0])["--preset"].partition(": ")[0])
    wanted = set(presets(critic=command == "ppo"))
    assert set(names) - {"or"} == wanted


def test_help_has_its_groups_in_order_and_shows_what_a_preset_sets(capsys):
    shown = output(capsys, "grpo", "--preset", "dapo", "--help")
    assert re.findall(r"^([a-z].*):$", shown, re.MULTILINE) == list(cli.GROUPS)
    groups = dict(zip(cli.GROUPS, re.split(r"^[a-z].*:$", shown, flags=re.MULTILINE)[1:], strict=True))
    assert "--loss.eps-high FLOAT" in groups["loss"] and "(default: 0.28)" in groups["loss"]
    assert "--refresh.every INT" in groups["rewards"] and "--adaptive-kl" in groups["reference and KL"]
    assert len(re.findall(r"^  --", groups["most used"], re.MULTILINE)) == 10


@pytest.mark.parametrize("width", ["60", "120", "300"])
def test_help_fits_the_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    lines = output(capsys, "grpo", "--help").splitlines()[4:]
    long = [line for line in lines if len(line) > min(int(width), 120)]
    assert all(len(line.split()) <= 3 for line in long), long  # flag and values, or one word, that cannot be folded


OFTEN = ["model", "task", "out", "preset", "steps", "prompts", "group", "max-tokens", "lr", "rewards"]


@pytest.mark.parametrize(
    ("command", "often"),
    [
        ("grpo", OFTEN),
        ("ppo", OFTEN),
        ("sft", ["model", "data", "out", "loss-on", "steps", "batch", "lr"]),
        ("prefer", ["model", "data", "out", "steps", "batch", "lr"]),
        ("reward", ["model", "data", "kind", "out", "steps", "batch", "lr"]),
        ("rft", ["model", "task", "out", "steps", "prompts", "samples"]),
        ("outcomes", ["model", "task", "out", "prompts", "samples"]),
        ("eval", ["model", "task", "compare"]),
    ],
)
def test_what_everybody_sets_comes_first_in_help(command, often, capsys):
    cli.main([command, "--help"])
    shown = re.findall(r"^  --([a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert shown[: len(often)] == often


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_bare_program_lists_its_commands(args, capsys):
    out = output(capsys, *args)
    for name, (kind, _) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(kind.__doc__.splitlines()[0])}$", out, re.MULTILINE)


# --- limits ----------------------------------------------------------------------------------------------------------


def limits(f: Field) -> list[str]:
    return [kind.__metadata__[0] for kind in (f.type, *get_args(f.type)) if get_origin(kind) is Annotated]


OUTSIDE = {"at least 1": 0, "positive and finite, below 1e30": math.inf, "finite and not negative, below 1e30": -1}


@pytest.mark.parametrize("kind", [*(kind for kind, _ in cli.COMMANDS.values()), Refresh])
def test_every_number_is_held_to_the_limit_of_its_type(kind):
    needed = {f.name: ("x",) if f.name == "prompts" else "x" for f in fields(kind) if f.default is f.default_factory}
    for f in fields(kind):
        for limit in limits(f):
            value = OUTSIDE[limit]
            with pytest.raises(InputError, match=f"^{f.name} = {value}: it must be {limit}$"):
                kind(**needed | {f.name: value})


def test_every_number_has_a_limit_but_those_that_other_checks_hold():
    """Sampling parameters check themselves; a share, a cache and a number of seeds have two sides."""
    kinds = [*(kind for kind, _ in cli.COMMANDS.values()), Refresh]
    free = {f.name for kind in kinds for f in fields(kind) if f.type in (int, float, int | None, float | None)}
    assert free == {"max_tokens", "temperature", "top_k", "top_p", "min_p", "n", "seed", "overlong_cache"} | {
        "eval_share",
        "heldout",
    }


# --- parsing ---------------------------------------------------------------------------------------------------------


def test_options_of_the_loss_are_nested():
    args = "--model m --loss.kl k3 --loss.kl-coef 0.1 --loss.eps-high inf --loss.dual-clip 3 --loss.aggregation seq_sum"
    loss = PolicyLoss(kl="k3", kl_coef=0.1, eps_high=math.inf, dual_clip=3.0, aggregation="seq_sum")
    assert cli.parse("grpo", args.split()) == GRPOConfig("m", loss=loss)


def test_dashes_and_underscores_and_equals_signs_are_all_understood():
    wanted = GRPOConfig("m", max_tokens=9, mini_batches=2, reward_timeout=4.0, rewards=("format=0.2", "math=1"))
    for args in (
        "--model m --max-tokens 9 --mini-batches 2 --reward-timeout 4 --rewards format=0.2 math=1",
        "--model=m --max_tokens=9 --mini_batches=2 --reward_timeout=4 --rewards format=0.2 math=1",
    ):
        assert cli.parse("grpo", args.split()) == wanted


@pytest.mark.parametrize("preset", presets(critic=False))
def test_a_preset_sets_the_defaults(preset):
    assert cli.parse("grpo", ["--model", "m", "--preset", preset]) == GRPOConfig("m", **preset_defaults(preset))


def test_a_preset_has_no_more_mini_batches_than_there_are_prompts():
    for args, wanted in (
        ("--model m --preset gspo --prompts 3", 3),
        ("--model m --preset gspo --prompts=3 --mini-batches 2", 2),
        ("--model m --prompts 3 --preset grpo", 1),
    ):
        assert cli.parse("grpo", args.split()).mini_batches == wanted


@pytest.mark.parametrize("preset", presets(critic=True))
def test_a_preset_of_ppo_sets_its_defaults(preset):
    wanted = PPOConfig("m", **preset_defaults(preset, critic=True))
    assert cli.parse("ppo", ["--model", "m", "--preset", preset]) == wanted
    config = cli.parse("ppo", ["--preset", preset, "--model", "m", "--critic", "shared", "--value-clip", "None"])
    assert config == replace(wanted, critic="shared", value_clip=None)


def test_options_beside_a_preset_win_over_it_wherever_they_stand():
    wanted = PRESETS["grpo"]["loss"]
    for args in (
        "--loss.kl-coef 0.5 --preset grpo --epochs 3 --model m",
        "--epochs 3 --preset=grpo --model m --loss.kl-coef=0.5",
    ):
        config = cli.parse("grpo", args.split())
        assert config == GRPOConfig("m", preset="grpo", epochs=3, loss=replace(wanted, kl_coef=0.5))


@pytest.mark.parametrize("flag", ["--max-tokens 77", "--max-tokens=77", "--max_tokens 77", "--max_tokens=77"])
def test_the_constant_length_of_a_preset_is_the_generation_budget(flag):
    config = cli.parse("grpo", ["--model", "m", "--preset", "dr_grpo", *flag.split()])
    assert (config.max_tokens, config.loss.const_length) == (77, 77.0)
    config = cli.parse("grpo", ["--model", "m", "--preset", "dr_grpo"])
    assert config.loss.const_length == config.max_tokens == 256


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (
            "grpo",
            GRPOConfig("m", preset="gspo", stop=("\n", "a b"), rewards=("format=1",), reward_timeout=2.5, lr=3e-4),
        ),
        ("grpo", GRPOConfig("m", loss=PolicyLoss(eps_low=math.inf, dual_clip=4.0, kl="k2"), drop_zero_advantage=True)),
        (
            "ppo",
            PPOConfig("m", preset="ppo_penalty", critic="shared", value_clip=None, loss=PolicyLoss(eps_low=math.inf)),
        ),
        ("sft", SFTConfig("m", "d.jsonl", schedule="linear", weight_decay=0.0)),
    ],
)
def test_resume_takes_the_config_that_is_stored(command, config, tmp_path):
    out = str(tmp_path / "run")
    identity = {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}
    Run(out, identity).log(1, {})
    resumed = replace(config, out=out, resume=True)
    assert cli.parse(command, ["--resume", "--out", out]) == resumed
    assert cli.parse(command, [f"--out={out}", "--resume", "--lr", "0.25"]) == replace(resumed, lr=0.25)


# --- generate --------------------------------------------------------------------------------------------------------


def test_completions_are_printed_below_their_prompts(model, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: f"{len(ids)} of them")
    out = output(capsys, *f"generate --model {model} --prompts 1+2= 3+4= --n 2 --max-tokens 2 --top-k 2".split())
    blocks = out.removesuffix("\n\n").split("\n\n")
    assert [block.partition(" ")[0] for block in blocks] == ["'1+2='", "'1+2='", "'3+4='", "'3+4='"]
    for block in blocks:
        tokens, reason, shown = re.fullmatch(r".* \[(\d) tokens, (\w+)\]\n(\d) of them", block).groups()
        assert (int(shown), reason) in ((int(tokens), "length"), (int(tokens) - 1, "stop"))


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.split("\n")[:-1]]


def test_completions_as_json_have_tokens_and_log_probs(model, capsys):
    args = f"generate --model {model} --prompts 1+2= 3+4= --n 3 --max-tokens 6 --top-p 0.9 --json".split()
    found = records(output(capsys, *args))
    tokenizer = Tokenizer.from_pretrained(model)
    assert [record["prompt"] for record in found] == ["1+2="] * 3 + ["3+4="] * 3
    for record in found:
        assert len(record["tokens"]) == len(record["logprobs"]) <= 6
        assert all(logprob <= 0 for logprob in record["logprobs"])
        assert record["text"] == tokenizer.decode(record["tokens"])
        stopped = record["tokens"][-1] == tokenizer.eos_id
        assert record["finish_reason"] == ("stop" if stopped else "length")
    assert records(output(capsys, *args)) == found
    assert records(output(capsys, *args, "--slots", "2")) == found
    assert records(output(capsys, *args, "--seed", "1")) != found


def test_temperature_zero_says_the_same_with_every_seed(model, capsys):
    args = f"generate --model {model} --prompts 1+2= --max-tokens 6 --temperature 0 --json --seed".split()
    assert output(capsys, *args, "1") == output(capsys, *args, "2")


def test_a_stop_text_ends_a_completion(model, capsys):
    args = f"generate --model {model} --prompts 1+2= --max-tokens 20 --n 8 --json --stop 7 --seed 3".split()
    found = records(output(capsys, *args))
    tokenizer = Tokenizer.from_pretrained(model)
    ended = [record for record in found if tokenizer.decode(record["tokens"]).endswith("7")]
    assert ended
    assert all(tokenizer.decode(record["tokens"]) == record["text"] + "7" for record in ended)
    assert all("7" not in record["text"] for record in found)


def test_a_chat_template_is_used_unless_raw(model, capsys, tmp_path):
    tokenizer = Tokenizer.from_pretrained(model)
    chat = tiny_checkpoint(tmp_path / "chat")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    config["chat_template"] = "({{ messages[0].content }})="
    (chat / "tokenizer_config.json").write_text(json.dumps(config))
    args = f"--n 4 --max-tokens 6 --json --model {chat}".split()
    templated = records(output(capsys, "generate", *args, "--prompts", "1+2"))
    raw = records(output(capsys, "generate", *args, "--raw", "--prompts", "(1+2)="))
    bare = records(output(capsys, "generate", *args, "--raw", "--prompts", "1+2"))
    assert [record["tokens"] for record in templated] == [record["tokens"] for record in raw]
    assert [record["tokens"] for record in templated] != [record["tokens"] for record in bare]
    assert [record["prompt"] for record in templated] == ["1+2"] * 4
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("command", ["generate --prompts 1+2=", f"eval --task {TASK} --prompts 2 --samples 2"])
def test_escape_codes_of_a_completion_do_not_reach_the_terminal(command, model, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: "\x1b[31mred\x9b0m")
    out = output(capsys, *command.split(), "--model", model, "--max-tokens", "4")
    assert "␛[31mred␛0m" in out
    assert not re.search("[\x1b\x9b]", out)


def test_letters_that_the_terminal_does_not_have_are_no_error(model, monkeypatch):
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: "Ω \ud83d")
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, "latin-1"))
    cli.main(["generate", "--model", model, "--prompts", "1+2=", "--max-tokens", "4"])
    sys.stdout.flush()
    assert rb"\u03a9 \ud83d" in stdout.getvalue()


# --- eval ------------------------------------------------------------------------------------------------------------


def evaluated(model: str, *args: str) -> list[str]:
    return f"eval --model {model} --task {TASK} --prompts 10 --samples 4 --max-tokens 3".split() + list(args)


def test_accuracies_are_a_table_with_intervals(model, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: "12")  # of 5+7 and 7+5, for instance
    out = output(capsys, *evaluated(model))
    assert "arithmetic: 10 held-out prompts, k = 4, T = 1" in plain(out)
    numbers = json.loads(output(capsys, *evaluated(model, "--json")))
    assert 0 < numbers["metrics"]["eval/mean"] < 1
    for name, (low, high) in numbers["intervals"].items():
        value = numbers["metrics"][name]
        assert f"{name.removeprefix('eval/')} {value:.3f} {low:.3f} to {high:.3f}" in plain(out)


def test_accuracies_as_json_are_the_same_every_time(model, capsys):
    out = output(capsys, *evaluated(model, "--json"))
    content = json.loads(out)
    curve = [f"eval/{name}@{k}" for name in ("pass", "maj") for k in (1, 2, 4)]
    assert list(content["intervals"]) == ["eval/mean", *curve, "eval/greedy"]
    assert all(low <= content["metrics"][name] <= high for name, (low, high) in content["intervals"].items())
    assert content["metrics"]["eval/prompts"] == 10
    assert output(capsys, *evaluated(model, "--json")) == out


def test_every_completion_is_written_and_the_numbers_of_the_table(model, capsys, elsewhere):
    out = output(capsys, *evaluated(model))
    assert out.endswith("written: runs/eval-1\n")
    found = read_jsonl(elsewhere / "runs/eval-1/completions.jsonl")
    assert [record["sample"] for record in found[:40]] == [0, 1, 2, 3] * 10
    assert [record["sample"] for record in found[40:]] == ["greedy"] * 10
    assert [record["problem"] for record in found[40:]] == list(range(10))
    names = ["model", "problem", "prompt", "sample", "completion", "answer", "tokens", "finish_reason", "correct"]
    assert all(list(record) == names for record in found)
    content = json.loads((elsewhere / "runs/eval-1/eval.json").read_text())
    assert content["config"]["task"] == TASK and "out" not in content["config"]
    assert content["versions"].keys() >= {"python", "torch", "numpy"}
    metrics = content["metrics"]
    assert metrics["eval/mean"] == pytest.approx(sum(r["correct"] for r in found[:40]) / 40)
    assert metrics["eval/greedy"] == pytest.approx(sum(r["correct"] for r in found[40:]) / 10)
    assert metrics["eval/len_mean"] == pytest.approx(sum(r["tokens"] for r in found[:40]) / 40)
    assert metrics["eval/truncated_frac"] == sum(r["finish_reason"] == "length" for r in found[:40]) / 40
    said = json.loads(output(capsys, *evaluated(model, "--json")))
    assert said == {name: content[name] for name in ("metrics", "intervals")}
    assert read_jsonl(elsewhere / "runs/eval-2/completions.jsonl") == found


def test_a_folder_that_holds_an_evaluation_is_refused_before_the_work(model, capsys, complaint, elsewhere, monkeypatch):
    output(capsys, *evaluated(model, "--out", "mine"))
    before = (elsewhere / "mine/completions.jsonl").read_bytes()
    monkeypatch.setattr(Transformer, "from_pretrained", None)
    for args in (("--out", "mine"), ("--out", "mine", "--compare", model)):
        said = complaint(*evaluated(model, *args))
        assert said == "minirl: mine already holds an evaluation: choose another --out\n"
    assert (elsewhere / "mine/completions.jsonl").read_bytes() == before


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (InputError, 2)])
def test_what_was_sampled_is_written_when_scoring_stops(error, code, model, capsys, elsewhere, monkeypatch):
    def stops(*args):
        raise error("ZeroDivisionError")

    (elsewhere / "my.py").write_text("def rule(prompts, completions, **columns): ...\n")
    monkeypatch.setattr("minirl.rewards.score", stops)
    with pytest.raises(SystemExit) as stop:
        cli.main(evaluated(model, "--scorer", "my.py:rule"))
    assert stop.value.code == code
    assert "what was sampled so far is in runs/eval-1/completions.jsonl" in capsys.readouterr().out
    found = read_jsonl(elsewhere / "runs/eval-1/completions.jsonl")
    assert len(found) == 40 and all(record["correct"] is None for record in found)
    assert [file.name for file in (elsewhere / "runs/eval-1").iterdir()] == ["completions.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_sampled_is_written_at_a_signal(number, model, capsys, elsewhere, monkeypatch):
    before = signal.getsignal(number)

    def stops(*args):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("minirl.rewards.score", stops)
    with pytest.raises(SystemExit) as stop:
        cli.main(evaluated(model))
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    said = capsys.readouterr().out
    assert "what was sampled so far is in runs/eval-1/completions.jsonl" in said
    assert f"stopped by {signal.Signals(number).name}" in said
    assert len(read_jsonl(elsewhere / "runs/eval-1/completions.jsonl")) == 40


def test_a_scorer_that_fails_is_called_by_its_name_and_may_be_skipped(model, capsys, elsewhere):
    (elsewhere / "my.py").write_text(
        "def rule(prompts, completions, answer, **columns): return [1 / (int(answer[0]) % 2)]\n"
    )
    with pytest.raises(SystemExit):
        cli.main(evaluated(model, "--scorer", "my.py:rule"))
    assert "reward 'my.py:rule' failed with ZeroDivisionError" in capsys.readouterr().err
    out = plain(output(capsys, *evaluated(model, "--scorer", "my.py:rule", "--on-bad-reward", "skip")))
    assert "reward 'my.py:rule' failed" in out and "without a score" in out and "mean 1.000" in out


def test_another_scorer_decides_what_is_right_and_the_task_what_is_voted_for(model, capsys, elsewhere, monkeypatch):
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: "12")
    (elsewhere / "my.py").write_text("def never(prompts, completions, **columns):\n    return [0] * len(completions)\n")
    args = [*evaluated(model, "--json"), "--scorer"]
    task, never, same = (json.loads(output(capsys, *args, spec)) for spec in ("last_number", "my.py:never", "answer"))
    assert task == same == json.loads(output(capsys, *evaluated(model, "--json")))
    assert task["metrics"]["eval/maj@4"] > 0
    assert {never["metrics"][name] for name in never["intervals"]} == {0.0}
    found = read_jsonl(elsewhere / "runs/eval-2/completions.jsonl")
    assert {record["answer"] for record in found} == {"12"} and {record["correct"] for record in found} == {0.0}
    assert json.loads((elsewhere / "runs/eval-2/eval.json").read_text())["config"]["scorer"] == "my.py:never"


@pytest.fixture
def two(tmp_path, monkeypatch) -> tuple[str, str]:
    """Two checkpoints of which the first says 12 and the second 11."""
    folders = [str(tiny_checkpoint(tmp_path / name, seed)) for seed, name in enumerate(("good", "bad"))]
    said = iter(["12"] * 50 + ["11"] * 50)  # 10 prompts x 4 and greedy, of each model
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: next(said))
    return tuple(folders)


def test_two_checkpoints_are_measured_side_by_side(two, capsys, elsewhere):
    good, bad = two
    out = plain(output(capsys, *evaluated(good, "--compare", bad, "--shown", "1")))
    content = json.loads((elsewhere / "runs/eval-1/eval.json").read_text())
    mean, other = content["metrics"]["eval/mean"], content["compare"]["metrics"]["eval/mean"]
    assert mean != other
    difference = content["compare"]["differences"]["eval/mean"]
    assert difference["mean"] == pytest.approx(mean - other)
    low, high = difference["interval"]
    assert low < mean - other < high
    (row,) = re.findall(r"mean (\d.*?) pass@1", out)
    ends = [f"{a:.3f} to {b:.3f}" for a, b in (content[x]["eval/mean"] for x in ("intervals",))]
    assert row.startswith(f"{mean:.3f} {ends[0]} {other:.3f} ") and row.endswith(
        f"{mean - other:+.3f} {low:+.3f} to {high:+.3f}"
    )
    assert "the interval of the difference excludes 0 for none of them" in out
    assert re.search(r"5\+7= model \[right\] 12 other \[wrong\] 11", out)
    found = read_jsonl(elsewhere / "runs/eval-1/completions.jsonl")
    assert [record["model"] for record in found] == [good] * 50 + [bad] * 50
    assert [record["prompt"] for record in found[:50]] == [record["prompt"] for record in found[50:]]


def test_a_checkpoint_is_no_better_than_itself(model, capsys):
    content = json.loads(output(capsys, *evaluated(model, "--compare", model, "--json")))
    assert content["compare"]["metrics"] == content["metrics"]
    assert all(d == {"mean": 0, "interval": [0, 0]} for d in content["compare"]["differences"].values())


def test_a_difference_that_is_there_is_said(two, capsys, elsewhere):
    """One says what is right, the other nothing."""
    (elsewhere / "my.py").write_text(
        "def rule(prompts, completions, **columns):\n    return [float(c == '12') for c in completions]\n"
    )
    out = plain(output(capsys, *evaluated(two[0], "--compare", two[1], "--scorer", "my.py:rule")))
    assert "+1.000 +1.000 to +1.000" in out
    assert "excludes 0 for mean, pass@1, pass@2, pass@4," in out and out.count("greedy") == 2


def test_a_second_checkpoint_that_cannot_take_the_prompts_is_said_before_the_first_is_measured(
    model, complaint, tmp_path, monkeypatch
):
    second = tiny_checkpoint(tmp_path / "second")
    monkeypatch.setattr(eval_command, "evaluate", None)
    config = json.loads((second / "config.json").read_text()) | {"max_position_embeddings": 2}
    spoilt = {"config.json": (json.dumps(config), "context holds 2"), "model.safetensors": ("", "truncated")}
    for name, (content, words) in spoilt.items():
        (second / name).write_text(content)
        assert words in complaint(*evaluated(model, "--compare", str(second)))


def test_what_the_first_checkpoint_said_is_kept_when_the_second_fails(model, capsys, elsewhere, monkeypatch):
    def fails_then(*args, **options):
        monkeypatch.setattr(eval_command, "evaluate", fails)
        return evaluate(*args, **options)

    def fails(*args, **options):
        raise InputError("no more")

    monkeypatch.setattr(eval_command, "evaluate", fails_then)
    with pytest.raises(SystemExit):
        cli.main(evaluated(model, "--compare", model))
    said = capsys.readouterr()
    assert "what was sampled so far is in runs/eval-1/completions.jsonl" in said.out and "no more" in said.err
    assert len(read_jsonl(elsewhere / "runs/eval-1/completions.jsonl")) == 50
    assert "eval/mean" in json.loads((elsewhere / "runs/eval-1/eval.json").read_text())["metrics"]


def test_a_comparison_fits_a_terminal_of_100_columns(model, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(eval_command, "print_table", lambda *args: shown.append(args))
    output(
        capsys,
        *f"eval --model {model} --task {TASK} --prompts 2 --samples 128 --max-tokens 1".split(),
        "--compare",
        model,
    )
    for title, columns, rows in shown:
        console = Console(file=Terminal(), width=100, height=60, _environ={"TERM": "xterm"})
        print_table(title, columns, rows, console)
        drawn = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
        assert max(map(len, drawn)) <= 100
        assert len(drawn) == len(rows) + 5  # title, head, two frames, a line: no row is folded
    assert len(shown) == 2 and "maj@128" in {row[0] for row in shown[0][2]}


@pytest.mark.parametrize("shown", [0, 2, 9])
def test_some_completions_are_shown_with_what_they_were_worth(shown, model, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Tokenizer, "shown", lambda self, ids: "3")
    prompts = ({"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "5="})
    write_jsonl(tmp_path / "heldout.jsonl", prompts)
    (tmp_path / "train.jsonl").write_text('{"prompt": "7="}\n')
    task = f"{tmp_path}/train.jsonl:heldout_path={tmp_path}/heldout.jsonl"
    out = output(capsys, *f"eval --model {model} --task {task} --samples 2 --max-tokens 3 --shown {shown}".split())
    found = re.findall(r"^(.*=)\n\[(.*)\] 3$", out, re.MULTILINE)
    assert found == [("1+2=", "right"), ("2+2=", "wrong"), ("5=", "unscored")][:shown]


# --- training and its report -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_a_run_prints_its_steps_and_what_it_wrote(command, model, capsys, tmp_path):
    out = tmp_path / "run"
    said = output(capsys, command, "--model", model, "--task", TASK, "--out", str(out), *SMALL.split())
    assert re.search(r"^before: held-out \d\.\d{3} \(greedy \d\.\d{3}\)$", said, re.MULTILINE)
    assert re.findall(r"^step (\d)/2  reward ", said, re.MULTILINE) == ["1", "2"]
    written = re.findall(r"^(model|plot|report): +(.*)$", said, re.MULTILINE)
    assert [name for name, _ in written] == ["model", "plot", "report"]
    assert all(Path(path).exists() for _, path in written)
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    assert json.loads((out / "config.json").read_text())["task"] == TASK


def test_sft_prints_its_steps_and_report_draws_them(model, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n')
    out = tmp_path / "run"
    args = ["--model", model, "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    said = output(capsys, "sft", *args, "--steps", "3", "--batch", "2")
    assert re.findall(r"^sft (\d)/3  loss \d", said, re.MULTILINE) == ["1", "2", "3"]
    (out / "plot.png").unlink()
    said = output(capsys, "report", "--run", str(out))
    assert f"plot:   {out}/plot.png" in said
    assert f"report: {out}/report.html" in said
    assert (out / "plot.png").stat().st_size > 1000
    trained = output(capsys, "generate", "--model", str(out / "model"), "--prompts", "1+2=", "--max-tokens", "3")
    assert trained.startswith("'1+2=' [")


def test_ctrl_c_ends_with_130_and_without_a_word(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Transformer, "from_pretrained", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--model", "m", "--prompts", "1"])
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("word", ["--bogus", "--xy", "--max_tokenz=1"])
def test_only_an_option_that_is_close_is_suggested(word, complaint):
    said, close = complaint("eval", "--model", "m", word, "1"), word == "--max_tokenz=1"
    assert f"no option '{word}'" in said
    assert ("did you mean '--max-tokens'?" in said) == close and said.count("mean") == close


def test_messages_of_a_file_need_a_chat_template(model, capsys, tmp_path):
    """Style plain would not turn them into texts."""
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}')
    spec = f"{tmp_path / 'chat.jsonl'}:heldout_path={tmp_path / 'chat.jsonl'}"
    with pytest.raises(SystemExit), pytest.warns(UserWarning):
        cli.main(["eval", "--model", str(model), "--task", spec, "--max-tokens", "2"])
    assert "has no chat template, which messages in " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "outcomes", "rft", "grpo", "ppo"])
def test_a_run_begins_with_what_its_task_has_to_say(command, model, capsys, tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*args):
        raise Loaded

    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "answer": "x^2"}\n{"prompt": "2", "answer": "7"}\n')
    monkeypatch.setattr(Transformer, "from_pretrained", load)
    with pytest.raises(Loaded):
        cli.main([command, "--model", model, "--task", f"{tmp_path / 'data.jsonl'}:heldout_fraction=0.5"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("1 of 2 answers are no numbers ('x^2' is the first)") == 1 and "reward=math" in said


def test_help_names_template_values_by_name_and_value(capsys):
    for command in ("grpo", "sft", "generate"):
        cli.main([command, "--help"])
        assert re.search(r"--template NAME VALUE\s", capsys.readouterr().out)


def test_a_reader_that_leaves_ends_a_command_without_a_word():
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "minirl", "grpo", "--help"]
    found = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (found.returncode, found.stderr) == (1, "")


# ---- Ctrl-C while the program is imported ---------------------------------------------------------------------------

SLOW_IMPORT = """
import sys, time

class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == sys.argv[-1]:
            print("importing", flush=True)
            try:
                time.sleep(60)
            except BaseException as error:  # as imports do that try one thing and then another
                raise ImportError("in the middle of an import") from error

sys.meta_path.insert(0, Slow)
from minirl.__main__ import main
main()
"""


@pytest.mark.parametrize(("module", "kind", "code"), [("torch", "SIGINT", 130), ("torch", "SIGTERM", -signal.SIGTERM)])
def test_a_signal_in_the_middle_of_an_import_is_no_traceback(module, kind, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT, "report", module],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    for _ in range(3):
        process.send_signal(getattr(signal, kind))
    assert process.communicate(timeout=60)[1] == "" and process.returncode == code


def test_ctrl_c_before_a_command_begins_and_again_at_its_end_is_no_traceback():
    script = "import signal, sys, types; from minirl.__main__ import main\n"
    script += "def again(): signal.raise_signal(signal.SIGINT)\n"
    script += "sys.modules['minirl.lab.cli'] = types.SimpleNamespace(main=again)\ntry: main()\nfinally: again()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
