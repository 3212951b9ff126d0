"""Reward models: a policy's trunk with a scalar head, trained on pairs, labels or labelled steps.

    pairwise    −log σ(r_w − r_l − m) + η (r_w + r_l)²      Bradley-Terry, ranked lists too
    pointwise   (r − y)², y = ±1
    bce         −log σ(±r)                                  r is the logit of being right
    process     the same at the last token of each step

r is read at the last token of a completion. What comes out scores completions as `--rewards model:FOLDER=1`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from minirl.config import Count, NotNegative, OptimizerConfig, RunConfig, Whole, require
from minirl.errors import InputError
from minirl.examples import Line, Lines, balanced, demonstration_rows, description, reward_lines, split_by_prompt
from minirl.files import contents
from minirl.metrics import shown
from minirl.model import ScalarHead, Transformer
from minirl.optimizer import learning_rate
from minirl.policy import Policy
from minirl.records import read_demonstrations, read_labels
from minirl.reward_losses import (
    bce_loss,
    label_metrics,
    pair_metrics,
    pairwise_loss,
    pointwise_loss,
    process_loss,
    score_stats,
)
from minirl.reward_model import read, read_all
from minirl.run import (
    Display,
    Observer,
    Run,
    identity,
    tracked,
)
from minirl.step import Step
from minirl.trees import LAST, Row, micro_batches


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OptimizerConfig, RunConfig):
    """Train a reward model on pairs, ranked lists, labelled completions or labelled steps."""

    model: str = field(kw_only=False)
    """Checkpoint to start from: a policy, whose trunk gets a new head, or a reward model with the same head."""
    data: str = field(kw_only=False)
    """File (JSONL, a .json list, Parquet), folder or name of a data set; each row has a prompt and: "chosen",
    "rejected" and maybe "margin", or "responses" and "scores", or another format of preferences (pairwise);
    "completion" and "label" (pointwise, bce); "steps" and "labels" (process)."""
    kind: Literal["pairwise", "pointwise", "bce", "process"] = field(default="pairwise", kw_only=False)
    """Bradley-Terry on pairs, squared error to ±1, a logit for each completion, or one for each step."""
    out: str = "runs/reward"
    steps: Count | None = None
    """Optimizer steps; None: one pass over the data."""
    batch: Count = 32
    """Lines a step."""
    head: Literal["linear", "mlp"] = "linear"
    """Linear, or Linear-ReLU-Linear; in fp32."""
    heldout: float = 0.1
    """Share of the prompts that are held out with all their lines."""
    heldout_data: str | None = None
    """File, folder or name of a data set of held-out lines instead."""
    reference: str | None = None
    """File, folder or name of a data set of "prompt" and "completion" whose mean score shall be 0 (pairwise, where only
    differences are learned); None: the held-out responses."""
    center: NotNegative = 0.0
    """η of the pairwise loss, 0.01 for instance: pulls the level of the scores to 0 in training."""
    balance: bool = True
    """Weight right and wrong completions by inverse frequency (pointwise, bce)."""
    separator: str = "\n"
    """Text that ends a step (process)."""
    share: Count = 1
    """Lines of one prompt that come together and compute it once: more save time where prompts are long, but a step is
    less diverse and learns less."""
    eval_every: Whole = 50
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_lines: Count = 512
    """Held-out lines of an evaluation, at most."""
    seed: Whole = 0
    """Decides the head, what is held out, and the order of the lines."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the trunk; auto is bfloat16 on a GPU, float32 on a CPU. Masters are fp32."""

    def __post_init__(self):
        super().__post_init__()
        self.require("heldout", 0 <= self.heldout < 1, "it must be from 0 to below 1")
        require(self.separator, "separator is empty: give what stands between two steps, a newline for instance")
        require(
            self.kind == "pairwise" or not (self.center or self.reference),
            f"kind {self.kind} learns the level of its scores: leave center and reference away",
        )


class Parts(NamedTuple):
    """The parts of a run."""

    policy: Policy  # its model has a scalar head
    train: list[Line]
    heldout: list[Line]
    reference: list[Row]  # whose mean score shall be 0

    @property
    def steps_of_a_pass(self) -> int:
        """Return the steps of one pass over the training lines."""
        return -(-len(self.train) // self.policy.config.batch)


class Examples(NamedTuple):
    """The records of the files."""

    train: list[dict]
    heldout: list[dict]
    reference: list[dict]

    @property
    def data(self) -> list:
        """Return what a resumed run must find unchanged."""
        return [contents([*self.train, *self.heldout]), len(self.heldout), contents(self.reference)]


def read_data(config: RewardConfig) -> Examples:
    """Read the files of a config: training and held-out lines, and the reference set."""
    examples = read_labels(config.data, config.kind)
    if config.heldout_data:
        sides = examples, read_labels(config.heldout_data, config.kind)
    else:
        sides = split_by_prompt(examples, config.heldout, config.seed)
    return Examples(*sides, read_demonstrations(config.reference) if config.reference else [])


def prepare(run: Run, config: RewardConfig, examples: Examples) -> Parts:
    """Load or restore the model, with its head or a fresh one, and encode the data."""
    head = True if run.checkpoint else ScalarHead(config.head, config.kind, separator=config.separator)
    policy = Policy.load(config, run, head).with_optimizer(betas=(0.9, 0.95))
    model, tokenizer = policy.model, policy.tokenizer
    if not run.checkpoint and not any(p.any() for p in model.score.parameters()):
        model.initialise_score(config.seed)
    if config.kind == "pairwise":
        run.display.line(description(examples.train + (examples.heldout if not config.heldout_data else [])))
    paths = config.data, config.heldout_data or config.data
    sides = zip(examples[:2], paths, strict=True)
    train, heldout = (_lines(*side, config, tokenizer, model, run.display) for side in sides)
    if not train:
        raise InputError(f"{config.data} has no line to train on once these are left out: give others")
    if config.kind in ("pointwise", "bce") and config.balance:
        train = balanced(train)
    reference = demonstration_rows(tokenizer, examples.reference, model.config.max_positions)
    return Parts(run.hold("policy", policy), train, heldout[: config.eval_lines], reference)


def _lines(examples: list[dict], path: str, config: RewardConfig, tokenizer, model, display: Display) -> list[Line]:
    taken = tracked(display, "examples", examples)
    lines, left_out = reward_lines(taken, config.kind, tokenizer, model.config, config.separator)
    if left_out:
        display.line(f"{path}: lines left out: {left_out}")
    return lines


# --- one step --------------------------------------------------------------------------------------------------------


def objective(scores: torch.Tensor, lines: Sequence[Line], config: RewardConfig, total: float) -> torch.Tensor:
    """Return the loss of some lines from the scores of all their places [M]; `total` is the weight of the whole
    step."""

    def tensor(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=scores.dtype, device=scores.device)

    weights = tensor(w for line in lines for w in line.weights)
    if config.kind == "pairwise":
        better, worse = pair_indices(lines, scores.device)
        margins = tensor(line.margin for line in lines for _ in line.pairs)
        return pairwise_loss(scores[better], scores[worse], margins, config.center, weights, total)
    labels = tensor(y for line in lines for y in line.labels)
    if config.kind == "pointwise":
        return pointwise_loss(scores, 2 * labels - 1, weights, total)
    if config.kind == "process":
        return process_loss(scores, labels, weights, total)
    return bce_loss(scores, labels, weights, total)


def pair_indices(lines: Sequence[Line], device=None) -> torch.Tensor:
    """Return where the better and the worse ones of all pairs stand among the lines' places, [2, pairs]."""
    pairs, start = [], 0
    for line in lines:
        pairs += [(start + better, start + worse) for better, worse in line.pairs]
        start += len(line.rows)
    return torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2).t()


def add_reward_gradient(model: Transformer, lines: Sequence[Line], config: RewardConfig) -> tuple[float, torch.Tensor]:
    """Add the gradient of the mean loss over all lines, in micro-batches; returns that loss and the scores [M]."""
    total, loss = _total(lines), 0.0
    found: list[torch.Tensor] = [torch.empty(0)] * len(lines)
    for indices in micro_batches([line.rows for line in lines], range(len(lines)), config.micro_batch_tokens):
        chosen = [lines[i] for i in indices]
        scores = read(model, rows_of(chosen))
        part = objective(scores, chosen, config, total)
        part.backward()
        loss += part.item()
        sizes = [sum(len(row.places) for row in line.rows) for line in chosen]
        for i, own in zip(indices, scores.detach().split(sizes), strict=True):
            found[i] = own
    return loss, torch.cat(found)


def _total(lines: Sequence[Line]) -> float:
    return max(math.fsum(w for line in lines for w in line.weights), 1e-12)  # a batch without a labelled step


def measures(scores: torch.Tensor, lines: Sequence[Line], config: RewardConfig) -> dict[str, float]:
    """Measure the scores of the lines' places [M]: ranking accuracy, calibration."""
    if config.kind == "pairwise":
        better, worse = pair_indices(lines, scores.device)
        return pair_metrics(scores[better], scores[worse])
    kept = torch.tensor([w > 0 for line in lines for w in line.weights], device=scores.device)
    labels = torch.tensor([y for line in lines for y in line.labels], device=scores.device)
    groups = torch.tensor([g for line, g in zip(lines, prompts_of(lines), strict=True) for _ in line.labels])
    groups = groups.to(scores.device)
    return label_metrics(scores[kept], labels[kept], groups[kept], logits=config.kind != "pointwise")


@torch.no_grad()
def held_out_metrics(model: Transformer, lines: Sequence[Line], config: RewardConfig) -> dict[str, float]:
    """Return loss, ranking accuracy, calibration and the distribution of the scores on held-out lines, as eval/..."""
    scores = read_all(model, rows_of(lines), config.micro_batch_tokens)
    found = {"loss": objective(scores, lines, config, _total(lines)).item(), **measures(scores, lines, config)}
    return {f"eval/{name}": value for name, value in found.items()} | score_stats(scores, "eval/reward_")


def set_bias(model: Transformer, rows: Sequence[Row], config: RewardConfig, run: Run) -> None:
    """Subtract the mean score of the rows from now on: differences, all that a pairwise loss sees, stay."""
    mean = read_all(model, rows, config.micro_batch_tokens).double().mean().item()
    model.head = replace(model.head, bias=model.head.bias + mean)
    run.display.line(f"bias {model.head.bias:.3f}: the mean score of the reference set, now 0")


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """Return the rows of all lines, one after another."""
    return [row for line in lines for row in line.rows]


def prompts_of(lines: Sequence[Line]) -> list[int]:
    """Number the prompts, and return that of each line."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(line.rows[0].prompt, len(numbers)) for line in lines]


def endless_chunks(prompts: np.ndarray, share: int, seed: int, start: int, number: int) -> list[int]:
    """Return lines start .. start+number of the endless sequence of epochs, each in a seeded order of chunks of up to
    `share` lines of one prompt. `prompts` is the number of each line's prompt."""
    count, out = len(prompts), []
    for epoch in range(start // count, (start + number - 1) // count + 1):
        rng = np.random.default_rng([seed, epoch])
        lines = np.lexsort((rng.random(count), prompts))  # by prompt, those of a prompt shuffled
        _, first, sizes = np.unique(prompts[lines], return_index=True, return_counts=True)
        starts = (np.arange(count) - np.repeat(first, sizes)) % share == 0  # of a chunk
        out.append(lines[np.argsort(rng.permutation(count)[np.cumsum(starts) - 1], kind="stable")])
    offset = start % count
    return np.concatenate(out)[offset : offset + number].tolist()


def first_example(row: Row) -> tuple[Sequence[int], Sequence[int], list[bool]]:
    """Return the prompt, the response, and which of its tokens a score is read at, and so trained through."""
    places = {len(row.response) - 1 if place == LAST else place for place in row.places}
    return row.prompt, row.response, [i in places for i in range(len(row.response))]


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def heldout_line(m: dict) -> str:
    """Format held-out numbers for a person; empty where there are none."""
    if "eval/loss" not in m:
        return ""
    auc = f"  auc {shown(m, 'eval/auc', '.3f')}" if "eval/auc" in m else ""  # of labels
    return (
        f"  held-out accuracy {shown(m, 'eval/accuracy', '.3f')}{auc}  ece {shown(m, 'eval/ece', '.3f')}  "
        f"brier {shown(m, 'eval/brier', '.3f')}  score {m['eval/reward_mean']:.2f} ± {m['eval/reward_std']:.2f}"
    )


class HeldOutLines(Observer):
    """The observer that measures held-out lines, before training and every `eval_every` steps."""

    def __init__(self, config: RewardConfig, parts: Parts):
        self.config, self.parts = config, parts

    def begin(self, run: Run) -> dict[str, float]:
        if run.start:
            return {}
        before, (_, train, heldout, _) = self._measure(), self.parts
        run.display.line(f"before: {len(train)} lines to train on, {len(heldout)} held out{heldout_line(before)}")
        return before

    def after(self, step: Step) -> dict[str, float]:
        return self._measure() if step.due(self.config.eval_every) or step.done == step.total else {}

    def _measure(self) -> dict[str, float]:
        return held_out_metrics(self.parts.policy.model, self.parts.heldout, self.config) if self.parts.heldout else {}


def reward_step(step: Step, config: RewardConfig, policy: Policy, train: Sequence[Line], prompts: np.ndarray) -> None:
    """Take one update on the lines of a step."""
    rate = learning_rate(step.number, config.lr, config.warmup, step.total, config.schedule)
    with step.time("step"):
        chosen = endless_chunks(prompts, config.share, config.seed, step.number * config.batch, config.batch)
        lines = [train[i] for i in chosen]
        loss, scores = add_reward_gradient(policy.model, lines, config)
        step.update(Lines(lines), {"loss": loss}, {"grad_norm": (policy.optimizer, rate)}, config)
    step.add(**{"loss": loss} | (step.updates[0] or {}), lr=rate)
    step.add(**measures(scores, lines, config), **score_stats(scores, "reward/"))
    step.add(tokens=sum(line.tokens for line in lines))
    step.speed("train", step.metrics["tokens"], over="step")


def train_reward_model(
    config: RewardConfig, examples: Examples, display: Display | None = None, observers: Sequence = ()
) -> Path:
    """Train on records of `read_data`; returns the folder of the trained model."""
    with Run(config.out, identity(config, examples.data), config.resume, display, observers) as run:
        policy, train, heldout, reference = parts = prepare(run, config, examples)
        total, prompts = config.steps or parts.steps_of_a_pass, np.array(prompts_of(train))
        run.begin(total, config.save_every)
        if run.start == 0:
            run.display.example(policy.tokenizer, *first_example(train[0].rows[0]))
        run.observe(HeldOutLines(config, parts))
        for step in run.steps("reward", total, config.save_every):
            step.attempt(reward_step, config, policy, train, prompts)
        if config.kind == "pairwise":
            set_bias(policy.model, reference or rows_of(heldout or train[: config.eval_lines]), config, run)
        return run.finish(policy.model, policy.tokenizer)
