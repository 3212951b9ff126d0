"""Damage checkpoints and logs of a run that was killed in the middle, resume it, and say what came of each damage.

    python tests/damages.py                              every damage of a PPO run
    python tests/damages.py --runs ppo online_reward     and of one whose reward model learns on
    python tests/damages.py --only 'metrics*' --all
    python tests/damages.py --short               a few of each kind

After a resume a damage is one of these:
    fallback    the run ends, a line names the damaged checkpoint, and the bits are those of the undamaged run
    harmless    the run ends with the same bits, and no line is needed: a kill or a person may leave it so
    sentence    the command ends with one sentence and exit code 2, and what was there is still there
    SILENT      the run ends with other bits, or ends though nothing names the damage
    SPOILT      one sentence, but what was there is gone or changed; or what a person left there is
    TRACEBACK, HANG, KILLED    no sentence; no end; more memory than the limit
Each damage says which of the first three it may be. All else is a failure.
"""

import argparse
import fnmatch
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import kills
import referee

RUNS = {  # together they leave every file that a checkpoint has
    "ppo": f"ppo {referee.POLICY} --rewards repetition=1 --adaptive-kl ziegler --kl-horizon 50 --ref-reset-every 2 "
    "--epochs 1 --critic-lr 1e-2",
    "online_reward": f"{referee.CASES['online_bce'][0]} --preset grpo --adaptive-kl ziegler --loss.kl-coef 0.1 "
    "--rewards model:material/bce-model=1 material/rewards.py:faulty=0.5 --on-bad-reward skip",
}
STEPS = "--steps 4 --save-every 1 --eval-every 0 --eval-prompts 1 --eval-samples 1"
OLD, NEW, CUT = "step-000002", "step-000003", "step-000004"  # the checkpoints that there are, and the one it died in
LOGS = ("metrics.jsonl", "completions.jsonl", "faults.jsonl")
LIMIT, MEMORY = 20, 1 << 30  # seconds and bytes, of a resumed run
FAILURES = ("SILENT", "SPOILT", "TRACEBACK", "HANG", "KILLED")
FALLBACK, HARMLESS, SENTENCE = ({name} for name in ("fallback", "harmless", "sentence"))
SHORT = (  # patterns of the most telling damages
    *("weights: a bit in the middle", "optimizer: 4 KB of zeros", "optimizer: missing", "state: without beta"),
    *("state: a step of 5,000 digits", "manifest: a wrong digest", "manifest: missing", "metrics.jsonl: a page of NUL"),
    *(
        "metrics.jsonl: a line doubled",
        "both checkpoints: a bit",
        "a text beside the checkpoints",
        "weights: NaN, sealed",
    ),
    *("completions.jsonl: half a line at its end", "checkpoint: renamed to step-000007"),
)

MAIN = ("weights", "optimizer", "state", "manifest", "tokenizer.json")  # other files get the damages in THIN alone
THIN = ("a bit in the middle", "empty", "missing", "a link to itself", "that of another run")

Apply = Callable[[Path], object]  # damages the run in a folder


class Damage(NamedTuple):
    apply: Apply
    expected: set[str]
    stays: tuple[str, ...] = ()  # paths that must be there afterwards, as they were


class Sources(NamedTuple):
    """A run that was cut in the middle, its end undisturbed, and one of another seed (or the same one)."""

    cut: Path
    end: tuple
    other: Path


# ---- damages of a file -----------------------------------------------------------------------------------------------


def edit(change: Callable[[bytes], bytes]) -> Apply:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def flip(share: float) -> Apply:
    """Flip a bit at a place in the file: 0 is its first byte, 1 its last."""

    def change(content: bytes) -> bytes:
        place = round(share * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return edit(change)


def zeros(content: bytes) -> bytes:
    """Write 4 KB of zeros, as a lost page of a disk, into the middle; into all of a small file."""
    size = min(4096, len(content))
    start = (len(content) - size) // 2
    return content[:start] + bytes(size) + content[start + size :]


def instead(make: Callable[[Path], object]) -> Apply:
    """Put something else in the place of a file."""

    def apply(file: Path) -> None:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        make(file)

    return apply


def taken_from(source: Path) -> Apply:
    return lambda file: shutil.copy(source, file)


def of_any_file(own: Path, older: Path, foreign: Path) -> Iterator[tuple[str, Apply]]:
    """Yield the damages that any file can have; `older` and `foreign` stand in the same place elsewhere."""
    yield from (("a bit at its beginning", flip(0)), ("a bit in the middle", flip(0.5)), ("a bit at its end", flip(1)))
    yield "4 KB of zeros", edit(zeros)
    yield "a byte short", edit(lambda content: content[:-1])
    yield "half of it", edit(lambda content: content[: len(content) // 2])
    yield "empty", edit(lambda content: b"")
    yield "a byte more", edit(lambda content: content + b"x")
    yield "no text", edit(lambda content: b"\xff\xfe\x80" * 9)
    yield "missing", instead(lambda file: None)
    yield "a folder", instead(Path.mkdir)
    yield "a link to itself", instead(lambda file: file.symlink_to(file.name))
    yield "a pipe", instead(os.mkfifo)
    yield "an endless device", instead(lambda file: file.symlink_to("/dev/zero"))
    if os.geteuid():
        yield "not readable", lambda file: file.chmod(0)
    for name, source in (("that of the other checkpoint", older), ("that of another run", foreign)):
        if source.is_file() and source.read_bytes() != own.read_bytes():
            yield name, taken_from(source)


def name_of(file: Path) -> str:
    """Name a file of a checkpoint for a reader."""
    known = {"model.safetensors": "weights", "optimizer.safetensors": "optimizer"}
    known |= {"state.json": "state", "manifest.json": "manifest"}
    folder = "" if file.parent == Path(".") else f"{file.parent.as_posix()}/"
    return folder + known.get(file.name, file.name)


# ---- damages of JSON -------------------------------------------------------------------------------------------------


def fields(change: Callable[[dict], object]) -> Apply:
    """Change the object that a JSON file holds: `change` returns another value, or None where it changed that one."""

    def apply(file: Path) -> None:
        content = json.loads(file.read_bytes())
        file.write_text(json.dumps(content if (new := change(content)) is None else new))

    return apply


def text(field: str, value: str) -> Apply:
    """Write a value that json.dumps would not write into a field of a JSON file."""

    def apply(file: Path) -> None:
        content = json.loads(file.read_bytes()) | {field: "@"}
        file.write_text(json.dumps(content).replace('"@"', value, 1))

    return apply


NESTED, DIGITS = "[" * 100_000 + "]" * 100_000, "7" * 5000


def of_state(state: dict) -> Iterator[tuple[str, Apply]]:
    yield from ((f"without {name}", fields(partial(lambda name, s: s.pop(name) and None, name))) for name in state)
    for field in state:
        yield f"{field} NaN", text(field, "NaN")
        yield f"{field} a text", text(field, '"3"')
    yield "a step without end", text("step", "Infinity")
    yield "a step below 0", text("step", "-1")
    yield "a step of 5,000 digits", text("step", DIGITS)
    yield "a step nested 100,000 deep", text("step", NESTED)
    yield "another step", text("step", "2")
    yield "a step far on", text("step", "1000000000000000000000000000000")
    yield "a step that is no whole number", text("step", "2.5")
    yield "a list", fields(lambda s: [s])
    yield "an empty object", fields(lambda s: {})


def of_manifest(manifest: dict) -> Iterator[tuple[str, Apply]]:
    weights = manifest["files"]["model.safetensors"]

    def entry(**new: object) -> Apply:
        return fields(lambda m: m["files"].update({"model.safetensors": weights | new}))

    yield "a wrong digest", entry(blake2b="0" * len(weights["blake2b"]))
    yield "a digest that is a number", entry(blake2b=7)
    yield "an empty digest", entry(blake2b="")
    yield from ((f"bytes {value!r:.12}", entry(bytes=value)) for value in (0, -1, 10**30, 1e300, "9", None, True, []))
    yield "an entry missing", fields(lambda m: m["files"].pop("optimizer.safetensors") and None)
    yield "an entry too many", fields(lambda m: m["files"].update({"more.safetensors": weights}))
    yield "a path out of the folder", fields(lambda m: m["files"].update({f"../{OLD}/model.safetensors": weights}))
    yield "an absolute path", fields(lambda m: m["files"].update({"/etc/hostname": weights}))
    yield "a name with NUL", fields(lambda m: m["files"].update({"a\0b": weights}))
    yield "a name of 5,000 letters", fields(lambda m: m["files"].update({"a" * 5000: weights}))
    yield "an entry that is a text", fields(lambda m: m["files"].update({"model.safetensors": "whole"}))
    yield "an entry without bytes", fields(lambda m: m["files"]["model.safetensors"].pop("bytes") and None)
    for part in ("files", "logs", "step"):
        yield f"without {part}", fields(partial(lambda part, m: m.pop(part) and None, part))
        yield f"{part} null", fields(partial(lambda part, m: m.update({part: None}), part))
        yield f"{part} a list", fields(partial(lambda part, m: m.update({part: [1]}), part))
    yield "another step", fields(lambda m: m.update(step=2))
    yield "a step of 5,000 digits", text("step", DIGITS)
    yield "files nested 100,000 deep", text("files", NESTED)
    yield "a list", fields(lambda m: [m])
    yield "an empty object", fields(lambda m: {})
    yield "a log of more bytes than there are", fields(lambda m: m["logs"]["metrics.jsonl"].update(bytes=10**6))
    yield "a log of fewer bytes", fields(lambda m: m["logs"]["metrics.jsonl"].update(bytes=10))
    yield "without a log", fields(lambda m: m["logs"].pop("metrics.jsonl") and None)
    yield "a log out of the folder", fields(lambda m: m["logs"].update({"../log": m["logs"]["metrics.jsonl"]}))


def seal(checkpoint: Path) -> None:
    """Make the manifest right again, where there is one: what is damaged has been written so."""
    file = checkpoint / "manifest.json"
    if not file.exists():
        return
    manifest = json.loads(file.read_bytes())
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        entry |= {"bytes": len(content), "blake2b": kills.hashed(content, entry["blake2b"])}
    file.write_text(json.dumps(manifest))


def sealed(apply: Apply, name: str) -> Apply:
    """Damage a file of the newest checkpoint in a run, and make the manifest right again."""

    def both(run: Path) -> None:
        apply(run / "checkpoints" / NEW / name)
        seal(run / "checkpoints" / NEW)

    return both


# ---- damages of tensors, logs and folders ----------------------------------------------------------------------------


def numbers(value: float) -> Apply:
    """Write a value into some of the numbers of a safetensors file."""

    def change(content: bytes) -> bytes:
        start = 8 + struct.unpack("<Q", content[:8])[0]
        place = start + (len(content) - start) // 8 * 4
        return content[:place] + struct.pack("<f", value) * 2 + content[place + 8 :]

    return edit(change)


def without_a_tensor(content: bytes) -> bytes:
    """Drop the last tensor of a safetensors file."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    end = header.pop(last)["data_offsets"][0]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[start : start + end]


def lines(change: Callable[[list[bytes]], object]) -> Apply:
    """Change the lines of a log: `change` returns other ones, or None where it changed the list."""

    def apply(file: Path) -> None:
        found = file.read_bytes().splitlines(keepends=True)
        found = new if isinstance(new := change(found), list) else found
        file.write_bytes(b"".join(found))

    return apply


def of_log() -> Iterator[tuple[str, Apply, set[str]]]:
    """Yield damages of a log; those at its end are what a kill may leave."""
    damaged = FALLBACK | SENTENCE
    yield "a page of NUL", edit(zeros), damaged
    yield "the first line removed", lines(lambda ls: ls[1:]), damaged
    yield "a line removed", lines(lambda ls: ls.pop(len(ls) // 3) and None), damaged
    yield "a line doubled", lines(lambda ls: ls.insert(1, ls[1])), damaged
    yield "two lines exchanged", lines(lambda ls: [ls[1], ls[0], *ls[2:]]), damaged
    yield "a line changed", lines(lambda ls: [re.sub(rb"\d", b"5", ls[0]), *ls[1:]]), damaged
    yield "a blank line between", lines(lambda ls: ls.insert(1, b"\n")), damaged
    yield "ends of lines as on Windows", edit(lambda content: content.replace(b"\n", b"\r\n")), damaged
    yield "a mark of UTF-8 at its beginning", edit(lambda content: b"\xef\xbb\xbf" + content), damaged
    yield "a line that is no UTF-8", lines(lambda ls: [b"\xff\xfe" + ls[0], *ls[1:]]), damaged
    yield "only its first line", lines(lambda ls: ls[:1]), damaged
    yield "half of it", edit(lambda content: content[: len(content) // 2]), damaged
    yield "empty", edit(lambda content: b""), damaged
    yield "missing", instead(lambda file: None), damaged
    yield "a folder", instead(Path.mkdir), damaged
    yield "a link to itself", instead(lambda file: file.symlink_to(file.name)), damaged
    yield "a pipe", instead(os.mkfifo), damaged
    yield "an endless device", instead(lambda file: file.symlink_to("/dev/zero")), damaged
    yield "half a line at its end", edit(lambda content: content + content[:40].split(b"\n")[0]), HARMLESS
    yield "NUL at its end", edit(lambda content: content + bytes(4096)), HARMLESS
    yield "no UTF-8 at its end", edit(lambda content: content + b"\xff\xff\n"), HARMLESS
    yield "lines of later steps", lines(lambda ls: ls.append(b'{"step": 9}\n')), HARMLESS


def of_folders(rng: random.Random) -> Iterator[tuple[str, Damage]]:
    """Yield damages of whole checkpoints, and what others left beside them."""
    at, old, new = (lambda run: run / "checkpoints"), f"checkpoints/{OLD}", f"checkpoints/{NEW}"
    damaged = FALLBACK | SENTENCE

    def copy(source: str, name: str) -> Apply:
        return lambda run: shutil.copytree(run / source, at(run) / name)

    def move(source: str, name: str) -> Apply:
        return lambda run: (run / source).rename(at(run) / name)

    def both(change: Apply) -> Apply:
        return lambda run: [change(run / name / "model.safetensors") for name in (old, new)]

    for name in ("step-000007", "step-3000000", "step-000004"):
        yield f"checkpoint: renamed to {name}", Damage(move(new, name), damaged)
    yield "checkpoint: the older renamed to step-000009", Damage(move(old, "step-000009"), FALLBACK | HARMLESS)
    yield (
        "checkpoint: the older in the place of the newer",
        Damage(instead_of(lambda run: run / new, lambda run: shutil.copytree(run / old, run / new)), FALLBACK),
    )
    yield "checkpoint: missing", Damage(lambda run: shutil.rmtree(run / new), HARMLESS)
    for name, make in (("empty", Path.mkdir), ("a file", Path.touch), ("a pipe", os.mkfifo)):
        make_it = instead_of(lambda run: run / new, lambda run, make=make: make(run / new))
        yield f"checkpoint: {name}", Damage(make_it, FALLBACK)
    yield (
        "checkpoint: a link to itself",
        Damage(instead_of(lambda run: run / new, lambda run: (run / new).symlink_to(NEW)), FALLBACK | HARMLESS),
    )
    yield "checkpoint: not writable", Damage(lambda run: (run / new).chmod(0o555), HARMLESS | SENTENCE)
    yield "checkpoint: a file more", Damage(lambda run: (run / new / "notes.txt").write_text("x"), HARMLESS | FALLBACK)
    yield "checkpoint: a folder more", Damage(lambda run: (run / new / "more").mkdir(), HARMLESS | FALLBACK)
    yield "checkpoint: a copy named step-3", Damage(copy(new, "step-3"), HARMLESS | FALLBACK)
    yield "checkpoint: a copy of the older named step-3", Damage(copy(old, "step-3"), HARMLESS | FALLBACK)
    yield "checkpoint: a copy named step-1000000", Damage(copy(new, "step-1000000"), HARMLESS | FALLBACK)
    yield "both checkpoints: a bit", Damage(both(flip(0.6)), SENTENCE)
    yield "both checkpoints: empty files", Damage(both(edit(lambda content: b"")), SENTENCE)
    yield "both checkpoints: missing weights", Damage(both(Path.unlink), SENTENCE)
    yield "both checkpoints: missing", Damage(lambda run: shutil.rmtree(at(run)), HARMLESS | SENTENCE)
    yield "checkpoints: a file", Damage(instead_of(at, lambda run: at(run).touch()), SENTENCE)
    yield "checkpoints: a link to where they were moved", Damage(moved_away, HARMLESS)
    for name, make in (
        ("a text beside the checkpoints", lambda run: (at(run) / "step-notes.txt").write_text("mine")),
        ("a folder step-abc", lambda run: (at(run) / "step-abc").mkdir()),
        ("a copy named (copy)", copy(new, f"{NEW} (copy)")),
        ("a copy named best", copy(old, "best")),
        ("a file step-000099", lambda run: (at(run) / "step-000099").write_text("mine")),
        ("an empty folder step-000099", lambda run: (at(run) / "step-000099").mkdir()),
        ("a folder of a person's named step-000099", lambda run: written(at(run) / "step-000099" / "mine.txt")),
        ("a folder step-٣", lambda run: (at(run) / "step-٣").mkdir()),
    ):
        yield name, Damage(make, HARMLESS | FALLBACK if "000099" in name else HARMLESS, ("*",))
    staging = f".{CUT}-{rng.randrange(10**6)}"
    yield "what a killed save left", Damage(copy(new, staging), HARMLESS)
    yield "what a killed rename left", Damage(lambda run: written(run / f".config.json-{staging[-3:]}"), HARMLESS)


def instead_of(place: Callable[[Path], Path], make: Apply) -> Apply:
    """Remove a folder of a run and make something else of it."""
    return lambda run: (shutil.rmtree(place(run)), make(run))


def moved_away(run: Path) -> None:
    (run / "checkpoints").rename(run.with_name("elsewhere"))
    (run / "checkpoints").symlink_to("../elsewhere")


def written(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")


def damages_of(sources: Sources) -> dict[str, Damage]:
    """Return every damage of a run by its name, as functions of the run's folder."""
    found: dict[str, Damage] = {}
    new, old = sources.cut / "checkpoints" / NEW, sources.cut / "checkpoints" / OLD

    def at(name: str, apply: Apply) -> Apply:
        return lambda run: apply(run / name)

    for file in sorted(path for path in new.rglob("*") if path.is_file()):
        name, place = file.relative_to(new), str(file.relative_to(sources.cut))
        others = (old / name, sources.other / "checkpoints" / NEW / name)
        chosen = [x for x in of_any_file(file, *others) if name_of(name) in MAIN or x[0] in THIN]
        for said, apply in chosen:
            ends = {"harmless"} if name_of(name) == "manifest" and said == "a byte short" else set()  # an end of line
            found[f"{name_of(name)}: {said}"] = Damage(at(place, apply), FALLBACK | ends)
    state, manifest = new / "state.json", new / "manifest.json"
    for said, apply in of_state(json.loads(state.read_bytes())):
        found[f"state: {said}"] = Damage(at(f"checkpoints/{NEW}/state.json", apply), FALLBACK)
        if said != "without cursor":  # which is then the step's, as in older checkpoints
            found[f"state: {said}, sealed"] = Damage(sealed(apply, "state.json"), FALLBACK | SENTENCE)
    if manifest.exists():
        for said, apply in of_manifest(json.loads(manifest.read_bytes())):
            found[f"manifest: {said}"] = Damage(at(f"checkpoints/{NEW}/manifest.json", apply), FALLBACK)
    for file in (path for path in new.rglob("*.safetensors") if path.is_file()):
        name, damaged = file.relative_to(new), FALLBACK | SENTENCE
        for said, value in (("NaN", math.nan), ("infinite", math.inf)):
            found[f"{name_of(name)}: {said}, sealed"] = Damage(sealed(numbers(value), str(name)), damaged)
        found[f"{name_of(name)}: without a tensor, sealed"] = Damage(sealed(edit(without_a_tensor), str(name)), damaged)
    for log in (log for log in LOGS if (sources.cut / log).exists()):
        found |= {f"{log}: {said}": Damage(at(log, apply), expected) for said, apply, expected in of_log()}
    for said, apply in of_any_file(sources.cut / "config.json", Path("none"), sources.other / "config.json"):
        ends = HARMLESS if said == "a byte short" else set()  # an end of line
        found[f"config: {said}"] = Damage(at("config.json", apply), SENTENCE | ends)
    return found | dict(of_folders(random.Random(0)))


# ---- runs ------------------------------------------------------------------------------------------------------------


def make_run(kind: str, seeds: Sequence[int] = (0, 1)) -> Sources:
    """Run a kind until it dies while it saves step 4, also of another seed, and let a copy go on to its end."""
    found = []
    for name, seed in zip(("cut", "other"), seeds, strict=False):
        before = kills.new_case(f"{kind}-{name}")
        try:
            words = shlex.split(f"{RUNS[kind]} {STEPS} --seed {seed}")
            if kills.perform(words, "log", die_in_the_save) != -signal.SIGKILL:
                raise RuntimeError(f"{kind} did not come to step 4:\n{Path('log.err').read_text()}")
            left = sorted(folder.name for folder in Path("run/checkpoints").glob("step-*"))
            if left != [OLD, NEW]:
                raise RuntimeError(f"{kind} left {left}")
            found.append(Path("run").absolute())
        finally:
            os.chdir(before)
    before = kills.new_case(f"{kind}-end")
    shutil.copytree(found[0], "run")
    code = kills.perform([kind_of(kind), "--resume", "--out", "run"], "log")
    end = kills.left_by(Path("run"))
    said = Path("log.err").read_text()
    os.chdir(before)
    if code:
        raise RuntimeError(f"{kind}, undamaged, ends with {code}:\n{said}")
    return Sources(found[0], end, found[-1])


def kind_of(kind: str) -> str:
    return shlex.split(RUNS[kind])[0]


def die_in_the_save() -> None:
    """Kill this process at the first change of the disk in the checkpoint CUT."""

    def hook(event: str, details: tuple) -> None:
        if kills.changes_the_disk(event, details) and CUT in str(details[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def bounded() -> None:
    """Let this process, which shares its libraries, have so much more memory."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def try_damage(kind: str, name: str, number: int, sources: Sources) -> tuple[str, str]:
    """Damage a copy of the run, resume it, and return what came of it and a word on why."""
    damage, before = damages_of(sources)[name], kills.new_case(folder := f"{kind}-{number}")
    try:
        run = Path("run")
        shutil.copytree(sources.cut, run)
        damage.apply(run)
        planted = names(run) - names(sources.cut)
        was = contents(run)
        code = kills.perform([kind_of(kind), "--resume", "--out", "run"], "log", bounded, LIMIT)
        said = [Path(f"log.{end}").read_text(errors="replace") for end in ("out", "err")]
        came, why = outcome(code, *said, was, planted, damage, sources)
        return came if came in damage.expected or came in FAILURES else f"{came}?", why
    finally:
        os.chdir(before)
        for place in Path(folder).rglob("*"):
            if place.is_dir() and not place.is_symlink():
                place.chmod(0o755)
        shutil.rmtree(folder)


def outcome(code, out, err, was, planted, damage: Damage, sources: Sources) -> tuple[str, str]:
    """Classify a resumed run by its exit code, what it said, and what it left."""
    run = Path("run")
    if "Traceback" in err or "MemoryError" in err:
        return "TRACEBACK", err.strip().splitlines()[-1][:150]
    if code == 2:
        sentences = [line for line in err.splitlines() if line.strip()]
        if not sentences or not sentences[-1].startswith("minirl: ") or err.count("minirl: ") != 1:
            return "TRACEBACK", f"no sentence: {err.strip()[-150:]}"
        lost = spoilt(was, contents(run), sources.cut)
        return ("SPOILT", f"{lost} after: {sentences[-1]}") if lost else ("sentence", sentences[-1])
    if code:
        return ("HANG", f"over {LIMIT} s") if code == -signal.SIGKILL else ("KILLED", f"exit code {code}")
    if damage.stays and (lost := [name for name in planted if contents(run).get(name) != was.get(name)]):
        return "SPOILT", f"{lost[0]} is gone or changed"
    for bad in run.glob("checkpoints/set-aside-*"):  # as it was
        shutil.rmtree(bad) if bad.is_dir() and not bad.is_symlink() else bad.unlink()
    if (link := run / "checkpoints").is_symlink():
        shutil.move(link.resolve(), link.with_name("moved"))
        link.unlink()
        link.with_name("moved").rename(link)
    found = [text for text in unlike(run, sources.end) if text.partition(":")[0] not in planted]
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", f"{out}\n{err}")
    lost = re.search(r"run/(\S+) is missing: its lines up to step \d+ are lost", text)
    if lost and all(line.startswith(f"{lost[1]}: ") for line in found):
        return "sentence", lost[0]
    if found:
        return "SILENT", found[0]
    said = re.search(r"[^\n.]*step-\d+ is (damaged|no checkpoint)[^\n]*", text)
    if said:
        return "fallback", said[0]
    return ("harmless", "") if "harmless" in damage.expected else ("SILENT", "the same bits, but nothing is said")


def unlike(run: Path, end: tuple) -> list[str]:
    """Name in what a run's end differs from the undamaged one; modes are left aside, and so are names of folders."""
    try:
        held = kills.left_by(run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f": what it left cannot be read: {error!r:.100}"]
    found = [f"{file}: {text}" for file, text in referee.differences(end[0], held[0])]
    found += [f"{name}: stray" for name in held[1].keys() - end[1].keys()]
    found += [f"{name}: missing" for name in end[1].keys() - held[1].keys()]
    return found + [f": {line}" for file in run.glob("checkpoints/step-*/manifest.json") for line in kills.unlike(file)]


def names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def contents(run: Path) -> dict[str, bytes | str]:
    """Return what each file of a run holds; of a link, a folder or a pipe only that it is one."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        else f"{path.lstat().st_mode:o}"
        for path in run.rglob("*")
    }


def spoilt(was: dict, now: dict, cut: Path) -> str:
    """Name what a command that ended with a sentence has lost. Lines of a log may go that no checkpoint counts."""
    for name, content in was.items():
        if name in LOGS and isinstance(content, bytes) and isinstance(now.get(name), bytes):
            kept = sum(len(line) for line in (cut / name).read_bytes().splitlines(keepends=True) if early(line))
            if content[:kept] != now[name][:kept]:
                return f"lines of {name} are gone"
        elif now.get(name) != content and not Path(name).name.startswith("."):
            return f"{name} is {'changed' if name in now else 'gone'}"
    return ""


def early(line: bytes) -> bool:
    """Tell whether a line is of a step that the older checkpoint counts."""
    return json.loads(line)["step"] <= int(OLD.removeprefix("step-"))


def damage_all(given: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return run, damage, what came of it, and why, of each damage that is wanted."""
    found, tasks, made = [], [], partial(make_run, seeds=(0,) if given.short else (0, 1))
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool:
        for kind, sources in zip(given.runs, pool.map(made, given.runs), strict=True):
            chosen = [n for n in damages_of(sources) if any(fnmatch.fnmatch(n, pattern) for pattern in given.only)]
            tasks += [(kind, name, number, sources) for number, name in enumerate(chosen)]
        kills.say(f"{len(tasks)} damages")
        began = shown = time.monotonic()
        for task, (came, why) in zip(tasks, pool.map(try_damage, *zip(*tasks, strict=True)), strict=True):
            found.append((*task[:2], came, why))
            if given.all or came in FAILURES or came.endswith("?"):
                print(f"{came:10} {task[0]}: {task[1]}: {why}"[:300], flush=True)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                left = (shown - began) * (len(tasks) / len(found) - 1)
                kills.say(f"{len(found)} of {len(tasks)}, about {left:.0f} s to go")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="PATTERN", default=["*"], help="of names of damages")
    add("--runs", nargs="+", choices=RUNS, default=["ppo"], help=f"of {', '.join(RUNS)} (default: ppo)")
    add("--short", action="store_true", help="the most telling damages of ppo, from random weights")
    add("--jobs", type=int, default=2, help="runs at a time, on one thread each (default: %(default)s)")
    add("--work", type=Path, default=Path("runs/damages"), help="(default: %(default)s)")
    add("--all", action="store_true", help="print what came of every damage, not of those that failed alone")
    given = parser.parse_args()
    if given.short:
        given.only, given.runs = list(SHORT), ["ppo"]
    kills.same_everywhere()
    began = time.monotonic()
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)
    kills.make_material(Path("material"), trained=not given.short)
    kills.warm_up()
    found = damage_all(given)
    print(summary(found))
    failed = sum(came in FAILURES for _, _, came, _ in found)
    print(f"{failed} of {len(found)} damages failed; {time.monotonic() - began:.0f} s")
    sys.stdout.flush()
    os._exit(bool(failed))


def summary(found: Sequence[tuple[str, str, str, str]]) -> str:
    """Return a table: what is damaged, and how often each thing came of it."""
    groups = dict.fromkeys(name.partition(":")[0] if ":" in name else "beside" for _, name, _, _ in found)
    head = [came for came in ("fallback", "sentence", "harmless", "other?", *FAILURES)]
    rows = []
    for group in [*groups, "all"]:
        came = Counter(
            "other?" if came.endswith("?") else came
            for _, name, came, _ in found
            if group in ("all", name.partition(":")[0] if ":" in name else "beside")
        )
        rows.append((group, came.total(), *(came[name] for name in head)))
    return kills.table(("what is damaged", "damages", *head), rows)


if __name__ == "__main__":
    main()
