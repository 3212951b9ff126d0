"""Call Linux by what Python's library has no function for; an OSError where a call fails."""

import ctypes
import os


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments) -> int:
    return check(libc().syscall(number, *map(_long, arguments)))


def prctl(option: int, *arguments) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    check(libc().prctl(option, *map(_long, padded)))


def _long(argument):
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def succeeds(action) -> bool:
    """Return whether the action succeeds in a process of its own, as it cannot be taken back."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
