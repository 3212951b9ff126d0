"""Build walls around a process that runs code of a model: limits, an unprivileged user, no network, no other process,
no file but those it needs.

Each wall is one call of Linux that the process makes on itself and cannot take back. None needs a privilege, a
container or a package:

- `setrlimit` stops what exhausts the machine: endless loops, memory, huge files, fork bombs.
- `setresuid`, where the process is root, stops signals to other processes, and gives it a count of its own processes.
- Landlock (from kernel 5.13) stops reading the tests, the trainer's files and secrets, and writing outside of a folder.
- A seccomp filter stops network, new processes, and system calls that the others do not cover.
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
OPEN_FILES = 32  # a file that is removed while open is in no folder to be counted: this many stay below MAX_DISK
THREADS = 32  # processes and threads of the process's user, where it has one of its own

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
CAP_DAC_READ_SEARCH = 2  # to read a Python in /root; Landlock decides what else may be read


@dataclass(frozen=True)
class Limits:
    """Limit the time and memory of one call."""

    seconds: float  # of the wall clock, which the worker watches; the kernel limits CPU time to two seconds more
    memory_mb: int = 1024  # of address space beyond that of the process at its start


class Walls:
    """Prepare the walls of this machine once; `close` closes them around the calling process."""

    def __init__(self, folder: str, readable: Iterable[str]):
        """Prepare walls that let a process write to `folder` alone, and read it and `readable`, files and folders."""
        self.folder = folder
        self.uid = _own_uid() if os.geteuid() == 0 else None
        if self.uid is not None:
            os.chown(folder, self.uid, self.uid)
        self.rules = _landlock_rules(folder, readable)

    def close(self, limits: Limits) -> None:
        """Close the walls around this process, for good; OSError if one of `available_walls` cannot be closed."""
        _set_limits(limits, self.uid is not None)
        if self.uid is not None:
            _become(self.uid, keep_reading=self.rules is not None)
        if sys.platform == "linux":
            _prctl(PR_SET_NO_NEW_PRIVS, 1)  # no setuid program gives rights back; Landlock and seccomp require it
            _prctl(PR_SET_PDEATHSIG, 9)  # it dies with its worker; set here, as changing the user clears it
        if self.rules is not None:
            _syscall(LANDLOCK_RESTRICT_SELF, self.rules, 0)
        if platform.machine() in SYSCALLS:
            _forbid_syscalls()  # last, as it forbids calls that the other walls are made of


def available_walls() -> set[str]:
    """Return the walls that this machine has: "limits" always, "user", "files", "network" (which also forbids new
    processes)."""
    walls = {"limits"}
    if os.geteuid() == 0 and _own_uid() is not None:
        walls.add("user")
    if _landlock_version():
        walls.add("files")
    if sys.platform == "linux" and platform.machine() in SYSCALLS and _succeeds(_forbid_syscalls_alone):
        walls.add("network")
    return walls


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
    found = ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom", "/lib64"]
    for root in ("/lib", "/usr/lib"):
        found += map(str, Path(root).glob("*-linux-gnu"))
    return [path for path in found if os.path.exists(path)]


def _set_limits(limits: Limits, own_user: bool) -> None:
    """Set the limits of the kernel; a lower one that is already there stays."""
    cpu = int(limits.seconds) + 2
    wanted = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,  # a crash must not write the memory of the process to the disk
    }
    if own_user:  # the kernel counts per user: with a shared one the trainer's threads would count too
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
    """Return a user id that nobody else has, so that the process can signal none but its own and these can be counted;
    None where user ids cannot be changed."""
    return next((uid for uid in (1_000_000_000 + os.getpid(), 65534) if _succeeds(lambda uid=uid: _set_ids(uid))), None)


def _set_ids(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _become(uid: int, keep_reading: bool) -> None:
    """Change to the user and drop all privileges, but where Landlock stands keep the one of reading any file."""
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
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the rights that exist for a file; the kernel refuses others
# How many rights each version of Landlock knows: a right that is known and not granted is refused.
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


def _landlock_version() -> int:
    """Return the version of Landlock, 0 where the kernel has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _landlock_rules(folder: str, readable: Iterable[str]) -> int | None:
    """Return the file descriptor of a ruleset, None where there is no Landlock: read below `readable`, also write in
    `folder` (files and folders, no links, which could point outside), nothing else; no TCP, no signal to a process
    outside."""
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
            continue  # what cannot be opened here need not be granted
        if not os.path.isdir(path):
            rights &= OF_FILES
        if path == "/dev/null":
            rights |= WRITE_FILE
        _syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights & handled, place), 0)
        os.close(place)
    return rules


# --- system calls: seccomp --------------------------------------------------------------------------------------------

SYSCALLS = {"x86_64": 0, "aarch64": 1}  # index into the pairs below
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
FORBIDDEN = {  # name: its numbers on (x86_64, aarch64), None where it does not exist
    # network, also by a ring of requests that opens a socket without a system call
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "io_uring_setup": (425, 425)},
    # new processes, and leaving the group of processes that is killed at the end
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    **{"setsid": (112, 157), "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268)},
    # signals to other processes, their memory and their files
    **{"kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    # what Landlock does not cover: modes, owners, attributes, times, watching files, mounts, files by handle
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466)},
    **{"utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None)},
    **{"inotify_init": (253, None), "inotify_init1": (294, 26)},
    **{"mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    # memory that no limit counts, and objects that stay after the process has ended
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190)},
    **{"msgget": (68, 186), "mq_open": (240, 180)},
    # large interfaces of the kernel with a history of holes
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
}
CLONE, CLONE3, TGKILL = (56, 220), (435, 435), (234, 131)
THREAD = 0x10400  # CLONE_THREAD and CLONE_FILES: a thread with its own open files would get OPEN_FILES more of them

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of the filter (classic BPF)
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; ARGUMENT: the first one's low 32 bits
ALLOW, KILL = 0x7FFF0000, 0x80000000


def _forbid_syscalls() -> None:
    """Install the filter. A new thread is allowed (clone with THREAD), a new process is not; a signal to itself is
    allowed, as `abort` sends one.

    An instruction is (code, jump if true, jump if false, operand); a jump counts the instructions that it skips.
    """
    column = SYSCALLS[platform.machine()]
    refuse, unknown = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    program = [
        # A call by another architecture's numbers (32-bit on x86_64) would pass a filter of these numbers.
        *((LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT_ARCH[column]), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, refuse)),  # likewise x32
        # The flags of clone3 are in memory, where the filter sees none; without it, libc uses clone.
        *((EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, unknown)),
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
    """Return whether the action succeeds in a process of its own, as it cannot be taken back."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
