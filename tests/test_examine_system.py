"""What `edgeadapt doctor --config` says of what is around a daemon: devices, libraries, the clock, users, and a daemon that runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeadapt.runtime.daemon import config
from edgeadapt.runtime.daemon.examine import Found, clock, libraries, who
from tests import fakemachine as fake
from tests.examined import Board, begun

pytestmark = pytest.mark.device


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return begun(tmp_path, monkeypatch)


# -------------------------------------------------------------------------------------------------------------------------- devices


@pytest.fixture
def line() -> Iterator[Path]:
    """A real serial line, of a pair of terminals."""
    ends = os.openpty()
    path = Path(os.ttyname(ends[1]))
    try:
        yield path
    finally:
        for end in ends:
            os.close(end)


def serial(board: Board, path: Path | str) -> None:
    text = board.text.replace('type = "folder"', 'type = "serial"').replace(f'path = "{board.place}/frames"', f'url = "{path}"')
    board.text = text


def test_a_serial_line_and_its_group(board: Board, line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serial(board, line)
    monkeypatch.setattr(os, "open", lambda *given, **named: pytest.fail(f"opened {given[0]}") if given[0] == str(line) else real(*given, **named))
    line.chmod(0o660)
    assert board.worst("source").grade == "fine"
    board.unit()
    one = board.worst("source")
    assert one.grade == "fault"
    assert "may not open it" in one.text
    group = line.stat().st_gid
    own = who.group_name(group)
    if group:
        assert own in one.fix
        board.unit(SupplementaryGroups=own)
        assert board.worst("source").grade == "fine"
    line.chmod(0o600)
    assert "udev" in board.worst("source").fix


real = os.open


def test_a_device_of_the_group_dialout_is_opened_by_a_unit_for_it(board: Board, line: Path) -> None:
    """As root it can be made so; others see the same with the group that terminals have."""
    import grp

    group = grp.getgrnam("dialout").gr_gid if os.geteuid() == 0 else line.stat().st_gid
    if os.geteuid() == 0:
        os.chown(line, 0, group)
    line.chmod(0o660)
    serial(board, line)
    board.unit()
    one = board.worst("source")
    assert one.grade == "fault"
    if os.geteuid() == 0:
        assert "print the unit again, which then asks for the group dialout" in one.fix
    board.unit(SupplementaryGroups=who.group_name(group))
    assert board.worst("source").grade == "fine"


def test_a_serial_line_that_is_the_console(board: Board, line: Path) -> None:
    serial(board, line)
    name = os.path.basename(line)
    fake.put(board.root, "proc/cmdline", f"console={name},115200 root=/dev/x\n")
    assert "is the system's console too" in board.worst("source").text
    fake.put(board.root, "proc/cmdline", f"console={name}0 root=/dev/x\n")
    assert board.worst("source").grade == "fine"
    fake.put(board.root, "proc/consoles", f"{name}   -W- (EC p a)  4:64\n")
    assert "is the system's console too" in board.worst("source").text


def test_devices_that_are_not_there_or_are_none(board: Board) -> None:
    serial(board, "/dev/serial/by-id/none")
    one = board.only("source")
    assert (one.grade, "is not there now" in one.text) == ("warning", True)
    (board.place / "x").write_bytes(b"")
    board.text = board.text.replace("/dev/serial/by-id/none", str(board.place / "x"))
    assert (board.only("source").grade, "is no device" in board.only("source").text) == ("fault", True)
    board.text = board.text.replace(str(board.place / "x"), "socket://127.0.0.1:9")
    assert board.only("source").grade == "fine"


def test_other_sources(board: Board) -> None:
    base = board.text.partition("[source]")[0] + board.text.partition("frames\"\n")[2]

    def source(text: str) -> Found:
        board.text = f"{base}[source]\n{text}\n"
        return board.worst("source")

    assert source('type = "none"').grade == "warning"
    assert source('type = "camera"\ndevice = 250').grade == "warning"
    assert source('type = "camera"\ndevice = "rtsp://x/1"').grade == "fine"
    assert "no ribbon camera" in source('type = "camera"\ndevice = "picamera2:"').text
    assert source(f'type = "camera"\ndevice = "{board.bundle}"').text.endswith("a file with a video")
    assert source(f'type = "folder"\npath = "{board.place}/none"').grade == "warning"
    assert source(f'type = "replay"\npath = "{board.place}/none"').grade == "fault"
    assert source(f'type = "replay"\npath = "{board.bundle}"').grade == "fine"
    assert source('type = "stdin"').grade == "fine"
    board.unit()
    assert "standard input of a service is empty" in board.worst("source").text
    closed = board.place / "closed"
    closed.mkdir(0o700)
    assert source(f'type = "folder"\npath = "{closed}"').grade == "fault"
    closed.chmod(0o755)
    assert source(f'type = "folder"\npath = "{closed}"').grade == "fine"
    assert "may not remove files" in source(f'type = "folder"\npath = "{closed}"\nremove = true').text


# ------------------------------------------------------------------------------------------------------------------------ libraries


@pytest.mark.parametrize(
    ("module", "settings", "grade"),
    [
        ("cv2", ["source.type=camera"], "fault"),
        ("picamera2", ["source.type=camera", "source.device=picamera2:"], "fault"),
        ("serial", ["source.type=serial", "source.url=/dev/ttyACM0"], "fault"),
        ("PIL", ["source.type=stdin"], "fault"),
        ("PIL", [], "warning"),
        ("PIL", ["source.type=stdin", "source.format=npy"], ""),
        ("paho.mqtt.enums", ["mqtt.enabled=true", "mqtt.host=x"], "fault"),
        ("paho.mqtt.enums", [], ""),
        ("cryptography", ["bundle.require_signature=true", "bundle.keys=['/k.pub']"], "fault"),
        ("cryptography", [], ""),
    ],
)
def test_libraries_that_are_missing_are_told_where_they_are_needed(
    board: Board, monkeypatch: pytest.MonkeyPatch, module: str, settings: list[str], grade: str
) -> None:
    if any(setting.startswith("source.") for setting in settings):
        board.text = board.text.replace('[source]\ntype = "folder"\n', "").replace(f'path = "{board.place}/frames"\n', "")
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == module else SimpleNamespace())
    said = [one for one in board.found("libraries", *settings) if one.grade != "fine"]
    assert [one.grade for one in said] == ([grade] if grade else [])
    assert all(one.fix for one in said)


def test_paho_of_version_1_is_not_what_is_needed(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        if "." in name and not present:
            raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")
        return None if name == "paho.mqtt.enums" else SimpleNamespace()

    monkeypatch.setattr(libraries, "find_spec", find_spec)
    for present in (True, False):
        (one,) = [one for one in board.found("libraries", "mqtt.enabled=true", "mqtt.host=x") if one.grade != "fine"]
        assert (one.grade, one.text.startswith("paho-mqtt 2 is not installed")) == ("fault", True)


def test_an_image_that_is_made_smaller_needs_pillow(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    manifest: Any = SimpleNamespace(input=SimpleNamespace(resize=(8, 8)))
    site: Any = SimpleNamespace(config=config.load(board.file, {}, ["http.enabled=true"]).config)
    assert [one.grade for one in libraries.look(site, manifest)] == ["fault"]


# ------------------------------------------------------------------------------------------------------------------------- the clock


def test_the_clock_is_told_only_where_it_matters(board: Board) -> None:
    board.synchronised = False
    assert not board.found("clock")
    assert not board.found("clock", "mqtt.enabled=true", "mqtt.host=x")
    tls = ["mqtt.enabled=true", "mqtt.host=x", "mqtt.tls=true"]
    assert board.only("clock", *tls).grade == "warning"
    board.synchronised = None
    assert not board.found("clock", *tls)
    board.synchronised = True
    assert board.only("clock", *tls).grade == "fine"


def test_the_clock_of_this_machine_is_asked() -> None:
    assert clock.synchronised() in (True, False, None)


# ----------------------------------------------------------------------------------------------------------- a daemon that runs


@contextmanager
def listening(path: Path, answer: Mapping[str, Any]) -> Iterator[None]:
    """What answers one request as a daemon does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            wire, _ = server.accept()
            with wire:
                wire.recv(4096)
                wire.sendall(json.dumps({"id": 1, **answer}).encode() + b"\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(10)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"mode": "serving"}, {"fine": "runs for 2 h: serving"}),
        ({"mode": "starting", "reason": "it is starting", "source": {"live": False, "complaint": "it is starting"}}, {"fine": "starting"}),
        ({"mode": "safe", "reason": "there is no model"}, {"warning": "does less than was asked for: there is no model"}),
        ({"mode": "serving", "state": {"degraded": "the disk is full"}}, {"fine": "serving", "warning": "writes nothing to the disk now"}),
        ({"mode": "serving", "source": {"live": False, "complaint": "unplugged"}}, {"fine": "serving", "warning": "no frames now: unplugged"}),
        ({"mode": "serving", "source": {"live": True, "complaint": "of old"}}, {"fine": "serving"}),
        ({"mode": "serving", "interfaces": {"http": "", "mqtt": "refused"}}, {"fine": "serving", "warning": "is not there over mqtt: refused"}),
    ],
)
def test_what_a_daemon_says(tmp_path_factory: pytest.TempPathFactory, board: Board, status: dict[str, Any], told: dict[str, str]) -> None:
    with listening(board.place / "control.sock", {"result": {"uptime_s": 7200, **status}}):
        said = {one.grade: one.text for one in board.found("daemon")}
    assert set(said) == set(told)
    assert all(text in said[grade] for grade, text in told.items())


def test_no_daemon(board: Board) -> None:
    assert "none runs now" in board.only("daemon").text
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(board.place / "control.sock"))
    assert "none runs now" in board.only("daemon").text, "what a daemon that was killed has left"
    board.unit(ActiveState="active")
    assert board.only("daemon").grade == "warning"
    with listening(board.place / "other.sock", {"error": {"name": "UsageError", "message": "no", "hint": "x"}}):
        board.text = board.text.replace("control.sock", "other.sock")
        assert (board.only("daemon").grade, board.only("daemon").text) != ("fine", "")


def test_a_socket_that_cannot_be_made(board: Board) -> None:
    board.place.chmod(0o755)
    board.unit()
    one = board.only("daemon")
    assert (one.grade, "it ends as soon as it starts" in one.text) == ("fault", True)


# ------------------------------------------------------------------------------------------------------------------------ users


def test_what_others_may(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    inner = tmp_path / "inner"
    inner.mkdir()
    file = inner / "file"
    file.write_bytes(b"")
    uid, gid = file.stat().st_uid, file.stat().st_gid
    owner, member, stranger = who.Who("o", uid, frozenset()), who.Who("m", None, frozenset({gid})), who.Who("s", uid + 1, frozenset({gid + 1}))
    cases: list[tuple[int, who.Who, int, bool]] = [
        (0o640, owner, os.R_OK | os.W_OK, True),
        (0o640, member, os.R_OK, True),
        (0o640, member, os.W_OK, False),
        (0o640, stranger, os.R_OK, False),
        (0o604, stranger, os.R_OK, True),
        (0o604, member, os.R_OK, False),
        (0o077, owner, os.R_OK, False),
    ]
    for mode, someone, wanted, may in cases:
        file.chmod(mode)
        assert someone.may(file, wanted) is may, (oct(mode), someone)
    file.chmod(0o666)
    inner.chmod(0o700)
    assert stranger.may(file, os.R_OK) is False, "on the way"
    assert owner.may(file, os.R_OK) is True
    assert owner.may(inner / "none", os.R_OK) is False
    assert who.ourselves().may(file, os.R_OK) is True
    root = who.named("root", [])
    assert root is not None
    assert root.uid == 0
    assert who.named("no-such-user", []) is None


def test_what_may_not_be_seen_is_not_known(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.install()
    stat_of = os.stat

    def forbidden(path: Any, *given: Any, **named: Any) -> Any:
        if str(path) == str(board.state):
            raise PermissionError(13, "Permission denied", str(path))
        return stat_of(path, *given, **named)

    monkeypatch.setattr(os, "stat", forbidden)
    assert who.Who("s", 54321, frozenset()).may(board.state, os.R_OK) is None
    one = next(iter(board.found("state folder")))
    assert (one.grade, one.fix) == ("warning", "sudo edgeadapt doctor")
    monkeypatch.setattr(os, "stat", stat_of)
    access, hidden = os.access, ""
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(hidden) and access(path, mode))
    for hidden in ("/pointer.a", "/model.edgeadapt"):
        board.told = None
        assert not any("you may not" in one.text for one in board.found("bundle")), "it is we who serve"
        board.unit(User="root", DynamicUser="no")
        assert (board.only("bundle").grade, board.only("bundle").fix) == ("warning", "sudo edgeadapt doctor"), hidden
    hidden = "/none"
    shutil.rmtree(board.state / "bundles")
    assert board.only("bundle").grade == "fault", "what is gone is not what may not be seen"
