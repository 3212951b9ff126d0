"""A run that was killed or stopped, and resumed, leaves the same bits as one that was not."""

import errno
import fcntl
import gc
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Quiet, check_same, read_jsonl, tiny_checkpoint, untimed
from safetensors.torch import load_file, save_file

from minirl.batch import Batch
from minirl.errors import InputError, NonFinite
from minirl.lab import cli, commands
from minirl.manifest import read_signed
from minirl.model import ScalarHead, Transformer
from minirl.run import FORMAT, Run
from minirl.trees import Row

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
STEP, GRAD_NORM = "minirl.optimizer:AdamW.step", "minirl.optimizer:AdamW.grad_norm"
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
    """The body of a process. `fate` is (signal or exception, "module:function", n, ...): it comes with the n-th call of
    the function."""
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
                if isinstance(number, Exception):
                    raise number
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
    before, after = (read_signed(folder / "config.json") for folder in (reference, out))
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
    (out / ".config.json-abcdefg1").write_text("half")
    (out / "checkpoints" / ".step-000008-abcdefg1").mkdir()
    (out / ".model-abcdefg1").mkdir()
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
    for name in ("step-999999 (copy)", "step-2000000", "step-notes"):  # a person's own
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    (tmp_path / "run" / "checkpoints" / "step-3000000").write_text("mine")
    del run
    again = resumed(tmp_path / "run")
    assert (again.start, again.checkpoint.name) == (1_000_000, "step-1000000")


# --- what ends a run saves first -------------------------------------------------------------------------------------

LOSS = "minirl.batch:loss_and_metrics"  # once a micro-batch: in GRPO twice a step, in PPO (critic apart) too
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def losses(kind: str) -> int:
    """Return how often an undisturbed run of a kind calls LOSS."""
    return {"grpo": 12, "sft": 6, "ppo": 20}[kind]


def ends(lab, out: Path, kind: str, fate: tuple, code: int = 2, args: Sequence[str] = ()) -> str:
    """Run a command into its fate; return what it said."""
    ended, said = lab.run([*lab.args(kind), "--out", str(out), "--save-every", "100", *args], fate)
    assert ended == code, said
    return said


def last_line(said: str) -> str:
    assert "Traceback" not in said, said
    return said.splitlines()[-1]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def goes_on(lab, out: Path, kind: str, dtype: str = "float32") -> str:
    """Resume a run that nothing disturbs any more, and compare it with one that nothing has disturbed."""
    code, said = lab.run([lab.args(kind)[0], "--resume", "--out", str(out)])
    assert code == 0, said
    reference = lab.reference(kind, dtype)
    assert (out / "model/model.safetensors").read_bytes() == (reference / "model/model.safetensors").read_bytes()
    assert untimed(out) == untimed(reference)
    for name in ("completions.jsonl", "faults.jsonl"):
        assert not (reference / name).exists() or (out / name).read_bytes() == (reference / name).read_bytes()
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    return said


@pytest.mark.parametrize(
    ("kind", "fate", "saved"),
    [
        ("grpo", (RuntimeError("CUDA error: an illegal memory access"), "minirl.prompts:sample", 4), "step-000003"),
        ("grpo", (RuntimeError("CUDA error: an illegal memory access"), LOSS, 8), "step-000003-update-1"),
        ("grpo", (OSError(5, "Input/output error", "x"), "minirl.grpo:log_updates", 4), "step-000003-update-2"),
        ("ppo", (OSError(5, "Input/output error", "x"), LOSS, 10), "step-000003-update-1"),
        ("refresh", (OSError(5, "Input/output error", "x"), "minirl.online_reward:add_reward_gradient", 3), ""),
        ("dapo", (OSError(5, "Input/output error", "x"), "minirl.grpo:make_batch", 4), "step-000003"),
        ("sft", (OSError(5, "Input/output error", "x"), "minirl.sft:add_policy_gradient", 4), "step-000003"),
    ],
)
def test_an_error_saves_and_the_run_goes_on_where_it_was(kind, fate, saved, lab, tmp_path):
    out = tmp_path / "run"
    line = last_line(ends(lab, out, kind, fate))
    assert line.startswith("minirl: ") and "saved: add --resume to go on from there" in line
    assert checkpoints(out) == [saved] or not saved
    goes_on(lab, out, kind)


@pytest.mark.parametrize(
    ("kind", "number", "where", "saved"),
    [
        ("grpo", signal.SIGTERM, ("minirl.grpo:scored_batch", 4), "step-000003"),  # while it samples: at once
        ("grpo", signal.SIGHUP, (LOSS, 7), "step-000003-update-1"),  # between two updates
        ("ppo", signal.SIGTERM, (LOSS, 10), "step-000003-update-2"),
        ("sft", signal.SIGHUP, (STEP, 4), "step-000004"),  # one update is a step
    ],
)
def test_a_signal_saves_where_a_step_can_be_cut(kind, where, saved, number, lab, tmp_path):
    out = tmp_path / "run"
    said = ends(lab, out, kind, (number, *where), code=128 + number)
    assert re.search(rf"stopped by {number.name}; the . steps.* are saved: add --resume", last_line(said))
    assert checkpoints(out) == [saved]
    goes_on(lab, out, kind)


def test_a_reader_that_leaves_costs_no_step(lab, tmp_path):
    """As behind `| head`: the run ends with code 1, and has saved."""
    out = tmp_path / "run"
    said = ends(lab, out, "grpo", (BrokenPipeError(32, "Broken pipe"), "minirl.lab.training:policy_line", 4))
    assert "saved: add --resume" in said
    goes_on(lab, out, "grpo")


@pytest.mark.parametrize("kind", ["grpo", "sft", "ppo"])
def test_where_memory_runs_out_the_micro_batch_is_halved(kind, lab, tmp_path):
    """Twice; the result is that of a run with enough memory but for rounding, and a killed run goes on to its bits."""
    out, reference = tmp_path / "run", lab.reference(kind, "float32")
    place = losses(kind) * 2 // 3
    fate = (NO_MEMORY, LOSS, place, place + 1)
    said = ends(lab, out, kind, fate, code=0, args=["--micro-batch-tokens", "4096"])
    assert said.count("ran out of memory: it goes on with micro_batch_tokens") == 2
    assert json.loads((out / "config.json").read_text())["micro_batch_tokens"] == 1024
    wanted = load_file(reference / "model/model.safetensors")
    for name, tensor in load_file(out / "model/model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4)
    killed = shutil.copytree(out, tmp_path / "killed")  # after it was saved for the halving
    assert len(checkpoints(killed)) == 2
    shutil.rmtree(killed / "checkpoints/step-000006")
    code, said = lab.run([lab.args(kind)[0], "--resume", "--out", str(killed)])
    assert code == 0 and untimed(killed) == untimed(out), said
    assert (killed / "model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("error", [RuntimeError("std::bad_alloc"), MemoryError()])
def test_memory_that_is_not_there_after_all_halving_is_said_in_a_sentence(error, lab, tmp_path):
    out = tmp_path / "run"
    said = ends(lab, out, "grpo", (error, LOSS, *range(8, 100)))
    assert "out of memory: lower --slots or --micro-batch-tokens" in last_line(said)
    assert "the 3 steps before it and 1 of its updates are saved" in last_line(said)
    assert said.count("ran out of memory") == 6  # 4096 -> 64
    goes_on(lab, out, "grpo")


def test_where_memory_runs_out_while_sampling_the_slots_are_halved_too(lab, tmp_path):
    out = tmp_path / "run"
    said = ends(lab, out, "grpo", (NO_MEMORY, "minirl.prompts:sample", 5), code=0)
    assert re.search(r"it goes on with micro_batch_tokens \d+ and slots \d+", said)


# --- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "sft", "ppo"])
def test_a_gradient_that_is_not_finite_stops_with_its_rows_kept(kind, lab, tmp_path):
    out = tmp_path / "run"
    line = last_line(ends(lab, out, kind, (NonFinite("the gradient of 'x' is not finite"), GRAD_NORM, 6)))
    assert re.search(r"step \d, update \d: the gradient of 'x' is not finite; its rows are in .*: --on-nonfinite", line)
    assert "are saved: add --resume to go on from there" in line
    (kept,) = (out / "nonfinite").iterdir()
    batch = Batch.load(kept, torch.device("cpu"))
    assert len(batch.rows) > 1 and batch.mask.any() and all(row.prompt and row.response for row in batch.rows)
    shutil.rmtree(out / "nonfinite")
    goes_on(lab, out, kind)  # as nothing is wrong with them


def test_a_batch_is_read_as_it_was_written(tmp_path):
    ids = [np.array([3, 1], np.int32), np.array([], np.int32)]
    rows = [Row([1, 2], [3, 4], 0, kept=ids), Row([1, 2], [5], 0, kept=ids[:1], where="half of a pair \ud83d")]
    mask = torch.ones(2, 2, dtype=torch.bool)
    batch = Batch(rows, torch.tensor([1.0, -1.0]), mask, ref_logp=torch.full((2, 2), torch.nan))
    batch.save(tmp_path)
    found = Batch.load(tmp_path, torch.device("cpu"))
    for row, other in zip(rows, found.rows, strict=True):
        assert replace(row, kept=None, places=[-1]) == replace(other, kept=None)
        assert [x.tolist() for x in row.kept] == [x.tolist() for x in other.kept]
    for name in ("advantages", "mask", "sampled", "ref_logp"):
        torch.testing.assert_close(getattr(found, name), getattr(batch, name), rtol=0, atol=0, equal_nan=True)
    assert found.old_logp is found.returns is None


@pytest.mark.parametrize("kind", ["sft"])
def test_a_step_without_any_update_has_a_line(kind, lab, tmp_path):
    out, fate = tmp_path / "run", (NonFinite("the gradient of 'x' is not finite"), GRAD_NORM, 3)
    said = ends(lab, out, kind, fate, code=0, args=["--on-nonfinite", "skip"])
    assert "grad –" in said and read_jsonl(out / "metrics.jsonl")[2]["nonfinite"] == 1


def test_updates_without_a_finite_gradient_are_left_out_on_request(lab, tmp_path):
    out, fate = tmp_path / "run", (NonFinite("the gradient of 'x' is not finite"), GRAD_NORM, 4, 6, 7)
    said = ends(lab, out, "grpo", fate, code=0, args=["--on-nonfinite", "skip"])
    assert said.count("left out; its rows are in") == 3
    found = [record.get("nonfinite", 0) for record in read_jsonl(out / "metrics.jsonl")[1:]]
    assert found == [0, 1, 1, 1, 0, 0]
    assert [record["updates"] for record in read_jsonl(out / "metrics.jsonl")[1:]] == [2, 1, 1, 1, 2, 2]
    said = ends(lab, tmp_path / "bad", "grpo", (*fate[:2], *range(5, 99)), args=["--on-nonfinite", "skip"])
    assert "step 5, update 1: the gradient of 'x' is not finite, the 5th in a row" in last_line(said)


def test_weights_that_are_not_finite_are_never_a_checkpoint(lab, tmp_path):
    """Neither saved, nor gone on from where somebody has made one."""
    out = tmp_path / "run"
    run = finished(out, steps=2)
    weights = {"w": torch.tensor([1.0])}
    run.held["policy"] = SimpleNamespace(save=lambda folder: save_file(weights, folder / "model.safetensors"))
    run.save(1)
    weights["w"] = torch.tensor([torch.nan])
    with pytest.raises(
        NonFinite, match=r"tensor 'w' of model.safetensors is not finite after step 2, so no checkpoint"
    ):
        run.save(2)
    assert checkpoints(out) == ["step-000001"]


def test_what_can_change_on_resume_is_changed_with_a_fork_and_recorded(lab, tmp_path):
    out = tmp_path / "run"
    ends(lab, out, "grpo", (OSError(5, "Input/output error", "x"), "minirl.prompts:sample", 4))
    code, said = lab.run(["grpo", "--resume", "--out", str(out), "--lr", "1e-4"])
    assert code == 2 and "lr: 0.001 -> 0.0001" in said and "or add --fork to go on with what is new" in said
    code, said = lab.run(["grpo", "--resume", "--out", str(out), "--lr", "1e-4", "--seed", "3", "--fork"])
    assert code == 2 and "seed: 0 -> 3" in said and "--fork changes clip_norm, " in said
    code, said = lab.run(["grpo", "--resume", "--out", str(out), "--lr", "1e-4", "--steps", "8", "--fork"])
    assert code == 0 and "from step 4 on: lr 0.001 -> 0.0001, steps 6 -> 8 (config.json keeps both)" in said
    config = json.loads((out / "config.json").read_text())
    assert config["forks"] == [{"step": 3, "lr": [1e-3, 1e-4], "steps": [6, 8]}] and config["lr"] == 1e-4
    rates = [record["lr"] for record in read_jsonl(out / "metrics.jsonl")[1:]]
    assert len(rates) == 8 and rates[2] > 1e-4 > rates[3]
    assert lab.run(["grpo", "--resume", "--out", str(out)])[0] == 0


def test_one_process_runs_a_folder(lab, tmp_path):
    out = tmp_path / "run"
    first = lab.start([*lab.args("grpo"), "--out", str(out), "--steps", "500"], lab.folder / "first.log")
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    for args in (["grpo", "--resume", "--out", str(out)], [*lab.args("grpo"), "--out", str(out)]):
        code, said = lab.run(args)
        assert code == 2 and ("another process runs" in said or "already holds a run" in said)
    first.kill()
    first.join()
    code, said = lab.run(["grpo", "--resume", "--out", str(out), "--fork", "--steps", "1"])
    assert "another process" not in said and (code == 0 or "steps = 1: the run in" in said)


def test_a_run_that_another_has_begun_meanwhile_is_left_alone(tmp_path):
    """Both found an empty folder."""
    out = tmp_path / "run"
    out.mkdir()
    first, second = Run(out, {"lr": 1.0}), Run(out, {"lr": 2.0})
    with first:
        first.log(1, {})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="another process has just begun a run in"):
        second.log(1, {})
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks_holds_a_run(number, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    out, display = tmp_path / "run", Quiet()
    with Run(out, {"lr": 1.0}, display=display) as run:
        run.log(1, {})
        run.save(1)
    assert "cannot be locked" in display.lines[0] and resumed(out).start == 1


def test_a_second_signal_does_not_end_the_save(lab, tmp_path):
    out, save = tmp_path / "run", "minirl.run:seal"
    number = signal.SIGTERM
    process = lab.start(
        [*lab.args("grpo"), "--out", str(out), "--save-every", "100"], lab.folder / "two.log", (number, save, 1)
    )
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    goes_on(lab, out, "grpo")


def test_an_error_while_a_reward_model_takes_note_changes_nothing(lab, tmp_path):
    error = OSError(5, "Input/output error", "x")
    out = tmp_path / "run"
    ends(lab, out, "refresh", (error, "minirl.online_reward:OnlineReward._lines", 2))
    goes_on(lab, out, "refresh")


def test_what_cannot_be_removed_stops_no_run(tmp_path):
    """As a checkpoint that somebody has moved to another disk, with a link in its place; what is hidden stays, too."""
    out = tmp_path / "run"
    for step in (1, 2, 3):
        finished(out, steps=1).save(step) if step == 1 else resumed(out).save(step)
        if step == 1:
            (out / "checkpoints/step-000001").rename(tmp_path / "moved")
            (out / "checkpoints/step-000001").symlink_to(tmp_path / "moved")
            for name in (".model-backup", ".config.json-orig", "checkpoints/.step-notes"):
                (out / name).mkdir()
    assert checkpoints(out) == [".step-notes", "step-000002", "step-000003"]
    assert (tmp_path / "moved/state.json").exists() and (out / ".model-backup").exists()


def test_files_of_a_checkpoint_can_be_read_by_others(lab):
    modes = {path.stat().st_mode & 0o777 for path in lab.reference("ppo", "float32").rglob("*") if path.is_file()}
    assert modes == {0o644}


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
    run._append({"completions.jsonl": [{"step": step, **fields}]})


def resumed(out: Path) -> Run:
    """The run, gone on with by another process."""
    gc.collect()  # the lock goes with the run that held it
    return Run(out, {"lr": 1.0}, resume=True, display=Quiet())


@pytest.mark.parametrize("tail", [b'{"step": 4, "loss": 0.', b"\xff\n", b"7\n", b'{"step": null}\n', b"\x00" * 4096])
def test_lines_after_the_checkpoint_go_and_texts_with_any_line_end_stay(tail, tmp_path):
    names = ("metrics.jsonl", "completions.jsonl")
    finished(tmp_path, steps=2).save(2)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        with open(tmp_path / name, "ab") as file:
            file.write(tail)
    run = resumed(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    run.log(3, {"loss": 0.3})
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert read_jsonl(tmp_path / "completions.jsonl")[1]["completion"] == UNUSUAL


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
    assert read_signed(run.out / "config.json") == {"format": FORMAT, "lr": 1.0}
