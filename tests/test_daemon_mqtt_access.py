"""Passwords and certificates at a real broker, and what is not even tried."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon import config
from tests.broker import Broker, Device, Other, brokers, others, until

ROOT, TOP = "edgeadapt/camera-3", Path(__file__).resolve().parents[1]
ANNOUNCED = "homeassistant/device/edgeadapt-camera-3/config"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    with brokers(tmp_path) as made:
        yield made


@pytest.fixture
def meet() -> Iterator[Callable[..., Other]]:
    with others() as met:
        yield met


def passwords(folder: Path) -> Path:
    path = folder / "passwords"
    path.write_text("device:right\nother:also\n", encoding="utf-8")
    path.chmod(0o600)
    subprocess.run(["mosquitto_passwd", "-U", str(path)], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


def secret(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_right_and_wrong_passwords(make, meet, tmp_path, caplog):
    broker = make("allow_anonymous false", f"password_file {passwords(tmp_path)}")
    device, other = Device(), meet(broker.port, f"{ROOT}/#", user=("other", "also"))
    with device.mqtt(broker.port, username="device", password_file=secret(tmp_path, "wrong")) as mqtt:
        until(lambda: "refuses" in mqtt.complaint, "a refusal")
        until(lambda: mqtt._link._fails >= 3, "more attempts")
        assert not mqtt.connected
    assert caplog.text.count("refuses") == 1
    with device.mqtt(broker.port, username="device", password_file=secret(tmp_path, "right\n")) as mqtt:
        until(lambda: mqtt.connected)
        assert other.wait(f"{ROOT}/state") == "online"


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [("x", 0o604, "can be read by everybody"), ("", 0o600, "is empty"), ("\n", 0o600, "is empty"), ("x" * 70000, 0o600, "is too long")],
)
def test_files_with_passwords_that_are_refused(tmp_path, text, mode, told):
    with pytest.raises(UsageError, match=told):
        Device().mqtt(1, username="device", password_file=secret(tmp_path, text, mode))


def test_a_password_that_cannot_be_read_and_hosts_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        Device().mqtt(1, username="device", password_file=tmp_path / "missing")
    with pytest.raises(UsageError, match="is no name of a host"):
        Device().mqtt(1, host="a..b")
    with pytest.raises(UsageError, match=r"mqtt\.ca"):
        Device().mqtt(1, tls=True, ca=tmp_path / "missing")
    with pytest.raises(UsageError, match=r"mqtt\.ca"):
        Device().mqtt(1, tls=True, ca=secret(tmp_path, "no certificate"))


def test_a_password_without_tls_is_warned_of(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[mqtt]\nenabled = true\nhost = "broker.local"\nusername = "x"\npassword_file = "/x"\n', encoding="utf-8")
    assert [one.key for one in config.load(path, {}).warnings] == ["mqtt.password_file"]


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command, *more], check=True, capture_output=True)
    return cert, key


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho leaves the wire of a failed handshake to the collector
def test_tls_with_the_right_and_the_wrong_certificate(make, tmp_path):
    cert, key = certificate(tmp_path, "broker")
    stranger, _ = certificate(tmp_path, "stranger")
    broker, device = make("allow_anonymous true", f"certfile {cert}", f"keyfile {key}"), Device()
    with device.mqtt(broker.port, tls=True, ca=cert) as mqtt:
        until(lambda: mqtt.connected)
        assert mqtt._link._client.socket().cipher()
    with device.mqtt(broker.port, tls=True, ca=stranger) as mqtt:
        until(lambda: "certificate" in mqtt.complaint.lower(), "a complaint")
        assert not mqtt.connected


def test_without_paho_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    with pytest.raises(UsageError, match="needs paho-mqtt") as caught:
        Device().mqtt(1)
    assert caught.value.hint == "pip install edgeadapt[mqtt]"


def test_paho_is_loaded_only_when_it_is_used():
    code = "import sys, edgeadapt.runtime.daemon.mqtt; print([name for name in sys.modules if name.partition('.')[0] == 'paho'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TOP)
    assert run.stdout.strip() == "[]"
