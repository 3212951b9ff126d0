"""Allow a process the system calls that Python, its library and threads need, by a seccomp filter, and no other.

What is allowed concerns the process itself, files (which Landlock watches) and pipes. There is no way to name another
process in it: calls that take one's number are missing, or allowed for the caller's own number alone.
"""

import ctypes
import errno
import functools
import os
import platform
import struct

from minirl.judge.libc import prctl

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
SYSCALLS = {"x86_64": 0, "aarch64": 1}  # index into the pairs below
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
ALLOWED = {  # name: its numbers on (x86_64, aarch64), None where it does not exist
    # its own memory; no locked pages, and no memfd, which is memory that no limit counts
    **{"munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233), "brk": (12, 214)},
    **{"msync": (26, 227)},
    # what is open; no fallocate (blocks beyond a file's end), no flock (it locks files that are only readable), no
    # splice, and no sendmsg, by which open files could be kept in flight, where no limit counts them
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67)},
    **{"pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287)},
    **{"lseek": (8, 62), "sendfile": (40, 71), "copy_file_range": (326, 285), "close": (3, 57)},
    **{"close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fsync": (74, 82)},
    **{"fdatasync": (75, 83), "ftruncate": (77, 46), "fadvise64": (221, 223)},
    # files and folders by their path; no modes, owners, attributes, times, links, mounts, watching, handles, which
    # Landlock does not cover, and no truncate, which it covers from version 3 on only (ftruncate needs a writable file)
    **{"creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34)},
    **{"rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38)},
    **{"renameat2": (316, 276), "chdir": (80, 49), "fchdir": (81, 50), "getcwd": (79, 17)},
    **{"umask": (95, 166), "getdents": (78, None), "getdents64": (217, 61), "stat": (4, None), "fstat": (5, 80)},
    **{"lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None)},
    **{"faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78)},
    # waiting, and pipes; of sockets only a connected pair, of which an event loop is made
    **{"poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72)},
    **{"epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None)},
    **{"epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19)},
    **{"pipe": (22, None), "pipe2": (293, 59), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210)},
    **{"getsockname": (51, 204)},
    # threads; libc ends the process if a new one cannot call rseq
    **{"set_robust_list": (273, 99), "rseq": (334, 293), "gettid": (186, 178)},
    **{"sched_yield": (24, 124), "getcpu": (309, 168), "exit": (60, 93), "exit_group": (231, 94)},
    # signals to itself
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136)},
    **{"rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132)},
    **{"restart_syscall": (219, 128), "pause": (34, None), "alarm": (37, None), "setitimer": (38, 103)},
    **{"getitimer": (36, 102)},
    # time and chance
    **{"nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153)},
    **{"getrandom": (318, 278)},
    # who it is, its limits, the machine
    **{"getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176)},
    **{"getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150)},
    **{"getpgrp": (111, None), "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164)},
    **{"uname": (63, 160), "sysinfo": (99, 179)},
}
THREAD = 0x3D0F00  # the flags by which libc makes a thread: all is shared, the open files and their limit too
OWN = 0x4E574F  # stands for the number of the process that installs the filter
ALL = 0xFFFFFFFF
# What is opened to read must not be emptied by that, which Landlock, too, refuses from version 3 on only.
O_WRONLY, O_RDWR, O_TRUNC = 1, 2, 0x200
OPEN = (3 | O_TRUNC, (0, O_WRONLY, O_RDWR, O_WRONLY | O_TRUNC, O_RDWR | O_TRUNC))
# Private memory, and files. Of shared memory without a file no limit counts what a process keeps but no longer maps.
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE, MAP_ANONYMOUS, MAP_HUGETLB = 1, 2, 3, 0xF, 0x20, 0x40000
MAPPINGS = (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_PRIVATE | MAP_ANONYMOUS)
# The machine's clocks and the caller's own two; a negative number names the clock of any process or thread.
CLOCK = (ALL, tuple(range(12)))
# None of the commands that lend a priority to the thread whose number is in the word.
FUTEX_COMMANDS = (0, 1, 3, 4, 5, 9, 10)  # wait, wake, requeue (2), wake and change, wait and wake by bits
FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME = 128, 256
TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD = 0x5401, 0x802C542A, 0x5413, 0x541B
FIONBIO, FIONCLEX, FIOCLEX = 0x5421, 0x5450, 0x5451
F_DUPFD, F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ = 0, 7, 1030, 1032  # all between the first two are allowed
PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_NO_NEW_PRIVS = OWN_OPTIONS = (2, 3, 15, 16, 39)
SOL_SOCKET, SO_TYPE, SO_ERROR, SO_PROTOCOL, SO_DOMAIN = 1, 3, 4, 38, 39
AF_UNIX, SOCK_STREAM, SOCK_TYPE = 1, 1, 0xF
# name: numbers, and what must hold of its arguments: (index, the bits that count, the values that these may have).
CONDITIONAL = {
    "open": ((2, None), [(1, *OPEN)]),
    "openat": ((257, 56), [(2, *OPEN)]),
    "mmap": ((9, 222), [(3, MAP_TYPE | MAP_ANONYMOUS | MAP_HUGETLB, MAPPINGS)]),
    # Commands for a terminal's size and kind, close-on-exec, blocking, and how much there is to read: none that asks
    # for signals, shares blocks of another file or changes its attributes.
    "ioctl": ((16, 29), [(1, ALL, (TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2))]),
    # Duplicates, flags, the pipe's size, and locks of sqlite: to lock out others these need a file that is writable. No
    # owner to send signals to, no lease, no larger pipe.
    "fcntl": ((72, 25), [(1, ALL, (*range(F_DUPFD, F_SETLKW + 1), F_DUPFD_CLOEXEC, F_GETPIPE_SZ))]),
    "clone": ((56, 220), [(0, ALL, (THREAD,))]),
    "tgkill": ((234, 131), [(0, ALL, (OWN,))]),  # `abort` and `raise` send a signal so
    "prlimit64": ((302, 261), [(0, ALL, (0, OWN))]),
    "sched_getaffinity": ((204, 123), [(0, ALL, (0, OWN))]),
    "getpgid": ((121, 155), [(0, ALL, (0, OWN))]),
    "getsid": ((124, 156), [(0, ALL, (0, OWN))]),
    # To read its signal at the worker's death, whether it may be dumped or gain rights, and a thread's name; to set
    # that name. Nothing else may be set: without the signal it would outlive the trainer.
    "prctl": ((157, 167), [(0, ALL, OWN_OPTIONS)]),
    "arch_prctl": ((158, None), [(0, ALL, (0x1021, 0x1022, 0x1023))]),  # matrix units of the processor
    # Streams: a datagram could go to any local service.
    "socketpair": ((53, 199), [(0, ALL, (AF_UNIX,)), (1, SOCK_TYPE, (SOCK_STREAM,))]),
    # What kind of socket it is, and its error: not the process at the other end.
    "getsockopt": ((55, 209), [(1, ALL, (SOL_SOCKET,)), (2, ALL, (SO_TYPE, SO_ERROR, SO_PROTOCOL, SO_DOMAIN))]),
    "clock_gettime": ((228, 113), [(0, *CLOCK)]),
    "clock_getres": ((229, 114), [(0, *CLOCK)]),
    "clock_nanosleep": ((230, 115), [(0, *CLOCK)]),
    "futex": ((202, 98), [(1, ALL & ~(FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME), FUTEX_COMMANDS)]),
}
# Calls from this number on are new: libc tries an older one where the answer is that they do not exist. The flags of
# clone3, one of them, are in memory, where a filter sees none. So does libc go on where it cannot ask for a thread's
# processors, which is asked by a number that the filter does not know.
NEW = 424
MISSING = ("sched_getaffinity",)

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of the filter (classic BPF)
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; of an argument, of its low 4 bytes
ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, ABSENT = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def allow_needed() -> None:
    """Install the filter for this process, for good."""
    program = prepared().replace(struct.pack("=I", OWN), struct.pack("=I", os.getpid()))
    code = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SET_SECCOMP, 2, struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))


@functools.cache
def prepared() -> bytes:
    """Return the filter but for OWN. It is the same for all cells, so the worker makes it before they are forked."""
    column = SYSCALLS[platform.machine()]
    program = [
        # A call by another architecture's numbers (32-bit on x86_64) would pass a filter of these numbers.
        *((LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT_ARCH[column]), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE)),  # likewise x32
    ]
    for name, (numbers, conditions) in CONDITIONAL.items():
        if numbers[column] is not None:
            checks = _checks(conditions, ABSENT if name in MISSING else REFUSE)
            program += [(EQUAL, 0, len(checks), numbers[column]), *checks]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            program += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    program += [(AT_LEAST, 0, 1, NEW), (RETURN, 0, 0, ABSENT), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def _checks(conditions, otherwise: int) -> list[tuple]:
    """Return the instructions for one call: an instruction is (code, jump if true, jump if false, operand), and a jump
    counts the instructions that it skips."""
    lines = []
    for index, bits, values in conditions:
        lines += [(LOAD, 0, 0, ARGUMENTS + 8 * index), (AND, 0, 0, bits)]
        for left, value in zip(range(len(values), 0, -1), values, strict=True):
            lines.append((EQUAL, left, 0, value))
        lines.append((RETURN, 0, 0, otherwise))
    return [*lines, (RETURN, 0, 0, ALLOW)]


def allow_needed_alone() -> None:
    """Install the filter where nothing else stands, to see whether it can be."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    allow_needed()
