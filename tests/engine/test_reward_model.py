"""Reward models: where a score is read, what is learned from which lines, and the way from a rule to a reward."""

import json
import math
import random
import re
import signal
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    Killed,
    Quiet,
    at_update,
    hidden_states,
    kill,
    random_ids,
    randomise,
    records,
    tiny_checkpoint,
    tiny_config,
    tiny_model,
    untimed,
    write_jsonl,
)
from safetensors.torch import load_file

from minirl.checkpoint import save_model
from minirl.errors import InputError
from minirl.examples import balanced as class_balanced
from minirl.examples import reward_lines, split_by_prompt
from minirl.lab import cli
from minirl.lab.rewards import load_reward
from minirl.lab.training import sample_outcomes, train_reward
from minirl.model import ScalarHead, Transformer
from minirl.outcomes import OutcomesConfig, balanced, labels_of, pairs_of
from minirl.records import read_labels
from minirl.reward_losses import bce_loss, pairwise_loss, pointwise_loss
from minirl.reward_model import RewardModel, read, read_all
from minirl.reward_training import RewardConfig, add_reward_gradient, endless_chunks, prompts_of, rows_of
from minirl.tokenizer import Tokenizer
from minirl.trees import LAST, Row, micro_batches
from minirl.turns import spelled_tokens, step_ends

KINDS = ["pairwise", "pointwise", "bce", "process"]


def reward_model(layers: str = "linear", seed: int = 0, **head) -> Transformer:
    return randomise(Transformer(tiny_config(), ScalarHead(layers, **head)), seed)


def random_lists() -> list[list[Row]]:
    """Prompts with several responses, one of them empty; one prompt in two lists; one response twice."""
    prompts = [tuple(random_ids(n, seed=n)) for n in (5, 3, 9)]
    rows = [random_ids(n, seed=40 + n) for n in (4, 1, 7, 2)]
    return [
        [Row(prompts[0], rows[0]), Row(prompts[0], rows[1])],
        [Row(prompts[1], rows[2]), Row(prompts[1], [])],
        [Row(prompts[0], rows[0]), Row(prompts[0], rows[3]), Row(prompts[0], rows[2])],
        [Row(prompts[2], rows[2], places=(0, 3, LAST))],
    ]


def alone(model: Transformer, row: Row) -> list[torch.Tensor]:
    """Every score of a row computed by itself."""
    values = model.values(hidden_states(model, [*row.prompt, *row.response]))
    return [values[-1] if place == LAST else values[len(row.prompt) + place] for place in row.places]


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["linear", "mlp"])
def test_a_head_comes_back_as_it_was_saved(layers, dtype, tmp_path):
    tiny_model().to(dtype).save_pretrained(tmp_path / "policy")
    head = ScalarHead(layers, "process", 0.125, "\n\n")
    model = Transformer.from_pretrained(tmp_path / "policy", scalar_head=head).initialise_score(3)
    assert model.dtype == dtype and {p.dtype for p in model.score.parameters()} == {torch.float32}
    save_model(model, tmp_path / "reward")
    again = Transformer.from_pretrained(tmp_path / "reward", scalar_head=True)
    assert (
        again.head == head and asdict(head) == json.loads((tmp_path / "reward/config.json").read_text())["scalar_head"]
    )
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype, name
    assert {
        p.dtype for p in Transformer.from_pretrained(tmp_path / "reward", torch.bfloat16, None, True).score.parameters()
    } == {torch.float32}
    names = {"linear": ["score.weight"], "mlp": ["score.0.bias", "score.0.weight", "score.2.bias", "score.2.weight"]}
    held = load_file(tmp_path / "reward/model.safetensors")
    assert sorted(name for name in held if name.startswith("score")) == names[layers]


def test_values_are_the_head_less_its_bias():
    hidden, linear, mlp = torch.randn(5, 20), reward_model("linear", bias=0.5), reward_model("mlp", bias=-2.0)
    torch.testing.assert_close(linear.values(hidden), hidden @ linear.score.weight[0] - 0.5)
    below = (hidden @ mlp.score[0].weight.T + mlp.score[0].bias).relu()
    torch.testing.assert_close(mlp.values(hidden), below @ mlp.score[2].weight[0] + mlp.score[2].bias + 2.0)
    assert linear.bfloat16().values(hidden.bfloat16()).dtype == torch.float32


def test_a_fresh_head_is_a_function_of_its_seed_with_variance_one_over_inputs():
    model = Transformer(tiny_config(width=400, head_dim=2), ScalarHead("mlp")).initialise_score(1)
    assert abs(model.score[0].weight.var().item() * 401 - 1) < 0.02
    assert not model.score[0].bias.any() and not model.score[2].bias.any()
    again, other = (Transformer(model.config, ScalarHead("mlp")).initialise_score(seed) for seed in (1, 2))
    assert torch.equal(model.score[2].weight, again.score[2].weight)
    assert not torch.equal(model.score[2].weight, other.score[2].weight)


@pytest.mark.parametrize("content", ["mlp", {"layers": "deep"}, {"bias": "0"}, {"depth": 2}])
def test_a_broken_head_in_config_json_is_named(content, tmp_path):
    reward_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scalar_head": content}))
    with pytest.raises(InputError, match="'scalar_head' is"):
        Transformer.from_pretrained(tmp_path, scalar_head=True)


def test_another_head_than_the_checkpoint_has_is_refused(tmp_path):
    reward_model("mlp").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a head of kind mlp, not linear: ask for that one"):
        Transformer.from_pretrained(tmp_path, scalar_head=ScalarHead("linear"))


# --- where a score is read -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layers", ["linear", "mlp"])
def test_scores_are_read_at_the_last_token_or_at_the_places(layers):
    model, rows = reward_model(layers), [row for rows in random_lists() for row in rows]
    wanted = torch.stack([value for row in rows for value in alone(model, row)])
    assert len(set(wanted.tolist())) == len(wanted) - 1  # one response stands twice
    torch.testing.assert_close(read(model, rows), wanted, rtol=1e-5, atol=1e-5)
    for budget in (1, 20, 1000):
        torch.testing.assert_close(read_all(model, rows, budget), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_equal_rows_are_computed_once(monkeypatch):
    model, tokens = reward_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, layout: (tokens.append(len(ids)), forward(ids, layout))[1])
    read(model, [row for rows in random_lists() for row in rows])
    assert tokens == [5 + 4 + 1 + 2 + 7 + 3 + 7 + 0 + 9 + 7]


@pytest.mark.parametrize("budget", [1, 12, 25, 1000])
def test_micro_batches_hold_every_list_whole_and_once_and_at_most_the_budget(budget):
    lists = random_lists()
    batches = micro_batches(lists, range(len(lists)), budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lists)))
    for batch in batches:
        rows = [row for i in batch for row in lists[i]]
        size = sum(len(row.response) for row in rows) + sum(map(len, {row.prompt for row in rows}))
        assert size <= budget or len(batch) == 1
    assert len(micro_batches(lists, range(len(lists)), 1000)) == 1


@torch.no_grad()
def test_a_score_depends_neither_on_its_neighbours_nor_on_their_order(checkpoint):
    model = Transformer.from_pretrained(checkpoint, scalar_head=True).initialise_score(0)
    judge = RewardModel(model, Tokenizer.from_pretrained(checkpoint))
    rows = [(random_ids(1 + i % 3, 19, i), random_ids(1 + i % 7, 19, 50 + i)) for i in range(40)]
    together = judge.score(*zip(*rows, strict=True))
    assert len(set(together)) > 30
    shuffled = random.Random(0).sample(range(40), 40)
    again = judge.score(*zip(*(rows[i] for i in shuffled), strict=True))
    judge.budget = 9
    small = judge.score(*zip(*rows, strict=True))
    for i, (prompt, completion) in enumerate(rows):
        single = judge.score([prompt], [completion])[0]
        for other in (together[i], again[shuffled.index(i)], small[i]):
            assert other == pytest.approx(single, abs=1e-6)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separator", "ends"),
    [
        ("1+2,3", ",", [3, LAST]),
        ("1,2,", ",", [1, 3]),
        ("12", ",", [LAST]),
        ("", ",", [LAST]),
        (",", ",", [LAST]),
        ("1,,2", ",", [1, LAST]),
        ("1==2=3==", "==", [2, 7]),
    ],
)
@pytest.mark.parametrize("stop", [False, True])
def test_a_step_ends_where_its_separator_does(text, separator, ends, stop, checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    assert step_ends(tokenizer, tokenizer.encode(text) + [tokenizer.eos_id] * stop, separator) == ends


def test_one_token_may_hold_the_separator_and_more():
    pieces = ["a", ".\n", "b\nc", "\n\n", " ", "d"]

    class Whole:
        def shown(self, ids):
            return "".join(pieces[i] for i in ids)

    assert step_ends(Whole(), range(6), "\n") == [1, 2, 3, LAST]
    assert step_ends(Whole(), range(6), "\n\n") == [3, LAST]


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A policy that has learned nothing."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("policy"))
    Transformer.from_pretrained(folder).initialise(0, 0.1).save_pretrained(folder)
    return folder


def sums(kind: str, count: int = 40, below: int = 10) -> list[dict]:
    """Lines of each kind about sums of two numbers; wrong is what is far off."""
    rng, lines = random.Random(0), []
    for i in range(count):
        a, b = rng.randrange(below), rng.randrange(below)
        right, wrong = a + b, rng.choice([x for x in range(2 * below - 1) if abs(x - a - b) >= 0.4 * below])
        prompt, good = f"{a:02}+{b:02}=", i % 3 != 0
        lines.append(
            {
                "pairwise": {"prompt": prompt, "chosen": f"{right:02}", "rejected": f"{wrong:02}"},
                "process": {"prompt": prompt, "steps": ["0", f"{right if good else wrong:02}"], "labels": [1, good]},
            }.get(kind, {"prompt": prompt, "completion": f"{right if good else wrong:02}", "label": int(good)})
        )
    return lines


def encoded(checkpoint: Path, tmp_path: Path, kind: str, lines: list[dict], separator: str = ","):
    examples = read_labels(write_jsonl(tmp_path / "lines.jsonl", lines), kind)
    config = Transformer.from_pretrained(checkpoint).config
    return reward_lines(examples, kind, Tokenizer.from_pretrained(checkpoint), config, separator)


def test_pairs_and_ranked_lists_end_with_the_stop_token(checkpoint, tmp_path):
    lines = [
        {"prompt": "1+2=", "chosen": "3", "rejected": "45", "margin": 0.5},
        {"prompt": "2+2=", "responses": ["4", "5", "6"], "scores": [2, 1, 1]},
        {"prompt": "1+2=", "chosen": "3", "rejected": "3"},
        {"prompt": "1+2=", "responses": ["3", "4"], "scores": [1, 1]},
        {"prompt": "1+2=", "chosen": "3", "rejected": "4" * 40},
    ]
    tokenizer, found = Tokenizer.from_pretrained(checkpoint), encoded(checkpoint, tmp_path, "pairwise", lines)
    (pair, ranked), left_out = found
    assert left_out == "1 longer than 32 tokens and 2 that compare equal or tied responses"
    assert {row.prompt for row in pair.rows} == {tuple(tokenizer.encode("1+2="))}
    assert [row.response for row in pair.rows] == [(*tokenizer.encode("3"), 2), (*tokenizer.encode("45"), 2)]
    assert {row.places for row in pair.rows} == {(LAST,)}
    assert (pair.pairs, pair.weights, pair.margin) == ([(0, 1)], [1.0], 0.5)
    assert ranked.pairs == [(0, 1), (0, 2)] and ranked.weights == [0.5, 0.5]  # a list counts once


def test_tokens_beside_a_text_are_taken_as_they_are(checkpoint, tmp_path):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    cut, ended = tokenizer.encode("12"), [*tokenizer.encode("12"), tokenizer.eos_id]
    lines = [{"prompt": "1=", "completion": "12", "completion_tokens": t, "label": 1} for t in (cut, ended)]
    rows = [line.rows[0].response for line in encoded(checkpoint, tmp_path, "bce", lines)[0]]
    assert rows == [tuple(cut), tuple(ended)]
    pair = {"prompt": "1=", "chosen": "1", "rejected": "12", "rejected_tokens": cut}
    assert encoded(checkpoint, tmp_path, "pairwise", [pair])[0][0].rows[1].response == tuple(cut)


@pytest.mark.parametrize(("label", "wanted"), [(1, 1.0), (True, 1.0), (0, 0.0), (-1, 0.0), (False, 0.0)])
def test_labels_of_completions(label, wanted, checkpoint, tmp_path):
    [line] = encoded(checkpoint, tmp_path, "bce", [{"prompt": "1=", "completion": "1", "label": label}])[0]
    assert line.labels == (wanted,)


def test_steps_have_places_labels_and_gaps(checkpoint, tmp_path):
    lines = [{"prompt": "1=", "steps": ["12", "3,", "4"], "labels": [1, 0.25, None]}]
    [line] = encoded(checkpoint, tmp_path, "process", lines)[0]
    assert line.rows[0].places == (2, 4, LAST)
    assert (line.labels, line.weights) == ((1.0, 0.25, 0.0), (1.0, 1.0, 0.0))
    assert len(line.rows[0].response) == len("12,3,4") + 1


def test_classes_are_balanced_by_weight(checkpoint, tmp_path):
    lines = class_balanced(encoded(checkpoint, tmp_path, "bce", sums("bce", 10))[0])
    weights = {y: sum(line.weights[0] for line in lines if line.labels == (y,)) for y in (0.0, 1.0)}
    assert weights == {0.0: pytest.approx(5.0), 1.0: pytest.approx(5.0)}


def test_held_out_prompts_are_not_trained_on():
    examples = sums("pairwise", 80)
    train, heldout = split_by_prompt(examples, 0.25, 0)
    prompts, held = {e["prompt"] for e in train}, {e["prompt"] for e in heldout}
    assert prompts and held and not prompts & held and len(train) + len(heldout) == 80
    assert split_by_prompt(examples, 0.25, 0) == (train, heldout) != split_by_prompt(examples, 0.25, 1)
    assert split_by_prompt(examples, 0, 0) == (examples, [])


GOOD = {"prompt": "1=", "chosen": "1", "rejected": "2"}
# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_same_for_every_micro_batch_and_that_of_plain_rows(kind, checkpoint, tmp_path):
    lines = encoded(checkpoint, tmp_path, kind, sums(kind, 9))[0]
    lines = [replace(line, margin=0.3 * i) for i, line in enumerate(lines)]
    if kind in ("pointwise", "bce"):
        lines = class_balanced(lines)
    model = Transformer.from_pretrained(checkpoint, scalar_head=ScalarHead("mlp", kind)).initialise_score(0)
    found = {}
    for budget in (1, 30, 1000):
        config = RewardConfig("m", "d", kind, micro_batch_tokens=budget, center=0.1 * (kind == "pairwise"))
        loss, scores = add_reward_gradient(model, lines, config)
        found[budget] = loss, scores, [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    scores = torch.stack([s for row in rows_of(lines) for s in alone(model, row)])
    weights = torch.tensor([w for line in lines for w in line.weights])
    y = torch.tensor([y for line in lines for y in line.labels])
    if kind == "pairwise":
        margins = torch.tensor([line.margin for line in lines])
        loss = pairwise_loss(scores[0::2], scores[1::2], margins, 0.1)
    else:
        loss = pointwise_loss(scores, 2 * y - 1, weights) if kind == "pointwise" else bce_loss(scores, y, weights)
    loss.backward()
    for got, read_scores, gradients in found.values():
        assert got == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(read_scores, scores.detach(), rtol=1e-5, atol=1e-5)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [1, 3, 1000])
def test_an_epoch_takes_every_line_once_and_a_few_of_a_prompt_together(share, checkpoint, tmp_path):
    lines = encoded(checkpoint, tmp_path, "pairwise", sums("pairwise", 200))[0]
    prompts = np.array(prompts_of(lines))
    epochs = [endless_chunks(prompts, share, 0, start, 200) for start in (0, 200)]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert endless_chunks(prompts, share, 0, 150, 100) == epochs[0][150:] + epochs[1][:50]
    runs = [len(list(run)) for _, run in groupby(prompts[epochs[0]])]
    chunks = sum(-(-n // share) for n in np.bincount(prompts))
    assert len(runs) <= chunks and (share == 1 or len(runs) > 0.9 * chunks)  # neighbours may be of one prompt by chance
    assert max(runs) <= max(np.bincount(prompts).tolist())


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run on pairs of right and wrong sums, and what it said."""
    folder, display = tmp_path_factory.mktemp("trained"), Quiet()
    data = write_jsonl(folder / "pairs.jsonl", sums("pairwise", 1500, 50))
    config = RewardConfig(str(checkpoint), str(data), lr=3e-3, steps=300, eval_every=100)
    train_reward(replace(config, out=str(folder / "run")), display)
    return folder / "run", display.lines


def test_right_sums_are_told_from_wrong_ones_of_prompts_never_seen(trained):
    folder, lines = trained
    before, last = records(folder)[0], records(folder)[-1]
    assert before["eval/accuracy"] < 0.75 and last["eval/accuracy"] >= 0.95
    assert last["eval/ece"] < 0.1 and last["eval/brier"] < 0.05 < before["eval/brier"]
    assert last["eval/reward_std"] > before["eval/reward_std"] > 0
    assert last["eval/reward_min"] < last["eval/reward_mean"] < last["eval/reward_max"]
    assert [r["step"] for r in records(folder) if "eval/accuracy" in r] == [0, 100, 200, 300]
    said = "\n".join(lines)
    measures = r"  held-out accuracy 0\.\d+  ece .*  brier .*  score .* ± "
    assert re.search(rf"^before: \d+ lines to train on, \d+ held out{measures}", said, re.MULTILINE)
    assert re.search(r"^reward 300/300  loss \S+  accuracy \S+  margin \S+  held-out accuracy", said, re.MULTILINE)


def test_the_mean_score_of_the_reference_is_taken_away(trained, checkpoint, tmp_path):
    folder, _ = trained
    judge = RewardModel.from_pretrained(folder / "model")
    assert judge.model.head.bias == pytest.approx(records(folder)[-1]["eval/reward_mean"], abs=1e-5)
    reference = write_jsonl(
        tmp_path / "sft.jsonl", [{"prompt": "1+2=", "completion": "03"}, {"prompt": "4=", "completion": ""}]
    )
    data = write_jsonl(tmp_path / "pairs.jsonl", sums("pairwise", 9))
    config = RewardConfig(str(checkpoint), str(data), steps=1, reference=str(reference), out=str(tmp_path / "run"))
    judge = RewardModel.from_pretrained(train_reward(config, Quiet()))
    assert judge.model.head.bias != 0
    assert sum(judge(["1+2=", "4="], ["03", ""])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["pointwise", "bce", "process"])
def test_every_kind_learns_and_scores(kind, checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "lines.jsonl", sums(kind, 600, 5))
    out = tmp_path / "run"
    config = RewardConfig(str(checkpoint), str(data), kind, lr=3e-3, steps=100, out=str(out), separator=",")
    judge = RewardModel.from_pretrained(train_reward(config, Quiet()))
    before, after = records(out)[0], records(out)[-1]
    assert after["loss"] < records(out)[1]["loss"] and after["eval/loss"] < 0.75 * before["eval/loss"]
    assert (judge.model.head.kind, judge.model.head.bias) == (kind, 0)
    text = "0,05" if kind == "process" else "05"
    prompt, tokens = judge.tokenizer.encode("02+03="), [*judge.tokenizer.encode(text), 2]
    places = (1, LAST) if kind == "process" else (LAST,)
    scores = torch.stack(alone(judge.model, Row(prompt, tokens, places=places)))
    wanted = scores.tolist() if kind == "pointwise" else scores.sigmoid().tolist()
    assert judge(["02+03="], [text]) == [pytest.approx(min(wanted), abs=1e-5)]
    for steps, value in (("prod", math.prod(wanted)), ("last", wanted[-1])):
        judge.steps = steps
        assert judge.score([prompt], [tokens]) == [pytest.approx(value, abs=1e-5)]


def test_lines_without_a_label_and_prompts_without_both_labels_are_no_error(checkpoint, tmp_path):
    blank = [{"prompt": f"{i}=", "steps": ["1", "2"], "labels": [None, None]} for i in range(4)]
    for kind, lines in (
        ("process", blank),
        ("bce", [{"prompt": f"{i}=", "completion": "1", "label": 1} for i in range(4)]),
    ):
        out, display = tmp_path / kind, Quiet()
        data = write_jsonl(tmp_path / f"{kind}.jsonl", lines)
        train_reward(RewardConfig(str(checkpoint), str(data), kind, out=str(out), heldout=0.5, separator=","), display)
        assert records(out)[-1]["accuracy"] is None and "held-out accuracy –  auc –" in display.lines[-1]
        assert (records(out)[-1]["loss"] == 0) == (kind == "process")


def config_of(checkpoint: Path, tmp_path: Path, kind: str, name: str, **options) -> RewardConfig:
    data = write_jsonl(tmp_path / f"{kind}.jsonl", sums(kind, 40))
    small = {"steps": 6, "batch": 5, "lr": 1e-3, "save_every": 2, "eval_every": 3, "separator": ",", "head": "mlp"}
    return RewardConfig(str(checkpoint), str(data), kind, **small | options, out=str(tmp_path / name))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert untimed(one) == untimed(other)
    for file in ("model/model.safetensors", "model/config.json", "checkpoints/step-000006/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize(("kind", "dtype"), [("pairwise", "float32"), ("pairwise", "bfloat16"), ("bce", "float32")])
def test_a_killed_and_resumed_run_leaves_the_same_bits(kind, dtype, checkpoint, tmp_path, monkeypatch):
    whole = config_of(checkpoint, tmp_path, kind, "whole", dtype=dtype)
    train_reward(whole, Quiet())
    killed = replace(whole, out=str(tmp_path / "killed"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_update(patch, 4, kill)
        train_reward(killed, Quiet())
    train_reward(replace(killed, resume=True, micro_batch_tokens=4096), Quiet())
    assert_equal_runs(Path(whole.out), Path(killed.out))


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_bits(checkpoint, tmp_path):
    class Impatient(Quiet):
        def progress(self, stage: str, done: int, total: int) -> None:
            if (stage, done) == ("reward", 3):
                signal.raise_signal(signal.SIGINT)

    whole = config_of(checkpoint, tmp_path, "pairwise", "whole", save_every=100)
    train_reward(whole, Quiet())
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    display = Impatient()
    with pytest.raises(KeyboardInterrupt):
        train_reward(stopped, display)
    assert "stopped after step 3; continue with --resume" in display.lines[-1]
    assert [p.name for p in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-000003"]
    resumed = cli.parse("reward", ["--resume", "--out", stopped.out])
    assert resumed == replace(stopped, resume=True)
    train_reward(resumed, Quiet())
    assert_equal_runs(Path(whole.out), Path(stopped.out))


def test_training_goes_on_from_a_reward_model(trained, checkpoint, tmp_path):
    config = config_of(checkpoint, tmp_path, "pairwise", "more", steps=1, head="linear")
    data = write_jsonl(tmp_path / "data.jsonl", sums("pairwise", 200, 50))
    train_reward(replace(config, model=str(trained[0] / "model"), data=str(data)), Quiet())
    assert records(tmp_path / "more")[0]["eval/accuracy"] > 0.9


# --- as a reward -----------------------------------------------------------------------------------------------------


def test_a_model_is_a_reward_by_name(trained):
    reward = load_reward(f"model:{trained[0] / 'model'}")
    right, wrong = reward(prompts=["12+13=", "12+13="], completions=["25", "74"], answer=["25", "25"])
    assert right > wrong
    ids = [*reward.tokenizer.encode("25"), reward.tokenizer.eos_id]
    assert reward(prompts=["12+13="], completions=["25"], completion_ids=[ids]) == [pytest.approx(right, abs=1e-5)]
    cut = reward(prompts=["12+13="], completions=["25"], completion_ids=[ids[:-1]])
    assert cut == reward.score([reward.tokenizer.encode("12+13=")], [ids[:-1]]) != [right]


def test_what_a_reward_model_cannot_score_is_named(trained, checkpoint):
    reward = load_reward(f"model:{trained[0] / 'model'}")
    with pytest.raises(InputError, match="completion 0: its tokens spell '2' and not '05': they are of another"):
        reward(prompts=["2+3="], completions=["05"], completion_ids=[reward.tokenizer.encode("2")])
    with pytest.raises(InputError, match="have 37 tokens, and the reward model was made for 32"):
        reward(prompts=["2+3="], completions=["1" * 32])
    with pytest.raises(InputError, match="holds token 99, outside"):
        reward.score([[3]], [[99]])
    with pytest.raises(InputError, match="is no reward model"):
        load_reward(f"model:{checkpoint}")
    with pytest.raises(InputError, match="does not exist"):
        load_reward("model:/nowhere")


def test_tokens_may_go_on_after_the_text_that_a_stop_text_ended(checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    assert spelled_tokens(tokenizer, "12", tokenizer.encode("12=="), "here") == tuple(tokenizer.encode("12=="))


# --- from a rule to a reward -----------------------------------------------------------------------------------------


def lines_of(labels: str) -> list[dict]:
    return [
        {"prompt": "p", "completion": str(i), "completion_tokens": [i], "label": int(label)}
        for i, label in enumerate(labels)
    ]


def test_balancing_keeps_as_many_right_as_wrong_ones():
    kept = balanced(lines_of("1101110"), 0)
    assert [line["label"] for line in kept].count(1) == 2 == len(kept) / 2
    assert [line["completion"] for line in kept] == sorted(line["completion"] for line in kept)
    assert balanced(lines_of("111"), 0) == []


def test_pairs_and_labels_of_the_completions_of_a_prompt():
    group = [line | {"reward": float(line["label"]), "finish_reason": "stop"} for line in lines_of("1101110")]
    assert [(p["chosen"], p["rejected"], p["rejected_tokens"]) for p in pairs_of(group, 4)] == [
        ("0", "2", [2]),
        ("1", "6", [6]),
    ]
    group[3]["reward"], group[4]["finish_reason"] = None, "length"
    assert labels_of([*group, group[0]]) == [line for i, line in enumerate(lines_of("1101110")) if i != 3]


def test_a_rule_becomes_data_data_a_model_and_the_model_a_reward(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = "arithmetic:op=sum,digits=1,style=plain"
    sampling = f"--model {checkpoint} --task {task} --max-tokens 4"
    cli.main(f"outcomes {sampling} --samples 24 --out data".split())
    said = capsys.readouterr().out
    assert said.endswith("samples: data/samples.jsonl\nlabels:  data/labels.jsonl\npairs:   data/pairs.jsonl\n")
    lines, pairs = (
        [json.loads(line) for line in Path(f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("labels", "pairs")
    )
    right = [line for line in lines if line["label"]]
    assert len(right) == len(lines) / 2 >= len(pairs) > 5
    written = f"{len(pairs)} pairs, {len(right)} labels of right completions and {len(right)} of wrong ones"
    assert f"{written} from 80 prompts" in said.replace("\n", " ")
    for line in lines:
        found = re.findall(r"\d+", line["completion"])
        a, b = map(int, re.findall(r"\d+", line["prompt"]))
        assert line["label"] == (bool(found) and int(found[-1]) == a + b)
    cut = [line for line in lines if line["completion_tokens"][-1] != 2]
    assert cut and all(len(line["completion_tokens"]) == 4 for line in cut)
    for kind, data in (("bce", "data/labels.jsonl"), ("pairwise", "data/pairs.jsonl")):
        cli.main(f"reward --model {checkpoint} --data {data} --kind {kind} --out {kind} --steps 2".split())
        written = f"model:  {kind}/model\nplot:   {kind}/plot.png\nreport: {kind}/report.html\n"
        assert capsys.readouterr().out.endswith(written) and "Accuracy" in Path(kind, "report.html").read_text()
    run = "--steps 1 --prompts 2 --group 4 --eval-prompts 2 --eval-samples 2 --shown 0 --out grpo"
    cli.main(f"grpo {sampling} {run} --rewards model:bce/model=1.0 model:pairwise/model=0.5".split())
    record = records(Path("grpo"))[-1]
    assert 0 < record["reward/model:bce/model"] < 1
    total = record["reward/correct"] + record["reward/model:bce/model"] + 0.5 * record["reward/model:pairwise/model"]
    assert record["reward/mean"] == pytest.approx(total)


def test_outcomes_without_any_contrast_say_so(checkpoint, tmp_path):
    task = write_jsonl(
        tmp_path / "task.jsonl", [{"prompt": "1=", "answer": "never"}, {"prompt": "2=", "answer": "never"}]
    )
    config = OutcomesConfig(str(checkpoint), str(task), out=str(tmp_path / "o"), samples=2, max_tokens=3)
    with pytest.raises(InputError, match=r"no prompt of 1 has both right and wrong .*0 of 2 .*take more samples"):
        sample_outcomes(config, Quiet())
    _, labels, pairs = sample_outcomes(replace(config, balance=False, out=str(tmp_path / "all")), Quiet())
    assert {json.loads(line)["label"] for line in labels.read_text().splitlines()} == {0} and pairs.read_text() == ""
