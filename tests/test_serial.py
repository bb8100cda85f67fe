"""Frames and samples over a serial line: pseudo-terminals, pyserial's loop and sockets; unplugged, silent, garbled, too fast, stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import select
import socket
import struct
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serial

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.framing import MOST_PIXELS, encode
from edgeadapt.devices.sources import Frame, Wanted
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.devices.sources.serial import Serial
from edgeadapt.errors import SourceError, UsageError

pytestmark = pytest.mark.device

TASK = Task("classification", 3, ("rest", "walk", "run"))
IMAGES = Wanted(InputSpec((3, 4, 5)), TASK)
SENSOR = Wanted(InputSpec((2, 6), hop=6), TASK)
LONG = 60.0  # seconds: nothing takes so long but what hangs
MARK = 999


class Terminal:
    """A pseudo-terminal whose other end is found under a name of its own, as that of a device is."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder / "usb-board")
        self.plug()

    def plug(self) -> None:
        self._end, self._device = pty.openpty()
        tty.setraw(self._device)
        os.symlink(os.ttyname(self._device), self.url)

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._end, data) :]

    def unplug(self) -> None:
        if os.path.islink(self.url):
            os.unlink(self.url)
            os.close(self._end)
            os.close(self._device)


class Loop:
    """pyserial's own, which gives back what is written to it: we write into the port that the source opened."""

    url = "loop://"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[Any] = []
        real = serial.serial_for_url

        def recorded(*words: Any, **options: Any) -> Any:
            self._made.append(real(*words, **options))
            return self._made[-1]

        monkeypatch.setattr(serial, "serial_for_url", recorded)

    def write(self, data: bytes) -> None:
        port = self._made[-1]
        if port.is_open:
            port.write(data)

    def unplug(self) -> None:
        for port in self._made:
            port.close()


class Socket:
    """A server on this machine, as ser2net is one."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"socket://127.0.0.1:{self._server.getsockname()[1]}"
        self._found: socket.socket | None = None

    def write(self, data: bytes) -> None:
        if self._found is None:
            if not select.select([self._server], [], [], 0)[0]:
                return
            self._found = self._server.accept()[0]
        self._found.sendall(data)

    def unplug(self) -> None:
        if self._found is not None:
            self._found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as where its machine loses power
            self._found.close()
            self._found = None
        self._server.close()


@pytest.fixture
def terminal(tmp_path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    yield made
    made.unplug()


@pytest.fixture(params=["terminal", "loop", "socket"])
def line(request, tmp_path, monkeypatch) -> Iterator[Any]:
    made = {"terminal": lambda: Terminal(tmp_path), "loop": lambda: Loop(monkeypatch), "socket": Socket}[request.param]()
    yield made
    made.unplug()


@contextlib.contextmanager
def again_and_again(write: Callable[[bytes], None], data: bytes) -> Iterator[None]:
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(0.005):
            write(data)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LONG)


def begun(source: Any, write: Callable[[bytes], None], data: bytes, is_mark: Callable[[Frame], bool], mark: bytes) -> Iterator[Frame]:
    """The source's frames from a mark on: opening it throws away what came before, so that `data` is sent until some of it comes."""
    frames = iter(source)
    with again_and_again(write, data):
        next(frames)
    write(mark)
    assert any(is_mark(frame) for frame in frames)
    return frames


def packets(source: Any, line: Any, shape: tuple[int, ...] = (4, 5, 3)) -> Iterator[Frame]:
    one = np.zeros(shape, np.uint8 if len(shape) == 3 else np.int16)
    return begun(source, line.write, encode(one, 7), lambda frame: frame.id == MARK, encode(one, MARK, boot=1))


def image(number: int) -> np.ndarray:
    return np.full((4, 5, 3), number, np.uint8)


def test_frames_come_as_they_were_sent(line):
    with Serial(line.url, IMAGES) as source:
        frames = packets(source, line)
        before = source.counts
        floats = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
        line.write(encode(image(1), 1000, 1, label=2) + encode(floats, 1001, 1) + encode(floats.astype(np.int16), 1002, 1, label=0, scale=0.5))
        found = [next(frames) for _ in range(3)]
        assert [(frame.id, frame.truth, frame.fault) for frame in found] == [(1000, 2, ""), (1001, None, ""), (1002, 0, "")]
        assert np.array_equal(found[0].pixels, image(1))
        assert np.array_equal(found[1].pixels, floats)
        assert np.array_equal(found[2].pixels, floats.astype(np.int16) / np.float32(2))
        assert source.counts["packets"] - before["packets"] == 3
        assert source.live
        assert source.name == line.url
        source.stop()
        assert list(frames) == []


def test_garbage_between_frames_is_counted_and_harms_none(terminal):
    with Serial(terminal.url, IMAGES) as source:
        frames = packets(source, terminal)
        before = source.counts
        torn = encode(image(9), 1001, 1)[:30] + b"\0"
        terminal.write(encode(image(1), 1000, 1) + b"\0\0garbage\0" + torn + b"Booting...\r\n\0" + encode(image(2), 1002, 1))
        assert [next(frames).id, next(frames).id] == [1000, 1002]
        grown = {kind: count - before[kind] for kind, count in source.counts.items() if count != before[kind] and kind != "bytes"}
        assert grown == {"packets": 2, "cobs": 3, "lost": 1}


@pytest.mark.parametrize(
    ("wanted", "array", "message"),
    [
        (IMAGES, np.zeros((4, 6, 3), np.uint8), "images are 4 x 5"),
        (IMAGES, np.zeros((4, 5), np.uint8), "N x H x W x 3"),
        (IMAGES, np.zeros((2, 3, 4, 5), np.float32), "one packet holds 2 frames"),
        (SENSOR, np.zeros((2, 6, 1), np.uint8), "uint8 is for images"),
        (SENSOR, np.zeros((2, 5), np.int16), "2x6"),
    ],
)
def test_frames_that_do_not_fit_are_told_and_passed_over(wanted, array, message, terminal):
    with Serial(terminal.url, wanted) as source:
        frames = packets(source, terminal, (4, 5, 3) if wanted is IMAGES else (2, 6))
        terminal.write(encode(array, 1000, 1, label=1))
        frame = next(frames)
        assert frame.pixels is None
        assert frame.id == 1000
        assert frame.truth == 1
        assert message in frame.fault


def test_pictures_of_any_size_come_where_the_bundle_resizes(terminal):
    wanted = Wanted(InputSpec((3, 4, 5), resize=(4, 5)), TASK)
    with Serial(terminal.url, wanted) as source:
        frames = packets(source, terminal)
        large = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
        writer = threading.Thread(target=terminal.write, args=(encode(large, 1000, 1),))
        writer.start()
        assert np.array_equal(next(frames).pixels, large)
        writer.join(LONG)
    assert 1280 * 800 <= MOST_PIXELS


@pytest.mark.parametrize("line", ["terminal", "socket"], indirect=True)
def test_what_is_pulled_out_is_told(line):
    with Serial(line.url, IMAGES) as source:
        frames = packets(source, line)
        line.unplug()
        with pytest.raises(SourceError, match="broke off"):
            list(frames)
        with pytest.raises(SourceError, match="cannot be opened"):
            list(Serial(line.url, IMAGES))


def test_a_line_that_comes_back_is_read_on(terminal):
    source = Reopened(lambda: Serial(terminal.url, IMAGES), first=0.01, longest=0.05)
    frames = packets(source, terminal)
    first = source.counts["packets"]
    terminal.unplug()

    seen: list[str] = []

    def plugged_later() -> None:
        try:  # it broke, and could not be opened either
            until(lambda: source.counts["breaks"] >= 2 and "cannot be opened: No such file" in source.complaint)
            seen.append(source.complaint)
        finally:  # or the test would wait for ever
            terminal.plug()

    thread = threading.Thread(target=plugged_later)
    thread.start()

    def write(data: bytes) -> None:
        if os.path.islink(terminal.url):
            terminal.write(data)

    with again_and_again(write, encode(image(5), 5, 2)):
        frame = next(frames)
    thread.join(LONG)
    assert seen
    assert np.array_equal(frame.pixels, image(5))
    assert source.complaint == ""
    assert source.counts["packets"] > first
    source.stop()
    assert all(frame.id == 5 for frame in frames)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_silent_line_has_stalled(line):
    source = Serial(line.url, IMAGES, stall=0.15)
    with pytest.raises(SourceError, match=r"nothing for 0\.15 s"):
        list(source)


def read_beside(source: Any) -> tuple[threading.Thread, list[object]]:
    found: list[object] = []

    def read() -> None:
        try:
            found.extend(source)
        except Exception as reason:
            found.append(reason)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, found


class Clock:
    """Stands in for the module `time`."""

    now, asked = 0.0, 0

    def monotonic(self) -> float:
        self.asked += 1
        return self.now


def test_zeros_are_a_sign_of_life(terminal, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("edgeadapt.devices.sources.serial.time", clock)
    source = Serial(terminal.url, IMAGES, stall=10)
    thread, found = read_beside(source)
    with again_and_again(terminal.write, b"\0"):
        until(lambda: source.counts["bytes"] > 0)
    for _ in range(5):
        before = source.counts["bytes"]
        terminal.write(b"\0" * 50)
        until(lambda before=before: source.counts["bytes"] >= before + 50)
        clock.now += 9
        asked = clock.asked
        until(lambda asked=asked: clock.asked >= asked + 3)  # with nothing to read
        assert found == []
    clock.now += 1
    thread.join(LONG)
    assert isinstance(found[0], SourceError)


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_stop_ends_the_wait_for_a_byte(line, end):
    source = Serial(line.url, IMAGES, stall=3600)
    thread, found = read_beside(source)
    until(lambda: source._port is not None)
    getattr(source, end)()
    thread.join(LONG)
    assert not thread.is_alive()
    assert found == []
    assert source._port is None


class Hanging:
    """A port that takes its time to open."""

    timeout = None

    def __init__(self) -> None:
        self.asked, self.go, self.closed = threading.Event(), threading.Event(), threading.Event()

    def open(self) -> None:
        self.asked.set()
        self.go.wait(LONG)

    def fileno(self) -> int:
        return 0

    def close(self) -> None:
        self.closed.set()


def test_a_stop_does_not_wait_for_a_host_that_does_not_answer(monkeypatch):
    port = Hanging()
    monkeypatch.setattr(serial, "serial_for_url", lambda *words, **options: port)
    source = Serial("socket://127.0.0.1:9", IMAGES)
    thread, found = read_beside(source)
    assert port.asked.wait(LONG)
    source.stop()
    thread.join(LONG)
    assert not thread.is_alive()
    assert found == []
    assert not port.closed.is_set()
    port.go.set()
    assert port.closed.wait(LONG)  # though nobody wants it any more


def test_a_defect_is_not_taken_for_a_broken_line(monkeypatch):
    def broken(*words: Any, **options: Any) -> Any:
        raise AttributeError("a defect")

    source = Serial("loop://", IMAGES)
    monkeypatch.setattr(serial, "serial_for_url", broken)
    with pytest.raises(AttributeError):
        list(source)


def test_a_stop_before_the_first_frame(terminal):
    source = Serial(terminal.url, IMAGES)
    source.stop()
    assert list(source) == []
    source.close()
    source.close()


def test_a_device_that_is_not_there_or_in_use(terminal, tmp_path):
    with pytest.raises(SourceError, match="No such file") as told:
        list(Serial(str(tmp_path / "gone"), IMAGES))
    assert "/dev/serial/by-id" in told.value.hint
    with Serial(terminal.url, IMAGES) as source:
        frames = packets(source, terminal)
        with pytest.raises(SourceError, match="cannot be opened") as told:
            list(Serial(terminal.url, IMAGES))
        assert "another program" in told.value.hint
        terminal.write(encode(image(1), 1000, 1))
        assert next(frames).id == 1000
    (tmp_path / "file").write_text("no terminal")
    with pytest.raises(SourceError, match="cannot be opened"):
        list(Serial(str(tmp_path / "file"), IMAGES))
    with pytest.raises(SourceError, match="no ports found"):
        list(Serial("hwgrep://no such thing", IMAGES))


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("nonsense://x", {}),
        ("hwgrep://x&colour=red", {}),
        ("loop://", {"format": "xml"}),
        ("loop://", {"baud": 0}),
        ("loop://", {"stall": 0.0}),
        ("loop://", {"stall": float("nan")}),
    ],
)
def test_mistakes_are_told_at_once(url, options):
    with pytest.raises(UsageError):
        Serial(url, IMAGES, **options)


def test_a_line_over_a_network_is_warned_of_once(caplog):
    for url in ("socket://192.0.2.7:4000", "socket://192.0.2.7:4000", "RFC2217://board.example:4000", "socket://127.0.0.1.example:4000"):
        Serial(url, IMAGES)
    for url in ("socket://127.0.0.1:4000", "rfc2217://localhost:4000", "socket://[::1]:4000", "loop://", "/dev/ttyS0"):
        Serial(url, IMAGES)
    told = [record.getMessage().split()[0] for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["socket://192.0.2.7:4000", "RFC2217://board.example:4000", "socket://127.0.0.1.example:4000"]


def test_a_sender_that_is_too_fast_waits_and_nothing_grows(terminal):
    with Serial(terminal.url, IMAGES) as source:
        frames = packets(source, terminal)
        count = 3000
        data = b"".join(encode(image(number % 256), 1000 + number, 1) for number in range(count))
        writer = threading.Thread(target=terminal.write, args=(data,))
        writer.start()
        held = 0
        for number in range(count):
            frame = next(frames)
            assert frame.id == 1000 + number
            if number % 500 == 0:
                time.sleep(0.02)
            held = max(held, source._taken._decoder.held)
        writer.join(LONG)
        assert held <= 4096 + 50
        assert source.counts["lost"] == 1000 - MARK - 1


def test_samples_in_lines_become_windows(line):
    with Serial(line.url, SENSOR, "csv") as source:
        frames = begun(source, line.write, b"0,0\n", lambda frame: (frame.pixels == 9).all(), b"cut\n" + b"9,9\n" * 6)
        before = source.counts
        line.write(b"".join(b"%d.5,%d\n" % (number, -number) for number in range(12)) + b"1;2;3\n")
        first, second = next(frames), next(frames)
        assert first.fault == second.fault == ""
        assert np.array_equal(first.pixels, [np.arange(6) + 0.5, -np.arange(6)])
        assert np.array_equal(second.pixels, [np.arange(6, 12) + 0.5, -np.arange(6, 12)])
        assert second.id == first.id + 1
        until(lambda: source.counts["lines"] - before["lines"] == 12)
        source.stop()
        assert list(frames) == []


def test_frames_in_lines_of_json(line):
    with Serial(line.url, IMAGES, "jsonl") as source:
        zero, mark = str([0.0] * 60).encode() + b"\n", str([9.0] * 60).encode() + b"\n"
        frames = begun(source, line.write, zero, lambda frame: (frame.pixels == 9).all(), mark)
        line.write(b'{"x": ' + str(np.arange(60).reshape(3, 4, 5).tolist()).encode() + b', "label": "walk"}\n')
        frame = next(frames)
        assert np.array_equal(frame.pixels, np.arange(60).reshape(3, 4, 5))
        assert frame.pixels.dtype == np.float32
        assert frame.truth == 1


def test_the_first_line_may_have_lost_its_beginning(terminal):
    source = Serial(terminal.url, Wanted(InputSpec((3,)), TASK), "csv")
    thread, found = read_beside(source)
    until(lambda: source._port is not None)
    terminal.write(b"7,7,7\n1,2,3\n")
    until(lambda: source.counts["lines"] > 0)
    source.stop()
    thread.join(LONG)
    assert [frame.pixels.tolist() for frame in found] == [[1, 2, 3]]
