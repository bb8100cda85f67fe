"""The HTTP server on the wire: bounds of time, size and number, streams of events, and that nothing which clients do stops it."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.config import HttpConfig
from edgeadapt.runtime.daemon.web import live, server
from edgeadapt.runtime.daemon.web.server import Web
from tests.asking import RIGHT, ask, error, raw
from tests.toyweb import Toy, serving, token_file

pytestmark = pytest.mark.device


@pytest.fixture
def toy() -> Toy:
    return Toy(posts=True)


@pytest.fixture
def web(toy: Toy, tmp_path: Path) -> Iterator[Web]:
    with serving(toy, token_file(tmp_path), linger=0.2) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------ the wire


@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LocalHost:{}"])
def test_names_of_this_machine_are_answered(web, host):
    assert ask(web, "GET", "/healthz", headers={"Host": host.format(web.address[1])})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "", "localhost.evil.example:{}"])
def test_other_names_are_not(web, host):
    status, _, body = ask(web, "GET", "/status.json", headers={"Host": host.format(web.address[1])})
    assert status == 421
    assert "Host" in error(body)["message"]


def test_a_proxy_on_this_machine_may_pass_on_a_name_that_is_listed(toy):
    with serving(toy, names=("Camera-3.example.com",)) as web:
        for host, status in (("camera-3.example.com", 200), ("camera-3.example.com:443", 200), ("localhost:{}", 200), ("camera-4.example.com", 421)):
            assert ask(web, "GET", "/healthz", headers={"Host": host.format(web.address[1])})[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("camera-3.lan", "Camera-3:80", "192.168.1.5:{}", "[fe80::1]:{}", "pi.local", "pi.local.:80")),
        ("page.example.com:8443", 200),
        *((host, 421) for host in ("evil.example", "evil.example:{}", "lan.evil.example")),
    ],
)
def test_beyond_loopback_names_are_that_nobody_else_can_have(toy, host, status):
    """A page elsewhere whose name was made to lead here would have the browser take what it reads for its own."""
    with serving(toy, host="0.0.0.0", names=("Page.example.com",)) as web:
        found, _, body = ask(web, "GET", "/healthz", headers={"Host": host.format(web.address[1])})
        assert found == status
        assert status == 200 or "http.names" in error(body)["hint"]


HOST = b"Host: 127.0.0.1:PORT\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n" + HOST + b"\r\n", 505),
        (b"GET / FTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 20000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length : 1\r\n\r\na", 400),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 1_0\r\n\r\na", 400),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\na", 400),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"\r\n", 411),
        (b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 411),
        (b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ],
    ids=range(17),
)
def test_heads_that_are_wrong_are_refused_and_end_the_connection(web, data, status):
    found = raw(web, data.replace(b"PORT", b"%d" % web.address[1]))
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b"Connection: close" in head
    assert head.count(b"HTTP/1.1 ") == 1
    assert error(body)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.binary(max_size=200), some.booleans())
def test_any_bytes_end_in_an_answer_or_nothing(web, data, begun):
    found = raw(web, (b"GET / HTTP/1.1\r\n" if begun else b"") + data + b"\r\n\r\n")
    assert found == b"" or found.startswith(b"HTTP/1.")


def test_connections_are_kept_and_bodies_left_unread_end_them(web):
    connection = http.client.HTTPConnection("127.0.0.1", web.address[1], timeout=30)
    connection.connect()
    wire = connection.sock
    for _ in range(3):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"alive":true}\n'
    assert connection.sock is wire
    connection.request("POST", "/api/pause", b"GET /healthz HTTP/1.1\r\n\r\n")
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Connection"]) == (401, "close")
    connection.close()


def drip(web: Web, begin: bytes, seconds: float) -> tuple[bytes, float]:
    """What is answered to a client that sends a byte now and then, and after how long."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", web.address[1]), timeout=30) as wire:
        wire.sendall(begin)
        wire.settimeout(0.05)
        while time.monotonic() - begun < seconds:
            try:
                wire.sendall(b"a")
                if found := wire.recv(2**16):
                    return found, time.monotonic() - begun
                return b"", time.monotonic() - begun
            except TimeoutError:
                continue
            except OSError:
                return b"", time.monotonic() - begun
    raise AssertionError("it was served for ever")


def test_slow_clients_are_ended(toy):
    with serving(toy, patience=0.5, linger=0.1) as web:
        host = b"Host: 127.0.0.1:%d\r\n" % web.address[1]
        found, _ = drip(web, b"GET / HTTP/1.1\r\n" + host + b"X: ", 30)
        assert found.startswith(b"HTTP/1.1 408 ")
        found, _ = drip(web, b"POST /predict HTTP/1.1\r\n" + host + b"Content-Length: 2000\r\n\r\n", 30)
        assert found.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", web.address[1]), timeout=30) as wire:
            assert wire.recv(100) == b""  # it says nothing, and is told nothing
        with socket.create_connection(("127.0.0.1", web.address[1]), timeout=30) as wire:
            wire.sendall(b"GET /healthz HTTP/1.1\r\n" + host + b"\r\n")
            answers = b""
            while more := wire.recv(2**16):
                answers += more
            assert answers.count(b"HTTP/1.1 ") == 1, "nor after it was answered: a proxy would take that for the answer to its next request"


def test_clients_that_read_nothing_are_ended(toy):
    toy.show(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8))
    with serving(toy, slow=0.3, linger=0.1) as web:
        with socket.create_connection(("127.0.0.1", web.address[1]), timeout=30) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.sendall(b"GET /frame.png HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % web.address[1])
            assert web._server is not None
            opened = web._server._open
            deadline = time.monotonic() + 30
            while not opened and time.monotonic() < deadline:
                time.sleep(0.01)
            while opened and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not opened
        assert ask(web, "GET", "/healthz")[0] == 200


def test_connections_are_bounded(web, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 3)
    wires = [socket.create_connection(("127.0.0.1", web.address[1]), timeout=30) for _ in range(3)]
    try:
        found = raw(web, b"")
        assert found.startswith(b"HTTP/1.1 503 ")
        assert error(found.partition(b"\r\n\r\n")[2])
    finally:
        for wire in wires:
            wire.close()
    deadline = time.monotonic() + 30
    while ask_or_none(web) != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ask_or_none(web) == 200


def ask_or_none(web: Web) -> int | None:
    try:
        return ask(web, "GET", "/healthz")[0]
    except (OSError, http.client.HTTPException):
        return None


def test_nothing_that_clients_do_is_logged_with_a_traceback(web, caplog, capfd):
    with caplog.at_level(logging.DEBUG, "edgeadapt"):
        for _ in range(5):
            wire = socket.create_connection(("127.0.0.1", web.address[1]), timeout=30)
            wire.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 100000\r\n\r\n" % web.address[1] + bytes(1000))
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.close()  # with a reset
        raw(web, b"\x00\x1b[31m\r\n\r\n")
        assert ask(web, "GET", "/healthz")[0] == 200
    assert all(record.exc_info is None and "\x1b" not in record.getMessage() for record in caplog.records)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------ events


class Listener:
    """Server-sent events of one connection, read one after another."""

    def __init__(self, web: Web, query: str = "") -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", web.address[1], timeout=30)
        self.connection.request("GET", f"/events{query}")
        self.reply = self.connection.getresponse()

    def next(self) -> tuple[str, Any]:
        kind, data = "", None
        while line := self.reply.readline().decode():
            if line.startswith("event: "):
                kind = line[7:].strip()
            elif line.startswith("data: "):
                data = json.loads(line[6:])
            elif line == "\n" and kind:
                return kind, data
        raise EOFError

    def end(self) -> None:
        """Reads to the end."""
        while True:
            self.next()

    def beat(self) -> bytes:
        while (line := self.reply.readline()) and not line.startswith(b":"):
            pass
        return line

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.reply.close()
        self.connection.close()


def heard(toy: Toy, count: int = 1) -> None:
    """Waits until so many listen."""
    deadline = time.monotonic() + 30
    while len(toy.events._subscribers) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(toy.events._subscribers) == count


def test_events_and_predictions_come_as_they_happen(web, toy):
    with Listener(web) as listener:
        assert listener.reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        heard(toy)
        toy.events.tell("rolled back", "put back\nto the start", {"to": "start"})
        toy.show(toy.picture())
        kind, data = listener.next()
        assert (kind, data["kind"], data["text"], data["facts"]) == ("event", "rolled back", "put back\nto the start", {"to": "start"})
        kind, data = listener.next()
        assert (kind, data["facts"]["name"]) == ("prediction", "car")
    with Listener(web, "?predictions=0&status=1") as listener:
        kind, data = listener.next()
        assert (kind, data["name"]) == ("status", "camera-3")
        toy.show(toy.picture())
        toy.events.tell("saved", "saved")
        while (told := listener.next())[0] == "status":
            pass
        assert told[0] == "event"


def test_only_the_latest_predictions_come_where_that_is_asked(web, toy):
    with Listener(web, "?latest=1") as listener:
        heard(toy)
        for _ in range(200):
            toy.show(toy.picture())
        numbers = []
        while not numbers or numbers[-1] < 201:
            numbers.append(listener.next()[1]["facts"]["index"])
        assert len(numbers) < 50
        assert numbers == sorted(numbers)


def test_streams_beat_are_few_and_end_with_the_server(toy, monkeypatch):
    monkeypatch.setattr(live, "BEAT", 0.1)
    monkeypatch.setattr(live.Live.__init__, "__defaults__", (2, 0.1))
    with serving(toy) as web:
        with Listener(web) as first, Listener(web) as second:
            assert first.beat()
            assert second.beat()
            status, headers, body = ask(web, "GET", "/events")
            assert (status, headers["Retry-After"]) == (503, "10")
            assert error(body)
            assert ask(web, "HEAD", "/events")[0] == 503
        for _ in range(3):  # those who went gave their place back
            heard(toy, 0)
            assert ask(web, "HEAD", "/events")[0] == 200
            with Listener(web) as third:
                assert third.beat()
        last = Listener(web)
        heard(toy)
        web.close()
        with pytest.raises(EOFError):
            last.end()
        last.__exit__()
    assert toy.events._subscribers == ()


def test_events_take_no_other_questions(web):
    for query in ("?status=2", "?wrong=1", "?predictions="):
        assert ask(web, "GET", f"/events{query}")[0] == 400


# ------------------------------------------------------------------------------------------------------------ beginning and end


def test_place_that_is_taken_is_told(web):
    other = Web(HttpConfig(port=web.address[1]), Toy().gives())
    with pytest.raises(UsageError, match=r"cannot listen at 127\.0\.0\.1"):
        other.start()
    other.close()


def test_close_ends_threads_and_can_be_repeated(toy):
    before = set(threading.enumerate())
    with serving(toy) as web:
        idle = socket.create_connection(("127.0.0.1", web.address[1]), timeout=30)
        ask(web, "GET", "/healthz")
        web.close()
        web.close()
        assert idle.recv(10) == b""
        idle.close()
    assert {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("http")} == set()


def test_six_readers_and_a_writer_at_once(web, toy):
    bad: list[int] = []

    def read(path: str) -> None:
        for _ in range(10):
            status = ask(web, "GET", path)[0]
            bad.extend([status] if status != 200 else [])

    threads = [threading.Thread(target=read, args=(path,)) for path in ("/", "/status.json", "/frame.png", "/frame.json", "/metrics", "/readyz")]
    for thread in threads:
        thread.start()
    for _ in range(10):
        assert ask(web, "POST", "/api/pause", b"{}", RIGHT)[0] == 200
    for thread in threads:
        thread.join()
    assert bad == []
    assert len(toy.asked) == 10


def test_it_is_loaded_only_where_it_is_enabled():
    code = "import sys\nfrom edgeadapt.runtime.daemon import config, control, metrics, verbs\nprint('http.server' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert found.stdout == "False\n", found.stderr
