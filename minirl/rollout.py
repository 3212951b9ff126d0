"""One batch of experience: prompts, their completions, what they are worth. Filled front to back, then read by the
update."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from minirl.errors import InputError
from minirl.files import place_of
from minirl.rewards import Fault, guarded, score
from minirl.rewards.rules import is_repetitive, think_answer_format, too_short
from minirl.rewards.scoring import TIMEOUT
from minirl.rewards.thoughts import CLOSING, OPENING
from minirl.sampler import Completion, Sampler, SamplingParams
from minirl.tasks import Task
from minirl.tokenizer import Tokenizer

Steps = list[tuple[int, float]]  # (characters of the completion up to the end of a step, its reward)


@dataclass
class Rollout:
    """P prompts with G completions each; row i·G + j of the flat lists and tensors is completion j of prompt i. B =
    P·G."""

    examples: list[dict]  # P
    prompts: list[list[int]]  # P token lists
    completions: list[Completion]  # B
    texts: list[str]  # B, without stop tokens and stop texts
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [B]; NaN = could not be scored
    parts: dict[str, list[float]] = field(default_factory=dict)  # each reward function's unweighted values
    steps: dict[str, list[Steps | None]] = field(default_factory=dict)  # by reward; None = one number for the whole
    faults: list[Fault] = field(default_factory=list)  # of the rewards
    indices: list[int] = field(default_factory=list)  # P, of the examples in the data; for sentences
    stats: dict[str, float] = field(default_factory=dict)  # `metrics` of everything that was sampled for this
    idle: str = ""  # why it trains nothing
    batches: int = 1  # of prompts that were drawn for it
    advantages: torch.Tensor | None = None  # [B]; where they are those of tokens, their mean

    @classmethod
    def join(cls, parts: "Sequence[Rollout]") -> "Rollout":
        """Rollouts of one group size and with the same rewards, one after another."""

        def chain(name: str) -> list:
            return [x for part in parts for x in getattr(part, name)]

        joined = cls(*map(chain, ("examples", "prompts", "completions", "texts")))
        joined.rewards = torch.cat([part.rewards for part in parts])
        joined.parts = {name: [v for part in parts for v in part.parts[name]] for name in parts[0].parts}
        for name in {name for part in parts for name in part.steps}:
            joined.steps[name] = [s for part in parts for s in part.steps.get(name, [None] * len(part.completions))]
        start = 0
        for part in parts:
            joined.faults += [replace(fault, row=start + fault.row) for fault in part.faults]
            joined.indices += part.indices
            start += len(part.completions)
        return joined

    def select(self, groups: Sequence[int]) -> "Rollout":
        """Some of the groups; of `faults` nothing, those are for statistics."""
        rows = [g * self.group_size + j for g in groups for j in range(self.group_size)]

        def pick(values: list) -> list:
            return [values[row] for row in rows]

        examples, prompts = ([values[g] for g in groups] for values in (self.examples, self.prompts))
        parts, steps = ({name: pick(values) for name, values in x.items()} for x in (self.parts, self.steps))
        return Rollout(examples, prompts, pick(self.completions), pick(self.texts), self.rewards[rows], parts, steps)

    @property
    def group_size(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def group_ids(self) -> torch.Tensor:
        return torch.arange(len(self.prompts)).repeat_interleave(self.group_size)

    @property
    def answers(self) -> list[str]:
        """B texts as rules read them: where thoughts that the prompt opened never end, the text begins with their
        tag, so that nothing in it is an answer."""
        rows = zip(self.texts, self.completions, strict=True)
        return [OPENING + text if c.thinking and CLOSING not in text else text for text, c in rows]

    @property
    def lengths(self) -> list[int]:
        return [len(c.tokens) for c in self.completions]

    def columns(self) -> dict[str, list]:
        """The examples' columns but for the prompt, and the token ids; one entry a completion, as rewards take them."""
        names = [name for name in self.examples[0] if name != "prompt"]
        columns = {name: [e[name] for e in self.examples for _ in range(self.group_size)] for name in names}
        return columns | {"completion_ids": [c.tokens for c in self.completions]}

    @property
    def truncated(self) -> torch.Tensor:
        """bool [B]"""
        return torch.tensor([c.finish_reason == "length" for c in self.completions])

    def score(self, rewards: dict, timeout: float = TIMEOUT, steps: bool = False, on_bad: str = "stop") -> None:
        """`minirl.rewards.score` of all completions. `steps`: a reward may be one of steps, and counts as their sum."""
        prompts = [e["prompt"] for e in self.examples for _ in range(self.group_size)]
        indices = self.indices or range(len(self.prompts))
        known = [place_of(e, f"prompt {i}") for e, i in zip(self.examples, indices, strict=True)]
        places = [f"{place}, completion {j}" for place in known for j in range(self.group_size)]
        self.faults, self.steps, answers = [], {}, self.answers

        def in_steps(name: str, row: int, found: Steps) -> None:
            tag = len(answers[row]) - len(self.texts[row])
            steps = [(max(end - tag, 0), reward) for end, reward in found]
            self.steps.setdefault(name, [None] * len(self.completions))[row] = steps

        listen = in_steps if steps else None
        total, self.parts = score(
            rewards, prompts, answers, self.columns(), timeout, on_bad, self.faults.append, listen, places
        )
        self.rewards = torch.tensor(total, dtype=torch.float64)

    def step_rewards(self, rewards: dict, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted rewards of steps at the last token of each, and where steps end, [B, T] with T the longest.

        A reward of the whole completion is one of a step that ends with it; a reward of weight 0 has no steps.
        """
        values = torch.zeros(len(self.completions), max(self.lengths), dtype=torch.float64)
        ends = torch.zeros(values.shape, dtype=torch.bool)
        for name, weight in ((name, weight) for name, (weight, _) in rewards.items() if weight):
            steps = self.steps.get(name, [None] * len(self.completions))
            for i, (text, completion) in enumerate(zip(self.texts, self.completions, strict=True)):
                for end, value in [(len(text), self.parts[name][i])] if steps[i] is None else steps[i]:
                    at = _token_at(tokenizer, completion.tokens, text, end)
                    values[i, at] += weight * value
                    ends[i, at] = True
        return values, ends

    def fault_lines(self) -> dict[tuple[str, str], str]:
        """Of each reward the first fault of each kind, with how many there are of it."""
        lines = {}
        for fault in reversed(self.faults):
            lines[fault.reward, fault.kind] = fault.sentence
        counts = Counter((fault.reward, fault.kind) for fault in self.faults)
        total = len(self.completions)
        return {key: f"{line} ({counts[key]} of {total} completions)" for key, line in sorted(lines.items())}

    def faulty(self, kind: str) -> int:
        """How many completions have a fault of a kind."""
        return len({fault.row for fault in self.faults if fault.kind == kind})

    @property
    def unscored(self) -> str:
        """Why there is not one score; empty where there is."""
        if (late := self.faulty("late")) == len(self.completions):
            return f"all of {late} completions took a reward too long: {self.faults[0].sentence}"
        if not self.rewards.isnan().all():
            return ""
        empty = [name for name, values in self.parts.items() if all(math.isnan(v) for v in values)]
        which = f"reward {empty[0]!r} gave" if empty else "the rewards gave"
        why = self.faults[0].sentence if self.faulty("unusable") else "is the answer column filled?"
        return f"{which} none of {len(self.rewards)} completions a score (all None or NaN): {why}"

    def require_score(self) -> None:
        if self.unscored:
            raise InputError(self.unscored)

    def metrics(self) -> dict[str, float]:
        """What the rollout alone tells: rewards, lengths, loops and silence, groups with a signal."""
        scored = self.rewards[~self.rewards.isnan()]
        groups = self.rewards.view(-1, self.group_size)
        spread = torch.stack(
            [g[~g.isnan()].std(correction=0) if (~g.isnan()).any() else g.new_zeros(()) for g in groups]
        )
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        out = {
            "reward/mean": scored.mean().item() if len(scored) else math.nan,
            "reward/std": scored.std(correction=0).item() if len(scored) else math.nan,
            "reward/min": scored.min().item() if len(scored) else math.nan,
            "reward/max": scored.max().item() if len(scored) else math.nan,
            "reward/unscored_frac": 1 - len(scored) / len(self.rewards),
            "len/mean": lengths.mean().item(),
            "len/min": lengths.min().item(),
            "len/max": lengths.max().item(),
            "len/p95": float(np.quantile(self.lengths, 0.95)),
            "truncated_frac": self.truncated.double().mean().item(),
            "repetition_frac": sum(is_repetitive(c.tokens) for c in self.completions) / len(self.completions),
            "too_short_frac": sum(too_short([], self.texts)) / len(self.texts),
            "late_frac": self.faulty("late") / len(self.rewards),
            "unusable_frac": self.faulty("unusable") / len(self.rewards),
            "sampled_tokens": sum(self.lengths),
        }
        if self.group_size > 1:
            out |= {"reward/group_std_mean": spread.mean().item()}
            out |= {"group/signal_frac": (spread > 1e-8).double().mean().item()}
        for name, values in self.parts.items():
            known = [v for v in values if v == v]
            out[f"reward/{name}"] = sum(known) / len(known) if known else math.nan
        return out


def sample(
    sampler: Sampler,
    tokenizer: Tokenizer,
    examples: Sequence[dict],
    params: SamplingParams,
    progress: Callable[[int, int], None] | None = None,
    indices: Sequence[int] = (),
) -> Rollout:
    """Draw params.n completions for the prompt of each example. `indices` are the examples' in the data."""
    prompts = [tokenizer.prompt_ids(example["prompt"], example.get("tools")) for example in examples]
    groups = sampler.generate(prompts, params, progress)
    for example, prompt, group in zip(examples, prompts, groups, strict=True):
        thinking = _ends_in_thoughts(tokenizer, example["prompt"], prompt)
        for completion in group:
            completion.thinking = thinking
    completions = [completion for group in groups for completion in group]
    texts = [completion_text(tokenizer, c, params) for c in completions]
    return Rollout(list(examples), prompts, completions, texts, indices=list(indices))


def _ends_in_thoughts(tokenizer: Tokenizer, prompt: str | list[dict], ids: Sequence[int]) -> bool:
    """Whether a chat template, or an unfinished message of the assistant's, opens thoughts and does not end them."""
    words = prompt[-1].get("content") if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" else ""
    end = tokenizer.decode(ids[-16:], skip_special_tokens=False)  # long enough for a tag and white space
    return end.rstrip().endswith(OPENING) or OPENING in str(words).rpartition(CLOSING)[2]


def completion_text(tokenizer: Tokenizer, completion: Completion, params: SamplingParams) -> str:
    """What a reader, a reward and an evaluation see: neither the stop token nor a stop text, nor what its last token
    holds beyond it. All that belongs to the actions, so the tokens keep it. Special tokens that say something, as
    <think> may be one, are seen: see `Tokenizer.shown`."""
    tokens = completion.tokens
    if tokens and tokens[-1] in params.stop_ids:
        tokens = tokens[:-1]
    if not params.stop:
        return tokenizer.shown(tokens)
    whole = tokenizer.decode(tokens, skip_special_tokens=False)  # a stop text may be a token that is not shown
    at = min((at for stop in params.stop if (at := whole.find(stop)) >= 0), default=None)
    if at is None:
        return tokenizer.shown(tokens)
    text = whole[:at]
    for token in tokenizer.hidden.intersection(tokens):
        text = text.replace(tokenizer.decode([token], skip_special_tokens=False), "")
    return text


def _token_at(tokenizer: Tokenizer, tokens: Sequence[int], text: str, end: int) -> int:
    """Index of the token that completes the first `end` characters of the text, for all of it the last token. Texts are
    compared, not lengths: in the middle of a character there is one already, the replacement character."""
    if end >= len(text):
        return len(tokens) - 1
    return bisect_left(range(len(tokens) - 1), True, key=lambda t: tokenizer.shown(tokens[: t + 1])[:end] == text[:end])


def task_guarded(task: Task, weight: float) -> dict:
    """The guarded reward, in place of the task's own, with its rule and its format (of think and answer tags where it
    has none)."""
    _, form = task.rewards.get("format", (0.0, think_answer_format))
    parts = guarded(task.correct, form)
    return {name: (weight * of_part, function) for name, (of_part, function) in parts.items()}


def task_rewards(task: Task) -> dict:
    """The rewards of a task and, where it is not among them, its accuracy with weight 0, so that both are logged."""
    known = any(function is task.correct for _, function in task.rewards.values())
    return dict(task.rewards) if known else {**task.rewards, "correct": (0.0, task.correct)}
