"""The folder of a cell: how much is in it, and how it is emptied, whatever tree the cell has made there."""

import os
import secrets

MAX_FILES, MAX_DISK = 256, 64 * 2**20  # files and folders, and bytes, of what a cell has written
MAX_DEPTH = 12  # folders in folders; names of 255 bytes times this are a path that can be opened


def is_full(folder: str) -> bool:
    """While the cell is at work: so anything may be gone the next moment. A folder that it has closed to everybody
    counts as full."""
    entries = size = 0
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
                            size += entry.stat(follow_symlinks=False).st_size
                        if entries > MAX_FILES or size > MAX_DISK:
                            return True
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError:
                return True
        level = below
    return bool(level)


def empty(folder: str) -> None:
    """OSError if something cannot be removed. A tree may be deeper than recursion and paths go: so what stands in a
    folder is moved up before the folder is removed."""
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
    """Its entries; the folders among them can be entered and moved then, whatever their owner has forbidden."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mode & 0o700 != 0o700:
            os.chmod(entry.path, 0o700)
    return entries


def remove(folder: str) -> None:
    """As much of it as can be."""
    for _ in range(3):  # a cell that was killed a moment ago may end a system call
        try:
            empty(folder)
            os.rmdir(folder)
            return
        except OSError:
            continue
