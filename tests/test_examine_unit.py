"""What `edgeadapt doctor --config` says of the daemon's unit: whether it is the one for the configuration, what it hides, and who reads secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeadapt.runtime.daemon import systemd
from edgeadapt.runtime.daemon.examine import service, unit, who
from tests import fakemachine as fake
from tests.examined import PROGRAM, Board, begun

pytestmark = pytest.mark.device


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return begun(tmp_path, monkeypatch)


def test_without_systemd(board: Board) -> None:
    one = board.only("unit")
    assert (one.grade, "systemd does not run this system" in one.text) == ("warning", True)


def test_systemd_that_cannot_be_asked(board: Board) -> None:
    board.no_unit()
    board.told = None
    assert "cannot be asked" in board.only("unit").text


def test_no_unit_yet_is_looked_at_as_if_there_were_one(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.no_unit()
    one = board.only("unit")
    assert one.grade == "warning"
    assert "as if" not in one.text, "the state is to be elsewhere, so that whoever asks is meant"
    assert one.fix.startswith(f"edgeadapt unit --config {board.file} | sudo tee /etc/systemd/system/edgeadapt.service")
    board.text = ""
    one = board.only("unit")
    assert "as if there were the one that edgeadapt unit prints" in one.text
    shown = {found.subject: found for found in board.look().findings}
    assert shown["state folder"].grade == "fine"
    assert shown["daemon"].grade == "fine"
    (board.place / "token").write_text("x" * 32)
    (board.place / "token").chmod(0o600)
    token = f"http.token_file={board.place}/token"
    assert not [one for one in board.found("configuration", "http.enabled=true", token) if one.grade == "fault"], "systemd is to read it"
    assert "of a service is empty" in board.worst("source", "source.type=stdin").text
    monkeypatch.setattr(unit, "PRIVATE", (str(board.place),))
    assert "PrivateTmp" in board.worst("unit", "source.type=folder", f"source.path={board.place}/frames").text


@pytest.mark.parametrize(
    ("told", "grade", "text"),
    [
        ({"LoadState": "bad-setting"}, "fault", "cannot be loaded (bad-setting)"),
        ({"User": "no-such-user", "DynamicUser": "no"}, "fault", "runs as user no-such-user, whom there is not"),
        ({"NeedDaemonReload": "yes"}, "warning", "systemd has the old one"),
        ({"UnitFileState": "disabled"}, "warning", "does not start with the board"),
        ({"ActiveState": "failed", "Result": "oom-kill"}, "fault", "has failed (oom-kill)"),
        ({"ActiveState": "activating", "NRestarts": "7", "Result": "exit-code"}, "warning", "again and again, 7 times"),
        ({"ExecStart": "{ path=/no/prog ; argv[]=/no/prog serve ; }"}, "fault", "/no/prog, which is not there"),
        ({"ExecStart": "{ path=/bin/sh ; argv[]=/bin/sh serve ; }"}, "warning", "another installation"),
        ({"ExecStart": f"{{ argv[]={PROGRAM} serve --config /etc/x.toml ; }}"}, "warning", "with /etc/x.toml"),
    ],
)
def test_what_can_be_wrong_with_a_unit(board: Board, told: dict[str, str], grade: str, text: str) -> None:
    board.unit()
    assert board.told is not None
    board.told |= told
    said = [one for one in board.found("unit") if text in one.text]
    assert [one.grade for one in said] == [grade], board.found("unit")
    assert said[0].fix


def test_a_unit_that_was_printed_for_another_configuration(board: Board) -> None:
    board.unit()
    assert board.worst("unit").grade == "fine"
    old = (board.place / "edgeadapt.service").read_text(encoding="utf-8")
    board.text += "[memory]\nbudget = 134217728\n"
    board.unit(old)
    one = board.worst("unit")
    assert one.grade == "warning"
    assert "it lacks MemoryHigh=150994944, MemoryMax=167772160" in one.text
    board.unit(old.replace("MemorySwapMax=0", "MemorySwapMax=1G"))
    assert "and has MemorySwapMax=1G" in board.worst("unit").text
    board.unit()
    now = (board.place / "edgeadapt.service").read_text(encoding="utf-8")
    board.unit(now.replace("Nice=5\n", "Nice=5\nIOWeight=10\n"))
    assert board.worst("unit").text.endswith("for this configuration: it has IOWeight=10")


def test_what_the_service_does_not_see(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "PRIVATE", (str(board.place),))
    board.unit()
    assert hidden(board, "PrivateTmp") == ["source.path", "state.folder", "control.socket"]
    for name in ("ca", "key"):
        (board.place / name).write_text("x")
    more = f'[metrics]\ntextfile = "{board.place}/a.prom"\n[frames]\nfolder = "{board.place}/kept"\n[mqtt]\nhost = "x"\nca = "{board.place}/ca"\n'
    more += f'tls = true\n[bundle]\nkeys = ["{board.place}/key"]\n'
    board.text += more
    assert hidden(board, "PrivateTmp") == ["source.path", "state.folder", "control.socket", "metrics.textfile"], "the rest is not used"
    used = ["frames.keep=5", "mqtt.enabled=true", "bundle.require_signature=true"]
    everything = ["source.path", "state.folder", "bundle.keys", "mqtt.ca", "control.socket", "metrics.textfile", "frames.folder"]
    assert hidden(board, "PrivateTmp", *used) == everything
    board.unit(PrivateTmp="no")
    assert not hidden(board, "PrivateTmp", *used)


def test_homes_that_the_service_does_not_see(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "HOMES", (str(board.place),))
    board.unit(ProtectHome="read-only")
    assert not hidden(board, "ProtectHome")
    board.unit(ProtectHome="yes")
    assert hidden(board, "ProtectHome") == ["source.path", "state.folder", "control.socket"]


def hidden(board: Board, why: str, *settings: str) -> list[str]:
    """Keys of the paths that the service does not see."""
    return [one.text.split(",")[0] for one in board.found("unit", *settings) if one.grade == "fault" and why in one.text]


def test_a_limit_that_the_kernel_ignores(board: Board) -> None:
    board.unit(MemoryMax=str(160 << 20))
    assert board.only("memory limit").grade == "fine"
    fake.pi4(board.root)
    one = board.only("memory limit")
    assert (one.grade, "is ignored" in one.text) == ("warning", True)
    board.unit()
    assert not board.found("memory limit")


def test_watchdogs(board: Board) -> None:
    board.unit()
    assert board.only("watchdog").text == "a daemon that hangs for 30s is started again"
    fake.put(board.root, "dev/watchdog", "")
    assert "RuntimeWatchdogSec=" in board.only("watchdog").text
    board.manager = "RuntimeWatchdogUSec=15s\n"
    assert board.only("watchdog").text.endswith("a board that hangs, after 15s")
    board.unit(WatchdogUSec="0")
    assert board.only("watchdog").grade == "warning"


def test_secrets_are_read_by_systemd_where_there_is_a_unit(board: Board) -> None:
    (board.place / "token").write_text("x" * 32)
    (board.place / "token").chmod(0o600)
    (board.place / "key.pub").write_text("x")
    (board.place / "key.pub").chmod(0o600)
    board.text += f'[http]\nenabled = true\ntoken_file = "{board.place}/token"\n[bundle]\nkeys = ["{board.place}/key.pub"]\n'
    board.unit()
    said = [one.text for one in board.found("configuration") if one.grade == "fault"]
    assert len(said) == 1
    assert "key.pub is no file that this user can read" in said[0]
    board.file.chmod(0o600)
    board.text += "# changed\n"
    assert any("may not read it, so that nothing of it is done" in one.text for one in board.found("configuration"))


def test_a_token_with_which_there_is_no_http(board: Board) -> None:
    token = board.place / "token"
    token.write_text("short\n")
    token.chmod(0o640)
    board.text += f'[http]\nenabled = true\ntoken_file = "{token}"\n'

    def said() -> list[tuple[str, str]]:
        return [(one.grade, one.text.partition(f"{token} ")[2]) for one in board.found("configuration") if str(token) in one.text]

    assert [(grade, text.partition(":")[0]) for grade, text in said()] == [("fault", "holds no token")]
    token.write_text("x" * 32)
    assert not said()
    token.chmod(0o644)
    assert said() == [("fault", "holds a secret and can be read by everybody")]
    board.unit()
    assert said() == [("warning", "holds a secret and can be read by everybody")], "the daemon gets a copy"
    token.write_text("short\n")
    token.chmod(0o600)
    assert [(grade, text.partition(":")[0]) for grade, text in said()] == [("fault", "holds no token")]


def test_systemd_that_hands_no_secrets_over(board: Board) -> None:
    token = board.place / "token"
    token.write_text("x" * 32)
    token.chmod(0o600)
    board.text += f'[http]\nenabled = true\ntoken_file = "{token}"\n'
    board.unit()
    assert not [one for one in board.found("unit") if "secrets" in one.text]
    assert not [one for one in board.found("configuration") if one.grade == "fault"]
    board.version = 245
    board.unit()
    (one,) = [one for one in board.found("unit") if "systemd 245 hands no secrets over" in one.text]
    assert (one.grade, one.text.endswith(f"the daemon's user reads {token} itself, and may not")) == ("warning", True)
    assert "--user NAME" in one.fix
    assert [one.grade for one in board.found("configuration") if "is no file that this user can read" in one.text] == ["fault"]
    name = who.user_name(os.geteuid())
    board.unit(User=name, DynamicUser="no")
    assert [one.grade for one in board.found("unit") if "hands no secrets over" in one.text] == ["fine"]
    assert not [one for one in board.found("configuration") if one.grade == "fault"]
    board.version = 252
    assert any("it lacks LoadCredential=http-token" in one.text for one in board.found("unit")), "it was printed before"


def test_systemctl_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "systemctl"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert service.ask() is None
    program.write_text('#!/bin/sh\necho "LoadState=loaded"\necho "User=pi"\necho "asked=$*"\n')
    program.chmod(0o755)
    found = service.ask()
    assert found is not None
    assert found.loaded
    assert found.told["User"] == "pi"
    assert found.told["asked"].startswith("show edgeadapt.service --property=LoadState,")
    program.write_text("#!/bin/sh\necho no bus >&2\nexit 1\n")
    assert service.ask() is None
