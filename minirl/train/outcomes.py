"""Data for reward models from a rule: sample answers to a task, check them, and write which were right.

Two files come out: labelled completions (for pointwise and bce) and pairs of a right and a wrong answer to one prompt
(for pairwise). Each text has its tokens beside it, stop token included, so that training reads what was sampled.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minirl.errors import InputError
from minirl.files import write_atomic
from minirl.rollout import Rollout, sample
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import Task, parse_task
from minirl.train.run import (
    Display,
    load,
    refuse_below_one,
    refuse_negative,
    refuse_not_positive,
    refuse_unknown_choices,
)


@dataclass(frozen=True)
class OutcomesConfig:
    """Sample answers to a task, check them by its rule, and write labels and pairs for `minirl reward`."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    task: str = "arithmetic"
    """arithmetic, countdown or a .jsonl file, with options after a colon: arithmetic:op=product,digits=2"""
    out: str = "outcomes.jsonl"
    """JSONL file of labelled completions; the pairs come beside it, in outcomes-pairs.jsonl."""
    prompts: int = 256
    """Training prompts of the task, at most."""
    samples: int = 8
    """Completions a prompt."""
    max_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """Of sampling."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the rule sees what comes before them."""
    balance: bool = True
    """As many right as wrong answers to each prompt, else a reward model learns which prompts are easy; prompts
    without both are left out."""
    reward_timeout: float | None = None
    """Seconds a completion that the rule may take, in a process that can be killed; longer is left out."""
    seed: int = 0
    """Same seed, same completions."""
    slots: int = 64
    """Completions at a time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self):
        refuse_below_one(self, "prompts", "samples", "slots")
        refuse_negative(self, "seed")
        refuse_unknown_choices(self)
        if self.reward_timeout is not None:
            refuse_not_positive(self, "reward_timeout")
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            self.samples, self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, stop=self.stop, seed=self.seed
        )

    @property
    def pairs(self) -> Path:
        return Path(self.out).with_name(f"{Path(self.out).stem}-pairs.jsonl")


def sample_and_label(
    sampler: Sampler,
    tokenizer,
    task: Task,
    examples: Sequence[dict],
    params: SamplingParams,
    timeout=None,
    progress=None,
) -> list[list[dict]]:
    """For each example its different completions in the order of sampling: {"prompt", "completion",
    "completion_tokens", "label": 1 or 0}. What the rule cannot score is left out; nothing scored is an InputError."""
    rollout = sample(sampler, tokenizer, examples, params, progress)
    rollout.score({"correct": (1.0, task.correct)}, timeout)
    rollout.require_score()
    return [_labelled(rollout, i) for i in range(len(examples))]


def _labelled(rollout: Rollout, i: int) -> list[dict]:
    found: dict[tuple[int, ...], dict] = {}
    for j in range(i * rollout.group_size, (i + 1) * rollout.group_size):
        reward, tokens = rollout.rewards[j].item(), rollout.completions[j].tokens
        if reward == reward:
            line = {"prompt": rollout.examples[i]["prompt"], "completion": rollout.texts[j]}
            found.setdefault(tuple(tokens), line | {"completion_tokens": tokens, "label": int(reward == 1)})
    return list(found.values())


def balanced(lines: list[dict], seed: int) -> list[dict]:
    """As many right as wrong ones, the rest drawn away by a seed."""
    sides = [[i for i, line in enumerate(lines) if line["label"] == label] for label in (0, 1)]
    count = min(map(len, sides))
    kept = {i for side in sides for i in random.Random(seed).sample(side, count)}
    return [line for i, line in enumerate(lines) if i in kept]


def pairs_of(lines: list[dict]) -> list[dict]:
    """The right answers to one prompt, each beside a wrong one, as long as there are both."""
    right, wrong = ([line for line in lines if line["label"] == label] for label in (1, 0))
    return [
        {
            "prompt": r["prompt"],
            "chosen": r["completion"],
            "rejected": w["completion"],
            "chosen_tokens": r["completion_tokens"],
            "rejected_tokens": w["completion_tokens"],
        }
        for r, w in zip(right, wrong, strict=False)
    ]


def write_outcomes(config: OutcomesConfig, display: Display | None = None) -> tuple[Path, Path]:
    """Run the whole of `minirl outcomes`; returns the files of labels and of pairs."""
    display, task = display or Display(), parse_task(config.task)
    if not task.train:
        raise InputError(f"task {config.task!r} has no training examples: ask for some")
    model, tokenizer = load(config.model, config.dtype, config.device)
    params = replace(config.sampling, stop_ids=tokenizer.stop_ids)
    groups = sample_and_label(
        Sampler(model, config.slots, tokenizer=tokenizer),
        tokenizer,
        task,
        task.train[: config.prompts],
        params,
        config.reward_timeout,
        lambda done, total: display.progress("completions", done, total),
    )
    pairs = [pair for group in groups for pair in pairs_of(group)]
    if config.balance and not pairs:
        raise InputError(
            f"no prompt of {len(groups)} has both right and wrong answers among {config.samples}: raise --samples, or "
            "take other prompts or another checkpoint"
        )
    kept = [balanced(group, config.seed) for group in groups] if config.balance else groups
    lines = [line for group in kept for line in group]
    _write(Path(config.out), lines)
    _write(config.pairs, pairs)
    right, contrast = sum(line["label"] for line in lines), sum({0, 1} == {x["label"] for x in g} for g in groups)
    display.line(
        f"{contrast} of {len(groups)} prompts have right and wrong answers; wrote {right} right and "
        f"{len(lines) - right} wrong ones, and {len(pairs)} pairs"
    )
    return Path(config.out), config.pairs


def _write(path: Path, lines: list[dict]) -> None:
    # Half of a surrogate pair has no UTF-8; as an escape it is JSON again.
    text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
    write_atomic(path, lambda staging: staging.write_text(text, encoding="utf-8"))
