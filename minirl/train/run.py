"""The folder of a run: its config, metrics.jsonl, sampled completions, and checkpoints that resume to the same bits.

    runs/x/config.json  metrics.jsonl  completions.jsonl  checkpoints/step-000040/{config.json, model.safetensors,
    tokenizer.json, ..., optimizer.safetensors, state.json}  model/

A checkpoint is a Hugging Face directory with the optimizer's state beside it. It appears whole or not at all; lines
that were logged after it are dropped on resume, so that a killed and resumed run leaves the same files as one that was
not.
"""

import json
import math
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minirl.errors import InputError
from minirl.files import atomic_folder, read_json, write_atomic, write_json
from minirl.model import Transformer
from minirl.tokenizer import Tokenizer
from minirl.train.optimizer import AdamW

LOGS = ("metrics.jsonl", "completions.jsonl")
TIMED = (
    "time/",
    "memory/",
    "tokens_per_s/",
)  # metrics that are measured, not computed: the only ones that differ between equal runs


class Display:
    """What a person sees of a run; this one prints lines only, the command line brings a livelier one."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """`stage` is at done of total; called often."""


class Run:
    """One run folder. `start` is the step to go on from; a fresh run starts at 0."""

    def __init__(self, out: str | Path, config: dict, resume: bool = False, keep: int = 2):
        self.out, self.keep = Path(out), keep
        file = self.out / "config.json"
        config = json.loads(json.dumps(config))  # as it will be read back
        if file.exists() and not resume:
            raise InputError(f"{self.out} already holds a run: add --resume to continue it, or choose another --out")
        if resume:
            if not file.exists():
                raise InputError(f"{self.out} holds no run to resume: check --out, or leave --resume away")
            _refuse_changes(read_json(file), config, file)
        else:
            write_json(file, config)
        for staging in (self.out / "checkpoints").glob(".step-*"):  # a save that was killed half-way
            shutil.rmtree(staging, ignore_errors=True)
        self.checkpoint = self._latest()
        self.start = int(read_json(self.checkpoint / "state.json")["step"]) if self.checkpoint else 0
        for name in LOGS:
            _truncate(self.out / name, self.start)

    def _latest(self) -> Path | None:
        return max((self.out / "checkpoints").glob("step-*"), default=None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; NaN and infinity become null, as JSON has neither."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._append("metrics.jsonl", {"step": step, **clean})

    def log_completion(self, step: int, **fields) -> None:
        self._append("completions.jsonl", {"step": step, **fields})

    def _append(self, name: str, record: dict) -> None:
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def save(self, step: int, model: Transformer, tokenizer: Tokenizer, optimizer: AdamW) -> Path:
        """Write the checkpoint after `step` updates, and drop the oldest beyond `keep`."""
        path = self.out / "checkpoints" / f"step-{step:06d}"
        with atomic_folder(path) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            save_file(optimizer.state_dict(), staging / "optimizer.safetensors")
            write_json(staging / "state.json", {"step": step})
        for old in sorted((self.out / "checkpoints").glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)
        self.checkpoint = path
        return path

    def restore(self, optimizer: AdamW) -> None:
        """Load the optimizer's state of the checkpoint that the model was read from."""
        file = self.checkpoint / "optimizer.safetensors"
        try:
            optimizer.load_state_dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is truncated or missing ({error}): remove {self.checkpoint} to resume earlier"
            ) from None

    def finish(self, model: Transformer, tokenizer: Tokenizer) -> Path:
        """Write the trained model to `model/`, for `minirl eval` or any other engine."""
        with atomic_folder(self.out / "model") as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        return self.out / "model"


def _refuse_changes(old: dict, new: dict, file: Path) -> None:
    old, new = _flat(old), _flat(new)
    changed = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k)]
    if changed:
        shown = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(changed))
        raise InputError(f"the run in {file.parent} was started with another config ({shown}): resume it unchanged")


def _flat(config: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _truncate(file: Path, step: int) -> None:
    """Drop log lines after `step`, also one that was cut off in the middle."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    write_atomic(file, lambda staging: staging.write_text("".join(kept), encoding="utf-8"))


def peak_memory_gb() -> float:
    """Largest memory of this process so far in GB: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def interruptible(display: Display) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop after the current step; the second one stops at once."""
    requested = []

    def request(signum, frame) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(True)
        display.line("stopping after this step and saving; press Ctrl-C again to stop at once")

    try:
        previous = signal.signal(signal.SIGINT, request)
    except ValueError:  # not in the main thread: nothing to catch there
        yield lambda: False
        return
    try:
        yield lambda: bool(requested)
    finally:
        signal.signal(signal.SIGINT, previous)


def pick_device(name: str) -> torch.device:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for and there is none: use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
