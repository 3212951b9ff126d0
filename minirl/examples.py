"""Records of data files as token rows: demonstrations, ranked responses, labelled completions and steps.

A completion is taken to have ended by itself and gets the stop token; where its sampled tokens stand beside it, it has
these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from minirl.errors import InputError, named
from minirl.model import ModelConfig
from minirl.preferences import even_weights, ranked_pairs
from minirl.records import HH, as_text, trained_turns
from minirl.reward_losses import inverse_frequency
from minirl.split import prompt_key, split_by_problem
from minirl.tokenizer import Tokenizer
from minirl.trees import LAST, Row, micro_batches, save_rows
from minirl.turns import Turns, common_start, continuation_ids, conversation, encode_answer, step_ends

NO_PROMPT = "write something to answer"  # advice

# ---- what can be learned from ----------------------------------------------------------------------------------------


def fits(tokens: int, max_length: int, where: str, overlong: list[str] | None) -> bool:
    """Return whether a prompt leaves room for a token of a response. The place of one that does not goes to `overlong`;
    an InputError names it where that is None, and a prompt without a token."""
    if 0 < tokens < max_length:
        return True
    if tokens and overlong is not None:
        overlong.append(where)
        return False
    advice = "shorten it or leave it out (sft and prefer: overlong_prompts = drop)" if tokens else NO_PROMPT
    raise InputError(f"{where}: its prompt has {tokens} tokens, and between 1 and {max_length - 1} fit: {advice}")


def overlong_line(count: int, total: int, side: str = "training") -> str:
    """Say how many prompts are dropped because they are too long."""
    return f"{count} of {total} {side} prompts leave no room for a completion and are dropped"


def refuse_unknown_tokens(rows: Sequence[Row], vocab: int) -> None:
    """Raise an InputError for the first row with a token that a vocabulary of this size has not."""
    for row in rows:
        largest = max((*row.prompt, *row.response))
        if largest >= vocab:
            raise InputError(
                f"{row.where or f'example {row.group}'} holds token {largest}, outside the model's vocabulary of "
                f"{vocab}: is this its tokenizer?"
            )


# ---- demonstrations --------------------------------------------------------------------------------------------------


def demonstration_rows(
    tokenizer: Tokenizer,
    examples: Iterable[dict],
    max_length: int,
    loss_on: str = "all",
    overlong: list[str] | None = None,
) -> list[Row]:
    """Encode records of `records.demonstration`; each row ends with its stop token unless it had to be cut at
    `max_length` tokens in all. A conversation has one row, or more where the template writes earlier turns in another
    way; its later rows are left out where their prompts do not fit, and so is one without a turn to learn. The places
    of examples whose first prompt does not fit go to `overlong`; None: an InputError names the first. `lost` counts the
    tokens of an example in its last row."""
    rows: list[Row] = []
    for i, example in enumerate(examples):
        where = example.get("where", f"example {i}")
        pieces = _demonstration(tokenizer, example, loss_on, where)
        if not pieces or not fits(len(pieces[0].prompt), max_length, where, overlong):
            continue
        lost = 0
        for piece in pieces:
            room = max(max_length - len(piece.prompt), 0)
            lost += sum(piece.counted[room:])
            if any(counted := piece.counted[:room]):
                rows.append(Row(piece.prompt, piece.response[:room], len(rows), counted=counted, where=where))
        rows[-1] = replace(rows[-1], lost=lost)
    return rows


def _demonstration(tokenizer: Tokenizer, example: dict, loss_on: str, where: str) -> list[Turns]:
    tools = example.get("tools")
    with named(where):
        if "messages" in example:
            return conversation(tokenizer, example["messages"], trained_turns(example, loss_on == "last"), tools)
        if "text" in example:
            return [_document(tokenizer, example["text"])]
    return [encode_answer(tokenizer, example, example["completion"], example.get("completion_tokens"), where)]


def _document(tokenizer: Tokenizer, text: str) -> Turns:
    """Encode all of a text and the token that ends a document. Its first token has nothing to be predicted from, unless
    the tokenizer puts its bos token in front."""
    end = tokenizer.stop_id if tokenizer.eos_id is None else tokenizer.eos_id
    body, own = tokenizer.without_end(text)
    ids = tokenizer.prompt_ids(body if own == end else text)
    piece = Turns(ids[:1])
    piece.add([*ids[1:], end], True)
    return piece


# ---- responses that are compared or labelled -------------------------------------------------------------------------


@dataclass
class Line:
    """Responses of one prompt, and what a loss on them needs. They stay together in a micro-batch."""

    rows: Sequence[Row]  # K
    pairs: Sequence[tuple[int, int]] = ()  # (better, worse), each an index of `rows`
    labels: Sequence[float] = ()  # in [0, 1], one for each place at which a reward model is read
    weights: Sequence[float] = ()  # in the loss, one for each pair or label; none given: `even_weights` of the pairs
    margin: float = 0.0  # between better and worse
    best: int = 0  # index of the first row with the highest score
    ref_logp: torch.Tensor | None = None  # [K], sums over the tokens

    def __post_init__(self):
        self.weights = self.weights or even_weights(self.pairs)

    @property
    def tokens(self) -> int:
        return len(self.rows[0].prompt) + sum(len(row.response) for row in self.rows)


class Lines(NamedTuple):
    """The lines of an update."""

    lines: Sequence[Line]

    def save(self, folder: Path) -> None:
        """Write their rows, to be looked at."""
        save_rows([row for line in self.lines for row in line.rows], folder)


def description(examples: Sequence[dict]) -> str:
    """Describe the format of preferences and how many there are."""
    form = {"prompt": "below a prompt", "whole conversations": "conversations without an explicit prompt"}
    lists = sum(len(example["responses"]) > 2 for example in examples)
    line = f"{len(examples) - lists:,} pairs" if lists < len(examples) else ""
    line += " and " * (0 < lists < len(examples)) + (f"{lists:,} ranked lists" if lists else "")
    name = examples[0]["format"]
    return f"{line} ({form.get(name, f'format {name}')})"


def response_turns(tokenizer: Tokenizer, example: dict, texts: Sequence[str], tokens: list | None) -> list[Turns]:
    """Encode each text below the example's prompt, with the tokens that stand beside it, or else its own and the stop
    token: it ended by itself."""
    tokens = [None] * len(texts) if tokens is None else tokens
    if not isinstance(tokens, list) or len(tokens) != len(texts):
        raise InputError(f"{example['where']}: 'responses_tokens' must be a list with the tokens of each response")
    pairs = zip(texts, tokens, strict=True)
    return [encode_answer(tokenizer, example, text, ids, example["where"]) for text, ids in pairs]


def encode_responses(tokenizer: Tokenizer, example: dict) -> list[Turns]:
    """Encode the prompt of a `records.preference` with each of its responses: texts below the prompt, or messages as
    the chat template writes them. All get the same prompt."""
    if example["format"] == HH and tokenizer.chat_template is None:
        example = as_text(example)
    prompt, responses, tools = example["prompt"], example["responses"], example.get("tools")
    if all(isinstance(response, str) for response in responses):
        found = response_turns(tokenizer, example, responses, example["tokens"])
    else:
        with named(example["where"]):
            found = [_messages(tokenizer, prompt, response, tools) for response in responses]
    share_prompt(found)
    return found


def share_prompt(found: Sequence[Turns]) -> None:
    """Give all the same prompt: one of them may begin before thoughts that the template opens in the others."""
    common = common_start([turns.prompt for turns in found])
    for turns in found:
        opening = turns.prompt[len(common) :]
        turns.response, turns.counted = opening + turns.response, [True] * len(opening) + turns.counted
        turns.prompt = common


def _messages(tokenizer: Tokenizer, prompt: list[dict], response: list[dict], tools: list[dict] | None) -> Turns:
    places = [i for i, message in enumerate(response, len(prompt)) if message["role"] == "assistant"]
    pieces = conversation(tokenizer, [*prompt, *response], places, tools)
    if len(pieces) > 1:
        raise InputError(
            "the chat template writes earlier turns in another way, so a response of several turns is not one text: "
            "keep its first turn"
        )
    return pieces[0]


def ranked_lists(
    tokenizer: Tokenizer, examples: Iterable[dict], max_length: int, overlong: list[str] | None = None
) -> list[Line]:
    """Encode records of `records.preference`; each response ends with its stop token (or as its tokens stand in the
    file) unless it had to be cut at `max_length` tokens in all.

    Of equal responses (also: equal after the cut) the first stays. Examples without a pair, where all is equal or tied,
    are left out; so are those whose prompt does not fit, and their places go to `overlong` (None: the first is named in
    an InputError).
    """
    lines = []
    for i, example in enumerate(examples, 1):
        found, where = encode_responses(tokenizer, example), example["where"]
        prompt, room = found[0].prompt, max_length - len(found[0].prompt)
        if not fits(len(prompt), max_length, where, overlong):
            continue
        equal: dict[tuple[int, ...], list[tuple[float, Turns]]] = {}
        for turns, score in zip(found, example["scores"], strict=True):
            equal.setdefault(tuple(turns.response[:room]), []).append((score, turns))
        scores = [same[0][0] for same in equal.values()]
        if pairs := ranked_pairs(scores):
            rows = []
            for response, same in equal.items():
                lost = max(0, *(len(turns.response) - room for _, turns in same))
                rows.append(Row(prompt, response, i, counted=same[0][1].counted[:room], where=where, lost=lost))
            lines.append(Line(rows, pairs, best=scores.index(max(scores))))
    return lines


def held_out(lines: Sequence[Line], share: float, seed: int) -> tuple[list[Line], list[Line]]:
    """Split into (training, held out): a seeded share of the distinct prompts with all their lines; at least one of
    them if the share is not 0."""
    refusal = "one prompt cannot be both trained on and held out: add more, or set eval_share = 0"
    return split_by_problem(lines, lambda line: tuple(line.rows[0].prompt), share, seed, refusal)


def whole_lists(lines: Sequence[Line], budget: int) -> list[list[int]]:
    """Split the indices of lines into micro-batches of at most `budget` tokens; a line with more is alone."""
    joined = [
        Row(line.rows[0].prompt, [t for row in line.rows for t in row.response], i) for i, line in enumerate(lines)
    ]
    return micro_batches(joined, range(len(lines)), budget)


# ---- what reward models learn from -----------------------------------------------------------------------------------


def split_by_prompt(examples: Sequence[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Split into (training, held out): a seeded share of the prompts is held out with all their lines, one at least."""
    refusal = "all lines have one prompt, so none can be held out: set --heldout 0 or give --heldout-data"
    return split_by_problem(examples, prompt_key, share, seed, refusal)


def reward_lines(
    examples: Iterable[dict], kind: str, tokenizer: Tokenizer, config: ModelConfig, separator: str = "\n"
) -> tuple[list[Line], str]:
    """Encode records of `records.read_labels` for this kind of reward model; also say which lines are left out, "" for
    none: those that are longer than the model's positions, and those that compare nothing."""
    encode = {"pairwise": _compared, "process": _labelled_steps}.get(kind, _labelled)
    lines, too_long, tied = [], 0, 0
    for example in examples:
        line = encode(example, tokenizer, separator)
        if not line.rows[0].prompt:
            raise InputError(f"{example['where']}: its prompt has no token: {NO_PROMPT}")
        refuse_unknown_tokens(line.rows, config.vocab_size)
        if max(len(row.prompt) + len(row.response) for row in line.rows) > config.max_positions:
            too_long += 1
        elif kind == "pairwise" and not line.pairs:
            tied += 1
        else:
            lines.append(line)
    parts = [f"{too_long} longer than {config.max_positions} tokens"] if too_long else []
    parts += [f"{tied} that compare equal or tied responses"] if tied else []
    return lines, " and ".join(parts)


def balanced(lines: Sequence[Line]) -> list[Line]:
    """Weight labelled completions so that right and wrong ones have half of the whole weight each; else a model of an
    accurate policy says 'right' to everything."""
    weights = inverse_frequency(torch.tensor([line.labels[0] for line in lines])).tolist()
    return [replace(line, weights=(w,)) for line, w in zip(lines, weights, strict=True)]


def _compared(example: dict, tokenizer: Tokenizer, separator: str) -> Line:
    rows = [_row(turns.prompt, turns.response, example) for turns in encode_responses(tokenizer, example)]
    pairs = ranked_pairs(example["scores"], [row.response for row in rows])
    return Line(rows, pairs, margin=example.get("margin", 0.0))


def _labelled(example: dict, tokenizer: Tokenizer, separator: str) -> Line:
    text, tokens = example["completion"], example.get("completion_tokens")
    turns = encode_answer(tokenizer, example, text, tokens, example["where"])
    return Line([_row(turns.prompt, turns.response, example)], labels=(float(example["label"] > 0),), weights=(1.0,))


def _labelled_steps(example: dict, tokenizer: Tokenizer, separator: str) -> Line:
    steps, labels = example["steps"], example["labels"]
    text = separator.join(step.removesuffix(separator) for step in steps)
    with named(example["where"]):
        prompt = tokenizer.prompt_ids(example["prompt"], example.get("tools"))
        response = continuation_ids(tokenizer, example["prompt"], text, example.get("tools"))
    places = tuple(step_ends(tokenizer, response, separator))
    if len(places) != len(steps):
        raise InputError(
            f"{example['where']}: its {len(steps)} steps are read as {len(places)}: a step may neither be blank nor "
            f"hold the separator {separator!r}"
        )
    known, labels = zip(*((float(label is not None), float(label or 0)) for label in labels), strict=True)
    return Line([_row(prompt, response, example, places)], labels=labels, weights=known)


def _row(prompt: Sequence[int], response: Sequence[int], example: dict, places: Sequence[int] = (LAST,)) -> Row:
    return Row(tuple(prompt), tuple(response), places=places, where=example["where"])
