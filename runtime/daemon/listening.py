"""A unix socket that listens at a path: made with its rights before anybody can reach it, never in place of one that another daemon listens at."""

from __future__ import annotations

import grp
import os
import secrets
import socket
import stat
from contextlib import suppress
from pathlib import Path

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.client import check_path

_MODE = 0o660


class Listening:
    """A socket that listens at a path, with mode 0660. What a dead daemon left there is replaced.

    It is made under another name and renamed when it has its rights; before that, nobody can connect to it.

    Args:
        path: where; at most 107 bytes.
        group: who may connect, besides the daemon's own user; None: the daemon's own group.

    Attributes:
        wire: the socket.

    Raises:
        UsageError: the path is too long, its folder is missing or read-only, something else is there, another daemon listens there, or there is no
            such group, or none that the daemon may give things to.
    """

    def __init__(self, path: str | os.PathLike[str], group: str | None = None) -> None:
        self._path = check_path(path)
        number = None if group is None else _group(group)
        _see_that_nobody_listens(self._path)
        temporary = check_path(self._path.with_name(f".{secrets.token_hex(3)}"))
        self.wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._make(temporary, number, group)
        except BaseException as reason:
            self.wire.close()
            with suppress(OSError):
                temporary.unlink()
            if isinstance(reason, OSError):
                hint = f"make the folder {self._path.parent} for the daemon's user, or give another path"
                raise UsageError(f"{self._path} cannot be made: {reason.strerror}", hint) from None
            raise

    def _make(self, temporary: Path, number: int | None, group: str | None) -> None:
        with suppress(OSError):
            os.fchmod(self.wire.fileno(), 0o600)  # Linux makes the file with it
        self.wire.bind(os.fspath(temporary))
        if number is not None:
            try:
                os.chown(temporary, -1, number)
            except PermissionError:
                hint = f"add the daemon's user to it, with SupplementaryGroups={group} in its unit"
                raise UsageError(f"{self._path} cannot be given to the group {group}", hint) from None
        os.chmod(temporary, _MODE)
        self.wire.listen()
        made = os.lstat(temporary)
        self._made = made.st_dev, made.st_ino
        os.rename(temporary, self._path)

    def close(self) -> None:
        """Ends it and removes the file, if that is still this socket's. A second close does nothing."""
        self.wire.close()
        with suppress(OSError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == self._made:
                self._path.unlink()


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"there is no group {name}", f"make it with: sudo groupadd --system {name}") from None


def _see_that_nobody_listens(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is there and no socket", "move it away, or give another path")
    except FileNotFoundError:
        return
    except OSError as reason:
        raise UsageError(f"{path} cannot be looked at: {reason.strerror}", "give a path that the daemon's user may use") from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as wire:
        wire.setblocking(False)
        try:
            wire.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):  # nobody listens any more, or it has just been removed
            return
        except OSError:  # somebody does, and is busy, or does not let us
            pass
    raise UsageError(f"another daemon listens at {path}", "end it first, or give this one another path")
