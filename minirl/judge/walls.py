"""Build walls around a process that runs code of a model: limits, an unprivileged user, no network, no other process,
no file but those it needs.

Each wall is one call of Linux that the process makes on itself and cannot take back. None needs a privilege, a
container or a package:

- `setrlimit` stops what exhausts the machine: endless loops, memory, huge files, threads.
- `setresuid`, where the process is root, gives it a count of its own processes, and nobody to signal.
- Landlock (from kernel 5.13) stops reading the tests, the trainer's files and secrets, and writing outside of a folder.
- A seccomp filter allows the system calls that are needed (`minirl.judge.syscalls`): no network, no other process.
- `chroot` into the worker's own mounts (`minirl.judge.mounts`) hides all other paths; the folder has a small disk.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minirl.judge.libc import check, libc, prctl, succeeds, syscall
from minirl.judge.mounts import CELL
from minirl.judge.syscalls import PR_SET_NO_NEW_PRIVS, SYSCALLS, allow_needed, allow_needed_alone, prepared

FILE_BYTES = 2 * 2**20  # of one file
OPEN_FILES = 32  # a file that is removed while open is in no folder to be counted: this many stay below MAX_DISK
THREADS = 32  # processes and threads of the process's user, where it has one of its own; else the worker counts them
SIGNALS = 64  # that wait to be delivered: the kernel counts them for the whole user

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
CAP_DAC_READ_SEARCH = 2  # to read a Python in /root; Landlock decides what else may be read


@dataclass(frozen=True)
class Limits:
    """Limit the time and memory of one call."""

    seconds: float  # of the wall clock, which the worker watches; the kernel limits CPU time to two seconds more
    memory_mb: int = 1024  # of address space beyond that of the process at its start


class Walls:
    """Prepare the walls of this machine once; `close` closes them around the calling process."""

    def __init__(self, folder: str, readable: Iterable[str], root: str = "", own_mounts: bool = False, number: int = 0):
        """Prepare walls that let a process write to `folder` alone, and read it and `readable`, files and folders. It
        will see the root of `mounts` where one is given. Walls with another number have another user, who shares the
        folder: a program and its tester."""
        self.folder, self.root = folder, root
        self.worker = os.getpid()
        self.uid, self.gid = (_own_uid(number), _own_uid(0)) if os.geteuid() == 0 else (None, None)
        if self.uid is not None:
            os.chown(folder, self.gid, self.gid)
            os.chmod(folder, 0o770)
        self.rules = _landlock_rules(folder, readable)
        if platform.machine() in SYSCALLS:
            prepared()
        # In a user namespace, too, a user's processes are counted apart from those outside, from kernel 5.14 on.
        self.counted = self.uid is not None or (own_mounts and _landlock_version() >= 2)
        if not succeeds(self._close_once):  # every program would seem to die
            raise OSError("the walls of the sandbox cannot be closed on this machine")

    def _close_once(self) -> None:
        try:
            self.close(Limits(1.0))
        except OSError as error:
            print(f"the walls of the sandbox cannot be closed: {error}", file=sys.stderr)
            raise

    def close(self, limits: Limits) -> None:
        """Close the walls around this process, for good; OSError if one of `available_walls` cannot be closed."""
        # The kernel counts per user: a worker that has the same one counts, too, and so would the trainer's threads.
        others = 0 if self.uid is not None else threads(self.worker)
        _set_limits(limits, THREADS + others if self.counted else None)
        home = self.folder
        if self.root:
            os.chroot(self.root)
            home = f"/{CELL}"
        os.chdir(home)
        os.environ.update(HOME=home, TMPDIR=home)
        if sys.platform == "linux":
            _become(self.uid, self.gid, keep_reading=self.rules is not None)
            prctl(PR_SET_NO_NEW_PRIVS, 1)  # no setuid program gives rights back; Landlock and seccomp require it
            prctl(PR_SET_DUMPABLE, 1)  # its worker may look at its memory map, whatever user it had
            prctl(PR_SET_PDEATHSIG, 9)  # it dies with its worker; set here, as changing the user clears it
            if os.getppid() != self.worker:
                raise OSError("the worker ended before its cell was ready")
        if self.rules is not None:
            syscall(LANDLOCK_RESTRICT_SELF, self.rules, 0)
        if platform.machine() in SYSCALLS:
            allow_needed()  # last, as it refuses the calls that the other walls are made of


def available_walls() -> set[str]:
    """Return the walls that this machine has: "limits" always, "user", "files", "network" (which also stands for the
    other system calls)."""
    walls = {"limits"}
    if os.geteuid() == 0 and _own_uid(0) is not None:
        walls.add("user")
    if _landlock_version():
        walls.add("files")
    if sys.platform == "linux" and platform.machine() in SYSCALLS and succeeds(allow_needed_alone):
        walls.add("network")
    return walls


def python_library() -> tuple[list[str], list[str]]:
    """Return what to show in a root to a program that needs the standard library alone, and the folders in it to hide:
    packages, which may contain its tests."""
    library = sysconfig.get_path("stdlib")
    return [library, *_system_files()], [f"{library}/site-packages", f"{library}/dist-packages"]


def python_folders() -> list[str]:
    """Return what a program reads that needs the standard library alone: no packages, which may contain its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    entries = [str(p) for p in library.iterdir() if p.name not in ("site-packages", "dist-packages")]
    return [*entries, *_system_files()]


def python_path() -> list[str]:
    """Return the part of sys.path that `python_folders` allows: so importing a package says that there is none, not
    that it is forbidden."""
    return [p for p in sys.path if p.startswith(sysconfig.get_path("stdlib")) and "-packages" not in p]


def import_folders() -> list[str]:
    """Return what the imports of a function read: the standard library and all of sys.path."""
    return [sysconfig.get_path("stdlib"), *filter(os.path.exists, sys.path), *_system_files()]


def _system_files() -> list[str]:
    # Not /dev/zero: when it is mapped it is shared memory, which no limit counts.
    found = ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/lib64"]
    for root in ("/lib", "/usr/lib"):
        found += map(str, Path(root).glob("*-linux-gnu"))
    return [path for path in found if os.path.exists(path)]


def threads(process: int) -> int:
    """Count the threads of a process, 0 where there is no /proc to ask."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:  # the name in it may be no text
            return int(file.read().rpartition(b")")[2].split()[17])
    except OSError:
        return 0


def _set_limits(limits: Limits, most_threads: int | None) -> None:
    """Set the limits of the kernel; a lower one that is already there stays."""
    cpu = int(limits.seconds) + 2
    wanted = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,  # a crash must not write the memory of the process to the disk
        resource.RLIMIT_MEMLOCK: 0,
    }
    if hasattr(resource, "RLIMIT_SIGPENDING"):
        wanted[resource.RLIMIT_SIGPENDING] = SIGNALS
    if most_threads:
        wanted[resource.RLIMIT_NPROC] = most_threads
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = in_use + limits.memory_mb * 2**20
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


# --- the user ---------------------------------------------------------------------------------------------------------


def _own_uid(number: int) -> int | None:
    """Return a user id that nobody else has, so that the process can signal none but its own and these can be counted;
    None where user ids cannot be changed. In a container there may be 65,536 ids alone."""
    wanted = 2 * os.getpid() + number
    choices = (1_000_000_000 + wanted, 61_184 + wanted % 4_000)
    return next((uid for uid in choices if succeeds(lambda: _set_ids(uid, uid))), None)  # noqa: B023


def _set_ids(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _become(uid: int | None, gid: int | None, keep_reading: bool) -> None:
    """Change to the user, if there is one, and drop all privileges; but where Landlock stands, a process that was root
    keeps the one of reading any file, if it had that: root in a container may not."""
    header, held, kept = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24), 0
    if uid is not None:
        prctl(PR_SET_KEEPCAPS, 1)
        _set_ids(uid, gid)
        check(libc().capget(header, held))
        kept = struct.unpack("=6I", held)[1] & (1 << CAP_DAC_READ_SEARCH if keep_reading else 0)
    check(libc().capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)))


# --- files: Landlock (docs.kernel.org/userspace-api/landlock.html) ----------------------------------------------------

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in (0, 1, 2, 3, 4, 5))
MAKE_DIR, MAKE_REG, TRUNCATE = (1 << n for n in (7, 8, 14))
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the rights that exist for a file; the kernel refuses others
# How many rights each version of Landlock knows: a right that is known and not granted is refused.
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


def _landlock_version() -> int:
    """Return the version of Landlock, 0 where the kernel has none."""
    if sys.platform != "linux":
        return 0
    return max(0, libc().syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _landlock_rules(folder: str, readable: Iterable[str]) -> int | None:
    """Return the file descriptor of a ruleset, None where there is no Landlock: read below `readable`, also write in
    `folder` (files and folders, no links, which could point outside), nothing else; no TCP, no signal to a process
    outside."""
    version = _landlock_version()
    if not version:
        return None
    handled = (1 << RIGHTS_BY_VERSION.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    os.set_inheritable(rules, False)
    writable = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | REMOVE_DIR | MAKE_REG | MAKE_DIR | TRUNCATE
    for path, rights in [*((p, READ_FILE | READ_DIR | EXECUTE) for p in readable), (folder, writable)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what cannot be opened here need not be granted
        if not os.path.isdir(path):
            rights &= OF_FILES
        if path == "/dev/null":
            rights |= WRITE_FILE
        syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights & handled, place), 0)
        os.close(place)
    return rules
