"""Rejection-sampling fine-tuning (2308.01825): what the model got right itself, each once, is what it learns from.

    training prompts -> k completions each -> right or wrong -> without repetitions -> kept.jsonl -> SFT

A completion that was cut at max_tokens is neither right nor wrong: it has no end that could be learned. The tokens are
learned as they were sampled: another spelling of the same text is not what the model found, and a completion that a
stop text ended has no stop token to learn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from minirl.errors import InputError
from minirl.files import read_jsonl, write_jsonl
from minirl.tasks import Task, parse_task
from minirl.train.outcomes import Group, SampleConfig, right_and_wrong, right_of, sample_and_check, summary
from minirl.train.preview import disk_of, show_disk
from minirl.train.prompts import show_notes
from minirl.train.run import Display, Run, identity, load
from minirl.train.sft import SFTConfig, demonstration_rows, fit, read_demonstrations, refuse_unknown_tokens

KEPT = "kept.jsonl"
SAMPLED = "sampled.jsonl"  # in the folder of a run that was stopped while it sampled, or kept nothing


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
        shared = {f.name: getattr(self, f.name) for f in fields(SFTConfig) if hasattr(self, f.name)}
        return SFTConfig(**shared, data=str(Path(self.out) / KEPT))


def kept_of(groups: Sequence[Group], most: int, distinct: str = "text") -> list[dict]:
    """Demonstrations: at most `most` right completions a prompt, with how many samples of the prompt were right."""
    return [
        {name: line[name] for name in ("prompt", "tools", "completion", "completion_tokens") if name in line}
        | {"correct": len(right_of(group))}
        for group in groups
        for line in right_and_wrong(group, distinct)[0][:most]
    ]


def sample_and_keep(model, tokenizer, task: Task, config: RFTConfig, run: Run, display: Display) -> list[dict]:
    """Write the lines of kept.jsonl and return them. Ctrl-C leaves the completions so far in SAMPLED, with which a
    resumed run begins; so does an InputError where nothing can be kept, so that one can see why."""
    file = run.out / SAMPLED
    lines = read_jsonl(file) if config.resume and file.exists() else []
    done = [lines[i : i + config.samples] for i in range(0, len(lines), config.samples)]
    groups, stopped = sample_and_check(model, tokenizer, task, config, display, done)
    kept = kept_of(groups, config.max_per_prompt, config.distinct)
    if stopped or not kept:
        write_jsonl(file, [line for group in groups for line in group])
    if stopped:
        run.log(0, {"rft/prompts": len(groups)})  # and with it the config that --resume needs
        display.line(f"stopped after {len(groups)} prompts; continue with --resume --out {run.out}")
        raise KeyboardInterrupt
    if not kept:
        raise InputError(
            f"no completion is right and ended ({summary(groups, config)}): {_advice(groups)}; {file} holds what was "
            "sampled"
        )
    write_jsonl(run.out / KEPT, kept)
    display.line(
        f"kept {len(kept)} completions of {len(groups)} prompts in {run.out / KEPT}: {summary(groups, config)}"
    )
    return kept


def _advice(groups: Sequence[Group]) -> str:
    """Say what to do where nothing is right and ended: was all that is right cut, or all there is?"""
    lines = [line for group in groups for line in right_of(group)] or [line for group in groups for line in group]
    cut = all(line["finish_reason"] == "length" for line in lines)
    return "raise --max-tokens" if cut else "take more samples, or a better model"


def train_rft(config: RFTConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl rft`; returns the folder of the trained model."""
    display, task = display or Display(), parse_task(config.task)
    run = Run(config.out, identity(config, task.train), config.resume)
    show_notes(task, display)
    model, tokenizer = load(run.checkpoint or config.model, config.dtype, config.device, config=config, run=run)
    show_disk(disk_of(run, [model], config.steps, config.save_every), display)
    file = run.out / KEPT
    if not run.checkpoint and not (config.resume and file.exists()):  # it appears whole, after all sampling
        sample_and_keep(model, tokenizer, task, config, run, display)
    kept = read_demonstrations(file)
    if not run.checkpoint:
        solved = len({json.dumps(line["prompt"]) for line in kept})
        run.log(0, {"rft/kept": len(kept), "rft/solved": solved})  # and with it the config that --resume needs
        (run.out / SAMPLED).unlink(missing_ok=True)
    model.checkpointing = config.recompute
    rows = demonstration_rows(tokenizer, kept, model.config.max_positions)
    refuse_unknown_tokens(rows, model.active_vocab)
    return fit(model, tokenizer, rows, config.sft, run, display)
