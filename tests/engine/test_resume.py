"""A run that was killed or stopped, and resumed, leaves the same bits as one that was not."""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from helpers import check_same, read_jsonl, tiny_checkpoint, untimed
from safetensors.torch import load_file

from minirl.lab import cli, commands
from minirl.model import ScalarHead, Transformer
from minirl.run import FORMAT, Run, _truncate

GRPO = """grpo --task arithmetic:op=sum,digits=1,style=plain --steps 6 --prompts 4 --group 4 --mini-batches 2
    --max-tokens 6 --loss.kl k3 --loss.kl-coef 0.05 --top-p 0.9 --lr 1e-3 --warmup 2 --schedule linear
    --weight-decay 0.01 --eval-every 2 --eval-prompts 4 --eval-samples 2 --save-every 2 --shown 3
    --rewards repetition=1 slow.py:slow=0"""
ARITHMETIC = """--task arithmetic:op=sum,digits=1,style=plain --steps 6 --prompts 3 --group 3 --max-tokens 6 --lr 1e-3
    --eval-every 0 --eval-prompts 2 --eval-samples 1 --save-every 2"""
FAMILY = {  # and how many optimizer steps each takes in a step
    "ppo": (
        f"""ppo {ARITHMETIC} --adaptive-kl ziegler --kl-horizon 50 --ref-reset-every 2 --critic-warmup 1 --epochs 2
        --mini-batches 2 --target-kl 0.5 --bootstrap-truncated --critic-lr 1e-2
        --rewards slow.py:slow=1""",
        8,
    ),
    "penalty": (
        f"ppo {ARITHMETIC} --preset ppo_penalty --critic shared --epochs 2 --dtype bfloat16 --rewards slow.py:slow=1",
        4,
    ),
    "dapo": (
        f"""grpo {ARITHMETIC} --preset dapo --mini-batches 1 --task data.digits.jsonl --group 8 --max-tokens 2
        --max-gen-batches 4 --rewards repetition=1""",
        1,
    ),
    "reinforce": (
        f"""grpo {ARITHMETIC} --preset reinforce --ref-reset-every 3 --loss.kl k3 --loss.kl-coef 0.1
        --rewards slow.py:slow=1""",
        1,
    ),
    "refresh": (
        f"""grpo {ARITHMETIC} --task data.digits.jsonl --group 8 --rewards model:judge=1 correct=0.5
        --loss.kl k3 --loss.kl-coef 0.01 --ref-reset-every 2
        --refresh.every 2 --refresh.lr 1e-3 --refresh.memory 5 --refresh.epochs 2""",
        4,  # its optimizer steps too: 6 of both in two steps, 16 in all
    ),
    "stored": (f"grpo {ARITHMETIC} --data data.triples.jsonl --group 2 --epochs 2", 2),
}
SFT = "sft --data data.jsonl --steps 6 --batch 3 --lr 1e-3 --warmup 2 --save-every 2"
SLOW = """
import time

def slow(prompts, completions, **columns):
    time.sleep(0.02)
    return [len(set(c)) / 6 for c in completions]
"""
STEP = "minirl.optimizer:AdamW.step"
UPDATES = {"grpo": 2, "sft": 1}  # in a step


class Lab:
    """Commands in processes of their own, forked from one that has imported torch already, on one thread each."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, itertools.count()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["minirl.lab.cli", "torch._dynamo", "pytest"])
        tiny_checkpoint(folder / "model")
        (folder / "slow.py").write_text(SLOW)
        lines = ({"prompt": f"{i}+{j}=", "completion": str(i + j)} for i in range(3) for j in range(3))
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = ({"prompt": f"{i}+{j}=", "answer": str(i)} for i in range(10) for j in range(3))
        (folder / "data.digits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = ({"prompt": f"{i}+1=", "completion": str(j), "reward": (i + j) % 3} for i in range(5) for j in range(4))
        (folder / "data.triples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tiny_checkpoint(folder / "judge")
        judge = Transformer.from_pretrained(folder / "judge", scalar_head=ScalarHead(kind="bce"))
        judge.initialise_score(0).save_pretrained(folder / "judge")
        self.references: dict[tuple, Path] = {}

    def args(self, kind: str, dtype: str = "float32") -> list[str]:
        commands = {"grpo": GRPO, "sft": SFT} | {name: command for name, (command, _) in FAMILY.items()}
        args = [*commands[kind].split(), "--model", "model", *(["--dtype", dtype] if kind not in FAMILY else [])]
        args = [arg.replace("model:", f"model:{self.folder}/") for arg in args]
        ours = ("model", "data.", "slow.")
        return [str(self.folder / arg) if arg.startswith(ours) and ":/" not in arg else arg for arg in args]

    def start(self, args: list[str], log: Path, fate: tuple | None = None):
        process = self.context.Process(target=command, args=(args, str(log), fate))
        process.start()
        return process

    def run(self, args: list[str], fate: tuple | None = None) -> tuple[int, str]:
        """Exit code and output."""
        log = self.folder / f"{next(self.number)}.log"
        process = self.start(args, log, fate)
        process.join()
        return process.exitcode, log.read_text()

    def reference(self, kind: str, dtype: str) -> Path:
        """A run that nothing happens to."""
        if (kind, dtype) not in self.references:
            out = self.references[kind, dtype] = self.folder / f"{kind}-{dtype}"
            code, said = self.run([*self.args(kind, dtype), "--out", str(out)])
            assert code == 0, said
        return self.references[kind, dtype]


def command(args: list[str], log: str, fate: tuple | None) -> None:
    """The body of a process. `fate` is (signal, "module:function", n): it comes with the n-th call of the function."""
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - until the process ends
    commands.plot = commands.report = lambda *args: None  # slow, and no part of what is resumed
    if fate:
        number, (module, _, path) = fate[0], fate[1].partition(":")
        *owners, name = path.split(".")
        owner, calls = importlib.import_module(module), itertools.count(1)
        for part in owners:
            owner = getattr(owner, part)
        function = getattr(owner, name)

        def fatal(*args, **kwargs):
            if next(calls) in fate[2:]:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        setattr(owner, name, fatal)
    cli.main(args)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        server = forkserver.ForkServer()  # of our own: another test's has neither our imports nor our environment
        for name in forkserver.__all__:
            patch.setattr(forkserver, name, getattr(server, name))
        patch.setenv("OMP_NUM_THREADS", "1")
        lab = Lab(tmp_path_factory.mktemp("lab"))
        process = lab.start(["--help"], lab.folder / "help.log")  # starts the server, which keeps the environment
        process.join()
        assert process.exitcode == 0
        yield lab


KINDS = pytest.mark.parametrize("kind", ["grpo", "sft"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@KINDS
@DTYPES
def test_the_reference_is_worth_comparing(kind, dtype, lab):
    run = lab.reference(kind, dtype)
    before, after = load_file(lab.folder / "model" / "model.safetensors"), load_file(run / "model/model.safetensors")
    assert all(
        not torch.equal(before[name].to(after[name].dtype), after[name]) for name in before if "norm" not in name
    )
    assert [record["step"] for record in untimed(run)] == list(range(7) if kind == "grpo" else range(1, 7))
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    if kind == "grpo":
        assert len((run / "completions.jsonl").read_text().splitlines()) == 6 * 3
        assert all(record["kl_ref/k3"] is not None for record in untimed(run)[1:])
        assert untimed(run)[-1]["kl_ref/k3"] > 0


@KINDS
@DTYPES
@pytest.mark.parametrize("where", ["update", "save"])
def test_a_killed_run_resumes_to_the_same_bits(kind, dtype, where, lab, tmp_path):
    """At an update after the first checkpoint, or somewhere in a later save: a save is 20 times on the disk or more."""
    reference, updates = lab.reference(kind, dtype), UPDATES[kind]
    update = random.randint(2 * updates + 1, 6 * updates)
    fate = (signal.SIGKILL, STEP, update) if where == "update" else (signal.SIGKILL, "os:fsync", random.randint(25, 55))
    code, said = lab.run([*lab.args(kind, dtype), "--out", str(tmp_path / "run")], fate)
    assert code == -signal.SIGKILL, (fate, said)
    assert not (tmp_path / "run" / "model").exists()
    code, said = lab.run([kind, "--resume", "--out", str(tmp_path / "run")])
    assert code == 0, (fate, said)
    check_same(tmp_path / "run", reference, fate)


@pytest.mark.parametrize("kind", FAMILY)
def test_the_rest_of_the_family_resumes_to_the_same_bits(kind, lab, tmp_path):
    """Critic, its optimizer, the weight of the KL and a reference that was reset are in the checkpoint."""
    reference, (command, updates) = lab.reference(kind, ""), FAMILY[kind]
    fate = (signal.SIGKILL, STEP, random.randint(2 * updates + 1, 4 * updates))
    code, said = lab.run([*lab.args(kind), "--out", str(tmp_path / "run")], fate)
    assert code == -signal.SIGKILL, (fate, said)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()
    code, said = lab.run([command.split()[0], "--resume", "--out", str(tmp_path / "run")])
    assert code == 0, (fate, said)
    check_same(tmp_path / "run", reference, fate)
    last = [record for record in untimed(reference) if record["step"]]
    assert sum(record["updates"] > 0 for record in last) >= (3 if kind == "refresh" else 6)
    assert len({record.get("beta") for record in last}) > 1 or kind not in ("ppo", "penalty")
    assert kind != "refresh" or sum(record.get("refresh/lines", 0) > 0 for record in last) == 3
    if kind == "dapo":
        batches = [record["gen_batches"] for record in last]
        state = json.loads((reference / "checkpoints" / "step-000006" / "state.json").read_text())
        assert len(set(batches)) > 1 and state["cursor"] == sum(batches)


@KINDS
def test_what_changes_no_result_may_change_on_resume_and_is_remembered(kind, lab, tmp_path):
    out, reference = tmp_path / "run", lab.reference(kind, "float32")
    code, _ = lab.run([*lab.args(kind), "--out", str(out)], (signal.SIGKILL, STEP, 3 * UPDATES[kind]))
    assert code == -signal.SIGKILL
    knobs = {"micro_batch_tokens": 9, "recompute": True, "save_every": 1, "device": "cpu"}
    knobs |= {"slots": 3, "shown": 1} if kind == "grpo" else {}
    flags = [f"--{name.replace('_', '-')} {'' if value is True else value}" for name, value in knobs.items()]
    code, said = lab.run([kind, "--resume", "--out", str(out), *" ".join(flags).split()])
    assert code == 0, said
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (reference, out))
    assert after == before | knobs != before
    assert [folder.name for folder in sorted((out / "checkpoints").iterdir())] == ["step-000005", "step-000006"]
    wanted, got = (load_file(folder / "model/model.safetensors") for folder in (reference, out))
    assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)


@KINDS
def test_a_run_killed_at_any_time_resumes_to_the_same_bits(kind, lab, tmp_path):
    """By the clock: at a moment after the first checkpoint, and again after the resumption."""
    out = tmp_path / "run"
    process = lab.start([*lab.args(kind), "--out", str(out)], tmp_path / "log")
    while not (out / "checkpoints" / "step-000002").exists():
        time.sleep(0.001)
    pauses = []
    for _ in range(2):
        pauses.append(random.uniform(0, 0.15))
        time.sleep(pauses[-1])
        process.kill()
        process.join()
        process = lab.start([kind, "--resume", "--out", str(out)], tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (pauses, (tmp_path / "log").read_text())
    check_same(out, lab.reference(kind, "float32"), pauses)


@KINDS
def test_a_run_killed_before_its_first_checkpoint_starts_over(kind, lab, tmp_path):
    fate = (signal.SIGKILL, STEP, 2 * UPDATES[kind])
    code, _ = lab.run([*lab.args(kind), "--out", str(tmp_path / "run")], fate)
    assert code == -signal.SIGKILL
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    code, said = lab.run([kind, "--resume", "--out", str(tmp_path / "run")])
    assert code == 0, said
    check_same(tmp_path / "run", lab.reference(kind, "float32"))


@KINDS
def test_ctrl_c_saves_and_what_is_resumed_ends_with_the_same_bits(kind, lab, tmp_path):
    out = tmp_path / "run"
    code, said = lab.run([*lab.args(kind), "--out", str(out)], (signal.SIGINT, STEP, 3 * UPDATES[kind]))
    assert code == 130
    assert "stopping after this step" in said
    assert f"stopped after step 3; continue with --resume --out {out}" in said
    assert "Traceback" not in said
    assert (out / "checkpoints" / "step-000003").is_dir()
    code, said = lab.run([kind, "--resume", "--out", str(out)])
    assert code == 0, said
    check_same(out, lab.reference(kind, "float32"))


def test_a_run_killed_while_it_drops_an_old_checkpoint_is_tidied(lab, tmp_path):
    """The third save renames its folder, and the fourth removal is that of the first checkpoint."""
    out = tmp_path / "run"
    code, _ = lab.run([*lab.args("sft"), "--out", str(out)], (signal.SIGKILL, "shutil:rmtree", 4))
    assert code == -signal.SIGKILL
    assert len(list((out / "checkpoints").iterdir())) == 3
    assert lab.run(["sft", "--resume", "--out", str(out)])[0] == 0
    check_same(out, lab.reference("sft", "float32"))


def test_ctrl_c_twice_stops_at_once(lab, tmp_path):
    out = tmp_path / "run"
    code, said = lab.run([*lab.args("grpo"), "--out", str(out)], (signal.SIGINT, STEP, 5, 6))
    assert code == 130
    assert "Traceback" not in said
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert lab.run(["grpo", "--resume", "--out", str(out)])[0] == 0
    check_same(out, lab.reference("grpo", "float32"))


def test_ctrl_c_in_the_last_step_lets_the_run_finish(lab, tmp_path):
    out = tmp_path / "run"
    code, said = lab.run([*lab.args("grpo"), "--out", str(out)], (signal.SIGINT, STEP, 12))
    assert code == 0, said
    check_same(out, lab.reference("grpo", "float32"))


@KINDS
def test_a_finished_run_has_nothing_to_resume_and_says_so(kind, lab, tmp_path):
    shutil.copytree(lab.reference(kind, "float32"), tmp_path / "run")
    code, said = lab.run([kind, "--resume", "--out", str(tmp_path / "run")])
    assert code == 0, said
    assert "finished" in said
    assert "all of its 6 steps" in said
    check_same(tmp_path / "run", lab.reference(kind, "float32"))
    shutil.rmtree(tmp_path / "run" / "model")  # killed between the last checkpoint and the model
    assert lab.run([kind, "--resume", "--out", str(tmp_path / "run")])[0] == 0
    check_same(tmp_path / "run", lab.reference(kind, "float32"))


def test_what_a_killed_write_left_is_removed_and_nothing_else(lab, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(lab.reference("sft", "float32"), out)
    (out / ".metrics.jsonl-x1").write_text("half")
    (out / "checkpoints" / ".step-000008-x1").mkdir()
    (out / ".model-x1").mkdir()
    (out / ".notes").write_text("mine")
    assert lab.run(["sft", "--resume", "--out", str(out)])[0] == 0
    (out / ".notes").unlink()
    check_same(out, lab.reference("sft", "float32"))


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    """As texts, step-1000000 comes before step-999999."""
    run = Run(tmp_path / "run", {"lr": 1.0})
    for step in (999_998, 999_999, 1_000_000):
        run.save(step)
    kept = {folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-999999", "step-1000000"}
    (tmp_path / "run" / "checkpoints" / "step-999999 (copy)").mkdir()  # a person's own
    again = Run(tmp_path / "run", {"lr": 1.0}, resume=True)
    assert (again.start, again.checkpoint.name) == (1_000_000, "step-1000000")


# --- the logs --------------------------------------------------------------------------------------------------------

UNUSUAL = "a\u2028b\u2029c\u0085d\x0be\x1cf\r\ng"


def finished(out: Path, steps: int = 0) -> Run:
    """A run that has logged `steps` steps."""
    run = Run(out, {"lr": 1.0})
    for step in range(1, steps + 1):
        run.log(step, {"loss": step / 10})
        log_completion(run, step, prompt=UNUSUAL, completion=UNUSUAL, reward=1.0)
    return run


def log_completion(run: Run, step: int, **fields) -> None:
    run._append("completions.jsonl", {"step": step, **fields})


def test_lines_after_the_checkpoint_go_and_texts_with_any_line_end_stay(tmp_path):
    finished(tmp_path, steps=3)
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content + b'{"step": 4, "loss": 0.')
        _truncate(tmp_path / name, 3)
        assert (tmp_path / name).read_bytes() == content
        _truncate(tmp_path / name, 2)
        assert [record["step"] for record in read_jsonl(tmp_path / name)] == [1, 2]
    assert read_jsonl(tmp_path / "completions.jsonl")[1]["completion"] == UNUSUAL


@pytest.mark.parametrize("tail", [b"\xff\n", b"7\n", b"{}\n", b'{"step": null}\n', b"\n", b"\x00" * 4096])
def test_a_line_that_is_no_record_is_dropped(tail, tmp_path):
    finished(tmp_path, steps=2)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    _truncate(tmp_path / "metrics.jsonl", 9)
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_half_of_a_surrogate_pair_is_logged(tmp_path):
    run = finished(tmp_path)
    log_completion(run, 1, prompt="ä", completion="\ud83d 😀 \udc00", reward=1.0)
    assert read_jsonl(tmp_path / "completions.jsonl")[0]["completion"] == "\ud83d 😀 \udc00"
    assert "ä" in (tmp_path / "completions.jsonl").read_text(encoding="utf-8")


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    run = finished(tmp_path)
    run.log(1, {"a": math.nan, "b": -math.inf, "c": 0.5})
    log_completion(run, 1, reward=math.nan)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 0.5}]
    assert read_jsonl(tmp_path / "completions.jsonl") == [{"step": 1, "reward": None}]


def test_completions_of_the_demo_are_read_line_by_line(tmp_path):
    finished(tmp_path, steps=4)
    assert [line.partition(":")[0] for line in commands._last_completions(tmp_path, 4)] == [
        f"step   {i}" for i in range(1, 5)
    ]


def test_a_run_that_logged_nothing_has_no_folder(tmp_path):
    run = Run(tmp_path / "run", {"lr": 1.0})
    assert not run.out.exists()
    run.log(1, {})
    assert json.loads((run.out / "config.json").read_text()) == {"format": FORMAT, "lr": 1.0}
