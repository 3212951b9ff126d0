"""Tokens of the assistant's turns in a conversation, as the chat template writes them.

The model is asked with the conversation so far and the template's opening of a turn, and has to answer with the rest
of the turn up to the token that ends it. Both are tokenized apart, as they are when a model samples.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from minirl.errors import InputError, named
from minirl.thoughts import OPENING
from minirl.tokenizer import Tokenizer
from minirl.trees import LAST

OPENING_TAG = re.compile(r"\s*(<[^<>\s]+>|\[THINK\])\s*")
# Ends of a generation prompt that a turn may not have: empty thoughts, the tag that opens some, white space.
ENDINGS = [re.compile(ending) for ending in (r"<think>\s*</think>\s*$", r"(<[^<>\s]+>|\[THINK\])\s*$", r"\s+$")]

BROKEN = 16  # tokens that may end in half a character; more are bytes that will never be one


@dataclass
class Turns:
    """A prompt and what follows it, with the assistant's tokens counted and all others not."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)  # one for each token of the response

    def add(self, tokens: Sequence[int], counted: bool) -> None:
        self.response += tokens
        self.counted += [counted] * len(tokens)


def conversation(tokenizer: Tokenizer, messages: Sequence[dict], turns: Sequence[int], tools=None) -> list[Turns]:
    """Encode all `turns` (indices of messages) in one piece where the prompt of each turn begins with the pieces before
    it; else, for templates that write earlier turns in another way (without their thoughts), in as many as it takes."""
    messages, pieces = [_unended(tokenizer, message) for message in messages], []
    encoder = Growing(tokenizer)
    for i in turns:
        prompt, response = turn(tokenizer, messages[: i + 1], tools, encoder)
        before = [*pieces[-1].prompt, *pieces[-1].response] if pieces else []
        if pieces and prompt[: len(before)] == before:
            pieces[-1].add(prompt[len(before) :], False)
        else:
            pieces.append(Turns(prompt))
        pieces[-1].add(response, True)
    return pieces


def answered(
    tokenizer: Tokenizer, prompt: str | Sequence[dict], text: str, tools: list[dict] | None = None, ended: bool = True
) -> Turns:
    """Encode a text below a prompt: below messages that ask for it the assistant's turn, as in `conversation`; else,
    and where it was cut before it `ended`, what goes on from the prompt."""
    if ended and not isinstance(prompt, str) and prompt[-1]["role"] != "assistant":
        return conversation(tokenizer, [*prompt, {"role": "assistant", "content": text}], [len(prompt)], tools)[0]
    tokens = tokenizer.prompt_ids(prompt, tools)
    response = continuation_ids(tokenizer, prompt, text, tools, ended)
    return Turns(tokens, response, [True] * len(response))


def continuation_ids(
    tokenizer: Tokenizer, prompt: str | Sequence[dict], text: str, tools: list[dict] | None = None, ended: bool = True
) -> list[int]:
    """Encode a text that goes on from `prompt_ids(prompt, tools)`, and if it `ended` the token that ends it, once:
    the text's own where it holds one already, else `stop_id`. Thoughts that the prompt opens are not opened again."""
    text, end = tokenizer.without_end(text)
    before = prompt if isinstance(prompt, str) else tokenizer.render(list(prompt), tools=tools)
    tokens = tokenizer.encode_behind(before, text if isinstance(prompt, str) else _behind(before, text))
    return [*tokens, tokenizer.stop_id if end is None else end] if ended else tokens


def encode_answer(
    tokenizer: Tokenizer, example: dict, text: str, tokens: Sequence[int] | None, where: str, ended: bool = True
) -> Turns:
    """Encode an example's prompt and a text below it: as `answered`, or with its sampled `tokens` where they are known,
    as another spelling is not what was sampled. InputError names the place `where`."""
    prompt, tools = example["prompt"], example.get("tools")
    with named(where):
        if tokens is None:
            return answered(tokenizer, prompt, text, tools, ended)
        piece = Turns(tokenizer.prompt_ids(prompt, tools))
    piece.add(spelled_tokens(tokenizer, text, tokens, where), True)
    return piece


def spelled_tokens(tokenizer: Tokenizer, text: str, tokens: Sequence[int], where: str) -> tuple[int, ...]:
    """Check that tokens spell a sampled text and return them; InputError where they do not, as those of another
    tokenizer. They may go on after the text, as a stop text is cut from what a reward sees."""
    if not isinstance(tokens, list | tuple) or any(type(token) is not int or token < 0 for token in tokens):
        raise InputError(f"{where}: its tokens are {tokens!r:.60}: they must be a list of token ids")
    text, spelled = tokenizer.without_end(text)[0], tokenizer.shown(tokens)
    begun = text.removeprefix(OPENING)  # it may stand in the prompt
    if not spelled.startswith((text, begun)) and not tokenizer.decode(tokens).startswith(text):  # without special ones
        raise InputError(
            f"{where}: its tokens spell {spelled[:40]!r} and not {text[:40]!r}: they are of another "
            "tokenizer; a reward model needs the policy's, and stored tokens that of the checkpoint"
        )
    return tuple(tokens)


def step_ends(tokenizer: Tokenizer, tokens: Sequence[int], separator: str) -> list[int]:
    """Find the index of each step's last token: that in which the step's separator ends, or LAST for a last step
    without one. White space alone is no step; a text without any step has one, at its end.

    Tokens are decoded behind those before them, as a token alone may be part of a character, or lose its space."""
    read, known, pending, ends, step = [], 0, [], [], ""
    for i, token in enumerate(tokens):
        pending.append(token)
        piece = tokenizer.shown([*read, *pending])[known:]
        if piece.endswith("\ufffd") and i + 1 < len(tokens) and len(pending) < BROKEN:
            continue
        read, known, pending, step = pending, len(tokenizer.shown(pending)), [], step + piece
        if separator in step:
            before, _, step = step.rpartition(separator)
            if before.strip():
                ends.append(i)
    if step.strip() or not ends:
        ends.append(LAST)
    return ends


def common_start(sequences: Sequence[Sequence]) -> Sequence:
    """Find the longest beginning that all texts, or all lists of tokens, share."""
    first = min(sequences, key=len)
    if all(other[: len(first)] == first for other in sequences):  # nearly always, and 50 times as fast
        return first
    different = (i for i in range(len(first)) if any(other[i] != first[i] for other in sequences))
    return first[: next(different)]


class Growing:
    """Encode texts that begin alike: of each only what follows the last end of a turn in the one before is encoded.

    That changes no token: special tokens are cut out of a text before anything else is done to it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.end = tokenizer, ""
        self.text, self.ids = "", []  # the text before, up to its last end of a turn
        if tokenizer.stop_ids:
            end = tokenizer.decode([tokenizer.stop_id], skip_special_tokens=False)
            self.end = end if end and tokenizer.encode(end) == [tokenizer.stop_id] else ""

    def encode(self, text: str) -> list[int]:
        end, known = self.end, self.ids
        if known and text.startswith(self.text):
            ids = [*known[:-1], *self.tokenizer.encode(end + text[len(self.text) :])]
        else:
            ids = self.tokenizer.encode(text)
        if end and ids.count(self.tokenizer.stop_id) == text.count(end) > 0:
            last = len(ids) - ids[::-1].index(self.tokenizer.stop_id)
            self.text, self.ids = text[: text.rindex(end) + len(end)], ids[:last]
        return ids


def turn(tokenizer: Tokenizer, messages: Sequence[dict], tools=None, encoder=None) -> tuple[list[int], list[int]]:
    """Encode the prompt of the last message and its own tokens, the token that ends the turn included. InputError for a
    template that leaves the turn's thoughts or tool calls out."""
    if tools:
        tokenizer.refuse_unread_tools(messages)
    before = list(messages[:-1])
    asked = _asked(tokenizer, before, tools)
    whole = tokenizer.render(list(messages), add_generation_prompt=False, tools=tools)
    # A template may open thoughts in the prompt that the turn itself has not: then the turn begins before them.
    openings = [asked, *(ending.sub("", asked) for ending in ENDINGS)]
    opening = next((opening for opening in openings if whole.startswith(opening)), "")
    answer, content = whole[len(opening) :], messages[-1]["content"] or ""
    rewritten = opening != asked and len(opening) < len(tokenizer.render(before, False, tools=tools))
    if rewritten or _letters(_behind(opening, content)) not in _letters(answer):  # as where thoughts are cut out
        opening, answer = asked, _behind(asked, content)
    _refuse_unwritten(messages[-1], answer, "" if whole.startswith(opening) else whole)
    return (encoder or tokenizer).encode(opening), _ended(tokenizer, tokenizer.encode_behind(opening, answer))


def _asked(tokenizer: Tokenizer, before: list[dict], tools) -> str:
    """Write the conversation so far with the template's opening of a turn."""
    if before[-1]["role"] != "assistant":
        return tokenizer.render(before, add_generation_prompt=True, tools=tools)
    # Behind a turn of its own the model would be asked to go on with that turn, so the opening is taken from before it.
    others = before[: max(i for i, message in enumerate(before, 1) if message["role"] != "assistant")]
    opened, closed = (tokenizer.render(others, add_generation_prompt=opens, tools=tools) for opens in (True, False))
    return tokenizer.render(before, add_generation_prompt=False, tools=tools) + opened.removeprefix(closed)


def _letters(text: str) -> str:
    return "".join(text.split())


def _behind(opening: str, content: str) -> str:
    """Return the content without a first tag, such as "<think>", that stands at the end of the opening already."""
    tag = OPENING_TAG.match(content)
    return content[tag.end() :] if tag and opening.rstrip().endswith(tag[1]) else content


def _unended(tokenizer: Tokenizer, message: dict) -> dict:
    """Return the assistant's message without a stop token at its end, which the template writes."""
    if message["role"] != "assistant" or not message["content"]:
        return message
    return {**message, "content": tokenizer.without_end(message["content"])[0]}


def _refuse_unwritten(message: dict, answer: str, whole: str) -> None:
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    thoughts = [message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)]
    for name, texts in (("tool_calls", calls), ("thoughts", thoughts)):
        if all(_letters(text) in _letters(answer) for text in texts):
            continue
        if all(text in whole for text in texts):
            raise InputError(
                "the chat template writes turns of the assistant that follow one another in another way: join them "
                "into one message"
            )
        raise InputError(f"the chat template does not write the {name} of an assistant's turn: use another model")


def _ended(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Return the tokens up to the last that ends a turn; with one where the template writes none."""
    ends = [i for i, token in enumerate(tokens) if token in tokenizer.stop_ids]
    return tokens[: ends[-1] + 1] if ends else [*tokens, tokenizer.stop_id]
