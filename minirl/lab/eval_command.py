"""Measure one checkpoint, or two side by side, and write every completion: `minirl eval`."""

import contextlib
import itertools
import json
import platform
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from minirl import __version__
from minirl.config import Count, SamplingConfig, TaskConfig, Whole
from minirl.errors import InputError
from minirl.evaluate import Evaluation, completion_records, evaluate, numbers
from minirl.files import contents, write_json, write_jsonl
from minirl.lab.display import RichDisplay, print_table
from minirl.lab.rewards import load_reward
from minirl.lab.tasks import parse_task
from minirl.lab.training import say_notes
from minirl.metrics import shown
from minirl.policy import load
from minirl.prompts import measure
from minirl.rollout import Rollout
from minirl.run import (
    identity,
    refuse_unwritable,
)
from minirl.sampler import Sampler, SamplingParams
from minirl.step import Stopped
from minirl.task import Task

EVALUATION = ("completions.jsonl", "eval.json")
LENGTHS = (  # label, metric, format
    ("tokens, mean", "len_mean", ".1f"),
    ("tokens, 95th percentile", "len_p95", ".1f"),
    ("tokens of right ones", "len_correct_mean", ".1f"),
    ("tokens of wrong ones", "len_wrong_mean", ".1f"),
    ("ended by themselves", "stop_frac", ".1%"),
    ("cut off", "truncated_frac", ".1%"),
    ("without a score", "unscored_frac", ".1%"),
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingConfig, TaskConfig):
    """Accuracy of a checkpoint on a task's held-out problems: greedy, mean@k, pass@k and maj@k with 95 % intervals."""

    compare: str | None = None
    """A second checkpoint, on the same prompts with the same seeds: the differences have intervals of their own."""
    scorer: str | None = None
    """Score by another rule than the task's, one that training never used: its name, or file.py:function. Votes of
    maj@k are the task's answers all the same."""
    out: str | None = None
    """Folder of completions.jsonl and eval.json; None is the first that is free of runs/eval-1, runs/eval-2, ..."""
    prompts: Count = 256
    """Held-out prompts, at most."""
    samples: Count = 8
    """Completions a prompt (k)."""
    temperature: float = 1.0
    """Temperature of the k samples; the greedy completion comes on top."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the checker sees what comes before them."""
    ties: Literal["expected", "first"] = "expected"
    """Count answers with equally many votes as the share of right ones among them, or take the one that came first."""
    overlong_prompts: Literal["stop", "drop"] = "stop"
    """A prompt that leaves no room for a completion in the context of a model: stop, or leave it out."""
    on_bad_reward: Literal["stop", "skip", "strict"] = "stop"
    """A reward that raises, or returns infinity or a text, stops the evaluation, or leaves its completion without a
    score (skip); strict also stops at None, NaN and what takes too long."""
    shown: Whole = 4
    """Completions to print."""
    json: bool = False
    """Print the numbers as one JSON object."""

    def __post_init__(self):
        super().__post_init__()
        if (self.scorer or "").startswith("model:"):
            raise InputError(f"--scorer {self.scorer}: a reward model says neither right nor wrong: give a rule")


def evaluation(c: EvalConfig) -> None:
    task, models = _evaluation_task(c), [c.model, c.compare] if c.compare else [c.model]
    records, results, folder = [], [], None
    with RichDisplay(Console(stderr=c.json)) as display, _terminable(display):  # stdout is for the numbers
        if not c.scorer:
            say_notes(task, display)
        task, loaded = _completable(c, task, models, display)
        about = {"config": identity(c, contents(task.heldout)), "versions": _versions()}
        for i, model in enumerate(models, 1):
            sampled: list[Rollout] = []
            try:
                results.append(_measured(c, loaded.pop() if loaded else _sampler(c, model), task, sampled, display))
            finally:  # also what Ctrl-C, or a reward that fails, leaves without a score
                if sampled:
                    folder = folder or _new_folder(c.out)
                    records += completion_records(model, sampled, task)
                    write_jsonl(folder / EVALUATION[0], records)
                if folder and len(results) < i:
                    display.line(f"what was sampled so far is in {folder / EVALUATION[0]}")
            write_json(folder / EVALUATION[1], about | numbers(results))
    if c.json:
        print(json.dumps(numbers(results)))
        return
    if c.compare:
        display.line(f"model: {c.model}\nother: {c.compare}")
    _show_accuracies(c, task, results)
    _show_completions(c, results, display)
    print(f"written: {folder}")


@contextlib.contextmanager
def _terminable(display: RichDisplay) -> Iterator[None]:
    """Let the first SIGTERM or SIGHUP end the evaluation where it is, as Ctrl-C does: what was sampled is written."""

    def stop(number, frame) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: nothing to catch there
        pass
    try:
        yield
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # the terminal may be gone
            display.line(f"stopped by {stopped.name}")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluation_task(c: EvalConfig) -> Task:
    """Return the task with the scorer that was asked for. A wrong --out is refused here, before the work."""
    if c.out and any((Path(c.out) / name).exists() for name in EVALUATION):
        raise InputError(f"{c.out} already holds an evaluation: choose another --out")
    refuse_unwritable(Path(c.out or "runs/eval-1"))
    task = parse_task(c.task)
    return replace(task, correct=load_reward(c.scorer)) if c.scorer else task


def _completable(c: EvalConfig, task: Task, models: Sequence[str], display: RichDisplay) -> tuple[Task, list]:
    """Return the task with the held-out prompts that every model can complete, and the first model's sampler.

    The second model is loaded first, and dropped: what is wrong with it is said before the first has cost its time.
    """
    loaded: list[tuple[Sampler, SamplingParams]] = []
    for model in reversed(models):
        loaded.clear()  # one checkpoint at a time is in memory
        loaded.append(_sampler(c, model))
        sampler = loaded[0][0]
        prompts = measure(task, "heldout", sampler.tokenizer, sampler.model.config, c, display, c.prompts)
        task = replace(task, heldout=prompts.examples)
    return task, loaded


def _sampler(c: EvalConfig, model: str) -> tuple[Sampler, SamplingParams]:
    transformer, tokenizer = load(model, c.dtype, c.device, config=c)
    params = c.sampling_params(c.samples, stop_ids=tokenizer.stop_ids, seed=c.seed)
    return Sampler(transformer, c.slots, tokenizer=tokenizer), params


def _new_folder(out: str | None) -> Path:
    """Make the first of runs/eval-1, runs/eval-2, ... that is free, also where another evaluation does so now."""
    if out:
        return Path(out)
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (folder := Path(f"runs/eval-{n}")).mkdir(parents=True)
            return folder


def _measured(
    c: EvalConfig,
    model: tuple[Sampler, SamplingParams],
    task: Task,
    sampled: list[Rollout],
    display: RichDisplay,
) -> Evaluation:
    """Evaluate one checkpoint. No caller holds it, so that it has left memory before the next one is loaded."""
    sampler, params = model
    return evaluate(
        sampler,
        sampler.tokenizer,
        task,
        params,
        task.heldout,
        timeout=c.reward_timeout,
        on_bad=c.on_bad_reward,
        progress=lambda done, total: display.progress("evaluation", done, total),
        ties=c.ties,
        curve=True,
        sampled=sampled,
        name=c.scorer or "correct",
    )


def _show_accuracies(c: EvalConfig, task: Task, results: Sequence[Evaluation]) -> None:
    title = f"{task.name}: {len(results[0].correct)} held-out prompts, k = {c.samples}, T = {c.temperature:g}"
    title += f", top-p {c.top_p:g}" if c.top_p < 1 else ""
    title += f", scored by {c.scorer}" if c.scorer else ""
    differences = results[0].over(results[1]) if c.compare else {}
    rows = []
    for name in results[0].values:
        cells = [x for r in results for x in (f"{r.metrics[name]:.3f}", "{:.3f} to {:.3f}".format(*r.intervals[name]))]
        if c.compare:
            mean, low, high = differences[name]
            cells += [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        rows.append((name.removeprefix("eval/"), *cells))
    names = ("model", "other", "difference") if c.compare else ("value",)
    print_table(title, ("accuracy", *(x for name in names for x in (name, "95 % interval"))), rows)
    if c.compare:
        apart = [name.removeprefix("eval/") for name, (_, low, high) in differences.items() if low > 0 or high < 0]
        print(f"the interval of the difference excludes 0 for {', '.join(apart) or 'none of them'}")
    if any(r.graded for r in results):
        print(
            "scores other than 0 and 1: mean and greedy are mean scores, pass@k and maj@k count a score of 1 as right"
        )
    rows = [(label, *(shown(r.metrics, f"eval/{name}", digits) for r in results)) for label, name, digits in LENGTHS]
    print_table("completions", ("", *names[: len(results)]), rows)


def _show_completions(c: EvalConfig, results: Sequence[Evaluation], display: RichDisplay) -> None:
    for result in results:
        for line in result.rollout.fault_lines().values():
            display.line(line)
    for i in range(min(c.shown, len(results[0].correct))):
        display.line(f"\n{prompt_text(results[0].rollout.examples[i]['prompt'])}")
        for who, result in zip(("model ", "other ") if c.compare else ("",), results, strict=True):
            first = result.correct[i][0]
            mark = {1: "right", 0: "wrong"}.get(first, "unscored" if np.isnan(first) else f"score {first:g}")
            display.line(f"{who}[{mark}] {result.rollout.texts[i * c.samples]}")


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("torch", "tokenizers", "numpy")}
    return {"python": platform.python_version(), "minirl": __version__, **packages}


def prompt_text(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
