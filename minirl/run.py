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
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from minirl import __version__
from minirl.errors import InputError
from minirl.files import atomic_folder, read_json, read_jsonl, write_atomic, write_json
from minirl.model import Transformer
from minirl.tokenizer import Tokenizer

LOGS = ("metrics.jsonl", "completions.jsonl", "faults.jsonl")
FREE_ON_RESUME = (
    "slots",
    "micro_batch_tokens",
    "recompute",
    "device",
    "save_every",
    "shown",
    "on_bad_reward",
)  # on resume
WRITTEN = ("config.json", *LOGS, "model", "reward_model", "checkpoints/step")  # atomically, from beside the place
FORMAT = 2  # of a run's folder: raised where this code could not take an older run up again to the same bits
TIMED = (
    "time/",
    "memory/",
    "tokens_per_s/",
)  # metrics that are measured, not computed: the only ones that differ between equal runs


def identity(config, examples: list) -> dict:
    """Return what config.json holds: the config, and a hash of the examples, as files may change under their names."""
    content = json.dumps(examples, skipkeys=True, default=lambda value: type(value).__name__)
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return {k: v for k, v in asdict(config).items() if k not in ("out", "resume")} | {"data_hash": digest}


Item = TypeVar("Item")


class Display:
    """Print what a person sees of a run; the lab brings livelier ones."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that `stage` is at done of total; called often."""

    def example(self, tokenizer: Tokenizer, prompt: Sequence[int], response, learned=None) -> None:
        """Show an example as the model reads it: token ids, and which of the response are learned (None: all). A number
        stands for a response of so many tokens at most that has yet to be sampled."""


class Observer:
    """Look at a run before its first step and after each; metrics that are returned are logged."""

    def begin(self, run: "Run") -> dict[str, float] | None:
        """Look at a run that is about to take its first step."""

    def after(self, step: "Step") -> dict[str, float] | None:
        """Look at a step that is done, before it is logged."""


def tracked(display: Display, stage: str, items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items, and show how many of them have been taken."""
    for i, item in enumerate(items):
        if i % 256 == 0:  # a bar costs as much as a short text
            display.progress(stage, i, len(items))
        yield item
    display.progress(stage, len(items), len(items))


class Run:
    """One run folder, and the loop of steps in it. `start` is the step to go on from; a fresh run starts at 0.

    `with Run(...) as run` restores and saves what it holds:

        policy = run.hold("policy", Policy.load(config, run))
        for step in run.steps("sft", config.steps, config.save_every):
            step.add(**train_on(policy, step.number))

    A held object has `save(folder)`, which writes into a checkpoint's folder and may return numbers for state.json, and
    `restore(folder, state)`.
    """

    def __init__(
        self,
        out: str | Path,
        config: dict,
        resume: bool = False,
        display: "Display | None" = None,
        observers: Sequence[Observer] = (),
        keep: int = 2,
    ):
        self.out, self.display, self.observers, self.keep = Path(out), display or Display(), observers, keep
        self.config = {"format": FORMAT, **json.loads(json.dumps(config))}  # as it will be read back
        self.checkpoint: Path | None = None
        self.start = 0
        self.state: dict = {}  # state.json of the checkpoint
        self.held: dict = {}
        self.step: Step | None = None  # the one under way
        self.example: tuple = ()  # arguments of `Display.example`, for an observer that shows one
        self.resumable = True  # by the options of a command, which a demo or a script may not have
        self._begun = False
        self._before: dict[str, float] | None = None  # metrics of `begin`
        self._open = ExitStack()
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

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Save where an error ends a step before the step has reached the model."""
        self._open.close()
        step = self.step
        if isinstance(error, InputError) and step and step.is_untouched and step.number > self.start:
            self.save(step.number)
            sentence = f"{error}; the {step.number} steps before it are saved: add --resume to go on from there"
            raise kind(sentence) from None

    def hold(self, name: str, thing):
        """Save `thing` with every checkpoint from now on; restore it from the checkpoint that the run goes on from."""
        if self.checkpoint:
            thing.restore(self.checkpoint, self.state)
        self.held[name] = thing
        return thing

    def begin(self, total: int, save_every: int) -> None:
        """Let the observers look before the first step; `steps` does it, unless a run has long work before them."""
        if self._before is None:
            self.total, self.save_every, self._before = total, save_every, {}
            for observer in self.observers:
                self._before |= observer.begin(self) or {}

    def observe(self, observer: Observer) -> None:
        """Add an observer to a run that has begun; it comes before the others, which may read its metrics."""
        self.observers = [observer, *self.observers]
        self._before |= observer.begin(self) or {}

    def steps(self, stage: str, total: int, save_every: int) -> "Iterator[Step]":
        """Yield the steps from `start` on; observe, log and save after each. Ctrl-C saves after the one under way.

        `stage` names the bar of progress. The metrics of `begin` are logged as those of step 0, with the first step: a
        run whose first step fails leaves no folder.
        """
        display = self.display
        if self.start >= total:
            display.line(
                f"the run in {self.out} is finished: all of its {total} steps are done, none is left to resume"
            )
        self.begin(total, save_every)
        display.progress(stage, self.start, total)
        stop_requested = self._open.enter_context(interruptible(display))
        for number in range(self.start, total):
            self.step = step = Step(self, number, total)
            yield step
            step.add(**{"memory/peak_gb": peak_memory_gb()})
            self._log(step, self._before if number == 0 else {})
            done = step.done
            display.progress(stage, done, total)
            stopping = stop_requested()  # asked once: what stops has saved
            if stopping or due(done, total, save_every):
                self.save(done)
            if stopping and done < total:
                go_on = f"continue with --resume --out {self.out}" if self.resumable else f"saved in {self.checkpoint}"
                display.line(f"stopped after step {done}; {go_on}")
                raise KeyboardInterrupt
        self._open.close()  # the next Ctrl-C is no longer about a step

    def _log(self, step: "Step", before: dict[str, float]) -> None:
        for name, records in step.records.items():
            for record in records:
                self._append(name, {"step": step.done, **record})
        if before:
            self.log(0, before)
        for observer in self.observers:
            step.add(**observer.after(step) or {})
        self.log(step.done, step.metrics)

    def keep_date(self, tokenizer: Tokenizer) -> None:
        """Give a tokenizer whose template reads the date that of the run's first start: a run is a function of its
        config, on whatever day it goes on."""
        if "strftime_now" in (tokenizer.chat_template or ""):
            self.config.setdefault("date", tokenizer.now.isoformat(timespec="seconds"))
            tokenizer.now = datetime.fromisoformat(self.config["date"])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._append("metrics.jsonl", {"step": step, **metrics})

    def logged(self) -> list[dict]:
        """Read what metrics.jsonl holds of this run."""
        file = self.out / "metrics.jsonl"
        return read_jsonl(file) if file.exists() and file.stat().st_size else []

    def _append(self, name: str, record: dict) -> None:
        """Write one line; NaN and infinity become null, as JSON has neither."""
        self._begin()
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        # Half of a surrogate pair has no UTF-8; as a backslash and its code it is JSON again.
        with open(self.out / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _begin(self) -> None:
        if not self._begun:  # also on resume, where what is free on resume may differ
            write_json(self.out / "config.json", self.config)
            self._begun = True

    def save(self, done: int) -> Path:
        """Write the checkpoint after `done` steps with all that is held, and drop the oldest beyond `keep`."""
        self._begin()
        path = self.out / "checkpoints" / f"step-{done:06d}"
        with _whole_folder(path) as staging:
            state = {"step": done}
            for thing in self.held.values():
                state |= thing.save(staging) or {}
            write_json(staging / "state.json", state)
        self._drop_old()
        self.checkpoint = path
        return path

    def _checkpoints(self) -> list[Path]:
        """List them from the oldest. Steps are compared as numbers: as texts, step-1000000 comes before step-999999."""
        steps = {path: path.name.removeprefix("step-") for path in (self.out / "checkpoints").glob("step-*")}
        return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))

    def _drop_old(self) -> None:
        for old in self._checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def finish(self, model: Transformer, tokenizer: Tokenizer, folder: str = "model") -> Path:
        """Write a trained model to `folder`, for `minirl eval` or any other engine."""
        with _whole_folder(self.out / folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        return self.out / folder


class Step:
    """One step of a run: its number from 0, and what is to be logged of it."""

    def __init__(self, run: Run, number: int, total: int):
        self.run, self.number, self.total = run, number, total
        self.metrics: dict = {}
        self.records: dict[str, list[dict]] = {name: [] for name in LOGS[1:]}  # lines for the other logs
        self.is_untouched = False  # nothing of it has reached what is held: an error saves the steps before it

    @property
    def done(self) -> int:
        """Return how many steps are done with this one."""
        return self.number + 1

    def due(self, every: int) -> bool:
        """Tell whether something is due after this step that comes `every` so many steps; 0 is never."""
        return every > 0 and self.done % every == 0

    def add(self, **metrics: float) -> None:
        self.metrics |= metrics

    def record(self, log: str, **fields) -> None:
        """Keep a line for a log such as "completions.jsonl" until the step is over."""
        self.records[log].append(fields)

    def say(self, sentence: str) -> None:
        self.run.display.line(f"step {self.done} {sentence}")

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows how far a part of this step is."""
        return lambda done, total: self.run.display.progress(stage, done, total)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Measure a part of the step, as time/{part} in seconds."""
        started = time.perf_counter()
        yield
        self.add(**{f"time/{part}": time.perf_counter() - started})

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Promise that nothing within reaches what the run holds, so that an error in it costs no step before it."""
        self.is_untouched = True
        yield
        self.is_untouched = False  # not where an error passes: `Run.__exit__` reads it

    def speed(self, part: str, tokens: float, over: str = "") -> None:
        """Log tokens_per_s/{part} over the time of a measured part, by default its own; NaN for no tokens."""
        seconds = self.metrics[f"time/{over or part}"]
        self.add(**{f"tokens_per_s/{part}": tokens / seconds if tokens else math.nan})


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
    """Refuse a run of another version, whose config, checkpoints or draws may mean something else."""
    found = config.get("format", 1)  # 0.1.0 wrote none
    if found != FORMAT:
        raise InputError(
            f"the run in {out} has format {found!r:.20}, and minirl {__version__} goes on with format {FORMAT} alone: "
            "resume it with the version that began it, or begin a new one with another --out"
        )


def refuse_unwritable(out: Path) -> None:
    """Raise an InputError where a run could not be written, before the work and not after it."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise InputError(f"{place} is a file where the folder of the run must be: choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} is not writable: choose another --out, or change its permissions")


def _remove_half_written(path: Path) -> None:
    """Remove what a write of `path` left beside it when it was killed."""
    for staging in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(staging) if staging.is_dir() else staging.unlink()


def _refuse_changes(old: dict, new: dict, file: Path) -> None:
    """Raise an InputError where a field that decides the result is not as it was."""
    old, new = _flat(old), _flat(new)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}.difference(FREE_ON_RESUME)
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
    """Return the largest memory of this process so far in GB: allocated on the GPU where there is one, else
    resident."""
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


def due(done: int, steps: int, every: int) -> bool:
    """Tell whether something is due after `done` steps: every so many, and after the last; 0 is after the last
    alone."""
    return done == steps or (every > 0 and done % every == 0)
