"""The folder of a run: its config, metrics.jsonl, sampled completions, and checkpoints that resume to the same bits.

    runs/x/config.json  metrics.jsonl  completions.jsonl  checkpoints/step-000040/{config.json, model.safetensors,
    tokenizer.json, ..., optimizer.safetensors, state.json}  model/

A checkpoint is a Hugging Face directory with the optimizer's state beside it. It appears whole or not at all; lines
that were logged after it are dropped on resume, so that a killed and resumed run leaves the same files as one that was
not. The folder begins with the first line that is logged: a run that fails before it leaves none.
"""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minirl import __version__
from minirl.errors import InputError
from minirl.files import atomic_folder, read_json, read_jsonl, write_atomic, write_json
from minirl.model import ScalarHead, Transformer
from minirl.tokenizer import Tokenizer
from minirl.train.optimizer import AdamW

LOGS = ("metrics.jsonl", "completions.jsonl", "faults.jsonl")
KNOBS = ("slots", "micro_batch_tokens", "recompute", "device", "save_every", "shown", "on_bad_reward")  # on resume
WRITTEN = ("config.json", *LOGS, "model", "reward_model", "checkpoints/step")  # atomically, from beside the place
FORMAT = 2  # of a run's folder: raised where this code could not take an older run up again to the same bits
TIMED = (
    "time/",
    "memory/",
    "tokens_per_s/",
)  # metrics that are measured, not computed: the only ones that differ between equal runs


def identity(config, examples: list) -> dict:
    """What config.json holds: the config, and a hash of the examples, as files may change under their names."""
    content = json.dumps(examples, skipkeys=True, default=lambda value: type(value).__name__)
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return {k: v for k, v in asdict(config).items() if k not in ("out", "resume")} | {"data_hash": digest}


Part = tuple[str, bool]  # a piece of an example's text, and whether its tokens are trained


Item = TypeVar("Item")


class Display:
    """What a person sees of a run; this one prints lines only, the command line brings a livelier one."""

    def example(self, parts: Sequence[Part]) -> None:
        """Show an example as the model reads it, with what is trained between brackets."""
        text = "".join(f"⟦{text}⟧" if trained else text for text, trained in parts)
        self.line(f"one example, what is trained in ⟦ ⟧:\n{text}")

    def line(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """`stage` is at done of total; called often."""


def tracked(display: Display, stage: str, items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items, and show how many of them have been taken."""
    for i, item in enumerate(items):
        if i % 256 == 0:  # a bar costs as much as a short text
            display.progress(stage, i, len(items))
        yield item
    display.progress(stage, len(items), len(items))


class Run:
    """One run folder. `start` is the step to go on from; a fresh run starts at 0."""

    def __init__(self, out: str | Path, config: dict, resume: bool = False, keep: int = 2):
        self.out, self.keep = Path(out), keep
        self.config = {"format": FORMAT, **json.loads(json.dumps(config))}  # as it will be read back
        self.checkpoint: Path | None = None
        self.start = 0
        self.state: dict = {}  # what `save` was given beside the tensors
        self.begun = False
        self.resumable = True  # by the options of a command, which a demo or a script may not have
        refuse_unwritable(self.out)
        if resume:
            self._resume()
        elif holds_run(self.out):
            raise InputError(f"{self.out} already holds a run: add --resume to continue it, or choose another --out")

    def _resume(self) -> None:
        """Find the last checkpoint, and make the folder what it was then."""
        file = self.out / "config.json"
        if not file.exists():
            raise InputError(f"{self.out} holds no run to resume: check --out, or leave --resume away")
        old = read_json(file)
        refuse_format(old, self.out)
        if "date" in old:
            self.config["date"] = old["date"]
        _refuse_changes(old, self.config, file)
        for name in WRITTEN:
            _remove_half_written(self.out / name)
        self._drop_old()
        self.checkpoint = next(reversed(self._checkpoints()), None)
        if self.checkpoint:
            self.state = read_json(self.checkpoint / "state.json")
            self.start = int(self.state["step"])
        for name in LOGS:
            _truncate(self.out / name, self.start if self.checkpoint else -1)

    def keep_date(self, tokenizer: Tokenizer) -> None:
        """Give a tokenizer whose template reads the date that of the run's first start: a run is a function of its
        config, on whatever day it goes on."""
        if "strftime_now" in (tokenizer.chat_template or ""):
            self.config.setdefault("date", tokenizer.now.isoformat(timespec="seconds"))
            tokenizer.now = datetime.fromisoformat(self.config["date"])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._append("metrics.jsonl", {"step": step, **metrics})

    def logged(self) -> list[dict]:
        """What metrics.jsonl holds of this run."""
        file = self.out / "metrics.jsonl"
        return read_jsonl(file) if file.exists() and file.stat().st_size else []

    def log_completion(self, step: int, **fields) -> None:
        self._append("completions.jsonl", {"step": step, **fields})

    def log_fault(self, step: int, **fields) -> None:
        self._append("faults.jsonl", {"step": step, **fields})

    def _append(self, name: str, record: dict) -> None:
        """One line; NaN and infinity become null, as JSON has neither."""
        self._begin()
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        # Half of a surrogate pair has no UTF-8; as a backslash and its code it is JSON again.
        with open(self.out / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _begin(self) -> None:
        if not self.begun:  # also on resume, which may bring other knobs
            write_json(self.out / "config.json", self.config)
            self.begun = True

    def save(
        self,
        step: int,
        model: Transformer,
        tokenizer: Tokenizer,
        optimizer: AdamW,
        more: Callable[[Path], object] | None = None,
        **state: float,
    ) -> Path:
        """Write the checkpoint after `step` updates, and drop the oldest beyond `keep`. `more` writes further files
        into its folder, and `state` is what `run.state` holds on resume."""
        self._begin()
        path = self.out / "checkpoints" / f"step-{step:06d}"
        with _whole_folder(path) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            save_file(optimizer.state_dict(), staging / "optimizer.safetensors")
            if more:
                more(staging)
            write_json(staging / "state.json", {"step": step, **state})
        self._drop_old()
        self.checkpoint = path
        return path

    def _checkpoints(self) -> list[Path]:
        """From the oldest. Steps are compared as numbers: as texts, step-1000000 comes before step-999999."""
        steps = {path: path.name.removeprefix("step-") for path in (self.out / "checkpoints").glob("step-*")}
        return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))

    def _drop_old(self) -> None:
        for old in self._checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, optimizer: AdamW, folder: str = "") -> None:
        """Load the optimizer's state of the checkpoint that the model was read from, or of a folder in it."""
        file = self.checkpoint / folder / "optimizer.safetensors"
        try:
            optimizer.load_state_dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is truncated or missing ({error}): remove {self.checkpoint} to resume earlier"
            ) from None

    def finish(self, model: Transformer, tokenizer: Tokenizer, folder: str = "model") -> Path:
        """Write a trained model to `folder`, for `minirl eval` or any other engine."""
        with _whole_folder(self.out / folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        return self.out / folder


def holds_run(out: str | Path) -> bool:
    """Tell whether anything of a run lies in a folder."""
    return any((Path(out) / name).exists() for name in ("config.json", "checkpoints", *LOGS))


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """`atomic_folder`, with a sentence for a full disk, of which safetensors has an exception of its own."""
    try:
        with atomic_folder(path) as staging:
            yield staging
    except SafetensorError as error:
        raise InputError(
            f"{path} could not be written ({error}): free some space; earlier checkpoints are intact"
        ) from None


def refuse_format(config: dict, out: Path) -> None:
    """An InputError for a run of another version, whose config, checkpoints or draws may mean something else."""
    found = config.get("format", 1)  # 0.1.0 wrote none
    if found != FORMAT:
        raise InputError(
            f"the run in {out} has format {found!r:.20}, and minirl {__version__} goes on with format {FORMAT} alone: "
            "resume it with the version that began it, or begin a new one with another --out"
        )


def refuse_unwritable(out: Path) -> None:
    """Said before the work, not after it."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise InputError(f"{place} is a file where the folder of the run must be: choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} is not writable: choose another --out, or change its permissions")


def _remove_half_written(path: Path) -> None:
    """What a write of `path` left beside it when it was killed."""
    for staging in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(staging) if staging.is_dir() else staging.unlink()


def _refuse_changes(old: dict, new: dict, file: Path) -> None:
    """Whatever decides the result must be as it was."""
    old, new = _flat(old), _flat(new)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}.difference(KNOBS)
    if changed == {"data_hash"}:
        raise InputError(f"the data of the run in {file.parent} has changed since it was started: restore its files")
    if changed:
        shown = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(changed - {"data_hash"}))
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
    for line in file.read_bytes().split(b"\n"):  # not splitlines: a completion may hold other line ends
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):  # bad JSON or UTF-8, no object, no step
            break
    write_atomic(file, lambda staging: staging.write_bytes(b"".join(kept)))


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


def shown(m: dict[str, float], name: str, digits: str) -> str:
    """A metric for a step line; what was not computed, or of nothing, is no number."""
    return "–" if math.isnan(m.get(name, math.nan)) else format(m[name], digits)


def due(done: int, steps: int, every: int) -> bool:
    """After `done` of the steps: at each `every`-th and at the last one; every = 0 is at the last one alone."""
    return done == steps or (every > 0 and done % every == 0)


def tenth(done: int, steps: int) -> bool:
    """As often as a run of many quick steps has a line for a person."""
    return due(done, steps, max(1, steps // 10))


def loop(
    run: Run,
    stage: str,
    steps: int,
    save_every: int,
    display: Display,
    step: Callable[[int], dict[str, float]],
    line: Callable[[int, dict[str, float]], str],
    save: Callable[[int], object],
) -> None:
    """The steps from run.start on: do, log, show, save. Ctrl-C saves after the step that is under way.

    `step` takes the number of the step, from 0, and returns its metrics; `line` and `save` take how many are done, and
    an empty line is not shown.
    """
    if run.start >= steps:
        display.line(f"the run in {run.out} is finished: all of its {steps} steps are done, none is left to resume")
    display.progress(stage, run.start, steps)
    with interruptible(display) as stop_requested:
        for done in range(run.start + 1, steps + 1):
            metrics = step(done - 1)
            run.log(done, metrics)
            display.progress(stage, done, steps)
            if text := line(done, metrics):
                display.line(text)
            stopping = stop_requested()  # asked once: what stops has saved
            if stopping or due(done, steps, save_every):
                save(done)
            if stopping and done < steps:
                go_on = f"continue with --resume --out {run.out}" if run.resumable else f"saved in {run.checkpoint}"
                display.line(f"stopped after step {done}; {go_on}")
                raise KeyboardInterrupt


def refuse_below_one(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name} = {getattr(config, name)}: it must be at least 1")


def refuse_not_positive(config, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name} = {getattr(config, name)}: it must be positive and finite")


def refuse_negative(config, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name} = {getattr(config, name)}: it must be finite and not negative")


def refuse_unknown_choices(config) -> None:
    """Of the fields that are a Literal; the command line looks itself, Python does not."""
    for f in fields(config):
        value = getattr(config, f.name)
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise InputError(f"{f.name} = {value!r} is unknown: choose from {', '.join(get_args(f.type))}")


def load(
    source: str | Path,
    dtype: str,
    device: str,
    scalar_head: bool | ScalarHead = False,
    config=None,
    run: Run | None = None,
) -> tuple[Transformer, Tokenizer]:
    """A checkpoint's model and tokenizer, which must belong together. The tokenizer puts the template variables and
    the system message of a command's `config` into every prompt, with the date of the `run`."""
    where = pick_device(device)
    model = Transformer.from_pretrained(source, pick_dtype(dtype, where), where, scalar_head)
    tokenizer = Tokenizer.from_pretrained(source)
    if config is not None:
        tokenizer.prompt_with(config.template, config.system)
    if run is not None:
        run.keep_date(tokenizer)
    model.active_vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    for stop in tokenizer.stop_ids:
        if stop >= model.active_vocab:
            raise InputError(
                f"{source}: stop token {stop} (eos_token_id) is outside the model's vocabulary of "
                f"{model.active_vocab}, so nothing would ever stop: correct generation_config.json or config.json"
            )
    return model, tokenizer


def pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"device {name!r} is unknown: choose from auto, cpu, cuda")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} was asked for and there is none: use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
