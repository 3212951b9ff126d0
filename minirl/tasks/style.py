"""Prompt styles: how a task's text becomes a prompt, and where in a completion its answer stands.

plain: the text as it is, for models that continue one; chat: a user message; think: a user message that asks for
<think>...</think><answer>...</answer>. In style think a task's rule reads the answer block alone, and the format is a
small reward of its own.
"""

from collections.abc import Callable
from dataclasses import replace

from minirl.errors import InputError
from minirl.rewards.registry import did_you_mean
from minirl.rewards.rules import Reward, think_answer_format
from minirl.tasks.task import Task

STYLES = ("plain", "chat", "think")
INSTRUCTION = (
    "First think between <think> and </think>, then give the final answer alone between <answer> and </answer>."
)
FORMAT_WEIGHT = 0.1  # small beside the 1 for being right, else the policy would farm the format


def check_style(task: str, style: str) -> None:
    if style not in STYLES:
        hint = did_you_mean(style, STYLES)
        raise InputError(f"{task}: style {style!r} is unknown{hint}: choose from {', '.join(STYLES)}.")


def in_style(style: str, prompt: str | list[dict]) -> str | list[dict]:
    """The prompt for a text; chat messages stay what they are but for the instruction of think, which the last user
    message gets."""
    if style == "plain" and isinstance(prompt, str):
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if style == "think":
        asked = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
        more, said = f"\n\n{INSTRUCTION}", asked["content"]
        asked["content"] = [*said, {"type": "text", "text": more}] if isinstance(said, list) else (said or "") + more
    return messages


def with_style(task: Task, style: str) -> Task:
    """The task, whose prompts are in the style already, with the rewards and votes that the style asks for."""
    if style != "think":
        return task
    correct = of_block(task.correct)
    rewards = {"correct": (1.0, correct), "format": (FORMAT_WEIGHT, think_answer_format)}
    return replace(task, rewards=rewards, correct=correct, extract=_vote(task.extract))


def answer_block(completion: str) -> str | None:
    """What stands in the only <answer>...</answer> behind the thinking; None if there is none, or are several.

    Text outside of the block is no answer, also not after it. The opening <think> may stand in the prompt. Thoughts may
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


def of_block(rule: Reward) -> Reward:
    """The rule on the answer blocks of completions; 0 where there is none."""

    def of_answer_block(prompts, completions, **columns) -> list[float | None]:
        blocks = [answer_block(completion) for completion in completions]
        values = rule(prompts=prompts, completions=["" if b is None else b for b in blocks], **columns)
        if not hasattr(values, "__len__") or len(values) != len(blocks):
            return values  # whoever called says what is wrong with it
        return [0.0 if b is None and v is not None and v == v else v for b, v in zip(blocks, values, strict=True)]

    if hasattr(rule, "within"):
        of_answer_block.within = lambda timeout: of_block(rule.within(timeout))
    return of_answer_block


def _vote(extract: Callable[[str], str | None]) -> Callable[[str], str | None]:
    def extract_from_block(completion: str) -> str | None:
        block = answer_block(completion)
        return None if block is None else extract(block)

    return extract_from_block
