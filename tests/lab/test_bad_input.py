"""Whatever a user gets wrong ends in one sentence on stderr, exit code 2 and no half-written folder."""

import errno
import io
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import ALPHABET, all_files, sentence
from safetensors.torch import load_file, save_file

from minirl import policy, run
from minirl.lab import cli, commands, display
from minirl.manifest import read_signed, write_signed
from minirl.model import Transformer
from minirl.tokenizer import Tokenizer

TASK = "arithmetic:op=sum,digits=1,style=plain"
SMALL = "--steps 4 --prompts 2 --group 2 --max-tokens 4 --eval-prompts 2 --eval-samples 2 --save-every 2"
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


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch) -> Path:
    """Where the commands run: a checkpoint `model`, rewards in `rewards.py`, and runs go to `run`."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(display, "PATIENCE", math.inf)  # no line of progress on stderr, however slow the machine is
    return tmp_path


@pytest.fixture
def complaint(folder, complaint, recwarn) -> Callable[..., str]:
    """As everywhere, and in that folder; nor may a warning be seen beside the sentence."""

    def run(*args: str, left: Sequence[str] = ()) -> str:
        said = complaint(*args, left=left)
        assert [str(w.message) for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)] == []
        return said

    return run


SAMPLED = ["runs", "runs/eval-1", "runs/eval-1/completions.jsonl"]  # left by an evaluation that could not be scored


def grpo(*args: str, task: str = TASK) -> list[str]:
    return ["grpo", "--model", "model", "--task", task, "--out", "run", *SMALL.split(), *args]


def trained(*args: str) -> None:
    """A whole run, without its plot."""
    commands.train_grpo(cli.parse("grpo", grpo(*args)[1:]))


def sft(*args: str) -> list[str]:
    return ["sft", "--model", "model", "--data", "data.jsonl", "--out", "run", "--steps", "2", *args]


# --- command lines and lines of data, from bad_input.toml ------------------------------------------------------------

GROUPS = tomllib.loads(Path(__file__).with_name("bad_input.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("group", "case"), [(name, case) for name, group in GROUPS.items() for case in group["says"]])
def test_what_is_wrong_is_said_in_one_sentence(group, case, complaint):
    about = GROUPS[group]
    for name, content in about.get("files", {}).items():
        Path(name).write_text(content.replace("CASE", case), encoding="utf-8")
    said, words = complaint(*shlex.split(about["run"].replace("CASE", case))), about["says"][case]
    assert all(word in said for word in ([words] if isinstance(words, str) else words)), said
    assert "value error" not in said


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
    "broken config.json": (lambda: cut("model/config.json"), ["model/config.json: not valid JSON", "line"]),
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
    assert "nan" in said.lower() or "not finite" in said


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


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe{}"])
def test_demonstrations_that_are_none(content, complaint):
    if content is not None:
        Path("data.jsonl").write_bytes(content)
    said = complaint(*sft())
    assert "data.jsonl" in said
    words = {None: "no such file", b"\xff\xfe{}": "data.jsonl, line 1: not valid JSON"}
    assert words.get(content, "holds no examples") in said


# --- rewards ---------------------------------------------------------------------------------------------------------


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
    [
        ({"frob": 1}, "'frob'"),
        ({"loss": {"frob": 1}}, "'frob'"),
        ({"loss": 3}, "config.json"),
        ({"lr": 0}, "lr"),
        ({"device": 5}, "'device' is a number"),
        ({"rewards": -0.0}, "'rewards'"),
        ({"model": ["a"]}, "'model' is a list"),
        ({"loss": {"kl_coef": "x"}}, "'loss'"),
        ({"steps": True}, "'steps'"),
        ({"template": {"a": []}}, "'template'"),
    ],
)
def test_a_stored_config_that_does_not_fit(change, word, complaint):
    trained("--steps", "1")
    config = read_signed(Path("run/config.json"))
    write_signed(Path("run/config.json"), config | change)
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
def test_a_cut_off_file_of_a_checkpoint_is_named_and_the_one_before_taken(name, complaint, capsys):
    trained()
    for step in (4, 2):
        cut_off = Path(f"run/checkpoints/step-{step:06d}") / name
        cut_off.write_bytes(cut_off.read_bytes()[:-8])
        if step == 4:
            cli.main(["grpo", "--resume", "--out", "run"])
            assert (
                f"step-000004 is damaged ({name} has changed) and set aside: going on from step-000002"
                in capsys.readouterr().out
            )
            assert Path("run/checkpoints/set-aside-step-000004").is_dir()
            shutil.rmtree("run/checkpoints/step-000004")
    said = complaint("grpo", "--resume", "--out", "run")
    assert "no checkpoint of the run in run is whole" in said and f"step-000002 is damaged ({name} has changed)" in said


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
    monkeypatch.setattr(policy, "save_file", lambda *args: (full if next(saves) == 2 else save_file)(*args))
    with pytest.raises(SystemExit) as stop:
        cli.main(grpo())
    assert stop.value.code == 2
    said = sentence(capsys.readouterr().err)
    assert "step-000004" in said
    assert "space; the 4 steps are saved: add --resume" in said
    left = {path.name for path in (folder / "run" / "checkpoints").iterdir()}  # nothing hidden beside them either
    assert left == {"step-000002", "step-000004"}
    commands.train_grpo(cli.parse("grpo", ["--resume", "--out", "run"]))
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_a_disk_that_stays_full_leaves_the_checkpoint_before(folder, capsys, monkeypatch):
    monkeypatch.setattr(run, "FULL_DISK_WAIT", 0.2)
    saves = itertools.count(1)
    monkeypatch.setattr(policy, "save_file", lambda *args: (full_for_all if next(saves) >= 2 else save_file)(*args))
    with pytest.raises(SystemExit):
        cli.main(grpo())
    said = capsys.readouterr()
    assert "saving failed too" in said.err and "the last checkpoint is run/checkpoints/step-000002" in sentence(
        said.err
    )
    assert said.out.count("the disk of run is full: free some space, and the run is saved") > 0
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-000002"]


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


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnSgeqrf`",
        "NCCL error in: /pytorch/torch/csrc/nccl.cpp:328, unhandled system error",
        torch.AcceleratorError("the device is lost") if hasattr(torch, "AcceleratorError") else "CUDA driver error: x",
    ],
)
def test_every_library_of_the_gpu_ends_in_one_sentence(text, complaint, monkeypatch):
    def fails(*args, **kwargs):
        raise text if isinstance(text, RuntimeError) else RuntimeError(text)

    monkeypatch.setattr(Transformer, "from_pretrained", fails)
    first = str(text).splitlines()[0]
    assert complaint("eval", "--model", "model") == f"minirl: the GPU failed ({first}): look at its driver and memory\n"


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
        (["eval", "--model", "model", "--task", "data.jsonl"], ["'correct'", "answer"], SAMPLED),
    ],
)
def test_the_program_says_one_sentence_and_exits_with_two(args, words, left, folder):
    Path("data.jsonl").write_text('{"prompt": "1+2="}\n{"prompt": "2+2="}\n')
    before = all_files()
    done = subprocess.run([sys.executable, "-m", "minirl.lab.cli", *args], capture_output=True, text=True)
    assert done.returncode == 2
    said = sentence(done.stderr)
    assert all(word in said for word in words), said
    assert set(all_files()) - set(before) == {Path(name) for name in left}
