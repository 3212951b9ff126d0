"""Offline data: completions that somebody sampled and scored before, in place of the sampler's.

    {"prompt", "completion", "reward"[, "completion_tokens"][, "logprobs", "temperature"][, "finish_reason"]}

`minirl outcomes` writes such lines (samples.jsonl). They go the way of fresh ones: advantages in the group of a prompt,
the same update. The ratio is taken to the policy at the start of the step, as always; what the sampler's own log-probs
say of the distance to the policy that drew is `mismatch` in the logs, and `--loss.importance` and `--loss.opsm-delta`
act on it where they are stored.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from minirl.errors import InputError
from minirl.files import is_number
from minirl.model import ModelConfig
from minirl.rollout import Rollout
from minirl.sampler import Completion
from minirl.tasks.split import prompt_key
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row
from minirl.train.config import PolicyConfig
from minirl.train.formats import demonstration, read_rows, text_answer
from minirl.train.prompts import no_room
from minirl.train.ranked import share_prompt
from minirl.train.run import Display, tracked
from minirl.train.sft import below, order, refuse_unknown_tokens, take
from minirl.turns import Turns

REWARD = "stored"  # the name of the stored reward among the rewards


def read_triples(path: str | Path) -> list[dict]:
    """The rows of a file; "where" says which row it was."""
    lines = read_rows(path, _triple)
    for line in lines:
        if ("logprobs" in line) != ("logprobs" in lines[0]):
            raise InputError(f"{line['where']}: some lines have 'logprobs' and some have none: give all or none")
        if line["temperature"] != lines[0]["temperature"]:
            raise InputError(f"{line['where']}: its 'temperature' is not that of the lines before: store them apart")
    return lines


def _triple(example: dict, where: str) -> dict:
    """The keys and types of a line."""
    record = text_answer(demonstration(example, where), where)
    if "reward" not in example or not (example["reward"] is None or is_number(example["reward"])):
        raise InputError(f"{where}: its 'reward' must be a finite number, or null where it has none")
    if "logprobs" in example:
        known, tokens = example["logprobs"], example.get("completion_tokens")
        lists = isinstance(known, list) and isinstance(tokens, list) and len(known) == len(tokens)
        if not lists or not all(is_number(x) and x <= 0 for x in known):
            raise InputError(f"{where}: its 'logprobs' must be a number up to 0 for each of its 'completion_tokens'")
    if example.get("finish_reason") not in (None, "stop", "length"):
        raise InputError(f"{where}: its 'finish_reason' must be stop or length, or left away")
    if not is_number(example.get("temperature", 1.0)):
        raise InputError(f"{where}: its 'temperature' must be a number: that of the 'logprobs'")
    return {"temperature": 1.0} | example | record


class Stored:
    """Stored completions by prompt, handed out as rollouts of config.prompts prompts x config.group completions."""

    def __init__(
        self,
        triples: Sequence[dict],
        tokenizer: Tokenizer,
        model: ModelConfig,
        config: PolicyConfig,
        display: Display,
    ):
        """`triples` from `read_triples`; a completion that the model's positions cannot hold is left out."""
        self.config, self.groups, self.short, self.too_long = config, [], 0, 0
        self.logprobs, longest, group = "logprobs" in triples[0], model.max_positions, config.group
        if config.loss.importance != "none" and not self.logprobs:
            raise InputError(
                f"loss.importance = {config.loss.importance}: the lines of {config.data} have no 'logprobs' of "
                "the policy that sampled them: store them, or take none"
            )
        if self.logprobs and triples[0]["temperature"] != config.temperature:
            raise InputError(
                f"temperature = {config.temperature:g}: the logprobs in {config.data} are those at "
                f"{triples[0]['temperature']:g}; give that temperature, or take the logprobs out"
            )
        vocab = min(tokenizer.vocab_size, model.vocab_size)
        by_prompt: dict[str, list[dict]] = {}
        for line in triples:
            by_prompt.setdefault(prompt_key(line), []).append(line)
        for lines in tracked(display, "prompts", list(by_prompt.values())):
            found = [_turns(line, tokenizer) for line in lines]
            share_prompt(found)
            prompt = found[0].prompt
            if len(prompt) >= longest and config.overlong_prompts == "stop":
                raise no_room(len(prompt), longest, lines[0]["where"])
            found = [(line, _completion(line, turns, tokenizer)) for line, turns in zip(lines, found, strict=True)]
            for line, completion in found:
                refuse_unknown_tokens([Row(prompt, completion.tokens, 0)], vocab, line["where"])
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

    def batch(self, number: int) -> Rollout:
        """Batch `number` of the endless sequence of epochs; which completions stand for a prompt is drawn anew in each
        of them."""
        c, rows = self.config, []
        start = number * c.prompts
        for at, i in enumerate(take(len(self.groups), c.seed, start, c.prompts), start):
            ids, lines = self.groups[i]
            chosen = order(len(lines), c.seed, 1 + at)[: c.group]
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
        return rollout


def _turns(line: dict, tokenizer: Tokenizer) -> Turns:
    """The prompt and the tokens as they were sampled where they are known, else those of a text that ended by itself or
    was cut."""
    where, ended = line["where"], line.get("finish_reason") != "length"
    turns = below(tokenizer, line, line["completion"], line.get("completion_tokens"), where, ended)
    if not turns.prompt:
        raise InputError(f"{where}: its prompt has no token: write something to answer")
    if not turns.response:
        raise InputError(f"{where}: its completion has no token: leave the line away")
    return turns


def _completion(line: dict, turns: Turns, tokenizer: Tokenizer) -> Completion:
    """Sampled tokens that go on after their text were ended by a stop text, which was cut from it."""
    tokens = turns.response
    stopped = tokens[-1] in tokenizer.stop_ids or tokenizer.shown(tokens) != line["completion"]
    return Completion(
        tokens, list(line.get("logprobs") or []), line.get("finish_reason") or ("stop" if stopped else "length")
    )
