"""Reward the steps of the embedded sums, `37+85=(12,12)122`: the working in brackets, then the answer."""

import re


def working(prompts, completions, **columns) -> list:
    """Give half a point at the closing bracket if both partial sums are right; nothing for an answer without them."""
    return [_steps(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def _steps(prompt: str, text: str) -> list[tuple[int, float]]:
    a, b = map(int, prompt.rstrip("=").split("+"))
    ones = a % 10 + b % 10
    wanted = f"({ones},{a // 10 + b // 10 + ones // 10})"
    bracket = re.match(r"\([^)]*\)", text)
    if not bracket or bracket.end() == len(text):
        return [(len(text), 0.0)]
    return [(bracket.end(), 0.5 * (bracket[0] == wanted)), (len(text), 0.0)]
