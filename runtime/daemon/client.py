"""Asks a daemon over its control socket. Loads neither numpy nor onnxruntime, so that commands on a small board answer at once."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from edgeadapt import errors
from edgeadapt.errors import EdgeAdaptError, UsageError

SOCKET = "/run/edgeadapt/control.sock"
"""Where a daemon listens that was told nothing else."""

VARIABLE = "EDGEADAPT_CONTROL__SOCKET"
"""The environment's variable that tells it something else."""

_PATH = 107  # bytes of a socket's path, by the kernel's sockaddr_un
_REPLY = 2**26  # bytes of a reply
_CHUNK = 2**16


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, where a socket can have it.

    Raises:
        UsageError: it is longer than the kernel takes, 107 bytes, or empty.
    """
    given = os.fsencode(path)
    if not 0 < len(given) <= _PATH or b"\0" in given:
        what = f"is {len(given)} bytes long" if given.strip(b"\0") else "is empty"
        raise UsageError(f"{os.fspath(path)!r} cannot be a socket's path: it {what}, and there may be 1 to {_PATH}", "give a shorter one")
    return Path(path)


class Client:
    """Asks the daemon that listens at a path; each call is a connection of its own.

    Args:
        path: of its control socket. None: $EDGEADAPT_CONTROL__SOCKET, else /run/edgeadapt/control.sock.
        timeout: seconds that a call waits for its reply. A verb may wait for the window that is being served.

    Raises:
        UsageError: the path cannot be a socket's.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, timeout: float = 60.0) -> None:
        self.path = check_path(path or os.environ.get(VARIABLE) or SOCKET)
        self._timeout = timeout

    def call(self, method: str, /, **params: object) -> object:
        """What the daemon's verb gives, as JSON values. Parameters that are None are left out.

        Raises:
            EdgeAdaptError: no daemon listens there, or lets us, or it does not answer; or, of the type that it names, what it refused.
        """
        with self._asked(method, params) as wire:
            reply = next(self._replies(wire), None)
        if reply is None:
            raise self._broken("ended before it answered")
        return self._result(reply)

    def stream(self, method: str, /, **params: object) -> Generator[object, None, None]:
        """The values of a verb that gives many, as they come. It is asked when the first is taken, and left when the iterator is closed.

        Raises:
            EdgeAdaptError: as `call`, also when the daemon ends before the verb does.
        """
        with self._asked(method, params) as wire:
            wire.settimeout(None)
            for reply in self._replies(wire):
                if "event" not in reply:
                    self._result(reply)
                    return
                yield reply["event"]
        raise self._broken("ended")

    def _asked(self, method: str, params: Mapping[str, object]) -> socket.socket:
        given = {name: value for name, value in params.items() if value is not None}
        line = json.dumps({"id": 1, "method": method, "params": given}).encode() + b"\n"
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            wire.settimeout(self._timeout)
            wire.connect(os.fspath(self.path))
            with suppress(BrokenPipeError, ConnectionResetError):  # it refused us, and its reply says why
                wire.sendall(line)
        except BaseException as reason:
            wire.close()
            if isinstance(reason, OSError):
                self._unreachable(reason)
            raise
        return wire

    def _unreachable(self, reason: OSError) -> NoReturn:
        if isinstance(reason, PermissionError):
            group = _group_of(self.path)
            hint = f"join the group {group}: sudo usermod -aG {group} $USER, and log in again" if group else "ask as the daemon's user, or as root"
            raise EdgeAdaptError(f"the daemon at {self.path} may not be asked by you", hint) from None
        if isinstance(reason, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
            hint = "start it with: sudo systemctl start edgeadapt; or name its socket with --socket PATH"
            raise EdgeAdaptError(f"no daemon listens at {self.path}", hint) from None
        if isinstance(reason, TimeoutError | BlockingIOError):
            raise self._broken(f"took no connection within {self._timeout:g} s") from None
        raise EdgeAdaptError(f"the daemon at {self.path} cannot be asked: {reason.strerror}", "name its socket with --socket PATH") from None

    def _replies(self, wire: socket.socket) -> Iterator[dict[str, object]]:
        """Replies as they come, until the daemon ends the connection."""
        held = bytearray()
        while True:
            searched = len(held)
            try:
                got = wire.recv(_CHUNK)
            except ConnectionResetError:
                got = b""
            except TimeoutError:
                raise self._broken(f"did not answer within {self._timeout:g} s") from None
            if not got:
                return
            held += got
            while (end := held.find(b"\n", searched)) >= 0:
                yield self._parsed(bytes(held[:end]))
                del held[: end + 1]
                searched = 0
            if len(held) > _REPLY:
                raise self._strange()

    def _parsed(self, line: bytes) -> dict[str, object]:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not reply.keys() & {"result", "event", "error"}:
            raise self._strange()
        return reply

    def _result(self, reply: Mapping[str, object]) -> object:
        error = reply.get("error")
        if error is None:
            return reply.get("result")
        if not isinstance(error, dict):
            raise self._strange()
        kind = getattr(errors, str(error.get("name")), None)
        told = kind if isinstance(kind, type) and issubclass(kind, EdgeAdaptError) else EdgeAdaptError
        raise told(str(error.get("message", "")), str(error.get("hint", "")))

    def _broken(self, what: str) -> EdgeAdaptError:
        return EdgeAdaptError(f"the daemon at {self.path} {what}", "look into its log: journalctl -u edgeadapt")

    def _strange(self) -> EdgeAdaptError:
        return EdgeAdaptError(f"what listens at {self.path} does not answer as edgeadapt does", "name the daemon's socket with --socket PATH")


def _group_of(path: Path) -> str:
    """The name of the group that may use a socket; "" where that cannot be seen, or has none."""
    import grp

    try:
        found = os.stat(path)
        return grp.getgrgid(found.st_gid).gr_name if found.st_mode & stat.S_IWGRP else ""
    except (OSError, KeyError):
        return ""
