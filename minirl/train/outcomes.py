"""Completions that a rule has checked: data for offline RL, for reward models and for preferences.

    training prompts -> k completions each -> right or wrong -> samples.jsonl   every one, with its log-probs
                                                             -> labels.jsonl    each once: pointwise and bce
                                                             -> pairs.jsonl     right beside wrong: pairwise, prefer

Each text has its tokens beside it, stop token or stop text included, so that training reads what was sampled. A
completion that was cut at max_tokens has no end that could be learned, so it is in no pair. Among the labels it stays,
with the rule's verdict: a reward model meets such ones too.
"""

import json
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from minirl.errors import InputError
from minirl.files import write_jsonl
from minirl.model import Transformer
from minirl.rewards.numbers import NUMBER
from minirl.rollout import Rollout, sample
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import Task, parse_task
from minirl.tokenizer import Tokenizer
from minirl.train.prompts import measure, show_notes
from minirl.train.run import (
    Display,
    interruptible,
    load,
    refuse_below_one,
    refuse_negative,
    refuse_not_positive,
    refuse_unknown_choices,
    refuse_unwritable,
)

CHUNK = 64  # prompts sampled at a time; draws are keyed by chunk, so another number gives other completions
FILES = ("samples.jsonl", "labels.jsonl", "pairs.jsonl")

Group = list[dict]  # the lines of samples.jsonl that come of one prompt, in the order of sampling


@dataclass(frozen=True)
class SampleConfig:
    """Sample completions of a task's training prompts, and check them."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    task: str = "arithmetic"
    """arithmetic, countdown, gsm8k, math, humaneval, mbpp, reasoning_gym, or a file (JSONL, Parquet), folder or name of
    a data set, with options after a colon: arithmetic:op=product,digits=2"""
    out: str = "runs/samples"
    """Folder of what is written."""
    prompts: int | None = None
    """Training prompts, the first so many; None: all."""
    samples: int = 16
    """Completions a prompt (k)."""
    max_per_prompt: int = 4
    """Most right completions (rft) or pairs of one prompt that are kept, so that easy ones do not outweigh others."""
    distinct: Literal["text", "numbers"] = "text"
    """Of completions that are the same the first is kept: the same are their texts, or the numbers in them."""
    max_tokens: int = 256
    """Longest completion; one that is cut there is neither fine-tuned on nor paired."""
    temperature: float = 0.7
    """Of sampling."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; what is checked and kept ends before them."""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in the model's context: stop before the first step, or leave it
    out."""
    reward_timeout: float = 10.0
    """Seconds a completion that a checker from a file may take; longer is wrong."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template reads, each as --template.NAME VALUE: --template.enable_thinking false."""
    system: str | None = None
    """System message of the prompts whose messages have none."""
    slots: int = 64
    """Completions sampled at a time: a memory knob that changes no token, and log-probs by rounding at most."""
    seed: int = 0
    """Same seed, same completions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self):
        refuse_below_one(self, "samples", "max_per_prompt", "slots")
        refuse_negative(self, "seed")
        refuse_unknown_choices(self)
        if self.prompts is not None:
            refuse_below_one(self, "prompts")
        refuse_not_positive(self, "reward_timeout")
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        sizes = {"n": self.samples, "max_tokens": self.max_tokens, "stop": self.stop}
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, **sizes)


@dataclass(frozen=True)
class OutcomesConfig(SampleConfig):
    """Sample a task's prompts and check the completions: data for reward, prefer and offline RL."""

    out: str = "runs/outcomes"
    """Folder of samples.jsonl (all completions), labels.jsonl (which are right) and pairs.jsonl (right and wrong)."""
    temperature: float = 1.0
    """Of sampling."""
    balance: bool = True
    """As many right as wrong labels of each prompt, else a reward model learns which prompts are easy; prompts without
    both have no label."""
    match_length: bool = False
    """Pair each right completion with the wrong one of nearest length (in characters), so that length tells little."""

    def __post_init__(self):
        super().__post_init__()
        if self.balance and self.samples == 1:
            raise InputError("samples = 1: balance takes right and wrong completions of one prompt: ask for 2 at least")


# ---- sampling and checking -------------------------------------------------------------------------------------------


def sample_and_check(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    config: SampleConfig,
    display: Display,
    done: Sequence[Group] = (),
) -> tuple[list[Group], bool]:
    """config.samples completions of each training prompt, judged by task.correct; and whether Ctrl-C came, after which
    the CHUNK of prompts under way is finished. `done` are the groups of an earlier call that it stopped."""
    if not task.train:
        raise InputError(f"task {config.task!r} has no training examples: ask for some")
    examples = measure(task, "train", tokenizer, model.config, config, display, config.prompts).examples
    sampler = Sampler(model, config.slots, tokenizer=tokenizer)
    params = replace(config.sampling, stop_ids=tokenizer.stop_ids)
    groups, stopped, named = list(done), False, set()
    display.progress("prompts", len(groups), len(examples))
    with interruptible(display) as stop_requested:
        while len(groups) < len(examples) and not stopped:
            start = len(groups)
            keyed = replace(params, seed=(config.seed << 32) + start // CHUNK)
            part = examples[start : start + CHUNK]
            rollout = sample(sampler, tokenizer, part, keyed, lambda i, total: display.progress("samples", i, total))
            on_bad = "skip" if start else "stop"  # later it may be a passing failure, which must not cost the samples
            rollout.indices = list(range(start, start + len(part)))
            rollout.score({"correct": (1.0, task.correct)}, config.reward_timeout, on_bad=on_bad)
            if start == 0:
                rollout.require_score()
            for key, line in rollout.fault_lines().items():
                if key not in named:
                    named.add(key)
                    display.line(line)
            groups += [_lines(rollout, i, keyed) for i in range(len(part))]
            display.progress("prompts", len(groups), len(examples))
            stopped = stop_requested()
    return groups, stopped


def _lines(rollout: Rollout, i: int, params: SamplingParams) -> Group:
    """A reward of null could not be scored. Log-probs are those at `temperature`; under top-p they are of a cut
    distribution, with which no trainer could compare, so there are none."""
    example, lines = rollout.examples[i], []
    columns = {"prompt": example["prompt"]} | {name: value for name, value in example.items() if _is_json(value)}
    for row in range(i * rollout.group_size, (i + 1) * rollout.group_size):
        completion, reward = rollout.completions[row], rollout.rewards[row].item()
        own = {"completion": rollout.texts[row], "completion_tokens": completion.tokens}
        own |= {"finish_reason": completion.finish_reason, "temperature": params.temperature}
        own |= {"logprobs": completion.logprobs} if params.top_p == 1 else {}
        lines.append(columns | own | {"reward": reward if reward == reward else None})
    return lines


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def right_of(group: Group) -> list[dict]:
    return [line for line in group if line["reward"] == 1]


def right_and_wrong(group: Group, distinct: str) -> tuple[list[dict], list[dict]]:
    """The different completions that came to an end; what could not be scored is in neither."""
    ended = [line for line in group if line["finish_reason"] != "length" and line["reward"] is not None]
    kind = _numbers if distinct == "numbers" else _text
    right, wrong = right_of(ended), [line for line in ended if line["reward"] != 1]
    return first_of_each(kind, right), first_of_each(kind, wrong)


def first_of_each(kind: Callable[[dict], Hashable], lines: Sequence[dict]) -> list[dict]:
    found: dict[Hashable, dict] = {}
    for line in lines:
        found.setdefault(kind(line), line)
    return list(found.values())


def _text(line: dict) -> str:
    return line["completion"]


def _numbers(line: dict) -> Hashable:
    """A text without any number is one of its own kind."""
    return tuple(match[0].replace(",", "") for match in NUMBER.finditer(_text(line))) or _text(line)


def summary(groups: Sequence[Group], config: SampleConfig) -> str:
    right = sum(len(right_of(group)) for group in groups)
    cut = sum(line["finish_reason"] == "length" for group in groups for line in group)
    total = len(groups) * config.samples
    return f"{right} of {total} completions right, {cut} cut at max_tokens = {config.max_tokens}"


# ---- labels and pairs ------------------------------------------------------------------------------------------------


def labels_of(group: Group) -> list[dict]:
    """The different completions that were scored, with label 1 if right, else 0."""
    scored = [line for line in group if line["reward"] is not None]
    kept = ("prompt", "tools", "completion", "completion_tokens")
    return [
        {name: line[name] for name in kept if name in line} | {"label": int(line["reward"] == 1)}
        for line in first_of_each(lambda line: tuple(line["completion_tokens"]), scored)
    ]


def balanced(labels: list[dict], seed: int) -> list[dict]:
    """As many right as wrong ones, the rest drawn away by a seed."""
    sides = [[i for i, line in enumerate(labels) if line["label"] == label] for label in (0, 1)]
    count = min(map(len, sides))
    kept = {i for side in sides for i in random.Random(seed).sample(side, count)}
    return [line for i, line in enumerate(labels) if i in kept]


def pairs_of(group: Group, most: int, distinct: str = "text", match_length: bool = False) -> list[dict]:
    """At most `most` pairs of a right and a wrong completion, each completion in one pair only."""
    right, wrong = right_and_wrong(group, distinct)
    pairs = []
    for chosen in right[: min(most, len(wrong))]:
        gaps = [abs(len(_text(line)) - len(_text(chosen))) for line in wrong]
        rejected = wrong.pop(gaps.index(min(gaps)) if match_length else 0)
        asked = {name: chosen[name] for name in ("prompt", "tools") if name in chosen}
        pair = asked | {"chosen": _text(chosen), "rejected": _text(rejected)}
        tokens = {"chosen_tokens": chosen["completion_tokens"], "rejected_tokens": rejected["completion_tokens"]}
        pairs.append(pair | tokens)
    return pairs


# ---- the command -----------------------------------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    """Said before the work, not after it."""
    for name in FILES:
        if (out / name).exists():
            raise InputError(f"{out / name} exists: choose another --out, or remove it")
    refuse_unwritable(out)


def write_outcomes(config: OutcomesConfig, display: Display | None = None) -> list[Path]:
    """Run the whole of `minirl outcomes`; returns its FILES. Ctrl-C writes those of the prompts that are done."""
    display, out = display or Display(), Path(config.out)
    refuse_existing(out)
    task = parse_task(config.task)
    show_notes(task, display)
    model, tokenizer = load(config.model, config.dtype, config.device, config=config)
    groups, stopped = sample_and_check(model, tokenizer, task, config, display)
    labels, pairs = [], []
    for group in groups:
        own = labels_of(group)
        labels += balanced(own, config.seed) if config.balance else own
        pairs += pairs_of(group, config.max_per_prompt, config.distinct, config.match_length)
    files = [out / name for name in FILES]
    write_jsonl(files[0], [line for group in groups for line in group])
    if config.balance and not labels:
        raise InputError(
            f"no prompt of {len(groups)} has both right and wrong completions ({summary(groups, config)}): take more "
            f"samples, or prompts of another difficulty; {files[0]} holds what was sampled"
        )
    write_jsonl(files[1], labels)
    write_jsonl(files[2], pairs)
    right = sum(line["label"] for line in labels)
    written = f"{len(pairs)} pairs, {right} labels of right completions and {len(labels) - right} of wrong ones"
    display.line(f"{written} from {len(groups)} prompts: {summary(groups, config)}")
    if stopped:
        raise KeyboardInterrupt
    return files
