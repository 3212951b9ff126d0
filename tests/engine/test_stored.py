"""Offline data: stored completions take the way of sampled ones, and nothing of them is invented."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import (
    EXAMPLES,
    SMALL,
    TASK,
    Quiet,
    Trainer,
    check_close,
    has_seven,
    records,
    tiny_checkpoint,
    tiny_config,
)

from minirl import grpo
from minirl.errors import InputError
from minirl.grpo import GRPOConfig
from minirl.lab.training import train_grpo, train_ppo
from minirl.losses import PolicyLoss
from minirl.ppo import PPOConfig
from minirl.presets import preset_defaults
from minirl.records import read_outcomes
from minirl.stored import Stored
from minirl.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def write(tmp_path):
    def written(lines, name: str = "triples.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return written


def triples(prompts: int = 6, completions: int = 6) -> list[dict]:
    texts = [("7", "17", "3+7", "20", "5=", "771")[j % 6] * (1 + j // 6) for j in range(completions)]
    return [
        {"prompt": example["prompt"], "completion": text, "reward": has_seven([0], [text])[0] + i / 10}
        for i, example in enumerate(EXAMPLES[:prompts])
        for text in texts
    ]


def settings(checkpoint: Path, data: Path, out: Path, **changes) -> dict:
    return {"model": str(checkpoint), "out": str(out), **SMALL, "data": str(data), **changes}


@pytest.fixture
def make(checkpoint, tmp_path):
    def trainer(data: Path, **changes) -> Trainer:
        config = GRPOConfig(**settings(checkpoint, data, tmp_path / "run", **changes))
        return Trainer(grpo, config, TASK, read_outcomes(data))

    return trainer


# --- the way of a sampled one ----------------------------------------------------------------------------------------


def test_sampled_completions_that_were_stored_give_the_gradient_of_the_sampled_ones(make, write, checkpoint, tmp_path):
    """With their tokens and log-probs nothing is lost, cut completions included."""
    config = GRPOConfig(model=str(checkpoint), out=str(tmp_path / "o"), **SMALL)
    online = Trainer(grpo, config)
    rollout = online.collect(0)
    assert len({c.finish_reason for c in rollout.completions}) == 2
    lines = [
        {
            "prompt": rollout.examples[i // 6]["prompt"],
            "completion": rollout.texts[i],
            "reward": rollout.rewards[i].item(),
            "completion_tokens": c.tokens,
            "logprobs": c.logprobs,
            "finish_reason": c.finish_reason,
        }
        for i, c in enumerate(rollout.completions)
    ]
    offline = make(write(lines))
    stored = offline.collect(0)
    assert sorted(stored.texts) == sorted(rollout.texts)
    assert sorted(stored.truncated.tolist()) == sorted(rollout.truncated.tolist())
    got, wanted = offline.gradient(offline.batch(stored)), online.gradient(online.batch(rollout))
    check_close(got, wanted, 1e-5)


def test_a_text_alone_is_taken_to_have_ended_by_itself(make, write, checkpoint):
    trainer, tokenizer = make(write(triples())), Tokenizer.from_pretrained(checkpoint)
    rollout = trainer.collect(0)
    for text, completion in zip(rollout.texts, rollout.completions, strict=True):
        assert completion.tokens == [*tokenizer.encode(text), tokenizer.eos_id] and completion.finish_reason == "stop"
    assert trainer.batch(rollout).rollout_logp is None


def test_stored_log_probs_show_how_far_the_policy_is_from_the_one_that_drew(make, write, checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    lines = [line | {"completion_tokens": tokenizer.encode(line["completion"])} for line in triples()]
    lines = [line | {"logprobs": [-0.5] * len(line["completion_tokens"])} for line in lines]
    trainer = make(write(lines), loss=PolicyLoss(importance="token_truncate"))
    metrics = trainer.step(0)
    assert metrics["mismatch/abs_mean"] > 0.5  # a random model says about -2.8
    assert metrics["tis/mean"] < 0.5


def test_groups_hold_different_completions_of_one_prompt_and_others_in_the_next_epoch(make, write):
    trainer = make(write(triples(prompts=4, completions=10)), prompts=4, group=6)
    seen = []
    for step in range(2):
        rollout = trainer.collect(step)
        trainer.cursor += 1
        assert sorted(e["prompt"] for e in rollout.examples) == sorted(e["prompt"] for e in EXAMPLES[:4])
        for group in range(4):
            texts = rollout.texts[6 * group : 6 * group + 6]
            assert len(set(texts)) == 6
            seen.append((rollout.examples[group]["prompt"], frozenset(texts)))
    assert len(set(seen)) > 4
    wanted = {(line["prompt"], line["completion"]): line["reward"] for line in triples(4, 10)}
    for i, text in enumerate(rollout.texts):
        assert rollout.rewards[i].item() == wanted[rollout.examples[i // 6]["prompt"], text]


@pytest.mark.parametrize("train", ["grpo", "ppo"])
def test_a_run_on_stored_data_learns_it(train, checkpoint, write, tmp_path):
    kind, function = {"grpo": (GRPOConfig, train_grpo), "ppo": (PPOConfig, train_ppo)}[train]
    more = {"eval_prompts": 5, "eval_samples": 16}  # of few samples the gain would be a matter of luck
    more |= {"critic_lr": 1e-2, "kl_in_reward": 0.0} if train == "ppo" else {}
    data, display = write(triples(20)), Quiet()
    config = kind(**settings(checkpoint, data, tmp_path / train, steps=20, eval_every=0, **more))
    function(config, display, TASK)
    lines = records(tmp_path / train)
    assert lines[-1]["eval/mean"] > lines[0]["eval/mean"] + 0.2
    assert any("120 stored completions of 20 prompts" in line for line in display.lines)
    assert lines[-1]["tokens_per_s/rollout"] is None  # nothing was sampled


def test_dynamic_sampling_takes_groups_whose_stored_rewards_differ(make, write):
    lines = triples(8)
    for line in lines[:24]:
        line["reward"] = 1.0
    trainer = make(write(lines), prompts=4, dynamic_sampling=True, max_gen_batches=2)
    rollout = trainer.collect(0)
    assert {e["prompt"] for e in rollout.examples} == {line["prompt"] for line in lines[24:]}


def test_dynamic_sampling_reads_every_stored_prompt_before_any_again(make, write):
    """Of 8 prompts each second one is mixed: two batches of two, now and then three, make a step."""
    lines = triples(8)
    for i, line in enumerate(lines):
        line["reward"] = line["reward"] if i // 6 % 2 else 1.0
    trainer = make(write(lines), prompts=2, dynamic_sampling=True, max_gen_batches=3)
    seen, read = [], trainer.source.draw
    trainer.source.draw = lambda number, step: seen.append(rollout := read(number)) or rollout
    steps = [trainer.step(step) for step in range(4)]
    prompts = [example["prompt"] for rollout in seen for example in rollout.examples]
    assert len(prompts) == 2 * trainer.cursor == 2 * sum(m["gen_batches"] for m in steps) >= 16
    for start in range(0, len(prompts), 8):
        assert len(set(prompts[start : start + 8])) == len(prompts[start : start + 8])


def test_online_rft_on_stored_rewards_says_what_counts_as_right(make, write):
    trainer = make(write(triples()), **preset_defaults("online_rft", 6))
    assert "correct_only: no rule judges stored completions; those with a reward above 0.5 count as right" in (
        trainer.display.lines
    )
    rollout = trainer.collect(0)
    assert trainer.batch(rollout).mask.any(1).tolist() == [R > 0.5 for R in rollout.rewards.tolist()]


def test_tokens_that_go_on_after_their_text_were_ended_by_a_stop_text(stored, write, checkpoint):
    """Such a completion was not cut, and none of its tokens is another one's."""
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    ids = {text: tokenizer.encode(text) for text in ("7=", "7", "71")}
    lines = [GOOD | {"completion": "7", "completion_tokens": ids["7="]}]
    lines += [GOOD | {"completion": "7", "completion_tokens": [*ids["7"], tokenizer.eos_id]}]
    lines += [GOOD | {"completion": "71", "completion_tokens": ids["71"]}]
    completions = stored(write(lines)).draw(0).completions
    assert [c.tokens for c in completions] == [line["completion_tokens"] for line in lines]
    assert [c.finish_reason for c in completions] == ["stop", "stop", "length"]


def test_a_line_without_a_reward_teaches_nothing(make, write):
    lines = [line | {"reward": None if "20" in line["completion"] else line["reward"]} for line in triples()]
    trainer = make(write(lines))
    rollout = trainer.collect(0)
    batch = trainer.batch(rollout)
    unknown = torch.tensor(["20" in text for text in rollout.texts])
    assert unknown.any() and not batch.advantages[unknown].any()
    assert math.isfinite(trainer.metrics["reward/mean"])


# --- what is left out, and what is refused ---------------------------------------------------------------------------


@pytest.fixture
def stored(checkpoint):
    """Of a model with 32 positions."""
    tokenizer = Tokenizer.from_pretrained(checkpoint)

    def made(data: Path, vocab: int | None = None, **options) -> Stored:
        model = tiny_config(vocab_size=vocab or tokenizer.vocab_size, max_positions=32)
        config = GRPOConfig(model=str(checkpoint), data=str(data), **{"prompts": 1, "group": 3, **options})
        return Stored(read_outcomes(data), tokenizer, model, config, Quiet())

    return made


def test_prompts_with_too_few_completions_and_long_completions_are_left_out_and_counted(stored, write):
    lines = [*triples(3), {"prompt": "1+1=", "completion": "2", "reward": 1}]
    lines += [{"prompt": "0+0=", "completion": "9" * 40, "reward": 0}]
    assert stored(write(lines)).summary == (
        "18 stored completions of 3 prompts; prompts with fewer than 3, left out: 1; "
        "completions that are too long, left out: 1"
    )
    with pytest.raises(InputError, match="none of the 4 stored prompts has 7 completions of at most 32 tokens"):
        stored(write(lines), group=7)
    with pytest.raises(InputError, match=r"prompts = 4: .* has 3 prompts with 3 completions"):
        stored(write(lines), prompts=4)


def test_a_stored_prompt_without_room_is_named_or_dropped_as_one_that_is_sampled(stored, write):
    lines = [*triples(3), *({"prompt": "1" * 32, "completion": text, "reward": 1} for text in "123")]
    sentence = "line 19: its prompt has 32 tokens and the context holds 32, so there is no room for a completion"
    with pytest.raises(InputError, match=f"{sentence}: shorten it, or give --overlong-prompts drop"):
        stored(write(lines))
    dropped = stored(write(lines), overlong_prompts="drop")
    assert [len(lines) for _, lines in dropped.groups] == [6, 6, 6] and dropped.too_long == 3


def test_reading_stored_prompts_shows_how_far_it_is(make, write, monkeypatch):
    seen = []
    monkeypatch.setattr(Quiet, "progress", lambda self, *call: seen.append(call))
    make(write(triples(5)))
    assert ("prompts", 0, 5) in seen and ("prompts", 5, 5) in seen


def test_log_probs_are_compared_at_their_own_temperature_only(stored, write, checkpoint):
    tokens = {text: Tokenizer.from_pretrained(checkpoint).encode(text) for text in ("7", "17", "3+7")}
    lines = [
        {"prompt": "1+1=", "completion": text, "reward": 1, "completion_tokens": ids, "logprobs": [-1.0] * len(ids)}
        for text, ids in tokens.items()
    ]
    assert stored(write(lines)).logprobs
    unknown = write([{name: x for name, x in line.items() if name != "logprobs"} for line in lines])
    with pytest.raises(InputError, match=r"loss.importance = token_mask: the lines of .* have no 'logprobs'"):
        stored(unknown, loss=PolicyLoss(importance="token_mask"))
    cooler = write([line | {"temperature": 0.5} for line in lines])
    with pytest.raises(InputError, match=r"temperature = 1: the logprobs in .* are those at 0.5"):
        stored(cooler)
    assert stored(cooler, temperature=0.5).logprobs
    with pytest.raises(InputError, match="line 3: its 'temperature' is not that of the lines before"):
        read_outcomes(write([*lines[:2], lines[2] | {"temperature": 0.5}]))


def test_a_text_that_was_cut_has_no_stop_token(stored, write, checkpoint):
    lines = [{"prompt": "1+1=", "completion": text, "reward": 0, "finish_reason": "length"} for text in ("1", "2", "3")]
    rollout = stored(write(lines)).draw(0)
    assert [len(completion.tokens) for completion in rollout.completions] == [1, 1, 1] and rollout.truncated.all()


def test_what_shapes_a_reward_shapes_a_stored_one(make, write):
    lines = [line | {"finish_reason": "length"} for line in triples()]
    plain, punished = (
        make(write(lines), truncation=truncation, truncation_penalty=5.0).collect(0)
        for truncation in ("keep", "penalty")
    )
    assert punished.texts == plain.texts and torch.equal(punished.rewards, plain.rewards - 5)
    longer = make(write(triples()), overlong_cache=6).collect(0)
    assert longer.rewards.min() < 0


GOOD = {"prompt": "1+1=", "completion": "2", "reward": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([{"reward": "1"}], "line 1: its 'reward' must be a finite number"),
        ([{"reward": True}], "line 1: its 'reward' must be a finite number"),
        ([{"reward": math.nan}], "line 1: its 'reward' must be a finite number"),
        (
            [{}, {"completion_tokens": [1], "logprobs": [-0.5]}],
            "line 2: some lines have 'logprobs' and some",
        ),
        ([{"reward": 10**400}], "line 1: its 'reward' must be a finite number"),
        ([{"completion_tokens": [1], "logprobs": [10**400]}], "must be a number up to 0 for each"),
        ([{"completion_tokens": [1], "logprobs": [0.5]}], "must be a number up to 0 for each"),
        ([{"finish_reason": "bogus"}], "its 'finish_reason' must be stop or length"),
        ([{"temperature": "hot"}], "its 'temperature' must be a number"),
        ([{"logprobs": [-0.5]}], "line 1: its 'logprobs' must be a number up to 0 for each of its 'completion_tokens'"),
        ([{"completion_tokens": [1, 2], "logprobs": [-0.5]}], "must be a number up to 0 for each"),
        ([{"completion_tokens": [1], "logprobs": ["a"]}], "must be a number up to 0 for each"),
    ],
)
def test_a_broken_line_is_named(changes, sentence, write):
    with pytest.raises(InputError, match=sentence):
        read_outcomes(write([GOOD | change for change in changes]))


def test_a_line_without_a_reward_column_is_named(write):
    with pytest.raises(InputError, match="line 2: its 'reward' must be a finite number, or null"):
        read_outcomes(write([GOOD, {"prompt": "1", "completion": "2"}]))


def test_tokens_of_another_tokenizer_are_refused(stored, write):
    with pytest.raises(InputError, match=r"its tokens spell .* they are of another tokenizer"):
        stored(write([GOOD | {"completion_tokens": [1, 2, 3]}]), group=2)


def test_tokens_outside_the_vocabulary_are_refused(stored, write):
    with pytest.raises(InputError, match=r"line 1 holds token [0-9]+, outside the model's vocabulary of 2"):
        stored(write([GOOD]), vocab=2, group=2)


def test_an_id_of_the_model_that_the_tokenizer_has_not_is_refused(stored, write, checkpoint):
    """It has no text, so that the text of the completion does not give it away."""
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    padded = tokenizer.vocab_size + 1
    tokens = [*tokenizer.encode(GOOD["completion"]), padded]
    sentence = f"line 1 holds token {padded}, outside the model's vocabulary of {tokenizer.vocab_size}"
    with pytest.raises(InputError, match=sentence):
        stored(write([GOOD | {"completion_tokens": tokens}]), vocab=padded + 9, group=2)


def test_an_empty_prompt_is_named(stored, write):
    with pytest.raises(InputError, match="line 2: its prompt has no token"):
        stored(write([GOOD, GOOD | {"prompt": ""}]), group=2)


@pytest.mark.parametrize("other", [{"rewards": ("format=1",)}, {"rewards": ("correct=0",)}])
def test_stored_rewards_take_no_others(other, checkpoint):
    with pytest.raises(InputError, match="data holds completions with their rewards"):
        GRPOConfig(model=str(checkpoint), data="x.jsonl", **other)
