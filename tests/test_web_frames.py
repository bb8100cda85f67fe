"""Frames sent to the daemon over HTTP: what becomes of them, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.devices.sources.posted import Posted
from edgeadapt.runtime.daemon.config import HttpConfig
from edgeadapt.runtime.daemon.web import BODIES
from edgeadapt.runtime.daemon.web.handler import SMALL
from edgeadapt.runtime.daemon.web.server import Web
from tests.asking import RIGHT, ask, error, image, npy, raw
from tests.toyweb import SENSOR, Toy, serving, token_file

pytestmark = pytest.mark.device


@pytest.fixture
def toy() -> Toy:
    return Toy(posts=True)


@pytest.fixture
def web(toy: Toy, tmp_path: Path) -> Iterator[Web]:
    with serving(toy, token_file(tmp_path), linger=0.2) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (image("PNG"), 1),
        (image("JPEG"), 1),
        (npy(np.zeros((32, 32, 3), np.uint8)), 1),
        (npy(np.zeros((4, 50, 40, 3), np.uint8)), 4),
        (npy(np.zeros((2, 3, 32, 32), np.float32)), 2),
        (npy(np.zeros((2, 3, 32, 32), ">f4")), 2),
        (json.dumps({"x": np.zeros((3, 32, 32)).tolist()}).encode(), 1),
        (json.dumps({"x": np.zeros((2, 3, 32, 32)).tolist()}).encode(), 2),
        (json.dumps({"x": [0] * 3 * 32 * 32}).encode(), 1),
    ],
)
def test_frames_are_predicted_without_a_token_and_change_nothing(web, toy, body, count):
    status, _, reply = ask(web, "POST", "/predict", body)
    assert status == 200, reply
    assert [one["index"] for one in json.loads(reply)["predictions"]] == list(range(count))
    assert toy.posted == []
    assert toy.asked == []


def test_frames_posted_go_to_the_source_in_their_order(web, toy):
    frames = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    status, _, reply = ask(web, "POST", "/frames", npy(frames), RIGHT)
    assert (status, json.loads(reply)) == (202, {"accepted": 2, "ids": ["http-0", "http-1"]})
    assert [frame.id for frame in toy.posted] == ["http-0", "http-1"]
    assert np.array_equal(toy.posted[1].pixels, frames[1])
    body = json.dumps({"x": [0.5] * 3 * 32 * 32, "label": 4}).encode()
    assert ask(web, "POST", "/frames", body, RIGHT)[0] == 202
    assert toy.posted[2].truth == 4
    assert toy.posted[2].pixels.shape == (3, 32, 32)
    assert ask(web, "POST", "/frames", json.dumps({"x": [0] * 3072, "label": "car"}).encode(), RIGHT)[0] == 400
    assert len(toy.posted) == 3


def test_posts_are_what_the_source_takes(tmp_path):
    source = Posted()
    with Web(HttpConfig(port=0, token_file=token_file(tmp_path)), replace(Toy().gives(), post=source.put)) as web:
        assert ask(web, "POST", "/frames", image(), RIGHT)[0] == 202
    assert next(iter(source)).pixels.shape == (32, 32, 3)  # in the model's size, as it was read


def test_as_many_frames_as_one_request_may_bring_wait_to_be_taken(tmp_path):
    source = Posted()
    frames = np.arange(64 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 32, 32, 3)
    with Web(HttpConfig(port=0, token_file=token_file(tmp_path)), replace(Toy().gives(), post=source.put)) as web:
        assert json.loads(ask(web, "POST", "/frames", npy(frames), RIGHT)[2])["accepted"] == 64
    assert source.counts == {"dropped": 0}
    waiting = iter(source)
    found = [next(waiting) for _ in range(64)]
    assert np.array_equal([frame.pixels for frame in found], frames)
    assert all(frame.pixels.base is None for frame in found), "each could be held alone"


def test_frames_that_could_not_wait_all_are_refused(web, toy, monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.daemon.web.routes.MOST", 3 * 32 * 32 * 3)
    status, _, body = ask(web, "POST", "/frames", npy(np.zeros((4, 32, 32, 3), np.uint8)), RIGHT)
    assert status == 413
    assert "4 frames of this model take 12 KiB, and only 9 KiB may wait" in error(body)["message"]
    assert error(body)["hint"] == "send at most 3 at once"
    assert toy.posted == []
    assert ask(web, "POST", "/frames", npy(np.zeros((3, 32, 32, 3), np.uint8)), RIGHT)[0] == 202
    assert ask(web, "POST", "/frames", npy(np.zeros((1, 3, 32, 32), np.float32)), RIGHT)[0] == 202, "one always may"
    assert ask(web, "POST", "/predict", npy(np.zeros((4, 32, 32, 3), np.uint8)))[0] == 200


def test_frames_for_another_source_are_409_and_for_no_bundle_503(tmp_path):
    with serving(Toy(), token_file(tmp_path)) as web:
        status, _, body = ask(web, "POST", "/frames", image(), RIGHT)
        assert status == 409
        assert 'type = "http"' in error(body)["hint"]
    toy = Toy(posts=True)
    toy.spec = None
    with serving(toy, token_file(tmp_path)) as web:
        assert ask(web, "POST", "/frames", image(), RIGHT)[0] == ask(web, "POST", "/predict", image())[0] == 503


def test_windows_of_a_sensor_are_predicted():
    toy = Toy(SENSOR)
    with serving(toy) as web:
        assert ask(web, "POST", "/predict", npy(np.zeros((5, 3, 128), np.float32)))[0] == 200
        assert ask(web, "POST", "/predict", json.dumps({"x": [0.1] * 384}).encode())[0] == 200
        assert "no image" in error(ask(web, "POST", "/predict", image())[2])["message"]


def bomb() -> bytes:
    """A small PNG file that says it has 20000 x 20000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def lying(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(100)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"neither",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        image()[:60],
        image("TIFF"),
        lying((10**9, 32, 32, 3)),
        lying((32, 32, 3)),
        lying((-1, 32, 32, 3)),
        lying((2**40, 2**40, 2**40, 3)),
        lying((32, 32, 3), "|O"),
        npy(np.zeros((32, 32, 4), np.uint8)),
        npy(np.zeros((65, 32, 32, 3), np.uint8)),
        npy(np.zeros((32, 32, 3), np.float64)),
        npy(np.zeros((32, 32, 3), np.uint8)) + b"more",
        b"\x93NUMPY\x01\x00",
        b"{}",
        b'{"x": "text"}',
        b'{"x": [[1, 2], [3]]}',
        b'{"x": [true]}',
        b'{"x": ' + b"[" * 60 + b"]" * 60 + b"}",
        b'{"x": [1e300]}',
        b'{"x": [' + b"9" * 400 + b"]}",
        b'{"x": {"a": 1}}',
        b"[" * 10000,
    ],
    ids=range(24),
)
def test_bodies_that_are_no_frames_are_refused_in_words(web, toy, body):
    status, _, reply = ask(web, "POST", "/predict", body)
    assert status == 400
    assert error(reply)["message"]


@pytest.mark.parametrize("body", [bomb(), image("JPEG", (600, 600)), npy(np.zeros((600, 600, 3), np.uint8))], ids=["bomb", "jpeg", "array"])
def test_pictures_that_would_take_too_much_memory_are_413(toy, body):
    with Web(HttpConfig(port=0), replace(toy.gives(), picture=2**20)) as web:
        status, _, reply = ask(web, "POST", "/predict", body)
        assert status == 413
        assert "pixels" in error(reply)["message"]
        assert "smaller" in error(reply)["hint"]
        assert ask(web, "POST", "/predict", image("JPEG"))[0] == 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.sampled_from((b"", b"\x93NUMPY\x01\x00", image()[:40])), some.binary(max_size=300))
def test_any_body_is_answered(web, begin, body):
    assert ask(web, "POST", "/predict", begin + body)[0] in (200, 400)


def test_bodies_are_bounded(toy, tmp_path):
    with serving(toy, token_file(tmp_path), body=2000, linger=0.2) as web:
        for path in ("/predict", "/frames", "/api/pause"):
            status, _, body = ask(web, "POST", path, b"x" * 2001, RIGHT)
            assert status == 413
            assert "2000" in error(body)["message"]
        head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 999999999\r\n\r\n" % web.address[1]
        assert b" 413 " in raw(web, head)  # before any of it is read
        assert ask(web, "POST", "/predict", b"x" * 2000)[0] == 400


def test_large_bodies_hold_their_room_until_they_are_answered(toy):
    """Else as many could wait for their turn as there are connections; small ones go on."""
    large = npy(np.zeros((30, 32, 32, 3), np.uint8))
    assert len(large) > SMALL
    with Web(HttpConfig(port=0), toy.gives(), patience=0.3) as web, ThreadPoolExecutor(BODIES + 1) as pool:
        toy.go.clear()
        asked = [pool.submit(ask, web, "POST", "/predict", large) for _ in range(BODIES + 1)]
        first = next(as_completed(asked)).result()
        toy.go.set()
        assert first[0] == 503
        assert "large bodies" in error(first[2])["message"]
        assert sorted(one.result()[0] for one in asked) == [200] * BODIES + [503]
        assert ask(web, "POST", "/predict", large)[0] == 200


def test_json_is_bounded_more_narrowly(web):
    assert ask(web, "POST", "/predict", b'{"x": [' + b" " * 2**21 + b"0]}")[0] == 413


def test_client_that_waits_to_be_told_to_go_on_is(web):
    body = image()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost:%d\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    found = raw(web, head % (web.address[1], len(body)) + body)
    assert found.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    refused = raw(web, (head % (web.address[1], len(body))).replace(b"/predict", b"/frames") + body)
    assert refused.startswith(b"HTTP/1.1 401 ")
