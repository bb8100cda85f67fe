"""The control socket: whoever may write to it asks the daemon, and has its verbs done.

A unix stream socket; requests and replies are JSON, one a line:

    {"id": 1, "method": "rollback", "params": {"to": "start"}}
    {"id": 1, "result": …}
    {"id": 1, "error": {"code": 2, "name": "UsageError", "message": …, "hint": …}}

`id` is a text, a whole number or left out, and comes back as it is; `params` may be left out. `code` is the error's exit code. A verb that gives many
values answers with a line {"id": 1, "event": …} for each, and with {"id": 1, "result": null} at the end; other requests of that connection wait.

Every connection has a thread of its own, and there are few; nobody who asks, reads slowly or goes away holds up another, or the daemon.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from edgeadapt.errors import EdgeAdaptError, UsageError
from edgeadapt.runtime.daemon import verbs as known
from edgeadapt.runtime.daemon.client import check_path
from edgeadapt.runtime.daemon.listening import Listening
from edgeadapt.runtime.daemon.plain import as_json, one_line

LOG = logging.getLogger("edgeadapt")

LONGEST, CONNECTIONS = 2**16, 16
"""Bytes of a request, and connections at once, at most."""

IDLE, SLOW = 60.0, 5.0
"""Seconds after which a connection is closed: without a whole request, and when it takes no more of a reply."""

_EXAMPLE = 'send lines such as {"id": 1, "method": "status", "params": {}}'


class Control:
    """Serves the control socket.

    Args:
        path: where it is made; at most 107 bytes.
        verbs: by name, the functions that do them; see `verbs`. Parameters of those in `verbs.VERBS` are checked before. They are called from
            several threads at once. An iterator that they give should give None at least once a second while there is nothing to tell, so that it is
            seen when who asked has gone; its `close` is called then, if it has one.
        group: who may connect besides the daemon's user and root; None: the daemon's own group.
        idle, slow: seconds; see IDLE and SLOW.

    Raises:
        UsageError: the path cannot be a socket's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        verbs: Mapping[str, known.Function],
        group: str | None = None,
        *,
        idle: float = IDLE,
        slow: float = SLOW,
    ) -> None:
        self.path, self.verbs, self.idle, self.slow = check_path(path), verbs, idle, slow
        self._group = group
        self._listening: Listening | None = None
        self._accepts: threading.Thread | None = None
        self._wakes, self._woken = -1, -1
        self._open: dict[_Connection, threading.Thread] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Makes the socket and serves it, in threads of its own, until `close`.

        Raises:
            UsageError: it cannot be made; see `listening.Listening`.
        """
        self._listening = Listening(self.path, self._group)
        self._listening.wire.setblocking(False)
        self._woken, self._wakes = os.pipe2(os.O_CLOEXEC)
        self._accepts = threading.Thread(target=self._accept, args=(self._listening.wire,), name="control", daemon=True)
        self._accepts.start()

    def close(self, seconds: float = 2.0) -> None:
        """Removes the socket and ends all connections; waits so long for verbs that are at work. A second close does nothing."""
        if self._listening is None or self._accepts is None:
            return
        os.write(self._wakes, b".")
        self._accepts.join()
        self._listening.close()
        os.close(self._wakes)
        os.close(self._woken)
        self._listening = None
        with self._lock:
            ending = dict(self._open)
        for connection in ending:
            connection.end()
        until = time.monotonic() + seconds
        for thread in ending.values():
            thread.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Control:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self, wire: socket.socket) -> None:
        waiting = select.poll()
        waiting.register(wire, select.POLLIN)
        waiting.register(self._woken, select.POLLIN)
        while True:
            ready = dict(waiting.poll())
            if self._woken in ready:
                return
            try:
                other, _ = wire.accept()
            except BlockingIOError:
                continue
            except OSError as reason:  # too many files are open, or who wanted to connect has gone
                LOG.warning("control: no connection could be taken: %s", reason.strerror)
                time.sleep(0.2)
                continue
            try:
                self._taken(other)
            except Exception as reason:
                LOG.exception("control: a connection could not be served: %r", reason)
                other.close()

    def _taken(self, other: socket.socket) -> None:
        connection = _Connection(other, self)
        thread = threading.Thread(target=self._serve, args=(connection,), name="control connection", daemon=True)
        with self._lock:
            full = len(self._open) >= CONNECTIONS
            if not full:
                self._open[connection] = thread
        try:
            if full:
                hint = "end one of them, such as a `tail`, or wait a minute"
                connection.refuse(EdgeAdaptError(f"{CONNECTIONS} connections are open already", hint))
            else:
                thread.start()
        except RuntimeError as reason:  # the system has no thread left
            LOG.warning("control: no connection could be served: %s", reason)
            self._gone(connection)

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
        except Exception as reason:
            LOG.exception("control: a connection broke off: %r", reason)
        finally:
            self._gone(connection)

    def _gone(self, connection: _Connection) -> None:
        connection.close()
        with self._lock:
            self._open.pop(connection, None)


class _Gone(Exception):
    """Who asked has gone, takes nothing, or sends what cannot be read on."""


class _Connection:
    def __init__(self, wire: socket.socket, control: Control) -> None:
        self._wire, self._control = wire, control
        self._held = bytearray()
        self._ended = False
        self._hung = select.poll()
        self._hung.register(wire, 0)  # tells only of POLLHUP: who has shut down one direction still reads

    def serve(self) -> None:
        try:
            while (line := self._next()) is not None and not self._ended:
                if line.strip():
                    self._answer(line)
        except (_Gone, OSError):  # a time-out is an OSError too
            return

    def refuse(self, error: EdgeAdaptError) -> None:
        """An error and no more, without waiting."""
        self._wire.setblocking(False)
        with suppress(OSError):
            self._wire.send(_line({"id": None, "error": _error(error)}))
        self._wire.close()

    def end(self) -> None:
        """Ends it from another thread, when what it is doing is done."""
        self._ended = True
        with suppress(OSError):
            self._wire.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._wire.close()

    def _next(self) -> bytes | None:
        """The next request, without its end of line; None: there are no more."""
        until, searched = time.monotonic() + self._control.idle, 0
        while (end := self._held.find(b"\n", searched)) < 0:
            if len(self._held) > LONGEST:
                self._send(_line({"id": None, "error": _error(UsageError(f"a request is longer than {LONGEST} bytes", "send less at once"))}))
                raise _Gone
            searched = len(self._held)
            self._wire.settimeout(max(0.001, until - time.monotonic()))
            got = self._wire.recv(2**13)
            if not got:
                rest = bytes(self._held)
                self._held.clear()
                return rest or None
            self._held += got
        found = bytes(self._held[:end])
        del self._held[: end + 1]
        return found

    def _answer(self, line: bytes) -> None:
        number: object = None
        try:
            request = _request(line)
            number = _number(request)
            method = known.find(request.get("method"), self._control.verbs)
            params = known.checked(method, request.get("params"))
            if method in known.VERBS and known.VERBS[method].writes:
                LOG.info("control: %s by %s: %s", method, self._peer(), one_line(as_json(params), 200))
            result = self._control.verbs[method](params)
            if isinstance(result, Iterator):
                self._stream(number, result)
                result = None
            reply = _line({"id": number, "result": result})
        except EdgeAdaptError as error:
            reply = _line({"id": number, "error": _error(error)})
        except _Gone:
            raise
        except Exception as reason:
            LOG.exception("control: what was asked for has a defect: %r", reason)
            reply = _line({"id": number, "error": _error(_defect(reason))})
        self._send(reply)

    def _stream(self, number: object, values: Iterator[object]) -> None:
        try:
            for value in values:
                if self._ended or (value is None and self._hung.poll(0)):
                    raise _Gone
                if value is not None:
                    self._send(_line({"id": number, "event": value}))
        finally:
            close = getattr(values, "close", None)
            if close is not None:
                close()

    def _send(self, line: bytes) -> None:
        self._wire.settimeout(self._control.slow)
        try:
            self._wire.sendall(line)
        except TimeoutError:
            LOG.info("control: a connection is ended that took no reply for %g s", self._control.slow)
            raise _Gone from None
        except OSError:
            raise _Gone from None

    def _peer(self) -> str:
        process, user, _ = struct.unpack("iII", self._wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))
        return f"user {user}, process {process}"


def _request(line: bytes) -> dict[str, object]:
    try:
        request = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as reason:
        raise UsageError(f"a request is not JSON: {one_line(str(reason), 200)}", _EXAMPLE) from None
    if not isinstance(request, dict):
        raise UsageError("a request is JSON, but no mapping", _EXAMPLE)
    return request


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _number(request: Mapping[str, object]) -> object:
    number = request.get("id")
    if number is not None and type(number) not in (str, int):
        raise UsageError("id is neither a text nor a whole number", _EXAMPLE)
    return number


def _error(error: EdgeAdaptError) -> dict[str, object]:
    return {"code": error.exit_code, "name": type(error).__name__, "message": error.message, "hint": error.hint}


def _defect(reason: Exception) -> EdgeAdaptError:
    told = one_line(f"{type(reason).__name__}: {reason}", 300)
    return EdgeAdaptError(f"the daemon has a defect: {told}", "its log has more: journalctl -u edgeadapt")


def _line(reply: Mapping[str, object]) -> bytes:
    return as_json(reply).encode("ascii") + b"\n"
