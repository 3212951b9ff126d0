"""Alarms on made-up runs: what raises each, what leaves it silent, and when it is said."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from helpers import Quiet, records, run_of, sft_run

from minirl.grpo import GRPOConfig
from minirl.lab import alarms, logs
from minirl.lab.alarms import WINDOW, Alarms
from minirl.lab.logs import Columns
from minirl.lab.training import train_grpo


def summary(records: list[dict]) -> list[str]:
    return Alarms(Columns.of(records)).summary()


# ---- silence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 30, 100, 400])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_silent_at_every_step(steps, seed):
    assert summary(run_of(steps, seed)) == []


def test_fine_tuning_and_success_are_silent():
    assert summary(sft_run()) == []
    solved = {"reward/mean": lambda x, v: 1.2 - (1 - x) / 2, "entropy": lambda x, v: 0.4 * (1.001 - x)}
    assert summary(run_of(100, **solved)) == []


def test_a_solved_task_has_no_signal_and_no_alarm():
    solved = {"group/signal_frac": lambda x, v: 0.05, "group/all_correct_frac": lambda x, v: 0.9}
    assert summary(run_of(60, **solved)) == []


def test_runs_that_were_measured_are_silent():
    """The SmolLM2 run of the README, from 0.16 to 0.96."""
    file = Path(__file__).parents[2] / "examples/results/smollm2/metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) > 40
    assert summary(records) == []


def test_values_that_are_none_or_nan_are_nothing():
    records = run_of(40)
    holes = [{k: math.nan if i % 7 == 3 and k != "step" else v for k, v in r.items()} for i, r in enumerate(records)]
    as_written = [{k: None if v != v else v for k, v in r.items()} for r in holes]
    assert summary(holes) == summary(as_written) == []


# ---- each alarm --------------------------------------------------------------------------------------------------


def falls_late(x: float, value: float) -> float:
    return value if x < 0.7 else value - 2 * (x - 0.7)


def grows(to: float, start: float = 0.0):
    """A straight line over the run."""
    return lambda x, value: start + (to - start) * x


LOUD = [
    (r"Completions grew from 9\d to 3\d\d tokens", {"len/mean": lambda x, v: v * (1 + 2 * x)}),
    ("Completions shrank from", {"len/mean": lambda x, v: v * (1 - 0.9 * x)}),
    ("Entropy rose from", {"entropy": lambda x, v: v + 2 * x}),
    ("Entropy fell from", {"entropy": grows(0.001, 0.4), "reward/mean": grows(0.4, 0.3), "eval/mean": grows(0.3, 0.2)}),
    ("38% are cut off, 2% at first", {"truncated_frac": grows(0.4)}),
    ("60% are cut off", {"truncated_frac": lambda x, v: 0.6}),
    (r"20% have a reward that is late, .* \(late_frac\)", {"late_frac": lambda x, v: 0.2}),
    (r"20% have a reward that is late, .* \(unusable_frac\)", {"unusable_frac": lambda x, v: 0.2}),
    (r"2\d% go round in loops, 2% at first", {"repetition_frac": grows(0.3)}),
    ("Looping: reward/repetition fell", {"reward/repetition": lambda x, v: v - 0.5 * x}),
    (r"2\d% say nothing, 2% at first", {"too_short_frac": grows(0.3)}),
    ("8% of the completions cannot be scored", {"reward/unscored_frac": lambda x, v: 0.08}),
    ("Sampler and trainer differ by 0.1", {"mismatch/abs_mean": lambda x, v: 0.1}),
    (r"The KL \(kl_ref/k3\) jumped to 3", {"kl_ref/k3": lambda x, v: v + 3 * (x > 0.9)}),
    (r"The KL \(kl_old/k3\) jumped to", {"kl_old/k3": lambda x, v: 0.5 if 0.5 < x < 0.6 else v}),
    (r"The KL \(trained/kl_old/k3\) jumped to", {"trained/kl_old/k3": lambda x, v: 0.5 if 0.5 < x < 0.6 else 2e-4}),
    (
        r"0% of the groups had a signal in 10 steps: take easier or harder",
        {"group/signal_frac": lambda x, v: 0 if 0.3 < x < 0.5 else v, "group/all_correct_frac": lambda x, v: None},
    ),
    (
        r"4% of the groups had a signal in 10 steps \(2% all right, 94% all wrong\): take easier",
        {
            "group/signal_frac": lambda x, v: 0.04,
            "group/all_correct_frac": lambda x, v: 0.02,
            "group/all_wrong_frac": lambda x, v: 0.94,
        },
    ),
    (
        r"0% of the groups had a signal in 10 steps \(99% all right, 0% all wrong\): take harder",
        {
            "group/signal_frac": lambda x, v: 0,
            "group/all_correct_frac": lambda x, v: 0.99,
            "group/all_wrong_frac": lambda x, v: 0.0,
        },
    ),
    ("The reward model ranks 5.% right, 9.% at first", {"reward_model/accuracy": grows(0.5, 1.0)}),
    ("The reward model gives 11.. on average", {"reward_model/mean": grows(12.0)}),
    ("Reward model scores spread 3.9, 1.2 at first", {"reward_model/std": grows(4.0, 1.0)}),
    ("Held-out accuracy fell from 57% to 19% after step 70 while the reward rose", {"eval/mean": falls_late}),
]


@pytest.mark.parametrize(("sentence", "changes"), LOUD)
def test_each_alarm_is_raised_alone(sentence, changes):
    (found,) = summary(run_of(100, **changes))
    assert re.match(sentence, found), found
    assert re.search(r"[.?] (Since step \d+|Steps \d+ to \d+)\.$", found), found


def test_every_row_of_the_table_is_among_them():
    assert len({sentence for *_, sentence in alarms.DRIFTS}) + 4 < len(LOUD)
    for name, *_ in alarms.DRIFTS:
        assert any(re.fullmatch(name, metric) for _, changes in LOUD for metric in changes), name


@pytest.mark.parametrize(
    "changes",
    [
        {"len/mean": lambda x, v: v * (1 + 0.3 * x)},
        {"len/mean": lambda x, v: v * (1 - 0.5 * x)},
        {"entropy": lambda x, v: v + 0.2 * x},
        {"entropy": grows(0.06, 0.4), "reward/mean": grows(0.4, 0.3)},  # to a sixth
        {"truncated_frac": grows(0.08)},
        {"truncated_frac": grows(0.3, 0.5)},  # it gets better
        {"len/mean": grows(1.4)},
        {"late_frac": lambda x, v: 0.03},
        {"repetition_frac": grows(0.08)},
        {"too_short_frac": lambda x, v: 0.4},  # as it was
        {"kl_ref/k3": lambda x, v: 40.0 if x == 0.5 else v},  # k3 has a long tail: a single step is no jump
        {"group/signal_frac": lambda x, v: 0 if 0.3 < x <= 0.37 else v},
        {"eval/mean": falls_late, "reward/mean": falls_late},  # both fall: bad, but no hacking
        {"eval/mean": lambda x, v: v - 0.06 * (x == 1.0)},
    ],
)
def test_less_than_that_is_silent(changes):
    assert summary(run_of(100, **changes)) == []


def test_a_fall_of_accuracy_that_few_samples_would_show_by_chance_is_no_hacking():
    """12 points: of 512 completions it is a finding, of 20 it is nothing."""
    fall = {"eval/mean": lambda x, v: v if x < 0.75 else 0.45}
    assert len(summary(run_of(100, **fall))) == 1
    assert summary(run_of(100, **fall, **{"eval/prompts": lambda x, v: 5, "eval/samples": lambda x, v: 4})) == []


def test_a_share_of_cut_off_ones_that_falls_is_no_alarm_any_more():
    watch = Alarms(Columns.of(run_of(100, truncated_frac=grows(0.55, 0.95))))
    (alarm,) = watch.raised.values()
    assert alarm.first < 15 and 20 < alarm.last < 60 and watch.in_force == 0


def test_flat_accuracy_under_noise_is_no_hacking_however_long_the_run():
    """100 evaluations of 64 x 8 samples, a reward that goes up and down: there is always a best one to fall from."""
    hacked = 0
    for seed in range(30):
        rng, records = random.Random(seed), []
        for step in range(1, 1001):
            record = {"step": step, "reward/mean": 0.5 + rng.gauss(0, 0.05)}
            if step % 10 == 0:
                right = 0.5 + rng.gauss(0, (0.25 / 512) ** 0.5)
                record |= {"eval/mean": right, "eval/prompts": 64, "eval/samples": 8}
            records.append(record)
        hacked += "hacked" in Alarms(Columns.of(records)).raised
    assert hacked <= 1


# ---- when they are said --------------------------------------------------------------------------------------------


def said(records: list[dict]) -> dict[int, list[str]]:
    watch = Alarms()
    return {record["step"]: new for record in records if (new := watch.update(record))}


def test_an_alarm_is_said_once_while_it_holds():
    watch, records = Alarms(), run_of(100, **{"truncated_frac": grows(0.4)})
    found = [(record["step"], new, watch.in_force) for record in records for new in [watch.update(record)]]
    ((step, (sentence,), count),) = [f for f in found if f[1]]
    assert sentence.startswith("1") and "% are cut off, 2% at first" in sentence and 30 < step < 50
    assert [n for _, _, n in found] == [0] * step + [1] * (101 - step) and count == 1


def test_an_alarm_is_said_again_only_after_it_was_away():
    """Off for 5 steps it is the same alarm, off for 30 it is another."""

    def cut(*stretches: tuple[int, int]):
        return {"truncated_frac": lambda x, v: 0.9 if any(a <= 200 * x < b for a, b in stretches) else 0.0}

    assert list(said(run_of(200, **cut((50, 90), (95, 120))))) == [51]
    assert list(said(run_of(200, **cut((50, 90), (130, 160))))) == [51, 131]
    (found,) = summary(run_of(200, **cut((50, 90), (130, 160))))
    assert found.endswith("Steps 51 to 167.")


def test_an_alarm_that_is_over_is_no_longer_in_force():
    records = run_of(200, **{"truncated_frac": lambda x, v: 0.9 * (0.25 <= x < 0.3)})
    watch, counts = Alarms(), []
    for record in records:
        watch.update(record)
        counts.append(watch.in_force)
    assert counts[52] == 1 and counts[-1] == 0
    assert len(watch.summary()) == 1


def test_what_is_kept_does_not_grow_with_the_run():
    watch = Alarms(Columns.of(run_of(400)))
    watch.update(run_of(401)[-1])
    assert max(len(ends.first) for ends in watch.ends.values()) == WINDOW
    assert max(len(ends.values) for ends in watch.ends.values()) == WINDOW + 1


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_alarms_are_the_same_in_blocks_of_any_size(block, monkeypatch):
    """Also where metrics have holes, begin late, or are what no float holds."""
    changes = {
        "truncated_frac": lambda x, v: 0.9 if 0.2 <= x < 0.4 or x > 0.9 else math.nan if 0.5 < x < 0.6 else 0.0,
        "eval/mean": falls_late,
        "kl_old/k3": lambda x, v: 3.0 if 0.3 < x < 0.36 else v,
        "entropy": lambda x, v: 10**400 if x == 0.5 else v * 5 ** (2 * x),
        "reward_model/accuracy": lambda x, v: 0.9 - x if x > 0.5 else None,
        "group/signal_frac": lambda x, v: "none" if x < 0.1 else 0.0,
    }
    records = run_of(200, **changes)
    steps = Alarms()
    for record in records:
        steps.update(record)
    assert len(steps.raised) == 6 and steps.in_force < 6
    monkeypatch.setattr(logs, "BLOCK", block)
    watch = Alarms(Columns.of(records))
    assert list(watch.raised.items()) == list(steps.raised.items())
    assert watch.step == steps.step and watch.heldout == steps.heldout


def test_alarms_of_a_resumed_run_are_those_of_one_that_was_not():
    """Whatever the step it was stopped at, what it had said is not said again, and what comes is."""
    changes = {"truncated_frac": grows(0.4), "eval/mean": falls_late, "len/mean": lambda x, v: v * (1 + 2 * x)}
    records = run_of(100, **changes)
    whole = said(records)
    assert sum(map(len, whole.values())) == 3
    for stop in (5, 37, 60, 75, 99):
        written = json.loads(json.dumps(records[: stop + 1]))
        resumed = Alarms(Columns.of(written))
        rest = {record["step"]: new for record in records[stop + 1 :] if (new := resumed.update(record))}
        assert rest == {step: new for step, new in whole.items() if step > stop}
        assert resumed.summary() == summary(records)


# ---- in a run ------------------------------------------------------------------------------------------------------


def config(folder: Path, model: Path, **changes) -> GRPOConfig:
    """Random completions of one token: all are cut off, and none is right."""
    sizes = {"steps": 14, "prompts": 2, "group": 2, "max_tokens": 1, "eval_prompts": 1, "eval_samples": 1}
    task = "arithmetic:op=sum,digits=4,style=plain"
    return GRPOConfig(str(model), task, out=str(folder), **sizes, eval_every=0, save_every=12, lr=1e-9, **changes)


def test_a_run_says_an_alarm_once_and_logs_how_many_there_are(checkpoint, tmp_path):
    display = Quiet()
    train_grpo(config(tmp_path / "run", checkpoint), display)
    spoken = [line for line in display.lines if re.match(r"step \d+: ", line)]
    assert [re.sub(r"\d+%", "x%", line)[:28] for line in spoken] == [
        "step 10: x% are cut off, x% ",
        "step 10: x% of the groups ha",
    ]
    logged = records(tmp_path / "run")
    assert "alarms" not in logged[0]
    assert [record["alarms"] for record in logged[1:]] == [0] * 9 + [2] * 5
    assert all(0 <= record[name] <= 1 for record in logged[1:] for name in ("repetition_frac", "too_short_frac"))

    # The last two steps again, from the checkpoint of step 12: the same numbers, and nothing is said twice.
    display, state = Quiet(), tmp_path / "run" / "checkpoints" / "step-000014"
    for file in state.iterdir():
        file.unlink()
    state.rmdir()
    train_grpo(config(tmp_path / "run", checkpoint, resume=True), display)
    assert [line for line in display.lines if re.match(r"step \d+: ", line)] == []
    assert [r["alarms"] for r in records(tmp_path / "run")[1:]] == [r["alarms"] for r in logged[1:]]
