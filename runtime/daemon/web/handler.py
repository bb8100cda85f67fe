"""One connection of the HTTP server: requests read within bounds of time and size, replies written in full.

Whatever is wrong with a request is answered in JSON, and ends the connection where it is not sure what the next bytes are.
"""

from __future__ import annotations

import io
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.plain import as_json, one_line
from edgeadapt.runtime.daemon.web.refusals import Refusal, plain, status_of

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.web.server import Server

LOG = logging.getLogger("edgeadapt")

HEAD, LINE = 2**14, 2**12
"""Bytes of a request's head, and of its first line, at most."""

RATE = 2**15
"""Bytes a second that a body must come with at least, beside the seconds that a head may take."""

SMALL = 2**16
"""Bytes of a body that any number of requests may send at once."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every reply."""

JSON = "application/json"


@dataclass(frozen=True)
class Request:
    """What was asked: the path decoded, the query as it stands, the token's header, and `body`, which reads the body when it is entered.

    Room for a large one is held until it is left.
    """

    path: str
    query: str
    kind: str
    authorization: str | None
    peer: str
    body: Callable[[], AbstractContextManager[bytes]]


@dataclass(frozen=True)
class Reply:
    """What is answered. A stream has no length and ends with its connection; None in it is nothing to send, only a look whether to go on."""

    status: HTTPStatus = HTTPStatus.OK
    kind: str = JSON
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: Iterator[bytes | None] | None = None


def json_reply(value: object, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Reply:
    """A reply in JSON."""
    return Reply(status, JSON, as_json(value).encode("ascii") + b"\n", headers or {})


class _Gone(Exception):
    """Who asked has gone in the middle of a body."""


class _TooLong(Exception):
    """A request's head is longer than it may be."""


class _Within(io.RawIOBase):
    """The socket's bytes, until a deadline and, of a head, only so many."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire, self._until, self._left = wire, 0.0, 0

    def begin(self, seconds: float, most: int) -> None:
        self._until, self._left = time.monotonic() + seconds, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._left <= 0:
            raise _TooLong
        self._wire.settimeout(max(0.001, self._until - time.monotonic()))
        got = self._wire.recv_into(buffer)
        self._left -= got
        return got


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection, one after another."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        """Reads and writes within bounds."""
        self.connection = self.request
        self._within = _Within(self.connection)
        self.rfile = io.BufferedReader(self._within, 2**13)
        self.connection.settimeout(self.server.slow)
        self.wfile = io.BytesIO()  # heads are gathered here
        self._unread = 0

    def finish(self) -> None:
        """Lets a client that still sends read the reply first: closing at once would take it back."""
        if not self._unread:
            return
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + self.server.linger
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(2**16):
                    break

    def handle(self) -> None:
        with suppress(OSError, _Gone):  # who asked has gone, or is too slow; a time-out is an OSError too
            super().handle()

    def handle_one_request(self) -> None:
        self.close_connection, self._unread, self._waits = True, 0, False
        self.command, self.request_version, self.requestline, self.raw_requestline = "", "HTTP/1.1", "", b""
        self._within.begin(self.server.patience, HEAD)
        try:
            try:
                self.raw_requestline = self.rfile.readline(LINE + 1)
                if not self.raw_requestline:
                    return
                if len(self.raw_requestline) > LINE:
                    raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, f"the request's first line is longer than {LINE} bytes", "ask for less")
                if not self.parse_request():
                    return
            except _TooLong:
                raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request's head is longer than {HEAD} bytes", "send less") from None
            except TimeoutError:
                if not self.requestline and not self.raw_requestline:
                    return  # nothing was asked
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request's head did not come in time", "send it at once") from None
            keeps = not self.close_connection
            self.close_connection = True
            reply = self.server.web.answer(self.command, self._request())
            self.close_connection = not keeps or self._unread > 0 or reply.stream is not None
            self._send(reply)
        except Refusal as reason:
            self._unread = self._unread or 1
            self.close_connection = True
            self._send(json_reply(plain(reason), reason.status, reason.headers))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library finds wrong with a head."""
        self._unread, self.close_connection = 1, True
        told = one_line(message or HTTPStatus(code).phrase, 200)
        reason = Refusal(HTTPStatus(code), f"the request cannot be read: {told}", "send HTTP/1.1")
        self._send(json_reply(plain(reason), reason.status))

    def handle_expect_100(self) -> bool:
        """Told to go on only when the body is wanted."""
        self._waits = True
        return True

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug("http: %s: %s", self.client_address[0], one_line(format % args, 200))

    def version_string(self) -> str:
        return "edgeadapt"

    def _request(self) -> Request:
        """What was asked, where its head says so without doubt."""
        if self.request_version not in ("HTTP/1.0", "HTTP/1.1"):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"{one_line(self.request_version, 20)} is not spoken here", "send HTTP/1.1")
        if self.headers.defects or self.headers.get_payload():
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request's head has a line that is no header", "send lines such as Host: 127.0.0.1")
        self._unread = self._length()
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the request has {len(hosts)} headers Host", "send one")
        self.server.web.check_host(hosts[0] if hosts else None)
        try:
            split = urlsplit(self.path)
        except ValueError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request's path cannot be read", "send such as /status.json") from None
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        authorization = self.headers.get_all("Authorization", [None])
        given = str(authorization[0]) if len(authorization) == 1 and authorization[0] is not None else None
        return Request(unquote(split.path), split.query, kind, given, str(self.client_address[0]), self._body)

    def _length(self) -> int:
        if "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "a body in pieces is not taken", "send its Content-Length")
        given = self.headers.get_all("Content-Length", ["0"])
        if len(given) != 1 or not given[0].isascii() or not given[0].isdigit() or len(given[0]) > 15:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the Content-Length is no number", "send one number of bytes")
        return int(given[0])

    @contextmanager
    def _body(self) -> Iterator[bytes]:
        length, most = self._unread, self.server.web.settings.body
        if "Content-Length" not in self.headers:
            self._unread = 1  # who knows what follows
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long its body is", "send its Content-Length")
        if length > most:
            message = f"a body of {length} bytes is longer than the {most} that are taken"
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, "send less, or raise http.body")
        if not length:
            yield b""
            return
        with self.server.room(length > SMALL):
            self._within.begin(self.server.patience + length / RATE, length)
            try:
                if self._waits:
                    self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = self.rfile.read(length)
            except TimeoutError:
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request's body did not come in time", f"send {RATE} bytes a second or more") from None
            except OSError:
                raise _Gone from None
            if len(body) < length:
                raise Refusal(HTTPStatus.BAD_REQUEST, f"the body ended after {len(body)} of {length} bytes", "send all of it")
            self._unread = 0
            yield body

    def _send(self, reply: Reply) -> None:
        self.request_version = "HTTP/1.1"  # whatever was asked in: replies of 0.9 would have no head
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        for name, value in {**HEADERS, **reply.headers}.items():
            self.send_header(name, value)
        if reply.stream is None:
            self.send_header("Content-Length", str(len(reply.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        head = self.wfile.getvalue()  # type: ignore[attr-defined]
        self.wfile = io.BytesIO()
        self.connection.settimeout(self.server.slow)
        whole = self.command != "HEAD"
        try:
            self.connection.sendall(head + reply.body if whole else head)
            for piece in (reply.stream or ()) if whole else ():
                if self.server.ending.is_set():
                    return
                if piece is not None:
                    self.connection.settimeout(self.server.slow)
                    self.connection.sendall(piece)
        finally:
            close = getattr(reply.stream, "close", None)
            if close is not None:
                close()


def answered(work: Callable[[], Reply]) -> Reply:
    """What the work gives, or what it raised, as a reply."""
    try:
        return work()
    except EdgeAdaptError as error:
        return json_reply(plain(error), status_of(error), error.headers if isinstance(error, Refusal) else None)
    except _Gone:
        raise
    except Exception as reason:
        LOG.exception("http: what was asked for has a defect: %r", reason)
        told = one_line(f"{type(reason).__name__}: {reason}", 300)
        defect = EdgeAdaptError(f"the daemon has a defect: {told}", "its log has more: journalctl -u edgeadapt")
        return json_reply(plain(defect), HTTPStatus.INTERNAL_SERVER_ERROR)
