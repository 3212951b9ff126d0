"""Supervised fine-tuning on demonstrations: completions of prompts, the assistant's turns of conversations, documents.

    loss = −(1/N_tok) Σ_t log π(y_t | x, y_<t)      over the tokens that are learned, the stop token of each turn too

It is the policy loss with advantage 1, no ratio, and a mean over tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from minirl.batch import Batch, add_policy_gradient, endless_epochs
from minirl.config import Count, NotNegative, OptimizerConfig, RunConfig, Whole
from minirl.errors import InputError
from minirl.examples import demonstration_rows, overlong_line, refuse_unknown_tokens
from minirl.files import contents
from minirl.losses import PolicyLoss
from minirl.model import Transformer
from minirl.optimizer import learning_rate
from minirl.policy import Policy
from minirl.records import trained_turns
from minirl.run import (
    Display,
    Run,
    identity,
    tracked,
)
from minirl.step import Step
from minirl.trees import Row, loss_mask

LIKELIHOOD = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="token_mean")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OptimizerConfig, RunConfig):
    """Fine-tune a checkpoint on demonstrations."""

    data: str = field(kw_only=False)
    """File (JSONL, a .json list, Parquet), folder or name of a data set; the keys of its rows say the format:
    "messages", "conversations", "prompt" and "completion", "instruction" and "output", or "text"."""
    out: str = "runs/sft"
    loss_on: Literal["all", "last"] = "all"
    """Turns of the assistant that are learned in a conversation."""
    batch: Count = 32
    """Examples a step."""
    weight_decay: NotNegative = 0.1
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in the model's context: stop before the first step, or leave it
    out."""
    seed: Whole = 0
    """Order of the examples."""


def description(examples: Sequence[dict], loss_on: str, rows: Sequence[Row] = ()) -> str:
    """Say which format was read, and what the loss is on; also how many and how long the `rows` are where conversations
    have more than one, and how many conversations are left out because they have no turn to learn."""
    turns = [len(trained_turns(example, loss_on == "last")) for example in examples if "messages" in example]
    if turns:
        line = f"{len(turns):,} conversations, loss on {sum(turns):,} assistant turns"
        if len(rows) > len(turns):
            tokens = sum(len(row.prompt) + len(row.response) for row in rows)
            line += f" in {len(rows):,} rows of {tokens:,} tokens (the template writes earlier turns in another way)"
        unread = turns.count(0)
        return line + (f"; left out, as the weights of all their turns are 0: {unread:,}" if unread else "")
    if "text" in examples[0]:
        return f"{len(examples):,} documents, loss on all of their tokens"
    return f"{len(examples):,} prompts, loss on their completions"


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def add_likelihood_gradient(model: Transformer, rows: Sequence[Row], budget: int) -> tuple[Batch, dict[str, float]]:
    """Add the gradient of the mean negative log-likelihood of the tokens that are learned; return batch and metrics."""
    batch = Batch(rows, torch.ones(len(rows), device=model.device), loss_mask(rows, model.device))
    metrics = add_policy_gradient(model, batch, LIKELIHOOD, budget)
    return batch, {"loss": metrics["loss/total"], "entropy": metrics["entropy"], "tokens": int(batch.mask.sum())}


def sft_step(step: Step, config: SFTConfig, policy: Policy, rows: Sequence[Row]) -> None:
    """Take one update on the examples of a step."""
    rate = learning_rate(step.number, config.lr, config.warmup, config.steps, config.schedule)
    with step.time("step"):
        chosen = endless_epochs(len(rows), config.seed, step.number * config.batch, config.batch)
        rows = [replace(rows[i], group=place) for place, i in enumerate(chosen)]
        batch, metrics = add_likelihood_gradient(policy.model, rows, config.micro_batch_tokens)
        step.update(batch, metrics, {"grad_norm": (policy.optimizer, rate)}, config)
    step.add(**metrics | (step.updates[0] or {}), lr=rate)
    step.speed("train", step.metrics["tokens"], over="step")


def encode(policy: Policy, examples: Sequence[dict], config: SFTConfig, display: Display) -> list[Row]:
    """Encode the examples as token rows, and say a line about them; InputErrors name what cannot be learned from."""
    tokenizer, positions = policy.tokenizer, policy.model.config.max_positions
    taken = tracked(display, "examples", examples)
    overlong: list[str] | None = [] if config.overlong_prompts == "drop" else None
    rows = demonstration_rows(tokenizer, taken, positions, config.loss_on, overlong)
    if not rows:
        raise InputError(
            f"none of the {len(examples)} examples of {config.data} can be learned from: each is too long for the "
            f"context of {positions} tokens, or the weights of all its turns are 0"
        )
    refuse_unknown_tokens(rows, policy.model.active_vocab)
    cut = sum(row.lost > 0 for row in rows)
    too_long = f"; cut at {positions} tokens: {cut:,}" if cut else ""
    display.line(description(examples, config.loss_on, rows) + too_long)
    if overlong:
        display.line(overlong_line(len(overlong), len(examples)))
    return rows


def prepare(run: Run, config: SFTConfig, examples: Sequence[dict]) -> tuple[Policy, list[Row]]:
    """Load or restore the model, and encode the data."""
    policy = run.hold("policy", Policy.load(config, run).with_optimizer(betas=(0.9, 0.95)))
    return policy, encode(policy, examples, config, run.display)


def first_example(row: Row) -> tuple[Sequence[int], Sequence[int], list[bool]]:
    """Return the prompt, the response, and which of its tokens are learned."""
    return row.prompt, row.response, loss_mask([row])[0].tolist()


def fit(run: Run, policy: Policy, rows: Sequence[Row], config: SFTConfig) -> Path:
    """Take the steps: batch, gradient, update; returns the folder of the trained model."""
    if run.start == 0:
        run.display.example(policy.tokenizer, *first_example(rows[0]))
    for step in run.steps("sft", config.steps, config.save_every):
        step.attempt(sft_step, config, policy, rows)
    return run.finish(policy.model, policy.tokenizer)


def sft(config: SFTConfig, examples: Sequence[dict], display: Display | None = None, observers: Sequence = ()) -> Path:
    """Fine-tune on records of `records.demonstration`; returns the folder of the trained model."""
    with Run(config.out, identity(config, contents(examples)), config.resume, display, observers) as run:
        return fit(run, *prepare(run, config, examples), config)
