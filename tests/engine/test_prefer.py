"""Preferences, pairs and rejection sampling on a tiny model: what is learned, what is kept, what is refused, and runs
that were stopped."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import weakref
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import (
    ALPHABET,
    Killed,
    Quiet,
    at_update,
    check_same,
    full_logits,
    kill,
    read_jsonl,
    tiny_checkpoint,
    write_jsonl,
)

from minirl import outcomes, rft
from minirl.errors import InputError
from minirl.examples import held_out, ranked_lists
from minirl.lab import cli, commands, display
from minirl.lab.tasks import parse_task
from minirl.lab.training import same_of, sample_outcomes, train_prefer, train_rft
from minirl.outcomes import OutcomesConfig, Samples, pairs_of, right_and_wrong
from minirl.policy import Policy, load
from minirl.prefer import PreferConfig
from minirl.preferences import PreferenceLoss
from minirl.records import read_demonstrations, read_preferences
from minirl.rft import RFTConfig, kept_of
from minirl.run import Run
from minirl.sampler import Sampler
from minirl.tokenizer import Tokenizer

SUMS = [(a, b) for a in range(6) for b in range(6)]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": f"({a + b})", "rejected": f"~{a + b}"} for a, b in SUMS]
LISTS = [
    {"prompt": f"{a}+{b}=", "responses": [f"~{a + b}", f"({a + b})", f"{a}", f"{b}~"], "scores": [0, 1, 0.5, 0.5]}
    for a, b in SUMS
]
EVEN = """
def even(prompts, completions, **columns):
    return [float(len(c) % 2 == 0) for c in completions]

def calm(prompts, completions, **columns):
    return [float("~" not in c) for c in completions]

def never(prompts, completions, **columns):
    return [0.0 for c in completions]

def unscored(prompts, completions, **columns):
    return [None for c in completions]
"""


@pytest.fixture
def model(checkpoint) -> str:
    return str(checkpoint)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the commands run, with data of every kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(display, "PATIENCE", float("inf"))  # no line of progress on stderr, however slow the machine is
    write_jsonl("pairs.jsonl", PAIRS)
    write_jsonl("lists.jsonl", LISTS)
    write_jsonl("prompts.jsonl", [{"prompt": f"{a}+{b}="} for a, b in SUMS])
    Path("even.py").write_text(EVEN)
    return tmp_path


def prefer_config(model: str, **changes) -> PreferConfig:
    small = PreferConfig(model, "pairs.jsonl", out="run", steps=12, batch=8, lr=2e-3, warmup=2, save_every=4)
    return replace(small, **changes)


def task(reward: str = "even") -> str:
    return f"prompts.jsonl:heldout_fraction=0,reward=even.py:{reward}"


SAMPLING = {"prompts": 12, "samples": 12, "max_tokens": 20, "temperature": 1.0}


def rft_config(model: str, **changes) -> RFTConfig:
    small = RFTConfig(model, task(), out="run", **SAMPLING, steps=6, batch=8, lr=1e-3, warmup=2, save_every=2)
    return replace(small, **changes)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpo", "robust", "hinge", "ipo", "rrhf"])
@pytest.mark.parametrize("data", ["pairs", "lists"])
def test_held_out_pairs_come_into_their_order(kind, data, model, folder):
    loss, shown = PreferenceLoss(kind), Quiet()
    config = prefer_config(
        model, data=f"{data}.jsonl", loss=loss, eval_share=0.2, steps=60, lr=4e-3, eval_every=30, save_every=99
    )
    path = train_prefer(config, shown)
    records = read_jsonl("run/metrics.jsonl")
    evaluations = [r for r in records if "eval/accuracy" in r]
    assert [r["step"] for r in evaluations] == [0, 30, 60]
    before, after = evaluations[0], evaluations[-1]
    if loss.has_reference:  # the policy is the reference
        assert before["eval/accuracy"] == pytest.approx(0.5) and before["eval/reward/margin"] == 0
    assert after["eval/accuracy"] > 0.95 and after["eval/likelier"] > max(0.6, before["eval/likelier"])
    assert after["eval/loss"] < 0.7 * before["eval/loss"]
    assert after["eval/reward/margin"] > before["eval/reward/margin"]
    assert records[-1]["loss"] < 0.7 * records[1]["loss"] and records[-1]["accuracy"] > 0.95
    assert before["eval/pairs"] == 7 * (1 if data == "pairs" else 5)  # of 36 prompts; of 6 pairs one is a tie
    assert ("prefer", 60, 60) in shown.bars and (("reference", 36, 36) in shown.bars) == loss.has_reference
    assert shown.lines[-1].startswith("prefer 60/60  loss ") and "held-out 1.000" in shown.lines[-1]
    assert (path / "model.safetensors").exists()


def test_the_first_step_of_dpo_loses_log_2_and_the_reference_is_the_start(model, folder):
    train_prefer(prefer_config(model, lr=1e-9, steps=2), Quiet())
    for record in read_jsonl("run/metrics.jsonl")[1:]:
        assert record["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert abs(record["reward/chosen"]) < 1e-5


def test_the_commands_print_what_they_wrote_and_report_draws_it(model, folder, capsys):
    cli.main(f"prefer --model {model} --data pairs.jsonl --out run --steps 3 --loss.beta 0.3 --lr 1e-3".split())
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[1] for line in out.splitlines() if line.startswith("prefer ")] == ["1/3", "2/3", "3/3"]
    written = [line.split()[1] for line in out.splitlines() if line.startswith(("model:", "plot:", "report:"))]
    assert len(written) == 3 and all(Path(path).exists() for path in written)
    assert json.loads(Path("run/config.json").read_text())["loss"]["beta"] == 0.3
    page = Path("run/report.html").read_text()
    assert all(word in page for word in ("Accuracy", "held-out", "chosen", "rejected"))
    cli.main(["report", "--run", "run"])


def test_fine_tuning_prints_and_draws_what_it_wrote_too(model, folder, capsys):
    sampling = f"--task {task()} --prompts 12 --samples 12 --max-tokens 20 --temperature 1"
    cli.main(f"rft --model {model} {sampling} --out run --steps 2".split())
    out, err = capsys.readouterr()
    assert re.search(r"^kept \d+ completions of 12 prompts in run/kept.jsonl: ", out, re.MULTILINE) and err == ""
    assert out.endswith("model:  run/model\nplot:   run/plot.png\nreport: run/report.html\n")
    cli.main(f"sft --model {model} --data run/kept.jsonl --out own --steps 2".split())
    assert capsys.readouterr().out.endswith("model:  own/model\nplot:   own/plot.png\nreport: own/report.html\n")
    for page in ("run/report.html", "own/report.html"):
        assert "Loss" in Path(page).read_text()


# --- data ------------------------------------------------------------------------------------------------------------


def lists_of(*lines: dict, max_length: int = 32, tmp: Path = Path("own.jsonl")):
    write_jsonl(tmp, list(lines))
    return ranked_lists(Tokenizer.from_chars(ALPHABET), read_preferences(tmp), max_length)


def test_responses_end_with_the_stop_token_and_share_their_prompt(folder):
    tokenizer = Tokenizer.from_chars(ALPHABET)
    (item,) = lists_of({"prompt": "1+2=", "responses": ["3", "", "4", "5"], "scores": [2, -1, 2, 0]})
    assert [tokenizer.decode(row.response) for row in item.rows] == ["3", "", "4", "5"]
    assert all(row.response[-1] == tokenizer.eos_id and row.prompt is item.rows[0].prompt for row in item.rows)
    assert item.pairs == [(0, 1), (0, 3), (2, 1), (2, 3), (3, 1)]
    assert item.best == 0


def test_responses_of_a_prompt_are_cut_alike_and_equal_ones_are_dropped(folder):
    line = {"prompt": "1+2=", "chosen": "(1,2)3", "rejected": "(1,2)4"}
    (item,) = lists_of(line, max_length=10)
    assert [len(row.response) for row in item.rows] == [6, 6]
    assert lists_of(line, max_length=9) == []
    assert lists_of({"prompt": "1+2=", "chosen": "3", "rejected": "3"}) == []
    (item,) = lists_of({"prompt": "1=", "responses": ["3", "3", "1"], "scores": [1, 0, 0]})
    assert item.pairs == [(0, 1)]


def test_tokens_beside_a_text_are_taken_as_they_are(folder):
    tokenizer = Tokenizer.from_chars(ALPHABET)
    twelve = tokenizer.encode("12")
    (item,) = lists_of({"prompt": "1=", "chosen": "12", "rejected": "1", "chosen_tokens": twelve})
    assert [row.response for row in item.rows] == [tuple(twelve), (*tokenizer.encode("1"), tokenizer.eos_id)]
    line = {"prompt": "1=", "responses": ["12", "12"], "scores": [1, 0]}
    (item,) = lists_of(line | {"responses_tokens": [twelve, [*twelve, tokenizer.eos_id]]})
    assert [len(row.response) for row in item.rows] == [2, 3] and not any(row.lost for row in item.rows)
    with pytest.raises(InputError, match="line 1: its tokens spell '12' and not '3'"):
        lists_of({"prompt": "1=", "chosen": "3", "rejected": "1", "chosen_tokens": twelve})
    with pytest.raises(InputError, match="line 1: 'responses_tokens' must be a list"):
        lists_of(line | {"responses_tokens": [twelve]})


def test_what_is_dropped_and_cut_is_said(model, folder):
    lines = [
        *PAIRS,
        {"prompt": "1=", "chosen": "2", "rejected": "2"},
        {"prompt": "9=", "chosen": "1" * 9, "rejected": "2"},
    ]
    write_jsonl("pairs.jsonl", lines)
    shown = Quiet()
    train_prefer(prefer_config(model, steps=1, max_length=10, eval_share=0.0), shown)
    wanted = "37 pairs in 37 examples to train on, 0 in 0 held out; responses that are too long and cut: 1; "
    assert shown.lines[1] == wanted + "examples that are dropped, all equal or tied: 1"
    assert not any("eval/" in name for record in read_jsonl("run/metrics.jsonl") for name in record)


def test_a_prompt_is_held_out_with_all_its_lines_and_the_seed_decides_which(folder):
    lists = lists_of(*PAIRS, *[line | {"rejected": "~~"} for line in PAIRS])
    train, held = held_out(lists, 0.25, seed=0)
    assert (len(train), len(held)) == (54, 18)
    sides = [{tuple(item.rows[0].prompt) for item in side} for side in (train, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == 9
    assert {tuple(item.rows[0].prompt) for item in held_out(lists[::-1], 0.25, seed=0)[1]} == sides[1]
    assert {tuple(item.rows[0].prompt) for item in held_out(lists, 0.25, seed=1)[1]} != sides[1]
    assert [len(side) for side in held_out(lists, 0.0, seed=0)] == [72, 0]
    assert [len(side) for side in held_out(lists[:2], 0.01, seed=0)] == [1, 1]
    assert [len(side) for side in held_out(lists[:2], 0.99, seed=0)] == [1, 1]


def test_data_without_anything_to_prefer_or_to_hold_out(model, folder, complaint):
    write_jsonl("ties.jsonl", [{"prompt": "1=", "responses": ["1", "2"], "scores": [3, 3]}] * 2)
    assert "in none of its 2 examples" in complaint(*f"prefer --model {model} --data ties.jsonl".split())
    write_jsonl("one.jsonl", PAIRS[:1])
    assert "set eval_share = 0" in complaint(*f"prefer --model {model} --data one.jsonl".split())
    train_prefer(prefer_config(model, data="one.jsonl", eval_share=0.0, steps=1), Quiet())


def test_a_tokenizer_of_another_model_is_named(model, folder, tmp_path, complaint):
    wrong = tiny_checkpoint(tmp_path / "wrong", vocab_size=8)
    said = complaint(*f"prefer --model {wrong} --data pairs.jsonl".split())
    assert "outside the model's vocabulary of 8" in said


# --- runs that were stopped ------------------------------------------------------------------------------------------


def run_of(kind: str, model: str, out: str, **changes):
    if kind == "rft":
        return train_rft(rft_config(model, out=out, **changes), Quiet())
    return train_prefer(prefer_config(model, out=out, steps=6, save_every=2, eval_every=3, **changes), Quiet())


@pytest.mark.parametrize("kind", ["prefer", "rft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", [2, 4, 5])  # before the first checkpoint, or after one
def test_a_killed_run_resumes_to_the_same_bits(kind, dtype, update, model, folder, monkeypatch):
    run_of(kind, model, "whole", dtype=dtype)
    with monkeypatch.context() as patch:
        at_update(patch, update, kill)
        with pytest.raises(Killed):
            run_of(kind, model, "run", dtype=dtype)
    assert not Path("run/model").exists()
    if kind == "rft":  # what was sampled is not sampled again
        monkeypatch.setattr(Sampler, "generate", None)
    run_of(kind, model, "run", dtype=dtype, resume=True)
    check_same(Path("run"), Path("whole"))


@pytest.mark.parametrize("kind", ["prefer", "rft"])
def test_ctrl_c_saves_and_the_command_goes_on_from_there(kind, model, folder, monkeypatch):
    run_of(kind, model, "whole")
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run_of(kind, model, "run")
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["step-000002", "step-000003"]
    monkeypatch.setattr(commands, "plot", lambda *args: None)
    monkeypatch.setattr(commands, "report", lambda *args: None)
    cli.main([kind, "--resume", "--out", "run"])
    check_same(Path("run"), Path("whole"))


@pytest.mark.parametrize("kind", ["prefer", "rft"])
def test_memory_knobs_change_no_result(kind, model, folder):
    run_of(kind, model, "whole")
    knobs = {"micro_batch_tokens": 40, "recompute": True} | ({"slots": 3} if kind == "rft" else {})
    run_of(kind, model, "run", **knobs)
    if kind == "rft":
        assert Path("run/kept.jsonl").read_bytes() == Path("whole/kept.jsonl").read_bytes()
    for a, b in zip(read_jsonl("run/metrics.jsonl"), read_jsonl("whole/metrics.jsonl"), strict=True):
        for name in ("loss", "eval/accuracy", "reward/margin"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-4)
        if a["step"] > 1:  # in the first step policy and reference differ by rounding alone
            assert a.get("accuracy") == b.get("accuracy")


def test_a_finished_run_and_changed_data(model, folder):
    run_of("prefer", model, "run")
    shown = Quiet()
    train_prefer(prefer_config(model, steps=6, save_every=2, eval_every=3, resume=True), shown)
    assert "all of its 6 steps are done" in shown.lines[-1] and "reference" not in [bar[0] for bar in shown.bars]
    write_jsonl("pairs.jsonl", PAIRS[1:])
    with pytest.raises(InputError, match="the data of the run in run has changed"):
        run_of("prefer", model, "run", resume=True)


# --- pairs and rejection sampling ------------------------------------------------------------------------------------


def texts_of(lines: list[dict]) -> list[str]:
    return [line["completion"] for line in lines]


def test_rft_keeps_what_is_right_and_ended_each_once_and_at_most_so_many(model, folder):
    seen: list[outcomes.Group] = []
    shown, harvest = Quiet(), rft.sample_and_check

    def watched(*args):
        stopped = harvest(*args)
        seen.extend(args[5].groups())
        return stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rft, "sample_and_check", watched)
        train_rft(rft_config(model), shown)
    kept = read_jsonl("run/kept.jsonl")
    texts = [(line["prompt"], line["completion"]) for line in kept]
    assert len(kept) > 12 and len(set(texts)) == len(texts)
    assert all(len(text) % 2 == 0 for _, text in texts)
    sides = {
        group[0]["prompt"]: [texts_of(side) for side in right_and_wrong(group, outcomes.the_text)] for group in seen
    }
    correct = {group[0]["prompt"]: sum(line["reward"] for line in group) for group in seen}
    assert len(sides) == len(seen) == 12
    for line in kept:
        right = sides[line["prompt"]][0]
        assert line["completion"] in right and line["correct"] == correct[line["prompt"]] <= 12
        assert sum(prompt == line["prompt"] for prompt, _ in texts) == min(4, len(right))
    assert all(len(text) % 2 == 1 for _, wrong in sides.values() for text in wrong)
    assert all(correct[prompt] >= len(right) for prompt, (right, _) in sides.items())
    assert any(line["finish_reason"] == "length" for group in seen for line in group)
    assert all(len(text) < 20 for right, wrong in sides.values() for text in right + wrong)
    assert read_jsonl("run/metrics.jsonl")[0] == {
        "step": 0,
        "rft/kept": len(kept),
        "rft/solved": len({prompt for prompt, _ in texts}),
    }
    assert f"kept {len(kept)} completions of 12 prompts" in shown.lines[0]
    assert ("prompts", 12, 12) in shown.bars


def test_rft_learns_the_tokens_that_were_sampled(model, folder, monkeypatch):
    """No stop token is added to what a stop text ended, and the stop text is learned as part of the completion."""
    seen, learned = {}, []

    def fit(run, policy, rows, *rest):
        learned.extend((policy.tokenizer.decode(row.prompt), tuple(row.response)) for row in rows)

    def watched(*args):
        stopped = harvest(*args)
        for line in (line for group in args[5].groups() for line in group):
            if line["reward"] and line["finish_reason"] == "stop":
                seen[line["prompt"], tuple(line["completion_tokens"])] = line["completion"]
        return stopped

    harvest = rft.sample_and_check
    monkeypatch.setattr(rft, "sample_and_check", watched)
    monkeypatch.setattr(rft, "fit", fit)
    train_rft(rft_config(model, stop=("3", "8"), distinct="text"), Quiet())
    tokenizer = Tokenizer.from_pretrained(model)
    assert len(learned) > 12 and set(learned) <= seen.keys()
    ends = {tokenizer.decode([tokens[-1]]) if tokens[-1] != tokenizer.stop_id else "end" for _, tokens in learned}
    assert ends == {"3", "8", "end"}
    assert all(tokens.count(tokenizer.stop_id) <= 1 for _, tokens in learned)
    kept = read_jsonl("run/kept.jsonl")
    assert [(line["prompt"], tuple(line["completion_tokens"])) for line in kept] == learned
    assert all(seen[line["prompt"], tuple(line["completion_tokens"])] == line["completion"] for line in kept)


def test_rft_learns_another_spelling_of_a_text_as_it_was_sampled():
    class Spelling:
        """Token 1 is what tokens 2 and 3 are together."""

        stop_id = 9

        def prompt_ids(self, prompt, tools=None):
            return [7]

        def encode(self, text):
            return [1]

        def decode(self, tokens):
            return "".join({1: "ab", 2: "a", 3: "b", 9: ""}[token] for token in tokens)

        shown = decode

        def without_end(self, text):
            return text, None

    line = {"prompt": "p", "completion": "ab", "correct": 1, "where": "kept.jsonl, line 1"}
    [row] = rft.demonstration_rows(Spelling(), [line | {"completion_tokens": [2, 3, 9]}], 10)
    assert (row.prompt, row.response) == ([7], [2, 3, 9])
    with pytest.raises(InputError, match=r"kept\.jsonl, line 1: its tokens"):
        rft.demonstration_rows(Spelling(), [line | {"completion_tokens": [2, 2]}], 10)


def test_rft_raises_the_share_of_right_completions(model, folder):
    def share(checkpoint: str) -> float:
        loaded, config = load(checkpoint, "float32", "cpu"), rft_config(checkpoint, samples=32, seed=7)
        samples = Samples(Path(f"{Path(checkpoint).name}.jsonl"), 32)
        assert not rft.sample_and_check(*loaded, parse_task(task("calm")), config, Quiet(), samples)
        return sum(line["reward"] for group in samples.groups() for line in group) / (12 * 32)

    config = rft_config(model, task=task("calm"), samples=32, max_per_prompt=16, steps=40, batch=32, lr=4e-3)
    assert share(str(train_rft(replace(config, save_every=99), Quiet()))) > share(model) + 0.2


def test_prompts_beyond_a_chunk_draw_their_own_completions(model, folder, monkeypatch):
    monkeypatch.setattr(outcomes, "CHUNK", 2)
    write_jsonl("prompts.jsonl", [{"prompt": "1+2=", "column": i} for i in range(4)])
    loaded, config = load(model, "float32", "cpu"), rft_config(model, prompts=4)
    samples = Samples(Path("samples.jsonl"), 12)
    assert not rft.sample_and_check(*loaded, parse_task(task()), config, Quiet(), samples)
    groups = list(samples.groups())
    assert len({tuple(texts_of(group)) for group in groups}) == len(groups) == 4
    assert [line["column"] for line in groups[3]] == [3] * 12


def group_of(right: list[str], wrong: list[str]) -> outcomes.Group:
    sides = [(text, reward) for texts, reward in ((right, 1.0), (wrong, 0.0)) for text in texts]
    tokens = {"completion_tokens": [7], "finish_reason": "stop"}
    return [{"prompt": "p", "completion": text, "reward": reward, **tokens} for text, reward in sides]


def test_completions_are_one_where_their_numbers_are():
    texts = ["3+4=7", "3 plus 4 is 7", "(3,4)7", "7", "7.", "3+4=7", "so", "well", "1,000=1000", "1000=1000"]
    right, _ = right_and_wrong(group_of(texts, []), outcomes.the_text)
    assert texts_of(right) == list(dict.fromkeys(texts))
    right, _ = right_and_wrong(group_of(texts, []), same_of(RFTConfig("m", distinct="numbers")))
    assert texts_of(right) == ["3+4=7", "7", "so", "well", "1,000=1000"]


def test_what_was_cut_or_not_scored_is_neither_right_nor_wrong():
    group = group_of(["1", "2"], ["3", "4"])
    group[0]["finish_reason"] = group[2]["finish_reason"] = "length"
    group[3]["reward"] = None
    assert [texts_of(side) for side in right_and_wrong(group, outcomes.the_text)] == [["2"], []]


def test_a_completion_is_in_one_pair_only_and_lengths_can_be_matched():
    group = group_of(["a", "bbbb", "cc"], ["11111", "22", "3"])

    def found(most: int, match: bool) -> list[tuple[str, str]]:
        return [(pair["chosen"], pair["rejected"]) for pair in pairs_of(group, most, match_length=match)]

    assert found(9, False) == [("a", "11111"), ("bbbb", "22"), ("cc", "3")]
    assert found(9, True) == [("a", "3"), ("bbbb", "11111"), ("cc", "22")]
    assert found(1, True) == [("a", "3")]
    assert pairs_of(group[:3], 3) == pairs_of(group[3:], 3) == []
    assert texts_of(kept_of([group], 2)) == ["a", "bbbb"]


def test_pairs_of_a_task_can_be_trained_on(model, folder):
    config = OutcomesConfig(model, task(), out="made", **SAMPLING, max_per_prompt=2, match_length=True)
    shown = Quiet()
    files = sample_outcomes(config, shown)
    assert files == [Path("made") / name for name in ("samples.jsonl", "labels.jsonl", "pairs.jsonl")]
    lines = read_jsonl("made/pairs.jsonl")
    assert all(len(line["chosen"]) % 2 == 0 and len(line["rejected"]) % 2 == 1 for line in lines)
    counts = [sum(line["prompt"] == f"{a}+{b}=" for line in lines) for a, b in SUMS]
    assert max(counts) == 2 and sum(counts) == len(lines) > 12 and not any(counts[12:])
    assert shown.lines[-1].startswith(f"{len(lines)} pairs, ") and " from 12 prompts: " in shown.lines[-1]
    again = sample_outcomes(replace(config, out="again", slots=5), Quiet())
    assert [file.read_bytes() for file in again[1:]] == [file.read_bytes() for file in files[1:]]
    for a, b in zip(*(read_jsonl(f"{out}/samples.jsonl") for out in ("made", "again")), strict=True):
        assert a.pop("logprobs") == pytest.approx(b.pop("logprobs"), abs=1e-5) and a == b
    train_prefer(prefer_config(model, data="made/pairs.jsonl", steps=2), Quiet())


def test_the_samples_are_all_that_was_drawn(model, folder):
    write_jsonl("prompts.jsonl", [{"prompt": "1+2=", "level": 3, "odd": float("nan")}, {"prompt": "3+4="}])
    sample_outcomes(OutcomesConfig(model, task("calm"), out="made", samples=40, max_tokens=4), Quiet())
    lines = read_jsonl("made/samples.jsonl")
    assert [line["prompt"] for line in lines] == ["1+2="] * 40 + ["3+4="] * 40
    names = {"prompt", "level", "completion", "completion_tokens", "logprobs", "temperature", "finish_reason", "reward"}
    assert (
        lines[0].keys() == names
        and lines[0]["temperature"] == 1
        and lines[40]["level"] is None
        and lines[40]["odd"] is None
    )
    loaded, tokenizer = load(model, "float32", "cpu")
    for line in lines:
        tokens, text = line["completion_tokens"], line["completion"]
        assert tokenizer.decode(tokens) == text and line["reward"] == ("~" not in text)
        assert (line["finish_reason"] == "length") == (tokens[-1] != tokenizer.eos_id) and len(tokens) <= 4
        ids = tokenizer.prompt_ids(line["prompt"])
        logp = full_logits(loaded, [*ids, *tokens])[len(ids) - 1 : -1].log_softmax(1)
        assert line["logprobs"] == pytest.approx(logp.gather(1, torch.tensor([tokens]).t())[:, 0].tolist(), abs=1e-4)
    drawn = [(line["prompt"], line["completion_tokens"]) for line in lines]
    assert len({str(line) for line in drawn}) < len(drawn)  # repetitions stay
    labels = read_jsonl("made/labels.jsonl")
    assert labels and all((line["prompt"], line["completion_tokens"]) in drawn for line in labels)
    cut = {line["completion"] for line in lines if line["finish_reason"] == "length"}
    pairs = read_jsonl("made/pairs.jsonl")
    assert cut & {line["completion"] for line in labels} and pairs
    assert not cut & {line[side] for line in pairs for side in ("chosen", "rejected")}


def interrupt_sampling(monkeypatch, call: int, number: int = signal.SIGINT) -> None:
    generate, calls = Sampler.generate, count(1)

    def interrupted(*args):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return generate(*args)

    monkeypatch.setattr(Sampler, "generate", interrupted)


def sampled_outcomes(model: str, out: str, display=None, **changes) -> list[Path]:
    sizes = SAMPLING | {"samples": 4, "max_tokens": 6}
    config = OutcomesConfig(model, task(), out=out, **sizes | changes)
    return sample_outcomes(config, display or Quiet())


def contents_of(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_outcomes_that_are_stopped_are_kept_and_go_on_there(number, model, folder, monkeypatch, capsys):
    monkeypatch.setattr(outcomes, "CHUNK", 4)
    options = f"--model {model} --task {task()} --prompts 12 --samples 4 --max-tokens 6 --temperature 1"
    cli.main(f"outcomes --out whole {options}".split())
    with monkeypatch.context() as patch:
        interrupt_sampling(patch, 2, number)
        with pytest.raises(SystemExit) as stop:
            cli.main(f"outcomes --out made {options}".split())
    assert stop.value.code == 130 and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    said = capsys.readouterr().out
    assert "stopped after 8 prompts, whose completions are in made/samples.part.jsonl: the same command goes on" in said
    assert {line["prompt"] for line in read_jsonl("made/samples.part.jsonl")} == {f"{a}+{b}=" for a, b in SUMS[:8]}
    assert contents_of("made").keys() == {"samples.part.jsonl", "outcomes.json"}
    shutil.copytree("made", "ended")
    cli.main(f"outcomes --out made {options}".split())
    assert "made/samples.part.jsonl holds the completions of 8 prompts" in capsys.readouterr().out
    assert contents_of("made") == contents_of("whole")
    cli.main(f"outcomes --out ended {options} --prompts 8 --max-per-prompt 2".split())  # what changes no sample
    assert read_jsonl("ended/samples.jsonl") == read_jsonl("whole/samples.jsonl")[: 8 * 4]


def test_killed_outcomes_end_with_the_same_bytes(model, folder, monkeypatch):
    """Whatever the last write left: what is whole stays, and what is drawn anew is the same."""
    monkeypatch.setattr(outcomes, "CHUNK", 4)
    sampled_outcomes(model, "whole")
    generate, calls = Sampler.generate, count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda *args: kill() if next(calls) == 3 else generate(*args))
        with pytest.raises(Killed):
            sampled_outcomes(model, "killed")
    with monkeypatch.context() as patch:  # labels are written, pairs are not
        patch.setattr(outcomes, "pairs_of", lambda *args: kill())
        with pytest.raises(Killed):
            sampled_outcomes(model, "killed at its end")
    lines = Path("killed/samples.part.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 8 * 4 and Path("killed at its end/labels.jsonl").exists()
    zeros = b"\0" * len(lines[0])
    for damage, (left, sampled) in {
        "between writes": (lines, 1),
        "half a line": ([*lines, lines[0][:40]], 1),
        "zeros": ([*lines, zeros], 1),
        "half a chunk": (lines[:25], 2),
        "zeros in a line": ([*lines[:20], zeros + lines[20], *lines[21:]], 2),
        "no chunk": (lines[:15], 3),
        "at its end": (None, 0),
    }.items():
        shutil.copytree("killed" if left else "killed at its end", damage)
        if left:
            Path(damage, "samples.part.jsonl").write_bytes(b"".join(left))
        with monkeypatch.context() as patch:
            calls = count()
            patch.setattr(Sampler, "generate", lambda *args, calls=calls: (next(calls), generate(*args))[1])
            sampled_outcomes(model, damage)
        assert next(calls) == sampled, damage
        assert contents_of(damage) == contents_of("whole"), damage


def test_unfinished_outcomes_are_never_mixed_with_others(model, folder, monkeypatch):
    monkeypatch.setattr(outcomes, "CHUNK", 4)
    with monkeypatch.context() as patch:
        interrupt_sampling(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            sampled_outcomes(model, "made")
    before = contents_of("made")
    tiny_checkpoint("other", seed=5)
    for changes, sentence in (
        (
            {"temperature": 0.5},
            r"other options or data \(temperature: 1.0 -> 0.5\): give the same, choose another --out",
        ),
        ({"samples": 13}, r"samples: 4 -> 13"),
        ({"prompts": 5}, "already holds the completions of 8 prompts, and --prompts asks for 5: give 8 at least"),
    ):
        with pytest.raises(InputError, match=sentence):
            sampled_outcomes(model, "made", **changes)
    with monkeypatch.context() as patch:  # other weights under the same name
        patch.setattr(outcomes, "load", lambda _, *args, **options: load("other", *args, **options))
        with pytest.raises(InputError, match="model_hash"):
            sampled_outcomes(model, "made")
    with open("made/samples.part.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process"):
            sampled_outcomes(model, "made")
    write_jsonl("prompts.jsonl", [{"prompt": "1+2="}] * 12)
    with pytest.raises(InputError, match="data_hash"):
        sampled_outcomes(model, "made")
    assert contents_of("made") == before


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: an illegal memory access")])
def test_outcomes_that_an_error_ends_say_what_is_kept(error, model, folder, monkeypatch, capsys):
    monkeypatch.setattr(outcomes, "CHUNK", 4)
    generate, calls = Sampler.generate, count(1)

    def fails(*args):
        if next(calls) == 2:
            raise error
        return generate(*args)

    monkeypatch.setattr(Sampler, "generate", fails)
    with pytest.raises(SystemExit):
        cli.main(f"outcomes --out made --model {model} --task {task()} --prompts 12 --samples 2 --max-tokens 6".split())
    said = capsys.readouterr().err
    assert "the completions of 4 prompts are in made/samples.part.jsonl: the same command goes on from there" in said
    assert len(read_jsonl("made/samples.part.jsonl")) == 8


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.EINVAL])
def test_samples_are_written_where_a_file_system_has_no_locks(number, folder, monkeypatch):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    samples = Samples(Path("samples.part.jsonl"), 1)
    samples.append([[{"reward": 1, "finish_reason": "stop"}]])
    samples.close()
    assert samples.file.read_bytes() and samples.prompts == 1


def test_memory_does_not_grow_with_the_prompts(model, folder, monkeypatch):
    """No group of an earlier chunk is held while a later one is sampled."""
    monkeypatch.setattr(outcomes, "CHUNK", 2)
    made, alive, lines = [], [], outcomes._lines

    class Held(list):
        """A list that can be watched."""

    def watched(*args):
        alive.append(sum(ref() is not None for ref in made))
        group = Held(lines(*args))
        made.append(weakref.ref(group))
        return group

    monkeypatch.setattr(outcomes, "_lines", watched)
    sampled_outcomes(model, "made")
    assert len(alive) == 12 and max(alive) <= 3


def test_an_rft_that_is_stopped_while_it_samples_goes_on_there(model, folder, monkeypatch):
    monkeypatch.setattr(outcomes, "CHUNK", 4)
    run_of("rft", model, "whole")
    with monkeypatch.context() as patch:
        interrupt_sampling(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_of("rft", model, "run")
    assert len(read_jsonl("run/sampled.jsonl")) == 8 * 12 and not Path("run/kept.jsonl").exists()
    calls = count()
    generate = Sampler.generate
    monkeypatch.setattr(Sampler, "generate", lambda *args: (next(calls), generate(*args))[1])
    run_of("rft", model, "run", resume=True)
    assert next(calls) == 1
    check_same(Path("run"), Path("whole"))
    monkeypatch.setattr(Sampler, "generate", lambda *args: kill() if next(calls) == 4 else generate(*args))
    with pytest.raises(Killed):
        run_of("rft", model, "killed")
    with open("killed/sampled.jsonl", "ab") as file:
        file.write(b'{"prompt": "1+')
    run_of("rft", model, "killed", resume=True)
    assert next(calls) == 6  # two chunks, the killed one, and that and the last one again
    check_same(Path("killed"), Path("whole"))


@pytest.mark.parametrize("command", ["outcomes --out made", "rft --out run"])
def test_nothing_right_and_nothing_scored_are_one_sentence(command, model, folder, complaint):
    options = "--prompts 3 --samples 2 --max-tokens 20"
    file = "made/samples.jsonl" if command.startswith("outcomes") else "run/sampled.jsonl"
    about = "made/outcomes.json" if command.startswith("outcomes") else "run/config.json"
    said = complaint(*f"{command} --model {model} --task {task('never')} {options}".split(), left=[file, about])
    assert "0 of 6 completions right" in said and "more samples" in said
    assert len(read_jsonl(file)) == 6 and f"{file} holds what was sampled" in said  # it is data all the same
    shutil.rmtree(Path(file).parent)
    said = complaint(*f"{command} --model {model} --task {task('unscored')} {options}".split())
    assert "gave none of 6 completions a score" in said


def test_where_every_completion_was_cut_rft_asks_for_longer_ones(model, folder, complaint):
    """Also where the rule says right: it is of a text without an end."""
    for judge in ("never", "even"):
        options = f"--model {model} --task {task(judge)} --prompts 3 --samples 2 --max-tokens 1 --out {judge}"
        said = complaint(*f"rft {options}".split(), left=[f"{judge}/sampled.jsonl", f"{judge}/config.json"])
        assert "6 cut at max_tokens = 1): raise --max-tokens" in said and "more samples" not in said
        assert not Path(judge, "kept.jsonl").exists()


def test_a_resumed_rft_without_its_kept_completions_says_so(model, folder):
    train_rft(rft_config(model, steps=2), Quiet())
    Path("run/kept.jsonl").unlink()
    with pytest.raises(InputError, match=r"kept\.jsonl: there is no such file"):
        train_rft(rft_config(model, steps=2, resume=True), Quiet())


def test_no_gradient_is_left_by_sampling_before_training(model, folder):
    """The same fine-tuning on the same rows, of a model that has not sampled, ends with the same weights."""
    config = rft_config(model)
    path = train_rft(config, Quiet())
    fresh, tokenizer = load(model, "float32", "cpu")
    rows = rft.demonstration_rows(tokenizer, read_demonstrations("run/kept.jsonl"), fresh.config.max_positions)
    with Run("again", {}, display=Quiet()) as run:
        again = rft.fit(run, Policy(fresh, tokenizer, config).with_optimizer(betas=(0.9, 0.95)), rows, config.sft)
    assert torch.equal(*(load(p, "float32", "cpu")[0].head_weight for p in (path, again)))
