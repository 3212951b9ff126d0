"""What runs of reasoning-gym, in processes of the sandbox: making problems, and the package's own scorers.

Several of those scorers execute the answer that they are given. Some data sets draw from sets of texts: the sandbox's
fixed hash seed makes their problems the same on every run. The file imports nothing of minirl, so that its process
needs no torch.
"""

import dataclasses
import functools
import hashlib
import json
import typing

from reasoning_gym.factory import DATASETS

BATCH = 32  # problems of one seed: some data sets are made whole, at once


class Refused(ValueError):
    """A request that cannot be met: why, or the word that is unknown and what there is instead."""

    def __init__(self, why: str, word: str | None = None, choices: tuple[str, ...] = ()):
        super().__init__(why)
        self.report = {"why": why, "word": word, "choices": list(choices)}


def score(name: str, config: str, answer: str, entry: str) -> float:
    """The data set's score of an answer to the problem `entry`, both in JSON; 1 is right."""
    return float(_dataset(name, config).score_answer(answer, json.loads(entry, object_hook=_with_tuples)))


def problems(name: str, config: str, seed: int, number: int) -> dict:
    """Batch `number` of endless problems (question, answer, and entry in JSON), which may repeat; or why there are
    none."""
    digest = hashlib.blake2b(repr((seed, number)).encode(), digest_size=4).digest()
    try:
        dataset = _dataset(name, config, seed=int.from_bytes(digest) >> 1, size=BATCH)
    except Refused as error:
        return {"refused": error.report}
    return {"problems": [_problem(dataset[i]) for i in range(BATCH)]}


def _problem(found: dict) -> dict:
    entry = {"answer": found["answer"], "metadata": _tagged(found["metadata"])}
    return {"question": found["question"], "answer": found["answer"], "entry": json.dumps(entry, default=str)}


@functools.lru_cache(4)
def _dataset(name: str, config: str, seed: int = 0, size: int = 1):
    choices = tuple(sorted(set(DATASETS) - {"composite"}))  # that one mixes others and has no problems of its own
    if name not in choices:
        raise Refused("there is no data set", name, choices)
    make, config_class = DATASETS[name]
    kinds = typing.get_type_hints(config_class)
    known = tuple(field.name for field in dataclasses.fields(config_class) if field.name not in ("seed", "size"))
    options = json.loads(config)
    for option in options:
        if option not in known:
            raise Refused(f"data set {name!r} has no option", option, known)
    try:
        read = {option: _read(value, kinds[option]) for option, value in options.items()}
        return make(config_class(**read, seed=seed, size=size))
    except Exception as error:  # its own checks are assertions, most with a message
        raise Refused(f"data set {name!r} refuses {config} ({type(error).__name__}: {error})") from error


def _read(value, kind):
    """A text from a command line as the option's type has it; lists are written as a|b|c."""
    if isinstance(value, list):
        return tuple(value) if typing.get_origin(kind) is tuple or kind is tuple else value
    if not isinstance(value, str):
        return value
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is typing.Union:
        return None if value == "none" else _read(value, arguments[0])
    if typing.get_origin(kind) is typing.Literal:
        return value
    if arguments or kind is tuple:
        return _read([_read(part, arguments[0] if arguments else str) for part in value.split("|")], kind)
    if kind is bool:
        return {"true": True, "false": False}[value]
    return kind.fromisoformat(value) if hasattr(kind, "fromisoformat") else kind(value)


def _tagged(value):
    """Tuples marked, as JSON has none and some scorers compare with them."""
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return {key: _tagged(item) for key, item in value.items()} if isinstance(value, dict) else value


def _with_tuples(found: dict):
    return tuple(found["tuple"]) if found.keys() == {"tuple"} else found
