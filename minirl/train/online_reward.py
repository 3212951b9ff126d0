"""A reward model in the loop: how far it agrees with the rule on what the policy samples now, and, if asked for, its
refresh on the rule's outcomes every N steps (DeepSeekMath 2402.03300, Alg. 1, lines 10 and 11).

    for each step:   sample -> r = model(x, y) -> the rule's label -> policy update on r
    every N steps:   train the model on what was sampled since, with a share of older data, then carry on

A completion is scored before its label is seen, so agreement is always that with data which the model has not learned.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from minirl.errors import InputError
from minirl.reward_losses import label_metrics, weighted_pairs
from minirl.rewards.model import LAST, RewardModel, Tree, read_all
from minirl.rollout import Rollout
from minirl.train.optimizer import AdamW
from minirl.train.reward import RewardConfig, accumulate
from minirl.train.reward_data import Line, balanced
from minirl.train.run import Run, refuse_below_one, refuse_negative, refuse_not_positive

LEAST_ACCURACY, LEAST_CORRELATION, MOST_MEAN = 0.6, 0.2, 10.0  # beyond these the model is not believed


@dataclass(frozen=True)
class Refresh:
    """How the reward model among `rewards` learns on."""

    every: int = 0
    """Steps between its updates on the rule's outcomes of what was sampled since; 0 = it stays as it is."""
    lr: float = 1e-5
    """Learning rate of an update."""
    epochs: int = 1
    """Passes of an update over the new outcomes."""
    batch: int = 32
    """Lines of a gradient step: prompts with right and wrong completions (pairwise), else completions."""
    replay: float = 0.1
    """Share of older lines in a batch."""
    memory: int = 4096
    """Older lines that are kept, a fair sample of all there were."""

    def __post_init__(self):
        refuse_negative(self, "every", "replay")
        refuse_below_one(self, "epochs", "batch", "memory")
        refuse_not_positive(self, "lr")
        if not self.every and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise InputError("refresh.every = 0: the reward model stays as it is: leave the other refresh options away")
        if self.replay >= 1:
            raise InputError(f"refresh.replay = {self.replay}: it must be below 1, or nothing new is learned")


def agreement(scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> dict[str, float]:
    """Of N completions (label 1 is right, NaN unknown): ranking accuracy of the scores among those of one group,
    correlation with the labels, mean and deviation; NaN where labels or scores do not differ."""
    known = ~(scores.isnan() | labels.isnan())
    scores, labels, groups = scores[known].double(), (labels[known] == 1).double(), groups[known]
    if not len(scores):
        return dict.fromkeys(("accuracy", "corr", "mean", "std"), math.nan)
    found = label_metrics(scores, labels, groups, logits=False)
    centred = scores - scores.mean(), labels - labels.mean()
    corr = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    spread = {"mean": scores.mean().item(), "std": scores.std(correction=0).item()}
    return {"accuracy": found["accuracy"], "corr": corr.item(), **spread}


class OnlineReward:
    """A reward model of a run and what it is to learn from next."""

    def __init__(self, name: str, weight: float, reward: RewardModel, config: Refresh, seed: int):
        self.name, self.weight, self.reward, self.config, self.seed = name, weight, reward, config, seed
        self.new: list[Line] = []  # since the last refresh
        self.old: list[Line] = []  # a fair sample of those before it
        self.seen, self.rounds, self.trusted = 0, 0, True
        self.owed = 0.0  # older lines that are due, less than one
        self.fresh: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # scores, labels, groups since then
        self.optimizer = None
        if config.every:
            kind = reward.model.head.kind
            if kind not in ("pairwise", "pointwise", "bce"):
                raise InputError(f"{name} is of kind {kind!r}: a rule's labels can refresh pairwise, pointwise or bce")
            self.training = RewardConfig("", "", kind=kind, micro_batch_tokens=reward.budget)
            reward.model.requires_grad_(True)
            self.optimizer = AdamW(reward.model, betas=(0.9, 0.95))

    # --- each step --------------------------------------------------------------------------------------------------

    def watch(self, rollout: Rollout, labels: Sequence[float]) -> None:
        """Take note of a rollout that was scored, and put the rule's label in the place of a score that is not to be
        believed."""
        scores, truth = torch.tensor(rollout.parts[self.name], dtype=torch.float64), torch.tensor(labels)
        if self.config.every:
            self.fresh.append((scores, truth, rollout.group_ids))
            self.new += self._lines(rollout, labels)
        if not self.trusted:
            rollout.rewards += self.weight * ((truth == 1).double().masked_fill(truth.isnan(), math.nan) - scores)

    def _measure(self) -> dict[str, float]:
        """Agreement with the rule over all steps since the last refresh."""
        scores, labels, groups = zip(*self.fresh, strict=True)
        offsets = np.cumsum([0, *(len(g) for g in groups)])  # no two groups of different steps are one
        apart = torch.cat([g + int(offset) for g, offset in zip(groups, offsets, strict=False)])
        labels = torch.cat(labels)
        right = (labels[~labels.isnan()] == 1).double().mean().item()
        return agreement(torch.cat(scores), labels, apart) | {"right": right}

    def _lines(self, rollout: Rollout, labels: Sequence[float]) -> list[Line]:
        """The lines of the groups: one with all pairs of right and wrong, or a line a completion."""
        lines = []
        for group in range(len(rollout.prompts)):
            rows = range(group * rollout.group_size, (group + 1) * rollout.group_size)
            known = [i for i in rows if not math.isnan(labels[i])]
            found = {tuple(rollout.completions[i].tokens): float(labels[i] == 1) for i in known}
            responses, truth = tuple(found), list(found.values())
            example = rollout.examples[group]
            prompt = self.reward.tokenizer.prompt_ids(example["prompt"], example.get("tools"))  # as it was scored
            if self.reward.model.head.kind == "pairwise":
                pairs = tuple(weighted_pairs(truth))
                if pairs:
                    tree = Tree(tuple(prompt), responses, ((LAST,),) * len(responses))
                    lines.append(Line(tree, tuple(pair[2] for pair in pairs), pairs))
            else:
                trees = [Tree(tuple(prompt), (response,), ((LAST,),)) for response in responses]
                lines += [Line(tree, (1.0,), labels=(y,)) for tree, y in zip(trees, truth, strict=True)]
        return lines

    # --- every N steps ----------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[dict[str, float], str]:
        """Train on the new lines; returns metrics and a sentence if the model is not to be believed for now. Where
        there was nothing to compare it is believed as before."""
        found = self._measure()
        alarms = [
            sentence
            for bad, sentence in (
                (found["accuracy"] < LEAST_ACCURACY, f"ranks only {found['accuracy']:.2f} of fresh pairs right"),
                (found["corr"] < LEAST_CORRELATION, f"correlates {found['corr']:.2f} with the rule"),
                (abs(found["mean"]) > MOST_MEAN, f"gives {found['mean']:.1f} on average"),
                (found["right"] == 0, "was shown nothing that is right"),
            )
            if bad
        ]
        if alarms or not math.isnan(found["accuracy"] + found["corr"]):
            self.trusted = not alarms
        metrics = {f"refresh/{name}": value for name, value in found.items()}
        metrics |= {"refresh/lines": len(self.new), "refresh/alarm": float(bool(alarms))}
        if self.new:
            before = self._level()
            losses = [self._update(lines) for lines in self._batches()]
            # Only differences are learned from pairs: a jump of the level would mislead a critic.
            if self.reward.model.head.kind == "pairwise":
                head = self.reward.model.head
                self.reward.model.head = replace(head, bias=head.bias + self._level() - before)
            metrics["refresh/loss"] = float(np.mean(losses))
        self._remember()
        self.rounds += 1
        said = f"the reward model {' and '.join(alarms)}: until the next refresh the rule's label stands for it"
        return metrics, said if alarms else ""

    def _level(self) -> float:
        trees = [line.tree for line in self.new]
        return read_all(self.reward.model, trees, self.reward.budget).double().mean().item()

    def _batches(self) -> list[list[Line]]:
        """The new lines in a seeded order, and older ones so that they are the share `replay` of all that is learned:
        what a batch cannot take by halves is owed to the next."""
        c, rng = self.config, np.random.default_rng([self.seed, 2, self.rounds])
        fresh = max(1, round(c.batch * (1 - c.replay))) if self.old else c.batch
        batches = []
        for _ in range(c.epochs):
            shuffled = rng.permutation(len(self.new))
            for start in range(0, len(shuffled), fresh):
                part = [self.new[i] for i in shuffled[start : start + fresh]]
                self.owed += len(part) * c.replay / (1 - c.replay) if self.old else 0.0
                older = min(len(self.old), int(self.owed))
                self.owed -= older
                batches.append(part + [self.old[i] for i in rng.choice(len(self.old), older, replace=False)])
        return batches

    def _update(self, lines: list[Line]) -> float:
        if self.reward.model.head.kind != "pairwise":
            lines = balanced(lines)
        loss, _ = accumulate(self.reward.model, lines, self.training)
        self.optimizer.step(self.config.lr, self.training.clip_norm)
        return loss

    def _remember(self) -> None:
        """The new lines become old ones; of too many a fair sample is kept (reservoir, Vitter 1985, algorithm R)."""
        rng = np.random.default_rng([self.seed, 3, self.rounds])
        for line in self.new:
            self.seen += 1
            if len(self.old) < self.config.memory:
                self.old.append(line)
            elif (place := int(rng.integers(self.seen))) < self.config.memory:
                self.old[place] = line
        self.new, self.fresh = [], []

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """The model, its optimizer and its data into a folder of a checkpoint."""
        folder.mkdir()
        self.reward.model.save_pretrained(folder)
        self.reward.tokenizer.save_pretrained(folder)
        save_file(self.optimizer.state_dict(), folder / "optimizer.safetensors")
        state = {name: getattr(self, name) for name in ("seen", "rounds", "trusted", "owed")}
        state |= {"new": [asdict(line) for line in self.new], "old": [asdict(line) for line in self.old]}
        state["fresh"] = [[x.tolist() for x in part] for part in self.fresh]
        (folder / "outcomes.json").write_text(json.dumps(state))

    def restore(self, run: Run, folder: str) -> None:
        """What `save` wrote, but for the model, which was loaded from there."""
        run.restore(self.optimizer, folder)
        state = json.loads((run.checkpoint / folder / "outcomes.json").read_text())
        self.seen, self.rounds = state["seen"], state["rounds"]
        self.trusted, self.owed = state["trusted"], state["owed"]
        self.new, self.old = ([_line(x) for x in state[name]] for name in ("new", "old"))
        self.fresh = [
            (torch.tensor(s, dtype=torch.float64), torch.tensor(y), torch.tensor(g)) for s, y, g in state["fresh"]
        ]


def _line(x: dict) -> Line:
    """A line from JSON, whose lists are tuples again."""

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    fields = {name: frozen(value) for name, value in x.items()}
    return Line(**fields | {"tree": Tree(**{name: frozen(value) for name, value in x["tree"].items()})})
