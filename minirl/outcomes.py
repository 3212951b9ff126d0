"""Completions that a rule has checked: data for offline RL, for reward models and for preferences.

    training prompts -> k completions each -> right or wrong -> samples.jsonl   every one, with its log-probs
                                                             -> labels.jsonl    each once: pointwise and bce
                                                             -> pairs.jsonl     right beside wrong: pairwise, prefer

The completions are appended to samples.part.jsonl as soon as they are checked, and that file becomes samples.jsonl in
the end: a command that was stopped or killed goes on there when it is given again, and writes the same files. Only one
CHUNK of prompts is in memory.

Each text has its tokens beside it, stop token or stop text included, so that training reads what was sampled. A
completion that was cut at max_tokens has no end that could be learned, so it is in no pair. Among the labels it stays,
with the rule's verdict: a reward model meets such ones too.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from minirl import __version__
from minirl.config import Count, SamplingConfig, TaskConfig, Whole
from minirl.errors import InputError
from minirl.files import json_line, read_json, write_atomic, write_json
from minirl.model import Transformer
from minirl.policy import load
from minirl.prompts import measure
from minirl.rewards import score_rollout
from minirl.rollout import Rollout, sample
from minirl.run import FREE_ON_RESUME, Display, identity, interruptible, refuse_unwritable
from minirl.sampler import Sampler, SamplingParams
from minirl.task import Task
from minirl.tokenizer import Tokenizer

CHUNK = 64  # prompts sampled at a time; draws are keyed by chunk, so another number gives other completions
FILES = ("samples.jsonl", "labels.jsonl", "pairs.jsonl")
PART, ABOUT = "samples.part.jsonl", "outcomes.json"  # samples.jsonl until it is whole; how it came about
NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.EINVAL}  # of file systems without them
FREE = {*FREE_ON_RESUME, "prompts", "balance", "max_per_prompt", "distinct", "match_length"}  # change no sample

Same = Callable[[dict], Hashable]  # lines with equal values are the same completion
Group = list[dict]  # the lines of samples.jsonl that come of one prompt, in the order of sampling


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig, TaskConfig):
    """Sample completions of a task's training prompts, and check them."""

    out: str = "runs/samples"
    """Folder of what is written."""
    prompts: Count | None = None
    """Training prompts, the first so many; None: all."""
    samples: Count = 16
    """Completions a prompt (k)."""
    max_per_prompt: Count = 4
    """Most right completions (rft) or pairs of one prompt that are kept, so that easy ones do not outweigh others."""
    distinct: Literal["text", "numbers"] = "text"
    """Keep only the first of completions whose texts, or the numbers in them, are the same."""
    max_tokens: int = 256
    """Longest completion; one that is cut there is neither fine-tuned on nor paired."""
    temperature: float = 0.7
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the checkpoint's stop tokens; what is checked and kept ends before them."""
    seed: Whole = 0

    def __post_init__(self):
        super().__post_init__()
        _ = self.sampling  # refuses what cannot be sampled with

    @property
    def sampling(self) -> SamplingParams:
        return self.sampling_params(self.samples)


@dataclass(frozen=True, kw_only=True)
class OutcomesConfig(SampleConfig):
    """Sample a task's prompts and check the completions: data for reward, prefer and offline RL."""

    out: str = "runs/outcomes"
    """Folder of samples.jsonl (all completions), labels.jsonl (which are right) and pairs.jsonl (right and wrong)."""
    temperature: float = 1.0
    balance: bool = True
    """As many right as wrong labels of each prompt, else a reward model learns which prompts are easy; prompts without
    both have no label."""
    match_length: bool = False
    """Pair each right completion with the wrong one of nearest length (in characters), so that length tells little."""

    def __post_init__(self):
        super().__post_init__()
        if self.balance and self.samples == 1:
            raise InputError("samples = 1: balance takes right and wrong completions of one prompt: ask for 2 at least")


# ---- sampling and checking -------------------------------------------------------------------------------------------


class Samples:
    """The completions of a task's prompts on disk, in the order of the prompts, and how many they are of each kind."""

    def __init__(self, file: Path, per_prompt: int):
        self.file, self.per_prompt = file, per_prompt
        self.prompts = 0
        self.counts: Counter[str] = Counter()
        self.open = None

    def take_up(self, total: int) -> None:
        """Go on with the whole chunks of an earlier call, which may have been killed in the middle of a write; the
        draws of the others come again."""
        if not self.file.exists():
            return
        self._open()
        lines = end = 0
        with self.file.open("rb") as file:
            at = 0
            for line in file:
                if not line.endswith(b"\n") or not _is_sample(line):
                    break
                lines, at = lines + 1, at + len(line)
                prompts, left = divmod(lines, self.per_prompt)
                if not left and (prompts % CHUNK == 0 or prompts == total):
                    self.prompts, end = prompts, at
        if self.prompts > total:
            raise InputError(
                f"{self.file} already holds the completions of {self.prompts} prompts, and --prompts asks for {total}: "
                f"give {self.prompts} at least, choose another --out, or remove it"
            )
        os.truncate(self.file, end)
        for group in self.groups():
            self._count(group)

    def append(self, groups: Sequence[Group]) -> None:
        """Write the groups of a chunk."""
        self._open()
        self.open.write(b"".join(json_line(line) for group in groups for line in group))
        self.open.flush()
        os.fsync(self.open.fileno())
        self.prompts += len(groups)
        for group in groups:
            self._count(group)

    def groups(self) -> Iterator[Group]:
        """Read the groups one by one."""
        with self.file.open("rb") as file:
            while group := [json.loads(line) for line in islice(file, self.per_prompt)]:
                yield group

    def close(self) -> None:
        if self.open:
            self.open.close()

    def _open(self) -> None:
        if not self.open:
            self.open = self.file.open("ab")
            try:
                fcntl.flock(self.open, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{self.file} is being written by another process: wait for it, or choose another --out"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise

    def _count(self, group: Group) -> None:
        right = right_of(group)
        self.counts["right"] += len(right)
        self.counts["right, cut"] += sum(line["finish_reason"] == "length" for line in right)
        self.counts["cut"] += sum(line["finish_reason"] == "length" for line in group)
        self.counts["all"] += len(group)


def _is_sample(line: bytes) -> bool:
    try:
        return {"completion", "completion_tokens", "finish_reason", "reward"} <= json.loads(line).keys()
    except (ValueError, AttributeError, RecursionError):
        return False


def sample_and_check(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    config: SampleConfig,
    display: Display,
    samples: Samples,
    begin: Callable[[], object] = lambda: None,
) -> bool:
    """Sample config.samples completions of each training prompt, judge them by task.correct, and append them to
    `samples`, which may hold those of an earlier call.

    Return whether Ctrl-C, SIGTERM or SIGHUP came, after which the CHUNK of prompts under way is finished. `begin` is
    called before the first append.
    """
    if not task.train:
        raise InputError(f"task {config.task!r} has no training examples: ask for some")
    examples = measure(task, "train", tokenizer, model.config, config, display, config.prompts).examples
    sampler = Sampler(model, config.slots, tokenizer=tokenizer)
    params = replace(config.sampling, stop_ids=tokenizer.stop_ids)
    stopped, named = False, set()
    samples.take_up(len(examples))
    if samples.prompts:
        display.line(f"{samples.file} holds the completions of {samples.prompts} prompts: going on from there")
    display.progress("prompts", samples.prompts, len(examples))
    with interruptible(display) as stop_requested:
        while samples.prompts < len(examples) and not stopped:
            start = samples.prompts
            keyed = replace(params, seed=(config.seed << 32) + start // CHUNK)
            part = examples[start : start + CHUNK]
            rollout = sample(sampler, tokenizer, part, keyed, lambda i, total: display.progress("samples", i, total))
            on_bad = "skip" if start else "stop"  # later it may be a passing failure, which must not cost the samples
            rollout.indices = list(range(start, start + len(part)))
            score_rollout(rollout, {"correct": (1.0, task.correct)}, config.reward_timeout, on_bad=on_bad)
            if start == 0:
                rollout.require_score()
                begin()
            for key, line in rollout.fault_lines().items():
                if key not in named:
                    named.add(key)
                    display.line(line)
            samples.append([_lines(rollout, i, keyed) for i in range(len(part))])
            display.progress("prompts", samples.prompts, len(examples))
            stopped = stop_requested()
    return stopped


def _lines(rollout: Rollout, i: int, params: SamplingParams) -> Group:
    """Make the lines of prompt i; a reward of null could not be scored. Log-probs are those at `temperature`; under
    top-p they are of a cut distribution, with which no trainer could compare, so there are none."""
    example, lines = rollout.examples[i], []
    columns = {"prompt": example["prompt"]} | {name: value for name, value in example.items() if _is_json(value)}
    for row in range(i * rollout.group_size, (i + 1) * rollout.group_size):
        completion, reward = rollout.completions[row], rollout.rewards[row].item()
        own = {"completion": rollout.texts[row], "completion_tokens": completion.tokens}
        own |= {"finish_reason": completion.finish_reason, "temperature": params.temperature}
        own |= {"logprobs": completion.logprobs} if params.top_p == 1 else {}
        lines.append(columns | own | {"reward": reward if reward == reward else None})
    return lines


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def the_text(line: dict) -> str:
    return line["completion"]


def right_of(group: Group) -> list[dict]:
    return [line for line in group if line["reward"] == 1]


def right_and_wrong(group: Group, same: Same) -> tuple[list[dict], list[dict]]:
    """Return the different completions that came to an end, right and wrong; one without a score is in neither."""
    ended = [line for line in group if line["finish_reason"] != "length" and line["reward"] is not None]
    right, wrong = right_of(ended), [line for line in ended if line["reward"] != 1]
    return first_of_each(same, right), first_of_each(same, wrong)


def first_of_each(same: Same, lines: Sequence[dict]) -> list[dict]:
    found: dict[Hashable, dict] = {}
    for line in lines:
        found.setdefault(same(line), line)
    return list(found.values())


def summary(samples: Samples, config: SampleConfig) -> str:
    found = samples.counts
    cut = f"{found['cut']} cut at max_tokens = {config.max_tokens}"
    return f"{found['right']} of {found['all']} completions right, {cut}"


# ---- labels and pairs ------------------------------------------------------------------------------------------------


def labels_of(group: Group) -> list[dict]:
    """Return the different completions that were scored, with label 1 if right, else 0."""
    scored = [line for line in group if line["reward"] is not None]
    kept = ("prompt", "tools", "completion", "completion_tokens")
    return [
        {name: line[name] for name in kept if name in line} | {"label": int(line["reward"] == 1)}
        for line in first_of_each(lambda line: tuple(line["completion_tokens"]), scored)
    ]


def balanced(labels: list[dict], seed: int) -> list[dict]:
    """Keep as many right as wrong ones; the rest is drawn away by a seed."""
    sides = [[i for i, line in enumerate(labels) if line["label"] == label] for label in (0, 1)]
    count = min(map(len, sides))
    kept = {i for side in sides for i in random.Random(seed).sample(side, count)}
    return [line for i, line in enumerate(labels) if i in kept]


def pairs_of(group: Group, most: int, same: Same = the_text, match_length: bool = False) -> list[dict]:
    """Make at most `most` pairs of a right and a wrong completion, each completion in one pair only."""
    right, wrong = right_and_wrong(group, same)
    pairs = []
    for chosen in right[: min(most, len(wrong))]:
        gaps = [abs(len(line["completion"]) - len(chosen["completion"])) for line in wrong]
        rejected = wrong.pop(gaps.index(min(gaps)) if match_length else 0)
        asked = {name: chosen[name] for name in ("prompt", "tools") if name in chosen}
        pair = asked | {"chosen": chosen["completion"], "rejected": rejected["completion"]}
        tokens = {"chosen_tokens": chosen["completion_tokens"], "rejected_tokens": rejected["completion_tokens"]}
        pairs.append(pair | tokens)
    return pairs


# ---- the command -----------------------------------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    """Raise an InputError where a file is in the way, before the work and not after it. Beside unfinished samples the
    other files are those of a command that was killed at its end, and are written again."""
    for name in FILES[:1] if (out / PART).exists() else FILES:
        if (out / name).exists():
            raise InputError(f"{out / name} exists: choose another --out, or remove it")
    refuse_unwritable(out)


def write_outcomes(
    config: OutcomesConfig, task: Task, same: Same = the_text, display: Display | None = None
) -> list[Path]:
    """Sample, check and write; returns the FILES. `same` tells which completions are one.

    Ctrl-C, SIGTERM and SIGHUP keep the samples of the prompts that are done, and so do a kill and a lack of memory: the
    same call goes on there.
    """
    display, out = display or Display(), Path(config.out)
    refuse_existing(out)
    files, samples = [out / name for name in FILES], Samples(out / PART, config.samples)
    begun = read_json(out / ABOUT) if samples.file.exists() else {}
    about = {name: value for name, value in identity(config, task.train).items() if name not in FREE}
    about = json.loads(json.dumps({"minirl": __version__, **about}))  # as it will be read back
    _refuse_others(begun, about, samples.file)  # before the model costs its time
    model, tokenizer = load(config.model, config.dtype, config.device, config=config)
    about |= _date(begun, tokenizer) | {"model_hash": _fingerprint(model)}
    _refuse_others(begun, about, samples.file)
    try:
        stopped = sample_and_check(
            model, tokenizer, task, config, display, samples, lambda: write_json(out / ABOUT, about)
        )
        if not stopped:
            _write_data(config, samples, files, same, display)
    except KeyboardInterrupt:  # the second one
        stopped = True
    except (MemoryError, RuntimeError, OSError) as error:
        if samples.prompts:  # the command line adds it to its sentence
            kept = f"the completions of {samples.prompts} prompts are in {samples.file}"
            error.add_note(f"{kept}: the same command goes on from there, also with other --slots")
        raise
    finally:
        samples.close()
    if stopped:
        if samples.prompts:
            display.line(
                f"stopped after {samples.prompts} prompts, whose completions are in {samples.file}: the same command "
                f"goes on from there, and with --prompts {samples.prompts} ends there"
            )
        raise KeyboardInterrupt
    return files


def _write_data(config: OutcomesConfig, samples: Samples, files: Sequence[Path], same: Same, display: Display) -> None:
    """Write labels and pairs, and at last give the samples their name."""
    labels, pairs = Counter(), Counter()

    def labelled() -> Iterator[dict]:
        for group in samples.groups():
            own = labels_of(group)
            for line in balanced(own, config.seed) if config.balance else own:
                labels[line["label"]] += 1
                yield line

    def paired() -> Iterator[dict]:
        for group in samples.groups():
            own = pairs_of(group, config.max_per_prompt, same, config.match_length)
            pairs["all"] += len(own)
            yield from own

    _write(files[1], labelled())
    if config.balance and not labels:
        files[1].unlink()
        samples.file.rename(files[0])
        raise InputError(
            f"no prompt of {samples.prompts} has both right and wrong completions ({summary(samples, config)}): take "
            f"more samples, or prompts of another difficulty; {files[0]} holds what was sampled"
        )
    _write(files[2], paired())
    samples.file.rename(files[0])
    written = f"{pairs['all']} pairs, {labels[1]} labels of right completions and {labels[0]} of wrong ones"
    display.line(f"{written} from {samples.prompts} prompts: {summary(samples, config)}")


def _write(file: Path, lines: Iterable[dict]) -> None:
    """Write a file of which one line at a time is in memory."""

    def write(staging: Path) -> None:
        with staging.open("wb") as out:
            out.writelines(map(json_line, lines))

    write_atomic(file, write)


def _refuse_others(begun: dict, about: dict, file: Path) -> None:
    """Raise an InputError where samples were begun with other options, data or weights."""
    changed = [f"{k}: {begun.get(k)!r} -> {about[k]!r}" for k in about if begun and begun.get(k) != about[k]]
    if changed:
        raise InputError(
            f"{file} was begun with other options or data ({', '.join(changed)}): give the same, choose another --out, "
            "or remove it"
        )


def _date(begun: dict, tokenizer: Tokenizer) -> dict:
    """Give a tokenizer whose template reads the date that of the first start, and return it."""
    if "strftime_now" not in (tokenizer.chat_template or ""):
        return {}
    tokenizer.now = datetime.fromisoformat(begun.get("date") or tokenizer.now.isoformat(timespec="seconds"))
    return {"date": tokenizer.now.isoformat()}


def _fingerprint(model: Transformer) -> str:
    """Hash a part of every parameter: other weights may have come under the same name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().flatten()[:256].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
