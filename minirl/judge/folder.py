"""Measure and empty the folder of a cell, whatever tree the cell has made there.

A cell is a process that runs hostile code (see `worker`). It may write to this folder alone, and it may change the tree
while it is read here, nest folders deeper than a path can name, or take away their permissions.
"""

import os
import secrets
from contextlib import suppress

from minirl.judge.libc import libc

MAX_FILES, MAX_DISK = 256, 64 * 2**20  # number of files and folders, and their bytes, that a cell may write
MAX_DEPTH = 12  # folders in folders; this many names of 255 bytes are still a path that can be opened


def is_full(folder: str, held: int = 0) -> bool:
    """Return whether the folder, with `held` bytes elsewhere, holds more than the limits allow. The cell is at work, so
    anything may be gone the next moment. A folder that cannot be read counts as full: files may be hidden there."""
    entries, size = 0, held
    level = [folder]
    for _ in range(MAX_DEPTH + 1):
        below = []
        for path in level:
            try:
                with os.scandir(path) as found:
                    for entry in found:
                        entries += 1
                        if entry.is_dir(follow_symlinks=False):
                            below.append(entry.path)
                        else:
                            about = entry.stat(follow_symlinks=False)
                            size += max(about.st_size, 512 * about.st_blocks)  # blocks may lie beyond its end
                        if entries > MAX_FILES or size > MAX_DISK:
                            return True
            except (FileNotFoundError, NotADirectoryError):  # the cell has just removed or replaced it
                pass
            except OSError:
                return True
        level = below
    return bool(level) or size > MAX_DISK


def pinned(process: int, folder: str) -> int:
    """Count the removed files of the folder that a process still maps: they are in no folder, and no limit counts them.
    0 where the system does not let this process look; ValueError where the process keeps it from looking."""
    place = f"/proc/{process}"
    try:
        owner = os.stat(place)
        if os.geteuid() == 0:  # root of a container may not look at another user's process, but that user may
            libc().setfsgid(owner.st_gid)
            libc().setfsuid(owner.st_uid)
        lines = _maps(place).split(b"\n")  # a name may hold any other character
    except OSError:
        return 0
    finally:
        if os.geteuid() == 0:
            libc().setfsuid(0)
            libc().setfsgid(os.getegid())
    gone = [line.split(maxsplit=5)[3:] for line in lines if line.endswith(b" (deleted)")]
    return len({(device, number) for device, number, path in gone if path.startswith(os.fsencode(folder))})


def _maps(place: str) -> bytes:
    """Return the memory map of a process as one of its threads shows it: that of a thread that has ended is empty, and
    the first may end before the others. Nothing where all have ended."""
    for _ in range(3):
        tasks = os.listdir(f"{place}/task")
        for task in tasks:
            with suppress(FileNotFoundError, ProcessLookupError), open(f"{place}/task/{task}/maps", "rb") as file:
                if found := file.read():
                    return found
        if len(tasks) < 2:
            return b""
    raise ValueError("its threads end before its memory map can be read")


def empty(folder: str) -> None:
    """Remove everything in the folder; OSError if something stays. A tree may be deeper than recursion and paths allow,
    so the content of a folder is moved up before the folder is removed."""
    while entries := _opened(folder):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            for child in _opened(entry.path):
                if child.is_dir(follow_symlinks=False):
                    os.rename(child.path, os.path.join(folder, secrets.token_hex(8)))
                else:
                    os.unlink(child.path)
            os.rmdir(entry.path)


def _opened(folder: str) -> list[os.DirEntry]:
    """Return the entries, after giving back the permissions of the folders among them, without which those can be
    neither entered nor moved."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mode & 0o700 != 0o700:
            os.chmod(entry.path, 0o700)
    return entries


def remove(folder: str) -> None:
    """Remove the folder, or as much of it as can be."""
    for _ in range(3):  # a cell that was killed a moment ago may still finish a system call
        try:
            empty(folder)
            os.rmdir(folder)
            return
        except OSError:
            continue
