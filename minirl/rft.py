"""Rejection-sampling fine-tuning (2308.01825): what the model got right itself, each once, is what it learns from.

    training prompts -> k completions each -> right or wrong -> without repetitions -> kept.jsonl -> SFT

A completion that was cut at max_tokens is neither right nor wrong: it has no end that could be learned. The tokens are
learned as they were sampled: another spelling of the same text is not what the model found, and a completion that a
stop text ended has no stop token to learn.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from minirl.config import Count, NotNegative, OptimizerConfig, RunConfig
from minirl.errors import InputError
from minirl.examples import demonstration_rows, refuse_unknown_tokens
from minirl.files import write_jsonl
from minirl.outcomes import (
    Group,
    Same,
    SampleConfig,
    Samples,
    right_and_wrong,
    right_of,
    sample_and_check,
    summary,
    the_text,
)
from minirl.policy import Policy
from minirl.records import read_demonstrations
from minirl.run import Display, Run, identity
from minirl.sft import SFTConfig, fit
from minirl.task import Task

KEPT = "kept.jsonl"
SAMPLED = "sampled.jsonl"  # in the folder of a run while it samples, or where it kept nothing


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


def kept_of(groups: Iterable[Group], most: int, same: Same = the_text) -> list[dict]:
    """Keep as demonstrations at most `most` right completions a prompt, with how many of its samples were right."""
    return [
        {name: line[name] for name in ("prompt", "tools", "completion", "completion_tokens") if name in line}
        | {"correct": len(right_of(group))}
        for group in groups
        for line in right_and_wrong(group, same)[0][:most]
    ]


def sample_and_keep(policy: Policy, task: Task, config: RFTConfig, same: Same, run: Run) -> list[dict]:
    """Write the lines of kept.jsonl and return them. The completions are in SAMPLED from the moment that they are
    checked, and a resumed run goes on there; also where nothing can be kept, so that one can see why."""
    samples, display = Samples(run.out / SAMPLED, config.samples), run.display
    if not config.resume:
        samples.file.unlink(missing_ok=True)
    try:
        stopped = sample_and_check(policy.model, policy.tokenizer, task, config, display, samples, run.write_config)
    except KeyboardInterrupt:  # the second one
        stopped = True
    finally:
        samples.close()
    if stopped:
        if samples.prompts:
            display.line(f"stopped after {samples.prompts} prompts; continue with --resume --out {run.out}")
        raise KeyboardInterrupt
    kept = kept_of(samples.groups(), config.max_per_prompt, same)
    if not kept:
        raise InputError(
            f"no completion is right and ended ({summary(samples, config)}): {_advice(samples)}; {samples.file} holds "
            "what was sampled"
        )
    write_jsonl(run.out / KEPT, kept)
    display.line(
        f"kept {len(kept)} completions of {samples.prompts} prompts in {run.out / KEPT}: {summary(samples, config)}"
    )
    return kept


def _advice(samples: Samples) -> str:
    """Say what to do where nothing is right and ended: was all that is right cut, or all there is?"""
    right, right_cut, cut, count = (samples.counts[name] for name in ("right", "right, cut", "cut", "all"))
    all_cut = right_cut == right if right else cut == count
    return "raise --max-tokens" if all_cut else "take more samples, or a better model"


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
