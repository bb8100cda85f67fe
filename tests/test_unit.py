"""The unit that is printed: what it allows follows from the configuration, systemd takes it, and what it forbids is not needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeadapt.cli import unit as command
from edgeadapt.cli.main import main
from edgeadapt.errors import ConfigError, UsageError
from edgeadapt.runtime.daemon import config, systemd
from tests import jail
from tests.child import run_json

TOP = Path(__file__).resolve().parents[1]
PROGRAM = "/opt/edgeadapt/bin/edgeadapt"
SCORES = {"plain": 6, "user": 7, "everything": 18}
"""Tenths that `systemd-analyze security` may find at most, of 100; docs/systemd.md says them."""

EVERYTHING = """
name = "camera-3"
[memory]
budget = "128MiB"
[source]
type = "camera"
[http]
enabled = true
host = "0.0.0.0"
token_file = "/etc/edgeadapt/token"
[mqtt]
enabled = true
host = "broker.local"
username = "camera-3"
password_file = "/etc/edgeadapt/mqtt-password"
[metrics]
textfile = "/var/lib/prometheus/node-exporter/edgeadapt.prom"
[control]
group = "edgeadapt"
"""


def made(text: str = "", user: str | None = None, program: tuple[str, ...] = (PROGRAM,), file: str | None = None) -> str:
    settings = [line for line in text.split(";") if line]
    return systemd.unit(config.load(None, {}, settings).config, program, user, file)


def lines(text: str, key: str) -> list[str]:
    return re.findall(rf"(?m)^{key}=(.*)$", text)


@pytest.fixture
def everything(tmp_path: Path) -> str:
    path = tmp_path / "edgeadapt.toml"
    path.write_text(EVERYTHING, encoding="utf-8")
    return systemd.unit(config.load(path, {}).config, [PROGRAM], None, "/etc/edgeadapt/other.toml")


def test_by_itself_it_has_no_device_and_no_network():
    text = made()
    assert lines(text, "ExecStart") == [f"{PROGRAM} serve"]
    assert lines(text, "DynamicUser") == lines(text, "PrivateDevices") == lines(text, "PrivateNetwork") == ["yes"]
    assert lines(text, "RestrictAddressFamilies") == ["AF_UNIX"]
    assert lines(text, "IPAddressDeny") == ["any"]
    assert not lines(text, "MemoryMax")
    assert not lines(text, "DeviceAllow")
    assert not lines(text, "ReadWritePaths")
    assert "#:" not in text
    assert "\n\n\n" not in text


def test_how_it_is_watched():
    text = made()
    told = {"Type": "notify", "NotifyAccess": "main", "Restart": "always", "OOMPolicy": "continue"}
    told |= {"WatchdogSec": "30", "WatchdogSignal": "SIGABRT"}
    for key, value in told.items():
        assert lines(text, key) == [value]
    for key in ("StateDirectory", "RuntimeDirectory", "ConfigurationDirectory", "CacheDirectory"):
        assert lines(text, key) == ["edgeadapt"]


@pytest.mark.parametrize(("version", "steps"), [(None, None), (247, None), (253, None), (254, 14), (257, 14)])
def test_there_is_no_end_to_starts(version, steps):
    """Whatever `state.boots` is, the daemon gets through all that it can begin with, and a board that fails for ever does not wear its card."""
    text = systemd.unit(config.load(None, {}).config, [PROGRAM], version=version)
    assert re.search(r"(?ms)^\[Unit\]$.*^StartLimitIntervalSec=0$.*^\[Service\]$", text), "in any other section it is ignored"
    assert not lines(text, "StartLimitBurst")
    assert lines(text, "RestartSec") == ["15"]
    assert lines(text, "RestartSteps") == ([] if steps is None else [str(steps)])
    assert lines(text, "RestartMaxDelaySec") == ([] if steps is None else ["60"])
    if steps is not None:
        starts, boot = 86400 / 60, 32 * 2**10  # docs/state.md
        assert starts * boot < config.load(None, {}).config.state.bytes_per_day
        ladder = 5 * config.load(None, {}).config.state.boots
        assert sum(min(60, 15 * 4 ** (start / steps)) for start in range(ladder)) < 600, "seconds until all was tried"


def test_the_version_of_this_machine(monkeypatch, tmp_path):
    program = tmp_path / "systemctl"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert systemd.version() is None
    for told, version in (("systemd 257 (257.8-1~deb13u2)", 257), ("systemd 249", 249), ("elogind", None)):
        program.write_text(f"#!/bin/sh\necho '{told}'\necho +PAM\n", encoding="utf-8")
        program.chmod(0o755)
        assert systemd.version() == version


@pytest.mark.parametrize(("budget", "high", "most"), [("64MiB", 80, 96), ("128MiB", 144, 160), ("1GiB", 1152, 1280)])
def test_memory_lies_a_little_above_the_budget(budget, high, most):
    text = made(f"memory.budget={budget}")
    assert (lines(text, "MemoryHigh"), lines(text, "MemoryMax")) == ([str(high * 2**20)], [str(most * 2**20)])
    assert lines(text, "MemorySwapMax") == ["0"]


@pytest.mark.parametrize(
    ("settings", "groups", "devices"),
    [
        ("source.type=serial;source.url=/dev/serial/by-id/x", ["dialout"], [f"char-tty{kind} rw" for kind in ("USB", "ACM", "AMA", "S", "THS")]),
        ("source.type=camera", ["video"], ["char-video4linux rw", "char-media rw", "char-dma_heap rw"]),
        ("source.type=camera;source.device=rtsp://x/1", [], []),
        ("source.type=serial;source.url=socket://127.0.0.1:5", [], []),
        ("source.type=folder;source.path=/srv/x", [], []),
    ],
)
def test_devices_by_the_source(settings, groups, devices):
    text = made(settings)
    assert lines(text, "SupplementaryGroups") == groups
    assert lines(text, "DeviceAllow") == devices
    assert lines(text, "DevicePolicy") == (["closed"] if devices else [])
    assert lines(text, "PrivateDevices") == ([] if devices else ["yes"])


@pytest.mark.parametrize(
    ("settings", "network"),
    [
        ("", None),
        ("http.enabled=true", False),
        ("http.enabled=true;http.host=0.0.0.0", True),
        ("http.host=0.0.0.0", None),
        ("mqtt.enabled=true;mqtt.host=localhost", False),
        ("mqtt.enabled=true;mqtt.host=broker.local", True),
        ("mqtt.enabled=true;mqtt.host=localhost;http.enabled=true;http.host=0.0.0.0", True),
        ("source.type=camera;source.device=rtsp://x/1", True),
        ("source.type=serial;source.url=rfc2217://x:1", True),
    ],
)
def test_network_only_where_it_is_used(settings, network):
    text = made(settings)
    assert lines(text, "PrivateNetwork") == (["yes"] if network is None else [])
    assert lines(text, "RestrictAddressFamilies") == ["AF_UNIX" if network is None else "AF_UNIX AF_INET AF_INET6"]
    assert lines(text, "IPAddressDeny") == ([] if network else ["any"])
    assert lines(text, "IPAddressAllow") == (["localhost"] if network is False else [])
    assert ("network-online.target" in lines(text, "Wants")) == bool(network)


def test_secrets_are_handed_over_by_systemd(everything):
    assert lines(everything, "LoadCredential") == ["mqtt-password:/etc/edgeadapt/mqtt-password", "http-token:/etc/edgeadapt/token"]
    found = dict(line.split("=") for line in lines(everything, "Environment") if " " not in line)
    variables = {"EDGEADAPT_MQTT__PASSWORD_FILE": "mqtt-password", "EDGEADAPT_HTTP__TOKEN_FILE": "http-token"}
    assert found == {name: f"/run/credentials/edgeadapt.service/{file}" for name, file in variables.items()}
    loaded = config.load(None, found, ["mqtt.username=x"]).config
    assert str(loaded.mqtt.password_file) == found["EDGEADAPT_MQTT__PASSWORD_FILE"]
    assert str(loaded.http.token_file) == found["EDGEADAPT_HTTP__TOKEN_FILE"]


def test_secrets_that_systemd_does_not_hand_over(tmp_path):
    path = tmp_path / "edgeadapt.toml"
    path.write_text(EVERYTHING.replace("/etc/edgeadapt/token", "/home/pi/token"), encoding="utf-8")
    for version, handed in ((245, False), (246, False), (247, True), (None, True)):
        text = systemd.unit(config.load(path, {}).config, [PROGRAM], version=version)
        assert len(lines(text, "LoadCredential")) == (2 if handed else 0)
        assert ("/run/credentials" in text) == handed, "nothing is there otherwise"
        assert lines(text, "ProtectHome") == ["yes" if handed else "read-only"], "who reads it"


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ("state.folder=/srv/state", ["-/srv/state"]),
        ("state.folder=/var/lib/edgeadapt/x", []),
        ("control.socket=/srv/x/a.sock", ["-/srv/x"]),
        ("frames.folder=/srv/frames", []),
        ("frames.folder=/srv/frames;frames.keep=5", ["-/srv/frames"]),
        ("source.type=folder;source.path=/srv/in", []),
        ("source.type=folder;source.path=/srv/in%1;source.remove=true", ["-/srv/in%%1"]),
        ("metrics.textfile=/srv/m/a.prom", ["-/srv/m"]),
    ],
)
def test_only_these_paths_can_be_written(settings, paths):
    assert lines(made(settings), "ReadWritePaths") == paths


def test_homes_are_closed_unless_something_is_there():
    assert lines(made(), "ProtectHome") == ["yes"]
    for text in (made("bundle.path=/home/pi/a.edgeadapt"), made(program=("/home/pi/.venv/bin/edgeadapt",)), made(file="/root/a.toml")):
        assert lines(text, "ProtectHome") == ["read-only"]
    assert lines(made("bundle.path=/homes/a.edgeadapt"), "ProtectHome") == ["yes"]


def test_users_and_groups(everything):
    text = made(user="camera")
    assert lines(text, "User") == ["camera"]
    assert not lines(text, "DynamicUser")
    assert not lines(text, "RemoveIPC"), "what else they run shares memory too"
    assert lines(everything, "RemoveIPC") == ["yes"]
    for unit in (text, everything):
        assert lines(unit, "StateDirectoryMode") == lines(unit, "CacheDirectoryMode") == ["0750"]
        assert not lines(unit, "RuntimeDirectoryMode"), "members of the control group go through it"
    assert lines(everything, "SupplementaryGroups") == ["video edgeadapt"]
    assert "@chown" in lines(everything, "SystemCallFilter")
    assert "@chown" not in lines(text, "SystemCallFilter")
    assert lines(everything, "UMask") == ["0022"]
    assert lines(text, "UMask") == ["0027"]


def test_paths_are_quoted_as_systemd_reads_them():
    text = made(program=("/opt/a b/edge$adapt",), file="/etc/50%.toml")
    assert lines(text, "ExecStart") == ['"/opt/a b/edge$$adapt" serve --config /etc/50%%.toml']


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"program": ("edgeadapt",)}, "absolute path"),
        ({"program": ()}, "absolute path"),
        ({"user": "a b"}, "no name of a user"),
        ({"file": "/a\nb"}, "cannot stand in a unit"),
        ({"text": "state.folder=/a b"}, "cannot stand in a unit"),
    ],
)
def test_what_cannot_stand_in_a_unit(more, told):
    with pytest.raises(UsageError, match=told):
        made(**more)


def test_the_command_prints_it(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.toml"
    path.write_text('name = "x"\n[memory]\nbudget = "128MiB"\n', encoding="utf-8")
    assert main(["unit", "--config", str(path), "--executable", PROGRAM, "--user", "pi"]) == 0
    text = capsys.readouterr().out
    assert lines(text, "ExecStart") == [f"{PROGRAM} serve --config {path}"]
    assert lines(text, "User") == ["pi"]
    assert main(["unit", "--config", str(path), "--set", "name=y"]) == UsageError.exit_code
    path.write_text("nme = 1\n", encoding="utf-8")
    assert main(["unit", "--config", str(path)]) == ConfigError.exit_code
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert command.program() == [str(tmp_path / "python"), "-m", "edgeadapt"]
    (tmp_path / "edgeadapt").touch(0o755)
    assert command.program() == [str(tmp_path / "edgeadapt")]


@pytest.mark.parametrize(("version", "told"), [(246, True), (247, False), (None, False)])
def test_the_command_says_whose_secrets_an_old_systemd_leaves_to_the_user(tmp_path, capsys, monkeypatch, version, told):
    monkeypatch.setattr(systemd, "version", lambda: version)
    path = tmp_path / "a.toml"
    path.write_text('[http]\nenabled = true\ntoken_file = "/etc/edgeadapt/token"\n', encoding="utf-8")
    assert main(["unit", "--config", str(path), "--executable", PROGRAM]) == 0
    printed = capsys.readouterr()
    assert lines(printed.out, "LoadCredential") == ([] if told else ["http-token:/etc/edgeadapt/token"])
    assert ("systemd 246 hands no secrets over" in printed.err and printed.err.endswith("read /etc/edgeadapt/token\n")) == told


# ------------------------------------------------------------------------------------------------------------- what systemd says


def analyze(*arguments: str) -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.fail("needs systemd-analyze: sudo apt-get install systemd")
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def units(everything: str) -> dict[str, str]:
    plain = {"plain": made(program=(sys.executable,)), "user": made(user="games", program=(sys.executable,))}
    return {**plain, "everything": everything.replace(PROGRAM, sys.executable)}


def test_systemd_takes_it_and_finds_it_closed(tmp_path, everything):
    document = (TOP / "docs" / "systemd.md").read_text(encoding="utf-8")
    for name, text in units(everything).items():
        path = tmp_path / name / systemd.NAME
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        told = analyze("verify", "--man=no", str(path))
        assert systemd.NAME not in told, told
        analyze("security", "--offline=true", f"--threshold={SCORES[name]}", str(path))
        assert f"{SCORES[name] / 10:.1f}" in document


def expanded(name: str) -> set[str]:
    found: set[str] = set()
    for line in analyze("syscall-filter", name).splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= expanded(word) if word.startswith("@") else {word}
    return found


def test_a_bundle_predicts_and_adapts_with_only_what_is_allowed(tmp_path):
    if not jail.numbers():
        pytest.fail("needs the kernel's headers: sudo apt-get install linux-libc-dev")
    text = made()
    assert lines(text, "MemoryDenyWriteExecute") == ["yes"]
    allowed: set[str] = set()
    for line in lines(text, "SystemCallFilter"):
        takes = not line.startswith("~")
        for word in line.lstrip("~").split():
            calls = expanded(word) if word.startswith("@") else {word}
            allowed = allowed | calls if takes else allowed - calls
    assert "setgroups" not in allowed
    assert "openat" in allowed
    (tmp_path / "calls").write_text(" ".join(sorted(allowed)), encoding="utf-8")
    found = run_json([sys.executable, "-m", "tests.jail", str(tmp_path / "calls")])
    assert found == {"memory": True, "privileged": True, "priority": True, "finite": True, "steps": 1}
