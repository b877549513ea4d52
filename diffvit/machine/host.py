"""How much of its machine this process may use: CPUs, memory, a home folder, and an output whose reader may have gone.

Containers and batch systems limit a process by affinities and cgroup quotas, and containers run under users without a name or a
home.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pwd
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use, by its affinity and its cgroups' quotas; 1.5 count as 1, and so do fewer than 1.

    Args:
        root: where /proc and /sys are.
    """
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups("cpu", root):
        # Microseconds of every so many, in versions 2 and 1; "max" or -1 is no limit.
        for words in (_words(folder / "cpu.max"), _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")):
            if len(words) == 2 and all(word.isdecimal() for word in words) and words[1] != "0":
                mine = min(mine, int(words[0]) // int(words[1]))
    return max(1, mine)


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may use: the machine's, or less under a cgroup's limit.

    Args:
        root: where /proc and /sys are.
    """
    mine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
            limit = "".join(_words(folder / name))
            if limit.isdecimal():
                mine = min(mine, int(limit))
    return mine


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's cgroups and their parents, in which a controller's limits may be set."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        if controllers and controller not in controllers.split(","):
            continue
        for mount in (controllers, controller) if controllers else ("", "unified"):
            top = root / "sys/fs/cgroup" / mount
            inner = top / path.lstrip("/")
            # In a container the path may be the host's; its own limits then stand at the top.
            yield from (folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


# ------------------------------------------------------------------------------------------------------------- a home


def lend_home() -> str | None:
    """Set $HOME to a temporary folder where the user has no writable home, so that libraries can keep their caches.

    The contents of a read-only home, such as keys and settings, are linked there. A user without a name gets one. Child processes
    inherit both.

    Returns:
        The temporary folder, or None.
    """
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"user{os.getuid()}"
    home = os.path.expanduser("~")  # as it is where there is none
    is_folder = os.path.isabs(home) and os.access(home, os.R_OK | os.X_OK)
    if is_folder and os.access(home, os.W_OK | os.X_OK):
        os.environ.setdefault("HOME", home)  # Ray's servers look there only
        return None
    try:
        lent = _own_temporary_folder()
        for name in os.listdir(home) if is_folder and os.path.realpath(home) != "/" else []:
            if name not in (".cache", ".triton") or os.access(os.path.join(home, name), os.W_OK):
                with contextlib.suppress(FileExistsError):
                    os.symlink(os.path.join(home, name), os.path.join(lent, name))
    except OSError:  # nothing at all can be written
        return None
    os.environ["HOME"] = lent
    return lent


def _own_temporary_folder() -> str:
    """The same folder each time, so that caches are used again; a new one if another user owns that name."""
    folder = os.path.join(tempfile.gettempdir(), f"diffvit-home-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, mode=0o700)
    facts = os.lstat(folder)
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022:
        return folder
    return tempfile.mkdtemp(prefix="diffvit-home-")


# ------------------------------------------------------------------------------------------------------------- output


class _Output(io.FileIO):
    """A file descriptor whose reader may go: after that, writes to the closed terminal or pipe are dropped."""

    def __init__(self, descriptor: int, may_fail: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._may_fail = may_fail
        self._gone = (errno.EPIPE, errno.EIO) if os.isatty(descriptor) else (errno.EPIPE,)  # of a disk, EIO is a fault

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self._may_fail or error.errno in self._gone:
                return len(data)
            self._may_fail = True  # raised once, and not again when Python ends
            raise


def outlive_readers() -> None:
    """Keep working when the reader of stdout or stderr has gone, and when stderr, which holds no results, cannot be written."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # and not what a test or a notebook put there
            stream.flush()
            output = io.BufferedWriter(_Output(descriptor, may_fail=name == "stderr"))
            lines = stream.line_buffering or stream.write_through
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, stream.errors, line_buffering=lines))
