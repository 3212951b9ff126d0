"""Prompts are known before the first step: each is rendered and measured, so that none ends a run in its middle.

Only the lengths are kept: the tokens of a prompt are made anew whenever it is sampled. Measuring depends on nothing but
the data, the tokenizer and the model's positions, so a resumed run drops the prompts that it dropped before.
"""

from array import array
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from minirl.batch import endless_epochs
from minirl.errors import InputError, named
from minirl.examples import overlong_line
from minirl.files import place_of
from minirl.model import ModelConfig
from minirl.rollout import Rollout, sample
from minirl.run import Display, tracked
from minirl.task import Task
from minirl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Measured:
    """The examples that can be completed, and what was measured of their prompts."""

    examples: list[dict]
    lengths: np.ndarray  # int32, tokens of each example's prompt
    room: int  # positions of the model, for a prompt and its completion
    dropped: int

    def remarks(self, side: str, max_tokens: int) -> list[str]:
        """List sentences about what was dropped, and about completions that end before `max_tokens`."""
        count, lines = len(self.examples), []
        if self.dropped:
            lines.append(overlong_line(self.dropped, count + self.dropped, side))
        left = self.room - self.lengths
        if short := int((left < max_tokens).sum()):
            which = f"{short} of {count} {side} prompts leave room for fewer than max_tokens = {max_tokens}"
            lines.append(f"{which}: a completion of theirs is cut after {left.min()} tokens at the earliest")
        return lines


class Prompts:
    """The training prompts of a task, from which a step draws: the source of grpo and ppo that samples."""

    def __init__(self, task: Task, policy, config, display: Display):
        if not task.train:
            raise InputError(f"task {config.task!r} has no training examples: ask for some")
        self.task, self.policy, self.config, self.display = task, policy, config, display
        self.measured = measure(task, "train", policy.tokenizer, policy.model.config, config, display)
        if config.prompts > len(self.measured.examples):
            count = f"prompts = {config.prompts}: there are only {len(self.measured.examples)} training prompts"
            display.line(f"{count}, so a step samples some of them more than once")
        self.params = replace(config.sampling, stop_ids=policy.tokenizer.stop_ids)

    @property
    def longest_completions(self) -> np.ndarray:
        """Return how many tokens a completion of each training prompt may have, [N]."""
        return np.minimum(self.config.max_tokens, self.measured.room - self.measured.lengths)

    @property
    def longest(self) -> int:
        """Return how many tokens a prompt with its completion may have."""
        return int((self.measured.lengths + self.longest_completions).max())

    def first(self) -> tuple[list[int], int]:
        """Return the first prompt, and how many tokens of a completion may be sampled."""
        return rendered(self.measured.examples[0], self.policy.tokenizer, "the first prompt"), self.config.max_tokens

    def refuse_short_reader(self, name: str, reward) -> None:
        """Refuse a reward model that cannot read each prompt, as its own template writes it, with the longest
        completion that the policy's context leaves room for."""
        limit, examples = reward.model.config.max_positions, self.measured.examples
        lengths = lengths_to_read(self.measured, name, self.task, reward.tokenizer, reward.model.config, self.display)
        whole = lengths + self.longest_completions
        worst = int(whole.argmax())
        if whole[worst] > limit:
            place = training_place(examples[worst], worst, self.task)
            raise InputError(
                f"{place}: reward {name!r} was made for {limit} tokens, and a prompt of {lengths[worst]} tokens with a "
                f"completion of max_tokens = {self.config.max_tokens} has more: lower --max-tokens, or take another "
                "model"
            )

    def draw(self, number: int, step) -> Rollout:
        """Sample batch `number` of the endless sequence of shuffled epochs: a function of the config, the weights and
        the number."""
        c, policy = self.config, self.policy
        chosen = endless_epochs(len(self.measured.examples), c.seed, number * c.prompts, c.prompts)
        params = replace(self.params, seed=(c.seed << 32) + number)
        examples = [self.measured.examples[i] for i in chosen]
        return sample(policy.sampler, policy.tokenizer, examples, params, step.progress("rollout"), chosen)


def measure(
    task: Task,
    side: Literal["train", "heldout"],
    tokenizer: Tokenizer,
    model: ModelConfig,
    config,
    display: Display,
    most: int | None = None,
) -> Measured:
    """Measure the prompts of one side of a task, up to the first `most` that can be completed, and say what a person
    should know of them.

    A prompt must leave room for one token at least; `config.overlong_prompts` "stop" names the first that does not,
    "drop" leaves them out. One that the chat template or the tokenizer refuses, that has no token, or that has one
    which the model does not know, is named in any case.
    """
    examples = getattr(task, side)
    name = f"{'held-out ' * (side == 'heldout')}prompt {{}} of task {task.name}"
    kept, lengths = [], array("i")
    total = min(most or len(examples), len(examples))
    for i, example in enumerate(examples):
        if len(kept) == total:
            break
        if i % 256 == 0:  # a bar costs as much as a short prompt
            display.progress("prompts", len(kept), total)
        place = place_of(example, name.format(i))
        length = _length(example, tokenizer, model, place)
        if length < model.max_positions:
            kept.append(example)
            lengths.append(length)
        elif config.overlong_prompts == "stop":
            raise no_room(length, model.max_positions, place)
    else:
        i = len(examples)
    display.progress("prompts", total, total)
    if examples and not kept:
        raise InputError(
            f"none of {len(examples)} prompts leaves room for a completion in a context of {model.max_positions} "
            f"tokens (the first: {place_of(examples[0], name.format(0))}): shorten them, or take another model"
        )
    found = np.frombuffer(lengths, dtype=np.int32) if kept else np.empty(0, np.int32)
    prompts = Measured(kept, found, model.max_positions, i - len(kept))
    for line in prompts.remarks("training" if side == "train" else "held-out", config.max_tokens):
        display.line(line)
    return prompts


def lengths_to_read(
    prompts: Measured, reward: str, task: Task, tokenizer: Tokenizer, model: ModelConfig, display: Display
) -> np.ndarray:
    """Measure the tokens [N] of the training prompts as a reward model's own tokenizer and template write them; an
    InputError names the reward and the place of one that it refuses."""
    with named(f"reward {reward!r}"):
        places = (training_place(example, i, task) for i, example in enumerate(prompts.examples))
        taken = zip(tracked(display, "prompts", prompts.examples), places, strict=True)
        return np.array([_length(example, tokenizer, model, place) for example, place in taken], dtype=np.int32)


def training_place(example: dict, i: int, task: Task) -> str:
    """Name the place of training prompt i for a sentence."""
    return place_of(example, f"prompt {i} of task {task.name}")


def no_room(length: int, limit: int, place: str) -> InputError:
    """Make the error for a prompt that leaves no room for a completion, where none shall be dropped."""
    return InputError(
        f"{place}: its prompt has {length} tokens and the context holds {limit}, so there is no room for a completion: "
        "shorten it, or give --overlong-prompts drop"
    )


def rendered(example: dict, tokenizer: Tokenizer, place: str) -> list[int]:
    """Return the token ids of an example's prompt; InputError with its place if it is empty or cannot be rendered."""
    with named(place):
        ids = tokenizer.prompt_ids(example["prompt"], example.get("tools"))
    if not ids:
        raise InputError(f"{place}: its prompt has no token: write something to answer")
    return ids


def _length(example: dict, tokenizer: Tokenizer, model: ModelConfig, place: str) -> int:
    """Count the tokens of a prompt; an InputError for one that cannot be sampled whatever its length."""
    ids = rendered(example, tokenizer, place)
    if max(ids) >= model.vocab_size:
        raise InputError(
            f"{place}: its prompt holds token {max(ids)}, outside the model's vocabulary of {model.vocab_size}: "
            "is this its tokenizer?"
        )
    return len(ids)
