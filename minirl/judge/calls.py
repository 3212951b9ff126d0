"""Compare tool calls: the calls in a completion, as JSON, with those that it should make.

Nothing is called or evaluated here; the calls are read by `json` alone.
"""

import json
import re
from typing import Any

from minirl.thoughts import after_thoughts

FENCE = re.compile(r"```[A-Za-z_]*\n")
OPENING, CLOSING = re.compile(r"\s*<tool_call>\s*"), re.compile(r"\s*</tool_call>\s*")


def _without_twice(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


JSON = json.JSONDecoder(object_pairs_hook=_without_twice, parse_constant=_refuse)


def function_call(prompts, completions, answer, **columns) -> list[float | None]:
    """Give 1 if the completion makes exactly the calls of the answer, in their order; else 0. None if the answer holds
    no call.

    A call is {"name": ..., "arguments": {...}}; the answer is one or a list of them, as JSON or as an object. A
    completion gives them in <tool_call> tags, one in each and nothing after the last, or it is as a whole one call, a
    list of calls, or a code fence with either. The order of keys does not count, and 7.0 is 7, but true is not 1.
    Keys that occur twice, NaN, and anything else in a call are wrong.
    """
    golds = [_as_calls(_parsed(gold) if isinstance(gold, str) else gold) for gold in answer]
    rows = zip(completions, golds, strict=True)
    return [None if gold is None else float(_same(read_calls(text), gold)) for text, gold in rows]


def read_calls(completion: str) -> list[dict] | None:
    """Return the calls of a completion behind its thoughts; None if it is not made of calls."""
    text = after_thoughts(completion).strip()
    fence = FENCE.match(text)
    whole = text[fence.end() : -3] if fence and text.endswith("\n```") else text
    calls = _as_calls(_parsed(whole))
    return calls or (_tagged(text, text.index("<tool_call>")) if "<tool_call>" in text else None)


def _tagged(text: str, start: int) -> list[dict] | None:
    """Return the calls in tags from `start` on, None if anything else follows; a tag in a call's JSON is text."""
    calls = []
    while start < len(text):
        opening = OPENING.match(text, start)
        if not opening:
            return None
        try:
            call, end = JSON.raw_decode(text, opening.end())
        except (ValueError, RecursionError):
            return None
        closing = CLOSING.match(text, end)
        if not closing or isinstance(call, list):
            return None
        calls.append(call)
        start = closing.end()
    return _as_calls(calls)


def _as_calls(value: Any) -> list[dict] | None:
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
    return calls or None


def _parsed(text: str) -> Any:
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def _same(a: Any, b: Any) -> bool:
    """Compare JSON values; true is not 1, unlike in Python."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
