"""The bench: its numbers are right where they can be known, and its rivals compute the same thing."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as program  # noqa: E402
from bench import common, kernel_suite, learning, measure, operations, steps, targets  # noqa: E402
from bench.compiled import load_width  # noqa: E402
from minirl.grpo import GRPOConfig  # noqa: E402
from minirl.lab import cli  # noqa: E402
from minirl.presets import PRESETS  # noqa: E402

CPU = torch.device("cpu")
SHAPE = operations.Shape(64, 300, 12, 4)


def test_quantiles_of_known_numbers():
    q = measure.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert q == {"median": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6}


def test_rivals_take_turns_and_are_reset_before_each_run():
    log = []

    def run(name):
        def call():
            log.append(name)

        call.reset = lambda: log.append(f"reset {name}")
        return call

    seconds = measure.time_rivals({"a": run("a"), "b": run("b")}, measure.Clock(CPU), 4, 0.0)
    assert log == ["reset a", "a", "reset b", "b"] * measure.MIN_ROUNDS  # no time left after the least number of rounds
    assert all(s["rounds"] == measure.MIN_ROUNDS and s["median"] > 0 for s in seconds.values())


def hold(megabytes: int) -> int:
    return measure.peak_here(lambda: {"x": torch.ones(megabytes << 20, dtype=torch.int8)})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_peak_memory_in_a_child_process_is_what_a_run_allocates():
    small, large = (measure.in_child(hold, mb) / 2**20 for mb in (20, 200))
    assert abs(small - 20) < 8 and abs(large - 200) < 8


def fail() -> None:
    raise ValueError("broken")


def test_a_child_process_that_fails_is_named():
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        measure.in_child(fail)
    with pytest.raises(RuntimeError, match="code 3"):
        measure.in_child(os._exit, 3)


@pytest.mark.parametrize(
    "name", ["stats", "logprobs", "policy", "linear_logprobs", "linear_policy", "linear_policy_half", "gae"]
)
def test_every_rival_that_runs_here_agrees_with_float64(name):
    operation = operations.OPERATIONS[name]
    x = operations.make_inputs(operation.kind, SHAPE, CPU, torch.float32, operation.silent)
    exact, measured = operations.exact(name, x), set()
    for rival in set(operation.rivals) - {"compile"}:
        try:
            run = operation.rivals[rival](x)
        except operations.Unavailable:
            continue
        errors = measure.error_of(run(), exact)
        measured.add(rival)
        assert errors and max(errors.values()) < 2e-5, (rival, errors)
    assert {"minirl", "eager"} <= measured


def test_an_error_is_found():
    exact = {"logp": torch.zeros(3), "d_logits": torch.tensor([[1.0, -4.0]])}
    errors = measure.error_of({"logp": torch.tensor([0.0, 0.5, 0.0]), "d_logits": torch.tensor([[1.0, -3.0]])}, exact)
    assert errors["logp"] == 0.5 and errors["d_logits"] == 0.25
    assert errors["d_logits: 1 - cosine"] == pytest.approx(1 - 13 / (17 * 10) ** 0.5)


def test_half_of_the_sequences_have_no_signal():
    x = operations.make_inputs("head", SHAPE, CPU, torch.float32, silent=True)
    assert (x.advantages == 0).sum() == SHAPE.rows // 2
    gradient = operations.OPERATIONS["linear_policy_half"].rivals["minirl"](x)()["d_hidden"]
    assert (gradient[SHAPE.rows // 2 :] == 0).all() and (gradient[: SHAPE.rows // 2] != 0).any()


def test_the_limit_is_the_minimal_traffic_at_the_rate_of_a_copy(monkeypatch):
    monkeypatch.setattr(measure, "copy_rate", lambda *_: 1e9)
    plan = kernel_suite.Plan([SHAPE], [], [], SHAPE, 3, 0.0, {"compile": "not here", "TRL": "not here"}, {})
    record = kernel_suite.Bench(CPU, plan).measure("policy", SHAPE, plan.leave_out)
    assert record["minimal_bytes"] == 2 * 64 * 300 * 4
    ours = record["rivals"]["minirl"]
    assert ours["share"] == pytest.approx(record["minimal_bytes"] / 1e9 / ours["seconds"]["median"])
    assert record["rivals"]["compile"] == {"reason": "not here"}
    text = kernel_suite.table(record)
    assert "eager" in text and "compile: not here" in text and "N 64, V 300" in text


def timed(operation: str, shape: dict, **rivals) -> dict:
    numbers = {name: {"seconds": {"median": s}, "memory": m} for name, (s, m) in rivals.items()}
    return {"operation": operation, "shape": shape, "rivals": numbers, "gradients": 0}


def test_targets_are_judged_by_the_numbers():
    shape = {"rows": 8192, "vocab": 151_936, "width": 1536}
    whole = timed("linear_policy", shape, minirl=(0.016, 900 << 20), eager=(0.06, 20 << 30))
    half = timed("linear_policy_half", shape, minirl=(0.008, 0))
    result = {"records": [timed("stats", shape, minirl=(0.0007, 0)), whole, half], "checks": {"two_runs": True}}
    judged = {t.what.strip(): t for t in targets.judge(result, cuda=True)}
    assert judged["statistics, forward"].passed is False
    assert judged["linear_policy_loss, forward and backward, D 1536"].passed is True
    assert judged["eager / linear_policy_loss, memory"].measured == "22.8 x"
    assert judged["half of the rows without signal / all rows, time"].passed is True
    assert judged["bitwise equal: two runs"].passed is True
    assert judged["Liger / fused loss, time"].passed is None
    assert judged["training step of 4096 tokens, minirl / eager, memory"].passed is None


def test_without_a_gpu_its_targets_are_not_measured():
    lines = targets.lines(targets.judge({"records": []}, cuda=False))
    assert ("statistics, forward", "<= 0.68 ms", "not measured: no GPU", "-") in lines


def test_load_widths():
    widths = {"LDG.E.128": 16, "LDG.E.EF.128.CONSTANT": 16, "LDG.E": 4, "LDG.E.64": 8, "LDG.E.U16": 2}
    assert {name: load_width(name) for name in widths} == widths
    assert load_width("LDG.E.ENL2.256") == 32 and load_width("LDGSTS.E.BYPASS.LTC128B.128") == 16


@pytest.fixture
def bench(monkeypatch, capsys):
    """`python -m bench` with these options, in this process: its stdout, and the sentence that it ends with if any."""

    def run(*options: str) -> tuple[str, str | None]:
        monkeypatch.setattr(sys, "argv", ["bench", *options])
        try:
            common.run(program.main)
        except SystemExit as stop:
            return capsys.readouterr().out, stop.code  # python prints a str to stderr and exits with 1
        return capsys.readouterr().out, None

    return run


def test_one_operation_from_the_command_line(bench, tmp_path):
    said, stopped = bench("kernels", "--quick", "--device", "cpu", "--only", "gae", "--out", str(tmp_path))
    assert stopped is None
    assert "ON A CPU" in said and "GAE" in said and "not measured: no GPU" in said
    result = json.loads((tmp_path / "kernels.json").read_text())
    [record] = result["records"]
    assert record["rivals"]["eager"]["seconds"]["median"] > 0 and result["machine"]["slug"] == "cpu"
    assert {t["what"] for t in result["targets"]} >= {"statistics, forward", "bitwise equal: two runs"}


def test_what_cannot_run_is_said_in_a_sentence(bench, tmp_path, monkeypatch):
    _, stopped = bench("kernels", "--device", "cpu", "--only", "softmax", "--out", str(tmp_path))
    assert "--only softmax is unknown: choose from stats" in stopped
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, stopped = bench("compile", "--device", "cpu", "--out", str(tmp_path))
    assert "unset it" in stopped
    _, stopped = bench("sampler", "--device", "cpu", "--model", str(tmp_path), "--out", str(tmp_path))
    assert "holds no checkpoint: make one" in stopped or "pip install" in stopped


# --- learning --------------------------------------------------------------------------------------------------------


def test_every_preset_and_every_command_that_trains_is_a_row():
    commands = [row.command.split() for row in learning.METHODS.values()]
    presets = {words[words.index("--preset") + 1] for words in commands if "--preset" in words}
    assert presets == set(PRESETS)
    assert {words[0] for words in commands} == {"grpo", "ppo", "sft", "rft", "prefer"}
    kinds = {words[words.index("--loss.kind") + 1] for words in commands if "--loss.kind" in words}
    assert kinds == {"robust", "hinge", "ipo", "rrhf"}


@pytest.mark.parametrize("name", learning.METHODS)
def test_every_row_is_a_command_line_that_parses(name, tmp_path):
    lab = learning.Lab(tmp_path, 1)
    command, *words = lab.fill(3, learning.METHODS[name].command).split()
    config = cli.parse(command, [*words, "--model", "m", "--seed", "3", "--out", "o"])
    assert config.seed == 3 and not any("{" in word for word in words if "template=" not in word)
    if isinstance(config, GRPOConfig):
        assert config.steps == (160 if "reward model" in name else 60)
        assert config.preset == words[words.index("--preset") + 1]


def test_a_table_says_what_missed_its_gain_and_why():
    line = {"before": [0.4, 0.4], "greedy": [0.5, 0.5], "seconds": 3.0, "memory_gb": 0.5, "why": ""}
    fine, missed, excused = (
        learning.cells(line | {"method": "x", "after": after, "gain": [100 * (a - 0.4) for a in after], "why": why})
        for after, why in (([0.9, 0.7], ""), ([0.5, 0.5], ""), ([0.5, 0.5], "offline"))
    )
    assert fine[1:5] == ("0.400", "0.800 ± 0.141", "0.500 ± 0.000", "40.0 ± 14.1") and fine[-1] == ""
    assert missed[-1].startswith("MISSED") and excused[-1] == "offline"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("(12,12)122", [(7, 0.5), (10, 0.0)]),
        ("(12,11)122", [(7, 0.0), (10, 0.0)]),
        ("(12,12)", [(7, 0.0)]),
        ("~122", [(4, 0.0)]),
        ("", [(0, 0.0)]),
    ],
)
def test_the_working_is_worth_something_where_it_is_right(text, wanted):
    assert steps.working(["37+85="], [text]) == [wanted]


def test_commands_run_once_and_again_when_they_change(tmp_path, monkeypatch):
    said = []

    def fake(command, log=None, threads=None):
        said.append(command)
        return json.dumps({"metrics": {"eval/mean": 0.5}}), {"seconds": 1.0, "memory_gb": 0.1}

    monkeypatch.setattr(learning.common, "minirl", fake)
    lab = learning.Lab(tmp_path, 1)
    lab.folder(0, "x").mkdir(parents=True)
    for command in ("grpo --lr 1", "grpo --lr 1", "grpo --lr 2"):
        (tmp_path / "seed-0" / "x").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(learning.shutil, "rmtree", lambda *a, **k: None)
        lab.run_all([(0, "x", command)])
    assert [words.split(" --out")[0] for words in said if words.startswith("grpo")] == ["grpo --lr 1", "grpo --lr 2"]
    assert lab.result(0, "x")["eval/mean"] == 0.5


def test_a_row_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fake(command, log=None, threads=None):
        if command.startswith("ppo"):
            raise RuntimeError("out of luck")
        Path(command.split("--out ")[1]).mkdir(parents=True) if "--out" in command else None
        return json.dumps({"metrics": {"eval/mean": 0.5}}), {"seconds": 1.0, "memory_gb": 0.1}

    monkeypatch.setattr(learning.common, "minirl", fake)
    lab = learning.Lab(tmp_path, 1)
    lab.run_all([(0, "bad", "ppo"), (0, "good", "grpo")])
    assert lab.failed == {"bad"} and lab.result(0, "good")["eval/mean"] == 0.5
    assert "FAILED: bad, seed 0: out of luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("score", "right", "wanted"), [((0, 7), (0.5, 0.1), True), ((0, 7), (0.5, 0.6), False), ((7, 6), (0.5, 0.1), False)]
)
def test_a_row_is_called_hacked_only_where_the_score_rose_and_the_rule_fell(score, right, wanted, tmp_path):
    lab = learning.Lab(tmp_path, 1)
    lab.folder(0, "x").mkdir(parents=True)
    lines = [{"step": 0}] + [{"reward_model/mean": s, "reward/correct": r} for s, r in zip(score, right, strict=True)]
    (lab.folder(0, "x") / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert learning.hacked(lab, 0, "x") == wanted
