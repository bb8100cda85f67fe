"""The HTTP server: who may connect, how many at once, and the threads that serve them.

Everybody who reaches it may look; who changes something must have the token. Nothing that a client does ends a thread of the daemon, holds up another
client, or makes memory grow without bound.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import HTTPServer
from types import TracebackType
from typing import Any

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.config import HttpConfig
from edgeadapt.runtime.daemon.config_checks import is_loopback
from edgeadapt.runtime.daemon.plain import one_line
from edgeadapt.runtime.daemon.web import BODIES
from edgeadapt.runtime.daemon.web.gives import Gives
from edgeadapt.runtime.daemon.web.handler import Handler, Reply, Request, answered, json_reply
from edgeadapt.runtime.daemon.web.refusals import Refusal, plain
from edgeadapt.runtime.daemon.web.routes import Routes
from edgeadapt.runtime.daemon.web.token import read_token

__all__ = ["Gives", "Web"]

LOG = logging.getLogger("edgeadapt")

CONNECTIONS = 32
"""Connections at once, at most."""

_LOCAL = (".local", ".lan", ".home", ".internal", ".home.arpa", ".localdomain", ".localhost")
"""Ends of names of local networks (RFC 6762, 8375, 6761, and what routers use)."""

_GONE = 30_000
"""Milliseconds after which who takes nothing of what was sent counts as gone; the system alone would wait for a quarter of an hour."""

PATIENCE, SLOW, LINGER = 10.0, 10.0, 1.0
"""Seconds: for a request's head, or until the next one; for a client to take what is sent; to read on after a refusal."""


class Web:
    """Serves HTTP.

    Args:
        settings: the section [http].
        gives: what is served.
        patience, slow, linger: seconds; see PATIENCE.

    Raises:
        UsageError: the token's file cannot be used.
    """

    def __init__(
        self, settings: HttpConfig, gives: Gives, *, patience: float = PATIENCE, slow: float = SLOW, linger: float = LINGER
    ) -> None:
        self.settings, self.gives = settings, gives
        self.token = None if settings.token_file is None else read_token(settings.token_file)
        self._routes = Routes(gives, self.token)
        self._times = patience, slow, linger
        host = settings.host.lower()
        self._listed = frozenset(name.lower() for name in settings.names)
        self._own = frozenset({"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}) if is_loopback(host) else None
        self._server: Server | None = None
        self._serves: threading.Thread | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host as configured, and the port that is listened at; valid after `start`."""
        return self.settings.host, self.settings.port if self._server is None else self._server.server_port

    def start(self) -> None:
        """Listens and serves, in threads of its own, until `close`.

        Raises:
            UsageError: it cannot listen there.
        """
        host, port = self.settings.host, self.settings.port
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._server = Server(family, where, self, *self._times)
        except OSError as reason:
            message = f"the HTTP server cannot listen at {host}, port {port}: {reason.strerror}"
            raise UsageError(message, "end what listens there, or write another port or host under [http]") from None
        self._serves = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="http", daemon=True)
        self._serves.start()

    def close(self, seconds: float = 2.0) -> None:
        """Ends all connections; waits so long for requests that are at work. A second close does nothing."""
        server, serves = self._server, self._serves
        if server is None or serves is None:
            return
        self._server = self._serves = None
        server.ending.set()
        server.shutdown()
        serves.join()
        server.server_close()
        server.end(seconds)

    def check_host(self, given: str | None) -> None:
        """Lets pass a header Host that means this server: a page elsewhere may have had its own name lead here, to read what it finds.

        Raises:
            Refusal: it means another one.
        """
        if given is None:
            return
        told = one_line(ascii(given), 80)
        name, colon, number = given.strip().lower().rpartition(":")
        if not colon or number.endswith("]"):
            name, number = given.strip().lower(), "80"
        name = name.removesuffix(".")
        if name in self._listed:
            return
        if self._own is not None and not (name in self._own and number == str(self.address[1])):
            message = f"the header Host is {told}, and this server listens only on its own machine"
            hint = f"ask for http://127.0.0.1:{self.address[1]}/; a proxy must send that as Host"
            raise Refusal(HTTPStatus.MISDIRECTED_REQUEST, message, hint)
        if self._own is None and not (_is_local(name) or name == self.settings.host.lower()):
            message = f"the header Host is {told}, which is no address and no name of a local network"
            raise Refusal(HTTPStatus.MISDIRECTED_REQUEST, message, "ask for its address, or write that name into http.names")

    def answer(self, method: str, request: Request) -> Reply:
        """The reply to a request."""
        return answered(lambda: self._routes.answer(method, request))

    def __enter__(self) -> Web:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _is_local(name: str) -> bool:
    """Whether a name in lower case is an address, or one that nobody can have in the public DNS."""
    try:
        return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return "." not in name or name.endswith(_LOCAL)


class Server(HTTPServer):
    """Accepts connections and gives each a thread, while there are not too many."""

    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, family: int, where: Any, web: Web, patience: float, slow: float, linger: float) -> None:
        self.web, self.patience, self.slow, self.linger = web, patience, slow, linger
        self.ending = threading.Event()
        self.address_family = family
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock, self._bodies = threading.Lock(), threading.BoundedSemaphore(BODIES)
        super().__init__(where, Handler)

    def server_bind(self) -> None:
        """As of the base of our base, which does not ask for the host's name in the network."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            wire, where = super().get_request()
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE)
            return wire, where
        except OSError as reason:  # too many files are open, or who wanted to connect has gone
            LOG.warning("http: no connection could be taken: %s", reason.strerror)
            time.sleep(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), name="http connection", daemon=True)
        with self._lock:
            full = len(self._open) >= CONNECTIONS
            if not full:
                self._open[request] = thread
        if full:
            self._refuse(request)
            return
        try:
            thread.start()
        except RuntimeError as reason:  # the system has no thread left
            LOG.warning("http: no connection could be served: %s", reason)
            self._gone(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Never writes to standard error on its own."""
        LOG.warning("http: a connection could not be served")

    @contextmanager
    def room(self, large: bool) -> Iterator[None]:
        """Waits until a large body may be held.

        Raises:
            Refusal: others are held for too long.
        """
        if large and not self._bodies.acquire(timeout=self.patience):
            message, hint = f"{BODIES} other large bodies are worked on already", "try again in a moment"
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, hint, {"Retry-After": "1"})
        try:
            yield
        finally:
            if large:
                self._bodies.release()

    def end(self, seconds: float) -> None:
        """Ends all connections, and waits so long."""
        with self._lock:
            ending = dict(self._open)
        for wire in ending:
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RD)
        until = time.monotonic() + seconds
        for thread in ending.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _serve(self, wire: socket.socket, client: Any) -> None:
        try:
            Handler(wire, client, self)
        except OSError:
            pass
        except Exception as reason:
            LOG.exception("http: a connection broke off: %r", reason)
        finally:
            self._gone(wire)

    def _gone(self, wire: socket.socket) -> None:
        wire.close()
        with self._lock:
            self._open.pop(wire, None)

    def _refuse(self, wire: socket.socket) -> None:
        refusal = Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{CONNECTIONS} connections are open already", "close a page, or try again in a moment")
        body = json_reply(plain(refusal)).body
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        wire.setblocking(False)
        with suppress(OSError):
            wire.send(head.encode() + b"Retry-After: 1\r\nConnection: close\r\n\r\n" + body)
        wire.close()
