"""Accuracies of completions that are known, with their intervals and differences, and every completion as a line."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minirl import evaluate as evaluate_module
from minirl.errors import InputError
from minirl.evaluate import Evaluation, completion_records, evaluate, numbers
from minirl.judge.answers import last_number
from minirl.lab.tasks import load_task
from minirl.model import Transformer
from minirl.sampler import Completion, Sampler, SamplingParams
from minirl.task import Task
from minirl.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_chars("0123456789+=")
TASK = Task(
    "sums",
    [],
    [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(4)],
    {"correct": (1.0, last_number)},
    last_number,
    lambda text: text or None,
)
SAMPLED = [  # four samples of each prompt, and the greedy one
    ["1", "1", "1", "1", "1"],  # all right
    ["2", "2", "3", "4", "3"],  # half right, and right by majority; greedy is wrong
    ["3", "4", "4", "5", "4"],  # a quarter right, wrong by majority; greedy is wrong
    ["", "5", "", "", "4"],  # nothing right but greedy
]


class Says:
    """A sampler that says what it was told, and remembers what it was asked."""

    def __init__(self, sampled=SAMPLED):
        self.sampled, self.asked = sampled, []

    def generate(self, prompts, params, progress=None):
        self.asked.append(params)
        count = params.n if params.temperature else 0
        texts = [row[:count] or row[4:] for row in self.sampled]
        assert len(prompts) == len(texts)
        ids = [[[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in row] for row in texts]
        return [[Completion(tokens, [0.0] * len(tokens), "stop") for tokens in row] for row in ids]


def measured(sampler=None, task: Task = TASK, n: int = 4, **options) -> Evaluation:
    params = SamplingParams(n=n, stop_ids=TOKENIZER.stop_ids, seed=3)
    return evaluate(sampler or Says(), TOKENIZER, task, params, **options)


def test_accuracies_of_known_answers():
    m = measured().metrics
    assert m["eval/mean"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
    assert m["eval/pass@4"] == pytest.approx(3 / 4)
    assert m["eval/maj@4"] == pytest.approx(2 / 4)
    assert m["eval/greedy"] == pytest.approx(2 / 4)
    assert (m["eval/prompts"], m["eval/samples"], m["eval/temperature"]) == (4, 4, 1.0)
    assert m["eval/len_mean"] == pytest.approx((4 * 2 + 4 * 2 + 4 * 2 + 5) / 16)  # with the stop token


def test_the_greedy_completion_is_asked_for_once_at_temperature_zero():
    sampler = Says()
    measured(sampler)
    assert [(params.n, params.temperature) for params in sampler.asked] == [(4, 1.0), (1, 0.0)]
    assert sampler.asked[1] == replace(sampler.asked[0], n=1, temperature=0.0)
    sampler = Says()
    assert "eval/greedy" not in measured(sampler, greedy=False).metrics
    assert len(sampler.asked) == 1


def test_tied_votes_count_by_their_share():
    sampled = [["1", "1", "7", "7", "1"], ["2", "3", "4", "5", "2"], ["4", "4", "5", "5", "4"], ["4", "", "", "", "4"]]
    assert measured(Says(sampled)).metrics["eval/maj@4"] == pytest.approx((1 / 2 + 1 / 4 + 0 + 1) / 4)


def test_a_vote_that_is_tied_goes_to_the_first_answer_where_that_is_the_rule():
    sampled = [["1", "1", "7", "7", "1"], ["3", "2", "4", "5", "2"], ["4", "4", "5", "5", "4"], ["4", "", "", "", "4"]]
    assert measured(Says(sampled), ties="first").metrics["eval/maj@4"] == pytest.approx((1 + 0 + 0 + 1) / 4)


def test_the_curve_is_that_of_1_2_4_and_so_on_up_to_k():
    m = measured(curve=True).metrics
    assert [name for name in m if "@" in name] == [f"eval/{a}@{k}" for a in ("pass", "maj") for k in (1, 2, 4)]
    assert m["eval/pass@1"] == pytest.approx(m["eval/mean"])
    # Two of the four samples: of 2 2 3 4 five of six pairs hold the 2; of 3 4 4 5, with the 3 right, three of six.
    assert m["eval/pass@2"] == pytest.approx((1 + 5 / 6 + 3 / 6 + 0) / 4)
    assert m["eval/maj@2"] == pytest.approx((1 + (1 + 4 / 2) / 6 + (3 / 2) / 6 + 0) / 4)
    whole = {name: m[name] for name in measured().metrics}
    assert whole == measured().metrics
    names = [name for name in measured(n=3, curve=True).metrics if "pass" in name]
    assert names == ["eval/pass@1", "eval/pass@2", "eval/pass@3"]


def test_what_training_logs_needs_no_bootstrap(monkeypatch):
    monkeypatch.setattr(evaluate_module, "accuracy_interval", None)
    names = "mean pass@4 maj@4 greedy prompts samples temperature len_mean len_p95 len_correct_mean len_wrong_mean"
    names += " stop_frac truncated_frac unscored_frac"
    assert list(measured().metrics) == [f"eval/{name}" for name in names.split()]


def test_lengths_of_right_and_wrong_ones_and_how_they_ended():
    class Cut(Says):
        """Every completion of the first prompt runs into the limit."""

        def generate(self, prompts, params, progress=None):
            groups = super().generate(prompts, params, progress)
            return [[replace(c, finish_reason="length") for c in groups[0]], *groups[1:]]

    m = measured(Cut()).metrics
    assert (m["eval/stop_frac"], m["eval/truncated_frac"]) == (0.75, 0.25)
    assert m["eval/len_correct_mean"] == 2
    assert m["eval/len_wrong_mean"] == pytest.approx((2 + 2 + 3 * 2 + 3 * 1 + 2) / 9)
    assert (m["eval/len_mean"], m["eval/len_p95"]) == (pytest.approx(29 / 16), 2)
    nothing = measured(task=replace(TASK, correct=lambda prompts, completions, **columns: [0.0] * len(completions)))
    assert math.isnan(nothing.metrics["eval/len_correct_mean"])


def test_one_sample_has_no_majority():
    m = measured(n=1).metrics
    assert m["eval/mean"] == pytest.approx(2 / 4 + 1 / 4)
    assert not [name for name in m if "@" in name]


def graded(prompts, completions, **columns):
    return [{"1": 1.0, "2": 0.5, "3": None}.get(c, 0.0) for c in completions]


def test_what_cannot_be_scored_is_left_out_and_half_right_is_not_right():
    sampled = [
        ["1", "1", "3", "3", "1"],  # of two scored both right
        ["2", "2", "2", "2", "2"],  # half right throughout
        ["3", "3", "3", "3", "3"],  # not scored
        ["0", "0", "0", "0", "0"],
    ]
    result = measured(Says(sampled), replace(TASK, correct=graded))
    assert result.metrics["eval/mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert result.metrics["eval/pass@4"] == pytest.approx((1 + 0 + 0) / 3)
    assert result.metrics["eval/maj@4"] == pytest.approx((1 + 0 + 0) / 3)
    assert result.graded and not measured().graded
    assert result.metrics["eval/greedy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert np.isnan(result.correct[2]).all()
    assert result.metrics["eval/unscored_frac"] == 6 / 16


def test_nothing_scored_at_all_is_an_error_unless_it_may_be():
    task = replace(TASK, correct=lambda prompts, completions, **columns: [None] * len(completions))
    with pytest.raises(InputError, match="'correct' gave none of 16 completions a score"):
        measured(task=task)
    result = measured(task=task, require_score=False)
    assert all(np.isnan(result.metrics[name]) for name in result.intervals)
    assert result.metrics["eval/unscored_frac"] == 1


def test_no_examples_is_an_error():
    with pytest.raises(InputError, match="'sums' has no held-out examples"):
        measured(task=replace(TASK, heldout=[]))


def test_examples_of_ones_own_are_taken_instead_of_the_held_out_ones():
    result = measured(Says(SAMPLED[1:3]), examples=TASK.heldout[1:3])
    assert result.metrics["eval/mean"] == pytest.approx((0.5 + 0.25) / 2)
    assert [example["prompt"] for example in result.rollout.examples] == ["1+1=", "2+1="]


def test_intervals_hold_the_value_and_shrink_with_more_prompts():
    few = measured()
    many = measured(Says(SAMPLED * 16), replace(TASK, heldout=TASK.heldout * 16))
    assert few.intervals.keys() == many.intervals.keys() == {"eval/mean", "eval/pass@4", "eval/maj@4", "eval/greedy"}
    for name in few.intervals:
        (low, high), (inner_low, inner_high) = few.intervals[name], many.intervals[name]
        assert low < inner_low < few.metrics[name] == many.metrics[name] < inner_high < high
        # About ± 2 standard errors of a mean over 64 prompts.
        values = {"eval/mean": [1, 0.5, 0.25, 0], "eval/pass@4": [1, 1, 1, 0]}.get(name, [1, 1, 0, 0])
        assert inner_high - inner_low == pytest.approx(4 * np.std(values) / math.sqrt(64), rel=0.2)


def test_the_difference_of_two_is_taken_prompt_by_prompt():
    worse = [["1", "1", "7", "7", "7"], *SAMPLED[1:]]  # the first prompt half as well, the others alike
    first, second = measured(), measured(Says(worse))
    found = first.over(second)
    assert found.keys() == first.values.keys()
    mean, low, high = found["eval/mean"]
    assert (mean, low, high) == (pytest.approx(0.5 / 4), 0, pytest.approx(0.375, abs=0.13))
    assert found["eval/pass@4"] == (0, 0, 0)
    both = numbers([first, second])
    assert both["compare"]["differences"]["eval/mean"] == {"mean": mean, "interval": [low, high]}
    assert both["metrics"] == numbers([first])["metrics"] and both["compare"]["metrics"] == numbers([second])["metrics"]


def test_every_completion_is_a_line():
    sampled = []
    task = replace(TASK, correct=graded)
    measured(Says(), task, sampled=sampled)
    lines = completion_records("m", sampled, task)
    assert [line["completion"] for line in lines] == [row[j] for row in SAMPLED for j in range(4)] + [
        r[4] for r in SAMPLED
    ]
    assert [line["problem"] for line in lines] == [i for i in range(4) for _ in range(4)] + [0, 1, 2, 3]
    assert [line["sample"] for line in lines] == [0, 1, 2, 3] * 4 + ["greedy"] * 4
    common = {"model": "m", "problem": 1, "prompt": "1+1=", "tokens": 2, "finish_reason": "stop"}
    assert lines[4] == common | {"sample": 0, "completion": "2", "answer": "2", "correct": 0.5}
    assert lines[6] == common | {"sample": 2, "completion": "3", "answer": "3", "correct": None}  # graded gives it none
    assert lines[12]["answer"] is None and lines[12]["tokens"] == 1


def test_what_was_sampled_outlives_a_checker_that_fails():
    def fails(prompts, completions, **columns):
        raise ZeroDivisionError

    sampled, task = [], replace(TASK, correct=fails)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        measured(task=task, sampled=sampled)
    lines = completion_records("m", sampled, task)
    assert len(lines) == 16 and all(line["correct"] is None for line in lines)


def test_the_checker_runs_where_it_can_be_killed():
    assert measured(timeout=20).metrics == measured().metrics


def test_a_model_is_measured_the_same_by_the_same_seed(checkpoint):
    model, tokenizer = Transformer.from_pretrained(checkpoint), Tokenizer.from_pretrained(checkpoint)
    task = load_task("arithmetic", digits=1, style="plain")
    progress = []

    def run(seed: int, slots: int) -> Evaluation:
        params = SamplingParams(n=3, max_tokens=4, stop_ids=tokenizer.stop_ids, seed=seed)
        sampler = Sampler(model, slots)
        return evaluate(sampler, tokenizer, task, params, task.heldout[:7], progress=lambda *x: progress.append(x))

    first, again, other = run(0, 64), run(0, 5), run(1, 64)
    assert first.metrics == again.metrics
    assert first.intervals == again.intervals
    assert first.rollout.texts == again.rollout.texts != other.rollout.texts
    assert first.metrics["eval/greedy"] == other.metrics["eval/greedy"]
    assert progress[-1] == (21, 21)
