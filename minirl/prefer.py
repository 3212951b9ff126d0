"""Offline preference optimisation: responses that are ranked already, and a policy that learns the ranks.

    for each step:  prompts with their ranked responses -> log-probs -> one update of the preference loss

The reference is the starting checkpoint. Its log-probs never change, so they are computed once, before training, and
only a number a response is kept: no second model stays in memory. The responses of a prompt stand below it as one tree
and are never parted: a pair's loss needs both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from minirl.batch import endless_epochs
from minirl.config import Count, OptimizerConfig, Positive, RunConfig, Whole
from minirl.errors import InputError
from minirl.examples import (
    Line,
    Lines,
    description,
    held_out,
    overlong_line,
    ranked_lists,
    refuse_unknown_tokens,
    whole_lists,
)
from minirl.files import contents
from minirl.loss_metrics import combine_metrics
from minirl.model import Transformer
from minirl.optimizer import learning_rate
from minirl.policy import Policy, load
from minirl.preferences import PairCounts, PreferenceLoss, preference_loss, rrhf_loss, sequence_logp
from minirl.run import (
    Display,
    Observer,
    Run,
    identity,
    tracked,
)
from minirl.step import Step
from minirl.tokenizer import Tokenizer
from minirl.trees import MicroBatch, loss_mask


@dataclass(frozen=True, kw_only=True)
class PreferConfig(OptimizerConfig, RunConfig):
    """Train a checkpoint on preferences: DPO and its family, or RRHF on ranked lists."""

    model: str = field(kw_only=False)
    """Checkpoint: a Hugging Face directory or hub id. It is the reference too."""
    data: str = field(kw_only=False)
    """File (JSONL, a .json list, Parquet), folder or name of a data set; each row has "chosen" and "rejected", or
    "responses" with their "scores" (numbers, higher is better), every pair of which is compared; a list counts once,
    however many pairs it has (rrhf: each of its pairs). The texts stand below a "prompt", or are chat messages or whole
    conversations. Tokens beside a text ("chosen_tokens", "rejected_tokens", "responses_tokens") are taken as they
    are."""
    out: str = "runs/prefer"
    steps: Count = 100
    batch: Count = 32
    """Lines of the file a step."""
    lr: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    """The preference loss."""
    max_length: Count | None = None
    """Tokens of a prompt with one response; longer responses are cut, those of a prompt all at one length. None: as
    many as the model has positions."""
    eval_share: float = 0.1
    """Share of the prompts that is held out, to measure how many pairs come in the right order; 0 = none."""
    micro_batch_tokens: Count = 4096
    """Tokens in one forward, though never less than one prompt with all its responses: a memory knob that changes no
    result."""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in `max_length` tokens: stop before the first step, or leave it
    out."""
    eval_every: Whole = 0
    """Steps between held-out evaluations; 0 = only before and after."""
    save_every: Count = 50
    seed: Whole = 0
    """Decides what is held out, and the order of the lines."""

    def __post_init__(self):
        super().__post_init__()
        self.require("eval_share", 0 <= self.eval_share < 1, "it must be at least 0 and below 1")


# ---- one step --------------------------------------------------------------------------------------------------------


def log_probs(model: Transformer, lists: Sequence[Line]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the sums and lengths of all their responses, list by list, [B] each; with gradients where they are on."""
    rows = [replace(row, group=i) for i, item in enumerate(lists) for row in item.rows]
    micro = MicroBatch(rows, model.device)
    return sequence_logp(micro.logprobs(model)[0], loss_mask(rows, model.device))


def loss_of(logp, lengths, lists: Sequence[Line], options: PreferenceLoss, totals: PairCounts):
    """Return the loss of some lists from the log-probs of their responses, [B] each, and its metrics."""
    starts = [0]
    for item in lists:
        starts.append(starts[-1] + len(item.rows))
    placed = list(zip(starts, lists, strict=False))
    pairs = torch.tensor([(at + i, at + j) for at, item in placed for i, j in item.pairs], device=logp.device)
    if options.has_reference:
        ref = torch.cat([item.ref_logp for item in lists]).to(logp.device)
        weights = torch.tensor([w for item in lists for w in item.weights], dtype=torch.float64)
        return preference_loss(logp, ref, lengths, pairs, options, totals, weights.to(logp.device))
    best = torch.tensor([at + item.best for at, item in placed], device=logp.device)
    return rrhf_loss(logp, lengths, pairs, best, options, totals)


def totals_of(lists: Sequence[Line]) -> PairCounts:
    return PairCounts(sum(len(item.pairs) for item in lists), len(lists))


def add_preference_gradient(
    model: Transformer, lists: Sequence[Line], options: PreferenceLoss, budget: int
) -> dict[str, float]:
    """Add the gradient of the preference loss over all lists, in micro-batches of `budget` tokens; metrics of all."""
    totals, parts = totals_of(lists), []
    for indices in whole_lists(lists, budget):
        part = [lists[i] for i in indices]
        loss, metrics = loss_of(*log_probs(model, part), part, options, totals)
        loss.backward()
        parts.append(metrics)
    return combine_metrics(parts)


@torch.no_grad()
def list_logprobs(
    model: Transformer, lists: Sequence[Line], budget: int, progress: Callable[[int, int], None]
) -> list[torch.Tensor]:
    """Compute the log-probs of each list's responses, [K] each, on the CPU."""
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
def held_out_metrics(logps: Sequence[torch.Tensor], lists: Sequence[Line], options: PreferenceLoss) -> dict[str, float]:
    """Return held-out metrics from `list_logprobs`: those of the loss, and `likelier`, the share of pairs whose chosen
    response has the higher log-prob by itself, without a reference; ties count half."""
    parts, totals = [], totals_of(lists)
    for logp, item in zip(logps, lists, strict=True):
        lengths = loss_mask(item.rows).sum(1).to(logp.dtype)
        chosen, rejected = logp[torch.tensor(item.pairs)].unbind(1)
        likelier = (chosen > rejected).double() + 0.5 * (chosen == rejected)
        metrics = loss_of(logp, lengths, [item], options, totals)[1]
        parts.append(metrics | {"likelier": likelier.sum() / totals.pairs})
    return {f"eval/{name}": value for name, value in combine_metrics(parts).items()} | {"eval/pairs": totals.pairs}


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def read_lists(
    model: Transformer, tokenizer: Tokenizer, examples: Sequence[dict], config: PreferConfig, display: Display
):
    """Encode training and held-out lists, and say lines about them."""
    most, taken = model.config.max_positions, tracked(display, "examples", examples)
    overlong: list[str] | None = [] if config.overlong_prompts == "drop" else None
    lists = ranked_lists(tokenizer, taken, min(config.max_length or most, most), overlong)
    dropped = len(overlong or ())
    if not lists:
        raise InputError(
            f"{config.data}: in none of its {len(examples)} examples does one response rank above another"
            + f"; prompts that are too long: {dropped}" * (dropped > 0)
        )
    refuse_unknown_tokens([row for item in lists for row in item.rows], model.active_vocab)
    sides = held_out(lists, config.eval_share, config.seed)
    display.line(description(examples))
    train, held = map(totals_of, sides)
    line = f"{train.pairs} pairs in {train.prompts} examples to train on, {held.pairs} in {held.prompts} held out"
    cut, tied = sum(row.lost > 0 for item in lists for row in item.rows), len(examples) - len(lists) - dropped
    line += f"; responses that are too long and cut: {cut}" if cut else ""
    display.line(line + (f"; examples that are dropped, all equal or tied: {tied}" if tied else ""))
    if dropped:
        display.line(overlong_line(dropped, len(examples)))
    return sides


def prepare(run: Run, config: PreferConfig, examples: Sequence[dict]) -> tuple:
    """Load the reference, and encode the data: model, tokenizer, training lists and held-out ones."""
    model, tokenizer = load(config.model, config.dtype, config.device, config=config, run=run)
    return model, tokenizer, *read_lists(model, tokenizer, examples, config, run.display)


def with_progress(model: Transformer, lists: Sequence[Line], stage: str, run: Run, budget: int) -> list[torch.Tensor]:
    """Compute the `list_logprobs` of some lists, with a bar of progress."""
    return list_logprobs(model, lists, budget, lambda done, total: run.display.progress(stage, done, total))


def first_example(item: Line) -> tuple[Sequence[int], Sequence[int], list[bool]]:
    """Return the prompt of a list, its best response, and which of its tokens are learned."""
    row = item.rows[item.best]
    return row.prompt, row.response, loss_mask([row])[0].tolist()


class HeldOutPairs(Observer):
    """The observer that measures held-out pairs, before training and every `eval_every` steps."""

    def __init__(self, config: PreferConfig, policy: Policy, lists: Sequence[Line]):
        self.config, self.policy, self.lists = config, policy, lists

    def begin(self, run: Run) -> dict[str, float]:
        """Measure before the first step, from the reference's log-probs: the policy still equals the reference."""
        if run.start or not self.lists:
            return {}
        known = self.config.loss.has_reference
        before = self._measure(run, [item.ref_logp for item in self.lists] if known else None)
        run.display.line(f"before: held-out loss {before['eval/loss']:.4f}, likelier {before['eval/likelier']:.3f}")
        return before

    def after(self, step: Step) -> dict[str, float]:
        due = self.lists and (step.due(self.config.eval_every) or step.done == step.total)
        return self._measure(step.run) if due else {}

    def _measure(self, run: Run, logps: list[torch.Tensor] | None = None) -> dict[str, float]:
        budget = self.config.micro_batch_tokens
        logps = logps or with_progress(self.policy.model, self.lists, "evaluation", run, budget)
        return held_out_metrics(logps, self.lists, self.config.loss)


def prefer_step(step: Step, config: PreferConfig, policy: Policy, train: Sequence[Line]) -> None:
    """Take one update on the lines of a step."""
    rate = learning_rate(step.number, config.lr, config.warmup, config.steps, config.schedule)
    with step.time("step"):
        chosen = endless_epochs(len(train), config.seed, step.number * config.batch, config.batch)
        lists = [train[i] for i in chosen]
        found = add_preference_gradient(policy.model, lists, config.loss, config.micro_batch_tokens)
        step.update(Lines(lists), found, {"grad_norm": (policy.optimizer, rate)}, config)
    step.add(**found | (step.updates[0] or {}), lr=rate)
    step.add(pairs=totals_of(lists).pairs, tokens=sum(item.tokens for item in lists))
    step.speed("train", step.metrics["tokens"], over="step")


def prefer(
    config: PreferConfig, examples: Sequence[dict], display: Display | None = None, observers: Sequence = ()
) -> Path:
    """Train on records of `read_preferences`; returns the folder of the trained model."""
    budget = config.micro_batch_tokens
    with Run(config.out, identity(config, contents(examples)), config.resume, display, observers) as run:
        model, tokenizer, train, held = prepare(run, config, examples)
        policy = run.held["policy"] = Policy(model, tokenizer, config)
        run.begin(config.steps, config.save_every)  # whatever stops a run does so before the reference is scored
        if config.loss.has_reference and run.start < config.steps:  # its log-probs never change: once is enough
            known = with_progress(model, train + held, "reference", run, budget)
            for item, sums in zip(train + held, known, strict=True):
                item.ref_logp = sums
        if run.checkpoint:
            model = policy = run.held["policy"] = None  # the reference goes before the policy comes
            policy = Policy.load(config, run)
        run.hold("policy", policy.with_optimizer())
        if run.start == 0:
            run.display.example(tokenizer, *first_example(train[0]))
        run.observe(HeldOutPairs(config, policy, held))
        for step in run.steps("prefer", config.steps, config.save_every):
            step.attempt(prefer_step, config, policy, train)
        return run.finish(policy.model, policy.tokenizer)
