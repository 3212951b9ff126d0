"""Accuracies of completions that are known, with their intervals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_checkpoint

from minirl.errors import InputError
from minirl.evaluate import Evaluation, evaluate
from minirl.model import Transformer
from minirl.rewards.rules import last_number
from minirl.sampler import Completion, Sampler, SamplingParams
from minirl.tasks import Task, load_task
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
    assert result.metrics["eval/maj@4"] == pytest.approx((0.5 + 0 + 0) / 3)
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


def test_the_checker_runs_where_it_can_be_killed():
    assert measured(timeout=20).metrics == measured().metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_model_is_measured_the_same_by_the_same_seed(folder):
    model, tokenizer = Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)
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
