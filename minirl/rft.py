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

from minirl.config import Count, NotNegative, OptimizerConfig, RunConfig
from minirl.errors import InputError
from minirl.examples import demonstration_rows, refuse_unknown_tokens
from minirl.files import read_jsonl, write_jsonl
from minirl.outcomes import Group, Same, SampleConfig, right_and_wrong, right_of, sample_and_check, summary, the_text
from minirl.policy import Policy
from minirl.records import read_demonstrations
from minirl.run import Display, Run, identity
from minirl.sft import SFTConfig, fit
from minirl.task import Task

KEPT = "kept.jsonl"
SAMPLED = "sampled.jsonl"  # in the folder of a run that was stopped while it sampled, or kept nothing


@dataclass(frozen=True, kw_only=True)
class RFTConfig(OptimizerConfig, RunConfig, SampleConfig):
    """Sample a task's prompts, keep what is right, and fine-tune the checkpoint on it (rejection sampling)."""

    out: str = "runs/rft"
    """Folder of the run; what was kept is in its kept.jsonl."""
    batch: Count = 32
    """Completions a step."""
    weight_decay: NotNegative = 0.1
    micro_batch_tokens: Count = 4096
    """Tokens in one training forward: a memory knob that changes no result."""
    resume: bool = False
    """Continue the run in `out`; slots, micro_batch_tokens, recompute, device and save_every
    may differ, as they change a result by rounding at most."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.sft  # refuses what cannot be trained with

    @property
    def sft(self) -> SFTConfig:
        shared = {f.name: getattr(self, f.name) for f in fields(SFTConfig) if hasattr(self, f.name)}
        return SFTConfig(**shared, data=str(Path(self.out) / KEPT))


def kept_of(groups: Sequence[Group], most: int, same: Same = the_text) -> list[dict]:
    """Keep as demonstrations at most `most` right completions a prompt, with how many of its samples were right."""
    return [
        {name: line[name] for name in ("prompt", "tools", "completion", "completion_tokens") if name in line}
        | {"correct": len(right_of(group))}
        for group in groups
        for line in right_and_wrong(group, same)[0][:most]
    ]


def sample_and_keep(policy: Policy, task: Task, config: RFTConfig, same: Same, run: Run) -> list[dict]:
    """Write the lines of kept.jsonl and return them. Ctrl-C leaves the completions so far in SAMPLED, with which a
    resumed run begins; so does an InputError where nothing can be kept, so that one can see why."""
    file, display = run.out / SAMPLED, run.display
    lines = read_jsonl(file) if config.resume and file.exists() else []
    done = [lines[i : i + config.samples] for i in range(0, len(lines), config.samples)]
    groups, stopped = sample_and_check(policy.model, policy.tokenizer, task, config, display, done)
    kept = kept_of(groups, config.max_per_prompt, same)
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


def rft(
    config: RFTConfig, task: Task, same: Same = the_text, display: Display | None = None, observers: Sequence = ()
) -> Path:
    """Sample, keep, fine-tune; returns the folder of the trained model. `same` tells which completions are one."""
    with Run(config.out, identity(config, task.train), config.resume, display, observers) as run:
        policy = run.held["policy"] = Policy.load(config, run)  # without an optimizer as long as it only samples
        run.begin(config.steps, config.save_every)
        file = run.out / KEPT
        if not run.checkpoint and not (config.resume and file.exists()):  # it appears whole, after all sampling
            sample_and_keep(policy, task, config, same, run)
        kept = read_demonstrations(file)
        if not run.checkpoint:
            solved = len({json.dumps(line["prompt"]) for line in kept})
            run.log(0, {"rft/kept": len(kept), "rft/solved": solved})  # and with it the config that --resume needs
            (run.out / SAMPLED).unlink(missing_ok=True)
        rows = demonstration_rows(policy.tokenizer, kept, policy.model.config.max_positions)
        refuse_unknown_tokens(rows, policy.model.active_vocab)
        return fit(run, run.hold("policy", policy.with_optimizer(betas=(0.9, 0.95))), rows, config.sft)
