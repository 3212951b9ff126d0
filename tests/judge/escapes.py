"""Judge the attacks of escapes.toml as one kind of user, and print what became of them and of what they attacked.

    python escapes.py root|user|"root, no mounts"|"user, no mounts" FOLDER

FOLDER holds what is left behind. A victim, of the same user as this process, stands for the trainer.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOBODY = 65534
NUMBERS = {  # of the calls in the file: on x86_64 and aarch64, None where there is none
    **{"prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_getaffinity": (204, 123)},
    **{"sched_setscheduler": (144, 119), "sched_getscheduler": (145, 120), "sched_setparam": (142, 118)},
    **{"sched_setattr": (314, 274), "sched_getattr": (315, 275), "sched_rr_get_interval": (148, 127)},
    **{"setpriority": (141, 140), "getpriority": (140, 141), "ioprio_set": (251, 30), "ioprio_get": (252, 31)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434)},
    **{"getpgid": (121, 155), "getsid": (124, 156), "capget": (125, 90), "get_robust_list": (274, 100)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239), "kcmp": (312, 272), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "perf_event_open": (298, 241), "prctl": (157, 167), "setresuid": (117, 147)},
    **{"setfsuid": (122, 151), "personality": (135, 92), "setsid": (112, 157), "setpgid": (109, 154)},
    **{"clone": (56, 220), "clone3": (435, 435), "unshare": (272, 97), "seccomp": (317, 277), "mlock": (149, 228)},
    **{"mlockall": (151, 230), "set_mempolicy": (238, 237), "mmap": (9, 222), "memfd_create": (319, 279)},
    **{"memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186)},
    **{"mq_open": (240, 180), "io_setup": (206, 0), "io_uring_setup": (425, 425), "timer_create": (222, 107)},
    **{"signalfd4": (289, 74), "userfaultfd": (323, 282), "keyctl": (250, 219), "bpf": (321, 280)},
    **{"inotify_init1": (294, 26), "fanotify_init": (300, 262), "landlock_create_ruleset": (444, 444)},
    **{"sync": (162, 81), "statfs": (137, 43), "fstatfs": (138, 44), "fsopen": (430, 430), "open_tree": (428, 428)},
    **{"listmount": (458, 458), "chroot": (161, 51), "mount": (165, 40), "mknodat": (259, 33)},
    **{"symlinkat": (266, 36), "fchmodat": (268, 53), "fchmodat2": (452, 452), "utimensat": (280, 88)},
    **{"listxattr": (194, 11), "name_to_handle_at": (303, 264), "socket": (41, 198), "socketpair": (53, 199)},
    **{"syslog": (103, 116), "adjtimex": (159, 171), "quotactl": (179, 60), "fallocate": (285, 47)},
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "futex": (202, 98)},
}
HEAD = """
import ctypes, os, struct, time
def room(content, size=256):
    buffer = ctypes.create_string_buffer(content, max(size, len(content)))
    rooms.append(buffer)
    return ctypes.addressof(buffer)
rooms, libc = [], ctypes.CDLL(None, use_errno=True)
NUMBERS = {numbers!r}
WORKER, SELF, UID, TESTER = os.getppid(), os.getpid(), os.getuid(), os.getpid() + 1
VICTIM, TRAINER, SERVICE, HOME = {places!r}
ROOM, ROOM256, ZEROS, ONES = room(b''), room(b''), room(b''), room(b'\\1' + bytes(7) + b'\\1')
STACK = room(b'', 65536) + 65536
ATTRIBUTES = room(struct.pack('=II', 48, 5))
CAPABILITIES = room(struct.pack('=Ii', 0x20080522, VICTIM))
CHILD = room(struct.pack('=9Q', 0, 0, 0, 0, 17, 0, 0, 0, 0))
FILTER = room(struct.pack('@HP', 1, room(struct.pack('=HBBI', 6, 0, 0, 0x7fff0000))))
LIST = room(struct.pack('=IIQQ', 24, 0, 0xffffffffffffffff, 0))
HANDLE = room(struct.pack('=Ii', 128, 0))
NAME, DOT, TMPFS = room(b'minirl-was-here'), room(b'.'), room(b'tmpfs')
def sys(name, *arguments):
    arguments = [*arguments, *[0] * 6][:6]
    return libc.syscall(ctypes.c_long(NUMBERS[name]), *map(ctypes.c_long, arguments)) >= 0
def pin(file, size=2**21):
    libc.mmap.restype = ctypes.c_void_p
    place = libc.mmap(None, ctypes.c_size_t(size), 3, 1, file, ctypes.c_long(0))
    assert place != 2**64 - 1
    return place
"""
THREADS = """
import threading, time
for _ in range(40): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # as packages may, imported
def five():
    threads, done = [threading.Thread(target=lambda: done.append(1)) for _ in range(5)], []
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return {"passed": len(done) == 5, "why": ""}
"""
KEY = 0x4D524C  # of the objects that attacks try to make
BATCH, SECONDS = 12, 1.5
TESTS = "assert f(2) == 4\nassert f(0) == 0\nassert f(-3) == 9\n"
RIGHT = "\ndef f(x):\n    return x * x\n"


def programs(cases: dict, places: tuple, all_of_them: bool) -> dict[str, tuple[str, str, str]]:
    """Return the program, the tests and their helpers of each attack, or of those on resources alone; system calls come
    in few programs, which say which of them were not refused."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = {name: pair[column] for name, pair in NUMBERS.items()}
    head = HEAD.replace("{numbers!r}", repr(numbers)).replace("{places!r}", repr(places))
    attacks = cases["resources"] | (cases["programs"] | cases["hidden"] if all_of_them else {})
    calls = list(cases["calls"].items()) if all_of_them else []
    for n in range(0, len(calls), BATCH):
        lines = (f"won += [{name!r}] * sys({c!r}, {', '.join(map(str, a))})" for name, (c, *a) in calls[n : n + BATCH])
        attacks[f"calls {n}"] = "\n".join(["won = []", *lines, "raise Exception(f'won: {won}')"])
    judged = cases["judge"] if all_of_them else {}
    return {name: (head + attack + RIGHT, TESTS, "") for name, attack in attacks.items()} | judged


def state(process: int) -> dict:
    """Return what another process could have changed about one."""
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return {
        "alive": stat[0] in "SR",
        "group": stat[2:4],
        "priority": stat[15:17],
        "policy": (os.sched_getscheduler(process), os.sched_getparam(process).sched_priority),
        "processors": sorted(os.sched_getaffinity(process)),
        "limits": [resource.prlimit(process, n) for n in range(16)],
        "dies first": Path(f"/proc/{process}/oom_score_adj").read_text(),
        "disk": ctypes.CDLL(None).syscall({"x86_64": 252, "aarch64": 31}[platform.machine()], 1, process),
    }


def objects() -> list[str]:
    """Return the objects that outlive processes: shared memory, semaphores, queues."""
    tables = {kind: Path("/proc/sysvipc", kind).read_text() for kind in ("shm", "sem", "msg")}
    return [kind for kind, table in tables.items() if str(KEY) in table] + [
        str(p) for place in ("/dev/shm", "/dev/mqueue") for p in Path(place).glob("*minirl*")
    ]


def judge(folder: str, all_of_them: bool) -> dict:
    """Judge the attacks; return the outcomes, the walls that stood, and whatever harm was done."""
    from cases import read_cases

    from minirl.judge.pool import Job, Pool

    service = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    service.bind(f"{folder}/service")
    os.chmod(f"{folder}/service", 0o777)
    Path(folder, "own").mkdir()
    Path(folder, "own/mine.py").write_text(THREADS)
    victim = subprocess.Popen(["sleep", "600"])
    before, trainer, there = state(victim.pid), state(os.getpid()), objects()
    cases = read_cases("escapes")
    attacks = programs(cases, (victim.pid, os.getpid(), f"{folder}/service", folder), all_of_them)
    with Pool(4) as pool:
        jobs = {name: Job.tests(program, tests, helpers, "f") for name, (program, tests, helpers) in attacks.items()}
        # A function of the user's may be called with hostile text, too, and its code must not get anywhere either.
        by_functions = [name for name in attacks if name.startswith("calls ") or name in cases["resources"]]
        jobs |= {f"{name}, in a function": Job.call("builtins:exec", [attacks[name][0], {}]) for name in by_functions}
        jobs["honest"] = Job.tests(RIGHT, TESTS, entry="f")
        jobs["honest, in a function"] = Job.call(f"{folder}/own/mine.py:five", [])
        outcomes = dict(zip(jobs, pool.map(list(jobs.values()), SECONDS, 256), strict=True))
        walls = sorted(set.intersection(*(worker.walls for worker in pool.workers)))
    harm = [f"victim: {name}" for name, now in state(victim.pid).items() if now != before[name]]
    harm += [f"trainer: {name}" for name, now in state(os.getpid()).items() if now != trainer[name]]
    harm += [f"objects {objects()}"] if objects() != there else []
    harm += [f"left: {path}" for path in map(str, Path(folder).iterdir()) if not path.endswith(("/service", "/own"))]
    service.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        harm.append(f"the service heard {service.recv(9)!r}")
    victim.kill()
    victim.wait()
    found = {name: o if isinstance(o, dict) else f"{type(o).__name__}: {o}" for name, o in outcomes.items()}
    return {"outcomes": found, "walls": walls, "harm": harm}


# --- the kinds of users -----------------------------------------------------------------------------------------------


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def forbid_mounts(libc) -> None:
    """Refuse `unshare`, as the filters of containers do, for which root lacks the capability."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    lines = [(0x20, 0, 0, 0), (0x15, 0, 1, (272, 97)[column]), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    checked(libc.prctl(38, *map(ctypes.c_long, (1, 0, 0, 0))))
    checked(libc.prctl(22, ctypes.c_long(2), struct.pack("@HP", len(lines), ctypes.addressof(code)), 0, 0))


def show_python(libc) -> None:
    """Let every user read Python and this project, wherever root has them; no other process sees this."""
    checked(libc.unshare(0x20000))
    checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None))
    needed = [os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, ROOT)]
    places = [(os.open(path, os.O_PATH), path) for path in needed]
    for place, path in places:
        closed = next((p for p in reversed([path, *map(str, Path(path).parents)]) if not os.stat(p).st_mode & 1), None)
        if closed:
            checked(libc.mount(b"none", closed.encode(), b"tmpfs", ctypes.c_ulong(0), b"mode=755"))
        if not os.path.isdir(path):
            os.makedirs(path)
            checked(libc.mount(f"/proc/self/fd/{place}".encode(), path.encode(), None, ctypes.c_ulong(0x5000), None))
        os.close(place)


def drop_capabilities(libc) -> None:
    """Keep those that root has in a container, by default."""
    for capability in {*range(64)} - {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}:
        libc.prctl(24, *map(ctypes.c_long, (capability, 0, 0, 0)))


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def main() -> None:
    kind, folder = sys.argv[1:3]
    libc = ctypes.CDLL(None, use_errno=True)
    if kind in ("user", "user, no mounts", "root, no mounts") and os.getuid() == 0:
        try:
            show_python(libc)
        except OSError as error:
            raise SystemExit(f"cannot show Python to other users ({error})") from error
        drop_capabilities(libc) if kind.startswith("root") else become_nobody()
    if kind == "user, no mounts":
        forbid_mounts(libc)
    if not kind.startswith("now"):  # a process that has changed its user is not an ordinary one: start anew
        os.execv(sys.executable, [sys.executable, __file__, f"now, {kind}", folder])
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    print(json.dumps(judge(folder, not kind.endswith("no mounts"))))


if __name__ == "__main__":
    main()
