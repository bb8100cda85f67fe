"""A mosquitto of a test's own on a free port of this machine, somebody who listens and asks there, and a daemon's side to be told of."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeadapt.runtime.daemon.config import MqttConfig
from edgeadapt.runtime.daemon.events import Events
from edgeadapt.runtime.daemon.mqtt import Mqtt

PATIENCE = 30.0
"""Seconds that something may take on a busy machine."""

QUICK = (0.05, 0.2)


def free_port() -> int:
    with socket.socket() as wire:
        wire.bind(("127.0.0.1", 0))
        return int(wire.getsockname()[1])


def until(true: Callable[[], Any], what: str = "") -> Any:
    """What `true` gives, once that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"in {PATIENCE} s this did not come: {what}"
        time.sleep(0.01)
    return found


class Broker:
    """Mosquitto with a configuration in `folder`; `start` and `stop` may be called again and again."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.port, self._folder, self._process = free_port(), folder, None
        self._lines = lines or ("allow_anonymous true",)

    def start(self) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            pytest.fail("needs mosquitto: sudo apt-get install mosquitto")
        path = self._folder / "mosquitto.conf"
        path.write_text("\n".join(["user root", f"listener {self.port} 127.0.0.1", "persistence false", *self._lines, ""]), encoding="utf-8")
        with open(self._folder / "mosquitto.log", "ab") as log:
            self._process = subprocess.Popen([program, "-c", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self._listens, "mosquitto listens")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(PATIENCE)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "mosquitto.log").read_text(encoding="utf-8")
        with socket.socket() as wire:
            wire.settimeout(1)
            return wire.connect_ex(("127.0.0.1", self.port)) == 0


class Other:
    """Somebody else at the broker, who hears all and remembers it: `heard` is a list of (topic, payload, retained)."""

    def __init__(self, port: int, *topics: str, user: tuple[str, str] | None = None) -> None:
        self.heard: list[tuple[str, str, bool]] = []
        self._subscribed = False
        self.client = paho.Client(CallbackAPIVersion.VERSION2)
        self.client.reconnect_delay_set(1, 1)
        if user is not None:
            self.client.username_pw_set(*user)
        self.client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in topics or ("#",)])
        self.client.on_message = self._hear
        self.client.on_subscribe = lambda *_: setattr(self, "_subscribed", True)
        self.client.connect_async("127.0.0.1", port)
        self.client.loop_start()
        until(lambda: self._subscribed, "a subscription")

    def _hear(self, client: object, data: object, message: paho.MQTTMessage) -> None:
        self.heard.append((message.topic, message.payload.decode("utf-8", "replace"), message.retain))

    def payloads(self, topic: str) -> list[str]:
        return [payload for other, payload, _ in self.heard if other == topic]

    def wait(self, topic: str, count: int = 1) -> str:
        """The payload with that number at that topic."""
        until(lambda: len(self.payloads(topic)) >= count, f"message {count} at {topic}; heard {self.heard[-5:]}")
        return self.payloads(topic)[count - 1]

    def say(self, topic: str, payload: str | bytes = "", retain: bool = False) -> None:
        self.client.publish(topic, payload, 1, retain).wait_for_publish(PATIENCE)

    def ask(self, root: str, verb: str, payload: object = "") -> dict[str, Any]:
        """The response to a request."""
        before = len(self.payloads(f"{root}/response/{verb}"))
        self.say(f"{root}/request/{verb}", json.dumps(payload) if isinstance(payload, dict) else payload)
        answer: dict[str, Any] = json.loads(self.wait(f"{root}/response/{verb}", before + 1))
        return answer

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@contextmanager
def brokers(folder: Path) -> Iterator[Callable[..., Broker]]:
    """Makes brokers with these lines of configuration, and ends them."""
    made: list[Broker] = []

    def make(*lines: str) -> Broker:
        made.append(Broker(folder, *lines))
        made[-1].start()
        return made[-1]

    yield make
    for broker in made:
        broker.stop()


@contextmanager
def others() -> Iterator[Callable[..., Other]]:
    """Makes others, and ends them."""
    met: list[Other] = []

    def meet(*arguments: Any, **more: Any) -> Other:
        met.append(Other(*arguments, **more))
        return met[-1]

    yield meet
    for other in met:
        other.close()


class Device:
    """What the MQTT side of a daemon is given, and what was done with it."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Mapping[str, object]]] = []
        self.events = Events()
        self.status: Any = {
            "version": 1,
            "name": "camera-3",
            "edgeadapt": "0.1.0",
            "uptime_s": 12.34,
            "mode": "serving",
            "reason": "",
            "bundle": {"name": "model.edgeadapt", "digest": "ab" * 32, "method": "tent", "compatible": "cd", "on_trial": False},
            "guard": {"state": "watching", "since_s": 1.0, "windows": 3, "shift": 0.25, "collapse": {}, "last": ""},
            "adaptation": {"enabled": True, "paused": False, "steps": 7, "rejected": 0, "paused_steps": 0, "windows": 3, "passed": 0, "late": 0},
            "source": {"type": "camera", "name": "/dev/video0", "live": True, "complaint": "", "last_frame_s": 0.1, "counts": {}},
            "queue": {"length": 0, "limit": 64, "dropped": 2},
            "predictions": {"count": 99, "bad": 0, "per_second": 9.5, "latency_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0}},
            "compare": {"frames": 0, "agreement": None},
            "memory": {"resident": 90_000_000, "peak": 95_000_000, "budget": 128 * 2**20, "level": 0, "reason": "", "lines": {}},
            "state": {"generation": 1, "active": 1, "last_good": 1, "on_probation": False, "written_today": 0, "bytes_per_day": None, "degraded": ""},
            "interfaces": {"mqtt": ""},
            "board": {"model": "Raspberry Pi 5", "temperature_c": 51.5, "throttled": False, "load": 0.5},
            "events": [],
        }
        self.verbs: dict[str, Callable[[Mapping[str, object]], object]] = {
            verb: lambda params, verb=verb: self._do(verb, params) for verb in ("pause", "resume", "rollback", "mark-good", "label", "reload")
        }
        self.verbs |= {"status": lambda params: self.status, "tail": lambda params: iter(()), "frame": lambda params: {}}

    def _do(self, verb: str, params: Mapping[str, object]) -> object:
        self.done.append((verb, dict(params)))
        if verb in ("pause", "resume"):
            self.status["adaptation"]["paused"] = verb == "pause"
        return {"text": f"{verb} is done"}

    def mqtt(self, port: int, **more: Any) -> Mqtt:
        every, pauses = more.pop("every", 0.02), more.pop("pauses", QUICK)
        settings = MqttConfig(**{"enabled": True, "host": "127.0.0.1", "port": port, **more})
        return Mqtt(settings, "camera-3", self.verbs, self.events, lambda: self.status, lambda: ("cat", "dog"), every=every, pauses=pauses)
