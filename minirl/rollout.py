"""A rollout: prompts, their completions and rewards. It is filled front to back, then read by the update."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch

from minirl.errors import InputError, NonFinite
from minirl.sampler import Completion, Sampler, SamplingParams
from minirl.step import Step
from minirl.thoughts import CLOSING, OPENING
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
    faults: list = field(default_factory=list)  # of the rewards
    indices: list[int] = field(default_factory=list)  # P, of the examples in the data; for sentences
    weights: dict[str, float] = field(default_factory=dict)  # of each reward
    verdicts: list[float] = field(default_factory=list)  # B, by the task's rule: 1 is right; stored ones: their reward
    everything: "Rollout | None" = None  # that was sampled, where this is a part of it
    fresh: bool = True  # drawn from the policy of this step, not stored before
    idle: str = ""  # why it trains nothing
    batches: int = 1  # of prompts that were drawn for it

    @classmethod
    def join(cls, parts: "Sequence[Rollout]") -> "Rollout":
        """Join rollouts of one group size and with the same rewards, one after another."""

        def chain(name: str) -> list:
            return [x for part in parts for x in getattr(part, name)]

        joined = cls(*map(chain, ("examples", "prompts", "completions", "texts")))
        joined.rewards = torch.cat([part.rewards for part in parts])
        joined.parts = {name: [v for part in parts for v in part.parts[name]] for name in parts[0].parts}
        joined.verdicts, joined.weights, joined.fresh = chain("verdicts"), parts[0].weights, parts[0].fresh
        for name in {name for part in parts for name in part.steps}:
            joined.steps[name] = [s for part in parts for s in part.steps.get(name, [None] * len(part.completions))]
        start = 0
        for part in parts:
            joined.faults += [replace(fault, row=start + fault.row) for fault in part.faults]
            joined.indices += part.indices
            start += len(part.completions)
        return joined

    def select(self, groups: Sequence[int]) -> "Rollout":
        """Return some of the groups, without `faults`, which are for statistics."""
        rows = [g * self.group_size + j for g in groups for j in range(self.group_size)]

        def pick(values: list) -> list:
            return [values[row] for row in rows]

        examples, prompts = ([values[g] for g in groups] for values in (self.examples, self.prompts))
        parts, steps = ({name: pick(values) for name, values in x.items()} for x in (self.parts, self.steps))
        chosen = Rollout(examples, prompts, pick(self.completions), pick(self.texts), self.rewards[rows], parts, steps)
        chosen.verdicts, chosen.weights, chosen.fresh = pick(self.verdicts), self.weights, self.fresh
        chosen.everything = self
        return chosen

    @property
    def group_size(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def group_ids(self) -> torch.Tensor:
        return torch.arange(len(self.prompts)).repeat_interleave(self.group_size)

    @property
    def answers(self) -> list[str]:
        """Return B texts as rules read them: where thoughts that the prompt opened never end, the text begins with
        their tag, so that nothing in it is an answer."""
        rows = zip(self.texts, self.completions, strict=True)
        return [OPENING + text if c.thinking and CLOSING not in text else text for text, c in rows]

    @property
    def lengths(self) -> list[int]:
        return [len(c.tokens) for c in self.completions]

    def columns(self) -> dict[str, list]:
        """Return the examples' columns but for the prompt, and the token ids; one entry a completion, as rewards take
        them."""
        names = [name for name in self.examples[0] if name != "prompt"]
        columns = {name: [e[name] for e in self.examples for _ in range(self.group_size)] for name in names}
        return columns | {"completion_ids": [c.tokens for c in self.completions]}

    @property
    def truncated(self) -> torch.Tensor:
        """Tell which completions were cut, at max_tokens or where the context was full, bool [B]."""
        return torch.tensor([c.finish_reason == "length" for c in self.completions])

    def step_rewards(self, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weighted rewards of steps at the last token of each, and where steps end, [B, T] with T the longest.

        A reward of the whole completion is one of a step that ends with it; a reward of weight 0 has no steps.
        """
        values = torch.zeros(len(self.completions), max(self.lengths), dtype=torch.float64)
        ends = torch.zeros(values.shape, dtype=torch.bool)
        for name, weight in ((name, weight) for name, weight in self.weights.items() if weight):
            steps = self.steps.get(name, [None] * len(self.completions))
            for i, (text, completion) in enumerate(zip(self.texts, self.completions, strict=True)):
                for end, value in [(len(text), self.parts[name][i])] if steps[i] is None else steps[i]:
                    at = _token_at(tokenizer, completion.tokens, text, end)
                    # Added, as several rewards, or steps shorter than a token, may end at one token.
                    values[i, at] += weight * value
                    ends[i, at] = True
        return values, ends

    def fault_lines(self) -> dict[tuple[str, str], str]:
        """Return the first fault of each kind for each reward, with counts."""
        lines = {}
        # Backwards, so that of each kind the first one stays.
        for fault in reversed(self.faults):
            lines[fault.reward, fault.kind] = fault.sentence
        counts = Counter((fault.reward, fault.kind) for fault in self.faults)
        total = len(self.completions)
        return {key: f"{line} ({counts[key]} of {total} completions)" for key, line in sorted(lines.items())}

    def faulty(self, kind: str) -> int:
        """Count the completions that have a fault of a kind."""
        return len({fault.row for fault in self.faults if fault.kind == kind})

    @property
    def unscored(self) -> str:
        """Say why no completion has a score; empty where one has."""
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
        """Return what the rollout alone tells: rewards, lengths, loops and silence, groups with a signal; and where the
        task's verdicts are known, shares of groups that are all right and all wrong, and lengths of both."""
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
            "too_short_frac": sum(not text.split() for text in self.texts) / len(self.texts),
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
        if self.fresh:  # E[−log π]; of stored completions it would be that of another policy
            out["entropy"] = float(np.mean([-logp for c in self.completions for logp in c.logprobs]))
        return out | (self._verdict_metrics(lengths) if self.verdicts else {})

    def _verdict_metrics(self, lengths: torch.Tensor) -> dict[str, float]:
        """Return shares of groups that are all right and all wrong, and mean lengths of right and wrong completions.

        A mean of no completions is NaN. A verdict that is NaN is neither right nor wrong.
        """
        labels = torch.tensor(self.verdicts, dtype=torch.float64)
        groups, right = labels.view(-1, self.group_size), labels == 1
        wrong = ~right & ~labels.isnan()
        return {
            "group/all_correct_frac": (groups == 1).all(1).double().mean().item(),
            "group/all_wrong_frac": (groups < 1).all(1).double().mean().item(),
            "len/correct_mean": lengths[right].mean().item(),
            "len/wrong_mean": lengths[wrong].mean().item(),
        }


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
    """Tell whether a chat template, or an unfinished message of the assistant, opens thoughts and does not end them."""
    words = prompt[-1].get("content") if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" else ""
    end = tokenizer.decode(ids[-16:], skip_special_tokens=False)  # long enough for a tag and white space
    return end.rstrip().endswith(OPENING) or OPENING in str(words).rpartition(CLOSING)[2]


def completion_text(tokenizer: Tokenizer, completion: Completion, params: SamplingParams) -> str:
    """Return the text that a reader, a reward and an evaluation see.

    It has neither the stop token nor a stop text, nor what the last token holds beyond that. These belong to the
    actions, so the tokens keep them. Special tokens that say something (<think>) stay: see `Tokenizer.shown`."""
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
    """Return the index of the token that completes the first `end` characters of the text, for all of it the last
    token. Texts are compared, not lengths: in the middle of a character there is one already, the replacement
    character."""
    if end >= len(text):
        return len(tokens) - 1
    return bisect_left(range(len(tokens) - 1), True, key=lambda t: tokenizer.shown(tokens[: t + 1])[:end] == text[:end])


# ---- degenerate completions ------------------------------------------------------------------------------------------


def is_repetitive(tokens: Sequence[Hashable]) -> bool:
    """Return whether any of three holds: more than half of the 3-grams repeat earlier ones; a 20-gram occurs more than
    3 times (overlaps not counted); a token occurs more than 50 times in a row. The time is linear in the tokens."""
    trigrams = ngrams_of(tokens, 3)
    repeated = len(trigrams) - len(set(trigrams))
    if repeated < 48 and 2 * repeated <= len(trigrams):
        return False  # 51 equal tokens repeat 48 3-grams, four 20-grams 54: most texts need no closer look
    if 2 * repeated > len(trigrams) or any(sum(1 for _ in run) > 50 for _, run in groupby(tokens)):
        return True
    counts, ends = Counter(), {}
    for start, ngram in enumerate(ngrams_of(tokens, 20)):
        if start >= ends.get(ngram, 0):
            counts[ngram] += 1
            ends[ngram] = start + 20
    return any(count > 3 for count in counts.values())


def overlong_penalty(lengths, l_max: int, l_cache: int) -> np.ndarray:
    """Return DAPO's soft overlong punishment (2503.14476 eq. 13) for completions of n tokens: 0 for
    n ≤ l_max − l_cache; ((l_max − l_cache) − n) / l_cache up to l_max; −1 beyond.

    It is made to be added to a reward of ±1; beside one of 0 and 1, which has half of that range, weight it by a half.
    """
    if not 0 < l_cache <= l_max:
        raise InputError(f"overlong_penalty: l_cache must lie in 1..l_max, but l_cache={l_cache} and l_max={l_max}.")
    lengths = np.asarray(lengths, dtype=np.float64)
    return np.clip((l_max - l_cache - lengths) / l_cache, -1.0, 0.0)


def ngrams_of(tokens, n: int) -> list[tuple]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


# ---- the rollout of a step -------------------------------------------------------------------------------------------


def scored_batch(source, number: int, rewards, config, step: Step, in_steps: bool = False) -> Rollout:
    """Draw batch `number` of a source and reward it: a function of the config, the weights and the number.

    Stored completions bring their rewards. What is too long, or cut, pays for it here.
    """
    try:
        rollout = source.draw(number, step)
    except NonFinite as error:
        raise NonFinite(f"step {step.done}, batch {number + 1} of the prompts: {error}") from None
    if not rollout.parts:
        rewards.score(rollout, config, step, in_steps)
    if config.overlong_cache:
        penalty = torch.from_numpy(overlong_penalty(rollout.lengths, config.max_tokens, config.overlong_cache))
        rollout.rewards += config.overlong_penalty * rewards.pay * penalty
    if config.truncation == "penalty":
        rollout.rewards -= config.truncation_penalty * rewards.pay * rollout.truncated
    return rollout


def finish_rollout(rollout: Rollout, rewards, step: Step) -> Rollout:
    """Log statistics of everything that was sampled, and say why the rollout trains nothing where it does not.

    That is an error in the first step; later it may be a passing failure, which must not cost the run.
    """
    sampled = rollout.everything or rollout
    step.add(**sampled.metrics(), **rewards.agreement(sampled))
    if step.number == 0:
        rollout.require_score()
    rollout.idle = rollout.unscored or rollout.idle
    if rollout.idle:
        step.say(f"trains nothing: {rollout.idle}")
    return rollout


def counted(rollout: Rollout, config) -> torch.Tensor:
    """Tell which completions are in the loss, bool [B]: in its denominators and in statistics of the batch.

    One without a score is not: neither KL nor entropy nor value learns from it, in GRPO as in PPO. Nor is one that
    truncation=mask takes out.
    """
    # NaN tells nothing about a completion; as a 0 it would teach what a wrong answer teaches.
    scored = ~rollout.rewards.isnan()
    # A cut completion may have been on its way to the right answer (overlong filtering, 2503.14476 §3.4).
    return scored & ~rollout.truncated if config.truncation == "mask" else scored
