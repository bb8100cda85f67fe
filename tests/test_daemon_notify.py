"""What systemd is told, as a socket of our own hears it, and when the watchdog is pinged."""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.runtime.daemon import notify
from edgeadapt.runtime.daemon.notify import Heartbeats, Notifier, Watchdog, watchdog_seconds
from edgeadapt.runtime.daemon.plain import one_line

pytestmark = pytest.mark.device


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Manager:
    """Hears what is sent to NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self.wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wire.bind("\0" + address[1:] if address.startswith("@") else address)
        self.wire.settimeout(60)

    def heard(self) -> str:
        return self.wire.recv(4096).decode()

    def nothing(self) -> bool:
        if not select.select([self.wire], [], [], 0)[0]:
            return True
        self.wire.recv(4096)
        return False


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    found = Manager(str(tmp_path / "notify") if request.param == "path" else f"@edgeadapt-test-{secrets.token_hex(8)}")
    yield found
    found.wire.close()


def test_every_message_as_the_manager_hears_it(manager):
    notifier = Notifier(manager.environ)
    notifier.ready()
    assert manager.heard() == "READY=1"
    notifier.ready("serving")
    assert manager.heard() == "READY=1\nSTATUS=serving"
    notifier.status("adapting, 93 MiB of 128 MiB")
    assert manager.heard() == "STATUS=adapting, 93 MiB of 128 MiB"
    notifier.watchdog()
    assert manager.heard() == "WATCHDOG=1"
    notifier.extend(1.5)
    assert manager.heard() == "EXTEND_TIMEOUT_USEC=1500000"
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = manager.heard().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    notifier.stopping("a checkpoint is written")
    assert manager.heard() == "STOPPING=1\nSTATUS=a checkpoint is written"
    notifier.stopping()
    assert manager.heard() == "STOPPING=1"
    assert manager.nothing()


def test_a_status_is_one_short_line_whatever_it_is_made_of(manager):
    notifier = Notifier(manager.environ)
    notifier.status("a\nREADY=1\x1b[31m\u2028\x00é" + "x" * 10_000)
    told = manager.heard()
    assert told.startswith("STATUS=a READY=1 [31m  é")
    assert len(told) == len("STATUS=") + notify.LONGEST
    assert told.endswith("x…")
    notifier.status("\ud800")  # cannot be encoded
    assert manager.heard() == "STATUS= "


@given(some.text(), some.integers(1, 50))
def test_one_line_is_one_line(text, longest):
    line = one_line(text, longest)
    assert len(line) <= longest
    assert line.isprintable()
    assert len(text.splitlines()) <= 1 or "\n" not in line
    if text.isprintable() and len(text) <= longest:
        assert line == text


def test_without_a_manager_nothing_is_sent(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # anything sent would raise
    Notifier({}).ready("serving")
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().watchdog()


def test_the_processs_own_environment_is_what_counts(manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.environ["NOTIFY_SOCKET"])
    Notifier().watchdog()
    assert manager.heard() == "WATCHDOG=1"


@pytest.mark.parametrize("address", ["/no/such/socket", "@no-such-name-of-edgeadapt", "/" + "x" * 200, "vsock:2:1", "/a\0b"])
def test_what_cannot_be_sent_is_told_once_and_raises_nothing(address, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": address})
    with caplog.at_level(logging.DEBUG, "edgeadapt"):
        notifier.ready()
        notifier.watchdog()
        notifier.stopping()
    assert len(caplog.records) == 1
    assert "the service manager cannot be told anything" in caplog.text


def test_a_manager_that_does_not_read_holds_nothing_up(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(notify, "_PATIENCE", 0.01)
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.environ)
    for _ in range(2000):  # more than its queue takes
        notifier.watchdog()
        if caplog.records:
            break
    manager.wire.close()
    assert "timed out" in caplog.text


OWN = str(os.getpid())


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": OWN}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": OWN + "1"}, None),
        ({"WATCHDOG_PID": OWN}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "1e6"}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
        ({}, None),
    ],
)
def test_how_long_the_watchdog_waits(environ, seconds):
    assert watchdog_seconds(environ) == seconds


def test_workers_that_are_silent_for_too_long_are_late():
    clock = Clock()
    beats = Heartbeats({"source": 5, "predict": 2, "adapt": 3, "store": 3}, clock=clock)
    assert beats.late() == {}
    clock.now += 2.5
    assert beats.late() == {"predict": 2.5}
    beats.beat("predict")
    assert beats.late() == {}
    clock.now += 100
    beats.beat("source")
    assert beats.late() == {"predict": 100.0}  # adapt and store have nothing to do
    beats.beat("predict")
    beats.beat("adapt")
    clock.now += 3
    beats.beat("predict")
    assert beats.late() == {}
    clock.now += 1
    assert beats.late() == {"adapt": 4.0}
    beats.rest("adapt")
    assert beats.late() == {}


def test_a_worker_rests_after_its_work_also_when_that_fails():
    clock = Clock()
    beats = Heartbeats({"store": 3}, clock=clock)

    def fails() -> None:
        with beats.working("store"):
            clock.now += 4
            assert beats.late() == {"store": 4.0}
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fails()
    clock.now += 4
    assert beats.late() == {}


def test_there_are_no_other_workers():
    beats = Heartbeats()
    assert set(notify.SILENCES) == {"source", "predict", "adapt", "store"}
    for call in (beats.beat, beats.rest):
        with pytest.raises(KeyError):
            call("adpat")


def test_the_watchdog_is_pinged_in_time_and_only_while_nobody_is_late(manager, caplog):
    clock = Clock()
    beats = Heartbeats({"source": 60, "predict": 10}, (), clock)
    watchdog = Watchdog(Notifier(manager.environ), beats, 20.0, clock)
    pings = []
    with caplog.at_level(logging.INFO, "edgeadapt"):
        for second in range(100):
            clock.now += 1
            beats.beat("source")
            if not 40 <= second < 70:
                beats.beat("predict")
            assert (watchdog.turn() == {}) == (not 50 <= second < 70)
            if not manager.nothing():
                pings.append(second)
    assert pings[:10] == list(range(0, 50, 5))
    assert pings[10:] == list(range(70, 100, 5))
    assert [record.getMessage() for record in caplog.records] == [
        "predict shows no sign of life for 11 s; the watchdog is not pinged until it does",
        "predict shows signs of life again",
    ]


def test_without_a_watchdog_late_workers_are_told_all_the_same(manager, caplog):
    clock = Clock()
    watchdog = Watchdog(Notifier(manager.environ), Heartbeats({"predict": 10}, (), clock), None, clock)
    watchdog.turn()
    clock.now += 11
    assert watchdog.turn() == {"predict": 11.0}
    assert "predict shows no sign of life" in caplog.text
    assert manager.nothing()


def test_for_a_step_the_manager_waits_longer_until_the_loop_turns_again(manager):
    clock = Clock()
    hearts = Heartbeats({"predict": 30.0}, clock=clock)
    dog = Watchdog(Notifier(manager.environ), hearts, 30.0, clock)
    dog.turn()
    assert manager.heard() == "WATCHDOG=1"
    with dog.step():
        assert manager.heard() == "WATCHDOG_USEC=120000000"
        with dog.step():  # of another thread
            assert manager.nothing()
        clock.now += 8
        hearts.beat("predict")
        dog.turn()
        assert manager.heard() == "WATCHDOG=1", "one still goes on"
        clock.now += 90
    assert manager.nothing(), "or what the loop is late by would count"
    dog.turn()
    assert manager.nothing(), "it is late"
    hearts.beat("predict")
    dog.turn()
    assert manager.heard() == "WATCHDOG=1\nWATCHDOG_USEC=30000000"
    dog.turn()
    assert manager.nothing()


def test_for_steps_that_are_known_to_be_short_the_manager_is_not_asked(manager):
    clock = Clock()
    dog = Watchdog(Notifier(manager.environ), Heartbeats({}), 30.0, clock)

    def asked(seconds: float) -> bool:
        with dog.step():
            found = not manager.nothing()
            clock.now += seconds
        dog.turn()
        while not manager.nothing():
            pass
        return found

    assert [asked(2.0) for _ in range(5)] == [True, True, True, False, False]
    assert [asked(4.0) for _ in range(2)] == [False, True]
    assert [asked(2.0) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("seconds", [None, 300.0])
def test_a_manager_that_waits_for_no_ping_or_long_enough_is_not_asked(manager, seconds):
    dog = Watchdog(Notifier(manager.environ), Heartbeats({}), seconds)
    with dog.step():
        assert manager.nothing()
