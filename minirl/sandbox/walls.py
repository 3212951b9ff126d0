"""The walls around a process that runs what a model wrote: limits, an unprivileged user, no network, no other process,
no file but those it needs.

Each wall is one call of Linux that the process makes on itself and cannot take back: `setrlimit`; `setresuid` to a user
of its own, where it is root; Landlock, which hides files (kernel 5.13); a seccomp filter, which forbids system calls.
None needs a privilege, a container or a package.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 2 * 2**20  # of one file
OPEN_FILES = 32  # a file that was removed while it is open is in no folder: all of them together stay below MAX_DISK
THREADS = 32  # processes and threads of its user, where it has one of its own

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
CAP_DAC_READ_SEARCH = 2  # to read a Python that lies in /root; what may be read is Landlock's business


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    seconds: float  # of the wall clock; the worker holds this, and the kernel the same of CPU time
    memory_mb: int = 1024  # of address space beyond what the process has at the start


class Walls:
    """The walls of this machine, prepared once; `close` shuts them around the calling process."""

    def __init__(self, folder: str, readable: Iterable[str]):
        """`folder` is the only place that can be written to, `readable` are files and folders beside it."""
        self.folder = folder
        self.uid = _own_uid() if os.geteuid() == 0 else None
        if self.uid is not None:
            os.chown(folder, self.uid, self.uid)
        self.rules = _landlock_rules(folder, readable)

    def close(self, limits: Limits) -> None:
        """OSError if a wall that stands in `standing` cannot be shut."""
        _set_limits(limits, self.uid is not None)
        if self.uid is not None:
            _become(self.uid, keep_reading=self.rules is not None)
        if sys.platform == "linux":
            _prctl(PR_SET_NO_NEW_PRIVS, 1)
            _prctl(PR_SET_PDEATHSIG, 9)  # changing the user has cleared it
        if self.rules is not None:
            _syscall(LANDLOCK_RESTRICT_SELF, self.rules, 0)
        if platform.machine() in SYSCALLS:
            _forbid_syscalls()


def standing() -> set[str]:
    """Which walls this machine has: "limits" always, "user", "files", "network" (which also forbids processes)."""
    walls = {"limits"}
    if os.geteuid() == 0 and _own_uid() is not None:
        walls.add("user")
    if _landlock_version():
        walls.add("files")
    if sys.platform == "linux" and platform.machine() in SYSCALLS and _succeeds(_forbid_syscalls_alone):
        walls.add("network")
    return walls


def python_folders() -> list[str]:
    """What a program of the standard library alone reads: not the packages, which may hold its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    entries = [str(p) for p in library.iterdir() if p.name not in ("site-packages", "dist-packages")]
    return [*entries, *_system_files()]


def python_path() -> list[str]:
    """Of sys.path what `python_folders` holds: so a package is not there for a program, instead of forbidden."""
    return [p for p in sys.path if p.startswith(sysconfig.get_path("stdlib")) and "-packages" not in p]


def import_folders() -> list[str]:
    """What a scorer's imports read: all of sys.path beside `python_folders`."""
    return [sysconfig.get_path("stdlib"), *filter(os.path.exists, sys.path), *_system_files()]


def _system_files() -> list[str]:
    found = ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom", "/lib64"]
    for root in ("/lib", "/usr/lib"):
        found += map(str, Path(root).glob("*-linux-gnu"))
    return [path for path in found if os.path.exists(path)]


def _set_limits(limits: Limits, own_user: bool) -> None:
    cpu = int(limits.seconds) + 2
    wanted = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if own_user:  # any other user has processes that would count
        wanted[resource.RLIMIT_NPROC] = THREADS
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = in_use + limits.memory_mb * 2**20
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


# --- the user ---------------------------------------------------------------------------------------------------------


def _own_uid() -> int | None:
    """A user id that nobody else has: so it can signal no process but its own, and its processes can be counted. None
    where user ids cannot be changed."""
    return next((uid for uid in (1_000_000_000 + os.getpid(), 65534) if _succeeds(lambda uid=uid: _set_ids(uid))), None)


def _set_ids(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _become(uid: int, keep_reading: bool) -> None:
    if keep_reading:
        _prctl(PR_SET_KEEPCAPS, 1)
    _set_ids(uid)
    if keep_reading:
        header = struct.pack("=Ii", 0x20080522, 0)
        _check(_libc().capset(header, struct.pack("=6I", *[1 << CAP_DAC_READ_SEARCH] * 2, 0, 0, 0, 0)))


# --- files: Landlock (docs.kernel.org/userspace-api/landlock.html) ----------------------------------------------------

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in (0, 1, 2, 3, 4, 5))
MAKE_DIR, MAKE_REG, TRUNCATE = (1 << n for n in (7, 8, 14))
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the rights that a file that is no folder can have
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many; all that are not granted are refused


def _landlock_version() -> int:
    """0 where the kernel has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _landlock_rules(folder: str, readable: Iterable[str]) -> int | None:
    """A ruleset's file descriptor: read below `readable`, also write in `folder` (files and folders, no links), nothing
    else; no signal to a process outside, no TCP."""
    version = _landlock_version()
    if not version:
        return None
    handled = (1 << RIGHTS_BY_VERSION.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    os.set_inheritable(rules, False)
    writable = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | REMOVE_DIR | MAKE_REG | MAKE_DIR | TRUNCATE
    for path, rights in [*((p, READ_FILE | READ_DIR | EXECUTE) for p in readable), (folder, writable)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # it cannot be opened, so there is nothing to grant
        if not os.path.isdir(path):
            rights &= OF_FILES
        if path == "/dev/null":
            rights |= WRITE_FILE
        _syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights & handled, place), 0)
        os.close(place)
    return rules


# --- system calls: seccomp --------------------------------------------------------------------------------------------

SYSCALLS = {"x86_64": 0, "aarch64": 1}  # column in the table below
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
FORBIDDEN = {  # name: (x86_64, aarch64); None where there is none
    # network, and the ring that could open a socket without a call
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "io_uring_setup": (425, 425)},
    # processes, and leaving the group that is killed
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    **{"setsid": (112, 157), "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268)},
    # other processes
    **{"kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    # what Landlock does not watch: modes, owners, attributes, times, mounts, files by handle
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466)},
    **{"utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None)},
    **{"inotify_init": (253, None), "inotify_init1": (294, 26)},
    **{"mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    # memory that no limit counts, and objects that outlive the process
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190)},
    **{"msgget": (68, 186), "mq_open": (240, 180)},
    # doors into the kernel
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
}
CLONE, CLONE3, TGKILL = (56, 220), (435, 435), (234, 131)
THREAD = 0x10400  # CLONE_THREAD and CLONE_FILES: one with open files of its own would multiply what can be open

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # of the filter's language
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; of the first argument the low word
ALLOW, KILL = 0x7FFF0000, 0x80000000


def _forbid_syscalls() -> None:
    """Threads are allowed (clone with THREAD), a process is not; a signal to itself is (abort)."""
    column = SYSCALLS[platform.machine()]
    refuse, unknown = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    program = [
        *((LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT_ARCH[column]), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, refuse)),  # numbers of the x32 ABI
        *((EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, unknown)),  # its flags lie in memory; libc falls back on clone
        *((EQUAL, 0, 5, CLONE[column]), (LOAD, 0, 0, ARGUMENT), (AND, 0, 0, THREAD), (EQUAL, 1, 0, THREAD)),
        *((RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)),
        *((EQUAL, 0, 4, TGKILL[column]), (LOAD, 0, 0, ARGUMENT), (EQUAL, 1, 0, os.getpid())),
        *((RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)),
    ]
    for number in (numbers[column] for numbers in FORBIDDEN.values() if numbers[column] is not None):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refuse)]
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _prctl(PR_SET_SECCOMP, 2, header)


def _forbid_syscalls_alone() -> None:
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _forbid_syscalls()


# --- libc -------------------------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments) -> int:
    return _check(_libc().syscall(number, *map(_long, arguments)))


def _prctl(option: int, *arguments) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    _check(_libc().prctl(option, *map(_long, padded)))


def _long(argument):
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _succeeds(action) -> bool:
    """Whether a process that does it and nothing else ends well."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
