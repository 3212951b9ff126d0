"""Rows of data files, checked: every format that training and tasks read, as one record of its kind.

A row of training data is recognised by its keys; all rows of a file must have one format.

    demonstrations   messages | conversations                       a conversation
                     prompt | instruction | question | query   with   completion | response | output
                     question with answer, or input with output
                     text                                            a document
    preferences      chosen and rejected | responses and scores | completions (UltraFeedback) | answers (Nectar)
                     with   prompt | instruction | question | conversations | messages   or as whole conversations
    labels           a demonstration with one text completion, and label: 1 or true is right; 0, -1 or false is wrong
                     prompt, steps and labels: one in [0, 1] for each step, null where it has none
    outcomes         a demonstration with one text completion, and reward

`instruction` may have `input` and `history` (Alpaca), and every format `system` and `tools`. An answer that is a text
below a text `prompt` continues it; below messages, an instruction or a question it is a message of the assistant.
Sampled tokens may stand beside a text: completion_tokens, chosen_tokens, rejected_tokens, responses_tokens.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minirl.conversation import messages_of, prompt_of, tools_of, with_system
from minirl.errors import InputError
from minirl.files import is_number, kind_of
from minirl.tables import rows_of

CONVERSATIONS = ("messages", "conversations")
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "response", "output")
HH = "Human and Assistant"  # the format of texts "\n\nHuman: q\n\nAssistant: a"
MEDIA = ("images", "image", "videos", "audios")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SCORED = {"completions": ("response", "overall_score", 1.0), "answers": ("answer", "rank", -1.0)}  # a rank: 1 is best


def read_objects(path: str | Path) -> Iterator[tuple[dict, str]]:
    """Yield each row of a file, table or folder (see `rows_of`) and its place; InputError for a row that is no object,
    and where there is no row."""
    empty = True
    for row, where in rows_of(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: this is {kind_of(row)}, but must be an object")
        empty = False
        yield row, where
    if empty:
        raise InputError(f"{path}: the file is empty, it holds no examples: give at least one JSON object a line")


def read_records(path: str | Path, parse: Callable[[dict, str], dict]) -> list[dict]:
    """Read the records `parse(row, where)` of a file's rows, all of one "format"; "where" says which row it was."""
    records: list[dict] = []
    for row, where in read_objects(path):
        record = parse(row, where)
        if records and record["format"] != records[0]["format"]:
            raise InputError(
                f"{where}: its format is {record['format']}, and that of {records[0]['where']} is "
                f"{records[0]['format']}: put them into different files"
            )
        records.append(record | {"where": where})
    return records


def read_demonstrations(path: str | Path) -> list[dict]:
    """Read the rows of a file as records of `demonstration`."""
    return read_records(path, demonstration)


def read_preferences(path: str | Path) -> list[dict]:
    """Read the rows of a file as records of `preference`."""
    return read_records(path, preference)


def read_labels(path: str | Path, kind: str) -> list[dict]:
    """Read what a reward model of this kind learns from: records of `preference` (pairwise) or of `labelled`."""
    return read_records(path, preference if kind == "pairwise" else lambda row, where: labelled(row, kind, where))


def read_outcomes(path: str | Path) -> list[dict]:
    """Read the rows of a file as records of `outcome`; all have logprobs, of one temperature, or none has."""
    records = read_records(path, outcome)
    for record in records:
        if ("logprobs" in record) != ("logprobs" in records[0]):
            raise InputError(f"{record['where']}: some lines have 'logprobs' and some have none: give all or none")
        if record["temperature"] != records[0]["temperature"]:
            raise InputError(f"{record['where']}: its 'temperature' is not that of the lines before: store them apart")
    return records


# ---- columns ---------------------------------------------------------------------------------------------------------


def value_of(row: dict, column: str, where: str) -> object:
    """Get what a column holds, null too; InputError where it is not there."""
    if column not in row:
        raise InputError(f"{where}: there is no {column!r}, only {', '.join(row) or 'nothing'}.")
    return row[column]


def text_of(row: dict, column: str, where: str) -> str:
    """Get a text that must be there and hold something."""
    text = value_of(row, column, where)
    if not isinstance(text, str):
        raise InputError(f"{where}: {column!r} is {kind_of(text)}, but must be a text.")
    return filled(text, column, where)


def text_or_none(row: dict, column: str, where: str) -> str:
    """Get a text, "" where it is not there or null."""
    return "" if row.get(column) in (None, "") else text_of(row, column, where)


def texts_of(row: dict, column: str, where: str) -> list[str]:
    """Get a list of texts, [] where it is not there or null."""
    texts = [] if row.get(column) is None else row[column]
    if not isinstance(texts, list):
        raise InputError(f"{where}: {column!r} is {kind_of(texts)}, but must be a list of texts.")
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise InputError(f"{where}: {column!r} holds {kind_of(wrong[0])}, but must be a list of texts.")
    return texts


def filled(text: str, column: str, where: str) -> str:
    """Return the text; InputError if it is empty or cannot be encoded."""
    if not text.strip():
        raise InputError(f"{where}: {column!r} is empty: write something.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {column!r} holds half of a surrogate pair ({error}): correct the text.") from error
    return text


# ---- demonstrations --------------------------------------------------------------------------------------------------


def demonstration(row: dict, where: str) -> dict:
    """Read a row of sft as one of three records, with "format", and "tools" where there are any:

    {"prompt", "completion"} to continue a prompt by a text, with "completion_tokens" if they stand beside it;
    {"messages", "start"} for a conversation whose assistant speaks from message `start` on; or {"text"}.
    """
    row = _renamed(_present(row))
    if (asked := _first(row, QUESTIONS)) and (answered := _first(row, ANSWERS)):
        record = _answered(_context(row, where), row[answered], asked == "prompt", answered, where)
        if "completion" in record and "completion_tokens" in row:
            record["completion_tokens"] = row["completion_tokens"]
        name = f"{asked} and {answered}"
    elif name := _first(row, CONVERSATIONS):
        record = {"messages": with_system(messages_of(row[name], where, name), row, where), "start": 0}
    elif isinstance(row.get("text"), str):
        record = {"text": row["text"]}
        name = "text"
    else:
        raise InputError(_unknown(row, where, "demonstration"))
    if "messages" in record and not _trained(record, where):
        raise InputError(f"{where}: it has no answer of the assistant to learn from")
    return _with_tools(record, row, where) | {"format": name}


def _renamed(row: dict) -> dict:
    """Rename a question and an answer that have other names to those that are read."""
    if _first(row, (*CONVERSATIONS, "text")) is None:
        if "question" in row and "answer" in row and not _first(row, ANSWERS):
            return row | {"output": row["answer"]}
        if "input" in row and "output" in row and not _first(row, QUESTIONS):
            return {"instruction": row["input"], **{key: x for key, x in row.items() if key != "input"}}
    return row


def _answered(context: str | list[dict], answer: object, raw: bool, name: str, where: str) -> dict:
    if raw and isinstance(answer, str):
        return {"prompt": context, "completion": answer}
    prompt = _as_messages(context)
    return {"messages": prompt + _assistant(answer, where, name), "start": len(prompt)}


def _trained(record: dict, where: str) -> list[int]:
    """Find the assistant's turns of any weight; InputError for a weight that is not 0 or 1."""
    plain = []
    for i, message in enumerate(record["messages"]):
        key = "weight" if "weight" in message else "loss_weight"
        if message.get(key, 1) not in (0, 1):
            raise InputError(f"{where}: message {i} has the {key!r} {message[key]!r}, which must be 0 or 1")
        plain.append({key: x for key, x in message.items() if key not in ("weight", "loss_weight")})
    return trained_turns(record | {"messages": plain})


def trained_turns(record: dict, last: bool = False) -> list[int]:
    """Find the assistant's turns among "messages": all from "start" on that answer somebody and have no "weight"
    or "loss_weight" of 0, or the last of these."""
    roles = [message["role"] for message in record["messages"]]
    asked = next((i for i, role in enumerate(roles) if role != "assistant"), len(roles))
    first = max(record["start"], asked)
    weights = [message.get("weight", message.get("loss_weight", 1)) for message in record["messages"]]
    turns = [i for i in range(first, len(roles)) if roles[i] == "assistant" and weights[i]]
    return turns[-1:] if last else turns


# ---- preferences -----------------------------------------------------------------------------------------------------


def preference(row: dict, where: str) -> dict:
    """Read a row as {"prompt", "responses", "scores", "tokens", "format"}, and "margin" and "tools" if there are any.

    A response is a text below the prompt, or messages that go on from it. Tokens are None where they do not stand
    beside the texts.
    """
    row = _present(row)
    responses, scores, tokens, name = _responses(row, where)
    asked = _first(row, (*QUESTIONS, *CONVERSATIONS))
    context = None if asked is None else _context(row, where, (*QUESTIONS, *CONVERSATIONS))
    if asked is None and all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in responses):
        asked, responses = HH, [_of_speakers(text, where) for text in responses]
    elif isinstance(context, str) and name == "answers" and context.lstrip().startswith("Human:"):
        asking = _of_speakers(context, where)
        context = asking if asking[-1]["content"] else asking[:-1]  # the last one only asks for an answer
    prompt, responses = _below_prompt(context, responses, asked == "prompt", row, where)
    if tokens not in (None, [None, None]) and not all(isinstance(response, str) for response in responses):
        raise InputError(f"{where}: it has tokens beside its responses: these must be texts, not messages")
    record = {"prompt": prompt, "responses": responses, "scores": scores, "tokens": tokens}
    if "margin" in row:
        if not is_number(row["margin"]) or row["margin"] < 0:
            raise InputError(f"{where}: its 'margin' must be a number from 0")
        record["margin"] = float(row["margin"])
    return _with_tools(record, row, where) | {"format": asked or "whole conversations"}


def _responses(row: dict, where: str) -> tuple[list, list[float], list | None, str]:
    """Return the responses, their scores, the tokens beside them, and the name of the format."""
    wanted = "'chosen' and 'rejected', or 'responses' (texts or messages, two or more) and 'scores' (as many numbers)"
    if "chosen" in row and "rejected" in row:
        name, tokens = "chosen and rejected", [row.get("chosen_tokens"), row.get("rejected_tokens")]
        responses, scores = [row["chosen"], row["rejected"]], [1.0, 0.0]
        if "score_chosen" in row and "score_rejected" in row:
            scores = [row["score_chosen"], row["score_rejected"]]
    elif "responses" in row:
        name, tokens, responses, scores = "responses", row.get("responses_tokens"), row["responses"], row.get("scores")
    elif key := next((key for key in SCORED if isinstance(row.get(key), list)), None):
        text, score, sign = SCORED[key]
        name, tokens, entries = key, None, [entry if isinstance(entry, dict) else {} for entry in row[key]]
        responses, scores = [entry.get(text) for entry in entries], [entry.get(score) for entry in entries]
        scores = [sign * number if is_number(number) else None for number in scores]
        wanted = f"in each of its {key!r} a {text!r} and a number {score!r}"
    else:
        raise InputError(_unknown(row, where, "preference"))
    lists = isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores) >= 2
    if not lists or not all(isinstance(x, str | list | dict) for x in responses) or not all(map(is_number, scores)):
        raise InputError(f"{where}: it needs {wanted}")
    if "chosen" in name and scores[0] < scores[1]:
        raise InputError(f"{where}: its 'score_chosen' is below its 'score_rejected': correct the scores or the texts")
    return responses, [float(score) for score in scores], tokens, name


def _below_prompt(context, responses: Sequence, raw: bool, row: dict, where: str) -> tuple[str | list, list]:
    """Return the prompt and what follows it. Whole conversations are parted where they begin to differ."""
    if all(isinstance(response, str) for response in responses):
        if context is None:
            raise InputError(f"{where}: its responses are texts, and there is no 'prompt' above them")
        if raw:
            return context, list(responses)
    talks = [_assistant(response, where, "response") for response in responses]
    if all(talk[0]["role"] == "assistant" for talk in talks) and context is not None:
        return _as_messages(context), talks
    shared = _shared(talks)
    if not shared or any(talk[shared]["role"] != "assistant" for talk in talks):
        raise InputError(
            f"{where}: its conversations part at message {shared}, which must be the assistant's: they need a common "
            "beginning with a prompt"
        )
    prompt = talks[0][:shared]
    for message in [] if context is None else _as_messages(context):
        if message["role"] == "user" and message["content"].strip() not in [m["content"].strip() for m in prompt]:
            raise InputError(f"{where}: its conversations do not begin with its prompt: take one of the two out")
    return with_system(prompt, row, where), [talk[shared:] for talk in talks]


def _shared(talks: Sequence[list[dict]]) -> int:
    """Count the messages that all have in common, leaving one for each."""
    most = min(map(len, talks)) - 1
    return next((i for i in range(most) if any(talk[i] != talks[0][i] for talk in talks)), most)


def _of_speakers(text: str, where: str) -> list[dict]:
    """Split into messages "\\n\\nHuman: q\\n\\nAssistant: a"."""
    _, *pieces = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", "\n\n" + text.lstrip())
    if "Assistant" not in pieces[::2] and re.search(r"\n\s*Assistant:", text):
        raise InputError(
            f"{where}: its 'Human:' and 'Assistant:' must each follow an empty line, with plain line ends (\\n\\n)"
        )
    pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
    return messages_of([{"role": SPEAKERS[who], "content": said.strip()} for who, said in pairs], where)


def as_text(record: dict) -> dict:
    """Turn the record into texts, for a format HH and a tokenizer without a chat template."""
    said = {role: who for who, role in SPEAKERS.items()}

    def joined(messages: list[dict]) -> str:
        return "".join(f"\n\n{said[m['role']]}: {m['content']}" for m in messages)

    opening = "\n\nAssistant:"
    responses = [joined(response).removeprefix(opening) for response in record["responses"]]
    return record | {"prompt": joined(record["prompt"]) + opening, "responses": responses}


# ---- labels and outcomes ---------------------------------------------------------------------------------------------


def labelled(row: dict, kind: str, where: str) -> dict:
    """Read a row as {"prompt", "completion", "label"}, with "completion_tokens" if they stand beside it, or for kind
    process as {"prompt", "steps", "labels"}; "tools" and "format" as in `demonstration`."""
    steps, labels, label = row.get("steps"), row.get("labels"), row.get("label")
    if kind == "process":
        wanted = "'steps' (texts) and as many 'labels' (numbers from 0 to 1, null for none)"
        fits = isinstance(steps, list) and isinstance(labels, list) and len(steps) == len(labels) > 0
        fits = fits and all(isinstance(step, str) for step in steps)
        fits = fits and all(y is None or (isinstance(y, int | float) and 0 <= y <= 1) for y in labels)
    else:
        wanted = "a 'label' of 1, 0, -1, true or false"
        fits = isinstance(label, int | float) and label in (-1, 0, 1)
    if not fits:
        raise InputError(f"{where}: kind {kind} needs {wanted}, and it has {', '.join(row)}")
    if kind == "process":
        return text_answer({**row, "completion": ""}, where) | {"steps": steps, "labels": labels}
    return text_answer(row, where) | {key: row[key] for key in ("label", "completion_tokens") if key in row}


def outcome(row: dict, where: str) -> dict:
    """Read a completion that was sampled and scored as {"prompt", "completion", "reward", "temperature"}, and
    "completion_tokens", "logprobs" and "finish_reason" where there are any."""
    record = text_answer(row, where)
    if "reward" not in row or not (row["reward"] is None or is_number(row["reward"])):
        raise InputError(f"{where}: its 'reward' must be a finite number, or null where it has none")
    if "logprobs" in row:
        known, tokens = row["logprobs"], row.get("completion_tokens")
        lists = isinstance(known, list) and isinstance(tokens, list) and len(known) == len(tokens)
        if not lists or not all(is_number(x) and x <= 0 for x in known):
            raise InputError(f"{where}: its 'logprobs' must be a number up to 0 for each of its 'completion_tokens'")
    if row.get("finish_reason") not in (None, "stop", "length"):
        raise InputError(f"{where}: its 'finish_reason' must be stop or length, or left away")
    if not is_number(row.get("temperature", 1.0)):
        raise InputError(f"{where}: its 'temperature' must be a number: that of the 'logprobs'")
    return {"temperature": 1.0} | row | record


def text_answer(row: dict, where: str) -> dict:
    """Read a `demonstration` as {"prompt", "completion"}, where a single text of the assistant is needed."""
    record = demonstration(row, where)
    if "completion" in record:
        return record
    messages = record.get("messages", [])
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls") or len(messages) < 2:
        raise InputError(f"{where}: it needs a 'prompt' and a text 'completion'")
    if record["start"] not in (0, len(messages) - 1):
        raise InputError(f"{where}: its 'completion' must be one message of the assistant")
    rest = {key: value for key, value in record.items() if key not in ("messages", "start")}
    return {"prompt": messages[:-1], "completion": messages[-1]["content"], **rest}


# ---- what both have --------------------------------------------------------------------------------------------------


def _context(row: dict, where: str, names: Sequence[str] = QUESTIONS) -> str | list[dict]:
    """Read the prompt of a row: messages, or under the name "prompt" also a text without a system text."""
    name = _first(row, names)
    if name in ("prompt", *CONVERSATIONS):
        return with_system(prompt_of(row[name], where, name), row, where)
    text, more = row[name], row.get("input") or row.get("context") or ""
    if not isinstance(text, str) or not isinstance(more, str):
        raise InputError(f"{where}: {name!r} and 'input' must be texts")
    earlier = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise InputError(f"{where}: 'history' must be a list of pairs of texts: an instruction and its answer")
        earlier += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return with_system([*earlier, *_as_messages(f"{text}\n{more}" if more else text)], row, where)


def _as_messages(prompt: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _assistant(answer: object, where: str, name: str) -> list[dict]:
    """Make messages of an answer: a text is one of the assistant."""
    return messages_of({"role": "assistant", "content": answer} if isinstance(answer, str) else answer, where, name)


def _with_tools(record: dict, row: dict, where: str) -> dict:
    if media := next((name for name in MEDIA if row.get(name)), None):
        raise InputError(f"{where}: it has {media}, and only text can be read: leave the row away")
    tools = tools_of(row, where)
    if tools and isinstance(record.get("prompt", record.get("text")), str):
        raise InputError(f"{where}: 'tools' are written by a chat template: give messages in place of a text")
    return record | {"tools": tools} if tools else record


def _present(row: dict) -> dict:
    """Return the row without columns that are null: a table has all columns in all rows."""
    return {key: value for key, value in row.items() if value is not None}


def _first(row: dict, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _unknown(row: dict, where: str, kind: str) -> str:
    known = {
        "demonstration": "'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', "
        "'question' and 'answer', or 'text'",
        "preference": "'chosen' and 'rejected', 'responses' and 'scores', 'completions' or 'answers', with a 'prompt'",
    }[kind]
    hint = "; pairs are for minirl prefer and minirl reward" if kind == "demonstration" and "chosen" in row else ""
    if kind == "preference" and ("label" in row or "labels" in row):
        hint = f"; labels are for minirl reward --kind {'pointwise' if 'label' in row else 'process'}"
    return f"{where}: no format has its keys ({', '.join(row) or 'none'}): give {known}{hint}"
