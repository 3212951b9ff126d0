"""Offline preference optimisation: responses that are ranked already, and a policy that learns the ranks.

    for each step:  prompts with their ranked responses -> log-probs -> one update of the preference loss

The reference is the starting checkpoint. Its log-probs never change, so they are computed once, before training, and
only a number a response is kept: no second model stays in memory. The responses of a prompt stand below it as one tree
and are never parted: a pair's loss needs both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from minirl.errors import InputError
from minirl.files import contents
from minirl.losses import combine_metrics
from minirl.model import Transformer
from minirl.preferences import PreferenceLoss, Totals, even_weights, preference_loss, rrhf_loss, sequence_logp
from minirl.train.batch import MicroBatch
from minirl.train.optimizer import AdamW, learning_rate
from minirl.train.preview import disk_of, marked_row, show_disk
from minirl.train.ranked import Ranked, description, held_out, ranked_lists, read_preferences, whole_lists
from minirl.train.run import (
    Display,
    Part,
    Run,
    due,
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
from minirl.train.sft import loss_mask, overlong_line, refuse_unknown_tokens, take


@dataclass(frozen=True)
class PreferConfig:
    """Train a checkpoint on preferences: DPO and its family, or RRHF on ranked lists."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id. It is the reference too."""
    data: str
    """File (JSONL, a .json list, Parquet), folder or name of a data set; each row has "chosen" and "rejected", or
    "responses" with their "scores" (numbers, higher is better), every pair of which is compared; a list counts once,
    however many pairs it has (rrhf: each of its pairs). The texts stand below a "prompt", or are chat messages or whole
    conversations. Tokens beside a text ("chosen_tokens", "rejected_tokens", "responses_tokens") are taken as they
    are."""
    out: str = "runs/prefer"
    """Folder of the run."""
    steps: int = 100
    """Optimizer steps."""
    batch: int = 32
    """Lines of the file a step."""
    lr: float = 1e-6
    """Peak learning rate."""
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    """The preference loss."""
    max_length: int | None = None
    """Tokens of a prompt with one response; longer responses are cut, those of a prompt all at one length. None: as
    many as the model has positions."""
    eval_share: float = 0.1
    """Share of the prompts that is held out, to measure how many pairs come in the right order; 0 = none."""
    warmup: int = 10
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decay of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward, though never less than one prompt with all its responses: a memory knob that changes no
    result."""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in `max_length` tokens: stop before the first step, or leave it
    out."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0 = only before and after."""
    save_every: int = 50
    """Steps between checkpoints."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template reads, each as --template.NAME VALUE: --template.enable_thinking false."""
    system: str | None = None
    """System message of the prompts whose messages have none."""
    seed: int = 0
    """What is held out, and the order of the lines."""
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
        refuse_negative(self, "warmup", "weight_decay", "eval_every", "seed")
        refuse_unknown_choices(self)
        if self.max_length is not None:
            refuse_below_one(self, "max_length")
        if not 0 <= self.eval_share < 1:
            raise InputError(f"eval_share = {self.eval_share}: it must be at least 0 and below 1")


# ---- one step --------------------------------------------------------------------------------------------------------


def log_probs(model: Transformer, lists: Sequence[Ranked]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and lengths of all their responses, list by list, [B] each; with gradients where they are on."""
    rows = [replace(row, group=i) for i, item in enumerate(lists) for row in item.rows]
    micro = MicroBatch(rows, model.device)
    return sequence_logp(micro.logprobs(model)[0], loss_mask(rows, model.device))


def loss_of(logp, lengths, lists: Sequence[Ranked], options: PreferenceLoss, totals: Totals):
    """The loss of some lists from the log-probs of their responses, [B] each, and its metrics."""
    starts = [0]
    for item in lists:
        starts.append(starts[-1] + len(item.rows))
    placed = list(zip(starts, lists, strict=False))
    pairs = torch.tensor([(at + i, at + j) for at, item in placed for i, j in item.pairs], device=logp.device)
    if options.has_reference:
        ref = torch.cat([item.ref_logp for item in lists]).to(logp.device)
        weights = torch.tensor([w for item in lists for w in even_weights(item.pairs)], dtype=torch.float64)
        return preference_loss(logp, ref, lengths, pairs, options, totals, weights.to(logp.device))
    best = torch.tensor([at + item.best for at, item in placed], device=logp.device)
    return rrhf_loss(logp, lengths, pairs, best, options, totals)


def totals_of(lists: Sequence[Ranked]) -> Totals:
    return Totals(sum(len(item.pairs) for item in lists), len(lists))


def accumulate(model: Transformer, lists: Sequence[Ranked], options: PreferenceLoss, budget: int) -> dict[str, float]:
    """Add the gradient of the preference loss over all lists, in micro-batches of `budget` tokens; metrics of all."""
    totals, parts = totals_of(lists), []
    for indices in whole_lists(lists, budget):
        part = [lists[i] for i in indices]
        loss, metrics = loss_of(*log_probs(model, part), part, options, totals)
        loss.backward()
        parts.append(metrics)
    return combine_metrics(parts)


@torch.no_grad()
def table(
    model: Transformer, lists: Sequence[Ranked], budget: int, progress: Callable[[int, int], None]
) -> list[torch.Tensor]:
    """The log-probs of each list's responses, [K] each, on the CPU."""
    out: list[torch.Tensor] = [torch.empty(0)] * len(lists)
    done = 0
    for indices in whole_lists(lists, budget):
        logp, _ = log_probs(model, [lists[i] for i in indices])
        for i, sums in zip(indices, logp.cpu().split([len(lists[i].rows) for i in indices]), strict=True):
            out[i] = sums
        done += len(indices)
        progress(done, len(lists))
    return out


@torch.no_grad()
def evaluate(logps: Sequence[torch.Tensor], lists: Sequence[Ranked], options: PreferenceLoss) -> dict[str, float]:
    """Held-out metrics from a `table`: those of the loss, and `likelier`, the share of pairs whose chosen response has
    the higher log-prob by itself, without a reference; ties count half."""
    parts, totals = [], totals_of(lists)
    for logp, item in zip(logps, lists, strict=True):
        lengths = loss_mask(item.rows).sum(1).to(logp.dtype)
        chosen, rejected = logp[torch.tensor(item.pairs)].unbind(1)
        likelier = (chosen > rejected).double() + 0.5 * (chosen == rejected)
        metrics = loss_of(logp, lengths, [item], options, totals)[1]
        parts.append(metrics | {"likelier": likelier.sum() / totals.pairs})
    return {f"eval/{name}": value for name, value in combine_metrics(parts).items()} | {"eval/pairs": totals.pairs}


# ---- the loop --------------------------------------------------------------------------------------------------------


class Prefer:
    """Everything that a run holds."""

    def __init__(self, config: PreferConfig, run: Run, display: Display, examples: Sequence[dict]):
        self.config, self.display = config, display
        self.model, self.tokenizer = load(config.model, config.dtype, config.device, config=config, run=run)
        most = self.model.config.max_positions
        taken = tracked(display, "examples", examples)
        overlong: list[str] | None = [] if config.overlong_prompts == "drop" else None
        lists = ranked_lists(self.tokenizer, taken, min(config.max_length or most, most), overlong)
        dropped = len(overlong or ())
        if not lists:
            raise InputError(
                f"{config.data}: in none of its {len(examples)} examples does one response rank above another"
                + f"; prompts that are too long: {dropped}" * (dropped > 0)
            )
        refuse_unknown_tokens([row for item in lists for row in item.rows], self.model.active_vocab)
        self.train, self.held = held_out(lists, config.eval_share, config.seed)
        self.display.line(description(examples))
        self._describe(len(examples) - len(lists) - dropped)
        if dropped:
            self.display.line(overlong_line(dropped, len(examples)))
        self.run = run

    def start(self) -> None:
        """Compute the log-probs of the reference, and load the policy to go on with."""
        config, run = self.config, self.run
        if config.loss.has_reference and run.start < config.steps:
            self._compute_reference(self.train + self.held)
        if run.checkpoint:
            self.model = None  # the reference goes before the policy comes
            self.model, self.tokenizer = load(run.checkpoint, config.dtype, config.device, config=config, run=run)
        self.model.checkpointing = config.recompute
        self.optimizer = AdamW(self.model, weight_decay=config.weight_decay)
        if run.checkpoint:
            run.restore(self.optimizer)

    def _describe(self, dropped: int) -> None:
        train, held = totals_of(self.train), totals_of(self.held)
        line = f"{train.pairs} pairs in {train.prompts} examples to train on, {held.pairs} in {held.prompts} held out"
        cut = sum(item.cut for item in self.train + self.held)
        line += f"; responses that are too long and cut: {cut}" if cut else ""
        self.display.line(line + (f"; examples that are dropped, all equal or tied: {dropped}" if dropped else ""))

    def example(self) -> list[Part]:
        """The best response of the first line."""
        first = self.train[0]
        row = first.rows[first.best]
        return marked_row(self.tokenizer, row, loss_mask([row])[0].tolist())

    def _compute_reference(self, lists: Sequence[Ranked]) -> None:
        for item, sums in zip(lists, self.table(lists, "reference"), strict=True):
            item.ref_logp = sums

    def table(self, lists: Sequence[Ranked], stage: str) -> list[torch.Tensor]:
        def progress(done: int, total: int) -> None:
            self.display.progress(stage, done, total)

        return table(self.model, lists, self.config.micro_batch_tokens, progress)

    def evaluate(self, before: bool = False) -> dict[str, float]:
        """Held-out metrics; none where nothing is held out. Before training the policy is the reference."""
        if not self.held:
            return {}
        known = before and self.config.loss.has_reference
        logps = [item.ref_logp for item in self.held] if known else self.table(self.held, "evaluation")
        return evaluate(logps, self.held, self.config.loss)

    def step(self, step: int) -> dict[str, float]:
        """One update; returns its metrics."""
        started, c = time.perf_counter(), self.config
        lists = [self.train[i] for i in take(len(self.train), c.seed, step * c.batch, c.batch)]
        lr = learning_rate(step, c.lr, c.warmup, c.steps, c.schedule)
        metrics = accumulate(self.model, lists, c.loss, c.micro_batch_tokens)
        metrics |= {"grad_norm": self.optimizer.step(lr, c.clip_norm), "lr": lr, "pairs": totals_of(lists).pairs}
        seconds, tokens = time.perf_counter() - started, sum(item.tokens for item in lists)
        metrics |= {"tokens": tokens, "tokens_per_s/train": tokens / seconds, "time/step": seconds}
        return metrics | {"memory/peak_gb": peak_memory_gb()}


def step_line(step: int, steps: int, m: dict) -> str:
    held = f"  held-out {m['eval/accuracy']:.3f}" if "eval/accuracy" in m else ""
    return (
        f"prefer {step}/{steps}  loss {m['loss']:.4f}  accuracy {m['accuracy']:.3f}{held}  "
        f"reward {m['reward/chosen']:.3f} / {m['reward/rejected']:.3f}  "
        f"logp {m['logp/chosen']:.1f} / {m['logp/rejected']:.1f}  grad {m['grad_norm']:.2f}  lr {m['lr']:.1e}  "
        f"{m['tokens_per_s/train']:.0f} tok/s"
    )


def prepare_prefer(config: PreferConfig, display: Display) -> Prefer:
    """All that comes before the log-probs of the reference."""
    examples = read_preferences(config.data)
    run = Run(config.out, identity(config, contents(examples)), config.resume)
    return Prefer(config, run, display, examples)


def train_prefer(config: PreferConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl prefer`; returns the folder of the trained model."""
    display = display or Display()
    trainer = prepare_prefer(config, display)
    run = trainer.run
    show_disk(disk_of(run, [trainer.model], config.steps, config.save_every), display)
    trainer.start()
    if run.start == 0:
        display.example(trainer.example())
    if run.start == 0 and (before := trainer.evaluate(before=True)):
        display.line(f"before: held-out loss {before['eval/loss']:.4f}, likelier {before['eval/likelier']:.3f}")
        run.log(0, before)

    def step(number: int) -> dict[str, float]:
        metrics = trainer.step(number)
        return metrics | (trainer.evaluate() if due(number + 1, config.steps, config.eval_every) else {})

    def line(done: int, metrics: dict[str, float]) -> str:
        return step_line(done, config.steps, metrics) if tenth(done, config.steps) else ""

    def save(done: int) -> None:
        run.save(done, trainer.model, trainer.tokenizer, trainer.optimizer)

    loop(run, "prefer", config.steps, config.save_every, display, step, line, save)
    return run.finish(trainer.model, trainer.tokenizer)
