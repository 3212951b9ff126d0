"""Prompt styles: turn a task's text into a prompt, and say where in a completion its answer is.

plain: the text as it is, for models that continue one; chat: a user message; think: a user message that asks for
<think>...</think><answer>...</answer>. In style think a task's rule reads the answer block alone, and the format is a
small reward of its own.
"""

from minirl.errors import InputError, did_you_mean
from minirl.judge.answers import Vote, in_block, think_answer_format, vote_in_block
from minirl.rules import Reward
from minirl.task import Task

STYLES = ("plain", "chat", "think")
INSTRUCTION = (
    "First think between <think> and </think>, then give the final answer alone between <answer> and </answer>."
)
FORMAT_WEIGHT = 0.1  # small beside the 1 for being right, else the policy would learn the format alone


def check_style(task: str, style: str) -> None:
    """Raise an InputError for an unknown style."""
    if style not in STYLES:
        hint = did_you_mean(style, STYLES)
        raise InputError(f"{task}: style {style!r} is unknown{hint}: choose from {', '.join(STYLES)}.")


def in_style(style: str, prompt: str | list[dict]) -> str | list[dict]:
    """Return the prompt for a text. Chat messages stay as they are; in style think the last user message also gets the
    instruction."""
    check_style("prompt", style)
    if style == "plain" and isinstance(prompt, str):
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if style == "think":
        asked = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
        more, said = f"\n\n{INSTRUCTION}", asked["content"]
        asked["content"] = [*said, {"type": "text", "text": more}] if isinstance(said, list) else (said or "") + more
    return messages


def styled_task(
    style: str,
    name: str,
    train: list[dict],
    heldout: list[dict],
    correct: Reward,
    vote: Vote,
    form: Reward | None = None,
    notes: tuple[str, ...] = (),
) -> Task:
    """Make a task whose prompts are in the style already: `correct` weighs 1, `form` (its own format, if it has one)
    `FORMAT_WEIGHT`. In style think both the rule and the vote read the answer block, and the form is that of think."""
    if style == "think":
        correct, vote, form = in_block(correct), vote_in_block(vote), think_answer_format
    rewards = {"correct": (1.0, correct)} | ({"format": (FORMAT_WEIGHT, form)} if form else {})
    return Task(name, train, heldout, rewards, correct, vote, notes)
