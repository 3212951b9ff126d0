"""Whatever a user gets wrong ends in one sentence on stderr, exit code 2 and no half-written folder."""

import errno
import io
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ALPHABET, tiny_checkpoint

from minirl import cli, commands, display
from minirl.model import Transformer
from minirl.tokenizer import Tokenizer
from minirl.train import run as run_module

TASK = "arithmetic:op=sum,digits=1,style=plain"
SMALL = [
    "--steps",
    "4",
    "--prompts",
    "2",
    "--group",
    "2",
    "--max-tokens",
    "4",
    "--eval-prompts",
    "2",
    "--eval-samples",
    "2",
    "--save-every",
    "2",
]
REWARDS = """
import time

def some(prompts, completions, **columns):
    return [float(len(c)) for c in completions]

def raises(prompts, completions, **columns):
    return [1 / 0 for c in completions]

def nan(prompts, completions, **columns):
    return [float("nan") for c in completions]

def infinite(prompts, completions, **columns):
    return [float("inf") for c in completions]

def long(prompts, completions, **columns):
    return [1.0, 1.0]

def text(prompts, completions, **columns):
    return "good"

def texts(prompts, completions, **columns):
    return ["good" for c in completions]

def hangs(prompts, completions, **columns):
    time.sleep(60)

def lines(prompts, completions, **columns):
    return [[1.0] * (c.count("\\n") + 1) for c in completions]

def too_many(prompts, completions, **columns):
    return [[1.0, 0.0] for c in completions]

number = 7
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path, monkeypatch) -> Path:
    """Where the commands run: a checkpoint `model`, rewards in `rewards.py`, and runs go to `run`."""
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(display, "PATIENCE", math.inf)  # no line of progress on stderr, however slow the machine is
    return tmp_path


@pytest.fixture
def complaint(folder, capsys, recwarn) -> Callable[..., str]:
    """Run a command that must fail and leaves nothing but `left`; returns its sentence."""

    def run(*args: str, left: Sequence[str] = ()) -> str:
        before = files(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(list(args))
        assert stop.value.code == 2
        assert files(folder) == sorted([*before, *(folder / name for name in left)])
        assert [str(w.message) for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)] == []
        return sentence(capsys.readouterr().err)

    return run


SAMPLED = ("runs", "runs/eval-1", "runs/eval-1/completions.jsonl")  # of an evaluation that could not be scored


def sentence(stderr: str) -> str:
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    assert stderr.startswith("minirl: ")
    assert "Traceback" not in stderr
    return stderr


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def grpo(*args: str, task: str = TASK) -> list[str]:
    return ["grpo", "--model", "model", "--task", task, "--out", "run", *SMALL, *args]


def trained(*args: str) -> None:
    """A whole run, without its plot."""
    commands.train_grpo(cli.parse("grpo", grpo(*args)[1:]))


def sft(*args: str) -> list[str]:
    return ["sft", "--model", "model", "--data", "data.jsonl", "--out", "run", "--steps", "2", *args]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def edit_config(**changes) -> None:
    content = json.loads(Path("model/config.json").read_text()) | changes
    Path("model/config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(change: Callable[[dict], object]) -> None:
    tensors = load_file("model/model.safetensors")
    change(tensors)
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-100])


Q = "model.layers.0.self_attn.q_proj.weight"
CHECKPOINTS = {
    "no folder": (lambda: shutil.rmtree("model"), ["model", "does not exist"]),
    "a file for a folder": (lambda: (shutil.rmtree("model"), Path("model").touch()), ["model is a file"]),
    "no config.json": (lambda: os.remove("model/config.json"), ["model/config.json does not exist"]),
    "broken config.json": (lambda: cut("model/config.json"), ["model/config.json is not valid JSON", "line"]),
    "config.json holds a list": (lambda: Path("model/config.json").write_text("[]"), ["config.json", "list"]),
    "unknown model_type": (lambda: edit_config(model_type="mamba"), ["config.json", "'mamba'", "llama"]),
    "a key is missing": (lambda: edit_config(hidden_size=None), ["config.json", "'hidden_size' is missing"]),
    "a key is no number": (lambda: edit_config(hidden_size="32"), ["'hidden_size'", "'32'", "whole number"]),
    "no weights": (lambda: os.remove("model/model.safetensors"), ["model holds no model.safetensors"]),
    "a tensor is missing": (lambda: edit_tensors(lambda t: t.pop(Q)), [Q, "missing"]),
    "a tensor too many": (lambda: edit_tensors(lambda t: t.update(extra=torch.ones(2))), ["'extra'", "no place"]),
    "a tensor is misshapen": (
        lambda: edit_tensors(lambda t: t.update({Q: torch.ones(3, 32)})),
        [Q, "[3, 32]", "[32, 32]"],
    ),
    "weights are cut off": (lambda: cut("model/model.safetensors"), ["model.safetensors is truncated"]),
    "weights are garbage": (
        lambda: Path("model/model.safetensors").write_bytes(b"\x07" * 500),
        ["model.safetensors is truncated or no safetensors file"],
    ),
    "weights are NaN": (lambda: edit_tensors(lambda t: t[Q].fill_(math.nan)), ["NaN", "weights"]),
    "no tokenizer.json": (lambda: os.remove("model/tokenizer.json"), ["model/tokenizer.json does not exist"]),
    "broken tokenizer.json": (lambda: cut("model/tokenizer.json"), ["model/tokenizer.json", "JSON"]),
    "tokenizer.json of nothing": (
        lambda: Path("model/tokenizer.json").write_text("{}"),
        ["model/tokenizer.json cannot be read"],
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_broken_checkpoint(what, complaint):
    damage, words = CHECKPOINTS[what]
    damage()
    said = complaint(*grpo())
    assert all(word in said for word in words), said


@pytest.mark.parametrize("command", ["generate --prompts 1+2=", f"eval --task {TASK}", "sft --data data.jsonl"])
def test_every_command_names_what_is_wrong_with_a_checkpoint(command, complaint):
    Path("data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}')
    edit_tensors(lambda t: t[Q].fill_(math.nan))
    name, *rest = command.split()
    said = complaint(name, "--model", "model", *rest)
    assert "NaN" in said or "not finite" in said


def test_a_path_with_one_slash_is_no_hub_id_where_its_first_folder_is_here(complaint, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = complaint("generate", "--model", "models/smollm2", "--prompts", "1")
    assert "models/smollm2 does not exist" in said
    assert "make it as examples/gguf_to_hf.py says" in said
    assert "needs huggingface_hub" in complaint("generate", "--model", "runs/sums", "--prompts", "1")
    Path("runs").mkdir()
    assert "runs/sums does not exist: check the path\n" in complaint(
        "generate", "--model", "runs/sums", "--prompts", "1"
    )


@pytest.mark.parametrize("command", ["generate --prompts 1+2=", f"eval --task {TASK}", "sft --data data.jsonl"])
def test_a_stop_token_that_cannot_be_drawn(command, complaint):
    Path("data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}')
    file = Path("model/generation_config.json")
    file.write_text(json.dumps({"eos_token_id": [2, 19]}))
    name, *rest = command.split()
    said = complaint(name, "--model", "model", *rest)
    assert "stop token 19 (eos_token_id) is outside the model's vocabulary of 19" in said
    assert "stop token 19" in complaint(*grpo())


def test_a_tokenizer_that_knows_more_than_its_model(complaint):
    Path("data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n{"prompt": "1+2=", "completion": "!"}')
    Tokenizer.from_chars(ALPHABET + "!").save_pretrained("model")
    assert "data.jsonl, line 2 holds token 19, outside the model's vocabulary of 19" in complaint(*sft())


# --- tasks and data --------------------------------------------------------------------------------------------------

TASKS = {
    "arithmetik": ["task 'arithmetik' is unknown", "did you mean 'arithmetic'"],
    "arithmetic:op=sum,digit=1": ["no option 'digit'", "did you mean 'digits'"],
    "arithmetic:op=root": ["op 'root' is unknown", "sum"],
    "arithmetic:digits=many": ["digits", "'many'", "int"],
    "arithmetic:digits": ["'digits'", "option=value"],
    "arithmetic:digits=1,train_size=5000": ["100 prompts", "train_size=5000"],
    "arithmetic:digits=1,style=plain,train_size=0": ["no training examples"],
    "arithmetic:digits=1,style=plain,heldout_size=0": ["no held-out examples"],
    "arithmetic:digits=1": ["no chat template", "give --task arithmetic:digits=1,style=plain"],
    "arithmetic:style=chat,op=sum": ["give --task arithmetic:op=sum,style=plain"],
    "arithmetic": ["give --task arithmetic:style=plain"],
    "arithmetic:digits=1,digits=2": ["option digits is given 2 times"],
    "gsm8k:path=": ["option path is empty"],
    "arithmetic:digits=40,style=plain": ["prompt 0 of task arithmetic: its prompt has 8", "context holds 32"],
    "arithmetic:digits=1,style=plain,template={a} and {b}": ["' '", "no token"],
    "missing.jsonl": ["missing.jsonl: there is no such file"],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_that_cannot_be(task, complaint):
    said = complaint(*grpo(task=task))
    assert all(word in said for word in TASKS[task]), said


LINES = {
    '{"prompt": "1=", "answer": "1"': ["data.jsonl, line 2", "not valid JSON"],
    '{"question": "1="}': ["data.jsonl, line 2", "no 'prompt'", "question"],
    '{"prompt": ""}': ["data.jsonl, line 2", "empty"],
    '{"prompt": 3}': ["data.jsonl, line 2", "is a number"],
    "[1]": ["data.jsonl, line 2", "list"],
    '{"prompt": "\\ud800"}': ["data.jsonl, line 2", "surrogate"],
}


@pytest.mark.parametrize("line", LINES)
def test_a_broken_line_of_a_task(line, complaint):
    Path("data.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n' + line + "\n")
    said = complaint(*grpo(task="data.jsonl"))
    assert all(word in said for word in LINES[line]), said


def test_a_task_of_no_lines(complaint):
    Path("data.jsonl").write_text("\n")
    assert "data.jsonl: the file is empty" in complaint(*grpo(task="data.jsonl"))


def test_a_task_without_answers(complaint):
    """Nothing can be scored, neither held out nor in training."""
    Path("data.jsonl").write_text("".join(f'{{"prompt": "1+{i}="}}\n' for i in range(9)))
    said = complaint("eval", "--model", "model", "--task", "data.jsonl", "--max-tokens", "4", left=SAMPLED)
    assert "'correct'" in said
    assert "answer" in said
    assert "'correct'" in complaint(*grpo(task="data.jsonl"))


DEMONSTRATIONS = {
    '{"prompt": "1=", "completion": "1"': ["data.jsonl, line 2", "not valid JSON"],
    '{"prompt": "1="}': ["data.jsonl, line 2", "'completion'"],
    '{"completion": "1"}': ["data.jsonl, line 2", "'prompt'"],
    '{"prompt": "1=", "completion": 1}': ["data.jsonl, line 2", "'completion' is a number"],
    '{"prompt": "", "completion": "1"}': ["data.jsonl, line 2", "0 tokens"],
    '{"prompt": "one", "completion": "1"}': ["no token for 'o'"],
    '{"prompt": 5, "completion": "1"}': ["data.jsonl, line 2", "'prompt'"],
    '{"prompt": [], "completion": "1"}': ["data.jsonl, line 2", "'prompt'"],
    '{"prompt": [{"role": "user"}], "completion": "1"}': ["data.jsonl, line 2", "'prompt'"],
    json.dumps({"prompt": "1" * 32, "completion": "1"}): ["data.jsonl, line 2", "32 tokens", "31 fit"],
}


@pytest.mark.parametrize("line", DEMONSTRATIONS)
def test_a_broken_demonstration(line, complaint):
    Path("data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n' + line + "\n")
    said = complaint(*sft())
    assert all(word in said for word in DEMONSTRATIONS[line]), said


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe{}"])
def test_demonstrations_that_are_none(content, complaint):
    if content is not None:
        Path("data.jsonl").write_bytes(content)
    said = complaint(*sft())
    assert "data.jsonl" in said
    words = {None: "no such file", b"\xff\xfe{}": "data.jsonl, line 1: not valid JSON"}
    assert words.get(content, "holds no examples") in said


# --- rewards ---------------------------------------------------------------------------------------------------------

WRONG_REWARDS = {
    "nothing.py:some=1": ["no Python file nothing.py"],
    "rewards.py:sum=1": ["no function 'sum'", "raises"],
    "rewards.py:number=1": ["no function 'number'"],
    "formal=1": ["reward 'formal' is unknown", "did you mean 'format'"],
    "format": ["'format'", "name=weight"],
    "format=much": ["'format=much'", "name=weight"],
    "format=nan": ["'format=nan'", "name=weight"],
    "rewards.py:raises=1": ["rewards.py:raises", "ZeroDivisionError", "completion 0"],
    "rewards.py:nan=1": ["rewards.py:nan", "none of 4 completions", "NaN"],
    "rewards.py:infinite=1": ["rewards.py:infinite", "inf", "completion 0"],
    "rewards.py:long=1": ["rewards.py:long", "returned 2 values for 1, not one for each", "prompt"],
    "rewards.py:text=1": ["rewards.py:text", "returned 'good', not a list"],
    "rewards.py:texts=1": ["rewards.py:texts", "'good'", "completion 0"],
}


@pytest.mark.parametrize("spec", WRONG_REWARDS)
def test_a_reward_that_cannot_be_used(spec, complaint):
    said = complaint(*grpo("--rewards", spec))
    assert all(word in said for word in WRONG_REWARDS[spec]), said


def test_rewards_of_steps(complaint):
    """Only for process supervision, and as many as there are lines."""
    said = complaint(*grpo("--rewards", "rewards.py:lines=1"))
    assert "rewards.py:lines' returned [1.0], which is no number" in said
    assert "grpo_process" in said
    said = complaint(*grpo("--preset", "grpo_ps", "--rewards", "rewards.py:too_many=1"))
    assert "returned 2 step rewards, not one for each of 1 lines" in said
    trained("--preset", "grpo_ps", "--rewards", "rewards.py:lines=1", "--steps", "1")


def test_a_reward_file_that_cannot_be_imported(complaint):
    Path("rewards.py").write_text("import nothing_of_that_name")
    said = complaint(*grpo("--rewards", "rewards.py:some=1"))
    assert "rewards.py:some cannot be loaded (ModuleNotFoundError" in said
    assert "nothing_of_that_name" in said


def test_a_reward_that_hangs_is_killed_and_named(complaint):
    said = complaint(*grpo("--rewards", "rewards.py:hangs=1", "--reward-timeout", "0.2"))
    assert "all of 4 completions took a reward too long" in said
    assert "'rewards.py:hangs' gave no result within 0.2 s for prompt" in said


def test_the_good_reward_of_the_file_runs(folder, capsys):
    """So it is not the file that the others fail on."""
    cli.main(grpo("--rewards", "rewards.py:some=1", "--steps", "1"))
    assert capsys.readouterr().err == ""
    assert (folder / "run" / "model" / "config.json").exists()


# --- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    "frobnicate": ["no command 'frobnicate'", "demo"],
    "gpro": ["no command 'gpro'", "did you mean 'grpo'"],
    "grpo": ["--model"],
    "sft --model model": ["--data"],
    "grpo --model model --step 5": ["no option '--step'", "did you mean '--steps'"],
    "grpo --model model --loss.eps 5": ["no option '--loss.eps'", "did you mean"],
    "grpo --model model --temprature=2": ["did you mean '--temperature'"],
    "grpo --model model --reward_timeuot 2": ["did you mean '--reward-timeout'"],
    "grpo --model model extra": ["'extra'"],
    "grpo --model": ["--model"],
    "grpo --model model --steps many": ["--steps", "'many'"],
    "grpo --model model --steps 0": ["steps = 0", "at least 1"],
    "grpo --model model --save-every 0": ["save_every = 0", "at least 1"],
    "grpo --model model --eval-prompts 0": ["eval_prompts = 0", "at least 1"],
    "grpo --model model --lr 0": ["lr = 0.0", "positive"],
    "grpo --model model --lr nan": ["lr = nan", "positive"],
    "grpo --model model --lr inf": ["lr = inf", "finite"],
    "grpo --model model --temperature 0": ["temperature = 0.0", "positive"],
    "grpo --model model --top-p 2": ["top_p = 2.0", "at most 1"],
    "grpo --model model --mini-batches 17": ["mini_batches = 17", "16 prompts"],
    "grpo --model model --overlong-cache 500": ["overlong_cache = 500", "max_tokens"],
    "grpo --model model --schedule sometimes": ["'sometimes'", "cosine"],
    "grpo --model model --advantage best": ["'best'", "rloo"],
    "grpo --model model --device tpu": ["'tpu'", "cpu, cuda"],
    "grpo --model model --device cuda:99": ["'cuda:99'", "there is none"],
    "grpo --model model --dtype float16": ["'float16'", "bfloat16"],
    "grpo --model model --preset gppo": ["preset 'gppo' is unknown", "gspo"],
    "grpo --model model --preset ppo": ["preset 'ppo'", "critic"],
    "grpo --model model --loss.kl k1": ["'k1'", "k3"],
    "grpo --model model --loss.aggregation seq_sum_const": ["const_length"],
    "grpo --model model --loss.dual-clip 0.5": ["dual_clip must be > 1"],
    "grpo --model model --reward-timeout 0": ["reward_timeout = 0.0", "positive"],
    "grpo --model model --reward-timeout nan": ["reward_timeout = nan", "positive"],
    "grpo --model model --kl-in-reward nan": ["kl_in_reward = nan", "negative"],
    "grpo --model model --kl-in-reward -0.1": ["kl_in_reward = -0.1", "negative"],
    "grpo --model model --weight-decay -1": ["weight_decay = -1.0", "negative"],
    "grpo --model model --truncation-penalty inf": ["truncation_penalty = inf", "finite"],
    "grpo --model model --warmup -1": ["warmup = -1", "negative"],
    "grpo --model model --eval-every -1": ["eval_every = -1", "negative"],
    "grpo --model model --shown -1": ["shown = -1", "negative"],
    "grpo --model model --seed -1": ["seed = -1", "negative"],
    "grpo --model model --group 1": ["group = 1", "'grpo' compares", "2 at least"],
    "grpo --model model --group 1 --advantage reinforce --baseline group_mean": ["group = 1", "'reinforce' compares"],
    "grpo --model model --group 1 --advantage reinforce --dynamic-sampling": ["group = 1", "dynamic_sampling compares"],
    "grpo --model model --max-gen-batches 0": ["max_gen_batches = 0", "at least 1"],
    "grpo --model model --preset ppo_penalty": ["preset 'ppo_penalty' needs a critic, which minirl ppo trains", "rloo"],
    "grpo --model model --preset grpo_ps --kl-in-reward 0.1": ["kl_in_reward", "grpo_process", "steps"],
    "grpo --model model --preset grpo_ps --overlong-cache 9": ["overlong_cache", "grpo_process", "steps"],
    "grpo --model model --preset grpo_ps --truncation penalty": ["truncation = penalty", "grpo_process", "steps"],
    "grpo --model model --exclude-from-baseline": ["exclude_from_baseline", "truncation = mask"],
    "grpo --model model --ref-reset-every 3": ["ref_reset_every = 3", "no reference"],
    "grpo --model model --ref-reset-every -3": ["ref_reset_every = -3", "negative"],
    "grpo --model model --adaptive-kl ziegler": ["adaptive_kl = 'ziegler'", "starts at 0", "kl_in_reward"],
    "grpo --model model --adaptive-kl ppo_penalty": ["adaptive_kl = 'ppo_penalty'", "loss.kl_old_coef"],
    "grpo --model model --kl-target 0": ["kl_target = 0.0", "positive"],
    "grpo --model model --kl-horizon 0": ["kl_horizon = 0", "at least 1"],
    "grpo --model model --target-kl 0.1": ["target_kl = 0.1", "one update", "epochs or mini_batches"],
    "grpo --model model --target-kl -1 --epochs 2": ["target_kl = -1.0", "positive"],
    "grpo --model model --gamma 1.5": ["gamma = 1.5", "at most 1"],
    "ppo": ["--model"],
    "ppo --model model --task nowhere.jsonl": ["nowhere.jsonl"],
    "ppo --model model --critic none": ["'none'", "shared"],
    "ppo --model model --critics own": ["no option '--critics'", "did you mean '--critic'"],
    "ppo --model model --critic-lr 0": ["critic_lr = 0.0", "positive"],
    "ppo --model model --critic-warmup -1": ["critic_warmup = -1", "negative"],
    "ppo --model model --critic-warmup 100": ["critic_warmup = 100", "100 steps"],
    "ppo --model model --lam 1.1": ["lam = 1.1", "from 0 to 1"],
    "ppo --model model --gamma 0": ["gamma = 0.0", "positive"],
    "ppo --model model --value-clip 0": ["value_clip = 0.0", "positive"],
    "ppo --model model --value-coef inf": ["value_coef = inf", "finite"],
    "ppo --model model --truncation penalty --bootstrap-truncated": ["bootstrap_truncated", "choose one"],
    "ppo --model model --preset grpo": ["preset 'grpo' has no critic, minirl grpo runs it", "ppo, ppo_penalty"],
    "ppo --model model --preset pop": ["preset 'pop' is unknown", "ppo, ppo_penalty"],
    "ppo --model model --advantage grpo": ["no option '--advantage'"],
    "sft --model model --data data.jsonl --batch 0": ["batch = 0", "at least 1"],
    "sft --model model --data data.jsonl --lr -1": ["lr = -1.0", "positive"],
    "sft --model model --data data.jsonl --weight-decay nan": ["weight_decay = nan", "negative"],
    "sft --model model --data data.jsonl --warmup -5": ["warmup = -5", "negative"],
    "generate --model model --prompts": ["--prompts is empty"],
    "generate --model model --prompts 1+2= --n 0": ["n = 0", "from 1"],
    "generate --model model --prompts 1+2= --slots 0": ["slots = 0"],
    "generate --model model --prompts 1+2= --dtype half": ["'half'", "bfloat16"],
    "generate --model model --prompts one": ["no token for 'o'"],
    f"generate --model model --prompts {'1' * 32}": ["prompt 0 has 32 tokens", "context holds 32"],
    "eval --model model --prompts 0": ["prompts = 0", "at least 1"],
    "eval --model model --prompts -5": ["prompts = -5", "at least 1"],
    "eval --model model --samples 0": ["samples = 0", "at least 1"],
    "eval --model model --max-tokens -1": ["max_tokens = -1", "from 1"],
    "eval --model model --shown -1": ["shown = -1", "negative"],
    "eval --model model --reward-timeout -1": ["reward_timeout = -1.0", "positive"],
    "report --run nowhere": ["nowhere/metrics.jsonl", "folder of a run"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_a_command_that_cannot_be(command, complaint):
    args = command.split()
    if "grpo --model model" in command and "--task" not in args:
        args += ["--task", TASK]
    said = complaint(*args)
    assert all(word in said for word in OPTIONS[command]), said
    assert "value error" not in said


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])  # what tyro draws its boxes with
def test_a_refusal_of_ours_stands_alone(encoding, complaint, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert complaint("demo", "--seeds", "-1") == "minirl: seeds = (-1,): give at least one, each once, none negative\n"
    assert complaint("grpo", "--model", "m", "--loss.dual-clip", "0.5").startswith("minirl: PolicyLoss: dual_clip must")
    for wrong in ("--schedule lol", "--steps many", "--steps"):
        assert "--- " not in complaint("grpo", "--model", "m", *wrong.split())


# --- folders of runs -------------------------------------------------------------------------------------------------


def test_out_that_holds_a_run_is_left_alone(complaint):
    trained("--steps", "1")
    content = Path("run/metrics.jsonl").read_bytes()
    said = complaint(*grpo())
    assert "run already holds a run" in said
    assert "--resume" in said
    assert Path("run/metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize("left", ["checkpoints/step-000002/state.json", "metrics.jsonl"])
def test_out_that_holds_what_is_left_of_a_run_is_not_mixed_with_another(left, complaint):
    Path("run", left).parent.mkdir(parents=True)
    Path("run", left).write_text('{"step": 2}\n')
    assert "run already holds a run" in complaint(*grpo())


@pytest.mark.parametrize("command", ["grpo", "ppo", "sft"])
def test_nothing_to_resume(command, complaint):
    assert "run holds no run to resume" in complaint(command, "--resume", "--out", "run")
    assert "run holds no run to resume" in complaint(command, "--resume=True", "--out=run")
    Path("run").mkdir()
    assert "run holds no run to resume" in complaint(command, "--resume", "--out", "run")


def test_a_changed_config_is_refused_with_the_difference(complaint):
    trained("--steps", "1")
    said = complaint("grpo", "--resume", "--out", "run", "--lr", "0.5", "--loss.eps-high", "0.3")
    assert "loss.eps_high: 0.2 -> 0.3" in said
    assert "lr: 1e-06 -> 0.5" in said


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_a_changed_data_file_is_refused(command, complaint):
    line = '{"prompt": "%d+2=", "answer": "3", "completion": "3"}\n'
    Path("data.jsonl").write_text("".join(line % i for i in range(4)))
    args = grpo("--steps", "1", task="data.jsonl") if command == "grpo" else sft("--steps", "1")
    getattr(commands, f"train_{command}")(cli.parse(command, args[1:]))
    Path("data.jsonl").write_text("".join(line % i for i in range(5)))
    assert "the data of the run in run has changed" in complaint(command, "--resume", "--out", "run")
    said = complaint(command, "--resume", "--out", "run", "--lr", "0.5")
    assert "lr: " in said
    assert "hash" not in said


@pytest.mark.parametrize(
    ("change", "word"),
    [({"frob": 1}, "'frob'"), ({"loss": {"frob": 1}}, "'frob'"), ({"loss": 3}, "config.json"), ({"lr": 0}, "lr")],
)
def test_a_stored_config_that_does_not_fit(change, word, complaint):
    trained("--steps", "1")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | change))
    assert word in complaint("grpo", "--resume", "--out", "run")


def test_the_run_of_another_command_is_not_resumed(complaint):
    trained("--steps", "1")
    assert "another command" in complaint("sft", "--resume", "--out", "run")
    assert "another command" in complaint("ppo", "--resume", "--out", "run")


@pytest.mark.parametrize("command", [grpo, sft])
def test_a_file_in_the_place_of_the_folder(command, complaint):
    Path("data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}')
    Path("run").write_text("something else")
    assert "run is a file" in complaint(*command())
    assert "run is a file" in complaint(*command("--out", "run/below"))


def test_a_folder_that_is_not_writable(folder, complaint, monkeypatch):
    """Asked of the system before the work; root may write anywhere, so the answer is put in its mouth."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    said = complaint(*grpo())
    assert f"{folder} is not writable" in said


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_cut_off_file_of_a_checkpoint_is_named_on_resume(name, complaint):
    trained()
    cut_off = Path("run/checkpoints/step-000004") / name
    cut_off.write_bytes(cut_off.read_bytes()[:-8])
    assert f"step-000004/{name}" in complaint("grpo", "--resume", "--out", "run")


@contextmanager
def small_files(limit: int):
    """No file may grow beyond the limit, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_for_safetensors(tensors, path) -> None:
    with small_files(10_000):
        save_file(tensors, path)


def full_for_all(tensors, path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("full", [full_for_safetensors, full_for_all])
def test_a_full_disk_leaves_the_checkpoint_before(full, folder, capsys, monkeypatch):
    saves = itertools.count(1)
    monkeypatch.setattr(run_module, "save_file", lambda *args: (full if next(saves) == 2 else save_file)(*args))
    with pytest.raises(SystemExit) as stop:
        cli.main(grpo())
    assert stop.value.code == 2
    said = sentence(capsys.readouterr().err)
    assert "step-000004" in said
    assert "space" in said
    assert "earlier checkpoints are intact" in said
    (left,) = (folder / "run" / "checkpoints").iterdir()  # nothing hidden beside it either
    assert left.name == "step-000002"
    commands.train_grpo(cli.parse("grpo", ["--resume", "--out", "run"]))
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_memory_that_is_not_there(complaint, monkeypatch):
    def greedy(*args, **kwargs):
        torch.empty(1 << 50)

    monkeypatch.setattr(Transformer, "from_pretrained", greedy)
    Path("data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}')
    assert "lower --slots or --micro-batch-tokens, or give --recompute" in complaint(*grpo())
    assert "lower --micro-batch-tokens, or give --recompute" in complaint(*sft())
    assert complaint("eval", "--model", "model") == "minirl: out of memory: lower --slots\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_way_of_the_system_to_say_that_memory_is_short(error, complaint, monkeypatch):
    def greedy(*args, **kwargs):
        raise error

    monkeypatch.setattr(Transformer, "from_pretrained", greedy)
    assert complaint(*grpo()).startswith("minirl: out of memory: lower --slots")


def test_a_bug_of_ours_is_not_hidden(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(Transformer, "from_pretrained", broken)
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        cli.main(grpo())


# --- the program itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words", "left"),
    [
        (["grpo", "--model", "model", "--frob"], ["no option '--frob'"], ()),
        (grpo("--rewards", "rewards.py:raises=1"), ["ZeroDivisionError", "completion 0"], ()),
        (["eval", "--model", "model", "--task", "data.jsonl"], ["'correct'", "answer"], SAMPLED),
    ],
)
def test_the_program_says_one_sentence_and_exits_with_two(args, words, left, folder):
    Path("data.jsonl").write_text('{"prompt": "1+2="}\n{"prompt": "2+2="}\n')
    before = files(folder)
    done = subprocess.run([sys.executable, "-m", "minirl.cli", *args], capture_output=True, text=True)
    assert done.returncode == 2
    said = sentence(done.stderr)
    assert all(word in said for word in words), said
    assert files(folder) == sorted([*before, *(folder / name for name in left)])
