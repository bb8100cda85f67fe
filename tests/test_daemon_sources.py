"""The daemon and its sources: what it makes of those that cannot be, that bring rubbish, and that wait when it is to end."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import tty
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.runtime.daemon import feed
from edgeadapt.runtime.daemon.answering import ready
from edgeadapt.runtime.daemon.client import Client
from edgeadapt.runtime.daemon.daemon import KINDS
from tests.test_daemon import X, replay, running, text, until, with_state, written
from tests.toybundle import SIDE

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return with_state(tmp_path)


def test_a_source_with_a_defect_is_safe_mode_and_its_trace_is_told(
    room: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x.npy")

    monkeypatch.setitem(KINDS, "replay", broken)
    with running(room, text(room, toy, replay(room / "a.npz"))) as (daemon, client):
        status = client.call("status")
        assert status["mode"] == "safe"
        assert "a defect of the source: KeyError('x.npy')" in status["reason"]
        assert [event["text"] for event in status["events"] if event["kind"] == "source"] == [status["reason"]]
        assert ready(daemon) == [status["reason"]]
    assert any(record.exc_info for record in caplog.records)


def test_a_link_to_itself_and_an_array_by_another_name_do_not_end_it(room: Path, toy: Path) -> None:
    (room / "pictures").mkdir()
    (room / "pictures/loop").symlink_to(room / "pictures/loop")
    with running(room, text(room, toy, replay(room / "pictures"))) as (_, client):
        status = until(lambda: (now := client.call("status"))["predictions"]["bad"] and now)
        assert status["mode"] == "serving"
    with zipfile.ZipFile(room / "a.npz", "w") as archive:
        archive.writestr("x", b"no array")
    with running(room, text(room, toy, replay(room / "a.npz"))) as (_, client):
        status = client.call("status")
        assert status["mode"] == "safe"
        assert "has no x.npy, but x" in status["reason"]


def test_a_line_that_brings_only_rubbish_is_neither_live_nor_ready(room: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_PATIENCE", 0.5)
    end, device = pty.openpty()
    tty.setraw(device)
    line, over = [b"\x93\x07 rubbish\n"], threading.Event()

    def write() -> None:
        while not over.wait(0.02):
            os.write(end, line[0])

    writer = threading.Thread(target=write)
    writer.start()
    source = f'type = "serial"\nurl = "{os.ttyname(device)}"\nformat = "csv"\nbaud = 9600'
    try:
        with running(room, text(room, toy, source)) as (daemon, client):
            status = until(lambda: (now := client.call("status"))["source"]["complaint"] and now)
            assert not status["source"]["live"]
            assert 'see that its other end sends "csv" at 9600 baud' in status["source"]["complaint"]
            assert any("could not be used" in reason for reason in ready(daemon))
            line[0] = b",".join([b"1"] * 3 * SIDE * SIDE) + b"\n"
            until(lambda: client.call("status")["source"]["live"])
            assert ready(daemon) == []
    finally:
        over.set()
        writer.join(60)
        os.close(end)
        os.close(device)


# -------------------------------------------------------------------------------------------------------- standard input


@contextmanager
def process(room: Path, toy: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    (room / "e.toml").write_text(text(room, toy, 'type = "stdin"\nformat = "npy"'))
    command = [sys.executable, "-m", "edgeadapt", "serve", "--config", str(room / "e.toml")]
    environment = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    run = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    client = Client(room / "c.sock")
    try:
        until(lambda: client.call("status")["mode"] == "serving")
        yield run, client
    finally:
        run.kill()
        run.communicate()


def send(run: subprocess.Popen[bytes], frames: np.ndarray) -> None:
    out = io.BytesIO()
    np.save(out, frames)
    assert run.stdin is not None
    run.stdin.write(out.getvalue())
    run.stdin.flush()


def test_it_ends_at_once_while_it_waits_for_standard_input(room: Path, toy: Path) -> None:
    with process(room, toy) as (run, client):
        send(run, X[0])
        until(lambda: client.call("status")["predictions"]["count"] == 1)
        begin = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
        assert time.monotonic() - begin < 10
        assert run.stderr is not None
        said = run.stderr.read()
        assert b"Fatal" not in said
        assert b"does not stop" not in said


def test_after_a_hangup_it_reads_on_where_it_was(room: Path, toy: Path) -> None:
    with process(room, toy) as (run, client):
        send(run, X[:2])
        until(lambda: client.call("status")["predictions"]["count"] == 2)
        run.send_signal(signal.SIGHUP)
        until(lambda: (now := client.call("status"))["predictions"]["count"] == 0 and now["mode"] == "serving")
        send(run, X[:3])
        status = until(lambda: (now := client.call("status"))["predictions"]["count"] == 3 and now)
        assert status["source"]["complaint"] == ""
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
