"""Compare the answer of a completion with the reference: by number, by text, by format; and read it as a vote.

Each reward is a plain function `reward(prompts, completions, **columns) -> list[float | None]`; None means that the
completion cannot be scored (its reference answer is missing). A function with parameters returns such a reward.
"""

import json
import re
from collections.abc import Callable

from minirl.errors import InputError
from minirl.judge.numbers import answer_number, reference_number
from minirl.thoughts import after_thoughts

Reward = Callable[..., list[float | None]]
Vote = Callable[[str], str | None]  # a completion's answer in normal form, None if it cannot be read


def exact_match(prompts, completions, answer, **columns) -> list[float | None]:
    """Give 1 if the completion behind its thoughts is the answer, apart from white space around both; else 0. The case
    of true and false does not count: JSON and Python write them in different ways."""
    texts = [after_thoughts(completion).strip() for completion in completions]
    return [None if a is None else float(_spells(c, a)) for c, a in zip(texts, answer, strict=True)]


def _spells(text: str, answer: object) -> bool:
    return text.casefold() == json.dumps(answer) if isinstance(answer, bool) else text == str(answer).strip()


def last_number(prompts, completions, answer, **columns) -> list[float | None]:
    r"""Give 1 if the number that the completion answers with equals the answer as an exact fraction, else 0; None if
    the answer is no number.

    The number is the one in the only \boxed{}; without a box it is the last one behind the thoughts: see `numbers`.
    """
    golds = [None if a is None else reference_number(a) for a in answer]
    return [None if g is None else float(answer_number(c) == g) for c, g in zip(completions, golds, strict=True)]


def answer_match(prompts, completions, answer=None, **columns) -> list[float | None]:
    """Compare as `last_number` where the answer is a number, as `exact_match` where it is any other text; None where
    there is no answer."""
    if answer is None:
        return [None] * len(completions)
    by_number = last_number(prompts, completions, answer)
    by_text = exact_match(prompts, completions, answer)
    return [text if number is None else number for number, text in zip(by_number, by_text, strict=True)]


def format_match(regex: str) -> Reward:
    """Return a reward: 1 where the regular expression matches the whole completion (`.` also matches a newline), else
    0."""
    try:
        pattern = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise InputError(f"format_match: {regex!r} is not a regular expression ({error}): correct it.") from error

    def format_reward(prompts, completions, **columns) -> list[float]:
        return [float(pattern.fullmatch(completion) is not None) for completion in completions]

    return format_reward


_OTHER = r"(?:(?!</?think>|</?answer>).)*"  # text without any of the four tags, so that each occurs exactly once


# The chat templates of reasoning models write the opening <think> into the prompt.
think_answer_format = format_match(rf"\s*+(?:<think>)?{_OTHER}</think>\s*<answer>{_OTHER}</answer>\s*")


# --- answer blocks ----------------------------------------------------------------------------------------------------


def answer_block(completion: str) -> str | None:
    """Return the content of the only <answer>...</answer> behind the thinking; None if there is none, or several.

    Text outside of the block is no answer, also not after it. The opening <think> may be in the prompt. Thoughts may
    name the tags of an answer, but only where they end once: else it is open which block is the answer.
    """
    thoughts, _, text = completion.rpartition("</think>")
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    if "</think>" in thoughts and ("<answer>" in thoughts or "</answer>" in thoughts):
        return None
    before, _, rest = text.partition("<answer>")
    block, closed, _ = rest.partition("</answer>")
    thinking = (thoughts + before).count("<think>") > completion.count("</think>")
    return block if closed and not thinking else None


def in_block(rule: Reward) -> Reward:
    """Apply the rule to the answer blocks of completions; 0 where there is none."""

    def rule_in_block(prompts, completions, **columns) -> list[float | None]:
        blocks = [answer_block(completion) for completion in completions]
        values = rule(prompts=prompts, completions=["" if b is None else b for b in blocks], **columns)
        if not hasattr(values, "__len__") or len(values) != len(blocks):
            return values  # the caller says what is wrong with it
        # None and NaN stay: a row without a reference cannot be scored, whatever the completion looks like.
        return [0.0 if b is None and v is not None and v == v else v for b, v in zip(blocks, values, strict=True)]

    if hasattr(rule, "within"):
        rule_in_block.within = lambda timeout: in_block(rule.within(timeout))
    return rule_in_block


def vote_in_block(vote: Vote) -> Vote:
    """Read the vote from the answer block alone; None where there is none."""
    return lambda completion: None if (block := answer_block(completion)) is None else vote(block)


# --- votes ------------------------------------------------------------------------------------------------------------


def number_vote(completion: str) -> str | None:
    """Return the number that a completion answers with, in normal form: 7.0 and 07 are "7", 2/4 is "1/2"."""
    value = answer_number(completion)
    return None if value is None else str(value)


def text_vote(completion: str) -> str | None:
    """Return all that is behind the thoughts, without white space around it; None if that is nothing."""
    return after_thoughts(completion).strip() or None
