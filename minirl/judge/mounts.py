"""Give a worker mounts of its own: a small file system for its cells to write to, and a root that shows them little.

The file system bounds their disk in whatever way they take it: blocks beyond a file's end, removed files that are open
or mapped. In the root no path exists but those that they need, so `stat` finds nothing else. Only the worker and its
cells see these mounts, which end with them. An ordinary user gets them by a user namespace, where the system has those.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from minirl.judge.folder import MAX_DISK, MAX_FILES
from minirl.judge.libc import check, libc, succeeds, syscall

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
CELL = "cell"  # the folder to write to, in `folder` and in the root


def enter(folder: str, shown: Iterable[str] = (), hidden: Iterable[str] = ()) -> bool:
    """Enter mounts of this process's own: a root at `folder` with the files and folders of `shown`, where they are
    outside, but nothing in those of `hidden`; and in it, at CELL, a file system to write to. False, and nothing done,
    where the system does not allow that."""

    def make() -> None:
        _enter(folder)
        _fill(folder, shown, hidden)

    if sys.platform != "linux" or not succeeds(make):  # it cannot be taken back half-way
        return False
    make()
    return True


def leave(folder: str) -> None:
    """Take the mounts off the folder, if there are any, so that it can be removed."""
    if sys.platform == "linux":
        libc().umount2(folder.encode(), MNT_DETACH)


def _enter(folder: str) -> None:
    uid, gid = os.geteuid(), os.getegid()
    check(libc().unshare(CLONE_NEWNS | (CLONE_NEWUSER if uid else 0)))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(text)
    _mount("none", "/", "", MS_REC | MS_PRIVATE)  # nothing of what follows is seen outside
    _tmpfs(folder, "size=1m,mode=755")
    cell = os.path.join(folder, CELL)
    os.mkdir(cell)
    _tmpfs(cell, f"size={MAX_DISK},nr_inodes={MAX_FILES + 1},mode=700")  # one inode is that of the folder itself


def _fill(root: str, shown: Iterable[str], hidden: Iterable[str]) -> None:
    for path in shown:
        place = root + path
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        elif not os.path.exists(place):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            Path(place).touch()
        _mount(path, place, "", MS_BIND | MS_REC)
        read_only = struct.pack("=4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
        syscall(MOUNT_SETATTR, -1, place.encode(), AT_RECURSIVE, read_only, len(read_only))
    for path in hidden:
        if os.path.isdir(root + path):
            _tmpfs(root + path, "size=4k,mode=755")
    _mount("none", root, "", MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _tmpfs(place: str, options: str) -> None:
    _mount("none", place, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _mount(source: str, place: str, kind: str, flags: int, options: str = "") -> None:
    words = (word.encode() for word in (source, place, kind))
    check(libc().mount(*words, ctypes.c_ulong(flags), options.encode()))
