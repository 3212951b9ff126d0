"""The folder of a run: its config, metrics.jsonl, sampled completions, and checkpoints that resume to the same bits.

    runs/x/config.json  metrics.jsonl  completions.jsonl  checkpoints/step-000040/{config.json, model.safetensors,
    tokenizer.json, ..., optimizer.safetensors, state.json}  model/

A checkpoint is a Hugging Face directory with the optimizer's state beside it. It appears whole or not at all; lines
that were logged after it are dropped on resume, so that a killed and resumed run leaves the same files as one that was
not. The folder begins with the first line that is logged: a run that fails before it leaves none.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch

from minirl import __version__
from minirl.errors import InputError, told
from minirl.files import clear_left, json_line, read_json, remove_folder, write_json
from minirl.manifest import (
    MANIFEST,
    LogEnd,
    damage,
    digest_of,
    read_end,
    read_manifest,
    read_signed,
    seal,
    write_signed,
)
from minirl.model import Transformer
from minirl.step import LOGS, Step, Stopped, place_name, whole_folder
from minirl.tokenizer import Tokenizer

FREE_ON_RESUME = (
    "slots",
    "micro_batch_tokens",
    "recompute",
    "device",
    "save_every",
    "shown",
    "on_bad_reward",
    "on_nonfinite",
)
FORKED = {  # what --fork lets change
    *("steps", "lr", "critic_lr", "warmup", "schedule", "weight_decay", "clip_norm", "target_kl"),
    *("eval_every", "reward_timeout"),
}
WRITTEN = ("config.json", "model", "reward_model", "checkpoints/step-*", "nonfinite/step-*")  # from beside the place
FULL_DISK_WAIT = 600  # seconds
FORMAT = 3  # of a run's folder: raised where this code could not take an older run up again to the same bits
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
            step.attempt(sft_step, config, policy)

    A held object has `save(folder)`, which writes into a checkpoint's folder and may return numbers for state.json, and
    `restore(folder, state)`. An error that ends the run saves before it is raised; so does SIGTERM or SIGHUP.
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
        self._fork = self.config.pop("fork", False)
        self.checkpoint: Path | None = None
        self.start = self.done = self.saved = 0  # steps: at the start, with their lines in the logs, in a checkpoint
        self.state: dict = {}  # state.json of the checkpoint
        self.held: dict = {}
        self.step: Step | None = None  # the one under way, until it is logged
        self.example: tuple = ()  # arguments of `Display.example`, for an observer that shows one
        self.resumable = True  # by the options of a command, which a demo or a script may not have
        self.signal = 0  # that asked to stop
        self.lower: dict[str, int] = {}  # options that were halved as memory ran out
        self.nonfinite = 0  # updates in a row that were skipped
        self._logs = {name: LogEnd() for name in LOGS}
        self._begun, self._resumed = False, resume
        self._lock: Callable | None = None  # gives it back
        self._before: dict[str, float] | None = None  # metrics of `begin`
        self._open = ExitStack()
        refuse_unwritable(self.out)
        if resume:
            try:
                self._resume()
            except BaseException:
                self._give_back()
                raise
        elif holds_run(self.out):
            raise InputError(f"{self.out} already holds a run: add --resume to continue it, or choose another --out")

    def _resume(self) -> None:
        """Find the last checkpoint that is whole, and make the folder what it was then."""
        file = self.out / "config.json"
        old = read_run_config(self.out)
        self._take_folder()
        self.config |= {name: old[name] for name in ("date", "forks") if name in old}
        changed = _refuse_changes(old, self.config, file, self._fork)
        self._clear()
        self.checkpoint = self._last_whole(old)
        self._drop_old()
        if self.checkpoint:
            self.state = read_json(self.checkpoint / "state.json")
            self.start = self.done = self.saved = self.state["step"]
            self.nonfinite = self.state.get("nonfinite", 0)
        if changed:
            if changed.get("steps", (0, self.start))[1] < self.start:
                raise InputError(f"steps = {changed['steps'][1]}: the run in {self.out} has taken {self.start} already")
            said = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            self.display.line(f"from step {self.start + 1} on: {said} (config.json keeps both)")
            self.config["forks"] = [*self.config.get("forks", []), {"step": self.start, **changed}]
            self.write_config()
        for name in LOGS:
            if (log := self.out / name).exists() and log.stat().st_size > self._logs[name].bytes:
                os.truncate(log, self._logs[name].bytes)

    @property
    def _place(self) -> Path:
        return self.out / "checkpoints"

    @staticmethod
    def _digest(config: dict) -> str:
        """Return the digest of what decides a run, but for what may change on resume."""
        return digest_of({k: v for k, v in config.items() if k not in FORKED | {*FREE_ON_RESUME, "forks", "date"}})

    def _last_whole(self, config: dict) -> Path | None:
        """Return the newest checkpoint that is what was written by a run of this config, with logs that are; say which
        newer ones are not, and set them aside. None for a run that has none yet."""
        damaged, run = {}, self._digest(config)
        if self._place.exists() and not self._place.is_dir():
            raise InputError(f"{self._place} is no folder: restore it")
        for path, (step, update) in reversed(self._checkpoints().items()):
            if not (problem := damage(path, step, update, run)):
                known = read_manifest(path)["logs"]
                self._logs = {name: read_end(self.out / name, known[name]["bytes"]) for name in LOGS}
                there = [name for name in LOGS if os.path.lexists(self.out / name)]
                missing = [name for name in LOGS if name not in there and known[name]["bytes"]]
                if wrong := [n for n in there if self._logs[n].entry != known[n] or not (self.out / n).is_file()]:
                    problem = f"{wrong[0]} has changed in its first {known[wrong[0]]['bytes']:,} bytes"
            if not problem:
                for name in missing:
                    self.display.line(f"{self.out / name} is missing: its lines up to step {step} are lost")
                break
            damaged[path] = f"{path.name} is damaged ({problem})"
        else:
            path = None
        newest = path.name if path else ""
        for other in self._place.glob("step-*"):  # neither a checkpoint nor older than the one to go on from
            if other not in self._checkpoints() and re.fullmatch("step-[0-9]{6,}", other.name) and other.name > newest:
                self.display.line(f"{other.name} is no checkpoint of minirl and left alone")
        if not damaged:
            return path
        said = "; ".join(damaged.values())
        if path is None:
            raise InputError(
                f"no checkpoint of the run in {self.out} is whole: {said}: restore the files, move a log that has "
                "changed away to go on without its lines, or begin a new run with another --out"
            )
        for bad in damaged:
            set_aside(bad)
        self.display.line(f"{said} and set aside: going on from {path.name}")
        return path

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Save what an error or a signal leaves whole, and add to its sentence what is saved. A second SIGTERM does not
        end that."""
        try:
            if isinstance(error, Exception | Stopped) and (said := self._rescue_or_say()):
                if isinstance(error, InputError):
                    raise kind(f"{error}; {said}") from None
                if isinstance(error, Stopped):
                    with suppress(OSError):  # the terminal may be gone
                        self.display.line(f"stopped by {error.name}; {said}")
                error.add_note(said)  # the command line adds it to its sentence
        finally:
            self._open.close()
            self._give_back()

    def _rescue_or_say(self) -> str:
        try:
            return self.rescue()
        except (Exception, KeyboardInterrupt) as second:
            last = f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
            return f"saving failed too ({told(second)}): {last}"

    def rescue(self) -> str:
        """Save what is whole, also in the middle of a step; say so. Wait for space on a full disk."""
        step = self.step
        if step and not step.is_whole:
            last = f"the run goes on from {self.checkpoint} with --resume" if self.checkpoint else "nothing is saved"
            return f"it came in the middle of an update, after which nothing is whole: {last}"
        within = (
            step if step and (step.finished or (step.batch is not None and self.done + len(step.updates))) else None
        )
        if within or self.done > self.saved:
            self._wait_for_space(lambda: self.save(self.done, within))
        elif not self.done:
            return ""
        saved = [f"the {self.done} step{'s' * (self.done > 1)}{' before it' if step else ''}"] if self.done else []
        if within:
            taken = f"{len(within.updates)} of its updates" if within.updates else "its batch"
            saved.append("the step itself" if within.finished else taken)
        return f"{' and '.join(saved)} are saved: add --resume to go on from there"

    def _wait_for_space(self, save: Callable) -> None:
        """Try to save for ten minutes while the disk is full."""
        until, self.signal = time.monotonic() + FULL_DISK_WAIT, 0
        while True:
            try:
                return save()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until or self.signal:
                    raise
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self.display.line(f"the disk of {self.out} is full: free some space, and the run is saved; Ctrl-C gives up")
            time.sleep(FULL_DISK_WAIT / 60)

    def hold(self, name: str, thing):
        """Save `thing` with every checkpoint from now on; restore it from the checkpoint that the run goes on from."""
        if self.checkpoint:
            thing.restore(self.checkpoint, self.state)
        self.held[name] = thing
        return thing

    @property
    def updates(self) -> int:
        """Count the updates of all optimizers that are held."""
        optimizers = (getattr(thing, "optimizer", None) for thing in self.held.values())
        return sum(optimizer.updates for optimizer in optimizers if optimizer is not None)

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
        """Yield the steps from `start` on; observe, log and save after each. Ctrl-C saves after the one under way,
        SIGTERM and SIGHUP sooner, where a step can be cut.

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
        stop_requested = self._open.enter_context(interruptible(display, self._signalled))
        for number in range(self.start, total):
            self.step = step = Step(self, number, total)
            if not step.finished:  # a step that was cut may have only its lines left to do
                yield step
                step.finished = True
            step.add(**{"memory/peak_gb": peak_memory_gb()})
            self._log(step, self._before if number == 0 else {})
            self.step, self.done = None, step.done
            done = step.done
            display.progress(stage, done, total)
            stopping = stop_requested()  # asked once: what stops has saved
            if stopping or self.signal or due(done, total, save_every):
                self.save(done)
            self.stop_if_asked()
            if stopping and done < total:
                go_on = f"continue with --resume --out {self.out}" if self.resumable else f"saved in {self.checkpoint}"
                display.line(f"stopped after step {done}; {go_on}")
                raise KeyboardInterrupt
        self._open.close()  # the next Ctrl-C is no longer about a step

    def _signalled(self, number: int, frame) -> None:
        """End the run at SIGTERM or SIGHUP: in a part of a step that reaches nothing at once, else where the step can
        be cut."""
        self.signal = number
        if self.step and self.step.is_untouched:
            self.step.is_untouched = False  # a second signal changes nothing
            raise Stopped(number)

    def stop_if_asked(self) -> None:
        """End the run where a signal has asked for it."""
        if self.signal:
            raise Stopped(self.signal)

    def lowered(self, config):
        """Return the config with the options that were halved as memory ran out."""
        lower = {name: value for name, value in self.lower.items() if hasattr(config, name)}
        return replace(config, **lower) if lower else config

    def halve(self, config, names: Sequence[str]) -> None:
        """Halve options of memory from now on, in the run's config too, and save: what is resumed goes on with them."""
        self.lower |= {name: max(1, getattr(config, name) // 2) for name in names}
        self.config |= self.lower
        self._begun = False  # config.json is written again
        for thing in self.held.values():
            if hasattr(thing, "config"):
                thing.config = self.lowered(thing.config)
            if hasattr(thing, "halve"):
                thing.halve()
            if getattr(thing, "optimizer", None) is not None:
                thing.optimizer.zero_grad()
        self.rescue()

    def _log(self, step: "Step", before: dict[str, float]) -> None:
        for observer in self.observers:
            step.add(**observer.after(step) or {})
        lines = {name: [{"step": step.done, **record} for record in step.records[name]] for name in LOGS[1:]}
        lines["metrics.jsonl"] = ([{"step": 0, **before}] if before else []) + [{"step": step.done, **step.metrics}]
        self._append(lines)

    def keep_date(self, tokenizer: Tokenizer) -> None:
        """Give a tokenizer whose template reads the date that of the run's first start: a run is a function of its
        config, on whatever day it goes on."""
        if "strftime_now" in (tokenizer.chat_template or ""):
            self.config.setdefault("date", tokenizer.now.isoformat(timespec="seconds"))
            tokenizer.now = datetime.fromisoformat(self.config["date"])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._append({"metrics.jsonl": [{"step": step, **metrics}]})

    def _append(self, records: dict[str, list[dict]]) -> None:
        """Write lines to the logs; NaN and infinity become null, as JSON has neither. Where this fails, none of them
        counts: a checkpoint knows how long each log was."""
        self.write_config()
        content = {name: b"".join(map(_line, some)) for name, some in records.items()}
        for name, lines in content.items():
            if lines:
                with open(self.out / name, "ab") as file:
                    if file.tell() > self._logs[name].bytes:  # an append that failed has left a part of itself
                        file.truncate(self._logs[name].bytes)
                    elif file.tell() < self._logs[name].bytes:  # somebody has cut or removed the log
                        self._logs[name] = read_end(self.out / name, file.tell())
                    file.write(lines)
        for name, lines in content.items():
            self._logs[name].add(lines)

    def write_config(self) -> None:
        if not self._begun:  # also on resume, where what is free on resume may differ
            self._take_folder()
            write_signed(self.out / "config.json", self.config)
            self._begun = True

    def _take_folder(self) -> None:
        """Lock the folder for this process, however it ends; InputError where another one runs it, or has just begun
        a run in it."""
        if self._lock:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        place = os.open(self.out, os.O_RDONLY)
        self._lock = weakref.finalize(self, os.close, place)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process runs {self.out}: wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            self.display.line(f"{self.out} cannot be locked ({error.strerror}): start no second process on it")
        if not self._resumed:
            if holds_run(self.out):
                raise InputError(f"another process has just begun a run in {self.out}: choose another --out")
            self._clear()

    def _clear(self) -> None:
        """Remove what writes left that were killed."""
        for name in WRITTEN:
            clear_left(self.out / name)

    def _give_back(self) -> None:
        """Unlock the folder."""
        if self._lock:
            self._lock = self._lock()  # None

    def save(self, done: int, within: "Step | None" = None) -> Path:
        """Write the checkpoint after `done` steps with all that is held, and drop the oldest beyond `keep`. `within`
        adds a step that has begun: its batch, and what its updates have measured."""
        self._begun &= (self.out / "config.json").exists()  # somebody may have taken the folder away
        self.write_config()
        update = len(within.updates) if within else None
        path = self._place / place_name(done, update)
        if os.path.lexists(path) and path not in self._checkpoints():  # somebody's own
            set_aside(path)
        with whole_folder(path) as staging:
            state = {"step": done, "nonfinite": self.nonfinite}
            for thing in self.held.values():
                state |= thing.save(staging) or {}
            if within:
                state["within"] = within.save(staging)
            write_json(staging / "state.json", state)
            seal(staging, done, update, self._logs, self._digest(self.config))
        self.checkpoint = path
        if not within:
            self.saved = done
        self._drop_old()
        return path

    def _checkpoints(self) -> dict[Path, tuple[int, int | None]]:
        """List them from the oldest, with their step and, in the middle of the next one, its updates. What minirl has
        not written does not count."""
        found = {}
        for path in self._place.glob("step-*"):
            if match := re.fullmatch(r"step-([0-9]{6,})(?:-update-([0-9]+))?", path.name):
                place = int(match[1]), None if match[2] is None else int(match[2])
                if path.name == place_name(*place) and any((path / name).exists() for name in (MANIFEST, "state.json")):
                    found[path] = place
        # Compared as numbers: as texts, step-1000000 comes before step-999999.
        return dict(sorted(found.items(), key=lambda item: (item[1][0], -1 if item[1][1] is None else item[1][1])))

    def _drop_old(self) -> None:
        for old in list(self._checkpoints())[: -self.keep]:
            try:
                old.unlink() if old.is_symlink() else remove_folder(old)
            except OSError as error:
                self.display.line(f"{old} cannot be removed ({error.strerror}): remove it yourself")

    def finish(self, model: Transformer, tokenizer: Tokenizer, folder: str = "model") -> Path:
        """Write a trained model to `folder`, for `minirl eval` or any other engine."""
        with whole_folder(self.out / folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        return self.out / folder


def holds_run(out: str | Path) -> bool:
    """Tell whether anything of a run lies in a folder."""
    return any((Path(out) / name).exists() for name in ("config.json", "checkpoints", *LOGS))


def set_aside(path: Path) -> None:
    """Rename what stands in the place of a checkpoint and is none."""
    path.rename(_unused(path.with_name(f"set-aside-{path.name}")))


def _unused(path: Path) -> Path:
    """Return a path of which nothing is there yet."""
    return next(p for p in (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))) if not p.exists())


def _line(record: dict) -> bytes:
    """Return a record as a line; NaN and infinity become null."""
    return json_line({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})


def read_run_config(out: Path) -> dict:
    """Return the config of a run that can be resumed: one of this version, as checkpoints or draws of another may mean
    something else. InputError where there is none, and where somebody has changed it."""
    file = out / "config.json"
    if not os.path.lexists(file):
        raise InputError(f"{out} holds no run to resume: check --out, or leave --resume away")
    config = read_json(file) if file.is_file() else {}
    found = config.get("format", 1)  # 0.1.0 wrote none
    if found != FORMAT and config:
        raise InputError(
            f"the run in {out} has format {found!r:.20}, and minirl {__version__} goes on with format {FORMAT} alone: "
            "resume it with the version that began it, or begin a new one with another --out"
        )
    return read_signed(file)


def refuse_unwritable(out: Path) -> None:
    """Raise an InputError where a run could not be written, before the work and not after it."""
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link to nothing: make its target, or choose another --out")
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise InputError(f"{place} is a file where the folder of the run must be: choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} is not writable: choose another --out, or change its permissions")


def _refuse_changes(old: dict, new: dict, file: Path, fork: bool) -> dict[str, tuple]:
    """Raise an InputError where a field that decides the result is not as it was; return those that `fork` lets
    change, with their old and new values."""
    old, new = _flat(old), _flat(new)
    changed = sorted({k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}.difference(FREE_ON_RESUME))
    forked = {k: (old.get(k), new.get(k)) for k in changed if fork and k in FORKED}
    refused = [k for k in changed if k not in forked]
    if refused == ["data_hash"]:
        raise InputError(f"the data of the run in {file.parent} has changed since it was started: restore its files")
    if refused:
        shown = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in refused if k != "data_hash")
        hint = ", or add --fork to go on with what is new" if set(refused) <= FORKED else ""
        hint = f"; --fork changes {', '.join(sorted(FORKED))} alone" if fork else hint
        sentence = f"the run in {file.parent} was started with another config ({shown}): resume it unchanged{hint}"
        raise InputError(sentence)
    return forked


def _flat(config: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def peak_memory_gb() -> float:
    """Return the largest memory of this process so far in GB: allocated on the GPU where there is one, else
    resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def interruptible(display: Display, signalled: Callable | None = None) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop after the current step; the second one stops at once. SIGTERM and
    SIGHUP do the same, or what `signalled(number, frame)` does."""
    requested = []

    def request(signum, frame) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(True)
        display.line("stopping after this step and saving; press Ctrl-C again to stop at once")

    handlers = {signal.SIGINT: request} | dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signalled or request)
    try:  # nohup has SIGHUP ignored, and so it stays
        before = {n: signal.signal(n, f) for n, f in handlers.items() if signal.getsignal(n) != signal.SIG_IGN}
    except ValueError:  # not in the main thread: nothing to catch there
        yield lambda: False
        return
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(done: int, steps: int, every: int) -> bool:
    """Tell whether something is due after `done` steps: every so many, and after the last; 0 is after the last
    alone."""
    return done == steps or (every > 0 and done % every == 0)
