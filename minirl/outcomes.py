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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minirl.config import Count, SamplingConfig, TaskConfig, Whole
from minirl.errors import InputError
from minirl.files import write_jsonl
from minirl.model import Transformer
from minirl.policy import load
from minirl.prompts import measure
from minirl.rewards import score_rollout
from minirl.rollout import Rollout, sample
from minirl.run import (
    Display,
    interruptible,
    refuse_unwritable,
)
from minirl.sampler import Sampler, SamplingParams
from minirl.task import Task
from minirl.tokenizer import Tokenizer

CHUNK = 64  # prompts sampled at a time; draws are keyed by chunk, so another number gives other completions
FILES = ("samples.jsonl", "labels.jsonl", "pairs.jsonl")

Same = Callable[[dict], Hashable]  # lines with equal values are the same completion
Group = list[dict]  # the lines of samples.jsonl that come of one prompt, in the order of sampling


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig, TaskConfig):
    """Sample completions of a task's training prompts, and check them."""

    out: str = "runs/samples"
    """Folder of what is written."""
    prompts: Count | None = None
    """Training prompts, the first so many; None: all."""
    samples: Count = 16
    """Completions a prompt (k)."""
    max_per_prompt: Count = 4
    """Most right completions (rft) or pairs of one prompt that are kept, so that easy ones do not outweigh others."""
    distinct: Literal["text", "numbers"] = "text"
    """Keep only the first of completions whose texts, or the numbers in them, are the same."""
    max_tokens: int = 256
    """Longest completion; one that is cut there is neither fine-tuned on nor paired."""
    temperature: float = 0.7
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; what is checked and kept ends before them."""
    seed: Whole = 0

    def __post_init__(self):
        super().__post_init__()
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        return self.sampling_params(self.samples)


@dataclass(frozen=True, kw_only=True)
class OutcomesConfig(SampleConfig):
    """Sample a task's prompts and check the completions: data for reward, prefer and offline RL."""

    out: str = "runs/outcomes"
    """Folder of samples.jsonl (all completions), labels.jsonl (which are right) and pairs.jsonl (right and wrong)."""
    temperature: float = 1.0
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
    """Sample config.samples completions of each training prompt and judge them by task.correct.

    Return the groups, and whether Ctrl-C came, after which the CHUNK of prompts under way is finished. `done` are the
    groups of an earlier call that Ctrl-C stopped.
    """
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
            score_rollout(rollout, {"correct": (1.0, task.correct)}, config.reward_timeout, on_bad=on_bad)
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
    """Make the lines of prompt i; a reward of null could not be scored. Log-probs are those at `temperature`; under
    top-p they are of a cut distribution, with which no trainer could compare, so there are none."""
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


def the_text(line: dict) -> str:
    return line["completion"]


def right_of(group: Group) -> list[dict]:
    return [line for line in group if line["reward"] == 1]


def right_and_wrong(group: Group, same: Same) -> tuple[list[dict], list[dict]]:
    """Return the different completions that came to an end, right and wrong; one without a score is in neither."""
    ended = [line for line in group if line["finish_reason"] != "length" and line["reward"] is not None]
    right, wrong = right_of(ended), [line for line in ended if line["reward"] != 1]
    return first_of_each(same, right), first_of_each(same, wrong)


def first_of_each(same: Same, lines: Sequence[dict]) -> list[dict]:
    found: dict[Hashable, dict] = {}
    for line in lines:
        found.setdefault(same(line), line)
    return list(found.values())


def summary(groups: Sequence[Group], config: SampleConfig) -> str:
    right = sum(len(right_of(group)) for group in groups)
    cut = sum(line["finish_reason"] == "length" for group in groups for line in group)
    total = len(groups) * config.samples
    return f"{right} of {total} completions right, {cut} cut at max_tokens = {config.max_tokens}"


# ---- labels and pairs ------------------------------------------------------------------------------------------------


def labels_of(group: Group) -> list[dict]:
    """Return the different completions that were scored, with label 1 if right, else 0."""
    scored = [line for line in group if line["reward"] is not None]
    kept = ("prompt", "tools", "completion", "completion_tokens")
    return [
        {name: line[name] for name in kept if name in line} | {"label": int(line["reward"] == 1)}
        for line in first_of_each(lambda line: tuple(line["completion_tokens"]), scored)
    ]


def balanced(labels: list[dict], seed: int) -> list[dict]:
    """Keep as many right as wrong ones; the rest is drawn away by a seed."""
    sides = [[i for i, line in enumerate(labels) if line["label"] == label] for label in (0, 1)]
    count = min(map(len, sides))
    kept = {i for side in sides for i in random.Random(seed).sample(side, count)}
    return [line for i, line in enumerate(labels) if i in kept]


def pairs_of(group: Group, most: int, same: Same = the_text, match_length: bool = False) -> list[dict]:
    """Make at most `most` pairs of a right and a wrong completion, each completion in one pair only."""
    right, wrong = right_and_wrong(group, same)
    pairs = []
    for chosen in right[: min(most, len(wrong))]:
        gaps = [abs(len(line["completion"]) - len(chosen["completion"])) for line in wrong]
        rejected = wrong.pop(gaps.index(min(gaps)) if match_length else 0)
        asked = {name: chosen[name] for name in ("prompt", "tools") if name in chosen}
        pair = asked | {"chosen": chosen["completion"], "rejected": rejected["completion"]}
        tokens = {"chosen_tokens": chosen["completion_tokens"], "rejected_tokens": rejected["completion_tokens"]}
        pairs.append(pair | tokens)
    return pairs


# ---- the command -----------------------------------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    """Raise an InputError where a file is in the way, before the work and not after it."""
    for name in FILES:
        if (out / name).exists():
            raise InputError(f"{out / name} exists: choose another --out, or remove it")
    refuse_unwritable(out)


def write_outcomes(
    config: OutcomesConfig, task: Task, same: Same = the_text, display: Display | None = None
) -> list[Path]:
    """Sample, check and write; returns the FILES. Ctrl-C writes those of the prompts that are done. `same` tells which
    completions are one."""
    display, out = display or Display(), Path(config.out)
    refuse_existing(out)
    model, tokenizer = load(config.model, config.dtype, config.device, config=config)
    groups, stopped = sample_and_check(model, tokenizer, task, config, display)
    labels, pairs = [], []
    for group in groups:
        own = labels_of(group)
        labels += balanced(own, config.seed) if config.balance else own
        pairs += pairs_of(group, config.max_per_prompt, same, config.match_length)
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
