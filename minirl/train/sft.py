"""Supervised fine-tuning on demonstrations: completions of prompts, the assistant's turns of conversations, documents.

    loss = −(1/N_tok) Σ_t log π(y_t | x, y_<t)      over the tokens that are learned, the stop token of each turn too

It is the policy loss with advantage 1, no ratio, and a mean over tokens.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minirl.errors import InputError
from minirl.files import contents
from minirl.losses import PolicyLoss
from minirl.model import Transformer
from minirl.rewards.model import spelled_tokens
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row
from minirl.train.formats import demonstration, read_rows, trained_turns
from minirl.train.optimizer import AdamW, learning_rate
from minirl.train.preview import disk_of, marked_row, show_disk
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
    tracked,
)
from minirl.train.step import Batch, accumulate, response_mask
from minirl.turns import Turns, answered, conversation

LIKELIHOOD = PolicyLoss(ratio_level="none", surrogate="is_pg", aggregation="token_mean")


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a checkpoint on demonstrations."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    data: str
    """File (JSONL, a .json list, Parquet), folder or name of a data set; the keys of its rows say the format:
    "messages", "conversations", "prompt" and "completion", "instruction" and "output", or "text"."""
    out: str = "runs/sft"
    """Folder of the run."""
    loss_on: Literal["all", "last"] = "all"
    """Turns of the assistant that are learned in a conversation."""
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
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in the model's context: stop before the first step, or leave it
    out."""
    save_every: int = 100
    """Steps between checkpoints."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template reads, each as --template.NAME VALUE: --template.enable_thinking false."""
    system: str | None = None
    """System message of the prompts whose messages have none."""
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


@dataclass(frozen=True)
class Demonstration(Row):
    """A row of which some tokens of the response may not be learned: those of others in a conversation."""

    counted: Sequence[bool] | None = None  # one for each token of the response; None: all of them
    lost: int = 0  # tokens of its example that did not fit
    where: str = ""  # the place of its example


def read_demonstrations(path: str | Path) -> list[dict]:
    """The rows of a file as records of `formats.demonstration`."""
    return read_rows(path, demonstration)


def description(examples: Sequence[dict], loss_on: str, rows: Sequence[Row] = ()) -> str:
    """The format that was read, and what the loss is on; of conversations that have more than one of the `rows` also
    how many and how long these are, and of conversations without a turn to learn how many are left out."""
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


def demonstration_rows(
    tokenizer: Tokenizer,
    examples: Iterable[dict],
    max_length: int,
    loss_on: str = "all",
    overlong: list[str] | None = None,
) -> list[Demonstration]:
    """Token rows of records; each ends with its stop token unless it had to be cut at `max_length` tokens in all. A
    conversation has one row, or more where the template writes earlier turns in another way; its later rows are left
    out where their prompts do not fit, and so is one without a turn to learn. The places of examples whose first prompt
    does not fit go to `overlong`; None: an InputError names the first."""
    rows: list[Demonstration] = []
    for i, example in enumerate(examples):
        where = example.get("where", f"example {i}")
        pieces = _pieces(tokenizer, example, loss_on, where)
        if not pieces or not fits(len(pieces[0].prompt), max_length, where, overlong):
            continue
        lost = 0
        for piece in pieces:
            room = max(max_length - len(piece.prompt), 0)
            lost += sum(piece.counted[room:])
            if any(counted := piece.counted[:room]):
                rows.append(Demonstration(piece.prompt, piece.response[:room], len(rows), counted=counted, where=where))
        rows[-1] = replace(rows[-1], lost=lost)
    return rows


def _pieces(tokenizer: Tokenizer, example: dict, loss_on: str, where: str) -> list[Turns]:
    tools = example.get("tools")
    with named(where):
        if "messages" in example:
            return conversation(tokenizer, example["messages"], trained_turns(example, loss_on == "last"), tools)
        if "text" in example:
            return [_document(tokenizer, example["text"])]
    return [below(tokenizer, example, example["completion"], example.get("completion_tokens"), where)]


def below(tokenizer: Tokenizer, example: dict, text: str, tokens: list | None, where: str, ended: bool = True) -> Turns:
    """The prompt of a record and a text below it: with the tokens as they were sampled where these are known, as
    another spelling is not what was found."""
    prompt, tools = example["prompt"], example.get("tools")
    with named(where):
        if tokens is None:
            return answered(tokenizer, prompt, text, tools, ended)
        piece = Turns(tokenizer.prompt_ids(prompt, tools))
    piece.add(spelled_tokens(tokenizer, text, tokens, where), True)
    return piece


def _document(tokenizer: Tokenizer, text: str) -> Turns:
    """All of a text and the token that ends a document. Its first token has nothing to be predicted from, unless the
    tokenizer puts its bos token in front."""
    end = tokenizer.stop_id if tokenizer.eos_id is None else tokenizer.eos_id
    body, own = tokenizer.without_end(text)
    ids = tokenizer.prompt_ids(body if own == end else text)
    piece = Turns(ids[:1])
    piece.add([*ids[1:], end], True)
    return piece


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put the place of a row before the sentence of an InputError."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def fits(tokens: int, max_length: int, where: str, overlong: list[str] | None) -> bool:
    """Whether a prompt leaves room for a token of a response. The place of one that does not goes to `overlong`; an
    InputError names it where that is None, and a prompt without a token."""
    if 0 < tokens < max_length:
        return True
    if tokens and overlong is not None:
        overlong.append(where)
        return False
    hint = (
        ": shorten it or leave it out (sft and prefer: overlong_prompts = drop)"
        if tokens
        else ": write something to answer"
    )
    raise InputError(f"{where}: its prompt has {tokens} tokens, and between 1 and {max_length - 1} fit{hint}")


def overlong_line(count: int, total: int, side: str = "training") -> str:
    return f"{count} of {total} {side} prompts leave no room for a completion and are dropped"


def refuse_unknown_tokens(rows: Sequence[Row], vocab: int, where: str = "") -> None:
    """`where` the rows come from, if they do not know it and their groups are not the numbers of the examples."""
    for row in rows:
        largest = max((*row.prompt, *row.response))
        if largest >= vocab:
            place = where or getattr(row, "where", "") or f"example {row.group}"
            raise InputError(
                f"{place} holds token {largest}, outside the model's vocabulary of {vocab}: is this its tokenizer?"
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


def loss_mask(rows: Sequence[Row], device=None) -> torch.Tensor:
    """bool [B, T]: the tokens that are learned."""
    mask = response_mask(rows)
    for i, row in enumerate(rows):
        if isinstance(row, Demonstration) and row.counted is not None:
            mask[i, : len(row.response)] = torch.tensor(row.counted)
    return mask.to(device)


def sft_step(model: Transformer, optimizer: AdamW, rows: Sequence[Row], lr: float, clip: float, budget: int) -> dict:
    """One update on the mean negative log-likelihood of the tokens that are learned."""
    batch = Batch(rows, torch.ones(len(rows), device=model.device), loss_mask(rows, model.device))
    metrics = accumulate(model, batch, LIKELIHOOD, budget)
    norm, tokens = optimizer.step(lr, clip), int(batch.mask.sum())
    return {"loss": metrics["loss/total"], "entropy": metrics["entropy"], "grad_norm": norm, "lr": lr, "tokens": tokens}


def prepare_sft(config: SFTConfig, display: Display) -> tuple[Transformer, Tokenizer, list[Row], Run]:
    """All that comes before the first step."""
    examples = read_demonstrations(config.data)
    run = Run(config.out, identity(config, contents(examples)), config.resume)
    model, tokenizer = load(run.checkpoint or config.model, config.dtype, config.device, config=config, run=run)
    model.checkpointing = config.recompute
    taken = tracked(display, "examples", examples)
    overlong: list[str] | None = [] if config.overlong_prompts == "drop" else None
    rows = demonstration_rows(tokenizer, taken, model.config.max_positions, config.loss_on, overlong)
    if not rows:
        raise InputError(
            f"none of the {len(examples)} examples of {config.data} can be learned from: each is too long for the "
            f"context of {model.config.max_positions} tokens, or the weights of all its turns are 0"
        )
    refuse_unknown_tokens(rows, model.active_vocab)
    cut = sum(row.lost > 0 for row in rows)
    too_long = f"; cut at {model.config.max_positions} tokens: {cut:,}" if cut else ""
    display.line(description(examples, config.loss_on, rows) + too_long)
    if overlong:
        display.line(overlong_line(len(overlong), len(examples)))
    return model, tokenizer, rows, run


def train_sft(config: SFTConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl sft`; returns the folder of the trained model."""
    display = display or Display()
    model, tokenizer, rows, run = prepare_sft(config, display)
    show_disk(disk_of(run, [model], config.steps, config.save_every), display)
    return fit(model, tokenizer, rows, config, run, display)


def fit(model, tokenizer, rows: Sequence[Row], config: SFTConfig, run: Run, display: Display) -> Path:
    """A step: batch, gradient, update."""
    optimizer = AdamW(model, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    if run.checkpoint:
        run.restore(optimizer)
    if run.start == 0:
        display.example(marked_row(tokenizer, rows[0], loss_mask(rows[:1])[0].tolist()))

    def step(number: int) -> dict[str, float]:
        started = time.perf_counter()
        chosen = [rows[i] for i in take(len(rows), config.seed, number * config.batch, config.batch)]
        chosen = [replace(row, group=i) for i, row in enumerate(chosen)]
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
