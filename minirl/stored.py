"""Offline data: completions that somebody sampled and scored before, in place of the sampler's.

    {"prompt", "completion", "reward"[, "completion_tokens"][, "logprobs", "temperature"][, "finish_reason"]}

`minirl outcomes` writes such lines (samples.jsonl). They go the way of fresh ones: advantages in the group of a prompt,
the same update. The ratio is taken to the policy at the start of the step, as always; what the sampler's own log-probs
say of the distance to the policy that drew is `mismatch` in the logs, and `--loss.importance` and `--loss.opsm-delta`
act on it where they are stored.
"""

import math
from collections.abc import Sequence

import torch

from minirl.batch import endless_epochs, epoch_order
from minirl.config import PolicyConfig
from minirl.errors import InputError
from minirl.examples import NO_PROMPT, refuse_unknown_tokens, share_prompt
from minirl.model import ModelConfig
from minirl.prompts import no_room
from minirl.rollout import Rollout
from minirl.run import Display, tracked
from minirl.sampler import Completion
from minirl.split import prompt_key
from minirl.tokenizer import Tokenizer
from minirl.trees import Row
from minirl.turns import Turns, encode_answer

REWARD = "stored"  # the name of the stored reward among the rewards


class Stored:
    """Stored completions by prompt, handed out as rollouts of config.prompts prompts x config.group completions."""

    def __init__(
        self,
        outcomes: Sequence[dict],
        tokenizer: Tokenizer,
        model: ModelConfig,
        config: PolicyConfig,
        display: Display,
    ):
        """Group `outcomes`, from `records.read_outcomes`, by prompt; leave out completions too long for the model."""
        self.config, self.groups, self.short, self.too_long = config, [], 0, 0
        self.logprobs, longest, group = "logprobs" in outcomes[0], model.max_positions, config.group
        if config.loss.importance != "none" and not self.logprobs:
            raise InputError(
                f"loss.importance = {config.loss.importance}: the lines of {config.data} have no 'logprobs' of "
                "the policy that sampled them: store them, or take none"
            )
        if self.logprobs and outcomes[0]["temperature"] != config.temperature:
            raise InputError(
                f"temperature = {config.temperature:g}: the logprobs in {config.data} are those at "
                f"{outcomes[0]['temperature']:g}; give that temperature, or take the logprobs out"
            )
        vocab = min(tokenizer.vocab_size, model.vocab_size)
        by_prompt: dict[str, list[dict]] = {}
        for line in outcomes:
            by_prompt.setdefault(prompt_key(line), []).append(line)
        for lines in tracked(display, "prompts", list(by_prompt.values())):
            found = [_turns(line, tokenizer) for line in lines]
            share_prompt(found)
            prompt = found[0].prompt
            if len(prompt) >= longest and config.overlong_prompts == "stop":
                raise no_room(len(prompt), longest, lines[0]["where"])
            found = [(line, _completion(line, turns, tokenizer)) for line, turns in zip(lines, found, strict=True)]
            for line, completion in found:
                refuse_unknown_tokens([Row(prompt, completion.tokens, where=line["where"])], vocab)
            fitting = [(line, c) for line, c in found if len(prompt) + len(c.tokens) <= longest]
            self.too_long += len(found) - len(fitting)
            if len(fitting) >= group:
                self.groups.append((prompt, fitting))
            else:
                self.short += 1
        if not self.groups:
            raise InputError(
                f"none of the {len(by_prompt)} stored prompts has {group} completions of at most {longest} tokens, "
                "prompt included: lower --group, or store more"
            )
        if config.prompts > len(self.groups):
            raise InputError(
                f"prompts = {config.prompts}: {config.data} has {len(self.groups)} prompts with {group} completions"
            )
        display.line(self.summary)
        if getattr(config, "advantage", "") == "correct_only":
            display.line(
                "correct_only: no rule judges stored completions; those with a reward above 0.5 count as right"
            )

    @property
    def summary(self) -> str:
        total = sum(len(lines) for _, lines in self.groups)
        line = f"{total} stored completions of {len(self.groups)} prompts"
        line += f"; prompts with fewer than {self.config.group}, left out: {self.short}" if self.short else ""
        return line + (f"; completions that are too long, left out: {self.too_long}" if self.too_long else "")

    @property
    def longest(self) -> int:
        """Return how many tokens a prompt with its completion has at most."""
        return max(len(prompt) + len(c.tokens) for prompt, lines in self.groups for _, c in lines)

    def first(self) -> tuple[list[int], list[int]]:
        """Return the first prompt and a completion of it."""
        prompt, lines = self.groups[0]
        return prompt, lines[0][1].tokens

    def draw(self, number: int, step=None) -> Rollout:
        """Return batch `number` of the endless sequence of epochs. Each epoch draws anew which completions stand for a
        prompt."""
        c, rows = self.config, []
        start = number * c.prompts
        for at, i in enumerate(endless_epochs(len(self.groups), c.seed, start, c.prompts), start):
            ids, lines = self.groups[i]
            chosen = epoch_order(len(lines), c.seed, 1 + at)[: c.group]
            rows.append((ids, [lines[j] for j in sorted(chosen)]))
        flat = [line for _, lines in rows for line in lines]
        rollout = Rollout(
            examples=[{name: lines[0][0].get(name) for name in ("prompt", "tools")} for _, lines in rows],
            prompts=[ids for ids, _ in rows],
            completions=[completion for _, completion in flat],
            texts=[line["completion"] for line, _ in flat],
        )
        values = [math.nan if line["reward"] is None else float(line["reward"]) for line, _ in flat]
        rollout.rewards, rollout.parts = torch.tensor(values, dtype=torch.float64), {REWARD: values}
        rollout.weights, rollout.verdicts, rollout.fresh = {REWARD: 1.0}, values, False
        return rollout


def _turns(line: dict, tokenizer: Tokenizer) -> Turns:
    """Return the prompt and the tokens as they were sampled where they are known, else those of a text that ended by
    itself or was cut."""
    where, ended = line["where"], line.get("finish_reason") != "length"
    turns = encode_answer(tokenizer, line, line["completion"], line.get("completion_tokens"), where, ended)
    if not turns.prompt:
        raise InputError(f"{where}: its prompt has no token: {NO_PROMPT}")
    if not turns.response:
        raise InputError(f"{where}: its completion has no token: leave the line away")
    return turns


def _completion(line: dict, turns: Turns, tokenizer: Tokenizer) -> Completion:
    """Make the completion of a line. Tokens that go on after its text were ended by a stop text, cut from the text."""
    tokens = turns.response
    stopped = tokens[-1] in tokenizer.stop_ids or tokenizer.shown(tokens) != line["completion"]
    return Completion(
        tokens, list(line.get("logprobs") or []), line.get("finish_reason") or ("stop" if stopped else "length")
    )
