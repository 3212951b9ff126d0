"""Supervised fine-tuning on (prompt, completion) pairs, the prompt masked out.

    loss = −(1/N_tok) Σ_t log π(y_t | x, y_<t)      over completion tokens, the stop token included

It is the policy loss with advantage 1, no ratio, and a mean over tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minirl.errors import InputError
from minirl.files import read_jsonl
from minirl.losses import PolicyLoss
from minirl.model import Transformer
from minirl.tokenizer import Tokenizer, is_prompt
from minirl.train.batch import Row
from minirl.train.optimizer import AdamW, learning_rate
from minirl.train.run import (
    Display,
    Run,
    identity,
    load,
    loop,
    peak_memory_gb,
    refuse_below_one,
    refuse_negative,
    refuse_not_positive,
    refuse_unknown_choices,
    tenth,
)
from minirl.train.step import Batch, accumulate, response_mask

LIKELIHOOD = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="token_mean")


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a checkpoint on demonstrations."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    data: str
    """JSONL file; each line has "prompt" (a text or chat messages) and "completion" (a text)."""
    out: str = "runs/sft"
    """Folder of the run."""
    steps: int = 200
    """Optimizer steps."""
    batch: int = 32
    """Examples a step."""
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
    """Tokens in one forward: a memory knob that changes no result."""
    save_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Order of the examples."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; masters are fp32."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    resume: bool = False
    """Continue the run in `out`; micro_batch_tokens, recompute, device and save_every
    may differ, as they change no result."""

    def __post_init__(self):
        refuse_below_one(self, "steps", "batch", "micro_batch_tokens", "save_every")
        refuse_not_positive(self, "lr", "clip_norm")
        refuse_negative(self, "warmup", "weight_decay", "seed")
        refuse_unknown_choices(self)


def read_demonstrations(path: str | Path) -> list[dict]:
    """Lines of a JSONL file with "prompt" and "completion"."""
    return read_jsonl(path, check_demonstration)


def check_demonstration(example: object, where: str) -> dict:
    check_prompt(example, where)
    if not isinstance(example.get("completion"), str):
        raise InputError(f"{where}: it must be an object with a 'prompt' and a 'completion' text")
    return example


def check_prompt(example: object, where: str) -> None:
    if not isinstance(example, dict) or not is_prompt(example.get("prompt")):
        raise InputError(f"{where}: its 'prompt' must be a text, or chat messages with a 'role' and a 'content'")


def demonstration_rows(tokenizer: Tokenizer, examples: Sequence[dict], max_length: int) -> list[Row]:
    """Token rows; each completion ends with the stop token unless it had to be cut at `max_length` tokens in all."""
    rows = []
    for i, example in enumerate(examples):
        prompt = prompt_tokens(tokenizer, example["prompt"], max_length, f"example {i}")
        response = [*tokenizer.encode(example["completion"]), tokenizer.stop_id]
        rows.append(Row(prompt, response[: max_length - len(prompt)], group=i))
    return rows


def prompt_tokens(tokenizer: Tokenizer, prompt: str | list[dict], max_length: int, where: str) -> list[int]:
    """With room for one token of a response."""
    tokens = tokenizer.prompt_ids(prompt)
    if not tokens or len(tokens) >= max_length:
        raise InputError(f"{where}: its prompt has {len(tokens)} tokens, and between 1 and {max_length - 1} fit")
    return tokens


def refuse_unknown_tokens(rows: Sequence[Row], vocab: int, where: str = "") -> None:
    """`where` the rows come from, if their groups are not the numbers of the examples."""
    for row in rows:
        largest = max((*row.prompt, *row.response))
        if largest >= vocab:
            raise InputError(
                f"{where or f'example {row.group}'} holds token {largest}, outside the model's vocabulary of {vocab}: "
                "is this its tokenizer?"
            )


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The examples' order in an epoch, a function of the seed alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def take(count: int, seed: int, start: int, number: int) -> list[int]:
    """Indices start .. start+number of the endless sequence of shuffled epochs."""
    epochs = range(start // count, (start + number - 1) // count + 1)
    sequence = np.concatenate([order(count, seed, epoch) for epoch in epochs])
    offset = start - epochs[0] * count
    return sequence[offset : offset + number].tolist()


def sft_step(model: Transformer, optimizer: AdamW, rows: Sequence[Row], lr: float, clip: float, budget: int) -> dict:
    """One update on the mean negative log-likelihood of the rows' responses."""
    batch = Batch(rows, torch.ones(len(rows), device=model.device), response_mask(rows, model.device))
    metrics = accumulate(model, batch, LIKELIHOOD, budget)
    norm = optimizer.step(lr, clip)
    tokens = sum(len(row.response) for row in rows)
    return {"loss": metrics["loss/total"], "entropy": metrics["entropy"], "grad_norm": norm, "lr": lr, "tokens": tokens}


def train_sft(config: SFTConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl sft`; returns the folder of the trained model."""
    examples = read_demonstrations(config.data)
    run = Run(config.out, identity(config, examples), config.resume)
    model, tokenizer = load(run.checkpoint or config.model, config.dtype, config.device)
    model.checkpointing = config.recompute
    rows = demonstration_rows(tokenizer, examples, model.config.max_positions)
    refuse_unknown_tokens(rows, model.active_vocab)
    return fit(model, tokenizer, rows, config, run, display or Display())


def fit(model, tokenizer, rows: Sequence[Row], config: SFTConfig, run: Run, display: Display) -> Path:
    """A step: batch, gradient, update."""
    optimizer = AdamW(model, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    if run.checkpoint:
        run.restore(optimizer)

    def step(number: int) -> dict[str, float]:
        started = time.perf_counter()
        chosen = [rows[i] for i in take(len(rows), config.seed, number * config.batch, config.batch)]
        chosen = [Row(row.prompt, row.response, group=i) for i, row in enumerate(chosen)]
        lr = learning_rate(number, config.lr, config.warmup, config.steps, config.schedule)
        metrics = sft_step(model, optimizer, chosen, lr, config.clip_norm, config.micro_batch_tokens)
        seconds = time.perf_counter() - started
        metrics |= {"time/step": seconds, "tokens_per_s/train": metrics["tokens"] / seconds}
        return metrics | {"memory/peak_gb": peak_memory_gb()}

    def line(done: int, metrics: dict[str, float]) -> str:
        return sft_line(done, config.steps, metrics) if tenth(done, config.steps) else ""

    def save(done: int) -> None:
        run.save(done, model, tokenizer, optimizer)

    loop(run, "sft", config.steps, config.save_every, display, step, line, save)
    return run.finish(model, tokenizer)


def sft_line(step: int, steps: int, m: dict) -> str:
    return (
        f"sft {step}/{steps}  loss {m['loss']:.4f}  entropy {m['entropy']:.3f}  grad {m['grad_norm']:.2f}  "
        f"lr {m['lr']:.1e}  {m['tokens_per_s/train']:.0f} tok/s"
    )
