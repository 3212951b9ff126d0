"""Seal a checkpoint with the sizes and digests of its files, and tell later whether it is still what was written.

    step-000040/manifest.json = {"run": digest of what decides the run, "step": 40, "update": null,
        "files": {name: {"bytes", "blake2b"}}, "logs": {name: {"bytes", "blake2b"}}, "blake2b": of all the above}

A log goes on growing, so the digest is that of its first bytes: where the run was at the checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minirl.errors import InputError, NonFinite
from minirl.files import read_json, write_json

MANIFEST, DIGEST = "manifest.json", "blake2b"  # the key of a file's own digest
BATCH = "batch.safetensors"  # of a step that was cut; may hold the number that is not finite, to look at
PART = 1 << 20  # bytes read at a time


class LogEnd:
    """Count the bytes of a log, and keep their digest."""

    def __init__(self):
        self.bytes, self._digest = 0, hashlib.blake2b(digest_size=16)

    def add(self, content: bytes) -> None:
        self.bytes += len(content)
        self._digest.update(content)

    @property
    def entry(self) -> dict:
        return {"bytes": self.bytes, "blake2b": self._digest.hexdigest()}


def read_end(file: Path, size: int) -> LogEnd:
    """Read the first `size` bytes of a log, or as many as there are."""
    end = LogEnd()
    if file.is_file():
        with file.open("rb") as content:
            while part := content.read(min(PART, size - end.bytes)):
                end.add(part)
    return end


def seal(folder: Path, step: int, update: int | None, logs: dict[str, LogEnd], run: str) -> None:
    """Write the manifest of a checkpoint that is complete; NonFinite for weights that are not finite, from which
    nothing can go on."""
    if broken := _not_finite(folder):
        raise NonFinite(
            f"{broken} is not finite after step {step}, so no checkpoint is written: lower the learning rate (with "
            "--resume --fork --lr LOWER a run goes on from the one before)"
        )
    files = {name: _entry(folder / name) for name in _names(folder)}
    content = {"run": run, "step": step, "update": update, "files": files}
    write_signed(folder / MANIFEST, content | {"logs": {name: end.entry for name, end in logs.items()}})


def damage(folder: Path, step: int, update: int | None, run: str) -> str:
    """Say what is wrong with a checkpoint, "" where it is whole and of the run with this digest."""
    try:
        content = read_manifest(folder)
        if content["run"] != run:
            return "it is that of another run"
        if (content["step"], content["update"]) != (step, update):
            return f"it is that of step {content['step']}"
        names = set(_names(folder))
        if strange := sorted(names ^ content["files"].keys()):
            return f"{strange[0]} is {'not its own' if strange[0] in names else 'missing'}"
        for name, entry in content["files"].items():
            if not (folder / name).is_file() or (folder / name).is_symlink():
                return f"{name} is no file"
            if _entry(folder / name) != entry:
                return f"{name} has changed"
        broken = _not_finite(folder)
        return f"{broken} is not finite" if broken else ""
    except InputError as error:
        return str(error).partition(":")[0].replace(f"{folder}/", "")
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not as minirl writes it"
    except PermissionError:  # no damage, and no reason to set anything aside
        raise
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read, {error.strerror}"


def read_manifest(folder: Path) -> dict:
    """Return what the manifest says; InputError where it has changed."""
    return read_signed(folder / MANIFEST)


def write_signed(file: Path, content: dict) -> None:
    """Write JSON with its own digest."""
    write_json(file, content | {DIGEST: digest_of(content)})


def read_signed(file: Path) -> dict:
    """Read what `write_signed` wrote; InputError where it has changed."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise InputError(f"{file} is no file: restore it")
    content = read_json(file)
    if content.pop(DIGEST, None) != digest_of(content):
        raise InputError(f"{file} has changed since minirl wrote it: restore it")
    return content


def digest_of(content: dict) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _names(folder: Path) -> Iterator[str]:
    """Yield what lies below a checkpoint, but for the manifest and for folders."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and (path.is_symlink() or not path.is_dir()):
            yield name


def _entry(file: Path) -> dict:
    return read_end(file, file.stat().st_size).entry


def _not_finite(folder: Path) -> str:
    """Name a tensor of weights or of the optimizer that holds NaN or infinity; "" where none does."""
    for file in sorted(folder.rglob("*.safetensors")):
        if file.name == BATCH or not file.is_file():
            continue
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 - no dict
                    if not torch.isfinite(content.get_tensor(name)).all():
                        return f"tensor {name!r} of {file.relative_to(folder)}"
        except SafetensorError as error:
            raise InputError(f"{file} is no safetensors file: {error}") from None
    return ""
