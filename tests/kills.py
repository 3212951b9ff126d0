"""Kill runs of every kind by SIGKILL, resume them to their end, and compare every bit with a run that was left alone.

    python tests/kills.py                                700 kills over 300 runs at least, some minutes on two cores
    python tests/kills.py --kinds ppo dapo --runs 20 --kills 40 --seed 3

A kill comes at a random time ("time"), before a random call that changes the disk ("call": open for writing, rename,
sync, remove, ...), or when a file grows beyond a random size after such a call ("size": it leaves half a write, as the
kernel ends the process in the middle of it). After a run's end its tensors, logs (but for what is measured) and states
must equal those of the undisturbed one, and so must the names and modes of all files and folders: nothing stray stays.
Manifests differ where logs hold times, so each is checked against the files that it names instead.

The cases and the comparison are the referee's. Each command is a fork of a process that has imported everything.
"""

import argparse
import atexit
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import resource
import select
import shlex
import shutil
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import referee

STEPS = "--steps 5 --save-every 2"
KINDS = {  # name -> command; the referee's, with more steps where there are steps
    **{
        kind: f"{referee.CASES[case][0]} {STEPS}"
        for kind, case in {
            "sft": "sft_talks",
            "sft_bfloat16": "sft_bfloat16",
            "grpo": "truncated_sampling",
            "dapo": "dapo",
            "process_rewards": "process_model",
            "reference_reset": "reference_reset",
            "faults": "faults",
            "online_reward": "online_bce",
            "stored": "stored_logprobs",
            "ppo": "ppo",
            "ppo_shared": "ppo_shared",
            "dpo": "dpo_pairs",
            "rrhf": "rrhf_mean",
            "reward": "reward_pairs",
            "reward_process": "reward_process",
            "rft": "rft",
        }.items()
    },
    "outcomes": referee.CASES["outcomes"][0],
    "eval": referee.CASES["eval"][0],
}
SHORT = ("sft", "reference_reset", "ppo")  # need no policy that was trained before
LIMIT = 120  # seconds for a command
CHANGES = {  # audit events of what changes the disk, beside opening a file for writing
    *("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink", "os.fsync"),
    *("shutil.rmtree", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp"),
}
OF_KILLS = (-signal.SIGKILL, -signal.SIGXFSZ)
NOT_BEGUN = "holds no run to resume"  # killed before the run had a folder: one begins it again
IN_THE_WAY = ("already holds an evaluation", "exists: choose another --out")  # of commands without --resume


class Fate(NamedTuple):
    """The kind of a death and its place: seconds, the number of a call, and the size of a file after it in bytes."""

    mode: str = ""
    seconds: float = LIMIT
    call: int = 0
    size: int = 0


class Reference(NamedTuple):
    """An undisturbed run: what it left, how long it took, how many calls changed the disk, and sizes of its files."""

    held: tuple
    seconds: float
    calls: int
    sizes: list[int]


@dataclass
class Result:
    """What came of one disturbed run."""

    kind: str
    kills: Counter = field(default_factory=Counter)  # by mode
    resumed: int = 0
    anew: int = 0  # began again, as the kill came before there was anything to resume
    faults: list[str] = field(default_factory=list)


# ---- dying -----------------------------------------------------------------------------------------------------------


def changes_the_disk(event: str, details: tuple) -> bool:
    if event == "open":
        flags = details[2] if isinstance(details[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def arm(fate: Fate) -> None:
    """Let this process die at its n-th change of the disk, or in the first write beyond a size after it."""
    left = fate.call

    def hook(event: str, details: tuple) -> None:
        nonlocal left
        if not changes_the_disk(event, details):
            return
        left -= 1
        if left == 0 and fate.mode == "call":
            os.kill(os.getpid(), signal.SIGKILL)
        elif left == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fate.size, fate.size))

    if fate.mode in ("call", "size"):
        sys.addaudithook(hook)


def count_calls(file: Path) -> None:
    """Write to a file at the end of this process how often it changed the disk."""
    calls = Counter()
    sys.addaudithook(lambda event, details: calls.update([changes_the_disk(event, details)]))
    atexit.register(lambda: file.write_text(str(calls[True])))


def perform(words: Sequence[str], log: str, before=lambda: None, seconds: float = LIMIT) -> int:
    """Run a command in a fork and return its exit code; it is killed when so many seconds are over."""
    child = referee.started(list(words), log, before)
    with open(os.pidfd_open(child)) as ending:
        if not select.select([ending], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def drawn(rng: random.Random, reference: Reference) -> Fate:
    """Draw a death: half of them at a time, the others inside a write."""
    mode = rng.choice(("time", "time", "call", "size"))
    if mode == "time":
        return Fate(mode, rng.uniform(0.02, 0.9) * reference.seconds)
    return Fate(mode, call=rng.randint(1, reference.calls), size=rng.randint(0, rng.choice(reference.sizes)))


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def left_by(folder: Path) -> tuple[referee.Digest, dict[str, str]]:
    """Return all that a run computed, and the mode of each file and folder by its name."""
    held = referee.digest(folder)
    modes = {str(p.relative_to(folder)): stat.filemode(p.lstat().st_mode) for p in sorted(folder.rglob("*"))}
    return {name: content for name, content in held.items() if not name.endswith("manifest.json")}, modes


def faults_of(folder: Path, reference: tuple[referee.Digest, dict[str, str]]) -> list[str]:
    """Name all in which a run's folder is not as that of an undisturbed run."""
    try:
        held, modes = left_by(folder)
    except (OSError, ValueError, KeyError) as error:
        return [f"unreadable: {error!r}"]
    found = [f"{name}: {modes[name]}, stray" for name in modes.keys() - reference[1].keys()]
    found += [f"{name}: missing" for name in reference[1].keys() - modes.keys()]
    both = modes.keys() & reference[1].keys()
    found += [f"{n}: mode {modes[n]} for {reference[1][n]}" for n in sorted(both) if modes[n] != reference[1][n]]
    found += [f"{file}: {text}" for file, text in referee.differences(reference[0], held) if file in both]
    return sorted(found) + [text for file in folder.glob("checkpoints/*/manifest.json") for text in unlike(file)]


def unlike(manifest: Path) -> Iterator[str]:
    """Name what a checkpoint or a log holds that is not as the manifest says."""
    said, checkpoint, run = json.loads(manifest.read_bytes()), manifest.parent, manifest.parents[2]
    for folder, part in ((checkpoint, "files"), (run, "logs")):
        for name, entry in said[part].items():
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            content = content[: entry["bytes"]] if part == "logs" else content
            if len(content) != entry["bytes"] or hashed(content, entry["blake2b"]) != entry["blake2b"]:
                yield f"{checkpoint.name}: {name} is not as the manifest says"
    names = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {manifest.name}
    yield from (f"{checkpoint.name}: {name} is not in the manifest" for name in names - said["files"].keys())


def hashed(content: bytes, like: str) -> str:
    """Hash as the manifest does; the length of the digest is that of `like`."""
    return hashlib.blake2b(content, digest_size=len(like) // 2).hexdigest()


# ---- runs ------------------------------------------------------------------------------------------------------------


def new_case(name: str) -> Path:
    """Make the folder of a run below the current one, with the material in it, and enter it; return where one was."""
    before = Path.cwd()
    shutil.rmtree(name, ignore_errors=True)
    Path(name).mkdir()
    os.chdir(name)
    Path("material").symlink_to(before / "material")
    return before


def undisturbed(kind: str) -> Reference:
    """Run a kind to its end."""
    before, started = new_case(kind), time.monotonic()
    try:
        code = perform(shlex.split(KINDS[kind]), "log", partial(count_calls, Path("calls").absolute()))
        if code:
            raise RuntimeError(f"{kind} ends with {code}:\n{Path('log.err').read_text()}")
        sizes = [p.stat().st_size for p in Path("run").rglob("*") if p.is_file()]
        seconds = time.monotonic() - started
        return Reference(left_by(Path("run")), seconds, int(Path("calls").read_text()), sizes)
    finally:
        os.chdir(before)


def disturbed(kind: str, number: int, seed: int, most: int, reference: Reference) -> Result:
    """Kill a run at most so many times and let it go on after each; its folder stays where something is wrong."""
    result, rng, begin = Result(kind), random.Random(f"{seed} {number}"), shlex.split(KINDS[kind])
    again, words, log, fates = resuming(begin), begin, [], 0
    before = new_case(name := f"{kind}-{number}")
    for i in range(3 * most + 3):
        fates += 1
        fate = drawn(rng, reference) if fates <= most else Fate()
        code = perform(words, str(i), partial(arm, fate), fate.seconds)
        log.append(f"{' '.join(words[:2])}: {fate} -> {code}")
        said = Path(f"{i}.err").read_text(errors="replace")
        if code in OF_KILLS and fate.mode:
            result.kills[fate.mode] += 1
            words = again
            continue
        result.resumed += words is not begin and code == 0
        if code == 2 and any(text in said for text in (NOT_BEGUN, *IN_THE_WAY)):
            result.anew += 1
            words = begin
            if NOT_BEGUN not in said:
                shutil.rmtree("run")
            fates -= 1
            continue
        result.faults = [f"ends with {code}: {said.strip()[-600:]}"] if code else faults_of(Path("run"), reference.held)
        break
    else:
        result.faults = ["does not come to an end"]
    os.chdir(before)
    if result.faults:
        result.faults[0] = f"{name} ({'; '.join(log)}): {result.faults[0]}"
    else:
        shutil.rmtree(name)
    return result


def resuming(words: list[str]) -> list[str]:
    """Return the command that goes on: the same one, where there is no --resume."""
    from minirl.lab.commands import COMMANDS

    known = {f.name for f in dataclasses.fields(COMMANDS[words[0]][0])}
    return [words[0], "--resume", "--out", "run"] if "resume" in known else list(words)


def make_material(folder: Path, trained: bool) -> None:
    """Write checkpoints and data; without `trained` the policy is random, which the kinds in SHORT can do with."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if trained:
        referee.make_material(unfinished, sys.executable)
    else:
        referee.write_data(unfinished)
        for name, family, seed in (("random", "qwen3", 0), ("policy", "qwen3", 2), ("other", "qwen2", 1)):
            referee.write_checkpoint(unfinished / name, family, seed)
    unfinished.rename(folder)


def warm_up() -> None:
    """Make this process one that can be forked for commands; a sync is only counted, and no byte-code is written."""
    referee.warm()
    from matplotlib.figure import Figure

    from minirl.lab import report

    empty = Figure()
    report.draw = lambda runs, labels: empty  # it is written all the same; drawing takes longer than the training
    os.fsync = partial(sys.audit, "os.fsync")
    sys.dont_write_bytecode = True


def same_everywhere() -> None:
    """Start this program again where its environment does not fix the threads and the instruction sets."""
    if any(os.environ.get(name) != value for name, value in referee.ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | referee.ENVIRONMENT)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a text table: the first column aligned left, the others right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def in_turn(pool: ProcessPoolExecutor, jobs: int, tasks: Iterator[tuple]) -> Iterator:
    """Yield what comes of the tasks (function, arguments...), in the order in which they end; `tasks` is asked for the
    next only when one has ended."""
    pending = set()
    while True:
        while len(pending) < jobs and (task := next(tasks, None)):
            pending.add(pool.submit(*task))
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def kill_all(given: argparse.Namespace) -> list[Result]:
    """Make the references, then kill runs of each kind in turn until there are enough runs and enough kills."""
    results: list[Result] = []
    most = -(-given.kills // given.runs) + 1  # some end before the death that was drawn for them

    def enough() -> bool:
        return len(results) >= given.runs and sum(r.kills.total() for r in results) >= given.kills

    def tasks() -> Iterator[tuple]:
        number = 0
        while not enough():
            kind = given.kinds[number % len(given.kinds)]
            yield disturbed, kind, number, given.seed, most, references[kind]
            number += 1

    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool:
        references = dict(zip(given.kinds, pool.map(undisturbed, given.kinds), strict=True))
        say(f"{len(references)} undisturbed runs, {sum(r.calls for r in references.values())} calls change the disk")
        began = shown = time.monotonic()
        for result in in_turn(pool, given.jobs, tasks()):
            results.append(result)
            say(*result.faults[:4])
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                kills = sum(r.kills.total() for r in results)
                share = min(len(results) / given.runs, kills / given.kills)
                left = (shown - began) * (1 / max(share, 1e-9) - 1)
                failed = sum(bool(r.faults) for r in results)
                say(f"{kills} kills over {len(results)} runs, {failed} failed; about {left:.0f} s to go")
    return results


def say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def summary(results: Sequence[Result]) -> str:
    """Return a table of kills and what came of them, a line a kind and one of all."""
    head = ("kind", "runs", "kills", "at a time", "before a call", "in a write", "resumed", "begun again", "failed")
    rows = []
    for kind in [*dict.fromkeys(r.kind for r in results), "all"]:
        own = [r for r in results if kind in (r.kind, "all")]
        kills = sum((r.kills for r in own), Counter())
        modes = [kills[mode] for mode in ("time", "call", "size")]
        ended = (sum(r.resumed for r in own), sum(r.anew for r in own), sum(bool(r.faults) for r in own))
        rows.append((kind, len(own), kills.total(), *modes, *ended))
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=700, help="at least (default: %(default)s)")
    add("--runs", type=int, default=300, help="at least (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    add("--short", action="store_true", help=f"only {', '.join(SHORT)}, from random weights")
    add("--seed", type=int, default=None, help="of the deaths (default: another one each time)")
    add("--jobs", type=int, default=2, help="runs at a time, on one thread each (default: %(default)s)")
    add("--work", type=Path, default=Path("runs/kills"), help="what failed stays there (default: %(default)s)")
    given = parser.parse_args()
    given.kinds = list(SHORT) if given.short else given.kinds
    given.seed = random.randrange(10**6) if given.seed is None else given.seed
    same_everywhere()
    began = time.monotonic()
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)
    make_material(Path("material"), trained=not given.short)
    warm_up()
    say(f"seed {given.seed}")
    results = kill_all(given)
    print(summary(results))
    failed = [r for r in results if r.faults]
    print(f"seed {given.seed}: {time.monotonic() - began:.0f} s; {len(failed)} of {len(results)} runs failed")
    for result in failed:
        print(*result.faults[:8], sep="\n    ")
    sys.stdout.flush()
    os._exit(bool(failed))  # clearing all modules away would take a second


if __name__ == "__main__":
    main()
