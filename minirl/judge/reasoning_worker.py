"""Make problems of reasoning-gym and score answers by its own scorers, in processes of the pool.

Several scorers execute the answer that they are given, so they run behind the walls. Some data sets draw from sets of
texts: the pool's fixed hash seed makes their problems the same on every run. The file imports nothing of minirl, so
that its process needs no torch.
"""

import dataclasses
import functools
import hashlib
import json
import typing

from reasoning_gym.factory import DATASETS

BATCH = 32  # problems of one seed: some data sets are generated whole, at once


class Refused(ValueError):
    """Refuse a request, with (why, the word that is unknown or None, the known ones) as arguments."""


def score(name: str, config: str, answer: str, entry: str) -> float:
    """Return the data set's score of an answer to the problem `entry`; 1 is right. `config` and `entry` are JSON."""
    return float(_dataset(name, config).score_answer(answer, json.loads(entry, object_hook=_with_tuples)))


def problems(name: str, config: str, seed: int, number: int) -> dict:
    """Return batch `number` of problems without end (question, answer, and entry in JSON), which may repeat; or a
    report of why there are none."""
    digest = hashlib.blake2b(repr((seed, number)).encode(), digest_size=4).digest()
    try:
        dataset = _dataset(name, config, seed=int.from_bytes(digest) >> 1, size=BATCH)
    except Refused as error:
        return {"refused": error.args}
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
    types = typing.get_type_hints(config_class)
    known = tuple(field.name for field in dataclasses.fields(config_class) if field.name not in ("seed", "size"))
    options = json.loads(config)
    for option in options:
        if option not in known:
            raise Refused(f"data set {name!r} has no option", option, known)
    try:
        read = {option: _read(value, types[option]) for option, value in options.items()}
        return make(config_class(**read, seed=seed, size=size))
    except Exception as error:  # its own checks are assertions, most with a message
        raise Refused(f"data set {name!r} refuses {config} ({type(error).__name__}: {error})", None, ()) from error


def _read(value, wanted):
    """Convert a text from a command line to the option's type; lists are written as a|b|c."""
    if isinstance(value, list):
        return tuple(value) if typing.get_origin(wanted) is tuple or wanted is tuple else value
    if not isinstance(value, str):
        return value
    arguments = [a for a in typing.get_args(wanted) if a is not type(None)]
    if typing.get_origin(wanted) is typing.Union:
        return None if value == "none" else _read(value, arguments[0])
    if typing.get_origin(wanted) is typing.Literal:
        return value
    if arguments or wanted is tuple:
        return _read([_read(part, arguments[0] if arguments else str) for part in value.split("|")], wanted)
    if wanted is bool:
        return {"true": True, "false": False}[value]
    return wanted.fromisoformat(value) if hasattr(wanted, "fromisoformat") else wanted(value)


def _tagged(value):
    """Mark tuples, as JSON has none and some scorers compare with them."""
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return {key: _tagged(item) for key, item in value.items()} if isinstance(value, dict) else value


def _with_tuples(found: dict):
    """Turn a marked tuple back into one."""
    return tuple(found["tuple"]) if found.keys() == {"tuple"} else found
