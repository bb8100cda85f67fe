"""The control socket, with verbs that are toys: what it answers, whom it lets wait, and that nothing which comes over it stops it."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from edgeadapt.errors import EdgeAdaptError, StateError, UsageError
from edgeadapt.runtime.daemon import control, listening, verbs
from edgeadapt.runtime.daemon.client import Client
from edgeadapt.runtime.daemon.control import Control
from tests import child

pytestmark = pytest.mark.device


class Silent(Iterator[object]):
    """Says something once, and then nothing more."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed, self._begun = closed, False

    def __next__(self) -> object:
        if not self._begun:
            self._begun = True
            return "begun"
        time.sleep(0.005)
        return None

    def close(self) -> None:
        self._closed.set()


class Daemon:
    """Toy verbs, and what they were asked."""

    def __init__(self) -> None:
        self.asked: list[Mapping[str, object]] = []
        self.closed = threading.Event()
        self.go = threading.Event()
        self.verbs: dict[str, verbs.Function] = {
            "status": lambda params: {"version": 1, "shift": float("nan"), "name": "caf\u00e9\n"},
            "rollback": self.keeps,
            "label": self.keeps,
            "tail": self.tail,
            "echo": lambda params: params,
            "waits": lambda params: self.go.wait(60),
            "breaks": self.breaks,
            "refuses": self.refuses,
            "unfit": lambda params: {1, 2},
            "many": lambda params: iter([]),
            "much": lambda params: ("x" * 10_000 for _ in count()),
            "breaks late": self.breaks_late,
            "silent": self.silent,
            "late": lambda params: self.late(),
        }

    def keeps(self, params: Mapping[str, object]) -> object:
        self.asked.append(params)
        return {"text": "done"}

    def breaks(self, params: Mapping[str, object]) -> object:
        raise RuntimeError("a\ndefect")

    def refuses(self, params: Mapping[str, object]) -> object:
        raise StateError("there is no such state", "take another")

    def tail(self, params: Mapping[str, object]) -> Iterator[object]:
        yield from ({"number": number} for number in range(3))

    def late(self) -> Iterator[object]:
        self.go.wait(60)
        yield "late"

    def breaks_late(self, params: Mapping[str, object]) -> Iterator[object]:
        yield 1
        raise StateError("it is gone", "")

    def silent(self, params: Mapping[str, object]) -> Iterator[object]:
        return Silent(self.closed)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def serving(daemon: Daemon, path: Path) -> Iterator[Control]:
    with Control(path, daemon.verbs) as found:
        yield found
        daemon.go.set()


class Wire:
    """A connection that sends bytes as they are."""

    def __init__(self, path: Path) -> None:
        self.wire = socket.socket(socket.AF_UNIX)
        self.wire.settimeout(60)
        self.wire.connect(str(path))
        self.file = self.wire.makefile("rb")

    def send(self, data: bytes | dict[str, Any]) -> None:
        self.wire.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def reply(self) -> Any:
        """The next one; None at the end."""
        try:
            line = self.file.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def ask(self, data: bytes | dict[str, Any]) -> Any:
        self.send(data)
        return self.reply()

    def trickle(self) -> None:
        """Sends blanks until nobody takes them."""
        with suppress(OSError):
            while True:
                self.wire.sendall(b" ")
                time.sleep(0.01)

    def close(self) -> None:
        self.file.close()
        self.wire.close()


@contextmanager
def wired(path: Path) -> Iterator[Wire]:
    with closing(Wire(path)) as wire:
        yield wire


def alive(path: Path) -> bool:
    return Client(path).call("echo", x=1) == {"x": 1}


# -------------------------------------------------------------------------------------------------------------------- replies


def test_requests_are_answered_in_their_order_with_their_id(serving, path):
    with wired(path) as wire:
        assert wire.ask({"id": 1, "method": "echo", "params": {"a": [1, None]}}) == {"id": 1, "result": {"a": [1, None]}}
        assert wire.ask({"id": "x", "method": "echo"}) == {"id": "x", "result": {}}
        assert wire.ask({"method": "echo", "params": None}) == {"id": None, "result": {}}
        wire.send(b'{"id": 1, "method": "echo"}\n\n  \r\n{"id": 2, "meth')
        wire.send(b'od": "echo"}\r\n{"id": 3, "method": "echo"}')
        wire.wire.shutdown(socket.SHUT_WR)  # as `nc` does at the end of its input
        assert [wire.reply()["id"] for _ in range(3)] == [1, 2, 3]
        assert wire.reply() is None


def test_what_a_verb_gives_is_json_whatever_is_in_it(serving, path):
    with wired(path) as wire:
        wire.send({"id": 1, "method": "status"})
        assert wire.file.readline() == b'{"id":1,"result":{"version":1,"shift":null,"name":"caf\\u00e9\\n"}}\n'


REFUSED: dict[str, tuple[bytes, str, str]] = {
    "no JSON": (b"status", "not JSON", ""),
    "no UTF-8": (b'{"method": "\xff"}', "not JSON", ""),
    "UTF-16": ('{"method": "echo"}'.encode("utf-16-le")[:-1], "not JSON", ""),
    "deep": (b"[" * 60_000, "not JSON", ""),
    "deep and closed": (b"[" * 30_000 + b"]" * 30_000, "not JSON", ""),
    "no finite number": (b'{"method": "echo", "params": {"x": NaN}}', "NaN is no number", ""),
    "long number": (b'{"id": 1, "method": "nothing' + b"1" * 50_000 + b'"}', "is no verb", ""),
    "a list": (b'[{"method": "echo"}]', "no mapping", ""),
    "a number": (b"1", "no mapping", ""),
    "no method": (b"{}", "None is no verb", "there are: status, rollback"),
    "method a list": (b'{"method": ["status"]}', "a list is no verb", ""),
    "unknown verb": (b'{"method": "statsu"}', "'statsu' is no verb", "did you mean status?"),
    "control characters": (b'{"method": "\\u001b[31m\\ud800"}', r"'\x1b[31m\ud800' is no verb", ""),
    "id a list": (b'{"id": [1], "method": "echo"}', "id is neither", ""),
    "id true": (b'{"id": true, "method": "echo"}', "id is neither", ""),
    "params a list": (b'{"method": "rollback", "params": ["start"]}', "its parameters are a list", '{"name": value}'),
    "params a text": (b'{"method": "echo", "params": "start"}', "its parameters are 'start'", ""),
    "unknown parameter": (b'{"method": "rollback", "params": {"too": "start"}}', "no parameter 'too'", "did you mean to?"),
    "wrong choice": (b'{"method": "rollback", "params": {"to": "strat"}}', "rollback: to is 'strat'", "did you mean start?"),
    "wrong type": (b'{"method": "tail", "params": {"count": true}}', "tail: count is True", "give a whole number"),
    "missing": (b'{"method": "label", "params": {}}', "label lacks its parameter label", "a class's number or name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason_and_the_connection_goes_on(serving, path, name, daemon):
    line, message, hint = REFUSED[name]
    with wired(path) as wire:
        error = wire.ask(line + b"\n")["error"]
        assert (error["code"], error["name"]) == (2, "UsageError")
        assert message in error["message"]
        assert hint in error["hint"]
        assert len(error["message"]) + len(error["hint"]) < 1000
        assert wire.ask({"id": 7, "method": "echo"}) == {"id": 7, "result": {}}
    assert daemon.asked == []


def test_the_id_comes_back_with_an_error(serving, path):
    with wired(path) as wire:
        assert wire.ask({"id": 7, "method": "statsu"})["id"] == 7
        assert wire.ask({"id": "x", "method": "rollback", "params": {"to": 3}})["id"] == "x"


def test_errors_of_verbs_are_told_with_their_code_and_defects_are_logged(serving, path, caplog):
    with wired(path) as wire:
        error = {"code": 7, "name": "StateError", "message": "there is no such state", "hint": "take another"}
        assert wire.ask({"id": 1, "method": "refuses"}) == {"id": 1, "error": error}
        assert not caplog.records
        for method, told in (("breaks", "RuntimeError: a defect"), ("unfit", "TypeError")):
            error = wire.ask({"id": 2, "method": method})["error"]
            assert (error["code"], error["name"]) == (1, "EdgeAdaptError")
            assert told in error["message"]
        assert 'raise RuntimeError("a\\ndefect")' in caplog.text
        assert wire.ask({"method": "echo"}) == {"id": None, "result": {}}


def test_who_changes_something_is_logged(serving, path, daemon, caplog):
    with caplog.at_level(logging.INFO, "edgeadapt"), wired(path) as wire:
        wire.ask({"method": "status"})
        wire.ask({"method": "rollback", "params": {"to": "start", "reason": "a\nb"}})
    assert [record.getMessage() for record in caplog.records] == [
        f'control: rollback by user {os.geteuid()}, process {os.getpid()}: {{"to":"start","reason":"a\\nb"}}'
    ]
    assert daemon.asked == [{"to": "start", "reason": "a\nb"}]


def test_a_request_that_is_too_long_ends_its_connection_only(serving, path):
    with wired(path) as wire:
        whole = b'{"method": "echo", "params": {"x": "' + b"x" * (control.LONGEST - 100) + b'"}}\n'
        assert len(wire.ask(whole)["result"]["x"]) == control.LONGEST - 100
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            wire.send(b"x" * 10**6)
        assert "longer than 65536 bytes" in wire.reply()["error"]["message"]
        assert wire.reply() is None
    assert alive(path)


# -------------------------------------------------------------------------------------------------------------------- streams


def test_many_values_and_the_end(serving, path):
    with wired(path) as wire:
        wire.send(b'{"id": 5, "method": "tail"}\n{"id": 6, "method": "many"}\n{"id": 7, "method": "breaks late"}\n{"id": 8, "method": "echo"}\n')
        assert [wire.reply() for _ in range(3)] == [{"id": 5, "event": {"number": number}} for number in range(3)]
        assert wire.reply() == {"id": 5, "result": None}
        assert wire.reply() == {"id": 6, "result": None}
        assert wire.reply() == {"id": 7, "event": 1}
        assert wire.reply()["error"]["name"] == "StateError"
        assert wire.reply()["id"] == 8


def test_a_stream_ends_when_who_asked_has_gone(serving, path, daemon):
    with wired(path) as wire:
        assert wire.ask({"id": 1, "method": "silent"}) == {"id": 1, "event": "begun"}
        assert not daemon.closed.wait(0.05)
        wire.wire.shutdown(socket.SHUT_WR)  # who only sends no more still listens
        assert not daemon.closed.wait(0.05)
    assert daemon.closed.wait(60)


def test_a_stream_ends_with_the_daemon(path, daemon):
    with wired_to(path, daemon) as wire:
        assert wire.ask({"id": 1, "method": "silent"}) == {"id": 1, "event": "begun"}
    assert daemon.closed.wait(60)


@contextmanager
def wired_to(path: Path, daemon: Daemon) -> Iterator[Wire]:
    """The daemon ends first."""
    serving = Control(path, daemon.verbs)
    serving.start()
    with wired(path) as wire:
        try:
            yield wire
        finally:
            serving.close(60)
            assert wire.reply() is None


def test_who_does_not_read_is_dropped_and_holds_nobody_up(path, daemon, caplog):
    caplog.set_level(logging.INFO, "edgeadapt")
    with Control(path, daemon.verbs, slow=0.05), wired(path) as slow:
        slow.send({"method": "much"})
        until = time.monotonic() + 60
        while not caplog.records:
            assert alive(path)
            assert time.monotonic() < until
        assert "a connection is ended that took no reply" in caplog.text
        with suppress(ValueError):  # the last line may be cut
            while slow.reply() is not None:
                pass
        assert slow.file.readline() == b""


# --------------------------------------------------------------------------------------------------------------------- limits


def test_there_are_only_so_many_connections(serving, path):
    wires = [Wire(path) for _ in range(control.CONNECTIONS)]
    try:
        for wire in wires:
            assert wire.ask({"method": "echo"}) == {"id": None, "result": {}}
        with pytest.raises(EdgeAdaptError, match="16 connections are open already"):
            Client(path).call("status")
        wires.pop().close()
        until = time.monotonic() + 60
        while True:  # it is seen a moment later that there is room
            try:
                assert alive(path)
                break
            except EdgeAdaptError:
                assert time.monotonic() < until
    finally:
        for wire in wires:
            wire.close()


def test_who_asks_nothing_is_dropped_also_when_it_sends_now_and_then(path, daemon):
    with Control(path, daemon.verbs, idle=0.1):
        with wired(path) as wire:
            assert wire.reply() is None
        with wired(path) as wire:
            assert wire.ask({"method": "echo"}) is not None
            thread = threading.Thread(target=wire.trickle)
            thread.start()
            assert wire.reply() is None
            thread.join(60)
            assert not thread.is_alive()
        assert alive(path)


def test_a_verb_that_takes_long_holds_up_nobody_else(serving, path, daemon):
    with wired(path) as wire:
        wire.send({"id": 1, "method": "waits"})
        assert alive(path)
        daemon.go.set()
        assert wire.reply() == {"id": 1, "result": True}


def test_an_end_waits_for_a_verb_that_is_at_work_but_not_for_ever(path, daemon):
    serving = Control(path, daemon.verbs)
    serving.start()
    with wired(path) as wire:
        wire.send({"id": 1, "method": "waits"})
        until = time.monotonic() + 60
        while not any(thread.name == "control connection" for thread in threading.enumerate()):
            assert time.monotonic() < until
        serving.close(0.01)
        assert not path.exists()
        daemon.go.set()
        assert wire.reply() in ({"id": 1, "result": True}, None)  # None: it had not been taken up
        assert wire.reply() is None
    serving.close()


# ------------------------------------------------------------------------------------------------------------------ bad bytes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(some.lists(some.binary(max_size=300), max_size=5), some.booleans())
@example([b'{"method": "echo"}\n' * 1000], True)
@example([b"\0" * 300, b"\n" * 300], False)
def test_random_bytes_stop_nothing(serving, path, parts, reads):
    with wired(path) as wire:
        try:
            for part in parts:
                wire.send(part)
            wire.wire.shutdown(socket.SHUT_WR)
            while reads and (reply := wire.reply()) is not None:
                assert reply.keys() in ({"id", "error"}, {"id", "result"})
        except OSError:
            pass
    assert alive(path)


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
METHODS = some.sampled_from(["status", "rollback", "label", "tail", "echo", "breaks", "many"])
PARAMS = JSON | some.dictionaries(some.sampled_from(["to", "reason", "frame", "label", "count", "events"]), JSON, max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(some.fixed_dictionaries({}, optional={"id": JSON, "method": METHODS | JSON, "params": PARAMS, "more": JSON}))
def test_every_request_is_answered(serving, path, daemon, request_):
    daemon.asked.clear()
    with wired(path) as wire:
        wire.send(request_)
        reply = wire.reply()
        while "event" in reply:
            reply = wire.reply()
        assert reply.keys() in ({"id", "error"}, {"id", "result"})
        assert wire.ask({"id": "next", "method": "echo"}) == {"id": "next", "result": {}}
    for params in daemon.asked:
        assert all(type(value) in (str, int) for value in params.values())


# ---------------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "given_", "found"),
    [
        ("status", None, {}),
        ("rollback", {"to": "start"}, {"to": "start"}),
        ("rollback", {"to": None, "reason": None}, {}),
        ("label", {"frame": 3, "label": "cat"}, {"frame": 3, "label": "cat"}),
        ("label", {"frame": "a.png", "label": 0}, {"frame": "a.png", "label": 0}),
        ("tail", {"events": False, "count": 1}, {"events": False, "count": 1}),
        ("of others", {"x": [1]}, {"x": [1]}),
    ],
)
def test_parameters_that_can_be(name, given_, found):
    assert verbs.checked(name, given_) == found


@pytest.mark.parametrize(
    ("name", "given_"),
    [
        ("status", {"x": 1}),
        ("status", 3),
        ("pause", {"reason": ""}),
        ("pause", {"reason": "x" * 201}),
        ("label", {"frame": -1, "label": 1}),
        ("label", {"frame": 1.0, "label": 1}),
        ("label", {"frame": 2**63, "label": 1}),
        ("label", {"frame": True, "label": 1}),
        ("label", {"label": None}),
        ("tail", {"count": 0}),
        ("tail", {"events": 1}),
        ("mark-good", {"reason": {"x": 1}}),
    ],
)
def test_parameters_that_cannot_be(name, given_):
    with pytest.raises(UsageError) as caught:
        verbs.checked(name, given_)
    assert caught.value.hint
    assert name in caught.value.message


def test_which_verbs_change_something():
    assert {name for name, verb in verbs.VERBS.items() if verb.writes} == {"pause", "resume", "rollback", "mark-good", "label", "reload"}
    assert [name for name, verb in verbs.VERBS.items() if verb.streams] == ["tail"]


# -------------------------------------------------------------------------------------------------------------- the socket


def test_it_has_its_rights_from_the_first_moment_and_is_removed_at_the_end(path, monkeypatch):
    seen = []
    rename, chmod = os.rename, os.chmod

    def watched(call: Callable[..., None]) -> Callable[..., None]:
        def watching(*given_: Any) -> None:
            with socket.socket(socket.AF_UNIX) as wire:
                reached = wire.connect_ex(str(given_[0])) == 0
            seen.append((call.__name__, oct(stat.S_IMODE(os.stat(given_[0]).st_mode)), reached))
            call(*given_)

        return watching

    monkeypatch.setattr(os, "rename", watched(rename))
    monkeypatch.setattr(os, "chmod", watched(chmod))
    before = os.umask(0)
    try:
        serving = Control(path, {})
        serving.start()
    finally:
        os.umask(before)
    assert seen == [("chmod", "0o600", False), ("rename", "0o660", True)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert os.listdir(path.parent) == [path.name]
    serving.close()
    assert os.listdir(path.parent) == []
    serving.close()
    serving.start()  # it may be made again
    serving.close()
    Control(path, {}).close()


def test_a_socket_that_a_dead_daemon_left_is_replaced_and_one_that_is_served_is_not(path, daemon):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Control(path, daemon.verbs):
        assert alive(path)
        with pytest.raises(UsageError, match="another daemon listens at"):
            Control(path, {}).start()
        assert alive(path)
    assert not path.exists()


def test_the_socket_of_a_daemon_that_has_no_time_is_not_replaced(path):
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        waiting = []
        try:
            for _ in range(10):  # more than wait for it to take them
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(str(path))
            with pytest.raises(UsageError, match="another daemon listens at"):
                Control(path, {}).start()
        finally:
            for wire in waiting:
                wire.close()


def test_what_is_no_socket_is_left_alone(path):
    path.write_text("a file")
    with pytest.raises(UsageError, match="is there and no socket"):
        Control(path, {}).start()
    assert path.read_text() == "a file"
    path.unlink()
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(UsageError, match="is there and no socket"):
        Control(path, {}).start()


def test_the_socket_of_another_that_took_its_place_is_not_removed(path, daemon):
    first = Control(path, daemon.verbs)
    first.start()
    path.unlink()
    with Control(path, daemon.verbs):
        first.close()
        assert alive(path)


@pytest.mark.parametrize("path_", ["", "x" * 108, "é" * 54, "a\0b"])
def test_a_path_that_no_socket_can_have(path_):
    for use in (lambda: Control(path_, {}).start(), lambda: listening.Listening(path_), lambda: Client(path_ or "\0")):
        with pytest.raises(UsageError, match="cannot be a socket's path"):
            use()


def test_the_longest_path_that_a_socket_can_have(tmp_path, daemon):
    path = Path(f"{tmp_path}/{'x' * (106 - len(os.fsencode(tmp_path)))}")
    assert len(os.fsencode(path)) == 107
    with Control(path, daemon.verbs):
        assert alive(path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be made: No such file or directory") as caught:
        Control(tmp_path / "no" / "s", {}).start()
    assert f"make the folder {tmp_path}/no" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be looked at: Not a directory"):
        Control(tmp_path / "file" / "s", {}).start()


def test_a_group(path, daemon, monkeypatch):
    import grp

    own = grp.getgrgid(os.getegid()).gr_name
    given_ = []
    chown = os.chown
    monkeypatch.setattr(os, "chown", lambda *asked: (given_.append(asked[1:]), chown(*asked)))
    with Control(path, daemon.verbs, own):
        assert given_ == [(-1, os.getegid())]
        assert alive(path)
    with pytest.raises(UsageError, match="there is no group no-such-group"):
        Control(path, {}, "no-such-group").start()

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(UsageError, match=f"cannot be given to the group {own}"):
        Control(path, {}, own).start()
    assert os.listdir(path.parent) == []


# ------------------------------------------------------------------------------------------------------------------- client


def test_the_client_asks_and_raises_what_the_daemon_refused(serving, path, daemon):
    client = Client(path)
    assert client.call("status") == {"version": 1, "shift": None, "name": "café\n"}
    assert client.call("rollback", to=None, reason="by hand") == {"text": "done"}
    assert daemon.asked == [{"reason": "by hand"}]
    with pytest.raises(StateError, match="there is no such state") as caught:
        client.call("refuses")
    assert caught.value.hint == "take another"
    with pytest.raises(UsageError, match="'statsu' is no verb"):
        client.call("statsu")
    with pytest.raises(UsageError, match="longer than 65536 bytes"):
        client.call("echo", x="x" * 10**6)


def test_the_client_hears_many_values(serving, path, daemon):
    client = Client(path)
    assert list(client.stream("tail")) == [{"number": number} for number in range(3)]
    assert list(client.stream("many")) == []
    with closing(client.stream("silent")) as values:
        assert next(values) == "begun"
    assert daemon.closed.wait(60)
    threading.Timer(0.2, daemon.go.set).start()
    assert list(Client(path, 0.05).stream("late")) == ["late"]  # what comes may be far between
    values = client.stream("breaks late")
    assert next(values) == 1
    with pytest.raises(StateError, match="it is gone"):
        next(values)
    with closing(client.stream("much")) as values:
        assert [len(str(value)) for value in islice(values, 100)] == [10_000] * 100


def test_a_daemon_that_ends_on_the_way(path, daemon):
    serving = Control(path, daemon.verbs)
    serving.start()
    values = Client(path).stream("silent")
    assert next(values) == "begun"
    threading.Timer(0.01, serving.close).start()
    with pytest.raises(EdgeAdaptError, match=r"the daemon at .* ended"):
        next(values)


def test_where_nobody_listens(path):
    for make in (lambda: None, lambda: dead(path), lambda: (path.unlink(), path.mkdir(), path.rmdir())):
        make()
        with pytest.raises(EdgeAdaptError, match="no daemon listens at") as caught:
            Client(path).call("status")
        assert "systemctl start edgeadapt" in caught.value.hint


def dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as wire:
        wire.bind(str(path))


@contextmanager
def nobody() -> Iterator[None]:
    """As another user, where we are root, who may everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_who_may_not_is_told_the_group(serving, path, monkeypatch):
    import grp

    own = grp.getgrgid(path.stat().st_gid).gr_name

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", denied)
        with pytest.raises(EdgeAdaptError, match="may not be asked by you") as caught:
            Client(path).call("status")
    assert caught.value.hint == f"join the group {own}: sudo usermod -aG {own} $USER, and log in again"
    path.chmod(0)
    with nobody(), pytest.raises(EdgeAdaptError, match="may not be asked by you") as caught:
        Client(path).call("status")
    assert caught.value.hint == "ask as the daemon's user, or as root"


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Something that listens and answers the same to everybody."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.bind(str(path))
        wire.listen()
        done = threading.Event()

        def serve() -> None:
            other, _ = wire.accept()
            with other:
                other.recv(1000)
                other.sendall(answer)
                if not answer:
                    done.wait(60)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        done.set()
        thread.join(60)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not answer as edgeadapt does"),
        (b"[1]\n", "does not answer as edgeadapt does"),
        (b"{}\n", "does not answer as edgeadapt does"),
        (b"[" * 100_000 + b"\n", "does not answer as edgeadapt does"),
        (b'{"error": 3}\n', "does not answer as edgeadapt does"),
        (b'{"result"', "ended before it answered"),
        (b'{"error": {"name": "os", "message": "x"}}\n', "^x$"),
        (b'{"error": {"name": "Sequence", "message": "x"}}\n', "^x$"),
        (b"", "did not answer within 0.05 s"),
    ],
)
def test_what_is_no_daemon(path, answer, told):
    with answering(path, answer), pytest.raises(EdgeAdaptError, match=told):
        Client(path, 0.05 if not answer else 60).call("status")


def test_the_socket_is_where_the_environment_says(serving, path, monkeypatch):
    monkeypatch.setenv("EDGEADAPT_CONTROL__SOCKET", str(path))
    assert Client().call("echo", x=1) == {"x": 1}
    monkeypatch.setenv("EDGEADAPT_CONTROL__SOCKET", "")
    assert str(Client().path) == "/run/edgeadapt/control.sock"


def test_a_client_loads_nothing_heavy():
    code = "import sys, edgeadapt.runtime.daemon.client; print(sorted({'numpy', 'onnxruntime', 'asyncio', 'ssl', 'http'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=child.ROOT, env=child.environment())
    assert run.stdout == "[]\n"
