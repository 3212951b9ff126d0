"""One step of a run: what is logged of it, its updates, and where it can be cut and taken up again."""

import errno
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minirl.errors import InputError, NonFinite
from minirl.files import atomic_folder

SKIPS = 5  # updates in a row without a finite gradient stop a run that leaves them out
LEAST_TOKENS = 64  # of a micro-batch: below, each row is one by itself, and less memory is no longer to be had
LOGS = ("metrics.jsonl", "completions.jsonl", "faults.jsonl")


class Stopped(SystemExit):
    """A signal that ends a run; the exit code is the shell's, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Step:
    """One step of a run: its number from 0, what is to be logged of it, and how far it has come.

    A step with several updates keeps its batch (`keep`); from there on an error, a signal or a lack of memory cuts it
    between two updates, and it goes on with the same function of the same batch, in this process or a later one.
    """

    def __init__(self, run, number: int, total: int):
        """Begin a step, or take up again the one in whose middle the run's checkpoint was written."""
        self.run, self.number, self.total = run, number, total
        self.metrics: dict = {}
        self.records: dict[str, list[dict]] = {name: [] for name in LOGS[1:]}  # lines for the other logs
        self.is_untouched = False  # nothing of it has reached what is held: a signal may end it at once
        self.batch = None
        self.draws = 1  # batches of prompts that were drawn for it
        self.updates: list[dict | None] = []  # metrics of each; None: no token had a gradient, or it was not finite
        self.finished = False  # but for its lines in the logs
        self._within = run.state.get("within") if number == run.start else None
        for name, value in (self._within or {}).items():
            setattr(self, name, value)
        self._counted = run.updates
        self._part = ""  # that is timed

    @property
    def done(self) -> int:
        """Return how many steps are done with this one."""
        return self.number + 1

    @property
    def is_whole(self) -> bool:
        """Tell whether what is held is that after a number of updates that this step knows: a checkpoint can be made
        of it."""
        return self.finished or self.run.updates == self._counted

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
        """Measure a part of the step, as time/{part} in seconds; parts of one name add up."""
        started, self._part = time.perf_counter(), part
        yield
        self.add(**{f"time/{part}": self.metrics.get(f"time/{part}", 0.0) + time.perf_counter() - started})

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Promise that nothing within reaches what the run holds, so that it can be left at any time and done again."""
        self.run.stop_if_asked()
        self.is_untouched = True
        yield
        self.is_untouched = False

    def speed(self, part: str, tokens: float, over: str = "") -> None:
        """Log tokens_per_s/{part} over the time of a measured part, by default its own; NaN for no tokens."""
        seconds = self.metrics[f"time/{over or part}"]
        self.add(**{f"tokens_per_s/{part}": tokens / seconds if tokens else math.nan})

    # --- updates ----------------------------------------------------------------------------------------------------

    def attempt(self, take_step: Callable, config, *parts) -> None:
        """Call take_step(step, config, *parts). Where memory runs out, go on with half of `micro_batch_tokens`, and of
        `slots` where it was sampling, until there is nothing to halve."""
        while True:
            config, self.is_untouched = self.run.lowered(config), False
            try:
                return take_step(self, config, *parts)
            except Exception as error:
                sampling = self._part == "rollout" and hasattr(config, "slots")
                names = ["micro_batch_tokens", "slots"][: 1 + sampling]
                least = config.micro_batch_tokens <= LEAST_TOKENS and not (sampling and config.slots > 1)
                if least or not is_out_of_memory(error) or not self.is_whole:
                    raise
            # Here, where the error and the frames in its trace are gone, and with them what filled the memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.batch is None:  # all of it is done again
                self.metrics.clear()
                for lines in self.records.values():
                    lines.clear()
            self.run.halve(config, names)
            lower = " and ".join(f"{name} {value}" for name, value in self.run.lower.items())
            self.say(f"ran out of memory: it goes on with {lower}, and so does the run")

    def kept(self, load: Callable, *args):
        """Return the batch of a step that was cut, or None: `load(folder, *args)` reads one that a checkpoint holds."""
        if self.batch is None and self._within and not self.finished:
            self.batch = load(self.run.checkpoint, *args)
        return self.batch

    def keep(self, batch):
        """Keep the batch until the step is done: from now on it can be cut between two updates."""
        self.batch = batch
        return batch

    def remaining(self, parts: Iterable) -> Iterator:
        """Yield the parts of the batch whose update is not taken yet. A signal ends the run between two of them."""
        for number, part in enumerate(parts):
            if number >= len(self.updates):
                self.run.stop_if_asked()
                yield part

    def update(self, part, metrics: dict | None, optimizers: dict, config) -> None:
        """Take an update on a part of the batch by all optimizers, {metric of its norm: (optimizer, rate)}, or by none.

        None for metrics: no token has a gradient. A loss or gradient that is not finite stops the run, or is left out
        (config.on_nonfinite); the part is kept with `part.save(folder)`.
        """
        norms = {}
        if metrics is not None:
            try:
                for name in ("loss/total", "loss/value", "loss"):
                    if not math.isfinite(metrics.get(name, 0.0)):
                        raise NonFinite(f"the loss is {metrics[name]}")
                norms = {name: optimizer.grad_norm() for name, (optimizer, _) in optimizers.items()}
            except NonFinite as error:
                self._leave_out(part, error, config.on_nonfinite)
                metrics = None
                for optimizer, _ in optimizers.values():
                    optimizer.zero_grad()
            else:
                self.run.nonfinite = 0
                for name, (optimizer, rate) in optimizers.items():
                    optimizer.step(rate, config.clip_norm, norms[name])
        self.updates.append(None if metrics is None else metrics | norms)
        self._counted = self.run.updates

    def _leave_out(self, part, error: NonFinite, do: str) -> None:
        """Keep a part of the batch that has no finite gradient, and stop, unless it is left out."""
        run, kept = self.run, ""
        skipped = do == "skip" and run.nonfinite + 1 < SKIPS
        if skipped or run.done or self.updates:  # a run that stops before its first update leaves no folder
            run.write_config()
            folder = run.out / "nonfinite" / place_name(self.done, len(self.updates) + 1)
            with whole_folder(folder) as staging:
                part.save(staging)
            kept = f"; its rows are in {folder}"
        where = f"step {self.done}, update {len(self.updates) + 1}: {error}"
        if skipped:
            run.nonfinite += 1
            self.add(nonfinite=self.metrics.get("nonfinite", 0) + 1)
            run.display.line(f"{where}: left out{kept}")
            return
        advice = "--on-nonfinite skip leaves such updates out, --resume --fork --lr LOWER goes on with a lower rate"
        if do == "skip":
            where, advice = f"{where}, the {SKIPS}th in a row", "look at the data, the rewards and the learning rate"
        raise NonFinite(f"{where}{kept}: {advice}")

    def save(self, folder: Path) -> dict:
        """Write the batch into a checkpoint's folder; return the rest of what makes the step go on."""
        if not self.finished:
            self.batch.save(folder)
        return {name: getattr(self, name) for name in ("metrics", "records", "updates", "finished", "draws")}


# ---- what ends a step early ------------------------------------------------------------------------------------------

# Words of errors that have no class: of torch on a CPU, of C++, of CUDA, of other systems.
MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY))


# ---- its place on the disk -------------------------------------------------------------------------------------------


def place_name(step: int, update: int | None) -> str:
    """Name the checkpoint after so many steps, and so many updates of the next one."""
    return f"step-{step:06d}" + ("" if update is None else f"-update-{update}")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """`atomic_folder`, with the system's error where safetensors or tokenizers have only its number in a sentence."""
    try:
        with atomic_folder(path) as staging:
            yield staging
    except (OSError, InputError):
        raise
    except Exception as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), str(error), str(path)) from None
