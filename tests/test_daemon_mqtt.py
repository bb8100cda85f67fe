"""The daemon at a real broker: what is published, what is asked, and what happens when either of them goes away."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon import link
from edgeadapt.runtime.daemon.config import MqttConfig
from edgeadapt.runtime.daemon.mqtt import Mqtt, health_of
from edgeadapt.runtime.daemon.requests import LONGEST
from edgeadapt.runtime.daemon.verbs import VERBS
from tests.broker import Broker, Device, Other, brokers, others, until
from tests.child import run_json

ROOT, TOP = "edgeadapt/camera-3", Path(__file__).resolve().parents[1]
ANNOUNCED = "homeassistant/device/edgeadapt-camera-3/config"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """For tests that leave nothing retained behind but state and info."""
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    with brokers(tmp_path) as made:
        yield made


@pytest.fixture
def meet() -> Iterator[Callable[..., Other]]:
    with others() as met:
        yield met


def killed(mqtt: Mqtt) -> None:
    """As if the machine had lost its power: the wire ends without a word."""
    wire = mqtt._link._client.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    mqtt._link._client.reconnect_delay_set(3600, 3600)
    mqtt._link._pause = lambda: None
    wire.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------------------------------------------- what is told


def test_what_a_device_tells(shared, meet):
    device, other = Device(), meet(shared.port, f"{ROOT}/#")
    with device.mqtt(shared.port) as mqtt:
        assert json.loads(other.wait(f"{ROOT}/info")) == {
            "version": "0.1.0",
            "bundle": "model.edgeadapt",
            "digest": "ab" * 32,
            "method": "tent",
            "classes": ["cat", "dog"],
        }
        health = json.loads(other.wait(f"{ROOT}/health"))
        assert health == {**health_of(device.status), "mqtt": {"requests": 0, "dropped": 0, "connections": 1}}
        assert health["memory"] == 90_000_000
        assert health["state"] == "watching"
        assert health["shift"] == 0.25
        assert mqtt.connected
        assert mqtt.complaint == ""
        told = device.events.tell("rolled back", "its predictions narrow", {"window": 4})
        assert json.loads(other.wait(f"{ROOT}/event")) == told.plain()
        device.events.pass_on("prediction", "cat", {"label": 0})
        assert json.loads(other.wait(f"{ROOT}/prediction"))["facts"] == {"label": 0}
        late = meet(shared.port, f"{ROOT}/#")
        late.wait(f"{ROOT}/info")
        assert {topic for topic, _, retained in late.heard if retained} == {f"{ROOT}/state", f"{ROOT}/info"}
        assert late.wait(f"{ROOT}/state") == "online"
    assert late.wait(f"{ROOT}/state", 2) == "stopped"
    assert not mqtt.connected


def test_a_device_that_is_gone_is_offline(shared, meet):
    device, other = Device(), meet(shared.port, f"{ROOT}/state")
    mqtt = device.mqtt(shared.port)
    mqtt.start()
    until(lambda: other.payloads(f"{ROOT}/state")[-1:] == ["online"])
    killed(mqtt)
    until(lambda: other.payloads(f"{ROOT}/state")[-1:] == ["offline"])
    mqtt.close()


def test_it_comes_back_after_the_broker_did(make, meet):
    device, broker = Device(), make()
    with device.mqtt(broker.port) as mqtt:
        meet(broker.port, f"{ROOT}/#").wait(f"{ROOT}/info")
        until(lambda: mqtt.connected)
        broker.stop()
        until(lambda: not mqtt.connected)
        assert mqtt.complaint
        for number in range(3):
            device.events.tell("while away", f"event {number}")
            device.events.pass_on("prediction", "old", {})
        time.sleep(0.1)
        broker.start()
        other = meet(broker.port, f"{ROOT}/#")
        other.wait(f"{ROOT}/info")
        assert other.wait(f"{ROOT}/state") == "online"
        if len(other.payloads(f"{ROOT}/event")) == 3:  # it may have been here before the other
            assert [json.loads(text)["text"] for text in other.payloads(f"{ROOT}/event")] == ["event 0", "event 1", "event 2"]
        assert other.payloads(f"{ROOT}/prediction") == []
        assert other.ask(ROOT, "pause", {"reason": "back"})["status"] == "ok"
        paused = until(lambda: [text for text in other.payloads(f"{ROOT}/health") if '"paused":true' in text])
        assert json.loads(paused[-1])["mqtt"]["connections"] == 2


def test_events_wait_for_the_broker_and_the_oldest_are_lost(shared, meet, monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.daemon.mqtt.KEPT", 5)
    device, other = Device(), meet(shared.port, f"{ROOT}/event")
    mqtt = device.mqtt(shared.port, every=3600)
    with mqtt:
        for number in range(8):
            mqtt.turn() if number == 4 else None
            device.events.tell("x", f"event {number}")
        mqtt._link.connected, before = False, mqtt._link.connected
        mqtt.turn()
        mqtt._link.connected = before
        until(lambda: mqtt.connected)
        mqtt.turn()
        other.wait(f"{ROOT}/event", 5)
    texts = [json.loads(text)["text"] for text in other.payloads(f"{ROOT}/event")]
    assert texts[-5:] == [f"event {number}" for number in range(3, 8)]
    assert mqtt.dropped == 8 - len(texts)


def test_the_newest_prediction_wins_and_there_are_few(shared, meet):
    device, other = Device(), meet(shared.port, f"{ROOT}/#")
    now = [100.0]
    mqtt = Mqtt(
        MqttConfig(enabled=True, host="127.0.0.1", port=shared.port),
        "camera-3",
        device.verbs,
        device.events,
        lambda: device.status,
        every=3600,
        clock=lambda: now[0],
    )
    with mqtt:
        until(lambda: mqtt.connected)
        mqtt.turn()
        for number in range(100):
            device.events.pass_on("prediction", str(number))
            mqtt.turn()
        assert json.loads(other.wait(f"{ROOT}/prediction"))["text"] == "0"
        until(lambda: not mqtt._link.waits(f"{ROOT}/prediction"))
        mqtt.turn()
        device.events.tell("begin", "now")
        mqtt.turn()
        other.wait(f"{ROOT}/event")
        assert len(other.payloads(f"{ROOT}/prediction")) == 1
        now[0] += 0.3
        until(lambda: not mqtt._link.waits(f"{ROOT}/prediction"))
        mqtt.turn()
        assert json.loads(other.wait(f"{ROOT}/prediction", 2))["text"] == "99"
        device.events.tell("end", "now")
        mqtt.turn()
        other.wait(f"{ROOT}/event", 2)
        assert len(other.payloads(f"{ROOT}/prediction")) == 2


def test_predictions_can_be_kept_back(shared, meet):
    device, other = Device(), meet(shared.port, f"{ROOT}/#")
    with device.mqtt(shared.port, predictions=False) as mqtt:
        until(lambda: mqtt.connected)
        for _ in range(3):
            device.events.pass_on("prediction", "cat")
        device.events.tell("end", "now")
        other.wait(f"{ROOT}/event")
    assert other.payloads(f"{ROOT}/prediction") == []


def test_health_comes_at_changes_and_every_minute(shared, meet):
    device, other, now = Device(), meet(shared.port, f"{ROOT}/health"), [100.0]
    plain = MqttConfig(enabled=True, host="127.0.0.1", port=shared.port)
    mqtt = Mqtt(plain, "camera-3", device.verbs, device.events, lambda: device.status, every=3600, clock=lambda: now[0])

    def turns(count: int) -> None:
        for _ in range(3):
            mqtt.turn()
        other.wait(f"{ROOT}/health", count)
        until(lambda: not mqtt._link.waits(f"{ROOT}/health"))
        assert len(other.payloads(f"{ROOT}/health")) == count

    with mqtt:
        until(lambda: mqtt.connected)
        turns(1)
        now[0] += 3
        turns(1)
        device.status["memory"]["level"] = 1
        now[0] += 1
        turns(1)
        now[0] += 1
        turns(2)
        now[0] += 59
        turns(2)
        now[0] += 2
        turns(3)


# ------------------------------------------------------------------------------------------------------------------- what is asked


def test_all_verbs_but_two_can_be_asked(shared, meet):
    device, other = Device(), meet(shared.port, f"{ROOT}/#")
    with device.mqtt(shared.port) as mqtt:
        until(lambda: mqtt.connected)
        other.wait(f"{ROOT}/info")
        needed = {"label": {"label": "cat"}}
        for verb in VERBS:
            answer = other.ask(ROOT, verb, {**needed.get(verb, {}), "transaction": verb})
            assert answer["transaction"] == verb
            assert answer["status"] == ("error" if verb in ("tail", "frame") else "ok"), answer
        assert other.ask(ROOT, "status") == {"status": "ok", "data": device.status}
        assert other.ask(ROOT, "rollback", {"to": "start"}) == {"status": "ok", "data": {"text": "rollback is done"}}
        assert device.done[-1] == ("rollback", {"to": "start"})
        wrong = other.ask(ROOT, "rollback", {"to": "monday", "transaction": 5})
        assert wrong == {
            "status": "error",
            "error": "rollback: to is 'monday'",
            "hint": wrong["hint"],
            "code": UsageError.exit_code,
            "transaction": 5,
        }
        assert other.ask(ROOT, "rolback")["hint"].startswith("did you mean rollback?")
        assert other.ask(ROOT, "pause", b"\xff{")["status"] == "error"
        assert "longer than" in other.ask(ROOT, "pause", b" " * (LONGEST + 1))["error"]


def test_retained_requests_are_ignored(shared, meet, caplog):
    device, other = Device(), meet(shared.port, f"{ROOT}/#")
    other.say(f"{ROOT}/request/rollback", "{}", retain=True)
    try:
        with device.mqtt(shared.port):
            other.wait(f"{ROOT}/info")
            assert other.ask(ROOT, "pause")["status"] == "ok"
        assert device.done == [("pause", {})]
        assert "a retained request at edgeadapt/camera-3/request/rollback is ignored" in caplog.text
    finally:
        other.say(f"{ROOT}/request/rollback", "", retain=True)


# ------------------------------------------------------------------------------------------------------------- brokers that are bad


class DeafBroker:
    """Takes a connection, and then reads nothing more."""

    def __init__(self) -> None:
        self._wire = socket.create_server(("127.0.0.1", 0))
        self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self._wire.getsockname()[1]
        self._taken: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                wire, _ = self._wire.accept()
                self._taken.append(wire)
                wire.recv(64)
                wire.sendall(bytes([0x20, 2, 0, 0]))
        except OSError:
            return

    def close(self) -> None:
        self._wire.shutdown(socket.SHUT_RDWR)
        self._wire.close()
        self._thread.join()
        for wire in self._taken:
            wire.close()


def test_a_broker_that_takes_nothing_holds_up_nobody(monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.daemon.mqtt.PREDICTIONS", 0.0)
    broker, device = DeafBroker(), Device()
    mqtt = device.mqtt(broker.port, every=3600)
    mqtt.start()
    until(lambda: mqtt.connected)
    for number in range(400):
        for kind in ("prediction", "event"):
            device.events.pass_on(kind, "x" * 20000, {"number": number})
        mqtt.turn()
    client = mqtt._link._client
    assert len(client._out_messages) <= link.ON_THE_WAY
    assert len(client._out_packet) <= link.ON_THE_WAY + 2
    assert mqtt.dropped >= 400 - 256 - link.ON_THE_WAY
    assert sum(topic.endswith("/prediction") for topic, _, _ in mqtt._link._waiting) <= 1
    assert not all(mqtt._link.send("x", "y") for _ in range(link.ON_THE_WAY + 1))
    before = time.monotonic()
    mqtt.close()
    assert time.monotonic() - before < 20  # it waits for two seconds
    broker.close()


def test_without_a_broker_it_waits_longer_and_longer_and_ends_at_once(caplog):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        device = Device()
        mqtt = device.mqtt(nobody.getsockname()[1], pauses=(0.01, 0.05))
        with mqtt:
            until(lambda: mqtt._link._fails >= 4)
            assert "cannot be reached" in mqtt.complaint
    assert caplog.text.count("cannot be reached") == 1


def test_pauses_are_doubled_up_to_a_bound_and_differ(monkeypatch):
    pauses: list[float] = []
    made = link.Link(MqttConfig(enabled=True, host="127.0.0.1"), "x", ("a", "b"), [], lambda *_: None, lambda: None)
    monkeypatch.setattr(made._client, "reconnect_delay_set", lambda first, most: pauses.append(first))
    for _ in range(12):
        made._pause()
    for number, pause in enumerate(pauses):
        whole = min(120.0, 2.0**number)
        assert whole / 2 <= pause <= whole
    assert len({round(pause / min(120.0, 2.0**number), 6) for number, pause in enumerate(pauses)}) > 6


# ------------------------------------------------------------------------------------------------------------------------ memory


MEASURED = """
import sys
from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon import config, control, discovery, events, status, verbs

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024

class Told(dict):
    def __missing__(self, key):
        return None

before = resident()
from edgeadapt.runtime.daemon.mqtt import Mqtt
parts = ("adaptation", "memory", "source", "predictions", "board", "queue", "state")
told = Told({part: Told() for part in parts}, mode="serving", uptime_s=1.0)
happens = events.Events()
settings = config.MqttConfig(enabled=True, host="127.0.0.1", port=int(sys.argv[1]))
with Mqtt(settings, "measured", {}, happens, lambda: told, every=3600) as mqtt:
    while not mqtt.connected:
        pass
    for number in range(300):
        happens.tell("x", "y" * 200)
        happens.pass_on("prediction", "y" * 200)
        mqtt.turn()
    print(resident() - before)
"""


@pytest.mark.native
def test_it_adds_little_memory(shared):
    added = run_json([sys.executable, "-c", MEASURED, str(shared.port)])
    print(f"MQTT adds {added / 2**20:.1f} MiB")
    assert 0 < added < 16 * 2**20
