"""Completions that a rule has checked: fine-tune on the right ones (RFT), or pair right with wrong for preferences.

    training prompts -> k completions each -> right or wrong -> without repetitions -> kept.jsonl -> SFT
                                                                                    -> pairs.jsonl -> minirl prefer

Rejection-sampling fine-tuning, 2308.01825. A completion that was cut at max_tokens is neither right nor wrong: it has
no end that could be learned.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from minirl.errors import InputError
from minirl.files import write_atomic
from minirl.model import Transformer
from minirl.rewards.numbers import NUMBER
from minirl.rollout import Rollout, sample
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import Task, parse_task
from minirl.tokenizer import Tokenizer
from minirl.train.run import (
    Display,
    Run,
    identity,
    interruptible,
    load,
    refuse_below_one,
    refuse_negative,
    refuse_not_positive,
    refuse_unknown_choices,
)
from minirl.train.sft import SFTConfig, demonstration_rows, fit, read_demonstrations, refuse_unknown_tokens

CHUNK = 64  # prompts sampled at a time; draws are keyed by chunk, so another number gives other completions


@dataclass(frozen=True)
class SampleConfig:
    """Sample completions of a task's training prompts, and check them."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    task: str = "arithmetic"
    """arithmetic, countdown or a .jsonl file, with options after a colon: arithmetic:op=product,digits=2"""
    prompts: int | None = None
    """Training prompts, the first so many; None: all."""
    samples: int = 16
    """Completions a prompt (k)."""
    max_per_prompt: int = 4
    """Most lines that come of one prompt, so that easy ones do not outweigh the others."""
    distinct: Literal["text", "numbers"] = "text"
    """Completions of a prompt are the same, and count once, if their texts are, or if the numbers in them are."""
    max_tokens: int = 256
    """Longest completion; one that is cut there is not used."""
    temperature: float = 0.7
    """Of sampling."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; what is checked and kept ends before them."""
    reward_timeout: float | None = None
    """Seconds a completion that the checker may take, in a process that can be killed; longer is without a score."""
    slots: int = 64
    """Completions sampled at a time: a memory knob that changes no completion."""
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
        if self.reward_timeout is not None:
            refuse_not_positive(self, "reward_timeout")
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        sizes = {"n": self.samples, "max_tokens": self.max_tokens, "stop": self.stop}
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, **sizes)


@dataclass(frozen=True)
class PairsConfig(SampleConfig):
    """Sample a task's prompts and write pairs of a right and a wrong completion, for minirl prefer."""

    out: str = "pairs.jsonl"
    """File to write; each line has "prompt", "chosen" and "rejected"."""
    match_length: bool = False
    """Pair each right completion with the wrong one of nearest length (in characters), so that length tells little."""


@dataclass(frozen=True)
class RFTConfig(SampleConfig):
    """Sample a task's prompts, keep what is right, and fine-tune the checkpoint on it (rejection sampling)."""

    out: str = "runs/rft"
    """Folder of the run; what was kept is in its kept.jsonl."""
    steps: int = 200
    """Optimizer steps."""
    batch: int = 32
    """Completions a step."""
    lr: float = 1e-5
    """Peak learning rate."""
    warmup: int = 10
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.1
    """Decay of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    micro_batch_tokens: int = 4096
    """Tokens in one training forward: a memory knob that changes no result."""
    save_every: int = 100
    """Steps between checkpoints."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    resume: bool = False
    """Continue the run in `out`; slots, micro_batch_tokens, recompute, device and save_every
    may differ, as they change no result."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.sft  # refuses what cannot be trained with

    @property
    def sft(self) -> SFTConfig:
        shared = {f.name: getattr(self, f.name) for f in fields(SFTConfig) if f.name != "data"}
        return SFTConfig(**shared, data=str(Path(self.out) / "kept.jsonl"))


# ---- sampling and checking -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """The completions of one prompt."""

    prompt: str | list[dict]
    right: list[str]  # distinct ones that came to an end
    wrong: list[str]  # likewise; what could not be scored is in neither
    correct: int  # of all that were sampled
    cut: int  # at max_tokens


def sample_and_check(
    model: Transformer, tokenizer: Tokenizer, task: Task, config: SampleConfig, display: Display
) -> Iterator[list[Checked]]:
    """Draw config.samples completions of each training prompt, let task.correct judge them; CHUNK prompts at a time."""
    examples = task.train[: config.prompts]
    if not examples:
        raise InputError(f"task {config.task!r} has no training examples: ask for some")
    sampler = Sampler(model, config.slots, tokenizer=tokenizer)
    params = replace(config.sampling, stop_ids=tokenizer.stop_ids)
    display.progress("prompts", 0, len(examples))
    for number, start in enumerate(range(0, len(examples), CHUNK)):
        part = examples[start : start + CHUNK]
        keyed = replace(params, seed=(config.seed << 32) + number)
        rollout = sample(sampler, tokenizer, part, keyed, lambda done, total: display.progress("samples", done, total))
        rollout.score({"correct": (1.0, task.correct)}, config.reward_timeout)
        if start == 0:  # later it may be a passing failure, which must not cost what was sampled
            rollout.require_score()
            for line in rollout.late_lines(config.reward_timeout).values():
                display.line(line)
        display.progress("prompts", start + len(part), len(examples))
        yield [_checked(rollout, i, config.distinct) for i in range(len(part))]


def _checked(rollout: Rollout, i: int, distinct: str) -> Checked:
    rows = range(i * rollout.group_size, (i + 1) * rollout.group_size)
    rewards = [rollout.rewards[row].item() for row in rows]
    ended = [rollout.completions[row].finish_reason != "length" for row in rows]
    texts = [rollout.texts[row] for row in rows]
    verdicts = list(zip(texts, rewards, ended, strict=True))
    return Checked(
        rollout.examples[i]["prompt"],
        right=_without_repetitions([text for text, reward, whole in verdicts if whole and reward == 1], distinct),
        wrong=_without_repetitions([text for text, reward, whole in verdicts if whole and reward < 1], distinct),
        correct=rewards.count(1.0),
        cut=ended.count(False),
    )


def _without_repetitions(texts: Sequence[str], distinct: str) -> list[str]:
    """The first of each kind; a text without any number is one of its own kind."""
    kinds: dict[object, str] = {}
    for text in texts:
        numbers = tuple(match[0].replace(",", "") for match in NUMBER.finditer(text)) if distinct == "numbers" else ()
        kinds.setdefault(numbers or text, text)
    return list(kinds.values())


def _summary(checked: Sequence[Checked], config: SampleConfig) -> str:
    total = len(checked) * config.samples
    right, cut = sum(group.correct for group in checked), sum(group.cut for group in checked)
    return f"{right} of {total} completions right, {cut} cut at max_tokens = {config.max_tokens}"


def _write_lines(path: Path, records: Sequence[dict]) -> None:
    """Half of a surrogate pair has no UTF-8; as a backslash and its code it is JSON again."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, lambda staging: staging.write_bytes(text.encode("utf-8", "backslashreplace")))


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pairs_of(group: Checked, most: int, match_length: bool = False) -> list[dict]:
    """At most `most` pairs of a right and a wrong completion, each completion in one pair only."""
    wrong, pairs = list(group.wrong), []
    for right in group.right[:most]:
        if not wrong:
            break
        nearest = min(range(len(wrong)), key=lambda i: abs(len(wrong[i]) - len(right))) if match_length else 0
        pairs.append({"prompt": group.prompt, "chosen": right, "rejected": wrong.pop(nearest)})
    return pairs


def _refuse_unwritable(out: Path) -> None:
    """Said before the work, not after it."""
    if out.exists():
        raise InputError(f"{out} exists: choose another --out, or remove it")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} is no folder that can be written to: choose another --out")


def make_pairs(config: PairsConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl pairs`; returns the file. Ctrl-C writes the pairs of the prompts that are done."""
    display, out = display or Display(), Path(config.out)
    _refuse_unwritable(out)
    task = parse_task(config.task)
    model, tokenizer = load(config.model, config.dtype, config.device)
    checked: list[Checked] = []
    with interruptible(display) as stop_requested:
        for groups in sample_and_check(model, tokenizer, task, config, display):
            checked += groups
            if stopped := stop_requested():
                break
    pairs = [pair for group in checked for pair in pairs_of(group, config.max_per_prompt, config.match_length)]
    if not pairs:
        raise InputError(
            f"no prompt has both a right and a wrong completion that ended ({_summary(checked, config)}): "
            "take more samples, or prompts of another difficulty"
        )
    _write_lines(out, pairs)
    display.line(f"{len(pairs)} pairs from {len(checked)} prompts: {_summary(checked, config)}")
    if stopped:
        raise KeyboardInterrupt
    return out


# ---- rejection-sampling fine-tuning ----------------------------------------------------------------------------------


def kept_of(checked: Sequence[Checked], most: int) -> list[dict]:
    """Demonstrations: at most `most` right completions a prompt, with how many samples of the prompt were right."""
    return [
        {"prompt": group.prompt, "completion": text, "correct": group.correct}
        for group in checked
        for text in group.right[:most]
    ]


def train_rft(config: RFTConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl rft`; returns the folder of the trained model."""
    display = display or Display()
    task = parse_task(config.task)
    run = Run(config.out, identity(config, task.train), config.resume)
    model, tokenizer = load(run.checkpoint or config.model, config.dtype, config.device)
    file = run.out / "kept.jsonl"
    if run.checkpoint or (config.resume and file.exists()):  # it appears whole, after all sampling
        kept = read_demonstrations(file)
    else:
        checked = [group for groups in sample_and_check(model, tokenizer, task, config, display) for group in groups]
        kept = kept_of(checked, config.max_per_prompt)
        display.line(f"kept {len(kept)} completions of {len(checked)} prompts: {_summary(checked, config)}")
        if not kept:
            raise InputError(
                f"no completion is right and ended ({_summary(checked, config)}): take more samples, or a better model"
            )
    if not run.checkpoint:
        solved = len({json.dumps(line["prompt"]) for line in kept})
        run.log(0, {"rft/kept": len(kept), "rft/solved": solved})  # and with it the config that --resume needs
        _write_lines(file, kept)
    model.checkpointing = config.recompute
    rows = demonstration_rows(tokenizer, kept, model.config.max_positions)
    refuse_unknown_tokens(rows, model.config.vocab_size)
    return fit(model, tokenizer, rows, config.sft, run, display)
