"""The folder itself: locks, room, what a crash has left, and what an error of the system means for whoever runs the daemon."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeadapt.bundle import atomic
from edgeadapt.errors import StateError
from edgeadapt.units import format_bytes

LOG = logging.getLogger("edgeadapt")

_POLL = 0.02


def explained(what: str, path: Path, reason: OSError) -> StateError:
    """The error to raise where `what` could not be done at `path`."""
    message = f"{what}: {reason.filename or path}: {reason.strerror or reason}"
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return StateError(message, f"make room: {format_bytes(free(path))} are free there")
    if reason.errno == errno.EROFS:
        return StateError(message, "mount it so that it can be written (mount -o remount,rw); a card that turns read-only by itself is failing")
    if reason.errno in (errno.EACCES, errno.EPERM):
        return StateError(message, f"{path} belongs to {_owner(path)}, and this runs as user {os.geteuid()}: chown -R {os.geteuid()} {path}")
    if reason.errno in (errno.ENOENT, errno.ENOTDIR):
        return StateError(message, f"make the folder {path}, or name another one (systemd: StateDirectory=edgeadapt)")
    return StateError(message, "check the disk: the system's log says more")


def _owner(path: Path) -> str:
    try:
        return f"user {os.stat(path).st_uid}"
    except OSError:
        return "somebody else"


def free(path: Path) -> int:
    """Bytes that can still be written there; 0 where that is not known."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def need_room(path: Path, size: int, spare: int) -> None:
    """See that there is room for a file of `size` bytes, and that `spare` are left then.

    Raises:
        StateError: there is not.
    """
    if (found := free(path)) < size + spare:
        raise StateError(
            f"{path} has {format_bytes(found)} free, and {format_bytes(size)} are needed, with {format_bytes(spare)} left then",
            f"free {format_bytes(size + spare - found)} there",
        )


class Owner:
    """Whose a state folder is. What root writes there is given to them, so that a daemon of theirs can change and remove it; others give nothing.

    Args:
        folder: the state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._ids: tuple[int, int] | None = None
        if os.geteuid() == 0:
            with suppress(OSError):
                found = os.stat(folder)
                self._ids = (found.st_uid, found.st_gid)

    def take(self, what: int | Path) -> None:
        """Gives them what was just made: an open file or folder, or a path, of which a link is not followed. Where that is not allowed it stays."""
        if self._ids is None:
            return
        try:
            os.fchown(what, *self._ids) if isinstance(what, int) else os.chown(what, *self._ids, follow_symlinks=False)
        except OSError as reason:  # a file system without owners, or a root that may not
            LOG.warning("what is written cannot be given to user %d: %s", self._ids[0], reason.strerror)


def make(folder: Path, owner: Owner | None = None) -> None:
    """Makes a folder, durably, where it is not there; its parent must be.

    Args:
        folder: it.
        owner: whose it is to be; None: ours.

    Raises:
        OSError: it cannot be made.
    """
    if not folder.is_dir():
        with suppress(FileExistsError):
            os.mkdir(folder)
            if owner is not None:
                owner.take(folder)
        atomic.sync_folder(folder.parent)


def created(path: Path, owner: Owner | None = None) -> None:
    """Makes an empty file where there is nothing, also no link.

    Raises:
        OSError: it cannot be made.
    """
    if os.path.lexists(path):
        return
    with suppress(FileExistsError):
        handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if owner is not None:
            owner.take(handle)
        os.close(handle)


def lock(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """An open handle with a lock on it that ends with the handle, or None where somebody else has it.

    Raises:
        StateError: it is not a file, nor a folder where `flags` ask for one.
        OSError: it cannot be opened.
    """
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe would wait for ever
    try:
        if not flags & os.O_DIRECTORY and not stat.S_ISREG(os.fstat(handle).st_mode):
            raise StateError(f"{path} is not a file", f"remove it, the daemon makes its own: rm -r {path}")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def locked(folder: Path, patience: float) -> Iterator[bool]:
    """Holds the lock on a folder, and says whether it could be had within `patience` seconds.

    Raises:
        OSError: it cannot be opened.
    """
    until = time.monotonic() + patience
    while (handle := lock(folder, os.O_RDONLY | os.O_DIRECTORY)) is None and time.monotonic() < until:
        time.sleep(_POLL)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def sweep(folder: Path, names: Collection[str]) -> None:
    """Removes temporary files for these names that a crash has left; what cannot be removed stays."""
    prefixes = tuple(atomic.temporary_prefix(name) for name in names)
    for path in _inside(folder):
        if path.name.startswith(prefixes) and path.name.endswith(".tmp"):
            with suppress(OSError):
                os.unlink(path)


def remove_others(folder: Path, ours: Callable[[str], bool], wanted: Collection[str]) -> None:
    """Removes what in a folder is named as ours and not wanted; what cannot be removed stays."""
    for path in _inside(folder):
        if path.is_dir() and not path.is_symlink() and ours(path.name) and path.name not in wanted:
            _remove(path)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _remove(folder: Path) -> None:
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            with suppress(OSError):
                os.unlink(os.path.join(path, name))
        for name in folders:
            inner = os.path.join(path, name)
            with suppress(OSError):
                os.unlink(inner) if os.path.islink(inner) else os.rmdir(inner)
    with suppress(OSError):
        os.rmdir(folder)
