"""What Home Assistant is told, and what docs/mqtt.md says of the topics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeadapt.runtime.daemon import discovery, requests
from edgeadapt.runtime.daemon.mqtt import TOPICS, health_of
from edgeadapt.runtime.daemon.requests import LONGEST
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


def test_what_home_assistant_is_told():
    told = json.loads(discovery.announcement(ROOT, "edgeadapt-camera-3", "camera-3", "Raspberry Pi 5"))
    assert told["device"]["identifiers"] == ["edgeadapt-camera-3"]
    assert told["device"]["model"] == "Raspberry Pi 5"
    assert told["origin"]["name"] == "edgeadapt"
    assert told["availability"][0]["topic"] == f"{ROOT}/state"
    parts = told["components"]
    kinds = {key: part["platform"] for key, part in parts.items()}
    assert kinds == {
        **dict.fromkeys(["state", "prediction", "shift", "memory", "temperature", "pace"], "sensor"),
        "rollback": "button",
        "mark-good": "button",
        "pause": "switch",
    }
    assert len({part["unique_id"] for part in parts.values()}) == len(parts)
    assert [key for key, part in parts.items() if part.get("entity_category") == "diagnostic"] == ["memory", "temperature", "pace"]
    health = health_of(Device().status)
    for part in parts.values():
        for topic in (part.get("state_topic"), part.get("command_topic")):
            assert topic is None or re.fullmatch(rf"{ROOT}/(health|prediction|request/(rollback|mark-good)|set/pause)", topic)
        for key in re.findall(r"value_json\.(\w+)", part.get("value_template", "")) if part.get("state_topic") == f"{ROOT}/health" else ():
            assert key in health
    assert len(discovery.announcement(ROOT, "edgeadapt-camera-3", "camera-3", "x" * 100)) < LONGEST


def test_discovery_comes_before_state_and_again_when_home_assistant_starts(make, meet, monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.daemon.mqtt._SPREAD", 0.0)
    monkeypatch.setattr("edgeadapt.runtime.daemon.mqtt._SETTLED", 0.2)
    monkeypatch.setattr("edgeadapt.runtime.daemon.mqtt.LOOK", 0.05)
    broker = make()
    device, other = Device(), meet(broker.port, "#")
    with device.mqtt(broker.port, discovery=True):
        other.wait(f"{ROOT}/health", 2)
        topics = [topic for topic, _, _ in other.heard]
        assert topics[:3] == [ANNOUNCED, f"{ROOT}/state", f"{ROOT}/info"]
        late = meet(broker.port, ANNOUNCED)
        assert json.loads(late.wait(ANNOUNCED))
        assert late.heard[0][2]
        other.say("homeassistant/status", "offline")
        other.say("homeassistant/status", "online")
        other.wait(ANNOUNCED, 2)
        assert other.wait(f"{ROOT}/state", 2) == "online"
        assert len(other.payloads(ANNOUNCED)) == 2
        press = json.loads(other.payloads(ANNOUNCED)[0])["components"]
        other.say(press["rollback"]["command_topic"], press["rollback"]["payload_press"])
        other.wait(f"{ROOT}/response/rollback")
        other.say(press["pause"]["command_topic"], press["pause"]["payload_on"])
        until(lambda: any(json.loads(text)["paused"] for text in other.payloads(f"{ROOT}/health")), "health that says paused")
        other.say(press["pause"]["command_topic"], "perhaps")
        other.say(press["pause"]["command_topic"], press["pause"]["payload_off"])
        until(lambda: not json.loads(other.payloads(f"{ROOT}/health")[-1])["paused"])
    assert [verb for verb, _ in device.done] == ["rollback", "pause", "resume"]


def test_discovery_that_is_switched_off_is_taken_back_and_nobody_elses_is(make, meet):
    broker, device = make(), Device()
    with device.mqtt(broker.port, discovery=True) as mqtt:
        meet(broker.port, ANNOUNCED).wait(ANNOUNCED)
    other = meet(broker.port, ANNOUNCED)
    other.wait(ANNOUNCED)
    with device.mqtt(broker.port):
        assert other.wait(ANNOUNCED, 2) == ""
    other.say(ANNOUNCED, '{"origin": {"name": "another"}, "device": {"identifiers": ["edgeadapt-camera-3"]}}', retain=True)
    with device.mqtt(broker.port) as mqtt:
        until(lambda: mqtt.connected)
        info = meet(broker.port, f"{ROOT}/#")
        info.wait(f"{ROOT}/info")
        assert info.ask(ROOT, "status")["status"] == "ok"  # what it had heard before is answered first
    assert len(other.payloads(ANNOUNCED)) == 3


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"[" * 30000, b'{"origin": 1, "device": 2}', b"\xff"])
def test_what_others_left_at_our_place_is_not_ours(payload):
    assert not discovery.is_ours(payload, "x")


def test_the_document_has_every_topic():
    text = (TOP / "docs" / "mqtt.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z]+(?:/[a-zA-Z]+)?)` \| (\w+) \| (\d) \| (yes|no) \| (.*) \|$", text, re.MULTILINE)
    told = [(name, topic.by, str(topic.qos), "yes" if topic.retained else "no", topic.carries) for name, topic in TOPICS.items()]
    assert rows == told
    for key in health_of(Device().status):
        assert f"`{key}`" in text
    for key, part in discovery.entities(ROOT).items():
        assert str(part["name"]) in text, key
    assert all(f"`{verb}`" in text for verb in requests.LEFT_OUT)
