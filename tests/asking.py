"""Asking an HTTP server of tests, and bodies to send it."""

from __future__ import annotations

import http.client
import io
import json
import socket
from typing import Any

import numpy as np
from PIL import Image

from edgeadapt.runtime.daemon.web.server import Web
from tests.toyweb import TOKEN

RIGHT = {"Authorization": f"Bearer {TOKEN}"}


def ask(web: Web, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any, bytes]:
    """Status, headers and body of the reply."""
    connection = http.client.HTTPConnection("127.0.0.1", web.address[1], timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def raw(web: Web, data: bytes, seconds: float = 30.0) -> bytes:
    """All that is answered to these bytes until the connection is ended by the other side."""
    with socket.create_connection(("127.0.0.1", web.address[1]), timeout=seconds) as wire:
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)
        found = b""
        while more := wire.recv(2**16):
            found += more
    return found


def error(body: bytes) -> dict[str, Any]:
    found = json.loads(body)["error"]
    assert set(found) == {"code", "name", "message", "hint"}
    assert found["message"]
    assert type(found["code"]) is int
    return found


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def image(kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 40, 10)).save(file, kind)
    return file.getvalue()
