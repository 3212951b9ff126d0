"""The sandbox against programs that attack it: none is paid, none hangs, none reaches anything outside.

Each program is judged by `f(2) == 4` and two more calls, which every honest one passes.
"""

import ctypes
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import joined, read_cases

from minirl.errors import InputError
from minirl.judge import folder, mounts, walls
from minirl.judge.libc import succeeds
from minirl.judge.messages import Channel
from minirl.judge.pool import ChildError, Job, Pool, call_each
from minirl.judge.tester import verdict
from minirl.judge.worker import Worker

TESTS = "assert f(2) == 4\nassert f(0) == 0\nassert f(-3) == 9\n"
RIGHT = "def f(x):\n    return x * x\n"
SECONDS = 1.0
CASES = read_cases("programs")
HONEST, JUDGED = CASES["honest"], CASES["judged"]
ATTACKS = CASES["attacks"] | {"half a surrogate pair": "f = '\ud800'"}


@pytest.fixture(scope="module")
def pool():
    with Pool(4) as pool:  # more than cores: most of the hanging ones sleep or wait for their end
        yield pool


@pytest.fixture(scope="module")
def outcomes(pool, tmp_path_factory):
    """All programs in one go, in the order of the dicts, beside what they attack."""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)  # whatever guards it, it is not its mode
    victim, hidden = folder / "victim", folder / "tests.py"
    victim.write_text("whole")
    victim.chmod(0o666)
    hidden.write_text(TESTS)
    server = socket.create_server(("127.0.0.1", 0))
    places = {"OUTSIDE": str(folder / "new"), "VICTIM": str(victim), "TESTS_FILE": str(hidden)}
    places |= {"PORT": server.getsockname()[1], "TRAINER": os.getpid()}
    head = "".join(f"{name} = {value!r}\n" for name, value in places.items())

    def judged(programs: dict[str, str], seconds: float) -> dict[str, object]:
        texts = (head + program if program.strip() else program for program in map(joined, programs.values()))
        return dict(
            zip(programs, pool.map([Job.tests(text, TESTS, entry="f") for text in texts], seconds), strict=True)
        )

    honest = judged(HONEST, 20.0)  # on a busy machine, too
    started = time.monotonic()
    return honest | judged(ATTACKS, SECONDS), folder, server, time.monotonic() - started


def passed(outcome) -> bool:
    return isinstance(outcome, dict) and outcome["passed"]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(name, outcomes):
    assert outcomes[0][name] == {"passed": True, "why": ""}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_not_paid(name, outcomes):
    outcome = outcomes[0][name]
    assert not passed(outcome), outcome
    assert isinstance(outcome, Exception) or (outcome["why"] and "at_fault" not in outcome), outcome


def test_an_attack_hurts_nobody(outcomes):
    _, folder, server, took = outcomes
    assert sorted(p.name for p in folder.iterdir()) == ["tests.py", "victim"]
    assert (folder / "victim").read_text() == "whole" and (folder / "victim").stat().st_mode & 0o777 == 0o666
    assert not Path("/tmp/minirl-was-here").exists()
    server.settimeout(0.05)
    with pytest.raises(TimeoutError):
        server.accept()
    assert took < 60


HOLDS = """
import os
def f(x):
    total = 0
    for n in range(100):
        try:
            file = os.open(str(n), os.O_CREAT | os.O_RDWR)
            os.unlink(str(n))
            while True: total += os.write(file, bytes(2**18))
        except OSError: pass
    return total
"""


def test_files_that_are_removed_while_they_are_open_count(pool):
    assert walls.FILE_BYTES * walls.OPEN_FILES <= folder.MAX_DISK
    (found,) = pool.map([Job.tests(HOLDS, f"assert 2 ** 20 < f(1) <= {folder.MAX_DISK}, f(1)", entry="f")], 10)
    assert passed(found), found


# --- the folder of a cell ---------------------------------------------------------------------------------------------


def deep(place: Path, depth: int) -> None:
    back = os.getcwd()
    try:
        os.chdir(place)
        for _ in range(depth):
            Path("file").write_text("x")
            os.mkdir("a")
            os.chdir("a")
    finally:
        os.chdir(back)


def test_what_the_mounts_show_cannot_be_written(tmp_path):
    """Not even by root, without any other wall."""
    (tmp_path / "library").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "library" / "file").write_text("whole")

    def enter() -> None:
        assert mounts.enter(str(tmp_path / "root"), [str(tmp_path / "library")])

    def read_and_write() -> None:
        enter()
        shown = Path(f"{tmp_path}/root{tmp_path}/library/file")
        assert shown.read_text() == "whole"
        with suppress(OSError):
            shown.write_text("")
            os._exit(1)

    if not succeeds(enter):
        pytest.skip("this system allows no mounts")
    assert succeeds(read_and_write)


def test_any_tree_is_removed(tmp_path):
    place = tmp_path / "cell"
    place.mkdir()
    for n in range(300):
        (place / f"{n}" / "a").mkdir(parents=True)
        (place / f"{n}" / "a" / "b").touch()
    (place / "closed" / "closed").mkdir(parents=True)
    (place / "closed" / "closed").chmod(0)
    (place / "closed").chmod(0)
    deep(place, 5000)  # beyond recursion and the longest path
    folder.empty(str(place))
    assert list(place.iterdir()) == []
    deep(place, 20)
    folder.remove(str(place))
    assert not place.exists()
    folder.remove(str(place))  # nothing to do


def test_a_folder_is_full_by_count_size_and_depth(tmp_path):
    place = tmp_path / "cell"
    place.mkdir()
    deep(place, folder.MAX_DEPTH)
    assert not folder.is_full(str(place))
    deepest = place.joinpath(*["a"] * folder.MAX_DEPTH)
    (deepest / "a").mkdir()
    assert folder.is_full(str(place))
    (deepest / "a").rmdir()
    for n in range(folder.MAX_FILES - 2 * folder.MAX_DEPTH):
        (deepest / str(n)).touch()
    assert not folder.is_full(str(place))
    (place / "b").touch()
    assert folder.is_full(str(place))
    folder.empty(str(place))
    (place / "a").mkdir()
    with open(place / "a" / "large", "wb") as file:
        file.truncate(folder.MAX_DISK)
        assert not folder.is_full(str(place))
        file.truncate(folder.MAX_DISK + 1)
        assert folder.is_full(str(place))
        file.truncate(0)
        assert not folder.is_full(str(place)) and folder.is_full(str(place), folder.MAX_DISK + 1)
        keep_size, fallocate = 1, ctypes.CDLL(None).fallocate
        if fallocate(file.fileno(), keep_size, ctypes.c_long(0), ctypes.c_long(2 * folder.MAX_DISK)) == 0:
            assert folder.is_full(str(place))


def test_removed_files_that_are_mapped_are_counted(tmp_path):
    kept = []
    for _ in range(3):
        with open(tmp_path / "a", "w+b") as file:
            file.truncate(8192)
            kept += [mmap.mmap(file.fileno(), 4096, offset=offset) for offset in (0, 4096)]
        if len(kept) < 6:
            (tmp_path / "a").unlink()
    assert folder.pinned(os.getpid(), str(tmp_path)) == 2
    assert folder.pinned(os.getpid(), str(tmp_path / "other")) == folder.pinned(2**22 + 1, str(tmp_path)) == 0


LEADERLESS = """
import ctypes, mmap, os, threading, time
def work():
    for name in (b"a\\rb c d e f", b"\\xff"):
        file = os.open(name, os.O_CREAT | os.O_RDWR)
        os.ftruncate(file, 4096)
        kept.append(mmap.mmap(file, 4096))
        os.remove(name)
    print(flush=True)
    time.sleep(60)
kept = []
threading.Thread(target=work).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_removed_files_are_counted_whatever_their_name_and_whichever_thread_is_left(tmp_path):
    program = subprocess.Popen([sys.executable, "-c", LEADERLESS], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        program.stdout.readline()
        assert eventually(lambda: not Path(f"/proc/{program.pid}/maps").exists() or not running(program.pid))
        assert folder.pinned(program.pid, str(tmp_path)) == 2
    finally:
        program.kill()
        program.wait()
    assert folder.pinned(program.pid, str(tmp_path)) == 0


def test_a_cell_that_sends_byte_after_byte_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("minirl.judge.worker.TICK", 0.5)  # on a busy machine, too, the next byte comes before that
    for n in range(folder.MAX_FILES + 1):
        (tmp_path / str(n)).touch()
    reading, writing = os.pipe()
    worker = Worker.__new__(Worker)
    worker.folder, worker.mounted = str(tmp_path), True

    def trickle() -> None:
        os.write(writing, struct.pack(">I", 2**20))
        while not done:
            os.write(writing, b"x" * (time.sleep(0.0005) or 1))

    done = []
    thread = threading.Thread(target=trickle)
    thread.start()
    cell = SimpleNamespace(results=reading, pid=os.getpid())
    try:
        assert b"wrote too much" in worker._watched([cell], time.monotonic() + 3)
    finally:
        done.append(1)
        thread.join()
        for end in (reading, writing):
            os.close(end)


SCAN = """
import ctypes, gc, os
write, (r, w) = ctypes.CDLL(None).write, os.pipe()
write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
word = bytes(n ^ 1 for n in MARK)
found = seen = 0
for place in sorted({(id(x) >> 20) + n << 20 for x in gc.get_objects() for n in range(-4, 5)}):
    for start in range(place, place + 2**20, 2**15):
        if (size := write(w, start, 2**15)) > 0:
            data = os.read(r, size)
            seen += 1
            at = data.find(word)
            found += at >= 0 and data[at + len(word) : at + 2 * len(word)] == word
def f(): return found if seen > 100 else "nothing was read"
"""


@pytest.mark.parametrize("size", [8, 2000])
def test_no_program_finds_the_verdict_of_another_in_its_memory(size):
    mark = "a mark of its own, "
    tests = f"assert f() == 1, {mark!r} * {size}"
    scan = f"MARK = {bytes(ord(c) ^ 1 for c in mark)!r}\n{SCAN}"
    with Pool(1) as pool:
        failed = pool.map([Job.tests("def f(): return 2", tests, entry="f")] * 2, 10)
        assert all(mark * 8 in outcome["why"] for outcome in failed)
        (found,) = pool.map([Job.tests(scan, "assert f() == 0, f()", entry="f")], 20)
    assert passed(found), found


# --- the pool ---------------------------------------------------------------------------------------------------------


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(stat.parent.name))
    return found


def eventually(condition, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_results_keep_their_order_and_failures_their_place(pool):
    calls = [Job.call("math:sqrt", [n]) for n in range(40)]
    calls[7], calls[20] = Job.call("time:sleep", [60]), Job.call("math:sqrt", [-1])
    seen = []
    found = pool.map(calls, 0.3, progress=lambda done, total: seen.append((done, total)))
    assert isinstance(found[7], TimeoutError) and isinstance(found[20], ChildError)
    assert "ValueError: math domain error" in str(found[20])
    assert [x for i, x in enumerate(found) if i not in (7, 20)] == [n**0.5 for n in range(40) if n not in (7, 20)]
    assert seen == [(n + 1, 40) for n in range(40)]


def test_no_jobs_have_no_results(pool):
    assert pool.map([], 1) == []


def test_a_worker_that_dies_is_replaced_and_none_of_its_jobs_is_lost():
    with Pool(2) as pool:
        pool.map([Job.call("math:sqrt", [1])] * 4, 5)
        first, killed = [worker.process.pid for worker in pool.workers], []

        def kill_one(done, total):
            if done % 10 == 5:
                orphans = [worker for worker in pool.workers if worker.assignment and worker.assignment.orphaned]
                killed.append(next(worker.process.pid for worker in pool.workers if worker not in orphans))
                os.kill(killed[-1], signal.SIGKILL)

        assert pool.map([Job.call("math:sqrt", [n]) for n in range(100)], 5, progress=kill_one) == [
            n**0.5 for n in range(100)
        ]
    assert len(killed) == 10 and not any(map(running, [*killed, *first])) and not pool.workers


def test_a_job_that_kills_its_worker_is_tried_twice_and_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import os\ndef die(x): os.kill(os.getpid(), 9)\ndef live(x): return x\n")
    with Pool(1) as pool:
        jobs = [Job.call(f"{file}:{name}", [n], trusted=True) for n, name in enumerate(("live", "die", "live"))]
        found = pool.map(jobs, 5)
    assert found[0] == 0 and found[2] == 2
    assert isinstance(found[1], ChildError) and "process died" in str(found[1])


def test_what_a_worker_itself_fails_by_is_said(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import signal\ndef spoil(): signal.setitimer = None\n")
    with Pool(1) as pool:
        (found,) = pool.map([Job.call(f"{file}:spoil", trusted=True)], 5)
        assert isinstance(found, ChildError) and "its worker failed (TypeError" in str(found)
        assert pool.map([Job.call("math:sqrt", [4])], 5) == [2.0]


def test_a_trusted_function_that_hangs_is_killed_with_what_it_started(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, subprocess, time, pathlib\n"
        f"def hang():\n    child = subprocess.Popen(['sleep', '1000'])\n    pathlib.Path({str(tmp_path / 'pid')!r})"
        ".write_text(str(child.pid))\n    time.sleep(1000)\n"
        "def add(a, b=2):\n    return a + b\n"
    )
    started = time.monotonic()
    with Pool(1) as pool:
        jobs = [Job.call(f"{file}:{name}", args, trusted=True) for name, args in (("hang", []), ("add", [1]))]
        found = pool.map(jobs, 0.5)
    assert isinstance(found[0], TimeoutError) and found[1] == 3
    assert time.monotonic() - started < 10
    assert eventually(lambda: not running(int((tmp_path / "pid").read_text())))


def test_closing_leaves_no_process_and_no_folder():
    pool = Pool(3)
    pool.map([Job.call("math:sqrt", [4])] * 9, 5)
    processes, folders = [w.process.pid for w in pool.workers], [Path(w.folder) for w in pool.workers]
    assert len(processes) == 3 and all(map(running, processes)) and all(folder.is_dir() for folder in folders)
    pool.close()
    assert not any(map(running, processes)) and not any(folder.exists() for folder in folders)


def test_an_interruption_ends_what_is_under_way(pool):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.map([Job.call("math:sqrt", [1]), *[Job.call("time:sleep", [100])] * 3], 100, progress=interrupt)
    started = time.monotonic()
    assert pool.map([Job.call("math:sqrt", [9])] * 8, 5) == [3.0] * 8
    assert time.monotonic() - started < 20


KILLED_TRAINER = """
import os, sys
from minirl.judge.pool import Job, Pool
pool = Pool(2)
pool.map([Job.call("math:sqrt", [1])] * 2, 5)
print(*(w.process.pid for w in pool.workers), *(w.folder for w in pool.workers), flush=True)
pool.map([Job.call("time:sleep", [4.0])] * 2, 5)
"""


def test_a_killed_trainer_leaves_no_process_and_no_folder_behind():
    trainer = subprocess.Popen([sys.executable, "-c", KILLED_TRAINER], stdout=subprocess.PIPE, text=True)
    words = trainer.stdout.readline().split()
    processes, folders = [int(word) for word in words[:2]], words[2:]
    assert len(processes) == len(folders) == 2
    # Their cells are at work, and it is not the trial of the walls that is seen.
    assert eventually(lambda: all(any(age(child) > 0.5 for child in children(process)) for process in processes))
    trainer.kill()
    trainer.wait()
    assert eventually(lambda: not any(map(running, processes)))
    assert eventually(lambda: not any(map(os.path.exists, folders)))


def age(process: int) -> float:
    """Return how many seconds ago a process began."""
    try:
        began = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


OUTLIVES = """
import ctypes, threading, time
libc = ctypes.CDLL(None)
for call in (lambda: libc.prctl(1, 0, 0, 0, 0), lambda: libc.prctl(36, 1, 0, 0, 0), lambda: libc.setresuid(-1, -1, -1)):
    call()
libc.setsid()
for _ in range(4): threading.Thread(target=time.sleep, args=(60,)).start()
time.sleep(60)
"""


def test_a_program_dies_with_its_worker():
    """It dies although it asks for the opposite, and although nobody is left to kill it."""
    program = KILLED_TRAINER.replace('Job.call("math:sqrt", [1])', 'Job.tests("", "")')
    program = program.replace('Job.call("time:sleep", [4.0])', f"Job.tests({OUTLIVES!r}, '')").replace(", 5)", ", 60)")
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in trainer.stdout.readline().split()[:2]]
    assert eventually(lambda: all(any(threads(cell) > 4 for cell in children(worker)) for worker in workers))
    cells = [cell for worker in workers for cell in children(worker)]
    for process in (*workers, trainer.pid):
        os.kill(process, signal.SIGKILL)
    trainer.wait()
    assert len(cells) == 4 and eventually(lambda: not any(map(running, cells)))


def threads(process: int) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except FileNotFoundError:
        return 0


def test_a_worker_shows_nothing_in_its_command_line(pool):
    pool.map([Job.call("math:sqrt", [4]), Job.tests(RIGHT, TESTS, entry="f")], 5)
    for worker in pool.workers:
        command = Path(f"/proc/{worker.process.pid}/cmdline").read_text()
        assert worker.folder not in command and "site-packages" not in command.replace(walls.__file__[:-8], "")


def ticks(process: int) -> int:
    """Read the processor time that a process has used, in the kernel's clock ticks."""
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11])


def test_a_trusted_function_that_hangs_ends_when_the_trainer_is_gone(tmp_path):
    (tmp_path / "mine.py").write_text("def hang():\n    while True: pass\n")
    job = f"Job.call({str(tmp_path / 'mine.py:hang')!r}, trusted=True)"
    # The first jobs are trusted too: workers of another use would be replaced, and the test would watch the wrong ones.
    program = KILLED_TRAINER.replace("[1])", "[1], trusted=True)")
    program = program.replace('Job.call("time:sleep", [4.0])] * 2, 5)', f"{job}] * 2, 1)")
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    processes = [int(word) for word in trainer.stdout.readline().split()[:2]]
    assert len(processes) == 2
    before = {process: ticks(process) for process in processes}
    assert eventually(lambda: all(ticks(process) >= before[process] + 5 for process in processes))  # they are at work
    trainer.kill()
    trainer.wait()
    assert eventually(lambda: not any(map(running, processes)))


def test_threads_take_turns(pool):
    def call(base: int) -> None:
        found[base] = pool.map([Job.call("math:sqrt", [float((base + n) ** 2)]) for n in range(50)], 5)

    found: dict[int, list] = {}
    threads = [threading.Thread(target=call, args=(base,)) for base in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {base: [float(base + n) for n in range(50)] for base in (0, 100, 200)}


def test_a_job_of_megabytes_is_no_hurdle(pool):
    text = "é" * 3_000_000
    assert pool.map([Job.call("builtins:len", [text])] * 3, 10) == [len(text)] * 3
    program = f"text = {'x' * 2_000_000!r}\ndef f(x): return text\n"
    (found,) = pool.map([Job.tests(program, "assert f(1) == 'x' * 2_000_000", entry="f")], 10)
    assert passed(found)


def test_threads_leave_room_in_the_memory(pool):
    """Each would take 64 MB of the address space for what it allocates."""
    program = """
import threading
def f(x):
    together = threading.Barrier(x)
    threads = [threading.Thread(target=lambda: together.wait(5) and str(x) * 100) for _ in range(x)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return not together.broken
"""
    (found,) = pool.map([Job.tests(program, "assert f(16)", entry="f")], 10, memory_mb=512)
    assert passed(found), found


def test_memory_is_bounded(pool):
    (found,) = pool.map([Job.call("builtins:bytearray", [1 << 30])], 5, memory_mb=100)
    assert isinstance(found, ChildError) and "MemoryError" in str(found)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_such_module:f", ["no_such_module:f", "ModuleNotFoundError"]),
        ("math:square", ["math:square", "no function 'square'", "sqrt"]),
        ("FILE.py:f", ["ZeroDivisionError"]),
        ("missing.py:f", ["missing.py", "FileNotFoundError"]),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_sentence(pool, tmp_path, function, words):
    (tmp_path / "FILE.py").write_text("1 / 0")
    spec = f"{tmp_path}/{function}" if ".py" in function else function
    with pytest.raises(InputError) as error:
        pool.map([Job.call(spec)] * 3, 1)
    assert all(word in str(error.value) for word in words)
    assert pool.map([Job.call("math:sqrt", [4])] * 3, 5) == [2.0] * 3


def test_a_function_of_a_file_sees_no_network_and_writes_nothing_outside(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import json, os, socket\nfrom pathlib import Path\n"
        "LEXICON = Path(__file__).with_name('words.txt').read_text()\n"
        "def read(): return Path(__file__).with_name('words.txt').read_text() == LEXICON\n"
        f"def write(): Path({str(tmp_path / 'new')!r}).write_text('x')\n"
        "def connect(): socket.socket()\n"
        "def package():\n    import numpy as np\n    return np.arange(3).sum()\n"
    )
    (tmp_path / "words.txt").write_text("a b c")
    names = ("read", "write", "connect", "package")
    found = [call_each(f"{file}:{name}", [()], 20)[0] for name in names]
    assert found[0] is True and found[3] == 3
    assert "PermissionError" in str(found[1]) and "PermissionError" in str(found[2])
    assert not (tmp_path / "new").exists()


def test_calls_share_nothing(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("seen = []\ndef count(x):\n    seen.append(x)\n    return len(seen)\n")
    assert call_each(f"{file}:count", [(1,)] * 5, 5) == [1] * 5


SNOOP = """
import gc, sys
frame, seen = sys._getframe(), ""
while frame:
    seen += repr(frame.f_locals)
    frame = frame.f_back
seen += "".join(repr(x) for x in gc.get_objects() if type(x) in (list, dict, tuple))
SEEN = "the ans%ser" % chr(119) in seen  # not as a constant of its own
def f(): return SEEN
"""


@pytest.mark.parametrize("trusted", [True, False])
def test_nothing_of_a_function_reaches_a_program_or_its_tests(trusted, tmp_path):
    """Neither what it was given nor what it has changed in its process."""
    (tmp_path / "mine.py").write_text(
        "import builtins, math\nmath.isclose = lambda *a, **k: True\n"
        "def rule(solution):\n    builtins.abs = lambda x: 0\n    kept.append(solution)\n    return 1.0\nkept = []\n"
    )
    called = [Job.call(f"{tmp_path}/mine.py:rule", ["the answer"], trusted=trusted)] * 2
    with Pool(1) as pool:
        for _ in range(2):
            assert pool.map(called, 10) == [1.0] * 2
            tests = "import math\nassert f() is False\nassert abs(-1) == 1 and not math.isclose(1, 2)"
            (found,) = pool.map([Job.tests(SNOOP, tests, entry="f")], 10)
            assert passed(found), found


def test_a_package_is_not_there_for_programs_whatever_was_loaded_before(tmp_path):
    (tmp_path / "mine.py").write_text("import numpy\ndef two(): return float(numpy.arange(3)[2])\n")
    program = (
        "try:\n    import numpy\nexcept ImportError as error:\n    numpy = None\n    why = error.name\n"
        "def f(): return numpy is None and why\n"
    )
    with Pool(1) as pool:
        assert pool.map([Job.call(f"{tmp_path}/mine.py:two")], 20) == [2.0]
        (found,) = pool.map([Job.tests(program, "import statistics, sqlite3\nassert f() == 'numpy'", entry="f")], 20)
        assert passed(found), found
        assert pool.map([Job.call(f"{tmp_path}/mine.py:two")], 20) == [2.0]


def test_a_pool_needs_a_worker():
    with pytest.raises(InputError, match="at least 1"):
        Pool(0)


def test_where_the_walls_do_not_stand_no_program_runs(pool, monkeypatch):
    pool.map([Job.call("math:sqrt", [1])] * 8, 5)
    for worker in pool.workers:
        monkeypatch.setattr(worker, "walls", {"limits"})
    with pytest.raises(InputError, match="Landlock"):
        pool.map([Job.tests(RIGHT, TESTS, entry="f")], SECONDS)


# --- the tester -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(pool):
    jobs = [Job.tests(program, tests, "def twice(x): return 2 * x\n", "f") for program, tests, _ in JUDGED.values()]
    return dict(zip(JUDGED, pool.map(jobs, 10.0), strict=True))


@pytest.mark.parametrize("name", JUDGED)
def test_a_program_passes_its_tests_or_not(name, judged):
    assert judged[name]["passed"] is JUDGED[name][2], judged[name]


@pytest.mark.parametrize("tests", ["assert f(lambda x: x) == 1", "assert f(1) ==", "def"])
def test_tests_that_are_at_fault_are_not_the_programs_fault(pool, tests):
    (found,) = pool.map([Job.tests(RIGHT, tests, entry="f")], 2.0)
    assert found["at_fault"] and "tests" in found["why"]


@pytest.mark.parametrize(
    "tests",
    [
        "import numpy as np\nassert f(2) == np.int64(4)",
        "def check(candidate):\n    from no_such_package.part import g\n    assert candidate(2) == g(2)\ncheck(f)",
    ],
)
def test_tests_that_import_a_package_are_at_fault(pool, tests):
    for program in (RIGHT, "def f(x): raise ImportError('no')"):
        (found,) = pool.map([Job.tests(program, tests, entry="f")], 2.0)
        assert found["at_fault"] and "the tests import what the sandbox does not have" in found["why"]


@pytest.mark.parametrize("error", ["ImportError('no')", "PermissionError(13, 'no')", "ModuleNotFoundError('numpy')"])
def test_an_import_error_of_the_program_is_its_own_fault(pool, error):
    for program in (f"def f(x): raise {error}", f"raise {error}", "import numpy\n" + RIGHT):
        (found,) = pool.map([Job.tests(program, f"import math; assert f(2) == 4\n{TESTS}", entry="f")], 2.0)
        assert not found["passed"] and "at_fault" not in found


@pytest.mark.parametrize("message", [joined(m) for m in CASES["messages"]["not_one"]])
def test_an_answer_that_is_no_message_is_caught_by_no_test(message):
    """It takes no program: the tester alone, between two pipes."""
    (hears, says), (asked, asks) = os.pipe(), os.pipe()
    for text in ('["ready"]', message, '["value", 1]', '["value", 1]'):
        os.write(says, struct.pack(">I", len(text)) + text.encode())
    os.close(says)
    tests = "try: f(1)\nexcept Exception: pass\n"
    outcome = verdict(Channel(hears, asks), "", tests, "f")
    for end in (hears, asks, asked):
        os.close(end)
    assert not outcome["passed"] and "no message" in outcome["why"], outcome


def test_why_a_program_failed_is_said(pool):
    programs = ["def f(x): return 1", "def f(x): return 1 / 0", "x = y", "def g(): pass"]
    found = pool.map([Job.tests(program, TESTS, entry="f") for program in programs], 2.0)
    whys = [outcome["why"] for outcome in found]
    assert whys[0] == "AssertionError" and whys[1] == "ZeroDivisionError: division by zero"
    assert whys[2] == "the program raised NameError: name 'y' is not defined" and "'f'" in whys[3]
