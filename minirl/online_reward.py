"""A reward model in the loop: how far it agrees with the rule on what the policy samples now, and, if asked for, its
refresh on the rule's outcomes every N steps (DeepSeekMath 2402.03300, Alg. 1, lines 10 and 11).

    for each step:   sample -> r = model(x, y) -> the rule's label -> policy update on r
    every N steps:   train the model on what was sampled since, with a share of older data, then carry on

A completion is scored before its label is seen, so agreement is always that with data which the model has not learned.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from minirl.config import Refresh
from minirl.errors import InputError
from minirl.examples import Line, balanced
from minirl.optimizer import AdamW
from minirl.policy import OPTIMIZER, restore_optimizer
from minirl.preferences import ranked_pairs
from minirl.reward_losses import label_metrics
from minirl.reward_model import RewardModel, read_all
from minirl.reward_training import RewardConfig, add_reward_gradient, rows_of
from minirl.rollout import Rollout
from minirl.run import Run
from minirl.step import Step
from minirl.trees import Row

STATE = ("seen", "rounds", "trusted", "owed", "refreshed", "losses", "level")  # numbers that a checkpoint holds
LEAST_ACCURACY, LEAST_CORRELATION, MOST_MEAN = 0.6, 0.2, 10.0  # beyond these the model is not believed


def agreement(scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> dict[str, float]:
    """Compare N completions (label 1 is right, NaN unknown): ranking accuracy of the scores among those of one group,
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
    """A reward model in a run: a reward function that is compared with the task's rule, and may learn on from it."""

    FOLDER = "reward_model"  # in a checkpoint and at the end of a run

    def __init__(self, name: str, weight: float, path: str | Path, config: Refresh, seed: int):
        """Keep the options; `path` is the folder of the trained model, which `beside` loads."""
        self.name, self.weight, self.path, self.config, self.seed = name, weight, path, config, seed
        self.new: list[Line] = []  # since the last refresh
        self.old: list[Line] = []  # a fair sample of those before it
        self.seen, self.rounds, self.trusted = 0, 0, True
        self.refreshed = 0  # after so many steps
        self.losses: list[float] = []  # of the updates of a refresh that is under way
        self.level: float | None = None  # the mean score of the new lines before it
        self.owed = 0.0  # older lines that are due, less than one
        self.fresh: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # scores, labels, groups since then
        self.optimizer = None

    def __call__(self, prompts, completions, **columns) -> list[float]:
        return self.reward(prompts, completions, **columns)

    def beside(self, policy, source, run: Run) -> None:
        """Load the model, or that of the run's checkpoint where it learns on; refuse one that cannot read what the
        policy may write."""
        learned = run.checkpoint / self.FOLDER if run.checkpoint and self.config.every else None
        self.reward = RewardModel.from_pretrained(learned or self.path)
        self.reward.model.to(policy.model.device)
        for of_prompts in ("template_variables", "system"):  # it reads the conversation that the policy answered
            setattr(self.reward.tokenizer, of_prompts, getattr(policy.tokenizer, of_prompts))
        run.keep_date(self.reward.tokenizer)  # also where the policy's template reads none
        source.refuse_short_reader(self.name, self.reward)
        if self.config.every:
            kind = self.reward.model.head.kind
            if kind not in ("pairwise", "pointwise", "bce"):
                raise InputError(
                    f"{self.name} is of kind {kind!r}: a rule's labels can refresh pairwise, pointwise or bce"
                )
            self.training = RewardConfig(model="", data="", kind=kind, micro_batch_tokens=self.reward.budget)
            self.reward.model.requires_grad_(True)
            self.optimizer = AdamW(self.reward.model, betas=(0.9, 0.95))

    # --- each step --------------------------------------------------------------------------------------------------

    def agreement(self, rollout: Rollout) -> dict[str, float]:
        """Measure how far it agrees with the rule on a rollout."""
        labels = torch.tensor(rollout.verdicts, dtype=torch.float64)
        return agreement(torch.tensor(rollout.parts[self.name]), labels, rollout.group_ids)

    def _scores(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(rollout.parts[self.name], dtype=torch.float64), torch.tensor(rollout.verdicts)

    def correct_distrusted(self, rollout: Rollout) -> None:
        """Put the rule's label in the place of a score that is not to be believed."""
        if not self.trusted:
            scores, truth = self._scores(rollout)
            rollout.rewards += self.weight * ((truth == 1).double().masked_fill(truth.isnan(), math.nan) - scores)

    def watch(self, rollout: Rollout) -> None:
        """Take note of a rollout that was scored."""
        if self.config.every:
            lines = self._lines(rollout, rollout.verdicts)  # may fail: then no note is taken
            self.fresh.append((*self._scores(rollout), rollout.group_ids))
            self.new += lines

    def read_at_a_time(self, tokens: int) -> None:
        """Set the tokens of a forward, as memory ran out."""
        self.reward.budget = max(1, tokens)
        if self.optimizer is not None:
            self.training = replace(self.training, micro_batch_tokens=self.reward.budget)
            self.optimizer.zero_grad()

    def _measure(self) -> dict[str, float]:
        """Measure the agreement with the rule over all steps since the last refresh."""
        scores, labels, groups = zip(*self.fresh, strict=True)
        offsets = np.cumsum([0, *(len(g) for g in groups)])  # no two groups of different steps are one
        apart = torch.cat([g + int(offset) for g, offset in zip(groups, offsets, strict=False)])
        labels = torch.cat(labels)
        right = (labels[~labels.isnan()] == 1).double().mean().item()
        return agreement(torch.cat(scores), labels, apart) | {"right": right}

    def _lines(self, rollout: Rollout, labels: Sequence[float]) -> list[Line]:
        """Make the lines of the groups: one with all pairs of right and wrong, or a line a completion."""
        lines = []
        for group in range(len(rollout.prompts)):
            rows = range(group * rollout.group_size, (group + 1) * rollout.group_size)
            known = [i for i in rows if not math.isnan(labels[i])]
            found = {tuple(rollout.completions[i].tokens): float(labels[i] == 1) for i in known}
            example = rollout.examples[group]
            prompt = self.reward.tokenizer.prompt_ids(example["prompt"], example.get("tools"))  # as it was scored
            responses, truth = [Row(tuple(prompt), response) for response in found], list(found.values())
            if self.reward.model.head.kind != "pairwise":
                lines += [Line([row], labels=(y,), weights=(1.0,)) for row, y in zip(responses, truth, strict=True)]
            elif pairs := ranked_pairs(truth):
                lines.append(Line(responses, pairs))
        return lines

    # --- every N steps ----------------------------------------------------------------------------------------------

    def refresh_if_due(self, step: Step) -> None:
        """Train every N steps, and say if the model is not to be believed for now."""
        if step.due(self.config.every) and self.refreshed < step.done:
            metrics, alarm = self.refresh()
            self.refreshed = step.done  # the end of a step that was cut is done again
            step.add(**metrics)
            if alarm:
                step.run.display.line(f"step {step.done}: {alarm}")

    def refresh(self) -> tuple[dict[str, float], str]:
        """Train on the new lines; returns metrics and a sentence if the model is not to be believed for now. Where
        there was nothing to compare it is believed as before. One that an error has cut goes on after its last
        update."""
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
            batches, owed = self._batches()
            self.level = self._level() if self.level is None else self.level
            for lines in batches[len(self.losses) :]:
                self.losses.append(self._update(lines))
            # Only differences are learned from pairs: a jump of the level would mislead a critic.
            if self.reward.model.head.kind == "pairwise":
                head = self.reward.model.head
                self.reward.model.head = replace(head, bias=head.bias + self._level() - self.level)
            metrics["refresh/loss"] = float(np.mean(self.losses))
            self.owed, self.losses, self.level = owed, [], None
        self._remember()
        self.rounds += 1
        said = f"the reward model {' and '.join(alarms)}: until the next refresh the rule's label stands for it"
        return metrics, said if alarms else ""

    def _level(self) -> float:
        return read_all(self.reward.model, rows_of(self.new), self.reward.budget).double().mean().item()

    def _batches(self) -> tuple[list[list[Line]], float]:
        """Mix the new lines in a seeded order with older ones so that they are the share `replay` of all that is
        learned: what a batch cannot take by halves is owed to the next, and what the last cannot is returned."""
        c, rng = self.config, np.random.default_rng([self.seed, 2, self.rounds])
        fresh = max(1, round(c.batch * (1 - c.replay))) if self.old else c.batch
        batches, owed = [], self.owed
        for _ in range(c.epochs):
            shuffled = rng.permutation(len(self.new))
            for start in range(0, len(shuffled), fresh):
                part = [self.new[i] for i in shuffled[start : start + fresh]]
                owed += len(part) * c.replay / (1 - c.replay) if self.old else 0.0
                older = min(len(self.old), int(owed))
                owed -= older
                batches.append(part + [self.old[i] for i in rng.choice(len(self.old), older, replace=False)])
        return batches, owed

    def _update(self, lines: list[Line]) -> float:
        if self.reward.model.head.kind != "pairwise":
            lines = balanced(lines)
        loss, _ = add_reward_gradient(self.reward.model, lines, self.training)
        self.optimizer.step(self.config.lr, self.training.clip_norm)
        return loss

    def _remember(self) -> None:
        """Make the new lines old ones; of too many a fair sample is kept (reservoir, Vitter 1985, algorithm R)."""
        rng = np.random.default_rng([self.seed, 3, self.rounds])
        for line in self.new:
            self.seen += 1
            if len(self.old) < self.config.memory:
                self.old.append(line)
            elif (place := int(rng.integers(self.seen))) < self.config.memory:
                self.old[place] = line
        self.new, self.fresh = [], []

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[torch.nn.Module]:
        """Return the model that a checkpoint holds; one that does not learn is not saved."""
        return [self.reward.model] if self.config.every else []

    def save(self, folder: Path) -> None:
        """Write the model, its optimizer and its data into a folder of a checkpoint, where it learns."""
        if not self.config.every:
            return
        folder = folder / self.FOLDER
        folder.mkdir()
        self.reward.model.save_pretrained(folder)
        self.reward.tokenizer.save_pretrained(folder)
        save_file(self.optimizer.state_dict(), folder / OPTIMIZER)
        state = {name: getattr(self, name) for name in STATE}
        state |= {"new": [asdict(line) for line in self.new], "old": [asdict(line) for line in self.old]}
        state["fresh"] = [[x.tolist() for x in part] for part in self.fresh]
        (folder / "outcomes.json").write_text(json.dumps(state))

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote, but for the model, which was loaded from there."""
        if not self.config.every:
            return
        restore_optimizer(self.optimizer, folder / self.FOLDER)
        file = folder / self.FOLDER / "outcomes.json"
        state = json.loads(file.read_text())
        if any("rows" not in line for line in state["new"] + state["old"]):
            raise InputError(f"{file} is of an earlier version: resume the run with that one, or begin a new one")
        for name in STATE:
            setattr(self, name, state[name])
        self.new, self.old = ([_line(x) for x in state[name]] for name in ("new", "old"))
        self.fresh = [
            (torch.tensor(s, dtype=torch.float64), torch.tensor(y), torch.tensor(g)) for s, y, g in state["fresh"]
        ]

    def finish(self, run: Run) -> None:
        """Write the model that has learned."""
        if self.config.every:
            run.finish(self.reward.model, self.reward.tokenizer, self.FOLDER)


def _line(x: dict) -> Line:
    """Make a line of what JSON holds of it."""

    def row(y: dict) -> Row:
        return Row(**y | {name: tuple(y[name]) for name in ("prompt", "response", "places")})  # equal rows have one key

    return Line(**x | {"rows": [row(y) for y in x["rows"]]})
