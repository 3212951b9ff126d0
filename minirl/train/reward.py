"""Reward models: a policy's trunk with a scalar head, trained on pairs, labels or labelled steps.

    pairwise    −log σ(r_w − r_l − m) + η (r_w + r_l)²      Bradley-Terry, ranked lists too
    pointwise   (r − y)², y = ±1
    bce         −log σ(±r)                                  r is the logit of being right
    process     the same at the last token of each step

r is read at the last token of a completion. What comes out scores completions as `--rewards model:FOLDER=1`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minirl.errors import InputError
from minirl.files import contents
from minirl.model import ScalarHead, Transformer
from minirl.reward_losses import (
    bce_loss,
    label_metrics,
    pair_metrics,
    pairwise_loss,
    pointwise_loss,
    process_loss,
    score_stats,
)
from minirl.rewards.model import LAST, Tree, micro_batches, read, read_all
from minirl.tokenizer import Tokenizer
from minirl.train.optimizer import AdamW, learning_rate
from minirl.train.preview import disk_of, marked, show_disk
from minirl.train.ranked import description
from minirl.train.reward_data import Line, balanced, encode, read_examples, split_by_prompt
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
    shown,
    tenth,
    tracked,
)
from minirl.train.sft import demonstration_rows, read_demonstrations


@dataclass(frozen=True)
class RewardConfig:
    """Train a reward model on pairs, ranked lists, labelled completions or labelled steps."""

    model: str
    """Checkpoint to start from: a policy, whose trunk gets a new head, or a reward model with the same head."""
    data: str
    """File (JSONL, a .json list, Parquet), folder or name of a data set; each row has a prompt and: "chosen",
    "rejected" and maybe "margin", or "responses" and "scores", or another format of preferences (pairwise);
    "completion" and "label" (pointwise, bce); "steps" and "labels" (process)."""
    kind: Literal["pairwise", "pointwise", "bce", "process"] = "pairwise"
    """Bradley-Terry on pairs, squared error to ±1, a logit for each completion, or one for each step."""
    out: str = "runs/reward"
    """Folder of the run."""
    steps: int | None = None
    """Optimizer steps; None: one pass over the data."""
    batch: int = 32
    """Lines a step."""
    lr: float = 1e-5
    """Peak learning rate."""
    head: Literal["linear", "mlp"] = "linear"
    """Linear, or Linear-ReLU-Linear; in fp32."""
    heldout: float = 0.1
    """Share of the prompts that are held out with all their lines."""
    heldout_data: str | None = None
    """File, folder or name of a data set of held-out lines instead."""
    reference: str | None = None
    """File, folder or name of a data set of "prompt" and "completion" whose mean score shall be 0 (pairwise, where only
    differences are learned); None: the held-out responses."""
    center: float = 0.0
    """η of the pairwise loss, 0.01 for instance: pulls the level of the scores to 0 in training."""
    balance: bool = True
    """Weight right and wrong completions by inverse frequency (pointwise, bce)."""
    separator: str = "\n"
    """What ends a step (process)."""
    share: int = 1
    """Lines of one prompt that come together and compute it once: more save time where prompts are long, but a step is
    less diverse and learns less."""
    warmup: int = 10
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Decay of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int = 50
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_lines: int = 512
    """Held-out lines of an evaluation, at most."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward: a memory knob that changes no result."""
    save_every: int = 100
    """Steps between checkpoints."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template reads, each as --template.NAME VALUE: --template.enable_thinking false."""
    system: str | None = None
    """System message of the prompts whose messages have none."""
    seed: int = 0
    """Decides the head, what is held out, and the order of the lines."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the trunk computes in; masters are fp32."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    resume: bool = False
    """Continue the run in `out`; micro_batch_tokens, recompute, device and save_every
    may differ, as they change no result."""

    def __post_init__(self):
        refuse_below_one(self, "batch", "share", "eval_lines", "micro_batch_tokens", "save_every")
        if self.steps is not None:
            refuse_below_one(self, "steps")
        refuse_not_positive(self, "lr", "clip_norm")
        refuse_negative(self, "center", "warmup", "weight_decay", "eval_every", "seed")
        refuse_unknown_choices(self)
        if not 0 <= self.heldout < 1:
            raise InputError(f"heldout = {self.heldout}: it must be from 0 to below 1")
        if not self.separator:
            raise InputError("separator is empty: give what stands between two steps, a newline for instance")
        if self.kind != "pairwise" and (self.center or self.reference):
            raise InputError(f"kind {self.kind} learns the level of its scores: leave center and reference away")


@dataclass(frozen=True)
class Prepared:
    """All that comes before the first step."""

    model: Transformer
    tokenizer: Tokenizer
    train: list[Line]
    heldout: list[Line]
    reference: list[Tree]
    run: Run

    def example(self) -> list[Part]:
        """The first response of the first line: the score is read at, and so trained through, the marked tokens."""
        tree = self.train[0].tree
        places = {len(tree.responses[0]) - 1 if place == LAST else place for place in tree.places[0]}
        trained = [False] * len(tree.prompt) + [i in places for i in range(len(tree.responses[0]))]
        return marked(self.tokenizer, [*tree.prompt, *tree.responses[0]], trained)


def prepare_reward(config: RewardConfig, display: Display) -> Prepared:
    """Read and encode the data, and load the model."""
    examples = read_examples(config.data, config.kind)
    if config.heldout_data:
        sides = examples, read_examples(config.heldout_data, config.kind)
    else:
        sides = split_by_prompt(examples, config.heldout, config.seed)
    demonstrations = read_demonstrations(config.reference) if config.reference else []
    hashed = contents([*sides[0], *sides[1]])
    run = Run(config.out, identity(config, [hashed, len(sides[1]), contents(demonstrations)]), config.resume)
    model, tokenizer = start(config, run)
    if config.kind == "pairwise":
        display.line(description(examples))
    paths = config.data, config.heldout_data or config.data
    train, heldout = (_lines(*side, config, tokenizer, model, display) for side in zip(sides, paths, strict=True))
    if not train:
        raise InputError(f"{config.data} has no line to train on once these are left out: give others")
    if config.kind in ("pointwise", "bce") and config.balance:
        train = balanced(train)
    heldout = heldout[: config.eval_lines]
    rows = demonstration_rows(tokenizer, demonstrations, model.config.max_positions)
    reference = [Tree(tuple(row.prompt), (tuple(row.response),), ((LAST,),)) for row in rows]
    return Prepared(model, tokenizer, train, heldout, reference, run)


def train_reward(config: RewardConfig, display: Display | None = None) -> Path:
    """Run the whole of `minirl reward`; returns the folder of the trained model."""
    display = display or Display()
    prepared = prepare_reward(config, display)
    model, tokenizer, train, heldout = prepared.model, prepared.tokenizer, prepared.train, prepared.heldout
    reference, run = prepared.reference, prepared.run
    if run.start == 0:
        display.example(prepared.example())
    fit(model, tokenizer, train, heldout, config, run, display)
    if config.kind == "pairwise":
        set_bias(model, reference or [line.tree for line in heldout or train[: config.eval_lines]], config, display)
    return run.finish(model, tokenizer)


def start(config: RewardConfig, run: Run) -> tuple[Transformer, Tokenizer]:
    """The model to go on with: the run's own, or config.model's with its head or a fresh one."""
    if run.checkpoint:
        model, tokenizer = load(run.checkpoint, config.dtype, config.device, True, config, run)
    else:
        head = ScalarHead(config.head, config.kind, separator=config.separator)
        model, tokenizer = load(config.model, config.dtype, config.device, head, config, run)
        if not any(p.any() for p in model.score.parameters()):
            model.initialise_score(config.seed)
    model.checkpointing = config.recompute
    return model, tokenizer


def _lines(examples: list[dict], path: str, config: RewardConfig, tokenizer, model, display: Display) -> list[Line]:
    taken = tracked(display, "examples", examples)
    found = encode(taken, config.kind, tokenizer, model.config, config.separator)
    if complaint := found.complaint(path, model.config.max_positions):
        display.line(complaint)
    return found.lines


# --- one step --------------------------------------------------------------------------------------------------------


def objective(scores: torch.Tensor, lines: Sequence[Line], config: RewardConfig, total: float) -> torch.Tensor:
    """The loss of some lines from the scores of all their places [M]; `total` is the weight of the whole step."""

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
    """Where the better and the worse ones of all pairs stand among the lines' places, [2, pairs]."""
    pairs, start = [], 0
    for line in lines:
        pairs += [(start + better, start + worse) for better, worse, _ in line.pairs]
        start += len(line.tree.responses)
    return torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2).t()


def accumulate(model: Transformer, lines: Sequence[Line], config: RewardConfig) -> tuple[float, torch.Tensor]:
    """Add the gradient of the mean loss over all lines, in micro-batches; returns that loss and the scores [M]."""
    trees, total, loss = [line.tree for line in lines], _total(lines), 0.0
    found: list[torch.Tensor] = [torch.empty(0)] * len(lines)
    for indices in micro_batches(trees, config.micro_batch_tokens):
        scores = read(model, [trees[i] for i in indices])
        part = objective(scores, [lines[i] for i in indices], config, total)
        part.backward()
        loss += part.item()
        for i, own in zip(indices, scores.detach().split([_places(lines[i]) for i in indices]), strict=True):
            found[i] = own
    return loss, torch.cat(found)


def _total(lines: Sequence[Line]) -> float:
    return max(math.fsum(w for line in lines for w in line.weights), 1e-12)  # a batch without a labelled step


def _places(line: Line) -> int:
    return sum(map(len, line.tree.places))


def measures(scores: torch.Tensor, lines: Sequence[Line], config: RewardConfig) -> dict[str, float]:
    """What the scores of the lines' places [M] are worth."""
    if config.kind == "pairwise":
        better, worse = pair_indices(lines, scores.device)
        return pair_metrics(scores[better], scores[worse])
    kept = torch.tensor([w > 0 for line in lines for w in line.weights], device=scores.device)
    labels = torch.tensor([y for line in lines for y in line.labels], device=scores.device)
    groups = torch.tensor([g for line, g in zip(lines, prompts_of(lines), strict=True) for _ in line.labels])
    groups = groups.to(scores.device)
    return label_metrics(scores[kept], labels[kept], groups[kept], logits=config.kind != "pointwise")


@torch.no_grad()
def evaluate(model: Transformer, lines: Sequence[Line], config: RewardConfig) -> dict[str, float]:
    """Loss, ranking accuracy, calibration and the distribution of the scores on held-out lines, as eval/..."""
    scores = read_all(model, [line.tree for line in lines], config.micro_batch_tokens)
    found = {"loss": objective(scores, lines, config, _total(lines)).item(), **measures(scores, lines, config)}
    return {f"eval/{name}": value for name, value in found.items()} | score_stats(scores, "eval/reward_")


def set_bias(model: Transformer, trees: Sequence[Tree], config: RewardConfig, display: Display) -> None:
    """Subtract the mean score of the trees from now on: differences, all that a pairwise loss sees, stay."""
    mean = read_all(model, trees, config.micro_batch_tokens).double().mean().item()
    model.head = replace(model.head, bias=model.head.bias + mean)
    display.line(f"bias {model.head.bias:.3f}: the mean score of the reference set, now 0")


def prompts_of(lines: Sequence[Line]) -> list[int]:
    """Number of each line's prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(line.tree.prompt, len(numbers)) for line in lines]


def take(prompts: np.ndarray, share: int, seed: int, start: int, number: int) -> list[int]:
    """Lines start .. start+number of the endless sequence of epochs, each in a seeded order of chunks of up to `share`
    lines of one prompt. `prompts` is the number of each line's prompt."""
    count, out = len(prompts), []
    for epoch in range(start // count, (start + number - 1) // count + 1):
        rng = np.random.default_rng([seed, epoch])
        lines = np.lexsort((rng.random(count), prompts))  # by prompt, those of a prompt shuffled
        _, first, sizes = np.unique(prompts[lines], return_index=True, return_counts=True)
        starts = (np.arange(count) - np.repeat(first, sizes)) % share == 0  # of a chunk
        out.append(lines[np.argsort(rng.permutation(count)[np.cumsum(starts) - 1], kind="stable")])
    offset = start % count
    return np.concatenate(out)[offset : offset + number].tolist()


# --- the loop --------------------------------------------------------------------------------------------------------


def fit(model, tokenizer, train: list[Line], heldout: list[Line], config: RewardConfig, run: Run, display) -> None:
    """A step: batch, gradient, update, evaluation."""
    steps = config.steps or -(-len(train) // config.batch)
    optimizer, prompts = AdamW(model, weight_decay=config.weight_decay, betas=(0.9, 0.95)), np.array(prompts_of(train))
    if run.checkpoint:
        run.restore(optimizer)
    show_disk(disk_of(run, [model], steps, config.save_every), display)
    if run.start == 0:
        before = evaluate(model, heldout, config) if heldout else {}
        display.line(f"before: {len(train)} lines to train on, {len(heldout)} held out{heldout_line(before)}")

    def step(number: int) -> dict[str, float]:
        started = time.perf_counter()
        lines = [train[i] for i in take(prompts, config.share, config.seed, number * config.batch, config.batch)]
        lr = learning_rate(number, config.lr, config.warmup, steps, config.schedule)
        loss, scores = accumulate(model, lines, config)
        norm = optimizer.step(lr, config.clip_norm)
        seconds, tokens = time.perf_counter() - started, sum(line.tokens for line in lines)
        metrics = {"loss": loss, **measures(scores, lines, config), **score_stats(scores, "reward/")}
        metrics |= {"grad_norm": norm, "lr": lr, "tokens": tokens, "tokens_per_s/train": tokens / seconds}
        if number == 0:  # only now: a run whose first step fails leaves no folder
            run.log(0, before)
        if heldout and due(number + 1, steps, config.eval_every):
            metrics |= evaluate(model, heldout, config)
        return metrics | {"time/step": seconds, "memory/peak_gb": peak_memory_gb()}

    def line(done: int, metrics: dict[str, float]) -> str:
        return reward_line(done, steps, metrics) if "eval/loss" in metrics or tenth(done, steps) else ""

    def save(done: int) -> None:
        run.save(done, model, tokenizer, optimizer)

    loop(run, "reward", steps, config.save_every, display, step, line, save)


def heldout_line(m: dict) -> str:
    """Held-out numbers for a person; empty where there are none."""
    if "eval/loss" not in m:
        return ""
    auc = f"  auc {shown(m, 'eval/auc', '.3f')}" if "eval/auc" in m else ""  # of labels
    return (
        f"  held-out accuracy {shown(m, 'eval/accuracy', '.3f')}{auc}  ece {shown(m, 'eval/ece', '.3f')}  "
        f"brier {shown(m, 'eval/brier', '.3f')}  score {m['eval/reward_mean']:.2f} ± {m['eval/reward_std']:.2f}"
    )


def reward_line(step: int, steps: int, m: dict) -> str:
    return (
        f"reward {step}/{steps}  loss {m['loss']:.4f}  accuracy {shown(m, 'accuracy', '.3f')}  "
        f"margin {shown(m, 'margin', '.2f')}{heldout_line(m)}  grad {m['grad_norm']:.2f}  lr {m['lr']:.1e}  "
        f"{m['tokens_per_s/train']:.0f} tok/s"
    )
